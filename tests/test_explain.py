"""Whose an address is, why it is not given, and who had it: each case is said, and nobody who had it is forgotten."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import RealEtcd
from harness import KEYS, NAME, FakeLan, Host, Lan, bridge
from ipam_plugin import restoration
from ipam_plugin.addresses import address_of, parse_address, parse_range
from ipam_plugin.errors import AddressTaken
from ipam_plugin.explain import Explanation, Facts, Journalled, Local, Verdict, explain, rests_until
from ipam_plugin.ledger import Ledger
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HISTORY_LENGTH,
    HOST,
    RESERVED,
    RESTORED_WAIT,
    ROUTER,
    STANDBY,
    UNREADABLE,
    UNUSED,
    Alive,
    Container,
    History,
    Holder,
    HostAddress,
    Keys,
    Lease,
    Pool,
    Reservation,
    Restored,
    SegmentSettings,
    Tenancy,
    decode,
    encode,
    parse_time,
    read_lease,
)
from ipam_plugin.model import Host as HostRecord
from ipam_plugin.neighbourhood import Habits
from ipam_plugin.operations import Operations
from ipam_plugin.view import Local as ViewLocal
from ipam_plugin.view import View
from properties import leases, pools

NOW = parse_time("2026-11-25T12:00:00Z") or 0.0
ADDRESS = ipaddress.ip_address("10.0.0.5")
POOL = Pool("lan", ipaddress.ip_network("10.0.0.0/24"))
MAC, OTHER_MAC = "02:42:0a:00:00:05", "52:54:00:00:00:01"
WEB = Lease(ENDPOINT, "b", MAC, Container("web"), pool=POOL.id, since="2026-11-25T10:00:00Z", token="t")
B = HostRecord("b", addresses=(HostAddress("10.0.0.12", 24, "br0", OTHER_MAC),), segments=("lan",))


def told(**facts: Any) -> Explanation:
    return explain(Facts("lan", facts.pop("address", ADDRESS), pools=facts.pop("pools", [POOL]), now=NOW, **facts))


def text(explained: Explanation) -> str:
    return "\n".join([explained.headline, *explained.reasons, *explained.notes])


# --- every case ---------------------------------------------------------------------------------------------

SETTINGS = SegmentSettings(
    router="10.0.0.254",
    exclude=("10.0.0.32/28",),
    reserved=(Reservation("10.0.0.64/28", "phones", "ann"),),
    moving=("10.0.0.250",),
)
POOLS = {
    "range": Pool("lan", POOL.subnet, ipaddress.ip_network("10.0.0.128/25")),
    "exclude": Pool("lan", POOL.subnet, exclude=(parse_range("10.0.0.0/28"),)),
}
AGO, AGO_A_MOMENT = "2026-11-25T11:58:00.000Z", "2026-11-25T11:59:30Z"
C, HERE = HostRecord("c", restored="t"), Alive("c", "m", "x", "p")
CASES: dict[str, tuple[dict[str, Any], Verdict, str]] = {
    "nobody": ({}, Verdict.FREE, "10.0.0.5 in segment lan is free"),
    "a container": (
        {"lease": WEB}, Verdict.TAKEN, "container web on host b (MAC 02:42:0a:00:00:05) since 2026-11-25T10:00:00Z",
    ),
    "of a living host": (
        {"lease": WEB, "hosts": {"b": B}, "alive": {"b": Alive("b", "m", "x", "p", since="2026-11-01T00:00:00Z")}},
        Verdict.TAKEN, "host b is alive, its daemon runs since 2026-11-01T00:00:00Z",
    ),
    "of a dead host": (
        {"lease": WEB, "hosts": {"b": HostRecord("b", absent="2026-11-24T00:00:00Z")}},
        Verdict.TAKEN, "host b is away since 2026-11-24T00:00:00Z, and what it has stays taken until it is back",
    ),
    "of a host that nobody knows": ({"lease": WEB}, Verdict.TAKEN, "host b is not in the register"),
    "a host's own": ({"lease": Lease(HOST, "b", MAC, interface="br0")}, Verdict.TAKEN, "Docker host b itself"),
    "a router": (
        {"lease": Lease(ROUTER, holders=(Holder("b", POOL.id),)), "hosts": {"b": B}},
        Verdict.TAKEN, "used by host b, pool lan/10.0.0.0/24",
    ),
    "a reservation": (
        {"lease": Lease(RESERVED, note="printer", by="ann")}, Verdict.TAKEN, "ipam-plugin unreserve 10.0.0.5",
    ),
    "an adopted one": (
        {"lease": Lease(RESERVED, "b", MAC, Container("web"))},
        Verdict.TAKEN, "docker network connect --ip 10.0.0.5 NETWORK web",
    ),
    "a conflict": (
        {"lease": Lease(CONFLICT, mac=OTHER_MAC, by="b", since="2026-11-25T10:00:00Z")},
        Verdict.TAKEN, "asked again at 2026-11-26T10:00:00.000Z",
    ),
    "standby": ({"lease": Lease(STANDBY, "b")}, Verdict.TAKEN, "host b has it tested and ready"),
    "held": (
        {"lease": Lease(HELD, "b", container=Container("web"), until="2026-11-25T12:10:00Z")},
        Verdict.TAKEN, "a hold for container web on host b until 2026-11-25T12:10:00Z",
    ),
    "junk": ({"lease": read_lease(b"?")}, Verdict.TAKEN, "cannot be read"),
    "a key for a range": (
        {"by_hand": ["/p/leases/lan/10.0.0.0/28"]}, Verdict.TAKEN, "the etcd key '/p/leases/lan/10.0.0.0/28' takes it",
    ),
    "excluded in the segment": (
        {"address": "10.0.0.33", "settings": SETTINGS}, Verdict.REFUSED, "it is excluded (10.0.0.32/28)",
    ),
    "a reserved range": (
        {"address": "10.0.0.66", "settings": SETTINGS},
        Verdict.REFUSED, "it is reserved by ann (10.0.0.64/28): phones",
    ),
    "moving": ({"address": "10.0.0.250", "settings": SETTINGS}, Verdict.REFUSED, "it moves between machines"),
    "the segment's router": (
        {"address": "10.0.0.254", "settings": SETTINGS}, Verdict.REFUSED, "it is the segment's router",
    ),
    "unreadable settings": ({"settings": "expected an object"}, Verdict.REFUSED, "so nothing is given out in it"),
    "excluded here": (
        {"local": Local(exclude=(parse_range("10.0.0.0/28"),))},
        Verdict.REFUSED, "the configuration of this machine excludes it (10.0.0.0/28)",
    ),
    "a router here": (
        {"local": Local(routers=(ADDRESS,))}, Verdict.REFUSED, "router, says the configuration of this machine",
    ),
    "a host's, unregistered": (
        {"address": "10.0.0.12", "hosts": {"b": B}}, Verdict.REFUSED, "it is an address of Docker host b itself (br0)",
    ),
    "the network": ({"address": "10.0.0.0"}, Verdict.REFUSED, "the network or broadcast address of 10.0.0.0/24"),
    "the broadcast": ({"address": "10.0.0.255"}, Verdict.REFUSED, "the network or broadcast address of 10.0.0.0/24"),
    "excluded by the network": (
        {"pools": [POOLS["exclude"]]}, Verdict.REFUSED, "--ipam-opt exclude=10.0.0.0/28 keeps it out of pool",
    ),
    "outside the range": (
        {"pools": [POOLS["range"]]}, Verdict.OUTSIDE, "it lies outside --ip-range 10.0.0.128/25 of pool",
    ),
    "outside of one network's range": ({"pools": [POOLS["range"], POOL]}, Verdict.FREE, "is free"),
    "in no subnet": (
        {"address": "10.0.1.5"}, Verdict.OUTSIDE, "no network in use has it in its subnet (10.0.0.0/24)",
    ),
    "no network": ({"pools": []}, Verdict.OUTSIDE, "there is none in this segment"),
    "etcd was restored a moment ago": (
        {"restored": Restored("t", since=AGO_A_MOMENT), "hosts": {"b": B, "c": C}, "alive": {"b": HERE, "c": HERE}},
        Verdict.REFUSED, "etcd was restored at 2026-11-25T11:59:30Z, and nothing is given until host b has written",
    ),
    "etcd was restored, and all have answered": (
        {"restored": Restored("t", since=AGO_A_MOMENT), "hosts": {"c": C}, "alive": {"c": HERE}},
        Verdict.FREE, "is free",
    ),
    "etcd was restored long ago": (
        {"restored": Restored("t", since=AGO), "hosts": {"b": B}, "alive": {"b": HERE}}, Verdict.FREE, "is free",
    ),
    "resting": (
        {"past": [Tenancy(ENDPOINT, "b", until=AGO)]}, Verdict.RESTING, "rests until 2026-11-25T12:03:00.000Z",
    ),
    "freed by a clock that is ahead": (
        {"past": [Tenancy(ENDPOINT, "b", until="2026-11-25T13:00:00Z")]},
        Verdict.RESTING, "rests until 2026-11-25T12:05:00.000Z",
    ),
    "rested": ({"past": [Tenancy(ENDPOINT, "b", until="2026-11-25T11:54:59Z")]}, Verdict.FREE, "is free"),
    "unreserved": ({"past": [Tenancy(RESERVED, until=AGO)]}, Verdict.FREE, "is free"),
    "given from the journal": (
        {"lease": Lease(STANDBY, "b"), "journal": Journalled("given", WEB)},
        Verdict.TAKEN, "given to container web on host b (MAC 02:42:0a:00:00:05) in the journal of this host",
    ),
    "released in the journal": (
        {"lease": WEB, "journal": Journalled("released", None)},
        Verdict.TAKEN, "released in the journal of this host, while etcd was away; etcd does not have it yet",
    ),
    "heard on the wire": (
        {"wire": (OTHER_MAC,)}, Verdict.IN_USE, f"on the wire MAC {OTHER_MAC} answers for it",
    ),
    "used by another machine": (
        {"lease": WEB, "wire": (OTHER_MAC,)}, Verdict.TAKEN, f"MAC {OTHER_MAC} answers for it: another machine uses it",
    ),
    "used by its container": ({"lease": WEB, "wire": (MAC,)}, Verdict.TAKEN, f"{MAC} answers for it (the one in the"),
    "silent": ({"wire": ()}, Verdict.FREE, "nobody answers for it on the wire"),
    "a dead wire": ({"wire": "br0 has no carrier"}, Verdict.FREE, "could not be asked: br0 has no carrier"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_said(name: str) -> None:
    """Whatever keeps an address from a container, the command says which it is."""
    facts, verdict, words = CASES[name]
    if "address" in facts:
        facts = {**facts, "address": ipaddress.ip_address(facts["address"])}
    explained = told(**facts)
    assert explained.verdict is verdict
    assert words in text(explained)
    assert explained.headline.startswith(f"{facts.get('address', ADDRESS)} in segment lan is") or verdict in (
        Verdict.REFUSED,
        Verdict.IN_USE,
    )
    assert (verdict in (Verdict.FREE, Verdict.TAKEN)) or explained.reasons or explained.notes


def test_every_kind_of_lease_is_a_case() -> None:
    """A kind that is added without words of its own is not finished."""
    kinds = {facts["lease"].kind for facts, _, _ in CASES.values() if "lease" in facts}
    assert kinds == {ENDPOINT, HOST, ROUTER, RESERVED, CONFLICT, STANDBY, HELD, UNREADABLE}
    assert {verdict for _, verdict, _ in CASES.values()} == set(Verdict)
    assert restoration.WAIT == RESTORED_WAIT


tenancies = st.builds(
    Tenancy,
    kind=st.sampled_from((ENDPOINT, HELD, RESERVED, CONFLICT)),
    until=st.sampled_from(("", "junk", AGO, "2026-11-25T11:50:00Z", "2026-11-25T13:00:00Z")),
)


@given(pools(), st.data(), st.none() | leases, st.lists(tenancies, max_size=3))
def test_what_is_said_is_what_the_daemon_does(
    pool: Pool, data: st.DataObject, lease: Lease | None, past: list[Tenancy]
) -> None:
    """The verdict agrees with the view that daemons choose from: what is free is chosen, what rests or is taken, kept
    by the settings or outside the range is not."""
    number = data.draw(st.integers(int(pool.subnet.network_address), int(pool.subnet.broadcast_address)))
    address = address_of(pool.subnet.version, number)
    around = parse_range(f"{address}/{address.max_prefixlen}")
    settings = data.draw(st.sampled_from((None, SegmentSettings(exclude=(str(around),)), SegmentSettings())))
    # A daemon's view knows nothing but what is told here.
    view = View(KEYS, "here", lambda segment: ViewLocal(cooldown=300.0), now=lambda: NOW)
    values = [(KEYS.past(pool.segment, address), encode(History(tuple(past))), 1)]
    if settings is not None:
        values.append((KEYS.segment(pool.segment), encode(settings), 2))
    if lease is not None:
        values.append((KEYS.lease(pool.segment, address), encode(lease), 3))
    view.reset(values, 3)
    known = None if lease is None else read_lease(encode(lease))
    facts = Facts(pool.segment, address, known, settings=settings, pools=[pool], past=past, now=NOW)
    verdict = explain(facts).verdict
    chosen = view.may_have(pool, address) and view.entry(pool.segment, address) is None
    assert (verdict in (Verdict.FREE, Verdict.RESTING)) == chosen
    if chosen:
        assert (verdict is Verdict.RESTING) == (rests_until(past, 300.0, NOW) is not None)


# --- who had it ---------------------------------------------------------------------------------------------

PROBING = Habits(standby=0)
PRINTER = "00:11:22:33:44:55"


@pytest.fixture
def wire() -> FakeLan:
    return FakeLan()


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made:
        yield made


def host(lan: Lan, name: str = "a", number: int = 11, hold: float = 0.0, **more: Any) -> Host:
    local = ViewLocal(cooldown=0.0, hold=hold)
    return lan.host(name, bridge(f"192.168.1.{number}/24"), local=lambda segment: local, **more)


def past(lan: Lan, address: str) -> list[Tenancy]:
    value = lan.keys().get(f"{KEYS.history}default/{address}")
    return list(decode(value, History).past) if value else []


def operations(lan: Lan) -> Operations:
    return Operations(lan.etcd, KEYS, "eve@desk")


def test_an_orphan_that_another_container_takes_over(lan: Lan, wire: FakeLan, monkeypatch: pytest.MonkeyPatch) -> None:
    """dockerd lost a container, and `--ip` gave its address to the next: the history says who had it until then."""
    for number, habits in enumerate((Habits(probe="off"), PROBING)):
        a = host(lan, f"a{number}", 11 + number, habits=habits, wire=wire)
        pool = a.create()
        address = f"192.168.1.{100 + number}"
        a.endpoint(pool, address, **{NAME: "old"})
        a.catch_up()
        monkeypatch.setattr(a.reconciler, "is_gone", lambda *asked: True)  # its proofs are in test_reconcile.py
        assert a.endpoint(pool, address, **{NAME: "new"}).status == 200, habits
        [old] = past(lan, address)
        assert (old.kind, old.host) == (ENDPOINT, a.name)
        assert old.container == Container("old")
        assert old.since <= old.until
        assert old.why


def test_a_hold_that_gives_way(lan: Lan) -> None:
    """A full pool: the oldest hold ends for another container, and both are told. One that comes back is not new."""
    a = host(lan, hold=600)
    pool = a.create(ip_range="192.168.1.16/31")
    web = a.endpoint(pool, "192.168.1.16", **{NAME: "web"}).ok["Address"].partition("/")[0]
    a.endpoint(pool, "192.168.1.17", **{NAME: "db"})
    a.release(pool, web)
    a.endpoint(pool, **{NAME: "web"})
    assert [each.kind for each in past(lan, web)] == [ENDPOINT], "it came back"
    a.release(pool, web)
    assert a.endpoint(pool, **{NAME: "mail"}).ok["Address"].startswith(web)
    assert [(each.kind, each.container) for each in past(lan, web)] == [
        (HELD, Container("web")),
        (ENDPOINT, Container("web")),
        (ENDPOINT, Container("web")),
    ]
    assert past(lan, web)[0].why.startswith("given to container mail on host a")


def test_a_strangers_address_that_is_given_by_name(lan: Lan, wire: FakeLan) -> None:
    """`--ip` on a conflict asks anew: silent, the container gets it, and the stranger stands in the history; while it
    answers nothing has ended."""
    a = host(lan, habits=PROBING, wire=wire)
    pool = a.create()
    address = "192.168.1.140"
    wire.machines[address] = PRINTER
    assert "in use on the wire" in a.endpoint(pool, address).error
    assert "in use on the wire" in a.endpoint(pool, address).error
    assert past(lan, address) == []
    del wire.machines[address]
    assert a.endpoint(pool, address, **{NAME: "web"}).status == 200
    [stranger] = past(lan, address)
    assert (stranger.kind, stranger.mac, stranger.by) == (CONFLICT, PRINTER, "a")
    assert stranger.why.startswith("given to container web on host a")


def test_a_held_address_that_a_stranger_took(lan: Lan, wire: FakeLan) -> None:
    """The hold ended, and not in silence."""
    a = host(lan, hold=600, habits=PROBING, wire=wire)
    pool = a.create()
    address = "192.168.1.100"
    a.endpoint(pool, address, **{NAME: "web"})
    a.release(pool, address)
    wire.machines[address] = PRINTER
    assert "in use on the wire" in a.endpoint(pool, address).error
    assert [each.kind for each in past(lan, address)] == [HELD, ENDPOINT]
    assert PRINTER in past(lan, address)[0].why


def test_reservations_leave_their_trace(lan: Lan) -> None:
    """Over a stranger, changed, and undone: who said so, what for, from when to when."""
    lan.put(f"{KEYS.leases}default/192.168.1.140", encode(Lease(CONFLICT, mac=PRINTER, by="a", token="x")))
    ops = operations(lan)
    [one] = [parse_range("192.168.1.140")]
    ops.reserve(one, "default", "printer")
    ops.reserve(one, "default", "printer, 2nd floor")
    ops.unreserve(one, "default")
    lan.put(f"{KEYS.leases}default/192.168.1.140", "mine")
    ops.unreserve(one, "default")
    assert [(each.kind, each.note.partition(" (")[0]) for each in past(lan, "192.168.1.140")] == [
        (UNREADABLE, "'mine'"),
        (RESERVED, "printer, 2nd floor"),
        (RESERVED, "printer"),
        (CONFLICT, ""),
    ]
    assert [each.by for each in past(lan, "192.168.1.140")][1:] == ["eve@desk", "eve@desk", "a"]
    assert past(lan, "192.168.1.140")[-1].why == "replaced by a reservation by eve@desk: printer"


def test_the_timeline_of_an_address(lan: Lan) -> None:
    """Who had it, from when to when, on which host and why that ended, whatever happened: no holder is missing, and
    none overlaps the next."""
    a, b = host(lan, "a", 11), host(lan, "b", 12)
    address = "192.168.1.100"
    pool = a.create()
    b.create()
    expected = []
    for number in range(HISTORY_LENGTH + 2):
        holder = (a, b)[number % 2]
        holder.catch_up()
        assert holder.endpoint(pool, address, **{NAME: f"c{number}"}).status == 200
        expected.append((holder.name, f"c{number}"))
        holder.catch_up()
        holder.release(pool, address)
    [facts] = operations(lan).facts(parse_address(address), "default", "default")
    explained = explain(facts)
    found = [(each.host, each.container.name if each.container else "") for each in explained.past]
    assert found == expected[::-1][:HISTORY_LENGTH]
    for later, earlier in zip(explained.past, explained.past[1:], strict=False):
        assert earlier.since <= earlier.until <= later.since <= later.until
    assert {each.why for each in explained.past} == {"released"}


@pytest.mark.etcd
def test_on_a_real_etcd(etcd: RealEtcd) -> None:
    """A takeover is one transaction on what was read: the lease and its history change together, or neither does."""
    keys = Keys(etcd.prefix)
    view = View(keys, "a")
    ledger = Ledger(etcd.client, view, keys, "a")
    pool = Pool("default", ipaddress.ip_network("10.0.0.0/24"))
    deadline = time.monotonic() + 20
    claim = ledger.claim(pool, ADDRESS)
    ledger.change(claim, lambda lease, claim: Lease(ENDPOINT, "a", MAC, token="one", since=claim.now), deadline)
    before = dict(ledger.transactions)

    def replace(lease: Lease | None, claim: Any) -> Lease:
        assert lease is not None
        if lease.token != "one":
            raise AddressTaken("it is another's")
        return Lease(ENDPOINT, "a", OTHER_MAC, token="two", since=claim.now)

    ledger.change(claim, replace, deadline)
    assert ledger.transactions["grant"] == before["grant"] + 1
    ops = Operations(etcd.client, keys, "eve")
    [facts] = ops.facts(ADDRESS, "default", "default")
    assert facts.lease is not None
    assert facts.lease.token == "two"
    assert [(each.mac, each.kind) for each in facts.past] == [(MAC, ENDPOINT)]
    lease, history = (
        etcd.client.get(key, deadline=deadline)
        for key in (keys.lease("default", ADDRESS), keys.past("default", ADDRESS))
    )
    assert lease is not None
    assert history is not None
    assert lease.revision == history.revision, "one transaction"
    with pytest.raises(AddressTaken):
        ledger.change(claim, replace, deadline)
    after = etcd.client.get(keys.past("default", ADDRESS), deadline=deadline)
    assert after is not None
    assert after.revision == history.revision


def test_a_grant_from_standby_costs_one_write(lan: Lan, wire: FakeLan) -> None:
    """Design section 11: what a request does in etcd stays one transaction of one key, with no question before it."""
    a = host(lan, habits=Habits(standby=2), wire=wire)
    pool = a.create()
    a.catch_up()
    slot = a.claims.find(Pool.parse(pool), time.monotonic() + 30, purpose="standby")
    assert a.stock.put(slot)
    asked: list[int] = []
    writes: list[int] = []

    get_many, commit = a.etcd.get_many, a.etcd.commit

    def counted_get(keys: Any, *, deadline: float) -> Any:
        asked.append(len(keys))
        return get_many(keys, deadline=deadline)

    def counted_commit(expect: Any, told: Any, *, deadline: float, proof: Any = None) -> Any:
        writes.append(len(told))
        return commit(expect, told, deadline=deadline, proof=proof)

    a.etcd.get_many, a.etcd.commit = counted_get, counted_commit  # type: ignore[method-assign]
    try:
        address = a.run(pool)
    finally:
        a.etcd.get_many, a.etcd.commit = get_many, commit  # type: ignore[method-assign]
    assert address == str(slot.address)
    assert (asked, writes) == ([], [1])


def test_old_records_are_read(lan: Lan) -> None:
    """What a version before this one wrote has neither note nor author, and what comes after it may have more."""
    lan.put(f"{KEYS.history}default/192.168.1.9", json.dumps({"past": [{"kind": "endpoint", "later": 1}]}))
    [facts] = operations(lan).facts(parse_address("192.168.1.9"), "default", "default")
    [each] = facts.past
    assert each.who() == "a container"
    assert Tenancy(ROUTER, "a, b").who() == "a router or auxiliary address of host a, b"
    assert Tenancy(HELD, "a", container=Container("web")).who() == "held for container web on host a"
    assert UNUSED == (HELD, RESERVED, UNREADABLE)
