"""A sweep of a subnet: which machines of the LAN have its addresses, asked at a bounded rate.

Every address is asked for twice, by ordinary requests in this interface's own name, as any machine asks
before it talks to another. A request in nobody's name (an ARP probe, duplicate address detection) is a
claim: a machine that is just checking an address of its own gives it up when it sees one (RFC 5227
section 2.1.1, RFC 4862 section 5.4.3), and a daemon would take a scan for a machine that wants each
address. An ordinary request teaches the machine that is asked where this one is, which is true, and
nobody anything else.

A large IPv6 subnet cannot be asked address by address. There all nodes are asked to show themselves, and
then those addresses that showed up, were heard, or are known to the register.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from ipaddress import IPv6Address
from typing import NamedTuple

from ipam_plugin import interfaces, wire
from ipam_plugin.addresses import Address, Network, address_of, usable_range
from ipam_plugin.errors import ProbeFailed, Refused
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.packets import NO_ADDRESS, NO_MAC, Claim, How
from ipam_plugin.wire import CHOSEN, NoInterface, Sighting, Wire, find_interface

LARGEST = 1 << 16  # addresses that are asked one by one
GROUP = 16  # addresses that are waited for together; as many groups at once as the kernel can choose by
AGAIN = 0.25  # seconds at least between the two requests for an address
LATE = 1.0  # seconds that are waited for the last answers
SHOW = 1.5  # seconds for which all nodes may show themselves
HEARD_AT_MOST = 4096  # addresses that are asked for because somebody showed up with them
PEERS_PATIENCE = 2.0  # seconds for hearing that the wire lives
PROXY_FROM = 3  # addresses that one machine answers for alone before it is suspected
CONTROLS = 5  # addresses that nobody should have, which are asked for beside chosen ones


class Target(NamedTuple):
    """A subnet, the interface that carries it, and in whose name is asked there."""

    subnet: Network
    interface: str
    source: Address
    own: Mapping[Address, str]  # this machine's own addresses in the subnet, and their MACs
    beside: tuple[Network, ...]  # the networks that the interface has addresses in

    @property
    def one_by_one(self) -> bool:
        return usable_range(self.subnet).size() <= LARGEST


class Report(NamedTuple):
    """Who answered. `macs`: more than one machine may say that it has an address."""

    macs: Mapping[Address, Sequence[str]]
    proxies: Mapping[str, int]  # machines that answer for everything, and for how many addresses
    asked: int  # addresses
    trouble: str  # why machines may be missing, as a clause; '' when nothing disturbed the scan
    broken_off: bool = False  # by the operator


def interfaces_of_this_machine() -> tuple[list[InterfaceAddress], list[Link]]:
    """Its addresses and links. Raises ProbeFailed."""
    try:
        return interfaces.addresses(), interfaces.links()
    except OSError as error:
        raise ProbeFailed(f"this machine's interfaces cannot be read: {error.strerror or error}") from None


def require_rights() -> None:
    """Raises ProbeFailed when this process may not open raw sockets."""
    wire.require_capability()


def target(
    subnet: Network,
    addresses: Sequence[InterfaceAddress],
    links: Sequence[Link],
    named: str = "",
    host_macs: Collection[str] = (),
    *,
    whole: bool = True,
) -> Target:
    """How a subnet is scanned from this machine, or `whole` is False and only some of it asked. Pure. Raises Refused.

    `host_macs` are the registered hosts': where this interface has no address to ask with, only they may
    ask in nobody's name, because the daemons know them. (Without any host there is no daemon to mislead.)
    """
    usable = usable_range(subnet)
    if whole and subnet.version == 4 and usable.size() > LARGEST:
        part = next(subnet.subnets(new_prefix=24))
        raise Refused(
            f"{subnet} has {subnet.num_addresses} addresses, too many to ask one by one; name a part of it (of at most"
            f" {LARGEST}): ipam-plugin scan {part}; --rate says how many are asked in a second"
        )
    interface = find_interface(subnet, addresses, links, named)
    if isinstance(interface, NoInterface):
        raise Refused(f"{interface.reason}; for a scan: --interface NAME")
    mac = next((each.mac for each in links if each.name == interface), "")
    usable_here = [each for each in addresses if each.interface == interface and not each.tentative]
    names = [each.address for each in usable_here if _meets(each.network, subnet)]
    source: Address
    if names:
        source = next((each for each in names if each in subnet), names[0])
    elif subnet.version == 4 and (not host_macs or mac in host_macs):
        source = NO_ADDRESS
    else:
        raise Refused(
            f"{interface} has no address in {subnet} to ask with, and a request in nobody's name is taken for a machine"
            f" that wants the address: ip address add … dev {interface}"
        )
    # An address on loopback is answered for on every interface, with the MAC of that one.
    own = {each.address: each.mac if each.mac != NO_MAC else mac for each in addresses if each.address in subnet}
    return Target(subnet, interface, source, own, tuple(each.network for each in usable_here))


def _meets(network: Network, subnet: Network) -> bool:
    return network.version == subnet.version and network.overlaps(subnet)


def without_parts(targets: Iterable[Target]) -> list[Target]:
    """The targets without those that lie inside another one (a /24 of a /16), each subnet once. Pure."""
    kept: list[Target] = []
    # A wider one comes first, so that what begins inside it is inside it.
    for each in sorted(targets, key=lambda each: (each.subnet.version, each.subnet.prefixlen, each.subnet)):
        if not any(_covers(other, each) for other in kept):
            kept.append(each)
    return kept


def _covers(wider: Target, narrower: Target) -> bool:
    as_thorough = wider.one_by_one or not narrower.one_by_one
    return wider.interface == narrower.interface and as_thorough and narrower.subnet.network_address in wider.subnet


def scan(
    target: Target,
    *,
    rate: float,
    peers: Iterable[Address] = (),
    known: Iterable[Address] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Asks for the addresses of a subnet; this machine's own are in the report without being asked.

    `rate`: requests per second. `peers`: the router and living hosts, of which those on this LAN have to
    be heard. `known`: addresses that a large IPv6 subnet is asked for in any case. `progress` is told how
    many requests of how many have been sent. Ctrl-C ends it early, with a report. Raises ProbeFailed on a
    wire that is dead and without the right to open raw sockets.
    """
    return _swept(_Sweep(target, rate, progress), target, peers, known)


