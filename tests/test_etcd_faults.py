"""What etcd's failures do to a client: against real members that are killed, paused, restarted and cut off."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest

from etcd_server import EtcdCluster, free_ports, until
from ipam_plugin.errors import EtcdRefused, EtcdUnavailable, OutcomeUnknown
from ipam_plugin.etcd import Commit, Delete, Etcd, EtcdSettings, Fate, Position, Put, fate
from ipam_plugin.etcd3_import import etcdrpc as pb
from test_etcd_contract import Mirror, soon

# ---- what an error says about the request

_DEFINITE = {
    grpc.StatusCode.INVALID_ARGUMENT: "etcdserver: duplicate key given in txn request",
    grpc.StatusCode.NOT_FOUND: "etcdserver: requested lease not found",
    grpc.StatusCode.ALREADY_EXISTS: "etcdserver: lease already exists",
    grpc.StatusCode.PERMISSION_DENIED: "etcdserver: permission denied",
    grpc.StatusCode.UNAUTHENTICATED: "etcdserver: anything but an old token",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "etcdserver: mvcc: database space exceeded",
    grpc.StatusCode.FAILED_PRECONDITION: "etcdserver: authentication is not enabled",
    grpc.StatusCode.OUT_OF_RANGE: "etcdserver: mvcc: required revision has been compacted",
    grpc.StatusCode.UNIMPLEMENTED: "etcdserver: unknown method",
    grpc.StatusCode.DATA_LOSS: "etcdserver: corrupt cluster",
}


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_an_error_is_definite_only_in_etcds_own_words(code: grpc.StatusCode) -> None:
    """P4: the code alone says nothing, and a code that is not in the table is never definite."""
    assert fate(code, "") is Fate.UNKNOWN
    assert fate(code, "Received http2 header with status: 404") is Fate.UNKNOWN
    expected = Fate.REFUSED if code in _DEFINITE else Fate.UNKNOWN
    assert fate(code, _DEFINITE.get(code, "etcdserver: something new")) is expected


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: Connection refused", Fate.UNSENT),
        ("UNAVAILABLE", "errors resolving nosuch.invalid:2379: [...]", Fate.UNSENT),
        ("UNAVAILABLE", "DNS resolution failed for nosuch.invalid:2379", Fate.UNSENT),
        ("UNAVAILABLE", "etcdserver: no leader", Fate.UNSENT),
        ("RESOURCE_EXHAUSTED", "etcdserver: too many requests", Fate.UNSENT),
        ("UNAVAILABLE", "Stream removed (failed to connect to all addresses)", Fate.UNKNOWN),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", Fate.UNKNOWN),
        ("UNAVAILABLE", "Socket closed", Fate.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: request timed out", Fate.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: request timed out, possibly due to previous leader failure", Fate.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: leader changed", Fate.UNKNOWN),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Fate.UNKNOWN),
        ("UNKNOWN", "raft proposal dropped", Fate.UNKNOWN),
        ("CANCELLED", "Channel closed!", Fate.UNKNOWN),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (70000000 vs. 67108864)", Fate.UNKNOWN),
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (5 vs. 4)", Fate.REFUSED),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", Fate.LOGIN),
        ("INVALID_ARGUMENT", "etcdserver: user name is empty", Fate.LOGIN),
        ("INVALID_ARGUMENT", "etcdserver: revision of auth store is old", Fate.LOGIN),
        ("INVALID_ARGUMENT", "etcdserver: authentication failed, invalid user ID or password", Fate.REFUSED),
    ],
)
def test_what_is_known_of_an_error(code: str, details: str, expected: Fate) -> None:
    """Sentences of grpcio 1.85 and etcd 3.4; each was either not sent, needs a login, is final, or is unknown."""
    assert fate(grpc.StatusCode[code], details) is expected


# ---- load during a fault


class Load:
    """Threads that all want each key of an endless row, with a token, and note what they were told."""

    WORKERS = 4

    def __init__(self, settings: EtcdSettings, prefix: str) -> None:
        self.prefix = prefix
        self.won: dict[str, bytes] = {}
        self.errors: list[Exception] = []
        self.longest = 0.0
        self._clients = [Etcd(settings) for _ in range(2)]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(who,)) for who in range(self.WORKERS)]
        for thread in self._threads:
            thread.start()

    def _work(self, who: int) -> None:
        client = self._clients[who % len(self._clients)]
        number = 0
        while not self._stop.is_set():
            number += 1
            key, value = f"{self.prefix}{number:06}", b"%d" % who
            began = time.monotonic()
            try:
                done = client.commit({key: 0}, [Put(key, value)], deadline=soon(30), proof=key)
            except Exception as error:
                self.errors.append(error)
                continue
            with self._lock:
                self.longest = max(self.longest, time.monotonic() - began)
                if done.applied:
                    if key in self.won:
                        self.errors.append(AssertionError(f"{key} has two winners"))
                    self.won[key] = value

    def progress(self, seconds: float = 30) -> None:
        """Wait until transactions get through again."""
        before = len(self.won)
        until(lambda: len(self.won) > before + 20, "transactions get through", seconds)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
        for client in self._clients:
            client.close()


def kill_leader(cluster: EtcdCluster, load: Load) -> None:
    leader = cluster.leader()
    leader.kill()
    load.progress()
    leader.start()
    cluster.wait_ready()


def pause_leader(cluster: EtcdCluster, load: Load) -> None:
    leader = cluster.leader()
    leader.pause()
    try:
        load.progress()
        time.sleep(15)  # how long it is paused is the fault itself
    finally:
        leader.resume()
    cluster.wait_ready()


def restart_one_after_another(cluster: EtcdCluster, load: Load) -> None:
    for member in cluster.members:
        member.kill()
        load.progress()
        member.start()
        cluster.wait_ready()
        load.progress()


def all_down(cluster: EtcdCluster, load: Load) -> None:
    for member in cluster.members:
        member.kill()
    time.sleep(3)  # how long they are down is the fault itself
    for member in cluster.members:
        member.start()
    cluster.wait_ready()


@pytest.mark.etcd
@pytest.mark.parametrize("fault", [kill_leader, pause_leader, restart_one_after_another, all_down])
def test_no_transaction_is_lost_doubled_or_refused(
    etcd3: EtcdCluster, fault: Callable[[EtcdCluster, Load], None]
) -> None:
    """P1, P4: whatever happens to the members, each key has one winner, what was answered is written, no caller
    gets an error within its deadline, and a watch ends up with exactly what etcd has, each event once."""
    client = Etcd(etcd3.settings())
    load = Load(etcd3.settings(), "/load/")
    try:
        with contextlib.closing(Mirror(client, "/load/")) as mirror:
            load.progress()
            fault(etcd3, load)
            load.progress()
            load.close()
            found, revision = client.list("/load/", deadline=soon(30))
            until(lambda: mirror.revision >= revision, "the watch has caught up", 20)
    finally:
        load.close()
        client.close()
    assert load.errors == []
    assert {kv.key: kv.value for kv in found} == load.won
    assert mirror.keys == load.won
    assert client.epoch == 0, "a member that lags behind is no older etcd"
    assert len(mirror.resets) == 1, "it resumed, and did not list again"
    told = [event.revision for events, _ in mirror.batches for event in events]
    assert told == [kv.revision for kv in found if kv.revision > mirror.resets[0][1]]
    if fault is not all_down:
        assert load.longest < 10


# ---- a lost answer


class Relay:
    """A port in front of a member that can swallow its answers."""

    def __init__(self, port: int) -> None:
        self.swallow = False
        self.swallowed = 0
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self.swallow:
                    self.swallowed += 1
                else:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for opened in self._sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()


@pytest.fixture
def relay(shared_etcd: EtcdCluster) -> Iterator[Relay]:
    with contextlib.closing(Relay(int(shared_etcd.endpoints[0].rpartition(":")[2]))) as relay:
        yield relay


@pytest.fixture
def behind(relay: Relay, shared_etcd: EtcdCluster) -> Iterator[Etcd]:
    """A client that talks through the relay first, and straight to etcd when that fails."""
    settings = EtcdSettings((relay.endpoint, shared_etcd.endpoints[0]), timeout=0.5)
    with contextlib.closing(Etcd(settings)) as client:
        client.get("/warm-up", deadline=soon())
        yield client


@pytest.mark.etcd
def test_a_transaction_whose_answer_was_lost_is_found_applied(behind: Etcd, relay: Relay, etcd: Any) -> None:
    """P4: written by the first try, recognised by the second by its token, at the revision of the first."""
    key = etcd.prefix + "a"
    relay.swallow = True
    done = behind.commit({key: 0}, [Put(key, b"token")], deadline=soon(), proof=key)
    written = etcd.client.get(key, deadline=soon())
    assert relay.swallowed
    assert behind.transactions == 2
    assert done == Commit(True, written.revision, {})


@pytest.mark.etcd
def test_a_lost_answer_without_a_proof_is_uncertain(behind: Etcd, relay: Relay, etcd: Any) -> None:
    """Without a token nobody can tell whose write it was, and the result says so."""
    key = etcd.prefix + "a"
    relay.swallow = True
    done = behind.commit({key: 0}, [Put(key, b"1")], deadline=soon())
    assert (done.applied, done.uncertain) == (False, True)
    assert done.found[key] == etcd.client.get(key, deadline=soon())


@pytest.mark.etcd
def test_a_refusal_after_a_lost_answer_is_no_refusal(behind: Etcd, relay: Relay, etcd: Any) -> None:
    """The first try was written; that the second is refused (its TTL has gone) must not be taken for nothing."""
    key = etcd.prefix + "a"
    ttl = etcd.client.grant_ttl(60, deadline=soon())
    relay.swallow = True
    ended = threading.Thread(target=lambda: _revoke_once_written(etcd.client, key, ttl))
    ended.start()
    with pytest.raises(OutcomeUnknown, match="lease not found"):
        behind.commit({key: 0}, [Put(key, b"1", ttl)], deadline=soon(), proof=key)
    ended.join(timeout=10)


def _revoke_once_written(client: Etcd, key: str, ttl: int) -> None:
    until(lambda: client.get(key, deadline=soon()), "the first try is written", 5)
    client.revoke(ttl, deadline=soon())


@pytest.mark.etcd
def test_the_deadline_after_a_lost_answer_leaves_the_outcome_open(relay: Relay, etcd: Any) -> None:
    """P4, P6: within the deadline, never EtcdUnavailable, since it is written."""
    key = etcd.prefix + "a"
    with contextlib.closing(Etcd(EtcdSettings((relay.endpoint,), timeout=0.5))) as client:
        client.get("/warm-up", deadline=soon())
        relay.swallow = True
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown, match=rf"within 1\.5 s.*{relay.endpoint}: "):
            client.commit({key: 0}, [Put(key, b"1")], deadline=began + 1.5, proof=key)
        assert time.monotonic() - began < 1.8


@pytest.mark.etcd
def test_without_a_quorum_the_outcome_is_open_and_reads_are_not(etcd3: EtcdCluster) -> None:
    """P6: both end at the deadline; the write that was sent is unknown, the read has simply failed."""
    with contextlib.closing(Etcd(etcd3.settings(timeout=0.5))) as client:
        client.get("/a", deadline=soon())
        for member in etcd3.members[1:]:
            member.kill()
        with pytest.raises(OutcomeUnknown):
            client.commit({"/a": 0}, [Put("/a", b"1")], deadline=soon(2), proof="/a")
        with pytest.raises(EtcdUnavailable):
            client.get("/a", deadline=soon(1))
        assert client.status(deadline=soon(5)).version


# ---- members that are not there


@pytest.mark.etcd
def test_a_dead_endpoint_in_the_list_costs_nothing(etcd: Any) -> None:
    """Neither an error nor a doubt: a refused connection is known to be unsent, and is left for good."""
    (port,) = free_ports(1)
    settings = EtcdSettings((f"127.0.0.1:{port}", etcd.settings.endpoints[0]))
    key = etcd.prefix + "a"
    with contextlib.closing(Etcd(settings)) as client:
        began = time.monotonic()
        assert client.commit({key: 0}, [Put(key, b"1")], deadline=soon()).applied
        assert time.monotonic() - began < 1
        refused = client.commit({key: 0}, [Put(key, b"2")], deadline=soon())
        assert (refused.applied, refused.uncertain) == (False, False)
        assert client.transactions == 3  # the first went to both


@pytest.mark.etcd
def test_an_endpoint_that_accepts_and_never_answers_costs_one_timeout(etcd: Any) -> None:
    """A machine that is off or hangs is left within `timeout` seconds, without a doubt about what was sent, and later
    calls do not try it first."""
    key = etcd.prefix + "a"
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        endpoints = (f"127.0.0.1:{silent.getsockname()[1]}", etcd.settings.endpoints[0])
        with contextlib.closing(Etcd(EtcdSettings(endpoints, timeout=1))) as client:
            began = time.monotonic()
            assert client.commit({key: 0}, [Put(key, b"1")], deadline=soon()).applied
            first = time.monotonic() - began
            done = client.commit({key: 0}, [Put(key, b"2")], deadline=soon())
            assert (done.applied, done.uncertain) == (False, False)
            assert 0.5 < first < 2.5
            assert time.monotonic() - began - first < 0.5
            assert client.transactions == 3


def test_with_no_member_the_sentence_names_each_and_why() -> None:
    """P7: what the user of `docker run` reads says where etcd was looked for and what happened there."""
    one, two = free_ports(2)
    settings = EtcdSettings((f"http://127.0.0.1:{one}", f"127.0.0.1:{two}"), username="u", password="hunter2")
    with contextlib.closing(Etcd(settings)) as client, pytest.raises(EtcdUnavailable) as refusal:
        client.commit({"a": 0}, [Put("a", b"")], deadline=soon(1))
    refused = "; ".join(f"{endpoint}: Connection refused" for endpoint in settings.endpoints)
    assert str(refusal.value) == f"etcd did not answer within 1 s ({refused})"


def test_a_forked_child_is_told_not_to_use_the_parents_connection(tmp_path: Path) -> None:
    """gRPC hangs or crashes there now and then; this client says so at once."""
    script = """
