"""Debian machines that really boot: systemd as their first process, in the namespaces of a machine of the lab.

The system's tree is made once with debootstrap (one to four minutes) and kept in IPAM_TEST_CACHE, or
/var/cache/ipam-plugin-tests, beside the wheels of the packages that this project needs. A machine only
writes to an overlay of its own. As everything in the lab it ends with the process that made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conftest import missing
from tests.lab import ROUTER4, ROUTER6, Command, Lab, LabError, Result, Service, Switch, until
from tests.lab import missing as lab_missing
from tests.lab.machines import CGROUPS, Place, make_image, remove_cgroups
from tests.lab.node import ROOT, Node, ServiceEnded, children, running

CACHE = Path(os.environ.get("IPAM_TEST_CACHE") or "/var/cache/ipam-plugin-tests")
SUITE, PYTHON = "bookworm", (3, 11)
PACKAGES = (
    "systemd-sysv,dbus,python3-venv,iproute2,iputils-ping,etcd-server,etcd-client,docker.io,openssl,openssh-server"
)

WHEELS = "/opt/wheels"
"""Where a machine finds the wheels; its pip asks nobody else."""

SHELL = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "dumb",
    "USER": "root",
}
"""What a login of root's sets."""

# A container may not write to control groups of version 1, unless it says so once more.
CGROUPS_FOR_DOCKER = """[Service]
ExecStartPre=/bin/sh -c 'for d in /sys/fs/cgroup/*/; do mount -o remount,bind,rw $d 2>/dev/null || true; done'
"""


def debian() -> Path:
    """The root directory of a Debian system with Docker and etcd, not to be written to. Skips where it cannot be."""
    if os.getuid() != 0:
        missing("root", "booting a container needs root")
    why = lab_missing(etcd=False)
    if why is not None:
        missing("boot", why)
    for program in ("systemd-nspawn", "debootstrap"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            missing("boot", f"{program} is not installed")
    tree = CACHE / f"{SUITE}-{_digest(PACKAGES)}"
    if not tree.is_dir():
        with _fresh(tree) as fresh:
            _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(fresh), seconds=900)
            for package in (fresh / "var/cache/apt/archives").glob("*.deb"):
                package.unlink()
    return tree


def wheels() -> Path:
    """A directory of wheels: what this project needs to be installed and to run, for the Python of `debian()`."""
    if sys.version_info[:2] != PYTHON:
        missing("boot", f"the packages of this Python do not fit the one of {SUITE}, which is 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = sorted([*project["build-system"]["requires"], *project["project"]["dependencies"]])
    directory = CACHE / f"wheels-{_digest(*needed)}"
    if not directory.is_dir():
        with _fresh(directory) as fresh:
            _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(fresh), *needed, seconds=600)
    return directory


def checkout(target: Path) -> None:
    """A copy of this project's files as they stand, without what was built from them."""
    built = ("__pycache__", ".*_cache", ".git", ".venv", ".hypothesis", "build", "*.egg-info")
    shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*built))


def _digest(*words: str) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


@contextlib.contextmanager
def _fresh(target: Path) -> Any:
    """A directory that becomes `target` when all went well, else nothing."""
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _run(*command: str, seconds: float) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


