"""Ranges and sets of addresses, against sets of numbers and a search by trying every number."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_plugin.addresses import (
    BITS,
    AddressSet,
    Range,
    address_of,
    next_outside,
    parse_address,
    parse_network,
    parse_range,
    range_of,
    usable_range,
)
from properties import refusal

SMALL = st.integers(0, 60)
runs = st.tuples(SMALL, SMALL).map(lambda ends: (min(ends), max(ends)))
edits = st.lists(st.tuples(st.booleans(), runs), max_size=25)


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    version = draw(st.sampled_from((4, 6)))
    # Below 2**40 an IPv6 address is no IPv4-mapped one, which is read as IPv4.
    top = 2**32 - 1 if version == 4 else draw(st.sampled_from((2**40, 2**128 - 1)))
    base = 0 if top != 2**128 - 1 else 0x2001 << 112
    ends = sorted(draw(st.tuples(st.integers(base, top), st.integers(base, top) | st.just(base))))
    return Range(version, ends[0], ends[1])


def built(steps: list[tuple[bool, tuple[int, int]]]) -> tuple[AddressSet, set[int]]:
    """The same edits done to an AddressSet and to a plain set."""
    tested, naive = AddressSet(), set[int]()
    for add, (first, last) in steps:
        if add:
            tested.add(first, last)
            naive |= set(range(first, last + 1))
        else:
            tested.discard(first, last)
            naive -= set(range(first, last + 1))
    return tested, naive


# --- sets ----------------------------------------------------------------------------------------------


@given(edits, runs, SMALL)
def test_a_set_of_runs_is_a_set(steps: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int], start: int) -> None:
    """After any edits an AddressSet has exactly the members that a plain set has, and counts them alike."""
    tested, naive = built(steps)
    assert {number for number in range(-1, 70) if number in tested} == naive
    assert len(tested) == len(naive)
    assert tested.count(*asked) == len(naive & set(range(asked[0], asked[1] + 1)))
    assert tested.next_absent(start) == next(number for number in range(start, 100) if number not in naive)


@given(edits)
def test_runs_are_sorted_and_apart(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    """Runs neither touch nor overlap: the binary searches rest on it, and so does the size in memory."""
    found = list(built(steps)[0])
    assert all(first <= last for first, last in found)
    assert all(before[1] + 1 < after[0] for before, after in itertools.pairwise(found))


@given(st.lists(edits, max_size=4), SMALL, SMALL)
def test_next_outside_is_the_first_number_in_none(
    steps: list[list[tuple[bool, tuple[int, int]]]], start: int, last: int
) -> None:
    """The number found is the lowest one that no set has; None means that there is none."""
    pairs = [built(each) for each in steps]
    expected = next((n for n in range(start, last + 1) if not any(n in naive for _, naive in pairs)), None)
    assert next_outside([tested for tested, _ in pairs], start, last) == expected


class Counted(AddressSet):
    """Counts the questions."""

    asked = 0

    def next_absent(self, start: int) -> int:
        Counted.asked += 1
        return super().next_absent(start)


@pytest.mark.parametrize(
    ("first", "size", "used"),
    [(10 << 24, 2**24, 0), (10 << 24, 2**24, 2**24 - 2), (0xFD << 120, 2**64, 5 * 10**6), (0xAC100000, 2**16, 64_880)],
)
def test_the_next_free_address_costs_the_same_in_any_pool(first: int, size: int, used: int) -> None:
    """Section 6: no work that grows with the pool. An empty /8, a full one, a /64 and a /16 that is 99 % full."""
    taken, none = Counted([(first, first + used - 1)] if used else []), Counted()
    Counted.asked = 0
    assert next_outside((taken, none), first, first + size - 1) == first + used
    assert Counted.asked <= 4
    assert len(list(taken)) <= 1


def test_a_16_with_holes_is_searched_by_runs() -> None:
    """A /16 of which every hundredth address is free has 656 runs; the next free one is two questions away."""
    first = 0xAC100000
    taken = Counted((n, n + 98) for n in range(first, first + 2**16, 100))
    Counted.asked = 0
    assert next_outside((taken, Counted()), first + 32_000, first + 2**16 - 1) == first + 32_099
    assert Counted.asked <= 4


# --- texts ---------------------------------------------------------------------------------------------


@given(ranges())
def test_a_range_is_read_as_it_is_written(one: Range) -> None:
    """Format and parse are inverse: an exclude list becomes part of a PoolID and is read again from it."""
    assert parse_range(str(one)) == one


@given(ranges())
def test_a_range_contains_its_ends_and_not_its_neighbours(one: Range) -> None:
    """Both ends belong to a range, and an address of the other IP version never does."""
    assert one.contains(address_of(one.version, one.first))
    assert one.contains(address_of(one.version, one.last))
    if one.last + 1 < 2 ** BITS[one.version]:
        assert not one.contains(address_of(one.version, one.last + 1))
    if one.first > 0:
        assert not one.contains(address_of(one.version, one.first - 1))
    assert not one.contains(address_of(10 - one.version, one.first % 2**32))
    assert one.size() == one.last - one.first + 1


@given(st.text(max_size=60) | st.from_regex(r"[0-9a-f:.%/ -]{1,40}", fullmatch=True))
def test_any_text_is_an_address_or_a_sentence(text: str) -> None:
    """What a person types is read or refused with one printable line, never with another error."""
    for read in (parse_address, parse_range, parse_network):
        assert refusal(ValueError, read, text).isprintable()


@given(st.ip_addresses(v=4), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_leading_zeros_are_decimal(address: ipaddress.IPv4Address, zeros: list[int]) -> None:
    """010.0.0.5 is 10.0.0.5, for whoever pads numbers; in no case it is the octal 8.0.0.5."""
    typed = ".".join("0" * more + part for more, part in zip(zeros, str(address).split("."), strict=True))
    assert parse_address(f" {typed}\n") == address


@given(st.ip_addresses(v=6))
def test_any_spelling_of_ipv6_is_the_same_address(address: ipaddress.IPv6Address) -> None:
    """RFC 5952 is how addresses are written here, not how they have to be typed."""
    expected = address.ipv4_mapped or address
    assert parse_address(address.exploded.upper()) == expected
    assert parse_address(str(address)) == expected


def test_an_ipv4_mapped_address_is_the_ipv4_address() -> None:
    """P1: ::ffff:10.0.0.5 is written in two ways by different Pythons, and is 10.0.0.5 on the wire: one key for it."""
    assert parse_address("::ffff:10.0.0.5") == parse_address("::ffff:a00:5") == ipaddress.ip_address("10.0.0.5")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not an IPv4 or IPv6 address"),
        ("10.0.0", "'10.0.0' is not an IPv4 or IPv6 address"),
        ("10.0.0.256", "'10.0.0.256' is not an IPv4 or IPv6 address"),
        ("10.0.0.५", "'10.0.0.५' is not an IPv4 or IPv6 address"),
        ("fe80::1%eth0", "'fe80::1%eth0' has a zone; write the address without it"),
        ("10.0.0.9-10.0.0.1", "'10.0.0.9-10.0.0.1' ends before it begins"),
        ("10.0.0.1-fd00::1", "'10.0.0.1-fd00::1' mixes IPv4 and IPv6"),
        ("10.0.0.5/24", "'10.0.0.5/24' has host bits set; did you mean 10.0.0.0/24?"),
        ("10.0.0.0/33", "'10.0.0.0/33' is not a CIDR such as 192.168.1.0/28"),
        ("fe80::%x\n/64", "'fe80::%x\\n/64' is not a CIDR such as 192.168.1.0/28"),
        ("::ffff:10.0.0.0/120", "'::ffff:10.0.0.0/120' is not a CIDR such as 192.168.1.0/28"),
    ],
)
def test_what_is_no_range_is_refused_with_the_reason(text: str, said: str) -> None:
    """P7: the sentence shows what was typed and, where it can be guessed, what was meant."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_range(text)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("subnet", "expected"),
    [
        ("10.0.0.0/24", "10.0.0.1-10.0.0.254"),
        ("10.0.0.0/30", "10.0.0.1-10.0.0.2"),
        ("10.0.0.0/31", "10.0.0.0/31"),
        ("10.0.0.7/32", "10.0.0.7"),
        ("fd00::/126", "fd00::1-fd00::3"),
        ("fd00::/127", "fd00::/127"),
        ("fd00::7/128", "fd00::7"),
    ],
)
def test_network_and_broadcast_address_are_no_machines(subnet: str, expected: str) -> None:
    """P2: neither they nor the subnet-router anycast address; a /31, /127 and single addresses have none."""
    assert str(usable_range(ipaddress.ip_network(subnet))) == expected


@given(st.integers(0, 32), st.integers(0, 2**32 - 1))
def test_the_usable_range_lies_in_the_subnet_and_is_never_empty(length: int, number: int) -> None:
    """Every subnet, whatever its length, has a usable address, and all of them are its own."""
    subnet = ipaddress.ip_network((number, length), strict=False)
    usable, whole = usable_range(subnet), range_of(subnet)
    assert whole.first <= usable.first <= usable.last <= whole.last
    assert whole.size() - usable.size() in (0, 2)
