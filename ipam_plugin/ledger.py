"""The ledger: leases written to etcd, each by one transaction that compares what was read.

Promise P1 lives here: a lease is written only where the key of the address, and the settings of its segment, are
still what they were when it was decided (decisions.py); where they are not, the decision is made again. So does P4:
a write whose outcome is unknown is never taken for one that did not happen. register.py carries out Docker's
requests with it, claims.py keeps addresses in standby with it.
"""

from __future__ import annotations

import collections
import datetime
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ipam_plugin import decisions
from ipam_plugin.addresses import Address
from ipam_plugin.decisions import FREE, KEEP, Claim, Decision
from ipam_plugin.errors import EtcdRestored, EtcdUnavailable, IpamError, OutcomeUnknown, PoolExhausted, Refused
from ipam_plugin.etcd import Commit, Delete, KeyValue, Put
from ipam_plugin.model import (
    ENDPOINT,
    HELD,
    Keys,
    Lease,
    Pool,
    encode,
    read_lease,
    remembered,
    rewritten,
    rfc3339,
)
from ipam_plugin.view import Entry, Full, Settings, View

log = logging.getLogger(__name__)

# What leases are written for that give nothing to anybody: their holder has the address, whatever etcd says.
WRITTEN_AGAIN = frozenset({"own", "restore", "name", "settle"})
READ_AT_ONCE = 100  # keys in one question; etcd takes 128


class Transactions(Protocol):
    """What the ledger needs of etcd. etcd.Etcd has it, and so has the fake of the tests."""

    def get_many(self, keys: Sequence[str], *, deadline: float) -> tuple[Mapping[str, KeyValue | None], int]: ...

    def commit(
        self, expect: Mapping[str, int], writes: Sequence[Put | Delete], *, deadline: float, proof: str | None = None
    ) -> Commit: ...
    def grant_ttl(self, seconds: int, *, deadline: float) -> int: ...


class _Abandoned(NamedTuple):
    """A lease that may appear in etcd though its grant was refused, or though it was freed."""

    claim: Claim
    end: float  # when it can be forgotten, monotonic seconds


class Ended(NamedTuple):
    """A lease that ends, and the history of its address as it was read."""

    lease: Lease
    past: KeyValue | None
    why: str
    retired: bool = False  # its host is gone


class Granted(NamedTuple):
    """A lease that was written, and where."""

    claim: Claim
    lease: Lease
    revision: int


