"""What the wire says, judged: free, a stranger's, one of ours, or not known; and which interface is listened to."""

from __future__ import annotations

import datetime
import ipaddress
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import FakeLan, FakeWire, Habits, bridge
from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.errors import ProbeFailed
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.model import (
    ENDPOINT,
    History,
    Host,
    HostAddress,
    Keys,
    Lease,
    Pool,
    SegmentSettings,
    Tenancy,
    encode,
    rfc3339,
)
from ipam_plugin.neighbourhood import Look, Neighbourhood, Verdict
from ipam_plugin.packets import How
from ipam_plugin.view import Local, View
from ipam_plugin.wire import FAST, FULL, Failed, InUse, Outcome, Sighting, Silent, Times, Wire

KEYS = Keys()
POOL = Pool.make("192.168.1.0/24", "192.168.1.64/29", {}, "default")
ADDRESS = parse_address("192.168.1.66")
PRINTER = "00:11:22:33:44:55"
HOST_B = "02:bb:00:00:00:0b"


class Kernel:
    """interfaces.py, with what a test says, or what goes wrong there."""

    def __init__(self, *carried: InterfaceAddress) -> None:
        self.carried = list(carried)
        self.asked = 0
        self.error: OSError | None = None

    def addresses(self, deadline: float | None = None) -> Sequence[InterfaceAddress]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.carried

    def links(self, deadline: float | None = None) -> Sequence[Link]:
        names = dict.fromkeys(each.interface for each in self.carried)
        return [
            Link(number, name, "02:00:00:00:00:01", "bridge", carrier=True, up=True, loopback=False, master="")
            for number, name in enumerate(names, 2)
        ]


class Scripted(FakeWire):
    """A FakeLan's ears that remember how they were asked, and whether they are still open."""

    def __init__(self, lan: FakeLan, interface: str, on_heard: Callable[[Sighting], object], case: Case) -> None:
        super().__init__(lan, interface, on_heard)
        self._case = case
        self.open = False

    def start(self) -> None:
        if self._case.forbidden:
            raise ProbeFailed("raw sockets need the capability CAP_NET_RAW")
        self.open = True

    def close(self) -> None:
        self.open = False

    def probe(
        self,
        address: Address,
        times: Times,
        *,
        deadline: float,
        ignored: Collection[str] = (),
        doubted: str = "",
        uniform: Callable[[float, float], float] = lambda least, most: least,
    ) -> Outcome:
        if not doubted:
            self._case.times.append(times)
        return super().probe(address, times, deadline=deadline, ignored=ignored, doubted=doubted)

    def alive(self, peers: Sequence[Address], *, deadline: float) -> str:
        self._case.peers.append([str(each) for each in peers])
        return super().alive(peers, deadline=deadline)


class Case:
    """A Neighbourhood with all that is around it."""

    def __init__(self, *carried: InterfaceAddress, habits: Habits | None = None) -> None:
        self.view = View(KEYS, "a", lambda segment: Local(cooldown=0.0))
        self.view.reset([], 1)
        self.revision = 1
        self.lan = FakeLan()
        self.kernel = Kernel(*(carried or (bridge("192.168.1.11/24"),)))
        self.habits = habits or Habits()
        self.alarms: list[tuple[str, str]] = []
        self.times: list[Times] = []
        self.peers: list[list[str]] = []
        self.forbidden = False
        self.wires: list[Scripted] = []
        self.heard: list[tuple[str, str]] = []
        self.neighbourhood = Neighbourhood(
            self.view,
            "a",
            lambda segment: self.habits,
            self.kernel,
            alarm=lambda kind, text: self.alarms.append((kind, text)),
            open_wire=self.open,
        )
        self.neighbourhood.on_heard = lambda segment, sighting: self.heard.append((segment, str(sighting.address)))

    def open(self, interface: str, on_heard: Callable[[Sighting], object], **_: Any) -> Wire:
        self.wires.append(Scripted(self.lan, interface, on_heard, self))
        return self.wires[-1]

    def put(self, key: str, value: bytes | None) -> None:
        self.revision += 1
        self.view.apply([(key, value, self.revision)], self.revision)

    def register(self, name: str, address: str, mac: str, alive: bool = True) -> None:
        self.put(KEYS.host(name), encode(Host(name, addresses=(HostAddress(address, 24, "br0", mac),))))
        if alive:
            self.put(KEYS.heartbeat(name), b"{}")

    def ended(self, mac: str, seconds_ago: float) -> None:
        """A container's lease ended."""
        moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
        history = History((Tenancy(ENDPOINT, "b", mac, until=rfc3339(moment)),))
        self.put(KEYS.past("default", parse_address("192.168.1.90")), encode(history))

    def look(
        self, address: Address = ADDRESS, *, pool: Pool = POOL, seconds: float = 30, thorough: bool = False
    ) -> Look:
        return self.neighbourhood.look(pool, address, time.monotonic() + seconds, thorough=thorough)

    @property
    def open_on(self) -> list[str]:
        return sorted(each.interface for each in self.wires if each.open)