import contextlib, os, sys, time
from ipam_plugin.errors import EtcdUnavailable
from ipam_plugin.etcd import Etcd, EtcdSettings
client = Etcd(EtcdSettings(("127.0.0.1:1",)))
with contextlib.suppress(EtcdUnavailable):
    client.get("a", deadline=time.monotonic() + 0.2)
child = os.fork()
if child == 0:
    try:
        client.get("a", deadline=time.monotonic() + 0.2)
    except RuntimeError as error:
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=30, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


# ---- a backup


@pytest.mark.etcd
@pytest.mark.parametrize("token", ["", "another"], ids=["the same cluster", "another cluster"])
def test_that_etcd_went_back_is_told_before_the_answer(own_etcd: EtcdCluster, token: str) -> None:
    """By the first answer that shows it, once; and a watch lists everything anew."""
    (member,) = own_etcd.members
    with contextlib.closing(Etcd(own_etcd.settings())) as client, contextlib.closing(Mirror(client, "/b/")) as mirror:
        told: list[tuple[Position, Position, int]] = []
        client.on_went_back = lambda *what: told.append(what)
        until(lambda: client.watch_connected, "the watch is connected")
        client.commit({}, [Put("/b/kept", b"1")], deadline=soon())
        backup = own_etcd.save()
        for number in range(30):
            done = client.commit({}, [Put("/b/lost", b"%d" % number)], deadline=soon())
        until(lambda: "/b/lost" in mirror.keys, "the watch has it")
        latest = client.latest
        assert latest is not None
        assert latest.revision >= done.revision
        member.kill()
        own_etcd.restore(backup, token)
        client.commit({}, [Put("/b/new", b"1")], deadline=soon(30))
        [(before, now, epoch)] = told
        assert before == latest
        assert (now.cluster_id == before.cluster_id) is not bool(token)
        assert now.revision < before.revision
        assert epoch == client.epoch == 1
        until(lambda: mirror.keys == {"/b/kept": b"1", "/b/new": b"1"}, "listed anew", 20)
        assert mirror.epochs[-1] == 1
        client.commit({}, [Put("/b/new", b"2")], deadline=soon())
        until(lambda: mirror.keys["/b/new"] == b"2", "the watch goes on")
        assert len(told) == 1


