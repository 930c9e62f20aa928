"""Strangers on the LAN of real Docker Engines: machines that nobody registered, dead wires, proxy ARP, floods."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import missing
from daemons import GATEWAY, endpoint
from test_engine import DEADLINE, failed, leases, of_kind, start
from tests import lab as labs
from tests.lab import ROUTER4, ROUTER6, SUBNET4, SUBNET6, Host, Lab, machines, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

LEASES = "/ipam-plugin/v1/leases/default/"
STANDBY = 2  # unless configured
FRAMES = ("ipam_plugin_wire_frames_total", "ipam_plugin_wire_frames_lost_total")
RECEIVED = "cat /sys/class/net/br0/statistics/rx_packets"
VERDICTS = ("free", "stranger", "ours", "heard", "unknown")
SETTLING = 20.0  # seconds in which the stock is full again: a full probe takes up to 6 s, on two busy cores


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    """Two Docker hosts, two machines without Docker and a router; etcd is reached beside the LAN."""
    with Lab(hosts=2, machines=2, etcd=1, etcd_on="management", daemon=True) as lab:
        lab.hosts[0].command("segment", "default", "--router", ROUTER4, "--router", ROUTER6)
        yield lab


@pytest.fixture(scope="module")
def fleet() -> Iterator[Lab]:
    """Eight hosts with daemons and no engines, on a LAN of their own."""
    with Lab(hosts=8, machines=0, etcd=1, dockerd=False, daemon=True) as lab:
        yield lab


@pytest.fixture
def lan(shared: Lab) -> Iterator[Lab]:
    """The shared lab. Afterwards nothing is left in etcd but the hosts' own addresses."""
    own = {machine: set(machine.addresses()) for machine in [*shared.machines, shared.router] if machine}
    yield shared
    for machine, before in own.items():
        for address in set(machine.addresses()) - before:
            machine.remove_address(address.partition("/")[0])
    for host in shared.hosts:
        remove_all(host)
    for address in of_kind(shared, "conflict"):
        shared.etcdctl("del", LEASES + address)
    until(lambda: not leftovers(shared), 10, "only the hosts' own leases are left")
    assert leftovers(shared) == {}


def remove_all(host: Host) -> None:
    containers = host.docker("ps", "-aq").split()
    if containers:
        host.docker("rm", "-f", *containers)
    for name in host.docker("network", "ls", "-q", "--filter", "type=custom").split():
        host.docker("network", "rm", name)


def leftovers(lab: Lab) -> dict[str, dict[str, Any]]:
    """The leases that are neither a host's own nor the segment's router's."""
    router = {ROUTER4, ROUTER6}
    return {
        address: each
        for address, each in leases(lab).items()
        if each["kind"] != "host" and not (address in router and not each.get("holders"))
    }


@contextlib.contextmanager
def configured(host: Host, without: str = "", **config: Any) -> Iterator[None]:
    """While it lasts, the host's daemon runs with this configuration, and without that capability."""
    host.configure(**config)
    host.services["daemon"].terminate()
    host.start_daemon(without=without)
    try:
        yield
    finally:
        host.configure()
        host.services["daemon"].terminate()
        host.start_daemon()


def network(host: Host, addresses: str, *more: str) -> None:
    """The network `lan` on br0, which gives out these addresses."""
    host.docker(
        *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin"),
        *("-o", "com.docker.network.bridge.name=br0"),
        *("--subnet", SUBNET4, "--ip-range", addresses, "--aux-address", f"DefaultGatewayIPv4={ROUTER4}"),
        *(*more, "lan"),
    )


def refused(host: Host, *options: str) -> str:
    """What the user reads when no container can be started."""
    return failed(host, "run", "-d", "--network", "lan", *options, "busybox")


def standby(lab: Lab, host: Host) -> set[str]:
    return {address for address, each in of_kind(lab, "standby").items() if each["host"] == host.name}


def stocked(lab: Lab, host: Host, count: int = STANDBY) -> set[str]:
    """Waits until the host has so many addresses ready, by its own word and in etcd: these."""

    def full() -> bool:
        return host.metric("ipam_plugin_standby") == len(standby(lab, host)) == count

    until(full, SETTLING, f"{host.name} has {count} addresses ready", pause=0.1)
    return standby(lab, host)


