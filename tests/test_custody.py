"""The checker of custody must see every kind of broken promise, and must not cry wolf."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import properties  # noqa: F401 - its settings
from custody import (
    IN_FLIGHT,
    Absence,
    History,
    Running,
    Sample,
    Tick,
    Write,
    folded,
    timed,
    unsettled,
    violations,
)
from ipam_plugin.model import ENDPOINT, Alive, Holder, Host, Keys, Lease, PoolUse, encode, read_lease, rfc3339

KEYS = Keys()
A, B = "10.0.0.1", "10.0.0.2"
MAC, OTHER = "02:42:0a:00:00:01", "02:42:0a:00:00:99"
POOL = "default/10.0.0.0/24"
WITHIN = 100.0
END = 1000.0
STOCK = 2


def at(time: float, key: str, value: Any = None, doubt: float = 0.0) -> Write:
    return Write(0, time, time + doubt, key, None if value is None else encode(value))


def put(time: float, host: str, token: str = "t", address: str = A, doubt: float = 0.0, **more: Any) -> Write:
    told = {"kind": "endpoint", "mac": MAC, "pool": POOL, **more}
    return at(time, f"{KEYS.leases}default/{address}", Lease(host=host, token=token, **told), doubt)


def free(time: float, address: str = A, doubt: float = 0.0) -> Write:
    return at(time, f"{KEYS.leases}default/{address}", doubt=doubt)


def stands(*hosts: str) -> list[Write]:
    """What stood in etcd before: hosts that use the pool."""
    found = []
    for host in hosts:
        found.append(Write(0, -1e9, 0, KEYS.host(host), encode(Host(host=host))))
        use = PoolUse(host=host, segment="default", subnet="10.0.0.0/24")
        found.append(Write(0, -1e9, 0, f"{KEYS.pools}{POOL}/{host}", encode(use)))
    return found


def ran(host: str, *lives: tuple[float, float, Running], end: float = END) -> list[Sample]:
    """Looks at a host every ten seconds, half a second each; what ran from when to when."""
    return [
        Sample(host, float(now), now + 0.5, tuple(each for since, until, each in lives if since <= now <= until))
        for now in range(0, int(end), 10)
    ]


def runs(name: str, address: str = A, mac: str = MAC, run: str = "1") -> Running:
    return Running(name, run, address, mac)


def history(writes: Iterable[Write], *looks: list[Sample], away: Sequence[Absence] = (), end: float = END) -> History:
    samples = [sample for look in looks for sample in look]
    hosts = sorted({sample.host for sample in samples})
    return History([*stands(*hosts), *sorted(writes, key=lambda write: write.before)], samples, away, end)


X = runs("x")
FOREVER = END
HOST1 = ran("host1", (100, FOREVER, X))
NOTHING = ran("host1")
OFF = Absence("daemon", "host1", 200, 400)

GOOD = {
    "nothing": history([], NOTHING),
    "a container that runs": history([put(90, "host1")], HOST1),
    "one that was stopped": history([put(90, "host1"), free(310)], ran("host1", (100, 300, X))),
    "freed as soon as it was seen last": history([put(90, "host1"), free(300.5)], ran("host1", (100, 300, X))),
    "freed at an unknown moment": history([put(90, "host1"), free(200, doubt=200)], ran("host1", (100, 300, X))),
    "two with one address, one after the other": history(
        [put(90, "host1"), free(310), put(320, "host2", "u")],
        ran("host1", (100, 300, X)),
        ran("host2", (330, FOREVER, runs("y"))),
    ),
    "stopped and started between two looks, on another host": history(
        [put(90, "host1"), free(303), put(306, "host2", "u")],
        ran("host1", (100, 300, X)),
        ran("host2", (310, FOREVER, runs("y"))),
    ),
    "stopped, and started again": history(
        [put(90, "host1"), free(305), put(306, "host1", "u")],
        ran("host1", (100, 300, X), (310, FOREVER, runs("x", run="2"))),
    ),
    "its name was filled in": history([put(90, "host1"), put(150, "host1", note="it is x")], HOST1),
    "from stock": history([put(50, "host1", kind="standby", mac=""), put(90, "host1")], HOST1),
    "from stock while etcd was away": history(
        [put(50, "host1", kind="standby", mac=""), put(420, "host1", "u")],
        ran("host1", (300, FOREVER, X)),
        away=[Absence("etcd", "", 200, 400)],
    ),
    "stopped and started again with its --ip while etcd was away": history(
        [put(50, "host1"), put(405, "host1", "u")],
        ran("host1", (100, 250, X), (300, FOREVER, runs("x", run="2"))),
        away=[Absence("etcd", "", 200, 400)],
    ),
    "an orphan that was found": history([put(90, "host1"), free(180)], NOTHING),
    "an orphan of a host that is off": history(
        [put(90, "host1"), free(550)], ran("host1", (100, 190, X)), away=[Absence("daemon", "host1", 200, 500)]
    ),
    "an orphan that its dockerd could not tell of": history(
        [put(90, "host1"), free(550)], ran("host1", (100, 190, X)), away=[Absence("dockerd", "host1", 200, 500)]
    ),
    "a host that died without being retired": history(
        [put(90, "host1")], ran("host1", (100, 190, X)), away=[Absence("daemon", "host1", 200, END)]
    ),
    "a host that was cut off": history([put(90, "host1")], HOST1, away=[OFF]),
    "what a host had sent before": history([put(90, "host1"), free(210)], ran("host1", (100, 190, X)), away=[OFF]),
    "a host that was retired": history(
        [put(90, "host1"), at(250, KEYS.retire("host1"), Alive("", "", "", "")), free(300)], HOST1[:20], ran("host2"),
        away=[Absence("daemon", "host1", 200, END)],
    ),
    "running again after etcd's restore": history(
        [put(90, "host1", kind="conflict", mac="", by="host2", token=""), put(150, "host1", "u")], HOST1
    ),
    "stock, given back": history([put(50, "host1", kind="standby", mac=""), free(500)], NOTHING),
    "stock that a stranger took": history(
        [put(50, "host1", kind="standby", mac=""), put(90, "", "", kind="conflict", by="host1")], NOTHING
    ),
    "a full stock": history(
        [put(50 + i, "host1", address=f"10.0.0.{i}", kind="standby", mac="") for i in range(STOCK)], NOTHING
    ),
    "stock of a network that is gone": history(
        [put(50, "host1", kind="standby", mac=""), at(500, f"{KEYS.pools}{POOL}/host1"), free(550)], NOTHING
    ),
    "held, and the hold ended": history(
        [
            put(90, "host1"),
            put(310, "host1", kind="held", until=rfc3339(datetime.datetime.fromtimestamp(700, datetime.UTC))),
            free(720),
        ],
        ran("host1", (100, 300, X)),
    ),
    "an auxiliary address": history(
        [put(50, "", kind="router", mac="", holders=(Holder("host1", POOL),))], NOTHING
    ),
    "a reservation, a conflict and junk": history(
        [
            put(50, "", kind="reserved"),
            put(50, "", kind="conflict", address=B, by="host1"),
            Write(0, 50, 50, f"{KEYS.leases}default/10.0.0.3", b"junk"),
        ],
        NOTHING,
    ),
    "another segment": history([at(50, f"{KEYS.leases}other/{A}", Lease(kind="endpoint", host="host1"))], NOTHING),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_history_as_promised_is_good(name: str) -> None:
    """What may have been right is no violation: nothing is held against the register that is not certain."""
    assert violations(GOOD[name], within=WITHIN, standby=STOCK) == []
    assert unsettled(GOOD[name], standby=STOCK) == []


TOOK = f"{A} was endpoint of host1, and host2 took it at 200.000"
BAD = {
    "freed under a container": (
        history([put(90, "host1"), free(200), put(220, "host1", "u")], HOST1),
        [f"{A} was freed at 200.000, while container x of host1 ran with it"],
    ),
    "freed under a container, at a moment between two looks": (
        history([put(90, "host1"), free(200, doubt=90), put(295, "host1", "u")], HOST1),
        [f"{A} was freed at 290.000, while container x of host1 ran with it"],
    ),
    "given to another host under a container": (
        history([put(90, "host1"), put(200, "host2", "u"), put(220, "host1", "v")], HOST1, ran("host2")),
        [
            f"{A} became a container on host host2 (MAC {MAC}) at 200.000, while container x of host1 ran with it",
            TOOK,
            f"{A} was endpoint of host2, and host1 took it at 220.000",
        ],
    ),
    "given to another container of the same host": (
        history([put(90, "host1"), put(200, "host1", "u", mac=OTHER), put(220, "host1", "v")], HOST1),
        [
            f"{A} became a container on host host1 (MAC {OTHER}) at 200.000, while container x of host1 ran with it",
            f"{A} became a container on host host1 (MAC {MAC}) at 220.000, while container x of host1 ran with it",
        ],
    ),
    "a new grant for the address of a container": (
        history([put(90, "host1"), put(200, "host1", "u")], HOST1),
        [f"{A} became a container on host host1 (MAC {MAC}) at 200.000, while container x of host1 ran with it"],
    ),
    "a new grant for the address of a container that was there before etcd went away": (
        history([put(90, "host1"), put(420, "host1", "u")], HOST1, away=[Absence("etcd", "", 200, 400)]),
        [f"{A} became a container on host host1 (MAC {MAC}) at 420.000, while container x of host1 ran with it"],
    ),
    "made stock under a container": (
        history([put(90, "host1"), put(200, "host1", kind="standby"), put(220, "host1", "v")], HOST1),
        [f"{A} became standby of host host1 at 200.000, while container x of host1 ran with it"],
    ),
    "freed under a container that was started without etcd": (
        history(
            [put(50, "host1", kind="standby", mac=""), free(410), put(420, "host1", "u")],
            ran("host1", (300, FOREVER, X)),
            away=[Absence("etcd", "", 200, 400)],
        ),
        [f"{A} was freed at 410.000, while container x of host1 ran with it"],
    ),
    "two on one host": (
        history([put(90, "host1")], ran("host1", (100, FOREVER, X), (200, FOREVER, runs("y")))),
        [f"{A} was used twice at 200.500, by container x of host1 and container y of host1"],
    ),
    "two on two hosts, the second seen once": (
        history([put(90, "host1")], HOST1, ran("host2", (200, 205, runs("y")))),
        [f"{A} was used twice at 200.500, by container x of host1 and container y of host2"],
    ),
    "freed by another while the host was off": (
        history([put(90, "host1"), free(200 + IN_FLIGHT)], ran("host1", (100, 190, X)), away=[OFF]),
        [f"{A} was endpoint of host1, and was freed at 220.000 while host1 was away"],
    ),
    "stock freed by another": (
        history([put(90, "host1", kind="standby"), free(300)], NOTHING, away=[OFF]),
        [f"{A} was standby of host1, and was freed at 300.000 while host1 was away"],
    ),
    "stock taken by another": (
        history([put(90, "host1", kind="standby"), put(200, "host2", "u", kind="standby")], NOTHING, ran("host2")),
        [f"{A} was standby of host1, and host2 took it at 200.000"],
    ),
    "made a conflict by another": (
        history([put(90, "host1", kind="standby"), put(200, "", kind="conflict", by="host2")], NOTHING),
        [f"{A} was standby of host1, and host2 took it at 200.000"],
    ),
    "retired after it was freed": (
        history(
            [put(90, "host1"), free(300), at(310, KEYS.retire("host1"), Alive("", "", "", ""))],
            ran("host1", (100, 190, X)),
            away=[OFF],
        ),
        [f"{A} was endpoint of host1, and was freed at 300.000 while host1 was away"],
    ),
    "an orphan": (
        history([put(90, "host1")], NOTHING),
        [f"{A} is endpoint of host1, and no container runs with it, from 90.000 to 1000.000, 910 s"],
    ),
    "an orphan that was found late": (
        history([put(90, "host1"), free(411)], ran("host1", (100, 300, X))),
        [f"{A} is endpoint of host1, and no container runs with it, from 310.500 to 411.000, 100 s"],
    ),
    "an orphan whose name was filled in": (
        history([put(90, "host1"), put(150, "host1", note="it was x"), free(200)], NOTHING),
        [f"{A} is endpoint of host1, and no container runs with it, from 90.000 to 200.000, 110 s"],
    ),
    "an orphan of a host that has returned": (
        history([put(90, "host1")], ran("host1", (100, 190, X)), away=[OFF]),
        [f"{A} is endpoint of host1, and no container runs with it, from 400.000 to 1000.000, 600 s"],
    ),
    "a lease of nobody": (
        history([put(90, "host9")], NOTHING),
        [
            f"{A} is endpoint of host9, and host9 is not registered, from 90.000 to 1000.000, 910 s",
            f"{A} is endpoint of host9, and no container runs with it, from 90.000 to 1000.000, 910 s",
        ],
    ),
    "stock of a network that is gone": (
        history([put(50, "host1", kind="standby", mac=""), at(500, f"{KEYS.pools}{POOL}/host1")], NOTHING),
        [f"{A} is standby of host1, and no network uses its pool, from 500.000 to 1000.000, 500 s"],
    ),
    "more stock than there should be": (
        history(
            [put(50 + i, "host1", address=f"10.0.0.{i}", kind="standby", mac="") for i in range(STOCK + 1)], NOTHING
        ),
        [f"host1 had more than 2 addresses ready for {POOL} from 52.000 to 1000.000, 948 s"],
    ),
    "held for ever": (
        history([put(90, "host1", kind="held", until="1970-01-01T00:10:00Z")], NOTHING),
        [f"{A} is held of host1, and its hold has ended, from 600.000 to 1000.000, 400 s"],
    ),
    "held without an end": (
        history([put(90, "host1", kind="held", until="soon")], NOTHING),
        [f"{A} is held of host1, and its hold has ended, from 90.000 to 1000.000, 910 s"],
    ),
    "an auxiliary address of a network that is gone": (
        history([put(50, "", kind="router", holders=(Holder("host2", POOL),))], NOTHING),
        [f"{A} is router of its holders, and no network of host2 uses its pool, from 50.000 to 1000.000, 950 s"],
    ),
    "a container without a lease": (
        history([], HOST1),
        [f"container x of host1 ran with {A}, which was not leased to it, from 100.500 to 1000.000, 900 s"],
    ),
    "a container without a lease for a while": (
        history([put(300, "host1")], HOST1),
        [f"container x of host1 ran with {A}, which was not leased to it, from 100.500 to 300.000, 200 s"],
    ),
    "a container whose lease is still stock": (
        history([put(50, "host1", kind="standby", mac="")], HOST1),
        [f"container x of host1 ran with {A}, which was not leased to it, from 100.500 to 1000.000, 900 s"],
    ),
    "a container whose lease is another host's": (
        history([put(50, "host2")], HOST1, ran("host2")),
        [
            f"{A} is endpoint of host2, and no container runs with it, from 50.000 to 1000.000, 950 s",
            f"container x of host1 ran with {A}, which was not leased to it, from 100.500 to 1000.000, 900 s",
        ],
    ),
    "a container whose lease names another MAC": (
        history([put(90, "host1", mac=OTHER)], HOST1),
        [f"container x of host1 ran with {A}, which was not leased to it, from 100.500 to 1000.000, 900 s"],
    ),
    "a container with two leases": (
        history([put(90, "host1"), put(95, "host1", "u", address=B)], HOST1),
        [f"{B} is endpoint of host1, and no container runs with it, from 95.000 to 1000.000, 905 s"],
    ),
    "nobody looked": (
        history([put(90, "host1")], [each for each in HOST1 if not 200 < each.began < 300]),
        ["nobody looked at host1 from 200.500 to 300.000: the history itself is incomplete"],
    ),
    "nobody looked at the end": (
        history([put(90, "host1")], [each for each in HOST1 if each.began < 600]),
        ["nobody looked at host1 from 590.500 to 1000.000: the history itself is incomplete"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_broken_promise_is_seen(name: str) -> None:
    """Each of these histories breaks exactly the promises that are named, and the sentence says whose."""
    broken, expected = BAD[name]
    assert violations(broken, within=WITHIN, standby=STOCK) == expected


def test_what_has_not_settled_is_told_at_once() -> None:
    """While a test waits for rest, age does not matter, but what was over before the end does not count."""
    early = history([put(985, "host1")], NOTHING)
    assert violations(early, within=WITHIN) == []
    assert unsettled(early) == [f"{A} is endpoint of host1, and no container runs with it,"]
    late = history([put(90, "host1"), free(600)], NOTHING)
    assert violations(late, within=WITHIN) != []
    assert unsettled(late) == []
    assert unsettled(history([], HOST1)) == [f"container x of host1 ran with {A}, which was not leased to it,"]


def test_reads_bound_when_a_write_took_effect() -> None:
    """A write is later than every read that did not see it yet was sent, whatever order they are told in."""
    writes = [Write(3, -9.0, 1.0, "k", b""), Write(7, -9.0, 8.0, "k", None), Write(9, -9.0, 8.5, "k", b"")]
    ticks = [Tick(6.0, 6), Tick(2.0, 3), Tick(5.0, 6), Tick(7.0, 7), Tick(0.0, 2)]
    assert [(each.after, each.before) for each in timed(writes, ticks)] == [(0.0, 1.0), (6.0, 8.0), (7.0, 8.5)]


def test_what_stands_after_all_writes() -> None:
    writes = [put(1, "host1"), put(2, "host1", address=B), free(3)]
    assert list(folded(writes)) == [f"{KEYS.leases}default/{B}"]


# --- histories out of a model --------------------------------------------------------------------------


class World:
    """Hosts that start and lose containers, and a register that does right, written down with all the doubt that a
    recorder has. Time goes on by itself with everything that happens."""

    HOSTS = ("host1", "host2", "host3")

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.revision = 0
        self.writes = stands(*self.HOSTS)
        self.samples: list[Sample] = []
        self.ticks = [Tick(0.0, 0)]
        self.absences: list[Absence] = []
        self.leases: dict[str, tuple[str, str]] = {}  # address -> host and container, '' for one in stock
        self.running: dict[str, dict[str, str]] = {host: {} for host in self.HOSTS}  # container -> address
        self.journal: dict[str, list[tuple[str, str]]] = {host: [] for host in self.HOSTS}  # address, '' or container
        self.off: dict[str, float] = {}
        self.away: float | None = None  # etcd, since when
        self.number = 0

    def pass_time(self, most: float = 3.0) -> None:
        self.now += self.chance.uniform(0.01, most)
        for host in self.HOSTS:
            began = self.now
            self.now += self.chance.uniform(0.001, 0.2)
            seen = tuple(runs(name, address, "") for name, address in self.running[host].items())
            self.samples.append(Sample(host, began, self.now, seen))
        if self.away is None and self.chance.random() < 0.7:
            self.ticks.append(Tick(self.now, self.revision))

    def write(self, write: Write) -> None:
        self.now += 0.001
        self.revision += 1
        # Seen later, and how long it took nobody knows.
        late = self.now + self.chance.uniform(0, 2)
        self.writes.append(write._replace(revision=self.revision, after=-1e9, before=late))
        self.now += 0.001

    def grant(self, host: str, address: str, container: str) -> None:
        self.leases[address] = (host, container)
        self.write(put(0, host, f"t{self.revision}", address, mac="", kind="endpoint" if container else "standby"))

    def release(self, address: str) -> None:
        del self.leases[address]
        self.write(free(0, address))

    def start(self, host: str) -> None:
        if host in self.off:
            return
        stock = [a for a, owner in self.leases.items() if owner == (host, "") and a not in self.running[host].values()]
        self.number += 1
        name = f"c{self.number}"
        if self.away is not None:
            if not stock:
                return
            self.journal[host].append((stock[0], name))
            self.running[host][name] = stock[0]
            return
        free_ones = [f"10.0.0.{i}" for i in range(1, 7) if f"10.0.0.{i}" not in self.leases]
        chosen = self.chance.choice([*stock[:1], *free_ones[:2]] or [""])
        if chosen:
            self.grant(host, chosen, name)
            self.pass_time(0.5)
            self.running[host][name] = chosen
            if len(stock) < 2 and free_ones and self.chance.random() < 0.5:
                more = self.chance.choice(free_ones)
                if more not in self.leases:
                    self.grant(host, more, "")

    def stop(self, host: str) -> None:
        if not self.running[host]:
            return
        name = self.chance.choice(sorted(self.running[host]))
        address = self.running[host].pop(name)
        if self.away is not None:
            self.journal[host].append((address, ""))
        elif self.chance.random() < 0.7:
            self.release(address)
        else:
            self.journal[host].append((address, ""))  # lost, and found by the next look

    def look(self, host: str) -> None:
        """The host does what it still has to do: its journal, in the order in which it was written."""
        if host in self.off or self.away is not None:
            return
        last = dict(self.journal[host])
        self.journal[host].clear()
        for address, name in last.items():
            if name and name in self.running[host]:
                self.grant(host, address, name)
            elif address not in self.running[host].values() and address in self.leases:
                self.release(address)

    def crash(self, host: str) -> None:
        if host not in self.off:
            self.off[host] = self.now
            self.journal[host] += [(address, "") for address in self.running[host].values()]
            self.running[host].clear()

    def boot(self, host: str) -> None:
        if host in self.off:
            self.absences.append(Absence("daemon", host, self.off.pop(host), self.now))

    def outage(self, _: str) -> None:
        if self.away is None:
            self.away = self.now

    def end_outage(self, _: str) -> None:
        if self.away is not None:
            self.absences.append(Absence("etcd", "", self.away, self.now))
            self.away = None

    def rest(self) -> History:
        self.end_outage("")
        for host in self.HOSTS:
            self.boot(host)
            self.look(host)
        for _ in range(3):
            self.pass_time()
        # A watch tells all in order, so what is seen is never before its predecessor.
        writes, late = [], 0.0
        for each in self.writes:
            late = max(late, each.before)
            writes.append(each._replace(before=late))
        self.now = max(self.now, late)
        self.pass_time()
        return History(timed(writes, self.ticks), self.samples, self.absences, self.now)


STEPS = ("start", "start", "start", "stop", "stop", "look", "look", "crash", "boot", "outage", "end_outage")


@st.composite
def worlds(draw: st.DrawFn, last: Sequence[tuple[str, str]] = (), least: int = 0) -> History:
    world = World(draw(st.integers(0, 2**32)))
    steps = st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(World.HOSTS)), min_size=least, max_size=40)
    for step, host in [*draw(steps), *last]:
        getattr(world, step)(host)
        world.pass_time()
        if step == "boot":
            world.look(host)
    return world.rest()


LONG = 1e6


@given(worlds())
def test_right_histories_are_good(told: History) -> None:
    """Whatever hosts do, crash and miss: where the register did right, the checker finds nothing."""
    assert violations(told, within=LONG, standby=6) == []
    assert unsettled(told, standby=6) == []


def later(told: History, seconds: float) -> History:
    """The same, and then nothing happens for so long."""
    hosts = {sample.host for sample in told.samples}
    last = {host: max((s for s in told.samples if s.host == host), key=lambda s: s.began) for host in hosts}
    more = [
        last[host]._replace(began=told.ended + number, ended=told.ended + number + 0.1)
        for number in range(0, int(seconds), 20)
        for host in hosts
    ]
    return told._replace(samples=[*told.samples, *more], ended=told.ended + seconds)


@given(worlds(last=[("end_outage", ""), ("boot", "host1"), ("start", "host1"), ("crash", "host1")]), st.data())
def test_a_dropped_release_is_seen(told: History, data: st.DataObject) -> None:
    """Any release of a container's address that the register had forgotten: its lease has no owner."""
    last: dict[str, tuple[Write, bytes | None]] = {}  # the last write of each key, and what it replaced
    for each in told.writes:
        last[each.key] = each, last[each.key][0].value if each.key in last else None
    releases = [each for each, old in last.values() if each.value is None and old and read_lease(old).kind == ENDPOINT]
    assume(releases)
    dropped = data.draw(st.sampled_from(releases))
    broken = later(told._replace(writes=[each for each in told.writes if each is not dropped]), 3 * WITHIN)
    address = dropped.key.rpartition("/")[2]
    assert any(each.startswith(f"{address} is endpoint of") for each in violations(broken, within=WITHIN)), address


