"""What the rest of the program relies on of etcd, held against a real etcd and against tests/fakes.py alike."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import ipam_plugin.etcd
from conftest import RealEtcd
from etcd_server import until
from fakes import CheckThenWriteEtcd, FakeEtcd, Fault
from ipam_plugin.errors import ConfigError, EtcdRefused, EtcdUnavailable, OutcomeUnknown
from ipam_plugin.etcd import Delete, Etcd, EtcdSettings, Event, KeyValue, Put


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


class Subject:
    """The etcd under test; `prefix` is this test's own."""

    def __init__(self, client: Any, prefix: str, let_time_pass: Callable[[float], None]) -> None:
        self.client = client
        self.prefix = prefix
        self.let_time_pass = let_time_pass

    def key(self, name: str) -> str:
        return self.prefix + name

    def put(self, name: str, value: bytes) -> int:
        return self.client.commit({}, [Put(self.key(name), value)], deadline=soon()).revision

    def value(self, name: str) -> bytes | None:
        found = self.client.get(self.key(name), deadline=soon())
        return found.value if found else None


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.etcd)])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "fake":
        fake = FakeEtcd()
        yield Subject(fake, "/test/", fake.advance)
        fake.close()
    else:
        etcd: RealEtcd = request.getfixturevalue("etcd")
        yield Subject(etcd.client, etcd.prefix, time.sleep)


class Mirror:
    """Follows a prefix in a thread and keeps everything that it was told."""

    def __init__(self, client: Any, prefix: str) -> None:
        self.resets: list[tuple[list[KeyValue], int]] = []
        self.epochs: list[int] = []
        self.batches: list[tuple[list[Event], int]] = []
        self.keys: dict[str, bytes] = {}
        self.revision = 0
        self.fail_once = False
        self.stop = threading.Event()
        self._thread = threading.Thread(
            target=client.watch, args=(prefix, self._reset, self._events, self.stop), daemon=True
        )
        self._thread.start()

    def _reset(self, found: list[KeyValue], revision: int, epoch: int) -> None:
        self.epochs.append(epoch)
        self.resets.append((found, revision))
        self.keys = {kv.key: kv.value for kv in found}
        self.revision = revision

    def _events(self, events: list[Event], revision: int) -> None:
        if self.fail_once:
            self.fail_once = False
            raise RuntimeError("a mistake in the callback, made by the test")
        assert revision > self.revision
        self.revision = revision
        self.batches.append((events, revision))
        for event in events:
            if event.value is None:
                del self.keys[event.key]
            else:
                self.keys[event.key] = event.value

    def close(self) -> float:
        """Stop it; the seconds this took."""
        began = time.monotonic()
        self.stop.set()
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()
        return time.monotonic() - began


@pytest.fixture
def mirror(subject: Subject) -> Iterator[Mirror]:
    """A watch that has its first listing and is connected."""
    with contextlib.closing(Mirror(subject.client, subject.prefix)) as mirror:
        until(lambda: mirror.resets and subject.client.watch_connected, "the watch is connected")
        yield mirror


# ---- transactions


def test_a_key_is_created_once(subject: Subject) -> None:
    """P1 rests on this: of two creates one is applied, and the other is told what is there."""
    key = subject.key("a")
    first = subject.client.commit({key: 0}, [Put(key, b"first")], deadline=soon())
    second = subject.client.commit({key: 0}, [Put(key, b"second")], deadline=soon())
    assert (first.applied, first.uncertain, dict(first.found)) == (True, False, {})
    assert (second.applied, second.uncertain) == (False, False)
    assert dict(second.found) == {key: KeyValue(key, b"first", first.revision, 0)}
    assert second.revision == first.revision


def test_a_key_that_changed_since_it_was_read_is_left_alone(subject: Subject) -> None:
    """P3: a write that expects a revision fails after any other write, also one of the same value."""
    key = subject.key("a")
    old = subject.put("a", b"same")
    new = subject.put("a", b"same")
    assert not subject.client.commit({key: old}, [Delete(key)], deadline=soon()).applied
    assert subject.value("a") == b"same"
    assert subject.client.commit({key: new}, [Delete(key)], deadline=soon()).applied
    assert subject.value("a") is None


