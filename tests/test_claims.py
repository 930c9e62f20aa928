"""Addresses are claimed in etcd, looked for on the wire and given, in this order, whatever answers or fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from fakes import Fault, Writes
from harness import KEYS, PATIENCE, FakeLan, Habits, Host, Lan, Reply, bridge, nic, until
from ipam_plugin import standby
from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.etcd import Delete, Put
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    STANDBY,
    HostAddress,
    Lease,
    Pool,
    encode,
    parse_time,
    read_lease,
)
from ipam_plugin.model import Host as HostRecord
from ipam_plugin.view import Full

A_BRIDGE = bridge("192.168.1.11/24", mac="02:aa:00:00:00:0a")
B_BRIDGE = bridge("192.168.1.12/24", mac="02:bb:00:00:00:0b")
PRINTER = "00:11:22:33:44:55"
RANGE = "192.168.1.64/29"
INSIDE = [f"192.168.1.{n}" for n in range(64, 72)]
PROBING = Habits(standby=2)
REFUSING = Habits(standby=2, refuse=True)


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "PERIOD", 0.05)


@pytest.fixture
def wire() -> FakeLan:
    return FakeLan()


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made:
        yield made


@pytest.fixture
def a(lan: Lan, wire: FakeLan) -> Host:
    return lan.host("a", A_BRIDGE, habits=PROBING, wire=wire)


@pytest.fixture
def b(lan: Lan, wire: FakeLan) -> Host:
    return lan.host("b", B_BRIDGE, habits=PROBING, wire=wire)


@pytest.fixture
def strict(lan: Lan, wire: FakeLan) -> Host:
    """A host that refuses what it cannot prove."""
    return lan.host("a", A_BRIDGE, habits=REFUSING, wire=wire)


def stock(host: Host, pool: str, count: int = 1) -> list[str]:
    """Put so many addresses in stock, as the keeper does, which does not run in most of these tests."""
    host.catch_up()
    found = [host.claims.find(Pool.parse(pool), time.monotonic() + 30, purpose="standby") for _ in range(count)]
    for each in found:
        assert host.stock.put(each)
    return [str(each.address) for each in found]


def register(lan: Lan, name: str, mac: str, address: str = "192.168.1.99", alive: bool = True) -> None:
    """A Docker host that has this daemon."""
    record = HostRecord(name, addresses=(HostAddress(address, 24, "br0", mac),))
    lan.put(KEYS.host(name), encode(record))
    if alive:
        lan.put(KEYS.heartbeat(name), "{}")


def the_lease(lan: Lan, address: str) -> Lease:
    found = lan.lease(address)
    assert found is not None
    return found


def once(wanted: Callable[[Writes], bool], fault: Fault) -> Callable[[Mapping[str, int], Writes], Fault]:
    """The first commit of this kind meets a fault."""
    met: list[Writes] = []

    def on_commit(expect: Mapping[str, int], writes: Writes) -> Fault:
        if not met and wanted(writes):
            met.append(writes)
            return fault
        return Fault.PASS

    return on_commit


def puts(kind: str) -> Callable[[Writes], bool]:
    def wanted(writes: Writes) -> bool:
        return any(
            isinstance(each, Put) and each.key.startswith(KEYS.leases) and read_lease(each.value).kind == kind
            for each in writes
        )

    return wanted


def gives_back(writes: Writes) -> bool:
    return any(isinstance(each, Delete) and each.key.startswith(KEYS.leases) for each in writes)


# ------------------------------------------------------------------------- claim, look, convert


@pytest.mark.parametrize("asked", ["", "192.168.1.66"])
def test_the_wire_is_asked_for_what_is_claimed(lan: Lan, a: Host, wire: FakeLan, asked: str) -> None:
    """Section 7: only when the address is this host's in etcd, silence proves anything: claim, look, give."""
    pool = a.create(ip_range=RANGE)
    seen: list[Lease | None] = []
    wire.before_answer = lambda address: seen.append(lan.lease(str(address)))
    given = a.run(pool, asked)
    assert [(each.kind, each.host, each.pool) for each in seen if each] == [(STANDBY, "a", pool)]
    assert len(seen) == 1
    assert the_lease(lan, given).kind == ENDPOINT


