"""Ranges and sets of addresses. Pure; knows nothing of leases, etcd or Docker.

Addresses are integers here (an IPv4 and an IPv6 address never share a set), because choosing the next
free one must cost the same in an empty /24, a nearly full /16 and an IPv6 /64: a set is a sorted list of
disjoint runs, and every question is a binary search.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

BITS = {4: 32, 6: 128}


class Range(NamedTuple):
    """Addresses `first` to `last`, both included, of IP version 4 or 6."""

    version: int
    first: int
    last: int

    def __str__(self) -> str:
        first, last = address_of(self.version, self.first), address_of(self.version, self.last)
        if self.first == self.last:
            return str(first)
        blocks = list(ipaddress.summarize_address_range(first, last))
        return str(blocks[0]) if len(blocks) == 1 else f"{first}-{last}"

    def contains(self, address: Address) -> bool:
        return address.version == self.version and self.first <= int(address) <= self.last

    def size(self) -> int:
        return self.last - self.first + 1


def address_of(version: int, number: int) -> Address:
    """The address with this number, IPv4 or IPv6."""
    return ipaddress.IPv4Address(number) if version == 4 else ipaddress.IPv6Address(number)


def range_of(network: Network) -> Range:
    """All addresses of a network, its network and broadcast address included."""
    return Range(network.version, int(network.network_address), int(network.broadcast_address))


def parse_address(text: str) -> Address:
    """An address as a person may type it: leading zeros in IPv4 are decimal, any spelling of IPv6 goes.

    An IPv4 address written as an IPv6 one (`::ffff:10.0.0.5`) is that IPv4 address. A zone (`%eth0`)
    is refused: an address here is one of the whole segment. Raises ValueError with a sentence.
    """
    try:
        return ipaddress.IPv4Address(text)  # as nearly all are written; what follows takes three times as long
    except ValueError:
        text = text.strip()
    if text.count(".") == 3 and ":" not in text:
        text = ".".join(
            part.lstrip("0") or "0" if part.isascii() and part.isdigit() else part for part in text.split(".")
        )
    if "%" in text:
        raise ValueError(f"{shown(text)} has a zone; write the address without it")
    try:
        address = ipaddress.ip_address(text)
        return (address.ipv4_mapped if address.version == 6 else None) or address
    except ValueError:
        raise ValueError(f"{shown(text)} is not an IPv4 or IPv6 address") from None


_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def address_or_none(text: str) -> Address | None:
    """The same of a text that somebody else wrote: None where it is no address."""
    try:
        return parse_address(text)
    except ValueError:
        return None


def parse_network(text: str, expected: str = "a subnet such as 192.168.1.0/24") -> Network:
    """A CIDR without host bits. Raises ValueError with a sentence.

    The standard library would let any text pass as the zone of an IPv6 network, and writes IPv4-mapped addresses
    one way up to Python 3.12 and another way since: the same address would have two keys.
    """
    network = None
    try:
        if "/" in text and "%" not in text:
            network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        pass
    if network is None or (network.version == 6 and network.overlaps(_MAPPED)):
        raise ValueError(f"{shown(text)} is not {expected}")
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{shown(text)} has host bits set; did you mean {network}?") from None


def shown(text: str) -> str:
    """What somebody typed, for a sentence: quoted, of bounded length."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def printable(text: str) -> str:
    """The text on one line, without what could steer a terminal or forge a line of a log, `?` in its place: what stands
    in etcd may be anybody's.
    """
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def parse_range(text: str) -> Range:
    """An address, `FIRST-LAST` or a CIDR. Raises ValueError with a sentence."""
    text = text.strip()
    if "/" in text:
        return range_of(parse_network(text, "a CIDR such as 192.168.1.0/28"))
    if "-" in text:
        low, _, high = text.partition("-")
        first, last = parse_address(low), parse_address(high)
        if first.version != last.version:
            raise ValueError(f"{shown(text)} mixes IPv4 and IPv6")
        if int(first) > int(last):
            raise ValueError(f"{shown(text)} ends before it begins")
        return Range(first.version, int(first), int(last))
    address = parse_address(text)
    return Range(address.version, int(address), int(address))


