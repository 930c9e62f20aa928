"""PoolIDs, leases and keys: what is written is read again, and whatever else is found there harms nothing."""

from __future__ import annotations

import datetime
import ipaddress
import re
from typing import Any

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ipam_plugin.addresses import range_of, usable_range
from ipam_plugin.errors import BadRequest, PoolUnknown
from ipam_plugin.model import (
    HISTORY_LENGTH,
    KINDS,
    NAME,
    UNREADABLE,
    Alive,
    Container,
    History,
    Holder,
    Host,
    HostAddress,
    Keys,
    Lease,
    Pool,
    PoolUse,
    Reservation,
    SegmentSettings,
    Tenancy,
    decode,
    encode,
    looks_hostile,
    parse_duration,
    parse_time,
    read_lease,
    remember,
    rfc3339,
    segment_and_address,
    segment_and_taken,
)
from properties import containers, leases, names, pools, refusal, texts

MOMENTS = st.datetimes(
    min_value=datetime.datetime(1970, 1, 2), max_value=datetime.datetime(2100, 1, 1), timezones=st.just(datetime.UTC)
)
# Texts that are nearly PoolIDs: the interesting mistakes are small.
JUNK = ("", "/", "..", "/..", " ", "\n", "\0", "%x", ";", "=", "0", ",", ";hold=1", ";probe=off", "٣", "\u202e")


@st.composite
def near_ids(draw: st.DrawFn) -> str:
    text = draw(pools()).id
    place = draw(st.integers(0, len(text)))
    return text[:place] + draw(st.sampled_from(JUNK) | st.text(max_size=3)) + text[place + draw(st.integers(0, 3)) :]


# --- pools ---------------------------------------------------------------------------------------------


@given(pools())
def test_a_pool_id_says_everything(pool: Pool) -> None:
    """A daemon that lost all it had still serves the network from its PoolID alone (section 5)."""
    assert Pool.parse(pool.id) == pool
    assert Pool.parse(pool.id).id == pool.id
    assert not looks_hostile(pool.id)


@given(pools())
def test_the_same_request_gives_the_same_pool_everywhere(pool: Pool) -> None:
    """The PoolID is a function of segment, subnet, range and options, in whatever order those were typed."""
    options = pool.options()
    turned = dict(reversed(options.items()))
    if pool.exclude:
        turned["exclude"] = " ,".join(reversed([str(each) for each in pool.exclude])) + f",{pool.exclude[0]}"
    again = Pool.make(str(pool.subnet), str(pool.range or ""), turned, "another")
    assert again == pool
    assert again.id == pool.id


@given(st.text(max_size=40) | near_ids())
@example("a/fe80::%x\n/64")
@example("a/fe80::%..;/64")
@example("a..b/10.0.0.0/24")
@example("a/10.0.0.0/24;interface=..")
@example("a/10.0.0.0/24;interface=a..b")
@example("a/10.0.0.0/24;hold=٣m")
@example("a/10.0.0.0/24;hold=" + "9" * 400)
@example("a/10.0.0.0/24;exclude=")
@example("a/10.0.0.0/24;gateway=host")
@example("a/10.0.0.0/255.255.255.0")
@example("a/10.0.0.0/24/10.0.0.0/24")
@example("a/10.0.0.0/24;segment=a")
@example("a/::ffff:10.0.0.0/120")
def test_only_the_canonical_spelling_is_a_pool_id(text: str) -> None:
    """A PoolID becomes part of an etcd key: nothing parses that leaves its place, spoils a terminal or has a twin."""
    refused = refusal(PoolUnknown, Pool.parse, text)
    if refused:
        assert "no RequestPool of this plugin ever answered it" in refused
        assert refused.isprintable()
    else:
        assert Pool.parse(text).id == text
        assert ".." not in text
        assert not re.search(r"\s", text)
        assert text.isascii()
        assert text.isprintable()


@given(st.text(max_size=30), st.text(max_size=30), st.dictionaries(st.sampled_from(
    ("segment", "exclude", "gateway", "interface", "probe", "hold", "other")), st.text(max_size=20)))  # fmt: skip
def test_any_request_is_a_pool_or_refused(subnet: str, narrowed: str, options: dict[str, str]) -> None:
    """Nonsense from the command line is a BadRequest with one printable line, never a traceback."""
    for network in (subnet, "10.0.0.0/24"):
        assert refusal(BadRequest, Pool.make, network, narrowed, options, "default").isprintable()