@pytest.mark.etcd
@pytest.mark.parametrize("lost", [1, 3, 10])
def test_a_history_that_has_overtaken_the_old_one_is_told_from_it(own_etcd: EtcdCluster, lost: int) -> None:
    """By its revisions alone etcd is newer than ever, when others were faster: but what the watch heard last is not
    what stands there."""
    (member,) = own_etcd.members
    with contextlib.closing(Etcd(own_etcd.settings())) as client, contextlib.closing(Mirror(client, "/b/")) as mirror:
        told: list[int] = []
        client.on_went_back = lambda before, now, epoch: told.append(epoch)
        until(lambda: client.watch_connected, "the watch is connected")
        client.commit({}, [Put("/b/kept", b"1")], deadline=soon())
        backup = own_etcd.save()
        for number in range(lost):
            client.commit({}, [Put("/b/lost", b"%d" % number)], deadline=soon())
        until(lambda: mirror.keys.get("/b/lost") == b"%d" % (lost - 1), "the watch has it")
        member.kill()
        own_etcd.restore(backup)
        new = {f"/b/new{number}": b"1" for number in range(lost + 5)}
        with contextlib.closing(Etcd(own_etcd.settings())) as other:
            for key, value in new.items():
                other.commit({}, [Put(key, value)], deadline=soon(30))
        until(lambda: mirror.keys == {"/b/kept": b"1", **new}, "listed anew", 20)
        assert told == [1]


