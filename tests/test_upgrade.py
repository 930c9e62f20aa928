"""Two versions of the program take turns on one register, and serve it side by side: nothing that is taken is given.

The older ones are real: from this repository's history, as real processes on a real etcd.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import RealEtcd, missing
from daemons import ROOT, DaemonProcess, ask
from etcd_server import until
from ipam_plugin.model import ENDPOINT, HELD, read_lease
from ipam_plugin.schema import VERSION

pytestmark = pytest.mark.etcd

# The first daemon there was, and the versions with which each large part came.
VERSIONS = {
    "the first daemon": "16381965a7a7e054d5545b41e76d9caafebdfc37",
    "0.1.0, before the wire was asked": "d97f6c512dff122bc84c3ddd1de90f3bf5f52d8e",
    "before holds and retired hosts": "816bc4414996de6afa6a836c193ec672624c3dec",
}
SUBNET = "198.18.0.0/26"
KNOWN_TO_ALL = ("etcd", "host", "socket", "state_dir", "prefix", "metrics", "probe")

Serve = Callable[..., DaemonProcess]


@pytest.fixture(scope="module", params=VERSIONS.values(), ids=[name.replace(" ", "-") for name in VERSIONS])
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The older program, as a directory for PYTHONPATH."""
    told = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(ROOT), "archive", request.param, "ipam_plugin"],
        capture_output=True,
        check=False,
    )
    if told.returncode != 0:
        # A shallow clone, or files without their repository.
        missing("etcd", f"the history does not have {request.param}: {told.stderr.decode().strip()}")
    directory = tmp_path_factory.mktemp("older")
    with tarfile.open(fileobj=io.BytesIO(told.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture
def serve(tmp_path: Path, etcd: RealEtcd) -> Iterator[Serve]:
    """Starts a daemon of a host, of an older version or of this one; its state and its socket are the host's."""
    running: dict[str, DaemonProcess] = {}

    def one(host: str, older: Path | None = None, **config: Any) -> DaemonProcess:
        if host in running:
            before = running.pop(host)
            before.terminate()
            before.wait()
        daemon = DaemonProcess(tmp_path / host, etcd.settings.endpoints, host=host, prefix=etcd.prefix, **config)
        running[host] = daemon
        if older is None:
            daemon.start()
        else:
            # What it does not know yet must go from the file at a downgrade: it names it, and does not start.
            told = {name: value for name, value in daemon.config.items() if name in KNOWN_TO_ALL}
            daemon.config_file.write_text(json.dumps(told))
            daemon.start((sys.executable, "-P", "-m", "ipam_plugin"), PYTHONPATH=str(older))
        daemon.wait_answering()
        return daemon

    try:
        yield one
    finally:
        for each in running.values():
            each.kill()


def values(etcd: RealEtcd, below: str = "leases/default/") -> dict[str, dict[str, Any]]:
    found, _ = etcd.client.list(etcd.prefix + below, deadline=float("inf"))
    return {each.key.rpartition("/")[2]: json.loads(each.value) for each in found}


def given(daemon: DaemonProcess, pool: str, mac: int, address: str = "") -> str:
    reply = daemon.request_address(pool, f"02:00:00:00:00:{mac:02x}", address)
    assert reply.ok, f"{daemon.host}: {reply.error}"
    answer = reply.body["Address"]
    assert isinstance(answer, str)
    return answer.partition("/")[0]


def test_the_older_one_is_the_older_one(older: Path) -> None:
    """Otherwise all that follows would compare this version with itself."""
    said = subprocess.run(
        [sys.executable, "-P", "-c", "import ipam_plugin; print(ipam_plugin.__file__)"],
        env={"PYTHONPATH": str(older)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(said.strip()).is_relative_to(older)
    assert not (older / "ipam_plugin/schema.py").exists()


def test_upgrade_and_downgrade_of_a_host(older: Path, serve: Serve, etcd: RealEtcd) -> None:
    """Its containers keep their addresses in both directions, and each version serves what the other has given."""
    daemon = serve("a", older)
    pool = daemon.pool(SUBNET)
    first = [given(daemon, pool, mac) for mac in range(1, 4)]
    fixed = given(daemon, pool, 4, "198.18.0.40")
    before = values(etcd)
    assert set(before) == {*first, fixed}

    daemon = serve("a", hold="10m")  # the upgrade
    until(lambda: values(etcd, "schema"), "the version of the schema")
    assert values(etcd, "schema")["schema"]["version"] == VERSION
    assert values(etcd) == before
    assert daemon.pool(SUBNET) == pool
    second = [given(daemon, pool, mac) for mac in range(5, 8)]
    stopped = given(daemon, pool, 8, "198.18.0.41")
    assert len({*first, fixed, *second, stopped}) == 8
    assert daemon.release_address(pool, first.pop()).ok
    assert daemon.release_address(pool, stopped).ok  # held for its container, which the older one may not know
    there = values(etcd)
    assert set(there) == {*first, fixed, *second, stopped}
    assert there[stopped]["kind"] == HELD

    daemon = serve("a", older)  # the downgrade
    assert daemon.pool(SUBNET) == pool
    assert values(etcd) == there
    third = [given(daemon, pool, mac) for mac in range(9, 12)]
    assert len({*first, fixed, *second, stopped, *third}) == 10
    reply = daemon.request_address(pool, "02:00:00:00:00:0c", fixed)
    assert "is taken" in reply.error
    assert daemon.release_address(pool, second.pop()).ok
    assert set(values(etcd)) == {*first, fixed, *second, stopped, *third}
    there = values(etcd)

    daemon = serve("a", hold="10m")  # and up again
    assert values(etcd) == there
    for address in (*first, fixed, *second, *third):
        assert daemon.release_address(pool, address).ok
    # The older one did not write down that `fixed` was asked for by --ip, so that one has no hold.
    assert {name: each["kind"] for name, each in values(etcd).items()} == {stopped: HELD}
    assert given(daemon, pool, 13, stopped) == stopped


def test_both_versions_at_once_never_give_one_address_twice(older: Path, serve: Serve, etcd: RealEtcd) -> None:
    """Hosts are upgraded one after the other, and serve meanwhile."""
    daemons = [serve("a", older), serve("b")]
    pools = [daemon.pool(SUBNET) for daemon in daemons]
    assert pools[0] == pools[1]
    replies = []
    with ThreadPoolExecutor(16) as threads:
        asked = [
            threads.submit(
                ask,
                daemon.socket,
                "IpamDriver.RequestAddress",
                {
                    "PoolID": pools[0],
                    "Address": "",
                    "Options": {"com.docker.network.endpoint.macaddress": f"02:00:00:00:{number:02x}:{count:02x}"},
                },
            )
            for count in range(40)
            for number, daemon in enumerate(daemons)
        ]
        replies = [each.result() for each in asked]
    addresses = [reply.body["Address"] for reply in replies if reply.ok]
    assert len(addresses) == len(set(addresses)) == 62
    assert all("is full" in reply.error for reply in replies if not reply.ok)
    assert {each["kind"] for each in values(etcd).values()} == {ENDPOINT}
    assert len(values(etcd)) == 62


def test_what_the_older_one_does_not_know_is_taken_and_stays(older: Path, serve: Serve, etcd: RealEtcd) -> None:
    """Kinds and fields of a version that does not exist yet: an address is never free because a program is old."""
    for program in (older, None):
        daemon = serve("a", program)
        pool = daemon.pool(SUBNET)
        mine = given(daemon, pool, 1)
        value = {**values(etcd)[mine], "colour": {"of": "its cable"}}
        for address, lease in ((mine, value), ("198.18.0.50", {"kind": "loaned", "host": "a", "token": "t"})):
            etcd.cluster.etcdctl("put", f"{etcd.prefix}leases/default/{address}", json.dumps(lease))
        shared = daemon.call("IpamDriver.RequestAddress", {"PoolID": pool, "Address": mine, "Options": None})
        assert shared.ok  # a replay of that endpoint: noted in its lease, which is written anew
        there = values(etcd)[mine]
        assert ("colour" in there) == (program is None)
        there.pop("change", "")
        assert {**there, "colour": value["colour"]} == {**value, "noted": 1}
        assert "is taken" in daemon.request_address(pool, "02:00:00:00:00:02", "198.18.0.50").error
        assert daemon.release_address(pool, "198.18.0.50").ok
        assert values(etcd)["198.18.0.50"]["kind"] == "loaned"
        assert daemon.release_address(pool, mine).ok  # the note
        assert read_lease(json.dumps(values(etcd)[mine]).encode()).token == value["token"]
        assert daemon.release_address(pool, mine).ok
        assert mine not in values(etcd)