@pytest.fixture
def case() -> Case:
    return Case()


# ------------------------------------------------------------------------------------- verdicts


def test_silence_on_a_living_wire_is_free(case: Case) -> None:
    """Section 7: nobody answered, and one of those who should be there was heard. All looks are counted by result."""
    assert case.look() == Look(Verdict.FREE)
    assert case.neighbourhood.results == {"free": 1, "stranger": 0, "ours": 0, "heard": 0, "unknown": 0}


def test_a_stranger(case: Case) -> None:
    """A machine that answers and is none of ours, by its MAC."""
    case.lan.machines[str(ADDRESS)] = PRINTER
    assert case.look() == Look(Verdict.STRANGER, PRINTER)


@pytest.mark.parametrize(
    ("seconds_ago", "expected"),
    [(0, Verdict.OURS), (110, Verdict.OURS), (130, Verdict.STRANGER), (-3600, Verdict.OURS)],
)
def test_the_mac_of_a_lease_that_ended(case: Case, seconds_ago: float, expected: Verdict) -> None:
    """Section 7: for two minutes it is no stranger's; also one that a host whose clock is ahead wrote."""
    case.lan.machines[str(ADDRESS)] = PRINTER
    case.ended(PRINTER, seconds_ago)
    assert case.look() == Look(expected, PRINTER)


@pytest.mark.parametrize("alive", [True, False])
def test_a_registered_hosts_mac(case: Case, alive: bool) -> None:
    """Section 7: a registered host is no stranger, also while its daemon does not run."""
    case.register("b", "192.168.1.12", HOST_B, alive)
    case.lan.machines[str(ADDRESS)] = HOST_B
    assert case.look() == Look(Verdict.OURS, HOST_B)
    assert case.alarms == []


def test_a_wire_that_is_dead(case: Case) -> None:
    """Silence proves nothing where none of those who should be there is heard. For 5 s they are not asked again."""
    case.register("b", "192.168.1.12", HOST_B)
    case.lan.dead = "none of the machines was heard"
    assert case.look() == Look(Verdict.UNKNOWN, reason="none of the machines was heard")
    case.lan.dead = ""
    assert case.look().verdict is Verdict.UNKNOWN
    assert case.peers == [["192.168.1.12"]]
    case.neighbourhood._dead["br0"] = (time.monotonic(), "")
    assert case.look().verdict is Verdict.FREE


def test_a_stranger_is_found_on_a_wire_that_seems_dead(case: Case) -> None:
    """Whoever answers is there: only silence needs a living wire."""
    case.lan.dead = "none of the machines was heard"
    case.lan.machines[str(ADDRESS)] = PRINTER
    assert case.look() == Look(Verdict.STRANGER, PRINTER)