@pytest.mark.etcd
def test_a_write_comes_after_all_that_was_seen(own_etcd: EtcdCluster) -> None:
    """One that has the very revision of what was seen last was written in another history."""
    (member,) = own_etcd.members
    with contextlib.closing(Etcd(own_etcd.settings())) as client:
        told: list[int] = []
        client.on_went_back = lambda before, now, epoch: told.append(now.revision)
        client.commit({}, [Put("/b/a", b"1")], deadline=soon())
        client.commit({}, [Delete("/b/nothing")], deadline=soon())
        client.commit({"/b/a": 0}, [Put("/b/a", b"2")], deadline=soon())
        backup = own_etcd.save()
        client.commit({}, [Put("/b/lost", b"1")], deadline=soon())
        assert told == []
        member.kill()
        own_etcd.restore(backup)
        client.commit({}, [Put("/b/new", b"1")], deadline=soon(30))
        assert len(told) == 1


def test_an_answer_of_another_life_waits_until_that_was_told() -> None:
    """Also that of a question which was sent after the first of them had come."""
    with contextlib.closing(Etcd(EtcdSettings(("127.0.0.1:1",)))) as client:
        client.expect(Position(1, 100))
        telling, told, heard = threading.Event(), threading.Event(), threading.Event()

        def tell(*_: object) -> None:
            telling.set()
            assert told.wait(10)

        client.on_went_back = tell
        first = threading.Thread(target=client._saw, args=(Position(1, 50), 0, Position(1, 100), 0))
        first.start()
        assert telling.wait(10)
        latest = client.latest
        later = threading.Thread(target=lambda: (client._saw(Position(1, 51), 1, latest, 0), heard.set()))
        later.start()
        assert not heard.wait(0.3)
        told.set()
        assert heard.wait(10)
        for each in (first, later):
            each.join(10)
        assert client.latest == Position(1, 51)
        assert client.epoch == 1


