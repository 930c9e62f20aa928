"""A running network, before it is switched to this driver: what is proposed and written, and what it is good for."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import properties  # noqa: F401  # hypothesis' settings
from conftest import RealEtcd
from fakes import FakeEtcd, Fault
from harness import KEYS, NAME, FakeLan, Lan, bridge
from ipam_plugin import adopt, cli, daemon, dockerd, scan
from ipam_plugin.addresses import Range, parse_address, parse_range
from ipam_plugin.adopt import CONFLICTING, KNOWN, LEASE, NOT_ASKED, RESERVE, Proposal, World
from ipam_plugin.check import PoolKey, Register
from ipam_plugin.etcd import Put
from ipam_plugin.evidence import Bearer, OtherNetwork, Others, OtherSubnet
from ipam_plugin.explain import explain
from ipam_plugin.interfaces import Link
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    KINDS,
    RESERVED,
    STANDBY,
    Alive,
    Container,
    HostAddress,
    Keys,
    Lease,
    Pool,
    Reservation,
    SegmentSettings,
    encode,
)
from ipam_plugin.model import Host as HostRecord
from ipam_plugin.neighbourhood import Habits
from ipam_plugin.operations import Found, Operations

MAC, OTHER_MAC, CARD = "02:42:0a:00:00:14", "00:1b:a9:3c:52:77", "02:00:00:00:00:01"
OWN = bridge("10.0.0.11/24", mac=CARD)
WEB, PRINTER, ROUTER = map(parse_address, ("10.0.0.20", "10.0.0.140", "10.0.0.254"))
SUBNET = OtherSubnet("10.0.0.0/24", "10.0.0.16/28", "10.0.0.11", {"DefaultGatewayIPv4": str(ROUTER)})
BRIDGE_NAME = {"com.docker.network.bridge.name": "br0"}
NETWORK = OtherNetwork("n1", "lan", "bridge", "br0", (SUBNET,), BRIDGE_NAME)
VLAN_SUBNET = SUBNET._replace(gateway=str(ROUTER), auxiliary={})
MACVLAN = OtherNetwork("n2", "vlan", "macvlan", "eth0", (VLAN_SUBNET,), {"parent": "eth0"})
IPVLAN = MACVLAN._replace(driver="ipvlan")
BRIDGE = Link(1, "br0", CARD, "bridge", carrier=True, up=True, loopback=False, master="")
ETH0 = Link(2, "eth0", "02:00:00:00:00:09", "", carrier=True, up=True, loopback=False, master="br0")
VETH = Link(3, "veth1a2b3c4", "02:00:00:00:00:08", "veth", carrier=True, up=True, loopback=False, master="br1")
LINKS = [BRIDGE, ETH0, VETH, Link(4, "br1", CARD, "bridge", True, True, False, "")]


HOST_B = HostRecord("b", addresses=(HostAddress("10.0.0.12", 24, "br0", "02:00:00:00:00:02"),))


def bearer(address: str = str(WEB), name: str = "web1", **more: Any) -> Bearer:
    network = more.pop("network", NETWORK)
    told = Bearer(network.id, network.name, parse_address(address), MAC, f"id-{name}", name, "busybox", True, False)
    return told._replace(**more)


def found(address: Any, lease: Lease, key: str = "") -> Found:
    parsed = parse_address(str(address))
    one = Range(parsed.version, int(parsed), int(parsed))
    return Found("default", one, lease, key or KEYS.lease("default", parsed), 7)


def world(bearers: Sequence[Bearer] = (), leases: Sequence[Any] = (), wire: Any = None, **more: Any) -> World:
    """Host a with one bridge on a LAN; `more` replaces parts, also of the register."""
    parts: dict[str, Any] = {
        "leases": leases, "strays": [], "pools": [], "alive": frozenset({"a", "b"}), "settings": {},
        "hosts": {"a": HostRecord("a"), "b": HOST_B},
    }  # fmt: skip
    register = Register(**{name: more.pop(name, value) for name, value in parts.items()})
    values: dict[str, Any] = {
        "host": "a", "segment": "default", "default_segment": "default", "register": register, "networks": [NETWORK],
        "bearers": bearers, "carried": [OWN], "links": LINKS, "wire": {ROUTER: [OTHER_MAC]} if wire is None else wire,
    }  # fmt: skip
    return World(**(values | more))


def proposed(of: World) -> dict[str, Proposal]:
    return {each.address: each for each in adopt.propose(of) if each.address != str(ROUTER)}


def only(of: World) -> Proposal:
    [one] = proposed(of).values()
    assert one.what.isprintable()
    assert (one.write is not None) == (one.kind in (LEASE, RESERVE))
    assert bool(one.cure) == one.stops
    return one


# --- containers ---------------------------------------------------------------------------------------------


def test_a_container_that_nobody_disputes() -> None:
    """Its address is kept for it: reserved, in the name of host and container."""
    one = only(world([bearer()], wire={WEB: [MAC], ROUTER: [OTHER_MAC]}))
    assert (one.kind, one.address, one.container, one.mac) == (LEASE, str(WEB), "web1", MAC)
    assert one.write is not None
    lease = one.write.lease
    assert (lease.kind, lease.host, lease.mac) == (RESERVED, "a", MAC)
    assert lease.container == Container("web1", "id-web1", "busybox", "lan")
    assert "network lan" in lease.note


def test_a_stopped_container_that_asks_by_name() -> None:
    """It has nothing now, and will ask for it when it starts; whoever answers meanwhile is another machine."""
    stopped = bearer(running=False, mac="", fixed=True)
    assert only(world([stopped], wire={})).kind == LEASE
    one = only(world([stopped], wire={WEB: [OTHER_MAC]}))
    assert (one.kind, OTHER_MAC in one.what, "asks for it" in one.what) == (CONFLICTING, True, True)
    assert (
        adopt.propose(world([bearer(address=str(WEB))._replace(address=None)], wire={ROUTER: [CARD]}))[0].kind
        == RESERVE
    )


CONFLICTS: dict[str, tuple[World, str]] = {
    "two containers": (
        world([bearer(), bearer(name="web2", network=MACVLAN)], networks=[NETWORK, MACVLAN]),
        "container web1 (network lan) has it, and so has container web2 (network vlan)",
    ),
    "the host itself": (world([bearer("10.0.0.11")]), "and so has br0 of this host itself"),
    "another machine": (world([bearer()], wire={WEB: [MAC, OTHER_MAC]}), f"answers for it: MAC {OTHER_MAC}"),
    "a container of another host": (
        world([bearer()], [found(WEB, Lease(ENDPOINT, "b", OTHER_MAC, Container("db")))]), "container db on host b",
    ),
    "another host's standby": (world([bearer()], [found(WEB, Lease(STANDBY, "b"))]), "standby of host b"),
    "its own standby": (world([bearer()], [found(WEB, Lease(STANDBY, "a"))]), "standby of host a"),
    "a hold": (world([bearer()], [found(WEB, Lease(HELD, "b"))]), "a hold for a container on host b"),
    "a stranger": (world([bearer()], [found(WEB, Lease(CONFLICT, mac=OTHER_MAC))]), "a machine that is none of ours"),
    "a reservation": (world([bearer()], [found(WEB, Lease(RESERVED, note="fax"))]), "a reservation: fax"),
    "kept for another container": (
        world([bearer()], [found(WEB, Lease(RESERVED, "a", MAC, Container("db")))]), "for container db on host a",
    ),
    "kept on another host": (
        world([bearer()], [found(WEB, Lease(RESERVED, "b", MAC, Container("web1")))]), "for container web1 on host b",
    ),
    "an excluded range": (
        world([bearer()], settings={"default": SegmentSettings(exclude=("10.0.0.16/28",))}),
        "it is excluded (10.0.0.16/28)",
    ),
    "a reserved range": (
        world([bearer()], settings={"default": SegmentSettings(reserved=(Reservation("10.0.0.16/28", "phones"),))}),
        "it is reserved (10.0.0.16/28): phones",
    ),
    "the router": (world([bearer()], settings={"default": SegmentSettings(router=str(WEB))}), "the segment's router"),
    "a key for a range": (
        world([bearer()], [Found("default", parse_range("10.0.0.16/28"), Lease(RESERVED), "/k", 1)]),
        "the etcd key '/k' takes it",
    ),
    "another host's own address": (world([bearer("10.0.0.12")]), "an address of Docker host b itself (br0)"),
    "unreadable settings": (world([bearer()], settings={"default": "junk"}), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_is_disputed_is_named_and_not_written(name: str) -> None:
    """Before anything is switched: who else has the address, and what to do about it."""
    of, words = CONFLICTS[name]
    one = only(of)
    assert (one.kind, one.stops) == (CONFLICTING, True)
    assert words in one.what


@pytest.mark.parametrize(
    "lease", [Lease(CONFLICT, mac=MAC, by="b", token="x"), Lease(RESERVED, mac=MAC, note="found by scan")]
)
def test_what_another_host_found_is_the_container(lease: Lease) -> None:
    """Hosts are adopted one after another: to the first, the second one's containers are strangers."""
    one = only(world([bearer()], [found(WEB, lease)]))
    assert one.kind == LEASE
    assert one.write is not None
    assert one.write.found is not None
    assert one.write.found.lease == lease


