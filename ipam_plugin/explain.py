"""Whose an address is, or why it is not given: all that is known of it, and what follows. Pure.

What the daemons themselves go by is in decisions.py and view.py; here the same is said to a person, with the cure. Of
what only a daemon's memory has (an address that it has heard of lately) nothing is here; the wire can be asked instead.
"""

from __future__ import annotations

import datetime
import enum
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ipam_plugin.addresses import Address, Range, usable_range
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    RESERVED,
    RESTORED_WAIT,
    ROUTER,
    STANDBY,
    UNREADABLE,
    UNUSED,
    Alive,
    Host,
    Lease,
    Pool,
    Restored,
    SegmentSettings,
    Tenancy,
    parse_time,
    rfc3339,
)


class Verdict(enum.Enum):
    TAKEN = "taken"
    REFUSED = "refused"  # nobody has it, and no container is given it
    OUTSIDE = "outside"  # no network chooses it; at most it can be asked for by `--ip`
    IN_USE = "in_use"  # a machine answers for it that the register does not know
    RESTING = "resting"  # it was in use a moment ago
    FREE = "free"


class Local(NamedTuple):
    """What the configuration of this machine says of a segment."""

    exclude: Sequence[Range] = ()
    routers: Sequence[Address] = ()
    cooldown: float = 300.0  # seconds
    probation: float = 86400.0  # seconds


class Journalled(NamedTuple):
    """What the journal of this host has of an address, and etcd not yet."""

    what: Literal["given", "released", "left"]
    lease: Lease | None  # what was given


class Facts(NamedTuple):
    """All that is known of one address in one segment, as it was read."""

    segment: str
    address: Address
    lease: Lease | None = None
    by_hand: Sequence[str] = ()  # keys that take it in another spelling or with others
    settings: SegmentSettings | str | None = None  # a text: why they cannot be read
    hosts: Mapping[str, Host] = {}
    alive: Mapping[str, Alive] = {}
    pools: Sequence[Pool] = ()  # in use in the segment
    past: Sequence[Tenancy] = ()
    local: Local = Local()
    now: float = 0.0  # seconds since the epoch
    restored: Restored | None = None  # etcd went back to an earlier state
    journal: Journalled | None = None
    wire: Sequence[str] | str | None = None  # the MACs that answer; a text: why nobody could be asked; None: not asked


class Explanation(NamedTuple):
    """`headline` says it in one sentence; `reasons` why it is not given though it has no lease; `notes` what else
    there is to say, with the cure."""

    segment: str
    address: Address
    verdict: Verdict
    headline: str
    lease: Lease | None
    reasons: list[str]
    notes: list[str]
    past: Sequence[Tenancy]  # who had it, newest first
    known: bool  # whether this segment, and not every one, has something to say of the address


def explain(facts: Facts) -> Explanation:
    reasons = [*_refusing(facts)]
    outside, never = _of_pools(facts)
    resting = rests_until(facts.past, facts.local.cooldown, facts.now)
    where = f"{facts.address} in segment {facts.segment}"
    given = facts.journal is not None and facts.journal.what == "given"
    if facts.lease is not None or facts.by_hand or given:
        verdict = Verdict.TAKEN
        lease = facts.lease if facts.lease is not None or not given or facts.journal is None else facts.journal.lease
        headline = f"{where} is taken ({lease.kind}): {lease.told()}" if lease else f"{where} is taken by hand:"
    elif reasons or never:
        verdict, headline = Verdict.REFUSED, f"{where} has no lease, and is not given:"
    elif outside:
        verdict, headline = Verdict.OUTSIDE, f"{where} is free, and no network gives it by itself:"
    elif facts.wire and not isinstance(facts.wire, str):
        verdict, headline = Verdict.IN_USE, f"{where} has no lease, and a machine answers for it:"
    elif resting is not None:
        verdict, headline = Verdict.RESTING, f"{where} is free, and rests:"
    else:
        verdict, headline = Verdict.FREE, f"{where} is free"
    if verdict is not Verdict.TAKEN:
        reasons += [*never, *outside]
        if resting is not None:
            reasons.append(
                f"it was in use a moment ago and rests until {_time(resting)}; before that only --ip, or a pool in"
                " which nothing else is left, gives it"
            )
    notes = [*_of_journal(facts), *_of_lease(facts), *_of_hosts(facts), *_of_wire(facts)]
    known = (
        verdict in (Verdict.TAKEN, Verdict.IN_USE, Verdict.RESTING)
        or bool(facts.past)
        or any(facts.address in each.subnet for each in facts.pools)
        or bool(forbidding(facts.segment, facts.settings, facts.address))
        or any(host.segments for host in facts.hosts.values() if carries(host, facts.address, facts.segment))
    )
    return Explanation(facts.segment, facts.address, verdict, headline, facts.lease, reasons, notes, facts.past, known)