def test_who_shows_that_the_wire_lives(case: Case) -> None:
    """The segment's routers and the other living hosts, of this subnet; not this host, and no host that is off."""
    case.put(KEYS.segment("default"), encode(SegmentSettings(router=["192.168.1.1", "10.0.0.1"])))
    case.register("a", "192.168.1.11", "02:aa:00:00:00:0a")
    case.register("b", "192.168.1.12", HOST_B)
    case.register("off", "192.168.1.13", "02:cc:00:00:00:0c", alive=False)
    case.register("far", "10.0.0.2", "02:dd:00:00:00:0d")
    case.look()
    assert case.peers == [["192.168.1.1", "192.168.1.12"]]


def test_a_probe_that_failed(case: Case) -> None:
    """What the wire says of itself is the reason; it is no free address and no conflict."""
    case.lan.failed = "br0 is down"
    assert case.look() == Look(Verdict.UNKNOWN, reason="br0 is down")


def test_no_interface() -> None:
    """Nothing carries the subnet, or the kernel says nothing: not known, with a clause that says why."""
    case = Case(bridge("10.0.0.1/24"))
    look = case.look()
    assert look.verdict is Verdict.UNKNOWN
    assert "no interface of this host has an address in 192.168.1.0/24" in look.reason
    case = Case()
    case.kernel.error = TimeoutError("the kernel did not answer in time")
    assert case.look() == Look(Verdict.UNKNOWN, reason="the kernel did not answer in time")


def test_no_capability() -> None:
    """Without the right to open raw sockets every look says so, and the metrics do; with it back, it works."""
    case = Case()
    case.forbidden = True
    assert case.look() == Look(Verdict.UNKNOWN, reason="raw sockets need the capability CAP_NET_RAW")
    assert case.neighbourhood.states() == {"br0": (False, 0, 0)}
    case.forbidden = False
    assert case.look().verdict is Verdict.FREE
    assert case.neighbourhood.states() == {"br0": (True, 0, 0)}


@pytest.mark.parametrize("thorough", [False, True])
def test_no_time_is_no_verdict(case: Case, thorough: bool) -> None:
    """A look that there is no time for raises: a verdict would be turned into a warning by policy."""
    times = FULL if thorough else FAST
    with pytest.raises(ProbeFailed, match=r"192\.168\.1\.66 of pool .*: no time is left to look for it on br0"):
        case.look(seconds=times.longest + 0.1, thorough=thorough)
    assert case.lan.probed == []
    assert case.look(seconds=times.longest + 0.5, thorough=thorough).verdict is Verdict.FREE


def test_a_probe_that_fails_for_want_of_time(case: Case) -> None:
    """A probe that ran into its deadline says nothing about the wire either."""
    end = time.monotonic() + FAST.longest + 0.4

    def slow(address: Address) -> None:
        while time.monotonic() < end - 0.1:
            time.sleep(0.01)  # it is time itself that passes here

    case.lan.before_answer = slow
    case.lan.failed = "no time was left for 0.25 s of probing"
    with pytest.raises(ProbeFailed, match="no time is left"):
        case.neighbourhood.look(POOL, ADDRESS, end)


def test_no_time_to_tell_a_proxy_from_a_stranger(case: Case) -> None:
    """Proxy ARP makes no conflict: where there is no time to find out, it is a rumour."""
    end = time.monotonic() + FAST.longest + 0.4

    def slow(address: Address) -> None:
        while time.monotonic() < end - FAST.longest:
            time.sleep(0.01)  # it is time itself that passes here

    case.lan.before_answer = slow
    case.lan.proxy = PRINTER
    assert case.neighbourhood.look(POOL, ADDRESS, end) == Look(Verdict.HEARD, PRINTER)
    assert case.lan.probed == [ADDRESS]


