"""Was every promise about holders kept? Decided from a recorded history, and from what stands in etcd at the end.

Pure. Operations overlap, and each took effect at some moment between `began` and `ended`, if at all. Only what is
certain is held against the register: a holder has its address for certain from the moment the grant was answered
until the moment its release was sent. Two holders of one address whose certain times overlap cannot be explained by
any order of events.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


class Outcome(enum.Enum):
    """What the client was told."""

    OK = "ok"
    REFUSED = "refused"  # nothing was to remain of it
    UNKNOWN = "unknown"  # no answer came, or one that says so: it may have happened, or happen yet


@dataclass(frozen=True)
class Operation:
    """One request of a client. Times are seconds of one clock."""

    what: Literal["grant", "release"]
    holder: str  # one name for one grant, and for the release of what it gave
    began: float
    ended: float
    outcome: Outcome
    address: str = ""  # '' for a grant that gave none that the client knows of


def violations(operations: Iterable[Operation], final: Mapping[str, str]) -> list[str]:
    """A sentence for each thing that should not be; [] when the history can be explained.

    `final`: address -> holder, as it stands in etcd after everything has come to rest.
    """
    grants: dict[str, Operation] = {}
    releases: dict[str, list[Operation]] = {}
    found = []
    for each in operations:
        if each.what == "release":
            releases.setdefault(each.holder, []).append(each)
        elif each.holder in grants:
            found.append(f"{each.holder} asked twice: the history itself is wrong")
        else:
            grants[each.holder] = each
    found += [f"{holder} released what it never asked for" for holder in releases if holder not in grants]
    held = [each for each in grants.values() if each.outcome is Outcome.OK]
    found += _two_holders(held, releases)
    found += _lost(held, releases, final)
    found += _unexplained(grants, releases, final)
    return found


def _until(holder: str, releases: Mapping[str, list[Operation]]) -> float:
    """Until when the holder has its address for certain. A release that was refused ends nothing."""
    sent = (each.began for each in releases.get(holder, ()) if each.outcome is not Outcome.REFUSED)
    return min(sent, default=math.inf)


def _two_holders(held: Iterable[Operation], releases: Mapping[str, list[Operation]]) -> list[str]:
    by_address: dict[str, list[tuple[float, float, str]]] = {}
    for each in held:
        by_address.setdefault(each.address, []).append((each.ended, _until(each.holder, releases), each.holder))
    found = []
    for address, times in by_address.items():
        longest, first = -math.inf, ""
        # A time that is empty (released before the grant was answered) overlaps nothing.
        for since, until, second in sorted(time for time in times if time[0] < time[1]):
            if since < longest:
                found.append(f"{address} had two holders, {first} and {second}, from {since:.3f} on")
            if until > longest:
                longest, first = until, second
    return found


def _lost(
    held: Iterable[Operation], releases: Mapping[str, list[Operation]], final: Mapping[str, str]
) -> Iterable[str]:
    for each in held:
        if _until(each.holder, releases) == math.inf and final.get(each.address) != each.holder:
            now = final.get(each.address)
            where = f"etcd says {now} has it" if now else "it is not in etcd"
            yield f"{each.address} was given to {each.holder} and never released, but {where}"


def _unexplained(
    grants: Mapping[str, Operation], releases: Mapping[str, list[Operation]], final: Mapping[str, str]
) -> Iterable[str]:
    for address, holder in final.items():
        grant = grants.get(holder)
        if grant is None:
            yield f"{address} is {holder}'s in etcd, who never asked"
        elif grant.outcome is Outcome.REFUSED:
            yield f"{address} is {holder}'s in etcd, whose request was refused"
        elif grant.outcome is Outcome.OK and grant.address != address:
            yield f"{address} is {holder}'s in etcd, who was given {grant.address}"
        elif any(each.outcome is Outcome.OK for each in releases.get(holder, ())):
            yield f"{address} is {holder}'s in etcd, although its release was acknowledged"
