"""What each request gets, by whom an address is held, and what is left after a fault: several hosts on one etcd."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fakes import FakeEtcd, Fault, Writes
from harness import GATEWAY, KEYS, MAC, NAME, Host, Lan, bridge, nic, until
from ipam_plugin.addresses import parse_address
from ipam_plugin.etcd import Commit, Delete, Put
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HOST,
    RESERVED,
    ROUTER,
    History,
    Holder,
    Lease,
    Pool,
    PoolUse,
    decode,
    encode,
)
from ipam_plugin.view import Local

A_BRIDGE = bridge("192.168.1.11/24", mac="02:aa:00:00:00:0a")
B_BRIDGE = bridge("192.168.1.12/24", mac="02:bb:00:00:00:0b")


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made:
        yield made


@pytest.fixture
def a(lan: Lan) -> Host:
    return lan.host("a", A_BRIDGE)


@pytest.fixture
def b(lan: Lan) -> Host:
    return lan.host("b", B_BRIDGE)


def use(lan: Lan, pool: str, host: str) -> PoolUse | None:
    value = lan.keys().get(f"{KEYS.pools}{pool}/{host}")
    return decode(value, PoolUse) if value is not None else None


# -------------------------------------------------------------------------------------------------- pools


def test_a_pool_id_is_the_same_everywhere_and_says_everything(lan: Lan, a: Host, b: Host) -> None:
    """RequestPool: the same PoolID for the same request on every host; options in any order; another for others."""
    options = {"gateway": "router", "exclude": "192.168.1.64/28, 192.168.1.5", "hold": "10m"}
    first = a.create(ip_range="192.168.1.0/25", **options)
    assert b.create(ip_range="192.168.1.0/25", **dict(reversed(options.items()))) == first
    assert a.create(ip_range="192.168.1.0/25") != first
    assert a.create(ip_range="192.168.1.0/25", **options | {"segment": "other"}) != first
    assert a.create(ip_range="192.168.1.0/24") == a.create()


def test_a_daemon_that_lost_everything_serves_its_pool(lan: Lan, a: Host) -> None:
    """The PoolID describes itself: a new daemon, and an etcd without the pool's key, serve it with its options."""
    pool = a.create(ip_range="192.168.1.128/28", exclude="192.168.1.128/29", gateway="router")
    lan.delete(f"{KEYS.pools}{pool}/a")
    again = lan.host("a", A_BRIDGE)
    assert {again.run(pool) for _ in range(8)} == {f"192.168.1.{n}" for n in range(136, 144)}
    assert "8 endpoint" in again.endpoint(pool).error
    found = use(lan, pool, "a")
    assert found is not None
    told = {"segment": "default", "exclude": "192.168.1.128/29", "gateway": "router"}
    assert (found.count, found.options) == (1, told)


def test_a_lost_pool_key_is_written_once(lan: Lan, a: Host) -> None:
    """Containers that start together after etcd lost the pool's key count it as one network, not as many."""
    pool = a.create()
    key = f"{KEYS.pools}{pool}/a"
    lan.delete(key)
    a.catch_up()
    nested: list[int] = []

    def meanwhile(expect: Mapping[str, int], writes: Writes) -> Fault:
        if key in expect and not nested:
            nested.append(0)
            nested[0] = a.post("/IpamDriver.RequestAddress", asks(pool)).status
        return Fault.PASS

    lan.etcd.on_commit = meanwhile
    assert a.post("/IpamDriver.RequestAddress", asks(pool)).status == 200
    assert nested == [200]
    found = use(lan, pool, "a")
    assert found is not None
    assert found.count == 1


def asks(pool: str, address: str = "", mac: str = "02:42:00:00:00:01") -> bytes:
    return json.dumps({"PoolID": pool, "Address": address, "Options": {MAC: mac}}).encode()


def test_two_networks_share_a_pool(lan: Lan, a: Host) -> None:
    """Two networks of one host with one PoolID: the first ReleasePool drops nothing, the last one drops the holdings
    of gateway and auxiliary addresses, and never an endpoint."""
    pool = a.create(gateway="router")
    assert a.create(gateway="router") == pool
    for _ in range(2):
        assert a.gateway(pool, "192.168.1.254").status == 200
    assert a.auxiliary(pool, "192.168.1.253").status == 200
    container = a.run(pool)
    assert a.release(pool, "192.168.1.254").status == 200
    assert a.release_pool(pool).status == 200
    assert lan.of_kind(ROUTER) == ["192.168.1.253", "192.168.1.254"]
    assert a.release_pool(pool).status == 200
    assert lan.of_kind(ROUTER) == []
    assert lan.of_kind(ENDPOINT) == [container]
    assert use(lan, pool, "a") is None
    assert a.release_pool(pool).status == 200, "a repeated release is a success"
    assert lan.of_kind(ENDPOINT) == [container]


def test_a_creation_that_failed_leaves_nothing(lan: Lan, a: Host, b: Host) -> None:
    """An engine whose creation failed sends only ReleasePool: the gateway that was granted before goes with it."""
    pool = a.create(gateway="router")
    assert a.gateway(pool, "192.168.1.254").status == 200
    taken = b.run(b.create())
    assert "b" in a.auxiliary(pool, taken).error
    assert a.release_pool(pool).status == 200
    assert lan.lease("192.168.1.254") is None
    assert lan.lease(taken) is not None


def test_a_network_that_comes_while_the_last_one_goes_keeps_its_gateway(lan: Lan, a: Host) -> None:
    """ReleasePool drops holdings only while its network is the host's last of the pool, whenever another one comes."""
    pool = a.create(gateway="router")
    assert a.gateway(pool, "192.168.1.254").status == 200
    came: list[int] = []

    def meanwhile(expect: Mapping[str, int], writes: Writes) -> Fault:
        if not came and any(isinstance(each, Delete) for each in writes):
            came.append(0)
            body = {"AddressSpace": "L", "Pool": "192.168.1.0/24", "SubPool": "", "Options": {"gateway": "router"}}
            a.post("/IpamDriver.RequestPool", json.dumps(body).encode())
            body = {"PoolID": pool, "Address": "192.168.1.254", "Options": GATEWAY}
            came[0] = a.post("/IpamDriver.RequestAddress", json.dumps(body).encode()).status
        return Fault.PASS

    lan.etcd.on_commit = meanwhile
    assert a.release_pool(pool).status == 200
    assert came == [200]
    assert lan.of_kind(ROUTER) == ["192.168.1.254"]
    found = use(lan, pool, "a")
    assert found is not None
    assert found.count == 1


# ------------------------------------------------------------------------------------------ gateway=host


def test_the_same_command_on_every_host(lan: Lan, a: Host, b: Host) -> None:
    """gateway=host without an address: each host's own, with the mask of its bridge; the lease names the interface."""
    for host, own in ((a, "192.168.1.11"), (b, "192.168.1.12")):
        pool = host.create()
        assert host.gateway(pool).ok == {"Address": f"{own}/24", "Data": {}}
        lease = lan.lease(own)
        assert lease is not None
        assert (lease.kind, lease.host, lease.interface) == (HOST, host.name, "br0")
        assert lease.holders == (Holder(host.name, pool),)
    assert a.gateway(a.create(), "192.168.1.11").status == 200