def test_a_transaction_is_all_or_nothing(subject: Subject) -> None:
    """Every write of a transaction happens at one revision, or none does; `found` has every key expected."""
    a, b, c = subject.key("a"), subject.key("b"), subject.key("c")
    revision = subject.put("a", b"1")
    unmet = subject.client.commit({a: revision, b: 7}, [Put(a, b"2"), Put(c, b"2")], deadline=soon())
    assert not unmet.applied
    assert dict(unmet.found) == {a: KeyValue(a, b"1", revision, 0), b: None}
    assert subject.value("c") is None
    met = subject.client.commit({a: revision, b: 0}, [Delete(a), Put(b, b"2"), Put(c, b"2")], deadline=soon())
    assert met.applied
    found, _ = subject.client.get_many([a, b, c], deadline=soon())
    assert found == {a: None, b: KeyValue(b, b"2", met.revision, 0), c: KeyValue(c, b"2", met.revision, 0)}


def test_a_transaction_that_is_found_applied_counts_as_applied(subject: Subject) -> None:
    """P4: the same transaction again, with its token as proof, is applied, at the revision it was written."""
    key = subject.key("a")
    first = subject.client.commit({key: 0}, [Put(key, b"token 1")], deadline=soon(), proof=key)
    subject.put("b", b"later")
    again = subject.client.commit({key: 0}, [Put(key, b"token 1")], deadline=soon(), proof=key)
    assert (again.applied, again.revision) == (True, first.revision)
    other = subject.client.commit({key: 0}, [Put(key, b"token 2")], deadline=soon(), proof=key)
    assert not other.applied
    assert other.found[key] == KeyValue(key, b"token 1", first.revision, 0)


def test_a_transaction_that_changes_nothing_has_no_revision_of_its_own(subject: Subject) -> None:
    """Deleting what is not there succeeds and is no event: a late release is a success that changes nothing."""
    revision = subject.put("a", b"1")
    done = subject.client.commit({subject.key("b"): 0}, [Delete(subject.key("b"))], deadline=soon())
    assert (done.applied, done.revision) == (True, revision)


def test_a_definite_error_of_etcd_is_refused_and_writes_nothing(subject: Subject) -> None:
    """What etcd will never accept is told apart from what may be tried again."""
    key = subject.key("a")
    with pytest.raises(EtcdRefused, match="duplicate key"):
        subject.client.commit({}, [Put(key, b"1"), Put(key, b"2")], deadline=soon())
    with pytest.raises(EtcdRefused, match="too many operations"):
        subject.client.commit({}, [Put(f"{key}{n}", b"") for n in range(129)], deadline=soon())
    with pytest.raises(EtcdRefused, match="lease not found"):
        subject.client.commit({}, [Put(key, b"1", lease=12345)], deadline=soon())
    assert subject.client.list(subject.prefix, deadline=soon())[0] == []


def test_without_time_nothing_is_sent(subject: Subject) -> None:
    """P6: a deadline that has passed is no reason to write, nor to wait."""
    key = subject.key("a")
    with pytest.raises(EtcdUnavailable):
        subject.client.commit({key: 0}, [Put(key, b"1")], deadline=time.monotonic() - 1)
    assert subject.value("a") is None


def test_of_many_creates_at_once_one_wins(subject: Subject) -> None:
    """P1 under load: 16 threads want each of 20 keys, and each key has the value of the one that was told so."""
    with ThreadPoolExecutor(16) as pool:
        for name in range(20):
            key = subject.key(str(name))
            barrier = threading.Barrier(16)

            def create(who: int, key: str = key, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait(10)
                return bool(subject.client.commit({key: 0}, [Put(key, b"%d" % who)], deadline=soon()).applied)

            winners = [who for who, won in enumerate(pool.map(create, range(16))) if won]
            assert len(winners) == 1
            assert subject.value(str(name)) == b"%d" % winners[0]


@pytest.mark.etcd
def test_checking_first_and_writing_then_loses_the_race(etcd: RealEtcd) -> None:
    """The race above is one that can be lost: a client that checks and then writes has two winners."""
    client = CheckThenWriteEtcd(etcd.settings)
    client.gap = 0.02
    key = etcd.prefix + "a"
    barrier = threading.Barrier(16)

    def create(who: int) -> bool:
        barrier.wait(10)
        return client.commit({key: 0}, [Put(key, b"%d" % who)], deadline=soon()).applied

    with contextlib.closing(client), ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(create, range(16))) > 1


@pytest.mark.etcd
def test_270_threads_commit_at_once(etcd: RealEtcd) -> None:
    """All threads of a daemon may be in a transaction at the same time, beginning with a client that is not open."""
    client = Etcd(etcd.settings)
    barrier = threading.Barrier(270)

    def create(who: int) -> bool:
        barrier.wait(30)
        key = f"{etcd.prefix}{who}"
        return client.commit({key: 0}, [Put(key, b"")], deadline=soon(30), proof=key).applied

    with contextlib.closing(client), ThreadPoolExecutor(270) as pool:
        assert all(pool.map(create, range(270)))
        assert client.transactions >= 270