def macs(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {address: each["mac"] for address, each in found.items()}


class Growth:
    """What was added to a host's log and metrics since."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._log = len(host.log())
        self._metrics = {name: host.metric(name) for name in self._names()}

    @staticmethod
    def _names() -> list[str]:
        verdicts = [f'ipam_plugin_probes_total{{result="{each}"}}' for each in VERDICTS]
        kinds = ("proxy_arp", "address_used_twice", "cannot_probe")
        alarms = [f'ipam_plugin_alarms_total{{kind="{each}"}}' for each in kinds]
        return ["ipam_plugin_unproven_addresses_total", "ipam_plugin_conflicts_total", *verdicts, *alarms]

    @property
    def log(self) -> str:
        return self.host.log()[self._log :]

    def alarms(self, kind: str) -> list[str]:
        return [line for line in self.log.splitlines() if f"ALARM {kind}" in line]

    def of(self, name: str) -> float:
        return self.host.metric(name) - self._metrics[name]

    def probes(self, verdict: str) -> float:
        return self.of(f'ipam_plugin_probes_total{{result="{verdict}"}}')

    def raised(self, kind: str) -> float:
        return self.of(f'ipam_plugin_alarms_total{{kind="{kind}"}}')

    @property
    def unproven(self) -> float:
        return self.of("ipam_plugin_unproven_addresses_total")


# --- strangers on free addresses -----------------------------------------------------------------------


@pytest.mark.parametrize("stock", [2, 0])
def test_strangers_on_the_next_addresses(lan: Lab, stock: int) -> None:
    """Physical machines without registration have all addresses of a pool but one: the container starts with that one.
    The others stand in etcd as conflicts with these MACs, and a second host never tries them. With and without standby
    (P2)."""
    [first, second], [printer, laptop] = lan.hosts, lan.machines
    begin = 64 if stock else 68
    addresses = [f"192.168.77.{begin + i}" for i in range(4)]
    theirs = dict(zip(addresses, [printer.mac, printer.mac, laptop.mac], strict=False))
    for machine, address in zip([printer, printer, laptop], addresses, strict=False):
        machine.add_address(address)
    with contextlib.ExitStack() as settings:
        if not stock:
            for host in lan.hosts:
                settings.enter_context(configured(host, standby=0))
        network(first, f"{addresses[0]}/30")
        assert start(first, "web") == addresses[3]
        assert lan.router is not None
        assert lan.router.ping(addresses[3])
        # Whatever was not tried yet is now; nothing is left.
        assert "3 conflict" in refused(first)
        conflicts = of_kind(lan, "conflict")
        assert macs(conflicts) == theirs
        assert {each["by"] for each in conflicts.values()} == {"host1"}

        other = Growth(second)
        with lan.written(LEASES) as events:
            network(second, f"{addresses[0]}/30")
            assert "3 conflict" in refused(second)
        assert [event for event in events if event[1] in addresses] == []
        assert other.probes("stranger") == 0
    assert {address: lan.router.mac_of(address) for address in theirs} == theirs


def test_strangers_on_the_next_ipv6_addresses(lan: Lab) -> None:
    """The same for IPv6, in a network with both families."""
    [first, second], [printer, laptop] = lan.hosts, lan.machines
    addresses = [f"fd00:77::4{i}" for i in range(4)]
    theirs = dict(zip(addresses, [printer.mac, printer.mac, laptop.mac], strict=False))
    for machine, address in zip([printer, printer, laptop], addresses, strict=False):
        machine.add_address(address)
    six = ("--ipv6", "--subnet", SUBNET6, "--ip-range", f"{addresses[0]}/126")
    six += ("--aux-address", f"DefaultGatewayIPv6={ROUTER6}")
    for host in lan.hosts:
        # dockerd deletes the IPv6 addresses of a bridge when it makes a network without IPv6 on it.
        host.ip(f"addr replace {host.address6}/64 dev br0 nodad")
        record = f"/ipam-plugin/v1/hosts/{host.name}"
        until(lambda host=host, key=record: host.address6 in lan.etcdctl("get", key), 10, "the register has it")
    network(first, "192.168.77.72/29", *six)
    start(first, "web")
    assert addresses[3] in {each.address for each in first.live()}
    assert lan.router is not None
    assert lan.router.ping(addresses[3])
    # Not by docker run: where the second family is refused, engine 20.10 forgets to give back the first one's.
    assert "3 conflict" in refused_by_driver(lan, first, addresses[0])
    conflicts = {address: each for address, each in of_kind(lan, "conflict").items() if ":" in address}
    assert macs(conflicts) == theirs

    other = Growth(second)
    with lan.written(LEASES) as events:
        network(second, "192.168.77.72/29", *six)
        assert "3 conflict" in refused_by_driver(lan, second, addresses[0])
    assert [event for event in events if event[1] in addresses] == []
    assert other.probes("stranger") == 0


def refused_by_driver(lab: Lab, host: Host, range_begin: str) -> str:
    """What the daemon answers to a request for an address of that pool, which must be refused."""
    keys = lab.etcdctl("get", "--prefix", "--keys-only", "/ipam-plugin/v1/pools/").split()
    [pool] = [key for key in keys if f"/{range_begin}/" in key and key.endswith(f"/{host.name}")]
    pool_id = pool.removeprefix("/ipam-plugin/v1/pools/").removesuffix(f"/{host.name}")
    body = {"PoolID": pool_id, "Address": "", "Options": endpoint(next(_macs))}
    status, said = host.driver("IpamDriver.RequestAddress", body)
    assert status != 200, said
    return str(said["Err"])


@pytest.mark.parametrize("how", ["announce", "ping"])
def test_a_machine_that_appears_on_standby(lan: Lab, how: str) -> None:
    """A machine that begins to use an address while it is in stock, and is heard, keeps it: the next containers get
    others at once, and the register knows the machine's MAC (P2)."""
    host, laptop = lan.hosts[0], lan.machines[1]
    network(host, "192.168.77.80/28" if how == "announce" else "192.168.77.112/28")
    taken = stocked(lan, host)
    assert len(taken) == STANDBY
    for address in taken:
        laptop.add_address(address)
        if how == "announce":
            laptop.announce(address)
        else:
            # Its request for the host's MAC, or the host's for its own, says who has the address.
            laptop.run("busybox", "ping", "-c", "1", "-W", "2", "-I", address, host.address)
    assert {start(host, "one"), start(host, "two")}.isdisjoint(taken)
    until(lambda: macs(of_kind(lan, "conflict")) == dict.fromkeys(taken, laptop.mac), SETTLING, "they are conflicts")
    assert stocked(lan, host).isdisjoint(taken)


def test_an_address_asked_for_by_hand(lan: Lab) -> None:
    """--ip of an address that a stranger uses is refused with its MAC and becomes a conflict, which the command lists
    and clears; then, with the machine gone, the address is given."""
    host, printer = lan.hosts[0], lan.machines[0]
    address = "192.168.77.130"
    network(host, "192.168.77.160/28")
    printer.add_address(address)
    said = refused(host, "--ip", address)
    assert "is in use on the wire" in said
    assert address in said
    assert printer.mac in said
    assert macs(of_kind(lan, "conflict")) == {address: printer.mac}
    assert re.search(rf"{address}\s+conflict\s.*{printer.mac}", host.command("leases", "--kind", "conflict"))
    [listed] = json.loads(host.command("leases", "--kind", "conflict", "-o", "json"))
    assert (listed["address"], listed["mac"], listed["by"]) == (address, printer.mac, "host1")

    printer.remove_address(address)
    assert printer.mac in host.command("release", address)
    assert of_kind(lan, "conflict") == {}
    assert start(host, "web", "--ip", address) == address


def test_a_known_stranger_on_a_dead_wire(lan: Lab) -> None:
    """What is known of an address outweighs a wire that says nothing: --ip of a conflict is refused with its MAC also
    where `probe_failure: warn` would give an address of which nothing is known, and the conflict stays (P2)."""
    host, printer = lan.hosts[0], lan.machines[0]
    address = "192.168.77.131"
    network(host, "192.168.77.160/28")
    printer.add_address(address)
    refused(host, "--ip", address)
    known = of_kind(lan, "conflict")
    assert macs(known) == {address: printer.mac}
    host.cut_off()
    try:
        since = Growth(host)
        said = refused(host, "--ip", address)
        assert address in said
        assert printer.mac in said
        assert of_kind(lan, "conflict") == known
        # Nothing is known of this one.
        assert start(host, "web", "--ip", "192.168.77.132") == "192.168.77.132"
        assert since.unproven == 1
    finally:
        host.rejoin()


def test_the_gateway_of_somebody_else(lan: Lab) -> None:
    """--gateway of a router would be put on this host's bridge: refused with its MAC and both cures, nothing is written
    and the host's address stays (P7, P8)."""
    host, router = lan.hosts[0], lan.machines[0]  # one that nobody told the register of
    with lan.written(LEASES) as events:
        said = failed(
            host,
            *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin"),
            *("-o", "com.docker.network.bridge.name=br0", "--subnet", SUBNET4, "--gateway", router.address, "lan"),
        )
    assert router.address in said
    assert router.mac in said
    assert "--aux-address DefaultGatewayIPv4=" in said
    assert "--ipam-opt gateway=router" in said
    assert [event for event in events if event[1] == router.address] == []
    assert f"{host.address}/24" in host.addresses("br0")
    assert router.ping(host.address)


def test_three_at_the_same_moment(lan: Lab) -> None:
    """Two hosts are told to give one address and a machine takes it, within the same second and in different orders:
    one at most has it in the end (P1, P2). A well-behaved machine looks first (RFC 5227); the other kind is there."""
    first, laptop = lan.hosts[0], lan.machines[1]
    for host in lan.hosts:
        network(host, "192.168.77.176/28")
    outcomes = []
    for round_, delay in enumerate([None, 0.0, 0.2, 0.4, 0.7]):
        address = f"192.168.77.{140 + round_}"
        for host in lan.hosts:
            host.docker("create", "--network", "lan", "--name", f"c{round_}", "--ip", address, "busybox")
        if delay is None:
            laptop.add_address(address)
        starts = [host.docker_async("start", f"c{round_}") for host in lan.hosts]
        if delay is not None:
            threading.Event().wait(delay)  # the order is what is tried here
            said = laptop.take(address).result(30).stdout.strip()
        else:
            said = "taken without looking"
        for host, begun in zip(lan.hosts, starts, strict=True):
            result = begun.result(60, check=False)
            assert result.status == 0 or address in result.stderr, f"{host.name}: {result.stderr}"
        has = [each.host for each in lan.live() if each.address == address]
        has += ["laptop"] * (f"{address}/24" in laptop.addresses())
        outcomes.append(f"{delay}: {', '.join(has) or 'nobody'} ({said})")
        assert len(has) <= 1, outcomes
        if delay is None:
            assert has == ["laptop"]
            assert laptop.mac in refused(first, "--ip", address)
    print("; ".join(outcomes))


# --- leases that somebody else uses --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["announce", "ping"])
def test_a_machine_that_takes_a_containers_address(lan: Lab, how: str) -> None:
    """Within 2 s of the machine's first frame the container's host raises an alarm, in its log and in its metrics, that
    names both MACs, the address and the host; the container's lease stays."""
    host, laptop = lan.hosts[0], lan.machines[1]
    network(host, "192.168.77.192/28")
    address = start(host, "web")
    [live] = [each for each in host.live() if each.address == address]
    before = leases(lan)[address]
    since = Growth(host)
    laptop.add_address(address)
    if how == "announce":
        laptop.announce(address)
    else:
        # It asks everybody for the router's MAC, and says in that who it is.
        laptop.ip("neigh flush dev eth0")
        laptop.run("busybox", "ping", "-c", "1", "-W", "1", "-I", address, ROUTER4, check=False)
    sent = time.monotonic()
    alarm = until(lambda: since.alarms("address_used_twice"), 2, "the alarm is in the log", pause=0.01)[0]
    print(f"in the log {time.monotonic() - sent:.2f} s after the frame was sent: {alarm}")
    for part in (address, live.mac, laptop.mac, host.name):
        assert part in alarm
    assert since.raised("address_used_twice") >= 1
    until(lambda: laptop.mac in host.command("hosts"), 5, "the alarm is at the host's record")
    assert leases(lan)[address] == before


def test_stale_neighbours_learn_the_new_container(lan: Lab) -> None:
    """A container gets an address that another container had a moment ago, on another host: a machine that talked with
    the old one sends to the new one within seconds, although this one says nothing (moby#30238)."""
    [first, second], laptop = lan.hosts, lan.machines[1]
    for host in lan.hosts:
        network(host, "192.168.77.208/28")
    address = "192.168.77.150"

    def known() -> str:
        entries = json.loads(laptop.run("ip", "-j", "neigh", "show", "to", address).stdout or "[]")
        return entries[0].get("lladdr", "") if entries else ""

    start(first, "old", "--ip", address)
    old = next(each.mac for each in first.live() if each.address == address)
    assert laptop.ping(address)
    assert known() == old
    first.docker("rm", "-f", "old")
    # An engine that announces its containers itself (from 28 on) would pass this test without any daemon.
    start(second, "new", "--ip", address)
    new = next(each.mac for each in second.live() if each.address == address)
    assert old != new
    began = time.monotonic()
    until(lambda: known() == new, 10, "the neighbour knows the new MAC")
    print(f"{time.monotonic() - began:.2f} s after the start")


# --- wires that cannot be heard ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the cable is out", "the port is listening"])
def test_a_dead_wire(lan: Lab, how: str) -> None:
    """Silence on a dead wire is not taken for free: under `warn` the address is given, and log and metric say so; under
    `refuse` the user of docker run reads why not. With the wire back all is as before."""
    first, second = lan.hosts
    with configured(second, probe_failure="refuse"), contextlib.ExitStack() as dead:
        for host in lan.hosts:
            if how == "the cable is out":
                host.cut_off()
                dead.callback(host.rejoin)
            else:
                dead.enter_context(host.listening())
        reason = "carrier" if how == "the cable is out" else "spanning tree"
        warns, refuses = Growth(first), Growth(second)
        for host in lan.hosts:
            network(host, "192.168.77.32/28")
        address = start(first, "web")
        [line] = [line for line in warns.log.splitlines() if "given although" in line and address in line]
        assert reason in line
        assert warns.unproven >= 1
        assert warns.probes("unknown") >= 1
        said = refused(second)
        assert "the wire cannot be heard" in said
        assert reason in said
        assert refuses.unproven == 0
        assert refuses.probes("unknown") >= 1
        assert set(macs(of_kind(lan, "endpoint"))) == {address}
        dead.close()
        words = second.docker_words("run", "-d", "--network", "lan", "busybox")
        until(lambda: second.run(*words, check=False).status == 0, 30, "it is given again", pause=0.5)
        assert refuses.unproven == 0


def test_a_router_with_proxy_arp(lan: Lab) -> None:
    """A router that answers for every address: an alarm with the cure, no conflict is ever written, the pool is not
    emptied, and policy decides as on a dead wire. When the router stops it, all is as before."""
    [first, second], router = lan.hosts, lan.router
    assert router is not None
    real = [each.address for each in (*lan.hosts, *lan.machines, router)]
    with configured(second, probe_failure="refuse"):
        warns, refuses = Growth(first), Growth(second)
        with router.proxy_arp(*real), lan.written(LEASES) as events:
            for host in lan.hosts:
                network(host, "192.168.77.48/28")
            for number in range(4):
                start(first, f"c{number}")
            said = refused(second)
            assert "the wire cannot be heard" in said
            assert "proxy ARP" in said
            for since in (warns, refuses):
                alarm = since.alarms("proxy_arp")[0]
                assert router.mac in alarm
                assert "probe: off" in alarm
                assert since.raised("proxy_arp") >= 1
        assert warns.unproven >= 4
        assert refuses.unproven == 0
        assert [event for event in events if '"conflict"' in event[2]] == []
        words = second.docker_words("run", "-d", "--network", "lan", "busybox")
        until(lambda: second.run(*words, check=False).status == 0, 30, "it is given again", pause=0.5)
        assert refuses.unproven == 0


def test_without_the_capability(lan: Lab) -> None:
    """A daemon that may not open raw sockets says so at its start, in log and metrics, and follows the policy."""
    first, second = lan.hosts
    warns, refuses = Growth(first), Growth(second)
    with configured(first, without="net_raw"), configured(second, without="net_raw", probe_failure="refuse"):
        for since in (warns, refuses):
            alarm = until(lambda since=since: since.alarms("cannot_probe"), 5, "the alarm is in the log")[0]
            assert "CAP_NET_RAW" in alarm
            assert since.host.metric('ipam_plugin_alarms_total{kind="cannot_probe"}') >= 1
            network(since.host, "192.168.77.224/28")
        address = start(first, "web")
        [line] = [line for line in warns.log.splitlines() if "given although" in line and address in line]
        assert "CAP_NET_RAW" in line
        assert first.metric("ipam_plugin_unproven_addresses_total") >= 1
        said = refused(second)
        assert "the wire cannot be heard" in said
        assert "CAP_NET_RAW" in said
        assert second.metric("ipam_plugin_unproven_addresses_total") == 0
        for host in lan.hosts:
            assert 'ipam_plugin_wire_usable{interface="br0"} 0.0' in host.metrics()


# --- standby -------------------------------------------------------------------------------------------


def test_standby_through_crash_and_restart(lan: Lab) -> None:
    """Standby is kept, neither doubled nor lost, when the daemon is killed, restarted, or killed again and again while
    it fills the stock; and what was given out meanwhile was given once (P1, P5)."""
    host = lan.hosts[0]
    network(host, "192.168.77.80/28")
    before = stocked(lan, host)
    with lan.written(LEASES) as events:
        host.kill("daemon")
        host.start_daemon()
        assert stocked(lan, host) == before
        host.restart("daemon")
        assert stocked(lan, host) == before
    assert {address for _, address, value in events if '"standby"' in value} <= before, "more was claimed meanwhile"
    for number in range(3):
        assert start(host, f"c{number}") in {each.address for each in host.live()}
        host.kill("daemon")
        host.start_daemon()
    after = stocked(lan, host)
    held = of_kind(lan, "endpoint")
    assert set(held) == {each.address for each in host.live()}
    assert len(held) == 3
    assert after.isdisjoint(held)


def test_standby_goes_with_the_last_network(lan: Lab) -> None:
    """When the host's last network of a pool is removed nothing of it is left in etcd, also while the stock is being
    filled; and when the network comes again at once, so does the stock."""
    host = lan.hosts[0]
    for _ in range(3):
        network(host, "192.168.77.80/28")  # the claims are there at once, the looks take seconds
        until(lambda: standby(lan, host), 5, "the stock is being filled")
        host.docker("network", "rm", "lan")
        until(lambda: not leftovers(lan), 2, "only the hosts' own leases are left")
    network(host, "192.168.77.80/28")
    stocked(lan, host)
    host.docker("network", "rm", "lan")
    until(lambda: not leftovers(lan), 2, "only the hosts' own leases are left")


def test_uninstall_without_install(lan: Lab) -> None:
    """A daemon that was started by hand leaves standby too, and uninstall gives it back though it finds no file of its
    own; while that daemon runs, it takes nothing away from under it (P5)."""
    first, second = lan.hosts
    for host in lan.hosts:
        network(host, "192.168.77.80/28")
    kept, others = stocked(lan, first), stocked(lan, second)
    said = first.command("uninstall")
    assert "were not given back: state_dir: " in said
    assert standby(lan, first) == kept
    first.services["daemon"].terminate()
    assert standby(lan, first) == kept
    try:
        assert first.command("uninstall").splitlines() == [
            f"standby and held addresses of host {first.name} given back: {STANDBY}",
            "nothing else to do: install put nothing here",
        ]
        assert standby(lan, first) == set()
        assert standby(lan, second) == others
    finally:
        first.start_daemon()


# --- standby of another host, asked for by name -----------------------------------------------------------


def by_ip(host: Host, address: str) -> list[str]:
    return ["run", "-d", "--network", "lan", "--ip", address, "busybox"]


def by_aux_address(host: Host, address: str) -> list[str]:
    driver = ("--ipam-driver", "ipam-plugin", "--subnet", SUBNET4, "--ip-range", "192.168.77.32/28")
    more = ("--aux-address", f"DefaultGatewayIPv4={ROUTER4}", "--aux-address", f"printer={address}")
    return ["network", "create", "-d", "bridge", "-o", "com.docker.network.bridge.name=br0", *driver, *more, "another"]


def by_gateway(host: Host, address: str) -> list[str]:
    driver = ("--ipam-driver", "ipam-plugin", "--subnet", SUBNET4, "--ip-range", "192.168.77.32/28")
    more = ("--gateway", address, "--ipam-opt", "gateway=router")
    return ["network", "create", "-d", "macvlan", "-o", "parent=br0", *driver, *more, "another"]


WAYS = {"--ip": (by_ip, "endpoint"), "--aux-address": (by_aux_address, "router"), "--gateway": (by_gateway, "router")}


@pytest.mark.parametrize("way", WAYS)
def test_an_address_that_another_host_keeps_ready(lan: Lab, way: str) -> None:
    """Standby is nobody's yet: a living host gives it back to whoever asks for that very address, and keeps another
    one instead."""
    first, second = lan.hosts
    words, kind = WAYS[way]
    network(second, "192.168.77.80/28")
    if way == "--ip":
        network(first, "192.168.77.112/28")
    address = sorted(stocked(lan, second))[0]
    began = time.monotonic()
    first.docker(*words(first, address))
    print(f"{time.monotonic() - began:.2f} s")
    lease = leases(lan)[address]
    assert lease["kind"] == kind
    assert first.name in ({lease.get("host")} | {each["host"] for each in lease.get("holders", [])})
    if way == "--ip":
        assert address in {each.address for each in first.live()}
    assert address not in stocked(lan, second)
    assert lan.etcdctl("get", "--prefix", "--keys-only", "/ipam-plugin/v1/wanted/") == ""


def test_an_address_that_a_dead_host_kept_ready(lan: Lab) -> None:
    """Nobody can say what a host that is gone does with its addresses: whoever asks for one is told whose it is, and
    nothing changes (P1, P7)."""
    first, second = lan.hosts
    for host in lan.hosts:
        network(host, "192.168.77.80/28")
    address = sorted(stocked(lan, second))[0]
    before = leases(lan)[address]
    second.kill("daemon")
    try:
        alive = f"/ipam-plugin/v1/alive/{second.name}"
        until(lambda: lan.etcdctl("get", alive) == "", 60, "its heartbeat has ended", pause=0.5)
        remove_all(first)
        network(first, "192.168.77.112/28")
        for way, (words, _) in WAYS.items():
            if way != "--ip":
                remove_all(first)
            said = failed(first, *words(first, address))
            assert address in said, way
            assert second.name in said, way
            assert leases(lan)[address] == before, way
    finally:
        second.start_daemon()
    stocked(lan, second)


# --- floods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "senders"),
    [
        ("requests", ["192.168.77.0/24"]),
        ("replies", ["192.168.77.224/28"]),
        # Those that somebody has are filled in: a host, the router, two containers, and the stock.
        ("requests", []),
        ("replies", []),
    ],
    ids=["the whole subnet", "the pool", "leased, requests", "leased, replies"],
)
def test_a_flood(lan: Lab, kind: str, senders: list[str]) -> None:
    """10,000 ARP frames a second for 10 s, each of another machine that says it has an address of the subnet: every
    request is answered, with an address that nobody uses; nobody's address becomes a conflict; memory, alarms and what
    is written to etcd stay bounded."""
    host, [printer, laptop] = lan.hosts[0], lan.machines
    printer.add_address("192.168.77.230")
    with driven(lan, host, "192.168.77.224/28") as pool:
        stocked(lan, host)
        containers = [driver_address(host, pool) for _ in range(2)]
        ready = stocked(lan, host)
        if not senders:
            senders = [host.address, lan.hosts[1].address, ROUTER4, *containers, *ready]
        memory, [heard, lost] = [rss(host)], [host.metric(name) for name in FRAMES]
        since = Growth(host)
        seconds, given = [], []
        with lan.written("/ipam-plugin/v1/") as events:
            begun = int(host.sh(RECEIVED))
            # Not by Machine.flood, whose senders are no addresses of this LAN.
            flood = laptop.run_async(*machines.FRAMES, "flood", "eth0", "10000", "10", kind, *senders)
            until(lambda: int(host.sh(RECEIVED)) > begun + 1000, 10, "it has begun")
            while not flood.done():
                # More than there is in stock, so that some wait for the wire in the request.
                for _ in range(4):
                    began = time.monotonic()
                    given.append(driver_address(host, pool))
                    seconds.append(time.monotonic() - began)
                memory.append(rss(host))
                for address in given[-4:]:
                    assert host.driver("IpamDriver.ReleaseAddress", {"PoolID": pool, "Address": address})[0] == 200
            sent = int(flood.result(10).stdout)
            memory.append(rss(host))
        # Before the last pool goes, and with it the listener and its counters.
        heard, lost = host.metric(FRAMES[0]) - heard, host.metric(FRAMES[1]) - lost
        alarms = since.raised("address_used_twice")
        records = [key for _, key, _ in events if key == f"hosts/{host.name}"]
        conflicts = {
            key.rpartition("/")[2] for _, key, value in events if '"kind":"conflict"' in value.replace(" ", "")
        }
        print(
            f"{sent} frames in 10 s, {heard:.0f} looked at and {lost:.0f} not; {len(seconds)} requests, "
            f"median {statistics.median(seconds) * 1e3:.0f} ms, most {max(seconds) * 1e3:.0f} ms; memory before "
            f"{memory[0] / 1e6:.1f} MB, most {max(memory) / 1e6:.1f} MB, after {memory[-1] / 1e6:.1f} MB; "
            f"{alarms:.0f} alarms, {len(records)} writes of the host's record, {len(events)} in all; "
            f"conflicts: {sorted(conflicts)}; looks: {[f'{each} {since.probes(each):.0f}' for each in VERDICTS]}"
        )
        stocked(lan, host)
    assert sent > 30_000
    assert heard + lost > sent / 2
    assert len(seconds) >= 8
    assert max(seconds) < DEADLINE
    assert "192.168.77.230" not in given
    assert max(memory) - memory[0] < 20e6
    assert conflicts <= {"192.168.77.230"}, "of machines that are none"
    assert alarms <= 20
    assert len(records) <= 20
    # A claim, its conversion and its release, with the history, for each request; and the stock.
    assert len(events) <= 10 * len(seconds) + 100