def test_the_hosts_own_address_is_in_the_register_before_anything_is_given(lan: Lan, a: Host, b: Host) -> None:
    """P2: from its first RequestPool in a subnet on, a host's own address is given to no container anywhere."""
    pool = a.create(ip_range="192.168.1.8/29")
    b.create(ip_range="192.168.1.8/29")
    assert {a.run(pool) for _ in range(6)} == {f"192.168.1.{n}" for n in (8, 9, 10, 13, 14, 15)}
    assert "2 host" in b.endpoint(pool).error
    assert "host b" in a.endpoint(pool, "192.168.1.12").error
    assert "host a" in a.endpoint(pool, "192.168.1.11").error


def test_a_gateway_that_is_another_hosts_is_refused(lan: Lan, a: Host, b: Host) -> None:
    """Docker would put it on this bridge and take the LAN down: the sentence names the host and what to type."""
    b.create()
    pool = a.create()
    said = a.gateway(pool, "192.168.1.12").error
    assert "host b" in said
    assert "02:bb:00:00:00:0b" in said
    assert "--aux-address DefaultGatewayIPv4=192.168.1.12" in said
    assert "--ipam-opt gateway=router" in said


def test_a_gateway_that_is_a_router_is_refused(lan: Lan, a: Host) -> None:
    """The segment's router, one that a network uses, and a stranger seen on the wire: each refused with the cure."""
    lan.put(KEYS.segment("default"), '{"router":"192.168.1.254"}')
    lan.put(f"{KEYS.leases}default/192.168.1.253", '{"kind":"conflict","mac":"02:99:00:00:00:99"}')
    assert a.auxiliary(a.create(), "192.168.1.252").status == 200
    pool = a.create()
    for address, named in (("254", "router of segment default"), ("253", "02:99:00:00:00:99"), ("252", "router")):
        said = a.gateway(pool, f"192.168.1.{address}").error
        assert named in said
        assert f"--aux-address DefaultGatewayIPv4=192.168.1.{address}" in said


def test_a_host_that_is_the_router_uses_its_own_address(lan: Lan, a: Host) -> None:
    """What this host's bridge carries already is its gateway, also when the segment calls it the router."""
    lan.put(KEYS.segment("default"), '{"router":"192.168.1.11"}')
    pool = a.create()
    assert a.gateway(pool, "192.168.1.11").status == 200
    assert a.gateway(pool).status == 200


@pytest.mark.parametrize("value", ['{"kind":"reserved","note":"docker host a"}', "junk"])
def test_a_host_whose_address_was_reserved_uses_it(lan: Lan, a: Host, value: str) -> None:
    """An operator who reserved this host's address knew of the machine: it stays reserved, and is the gateway."""
    lan.put(KEYS.lease("default", A_BRIDGE.address), value)
    pool = a.create()
    assert a.gateway(pool).ok["Address"] == "192.168.1.11/24"
    assert a.gateway(pool, "192.168.1.11").ok["Address"] == "192.168.1.11/24"
    assert a.release(pool, "192.168.1.11").status == 200
    assert a.release_pool(pool).status == 200
    assert lan.keys()[KEYS.lease("default", A_BRIDGE.address)] == value.encode()


def test_another_mask_is_refused(lan: Lan) -> None:
    """Docker deletes the bridge's address when the mask differs: refused, with --subnet and --ip-range to type."""
    host = lan.host("a", bridge("192.168.1.11/16"))
    assert "--subnet 192.168.0.0/16 --ip-range 192.168.1.0/24" in host.gateway(host.create()).error


def test_an_interface_that_is_no_bridge(lan: Lan) -> None:
    """The subnet is carried by a NIC: refused, saying gateway=router for macvlan and a bridge's name for bridges."""
    host = lan.host("a", nic("192.168.1.11/24"))
    said = host.gateway(host.create()).error
    assert "--ipam-opt gateway=router" in said
    assert "-o com.docker.network.bridge.name=" in said
    assert "eth0" in said


def test_another_gateway_than_the_bridges_is_refused(lan: Lan, a: Host) -> None:
    """Docker would delete the bridge's address for the sake of --gateway: the sentence names the bridge's own."""
    said = a.gateway(a.create(), "192.168.1.99").error
    assert "192.168.1.11" in said
    assert "Leave --gateway out" in said


def test_the_first_of_the_bridges_addresses(lan: Lan) -> None:
    """Of several addresses in the subnet Docker takes the first in the kernel's order, and so do we."""
    host = lan.host("a", bridge("192.168.1.30/24"), bridge("192.168.1.20/24"), bridge("10.0.0.1/24", "br1"))
    assert host.gateway(host.create()).ok["Address"] == "192.168.1.30/24"
    assert lan.of_kind(HOST) == ["192.168.1.20", "192.168.1.30"], "both are the host's"


def test_ipv6_gateway_is_a_lasting_address(lan: Lan) -> None:
    """A temporary or deprecated IPv6 address is no gateway while there is another one; the length is the subnet's."""
    host = lan.host("a", bridge("fd00::99/64", temporary=True), bridge("fd00::1/64"))
    pool = host.create("fd00::/64")
    assert host.gateway(pool).ok["Address"] == "fd00::1/64"
    assert host.endpoint(pool).ok["Address"].endswith("/64")


def test_no_interface_has_an_address_there(lan: Lan) -> None:
    """gateway=host where Docker will make a bridge: one is chosen, or the given one taken, once for the whole LAN."""
    x, y = lan.host("x"), lan.host("y")
    chosen = x.gateway(x.create()).ok["Address"].partition("/")[0]
    lease = lan.lease(chosen)
    assert lease is not None
    assert (lease.kind, lease.host) == (HOST, "x")
    assert x.gateway(x.create(), "192.168.1.1").status == 200
    assert "host x" in y.gateway(y.create(), "192.168.1.1").error
    assert chosen not in {y.run(y.create()) for _ in range(20)}


# ---------------------------------------------------------------------------------------- gateway=router


def test_a_router_is_shared_until_the_last_holder_releases(lan: Lan, a: Host, b: Host) -> None:
    """gateway=router: all hosts hold it, nobody else gets it, and it goes with the last holder."""
    pool = a.create(gateway="router")
    assert b.create(gateway="router") == pool
    for host in (a, b):
        assert host.gateway(pool, "192.168.1.254").ok["Address"] == "192.168.1.254/24"
    lease = lan.lease("192.168.1.254")
    assert lease is not None
    assert {each.host for each in lease.holders} == {"a", "b"}
    assert "router" in a.endpoint(pool, "192.168.1.254").error
    assert a.release(pool, "192.168.1.254").status == 200
    assert a.release(pool, "192.168.1.254").status == 200, "repeated"
    assert lan.lease("192.168.1.254") is not None
    assert "router" in a.endpoint(pool, "192.168.1.254").error
    assert b.release(pool, "192.168.1.254").status == 200
    assert lan.lease("192.168.1.254") is None
    assert a.endpoint(pool, "192.168.1.254").status == 200


