"""Addresses that are kept for stopped containers: who gets them back, and what ends the keeping."""

from __future__ import annotations

import datetime
import functools
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import properties  # noqa: F401  # the settings of hypothesis
from fakes import Fault
from harness import KEYS, MAC, NAME, PATIENCE, FakeLan, Host, Lan, bridge, until
from ipam_plugin import decisions
from ipam_plugin.decisions import FREE, KEEP, Claim
from ipam_plugin.evidence import APART, Known, Look, Unclaimed, unclaimed
from ipam_plugin.model import (
    ENDPOINT,
    HELD,
    STANDBY,
    Container,
    History,
    Lease,
    Pool,
    Tenancy,
    decode,
    encode,
    parse_time,
    rfc3339,
)
from ipam_plugin.neighbourhood import Habits
from ipam_plugin.view import Local

FIXED = "02:00:5e:00:00:07"  # as --mac-address gives it
TINY = "192.168.1.16/30"  # a range of four addresses


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as lan:
        yield lan


def host(lan: Lan, name: str = "a", number: int = 11, **more: Any) -> Host:
    return lan.host(name, bridge(f"192.168.1.{number}/24"), local=lambda segment: Local(cooldown=0.0, hold=600), **more)


def start(host: Host, pool: str, address: str = "", **options: str) -> str:
    return str(host.endpoint(pool, address, **options).ok["Address"]).partition("/")[0]


def stop(host: Host, pool: str, address: str) -> None:
    assert host.release(pool, address).status == 200


def kind(lan: Lan, address: str) -> str:
    lease = lan.lease(address)
    return lease.kind if lease else ""


def past(lan: Lan, address: str) -> list[tuple[str, str]]:
    value = lan.keys().get(f"{KEYS.history}default/{address}")
    return [(each.kind, each.why.partition(" until")[0]) for each in decode(value, History).past] if value else []


# ------------------------------------------------------------------------------ who is recognised


@pytest.mark.parametrize("habits", [Habits(probe="off"), Habits(standby=0)], ids=["register alone", "wire asked"])
def test_hiero_local_node_1395_a_dynamic_container_does_not_get_the_stopped_ones_address(
    lan: Lan, habits: Habits
) -> None:
    """hiero-ledger/hiero-local-node#1395: after a power cut Docker releases all addresses and starts the containers in
    any order; one without `--ip` took the static address of another, which then did not start.
    """
    a = host(lan, habits=habits)
    pool = a.create(ip_range=TINY)
    static = start(a, pool, "192.168.1.17")
    moving = [start(a, pool), start(a, pool)]
    for each in (static, *moving):
        stop(a, pool, each)
    assert static not in [start(a, pool) for _ in range(3)]
    assert start(a, pool, static) == static
    assert kind(lan, static) == ENDPOINT


def test_libnetwork_1057_a_stopped_container_keeps_its_address_until_it_returns(lan: Lan) -> None:
    """moby/libnetwork#1057, #1038: a driver cannot tell stop from rm, so it has to keep what may come back."""
    a = host(lan)
    pool = a.create()
    address = start(a, pool, **{NAME: "web"})
    stop(a, pool, address)
    held = lan.lease(address)
    assert held is not None
    assert (held.kind, held.host, held.pool) == (HELD, "a", pool)
    assert held.container == Container("web")
    began, end = parse_time(held.since), parse_time(held.until)
    assert began is not None
    assert end is not None
    assert end - began == 600
    assert start(a, pool, **{NAME: "db"}) != address
    assert start(a, pool) != address
    assert start(a, pool, **{NAME: "web"}) == address
    lease = lan.lease(address)
    assert lease is not None
    assert (lease.kind, lease.container, lease.until) == (ENDPOINT, Container("web"), "")
    assert lease.token != held.token


