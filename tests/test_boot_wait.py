"""dockerd starts beside the daemon while etcd is away: it comes up within a bounded time, and so do its containers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from conftest import missing
from tests import lab as labs
from tests.lab import Lab, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

DEADLINE = 3.0
BOOT_WAIT = 60.0
CREATE = (
    *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "--subnet", "192.168.77.0/24"),
    *("-o", "com.docker.network.bridge.name=br0", "--aux-address", "DefaultGatewayIPv4=192.168.77.254", "lan"),
)


@pytest.fixture(scope="module")
def lan() -> Iterator[Lab]:
    """One Docker host with a container `--restart=always`, and an etcd elsewhere."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    config = {"probe": "off", "deadline": f"{DEADLINE:g}s", "etcd": {"timeout": "1s"}, "boot_wait": f"{BOOT_WAIT:g}s"}
    with Lab(hosts=1, machines=0, etcd=1, daemon=True, config=config) as lab:
        lab.hosts[0].docker(*CREATE)
        lab.hosts[0].docker("run", "-d", "--restart=always", "--network", "lan", "--name", "app", "busybox")
        yield lab


def address(lab: Lab) -> str:
    """Of the container on its network; '' when it does not run."""
    shown = json.loads(lab.hosts[0].docker("inspect", "app"))[0]
    return str(shown["NetworkSettings"]["Networks"]["lan"]["IPAddress"])


def leases(lab: Lab) -> dict[str, str]:
    """Kind by address, of what is no machine's own."""
    values = lab.etcdctl("get", "--prefix", "--print-value-only", "/ipam-plugin/v1/leases/").splitlines()
    keys = lab.etcdctl("get", "--prefix", "--keys-only", "/ipam-plugin/v1/leases/").split()
    kinds = {key.rpartition("/")[2]: json.loads(value)["kind"] for key, value in zip(keys, values, strict=True)}
    return {each: kind for each, kind in kinds.items() if kind not in ("host", "router")}


def test_calico_746_a_container_waits_for_etcd_at_boot(lan: Lab) -> None:
    """A power cut of host and etcd at once; etcd is back when dockerd already asks. Beyond the deadline the request
    waits, also until the heartbeat of the boot before has ended, and the container runs again with one lease.
    """
    [host], [etcd] = lan.hosts, lan.etcd
    host.kill("all")
    etcd.kill()
    host.boot()
    host.start_daemon()
    began = time.monotonic()
    host.start_dockerd(wait=False)
    until(lambda: time.monotonic() > began + 2 * DEADLINE, 30, "longer than the deadline")
    etcd.start()
    host.wait_dockerd(BOOT_WAIT)
    until(lambda: address(lan), 10, "the container runs again")
    print(f"etcd away, then the heartbeat of the boot before: dockerd is up after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began > 2 * DEADLINE
    assert leases(lan) == {address(lan): "endpoint"}


def test_docker_net_dhcp_44_dockerd_comes_up_though_etcd_does_not(lan: Lab) -> None:
    """P6: boot_wait once, then the deadline for each request. Later `docker start` is all that is missing."""
    [host], [etcd] = lan.hosts, lan.etcd
    host.kill("all")
    etcd.kill()
    host.configure(probe="off", deadline="3s", boot_wait="8s", etcd={"timeout": "1s"})
    host.boot()
    host.start_daemon()
    began = time.monotonic()
    host.start_dockerd(wait=False)
    # The release of the endpoint that the cut left, and the request of the container.
    host.wait_dockerd(8 + 2 * DEADLINE + 10)
    took = time.monotonic() - began
    print(f"etcd away: dockerd is up after {took:.1f} s")
    assert took > 7  # it did wait for etcd
    assert host.docker("info")
    assert address(lan) == ""
    etcd.start()
    until(lambda: host.metric("ipam_plugin_serving") == 1, 45, "the daemon serves")
    host.docker("start", "app")
    assert leases(lan)[address(lan)] == "endpoint"
