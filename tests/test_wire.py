"""Looking at the wire, on real interfaces: a bridge and its cables, each test in network namespaces of its own.

The strangers are kernels in namespaces of their own, and, where a kernel would not do what has to be seen,
raw sockets there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import missing
from etcd_server import until
from ipam_plugin import packets, wire
from ipam_plugin.addresses import Address
from ipam_plugin.errors import ProbeFailed
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.packets import Arp, How, NeighbourSolicitation, Operation, claims, decode, encode
from ipam_plugin.wire import FAST, FULL, Failed, InUse, NoInterface, Sighting, Silent, Times, Wire, find_interface
from test_packets import values

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]

HOST_MAC, PRINTER_MAC, LAPTOP_MAC, FORGED = (f"02:00:00:00:4d:{number:02x}" for number in (1, 2, 3, 0xFE))
HOST4, HOST6 = ip_address("192.168.77.1"), ip_address("fd00:77::1")
PRINTER4, PRINTER6 = ip_address("192.168.77.2"), ip_address("fd00:77::2")
FREE4, FREE6 = ip_address("192.168.77.99"), ip_address("fd00:77::99")
PRINTER, FREE = [PRINTER4, PRINTER6], [FREE4, FREE6]

CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def call(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_namespaces(test: Callable[..., None]) -> Callable[..., None]:
    """Runs the test in a thread with a new network namespace and a /sys that shows it; both end with the thread.

    Threads and processes that the test starts are in them as well.
    """

    def unshare() -> None:
        call(_libc.unshare(CLONE_NEWNET | CLONE_NEWNS))
        call(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        call(_libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))

    @pytest.mark.root
    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        if os.getuid() != 0:
            missing("root", "making a network namespace needs root")
        with ThreadPoolExecutor(1, initializer=unshare) as executor:
            executor.submit(test, *args, **kwargs).result(timeout=120)

    return wrapper


def ip(*lines: str, enter: tuple[str, ...] = ()) -> None:
    """Runs a batch of `ip` commands."""
    subprocess.run([*enter, "ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, timeout=30)


class Machine:
    """A network namespace of its own, with a process that keeps it and dies with the test's thread."""

    def __init__(self) -> None:
        ours = os.readlink("/proc/thread-self/ns/net")
        self.process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "600"])
        self.pid = self.process.pid
        until(lambda: os.readlink(f"/proc/{self.pid}/ns/net") != ours, "a namespace")
        self.enter = ("nsenter", "-t", str(self.pid), "-n")

    def ip(self, *lines: str) -> None:
        ip(*lines, enter=self.enter)

    def setting(self, name: str, value: str) -> None:
        path = f"/proc/sys/net/{name}"
        subprocess.run([*self.enter, "sh", "-c", f"echo {value} >{path}"], check=True, timeout=10)

    def socket(self, device: str = "eth0") -> socket.socket:
        """A raw socket on its cable, which hears everything but what it sends itself."""

        def opened() -> socket.socket:
            with open(f"/proc/{self.pid}/ns/net") as namespace:
                call(_libc.setns(namespace.fileno(), CLONE_NEWNET))
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            raw.setsockopt(wire._SOL_PACKET, wire._PACKET_IGNORE_OUTGOING, 1)
            raw.bind((device, wire._ETH_P_ALL))
            raw.settimeout(10)
            return raw

        with ThreadPoolExecutor(1) as executor:
            return executor.submit(opened).result(timeout=10)

    def off(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def machines(count: int = 1, *, bridge: bool = True, addresses: bool = True) -> Iterator[list[Machine]]:
    """This host's br0 (or, without a bridge, its eth0), and machines on cables to it.

    The first machine has MAC and addresses of the printer.
    """
    made: list[Machine] = []
    try:
        ip("link set lo up")
        if bridge:
            ip(f"link add br0 address {HOST_MAC} type bridge mcast_snooping 0", "link set br0 up")
        for number in range(count):
            made.append(Machine())
            mac = f"02:00:00:00:4d:{2 + number:02x}"
            ip(f"link add eth{number} type veth peer name eth0 address {mac} netns {made[-1].pid}")
            ip(f"link set eth{number} {'master br0' if bridge else f'address {HOST_MAC}'}", f"link set eth{number} up")
            made[-1].ip("link set lo up", "link set eth0 up")
        if addresses:
            device = "br0" if bridge else "eth0"
            ip(f"addr add {HOST4}/24 dev {device}", f"addr add {HOST6}/64 dev {device} nodad")
        if made:
            made[0].ip(f"addr add {PRINTER4}/24 dev eth0", f"addr add {PRINTER6}/64 dev eth0 nodad")
        yield made
    finally:
        for machine in made:
            machine.off()


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def timed(question: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    return question(), time.monotonic() - began


@contextlib.contextmanager
def meanwhile(action: Callable[[], object], after: float = 0.0) -> Iterator[None]:
    """Does something in another thread of the same namespaces, `after` so many seconds."""
    failures: list[BaseException] = []

    def act() -> None:
        try:
            time.sleep(after)
            action()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not failures, failures


def arp_reply(address: Address, mac: str, to: str = HOST_MAC) -> bytes:
    assert isinstance(address, IPv4Address)
    return encode(Arp(mac, to, Operation.REPLY, mac, address, to, packets.NO_ADDRESS))


def answer(address: Address, mac: str) -> bytes:
    if isinstance(address, IPv6Address):
        return packets.nd_advertisement(address, mac)
    return arp_reply(address, mac)


def foreign_probe(address: Address, mac: str) -> bytes:
    return packets.nd_probe(address, mac) if isinstance(address, IPv6Address) else packets.arp_probe(address, mac)


def about(frame: bytes, address: Address) -> bool:
    return getattr(decode(frame), "target", None) == address


def open_sockets() -> int:
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return found


def next_probe(raw: socket.socket, address: Address) -> None:
    """Waits for a probe of the address to arrive at a machine."""
    while True:
        packet = decode(raw.recv(2048))
        claim = claims(packet) if packet else None
        if claim and claim.how.probing and claim.address == address:
            return


def at_probe(raw: socket.socket, address: Address, frame: bytes, after: float = 0.0) -> None:
    """Sends a frame so many seconds after the next probe of the address arrived."""
    next_probe(raw, address)
    time.sleep(after)
    raw.send(frame)


# --- probing -------------------------------------------------------------------------------------------


@in_namespaces
@pytest.mark.parametrize("address", PRINTER, ids=str)
@pytest.mark.parametrize("bridge", [True, False], ids=["bridge", "plain"])
def test_an_address_in_use_is_found_at_once(address: Address, bridge: bool) -> None:
    """A machine that nobody registered answers by itself, and the probe does not wait any longer."""
    with machines(bridge=bridge), Wire("br0" if bridge else "eth0") as tested:
        outcome, seconds = timed(lambda: tested.probe(address, FULL, deadline=soon()))
        how = How.ARP_REPLY if address.version == 4 else How.ADVERTISEMENT
        assert outcome == InUse(PRINTER_MAC, how)
        assert seconds < 0.9


@in_namespaces
@pytest.mark.parametrize("address", FREE, ids=str)
def test_a_silent_address(address: Address) -> None:
    """`fast` is 2 probes 100 ms apart and 250 ms in all, and each probe is one that changes no cache."""
    with machines() as [printer], printer.socket() as raw, Wire("br0") as tested:
        outcome, seconds = timed(lambda: tested.probe(address, FAST, deadline=soon()))
        assert outcome == Silent()
        assert 0.25 <= seconds < 0.9
        raw.settimeout(0.1)
        heard = []
        with contextlib.suppress(TimeoutError):
            while True:
                heard.append(raw.recv(2048))
        assert [frame for frame in heard if about(frame, address)] == [foreign_probe(address, HOST_MAC)] * 2


@in_namespaces
def test_full_is_rfc_5227s() -> None:
    """3 probes, 1 to 2 s apart as the random source says, and 2 s after the last."""
    drawn: list[tuple[float, float]] = []

    def uniform(least: float, most: float) -> float:
        drawn.append((least, most))
        return least + 0.25

    with machines() as [printer], printer.socket() as raw, Wire("br0") as tested:
        with ThreadPoolExecutor(1) as executor:
            running = executor.submit(timed, lambda: tested.probe(FREE4, FULL, deadline=soon(), uniform=uniform))
            at = []
            for _ in range(3):
                next_probe(raw, FREE4)
                at.append(time.monotonic())
            outcome, seconds = running.result()
        assert outcome == Silent()
        assert drawn == [(1.0, 2.0)] * 2
        assert all(1.2 < later - earlier < 1.5 for earlier, later in itertools.pairwise(at))
        assert 4.5 <= seconds < 5


@in_namespaces
@pytest.mark.parametrize("address", FREE, ids=str)
def test_a_late_answer(address: Address) -> None:
    """A slow machine's answer counts until the last moment of the window, and is only heard of after it."""
    heard: list[Sighting] = []
    times = Times(1, (0.1, 0.1), 1.0)
    with machines() as [printer], printer.socket() as raw, Wire("br0", heard.append) as tested:
        with meanwhile(lambda: at_probe(raw, address, answer(address, FORGED), after=0.8)):
            outcome = tested.probe(address, times, deadline=soon())
        assert isinstance(outcome, InUse)
        assert outcome.mac == FORGED
        before = len(heard)
        with meanwhile(lambda: at_probe(raw, address, answer(address, FORGED), after=1.2)):
            assert tested.probe(address, times, deadline=soon()) == Silent()
        until(lambda: any(one.mac == FORGED for one in heard[before:]), "the late answer is heard")


@in_namespaces
@pytest.mark.parametrize("address", FREE, ids=str)
def test_somebody_else_probes_at_the_same_time(address: Address) -> None:
    """A stranger that probes the address meanwhile wants it too: a conflict (RFC 5227, 2.1.1). A registered host's
    probe is none, because the register decides between hosts; but its claim is one."""
    with machines() as [printer], printer.socket() as raw:
        how = How.ARP_PROBE if address.version == 4 else How.DETECTION
        with Wire("br0") as tested, meanwhile(lambda: at_probe(raw, address, foreign_probe(address, FORGED))):
            assert tested.probe(address, FAST, deadline=soon()) == InUse(FORGED, how)
        with Wire("br0", own_macs=lambda: {FORGED}) as tested:
            # Each time another address, because of some probes more than one arrives.
            second, third = address + 1, address + 2
            with meanwhile(lambda: at_probe(raw, second, foreign_probe(second, FORGED))):
                assert tested.probe(second, FAST, deadline=soon()) == Silent()
            with meanwhile(lambda: at_probe(raw, third, answer(third, FORGED))):
                outcome = tested.probe(third, FAST, deadline=soon())
            assert isinstance(outcome, InUse)
            assert outcome.mac == FORGED


@in_namespaces
@pytest.mark.parametrize("flag", ["", "optimistic"])
def test_a_kernel_takes_the_address_while_it_is_probed(flag: str) -> None:
    """A machine that configures an IPv6 address meanwhile either is seen, by its own duplicate address detection, or
    gives the address up because it saw ours. An optimistic one (RFC 4429) does no other, though it uses the address."""
    with machines() as [printer], Wire("br0") as tested:
        printer.setting("ipv6/conf/eth0/optimistic_dad", "1" if flag else "0")
        show = [*printer.enter, "ip", "-6", "addr", "show", "dev", "eth0", "to", str(FREE6)]
        for _ in range(3):  # what comes first depends on the kernel's random delay
            with meanwhile(lambda: printer.ip(f"addr add {FREE6}/64 dev eth0 {flag}"), 0.3):
                outcome = tested.probe(FREE6, Times(2, (1.0, 1.0), 1.5), deadline=soon())
            if outcome == Silent():
                output = subprocess.run(show, capture_output=True, text=True, timeout=10, check=True).stdout
                assert str(FREE6) not in output or "dadfailed" in output
            else:
                assert outcome == InUse(PRINTER_MAC, How.DETECTION)
            printer.ip(f"addr flush dev eth0 to {FREE6}")


@in_namespaces
def test_an_optimistic_address_answers_afterwards() -> None:
    """Once its detection is over, such a machine is found as any other."""
    with machines() as [printer], Wire("br0") as tested:
        printer.setting("ipv6/conf/eth0/optimistic_dad", "1")
        printer.ip(f"addr add {FREE6}/64 dev eth0 optimistic")
        show = [*printer.enter, "ip", "-6", "addr", "show", "dev", "eth0", "to", str(FREE6)]

        def settled() -> bool:
            output = subprocess.run(show, capture_output=True, text=True, timeout=10, check=True).stdout
            return str(FREE6) in output and "tentative" not in output and "optimistic" not in output

        until(settled, "detection is over")
        assert tested.probe(FREE6, FAST, deadline=soon()) == InUse(PRINTER_MAC, How.ADVERTISEMENT)


@in_namespaces
def test_the_group_of_a_probed_address_is_joined() -> None:
    """While an IPv6 address is probed this host is in its group (RFC 4862, 5.4.2), or a switch that watches
    memberships would keep another machine's probe away; afterwards it is not."""
    group = packets.solicited_node(IPv6Address("fd00:77::1234:5678")).packed.hex()

    def joined() -> bool:
        return group in Path("/proc/thread-self/net/igmp6").read_text()

    with machines(), Wire("br0") as tested, ThreadPoolExecutor(1) as executor:
        running = executor.submit(tested.probe, IPv6Address("fd00:77::1234:5678"), FAST, deadline=soon())
        until(joined, "the group is joined")
        assert not running.done()
        assert running.result(10) == Silent()
        assert not joined()


@in_namespaces
def test_two_hosts_probe_the_same_address() -> None:
    """Of two machines that do not know each other and probe at once, at most one takes the address for free."""
    with machines(2) as [_printer, laptop]:

        def other() -> Wire:
            with open(f"/proc/{laptop.pid}/ns/net") as namespace:
                call(_libc.setns(namespace.fileno(), CLONE_NEWNET))
            call(_libc.unshare(CLONE_NEWNS))
            call(_libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))
            opened = Wire("eth0")
            opened.start()
            return opened

        with ThreadPoolExecutor(1) as executor, Wire("br0") as here:
            there = executor.submit(other).result(10)
            try:
                for pause in (0.0, 0.05, 0.15):
                    other_outcome = executor.submit(lambda: there.probe(FREE4, FAST, deadline=soon()))
                    time.sleep(pause)
                    outcomes = [here.probe(FREE4, FAST, deadline=soon()), other_outcome.result(10)]
                    # Who hears the other before it has sent a probe itself stops, and is not heard in turn.
                    expected = [InUse(LAPTOP_MAC, How.ARP_PROBE), InUse(HOST_MAC, How.ARP_PROBE)]
                    assert [one for one in outcomes if one != Silent()] in (expected, expected[:1], expected[1:])
            finally:
                there.close()


@in_namespaces
def test_many_addresses_at_once_share_the_sockets() -> None:
    """A sweep probes hundreds of addresses at a time, more than the kernel chooses by, in the time of one."""
    network = ip_network("192.168.77.0/24")
    with machines() as [_printer], Wire("br0") as tested, ThreadPoolExecutor(254) as executor:
        hosts = [address for address in network.hosts() if address != HOST4]
        sockets = open_sockets()
        began = time.monotonic()
        running = {address: executor.submit(tested.probe, address, FAST, deadline=soon()) for address in hosts}
        assert open_sockets() == sockets
        outcomes = {address: one.result(30) for address, one in running.items()}
        assert time.monotonic() - began < 3
        assert {address for address, outcome in outcomes.items() if outcome != Silent()} == {PRINTER4}
        assert outcomes[PRINTER4] == InUse(PRINTER_MAC, How.ARP_REPLY)


@in_namespaces
def test_a_router_that_answers_for_everybody() -> None:
    """Proxy ARP is seen as answers by one MAC for every address; whoever asks for several can tell."""
    with machines() as [printer], printer.socket() as raw, Wire("br0") as tested:
        done = threading.Event()

        def answer_all() -> None:
            raw.settimeout(0.05)
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    packet = decode(raw.recv(2048))
                    if isinstance(packet, Arp) and packet.target != PRINTER4:
                        raw.send(arp_reply(packet.target, FORGED))

        with meanwhile(answer_all):
            try:
                for last in (60, 61, 62):
                    outcome = tested.probe(ip_address(f"192.168.77.{last}"), FAST, deadline=soon())
                    assert outcome == InUse(FORGED, How.ARP_REPLY)
            finally:
                done.set()


@in_namespaces
def test_linux_with_proxy_arp_does_not_answer_probes() -> None:
    """A Linux router with proxy_arp keeps quiet when the sender is 0.0.0.0, as RFC 5227 (2.1.1) wants it, though it
    answers everybody else: another reason to probe from no address."""
    with machines() as [router], Wire("br0") as tested:
        router.ip("link add up0 type veth peer name up1", "link set up0 up", "link set up1 up")
        router.ip("addr add 10.1.1.1/24 dev up0", f"route add {FREE4}/32 dev up0")
        router.setting("ipv4/conf/all/forwarding", "1")
        router.setting("ipv4/conf/eth0/proxy_arp", "1")
        router.setting("ipv4/neigh/eth0/proxy_delay", "0")
        assert tested.probe(FREE4, FAST, deadline=soon()) == Silent()
        assert tested.alive([FREE4], deadline=soon(3)) == ""  # an ordinary request, by our own address
        until(lambda: [one.mac for one in tested.heard(FREE4)] == [PRINTER_MAC], "the answer is heard")


@in_namespaces
def test_no_time_left() -> None:
    """A probe that cannot be completed by its deadline fails then; an answer until then counts."""
    with machines(), Wire("br0") as tested:
        outcome, seconds = timed(lambda: tested.probe(FREE4, FULL, deadline=soon(0.2)))
        assert isinstance(outcome, Failed)
        assert "no time was left" in outcome.reason
        assert seconds < 0.4
        assert tested.probe(PRINTER4, FULL, deadline=soon(0.2)) == InUse(PRINTER_MAC, How.ARP_REPLY)


# --- rights --------------------------------------------------------------------------------------------

_CHILD = """
import sys, time
from ipaddress import ip_address
from ipam_plugin.errors import ProbeFailed
from ipam_plugin.wire import FAST, Wire
try:
    with Wire(sys.argv[2]) as wire:
        print(wire.probe(ip_address(sys.argv[1]), FAST, deadline=time.monotonic() + 5))
except ProbeFailed as error:
    print("refused:", error)
"""


def as_child(capabilities: str, address: Address, interface: str = "br0") -> str:
    command = ["setpriv", "--bounding-set", capabilities, sys.executable, "-c", _CHILD, str(address), interface]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


@in_namespaces
def test_without_the_capability() -> None:
    """Who may not open raw sockets is told which capability is missing, in one line, at the start."""
    with machines():
        for interface in ("br0", "not-there-yet"):
            said = as_child("-net_raw", PRINTER4, interface)
            assert said.startswith(f"refused: cannot look at the wire on {interface}")
            assert "CAP_NET_RAW" in said
            assert "\n" not in said


@in_namespaces
@pytest.mark.parametrize("address", PRINTER, ids=str)
def test_that_capability_is_enough(address: Address) -> None:
    """CAP_NET_RAW is all that probing needs."""
    with machines():
        assert as_child("-all,+net_raw", address).startswith(f"InUse(mac='{PRINTER_MAC}'")


# --- trouble -------------------------------------------------------------------------------------------


@in_namespaces
def test_the_interface_goes_down_and_up(caplog: pytest.LogCaptureFixture) -> None:
    """An interface that is down fails the probe with that reason, and is listened to again when it is back."""
    caplog.set_level(logging.INFO, logger="ipam_plugin.wire")
    with machines(), Wire("br0") as tested:
        with meanwhile(lambda: ip("link set br0 down"), 0.05):
            assert tested.probe(FREE4, FAST, deadline=soon()) == Failed("br0 is down")
        until(lambda: tested.alive([], deadline=soon()) == "br0 is down", "it is noticed")
        assert tested.probe(PRINTER4, FAST, deadline=soon()) == Failed("br0 is down")
        ip("link set br0 up")
        until(lambda: tested.alive([], deadline=soon()) == "", "it is open again")
        assert tested.probe(PRINTER4, FAST, deadline=soon()) == InUse(PRINTER_MAC, How.ARP_REPLY)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["br0: not listening: br0 is down", "br0: listening again"]


@in_namespaces
def test_an_outage_between_two_probes_is_no_silence() -> None:
    """Down and up again within one probe: nobody knows who would have answered."""
    times = Times(2, (0.6, 0.6), 0.6)
    with machines(bridge=False) as [printer], Wire("eth0") as tested:
        with meanwhile(lambda: printer.ip("link set eth0 down", "link set eth0 up"), 0.2):
            outcome = tested.probe(FREE4, times, deadline=soon())
        assert isinstance(outcome, Failed)
        assert "disturbed" in outcome.reason


@in_namespaces
def test_the_interface_is_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Another interface of the same name is the same LAN to us: it is opened as soon as it is there."""
    caplog.set_level(logging.INFO, logger="ipam_plugin.wire")
    heard: list[Sighting] = []
    with machines() as [printer], printer.socket() as raw, Wire("br0", heard.append) as tested:
        ip("link del br0")
        until(lambda: "no interface br0" in tested.alive([], deadline=soon()), "it is noticed")
        assert tested.mac == ""
        assert tested.probe(PRINTER4, FAST, deadline=soon()) == Failed("there is no interface br0")
        ip(f"link add br0 address {HOST_MAC} type bridge", "link set eth0 master br0", "link set br0 up")
        until(lambda: tested.alive([], deadline=soon()) == "", "it is open again")
        assert tested.probe(PRINTER4, FAST, deadline=soon()) == InUse(PRINTER_MAC, How.ARP_REPLY)
        raw.send(answer(FREE4, FORGED))
        until(lambda: any(one.address == FREE4 for one in heard), "it is listened to again")
        assert tested.counters().opened == 2
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "br0: not listening: br0 is down" or said[0] == "br0: not listening: there is no interface br0"
    assert said[-1] == "br0: listening again"
    assert len(said) <= 3


@in_namespaces
def test_an_interface_that_is_not_there_yet() -> None:
    """At boot the daemon may come before the bridge: it starts, and says so until the bridge is there."""
    with Wire("br0") as tested:
        assert tested.probe(PRINTER4, FAST, deadline=soon()) == Failed("there is no interface br0")
        assert tested.announce(PRINTER4, FORGED) == "there is no interface br0"
        with machines():
            until(lambda: tested.alive([], deadline=soon()) == "", "it is open")
            assert tested.probe(PRINTER4, FAST, deadline=soon()) == InUse(PRINTER_MAC, How.ARP_REPLY)


@in_namespaces
def test_no_ethernet() -> None:
    """Loopback has no neighbours to ask."""
    ip("link set lo up")
    with Wire("lo") as tested:
        assert tested.probe(PRINTER4, FAST, deadline=soon()) == Failed("lo: no Ethernet interface")


@in_namespaces
def test_signals_do_not_disturb(capfd: pytest.CaptureFixture[str]) -> None:
    """A process that gets signals all the time (children end, logs are rotated) still listens and probes."""
    program = f"""
import os, signal, sys, threading, time
from ipaddress import ip_address
from ipam_plugin.wire import FAST, Wire
signal.signal(signal.SIGUSR1, lambda *_: None)
with Wire("br0") as wire:
    print("ready", flush=True)
    for _ in range(3):
        print(wire.probe(ip_address("{PRINTER4}"), FAST, deadline=time.monotonic() + 5))
        print(wire.probe(ip_address("{FREE4}"), FAST, deadline=time.monotonic() + 5))
"""
    with machines():
        child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            while child.poll() is None:
                for task in os.listdir(f"/proc/{child.pid}/task"):
                    _libc.tgkill(child.pid, int(task), signal.SIGUSR1)  # to each thread; one may be gone already
                time.sleep(0.002)
            lines = child.stdout.read().splitlines()
        finally:
            child.kill()
            child.wait(10)
    assert [line.partition("(")[0] for line in lines] == ["InUse", "Silent"] * 3


# --- a dead wire ---------------------------------------------------------------------------------------


@in_namespaces
def test_a_port_in_spanning_trees_listening_state() -> None:
    """For twice the forward delay a bridge with STP passes nothing: silence means nothing, and the reason is said."""
    with machines(0), contextlib.ExitStack() as stack:
        ip("link set br0 type bridge stp_state 1 forward_delay 200")  # hundredths of a second
        machine = Machine()
        stack.callback(machine.off)
        ip(f"link add eth0 type veth peer name eth0 address {PRINTER_MAC} netns {machine.pid}")
        machine.ip("link set eth0 up", f"addr add {PRINTER4}/24 dev eth0")
        ip("link set eth0 master br0", "link set eth0 up")
        with Wire("br0") as tested, Wire("eth0") as port:
            why = "br0 does not forward: its port eth0 is listening (spanning tree)"
            assert tested.alive([], deadline=soon()) == why
            assert tested.alive([PRINTER4], deadline=soon()) == why
            assert tested.probe(PRINTER4, FAST, deadline=soon()) == Failed(why)
            assert (
                port.alive([], deadline=soon())
                == "eth0 does not forward: it is listening as a port of its bridge (spanning tree)"
            )
            until(lambda: tested.alive([PRINTER4], deadline=soon(1)) == "", "it forwards", 15)
            assert port.alive([], deadline=soon()) == ""


@in_namespaces
def test_the_cable_is_out() -> None:
    """Without carrier there is no silence: the interface's own cable, and that of a bridge's only port."""
    with machines() as [printer], Wire("br0") as bridge:
        printer.ip("link set eth0 down")
        why = "br0 does not forward: eth0 has no carrier (is the cable plugged in?)"
        until(lambda: bridge.alive([], deadline=soon()) == why, "it is noticed")
        assert bridge.probe(FREE4, FAST, deadline=soon()) == Failed(why)
        printer.ip("link set eth0 up")
        until(lambda: bridge.alive([], deadline=soon()) == "", "it is noticed")
    ip("link del br0")
    with machines(bridge=False) as [printer], Wire("eth0") as plain:
        printer.ip("link set eth0 down")
        until(lambda: "eth0 has no carrier" in plain.alive([], deadline=soon()), "it is noticed")
        outcome = plain.probe(FREE4, FAST, deadline=soon())
        assert isinstance(outcome, Failed)
        assert "no carrier" in outcome.reason


@in_namespaces
def test_containers_ports_are_no_cable() -> None:
    """A container's port forwards whatever becomes of the LAN, so a bridge that has a real port lives by that one."""
    with machines(1, bridge=False, addresses=False) as [printer]:
        ip(f"link add br0 address {HOST_MAC} type bridge", "link set br0 up")
        # Made on another interface, as a bond or a VLAN is: the only such port that every kernel has.
        ip("link add link eth0 name nic0 type macvlan mode passthru", "link set nic0 master br0", "link set nic0 up")
        ip("link add veth0 type veth peer name inside0", "link set veth0 master br0", "link set veth0 up")
        ip("link set inside0 up")
        with Wire("br0") as tested:
            until(lambda: tested.alive([PRINTER4], deadline=soon(1)) == "", "it forwards")
            printer.ip("link set eth0 down")
            why = "br0 does not forward: nic0 has no carrier (is the cable plugged in?)"
            until(lambda: tested.alive([], deadline=soon()) == why, "it is noticed")
            assert Path("/sys/class/net/br0/carrier").read_text() == "1\n"
            assert tested.probe(FREE4, FAST, deadline=soon()) == Failed(why)


@in_namespaces
@pytest.mark.parametrize("peer", PRINTER, ids=str)
def test_a_peer_that_was_heard_need_not_be_asked(peer: Address) -> None:
    """Who was heard within 30 s shows that the wire lives; nothing is sent then."""
    with machines() as [printer], printer.socket() as raw, Wire("br0") as tested:
        raw.send(answer(peer, PRINTER_MAC))
        until(lambda: tested.heard(peer), "the printer is heard")
        assert tested.alive([FREE4, peer], deadline=soon()) == ""
        raw.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                frame = raw.recv(2048)
                assert not about(frame, peer), "it was asked"
                assert not about(frame, FREE4), "the other one was asked"


@in_namespaces
@pytest.mark.parametrize("peer", PRINTER, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["an address beside it", "no address"])
def test_how_peers_are_asked(peer: Address, own: bool) -> None:
    """A peer is asked in this interface's own name or in nobody's, never in another's: a cache may believe it."""
    with machines(addresses=own) as [printer], printer.socket() as raw, Wire("br0") as tested:
        assert tested.alive([peer], deadline=soon(3)) == ""
        while True:
            packet = decode(raw.recv(2048))
            if packet is not None and packet.source == HOST_MAC and packet.target == peer:
                break
        if isinstance(packet, Arp):
            assert packet.sender == (HOST4 if own else IPv4Address(0))
            assert packet.sender_mac == HOST_MAC
        else:
            assert isinstance(packet, NeighbourSolicitation)
            assert packet.ip_source == (HOST6 if own else IPv6Address(0))
            assert packet.link_layer == (HOST_MAC if own else "")


@in_namespaces
def test_no_peer_answers() -> None:
    """A wire on which none of those is heard that should be there is no living one; the reason names them."""
    with machines(), Wire("br0") as tested:
        why, seconds = timed(lambda: tested.alive([FREE4, FREE6], deadline=soon(0.6)))
        assert "none of the machines that should be on br0" in why
        assert str(FREE4) in why
        assert str(FREE6) in why
        assert 0.5 < seconds < 1.5
        assert tested.alive([FREE4, PRINTER4], deadline=soon(0.6)) == ""
        assert tested.alive([HOST4], deadline=soon(0.3)) != "", "what this host says itself shows nothing"


# --- listening -----------------------------------------------------------------------------------------


@in_namespaces
def test_what_is_heard() -> None:
    """Every kind of claim reaches `on_heard` with who, what and how, and is remembered for a while."""
    heard: list[Sighting] = []
    with machines(bridge=False) as [printer], printer.socket() as raw, Wire("eth0", heard.append) as tested:
        began = time.monotonic()
        sent = {
            How.ARP_REPLY: answer(ip_address("192.168.77.31"), FORGED),
            How.ARP_REQUEST: packets.arp_request(PRINTER4, IPv4Address("192.168.77.32"), FORGED),
            How.ARP_ANNOUNCEMENT: packets.arp_announcement(IPv4Address("192.168.77.33"), FORGED),
            How.ARP_PROBE: packets.arp_probe(IPv4Address("192.168.77.34"), FORGED),
            How.ADVERTISEMENT: packets.nd_advertisement(IPv6Address("fd00:77::31"), FORGED),
            How.SOLICITATION: packets.nd_solicitation(FREE6, IPv6Address("fd00:77::32"), FORGED),
            How.DETECTION: packets.nd_probe(IPv6Address("fd00:77::33"), FORGED),
        }
        for frame in sent.values():
            raw.send(frame)
        until(lambda: len([one for one in heard if one.mac == FORGED]) == 7, "all are heard")
        by_how = {one.how: one for one in heard if one.mac == FORGED}
        for how, frame in sent.items():
            packet = decode(frame)
            assert packet is not None
            claim = claims(packet)
            assert claim is not None
            assert (by_how[how].address, by_how[how].mac) == (claim.address, claim.mac)
            assert began <= by_how[how].when <= time.monotonic()
            assert tested.heard(claim.address) == [by_how[how]]


@in_namespaces
def test_repetitions_are_told_once_a_second() -> None:
    """A machine that talks all the time is no news; a second MAC is at once, and so is a probe that became a claim."""
    heard: list[Sighting] = []
    with machines() as [printer], printer.socket() as raw, Wire("br0", heard.append):

        def told(address: Address) -> list[tuple[str, How]]:
            return [(one.mac, one.how) for one in heard if one.address == address]

        for _ in range(100):
            raw.send(answer(FREE4, FORGED))
        raw.send(answer(FREE4, LAPTOP_MAC))
        until(lambda: len(told(FREE4)) == 2, "both are heard")
        assert told(FREE4) == [(FORGED, How.ARP_REPLY), (LAPTOP_MAC, How.ARP_REPLY)]
        raw.send(packets.nd_probe(FREE6, FORGED))
        raw.send(answer(FREE6, FORGED))
        until(lambda: len(told(FREE6)) == 2, "both are heard")
        assert told(FREE6) == [(FORGED, How.DETECTION), (FORGED, How.ADVERTISEMENT)]

        def again() -> bool:
            raw.send(answer(FREE4, FORGED))
            return len(told(FREE4)) == 3

        _, seconds = timed(lambda: until(again, "it is told again"))
        assert 0.5 < seconds < 2


@in_namespaces
def test_rubbish_and_a_listener_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Frames cut off, frames that lie and exceptions in `on_heard` end nothing."""
    heard: list[Sighting] = []

    def listener(sighting: Sighting) -> None:
        heard.append(sighting)
        raise ValueError("a bug")

    with machines() as [printer], printer.socket() as raw, Wire("br0", listener):
        good = answer(FREE4, FORGED)
        for length in range(14, 42):
            raw.send(good[:length])
        other = bytearray(packets.nd_advertisement(IPv6Address("fd00:77::66"), FORGED))
        other[18:20] = b"\xff\xff"
        raw.send(bytes(other))
        for address in (FREE4, FREE6):
            raw.send(answer(address, FORGED))
            until(lambda address=address: any(one.address == address for one in heard), "it is heard")
        assert {one.address for one in heard if one.mac == FORGED} == {FREE4, FREE6}
    assert any("was lost" in record.getMessage() for record in caplog.records)


@in_namespaces
def test_another_vlan_is_another_segment() -> None:
    """A tagged frame on the untagged interface says nothing about its addresses; a priority tag is no VLAN."""
    heard: list[Sighting] = []
    with machines() as [printer], printer.socket() as raw, Wire("br0", heard.append) as tested:

        def tagged(vlan: bytes, address: Address) -> bytes:
            frame = answer(address, FORGED)
            return frame[:12] + b"\x81\x00" + vlan + frame[12:]

        with meanwhile(lambda: at_probe(raw, FREE4, tagged(b"\x00\x0a", FREE4))):
            assert tested.probe(FREE4, FAST, deadline=soon()) == Silent()
        other = FREE4 + 1
        with meanwhile(lambda: at_probe(raw, other, tagged(b"\xe0\x00", other))):
            assert tested.probe(other, FAST, deadline=soon()) == InUse(FORGED, How.ARP_REPLY)
        raw.send(tagged(b"\x00\x0a", FREE6))
        raw.send(tagged(b"\xe0\x00", PRINTER6))
        until(lambda: any(one.address == PRINTER6 and one.mac == FORGED for one in heard), "the priority tag")
        assert not any(one.address == FREE6 for one in heard)


@in_namespaces
def test_a_vlan_interface() -> None:
    """On the interface of a VLAN its machines are found, and those outside it are not."""
    with machines() as [printer]:
        made = subprocess.run(
            ["ip", "link", "add", "link", "br0", "name", "br0.10", "type", "vlan", "id", "10"], timeout=10, check=False
        )
        if made.returncode != 0:
            pytest.skip("this kernel has no VLAN interfaces (CONFIG_VLAN_8021Q)")
        printer.ip("link add link eth0 name eth0.10 type vlan id 10", "link set eth0.10 up")
        printer.ip(f"addr add {FREE4}/24 dev eth0.10", f"addr add {FREE6}/64 dev eth0.10 nodad")
        ip("link set br0.10 up")
        with Wire("br0.10") as tested:
            for address in FREE:
                outcome = tested.probe(address, FAST, deadline=soon())
                assert isinstance(outcome, InUse)
                assert outcome.mac == PRINTER_MAC
            assert tested.probe(PRINTER4, FAST, deadline=soon()) == Silent()
            assert tested.alive([FREE4], deadline=soon()) == ""
            printer.ip("link set eth0 down")
            until(lambda: "carrier" in tested.alive([], deadline=soon()), "the cable below it is out")


@in_namespaces
def test_on_the_parent_of_a_macvlan() -> None:
    """On the NIC itself, with containers' macvlan on it, machines of the LAN are found as on any interface."""
    with machines(bridge=False) as [_printer], Wire("eth0") as tested:
        ip("link add link eth0 name m0 type macvlan mode bridge", "link set m0 up")
        for address in PRINTER:
            outcome = tested.probe(address, FAST, deadline=soon())
            assert isinstance(outcome, InUse)
            assert outcome.mac == PRINTER_MAC
        assert tested.probe(FREE4, FAST, deadline=soon()) == Silent()


@in_namespaces
def test_announcing_moves_the_neighbours() -> None:
    """After an announcement a neighbour that knew the address by another MAC sends to the new one."""
    with machines() as [printer], Wire("br0") as tested:
        for address in FREE:
            family = f"-{address.version}"
            printer.ip(f"neigh add {address} lladdr {FORGED} nud stale dev eth0")
            assert tested.announce(address, LAPTOP_MAC) == ""

            def known(address: Address = address, family: str = family) -> str:
                command = [*printer.enter, "ip", family, "neigh", "show", "to", str(address)]
                return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout

            until(lambda known=known: LAPTOP_MAC in known(), "the neighbour believes it")


# --- floods and leaks ----------------------------------------------------------------------------------

_FLOOD = """
import random, socket, sys, time
sys.path.insert(0, ".")
from ipaddress import IPv4Address
from ipam_plugin import packets
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
raw.bind(("eth0", 0))
rate, seconds = float(sys.argv[1]), float(sys.argv[2])
frames = []
for _ in range(20000):
    mac = "02:" + random.randbytes(5).hex(":")
    frames.append(packets.arp_announcement(IPv4Address(0x0a000000 + random.getrandbits(24)), mac))
began, sent = time.monotonic(), 0
while (now := time.monotonic() - began) < seconds:
    while sent < now * rate:
        raw.send(frames[sent % len(frames)])
        sent += 1
    time.sleep(0.001)
print(sent)
"""


def rss() -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


@in_namespaces
def test_a_flood() -> None:
    """10,000 frames a second from ever new machines: memory and work stay bounded, and probes are answered."""
    told: list[float] = []
    with machines(2) as [_printer, laptop], Wire("br0", lambda one: told.append(one.when)) as tested:
        thread = next(one for one in threading.enumerate() if one.name == "wire-br0")
        clock = time.pthread_getcpuclockid(thread.ident or 0)
        command = [*laptop.enter, sys.executable, "-c", _FLOOD, "10000", "6"]
        flood = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            until(lambda: len(told) > 1000, "the flood has begun")
            memory, work, began = rss(), time.clock_gettime(clock), time.monotonic()
            waits = []
            while time.monotonic() - began < 4:
                for address in PRINTER:
                    outcome, seconds = timed(lambda address=address: tested.probe(address, FAST, deadline=soon()))
                    assert isinstance(outcome, InUse)
                    waits.append(seconds)
                assert tested.probe(FREE4, FAST, deadline=soon()) == Silent()
            busy = (time.clock_gettime(clock) - work) / (time.monotonic() - began)
            output, _ = flood.communicate(timeout=20)
        finally:
            flood.kill()
            flood.wait(10)
        counters = tested.counters()
        seconds = max(told) - min(told)
        waits.sort()
        print(
            f"sent {output.strip()}, looked at {counters.heard}, lost {counters.lost}, "
            f"told {len(told)} in {seconds:.1f} s; "
            f"listener's thread {busy:.0%} of a core; memory +{rss() - memory} kB; "
            f"probes answered in {waits[len(waits) // 2] * 1000:.1f} ms (median), {waits[-1] * 1000:.1f} ms (most)"
        )
        assert int(output) > 30_000
        assert counters.lost > 0
        assert len(told) <= wire.LISTENING_RATE * (seconds + 2)
        assert len(tested._table) <= wire.REMEMBERED
        assert rss() - memory < 10_000
        assert busy < 0.5


def test_memory_is_bounded() -> None:
    """Only the addresses heard last are remembered, and of each address a few machines."""
    tested = Wire("br0")
    for number in range(3 * wire.REMEMBERED):
        tested._remember(Sighting(IPv4Address(number), FORGED, How.ARP_REPLY, float(number)))
    for number in range(100):
        tested._remember(Sighting(FREE4, f"02:00:00:00:00:{number:02x}", How.ARP_REPLY, float(number)))
    assert len(tested._table) == wire.REMEMBERED
    assert [one.mac[-2:] for one in tested.heard(FREE4)] == ["60", "61", "62", "63"]
    assert tested.heard(IPv4Address(0)) == []


@in_namespaces
def test_nothing_leaks() -> None:
    """After `close` neither descriptors nor threads are left, however often it began, with probes running."""
    with machines():

        def once() -> None:
            with ThreadPoolExecutor(4) as executor:
                with Wire("br0") as tested:
                    outcomes = [executor.submit(tested.probe, one, FULL, deadline=soon()) for one in (*FREE, *PRINTER)]
                    assert isinstance(outcomes[2].result(10), InUse)
                _, seconds = timed(lambda: [one.result(10) for one in outcomes])
                assert isinstance(outcomes[0].result(), Failed)
                assert seconds < 1
            with Wire("nowhere"):
                pass

        once()
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(10):
            once()
        assert len(os.listdir("/proc/self/fd")) == files
        assert threading.active_count() == threads
    assert not any(thread.name.startswith("wire-") for thread in threading.enumerate())


@in_namespaces
def test_without_rights_nothing_is_left() -> None:
    """Where the sockets are refused, neither a thread nor a descriptor stays; where the right is lost later, the
    reason is that one."""
    with machines(), Wire("br0") as tested:
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        drop_raw_sockets()
        for interface in ("br0", "nowhere"):
            with pytest.raises(ProbeFailed, match="CAP_NET_RAW"):
                Wire(interface).start()
        with pytest.raises(ProbeFailed, match="CAP_NET_RAW"):
            wire.require_capability()
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)
        # What is open stays open.
        assert tested.probe(PRINTER4, FAST, deadline=soon()) == InUse(PRINTER_MAC, How.ARP_REPLY)