def test_a_mac_is_known_from_its_second_stop_on(lan: Lan) -> None:
    """Docker's own MACs are new each time, so one that comes again was given with --mac-address."""
    a = host(lan)
    pool = a.create()
    first = start(a, pool, **{MAC: FIXED})
    stop(a, pool, first)
    assert kind(lan, first) == ""
    second = start(a, pool, **{MAC: FIXED})
    stop(a, pool, second)
    assert kind(lan, second) == HELD
    assert start(a, pool) != second
    assert start(a, pool, **{MAC: FIXED}) == second
    stop(a, pool, second)
    assert kind(lan, second) == HELD


def test_a_container_that_cannot_be_recognised_is_not_kept(lan: Lan) -> None:
    a = host(lan)
    pool = a.create()
    address = start(a, pool)
    stop(a, pool, address)
    assert lan.lease(address) is None
    # A name that the look at dockerd filled in: this engine's next request does not carry it.
    address = start(a, pool)
    lease = lan.lease(address)
    assert lease is not None
    named = msgspec.structs.replace(lease, container=Container("web", "id"))
    lan.put(KEYS.lease("default", ipaddress.ip_address(address)), encode(named))
    stop(a, pool, address)
    assert lan.lease(address) is None


def test_hold_is_off_by_default_and_the_network_has_the_last_word(lan: Lan) -> None:
    a = lan.host("a", bridge("192.168.1.11/24"))
    b = host(lan, "b", 12)
    for one, pool, expected in (
        (a, a.create(), ""),
        (a, a.create(hold="10m"), HELD),
        (b, b.create(), HELD),
        (b, b.create(hold="0"), ""),
    ):
        address = start(one, pool, "192.168.1.77")
        stop(one, pool, address)
        assert kind(lan, address) == expected
        lan.delete(KEYS.lease("default", ipaddress.ip_address(address)))


def test_a_held_address_is_refused_to_others_and_the_sentence_says_for_whom(lan: Lan) -> None:
    """P7: which container of which host, and until when."""
    wire = FakeLan()
    a, b = (host(lan, name, number, habits=Habits(standby=0), wire=wire) for name, number in (("a", 11), ("b", 12)))
    pool = a.create()
    b.create()
    address = start(a, pool, "192.168.1.77", **{NAME: "web"})
    stop(a, pool, address)
    wire.probed.clear()
    held = lan.lease(address)
    assert held is not None
    for refusal in (a.endpoint(pool, address, **{NAME: "db"}).error, b.endpoint(pool, address).error):
        assert f"a hold for container web on host a until {held.until}" in refusal
        assert f"ipam-plugin release {address} --force" in refusal
    assert lan.lease(address) == held
    assert wire.probed == []  # nobody waits for the wire to be refused
    assert start(a, pool, address, **{NAME: "web"}) == address


def test_a_release_of_a_held_address_changes_nothing(lan: Lan) -> None:
    """P3: late or repeated, it finds another token."""
    a = host(lan)
    pool = a.create()
    address = start(a, pool, "192.168.1.77")
    stop(a, pool, address)
    held = lan.lease(address)
    stop(a, pool, address)
    assert lan.lease(address) == held


# ------------------------------------------------------------------------------------- the wire


def test_a_returning_containers_address_is_looked_at_first(lan: Lan) -> None:
    """P2: while nobody had it a machine may have begun to use it. The container gets another one then."""
    wire = FakeLan()
    a = host(lan, habits=Habits(standby=0), wire=wire)
    pool = a.create()
    web, static = start(a, pool, **{NAME: "web"}), start(a, pool, "192.168.1.77")
    for each in (web, static):
        stop(a, pool, each)
    wire.probed.clear()
    assert start(a, pool, **{NAME: "web"}) == web
    assert wire.probed == [ipaddress.ip_address(web)]
    stop(a, pool, web)
    wire.machines.update({web: "52:54:00:00:00:09", static: "52:54:00:00:00:09"})
    assert start(a, pool, **{NAME: "web"}) != web
    assert "is in use on the wire" in a.endpoint(pool, static).error
    assert (kind(lan, web), kind(lan, static)) == ("conflict", "conflict")


