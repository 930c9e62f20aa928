"""What the keeper does while nobody asks: the stock, the listener, alarms, old conflicts and newcomers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fakes import Fault, Writes
from harness import KEYS, MAC, NAME, PATIENCE, FakeLan, Habits, Host, Lan, Reply, bridge, until
from ipam_plugin import standby
from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.etcd import Put
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HOST,
    STANDBY,
    History,
    HostAddress,
    Lease,
    Pool,
    decode,
    encode,
    parse_time,
    read_lease,
)
from ipam_plugin.model import Host as HostRecord
from ipam_plugin.packets import How
from ipam_plugin.standby import Recently

A_BRIDGE = bridge("192.168.1.11/24", mac="02:aa:00:00:00:0a")
B_BRIDGE = bridge("192.168.1.12/24", mac="02:bb:00:00:00:0b")
PRINTER = "00:11:22:33:44:55"
RANGE = "192.168.1.64/29"
INSIDE = [f"192.168.1.{n}" for n in range(64, 72)]
PROBING = Habits(standby=2)
REFUSING = Habits(standby=2, refuse=True)


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "PERIOD", 0.02)


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


def stock(host: Host) -> list[str]:
    return sorted(str(each.address) for each in host.stock.all())


def settled(lan: Lan, *hosts: Host, count: int = 2) -> bool:
    """Whether these hosts have what they want, and all standby in etcd is in somebody's stock."""
    return all(len(stock(each)) == count for each in hosts) and lan.of_kind(STANDBY) == sorted(
        address for each in hosts for address in stock(each)
    )


def kept(lan: Lan, host: Host, ip_range: str = RANGE, **options: str) -> str:
    """A network of this host whose standby is complete: its PoolID."""
    pool = host.create(ip_range=ip_range, **options)
    if not any(each.name == f"keeper of {host.name}" for each in host._threads):
        host.keep()
    until(lambda: len(host.stock.of(pool)) == 2, "the standby")
    return pool


def rounds(host: Host, count: int = 3) -> None:
    """Until the keeper has looked at everything so many times more."""
    seen: list[float] = []
    there = host.keeper._welcome

    def welcome() -> None:
        seen.append(time.monotonic())
        there()

    host.keeper._welcome = welcome  # type: ignore[method-assign]
    until(lambda: len(seen) > count, "the keeper's rounds")
    host.keeper._welcome = there  # type: ignore[method-assign]


def age(host: Host, seconds: float) -> None:
    """What is in stock was looked at so much longer ago."""
    for each in host.stock.all():
        host.stock.replace(each, each._replace(looked=each.looked - seconds))


def register(lan: Lan, name: str, mac: str, address: str = "192.168.1.99") -> None:
    lan.put(KEYS.host(name), encode(HostRecord(name, addresses=(HostAddress(address, 24, "br0", mac),))))


def the_lease(lan: Lan, address: str) -> Lease:
    found = lan.lease(address)
    assert found is not None
    return found


def lease_key(address: str) -> str:
    return KEYS.lease("default", parse_address(address))


class Hold:
    """The looks of one FakeLan stand still until they are let go."""

    def __init__(self, wire: FakeLan) -> None:
        self._wire = wire
        self._go = threading.Event()
        self.waiting: list[str] = []

    def __enter__(self) -> Hold:
        def wait(address: Address) -> None:
            self.waiting.append(str(address))
            assert self._go.wait(PATIENCE)

        self._wire.before_answer = wait
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.before_answer = lambda address: None
        self._go.set()


# ------------------------------------------------------------------------------------- the stock