def drop_raw_sockets() -> None:
    """Takes CAP_NET_RAW from the calling thread alone (capset(2), version 3)."""
    header, data = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    call(_libc.capget(header, data))
    words = list(struct.unpack("=6I", data.raw))
    words[0] &= ~(1 << 13)
    call(_libc.capset(header, struct.pack("=6I", *words)))


# --- the kernel's filter, asked itself -----------------------------------------------------------------


class Filter:
    """A socket pair with the program on it: any socket takes one, so this needs no rights."""

    def __init__(self, program: bytes) -> None:
        self.sender, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.receiver.setblocking(False)
        wire._attach(self.receiver, program)

    def passes(self, frame: bytes) -> bool:
        self.sender.send(frame)
        try:
            return len(self.receiver.recv(4096)) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@given(st.lists(values, min_size=1, max_size=8), st.integers(0, 3), st.booleans())
def test_the_kernel_chooses_as_the_decoder_does(sent: list[Any], chosen_many: int, priority: bool) -> None:
    """Everything passes that says something about a chosen address, and nothing that does not."""
    told = [claim.address if (claim := claims(value)) else None for value in sent]
    chosen = [address for address in told if address is not None][:chosen_many]
    everything, some = Filter(wire.bpf_filter(None)), Filter(wire.bpf_filter(chosen))
    try:
        for value, address in zip(sent, told, strict=True):
            frame = encode(value)
            if priority and not value.vlan:
                frame = frame[:12] + b"\x81\x00\x20\x00" + frame[12:]
            assert everything.passes(frame) == (value.vlan == 0)
            if value.vlan or address is not None:
                low = {(one.version, int(one) & 0xFFFFFFFF) for one in chosen}
                expected = not value.vlan and (address.version, int(address) & 0xFFFFFFFF) in low  # type: ignore[union-attr]
                # A solicitation of somebody whose address ends in 32 zero bits passes for one of nobody.
                if not (isinstance(value, NeighbourSolicitation) and not int(value.ip_source) & 0xFFFFFFFF):
                    assert some.passes(frame) == expected
                elif expected:
                    assert some.passes(frame)
    finally:
        everything.close()
        some.close()


