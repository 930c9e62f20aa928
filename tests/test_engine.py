"""The product as a whole: real Docker Engines on a LAN, real daemons, a real etcd, machines that have no Docker."""

from __future__ import annotations

import ipaddress
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import missing
from tests import lab as labs
from tests.lab import Host, Lab, Machine, Result, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

SUBNET = "192.168.77.0/24"
ROUTER = "192.168.77.254"
NETWORK = (
    "network create -d bridge --ipam-driver ipam-plugin --subnet 192.168.77.0/24 --ipam-opt exclude=192.168.77.96/27"
    f" --aux-address DefaultGatewayIPv4={ROUTER} -o com.docker.network.bridge.name=br0 lan"
).split()
CREATE = (
    *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin"),
    *("-o", "com.docker.network.bridge.name=br0"),
)
DEADLINE = 15.0  # the daemon's, unless configured

Leases = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")


@pytest.fixture
def lan() -> Iterator[Lab]:
    """Three Docker hosts, two machines without Docker, a router, one etcd."""
    with Lab(hosts=3, machines=2, etcd=1, daemon=True, config={"probe": "off"}) as lab:
        yield lab


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    """Two hosts that several tests share; each test removes what it made."""
    with Lab(hosts=2, machines=1, etcd=1, daemon=True, config={"probe": "off"}) as lab:
        yield lab


@pytest.fixture
def clean(pair: Lab) -> Iterator[Lab]:
    """The shared pair; afterwards etcd must hold no lease but the hosts'."""
    yield pair
    for host in pair.hosts:
        for name in host.docker("ps", "-aq").split():
            host.docker("rm", "-f", name)
        for name in host.docker("network", "ls", "-q", "--filter", "type=custom").split():
            host.docker("network", "rm", name)
    # The address of a bridge that Docker made is free when that bridge is gone, a moment after its network.
    until(lambda: not strangers(pair), 10, "only the hosts' own leases are left")
    assert_only_hosts(pair)


def leases(lab: Lab, segment: str = "default") -> Leases:
    """The leases as an operator reads them with etcdctl."""
    prefix = f"/ipam-plugin/v1/leases/{segment}/"
    lines = lab.etcdctl("get", "--prefix", prefix).splitlines()
    return {key.removeprefix(prefix): json.loads(value) for key, value in zip(lines[::2], lines[1::2], strict=True)}


def of_kind(lab: Lab, kind: str, segment: str = "default") -> Leases:
    return {address: each for address, each in leases(lab, segment).items() if each["kind"] == kind}


def tokens(lab: Lab) -> dict[str, str]:
    """By address, what says that a lease is still the same one, though a container's name may have been filled in."""
    return {address: each["token"] for address, each in leases(lab).items()}


def strangers(lab: Lab) -> Leases:
    """The leases that are not of the hosts' own addresses."""
    own = {host.address for host in lab.hosts} | {host.address6 for host in lab.hosts}
    return {address: each for address, each in leases(lab).items() if each["kind"] != "host" or address not in own}


def assert_only_hosts(lab: Lab) -> None:
    assert strangers(lab) == {}
    assert lab.etcdctl("get", "--prefix", "/ipam-plugin/v1/pools/") == ""


def assert_register_agrees(lab: Lab) -> None:
    """Every address that is live in a container has exactly one lease, of its own host and MAC, and no other has."""
    live = [each for each in lab.live() if ipaddress.ip_address(each.address).version == 4]
    doubled = [address for address, count in Counter(each.address for each in live).items() if count > 1]
    assert doubled == []
    held = of_kind(lab, "endpoint")
    assert {(a, each["host"], each["mac"]) for a, each in held.items()} == {
        (each.address, each.host, each.mac) for each in live
    }


def start(host: Host, name: str, *options: str, network: str = "lan") -> str:
    """Starts a container and returns its IPv4 address."""
    host.docker("run", "-d", "--network", network, "--name", name, *options, "busybox")
    return address_of(host, name, network)