def test_the_segments_own_router_stays(lan: Lan, a: Host) -> None:
    """gateway=router without an address: the segment's router; none set is refused; its lease is never released."""
    pool = a.create(gateway="router")
    said = a.gateway(pool).error
    assert "--gateway" in said
    assert "ipam-plugin segment default --router" in said
    lan.put(KEYS.segment("default"), '{"router":["192.168.1.254","fd00::1"]}')
    assert a.gateway(pool).ok["Address"] == "192.168.1.254/24"
    assert a.gateway(a.create("fd00::/64", gateway="router")).ok["Address"] == "fd00::1/64"
    assert a.release(pool, "192.168.1.254").status == 200
    assert a.release_pool(pool).status == 200
    lease = lan.lease("192.168.1.254")
    assert lease is not None
    assert (lease.kind, lease.holders) == (ROUTER, ())


def test_the_router_of_this_hosts_configuration(lan: Lan) -> None:
    """A router in the configuration counts like one in segments/, on this host."""
    local = Local(routers=(parse_address("192.168.1.1"),), cooldown=0.0)
    host = lan.host("a", local=lambda segment: local)
    pool = host.create(ip_range="192.168.1.0/30", gateway="router")
    assert {host.run(pool) for _ in range(2)} == {"192.168.1.2", "192.168.1.3"}
    assert "router" in host.endpoint(pool, "192.168.1.1").error
    assert host.gateway(pool).ok["Address"] == "192.168.1.1/24"


# ------------------------------------------------------------------------------------ auxiliary addresses


def test_an_auxiliary_address_is_shared(lan: Lan, a: Host, b: Host) -> None:
    """Explicit, no MAC, no name: shared by hosts, also outside the range; held until the last one releases."""
    pool = a.create(ip_range="192.168.1.128/25")
    b.create(ip_range="192.168.1.128/25")
    for host in (a, b):
        assert host.auxiliary(pool, "192.168.1.7").ok["Address"] == "192.168.1.7/24"
    assert a.release_pool(pool).status == 200
    assert lan.of_kind(ROUTER) == ["192.168.1.7"]
    assert b.release_pool(pool).status == 200
    assert lan.of_kind(ROUTER) == []


def test_an_auxiliary_address_that_is_another_hosts_container(lan: Lan, a: Host, b: Host) -> None:
    """Refused, naming host, container and MAC."""
    pool = b.create()
    address = b.endpoint(pool, **{NAME: "web"}).ok["Address"].partition("/")[0]
    lease = lan.lease(address)
    assert lease is not None
    said = a.auxiliary(a.create(), address).error
    assert "container web on host b" in said
    assert lease.mac in said
    assert address in said


def test_a_replayed_endpoint_is_noted_and_the_next_release_takes_the_note(lan: Lan, a: Host) -> None:
    """A replay (own endpoint, explicit address, null options) succeeds; the next release takes back that note only."""
    pool = a.create()
    address = a.run(pool)
    before = lan.lease(address)
    assert before is not None
    assert a.auxiliary(pool, address).ok["Address"] == f"{address}/24"
    noted = lan.lease(address)
    assert noted is not None
    assert (noted.kind, noted.token, noted.noted) == (ENDPOINT, before.token, 1)
    assert a.release(pool, address).status == 200
    assert lan.lease(address) is not None
    assert a.release(pool, address).status == 200
    assert lan.lease(address) is None


def test_an_auxiliary_address_that_a_stranger_answered_for(lan: Lan, a: Host) -> None:
    """A conflict is the very machine that the operator now declares: it becomes a shared address."""
    lan.put(f"{KEYS.leases}default/192.168.1.7", json.dumps({"kind": CONFLICT, "mac": "02:99:00:00:00:99"}))
    pool = a.create()
    assert "02:99:00:00:00:99" in a.endpoint(pool, "192.168.1.7").error
    assert a.auxiliary(pool, "192.168.1.7").status == 200
    assert lan.of_kind(ROUTER) == ["192.168.1.7"]


# ----------------------------------------------------------------------------------------------- endpoints


def test_a_container_gets_the_subnets_prefix_length(lan: Lan, a: Host) -> None:
    """From the range, with the prefix length of the subnet: macvlan refuses any other. The lease says who and when."""
    pool = a.create(ip_range="192.168.1.128/30")
    reply = a.endpoint(pool, **{NAME: "/web"}).ok
    address, _, length = reply["Address"].partition("/")
    assert length == "24"
    assert address in {f"192.168.1.{n}" for n in range(128, 132)}
    lease = lan.lease(address)
    assert lease is not None
    assert (lease.kind, lease.host, lease.pool) == (ENDPOINT, "a", pool)
    assert lease.mac.startswith("02:42:")
    assert lease.container is not None
    assert lease.container.name == "web"
    assert lease.since.endswith("Z")
    assert len(lease.token) >= 16


def test_an_explicit_address_may_lie_outside_the_range(lan: Lan, a: Host) -> None:
    """--ip: outside the range but not outside the subnet, and neither network nor broadcast address."""
    pool = a.create(ip_range="192.168.1.128/25", exclude="192.168.1.9")
    assert a.run(pool, "192.168.1.5") == "192.168.1.5"
    assert "does not lie in" in a.endpoint(pool, "192.168.2.5").error
    assert "broadcast" in a.endpoint(pool, "192.168.1.255").error
    assert "network" in a.endpoint(pool, "192.168.1.0").error
    assert "exclude=192.168.1.9" in a.endpoint(pool, "192.168.1.9").error


def test_an_explicit_address_that_is_taken(lan: Lan, a: Host, b: Host) -> None:
    """Refused, naming the holder; of this very host too, however equal the MAC, with what to type if it is gone."""
    pool = a.create()
    b.create()
    address = a.run(pool)
    lease = lan.lease(address)
    assert lease is not None
    assert "on host a" in b.endpoint(pool, address).error
    said = a.call("RequestAddress", PoolID=pool, Address=address, Options={MAC: lease.mac}).error
    assert f"ipam-plugin release {address} --force" in said
    assert lan.lease(address) == lease


def test_overlapping_pools_of_one_segment_cannot_share_an_address(lan: Lan) -> None:
    """P1: a /16 on one host and a /24 on another use the same keys; another segment is another LAN."""
    a, b = lan.host("a"), lan.host("b")
    wide, narrow = a.create("192.168.0.0/16"), b.create("192.168.1.0/24")
    assert a.run(wide, "192.168.1.5") == "192.168.1.5"
    assert "on host a" in b.endpoint(narrow, "192.168.1.5").error
    other = b.create("192.168.1.0/24", segment="other")
    assert b.run(other, "192.168.1.5") == "192.168.1.5"


def test_addresses_of_ipv6_are_one_spelling(lan: Lan) -> None:
    """--ip6 in any spelling is one address and one key (RFC 5952)."""
    a, b = lan.host("a"), lan.host("b")
    pool = a.create("fd00::/64")
    b.create("fd00::/64")
    assert a.run(pool, "FD00:0:0:0::00ab") == "fd00::ab"
    assert "on host a" in b.endpoint(pool, "fd00::ab").error
    assert b.release(pool, "fd00:0::ab").status == 200
    assert a.release(pool, "fd00:0::AB").status == 200
    assert lan.leases() == {}


def test_held_and_standby_are_their_hosts_own(lan: Lan, a: Host, b: Host) -> None:
    """An address that this host keeps for a container, or claimed ahead, is given to its --ip, and to nobody else's."""
    for number, kind in ((40, "held"), (41, "standby")):
        address = f"192.168.1.{number}"
        lan.put(f"{KEYS.leases}default/{address}", json.dumps({"kind": kind, "host": "a", "token": "old"}))
        pool = a.create()
        b.create()
        told = "a hold for a container on host a" if kind == "held" else "standby of host a"
        assert told in b.endpoint(pool, address).error
        assert told in b.auxiliary(pool, address).error
        assert a.run(pool, address) == address
        lease = lan.lease(address)
        assert lease is not None
        assert (lease.kind, lease.host, lease.token != "old") == (ENDPOINT, "a", True)