def test_ipvlan_answers_with_its_parents_mac() -> None:
    """All containers of such a network have the MAC of the card."""
    of = world([bearer(network=IPVLAN)], wire={WEB: [ETH0.mac]}, networks=[IPVLAN])
    assert proposed(of)[str(WEB)].kind == LEASE
    assert proposed(of._replace(networks=[MACVLAN], bearers=[bearer(network=MACVLAN)]))[str(WEB)].kind == CONFLICTING


def test_what_is_kept_already_is_left_as_it_is() -> None:
    """Typed twice, nothing changes."""
    first = adopt.propose(world([bearer()], wire={PRINTER: [OTHER_MAC], ROUTER: [CARD]}))
    leases = [found(each.address, each.write.lease) for each in first if each.write]
    assert len(leases) == 3
    again = adopt.propose(world([bearer()], leases, wire={PRINTER: [OTHER_MAC], ROUTER: [CARD]}))
    assert [each.kind for each in again] == [KNOWN] * 3


# --- masks --------------------------------------------------------------------------------------------------


def pool_key(subnet: str, host: str = "b", segment: str = "default") -> PoolKey:
    pool = Pool.make(subnet, "", {}, segment)
    return PoolKey(KEYS.pool(pool, host), 1, pool.id, pool, host, None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"carried": [bridge("10.0.0.11/16")]}, "br0 carries 10.0.0.11/16: the masks differ"),
        ({"carried": [bridge("10.0.0.11/25")]}, "br0 carries 10.0.0.11/25: the masks differ"),
        ({"carried": [bridge("10.0.0.11/16", "eth7")]}, ""),
        ({"pools": [pool_key("10.0.0.0/16")]}, "host b uses 10.0.0.0/16 for the same LAN: the masks differ"),
        ({"pools": [pool_key("10.0.0.0/24"), pool_key("10.9.0.0/16"), pool_key("10.0.0.0/16", segment="lab")]}, ""),
        ({"hosts": {"b": HostRecord("b", addresses=(HostAddress("10.0.0.12", 16, "br0"),))}}, "carries 10.0.0.12/16"),
        (
            {"hosts": {"b": HostRecord("b", addresses=(HostAddress("10.0.0.12", 16, "br0"),), segments=("lab",))}},
            "",
        ),
    ],
)
def test_masks_that_differ(more: dict[str, Any], words: str) -> None:
    """Machines of one LAN that do not agree on its size do not reach each other, and Docker would mend it its way."""
    found = [each for each in adopt.propose(world(wire={ROUTER: [CARD]}, **more)) if each.kind == CONFLICTING]
    assert [words in each.what for each in found] == ([True] if words else [])
    assert all(each.cure and each.address == "10.0.0.0/24" for each in found)