def test_the_stock_is_claimed_before_it_is_looked_at(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: the same for what the keeper claims ahead of need."""
    seen: dict[str, str] = {}
    wire.before_answer = lambda address: seen.update({str(address): getattr(lan.lease(str(address)), "kind", "none")})
    pool = a.create(ip_range=RANGE)
    assert {address: seen[address] for address in stock(a, pool, 2)} == dict.fromkeys(lan.of_kind(STANDBY), STANDBY)


def test_standby_is_converted_in_one_transaction(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: with an address in stock a request costs one transaction, which compares the claim, and no look."""
    pool = a.create(ip_range=RANGE)
    ready = stock(a, pool, 2)
    before, probed = lan.etcd.transactions, len(wire.probed)
    expected: list[Mapping[str, int]] = []

    def on_commit(expect: Mapping[str, int], writes: Writes) -> Fault:
        expected.append(expect)
        return Fault.PASS

    revisions = {key: kv.revision for key, kv in lan.etcd.snapshot().keys.items()}
    lan.etcd.on_commit = on_commit
    given = a.run(pool)
    key = f"{KEYS.leases}default/{given}"
    assert given in ready
    assert lan.etcd.transactions == before + 1
    assert expected == [{key: revisions[key], KEYS.segment("default"): 0, KEYS.restored: 0}]
    assert len(wire.probed) == probed
    assert [str(each.address) for each in a.stock.all()] == [each for each in ready if each != given]


@pytest.mark.parametrize(
    ("probe", "asked", "transactions", "probes"),
    [("full", "", 2, 1), ("full", "192.168.1.66", 2, 1), ("off", "", 1, 0), ("off", "192.168.1.66", 1, 0)],
)
def test_transactions_without_stock(
    lan: Lan, a: Host, wire: FakeLan, probe: str, asked: str, transactions: int, probes: int
) -> None:
    """Without standby: claim and conversion, a look between them. With probe: off as ever, one transaction, no look."""
    pool = a.create(ip_range=RANGE, probe=probe)
    before = lan.etcd.transactions
    a.run(pool, asked)
    assert lan.etcd.transactions == before + transactions
    assert len(wire.probed) == probes
    assert lan.of_kind(STANDBY) == []
    assert a.stock.all() == []


def test_a_stranger_becomes_a_conflict_and_the_request_goes_on(lan: Lan, a: Host, b: Host, wire: FakeLan) -> None:
    """Section 7: the container starts with the next address; etcd says which MAC was seen, by whom and when, and no
    host tries that address again.
    """
    pool = a.create(ip_range=RANGE)
    b.create(ip_range=RANGE)
    wire.machines = dict.fromkeys(INSIDE[:4], PRINTER)
    given = {a.run(pool) for _ in range(4)}
    assert given == set(INSIDE[4:])
    conflicts = {address: the_lease(lan, address) for address in lan.of_kind(CONFLICT)}
    assert conflicts, "a start after the fourth address meets a stranger on its way round"
    for lease in conflicts.values():
        assert (lease.mac, lease.by, lease.host, lease.holders) == (PRINTER, "a", "", ())
        assert abs((parse_time(lease.since) or 0) - time.time()) < 60
    wire.probed.clear()
    said = b.endpoint(pool).error
    assert f"{4} conflict" in said
    assert not {str(each) for each in wire.probed} & set(conflicts)
    assert lan.of_kind(STANDBY) == []


def test_the_first_of_all_is_a_strangers(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A machine without registration sits on the very address that comes next: one conflict, one look more."""
    pool = a.create(ip_range=RANGE)
    with a.view.candidate(Pool.parse(pool)) as before:
        assert not isinstance(before, Full)
    first = INSIDE[(INSIDE.index(str(before)) + 1) % 8]
    wire.machines = {first: PRINTER}
    given = a.run(pool)
    assert lan.of_kind(CONFLICT) == [first]
    assert [str(each) for each in wire.probed if str(each) in INSIDE] == [first, given]
    assert a.claims.conflicts == 1


# ------------------------------------------------------------------------- what is no conflict


def test_a_registered_host_is_no_stranger(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: an address that a registered host's MAC answers for is left for a while, and nothing is written."""
    register(lan, "b", "02:bb:00:00:00:0b")
    pool = a.create(ip_range=RANGE)
    wire.machines = dict.fromkeys(INSIDE[:4], "02:bb:00:00:00:0b")
    assert {a.run(pool) for _ in range(4)} == set(INSIDE[4:])
    assert lan.of_kind(CONFLICT) == lan.of_kind(STANDBY) == []


def test_a_container_that_has_just_ended_is_no_stranger(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: for two minutes after its lease has ended, a MAC that still answers makes no conflict."""
    pool = a.create(ip_range=RANGE)
    gone = a.run(pool)
    mac = the_lease(lan, gone).mac
    assert a.release(pool, gone).status == 200
    wire.machines = {gone: mac}
    assert {a.run(pool) for _ in range(7)} == set(INSIDE) - {gone}
    said = a.endpoint(pool).error
    assert mac in said
    assert "try again in two minutes" in said
    assert lan.of_kind(CONFLICT) == lan.of_kind(STANDBY) == []
    wire.machines = {}
    assert a.run(pool) == gone


def test_where_all_that_is_free_answers_no_request_runs_for_ever(lan: Lan, a: Host, wire: FakeLan) -> None:
    """P6, P7: what is free answers, and none of it is a stranger's: refused at once, with the MAC, nothing written."""
    register(lan, "b", "02:bb:00:00:00:0b")
    pool = a.create(ip_range="192.168.1.64/30")
    wire.machines = dict.fromkeys(INSIDE[:4], "02:bb:00:00:00:0b")
    said = a.endpoint(pool).error
    assert "02:bb:00:00:00:0b" in said
    assert "answers on the wire" in said
    assert lan.under(KEYS.leases).keys() == {f"{KEYS.leases}default/192.168.1.11"}
    assert len([each for each in wire.probed if str(each) in INSIDE]) <= 5


@pytest.mark.parametrize("trouble", ["dead", "failed"])
def test_a_wire_that_cannot_be_heard_makes_no_conflict(
    lan: Lan, a: Host, wire: FakeLan, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """probe_failure: warn. Silence on a dead wire, or a probe that failed: given, with a line in the log, counted."""
    setattr(wire, trouble, "br0 has no carrier")
    pool = a.create(ip_range=RANGE)
    with caplog.at_level(logging.WARNING):
        given = a.run(pool)
        named = a.run(pool, next(each for each in INSIDE if each != given))
    assert lan.of_kind(ENDPOINT) == sorted([given, named])
    assert lan.of_kind(CONFLICT) == lan.of_kind(STANDBY) == []
    for address in (given, named):
        assert (
            f"{address} of pool {pool} is given although the wire could not be heard: br0 has no carrier" in caplog.text
        )
    assert a.claims.unproven == 2


@pytest.mark.parametrize("trouble", ["dead", "failed"])
@pytest.mark.parametrize("asked", ["", "192.168.1.66"])
def test_a_wire_that_cannot_be_heard_is_refused_where_that_is_wanted(
    lan: Lan, strict: Host, wire: FakeLan, trouble: str, asked: str
) -> None:
    """probe_failure: refuse. The sentence says why, nothing is left in etcd, and with the wire back it works."""
    setattr(wire, trouble, "br0 has no carrier")
    pool = strict.create(ip_range=RANGE)
    said = strict.endpoint(pool, asked).error
    for part in ("the wire cannot be heard", "br0 has no carrier", "probe_failure: refuse", pool):
        assert part in said
    assert list(lan.leases()) == ["192.168.1.11"]
    assert strict.claims.unproven == 0
    setattr(wire, trouble, "")
    strict.neighbourhood._dead.clear()  # for 5 s it is not asked again
    assert strict.run(pool, asked)


def test_what_was_proven_is_given_on_a_dead_wire(lan: Lan, strict: Host, wire: FakeLan) -> None:
    """A fresh look at a claimed address counts for 100 s, whatever becomes of the wire; one that is older does not."""
    pool = strict.create(ip_range=RANGE)
    ready = stock(strict, pool, 2)
    wire.dead = "br0 has no carrier"
    assert strict.run(pool) in ready
    (left,) = strict.stock.all()
    strict.stock.replace(left, left._replace(looked=left.looked - 101))
    assert "the wire cannot be heard" in strict.endpoint(pool).error


def test_an_interface_that_is_not_there_goes_by_policy(lan: Lan, wire: FakeLan) -> None:
    """Nothing carries the subnet: nothing can be looked at. The refusal says what to do about it."""
    pool = lan.host("x", habits=PROBING, wire=wire).create(ip_range=RANGE)
    assert lan.hosts[0].run(pool) in INSIDE
    strict = lan.host("a", habits=REFUSING, wire=wire)
    strict.create(ip_range=RANGE)
    said = strict.endpoint(pool).error
    assert "no interface of this host has an address in 192.168.1.0/24" in said
    assert "--ipam-opt interface=NAME" in said
    assert wire.probed == []


@pytest.mark.parametrize("asked", ["", "192.168.1.66"])
def test_no_time_left_is_no_warning(lan: Lan, wire: FakeLan, asked: str) -> None:
    """probe_failure is about wires: a request that came too late to look is refused whatever it says, and leaves
    nothing behind.
    """
    hurried = lan.host("a", A_BRIDGE, habits=PROBING, wire=wire, time_limit=0.4)
    pool = lan.host("b", habits=PROBING, wire=wire).create(ip_range=RANGE)
    hurried.catch_up()
    said = hurried.endpoint(pool, asked).error
    assert "no time is left to look for it on br0" in said
    assert wire.probed == []
    assert lan.of_kind(ENDPOINT) == lan.of_kind(STANDBY) == []
    assert hurried.claims.unproven == 0


# ------------------------------------------------------------------------- proxy ARP

ROUTER_MAC = "00:aa:bb:cc:dd:ee"


@pytest.mark.parametrize("registered", [False, True])
def test_proxy_arp_is_told_and_the_pool_is_not_emptied(lan: Lan, a: Host, wire: FakeLan, registered: bool) -> None:
    """Section 7: one MAC that answers for three candidates: an alarm with the cure, no conflict, and, by
    policy, the address is given. Also where a registered Docker host does it.
    """
    if registered:
        register(lan, "b", ROUTER_MAC)
    wire.proxy = ROUTER_MAC
    pool = a.create(ip_range=RANGE)
    assert {a.run(pool) for _ in range(8)} == set(INSIDE)
    assert lan.of_kind(CONFLICT) == []
    kinds = [kind for kind, _ in a.alarms]
    assert kinds == ["proxy_arp"], "told once, not with every address"
    text = a.alarms[0][1]
    for part in (ROUTER_MAC, "br0", "Switch proxy ARP off", "ipam-plugin reserve", "probe: off", "segment default"):
        assert part in text
    assert a.claims.unproven == 8


def test_proxy_arp_is_refused_where_that_is_wanted(lan: Lan, strict: Host, wire: FakeLan) -> None:
    """Proxy ARP is treated like a dead wire: probe_failure: refuse refuses, naming the machine."""
    wire.proxy = ROUTER_MAC
    pool = strict.create(ip_range=RANGE)
    for _ in range(2):
        said = strict.endpoint(pool).error
        assert ROUTER_MAC in said
        assert "answers for every address (proxy ARP)" in said
    assert lan.of_kind(CONFLICT) == lan.of_kind(STANDBY) == []


def test_a_stranger_behind_proxy_arp_is_found(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A machine that answers for itself beside the proxy is a conflict all the same, with its own MAC."""
    wire.proxy = ROUTER_MAC
    pool = a.create(ip_range=RANGE)
    first = a.run(pool)
    others = [each for each in INSIDE if each != first]
    wire.machines = dict.fromkeys(others[:3], PRINTER)
    assert {a.run(pool) for _ in range(4)} == set(others[3:])
    assert {the_lease(lan, each).mac for each in lan.of_kind(CONFLICT)} == {PRINTER}


def test_a_proxy_that_has_stopped_is_forgotten(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A machine that did not answer for one address does not answer for all: on another one it is a stranger again."""
    wire.proxy = ROUTER_MAC
    pool = a.create(ip_range=RANGE)
    given = [a.run(pool)]
    wire.proxy = ""
    given.append(a.run(pool))
    assert a.claims.unproven == 1
    rest = [each for each in INSIDE if each not in given]
    wire.machines = dict.fromkeys(rest, ROUTER_MAC)
    assert "6 conflict" in a.endpoint(pool).error
    assert [kind for kind, _ in a.alarms] == ["proxy_arp"]


def test_a_machine_with_many_addresses_is_no_proxy(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A server may well have the three addresses that come next: the controls are drawn from the whole subnet."""
    wire.machines = dict.fromkeys(INSIDE, PRINTER)
    pool = a.create(ip_range=RANGE)
    assert "8 conflict" in a.endpoint(pool).error
    assert a.alarms == []


# ------------------------------------------------------------------------- --ip


def test_ip_of_a_strangers_address(lan: Lan, a: Host, b: Host, wire: FakeLan) -> None:
    """Section 5: refused naming the MAC, and a conflict from then on, for every host and also outside the range."""
    pool = a.create(ip_range=RANGE)
    b.create(ip_range=RANGE)
    for address in ("192.168.1.66", "192.168.1.200"):
        wire.machines[address] = PRINTER
        said = a.endpoint(pool, address).error
        assert f"{address} of pool {pool} is in use on the wire: MAC {PRINTER}" in said
        lease = the_lease(lan, address)
        assert (lease.kind, lease.mac, lease.by) == (CONFLICT, PRINTER, "a")
    assert "in use on the wire" in b.endpoint(pool, "192.168.1.66").error
    assert the_lease(lan, "192.168.1.66").by == "b", "an explicit address is probed at once, by whoever asks"


def test_ip_that_is_in_stock(lan: Lan, a: Host, wire: FakeLan) -> None:
    """What this host has looked at lately is given at once; the other one stays in stock."""
    pool = a.create(ip_range=RANGE)
    first, second = stock(a, pool, 2)
    before, probed = lan.etcd.transactions, len(wire.probed)
    assert a.run(pool, first) == first
    assert (lan.etcd.transactions, len(wire.probed)) == (before + 1, probed)
    assert [str(each.address) for each in a.stock.all()] == [second]


def test_ip_that_was_looked_at_long_ago(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A look that is older than 100 s proves nothing: it is looked at anew, and a stranger is found."""
    pool = a.create(ip_range=RANGE)
    (address,) = stock(a, pool)
    (slot,) = a.stock.all()
    a.stock.replace(slot, slot._replace(looked=slot.looked - 101))
    wire.machines[address] = PRINTER
    assert PRINTER in a.endpoint(pool, address).error
    assert the_lease(lan, address).kind == CONFLICT
    assert a.run(pool) != address, "what the stock remembers of it gives it to nobody"


def test_ip_in_stock_that_was_excluded_since(lan: Lan, a: Host) -> None:
    """P2: an operator's exclusion counts also for what was claimed before; the claim is given back."""
    pool = a.create(ip_range=RANGE)
    first, second = stock(a, pool, 2)
    lan.put(KEYS.segment("default"), f'{{"exclude":["{first}"]}}')
    assert "it is excluded in segment default" in a.endpoint(pool, first).error
    assert lan.lease(first) is None
    assert a.run(pool) == second


@pytest.mark.parametrize("asked", [True, False])
def test_settings_that_cannot_be_read_cost_no_standby(lan: Lan, a: Host, asked: bool) -> None:
    """P5: while nothing can be given, what is in stock stays in stock, and is given when the settings are mended."""
    pool = a.create(ip_range=RANGE)
    (address,) = stock(a, pool)
    lan.put(KEYS.segment("default"), "{")
    for _ in range(2):
        assert "cannot be read" in a.endpoint(pool, address if asked else "").error
    assert [str(each.address) for each in a.stock.all()] == [address]
    lan.delete(KEYS.segment("default"))
    assert a.run(pool) == address
    assert a.stock.close(pool) == [], "nothing is in anybody's hands"


def test_ip_of_an_old_conflict_is_looked_at_at_once(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: the machine is gone, so the address is given although its probation is not over."""
    pool = a.create(ip_range=RANGE)
    wire.machines["192.168.1.66"] = PRINTER
    assert a.endpoint(pool, "192.168.1.66").status != 200
    wire.machines = {}
    assert a.run(pool, "192.168.1.66") == "192.168.1.66"
    assert the_lease(lan, "192.168.1.66").kind == ENDPOINT


@pytest.mark.parametrize("reason", ["refuse", "ours", "interrupted"])
def test_a_conflict_comes_back_where_nothing_was_proven(lan: Lan, strict: Host, wire: FakeLan, reason: str) -> None:
    """Section 7: the memory of a conflict ends by a proof only: it is there again, the very same, after a look that
    proved nothing (a dead wire, a machine that is one of ours, no time).
    """
    pool = strict.create(ip_range=RANGE)
    old = Lease(kind=CONFLICT, mac=PRINTER, vendor="Acme", by="b", since="2025-01-01T00:00:00.000Z", token="old")
    lan.put(f"{KEYS.leases}default/192.168.1.66", encode(old))
    if reason == "refuse":
        wire.dead = "br0 has no carrier"
    elif reason == "ours":
        register(lan, "b", "02:bb:00:00:00:0b")
        wire.machines["192.168.1.66"] = "02:bb:00:00:00:0b"
    else:
        wire.before_answer = _failing
    reply = strict.endpoint(pool, "192.168.1.66")
    assert reply.status != 200
    assert the_lease(lan, "192.168.1.66") == old
    assert strict.stock.close(pool) == []


def _failing(address: object) -> None:
    raise ValueError("a bug, of all things")


def test_ip_of_this_hosts_own_orphan_is_refused_without_a_look(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 5: an endpoint of this host is taken over by no request; the sentence names the cure."""
    pool = a.create(ip_range=RANGE)
    address = a.run(pool)
    wire.probed.clear()
    assert f"ipam-plugin release {address} --force" in a.endpoint(pool, address).error
    assert wire.probed == []
    assert the_lease(lan, address).kind == ENDPOINT


def test_ip_of_another_hosts_standby_is_refused(lan: Lan, a: Host, b: Host, wire: FakeLan) -> None:
    """Only its owner gives standby back: the refusal names that host."""
    pool = b.create(ip_range=RANGE)
    a.create(ip_range=RANGE)
    (address,) = stock(b, pool)
    wire.probed.clear()
    assert "standby of host b" in a.endpoint(pool, address).error
    assert the_lease(lan, address).host == "b"
    assert wire.probed == []


# ------------------------------------------------------------------------- gateways


@pytest.mark.parametrize("registered", [False, True])
def test_a_gateway_that_answers_from_elsewhere_is_refused(lan: Lan, a: Host, wire: FakeLan, registered: bool) -> None:
    """Section 5: a router's address on this host's bridge takes the LAN down. The sentence names the MAC and what to
    type instead; nothing is written. The same for the card of a registered host that says nothing of that address.
    """
    pool = a.create()
    if registered:
        register(lan, "b", ROUTER_MAC)
    wire.machines["192.168.1.1"] = ROUTER_MAC
    a.catch_up()
    before = lan.keys()
    said = a.gateway(pool, "192.168.1.1").error
    for part in (ROUTER_MAC, "--aux-address DefaultGatewayIPv4=192.168.1.1", "--ipam-opt gateway=router"):
        assert part in said
    assert lan.keys() == before
    # The cure works.
    assert a.gateway(pool).ok["Address"] == "192.168.1.11/24"
    assert a.auxiliary(pool, "192.168.1.1").status == 200


def test_the_gateways_own_address_that_answers_elsewhere(lan: Lan, a: Host, wire: FakeLan) -> None:
    """This host's own address as gateway, and another machine has it too: refused, naming the MAC."""
    pool = a.create()
    assert a.gateway(pool, "192.168.1.11").status == 200
    wire.machines["192.168.1.11"] = PRINTER
    said = a.gateway(pool, "192.168.1.11").error
    assert "this host's own address" in said
    assert PRINTER in said


def test_a_gateway_where_no_interface_is_is_not_asked_for(lan: Lan, wire: FakeLan) -> None:
    """Docker makes the bridge: there is no wire yet, and a machine of another LAN with that address means nothing."""
    host = lan.host("a", nic("10.0.0.1/24"), habits=REFUSING, wire=wire)
    wire.machines["192.168.1.1"] = PRINTER
    pool = host.create()
    assert host.gateway(pool, "192.168.1.1").ok["Address"] == "192.168.1.1/24"
    assert host.gateway(pool).status == 200
    assert wire.probed == []
    assert lan.of_kind(CONFLICT) == []


@pytest.mark.parametrize("trouble", ["dead", "failed", "proxy"])
def test_a_gateway_about_which_the_wire_says_nothing(lan: Lan, a: Host, wire: FakeLan, trouble: str) -> None:
    """A look that proves nothing names no machine: only what the register says counts."""
    setattr(wire, trouble, ROUTER_MAC)
    pool = a.create()
    said = a.gateway(pool, "192.168.1.99").error
    assert "Leave --gateway out" in said
    assert a.gateway(pool, "192.168.1.11").status == 200
    assert "192.168.1.99" not in lan.leases()


def test_a_router_is_never_probed_as_an_auxiliary_address(lan: Lan, a: Host, wire: FakeLan) -> None:
    """The router is what the operator says it is, so it is not asked for; nor with gateway=router."""
    wire.machines["192.168.1.1"] = ROUTER_MAC
    assert a.auxiliary(a.create(), "192.168.1.1").status == 200
    pool = a.create(gateway="router")
    assert a.gateway(pool, "192.168.1.1").status == 200
    assert wire.probed == []


# ------------------------------------------------------------------------- shortage


def alive(lan: Lan, *hosts: Host) -> None:
    for each in hosts:
        lan.put(KEYS.heartbeat(each.name), "{}")


def asking(host: Host, pool: str, address: str = "") -> tuple[threading.Thread, list[Reply]]:
    """A request in a thread of its own."""
    answers: list[Reply] = []
    thread = threading.Thread(target=lambda: answers.append(host.endpoint(pool, address)), name="request")
    thread.start()
    return thread, answers


def test_a_pool_of_exactly_the_size(lan: Lan, wire: FakeLan) -> None:
    """Section 7: among reachable hosts no request is refused because an address is somebody's standby; of the `wanted`
    keys by which it was asked for, nothing is left.
    """
    hosts = [lan.host(name, bridge(f"192.168.1.{n}/24"), habits=PROBING, wire=wire) for n, name in enumerate("abcd", 2)]
    alive(lan, *hosts)
    written: list[int] = []

    def on_commit(expect: Mapping[str, int], writes: Writes) -> Fault:
        for each in writes:
            if isinstance(each, Put) and each.key.startswith(KEYS.wanted):
                written.append(each.lease)
        return Fault.PASS

    lan.etcd.on_commit = on_commit
    pools = {host.name: host.create(ip_range=RANGE) for host in hosts}
    for host in hosts:
        host.keep()
    until(lambda: len(lan.of_kind(STANDBY)) >= 7, "most of the pool is somebody's standby")
    given = [hosts[turn % 2].run(pools["a"]) for turn in range(8)]
    assert sorted(given) == INSIDE
    assert written, "standby was asked for"
    assert all(written), "every such key is bound to a TTL"
    assert "8 endpoint" in hosts[2].endpoint(pools["c"]).error
    assert lan.under(KEYS.wanted) == {}
    assert lan.of_kind(STANDBY) == []


def test_requests_at_once_in_a_pool_of_exactly_the_size(lan: Lan, wire: FakeLan) -> None:
    """The same when all hosts ask at the same moment, with most of the pool in standby."""
    hosts = [lan.host(name, habits=PROBING, wire=wire) for name in "abcd"]
    alive(lan, *hosts)
    (pool,) = {host.create(ip_range=RANGE) for host in hosts}
    for host in hosts:
        host.keep()
    until(lambda: len(lan.of_kind(STANDBY)) >= 7)
    running = [asking(hosts[turn % 4], pool) for turn in range(8)]
    for thread, _ in running:
        thread.join(30)
        assert not thread.is_alive()
    given = sorted(answers[0].ok["Address"].removesuffix("/24") for _, answers in running)
    assert given == INSIDE
    until(lambda: lan.under(KEYS.wanted) == {})


def test_the_wanted_key_ends_by_itself(lan: Lan, a: Host, b: Host) -> None:
    """A host that dies while it waits leaves a key that etcd ends; in time it is deleted by who wrote it."""
    pool = b.create(ip_range="192.168.1.64/31")
    assert sorted(stock(b, pool, 2)) == INSIDE[:2]
    alive(lan, b)
    a.create(ip_range="192.168.1.64/31")
    thread, answers = asking(a, pool)
    key = f"{KEYS.wanted}{pool}/a"
    until(lambda: key in lan.under(KEYS.wanted))
    lan.etcd.advance(16)
    until(lambda: key not in lan.under(KEYS.wanted), "the end of the key by its TTL")
    (slot, _) = b.stock.all()
    taken = b.stock.take_this(slot)
    assert taken is not None
    b.claims.give_back(taken, time.monotonic() + 5)
    thread.join(10)
    assert answers[0].ok["Address"] == f"{slot.address}/24"
    assert lan.under(KEYS.wanted) == {}


def test_standby_of_a_host_that_cannot_be_reached_stays_taken(lan: Lan, a: Host, b: Host) -> None:
    """Section 7: only its owner gives it back. The refusal names that host, at once: nobody would hear the question."""
    pool = b.create(ip_range="192.168.1.64/31")
    stock(b, pool, 2)
    a.create(ip_range="192.168.1.64/31")
    began = time.monotonic()
    said = a.endpoint(pool).error
    assert "standby of b, which cannot be reached, stays taken" in said
    assert "2 standby" in said
    assert time.monotonic() - began < 5
    assert len(lan.of_kind(STANDBY)) == 2


def test_standby_that_does_not_come_back_in_time(lan: Lan, b: Host, wire: FakeLan) -> None:
    """P6: a host that lives and does not answer is waited for until the deadline, and named."""
    a = lan.host("a", A_BRIDGE, habits=PROBING, wire=wire, time_limit=1.5)
    pool = b.create(ip_range="192.168.1.64/31")
    stock(b, pool, 2)
    alive(lan, b)
    a.create(ip_range="192.168.1.64/31")
    began = time.monotonic()
    said = a.endpoint(pool).error
    assert "standby of b was asked for and did not come back in time" in said
    assert 1.0 < time.monotonic() - began < 4
    assert lan.under(KEYS.wanted) == {}


def test_a_host_that_leaves_is_not_waited_for(lan: Lan, a: Host, b: Host) -> None:
    """Once the heartbeat has ended, nothing will come: refused then, not at the deadline."""
    pool = b.create(ip_range="192.168.1.64/31")
    stock(b, pool, 2)
    alive(lan, b)
    a.create(ip_range="192.168.1.64/31")
    began = time.monotonic()
    thread, answers = asking(a, pool)
    until(lambda: lan.under(KEYS.wanted))
    lan.delete(KEYS.heartbeat("b"))
    thread.join(10)
    assert "cannot be reached" in answers[0].error
    assert time.monotonic() - began < 5


def test_own_standby_of_another_network_is_used(lan: Lan, a: Host, wire: FakeLan) -> None:
    """What this host keeps for one of its networks serves another one in whose range nothing else is left; it is
    looked at again, since that may have been long ago.
    """
    narrow = a.create(ip_range="192.168.1.64/31")
    ready = stock(a, narrow, 2)
    for each in a.stock.all():
        a.stock.replace(each, each._replace(looked=each.looked - 500))
    wide = a.create(ip_range="192.168.1.64/30")
    assert sorted(a.run(wide) for _ in range(2)) == INSIDE[2:4]
    wire.probed.clear()
    wire.machines[ready[0]] = PRINTER
    assert a.run(wide) == ready[1]
    assert {str(each) for each in wire.probed} >= {ready[1]}
    assert "4 addresses" in a.endpoint(wide).error
    assert lan.of_kind(CONFLICT) == [ready[0]]
    assert lan.under(KEYS.wanted) == {}


def test_standby_that_a_network_excludes_is_of_no_use_to_it(lan: Lan, a: Host, b: Host) -> None:
    """P6: nobody waits for an address that the network's own options exclude, and nobody gives it back for that."""
    outer = a.create(ip_range=RANGE)
    b.create(ip_range=RANGE)
    alive(lan, b)
    ready = stock(a, outer) + stock(b, outer)
    keep = next(each for each in INSIDE if each not in ready)
    small = a.create(ip_range=RANGE, exclude=",".join(each for each in INSIDE if each != keep))
    assert a.run(small) == keep
    began = time.monotonic()
    said = a.endpoint(small).error
    assert "full" in said
    assert "standby of" not in said
    assert time.monotonic() - began < 3
    assert sorted(lan.of_kind(STANDBY)) == sorted(ready)


def test_two_hosts_ask_for_overlapping_ranges(lan: Lan, wire: FakeLan) -> None:
    """`wanted` counts for every pool whose range meets it, whatever the PoolID says."""
    a = lan.host("a", habits=PROBING, wire=wire)
    b = lan.host("b", habits=PROBING, wire=wire)
    alive(lan, a, b)
    wide = b.create(ip_range="192.168.1.64/30")
    b.keep()
    until(lambda: len(b.stock.all()) == 2)
    narrow = a.create(ip_range="192.168.1.64/30", exclude="192.168.1.200")
    assert narrow != wide
    assert sorted(a.run(narrow) for _ in range(4)) == INSIDE[:4]


# ------------------------------------------------------------------------- outcomes that are not known


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.APPLIED, Fault.STUCK, Fault.UNAVAILABLE])
@pytest.mark.parametrize("asked", ["", "192.168.1.66"])
@pytest.mark.parametrize("in_stock", [True, False])
def test_a_conversion_whose_outcome_is_not_known(
    lan: Lan, a: Host, wire: FakeLan, fault: Fault, asked: str, in_stock: bool
) -> None:
    """P4: it goes on with the journal, and whatever becomes of the try that was sent, the lease is that of the answer:
    given to nobody else meanwhile, and not taken for an orphan.
    """
    pool = a.create(ip_range=RANGE)
    if in_stock:
        stock(a, pool, 2)
    lan.etcd.on_commit = once(puts(ENDPOINT), fault)
    first = a.run(pool, asked)
    work = a.outage.of("default", parse_address(first))
    assert work is not None
    a.keep()
    a.free_orphans()
    a.carry_out()
    given = {first, *(a.run(pool) for _ in range(3))}
    until(lambda: not a.outage.waiting)
    until(lambda: len(a.stock.all()) == 2 and lan.of_kind(STANDBY) == sorted(str(e.address) for e in a.stock.all()))
    assert lan.etcd.release_stuck() == 0, "the claim was written anew"
    assert the_lease(lan, first) == work.lease
    assert set(lan.of_kind(ENDPOINT)) == given
    given |= {a.run(pool) for _ in range(4)}
    assert given == set(INSIDE)


def test_a_stuck_conversion_that_comes_through(lan: Lan, a: Host) -> None:
    """P4, P5: where it comes through before the journal is carried out, it is the very lease that was answered."""
    pool = a.create(ip_range=RANGE)
    (address,) = stock(a, pool)
    lan.etcd.on_commit = once(puts(ENDPOINT), Fault.STUCK)
    assert a.run(pool) == address
    work = a.outage.of("default", parse_address(address))
    assert lan.etcd.release_stuck() == 1
    a.settle()
    assert not a.outage.waiting
    assert work is not None
    assert the_lease(lan, address) == work.lease


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.APPLIED, Fault.STUCK])
def test_ip_of_an_address_whose_conversion_is_not_settled(lan: Lan, a: Host, fault: Fault) -> None:
    """P1, P4: it is the first container's, before the journal is carried out and after."""
    pool = a.create(ip_range=RANGE)
    (address,) = stock(a, pool)
    lan.etcd.on_commit = once(puts(ENDPOINT), fault)
    assert a.run(pool) == address
    assert f"{address} of pool {pool} is taken" in a.endpoint(pool, address).error
    a.settle()
    lan.etcd.release_stuck()
    assert f"{address} of pool {pool} is taken" in a.endpoint(pool, address).error


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.APPLIED, Fault.STUCK])
def test_a_conversion_that_can_be_kept_nowhere(lan: Lan, a: Host, fault: Fault) -> None:
    """P4: with the disk full as well the request is refused, and what may appear in etcd is an orphan that goes."""
    pool = a.create(ip_range=RANGE)
    (address,) = stock(a, pool)
    a.fill_disk()
    lan.etcd.on_commit = once(puts(ENDPOINT), fault)
    assert "may be written" in (refused := a.endpoint(pool).error)
    assert "cannot be written" in refused
    assert [kind for kind, _ in a.alarms] == ["journal_failed"]
    a.settle()
    given = {a.run(pool) for _ in range(3)}
    assert address not in given
    a.keep()
    a.free_orphans()
    lan.etcd.release_stuck()
    until(lambda: set(lan.of_kind(ENDPOINT)) == given)
    until(lambda: len(a.stock.all()) == 2)
    given |= {a.run(pool) for _ in range(5)}
    assert given == set(INSIDE)


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.APPLIED, Fault.STUCK])
@pytest.mark.parametrize("asked", ["", "192.168.1.66"])
def test_a_claim_whose_outcome_is_not_known(lan: Lan, a: Host, fault: Fault, asked: str) -> None:
    """P5: a claim that appears late is this host's standby: adopted, or given back; never lost, never given twice."""
    pool = a.create(ip_range=RANGE)
    lan.etcd.on_commit = once(puts(STANDBY), fault)
    assert "may be written" in a.endpoint(pool, asked).error
    given = {a.run(pool)}
    lan.etcd.release_stuck()
    a.keep()
    until(lambda: len(a.stock.all()) == 2 and lan.of_kind(STANDBY) == sorted(str(e.address) for e in a.stock.all()))
    for _ in range(7):
        given.add(a.run(pool))
    assert given == set(INSIDE)


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.APPLIED, Fault.STUCK, Fault.UNAVAILABLE])
def test_a_conflict_that_could_not_be_written(lan: Lan, a: Host, wire: FakeLan, fault: Fault) -> None:
    """P2, P5: the claim that stands in its place is looked at again by the keeper, and is a conflict in the end."""
    pool = a.create(ip_range=RANGE)
    wire.machines["192.168.1.66"] = PRINTER
    lan.etcd.on_commit = once(puts(CONFLICT), fault)
    assert a.endpoint(pool, "192.168.1.66").status != 200
    assert the_lease(lan, "192.168.1.66").kind in (STANDBY, CONFLICT)
    a.keep()
    until(lambda: the_lease(lan, "192.168.1.66").kind == CONFLICT)
    lan.etcd.release_stuck()
    assert the_lease(lan, "192.168.1.66").kind == CONFLICT
    until(lambda: len(a.stock.all()) == 2)


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.APPLIED, Fault.STUCK, Fault.UNAVAILABLE])
def test_a_claim_that_could_not_be_given_back(lan: Lan, strict: Host, wire: FakeLan, fault: Fault) -> None:
    """P5: a claim that a refused request left behind is found by the keeper."""
    pool = strict.create(ip_range=RANGE)
    wire.failed = "br0 is down"
    lan.etcd.on_commit = once(gives_back, fault)
    assert "br0 is down" in strict.endpoint(pool).error
    assert strict.stock.close(pool) == []
    strict.stock.reopen(pool)
    wire.failed = ""
    strict.keep()
    until(lambda: len(strict.stock.all()) == 2)
    lan.etcd.release_stuck()
    until(lambda: lan.of_kind(STANDBY) == sorted(str(each.address) for each in strict.stock.all()))