def test_the_interface_option_chooses_the_gateway(lan: Lan) -> None:
    """`interface`: where several carry the subnet, its address is the gateway."""
    host = lan.host("a", bridge("192.168.1.11/24"), bridge("192.168.1.12/24", "br1"))
    assert host.gateway(host.create(interface="br1")).ok["Address"] == "192.168.1.12/24"
    assert host.gateway(host.create()).ok["Address"] == "192.168.1.11/24"


def test_an_own_address_that_is_a_container_elsewhere(lan: Lan, b: Host) -> None:
    """Two machines use one address: an alarm that names both, nothing is overwritten, the network is served."""
    pool = b.create()
    b.run(pool, "192.168.1.11")
    a = lan.host("a", A_BRIDGE)
    assert a.create() == pool
    assert {kind for kind, _ in a.alarms} == {"own_address_taken"}
    assert "on host b" in a.alarms[0][1]
    assert A_BRIDGE.mac in a.alarms[0][1]
    assert "on host b" in a.gateway(pool).error
    lease = lan.lease("192.168.1.11")
    assert lease is not None
    assert (lease.kind, lease.host) == (ENDPOINT, "b")


def test_the_address_of_a_bridge_that_docker_took_down(lan: Lan) -> None:
    """Released while Docker's own bridge still stands, it is freed when no interface carries it any more; an address
    that the host had by itself stays."""
    x = lan.host("x", bridge("192.168.7.1/24"))
    x.create("192.168.7.0/24")
    pool = x.create()
    gateway = x.gateway(pool).ok["Address"].partition("/")[0]
    x.carried.append(bridge(f"{gateway}/24", "br-1234"))
    assert x.release(pool, gateway).status == 200
    assert x.release_pool(pool).status == 200
    x.register.free_lost_addresses(deadline=float("inf"))
    assert lan.of_kind(HOST) == sorted([gateway, "192.168.7.1"])
    x.carried.clear()
    x.catch_up()
    x.register.free_lost_addresses(deadline=float("inf"))
    assert lan.of_kind(HOST) == ["192.168.7.1"]


# -------------------------------------------------------------------------------------- lost capabilities


def test_an_engine_that_lost_our_capabilities(lan: Lan, a: Host) -> None:
    """An endpoint without a MAC: served, alarm with the cure; explicit addresses with null options are refused unless
    an endpoint of this host explains them; a request with a MAC, or GetCapabilities, ends it."""
    pool = a.create()
    assert a.auxiliary(pool, "192.168.1.7").status == 200
    address = a.call("RequestAddress", PoolID=pool, Address="", Options=None).ok["Address"].partition("/")[0]
    assert [kind for kind, _ in a.alarms] == ["engine_lost_capabilities"]
    assert "Restart dockerd" in a.alarms[0][1]
    a.call("RequestAddress", PoolID=pool, Address="", Options=None)
    assert len(a.alarms) == 1
    assert "restart dockerd" in a.auxiliary(pool, "192.168.1.8").error
    assert a.auxiliary(pool, address).status == 200, "a replay of its own endpoint"
    assert a.post("/IpamDriver.GetCapabilities").status == 200
    assert a.auxiliary(pool, "192.168.1.8").status == 200
    a.call("RequestAddress", PoolID=pool, Address="", Options={})
    assert "restart dockerd" in a.auxiliary(pool, "192.168.1.9").error
    a.run(pool)
    assert a.auxiliary(pool, "192.168.1.9").status == 200


# ------------------------------------------------------------------------------------------------ releases


def test_a_release_frees_exactly_its_lease(lan: Lan, a: Host, b: Host) -> None:
    """P3: unknown, repeated, of another pool, of another host: a success that changes nothing."""
    pool, other = a.create(), a.create(gateway="router")
    b.create()
    address, foreign = a.run(pool), b.run(pool)
    before = lan.leases()
    for host, wrong, what in [
        (b, pool, address),
        (a, other, address),
        (a, "default/192.168.0.0/16", address),
        (a, "172.16.1.0/24", address),
        (a, "nonsense", address),
        (a, pool, foreign),
        (a, pool, "192.168.1.200"),
        (a, pool, "10.9.9.9"),
        (a, pool, "fd00::1"),
        (a, pool, "192.168.1.12"),
    ]:
        assert host.release(wrong, what).ok == {}
        assert lan.leases() == before
    assert a.release(pool, address).ok == {}
    assert lan.lease(address) is None
    b.catch_up()
    assert b.run(pool, address) == address
    assert a.release(pool, address).ok == {}
    held = lan.lease(address)
    assert held is not None
    assert held.host == "b"


def test_a_late_release_does_not_free_the_next_holder(lan: Lan, a: Host) -> None:
    """P3: the fence is the token as known when the release arrived; a lease written after that stays."""
    pool = a.create()
    address = a.run(pool)
    a.hold_watch()
    again = lan.host("a", A_BRIDGE)  # a restart of the same host that the old process did not notice
    assert again.release(pool, address).status == 200
    assert again.run(pool, address) == address
    assert a.release(pool, address).status == 200, "the old process is late"
    assert lan.lease(address) is not None


def test_a_lease_that_was_filled_in_meanwhile_is_still_freed(lan: Lan, a: Host) -> None:
    """P3: the same token at a newer revision (somebody filled in the container's name): read and try again."""
    pool = a.create()
    address = a.run(pool)
    key = KEYS.lease("default", parse_address(address))
    filled: list[int] = []

    def meanwhile(expect: Mapping[str, int], writes: Writes) -> Fault:
        if not filled and Delete(key) in writes:
            filled.append(1)
            value = json.loads(lan.keys()[key])
            lan.put(key, json.dumps({**value, "container": {"name": "web"}}))
        return Fault.PASS

    lan.etcd.on_commit = meanwhile
    assert a.release(pool, address).status == 200
    assert filled
    assert lan.lease(address) is None
    past = decode(lan.keys()[KEYS.past("default", parse_address(address))], History).past
    assert past[0].container is not None
    assert (past[0].container.name, past[0].why) == ("web", "released")


def test_an_address_that_an_interface_still_carries_is_not_freed(lan: Lan) -> None:
    """Docker leaves its address on a bridge that the user made: released, it is the host's own, and goes to nobody."""
    x, y = lan.host("x"), lan.host("y")
    pool = x.create()
    y.create()
    gateway = x.gateway(pool).ok["Address"].partition("/")[0]
    x.carried.append(bridge(f"{gateway}/24", "br7"))
    assert x.release(pool, gateway).status == 200
    assert x.release_pool(pool).status == 200
    lease = lan.lease(gateway)
    assert lease is not None
    assert (lease.kind, lease.host, lease.holders) == (HOST, "x", ())
    assert "host x" in y.endpoint(pool, gateway).error
    pool = x.create("192.168.2.0/24")
    address = x.run(pool)
    x.carried.append(bridge(f"{address}/32", "lo"))
    assert x.release(pool, address).status == 200
    lease = lan.lease(address)
    assert lease is not None
    assert (lease.kind, lease.host) == (HOST, "x")


