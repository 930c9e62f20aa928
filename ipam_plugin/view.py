"""What this daemon knows of the register, and which address it would try next. Pure but for a lock and a log line.

The view is fed by a watch on etcd and by this daemon's own transactions. It is only a hint: it may be behind,
and the transaction decides (promise P1). What a stale view costs is one more try. The lock keeps the structure
whole between threads; no promise rests on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import itertools
import logging
import operator
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ipam_plugin.addresses import (
    Address,
    AddressSet,
    Network,
    Range,
    address_of,
    next_outside,
    parse_address,
    parse_range,
    range_of,
)
from ipam_plugin.errors import Refused
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    KINDS,
    RESERVED,
    STANDBY,
    UNREADABLE,
    UNUSED,
    History,
    Host,
    Keys,
    Lease,
    Pool,
    PoolUse,
    Restored,
    SegmentSettings,
    decode,
    parse_duration,
    parse_time,
    read_lease,
    segment_and_address,
    segment_and_taken,
)

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What is kept in memory of a lease: enough to skip the address, to count it and to recognise our own."""

    kind: str
    host: str
    token: str
    revision: int


class Held(NamedTuple):
    """An address that this host keeps for a container that stopped. There are few, so all of the lease is kept."""

    segment: str
    address: Address
    revision: int
    lease: Lease


class Local(NamedTuple):
    """What this host's own configuration adds to a segment."""

    exclude: tuple[Range, ...] = ()
    routers: tuple[Address, ...] = ()
    cooldown: float = 300.0  # seconds
    hold: float = 0.0  # seconds
    interface: str = ""  # the one that carries the segment, where that is not plain


class Settings(NamedTuple):
    """A segment's settings in etcd as last read, and the revision that a grant compares."""

    revision: int  # 0: there are none
    value: SegmentSettings
    error: str  # why they cannot be read; nothing is given out then


class Full(NamedTuple):
    """Why no address can be chosen."""

    pending: bool  # other requests of this daemon are trying the last ones
    counts: str  # for the sentence


TICK = 0.1  # seconds between two looks at what does not say that it changed
ENDED_MACS = 4096  # remembered
ENDED_LATELY = 120.0  # seconds for which the MAC of an ended lease is no stranger's (design section 7)
POINTS = 16  # tries to land on a free address, each a few binary searches
RUMOURS = 4096  # addresses of a family that are skipped because of them; anybody on the LAN can make more
ENDED_AT_ONCE = 1000  # so that nobody waits for the lock while many ends come at one time

NO_SETTINGS = Settings(0, SegmentSettings(), "")


class _Ends:
    """Addresses that are left alone, each until its own time (seconds since the epoch)."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}
        # One pair for each address, with its end or, where that was put off, an earlier one.
        self._heap: list[tuple[float, int]] = []

    def __contains__(self, number: int) -> bool:
        return number in self._until

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, number: int, until: float) -> None:
        """An end is put off, never put forward."""
        known = self._until.get(number)
        if known is None:
            heapq.heappush(self._heap, (until, number))
        self._until[number] = until if known is None else max(until, known)

    def ended(self, now: float) -> Iterator[int]:
        """Forget and tell the addresses whose time is over, after ENDED_AT_ONCE looks the rest is for the next call."""
        for _ in range(ENDED_AT_ONCE):
            if not self._heap or self._heap[0][0] > now:
                return
            number = self._heap[0][1]
            if self._until[number] > now:
                heapq.heapreplace(self._heap, (self._until[number], number))
            else:
                yield self._forget_first()

    def forget_next(self) -> int:
        """Forget and tell the address whose time would be over first."""
        while (end := self._until[self._heap[0][1]]) > self._heap[0][0]:
            heapq.heapreplace(self._heap, (end, self._heap[0][1]))
        return self._forget_first()

    def _forget_first(self) -> int:
        _, number = heapq.heappop(self._heap)
        del self._until[number]
        return number


class _Family:
    """The addresses of one IP version in one segment."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.taken = AddressSet()
        self.resting = _Ends()  # were in use a moment ago; each is in the history, so there are not too many
        self.rumours = _Ends()  # somebody may use them; at most RUMOURS
        # All of these in one set: two large sets that interleave would have to be walked in turns.
        self.avoid = AddressSet()
        self.pending = AddressSet()  # being tried by a request of this daemon
        self.kinds: dict[str, AddressSet] = {}
        self.held: dict[int, Lease] = {}  # this host's
        self.aliases: dict[int, dict[str, int]] = {}  # keys that spell the address another way -> revision

    def set(self, number: int, entry: Entry, held: Lease | None = None) -> None:
        old = self.entries.get(number)
        if old is not None:
            if old.revision > entry.revision:
                return
            if old.kind != entry.kind:
                self.kinds[old.kind].discard(number)
        self.held.pop(number, None)
        if held is not None:
            self.held[number] = held
        self.entries[number] = entry
        self.taken.add(number)
        self.avoid.add(number)
        self.kinds.setdefault(entry.kind, AddressSet()).add(number)

    def remove(self, number: int, revision: int) -> None:
        old = self.entries.get(number)
        if old is None or old.revision > revision:
            return
        del self.entries[number]
        self.held.pop(number, None)
        self.kinds[old.kind].discard(number)
        self._freed(number)

    def alias(self, number: int, key: str, revision: int | None) -> None:
        """A hand-written key in another spelling (None: it is gone)."""
        keys = self.aliases.setdefault(number, {})
        if revision is not None:
            keys[key] = revision
            self.taken.add(number)
            self.avoid.add(number)
            return
        keys.pop(key, None)
        if not keys:
            del self.aliases[number]
            self._freed(number)

    def _freed(self, number: int) -> None:
        if number in self.entries or number in self.aliases:
            return
        self.taken.discard(number)
        self._avoid_no_more(number)

    def rest(self, number: int, until: float) -> None:
        self.resting.add(number, until)
        self.avoid.add(number)

    def skip(self, number: int, until: float) -> None:
        self.rumours.add(number, until)
        self.avoid.add(number)
        if len(self.rumours) > RUMOURS:
            self._avoid_no_more(self.rumours.forget_next())

    def wake(self, now: float) -> None:
        """Avoid no more those whose time is over; of very many only some, the rest at the next call."""
        for ends in (self.resting, self.rumours):
            for number in ends.ended(now):
                self._avoid_no_more(number)

    def _avoid_no_more(self, number: int) -> None:
        if number not in self.taken and number not in self.resting and number not in self.rumours:
            self.avoid.discard(number)