def test_an_outage_while_converting_keeps_the_stock(lan: Lan, a: Host) -> None:
    """Nothing was written, to etcd or disk, and that is certain: the address goes back into the stock."""
    pool = a.create(ip_range=RANGE)
    (address,) = stock(a, pool)
    a.fill_disk()
    lan.etcd.on_commit = once(puts(ENDPOINT), Fault.UNAVAILABLE)
    assert a.endpoint(pool).status != 200
    assert [str(each.address) for each in a.stock.all()] == [address]
    a.settle()
    assert a.run(pool) == address


# ------------------------------------------------------------------------- what others do meanwhile


@pytest.mark.parametrize("value", [None, b'{"kind":"reserved"}', b"junk"])
def test_an_operator_takes_standby(lan: Lan, a: Host, value: bytes | None) -> None:
    """P2: what an operator deleted or wrote down is not given out of memory; the next one is."""
    pool = a.create(ip_range=RANGE)
    first, second = stock(a, pool, 2)
    latest = max(a.stock.all(), key=lambda each: each.looked)
    key = KEYS.lease("default", latest.address)
    if value is None:
        lan.delete(key)
    else:
        lan.put(key, value)
    assert a.run(pool) == (first if str(latest.address) == second else second)
    assert lan.keys().get(key) == value
    assert a.stock.all() == []


