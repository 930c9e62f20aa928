"""Addresses that are kept for stopped containers of a real Docker Engine."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator

import docker
import msgspec
import pytest

from conftest import missing
from ipam_plugin.dockerd import Dockerd
from ipam_plugin.evidence import APART, Look, unclaimed
from ipam_plugin.model import Lease
from test_engine import address_of, failed, leases, of_kind, start
from test_wire_engine import network, remove_all
from tests import lab as labs
from tests.lab import Host, Lab, until
from tests.lab.machines import DOCKER_SOCKET

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

RANGE = "192.168.77.128/29"  # eight addresses
STATIC = "192.168.77.130"


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    with Lab(hosts=1, machines=0, etcd=1, etcd_on="management", daemon=True) as lab:
        yield lab


@pytest.fixture
def lan(shared: Lab) -> Iterator[Lab]:
    """A network that keeps addresses for ten minutes; afterwards nothing is left of it."""
    host = shared.hosts[0]
    network(host, RANGE, "--ipam-opt", "hold=10m")
    yield shared
    remove_all(host)
    for address in of_kind(shared, "held"):
        host.command("release", address, "--force")


def look(host: Host, at: float) -> Look:
    """What that engine has, as if it had said so at that time."""
    return Dockerd(f"/proc/{host.pid}/root{DOCKER_SOCKET}").look()._replace(began=at, ended=at)


def with_mac(host: Host, name: str, mac: str) -> None:
    """As `docker run -d --mac-address` of this engine's own time; a newer command does not ask an older engine so."""
    engine = docker.APIClient(f"unix:///proc/{host.pid}/root{DOCKER_SOCKET}")
    with contextlib.closing(engine):
        config = engine.create_host_config(network_mode="lan")
        engine.create_container("busybox", name=name, mac_address=mac, host_config=config)
    host.docker("start", name)


def is_over(lab: Lab, address: str) -> bool:
    """Whether two looks at the engine end the hold of this address."""
    held, number = msgspec.convert(leases(lab)[address], Lease), ipaddress.ip_address(address)
    first = unclaimed(None, held, number, look(lab.hosts[0], 0.0))
    return unclaimed(first, held, number, look(lab.hosts[0], APART)).is_over


def test_hiero_local_node_1395_the_static_container_finds_its_address(lan: Lab) -> None:
    """hiero-ledger/hiero-local-node#1395, moby/libnetwork#1057: a container without `--ip` does not get the address of
    a stopped one with it, in whichever order they start; also after the engine was killed and has released everything.
    """
    host = lan.hosts[0]
    assert start(host, "static", "--ip", STATIC) == STATIC
    host.docker("stop", "-t", "0", "static")
    assert "for a container on host host1 until" in host.command("show", STATIC)
    others = [f"other{number}" for number in range(4)]
    assert STATIC not in [start(host, name) for name in others]
    host.docker("start", "static")
    assert address_of(host, "static") == STATIC

    host.kill("dockerd")
    host.start_dockerd()
    until(lambda: STATIC in of_kind(lan, "held"), 20, "the engine has released the stale endpoints")
    for name in (*others, "static"):
        host.docker("start", name)
    assert address_of(host, "static") == STATIC
    assert of_kind(lan, "endpoint")[STATIC]["fixed"] is True


def test_a_mac_is_recognised_and_random_ones_are_not(lan: Lab) -> None:
    """From its second stop on, a container with --mac-address keeps its address; others never do."""
    host = lan.hosts[0]
    with_mac(host, "mine", "02:00:5e:00:00:07")
    start(host, "any")
    for name in ("mine", "any"):
        host.docker("stop", "-t", "0", name)
    assert of_kind(lan, "held") == {}
    for name in ("mine", "any"):
        host.docker("start", name)
    address = address_of(host, "mine")
    for name in ("mine", "any"):
        host.docker("stop", "-t", "0", name)
    assert list(of_kind(lan, "held")) == [address]
    host.docker("start", "any")
    assert address_of(host, "any") != address
    host.docker("start", "mine")
    assert address_of(host, "mine") == address


def test_rm_and_shortage_end_a_hold(lan: Lab) -> None:
    """What this engine says of stopped containers is enough to tell stop from rm. Where nothing else is free, the hold
    gives way."""
    host = lan.hosts[0]
    for name, address in (("gone", "192.168.77.131"), ("static", STATIC)):
        start(host, name, "--ip", address)
        host.docker("stop", "-t", "0", name)
    host.docker("rm", "gone")
    assert is_over(lan, "192.168.77.131")
    assert not is_over(lan, STATIC)

    given = [start(host, f"other{number}") for number in range(7)]
    assert given[-1] == "192.168.77.131"
    assert STATIC not in given
    assert start(host, "last") == STATIC
    assert "container" in failed(host, "start", "static")
    assert "8 endpoint" in failed(host, "run", "-d", "--network", "lan", "busybox")
