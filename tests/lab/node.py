"""A machine of the lab: a set of namespaces around a process 1, the commands and services that run in it,
and the cable to its switch."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
"""The project's top directory: commands in the lab start here and import from here."""


INIT = Path(__file__).with_name("init.py")


class LabError(Exception):
    """Something in the lab did not do what it was asked to; the text says what, with the end of its output."""


class CommandError(LabError):
    """A command ended with a status other than 0: `.status`, `.stdout`, `.stderr`."""

    def __init__(self, text: str, result: Result) -> None:
        super().__init__(text)
        self.status = result.status
        self.stdout = result.stdout
        self.stderr = result.stderr


class CommandTimeout(LabError):
    """A command did not end in time, and was killed."""


class ServiceEnded(LabError):
    """A service that was waited for has ended: waiting longer is no use."""


@dataclass(frozen=True)
class Result:
    """What a command left: exit status (negative: the signal that ended it), output, seconds it took."""

    status: int
    stdout: str
    stderr: str
    seconds: float


def until(condition: Callable[[], T], within: float, what: str, pause: float = 0.02) -> T:
    """The first true value of `condition`, asked again and again for at most `within` seconds.

    A LabError or OSError of the condition counts as "not yet", but ServiceEnded is raised. Raises LabError
    with `what` and the last such error.
    """
    deadline = time.monotonic() + within
    while True:
        last: Exception | None = None
        try:
            value = condition()
        except ServiceEnded:
            raise
        except (LabError, OSError, http.client.HTTPException) as error:
            last = error
        else:
            if value:
                return value
        if time.monotonic() >= deadline:
            because = f": {last}" if last else ""
            raise LabError(f"not within {within:g} s: {what}{because}") from last
        time.sleep(pause)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc_pid_stat(5), field 22); None: no such process.

    Process ids are used again, so a process is named by both. A zombie counts as gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def children(pid: int) -> list[int]:
    """The processes that a single-threaded process has started and not yet reaped."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def running(lab: str) -> dict[str, int]:
    """The machines of the lab of that name that are on, whoever owns it: the pid of each one's process 1."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
                argv = (entry / "cmdline").read_bytes().decode().split("\0")
                if argv[3] == str(INIT):
                    plan = json.loads(argv[4])
                    if plan["lab"] == lab:
                        found[str(plan["hostname"])] = int(entry.name)
    return found


def _memory(name: str) -> IO[bytes]:
    return os.fdopen(os.memfd_create(name), "w+b")


