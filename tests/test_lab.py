"""The lab itself: that it behaves like a LAN of real Docker hosts, and that nothing of it stays.

Docker's own address driver is at work here (and a stand-in for the daemon, once), so that a failure here
is the lab's and not the daemon's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import missing
from tests import lab as labs
from tests.lab import (
    ROUTER4,
    SUBNET4,
    SUBNET6,
    CommandError,
    CommandTimeout,
    Host,
    Lab,
    LabError,
    Machine,
    until,
)
from tests.lab.lab import PREFIX
from tests.lab.machines import CGROUPS
from tests.lab.node import ROOT, running, start_time

pytestmark = [pytest.mark.root, pytest.mark.engine]

STAND_IN = """
import http.server, json, os, socketserver, threading
PATH = "/run/ipam-plugin/ipam-plugin.sock"
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        gateway = (asked.get("Options") or {}).get("RequestAddressType")
        given = asked.get("Address") or ("192.168.77.11" if gateway else "192.168.77.150")
        body = json.dumps({
            "/Plugin.Activate": {"Implements": ["IpamDriver"]},
            "/IpamDriver.GetCapabilities": {"RequiresMACAddress": True},
            "/IpamDriver.GetDefaultAddressSpaces":
                {"LocalDefaultAddressSpace": "l", "GlobalDefaultAddressSpace": "g"},
            "/IpamDriver.RequestPool": {"PoolID": "p", "Pool": asked.get("Pool"), "Data": {}},
            "/IpamDriver.RequestAddress": {"Address": given + "/24", "Data": {}},
        }.get(self.path, {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        print(self.path, flush=True)
    def address_string(self):
        return "docker"
    def log_message(self, *_):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    allow_reuse_address = True
os.makedirs(os.path.dirname(PATH), exist_ok=True)
if os.path.exists(PATH):
    os.unlink(PATH)
Server(PATH, Handler).serve_forever()
"""


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")


@pytest.fixture(scope="module")
def shared(possible: None) -> Iterator[Lab]:
    """Two hosts with a network `lan` each, from Docker's own driver, with a range of its own per host."""
    with Lab(hosts=2, machines=1, daemon_command=(sys.executable, "-c", STAND_IN)) as lab:
        for host, number in zip(lab.hosts, (32, 64), strict=True):
            create_lan(host, f"192.168.77.{number}/27")
        yield lab


@pytest.fixture
def lab(shared: Lab) -> Iterator[Lab]:
    """The shared lab, without containers, and with everything on afterwards."""
    yield shared
    for host in shared.hosts:
        if not host.on:
            host.start()
        host.rejoin()
        idents = host.docker("ps", "-aq").split()
        if idents:
            host.docker("rm", "-f", *idents)


def create_lan(host: Host, addresses: str, *words: str) -> None:
    host.docker(
        *("network", "create", "--subnet", SUBNET4, "--gateway", host.address, "--ip-range", addresses),
        *("--aux-address", f"DefaultGatewayIPv4={ROUTER4}", "-o", "com.docker.network.bridge.name=br0"),
        *(*words, "lan"),
    )


def run(host: Host, name: str, *words: str) -> str:
    """Starts a container in `lan` and returns its address, as the container itself has it."""
    host.docker("run", "-d", "--name", name, "--network", "lan", *words, "busybox")
    [address] = [one.address for one in host.live() if one.container == name and ":" not in one.address]
    return address


def test_containers_are_on_the_lan(lab: Lab) -> None:
    """Machines without Docker, the other host and its containers reach a container, and it reaches them,
    with dockerd's FORWARD policy DROP and bridged frames going through iptables as on a real host."""
    one, two = lab.hosts
    first, second = run(one, "first"), run(two, "second")
    assert first != second
    assert "-P FORWARD DROP" in one.sh("iptables -S FORWARD")
    assert one.sh("cat /proc/sys/net/bridge/bridge-nf-call-iptables") == "1"
    for address in (first, second):
        assert lab.machines[0].ping(address)
        assert all(host.ping(address) for host in lab.hosts)
    for target in (second, two.address, lab.machines[0].address, ROUTER4):
        one.docker("exec", "first", "ping", "-c", "1", "-W", "2", target)
    # Not through the host: it is the container's own MAC that answers on the wire.
    [live] = [one for one in lab.live() if one.address == first]
    assert lab.machines[0].mac_of(first) == live.mac
    for host in lab.hosts:
        assert f"{host.address}/24" in host.addresses("br0")
        assert lab.machines[0].ping(host.address)


def test_names_of_a_host_are_its_own(lab: Lab) -> None:
    """Each host has its own hostname, machine id, boot id, /run, /etc/docker and processes, and the
    machine that the lab runs on keeps its own."""
    seen = set()
    for host in lab.hosts:
        name, ident, boot = host.sh("cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id").splitlines()
        assert name == host.sh("hostname") == host.name
        assert boot == host.boot_id
        assert "br0" in host.sh("ls /sys/class/net").split()
        assert host.sh("cat /proc/1/cmdline | tr '\\0' ' '").count(host.name)
        seen |= {ident, boot}
    assert len(seen) == 2 * len(lab.hosts)
    assert "br0" not in os.listdir("/sys/class/net")


def test_power_cut_and_boot(lab: Lab) -> None:
    """A power cut ends everything at once, containers too; a boot keeps the disk, and has a new boot id,
    br0 with its address, none of Docker's interfaces, and containers back where their policy says so."""
    host, machine = lab.hosts[0], lab.machines[0]
    address = run(host, "stays", "--restart", "always")
    run(host, "ends")
    host.docker("network", "create", "made-by-docker")
    boot, ident = host.boot_id, host.sh("cat /etc/machine-id")
    host.kill("all")
    assert not machine.ping(address, within=1)
    assert not machine.ping(host.address, within=1)
    host.boot()
    assert host.addresses() == [f"{host.address}/24", f"{host.address6}/64"]
    assert set(host.sh("ls /sys/class/net").split()) == {"lo", "br0", "eth0"}
    assert host.boot_id != boot
    assert host.sh("cat /proc/sys/kernel/random/boot_id") == host.boot_id
    assert host.sh("cat /etc/machine-id") == ident
    host.start_dockerd()
    until(lambda: [one.container for one in host.live()] == ["stays"], 15, "the container is back")
    assert machine.ping(host.address)
    [live] = host.live()
    assert machine.ping(live.address)
    assert "made-by-docker" in host.docker("network", "ls")
    host.docker("network", "rm", "made-by-docker")


def test_start_brings_back_what_ran(lab: Lab) -> None:
    """`start` after a power cut starts what had been started before, and nothing else."""
    host = lab.hosts[1]
    host.kill("all")
    assert not host.on
    host.start()
    assert set(host.services) == {"dockerd"}
    assert host.docker("network", "inspect", "-f", "{{.Name}}", "lan") == "lan"


def test_kill_dockerd_leaves_containers(lab: Lab) -> None:
    """`kill -9` of dockerd alone leaves its containers on the LAN."""
    host, machine = lab.hosts[0], lab.machines[0]
    address = run(host, "orphan")
    host.kill("dockerd")
    with pytest.raises(CommandError):
        host.docker("ps")
    assert machine.ping(address)
    host.start_dockerd()


def test_cut_off_and_rejoin(lab: Lab) -> None:
    """A host without its cable is off the LAN with its containers, sees it at its carrier, and comes back."""
    host, machine = lab.hosts[0], lab.machines[0]
    address = run(host, "alone")
    assert machine.ping(address)
    host.cut_off()
    until(lambda: host.sh("cat /sys/class/net/eth0/carrier") == "0", 5, "eth0 has no carrier")
    assert not machine.ping(address, within=1)
    assert not machine.ping(host.address, within=1)
    assert host.ping(address)
    host.rejoin()
    assert machine.ping(address)
    assert machine.ping(host.address)


def test_a_stranger_on_the_lan(lab: Lab) -> None:
    """A machine can take one more address, and who answers for an address can be told by its MAC."""
    host, machine = lab.hosts[0], lab.machines[0]
    for address in ("192.168.77.50", "fd00:77::50"):
        assert lab.router is not None
        assert lab.router.mac_of(address, within=1) is None
        machine.add_address(address)
        assert lab.router.ping(address)
        assert lab.router.mac_of(address) == machine.mac
        machine.remove_address(address)
    assert machine.mac_of(host.address) == host.mac


def known(node: Machine, address: str) -> str:
    """Which MAC a machine's neighbour table has for an address, without asking anybody."""
    entries = json.loads(node.run("ip", "-j", "neigh", "show", "to", address).stdout or "[]")
    return entries[0].get("lladdr", "") if entries else ""


@pytest.mark.parametrize("address", ["192.168.77.51", "fd00:77::51"])
def test_a_machine_announces_an_address(lab: Lab, address: str) -> None:
    """After an announcement whoever knew the address by another MAC knows it by the machine's."""
    machine, router = lab.machines[0], lab.router
    assert router is not None
    machine.add_address(address)
    router.ip(f"neigh replace {address} lladdr 02:00:00:00:00:99 nud stale dev eth0")
    machine.announce(address)
    until(lambda: known(router, address) == machine.mac, 5, "the router believes it")
    machine.remove_address(address)


def test_a_well_behaved_machine_takes_an_address(lab: Lab) -> None:
    """It takes what nobody has, leaves what somebody has, and of two that try at once one at most takes it."""
    machine, router = lab.machines[0], lab.router
    assert router is not None
    assert machine.take(lab.hosts[0].address).result(20).stdout.strip() == f"left to {lab.hosts[0].mac}"
    assert machine.take("192.168.77.52").result(20).stdout.strip() == "taken"
    assert router.mac_of("192.168.77.52") == machine.mac
    machine.remove_address("192.168.77.52")
    both = [one.take("192.168.77.53") for one in (machine, router)]
    outcomes = [one.result(20).stdout.strip() for one in both]
    assert f"left to {machine.mac}" in outcomes or f"left to {router.mac}" in outcomes
    assert outcomes.count("taken") <= 1
    for one in (machine, router):
        if "192.168.77.53/24" in one.addresses():
            one.remove_address("192.168.77.53")


def test_proxy_arp(lab: Lab) -> None:
    """A machine answers for everything, also when it is asked by 0.0.0.0, but not for the addresses it is told."""
    machine, router = lab.machines[0], lab.router
    assert router is not None

    def answered(address: str) -> bool:
        # Duplicate address detection: status 1 when somebody answers.
        words = ("busybox", "arping", "-D", "-c", "1", "-w", "1", "-I", "eth0", address)
        return router.run(*words, timeout=10, check=False).status == 1

    with machine.proxy_arp("192.168.77.55"):
        assert router.mac_of("192.168.77.54") == machine.mac
        assert answered("192.168.77.54")
        assert not answered("192.168.77.55")
    assert not answered("192.168.77.54")


def test_a_flood(lab: Lab) -> None:
    """A machine sends thousands of ARP frames a second, and hosts get them."""
    host, machine = lab.hosts[0], lab.machines[0]
    counter = "cat /sys/class/net/br0/statistics/rx_packets"
    before = int(host.sh(counter))
    sent = int(machine.flood(5000, 1).result(20).stdout)
    assert 2000 < sent <= 5000
    assert int(host.sh(counter)) - before >= sent


def test_a_port_that_is_listening(lab: Lab) -> None:
    """A host whose bridge runs spanning tree has a carrier and no LAN, and has it again afterwards."""
    host, machine = lab.hosts[0], lab.machines[0]
    with host.listening():
        assert host.sh("cat /sys/class/net/eth0/carrier") == "1"
        assert not machine.ping(host.address, within=1)
    assert machine.ping(host.address)


def test_what_is_written_to_etcd(lab: Lab) -> None:
    """All that is written below a prefix is seen, also what is gone again, and nothing else."""
    lab.etcdctl("put", "/seen/before", "1")
    with lab.written("/seen/") as events:
        lab.etcdctl("put", "/seen/a", "{}")
        lab.etcdctl("put", "/other", "2")
        lab.etcdctl("del", "/seen/a")
    assert events == [("PUT", "a", "{}"), ("DELETE", "a", "")]
    with lab.written("/seen/") as events:
        lab.etcdctl("put", "/seen/b", "3")
    assert events == [("PUT", "b", "3")]


def test_dual_stack(lab: Lab) -> None:
    """IPv6 works like IPv4: hosts, machines, router, and containers of a network with both families."""
    host, machine = lab.hosts[1], lab.machines[0]
    assert machine.ping("fd00:77::254")
    host.docker("network", "rm", "lan")
    six = ("--ipv6", "--subnet", SUBNET6, "--gateway", host.address6, "--ip-range", "fd00:77::c:0/112")
    create_lan(host, "192.168.77.64/27", *six)
    run(host, "both")
    [address] = [one.address for one in host.live() if ":" in one.address]
    assert machine.ping(address)
    assert machine.ping(host.address6)


@pytest.mark.parametrize("bridge", [True, False])
def test_macvlan(bridge: bool) -> None:
    """A macvlan network works on br0 and, in a host without bridge, on the NIC itself."""
    with Lab(hosts=1, machines=1, etcd=0, bridge=bridge) as lab:
        [host], [machine] = lab.hosts, lab.machines
        assert host.device == ("br0" if bridge else "eth0")
        assert f"{host.address}/24" in host.addresses(host.device)
        host.docker(
            *("network", "create", "-d", "macvlan", "--subnet", SUBNET4, "--gateway", ROUTER4),
            *("--ip-range", "192.168.77.96/28", "-o", f"parent={host.device}", "lan"),
        )
        assert machine.ping(run(host, "mac"))
        assert machine.ping(host.address)


def test_docker_finds_the_daemon(lab: Lab) -> None:
    """dockerd finds the daemon through the spec in its own /etc/docker/plugins; `start_daemon` waits until
    it answers, and `kill("daemon")` ends it."""
    host = lab.hosts[0]
    with pytest.raises(OSError, match=r"No such file|refused"):
        host.driver("Plugin.Activate")
    host.start_daemon()
    assert host.driver("Plugin.Activate") == (200, {"Implements": ["IpamDriver"]})
    host.docker("network", "rm", "lan")
    host.docker(
        *("network", "create", "--ipam-driver", "ipam-plugin", "--subnet", SUBNET4),
        *("-o", "com.docker.network.bridge.name=br0", "lan"),
    )
    assert run(host, "served") == "192.168.77.150"
    assert "/IpamDriver.RequestPool" in host.services["daemon"].tail()
    config = json.loads(host.sh("cat /etc/ipam-plugin/config.yaml"))
    assert config == {"etcd": {"endpoints": lab.endpoints}}
    host.docker("rm", "-f", "served")
    host.docker("network", "rm", "lan")
    host.kill("daemon")
    with pytest.raises(OSError, match="refused"):
        host.driver("Plugin.Activate")
    assert "/IpamDriver.RequestPool" in host.log()
    create_lan(host, "192.168.77.32/27")


def test_the_daemon_without_a_capability(lab: Lab) -> None:
    """The daemon is root and lacks one capability; the next start has it again."""
    host = lab.hosts[0]

    def may(pid: int) -> bool:
        [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("CapEff")]
        return bool(int(line.split()[1], 16) & 1 << 13)  # CAP_NET_RAW

    host.start_daemon(without="net_raw")
    assert not may(host.services["daemon"].pid)
    host.kill("daemon")
    host.start_daemon()
    assert may(host.services["daemon"].pid)
    host.kill("daemon")


def test_a_metric(lab: Lab) -> None:
    """A metric is read where the daemon serves it; without labels it is the sum over all, unknown ones are 0."""
    host = lab.hosts[0]
    host.sh(
        'mkdir /run/www; printf \'a_total{kind="x"} 2.0\na_total{kind="y"} 3.0\na_total_created 9\n\' >/run/www/metrics'
    )
    served = host.serve("metrics", *["busybox", "httpd", "-f", "-p", "127.0.0.1:9179", "-h", "/run/www"])
    try:
        assert until(lambda: host.metric("a_total"), 5, "it is served") == 5
        assert host.metric('a_total{kind="x"}') == 2
        assert host.metric("b_total") == 0
    finally:
        served.kill()
        del host.services["metrics"]


def test_commands_have_a_time_limit(lab: Lab) -> None:
    """A command that hangs is killed at its time limit, with what it started, and says what it was."""
    host = lab.hosts[0]
    with pytest.raises(CommandTimeout, match=r"not done after 0\.5 s"):
        host.sh("sleep 7654 & sleep 7654", timeout=0.5)
    until(lambda: "7654" not in host.sh("ps ax -o args | grep '[s]leep' || :"), 5, "the sleeps are gone")
    begun = host.docker_async("run", "--rm", "--network", "lan", "busybox", "echo", "hello")
    assert begun.result(30).stdout == "hello\n"


def test_etcd_survives_what_is_done_to_a_member() -> None:
    """Three members on the hosts: one dies, one host loses its power, one is paused; the data stay."""
    with Lab(hosts=3, machines=0, etcd=3, etcd_on="hosts", dockerd=False) as lab:
        lab.etcdctl("put", "key", "1")
        leader = lab.leader()
        leader.kill()
        assert lab.leader() is not leader
        leader.start()
        lab.hosts[0].kill("all")
        # While the two that are left elect, a write may time out in etcd itself.
        until(lambda: lab.etcdctl("put", "key", "2") == "OK", 40, "two members take a write")
        lab.hosts[0].start()
        lab.etcd[0].wait()
        paused = lab.leader()
        paused.stop()
        until(lambda: lab.leader() is not paused, 20, "another member leads")
        paused.cont()
        paused.wait()
        assert lab.etcdctl("get", "key", "--print-value-only") == "2"


def test_management_network() -> None:
    """With etcd on a second network, a host that is cut off the LAN still reaches it."""
    with Lab(hosts=1, machines=1, etcd=1, etcd_on="management", dockerd=False) as lab:
        [host], [machine] = lab.hosts, lab.machines
        host.cut_off()
        assert not machine.ping(host.address, within=1)
        assert lab.endpoints == ["http://192.168.78.201:2379"]
        words = ("etcdctl", "--endpoints", lab.endpoints[0], "endpoint", "health")
        host.run(*words, env={"ETCDCTL_API": "3"})
        host.rejoin()
        assert machine.ping(host.address)


OWNER = """
import sys
from tests.lab import Lab
lab = Lab(hosts=1, machines=1, etcd=1)
lab.up()
lab.hosts[0].docker("run", "-d", "busybox")
lab.etcd[0].stop()
print(lab.name, flush=True)
sys.stdin.read()
"""


def inside(name: str) -> dict[int, int | None]:
    """Every process in the PID namespaces of a lab's machines, with its start time."""
    spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in running(name).values()}
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/pid") in spaces:
                    found[int(entry.name)] = start_time(int(entry.name))
    return found


def traces(name: str) -> list[str]:
    """What a lab has left on this machine. Only what bears its name: others may run beside this test."""
    found = [str(path) for pattern in (name, f"*/{name}") for path in CGROUPS.glob(pattern)]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                if name in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(f"process {entry.name}")
                if name in (entry / "mountinfo").read_text():
                    found.append(f"mount in process {entry.name}")
    # Its interfaces bear no name of their own, because none is ever in this namespace.
    found += {"br0", "switch0", "host1", "machine1", "etcd1", "router"} & set(os.listdir("/sys/class/net"))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_when_the_owner_dies(number: signal.Signals) -> None:
    """After `kill -9` of the process that owns a lab its machines are off at once, and the next lab (or a
    sweep) removes its directory and its cgroups; SIGTERM leaves not even these. Its neighbour stays."""
    with Lab(hosts=0, machines=1, etcd=0) as neighbour:
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            assert owner.stdout is not None
            name = owner.stdout.readline().decode().strip()
            assert name.startswith(PREFIX)
            assert set(running(name)) == {"switch", "router", "machine1", "etcd1", "host1"}
            processes = inside(name)
            directory = Path(tempfile.gettempdir()) / name
            assert directory.exists()
            assert [path for path in traces(name) if path.startswith(str(CGROUPS))]
            owner.send_signal(number)
            owner.wait(30)
        finally:
            owner.kill()
            owner.communicate()
        until(
            lambda: not any(start_time(pid) == began for pid, began in processes.items()),
            10,
            "its processes have ended",
        )
        assert (name in Lab.sweep()) == (number == signal.SIGKILL)
        assert not directory.exists()
        assert not traces(name)
        assert neighbour.machines[0].ping(ROUTER4)


def test_nothing_stays_when_it_cannot_be_made(tmp_path: Path) -> None:
    """A lab that fails on its way up takes back what it had made, and says what failed."""
    lab = Lab(hosts=2, machines=0, etcd=0, engine={"storage-driver": "nonsense"}, directory=tmp_path)
    with pytest.raises(LabError, match=r"dockerd ended(.|\n)*nonsense"):
        lab.up()
    assert not traces(lab.name)
    assert not list(tmp_path.iterdir())


def test_by_hand(tmp_path: Path) -> None:
    """`python -m tests.lab up`, `sh`, `docker`, `etcdctl`, `kill`, `start`, `down`."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}

    def lab(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "tests.lab", *words]
        return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=90, check=False)

    assert "no lab is up" in lab("status").stderr
    made = lab("up", "--hosts", "1", "--machines", "1")
    try:
        assert made.returncode == 0, made.stderr
        assert "192.168.77.11" in made.stdout
        assert lab("sh", "host1", "hostname").stdout == "host1\n"
        assert "is not on" in lab("sh", "host2", "hostname").stderr
        assert lab("docker", "host1", "run", "--rm", "busybox", "echo", "hello").stdout == "hello\n"
        assert lab("etcdctl", "put", "key", "value").stdout == "OK\n"
        assert lab("kill", "host1").returncode == 0
        assert lab("sh", "host1", "hostname").returncode == 1
        assert lab("start", "host1").returncode == 0
        assert "busybox" in lab("docker", "host1", "images").stdout
    finally:
        down = lab("down")
    assert (down.returncode, down.stderr) == (0, "")
    assert not list(tmp_path.glob(f"{PREFIX}*"))
