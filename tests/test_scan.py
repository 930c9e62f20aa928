"""Scanning a LAN: what is asked and judged as values, and real sweeps in network namespaces of their own.

The machines are kernels, and raw sockets where a kernel would not do what has to be seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import missing
from etcd_server import ETCD, ETCDCTL, free_ports, until
from fakes import FakeEtcd, Fault, Writes
from ipam_plugin import cli, daemon, packets, scan, vendors, wire
from ipam_plugin.errors import ProbeFailed, Refused
from ipam_plugin.etcd import Put
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.model import Alive, Host, HostAddress, Keys, Lease, PoolUse, encode, read_lease
from ipam_plugin.operations import Operations
from ipam_plugin.packets import Arp, NeighbourSolicitation, Operation, decode
from ipam_plugin.scan import Report, Target
from ipam_plugin.wire import Silent, Times, Wire
from test_wire import (
    _FLOOD,
    CLONE_NEWNET,
    CLONE_NEWNS,
    FORGED,
    FREE4,
    FREE6,
    HOST4,
    HOST6,
    HOST_MAC,
    LAPTOP_MAC,
    PRINTER4,
    PRINTER6,
    PRINTER_MAC,
    ROOT,
    Machine,
    _libc,
    answer,
    arp_reply,
    call,
    drop_raw_sockets,
    has,
    in_namespaces,
    ip,
    link,
    machines,
    meanwhile,
    soon,
    timed,
)

LAN4, LAN6 = ip_network("192.168.77.0/24"), ip_network("fd00:77::/64")
PART4, PART6 = ip_network("192.168.77.0/28"), ip_network("fd00:77::/124")  # with both this host and the printer
LINKS = [link("lo", loopback=True), link("eth0"), link("br0", "bridge")]
OWN = [has("br0", "192.168.77.1/24"), has("br0", "fd00:77::1/64"), has("eth0", "10.0.0.1/8")]


# --- what is asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subnet", "interface", "source"),
    [
        ("192.168.77.0/24", "br0", "192.168.77.1"),
        ("192.168.77.64/26", "br0", "192.168.77.1"),
        ("192.168.0.0/16", "br0", "192.168.77.1"),
        ("192.168.77.9/32", "br0", "192.168.77.1"),
        ("10.1.2.0/24", "eth0", "10.0.0.1"),
        ("fd00:77::/64", "br0", "fd00:77::1"),
        ("fd00:77::/120", "br0", "fd00:77::1"),
    ],
)
def test_in_whose_name_is_asked(subnet: str, interface: str, source: str) -> None:
    """In that of this machine's own address on the interface that carries the subnet: nobody learns a wrong one."""
    found = scan.target(ip_network(subnet), OWN, LINKS, host_macs={FORGED})
    assert (found.interface, str(found.source)) == (interface, source)


def test_who_may_ask_in_nobodys_name() -> None:
    """A request from nobody is taken for a machine that wants the address, so only a registered host may send it, or
    anybody where there is no host; and never for IPv6, where it would take the address from a machine."""
    links = [*LINKS, Link(9, "eth0.5", "02:00:00:00:00:05", "vlan", True, True, False, "")]
    subnet = ip_network("192.168.5.0/24")
    for macs in ((), {"02:00:00:00:00:05"}):
        assert scan.target(subnet, OWN, links, "eth0.5", macs).source == packets.NO_ADDRESS
    for refused, macs in ((subnet, {FORGED}), (ip_network("fd00:5::/64"), ())):
        with pytest.raises(Refused, match=r"eth0\.5 has no address in .* ip address add"):
            scan.target(refused, OWN, links, "eth0.5", macs)


def test_an_address_that_is_not_usable_yet_is_not_used() -> None:
    """An IPv6 address whose own detection of duplicates is not over may be another machine's."""
    tentative = InterfaceAddress(HOST6, 64, "br0", HOST_MAC, True, True, tentative=True)
    with pytest.raises(Refused, match="no address"):
        scan.target(LAN6, [tentative], LINKS)


def test_own_addresses() -> None:
    """All that this machine has in the subnet, on whichever interface: one on loopback is answered for with the
    interface's MAC."""
    on = [
        InterfaceAddress(HOST4, 24, "br0", HOST_MAC, True, True),
        InterfaceAddress(FREE4, 32, "lo", packets.NO_MAC, False, True),
        InterfaceAddress(ip_address("192.168.77.50"), 32, "eth0", LAPTOP_MAC, False, True),
    ]
    links = [Link(2, "br0", HOST_MAC, "bridge", True, True, False, ""), *LINKS]
    found = scan.target(LAN4, on, links)
    assert found.own == {HOST4: HOST_MAC, FREE4: HOST_MAC, ip_address("192.168.77.50"): LAPTOP_MAC}


@pytest.mark.parametrize(
    ("subnet", "named", "words"),
    [
        ("10.0.0.0/15", "", ["131072 addresses", "ipam-plugin scan 10.0.0.0/24", "--rate"]),
        ("172.16.0.0/24", "", ["no interface of this host has an address in 172.16.0.0/24", "--interface NAME"]),
        ("192.168.77.0/24", "br9", ["no interface br9", "br0"]),
    ],
)
def test_what_cannot_be_scanned(subnet: str, named: str, words: list[str]) -> None:
    """Refused with a sentence that says what to do instead."""
    with pytest.raises(Refused) as refused:
        scan.target(ip_network(subnet), OWN, LINKS, named)
    for word in words:
        assert word in str(refused.value)


def test_what_is_asked_one_by_one() -> None:
    """Up to 65,536 addresses; a larger IPv6 subnet is asked otherwise."""
    assert scan.target(ip_network("10.1.0.0/16"), OWN, LINKS).one_by_one
    assert scan.target(ip_network("fd00:77::/112"), OWN, LINKS).one_by_one
    assert not scan.target(ip_network("fd00:77::/111"), OWN, LINKS).one_by_one


