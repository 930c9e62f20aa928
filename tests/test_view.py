"""What the daemon knows of the register, against a naive model, however late, early or twice it is told."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipam_plugin.addresses import AddressSet, Range, address_of, parse_range
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HOST,
    KINDS,
    ROUTER,
    STANDBY,
    History,
    Host,
    HostAddress,
    Keys,
    Lease,
    Pool,
    PoolUse,
    Reservation,
    SegmentSettings,
    Tenancy,
    encode,
    read_lease,
    rfc3339,
)
from ipam_plugin.view import Full, Local, View

KEYS = Keys("/p/")
START = 1_700_000_000
COOLDOWN = 300
V4 = Pool.make("10.0.0.0/28", "", {}, "lan")
WIDE = Pool.make("10.0.0.0/27", "10.0.0.8/29", {"exclude": "10.0.0.9"}, "lan")
V6 = Pool.make("fd00::/124", "", {}, "lan")
ELSEWHERE = Pool.make("10.0.0.0/28", "", {}, "wan")
POOLS = (V4, WIDE, V6, ELSEWHERE)
LOCAL = Local(exclude=(parse_range("10.0.0.4"),), routers=(ipaddress.ip_address("10.0.0.1"),), cooldown=float(COOLDOWN))
# Keys of one address as operators type them; the first is how it is written here.
SPELLINGS = {4: ("10.0.0.{}", "010.0.0.{}", "10.0.0.{}/printer"), 6: ("fd00::{:x}", "FD00:0::{:X}", "fd00::{:x}/x")}


def number_of(version: int, last: int) -> int:
    return (0x0A000000 if version == 4 else 0xFD << 120) + last


def here(segment: str) -> Local:
    return LOCAL if segment == "lan" else Local(cooldown=float(COOLDOWN))


@contextlib.contextmanager
def all_candidates(view: View, pool: Pool) -> Iterator[tuple[list[int], Full]]:
    """Every address that is offered until there is none left, all of them being tried at once, and the end."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while True:
            offered = stack.enter_context(view.candidate(pool))
            if isinstance(offered, Full):
                yield found, offered
                return
            found.append(int(offered))


lease_values = st.builds(
    lambda kind, host, token: encode(Lease(kind=kind, host=host, token=token)),
    st.sampled_from(KINDS),
    st.sampled_from(("here", "there")),
    st.text("abc", min_size=1, max_size=3),
) | st.sampled_from((b"", b"printer", b'{"kind": "mine"}', b"\xff"))
versions = st.sampled_from((4, 6))
lasts = st.integers(0, 15)
some_ranges = st.sampled_from(("10.0.0.2", "10.0.0.3-10.0.0.6", "10.0.0.8/30", "fd00::8/125", "10.9.0.0/16"))
listed = st.lists(some_ranges, max_size=2)
settings_values = st.builds(
    lambda router, exclude, reserved, moving: encode(
        SegmentSettings(
            router=router,
            exclude=tuple(exclude),
            reserved=tuple(Reservation(each, by="ann") for each in reserved),
            moving=tuple(moving),
        )
    ),
    st.sampled_from(("", "10.0.0.1", "10.0.0.14", "fd00::1")),
    listed,
    listed,
    listed,
) | st.sampled_from((b"{", b'{"exclude": ["ten"]}', b'{"excluded": ["10.0.0.2"]}'))
# Lease keys that name many addresses, as operators write them.
BY_HAND = ("10.0.0.4/30", "10.0.0.9-10.0.0.11", "010.0.0.12/31/lab", "fd00::8/126")


