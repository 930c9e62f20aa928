"""A host, or etcd, is away for longer than any timer: who has an address keeps it, and all is written down meanwhile.

`custody` judges the whole time: every write in etcd, and every container that the kernel knows. IPAM_OUTAGE_SECONDS
says how long etcd is away (60; the promise is about 600).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator

import pytest

from conftest import missing
from custody import unsettled, violations
from recorder import Recorder
from test_engine import CREATE, DEADLINE, assert_register_agrees, failed, of_kind, start
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, Host, Lab, Machine, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

OUTAGE = float(os.environ.get("IPAM_OUTAGE_SECONDS", "60"))
# The heartbeat's 30 s, the grace of 30 s, and two looks at Docker that are 30 s apart.
ABSENCE = 70.0
BOUND = 120.0  # in which an address without an owner is free again, and a container without a lease has one
STANDBY = 2  # unless configured
RANGE, ADDRESSES = "192.168.77.128/28", 16
FIXED, LATE = "192.168.77.90", "192.168.77.91"


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    """Three Docker hosts with one pool that is soon full, a machine without Docker, three members of etcd."""
    with Lab(hosts=3, machines=1, etcd=3, daemon=True, config={"docker": {"grace": "30s"}}) as lab:
        for host in lab.hosts:
            aux = ("--aux-address", f"DefaultGatewayIPv4={ROUTER4}")
            host.docker(*CREATE, "--subnet", SUBNET4, "--ip-range", RANGE, *aux, "lan")
        yield lab


@pytest.fixture
def lan(shared: Lab) -> Iterator[Lab]:
    """The shared lab; afterwards no container is left."""
    yield shared
    for host in shared.hosts:
        names = host.docker("ps", "-aq").split()
        if names:
            host.docker("rm", "-f", *names)
    until(lambda: of_kind(shared, "endpoint") == {}, 60, "no container has an address")


@contextlib.contextmanager
def reached_all_the_time(machine: Machine, addresses: Iterable[str]) -> Iterator[None]:
    """While it lasts the machine asks each address once a second for an echo, and none may stay away."""
    services = {each: machine.serve(f"ping-{each}", "busybox", "ping", each) for each in addresses}
    try:
        yield
    finally:
        for service in services.values():
            service.signal(signal.SIGINT)  # for its sums
            service.wait(10)
    for address, service in services.items():
        sums = re.search(r"(\d+) packets transmitted, (\d+) packets received", service.tail())
        assert sums, service.tail()
        sent, received = map(int, sums.groups())
        assert sent - received <= 1, f"{address} did not answer {sent - received} of {sent} times"  # the last one


@contextlib.contextmanager
def halted(lab: Lab) -> Iterator[None]:
    """While it lasts no member of etcd answers, and every connection stays open."""
    for member in lab.etcd:
        member.stop()
    try:
        yield
    finally:
        for member in lab.etcd:
            member.cont()
        for member in lab.etcd:
            member.wait()


def ready(lab: Lab, host: Host) -> set[str]:
    """The addresses in the host's stock, once it is full by its own word and in etcd."""

    def found() -> set[str]:
        return {address for address, each in of_kind(lab, "standby").items() if each["host"] == host.name}

    until(lambda: host.metric("ipam_plugin_standby") == len(found()) == STANDBY, 60, f"{host.name} has its stock")
    return found()


def refused(host: Host, *words: str) -> str:
    """What the user reads of a docker command that must fail within the daemon's deadline."""
    asked = time.monotonic()
    said = failed(host, *words, timeout=60)
    assert time.monotonic() - asked < DEADLINE + 5
    return said


def settle(recorder: Recorder) -> None:
    """Waits until etcd and Docker agree; then nothing may ever have been wrong."""
    until(lambda: unsettled(recorder.history(), standby=STANDBY) == [], BOUND, "etcd and Docker agree", pause=1.0)
    assert violations(recorder.history(), within=BOUND, standby=STANDBY) == []