class Booted(Node):
    """A machine with systemd. What survives a power cut is `disk`, which lies over the tree, and /var/lib/docker."""

    def __init__(self, name: str, directory: Path, tree: Path) -> None:
        super().__init__(name, directory)
        self.disk = directory / "disk"
        self.cgroup = f"{directory.parent.name}/{name}"
        self._tree = tree
        self._leader = 0
        self._nspawn: Service | None = None
        for part in ("disk", "work", "root", "docker"):
            (directory / part).mkdir(parents=True)
        self._install()

    def _install(self) -> None:
        self.write("/etc/hostname", f"{self.name}\n")
        self.write("/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        self.write("/etc/machine-id", f"{uuid.uuid4().hex}\n")
        self.write("/etc/resolv.conf", f"nameserver {ROUTER4}\n")
        self.write("/etc/pip.conf", f"[global]\nno-index = true\nfind-links = {WHEELS}\n")
        self.write("/etc/systemd/system/docker.service.d/cgroups.conf", CGROUPS_FOR_DOCKER)
        for timer in ("apt-daily", "apt-daily-upgrade"):  # each holds apt's lock at a time of its own choosing
            (self.disk / f"etc/systemd/system/{timer}.timer").symlink_to("/dev/null")

    def write(self, path: str, text: str) -> None:
        """A file of its disk, before the boot."""
        file = self.disk / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    # Life

    def connect(self) -> None:
        """What cables and addresses it has when systemd starts: none but lo here."""
        self.ip("link set lo up")

    def power_on(self, **plan: Any) -> None:
        """Without its systemd: its files can be seen and commands run there with chroot(8), see `root`."""
        super().power_on(**plan)
        self.connect()
        # In namespaces of its own, so nspawn's locks and mounts end with the machine.
        overlay = f"lowerdir={self._tree},upperdir={self.disk},workdir={self.directory}/work"
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        self.run("mount", "-t", "overlay", "overlay", "-o", overlay, str(self.directory / "root"))

    @property
    def root(self) -> Path:
        """Its root directory as it is now, to be read and written from outside, while it is on."""
        return Path(f"/proc/{self.pid}/root{self.directory}/root")

    def chroot(self, *command: str) -> str:
        """What a command prints that runs in its files, before the boot."""
        return self.run("env", "-C", "/", "chroot", str(self.directory / "root"), *command).stdout.strip()

    def boot(self, *options: str, within: float = 120) -> None:
        """Boots, and waits until systemd says that all units were started. `options`: of systemd-nspawn."""
        if not self.on:
            self.power_on()
        self._nspawn = self.serve(
            "nspawn",
            *("sh", "-c", f'{self._enter_cgroups()}exec "$@"', "sh"),
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe"),
            *("-D", str(self.directory / "root"), f"--machine={self.name}", f"--hostname={self.name}"),
            *("--network-namespace-path=/proc/self/ns/net", "--resolv-conf=off", "--timezone=off"),
            *("--capability=all", "--system-call-filter=add_key keyctl bpf"),  # what dockerd's containers need
            f"--bind={self.directory}/docker:/var/lib/docker",  # Docker cannot put an overlay on one
            *options,
            env={"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"},  # dockerd sets ip_forward
        )
        self._leader = until(self._find_leader, 30, f"{self.name}: systemd runs")
        until(self._is_up, within, f"{self.name} has booted", pause=0.1)

    def _find_leader(self) -> int:
        service = self._nspawn
        if service is None or not service.alive:
            raise ServiceEnded(f"{self.name}: {service.tail() if service else 'is off'}")
        # Until it has become systemd, it is not in all its namespaces; and it is not nspawn's first child.
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in children(service.pid)}
        return next((pid for pid, name in names.items() if name == "systemd"), 0)

    def _is_up(self) -> bool:
        return self("systemctl is-system-running", check=False).stdout.strip() in ("running", "degraded")

    def _enter_cgroups(self) -> str:
        """Shell commands that put the shell into control groups of its own, in every hierarchy."""
        entered = []
        for top in [CGROUPS, *CGROUPS.iterdir()]:
            if not (top / "cgroup.procs").is_file() or top.is_symlink():
                continue
            directory = top
            for part in Path(self.cgroup).parts:
                with contextlib.suppress(OSError):  # version 2: else no controller is to be had below
                    names = (directory / "cgroup.controllers").read_text().split()
                    (directory / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in names))
                directory /= part
                directory.mkdir(exist_ok=True)
                for file in ("cpuset.cpus", "cpuset.mems"):  # version 1: empty at first, and then nobody can enter
                    with contextlib.suppress(OSError):
                        if not (directory / file).read_text().strip():
                            (directory / file).write_text((directory.parent / file).read_text())
            entered.append(f"echo 0 >{directory}/cgroup.procs && ")
            if top == CGROUPS:  # version 2 alone; the others are folders of it
                break
        return "".join(entered)

    def power_off(self) -> None:
        super().power_off()
        remove_cgroups(self.cgroup)

    # Commands

    def start(self, line: str, cwd: str = "/root") -> Command:
        """Starts what root types there after a new login, and does not wait."""
        if not self._leader or not self.on:
            raise LabError(f"{self.name} is off")
        login = [f"{name}={value}" for name, value in SHELL.items()]
        words = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "--", "env", "-i", "-C", cwd, *login]
        return Command([*words, "setsid", "bash", "-lc", line], f"{self.name}# {line}")

    def __call__(self, line: str, timeout: float = 30, check: bool = True, cwd: str = "/root") -> Result:
        """What a line typed there leaves. Raises CommandError (unless `check` is False), CommandTimeout."""
        return self.start(line, cwd).result(timeout, check)

    def show(self, unit: str, name: str) -> str:
        """A property of a systemd unit."""
        return self(f"systemctl show --value -p {name} {unit}").stdout.strip()