def test_settings_that_change_meanwhile(lan: Lan, a: Host) -> None:
    """P2: the conversion compares the segment's settings: what they exclude at that very moment is not given."""
    pool = a.create(ip_range=RANGE)
    first, second = stock(a, pool, 2)
    latest = str(max(a.stock.all(), key=lambda each: each.looked).address)
    changed: list[str] = []

    def on_commit(expect: Mapping[str, int], writes: Writes) -> Fault:
        if not changed and puts(ENDPOINT)(writes):
            changed.append(latest)
            lan.put(KEYS.segment("default"), f'{{"exclude":["{latest}"]}}')
        return Fault.PASS

    lan.etcd.on_commit = on_commit
    assert a.run(pool) == (first if latest == second else second)
    assert lan.lease(latest) is None


def test_the_stranger_of_the_same_second(lan: Lan, a: Host, b: Host, wire: FakeLan) -> None:
    """Two daemons and one stranger begin to use one address at once: at most one gets it, and never a duplicate."""
    pool = a.create(ip_range=RANGE)
    b.create(ip_range=RANGE)
    address = "192.168.1.66"
    answers: list[Reply] = []

    def appears(probed: object) -> None:
        wire.before_answer = lambda _: None
        b.catch_up()
        answers.append(b.endpoint(pool, address))
        wire.machines[address] = PRINTER

    wire.before_answer = appears
    answers.append(a.endpoint(pool, address))
    assert [each.status == 200 for each in answers] == [False, False]
    assert "standby of host a" in answers[0].error
    assert PRINTER in answers[1].error
    assert the_lease(lan, address).kind == CONFLICT