def test_transactions_are_counted(subject: Subject) -> None:
    """The counter that the benchmark of transactions per address reads counts commits and no reads."""
    before = subject.client.transactions
    subject.put("a", b"1")
    subject.client.commit({subject.key("a"): 0}, [Delete(subject.key("a"))], deadline=soon())
    subject.client.get_many([subject.key("a")], deadline=soon())
    assert subject.client.transactions == before + 2


@pytest.mark.etcd
def test_answers_and_refusals_are_told(etcd: RealEtcd) -> None:
    """What the metrics say of etcd: each answer by its kind and how long it took, and what was refused by its code."""
    told: list[str] = []
    client = etcd.client
    client.on_answer = lambda call, seconds: told.append(call) if 0 < seconds < 60 else None
    key = f"{etcd.prefix}a"
    client.commit({key: 0}, [Put(key, b"1")], deadline=soon())
    client.get(key, deadline=soon())
    client.get_many([key], deadline=soon())
    client.keep_alive(client.grant_ttl(60, deadline=soon()), deadline=soon())
    client.status(deadline=soon())
    assert told == ["write", "read", "read", "ttl", "ttl", "status"]
    for _ in range(2):
        with pytest.raises(EtcdRefused):
            client.commit({}, [Put(key, b"1"), Put(key, b"2")], deadline=soon())
    assert client.refused == {"invalid_argument": 2}
    assert len(told) == 6


# ---- reads


def test_a_list_has_the_whole_prefix_in_order_and_nothing_else(subject: Subject) -> None:
    """Also the key that equals the prefix, and none of those that only sort next to it."""
    for name in ("p/b", "p/a", "p/", "p0", "p", "p/\U0001f600", "p/é"):
        revision = subject.put(name, name.encode())
    found, at = subject.client.list(subject.key("p/"), deadline=soon())
    assert [kv.key for kv in found] == [subject.key(n) for n in ("p/", "p/a", "p/b", "p/é", "p/\U0001f600")]
    assert [kv.value for kv in found] == [kv.key.removeprefix(subject.prefix).encode() for kv in found]
    assert at >= revision
    bare, _ = subject.client.list(subject.key("p/"), deadline=soon(), keys_only=True)
    assert bare == [kv._replace(value=b"") for kv in found]


def test_a_key_need_not_be_utf8(subject: Subject, mirror: Mirror) -> None:
    """An operator may write any bytes with etcdctl: they pass through a list, a watch and a transaction."""
    key = subject.key("junk-") + b"\xff\xfe".decode("utf-8", "surrogateescape")
    written = subject.client.commit({key: 0}, [Put(key, b"\xff")], deadline=soon())
    expected = KeyValue(key, b"\xff", written.revision, 0)
    assert subject.client.get(key, deadline=soon()) == expected
    assert subject.client.list(subject.prefix, deadline=soon())[0] == [expected]
    assert subject.client.list(key, deadline=soon())[0] == [expected]
    until(lambda: mirror.keys == {key: b"\xff"}, "the watch has the key")
    assert subject.client.commit({key: written.revision}, [Delete(key)], deadline=soon()).applied


class _BetweenPages(Etcd):
    """Does something after the first page of a list."""

    between: Callable[[], None] | None = None

    def _call(self, rpc: str, *arguments: Any, **options: Any) -> Any:
        reply = super()._call(rpc, *arguments, **options)
        if rpc == "range" and self.between is not None:
            self.between, between = None, self.between
            between()
        return reply


@pytest.fixture
def paged(etcd: RealEtcd, monkeypatch: pytest.MonkeyPatch) -> Iterator[_BetweenPages]:
    """A client that lists 100 keys in pages of 7."""
    monkeypatch.setattr(ipam_plugin.etcd, "PAGE", 7)
    with contextlib.closing(_BetweenPages(etcd.settings)) as client:
        writes = [Put(f"{etcd.prefix}{n:03}", b"old") for n in range(100)]
        client.commit({}, writes, deadline=soon())
        yield client


@pytest.mark.etcd
def test_a_list_in_pages_is_of_one_revision(etcd: RealEtcd, paged: _BetweenPages) -> None:
    """What changes while a long list is read is not in it: the watch that follows will tell."""
    writes = [Delete(f"{etcd.prefix}001"), Put(f"{etcd.prefix}099", b"new"), Put(f"{etcd.prefix}zzz", b"new")]
    paged.between = lambda: void(etcd.client.commit({}, writes, deadline=soon()))
    found, revision = paged.list(etcd.prefix, deadline=soon())
    assert [kv.key for kv in found] == [f"{etcd.prefix}{n:03}" for n in range(100)]
    assert {kv.value for kv in found} == {b"old"}
    assert revision == found[0].revision