@pytest.mark.parametrize(
    ("probe", "option", "thorough", "expected"),
    [
        ("full", "", False, FAST),
        ("full", "", True, FULL),
        ("fast", "", True, FAST),
        ("fast", "full", True, FULL),
        ("full", "fast", True, FAST),
    ],
)
def test_how_thoroughly(case: Case, probe: str, option: str, thorough: bool, expected: Times) -> None:
    """Section 7: `full` ahead of need, `fast` in a request; --ip comes to the same. --ipam-opt probe= goes first."""
    case.habits = Habits(probe=probe)
    pool = Pool.make("192.168.1.0/24", "", {"probe": option} if option else {}, "default")
    case.look(pool=pool, thorough=thorough)
    assert case.times == [expected]
    assert case.neighbourhood.is_asked(pool)


def test_probe_off(case: Case) -> None:
    """`probe: off`, by the configuration or for one network: the wire is not asked."""
    off = Pool.make("192.168.1.0/24", "", {"probe": "off"}, "default")
    assert not case.neighbourhood.is_asked(off)
    assert case.neighbourhood.is_asked(POOL)
    case.habits = Habits(probe="off")
    assert not case.neighbourhood.is_asked(POOL)


# ------------------------------------------------------------------------------------- proxy ARP


def test_three_in_a_row_is_proxy_arp(case: Case) -> None:
    """Section 7: one MAC answers for the address and for more that nobody has: an alarm, and nothing is known."""
    case.lan.proxy = PRINTER
    look = case.look()
    assert (look.verdict, look.mac) == (Verdict.UNKNOWN, PRINTER)
    assert "answers for every address (proxy ARP)" in look.reason
    assert [kind for kind, _ in case.alarms] == ["proxy_arp"]
    assert [str(each) for each in case.lan.probed[:1]] == [str(ADDRESS)]
    asked = len(set(case.lan.probed))
    assert asked >= 3
    case.look(parse_address("192.168.1.67"))
    assert len(case.alarms) == 1, "it is known by now"
    assert len(set(case.lan.probed)) <= asked + 1, "and not asked for controls again"


def test_two_in_a_row_is_no_proxy(case: Case) -> None:
    """One control that is silent, or that another machine answers for, is enough: this is a machine like any other."""
    for other in ("", "00:99:99:99:99:99"):
        controls: list[Address] = []

        def before_answer(address: Address, controls: list[Address] = controls, other: str = other) -> None:
            if address != ADDRESS:
                controls.append(address)
                case.lan.machines[str(address)] = PRINTER if len(controls) == 1 else other

        case.lan.machines = {str(ADDRESS): PRINTER}
        case.lan.before_answer = before_answer
        case.neighbourhood._silent.clear()  # the last round's silence would be answer enough
        assert case.look() == Look(Verdict.STRANGER, PRINTER)
        assert len(controls) == 2
    assert case.alarms == []


@pytest.mark.parametrize("then", [Silent(), Failed("its cable is out")])
@pytest.mark.parametrize(
    ("said", "silent", "failed"),
    [
        (InUse(PRINTER, How.ARP_REQUEST), Verdict.FREE, Verdict.UNKNOWN),
        (InUse(PRINTER, How.ARP_PROBE), Verdict.HEARD, Verdict.HEARD),
        (InUse(PRINTER, How.ARP_REPLY, answering=True), Verdict.HEARD, Verdict.HEARD),
        (InUse(PRINTER, How.ARP_REPLY), Verdict.FREE, Verdict.UNKNOWN),
    ],
)
def test_one_frame_is_a_rumour(case: Case, said: InUse, silent: Verdict, failed: Verdict, then: Outcome) -> None:
    """What is said to everybody once, and not again when asked for, makes no conflict. Who answered, or is about to use
    the address, is left alone (P2), also when nothing more was heard of him.
    """
    verdict = silent if isinstance(then, Silent) else failed

    class Once(Scripted):
        def probe(self, address: Address, times: Times, *, doubted: str = "", **more: Any) -> Outcome:
            return then if doubted else said

    case.neighbourhood._open_wire = lambda interface, on_heard, **_: Once(case.lan, interface, on_heard, case)
    assert case.look().verdict is verdict