def test_the_stock_is_filled_and_refilled(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: `standby` addresses per pool in use, claimed, looked at, and as many again after each hand-out."""
    pool = kept(lan, a)
    until(lambda: settled(lan, a))
    for address in stock(a):
        lease = the_lease(lan, address)
        assert (lease.kind, lease.host, lease.pool) == (STANDBY, "a", pool)
        assert parse_address(address) in wire.probed
    for _ in range(4):
        ready = stock(a)
        assert a.run(pool) in ready
        until(lambda: settled(lan, a))
    assert a.ledger.transactions["claim"] == 0, "no request had to claim for itself"


@pytest.mark.parametrize("standby_wanted", [0, 1, 5])
def test_as_many_as_configured(lan: Lan, wire: FakeLan, standby_wanted: int) -> None:
    """`standby: N`, also none: then requests look for themselves."""
    host = lan.host("a", A_BRIDGE, habits=Habits(standby=standby_wanted), wire=wire)
    pool = host.create(ip_range=RANGE)
    host.keep()
    until(lambda: settled(lan, host, count=standby_wanted))
    rounds(host)
    assert settled(lan, host, count=standby_wanted)
    assert host.run(pool)


def test_a_pool_that_is_nearly_full_has_no_standby(lan: Lan, a: Host) -> None:
    """Section 7: over 80 % full nobody keeps standby, and what was kept is given back; below it is filled again."""
    pool = kept(lan, a)
    given = [a.run(pool) for _ in range(7)]
    until(lambda: settled(lan, a, count=0))
    rounds(a)
    assert settled(lan, a, count=0)
    assert a.release(pool, given[0]).status == 200
    until(lambda: settled(lan, a))


def test_a_small_pool_is_not_asked_for_more_than_it_has(lan: Lan, wire: FakeLan) -> None:
    """Two hosts that each want two of three addresses: what is free is kept, and nothing is written every few
    seconds to be sure that there is no more.
    """
    hosts = [lan.host(name, habits=PROBING, wire=wire) for name in "ab"]
    for each in hosts:
        each.keeper._pause = NoPause()
        each.create(ip_range="192.168.1.64/30", exclude="192.168.1.64")
        each.keep()
    until(lambda: len(lan.of_kind(STANDBY)) == 3 and sum(len(stock(each)) for each in hosts) == 3)
    for each in hosts:
        rounds(each)
    before = lan.etcd.transactions
    for each in hosts:
        rounds(each)
    assert lan.etcd.transactions == before


def test_pools_whose_wire_is_not_asked_have_no_standby(lan: Lan, a: Host, wire: FakeLan) -> None:
    """`probe: off`: nothing is claimed ahead of need, for that network or for the host."""
    pool = a.create(ip_range=RANGE, probe="off")
    off = lan.host("b", B_BRIDGE, wire=wire)
    off.create(ip_range="192.168.1.128/29")
    for each in (a, off):
        each.keep()
        rounds(each)
    assert lan.of_kind(STANDBY) == []
    a.run(pool)
    rounds(a)
    assert lan.of_kind(STANDBY) == []
    assert wire.probed == []


def test_strangers_are_met_by_the_keeper(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A machine on the next address costs no request anything: it is a conflict before anybody asks."""
    wire.machines = dict.fromkeys(INSIDE[:5], PRINTER)
    pool = a.create(ip_range=RANGE)
    a.keep()
    until(lambda: settled(lan, a))
    assert set(stock(a)) <= set(INSIDE[5:])
    assert set(lan.of_kind(CONFLICT)) <= set(INSIDE[:5])
    before = len(lan.of_kind(CONFLICT))
    probed = len(wire.probed)
    with Hold(wire):
        assert a.run(pool) in INSIDE[5:]
    assert len(lan.of_kind(CONFLICT)) == before
    assert len(wire.probed) >= probed


@pytest.mark.parametrize("trouble", ["dead", "failed", "proxy"])
@pytest.mark.parametrize("habits", [PROBING, REFUSING])
def test_the_stock_on_a_wire_that_cannot_be_heard(
    lan: Lan, wire: FakeLan, trouble: str, habits: Habits, caplog: pytest.LogCaptureFixture
) -> None:
    """probe_failure: warn: it is filled all the same, and a hand-out says so; refuse: it stays empty, and nothing
    is left claimed.
    """
    setattr(wire, trouble, PRINTER)
    host = lan.host("a", A_BRIDGE, habits=habits, wire=wire)
    pool = host.create(ip_range=RANGE)
    host.keep()
    if habits.refuse:
        until(lambda: wire.probed and lan.of_kind(STANDBY) == [])
        rounds(host)
        assert stock(host) == lan.of_kind(STANDBY) == []
        return
    until(lambda: settled(lan, host))
    assert all(each.unproven for each in host.stock.all())
    given = host.run(pool)
    assert f"{given} of pool {pool} is given although the wire could not be heard" in caplog.text
    assert lan.of_kind(CONFLICT) == []


def test_unproven_standby_is_proven_when_the_wire_is_back(lan: Lan, a: Host, wire: FakeLan) -> None:
    """What was claimed on a dead wire is asked for again after 10 s, not only after a minute."""
    wire.failed = "br0 is down"
    kept(lan, a)
    wire.failed = ""
    age(a, 11)
    until(lambda: all(not each.unproven for each in a.stock.all()) and len(stock(a)) == 2)


def test_standby_is_looked_at_again(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: every 60 s, without the address leaving the stock meanwhile."""
    kept(lan, a)
    ready, before = stock(a), len(wire.probed)
    age(a, 50)
    rounds(a)
    assert len(wire.probed) == before
    age(a, 20)
    with Hold(wire) as held:
        until(lambda: sorted(held.waiting) == ready)
        assert stock(a) == ready
    until(lambda: all(each.looked > time.monotonic() - 30 for each in a.stock.all()))
    assert stock(a) == ready


@pytest.mark.parametrize("silent_again", [False, True])
def test_a_machine_that_came_is_found_by_the_next_look(lan: Lan, a: Host, wire: FakeLan, silent_again: bool) -> None:
    """A machine that appears on an address while it is standby, and is not heard by itself, is found within a minute.
    One that answers once and never again (a phone that passed by) costs nothing but a longer look.
    """
    kept(lan, a)
    taken = stock(a)[0]
    wire.machines[taken] = PRINTER
    if silent_again:
        looked: list[str] = []

        def before_answer(address: Address) -> None:
            if str(address) == taken:
                looked.append(taken)
                if len(looked) > 1:
                    wire.machines.pop(taken, None)

        wire.before_answer = before_answer
    age(a, 61)
    if silent_again:
        until(lambda: len(wire.machines) == 0 and settled(lan, a))
        assert taken in stock(a)
        return
    until(lambda: the_lease(lan, taken).kind == CONFLICT and settled(lan, a))
    assert the_lease(lan, taken).mac == PRINTER


def test_standby_of_a_dead_wire_is_given_only_while_fresh(lan: Lan, wire: FakeLan) -> None:
    """probe_failure: refuse, and the wire dies later: what was proven is kept, and given for 100 s after its look."""
    host = lan.host("a", A_BRIDGE, habits=REFUSING, wire=wire)
    pool = kept(lan, host)
    ready = stock(host)
    wire.failed = "br0 is down"
    assert host.run(pool) in ready
    age(host, 101)
    assert "br0 is down" in host.endpoint(pool).error
    assert stock(host) == [each for each in ready if lan.lease(each) and the_lease(lan, each).kind == STANDBY]
    wire.failed = ""
    host.keeper._pause.clear()
    until(lambda: settled(lan, host))


def test_lost_standby_is_noticed(lan: Lan, a: Host) -> None:
    """A claim that an operator deleted, or wrote over, is counted no longer: another one takes its place."""
    kept(lan, a)
    first, second = stock(a)
    lan.delete(lease_key(first))
    lan.put(lease_key(second), '{"kind":"reserved"}')
    until(lambda: settled(lan, a) and second not in stock(a))


def test_an_outage_of_etcd_is_survived(lan: Lan, a: Host) -> None:
    """The keeper goes on when etcd is back, with what it had."""
    pool = kept(lan, a)
    ready = stock(a)
    lan.etcd.set_down(True)
    age(a, 61)
    rounds(a)
    assert stock(a) == ready
    lan.etcd.set_down(False)
    assert a.run(pool) in ready
    a.keeper._pause.clear()
    until(lambda: settled(lan, a))


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.APPLIED, Fault.STUCK, Fault.UNAVAILABLE])
def test_faults_of_the_keepers_own_writes(lan: Lan, a: Host, fault: Fault) -> None:
    """P5: whatever becomes of claims, conversions and what is given back: in the end etcd and stock are one."""
    a.keeper._pause = NoPause()
    seen = [0]

    def on_commit(expect: Mapping[str, int], writes: Writes) -> Fault:
        if any(each.key.startswith(KEYS.leases) for each in writes):
            seen[0] += 1
            if seen[0] % 2 and seen[0] < 20:
                return fault
        return Fault.PASS

    pool = a.create(ip_range=RANGE)
    lan.etcd.on_commit = on_commit
    a.free_orphans()
    a.keep()
    a.carry_out()
    for _ in range(4):
        a.endpoint(pool)
    until(lambda: seen[0] >= 10 or settled(lan, a))
    lan.etcd.on_commit = None
    lan.etcd.release_stuck()
    until(lambda: settled(lan, a) and not a.outage.waiting)
    held = lan.of_kind(ENDPOINT)
    assert a.release_pool(pool).status == 200
    until(lambda: lan.of_kind(STANDBY) == [])
    assert lan.of_kind(ENDPOINT) == held


class NoPause(dict[str, float]):
    """A pool that could not be filled is tried again at once."""

    def __setitem__(self, key: str, value: float) -> None: ...


# ------------------------------------------------------------------------------------- who is heard


@pytest.mark.parametrize("how", [How.ARP_ANNOUNCEMENT, How.ARP_PROBE, How.ARP_REQUEST, How.ARP_REPLY])
@pytest.mark.parametrize("stays", [True, False])
def test_standby_that_somebody_talks_about_is_not_given(
    lan: Lan, a: Host, wire: FakeLan, how: How, stays: bool
) -> None:
    """A machine that says it uses, or wants, an address in stock: from that moment nobody gets it. It is asked
    thoroughly: with an answer it is a conflict, without one it is in stock again.
    """
    pool = kept(lan, a)
    address = stock(a)[0]
    with Hold(wire) as held:
        if stays:
            wire.machines[address] = PRINTER
        wire.talk(address, PRINTER, how)
        assert address not in stock(a), "already when the listener has told it"
        until(lambda: address in held.waiting)
        assert a.run(pool) != address
        assert the_lease(lan, address).kind == STANDBY, "a rumour is no conflict"
    if stays:
        until(lambda: the_lease(lan, address).kind == CONFLICT)
        assert (the_lease(lan, address).mac, the_lease(lan, address).by) == (PRINTER, "a")
    until(lambda: settled(lan, a))
    assert (lan.of_kind(CONFLICT) == [address]) == stays


def test_talk_of_our_own_costs_no_standby(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Registered hosts probe each other's claims now and then; that says nothing about the address."""
    register(lan, "b", "02:bb:00:00:00:0b")
    kept(lan, a)
    a.catch_up()
    ready = stock(a)
    wire.talk(ready[0], "02:bb:00:00:00:0b", How.ARP_PROBE)
    assert stock(a) == ready


def test_more_talk_than_looks(lan: Lan, a: Host, wire: FakeLan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out at once also when all the threads that look are busy with others."""
    host = lan.host("b", B_BRIDGE, habits=Habits(standby=40), wire=wire)
    host.create(ip_range="192.168.1.128/26")
    host.keep()
    until(lambda: len(stock(host)) == 40)
    ready = stock(host)
    with Hold(wire):
        for address in ready:
            wire.talk(address, PRINTER)
        assert not set(ready) & set(stock(host))
    until(lambda: settled(lan, host, count=40))


def test_a_rumour_is_no_conflict(lan: Lan, wire: FakeLan) -> None:
    """Section 7: what is heard makes this host leave an address for later, as long as there are others; and only an
    answer to its own question makes a conflict.
    """
    host = lan.host("b", B_BRIDGE, habits=Habits(standby=0), wire=wire)
    pool = host.create(ip_range=RANGE)
    host.keep()
    rounds(host)
    rumoured = INSIDE[2:5]
    for address in rumoured:
        wire.talk(address, PRINTER)
    others = {host.run(pool) for _ in range(5)}
    assert others == set(INSIDE) - set(rumoured)
    assert lan.of_kind(CONFLICT) == []
    assert {host.run(pool) for _ in range(3)} == set(rumoured), "nothing else was left, and nobody answers there"


def test_a_machine_that_only_asks_is_no_rumour(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A probe for a free address (a phone that looks for one) does not keep it from being given."""
    pool = a.create(ip_range=RANGE)
    a.keep()
    until(lambda: settled(lan, a))
    free = [each for each in INSIDE if each not in stock(a)]
    for address in free:
        wire.talk(address, PRINTER, How.ARP_PROBE)
    assert not len(a.view._segment("default").families[4].rumours)
    assert len({a.run(pool) for _ in range(8)}) == 8


# ------------------------------------------------------------------------------------- what is left over


def leave(lan: Lan, address: str, pool: str, host: str = "a", token: str = "earlier") -> None:
    """Standby of an earlier run."""
    lan.put(lease_key(address), encode(Lease(STANDBY, host, pool=pool, since="2025-01-01T00:00:00.000Z", token=token)))


def test_leftovers_are_taken_over_with_a_new_lease(lan: Lan, a: Host, wire: FakeLan) -> None:
    """What an earlier run claimed is looked at, and kept under a lease that nothing of before matches."""
    pool = a.create(ip_range=RANGE)
    for address in INSIDE[:2]:
        leave(lan, address, pool)
    before = {key: kv.revision for key, kv in lan.etcd.snapshot().keys.items()}
    seen: dict[str, str] = {}
    wire.before_answer = lambda address: seen.setdefault(str(address), getattr(lan.lease(str(address)), "token", ""))
    a.keep()
    until(lambda: settled(lan, a))
    now = lan.etcd.snapshot().keys
    for address in stock(a):
        lease = the_lease(lan, address)
        assert lease.token not in ("earlier", "")
        assert now[lease_key(address)].revision > before.get(lease_key(address), 0)
        assert seen[address] == lease.token, "looked at after it was written anew"


def test_a_stuck_conversion_meets_its_journal(lan: Lan, wire: FakeLan, tmp_path: Path) -> None:
    """P1, P4, P5: a conversion of the earlier run that etcd still carries out: the next run's keeper leaves its claim
    alone, and the journal makes the very lease of it that was answered.
    """
    a = lan.host("a", A_BRIDGE, habits=PROBING, wire=wire, journal=tmp_path / "journal")
    pool = kept(lan, a)
    until(lambda: settled(lan, a))
    lan.etcd.on_commit = lambda expect, writes: (
        Fault.STUCK
        if any(isinstance(each, Put) and read_lease(each.value).kind == ENDPOINT for each in writes)
        else Fault.PASS
    )
    first = a.run(pool)
    a.stop()
    lan.hosts.remove(a)
    lan.etcd.on_commit = None
    again = lan.host("a", A_BRIDGE, habits=PROBING, wire=wire, journal=tmp_path / "journal")
    again.keep()
    until(lambda: len(again.stock.all()) == 2)
    assert first in lan.of_kind(STANDBY)
    again.carry_out()
    until(lambda: not again.outage.waiting)
    assert len(lan.etcd.stuck) == 1
    assert lan.etcd.release_stuck() == 0
    given = [first, *(again.run(pool) for _ in range(7))]
    assert sorted(given) == INSIDE
    assert sorted(lan.of_kind(ENDPOINT)) == sorted(given)


def test_standby_that_a_container_may_have_is_not_adopted(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 8: what an earlier run claimed is given only after dockerd's own list shows that no container has it."""
    pool = kept(lan, a)
    left = stock(a)
    a.stop()
    lan.hosts.remove(a)
    again = lan.host("a", A_BRIDGE, habits=PROBING, wire=wire)
    has = left[0]
    again.keeper.may_adopt = lambda address: str(address) != has
    again.keep()
    until(lambda: stock(again) == [left[1]])
    rounds(again)
    assert has not in {again.run(pool) for _ in range(5)}
    assert the_lease(lan, has).kind == STANDBY
    again.keeper.may_adopt = lambda address: True
    until(lambda: has in stock(again))


@pytest.mark.parametrize("crashed", [True, False])
def test_a_restart_keeps_the_number(lan: Lan, a: Host, wire: FakeLan, crashed: bool) -> None:
    """Kept through a restart or a crash, never leaked: after it there are as many as before, all known; where nothing
    was cut off, they are the same ones.
    """
    kept(lan, a)
    other = lan.host("b", B_BRIDGE, habits=PROBING, wire=wire)
    kept(lan, other)
    ready = stock(a)
    for _ in range(3):
        a.stop()
        lan.hosts.remove(a)
        a = lan.host("a", A_BRIDGE, habits=PROBING, wire=wire)
        if crashed:
            free = next(each for each in INSIDE if each not in lan.leases())
            leave(lan, free, next(iter(lan.under(KEYS.pools))).removeprefix(KEYS.pools).rpartition("/")[0])
        a.keep()
        until(lambda: settled(lan, a, other))  # noqa: B023 - it ends within this turn
        assert crashed or stock(a) == ready
    assert len(lan.of_kind(STANDBY)) == 4


@pytest.mark.parametrize(
    ("address", "pool"),
    [
        ("192.168.1.130", "default/192.168.1.0/24/192.168.1.128/28"),  # a network that this host has no more
        ("192.168.1.66", "default/10.0.0.0/24"),
        ("192.168.1.66", "default/192.168.1.0/24;probe=off"),
        ("192.168.1.66", "lab/192.168.1.0/24"),
        ("192.168.1.66", "nothing that anybody made"),
        ("192.168.1.66", ""),
        ("192.168.1.200", f"default/192.168.1.0/24/{RANGE}"),  # asked for by --ip, outside the range
        ("192.168.1.70", f"default/192.168.1.0/24/{RANGE}"),  # excluded since
    ],
)
def test_leftovers_that_are_of_no_use_are_given_back(lan: Lan, a: Host, wire: FakeLan, address: str, pool: str) -> None:
    """A claim whose network is gone, or for which the address cannot stay, is deleted, without a look at it."""
    a.create(ip_range=RANGE)
    a.create(probe="off")
    lan.put(KEYS.segment("default"), '{"exclude":["192.168.1.70"]}')
    leave(lan, address, pool)
    written: list[str] = []

    def on_commit(expect: Mapping[str, int], writes: Writes) -> Fault:
        written.extend(
            "put" if isinstance(each, Put) else "delete" for each in writes if each.key == lease_key(address)
        )
        return Fault.PASS

    lan.etcd.on_commit = on_commit
    a.keep()
    until(lambda: written)
    assert written[0] == "delete"
    until(lambda: settled(lan, a))
    assert address in stock(a) or lan.lease(address) is None


def test_leftovers_of_others_are_left_alone(lan: Lan, a: Host) -> None:
    """Only its owner gives standby back."""
    pool = kept(lan, a)
    leave(lan, next(each for each in INSIDE if each not in stock(a)), pool, host="b", token="theirs")
    rounds(a)
    assert [each for each in lan.leases().values() if each.token == "theirs"]


@pytest.mark.parametrize("habits", [PROBING, REFUSING])
@pytest.mark.parametrize("trouble", ["stranger", "ours", "dead"])
def test_leftovers_that_are_not_silent(lan: Lan, wire: FakeLan, habits: Habits, trouble: str) -> None:
    """A leftover is looked at like any claim: a stranger makes a conflict, and what proves nothing goes by policy."""
    register(lan, "b", "02:bb:00:00:00:0b")
    host = lan.host("a", A_BRIDGE, habits=habits, wire=wire)
    pool = host.create(ip_range=RANGE)
    leave(lan, "192.168.1.66", pool)
    if trouble == "dead":
        wire.dead = "br0 has no carrier"
    else:
        wire.machines["192.168.1.66"] = PRINTER if trouble == "stranger" else "02:bb:00:00:00:0b"
    host.keep()
    until(lambda: lan.lease("192.168.1.66") is None or the_lease(lan, "192.168.1.66").token != "earlier")
    if trouble == "dead" and habits.refuse:
        until(lambda: lan.of_kind(STANDBY) == [])
    else:
        until(lambda: settled(lan, host))
    assert (lan.of_kind(CONFLICT) == ["192.168.1.66"]) == (trouble == "stranger")
    if trouble != "dead":
        assert "192.168.1.66" not in stock(host)


# ------------------------------------------------------------------------------------- the end of a network


def test_the_last_network_gives_all_back(lan: Lan, a: Host) -> None:
    """Of two networks with one PoolID the first one's end changes nothing; the last one's gives all standby back, and
    no endpoint.
    """
    pool = kept(lan, a)
    assert a.create(ip_range=RANGE) == pool
    container = a.run(pool)
    until(lambda: settled(lan, a))
    assert a.release_pool(pool).status == 200
    rounds(a)
    assert settled(lan, a)
    assert a.release_pool(pool).status == 200
    assert lan.of_kind(STANDBY) == [], "by the time that Docker has its answer"
    assert lan.of_kind(ENDPOINT) == [container]
    rounds(a)
    assert settled(lan, a, count=0)


def test_other_networks_keep_theirs(lan: Lan, a: Host) -> None:
    """Standby belongs to a network: another one's stays."""
    pool = kept(lan, a)
    other = kept(lan, a, ip_range="192.168.1.128/29")
    ready = sorted(str(each.address) for each in a.stock.of(other))
    assert a.release_pool(pool).status == 200
    assert lan.of_kind(STANDBY) == ready
    rounds(a)
    assert lan.of_kind(STANDBY) == stock(a) == ready


@pytest.mark.parametrize("again", [False, True])
def test_the_last_network_goes_while_an_address_is_looked_at(lan: Lan, a: Host, wire: FakeLan, again: bool) -> None:
    """A look takes seconds: the claim it is about is given back with the others, and its end brings nothing back, not
    even into a network of the same pool that has come meanwhile.
    """
    pool = a.create(ip_range=RANGE)
    with Hold(wire) as held:
        a.keep()
        until(lambda: len(held.waiting) == 2)
        assert len(lan.of_kind(STANDBY)) == 2
        assert a.release_pool(pool).status == 200
        assert lan.of_kind(STANDBY) == []
        if again:
            assert a.create(ip_range=RANGE) == pool
    if again:
        until(lambda: settled(lan, a))
    rounds(a)
    assert settled(lan, a, count=2 if again else 0)


@pytest.mark.parametrize("where", ["before", "after"])
def test_the_last_network_goes_while_an_address_is_claimed(lan: Lan, a: Host, where: str) -> None:
    """The claim is written in the very moment in which the network ends: it is given back all the same (P5)."""
    pool = a.create(ip_range=RANGE)
    gone: list[int] = []
    body = json.dumps({"PoolID": pool}).encode()

    def on_commit(expect: Mapping[str, int], writes: Writes) -> Fault:
        standing = any(isinstance(each, Put) and read_lease(each.value).kind == STANDBY for each in writes)
        if standing and not gone:
            gone.append(0)
            if where == "before":
                gone[0] = a.post("/IpamDriver.ReleasePool", body).status
                return Fault.PASS
            return Fault.APPLIED
        return Fault.PASS

    lan.etcd.on_commit = on_commit
    a.keep()
    until(lambda: gone and (gone[0] or where == "after"))
    if where == "after":
        gone[0] = a.release_pool(pool).status
    assert gone == [200]
    until(lambda: settled(lan, a, count=0))
    rounds(a)
    assert settled(lan, a, count=0)


def test_a_release_that_fails_half_way(lan: Lan, a: Host) -> None:
    """etcd goes away in the middle: Docker has removed the network, so the rest goes when etcd is back."""
    pool = kept(lan, a)
    faults = [Fault.PASS, Fault.UNAVAILABLE]
    lan.etcd.on_commit = lambda expect, writes: faults.pop(0) if faults else Fault.PASS
    assert a.release_pool(pool).status == 200
    lan.etcd.on_commit = None
    assert lan.under(KEYS.pools)
    a.carry_out()
    until(lambda: settled(lan, a, count=0))
    until(lambda: not lan.under(KEYS.pools))


# ------------------------------------------------------------------------------------- alarms


def texts(host: Host) -> list[str]:
    return [text for kind, text in host.alarms if kind == "address_used_twice"]


def test_two_machines_with_one_address(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: a leased address that talks from another MAC: an alarm with both MACs and the container within 2 s,
    once; on every host that hears it.
    """
    pool = kept(lan, a)
    other = lan.host("b", B_BRIDGE, habits=PROBING, wire=wire)
    kept(lan, other)
    address = str(a.endpoint(pool, **{NAME: "web"}).ok["Address"]).removesuffix("/24")
    other.catch_up()
    began = time.monotonic()
    wire.talk(address, PRINTER)
    until(lambda: texts(a) and texts(other))
    assert time.monotonic() - began < 2
    for host in (a, other):
        (said,) = texts(host)
        for part in (address, PRINTER, the_lease(lan, address).mac, "container web on host a"):
            assert part in said
    for _ in range(5):
        wire.talk(address, PRINTER)
    rounds(a)
    assert len(texts(a)) == 1
    assert the_lease(lan, address).kind == ENDPOINT


def test_a_machine_with_a_hosts_own_address(lan: Lan, a: Host, wire: FakeLan) -> None:
    """The same for the address of a Docker host's bridge."""
    kept(lan, a)
    wire.talk("192.168.1.11", PRINTER)
    until(lambda: texts(a))
    for part in ("192.168.1.11", "Docker host a itself", "br0", A_BRIDGE.mac, PRINTER):
        assert part in texts(a)[0]


@pytest.mark.parametrize("why", ["moving", "registered", "itself", "asking", "ended", "conflict", "unknown"])
def test_no_alarm(lan: Lan, a: Host, wire: FakeLan, why: str) -> None:
    """Not for an address that moves between machines, a registered host's card, the container itself, a mere probe,
    nor where no lease with a MAC stands.
    """
    pool = kept(lan, a)
    address = a.run(pool)
    mac, how = PRINTER, How.ARP_ANNOUNCEMENT
    if why == "moving":
        lan.put(KEYS.segment("default"), f'{{"moving":["{address}"]}}')
    elif why == "registered":
        mac = "02:bb:00:00:00:0b"
        register(lan, "b", mac)
    elif why == "itself":
        mac = the_lease(lan, address).mac
    elif why == "asking":
        how = How.ARP_PROBE
    elif why == "ended":
        assert a.release(pool, address).status == 200
    elif why == "conflict":
        lan.put(lease_key(address), encode(Lease(CONFLICT, mac="00:99:99:99:99:99")))
    else:
        lan.put(lease_key(address), encode(Lease(ENDPOINT, "a", pool=pool, token="t")))
    a.catch_up()
    wire.talk(address, mac, how)
    # A real one after it, by which it is known that the first one was dealt with.
    canary = a.run(pool)
    wire.talk(canary, PRINTER)
    until(lambda: any(canary in said for said in texts(a)))
    assert not any(address in said for said in texts(a))


def test_a_flood_of_senders(lan: Lan, a: Host, wire: FakeLan, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 frames with as many MACs, for leased, free and standby addresses: one alarm per address, few questions to
    etcd, bounded memory, and requests are answered meanwhile. What comes after the flood is heard.
    """
    pool = kept(lan, a)
    address = a.run(pool)
    until(lambda: settled(lan, a))
    reads = [0]
    get_many = lan.etcd.get_many

    def counted(*arguments: Any, **more: Any) -> Any:
        reads[0] += 1
        return get_many(*arguments, **more)

    monkeypatch.setattr(lan.etcd, "get_many", counted)
    began = time.monotonic()
    for number in range(20_000):
        mac = f"00:aa:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}:01"
        wire.talk(
            (address, "192.168.1.200", stock(a)[0] if number % 100 == 50 and stock(a) else address)[number % 3], mac
        )
    assert a.run(pool)
    until(lambda: texts(a))
    took = time.monotonic() - began
    assert reads[0] < standby.CHECKS_WAITING + took / standby.CHECKS_APART + 50
    assert len([said for said in texts(a) if address in said]) <= 1 + took / standby.ALARMS_APART
    assert len(a.keeper._told._when) <= 4 * standby.REMEMBERED
    assert len(a.keeper._skipped._when) <= standby.REMEMBERED
    canary = a.run(pool)
    began = time.monotonic()

    def told() -> bool:
        wire.talk(canary, PRINTER)
        return any(canary in said for said in texts(a))

    until(told)
    assert time.monotonic() - began < 2.5, "the questions that were waiting come first"
    until(lambda: settled(lan, a))


def test_own_leases_are_asked_again(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: frames between two other machines are not heard, so who uses this host's leases is asked every 10 min;
    of other hosts' leases each asks its own.
    """
    pool = kept(lan, a)
    other = lan.host("b", B_BRIDGE, habits=PROBING, wire=wire)
    theirs = other.run(other.create(ip_range=RANGE))
    mine = {a.run(pool) for _ in range(3)}
    for address in mine:
        wire.talk(address, the_lease(lan, address).mac)  # they are up: nobody waits for them any more
    until(lambda: not a.keeper._newcomers)
    wire.asked.clear()
    rounds(a)
    assert wire.asked == []
    a.keeper._own_asked -= 601
    until(lambda: len(wire.asked) >= 3)
    rounds(a)
    assert {str(each) for each in wire.asked} == mine
    assert theirs not in mine


def test_what_happened_recently_is_bounded() -> None:
    """A set that forgets: after its time, beyond its size, and when it is told to."""
    lately = Recently(3600, most=3)
    assert [lately.add(each) for each in ("a", "b", "a", "c", "d")] == [True, True, False, True, True]
    assert lately.add("a"), "the oldest was forgotten"
    lately.forget("d")
    assert lately.add("d")
    assert Recently(0).add("x")
    short = Recently(0)
    assert [short.add("x") for _ in range(3)] == [True] * 3


# ------------------------------------------------------------------------------------- old conflicts


def stranger(lan: Lan, address: str, since: str = "2025-01-01T00:00:00.000Z") -> Lease:
    lease = Lease(CONFLICT, mac=PRINTER, by="b", since=since, token="old")
    lan.put(lease_key(address), encode(lease))
    return lease


def test_a_stranger_that_is_gone_frees_its_address(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Section 7: after its probation it is probed again and freed if silent, by any daemon; the history says why."""
    stranger(lan, "192.168.1.66")
    kept(lan, a)
    until(lambda: lan.lease("192.168.1.66") is None or the_lease(lan, "192.168.1.66").kind != CONFLICT)
    assert parse_address("192.168.1.66") in wire.probed
    past = decode(lan.keys()[KEYS.past("default", parse_address("192.168.1.66"))], History).past[0]
    assert (past.kind, past.mac, past.why) == (CONFLICT, PRINTER, "silent after its probation")


def test_a_stranger_that_answers_begins_anew(lan: Lan, a: Host, wire: FakeLan) -> None:
    """It stays a conflict, seen now, by this host, with the MAC that answers now; and is not asked again for a day."""
    stranger(lan, "192.168.1.66")
    wire.machines["192.168.1.66"] = "00:99:99:99:99:99"
    kept(lan, a)
    until(lambda: the_lease(lan, "192.168.1.66").token != "old")
    lease = the_lease(lan, "192.168.1.66")
    assert (lease.kind, lease.by, lease.mac) == (CONFLICT, "a", "00:99:99:99:99:99")
    assert (parse_time(lease.since) or 0) > time.time() - 60
    rounds(a)
    probed = wire.probed.count(parse_address("192.168.1.66"))
    rounds(a)
    assert wire.probed.count(parse_address("192.168.1.66")) == probed


@pytest.mark.parametrize("trouble", ["dead", "failed", "proxy"])
def test_a_look_that_proves_nothing_ends_no_conflict(lan: Lan, a: Host, wire: FakeLan, trouble: str) -> None:
    """Silence counts only on a living wire: the conflict stays as it is, and is tried again later, not all the time."""
    lease = stranger(lan, "192.168.1.66")
    register(lan, "b", "02:bb:00:00:00:0b")
    setattr(wire, trouble, "00:99:99:99:99:99")
    kept(lan, a)
    until(lambda: parse_address("192.168.1.66") in wire.probed)
    rounds(a)
    probed = wire.probed.count(parse_address("192.168.1.66"))
    rounds(a)
    assert the_lease(lan, "192.168.1.66") == lease
    assert wire.probed.count(parse_address("192.168.1.66")) == probed


def test_a_conflict_that_is_a_docker_host_by_now_ends(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A machine that was found as a stranger and got the daemon since is in the register by itself."""
    stranger(lan, "192.168.1.66")
    register(lan, "b", "02:bb:00:00:00:0b")
    wire.machines["192.168.1.66"] = "02:bb:00:00:00:0b"
    kept(lan, a)
    until(lambda: lan.lease("192.168.1.66") is None)


def test_a_probation_takes_its_time(lan: Lan, wire: FakeLan) -> None:
    """Not probed before it is over, and soon after; the time is the configuration's."""
    host = lan.host("a", A_BRIDGE, habits=Habits(standby=2, probation=1.0), wire=wire)
    pool = kept(lan, host)
    wire.machines["192.168.1.66"] = PRINTER
    while lan.lease("192.168.1.66") is None or the_lease(lan, "192.168.1.66").kind != CONFLICT:
        assert host.endpoint(pool, "192.168.1.66").status != 200
    began, probed = time.monotonic(), wire.probed.count(parse_address("192.168.1.66"))
    wire.machines.clear()
    until(lambda: lan.lease("192.168.1.66") is None or the_lease(lan, "192.168.1.66").kind != CONFLICT)
    assert 0.8 < time.monotonic() - began < 5
    assert wire.probed.count(parse_address("192.168.1.66")) > probed


def test_conflicts_elsewhere_are_not_ours_to_ask(lan: Lan, a: Host, wire: FakeLan) -> None:
    """A daemon that does not reach an address cannot say that nobody is there."""
    lan.put(KEYS.lease("lab", parse_address("192.168.1.66")), encode(Lease(CONFLICT, mac=PRINTER, token="old")))
    lan.put(lease_key("10.0.0.5"), encode(Lease(CONFLICT, mac=PRINTER, token="old")))
    kept(lan, a)
    rounds(a)
    assert lan.lease("10.0.0.5") is not None
    assert lan.lease("192.168.1.66", "lab") is not None


def test_a_conflict_that_is_new_again_is_not_freed(lan: Lan, a: Host, wire: FakeLan) -> None:
    """Another host saw it anew while this one was looking: only the very conflict that was looked at is ended."""
    stranger(lan, "192.168.1.66")
    fresh = Lease(CONFLICT, mac=PRINTER, by="b", since="2999-01-01T00:00:00.000Z", token="new")

    def meanwhile(address: Address) -> None:
        if str(address) == "192.168.1.66":
            lan.put(lease_key("192.168.1.66"), encode(fresh))

    wire.before_answer = meanwhile
    kept(lan, a)
    until(lambda: parse_address("192.168.1.66") in wire.probed)
    rounds(a)
    assert the_lease(lan, "192.168.1.66") == fresh


# ---------------------------------------------------------------------- addresses this host had


@pytest.fixture
def moved(lan: Lan, a: Host, wire: FakeLan, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Host a gets another address at its bridge, and its keeper notices at once; the time is shortened."""
    monkeypatch.setattr(standby, "LOST_FOR", 0.3)
    kept(lan, a)

    def move() -> None:
        a.carried[:] = [bridge("192.168.1.12/24")]
        a.keeper.interfaces_changed()
        a.register.register_own_addresses(time.monotonic() + PATIENCE)

    assert the_lease(lan, OWN).kind == HOST
    return move


OWN = "192.168.1.11"


def asked_for_own(wire: FakeLan, times: int = 1) -> bool:
    return wire.probed.count(parse_address(OWN)) >= times


def test_an_own_address_that_is_gone_is_free_after_its_time(
    lan: Lan, a: Host, wire: FakeLan, moved: Callable[[], None]
) -> None:
    """Section 4, kind host: 10 minutes after the interface lost it, if silent; the history says why."""
    rounds(a)
    assert not asked_for_own(wire)
    began = time.monotonic()
    moved()
    until(lambda: lan.lease(OWN) is None)
    assert time.monotonic() - began >= 0.3
    assert asked_for_own(wire)
    past = decode(lan.keys()[KEYS.past("default", parse_address(OWN))], History).past[0]
    assert (past.kind, past.host, past.why) == (HOST, "a", "no interface carries it any more, and it is silent")
    assert the_lease(lan, "192.168.1.12").kind == HOST


def test_a_daemon_that_starts_waits_as_long_again(lan: Lan, wire: FakeLan) -> None:
    """Since when the address is gone it does not know, so for now nothing is asked."""
    lan.put(lease_key(OWN), encode(Lease(HOST, "a", mac=MAC, interface="br0", token="old")))
    host = lan.host("a", bridge("192.168.1.12/24"), habits=Habits(standby=2), wire=wire)
    kept(lan, host)
    rounds(host)
    assert host.keeper._lost.keys() == {("default", parse_address(OWN))}
    assert not asked_for_own(wire)
    assert lan.lease(OWN) is not None


@pytest.mark.parametrize("trouble", ["dead", "failed", "proxy", "machines"])
def test_an_own_address_that_is_not_known_to_be_silent_stays(
    lan: Lan, a: Host, wire: FakeLan, moved: Callable[[], None], trouble: str
) -> None:
    """Somebody has it by now, or the look proves nothing: it stays, and is asked for again."""
    lease = the_lease(lan, OWN)
    setattr(wire, trouble, {OWN: PRINTER} if trouble == "machines" else "00:99:99:99:99:99")
    moved()
    until(lambda: asked_for_own(wire, 2))
    assert the_lease(lan, OWN) == lease


def test_an_own_address_that_is_back_in_the_last_moment_stays(
    lan: Lan, a: Host, wire: FakeLan, moved: Callable[[], None]
) -> None:
    """The interface gets it again while the wire is asked."""
    lease = the_lease(lan, OWN)

    def back(address: Address) -> None:
        if str(address) == OWN:
            a.carried.append(bridge(f"{OWN}/24"))

    wire.before_answer = back
    moved()
    until(lambda: asked_for_own(wire))
    rounds(a)
    assert the_lease(lan, OWN) == lease


def test_an_own_address_of_another_grant_stays(lan: Lan, a: Host, wire: FakeLan, moved: Callable[[], None]) -> None:
    """The fence is the token that was known before the wire was asked."""
    fresh = Lease(HOST, "a", mac=MAC, interface="br0", token="new")

    def meanwhile(address: Address) -> None:
        if str(address) == OWN:
            wire.before_answer = lambda address: None
            lan.put(lease_key(OWN), encode(fresh))

    wire.before_answer = meanwhile
    moved()
    until(lambda: asked_for_own(wire))
    rounds(a)
    assert the_lease(lan, OWN) == fresh


def test_what_another_host_carries_is_not_asked_for(
    lan: Lan, a: Host, wire: FakeLan, moved: Callable[[], None]
) -> None:
    """Only its own host knows that an address is gone."""
    lan.put(lease_key("192.168.1.13"), encode(Lease(HOST, "b", mac="02:bb:00:00:00:0b", token="b")))
    moved()
    until(lambda: lan.lease(OWN) is None)
    assert parse_address("192.168.1.13") not in wire.probed
    assert lan.lease("192.168.1.13") is not None


# ------------------------------------------------------------------------------------- newcomers


def test_a_container_that_is_up_is_announced_once(lan: Lan, a: Host, wire: FakeLan) -> None:
    """moby#30238: engines before 28 do not say that an address has moved. Once the container's own MAC is heard, the
    LAN is told; not before, not for another MAC, not again.
    """
    pool = kept(lan, a)
    address = a.run(pool)
    mac = the_lease(lan, address).mac
    until(lambda: parse_address(address) in wire.asked, "it is asked for, so that it is heard when it is up")
    wire.talk(address, "02:42:99:99:99:99")
    rounds(a)
    assert wire.announced == []
    for _ in range(3):
        wire.talk(address, mac)
    until(lambda: wire.announced)
    rounds(a)
    assert wire.announced == [(parse_address(address), mac)]


@pytest.mark.parametrize("how", ["released", "late", "off"])
def test_nobody_is_announced_who_is_not_there(
    lan: Lan, a: Host, wire: FakeLan, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container whose lease is gone, one that did not come up in time, one of a network whose wire is not asked."""
    pool = kept(lan, a) if how != "off" else a.create(ip_range=RANGE, probe="off")
    if how == "late":
        monkeypatch.setattr(standby, "NEWCOMER_PATIENCE", 0.1)
    address = a.run(pool)
    mac = the_lease(lan, address).mac
    if how == "released":
        assert a.release(pool, address).status == 200
    until(lambda: not a.keeper._newcomers)
    wire.talk(address, mac)
    if how != "off":
        rounds(a)
    assert wire.announced == []


def test_newcomers_are_bounded(lan: Lan, a: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many containers start at once, the oldest are forgotten."""
    monkeypatch.setattr(standby, "NEWCOMERS", 3)
    pool = Pool.make("192.168.1.0/24", "", {}, "default")
    for number in range(1, 9):
        a.keeper.given(pool, parse_address(f"192.168.1.{number}"), PRINTER)
    assert [str(address) for _, address in a.keeper._newcomers] == [f"192.168.1.{number}" for number in (6, 7, 8)]


# ------------------------------------------------------------------------------------- any order


class Inline:
    """An executor that does it now."""

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def shutdown(self, **_: object) -> None: ...


class Once:
    """An event that lets a loop run once."""

    def __init__(self) -> None:
        self._asked = 0

    def is_set(self) -> bool:
        self._asked += 1
        return self._asked > 1


HOSTS = ("a", "b")
ADDRESSES = INSIDE
ages = st.sampled_from((0.0, 61.0, 101.0))


class AnyOrder(RuleBasedStateMachine):
    """Two hosts, strangers that come and go, and keepers whose rounds happen when the test says so.

    Of every look it is remembered under which claim it was made, and whether it was answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lan = Lan()
        self.wire = FakeLan()
        self.wire.before_answer = self.looked
        self.lan.etcd.on_commit = self.committed
        self.looks: dict[tuple[str, str], str] = {}  # (address, token of its claim) -> who answered the last look
        self.answers: dict[tuple[str, str], str] = {}  # the same, also of looks that count no more
        self.holds: dict[str, str] = {}
        self.numbers = 0
        self.stuck = False  # the next conversion
        self.wrong: list[str] = []

    @initialize()
    def start(self) -> None:
        self.hosts = {name: self.host(name) for name in HOSTS}
        for each in self.hosts.values():
            self.pool = each.create(ip_range=RANGE)

    def host(self, name: str) -> Host:
        made = self.lan.host(name, A_BRIDGE if name == "a" else B_BRIDGE, habits=PROBING, wire=self.wire)
        made.keeper._looks = made.keeper._checks = Inline()  # type: ignore[assignment]
        made.keeper._pause = NoPause()
        made.claims.on_shortage = lambda: self.round_of(made)
        made.view.on_pools = made.view.on_wanted = lambda: None
        return made

    def teardown(self) -> None:
        self.lan.__exit__(None, None, None)

    # ---- what is seen

    def looked(self, address: Address) -> None:
        lease = self.lan.lease(str(address))
        if lease is not None and lease.kind == STANDBY:
            who = self.wire.machines.get(str(address), "")
            self.looks[str(address), lease.token] = self.answers[str(address), lease.token] = who

    def committed(self, expect: Mapping[str, int], writes: Writes) -> Fault:
        """Before each write. Whoever writes may log an exception and go on, so what is wrong is kept."""
        keys = self.lan.etcd.snapshot().keys
        for each in writes:
            there = keys.get(each.key)
            if not (isinstance(each, Put) and each.key.startswith(KEYS.leases)):
                continue
            if there is not None and there.revision != expect.get(each.key):
                continue  # it will not be written
            after, before = read_lease(each.value), read_lease(there.value) if there else Lease("")
            look = each.key.rpartition("/")[2], before.token
            if after.kind == ENDPOINT:
                if (before.kind, before.host) != (STANDBY, after.host):
                    self.wrong.append(f"{look} given without a claim")
                if self.looks.get(look) != "":
                    self.wrong.append(f"{look} given without a silent look after its claim")
                if self.stuck:
                    self.stuck = False
                    return Fault.STUCK
            if after.kind == CONFLICT and self.answers.get(look) != after.mac:
                self.wrong.append(f"{look} a conflict with {after.mac}, which did not answer")
        return Fault.PASS

    # ---- what happens

    def round_of(self, host: Host) -> None:
        host.catch_up()
        host.keeper.run(Once())  # type: ignore[arg-type]

    @rule(name=st.sampled_from(HOSTS))
    def keeper(self, name: str) -> None:
        self.round_of(self.hosts[name])

    @rule(name=st.sampled_from(HOSTS), seconds=ages)
    def time_passes(self, name: str, seconds: float) -> None:
        age(self.hosts[name], seconds)
        for slot in self.hosts[name].stock.all():
            if slot.looked + 100 < time.monotonic():
                self.looks.pop((str(slot.address), slot.token), None)

    @rule(address=st.sampled_from(ADDRESSES), talks=st.booleans(), mac=st.sampled_from((PRINTER, "00:99:99:99:99:99")))
    def a_stranger_comes(self, address: str, talks: bool, mac: str) -> None:
        self.wire.machines[address] = mac
        if talks:
            # Whoever has heard it looks again before the address is given: what was seen before counts no more.
            for each in [each for each in self.looks if each[0] == address]:
                del self.looks[each]
            self.wire.talk(address, mac)

    @rule(address=st.sampled_from(ADDRESSES))
    def a_stranger_goes(self, address: str) -> None:
        self.wire.machines.pop(address, None)

    def ask(self, name: str, address: str = "") -> Reply:
        self.numbers += 1
        options = {MAC: f"02:42:00:00:{self.numbers >> 8:02x}:{self.numbers & 255:02x}"}
        return self.hosts[name].call("RequestAddress", PoolID=self.pool, Address=address, Options=options)

    def given(self, name: str, reply: Reply) -> None:
        address = reply.ok["Address"].removesuffix("/24")
        assert address not in self.holds
        self.holds[address] = name

    @rule(name=st.sampled_from(HOSTS))
    def request(self, name: str) -> None:
        reply = self.ask(name)
        if reply.status == 200:
            return self.given(name, reply)
        assert "full" in reply.error
        leases = self.lan.leases()
        free = [
            each
            for each in ADDRESSES
            if each not in leases or (leases[each].kind, leases[each].host) == (STANDBY, name)
        ]
        assert free == []

    @rule(name=st.sampled_from(HOSTS))
    def request_whose_conversion_hangs(self, name: str) -> None:
        """etcd carries it out much later: after the journal has been carried out."""
        self.stuck = True
        reply = self.ask(name)
        if reply.status == 200:
            self.given(name, reply)
        else:
            assert "full" in reply.error
        self.stuck = False
        self.hosts[name].settle()
        self.all_comes_to_rest()
        assert self.lan.etcd.release_stuck() == 0

    @rule(name=st.sampled_from(HOSTS), address=st.sampled_from(ADDRESSES))
    def request_that_one(self, name: str, address: str) -> None:
        others = self.lan.lease(address)
        reply = self.ask(name, address)
        if reply.status == 200:
            assert others is None or others.kind == CONFLICT or (others.kind, others.host) == (STANDBY, name)
            return self.given(name, reply)
        in_use = address in self.holds or address in self.wire.machines
        assert in_use or (others is not None and others.kind == STANDBY and others.host != name), reply

    @rule(name=st.sampled_from(HOSTS), address=st.sampled_from(ADDRESSES))
    def release(self, name: str, address: str) -> None:
        assert self.hosts[name].release(self.pool, address).status == 200
        if self.holds.get(address) == name:
            del self.holds[address]

    @rule(name=st.sampled_from(HOSTS))
    def restart(self, name: str) -> None:
        self.hosts[name].stop()
        self.lan.hosts.remove(self.hosts[name])
        self.hosts[name] = self.host(name)

    # ---- what always holds

    @invariant()
    def nothing_was_wrong(self) -> None:
        assert self.wrong == []

    @invariant()
    def etcd_and_the_hosts_agree(self) -> None:
        leases = {address: each for address, each in self.lan.leases().items() if each.kind != HOST}
        assert {address: each.host for address, each in leases.items() if each.kind == ENDPOINT} == self.holds
        for name, host in getattr(self, "hosts", {}).items():
            for slot in host.stock.all():
                lease = leases.get(str(slot.address))
                if lease is not None and lease.token == slot.token:
                    assert (lease.kind, lease.host) == (STANDBY, name)

    @rule()
    def all_comes_to_rest(self) -> None:
        """After two rounds of each keeper all standby in etcd is known, and no host keeps more than it should."""
        for _ in range(2):
            for host in self.hosts.values():
                self.round_of(host)
        known = sorted(str(slot.address) for host in self.hosts.values() for slot in host.stock.all())
        assert known == self.lan.of_kind(STANDBY)
        assert all(len(host.stock.all()) <= 2 for host in self.hosts.values())


def test_many_orders_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1, P2, P5: whatever requests, strangers, keepers and restarts do in whatever order, an address is given only
    after a silent look under its very claim; none is given twice, and none is lost.
    """
    monkeypatch.setattr(standby, "PERIOD", 0.0)
    monkeypatch.setattr(standby, "CHECKS_APART", 0.0)
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_standby_that_is_excluded_later_goes() -> None:
    """P2: an operator who excludes a range finds nothing of it claimed, though nobody asks for an address."""
    with Lan() as lan:
        a = lan.host("a", bridge("192.168.1.11/24"), habits=Habits(standby=2))
        a.create(ip_range="192.168.1.16/28")
        a.keep()
        until(lambda: len(a.stock.all()) == 2, "the stock")
        lan.put(KEYS.segment("default"), '{"exclude":["192.168.1.16-192.168.1.29"]}')
        until(lambda: lan.of_kind("standby") == ["192.168.1.30", "192.168.1.31"], "standby outside of it")


def test_a_pool_without_an_interface_is_told(lan: Lan, wire: FakeLan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be looked for an operator hears of it, but not of a bridge that Docker is about to make."""
    monkeypatch.setattr(standby, "LISTEN_AGAIN", 0.0)
    a = lan.host("a", bridge("10.9.9.9/24"), habits=Habits(standby=2), wire=wire)
    a.create()
    a.keep()
    rounds(a)
    assert not a.alarms
    monkeypatch.setattr(standby, "INTERFACE_PATIENCE", -1.0)
    until(lambda: a.alarms, "the alarm")
    assert a.alarms[0][0] == "no_interface"
    assert "no interface of this host has an address in 192.168.1.0/24" in a.alarms[0][1]
