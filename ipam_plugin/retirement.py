"""A host that is gone: since when, whether that is long enough, and which of its addresses may be freed. Pure.

A dead host's leases stay until somebody proves, or an operator says, that nothing uses them any more. What answers on
the wire is never freed here, whoever says what: the machine that answers is the better witness.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import msgspec

from ipam_plugin.decisions import FREE, KEEP, Claim, Decision
from ipam_plugin.model import HELD, ROUTER, STANDBY, Lease, Lost, LostLease, parse_time

LOST_TOLD = 300  # leases in the list for a host that returns
SEEN_AT_LEAST = 600.0  # seconds for which a daemon must have seen a host absent itself before it retires it
QUIET = (STANDBY, HELD)  # kinds that nothing uses, so that silence proves nothing about their owner


class Answer(NamedTuple):
    """What the wire said of an address."""

    silent: bool = False  # nobody answered, on a wire that lives
    mac: str = ""  # who answered
    reason: str = ""  # why nothing is known, as a clause


def must_ask(lease: Lease, force: bool) -> bool:
    """Whether an answer of the wire could change what becomes of the lease."""
    return force or lease.kind not in QUIET


def why_kept(lease: Lease, answer: Answer, own_macs: Collection[str], force: bool) -> str:
    """Why the address of a host that is being retired stays taken, as a clause; '' when it may be freed.

    `own_macs` are those of the host's interfaces. `force`: an operator says that the machine is off.
    """
    if answer.mac:
        own = answer.mac == lease.mac.lower() or answer.mac in own_macs
        whose = "its own" if own else "not the one in the lease"
        return f"a machine answers for it (MAC {answer.mac}, {whose})"
    if force:
        return ""
    if lease.kind in QUIET:
        return f"{lease.kind} is silent by nature, so only --force frees it"
    return "" if answer.silent else f"that it is silent cannot be proven: {answer.reason or 'nobody has asked'}"


def without_host(lease: Lease | None, claim: Claim, host: str, kept_router: bool) -> Decision:
    """An address that several hosts share, when one of them is retired: its part in it goes.

    `kept_router`: it is the segment's own router, whose lease never goes.
    """
    if lease is None or lease.kind != ROUTER:
        return KEEP
    rest = tuple(each for each in lease.holders if each.host != host)
    if rest == lease.holders:
        return KEEP
    return msgspec.structs.replace(lease, holders=rest, change=claim.token) if rest or kept_router else FREE


def is_overdue(absent: str, now: float, seen: float, after: float) -> bool:
    """Whether the policy `retire_after` (seconds) says that a host is gone for good.

    `absent` is since when its heartbeat is missing, as it stands in etcd; `now` seconds since the epoch. A wall clock
    may jump, and then every host that is just being restarted looks long gone: so this daemon must have missed the
    heartbeat itself, for `seen` seconds of a clock that does not jump.
    """
    since = parse_time(absent)
    return since is not None and now - since >= after and seen >= min(after, SEEN_AT_LEAST)


def with_lost(lost: Lost, lease: LostLease) -> Lost:
    """The list for a host that returns, with one lease more; beyond LOST_TOLD the oldest are only counted."""
    leases = (*lost.leases, lease)
    return Lost(leases[-LOST_TOLD:], lost.more + max(0, len(leases) - LOST_TOLD))
