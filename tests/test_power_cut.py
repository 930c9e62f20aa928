"""Power cuts of really booted hosts: containers with `--restart=always` come back, and nobody types anything.

Installed as README says, etcd on the same hosts. weaveworks/weave#2222: after a reboot the containers stayed down,
because the plugin, its store and Docker waited for each other.

The unit's own /proc shows the boot id of the kernel and not the one that nspawn gives its machine, so to the daemon
these boots are restarts: it takes over its heartbeat at once. The waits after a real boot are in test_boot_wait.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.booted import HOSTS, Lan, address_of, booted_lan
from tests.lab import until
from tests.readme import lines, type_all

pytestmark = [pytest.mark.root, pytest.mark.engine]

CONTAINERS = ("app", "fixed")
BOOTED = 60
"""Seconds until all containers run, from the power on: etcd elects, the heartbeat of the boot before ends (30 s)."""


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    """Three hosts on which everything was typed that README says of the installation, and then two containers each."""
    with booted_lan() as made:
        for line in lines():
            if line.heading == "Install it on several hosts":
                type_all(made, [line])
        for number, host in enumerate(made.hosts.values(), 201):
            always = "docker run --detach --network lan --restart=always"
            host(f"{always} --name app busybox sleep 1000000", 60)
            host(f"{always} --name fixed --ip 192.168.77.{number} busybox sleep 1000000", 60)
            host("docker rm --force web1", 60)
        yield made


def up(lan: Lan) -> bool:
    """Whether all containers run, with addresses that answer and are these hosts' leases; there are no others."""
    held = set()
    for name, host in lan.hosts.items():
        if sorted(host("docker ps --format '{{.Names}}'", check=False).stdout.split()) != sorted(CONTAINERS):
            return False
        held |= {(name, address_of(host, container)) for container in CONTAINERS}
    leases = json.loads(lan.hosts["host1"]("ipam-plugin leases --kind endpoint -o json").stdout)
    if sorted((each["host"], each["address"]) for each in leases) != sorted(held):
        return False
    assert len({address for _, address in held}) == len(held), "an address twice"
    return all(lan.printer.ping(address) for _, address in held)


@pytest.mark.parametrize("cut", [("host1",), HOSTS], ids=["one host", "all hosts"])
def test_weave_2222_containers_come_back_after_a_power_cut(lan: Lan, cut: tuple[str, ...]) -> None:
    """P5: each with one lease in etcd, `--ip` with its own address, also when etcd itself has to elect first."""
    until(lambda: up(lan), 30, "the containers run", pause=0.5)
    boots = {name: lan.hosts[name]("cat /proc/sys/kernel/random/boot_id").stdout for name in cut}
    began = time.monotonic()
    lan.power_cut(*cut)
    until(lambda: up(lan), max(1.0, began + BOOTED - time.monotonic()), "the containers run again", pause=0.5)
    print(f"power cut of {', '.join(cut)}: all containers run after {time.monotonic() - began:.1f} s")
    for number, (name, host) in enumerate(lan.hosts.items(), 201):
        assert address_of(host, "fixed") == f"192.168.77.{number}"
        if name in cut:
            assert host("cat /proc/sys/kernel/random/boot_id").stdout != boots[name]
