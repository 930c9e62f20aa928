"""The comparison of register, Docker and wire: each difference is found when it is there, and none where all agree."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import properties  # noqa: F401  # hypothesis' settings
from harness import bridge
from ipam_plugin.addresses import Range, parse_address
from ipam_plugin.check import (
    Difference,
    Engine,
    PoolKey,
    Register,
    Repair,
    World,
    compare,
    engine_between,
    places,
)
from ipam_plugin.evidence import Attachment, Look, Network
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    RESERVED,
    ROUTER,
    STANDBY,
    UNREADABLE,
    Container,
    Holder,
    Host,
    HostAddress,
    Keys,
    Lease,
    Pool,
    PoolUse,
    SegmentSettings,
    parse_time,
)
from ipam_plugin.operations import Found

KEYS = Keys()
SUBNET = "10.0.0.0/24"
POOL = Pool.make(SUBNET, "", {}, "default")
OTHER_POOL = Pool.make("10.0.0.0/24", "10.0.0.128/25", {}, "default")
NOW_TEXT, OLD = "2026-01-01T12:00:00.000Z", "2026-01-01T08:00:00.000Z"
NOW = parse_time(NOW_TEXT) or 0.0
CARD, THEIRS, STRANGER = "02:00:00:00:00:01", "02:00:00:00:00:02", "66:66:66:66:66:66"
NETWORK = Network("n1", "lan", "bridge", ((SUBNET, ""),), {})
OWN = bridge("10.0.0.1/24", mac=CARD)


def found(address: str, lease: Lease, revision: int = 7, key: str = "") -> Found:
    parsed = parse_address(address)
    one = Range(parsed.version, int(parsed), int(parsed))
    return Found("default", one, lease, key or KEYS.lease("default", parsed), revision)


def mac_of(address: str) -> str:
    return f"02:42:0a:00:00:{int(parse_address(address)) & 255:02x}"


def endpoint(address: str, host: str = "a", **more: Any) -> Found:
    lease = Lease(ENDPOINT, host, mac_of(address), pool=POOL.id, since=OLD, token=f"t-{address}")
    return found(address, msgspec.structs.replace(lease, **more))


def attached(address: str, network: str = "n1", mac: str = "") -> Attachment:
    return Attachment(network, "lan", parse_address(address), mac or mac_of(address), f"id-{address}", "web", "busybox")


def key_of(pool: Pool = POOL, host: str = "a", count: int = 1) -> PoolKey:
    use = PoolUse(host, "default", str(pool.subnet), str(pool.range or ""), since=OLD, count=count, token="u")
    return PoolKey(KEYS.pool(pool, host), 5, pool.id, pool, host, use)


def world(
    leases: list[Found], containers: list[Attachment], networks: tuple[Network, ...] = (NETWORK,), **more: Any
) -> World:
    """Host a with one network and its own address; host b is alive. `more` replaces parts, also of the register."""
    own = found("10.0.0.1", Lease(HOST, "a", CARD, since=OLD, token="own", interface="br0"))
    parts: dict[str, Any] = {
        "leases": [own, *leases],
        "strays": [],
        "pools": [key_of()],
        "hosts": {
            "a": Host("a", addresses=(HostAddress("10.0.0.1", 24, "br0", CARD),)),
            "b": Host("b", macs=(THEIRS,)),
        },
        "alive": frozenset({"a", "b"}),
        "settings": {},
    }
    register = Register(**{name: more.pop(name, value) for name, value in parts.items()})
    by_id = {each.id: each for each in networks}
    engine = Engine("e", by_id, networks, containers, frozenset(each.address for each in containers))
    values: dict[str, Any] = {
        "host": "a", "default_segment": "default", "segments": frozenset(), "grace": 300.0, "now": NOW,
        "register": register, "engine": engine, "carried": [OWN], "wire": {}, "unheard": [],
    }  # fmt: skip
    return World(**(values | more))


def wire(**answers: Any) -> dict[Any, Any]:
    return {("default", parse_address(name.strip("_").replace("_", "."))): macs for name, macs in answers.items()}


def told(of: World) -> list[tuple[str, str]]:
    return [(each.kind, each.address) for each in compare(of, KEYS)]


def only(of: World) -> Difference:
    [one] = compare(of, KEYS)
    for text in (one.what, one.cause, one.cure):
        assert text.isprintable()
        assert text
    return one


A = "10.0.0.20"


def test_all_agree() -> None:
    """A container with its lease, another host's, standby, a router: nothing to say."""
    router = found("10.0.0.254", Lease(ROUTER, holders=(Holder("a", POOL.id),), since=OLD, token="r"))
    leases = [
        endpoint(A),
        endpoint("10.0.0.30", "b"),
        found("10.0.0.40", Lease(STANDBY, "a", pool=POOL.id, token="s")),
        router,
        found("10.0.0.50", Lease(RESERVED, note="printer")),
        found("10.0.0.60", Lease(CONFLICT, mac=STRANGER, by="b", token="c")),
        found("10.0.0.70", Lease(HELD, "a", until="2026-01-01T13:00:00Z", token="h")),
    ]
    answers = {
        ("default", parse_address(A)): (mac_of(A),),
        ("default", parse_address("10.0.0.30")): (mac_of("10.0.0.30"),),
        ("default", parse_address("10.0.0.40")): (),
        ("default", parse_address("10.0.0.60")): (STRANGER,),
    }
    assert told(world(leases, [attached(A)], wire=answers)) == []