def usable_range(subnet: Network) -> Range:
    """The addresses of a subnet that a machine may have.

    IPv4: without network and broadcast address, except on a /31 (RFC 3021) and a /32. IPv6: without the
    subnet-router anycast address (RFC 4291 section 2.6.1), except on a /127 (RFC 6164) and a /128.
    """
    version, first, last = range_of(subnet)
    if BITS[version] - subnet.prefixlen >= 2:
        first += 1
        if version == 4:
            last -= 1
    return Range(version, first, last)


class AddressSet:
    """A set of addresses of one IP version, kept as sorted runs that neither touch nor overlap."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in ranges:
            self.add(first, last)

    def __repr__(self) -> str:
        return f"AddressSet({list(self)})"

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._firsts, self._lasts, strict=True))

    def __contains__(self, number: int) -> bool:
        place = bisect_right(self._firsts, number) - 1
        return place >= 0 and number <= self._lasts[place]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self)

    def add(self, first: int, last: int | None = None) -> None:
        """Add one address, or all from `first` to `last`."""
        last = first if last is None else last
        # Runs that touch [first, last] are swallowed by it.
        low = bisect_left(self._lasts, first - 1)
        high = bisect_right(self._firsts, last + 1)
        if low < high:
            first = min(first, self._firsts[low])
            last = max(last, self._lasts[high - 1])
        self._firsts[low:high] = [first]
        self._lasts[low:high] = [last]

    def discard(self, first: int, last: int | None = None) -> None:
        """Take out one address, or all from `first` to `last`; those that are not in it are ignored."""
        last = first if last is None else last
        low = bisect_left(self._lasts, first)
        high = bisect_right(self._firsts, last)
        if low >= high:
            return
        rest = []
        if self._firsts[low] < first:
            rest.append((self._firsts[low], first - 1))
        if self._lasts[high - 1] > last:
            rest.append((last + 1, self._lasts[high - 1]))
        self._firsts[low:high] = [run[0] for run in rest]
        self._lasts[low:high] = [run[1] for run in rest]

    def next_absent(self, start: int) -> int:
        """The lowest number >= start that is not in the set."""
        place = bisect_right(self._firsts, start) - 1
        if place >= 0 and start <= self._lasts[place]:
            return self._lasts[place] + 1
        return start

    def next_present(self, start: int) -> int | None:
        """The lowest number >= start that is in the set."""
        place = bisect_left(self._lasts, start)
        return max(start, self._firsts[place]) if place < len(self._lasts) else None

    def within(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The runs from `first` to `last`, those at the ends cut off there."""
        low = bisect_left(self._lasts, first)
        high = bisect_right(self._firsts, last)
        return ((max(self._firsts[i], first), min(self._lasts[i], last)) for i in range(low, high))

    def count(self, first: int, last: int) -> int:
        """How many addresses from `first` to `last` are in the set."""
        low = bisect_left(self._lasts, first)
        high = bisect_right(self._firsts, last)
        return sum(min(self._lasts[i], last) - max(self._firsts[i], first) + 1 for i in range(low, high))


def next_outside(sets: Iterable[AddressSet], start: int, last: int) -> int | None:
    """The lowest number from `start` to `last` that is in none of the sets, or None.

    Each turn of the loop leaves at least one whole run behind, so the cost is bounded by the number of runs
    of the smallest sets between which the others have no gap; with one large and some small sets that is small.
    """
    sets = tuple(sets)
    number = start
    while number <= last:
        moved = number
        for each in sets:
            moved = each.next_absent(moved)
        if moved == number:
            return number
        number = moved
    return None