@pytest.mark.etcd
def test_what_an_earlier_process_saw_counts(own_etcd: EtcdCluster) -> None:
    with contextlib.closing(Etcd(own_etcd.settings())) as client:
        client.commit({}, [Put("/b/a", b"1")], deadline=soon())
        latest = client.latest
        assert latest is not None
    for expected, times in ((latest, 0), (latest._replace(revision=latest.revision + 1), 1)):
        with contextlib.closing(Etcd(own_etcd.settings())) as client:
            told: list[Position] = []
            client.on_went_back = lambda before, now, epoch: told.append(before)  # noqa: B023 - called within the loop
            client.expect(expected)
            client.list("/b/", deadline=soon())
            assert told == [expected] * times


# ---- watches


@pytest.mark.etcd
def test_a_watch_whose_history_was_compacted_lists_again(etcd3: EtcdCluster) -> None:
    """What it missed while its member was down is gone from etcd: it starts from a fresh list, without an error."""
    lonely = etcd3.members[0]
    with (
        contextlib.closing(Etcd(EtcdSettings((lonely.endpoint,)))) as client,
        contextlib.closing(Etcd(EtcdSettings(etcd3.endpoints[1:]))) as others,
    ):
        others.commit({}, [Put("/c/gone", b"1"), Put("/c/kept", b"1")], deadline=soon())
        with contextlib.closing(Mirror(client, "/c/")) as mirror:
            until(lambda: client.watch_connected, "the watch is connected")
            lonely.kill()
            until(lambda: not client.watch_connected, "the watch has noticed")
            for number in range(20):
                done = others.commit({}, [Put("/c/new", b"%d" % number)], deadline=soon(20))
            etcd3.etcdctl("--endpoints", etcd3.endpoints[1], "compact", str(done.revision))
            lonely.start()
            etcd3.wait_ready()
            until(lambda: mirror.keys.get("/c/new") == b"19", "the watch has caught up", 20)
            assert len(mirror.resets) == 2
            others.commit({}, [Put("/c/new", b"last")], deadline=soon())
            until(lambda: mirror.keys["/c/new"] == b"last", "the watch goes on")