@contextlib.contextmanager
def driven(lab: Lab, host: Host, addresses: str) -> Iterator[str]:
    """While it lasts, the host uses such a pool, without the engine: its PoolID. Afterwards all of it is given back."""
    pool, _ = driver_pool(host, addresses)
    try:
        yield pool
    finally:
        for address, each in of_kind(lab, "endpoint").items():
            if each["host"] == host.name:
                host.driver("IpamDriver.ReleaseAddress", {"PoolID": pool, "Address": address})
        host.driver("IpamDriver.ReleasePool", {"PoolID": pool})


def rss(host: Host) -> int:
    """Bytes of memory that the daemon's processes have."""
    total = 0
    for pid in host.services["daemon"].family():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]
    return total


def driver_pool(host: Host, addresses: str) -> tuple[str, str]:
    """What an engine does for `network create`, without the engine: the PoolID and the gateway."""
    asked = {"AddressSpace": "", "Pool": SUBNET4, "SubPool": addresses, "Options": {}, "V6": False}
    _, spaces = host.driver("IpamDriver.GetDefaultAddressSpaces")
    status, pool = host.driver("IpamDriver.RequestPool", asked | {"AddressSpace": spaces["LocalDefaultAddressSpace"]})
    assert status == 200, pool
    gateway = {"PoolID": pool["PoolID"], "Address": "", "Options": GATEWAY}
    status, given = host.driver("IpamDriver.RequestAddress", gateway)
    assert status == 200, given
    return pool["PoolID"], given["Address"]


