"""What may be taken from a host that is gone: decisions, as values."""

from __future__ import annotations

import datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_plugin import retirement
from ipam_plugin.addresses import parse_address
from ipam_plugin.decisions import FREE, KEEP, Claim
from ipam_plugin.model import (
    ENDPOINT,
    HELD,
    HOST,
    KINDS,
    ROUTER,
    STANDBY,
    Holder,
    Host,
    Lease,
    Lost,
    LostLease,
    Pool,
    decode,
    encode,
    marked_absent,
    rfc3339,
)
from ipam_plugin.retirement import LOST_TOLD, SEEN_AT_LEAST, Answer, is_overdue, must_ask, why_kept, with_lost
from properties import leases, texts

POOL = Pool.make("192.168.1.0/24", "", {}, "default")
CLAIM = Claim("living", POOL, parse_address("192.168.1.5"), "2026-11-22T10:00:00.000Z", "new")
macs = st.sampled_from(("", "02:00:00:00:00:01", "02:00:00:00:00:02"))
answers = st.one_of(
    st.just(Answer(silent=True)),
    macs.filter(bool).map(lambda mac: Answer(mac=mac)),
    st.sampled_from(("no carrier", "")).map(lambda reason: Answer(reason=reason)),
)


@given(st.sampled_from(KINDS), macs, answers, st.booleans())
def test_what_answers_is_never_freed(kind: str, mac: str, answer: Answer, force: bool) -> None:
    """Section 8: freed by proof, or by an operator's word that the machine is off; against an answer neither counts."""
    why = why_kept(Lease(kind=kind, host="gone", mac=mac), answer, ["02:00:00:00:00:02"], force)
    if answer.mac:
        assert answer.mac in why
    elif force:
        assert why == ""
    else:
        assert (why == "") == (answer.silent and kind not in (STANDBY, HELD))
    assert why.isprintable()


@pytest.mark.parametrize(
    ("lease_mac", "answer_mac", "own"),
    [
        ("02:00:00:00:00:01", "02:00:00:00:00:01", True),
        ("02:00:00:00:00:0A", "02:00:00:00:00:0a", True),
        ("02:00:00:00:00:01", "02:00:00:00:00:02", True),  # the host's own: a container on ipvlan
        ("02:00:00:00:00:01", "02:00:00:00:00:03", False),
    ],
)
def test_whose_answer_it_is(lease_mac: str, answer_mac: str, own: bool) -> None:
    """The operator reads whether the container runs, or another machine took the address."""
    said = why_kept(Lease(kind=ENDPOINT, mac=lease_mac), Answer(mac=answer_mac), ["02:00:00:00:00:02"], True)
    assert ("its own" in said) == own


@given(st.sampled_from(KINDS), answers)
def test_who_is_not_asked_is_kept_all_the_same(kind: str, answer: Answer) -> None:
    """An address for which the wire is not asked stays, whatever it would have said."""
    if not must_ask(Lease(kind=kind), False):
        assert why_kept(Lease(kind=kind), answer, [], False)
    assert must_ask(Lease(kind=kind), True)


@given(leases, st.booleans())
def test_a_share_goes_and_no_other(lease: Lease, kept_router: bool) -> None:
    """Of what several hosts share only the retired one's part goes; with the last part the lease, the segment's own
    router's never."""
    gone = lease.holders[0].host if lease.holders else "gone"
    decided = retirement.without_host(lease, CLAIM, gone, kept_router)
    rest = tuple(each for each in lease.holders if each.host != gone)
    if lease.kind != ROUTER or not lease.holders:
        assert decided is KEEP
    elif rest or kept_router:
        assert decided == msgspec.structs.replace(lease, holders=rest, change="new")
    else:
        assert decided is FREE


def test_the_share_of_all_its_pools() -> None:
    """A host that used a router for two networks has no part in it afterwards."""
    holders = (Holder("gone", "p1"), Holder("living", "p1"), Holder("gone", "p2", 3))
    decided = retirement.without_host(Lease(kind=ROUTER, holders=holders), CLAIM, "gone", False)
    assert isinstance(decided, Lease)
    assert decided.holders == (Holder("living", "p1"),)
    assert retirement.without_host(None, CLAIM, "gone", False) is KEEP


seconds = st.floats(0, 1e6)


@given(seconds, seconds, st.floats(600, 1e6))
def test_who_is_overdue(absent: float, seen: float, after: float) -> None:
    """Both clocks must say so: the one that was written down, and this daemon's own, which does not jump."""
    now = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC).timestamp()
    told = rfc3339(datetime.datetime.fromtimestamp(now - absent, datetime.UTC))
    overdue = is_overdue(told, now, seen, after)
    if absent < after - 0.01 or seen < min(after, SEEN_AT_LEAST):
        assert not overdue
    if absent > after + 0.01 and seen >= SEEN_AT_LEAST:
        assert overdue


def test_a_wall_clock_that_jumps_retires_nobody() -> None:
    """A year ahead at once, every host that is just being restarted would be gone for good."""
    assert not is_overdue("2026-11-22T10:00:00.000Z", 1e12, 30.0, 600.0)
    assert not is_overdue("yesterday", 1e12, 1e6, 600.0)
    assert not is_overdue("", 1e12, 1e6, 600.0)


@given(st.integers(0, 2 * LOST_TOLD + 5))
def test_what_was_lost_is_bounded_and_counted(count: int) -> None:
    """A host with thousands of addresses does not make a value that etcd refuses, and none is lost uncounted."""
    lost = Lost()
    for number in range(count):
        lost = with_lost(lost, LostLease("default", f"10.0.{number // 250}.{number % 250}", ENDPOINT, "t", "now"))
    assert len(lost.leases) + lost.more == count
    assert len(lost.leases) <= LOST_TOLD
    assert len(encode(lost)) < 100_000


@given(texts, st.dictionaries(texts, st.integers(), max_size=3))
def test_a_record_keeps_what_this_version_does_not_know(version: str, more: dict[str, int]) -> None:
    """A living daemon writes one word into another host's record, which may be a newer version's."""
    record = {**more, "host": "b", "version": version, "macs": ["02:00:00:00:00:01"]}
    for name in ("machine_id", "joined", "addresses", "segments", "alarms", "absent"):
        record.pop(name, None)
    marked = marked_absent(msgspec.json.encode(record), "2026-11-22T10:00:00.000Z")
    assert msgspec.json.decode(marked) == {**record, "absent": "2026-11-22T10:00:00.000Z"}
    assert decode(marked, Host).absent == "2026-11-22T10:00:00.000Z"


@pytest.mark.parametrize("junk", [b"", b"[]", b'{"version": 1}', b"\xff"])
def test_what_is_no_record_is_not_marked(junk: bytes) -> None:
    """What cannot be read is never overwritten."""
    with pytest.raises(ValueError, match=r"\S"):
        marked_absent(junk, "now")


def test_a_bridge_that_answers() -> None:
    """A host's own address is like a container's: silent it goes, answering it stays."""
    lease = Lease(kind=HOST, host="gone", mac="02:00:00:00:00:01")
    assert why_kept(lease, Answer(silent=True), [], False) == ""
    assert "its own" in why_kept(lease, Answer(mac="02:00:00:00:00:01"), [], False)
    assert "cannot be proven: no carrier" in why_kept(lease, Answer(reason="no carrier"), [], False)
