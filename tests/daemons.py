"""Real daemon processes for tests: `python -m ipam_plugin serve`, each a host of its own, asked as Docker asks.

A daemon is gunicorn's master and its worker, in a process group of their own. Like the etcd members they die with
this process (etcd_server.start_process), so that nothing survives pytest, however it ends.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from etcd_server import free_ports, start_process, stop_process, until

#: The command as a user types it. `python -m` puts the working directory on sys.path, and we start in any.
COMMAND = (sys.executable, "-m", "ipam_plugin")
ROOT = Path(__file__).parent.parent

START_SECONDS = 60.0  # eight of them start at once on two cores
PATIENCE = 45.0  # seconds; an answer that takes longer has not come

GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}


def endpoint(mac: str) -> dict[str, str]:
    """The options with which an engine asks for a container's address."""
    return {"com.docker.network.endpoint.macaddress": mac}


class Reply(NamedTuple):
    """An answer, and how long it took. `body` is {} where there was no JSON object."""

    status: int
    body: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def error(self) -> str:
        """The sentence, '' for a success. Both fields carry it, since engines read different ones."""
        if self.ok:
            return ""
        assert self.body["Err"] == self.body["Error"]
        sentence = self.body["Err"]
        assert isinstance(sentence, str)
        assert sentence
        assert "\n" not in sentence
        return sentence


