"""Stand-ins for etcd with the interface of `ipam_plugin.etcd.Etcd`.

`FakeEtcd` keeps everything in memory, with etcd's revisions, TTL leases and watches, and can be told which
commit fails in which way. tests/test_etcd_contract.py holds it to what a real etcd does.

`CheckThenWriteEtcd` is a real client with the one mistake that this program is about: it checks, and then it
writes. A test of races that does not fail with it proves nothing.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ipam_plugin.errors import EtcdRefused, EtcdUnavailable, OutcomeUnknown
from ipam_plugin.etcd import Commit, Delete, Etcd, EtcdStatus, Event, Events, KeyValue, KeyValues, Position, Put


class Fault(enum.Enum):
    """What happens to one commit."""

    PASS = "it works"
    UNAVAILABLE = "EtcdUnavailable, nothing is written"
    APPLIED = "OutcomeUnknown, it is written"
    LOST = "OutcomeUnknown, it is never written"
    STUCK = "OutcomeUnknown, it is carried out when the test says so: FakeEtcd.release_stuck"


Writes = Sequence[Put | Delete]


@dataclass
class _Ttl:
    granted: int
    ends: float


@dataclass(frozen=True)
class Snapshot:
    """A backup of a FakeEtcd."""

    revision: int
    keys: Mapping[str, KeyValue]


@dataclass
class _Stuck:
    expect: Mapping[str, int]
    writes: Writes


class FakeEtcd:
    """etcd in memory. Faults of commits come from `faults` (one per commit, in order), then from `on_commit`.

    `down = True` makes every call raise EtcdUnavailable at once and watches stand still. The clock of TTL leases
    moves only by `advance`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._keys: dict[str, KeyValue] = {}
        self._revision = 1
        self._compacted = 0
        self._log: list[Event] = []
        self._ttls: dict[int, _Ttl] = {}
        self._last_ttl = 0x1000
        self._now = 0.0
        self._watches = 0
        self._generation = 0  # counts restored backups; a watch of an older one lists anew
        self.cluster_id = 0xFA4E
        self._known_generation = 0
        self.latest: Position | None = None
        self.epoch = 0
        self.on_went_back: Callable[[Position, Position, int], None] = lambda before, now, epoch: None
        self.faults: deque[Fault] = deque()
        self.on_commit: Callable[[Mapping[str, int], Writes], Fault] | None = None
        self.stuck: list[_Stuck] = []
        self.down = False
        self.transactions = 0
        self.closed = False

    # ---- what the test does to it

    def advance(self, seconds: float) -> None:
        """Move the clock of the TTL leases; the keys of those that end are deleted."""
        with self._changed:
            self._now += seconds
            for ttl, state in list(self._ttls.items()):
                if state.ends <= self._now:
                    self._end_ttl(ttl)

    def release_stuck(self) -> int:
        """Carry out every STUCK commit, in order, as etcd does: with its expectations checked now. How many wrote."""
        with self._changed:
            stuck, self.stuck = self.stuck, []
            return sum(self._transact(commit.expect, commit.writes)[0] for commit in stuck)

    def compact(self) -> None:
        """Forget all history; a watch that has not seen all of it has to list anew."""
        with self._changed:
            self._compacted = self._revision
            self._log.clear()

    def snapshot(self) -> Snapshot:
        with self._changed:
            return Snapshot(self._revision, dict(self._keys))

    def restore(self, backup: Snapshot, cluster_id: int | None = None) -> None:
        """Go back to a backup: the revision goes back, and the cluster is another one (unless given)."""
        with self._changed:
            self._keys, self._revision = dict(backup.keys), backup.revision
            self._log.clear()
            self._compacted = self._revision
            self._generation += 1
            self.cluster_id = self.cluster_id + 1 if cluster_id is None else cluster_id
            self._changed.notify_all()

    def set_down(self, down: bool) -> None:
        with self._changed:
            self.down = down
            self._changed.notify_all()

    # ---- the interface of Etcd

    @property
    def watch_connected(self) -> bool:
        return self._watches > 0 and not self.down

    def expect(self, position: Position) -> None:
        self.latest = position

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def get(self, key: str, *, deadline: float) -> KeyValue | None:
        with self._changed:
            self._ask(deadline)
            self._saw()
            return self._keys.get(key)

    def get_many(self, keys: Sequence[str], *, deadline: float) -> tuple[dict[str, KeyValue | None], int]:
        with self._changed:
            self._ask(deadline)
            self._saw()
            return {key: self._keys.get(key) for key in keys}, self._revision

    def list(self, prefix: str, *, deadline: float, keys_only: bool = False) -> tuple[KeyValues, int]:
        with self._changed:
            self._ask(deadline)
            self._saw()
            return self._listing(prefix, keys_only), self._revision

    def commit(self, expect: Mapping[str, int], writes: Writes, *, deadline: float, proof: str | None = None) -> Commit:
        with self._changed:
            self._ask(deadline)
            self.transactions += 1
            self._check(expect, writes, proof)
            fault = Fault.PASS
            if self.faults:
                fault = self.faults.popleft()
            elif self.on_commit is not None:
                fault = self.on_commit(expect, writes)
            if fault is Fault.UNAVAILABLE:
                raise EtcdUnavailable("etcd did not answer within 0 s (fake: unavailable)")
            if fault is Fault.STUCK:
                self.stuck.append(_Stuck(dict(expect), list(writes)))
            if fault is Fault.APPLIED:
                self._transact(expect, writes)
            if fault is not Fault.PASS:
                raise OutcomeUnknown("etcd did not confirm within 0 s, it may be written yet (fake: no answer)")
            applied, revision = self._transact(expect, writes)
            self._saw()
            if applied:
                return Commit(True, revision, {})
            found = {key: self._keys.get(key) for key in expect}
            if proof is not None:
                ours = next(w.value for w in writes if isinstance(w, Put) and w.key == proof)
                there = found[proof]
                if there is not None and there.value == ours:
                    return Commit(True, there.revision, {})
            return Commit(False, revision, found)

    def grant_ttl(self, seconds: int, *, deadline: float) -> int:
        with self._changed:
            self._ask(deadline)
            self._last_ttl += 1
            self._ttls[self._last_ttl] = _Ttl(seconds, self._now + seconds)
            return self._last_ttl

    def keep_alive(self, lease: int, *, deadline: float) -> int:
        with self._changed:
            self._ask(deadline)
            state = self._ttls.get(lease)
            if state is None:
                return 0
            state.ends = self._now + state.granted
            return state.granted

    def revoke(self, lease: int, *, deadline: float) -> None:
        with self._changed:
            self._ask(deadline)
            self._end_ttl(lease)

    def status(self, *, deadline: float) -> EtcdStatus:
        with self._changed:
            self._ask(deadline)
            return EtcdStatus("3.4.fake", self.cluster_id, self._revision, 4096, "fake:2379", True)

    def watch(
        self,
        prefix: str,
        on_reset: Callable[[KeyValues, int, int], None],
        on_events: Callable[[Events, int], None],
        stop: threading.Event,
    ) -> None:
        at: int | None = None
        generation = (-1, -1)
        with self._changed:
            self._watches += 1
        try:
            while not stop.is_set() and not self.closed:
                reset: KeyValues | None = None
                events: Events = []
                with self._changed:
                    if not self.down:
                        now = (self._generation, self.epoch)
                        if at is None or generation != now or at < self._compacted:
                            self._saw()
                            reset, at = self._listing(prefix), self._revision
                            generation = (self._generation, self.epoch)
                        else:
                            events = self._next_transaction(prefix, at)
                    if reset is None and not events:
                        self._changed.wait(0.05)  # `stop` does not notify
                        continue
                try:
                    if reset is not None:
                        assert at is not None
                        on_reset(reset, at, self.epoch)
                    else:
                        at = events[-1].revision
                        on_events(events, at)
                except Exception:
                    at = None
                    stop.wait(0.05)
        finally:
            with self._changed:
                self._watches -= 1

    # ---- etcd's inside

    def _ask(self, deadline: float) -> None:
        if self.closed:
            raise EtcdUnavailable("etcd did not answer within 0 s (this client was closed)")
        if self.down or deadline <= time.monotonic():
            raise EtcdUnavailable(f"etcd did not answer within 0 s (fake: {'down' if self.down else 'no time left'})")

    def _saw(self) -> None:
        """As the client does it that has a watch: also a backup that has come as far as what it took the place of."""
        now = Position(self.cluster_id, self._revision)
        before = self.latest
        known, self._known_generation = self._known_generation, self._generation
        if before is None or (known == self._generation and not now.is_behind(before)):
            self.latest = now
            return
        self.epoch += 1
        self.on_went_back(before, now, self.epoch)
        self.latest = now

    def _listing(self, prefix: str, keys_only: bool = False) -> KeyValues:
        found = sorted(
            (kv for key, kv in self._keys.items() if key.startswith(prefix)),
            key=lambda kv: kv.key.encode("utf-8", "surrogateescape"),
        )
        return [kv._replace(value=b"") for kv in found] if keys_only else found

    def _next_transaction(self, prefix: str, at: int) -> Events:
        """The events of the next transaction after revision `at` that touched the prefix."""
        events: Events = []
        for event in reversed(self._log):  # nearly always the newest few
            if event.revision <= at:
                break
            if event.key.startswith(prefix):
                events.append(event)
        events.reverse()
        return [event for event in events if event.revision == events[0].revision]

    def _check(self, expect: Mapping[str, int], writes: Writes, proof: str | None) -> None:
        keys = [write.key for write in writes]
        if proof is not None and not (proof in expect and any(isinstance(w, Put) and w.key == proof for w in writes)):
            raise AssertionError(f"proof {proof!r} must be both expected and put")
        puts = [write.key for write in writes if isinstance(write, Put)]
        if any(keys.count(key) > 1 for key in puts):
            raise EtcdRefused("etcd refused (fake): etcdserver: duplicate key given in txn request")
        if len(keys) > 128 or len(expect) > 128:
            raise EtcdRefused("etcd refused (fake): etcdserver: too many operations in txn request")

    def _transact(self, expect: Mapping[str, int], writes: Writes) -> tuple[bool, int]:
        for key, revision in expect.items():
            there = self._keys.get(key)
            if (there.revision if there else 0) != revision:
                return False, self._revision
        for write in writes:
            if isinstance(write, Put) and write.lease and write.lease not in self._ttls:
                raise EtcdRefused("etcd refused (fake): etcdserver: requested lease not found")
        self._apply(writes)
        return True, self._revision

    def _apply(self, writes: Writes) -> None:
        """All of it at one new revision; a transaction that changes nothing (deletes what is not there) has none."""
        revision = self._revision + 1
        for write in writes:
            if isinstance(write, Put):
                self._keys[write.key] = KeyValue(write.key, write.value, revision, write.lease)
                self._log.append(Event(write.key, write.value, revision))
            elif self._keys.pop(write.key, None) is not None:
                self._log.append(Event(write.key, None, revision))
            else:
                continue
            self._revision = revision
        self._changed.notify_all()

    def _end_ttl(self, ttl: int) -> None:
        if self._ttls.pop(ttl, None) is not None:
            self._apply([Delete(key) for key, kv in sorted(self._keys.items()) if kv.lease == ttl])


class CheckThenWriteEtcd(Etcd):
    """A real client whose `commit` reads and compares first, and then writes whatever happened in between."""

    #: Seconds between the check and the write, to make the race easier to lose.
    gap = 0.0

    def commit(self, expect: Mapping[str, int], writes: Writes, *, deadline: float, proof: str | None = None) -> Commit:
        found, revision = self.get_many(list(expect), deadline=deadline) if expect else ({}, 0)
        if any((kv.revision if kv else 0) != expect[key] for key, kv in found.items()):
            return Commit(False, revision, found)
        time.sleep(self.gap)
        return super().commit({}, writes, deadline=deadline)