class ViewOfRegister(RuleBasedStateMachine):
    """etcd is a dictionary with a log; the view is told of it late, out of turn and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = START
        self.view = View(KEYS, "here", here, lambda: float(self.clock))
        self.etcd: dict[str, tuple[bytes, int]] = {}
        self.revision = 1
        self.log: list[tuple[str, bytes | None, int]] = []
        self.seen = 1  # up to which revision the watch has told
        self.told: dict[str, int] = {}  # the newest revision of a key that the view was told
        self.reads: list[tuple[str, bytes | None, int]] = []  # answers of etcd that are still on their way
        self.lists: list[tuple[dict[str, tuple[bytes, int]], int]] = []
        self.cursors: dict[str, int | None] = {}
        self.trying: list[tuple[Any, str, int]] = []
        self.rumours: dict[tuple[str, int, int], int] = {}  # (segment, version, number) -> until
        self.view.reset([], 1)

    # ---- what happens in etcd

    def write(self, key: str, value: bytes | None) -> None:
        if value is None and key not in self.etcd:
            return
        self.revision += 1
        if value is None:
            del self.etcd[key]
        else:
            self.etcd[key] = (value, self.revision)
        self.log.append((key, value, self.revision))

    @rule(
        segment=st.sampled_from(("lan", "lan", "wan")),
        version=versions,
        last=lasts,
        spelling=st.sampled_from((0, 0, 0, 1, 2)),
        value=st.none() | lease_values,
    )
    def change_a_lease(self, segment: str, version: int, last: int, spelling: int, value: bytes | None) -> None:
        self.write(f"{KEYS.leases}{segment}/{SPELLINGS[version][spelling].format(last)}", value)

    @rule(segment=st.sampled_from(("lan", "lan", "wan")), text=st.sampled_from(BY_HAND), value=st.none() | lease_values)
    def change_a_range_by_hand(self, segment: str, text: str, value: bytes | None) -> None:
        self.write(f"{KEYS.leases}{segment}/{text}", value)

    @rule(version=versions, first=lasts, count=st.integers(1, 15))
    def fill(self, version: int, first: int, count: int) -> None:
        for last in range(first, min(16, first + count)):
            key = f"{KEYS.leases}lan/{SPELLINGS[version][0].format(last)}"
            if key not in self.etcd:
                self.write(key, encode(Lease(ENDPOINT, "there", token=str(last))))

    @rule(version=versions, last=lasts)
    def free_a_lease(self, version: int, last: int) -> None:
        address = address_of(version, number_of(version, last))
        if KEYS.lease("lan", address) in self.etcd:
            until = rfc3339(datetime.datetime.fromtimestamp(self.clock, datetime.UTC))
            self.write(KEYS.lease("lan", address), None)
            self.write(KEYS.past("lan", address), encode(History((Tenancy(ENDPOINT, until=until),))))

    @rule(value=st.none() | settings_values)
    def change_the_settings(self, value: bytes | None) -> None:
        self.write(KEYS.segment("lan"), value)

    @rule(
        name=st.sampled_from(("here", "there")),
        found=st.none() | st.lists(lasts, max_size=2),
        segments=st.sampled_from(((), ("lan",), ("wan",), ("lan", "wan"))),
    )
    def change_a_host(self, name: str, found: list[int] | None, segments: tuple[str, ...]) -> None:
        if found is None:
            self.write(KEYS.host(name), None)
        else:
            addresses = tuple(HostAddress(f"10.0.0.{last}", 28, "br0") for last in found)
            self.write(KEYS.host(name), encode(Host(name, addresses=addresses, segments=segments)))

    @rule(
        key=st.sampled_from(("leases/lan/printer", "leases/", "nothing/we/know", "hosts/", "pools/x", "history/lan/x"))
    )
    def write_junk(self, key: str) -> None:
        self.write(KEYS.prefix + key, b"junk")

    @rule(segment=st.sampled_from(("lan", "wan")), version=versions, last=lasts, seconds=st.sampled_from((1, COOLDOWN)))
    def hear_a_rumour(self, segment: str, version: int, last: int, seconds: int) -> None:
        number = number_of(version, last)
        self.view.skip(segment, address_of(version, number), float(seconds))
        known = self.rumours.get((segment, version, number), 0)
        self.rumours[segment, version, number] = max(known, self.clock + seconds)

    @rule()
    def look_who_has_rested(self) -> None:
        self.view.wake_rested()

    @rule(seconds=st.sampled_from((1, COOLDOWN - 1, COOLDOWN)))
    def time_goes_on(self, seconds: int) -> None:
        self.clock += seconds

    # ---- what the view is told

    @rule(count=st.integers(1, 20))
    def watch(self, count: int) -> None:
        events = [event for event in self.log if event[2] > self.seen][:count]
        for key, _, revision in events:
            self.told[key] = max(self.told.get(key, 0), revision)
        if events:
            self.seen = events[-1][2]
            self.view.apply(events, self.seen)

    @rule(version=versions, last=lasts, late=st.booleans())
    def answer(self, version: int, last: int, late: bool) -> None:
        """A transaction of this daemon read or wrote a lease; the thread may be slow to say so."""
        key = KEYS.lease("lan", address_of(version, number_of(version, last)))
        value, revision = self.etcd.get(key, (None, self.revision))
        self.reads.append((key, value, revision))
        if not late:
            self.late_answer(-1)

    @precondition(lambda self: self.reads)
    @rule(place=st.integers(0, 20))
    def late_answer(self, place: int) -> None:
        key, value, revision = self.reads.pop(place % len(self.reads))
        if revision > self.seen:
            self.told[key] = max(self.told.get(key, 0), revision)
        self.view.learn(key, value, revision)

    @rule()
    def list_everything(self) -> None:
        self.lists.append((dict(self.etcd), self.revision))

    @precondition(lambda self: self.lists)
    @rule(place=st.integers(0, 20))
    def the_list_arrives(self, place: int) -> None:
        """After the watch lost its place. While the list was on its way, transactions went on."""
        values, revision = self.lists.pop(place % len(self.lists))
        if revision >= self.seen:
            for key, (_, key_revision) in values.items():
                self.told[key] = max(self.told.get(key, 0), key_revision)
            self.seen = revision
            self.rumours.clear()
            self.view.reset([(key, value, at) for key, (value, at) in values.items()], revision)

    @precondition(lambda self: self.lists)
    @rule()
    def etcd_goes_back_to_a_backup(self) -> None:
        values, revision = self.lists.pop(0)
        if revision < self.seen:
            self.etcd, self.revision, self.seen = dict(values), revision, revision
            self.log = [event for event in self.log if event[2] <= revision]
            self.told = {key: at for key, (_, at) in values.items()}
            self.reads, self.lists = [], []
            self.rumours.clear()
            self.view.reset([(key, value, at) for key, (value, at) in values.items()], revision)

    # ---- the naive model

    def taken(self, pool: Pool, told_only: bool = False) -> set[int]:
        found = set()
        for key, (_, revision) in self.etcd.items():
            match = re.fullmatch(rf"{KEYS.leases}{pool.segment}/([^/]+)(/.*)?", key)
            if (
                match
                and match[1] != "printer"
                and not key.endswith(BY_HAND)
                and (not told_only or self.told.get(key) == revision)
            ):
                text = match[1].removeprefix("0")
                if ipaddress.ip_address(text).version == pool.subnet.version:
                    found.add(int(ipaddress.ip_address(text)))
        return found

    def forbidden(self, pool: Pool) -> set[int]:
        ranges: list[Range] = [*pool.exclude, *here(pool.segment).exclude]
        singles = [*here(pool.segment).routers]
        stored = self.etcd.get(KEYS.segment(pool.segment))
        with contextlib.suppress(ValueError, msgspec.MsgspecError):
            value = msgspec.json.decode(stored[0] if stored else b"{}", type=SegmentSettings)
            told = [*value.exclude, *value.moving, *(each.range for each in value.reserved)]
            ranges += [parse_range(text) for text in told]
            singles += [ipaddress.ip_address(value.router)] if value.router else []
        written = (text for text in BY_HAND if f"{KEYS.leases}{pool.segment}/{text}" in self.etcd)
        ranges += [parse_range(text.removesuffix("/lab").removeprefix("0")) for text in written]
        for name in ("here", "there"):
            record = self.etcd.get(KEYS.host(name))
            host = msgspec.json.decode(record[0], type=Host) if record else Host(name)
            if not host.segments or pool.segment in host.segments:
                singles += [ipaddress.ip_address(each.address) for each in host.addresses]
        version, where = pool.subnet.version, pool.candidates
        inside = (address_of(version, number) for number in range(where.first, where.last + 1))
        excluded = {int(each) for each in inside if any(one.contains(each) for one in ranges)}
        return excluded | {int(each) for each in singles if each.version == version}

    def resting(self, pool: Pool) -> set[int]:
        heard = (pool.segment, pool.subnet.version)
        found = {key[2] for key, until in self.rumours.items() if key[:2] == heard and until > self.clock}
        for key, (value, _) in self.etcd.items():
            text = key.removeprefix(f"{KEYS.history}{pool.segment}/")
            if text != key and text != "x" and ipaddress.ip_address(text).version == pool.subnet.version:
                freed = datetime.datetime.fromisoformat(msgspec.json.decode(value)["past"][0]["until"]).timestamp()
                if freed + COOLDOWN > self.clock:
                    found.add(int(ipaddress.ip_address(text)))
        return found

    def pending(self, pool: Pool) -> set[int]:
        return {number for _, segment, number in self.trying if segment == pool.segment}

    def expected(self, pool: Pool) -> list[int]:
        """What may be offered now, in order of preference."""
        where = pool.candidates
        free = set(range(where.first, where.last + 1)) - self.taken(pool) - self.forbidden(pool) - self.pending(pool)
        start = self.cursors.get(pool.id)
        start = start if start is not None and start <= where.last else where.first
        turned = [*range(start, where.last + 1), *range(where.first, start)]
        rested = free - self.resting(pool)
        return [n for n in turned if n in rested] + [n for n in turned if n in free - rested]

    def fitting(self, pool: Pool, expected: list[int]) -> set[int]:
        """The first of these; where it follows another host's address, any that is as good: that host goes on there."""
        first = expected[0]
        before = self.etcd.get(KEYS.lease(pool.segment, address_of(pool.subnet.version, first - 1)))
        if before is None or b'"host":"here"' in before[0]:
            return {first}
        return set(expected) - self.resting(pool) or set(expected)

    def offer(self, pool: Pool, offered: Any) -> None:
        caught_up = self.seen == self.revision
        if isinstance(offered, Full):
            assert not (caught_up and self.expected(pool)), "free addresses, but none was offered"
            where = pool.candidates
            assert offered.pending == any(where.first <= number <= where.last for number in self.pending(pool))
            return
        number = int(offered)
        assert pool.candidates.contains(offered)
        assert number not in self.pending(pool)
        assert number not in self.taken(pool, told_only=True)
        if caught_up:
            expected = self.expected(pool)
            assert number in expected
            if self.cursors.get(pool.id) is not None:
                assert number in self.fitting(pool, expected)
            else:  # the first one is anywhere, but it does not rest as long as others do not
                assert number not in self.resting(pool) or set(expected) <= self.resting(pool)
        self.cursors[pool.id] = number + 1

    # ---- choosing

    @rule(pool=st.sampled_from(POOLS), keep=st.booleans())
    def choose(self, pool: Pool, keep: bool) -> None:
        context = self.view.candidate(pool)
        offered = context.__enter__()
        self.offer(pool, offered)
        if keep and not isinstance(offered, Full):
            self.trying.append((context, pool.segment, int(offered)))
        else:
            context.__exit__(None, None, None)

    @precondition(lambda self: self.trying)
    @rule()
    def let_go(self) -> None:
        self.trying.pop(0)[0].__exit__(None, None, None)

    @rule(pool=st.sampled_from(POOLS))
    def lose_a_race(self, pool: Pool) -> None:
        self.view.lost_race(pool)
        self.cursors[pool.id] = None

    @rule(pool=st.sampled_from(POOLS))
    def look_at_everything(self, pool: Pool) -> None:
        """Caught up with etcd, the view offers exactly what is free, and counts what is not."""
        self.watch(10_000)
        where = pool.candidates
        expected = self.expected(pool)
        with all_candidates(self.view, pool) as (found, full):
            assert sorted(found) == sorted(expected)
        if found:
            self.cursors[pool.id] = found[-1] + 1
        gone = (self.taken(pool) | self.forbidden(pool)) & set(range(where.first, where.last + 1))
        size, parts = full.counts.split(" addresses: ")
        assert int(size) == where.size()
        assert sum(map(int, re.findall(r"(\d+) ", parts))) == len(gone)
        tally = self.view.tally(pool)
        assert tally["free"] == where.size() - len(gone)
        assert sum(tally.values()) == where.size()
        self.look_at_standby(pool, set(range(where.first, where.last + 1)))
        aliases = {number for number in self.taken(pool) if self.typed_otherwise(pool, number)}
        for number in range(where.first, where.last + 1):
            address = address_of(where.version, number)
            excluded = any(each.contains(address) for each in pool.exclude)
            barred = number in self.forbidden(pool) and not excluded
            if not excluded:
                assert bool(self.view.forbids(pool.segment, address)) == (barred or number in aliases)

    def look_at_standby(self, pool: Pool, inside: set[int]) -> None:
        """What the keeper of standby asks: whether anything is free, how full the pool is, whose standby is there."""
        usable = inside - self.forbidden(pool)
        standby = {
            number
            for number in inside & self.taken(pool)
            for stored in [self.etcd.get(KEYS.lease(pool.segment, address_of(pool.subnet.version, number)))]
            if stored is not None and read_lease(stored[0]).kind == STANDBY
        }
        assert self.view.has_free(pool) == bool(self.expected(pool))
        used = len((self.taken(pool) - standby) & usable)
        assert self.view.fill(pool) == (used / len(usable) if usable else 1.0)
        assert {int(address) for address, _ in self.view.spare_in(pool, STANDBY)} == standby & usable
        told = [int(each) for segment, each, _ in self.view.of_kind(STANDBY) if segment == pool.segment]
        assert {number for number in told if number in inside} == standby
        assert len(told) == len(set(told))

    def typed_otherwise(self, pool: Pool, number: int) -> bool:
        last = number % 16
        texts = (text.format(last) for text in SPELLINGS[pool.subnet.version][1:])
        return any(f"{KEYS.leases}{pool.segment}/{text}" in self.etcd for text in texts)

    @invariant()
    def entries_are_as_told(self) -> None:
        """Caught up, the leases the view knows are those in etcd, with their revisions."""
        if self.seen == self.revision:
            for last in range(16):
                address = address_of(4, number_of(4, last))
                stored = self.etcd.get(KEYS.lease("lan", address))
                entry = self.view.entry("lan", address)
                assert (entry.revision if entry else 0) == (stored[1] if stored else 0)

    def teardown(self) -> None:
        for context, *_ in self.trying:
            context.__exit__(None, None, None)