@given(st.binary(max_size=120))
def test_the_kernel_refuses_what_is_neither(frame: bytes) -> None:
    """No other traffic of the LAN enters this program at all."""
    if frame[12:14] in (b"\x08\x06", b"\x86\xdd", b"\x81\x00"):
        return
    tested = Filter(wire.bpf_filter(None))
    try:
        assert not frame or not tested.passes(frame)
    finally:
        tested.close()


@pytest.mark.parametrize("count", [0, 1, wire.CHOSEN, wire.CHOSEN + 1])
def test_as_many_addresses_as_are_asked(count: int) -> None:
    """With none nothing passes, the last of the most that the kernel chooses by does, and with more all ARP does."""
    kinds = (lambda n: IPv4Address(0x0A000000 + n), lambda n: IPv6Address(0xFD << 120 | n))
    chosen = [kinds[number % 2](number) for number in range(count)]
    tested = Filter(wire.bpf_filter(chosen))
    try:
        assert all(tested.passes(answer(one, FORGED)) for one in chosen)
        assert tested.passes(answer(FREE4, FORGED)) == (count > wire.CHOSEN)
    finally:
        tested.close()


# --- which interface -----------------------------------------------------------------------------------


def link(name: str, kind: str = "", loopback: bool = False) -> Link:
    return Link(1, name, "", kind, True, True, loopback, "")