@given(worlds(least=15), st.data())
def test_freeing_a_live_one_is_seen(told: History, data: st.DataObject) -> None:
    """Any container that was seen twice, and its lease deleted and written again between."""
    seen: dict[tuple[str, Running], list[Sample]] = {}
    for sample in told.samples:
        for each in sample.running:
            seen.setdefault((sample.host, each), []).append(sample)
    several = [(key, times) for key, times in seen.items() if len(times) > 2]
    assume(several)
    (host, victim), times = data.draw(st.sampled_from(several))
    key = f"{KEYS.leases}default/{victim.address}"
    moment = (times[0].ended + times[-1].began) / 2
    before = [each for each in told.writes if each.before <= moment]
    assume(before and key in folded(before) and all(each.key != key or each in before for each in told.writes))
    again = Write(0, moment, moment, key, folded(before)[key])
    rest = [each for each in told.writes if each not in before]
    broken = told._replace(writes=[*before, again._replace(value=None), again, *rest])
    assert [each for each in violations(broken, within=LONG) if f"while container {victim.container} of {host}" in each]


@given(worlds(least=15), st.data())
def test_a_second_user_is_seen(told: History, data: st.DataObject) -> None:
    """Any container, and a second one with its address on another host at one moment while it ran."""
    seen: dict[tuple[str, Running], list[Sample]] = {}
    for sample in told.samples:
        for each in sample.running:
            seen.setdefault((sample.host, each), []).append(sample)
    several = [(key, times) for key, times in seen.items() if len(times) > 2]
    assume(several)
    (host, victim), times = data.draw(st.sampled_from(several))
    others = [s for s in told.samples if s.host != host and times[0].ended <= s.began and s.ended <= times[-1].began]
    assume(others)
    where = data.draw(st.sampled_from(others))
    doubled = where._replace(running=(*where.running, runs("thief", victim.address, "")))
    broken = told._replace(samples=[doubled if each is where else each for each in told.samples])
    found = violations(broken, within=LONG)
    assert any("was used twice" in each and victim.container in each and "thief" in each for each in found)
