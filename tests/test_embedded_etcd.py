"""The embedded etcd: a real etcd program, started, killed, restarted, and never left behind."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcd_server import until
from ipam_plugin import embedded_etcd
from ipam_plugin.embedded_etcd import EmbeddedEtcd
from ipam_plugin.errors import ConfigError

pytestmark = pytest.mark.etcd


@pytest.fixture
def url() -> str:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def etcd(tmp_path: Path, url: str) -> Iterator[EmbeddedEtcd]:
    """An embedded etcd that serves, and is gone after the test."""
    server = EmbeddedEtcd(tmp_path, url)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def etcdctl(url: str, *arguments: str) -> str:
    return subprocess.run(
        ["etcdctl", "--endpoints", url, *arguments],
        env={"ETCDCTL_API": "3", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout.strip()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path, url: str) -> None:
    """The register of a single host survives the daemon's restart, and stop() leaves no process."""
    for run in range(2):
        server = EmbeddedEtcd(tmp_path, url)
        try:
            server.start()
            pid = server.pid
            assert alive(pid)
            if run == 0:
                etcdctl(url, "put", "/a", "b")
            assert etcdctl(url, "get", "/a", "--print-value-only") == "b"
        finally:
            server.stop()
        assert not alive(pid)
        assert server.pid == 0
        server.stop()


def test_the_data_is_for_the_daemon_alone(etcd: EmbeddedEtcd, tmp_path: Path, url: str) -> None:
    """The data directory is 0700, and the one TCP port is the clients' on loopback: peers use a Unix socket in it."""
    assert stat.S_IMODE((tmp_path / "etcd").stat().st_mode) == 0o700
    assert any(stat.S_ISSOCK(path.stat().st_mode) for path in (tmp_path / "etcd").iterdir())
    rows = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True, timeout=10).stdout
    ours = [row.split()[3] for row in rows.splitlines() if f"pid={etcd.pid}," in row]
    assert ours == [url.removeprefix("http://")]


def test_a_wider_directory_is_narrowed(tmp_path: Path, url: str) -> None:
    """Whoever made it before, other users do not read the register's files."""
    (tmp_path / "etcd").mkdir(mode=0o755)
    server = EmbeddedEtcd(tmp_path, url)
    try:
        server.start()
    finally:
        server.stop()
    assert stat.S_IMODE((tmp_path / "etcd").stat().st_mode) == 0o700


def test_it_has_a_quota_and_compacts(etcd: EmbeddedEtcd) -> None:
    """Nothing in etcd grows without bound."""
    command = Path(f"/proc/{etcd.pid}/cmdline").read_text().split("\0")
    assert "--auto-compaction-retention=1h" in command
    assert "--quota-backend-bytes=1073741824" in command


def test_options_from_the_environment_do_not_reach_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable meant for the machine's own etcd (a configuration file, say) is not meant for this one."""
    monkeypatch.setenv("ETCD_CONFIG_FILE", "/no/such/file")
    server = EmbeddedEtcd(tmp_path, url)
    try:
        server.start()
        assert b"ETCD_CONFIG_FILE" not in Path(f"/proc/{server.pid}/environ").read_bytes()
    finally:
        server.stop()


def test_it_is_started_again_when_it_dies(etcd: EmbeddedEtcd, url: str) -> None:
    """A killed child comes back by itself with its data."""
    etcdctl(url, "put", "/a", "b")
    first = etcd.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: etcd.pid not in (0, first), "the next child")
    until(lambda: _reads(url), "the data")
    assert not alive(first)


def _reads(url: str) -> bool:
    try:
        return etcdctl(url, "get", "/a", "--print-value-only") == "b"
    except subprocess.CalledProcessError:
        return False