# --- other machines -----------------------------------------------------------------------------------------


def test_machines_that_nobody_registered() -> None:
    """Reserved, with their MAC and what is known of it; the router with what the network calls it."""
    of = world(wire={PRINTER: [OTHER_MAC], ROUTER: [CARD]})
    found = {each.address: each for each in adopt.propose(of, lambda mac: "Brother" if mac == OTHER_MAC else "")}
    printer, router = found[str(PRINTER)], found[str(ROUTER)]
    assert (printer.kind, printer.mac, router.kind) == (RESERVE, OTHER_MAC, RESERVE)
    assert printer.write is not None
    assert printer.write.lease.note == f"found by adopt: MAC {OTHER_MAC} Brother"
    assert (printer.write.lease.host, printer.write.lease.container) == ("", None)
    assert "auxiliary address DefaultGatewayIPv4 of network lan" in router.what


def test_a_router_that_is_silent_now() -> None:
    """What the network says is a router is no container's, whether it answers or not."""
    for network, role in (
        (NETWORK, "auxiliary address DefaultGatewayIPv4 of network lan"),
        (MACVLAN, "gateway of network vlan"),
    ):
        [one] = adopt.propose(world(wire={}, networks=[network]))
        assert (one.kind, one.address) == (RESERVE, str(ROUTER))
        assert role in one.what
    assert adopt.propose(world(wire={}, settings={"default": SegmentSettings(router=str(ROUTER))})) == []