@pytest.mark.etcd
@pytest.mark.parametrize("calls", [False, True], ids=["nothing but the watch", "other calls go on"])
def test_a_watch_of_a_member_that_hangs_moves_on(etcd3: EtcdCluster, calls: bool) -> None:
    """Without any sign on the connection it is found within 6 + 2 s, and sooner when a call has found it."""
    with (
        contextlib.closing(Etcd(etcd3.settings())) as client,
        contextlib.closing(Etcd(EtcdSettings(etcd3.endpoints[1:]))) as others,
        contextlib.closing(Mirror(client, "/h/")) as mirror,
    ):
        until(lambda: client.watch_connected, "the watch is connected")
        etcd3.members[0].pause()
        began = time.monotonic()
        try:
            others.commit({}, [Put("/h/a", b"1")], deadline=soon(20))
            if calls:
                client.get("/h/a", deadline=soon(20))
            until(lambda: mirror.keys == {"/h/a": b"1"}, "the event has come", 15)
            assert time.monotonic() - began < (6 if calls else 13)
            assert len(mirror.resets) == 1
            assert client.watch_connected
        finally:
            etcd3.members[0].resume()


@pytest.mark.etcd
def test_a_watch_costs_nothing_while_etcd_is_away_and_still_ends_at_once() -> None:
    """It waits between its tries instead of spinning, and `stop` interrupts also the first listing."""
    (port,) = free_ports(1)
    with contextlib.closing(Etcd(EtcdSettings((f"127.0.0.1:{port}",)))) as client:
        with contextlib.closing(Mirror(client, "/x/")) as mirror:
            began = time.process_time()
            time.sleep(2)
            assert time.process_time() - began < 0.3
            assert not client.watch_connected
        assert mirror.close() < 1