def test_nothing_is_asked_twice() -> None:
    """A subnet inside another one is scanned with it, unless only the smaller one is asked address by address."""
    subnets = ["192.168.77.0/25", "192.168.0.0/16", "192.168.77.0/24", "fd00:77::/64", "fd00:77::/120", "10.1.2.0/24"]
    targets = [scan.target(ip_network(subnet), OWN, LINKS) for subnet in subnets]
    elsewhere = targets[2]._replace(interface="eth0")
    kept = scan.without_parts([*targets, elsewhere, targets[0]])
    assert [(str(each.subnet), each.interface) for each in kept] == [
        ("192.168.0.0/16", "br0"),
        ("10.1.2.0/24", "eth0"),
        ("192.168.77.0/24", "eth0"),
        ("fd00:77::/64", "br0"),
        ("fd00:77::/120", "br0"),
    ]


# --- machines that answer for everything --------------------------------------------------------------------


def answers(*found: tuple[int, str]) -> dict[IPv4Address, list[str]]:
    told: dict[IPv4Address, list[str]] = {}
    for number, mac in found:
        told.setdefault(IPv4Address(number), []).append(mac)
    return told


def test_proxy_arp() -> None:
    """A machine that alone answers for most of what nobody else answers for answers for everything; one with a few
    addresses of its own does not, however small the subnet."""
    everybody = [(number, "p") for number in range(250)]
    assert scan.proxies(answers(*everybody), 250) == {"p": 250}
    assert scan.proxies(answers(*everybody, (3, "a"), (4, "b")), 250) == {"p": 248}
    # Some of its answers were lost, and half of the machines are others.
    some = [each for each in everybody if each[0] % 20]
    assert scan.proxies(answers(*some, *((number, f"{number}") for number in range(125))), 250) == {"p": 119}
    assert scan.proxies(answers(*everybody[:200]), 254) == {}
    assert scan.proxies(answers(*everybody[:20]), 254) == {}
    assert scan.proxies(answers((1, "a"), (2, "a")), 2) == {}
    assert scan.proxies(answers((1, "a"), (2, "a"), (3, "b")), 14) == {}
    assert scan.proxies({}, 254) == {}


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abc")), max_size=60), st.integers(0, 300))
def test_proxies_of_any_answers(found: list[tuple[int, str]], more: int) -> None:
    """Nobody is suspected who does not answer alone for three addresses, or while others are silent."""
    told = answers(*dict.fromkeys(found))
    suspected = scan.proxies(told, len(told) + more)
    for mac, count in suspected.items():
        assert count == sum(macs == [mac] for macs in told.values()) >= 3
    if more > len(told):
        assert suspected == {}


# --- on a real LAN ------------------------------------------------------------------------------------------


def aim(subnet: Any, named: str = "") -> Target:
    return scan.target(subnet, *scan.interfaces_of_this_machine(), named)


def sweep(subnet: Any, rate: float = 1000, **more: Any) -> Report:
    return scan.scan(aim(subnet), rate=rate, **more)


@contextlib.contextmanager
def answering(machine: Machine, reply: Callable[[Arp, float], list[bytes]]) -> Iterator[list[tuple[float, Arp]]]:
    """On this machine's cable: what `reply` says to each ARP request, given it and the number of requests before it
    for that address. Yields the requests with the time at which they came."""
    heard: list[tuple[float, Arp]] = []
    done = threading.Event()
    with machine.socket() as raw:
        raw.settimeout(0.05)

        def act() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    packet = decode(raw.recv(2048))
                    if isinstance(packet, Arp) and packet.operation is Operation.REQUEST:
                        before = sum(one.target == packet.target for _, one in heard)
                        heard.append((time.monotonic(), packet))
                        for frame in reply(packet, before):
                            raw.send(frame)

        with meanwhile(act):
            try:
                yield heard
            finally:
                done.set()


@in_namespaces
@pytest.mark.parametrize("subnet", [PART4, PART6], ids=str)
def test_who_is_there(subnet: Any) -> None:
    """Every machine that answers is found with its MAC, also one behind another port of the bridge; this host's own
    address, which cannot answer it, is in the list too."""
    with machines(3) as [_printer, laptop, other]:
        laptop.ip(f"addr add {subnet[5]}/{LAN4.prefixlen if subnet is PART4 else 64} dev eth0" + nodad(subnet))
        other.ip(f"addr add {subnet[9]}/{LAN4.prefixlen if subnet is PART4 else 64} dev eth0" + nodad(subnet))
        found, seconds = timed(lambda: sweep(subnet))
        other_mac = "02:00:00:00:4d:04"
        assert found.macs == {
            subnet[1]: [HOST_MAC],
            subnet[2]: [PRINTER_MAC],
            subnet[5]: [LAPTOP_MAC],
            subnet[9]: [other_mac],
        }
        assert list(found.macs) == sorted(found.macs)
        assert (found.trouble, found.proxies, found.broken_off) == ("", {}, False)
        assert found.asked == (13 if subnet is PART4 else 14)
        assert seconds < 3


def nodad(subnet: Any) -> str:
    return " nodad" if isinstance(subnet, IPv6Network) else ""