@pytest.mark.parametrize(
    ("lease", "kind"),
    [
        (Lease(CONFLICT, mac=OTHER_MAC, by="b", token="x"), RESERVE),
        (Lease(CONFLICT, mac=MAC, by="b", token="x"), CONFLICTING),
        (Lease(RESERVED, mac=OTHER_MAC, note="printer"), KNOWN),
        (Lease(RESERVED, note="printer"), KNOWN),
        (Lease(ENDPOINT, "b", OTHER_MAC), KNOWN),
        (Lease(ENDPOINT, "b", MAC, Container("db")), CONFLICTING),
        (Lease(HOST, "b", OTHER_MAC), KNOWN),
        (Lease(STANDBY, "b"), CONFLICTING),
        (Lease(HELD, "b", OTHER_MAC), CONFLICTING),
    ],
)
def test_a_machine_for_whose_address_there_is_a_lease(lease: Lease, kind: str) -> None:
    """The same machine is known; another one than the lease names is a conflict."""
    assert only(world([], [found(PRINTER, lease)], wire={PRINTER: [OTHER_MAC], ROUTER: [CARD]})).kind == kind


def test_an_address_that_two_machines_have() -> None:
    """It is kept from containers, and the operator is told."""
    of = world(wire={PRINTER: [OTHER_MAC, MAC], ROUTER: [CARD]})
    found = [each for each in adopt.propose(of) if each.address == str(PRINTER)]
    assert [each.kind for each in found] == [RESERVE, CONFLICTING]


def test_a_wire_that_was_not_heard() -> None:
    """Nothing is switched on the word of a silence that proves nothing."""
    one = adopt.propose(world([bearer()], unheard=[("10.0.0.0/24", "br0 has no carrier")]))[0]
    assert (one.kind, one.stops) == (NOT_ASKED, True)


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (NETWORK, ""),
        (MACVLAN, ""),
        (IPVLAN, ""),
        (NETWORK._replace(internal=True), "internal"),
        (NETWORK._replace(interface="br1"), "no port but those of containers"),
        (NETWORK._replace(interface="docker0"), "docker0 is not there"),
        (MACVLAN._replace(interface=""), "(none) is not there"),
        (IPVLAN._replace(options={"ipvlan_mode": "l3"}), "l3"),
        (MACVLAN._replace(interface="dummy0"), "no network card"),
    ],
)
def test_which_networks_are_on_a_lan(network: OtherNetwork, why: str) -> None:
    """Containers behind their host have addresses that are nobody else's business."""
    said = adopt.why_no_lan(network, [*LINKS, ETH0.__class__(9, "dummy0", CARD, "dummy", True, True, False, "")])
    assert why in said
    assert bool(said) == bool(why)


# --- properties ---------------------------------------------------------------------------------------------

addresses = st.integers(1, 254).map(lambda number: f"10.0.0.{number}")
macs = st.sampled_from((MAC, OTHER_MAC, CARD, ETH0.mac))
lease_values = st.builds(
    Lease,
    kind=st.sampled_from(KINDS),
    host=st.sampled_from(("", "a", "b")),
    mac=st.sampled_from(("", MAC, OTHER_MAC)),
    container=st.none() | st.builds(Container, name=st.sampled_from(("web1", "web2"))),
)
bearers = st.builds(
    lambda address, name, running, network: bearer(
        address, name, running=running, mac=MAC if running else "", network=network
    ),
    addresses, st.sampled_from(("web1", "web2")), st.booleans(), st.sampled_from((NETWORK, MACVLAN)),
)  # fmt: skip


@given(
    st.lists(bearers, max_size=4),
    st.dictionaries(addresses, lease_values, max_size=4),
    st.dictionaries(addresses.map(parse_address), st.lists(macs, max_size=2, unique=True), max_size=4),
)
def test_nothing_of_anybody_elses_is_overwritten(
    containers: list[Bearer], leases: dict[str, Lease], wire: dict[Any, Any]
) -> None:
    """P1, P2: what is written takes the place of nothing, or of what a host or operator found that very machine to be;
    each address at most once, and every container's address is written, known or said to be disputed."""
    known = [found(address, lease) for address, lease in leases.items()]
    proposals = adopt.propose(world(containers, known, wire=wire, networks=[NETWORK, MACVLAN]))
    writes = [each.write for each in proposals if each.write is not None]
    assert len({each.address for each in writes}) == len(writes)
    for write in writes:
        before = leases.get(str(write.address))
        assert write.lease.kind == RESERVED
        assert (write.found is None) == (before is None)
        if before is not None:
            assert before.kind in (CONFLICT, RESERVED)
            assert not (before.kind == RESERVED and before.host)
            assert before.mac
            named = {write.lease.mac} | {each.mac for each in containers if each.address == write.address}
            assert before.mac in named | set(wire.get(write.address, ()))
    said = {each.address for each in proposals}
    assert {str(each.address) for each in containers} <= said
    assert {str(each) for each, answers in wire.items() if answers and each != OWN.address} <= said


