"""What stands in the lab: Docker hosts, machines without Docker, members of etcd."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .node import Command, LabError, Node, Service, ServiceEnded, Switch, start_time, until

SUBNET4 = "192.168.77.0/24"
SUBNET6 = "fd00:77::/64"
ROUTER4 = "192.168.77.254"
ROUTER6 = "fd00:77::254"

DAEMON_SOCKET = "/run/ipam-plugin/ipam-plugin.sock"
DOCKER_SOCKET = "/run/docker.sock"
CONFIG = "/etc/ipam-plugin/config.yaml"
SPEC = "/etc/docker/plugins/ipam-plugin.spec"
FRAMES = (sys.executable, "-I", "-S", str(Path(__file__).with_name("frames.py")))
ACTIVATE = (sys.executable, "-I", "-S", str(Path(__file__).with_name("activate.py")))
METRICS = ("127.0.0.1", "9179")
DAEMON = (sys.executable, "-m", "ipam_plugin", "serve", "--config", CONFIG)

IDLE = ("sh", "-c", "trap exit TERM; sleep 1000000 & wait")
"""What the image `busybox` runs when told nothing: waits, and (unlike sleep as process 1) ends at SIGTERM."""

APPLETS = [
    *("arping", "cat", "echo", "false", "grep", "hostname", "httpd", "ip", "ls", "kill", "nc", "ping"),
    *("ping6", "ps", "route", "sh", "sleep", "true", "wget"),
]
"""The commands in the image."""

CGROUPS = Path("/sys/fs/cgroup")


LAN, MANAGEMENT = 77, 78
"""Third part of the addresses on the LAN and on the management network."""


@dataclass(frozen=True)
class Place:
    """Where a machine is on a network: the last part of its addresses, in both families."""

    number: int
    network: int = LAN

    @property
    def ipv4(self) -> str:
        return f"192.168.{self.network}.{self.number}"

    @property
    def ipv6(self) -> str:
        # The same digits for a reader: .11 and ::11.
        return f"fd00:{self.network}::{self.number}"

    @property
    def mac(self) -> str:
        return f"02:00:00:00:{self.network:02x}:{self.number:02x}"

    def lines(self, device: str) -> list[str]:
        """ip(8) lines that give a device these addresses."""
        return [
            f"addr add {self.ipv4}/24 brd + dev {device}",
            f"addr add {self.ipv6}/64 dev {device} nodad",
        ]


class Machine(Node):
    """A physical machine without Docker: eth0 on the LAN with `.address` and `.address6`."""

    def __init__(self, name: str, directory: Path, switch: Switch, place: Place, router: bool) -> None:
        super().__init__(name, directory)
        self._switch = switch
        self._place = place
        self._router = router

    @property
    def address(self) -> str:
        return self._place.ipv4

    @property
    def address6(self) -> str:
        return self._place.ipv6

    @property
    def mac(self) -> str:
        return self._place.mac

    def power_on(self, **plan: Any) -> None:
        super().power_on(**plan)
        self.plug(self._switch, "eth0", self.mac)
        self.ip("link set lo up", "link set eth0 up", *self._place.lines("eth0"))
        if self._router:
            self.ip(f"route add default via {ROUTER4}", f"route add default via {ROUTER6}")

    def add_address(self, address: str) -> None:
        """Takes one more address of the LAN, as somebody would who typed it by hand."""
        self.ip(f"addr add {address}/64 dev eth0 nodad" if ":" in address else f"addr add {address}/24 dev eth0")

    def remove_address(self, address: str) -> None:
        self.ip(f"addr del {address}/{64 if ':' in address else 24} dev eth0")

    # What it says on the wire (frames.py)

    def announce(self, address: str) -> None:
        """Tells the LAN that it has an address, which it does have: by ARP, or by neighbour advertisement."""
        self._frames("announce", address).result(10)

    def take(self, address: str) -> Command:
        """Takes an IPv4 address as a well-behaved machine does: probes for 4 s first, and leaves it to whom it hears.

        The result's output is `taken`, or `left to MAC`. See RFC 5227 section 2.1.
        """
        return self._frames("take", address)

    def flood(self, rate: int, seconds: float) -> Command:
        """Sends so many ARP frames a second, each of another machine. The result's output is how many it sent."""
        return self._frames("flood", str(rate), str(seconds))

    @contextlib.contextmanager
    def proxy_arp(self, *others: str) -> Iterator[None]:
        """While it lasts, answers with its own MAC whenever somebody asks for any IPv4 address but `others`."""
        service = self.serve("proxy-arp", *FRAMES, "answer", "eth0", *others)
        try:
            until(lambda: "answering" in service.tail(), 10, f"{self.name} answers for all addresses")
            yield
        finally:
            service.kill()

    def _frames(self, what: str, *words: str) -> Command:
        return self.run_async(*FRAMES, what, "eth0", *words)