def test_no_lease() -> None:
    one = only(world([], [attached(A)]))
    assert (one.kind, one.address) == ("no_lease", A)
    assert one.repair is not None
    assert (one.repair.revision, one.repair.key, one.repair.twice) == (
        0,
        KEYS.lease("default", parse_address(A)),
        False,
    )
    lease = one.repair.value
    assert isinstance(lease, Lease)
    assert (lease.kind, lease.host, lease.mac, lease.pool) == (ENDPOINT, "a", mac_of(A), POOL.id)
    assert lease.container == Container("web", f"id-{A}", "busybox", "lan")


@pytest.mark.parametrize(
    ("lease", "mended"),
    [
        (Lease(ENDPOINT, "b", THEIRS, token="x"), False),
        (Lease(RESERVED, note="x", token="x"), False),
        (Lease(UNREADABLE, note="x"), False),
        (Lease(STANDBY, "a", token="x"), False),
        (Lease(STANDBY, "b", token="x"), False),
        (Lease(CONFLICT, mac=STRANGER, token="x"), False),
        (Lease(CONFLICT, mac=mac_of(A), token="x"), True),
        (Lease(RESERVED, "a", note="adopted", token="x"), True),
        (Lease(RESERVED, "b", note="adopted", token="x"), False),
        (Lease(HELD, "a", token="x"), True),
        (Lease(HELD, "b", token="x"), False),
    ],
)
def test_a_lease_of_another(lease: Lease, mended: bool) -> None:
    """Nobody else's lease is overwritten; a conflict that is this very container becomes its lease, and so does what is
    only kept for it by this host (a backup that is older than its start)."""
    some = [each for each in compare(world([found(A, lease)], [attached(A)]), KEYS) if each.kind == "wrong_lease"]
    assert [each.address for each in some] == [A]
    assert (some[0].repair is not None) == mended


def test_another_container_in_the_lease() -> None:
    for lease in (endpoint(A, mac=STRANGER), endpoint(A, container=Container("db", "another"))):
        one = only(world([lease], [attached(A)]))
        assert (one.kind, one.address) == ("lease_differs", A)
        assert one.repair is not None
        assert isinstance(one.repair.value, Lease)
        assert (one.repair.value.mac, one.repair.value.token) == (mac_of(A), f"t-{A}")