# --- the commands that switch it ------------------------------------------------------------------------------


def test_the_commands_that_switch_a_network() -> None:
    """All that the network had, as it can be typed; on a bridge each host's own address is the gateway."""
    odd = NETWORK._replace(labels={"a": "b c"}, attachable=True)
    containers = [bearer(), bearer("10.0.0.21", "web 2"), bearer(name="idle")._replace(address=None, running=False)]
    assert adopt.switch(world(containers, networks=[odd], segment="lab"), odd) == [
        "docker network disconnect lan web1",
        "docker network disconnect lan 'web 2'",
        "docker network disconnect lan idle",
        "docker network rm lan",
        "docker network create --driver bridge --ipam-driver ipam-plugin --attachable --subnet 10.0.0.0/24"
        " --ip-range 10.0.0.16/28 --aux-address DefaultGatewayIPv4=10.0.0.254 --ipam-opt segment=lab"
        " -o com.docker.network.bridge.name=br0 --label 'a=b c' lan",
        "docker network connect --ip 10.0.0.20 lan web1",
        "docker network connect --ip 10.0.0.21 lan 'web 2'",
        "docker network connect lan idle",
    ]


def test_the_command_for_macvlan_and_ipv6() -> None:
    """The router is shared by all hosts; a container with two addresses keeps both."""
    both = MACVLAN._replace(ipv6=True, subnets=(*MACVLAN.subnets, OtherSubnet("fd00::/64", "", "fd00::1", {})))
    containers = [bearer(network=both), bearer("fd00::20", network=both)]
    lines = adopt.switch(world(containers, networks=[both]), both)
    assert lines[2] == (
        "docker network create --driver macvlan --ipam-driver ipam-plugin --ipv6 --subnet 10.0.0.0/24 --ip-range"
        " 10.0.0.16/28 --gateway 10.0.0.254 --subnet fd00::/64 --gateway fd00::1 --ipam-opt gateway=router"
        " -o parent=eth0 vlan"
    )
    assert lines[3] == "docker network connect --ip 10.0.0.20 --ip6 fd00::20 vlan web1"


# --- what dockerd says ------------------------------------------------------------------------------------------


def test_what_dockerd_says_of_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running containers with what they have, stopped ones with what they ask for; not this driver's own networks."""

    class Client:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def networks(self) -> list[dict[str, Any]]:
            config = [{"Subnet": "10.0.0.0/24", "Gateway": "10.0.0.11", "AuxiliaryAddresses": {"r": "10.0.0.254"}}]
            told = {"Options": None, "Labels": None, "IPAM": {"Driver": "default", "Config": None}}
            return [
                {**told, "Id": "n1" * 32, "Name": "lan", "Driver": "bridge", "IPAM": {"Driver": "x", "Config": config}},
                {**told, "Id": "n2", "Name": "ours", "Driver": "bridge", "IPAM": {"Driver": "ipam-plugin"}},
                {**told, "Id": "n3", "Name": "host", "Driver": "host"},
                {**told, "Id": "n4", "Name": "vlan", "Driver": "macvlan", "Options": {"parent": "eth0"}},
            ]

        def containers(self, all: bool) -> list[dict[str, Any]]:
            def container(name: str, state: str, **endpoint: Any) -> dict[str, Any]:
                networks = {"NetworkSettings": {"Networks": {"lan": {"NetworkID": "n1" * 32, **endpoint}}}}
                return {"Id": name, "Names": [f"/{name}"], "Image": "busybox", "State": state, **networks}

            has = {"IPAddress": "10.0.0.20", "MacAddress": "02:42:0A:00:00:14", "GlobalIPv6Address": "fd00::20"}
            return [
                container("web1", "running", **has),
                container("db", "exited", IPAMConfig={"IPv4Address": "10.0.0.21"}, IPAddress=""),
                container("new", "created", IPAMConfig=None, NetworkID=""),
                container("other", "running", IPAddress="10.0.0.30", NetworkID="n2"),
            ]

    monkeypatch.setattr(dockerd.docker, "APIClient", Client)
    found = dockerd.Dockerd("/x").others()
    assert [(each.name, each.interface) for each in found.networks] == [("lan", "br-n1n1n1n1n1n1"), ("vlan", "eth0")]
    assert found.networks[0].subnets == (OtherSubnet("10.0.0.0/24", "", "10.0.0.11", {"r": "10.0.0.254"}),)
    assert [(each.container, str(each.address), each.mac, each.fixed) for each in found.bearers] == [
        ("web1", "10.0.0.20", MAC, False),
        ("web1", "fd00::20", MAC, False),
        ("db", "10.0.0.21", "", True),
        ("new", "None", "", False),
    ]