def test_a_host_is_cut_off_while_the_pool_runs_full(lan: Lab) -> None:
    """Cut off from the LAN and etcd for longer than any timer, while the others want every address that is left: its
    containers run and keep theirs, nobody gets one, and what was stopped and started there meanwhile is in etcd soon
    after its return (P1, P3, P5, P8)."""
    away, *others = lan.hosts
    with Recorder(lan) as recorder:
        mine = {start(away, f"a{number}") for number in range(3)}
        stopped = start(away, "stopped")
        stock = ready(lan, away)
        tokens = {address: each["token"] for address, each in of_kind(lan, "endpoint").items()}
        with recorder.absent("daemon", away.name):
            away.cut_off()
            began = time.monotonic()
            away.docker("rm", "-f", "stopped")
            assert start(away, "started") in stock
            left = ADDRESSES - len({*mine, stopped, *stock})
            theirs = {start(others[number % 2], f"b{number}") for number in range(left)}
            assert theirs.isdisjoint({*mine, stopped, *stock})
            assert len(theirs) == left
            for host in others:
                assert "full" in failed(host, "run", "-d", "--network", "lan", "--name", "more", "busybox")
                host.docker("rm", "more")
            # What comes free is theirs, and nothing else.
            others[0].docker("rm", "-f", "b0")
            assert start(others[1], "again") in theirs
            until(lambda: time.monotonic() - began > ABSENCE, ABSENCE + 5, "longer than any timer", pause=0.5)
        away.rejoin()
        until(lambda: lan.etcdctl("get", f"/ipam-plugin/v1/alive/{away.name}"), 60, "its heartbeat")
        settle(recorder)
        now = of_kind(lan, "endpoint")
        assert {address: now[address]["token"] for address in mine} == {address: tokens[address] for address in mine}
        assert all(lan.machines[0].ping(address) for address in mine)
        assert_register_agrees(lan)


def test_etcd_halts(lan: Lab) -> None:
    """All members stop answering, with their connections open, for a long time: running containers are reached all the
    time (P8), stop, rm, as many starts as there are standby addresses, and stop and start --ip of one container again
    and again work; the next start is refused within the deadline and says so, as is every start once the daemon has
    died meanwhile (P6, P7). Afterwards etcd and Docker agree, also of what was stopped then, and at no time had anybody
    else one of these addresses (P1, P3)."""
    host, other = lan.hosts[:2]
    with Recorder(lan) as recorder:
        running = {start(each, "running") for each in lan.hosts}
        gone = {start(host, "stopped"), start(host, "removed"), start(host, "late", "--ip", LATE)}
        assert start(host, "fixed", "--ip", FIXED) == FIXED
        stock, theirs = ready(lan, host), ready(lan, other)
        with recorder.absent("etcd"), reached_all_the_time(lan.machines[0], running), halted(lan):
            began = time.monotonic()
            host.docker("stop", "-t", "1", "stopped")
            host.docker("rm", "-f", "removed")
            given = {start(host, f"new{number}") for number in range(STANDBY)}
            assert given == stock
            assert start(other, "new") in theirs
            for _ in range(3):
                host.docker("stop", "-t", "1", "fixed")
                host.docker("start", "fixed")
            said = refused(host, "run", "-d", "--network", "lan", "--name", "more", "busybox")
            assert "had in standby for such a time none is left" in said
            host.kill("daemon")
            host.start_daemon()
            host.docker("stop", "-t", "1", "late")
            assert "etcd is not there" in refused(host, "start", "late")
            until(lambda: time.monotonic() - began > OUTAGE, OUTAGE + 5, "a long time", pause=0.5)
        settle(recorder)
        now = of_kind(lan, "endpoint")
        assert {*running, *given, FIXED} <= set(now)
        assert gone.isdisjoint(now)
        assert_register_agrees(lan)
        host.docker("start", "stopped", "late")
        assert_register_agrees(lan)
