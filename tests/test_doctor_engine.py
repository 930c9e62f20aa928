"""`ipam-plugin doctor` on real hosts: each fault is planted, found, and gone when its cure was done as it stands there.

What systemd is about is in test_boot.py, what etcd is about in test_doctor_etcd.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from conftest import missing
from tests import lab as labs
from tests.lab import DAEMON, DAEMON_SOCKET, ROUTER4, SUBNET4, Host, Lab, until
from tests.lab.machines import CONFIG, SPEC

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

DOCTOR = (sys.executable, "-m", "ipam_plugin", "doctor", "-o", "json")
BRIDGE = ("--driver", "bridge", "-o", "com.docker.network.bridge.name=br0")
OLD = "import ipam_plugin; ipam_plugin.__version__ = '0.0.1'\nfrom ipam_plugin.cli import main; main()"
OTHER_VERSION = (sys.executable, "-c", OLD, "serve", "--config", CONFIG)
# Time is the whole machine's, so a wrong clock is that of this command alone, where it looks at it.
WRONG_CLOCK = """
import time, types
from ipam_plugin import examine
from ipam_plugin.cli import main
examine.time = types.SimpleNamespace(time=lambda: time.time() + {}, monotonic=time.monotonic)
main()
"""
# Answers to the driver's name as some other IPAM driver would.
OTHER_DRIVER = """
import http.server, os, socketserver
class Driver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = {"/Plugin.Activate": b'{"Implements": ["IpamDriver"]}', "/IpamDriver.GetCapabilities": b"{}",
                 "/IpamDriver.GetDefaultAddressSpaces":
                 b'{"LocalDefaultAddressSpace": "l", "GlobalDefaultAddressSpace": "g"}'}
        answer = known.get(self.path, b'{"Err": "no pool here"}')
        self.send_response(200 if self.path in known else 500)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def address_string(self):
        return "docker"
os.umask(0o077)
socketserver.UnixStreamServer("/run/other.sock", Driver).serve_forever()
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Hosts in order. etcd is on a network of its own, so that a host without its LAN still reaches it."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    with Lab(hosts=2, machines=0, etcd=3, etcd_on="management", daemon=True) as made:
        for host in made.hosts:
            words = ("--ipam-driver", "ipam-plugin", "--subnet", SUBNET4)
            host.docker("network", "create", *words, "--aux-address", f"DefaultGatewayIPv4={ROUTER4}", *BRIDGE, "lan")
        made.hosts[0].command("segment", "default", "--router", ROUTER4)
        until(lambda: not any(map(look, made.hosts)), 20, "nothing is found")
        yield made


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    """A host in which nothing is found any more after the test, and so nothing before the next one."""
    yield lab.hosts[0]
    until(lambda: content(lab.hosts[0]), 20, "nothing is found any more")


def look(host: Host, *words: str) -> dict[str, dict[str, str]]:
    """What is found, by kind."""
    done = host.run(*(words or DOCTOR), timeout=60, check=False, env={"IPAM_PLUGIN_CONFIG": CONFIG})
    assert done.status in (0, 1), done
    found = [each for each in json.loads(done.stdout) if each["state"] == "found"]
    assert done.status == bool(found)
    return {each["kind"]: each for each in found}


def content(host: Host) -> bool:
    return look(host) == {}


def test_all_is_looked_at(host: Host) -> None:
    """On a host in order everything is told, and only what is not there (systemd) is not checked."""
    done = host.run(*DOCTOR[:-2], timeout=60, env={"IPAM_PLUGIN_CONFIG": CONFIG})
    lines = done.stdout.splitlines()
    assert [line.split(maxsplit=3)[:3] for line in lines if not line.startswith("ok ")] == [
        ["not", "checked", "units:"]
    ]
    assert "also a made-up MAC (02:" in done.stdout
    assert "the engine reaches the driver ipam-plugin" in done.stdout
    assert done.stderr.strip() == f"0 found, {len(lines) - 1} in order, 1 not checked"
    assert "was not asked" in host.command("doctor", "--no-lan")
    assert "ipam-plugin-doctor" not in host.docker("network", "ls")