# --- what it is good for ----------------------------------------------------------------------------------------

PROBING = Habits(standby=0)


@pytest.fixture
def wire() -> FakeLan:
    return FakeLan()


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made:
        yield made


def adopted(lan: Lan, address: str = "192.168.1.20", container: str = "web1", mac: str = MAC) -> None:
    """What `adopt --apply` on host a writes."""
    lease = Lease(RESERVED, "a", mac, Container(container, network="lan"), note="adopted from network lan")
    assert Operations(lan.etcd, KEYS, "eve").adopt("default", adopt.Write(parse_address(address), None, lease))


@pytest.mark.parametrize("habits", [Habits(probe="off"), PROBING], ids=["register alone", "wire asked"])
def test_an_adopted_address_is_its_containers_alone(lan: Lan, wire: FakeLan, habits: Habits) -> None:
    """From the moment it is written until its host asks for it with `--ip`, nobody gets it: no container of that host
    without `--ip`, none of another, not in a full pool. Then it is an ordinary lease, and free when it is released."""
    a = lan.host("a", bridge("192.168.1.11/24", mac="02:aa:00:00:00:0a"), habits=habits, wire=wire)
    b = lan.host("b", bridge("192.168.1.12/24", mac="02:bb:00:00:00:0b"), habits=habits, wire=wire)
    adopted(lan)
    tiny = a.create(ip_range="192.168.1.20/31")
    assert b.create(ip_range="192.168.1.20/31") == tiny
    a.catch_up()
    assert "for container web1 on host a" in b.endpoint(tiny, "192.168.1.20").error
    assert a.run(tiny) == "192.168.1.21"
    assert "is full" in a.endpoint(tiny).error
    assert "is full" in b.endpoint(tiny).error
    assert "unreserve 192.168.1.20" in a.endpoint(tiny, "192.168.1.20", **{NAME: "db"}).error
    assert a.endpoint(tiny, "192.168.1.20", **{NAME: "web1"}).status == 200
    lease = lan.lease("192.168.1.20")
    assert lease is not None
    assert (lease.kind, lease.host, lease.fixed, lease.note) == (ENDPOINT, "a", True, "")
    assert a.release(tiny, "192.168.1.20").status == 200
    assert lan.lease("192.168.1.20") is None
    history = json.loads(lan.keys()[f"{KEYS.history}default/192.168.1.20"])["past"]
    assert [each["kind"] for each in history] == [ENDPOINT, RESERVED]


def test_a_container_that_still_runs_as_before(lan: Lan, wire: FakeLan) -> None:
    """The network was made anew while the old container has the address: refused with that word, and nothing is lost;
    nor is it when another machine has taken it. A dead wire gives it by the policy, as any address."""
    a = lan.host("a", bridge("192.168.1.11/24", mac="02:aa:00:00:00:0a"), habits=PROBING, wire=wire)
    adopted(lan)
    before = lan.lease("192.168.1.20")
    pool = a.create()
    for mac, words in ((MAC, "docker network disconnect lan web1"), (OTHER_MAC, "a machine that is none of ours")):
        wire.machines["192.168.1.20"] = mac
        said = a.endpoint(pool, "192.168.1.20").error
        assert f"MAC {mac} answers there" in said
        assert words in said
        assert lan.lease("192.168.1.20") == before
    del wire.machines["192.168.1.20"]
    assert a.endpoint(pool, "192.168.1.20").status == 200


def test_a_range_that_was_excluded_meanwhile(lan: Lan, wire: FakeLan) -> None:
    """An operator's later word counts, and takes the reservation of nobody away."""
    a = lan.host("a", bridge("192.168.1.11/24", mac="02:aa:00:00:00:0a"), habits=PROBING, wire=wire)
    adopted(lan)
    pool = a.create()
    lan.put(KEYS.segment("default"), encode(SegmentSettings(exclude=("192.168.1.16/28",))))
    a.catch_up()
    assert "excluded" in a.endpoint(pool, "192.168.1.20").error
    lan.delete(KEYS.segment("default"))
    a.catch_up()

    def meanwhile(address: Any) -> None:
        lan.put(KEYS.segment("default"), encode(SegmentSettings(exclude=("192.168.1.16/28",))))
        a.catch_up()

    wire.before_answer = meanwhile
    assert "cannot be given: it is excluded" in a.endpoint(pool, "192.168.1.20").error
    assert lan.lease("192.168.1.20") is not None