_DAEMON = """
import sys, time
from ipam_plugin.embedded_etcd import EmbeddedEtcd
server = EmbeddedEtcd(sys.argv[1], sys.argv[2])
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "paused"])
def test_it_dies_with_its_daemon(tmp_path: Path, url: str, stopped: bool) -> None:
    """`kill -9` of the daemon leaves no etcd behind, not even a paused one, and the next daemon starts at once."""
    root = str(Path(embedded_etcd.__file__).parent.parent)
    daemon = subprocess.Popen(
        [sys.executable, "-c", _DAEMON, str(tmp_path), url],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    pid = 0
    try:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        etcdctl(url, "put", "/a", "b")
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        daemon.kill()
        server = EmbeddedEtcd(tmp_path, url)
        try:
            server.start()
            assert etcdctl(url, "get", "/a", "--print-value-only") == "b"
        finally:
            server.stop()
        until(lambda: not alive(pid), "the end of the first etcd", seconds=2)
    finally:
        daemon.kill()
        daemon.wait(timeout=10)
        daemon.stdout.close()
        if pid:
            kill(pid, signal.SIGKILL)


def test_a_child_that_does_not_listen_is_killed(etcd: EmbeddedEtcd) -> None:
    """stop() ends in bounded time also when etcd hangs (here: is paused)."""
    pid = etcd.pid
    os.kill(pid, signal.SIGSTOP)
    before = time.monotonic()
    etcd.stop()
    assert time.monotonic() - before < 8
    assert not alive(pid)


@pytest.mark.parametrize(
    "bad",
    ["http://10.0.0.1:2379", "https://127.0.0.1:2379", "http://example.org:2379", "http://0.0.0.0:2379", "http://127.0.0.1"],
)  # fmt: skip
def test_only_loopback_is_served(tmp_path: Path, bad: str) -> None:
    """An etcd without TLS and users is never reachable from other machines."""
    with pytest.raises(ConfigError, match=r"^etcd\.endpoints\[0\]: expected http:// on a loopback address"):
        EmbeddedEtcd(tmp_path, bad)


def test_localhost_and_ipv6_are_loopback(tmp_path: Path, url: str) -> None:
    """Both spellings an operator may choose are served."""
    for host in ("localhost", "[::1]"):
        server = EmbeddedEtcd(tmp_path / host, url.replace("127.0.0.1", host))
        try:
            server.start()
        finally:
            server.stop()


def test_a_missing_program_is_named_with_the_package(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries out reads what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no program `etcd`.*apt-get install etcd-server"):
        EmbeddedEtcd(tmp_path, url).start()


def test_a_port_that_somebody_has_is_named(tmp_path: Path, url: str) -> None:
    """Debian starts its own etcd on the same port: the sentence says how to find and how to use it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        other.listen()
        server = EmbeddedEtcd(tmp_path, url)
        with pytest.raises(ConfigError, match=r"Address already in use .*start without --embedded-etcd"):
            server.start(timeout=0.3)
        assert server.pid == 0


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path, url: str) -> None:
    """The path is in the sentence."""
    (tmp_path / "etcd").write_text("a file")
    with pytest.raises(ConfigError, match=r"^state_dir: .*/etcd cannot be used: File exists"):
        EmbeddedEtcd(tmp_path, url).start()


def test_what_etcd_says_before_it_ends_is_in_the_error(tmp_path: Path, url: str) -> None:
    """Broken data is refused in etcd's own words, and no process stays."""
    broken = tmp_path / "etcd" / "data" / "member"
    (broken / "snap").mkdir(parents=True)
    (broken / "wal").mkdir()
    (broken / "wal" / "0000000000000000-0000000000000000.wal").write_bytes(b"no log" * 500)
    server = EmbeddedEtcd(tmp_path, url)
    with pytest.raises(ConfigError, match=r"etcd did not start: ended with .*: \S"):
        server.start()
    assert server.pid == 0


def test_starting_and_stopping_leaves_nothing_open(tmp_path: Path, url: str) -> None:
    """No descriptor and no thread stays behind."""

    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = open_now()
    server = EmbeddedEtcd(tmp_path, url)
    server.start()
    server.stop()
    # Fewer, when what an earlier test had closed has ended meanwhile.
    until(lambda: all(now <= then for now, then in zip(open_now(), before, strict=True)), f"no more open than {before}")