@pytest.mark.etcd
def test_a_watch_that_finds_the_cluster_restored_lists_again(tmp_path: Path) -> None:
    """A member that comes back from an older backup has a revision that the watch has passed: waiting for the next
    one would be silence for as long as it takes etcd to catch up."""
    with EtcdCluster(1) as cluster, contextlib.closing(Etcd(cluster.settings())) as client:
        member = cluster.members[0]
        client.commit({}, [Put("/r/old", b"1")], deadline=soon())
        data = member.data
        member.kill()
        shutil.copytree(data, tmp_path / "backup")
        member.start()
        cluster.wait_ready()
        for number in range(20):
            client.commit({}, [Put("/r/lost", b"%d" % number)], deadline=soon(20))
        with contextlib.closing(Mirror(client, "/r/")) as mirror:
            until(lambda: client.watch_connected, "the watch is connected")
            assert mirror.keys == {"/r/old": b"1", "/r/lost": b"19"}
            member.kill()
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "backup", data)
            member.start()
            cluster.wait_ready()
            until(lambda: mirror.keys == {"/r/old": b"1"}, "listed again", 20)
            client.commit({}, [Put("/r/new", b"1")], deadline=soon())
            until(lambda: "/r/new" in mirror.keys, "the watch goes on")


# ---- TLS and logins


@pytest.mark.etcd
def test_a_client_certificate_is_the_user() -> None:
    """Mutual TLS with the common name as the user: its rights hold, and nothing expires. It is read again when the
    files are renewed."""
    with EtcdCluster(1, tls="mutual") as cluster:
        cluster.enable_auth("ipam", "unused", "/tls/")
        settings = cluster.settings(common_name="ipam")
        assert settings.cert is not None
        assert settings.key is not None
        with contextlib.closing(Etcd(settings)) as client, contextlib.closing(Mirror(client, "/tls/")) as mirror:
            assert client.commit({"/tls/a": 0}, [Put("/tls/a", b"1")], deadline=soon()).applied
            with pytest.raises(EtcdRefused, match="permission denied"):
                client.commit({"/other": 0}, [Put("/other", b"1")], deadline=soon())
            until(lambda: mirror.keys == {"/tls/a": b"1"}, "the watch works")
        good = Path(settings.cert).read_bytes(), Path(settings.key).read_bytes()
        stranger = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ipam"]
        stranger += ["-keyout", settings.key, "-out", settings.cert]
        subprocess.run(stranger, check=True, capture_output=True, timeout=30)
        with contextlib.closing(Etcd(settings)) as client:
            with pytest.raises((EtcdUnavailable, OutcomeUnknown)):
                client.commit({"/tls/b": 0}, [Put("/tls/b", b"1")], deadline=soon(2), proof="/tls/b")
            Path(settings.cert).write_bytes(good[0])
            Path(settings.key).write_bytes(good[1])
            assert client.commit({"/tls/b": 0}, [Put("/tls/b", b"1")], deadline=soon(10), proof="/tls/b").applied


