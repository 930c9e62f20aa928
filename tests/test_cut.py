"""A daemon that is killed (SIGKILL) in the middle of claim, look, conversion or answer: nothing is given twice or lost.

The child process is all of a daemon below its socket, on a real etcd and a LAN without sockets. It kills itself at the
step that the test names, or is killed at any moment. Another host goes on meanwhile, and a successor of the same name
cleans up after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the child is this very file, not a test

from conftest import RealEtcd
from etcd_server import start_process, stop_process, until
from harness import FakeLan, Habits, bridge
from ipam_plugin import standby
from ipam_plugin.addresses import Address
from ipam_plugin.claims import Claims, Stock
from ipam_plugin.errors import IpamError, Refused
from ipam_plugin.etcd import Commit, Delete, Etcd, EtcdSettings, Put
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.journal import Journal
from ipam_plugin.ledger import Ledger
from ipam_plugin.model import CONFLICT, ENDPOINT, STANDBY, Keys, Lease, read_lease
from ipam_plugin.neighbourhood import Neighbourhood
from ipam_plugin.outage import Outage
from ipam_plugin.protocol import ReleasePool, RequestAddress, RequestPool
from ipam_plugin.register import Register
from ipam_plugin.standby import Keeper
from ipam_plugin.view import Local, View

pytestmark = pytest.mark.etcd

SUBNET, RANGE = "198.18.7.0/24", "198.18.7.64/28"
INSIDE = [f"198.18.7.{number}" for number in range(64, 80)]
STRANGERS = dict.fromkeys(INSIDE[3::5], "00:11:22:33:44:55")
GOAL = 2
MAC = "com.docker.network.endpoint.macaddress"
PATIENCE = 20.0  # seconds for one request


class Daemon:
    """All of a daemon below its socket."""

    def __init__(self, etcd: Etcd, keys: Keys, name: str, lan: FakeLan, journal: Path) -> None:
        self._etcd = etcd
        self._keys = keys
        self._carried = [bridge(f"198.18.7.{1 + len(name)}/24")]
        self._stop = threading.Event()
        self.view = View(keys, name, lambda segment: Local(cooldown=0.0))
        ledger = Ledger(etcd, self.view, keys, name)
        neighbourhood = Neighbourhood(
            self.view, name, lambda segment: Habits(standby=GOAL), self, alarm=_ignored, open_wire=lan.open
        )
        self.stock = Stock()
        self._outage = Outage(Journal(journal), lambda deadline: ledger.read(keys.host(name), deadline), alarm=_ignored)
        for work in self._outage.work():
            self.stock.journalled(work.tokens)
        claims = Claims(
            ledger, self.view, keys, name, neighbourhood, self.stock, self._outage, vendor_of=lambda mac: ""
        )
        self._keeper = Keeper(claims, self.stock, ledger, self.view, keys, name, neighbourhood, alarm=_ignored)
        neighbourhood.on_heard = self._keeper.heard
        claims.on_shortage = self.view.on_wanted = self.view.on_pools = self._keeper.wake
        self.register = Register(
            ledger,
            claims,
            self.view,
            keys,
            name,
            outage=self._outage,
            default_segment="default",
            segments=lambda: {"default"},
            carried=lambda deadline: self._carried,
            alarm=_ignored,
            on_given=self._keeper.given,
        )
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (
                self._watch,
                lambda: ledger.free_orphans(self._stop),
                lambda: self._keeper.run(self._stop),
                lambda: self._outage.run(
                    self.register.settle, self._stop, lambda work: self.stock.settled(work.tokens)
                ),
            )
        ]
        self._ledger = ledger
        self.pool = ""

    def addresses(self, deadline: float | None = None) -> Sequence[InterfaceAddress]:
        return self._carried

    def links(self, deadline: float | None = None) -> Sequence[Link]:
        return [Link(2, "br0", "02:00:00:00:00:01", "bridge", carrier=True, up=True, loopback=False, master="")]

    def _watch(self) -> None:
        self._etcd.watch(
            self._keys.prefix,
            lambda values, *at: self.view.reset(((v.key, v.value, v.revision) for v in values), *at),
            self.view.apply,
            self._stop,
        )

    def start(self) -> Daemon:
        for each in self._threads:
            each.start()
        assert self.view.loaded.wait(PATIENCE)
        return self

    def create(self) -> None:
        request = RequestPool(Pool=SUBNET, SubPool=RANGE, Options={})
        self.pool = self.register.request_pool(request, time.monotonic() + PATIENCE)[0].id

    def ask(self, mac: str, address: str = "") -> str:
        """An address; Refused where there is none."""
        request = RequestAddress(self.pool, address, {MAC: mac})
        return self.register.request_address(request, time.monotonic() + PATIENCE).partition("/")[0]

    def release_pool(self) -> None:
        self.register.release_pool(ReleasePool(self.pool), time.monotonic() + PATIENCE)

    def stop(self) -> None:
        self._stop.set()
        self._keeper.close()
        self._outage.wake()
        self._ledger.stop_freeing_orphans()
        for each in self._threads:
            each.join(10)


def _ignored(kind: str, text: str) -> None: ...


# ------------------------------------------------------------------------------------- the child


class Cut:
    """Ends this process, as a power cut does, when a step is reached for the n-th time."""

    def __init__(self, step: str, number: int) -> None:
        self._step = step
        self._left = number
        self._lock = threading.Lock()

    def reached(self, step: str) -> None:
        with self._lock:
            if step == self._step:
                self._left -= 1
                if self._left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)


class CutEtcd(Etcd):
    """A real client that is cut before or after certain transactions."""

    def __init__(self, settings: EtcdSettings, keys: Keys, cut: Cut) -> None:
        super().__init__(settings)
        self._leases = keys.leases
        self._cut = cut

    def commit(
        self,
        expect: Mapping[str, int],
        writes: Sequence[Put | Delete],
        *,
        deadline: float,
        proof: str | None = None,
    ) -> Commit:
        what = self._what(writes)
        self._cut.reached(f"before {what}")
        commit = super().commit(expect, writes, deadline=deadline, proof=proof)
        self._cut.reached(f"after {what}")
        return commit

    def _what(self, writes: Sequence[Put | Delete]) -> str:
        names = {STANDBY: "the claim", ENDPOINT: "the conversion", CONFLICT: "the conflict"}
        for each in writes:
            if each.key.startswith(self._leases):
                return "the return" if isinstance(each, Delete) else names.get(read_lease(each.value).kind, "another")
        return "another"


def child(told: dict[str, Any]) -> None:
    """Hands out addresses, and says which, until it is cut."""
    standby.PERIOD = 0.02
    cut, keys = Cut(told["step"], told["number"]), Keys(told["prefix"])
    lan = FakeLan()
    lan.machines = dict(STRANGERS)
    if not told["step"]:
        lan.before_answer = lambda address: time.sleep(0.003)  # so that a kill at any moment also meets looks

    etcd = CutEtcd(EtcdSettings(endpoints=tuple(told["endpoints"])), keys, cut)
    daemon = Daemon(etcd, keys, "a", lan, Path(told["journal"])).start()

    def looked(address: Address) -> None:
        entry = daemon.view.entry("default", address)
        if entry is not None and entry.kind == STANDBY:
            cut.reached("during the look")

    if told["step"]:
        lan.before_answer = looked
    daemon.create()
    for number in range(6):
        named = dict(enumerate([*STRANGERS][:2], 1)).get(number, told["named"] if number == 3 else "")
        if number == 5:
            until(lambda: len(daemon.stock.all()) == GOAL, "a full stock")
        with contextlib.suppress(Refused):
            given = daemon.ask(f"02:42:0a:00:00:{number:02x}", named)
            cut.reached("before the answer")
            print(f"given {given}", flush=True)
    until(lambda: len(daemon.stock.all()) == GOAL, "a full stock, to be given back")
    daemon.release_pool()
    print("ended", flush=True)
    threading.Event().wait(PATIENCE)


# ------------------------------------------------------------------------------------- the test


class Bench:
    """One etcd prefix, the child, and the hosts in this process."""

    def __init__(self, etcd: RealEtcd, directory: Path) -> None:
        self._etcd = etcd
        self._keys = Keys(etcd.prefix)
        self._log = directory / "child.log"
        self._directory = directory
        self._lan = FakeLan()
        self._lan.machines = dict(STRANGERS)
        self._hosts: list[Daemon] = []
        self._child: subprocess.Popen[bytes] | None = None
        for name in ("a", "b"):
            self._put(self._keys.heartbeat(name), b"{}")

    def _put(self, key: str, value: bytes) -> None:
        self._etcd.client.commit({}, [Put(key, value)], deadline=time.monotonic() + PATIENCE)

    def host(self, name: str) -> Daemon:
        made = Daemon(Etcd(self._etcd.settings), self._keys, name, self._lan, self._directory / f"{name}.journal")
        self._hosts.append(made)
        return made.start()

    def start_child(self, step: str, number: int, named: str) -> None:
        told = {
            "endpoints": self._etcd.settings.endpoints,
            "journal": str(self._directory / "a.journal"),
            "prefix": self._etcd.prefix,
            "step": step,
            "number": number,
            "named": named,
        }
        root = Path(__file__).parent.parent
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        environment = {**kept, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
        self._child = start_process([sys.executable, __file__, json.dumps(told)], self._log, env=environment)

    def said(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines() if self._log.exists() else []

    def given_by_child(self) -> list[str]:
        return [line.removeprefix("given ") for line in self.said() if line.startswith("given ")]

    def wait_cut(self) -> None:
        """Until the child has been cut. One that came to its end never reached the step."""
        assert self._child is not None
        child = self._child
        until(lambda: child.poll() is not None or "ended" in self.said(), "the cut", PATIENCE)
        assert child.poll() == -signal.SIGKILL, f"it was not cut: {self.said()[-20:]}"

    def kill_child(self) -> None:
        if self._child is not None:
            stop_process(self._child)

    def leases(self) -> dict[str, Lease]:
        prefix = f"{self._keys.leases}default/"
        values, _ = self._etcd.client.list(prefix, deadline=time.monotonic() + PATIENCE)
        return {each.key.removeprefix(prefix): read_lease(each.value) for each in values}

    def of(self, kind: str, host: str = "") -> list[str]:
        return sorted(
            address for address, each in self.leases().items() if each.kind == kind and host in ("", each.host)
        )

    def uses(self, pool: str, host: str) -> bool:
        return (
            self._etcd.client.get(f"{self._keys.pools}{pool}/{host}", deadline=time.monotonic() + PATIENCE) is not None
        )

    def close(self) -> None:
        self.kill_child()
        for each in self._hosts:
            each.stop()
            each._etcd.close()


@pytest.fixture
def bench(etcd: RealEtcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(standby, "PERIOD", 0.05)
    made = Bench(etcd, tmp_path)
    try:
        yield made
    finally:
        made.close()


def judge(bench: Bench, other: Daemon, theirs: list[str], cut: Callable[[], None], unanswered: set[int]) -> None:
    """Cut the child; then everything that has to be true of what it left."""
    macs = (f"02:42:0b:00:00:{number:02x}" for number in range(256))
    theirs.append(other.ask(next(macs)))
    cut()
    answered = bench.given_by_child()
    left = bench.of(ENDPOINT, "a")
    assert set(answered) <= set(left), "what Docker was told is in etcd"
    assert len(set(left) - set(answered)) in unanswered
    # Another host goes on, while nobody has cleaned up.
    theirs.append(other.ask(next(macs)))
    successor = bench.host("a")
    goal = GOAL if bench.uses(other.pool, "a") else 0

    def at_rest() -> bool:
        known = {str(each.address) for each in successor.stock.all()}
        return len(known) == goal and set(bench.of(STANDBY, "a")) == known

    until(at_rest, "the successor's standby")
    leases = bench.leases()
    assert bench.of(ENDPOINT, "a") == left, "only a look at dockerd may free one of them"
    assert bench.of(ENDPOINT, "b") == sorted(theirs)
    kinds = {address: each.kind for address, each in leases.items() if address in INSIDE}
    conflicts = {address for address, kind in kinds.items() if kind == CONFLICT}
    assert conflicts <= set(STRANGERS)
    # Nothing is lost: all that is left can still be given, to anybody.
    successor.create()
    until(lambda: len(successor.stock.all()) == GOAL or len(bench.of(ENDPOINT)) >= 11, "the standby")
    free = set(INSIDE) - set(STRANGERS) - {*left, *theirs}
    rest = [(successor, other)[turn % 2].ask(next(macs)) for turn in range(len(free))]
    assert set(rest) == free
    with pytest.raises(Refused, match="full"):
        other.ask(next(macs))
    assert bench.of(CONFLICT) == sorted(STRANGERS)
    assert bench.of(STANDBY) == []


STEPS = [
    (step, number)
    for step in (
        "before the claim",
        "after the claim",
        "during the look",
        "before the conversion",
        "after the conversion",
        "before the answer",
        "before the conflict",
        "after the conflict",
        "before the return",
        "after the return",
    )
    for number in (1, 3 if step.split()[-1] in ("claim", "look", "conversion", "answer") else 2)
]


@pytest.mark.parametrize(("step", "number"), STEPS)
def test_killed_at_a_step(bench: Bench, step: str, number: int) -> None:
    """P1, P4, P5: whatever was being done, the successor of the same name keeps exactly the standby that it should,
    nothing else of it is in etcd but what was handed out, and no other host was given any of it meanwhile.

    An address whose conversion was written, but whose answer was cut off, stays an endpoint of this host: Docker
    may have been told. Only a look at dockerd may free it.
    """
    other = bench.host("b")
    other.create()
    theirs = [other.ask("02:42:0c:00:00:01")]
    named = next(each for each in INSIDE if each not in STRANGERS and each not in bench.leases())
    bench.start_child(step, number, named)
    # The keeper's threads meet most steps too, while the request may be anywhere.
    unanswered = {"before the conversion": {0}, "after the conversion": {1}, "before the answer": {1}}.get(step, {0, 1})
    judge(bench, other, theirs, bench.wait_cut, unanswered)


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment(bench: Bench, seed: int) -> None:
    """The same from outside, whatever it does at that moment: also in the middle of a call to etcd."""
    chance = random.Random(seed)
    other = bench.host("b")
    other.create()
    theirs = [other.ask("02:42:0c:00:00:01")]
    named = next(each for each in INSIDE if each not in STRANGERS and each not in bench.leases())
    bench.start_child("", 0, named)
    wanted = chance.randrange(4)

    def kill() -> None:
        until(lambda: len(bench.given_by_child()) >= wanted and bench.of(STANDBY, "a"), "it works")
        time.sleep(chance.uniform(0, 0.03))  # not to wait for anything, but to meet any moment
        bench.kill_child()

    judge(bench, other, theirs, kill, {0, 1})


def test_the_child_works(bench: Bench) -> None:
    """Where nothing is cut, it hands out its addresses and gives back its standby: the steps are those of a daemon."""
    bench.start_child("", 0, INSIDE[0])
    until(lambda: "ended" in bench.said(), "its end", PATIENCE)
    assert len(bench.given_by_child()) == 4
    assert INSIDE[0] in bench.given_by_child()
    assert bench.of(STANDBY) == []
    assert sorted(bench.given_by_child()) == bench.of(ENDPOINT, "a")
    assert {*STRANGERS} >= {*bench.of(CONFLICT)} >= {*[*STRANGERS][:2]}


if __name__ == "__main__":
    try:
        child(json.loads(sys.argv[1]))
    except IpamError as error:
        print(f"failed: {error}", flush=True)
        raise