@pytest.mark.parametrize(
    ("subnet", "narrowed", "options", "said"),
    [
        ("10.0.0.5/24", "", {}, "--subnet '10.0.0.5/24' has host bits set; did you mean 10.0.0.0/24?"),
        ("10.0.0.0", "", {}, "--subnet '10.0.0.0' is not a subnet such as 192.168.1.0/24"),
        ("10.0.0.0/24", "10.0.1.0/28", {}, "--ip-range 10.0.1.0/28 does not lie inside --subnet 10.0.0.0/24"),
        ("10.0.0.0/24", "10.0.0.0/23", {}, "--ip-range 10.0.0.0/23 does not lie inside --subnet 10.0.0.0/24"),
        ("10.0.0.0/24", "fd00::/80", {}, "--ip-range fd00::/80 does not lie inside --subnet 10.0.0.0/24"),
        ("10.0.0.0/24", "10.0.0.1/28", {}, "did you mean 10.0.0.0/28?"),
        ("10.0.0.0/24", "", {"gatway": "host"}, "unknown option --ipam-opt 'gatway'; known are segment, exclude,"),
        ("10.0.0.0/24", "", {"gateway": "none"}, "--ipam-opt gateway='none': expected host or router"),
        ("10.0.0.0/24", "", {"probe": "false"}, "--ipam-opt probe='false': expected full or fast or off"),
        ("10.0.0.0/24", "", {"segment": "a/b"}, "--ipam-opt segment='a/b': a segment's name has 1 to 63 letters"),
        ("10.0.0.0/24", "", {"segment": ""}, "a segment's name has 1 to 63 letters"),
        ("10.0.0.0/24", "", {"interface": "br 0"}, "'br 0' is not the name of a network interface"),
        ("10.0.0.0/24", "", {"interface": "x" * 16}, "is not the name of a network interface"),
        ("10.0.0.0/24", "", {"exclude": "10.0.1.1"}, "--ipam-opt exclude: 10.0.1.1 does not lie inside --subnet"),
        ("10.0.0.0/24", "", {"exclude": "ten"}, "--ipam-opt exclude: 'ten' is not an IPv4 or IPv6 address"),
        ("10.0.0.0/24", "", {"hold": "long"}, "--ipam-opt hold: 'long' is not a duration such as 30s, 10m or 24h"),
        ("10.0.0.0/24", "", {"hold": "999999999d"}, "--ipam-opt hold: '999999999d' is longer than 30d"),
        ("224.0.0.0/24", "", {}, "--subnet 224.0.0.0/24 is no subnet that machines of a LAN can have addresses in"),
        ("127.0.0.0/8", "", {}, "--subnet 127.0.0.0/8 is no subnet"),
        ("169.254.0.0/16", "", {}, "--subnet 169.254.0.0/16 is no subnet"),
        ("fe80::/64", "", {}, "--subnet fe80::/64 is no subnet"),
        ("fe80::%eth0/64", "", {}, "--subnet 'fe80::%eth0/64' is not a subnet such as 192.168.1.0/24"),
    ],
)
def test_a_wrong_network_says_what_to_type(subnet: str, narrowed: str, options: dict[str, str], said: str) -> None:
    """P7: the sentence names the option as it is typed at docker network create."""
    with pytest.raises(BadRequest) as caught:
        Pool.make(subnet, narrowed, options, "default")
    assert said in str(caught.value)


@given(pools())
def test_candidates_lie_in_the_range_and_are_usable(pool: Pool) -> None:
    """P2: only what lies in the range, and neither the network nor the broadcast address of the subnet."""
    where, whole = pool.candidates, usable_range(pool.subnet)
    if where.size() > 0:
        assert whole.first <= where.first
        assert where.last <= whole.last
    if pool.range is not None:
        narrowed = range_of(pool.range)
        assert narrowed.first <= where.first
        assert where.last <= narrowed.last


