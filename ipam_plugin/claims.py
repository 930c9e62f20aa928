"""Addresses that nobody on the LAN uses: claimed in etcd first, looked for on the wire then, given last.

Only in this order does silence prove anything: once the address is this host's in etcd, no other host begins to use
it between the look and the answer to Docker. A claim is a lease of kind `standby`. It is handed out (one
transaction), given back, or, when a stranger answers, becomes a `conflict` that every host skips.

Docker asks for one address after another under the network's lock, so what can be claimed and looked at ahead of
need is in the stock (filled by standby.py), and a request takes it from there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from ipam_plugin import decisions
from ipam_plugin.addresses import Address
from ipam_plugin.decisions import KEEP, Claim, Decision
from ipam_plugin.errors import (
    AddressTaken,
    EtcdUnavailable,
    IpamError,
    JournalFailed,
    OutcomeUnknown,
    PoolExhausted,
    ProbeFailed,
    Refused,
)
from ipam_plugin.etcd import Delete, Put
from ipam_plugin.ledger import Ended, Ledger, ended_by
from ipam_plugin.model import CONFLICT, HELD, RESERVED, STANDBY, Container, Keys, Lease, Pool, encode, read_lease
from ipam_plugin.neighbourhood import Look, Neighbourhood, Verdict
from ipam_plugin.outage import Outage
from ipam_plugin.view import Held, View

log = logging.getLogger(__name__)

FRESH = 100.0  # seconds for which a look counts; the stock is looked at again every 60 s, and a look takes a while
OURS_FOR = 120.0  # seconds for which an address is left alone that answered though it is none of a stranger's
UNDO_PATIENCE = 2.0  # seconds for taking a claim back; the keeper does what does not come about
REFUSAL_LEAVES = 0.3  # seconds of the deadline for taking back what asked for it
ASKING_LEAVES = 2.0  # seconds of the deadline for what follows once standby was given back
STANDBY_PATIENCE = 2.0  # seconds that other hosts have for their standby, before a hold gives way
WANTED_GRACE = 5  # seconds that a `wanted` key may outlive the request that wrote it


class Slot(NamedTuple):
    """A claimed address: this host's in etcd, and nobody's yet."""

    pool: Pool
    address: Address
    revision: int  # of its lease
    token: str
    looked: float  # when the wire was asked last, monotonic seconds
    unproven: str = ""  # why that look proved nothing
    kept: Lease | None = None  # what makes it this host's, if not standby (decisions.is_kept_for)
    conflict: Lease | None = None  # the stranger of which the claim took the place, until it is handed out


class Stock:
    """The claims of this host, ready or in somebody's hands. Memory only; safe between threads.

    What is in etcd and not here is left over: an earlier run's, or one whose handing out was cut off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: dict[str, Slot] = {}  # by token
        self._in_hand: dict[str, str] = {}  # token -> PoolID
        self._looking: dict[str, Slot] = {}  # those in hand that are looked at ahead of need: a request may take one
        self._closing: set[str] = set()  # PoolIDs that are being released
        self._ending: set[str] = set()  # tokens of holds whose end was sent to etcd
        self._journalled: set[str] = set()  # tokens of what was given, or released, and is not so in etcd yet

    def hold(self, token: str, pool: Pool) -> None:
        """Somebody works with the claim of this token."""
        with self._lock:
            self._in_hand[token] = pool.id

    def let_go(self, token: str) -> None:
        with self._lock:
            self._in_hand.pop(token, None)
            self._looking.pop(token, None)

    def looks_at(self, slot: Slot) -> None:
        """It is claimed ahead of need and being looked at; whoever needs one now need not wait for the end of that."""
        with self._lock:
            self._looking[slot.token] = slot

    def looked_at(self, slot: Slot) -> bool:
        """Whether it is still the keeper's: nobody took it meanwhile."""
        with self._lock:
            return self._looking.pop(slot.token, None) is not None

    def is_in_hand(self, token: str) -> bool:
        with self._lock:
            return token in self._in_hand or token in self._journalled

    def knows(self, token: str) -> bool:
        with self._lock:
            return token in self._ready or token in self._in_hand or token in self._journalled

    def journalled(self, tokens: Collection[str]) -> bool:
        """Standby or held in etcd, and a container's: nobody touches it until the journal is carried out.

        False where the end of such a hold is on its way to etcd, so that the address may be anybody's.
        """
        with self._lock:
            if not self._ending.isdisjoint(tokens):
                return False
            self._journalled.update(tokens)
            return True

    def end_hold(self, token: str) -> bool:
        """Before etcd is told that a hold ends. False where its address was given from the journal."""
        with self._lock:
            if token in self._journalled:
                return False
            self._ending.add(token)
            return True

    def hold_stands(self, token: str) -> None:
        """It is certain that etcd does not end it any more, or has done so."""
        with self._lock:
            self._ending.discard(token)

    def settled(self, tokens: Collection[str]) -> None:
        with self._lock:
            self._journalled.difference_update(tokens)

    def put(self, slot: Slot) -> bool:
        """Ready to be taken; no longer in hand. False when its pool is being released: it has to go."""
        with self._lock:
            if slot.pool.id in self._closing:
                return False
            self._in_hand.pop(slot.token, None)
            self._ready[slot.token] = slot
            return True

    def replace(self, before: Slot, after: Slot) -> None:
        """Looked at again, unless it was taken meanwhile."""
        with self._lock:
            if self._ready.get(before.token) == before:
                self._ready[before.token] = after

    def take(self, pool: Pool) -> Slot | None:
        """The one of this pool looked at last, if that was lately; it is in the caller's hands then."""
        return self._take(lambda slot: slot.pool.id == pool.id, fresh=True)

    def take_any(self, pool: Pool) -> Slot | None:
        """Any of the range, however long ago it was looked at: for a pool in which nothing else is left."""
        return self._take(lambda slot: _fits(pool, slot), fresh=False)

    def take_address(self, segment: str, address: Address) -> Slot | None:
        """The one with this address, if it was looked at lately."""
        return self._take(lambda slot: (slot.pool.segment, slot.address) == (segment, address), fresh=True)

    def take_this(self, slot: Slot) -> Slot | None:
        """This very one, if nobody else took it."""
        return self._take(lambda each: each.token == slot.token, fresh=False)

    def _take(self, fits: Callable[[Slot], bool], *, fresh: bool) -> Slot | None:
        oldest = time.monotonic() - FRESH if fresh else -math.inf
        with self._lock:
            found = [slot for slot in self._ready.values() if slot.looked > oldest and fits(slot)]
            if not found:
                return None
            slot = max(found, key=lambda each: each.looked)
            del self._ready[slot.token]
            self._in_hand[slot.token] = slot.pool.id
            return slot

    def of(self, pool_id: str) -> list[Slot]:
        with self._lock:
            return [slot for slot in self._ready.values() if slot.pool.id == pool_id]

    def held(self, pool_id: str) -> int:
        """How many of a pool there are, ready or in somebody's hands."""
        with self._lock:
            return sum(slot.pool.id == pool_id for slot in self._ready.values()) + sum(
                of == pool_id for of in self._in_hand.values()
            )

    def counts(self) -> dict[str, int]:
        """How many are ready, by PoolID."""
        with self._lock:
            return dict(collections.Counter(slot.pool.id for slot in self._ready.values()))

    def all(self) -> list[Slot]:
        with self._lock:
            return list(self._ready.values())

    def take_looking(self, fits: Callable[[Slot], bool]) -> Slot | None:
        """One that is being looked at ahead of need; from now on it is the caller's."""
        with self._lock:
            slot = next((each for each in self._looking.values() if fits(each)), None)
            if slot is not None:
                del self._looking[slot.token]
            return slot

    def has_any(self, pool: Pool) -> bool:
        """Whether one of the pool's range is ready or being looked at, of whichever network."""
        with self._lock:
            return any(_fits(pool, slot) for slot in (*self._ready.values(), *self._looking.values()))

    def is_closing(self, pool_id: str) -> bool:
        with self._lock:
            return pool_id in self._closing

    def close(self, pool_id: str) -> list[str]:
        """Nothing of this pool is kept any more. Returns the tokens of all its claims."""
        with self._lock:
            self._closing.add(pool_id)
            ready = [slot.token for slot in self._ready.values() if slot.pool.id == pool_id]
            for token in ready:
                del self._ready[token]
            return ready + [token for token, of in self._in_hand.items() if of == pool_id]

    def reopen(self, pool_id: str) -> None:
        with self._lock:
            self._closing.discard(pool_id)