class NotSent(Exception):
    """Nobody listens there, so the daemon never saw the request."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("plugin.moby.localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotSent(str(error)) from None


def ask(path: str | Path, method: str, body: Mapping[str, Any] | None = None, timeout: float = PATIENCE) -> Reply:
    """One call as an engine makes it: POST, no Content-Type, and an empty body where there are no arguments.

    Raises NotSent, or OSError or http.client.HTTPException when the answer did not come: the outcome is unknown.
    """
    began = time.monotonic()
    data = b"" if body is None else json.dumps(body).encode() + b"\n"
    connection = _UnixConnection(str(path), timeout)
    try:
        connection.putrequest("POST", f"/{method}", skip_accept_encoding=True)
        connection.putheader("User-Agent", "Go-http-client/1.1")
        connection.putheader("Content-Length", str(len(data)))
        connection.putheader("Accept", "application/vnd.docker.plugins.v1.2+json")
        connection.endheaders(data)
        answer = connection.getresponse()
        said = answer.read()
        if not said:
            raise http.client.IncompleteRead(said)
        decoded = json.loads(said)
        return Reply(answer.status, decoded if isinstance(decoded, dict) else {}, time.monotonic() - began)
    finally:
        connection.close()


class DaemonProcess:
    """One daemon: its files in `directory`, the same ones at every start. A context manager; `kill` at the end."""

    def __init__(
        self, directory: Path, endpoints: Sequence[str], *, host: str, prefix: str, state: str = "state", **config: Any
    ) -> None:
        """`config`: further keys of the configuration. `metrics`: a port of loopback, True for a free one."""
        directory.mkdir(parents=True, exist_ok=True)
        self.host = host
        self.socket = directory / "s"
        self.state = directory / state
        self.log = directory / "log"
        self.config_file = directory / "config.yaml"
        metrics = config.pop("metrics", False)
        self.metrics_port = free_ports(1)[0] if metrics is True else int(metrics)
        etcd = {"endpoints": list(endpoints), **config.pop("etcd", {})}
        self.config: dict[str, Any] = {
            "etcd": etcd,
            "host": host,
            "socket": str(self.socket),
            "state_dir": str(self.state),
            "prefix": prefix,
            "probe": "off",
            "boot_wait": "0s",  # of a host that booted long ago
            "metrics": {"listen": f"127.0.0.1:{self.metrics_port}" if self.metrics_port else ""},
            **config,
        }
        self.config_file.write_text(json.dumps(self.config))  # JSON is YAML
        self.deadline = float(str(self.config.get("deadline", "15s")).removesuffix("s"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DaemonProcess:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    # ---- its processes

    def start(self, command: Sequence[str] = COMMAND, pass_fds: Sequence[int] = (), **environment: str) -> None:
        """Start it and return at once. `command` takes the arguments of ipam-plugin."""
        assert self._process is None
        # What another tool's variables say (a proxy, a systemd that runs the tests) is not meant for it.
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        self._process = start_process(
            [*command, "serve", "--config", str(self.config_file)],
            self.log,
            env={**kept, "PYTHONPATH": path, **environment},
            pass_fds=pass_fds,
        )

    @property
    def pid(self) -> int:
        """gunicorn's master."""
        assert self._process is not None
        return self._process.pid

    def processes(self) -> list[int]:
        """All that live of its process group, zombies left out."""
        return [] if self._process is None else group(self._process.pid)

    def kill(self) -> None:
        """As a power cut does: SIGKILL to all of it at once."""
        if self._process is None:
            return
        number = self._process.pid
        stop_process(self._process)
        until(lambda: not group(number), f"the processes of {self.host} are gone")
        self._process = None

    def terminate(self) -> None:
        """Ask it to stop, as systemd does, and return at once."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, seconds: float = 30.0) -> int:
        """Until it has ended by itself: its exit status. Whatever it left behind fails the test."""
        assert self._process is not None
        number = self._process.pid
        try:
            status = self._process.wait(seconds)
            until(lambda: not group(number), f"the processes of {self.host} are gone")
        except BaseException:
            self.kill()
            raise
        self._process = None
        return status

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_answering(self, seconds: float = START_SECONDS) -> None:
        """Until it answers the first of the calls without a body."""

        def answering() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(f"{self.host} ended with {self._process.returncode}:\n{self.text()[-3000:]}")
            # Until the worker has loaded, the socket takes the connection and nobody answers.
            with contextlib.suppress(NotSent, OSError, http.client.HTTPException):
                return ask(self.socket, "Plugin.Activate", timeout=START_SECONDS).ok
            return False

        until(answering, f"{self.host} answers", seconds)

    # ---- as Docker asks

    def call(self, method: str, body: Mapping[str, Any] | None = None) -> Reply:
        return ask(self.socket, method, body)

    def request_pool(self, subnet: str, ip_range: str = "", **options: str) -> Reply:
        return self.call(
            "IpamDriver.RequestPool",
            {"AddressSpace": "ipam-plugin-local", "Pool": subnet, "SubPool": ip_range, "Options": options, "V6": False},
        )

    def pool(self, subnet: str, ip_range: str = "", **options: str) -> str:
        """The PoolID, from a RequestPool that has to succeed."""
        reply = self.request_pool(subnet, ip_range, **options)
        assert reply.ok, f"{self.host}: {reply.error}"
        pool_id = reply.body["PoolID"]
        assert isinstance(pool_id, str)
        return pool_id

    def request_address(self, pool: str, mac: str = "02:00:00:00:00:01", address: str = "") -> Reply:
        body = {"PoolID": pool, "Address": address, "Options": endpoint(mac)}
        return self.call("IpamDriver.RequestAddress", body)

    def release_address(self, pool: str, address: str) -> Reply:
        return self.call("IpamDriver.ReleaseAddress", {"PoolID": pool, "Address": address})

    def metric(self, name: str) -> float:
        """A metric, 0 when it was never set; without labels in `name`, the sum over all of them."""
        beginnings = (f"{name} ", f"{name}{{")
        return sum(
            float(line.rpartition(" ")[2]) for line in self.metrics().splitlines() if line.startswith(beginnings)
        )

    def metrics(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=10)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()


def group(number: int) -> list[int]:
    """The processes of a process group that live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(process_group) == number and state not in "ZX":
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def fleet(
    directory: Path,
    endpoints: Sequence[str],
    count: int,
    *,
    prefix: str,
    command: Sequence[str] = COMMAND,
    **config: Any,
) -> Iterator[list[DaemonProcess]]:
    """So many Docker hosts on one etcd, all of them answering. Each names another member first."""
    turned = [[*endpoints[turn:], *endpoints[:turn]] for turn in range(len(endpoints))]
    daemons = [
        DaemonProcess(
            directory / f"h{number}", turned[number % len(turned)], host=f"h{number}", prefix=prefix, **config
        )
        for number in range(count)
    ]
    try:
        for daemon in daemons:
            daemon.start(command)
        for daemon in daemons:
            daemon.wait_answering()
        yield daemons
    finally:
        for daemon in daemons:
            daemon.kill()


def run(*arguments: str, config: Path | None = None, seconds: float = 30.0) -> subprocess.CompletedProcess[str]:
    """The command itself, to its end."""
    named = ("--config", str(config)) if config else ()
    return subprocess.run(
        [*COMMAND, *arguments, *named],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