def test_only_the_address_is_looked_at_that_was_asked_for(lan: Lan, a: Host, wire: FakeLan) -> None:
    """`--ip` outside the range is claimed like any other, is never kept as standby, and leaves nothing."""
    pool = a.create(ip_range=RANGE)
    assert a.run(pool, "192.168.1.200") == "192.168.1.200"
    assert [str(each) for each in wire.probed] == ["192.168.1.200"]
    lan.etcd.on_commit = once(puts(ENDPOINT), Fault.UNAVAILABLE)
    a.fill_disk()
    assert a.endpoint(pool, "192.168.1.201").status != 200
    a.settle()
    assert a.stock.all() == [], "no request without a name would find it there"
    a.keep()
    until(lambda: lan.lease("192.168.1.201") is None)


def test_two_requests_for_one_address_do_not_starve_each_other(lan: Lan, a: Host, wire: FakeLan) -> None:
    """`--ip` twice at once on one host: the first gets it, the second is refused at once, and etcd is left in peace."""
    pool = a.create(ip_range=RANGE)
    inside, go_on = threading.Event(), threading.Event()

    def before_answer(address: Address) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)

    wire.before_answer = before_answer
    thread, first = asking(a, pool, "192.168.1.90")
    assert inside.wait(PATIENCE)
    other, second = asking(a, pool, "192.168.1.90")
    written = a.ledger.transactions.total()
    assert not second
    go_on.set()
    thread.join(PATIENCE)
    other.join(PATIENCE)
    assert sorted(each.status for each in (*first, *second)) == [200, 409]
    assert a.ledger.transactions.total() - written <= 2