def test_the_reply_has_the_prefix_length_of_the_subnet() -> None:
    """macvlan and ipvlan refuse an endpoint whose mask is not the pool's (section 5)."""
    pool = Pool.make("10.0.0.0/16", "10.0.7.0/24", {}, "default")
    assert pool.cidr(ipaddress.ip_address("10.0.7.9")) == "10.0.7.9/16"
    assert pool.id == "default/10.0.0.0/16/10.0.7.0/24"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("10m", 600), ("1.5h", 5400), ("7d", 604800), ("9", 9), (" 1s ", 1)],
)
def test_durations(text: str, seconds: float) -> None:
    """A number with a unit, or seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-1s", "1e9", "inf", "10 m", "9" * 400, "٣m", "1.s", "1w"])
def test_what_is_no_duration(text: str) -> None:
    """Anything else is refused: neither infinite nor written in digits that only some readers know."""
    with pytest.raises(ValueError, match="is not a duration such as"):
        parse_duration(text)


@given(st.text(max_size=70))
def test_names_stay_in_their_place(text: str) -> None:
    """Hosts' and segments' names become parts of keys: no slash, no `..`, nothing unprintable."""
    if NAME.fullmatch(text):
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,63}", text)
        assert ".." not in text
        assert text[0].isalnum()
        assert text[-1].isalnum()


@pytest.mark.parametrize("text", ["", "..", "../x", "a/../b", "a/.", "a\nb", "a\x1b", "./a"])
def test_hostile_pool_ids(text: str) -> None:
    """A PoolID that tries to leave its key or to spoil a terminal is told apart from one that is merely unknown."""
    assert looks_hostile(text)


# --- values --------------------------------------------------------------------------------------------

tenancies = st.builds(
    Tenancy, kind=st.sampled_from(KINDS), host=texts, mac=texts, container=st.none() | containers, since=texts,
    until=texts, why=texts,
)  # fmt: skip
values = st.one_of(
    leases,
    st.builds(History, past=st.lists(tenancies, max_size=3).map(tuple)),
    st.builds(
        SegmentSettings,
        router=texts | st.lists(texts, max_size=2),
        exclude=st.lists(texts, max_size=2).map(tuple),
        reserved=st.lists(st.builds(Reservation, range=texts, note=texts, by=texts), max_size=2).map(tuple),
        moving=st.lists(texts, max_size=2).map(tuple),
        note=texts,
    ),
    st.builds(
        Host,
        host=texts,
        machine_id=texts,
        addresses=st.lists(st.builds(HostAddress, texts, st.integers(0, 128), texts, texts), max_size=2).map(tuple),
        alarms=st.lists(texts, max_size=2).map(tuple),
    ),
    st.builds(Alive, host=texts, machine_id=texts, boot_id=texts, process=texts, pid=st.integers(0, 2**31)),
    st.builds(PoolUse, texts, texts, texts, options=st.dictionaries(texts, texts, max_size=2), count=st.integers(1, 9)),
)


@given(values)
def test_what_is_written_is_read_again(value: Any) -> None:
    """Every kind of value survives etcd, and stands there on one line (section 4)."""
    stored = encode(value)
    assert decode(stored, type(value)) == value
    assert b"\n" not in stored


json_bytes = st.builds(
    lambda fields: msgspec.json.encode(fields),
    st.dictionaries(
        st.sampled_from(("kind", "host", "mac", "container", "holders", "noted", "token", "new")),
        st.none() | st.integers(-5, 5) | st.sampled_from((*KINDS, UNREADABLE)) | texts | st.lists(texts, max_size=2),
    ),
)


@given(st.binary(max_size=120) | json_bytes)
@example(b"")
@example(b"[" * 100_000)
@example(b'{"kind": "endpoint", "note": "\\ud800"}')
@example(b'{"kind": "endpoint", "noted": ' + b"9" * 5000 + b"}")
@example(b'{"kind": "unreadable"}')
@example("reserviert für den Drucker\n\x1b[2J\u202e".encode())
@example(b"\xff\xfe")
def test_a_lease_key_with_any_value_is_a_lease(stored: bytes) -> None:
    """Any value at all, even junk, means taken: it is read as a known kind or as unreadable, and can be shown."""
    lease = read_lease(stored)
    assert lease.kind in (*KINDS, UNREADABLE)
    assert lease.told()
    encode(lease)
    if lease.kind == UNREADABLE:
        assert lease.told().isprintable()


def test_fields_of_a_newer_version_are_ignored() -> None:
    """A daemon that is one version behind still reads the register."""
    assert read_lease(b'{"kind":"endpoint","host":"a","colour":"red"}') == Lease(kind="endpoint", host="a")


@pytest.mark.parametrize(
    ("lease", "told"),
    [
        (Lease("endpoint", "b", "02:42:0a:00:00:05", Container("web"), since="2025-01-01T00:00:00.000Z"),
         "container web on host b (MAC 02:42:0a:00:00:05) since 2025-01-01T00:00:00.000Z"),
        (Lease("endpoint"), "a container"),
        (Lease("host", "b", "02:00:00:00:00:01", interface="br0"), "Docker host b itself (br0, MAC 02:00:00:00:00:01)"),
        (Lease("host"), "Docker host itself"),
        (Lease("router", holders=(Holder("b", "p"), Holder("a", "p"), Holder("a", "q"))),
         "a router or auxiliary address of host a, b"),
        (Lease("reserved", by="ann", note="printer"), "a reservation by ann: printer"),
        (Lease("conflict", "b", "3c:22:fb:00:00:01"), "a machine that is none of ours (MAC 3c:22:fb:00:00:01)"),
        (Lease("conflict"), "a machine that is none of ours (MAC unknown)"),
        (Lease("standby", "b"), "standby of host b"),
        (Lease("held", "b"), "a hold for a container on host b until an unknown time, stopped"),
        (Lease("held", "b", container=Container("web"), since="2025-01-01T00:00:00.000Z", until="2025-01-01T00:10:00Z"),
         "a hold for container web on host b until 2025-01-01T00:10:00Z, stopped since 2025-01-01T00:00:00.000Z"),
    ],
)  # fmt: skip
def test_a_lease_tells_who_has_it(lease: Lease, told: str) -> None:
    """P7: every refusal names the holder: host, container, MAC, since when."""
    assert lease.told() == told


@given(st.lists(leases, min_size=1, max_size=9), MOMENTS)
def test_history_is_bounded_and_newest_first(ended: list[Lease], now: datetime.datetime) -> None:
    """Nothing in etcd grows without bound (section 8): the last few holders of an address, the newest first."""
    history = History()
    for lease in ended:
        history = remember(history, lease, "released", now)
    assert len(history.past) == min(len(ended), HISTORY_LENGTH)
    assert [each.container for each in history.past] == [each.container for each in reversed(ended)][:HISTORY_LENGTH]
    assert all(each.until == rfc3339(now) and each.why == "released" for each in history.past)


@given(MOMENTS)
def test_times_are_utc_and_are_read_again(moment: datetime.datetime) -> None:
    """RFC 3339, UTC, milliseconds (section 4)."""
    text = rfc3339(moment)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    read = parse_time(text)
    assert read is not None
    assert 0 <= moment.timestamp() - read < 0.001


@given(st.text(max_size=30))
@example("")
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
def test_any_text_is_a_time_or_none(text: str) -> None:
    """A time that somebody wrote by hand may be anything."""
    assert isinstance(parse_time(text), float | None)


# --- keys ----------------------------------------------------------------------------------------------


@given(names, st.ip_addresses())
def test_a_lease_key_names_its_segment_and_address(segment: str, address: Any) -> None:
    """The lease key has no subnet: pools that overlap cannot give one address twice (P1)."""
    assume(address.version == 4 or not address.ipv4_mapped)
    keys = Keys("/p/")
    assert segment_and_taken(keys.lease(segment, address).removeprefix(keys.leases)) == (segment, address)
    assert segment_and_address(keys.past(segment, address).removeprefix(keys.history)) == (segment, address)


@pytest.mark.parametrize("rest", ["lan/010.0.0.5", "lan/10.0.0.5/", "lan/10.0.0.5/printer", "lan/::ffff:10.0.0.5"])
def test_a_key_typed_by_hand_takes_its_address(rest: str) -> None:
    """P2: an address typed in another way by hand still counts as taken (section 4)."""
    assert segment_and_taken(rest) == ("lan", ipaddress.ip_address("10.0.0.5"))


@given(st.text(max_size=30))
def test_any_key_names_an_address_or_nothing(rest: str) -> None:
    """Keys are written by hand as well; one that names no address is a ValueError and nothing else."""
    refusal(ValueError, segment_and_address, rest)
    refusal(ValueError, segment_and_taken, rest)


@given(pools(), names)
def test_keys_of_pools_are_told_apart(pool: Pool, host: str) -> None:
    """The host is what follows the last slash, whatever options the PoolID carries."""
    keys = Keys("/p/")
    assert keys.pool(pool, host).removeprefix(keys.pools).rpartition("/") == (pool.id, "/", host)
