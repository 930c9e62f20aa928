"""What the wire says about an address, in the words of the register: free, a stranger's, one of ours, or not known.

wire.py says what was heard on an interface. Here it is judged: which interface carries a pool, when silence counts,
whose MACs are no stranger's, and when one machine answers for everything (proxy ARP).
"""

from __future__ import annotations

import enum
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from ipam_plugin.addresses import Address, Network
from ipam_plugin.errors import ProbeFailed
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.model import Pool
from ipam_plugin.view import View
from ipam_plugin.wire import FAST, FULL, Failed, InUse, NoInterface, Sighting, Silent, Wire, find_interface

log = logging.getLogger(__name__)

LIVE_PATIENCE = 1.0  # seconds for hearing one of the machines that show that the wire lives
DEAD_FOR = 5.0  # seconds for which a wire on which none of them answered is not asked again
MARGIN = 0.2  # seconds of a deadline that are kept for what follows a look
# Further addresses that nobody should have: a machine that answers for these as well (three in a row at least, design
# section 7) answers for everything. They are drawn from the whole subnet, since a server may well have some in a row;
# more than needed, since a proxy answers at once and anybody else is told from it by the first silence.
CONTROLS, CONTROLS_NEEDED = 5, 2
CARRIER_FOR = 5.0  # seconds for which the interface of a subnet stays known, unless the interfaces change
SILENCE_COUNTS = 2.0  # seconds for which a silence shows that nobody on the wire answers for everything
KERNEL_PATIENCE = 5.0  # seconds; the kernel may hold its lock for so long while it takes down a large namespace


class Verdict(enum.Enum):
    FREE = "nobody answered, on a wire that lives"
    STRANGER = "a machine that is none of ours answered"
    OURS = "a registered host answered, or a machine whose lease has just ended"
    HEARD = "somebody may use it or is about to, and more is not known: nothing to write down"
    UNKNOWN = "the look proves nothing"


class Look(NamedTuple):
    verdict: Verdict
    mac: str = ""  # who answered
    reason: str = ""  # why nothing is known, as a clause


class Habits(NamedTuple):
    """How this host looks at a segment's wire, or at a pool's: what its configuration and --ipam-opt say."""

    probe: str = "full"  # full, fast or off
    refuse: bool = False  # when a look proves nothing: refuse, or else warn
    interface: str = ""  # '': the one that carries the subnet
    standby: int = 2
    probation: float = 86400.0  # seconds until a conflict is looked at again


class Interfaces(Protocol):
    """What is needed of interfaces.py."""

    def addresses(self, deadline: float | None = None) -> Sequence[InterfaceAddress]: ...
    def links(self, deadline: float | None = None) -> Sequence[Link]: ...


class _Carrier(NamedTuple):
    """The interface that carries a subnet, as it was at `since` (monotonic seconds), and its own address there."""

    since: float
    interface: str | NoInterface
    own: Address | None
    bridge: bool