def test_where_nothing_is_left_to_compare_with(case: Case) -> None:
    """Without two addresses that nobody should have, a proxy cannot be told from a machine: nothing is written down."""
    pool = Pool.make("192.168.1.64/30", "", {}, "default")
    case.put(f"{KEYS.leases}default/192.168.1.65", encode(Lease(ENDPOINT, "b")))
    case.lan.proxy = PRINTER
    case.kernel.carried = [bridge("192.168.1.11/24")]
    assert case.look(pool=pool) == Look(Verdict.HEARD, PRINTER)
    assert case.alarms == []


def test_two_proxies_at_once(case: Case) -> None:
    """Two routers that both do it: each is told, and behind both of them a machine is still found."""
    case.lan.proxy = PRINTER
    case.look()
    second = "00:99:99:99:99:99"

    class Both(dict[str, str]):
        def get(self, key: str, default: Any = "") -> Any:
            return super().get(key, second)

    case.lan.machines = Both()
    assert case.look().verdict is Verdict.UNKNOWN
    assert [text.split()[0] for _, text in case.alarms] == [PRINTER, second]
    case.lan.machines[str(ADDRESS)] = "00:77:77:77:77:77"
    assert case.look() == Look(Verdict.STRANGER, "00:77:77:77:77:77")


def test_a_proxy_is_one_of_its_interface() -> None:
    """The router of one LAN does not make the machines of another one with its MAC invisible."""
    case = Case(bridge("192.168.1.11/24"), bridge("10.0.0.1/24", "br1"))
    case.lan.proxy = PRINTER
    case.look()
    case.lan.proxy = ""
    other = Pool.make("10.0.0.0/24", "", {}, "default")
    address = parse_address("10.0.0.9")
    case.lan.machines[str(address)] = PRINTER
    assert case.look(address, pool=other) == Look(Verdict.STRANGER, PRINTER)


# ------------------------------------------------------------------------------------- the wires


def test_one_wire_for_an_interface() -> None:
    """However many pools and threads: one listener on each interface that carries one, and none elsewhere."""
    case = Case(bridge("192.168.1.11/24"), bridge("10.0.0.1/24", "br1"))
    other = Pool.make("10.0.0.0/24", "", {}, "default")
    for pool in (POOL, other, POOL, other):
        assert isinstance(case.neighbourhood.wire_of(pool), Wire)
    assert case.open_on == ["br0", "br1"]
    case.neighbourhood.listen([POOL])
    assert case.open_on == ["br0"]
    case.neighbourhood.close()
    assert case.open_on == []
    assert case.look() == Look(Verdict.UNKNOWN, reason="the daemon is stopping")


def test_a_wire_is_not_closed_on_a_guess() -> None:
    """While it is not known which interface carries one pool, the listener that looks idle may be that one's."""
    case = Case(bridge("192.168.1.11/24"), bridge("10.0.0.1/24", "br1"))
    other = Pool.make("10.0.0.0/24", "", {}, "default")
    case.neighbourhood.listen([POOL, other])
    case.kernel.error = TimeoutError("the kernel did not answer in time")
    case.neighbourhood.interfaces_changed()
    case.neighbourhood.listen([POOL, other])
    assert case.open_on == ["br0", "br1"]
    case.kernel.error = None
    case.neighbourhood.listen([other])
    assert case.open_on == ["br1"]


def test_the_interface_is_looked_up_when_interfaces_change(case: Case) -> None:
    """A burst of looks asks the kernel once; an interface that has just come is found when the kernel tells it."""
    for _ in range(20):
        case.look()
    assert case.kernel.asked == 1
    case.kernel.carried = [bridge("192.168.1.11/24", "br7")]
    case.neighbourhood.interfaces_changed()
    found = case.neighbourhood.wire_of(POOL)
    assert isinstance(found, Wire)
    assert found.interface == "br7"