def test_the_own_address_survives_its_networks(lan: Lan, a: Host) -> None:
    """A host's own address that was a bridge network's gateway stays the host's when the network is removed."""
    pool = a.create()
    assert a.gateway(pool).status == 200
    assert a.release(pool, "192.168.1.11").status == 200
    assert a.release_pool(pool).status == 200
    lease = lan.lease("192.168.1.11")
    assert lease is not None
    assert (lease.kind, lease.host, lease.holders) == (HOST, "a", ())


def test_a_freed_address_rests(lan: Lan) -> None:
    """Section 6: a freed address is not given again during its cooldown, also after a restart, unless nothing else is
    left."""
    local = Local(cooldown=3600.0)
    a = lan.host("a", local=lambda segment: local)
    pool = a.create(ip_range="192.168.1.8/30")
    first = a.run(pool)
    assert a.release(pool, first).status == 200
    again = lan.host("a", local=lambda segment: local)
    given = [again.run(pool) for _ in range(4)]
    assert given[3] == first
    assert len(set(given)) == 4


# --------------------------------------------------------------------------------------------- P1: no two


def answers(threads_of: Mapping[Host, int], pool: str) -> list[Any]:
    """What so many endpoint requests of each host get, all at once."""
    replies: list[Any] = []
    barrier = threading.Barrier(sum(threads_of.values()))

    def ask(host: Host) -> None:
        barrier.wait(10)
        replies.append((host, host.post("/IpamDriver.RequestAddress", asks(pool))))

    threads = [threading.Thread(target=ask, args=(host,)) for host, count in threads_of.items() for _ in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
        assert not each.is_alive()
    return replies


def test_sixteen_hosts_fill_a_pool_exactly() -> None:
    """P1, section 6: N addresses serve N of the requests of 16 hosts at once, each another; the rest hear "full"."""
    with Lan() as lan:
        hosts = [lan.host(f"h{n}", time_limit=30.0) for n in range(16)]
        pool = hosts[0].create("10.1.0.0/24", "10.1.0.64/26")
        for each in hosts:
            assert each.create("10.1.0.0/24", "10.1.0.64/26") == pool
        replies = answers(dict.fromkeys(hosts, 5), pool)
        given = [reply.body["Address"] for _, reply in replies if reply.status == 200]
        refused = [reply for _, reply in replies if reply.status != 200]
        assert len(given) == len(set(given)) == 64
        assert len(refused) == 16
        for reply in refused:
            assert reply.status == 409
            assert reply.error == f"pool {pool} is full: 64 addresses: 64 endpoint"
        for host, reply in replies:
            if reply.status == 200:
                lease = lan.lease(reply.body["Address"].partition("/")[0])
                assert lease is not None
                assert lease.host == host.name


class CarelessEtcd(FakeEtcd):
    """An etcd that compares nothing."""

    def commit(self, expect: Mapping[str, int], writes: Writes, *, deadline: float, proof: str | None = None) -> Commit:
        return super().commit({}, writes, deadline=deadline)


@pytest.mark.parametrize(("made", "doubled"), [(FakeEtcd, False), (CarelessEtcd, True)])
def test_a_stale_view_costs_a_try_and_no_more(made: type[FakeEtcd], doubled: bool) -> None:
    """P1: a host that hears nothing of the others gives nobody's address. The comparison in the transaction is what
    does it: without it this test finds two holders."""
    with Lan(made()) as lan:
        a, b = lan.host("a"), lan.host("b")
        pool = a.create(ip_range="192.168.1.8/29")
        b.create(ip_range="192.168.1.8/29")
        b.hold_watch()
        taken = [a.run(pool) for _ in range(7)]
        given = b.run(pool)
        assert (given in taken) is doubled


def test_full_is_said_only_when_nothing_was_missed(lan: Lan) -> None:
    """A view that is behind is brought up to date before a request is refused: what was freed meanwhile is found."""
    a, b = lan.host("a"), lan.host("b")
    pool = a.create(ip_range="192.168.1.8/31")
    b.create(ip_range="192.168.1.8/31")
    held = [a.run(pool), a.run(pool)]
    b.catch_up()
    assert "is full: 2 addresses: 2 endpoint" in b.endpoint(pool).error
    b.hold_watch()
    assert a.release(pool, held[1]).status == 200
    threading.Timer(0.1, b.release_watch).start()
    assert b.post("/IpamDriver.RequestAddress", asks(pool)).ok["Address"] == f"{held[1]}/24"


def test_full_names_the_kinds(lan: Lan, a: Host, b: Host) -> None:
    """P7: "full" counts what holds the addresses, kind by kind."""
    lan.put(f"{KEYS.leases}default/192.168.1.8", "mine!")
    lan.put(f"{KEYS.leases}default/192.168.1.9", '{"kind":"reserved"}')
    pool = a.create(ip_range="192.168.1.8/29", exclude="192.168.1.14")
    b.create(ip_range="192.168.1.8/29")
    assert a.auxiliary(pool, "192.168.1.10").status == 200
    a.run(pool), a.run(pool)
    assert a.endpoint(pool).error == (
        f"pool {pool} is full: 8 addresses: 2 endpoint, 2 host, 1 router, 1 reserved, 1 unreadable,"
        " 1 excluded or a host's own"
    )


# --------------------------------------------------------------------------------- what operators write


@pytest.mark.parametrize(
    "value",
    ["", "x", "{}", "[]", "null", "\x00\xff", '{"kind":5}', '{"kind":"endpoint"', '{"kind":"mine"}', "é" * 100_000],
    ids=lambda value: repr(value[:9]),
)
def test_any_bytes_reserve_an_address(lan: Lan, a: Host, value: str) -> None:
    """A lease key with any value means taken: never given, chosen or by --ip, never overwritten, never freed."""
    key = f"{KEYS.leases}default/192.168.1.9"
    pool = a.create(ip_range="192.168.1.8/31")
    lan.put(key, value.encode("latin-1"))
    assert a.run(pool) == "192.168.1.8"
    assert "full" in a.endpoint(pool).error
    assert "192.168.1.9" in a.endpoint(pool, "192.168.1.9").error
    assert a.release(pool, "192.168.1.9").status == 200
    assert a.auxiliary(pool, "192.168.1.9").status == 200
    assert a.release_pool(pool).status == 200
    assert lan.keys()[key] == value.encode("latin-1")


@pytest.mark.parametrize("spelling", ["192.168.001.009", "192.168.1.9/", "192.168.1.9/a", " 192.168.1.9"])
def test_another_spelling_is_taken_too(lan: Lan, a: Host, spelling: str) -> None:
    """An address typed otherwise by hand counts as taken, for a choice and for --ip."""
    lan.put(f"{KEYS.leases}default/{spelling}", '{"kind":"reserved"}')
    pool = a.create(ip_range="192.168.1.8/31")
    assert a.run(pool) == "192.168.1.8"
    assert "192.168.1.9" in a.endpoint(pool, "192.168.1.9").error
    assert "full" in a.endpoint(pool).error


@pytest.mark.parametrize(
    "junk",
    ["", "junk", "[]", '{"router":"here"}', '{"exclude":["all"]}', '{"reserved":["x"]}', '{"exclude":"192.168.1.9"}'],
)
def test_unreadable_settings_stop_the_segment(lan: Lan, a: Host, junk: str) -> None:
    """To guess could give out what an operator excluded: nothing is given in the segment, and the sentence names the
    key to mend; releases still work, so do other segments, and the settings are not overwritten."""
    pool = a.create(gateway="router")
    address, other = a.run(pool), a.create(segment="other")
    assert a.gateway(pool, "192.168.1.254").status == 200
    lan.put(KEYS.segment("default"), junk)
    held = lan.leases()
    replies = [a.endpoint(pool), a.endpoint(pool, "192.168.1.99"), a.auxiliary(pool, "192.168.1.98")]
    for reply in [*replies, a.gateway(pool, "192.168.1.97")]:
        assert KEYS.segment("default") in reply.error
    assert lan.leases() == held
    assert a.run(other)
    assert a.release(pool, address).status == 200
    assert a.release(pool, "192.168.1.254").status == 200
    assert a.release_pool(pool).status == 200
    assert lan.leases() == {"192.168.1.11": lan.lease("192.168.1.11")}
    assert lan.keys()[KEYS.segment("default")] == junk.encode()
    lan.delete(KEYS.segment("default"))
    assert a.run(pool)


def test_settings_forbid_for_everybody(lan: Lan, a: Host) -> None:
    """segments/: excluded, reserved and moving addresses and the router are given to no container, chosen or asked."""
    lan.put(
        KEYS.segment("default"),
        json.dumps(
            {
                "router": "192.168.1.8",
                "exclude": ["192.168.1.9"],
                "reserved": [{"range": "192.168.1.10/31", "note": "printers", "by": "eve"}],
                "moving": ["192.168.1.12"],
            }
        ),
    )
    pool = a.create(ip_range="192.168.1.8/29")
    assert {a.run(pool) for _ in range(3)} == {f"192.168.1.{n}" for n in (13, 14, 15)}
    for number, said in [(8, "router"), (9, "excluded"), (10, "reserved by eve: printers"), (12, "moves")]:
        assert said in a.endpoint(pool, f"192.168.1.{number}").error
    assert "full" in a.endpoint(pool).error


@pytest.mark.parametrize("asked", ["", "192.168.1.9"])
def test_an_exclude_between_choice_and_commit_is_honoured(lan: Lan, a: Host, asked: str) -> None:
    """Every grant compares the revision of the segment's settings, so what was excluded a moment ago is not given."""
    pool = a.create(ip_range="192.168.1.8/31")
    a.run(pool, "192.168.1.8")
    changed: list[int] = []

    def meanwhile(expect: Mapping[str, int], writes: Writes) -> Fault:
        if not changed and KEYS.lease("default", parse_address("192.168.1.9")) in expect:
            changed.append(1)
            lan.put(KEYS.segment("default"), '{"exclude":["192.168.1.9"]}')
        return Fault.PASS

    a.catch_up()
    lan.etcd.on_commit = meanwhile
    said = a.post("/IpamDriver.RequestAddress", asks(pool, asked)).error
    assert changed
    assert "full" in said or "excluded" in said
    assert lan.lease("192.168.1.9") is None


def test_hostile_keys_do_not_stop_a_host(lan: Lan) -> None:
    """Nothing that stands in etcd keeps a host from serving, before it starts or while it runs."""
    values = [b"", b"junk", b"\xff", b"[]", b'{"host":5}', b"[" * 5000, b'{"past":[{"kind":"x","until":"0001-01-01"}]}']
    names = ["", "x", "default", "default/", "default/x", "default/192.168.1.5/x", "..", "a/b/c/d", "\n", "\x1b[2J"]
    names += ["default/192.168.1.0/24/a", "default/192.168.1.0/24", "default/fd00::%1", "é/1.2.3.4", "default/::5"]
    places = ("leases", "history", "segments", "pools", "hosts", "alive", "nonsense")

    def spoil(turn: int) -> None:
        for number, (place, name) in enumerate((place, name) for place in places for name in names):
            whole_lan = place == "leases" and "192.168.1.0/24" in name  # takes every address, as it says
            if (place, name) != ("segments", "default") and not whole_lan:
                lan.put(f"{KEYS.prefix}{place}/{name}", values[(number + turn) % len(values)])

    spoil(0)
    a = lan.host("a", A_BRIDGE)
    pool = a.create(gateway="router")
    for turn in range(len(values)):
        spoil(turn)
        address = a.run(pool)
        assert a.release(pool, address).status == 200
    assert a.release_pool(pool).status == 200


# ------------------------------------------------------------------------------------- P4: cut at each step


def script(lan: Lan) -> tuple[Host, Host, dict[str, Any]]:
    """Two hosts at work, and the calls that are cut: name -> the call."""
    a, b = lan.host("a", A_BRIDGE), lan.host("b", B_BRIDGE)
    pool, range_ = "192.168.1.0/24", "192.168.1.16/28"
    shared = a.create(pool, range_, gateway="router")
    b.create(pool, range_, gateway="router")
    a.gateway(shared, "192.168.1.254"), b.gateway(shared, "192.168.1.254")
    a.auxiliary(shared, "192.168.1.252")
    held, _ = a.run(shared), b.run(shared)
    bare, plain = a.create("192.168.9.0/24"), a.create()
    calls = {
        "RequestPool": lambda: a.request_pool("192.168.1.0/24", "192.168.1.128/25"),
        "gateway=host": lambda: a.gateway(plain),
        "gateway of a new bridge": lambda: a.gateway(bare),
        "gateway=router, joined": lambda: a.gateway(shared, "192.168.1.254"),
        "auxiliary, new": lambda: a.auxiliary(shared, "192.168.1.253"),
        "endpoint": lambda: a.endpoint(shared),
        "--ip": lambda: a.endpoint(shared, "192.168.1.99"),
        "replayed endpoint": lambda: a.auxiliary(shared, held),
        "ReleaseAddress": lambda: a.release(shared, held),
        "ReleaseAddress of a router": lambda: a.release(shared, "192.168.1.254"),
        "ReleasePool": lambda: a.release_pool(shared),
    }
    a.catch_up()
    return a, b, calls


CALLS = [
    "RequestPool", "gateway=host", "gateway of a new bridge", "gateway=router, joined", "auxiliary, new", "endpoint",
    "--ip", "replayed endpoint", "ReleaseAddress", "ReleaseAddress of a router", "ReleasePool",
]  # fmt: skip


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.APPLIED, Fault.LOST, Fault.STUCK], ids=lambda f: f.name)
@pytest.mark.parametrize("name", CALLS)
def test_cut_after_every_step(name: str, fault: Fault) -> None:
    """P4: cut at any commit, a release is journalled and any other call refused; nobody else's lease is touched; what a
    refused grant left, at once or later, is deleted; afterwards no address has two holders."""
    with Lan() as lan:
        _, _, calls = script(lan)
        before = lan.etcd.transactions
        calls[name]()
        commits = lan.etcd.transactions - before
    assert commits, "the call writes"
    for step in range(commits):
        with Lan() as lan:
            a, b, calls = script(lan)
            a.free_orphans()
            others = {address: lease for address, lease in lan.leases().items() if lease.host == "b"}
            held = lan.leases()
            lan.etcd.faults.extend([Fault.PASS] * step + [fault])
            reply = calls[name]()
            shared = name == "ReleaseAddress of a router" and fault is not Fault.UNAVAILABLE
            journalled = name.startswith("Release") and not shared
            if journalled:
                # Docker never repeats it, so the daemon does.
                assert reply.status == 200
                a.carry_out()
            else:
                assert reply.status == 503
                assert "etcd" in reply.error
            if fault is Fault.STUCK:
                came_through = lan.etcd.release_stuck()
                assert came_through == 1 or journalled, "unless the journal was faster"

            def settled(lan: Lan = lan, held: Any = held) -> bool:
                new = {address: lease for address, lease in lan.leases().items() if address not in held}
                return all(lease.kind == HOST and address in OWN for address, lease in new.items())

            until(settled, "the end of what the refused call left behind")
            until(lambda a=a: not a.outage.waiting, "the end of the journal")
            if name == "ReleaseAddress":
                until(lambda lan=lan: not {"a"} & {e.host for e in lan.leases().values() if e.kind == ENDPOINT})
            a.catch_up()
            now = lan.leases()
            for address, lease in others.items():
                assert now[address] == lease
            router = now["192.168.1.254"]
            assert "b" in {each.host for each in router.holders}, "b still holds the router"
            pool = b.create("192.168.1.0/24", "192.168.1.16/28", gateway="router")
            filled: list[str] = []
            while (reply := b.endpoint(pool)).status == 200:
                filled.append(reply.body["Address"].partition("/")[0])
            taken = [address for address in now if parse_address(address) in RANGE]
            assert len(set(filled)) == len(filled) == 16 - len(taken)
            assert not set(filled) & set(taken)