class Neighbourhood:
    """The wires of this host. Every method may be called from any thread; deadlines are of time.monotonic().

    `habits(segment)` is what the configuration says. `on_heard` is called with a segment in the listeners' threads.
    `open_wire` takes what Wire takes.
    """

    def __init__(
        self,
        view: View,
        host: str,
        habits: Callable[[str], Habits],
        interfaces: Interfaces,
        *,
        alarm: Callable[[str, str], None],
        open_wire: Callable[..., Wire] = Wire,
    ) -> None:
        self._view = view
        self._host = host
        self._habits = habits
        self._interfaces = interfaces
        self._alarm = alarm
        self._open_wire = open_wire
        self._lock = threading.Lock()
        self._wires: dict[str, Wire] = {}
        self._closed_to_us: set[str] = set()  # interfaces that could not be listened to
        self._proxies: dict[str, set[str]] = {}  # interface -> the MACs that answer there for everything
        self._silent: dict[str, float] = {}  # interface -> when a probe there met silence, monotonic seconds
        self._dead: dict[str, tuple[float, str]] = {}  # interface -> until when it counts as dead, and why
        self._carriers: dict[tuple[Network, str], _Carrier] = {}  # by subnet and named interface
        self._listening: dict[str, list[Pool]] = {}  # interface -> whose LAN it is
        self._closed = False
        self.on_heard: Callable[[str, Sighting], None] = lambda segment, sighting: None
        self.on_opened: Callable[[], None] = lambda: None  # this host asks with one more MAC, see `macs`
        self.results: dict[str, int] = {verdict.name.lower(): 0 for verdict in Verdict}

    def habits(self, pool: Pool) -> Habits:
        """The segment's, with what the pool's own options say instead."""
        told = self._habits(pool.segment)
        return told._replace(probe=pool.probe or told.probe, interface=pool.interface or told.interface)

    def is_proxy(self, mac: str) -> bool:
        """Whether this machine answers for everything, so that what it says of an address means nothing."""
        with self._lock:
            return any(mac in macs for macs in self._proxies.values())

    def macs(self) -> set[str]:
        """The MACs with which this host asks."""
        with self._lock:
            wires = list(self._wires.values())
        return {wire.mac for wire in wires} - {""}

    def carried(self, deadline: float) -> set[Address]:
        """The addresses on this host's interfaces. Raises OSError."""
        return {each.address for each in self._interfaces.addresses(deadline)}

    def is_asked(self, pool: Pool) -> bool:
        """Whether the wire is asked for this pool's addresses at all."""
        return self.habits(pool).probe != "off"

    # ------------------------------------------------------------------------------------- looking

    def look(self, pool: Pool, address: Address, deadline: float, *, thorough: bool = False) -> Look:
        """Ask the wire for an address: quickly, as a request can wait, or thoroughly where the settings say so.

        Raises ProbeFailed when no time is left for it: that says nothing about the wire, so no policy turns it into
        a warning.
        """
        found = self.wire_of(pool, deadline)
        look = Look(Verdict.UNKNOWN, reason=found) if isinstance(found, str) else None
        if look is None:
            assert isinstance(found, Wire)
            look = self._ask(found, pool, address, deadline, thorough and self.habits(pool).probe == "full")
        with self._lock:
            self.results[look.verdict.name.lower()] += 1
        return look

    def _ask(self, wire: Wire, pool: Pool, address: Address, deadline: float, thorough: bool) -> Look:
        times = FULL if thorough else FAST
        late = _late(wire, pool, address)
        if time.monotonic() + times.longest + MARGIN > deadline:
            raise late
        with self._lock:
            proxies = frozenset(self._proxies.get(wire.interface, ()))
        outcome = wire.probe(address, times, deadline=deadline, ignored=proxies)
        if isinstance(outcome, Failed):
            if time.monotonic() + MARGIN > deadline:
                raise late
            return Look(Verdict.UNKNOWN, reason=outcome.reason)
        rumour = ""
        if isinstance(outcome, InUse):
            if time.monotonic() + times.longest + MARGIN > deadline:
                return Look(Verdict.HEARD, outcome.mac)
            # One frame to everybody may be anybody's, and who uses the address answers again. But one who answered, or
            # asks whether he may use it, is left alone also when he is not heard again (frames get lost).
            rumour = outcome.mac if outcome.how.probing or outcome.answering else ""
            outcome = wire.probe(address, times, deadline=deadline, ignored=proxies, doubted=outcome.mac)
        if isinstance(outcome, Failed):
            return Look(Verdict.HEARD, rumour) if rumour else Look(Verdict.UNKNOWN, reason=outcome.reason)
        if isinstance(outcome, InUse):
            everything = self._answers_for_everything(wire, pool, address, outcome.mac, deadline)
            if everything:
                # Behind it, others answer for themselves.
                return self._ask(wire, pool, address, deadline, thorough)
            if self._view.is_ours(outcome.mac):
                return Look(Verdict.OURS, outcome.mac)
            return Look(Verdict.HEARD if everything is None else Verdict.STRANGER, outcome.mac)
        if rumour:
            return Look(Verdict.HEARD, rumour)
        if outcome.ignored:
            return Look(Verdict.UNKNOWN, outcome.ignored, _proxy(outcome.ignored, wire.interface))
        with self._lock:
            self._silent[wire.interface] = time.monotonic()
            for mac in proxies:
                # It did not answer for this one, so it does not answer for everything any more.
                self._proxies[wire.interface].discard(mac)
        dead = self._is_dead(wire, pool, deadline)
        return Look(Verdict.UNKNOWN, reason=dead) if dead else Look(Verdict.FREE)

    def _answers_for_everything(
        self, wire: Wire, pool: Pool, address: Address, mac: str, deadline: float
    ) -> bool | None:
        """None where there is nothing to tell it by."""
        if self._silent.get(wire.interface, -math.inf) + SILENCE_COUNTS > time.monotonic():
            return False  # nobody answered for everything a moment ago
        controls = self._view.unused(pool, CONTROLS, but=address)
        if len(controls) < CONTROLS_NEEDED:
            return None
        for control in controls:
            if time.monotonic() + FAST.longest + MARGIN > deadline:
                raise _late(wire, pool, address)  # else a proxy would be written down as a conflict
            outcome = wire.probe(control, FAST, deadline=deadline)
            if isinstance(outcome, Silent):
                self._silent[wire.interface] = time.monotonic()
            if not isinstance(outcome, InUse) or outcome.mac != mac:
                return False
        with self._lock:
            self._proxies.setdefault(wire.interface, set()).add(mac)
        self._alarm(
            "proxy_arp",
            f"{_proxy(mac, wire.interface)}: a machine behind it cannot be told from a free address. Switch proxy ARP"
            f" off there; or keep the addresses of such machines with `ipam-plugin reserve` and set probe: off for"
            f" segment {pool.segment}",
        )
        return True

    def _is_dead(self, wire: Wire, pool: Pool, deadline: float) -> str:
        """'' when silence on this wire means something, else why not."""
        until, why = self._dead.get(wire.interface, (0.0, ""))
        if until > time.monotonic():
            return why
        why = wire.alive(
            self._view.peers(pool.segment, pool.subnet, self._host),
            deadline=min(deadline - MARGIN, time.monotonic() + LIVE_PATIENCE),
        )
        if why:
            self._dead[wire.interface] = time.monotonic() + DEAD_FOR, why
        return why

    # ----------------------------------------------------------------------------------- the wires

    def wire_of(self, pool: Pool, deadline: float | None = None) -> Wire | str:
        """The wire of the interface that carries the pool's subnet, or why there is none, as a clause."""
        named = self.habits(pool).interface
        end = time.monotonic() + KERNEL_PATIENCE
        end = end if deadline is None else min(end, deadline)
        try:
            interface = self._carrier(pool.subnet, named, end).interface
            if isinstance(interface, NoInterface):
                if named:
                    self._closed_to_us.add(named)
                return interface.reason
            return self._wire(interface)
        except (OSError, ProbeFailed) as error:
            return str(error)

    def _carrier(self, subnet: Network, named: str, deadline: float) -> _Carrier:
        began = time.monotonic()
        known = self._carriers.get((subnet, named))
        if known is not None and known.since + CARRIER_FOR > began:
            return known
        addresses = self._interfaces.addresses(deadline)
        interface = find_interface(subnet, addresses, self._interfaces.links(deadline), named)
        there = [each for each in addresses if each.interface == interface and not each.tentative]
        own = next((each.address for each in there if each.address in subnet), None)
        found = _Carrier(began, interface, own, any(each.bridge for each in there))
        self._carriers[subnet, named] = found
        return found

    def interfaces_changed(self) -> None:
        """Which one carries a subnet is looked up anew."""
        self._carriers.clear()

    def _wire(self, interface: str) -> Wire:
        """Listens on the interface from now on. Raises ProbeFailed without the right to open raw sockets."""
        with self._lock:
            known = self._wires.get(interface)
            if known is not None:
                return known
            if self._closed:
                raise ProbeFailed("the daemon is stopping")
            fresh = self._open_wire(interface, functools.partial(self._heard, interface), own_macs=self._view.host_macs)
            try:
                fresh.start()
            except ProbeFailed:
                self._closed_to_us.add(interface)
                raise
            self._closed_to_us.discard(interface)
            self._wires[interface] = fresh
        self.on_opened()
        return fresh

    def _heard(self, interface: str, sighting: Sighting) -> None:
        """Told once for each segment of that LAN: two LANs that never meet may use the same addresses."""
        told = {pool.segment for pool in self._listening.get(interface, ()) if sighting.address in pool.subnet}
        for segment in told:
            self.on_heard(segment, sighting)

    def listen(self, pools: Collection[Pool]) -> None:
        """Listen where these pools' LANs are, and nowhere else any more (an interface that is gone, a pool)."""
        found = [(pool, self.wire_of(pool)) for pool in pools]
        listening: dict[str, list[Pool]] = {}
        for pool, wire in found:
            if isinstance(wire, Wire):
                listening.setdefault(wire.interface, []).append(pool)
        self._listening = listening
        with self._lock:
            # Where one cannot be told now, it may be the very one that looks idle.
            sure = all(isinstance(wire, Wire) for _, wire in found)
            gone = {name for name, wire in self._wires.items() if sure or not wire.exists}
            idle = [self._wires.pop(name) for name in gone - set(listening)]
        for each in idle:
            each.close()

    def without_interface(self, pools: Collection[Pool]) -> dict[str, str]:
        """PoolID -> why no interface carries its subnet, as was found when they were last listened to."""
        carriers = {pool.id: self._carriers.get((pool.subnet, self.habits(pool).interface)) for pool in pools}
        return {
            pool_id: known.interface.reason
            for pool_id, known in carriers.items()
            if known is not None and isinstance(known.interface, NoInterface)
        }

    def ask(self, pool: Pool, address: Address) -> None:
        """Ask for an address in this host's own name; who answers is heard by the listener."""
        found = self.wire_of(pool)
        known = self._carriers.get((pool.subnet, self.habits(pool).interface))
        # In nobody's name it would look like a machine that wants the address.
        if isinstance(found, Wire) and known is not None and known.own is not None:
            found.ask(address, known.own)

    def hears_containers(self, pool: Pool) -> bool:
        """Whether this host's own containers are heard where the pool is: on a bridge, not on a macvlan's parent."""
        known = self._carriers.get((pool.subnet, self.habits(pool).interface))
        return known is not None and known.bridge

    def announce(self, pool: Pool, address: Address, mac: str) -> None:
        """Tell the LAN that this MAC has the address now (a container of an engine that does not say so itself)."""
        found = self.wire_of(pool)
        if isinstance(found, Wire):
            found.announce(address, mac)

    def states(self) -> Mapping[str, tuple[bool, int, int]]:
        """For the metrics: each interface, whether frames come and go there, frames looked at, frames lost."""
        with self._lock:
            wires = dict(self._wires)
            states = dict.fromkeys(self._closed_to_us, (False, 0, 0))
        for name, wire in wires.items():
            counters = wire.counters()
            states[name] = (not wire.trouble, counters.heard, counters.lost)
        return states

    def close(self) -> None:
        with self._lock:
            self._closed = True
            wires, self._wires = list(self._wires.values()), {}
        for each in wires:
            each.close()


def _late(wire: Wire, pool: Pool, address: Address) -> ProbeFailed:
    return ProbeFailed(f"{address} of pool {pool}: no time is left to look for it on {wire.interface}; try again")


def _proxy(mac: str, interface: str) -> str:
    return f"{mac} on {interface} answers for every address (proxy ARP)"