def _fits(pool: Pool, slot: Slot) -> bool:
    """Whether a container of this pool could have the slot's address, for whichever pool it was claimed."""
    return (
        slot.pool.segment == pool.segment
        and pool.candidates.contains(slot.address)
        and not any(each.contains(slot.address) for each in pool.exclude)
    )


def _kept(pool: Pool, held: Held) -> Slot:
    """A claim of this host's already. Nothing has to be written before the wire is asked, nothing when it answers."""
    return Slot(pool, held.address, held.revision, held.lease.token, looked=-math.inf, kept=held.lease)


class Claims:
    """Claims addresses for this host and asks the wire for them. Deadlines are of time.monotonic(), seconds.

    Every method may be called from any thread, and raises the errors of errors.py. A claim that a failed method leaves
    behind in etcd is nobody's in the stock, where the keeper finds it (standby.py).
    """

    def __init__(
        self,
        ledger: Ledger,
        view: View,
        keys: Keys,
        host: str,
        neighbourhood: Neighbourhood,
        stock: Stock,
        outage: Outage,
        *,
        vendor_of: Callable[[str], str],
    ) -> None:
        self._ledger = ledger
        self._view = view
        self._keys = keys
        self._host = host
        self._neighbourhood = neighbourhood
        self._stock = stock
        self._outage = outage
        self._vendor_of = vendor_of
        self._lock = threading.Lock()
        self._wanting: dict[str, int] = {}  # `wanted` key -> requests of this host that wait for standby
        self._wanted_pools: collections.Counter[str] = collections.Counter()  # PoolID -> these requests
        self._wanted_revisions: dict[str, int] = {}  # `wanted` key -> as this host wrote it last
        self.conflicts = 0  # written
        self.unproven = 0  # handed out although the look proved nothing
        self.on_shortage: Callable[[], None] = lambda: None  # a request waits for standby
        # Whether etcd is back from a backup, and what stands there as standby may be another host's container's by now.
        self.is_restoring: Callable[[], bool] = lambda: False

    @property
    def etcd_is_away(self) -> bool:
        """Whether there is no point in claiming anything now."""
        return self._outage.lasts

    def asks_the_wire(self, pool: Pool) -> bool:
        return self._neighbourhood.is_asked(pool)

    # -------------------------------------------------------------------------------- for a request

    def silent(self, pool: Pool, deadline: float) -> Slot:
        """An address that nobody uses: from the stock, or the next free one, looked at now.

        Where nothing is free, `make_room` finds what can be spared. Raises PoolExhausted when nothing can, ProbeFailed
        when the wire proves nothing and the policy is to refuse.
        """
        slot = self._stock.take(pool)
        while slot is None:
            try:
                slot = self.find(pool, deadline)
            except PoolExhausted as full:
                slot = self.make_room(pool, full, deadline)
        return slot

    def returning(self, pool: Pool, mac: str, container: Container | None, deadline: float) -> Slot | None:
        """The address that this host keeps for whoever asks, looked at now; None where there is none, or where
        something of ours answers there."""
        fitting = [each for each in self._kept_in(pool) if decisions.is_held_for(each.lease, pool, mac, container)]
        return self._first_silent(pool, reversed(fitting), deadline)

    def _kept_in(self, pool: Pool) -> list[Held]:
        """What this host keeps in the pool's segment, without what was given from the journal."""
        return [
            each
            for each in self._view.held()
            if each.segment == pool.segment and not self._outage.is_waiting(each.segment, each.address)
        ]

    def _first_silent(self, pool: Pool, held: Iterable[Held], deadline: float) -> Slot | None:
        for each in held:
            slot = _kept(pool, each)
            looked = self._looked_at(slot, deadline) if self.asks_the_wire(pool) else slot
            if isinstance(looked, Slot):
                return looked
        return None

    def this(
        self, pool: Pool, address: Address, decide: Callable[[Lease | None, Claim], Decision], deadline: float
    ) -> Slot:
        """The address that was asked for by name, looked at now. `decide` words the claim, or refuses it."""
        slot = self._stock.take_address(pool.segment, address)
        if slot is not None:
            return slot
        held = self._view.held_at(pool.segment, address)
        if held is not None:
            decide(held.lease, self._ledger.claim(pool, address))  # else refused
            slot = _kept(pool, held)
        else:
            slot = self._claim_this(pool, address, decide, deadline)
        looked = self._looked_at(slot, deadline)
        if isinstance(looked, Slot):
            return looked
        if looked.verdict is Verdict.UNKNOWN:
            assert slot.conflict is not None
            raise AddressTaken(
                f"{address} of pool {pool} is taken: {slot.conflict.told()}; that it has gone cannot be told now,"
                f" because the wire cannot be heard: {looked.reason}"
            )
        who = f"a machine that is none of ours{self._made_by(looked.mac)}"
        container = slot.kept.container if slot.kept is not None and slot.kept.kind == RESERVED else None
        if container is not None and slot.kept is not None and looked.mac == slot.kept.mac:
            who = (
                "the container itself, which still has its old network: docker network disconnect"
                f" {shlex.quote(container.network)} {shlex.quote(container.name)}"
            )
        elif looked.verdict is Verdict.OURS:
            who = "a Docker host, or a container that has just ended"
        elif looked.verdict is Verdict.HEARD:
            who = "a machine that uses it or is about to"
        raise AddressTaken(
            f"{address} of pool {pool} is in use on the wire: MAC {looked.mac} answers there ({who}); take another"
            " address, or find that machine"
        )

    def hand_out(self, pool: Pool, slot: Slot, lease_of: Callable[[Lease, Claim], Decision], deadline: float) -> bool:
        """One transaction makes a lease of the claim; while etcd is away, an entry of the journal does.

        False when the address was lost, or may not be given any more.
        """
        try:
            given = self._convert(pool, slot, lease_of, deadline)
        except OutcomeUnknown:
            # Not given again until it is settled: where it is still standby, the keeper writes it anew.
            self._stock.let_go(slot.token)
            raise
        except BaseException:
            # One that was asked for by name may lie where no request without a name finds it.
            ahead = slot.kept is None and slot.pool.candidates.contains(slot.address)
            if not (ahead and self._stock.put(slot)):
                self._stock.let_go(slot.token)
            raise
        self._stock.let_go(slot.token)
        if given and slot.unproven:
            self.unproven += 1
            log.warning(
                "%s of pool %s is given although the wire could not be heard: %s", slot.address, pool, slot.unproven
            )
        return given

    def _convert(self, pool: Pool, slot: Slot, lease_of: Callable[[Lease, Claim], Decision], deadline: float) -> bool:
        key = self._keys.lease(pool.segment, slot.address)
        while True:
            settings = self._ledger.settings(pool.segment)
            excluded = any(each.contains(slot.address) for each in pool.exclude)
            if slot.kept is not None and self._outage.is_waiting(pool.segment, slot.address):
                return False  # another container got it from the journal
            reason = self._view.forbids(pool.segment, slot.address)
            if slot.kept is not None and slot.kept.kind == RESERVED and (excluded or reason):
                # An operator's word, which is not taken back here.
                raise AddressTaken(f"{slot.address} of pool {pool} cannot be given: {reason or 'it is excluded'}")
            if excluded or reason:
                self.give_back(slot, deadline)
                return False
            claim = self._ledger.claim(pool, slot.address)
            lease = lease_of(slot.kept or Lease(kind=STANDBY, host=self._host, token=slot.token), claim)
            assert isinstance(lease, Lease)
            try:
                if self._outage.lasts:
                    self._give_from_journal(pool, slot, lease)
                    return True
                patience = self._outage.patience(deadline)
                ended = self._ended(slot, lease, patience)
                commit = self._ledger.grant(claim, lease, slot.revision, settings, patience, abandon=False, ended=ended)
            except (EtcdUnavailable, OutcomeUnknown) as error:
                self._outage.noticed(error)
                try:
                    self._give_from_journal(pool, slot, lease)
                except JournalFailed as failed:
                    if isinstance(error, OutcomeUnknown):
                        self._ledger.abandon(key, claim)
                    raise type(error)(f"{error}; {failed}") from failed
                return True
            if commit.applied:
                return True
            there = commit.found[key]
            if there is None or read_lease(there.value).token != slot.token:
                return False  # an operator took it
            slot = slot._replace(revision=there.revision)

    def _ended(self, slot: Slot, after: Lease | None, deadline: float) -> Ended | None:
        """Who had the address of a claim before, where `after` ends that. Standby was nobody's: no question to etcd."""
        before = slot.kept or slot.conflict
        if not decisions.ends(before, after):
            return None
        past = self._ledger.read(self._keys.past(slot.pool.segment, slot.address), deadline)
        return ended_by(before, after, past, "" if after else "it may not be given any more")

    def _give_from_journal(self, pool: Pool, slot: Slot, lease: Lease) -> None:
        """It is this host's in etcd, and nobody else takes it from there. Raises JournalFailed, or EtcdUnavailable
        where etcd may yet carry out the end of a hold.
        """
        tokens = (slot.token, lease.token)
        if not self._stock.journalled(tokens):
            raise EtcdUnavailable(f"{slot.address} of pool {pool} may be free by now, and etcd does not say; try again")
        try:
            self._outage.give(pool, slot.address, slot.token, lease)
        except BaseException:
            self._stock.settled(tokens)
            raise

    def answering(self, pool: Pool, address: Address, deadline: float) -> Look:
        """Who answers for an address that is not going to be claimed."""
        if not self.asks_the_wire(pool) or isinstance(self._neighbourhood.wire_of(pool, deadline), str):
            # Where no interface carries the subnet Docker makes a bridge, and nobody is on that yet.
            return Look(Verdict.UNKNOWN)
        return self._neighbourhood.look(pool, address, deadline)

    # --------------------------------------------------------------------------- claiming and looking

    def ahead(self, pool: Pool, deadline: float) -> Slot:
        """As `find`, for the keeper, thoroughly: a request that needs an address takes it over in the middle."""
        return self.find(pool, deadline, thorough=True, purpose="standby")

    def find(self, pool: Pool, deadline: float, *, thorough: bool = False, purpose: str = "claim") -> Slot:
        """Claim free addresses, one after another, until one is silent. Raises as `silent` does."""
        answered: set[Address] = set()
        while True:
            slot = self._claim_next(pool, deadline, purpose)
            if thorough:
                self._stock.looks_at(slot)
            looked = self._looked_at(slot, deadline, thorough=thorough)
            if isinstance(looked, Slot):
                return looked
            if slot.address in answered:
                raise AddressTaken(
                    f"pool {pool}: what is free in it answers on the wire ({slot.address} from MAC {looked.mac}, of a"
                    " Docker host, of a container that has just ended, or of a machine that is about to use it); try"
                    " again in two minutes"
                )
            answered.add(slot.address)

    def look_again(self, slot: Slot, deadline: float, *, thorough: bool = False) -> Slot | None:
        """The slot with a fresh look, or None when the address is not to be had any more."""
        looked = self._looked_at(slot, deadline, thorough=thorough)
        return looked if isinstance(looked, Slot) else None

    def _looked_at(self, slot: Slot, deadline: float, *, thorough: bool = False) -> Slot | Look:
        """The slot, silent or as unproven as the policy allows; or the answer that spoiled it, its claim settled.

        A conflict that stood there comes back where nothing is proven against it, whatever the policy is about
        addresses of which nothing is known. What is reserved for a container stays so, whoever answers.
        """
        try:
            look = self._neighbourhood.look(slot.pool, slot.address, deadline, thorough=thorough)
            if look.verdict is Verdict.FREE:
                return slot._replace(looked=time.monotonic(), unproven="")
            if look.verdict is Verdict.UNKNOWN and slot.conflict is None:
                if self._neighbourhood.habits(slot.pool).refuse:
                    raise ProbeFailed(
                        f"{slot.address} of pool {slot.pool} is not given, because the wire cannot be heard"
                        f" (probe_failure: refuse): {look.reason}"
                    )
                return slot._replace(looked=time.monotonic(), unproven=look.reason)
        except BaseException:
            self._undo(slot, deadline)
            raise
        if look.verdict is Verdict.STRANGER and not (slot.kept is not None and slot.kept.kind == RESERVED):
            self._becomes_conflict(slot, look.mac, deadline)
        else:
            self._view.skip(slot.pool.segment, slot.address, OURS_FOR)
            self._undo(slot, deadline)
        return look

    def _claim_next(self, pool: Pool, deadline: float, purpose: str) -> Slot:
        tried: list[str] = []

        def lease_of(claim: Claim) -> Lease:
            # In hand before it can be seen in etcd, where the keeper would take it for left over.
            tried.append(claim.token)
            self._stock.hold(claim.token, pool)
            lease = decisions.claim_ahead(None, claim)
            assert isinstance(lease, Lease)
            return lease

        won = ""
        try:
            granted = self._ledger.grant_next(pool, lease_of, deadline, purpose)
            won = granted.claim.token
        finally:
            for token in tried:
                if token != won:
                    self._stock.let_go(token)
        return Slot(pool, granted.claim.address, granted.revision, won, looked=-math.inf)

    def _claim_this(
        self, pool: Pool, address: Address, decide: Callable[[Lease | None, Claim], Decision], deadline: float
    ) -> Slot:
        key, past_key = self._keys.lease(pool.segment, address), self._keys.past(pool.segment, address)
        read = self._ledger.read_many([key, past_key], deadline)
        while True:
            settings = self._ledger.settings(pool.segment)
            found = read[key]
            before = read_lease(found.value) if found else None
            if before is not None and before.kind == STANDBY and self._stock.is_in_hand(before.token):
                # Another request of this host, or the keeper, is about to know more of it.
                self._await_hand(pool, address, before.token, deadline)
                read = self._ledger.read_many([key, past_key], deadline)
                continue
            claim = self._ledger.claim(pool, address)
            lease = decide(before, claim)
            if lease is KEEP:
                assert found is not None
                assert before is not None
                return Slot(pool, address, found.revision, before.token, looked=-math.inf, kept=before)
            assert isinstance(lease, Lease)
            self._stock.hold(claim.token, pool)
            try:
                revision = found.revision if found else 0
                ended = ended_by(before, lease, read[past_key])
                commit = self._ledger.grant(claim, lease, revision, settings, deadline, purpose="claim", ended=ended)
            except BaseException:
                self._stock.let_go(claim.token)
                raise
            if commit.applied:
                conflict = before if before is not None and before.kind == CONFLICT else None
                return Slot(pool, address, commit.revision, claim.token, looked=-math.inf, conflict=conflict)
            self._stock.let_go(claim.token)
            read = {**read, **commit.found}

    def _await_hand(self, pool: Pool, address: Address, token: str, deadline: float) -> None:
        taken = self._stock.take_looking(lambda slot: slot.token == token)
        if taken is not None:
            self._stock.let_go(token)  # from here on it is this request's to overwrite
        elif not self._view.wait_until(lambda: not self._stock.is_in_hand(token), deadline):
            raise AddressTaken(f"{address} of pool {pool} is asked for by another container of this host; try again")

    def _becomes_conflict(self, slot: Slot, mac: str, deadline: float) -> None:
        """Every host skips it from now on (design section 4)."""
        claim = self._ledger.claim(slot.pool, slot.address)
        lease = decisions.found_in_use(claim, mac, self._vendor_of(mac))
        try:
            if self._replace_claim(slot, lease, deadline):
                self.conflicts += 1
                log.warning("%s of segment %s is in use: %s", slot.address, slot.pool.segment, lease.told())
        finally:
            self._stock.let_go(slot.token)

    def give_back(self, slot: Slot, deadline: float) -> None:
        """The claim ends; nobody had the address of standby, so nothing remembers it."""
        try:
            self._replace_claim(slot, None, deadline)
        finally:
            self._stock.let_go(slot.token)

    def _undo(self, slot: Slot, deadline: float) -> None:
        if slot.kept is not None:
            return  # nothing was written: it is kept as before
        try:
            end = min(deadline, time.monotonic() + UNDO_PATIENCE)
            self._replace_claim(slot, slot.conflict, end)
        except IpamError as error:
            log.info("%s stays claimed until the keeper of standby finds it: %s", slot.address, error)
        finally:
            self._stock.let_go(slot.token)

    def _replace_claim(self, slot: Slot, after: Lease | None, deadline: float) -> bool:
        """Whether the claim stood there until this write. What it took the place of is remembered where that ends."""
        key = self._keys.lease(slot.pool.segment, slot.address)
        write = Put(key, encode(after)) if after is not None else Delete(key)
        place = (slot.pool.segment, slot.address)
        revision = slot.revision
        while True:
            compared, history = self._ledger.remembering(place, self._ended(slot, after, deadline))
            commit = self._ledger.write("standby", {key: revision, **compared}, [*history, write], deadline)
            if commit.applied:
                return True
            there = commit.found[key]
            if there is None or read_lease(there.value).token != slot.token:
                return False
            revision = there.revision

    def _made_by(self, mac: str) -> str:
        vendor = self._vendor_of(mac)
        return f", made by {vendor}" if vendor else ""

    # ----------------------------------------------------------------------------- shortage, and the end

    def make_room(self, pool: Pool, full: PoolExhausted, deadline: float) -> Slot | None:
        """What can be spared where nothing is free, or None: look again, something has become free.

        First what nobody waits for: standby, of this host's other networks and then of other hosts. Then the oldest
        hold, this host's and then another's. Raises PoolExhausted, naming who keeps what is not given.
        """
        spare = self._stock.take_any(pool) or self._stock.take_looking(functools.partial(_fits, pool))
        if spare is not None:
            return self.look_again(spare, deadline)
        held = [each for each in self._kept_in(pool) if self._view.may_have(pool, each.address)]
        if not held:
            self._wait_for_room(pool, full, deadline)
            return None
        if self._is_spared(pool, STANDBY):
            with contextlib.suppress(PoolExhausted):
                self._wait_for_room(pool, full, min(deadline, time.monotonic() + STANDBY_PATIENCE))
                return None
        slot = self._first_silent(pool, held, deadline)
        if slot is None:
            raise PoolExhausted(f"{full}; what is held for stopped containers answers on the wire")
        assert slot.kept is not None
        log.info("%s of pool %s, %s, gives way: nothing else is free", slot.address, pool, slot.kept.told())
        return slot

    def _is_spared(self, pool: Pool, *kinds: str) -> bool:
        """Whether a host that lives, or this one, keeps something of these kinds in the pool."""
        return any(
            entry.host == self._host or self._view.is_alive(entry.host)
            for _, entry in self._view.spare_in(pool, *kinds)
        )

    def _wait_for_room(self, pool: Pool, full: PoolExhausted, deadline: float) -> None:
        """Until something of the pool is free or in stock. Raises PoolExhausted, naming who keeps what is not."""

        def living() -> bool:
            return self._is_spared(pool, STANDBY, HELD)

        if living():
            with self._wanted(self._keys.want(pool, self._host), pool.id, deadline):
                came = self._view.wait_until(
                    lambda: self._view.has_free(pool) or self._stock.has_any(pool) or not living(),
                    deadline - REFUSAL_LEAVES,
                )
            if came:
                return
        more = ""
        for kind, what in ((STANDBY, "standby"), (HELD, "what is held")):
            others = sorted({entry.host for _, entry in self._view.spare_in(pool, kind)})
            gone = [host for host in others if host != self._host and not self._view.is_alive(host)]
            late = [host for host in others if host not in gone]
            more += f"; {what} of {', '.join(gone)}, which cannot be reached, stays taken" if gone else ""
            more += f"; {what} of {', '.join(late)} was asked for and did not come back in time" if late else ""
        raise PoolExhausted(f"{full}{more}")

    def ask_for(self, pool: Pool, address: Address, deadline: float) -> None:
        """An address that was asked for by name may be another host's standby: until its owner has given it back.

        Returns also when the owner cannot be reached or is late; then it is refused, naming the owner.
        """
        entry = self._view.entry(pool.segment, address)
        if entry is None or entry.kind != STANDBY or entry.host == self._host or not self._view.is_alive(entry.host):
            return
        token = entry.token

        def given_back() -> bool:
            now = self._view.entry(pool.segment, address)
            return now is None or now.token != token

        with self._wanted(self._keys.want_address(pool.segment, address, self._host), "", deadline):
            self._view.wait_until(given_back, deadline - ASKING_LEAVES)

    @contextlib.contextmanager
    def _wanted(self, key: str, pool_id: str, deadline: float) -> Iterator[None]:
        """While it lasts, a key asks the other hosts for their standby, and this host's keeper for its own."""
        with self._lock:
            self._wanting[key] = self._wanting.get(key, 0) + 1
            self._wanted_pools[pool_id] += 1
        try:
            seconds = math.ceil(max(0.0, deadline - time.monotonic())) + WANTED_GRACE
            with contextlib.suppress(OutcomeUnknown):  # written or not, nobody's address hangs on it
                revision = self._ledger.write_for(seconds, key, b"{}", deadline)
                with self._lock:
                    self._wanted_revisions[key] = max(revision, self._wanted_revisions.get(key, 0))
            self.on_shortage()
            yield
        finally:
            with self._lock:
                self._wanted_pools[pool_id] -= 1
                self._wanting[key] -= 1
                written = 0
                if not self._wanting[key]:
                    del self._wanting[key]
                    written = self._wanted_revisions.pop(key, 0)
            if written:
                try:
                    # At its revision: another request may have written it anew by now.
                    end = min(deadline, time.monotonic() + UNDO_PATIENCE)
                    self._ledger.write("wanted", {key: written}, [Delete(key)], end)
                except IpamError as error:
                    log.info("%s ends by itself: %s", key, error)

    def is_wanted(self, pool: Pool) -> bool:
        """Whether anybody waits for standby in this pool's range, a request of this host or another host's."""
        with self._lock:
            mine = self._wanted_pools[pool.id] > 0
        return mine or self._view.wanted_of(pool, self._host)

    @contextlib.contextmanager
    def closed(self, pool: Pool, deadline: float) -> Iterator[None]:
        """The last network of this pool goes: its claims are given back, and no more are made meanwhile."""
        tokens = set(self._stock.close(pool.id))
        try:
            for _segment, address, entry in self._view.of_kind(STANDBY, self._host):
                if entry.token in tokens:
                    self.give_back(Slot(pool, address, entry.revision, entry.token, 0.0), deadline)
            yield
        finally:
            self._stock.reopen(pool.id)

    # ----------------------------------------------------------------------------- for the keeper

    def adopt(self, segment: str, address: Address, token: str, deadline: float) -> Slot | None:
        """Own standby that the stock does not know, with a lease written anew: whatever still hangs in etcd about the
        old one compares a revision that is gone. It has not been looked at. None where it is given back, because its
        pool is not used any more, or gone already.
        """
        key = self._keys.lease(segment, address)
        found = self._ledger.read(key, deadline)
        lease = read_lease(found.value) if found else None
        if found is None or lease is None or (lease.kind, lease.host, lease.token) != (STANDBY, self._host, token):
            return None
        if lease.mac:
            # Cut off in the middle of a look at a conflict, of which nothing is proven.
            claim = self._ledger.claim(Pool.parse(lease.pool), address)
            back = Put(key, encode(decisions.found_in_use(claim, lease.mac, lease.vendor)))
            self._ledger.write("standby", {key: found.revision}, [back], deadline)
            return None
        pool = self._pool_to_keep(lease.pool, segment, address)
        if pool is None or self.is_restoring():
            self._ledger.write("standby", {key: found.revision}, [Delete(key)], deadline)
            return None
        claim = self._ledger.claim(pool, address)
        fresh = decisions.claim_ahead(None, claim)
        assert isinstance(fresh, Lease)
        self._stock.hold(claim.token, pool)
        try:
            settings = self._ledger.settings(segment)
            commit = self._ledger.grant(claim, fresh, found.revision, settings, deadline, purpose="standby")
        except BaseException:
            self._stock.let_go(claim.token)
            raise
        if not commit.applied:
            self._stock.let_go(claim.token)
            return None
        return Slot(pool, address, commit.revision, claim.token, looked=-math.inf)

    def _pool_to_keep(self, pool_id: str, segment: str, address: Address) -> Pool | None:
        """The pool for which an address can stay in standby."""
        try:
            pool = Pool.parse(pool_id)
        except Refused:
            return None
        fits = (
            self._view.uses(pool.id, self._host)
            and not self._stock.is_closing(pool.id)
            and self.asks_the_wire(pool)
            and pool.segment == segment
            and pool.candidates.contains(address)
            and not self._view.forbids(segment, address)
        )
        return pool if fits else None

    def end_probation(self, pool: Pool, address: Address, token: str, deadline: float) -> None:
        """Ask for the stranger of a conflict again. Silent, the address is free; else its probation begins anew."""
        look = self._neighbourhood.look(pool, address, deadline, thorough=True)
        claim = self._ledger.claim(pool, address)
        if look.verdict is Verdict.FREE:
            self._ledger.change(
                claim,
                functools.partial(decisions.end_conflict, token=token),
                deadline,
                why="silent after its probation",
            )
        elif look.verdict is Verdict.OURS and look.mac in self._view.host_macs():
            theirs = functools.partial(decisions.end_conflict, token=token)
            self._ledger.change(claim, theirs, deadline, why="it is a Docker host's by now")
        elif look.verdict is Verdict.STRANGER:
            again = decisions.found_in_use(claim, look.mac, self._vendor_of(look.mac))
            self._ledger.change(claim, functools.partial(decisions.renew_conflict, token=token, again=again), deadline)

    def end_own_address(self, pool: Pool, address: Address, token: str, deadline: float) -> None:
        """Ask for an address that this host had itself, and free it where it is silent."""
        if self._neighbourhood.look(pool, address, deadline, thorough=True).verdict is not Verdict.FREE:
            return

        def decide(lease: Lease | None, claim: Claim) -> Decision:
            carried = address in self._neighbourhood.carried(deadline)
            return decisions.end_own_address(lease, claim, token, carried)

        self._ledger.change(
            self._ledger.claim(pool, address),
            decide,
            deadline,
            why="no interface carries it any more, and it is silent",
        )