def test_a_look_that_proves_nothing_leaves_the_hold(lan: Lan) -> None:
    wire = FakeLan()
    a = host(lan, habits=Habits(standby=0, refuse=True), wire=wire)
    pool = a.create()
    address = start(a, pool, "192.168.1.77")
    stop(a, pool, address)
    held = lan.lease(address)
    wire.failed = "no carrier"
    assert "the wire cannot be heard" in a.endpoint(pool, address).error
    assert lan.lease(address) == held
    wire.failed = ""
    assert start(a, pool, address) == address


def test_a_held_address_whose_handing_out_fails_is_no_standby(lan: Lan) -> None:
    """What is held is not in the stock, from where anybody would get it."""
    wire = FakeLan()
    a = host(lan, habits=Habits(standby=0), wire=wire)
    pool = a.create()
    address = start(a, pool, **{NAME: "web"})
    stop(a, pool, address)
    a.fill_disk()
    wire.before_answer = lambda asked: lan.etcd.set_down(True)
    assert a.endpoint(pool, **{NAME: "web"}).status == 503
    wire.before_answer = lambda asked: None
    lan.etcd.set_down(False)
    a.settle()
    assert a.stock.all() == []
    assert kind(lan, address) == HELD
    assert start(a, pool) != address
    assert start(a, pool, **{NAME: "web"}) == address


def test_a_held_address_that_returns_without_etcd(lan: Lan) -> None:
    """It is this host's in etcd already: given from the journal, and no end of the hold takes it away meanwhile."""
    wire = FakeLan()
    a = host(lan, habits=Habits(standby=0), wire=wire)
    pool = a.create()
    address = start(a, pool, **{NAME: "web"})
    stop(a, pool, address)
    lan.etcd.set_down(True)
    assert start(a, pool, **{NAME: "web"}) == address
    lan.etcd.set_down(False)
    a.ahead = 10_000.0
    a.holds.tend()
    assert kind(lan, address) == HELD
    a.settle()
    assert kind(lan, address) == ENDPOINT


def test_a_hold_whose_end_is_on_its_way_is_not_given_from_the_journal(lan: Lan) -> None:
    """P1: etcd may carry the end out at any moment, and then the address is anybody's."""
    a = host(lan, habits=Habits(standby=0), wire=FakeLan())
    pool = a.create()
    address = start(a, pool, **{NAME: "web"})
    stop(a, pool, address)
    lan.etcd.faults.append(Fault.STUCK)
    a.ahead = 10_000.0
    a.holds.tend()
    lan.etcd.set_down(True)
    assert "etcd does not say" in a.endpoint(pool, **{NAME: "web"}).error
    lan.etcd.set_down(False)
    assert lan.etcd.release_stuck() == 1
    a.settle()
    assert lan.lease(address) is None


def test_what_the_journal_gave_is_not_offered_as_held(lan: Lan) -> None:
    """P1: until the journal is carried out it looks held in etcd, also to a request that finds nothing else free."""
    a = host(lan, habits=Habits(standby=0), wire=FakeLan(), time_limit=2.0)
    pool = a.create(ip_range="192.168.1.64/31")
    address = start(a, pool, **{NAME: "web"})
    start(a, pool)
    stop(a, pool, address)
    lan.etcd.set_down(True)
    assert start(a, pool, **{NAME: "web"}) == address
    lan.etcd.set_down(False)
    a.outage._ended()  # it answers again, and knows nothing yet of what was given
    assert a.endpoint(pool).status != 200
    a.settle()
    assert kind(lan, address) == ENDPOINT
    assert not a.alarms


# ------------------------------------------------------------------------------------- its ends


def test_a_hold_ends_by_the_clock_also_after_a_restart(lan: Lan) -> None:
    a = host(lan)
    pool = a.create()
    address = start(a, pool, "192.168.1.77")
    stop(a, pool, address)
    a.stop()
    again = lan.host("a", bridge("192.168.1.11/24"))  # hold is off by now; what was promised stays
    again.catch_up()
    again.ahead = 590
    again.holds.tend()
    assert kind(lan, address) == HELD
    again.ahead = 601
    again.holds.tend()
    assert kind(lan, address) == ""
    assert past(lan, address) == [(HELD, "hold ended"), (ENDPOINT, "stopped, held")]