def address_of(host: Host, name: str, network: str = "lan") -> str:
    return host.docker(
        "inspect", "-f", f"{{{{(index .NetworkSettings.Networks {network!r}).IPAddress}}}}".replace("'", '"'), name
    )


def failed(host: Host, *words: str, timeout: float = 30) -> str:
    """What the user sees of a docker command that must fail."""
    result = host.run(*host.docker_words(*words), timeout=timeout, check=False)
    assert result.status != 0, result.stdout
    return result.stderr


def unreachable_from(machine: Machine, addresses: list[str]) -> list[str]:
    return [address for address in addresses if not machine.ping(address)]


def test_sixty_containers_on_three_hosts(lan: Lab) -> None:
    """The main job: the same network command on every host, containers everywhere at once, every address unique (P1),
    no host's, router's, excluded or reserved address given (P2), every container reached by machines without Docker
    and by containers of the other hosts; after all is removed only the hosts' own leases are left (P3, P5)."""
    lan.hosts[0].command("reserve", "192.168.77.140", "--note", "printer")
    lan.hosts[1].command("reserve", "192.168.77.150-192.168.77.159", "--note", "phones")
    lan.etcdctl("put", "/ipam-plugin/v1/leases/default/192.168.77.141", "junk by hand")
    for host in lan.hosts:
        host.docker(*NETWORK)
    running = [
        (host, f"c{number}", host.docker_async("run", "-d", "--network", "lan", "--name", f"c{number}", "busybox"))
        for number in range(20)
        for host in lan.hosts
    ]
    for _, _, command in running:
        command.result(120)

    live = [each.address for each in lan.live()]
    assert len(live) == len(set(live)) == 60
    given = set(map(ipaddress.ip_address, live))
    forbidden = {*(host.address for host in lan.hosts), ROUTER, "192.168.77.0", "192.168.77.255", "192.168.77.140"}
    assert given.isdisjoint(map(ipaddress.ip_address, [*forbidden, "192.168.77.141"]))
    assert not any(each in ipaddress.ip_network("192.168.77.96/27") for each in given)
    assert not any(150 <= int(str(each).rpartition(".")[2]) <= 159 for each in given)
    lan.etcdctl("del", "/ipam-plugin/v1/leases/default/192.168.77.141")  # not JSON, and checked by now
    assert_register_agrees(lan)

    for machine in lan.machines:
        assert unreachable_from(machine, live) == []
        assert unreachable_from(machine, [host.address for host in lan.hosts]) == []
    for host in lan.hosts:
        others = " ".join(each.address for each in lan.live() if each.host != host.name)
        loop = f"for a in {others}; do ping -c 1 -W 2 $a >/dev/null || echo $a; done"
        assert host.docker("exec", "c0", "sh", "-c", loop, timeout=120) == ""
        assert host.sh("ip -4 -br addr show br0").split()[2] == f"{host.address}/24"

    # Everything else that people do with containers.
    first, second, third = lan.hosts
    first.docker("restart", "-t", "0", "c1")
    first.docker("stop", "-t", "0", "c2")
    assert_register_agrees(lan)
    first.docker("start", "c2")
    asked = start(second, "fixed", "--ip", "192.168.77.200")
    assert asked == "192.168.77.200"
    assert "192.168.77.200" in failed(third, "run", "--network", "lan", "--ip", "192.168.77.200", "busybox")
    second.docker("restart", "-t", "0", "fixed")
    assert address_of(second, "fixed") == "192.168.77.200"
    third.docker("network", "disconnect", "lan", "c3")
    assert_register_agrees(lan)
    third.docker("network", "connect", "lan", "c3")
    third.docker("rm", "-f", "c4")
    assert_register_agrees(lan)
    assert unreachable_from(lan.machines[0], [each.address for each in lan.live()]) == []

    for host in lan.hosts:
        host.docker("rm", "-f", *host.docker("ps", "-aq").split(), timeout=180)
        host.docker("network", "rm", "lan")
        assert host.sh("ip -4 -br addr show br0").split()[2] == f"{host.address}/24"
    first.command("unreserve", "192.168.77.140")
    first.command("unreserve", "192.168.77.150-192.168.77.159")
    assert_only_hosts(lan)
    for host in lan.hosts:
        assert lan.machines[0].ping(host.address)


