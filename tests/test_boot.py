"""A whole boot: a Debian system in a container with systemd as its first process, and the units as installed.

A service named docker.service that only asks the plugin stands for Docker; see test_readme.py for the real one.
"""

from __future__ import annotations

import shlex
import shutil
import site
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipam_plugin
from conftest import missing
from etcd_server import until
from tests.booted import PYTHON, SUITE, Booted, debian
from tests.lab import Lab

pytestmark = pytest.mark.root

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


class System:
    """A booted machine; commands run in it."""

    def __init__(self, machine: Booted) -> None:
        self.root = machine.root
        self.show = machine.show
        self._machine = machine

    def __call__(self, *command: str, seconds: float = 30, check: bool = True) -> str:
        done = self._machine(shlex.join(command), seconds, check)
        return (done.stdout + done.stderr).strip()

    def restart(self) -> None:
        self("systemctl", "daemon-reload")
        self("systemctl", "restart", "ipam-plugin", seconds=60)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A Debian system with the package in /opt, installed by its own command, booted."""
    tree = debian()
    if sys.version_info[:2] != PYTHON:
        missing("boot", f"the packages of this Python do not fit the one of {SUITE}, which is 3.11")
    with Lab(hosts=0, machines=0, etcd=0, router=False) as lab:
        machine = Booted("booted", lab.directory / "booted", tree)
        try:
            machine.power_on()
            _install(machine)
            machine.boot()
            yield System(machine)
        finally:
            machine.power_off()


def _install(machine: Booted) -> None:
    package = machine.root / "opt/ipam-plugin"
    (package / "bin").mkdir(parents=True)
    for path in site.getsitepackages():
        shutil.copytree(path, package / "lib", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    ours = Path(ipam_plugin.__file__).parent
    shutil.copytree(ours, package / "lib/ipam_plugin", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "bin/ipam-plugin").write_text(COMMAND)
    (package / "bin/ipam-plugin").chmod(0o755)
    (machine.root / "opt/docker.py").write_text(DOCKER_PROGRAM)
    (machine.root / "etc/systemd/system/docker.service").write_text(DOCKER)
    assert "user ipam-plugin made" in machine.chroot("/opt/ipam-plugin/bin/ipam-plugin", "install")
    machine.chroot("systemctl", "enable", "ipam-plugin.socket", "ipam-plugin.service", "docker.service")


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
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
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
    etcds = "cat /proc/[0-9]*/comm 2>/dev/null | grep -cx etcd"
    drop_in = system.root / "etc/systemd/system/ipam-plugin.service.d"
    system("systemctl", "disable", "--now", "etcd.service")
    drop_in.mkdir()
    (drop_in / "embedded.conf").write_text(EMBEDDED)
    try:
        system.restart()
        assert "serving" in system.show("ipam-plugin.service", "StatusText")
        assert system("stat", "-c", "%a %U", "/var/lib/ipam-plugin/etcd") == "700 ipam-plugin"
        assert system("sh", "-c", etcds) == "1"
        main = system.show("ipam-plugin.service", "MainPID")
        system("systemctl", "kill", "--kill-who=main", "--signal=KILL", "ipam-plugin.service")
        until(lambda: system.show("ipam-plugin.service", "MainPID") not in ("0", main), "the restart")
        until(lambda: system.show("ipam-plugin.service", "ActiveState") == "active", "the daemon", 60)
        until(lambda: "serving" in system.show("ipam-plugin.service", "StatusText"), "its register")
        assert system("sh", "-c", etcds) == "1"
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
    for path in ("/etc/docker/plugins", "/etc/ipam-plugin", "/usr/local/bin/ipam-plugin", "/run/ipam-plugin"):
        assert system("sh", "-c", f"test -e {path} || test -L {path} || echo gone") == "gone", path
    said = system("/opt/ipam-plugin/bin/ipam-plugin", "install", seconds=60)
    assert "ipam-plugin.socket and ipam-plugin.service enabled and started" in said
    until(lambda: system.show("ipam-plugin.service", "ActiveState") == "active", "the daemon", 60)