def test_a_hold_without_a_readable_end_ends(lan: Lan) -> None:
    """P5: whatever was edited by hand."""
    a = host(lan)
    lan.put(f"{KEYS.leases}default/192.168.1.77", encode(Lease(HELD, "a", until="for ever", token="t")))
    a.catch_up()
    a.holds.tend()
    assert kind(lan, "192.168.1.77") == ""


def test_another_hosts_hold_is_not_ended(lan: Lan) -> None:
    """P3."""
    a, b = host(lan), host(lan, "b", 12)
    pool = a.create()
    address = start(a, pool, "192.168.1.77")
    stop(a, pool, address)
    b.catch_up()
    b.ahead = 10_000
    b.holds.tend()
    for at in (0.0, 100.0):
        b.holds.looked(look(at))
    assert kind(lan, address) == HELD


def test_an_address_rests_since_its_container_stopped(lan: Lan) -> None:
    """The cooldown is for what was in use a moment ago; a hold that ended does not add to it."""
    a = lan.host("a", bridge("192.168.1.11/24"), local=lambda segment: Local(cooldown=300.0))
    now = datetime.datetime.now(datetime.UTC)
    for number, ago in ((77, 400), (78, 100)):
        stopped = rfc3339(now - datetime.timedelta(seconds=ago))
        past = (Tenancy(HELD, "a", since=stopped, until=rfc3339(now)), Tenancy(ENDPOINT, "a", FIXED, until=stopped))
        lan.put(f"{KEYS.history}default/192.168.1.{number}", encode(History(past)))
    a.catch_up()
    resting = a.view._segment("default").families[4].resting
    assert [int(ipaddress.ip_address(f"192.168.1.{number}")) in resting for number in (77, 78)] == [False, True]
    assert a.view.has_ended(FIXED)


# ----------------------------------------------------------------------------------------- shortage


@pytest.mark.parametrize("habits", [Habits(probe="off"), Habits(standby=0)], ids=["register alone", "wire asked"])
def test_the_oldest_hold_gives_way_when_nothing_else_is_free(lan: Lan, habits: Habits) -> None:
    a = host(lan, habits=habits)
    pool = a.create(ip_range=TINY)
    static = [start(a, pool, f"192.168.1.{number}") for number in (18, 16, 19)]
    for each in static:
        stop(a, pool, each)
        time.sleep(0.002)  # `since` has milliseconds
    assert start(a, pool) == "192.168.1.17"
    assert [start(a, pool), start(a, pool), start(a, pool)] == static
    assert "4 addresses: 4 endpoint" in a.endpoint(pool).error


@pytest.mark.parametrize("habits", [Habits(probe="off"), Habits(standby=0)], ids=["register alone", "wire asked"])
def test_another_host_gets_the_oldest_hold_when_nothing_else_is_free(lan: Lan, habits: Habits) -> None:
    """One at a time: what nobody waits for is kept."""
    a, b = host(lan, habits=habits), host(lan, "b", 12, habits=habits)
    alive(lan, "a")
    pool = a.create(ip_range=TINY)
    b.create(ip_range=TINY)
    static = [start(a, pool, f"192.168.1.{number}") for number in (18, 16, 17, 19)]
    for each in static:
        stop(a, pool, each)
        time.sleep(0.002)
    a.tend_holds()
    assert start(b, pool) == static[0]
    assert lan.of_kind(HELD) == sorted(static[1:])
    assert past(lan, static[0])[0] == (HELD, "another host had nothing free")
    assert start(b, pool) == static[1]