def rests_until(past: Sequence[Tenancy], cooldown: float, now: float) -> float | None:
    """Until when an address that was freed is left alone (seconds since the epoch), or None when it is not any more."""
    used = next((each for each in past if each.kind not in UNUSED), None)
    freed = parse_time(used.until) if used is not None else None
    if freed is None:
        return None
    until = min(freed, now) + cooldown
    return until if until > now else None


def forbidding(segment: str, settings: SegmentSettings | str | None, address: Address) -> list[str]:
    """Why the segment's settings keep an address from containers, each as a clause."""
    if settings is None:
        return []
    if isinstance(settings, str):
        return [f"the settings of segment {segment} cannot be read, so nothing is given out in it: {settings}"]
    return [rule.why for rule in settings.rules() if rule.taken.contains(address)]


def own_addresses(segment: str, address: Address, hosts: Mapping[str, Host]) -> list[str]:
    """The Docker hosts of a segment whose interface carries an address, each as a clause."""
    return [
        f"it is an address of Docker host {name} itself ({each.interface})"
        for name, host in sorted(hosts.items())
        if carries(host, address, segment)
        for each in host.addresses
        if each.address == str(address)
    ]


def carries(host: Host, address: Address, segment: str = "") -> bool:
    """Whether a host's record names the address as its own, in this segment ('': in any)."""
    return (not segment or not host.segments or segment in host.segments) and any(
        each.address == str(address) for each in host.addresses
    )


def _refusing(facts: Facts) -> Iterator[str]:
    """Why no container is given it, whichever network asks."""
    if facts.restored is not None:
        since = parse_time(facts.restored.since)
        late = [name for name in sorted(facts.alive) if name in facts.hosts and not _answered(facts, name)]
        if late and since is not None and facts.now - since < RESTORED_WAIT:
            yield (
                f"etcd was restored at {facts.restored.since}, and nothing is given until host {', '.join(late)} has"
                f" written what its containers have, {RESTORED_WAIT:g} s at most"
            )
    yield from forbidding(facts.segment, facts.settings, facts.address)
    for key in facts.by_hand:
        yield f"the etcd key {key!a} takes it"
    yield from own_addresses(facts.segment, facts.address, facts.hosts)
    for each in facts.local.exclude:
        if each.contains(facts.address):
            yield f"the configuration of this machine excludes it ({each})"
    if facts.address in facts.local.routers:
        yield "it is the segment's router, says the configuration of this machine"


def _answered(facts: Facts, host: str) -> bool:
    return facts.restored is not None and facts.hosts[host].restored == facts.restored.token


def _of_pools(facts: Facts) -> tuple[list[str], list[str]]:
    """Why no network in use chooses it: where `--ip` may ask for it all the same (or a new network have it), and where
    it may not. Both are empty when one would choose it."""
    containing = [each for each in facts.pools if facts.address in each.subnet]
    outside: list[str] = []
    never: list[str] = []
    for pool in containing:
        excluded = next((each for each in pool.exclude if each.contains(facts.address)), None)
        if not usable_range(pool.subnet).contains(facts.address):
            never.append(f"it is the network or broadcast address of {pool.subnet}")
        elif excluded is not None:
            never.append(f"--ipam-opt exclude={excluded} keeps it out of pool {pool}")
        elif not pool.candidates.contains(facts.address):
            outside.append(f"it lies outside --ip-range {pool.range} of pool {pool}, where only --ip gives it")
        else:
            return [], []
    if not containing:
        subnets = ", ".join(sorted({str(each.subnet) for each in facts.pools}))
        outside.append(f"no network in use has it in its subnet ({subnets or 'there is none in this segment'})")
    return (outside, []) if outside else ([], list(dict.fromkeys(never)))