@pytest.mark.etcd
def test_a_list_whose_revision_is_compacted_meanwhile_begins_again(etcd: RealEtcd, paged: _BetweenPages) -> None:
    """The result is one later revision, whole, and not the half of two."""

    def compact() -> None:
        done = etcd.client.commit({}, [Put(f"{etcd.prefix}001", b"new")], deadline=soon())
        etcd.cluster.etcdctl("compact", str(done.revision))

    paged.between = compact
    found, _ = paged.list(etcd.prefix, deadline=soon(20))
    assert [kv.key for kv in found] == [f"{etcd.prefix}{n:03}" for n in range(100)]
    assert [kv.value for kv in found] == [b"old", b"new"] + [b"old"] * 98


def void(_: object) -> None:
    return None


# ---- etcd's TTL leases


def test_a_key_lives_as_long_as_its_ttl_is_renewed(subject: Subject) -> None:
    """A heartbeat: the key stays while it is renewed, and vanishes by itself when it is not."""
    ttl = subject.client.grant_ttl(3, deadline=soon())
    subject.client.commit({}, [Put(subject.key("alive"), b"", ttl)], deadline=soon())
    assert subject.client.get(subject.key("alive"), deadline=soon()).lease == ttl
    for _ in range(4):
        subject.let_time_pass(1)
        assert subject.client.keep_alive(ttl, deadline=soon()) == 3
    assert subject.value("alive") == b""
    subject.let_time_pass(3)
    until(lambda: subject.value("alive") is None, "the key has ended")
    assert subject.client.keep_alive(ttl, deadline=soon()) == 0


def test_revoking_a_ttl_deletes_its_keys_and_may_be_repeated(subject: Subject) -> None:
    """A daemon that ends takes its heartbeat away at once; a key that was written again without the TTL stays."""
    ttl = subject.client.grant_ttl(60, deadline=soon())
    for name in ("a", "b"):
        subject.client.commit({}, [Put(subject.key(name), b"", ttl)], deadline=soon())
    subject.put("b", b"")
    for _ in range(2):
        subject.client.revoke(ttl, deadline=soon())
    assert [subject.value("a"), subject.value("b")] == [None, b""]


def test_the_status_names_the_member(subject: Subject) -> None:
    """`doctor` and the readiness check read this."""
    revision = subject.put("a", b"")
    status = subject.client.status(deadline=soon())
    assert status.version.startswith("3.")
    assert status.cluster_id
    assert status.revision >= revision
    assert status.db_size > 0
    assert status.endpoint
    assert status.leader


# ---- watch


def test_a_watch_begins_with_everything_and_goes_on_without_a_gap(subject: Subject) -> None:
    """Each change after the list comes once, in etcd's order, while others write."""
    subject.put("before", b"1")
    with contextlib.closing(Mirror(subject.client, subject.prefix)) as mirror:
        revisions = [subject.put(f"k{n % 7}", b"%d" % n) for n in range(100)]
        until(lambda: mirror.revision >= revisions[-1], "the last event has come")
        assert len(mirror.resets) == 1
        listed = mirror.resets[0][1]
        told = [event.revision for events, _ in mirror.batches for event in events]
        assert told == [revision for revision in revisions if revision > listed]
        assert mirror.keys == {kv.key: kv.value for kv in subject.client.list(subject.prefix, deadline=soon())[0]}


def test_a_watch_hears_of_one_transaction_at_once_and_of_its_own_prefix_only(subject: Subject, mirror: Mirror) -> None:
    """A lease that moves from one address to another is never seen at both or at none."""
    a, b = subject.key("a"), subject.key("b")
    first = subject.put("a", b"1")
    subject.client.commit({}, [Put(subject.prefix.rstrip("/") + "0", b"a neighbour")], deadline=soon())
    moved = subject.client.commit({a: first}, [Delete(a), Put(b, b"1")], deadline=soon())
    until(lambda: mirror.revision >= moved.revision, "the last event has come")
    (one, _), (two, revision) = mirror.batches
    assert one == [Event(a, b"1", first)]
    assert set(two) == {Event(a, None, moved.revision), Event(b, b"1", moved.revision)}
    assert revision == moved.revision


def test_a_watch_ends_within_a_second(subject: Subject, mirror: Mirror) -> None:
    """A daemon that is told to stop is not held up by its watches."""
    assert mirror.close() < 1
    assert not subject.client.watch_connected


