"""Everything dies at random while containers come and go; afterwards every address is truly held, or free.

Three hosts with a member of etcd on each. What happens is written down all the time, and `custody` judges it: by every
write in etcd, and by the containers that the kernel knows. It takes IPAM_CHAOS_SECONDS (180), and then as long as the
addresses of what has died take to come back. IPAM_CHAOS_SEED repeats the order of faults and commands that a run has
printed; what they meet is each time something else.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest

from conftest import missing
from custody import unsettled, violations
from recorder import Recorder
from test_engine import CREATE, assert_register_agrees, of_kind
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, CommandTimeout, Host, Lab, LabError, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

SECONDS = float(os.environ.get("IPAM_CHAOS_SECONDS", "180"))
SEED = os.environ.get("IPAM_CHAOS_SEED", "")
GRACE = 30  # docker.grace, the least there is
# In which an address without an owner is free again: the promise is 10 minutes with the default grace of 5.
BOUND = 180.0
STANDBY = 2  # unless configured
HANGING = 120.0  # a docker command is given up: the engine itself tries for 30 s to reach a plugin that is dead
CONTAINERS = 7  # at once on a host
FIXED = [f"192.168.77.{number}" for number in range(64, 72)]  # asked for by --ip, on all hosts


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")


@pytest.fixture
def lan() -> Iterator[Lab]:
    config = {"docker": {"grace": f"{GRACE}s"}}
    with Lab(hosts=3, machines=0, etcd=3, etcd_on="hosts", daemon=True, config=config) as lab:
        for host in lab.hosts:
            options = ("--ip-range", "192.168.77.128/26", "--aux-address", f"DefaultGatewayIPv4={ROUTER4}")
            host.docker(*CREATE, "--subnet", SUBNET4, *options, "lan")
        yield lab


class Users(threading.Thread):
    """The people of one host: they start containers, stop, start again and remove them, and live with errors."""

    def __init__(self, host: Host, seed: str, ended: threading.Event) -> None:
        super().__init__(name=f"users of {host.name}", daemon=True)
        self.did: Counter[str] = Counter()
        self.hung: list[str] = []
        self.failed: Exception | None = None
        self._host = host
        self._chance = random.Random(f"{seed} {host.name}")
        self._ended = ended
        self._names: list[str] = []
        self._number = 0

    def run(self) -> None:
        try:
            while not self._ended.wait(self._chance.uniform(0.1, 0.8)):
                what = self._words()
                try:
                    self._host.docker(*what, timeout=HANGING)
                    self.did[what[0]] += 1
                except CommandTimeout as error:
                    self.hung.append(str(error))
                except (LabError, OSError):  # while something is dead
                    self.did[f"{what[0]}, in vain"] += 1
        except Exception as error:
            self.failed = error

    def _words(self) -> tuple[str, ...]:
        chance = self._chance
        if not self._names or (len(self._names) < CONTAINERS and chance.random() < 0.4):
            self._number += 1
            name = f"{self._host.name}-{self._number}"
            self._names.append(name)
            fixed = ("--ip", chance.choice(FIXED)) if chance.random() < 0.3 else ()
            policy = ("--restart", "always") if chance.random() < 0.4 else ()
            return ("run", "-d", "--network", "lan", "--name", name, *fixed, *policy, "busybox")
        name = chance.choice(self._names)
        what = chance.choice(["rm", "rm", "stop", "start", "start", "restart", "kill"])
        if what == "rm":
            self._names.remove(name)
            return ("rm", "-f", name)
        return (what, *(("-t", "1") if what in ("stop", "restart") else ()), name)


@dataclass
class Fault:
    """Something that was broken: what cannot be broken a second time meanwhile, and how it is mended."""

    name: str
    place: str
    mend: Callable[[], None]
    due: float = 0.0


class Chaos:
    """Breaks one thing after the other, two at once at most, and mends each after a while."""

    KINDS = ("daemon", "dockerd", "both", "power", "member", "leader", "paused leader", "cable")

    def __init__(self, lab: Lab, recorder: Recorder, seed: str) -> None:
        self.done: Counter[str] = Counter()
        self._lab = lab
        self._recorder = recorder
        self._chance = random.Random(f"{seed} faults")
        self._broken: list[Fault] = []
        self._next: list[str] = []

    def run(self, seconds: float) -> None:
        ends, pause = time.monotonic() + seconds, 0.0
        while time.monotonic() < ends:
            self._mend([fault for fault in self._broken if fault.due <= time.monotonic()])
            if len(self._broken) < 2 and time.monotonic() >= pause:
                self._break()
                pause = time.monotonic() + self._chance.uniform(1, 6)
            time.sleep(0.05)

    def mend_all(self) -> None:
        self._mend(list(self._broken))

    def _mend(self, faults: list[Fault]) -> None:
        for fault in faults:
            self._broken.remove(fault)
            fault.mend()
            self._recorder.say(f"{fault.name} of {fault.place} is mended")

    def _break(self) -> None:
        # Every kind comes before one comes again.
        self._next = self._next or self._chance.sample(self.KINDS, len(self.KINDS))
        kind, number = self._next.pop(), self._chance.randrange(3)
        # One in five lasts longer than a heartbeat.
        lasts = self._chance.uniform(25, 40) if self._chance.random() < 0.2 else self._chance.uniform(1, 10)
        if "leader" in kind:
            lasts = min(lasts, 8.0)  # a paused one keeps what was sent to it for as long: see custody.IN_FLIGHT
            try:
                number = self._lab.etcd.index(self._lab.leader(within=3))
            except LabError:
                return  # there is none just now
        host = self._lab.hosts[number]
        if any(fault.place == host.name for fault in self._broken):
            return
        self._recorder.say(f"{kind} of {host.name}, for {lasts:.1f} s")
        fault = Fault(kind, host.name, self._hit(kind, host))
        fault.due = time.monotonic() + lasts
        self._broken.append(fault)
        self.done[kind] += 1

    def _hit(self, kind: str, host: Host) -> Callable[[], None]:
        """Breaks it, and returns how it is mended."""
        absences, silence = ExitStack(), ExitStack()
        member = host.etcd
        assert member is not None
        if kind in ("daemon", "both", "power", "cable"):
            # It ends when the daemon is let at its work again, not when all is up: what it frees then it frees itself.
            silence.enter_context(self._recorder.absent("daemon", host.name))
        if kind in ("dockerd", "both", "power"):
            absences.enter_context(self._recorder.absent("dockerd", host.name))
        if kind in ("power", "member", "leader", "paused leader", "cable"):
            absences.enter_context(self._recorder.absent("etcd"))

        def engine() -> None:
            host.start_dockerd(wait=False)
            host.wait_dockerd(180)  # it starts the containers again before it answers, and those may have to wait

        def boot() -> None:
            host.boot()
            member.launch()
            start()
            engine()

        def both() -> None:
            start()
            engine()

        def start() -> None:
            silence.close()
            host.start_daemon()

        def rejoin() -> None:
            silence.close()
            host.rejoin()

        match kind:
            case "daemon":
                host.kill("daemon")
                mend = start
            case "dockerd":
                host.kill("dockerd")
                mend = engine
            case "both":
                host.kill("dockerd")
                host.kill("daemon")
                mend = both
            case "power":
                host.kill()
                mend = boot
            case "member" | "leader":
                member.kill()
                mend = member.launch
            case "paused leader":
                member.stop()
                mend = member.cont
            case _:
                host.cut_off()
                mend = rejoin

        def mended() -> None:
            with absences:
                mend()

        return mended


def test_everything_dies_at_random(lan: Lab) -> None:
    """kill -9 of daemons, engines, hosts, members and leaders of etcd, pauses and cut cables, while three hosts start
    and remove containers: at no time was an address freed that a container had (P3), or had by two (P1), and no docker
    command hung (P6). Once everything is mended, every running container has exactly one lease, and no lease is
    without an owner for longer than its bound (P5)."""
    seed = SEED or str(random.SystemRandom().randrange(10**6))
    print(f"IPAM_CHAOS_SEED={seed} IPAM_CHAOS_SECONDS={SECONDS:g}")
    with Recorder(lan) as recorder:
        ended = threading.Event()
        users = [Users(host, seed, ended) for host in lan.hosts]
        chaos = Chaos(lan, recorder, seed)
        for each in users:
            each.start()
        try:
            chaos.run(SECONDS)
        finally:
            ended.set()
            chaos.mend_all()
            for each in users:
                each.join(HANGING + 10)
        recorder.say(f"everything is mended; faults: {dict(chaos.done)}")
        for each in users:
            recorder.say(f"{each.name}: {dict(each.did)}")
            assert each.failed is None
            assert each.did["run"] > 0
        assert [text for each in users for text in each.hung] == []
        mended = time.monotonic()
        left: list[str] = []

        def at_rest() -> bool:
            now = unsettled(recorder.history(), standby=STANDBY)
            if now != left:
                recorder.say(f"{len(now)} to settle: {now[:6]}")
                left[:] = now
            return not left

        with suppress(LabError):  # what is left is told below, with all that was wrong before
            until(at_rest, BOUND, "every address has an owner", pause=2.0)
        recorder.say(f"waited {time.monotonic() - mended:.0f} s for rest")
        history = recorder.history()
        recorder.say(f"{len(history.writes)} writes, {len(history.samples)} samples")
        assert [*violations(history, within=BOUND, standby=STANDBY), *unsettled(history, standby=STANDBY)] == []
        assert_register_agrees(lan)

        # All this can be seen: one lease is taken from a container, and given back at once.
        address, lease = next(iter(of_kind(lan, "endpoint").items()))
        key = f"/ipam-plugin/v1/leases/default/{address}"
        value = lan.etcdctl("get", key, "--print-value-only")
        lan.etcdctl("del", key)
        lan.etcdctl("put", key, value)
        seen = len(recorder.history().samples)
        until(lambda: len(recorder.history().samples) > seen + 6, 10, "the hosts were looked at again")
        [told] = violations(recorder.history(), within=BOUND, standby=STANDBY)
        assert told.startswith(f"{address} was freed")
        assert f"of {lease['host']} ran with it" in told