def has(interface: str, address: str) -> InterfaceAddress:
    text, _, prefixlen = address.partition("/")
    return InterfaceAddress(ip_address(text), int(prefixlen), interface, "", interface.startswith("br"), True)


LINKS = [link("lo", loopback=True), link("eth0"), link("eth1"), link("br0", "bridge"), link("eth0.10", "vlan")]


@pytest.mark.parametrize(
    ("subnet", "addresses", "named", "found"),
    [
        ("192.168.77.0/24", [has("br0", "192.168.77.1/24")], "", "br0"),
        ("192.168.77.0/24", [has("br0", "192.168.77.1/24")], "eth0.10", "eth0.10"),
        ("192.168.77.0/24", [has("eth0", "192.168.77.2/24"), has("br0", "192.168.77.1/24")], "", "br0"),
        ("192.168.77.0/24", [has("eth1", "192.168.77.2/24"), has("eth0", "192.168.77.1/24")], "", "eth1"),
        ("192.168.77.0/24", [has("lo", "192.168.77.9/32"), has("eth0", "192.168.77.1/24")], "", "eth0"),
        # Its own network is smaller than the subnet (a wrong mask, or a /32 beside a route): still that LAN.
        ("192.168.77.0/24", [has("eth0", "10.0.0.1/8"), has("eth1", "192.168.77.1/26")], "", "eth1"),
        # A pool that is a part of the LAN, without this host's address in it.
        ("10.1.5.0/24", [has("eth0", "10.0.0.1/8"), has("eth1", "10.1.0.1/16")], "", "eth1"),
        ("10.1.5.0/24", [has("eth0", "10.1.0.9/16"), has("br0", "10.1.0.1/16")], "", "br0"),
        ("fd00:77::/64", [has("eth0", "192.168.77.1/24"), has("eth1", "fd00:77::1/64")], "", "eth1"),
        ("fd00:77::/80", [has("eth0", "fd00:77::1:0:0:1/64"), has("eth1", "fd00::1/16")], "", "eth0"),
    ],
)
def test_the_interface_of_a_subnet(subnet: str, addresses: list[InterfaceAddress], named: str, found: str) -> None:
    """The named one, else the one with an address there (a bridge first), else the closest network around it."""
    assert find_interface(ip_network(subnet), addresses, LINKS, named) == found


def test_no_interface_of_a_subnet() -> None:
    """The sentence says what is missing, and how to name one."""
    elsewhere = [has("br0", "192.168.78.1/24"), has("eth0", "fd00:77::1/64"), has("lo", "192.168.77.1/24")]
    missing_one = find_interface(ip_network("192.168.77.0/24"), elsewhere, LINKS)
    assert isinstance(missing_one, NoInterface)
    assert "192.168.77.0/24" in missing_one.reason
    assert "interface" in missing_one.reason
    wrong = find_interface(ip_network("192.168.77.0/24"), elsewhere, LINKS, "br9")
    assert isinstance(wrong, NoInterface)
    assert "br9" in wrong.reason
    assert "br0" in wrong.reason
