"""Whatever stands in etcd harms neither the daemon nor the command, nor the terminal or log in which it is read.

`hostile.corpus` is put under every family of keys of a real etcd, with a real daemon and every command. Nothing may end
in a traceback, act on a terminal, forge a line of a log, or be overwritten.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import harness
import hostile
import properties
from conftest import RealEtcd
from daemons import COMMAND, ROOT, DaemonProcess
from etcd_server import EtcdCluster, until
from harness import Lan, bridge
from ipam_plugin import cli
from ipam_plugin import etcd as etcd_module
from ipam_plugin.addresses import Range, address_of
from ipam_plugin.daemon import _Json, _Text
from ipam_plugin.etcd import Etcd, KeyValue, Put
from ipam_plugin.host import Alarms
from ipam_plugin.model import (
    ENDPOINT,
    HELD,
    HISTORY_LENGTH,
    STANDBY,
    Container,
    History,
    Host,
    Keys,
    Lease,
    Order,
    Part,
    Pool,
    SegmentSettings,
    decode,
    encode,
    read_lease,
    remembered,
    segment_and_taken,
)
from ipam_plugin.view import Full, View

KEYS = Keys("/hostile/")
FAMILIES = ("leases", "history", "segments", "pools", "hosts", "alive", "wanted", "retiring", "gone")


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def clean(text: str) -> bool:
    """It shows what it says and does nothing to the terminal on which it is shown."""
    return all(letter.isprintable() or letter == "\n" for letter in text)


# --- what reads it, in this process --------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(FAMILIES),
            st.binary(max_size=20)
            | st.sampled_from([b"clean/10.9.0.5", b"clean/10.9.0.4-10.9.0.5", b"clean/010.9.0.5"]),
            st.binary(max_size=60) | st.sampled_from(list(hostile.WHOLE.values())[:-2]) | st.none(),
        )
    )
)
def test_a_view_takes_any_bytes(changes: list[tuple[str, bytes, bytes | None]]) -> None:
    """At any time, in any order; an address whose key is there is not offered to anybody (P2)."""
    view = View(KEYS, "self")
    pool = Pool.make("10.9.0.0/29", "", {}, "clean")
    named = [
        (f"{KEYS.prefix}{family}/{end.decode('utf-8', 'surrogateescape')}", value) for family, end, value in changes
    ]
    view.reset([(key, value, 5) for key, value in named if value is not None], 5)
    for revision, (key, value) in enumerate(named, 6):
        view.apply([(key, value, revision)], revision)
    last = dict(named)
    taken = set()
    for key, value in last.items():
        with contextlib.suppress(ValueError):
            if key.startswith(KEYS.leases) and value is not None:
                segment, names = segment_and_taken(key.removeprefix(KEYS.leases))
                taken |= {names} if segment == "clean" else set()
    with view.candidate(pool) as offered:
        assert isinstance(offered, Full) or not any(
            each.contains(offered) if isinstance(each, Range) else each == offered for each in taken
        )
    assert clean(view.counts(pool))


def test_a_view_forgets_what_is_deleted() -> None:
    """All of it as events, then all of it deleted: nothing stays taken."""
    view = View(KEYS, "self")
    corpus = hostile.corpus(KEYS.prefix)
    view.reset([], 1)
    view.apply([(key, value, revision) for revision, (key, value) in enumerate(corpus, 2)], len(corpus) + 2)
    assert sum(view.use(hostile.CLEAN).values()) > 400
    after = len(corpus) + 3
    view.apply([(key, None, after + number) for number, (key, _) in enumerate(corpus)], after + len(corpus))
    assert {kind for name in view.segment_names() for kind, count in view.use(name).items() if count} == set()


def test_the_log_has_one_line_for_each_thing_said() -> None:
    """No text of the register becomes a second line, or an escape sequence; JSON loses nothing of it."""
    for text in (*hostile.TEXTS.values(), "\udcff\ud800"):
        record = logging.LogRecord("x", logging.WARNING, "", 0, "etcd key %s", (text,), None)
        assert _Text("%(message)s").format(record) == "etcd key " + "".join(
            letter if letter.isprintable() else "?" for letter in text
        )
        line = _Json().format(record)
        assert line.isascii()
        assert line.isprintable()
        assert json.loads(line)["message"] == f"etcd key {text}"
    try:
        raise ValueError(hostile.TEXTS["new lines"])
    except ValueError:
        failed = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    first, *rest = _Text("%(message)s").format(failed).split("\n")
    assert first == "failed"
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


def test_history_stays_small_and_what_cannot_be_read_stays() -> None:
    """Where a lease has texts as large as etcd takes, its release must still fit into one value."""
    long = "x" * hostile.HUGE
    now = datetime.datetime.now(datetime.UTC)
    lease = Lease(ENDPOINT, host=long, mac=long, container=Container(long, long, long, long), since=long)
    past = None
    for _ in range(HISTORY_LENGTH + 1):
        past = remembered(past, lease, "released", now)
    assert past is not None
    assert len(past) < 20_000
    assert len(decode(past, History).past) == HISTORY_LENGTH
    assert remembered(b"junk", lease, "released", now) is None


def test_what_is_wrong_is_said_in_one_short_line() -> None:
    """The reason quotes what stands there, and goes to logs and terminals."""
    for value in hostile.WHOLE.values():
        for kind in (Lease, History, SegmentSettings):
            said = properties.refusal(ValueError, decode, value, kind)
            assert said == "" or said.isprintable()
            assert len(said) <= 200
        assert read_lease(value).told().isprintable()


def test_an_alarm_is_one_line() -> None:
    """It quotes what stands in etcd, and goes to the log, into the record of the host and to everybody who asks."""
    alarms = Alarms()
    for text in hostile.TEXTS.values():
        alarms.tell("kind", f"{text} {'x' * hostile.HUGE}")
    assert alarms.shown()
    assert all(text.isprintable() and len(text) <= 1000 for text in alarms.shown())


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_leases_under_its_own_name(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a daemon takes for its own standby, holds and containers ends none of its threads, and it still serves."""
    monkeypatch.setattr("ipam_plugin.reconcile.SOON", 0.01)
    monkeypatch.setattr("ipam_plugin.reconcile.PERIOD", 0.02)
    monkeypatch.setattr("ipam_plugin.evidence.SETTLED", 0.0)
    with Lan() as lan:
        a = lan.host("a", bridge("192.168.1.11/16"))
        pool = a.create("192.168.0.0/16")
        a.engine.create("lan", ("192.168.0.0/16", ""))
        for family, made in (("leases", hostile.own_leases("a")), ("history", hostile.values("history"))):
            for number, value in enumerate(made, 0xC0A80200):
                key = f"{harness.KEYS.prefix}{family}/default/{address_of(4, number)}"
                lan.etcd.commit({}, [Put(key, value)], deadline=soon())
        a.catch_up()
        a.ahead = 1e9  # all holds are over
        for start in (a.keep, a.tend_holds, a.reconcile, a.retire, a.carry_out, a.free_orphans):
            start()
        a.engine.start("web", a.run(pool))
        for number in range(0xC0A80200, 0xC0A80300, 3):
            a.engine.start(f"c{number}", str(address_of(4, number)), "02:00:00:00:00:07")
        looks = a.engine.looks
        harness.until(lambda: a.engine.looks > looks + 20, "looks at dockerd")
        assert a.release(pool, a.run(pool)).ok == {}
    assert [each for each in caplog.records if each.exc_info] == []


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_host_with_such_leases_is_retired(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a living one, to the end; a reservation stays, also one that names a host (P2)."""
    monkeypatch.setattr("ipam_plugin.retire.WITHOUT_WIRE", 0.0)
    keys = harness.KEYS
    with Lan() as lan:
        a = lan.host("a", bridge("192.168.1.11/16"))
        a.create("192.168.0.0/16")
        for number, value in enumerate(hostile.own_leases("b"), 0xC0A80200):
            lan.etcd.commit({}, [Put(keys.lease("default", address_of(4, number)), value)], deadline=soon())
        record = json.dumps(hostile.record(Host, "\x1b", -1)).encode()
        lan.etcd.commit({}, [Put(keys.host("b"), record)], deadline=soon())
        order = Order("b", "ann", "now", "token", force=True)
        ttl = lan.etcd.grant_ttl(100, deadline=soon())
        lan.etcd.commit({}, [Put(keys.retire("b"), encode(order), ttl)], deadline=soon())
        a.catch_up()
        a.retire()
        ended = keys.retire_part("b", "end")
        harness.until(lambda: (end := lan.etcd.get(ended, deadline=soon())) and decode(end.value, Part).done, "the end")
        a.catch_up()
        left = {kind: count for kind, count in a.view.use("default").items() if count}
        assert set(left) == {"host", "reserved", "conflict"}
        assert left["host"] == 1
    assert [each for each in caplog.records if each.exc_info] == []


# --- a real etcd that is full of it ----------------------------------------------------------------------------


class Filled(NamedTuple):
    cluster: EtcdCluster
    client: Etcd
    corpus: list[tuple[str, bytes]]

    def changed(self) -> list[str]:
        """The keys that have not the value that was put there."""
        found = {each.key: each.value for each in self.client.list(KEYS.prefix, deadline=soon())[0]}
        return [key for key, value in self.corpus if found.get(key) != value]


@pytest.fixture(scope="module")
def filled() -> Iterator[Filled]:
    with EtcdCluster() as cluster, contextlib.closing(Etcd(cluster.settings())) as client:
        corpus = hostile.corpus(KEYS.prefix)
        for key, value in corpus:
            client.commit({}, [Put(key, value)], deadline=soon())
        yield Filled(cluster, client, corpus)


# By command; each is typed to the corpus. `check`, `adopt` and `scan` stop where they would need Docker or a LAN.
TYPED = {
    "leases": ["leases", "leases -o json", "leases --kind unreadable", "leases --segment clean --host h -o json"],
    "show": [*(f"show {each}" for each in (hostile.ADDRESS, "198.18.0.5", "198.18.1.2")), "show 198.18.1.2 -o json"],
    "pools": ["pools", "pools -o json"],
    "hosts": ["hosts", "hosts -o json"],
    "host": ["host retire nobody", "host retire hostile40"],
    "segment": [*(f"segment hostile{n}" for n in range(30, 60)), "segment h -o json", "segment default --no-router"],
    "check": ["check", "check -o json"],
    "adopt": ["adopt", "adopt lan --apply -o json"],
    "scan": ["scan clean"],
    "doctor": ["doctor --no-lan", "doctor --no-lan -o json"],
    "reserve": [f"reserve {hostile.ADDRESS}", "reserve 198.18.0.5", "reserve 198.18.0.0/24 --segment default"],
    "unreserve": ["unreserve 198.18.77.7 --segment clean", "unreserve 198.18.0.0/24 --segment default"],
    "release": ["release 198.18.0.5 --segment clean", "release 198.18.1.200 --segment clean"],
}  # fmt: skip
ELSEWHERE = {"serve", "install", "uninstall", "check-config"}


def test_every_command_is_typed_here() -> None:
    """A new command that reads the register reads this too."""
    assert set(cli.cli.commands) - ELSEWHERE - {"web"} == set(TYPED)


@pytest.mark.etcd
@pytest.mark.parametrize("command", TYPED)
def test_a_command_shows_it_and_does_nothing_else(
    command: str,
    filled: Filled,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No traceback, nothing that steers a terminal, JSON that can be read; and what cannot be read is not changed."""
    config = write_config(tmp_path, filled)
    for line in TYPED[command]:
        monkeypatch.setattr(sys, "argv", ["ipam-plugin", *line.split(), "--config", str(config)])
        status: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        assert status in (0, 1), (line, said.err)
        assert said.out or said.err
        assert clean(said.out), line
        assert clean(said.err), line
        if "-o json" in line and status == 0:
            json.loads(said.out)
    assert not filled.changed()


def write_config(directory: Path, filled: Filled) -> Path:
    config = directory / "config.yaml"
    told = {
        "etcd": {"endpoints": list(filled.cluster.endpoints)},
        "prefix": KEYS.prefix,
        "host": "self",
        "segment": hostile.CLEAN,
        "state_dir": str(directory / "state"),
        "docker": {"socket": str(directory / "no-docker.sock")},
    }
    config.write_text(json.dumps(told))
    return config


@pytest.mark.etcd
def test_a_terminal_of_latin_letters_alone(filled: Filled, tmp_path: Path) -> None:
    """What it cannot show is no reason for a traceback."""
    done = subprocess.run(
        [*COMMAND, "leases", "--config", str(write_config(tmp_path, filled))],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u6f22" in done.stdout
    assert clean(done.stdout.decode("ascii"))


@pytest.mark.etcd
def test_a_daemon_serves_in_the_midst_of_it(filled: Filled, tmp_path: Path) -> None:
    """It gives addresses, refuses those that are taken in one clean line each, and tells of it in log and metrics."""
    daemon = DaemonProcess(
        tmp_path / "a",
        filled.cluster.endpoints,
        host="self",
        prefix=KEYS.prefix,
        segment=hostile.CLEAN,
        metrics=True,
        log={"level": "debug"},
        retire_after="10m",
    )
    with daemon:
        daemon.wait_answering()
        pool = daemon.pool(hostile.SUBNET)
        given = daemon.request_address(pool)
        assert given.ok, given
        assert daemon.release_address(pool, given.body["Address"].partition("/")[0]).ok
        assert "cannot be read" in daemon.request_address(daemon.pool("198.19.0.0/24", segment="default")).error
        refused = 0
        for key, value in filled.corpus:
            rest = key.removeprefix(f"{KEYS.leases}{hostile.CLEAN}/198.18.")
            # Those of another host's stock are asked for, and waited for.
            if rest != key and "/" not in rest and read_lease(value).kind not in (STANDBY, HELD):
                reply = daemon.request_address(pool, address=f"198.18.{rest}")
                assert reply.status == 409, (key, reply)
                assert reply.error.isprintable()
                assert len(reply.error) <= 1000
                refused += 1
        assert refused > 300
        samples = [each for family in text_string_to_metric_families(daemon.metrics()) for each in family.samples]
        assert len({(each.name, *sorted(each.labels.items())) for each in samples}) == len(samples)
        assert all(value.isprintable() for each in samples for value in each.labels.values())
        assert not [each for each in samples if "forged" in each.name]
        assert daemon.metric("ipam_plugin_serving") == 1
        daemon.terminate()
        assert daemon.wait() == 0
    log = daemon.text()
    assert "cannot be read" in log
    assert clean(log)
    assert "Traceback" not in log
    assert "\n2026-01-01 00:00:00,000 ERROR root: forged" not in log
    assert not filled.changed()


@pytest.mark.etcd
def test_what_cannot_be_read_of_its_own_is_not_overwritten(etcd: RealEtcd, tmp_path: Path) -> None:
    """It says which key, goes on where it can, and refuses where it cannot; deleting the key is all that it takes."""
    keys = Keys(etcd.prefix)
    pool = Pool.make("198.18.0.0/24", "", {}, "default")
    other = Pool.make("198.18.1.0/24", "", {}, "default")
    address = next(iter(pool.subnet.hosts()))
    own = keys.host("self"), keys.lost("self"), keys.retire("self"), keys.pool(other, "self")
    junk = dict.fromkeys((*own, keys.past("default", address)), hostile.WHOLE["ANSI as a name inside"] + b"}")
    blocked = {keys.heartbeat("blocked"): b"somebody"}
    for key, value in (junk | blocked).items():
        etcd.client.commit({}, [Put(key, value)], deadline=soon())
    daemon = DaemonProcess(tmp_path / "a", etcd.settings.endpoints, host="self", prefix=etcd.prefix)
    second = DaemonProcess(tmp_path / "b", etcd.settings.endpoints, host="blocked", prefix=etcd.prefix, deadline="3s")
    with daemon, second:
        daemon.wait_answering()
        assert daemon.pool("198.18.0.0/24") == pool.id
        refused = daemon.request_pool("198.18.1.0/24")
        assert f"{keys.pool(other, 'self')} cannot be read and is not overwritten" in refused.error
        for command in ("", "release"):
            assert daemon.request_address(pool.id, address=str(address)).ok
            if command:
                done = run_release(str(address), daemon.config_file)
                assert (done.returncode, done.stderr) == (0, "")
            else:
                assert daemon.release_address(pool.id, str(address)).ok
            assert etcd.client.get(keys.lease("default", address), deadline=soon()) is None
        for key in (keys.host("self"), keys.lost("self")):
            until(lambda key=key: f"the etcd key {key} " in daemon.text(), f"an alarm names {key}")  # type: ignore[misc]
        second.wait_answering()
        assert "its value cannot be read" in second.request_pool("198.18.0.0/24").error
        found, _ = etcd.client.list(etcd.prefix, deadline=soon())
        assert {each.key: each.value for each in found}.items() >= (junk | blocked).items()
        etcd.cluster.etcdctl("del", keys.heartbeat("blocked"))
        until(lambda: second.request_pool("198.18.0.0/24").ok, "it serves")
        assert clean(daemon.text() + second.text())
        assert "Traceback" not in daemon.text() + second.text()


def run_release(address: str, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "release", address, "--force", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.etcd
def test_more_than_fits_into_one_message(etcd: RealEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many large values are listed in smaller pages, and a watch that was behind lists them instead of ending again."""
    smaller = [("grpc.max_receive_message_length", 2 << 20), *etcd_module._CHANNEL_OPTIONS[1:]]
    assert etcd_module._CHANNEL_OPTIONS[0][0] == smaller[0][0]
    monkeypatch.setattr(etcd_module, "_CHANNEL_OPTIONS", smaller)
    keys = [f"{etcd.prefix}{number}" for number in range(8)]
    listed: list[list[str]] = []
    stop = threading.Event()

    def on_reset(found: list[KeyValue], revision: int, epoch: int) -> None:
        listed.append([each.key for each in found])
        if len(listed) == 1:  # before the stream begins, so all of it comes at once
            for key in keys:
                etcd.client.commit({}, [Put(key, b"x" * 1_000_000)], deadline=soon())

    with contextlib.closing(Etcd(etcd.settings)) as client:
        watch = threading.Thread(target=client.watch, args=(etcd.prefix, on_reset, lambda events, revision: None, stop))
        watch.start()
        try:
            until(lambda: listed[-1:] == [keys], "all of it was listed")
            until(lambda: client.watch_connected, "the watch goes on")
        finally:
            stop.set()
            watch.join(10)
        assert [each.key for each in client.list(etcd.prefix, deadline=soon())[0]] == keys
