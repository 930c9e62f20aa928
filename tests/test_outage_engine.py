"""etcd goes down under real Docker Engines: what still works, and that both agree when it is back.

See test_long_absence.py for one that halts and for hosts that are cut off. IPAM_OUTAGE_SECONDS: how long it is down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import missing
from test_engine import address_of, assert_register_agrees, failed, of_kind, start
from tests import lab as labs
from tests.lab import Host, Lab, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

NETWORK = (
    *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "--subnet", "192.168.77.0/24"),
    *("--aux-address", "DefaultGatewayIPv4=192.168.77.254", "-o", "com.docker.network.bridge.name=br0", "lan"),
)
DEADLINE = 15.0  # the daemon's, unless configured
OUTAGE = float(os.environ.get("IPAM_OUTAGE_SECONDS", "45"))
"""How long etcd is away; longer than the heartbeat's 30 s."""


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")


@pytest.fixture
def lan() -> Iterator[Lab]:
    """Two Docker hosts with standby and probing as they are by default, a machine without Docker, one etcd."""
    with Lab(hosts=2, machines=1, etcd=1, daemon=True) as lab:
        for host in lab.hosts:
            host.docker(*NETWORK)
        yield lab


def standby_of(lab: Lab, host: Host) -> set[str]:
    return {address for address, each in of_kind(lab, "standby").items() if each["host"] == host.name}


def agreed(lab: Lab) -> bool:
    try:
        assert_register_agrees(lab)
    except AssertionError:
        return False
    return True


def test_etcd_is_down(lan: Lab) -> None:
    """P4, P5, P6, P8: running containers are reached all the time; stop, rm and as many starts as there are standby
    addresses work; the next start is refused within the deadline and says so. Afterwards etcd and Docker agree, though
    the daemon was killed before etcd came back.
    """
    a, b = lan.hosts
    machine = lan.machines[0]
    running, there = start(a, "running"), start(b, "there")
    start(a, "stopped"), start(a, "removed")
    named = start(a, "named", "--ip", "192.168.77.99")
    until(lambda: len(standby_of(lan, a)) == 2 and len(standby_of(lan, b)) == 2, 30, "the standby of both")
    until(lambda: a.metric("ipam_plugin_standby") == 2, 20, "it is tested")
    spare = standby_of(lan, a)
    lan.etcd[0].kill()
    began = time.monotonic()
    a.docker("stop", "-t", "0", "stopped")
    a.docker("rm", "-f", "removed")
    a.docker("restart", "-t", "0", "named")
    assert address_of(a, "named") == named
    assert {start(a, "first"), start(a, "second")} == spare
    asked = time.monotonic()
    said = failed(a, "run", "--network", "lan", "--name", "third", "busybox", timeout=40)
    assert time.monotonic() - asked < DEADLINE + 5
    assert "had in standby for such a time none is left" in said
    until(lambda: a.metric("ipam_plugin_etcd_away") == 1 and a.metric("ipam_plugin_journal_entries") > 0, 20, "told")
    while time.monotonic() - began < OUTAGE:
        for address in (running, there, *spare):
            assert machine.ping(address), address
    a.kill("daemon")
    lan.etcd[0].start()
    a.start_daemon()
    until(lambda: agreed(lan), 60, "etcd and Docker agree")
    assert set(of_kind(lan, "endpoint")) == {running, there, named, *spare}
    until(
        lambda: a.metric("ipam_plugin_journal_entries") == 0 == a.metric("ipam_plugin_etcd_away"), 20, "the end of it"
    )
    until(lambda: len(standby_of(lan, a)) == 2, 30, "the stock is filled again")
    a.docker("start", "stopped")
    assert_register_agrees(lan)
    assert machine.ping(address_of(a, "stopped"))


def test_the_disk_is_full_while_etcd_is_away(lan: Lab, tmp_path: Path) -> None:
    """Neither etcd nor disk: the start is refused and says why; what was released meanwhile is free afterwards."""
    a, _ = lan.hosts
    start(a, "stopped")
    running = start(a, "running")
    until(lambda: a.metric("ipam_plugin_standby") == 2, 30, "the standby")
    a.sh("mkdir -p /mnt/full && mount -t tmpfs -o size=4k none /mnt/full && touch /mnt/full/journal")
    a.sh(
        "mount --bind /mnt/full/journal /var/lib/ipam-plugin/journal 2>/dev/null || { touch"
        " /var/lib/ipam-plugin/journal && mount --bind /mnt/full/journal /var/lib/ipam-plugin/journal; }"
    )
    a.sh("head -c 100000 /dev/zero >/mnt/full/filler || true")
    lan.etcd[0].kill()
    a.docker("stop", "-t", "0", "stopped")
    said = failed(a, "run", "--network", "lan", "--name", "more", "busybox", timeout=40)
    assert "cannot be written: No space left on device" in said
    lan.etcd[0].start()
    until(lambda: set(of_kind(lan, "endpoint")) == {running}, 60, "the release")
    start(a, "more2")
    assert_register_agrees(lan)