class _Segment:
    def __init__(self) -> None:
        self.families = {4: _Family(), 6: _Family()}
        self.settings = NO_SETTINGS
        self.ranges: dict[str, tuple[int, Range]] = {}  # hand-written lease keys of many addresses -> revision, which


class View:
    """One segment space as seen by one host. All methods may be called from any thread."""

    def __init__(
        self,
        keys: Keys,
        host: str,
        local: Callable[[str], Local] = lambda segment: Local(),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._host = host
        self._local = functools.cache(local)
        self._now = now  # seconds since the epoch
        self._changed = threading.Condition()
        self._segments: dict[str, _Segment] = {}
        self._hosts: dict[str, tuple[int, Host]] = {}
        self._unreadable_hosts: set[str] = set()  # whose record is there and cannot be read
        self._host_numbers: dict[str, dict[int, AddressSet]] = {}  # by segment, those of all segments under ""
        self._host_macs: frozenset[str] = frozenset()
        self._ended_macs: OrderedDict[str, float] = OrderedDict()  # MACs of leases that ended -> when, since the epoch
        self._alive: dict[str, int] = {}  # host -> revision
        self._wanted: dict[str, tuple[int, str, str]] = {}  # key -> (revision, PoolID, host)
        self._orders: dict[str, int] = {}  # hosts that are to be retired -> revision of the order
        self._lost: set[str] = set()  # hosts that lost something while they were away
        self._history: OrderedDict[str, int] = OrderedDict()  # keys -> revision, in the order of the revisions
        self._generation = 0  # of hosts and hand-written ranges: what is forbidden is worked out anew
        self._pools: dict[str, dict[str, tuple[int, PoolUse]]] = {}  # PoolID -> host -> use
        self._forbidden: dict[str, tuple[tuple[int, int], AddressSet]] = {}
        self._cursors: dict[str, int] = {}
        self._drawn = 0  # how many numbers were drawn: what the next one is hashed with
        self._reported: set[str] = set()
        self.revision = 0  # everything up to this revision of etcd is in the view
        self.loaded = threading.Event()  # the first list has been read
        self.on_lease: Callable[[str, Entry], None] = lambda key, entry: None
        self.on_pools: Callable[[], None] = lambda: None
        self.on_wanted: Callable[[], None] = lambda: None
        self.on_orders: Callable[[], None] = lambda: None
        # In the thread that feeds, with the token, before anybody sees the change.
        self.on_restored: Callable[[str], None] = lambda token: None
        self.epoch = 0  # of etcd's answers that it was read from
        self._restored: tuple[int, Restored | None] = (0, None)

    # ------------------------------------------------------------------------------------ being fed

    def reset(self, values: Iterable[tuple[str, bytes, int]], revision: int, epoch: int = 0) -> None:
        """Everything below the prefix, as (key, value, revision), listed at one revision.

        Another `epoch` than before means that etcd went back to a backup: what the view knew is void.
        """
        with self._changed:
            went_back = epoch != self.epoch or revision < self.revision
            newer = [
                (segment, version, number, entry, family.held.get(number))
                for segment, each in self._segments.items()
                for version, family in each.families.items()
                for number, entry in family.entries.items()
                if entry.revision > revision and not went_back
            ]
            pending = {
                (name, version): family.pending
                for name, each in self._segments.items()
                for version, family in each.families.items()
            }
            self._segments, self._hosts, self._pools, self._forbidden = {}, {}, {}, {}
            self._unreadable_hosts.clear()
            self._history.clear()
            self._alive, self._wanted, self._orders = {}, {}, {}
            self._lost.clear()
            self._restored = (0, None)
            for (name, version), numbers in pending.items():
                self._segment(name).families[version].pending = numbers
            for key, value, key_revision in values:
                self._apply(key, value, key_revision)
            for segment, version, number, entry, held in newer:  # our own transactions, which the list does not have
                self._segment(segment).families[version].set(number, entry, held)
            self._history = OrderedDict(sorted(self._history.items(), key=operator.itemgetter(1)))
            self._read_hosts()
            self.revision, self.epoch = revision, epoch
            self.on_restored(self._restored[1].token if self._restored[1] else "")
            self.loaded.set()
            self._changed.notify_all()
        self.on_pools()

    def apply(self, events: Iterable[tuple[str, bytes | None, int]], revision: int) -> None:
        """Changes in the order of their revisions, as (key, value or None when deleted, revision)."""
        pools = wanted = orders = False
        with self._changed:
            for key, value, key_revision in events:
                pools |= key.startswith(self._keys.pools)
                wanted |= key.startswith(self._keys.wanted)
                orders |= key.startswith((self._keys.retiring, self._keys.gone))
                self._apply(key, value, key_revision)
                if key.startswith(self._keys.hosts):
                    self._read_hosts()
            self.revision = max(self.revision, revision)
            self._changed.notify_all()
        if pools:
            self.on_pools()
        if wanted:
            self.on_wanted()
        if orders:
            self.on_orders()

    def learn(self, key: str, value: bytes | None, revision: int) -> None:
        """What a transaction of this daemon wrote or found. The watch will say it again.

        Unless it has said so already, and perhaps what came after: a lease that is gone by now would then come back
        into the view, and nothing would ever take it out.
        """
        with self._changed:
            if revision <= self.revision:
                return
            self._apply(key, value, revision)
            if key.startswith(self._keys.hosts):
                self._read_hosts()
            self._changed.notify_all()

    def _apply(self, key: str, value: bytes | None, revision: int) -> None:
        keys = self._keys
        if key.startswith(keys.leases):
            self._apply_lease(key, value, revision)
        elif key.startswith(keys.history):
            self._apply_history(key, value, revision)
        elif key.startswith(keys.segments):
            self._apply_settings(key.removeprefix(keys.segments), value, revision)
        elif key.startswith(keys.pools):
            self._apply_pool(key, value, revision)
        elif key.startswith(keys.alive):
            name = key.removeprefix(keys.alive)
            if value is None:
                self._alive.pop(name, None)
            else:
                self._alive[name] = revision
        elif key.startswith(keys.retiring):
            name = key.removeprefix(keys.retiring)
            if value is None:
                self._orders.pop(name, None)
            elif "/" not in name:  # how far it got stands below it
                self._orders[name] = revision
        elif key == keys.restored:
            self._apply_restored(value, revision)
        elif key.startswith(keys.gone):
            (self._lost.discard if value is None else self._lost.add)(key.removeprefix(keys.gone))
        elif key.startswith(keys.wanted):
            pool_id, _, host = key.removeprefix(keys.wanted).rpartition("/")
            if value is None:
                self._wanted.pop(key, None)
            else:
                self._wanted[key] = (revision, pool_id, host)
        elif key.startswith(keys.hosts):
            name = key.removeprefix(keys.hosts)
            if name in self._hosts and revision < self._hosts[name][0]:
                return
            self._unreadable_hosts.discard(name)
            if value is None:
                self._hosts.pop(name, None)
                return
            try:
                self._hosts[name] = (revision, decode(value, Host))
            except ValueError as error:
                self._unreadable_hosts.add(name)
                self._report(key, f"cannot be read ({error}); the addresses it names are not known here")

    def _apply_lease(self, key: str, value: bytes | None, revision: int) -> None:
        try:
            segment, address = segment_and_taken(key.removeprefix(self._keys.leases))
        except ValueError as error:
            if value is not None:
                self._report(key, f"names no address and takes none: {error}")
            return
        if isinstance(address, Range):
            self._apply_range(segment, address, key, value, revision)
            return
        family, number = self._segment(segment).families[address.version], int(address)
        if key != self._keys.lease(segment, address):
            if value is not None:
                self._report(key, f"spells {address} in another way; it counts as taken")
            family.alias(number, key, None if value is None else revision)
        elif value is None:
            family.remove(number, revision)
        else:
            lease = read_lease(value)
            if lease.kind == UNREADABLE:
                self._report(key, f"has a value that cannot be read, {lease.note}; {address} counts as taken")
            # A number of its own: the one of the list would keep the list's memory from being given back, because the
            # interpreter frees only whole arenas (25 MB with 65,536 leases).
            entry = Entry(lease.kind, _interned(lease.host), lease.token, revision + 0)
            family.set(number, entry, lease if (lease.kind, lease.host) == (HELD, self._host) else None)
            self.on_lease(key, entry)

    def _apply_range(self, name: str, taken: Range, key: str, value: bytes | None, revision: int) -> None:
        """An operator wrote a CIDR or a range where an address belongs: what else could it mean than all of them?"""
        ranges = self._segment(name).ranges
        if key in ranges and revision < ranges[key][0]:
            return
        if value is None:
            ranges.pop(key, None)
        else:
            ranges[key] = (revision, taken)
            self._report(key, f"names {taken.size()} addresses; all of them count as taken")
        self._generation += 1

    def _apply_history(self, key: str, value: bytes | None, revision: int) -> None:
        if revision < self._history.get(key, 0):
            return
        if value is None:
            self._history.pop(key, None)
            return
        try:
            segment, address = segment_and_address(key.removeprefix(self._keys.history))
            self._history[key] = revision
            # A transaction may have told it before what is older; the watch tells all in their order.
            self._history.move_to_end(key)
            past = decode(value, History).past
        except ValueError as error:
            self._report(key, f"cannot be read: {error}")
            return
        # While it was held nobody used it: it rests since its container stopped.
        used = next((each for each in past if each.kind not in UNUSED), None)
        freed = parse_time(used.until) if used else None
        if used is not None and freed is not None:
            # Freed by a host whose clock is ahead, it still rests no longer than the cooldown.
            now = self._now()
            if used.mac and used.kind == ENDPOINT:
                # It has a while for going down. A retired host's has not: where it speaks, its host was only cut off.
                self._ended_macs[used.mac] = min(freed, now) - (ENDED_LATELY if used.retired else 0.0)
                self._ended_macs.move_to_end(used.mac)
                while len(self._ended_macs) > ENDED_MACS:
                    self._ended_macs.popitem(last=False)
            until = min(freed, now) + self._cooldown(segment)
            if until > now:
                self._segment(segment).families[address.version].rest(int(address), until)

    def _apply_settings(self, name: str, value: bytes | None, revision: int) -> None:
        segment = self._segment(name)
        if revision < segment.settings.revision:
            return
        if value is None:
            segment.settings = NO_SETTINGS
            return
        try:
            settings = decode(value, SegmentSettings)
            settings.ranges(), settings.routers()
            segment.settings = Settings(revision, settings, "")
        except ValueError as error:
            # To guess here could give out what an operator excluded.
            self._report(self._keys.segment(name), f"cannot be read, so nothing is given out in it: {error}")
            segment.settings = Settings(revision, SegmentSettings(), str(error))

    def _apply_restored(self, value: bytes | None, revision: int) -> None:
        if revision < self._restored[0]:
            return
        try:
            restored = decode(value, Restored) if value is not None else None
        except ValueError as error:
            # Somebody means that etcd was restored, whatever else he wrote.
            self._report(self._keys.restored, f"cannot be read: {error}")
            restored = Restored(token=f"revision {revision}")
        self._restored = (revision if value is not None else 0, restored)
        self.on_restored(restored.token if restored else "")

    def _apply_pool(self, key: str, value: bytes | None, revision: int) -> None:
        pool_id, _, host = key.removeprefix(self._keys.pools).rpartition("/")
        known = self._pools.get(pool_id, {}).get(host)
        if known is not None and revision < known[0]:
            return
        if value is None:
            if known is not None:
                del self._pools[pool_id][host]
            return
        try:
            self._pools.setdefault(pool_id, {})[host] = (revision, decode(value, PoolUse))
        except ValueError as error:
            self._report(key, f"cannot be read: {error}")

    def _read_hosts(self) -> None:
        numbers: dict[str, dict[int, AddressSet]] = {}
        for _, host in self._hosts.values():
            for each in host.addresses:
                try:
                    address = parse_address(each.address)
                except ValueError:
                    continue
                for segment in host.segments or ("",):
                    families = numbers.setdefault(segment, {4: AddressSet(), 6: AddressSet()})
                    families[address.version].add(int(address))
        self._host_numbers = numbers
        self._host_macs = frozenset(
            mac
            for _, host in self._hosts.values()
            for mac in (*host.macs, *(each.mac for each in host.addresses))
            if mac
        )
        self._generation += 1

    def _numbers_of_hosts(self, segment: str, version: int) -> list[AddressSet]:
        return [self._host_numbers[name][version] for name in ("", segment) if name in self._host_numbers]

    def _report(self, key: str, what: str) -> None:
        if key not in self._reported:
            if len(self._reported) > 1000:
                self._reported.clear()
            self._reported.add(key)
            log.warning("etcd key %s %s", ascii(key), what)

    def _segment(self, name: str) -> _Segment:
        if name not in self._segments:
            self._segments[name] = _Segment()
        return self._segments[name]

    def _cooldown(self, segment: str) -> float:
        return self._local(segment).cooldown

    # ------------------------------------------------------------------------------------ questions

    def restored(self) -> tuple[int, Restored | None]:
        """That etcd went back, as it stands there, and the revision of that; 0 and None where it never did."""
        with self._changed:
            return self._restored

    def hosts_present(self) -> dict[str, str]:
        """The hosts that are not known to be absent, and the token of the last `restored` that each has answered."""
        with self._changed:
            found = {name: host.restored for name, (_, host) in self._hosts.items() if not host.absent}
            return {**dict.fromkeys(self._alive, ""), **found}

    def hold(self, pool: Pool) -> float:
        """For how many seconds an address of the pool is kept for its container; the network's own word counts."""
        return parse_duration(pool.hold) if pool.hold else self._local(pool.segment).hold

    def held(self) -> list[Held]:
        """What this host keeps for containers that stopped, in the order in which they did."""
        with self._changed:
            found = [
                Held(name, address_of(version, number), family.entries[number].revision, lease)
                for name, segment in self._segments.items()
                for version, family in segment.families.items()
                for number, lease in family.held.items()
            ]
        return sorted(found, key=lambda each: (parse_time(each.lease.since) or 0.0, each.revision))

    def held_at(self, segment: str, address: Address) -> Held | None:
        """What this host keeps at this address."""
        with self._changed:
            family = self._segment(segment).families[address.version]
            lease = family.held.get(int(address))
            return Held(segment, address, family.entries[int(address)].revision, lease) if lease else None

    def entry(self, segment: str, address: Address) -> Entry | None:
        with self._changed:
            return self._segment(segment).families[address.version].entries.get(int(address))

    def interface(self, segment: str) -> str:
        """The interface that this host's configuration names for the segment, or ''."""
        return self._local(segment).interface

    def settings(self, segment: str) -> Settings:
        with self._changed:
            return self._segment(segment).settings

    def routers(self, segment: str) -> list[Address]:
        """The segment's routers, from etcd and from this host's configuration."""
        told = self.settings(segment).value.routers()
        return [*told, *(each for each in self._local(segment).routers if each not in told)]

    def shared_entries(self, pool: Pool, kinds: Iterable[str]) -> list[tuple[Address, Entry]]:
        """The leases of these kinds in the pool's subnet."""
        whole = range_of(pool.subnet)
        with self._changed:
            family = self._segment(pool.segment).families[whole.version]
            return [
                (address_of(whole.version, number), family.entries[number])
                for kind in kinds
                for first, last in list(family.kinds.get(kind, AddressSet()))
                for number in range(max(first, whole.first), min(last, whole.last) + 1)
            ]

    def own_addresses(self, host: str) -> list[tuple[str, Address]]:
        """The host's leases of kind `host`, as (segment, address)."""
        with self._changed:
            return [
                (name, address_of(version, number))
                for name, segment in self._segments.items()
                for version, family in segment.families.items()
                for first, last in family.kinds.get(HOST, AddressSet())
                for number in range(first, last + 1)
                if family.entries[number].host == host
            ]

    def entries_of(self, host: str) -> list[tuple[str, Address, Entry]]:
        """All leases of a host, as (segment, address, entry).

        An operator's reservation and a stranger's address are no host's, whatever somebody wrote there by hand.
        """
        with self._changed:
            return [
                (name, address_of(version, number), entry)
                for name, segment in self._segments.items()
                for version, family in segment.families.items()
                for number, entry in family.entries.items()
                if entry.host == host and entry.kind not in (RESERVED, CONFLICT)
            ]

    def subnets(self) -> dict[str, set[Network]]:
        """The subnets of all pools in use, by segment: where a Docker host's own address matters."""
        with self._changed:
            found: dict[str, set[Network]] = {}
            for pool_id, uses in self._pools.items():
                if uses:
                    try:
                        pool = Pool.parse(pool_id)
                    except Refused:
                        self._report(self._keys.pools + pool_id, "is no pool that this version understands")
                        continue
                    found.setdefault(pool.segment, set()).add(pool.subnet)
            return found

    def uses(self, pool_id: str, host: str) -> bool:
        with self._changed:
            return host in self._pools.get(pool_id, {})

    def pool_use(self, pool_id: str, host: str) -> PoolUse | None:
        """How a host uses a pool."""
        with self._changed:
            known = self._pools.get(pool_id, {}).get(host)
            return known[1] if known else None

    def pools_of(self, host: str) -> list[str]:
        """The PoolIDs that a host uses."""
        with self._changed:
            return [pool_id for pool_id, uses in self._pools.items() if host in uses]

    def segments_of(self, host: str) -> set[str]:
        """The segments of the pools that a host uses."""
        found = set()
        for pool_id in self.pools_of(host):
            with contextlib.suppress(Refused):
                found.add(Pool.parse(pool_id).segment)
        return found

    def is_unreadable(self, host: str) -> bool:
        """Whether something is under the host's key that is no record of a host."""
        with self._changed:
            return host in self._unreadable_hosts

    def oldest_history(self, beyond: int, at_most: int) -> list[tuple[str, int]]:
        """The history keys that are more than the `beyond` newest, with their revisions, oldest first."""
        with self._changed:
            surplus = len(self._history) - beyond
            return list(itertools.islice(self._history.items(), max(0, min(surplus, at_most))))

    def host(self, name: str) -> tuple[int, Host | None]:
        with self._changed:
            return self._hosts.get(name, (0, None))

    def host_with(self, segment: str, address: Address) -> str:
        """The registered host of this segment whose interface carries this address, or ''.

        Two LANs may use the same addresses: a host counts in the segments that its record names.
        """
        with self._changed:
            if not any(int(address) in each for each in self._numbers_of_hosts(segment, address.version)):
                return ""
            return next(
                (
                    name
                    for name, (_, host) in self._hosts.items()
                    if not host.segments or segment in host.segments
                    if any(each.address == str(address) for each in host.addresses)
                ),
                "a registered host",
            )

    def forbids(self, segment: str, address: Address) -> str:
        """Why the address is never given to a container whoever asks, as the end of a sentence, or ''."""
        local = self._local(segment)
        settings = self.settings(segment).value
        for each in local.exclude:
            if each.contains(address):
                return f"it is excluded by this host's configuration ({each})"
        for text in settings.exclude:
            if parse_range(text).contains(address):
                return f"it is excluded in segment {segment} ({text})"
        for reservation in settings.reserved:
            if parse_range(reservation.range).contains(address):
                by = f" by {reservation.by}" if reservation.by else ""
                note = f": {reservation.note}" if reservation.note else ""
                return f"it is reserved{by}{note} ({reservation.range})"
        if self.moves(segment, address):
            return f"it moves between machines, says segment {segment}"
        if address in self.routers(segment):
            return f"it is the router of segment {segment}"
        owner = self.host_with(segment, address)
        if owner:
            return f"it is Docker host {owner}'s own address"
        with self._changed:
            known = self._segment(segment)
            aliases = known.families[address.version].aliases.get(int(address), {})
            ranges = (key for key, (_, taken) in known.ranges.items() if taken.contains(address))
            return next((f"the etcd key {key!a} takes it" for key in (*aliases, *ranges)), "")

    def moves(self, segment: str, address: Address) -> bool:
        """Whether an operator declared that the address moves between machines (keepalived)."""
        return any(parse_range(text).contains(address) for text in self.settings(segment).value.moving)

    # ------------------------------------------------------------------------------ the wire and standby

    def host_macs(self) -> frozenset[str]:
        """The MACs of all registered hosts' interfaces that carry an address or that they listen on."""
        return self._host_macs

    def is_ours(self, mac: str) -> bool:
        """A registered host's MAC, or one of a lease that ended a moment ago."""
        if mac in self._host_macs:
            return True
        with self._changed:
            return self._ended_macs.get(mac, 0.0) + ENDED_LATELY > self._now()

    def has_ended(self, mac: str) -> bool:
        """Whether a lease with this MAC has ended, of those remembered."""
        with self._changed:
            return bool(mac) and mac in self._ended_macs

    def peers(self, segment: str, subnet: Network, host: str) -> list[Address]:
        """The machines of the register that should be on this LAN, besides `host`: routers first, then living hosts."""
        found = [each for each in self.routers(segment) if each in subnet]
        with self._changed:
            for name, (_, record) in self._hosts.items():
                if name == host or name not in self._alive or (record.segments and segment not in record.segments):
                    continue
                for each in record.addresses:
                    with contextlib.suppress(ValueError):
                        address = parse_address(each.address)
                        if address in subnet:
                            found.append(address)
        return found

    def of_kind(self, kind: str, host: str = "") -> list[tuple[str, Address, Entry]]:
        """The leases of a kind, of one host or of all, as (segment, address, entry)."""
        with self._changed:
            return [
                (name, address_of(version, number), family.entries[number])
                for name, segment in self._segments.items()
                for version, family in segment.families.items()
                for first, last in family.kinds.get(kind, AddressSet())
                for number in range(first, last + 1)
                if not host or family.entries[number].host == host
            ]

    def fill(self, pool: Pool) -> float:
        """Which part of the pool's addresses cannot be given, standby not counted: 0.0 to 1.0."""
        where = pool.candidates
        with self._changed:
            family = self._segment(pool.segment).families[where.version]
            forbidden = self._forbidden_in(pool)
            usable = where.size() - forbidden.count(where.first, where.last)
            standby = family.kinds.get(STANDBY, AddressSet())

            def gone(first: int, last: int) -> int:
                return family.taken.count(first, last) - standby.count(first, last)

            taken = gone(where.first, where.last) - sum(gone(first, last) for first, last in forbidden)
            return 1.0 if usable <= 0 else taken / usable

    def wanted_of(self, pool: Pool, host: str) -> bool:
        """Whether another host asks for standby in this pool's range."""
        where = pool.candidates
        for pool_id in self.wanted_by_others(host):
            with contextlib.suppress(Refused):
                other = Pool.parse(pool_id)
                theirs = other.candidates
                if (
                    (other.segment, theirs.version) == (pool.segment, where.version)
                    and theirs.first <= where.last
                    and where.first <= theirs.last
                ):
                    return True
        return False

    def wanted_by_others(self, host: str) -> set[str]:
        """What other hosts wait for: PoolIDs, and single addresses as SEGMENT/ADDRESS."""
        with self._changed:
            return {what for _, what, name in self._wanted.values() if name != host}

    def wants_address(self, segment: str, address: Address, host: str) -> bool:
        """Whether another host asks for the standby at this very address."""
        asked = f"{segment}/{address}"
        with self._changed:
            return any(what == asked and name != host for _, what, name in self._wanted.values())

    def spare_in(self, pool: Pool, *kinds: str) -> list[tuple[Address, Entry]]:
        """Everybody's leases of these kinds (STANDBY, HELD) that a container of this pool could have."""
        return [
            (address, entry)
            for kind in kinds
            for segment, address, entry in self.of_kind(kind)
            if segment == pool.segment and self.may_have(pool, address)
        ]

    def may_have(self, pool: Pool, address: Address) -> bool:
        """Whether a container of this pool may have the address, once it is free."""
        with self._changed:
            return pool.candidates.contains(address) and int(address) not in self._forbidden_in(pool)

    def unused(self, pool: Pool, count: int, but: Address) -> list[Address]:
        """Some addresses of the subnet that the register knows nothing of, spread over it: nobody should have them."""
        whole = dataclasses.replace(pool, range=None)
        usable = whole.candidates
        found: set[int] = set()
        with self._changed:
            family = self._segment(pool.segment).families[usable.version]
            forbidden = self._forbidden_in(whole)
            for _ in range(POINTS * count):
                point = usable.first + self._draw(pool, usable.size())
                if point not in family.avoid and point not in family.pending and point not in forbidden:
                    found.add(point)
                found.discard(int(but))
                if len(found) == count:
                    break
        return [address_of(usable.version, number) for number in found]

    def has_free(self, pool: Pool) -> bool:
        """Whether some address of the pool may be tried."""
        with self._changed:
            return self._next(pool, self._segment(pool.segment).families[pool.subnet.version]) is not None

    def skip(self, segment: str, address: Address, seconds: float) -> None:
        """Do not choose the address for a while, as long as there are others.

        A rumour that somebody uses it. Of more than RUMOURS addresses those that would end first are forgotten.
        """
        with self._changed:
            self._segment(segment).families[address.version].skip(int(address), self._now() + seconds)

    def wake_rested(self) -> None:
        """Forget rests and rumours whose time is over. To be called every now and then, because requests do so only
        for the addresses among which they choose, and there may be no requests.
        """
        with self._changed:
            families = [family for segment in self._segments.values() for family in segment.families.values()]
        for family in families:
            with self._changed:  # each on its own, so that nobody waits for all of them
                family.wake(self._now())

    def is_alive(self, host: str) -> bool:
        return host in self._alive

    def absent_hosts(self) -> dict[str, Host]:
        """The registered hosts without a heartbeat."""
        with self._changed:
            return {name: record for name, (_, record) in self._hosts.items() if name not in self._alive}

    def orders(self) -> dict[str, int]:
        """The hosts that are to be retired, with the revision of the order."""
        with self._changed:
            return dict(self._orders)

    def has_lost(self, host: str) -> bool:
        """Whether the host was retired and has not been told what it lost."""
        return host in self._lost

    def wait_for(self, revision: int, deadline: float) -> bool:
        """Until the view has everything up to the revision. False when the deadline (monotonic seconds) passes."""
        with self._changed:
            return self._changed.wait_for(lambda: self.revision >= revision, max(0.0, deadline - time.monotonic()))

    def wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Until the condition holds, which may depend on more than the view. False when the deadline passes."""
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(TICK, left))
            return True

    def wait_for_change(self, deadline: float) -> None:
        with self._changed:
            self._changed.wait(max(0.0, min(1.0, deadline - time.monotonic())))

    # ------------------------------------------------------------------------------------- choosing

    @contextlib.contextmanager
    def candidate(self, pool: Pool) -> Iterator[Address | Full]:
        """The next address to try; no other request of this daemon is offered it meanwhile.

        Start at a point hashed from the host's name, go on from the last one given, skip what rests; when
        nothing else is left, what rests is used (design section 6).
        """
        with self._changed:
            family = self._segment(pool.segment).families[pool.subnet.version]
            number = self._next(pool, family)
            if number is not None:
                family.pending.add(number)
                self._cursors[pool.id] = number + 1
        if number is None:
            yield Full(pending=self._is_pending(pool, family), counts=self.counts(pool))
            return
        try:
            yield address_of(pool.subnet.version, number)
        finally:
            with self._changed:
                # A reset may have replaced the family, but not the set of pending addresses.
                family.pending.discard(number)
                self._changed.notify_all()

    def lost_race(self, pool: Pool) -> None:
        """Another host took the candidate first. Go on elsewhere: next to it the two would meet again."""
        with self._changed:
            self._cursors[pool.id] = pool.candidates.first + self._draw(pool, pool.candidates.size())

    def _hashed_start(self, pool: Pool) -> int:
        spread = hashlib.blake2b(f"{self._host} {pool.id}".encode(), digest_size=16).digest()
        return pool.candidates.first + int.from_bytes(spread) % pool.candidates.size()

    def _draw(self, pool: Pool, below: int) -> int:
        """A number from 0 on, another one each time, and other ones on other hosts."""
        spread = hashlib.blake2b(f"{self._host} {pool.id} {self._drawn}".encode(), digest_size=16).digest()
        self._drawn += 1
        return int.from_bytes(spread) % below

    def _next(self, pool: Pool, family: _Family) -> int | None:
        where = pool.candidates
        if where.size() < 1:
            return None
        family.wake(self._now())
        forbidden = self._forbidden_in(pool)
        start = self._cursors.get(pool.id)
        if start is None or not where.first <= start <= where.last:
            start = where.first if start is not None else self._hashed_start(pool)
        for skipped in ((family.avoid, family.pending, forbidden), (family.taken, family.pending, forbidden)):
            number = next_outside(skipped, start, where.last)
            if number is None:
                number = next_outside(skipped, where.first, start - 1)
            if number is not None:
                return self._apart(pool, family, skipped, number)
        return None

    def _apart(self, pool: Pool, family: _Family, skipped: tuple[AddressSet, ...], number: int) -> int:
        """The free address `number`, or, where it follows another host's, one in any other place that is free.

        That host goes on at the end of its row too, and both would try each address there. So a point is drawn until
        one is free itself; where few are, one a few free addresses on is as good as any.
        """
        before = family.entries.get(number - 1)
        if before is None or before.host == self._host:
            return number
        where = pool.candidates
        for _ in range(POINTS):
            point = where.first + self._draw(pool, where.size())
            if next_outside(skipped, point, point) is not None:
                return point
        further = number
        for _ in range(self._draw(pool, POINTS)):
            following = next_outside(skipped, further + 1, where.last)
            if following is None:
                break
            further = following
        return further

    def _is_pending(self, pool: Pool, family: _Family) -> bool:
        where = pool.candidates
        with self._changed:
            return family.pending.count(where.first, where.last) > 0

    def _forbidden_in(self, pool: Pool) -> AddressSet:
        """What the pool's options, the segment, keys that name many addresses and the hosts' own addresses take out of
        the pool's range.
        """
        segment = self._segment(pool.segment)
        settings = segment.settings
        version = (settings.revision, self._generation)
        known = self._forbidden.get(pool.id)
        if known is not None and known[0] == version:
            return known[1]
        where = pool.candidates
        local = self._local(pool.segment)
        ranges = [
            *pool.exclude,
            *local.exclude,
            *settings.value.ranges(),
            *(Range(each.version, int(each), int(each)) for each in (*settings.value.routers(), *local.routers)),
            *(taken for _, taken in segment.ranges.values()),
            *(
                Range(where.version, first, last)
                for numbers in self._numbers_of_hosts(pool.segment, where.version)
                for first, last in numbers
            ),
        ]
        forbidden = AddressSet(
            (max(each.first, where.first), min(each.last, where.last))
            for each in ranges
            if each.version == where.version and each.first <= where.last and each.last >= where.first
        )
        self._forbidden[pool.id] = (version, forbidden)
        return forbidden

    def tally(self, pool: Pool) -> dict[str, int]:
        """How many addresses of the pool's range are of each kind; together they are all of them.

        Besides the kinds of leases: `unreadable`, `by_hand` (taken by a key that spells the address in another way),
        `excluded` (never given, for any reason, and no lease either) and `free`.
        """
        where = pool.candidates
        with self._changed:
            family = self._segment(pool.segment).families[where.version]
            found = {
                kind: family.kinds.get(kind, AddressSet()).count(where.first, where.last)
                for kind in (*KINDS, UNREADABLE)
            }
            found["by_hand"] = sum(
                where.first <= number <= where.last and number not in family.entries for number in family.aliases
            )
            found["excluded"] = sum(
                last - first + 1 - family.taken.count(first, last) for first, last in self._forbidden_in(pool)
            )
        found["free"] = max(0, where.size()) - sum(found.values())
        return found

    def counts(self, pool: Pool) -> str:
        """How the pool's addresses are used, by kind, for a sentence."""
        words = {
            "by_hand": "by a key that spells the address in another way",
            "excluded": "excluded or a host's own",
        }
        parts = [
            f"{count} {words.get(kind, kind)}" for kind, count in self.tally(pool).items() if count and kind != "free"
        ]
        return f"{pool.candidates.size()} addresses: {', '.join(parts) or 'all free'}"

    def tallies(self, host: str) -> dict[str, dict[str, int]]:
        """The same of each pool that a host uses, by PoolID, for metrics."""
        found = {}
        for pool_id in self.pools_of(host):
            with contextlib.suppress(Refused):
                found[pool_id] = self.tally(Pool.parse(pool_id))
        return found

    def host_counts(self) -> dict[str, int]:
        """How many registered hosts have a heartbeat, and how many have none, for metrics."""
        with self._changed:
            alive = sum(name in self._alive for name in self._hosts)
            return {"alive": alive, "absent": len(self._hosts) - alive}

    def use(self, segment: str) -> dict[str, int]:
        """How many leases of each kind a segment has, for metrics."""
        with self._changed:
            found: dict[str, int] = {}
            for family in self._segment(segment).families.values():
                for kind, numbers in family.kinds.items():
                    found[kind] = found.get(kind, 0) + len(numbers)
            return found

    def segment_names(self) -> list[str]:
        with self._changed:
            return list(self._segments)


_names: dict[str, str] = {}


def _interned(name: str) -> str:
    """One object for each host's name: there are few hosts and many leases."""
    return _names.setdefault(name, name)
