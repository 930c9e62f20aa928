"""A whole boot: a Debian system in a container with systemd as its first process, and the units as installed.

The system's tree is made once with debootstrap (two minutes) and kept in IPAM_TEST_CACHE, or
/var/cache/ipam-plugin-tests. A service named docker.service that only asks the plugin stands for Docker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipam_plugin
from conftest import missing
from etcd_server import until

pytestmark = pytest.mark.root

CACHE = Path(os.environ.get("IPAM_TEST_CACHE") or "/var/cache/ipam-plugin-tests")
SUITE, PYTHON = "bookworm", (3, 11)
PACKAGES = "systemd-sysv,dbus,python3,etcd-server,etcd-client,iproute2"
CGROUPS = Path("/sys/fs/cgroup")

COMMAND = """#!/usr/bin/python3 -I
import sys
sys.path.insert(0, "/opt/ipam-plugin/lib")
from ipam_plugin.cli import main
main()
"""
DOCKER = """[Unit]
After=network-online.target
[Service]
ExecStart=/usr/bin/python3 -I /opt/docker.py
Restart=no
[Install]
WantedBy=multi-user.target
"""
# What dockerd does with the driver at its start, and whether the daemon answered.
DOCKER_PROGRAM = """
import http.client, socket, time
class Plugin(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(open("/etc/docker/plugins/ipam-plugin.spec").read().strip().removeprefix("unix://"))
plugin = Plugin("plugin", timeout=30)
plugin.request("POST", "/Plugin.Activate")
print("answer:", plugin.getresponse().read().decode(), flush=True)
time.sleep(100000)
"""
EMBEDDED = """[Service]
ExecStart=
ExecStart=/opt/ipam-plugin/bin/ipam-plugin serve --embedded-etcd
"""


def run(*command: str, seconds: float = 30, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return (done.stdout + done.stderr).strip()


@pytest.fixture(scope="module")
def debian() -> Path:
    """The root directory of a Debian system, not to be written to."""
    if os.getuid() != 0:
        missing("root", "booting a container needs root")
    for program in ("systemd-nspawn", "debootstrap"):
        if shutil.which(program) is None:
            missing("boot", f"{program} is not installed")
    if sys.version_info[:2] != PYTHON:
        missing("boot", f"the packages of this Python do not fit the one of {SUITE}, which is 3.11")
    tree = CACHE / SUITE
    if not tree.is_dir():
        fresh = CACHE / f"{SUITE}.{os.getpid()}"
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(fresh), seconds=900)
            fresh.rename(tree)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return tree


class System:
    """A booted container; commands run in it."""

    def __init__(self, root: Path, leader: int) -> None:
        self.root = root
        self._leader = str(leader)

    def __call__(self, *command: str, seconds: float = 30, check: bool = True) -> str:
        return run("nsenter", "-t", self._leader, "-m", "-u", "-i", "-n", "-p", *command, seconds=seconds, check=check)

    def show(self, unit: str, name: str) -> str:
        return self("systemctl", "show", "--value", "-p", name, unit)

    def restart(self) -> None:
        self("systemctl", "daemon-reload")
        self("systemctl", "restart", "ipam-plugin", seconds=60)


@pytest.fixture(scope="module")
def system(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The Debian system with the package in /opt, installed by its own command, booted."""
    base = tmp_path_factory.mktemp("boot")
    root = base / "root"
    for name in ("upper", "work", "root"):
        (base / name).mkdir()
    overlay = f"lowerdir={debian},upperdir={base}/upper,workdir={base}/work"
    with contextlib.ExitStack() as rest:
        run("mount", "-t", "overlay", "overlay", "-o", overlay, str(root))
        rest.callback(run, "umount", str(root))
        _install(root)
        yield System(root, _boot(root, rest))


def _install(root: Path) -> None:
    package = root / "opt/ipam-plugin"
    (package / "bin").mkdir(parents=True)
    for path in site.getsitepackages():
        shutil.copytree(path, package / "lib", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    ours = Path(ipam_plugin.__file__).parent
    shutil.copytree(ours, package / "lib/ipam_plugin", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "bin/ipam-plugin").write_text(COMMAND)
    (package / "bin/ipam-plugin").chmod(0o755)
    (root / "opt/docker.py").write_text(DOCKER_PROGRAM)
    (root / "etc/systemd/system/docker.service").write_text(DOCKER)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (root / "etc/hostname").write_text("booted\n")
    said = run("chroot", str(root), "/opt/ipam-plugin/bin/ipam-plugin", "install")
    assert "user ipam-plugin made" in said
    units = ("ipam-plugin.socket", "ipam-plugin.service", "docker.service")
    run("chroot", str(root), "systemctl", "enable", *units)


def _boot(root: Path, rest: contextlib.ExitStack) -> int:
    """Boots; returns the process id of the container's init. `rest` ends it and what it leaves."""
    command = ["systemd-nspawn", "-q", "-D", str(root), "--boot", "--register=no", "--private-network"]
    command += ["--console=pipe", "--kill-signal=SIGRTMIN+4", "--hostname=booted"]
    if not Path("/run/systemd/system").is_dir():
        # Nobody makes a unit with a control group for it, so it gets one here.
        command.append("--keep-unit")
        groups = [CGROUPS / name / f"ipam-boot-{os.getpid()}" for name in ("systemd", "unified")]
        groups = [group for group in groups if group.parent.is_dir()] or [CGROUPS / f"ipam-boot-{os.getpid()}"]
        for group in groups:
            group.mkdir()
            rest.callback(_remove_group, group)
        enter = "".join(f"echo $$ > {group}/cgroup.procs && " for group in groups)
        command = ["sh", "-c", f'{enter}exec "$@"', "sh", *command]
    console = rest.enter_context((root.parent / "console").open("wb"))
    nspawn = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
    )
    rest.callback(_end, nspawn)

    def leader() -> int:
        assert nspawn.poll() is None, (root.parent / "console").read_text(errors="replace")
        # Before the container's init it has other children, that end again.
        for pid in run("pgrep", "-P", str(nspawn.pid), "-x", "systemd", check=False).split():
            if "booted" in System(root, int(pid))("hostname", check=False):
                return int(pid)
        return 0

    init: int = until(leader, "the container's init", 30)
    system = System(root, init)
    until(lambda: system("systemctl", "is-system-running", check=False) in ("running", "degraded"), "the boot", 120)
    return init


def _end(nspawn: subprocess.Popen[bytes]) -> None:
    nspawn.send_signal(signal.SIGTERM)  # asks the container to power off
    try:
        nspawn.wait(40)
    except subprocess.TimeoutExpired:
        nspawn.kill()
        nspawn.wait(10)


def _remove_group(group: Path) -> None:
    for path in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
        path.rmdir()
    until(lambda: _removed(group), f"the end of {group}")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def test_docker_starts_after_the_daemon_is_ready(system: System) -> None:
    """At boot Docker's containers start once; by then the daemon has its register, and answers."""
    assert system("systemctl", "is-active", "ipam-plugin.service", "ipam-plugin.socket", "docker.service").split() == [
        "active", "active", "active"
    ]  # fmt: skip
    ready = int(system.show("ipam-plugin.service", "ActiveEnterTimestampMonotonic"))
    docker = int(system.show("docker.service", "ExecMainStartTimestampMonotonic"))
    listening = int(system.show("ipam-plugin.socket", "ActiveEnterTimestampMonotonic"))
    assert listening < ready <= docker
    assert "serving" in system.show("ipam-plugin.service", "StatusText")
    until(lambda: "IpamDriver" in system("journalctl", "-u", "docker", "--no-pager"), "Docker's answer")


def test_the_socket_is_roots_alone(system: System) -> None:
    """Whoever may connect can give away and take any address; the daemon itself is no root."""
    path = "/run/ipam-plugin/ipam-plugin.sock"
    assert system("stat", "-c", "%a %U %F", path) == "600 root socket"
    process = system.show("ipam-plugin.service", "MainPID")
    status = dict(
        line.split(":\t", 1) for line in system("cat", f"/proc/{process}/status").splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split()) == {system("id", "-u", "ipam-plugin")}
    assert int(status["CapBnd"], 16) == 1 << 13  # CAP_NET_RAW
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert system("stat", "-c", "%a %U", "/var/lib/ipam-plugin") == "700 ipam-plugin"


def test_a_killed_daemon_is_back_and_the_socket_never_goes(system: System) -> None:
    """`kill -9` costs Docker a wait, not an error: the socket is systemd's."""
    inode = system("stat", "-c", "%i", "/run/ipam-plugin/ipam-plugin.sock")
    system("systemctl", "kill", "--signal=KILL", "ipam-plugin.service")
    until(lambda: system.show("ipam-plugin.service", "NRestarts") == "1", "the restart")
    system("timeout", "20", "/usr/bin/python3", "-I", "-c", DOCKER_PROGRAM.replace("time.sleep(100000)", ""))
    until(lambda: system.show("ipam-plugin.service", "ActiveState") == "active", "the daemon")
    assert system("stat", "-c", "%i", "/run/ipam-plugin/ipam-plugin.sock") == inode


def test_the_embedded_etcd_runs_hardened(system: System) -> None:
    """With --embedded-etcd in a drop-in, etcd starts under the same restrictions, and ends with the daemon."""
    drop_in = system.root / "etc/systemd/system/ipam-plugin.service.d"
    system("systemctl", "disable", "--now", "etcd.service")
    drop_in.mkdir()
    (drop_in / "embedded.conf").write_text(EMBEDDED)
    try:
        system.restart()
        assert "serving" in system.show("ipam-plugin.service", "StatusText")
        assert system("stat", "-c", "%a %U", "/var/lib/ipam-plugin/etcd") == "700 ipam-plugin"
        assert system("pgrep", "-u", "ipam-plugin", "-x", "etcd")
        main = system.show("ipam-plugin.service", "MainPID")
        system("kill", "-9", main)
        until(lambda: system.show("ipam-plugin.service", "MainPID") not in ("0", main), "the restart")
        until(lambda: system.show("ipam-plugin.service", "ActiveState") == "active", "the daemon", 60)
        assert len(system("pgrep", "-u", "ipam-plugin", "-x", "etcd").split()) == 1
    finally:
        shutil.rmtree(drop_in)
        system("systemctl", "stop", "ipam-plugin.service")  # and so the etcd that has the port
        system("systemctl", "enable", "--now", "etcd.service")
        system.restart()


def test_uninstall_and_install_on_a_live_system(system: System) -> None:
    """The one stops, disables and removes, while Docker runs on; the other starts the service again."""
    said = system("/opt/ipam-plugin/bin/ipam-plugin", "uninstall", seconds=60)
    assert "ipam-plugin.socket and ipam-plugin.service stopped and disabled" in said
    assert "left with what the daemon wrote" in said
    assert system("systemctl", "is-active", "docker.service") == "active"
    assert system.show("ipam-plugin.service", "LoadState") == "not-found"
    for path in ("/etc/docker", "/etc/ipam-plugin", "/usr/local/bin/ipam-plugin", "/run/ipam-plugin/ipam-plugin.sock"):
        assert system("sh", "-c", f"test -e {path} || test -L {path} || echo gone") == "gone", path
    said = system("/opt/ipam-plugin/bin/ipam-plugin", "install", seconds=60)
    assert "ipam-plugin.socket and ipam-plugin.service enabled and started" in said
    until(lambda: system.show("ipam-plugin.service", "ActiveState") == "active", "the daemon", 60)