@pytest.mark.parametrize(
    ("answer", "since", "said", "mended"),
    [
        ((), OLD, "nothing answers", True),
        ((), "2026-01-01T11:59:00Z", "nothing answers", False),  # younger than docker.grace
        ((), "", "nothing answers", False),
        (None, OLD, "cannot be told", False),
        ((mac_of(A),), OLD, "still answers", False),
        ((STRANGER,), OLD, STRANGER, False),
    ],
)
def test_vanished(answer: Any, since: str, said: str, mended: bool) -> None:
    """It is freed only when silence is proven and the lease is old, and only what two comparisons found."""
    one = only(world([endpoint(A, since=since)], [], wire=wire(_10_0_0_20=answer)))
    assert (one.kind, one.address) == ("vanished", A)
    assert said in one.what
    assert (one.repair is not None) == mended
    if one.repair:
        assert one.repair.twice
        assert one.repair.value is None
        assert (one.repair.revision, one.repair.token) == (7, f"t-{A}")


def test_vanished_is_what_nobody_knows() -> None:
    """Not one that has just begun, nor one that Docker has on another network, nor another host's."""
    young = endpoint(A, since="2026-01-01T11:59:45Z")
    assert told(world([young], [])) == []
    engine = Engine("e", {"n1": NETWORK}, (NETWORK,), (), frozenset({parse_address(A)}))
    assert told(world([endpoint(A)], [], engine=engine)) == []
    assert told(world([endpoint(A, "b")], [])) == []


def test_silence_of_own_macvlan_proves_nothing() -> None:
    """A host does not hear its own containers there, so a vanished one is told and left."""
    silent = wire(_10_0_0_20=())
    for driver in ("macvlan", "ipvlan"):
        one = only(world([endpoint(A)], [], (NETWORK._replace(driver=driver),), wire=silent))
        assert (one.kind, one.repair) == ("vanished", None)


def test_used_twice() -> None:
    both = wire(_10_0_0_20=(mac_of(A), STRANGER))
    assert only(world([endpoint(A)], [attached(A)], wire=both)).kind == "used_twice"
    theirs = only(world([endpoint(A, "b")], [], wire=wire(_10_0_0_20=(STRANGER,))))
    assert (theirs.kind, theirs.address) == ("used_twice", A)
    assert STRANGER in theirs.what
    # An ipvlan container answers with the MAC of its host.
    assert told(world([endpoint(A, "b")], [], wire=wire(_10_0_0_20=(THEIRS,)))) == []
    moving = {"default": SegmentSettings(moving=(A,))}
    assert told(world([endpoint(A)], [attached(A)], wire=both, settings=moving)) == []


def test_strangers() -> None:
    assert told(world([], [], wire=wire(_10_0_0_99=(STRANGER,)))) == [("stranger", "10.0.0.99")]
    assert told(world([], [], wire=wire(_10_0_0_99=(THEIRS,)))) == []
    standby = found(A, Lease(STANDBY, "a", token="s"))
    assert told(world([standby], [], wire=wire(_10_0_0_20=(STRANGER,)))) == [("stranger", A)]


def test_pools() -> None:
    """Keys without a network, networks without a key, and other counts."""
    unused = only(world([], [], pools=[key_of(), key_of(OTHER_POOL)]))
    assert unused.kind == "pool_unused"
    assert OTHER_POOL.id in unused.what
    assert unused.repair == Repair(KEYS.pool(OTHER_POOL, "a"), 5, None, "u", twice=True)
    missing = only(world([], [], pools=[key_of(host="b")]))
    assert missing.kind == "pool_missing"
    assert missing.repair is not None
    assert (missing.repair.key, missing.repair.revision) == (KEYS.pool(POOL, "a"), 0)
    counted = only(world([], [], pools=[key_of(count=3)]))
    assert counted.kind == "pool_count"
    assert counted.repair is not None
    assert isinstance(counted.repair.value, PoolUse)
    assert counted.repair.value.count == 1


