"""A LAN of Docker hosts on one machine, out of namespaces."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from .machines import (
    CGROUPS,
    DAEMON,
    LAN,
    MANAGEMENT,
    Etcd,
    Host,
    Live,
    Machine,
    Place,
    make_image,
    remove_cgroups,
)
from .node import LabError, Node, Switch, running, start_time, until

PREFIX = "ipam-lab-"
NAME = re.compile(rf"{PREFIX}(\d+)-(\d+)-\d+")
_count = itertools.count(1)


def owner_of(name: str) -> int | None:
    """The process that owns the lab of that name; None when it is dead, or the name is no lab's."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    pid, started = map(int, match.groups())
    return pid if start_time(pid) == started else None


def missing(etcd: bool = True) -> str | None:
    """Why no lab can be made on this machine, in one line; None: it can."""
    if os.geteuid() != 0:
        return "not root"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    wanted = "unshare nsenter setsid env ip iptables busybox docker dockerd containerd runc"
    if etcd:
        wanted += " etcd etcdctl"
    absent = [name for name in wanted.split() if shutil.which(name, path=path) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if not _static(Path(str(shutil.which("busybox", path=path)))):
        return "busybox is not static (Debian's package busybox-static is)"
    return None


def _static(program: Path) -> bool:
    """Whether an ELF file asks for no dynamic loader (a PT_INTERP header; elf(5))."""
    data = program.read_bytes()
    if data[:4] != b"\x7fELF" or data[4] != 2:
        return False
    start, size, number = (int.from_bytes(data[a:b], "little") for a, b in ((32, 40), (54, 56), (56, 58)))
    return all(data[start + i * size] != 3 for i in range(number))


class Lab:
    """A switch, N Docker hosts, M machines without Docker, a router and etcd, each in namespaces of its own.

    Use as a context manager. Everything runs in PID namespaces that end with the process that made the
    lab, however it ends; what then remains (a directory, cgroups) the next lab sweeps away.

    - `hosts`, `machines`: how many. Hosts are 192.168.77.11, .12, … and fd00:77::11, …; machines .101, ….
    - `etcd`: 0, 1 or 3 members, at .201, …. `etcd_on`: "lan", "management" (a second network,
      192.168.78.0/24, on which hosts have `mgmt0`, so that a host cut off the LAN still reaches it), or
      "hosts" (member I in the namespaces of host I, dying with it).
    - `router`: a machine that answers at .254 and fd00:77::fe and is everybody's default route.
    - `bridge`: False gives a host's addresses to eth0 itself, without br0 (for macvlan on the NIC).
    - `dockerd`, `daemon`: whether they are started with the lab. `daemon_first`: in the order of a real
      boot (the default), or dockerd first.
    - `daemon_command`: what is run as the daemon. `socket_unit`: its socket is there from the boot on, also while
      no daemon runs, as with the installed units; else the daemon makes it. `config`: keys of its config.yaml besides
      etcd.endpoints; a function gets the host's number (from 1) and returns them.
    - `engine`: keys of dockerd's daemon.json. `engine_path`: a directory with another dockerd, containerd,
      runc, to be found before the installed ones.
    - `directory`: where the machines' disks are made (default: the directory for temporary files).
    """

    def __init__(
        self,
        hosts: int = 3,
        machines: int = 2,
        etcd: int = 1,
        router: bool = True,
        *,
        etcd_on: Literal["lan", "management", "hosts"] = "lan",
        bridge: bool = True,
        dockerd: bool = True,
        daemon: bool = False,
        daemon_first: bool = True,
        daemon_command: Sequence[str] = DAEMON,
        socket_unit: bool = False,
        config: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None = None,
        engine: Mapping[str, Any] | None = None,
        engine_path: str | None = None,
        directory: str | Path | None = None,
    ) -> None:
        if etcd_on == "hosts" and etcd > hosts:
            raise LabError(f"{etcd} members of etcd need as many hosts, not {hosts}")
        if not 0 <= hosts <= 80 or not 0 <= machines <= 90 or not 0 <= etcd <= 9:
            raise LabError("a lab has at most 80 hosts, 90 machines and 9 members of etcd")
        self.owner = os.getpid()
        self.name = f"{PREFIX}{self.owner}-{start_time(self.owner)}-{next(_count)}"
        self.directory = Path(directory or tempfile.gettempdir()) / self.name
        self._counts = (hosts, machines, etcd)
        self._etcd_on = etcd_on
        self._router = router
        self._start_dockerd, self._start_daemon, self._daemon_first = dockerd, daemon, daemon_first
        self._host_options: dict[str, Any] = {
            "bridge": bridge,
            "engine": engine or {},
            "engine_path": engine_path,
            "daemon": daemon_command,
            "socket_unit": socket_unit,
        }
        self._config = config if callable(config) else lambda _: config or {}
        self._down = False
        self._handlers: dict[int, Any] = {}
        self.switch = Switch("switch", self.directory / "switch")
        self.management: Switch | None = None
        if etcd_on == "management":
            self.management = Switch("management", self.directory / "management")
        self.router: Machine | None = None
        self.hosts: list[Host] = []
        self.machines: list[Machine] = []
        self.etcd: list[Etcd] = []
        self._others: list[Node] = []
        self._switches: list[Switch] = []

    # Life

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Sweeps what dead labs left, then makes this one. Whatever fails, nothing of it stays."""
        Lab.sweep(self.directory.parent)
        atexit.register(self.down)
        self._catch_signals()
        try:
            # Mode 0700: the disks hold copies of /etc.
            self.directory.mkdir(mode=0o700)
            self._build()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Kills every machine and removes what they had. Safe to call twice, and in a forked child."""
        if self._down or os.getpid() != self.owner:
            return
        self._down = True
        atexit.unregister(self.down)
        with contextlib.ExitStack() as rest:  # from the last to the first, whichever fails
            for number, handler in self._handlers.items():
                rest.callback(signal.signal, number, handler)
            rest.callback(shutil.rmtree, self.directory, ignore_errors=True)
            rest.callback(remove_cgroups, self.name)
            nodes = [*self._switches, *self._others, *self.hosts]
            for node in nodes:
                rest.callback(node.power_off)
            for node in nodes:  # all at once, and without threads, which a process that ends cannot start
                node.cut()

    def _catch_signals(self) -> None:
        """Turns signals that would end the process at once into SystemExit, so that `with` blocks end."""
        if threading.current_thread() is not threading.main_thread():
            return

        def leave(number: int, _: FrameType | None) -> None:
            raise SystemExit(128 + number)

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, leave)

    def _build(self) -> None:
        hosts, machines, members = self._counts
        image = self.directory / "busybox.tar"
        make_image(image, str(shutil.which("busybox")))
        self._switches.append(self.switch)
        self.switch.power_on()
        if self.management is not None:
            self._switches.append(self.management)
            self.management.power_on()
        if self._router:
            self.router = self._machine("router", Place(254))
        self.machines = [self._machine(f"machine{i}", Place(100 + i)) for i in range(1, machines + 1)]

        on_hosts = self._etcd_on == "hosts"
        network = MANAGEMENT if self.management else LAN
        places = [Place((10 if on_hosts else 200) + i, network) for i in range(1, members + 1)]
        endpoints = [f"http://{place.ipv4}:2379" for place in places]
        for number in range(1, hosts + 1):
            self.hosts.append(self._host(number, image, endpoints))
        for i, place in enumerate(places, 1):
            name = f"etcd{i}"
            node: Node = self.hosts[i - 1] if on_hosts else self._machine(name, place)
            data = self.directory / f"{name}.data"
            data.mkdir(mode=0o700)
            self.etcd.append(Etcd(node, place, data, name))
            if on_hosts:
                self.hosts[i - 1].etcd = self.etcd[-1]

        _parallel([node.power_on for node in self._others], 4)
        _parallel([host.boot for host in self.hosts], 4)
        for member in self.etcd:
            member.join(self.etcd)
            member.launch()
        _parallel([member.wait for member in self.etcd], 4)
        _parallel([partial(self._services, host) for host in self.hosts], 4)

    def _services(self, host: Host) -> None:
        steps = [(self._start_daemon, host.start_daemon), (self._start_dockerd, host.start_dockerd)]
        for wanted, start in steps if self._daemon_first else reversed(steps):
            if wanted:
                start()

    def _machine(self, name: str, place: Place) -> Machine:
        on_lan = place.network == LAN
        switch = self.switch if on_lan or self.management is None else self.management
        routed = self._router and on_lan and name != "router"
        machine = Machine(name, self.directory / name, switch, place, routed)
        self._others.append(machine)
        return machine

    def _host(self, number: int, image: Path, endpoints: Sequence[str]) -> Host:
        name = f"host{number}"
        return Host(
            name,
            self.directory / name,
            self.switch,
            Place(10 + number),
            router=self._router,
            cgroup=f"/{self.name}/{name}",
            image=image,
            endpoints=endpoints,
            management=self.management,
            config=self._config(number),
            **self._host_options,
        )

    # Looking and doing

    @property
    def endpoints(self) -> list[str]:
        """etcd's client URLs, as the hosts reach them."""
        return [member.endpoint for member in self.etcd]

    def etcdctl(self, *words: str, timeout: float = 20) -> str:
        """What `etcdctl WORDS` (API 3) prints, asked from inside the lab with all endpoints."""
        if not self.etcd:
            raise LabError("this lab has no etcd")
        node = next((member.node for member in self.etcd if member.node.on), None)
        if node is None:
            raise LabError("every machine with a member of etcd is off")
        # etcdctl waits for the first endpoint it takes, and one on a machine that is off never refuses.
        endpoints = ",".join(member.endpoint for member in self.etcd if member.node.on)
        argv = ("etcdctl", "--command-timeout", "15s", "--endpoints", endpoints, *words)
        return node.run(*argv, timeout=timeout, env={"ETCDCTL_API": "3"}).stdout.strip()

    @contextlib.contextmanager
    def written(self, prefix: str) -> Iterator[list[tuple[str, str, str]]]:
        """Everything that is written to etcd below a prefix while it lasts, in its order; filled in at the end.

        Each as (PUT or DELETE, the key without the prefix, the value).
        """
        found: list[tuple[str, str, str]] = []
        node = self.etcd[0].node
        name = f"watch-{next(_count)}"
        words = ("etcdctl", "--endpoints", "http://127.0.0.1:2379", "watch", "--prefix", "/")
        service = node.serve(name, *words, env={"ETCDCTL_API": "3"})

        def seen(mark: str) -> bool:
            # Until the watch has begun nothing is seen of what is written, so the mark is written again.
            self.etcdctl("put", f"/{name}/{mark}", mark)
            return f"\n{mark}\n" in service.log.read_text()

        try:
            until(lambda: seen("begin"), 10, "the watch has begun")
            yield found
            until(lambda: seen("end"), 10, "the watch has seen all")
        finally:
            service.kill()
            del node.services[name]
        lines = iter(service.log.read_text().splitlines())
        for what in lines:
            key, value = next(lines), next(lines)
            if key == f"/{name}/end":
                break
            if key.startswith(prefix):
                found.append((what, key.removeprefix(prefix), value))

    def leader(self, within: float = 20) -> Etcd:
        """The member of etcd that leads. Raises LabError when there is none in time."""

        def find() -> Etcd | None:
            for member in self.etcd:
                with contextlib.suppress(LabError):
                    if member.node.on and member.leads():
                        return member
            return None

        found = until(find, within, "etcd has a leader", pause=0.1)
        assert found is not None
        return found

    def live(self) -> list[Live]:
        """Every address on an interface of a running container, on every host that is on."""
        hosts = [host for host in self.hosts if host.on]
        return [one for found in _parallel([host.live for host in hosts], 4) for one in found]

    # Leftovers

    @staticmethod
    def sweep(directory: str | Path | None = None) -> list[str]:
        """Removes what labs left whose owner is dead: cgroups and disks. Returns their names.

        A lab is recognised by its name, which holds the owner's pid and start time; nothing else is
        touched. Its machines end with the owner by themselves; one that does not is killed.
        """
        top = Path(directory or tempfile.gettempdir())
        names = {path.name for path in top.glob(f"{PREFIX}*")}
        names |= {path.name for pattern in (f"{PREFIX}*", f"*/{PREFIX}*") for path in CGROUPS.glob(pattern)}
        swept = []
        for name in sorted(names):
            if not NAME.fullmatch(name) or owner_of(name) is not None:
                continue
            _end(name)
            remove_cgroups(name)
            shutil.rmtree(top / name, ignore_errors=True)
            swept.append(name)
        return swept


def _end(name: str) -> None:
    """Sees to it that no machine of a dead lab is on."""
    try:
        until(lambda: not running(name), 5, "ended by itself", pause=0.05)
    except LabError:
        for pid in running(name).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not running(name), 10, f"the machines of {name} are off", pause=0.05)


def _parallel(jobs: Iterable[Callable[[], Any]], workers: int) -> list[Any]:
    """Carries out all jobs, some at once; then raises the first error, if any."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(job) for job in jobs]
    return [future.result() for future in futures]
