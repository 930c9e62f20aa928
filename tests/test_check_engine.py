"""`ipam-plugin check` on a real Docker Engine: what is broken by hand is found, and mended where that is safe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import missing
from test_engine import leases, start
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, Host, Lab, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

PREFIX = "/ipam-plugin/v1/"
LEASES = f"{PREFIX}leases/default/"
OLD = "2020-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    # Without the daemon's own look, which would mend the same.
    config = {"docker": {"grace": "30s", "reconcile": False}}
    with Lab(hosts=2, machines=1, etcd=1, daemon=True, config=config) as made:
        yield made


def found(host: Host, *words: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]], str]:
    """Exit status, the differences by kind and address, and what is said on stderr."""
    env = {"IPAM_PLUGIN_CONFIG": "/etc/ipam-plugin/config.yaml"}
    command = (sys.executable, "-m", "ipam_plugin", "check", "-o", "json", *words)
    done = host.run(*command, timeout=120, check=False, env=env)
    assert done.status in (0, 1), done
    return done.status, {(each["kind"], each["address"]): each for each in json.loads(done.stdout)}, done.stderr


def test_check(lab: Lab) -> None:
    """Nothing where all agree. Then a lost lease, a vanished container, one that still answers, a stranger's use of a
    container's address, a dead host: each is found, what may be mended is, and the second check says what is left."""
    [host, other], [machine] = lab.hosts, lab.machines
    network = (
        *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "--subnet", SUBNET4),
        *("--aux-address", f"DefaultGatewayIPv4={ROUTER4}", "-o", "com.docker.network.bridge.name=br0", "lan"),
    )
    for each in lab.hosts:
        each.docker(*network)
    lost, gone = start(host, "lost"), start(host, "gone")
    shared, theirs = start(host, "shared"), start(other, "theirs")
    until(lambda: found(host)[:2] == (0, {}), 20, "register, Docker and wire agree", pause=1)

    # A release that never arrived: the lease is there as it was, and the container is not.
    before = leases(lab)
    host.docker("rm", "-f", "gone")
    orphan = {
        **before[gone],
        "since": OLD,
        "token": "orphan",
    }  # one that ended here would be taken back when it is seen
    lab.etcdctl("put", LEASES + gone, json.dumps(orphan))
    answering = "192.168.77.222"
    lab.etcdctl("put", LEASES + answering, json.dumps({**orphan, "token": "other", "mac": machine.mac}))
    machine.add_address(answering)
    lab.etcdctl("del", LEASES + lost)
    machine.add_address(shared)
    other.services["daemon"].terminate()
    status, some, _ = found(host)
    assert status == 1
    assert {("no_lease", lost), ("vanished", gone), ("vanished", answering), ("used_twice", shared)} <= some.keys()
    assert ("host_gone", "") in some
    assert machine.mac in some["used_twice", shared]["what"]
    assert not any(each["repaired"] for each in some.values())

    status, mended, said = found(host, "--repair")
    assert status == 1
    assert {key for key, each in mended.items() if each["repaired"]} == {("no_lease", lost), ("vanished", gone)}, said
    assert "looking again in" in said
    after = leases(lab)
    assert gone not in after
    assert (after[lost]["host"], after[lost]["mac"]) == (before[lost]["host"], before[lost]["mac"])
    assert after[lost]["container"]["name"] == "lost"
    assert answering in after
    assert after[theirs] == before[theirs]

    status, left, _ = found(host)
    assert status == 1
    assert {key for key in left if key[0] != "host_gone"} == {("vanished", answering), ("used_twice", shared)}

    # What cannot be asked is said, and nothing follows from it.
    host.services["daemon"].terminate()
    host.kill("dockerd")
    status, blind, _ = found(host, "--repair")
    assert status == 1
    assert "dockerd at" in blind["not_compared", ""]["what"]
    assert answering in leases(lab)
    machine.remove_address(answering)
    machine.remove_address(shared)