def test_an_outage_in_the_middle_of_the_switch(lan: Lan, wire: FakeLan) -> None:
    """etcd went away between the question and the write: what is this host's is given from the journal and settled."""
    a = lan.host("a", bridge("192.168.1.11/24", mac="02:aa:00:00:00:0a"), habits=PROBING, wire=wire)
    adopted(lan)
    pool = a.create()
    a.catch_up()
    wire.before_answer = lambda address: lan.etcd.set_down(True)
    assert a.endpoint(pool, "192.168.1.20").status == 200
    lan.etcd.set_down(False)
    wire.before_answer = lambda address: None
    a.settle()
    lease = lan.lease("192.168.1.20")
    assert lease is not None
    assert (lease.kind, lease.host) == (ENDPOINT, "a")


def test_only_unreserve_ends_it(lan: Lan) -> None:
    """It is an operator's word: it outlives the host, also when that is retired, until an operator takes it back."""
    ops = Operations(lan.etcd, KEYS, "eve")
    b = lan.host("b", bridge("192.168.1.12/24"))
    b.create()
    adopted(lan)
    lan.put(KEYS.host("a"), encode(HostRecord("a")))
    lan.put(KEYS.heartbeat("b"), encode(Alive(host="b", machine_id="m", boot_id="b", process="p")))
    b.retire()
    assert [each.address for each in ops.retire("a", force=True, wait=30)] == []
    assert lan.lease("192.168.1.20") is not None
    [facts] = ops.facts(parse_address("192.168.1.20"), "default", "default")
    assert "host a is not in the register" in "".join(explain(facts).notes)
    assert "ipam-plugin unreserve 192.168.1.20" in "".join(explain(facts).notes)
    ops.unreserve(parse_range("192.168.1.20"), "default")
    assert lan.lease("192.168.1.20") is None


# --- the command ------------------------------------------------------------------------------------------------


class FakeDockerd:
    def __init__(self) -> None:
        self.found = Others((NETWORK,), (bearer(),))

    def __call__(self, socket: str) -> FakeDockerd:
        return self

    def others(self) -> Others:
        return self.found

    def close(self) -> None: ...


class _Kept(FakeEtcd):
    def close(self) -> None: ...


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeDockerd:
    """Host a with one container, and a LAN on which the printer answers."""
    made = FakeDockerd()
    monkeypatch.setattr("ipam_plugin.dockerd.Dockerd", made)
    monkeypatch.setattr(scan, "require_rights", lambda: None)
    monkeypatch.setattr(scan, "interfaces_of_this_machine", lambda: ([OWN], LINKS))
    answers = {WEB: [MAC], PRINTER: [OTHER_MAC], OWN.address: [CARD], ROUTER: [CARD]}
    monkeypatch.setattr(scan, "scan", lambda target, **_: scan.Report(answers, {}, 254, ""))
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    config = tmp_path / "config.yaml"
    config.write_text("host: a\netcd: {endpoints: [http://127.0.0.1:2379]}\n")

    def ran(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ipam-plugin", "--config", str(config), *words])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return status, told.out, told.err

    return ran


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> _Kept:
    etcd = _Kept()
    monkeypatch.setattr(daemon, "etcd_of", lambda config: etcd)
    return etcd


def values(etcd: FakeEtcd) -> dict[str, Any]:
    keys = etcd.snapshot().keys
    return {
        key.removeprefix(f"{KEYS.leases}default/"): json.loads(each.value)
        for key, each in keys.items()
        if key.startswith(KEYS.leases)
    }


def test_the_command(run: Run, engine: FakeDockerd, kept: _Kept) -> None:
    """It only proposes; with --apply it writes, says what to type next, and finds all of it known the next time."""
    status, out, err = run("adopt")
    assert status == 0, err
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["10.0.0.20", "lease"],
        ["10.0.0.140", "reserve"],
        ["10.0.0.254", "reserve"],
    ]
    assert "3 to be written with --apply" in err
    assert values(kept) == {}
    status, out, err = run("adopt", "lan", "--apply")
    assert (status, "3 of 3 written" in err) == (0, True)
    assert "To switch network lan over, type:\n  docker network disconnect lan web1\n  docker network rm lan\n" in out
    written = values(kept)
    assert {address: each["kind"] for address, each in written.items()} == dict.fromkeys(
        ("10.0.0.20", "10.0.0.140", "10.0.0.254"), RESERVED
    )
    assert (written["10.0.0.20"]["host"], written["10.0.0.20"]["container"]["name"]) == ("a", "web1")
    assert all(each["token"] and each["since"] and each["by"] for each in written.values())
    status, out, _ = run("adopt", "--apply", "-o", "json")
    assert status == 0
    assert [(each["kind"], each["written"]) for each in json.loads(out)] == [(KNOWN, False)] * 3
    assert values(kept) == written


