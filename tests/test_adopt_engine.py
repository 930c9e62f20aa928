"""A network that runs on Docker's own IPAM, adopted and switched over by the commands of README, word for word."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import missing
from test_engine import leases, start
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, Host, Lab, until
from tests.readme import ADOPT, Line, lines

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

LEASES = "/ipam-plugin/v1/leases/default/"
WEB, DB = "192.168.77.20", "192.168.77.200"
RANGE = "192.168.77.20/30"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    with Lab(hosts=2, machines=1, etcd=1, daemon=True) as made:
        yield made


def typed(host: Host, line: Line) -> str:
    """What a line of README says, typed on the host."""
    if line.command.startswith("ipam-plugin "):
        return host.command(*shlex.split(line.command)[1:], timeout=60)
    return host.sh(line.command, timeout=60)


def network(host: Host, *words: str) -> None:
    host.docker(
        *("network", "create", "-d", "bridge", "--subnet", SUBNET4, "--ip-range", RANGE, *words),
        *("--aux-address", f"DefaultGatewayIPv4={ROUTER4}", "-o", "com.docker.network.bridge.name=br0", "lan"),
    )


def addresses(host: Host) -> dict[str, str]:
    return {each.container: each.address for each in host.live() if ":" not in each.address}


def test_a_network_is_switched_over(lab: Lab) -> None:
    """Two containers of Docker's own IPAM, a machine that nobody registered, and a second host that takes all it can
    get of the same range: both containers keep their addresses, no one else has them for a moment, and the machine's is
    kept from everybody."""
    [old, other], [machine] = lab.hosts, lab.machines
    network(old, "--gateway", old.address)
    old.docker("run", "-d", "--network", "lan", "--name", "web1", "busybox")
    old.docker("run", "-d", "--network", "lan", "--ip", DB, "--name", "db", "busybox")
    assert addresses(old) == {"web1": WEB, "db": DB}
    network(other, "--ipam-driver", "ipam-plugin")
    # It may have met web1 on its way, and taken it for a stranger.
    until(lambda: other.metric("ipam_plugin_standby") == 2, 40, "the other host has its stock")

    section = [line for line in lines() if line.heading == ADOPT]
    assert {line.prompt for line in section} == {"host1"}
    propose, apply, *switch, check = section
    with lab.written(LEASES) as written:
        before = leases(lab)
        table = typed(old, propose)
        words = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
        assert words[WEB][:2] == ["lease", "web1"]
        assert words[DB][:2] == ["lease", "db"]
        assert words[machine.address][:2] == ["reserve", machine.mac]
        assert words[ROUTER4][0] == "known", "the other host's network names it"
        assert words[other.address][0] == "known"
        assert leases(lab) == before, "it only proposes"

        said = typed(old, apply)
        # It proposes what README says, so README's own commands are what is typed.
        assert [line.strip() for line in said.partition("type:\n")[2].splitlines()] == [each.command for each in switch]
        kept = leases(lab)
        for address, name in ((WEB, "web1"), (DB, "db")):
            assert (kept[address]["kind"], kept[address]["host"]) == ("reserved", old.name)
            assert kept[address]["container"]["name"] == name
        assert (kept[machine.address]["kind"], kept[machine.address]["mac"]) == ("reserved", machine.mac)
        assert machine.sh(f"ping -c 1 -W 5 {WEB} >/dev/null && echo reached") == "reached"

        # The other host takes what there is; what is kept is not among it.
        rest = {start(other, f"c{number}") for number in range(3)}
        assert rest == {"192.168.77.21", "192.168.77.22", "192.168.77.23"}
        for line in switch[:3]:
            typed(old, line)
        for address in (WEB, DB, machine.address):
            refused = other.docker_async("run", "-d", "--network", "lan", "--ip", address, "busybox").result(60, False)
            assert refused.status != 0
        assert "full" in other.docker_async("run", "-d", "--network", "lan", "busybox").result(60, False).stderr
        for line in switch[3:]:
            typed(old, line)

        until(lambda: addresses(old) == {"web1": WEB, "db": DB}, 20, "both have their addresses again")
        after = leases(lab)
        for address, name in ((WEB, "web1"), (DB, "db")):
            assert (after[address]["kind"], after[address]["host"]) == ("endpoint", old.name)
            reached = f"ping -c 1 -W 1 {address} >/dev/null && echo reached || true"
            until(lambda reached=reached: machine.sh(reached) == "reached", 30, f"{name} is reached")
        until(lambda: all("container" in each for each in ours(lab, old).values()), 30, "the leases name containers")
        assert typed(old, check) == ""

    # An ordinary container from now on: it stops, and comes back with its address.
    old.docker("restart", "-t", "0", "web1")
    assert addresses(old)["web1"] == WEB
    holders: dict[str, set[tuple[str, str]]] = {WEB: set(), DB: set(), machine.address: set()}
    for what, address, value in written:
        if address in holders:
            assert what == "PUT", f"{address} was free for a moment"
            lease = json.loads(value)
            holders[address].add((lease["kind"], lease.get("host", "")))
    theirs = {("reserved", old.name), ("endpoint", old.name)}
    assert holders == {WEB: theirs, DB: theirs, machine.address: {("reserved", "")}}, "given to nobody else"

    def shown() -> str:
        return old.command("show", WEB)

    until(lambda: "is taken (endpoint): container web1 on host host1" in shown(), 40, "show names the container")
    assert "before: a reservation for container web1 on host host1 by " in shown()
    assert ": given to a container on host host1" in shown()


def ours(lab: Lab, host: Host) -> dict[str, dict[str, Any]]:
    return {
        address: each
        for address, each in leases(lab).items()
        if (each["kind"], each.get("host")) == ("endpoint", host.name)
    }