def test_a_host_that_waits_gets_no_hold_while_there_is_anything_else(lan: Lan) -> None:
    """What is free, and standby, which its owner is about to give back."""
    a = host(lan)
    pool = a.create(ip_range=TINY)
    static = start(a, pool, "192.168.1.16")
    stop(a, pool, static)
    lan.put(KEYS.want(Pool.parse(pool), "b"), b"{}")
    a.catch_up()
    a.holds.tend()
    assert kind(lan, static) == HELD
    for number in (17, 18, 19):
        start(a, pool, f"192.168.1.{number}")
    key = KEYS.lease("default", ipaddress.ip_address("192.168.1.19"))
    lan.put(key, encode(Lease(STANDBY, "a", pool=pool, token="t")))
    a.catch_up()
    a.holds.tend()
    assert kind(lan, static) == HELD
    lan.put(key, encode(Lease(ENDPOINT, "a", pool=pool, token="t")))
    a.catch_up()
    a.holds.tend()
    assert kind(lan, static) == ""


def test_standby_is_given_back_before_a_hold(lan: Lan) -> None:
    a = host(lan, habits=Habits(standby=0))
    b = host(lan, "b", 12, habits=Habits(standby=1))
    alive(lan, "b")
    pool = a.create(ip_range="192.168.1.16/28")
    b.create(ip_range="192.168.1.16/28")
    static = start(a, pool, "192.168.1.17")
    stop(a, pool, static)
    b.keep()
    until(lambda: lan.of_kind(STANDBY), "standby of b")
    [spare] = lan.of_kind(STANDBY)
    given = [start(a, pool) for _ in range(15)]
    assert spare in given
    assert static not in given
    assert start(a, pool) == static


def test_a_dead_hosts_holds_stay_and_are_named(lan: Lan) -> None:
    """P5: its addresses come back only by proof."""
    a, b = host(lan), host(lan, "b", 12)
    pool = a.create(ip_range=TINY)
    b.create(ip_range=TINY)
    for number in (16, 17, 18, 19):
        stop(a, pool, start(a, pool, f"192.168.1.{number}"))
    refusal = b.endpoint(pool).error
    assert "4 held" in refusal
    assert "what is held of a, which cannot be reached, stays taken" in refusal


def alive(lan: Lan, name: str) -> None:
    lan.put(KEYS.heartbeat(name), b"{}")


# ------------------------------------------------------------------------------ the look at dockerd


def look(at: float, engine: str = "one", **containers: Known) -> Look:
    return Look(at, at + 0.1, engine, (), (), frozenset(), containers)


def known(name: str = "", *fixed: str, running: bool = False) -> Known:
    return Known(name, "alpine", running, frozenset(map(ipaddress.ip_address, fixed)))


ADDRESS = ipaddress.ip_address("192.168.1.77")
BY_ADDRESS = Lease(HELD, "a", fixed=True)
BY_NAME = Lease(HELD, "a", container=Container("web"), known=True)
BY_ID = Lease(HELD, "a", container=Container("web", "id-1"), fixed=True)
BY_MAC = Lease(HELD, "a", mac=FIXED, known=True)


@pytest.mark.parametrize(
    ("held", "containers", "over"),
    [
        (BY_ADDRESS, {}, True),
        (BY_ADDRESS, {"id": known("x", "192.168.1.77")}, False),
        (BY_ADDRESS, {"id": known("x", "192.168.1.78")}, True),
        (BY_NAME, {}, True),
        (BY_NAME, {"id": known("web")}, False),
        (BY_NAME, {"id": known("db")}, True),
        (BY_ID, {"id-1": known("renamed")}, False),
        (BY_ID, {"id-2": known("web")}, False),  # made again under the same name
        (BY_ID, {"id-2": known("db", "192.168.1.77")}, False),
        (BY_ID, {"id-2": known("db")}, True),
        (BY_MAC, {}, False),  # cannot be told
    ],
)
def test_a_hold_is_over_when_nobody_could_come_back(held: Lease, containers: dict[str, Known], over: bool) -> None:
    first = unclaimed(None, held, ADDRESS, look(100, "one", **containers))
    assert not first.is_over
    assert not unclaimed(first, held, ADDRESS, look(100 + APART - 1, "one", **containers)).is_over
    assert unclaimed(first, held, ADDRESS, look(101 + APART, "one", **containers)).is_over == over