def _of_journal(facts: Facts) -> Iterator[str]:
    if facts.journal is None:
        return
    late = "in the journal of this host, while etcd was away; etcd does not have it yet"
    if facts.journal.what == "given" and facts.journal.lease is not None:
        yield f"given to {facts.journal.lease.who()} {late}"
    else:
        yield f"released {late}"


def _of_lease(facts: Facts) -> Iterator[str]:
    lease, address = facts.lease, facts.address
    if lease is None:
        return
    if lease.pool:
        yield f"pool {lease.pool}"
    for holder in lease.holders:
        yield f"used by host {holder.host}, pool {holder.pool}"
    if lease.kind == STANDBY:
        yield f"given to nobody yet: host {lease.host} has it tested and ready for its next container"
    elif lease.kind == HELD:
        yield f"its container gets it again; if that is not to return: ipam-plugin release {address} --force"
    elif lease.kind == CONFLICT:
        since = parse_time(lease.since)
        asked = f"asked again at {_time(since + facts.local.probation)}, and free if silent then; " if since else ""
        yield f"{asked}if that machine is to keep it: ipam-plugin reserve {address}"
        yield f"if that machine is gone: ipam-plugin release {address}"
    elif lease.kind == RESERVED and lease.host:
        name = shlex.quote(lease.container.name) if lease.container and lease.container.name else "CONTAINER"
        option = "--ip6" if address.version == 6 else "--ip"
        yield f"host {lease.host} gives it to that container: docker network connect {option} {address} NETWORK {name}"
    elif lease.kind in (RESERVED, UNREADABLE):
        yield f"free again after: ipam-plugin unreserve {address}"
    elif lease.kind == ROUTER:
        yield "free again when the last network that names it is removed"
    elif lease.kind == HOST:
        yield "it is no container's, and stays with that machine"


def _of_hosts(facts: Facts) -> Iterator[str]:
    """Whether the hosts that have it are alive: who is away cannot give it back."""
    lease = facts.lease
    if lease is None:
        return
    for name in sorted({lease.host, *(each.host for each in lease.holders)} - {""}):
        beat, record = facts.alive.get(name), facts.hosts.get(name)
        if beat is not None:
            yield f"host {name} is alive{f', its daemon runs since {beat.since}' if beat.since else ''}"
        elif record is not None:
            since = f" since {record.absent}" if record.absent else ""
            yield (
                f"host {name} is away{since}, and what it has stays taken until it is back; if it is gone for good:"
                f" ipam-plugin host retire {name}"
            )
        else:
            cure = f"unreserve {facts.address}" if lease.kind == RESERVED else f"release {facts.address} --force"
            yield (
                f"host {name} is not in the register: no daemon serves under that name; when you know that nothing uses"
                f" the address: ipam-plugin {cure}"
            )


def _of_wire(facts: Facts) -> Iterator[str]:
    if facts.wire is None:
        return
    if isinstance(facts.wire, str):
        yield f"the wire could not be asked: {facts.wire}"
    elif not facts.wire:
        yield "nobody answers for it on the wire"
    else:
        known = {facts.lease.mac.lower()} if facts.lease is not None and facts.lease.mac else set()
        hosts = {
            mac.lower(): name
            for name, host in facts.hosts.items()
            for mac in (*host.macs, *(each.mac for each in host.addresses))
        }
        for mac in facts.wire:
            whose = " (the one in the lease)" if mac in known else f" (host {hosts[mac]})" if mac in hosts else ""
            other = facts.lease is not None and facts.lease.kind in (ENDPOINT, HELD, STANDBY) and not whose
            yield f"on the wire MAC {mac} answers for it{whose}" + (": another machine uses it" if other else "")


def _time(seconds: float) -> str:
    return rfc3339(datetime.datetime.fromtimestamp(seconds, datetime.UTC))
