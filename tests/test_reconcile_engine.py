"""What a real dockerd lost, kept, or has again, and what becomes of the leases."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from conftest import missing
from daemons import endpoint
from test_engine import DEADLINE, address_of, failed, leases, start
from tests import lab as labs
from tests.lab import SUBNET4, Host, Lab, LabError, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

LEASES = "/ipam-plugin/v1/leases/default/"
GRACE = 30.0  # the least that can be configured


@pytest.fixture(scope="module")
def lan() -> Iterator[Lab]:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    config = {"docker": {"grace": "30s", "socket": labs.DOCKER_SOCKET}, "cooldown": "0s", "standby": 0}
    with Lab(hosts=1, machines=1, etcd=1, daemon=True, config=config) as lab:
        host = lab.hosts[0]
        host.docker(
            *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "--subnet", SUBNET4),
            *("-o", "com.docker.network.bridge.name=br0", "lan"),
        )
        yield lab


def name_in(lab: Lab, address: str) -> str:
    container = leases(lab).get(address, {}).get("container") or {}
    return str(container.get("name", ""))


def pool_of(lab: Lab, address: str) -> str:
    return str(leases(lab)[address]["pool"])


def ask(host: Host, pool: str, address: str) -> None:
    """As dockerd asks for an endpoint that it then fails to make."""
    status, body = host.driver(
        "IpamDriver.RequestAddress", {"PoolID": pool, "Address": address, "Options": endpoint("02:42:00:00:00:51")}
    )
    assert status == 200, body


def test_names_are_there_within_seconds_and_lost_leases_come_back(lan: Lab) -> None:
    """The operator sees the container's name; a lease that was deleted in etcd under a running container comes back
    before anybody else gets the address, with the same MAC."""
    host = lan.hosts[0]
    address = start(host, "web")
    until(lambda: name_in(lan, address) == "web", 8, "the lease says who has it")
    before = leases(lan)[address]
    assert before["container"]["image"] == "busybox"
    assert before["container"]["network"] == "lan"
    host.docker("rename", "web", "shop")
    lan.etcdctl("del", LEASES + address)
    began = time.monotonic()
    until(lambda: name_in(lan, address) == "shop", 45, "the lease is there again")
    assert leases(lan)[address]["mac"] == before["mac"]
    assert time.monotonic() - began < 40
    host.docker("rm", "-f", "shop")
    until(lambda: address not in leases(lan), 5, "its release fits the lease that was written again")


def test_what_vanished_is_freed_and_what_runs_is_not(lan: Lab) -> None:
    """libnetwork#1207, contiv#1133, calico#746: dockerd is killed while a container with --ip runs, and an address was
    asked for whose endpoint was never made. The container starts again with its address at once, the orphan is taken
    by name at once or freed by itself, and a running container keeps its lease all the time."""
    host = lan.hosts[0]
    kept = start(host, "kept", "--restart", "always")
    fixed = start(host, "db", "--ip", "192.168.77.50")
    pool = pool_of(lan, kept)
    ask(host, pool, "192.168.77.60")
    ask(host, pool, "192.168.77.61")
    ask(host, pool, "192.168.77.62")
    host.services["daemon"].kill(family=True)  # so that the engine's releases at its start reach nobody in time
    host.kill("dockerd")
    host.start_daemon()
    host.start_dockerd()
    until(lambda: name_in(lan, address_of(host, "kept")) == "kept", 20, "the container that restarts has its lease")
    host.docker("start", "db")
    assert address_of(host, "db") == fixed
    assert start(host, "named", "--ip", "192.168.77.60") == "192.168.77.60"
    assert "192.168.77.60" in failed(host, "run", "--network", "lan", "--ip", "192.168.77.60", "busybox")
    # Not Docker's, but somebody answers there (whereabouts#176).
    lan.machines[0].add_address("192.168.77.62")
    until(lambda: "192.168.77.61" not in leases(lan), 2 * GRACE + 45, "the orphan is free")
    until(lambda: "orphan_answers" in host.log(), 40, "the alarm")
    there = leases(lan)
    assert there["192.168.77.62"]["kind"] == "endpoint"
    for container in ("kept", "db", "named"):
        assert there[address_of(host, container)]["container"]["name"] == container
    lan.machines[0].remove_address("192.168.77.62")


def test_what_an_engine_left_half_started_is_given_to_nobody(lan: Lab) -> None:
    """The engine is killed after it had made a container's interfaces and before it let it run. The next one knows
    nothing of it, and releases its address: but the kernel goes on to answer for it (seen with 20.10)."""
    host = lan.hosts[0]
    address = "192.168.77.80"

    def waits() -> list[labs.Sighting]:
        return [each for each in host.sighted() if each.address == address and not each.started]

    def caught() -> bool:
        """It lasts for a tenth of a second; a container that came through is tried again."""
        container = threading.Thread(target=attempt, daemon=True)
        container.start()
        while container.is_alive():
            if waits():
                host.kill("dockerd")
                container.join(60)
                found = bool(waits())
                host.start_dockerd()
                host.docker("rm", "-f", "half")
                return found
            time.sleep(0.002)
        return False

    def attempt() -> None:
        with contextlib.suppress(LabError):  # the engine dies under it
            host.docker("run", "-d", "--network", "lan", "--ip", address, "--name", "half", "busybox")
            host.docker("rm", "-f", "half")

    until(caught, 120, "an engine was killed between a container's interfaces and its start")
    [left] = waits()
    until(lambda: address not in leases(lan), 30, "the engine has released it")
    told = failed(host, "run", "--network", "lan", "--ip", address, "busybox")
    assert f"{address} " in told
    assert left.mac in told
    assert waits() == [left]
    os.kill(left.pid, signal.SIGKILL)
    until(lambda: not waits(), 10, "it is gone")
    assert start(host, "whole", "--ip", address) == address
    host.docker("rm", "-f", "whole")


def test_the_engine_answers_while_it_waits_for_an_address(lan: Lab) -> None:
    """P6: a request for an own orphan waits for a look at the very engine that waits for the request. It is refused
    or granted within its deadline, and dockerd goes on."""
    host = lan.hosts[0]
    address = start(host, "busy", "--ip", "192.168.77.70")
    began = time.monotonic()
    assert "is taken" in failed(host, "run", "--network", "lan", "--ip", address, "busybox")
    assert time.monotonic() - began < DEADLINE / 2
    assert host.api("GET", "/networks")
    host.docker("rm", "-f", "busy")


def test_amazon_711_another_engine_without_containers_frees_nothing(lan: Lab) -> None:
    """After a power cut the host's engine comes up with another ID and knows no container: however often it says so,
    what was given before stays, and the operator decides."""
    host = lan.hosts[0]
    mine = {start(host, name) for name in ("one", "two")}
    until(lambda: all(name_in(lan, address) for address in mine), 10, "the leases say who has them")
    before = {address: leases(lan)[address]["token"] for address in mine}
    engine = host.docker("info", "-f", "{{.ID}}")
    host.kill()
    host.boot()
    host.sh("rm -rf /var/lib/docker/* /etc/docker/key.json")
    host.start_daemon()
    host.start_dockerd()
    assert host.docker("info", "-f", "{{.ID}}") != engine
    assert host.docker("ps", "-aq") == ""
    looks = 'ipam_plugin_docker_looks_total{result="complete"}'
    seen = host.metric(looks)
    until(lambda: host.metric(looks) >= seen + 3, 120, "three more looks, 30 s apart", pause=0.5)
    assert {address: each["token"] for address, each in leases(lan).items() if address in mine} == before