def test_a_callback_that_raised_is_given_everything_anew(subject: Subject, mirror: Mirror) -> None:
    """A view that may have missed something is rebuilt, and the watch lives on."""
    mirror.fail_once = True
    subject.put("a", b"1")
    until(lambda: len(mirror.resets) == 2, "listed again")
    subject.put("b", b"2")
    until(lambda: mirror.keys == {subject.key("a"): b"1", subject.key("b"): b"2"}, "the watch goes on")


def test_a_closed_client_answers_no_more(subject: Subject, mirror: Mirror) -> None:
    """Closing ends the watch, and later calls say so instead of hanging."""
    subject.put("a", b"1")
    subject.client.close()
    assert mirror.close() < 1
    with pytest.raises(EtcdUnavailable, match="closed"):
        subject.client.get(subject.key("a"), deadline=soon())


# ---- settings


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("", "''"),
        ("127.0.0.1", "'127.0.0.1'"),
        ("ftp://127.0.0.1:2379", "'ftp"),
        ("127.0.0.1:port", "'127.0.0.1:port'"),
        ("::1:2379", "'::1:2379'"),
        ("[::1:2379", "'\\[::1:2379'"),
        ("http://127.0.0.1:2379/v3", "'http://127.0.0.1:2379/v3'"),
        ("127.0.0.1:70000", "'127.0.0.1:70000'"),
    ],
)
def test_an_endpoint_that_is_none_is_refused_at_once(endpoint: str, shown: str) -> None:
    """The sentence has the key's path, what was expected and what was found."""
    with pytest.raises(ConfigError, match=rf"^etcd\.endpoints\[1\]: expected host:port.* not {shown}"):
        EtcdSettings(("127.0.0.1:2379", endpoint))


def test_a_password_is_never_shown() -> None:
    """Neither by repr, nor when it was typed into an endpoint."""
    settings = EtcdSettings(("127.0.0.1:2379",), username="u", password="hunter2")
    assert "hunter2" not in repr(settings)
    with pytest.raises(ConfigError) as refusal:
        EtcdSettings(("http://u:hunter2@127.0.0.1:2379",))
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ({"endpoints": ()}, "etcd.endpoints"),
        ({"cert": "c.pem"}, "etcd.cert"),
        ({"username": "u"}, "etcd.username"),
        ({"timeout": 0}, "etcd.timeout"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], path: str) -> None:
    """At start, and not by the first request."""
    with pytest.raises(ConfigError, match=rf"^{path}: "):
        EtcdSettings(**({"endpoints": ("127.0.0.1:2379",)} | wrong))


# ---- the fake's faults


def test_the_fake_fails_as_it_is_told() -> None:
    """Each fault leaves etcd as its name says, which the tests of the register build on."""
    fake = FakeEtcd()
    for name, fault, error, written in (
        ("a", Fault.UNAVAILABLE, EtcdUnavailable, False),
        ("b", Fault.APPLIED, OutcomeUnknown, True),
        ("c", Fault.LOST, OutcomeUnknown, False),
        ("d", Fault.STUCK, OutcomeUnknown, False),
        ("e", Fault.STUCK, OutcomeUnknown, False),
    ):
        fake.faults.append(fault)
        with pytest.raises(error):
            fake.commit({name: 0}, [Put(name, b"1")], deadline=soon())
        assert (fake.get(name, deadline=soon()) is not None) is written
    fake.commit({"d": 0}, [Put("d", b"somebody else")], deadline=soon())
    assert fake.release_stuck() == 1  # d is taken, e appears now
    assert [kv.key for kv in fake.list("", deadline=soon())[0]] == ["b", "d", "e"]


def test_the_fake_goes_back_to_a_backup() -> None:
    """Revision and cluster change as with a real restore, and a watch lists anew."""
    fake = FakeEtcd()
    fake.commit({}, [Put("a", b"1")], deadline=soon())
    backup = fake.snapshot()
    fake.commit({}, [Put("b", b"2")], deadline=soon())
    before = fake.status(deadline=soon())
    with contextlib.closing(Mirror(fake, "")) as mirror:
        until(lambda: mirror.resets, "the first list")
        told = []
        fake.on_went_back = lambda *what: told.append(what)
        fake.restore(backup)
        until(lambda: mirror.keys == {"a": b"1"}, "listed anew")
        fake.get("a", deadline=soon())
        assert [(then.revision, now.revision, epoch) for then, now, epoch in told] == [
            (before.revision, backup.revision, 1)
        ]
        assert mirror.epochs == [0, 1]
    after = fake.status(deadline=soon())
    assert after.revision < before.revision
    assert after.cluster_id != before.cluster_id