@pytest.mark.etcd
@pytest.mark.parametrize("tls", ["", "server"], ids=["plaintext", "TLS"])
def test_a_login_that_expired_is_renewed(tls: Literal["", "server"]) -> None:
    """Calls and watches go on after the token's end and after etcd forgot all tokens; nobody sees an error."""
    ttl = 2
    with EtcdCluster(1, tls=tls, arguments=["--auth-token-ttl", str(ttl)]) as cluster:
        cluster.enable_auth("ipam", "hunter2", "/auth/")
        settings = cluster.settings(username="ipam", password="hunter2")
        with contextlib.closing(Etcd(settings)) as client:
            assert client.commit({"/auth/a": 0}, [Put("/auth/a", b"1")], deadline=soon()).applied
            expire(client, ttl)
            done = client.commit({"/auth/b": 0}, [Put("/auth/b", b"1")], deadline=soon())
            assert (done.applied, done.uncertain) == (True, False)
            expire(client, ttl)
            with contextlib.closing(Mirror(client, "/auth/")) as mirror:
                until(lambda: client.watch_connected, "the watch is connected")
                cluster.members[0].kill()
                cluster.members[0].start()
                cluster.wait_ready()
                assert client.commit({}, [Put("/auth/c", b"1")], deadline=soon(20)).applied
                until(lambda: set(mirror.keys) == {"/auth/a", "/auth/b", "/auth/c"}, "the watch goes on", 20)
            with pytest.raises(EtcdRefused, match="permission denied"):
                client.get("/other", deadline=soon())


@pytest.mark.etcd
def test_a_watch_that_is_opened_with_an_expired_login_logs_in_again() -> None:
    """etcd answers it with "created" and "canceled" in one: taken for created, it would be silent for ever."""
    ttl = 2
    with EtcdCluster(1, arguments=["--auth-token-ttl", str(ttl)]) as cluster:
        cluster.enable_auth("ipam", "hunter2", "/auth/")
        client = Etcd(cluster.settings(username="ipam", password="hunter2"))
        heard: list[Any] = []
        stop = threading.Event()

        def wait_until_expired(found: Any, revision: int, epoch: int) -> None:
            heard.append(found)
            expire(client, ttl)

        with contextlib.closing(client):
            thread = threading.Thread(
                target=client.watch,
                args=("/auth/", wait_until_expired, lambda events, _: heard.append(events), stop),
            )
            thread.start()
            try:
                until(lambda: client.watch_connected, "the watch is connected", 20)
                client.commit({}, [Put("/auth/a", b"1")], deadline=soon())
                until(lambda: len(heard) == 2, "the event has come")
            finally:
                stop.set()
                thread.join(timeout=10)


def expire(client: Etcd, ttl: int) -> None:
    """Until the client's token has ended. Asking etcd would renew it, so there is nothing to wait for but time."""
    member = client._members[0]
    token = member._token
    assert token
    time.sleep(ttl + 2)
    with pytest.raises(grpc.RpcError) as refusal:
        member._calls["range"](pb.RangeRequest(key=b"/auth/"), timeout=5, metadata=(("token", token),))
    assert "invalid auth token" in refusal.value.details()


@pytest.mark.etcd
def test_wrong_credentials_are_refused_at_once_and_never_shown() -> None:
    """P7, and a password is in no sentence and no traceback; a client without a login is told what is missing."""
    with EtcdCluster(1) as cluster:
        early = Etcd(cluster.settings(username="ipam", password="right"))
        with contextlib.closing(early):
            # A login that is configured before authentication is turned on does no harm, and works afterwards.
            assert early.commit({}, [Put("/auth/a", b"1")], deadline=soon()).applied
            cluster.enable_auth("ipam", "right", "/auth/")
            assert early.commit({}, [Put("/auth/a", b"2")], deadline=soon()).applied
        for settings, reason in (
            (cluster.settings(username="ipam", password="hunter2"), "invalid user ID or password"),
            (cluster.settings(), "user name is empty"),
        ):
            began = time.monotonic()
            with contextlib.closing(Etcd(settings)) as client, pytest.raises(EtcdRefused, match=reason) as refusal:
                client.commit({"/auth/a": 0}, [Put("/auth/a", b"1")], deadline=soon())
            assert time.monotonic() - began < 5
            assert "hunter2" not in repr(refusal.getrepr(style="value"))
