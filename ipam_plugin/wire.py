"""The LAN as one interface sees it: who talks there, who answers for an address, whether it is alive at all.

The only opener of raw sockets. It needs the capability CAP_NET_RAW, for as long as it runs (an interface
that comes back gets new sockets), and no other. What frames mean is decided in packets.py; what follows
from it, elsewhere. Everything speaks of the network namespace of the thread that called `Wire.start`.

Two sockets per interface, because they fail in different ways. The listening one gets all ARP and
neighbour discovery, is read at a bounded rate, and may lose frames. The asking one sends the questions and
gets only frames about addresses that are asked for at the moment, chosen by a filter in the kernel: a
flood of other frames neither delays nor drops an answer.

Deadlines are absolute, of time.monotonic().
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import random
import select
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from ipam_plugin import interfaces, packets
from ipam_plugin.addresses import Address, Network
from ipam_plugin.errors import ProbeFailed
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.packets import Claim, How

log = logging.getLogger(__name__)

REMEMBERED = 4096  # addresses whose machines were heard last
MACS_OF_AN_ADDRESS = 4  # that are remembered; more than one is a conflict already
TOLD_AGAIN = 1.0  # seconds until the same machine is told again for the same address
LISTENING_RATE = 2000  # frames per second that are looked at; a burst of as many is, too
LISTENING_REST = 0.02  # seconds between two looks, so that a busy LAN wakes the thread 50 times a second
HEARD_LATELY = 30.0  # seconds for which a machine that was heard shows that the wire lives (design section 7)
ASKED_AT_ONCE = 16  # peers that are asked whether the wire lives
ASKED_AGAIN = 0.25  # seconds
ECHO_AGAIN = 0.5  # seconds between two echo requests to all nodes
REOPEN_FIRST, REOPEN_LAST = 0.05, 1.0  # seconds between tries to open an interface again, doubling


@dataclass(frozen=True)
class Sighting:
    """A machine said at `when` (time.monotonic()) that it uses an address, or is about to (`how.probing`)."""

    address: Address
    mac: str
    how: How
    when: float


@dataclass(frozen=True)
class Silent:
    """Nobody answered all the probes. It says nothing on a wire that is dead: see `Wire.alive`.

    `ignored` is the MAC of a machine that did answer and was not to be believed, '' if there was none.
    """

    ignored: str = ""


@dataclass(frozen=True)
class InUse:
    """This MAC answered, or claimed the address meanwhile, or wants it at this moment too (`how.probing`).

    It may be a registered host's or this interface's own: the caller knows what that means. `answering`: it answered
    the question, which a frame for everybody does not.
    """

    mac: str
    how: How
    answering: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Failed:
    """The probe proves nothing, for this reason (a clause for people)."""

    reason: str


Outcome = Silent | InUse | Failed


@dataclass(frozen=True)
class Times:
    """How often and how patiently an address is probed. All in seconds."""

    probes: int
    spacing: tuple[float, float]  # the least and the most between two probes
    wait: float  # after the last

    @property
    def longest(self) -> float:
        return (self.probes - 1) * self.spacing[1] + self.wait


FAST = Times(probes=2, spacing=(0.1, 0.1), wait=0.15)
FULL = Times(probes=3, spacing=(1.0, 2.0), wait=2.0)  # RFC 5227 section 1.1, without PROBE_WAIT


@dataclass(frozen=True)
class Counters:
    """Since `Wire.start`: frames looked at, frames lost to a flood, times the sockets were opened."""

    heard: int
    lost: int
    opened: int


def require_capability(interface: str = "") -> None:
    """Raises ProbeFailed when this process may not open raw sockets. No interface needs to be there yet."""
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0).close()
    except PermissionError:
        raise ProbeFailed(
            f"cannot look at the wire{f' on {interface}' if interface else ''}: raw sockets need the capability "
            "CAP_NET_RAW, which this process does not have (root has it; systemd: AmbientCapabilities=CAP_NET_RAW)"
        ) from None


def hears_as(mac: str, interface: str, peers: Sequence[IPv4Address], *, deadline: float) -> str:
    """'' when a peer's answer comes back to another MAC than the interface's own, as a container's frames have to;
    else why not, as a clause.

    Asked is by ARP probes (RFC 5227: sender 0.0.0.0), which change no machine's cache; a switch learns the MAC for some
    minutes. The peers must be known to use their addresses: one that is only just probing its own would give it up.
    Raises ProbeFailed without the capability.
    """
    require_capability(interface)
    asked = {peer: packets.arp_probe(peer, mac) for peer in peers[:ASKED_AT_ONCE]}
    try:
        with _packet_socket(interface, bpf_filter(tuple(asked))) as asking:
            # What is for another MAC does not pass a network card, nor a bridge itself, unless asked for; it ends with
            # the socket.
            membership = struct.pack("=iHH8s", _index(interface), _PACKET_MR_PROMISC, 0, b"")
            asking.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
            ready = select.poll()
            ready.register(asking, select.POLLIN)
            while (left := deadline - time.monotonic()) > 0:
                for frame in asked.values():
                    with contextlib.suppress(BlockingIOError):
                        asking.send(frame)
                again = time.monotonic() + min(ASKED_AGAIN, left)
                while (wait := again - time.monotonic()) > 0 and ready.poll(wait * 1000):
                    for packet in map(packets.decode, _received(asking, 64)):
                        if isinstance(packet, packets.Arp) and packet.destination == mac and packet.sender in asked:
                            return ""
    except OSError as error:
        return f"{interface}: {error.strerror or error}"
    names = ", ".join(map(str, list(asked)[:3])) + (", …" if len(asked) > 3 else "")
    return f"no answer of {names} came to it"


class Wire:
    """Listens to one interface from `start` to `close`, and asks there. Safe to use from many threads.

    `on_heard` is called in the listener's thread with what was heard, at most once a second for the same
    machine and address (and once more when a machine that probed has taken the address). `own_macs` gives
    the MACs of registered hosts: when one of those probes an address at the same time as this host, it is
    no conflict, because the register decides between hosts.
    """

    def __init__(
        self,
        interface: str,
        on_heard: Callable[[Sighting], object] = lambda _sighting: None,
        *,
        own_macs: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.interface = interface
        self._on_heard = on_heard
        self._own_macs = own_macs
        self._stop = threading.Event()
        self._wake = -1
        self._thread: threading.Thread | None = None
        # Guards what follows, and every use of a socket, which may be closed by another thread. Held for
        # microseconds: the sockets do not block.
        self._lock = threading.Lock()
        self._sockets: _Sockets | None = None
        self._trouble = "nobody listens there"
        self._questions: dict[Address, list[_Question]] = {}
        self._lost_answers = 0
        self._heard, self._lost, self._opened = 0, 0, 0
        # Whoever holds it has read the asking socket and given what it read to the questions.
        self._answering = threading.Lock()
        self._memory = threading.Lock()
        self._table: OrderedDict[Address, dict[str, _Memory]] = OrderedDict()

    # --- life

    def start(self) -> None:
        """Begins to listen. Raises ProbeFailed without the capability.

        An interface that is down or not there yet is no error: it is opened as soon as it can be, the log
        says so, and until then every probe fails with that reason.
        """
        require_capability(self.interface)
        try:
            self._open()
        except OSError as error:
            self._close_sockets(self._why(error))
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name=f"wire-{self.interface}", daemon=True)
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the thread and closes the sockets; probes that run fail. Not to be called from `on_heard`."""
        self._stop.set()
        if self._thread is not None and self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._thread = None
        with self._lock:
            questions = {id(one): one for asked in self._questions.values() for one in asked}
        for question in questions.values():
            question.ended.set()
        self._close_sockets("nobody listens there any more", say=False)
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def __enter__(self) -> Wire:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # --- questions

    def heard(self, address: Address) -> list[Sighting]:
        """The machines last heard to use (or to probe) an address, the last one last. From memory, which forgets."""
        with self._memory:
            found = self._table.get(address, {})
            return sorted((one.sighting for one in found.values()), key=lambda sighting: sighting.when)

    def counters(self) -> Counters:
        with self._lock:
            self._count_lost()
            return Counters(self._heard, self._lost, self._opened)

    @property
    def mac(self) -> str:
        """The interface's MAC as it is now (a bridge may change its own); '' while it cannot be used."""
        with self._lock:
            return self._sockets.mac() if self._sockets else ""

    @property
    def exists(self) -> bool:
        return (_NET / self.interface).exists()

    @property
    def trouble(self) -> str:
        """Why no frame can come from this interface or go, as far as this host knows, as a clause; else ''."""
        with self._lock:
            closed = self._trouble
        return closed or _forwards(self.interface)

    def probe(
        self,
        address: Address,
        times: Times,
        *,
        deadline: float,
        ignored: Collection[str] = (),
        doubted: str = "",
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> Outcome:
        """Whether a machine of the LAN uses the address: ARP probes (RFC 5227) or DAD (RFC 4862).

        Ends early with the first answer of a machine whose MAC is not in `ignored`. With a `doubted` MAC, which has
        claimed the address once, only the second claim of a MAC counts as its answer: a machine that uses the address
        answers each probe, and frames that nobody stands behind do not come twice. No cache of the LAN is changed by
        it. `uniform` draws the time between two probes.
        """
        own = {self.mac, *self._own_macs()}
        passed_over: list[str] = []
        once = {doubted} if doubted else set()

        def counts(claim: Claim) -> bool:
            if claim.mac in ignored:
                if not passed_over:
                    passed_over.append(claim.mac)
                return False
            if claim.how.probing and claim.mac in own:
                return False
            if doubted and claim.mac not in once:
                if len(once) < REMEMBERED:
                    once.add(claim.mac)
                return False
            return True

        with self._asked([address], counts) as question:
            before = self._evidence()
            if isinstance(before, Failed):
                return before
            for left in reversed(range(times.probes)):
                sent = self._send(self._probe_frame(address), deadline)
                if sent:
                    return Failed(sent)
                until = time.monotonic() + (uniform(*times.spacing) if left else times.wait)
                question.ended.wait(max(0.0, min(until, deadline) - time.monotonic()))
                if question.ended.is_set() or until > deadline:
                    break
            # The listener may be behind, or be stopped this very moment: an answer counts that came in time.
            unread = self._take_answers()
            if question.answer is not None:
                return InUse(question.answer.mac, question.answer.how, question.answer.answering)
            if until > deadline:
                return Failed(f"no time was left for {times.longest:g} s of probing on {self.interface}")
            after = self._evidence()
            if unread or isinstance(after, Failed):
                return after if isinstance(after, Failed) else Failed(unread)
            if before != after:
                return Failed(f"{self.interface} was disturbed meanwhile ({after.differs(before)})")
            return Silent(passed_over[0] if passed_over else "")

    def alive(self, peers: Sequence[Address], *, deadline: float) -> str:
        """'' when silence on this interface means something; otherwise why not, as a clause.

        The interface has carrier and forwards; and one of `peers` (the router, other hosts), where there
        are any, was heard in the last 30 s, or answers now. They are asked by ordinary requests in this
        interface's own name, or, where it has no address beside theirs, in nobody's.
        """
        with self._lock:
            if self._sockets is None:
                return self._trouble
        dead = _forwards(self.interface)
        if dead or not peers:
            return dead
        mac = self.mac
        since = time.monotonic() - HEARD_LATELY
        for peer in peers:
            if any(one.when > since and one.mac != mac for one in self.heard(peer)):
                return ""
        asked = peers[:ASKED_AT_ONCE]
        try:
            own = [one for one in interfaces.addresses() if one.interface == self.interface and not one.tentative]
        except OSError:
            own = []
        with self._asked(asked, lambda claim: claim.mac != mac) as question:
            while not question.ended.is_set() and (left := deadline - time.monotonic()) > 0:
                for peer in asked:
                    failed = self._send(_request_frame(peer, own, mac), deadline)
                    if failed:
                        return failed
                question.ended.wait(min(ASKED_AGAIN, left))
            self._take_answers()
            if question.answer is not None:
                return ""
        names = ", ".join(str(peer) for peer in asked[:3]) + (", …" if len(asked) > 3 else "")
        return (
            f"none of the machines that should be on {self.interface} was heard in the last "
            f"{HEARD_LATELY:g} s or answered now ({names})"
        )

    def ask(self, address: Address, source: Address | None = None) -> str:
        """Asks for an address once, in this interface's own name as any machine does before it talks to another.

        Who answers is heard (`on_heard`, `answers`). `source` is this interface's own address to ask with (or
        0.0.0.0); None: it is looked for, which costs milliseconds. Returns '', or why it could not be sent.
        """
        mac = self.mac or packets.NO_MAC  # without sockets it cannot be sent anyway
        if isinstance(address, IPv4Address) and isinstance(source, IPv4Address):
            frame = packets.arp_request(address, source, mac)
        elif isinstance(address, IPv6Address) and isinstance(source, IPv6Address):
            frame = packets.nd_solicitation(address, source, mac)
        else:
            try:
                own = [one for one in interfaces.addresses() if one.interface == self.interface and not one.tentative]
            except OSError:
                own = []
            frame = _request_frame(address, own, mac)
        return self._send(frame, time.monotonic() + 1)

    @contextlib.contextmanager
    def answers(self, asked: Collection[Address], hear: Callable[[Claim], object]) -> Iterator[None]:
        """While it lasts, `hear` is told what machines say about these addresses, in any thread, also in a flood.

        The latter as long as no more than CHOSEN are asked for at a time, by everybody together.
        """

        def never_enough(claim: Claim) -> bool:
            hear(claim)
            return False

        with self._asked(asked, never_enough, join=False):
            try:
                yield
            finally:
                self._take_answers()

    def watched(self) -> Callable[[], str]:
        """From now on: says when called what has disturbed the wire meanwhile, as a clause; '' for nothing.

        Whoever was asked and is silent may have answered all the same when the wire was disturbed.
        """
        before = self._evidence()

        def disturbed() -> str:
            after = self._evidence()
            if isinstance(before, Failed):
                return before.reason
            if isinstance(after, Failed):
                return after.reason
            return "" if before == after else f"{self.interface} was disturbed meanwhile ({after.differs(before)})"

        return disturbed

    def ask_all_nodes(self, source: IPv6Address, hear: Callable[[IPv6Address], object], *, deadline: float) -> str:
        """Asks all IPv6 machines to show themselves: an echo request to ff02::1 (RFC 4443 section 4.1).

        Whoever answers does so from that address of its own that fits `source`, this interface's own address, best;
        until the deadline `hear` is told. Many keep quiet (Windows; Linux with icmp.echo_ignore_multicast). Returns
        '', or why it could not be asked.
        """
        identity = os.urandom(2)
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6) as echo:
                # struct icmp6_filter (RFC 3542 section 3.2): a bit for each type, which is kept out by a one.
                refused = [0xFFFFFFFF] * 8
                refused[_ECHO_REPLY // 32] ^= 1 << _ECHO_REPLY % 32
                echo.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *refused))
                echo.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.interface.encode())
                echo.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
                echo.bind((str(source), 0))
                to = (str(packets.ALL_NODES), 0, 0, _index(self.interface))
                asked = 0.0
                while (now := time.monotonic()) < deadline:
                    if now - asked >= ECHO_AGAIN:
                        # The kernel fills in the checksum.
                        echo.sendto(struct.pack("!BBH2sH", _ECHO_REQUEST, 0, 0, identity, 0), to)
                        asked = now
                    echo.settimeout(max(0.001, min(asked + ECHO_AGAIN, deadline) - now))
                    with contextlib.suppress(TimeoutError):
                        reply, sender = echo.recvfrom(_LONGEST)
                        if reply[:1] == bytes((_ECHO_REPLY,)) and reply[4:6] == identity:
                            hear(IPv6Address(sender[0].partition("%")[0]))
        except OSError as error:
            return self._why(error)
        return ""

    def announce(self, address: Address, mac: str) -> str:
        """Tells the LAN once that `mac` uses the address now. Returns '', or why it could not be sent."""
        if isinstance(address, IPv4Address):
            frame = packets.arp_announcement(address, mac)
        else:
            frame = packets.nd_advertisement(address, mac)
        return self._send(frame, time.monotonic() + 1)

    # --- asking

    @contextlib.contextmanager
    def _asked(
        self, asked: Iterable[Address], counts: Callable[[Claim], bool], *, join: bool = True
    ) -> Iterator[_Question]:
        """While it lasts, frames about these addresses reach the question; `join`: also other machines' probes."""
        question = _Question(counts)
        targets = set(asked)
        with contextlib.ExitStack() as stack:
            for address in targets:
                if join and isinstance(address, IPv6Address):
                    stack.enter_context(self._joined(packets.solicited_node(address)))
            # What still waits there answers an earlier question about the same address, from before its claim perhaps.
            self._take_answers()
            with self._lock:
                for address in targets:
                    self._questions.setdefault(address, []).append(question)
                self._choose_answers()
            try:
                yield question
            finally:
                with self._lock:
                    for address in targets:
                        self._questions[address].remove(question)
                        if not self._questions[address]:
                            del self._questions[address]
                    self._choose_answers()

    @contextlib.contextmanager
    def _joined(self, group: IPv6Address) -> Iterator[None]:
        """Membership of an address's group, which RFC 4862 (5.4.2) wants before the address is probed.

        A switch that watches memberships (MLD snooping) would keep another machine's probe from us
        otherwise. Where IPv6 is turned off on this host's interface there is none, and answers, which go
        to all nodes, still come.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                member = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
                index = struct.pack("@I", _index(self.interface))
                member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group.packed + index)
            yield

    def _probe_frame(self, address: Address) -> bytes:
        mac = self.mac or packets.NO_MAC  # without sockets it cannot be sent anyway
        return packets.arp_probe(address, mac) if isinstance(address, IPv4Address) else packets.nd_probe(address, mac)

    def _send(self, frame: bytes, deadline: float) -> str:
        """Sends a frame, waiting for room in the queue. Returns '', or why it could not be sent."""
        while True:
            with self._lock:
                if self._sockets is None:
                    return self._trouble
                try:
                    self._sockets.asking.send(frame)
                    return ""
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                        return self._why(error)
            if time.monotonic() >= deadline or self._stop.wait(0.01):
                return f"the queue of {self.interface} stays full"

    def _take_answers(self) -> str:
        """Gives everything the asking socket has received by now to the questions. Returns '', or what failed."""
        with self._answering:
            # A bound, because frames may come as fast as they are read: all that waited at the beginning is among them.
            for _batch in range(_BUFFER // 256 // 64):
                with self._lock:
                    if self._sockets is None:
                        return self._trouble
                    try:
                        frames = _received(self._sockets.asking, 64)
                    except OSError as error:
                        return self._why(error)
                for frame in frames:
                    claim = _claim(frame)
                    if claim is not None:
                        with self._lock:
                            questions = tuple(self._questions.get(claim.address, ()))
                        for question in questions:
                            question.hear(claim)
                if len(frames) < 64:
                    break
        return ""

    def _choose_answers(self) -> None:
        if self._sockets is not None:
            with contextlib.suppress(OSError):  # the interface went away; the next send says so
                _attach(self._sockets.asking, bpf_filter(self._questions))

    def _evidence(self) -> _Evidence | Failed:
        with self._lock:
            if self._sockets is None:
                return Failed(self._trouble)
            self._count_lost()
            opened, lost = self._opened, self._lost_answers
        dead = _forwards(self.interface)
        if dead:
            return Failed(dead)
        changes = {name: _fact(name, "carrier_changes") for name in (self.interface, *_uplinks(self.interface))}
        return _Evidence(opened, lost, tuple(sorted(changes.items())))

    def _count_lost(self) -> None:
        if self._sockets is not None:
            self._lost += _lost(self._sockets.listening)
            self._lost_answers += _lost(self._sockets.asking)

    # --- listening

    def _run(self) -> None:
        pause = REOPEN_FIRST
        while not self._stop.is_set():
            try:
                if self._sockets is None:
                    self._open()
                    log.info("%s: listening again", self.interface)
                pause = REOPEN_FIRST
                self._listen()
            except OSError as error:
                self._close_sockets(self._why(error))
            except Exception:
                log.exception("%s: listening failed; it begins again", self.interface)
                self._close_sockets(f"listening on {self.interface} failed")
            self._stop.wait(pause)
            pause = min(pause * 2, REOPEN_LAST)

    def _open(self) -> None:
        _index(self.interface)  # before a socket, which costs the kernel milliseconds to close again
        with self._lock:
            if self._stop.is_set():
                return
            self._sockets = _Sockets(self.interface, bpf_filter(self._questions))
            self._trouble = ""
            self._opened += 1

    def _close_sockets(self, trouble: str, *, say: bool = True) -> None:
        with self._lock:
            if self._sockets is not None:
                with contextlib.suppress(OSError):
                    self._count_lost()
                self._sockets.close()
                self._sockets = None
            changed, self._trouble = trouble != self._trouble, trouble
        if changed and say:
            log.warning("%s: not listening: %s", self.interface, trouble)

    def _why(self, error: OSError) -> str:
        if error.errno == errno.ENETDOWN:
            return f"{self.interface} is down"
        if error.errno in (errno.ENODEV, errno.ENXIO):
            return f"there is no interface {self.interface}"
        if error.errno in (errno.EPERM, errno.EACCES):
            return f"the capability CAP_NET_RAW was lost, and {self.interface} cannot be opened without it"
        return f"{self.interface}: {error.strerror or error}"

    def _listen(self) -> None:
        """Until `close`; raises OSError when the interface went down or away."""
        sockets = self._sockets
        if sockets is None:
            return
        everything, answers = select.poll(), select.poll()
        for descriptor in (self._wake, sockets.asking.fileno()):
            everything.register(descriptor, select.POLLIN)
            answers.register(descriptor, select.POLLIN)
        everything.register(sockets.listening.fileno(), select.POLLIN)
        allowed, at = float(LISTENING_RATE), time.monotonic()
        while not self._stop.is_set():
            everything.poll()
            # What is wrong with the interface, both sockets say, each once. Here it is the listening one's word
            # that counts: the other's may have gone to somebody who probed.
            self._take_answers()
            now = time.monotonic()
            allowed = min(LISTENING_RATE, allowed + (now - at) * LISTENING_RATE)
            at = now
            frames = _received(sockets.listening, int(allowed))
            allowed -= len(frames)
            for frame in frames:
                claim = _claim(frame)
                if claim is not None:
                    self._remember(Sighting(claim.address, claim.mac, claim.how, now))
            with self._lock:
                self._heard += len(frames)
            rested = now + LISTENING_REST
            while (left := rested - time.monotonic()) > 0 and not self._stop.is_set():
                if answers.poll(left * 1000):
                    self._take_answers()

    def _remember(self, sighting: Sighting) -> None:
        with self._memory:
            machines = self._table.setdefault(sighting.address, {})
            self._table.move_to_end(sighting.address)
            before = machines.pop(sighting.mac, None)
            tell = (
                before is None
                or sighting.when - before.told >= TOLD_AGAIN
                or (before.probing and not sighting.how.probing)
            )
            if before is None or tell:
                machines[sighting.mac] = _Memory(sighting, sighting.when, sighting.how.probing)
            else:
                machines[sighting.mac] = _Memory(sighting, before.told, before.probing)
            if len(machines) > MACS_OF_AN_ADDRESS:
                del machines[next(iter(machines))]
            if len(self._table) > REMEMBERED:
                self._table.popitem(last=False)
        if tell:
            try:
                self._on_heard(sighting)
            except Exception:
                log.exception("%s: what was heard about %s was lost", self.interface, sighting.address)


@dataclass
class _Memory:
    sighting: Sighting
    told: float
    probing: bool  # what was told


@dataclass(frozen=True)
class _Evidence:
    """What must not change during a probe, or its silence proves nothing."""

    opened: int
    lost: int
    carrier_changes: tuple[tuple[str, str], ...]

    def differs(self, before: _Evidence) -> str:
        if self.opened != before.opened:
            return "it went down and came back"
        if self.lost != before.lost:
            return f"{self.lost - before.lost} frames that may be answers were lost"
        return "its cable, or that of its port, was out"


class _Question:
    """Something that is asked on the wire: the first claim that `counts` is its answer."""

    def __init__(self, counts: Callable[[Claim], bool]) -> None:
        self._counts = counts
        self.answer: Claim | None = None
        self.ended = threading.Event()

    def hear(self, claim: Claim) -> None:
        if self.answer is None and self._counts(claim):
            self.answer = claim
            self.ended.set()


def _claim(frame: bytes) -> Claim | None:
    packet = packets.decode(frame)
    # The kernel's filter lets no other VLAN through where it knows the tag; this is for where it does not.
    return packets.claims(packet) if packet is not None and packet.vlan == 0 else None


def _request_frame(peer: Address, own: Iterable[InterfaceAddress], mac: str) -> bytes:
    """Who has `peer`? In the name of this interface's own address beside it, or in nobody's."""
    beside = next((one.address for one in own if peer in one.network and one.address != peer), None)
    if isinstance(peer, IPv4Address):
        return packets.arp_request(peer, beside if isinstance(beside, IPv4Address) else packets.NO_ADDRESS, mac)
    return (
        packets.nd_solicitation(peer, beside, mac) if isinstance(beside, IPv6Address) else packets.nd_probe(peer, mac)
    )


# --- sockets -------------------------------------------------------------------------------------------

# linux/if_ether.h, linux/if_packet.h, linux/if_arp.h, asm-generic/socket.h: what Python's socket does not name.
_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 1, 6, 23
_PACKET_MR_PROMISC, _PACKET_MR_ALLMULTI = 1, 2
_SO_ATTACH_FILTER = 26
_ARPHRD_ETHER = 1
_ICMP6_FILTER, _ECHO_REQUEST, _ECHO_REPLY = 1, 128, 129  # linux/icmpv6.h
_LONGEST = 2048  # bytes of a frame that are read; neighbour discovery with signatures (RFC 3971) is the longest
_BUFFER = 512 * 1024


class _Sockets:
    """The two sockets of an interface. Raises OSError (ENETDOWN for one that is down)."""

    def __init__(self, interface: str, answers: bytes) -> None:
        with contextlib.ExitStack() as stack:
            self.listening = stack.enter_context(_packet_socket(interface, bpf_filter(None)))
            self.asking = stack.enter_context(_packet_socket(interface, answers))
            # A newcomer announces itself to the group of its own address, which a network card drops unless told.
            membership = struct.pack("=iHH8s", _index(interface), _PACKET_MR_ALLMULTI, 0, b"")
            self.listening.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
            stack.pop_all()

    def mac(self) -> str:
        try:
            return bytes(self.asking.getsockname()[4]).hex(":")
        except OSError:
            return ""

    def close(self) -> None:
        self.listening.close()
        self.asking.close()


def _packet_socket(interface: str, program: bytes) -> socket.socket:
    # Protocol 0 receives nothing; `bind` sets the protocol when the filter is in place.
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        opened.setblocking(False)
        _attach(opened, program)
        # Without it, the kernel copies every frame that this host sends, for the filter to refuse.
        with contextlib.suppress(OSError):
            opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        # All protocols, because the handler of one never sees a frame that a bridge takes from its port;
        # such a tap comes first.
        opened.bind((interface, _ETH_P_ALL))
        _name, _protocol, _kind, hardware, _mac = opened.getsockname()
        if hardware != _ARPHRD_ETHER:
            raise OSError(errno.EPROTONOSUPPORT, "no Ethernet interface")
        if error := opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
    except BaseException:
        opened.close()
        raise
    return opened


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:  # without an errno before Python 3.14
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None


def _received(source: socket.socket, most: int) -> list[bytes]:
    """Frames that wait, at most so many. Raises OSError when the interface went down."""
    frames: list[bytes] = []
    while len(frames) < most:
        try:
            frames.append(source.recv(_LONGEST))
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
    return frames


def _lost(source: socket.socket) -> int:
    """Frames that the socket had no room for, since this was last asked."""
    packed = source.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
    return int(struct.unpack("=II", packed)[1])


def _attach(to: socket.socket, program: bytes) -> None:
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog; the kernel copies the program.
    to.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))


# Classic BPF (linux/filter.h).
_LOAD_WORD, _LOAD_HALF = 0x20, 0x28
_LOAD_WORD_X, _LOAD_BYTE_X = 0x40, 0x50
_SET_X, _AND, _JUMP, _JUMP_EQUAL, _RETURN = 0x01, 0x54, 0x05, 0x15, 0x06
_PACKET_TYPE, _VLAN_TAG, _VLAN_TAG_PRESENT = (0xFFFFF000 + offset for offset in (4, 44, 48))
_PACKET_OUTGOING = 4
_ACCEPT, _REFUSE = (_RETURN, 0, 0, _LONGEST), (_RETURN, 0, 0, 0)

_Instruction = tuple[int, int, int, int]
CHOSEN = 128  # addresses that the kernel chooses by; with more, all ARP and ND passes


def bpf_filter(chosen: Collection[Address] | None) -> bytes:
    """A program for SO_ATTACH_FILTER that passes ARP and neighbour discovery about `chosen`; None: about all.

    Refused: what this host sends itself, and every VLAN: a tagged frame belongs to another segment than
    the interface's own frames, and a VLAN's interface gets its frames without the tag. The kernel takes
    the tag off before a filter runs and keeps it beside the frame; one that is still inside is looked at
    as well. Of IPv6 addresses the last 32 bits are compared: some frames too many, never one too few.
    """
    if chosen is not None and not chosen:
        return struct.pack("=HBBI", *_REFUSE)  # the cheapest, for every frame of the host while nothing is asked
    if chosen is None or len(chosen) > CHOSEN:
        arp, about_source, about_target = [_ACCEPT], [_ACCEPT], [_ACCEPT]
    else:
        v4 = _accept_one_of(int(one) for one in chosen if one.version == 4)
        v6 = _accept_one_of(int(one) & 0xFFFFFFFF for one in chosen if one.version == 6)
        # Whom a packet asks for says something only if it comes from nobody: a probe. Everybody asks for the router.
        arp = [(_LOAD_WORD_X, 0, 0, 28), *v4, *_unless(0), (_LOAD_WORD_X, 0, 0, 38), *v4, _REFUSE]
        about_source = [(_LOAD_WORD_X, 0, 0, 34), *v6, *_unless(0)]
        about_target = [(_LOAD_WORD_X, 0, 0, 74), *v6, _REFUSE]
    about_source = [*_unless(packets.NEIGHBOUR_SOLICITATION), *about_source]
    nd = [
        (_LOAD_BYTE_X, 0, 0, 20),
        *_unless(packets.NEXT_HEADER_ICMPV6),
        (_LOAD_BYTE_X, 0, 0, 54),
        (_JUMP_EQUAL, 0, 1, packets.NEIGHBOUR_ADVERTISEMENT),
        (_JUMP, 0, 0, len(about_source)),
        *about_source,
        *about_target,
    ]
    program: list[_Instruction] = [
        (_LOAD_WORD, 0, 0, _PACKET_TYPE),
        (_JUMP_EQUAL, 0, 1, _PACKET_OUTGOING),
        _REFUSE,
        (_LOAD_WORD, 0, 0, _VLAN_TAG_PRESENT),
        (_JUMP_EQUAL, 4, 0, 0),
        (_LOAD_WORD, 0, 0, _VLAN_TAG),
        (_AND, 0, 0, 0xFFF),
        *_unless(0),
        # X is where the frame goes on behind its tags, less the 14 bytes of a header without any.
        (_SET_X, 0, 0, 0),
        (_LOAD_HALF, 0, 0, 12),
        (_JUMP_EQUAL, 0, 6, packets.ETHERTYPE_VLAN),
        (_LOAD_HALF, 0, 0, 14),
        (_AND, 0, 0, 0xFFF),
        *_unless(0),
        (_SET_X, 0, 0, 4),
        (_LOAD_HALF, 0, 0, 16),
        (_JUMP_EQUAL, 1, 0, packets.ETHERTYPE_ARP),
        (_JUMP, 0, 0, len(arp)),
        *arp,
        *_unless(packets.ETHERTYPE_IPV6),
        *nd,
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _unless(value: int) -> list[_Instruction]:
    return [(_JUMP_EQUAL, 1, 0, value), _REFUSE]


def _accept_one_of(words: Iterable[int]) -> list[_Instruction]:
    return [instruction for word in words for instruction in ((_JUMP_EQUAL, 0, 1, word), _ACCEPT)]


# --- interfaces ----------------------------------------------------------------------------------------

_NET = Path("/sys/class/net")
_STP_STATES = ("disabled", "listening", "learning", "forwarding", "blocking")  # linux/if_bridge.h
_FORWARDING = "3"


def _fact(interface: str, name: str) -> str:
    """A file about an interface in /sys; '' where there is none (or the interface is down)."""
    try:
        return (_NET / interface / name).read_text().strip()
    except OSError:
        return ""


def _ports(bridge: str) -> list[str]:
    try:
        return sorted(os.listdir(_NET / bridge / "brif"))
    except OSError:
        return []


def _lower(interface: str) -> list[str]:
    """The interfaces that this one is made on: a VLAN's, a bond's, a macvlan's, a bridge's ports."""
    try:
        return sorted(name[6:] for name in os.listdir(_NET / interface) if name.startswith("lower_"))
    except OSError:
        return []


def _uplinks(bridge: str) -> list[str]:
    """Those ports of a bridge that lead to the LAN for sure: hardware, or made on something (a VLAN, a bond)."""
    return [port for port in _ports(bridge) if (_NET / port / "device").exists() or _lower(port)]


def _forwards(interface: str) -> str:
    """'' when frames can pass between the interface and a cable, as far as this host knows; else why not."""
    if not (_NET / interface).exists():
        return f"there is no interface {interface}"
    carrier = _fact(interface, "carrier")
    if carrier == "":
        return f"{interface} is down"
    state = _fact(interface, "brport/state")
    if carrier == "1" and state and state != _FORWARDING:
        return f"{interface} does not forward: it is {_state(state)} as a port of its bridge (spanning tree)"
    # A bridge has a carrier while any of its ports forwards. Containers' ports do, whatever becomes of the
    # cable, so they count only where there is no other.
    ports = _uplinks(interface) or _ports(interface)
    if ports and not any(_fact(port, "brport/state") == _FORWARDING for port in ports):
        port = next((port for port in ports if _fact(port, "carrier") == "1"), None)
        if port is None:
            return f"{interface} does not forward: {', '.join(ports[:3])} has no carrier (is the cable plugged in?)"
        return f"{interface} does not forward: its port {port} is {_state(_fact(port, 'brport/state'))} (spanning tree)"
    if carrier != "1":
        return f"{interface} has no carrier (is its cable plugged in?)"
    lower = [] if ports else _lower(interface)
    return _forwards(lower[0]) if len(lower) == 1 else ""


def _state(number: str) -> str:
    return _STP_STATES[int(number)] if number.isdigit() and int(number) < len(_STP_STATES) else "gone"


@dataclass(frozen=True)
class NoInterface:
    """No interface of this host carries a subnet; the reason is a sentence for people."""

    reason: str


def find_interface(
    subnet: Network, addresses: Sequence[InterfaceAddress], links: Sequence[Link], named: str = ""
) -> str | NoInterface:
    """The interface on whose LAN a subnet lives.

    The `named` one; else the one with an address in the subnet (a bridge before others, because Docker's
    network sits on it; then the kernel's order); else the one whose own network is the smallest that
    contains the whole subnet. Loopback carries no LAN.
    """
    by_name = {link.name: link for link in links}
    if named:
        if named in by_name:
            return named
        have = ", ".join(link.name for link in links if not link.loopback) or "none"
        return NoInterface(f"there is no interface {named} on this host (there are: {have})")
    on_lan = [one for one in addresses if one.interface in by_name and not by_name[one.interface].loopback]
    inside = [one for one in on_lan if one.address in subnet]
    if inside:
        return min(inside, key=lambda one: not one.bridge).interface
    around = [one for one in on_lan if _contains(one.network, subnet)]
    if around:
        return max(around, key=lambda one: (one.prefixlen, one.bridge)).interface
    return NoInterface(
        f"no interface of this host has an address in {subnet}: give one an address there, or name it "
        "(segments: {…: {interface: NAME}} in the configuration, or --ipam-opt interface=NAME)"
    )


def _contains(network: Network, subnet: Network) -> bool:
    if network.version == 4:
        return subnet.version == 4 and subnet.subnet_of(network)
    return subnet.version == 6 and subnet.subnet_of(network)
