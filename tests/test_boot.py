"""A whole boot: a Debian system in a container with systemd as its first process, and the units as installed.

A service named docker.service that only asks the plugin stands for Docker; see test_readme.py for the real one.
"""

from __future__ import annotations

import json
import re
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

CAP_NET_RAW = 13  # linux/capability.h
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
# What the daemon does with the wire: br0's port leads to a machine with these addresses, and then its cable is out.
LOOK = """import sys, time
sys.path.insert(0, "/opt/ipam-plugin/lib")
from ipam_plugin.addresses import parse_address
from ipam_plugin.wire import FAST, Wire
with Wire("br0") as wire:
    for address in sys.argv[1:]:
        print(address, wire.probe(parse_address(address), FAST, deadline=time.monotonic() + 5))
    print("alive:", wire.alive([], deadline=time.monotonic() + 5))
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
    main = system.show("ipam-plugin.service", "MainPID")
    worker = system("cat", f"/proc/{main}/task/{main}/children").split()
    assert len(worker) == 1
    for process in (main, *worker):
        text = system("cat", f"/proc/{process}/status")
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        assert set(status["Uid"].split()) == {system("id", "-u", "ipam-plugin")}
        rights = {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert rights == {1 << CAP_NET_RAW}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert system("stat", "-c", "%a %U", "/var/lib/ipam-plugin") == "700 ipam-plugin"


def test_the_wire_can_be_looked_at_from_the_service(system: System) -> None:
    """Under the unit's restrictions raw sockets open, a stranger is heard, and /sys says that a cable is out."""
    unit = (system.root / "etc/systemd/system/ipam-plugin.service").read_text()
    unit = re.sub(r"(?m)^(Requires|Wants|After|Before|Restart|StartLimitIntervalSec|StateDirectory)=.*\n", "", unit)
    unit = unit.replace("Type=notify", "Type=oneshot")
    look = (
        "ExecStart=/usr/bin/python3 -I /opt/look.py 10.9.9.9 fd09::9 10.9.9.8\n"
        "StandardOutput=truncate:/run/look\nStandardError=inherit"
    )
    (system.root / "etc/systemd/system/look.service").write_text(re.sub(r"(?m)^ExecStart=.*$", look, unit))
    (system.root / "opt/look.py").write_text(LOOK)

    def looked() -> str:
        system("systemctl", "start", "look.service", check=False)
        return system("cat", "/run/look")

    system("systemctl", "daemon-reload")
    try:
        system("sh", "-ec", "ip link add br0 type bridge; ip link add port type veth peer name machine")
        system("sh", "-ec", "ip link set port master br0; for i in br0 port machine; do ip link set $i up; done")
        system("sh", "-ec", "ip address add 10.9.9.9/24 dev machine; ip address add fd09::9/64 dev machine nodad")
        until(lambda: system("cat", "/sys/class/net/port/brport/state") == "3", "a port that forwards")
        mac = system("cat", "/sys/class/net/machine/address")
        said = looked()
        assert re.search(rf"(?m)^10\.9\.9\.9 InUse\(mac='{mac}'", said), said
        assert re.search(rf"(?m)^fd09::9 InUse\(mac='{mac}'", said), said
        assert re.search(r"(?m)^10\.9\.9\.8 Silent\(", said), said
        assert re.search(r"(?m)^alive: *$", said), said
        system("ip", "link", "set", "machine", "down")
        until(lambda: system("cat", "/sys/class/net/port/carrier") == "0", "a port without a carrier")
        said = looked()
        assert "alive: br0 does not forward: port has no carrier" in said
    finally:
        system("sh", "-c", "ip link del port; ip link del br0", check=False)
        system("rm", "-f", "/etc/systemd/system/look.service", "/opt/look.py", "/run/look")
        system("systemctl", "daemon-reload")


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


def test_without_the_capability_the_daemon_serves_and_says_so(system: System) -> None:
    """An operator who takes the right away gets a daemon that works by `probe_failure`, and an alarm with the cure."""
    drop_in = system.root / "etc/systemd/system/ipam-plugin.service.d"
    drop_in.mkdir()
    (drop_in / "no-raw.conf").write_text("[Service]\nAmbientCapabilities=\nCapabilityBoundingSet=\n")
    try:
        system.restart()
        assert "serving" in system.show("ipam-plugin.service", "StatusText")
        main = system.show("ipam-plugin.service", "MainPID")
        assert "CapEff:\t0000000000000000" in system("cat", f"/proc/{main}/status")
        until(lambda: "ALARM on" in system("ipam-plugin", "hosts"), "the alarm in etcd")
        [alarm] = [line for line in system("ipam-plugin", "hosts").splitlines() if line.startswith("ALARM on")]
        assert "CAP_NET_RAW" in alarm
        assert "AmbientCapabilities=CAP_NET_RAW" in alarm
        metrics = (
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9179/metrics', timeout=9).read().decode())"
        )
        assert 'ipam_plugin_alarms_total{kind="cannot_probe"} 1.0' in system("python3", "-I", "-c", metrics)
    finally:
        shutil.rmtree(drop_in)
        system.restart()