class Etcd:
    """A member of etcd, in a machine of its own or in a Docker host. Its data survive kill() and power cuts."""

    def __init__(self, node: Node, place: Place, data: Path, name: str) -> None:
        self.node = node
        self.name = name
        self._data = data
        self._place = place
        self._cluster = ""
        self._service: Service | None = None

    @property
    def address(self) -> str:
        return self._place.ipv4

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:2379"

    @property
    def peer(self) -> str:
        return f"{self.name}=http://{self.address}:2380"

    @property
    def pid(self) -> int:
        if self._service is None:
            raise LabError(f"{self.name} does not run")
        return self._service.pid

    def join(self, members: Iterable[Etcd]) -> None:
        self._cluster = ",".join(member.peer for member in members)

    def launch(self) -> None:
        """Starts the process and does not wait until it serves (a first member waits for the others)."""
        self._service = self.node.serve(
            "etcd",
            *("etcd", "--name", self.name, "--data-dir", str(self._data)),
            *("--listen-client-urls", f"http://{self.address}:2379,http://127.0.0.1:2379"),
            *("--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", f"http://{self.address}:2380"),
            *("--initial-advertise-peer-urls", f"http://{self.address}:2380"),
            *("--initial-cluster", self._cluster, "--initial-cluster-token", "lab"),
            *("--logger", "zap", "--log-level", "warn"),
            env={"ETCD_UNSUPPORTED_ARCH": "arm64"} if os.uname().machine == "aarch64" else None,
        )

    def healthy(self) -> bool:
        """Whether the member answers and knows a leader."""
        service = self._service
        if service is None or not service.alive:
            raise ServiceEnded(f"{self.name} does not run: {service.tail() if service else 'never started'}")
        words = ("etcdctl", "--endpoints", "http://127.0.0.1:2379", "endpoint", "health")
        return self.node.run(*words, env={"ETCDCTL_API": "3"}, timeout=10, check=False).status == 0

    def wait(self, within: float = 20) -> None:
        until(self.healthy, within, f"{self.name} is healthy", pause=0.05)

    def start(self) -> None:
        """Starts it after kill(), with the data it had, and waits until it serves."""
        self.launch()
        self.wait()

    def save(self, name: str) -> Path:
        """A backup of what is in etcd now (`etcdctl snapshot save`)."""
        backup = self._data.with_name(f"{self._data.name}.{name}")
        words = ("etcdctl", "--endpoints", "http://127.0.0.1:2379", "snapshot", "save", str(backup))
        self.node.run(*words, env={"ETCDCTL_API": "3"}, timeout=30)
        return backup

    def restore(self, backup: Path) -> None:
        """Loses its data and starts with a backup's, as an operator does it (`etcdctl snapshot restore`)."""
        self.kill()
        shutil.rmtree(self._data)
        self.node.run(
            *("etcdctl", "snapshot", "restore", str(backup), "--name", self.name, "--data-dir", str(self._data)),
            *("--initial-cluster", self._cluster, "--initial-cluster-token", "lab"),
            *("--initial-advertise-peer-urls", f"http://{self.address}:2380"),
            env={"ETCDCTL_API": "3"},
            timeout=30,
        )
        self.start()

    def kill(self) -> None:
        """SIGKILL."""
        if self._service is not None:
            self._service.kill()

    def stop(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def leads(self) -> bool:
        """Whether this member is the leader, as it says itself; one that is dead or paused says nothing."""
        if self._service is None or self._service.state in ("", "T"):
            return False
        words = ("etcdctl", "--endpoints", "http://127.0.0.1:2379", "-w", "json", "endpoint", "status")
        [status] = json.loads(self.node.run(*words, env={"ETCDCTL_API": "3"}, timeout=10).stdout)
        # While there is none, etcd leaves the field out.
        return bool(status["Status"].get("leader") == status["Status"]["header"]["member_id"])

    def _signal(self, number: int) -> None:
        if self._service is None:
            raise LabError(f"{self.name} does not run")
        self._service.signal(number)


@dataclass(frozen=True)
class Live:
    """An address that is on an interface inside a running container."""

    host: str
    container: str
    interface: str
    address: str
    mac: str


@dataclass(frozen=True)
class Sighting:
    """A container with an address, as the kernel says: `container` is its id, `run` is new with every start.

    `started`: it runs what its image says. Before that there is only runc, which waits for the engine's word; when the
    engine is killed just then it forgets the container, releases its address and leaves runc there (seen with 20.10).
    """

    container: str
    run: str
    address: str
    mac: str  # '' where it has more than one interface, or is only just being made
    started: bool

    @property
    def pid(self) -> int:
        return int(self.run.partition("@")[0])


class Host(Node):
    """A Docker host: `br0` carries its addresses, `eth0` is a port of it, dockerd and the daemon are real.

    What survives a power cut is its /etc, /var/lib/docker and /var/lib/ipam-plugin.

    Reaching containers directly: the frames between eth0 and a container's port pass the bridge only, but
    with bridge-nf-call-iptables=1 (which br_netfilter sets, and which the lab sets in every host) they pass
    iptables' FORWARD chain too, where dockerd's policy is DROP. They get through because dockerd adds
    `-i br0 -o br0 -j ACCEPT` for every bridge network that allows traffic between containers (the
    default, `com.docker.network.bridge.enable_icc`). Nothing else is needed; with enable_icc=false no
    machine reaches a container.

    What dockerd 20.10 does to br0: for a network without IPv6 it deletes every global IPv6 address of the
    bridge, when the network is made and again whenever dockerd starts, so `address6` is then gone; for one
    with IPv6 it adds fe80::1/64, on every host the same. The IPv4 address it leaves alone as long as the
    network's gateway is that address with that prefix length.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        switch: Switch,
        place: Place,
        *,
        router: bool,
        cgroup: str,
        image: Path,
        endpoints: Sequence[str],
        management: Switch | None,
        bridge: bool,
        engine: Mapping[str, Any],
        engine_path: str | None,
        daemon: Sequence[str],
        socket_unit: bool,
        config: Mapping[str, Any],
    ) -> None:
        super().__init__(name, directory)
        self.daemon_command = tuple(daemon)
        self.boot_id: str | None = None
        self.device = "br0" if bridge else "eth0"
        self.etcd: Etcd | None = None
        self._switch = switch
        self._management = management
        self._place = place
        self._router = router
        self._cgroup = cgroup
        self._image = image
        self._endpoints = list(endpoints)
        self._engine = dict(engine)
        self._engine_path = engine_path
        self._socket_unit = socket_unit
        self._listener: socket.socket | None = None
        self._config = dict(config)
        self._ran: set[str] = set()
        self._install()

    # Its disk

    def _install(self) -> None:
        """A disk as after the installation of the system: own /etc (a copy), own names, nothing run yet."""
        etc = self.directory / "disk/etc"
        shutil.copytree("/etc", etc, symlinks=True, ignore=_special)
        for name in ("docker", "ipam-plugin"):
            shutil.rmtree(etc / name, ignore_errors=True)
            (etc / name).mkdir()
            (self.directory / "disk/var/lib" / name).mkdir(parents=True)
        for file, text in (
            ("hostname", f"{self.name}\n"),
            ("machine-id", f"{uuid.uuid4().hex}\n"),
            ("hosts", f"127.0.0.1 localhost\n{self.address} {self.name}\n"),
            # Often a link into /run, which is this host's own and empty; and no container asks a name.
            ("resolv.conf", f"nameserver {ROUTER4}\n"),
        ):
            (etc / file).unlink(missing_ok=True)
            (etc / file).write_text(text)
        plugins = self.path(SPEC)
        plugins.parent.mkdir()
        plugins.write_text(f"unix://{DAEMON_SOCKET}\n")
        engine = {
            "cgroup-parent": self._cgroup,
            # Without systemd in the host there is no other; the default depends on the machine.
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "group": "root",
            "shutdown-timeout": 5,
            **self._engine,
        }
        self.path("/etc/docker/daemon.json").write_text(json.dumps(engine, indent=2))
        self.configure(**self._config)

    def path(self, inside: str) -> Path:
        """Where a file of this host's disk (below /etc, /var/lib/docker, /var/lib/ipam-plugin) is outside."""
        return self.directory / "disk" / inside.lstrip("/")

    def configure(self, **config: Any) -> None:
        """Writes the daemon's config.yaml: `config` over {etcd: {endpoints}}. It counts from the next start."""
        etcd = {"endpoints": self._endpoints, **config.pop("etcd", {})}
        # JSON is YAML.
        self.path(CONFIG).write_text(json.dumps({"etcd": etcd, **config}, indent=2) + "\n")

    # Life

    @property
    def address(self) -> str:
        return self._place.ipv4

    @property
    def address6(self) -> str:
        return self._place.ipv6

    @property
    def mac(self) -> str:
        return self._place.mac

    def boot(self) -> None:
        """A boot without services: new boot id, br0 with its addresses, and nothing that Docker had made."""
        self.boot_id = str(uuid.uuid4())
        self.power_on(disk=str(self.directory / "disk"), boot_id=self.boot_id)
        self.sh("for f in /proc/sys/net/bridge/bridge-nf-call-ip*; do [ ! -e $f ] || echo 1 >$f; done")
        self.plug(self._switch, "eth0", self.mac)
        self.ip(
            "link set lo up",
            "link set eth0 up",
            *(self._bridge_lines() if self.device == "br0" else []),
            *self._place.lines(self.device),
        )
        if self._router:
            self.ip(f"route add default via {ROUTER4}", f"route add default via {ROUTER6}")
        if self._management is not None:
            place = Place(self._place.number, MANAGEMENT)
            self.plug(self._management, "mgmt0", place.mac)
            self.ip("link set mgmt0 up", *place.lines("mgmt0"))
        if self._socket_unit:
            self._listener = self._listen()

    def power_off(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        super().power_off()

    def _listen(self) -> socket.socket:
        """The daemon's socket, as systemd makes it from the socket unit: there before the daemon, and after it."""
        path = Path(f"/proc/{self.pid}/root{DAEMON_SOCKET}")
        path.parent.mkdir(mode=0o755)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(4096)
        return listener

    def _bridge_lines(self) -> list[str]:
        return [
            # The address of the bridge is set, as installers do: else it follows the lowest of its ports.
            f"link add br0 address {self.mac} type bridge",
            "link set eth0 master br0",
            "link set br0 up",
        ]

    def start(self) -> None:
        """Boots the host and starts again, in the order of a real boot, what ran before the power cut."""
        self.boot()
        if self.etcd is not None and "etcd" in self._ran:
            self.etcd.launch()
        if "daemon" in self._ran:
            self.start_daemon()
        if "dockerd" in self._ran:
            self.start_dockerd()

    def kill(self, what: str = "all") -> None:
        """`kill -9`. "all" is a power cut: every process at once, containers too; the disk stays as it is.

        "dockerd" leaves the containers running (containerd goes with it, the shims stay), "daemon" takes
        what the daemon had started along, as systemd does.
        """
        if what == "all":
            self._ran |= set(self.services)
            self.power_off()
            self._forget_cgroups()
        elif what in ("dockerd", "daemon"):
            service = self.services.get(what)
            if service is None:
                raise LabError(f"{self.name}: {what} does not run")
            service.kill(family=what == "daemon")
        else:
            raise LabError(f"kill what? {what!r} is none of daemon, dockerd, all")

    def shutdown(self) -> None:
        """An orderly shutdown: dockerd stops its containers, then the daemon ends, then the power goes."""
        for name in ("dockerd", "daemon", "etcd"):
            service = self.services.get(name)
            if service is not None:
                service.terminate(30)
        self.kill("all")

    def restart(self, what: str) -> None:
        """SIGTERM to "daemon" or "dockerd", and starts it again."""
        if what not in ("dockerd", "daemon"):
            raise LabError(f"restart what? {what!r} is none of daemon, dockerd")
        self.services[what].terminate(30)
        self.start_daemon() if what == "daemon" else self.start_dockerd()

    def _forget_cgroups(self) -> None:
        remove_cgroups(self._cgroup)

    # Its wire

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts (a minute at most), br0 passes nothing to and from its cable, which has a carrier.

        That is what the spanning tree protocol does with a port that has just come up (IEEE 802.1D, states
        listening and learning, each as long as the forward delay).
        """
        settings = Path("/sys/class/net/br0/bridge")
        before = self.sh(f"cat {settings}/forward_delay")
        again = ("link set eth0 down", "link set eth0 up")
        self.ip("link set br0 type bridge stp_state 1 forward_delay 3000", *again)
        try:
            until(lambda: self.sh("cat /sys/class/net/eth0/brport/state") == "1", 5, f"{self.name}: eth0 is listening")
            yield
        finally:
            if self.on:
                self.ip(f"link set br0 type bridge stp_state 0 forward_delay {before}", *again)

    # Docker

    def start_dockerd(self, wait: bool = True) -> None:
        """Starts dockerd, waits until it answers, and sees to the image `busybox`."""
        path = os.environ.get("PATH", "")
        # Debian's dockerd wants iptables and runc from sbin, which a user's PATH may lack.
        path = os.pathsep.join(filter(None, [self._engine_path, path, "/usr/sbin", "/sbin"]))
        self.serve("dockerd", "dockerd", env={"PATH": path})
        if wait:
            self.wait_dockerd()

    def wait_dockerd(self, within: float = 60) -> None:
        def answers() -> bool:
            service = self.services["dockerd"]
            if not service.alive:
                raise ServiceEnded(f"{self.name}: dockerd ended: {service.tail()}")
            return self.http("GET", DOCKER_SOCKET, "/_ping", timeout=5)[0] == 200

        until(answers, within, f"{self.name}: dockerd answers")
        marker = self.path("/var/lib/docker/lab-image")
        if not marker.exists():
            words = ("--change", f"CMD {json.dumps(IDLE)}", str(self._image), "busybox:latest")
            self.docker("import", *words, timeout=60)
            marker.touch()

    def docker_words(self, *words: str) -> list[str]:
        # -H: the user's own configuration may name another context.
        return ["docker", "-H", f"unix://{DOCKER_SOCKET}", *words]

    def docker(self, *words: str, timeout: float = 60) -> str:
        """Runs `docker WORDS` on this host and returns what it printed.

        Raises CommandError (with .status and .stderr), CommandTimeout after `timeout` seconds.
        """
        return self.run(*self.docker_words(*words), timeout=timeout).stdout.strip()

    def docker_async(self, *words: str) -> Command:
        """Starts `docker WORDS`; `.result(timeout)` waits for it."""
        return self.run_async(*self.docker_words(*words))

    def docker_run(self, names: Iterable[str], *options: str, at_once: int = 8) -> None:
        """`docker run -d OPTIONS --name NAME busybox` for each name, so many at a time."""
        with ThreadPoolExecutor(at_once) as threads:
            words = ("run", "-d", *options, "--name")
            for _ in threads.map(lambda name: self.docker(*words, name, "busybox", timeout=300), names):
                pass

    def api(self, method: str, path: str, body: Any = None, timeout: float = 60) -> Any:
        """One call of dockerd's API without the client. Raises LabError unless the status is 2xx."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        status, answer = self.http(method, DOCKER_SOCKET, path, data, timeout, headers)
        if status // 100 != 2:
            raise LabError(f"{self.name}: {method} {path}: {status} {answer}")
        return answer

    def live(self) -> list[Live]:
        """Every global address that is really on an interface of a running container, from its own netns."""
        # dockerd's pids are those of this host's PID namespace, so nsenter runs inside.
        names = {c["Id"]: c["Names"][0].lstrip("/") for c in self.api("GET", "/containers/json")}
        pids = {}
        for ident, name in names.items():
            with contextlib.suppress(LabError):  # gone meanwhile
                pids[name] = self.api("GET", f"/containers/{ident}/json")["State"]["Pid"]
        script = "\n".join(
            f"echo {name}; nsenter -t {pid} -n ip -j addr show scope global 2>/dev/null | tr -d '\\n'; echo"
            for name, pid in pids.items()
            if pid
        )
        if not script:
            return []
        lines = self.run("sh", "-c", script, timeout=60).stdout.splitlines()
        found = []
        for name, text in zip(lines[::2], lines[1::2], strict=True):
            for link in json.loads(text or "[]"):
                for info in link.get("addr_info", []):
                    if "local" in info:
                        found.append(Live(self.name, name, link["ifname"], info["local"], link["address"]))
        return found

    def sighted(self) -> list[Sighting]:
        """Every IPv4 address in the network namespace of a container, found without dockerd, which may be dead or
        late; none on a host that is off. Cheap enough for several times a second."""
        found: list[Sighting] = []
        relative = self._cgroup.lstrip("/")
        tops = [top for top in (CGROUPS / relative, *sorted(CGROUPS.glob(f"*/{relative}"))) if top.is_dir()]
        if not self.on or not tops:
            return found
        own = _netns(self.pid)
        for group in tops[0].iterdir():
            if not group.is_dir():
                continue
            with contextlib.suppress(OSError):  # gone meanwhile
                pids = map(int, (group / "cgroup.procs").read_text().split())
                # Until runc has put a process into its own namespace it shows the host's addresses.
                ages = [(start_time(pid), pid) for pid in pids if _netns(pid) != own]
                age, pid = min((age, pid) for age, pid in ages if age is not None) if ages else (None, 0)
                if age is not None:
                    started = not Path(f"/proc/{pid}/comm").read_text().startswith("runc:[")
                    found += [
                        Sighting(group.name, f"{pid}@{age}", address, _mac(pid), started)
                        for address in _addresses4(pid)
                    ]
        return found

    # The daemon

    def start_daemon(self, wait: bool = True, without: str = "") -> None:
        """Starts the daemon and waits until its socket answers `POST /Plugin.Activate`.

        `without`: a capability (`net_raw`) that it does not get, though it is root.
        """
        # Out of the bounding set, because root gets at execve(2) all that is in there.
        less = ("setpriv", "--bounding-set", f"-{without}", "--inh-caps", f"-{without}") if without else ()
        if self._listener is None:
            self.serve("daemon", *less, *self.daemon_command)
        else:
            number = self._listener.fileno()
            self.serve("daemon", *less, *ACTIVATE, str(number), "1", *self.daemon_command, pass_fds=[number])
        if wait:
            self.wait_daemon()

    def wait_daemon(self, within: float = 30) -> None:
        def answers() -> bool:
            service = self.services["daemon"]
            if not service.alive:
                raise ServiceEnded(f"{self.name}: the daemon ended: {service.tail()}")
            status, _ = self.post(DAEMON_SOCKET, "/Plugin.Activate", timeout=5)
            return status == 200

        until(answers, within, f"{self.name}: the daemon answers")

    def log(self) -> str:
        """All that the daemon has written since the host was made."""
        file = self.directory / "daemon.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def metrics(self) -> str:
        """What the daemon serves for Prometheus."""
        # Not wget: it looks up names by glibc, which crashes in a static busybox.
        request = "GET /metrics HTTP/1.0\r\n\r\n"
        answer = self.run("busybox", "nc", "-w", "5", *METRICS, stdin=request, timeout=10).stdout
        return answer.partition("\r\n\r\n")[2]

    def metric(self, name: str) -> float:
        """A metric of the daemon, 0 when it was never set; without labels in `name`, the sum over all of them."""
        beginnings = (f"{name} ", f"{name}{{")
        lines = [line for line in self.metrics().splitlines() if line.startswith(beginnings)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def command(self, *words: str, timeout: float = 30, check: bool = True) -> str:
        """What `ipam-plugin WORDS` prints on this host, with this host's config."""
        env = {"IPAM_PLUGIN_CONFIG": CONFIG}
        return self.run(
            sys.executable, "-m", "ipam_plugin", *words, timeout=timeout, check=check, env=env
        ).stdout.strip()

    def driver(self, method: str, body: Any = None, timeout: float = 30) -> tuple[int, Any]:
        """Calls the daemon as Docker does: `driver("IpamDriver.RequestPool", {...})` -> (status, JSON)."""
        data = b"" if body is None else json.dumps(body).encode()
        return self.post(DAEMON_SOCKET, f"/{method}", data, timeout)


def _netns(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _addresses4(pid: int) -> list[str]:
    """The global IPv4 addresses of a process's network namespace: the local routes of proc_pid_net(5) fib_trie."""
    found, last = set(), ""
    for line in Path(f"/proc/{pid}/net/fib_trie").read_text().splitlines():
        words = line.split()
        if words[:1] == ["|--"]:
            last = words[1]
        elif words[:3] == ["/32", "host", "LOCAL"] and not last.startswith("127."):
            found.add(last)
    return sorted(found)


def _mac(pid: int) -> str:
    """The MAC of a container's only interface besides lo."""
    interfaces = [each for each in Path(f"/proc/{pid}/root/sys/class/net").glob("*") if each.name != "lo"]
    return (interfaces[0] / "address").read_text().strip() if len(interfaces) == 1 else ""


def _special(directory: str, names: list[str]) -> set[str]:
    """What of /etc is neither file, directory nor link."""
    paths = [Path(directory, name) for name in names]
    return {p.name for p in paths if not (p.is_symlink() or p.is_file() or p.is_dir())}


def remove_cgroups(name: str, within: float = 10) -> None:
    """Removes the cgroup `name` (as in cgroup-parent) and those below it, in every hierarchy.

    Raises LabError when one is still busy after `within` seconds.
    """
    relative = name.lstrip("/")
    tops = [CGROUPS / relative, *CGROUPS.glob(f"*/{relative}")]

    def gone() -> bool:
        for top in tops:
            for directory, _, _ in os.walk(top, topdown=False):
                Path(directory).rmdir()
        return not any(top.exists() for top in tops)

    until(gone, within, f"the cgroups {relative} can be removed")


def make_image(path: Path, busybox: str) -> None:
    """Writes a tar with a static busybox under all its names: an image without a registry."""
    with tarfile.open(path, "w") as tar:

        def add(name: str, kind: bytes, data: bytes = b"", link: str = "", mode: int = 0o755) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
            tar.addfile(info, io.BytesIO(data))

        for directory in ("bin", "etc", "proc", "sys", "dev", "root", "run", "var"):
            add(directory, tarfile.DIRTYPE)
        add("tmp", tarfile.DIRTYPE, mode=0o1777)
        add("bin/busybox", tarfile.REGTYPE, Path(busybox).read_bytes())
        for name in APPLETS:
            add(f"bin/{name}", tarfile.SYMTYPE, link="busybox")
        add("etc/passwd", tarfile.REGTYPE, b"root:x:0:0:root:/root:/bin/sh\n", mode=0o644)
        add("etc/group", tarfile.REGTYPE, b"root:x:0:\n", mode=0o644)