ViewOfRegister.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestViewAgainstANaiveModel = ViewOfRegister.TestCase


# --- single rules --------------------------------------------------------------------------------------


def fed(*pairs: tuple[str, bytes], host: str = "here", revision: int = 100) -> View:
    view = View(KEYS, host, lambda segment: Local(cooldown=float(COOLDOWN)), lambda: float(START))
    view.reset([(key, value, 2 + place) for place, (key, value) in enumerate(pairs)], revision)
    return view


def lease_key(last: int) -> str:
    return KEYS.lease("lan", address_of(4, number_of(4, last)))


def first_offer(view: View, pool: Pool) -> int:
    with view.candidate(pool) as offered:
        assert not isinstance(offered, Full)
        return int(offered)


def test_hosts_start_at_different_points() -> None:
    """Section 6: the first address is hashed from the host's name, so hosts rarely meet; the same host begins alike."""
    pool = Pool.make("10.0.0.0/16", "", {}, "lan")
    starts = [first_offer(fed(host=f"host-{number}"), pool) for number in range(50)]
    assert len(set(starts)) >= 48
    assert max(starts) - min(starts) > 30_000
    assert first_offer(fed(host="host-7"), pool) == starts[7]


def test_after_a_lost_race_it_goes_on_elsewhere() -> None:
    """Section 6: next to the lost address the two hosts would meet again, at every further one."""
    pool = Pool.make("10.0.0.0/16", "", {}, "lan")
    view = fed()
    before = first_offer(view, pool)
    view.lost_race(pool)
    assert abs(first_offer(view, pool) - before) > 8