OWN = {"192.168.1.11", "192.168.1.12"}
RANGE = {parse_address(f"192.168.1.{n}") for n in range(16, 32)}


def test_an_orphan_that_others_joined_keeps_them(lan: Lan, a: Host, b: Host) -> None:
    """P3: a refused grant of a shared address that appears late loses this host only: who joined it keeps it."""
    pool = a.create(gateway="router")
    b.create(gateway="router")
    lan.etcd.faults.append(Fault.STUCK)
    assert a.gateway(pool, "192.168.1.254").status == 503
    assert lan.etcd.release_stuck() == 1
    assert b.gateway(pool, "192.168.1.254").status == 200
    a.free_orphans()

    def holders() -> set[str]:
        lease = lan.lease("192.168.1.254")
        assert lease is not None
        return {each.host for each in lease.holders}

    until(lambda: holders() == {"b"}, "the end of a's part")
    a.catch_up()
    assert a.gateway(pool, "192.168.1.254").status == 200
    assert b.release(pool, "192.168.1.254").status == 200
    assert holders() == {"a"}, "what a holds now is not taken for the orphan"


def test_the_lease_of_a_carried_address_is_no_orphan(lan: Lan) -> None:
    """P2: a release of a carried address whose outcome is unknown leaves the host's own lease, not a free address."""
    x = lan.host("x")
    pool = x.create()
    address = x.run(pool)
    x.carried.append(bridge(f"{address}/24", "br7"))
    lan.etcd.faults.append(Fault.APPLIED)
    assert x.release(pool, address).status == 200
    x.settle()
    x.free_orphans()
    probe = x.run(pool)  # another orphan after it proves that the queue was worked off
    lan.etcd.faults.append(Fault.APPLIED)
    assert x.endpoint(pool).status == 503
    until(lambda: lan.of_kind(ENDPOINT) == [probe], "the end of the second orphan")
    lease = lan.lease(address)
    assert lease is not None
    assert (lease.kind, lease.host) == (HOST, "x")