class Command:
    """A command that runs: `result(timeout)` waits for it, `kill()` ends it with what it started."""

    def __init__(
        self,
        argv: Sequence[str],
        what: str,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
    ) -> None:
        self.what = what
        # Files, not pipes: nothing blocks when nobody reads, and a grandchild that keeps its end open
        # cannot hold up the reader.
        self._out, self._err, source = (_memory(name) for name in ("out", "err", "in"))
        source.write((stdin or "").encode())
        source.seek(0)
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            list(argv),
            stdin=source,
            stdout=self._out,
            stderr=self._err,
            env=None if env is None else dict(env),
            start_new_session=True,
        )

    def done(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        # The command in the machine first: nsenter reaps it, and a PID namespace cannot end while one of
        # its processes waits to be reaped outside.
        for group in [*children(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
        self._process.wait()

    def result(self, timeout: float, check: bool = True) -> Result:
        """Waits at most `timeout` seconds. Raises CommandTimeout, and CommandError where `check` is set."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise CommandTimeout(f"{self.what}: not done after {timeout:g} s, killed; {self._tail()}") from None
        seconds = time.monotonic() - self._began
        texts = []
        for stream in (self._out, self._err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
        result = Result(self._process.returncode, texts[0], texts[1], seconds)
        if check and result.status != 0:
            raise CommandError(f"{self.what}: status {result.status}: {self._tail()}", result)
        return result

    def _tail(self) -> str:
        for stream in (self._err, self._out):
            stream.seek(0)
            text = stream.read().decode(errors="replace").strip()
            if text:
                return text[-2000:]
        return "no output"


class Service:
    """A process that stays: etcd, dockerd, the daemon. Its output goes to a log file that survives it."""

    def __init__(
        self, node: Node, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path, pass_fds: Sequence[int]
    ) -> None:
        self.name = name
        self.log = log
        self._node = node
        # A session of its own, so that no signal meant for another reaches it and its own do not spread.
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                # Not as nsenter's own child: nsenter stops when its child is stopped, and then reaps nothing.
                node.enter("sh", "-c", '"$@"; exit $?', "sh", *argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env),
                pass_fds=pass_fds,
                start_new_session=True,
            )
        self.pid: int = until(self._find, 10, f"{node.name}: {name} was started")

    def _find(self) -> int:
        if self._process.poll() is not None:
            raise ServiceEnded(f"{self._node.name}: {self.name} ended at once: {self.tail()}")
        return next((pid for shell in children(self._process.pid) for pid in children(shell)), 0)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def state(self) -> str:
        """The kernel's letter for it: R runs, S waits, D waits for a disk, T is stopped; "" is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] if self.alive else ""
        except OSError:
            return ""

    def tail(self, characters: int = 3000) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return text[-characters:] or "no output"

    def signal(self, number: int) -> None:
        """To the process alone (SIGSTOP, SIGCONT, SIGHUP …). No error when it is gone."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def family(self) -> list[int]:
        """Its pid and those of all its descendants, as seen from outside."""
        of: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    of.setdefault(parent, []).append(int(entry.name))
        found = [self.pid]
        for pid in found:
            found += of.get(pid, [])
        return found

    def kill(self, family: bool = False) -> None:
        """SIGKILL, and waits until it is gone; with `family` also to all it had started (as systemd does)."""
        if self.alive:
            for pid in self.family() if family else [self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait(10)

    def terminate(self, within: float = 20) -> int:
        """SIGTERM, and waits. Returns the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(within)

    def wait(self, within: float) -> int:
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self._node.name}: {self.name} did not end within {within:g} s: {self.tail()}") from None


class Node:
    """A machine of the lab. `directory` is its disk and its logs, which survive `power_off`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.services: dict[str, Service] = {}
        self._cables: list[tuple[Switch, str]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0

    # Life

    @property
    def on(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process 1, as seen from outside: `nsenter -t PID -a`, `/proc/PID/root`."""
        if not self.on:
            raise LabError(f"{self.name} is off")
        return self._pid

    def power_on(self, **plan: Any) -> None:
        """Makes the namespaces; see init.py for the plan. Raises LabError when that takes over 15 s."""
        if self.on:
            raise LabError(f"{self.name} is on")
        self.directory.mkdir(mode=0o755, exist_ok=True)
        owner = os.pidfd_open(os.getpid())
        try:
            plan |= {"hostname": self.name, "lab": self.directory.parent.name, "owner": owner}
            words = json.dumps(plan)
            # To a file: when its child is killed, unshare of util-linux 2.38 complains about a signal mask.
            with (self.directory / "init.log").open("ab") as log:
                process = subprocess.Popen(
                    [
                        *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--net", "--uts", "--ipc"),
                        *(sys.executable, "-I", "-S", str(INIT), words),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    pass_fds=[owner],
                    start_new_session=True,
                )
        finally:
            os.close(owner)
        assert process.stdout is not None
        with process.stdout as output:
            said = output.readline().decode().strip() if select.select([output], [], [], 15)[0] else ""
        if said != "ready":
            process.kill()
            process.wait()
            said = said or (self.directory / "init.log").read_text(errors="replace")[-500:].strip()
            raise LabError(f"{self.name}: its namespaces could not be made: {said or 'no answer'}")
        [self._pid] = children(process.pid)
        self._process = process

    def cut(self) -> None:
        """The first half of a power cut: does not wait until everything has ended."""
        if self.on:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def power_off(self) -> None:
        """A power cut: SIGKILL to everything in it at once; what it had not written to disk is lost."""
        process, self._process = self._process, None
        if process is None:
            return
        # The end of process 1 is the end of the PID namespace: the kernel kills and reaps all others
        # before it reports that one as gone.
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.kill(self._pid, signal.SIGKILL)
        for switch, port in self._cables:
            switch.unplug(port)
        self._cables.clear()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: process {self._pid} and its namespaces are still there") from None
        for service in self.services.values():
            service.wait(10)
        self.services.clear()

    # Commands

    @staticmethod
    def words(pid: int) -> list[str]:
        """What to put before a command to run it where `pid` is process 1, in the project's top directory."""
        # With -p, so that a power cut also ends what was started from outside.
        return ["nsenter", "-t", str(pid), "-m", "-u", "-i", "-n", "-p", "--", "env", "-C", str(ROOT)]

    def enter(self, *command: str) -> list[str]:
        """The words that run a command in this machine, in the project's top directory."""
        return [*self.words(self.pid), "setsid", *command]

    @staticmethod
    def environment() -> dict[str, str]:
        """What commands in a machine see: the caller's, less what would lead a client elsewhere."""
        others = ("DOCKER_", "ETCD_", "ETCDCTL_", "IPAM_PLUGIN_")
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(others) and not name.lower().endswith("_proxy")
        }
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        return env

    def run_async(self, *command: str, env: Mapping[str, str] | None = None, stdin: str | None = None) -> Command:
        """Starts a command and does not wait."""
        what = f"{self.name}: {' '.join(command)[:200]}"
        return Command(self.enter(*command), what, {**self.environment(), **(env or {})}, stdin)

    def run(
        self,
        *command: str,
        timeout: float = 30,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
    ) -> Result:
        """Runs a command to its end. Raises CommandError (unless `check` is False), CommandTimeout."""
        return self.run_async(*command, env=env, stdin=stdin).result(timeout, check)

    def sh(self, script: str, timeout: float = 30) -> str:
        """What a shell script prints."""
        return self.run("sh", "-c", script, timeout=timeout).stdout.strip()

    def serve(
        self, name: str, *command: str, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
    ) -> Service:
        """Starts a service. Its log is `directory/NAME.log`."""
        old = self.services.get(name)
        if old is not None and old.alive:
            raise LabError(f"{self.name}: {name} runs already")
        log = self.directory / f"{name}.log"
        service = Service(self, name, command, {**self.environment(), **(env or {})}, log, pass_fds)
        self.services[name] = service
        return service

    def post(self, socket_path: str, path: str, body: bytes = b"", timeout: float = 30) -> tuple[int, Any]:
        """One POST to a Unix socket of this machine, as Docker sends it. Returns status and decoded JSON."""
        return self.http("POST", socket_path, path, body, timeout)

    def http(
        self,
        method: str,
        socket_path: str,
        path: str,
        body: bytes | None = None,
        timeout: float = 30,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """One HTTP request to a Unix socket of this machine. Returns status and JSON (or text).

        Raises OSError, http.client.HTTPException.
        """
        with contextlib.closing(UnixConnection(f"/proc/{self.pid}/root{socket_path}", timeout)) as connection:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            try:
                return response.status, json.loads(text)
            except ValueError:
                return response.status, text

    # Network

    def ip(self, *lines: str) -> None:
        """Carries out lines of ip(8) in this machine's network namespace."""
        # The PID namespace stays the outer one: `netns PID` in a line means what it means to the caller.
        argv = ["nsenter", "-t", str(self.pid), "-n", "--", "ip", "-batch", "-"]
        Command(argv, f"{self.name}: ip", stdin="\n".join(lines) + "\n").result(15)

    def plug(self, switch: Switch, device: str, mac: str) -> None:
        """A cable from `device` (made here) to a port of the switch named like this machine."""
        switch.ip(
            # No interface of a lab is ever in the machine's own namespace, so no name can collide there.
            f"link add {self.name} type veth peer name {device} address {mac} netns {self.pid}",
            f"link set {self.name} master {switch.bridge}",
            f"link set {self.name} up",
        )
        self._cables.append((switch, self.name))

    def cut_off(self, switch: Switch | None = None) -> None:
        """Pulls the cable to the LAN (or to `switch`) at the switch: the device here loses its carrier."""
        for other, port in self._chosen(switch):
            other.ip(f"link set {port} down")

    def rejoin(self, switch: Switch | None = None) -> None:
        """Puts the cable back."""
        for other, port in self._chosen(switch):
            other.ip(f"link set {port} up")

    def _chosen(self, switch: Switch | None) -> Iterator[tuple[Switch, str]]:
        if not self._cables:
            raise LabError(f"{self.name} has no cable")
        for cable in self._cables:
            if cable[0] is (switch or self._cables[0][0]):
                yield cable

    def ping(self, address: str, within: float = 5) -> bool:
        """Whether the address answers an echo request, sent every second for at most `within` seconds."""
        deadline = time.monotonic() + within
        family = "ping6" if ":" in address else "ping"
        while True:
            left = deadline - time.monotonic()
            wait = str(max(1, min(2, round(left))))
            if self.run("busybox", family, "-c", "1", "-W", wait, address, timeout=10, check=False).status == 0:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)  # "Network is unreachable" comes at once

    def addresses(self, device: str | None = None) -> list[str]:
        """The global addresses of its interfaces (or one), with prefix length, as the kernel orders them."""
        words = ["ip", "-j", "addr", "show", "scope", "global", *(["dev", device] if device else [])]
        return [
            f"{info['local']}/{info['prefixlen']}"
            for link in json.loads(self.run(*words).stdout)
            for info in link.get("addr_info", [])
            if "local" in info
        ]

    def mac_of(self, address: str, within: float = 5) -> str | None:
        """Which MAC answers for an address of the LAN, asked afresh; None: none answered."""
        family = "-6" if ":" in address else "-4"
        self.run("ip", family, "neigh", "flush", "to", address, timeout=10, check=False)
        # A machine may answer ARP and drop echo requests: the neighbour table decides, not the echo.
        deadline = time.monotonic() + within
        while True:
            self.ping(address, 0)
            for entry in json.loads(self.run("ip", "-j", family, "neigh", "show", "to", address).stdout or "[]"):
                if "lladdr" in entry:
                    return str(entry["lladdr"])
            if time.monotonic() >= deadline:
                return None


class Switch(Node):
    """A bridge in a namespace of its own; every cable is one of its ports, named like its machine."""

    bridge = "switch0"

    def power_on(self, **plan: Any) -> None:
        super().power_on(**plan)
        # A switch does not filter: what Docker's rules do to bridged frames is the hosts' business.
        self.sh("for f in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e $f ] || echo 0 >$f; done")
        self.ip(
            "link set lo up",
            f"link add {self.bridge} type bridge",
            f"link set {self.bridge} up",
        )

    def unplug(self, port: str) -> None:
        """Removes a port. No error when it is gone already."""
        if self.on:
            with contextlib.suppress(LabError):
                self.ip(f"link del {port}")


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