def test_holders() -> None:
    """What this host holds for a pool that no network uses; what others hold of it stays."""
    mine, theirs = Holder("a", OTHER_POOL.id), Holder("b", OTHER_POOL.id)
    router = Lease(ROUTER, holders=(mine,), since=OLD, token="r")
    alone = only(world([found(A, router)], []))
    assert (alone.kind, alone.address) == ("holder_unused", A)
    assert alone.repair is not None
    assert alone.repair.value is None
    shared = only(world([found(A, msgspec.structs.replace(router, holders=(mine, theirs)))], []))
    assert shared.repair is not None
    assert isinstance(shared.repair.value, Lease)
    assert shared.repair.value.holders == (theirs,)
    kept = world([found(A, router)], [], settings={"default": SegmentSettings(router=A)})
    repair = only(kept).repair
    assert repair is not None
    assert isinstance(repair.value, Lease)  # the segment's own router never goes


def test_own_addresses() -> None:
    lost = found(A, Lease(HOST, "a", CARD, since=OLD, token="h", interface="eth9"))
    assert told(world([lost], [])) == [("address_lost", A)]
    fresh = only(world([], [], carried=[OWN, bridge(f"{A}/24")]))
    assert (fresh.kind, fresh.address) == ("own_address", A)
    assert fresh.repair is not None
    assert fresh.repair.revision == 0
    taken = only(world([endpoint(A, "b")], [], carried=[OWN, bridge(f"{A}/24")]))
    assert (taken.kind, taken.address, taken.repair) == ("own_address_taken", A, None)
    assert told(world([found(A, Lease(RESERVED))], [], carried=[OWN, bridge(f"{A}/24")])) == []


def test_holds_and_conflicts() -> None:
    over = found(A, Lease(HELD, "a", until="2026-01-01T11:00:00Z", token="h"))
    one = only(world([over], []))
    assert (one.kind, one.address) == ("hold_over", A)
    assert one.repair is not None
    assert one.repair.value is None
    theirs = found(A, Lease(HELD, "b", until="2026-01-01T11:00:00Z", token="h"))
    assert told(world([theirs], [])) == []
    gone = found(A, Lease(CONFLICT, mac=STRANGER, by="b", token="c"))
    assert told(world([gone], [], wire=wire(_10_0_0_20=()))) == [("conflict_silent", A)]
    assert told(world([gone], [], wire=wire(_10_0_0_20=None))) == []


def test_hosts() -> None:
    """A line for each host that is gone, with how many addresses it keeps; leases under a name that is none."""
    leases = [endpoint(A, "b"), endpoint("10.0.0.21", "b"), endpoint("10.0.0.22", "ghost")]
    hosts = {"a": Host("a"), "b": Host("b", absent="2026-01-01T10:00:00Z")}
    some = compare(world(leases, [], alive=frozenset({"a"}), hosts=hosts), KEYS)
    assert [each.kind for each in some] == ["host_gone", "unknown_host"]
    assert "2 addresses" in some[0].what
    assert "2026-01-01T10:00:00Z" in some[0].what
    assert "ghost" in some[1].what
    standby = found(A, Lease(STANDBY, "a", token="s"))
    assert told(world([standby], [], alive=frozenset({"b"}))) == [("no_daemon", ""), ("standby_alone", A)]


def test_what_cannot_be_read() -> None:
    spelt = found("10.0.0.20", Lease(RESERVED), key=f"{KEYS.leases}default/010.0.0.20")
    assert told(world([spelt], [])) == [("spelling", A)]
    assert told(world([found(A, Lease(UNREADABLE, note="?"))], [])) == [("unreadable", A)]
    assert told(world([], [], strays=[f"{KEYS.leases}default/printer"])) == [("no_address", "")]
    assert told(world([], [], settings={"default": "Expected `object`"})) == [("settings_unreadable", "")]


def test_never_silence_about_what_was_not_compared() -> None:
    """Neither Docker nor the interfaces nor the wire: a line each, and nothing follows from their absence."""
    blind = world([endpoint(A)], [], engine="no answer", carried="late", unheard=[("default", "br0 is down")])
    some = compare(blind, KEYS)
    assert [each.kind for each in some] == ["not_compared"] * 3
    assert all(each.repair is None for each in some)