def test_an_orphan_is_taken_back_however_late(lan: Lan, a: Host, b: Host) -> None:
    """P4: a grant that appears long after its refusal, on a host that has served others meanwhile, is deleted."""
    pool = a.create(ip_range="192.168.1.64/30")
    b.create(ip_range="192.168.1.64/30")
    a.free_orphans()
    lan.etcd.faults.append(Fault.STUCK)
    assert a.endpoint(pool).status == 503
    given = [a.run(pool), a.run(pool)]
    lan.etcd.release_stuck()
    until(lambda: lan.of_kind(ENDPOINT) == sorted(given), "the orphan's end")
    given += [b.run(pool), b.run(pool)]
    assert len(set(given)) == 4


def test_a_refused_grant_never_doubles_a_later_one(lan: Lan, a: Host, b: Host) -> None:
    """P4: a grant that hangs in etcd while somebody else gets its address fails on its own expectation."""
    pool = a.create(ip_range="192.168.1.64/31")
    b.create(ip_range="192.168.1.64/31")
    lan.etcd.faults.append(Fault.STUCK)
    assert a.endpoint(pool).status == 503
    given = {b.run(pool), b.run(pool)}
    assert given == {"192.168.1.64", "192.168.1.65"}
    assert lan.etcd.release_stuck() == 0
    assert {lease.host for lease in lan.leases().values() if lease.kind == ENDPOINT} == {"b"}


def test_with_etcd_down_everything_is_refused_but_releases(lan: Lan, a: Host) -> None:
    """Without etcd and standby each request is refused in one line; what was released is free when etcd is back."""
    pool = a.create()
    address = a.run(pool)
    lan.etcd.set_down(True)
    for reply in (a.request_pool("10.0.0.0/24"), a.endpoint(pool), a.endpoint(pool, "192.168.1.99")):
        assert reply.status == 503
        assert "etcd" in reply.error
    assert a.release(pool, address).status == 200
    lan.etcd.set_down(False)
    assert lan.lease(address) is not None
    a.settle()
    assert lan.lease(address) is None
    assert a.run(pool) != address


# ---------------------------------------------------------------------------------- against a naive model

ADDRESSES = [f"192.168.1.{n}" for n in range(64, 72)]
HOSTS = ("a", "b", "c")


