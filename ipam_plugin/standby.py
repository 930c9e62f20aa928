"""The keeper: what is done about addresses while nobody asks for one.

It fills the stock of standby addresses (claims.py), keeps it fresh and gives it back where the pool is short; it
listens to the wires, for strangers and for machines that use somebody's address; it asks again for the strangers of
old conflicts, and for addresses that this host itself had; and it tells the LAN when an address has changed its
container.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ipam_plugin.addresses import Address
from ipam_plugin.claims import Claims, Slot, Stock
from ipam_plugin.errors import IpamError, PoolExhausted, Refused
from ipam_plugin.ledger import Ledger
from ipam_plugin.model import CONFLICT, ENDPOINT, HOST, STANDBY, Keys, Pool, parse_time, read_lease
from ipam_plugin.neighbourhood import Neighbourhood, Verdict
from ipam_plugin.view import View
from ipam_plugin.wire import Sighting

log = logging.getLogger(__name__)

PERIOD = 1.0  # seconds between two rounds when nothing happens
LISTEN_AGAIN = 30.0  # seconds until it is looked again which interfaces are to be listened to
INTERFACE_PATIENCE = 10.0  # seconds for a network's bridge to appear
LOOK_AGAIN = 60.0  # seconds after which the wire is asked again for an address in stock
FULL_ENOUGH = 0.8  # over which part of a pool nobody keeps standby
PATIENCE = 30.0  # seconds for claiming and looking at one address
PAUSE = 5.0  # seconds until a pool is tried again that could not be filled
LOOKS_AT_ONCE = 8
OWN_LEASES_AGAIN = 600.0  # seconds until the wire is asked again who uses this host's leases
ASKED_A_SECOND = 50  # of these
LATER_AT_MOST = 0.1  # of the probation: how much later than another host one asks
PROBATIONS_AGAIN = 600.0  # seconds until a conflict is tried again whose wire could not be heard
LOST_FOR = 600.0  # seconds for which no interface carried an own address, until the wire is asked for it
SKIPPED_FOR = 300.0  # seconds for which an address is left alone because somebody was heard to use it
REMEMBERED = 4096  # of each thing, whatever the LAN sends
CHECKS_WAITING = 64
TOLD_FOR = 3600.0  # seconds until the same machine's use of the same lease is looked up again
CHECKS_APART = 0.02  # seconds, so that no flood becomes a flood of questions to etcd
ALARMS_APART = 10.0  # seconds between two alarms about one address, and of all beyond the first few
ALARMS_AT_ONCE = 5.0
UNPROVEN_AGAIN = 10.0  # seconds until the wire is asked again for an address about which it said nothing
NEWCOMERS = 1024
NEWCOMER_PATIENCE = 10.0  # seconds for a container to come up


class Recently:
    """What happened within some seconds, at most so many things: a set that forgets. Safe between threads."""

    def __init__(self, seconds: float, most: int = REMEMBERED) -> None:
        self._seconds = seconds
        self._most = most
        self._when: OrderedDict[Hashable, float] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, what: Hashable) -> bool:
        """Whether it is new."""
        now = time.monotonic()
        with self._lock:
            if what in self._when and self._when[what] + self._seconds > now:
                return False
            self._when[what] = now
            self._when.move_to_end(what)
            if len(self._when) > self._most:
                self._when.popitem(last=False)
            return True

    def forget(self, what: Hashable) -> None:
        with self._lock:
            self._when.pop(what, None)


class _Newcomer(NamedTuple):
    """A container that has just got its address."""

    pool: Pool
    mac: str
    since: float  # monotonic seconds


class Keeper:
    """One thread for the rounds, a few for what takes long. `run` it once; `close` ends the threads.

    `may_adopt(address)` says whether standby of an earlier run may be given: a container could have it already, where
    that run's journal was damaged (reconcile.py asks dockerd).
    """

    def __init__(
        self,
        claims: Claims,
        stock: Stock,
        ledger: Ledger,
        view: View,
        keys: Keys,
        host: str,
        neighbourhood: Neighbourhood,
        *,
        alarm: Callable[[str, str], None],
    ) -> None:
        self._claims = claims
        self._stock = stock
        self._ledger = ledger
        self._view = view
        self._keys = keys
        self._host = host
        self._neighbourhood = neighbourhood
        self._alarm = alarm
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._looks = ThreadPoolExecutor(LOOKS_AT_ONCE, thread_name_prefix="look")
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="check")
        self._probations = ThreadPoolExecutor(1, thread_name_prefix="probation")  # so that the stock comes first
        self._room = threading.BoundedSemaphore(CHECKS_WAITING)
        self._lock = threading.Lock()  # for these
        self._filling: dict[str, int] = {}  # PoolID -> claims being looked at for the stock
        self._pause: dict[str, float] = {}  # PoolID -> not before, monotonic seconds
        self._busy: set[tuple[str, Address]] = set()  # with a task of their own
        self._newcomers: OrderedDict[tuple[str, Address], _Newcomer] = OrderedDict()
        self._fills: dict[str, tuple[float, float]] = {}  # PoolID -> when it was counted, how full it was
        self._pools: Sequence[Pool] = ()  # of this host, whose wire is asked
        self._skipped = Recently(SKIPPED_FOR / 2)
        self._told = Recently(TOLD_FOR, 4 * REMEMBERED)
        self._alarmed = Recently(ALARMS_APART)
        self._conflicts: dict[tuple[str, Address, int], float] = {}  # with its revision -> when it is due, monotonic
        self._lost: dict[tuple[str, Address], float] = {}  # own addresses -> when to ask for them, monotonic seconds
        self._listened = -math.inf  # monotonic seconds
        self._deaf_since: dict[str, float] = {}  # PoolID -> since when no interface carries it, monotonic seconds
        self._welcomed = -math.inf  # monotonic seconds
        self._alarms_left = ALARMS_AT_ONCE
        self._alarms_counted = 0.0  # monotonic seconds
        self.may_adopt: Callable[[Address], bool] = lambda address: True
        self._own_asked = time.monotonic()
        self._own_left: list[tuple[Pool, Address]] = []

    def wake(self) -> None:
        """Something changed: look now."""
        self._wake.set()

    def interfaces_changed(self) -> None:
        self._neighbourhood.interfaces_changed()
        self._listened = -math.inf
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set and `wake()` was called."""
        while not stop.is_set() and not self._stop.is_set():
            self._wake.clear()
            pools = self._pools_now()
            if pools != self._pools or self._listened + LISTEN_AGAIN < time.monotonic():
                self._listened = time.monotonic()
                self._neighbourhood.listen(pools)
                self._pools = pools
                self._tell_of_missing_interfaces(pools)
                self._look_for_lost_addresses()
            for pool in pools:
                self._tend(pool)
            if not self._claims.etcd_is_away:
                for slot in self._stock.all():
                    if slot.pool not in pools:
                        self._give_back(slot)
                self._adopt()
                self._end_probations()
                self._end_lost_addresses()
            self._view.wake_rested()
            if self._welcomed + PERIOD <= time.monotonic():
                self._welcomed = time.monotonic()
                self._welcome()
                self._ask_own()
            # What was handed out is filled up with the next round, not at once: a request that is being answered would
            # have to share the interpreter with it.
            self._wake.wait(PERIOD)

    def _tell_of_missing_interfaces(self, pools: Sequence[Pool]) -> None:
        """Not at once: Docker makes the bridge of a network after it has asked for its addresses."""
        now = time.monotonic()
        reasons = self._neighbourhood.without_interface(pools)
        self._deaf_since = {pool_id: self._deaf_since.get(pool_id, now) for pool_id in reasons}
        for pool_id, since in self._deaf_since.items():
            if now - since > INTERFACE_PATIENCE:
                self._alarm(
                    "no_interface",
                    f"pool {pool_id}: {reasons[pool_id]}. Until then probe_failure says what becomes of its addresses",
                )

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        self._looks.shutdown(wait=False, cancel_futures=True)
        self._checks.shutdown(wait=False, cancel_futures=True)
        self._probations.shutdown(wait=False, cancel_futures=True)

    def _pools_now(self) -> list[Pool]:
        found = []
        for pool_id in self._view.pools_of(self._host):
            try:
                pool = Pool.parse(pool_id)
            except Refused:
                continue
            if self._neighbourhood.is_asked(pool):
                found.append(pool)
        return found

    def _later(
        self, segment: str, address: Address, work: Callable[[], None], threads: ThreadPoolExecutor | None = None
    ) -> None:
        """In another thread, one task at a time for an address."""
        with self._lock:
            if (segment, address) in self._busy or self._stop.is_set():
                return
            self._busy.add((segment, address))

        def carry_out() -> None:
            try:
                work()
            except IpamError as error:
                log.info("%s of segment %s: %s", address, segment, error)
            except Exception:
                log.exception("%s of segment %s", address, segment)
            finally:
                with self._lock:
                    self._busy.discard((segment, address))

        if not self._submit(threads or self._looks, carry_out):
            with self._lock:
                self._busy.discard((segment, address))

    @staticmethod
    def _submit(executor: ThreadPoolExecutor, work: Callable[[], None]) -> bool:
        """False when the keeper is closed."""
        try:
            executor.submit(work)
        except RuntimeError:
            return False
        return True

    # ------------------------------------------------------------------------------------- the stock

    def _goal(self, pool: Pool) -> int:
        """How many addresses of the pool should be ready."""
        usual = self._neighbourhood.habits(pool).standby
        if usual == 0 or self._stock.is_closing(pool.id) or self._claims.is_wanted(pool):
            return 0
        if not self._view.uses(pool.id, self._host):
            return 0
        counted, fill = self._fills.get(pool.id, (-math.inf, 0.0))
        now = time.monotonic()
        if counted + PERIOD < now:  # of a large pool that is ragged, counting takes milliseconds
            fill = self._view.fill(pool)
            self._fills[pool.id] = now, fill
        return usual if fill <= FULL_ENOUGH else 0

    def goals(self) -> dict[str, int]:
        """How many addresses of each pool should be ready, by PoolID, for metrics."""
        return {pool.id: self._goal(pool) for pool in self._pools}

    def _tend(self, pool: Pool) -> None:
        if self._claims.etcd_is_away:
            # What is there must last, and must stay fresh.
            return self._keep_fresh(self._stock.of(pool.id))
        goal = self._goal(pool)
        ready = [slot for slot in self._stock.of(pool.id) if not self._is_lost(slot)]
        for slot in ready:
            # Excluded or reserved since, or asked for by name on another host.
            forbidden = self._view.forbids(pool.segment, slot.address)
            if forbidden or self._view.wants_address(pool.segment, slot.address, self._host):
                self._give_back(slot)
        self._give_back_looking(pool)
        for slot in ready[goal:]:
            self._give_back(slot)
        self._keep_fresh(ready[:goal])
        with self._lock:
            if self._pause.get(pool.id, 0.0) > time.monotonic():
                return
            filling = self._filling.get(pool.id, 0)
            # What an earlier run left in etcd counts before it has been taken over: a restart claims nothing new.
            there = max(len(ready) + filling, self._stock.held(pool.id)) + self._left_over(pool)
            missing = max(0, goal - there)
            self._filling[pool.id] = filling + missing
        for _ in range(missing):
            self._submit(self._looks, functools.partial(self._fill, pool))

    def _keep_fresh(self, ready: Sequence[Slot]) -> None:
        now = time.monotonic()
        for slot in ready:
            if slot.looked + (UNPROVEN_AGAIN if slot.unproven else LOOK_AGAIN) < now:
                self._later(slot.pool.segment, slot.address, functools.partial(self._look_again, slot))

    def _left_over(self, pool: Pool) -> int:
        """Own standby in the pool's range that the stock does not know."""
        return sum(
            not self._stock.knows(entry.token)
            for segment, address, entry in self._view.of_kind(STANDBY, self._host)
            if segment == pool.segment and pool.candidates.contains(address)
        )

    def _is_lost(self, slot: Slot) -> bool:
        """Whether its lease is not the slot's any more: an operator took it, or a network of this host's by name."""
        entry = self._view.entry(slot.pool.segment, slot.address)
        if entry is not None and entry.token == slot.token:
            return False
        if self._stock.take_this(slot) is not None:
            self._stock.let_go(slot.token)
        return True

    def _fill(self, pool: Pool) -> None:
        try:
            # To be sure that nothing is free costs a write to etcd; a request pays it, the keeper need not.
            if not self._stop.is_set() and self._goal(pool) > 0 and self._view.has_free(pool):
                self._keep_looked_at(self._claims.ahead(pool, time.monotonic() + PATIENCE))
        except (IpamError, OSError) as error:
            with self._lock:
                self._pause[pool.id] = time.monotonic() + PAUSE
            # A full pool is a state, and the request that meets it says so.
            log.log(logging.DEBUG if isinstance(error, PoolExhausted) else logging.INFO, "no standby: %s", error)
        except Exception:
            log.exception("no standby for pool %s", pool)
        finally:
            with self._lock:
                self._filling[pool.id] -= 1

    def _keep_looked_at(self, slot: Slot) -> None:
        if self._stock.looked_at(slot):  # else a request has it
            self._keep(slot)

    def _keep(self, slot: Slot) -> None:
        """Into the stock, unless it is not wanted there any more."""
        wanted = self._view.wants_address(slot.pool.segment, slot.address, self._host)
        if wanted or self._goal(slot.pool) == 0 or not self._stock.put(slot):
            self._claims.give_back(slot, time.monotonic() + PATIENCE)

    def _give_back_looking(self, pool: Pool) -> None:
        """What another host waits for is given back in the middle of a look; its answer does not matter any more."""
        short = self._view.wanted_of(pool, self._host)

        def wanted(slot: Slot) -> bool:
            return slot.pool == pool and (
                short or self._view.wants_address(slot.pool.segment, slot.address, self._host)
            )

        while (slot := self._stock.take_looking(wanted)) is not None:
            self._end(slot)

    def _give_back(self, slot: Slot) -> None:
        taken = self._stock.take_this(slot)
        if taken is not None:
            self._end(taken)

    def _end(self, slot: Slot) -> None:
        try:
            self._claims.give_back(slot, time.monotonic() + PAUSE)
        except IpamError as error:
            log.info("standby %s of pool %s is not given back yet: %s", slot.address, slot.pool, error)

    def _look_again(self, slot: Slot) -> None:
        """It can be taken meanwhile: its last look is not that old. One that is not silent any more is gone."""
        look = self._neighbourhood.look(slot.pool, slot.address, time.monotonic() + PATIENCE)
        if look.verdict in (Verdict.STRANGER, Verdict.OURS, Verdict.HEARD):
            self._suspect(slot)
        elif look.verdict is Verdict.FREE:
            self._stock.replace(slot, slot._replace(looked=time.monotonic(), unproven=""))
        elif not self._neighbourhood.habits(slot.pool).refuse:
            self._stock.replace(slot, slot._replace(looked=time.monotonic(), unproven=look.reason))

    def _suspect(self, slot: Slot) -> None:
        """Somebody may use it: from now on nobody gets it until the wire was asked thoroughly."""
        taken = self._stock.take_this(slot)
        if taken is not None and not self._submit(self._looks, functools.partial(self._settle, taken)):
            self._stock.let_go(taken.token)

    def _settle(self, taken: Slot) -> None:
        try:
            fresh = self._claims.look_again(taken, time.monotonic() + PATIENCE, thorough=True)
            if fresh is not None:
                self._keep(fresh)
        except IpamError as error:
            log.info("standby %s of pool %s: %s", taken.address, taken.pool, error)
        except Exception:
            log.exception("standby %s of pool %s", taken.address, taken.pool)

    def _adopt(self) -> None:
        """Standby of this host that the stock does not know: an earlier run's, or one whose handing out was cut off."""
        for segment, address, entry in self._view.of_kind(STANDBY, self._host):
            if not self._stock.knows(entry.token) and self.may_adopt(address):
                self._later(segment, address, functools.partial(self._adopt_one, segment, address, entry.token))

    def _adopt_one(self, segment: str, address: Address, token: str) -> None:
        slot = self._claims.adopt(segment, address, token, time.monotonic() + PATIENCE)
        if slot is not None:
            self._stock.looks_at(slot)
            fresh = self._claims.look_again(slot, time.monotonic() + PATIENCE, thorough=True)
            if fresh is not None:
                self._keep_looked_at(fresh)

    # -------------------------------------------------------------------------------------- the wire

    def heard(self, segment: str, sighting: Sighting) -> None:
        """A machine says that it uses an address, or wants to. In a listener's thread: nothing here waits."""
        entry = self._view.entry(segment, sighting.address)
        if entry is not None and entry.kind == ENDPOINT:
            self._heard_newcomer(segment, sighting)
        if self._view.is_ours(sighting.mac):
            return
        if entry is None:
            # Only heard, it is no conflict: the address is left for later, as long as there are others.
            if not sighting.how.probing and self._skipped.add((segment, sighting.address)):
                self._view.skip(segment, sighting.address, SKIPPED_FOR)
        elif entry.kind == STANDBY and entry.host == self._host:
            # Also a machine that only asks whether it may use it: it will, since nobody answers.
            slot = next((each for each in self._stock.all() if each.token == entry.token), None)
            if slot is not None:
                self._suspect(slot)
        elif entry.kind in (ENDPOINT, HOST) and not sighting.how.probing:
            self._check(segment, sighting, entry.token)

    def _check(self, segment: str, sighting: Sighting, token: str) -> None:
        what = (segment, sighting.address, sighting.mac, token)
        if not self._told.add(what):
            return
        if not self._room.acquire(blocking=False):
            self._told.forget(what)  # it will talk again
            return

        def check() -> None:
            try:
                if not self._is_settled(segment, sighting):
                    self._told.forget(what)
            except IpamError as error:
                self._told.forget(what)
                log.info("who holds %s of segment %s is not known: %s", sighting.address, segment, error)
            finally:
                self._stop.wait(CHECKS_APART)
                self._room.release()

        if not self._submit(self._checks, check):
            self._room.release()

    def _is_settled(self, segment: str, sighting: Sighting) -> bool:
        """Whether nothing is left to tell: the holder's own MAC talks, or the alarm is raised.

        The view does not know MACs: those of all leases would be much memory.
        """
        found = self._ledger.read(self._keys.lease(segment, sighting.address), time.monotonic() + PAUSE)
        lease = read_lease(found.value) if found else None
        if lease is None or lease.kind not in (ENDPOINT, HOST) or not lease.mac or lease.mac == sighting.mac:
            return True
        if self._view.moves(segment, sighting.address) or self._neighbourhood.is_proxy(sighting.mac):
            return True
        if not self._alarmed.add((segment, sighting.address)) or not self._may_alarm():
            return False
        self._alarm(
            "address_used_twice",
            f"{sighting.address} of segment {segment} is used by two machines: it belongs to {lease.told()}, and MAC"
            f" {sighting.mac} uses it too. Find that machine, or move the container to another address",
        )
        return True

    def _may_alarm(self) -> bool:
        """A few at once, then one every ALARMS_APART: whoever sends what he likes must not fill log and etcd."""
        now = time.monotonic()
        self._alarms_left = min(ALARMS_AT_ONCE, self._alarms_left + (now - self._alarms_counted) / ALARMS_APART)
        self._alarms_counted = now
        if self._alarms_left < 1:
            return False
        self._alarms_left -= 1
        return True

    def _ask_own(self) -> None:
        """Frames between two other machines are not heard: ask who answers for this host's leases, a few a second."""
        if not self._own_left and time.monotonic() - self._own_asked > OWN_LEASES_AGAIN:
            self._own_asked = time.monotonic()
            self._own_left = [
                (pool, address)
                for segment, address, _ in self._view.of_kind(ENDPOINT, self._host)
                for pool in self._pools
                if pool.segment == segment and address in pool.subnet
            ]
        for _ in range(min(ASKED_A_SECOND, len(self._own_left))):
            self._neighbourhood.ask(*self._own_left.pop())

    # ---------------------------------------------------------------------------------- old conflicts

    def _end_probations(self) -> None:
        now = time.monotonic()
        due = []
        with self._lock:
            before, self._conflicts = self._conflicts, {}
            for segment, address, entry in self._view.of_kind(CONFLICT):
                pool = next((each for each in self._pools if each.segment == segment and address in each.subnet), None)
                if pool is None:
                    continue
                known = (segment, address, entry.revision)
                # Until its lease has been read, nothing is known of it but that it is there.
                when = before.get(known, now)
                if when <= now:
                    due.append((pool, address, known))
                self._conflicts[known] = when if when > now else now + PROBATIONS_AGAIN
        for pool, address, known in due:
            self._later(
                pool.segment, address, functools.partial(self._probation, pool, address, known), self._probations
            )

    def _probation(self, pool: Pool, address: Address, known: tuple[str, Address, int]) -> None:
        found = self._ledger.read(self._keys.lease(pool.segment, address), time.monotonic() + PAUSE)
        lease = read_lease(found.value) if found else None
        if lease is None or lease.kind != CONFLICT:
            return
        # Each host at its own moment: the first one settles it, and none takes another's question for the stranger.
        late = int.from_bytes(hashlib.blake2b(f"{self._host} {address}".encode(), digest_size=2).digest()) / 65536
        probation = self._neighbourhood.habits(pool).probation * (1 + LATER_AT_MOST * late)
        left = (parse_time(lease.since) or 0.0) + probation - time.time()
        if left > 0:
            with self._lock:
                self._conflicts[known] = time.monotonic() + left
            return
        self._claims.end_probation(pool, address, lease.token, time.monotonic() + PATIENCE)

    # ------------------------------------------------------------------------- addresses this host had

    def _look_for_lost_addresses(self) -> None:
        """A daemon that has just started does not know since when: it counts from now."""
        now = time.monotonic()
        try:
            carried = self._neighbourhood.carried(now + PAUSE)
        except OSError as error:
            return log.info("which addresses this host carries is not known: %s", error)
        lost = [each for each in self._view.own_addresses(self._host) if each[1] not in carried]
        self._lost = {each: self._lost.get(each, now + LOST_FOR) for each in lost}

    def _end_lost_addresses(self) -> None:
        now = time.monotonic()
        for (segment, address), due in list(self._lost.items()):
            entry = self._view.entry(segment, address)
            if due > now or entry is None:
                continue
            self._lost[segment, address] = now + LOST_FOR
            pool = self._pool_around(segment, address)
            if pool is not None:
                work = functools.partial(self._end_lost_address, pool, address, entry.token)
                self._later(segment, address, work, self._probations)

    def _end_lost_address(self, pool: Pool, address: Address, token: str) -> None:
        self._claims.end_own_address(pool, address, token, time.monotonic() + PATIENCE)

    def _pool_around(self, segment: str, address: Address) -> Pool | None:
        """Where the wire is asked for it: a pool of this host's, or of another one that has a network there."""
        others = [Pool(segment, subnet) for subnet in self._view.subnets().get(segment, ())]
        return next(
            (
                each
                for each in (*self._pools, *others)
                if each.segment == segment and address in each.subnet and self._neighbourhood.is_asked(each)
            ),
            None,
        )

    # ------------------------------------------------------------------------------------ newcomers

    def given(self, pool: Pool, address: Address, mac: str) -> None:
        """A container gets this address now, which another MAC may have had before (moby#30238)."""
        if mac and self._neighbourhood.is_asked(pool):
            with self._lock:
                self._newcomers[pool.segment, address] = _Newcomer(pool, mac, time.monotonic())
                if len(self._newcomers) > NEWCOMERS:
                    self._newcomers.popitem(last=False)

    def _welcome(self) -> None:
        """Ask for those who are not up yet, so that they are heard when they are.

        On macvlan and ipvlan they cannot be heard from here, and nothing is announced: an ipvlan's container talks with
        its host's MAC, not with the one that the engine named.
        """
        now = time.monotonic()
        with self._lock:
            waiting = list(self._newcomers.items())
        for (segment, address), newcomer in waiting:
            entry = self._view.entry(segment, address)
            gone = entry is None or entry.kind != ENDPOINT or entry.host != self._host
            deaf = isinstance(self._neighbourhood.wire_of(newcomer.pool), str)
            deaf = deaf or not self._neighbourhood.hears_containers(newcomer.pool)
            if gone or deaf or now - newcomer.since > NEWCOMER_PATIENCE:
                self._forget_newcomer(segment, address, newcomer)
            else:
                self._neighbourhood.ask(newcomer.pool, address)

    def _heard_newcomer(self, segment: str, sighting: Sighting) -> None:
        with self._lock:
            newcomer = self._newcomers.get((segment, sighting.address))
        if newcomer is not None and newcomer.mac == sighting.mac:
            self._submit(self._checks, functools.partial(self._announce, segment, sighting.address, newcomer))

    def _announce(self, segment: str, address: Address, newcomer: _Newcomer) -> None:
        """Engines before 28 do not say that an address has moved, and caches keep the old MAC for minutes."""
        if self._forget_newcomer(segment, address, newcomer):
            self._neighbourhood.announce(newcomer.pool, address, newcomer.mac)

    def _forget_newcomer(self, segment: str, address: Address, newcomer: _Newcomer) -> bool:
        """Whether it was this one that was waited for."""
        with self._lock:
            if self._newcomers.get((segment, address)) != newcomer:
                return False
            del self._newcomers[segment, address]
            return True
