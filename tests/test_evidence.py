"""What follows from dockerd's own list: each fence, with what would happen to a living container without it."""

from __future__ import annotations

import datetime
import ipaddress
from typing import Any

import msgspec
import pytest

from ipam_plugin import evidence
from ipam_plugin.evidence import (
    APART,
    SETTLED,
    Attachment,
    Findings,
    Held,
    Kept,
    Known,
    Look,
    Memory,
    Network,
    Silence,
    Use,
)
from ipam_plugin.model import ENDPOINT, Container, Lease, Pool, rfc3339

NOW = 1_800_000_000.0
GRACE = 300.0
MINE = ipaddress.ip_address("10.0.0.5")
POOL = Pool.make("10.0.0.0/24", "", {}, "default")
LAN = Network("n1", "lan", "bridge", (("10.0.0.0/24", ""),), {})
WEB = Attachment("n1", "lan", MINE, "02:42:0a:00:00:05", "c1", "web", "")
OTHER = Attachment("n1", "lan", ipaddress.ip_address("10.0.0.9"), "02:42:0a:00:00:09", "c9", "other", "")
KEPT = Kept("E", 0.0)


def at(seconds: float) -> str:
    return rfc3339(datetime.datetime.fromtimestamp(NOW + seconds, datetime.UTC))


def held(since: float = -1000.0, segment: str = "default", **changes: Any) -> Held:
    lease = Lease(kind=ENDPOINT, host="h", mac=WEB.mac, pool=POOL.id, since=at(since), token="t")
    return Held(segment, MINE, msgspec.structs.replace(lease, **changes))


def look(began: float, *attachments: Attachment, engine: str = "E", **more: Any) -> Look:
    told: dict[str, Any] = {
        "networks": (LAN,),
        "elsewhere": frozenset(),
        "containers": {each.container_id: Known(each.container, "nginx", True, frozenset()) for each in attachments},
    }
    told.update(more)
    return Look(began=began, ended=began + 0.1, engine=engine, attachments=attachments, **told)


def compare(
    *looks: Look,
    leases: tuple[Held, ...] = (),
    uses: tuple[Use, ...] = (Use(POOL, 1, "p"),),
    seen: bool = True,
    kept: Kept = KEPT,
    pending: bool = False,
    grace: float = GRACE,
) -> Findings:
    """What follows from the last of these looks."""
    memory, findings = Memory(), Findings()
    for each in looks:
        findings, memory = evidence.compare(
            each,
            leases,
            uses,
            memory,
            seen=lambda held: seen,
            kept=kept,
            grace=grace,
            now=NOW,
            default_segment="default",
            pending=lambda segment, address: pending,
        )
    return findings


TWICE = (look(0, OTHER), look(APART, OTHER))


def test_a_container_that_vanished_is_noticed() -> None:
    """libnetwork#1207: the address stays taken after a crash of the engine, for ever."""
    [gone] = compare(*TWICE, leases=(held(),)).gone
    assert (gone.held.address, gone.silence) == (MINE, Silence.NOT_ANSWERED)


@pytest.mark.parametrize(
    ("what", "findings"),
    [
        ("one look", lambda: compare(look(0, OTHER), leases=(held(),))),
        ("two at once", lambda: compare(look(0, OTHER), look(APART - 0.1, OTHER), leases=(held(),))),
        ("shown by the second", lambda: compare(look(0, OTHER), look(APART, WEB), leases=(held(),))),
        (
            "shown in between",
            lambda: compare(look(0, OTHER), look(20, WEB), look(APART, OTHER), leases=(held(),)),
        ),
        (
            "on another network",
            lambda: compare(
                look(0, OTHER, elsewhere=frozenset({MINE})),
                look(APART, OTHER, elsewhere=frozenset({MINE})),
                leases=(held(),),
            ),
        ),
        ("young", lambda: compare(*TWICE, leases=(held(since=-GRACE + 1),))),
        ("the clock went back", lambda: compare(*TWICE, leases=(held(since=+1000),))),
        ("given after the look began", lambda: compare(*TWICE, leases=(held(),), seen=False)),
        ("in the journal", lambda: compare(*TWICE, leases=(held(),), pending=True)),
        ("another engine", lambda: compare(*TWICE, leases=(held(),), kept=Kept("F"))),
        (
            "one look of each of two engines",
            lambda: compare(look(0, OTHER, engine="F"), look(APART, OTHER), leases=(held(),)),
        ),
        (
            "empty, from another engine",
            lambda: compare(look(0, engine="F"), look(APART, engine="F"), leases=(held(),)),
        ),
    ],
)
def test_fences(what: str, findings: Any) -> None:
    """whereabouts#176: a reconciler that frees a living container's address."""
    assert findings().gone == (), what


def test_the_token_is_the_one_of_the_first_look() -> None:
    """Given again between the two looks, it is another container's."""
    first, memory = evidence.compare(
        look(0, OTHER), [held()], [], Memory(), seen=lambda _: True, kept=KEPT, grace=0, now=NOW,
        default_segment="default", pending=lambda *_: False,
    )  # fmt: skip
    second, _ = evidence.compare(
        look(APART, OTHER), [held(token="u")], [], memory, seen=lambda _: True, kept=KEPT, grace=0, now=NOW,
        default_segment="default", pending=lambda *_: False,
    )  # fmt: skip
    assert first.gone == second.gone == ()