def test_daemon_killed_in_the_middle_of_sixty_starts(lan: Lab) -> None:
    """kill -9 of all daemons while 60 containers start: whatever runs afterwards has exactly one lease and the only
    one on its address (P1), and no docker command was blocked longer than the deadline (P6)."""
    for host in lan.hosts:
        host.docker(*NETWORK)
    commands = []
    for number in range(20):
        for host in lan.hosts:
            words = ("run", "-d", "--network", "lan", "--name", f"c{number}", "busybox")
            commands.append((time.monotonic(), host.docker_async(*words)))
        if number == 9:
            for host in lan.hosts:
                host.kill("daemon")
                host.start_daemon(wait=False)
    results: list[Result] = [command.result(120, check=False) for _, command in commands]
    for host in lan.hosts:
        host.wait_daemon()

    live = [each for each in lan.live() if ":" not in each.address]
    assert len({each.address for each in live}) == len(live)
    held = of_kind(lan, "endpoint")
    for each in live:
        assert (held[each.address]["host"], held[each.address]["mac"]) == (each.host, each.mac)
    started = sum(result.status == 0 for result in results)
    assert len(live) == started > 30
    for result in results:
        # What failed says why, in one line for the person who typed it.
        assert result.status == 0 or "IpamDriver" in result.stderr or "ipam" in result.stderr.lower(), result.stderr
    # The daemon goes on: new containers start, and the network is usable as before.
    for host in lan.hosts:
        assert start(host, "after")
    longest = max(result.seconds for result in results)
    # 60 docker commands share two cores, so the time of a start without any plugin comes on top of the deadline.
    assert longest < 2 * DEADLINE, f"a docker command was blocked for {longest:.1f} s"


def test_bridge_without_gateway_keeps_the_hosts_address(clean: Lab) -> None:
    """Without --gateway the answer is the host's own address, so Docker leaves br0 and its routes alone."""
    for host in clean.hosts:
        before = host.sh("ip -4 addr show br0; ip -4 route show default")
        host.docker(*NETWORK)
        after = host.sh("ip -4 addr show br0; ip -4 route show default")
        assert before == after
        address = start(host, "web")
        # The router is the container's default route, thanks to the auxiliary address.
        assert f"default via {ROUTER}" in host.docker("exec", "web", "ip", "route")
        assert clean.machines[0].ping(address)
    assert {holder["host"] for holder in leases(clean)[ROUTER]["holders"]} == {"host1", "host2"}


def test_bridge_with_the_hosts_own_gateway(clean: Lab) -> None:
    """--gateway with this host's own address works, and makes the host the containers' default route."""
    host = clean.hosts[0]
    host.docker(*CREATE, "--subnet", SUBNET, "--gateway", host.address, "lan")
    address = start(host, "web")
    assert f"default via {host.address}" in host.docker("exec", "web", "ip", "route")
    assert clean.machines[0].ping(address)


def test_gateway_that_is_not_this_hosts_is_refused(clean: Lab) -> None:
    """--gateway with the router's, another host's or a second address would cut the host off: refused, naming the
    holder and the cure, and br0 keeps its address (P7, P8)."""
    first, second = clean.hosts
    second.docker(*NETWORK)  # now the router is known as such
    for gateway, named in ((second.address, "host2"), (ROUTER, "router"), ("192.168.77.99", first.address)):
        said = failed(first, *CREATE, "--subnet", SUBNET, "--gateway", gateway, "lan")
        assert gateway in said
        assert named in said
        assert "DefaultGatewayIPv4" in said
        assert first.sh("ip -4 -br addr show br0").split()[2] == f"{first.address}/24"
    assert clean.machines[0].ping(first.address)


