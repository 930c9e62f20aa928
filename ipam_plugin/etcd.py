"""etcd: compare-and-write transactions, reads and watches over a list of members, each with a deadline.

What etcd3 leaves open is decided here: the time limit of each try, going to the next member, logging in
again, telling "not written" from "perhaps written", and a watch that resumes. Of etcd3 only the messages
and the stubs are used.

Keys are str (bytes that are not UTF-8 pass through as surrogate escapes), values are bytes, deadlines are
absolute floats of time.monotonic(), revisions are etcd's. Every method may be called from any thread.

Nothing is opened before the first call, because gRPC does not survive os.fork(): a server that forks its
workers makes its first call in the worker.
"""

import collections
import enum
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import grpc

from ipam_plugin.errors import ConfigError, EtcdRefused, EtcdUnavailable, OutcomeUnknown
from ipam_plugin.etcd3_import import etcdrpc as pb

log = logging.getLogger(__name__)

PAGE = 16_384  # keys; each page costs etcd 3.4 a walk over all the keys that remain, so pages are large
_PAUSE = (0.05, 0.5)  # seconds between rounds over all members: the first, the longest
_WATCH_PAUSE = (0.1, 2.0)
_DELETE = 1  # mvccpb.Event.EventType, which etcd3 does not re-export
_KINDS = {  # of calls, for `on_answer`
    "txn": "read",
    "range": "read",
    "grant": "ttl",
    "keep_alive": "ttl",
    "revoke": "ttl",
    "status": "status",
}
_TICK = 0.2  # seconds; how soon a watch notices `stop`

_CHANNEL_OPTIONS = [
    # More than any transaction reads (128 values of 1.5 MiB at most); a list that has more is read in smaller pages.
    ("grpc.max_receive_message_length", 256 << 20),
    # A member that hangs is found in 6 + 2 s. Without http2.ping_timeout_ms (default 60 s) keepalive_timeout_ms
    # has no effect. etcd drops clients that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # gRPC shares connections between channels of one process; a connection that hangs must not come back.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Where etcd is and who we are. `timeout` is seconds per try, not per call.

    Endpoints: `host:port`, `http://host:port` or `https://host:port`; IPv6 in brackets. Without a scheme, TLS is
    used where a CA or a client certificate is given. Files are PEM. `password`: the word, or what reads it anew before
    each login (and may raise ConfigError). Raises ConfigError.
    """

    endpoints: tuple[str, ...]
    ca_cert: str | None = None
    cert: str | None = None
    key: str | None = None
    username: str | None = None
    password: str | Callable[[], str | None] | None = field(default=None, repr=False)
    timeout: float = 2.0

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ConfigError("etcd.endpoints: expected at least one, such as http://127.0.0.1:2379")
        for number, endpoint in enumerate(self.endpoints):
            _target(endpoint, f"etcd.endpoints[{number}]")
        if (self.cert is None) != (self.key is None):
            raise ConfigError("etcd.cert: a client certificate needs both etcd.cert and etcd.key")
        if (self.username is None) != (self.password is None):
            raise ConfigError("etcd.username: a login needs both etcd.username and etcd.password_file")
        if not self.timeout > 0:
            raise ConfigError("etcd.timeout: expected more than 0 seconds")


class KeyValue(NamedTuple):
    key: str
    value: bytes  # b"" where only keys were asked for
    revision: int  # of the last modification
    lease: int  # etcd's TTL lease it is bound to; 0: none


class Event(NamedTuple):
    key: str
    value: bytes | None  # None: deleted
    revision: int


class Put(NamedTuple):
    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    key: str


class Commit(NamedTuple):
    """What became of a transaction.

    `applied`: the writes are in etcd, also when an earlier try of the same call had written them. `revision`: of
    etcd's answer; when applied, the modification revision of what was written. `found`: when not applied, every
    key of `expect` as the transaction read it. `uncertain`: not applied by this answer, but an earlier try of
    this call may have been, and what is found may be its doing.
    """

    applied: bool
    revision: int
    found: Mapping[str, KeyValue | None]
    uncertain: bool = False


class EtcdStatus(NamedTuple):
    version: str
    cluster_id: int
    revision: int
    db_size: int  # bytes
    endpoint: str
    leader: bool  # this member leads


KeyValues: TypeAlias = list[KeyValue]
Events: TypeAlias = list[Event]


class _Reply(NamedTuple):
    message: Any
    uncertain: bool  # an earlier try of this write may have been carried out
    endpoint: str


class Position(NamedTuple):
    """A moment in the life of a cluster."""

    cluster_id: int
    revision: int

    def is_behind(self, other: "Position") -> bool:
        """Whether this cannot have come after the other one in one cluster's life."""
        return self.cluster_id != other.cluster_id or self.revision < other.revision


class _Place(NamedTuple):
    """Where a watch is: everything up to this moment has been handed on, `last` at the end (None: there was nothing).

    A cluster that went back, and has come further than this since, is known by what it says of `last`.
    """

    at: Position
    last: Event | None


class Fate(enum.Enum):
    """What an error says about the request that got it."""

    UNSENT = "not carried out; another try may be"
    LOGIN = "not carried out; it needs a fresh login"
    REFUSED = "not carried out, and no other try will be"
    UNKNOWN = "perhaps carried out, now or later"


# gRPC's own words for a call that never had a connection.
_NOT_CONNECTED = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "errors resolving ",
    "DNS resolution failed",
)
_LOGIN = ("invalid auth token", "revision of auth store is old", "user name is empty")
# Their answers name a revision that is as new as any answer before. Those of the others name what one member has got.
_LINEARIZABLE = frozenset({"txn", "range"})
# etcd's words for what it turned away before it became a proposal.
_NOT_PROPOSED = ("etcdserver: no leader", "etcdserver: not capable", "etcdserver: too many requests")
_DEFINITE = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