def test_two_engines_do_not_make_two_looks() -> None:
    """The one that counted before missed it once, and the one that counts now did: neither did twice."""
    memory = Memory()
    for began, engine in ((0.0, "E"), (APART, "F")):
        findings, memory = evidence.compare(
            look(began, OTHER, WEB._replace(address=ipaddress.ip_address("10.0.0.6")), engine=engine), [held()], [],
            memory, seen=lambda _: True, kept=Kept(engine), grace=0, now=NOW, default_segment="default",
            pending=lambda *_: False,
        )  # fmt: skip
        assert findings.gone == findings.homeless == ()


def test_a_lease_without_a_usable_time_waits_as_long() -> None:
    """Its clock was set meanwhile: what was seen for the grace is old enough, and needs the wire's proof."""
    assert compare(*TWICE, leases=(held(since=1000),)).gone == ()
    [gone] = compare(look(0, OTHER), look(GRACE, OTHER), leases=(held(since=1000),)).gone
    assert gone.held.address == MINE
    [gone] = compare(look(0, OTHER), look(GRACE, OTHER), leases=(held(token="t"),)).gone
    assert gone.silence is Silence.NOT_ANSWERED


def test_zero_pods_after_a_restart() -> None:
    """aws/amazon-vpc-cni-k8s#711: an empty answer needs the wire's word, too; one of before another engine, proof."""
    [gone] = compare(look(0), look(APART), leases=(held(),)).gone
    assert gone.silence is Silence.WHERE_ASKED
    changed = Kept("E", NOW - 500)
    [gone] = compare(*TWICE, leases=(held(since=-1000),), kept=changed).gone
    assert gone.silence is Silence.PROVEN
    [gone] = compare(*TWICE, leases=(held(since=-400),), kept=changed).gone
    assert gone.silence is Silence.NOT_ANSWERED


def test_which_engine_counts() -> None:
    assert Kept().after(look(0, networks=()), NOW) == Kept()
    assert Kept().after(look(0), NOW) == Kept("E")
    assert Kept("E").after(look(0, engine="F"), NOW) == Kept("E")  # it shows nothing of ours
    assert Kept("E").after(look(0, WEB, engine="F"), NOW) == Kept("F", NOW)
    assert Kept("E", 5.0).after(look(0, WEB), NOW) == Kept("E", 5.0)


def test_a_segment_is_told_by_its_network() -> None:
    """The same address in another segment is another machine's; a network that names none may be in any."""
    lab = LAN._replace(options={"segment": "lab"})
    elsewhere = (look(0, WEB, networks=(lab,)), look(APART, WEB, networks=(lab,)))
    assert len(compare(*elsewhere, leases=(held(),)).gone) == 1
    assert compare(look(0, WEB), look(APART, WEB), leases=(held(segment="lab"),)).gone == ()


def test_names_follow_docker() -> None:
    [naming] = compare(look(0, WEB), leases=(held(mac=""),)).namings
    assert naming.container == Container(name="web", id="c1", image="nginx", network="lan")
    assert naming.mac == WEB.mac
    assert compare(look(0, WEB), leases=(held(container=naming.container),)).namings == ()
    assert compare(look(0, WEB, containers={}), leases=(held(),)).namings == ()  # it has just begun


def test_a_container_without_a_lease_is_seen_twice() -> None:
    """One that is just being stopped must not get a lease back."""
    first = compare(look(0, WEB))
    assert first.homeless == ()
    assert first.unsettled
    assert compare(look(0, WEB), look(SETTLED - 0.1, WEB)).homeless == ()
    [homeless] = compare(look(0, WEB), look(SETTLED, WEB)).homeless
    assert (homeless.attachment, homeless.pool) == (WEB, POOL)
    assert compare(look(0, WEB), look(1, OTHER), look(SETTLED, WEB)).homeless == ()
    assert compare(look(0, WEB), look(SETTLED, WEB), pending=True).homeless == ()
    assert compare(look(0, WEB), look(SETTLED, WEB), leases=(held(),)).homeless == ()
    again = WEB._replace(mac="02:42:00:00:00:99")
    assert compare(look(0, WEB), look(SETTLED, again)).homeless == ()  # another start of it


def test_what_stays_out_of_order_is_not_hurried_for_ever() -> None:
    assert not compare(look(0, WEB), look(evidence.HURRIED, WEB)).unsettled


@pytest.mark.parametrize(("counted", "networks"), [(2, 1), (1, 0), (1, 2)])
def test_pools_are_counted(counted: int, networks: int) -> None:
    shown = tuple(LAN._replace(id=f"n{number}") for number in range(networks))
    looks = [look(began, networks=shown) for began in (0.0, GRACE - 1, GRACE)]
    uses = (Use(POOL, counted, "p"),)
    assert compare(*looks[:2], uses=uses).miscounted == ()
    [wrong] = compare(*looks, uses=uses).miscounted
    assert wrong.networks == networks
    assert compare(*looks, uses=uses, kept=Kept("F")).miscounted == ()
    assert compare(*looks, uses=(Use(POOL, networks, "p"),)).miscounted == ()


def test_a_pool_that_is_used_without_a_key() -> None:
    assert compare(look(0), look(SETTLED), uses=()).unknown == (POOL,)
    assert compare(look(0), look(SETTLED)).unknown == ()