def test_a_known_stranger_keeps_its_address_while_the_wire_is_dead(lan: Lan, a: Host, wire: FakeLan) -> None:
    """P2: whatever the policy is about what nobody knows: of this address something is known."""
    pool = a.create(ip_range=RANGE)
    wire.machines["192.168.1.90"] = PRINTER
    assert PRINTER in a.endpoint(pool, "192.168.1.90").error
    known = lan.lease("192.168.1.90")
    wire.machines.clear()
    wire.dead = "its cable is out"
    said = a.endpoint(pool, "192.168.1.90").error
    assert PRINTER in said
    assert "cable is out" in said
    assert lan.lease("192.168.1.90") == known


def test_ip_of_a_living_hosts_standby_is_given(lan: Lan, a: Host, b: Host, wire: FakeLan) -> None:
    """Among hosts that can be reached nobody is refused because an address is somebody's standby."""
    pool = b.create(ip_range="192.168.1.64/29")
    (address, _) = stock(b, pool, 2)
    alive(lan, b)
    b.keep()
    mine = a.create(ip_range="192.168.1.96/29")
    assert a.run(mine, address) == address
    lease = lan.lease(address)
    assert lease is not None
    assert (lease.kind, lease.host) == ("endpoint", "a")
    assert lan.under(KEYS.wanted) == {}