def test_ip_range(clean: Lab) -> None:
    """--ip-range narrows what is chosen, not the mask, and --ip may lie outside of it."""
    host = clean.hosts[0]
    host.docker(*NETWORK[:-1], "--ip-range", "192.168.77.192/28", "lan")
    for number in range(3):
        address = start(host, f"c{number}")
        assert ipaddress.ip_address(address) in ipaddress.ip_network("192.168.77.192/28")
    assert start(host, "outside", "--ip", "192.168.77.60") == "192.168.77.60"
    assert "/24" in host.docker("exec", "c0", "ip", "-4", "-o", "addr", "show", "eth0")
    assert clean.machines[0].ping("192.168.77.60")


def test_dual_stack(clean: Lab) -> None:
    """A network with an IPv4 and an IPv6 subnet: two pools, two leases a container, both answer on the LAN."""
    for host in clean.hosts:
        # dockerd deletes the IPv6 addresses of a bridge when it makes a network without IPv6 on it.
        host.ip(f"addr replace {host.address6}/64 dev br0")
        host.docker(
            *NETWORK[:-1],
            "--ipv6",
            "--subnet",
            "fd00:77::/64",
            "--aux-address",
            "DefaultGatewayIPv6=fd00:77::254",
            "lan",
        )
        start(host, "web")
    for each in clean.live():
        assert until(lambda each=each: clean.machines[0].ping(each.address), 10, f"{each.address} answers")
    assert len({each.address for each in clean.live()}) == 4
    held = of_kind(clean, "endpoint")
    assert set(held) == {each.address for each in clean.live()}


def test_macvlan_with_the_router_as_gateway(clean: Lab) -> None:
    """macvlan: --ipam-opt gateway=router is shared by all hosts; without --gateway it is the segment's router."""
    first, second = clean.hosts
    create = (
        f"network create -d macvlan --ipam-driver ipam-plugin --subnet {SUBNET} --ipam-opt gateway=router -o parent=br0"
    )
    said = failed(second, *create.split(), "lan")
    assert "--router" in said
    assert "--gateway" in said
    first.docker(*create.split(), "--gateway", ROUTER, "lan")
    first.command("segment", "default", "--router", ROUTER)
    try:
        second.docker(*create.split(), "lan")
        for host in clean.hosts:
            address = start(host, "web")
            assert f"default via {ROUTER}" in host.docker("exec", "web", "ip", "route")
            assert clean.machines[0].ping(address)
        assert {holder["host"] for holder in leases(clean)[ROUTER]["holders"]} == {"host1", "host2"}
        for host in clean.hosts:
            host.docker("rm", "-f", "web")
            host.docker("network", "rm", "lan")
        # The segment's own router keeps its lease.
        assert leases(clean)[ROUTER].get("holders", []) == []
    finally:
        clean.etcdctl("del", "/ipam-plugin/v1/segments/default")
        clean.etcdctl("del", f"/ipam-plugin/v1/leases/default/{ROUTER}")


def test_failed_network_leaves_the_first_one_alone(clean: Lab) -> None:
    """A second network on the same bridge is refused by Docker after its addresses were given: what the first one
    holds under the same PoolID stays, and what the second one took is given back."""
    host = clean.hosts[0]
    host.docker(*NETWORK)
    before = leases(clean)
    failed(host, *NETWORK[:-1], "again")
    assert {a: each["token"] for a, each in leases(clean).items()} == {a: each["token"] for a, each in before.items()}
    assert leases(clean)[ROUTER]["holders"] == before[ROUTER]["holders"]
    assert start(host, "web")


