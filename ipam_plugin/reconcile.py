"""The reconciler: this host's leases compared with what its dockerd has, in the background.

What follows from a look is decided in evidence.py; here the looks are made, the wire is asked before anything is
freed, and each difference is mended by one transaction that compares the token of the lease that was meant (P3).
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import ipaddress
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ipam_plugin import decisions, evidence
from ipam_plugin.addresses import Address
from ipam_plugin.claims import Claims
from ipam_plugin.decisions import InterfaceAddress
from ipam_plugin.errors import AddressTaken, DockerUnavailable, EtcdUnavailable, IpamError, Refused
from ipam_plugin.evidence import Findings, Gone, Held, Homeless, Kept, Look, Memory, Naming, Silence, Use
from ipam_plugin.ledger import Ledger
from ipam_plugin.model import ENDPOINT, HOST, ROUTER, Keys, Lease, Pool, parse_time, read_lease, rfc3339
from ipam_plugin.neighbourhood import Neighbourhood, Verdict
from ipam_plugin.register import Register
from ipam_plugin.view import Entry, View

log = logging.getLogger(__name__)

PERIOD = 30.0  # seconds between the beginnings of two looks when nothing happens
SOON = 2.0  # seconds from a change to the look at it, and between two looks of a burst
AWAY = 5.0  # seconds until dockerd is asked again that did not answer
SHOWS_WITHIN = 20.0  # seconds in which a container that was given an address should be seen
EXPECTED = 1024  # such containers
ASKED_AT_ONCE = 0.3  # seconds between two looks that somebody waits for
WAITED_FOR = 5.0  # seconds that a request waits for a look
LEFT = 1.0  # seconds of its deadline that it keeps for what follows
WRITE = 5.0  # seconds for one transaction
FREED_AT_ONCE = 20  # leases between two looks: the wire is asked for each, a quarter of a second
ENGINE = "engine"  # the file in state_dir

Spot = tuple[str, Address]  # segment and address


class Engine(Protocol):
    """dockerd.py, or a stand-in."""

    def look(self) -> Look: ...


class State(Protocol):
    """host.StateDir."""

    def read(self, name: str) -> str: ...
    def write(self, name: str, text: str) -> None: ...


class _Known(NamedTuple):
    revision: int
    lease: Lease


class Reconciler:
    """One thread runs it; the other methods may be called from any thread.

    `carried(deadline)` answers with the addresses on this host's interfaces, `pending` says whether the journal has
    something about an address, `grace` is in seconds. Everything in `on_look` is called with each look, and
    `on_compared(began)` when after a look that began then (monotonic seconds) every container of it has its lease, or
    an alarm was raised: in the reconciler's thread.
    """

    def __init__(
        self,
        engine: Engine,
        register: Register,
        ledger: Ledger,
        claims: Claims,
        view: View,
        keys: Keys,
        host: str,
        neighbourhood: Neighbourhood,
        state: State,
        *,
        grace: float,
        default_segment: str,
        carried: Callable[[float], Sequence[InterfaceAddress]],
        alarm: Callable[[str, str], None],
        pending: Callable[[str, Address], bool],
    ) -> None:
        self._engine = engine
        self._register = register
        self._ledger = ledger
        self._claims = claims
        self._view = view
        self._keys = keys
        self._host = host
        self._neighbourhood = neighbourhood
        self._state = state
        self._grace = grace
        self._default_segment = default_segment
        self._carried = carried
        self._alarm = alarm
        self._pending = pending
        self._kept = _read_kept(state.read(ENGINE))
        self._memory = Memory()
        self._leases: dict[Spot, _Known] = {}  # of this host's endpoints, as they were read
        self._holders: dict[Spot, _Known] = {}  # of what several networks share
        self._answered: dict[str, float] = {}  # tokens of leases that were not silent, and when
        self._unsettled = False
        self._away = ""  # why dockerd did not answer
        self._closed = False
        self._condition = threading.Condition()  # for these:
        self._expected: collections.OrderedDict[Spot, float] = collections.OrderedDict()  # given lately, and when
        self._asked = -math.inf  # a look is wanted that began after this (monotonic seconds)
        self._hurry = -math.inf  # the same, by a request that waits for it
        self._last: Look | None = None
        self._failed = -math.inf  # when the last look began to which dockerd did not answer
        self._runs = False
        self._began = -math.inf  # the last try
        self.looks: collections.Counter[str] = collections.Counter({"complete": 0, "failed": 0})
        self.results: collections.Counter[str] = collections.Counter(
            dict.fromkeys(("freed", "restored", "named", "lost", "pools"), 0)
        )
        self.on_look: list[Callable[[Look], None]] = []
        self.on_compared: Callable[[float], None] = lambda began: None

    # ------------------------------------------------------------------------------------ for the others

    def wake(self) -> None:
        """Something changed: look soon."""
        with self._condition:
            self._asked = time.monotonic()
            self._condition.notify_all()

    def given(self, pool: Pool, address: Address, mac: str) -> None:
        """A container gets this address, so dockerd should show it in a moment."""
        with self._condition:
            self._expected[pool.segment, address] = time.monotonic()
            if len(self._expected) > EXPECTED:
                self._expected.popitem(last=False)
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def nobody_has(self, address: Address) -> bool:
        """Whether dockerd was asked since this process started, and shows no container with the address."""
        with self._condition:
            look = self._last
        return (
            look is not None
            and address not in look.elsewhere
            and all(each.address != address for each in look.attachments)
        )

    def is_gone(self, pool: Pool, address: Address, lease: Lease, deadline: float) -> bool:
        """Whether nobody has the address of a lease of this host: by a look that began after this was called, and by
        the wire where that has to say it too. Waits for the look, a few seconds at most.
        """
        if not self._runs or self._pending(pool.segment, address):
            return False
        asked = time.monotonic()
        end = min(deadline - LEFT, asked + WAITED_FOR)
        with self._condition:
            self._hurry = asked
            self._condition.notify_all()
            self._condition.wait_for(
                lambda: self._closed or self._failed > asked or (self._last is not None and self._last.began > asked),
                max(0.0, end - time.monotonic()),
            )
            look, kept = self._last, self._kept
            not_shown_yet = self._expected.get((pool.segment, address), -math.inf) > self._failed
        if look is None or look.began <= asked or not_shown_yet:
            # A container that has just got it need not be in the list yet: the engine makes its endpoint from our
            # answer, and only for one network at a time does it wait for that. (What was under way is over where
            # dockerd did not answer since.)
            return False
        held = Held(pool.segment, address, lease)
        silence = evidence.silence_needed(look, held, kept)
        return silence is not None and self._is_silent(held, silence, deadline)

    # ------------------------------------------------------------------------------------------ the loop

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set and `close()` was called."""
        self._runs = True
        while self._wait_for_turn(stop):
            before = {
                (segment, address): entry.token for segment, address, entry in self._view.of_kind(ENDPOINT, self._host)
            }
            uses = self._uses()
            look = self._look()
            if look is None:
                continue
            try:
                self._judge(look, before, uses)
            except IpamError as error:
                log.info("what dockerd has is not compared with the register now: %s", error)
            except OSError as error:
                log.warning("the engine's ID cannot be kept, so nothing is freed: %s", error)
            for listener in self.on_look:
                listener(look)

    def _wait_for_turn(self, stop: threading.Event) -> bool:
        with self._condition:
            while not (stop.is_set() or self._closed):
                left = self._due() - time.monotonic()
                if left <= 0:
                    return True
                self._condition.wait(left)
        return False

    def _due(self) -> float:
        """When the next look should begin (monotonic seconds)."""
        if self._hurry > self._began:
            return self._began + ASKED_AT_ONCE
        if self._away:
            return self._began + AWAY
        expected = next(iter(self._expected.values()), math.inf)
        wanted = min(expected, self._asked if self._asked > self._began else math.inf)
        soon = max(wanted, self._began) + SOON
        return min(self._began + (SOON if self._unsettled else PERIOD), soon)

    def _look(self) -> Look | None:
        with self._condition:
            self._began = time.monotonic()
        try:
            look = self._engine.look()
        except DockerUnavailable as error:
            self.looks["failed"] += 1
            if not self._away:
                log.warning("%s; nothing is freed by what it does not say, and it is asked again", error)
            self._away = str(error)
            with self._condition:
                self._failed = self._began
                self._condition.notify_all()
            return None
        self.looks["complete"] += 1
        if self._away:
            log.info("dockerd answers again")
            self._away = ""
        with contextlib.suppress(OSError):  # said where it is written next
            self._keep(look)
        with self._condition:
            self._last = look
            late = time.monotonic() - SHOWS_WITHIN
            for spot, since in list(self._expected.items()):
                if since < late:
                    del self._expected[spot]
            self._condition.notify_all()
        return look

    def _keep(self, look: Look) -> None:
        kept = self._kept.after(look, time.time())
        if kept == self._kept:
            return
        self._state.write(ENGINE, f"{kept.engine} {_time_of(kept)}")
        if self._kept.engine:
            log.warning(
                "dockerd is another one than before (ID %s, was %s): leases from before are freed only where the wire"
                " proves that nobody has the address",
                kept.engine,
                self._kept.engine,
            )
        self._kept = kept

    # ------------------------------------------------------------------------------------- what is compared

    def _judge(self, look: Look, before: Mapping[Spot, str], uses: Sequence[Use]) -> None:
        self._keep(look)
        leases = self._read(self._leases, self._view.of_kind(ENDPOINT, self._host))
        findings, self._memory = evidence.compare(
            look,
            [Held(segment, address, lease) for (segment, address), lease in leases.items()],
            uses,
            self._memory,
            seen=lambda held: before.get((held.segment, held.address)) == held.lease.token,
            kept=self._kept,
            grace=self._grace,
            now=time.time(),
            default_segment=self._default_segment,
            pending=self._pending,
        )
        self._settle_expected(look, leases)
        asked_lately = time.monotonic() - PERIOD
        self._answered = {token: when for token, when in self._answered.items() if when > asked_lately}
        gone = [each for each in findings.gone if each.held.lease.token not in self._answered]
        self._unsettled = findings.unsettled or len(gone) > FREED_AT_ONCE
        homes = self._house(findings)
        if homes and findings.complete:
            self.on_compared(look.began)
        self._mend(findings._replace(gone=tuple(gone[:FREED_AT_ONCE])))

    def _settle_expected(self, look: Look, leases: Mapping[Spot, Lease]) -> None:
        """Who was waited for and has been seen is not waited for any more."""
        shown = {each.address for each in look.attachments if each.container_id in look.containers}
        with self._condition:
            for spot, since in list(self._expected.items()):
                if (spot not in leases and since < look.began) or spot[1] in shown:
                    del self._expected[spot]

    def _read(self, known: dict[Spot, _Known], entries: Sequence[tuple[str, Address, Entry]]) -> dict[Spot, Lease]:
        """The leases of these entries. Only what changed since the last look is read from etcd."""
        there = {(segment, address): entry for segment, address, entry in entries}
        for spot in known.keys() - there.keys():
            del known[spot]
        changed = {
            self._keys.lease(*spot): spot
            for spot, entry in there.items()
            if spot not in known or known[spot].revision != entry.revision
        }
        found = self._ledger.read_many(list(changed), time.monotonic() + WRITE)
        for key, spot in changed.items():
            known.pop(spot, None)
            each = found[key]
            if each is not None:
                known[spot] = _Known(each.revision, read_lease(each.value))
        return {
            spot: read.lease
            for spot, read in known.items()
            if read.lease.kind == there[spot].kind and read.lease.host == there[spot].host
        }

    def _uses(self) -> list[Use]:
        found = []
        for pool_id in self._view.pools_of(self._host):
            use = self._view.pool_use(pool_id, self._host)
            with contextlib.suppress(Refused):
                if use is not None:
                    found.append(Use(Pool.parse(pool_id), use.count, use.token))
        # What is held for a pool without a key: its last release was cut off.
        shared = [*self._view.of_kind(ROUTER), *self._view.of_kind(HOST, self._host)]
        held = set()
        with contextlib.suppress(IpamError):  # it is read with the next look
            leases = self._read(self._holders, shared).values()
            held = {each.pool for lease in leases for each in lease.holders if each.host == self._host}
        for pool_id in held - {use.pool.id for use in found}:
            with contextlib.suppress(Refused):
                found.append(Use(Pool.parse(pool_id), 1, ""))
        return found

    # ---------------------------------------------------------------------------------- what is mended

    def _house(self, findings: Findings) -> bool:
        """Whether every container without a lease has one now, or an alarm was raised."""
        return self._carry_out(
            [
                *(functools.partial(self._register.ensure_pool, pool, _soon()) for pool in findings.unknown),
                *(functools.partial(self._restore, each) for each in findings.homeless),
            ]
        )

    def _mend(self, findings: Findings) -> None:
        self._carry_out(
            [
                *(functools.partial(self._name, each) for each in findings.namings),
                *(functools.partial(self._free, each) for each in findings.gone),
                *(functools.partial(self._correct, each) for each in findings.miscounted),
            ]
        )

    def _carry_out(self, steps: Sequence[Callable[[], None]]) -> bool:
        """Whether all succeeded. What did not is tried again with the next look."""
        succeeded = True
        for step in steps:
            if self._closed or self._hurry > self._began:
                self._unsettled = True
                return False  # a request waits for a look
            try:
                step()
            except EtcdUnavailable:
                raise  # the others would fare no better
            except IpamError as error:
                log.info("it is tried again with the next look at dockerd: %s", error)
                succeeded = False
        return succeeded

    def _free(self, gone: Gone) -> None:
        held = gone.held
        if not self._is_silent(held, gone.silence, _soon()):
            self._answered[held.lease.token] = time.monotonic()
            return
        if self._pending(held.segment, held.address):
            return
        decide = functools.partial(
            decisions.end_orphan,
            token=held.lease.token,
            carried=any(each.address == held.address for each in self._carried(_soon())),
        )
        claim = self._ledger.claim(_lone(held), held.address)
        self._ledger.change(claim, decide, _soon(), why="Docker does not know its container any more")
        self.results["freed"] += 1
        log.warning(
            "%s of segment %s is free again: Docker does not know %s any more",
            held.address,
            held.segment,
            held.lease.told(),
        )

    def _name(self, naming: Naming) -> None:
        held = naming.held
        decide = functools.partial(
            decisions.name_container, token=held.lease.token, container=naming.container, mac=naming.mac
        )
        claim = self._ledger.claim(_lone(held), held.address)
        self._ledger.change(claim, decide, _soon(), purpose="name", abandon=False)
        self.results["named"] += 1

    def _restore(self, homeless: Homeless) -> None:
        attachment, pool = homeless.attachment, homeless.pool
        if self._pending(pool.segment, attachment.address):
            return
        self._register.ensure_pool(pool, _soon())
        self._claims.ask_for(pool, attachment.address, _soon())  # it may be standby of another host
        container = evidence.container_of(self._last, attachment) if self._last is not None else None
        wrote = False

        def decide(lease: Lease | None, claim: decisions.Claim) -> decisions.Decision:
            nonlocal wrote
            restored = decisions.restore_endpoint(lease, claim, attachment.mac, container, homeless.fixed)
            wrote = isinstance(restored, Lease)
            return restored

        try:
            # Not to be taken back where its outcome is unknown: the container has the address all the same.
            claim = self._ledger.claim(pool, attachment.address)
            self._ledger.change(claim, decide, _soon(), purpose="restore", abandon=False)
        except AddressTaken as error:
            self.results["lost"] += 1
            name = attachment.container or attachment.container_id[:12]
            self._alarm(
                "address_lost",
                f"container {name} of host {self._host} runs with {attachment.address} (network {attachment.network},"
                f" MAC {attachment.mac}), but {error}. Stop that container, or give it another address: docker network"
                f" disconnect {attachment.network} {name}; docker network connect {attachment.network} {name}",
            )
            return
        if wrote:
            self.results["restored"] += 1
            log.warning(
                "%s of segment %s has its lease again: container %s runs with it",
                attachment.address,
                pool.segment,
                attachment.container or attachment.container_id[:12],
            )

    def _correct(self, wrong: evidence.Miscounted) -> None:
        pool = wrong.use.pool
        if self._register.correct_pool(pool, wrong.use.token, wrong.networks, _soon()):
            self.results["pools"] += 1
            log.warning(
                "pool %s is used by %d networks of Docker's, not by %d", pool, wrong.networks, wrong.use.counted
            )

    # ---------------------------------------------------------------------------------------- the wire

    def _is_silent(self, held: Held, needed: Silence, deadline: float) -> bool:
        """Whether the wire says what it has to. Where it cannot be asked, or cannot hear this host's containers, the
        register decides, unless silence has to be proven."""
        try:
            pool = Pool.parse(held.lease.pool)
        except Refused:
            return needed is not Silence.PROVEN
        asked = self._neighbourhood.is_asked(pool)
        if asked and isinstance(self._neighbourhood.wire_of(pool, deadline), str):
            # Where it only cannot be told now which interface that is, the look below says so.
            asked = pool.id not in self._neighbourhood.without_interface([pool])
        elif asked:
            asked = self._neighbourhood.hears_containers(pool)
        if not asked:
            return needed is not Silence.PROVEN
        look = self._neighbourhood.look(pool, held.address, deadline)
        if look.verdict in (Verdict.FREE, Verdict.UNKNOWN):
            return look.verdict is Verdict.FREE or needed is Silence.NOT_ANSWERED
        self._alarm(
            "orphan_answers",
            f"Docker on host {self._host} does not know the container of {held.address} any more (segment"
            f" {held.segment}, {held.lease.told()}), but MAC {look.mac} answers there, so the lease stays. Find that"
            f" machine; when it is gone, the lease goes by itself",
        )
        return False


def _soon() -> float:
    return time.monotonic() + WRITE


def _lone(held: Held) -> Pool:
    """The pool of a lease, for its segment."""
    with contextlib.suppress(Refused):
        pool = Pool.parse(held.lease.pool)
        if pool.segment == held.segment:
            return pool
    return Pool(segment=held.segment, subnet=ipaddress.ip_network(held.address))


def _read_kept(text: str) -> Kept:
    """What cannot be read may have been another engine's, so the next one counts as new."""
    engine, _, since = text.partition(" ")
    when = parse_time(since)
    return Kept(engine, when) if engine and when is not None else Kept(text)


def _time_of(kept: Kept) -> str:
    return rfc3339(datetime.datetime.fromtimestamp(kept.since, datetime.UTC))
