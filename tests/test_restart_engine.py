"""The daemon of a host with a hundred running containers is restarted, as an upgrade does it, while the engine goes on
asking: nothing changes for what runs, and no request fails.

How long requests wait is measured by `python -m tests.bench containers`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from callers import Attempt, Callers, Work, container
from conftest import missing
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, Host, Lab, LabError, until
from tests.lab.machines import DAEMON_SOCKET

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

LEASES = "/ipam-plugin/v1/leases/default/"
CONTAINERS = [f"c{number}" for number in range(100)]
RESTARTS = 2


@pytest.fixture
def lan() -> Iterator[Lab]:
    """A Docker host with the socket of the installed units, and a machine without Docker."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    with Lab(hosts=1, machines=1, etcd=1, daemon=True, socket_unit=True) as lab:
        lab.hosts[0].docker(
            *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "--subnet", SUBNET4),
            *("--aux-address", f"DefaultGatewayIPv4={ROUTER4}", "-o", "com.docker.network.bridge.name=br0"),
            # So many are asked for that the LAN's own machines would be found, and each become a `conflict`.
            *("--ipam-opt", f"exclude={lab.machines[0].address},{lab.etcd[0].address}", "lan"),
        )
        yield lab


class Record(NamedTuple):
    """A key of etcd: the bytes of its value, and the revision that wrote them."""

    value: bytes
    revision: int


def leases(lab: Lab) -> dict[str, Record]:
    """All but standby, which comes and goes."""
    told = json.loads(lab.etcdctl("get", "--prefix", LEASES, "-w", "json"))
    found = {
        base64.b64decode(each["key"]).decode().removeprefix(LEASES): Record(
            base64.b64decode(each["value"]), each["mod_revision"]
        )
        for each in told["kvs"]
    }
    return {address: each for address, each in found.items() if json.loads(each.value)["kind"] != "standby"}


def named(lab: Lab) -> int:
    """How many leases say which container has them."""
    return sum("container" in json.loads(each.value) for each in leases(lab).values())


def silent(lab: Lab, addresses: list[str]) -> str:
    """Those that do not answer a machine without Docker."""
    loop = f"for a in {' '.join(addresses)}; do busybox ping -c 1 -W 2 $a >/dev/null || echo $a; done"
    return lab.machines[0].sh(loop, timeout=250)


def docker_run(host: Host) -> Work:
    def work(attempt: Attempt) -> None:
        attempt(lambda: host.docker("run", "--rm", "--network", "lan", "busybox", "true"))

    return work


def restart(host: Host) -> tuple[float, float]:
    """As `systemctl restart`. From when to when (monotonic seconds) no process of the daemon was there."""
    assert host.services["daemon"].terminate(75) == 0, host.services["daemon"].tail()
    gone = time.monotonic()
    host.start_daemon(wait=False)
    started = time.monotonic()
    host.wait_daemon()
    return gone, started


def test_a_restart_under_a_hundred_containers(lan: Lab) -> None:
    """P8: their leases are the same bytes of the same revision, they are the same processes with the same interfaces,
    and answer all the time. Requests that come while no daemon is there wait in the socket, and every one is granted,
    the engine's own and others.
    """
    host = lan.hosts[0]
    host.docker_run(CONTAINERS, "--network", "lan")
    until(lambda: named(lan) == len(CONTAINERS), 30, "the leases say which container has them")
    before, running = leases(lan), host.sighted()
    assert {each.address for each in running} < set(before)
    assert len(running) == len(CONTAINERS)
    pool = next(json.loads(each.value)["pool"] for each in before.values() if b'"endpoint"' in each.value)
    socket = Path(f"/proc/{host.pid}/root{DAEMON_SOCKET}")
    driver = container(socket, pool)
    with Callers({"docker run": docker_run(host), "driver 1": driver, "driver 2": driver}) as callers:
        until(lambda: callers.have_asked(since=0), 30, "all have asked")
        for _ in range(RESTARTS):
            gone, started = restart(host)
            until(lambda: callers.have_asked(since=started), 60, "all have asked again")  # noqa: B023
            waited = [each for each in callers.tries if each.began < started and each.ended > gone]
            assert {each.caller for each in waited} == {"docker run", "driver 1", "driver 2"}
            assert silent(lan, [each.address for each in running]) == ""
    assert callers.failed() == []
    print(f"{len(callers.tries)} requests, the longest waits: {callers.longest()}")
    assert set(host.sighted()) == set(running)
    with contextlib.suppress(LabError):  # the engine gives back what `docker run` had in its own time
        until(lambda: leases(lan) == before, 10, "the leases are as before")
    assert leases(lan) == before