def test_nobody_is_disturbed(lab: Lab, host: Host) -> None:
    """The question in a made-up MAC's name raises no alarm anywhere and makes no lease."""
    before = lab.etcdctl("get", "--prefix", "/ipam-plugin/v1/leases/")
    look(host)
    assert lab.etcdctl("get", "--prefix", "/ipam-plugin/v1/leases/") == before
    assert all(each.metric("ipam_plugin_alarms_total") == 0 for each in lab.hosts)
    assert "ALARM" not in host.command("hosts")


# --------------------------------------------------------------------------------------------- the faults


class Fault(NamedTuple):
    """How a fault is planted, what its line names, and how its cure is done: a command that stands in it, for a host
    (by number); or what a person would do, with a part of the sentence that says so."""

    kind: str
    plant: Callable[[Lab], object]
    named: str
    cure: str  # stands in the sentence
    do: Callable[[Lab], object] | int


def on(number: int, script: str) -> Callable[[Lab], Any]:
    return lambda lab: lab.hosts[number].sh(script)


def on_switch(script: str) -> Callable[[Lab], Any]:
    return lambda lab: lab.switch.sh(script)


def restart_other(version: bool, machine_id: bool) -> Callable[[Lab], None]:
    """Starts host2's daemon again: of another version, with host1's machine id."""

    def restart(lab: Lab) -> None:
        host, other = lab.hosts
        other.daemon_command = OTHER_VERSION if version else DAEMON
        if machine_id:
            other.path("/etc/machine-id").write_text(host.path("/etc/machine-id").read_text())
        other.restart("daemon")

    return restart


def restart(lab: Lab) -> None:
    lab.hosts[0].restart("daemon")


def without_raw_sockets(lab: Lab) -> None:
    lab.hosts[0].services["daemon"].terminate()
    lab.hosts[0].start_daemon(without="net_raw")


def stop_answering(lab: Lab) -> None:
    for pid in lab.hosts[0].services["daemon"].family():
        os.kill(pid, signal.SIGSTOP)


def kill_and_start(lab: Lab) -> None:
    lab.hosts[0].kill("daemon")
    lab.hosts[0].start_daemon()


