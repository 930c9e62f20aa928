"""Real etcd processes for tests, on loopback, with everything gone at the end.

Each member runs in a process group of its own and is told by the kernel to die with the thread that started it
(PR_SET_PDEATHSIG), so that a killed pytest leaves nothing behind. That is why members are started from the main
thread only.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ipam_plugin.etcd import EtcdSettings

ETCD = shutil.which("etcd")
ETCDCTL = shutil.which("etcdctl")

START_SECONDS = 30.0

# prctl, then exec. If the parent has died already, nobody will send the signal.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def until(condition: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
    """The first true value of `condition`; fails the test when it does not come in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


def start_process(command: Sequence[str], log: Path, **more: Any) -> subprocess.Popen[bytes]:
    """A process that dies with this one, its output in `log`."""
    assert threading.current_thread() is threading.main_thread(), "its life is bound to the thread that starts it"
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **more,
        )


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group, also when it is stopped."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


class Certificates:
    """A CA, a server certificate for 127.0.0.1 and localhost, and client certificates by common name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._sign("ca", "/CN=test CA", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
        self.ca = directory / "ca.pem"
        self.server = self.issue("server", "subjectAltName=IP:127.0.0.1,DNS:localhost")

    def issue(self, name: str, *extensions: str) -> tuple[str, str]:
        """(certificate, key) files for this common name."""
        usage = "extendedKeyUsage=serverAuth,clientAuth"
        self._sign(name, f"/CN={name}", "basicConstraints=critical,CA:FALSE", usage, *extensions, ca=True)
        return str(self._directory / f"{name}.pem"), str(self._directory / f"{name}.key")

    def _sign(self, name: str, subject: str, *extensions: str, ca: bool = False) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-days", "2", "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        for extension in extensions:
            command += ["-addext", extension]
        if ca:
            command += ["-CA", "ca.pem", "-CAkey", "ca.key"]
        subprocess.run(command, cwd=self._directory, check=True, capture_output=True, timeout=30)


class Member:
    """One etcd process; its data and ports stay the same over restarts."""

    def __init__(self, name: str, data: Path, command: Sequence[str], endpoint: str, metrics_port: int) -> None:
        self.name = name
        self.data = data
        self.endpoint = endpoint
        self.log = data.with_suffix(".log")
        self._command = command
        self._metrics_port = metrics_port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and return at once; `EtcdCluster.wait_ready` waits."""
        assert not self.running
        self._process = start_process(self._command, self.log)

    def kill(self) -> None:
        """As a power cut does (SIGKILL)."""
        if self._process is not None:
            stop_process(self._process)

    def pause(self) -> None:
        """It keeps its connections and says nothing (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    @property
    def healthy(self) -> bool:
        """It has a leader and answers a read that needs the quorum."""
        return '"true"' in self._http("/health")

    @property
    def leads(self) -> bool:
        return "\netcd_server_is_leader 1" in self.metrics()

    def metrics(self) -> str:
        """What it serves for Prometheus, '' when it does not answer."""
        return self._http("/metrics")

    def _http(self, path: str) -> str:
        if not self.running:
            return ""
        connection = http.client.HTTPConnection("127.0.0.1", self._metrics_port, timeout=1)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()


class EtcdCluster:
    """A cluster of `size` members, ready when the constructor returns. A context manager; `close` ends everything.

    `tls`: clients speak TLS; "mutual": they also need one of `certificates`. `arguments` go to every member.
    """

    def __init__(
        self, size: int = 1, *, tls: Literal["", "server", "mutual"] = "", arguments: Sequence[str] = ()
    ) -> None:
        assert ETCD is not None
        self._directory = Path(tempfile.mkdtemp(prefix="etcd-test-"))
        self._scheme = "https" if tls else "http"
        self._mutual = tls == "mutual"
        self._authenticated = False
        self.certificates: Certificates | None = None
        self.members: list[Member] = []
        try:
            if tls:
                self.certificates = Certificates(self._directory / "tls")
            for last in (False, False, True):
                self._set_up(size, arguments)
                try:
                    self.wait_ready()
                    return
                except AssertionError:
                    if last or all(member.running for member in self.members):
                        raise
                    self._stop_members()  # another process took one of the ports: choose others
        except BaseException:
            self.close()
            raise

    def _set_up(self, size: int, arguments: Sequence[str]) -> None:
        assert ETCD is not None
        ports = [free_ports(3) for _ in range(size)]
        initial = ",".join(f"m{n}=http://127.0.0.1:{peer}" for n, (_, peer, _) in enumerate(ports))
        self.members = []
        for number, (client, peer, metrics) in enumerate(ports):
            name, endpoint = f"m{number}", f"{self._scheme}://127.0.0.1:{client}"
            data = self._directory / f"{name}-{client}"
            command = [ETCD, "--name", name, "--data-dir", str(data), "--logger", "zap", "--log-level", "warn"]
            command += ["--listen-client-urls", endpoint, "--advertise-client-urls", endpoint]
            command += ["--listen-peer-urls", f"http://127.0.0.1:{peer}"]
            command += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}", "--initial-cluster", initial]
            command += ["--listen-metrics-urls", f"http://127.0.0.1:{metrics}"]
            if self.certificates is not None:
                certificate, key = self.certificates.server
                command += ["--cert-file", certificate, "--key-file", key]
                if self._mutual:
                    command += ["--client-cert-auth", "--trusted-ca-file", str(self.certificates.ca)]
            member = Member(name, data, [*command, *arguments], endpoint, metrics)
            self.members.append(member)
            member.start()
        self._initial = initial

    def save(self) -> Path:
        """A backup of what is in etcd now."""
        backup = self._directory / "backup"
        self.etcdctl("snapshot", "save", str(backup))
        return backup

    def restore(self, backup: Path, token: str = "") -> None:
        """The only member, which has ended, starts again with a backup's data. `token`: as another cluster."""
        assert ETCDCTL is not None
        (member,) = self.members
        (peer,) = [each.partition("=")[2] for each in self._initial.split(",")]
        shutil.rmtree(member.data)
        command = [ETCDCTL, "snapshot", "restore", str(backup), "--data-dir", str(member.data), "--name", member.name]
        command += ["--initial-cluster", self._initial, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster-token", token or "etcd-cluster"]
        environment = os.environ | {"ETCDCTL_API": "3"}
        subprocess.run(command, check=True, capture_output=True, timeout=30, env=environment)
        member.start()
        self.wait_ready()

    def __enter__(self) -> EtcdCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._stop_members()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _stop_members(self) -> None:
        for member in self.members:
            member.kill()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    def settings(self, **changes: Any) -> EtcdSettings:
        """Settings for all members; with mutual TLS, the certificate of `common_name` goes with them."""
        values: dict[str, Any] = {"endpoints": self.endpoints}
        common_name = changes.pop("common_name", "root")
        if self.certificates is not None:
            values["ca_cert"] = str(self.certificates.ca)
            if self._mutual:
                values["cert"], values["key"] = self.certificates.issue(common_name)
        return EtcdSettings(**(values | changes))

    def wait_ready(self) -> None:
        """Until every running member is healthy."""

        def ready() -> bool:
            dead = [member for member in self.members if not member.running]
            if dead:
                raise AssertionError(f"etcd {dead[0].name} ended:\n{dead[0].log.read_text()[-3000:]}")
            return all(member.healthy for member in self.members)

        until(ready, "etcd is healthy", START_SECONDS)

    def leader(self) -> Member:
        """The member that leads, once one does."""
        leader = until(lambda: next((m for m in self.members if m.leads), None), "a leader", START_SECONDS)
        assert isinstance(leader, Member)
        return leader

    def etcdctl(self, *arguments: str) -> str:
        """Run etcdctl as root against the whole cluster, and give its output."""
        assert ETCDCTL is not None
        command = [ETCDCTL, "--endpoints", ",".join(self.endpoints), "--command-timeout=10s"]
        settings = self.settings()
        if settings.ca_cert:
            command += ["--cacert", settings.ca_cert]
        if settings.cert and settings.key:
            command += ["--cert", settings.cert, "--key", settings.key]
        elif self._authenticated:
            command += ["--user", "root:root"]
        return subprocess.run(
            [*command, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
            env=os.environ | {"ETCDCTL_API": "3"},
        ).stdout

    def enable_auth(self, user: str, password: str, prefix: str) -> None:
        """Turn authentication on: `root` (password `root`) and a user who may do everything under `prefix`."""
        for command in (
            ("role", "add", "root"),
            ("user", "add", "root:root"),
            ("user", "grant-role", "root", "root"),
            ("role", "add", "ipam"),
            ("role", "grant-permission", "ipam", "readwrite", prefix, "--prefix=true"),
            ("user", "add", f"{user}:{password}"),
            ("user", "grant-role", user, "ipam"),
            ("auth", "enable"),
        ):
            self.etcdctl(*command)
        self._authenticated = True