UNIT = "/etc/systemd/system/ipam-plugin.service"


def test_doctor_and_the_service(system: System) -> None:
    """Units and rights of the service, broken one by one: doctor says so, and its cure helps as it stands there."""
    about = ("unit_", "units", "no_raw", "raw_", "docker_socket", "state_dir")

    def found() -> dict[str, str]:
        """The cures by kind."""
        lines = json.loads(
            system("ipam-plugin", "doctor", "--no-lan", "-o", "json", check=False).partition("\n]")[0] + "]"
        )
        ours = [each for each in lines if each["kind"].startswith(about)]
        assert all(each["state"] != "not checked" for each in ours), ours
        return {each["kind"]: each["cure"] for each in ours if each["state"] == "found"}

    def cured(kind: str, command: str) -> None:
        now = found()
        assert list(now) == [kind], now
        assert command in now[kind], now
        system("sh", "-ec", command, seconds=60)
        until(lambda: found() == {}, f"{kind} is cured")

    # Nobody answers there, and the file is left; and nobody holds a connection to the daemon while it is restarted.
    system("systemctl", "stop", "docker.socket", "docker.service")
    assert system("stat", "-c", "%a %G", "/run/docker.sock") == "660 docker"
    assert found() == {}
    system("systemctl", "disable", "ipam-plugin.service")
    cured("unit_disabled", "systemctl enable ipam-plugin.service")
    system("systemctl", "stop", "ipam-plugin.service", seconds=60)
    cured("unit_stopped", "systemctl start ipam-plugin.service")
    system("sed", "-i", "s/^Restart=always/Restart=on-failure/", UNIT)
    cured("unit_changed", "systemctl daemon-reload; systemctl restart ipam-plugin.service")
    system("sh", "-ec", f"sed -i '/^Before=/d' {UNIT}; systemctl daemon-reload")
    now = found()
    assert list(now) == ["unit_order"]
    assert "write Before=docker.service into [Unit] of the ones named; systemctl daemon-reload" in now["unit_order"]
    system("sh", "-ec", f"sed -i 's/^.Unit.$/&\\nBefore=docker.service/' {UNIT}; systemctl daemon-reload")
    assert found() == {}
    system("sh", "-ec", f"mv {UNIT} /root/unit; systemctl daemon-reload")
    cured("unit_missing", "ipam-plugin install")
    assert system("cat", UNIT) != system("cat", "/root/unit")  # as install wrote it at first
    system("gpasswd", "--delete", "ipam-plugin", "docker")
    system("systemctl", "restart", "ipam-plugin", seconds=60)
    cured("docker_socket_closed", "usermod --append --groups docker ipam-plugin; systemctl restart ipam-plugin")
    system("chown", "root:", "/var/lib/ipam-plugin")
    cured("state_dir_closed", "chown -R ipam-plugin: /var/lib/ipam-plugin; chmod 700 /var/lib/ipam-plugin")
    system("rm", "/root/unit")
    system("systemctl", "start", "docker.service")


def test_uninstall_and_install_on_a_live_system(system: System) -> None:
    """The one stops, disables and removes, while Docker runs on; the other starts the service again."""
    kept = system("cat", "/var/lib/ipam-plugin/host")
    leases = "/ipam-plugin/v1/leases/default/"
    for address, host in (("192.168.7.1", kept), ("192.168.7.2", kept), ("192.168.7.3", "another")):
        system("etcdctl", "put", leases + address, json.dumps({"kind": "standby", "host": host}))
    said = system("/opt/ipam-plugin/bin/ipam-plugin", "uninstall", seconds=60)
    assert re.search(
        r"ipam-plugin\.socket, ipam-plugin\.service, ipam-plugin-web\.service stopped and disabled\n"
        rf"standby and held addresses of host {kept} given back: 2\n"
        r"[^\n]+ removed\n",
        said,
    ), said
    assert system("etcdctl", "get", "--prefix", "--keys-only", leases).split() == [f"{leases}192.168.7.3"]
    assert "left with what the daemon wrote" in said
    assert system("systemctl", "is-active", "docker.service") == "active"
    assert system.show("ipam-plugin.service", "LoadState") == "not-found"
    for path in ("/etc/docker/plugins", "/etc/ipam-plugin", "/usr/local/bin/ipam-plugin", "/run/ipam-plugin"):
        assert system("sh", "-c", f"test -e {path} || test -L {path} || echo gone") == "gone", path
    said = system("/opt/ipam-plugin/bin/ipam-plugin", "install", seconds=60)
    assert "ipam-plugin.socket and ipam-plugin.service enabled and started" in said
    until(lambda: system.show("ipam-plugin.service", "ActiveState") == "active", "the daemon", 60)
