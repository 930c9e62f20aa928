"""What the tests of properties share: strategies, how a text is expected to read, and hypothesis' settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from ipam_plugin.addresses import AddressSet, Range
from ipam_plugin.model import KINDS, Container, Holder, Lease, Pool

# No deadlines: how long a test takes says nothing on a machine that does other things at the same time.
settings.register_profile("properties", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("properties")


def refusal(error: type[Exception], call: Callable[..., Any], *arguments: Any) -> str:
    """The text of the one kind of error that a call may raise; '' where it raises none."""
    try:
        call(*arguments)
    except error as refused:
        return str(refused)
    return ""


names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,8}[A-Za-z0-9])?", fullmatch=True)
# Everything that JSON can carry: no lone surrogates.
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@st.composite
def subnets(draw: st.DrawFn, v4: tuple[int, int] = (8, 32), v6: tuple[int, int] = (32, 128)) -> Any:
    if draw(st.booleans()):
        number = draw(st.integers(1 << 24, (224 << 24) - 1).filter(lambda number: number >> 24 != 127))
        network = ipaddress.IPv4Network((number, draw(st.integers(*v4))), strict=False)
        assume(not (network.is_loopback or network.is_multicast or network.is_link_local))
        return network
    number = 0x2001 << 112 | draw(st.integers(0, 2**112 - 1))
    return ipaddress.IPv6Network((number, draw(st.integers(*v6))), strict=False)


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    subnet = draw(subnets())
    narrowed = None
    if subnet.prefixlen < subnet.max_prefixlen and draw(st.booleans()):
        length = draw(st.integers(subnet.prefixlen + 1, subnet.max_prefixlen))
        inside = draw(st.integers(int(subnet.network_address), int(subnet.broadcast_address)))
        narrowed = type(subnet)((inside, length), strict=False)
    numbers = st.integers(int(subnet.network_address), int(subnet.broadcast_address))
    excluded = AddressSet(tuple(sorted(draw(st.tuples(numbers, numbers)))) for _ in range(draw(st.integers(0, 3))))
    return Pool(
        segment=draw(names),
        subnet=subnet,
        range=narrowed,
        exclude=tuple(Range(subnet.version, first, last) for first, last in excluded),
        gateway=draw(st.sampled_from(("host", "router"))),
        interface=draw(st.sampled_from(("", "br0", "eth0.7", "wan-1"))),
        probe=draw(st.sampled_from(("", "full", "fast", "off"))),
        hold=draw(st.sampled_from(("", "0", "10m", "1.5h", "250ms"))),
    )


containers = st.builds(Container, name=texts, id=texts, image=texts, network=texts)
holders = st.builds(Holder, host=texts, pool=texts, count=st.integers(1, 5))
leases = st.builds(
    Lease,
    kind=st.sampled_from(KINDS),
    host=texts,
    mac=texts,
    container=st.none() | containers,
    pool=texts,
    since=texts,
    token=texts,
    interface=texts,
    holders=st.lists(holders, max_size=3).map(tuple),
    noted=st.integers(0, 9),
    note=texts,
    by=texts,
    change=texts,
)
