"""Hosts that die: who is absent, the orders to retire one, and what a host that returns has lost.

An order is a key `retiring/HOST` that an operator's command (or the policy `retire_after`) writes and nobody changes.
The living daemons carry it out in parts, one for each subnet, each by a daemon that reaches that subnet's wire and has
written its name under the order. What frees an address compares, besides the lease as it was before the wire was asked,
that the host has no heartbeat, that its record is not newer than the order, and that the order still stands: a host
that comes back, for however short a time, ends the order. An order is bound to a TTL, so one that nobody follows any
more frees nothing later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import ipaddress
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple, Protocol

import msgspec

from ipam_plugin import retirement
from ipam_plugin.addresses import Address, Network
from ipam_plugin.errors import EtcdUnavailable, IpamError, OutcomeUnknown, ProbeFailed, Refused
from ipam_plugin.etcd import Delete, KeyValue, Put
from ipam_plugin.ledger import Ledger, timestamp
from ipam_plugin.model import (
    ROUTER,
    Host,
    Kept,
    Keys,
    Lease,
    Lost,
    LostLease,
    Order,
    Part,
    Pool,
    decode,
    encode,
    marked_absent,
    read_lease,
    rfc3339,
)
from ipam_plugin.neighbourhood import Neighbourhood, Verdict
from ipam_plugin.retirement import Answer
from ipam_plugin.view import View

log = logging.getLogger(__name__)

PERIOD = 1.0  # seconds between two rounds when nothing happens
SETTLING = 5.0  # seconds for which a heartbeat may be missing: a daemon that is restarted is not absent
SPREAD = 5.0  # seconds over which the hosts spread what any of them may do, so that mostly one does it
PATIENCE = 30.0  # seconds for asking the wire for one address, or for a few questions to etcd
LOOKS_AT_ONCE = 8
TOLD_APART = 1.0  # seconds between two writes of how far a part got
WITHOUT_WIRE = 3.0  # seconds after which a host takes a part whose wire it does not reach, though it uses the subnet
NOBODY = 10.0  # seconds after which a part that nobody took is nobody's
POLICY_TTL = 3600  # seconds that an order of the policy stands: no other one is given in that time
LOST_TTL = 180 * 86400  # seconds until what a host lost is forgotten
PART_TOLD = 300  # addresses that stay, told one by one in a part
ALARM_ADDRESSES = 5  # named in the alarm
POOLS_AT_ONCE = 50  # keys in one transaction; etcd takes 128
LAST = "end"  # the part after all others


class Store(Protocol):
    """What is needed of etcd here, besides the ledger."""

    def list(self, prefix: str, *, deadline: float, keys_only: bool = False) -> tuple[list[KeyValue], int]: ...
    def grant_ttl(self, seconds: int, *, deadline: float) -> int: ...


class _Ended(IpamError):
    """The order does not stand any more: it was taken back, or the host is there again."""


class _Missing(NamedTuple):
    """Since when this daemon misses a heartbeat."""

    monotonic: float
    told: str  # RFC 3339


class _Standing(NamedTuple):
    """An order as it stands, and how far it got."""

    order: Order
    key: KeyValue
    parts: Mapping[str, KeyValue]


@dataclasses.dataclass
class _Plan:
    """What this daemon knows of an order."""

    revision: int  # of the order
    since: float  # monotonic seconds
    places: dict[str, list[tuple[str, Address]]]  # part -> the addresses that the host has there
    done: bool = False  # all of it, whoever did it


class Retirer:
    """One thread. `run` it once; `close` ends what it waits for.

    `segments` answers with the segments that this host is in, `serving` whether its name is its own now. `after` is
    the policy `retire_after`, in seconds.
    """

    def __init__(
        self,
        etcd: Store,
        ledger: Ledger,
        view: View,
        keys: Keys,
        host: str,
        neighbourhood: Neighbourhood,
        *,
        segments: Callable[[], Collection[str]],
        serving: Callable[[], bool],
        after: float | None,
        alarm: Callable[[str, str], None],
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._etcd = etcd
        self._ledger = ledger
        self._view = view
        self._keys = keys
        self._host = host
        self._neighbourhood = neighbourhood
        self._segments = segments
        self._serving = serving
        self._after = after
        self._alarm = alarm
        self._monotonic = monotonic
        self._now = now  # seconds since the epoch
        self._missing: dict[str, _Missing] = {}
        self._plans: dict[str, _Plan] = {}
        self._lost_lock = threading.Lock()  # gone/HOST: one write of it after another
        self._wake = threading.Event()
        self._stop = threading.Event()

    def wake(self) -> None:
        """An order came or went: look now."""
        self._wake.set()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set and `close()` was called."""
        while not stop.is_set() and not self._stop.is_set():
            self._wake.clear()
            if self._serving():
                self.look()
            self._wake.wait(PERIOD)

    def look(self) -> None:
        """One round."""
        self._try("what this host lost", self._tell_what_was_lost)
        self._notice_absent()
        orders = self._view.orders()
        self._plans = {host: plan for host, plan in self._plans.items() if orders.get(host) == plan.revision}
        for host in orders:
            if host in self._plans and self._plans[host].done:
                continue
            self._try(f"host {host} is not retired yet", lambda host=host: self._carry_out(host))  # type: ignore[misc]

    @staticmethod
    def _try(what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except IpamError as error:
            log.info("%s: %s", what, error)

    def _late(self, what: str) -> float:
        """From 0 to 1: at which moment of its own this host does what any host may do."""
        spread = hashlib.blake2b(f"{self._host} {what}".encode(), digest_size=2).digest()
        return int.from_bytes(spread) / 65536

    # --------------------------------------------------------------------------------- who is absent

    def _notice_absent(self) -> None:
        now = self._monotonic()
        absent = {name: record for name, record in self._view.absent_hosts().items() if name != self._host}
        fresh = _Missing(now, rfc3339(datetime.datetime.fromtimestamp(self._now(), datetime.UTC)))
        self._missing = {name: self._missing.get(name, fresh) for name in absent}
        orders = self._view.orders()
        for name, record in absent.items():
            missing = self._missing[name]
            if name in orders or now - missing.monotonic < SETTLING + SPREAD * self._late(name):
                continue
            if not record.absent:
                self._try(f"since when host {name} is absent is not written", lambda n=name: self._mark(n))  # type: ignore[misc]
            elif self._after is not None and retirement.is_overdue(
                record.absent, self._now(), now - missing.monotonic, self._after
            ):
                self._try(f"host {name} is not retired", lambda n=name, r=record: self._order(n, r))  # type: ignore[misc]

    def _mark(self, name: str) -> None:
        """The first one wins; nothing is written while there is a heartbeat, or an order that compares the record."""
        deadline = time.monotonic() + PATIENCE
        key, fence = self._keys.host(name), {self._keys.heartbeat(name): 0, self._keys.retire(name): 0}
        found = self._ledger.read(key, deadline)
        if found is None:
            return
        try:
            if decode(found.value, Host).absent:
                return
            marked = marked_absent(found.value, self._missing[name].told)
        except ValueError:
            return  # what cannot be read is not overwritten
        if self._ledger.write("absent", {key: found.revision, **fence}, [Put(key, marked)], deadline).applied:
            log.warning("host %s is absent since %s", name, self._missing[name].told)

    def _order(self, name: str, record: Host) -> None:
        """By the policy, if no order is there: where there is something that could be freed without force."""
        if all(entry.kind in retirement.QUIET for _, _, entry in self._view.entries_of(name)):
            return
        deadline = time.monotonic() + PATIENCE
        key, record_key = self._keys.retire(name), self._keys.host(name)
        found = self._ledger.read(record_key, deadline)
        if found is None or _absent(found) != record.absent:
            return
        order = Order(name, f"host {self._host} (retire_after)", timestamp(), secrets.token_urlsafe(12), policy=True)
        lease = self._etcd.grant_ttl(POLICY_TTL, deadline=deadline)
        expect = {key: 0, self._keys.heartbeat(name): 0, record_key: found.revision}
        if self._ledger.write("retire", expect, [Put(key, encode(order), lease)], deadline, proof=key).applied:
            log.warning("host %s is absent since %s and is retired (retire_after)", name, record.absent)

    # ------------------------------------------------------------------------------------- an order

    def _carry_out(self, host: str) -> None:
        deadline = time.monotonic() + PATIENCE
        standing = self._standing(host, deadline)
        if standing is None:
            return
        if host == self._host:
            # It lives. Else the order would be carried out the next time that it is down for a moment.
            writes = [Delete(each.key) for each in (standing.key, *standing.parts.values())]
            self._ledger.write("retire", {standing.key.key: standing.key.revision}, writes, deadline)
            return
        if self._fence(host, standing, deadline) is None or not self._view.wait_for(standing.key.revision, deadline):
            return
        plan = self._plans.get(host)
        if plan is None or plan.revision != standing.key.revision:
            places = self._places(host, standing, deadline)
            plan = self._plans[host] = _Plan(standing.key.revision, self._monotonic(), places)
        with contextlib.suppress(_Ended):
            for part in plan.places:
                if self._may_take(standing, part) and self._reaches(part, plan):
                    self._ask_part(host, part, plan.places[part], standing)
            self._finish(host, plan)

    def _standing(self, host: str, deadline: float) -> _Standing | None:
        found, _ = self._etcd.list(self._keys.retire(host), deadline=deadline)
        own = self._keys.retire_part(host, "")
        key = next((each for each in found if each.key == self._keys.retire(host)), None)
        try:
            order = decode(key.value, Order) if key else None
        except ValueError as error:
            log.warning("the etcd key %s cannot be read and orders nothing: %s", self._keys.retire(host), error)
            return None
        if key is None or order is None:
            return None
        parts = {each.key.removeprefix(own): each for each in found if each.key.startswith(own)}
        return _Standing(order, key, parts)

    def _fence(self, host: str, standing: _Standing, deadline: float) -> dict[str, int] | None:
        """What everything that is done for the order compares; None when the host was there since it was given."""
        heartbeat, record = self._keys.heartbeat(host), self._keys.host(host)
        found = self._ledger.read_many([heartbeat, record], deadline)
        there = found[record]
        if found[heartbeat] is not None or (there is not None and there.revision > standing.key.revision):
            return None
        return {heartbeat: 0, record: there.revision if there else 0, standing.key.key: standing.key.revision}

    def _places(self, host: str, standing: _Standing, deadline: float) -> dict[str, list[tuple[str, Address]]]:
        """The host's addresses by part. What it wrote after the order it has written as a living host."""
        entries = self._view.entries_of(host)
        found = self._ledger.read_many(
            [self._keys.lease(segment, address) for segment, address, _ in entries], deadline
        )
        _, record = self._view.host(host)
        subnets = self._view.subnets()
        places: dict[str, list[tuple[str, Address]]] = {}
        for segment, address, _ in entries:
            there = found[self._keys.lease(segment, address)]
            if there is not None and there.revision < standing.key.revision:
                subnet = _subnet_of(read_lease(there.value), address, subnets.get(segment, ()), record)
                places.setdefault(f"{segment}/{subnet}", []).append((segment, address))
        return {part: sorted(each, key=lambda place: int(place[1])) for part, each in sorted(places.items())}

    def _may_take(self, standing: _Standing, part: str) -> bool:
        """Nobody has it, or one that has died since, or did not get to its end."""
        there = standing.parts.get(part)
        if there is None:
            return True
        told = _part(there)
        # This host carries out one part at a time, and now none: it has left its own in the middle.
        return told is not None and not told.done and (told.by == self._host or not self._view.is_alive(told.by))

    def _pool(self, part: str) -> Pool | None:
        """By which this host asks for the part's addresses: its own pool there, or else the plain subnet."""
        segment, subnet = _split(part)
        for pool_id in self._view.pools_of(self._host):
            with contextlib.suppress(Refused):
                pool = Pool.parse(pool_id)
                if (pool.segment, pool.subnet) == (segment, subnet):
                    return pool
        return Pool(segment, subnet) if segment in self._segments() else None

    def _reaches(self, part: str, plan: _Plan) -> bool:
        """Whether this host is on that part's LAN. One that cannot ask its wire leaves it to others for a moment."""
        waited = self._monotonic() - plan.since
        pool = self._pool(part)
        if pool is None or waited < self._late(part):
            return False
        if self._neighbourhood.is_asked(pool) and not isinstance(self._neighbourhood.wire_of(pool), str):
            return True
        return waited >= WITHOUT_WIRE and self._view.uses(pool.id, self._host)

    # ---------------------------------------------------------------------------------------- a part

    def _ask_part(self, host: str, part: str, places: Sequence[tuple[str, Address]], standing: _Standing) -> None:
        """Ask the wire for each address, free what is silent, and write down how far it got."""
        deadline = time.monotonic() + PATIENCE
        fence = self._fence(host, standing, deadline)
        pool = self._pool(part)
        there = standing.parts.get(part)
        before = _part(there) if there else None
        mine = Part(self._host, freed=before.freed if before else ())
        writer = self._take(host, part, standing, fence, there, mine, deadline)
        if writer is None or fence is None or pool is None:
            return
        log.info("host %s is retired: %d addresses of %s are asked for", host, len(places), part)
        told = time.monotonic()
        with ThreadPoolExecutor(LOOKS_AT_ONCE, thread_name_prefix="retire") as threads:
            waiting = [threads.submit(self._settle, host, standing, fence, pool, *place) for place in places]
            try:
                for done in as_completed(waiting):
                    mine = _with(mine, done.result())
                    if time.monotonic() - told > TOLD_APART:
                        writer(mine)
                        told = time.monotonic()
            except BaseException:
                for each in waiting:
                    each.cancel()
                raise
        writer(msgspec.structs.replace(mine, done=True))

    def _take(
        self,
        host: str,
        part: str,
        standing: _Standing,
        fence: Mapping[str, int] | None,
        there: KeyValue | None,
        mine: Part,
        deadline: float,
    ) -> Callable[[Part], None] | None:
        """What writes how far the part got, or None when another host has it."""
        key, order = self._keys.retire_part(host, part), standing.key
        if fence is None:
            return None
        first = Put(key, encode(mine), order.lease)
        expect = {**fence, key: there.revision if there else 0}
        commit = self._ledger.write("retire", expect, [first], deadline, proof=key)
        if not commit.applied:
            return None
        revision = commit.revision

        def write(part: Part) -> None:
            nonlocal revision
            put = Put(key, encode(part), order.lease)
            expect = {key: revision, order.key: order.revision}
            done = self._ledger.write("retire", expect, [put], time.monotonic() + PATIENCE, proof=key)
            if not done.applied:
                raise _Ended(f"the order to retire host {host} does not stand any more")
            revision = done.revision

        return write

    def _settle(
        self, host: str, standing: _Standing, fence: Mapping[str, int], pool: Pool, segment: str, address: Address
    ) -> tuple[str, Kept | None]:
        """The address, and what keeps it; ('', None) when it is not the host's any more."""
        if self._stop.is_set():
            raise _Ended("the daemon is stopping")
        deadline = time.monotonic() + PATIENCE
        kept = functools.partial(_kept, segment, address)
        try:
            found = self._ledger.read(self._keys.lease(segment, address), deadline)
            lease = read_lease(found.value) if found else None
            if found is None or lease is None or lease.host != host:
                return "", None
            if found.revision > standing.key.revision:
                return kept("it has changed since the order was given")
            force = standing.order.force
            answer = self._ask(pool, address) if retirement.must_ask(lease, force) else Answer()
            _, record = self._view.host(host)
            why = retirement.why_kept(lease, answer, _macs(record), force)
            return kept(why) if why else self._free(host, standing, fence, found, lease, (segment, address), kept)
        except (EtcdUnavailable, OutcomeUnknown) as error:
            return kept(f"etcd did not confirm that it is free: {error}")

    def _ask(self, pool: Pool, address: Address) -> Answer:
        """Thoroughly, whatever suffices for an address that nobody has."""
        if not self._neighbourhood.is_asked(pool):
            return Answer(reason=f"host {self._host} does not ask its wire (probe: off)")
        thorough = dataclasses.replace(pool, probe="full")
        # Where this host has no network, its keeper may have closed the wire in the middle of the first look.
        for _ in range(1 if self._view.uses(pool.id, self._host) else 2):
            try:
                look = self._neighbourhood.look(thorough, address, time.monotonic() + PATIENCE, thorough=True)
            except (ProbeFailed, OSError) as error:
                return Answer(reason=str(error))
            if look.verdict is not Verdict.UNKNOWN:
                break
        if look.verdict is Verdict.UNKNOWN:
            return Answer(reason=f"host {self._host} cannot hear the wire: {look.reason}")
        return Answer(silent=look.verdict is Verdict.FREE, mac=look.mac)

    def _free(
        self,
        host: str,
        standing: _Standing,
        fence: Mapping[str, int],
        found: KeyValue,
        lease: Lease,
        place: tuple[str, Address],
        kept: Callable[[str], tuple[str, Kept | None]],
    ) -> tuple[str, Kept | None]:
        """One transaction: the lease goes, the history and the host's own list of what it lost say so."""
        segment, address = place
        past_key, lost_key = self._keys.past(segment, address), self._keys.lost(host)
        name = lease.container.name if lease.container else ""
        deadline = time.monotonic() + PATIENCE
        with self._lost_lock:
            while True:
                read = self._ledger.read_many([found.key, past_key, lost_key], deadline)
                there, lost = read[found.key], read[lost_key]
                known = _lost(lost)
                if known is None:
                    return kept(
                        f"the etcd key {lost_key}, where its host is told of it, cannot be read: delete that key"
                    )
                if there is None or there.revision != found.revision:
                    # A try whose outcome was not known may have been this one.
                    done = any(each.token == lease.token for each in known.leases)
                    return (str(address), None) if done else kept("it has just changed")
                entry = LostLease(segment, str(address), lease.kind, lease.token, timestamp(), name)
                ttl = lost.lease if lost else self._etcd.grant_ttl(LOST_TTL, deadline=deadline)
                put = Put(lost_key, encode(retirement.with_lost(known, entry)), ttl)
                unchanged = {**fence, lost_key: lost.revision if lost else 0}
                why = f"host {host} retired by {standing.order.by}{' (forced)' if standing.order.force else ''}"
                try:
                    commit = self._ledger.free(
                        place, found, lease, read[past_key], why, unchanged, deadline, also=[put], retired=True
                    )
                except OutcomeUnknown:
                    continue
                if commit.applied:
                    return str(address), None
                if any(_revision(commit.found[key]) != fence[key] for key in fence):
                    raise _Ended(f"host {host} is there again, or the order to retire it was taken back")

    # ------------------------------------------------------------------------------------- the end

    def _finish(self, host: str, plan: _Plan) -> None:
        """When all parts are done, or nobody takes them: what needs no wire. The record goes when nothing is left."""
        deadline = time.monotonic() + PATIENCE
        standing = self._standing(host, deadline)
        if standing is None or standing.key.revision != plan.revision:
            return
        parts = {part: _part(each) for part, each in standing.parts.items()}
        last = parts.get(LAST)
        plan.done = last is not None and last.done
        waited = self._monotonic() - plan.since
        untaken = [part for part in plan.places if part not in parts]
        running = [each for part, each in parts.items() if part != LAST and (each is None or not each.done)]
        early = waited < (NOBODY if untaken else self._late(LAST))
        if running or early or not self._may_take(standing, LAST):
            return
        fence = self._fence(host, standing, deadline)
        mine = Part(self._host)
        writer = self._take(host, LAST, standing, fence, standing.parts.get(LAST), mine, deadline)
        if writer is None or fence is None:
            return
        for part in untaken:
            why = f"no living daemon reaches subnet {_split(part)[1]} of segment {_split(part)[0]}"
            for segment, address in plan.places[part]:
                mine = _with(mine, _kept(segment, address, why))
        self._drop_shared(host, fence, deadline)
        self._drop_pools(host, fence, deadline)
        forgotten = not self._has_leases(host, deadline) and self._forget(host, fence, deadline)
        writer(msgspec.structs.replace(mine, done=True, forgotten=forgotten))
        plan.done = True
        if forgotten and standing.order.policy:  # where something stays, the order's TTL is when it is tried again
            keys = [standing.key.key, *(self._keys.retire_part(host, part) for part in (*parts, LAST))]
            writes = [Delete(key) for key in dict.fromkeys(keys)]
            self._ledger.write("retire", {standing.key.key: standing.key.revision}, writes, deadline)
        log.warning("host %s was retired by %s%s", host, standing.order.by, "" if forgotten else "; some of it stays")

    def _drop_shared(self, host: str, fence: Mapping[str, int], deadline: float) -> None:
        """Its part in the addresses that several hosts share, as with its last ReleasePool."""
        shared = {self._keys.lease(each[0], each[1]): each for each in self._view.of_kind(ROUTER)}
        for key, found in self._ledger.read_many(list(shared), deadline).items():
            if found is None or all(each.host != host for each in read_lease(found.value).holders):
                continue
            segment, address, _ = shared[key]
            decide = functools.partial(
                retirement.without_host, host=host, kept_router=address in self._view.routers(segment)
            )
            claim = self._ledger.claim(Pool(segment, ipaddress.ip_network(address)), address)
            if not self._ledger.change(claim, decide, deadline, f"host {host} retired", fence):
                raise _Ended(f"host {host} is there again, or the order to retire it was taken back")

    def _drop_pools(self, host: str, fence: Mapping[str, int], deadline: float) -> None:
        keys = [f"{self._keys.pools}{pool_id}/{host}" for pool_id in self._view.pools_of(host)]
        there = {key: found.revision for key, found in self._ledger.read_many(keys, deadline).items() if found}
        while there:
            some = {key: there.pop(key) for key in list(there)[:POOLS_AT_ONCE]}
            if not self._ledger.write("retire", {**fence, **some}, [Delete(key) for key in some], deadline).applied:
                raise _Ended(f"host {host} is there again, or the order to retire it was taken back")

    def _has_leases(self, host: str, deadline: float) -> bool:
        """Whether anything is left under its name; the view may not know yet what has just been freed."""
        keys = [self._keys.lease(segment, address) for segment, address, _ in self._view.entries_of(host)]
        found = self._ledger.read_many(keys, deadline).values()
        return any(each is not None and read_lease(each.value).host == host for each in found)

    def _forget(self, host: str, fence: Mapping[str, int], deadline: float) -> bool:
        """The host's record goes. Whether it is gone."""
        record = self._keys.host(host)
        return fence[record] == 0 or self._ledger.write("retire", fence, [Delete(record)], deadline).applied

    # ----------------------------------------------------------------------- what this host has lost

    def _tell_what_was_lost(self) -> None:
        """It was retired while it was away. What is still under its name is still its own."""
        if not self._view.has_lost(self._host):
            return
        deadline = time.monotonic() + PATIENCE
        key = self._keys.lost(self._host)
        found = self._ledger.read(key, deadline)
        if found is None:
            return
        lost = _lost(found)
        if lost is None:
            self._alarm(
                "record_unreadable",
                f"the etcd key {key} tells what host {self._host} lost while it was away, and cannot be read: look at"
                " its containers' addresses with ipam-plugin check, then delete that key",
            )
            return
        if lost.leases:
            self._alarm("host_was_retired", _told(self._host, lost))
        self._ledger.write("retire", {key: found.revision}, [Delete(key)], deadline)


def _told(host: str, lost: Lost) -> str:
    count = len(lost.leases) + lost.more
    named = [
        f"{each.address}{f' (container {each.container})' if each.container else f' ({each.kind})'}"
        for each in lost.leases[:ALARM_ADDRESSES]
    ]
    rest = count - len(named)
    return (
        f"host {host} was retired while it was away, last at {lost.leases[-1].when}, and lost {count} addresses:"
        f" {', '.join(named)}{f' and {rest} more' if rest else ''}. Other machines may have them by now: stop and start"
        " this host's containers that still use one of them"
    )


def _kept(segment: str, address: Address, why: str) -> tuple[str, Kept | None]:
    return str(address), Kept(segment, str(address), why)


def _with(part: Part, settled: tuple[str, Kept | None]) -> Part:
    """How far a part got, with one address more."""
    address, kept = settled
    if kept is None:
        return msgspec.structs.replace(part, freed=(*part.freed, address)) if address else part
    if len(part.kept) >= PART_TOLD:
        return msgspec.structs.replace(part, more=part.more + 1)
    return msgspec.structs.replace(part, kept=(*part.kept, kept))


def _subnet_of(lease: Lease, address: Address, subnets: Collection[Network], record: Host | None) -> Network:
    """Where its machine is: as its pool says, or a pool of any host, or the interface that had it."""
    with contextlib.suppress(Refused):
        return Pool.parse(lease.pool).subnet
    for subnet in sorted(subnets, key=lambda each: -each.prefixlen):
        if address in subnet:
            return subnet
    for each in record.addresses if record else ():
        if each.address == str(address):
            with contextlib.suppress(ValueError):
                return ipaddress.ip_interface(f"{address}/{each.prefixlen}").network
    return ipaddress.ip_network(address)


def _split(part: str) -> tuple[str, Network]:
    segment, _, subnet = part.partition("/")
    return segment, ipaddress.ip_network(subnet)


def _part(found: KeyValue) -> Part | None:
    try:
        return decode(found.value, Part)
    except ValueError:
        return None


def _lost(found: KeyValue | None) -> Lost | None:
    """None: what stands there cannot be read."""
    try:
        return decode(found.value, Lost) if found else Lost()
    except ValueError:
        return None


def _absent(found: KeyValue) -> str:
    try:
        return decode(found.value, Host).absent
    except ValueError:
        return ""


def _macs(record: Host | None) -> set[str]:
    """Of the host's interfaces; a container on ipvlan talks with one of these."""
    return {*record.macs, *(each.mac for each in record.addresses)} - {""} if record else set()


def _revision(found: KeyValue | None) -> int:
    return found.revision if found else 0