@pytest.mark.parametrize(
    ("configured", "option", "expected"), [("br1", "", "br1"), ("br1", "br0", "br0"), ("", "", "br0")]
)
def test_the_interface_that_is_named(configured: str, option: str, expected: str) -> None:
    """--ipam-opt interface= before the configuration, before the route."""
    case = Case(bridge("192.168.1.11/24"), bridge("10.0.0.1/24", "br1"), habits=Habits(interface=configured))
    pool = Pool.make("192.168.1.0/24", "", {"interface": option} if option else {}, "default")
    found = case.neighbourhood.wire_of(pool)
    assert isinstance(found, Wire)
    assert found.interface == expected


def test_what_is_heard_belongs_to_the_segments_of_that_lan() -> None:
    """Two LANs that never meet use the same addresses: what is heard on one says nothing about the other; and what
    lies in no pool concerns nobody.
    """
    case = Case(
        bridge("192.168.1.11/24"),
        bridge("192.168.1.11/24", "br1"),
        bridge("10.0.0.1/24", "br2"),
    )
    named = {"interface": "br1", "segment": "lab"}
    case.neighbourhood.listen([POOL, Pool.make("192.168.1.0/24", "", named, "default")])
    by_name = {each.interface: each for each in case.wires}
    for interface, address in (("br0", "192.168.1.5"), ("br1", "192.168.1.6"), ("br0", "172.16.0.1")):
        by_name[interface].say(Sighting(parse_address(address), PRINTER, How.ARP_REPLY, time.monotonic()))
    assert case.heard == [("default", "192.168.1.5"), ("lab", "192.168.1.6")]


def test_asking_and_announcing_need_an_interface(case: Case) -> None:
    """They go to the interface that carries the pool, and nowhere where none does."""
    case.neighbourhood.ask(POOL, ADDRESS)
    case.neighbourhood.announce(POOL, ADDRESS, PRINTER)
    assert (case.lan.asked, case.lan.announced) == ([ADDRESS], [(ADDRESS, PRINTER)])
    elsewhere = Pool.make("172.16.0.0/24", "", {}, "default")
    case.neighbourhood.ask(elsewhere, parse_address("172.16.0.5"))
    case.neighbourhood.announce(elsewhere, parse_address("172.16.0.5"), PRINTER)
    assert (len(case.lan.asked), len(case.lan.announced)) == (1, 1)


# ------------------------------------------------------------------------------------- any answers

macs = st.sampled_from(("", PRINTER, HOST_B, "00:99:99:99:99:99"))


@settings(deadline=None)
@given(
    answers=st.dictionaries(st.integers(60, 75), macs, max_size=8),
    proxy=macs,
    dead=st.booleans(),
    failed=st.booleans(),
    asked=st.lists(st.integers(60, 75), min_size=1, max_size=6),
)
def test_any_answers(answers: dict[int, str], proxy: str, dead: bool, failed: bool, asked: list[int]) -> None:
    """Whatever machines answer in whatever order: FREE is said only of an address for which nobody answers, on a
    wire that lives; STRANGER and OURS only of one that is answered, by that MAC; and no verdict is an exception.
    """
    case = Case()
    case.register("b", "192.168.1.12", HOST_B)
    case.lan.machines = {f"192.168.1.{number}": mac for number, mac in answers.items() if mac}
    case.lan.proxy = proxy
    case.lan.dead = "dead" if dead else ""
    case.lan.failed = "failed" if failed else ""
    for number in asked:
        look = case.look(ipaddress.ip_address(f"192.168.1.{number}"))
        own = answers.get(number, "")
        if look.verdict is Verdict.FREE:
            assert (own, proxy, dead, failed) == ("", "", False, False)
        elif look.verdict is Verdict.UNKNOWN:
            assert dead or failed or proxy
            assert look.reason
        else:
            assert not failed
            assert look.mac in (own, proxy)
            assert (look.verdict is Verdict.OURS) == (look.mac == HOST_B)
        if own and not failed and own != proxy and own != look.mac:
            # Only a machine that was found to answer for all is passed over.
            assert any(own in text for _, text in case.alarms)