class BootedHost(Booted):
    """A Docker host as README wants it: the network card is a port of br0, which carries the host's addresses."""

    def __init__(self, name: str, directory: Path, tree: Path, switch: Switch, place: Place) -> None:
        super().__init__(name, directory, tree)
        self.place = place
        self._switch = switch

    def connect(self) -> None:
        super().connect()
        self.sh("for f in /proc/sys/net/bridge/bridge-nf-call-ip*; do [ ! -e $f ] || echo 1 >$f; done")
        self.plug(self._switch, "eth0", self.place.mac)
        self.ip(
            f"link add br0 address {self.place.mac} type bridge",
            "link set eth0 master br0",
            "link set eth0 up",
            "link set br0 up",
            *self.place.lines("br0"),
            f"route add default via {ROUTER4}",
            f"route add default via {ROUTER6}",
        )


# --- the LAN of README -------------------------------------------------------------------------------------

HOSTS = ("host1", "host2", "host3")
CHECKOUT = "/root/ipam-plugin"
PRINTER = "192.168.77.140"  # of a machine that nobody has registered, as in README's drawing


class Lan:
    """Three booted Docker hosts, a router and a machine without Docker."""

    def __init__(self, lab: Lab, hosts: list[BootedHost], options: list[str]) -> None:
        self.lab = lab
        self.hosts = {host.name: host for host in hosts}
        self.printer = lab.machines[0]
        self.printer.add_address(PRINTER)
        self.before: list[str] = []
        self.typed = False
        self._options = options

    def boot(self, host: BootedHost) -> None:
        host.boot(*self._options)

    def power_cut(self, *names: str) -> None:
        """Of these hosts at once; nothing is shut down, their disks stay. Then they boot, without a hand."""
        hosts = [self.hosts[name] for name in names]
        at_once(lambda host: host.power_off() or "", hosts)
        at_once(lambda host: self.boot(host) or "", hosts)

    def everywhere(self, work: Callable[[BootedHost], str]) -> dict[str, str]:
        return dict(zip(self.hosts, at_once(work, list(self.hosts.values())), strict=True))


def at_once(work: Callable[[BootedHost], str], hosts: list[BootedHost]) -> list[str]:
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(work, hosts))


@contextlib.contextmanager
def booted_lan() -> Iterator[Lan]:
    """Before README's first command: Debian with Docker, a bridge, an image, a checkout, and root of the first host
    reaches all of them by ssh. Afterwards nothing is left.
    """
    tree, found = debian(), wheels()
    mounts = Path("/proc/mounts").read_text()
    with contextlib.ExitStack() as rest:
        lab = rest.enter_context(Lab(hosts=0, machines=1, etcd=0))
        image = lab.directory / "image.tar"
        make_image(image, "/bin/busybox")
        hosts = []
        for number, name in enumerate(HOSTS, 11):
            hosts.append(BootedHost(name, lab.directory / name, tree, lab.switch, Place(number)))
            rest.callback(hosts[-1].power_off)
            checkout(hosts[-1].disk / CHECKOUT.lstrip("/"))
        lan = Lan(lab, hosts, [f"--bind-ro={found}:{WHEELS}", f"--bind-ro={image}:/opt/busybox.tar"])
        at_once(lambda host: lan.boot(host) or "", hosts)
        lan.everywhere(lambda host: host("docker import /opt/busybox.tar busybox", 60).stdout)
        _reach_by_ssh(lan)
        yield lan
    assert Path("/proc/mounts").read_text() == mounts
    assert not running(lab.name)
    assert not lab.directory.exists()
    assert [*CGROUPS.glob(lab.name), *CGROUPS.glob(f"*/{lab.name}")] == []


def _reach_by_ssh(lan: Lan) -> None:
    first = lan.hosts[HOSTS[0]]
    key = first("ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519 && cat .ssh/id_ed25519.pub").stdout.strip()
    known = lan.everywhere(
        lambda host: (
            host(
                f"mkdir -p -m 700 .ssh && echo '{key}' >>.ssh/authorized_keys && cat /etc/ssh/ssh_host_ed25519_key.pub"
            ).stdout
        )
    )
    for name, host_key in known.items():
        first(f"echo '{lan.hosts[name].place.ipv4} {host_key.strip()}' >>.ssh/known_hosts")


def address_of(host: BootedHost, container: str) -> str:
    shown = "'{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}'"
    return host(f"docker inspect -f {shown} {container}").stdout.strip()