def ask(
    target: Target,
    addresses: Iterable[Address],
    *,
    rate: float,
    taken: Collection[Address],
    peers: Iterable[Address] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """As `scan`, for these addresses alone, and for some that are not `taken`.

    Who answers for those as well answers for everything; the chosen ones may all rightly be of one machine.
    """
    controls = _unused(target, taken)
    sweep = _Sweep(target, rate, progress, chosen=[*addresses, *controls])
    report = _swept(sweep, target, peers, ())
    answered = Counter(mac for control in controls for mac in report.macs.get(control, ()))
    return report._replace(proxies={mac: count for mac, count in answered.items() if count >= PROXY_FROM})


def _unused(target: Target, taken: Collection[Address]) -> list[Address]:
    """Drawn from the whole subnet, since a server may well have some in a row."""
    usable = usable_range(target.subnet)
    drawn = {address_of(usable.version, random.randint(usable.first, usable.last)) for _ in range(10 * CONTROLS)}
    return sorted(drawn - {*taken, *target.own}, key=lambda _: random.random())[:CONTROLS]


def _swept(sweep: _Sweep, target: Target, peers: Iterable[Address], known: Iterable[Address]) -> Report:
    with Wire(target.interface, sweep.heard) as opened:
        dead = opened.alive(_peers_on(target, peers), deadline=time.monotonic() + PEERS_PATIENCE)
        if dead:
            raise ProbeFailed(f"{target.subnet} cannot be scanned, the wire cannot be heard: {dead}")
        return sweep.run(opened, known)


def _peers_on(target: Target, peers: Iterable[Address]) -> list[Address]:
    # Where this interface has no address beside a peer, IPv4 can be asked all the same and IPv6 cannot (see above).
    networks = [*target.beside, *([target.subnet] if target.subnet.version == 4 else [])]
    return [each for each in peers if each not in target.own and any(each in network for network in networks)]


def proxies(macs: Mapping[Address, Sequence[str]], asked: int) -> dict[str, int]:
    """The machines that answer for everything (proxy ARP), and for how many addresses. Pure.

    They answer alone for nearly all addresses that nobody else answers for (an answer or two may be lost); a server
    with many addresses does not.
    """
    alone = Counter(found[0] for found in macs.values() if len(found) == 1)
    silent = asked - len(macs)
    return {mac: count for mac, count in alone.items() if count >= PROXY_FROM and count >= 0.9 * (silent + count)}


class _Pace:
    """A rate that is never exceeded, also not to make up for a delay."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next = 0.0

    def wait(self) -> None:
        now = time.monotonic()
        at = max(self._next, now)
        if at > now:
            time.sleep(at - now)
        self._next = at + self._interval


class _Stopped(Exception):
    """The wire cannot be asked any more; the text is a clause."""


class _Sweep:
    """One scan of one subnet, or of the `chosen` addresses in it."""

    def __init__(
        self,
        target: Target,
        rate: float,
        progress: Callable[[int, int], object],
        chosen: Sequence[Address] | None = None,
    ) -> None:
        self._target = target
        self._chosen = chosen
        self._pace = _Pace(rate)
        self._progress = progress
        self._done, self._total = 0, 0
        self._lock = threading.Lock()  # for the next three, which the listener's thread fills
        self._macs: dict[Address, list[str]] = {}
        self._asked: set[Address] = set()
        self._shown: set[Address] = set()  # of a large IPv6 subnet: somebody showed up with it

    # --- what is heard

    def heard(self, sighting: Sighting) -> None:
        """From the listener: it loses frames in a flood, but hears the slowest answer, and who was never asked for."""
        if sighting.how in (How.ARP_REPLY, How.ADVERTISEMENT):
            self._answered(Claim(sighting.mac, sighting.address, sighting.how))
        self._showed(sighting.address)

    def _answered(self, claim: Claim) -> None:
        with self._lock:
            if claim.address not in self._asked or claim.how.probing or claim.address in self._target.own:
                return
            macs = self._macs.setdefault(claim.address, [])
            if claim.mac not in macs:
                macs.append(claim.mac)

    def _showed(self, address: Address) -> None:
        if self._chosen is not None or self._target.one_by_one:
            return
        if address not in self._target.subnet or address in self._target.own:
            return
        with self._lock:
            if len(self._shown) < HEARD_AT_MOST:
                self._shown.add(address)

    # --- what is asked

    def run(self, opened: Wire, known: Iterable[Address]) -> Report:
        disturbed = opened.watched()
        trouble, broken_off = "", False
        try:
            with ExitStack() as waiting:
                self._ask_all(opened, _Flight(opened, waiting), known)
        except _Stopped as error:
            trouble = str(error)
        except KeyboardInterrupt:
            trouble, broken_off = "it was broken off", True
        macs = self._macs | {address: [mac] for address, mac in self._target.own.items()}
        found = proxies(self._macs, len(self._asked))
        return Report(dict(sorted(macs.items())), found, len(self._asked), trouble or disturbed(), broken_off)

    def _ask_all(self, opened: Wire, flight: _Flight, known: Iterable[Address]) -> None:
        target = self._target
        if self._chosen is not None:
            pending = [each for each in self._chosen if each in target.subnet and each not in target.own]
        elif target.one_by_one:
            usable = usable_range(target.subnet)
            numbers = range(usable.first, usable.last + 1)
            pending = [
                each for number in numbers if (each := address_of(usable.version, number)) not in self._target.own
            ]
        else:
            pending = [each for each in known if each in target.subnet and each not in self._target.own]
            assert isinstance(target.source, IPv6Address)
            trouble = opened.ask_all_nodes(target.source, self._showed, deadline=time.monotonic() + SHOW)
            if trouble:
                raise _Stopped(trouble)
        while pending := self._due(pending):
            self._total += 2 * len(pending)
            self._ask_each(opened, flight, pending)
            time.sleep(AGAIN)
            self._ask_each(opened, flight, pending)
            time.sleep(LATE)

    def _due(self, pending: Collection[Address]) -> list[Address]:
        """The addresses that are still to be asked for, in order; they count as asked from now on."""
        with self._lock:
            due = sorted({*pending, *self._shown} - self._asked)
            self._asked.update(due)
        return due

    def _ask_each(self, opened: Wire, flight: _Flight, addresses: Sequence[Address]) -> None:
        for start in range(0, len(addresses), GROUP):
            dead = opened.alive((), deadline=0)
            if dead:
                raise _Stopped(dead)
            group = addresses[start : start + GROUP]
            silent = [each for each in group if each not in self._macs]
            if silent:
                flight.add(silent, self._answered)
            for each in silent:
                self._pace.wait()
                trouble = opened.ask(each, self._target.source)
                if trouble:
                    raise _Stopped(trouble)
                self._done += 1
                self._progress(self._done, self._total)
            self._done += len(group) - len(silent)
            self._progress(self._done, self._total)


class _Flight:
    """The addresses that are waited for: the groups asked last, as many as the kernel can choose by."""

    def __init__(self, opened: Wire, waiting: ExitStack) -> None:
        self._wire = opened
        self._groups: deque[ExitStack] = deque()
        waiting.callback(self._end)

    def add(self, addresses: Collection[Address], hear: Callable[[Claim], object]) -> None:
        if len(self._groups) >= CHOSEN // GROUP:
            self._groups.popleft().close()
        group = ExitStack()
        group.enter_context(self._wire.answers(addresses, hear))
        self._groups.append(group)

    def _end(self) -> None:
        while self._groups:
            self._groups.popleft().close()