looks = st.lists(
    st.tuples(st.sampled_from((1.0, 20.0, 31.0)), st.sampled_from(("one", "one", "two")), st.booleans()), max_size=8
)


@given(looks)
def test_only_one_engine_that_never_shows_it_ends_a_hold(steps: list[tuple[float, str, bool]]) -> None:
    """Two looks of the first engine, APART, and no look between them that shows the container or is another
    engine's."""
    at, found, absent_since = 0.0, None, None
    first = steps[0][1] if steps else ""
    for pause, engine, shown in steps:
        at += pause
        found = unclaimed(found, BY_NAME, ADDRESS, look(at, engine, **({"id": known("web")} if shown else {})))
        before = absent_since
        if engine != first or shown:
            absent_since = None
        elif absent_since is None:
            absent_since = at + 0.1
        expected = before is not None and absent_since is not None and at - before >= APART
        assert found.is_over == expected
        assert isinstance(found, Unclaimed)


def test_rm_ends_a_hold(lan: Lan) -> None:
    a = host(lan)
    pool = a.create()
    gone, stopped = start(a, pool, "192.168.1.77"), start(a, pool, **{NAME: "web"})
    for each in (gone, stopped):
        stop(a, pool, each)
    a.catch_up()
    for at in (0.0, 10.0):
        a.holds.looked(look(at, web=known("web")))
    assert lan.of_kind(HELD) == sorted((gone, stopped))
    a.holds.looked(look(31.0, web=known("web")))
    assert lan.of_kind(HELD) == [stopped]
    assert past(lan, gone)[0] == (HELD, "container removed")


def test_a_hold_that_began_anew_is_not_ended_by_earlier_looks(lan: Lan) -> None:
    """P3: the token is another one."""
    a = host(lan)
    pool = a.create()
    address = start(a, pool, "192.168.1.77")
    stop(a, pool, address)
    a.holds.looked(look(0.0))
    assert start(a, pool, address) == address
    stop(a, pool, address)
    a.holds.looked(look(31.0))
    assert kind(lan, address) == HELD


# --------------------------------------------------------------------------------------- at once


def test_only_one_of_two_requests_gets_it(lan: Lan) -> None:
    """P1: `--ip` and a name ask for one held address at the same moment."""
    wire = FakeLan()
    a = host(lan, habits=Habits(standby=0), wire=wire)
    pool = a.create()
    for _ in range(5):
        address = start(a, pool, **{NAME: "web"})
        stop(a, pool, address)
        both = threading.Barrier(2, timeout=PATIENCE)
        met: list[int] = []

        def meet(asked: Any, both: threading.Barrier = both, met: list[int] = met) -> None:
            if len(met) < 2:
                met.append(1)
                both.wait()

        wire.before_answer = meet
        got: list[str] = []
        asks: list[Callable[[], Any]] = [
            functools.partial(a.endpoint, pool, address),
            functools.partial(a.endpoint, pool, **{NAME: "web"}),
        ]

        def ask(how: Callable[[], Any], got: list[str] = got) -> None:
            reply = how()
            if reply.status == 200:
                got.append(reply.ok["Address"].partition("/")[0])

        threads = [threading.Thread(target=ask, args=(how,)) for how in asks]
        for each in threads:
            each.start()
        for each in threads:
            each.join(PATIENCE)
            assert not each.is_alive()
        wire.before_answer = lambda asked: None
        assert len(set(got)) == len(got)
        assert got.count(address) == 1
        for each in got:
            stop(a, pool, each)
        for each in lan.of_kind(HELD):
            lan.delete(KEYS.lease("default", ipaddress.ip_address(each)))


# ------------------------------------------------------------------------------------ the decisions