def test_a_slow_answer_brings_no_ghost_back() -> None:
    """P5: a lease that a transaction read, and whose end the watch told before, would else be taken for ever."""
    view, lease = fed(), encode(Lease(ENDPOINT, "there", token="t"))
    view.apply([(lease_key(5), lease, 101)], 101)
    view.apply([(lease_key(5), None, 102)], 102)
    view.learn(lease_key(5), lease, 101)
    assert view.entry("lan", address_of(4, number_of(4, 5))) is None


def test_an_own_lease_that_the_watch_has_not_told_yet_stays() -> None:
    """A late event of before, or a list that was read before, does not make an address free that was just given."""
    view, lease, address = fed(), encode(Lease(ENDPOINT, "here", token="t")), address_of(4, number_of(4, 5))
    view.learn(lease_key(5), lease, 120)
    view.apply([(lease_key(5), None, 110)], 110)
    assert view.entry("lan", address) is not None
    view.reset([], 115)
    assert view.entry("lan", address) is not None
    view.reset([], 130)
    assert view.entry("lan", address) is None


def test_a_restored_backup_leaves_no_ghosts() -> None:
    """Section 8: when etcd's revision went back, what was written since is gone, and so is it from the view."""
    view = fed((lease_key(5), encode(Lease(ENDPOINT, "there"))), revision=200)
    view.apply([(lease_key(6), encode(Lease(ENDPOINT, "there")), 210)], 210)
    view.reset([], 150, epoch=1)
    assert view.use("lan") == {}
    assert (view.revision, view.epoch) == (150, 1)
    assert not view.wait_for(180, deadline=0)


def test_an_address_rests_no_longer_than_the_cooldown() -> None:
    """A host whose clock is a day ahead wrote when it freed an address; here it rests five minutes like any other."""
    now = [float(START)]
    view = View(KEYS, "here", lambda segment: Local(cooldown=float(COOLDOWN)), lambda: now[0])
    tomorrow = rfc3339(datetime.datetime.fromtimestamp(START + 86_400, datetime.UTC))
    address = address_of(4, number_of(4, 5))
    history = encode(History((Tenancy(ENDPOINT, until=tomorrow),)))
    view.reset([(KEYS.past("lan", address), history, 5)], 5)
    with all_candidates(view, V4) as (found, _):
        assert found[-1] == int(address)
    now[0] += COOLDOWN
    view.lost_race(V4)
    with all_candidates(view, V4) as (found, _):
        assert found == sorted(found, key=lambda n: (n < found[0], n))