def stray_etcd(lab: Lab) -> None:
    host, other = lab.hosts
    urls = [f"http://192.168.78.12:{port}" for port in (2379, 2380)]
    other.serve(
        *("stray", "etcd", "--data-dir", "/run/stray", "--initial-cluster", f"default={urls[1]}"),
        *("--listen-client-urls", urls[0], "--advertise-client-urls", urls[0]),
        *("--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1], "--log-level", "error"),
    )
    host.configure(etcd={"endpoints": [*lab.endpoints, urls[0]]})


def no_stray_etcd(lab: Lab) -> None:
    lab.hosts[0].configure(etcd={"endpoints": lab.endpoints})
    lab.hosts[1].services["stray"].kill()


def macvlan_of_another_driver(lab: Lab) -> None:
    lab.hosts[0].docker("network", "create", "-d", "macvlan", "--subnet", "192.168.76.0/23", "-o", "parent=br0", "old")


STATE = "/var/lib/ipam-plugin"
JSON = SPEC.replace(".spec", ".json")
RIGHT_SPEC = f"echo unix://{DAEMON_SOCKET} >{SPEC}"
NFT = "nft add table bridge t; nft add chain bridge t f '{ type filter hook forward priority 0; }';"
LOCKED = (
    "ip link set host1 type bridge_slave fdb_flush; bridge fdb replace 02:00:00:00:4d:0b dev host1 master static;"
    " ip link set host1 type bridge_slave locked on"
)

# Those of one round are there at the same time, and each is told.
ROUNDS: dict[str, list[Fault]] = {
    "the other host, the files, the firewall": [
        Fault("etcd_away", lambda lab: lab.etcd[2].kill(), "192.168.78.203", "start etcd there",
              lambda lab: lab.etcd[2].start()),
        Fault("etcd_split", stray_etcd, "http://192.168.78.12:2379", "only the members of one cluster", no_stray_etcd),
        Fault("versions_differ", restart_other(version=True, machine_id=True), "host2 0.0.1", "on host2",
              restart_other(version=False, machine_id=False)),
        Fault("machine_id_twice", lambda lab: None, "host1, host2",
              "rm /etc/machine-id; systemd-machine-id-setup", 1),
        Fault("mask_differs",
              on(1, "ip address add 192.168.77.12/16 dev br0; ip address del 192.168.77.12/24 dev br0"),
              "br0 of host host2 carries 192.168.77.12/16",
              "ip address add 192.168.77.12/24 dev br0; ip address del 192.168.77.12/16 dev br0", 1),
        Fault("state_dir_read_only", on(0, f"mount --bind {STATE} {STATE}; mount -o remount,bind,ro {STATE}"), STATE,
              f"mount -o remount,rw {STATE}", 0),
        Fault("spec_elsewhere", on(0, f"echo unix:///run/old.sock >{SPEC}"), "unix:///run/old.sock", RIGHT_SPEC, 0),
        Fault("spec_twice", on(0, f"echo '{{\"Addr\": \"http://127.0.0.1:1\"}}' >{JSON}"), JSON, f"rm {JSON}", 0),
        Fault("socket_open", on(0, f"chmod 666 {DAEMON_SOCKET}"), "0666", f"chmod 600 {DAEMON_SOCKET}", 0),
        Fault("other_driver", macvlan_of_another_driver, "network old has its addresses from IPAM driver default",
              "docker network rm old", lambda lab: lab.hosts[0].docker("network", "rm", "old")),
        Fault("bridge_filtered", on(0, "iptables -D FORWARD -i br0 -o br0 -j ACCEPT"), "iptables -P FORWARD DROP",
              "iptables -I DOCKER-USER -i br0 -o br0 -j ACCEPT", 0),
        Fault("wire_dead", on(0, "ip link set eth0 down"), "eth0", "ip link set eth0 up", 0),
    ],
    "no spec, a full disk, no raw sockets, port security": [
        Fault("spec_missing", on(0, f"rm {SPEC}"), "/etc/docker/plugins", RIGHT_SPEC, 0),
        Fault("no_raw_sockets", without_raw_sockets, "CAP_NET_RAW", "AmbientCapabilities=CAP_NET_RAW", restart),
        Fault("state_dir_full",
              on(0, f"mount -t tmpfs -o size=20m tmpfs {STATE}; head -c 10000000 /dev/zero >{STATE}/log"),
              "MiB left", f"df {STATE}", on(0, f"rm {STATE}/log; umount {STATE}")),
        Fault("bridge_filtered", on(0, "iptables -D DOCKER-USER -i br0 -o br0 -j ACCEPT"), "iptables -P FORWARD DROP",
              "sysctl -w net.bridge.bridge-nf-call-iptables=0", 0),
        Fault("mac_refused", on_switch(LOCKED), "not a MAC such as a container's (02:", "promiscuous mode",
              on_switch("ip link set host1 type bridge_slave locked off")),
    ],
    "a daemon that hangs, a bridge without its port": [
        Fault("socket_silent", stop_answering, "timed out", "systemctl restart", kill_and_start),
        Fault("wire_dead", on(0, "ip link set eth0 nomaster"), "br0", "ip link set NIC master br0",
              on(0, "ip link set eth0 master br0")),
    ],
    "no Docker, another VLAN": [
        Fault("docker_away", lambda lab: lab.hosts[0].services["dockerd"].terminate(), "/var/run/docker.sock",
              "systemctl start docker", lambda lab: lab.hosts[0].start_dockerd()),
        Fault("wire_dead",
              on_switch("ip link add vlan5 type bridge; ip link set vlan5 up; ip link set host1 master vlan5"),
              "none of the machines that should be on br0", "its VLAN untagged",
              on_switch("ip link set host1 master switch0; ip link del vlan5")),
    ],
    "no daemon, no cable": [
        Fault("socket_missing", lambda lab: lab.hosts[0].services["daemon"].terminate(), DAEMON_SOCKET,
              "systemctl start", lambda lab: lab.hosts[0].start_daemon()),
        Fault("wire_dead", lambda lab: lab.hosts[0].cut_off(), "no carrier", "the cable at eth0;",
              lambda lab: lab.hosts[0].rejoin()),
    ],
    "ARP inspection": [
        Fault("probes_refused", on_switch(f"{NFT} nft add rule bridge t f arp saddr ip 0.0.0.0 drop"),
              "sender 0.0.0.0", "validate ip allow zeros", on_switch("nft delete table bridge t")),
    ],
    "no address": [
        Fault("no_interface", on(0, "ip address del 192.168.77.11/24 dev br0"), SUBNET4,
              "ip address add ADDRESS/24 dev br0", on(0, "ip address add 192.168.77.11/24 dev br0")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDS)
def test_faults_are_found_and_their_cures_help(lab: Lab, host: Host, name: str) -> None:
    """What was planted is found, and nothing else; when the cures are done, nothing is."""
    faults = ROUNDS[name]
    for each in faults:
        each.plant(lab)
    kinds = {each.kind for each in faults}
    found = until(lambda: found if (found := look(host)).keys() >= kinds else None, 20, f"found are {kinds}")
    assert found.keys() == kinds, found
    if "versions_differ" in kinds:
        assert "this command is" in look(lab.hosts[1])["daemon_outdated"]["what"]
    for each in reversed(faults):
        line = found[each.kind]
        assert each.named in line["what"], line
        assert each.cure in line["cure"], line
        if isinstance(each.do, int):
            lab.hosts[each.do].sh(each.cure)
        else:
            each.do(lab)


def test_a_wrong_clock(host: Host) -> None:
    for seconds, told in ((3600, "ahead"), (-90, "behind")):
        wrong = look(host, sys.executable, "-c", WRONG_CLOCK.format(seconds), *DOCTOR[3:])
        assert list(wrong) == ["clock_off"]
        assert f" s {told}, by etcd at " in wrong["clock_off"]["what"]


def test_a_machine_with_the_name_of_another(lab: Lab, host: Host) -> None:
    other = lab.hosts[1]
    other.services["daemon"].terminate()
    other.configure(host="host1")
    other.path(f"{STATE}/host").write_text("host1\n")
    other.start_daemon()
    clone = look(other)
    assert list(clone) == ["name_twice", "not_serving"]
    assert "with another machine id, runs the daemon of host host1" in clone["name_twice"]["what"]
    assert "`host: NAME`" in clone["name_twice"]["cure"]
    other.kill("daemon")
    other.configure(host="host2")
    other.path(f"{STATE}/host").unlink()
    other.start_daemon()
    until(lambda: content(other), 20, "nothing is found there")


def test_the_engine_has_another_driver_by_that_name(lab: Lab, host: Host) -> None:
    """It goes by the file that it found first, until it is restarted."""
    other = lab.hosts[1]
    other.docker("network", "rm", "lan")
    fake = other.serve("other", sys.executable, "-I", "-c", OTHER_DRIVER)
    other.path(SPEC).write_text("unix:///run/other.sock\n")
    other.restart("dockerd")
    words = ("network", "create", "--ipam-driver", "ipam-plugin", "--subnet", "198.18.0.0/24", "never")
    with pytest.raises(labs.CommandError, match="no pool here"):
        other.docker(*words)
    other.path(SPEC).write_text(f"unix://{DAEMON_SOCKET}\n")
    found = look(other)
    assert list(found) == ["driver_unreachable"]
    assert "no pool here" in found["driver_unreachable"]["what"]
    assert found["driver_unreachable"]["cure"] == "systemctl restart docker"
    other.restart("dockerd")
    assert content(other)
    fake.kill()
