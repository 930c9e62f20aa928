"""`--embedded-etcd`: the machine's own etcd program as a child of the daemon, for one host and for trying out.

The rest of the program does not know about it: it reaches this etcd over loopback like any other.
"""

from __future__ import annotations

import collections
import http.client
import ipaddress
import json
import logging
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from ipam_plugin.errors import ConfigError

log = logging.getLogger(__name__)

_QUOTA_BYTES = 1 << 30
_RESTART_DELAY = 0.2, 10.0
"""Seconds before the first restart and at most; doubled each time, forgotten after a good minute."""

# Run by `python -c` between the daemon and etcd: etcd must not outlive the daemon, whatever ends it, or it
# would hold the port and the data of the next one. PR_SET_PDEATHSIG (prctl(2)) has to be set in the child
# itself; a preexec_fn would run Python in a fork of a process full of gRPC's threads. SIGKILL, because
# nothing is left that could wait for more, and etcd recovers from its log. When the daemon ended before
# prctl, no signal comes, so the parent is looked at afterwards.
_SHIM = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG): " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the daemon has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedEtcd:
    """One etcd member with its data in `state_dir`/etcd, serving clients at `client_url` on loopback.

    Its peer listener is a Unix socket in the same directory (mode 0700): no second port that could be
    taken, and none that other users of the machine could talk Raft to.
    """

    def __init__(self, state_dir: str | os.PathLike[str], client_url: str) -> None:
        """Raises ConfigError when `client_url` is not http:// on a loopback address."""
        self._data = Path(state_dir) / "etcd"
        self._host, self._port = _loopback(client_url)
        self._url = f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"
        self._binary = ""
        self._stop = threading.Event()
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._failure = ""
        self._last_words: collections.deque[str] = collections.deque(maxlen=3)

    @property
    def pid(self) -> int:
        """The child's process id; 0 while there is none."""
        return self._pid

    def start(self, timeout: float = 30.0) -> None:
        """Starts etcd and waits until it serves; from then on it is restarted whenever it ends.

        Raises ConfigError, with a sentence, when it cannot: no etcd program, the port taken, the data
        directory not usable, or whatever etcd itself said before it ended. At most `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        self._binary = shutil.which("etcd") or ""
        if not self._binary:
            raise ConfigError(
                "--embedded-etcd: there is no program `etcd` on this machine; install it (Debian and Ubuntu: "
                "apt-get install etcd-server, on older ones etcd), or name an etcd elsewhere in etcd.endpoints"
            )
        try:
            self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._data.chmod(0o700)
        except OSError as error:
            raise ConfigError(f"state_dir: {self._data} cannot be used: {error.strerror}") from error
        self._await_port(deadline)
        self._wake = os.eventfd(0)
        # The kernel sends the parent-death signal when the *thread* that made the child ends, so it is made
        # by one that lives as long as the daemon.
        self._thread = threading.Thread(target=self._supervise, name="embedded-etcd", daemon=True)
        self._thread.start()
        while not self._serving():
            if self._failure or time.monotonic() > deadline:
                failure = self._failure or f"it did not serve within {timeout:g} s: {self._said()}"
                self.stop()
                raise ConfigError(f"--embedded-etcd: {self._binary} did not start: {failure}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends etcd: SIGTERM, after 5 s SIGKILL. Returns when it is gone. May be called again."""
        self._stop.set()
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            self._thread = None

    def _command(self) -> list[str]:
        # The peer URL's "host" is a file name relative to the working directory, which is the data's. It is
        # the same at every start, because etcd compares it with the one in its data.
        peer = "unix://peer.sock:0"
        return [
            self._binary,
            "--name=ipam-plugin",
            f"--data-dir={self._data}/data",
            f"--listen-client-urls={self._url}",
            f"--advertise-client-urls={self._url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=ipam-plugin={peer}",
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1h",
            f"--quota-backend-bytes={_QUOTA_BYTES}",
            "--logger=zap",
            "--log-outputs=stderr",
            "--log-level=warn",
        ]

    def _await_port(self, deadline: float) -> None:
        """Waits for an etcd whose daemon was just killed to be gone (milliseconds), then no longer."""
        deadline = min(deadline, time.monotonic() + 5)
        while True:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self._host, self._port))
                    probe.listen()
                    return
                except OSError as error:
                    if time.monotonic() > deadline or self._stop.is_set():
                        raise ConfigError(
                            f"etcd.endpoints: {self._url} cannot be served by --embedded-etcd: "
                            f"{error.strerror} (`ss -ltnp sport = :{self._port}` shows who has the port); if an "
                            "etcd runs there already, start without --embedded-etcd to use it, else name "
                            "another port"
                        ) from error
            self._stop.wait(0.05)

    def _supervise(self) -> None:
        delay, longest = _RESTART_DELAY
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._await_port(began + 5)
                status = self._run()
                ended = f"ended with {_status(status)}: {self._said()}"
            except (OSError, ConfigError) as error:
                ended = str(error)
            if self._stop.is_set():
                return
            self._failure = ended
            if time.monotonic() - began > 60:
                delay, longest = _RESTART_DELAY
            log.error("the embedded etcd %s; it is started again in %.1f s", ended, delay)
            self._stop.wait(delay)
            delay = min(2 * delay, longest)

    def _run(self) -> int:
        """One life of the child, from its start to its end; returns its exit status as Popen does."""
        self._last_words.clear()
        # No variable of the environment reaches etcd: it would take every ETCD_… for an option.
        environ = {"ETCD_UNSUPPORTED_ARCH": "arm64"} if platform.machine() == "aarch64" else {}
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *self._command()],
            cwd=self._data,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Ctrl-C in the daemon's terminal is the daemon's; it stops etcd when nobody needs it any more.
            start_new_session=True,
        )
        self._pid = child.pid
        assert child.stderr is not None
        with child.stderr as stream:
            try:
                self._attend(child.pid, stream.fileno())
            finally:
                if child.poll() is None:
                    child.terminate()
                    try:
                        child.wait(5)
                    except subprocess.TimeoutExpired:
                        child.kill()
                status = child.wait()
                self._pid = 0
        return status

    def _attend(self, pid: int, log_output: int) -> None:
        """Passes the child's log on until the child has ended or `stop` was called."""
        ended = os.pidfd_open(pid)
        try:
            os.set_blocking(log_output, False)
            poll = select.poll()
            for source in (log_output, ended, self._wake):
                poll.register(source, select.POLLIN)
            pending = b""
            while not self._stop.is_set():
                ready = {source for source, _ in poll.poll()}
                if log_output in ready:
                    pending = self._listen(log_output, pending, poll)
                elif ended in ready:
                    return
        finally:
            os.close(ended)

    def _listen(self, descriptor: int, pending: bytes, poll: select.poll) -> bytes:
        """Passes whole lines of etcd's log on to ours; returns the beginning of the next one."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return pending
        if not data:
            poll.unregister(descriptor)
        *lines, rest = (pending + data).split(b"\n")
        for line in lines:
            level, text = _log_line(line.decode(errors="replace"))
            if text:
                self._last_words.append(text)
                log.log(level, "etcd: %s", text)
        return rest[: 1 << 16]

    def _said(self) -> str:
        return "; ".join(self._last_words) or "it said nothing"

    def _serving(self) -> bool:
        """Whether our child answers; /health is the same in every etcd from 3.3 on and needs no login."""
        if not self._pid:
            return False
        connection = http.client.HTTPConnection(self._host, self._port, timeout=1)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _loopback(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if parts.scheme != "http" or not loopback or parts.port is None:
        raise ConfigError(
            f"etcd.endpoints[0]: expected http:// on a loopback address with --embedded-etcd (like "
            f"http://127.0.0.1:2379), found {url!r}: it has neither TLS nor users, so nobody else may reach it"
        )
    return host, parts.port


def _log_line(line: str) -> tuple[int, str]:
    """Level and text of a line of etcd's log (zap's JSON, or plain before its logger is set up)."""
    try:
        entry = json.loads(line)
        level = logging.getLevelNamesMapping().get(str(entry["level"]).upper(), logging.ERROR)
        text = f"{entry['msg']}: {entry['error']}" if "error" in entry else str(entry["msg"])
    except (ValueError, KeyError, TypeError):
        return logging.WARNING, line.strip()
    return level, " ".join(text.split())


def _status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