def fate(code: grpc.StatusCode, details: str) -> Fate:
    """Whether a request that failed so may have been carried out. Whatever is not known for certain is UNKNOWN.

    Only etcd's own sentences make an error definite: the same codes also come from gRPC (a reply that is too
    large) and from machines in between (a proxy's 404), and say nothing there about what etcd did.
    """
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_NOT_CONNECTED):
        return Fate.UNSENT
    if details.startswith("grpc: received message larger than max"):  # the server's words, not the client's
        return Fate.REFUSED
    if not details.startswith("etcdserver: "):
        return Fate.UNKNOWN
    if any(text in details for text in _LOGIN):
        return Fate.LOGIN
    if details.startswith(_NOT_PROPOSED):
        return Fate.UNSENT
    return Fate.REFUSED if code in _DEFINITE else Fate.UNKNOWN


class Etcd:
    """One etcd cluster. Opens nothing until the first call; `close` when done."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self._members = [_Member(endpoint, settings) for endpoint in settings.endpoints]
        self._current = 0  # index into _members; all threads use one member until it fails
        self._closed = False
        self._lock = threading.Lock()  # for the three counters and the next; never held across a call
        self._latest: Position | None = None  # the newest that was seen of etcd
        self._going_back = threading.Lock()  # for the next two
        self.epoch = 0  # how often etcd went back
        self.on_went_back: Callable[[Position, Position, int], None] = lambda before, now, epoch: None
        self._watches = 0
        self._watches_connected = 0
        self.transactions = 0  # transactions sent by `commit`, repeated tries included
        self.refused: collections.Counter[str] = collections.Counter()  # calls that etcd refused, by gRPC's code
        # Told of every answer: read, write, ttl or status, and the seconds since it was asked, all tries together.
        self.on_answer: Callable[[str, float], None] = lambda call, seconds: None

    @property
    def watch_connected(self) -> bool:
        """There is a watch, and every watch is connected."""
        return 0 < self._watches == self._watches_connected

    @property
    def latest(self) -> Position | None:
        """The newest moment of etcd that an answer has shown."""
        return self._latest

    def expect(self, position: Position) -> None:
        """What an earlier process has seen of this etcd: an older answer means that it went back."""
        self._latest = position

    def close(self) -> None:
        """End all calls and watches; what is in flight fails, and so does every later call."""
        self._closed = True
        for member in self._members:
            member.close()

    # ---- reads: linearizable; they raise EtcdUnavailable or EtcdRefused

    def get(self, key: str, *, deadline: float) -> KeyValue | None:
        """The key as it is now, None if it does not exist."""
        reply = self._call("range", pb.RangeRequest(key=_raw(key)), deadline).message
        return _key_value(reply.kvs[0]) if reply.kvs else None

    def get_many(self, keys: Sequence[str], *, deadline: float) -> tuple[dict[str, KeyValue | None], int]:
        """All these keys (at most 128, etcd's limit) at one revision, and that revision."""
        request = pb.TxnRequest(success=[_read(key) for key in keys])
        reply = self._call("txn", request, deadline).message
        return _found(keys, reply), reply.header.revision

    def list(self, prefix: str, *, deadline: float, keys_only: bool = False) -> tuple[KeyValues, int]:
        """All keys with this prefix in the order of their bytes, at one revision, and that revision."""
        found, position = self._list(prefix, deadline, keys_only)
        return found, position.revision

    def _list(
        self, prefix: str, deadline: float, keys_only: bool = False, stop: threading.Event | None = None
    ) -> tuple[KeyValues, Position]:
        start, end = _range(prefix)
        request = pb.RangeRequest(key=start, range_end=end, limit=PAGE, keys_only=keys_only)
        found: KeyValues = []
        while True:
            try:
                page = self._call("range", request, deadline, patient=True, stop=stop).message
            except _ReplyTooLarge:
                request.limit = max(1, request.limit // 16)
                continue
            except EtcdRefused as error:
                if not (request.revision and _code(error) is grpc.StatusCode.OUT_OF_RANGE):
                    raise
                # The revision of the first page was compacted while we read: begin again.
                request.key, request.revision = start, 0
                found.clear()
                continue
            request.revision = request.revision or page.header.revision
            found.extend(map(_key_value, page.kvs))
            if not page.more:
                return found, Position(page.header.cluster_id, request.revision)
            request.key = page.kvs[-1].key + b"\0"

    def status(self, *, deadline: float) -> EtcdStatus:
        """Of one member that answers, which it also does while the cluster has no leader."""
        reply, _, endpoint = self._call("status", pb.StatusRequest(), deadline)
        return EtcdStatus(
            version=reply.version,
            cluster_id=reply.header.cluster_id,
            revision=reply.header.revision,
            db_size=reply.dbSize,
            endpoint=endpoint,
            leader=reply.leader == reply.header.member_id,
        )

    # ---- writes

    def commit(
        self,
        expect: Mapping[str, int],
        writes: Sequence[Put | Delete],
        *,
        deadline: float,
        proof: str | None = None,
    ) -> Commit:
        """One transaction: if every key of `expect` is at that modification revision (0: does not exist), all
        `writes` happen, otherwise none.

        It is sent again, the very same, to one member after another until an answer is definite. Where that answer
        is "expectations unmet", an earlier try may be the reason; `proof` settles it: a key of both `expect` and
        `writes` whose new value is unique to this transaction (it carries a token). If that key holds exactly this
        value, the transaction was applied. Without `proof`, or when somebody changed that key since, the answer is
        `applied=False` with `uncertain=True`, and the caller decides.

        Raises EtcdUnavailable: nothing was written. OutcomeUnknown: the deadline passed (or etcd refused a
        repeated try), and an earlier try may be written, now or later. EtcdRefused: a definite error, nothing was
        written. A key may occur once in `writes`; at most 128 of each (etcd's limits).
        """
        request = pb.TxnRequest(
            compare=[
                pb.Compare(key=_raw(key), target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=revision)
                for key, revision in expect.items()
            ],
            success=[_write(write) for write in writes],
            failure=[_read(key) for key in expect],
        )
        reply, uncertain, _ = self._call("txn", request, deadline, write=True)
        if reply.succeeded:
            return Commit(True, reply.header.revision, {})
        found = _found(expect, reply)
        if proof is not None:
            ours = next(write.value for write in writes if isinstance(write, Put) and write.key == proof)
            there = found[proof]
            if there is not None and there.value == ours:
                return Commit(True, there.revision, {})
        return Commit(False, reply.header.revision, found, uncertain)

    def grant_ttl(self, seconds: int, *, deadline: float) -> int:
        """A new TTL lease of etcd (not one of ours), its id. One whose answer was lost ends by itself."""
        return int(self._call("grant", pb.LeaseGrantRequest(TTL=seconds), deadline).message.ID)

    def keep_alive(self, lease: int, *, deadline: float) -> int:
        """Renew a TTL lease: the seconds it lives from now, 0 if it is lost."""
        reply = self._call("keep_alive", pb.LeaseKeepAliveRequest(ID=lease), deadline).message
        return max(0, int(reply.TTL))

    def revoke(self, lease: int, *, deadline: float) -> None:
        """End a TTL lease and delete its keys; one that is gone already is fine."""
        try:
            self._call("revoke", pb.LeaseRevokeRequest(ID=lease), deadline)
        except EtcdRefused as error:
            if _code(error) is not grpc.StatusCode.NOT_FOUND:
                raise

    # ---- the one place that calls and repeats

    def _call(
        self,
        rpc: str,
        request: Any,
        deadline: float,
        *,
        write: bool = False,
        patient: bool = False,
        stop: threading.Event | None = None,
    ) -> _Reply:
        """The first definite reply. `patient`: each try gets longer than the last, for replies that take long
        to transfer. `stop` ends it as the deadline does.
        """
        start = time.monotonic()
        reasons: dict[str, str] = {}
        uncertain = logged_in_again = False
        tries = 0
        while True:
            position = self._current
            member = self._members[position]
            left = deadline - time.monotonic()
            if left <= 0 or self._closed or (stop is not None and stop.is_set()):
                raise self._gave_up(time.monotonic() - start, reasons, uncertain)
            tries += 1
            latest = self._latest
            timeout = min(self._settings.timeout * (tries if patient else 1), left)
            token, sent = None, False
            try:
                call, token = member.ready(rpc, timeout)
                if write:
                    sent = True
                    with self._lock:
                        self.transactions += 1
                if stop is None:
                    reply = call(request, timeout=timeout, metadata=_metadata(token))
                else:
                    reply = _interruptible(call, request, timeout, _metadata(token), stop)
                if rpc in _LINEARIZABLE:
                    self._saw(Position(reply.header.cluster_id, reply.header.revision), latest)
                self.on_answer("write" if write else _KINDS[rpc], time.monotonic() - start)
                return _Reply(reply, uncertain, member.endpoint)
            except grpc.RpcError as error:
                if patient and _is_too_large(error):
                    raise _ReplyTooLarge from error
                code, reason = error.code(), _sentence(error)
                outcome = fate(code, error.details() or "")
                if outcome is Fate.REFUSED or (outcome is Fate.LOGIN and self._settings.username is None):
                    self.refused[code.name.lower()] += 1
                    if uncertain:
                        raise OutcomeUnknown(f"etcd refused to repeat what may have been written: {reason}") from error
                    raise EtcdRefused(f"etcd refused ({member.endpoint}): {reason}") from error
                reasons[member.endpoint] = reason
                uncertain = uncertain or (sent and outcome is Fate.UNKNOWN)
                if outcome is Fate.LOGIN:
                    member.forget(token)
                    if not logged_in_again:
                        logged_in_again = True
                        continue
            except ValueError:
                if self._closed:  # gRPC's answer on a closed channel
                    continue
                raise
            self._leave(position)
            if tries % len(self._members) == 0:
                pause = _pause(_PAUSE, tries // len(self._members))
                pause = max(0.0, min(pause, deadline - time.monotonic()))
                time.sleep(pause) if stop is None else stop.wait(pause)

    def _saw(self, now: Position, latest: Position | None) -> None:
        """`latest`: the newest that was known when the question was sent. A linearizable answer is as new at least;
        where it is not, etcd is another one or was restored from a backup, and `on_went_back(before, now, epoch)` is
        told before anybody hears the answer.
        """
        if latest is not None and now.is_behind(latest):
            with self._going_back:  # whoever finds it too waits here until it was told
                before = self._latest or latest
                if now.is_behind(before):
                    self._tell_went_back(before, now)
        with self._lock:
            if self._latest is None or (
                now.cluster_id == self._latest.cluster_id and now.revision > self._latest.revision
            ):
                self._latest = now

    def _tell_went_back(self, before: Position, now: Position) -> None:
        """With `_going_back` taken. The new position counts only when all is told: until then everybody who is shown it
        waits for that too."""
        self.epoch += 1
        self.on_went_back(before, now, self.epoch)
        with self._lock:
            self._latest = now

    def _leave(self, position: int) -> None:
        """Use the next member, unless another thread has left this one already: a late failure is only its own."""
        if self._current == position:
            self._current = (position + 1) % len(self._members)
        self._members[position].reload()

    def _gave_up(self, waited: float, reasons: Mapping[str, str], uncertain: bool) -> Exception:
        why = "; ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items())
        why = why or ("this client was closed" if self._closed else "no time was left to ask")
        if uncertain:
            return OutcomeUnknown(f"etcd did not confirm within {round(waited, 1):g} s, it may be written yet ({why})")
        return EtcdUnavailable(f"etcd did not answer within {round(waited, 1):g} s ({why})")

    # ---- watch

    def watch(
        self,
        prefix: str,
        on_reset: Callable[[KeyValues, int, int], None],
        on_events: Callable[[Events, int], None],
        stop: threading.Event,
    ) -> None:
        """Follow a prefix until `stop`, in a thread of its own. Returns within a second of `stop`.

        `on_reset(everything, revision, epoch)` after each listing: at the start, when etcd has compacted what was
        missed, when the cluster is another one or its revision went back (restored from a backup; then `epoch` is
        another one), and after a callback raised. `on_events(events, revision)` in etcd's order, each event once; all
        of one transaction come together. It is also called with no events and a newer revision on etcd's own progress
        notification (about every 10 minutes). Both are called in this thread.
        """
        place: _Place | None = None
        epoch = self.epoch
        failures = 0
        with self._lock:
            self._watches += 1
        try:
            while not stop.is_set() and not self._closed:
                began = time.monotonic()
                try:
                    if place is None or epoch != self.epoch:
                        epoch = self.epoch
                        found, position = self._list(prefix, began + 60, stop=stop)
                        if epoch != self.epoch:
                            continue  # it went back while it was listed
                        on_reset(found, position.revision, epoch)
                        newest = max(found, key=lambda kv: kv.revision, default=None)
                        place = _Place(position, Event(newest.key, newest.value, newest.revision) if newest else None)
                        del found  # a stream may last for months, and this be the largest thing in memory
                    place, reason = self._follow(prefix, place, epoch, on_events, stop)
                except (EtcdUnavailable, EtcdRefused) as error:
                    reason = str(error)
                except Exception:
                    log.exception("watching %s failed; listing it again", prefix)
                    place, reason = None, "failed"
                failures = 1 if time.monotonic() - began > _WATCH_PAUSE[1] else failures + 1
                if not stop.is_set():
                    log.log(logging.WARNING if failures == 1 else logging.DEBUG, "watching %s: %s", prefix, reason)
                    stop.wait(_pause(_WATCH_PAUSE, failures))
        finally:
            with self._lock:
                self._watches -= 1

    def _follow(
        self,
        prefix: str,
        place: _Place,
        epoch: int,
        on_events: Callable[[Events, int], None],
        stop: threading.Event,
    ) -> tuple[_Place | None, str]:
        """One stream to the current member, until it ends: where we are (None: list anew), and why it ended.

        It begins with the event that came last, to see that this is still the same history.
        """
        at, expected = place.at, place.last
        position = self._current
        member = self._members[position]
        give_up = time.monotonic() + self._settings.timeout
        created, ended = threading.Event(), threading.Event()
        token: str | None = None
        stream: Any = None

        def requests() -> Iterator[Any]:
            # gRPC runs this in the thread it keeps for a stream's requests, so it can watch over the stream as well:
            # end it on `stop`, when the member does not confirm it, and when other calls have left the member or have
            # seen that etcd went back.
            start, end = _range(prefix)
            yield pb.WatchRequest(
                create_request=pb.WatchCreateRequest(
                    key=start,
                    range_end=end,
                    start_revision=place.last.revision if place.last else at.revision + 1,
                    progress_notify=True,
                )
            )
            while not ended.wait(_TICK):
                late = not created.is_set() and time.monotonic() > give_up
                left = self._current != position or self.epoch != epoch
                if stream is not None and (late or stop.is_set() or left):
                    stream.cancel()
                    return

        try:
            call, token = member.ready("watch", self._settings.timeout)
            # hasleader: a member that is cut off from the others ends the stream instead of falling silent.
            stream = call(requests(), metadata=(("hasleader", "true"), *(_metadata(token) or ())))
            for reply in stream:
                if reply.canceled:
                    if reply.compact_revision:
                        return None, "what it missed was compacted; listing it again"
                    # An expired token is reported as created, canceled and "permission denied" (etcd 3.4).
                    member.forget(token)
                    return place, reply.cancel_reason or "canceled by etcd"
                if reply.created:
                    if Position(reply.header.cluster_id, reply.header.revision).is_behind(at):
                        # Only a member that lags behind, or another etcd: a linearizable answer tells (see _saw).
                        self.get(prefix, deadline=time.monotonic() + 2 * self._settings.timeout)
                        return place, "it is behind what was heard already"
                    created.set()
                    with self._lock:
                        self._watches_connected += 1
                    continue
                # Every message carries whole revisions (fragments were not asked for); one without events is a
                # progress notification, and etcd sends those only to a watch that has got everything before.
                events = [_event(event) for event in reply.events]
                if expected is not None and events:
                    if expected not in events:
                        with self._going_back:
                            if epoch == self.epoch:
                                self._tell_went_back(at, Position(reply.header.cluster_id, reply.header.revision))
                        return None, "another history; listing it again"
                    expected = None
                    events = [event for event in events if event.revision > at.revision]
                    if not events:
                        continue
                revision = events[-1].revision if events else reply.header.revision
                on_events(events, revision)
                at = at._replace(revision=revision)
                place = _Place(at, events[-1] if events else place.last)
            return place, f"{member.endpoint} ended it"
        except grpc.RpcError as error:
            if _is_too_large(error):
                return None, "what it missed is too large for one message; listing it again"
            if fate(error.code(), error.details() or "") is Fate.LOGIN:
                member.forget(token)
            elif not stop.is_set():
                self._leave(position)
            return place, f"{member.endpoint}: {_sentence(error)}"
        finally:
            ended.set()
            if stream is not None:
                stream.cancel()
            if created.is_set():
                with self._lock:
                    self._watches_connected -= 1


class _Member:
    """One endpoint: its channel, opened at the first call, and the token of our login there."""

    def __init__(self, endpoint: str, settings: EtcdSettings) -> None:
        self.endpoint = endpoint
        self._settings = settings
        scheme, self._target = _target(endpoint, "etcd.endpoints")
        self._secure = scheme == "https" or (not scheme and bool(settings.ca_cert or settings.cert))
        self._pems = self._read_pems()
        self._lock = threading.Lock()  # opening the channel
        self._login = threading.Lock()
        self._process = 0
        self._channel: Any = None
        self._calls: dict[str, Callable[..., Any]] = {}
        self._token: str | None = None  # "": etcd has authentication turned off

    def ready(self, rpc: str, timeout: float) -> tuple[Callable[..., Any], str | None]:
        """The call, and the token that goes with it. Raises grpc.RpcError when the login fails."""
        call = self._calls.get(rpc) or self._open()[rpc]
        if self._process != os.getpid():
            raise RuntimeError("this etcd client was opened before os.fork(): open it in the child")
        if self._settings.username is not None and self._token is None:
            self._log_in(timeout)
        return call, self._token

    def forget(self, token: str | None) -> None:
        """This token is no good: log in before the next call, unless another thread has done so already."""
        with self._lock:
            if self._token == token:
                self._token = None

    def reload(self) -> None:
        """After a failure: connect anew if the certificate files have been renewed since the channel was opened."""
        if self._secure:
            try:
                pems = self._read_pems()
            except ConfigError as error:
                log.warning("%s", error)
                return
            with self._lock:
                if pems != self._pems:
                    self._pems, self._calls = pems, {}

    def close(self) -> None:
        with self._lock:
            if self._channel is not None and self._process == os.getpid():
                self._channel.close()

    def _open(self) -> dict[str, Callable[..., Any]]:
        with self._lock:
            if self._calls:
                return self._calls
            # Also the time limit of a connection attempt. Shorter than that of a call, so that a call to a machine
            # that is off fails as not connected, hence unsent, and not as unanswered.
            connect = ("grpc.min_reconnect_backoff_ms", int(750 * self._settings.timeout))
            options = [*_CHANNEL_OPTIONS, connect]
            if self._secure:
                ca, certificate, key = self._pems
                credentials = grpc.ssl_channel_credentials(ca, key, certificate)
                channel = grpc.secure_channel(self._target, credentials, options=options)
            else:
                channel = grpc.insecure_channel(self._target, options=options)
            kv, lease = pb.KVStub(channel), pb.LeaseStub(channel)

            def keep_alive(request: Any, timeout: float, metadata: Any) -> Any:
                stream = lease.LeaseKeepAlive(iter((request,)), timeout=timeout, metadata=metadata)
                return next(stream, pb.LeaseKeepAliveResponse(TTL=0))

            self._process, self._channel = os.getpid(), channel
            self._calls = {
                "txn": kv.Txn,
                "range": kv.Range,
                "grant": lease.LeaseGrant,
                "revoke": lease.LeaseRevoke,
                "keep_alive": keep_alive,
                "watch": pb.WatchStub(channel).Watch,
                "status": pb.MaintenanceStub(channel).Status,
                "login": pb.AuthStub(channel).Authenticate,
            }
            return self._calls

    def _log_in(self, timeout: float) -> None:
        # One login for all threads: each costs etcd 0.1 s of CPU (bcrypt).
        if not self._login.acquire(timeout=timeout):
            raise _NoLogin("no login within the time limit")
        try:
            if self._token is None:
                told = self._settings.password
                try:
                    password = told() if callable(told) else told
                except ConfigError as error:
                    raise _NoLogin(str(error)) from error
                request = pb.AuthenticateRequest(name=self._settings.username, password=password)
                try:
                    self._token = self._calls["login"](request, timeout=timeout).token
                except grpc.RpcError as error:
                    if "authentication is not enabled" not in (error.details() or ""):
                        raise
                    self._token = ""
        finally:
            self._login.release()

    def _read_pems(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        if not self._secure:
            return None, None, None
        return (
            _pem("etcd.ca_cert", self._settings.ca_cert),
            _pem("etcd.cert", self._settings.cert),
            _pem("etcd.key", self._settings.key),
        )


class _ReplyTooLarge(Exception):
    """A page of a list is larger than this client takes in at once."""


class _NoLogin(grpc.RpcError):  # type: ignore[misc]
    """There is no login to this member yet, for the reason given; nothing was sent."""

    def code(self) -> Any:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return str(self)


def _target(endpoint: str, path: str) -> tuple[str, str]:
    """(scheme or "", host:port) of an endpoint. Raises ConfigError, which starts with `path`."""
    if "@" in endpoint:  # not shown: it holds a password
        raise ConfigError(f"{path}: a user and password do not belong here, see etcd.username and etcd.password_file")
    try:
        url = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        host, port = url.hostname, url.port
    except ValueError:
        url, host, port = urlsplit(""), None, None
    if not host or not port or url.scheme not in ("", "http", "https") or url.path.strip("/") or url.query:
        raise ConfigError(f"{path}: expected host:port, http://host:port or https://host:port, not {endpoint!r}")
    return url.scheme, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _pem(path: str, file: str | None) -> bytes | None:
    if file is None:
        return None
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read {file}: {error.strerror}") from error


def _metadata(token: str | None) -> tuple[tuple[str, str], ...] | None:
    # As metadata and not as gRPC call credentials, which gRPC refuses to send over plaintext.
    return (("token", token),) if token else None


def _interruptible(call: Any, request: Any, timeout: float, metadata: Any, stop: threading.Event) -> Any:
    """A unary call that ends soon after `stop` with EtcdUnavailable."""
    running = call.future(request, timeout=timeout, metadata=metadata)
    while True:
        try:
            return running.result(timeout=_TICK)
        except grpc.FutureTimeoutError:
            if stop.is_set():
                running.cancel()
                raise EtcdUnavailable("stopped before etcd answered") from None


def _pause(limits: tuple[float, float], failures: int) -> float:
    """Seconds to wait after so many failures (from 1), doubled each time up to a limit, with jitter."""
    first, longest = limits
    return float(min(longest, first * 2 ** min(failures - 1, 10))) * random.uniform(0.5, 1)


def _is_too_large(error: Any) -> bool:
    """Whether this client refused a message. (etcd says of a request `grpc: received message larger than max`.)"""
    large = "Received message larger than max" in (error.details() or "")
    return large and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def _code(error: EtcdRefused) -> Any:
    return error.__cause__.code() if isinstance(error.__cause__, grpc.RpcError) else None


def _sentence(error: Any) -> str:
    """The reason of a gRPC error in one short line."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    text = (error.details() or error.code().name).rpartition("last error: ")[2]
    text = re.sub(r"^[A-Z_]+: (ipv[46]:\S+: )?(Failed to connect to remote host: )?", "", text)
    return " ".join(text.split())[:200]


def _raw(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _range(prefix: str) -> tuple[bytes, bytes]:
    """First key and end of the range of all keys with this prefix, as etcd wants them."""
    start = _raw(prefix)
    stem = start.rstrip(b"\xff")
    return start or b"\0", stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"


def _read(key: str) -> Any:
    return pb.RequestOp(request_range=pb.RangeRequest(key=_raw(key)))


def _write(write: Put | Delete) -> Any:
    if isinstance(write, Put):
        put = pb.PutRequest(key=_raw(write.key), value=write.value, lease=write.lease)
        return pb.RequestOp(request_put=put)
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=_raw(write.key)))


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(kv.key.decode("utf-8", "surrogateescape"), kv.value, kv.mod_revision, kv.lease)


def _event(event: Any) -> Event:
    kv = event.kv
    value = None if event.type == _DELETE else kv.value
    return Event(kv.key.decode("utf-8", "surrogateescape"), value, kv.mod_revision)


def _found(keys: Iterable[str], reply: Any) -> dict[str, KeyValue | None]:
    """What `_read` of each key gave, in the same order."""
    ranges = (response.response_range.kvs for response in reply.responses)
    return {key: _key_value(kvs[0]) if kvs else None for key, kvs in zip(keys, ranges, strict=True)}