def test_what_is_certain_between_two_looks() -> None:
    """Only what both looks show runs, only what neither shows is gone, and another engine says nothing."""
    x, y, z = (attached(f"10.0.0.{n}") for n in (1, 2, 3))
    spare = Network("n2", "spare", "bridge", (), {})
    before = Look(0, 1, "e", (NETWORK, spare), (x, y), frozenset(), {})
    after = Look(2, 3, "e", (NETWORK,), (y, z), frozenset({parse_address("10.0.0.9")}), {})
    both = engine_between(before, after)
    assert isinstance(both, Engine)
    assert list(both.attachments) == [y]
    assert set(both.networks) == {"n1"}
    assert both.addresses == {x.address, y.address, z.address, parse_address("10.0.0.9")}
    assert isinstance(engine_between(before, after._replace(engine="f")), str)


def test_the_same_difference() -> None:
    """What an earlier comparison found of another lease proves nothing about this one."""
    silent = wire(_10_0_0_20=())
    first = only(world([endpoint(A)], [], wire=silent))
    again = only(world([endpoint(A)], [], wire=silent))
    another = only(world([endpoint(A, token="new")], [], wire=silent))
    assert again.same(first)
    assert not another.same(first)
    assert not only(world([], [attached(A)])).same(first)


def test_places() -> None:
    """Asked are this host's addresses first, then what others hold; never what an operator keeps, nor another LAN's."""
    theirs = endpoint("10.0.0.30", "b")
    elsewhere = endpoint("10.0.0.31", "b")._replace(segment="far")
    kept = found("10.0.0.50", Lease(RESERVED))
    before = world([theirs, elsewhere, kept, endpoint(A)], [attached("10.0.0.99")])
    asked = [str(address) for _, address in places(before, KEYS)]
    assert asked == ["10.0.0.99", "10.0.0.1", A, "10.0.0.30"]


@st.composite
def consistent(draw: st.DrawFn) -> World:
    """Any number of containers on this host and others, all as they should be."""
    mine = draw(st.sets(st.integers(2, 120), max_size=8))
    theirs = draw(st.sets(st.integers(121, 250), max_size=8))
    leases = [endpoint(f"10.0.0.{n}") for n in mine] + [endpoint(f"10.0.0.{n}", "b") for n in theirs]
    answers = {("default", each.address): draw(st.sampled_from([(each.lease.mac,), None])) for each in leases}
    return world(draw(st.permutations(leases)), [attached(f"10.0.0.{n}") for n in mine], wire=answers)


@given(consistent(), st.data())
def test_one_change_is_found_and_named(before: World, data: st.DataObject) -> None:
    """Where all agree nothing is said; one address that is changed anywhere is the one that is named."""
    assert compare(before, KEYS) == []
    assert isinstance(before.engine, Engine)
    change = data.draw(st.sampled_from(["lease gone", "container gone", "other holder", "other answer"]))
    mine = [each for each in before.register.leases if (each.lease.kind, each.lease.host) == (ENDPOINT, "a")]
    if not mine:
        return
    one = data.draw(st.sampled_from(mine))
    place, rest = ("default", one.address), [each for each in before.register.leases if each is not one]
    after = before
    if change == "lease gone":
        after = before._replace(register=before.register._replace(leases=rest))
    elif change == "container gone":
        others = [each for each in before.engine.attachments if each.address != one.address]
        after = before._replace(engine=before.engine._replace(attachments=others, addresses=frozenset()))
        others_known = frozenset(each.address for each in others)
        after = after._replace(engine=before.engine._replace(attachments=others, addresses=others_known))
    elif change == "other holder":
        stolen = one._replace(lease=msgspec.structs.replace(one.lease, host="b"))
        after = before._replace(register=before.register._replace(leases=[*rest, stolen]))
    else:
        after = before._replace(wire={**before.wire, place: (STRANGER,)})
    assert {each.address for each in compare(after, KEYS)} == {str(ipaddress.ip_address(one.address))}