def test_conflicts_are_told_and_stop_the_switch(run: Run, engine: FakeDockerd, kept: _Kept) -> None:
    """Status 1; what is not disputed is written all the same, and no command to switch is proposed."""
    engine.found = Others((NETWORK,), (bearer(), bearer("10.0.0.140", "fax")))
    status, out, err = run("adopt", "--apply")
    assert status == 1
    assert "Cure: another address for one of the two" in " ".join(out.split())
    assert "1 to be cured first" in err
    assert "To switch" not in out
    assert set(values(kept)) == {"10.0.0.20", "10.0.0.254"}


def test_which_networks(run: Run, engine: FakeDockerd, kept: _Kept) -> None:
    """Those on a LAN, or those that are named; why others are not is said."""
    behind = NETWORK._replace(id="n9", name="bridge", interface="br1")
    engine.found = Others((behind,), ())
    status, _, err = run("adopt")
    assert (status, "network bridge is left alone: its bridge br1 has no port" in err) == (1, True)
    assert "no network of this host is on a LAN" in err
    assert run("adopt", "bridge")[0] == 0
    status, _, err = run("adopt", "nothing")
    assert (status, "these are: bridge" in err) == (1, True)


def test_a_wire_that_cannot_be_asked(
    run: Run, engine: FakeDockerd, kept: _Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers are known from Docker, so they are proposed; that the rest is not known is status 1."""
    engine.found = Others((NETWORK._replace(subnets=(OtherSubnet("10.0.0.0/8", "", "", {}),)),), (bearer(),))
    status, out, _ = run("adopt", "-o", "json")
    assert status == 1
    assert [each["kind"] for each in json.loads(out)] == [NOT_ASKED, CONFLICTING, LEASE]
    report = scan.Report({}, {CARD: 250}, 254, "")
    monkeypatch.setattr(scan, "scan", lambda target, **_: report)
    engine.found = Others((NETWORK,), (bearer(),))
    status, out, _ = run("adopt", "-o", "json")
    assert "proxy ARP" in json.loads(out)[0]["what"]


def test_what_changed_since_it_was_read(run: Run, engine: FakeDockerd, kept: _Kept) -> None:
    """P1: another host was faster. Nothing of its is overwritten, and the command says so."""
    theirs = Lease(ENDPOINT, "b", OTHER_MAC, token="theirs")
    first = []

    def meanwhile(expect: Any, writes: Any) -> Fault:
        if not first:
            first.append(1)
            kept.commit({}, [Put(KEYS.lease("default", WEB), encode(theirs))], deadline=1e12)
        return Fault.PASS

    kept.on_commit = meanwhile
    status, _, err = run("adopt", "--apply")
    assert status == 1
    assert "10.0.0.20 has just changed, and was not written" in err
    assert values(kept)["10.0.0.20"]["token"] == "theirs"


@pytest.mark.etcd
def test_on_a_real_etcd(etcd: RealEtcd) -> None:
    """One transaction each, on what was read: a stranger that turned out to be the container stands in the history."""
    keys = Keys(etcd.prefix)
    ops = Operations(etcd.client, keys, "eve")
    stranger = Lease(CONFLICT, mac=MAC, by="b", token="x", since="2026-01-01T00:00:00.000Z")
    etcd.cluster.etcdctl("put", keys.lease("default", WEB), encode(stranger).decode())
    of = world([bearer()], ops.leases())
    [one] = [each for each in adopt.propose(of) if each.kind == LEASE]
    assert one.write is not None
    assert ops.adopt("default", one.write)
    assert not ops.adopt("default", one.write), "it is not what was read any more"
    [facts] = ops.facts(WEB, "default", "default")
    assert facts.lease is not None
    assert (facts.lease.kind, facts.lease.host, facts.lease.by) == (RESERVED, "a", "eve")
    [past] = facts.past
    assert (past.kind, past.mac) == (CONFLICT, MAC)
    assert past.why.startswith("replaced by a reservation for container web1 on host a by eve")
    again = adopt.propose(world([bearer()], ops.leases()))
    assert KNOWN in [each.kind for each in again]
    elsewhere = found(PRINTER, Lease(CONFLICT, mac=OTHER_MAC), key=f"{keys.leases}default/10.0.0.140/x")
    assert not ops.adopt("default", adopt.Write(PRINTER, elsewhere, Lease(RESERVED))), "spelt otherwise"


def test_help_says_what_it_does() -> None:
    """The command stands alone."""
    done = subprocess.run(
        [sys.executable, "-m", "ipam_plugin", "adopt", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Nothing is written without --apply" in " ".join(done.stdout.split())
    assert ipaddress.ip_address("10.0.0.20") == WEB
