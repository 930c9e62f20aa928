"""Docker hosts that die, or seem to: since when, what a living one may free, and what is noticed when they return."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from conftest import missing
from test_engine import leases, start
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, Host, Lab, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

ABSENT = 60.0  # seconds: a heartbeat lasts 30 s, and it is written down up to 10 s later


@pytest.fixture(scope="module")
def lan() -> Iterator[Lab]:
    """Three Docker hosts that all have the network, and two machines without Docker."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    with Lab(hosts=3, machines=1, etcd=1, daemon=True, config={"standby": 1}) as lab:
        lab.hosts[0].command("segment", "default", "--router", ROUTER4)
        for host in lab.hosts:
            network(host)
        yield lab


def network(host: Host) -> None:
    host.docker(
        *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin"),
        *("-o", "com.docker.network.bridge.name=br0", "--subnet", SUBNET4),
        *("--aux-address", f"DefaultGatewayIPv4={ROUTER4}", "lan"),
    )


def wait_absent(witness: Host, host: Host) -> str:
    """Since when it is absent, says the command on another host."""

    def absent() -> str:
        [line] = [each for each in json.loads(witness.command("hosts", "-o", "json")) if each["host"] == host.name]
        return "" if line["alive"] else str(line["absent"])

    since = until(absent, ABSENT, f"{host.name} is absent", pause=0.5)
    assert f"NO since {since}" in witness.command("hosts")
    return since


def retire(witness: Host, host: Host, *options: str) -> tuple[list[str], list[str]]:
    """The addresses that are free now, and the lines about those that stay."""
    said = witness.command("host", "retire", host.name, *options, timeout=120, check=False).splitlines()
    return [line.split()[0] for line in said if line.endswith(" is free")], [line for line in said if "stays" in line]


def of_host(lab: Lab, host: Host) -> set[str]:
    return {address for address, each in leases(lab).items() if each.get("host") == host.name}


def test_a_host_that_lost_its_power(lan: Lab) -> None:
    """What it had stays taken until a living host has asked: silent addresses are freed, one for which a machine
    answers is not, and without a living daemon nothing is. It returns, is told what it lost, and serves again (P3, P5).
    """
    [first, second, dead], [machine] = lan.hosts, lan.machines
    for name, address in (("web", "192.168.77.70"), ("db", "192.168.77.71"), ("mail", "192.168.77.72")):
        assert start(dead, name, "--ip", address) == address
    before = of_host(lan, dead)
    assert "is alive" in refused(first, "host", "retire", dead.name, "--force")
    dead.kill()
    since = wait_absent(first, dead)
    assert of_host(lan, dead) == before

    for host in (first, second):
        host.services["daemon"].terminate()
    assert "no daemon is alive" in refused(first, "host", "retire", dead.name, "--force")
    assert of_host(lan, dead) == before
    for host in (first, second):
        host.start_daemon()
    until(lambda: first.command("hosts").count(" yes ") == 2, 40, "two hosts live")
    assert wait_absent(second, dead) == since

    machine.add_address("192.168.77.71")
    freed, stays = retire(first, dead)
    machine.remove_address("192.168.77.71")
    assert {"192.168.77.70", "192.168.77.72", dead.address} <= set(freed)
    assert any(line.startswith("192.168.77.71 ") and f"MAC {machine.mac}" in line for line in stays)
    assert leases(lan)["192.168.77.71"]["host"] == dead.name
    assert start(second, "other", "--ip", "192.168.77.70") == "192.168.77.70"

    dead.start()
    until(lambda: "ALARM host_was_retired" in dead.log(), 60, "the alarm")
    assert "192.168.77.70 (" in dead.log()
    until(lambda: dead.address in of_host(lan, dead), 30, "its own address is in the register")
    [line] = [each for each in json.loads(first.command("hosts", "-o", "json")) if each["host"] == dead.name]
    assert (line["alive"], line["absent"]) == (True, "")
    assert any("was retired" in each for each in line["alarms"])
    # dockerd releases at its start what its containers had: its own lease, and the one that is another's by now.
    assert leases(lan)["192.168.77.70"]["host"] == second.name
    assert start(dead, "new") != "192.168.77.70"


def refused(host: Host, *words: str) -> str:
    """What a command that must fail says."""
    with pytest.raises(labs.CommandError) as error:
        host.command(*words, timeout=60)
    return str(error.value.stderr)


def test_a_host_that_was_only_cut_off(lan: Lab) -> None:
    """It runs on without the LAN and is retired by force, so that an address of its running container becomes another
    host's. When it returns nothing stays unnoticed: it says what it lost, and which container's address is another's.
    Its late release leaves the other's lease alone (whereabouts#75), and nothing of its own is taken any more."""
    living, cut = lan.hosts[0], lan.hosts[1]
    addresses = {"one": "192.168.77.80", "two": "192.168.77.81"}
    for name, address in addresses.items():
        assert start(cut, name, "--ip", address) == address
    cut.cut_off()
    wait_absent(living, cut)
    freed, stays = retire(living, cut, "--force")
    assert set(addresses.values()) <= set(freed)
    assert stays == []
    assert of_host(lan, cut) == set()
    assert start(living, "heir", "--ip", addresses["one"]) == addresses["one"]
    theirs = leases(lan)[addresses["one"]]["token"]

    cut.rejoin()
    until(lambda: "ALARM host_was_retired" in cut.log(), 60, "the alarm")
    until(lambda: cut.address in of_host(lan, cut), 30, "its own address is in the register again")
    assert {each.address for each in cut.live()} >= set(addresses.values())

    # Whoever hears the container that ran on says so at once; it is no one that has just stopped.
    def noticed() -> bool:
        cut.docker("exec", "one", "ping", "-c", "1", "-W", "1", living.address, timeout=20)
        lines = [line for host in lan.hosts for line in host.log().splitlines()]
        return any("ALARM address_used_twice" in line and addresses["one"] in line for line in lines)

    until(noticed, 30, "two machines on one address are noticed", pause=0.5)
    # The look at dockerd says which running container has lost its address, and gives back what is nobody's.
    until(
        lambda: any("ALARM address_lost" in line and addresses["one"] in line for line in cut.log().splitlines()),
        60,
        "a second holder is noticed",
    )
    until(lambda: leases(lan).get(addresses["two"], {}).get("host") == cut.name, 60, "the other one's lease is back")
    cut.docker("stop", "-t", "0", "one")
    assert leases(lan)[addresses["one"]]["token"] == theirs
    assert "is alive" in refused(living, "host", "retire", cut.name, "--force")
    assert start(cut, "three") not in set(addresses.values())