class Ledger:
    """Writes the leases of one host. Deadlines are absolute, in seconds of time.monotonic().

    Every method may be called from any thread and raises the errors of errors.py, of which any that may have written
    is OutcomeUnknown.
    """

    def __init__(self, etcd: Transactions, view: View, keys: Keys, host: str) -> None:
        self._etcd = etcd
        self._view = view
        self._keys = keys
        self._host = host
        self._abandoned: dict[str, _Abandoned] = {}  # by token
        self._barrier = threading.Lock()  # for the next two
        self._barrier_began = 0.0  # monotonic seconds
        self._barrier_revision = 0
        self._orphans: queue.SimpleQueue[tuple[str, Entry] | None] = queue.SimpleQueue()
        self.transactions: collections.Counter[str] = collections.Counter()  # by what they were for
        self.lost_races = 0
        self.may_give: Callable[[], None] = lambda: None  # raises EtcdRestored while nothing is given
        view.on_lease = self._saw_lease

    # ------------------------------------------------------------------------------------- one lease

    def claim(self, pool: Pool, address: Address) -> Claim:
        return Claim(self._host, pool, address, timestamp(), secrets.token_urlsafe(12))

    def change(
        self,
        claim: Claim,
        decide: Callable[[Lease | None, Claim], Decision],
        deadline: float,
        why: str = "",
        unchanged: Mapping[str, int] | None = None,
        *,
        purpose: str = "grant",
        abandon: bool = True,
    ) -> bool:
        """Read the lease, decide, write; again when the transaction found another one. `abandon` as in `grant`.

        False, and nothing was written, when a key of `unchanged` had another revision.
        """
        key = self._keys.lease(claim.pool.segment, claim.address)
        past_key = self._keys.past(claim.pool.segment, claim.address)
        unchanged = unchanged or {}
        found, _ = self._etcd.get_many([key, past_key], deadline=deadline)
        while True:
            settings = self._view.settings(claim.pool.segment)
            current = found[key]
            lease = read_lease(current.value) if current else None
            decision = decide(lease, claim)
            if decision is KEEP:
                return True
            if decision is FREE:
                assert current is not None
                assert lease is not None
                place = (claim.pool.segment, claim.address)
                commit = self.free(place, current, lease, found.get(past_key), why, unchanged, deadline)
                if commit.applied or commit.found[key] is None:
                    self._expect_stuck_grant(claim, lease)
                    return True
            elif isinstance(decision, Lease) and decision.kind == HELD:
                assert current is not None
                assert lease is not None
                commit = self._hold(claim, current, lease, decision, found.get(past_key), unchanged, deadline)
                if commit.applied:
                    self._expect_stuck_grant(claim, lease)
                    return True
            else:
                assert isinstance(decision, Lease)
                revision = current.revision if current else 0
                ended = ended_by(lease, decision, found.get(past_key), why)
                # The same grant, changed by a newer program too, perhaps; a new one begins anew.
                before = current.value if current and lease and lease.token == decision.token else b""
                commit = self.grant(
                    claim,
                    decision,
                    revision,
                    settings,
                    deadline,
                    unchanged,
                    purpose,
                    abandon=abandon,
                    ended=ended,
                    before=before,
                )
                if commit.applied:
                    return True
            for each, expected in unchanged.items():
                there = commit.found[each]
                if (there.revision if there else 0) != expected:
                    return False
            found = {past_key: found.get(past_key), **commit.found}
            claim = self.claim(claim.pool, claim.address)  # the token of this try may have been abandoned

    def settings(self, segment: str) -> Settings:
        """The segment's settings, taken before anything is decided with them: a grant compares their revision."""
        settings = self._view.settings(segment)
        if settings.error:
            raise Refused(
                f"the settings of segment {segment} cannot be read, so nothing is given out in it: mend the etcd key"
                f" {self._keys.segment(segment)} ({settings.error})"
            )
        return settings

    def remembering(self, place: tuple[str, Address], ended: Ended | None) -> tuple[dict[str, int], list[Put]]:
        """What a transaction that ends a lease compares and writes besides, so that its history says so.

        `place` is the segment and address. In the transaction it comes first: the view then knows that the address
        rests before it sees it free.
        """
        if ended is None:
            return {}, []
        key, past = self._keys.past(*place), ended.past
        now = datetime.datetime.now(datetime.UTC)
        history = remembered(past.value if past else None, ended.lease, ended.why, now, ended.retired)
        if history is None:
            return {}, []  # what stands there cannot be read, and stays
        return {key: past.revision if past else 0}, [Put(key, history)]

    def grant(
        self,
        claim: Claim,
        lease: Lease,
        revision: int,
        settings: Settings,
        deadline: float,
        unchanged: Mapping[str, int] | None = None,
        purpose: str = "grant",
        abandon: bool = True,
        ended: Ended | None = None,
        before: bytes = b"",
    ) -> Commit:
        """One transaction: the lease as it was read, and the segment's settings as they were read.

        `abandon`: where its outcome is not known nobody has it, so it goes when it appears. `ended`: who had the
        address until now, and stands in its history from now on. `before`: the value of this very lease that is
        changed, of which what this version does not know is kept. Raises EtcdRestored while nothing is given: what is
        only written again, because somebody has it (WRITTEN_AGAIN), always may be.
        """
        key = self._keys.lease(claim.pool.segment, claim.address)
        compared, history = self.remembering((claim.pool.segment, claim.address), ended)
        expect = {
            key: revision,
            self._keys.segment(claim.pool.segment): settings.revision,
            self._keys.restored: self._view.restored()[0],
            **compared,
            **(unchanged or {}),
        }
        gives = purpose not in WRITTEN_AGAIN
        if gives:
            self.may_give()  # as of that revision of `restored`, or a later one
        # An orphan is what was granted for a request and is not there anyway: not one holder more or less in a
        # lease that others share, and never the lease of an address that an interface of this host carries.
        # (That one names the interface; to ask the kernel here could fail, and hide that the outcome is unknown.)
        may_be_orphan = lease.token == claim.token and (
            lease.kind == ENDPOINT or bool(lease.holders and not lease.interface)
        )
        try:
            commit = self.write(purpose, expect, [*history, Put(key, rewritten(lease, before))], deadline, proof=key)
        except OutcomeUnknown:
            if may_be_orphan and abandon:
                self.abandon(key, claim)
            raise
        if gives and commit.applied:
            try:
                self.may_give()
            except EtcdRestored:
                # This very answer may have shown that etcd was restored, and does not know yet who has the address.
                if may_be_orphan:
                    self.abandon(key, claim)
                raise
        there = commit.found.get(key)
        if not commit.applied and there and lease.token == claim.token == read_lease(there.value).token:
            # An earlier try was applied, and somebody has changed the lease since (filled in a name): it is ours.
            return commit._replace(applied=True, revision=there.revision)
        if commit.uncertain and may_be_orphan:
            # Not ours now, but an earlier try may be written yet, should the address become free.
            self.abandon(key, claim)
        return commit

    def free(
        self,
        place: tuple[str, Address],
        current: KeyValue,
        lease: Lease,
        past: KeyValue | None,
        why: str,
        unchanged: Mapping[str, int],
        deadline: float,
        also: Sequence[Put] = (),
        retired: bool = False,
    ) -> Commit:
        """Delete the lease at the revision that was read, and remember its holder, in one transaction.

        `place` is its segment and address, `past` its history as it was read; `also` is written with it. `retired`:
        its host is gone.
        """
        return self._end(place, current, lease, [Delete(current.key), *also], past, why, unchanged, deadline, retired)

    def _hold(
        self,
        claim: Claim,
        current: KeyValue,
        lease: Lease,
        held: Lease,
        past: KeyValue | None,
        unchanged: Mapping[str, int],
        deadline: float,
    ) -> Commit:
        """Its container stopped, so the history has it: the address is silent from now on, and its MAC is known."""
        place, why = (claim.pool.segment, claim.address), f"stopped, held until {held.until}"
        return self._end(place, current, lease, [Put(current.key, encode(held))], past, why, unchanged, deadline)

    def _expect_stuck_grant(self, claim: Claim, ended: Lease) -> None:
        """A try of its grant that got stuck may come through yet, as soon as the key is free."""
        if ended.kind == ENDPOINT and ended.token:
            claim = claim._replace(token=ended.token)
            self._abandoned[ended.token] = _Abandoned(claim, _in_an_hour())

    def _end(
        self,
        place: tuple[str, Address],
        current: KeyValue,
        lease: Lease,
        writes: Sequence[Put | Delete],
        past: KeyValue | None,
        why: str,
        unchanged: Mapping[str, int],
        deadline: float,
        retired: bool = False,
    ) -> Commit:
        compared, history = self.remembering(place, Ended(lease, past, why, retired))
        return self.write(
            "free",
            {current.key: current.revision, **compared, **unchanged},
            [*history, *writes],
            deadline,
            proof=current.key if isinstance(writes[0], Put) else None,
        )

    def write(
        self,
        purpose: str,
        expect: Mapping[str, int],
        writes: Sequence[Put | Delete],
        deadline: float,
        proof: str | None = None,
    ) -> Commit:
        """The one place that writes. The view learns what was written or found."""
        self.transactions[purpose] += 1
        commit = self._etcd.commit(expect, writes, deadline=deadline, proof=proof)
        if commit.applied:
            for write in writes:
                self._view.learn(write.key, write.value if isinstance(write, Put) else None, commit.revision)
        else:
            for key, found in commit.found.items():
                self._view.learn(key, found.value if found else None, found.revision if found else commit.revision)
        return commit

    def write_for(self, seconds: int, key: str, value: bytes, deadline: float) -> int:
        """A key that vanishes by itself: never one that says an address is taken (design section 4). Its revision."""
        lease = self._etcd.grant_ttl(seconds, deadline=deadline)
        return self._etcd.commit({}, [Put(key, value, lease)], deadline=deadline).revision

    def read_many(self, keys: Sequence[str], deadline: float) -> dict[str, KeyValue | None]:
        """However many they are; each READ_AT_ONCE of them as they were at one moment."""
        found: dict[str, KeyValue | None] = {}
        for first in range(0, len(keys), READ_AT_ONCE):
            found.update(self._etcd.get_many(keys[first : first + READ_AT_ONCE], deadline=deadline)[0])
        return found

    def read(self, key: str, deadline: float) -> KeyValue | None:
        found, _ = self._etcd.get_many([key], deadline=deadline)
        return found[key]

    # ---------------------------------------------------------------------------- the next free address

    def grant_next(
        self, pool: Pool, lease_of: Callable[[Claim], Lease], deadline: float, purpose: str = "grant"
    ) -> Granted:
        """A lease, as `lease_of` words it, for the next free address of the pool.

        Raises PoolExhausted once the view is known to have missed nothing.
        """
        caught_up = False
        while True:
            settings = self.settings(pool.segment)
            with self._view.candidate(pool) as address:
                if not isinstance(address, Full):
                    claim = self.claim(pool, address)
                    lease = lease_of(claim)
                    commit = self.grant(claim, lease, 0, settings, deadline, purpose=purpose)
                    if commit.applied:
                        return Granted(claim, lease, commit.revision)
                    self.lost_races += 1
                    self._view.lost_race(pool)
                    continue
            if address.pending:
                # Other requests of this daemon are trying the last addresses; one of them may leave one.
                if time.monotonic() >= deadline:
                    raise EtcdUnavailable(f"pool {pool}: the last free addresses were not settled in time")
                self._view.wait_for_change(deadline)
            elif not caught_up:
                self._catch_up(pool, deadline)
                caught_up = True
            else:
                raise PoolExhausted(f"pool {pool} is full: {address.counts}")

    def _catch_up(self, pool: Pool, deadline: float) -> None:
        """Until the view has all that was written before now.

        The barrier is a write of our own under the watched prefix: its event comes after all earlier ones. (A
        progress notification that is asked for can overtake events, etcd#15220.)
        """
        since = time.monotonic()
        late = EtcdUnavailable(f"pool {pool}: what etcd last wrote did not arrive in time; try again")
        # One barrier serves all who asked before it began: with one each, they would undo one another's.
        if not self._barrier.acquire(timeout=max(0.0, deadline - since)):
            raise late
        try:
            if self._barrier_began < since:
                began = time.monotonic()
                self._barrier_revision = self._write_barrier(pool, deadline)
                self._barrier_began = began
            revision = self._barrier_revision
        finally:
            self._barrier.release()
        if not self._view.wait_for(revision, deadline):
            raise late

    def _write_barrier(self, pool: Pool, deadline: float) -> int:
        """What stands in the pool's key, written once more."""
        key = self._keys.pool(pool, self._host)
        while True:
            found = self.read(key, deadline)
            if found is None:
                raise EtcdUnavailable(f"pool {pool}: its key in etcd has just been deleted; try again")
            commit = self.write("barrier", {key: found.revision}, [Put(key, found.value)], deadline)
            if commit.applied:
                return commit.revision

    # ------------------------------------------------------------------ grants whose outcome is not known

    def is_abandoned(self, token: str) -> bool:
        """Whether the lease with this token was never handed out, or freed: only etcd may not know it yet."""
        return token in self._abandoned

    def abandon(self, key: str, claim: Claim) -> None:
        """A lease that nobody has, and that is in etcd or may appear there yet: it goes when it is seen (P4)."""
        self._abandoned[claim.token] = _Abandoned(claim, _in_an_hour())
        log.warning("%s may stand in etcd though nobody has it; it is taken back as soon as that can be done", key)
        self._orphans.put((key, Entry("", self._host, claim.token, 0)))

    def forget_abandoned(self) -> None:
        """etcd went back: nothing of before can appear there any more, and what stands there again is not abandoned."""
        self._abandoned.clear()

    def _saw_lease(self, key: str, entry: Entry) -> None:
        if entry.token in self._abandoned:
            self._orphans.put((key, entry))

    def free_orphans(self, stop: threading.Event) -> None:
        """For a thread of its own: delete the leases of abandoned tokens, as long as it takes."""
        waiting: list[tuple[str, Entry]] = []
        while not stop.is_set():
            try:
                item = self._orphans.get(timeout=2.0 if waiting else 60.0)
                if item is None:
                    return
                waiting.append(item)
            except queue.Empty:
                now = time.monotonic()
                # A copy, because requests add to it meanwhile.
                for token in [token for token, each in list(self._abandoned.items()) if each.end < now]:
                    del self._abandoned[token]
            waiting = [each for each in waiting if not self._free_orphan(*each)]

    def stop_freeing_orphans(self) -> None:
        self._orphans.put(None)

    def _free_orphan(self, key: str, entry: Entry) -> bool:
        """Whether nothing is left to do for now."""
        abandoned = self._abandoned.get(entry.token)
        if abandoned is None:
            return True
        try:
            found = self.read(key, time.monotonic() + 5)
            lease = read_lease(found.value) if found else None
            if found is None or lease is None or lease.token != entry.token:
                return True
            rest = decisions.without_orphan(lease, abandoned.claim)
            write = (
                Delete(key)
                if rest is FREE
                else Put(key, rewritten(rest, found.value))
                if isinstance(rest, Lease)
                else None
            )
            if write and not self.write("orphan", {key: found.revision}, [write], time.monotonic() + 5).applied:
                return False
            if rest is not FREE:
                # Others have joined it and keep its token, which is no orphan's from now on.
                self._abandoned.pop(entry.token, None)
        except IpamError as error:
            log.info("the abandoned lease %s is not taken back yet: %s", key, error)
            return False
        log.warning("the abandoned lease %s was taken back", key)
        return True


def _in_an_hour() -> float:
    """Much longer than a paused etcd leader holds a transaction: ten seconds were seen."""
    return time.monotonic() + 3600


def ended_by(before: Lease | None, after: Lease | None, past: KeyValue | None, why: str = "") -> Ended | None:
    """What has to be remembered when `after` takes the place of `before`; None: nobody had the address.

    `past` is its history as it was read; `why` where `after` does not say it.
    """
    if before is None or not decisions.ends(before, after):
        return None
    return Ended(before, past, why or (decisions.why_ended(after) if after is not None else ""))


def timestamp() -> str:
    """This moment as it stands in etcd."""
    return rfc3339(datetime.datetime.now(datetime.UTC))
