"""Had every running container its address, and every address an owner? Decided from a recorded history.

Pure. `history` judges what the clients were told; here it counts what was written to etcd and what really ran. Nothing
is known to the moment: a write took effect between two times, and a container is seen now and then. Only what is
certain is held against the register: whoever was seen before and after had his address all the time between.

Times are seconds since the epoch, of one clock: a hold's end, which stands in etcd, is compared with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ipam_plugin.model import ENDPOINT, HELD, HOST, ROUTER, STANDBY, Keys, Lease, parse_time, read_lease

WITHIN = 600.0  # P5: how long an address may be without an owner, and a container without a lease, on a live host
IN_FLIGHT = 20.0  # what a host had sent before it went may still be written: so much later at most
SIGHT = 30.0  # a host that was there and was not looked at for longer makes the history worthless

OWNED = (ENDPOINT, STANDBY, HELD, HOST)  # the kinds that one host has


class Write(NamedTuple):
    """A change of one key in etcd, which took effect at some moment from `after` to `before`."""

    revision: int
    after: float
    before: float
    key: str
    value: bytes | None  # None: deleted


class Tick(NamedTuple):
    """A linearizable read that was sent at `began` was answered at this revision: later ones were written later."""

    began: float
    revision: int


class Running(NamedTuple):
    """A container that has an address, as its network namespace says."""

    container: str  # its id
    run: str  # new with every start
    address: str
    mac: str = ""  # '' where it is not known


class Sample(NamedTuple):
    """All containers with addresses on one host, each seen at some moment from `began` to `ended`."""

    host: str
    began: float
    ended: float
    running: tuple[Running, ...]


class Absence(NamedTuple):
    """A time in which a host (`''`: every host) could not do its part.

    `daemon`: nothing of it reached etcd (killed, off, cut off). `dockerd`: its Docker could not be asked. `etcd`:
    etcd itself was away or halting.
    """

    what: Literal["daemon", "dockerd", "etcd"]
    host: str
    began: float
    ended: float


class History(NamedTuple):
    """What was seen of one segment up to `ended`. What stood at the beginning is a write too, any time before."""

    writes: Sequence[Write]  # in their order
    samples: Sequence[Sample]
    absences: Sequence[Absence]
    ended: float
    keys: Keys = Keys()
    segment: str = "default"


def timed(writes: Iterable[Write], ticks: Iterable[Tick]) -> list[Write]:
    """The writes with the latest `after` that the reads allow; they come in the order of their revisions."""
    bounds = sorted(ticks, key=lambda tick: tick.revision)
    found, latest, number = [], -math.inf, 0
    for each in writes:
        while number < len(bounds) and bounds[number].revision < each.revision:
            latest = max(latest, bounds[number].began)
            number += 1
        found.append(each._replace(after=max(each.after, min(latest, each.before))))
    return found


def folded(writes: Iterable[Write]) -> dict[str, bytes]:
    """What stands in etcd after these writes."""
    found: dict[str, bytes] = {}
    for each in writes:
        found.pop(each.key, None)
        if each.value is not None:
            found[each.key] = each.value
    return found


def violations(history: History, *, within: float = WITHIN, standby: int | None = None) -> list[str]:
    """A sentence for each thing that should not be; [] when the history is as promised.

    `within`: see WITHIN. `standby`: how many addresses a host keeps ready for a pool; None does not count them.
    """
    told = _Told(history)
    found = [*_blind(history), *_taken_away(told), *_used_twice(told), *_freed_by_others(told)]
    for each in _loose(told, standby):
        if each.until - each.since > within:
            found.append(f"{each.what} from {each.since:.3f} to {each.until:.3f}, {each.until - each.since:.0f} s")
    return found


def unsettled(history: History, *, standby: int | None = None) -> list[str]:
    """What is not yet as it has to be at the end of the history, however young: [] when everything has come to rest."""
    return [each.what for each in _loose(_Told(history), standby) if each.until >= history.ended]


# ----------------------------------------------------------------------------------- what the history says


class _Life(NamedTuple):
    """A container that had an address in samples one after another, none between that lacks it."""

    host: str
    seen: Running
    maybe_from: float
    surely_from: float
    surely_to: float
    maybe_to: float

    def had_it(self, write: Write) -> bool:
        return self.surely_from <= write.after and write.before <= self.surely_to

    def __str__(self) -> str:
        return f"container {self.seen.container} of {self.host}"


class _Holding(NamedTuple):
    """A value of a lease's key, from one write to the next (None: to the end)."""

    address: str
    lease: Lease
    put: Write
    end: Write | None
    successor: Lease | None  # what the next write made of it; None: nothing, or there was none


class _Stretch(NamedTuple):
    """Something that may not last."""

    what: str
    since: float
    until: float