@pytest.mark.parametrize("text", ["010.0.0.5", "10.0.0.5/printer", "::ffff:10.0.0.5"])
def test_an_address_typed_otherwise_is_taken_also_for_ip(text: str) -> None:
    """P2: it is neither offered nor given by --ip, and the refusal names the key."""
    view = fed((f"{KEYS.leases}lan/{text}", b"printer"))
    assert text in view.forbids("lan", ipaddress.ip_address("10.0.0.5"))
    with all_candidates(view, V4) as (found, full):
        assert number_of(4, 5) not in found
        assert "1 by a key that spells the address in another way" in full.counts


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("10.0.0.0/29", range(1, 8)),
        ("10.0.0.1-10.0.0.3", range(1, 4)),
        ("10.0.0.1-10.0.0.3/printers", range(1, 4)),
        ("10.0.0.6/32", range(6, 7)),
        ("10.0.0.6/24", range(6, 7)),  # an address with the length of its subnet
        ("10.0.0.6/29", range(6, 7)),
    ],
)
def test_a_key_of_many_addresses_takes_them_all(text: str, taken: range, caplog: pytest.LogCaptureFixture) -> None:
    """P2: whoever reserves a CIDR or a range with etcdctl means all of it. The refusal names the key, the log once."""
    key = f"{KEYS.leases}lan/{text}"
    view = fed((key, b"printers"))
    view.apply([(key, b"printers", 101)], 101)
    for last in taken:
        assert view.forbids("lan", address_of(4, number_of(4, last))) == f"the etcd key {key!r} takes it"
    assert caplog.text.count(key) == 1
    with all_candidates(view, V4) as (found, full):
        assert {number_of(4, last) for last in range(1, 15)} - set(found) == {number_of(4, last) for last in taken}
        assert f"{len(taken)} " in full.counts.partition(":")[2]
    view.apply([(key, None, 102)], 102)
    with all_candidates(view, V4) as (found, _):
        assert len(found) == 14


def test_a_host_counts_in_its_segments() -> None:
    """Two LANs may use the same addresses: a host's own one is nobody else's in its segments, and free in others."""
    address = ipaddress.ip_address("10.0.0.2")
    record = Host("there", addresses=(HostAddress("10.0.0.2", 28, "br0"),), segments=("wan", "dmz"))
    view = fed((KEYS.host("there"), encode(record)))
    assert view.host_with("wan", address) == view.host_with("dmz", address) == "there"
    assert view.host_with("lan", address) == view.forbids("lan", address) == ""
    with all_candidates(view, V4) as (found, _), all_candidates(view, ELSEWHERE) as (other, _):
        assert int(address) in found
        assert int(address) not in other
    # One that says nothing of segments was written before hosts did.
    view.apply([(KEYS.host("there"), encode(msgspec.structs.replace(record, segments=())), 101)], 101)
    assert view.host_with("lan", address) == "there"


def test_the_oldest_history() -> None:
    """Section 4: history is bounded in total. What is beyond the newest is known, in the order of its revisions,
    whoever told it and in whatever order.
    """
    value = encode(History((Tenancy(ENDPOINT),)))
    keys = [KEYS.past("lan", address_of(4, number_of(4, last))) for last in range(6)]
    view = View(KEYS, "here")
    view.reset([(keys[0], value, 9), (keys[1], value, 5), (keys[2], b"junk", 7), (f"{KEYS.history}x", b"x", 2)], 10)
    assert view.oldest_history(0, 10) == [(keys[1], 5), (keys[2], 7), (keys[0], 9)]
    assert view.oldest_history(1, 10) == [(keys[1], 5), (keys[2], 7)]
    assert view.oldest_history(0, 1) == [(keys[1], 5)]
    assert view.oldest_history(3, 10) == []
    view.learn(keys[1], value, 14)
    view.apply([(keys[3], value, 11), (keys[2], None, 12), (keys[4], value, 13), (keys[1], value, 14)], 14)
    assert view.oldest_history(0, 10) == [(keys[0], 9), (keys[3], 11), (keys[4], 13), (keys[1], 14)]
    view.reset([(keys[4], value, 13)], 15)
    assert view.oldest_history(0, 10) == [(keys[4], 13)]


@pytest.mark.parametrize("told", [b'{"excluded": ["10.0.0.2"]}', b'{"reserved": [{"range": "10.0.0.2", "nots": ""}]}'])
def test_a_typing_error_in_settings_is_not_ignored(told: bytes) -> None:
    """P2: what was meant to be excluded would be given out. The settings cannot be read then, and say why."""
    assert "unknown field" in fed((KEYS.segment("lan"), told)).settings("lan").error


def test_settings_that_cannot_be_read_say_why() -> None:
    """To guess could give out what an operator excluded: the reason is kept for the refusal (P2, P7)."""
    view = fed((KEYS.segment("lan"), b'{"exclude": ["ten"]}'))
    assert "'ten' is not an IPv4 or IPv6 address" in view.settings("lan").error
    assert view.settings("lan").revision == 2


def test_pools_hosts_and_own_leases() -> None:
    """The questions about the rest: subnets in use, who uses a pool, whose address it is, what a host holds."""
    use = encode(PoolUse("here", "lan", "10.0.0.0/28"))
    record = encode(Host("there", addresses=(HostAddress("10.0.0.2", 28, "br0"),)))
    view = fed(
        (KEYS.pool(V4, "here"), use),
        (f"{KEYS.pools}no/pool/of/ours/here", use),
        (KEYS.host("there"), record),
        (lease_key(2), encode(Lease(HOST, "there"))),
        (lease_key(3), encode(Lease(ROUTER))),
        (lease_key(5), encode(Lease(ENDPOINT, "here"))),
    )
    assert view.subnets() == {"lan": {V4.subnet}}
    assert view.uses(V4.id, "here")
    assert not view.uses(V4.id, "there")
    assert view.host_with("lan", ipaddress.ip_address("10.0.0.2")) == "there"
    assert view.host_with("lan", ipaddress.ip_address("10.0.0.3")) == ""
    assert [str(address) for address, _ in view.shared_entries(V4, (ROUTER, HOST))] == ["10.0.0.3", "10.0.0.2"]
    assert view.shared_entries(Pool.make("10.0.0.8/29", "", {}, "lan"), (ROUTER, HOST)) == []
    assert [(segment, str(address)) for segment, address, _ in view.entries_of("here")] == [("lan", "10.0.0.5")]
    assert view.use("lan") == {HOST: 1, ROUTER: 1, ENDPOINT: 1}
    view.apply([(KEYS.pool(V4, "here"), None, 101)], 101)
    assert view.subnets() == {}