POOL = Pool.make("10.0.0.0/24", "", {}, "lan")
CLAIM = Claim("here", POOL, ipaddress.ip_address("10.0.0.5"), "2025-01-01T00:00:00.000Z", "new-token")
endpoints = st.builds(
    Lease,
    kind=st.just(ENDPOINT),
    host=st.sampled_from(("here", "there")),
    mac=st.sampled_from(("", FIXED)),
    container=st.none() | st.builds(Container, st.sampled_from(("", "web"))),
    pool=st.sampled_from((POOL.id, "lan/10.0.0.0/16")),
    token=st.sampled_from(("old-token", "other")),
    noted=st.integers(0, 2),
    fixed=st.booleans(),
    known=st.booleans(),
)


@given(endpoints, st.booleans(), st.sampled_from((0.0, 0.5, 600.0)))
def test_what_a_release_may_hold(lease: Lease, carried: bool, hold: float) -> None:
    """P3: a hold begins where the address would be free, of a container that can be recognised, and nowhere else."""
    decide = functools.partial(decisions.give_back, token="old-token", carried=carried, kept_router=False)
    without, decision = decide(lease, CLAIM), decide(lease, CLAIM, hold=hold)
    if without is not FREE or hold == 0 or not (lease.fixed or lease.known):
        assert decision == without
        return
    assert isinstance(decision, Lease)
    assert (decision.kind, decision.host, decision.token) == (HELD, "here", "new-token")
    kept = ("mac", "container", "pool", "fixed", "known")
    assert [getattr(decision, name) for name in kept] == [getattr(lease, name) for name in kept]
    end = datetime.datetime.fromisoformat(decision.until) - datetime.datetime.fromisoformat(decision.since)
    assert end == datetime.timedelta(seconds=hold)
    assert decide(decision, CLAIM) is KEEP
    assert decisions.end_hold(decision, CLAIM, "new-token") is FREE
    assert decisions.end_hold(decision, CLAIM, "old-token") is KEEP
    assert decisions.end_hold(decision, CLAIM._replace(host="there"), "new-token") is KEEP
    assert decisions.end_hold(lease, CLAIM, lease.token) is KEEP


@pytest.mark.parametrize(
    ("name", "mac", "asking", "asking_mac", "expected"),
    [
        ("web", FIXED, "web", "02:42:00:00:00:01", True),
        ("web", FIXED, "db", FIXED, False),  # two containers may have been given one MAC
        ("web", FIXED, "", FIXED, True),
        ("", FIXED, "db", FIXED, True),
        ("", "", "", "", False),
        ("", "", "db", "", False),
        ("web", FIXED, "", "02:42:00:00:00:01", False),
    ],
)
def test_for_whom_an_address_is_held(name: str, mac: str, asking: str, asking_mac: str, expected: bool) -> None:
    lease = Lease(HELD, "here", mac, Container(name) if name else None, POOL.id)
    container = Container(asking) if asking else None
    assert decisions.is_held_for(lease, POOL, asking_mac, container) == expected
    elsewhere = msgspec.structs.replace(lease, pool="lan/10.0.0.0/16")
    assert not decisions.is_held_for(elsewhere, POOL, asking_mac, container)


# ---------------------------------------------------------------------------------- an outage of etcd


def test_holds_in_an_outage_of_etcd(lan: Lan) -> None:
    """What is held is this host's in etcd, like standby: its container returns from the journal. One that stops
    meanwhile is held as soon as etcd knows of it, and no hold ends under a container that has its address again.
    """
    wire = FakeLan()
    a = host(lan, habits=Habits(standby=0), wire=wire, time_limit=5.0)
    pool = a.create()
    returns, stops = start(a, pool, "192.168.1.77"), start(a, pool, "192.168.1.78")
    stop(a, pool, returns)
    lan.etcd.set_down(True)
    assert start(a, pool, returns) == returns
    stop(a, pool, stops)
    lan.etcd.set_down(False)
    a.catch_up()
    assert (kind(lan, returns), kind(lan, stops)) == (HELD, ENDPOINT)
    a.ahead = 10_000
    a.holds.tend()
    assert kind(lan, returns) == HELD
    a.settle()
    assert (kind(lan, returns), kind(lan, stops)) == (ENDPOINT, HELD)