class _Told:
    """A history, arranged for the questions."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.lives = list(_lives(history))
        self.by_address: dict[str, list[_Life]] = {}
        for life in self.lives:
            self.by_address.setdefault(life.seen.address, []).append(life)
        # key -> from when to when it may have been there
        self.present: dict[str, list[tuple[float, float]]] = {}
        values: dict[str, list[Write]] = {}
        for each in history.writes:
            values.setdefault(each.key, []).append(each)
        for key, changes in values.items():
            for each, then in itertools.zip_longest(changes, changes[1:]):
                if each.value is not None:
                    self.present.setdefault(key, []).append((each.after, then.before if then else math.inf))
        prefix = f"{history.keys.leases}{history.segment}/"
        self.holdings = [
            holding
            for key, changes in values.items()
            if key.startswith(prefix)
            for holding in _holdings(key.removeprefix(prefix), changes)
        ]
        self.grants = list(_grants(self.holdings))

    def of(self, host: str, address: str) -> list[_Life]:
        return [life for life in self.by_address.get(address, ()) if life.host == host]

    def away(self, host: str, *what: str) -> list[tuple[float, float]]:
        return [
            (each.began, each.ended)
            for each in self.history.absences
            if each.host in ("", host) and each.what in (what or (each.what,))
        ]

    def retired(self, host: str, write: Write) -> bool:
        """Whether an operator had told that the host is gone when this was written."""
        keys = (self.history.keys.retire(host), self.history.keys.lost(host))
        return any(
            since <= write.before and write.after <= until for key in keys for since, until in self.present.get(key, ())
        )


def _lives(history: History) -> Iterator[_Life]:
    by_host: dict[str, list[Sample]] = {}
    for sample in history.samples:
        by_host.setdefault(sample.host, []).append(sample)
    for host, samples in by_host.items():
        last = -math.inf
        open_: dict[Running, _Life] = {}
        for sample in sorted(samples, key=lambda each: each.began):
            now = set(sample.running)
            for seen in open_.keys() - now:
                yield open_.pop(seen)._replace(maybe_to=sample.ended)
            for seen in now:
                life = open_.get(seen) or _Life(host, seen, last, sample.ended, sample.began, math.inf)
                open_[seen] = life._replace(surely_to=sample.began)
            last = sample.began
        yield from open_.values()


def _holdings(address: str, changes: Sequence[Write]) -> Iterator[_Holding]:
    for each, then in itertools.zip_longest(changes, changes[1:]):
        if each.value is not None:
            successor = read_lease(then.value) if then and then.value is not None else None
            yield _Holding(address, read_lease(each.value), each, then, successor)


def _grants(holdings: Iterable[_Holding]) -> Iterator[_Holding]:
    """The same with values that only say more about one grant as one; the last value counts."""
    before: _Holding | None = None
    for each in holdings:
        if before is not None and before.end is each.put and _grant(before.lease) == _grant(each.lease):
            before = each._replace(put=before.put)
            continue
        if before is not None:
            yield before
        before = each
    if before is not None:
        yield before


def _grant(lease: Lease) -> tuple[str, ...]:
    return lease.kind, lease.host, lease.pool, lease.token, lease.until


# --------------------------------------------------------------------------------- what may never have been


def _blind(history: History) -> Iterator[str]:
    """Where the history has no eyes, nothing can be told from it."""
    for host in sorted({sample.host for sample in history.samples}):
        times = [(sample.began, sample.ended) for sample in history.samples if sample.host == host]
        away = [(each.began, each.ended) for each in history.absences if each.host == host]
        for since, until in _without(min(times)[0], history.ended, [*times, *away]):
            if until - since > SIGHT:
                yield f"nobody looked at {host} from {since:.3f} to {until:.3f}: the history itself is incomplete"


def _taken_away(told: _Told) -> Iterator[str]:
    """An address that was freed, or given to somebody else, while its container ran with it (P3)."""
    for each in told.holdings:
        if each.end is None or each.lease.kind not in OWNED or told.retired(each.lease.host, each.end):
            continue
        for life in told.of(each.lease.host, each.address):
            if life.had_it(each.end) and _freed(told, each, life):
                became = f"became {each.successor.told()}" if each.successor else "was freed"
                yield f"{each.address} {became} at {each.end.before:.3f}, while {life} ran with it"


def _freed(told: _Told, each: _Holding, life: _Life) -> bool:
    """Whether the container lost its lease by the write that ended this holding."""
    old, new = each.lease, each.successor
    if new is None or new.host != old.host or new.kind not in (ENDPOINT, old.kind):
        return True
    if new.kind != ENDPOINT or old.kind != ENDPOINT or new.token == old.token:
        return False  # what was in stock is the container's by now, or somebody filled in its name
    if new.mac and life.seen.mac and new.mac != life.seen.mac:
        return True
    # A container that was started while etcd was out of reach gets its own token afterwards, also in place of the one
    # of a predecessor whose release came to etcd together with it. Any other new token is another container's.
    return not any(
        life.maybe_from <= until + IN_FLIGHT and since <= life.surely_from
        for since, until in told.away(life.host, "daemon", "etcd")
    )


def _used_twice(told: _Told) -> Iterator[str]:
    """Two containers that ran with one address at the same time (P1)."""
    for address, lives in told.by_address.items():
        for one, other in itertools.combinations(lives, 2):
            # Each was seen at a moment up to `surely_from` and at one from `surely_to` on.
            if one.surely_from <= other.surely_to and other.surely_from <= one.surely_to:
                since = max(one.surely_from, other.surely_from)
                yield f"{address} was used twice at {since:.3f}, by {one} and {other}"


def _freed_by_others(told: _Told) -> Iterator[str]:
    """A lease that ended by another hand than its host's, which nobody had retired (P3)."""
    for each in told.holdings:
        host, end = each.lease.host, each.end
        if end is None or not host or each.lease.kind not in OWNED or told.retired(host, end):
            continue
        if each.successor is not None:
            author = each.successor.host or each.successor.by
            if author not in ("", host):
                yield f"{each.address} was {each.lease.kind} of {host}, and {author} took it at {end.before:.3f}"
        elif any(since + IN_FLIGHT <= end.after and end.before <= until for since, until in told.away(host, "daemon")):
            lost = f"{each.address} was {each.lease.kind} of {host}, and was freed"
            yield f"{lost} at {end.before:.3f} while {host} was away"