def test_network_without_subnet_is_refused_at_once(clean: Lab) -> None:
    """An engine would repeat a request without --subnet for ever; it is told what to type (P6, P7)."""
    began = time.monotonic()
    said = failed(clean.hosts[0], *["network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "lan"])
    assert "--subnet" in said
    assert time.monotonic() - began < 5


def test_unknown_option_is_refused(clean: Lab) -> None:
    """A typing error in --ipam-opt is named, not ignored."""
    said = failed(
        clean.hosts[0], *f"network create --ipam-driver ipam-plugin --subnet {SUBNET} --ipam-opt excude=1 lan".split()
    )
    assert "excude" in said


def test_full_pool_says_so_to_the_user(clean: Lab) -> None:
    """The user of docker run sees the line with the counts (P7)."""
    host = clean.hosts[0]
    host.docker(*NETWORK[:-1], "--ip-range", "192.168.77.192/30", "lan")
    for number in range(4):
        start(host, f"c{number}")
    said = failed(host, "run", "--network", "lan", "busybox")
    assert "full" in said
    assert "4 endpoint" in said
    assert len(said.strip().splitlines()) <= 3  # docker adds a hint to run --help


def test_wider_bridge_than_subnet_is_refused(clean: Lab) -> None:
    """A host whose bridge has a /16 and a network of --subnet /24: Docker would delete the bridge's address, so it is
    refused with the cure, the cure works, and the host keeps its address."""
    host = clean.hosts[1]
    host.ip("addr add 192.168.77.12/16 dev br0", "addr del 192.168.77.12/24 dev br0")
    try:
        said = failed(host, *NETWORK)
        assert "--ip-range 192.168.77.0/24" in said
        assert "--subnet 192.168.0.0/16" in said
        assert host.sh("ip -4 -br addr show br0").split()[2] == "192.168.77.12/16"
        wide = ("--subnet", "192.168.0.0/16", "--ip-range", SUBNET)
        host.docker(*CREATE, *wide, "--aux-address", f"DefaultGatewayIPv4={ROUTER}", "lan")
        assert host.sh("ip -4 -br addr show br0").split()[2] == "192.168.77.12/16"
        address = start(host, "web")
        assert ipaddress.ip_address(address) in ipaddress.ip_network(SUBNET)
        # The /24 on the other host is of the same segment: no address is given twice.
        clean.hosts[0].docker(*NETWORK)
        assert start(clean.hosts[0], "web") != address
        host.docker("rm", "-f", "web")
        host.docker("network", "rm", "lan")
    finally:
        host.ip("addr add 192.168.77.12/24 dev br0", "addr del 192.168.77.12/16 dev br0")
        host.ip(f"route replace default via {ROUTER}")


def test_gateway_of_a_bridge_survives_a_power_cut(lan: Lab) -> None:
    """A network on a bridge that Docker made: after a power cut, before dockerd has rebuilt the bridge, nobody else is
    given its address, and dockerd finds everything as it was."""
    first, second = lan.hosts[:2]
    create = ["network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "--subnet", "10.99.0.0/29", "inside"]
    first.docker(*create)
    gateway = next(address for address, each in of_kind(lan, "host").items() if address.startswith("10.99."))
    first.docker("run", "-d", "--restart", "always", "--network", "inside", "--name", "web", "busybox")
    second.docker(*create)
    first.kill("all")
    first.boot()
    first.start_daemon()
    until(lambda: "yes" in second.command("hosts").splitlines()[1], 40, "host1 is alive again")
    given = []
    while True:
        result = second.run(
            *second.docker_words("run", "-d", "--network", "inside", "busybox"), timeout=30, check=False
        )
        if result.status != 0:
            assert "full" in result.stderr
            break
        given.append(result.stdout.strip())
    taken = {each.address for each in second.live() if each.address.startswith("10.99.")}
    assert len(taken) == len(given) == 3  # of 6: two gateways, and the container of the host that lost its power
    assert gateway not in taken
    assert of_kind(lan, "host")[gateway]["host"] == "host1"
    first.start_dockerd()
    until(lambda: gateway in first.sh("ip -4 addr"), 20, "dockerd rebuilt the bridge")
    assert of_kind(lan, "host")[gateway]["host"] == "host1"


def test_dockerd_killed_and_restarted(clean: Lab) -> None:
    """kill -9 of dockerd and its containers: at its start it releases the stale endpoints; stopped containers start
    again and everything agrees (libnetwork#1207, calico#746)."""
    host = clean.hosts[0]
    host.docker(*NETWORK)
    start(host, "dynamic")
    start(host, "fixed", "--ip", "192.168.77.210")
    host.kill("dockerd")
    host.start_dockerd()
    for name in ("dynamic", "fixed"):
        host.docker("start", name)
    assert address_of(host, "fixed") == "192.168.77.210"
    until(lambda: len(of_kind(clean, "endpoint")) == 2, 20, "the stale endpoints' leases are gone")
    assert_register_agrees(clean)


def test_two_hosts_without_bridge_name_share_the_segment(clean: Lab) -> None:
    """The simplest command there is: a bridge that Docker makes, the gateway chosen by the register, on two hosts."""
    for host in clean.hosts:
        host.docker(*["network", "create", "--ipam-driver", "ipam-plugin", "--subnet", "10.98.0.0/24", "plain"])
        start(host, "web", network="plain")
    own = {address for address in of_kind(clean, "host") if address.startswith("10.98.")}
    assert len(own) == 2
    assert len(of_kind(clean, "endpoint")) == 2


def test_unreachable_etcd_is_said_to_the_user(clean: Lab) -> None:
    """With etcd away docker run fails within the deadline and says why; with etcd back it works (P6, P7)."""
    host = clean.hosts[0]
    host.docker(*NETWORK)
    clean.etcd[0].stop()
    try:
        began = time.monotonic()
        said = failed(host, "run", "-d", "--network", "lan", "--name", "web", "busybox", timeout=60)
        assert time.monotonic() - began < DEADLINE + 5
        assert "etcd" in said
    finally:
        clean.etcd[0].cont()
    host.docker("rm", "-f", "web")
    until(lambda: of_kind(clean, "endpoint") == {}, 30, "what may have been written is taken back")
    assert start(host, "again")
    assert_register_agrees(clean)


def test_addresses_that_a_host_gets_later(clean: Lab) -> None:
    """An address put on a host's interface while the daemon runs is in the register within seconds (P2); one that a
    container has already raises an alarm naming both, and the container's lease stays (P3)."""
    first, second = clean.hosts
    first.docker(*NETWORK)
    start(first, "web", "--ip", "192.168.77.88")
    before = tokens(clean)["192.168.77.88"]
    second.ip("addr add 192.168.77.77/24 dev br0", "addr add 192.168.77.88/24 dev br0")
    try:
        mine = until(lambda: leases(clean).get("192.168.77.77"), 5, "the new address is registered")
        assert (mine["kind"], mine["host"], mine["interface"]) == ("host", "host2", "br0")
        said = until(lambda: [each for each in first.command("hosts").splitlines() if "ALARM" in each], 5, "the alarm")
        assert "192.168.77.88" in said[0]
        assert "host1" in said[0]
        assert "host2" in said[0]
        assert tokens(clean)["192.168.77.88"] == before
        assert "host2" in failed(first, "run", "--network", "lan", "--ip", "192.168.77.77", "busybox")
    finally:
        second.ip("addr del 192.168.77.77/24 dev br0", "addr del 192.168.77.88/24 dev br0")
        first.command("release", "192.168.77.77", "--force")


def test_restart_of_the_daemon_under_running_containers(clean: Lab) -> None:
    """An orderly restart changes nothing for what runs (P8), and what is asked meanwhile is answered."""
    host = clean.hosts[0]
    host.docker(*NETWORK)
    address = start(host, "web")
    before = tokens(clean)
    host.restart("daemon")
    assert start(host, "next")
    assert before.items() <= tokens(clean).items()
    assert clean.machines[0].ping(address)