_macs = (f"02:42:00:00:{number >> 8:02x}:{number & 255:02x}" for number in itertools.count(1))


def driver_address(host: Host, pool: str) -> str:
    """What an engine does for a container: its address, without the prefix length."""
    body = {"PoolID": pool, "Address": "", "Options": endpoint(next(_macs))}
    status, given = host.driver("IpamDriver.RequestAddress", body)
    assert status == 200, given
    return str(given["Address"]).partition("/")[0]


@pytest.mark.parametrize("spread", ["everywhere", "on one host"])
def test_a_pool_of_exact_size(fleet: Lab, spread: str) -> None:
    """64 addresses, 8 hosts that keep 2 each in standby: all 64 requests are served, whether they come everywhere at
    once or from one host alone, which needs what the others keep; the next one is told that the pool is full."""
    pools = {host: driver_pool(host, "192.168.77.128/26")[0] for host in fleet.hosts}
    for host in fleet.hosts:
        stocked(fleet, host)
    assert len(of_kind(fleet, "standby")) == 16
    began = time.monotonic()
    counts = {host: 8 if spread == "everywhere" else 64 if host is fleet.hosts[0] else 0 for host in fleet.hosts}

    def ask(host: Host) -> list[str]:
        # One after another, as an engine does under its network's lock.
        return [driver_address(host, pools[host]) for _ in range(counts[host])]

    with ThreadPoolExecutor(len(fleet.hosts)) as executor:
        given = dict(zip(fleet.hosts, executor.map(ask, fleet.hosts), strict=True))
    seconds = time.monotonic() - began
    print(f"64 addresses {spread} in {seconds:.1f} s")
    range_ = ipaddress.ip_network("192.168.77.128/26")
    assert Counter(itertools.chain(*given.values())) == Counter(map(str, range_))
    held = of_kind(fleet, "endpoint")
    assert {address: each["host"] for address, each in held.items()} == {
        address: host.name for host, addresses in given.items() for address in addresses
    }
    said = refused_by_driver(fleet, fleet.hosts[1], "192.168.77.128")
    assert "full" in said
    assert "64 endpoint" in said
    for host, addresses in given.items():
        for address in addresses:
            assert host.driver("IpamDriver.ReleaseAddress", {"PoolID": pools[host], "Address": address})[0] == 200
        assert host.driver("IpamDriver.ReleasePool", {"PoolID": pools[host]})[0] == 200
    until(lambda: not leftovers(fleet), 10, "only the hosts' own leases are left")