def test_a_host_that_a_transaction_wrote_is_known_at_once() -> None:
    """P2: this host's own new address is not offered in the moment until the watch tells it."""
    view = fed()
    record = encode(Host("here", addresses=(HostAddress("10.0.0.5", 28, "br0"),)))
    view.learn(KEYS.host("here"), record, 101)
    assert view.forbids("lan", ipaddress.ip_address("10.0.0.5")) == "it is Docker host here's own address"


class Questions:
    """Counts what the sets are asked, and which of that walks through their runs."""

    WALKS = ("__iter__", "__len__", "count")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.walked = 0
        for name, method in list(vars(AddressSet).items()):
            if callable(method) and name != "__init__":
                monkeypatch.setattr(AddressSet, name, self.counting(name, method))

    def counting(self, name: str, method: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.asked += 1
            self.walked += name in self.WALKS
            return method(*arguments)

        return counted


@pytest.mark.parametrize(
    ("subnet", "used"),
    [
        ("10.0.0.0/8", range(0)),
        ("fd00::/64", range(0)),
        ("fd00::/64", range(1, 2000)),
        ("172.16.0.0/16", range(1, 64_900)),
        ("172.16.0.0/16", [number for number in range(1, 65_535) if number % 100]),
    ],
)
def test_choosing_costs_the_same_in_any_pool(subnet: str, used: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 6: a /8, a /64 and a /16 that is 99 % full, in one row or with holes: as few questions each time."""
    pool = Pool.make(subnet, "", {}, "lan")
    version, base = pool.subnet.version, int(pool.subnet.network_address)
    lease = encode(Lease(ENDPOINT, "here"))
    view = fed(*((KEYS.lease("lan", address_of(version, base + last)), lease) for last in used), revision=100_000)
    first_offer(view, pool)  # works out once what is forbidden
    questions = Questions(monkeypatch)
    for _ in range(20):
        first_offer(view, pool)
    assert questions.asked <= 20 * 16
    assert questions.walked == 0


def test_two_requests_are_never_offered_the_same_address() -> None:
    """What one request tries, another of this daemon is not offered; it is told that others are still trying."""
    view = fed()
    with all_candidates(view, V4) as (found, full):
        assert len(found) == len(set(found)) == 14
        assert full.pending
        with view.candidate(V4) as offered:
            assert offered == full
    with all_candidates(view, V4) as (found, _):
        assert len(found) == 14


def test_an_address_that_rests_goes_on_resting() -> None:
    """Given (nothing else was left) and taken back within its cooldown, it still comes after all others."""
    until = rfc3339(datetime.datetime.fromtimestamp(START, datetime.UTC))
    address = address_of(4, number_of(4, 5))
    view = fed((KEYS.past("lan", address), encode(History((Tenancy(ENDPOINT, until=until),)))))
    view.apply([(lease_key(5), encode(Lease(ENDPOINT, "here")), 101)], 101)
    view.apply([(lease_key(5), None, 102)], 102)
    with all_candidates(view, V4) as (found, _):
        assert found[-1] == int(address)


# --- the wire and standby ------------------------------------------------------------------------------


def address(last: int) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(number_of(4, last))


def test_who_should_be_on_the_lan() -> None:
    """Section 7: the wire lives where one of them is heard: the segment's routers first, then the hosts that live, in
    this subnet, and not this host itself. What cannot be read, and hosts of other segments, are left out.
    """

    def record(name: str, *told: str, segments: tuple[str, ...] = ()) -> tuple[str, bytes]:
        addresses = tuple(HostAddress(each, 28, "br0") for each in told)
        return KEYS.host(name), encode(Host(name, addresses=addresses, segments=segments))

    view = fed(
        record("here", "10.0.0.2"),
        record("there", "10.0.0.3", "10.0.9.3", "fd00::3", "nonsense"),
        record("off", "10.0.0.4"),
        record("far", "10.0.0.5", segments=("wan",)),
        *((KEYS.heartbeat(name), b"{}") for name in ("here", "there", "far")),
        (KEYS.segment("lan"), b'{"router":["10.0.0.1","10.0.9.1"]}'),
    )
    assert [str(each) for each in view.peers("lan", V4.subnet, "here")] == ["10.0.0.1", "10.0.0.3"]
    assert [str(each) for each in view.peers("lan", V6.subnet, "here")] == ["fd00::3"]
    assert view.is_alive("there")
    assert not view.is_alive("off")
    view.apply([(KEYS.heartbeat("there"), None, 101)], 101)
    assert [str(each) for each in view.peers("lan", V4.subnet, "here")] == ["10.0.0.1"]
    view.reset([], 102)
    assert not view.is_alive("here")


def test_macs_that_are_no_strangers() -> None:
    """Section 7: registered hosts', for as long as they are; and of leases that ended less than two minutes ago, by the
    clock of whoever ended them, but no longer than that from now. Only containers' are remembered.
    """
    now = [float(START)]
    view = View(KEYS, "here", lambda segment: Local(cooldown=0.0), lambda: now[0])

    def ended(kind: str, mac: str, ago: float, last: int, revision: int) -> tuple[str, bytes, int]:
        until = rfc3339(datetime.datetime.fromtimestamp(now[0] - ago, datetime.UTC))
        return KEYS.past("lan", address(last)), encode(History((Tenancy(kind, mac=mac, until=until),))), revision

    hosts = encode(
        Host(
            "there",
            addresses=(HostAddress("10.0.0.2", 28, "br0", "aa"), HostAddress("x", 28, "br1", "bb")),
            macs=("aa", "listens"),  # the parent of a macvlan network needs no address
        )
    )
    view.reset(
        [
            (KEYS.host("there"), hosts, 2),
            ended(ENDPOINT, "lately", 100, 5, 3),
            ended(ENDPOINT, "ahead", -86_400, 6, 4),
            ended(ENDPOINT, "long ago", 121, 7, 5),
            ended(CONFLICT, "stranger", 1, 8, 6),
        ],
        10,
    )
    assert view.host_macs() == {"aa", "bb", "listens"}
    told = ("aa", "bb", "listens", "lately", "ahead", "long ago", "stranger", "")
    assert [mac for mac in told if view.is_ours(mac)] == ["aa", "bb", "listens", "lately", "ahead"]
    now[0] += 30
    assert not view.is_ours("lately")
    now[0] += 91
    assert not view.is_ours("ahead")
    view.apply([ended(ENDPOINT, "lately", 0, 9, 11), (KEYS.host("there"), None, 12)], 12)
    assert view.is_ours("lately")
    assert not view.is_ours("aa")


def test_macs_of_ended_leases_are_bounded() -> None:
    """However many containers end, the oldest are forgotten."""
    view = fed()
    until = rfc3339(datetime.datetime.fromtimestamp(START, datetime.UTC))
    for number in range(5000):
        value = encode(History((Tenancy(ENDPOINT, mac=f"mac-{number}", until=until),)))
        view.apply([(KEYS.past("lan", address(5)), value, 101 + number)], 101 + number)
    assert not view.is_ours("mac-0")
    assert view.is_ours("mac-4999")
    assert sum(view.is_ours(f"mac-{number}") for number in range(5000)) == 4096


def test_leases_of_a_kind() -> None:
    """In every segment and of both IP versions, of one host or of all, with what a transaction compares."""
    view = fed(
        (lease_key(5), encode(Lease(STANDBY, "here", token="t5"))),
        (lease_key(6), encode(Lease(STANDBY, "there"))),
        (lease_key(7), encode(Lease(ENDPOINT, "here"))),
        (KEYS.lease("wan", ipaddress.ip_address("fd00::5")), encode(Lease(STANDBY, "here"))),
    )
    found = view.of_kind(STANDBY, "here")
    assert [(segment, str(each)) for segment, each, _ in found] == [("lan", "10.0.0.5"), ("wan", "fd00::5")]
    assert (found[0][2].token, found[0][2].revision) == ("t5", 2)
    assert [str(each) for _, each, _ in view.of_kind(STANDBY)] == ["10.0.0.5", "10.0.0.6", "fd00::5"]
    assert view.of_kind(CONFLICT) == []
    assert [(str(each), entry.host) for each, entry in view.spare_in(V4, STANDBY)] == [
        ("10.0.0.5", "here"), ("10.0.0.6", "there"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("used", "standby", "expected"), [(0, 0, 0.0), (7, 0, 0.5), (7, 7, 0.5), (14, 0, 1.0), (0, 14, 0.0)]
)
def test_how_full_a_pool_is(used: int, standby: int, expected: float) -> None:
    """Section 7: over 80 % nobody keeps standby; standby itself makes a pool no fuller."""
    leases = [*[Lease(ENDPOINT, "there")] * used, *[Lease(STANDBY, "there")] * standby]
    assert fed(*((lease_key(1 + place), encode(each)) for place, each in enumerate(leases))).fill(V4) == expected


def test_a_pool_without_any_address_is_full() -> None:
    """Nothing is divided by nothing."""
    view = fed((KEYS.segment("lan"), b'{"exclude":["10.0.0.0/28"]}'))
    assert view.fill(V4) == 1.0
    assert not view.has_free(V4)


@pytest.mark.parametrize(
    ("asking", "wanted"),
    [
        ("lan/10.0.0.0/28", True),
        ("lan/10.0.0.0/24/10.0.0.14/32", True),  # another network, whose range meets this one
        ("lan/10.0.0.0/24/10.0.0.16/28", False),
        ("wan/10.0.0.0/28", False),
        ("lan/fd00::/124", False),
        ("nonsense", False),
        ("lan/10.0.0.0/99", False),
    ],
)
def test_standby_that_is_asked_for(asking: str, wanted: bool) -> None:
    """Section 7: another host's key asks for standby in every pool whose range meets its own; junk asks for nothing."""
    view = fed()
    told: list[bool] = []
    view.on_wanted = lambda: told.append(view.wanted_of(V4, "here"))
    view.apply([(f"{KEYS.wanted}{asking}/there", b"{}", 101)], 101)
    assert told == [wanted]
    assert not view.wanted_of(V4, "there"), "its own key asks nothing of a host"
    view.apply([(f"{KEYS.wanted}{asking}/here", b"{}", 102), (f"{KEYS.wanted}{asking}/there", None, 103)], 103)
    assert not view.wanted_of(V4, "here")
    assert told == [wanted, False]
    view.apply([(f"{KEYS.wanted}{asking}/there", b"{}", 104)], 104)
    view.reset([], 105)
    assert not view.wanted_of(V4, "here")


def test_addresses_that_nobody_should_have() -> None:
    """For telling proxy ARP from a machine: of the whole subnet, not the range; nothing that is taken, that rests, that
    is being tried or that may not be given; not the one in question; others on every call; fewer where there are few.
    """
    wide = Pool.make("10.0.0.0/24", "10.0.0.8/29", {}, "lan")
    view = fed(
        *((lease_key(last), encode(Lease(ENDPOINT, "there"))) for last in range(1, 100)),
        (KEYS.segment("lan"), b'{"exclude":["10.0.0.100-10.0.0.150"],"router":"10.0.0.254"}'),
    )
    view.skip("lan", address(200), 60)
    drawn = [each for _ in range(50) for each in view.unused(wide, 2, but=address(201))]
    assert {int(each) - number_of(4, 0) for each in drawn} <= set(range(151, 254)) - {200, 201}
    assert len(set(drawn)) > 30
    assert all(len(set(view.unused(wide, 2, but=address(201)))) == 2 for _ in range(20))
    small = Pool.make("10.0.0.252/30", "", {}, "lan")
    assert set(view.unused(small, 2, but=address(254))) <= {address(253)}
    with view.candidate(V4) as being_tried:
        assert isinstance(being_tried, Full)
    with view.candidate(small) as being_tried:
        assert being_tried == address(253)
        assert view.unused(small, 2, but=address(254)) == []


def test_an_address_that_is_skipped() -> None:
    """A rumour: left alone for a while, as long as there are others. It never ends a rest that is longer."""
    now = [float(START)]
    view = View(KEYS, "here", lambda segment: Local(cooldown=float(COOLDOWN)), lambda: now[0])
    freed = rfc3339(datetime.datetime.fromtimestamp(START, datetime.UTC))
    view.reset([(KEYS.past("lan", address(6)), encode(History((Tenancy(ENDPOINT, until=freed),))), 5)], 5)
    for last in (5, 6):
        view.skip("lan", address(last), 60)
    with all_candidates(view, V4) as (found, _):
        assert set(found[-2:]) == {number_of(4, 5), number_of(4, 6)}
        assert len(found) == 14
    now[0] += 61
    for _ in range(3):
        first_offer(view, V4)  # so that it is not the last one of the round by chance
    with all_candidates(view, V4) as (found, _):
        assert found[-1] == number_of(4, 6)
    now[0] += COOLDOWN
    assert view.has_free(V4)
    assert nothing_avoided(view)


def nothing_avoided(view: View) -> bool:
    """Whether nothing is left of rests and rumours."""
    family = view._segment("lan").families[4]
    return not len(family.resting) and not len(family.rumours) and not len(family.avoid)


def test_a_flood_of_rumours_is_bounded() -> None:
    """P6: anybody on the LAN can be heard with one address after the other. The last 4,096 are kept, whatever time they
    have; those before are forgotten and may be chosen again, but for those that are taken or rest.
    """
    pool = Pool.make("10.0.0.0/16", "", {}, "lan")
    freed = rfc3339(datetime.datetime.fromtimestamp(START, datetime.UTC))
    view = fed(
        (lease_key(5), encode(Lease(ENDPOINT, "there"))),
        (KEYS.past("lan", address(6)), encode(History((Tenancy(ENDPOINT, until=freed),)))),
    )
    for last in range(2, 20_000, 2):  # no two of them touch
        view.skip("lan", address(last), 300)
        view.skip("lan", address(5), 1)
        view.skip("lan", address(6), 1)
    family = view._segment("lan").families[4]
    assert len(family.rumours) == 4096
    assert len(family.avoid) == 4096 + 2
    assert all(number_of(4, last) in family.avoid for last in range(20_000 - 2 * 4096, 20_000, 2))
    assert all(number_of(4, last) in family.avoid for last in (5, 6))
    assert view.has_free(pool)


def test_strangers_that_chat_all_day_cost_nothing() -> None:
    """P6: a rumour that is heard again is the same one with a new end, also while nobody asks for an address; silent
    for that long, it is forgotten without that.
    """
    now = [float(START)]
    view = View(KEYS, "here", lambda segment: Local(cooldown=float(COOLDOWN)), lambda: now[0])
    for _ in range(50):
        for last in range(1, 401, 2):
            view.skip("lan", address(last), 300)
        now[0] += 200
        view.wake_rested()
        family = view._segment("lan").families[4]
        assert len(family.rumours) == len(family.avoid) == len(family.rumours._heap) == 200
    now[0] += 300
    view.wake_rested()
    assert nothing_avoided(view)


def test_many_rests_that_end_at_once_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: the view is locked while they are forgotten, so a request forgets at most 1,000 of them; what is not yet
    forgotten is still given when nothing else is left.
    """
    now = [float(START)]
    view = View(KEYS, "here", lambda segment: Local(cooldown=float(COOLDOWN)), lambda: now[0])
    freed = encode(History((Tenancy(ENDPOINT, until=rfc3339(datetime.datetime.fromtimestamp(START, datetime.UTC))),)))
    view.reset([(KEYS.past("lan", address(last)), freed, 1 + last) for last in range(1, 5_001)], 10_000)
    view.has_free(V4)  # works out once what is forbidden
    now[0] += COOLDOWN
    questions = Questions(monkeypatch)
    assert view.has_free(V4)
    assert questions.asked <= 2 * 1000 + 32
    questions.asked = 0
    view.wake_rested()
    assert questions.asked <= 2 * 1000
    for _ in range(3):
        view.wake_rested()
    assert nothing_avoided(view)


def test_waiting_for_a_condition() -> None:
    """It is looked at when the view changes and every now and then, since it may depend on more; until its time."""
    view = fed()
    assert view.wait_until(lambda: True, time.monotonic() - 1)
    began = time.monotonic()
    assert not view.wait_until(lambda: False, began + 0.15)
    assert 0.1 < time.monotonic() - began < 2
    elsewhere = threading.Event()
    timer = threading.Timer(0.05, elsewhere.set)
    timer.start()
    assert view.wait_until(elsewhere.is_set, time.monotonic() + 10)
    timer.join()
    writer = threading.Timer(0.05, view.apply, args=([(lease_key(5), encode(Lease(STANDBY, "here")), 101)], 101))
    writer.start()
    assert view.wait_until(lambda: view.of_kind(STANDBY) != [], time.monotonic() + 10)
    writer.join()