# ----------------------------------------------------------------------------------- what may not last


def _loose(told: _Told, standby: int | None) -> Iterator[_Stretch]:
    yield from _ownerless(told)
    yield from _unleased(told)
    if standby is not None:
        yield from _surplus(told, standby)


def _ownerless(told: _Told) -> Iterator[_Stretch]:
    """Leases that nobody has, on hosts that could have freed them (P5)."""
    keys, ended = told.history.keys, told.history.ended
    for each in told.grants:
        lease = each.lease
        since, until = each.put.before, each.end.after if each.end else ended
        owners: dict[str, list[tuple[float, float]]] = {}  # what there is no owner without: when it may have been
        if lease.kind in OWNED:
            owners[f"{lease.host} is not registered"] = told.present.get(keys.host(lease.host), [])
        if lease.kind == ENDPOINT:
            lives = told.of(lease.host, each.address)
            owners["no container runs with it"] = [(life.maybe_from, life.maybe_to) for life in lives]
        elif lease.kind == STANDBY:
            owners["no network uses its pool"] = told.present.get(f"{keys.pools}{lease.pool}/{lease.host}", [])
        elif lease.kind == HELD:
            owners["its hold has ended"] = [(-math.inf, parse_time(lease.until) or -math.inf)]
        elif lease.kind == ROUTER:
            for holder in lease.holders:
                used = told.present.get(f"{keys.pools}{holder.pool}/{holder.host}", [])
                owners[f"no network of {holder.host} uses its pool"] = used
        hosts = {lease.host} if lease.kind in OWNED else {holder.host for holder in lease.holders}
        whose = f"{each.address} is {lease.kind} of {lease.host or 'its holders'}"
        for why, times in owners.items():
            away = [time for host in hosts for time in told.away(host)]
            for start, end in _without(since, until, [*times, *away]):
                yield _Stretch(f"{whose}, and {why},", start, end)


def _unleased(told: _Told) -> Iterator[_Stretch]:
    """Containers that run without an endpoint's lease of their own host and MAC."""
    leases: dict[str, list[_Holding]] = {}
    for each in told.grants:
        leases.setdefault(each.address, []).append(each)
    for life in told.lives:
        theirs = [
            (each.put.after, each.end.before if each.end else math.inf)
            for each in leases.get(life.seen.address, ())
            if each.lease.kind == ENDPOINT
            and each.lease.host == life.host
            and each.lease.mac in ("", life.seen.mac or each.lease.mac)
        ]
        # As long as it may live: a container that was seen last is there at the end.
        until = told.history.ended if life.maybe_to == math.inf else life.surely_to
        for start, end in _without(life.surely_from, until, [*theirs, *told.away(life.host)]):
            yield _Stretch(f"{life} ran with {life.seen.address}, which was not leased to it,", start, end)


def _surplus(told: _Told, standby: int) -> Iterator[_Stretch]:
    """More addresses in stock than a host keeps: those that a predecessor left, and nobody will give."""
    stocks: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in told.grants:
        if each.lease.kind == STANDBY:
            until = each.end.after if each.end else told.history.ended
            stocks.setdefault((each.lease.host, each.lease.pool), []).append((each.put.before, until))
    for (host, pool), times in stocks.items():
        marks = sorted({mark for time in times for mark in time})
        enough = [
            (since, until)
            for since, until in itertools.pairwise(marks)
            if sum(begin <= since and until <= end for begin, end in times) <= standby
        ]
        for start, end in _without(marks[0], marks[-1], [*enough, *told.away(host)]):
            yield _Stretch(f"{host} had more than {standby} addresses ready for {pool}", start, end)


def _without(since: float, until: float, times: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """What is left of a time when others are taken out."""
    for begin, end in sorted(times):
        if begin >= until:
            break
        if begin > since:
            yield since, begin
        since = max(since, end)
    if since < until:
        yield since, until