class Machine(RuleBasedStateMachine):
    """Three hosts, an operator, and a dictionary of who should hold what."""

    def __init__(self) -> None:
        super().__init__()
        self.lan = Lan()
        self.holds: dict[str, str] = {}
        self.excluded: set[str] = set()

    @initialize()
    def start(self) -> None:
        self.hosts = {name: self.lan.host(name) for name in HOSTS}
        for each in self.hosts.values():
            self.pool = each.create(ip_range="192.168.1.64/29")

    def teardown(self) -> None:
        self.lan.__exit__(None, None, None)

    def ask(self, name: str, address: str = "", sync: bool = True) -> Any:
        if sync:
            self.hosts[name].catch_up()
        return self.hosts[name].post("/IpamDriver.RequestAddress", asks(self.pool, address))

    @rule(name=st.sampled_from(HOSTS), sync=st.booleans())
    def request(self, name: str, sync: bool) -> None:
        reply = self.ask(name, sync=sync)
        free = set(ADDRESSES) - set(self.holds) - self.excluded
        if reply.status == 200:
            address = reply.body["Address"].removesuffix("/24")
            assert address in free
            self.holds[address] = name
        else:
            assert "full" in reply.error
            assert not free

    @rule(name=st.sampled_from(HOSTS), address=st.sampled_from(ADDRESSES))
    def request_that_one(self, name: str, address: str) -> None:
        reply = self.ask(name, address)
        if address in self.holds or address in self.excluded:
            assert address in reply.error
        else:
            assert reply.ok["Address"] == f"{address}/24"
            self.holds[address] = name

    @rule(name=st.sampled_from(HOSTS), address=st.sampled_from(ADDRESSES), sync=st.booleans())
    def release(self, name: str, address: str, sync: bool) -> None:
        if sync:
            self.hosts[name].catch_up()
        body = json.dumps({"PoolID": self.pool, "Address": address}).encode()
        assert self.hosts[name].post("/IpamDriver.ReleaseAddress", body).status == 200
        if self.holds.get(address) == name:
            del self.holds[address]

    @rule(address=st.sampled_from(ADDRESSES), value=st.sampled_from([b"junk", b'{"kind":"reserved"}', b""]))
    def reserve(self, address: str, value: bytes) -> None:
        key = KEYS.lease("default", parse_address(address))
        commit = self.lan.etcd.commit({key: 0}, [Put(key, value)], deadline=float("inf"))
        assert commit.applied == (address not in self.holds)
        self.holds.setdefault(address, "operator")

    @rule(address=st.sampled_from(ADDRESSES))
    def unreserve(self, address: str) -> None:
        if self.holds.get(address) == "operator":
            self.lan.delete(KEYS.lease("default", parse_address(address)))
            del self.holds[address]

    @rule(addresses=st.sets(st.sampled_from(ADDRESSES)))
    def exclude(self, addresses: set[str]) -> None:
        self.lan.put(KEYS.segment("default"), json.dumps({"exclude": sorted(addresses)}))
        self.excluded = addresses

    @rule(name=st.sampled_from(HOSTS))
    def restart(self, name: str) -> None:
        self.hosts[name].stop()
        self.lan.hosts.remove(self.hosts[name])
        self.hosts[name] = self.lan.host(name)

    @invariant()
    def etcd_says_the_same(self) -> None:
        prefix = f"{KEYS.leases}default/"
        there = {each.removeprefix(prefix) for each in self.lan.under(prefix)}
        assert there == set(self.holds)


def test_many_orders_of_events() -> None:
    """P1, P2, P3: whatever hosts and operators do in whatever order, what is held is what a dictionary says."""
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_reservations_and_conflicts_are_not_a_hosts_to_free(lan: Lan, a: Host) -> None:
    """P3: ReleaseAddress frees no reservation and no conflict, even one that names this host."""
    pool = a.create()
    for kind in (RESERVED, CONFLICT):
        lan.put(f"{KEYS.leases}default/192.168.1.40", json.dumps({"kind": kind, "host": "a", "pool": pool}))
        assert a.release(pool, "192.168.1.40").status == 200
        assert lan.of_kind(kind) == ["192.168.1.40"]


def test_a_stuck_try_of_a_grant_that_ended_is_taken_back(lan: Lan, a: Host) -> None:
    """P4, P5: the first try of a grant hangs in etcd, the second is applied, the container goes, and then the first
    comes through: the key is free, so it is written. It is nobody's lease and is deleted."""
    pool = a.create()
    a.free_orphans()
    address = a.run(pool)
    key = KEYS.lease("default", parse_address(address))
    granted = lan.etcd.get(key, deadline=time.monotonic() + 1)
    assert granted is not None
    assert a.release(pool, address).status == 200
    lan.etcd.commit({key: 0}, [Put(key, granted.value)], deadline=time.monotonic() + 1)
    until(lambda: lan.lease(address) is None, "the late lease's end")


def test_a_grant_that_was_applied_and_then_changed_is_ours(lan: Lan, a: Host) -> None:
    """P4: the answer to the first try is lost, somebody fills in the container's name, the second try finds the key
    there with another value and our token: it is ours, and no second address is taken."""
    pool = a.create()
    commit = lan.etcd.commit

    def answer_lost(expect: Any, writes: Any, **more: Any) -> Commit:
        done = commit(expect, writes, **more)
        (key, value, *_), *_ = writes
        if done.applied and "/leases/" in key:
            lan.etcd.commit = commit  # type: ignore[method-assign]  # once
            filled = msgspec.structs.replace(decode(value, Lease), note="filled in")
            commit({key: done.revision}, [Put(key, encode(filled))], **more)
            return commit(expect, writes, **more)
        return done

    lan.etcd.commit = answer_lost  # type: ignore[method-assign]
    address = a.run(pool)
    assert lan.of_kind(ENDPOINT) == [address]
    lease = lan.lease(address)
    assert lease is not None
    assert lease.note == "filled in"


def test_an_address_whose_release_did_not_reach_etcd_is_given_again(lan: Lan, a: Host, b: Host) -> None:
    """P3, P5: `stop` and `start --ip` with etcd away at the stop: the container has its address again, and the late
    release does not free the new lease."""
    pool = a.create()
    assert a.run(pool, "192.168.1.77") == "192.168.1.77"
    lan.etcd.faults.append(Fault.UNAVAILABLE)
    assert a.release(pool, "192.168.1.77").status == 200
    assert a.run(pool, "192.168.1.77") == "192.168.1.77"
    a.settle()
    assert a.outage.waiting == 0
    assert lan.of_kind(ENDPOINT) == ["192.168.1.77"]
    assert a.release(pool, "192.168.1.77").status == 200
    assert lan.of_kind(ENDPOINT) == []


@pytest.mark.parametrize("address", ["192.168.1.0", "192.168.1.255"])
def test_no_machine_has_the_network_or_broadcast_address(lan: Lan, a: Host, address: str) -> None:
    """P2: neither as an auxiliary address nor as a router."""
    pool = a.create(gateway="router")
    before = lan.leases()
    assert "network or broadcast" in a.auxiliary(pool, address).error
    assert "network or broadcast" in a.gateway(pool, address).error
    assert lan.leases() == before


def test_an_auxiliary_address_that_this_host_holds_is_explained(lan: Lan, a: Host) -> None:
    """Section 5: while the engine lacks our capabilities, what a lease of this host explains is still granted."""
    pool = a.create()
    assert a.auxiliary(pool, "192.168.1.254").status == 200
    assert a.call("RequestAddress", PoolID=pool, Address="", Options=None).status == 200
    assert a.auxiliary(pool, "192.168.1.254").status == 200
    assert "restart dockerd" in a.auxiliary(pool, "192.168.1.253").error


def test_junk_under_a_pools_key_is_not_overwritten(lan: Lan, a: Host) -> None:
    """Section 4: what cannot be read is somebody's; the sentence names the key."""
    key = KEYS.pool(Pool.make("192.168.1.0/24", "", {}, "default"), "a")
    lan.etcd.commit({}, [Put(key, b"mine!")], deadline=time.monotonic() + 1)
    assert key in a.request_pool("192.168.1.0/24").error
    kept = lan.etcd.get(key, deadline=time.monotonic() + 1)
    assert kept is not None
    assert kept.value == b"mine!"


def test_no_router_cure_for_a_hosts_own_address(lan: Lan) -> None:
    """P7: nobody typed a gateway, br0's address is another host's container: both machines are named, and nobody is
    told to make a router of it."""
    b = lan.host("b", bridge("192.168.1.12/24"))
    pool = b.create()
    b.run(pool, "192.168.1.11")
    a = lan.host("a", bridge("192.168.1.11/24"))
    said = a.gateway(a.create()).error
    assert "Two machines use one address" in said
    assert "DefaultGateway" not in said