@in_namespaces
def test_a_rate_that_is_kept() -> None:
    """As many requests in a second as were asked for, evenly, and never more; each address twice, those that have
    answered once; progress is told of all of them."""
    rate, told = 200, []
    with machines() as [printer], answering(printer, lambda packet, before: []) as heard:
        found, seconds = timed(
            lambda: sweep(ip_network("192.168.77.0/25"), rate, progress=lambda *one: told.append(one))
        )
        ours = [(when, packet.target) for when, packet in heard if packet.source == HOST_MAC]
        assert len(ours) == 2 * 125 - 1
        assert found.macs.keys() == {HOST4, PRINTER4}
        times = [when for when, _ in ours]
        span = times[-1] - times[0]
        print(f"{len(ours)} requests in {span:.2f} s, {len(ours) / span:.1f} a second; the scan took {seconds:.2f} s")
        assert 0.6 * rate < len(ours) / span < 1.05 * rate
        for first, tenth in zip(times, times[rate // 4 :], strict=False):
            assert tenth - first > 0.25 * 0.8, "a burst"
        again: dict[Any, list[float]] = {}
        for when, address in ours:
            again.setdefault(address, []).append(when)
        assert all(pair[1] - pair[0] > scan.AGAIN * 0.9 for address, pair in again.items() if address != PRINTER4)
        assert told[-1] == (250, 250)
        assert [done for done, _ in told] == sorted(done for done, _ in told)


@in_namespaces
def test_a_lost_frame() -> None:
    """One request or answer may be lost on the way: each address is asked for again."""
    with machines(2) as [_printer, laptop]:

        def second(packet: Arp, before: int) -> list[bytes]:
            return [arp_reply(FREE4, FORGED)] if packet.target == FREE4 and before == 1 else []

        with answering(laptop, second):
            found = sweep(ip_network("192.168.77.96/29"))
        assert found.macs == {FREE4: [FORGED]}


@in_namespaces
def test_a_slow_answer() -> None:
    """A machine that sleeps and answers most of a second late is found all the same, also when others are asked for by
    then: of the addresses that wait the kernel chooses the last 128, and the listener hears the rest."""
    network = ip_network("192.168.76.0/22")
    with machines(2) as [_printer, laptop], laptop.socket() as raw:
        ip(f"addr add 192.168.76.1/{network.prefixlen} dev br0")
        late: list[threading.Timer] = []

        def slowly(packet: Arp, before: int) -> list[bytes]:
            if packet.target in (FREE4, IPv4Address("192.168.79.254")) and before == 1:
                late.append(threading.Timer(0.8, raw.send, [arp_reply(packet.target, FORGED, packet.sender_mac)]))
                late[-1].start()
            return []

        with answering(laptop, slowly):
            found = sweep(network)
        for timer in late:
            timer.join()
        assert {str(each) for each, macs in found.macs.items() if macs == [FORGED]} == {str(FREE4), "192.168.79.254"}


@in_namespaces
def test_two_machines_with_one_address() -> None:
    """Both are in the list: that is what the operator looks for."""
    with machines(2) as [_printer, laptop]:
        with answering(laptop, lambda packet, _: [arp_reply(PRINTER4, FORGED)] if packet.target == PRINTER4 else []):
            found = sweep(PART4)
        assert sorted(found.macs[PRINTER4]) == [PRINTER_MAC, FORGED]


@in_namespaces
def test_who_only_wants_an_address_does_not_have_it() -> None:
    """Another machine's probe is a question, no answer."""
    with machines(2) as [_printer, laptop]:
        with answering(laptop, lambda packet, _: [packets.arp_probe(packet.target, FORGED)]):
            found = sweep(PART4)
        assert found.macs == {HOST4: [HOST_MAC], PRINTER4: [PRINTER_MAC]}


@in_namespaces
def test_a_router_that_answers_for_everybody() -> None:
    """Proxy ARP is told, and the machines behind it are found by their own answers."""
    with machines(2) as [_printer, laptop]:
        with answering(laptop, lambda packet, _: [arp_reply(packet.target, FORGED)]):
            found = sweep(PART4)
        assert found.proxies == {FORGED: 12}
        assert sorted(found.macs[PRINTER4]) == [PRINTER_MAC, FORGED]


def neighbours(machine: Machine) -> set[tuple[str, str]]:
    """What a machine's caches say: addresses with a MAC."""
    output = subprocess.run(
        [*machine.enter, "ip", "-json", "neigh"], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    return {(each["dst"], each["lladdr"]) for each in json.loads(output) if "lladdr" in each}


@in_namespaces
@pytest.mark.parametrize("subnet", [PART4, PART6], ids=str)
def test_caches_stay_true(subnet: Any) -> None:
    """Who is asked learns where this host is, which is true; nobody learns, loses or changes anything else."""
    with machines(2) as [printer, laptop]:
        laptop.ip(f"addr add {subnet[5]}/{LAN4.prefixlen if subnet is PART4 else 64} dev eth0" + nodad(subnet))
        for address, mac in ((PRINTER4, PRINTER_MAC), (PRINTER6, PRINTER_MAC), (FREE4, FORGED), (FREE6, FORGED)):
            laptop.ip(f"neigh add {address} lladdr {mac} nud stale dev eth0")
        printer.ip(f"neigh add {FREE4} lladdr {FORGED} nud stale dev eth0")
        before = neighbours(laptop), neighbours(printer)
        sweep(subnet)
        here = {(str(HOST4 if subnet is PART4 else HOST6), HOST_MAC)}
        assert neighbours(laptop) - here == before[0]
        assert neighbours(printer) - here == before[1]


@contextlib.contextmanager
def wire_of(machine: Machine) -> Iterator[tuple[ThreadPoolExecutor, Wire]]:
    """A Wire on another machine's cable, and the thread to use it in."""

    def opened() -> Wire:
        with open(f"/proc/{machine.pid}/ns/net") as namespace:
            call(_libc.setns(namespace.fileno(), CLONE_NEWNET))
        call(_libc.unshare(CLONE_NEWNS))
        call(_libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))
        made = Wire("eth0")
        made.start()
        return made

    with ThreadPoolExecutor(1) as executor:
        there = executor.submit(opened).result(10)
        try:
            yield executor, there
        finally:
            there.close()


@in_namespaces
@pytest.mark.parametrize("subnet", [PART4, PART6], ids=str)
def test_a_scan_is_no_conflict(subnet: Any) -> None:
    """A daemon that probes an address at the same time must not take the scan, which may come from any machine, for
    one that wants the address."""
    with machines(2) as [_printer, laptop], wire_of(laptop) as (executor, there):
        times = Times(2, (1.5, 1.5), 1.5)
        probing = executor.submit(there.probe, subnet[7], times, deadline=soon())
        time.sleep(0.2)
        assert sweep(subnet).macs.keys() == {subnet[1], subnet[2]}
        assert not probing.done()
        assert probing.result(10) == Silent()


@in_namespaces
def test_a_machine_that_takes_an_address_meanwhile_keeps_it() -> None:
    """RFC 4862: a kernel gives an address up when somebody else's detection of duplicates names it. A scan's
    solicitation does not."""
    with machines(2) as [_printer, laptop]:
        laptop.setting("ipv6/conf/eth0/dad_transmits", "3")
        taken = f"{PART6[7]}/64"
        laptop.ip(f"addr add {taken} dev eth0")
        show = [*laptop.enter, "ip", "-6", "addr", "show", "dev", "eth0", "to", str(PART6[7])]

        def shown() -> str:
            return subprocess.run(show, capture_output=True, text=True, timeout=10, check=True).stdout

        assert "tentative" in shown()
        ends = soon()
        while "tentative" in shown() and "dadfailed" not in shown() and time.monotonic() < ends:
            sweep(PART6)
        assert str(PART6[7]) in shown()
        assert "tentative" not in shown()


@in_namespaces
def test_a_dead_wire() -> None:
    """Nobody would be found on it, so it is not scanned: the cable is out, or none of those is heard who should be."""
    with machines() as [printer]:
        with pytest.raises(ProbeFailed, match=r"192\.168\.77\.0/28 cannot be scanned.*none of the machines.*77\.99"):
            sweep(PART4, peers=[FREE4, HOST4])
        assert PRINTER4 in sweep(PART4, peers=[FREE4, PRINTER4]).macs
        # One that is on another LAN says nothing about this one.
        assert PRINTER4 in sweep(PART4, peers=[ip_address("10.9.9.9"), ip_address("fd00:99::1")]).macs
        printer.ip("link set eth0 down")
        with pytest.raises(ProbeFailed, match="no carrier"):
            until(lambda: not sweep(PART4), "the cable is out")


@in_namespaces
@pytest.mark.parametrize("outage", ["link set eth0 down", "link set br0 down", "link del br0"])
def test_the_wire_dies_meanwhile(outage: str) -> None:
    """The scan ends, tells who answered until then, and says that the rest is not known."""
    with machines() as [_printer], meanwhile(lambda: ip(outage), 0.7):
        found, seconds = timed(lambda: sweep(LAN4, rate=50))
        assert PRINTER4 in found.macs
        assert re.search("no carrier|is down|no interface|was disturbed", found.trouble)
        assert seconds < 3


@in_namespaces
def test_a_short_outage_is_told() -> None:
    """Down and up again: the scan goes on, and says that machines may be missing."""
    with machines(bridge=False) as [printer]:
        with meanwhile(lambda: printer.ip("link set eth0 down", "link set eth0 up"), 0.5):
            found = sweep(LAN4, rate=150)
        assert re.search("was disturbed meanwhile|no carrier", found.trouble)


@in_namespaces
def test_breaking_it_off() -> None:
    """Ctrl-C ends a long scan with what was found until then."""
    with machines():

        def progress(done: int, total: int) -> None:
            if done == 20:
                raise KeyboardInterrupt

        found, seconds = timed(lambda: sweep(LAN4, progress=progress))
        assert found.broken_off
        assert "broken off" in found.trouble
        assert PRINTER4 in found.macs
        assert seconds < 3
    assert not any(thread.name.startswith("wire-") for thread in threading.enumerate())


@in_namespaces
def test_a_flood() -> None:
    """10,000 frames a second from ever new machines hide nobody, and none of them is taken for an answer."""
    with machines(3) as [printer, laptop, other], printer.socket() as raw:
        for number in range(100, 110):
            other.ip(f"addr add 192.168.77.{number}/24 dev eth0")
        command = [*laptop.enter, sys.executable, "-c", _FLOOD, "10000", "12"]
        flood = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            for _ in range(2 * wire.LISTENING_RATE):  # then it has begun
                raw.recv(2048)
            found = sweep(LAN4, rate=200)
            assert flood.poll() is None, "the flood ended too early"
        finally:
            flood.kill()
            flood.wait(10)
        assert found.macs.keys() == {HOST4, PRINTER4, *(ip_address(f"192.168.77.{n}") for n in range(100, 110))}
        assert (found.trouble, found.proxies) == ("", {})


# --- a large IPv6 subnet ------------------------------------------------------------------------------------

HIDDEN6 = ip_address("fd00:77::dead:beef")


@in_namespaces
def test_a_large_subnet() -> None:
    """Nobody can ask for 2**64 addresses: found are the machines that answer all nodes' address, those that talk, and
    those that the register knows; one that does none of it is not."""
    with machines(4) as [_printer, talking, quiet, hidden], talking.socket() as raw:
        for machine, address in ((talking, FREE6), (quiet, "fd00:77::abc:1"), (hidden, HIDDEN6)):
            machine.setting("ipv6/icmp/echo_ignore_multicast", "1")
            machine.ip(f"addr add {address}/64 dev eth0 nodad")

        def talk() -> None:
            packets_ = packets.nd_solicitation(PRINTER6, IPv6Address(str(FREE6)), LAPTOP_MAC)
            raw.send(packets_)

        known = [ip_address("fd00:77::abc:1"), ip_address("fd00:77::abc:2"), ip_address("fd00:88::1"), HOST4]
        with meanwhile(talk, 0.5):
            found, seconds = timed(lambda: sweep(LAN6, known=known))
        assert found.macs == {
            HOST6: [HOST_MAC],
            PRINTER6: [PRINTER_MAC],
            FREE6: [LAPTOP_MAC],
            known[0]: ["02:00:00:00:4d:04"],
        }
        assert found.asked == 4
        assert found.trouble == ""
        assert seconds < 6


@in_namespaces
def test_what_is_asked_in_a_large_subnet() -> None:
    """All nodes, and then single addresses, in this host's own name; not a single request is one of duplicate address
    detection."""
    with machines() as [printer], printer.socket() as raw:
        sweep(LAN6, known=[FREE6])
        raw.settimeout(0.1)
        asked = []
        with contextlib.suppress(TimeoutError):
            while True:
                packet = decode(raw.recv(2048))
                if isinstance(packet, NeighbourSolicitation) and packet.source == HOST_MAC:
                    asked.append(packet)
        assert {each.target for each in asked} >= {FREE6, PRINTER6}
        assert {(each.ip_source, each.link_layer) for each in asked if each.target == FREE6} == {(HOST6, HOST_MAC)}
        assert packets.UNSPECIFIED not in {each.ip_source for each in asked if each.target in LAN6}


@in_namespaces
def test_an_address_that_is_gone() -> None:
    """Nobody can be asked in the name of an address that this host has lost meanwhile: said, and no traceback."""
    with machines():
        found = scan.scan(aim(LAN6)._replace(source=ip_address("fd00:77::5555")), rate=1000, known=[PRINTER6])
        assert found.trouble == "br0: Cannot assign requested address"


@in_namespaces
def test_many_that_show_up_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever invents addresses does not make the scan endless."""
    monkeypatch.setattr(scan, "HEARD_AT_MOST", 50)
    with machines(2) as [_printer, laptop], laptop.socket() as raw:
        done = threading.Event()

        def invent() -> None:
            number = 0
            while not done.wait(0.002):
                number += 1
                raw.send(answer(IPv6Address(f"fd00:77::bad:{number:x}"), FORGED))

        with meanwhile(invent):
            try:
                found, seconds = timed(lambda: sweep(LAN6))
            finally:
                done.set()
        assert found.asked <= 50
        assert seconds < 15


# --- the command --------------------------------------------------------------------------------------------

KEYS = Keys()
VENDORS = "\nOUI:00101F*\n ID_OUI_FROM_DATABASE=Wide [red]Printers[/]\n"
REAL_MAC = "00:10:1f:00:00:09"


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of `-o json` by their addresses."""
        return {row["address"]: row for row in json.loads(self.out)}


class Register(FakeEtcd):
    """An etcd in memory that outlives the command's client."""

    def close(self) -> None:
        pass

    def put(self, key: str, value: bytes | str) -> None:
        self.commit({}, [Put(key, value if isinstance(value, bytes) else value.encode())], deadline=soon())

    def lease(self, address: str, **fields: Any) -> None:
        self.put(f"{KEYS.leases}default/{address}", encode(Lease(**fields)))

    def pool(self, subnet: Any, options: str = "", segment: str = "default") -> None:
        use = PoolUse(host="a", segment=segment, subnet=str(subnet))
        self.put(f"{KEYS.pools}{segment}/{subnet}{options}/a", encode(use))

    def host(self, name: str, address: str, mac: str, *, alive: bool = True) -> None:
        record = Host(host=name, addresses=(HostAddress(address, 24, "br0", mac),))
        self.put(KEYS.host(name), encode(record))
        if alive:
            beat = Alive(host=name, machine_id="m", boot_id="b", process="p")
            self.put(KEYS.heartbeat(name), encode(beat))

    def leases(self) -> dict[str, Lease]:
        values, _ = self.list(KEYS.leases, deadline=soon())
        return {each.key.removeprefix(KEYS.leases): read_lease(each.value) for each in values}


@pytest.fixture
def register() -> Register:
    return Register()


Run = Callable[..., Done]


@pytest.fixture
def run(register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`ipam-plugin scan` as the entry point runs it, in the namespaces of the test."""
    config = tmp_path / "config.yaml"
    config.write_text("etcd: {endpoints: [http://127.0.0.1:2379]}\nsegments: {named: {interface: br0}}\n")
    (tmp_path / "vendors").write_text(VENDORS)
    monkeypatch.setattr(vendors, "SOURCES", ((str(tmp_path / "vendors"), vendors.SOURCES[0][1]),))
    vendors._registered.cache_clear()
    monkeypatch.setattr(daemon, "etcd_of", lambda config: register)
    monkeypatch.setenv("LOGNAME", "eve")

    def ran(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["ipam-plugin", "--config", str(config), "scan", "--rate", "1000", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return Done(status, told.out, told.err)

    return ran


@in_namespaces
def test_what_the_register_says(run: Run, register: Register) -> None:
    """Each machine that answers, with its MAC and vendor, and whether it is a lease and whose, a registered host, kept
    by an operator, or a stranger."""
    with machines(2) as [printer, laptop]:
        for number in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12):
            laptop.ip(f"addr add 192.168.77.{number}/24 dev eth0")
        printer.ip(f"link set eth0 address {REAL_MAC}")
        register.host("a", str(HOST4), HOST_MAC)
        register.host("b", "192.168.77.99", "02:00:00:00:00:0b", alive=False)
        register.host("c", "192.168.77.12", "02:00:00:00:00:0c", alive=False)
        register.lease("192.168.77.1", kind="host", host="a", interface="br0", mac=HOST_MAC)
        register.lease("192.168.77.3", kind="endpoint", host="b", mac=LAPTOP_MAC)
        register.lease("192.168.77.4", kind="endpoint", host="b", mac=FORGED)
        register.lease("192.168.77.5", kind="reserved", note="the laptop", by="eve")
        register.lease("192.168.77.6", kind="conflict", mac=LAPTOP_MAC)
        register.lease("192.168.77.7", kind="standby", host="b")
        register.put(f"{KEYS.leases}default/192.168.77.8-192.168.77.9", "the lab")
        register.put(KEYS.segment("default"), '{"exclude":["192.168.77.10"]}')
        register.put(f"{KEYS.leases}default/192.168.077.011", "?")
        told = run("192.168.77.0/28", "-o", "json")
        assert (told.status, "MAC " in told.err) == (0, False)
        rows = told.rows
        assert list(rows) == [f"192.168.77.{number}" for number in range(1, 13)]
        assert rows["192.168.77.2"] == {
            "address": "192.168.77.2", "mac": REAL_MAC, "vendor": "Wide [red]Printers[/]", "stranger": True,
            "lease": None, "reserved": False, "register": "",
        }  # fmt: skip
        assert [each for each, row in rows.items() if row["stranger"]] == ["192.168.77.2"]
        assert {row["reserved"] for row in rows.values()} == {False}
        for number, kind, words in (
            (1, "host", "Docker host a itself"),
            (3, "endpoint", "a container on host b"),
            (4, "endpoint", "but another machine answers"),
            (5, "reserved", "the laptop"),
            (6, "conflict", "a machine that is none of ours"),
            (7, "standby", "but another machine answers"),
            (8, None, "192.168.77.8-192.168.77.9"),
            (9, None, "takes it"),
            (10, None, "it is excluded"),
            (11, "unreadable", "cannot be read"),
            (12, None, "Docker host c itself"),
        ):
            row = rows[f"192.168.77.{number}"]
            assert (row["lease"]["kind"] if row["lease"] else None) == kind
            assert words in row["register"], row
            assert ("another machine" in row["register"]) == (number in (4, 7))
        table = run("192.168.77.0/28")
        assert table.status == 0
        lines = table.out.splitlines()
        assert lines[0].split() == ["ADDRESS", "MAC", "VENDOR", "KIND", "REGISTER"]
        assert lines[2].split() == ["192.168.77.2", REAL_MAC, "Wide", "[red]Printers[/]", "stranger"]
        assert "13 asked for, 12 in use, 1 by strangers" in table.err
        assert "\x1b" not in table.out + table.err
        assert register.leases().keys() == {
            *(f"default/192.168.77.{number}" for number in (1, 3, 4, 5, 6, 7, "8-192.168.77.9")),
            "default/192.168.077.011",
        }


@in_namespaces
def test_strangers_become_reservations(run: Run, register: Register) -> None:
    """--reserve keeps every stranger's address, by its own key and with what is known of the machine; a conflict that
    tells of the same machine becomes a reservation; nothing else changes."""
    with machines(2) as [printer, laptop]:
        printer.ip(f"link set eth0 address {REAL_MAC}")
        for number in (3, 4, 5, 6):
            laptop.ip(f"addr add 192.168.77.{number}/24 dev eth0")
        register.host("a", str(HOST4), HOST_MAC)
        register.lease("192.168.77.3", kind="endpoint", host="b", mac=LAPTOP_MAC)
        register.lease("192.168.77.4", kind="conflict", mac=LAPTOP_MAC, token="t")
        register.lease("192.168.77.5", kind="conflict", mac=FORGED, token="t")
        before = register.leases()
        told = run("192.168.77.0/28", "--reserve", "-o", "json")
        assert told.status == 0
        assert [each for each, row in told.rows.items() if row["reserved"]] == [
            f"192.168.77.{number}" for number in (2, 4, 6)
        ]
        after = register.leases()
        for number, note in ((2, f"{REAL_MAC} Wide [red]Printers[/]"), (4, LAPTOP_MAC), (6, LAPTOP_MAC)):
            lease = after.pop(f"default/192.168.77.{number}")
            assert (lease.kind, lease.note, lease.mac) == ("reserved", f"found by scan: MAC {note}", note[:17])
            assert lease.by.startswith("eve@")
            assert lease.token not in ("", "t")
            assert lease.since
        del before["default/192.168.77.4"]
        assert after == before
        again = run("192.168.77.0/28", "--reserve")
        assert again.status == 0
        assert "0 by strangers" in again.err
        assert "reserved now" not in again.out
        assert register.leases().keys() == after.keys() | {f"default/192.168.77.{number}" for number in (2, 4, 6)}


@in_namespaces
def test_a_container_gets_the_address_first(run: Run, register: Register) -> None:
    """P1 for a scan too: what somebody got since the register was read is left to him, and named."""

    def meanwhile_given(expect: Mapping[str, int], writes: Writes) -> Fault:
        if KEYS.lease("default", PRINTER4) in expect:
            register.on_commit = None
            register.lease(str(PRINTER4), kind="endpoint", host="b", token="theirs")
        return Fault.PASS

    with machines():
        register.on_commit = meanwhile_given
        told = run("192.168.77.0/28", "--reserve", "-o", "json")
        assert told.status == 0
        assert told.rows[str(PRINTER4)]["reserved"] is False
        assert "192.168.77.2 in segment default is not reserved: a container on host b" in told.err
        assert register.leases()[f"default/{PRINTER4}"].token == "theirs"


@in_namespaces
def test_etcd_goes_away_while_strangers_are_reserved(run: Run, register: Register) -> None:
    """What was reserved until then is told, and the exit status says that it is not all."""
    with machines(2) as [_printer, laptop]:
        register.host("a", str(HOST4), HOST_MAC)
        for number in (3, 4):
            laptop.ip(f"addr add 192.168.77.{number}/24 dev eth0")
        register.faults.extend([Fault.PASS, Fault.UNAVAILABLE])
        told = run("192.168.77.0/28", "--reserve", "-o", "json")
        assert told.status == 1
        rows = told.rows
        assert [row["reserved"] for row in rows.values()] == [False, True, False, False]
        assert "192.168.77.3 and the strangers after it could not be reserved: " in told.err
        assert register.leases().keys() == {f"default/{PRINTER4}"}


@in_namespaces
def test_proxy_arp_fills_no_register(run: Run, register: Register) -> None:
    """Where a router answers for everything, only those are reserved that answer for themselves."""
    with machines(2) as [_printer, laptop]:
        register.host("a", str(HOST4), HOST_MAC)
        with answering(laptop, lambda packet, _: [arp_reply(packet.target, FORGED)]):
            told = run("192.168.77.0/28", "--reserve", "-o", "json")
        assert told.status == 0
        assert [each for each, row in told.rows.items() if row["stranger"]] == [str(PRINTER4)]
        assert told.rows[str(PRINTER4)]["mac"] == PRINTER_MAC
        assert len(told.rows) == 14
        assert f"MAC {FORGED} alone answers for 12 addresses (proxy ARP)" in told.err
        assert register.leases().keys() == {f"default/{PRINTER4}"}


@in_namespaces
def test_two_machines_are_told(run: Run, register: Register) -> None:
    """Both are rows, one line says it, and the reservation names both."""
    with machines(2) as [_printer, laptop]:
        with answering(laptop, lambda packet, _: [arp_reply(PRINTER4, FORGED)] if packet.target == PRINTER4 else []):
            told = run("192.168.77.2", "--reserve")
        assert told.status == 0
        assert re.search(rf"192\.168\.77\.2 is used by 2 machines: MAC ({PRINTER_MAC}|{FORGED}), ", told.err)
        assert [line.split()[0] for line in told.out.splitlines()[1:] if line[0] != " "] == ["192.168.77.2"] * 2
        note = register.leases()[f"default/{PRINTER4}"].note
        assert PRINTER_MAC in note
        assert FORGED in note


@in_namespaces
def test_which_subnets(run: Run, register: Register) -> None:
    """Without a word, those of the default segment's pools that an interface of this host carries; a segment's name;
    a subnet or an address, in a segment; an interface by its name, by the pool's option or by the configuration."""
    with machines():
        nothing = run()
        assert nothing.status == 1
        assert "segment default has no pool" in nothing.err
        register.pool("10.9.0.0/24")
        elsewhere = run()
        assert elsewhere.status == 1
        assert "no interface of this host has an address in 10.9.0.0/24" in elsewhere.err
        register.pool("192.168.77.0/28", ";gateway=router")
        register.pool("192.168.77.0/29")
        told = run("-o", "json")
        assert told.status == 0
        assert told.rows.keys() == {"192.168.77.1", "192.168.77.2"}
        assert told.err.count(" asked for") == 1
        assert "not scanned: no interface of this host has an address in 10.9.0.0/24" in told.err
        assert run("-o", "json", "default").rows == told.rows
        register.pool("192.168.77.0/30", segment="lab")
        assert run("lab", "-o", "json").rows.keys() == {"192.168.77.1", "192.168.77.2"}
        assert "192.168.77.0/30 on br0" in run("--segment", "lab").err
        assert run("nowhere").status == 1
        register.put(f"{KEYS.leases}lab/192.168.77.2", encode(Lease("reserved", note="in the lab")))
        for arguments, stranger in ((("192.168.77.2",), True), (("192.168.77.2/32", "--segment", "lab"), False)):
            rows = run(*arguments, "-o", "json").rows
            assert [row["stranger"] for row in rows.values()] == [stranger]
        assert "no interface nic7" in run("192.168.77.0/28", "--interface", "nic7").err
        assert "no interface nic8" in run("192.168.5.0/30", "--segment", "other", "--interface", "nic8").err
        register.pool("192.168.78.0/30", ";interface=nic9", "optional")
        assert "no interface nic9" in run("optional").err
        assert "192.168.5.0/30 on br0: 2 asked for" in run("192.168.5.0/30", "--segment", "named").err


@in_namespaces
def test_peers_of_the_register(run: Run, register: Register) -> None:
    """A wire on which neither the router nor a living host is heard is not scanned: exit status 1 and one line."""
    with machines():
        register.host("b", "192.168.77.99", FORGED)
        told = run("192.168.77.0/28", "--reserve")
        assert (told.status, told.out) == (1, "")
        assert "none of the machines that should be on br0 was heard" in told.err
        assert len(told.err.splitlines()) == 1
        assert register.leases() == {}
        register.put(KEYS.segment("default"), f'{{"router":"{PRINTER4}"}}')
        told = run("192.168.77.0/28", "-o", "json")
        assert told.status == 0
        assert "router" in told.rows[str(PRINTER4)]["register"]


@in_namespaces
def test_an_outage_is_told(run: Run, register: Register) -> None:
    """What was found is printed, and the exit status says that it is not all."""
    with machines() as [_printer], meanwhile(lambda: ip("link set eth0 down"), 1.0):
        told = run("192.168.77.0/24", "--rate", "50", "-o", "json")
        assert told.status == 1
        assert str(PRINTER4) in told.out
        assert "machines may be missing: 192.168.77.0/24: " in told.err


@in_namespaces
def test_nobody_there(run: Run, register: Register) -> None:
    """An empty answer is one too."""
    with machines():
        told = run("192.168.77.96/29", "-o", "json")
        assert (told.status, told.out) == (0, "[]\n")
        told = run("192.168.77.96/29")
        assert (told.status, told.out) == (0, "")
        assert "6 asked for, 0 in use" in told.err


@in_namespaces
def test_a_large_subnet_says_what_it_did(run: Run, register: Register) -> None:
    """A machine that keeps quiet is not found in it, and the operator is told so."""
    with machines(2) as [_printer, laptop]:
        laptop.setting("ipv6/icmp/echo_ignore_multicast", "1")
        laptop.ip(f"addr add {FREE6}/64 dev eth0 nodad")
        register.lease(str(FREE6), kind="endpoint", host="b")
        told = run("fd00:77::/64", "-o", "json")
        assert told.status == 0
        assert told.rows.keys() == {str(HOST6), str(PRINTER6), str(FREE6)}
        assert "too large to ask for every address" in told.err


@in_namespaces
def test_without_rights(run: Run, register: Register) -> None:
    """Whoever may not open raw sockets is told what is missing, before anything is asked of etcd."""
    with machines():
        register.set_down(True)
        drop_raw_sockets()
        told = run("192.168.77.0/28")
        assert told.status == 1
        assert "CAP_NET_RAW" in told.err
        assert "root" in told.err
        assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["192.168.77.5/24"],
        ["192.168.77.0/33"],
        ["fd00::%eth0/64"],
        ["a b"],
        ["../x"],
        ["192.168.77.0/24", "--rate", "0"],
        ["192.168.77.0/24", "--rate", "5000"],
        ["192.168.77.0/24", "--rate", "fast"],
        ["one", "--segment", "two"],
        ["192.168.77.0/24", "192.168.78.0/24"],
        ["--segment", "a/b"],
    ],
)
def test_wrong_usage(run: Run, register: Register, arguments: list[str]) -> None:
    """Status 2, said on stderr, nothing on stdout."""
    told = run(*arguments)
    assert (told.status, told.out) == (2, "")
    assert told.err


def test_a_conflict_of_the_same_machine(register: Register) -> None:
    """Only at the revision that was read: a conflict that became something else meanwhile is left, and told."""
    register.lease("192.168.77.2", kind="conflict", mac=PRINTER_MAC.upper())
    ops = Operations(register, KEYS, "eve")
    assert ops.reserve_for(PRINTER4, [PRINTER_MAC], "default", "n") == ""
    assert "a reservation by eve" in ops.reserve_for(PRINTER4, [PRINTER_MAC], "default", "n")
    register.lease("192.168.77.3", kind="conflict", mac=PRINTER_MAC)

    def another(expect: Mapping[str, int], writes: Writes) -> Fault:
        register.on_commit = None
        register.lease("192.168.77.3", kind="endpoint", host="b")
        return Fault.PASS

    register.on_commit = another
    taken = ops.reserve_for(ip_address("192.168.77.3"), [PRINTER_MAC], "default", "n")
    assert "a container on host b" in taken
    for fault in (Fault.APPLIED, Fault.UNAVAILABLE):
        register.faults.append(fault)
    with contextlib.suppress(Exception):
        ops.reserve_for(ip_address("192.168.77.4"), [PRINTER_MAC], "default", "n")
    assert register.leases()["default/192.168.77.4"].kind == "reserved"


# --- with a real etcd, as it is typed -----------------------------------------------------------------------


@contextlib.contextmanager
def real_etcd(directory: Path) -> Iterator[str]:
    """An etcd on loopback of the namespaces of this thread, with which it ends. Yields its URL."""
    if ETCD is None or ETCDCTL is None:
        missing("etcd", "there is no etcd binary")
    client, peer = free_ports(2)
    url = f"http://127.0.0.1:{client}"
    command = ["setpriv", "--pdeathsig", "KILL", ETCD, "--data-dir", str(directory / "etcd"), "--logger", "zap"]
    command += ["--listen-client-urls", url, "--advertise-client-urls", url]
    command += ["--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-cluster"]
    command += [f"default=http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"]
    with (directory / "etcd.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        until(lambda: etcdctl(url, "put", "ready", "yes", check=False), "etcd is healthy", 30)
        yield url
    finally:
        process.kill()
        process.wait(10)


def etcdctl(url: str, *arguments: str, check: bool = True) -> str:
    return subprocess.run(
        [str(ETCDCTL), "--endpoints", url, "--command-timeout=5s", *arguments],
        env=os.environ | {"ETCDCTL_API": "3"},
        capture_output=True,
        text=True,
        timeout=30,
        check=check,
    ).stdout


@pytest.mark.etcd
@in_namespaces
def test_as_it_is_typed(tmp_path: Path) -> None:
    """No daemon runs. On a terminal there is a progress bar, on stderr alone; without one there is none."""
    with machines() as [_printer], real_etcd(tmp_path) as url:
        config = tmp_path / "config.yaml"
        config.write_text(f"etcd: {{endpoints: [{url}]}}\n")
        etcdctl(url, "put", KEYS.segment("default"), '{"router":"192.168.77.2"}')
        etcdctl(url, "put", f"{KEYS.pools}default/192.168.77.0/25/a", "{}")
        command = [sys.executable, "-m", "ipam_plugin", "--config", str(config), "scan"]
        plain = subprocess.run(
            [*command, "-o", "json"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert [row["address"] for row in json.loads(plain.stdout)] == [str(HOST4), str(PRINTER4)]
        assert plain.stderr == "192.168.77.0/25 on br0: 125 asked for, 2 in use, 1 by strangers\n"
        ours, theirs = pty.openpty()
        try:
            shown = subprocess.Popen(
                [*command, "192.168.77.0/28", "--reserve"], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True
            )
            os.close(theirs)
            terminal = b""
            with contextlib.suppress(OSError):  # the last one to write has gone
                while part := os.read(ours, 4096):
                    terminal += part
            output, _ = shown.communicate(timeout=60)
        finally:
            os.close(ours)
        assert shown.returncode == 0
        assert b"192.168.77.0/28 on br0" in terminal
        assert b"%" in terminal
        assert "\x1b" not in output
        assert "reserved now, found by scan: MAC 02:00:00:00:4d:01" in " ".join(output.split())
        stored = etcdctl(url, "get", "--prefix", KEYS.leases, "--print-value-only").splitlines()
        assert [json.loads(value)["kind"] for value in stored] == ["reserved"]
