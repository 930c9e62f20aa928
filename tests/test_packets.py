"""ARP and neighbour discovery: bytes written by hand from the RFCs, both ways, and whatever else may come."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import properties  # noqa: F401 - hypothesis' settings
from ipam_plugin import packets
from ipam_plugin.packets import (
    Arp,
    Claim,
    How,
    NeighbourAdvertisement,
    NeighbourSolicitation,
    Operation,
    Packet,
    claims,
    decode,
    encode,
)

OURS, THEIRS, NOBODY = "02:00:00:00:4d:0b", "52:54:00:12:34:56", "00:00:00:00:00:00"
BROADCAST, ALL_NODES_MAC = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"
V4, V4_OTHER, V4_NONE = IPv4Address("192.168.77.57"), IPv4Address("192.168.77.11"), IPv4Address("0.0.0.0")
V6, V6_OTHER, V6_NONE = IPv6Address("fd00:77::57"), IPv6Address("fd00:77::11"), IPv6Address("::")
GROUP, GROUP_MAC = IPv6Address("ff02::1:ff00:57"), "33:33:ff:00:00:57"
ALL_NODES = IPv6Address("ff02::1")

REQUEST, REPLY = Operation.REQUEST, Operation.REPLY


def octets(text: str) -> bytes:
    """Bytes as a person writes them down, with a comment behind `#` on every line."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines()))


# Name, the value, its bytes, what it claims.
TABLE: list[tuple[str, Packet, bytes, Claim | None]] = [
    (
        "ARP probe (RFC 5227, 2.1.1)",
        Arp(OURS, BROADCAST, REQUEST, OURS, V4_NONE, NOBODY, V4),
        octets(
            """
            ff ff ff ff ff ff  02 00 00 00 4d 0b  08 06   # to all, from us, ARP
            00 01  08 00  06 04  00 01                    # Ethernet, IPv4, lengths 6 and 4, request
            02 00 00 00 4d 0b  00 00 00 00                # sender: our MAC, no address
            00 00 00 00 00 00  c0 a8 4d 39                # target: 192.168.77.57
            """
        )
        + bytes(18),
        Claim(OURS, V4, How.ARP_PROBE),
    ),
    (
        "ARP reply",
        Arp(THEIRS, OURS, REPLY, THEIRS, V4, OURS, V4_NONE),
        octets(
            """
            02 00 00 00 4d 0b  52 54 00 12 34 56  08 06
            00 01  08 00  06 04  00 02                    # reply
            52 54 00 12 34 56  c0 a8 4d 39                # 192.168.77.57 is at their MAC
            02 00 00 00 4d 0b  00 00 00 00                # to the machine that probed, without an address
            """
        )
        + bytes(18),
        Claim(THEIRS, V4, How.ARP_REPLY),
    ),
    (
        "ARP request: claims its sender's address, says nothing of its target's",
        Arp(THEIRS, BROADCAST, REQUEST, THEIRS, V4_OTHER, NOBODY, V4),
        octets(
            """
            ff ff ff ff ff ff  52 54 00 12 34 56  08 06
            00 01  08 00  06 04  00 01
            52 54 00 12 34 56  c0 a8 4d 0b                # I am 192.168.77.11
            00 00 00 00 00 00  c0 a8 4d 39                # who has 192.168.77.57?
            """
        )
        + bytes(18),
        Claim(THEIRS, V4_OTHER, How.ARP_REQUEST),
    ),
    (
        "ARP announcement (RFC 5227, 3), in VLAN 10",
        Arp(THEIRS, BROADCAST, REQUEST, THEIRS, V4, NOBODY, V4, vlan=10),
        octets(
            """
            ff ff ff ff ff ff  52 54 00 12 34 56  81 00 00 0a  08 06   # 802.1Q, priority 0, VLAN 10
            00 01  08 00  06 04  00 01
            52 54 00 12 34 56  c0 a8 4d 39
            00 00 00 00 00 00  c0 a8 4d 39
            """
        )
        + bytes(18),
        Claim(THEIRS, V4, How.ARP_ANNOUNCEMENT),
    ),
    (
        "an ARP reply whose frame comes from another MAC, and a sender MAC of zeros",
        Arp(THEIRS, OURS, REPLY, NOBODY, V4, OURS, V4_OTHER),
        octets(
            """
            02 00 00 00 4d 0b  52 54 00 12 34 56  08 06
            00 01  08 00  06 04  00 02
            00 00 00 00 00 00  c0 a8 4d 39
            02 00 00 00 4d 0b  c0 a8 4d 0b
            """
        )
        + bytes(18),
        Claim(THEIRS, V4, How.ARP_REPLY),
    ),
    (
        "an ARP reply of nobody claims nothing",
        Arp(THEIRS, OURS, REPLY, THEIRS, V4_NONE, OURS, V4_OTHER),
        octets(
            """
            02 00 00 00 4d 0b  52 54 00 12 34 56  08 06
            00 01  08 00  06 04  00 02
            52 54 00 12 34 56  00 00 00 00
            02 00 00 00 4d 0b  c0 a8 4d 0b
            """
        )
        + bytes(18),
        None,
    ),
    (
        "duplicate address detection (RFC 4862, 5.4.2)",
        NeighbourSolicitation(OURS, GROUP_MAC, V6_NONE, GROUP, V6),
        octets(
            """
            33 33 ff 00 00 57  02 00 00 00 4d 0b  86 dd   # the solicited-node group's MAC, IPv6
            60 00 00 00  00 18  3a  ff                    # version 6, 24 bytes, ICMPv6, hop limit 255
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00   # from ::
            ff 02 00 00 00 00 00 00 00 00 00 01 ff 00 00 57   # to ff02::1:ff00:57
            87 00  7c 82  00 00 00 00                     # neighbour solicitation, checksum, reserved
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 57   # target fd00:77::57
            """
        ),
        Claim(OURS, V6, How.DETECTION),
    ),
    (
        "neighbour solicitation from an address, with the sender's MAC",
        NeighbourSolicitation(THEIRS, GROUP_MAC, V6_OTHER, GROUP, V6, THEIRS),
        octets(
            """
            33 33 ff 00 00 57  52 54 00 12 34 56  86 dd
            60 00 00 00  00 20  3a  ff                    # 32 bytes
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 11   # from fd00:77::11
            ff 02 00 00 00 00 00 00 00 00 00 01 ff 00 00 57
            87 00  f7 33  00 00 00 00
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 57
            01 01  52 54 00 12 34 56                      # source link-layer address
            """
        ),
        Claim(THEIRS, V6_OTHER, How.SOLICITATION),
    ),
    (
        "neighbour advertisement in answer to duplicate address detection: to all nodes, override",
        NeighbourAdvertisement(THEIRS, ALL_NODES_MAC, V6, ALL_NODES, V6, THEIRS, override=True),
        octets(
            """
            33 33 00 00 00 01  52 54 00 12 34 56  86 dd
            60 00 00 00  00 20  3a  ff
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 57
            ff 02 00 00 00 00 00 00 00 00 00 00 00 00 00 01
            88 00  d4 45  20 00 00 00                     # neighbour advertisement, override
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 57
            02 01  52 54 00 12 34 56                      # target link-layer address
            """
        ),
        Claim(THEIRS, V6, How.ADVERTISEMENT),
    ),
    (
        "a router's solicited advertisement without an option: the frame's MAC counts",
        NeighbourAdvertisement(THEIRS, OURS, V6, V6_OTHER, V6, router=True, solicited=True),
        octets(
            """
            02 00 00 00 4d 0b  52 54 00 12 34 56  86 dd
            60 00 00 00  00 18  3a  ff
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 57
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 11
            88 00  be 85  c0 00 00 00                     # router, solicited
            fd 00 00 77 00 00 00 00 00 00 00 00 00 00 00 57
            """
        ),
        Claim(THEIRS, V6, How.ADVERTISEMENT),
    ),
]
NAMES = [name for name, *_ in TABLE]


@pytest.mark.parametrize(("value", "frame"), [row[1:3] for row in TABLE], ids=NAMES)
def test_one_table_both_ways(value: Packet, frame: bytes) -> None:
    """What is sent has exactly the bytes of the RFCs, and those bytes are read as what they mean."""
    assert encode(value).hex(" ") == frame.hex(" ")
    assert decode(frame) == value


@pytest.mark.parametrize(("value", "claim"), [(row[1], row[3]) for row in TABLE], ids=NAMES)
def test_what_a_packet_claims(value: Packet, claim: Claim | None) -> None:
    """Who uses which address, by the MAC that neighbours would believe; a probe claims nothing yet, and says so."""
    assert claims(value) == claim
    if claim is not None:
        assert claim.how.probing == (claim.how in (How.ARP_PROBE, How.DETECTION))


def test_what_we_send_is_in_the_table() -> None:
    """Each kind of frame that this program sends is the one the RFCs prescribe for its purpose."""
    by_name = {name: frame for name, _, frame, _ in TABLE}
    sent = {
        "ARP probe (RFC 5227, 2.1.1)": packets.arp_probe(V4, OURS),
        "ARP request: claims its sender's address, says nothing of its target's": packets.arp_request(
            V4, V4_OTHER, THEIRS
        ),
        "duplicate address detection (RFC 4862, 5.4.2)": packets.nd_probe(V6, OURS),
        "neighbour solicitation from an address, with the sender's MAC": packets.nd_solicitation(V6, V6_OTHER, THEIRS),
        "neighbour advertisement in answer to duplicate address detection: to all nodes, override": (
            packets.nd_advertisement(V6, THEIRS)
        ),
    }
    for name, frame in sent.items():
        assert frame.hex(" ") == by_name[name].hex(" "), name
    announcement = decode(packets.arp_announcement(V4, THEIRS))
    assert announcement == Arp(THEIRS, BROADCAST, REQUEST, THEIRS, V4, NOBODY, V4)


def test_a_probe_disturbs_no_cache() -> None:
    """A probe names no sender address and no source link-layer address, so that nobody's cache changes by it."""
    arp = decode(packets.arp_probe(V4, OURS))
    assert isinstance(arp, Arp)
    assert (arp.sender, arp.target_mac) == (V4_NONE, NOBODY)
    nd = decode(packets.nd_probe(V6, OURS))
    assert isinstance(nd, NeighbourSolicitation)
    assert (nd.ip_source, nd.link_layer) == (V6_NONE, "")


# --- whatever comes ------------------------------------------------------------------------------------

macs = st.binary(min_size=6, max_size=6).map(lambda b: b.hex(":"))
v4 = st.integers(0, 2**32 - 1).map(IPv4Address)
v6 = st.integers(0, 2**128 - 1).map(IPv6Address)
targets = st.integers(1, 2**128 - 1).map(IPv6Address).filter(lambda a: not a.is_multicast)
vlans = st.integers(0, 4095)
link_layers = st.just("") | macs
values: st.SearchStrategy[Packet] = (
    st.builds(Arp, macs, macs, st.sampled_from(Operation), macs, v4, macs, v4, vlans)
    | st.builds(NeighbourSolicitation, macs, macs, v6, v6, targets, link_layers, vlans)
    | st.builds(
        NeighbourAdvertisement, macs, macs, v6, v6, targets, link_layers, *[st.booleans() for _ in range(3)], vlans
    )
)


def checksum_of(source: bytes, destination: bytes, message: bytes) -> int:
    """RFC 1071 as it is written there: word by word, carries folded in; independent of the tested code."""
    data = source + destination + struct.pack("!IHBB", len(message), 0, 0, 58) + message + bytes(len(message) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@given(values)
def test_what_was_encoded_is_decoded(value: Packet) -> None:
    """Every value survives the way through bytes, in a frame that Ethernet carries."""
    frame = encode(value)
    assert len(frame) >= 60
    assert decode(frame) == value
    if not isinstance(value, Arp):
        at = 18 if value.vlan else 14
        source, destination, message = frame[at + 8 : at + 24], frame[at + 24 : at + 40], frame[at + 40 :]
        zeroed = message[:2] + b"\0\0" + message[4:]
        assert struct.unpack_from("!H", message, 2)[0] == checksum_of(source, destination, zeroed)


@given(values, st.binary(max_size=40))
def test_padding_behind_a_packet_changes_nothing(value: Packet, rubbish: bytes) -> None:
    """Network cards pad with whatever is in their memory."""
    assert decode(encode(value) + rubbish) == value


@given(values, st.integers(0, 120))
def test_a_truncated_frame_is_no_packet(value: Packet, length: int) -> None:
    """A frame that lost a part of its packet says nothing: half an address would be another machine's."""
    frame = encode(replace(value, vlan=0))
    needed = 42 if isinstance(value, Arp) else len(frame)
    cut = frame[: min(length, needed - 1)]
    assert decode(cut) is None


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good frame with some bytes replaced, removed or put in between: what fuzzing from nothing seldom reaches."""
    frame = bytearray(encode(draw(values)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frame) - 1))
        frame[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(frame)


@given(st.binary(max_size=200) | damaged())
@example(b"")
@example(bytes(12) + b"\x81\x00")
@example(bytes(12) + b"\x08\x06")
@example(bytes(12) + b"\x86\xdd" + b"\x60")
def test_decoding_never_raises(frame: bytes) -> None:
    """Whatever bytes the LAN carries: a packet that encodes to something read alike, or None."""
    packet = decode(frame)
    if packet is not None:
        claims(packet)
        assert decode(encode(packet)) == packet


def nd_frame(message: bytes, *, hop_limit: int = 255, length: int | None = None, checksum: bool = True) -> bytes:
    """An IPv6 frame around an ICMPv6 message, with the right checksum unless told otherwise."""
    source, destination = V6.packed, ALL_NODES.packed
    if checksum:
        message = message[:2] + struct.pack("!H", checksum_of(source, destination, message)) + message[4:]
    size = len(message) if length is None else length
    header = struct.pack("!IHBB", 6 << 28, size, 58, hop_limit) + source + destination
    return bytes.fromhex((ALL_NODES_MAC + THEIRS).replace(":", "")) + b"\x86\xdd" + header + message


ADVERTISEMENT = b"\x88\0\0\0" + b"\x20\0\0\0" + V6.packed
LINK_LAYER = b"\x02\x01" + bytes.fromhex(THEIRS.replace(":", ""))


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (nd_frame(ADVERTISEMENT, hop_limit=64), "a router passed it on (RFC 4861, 7.1.2)"),
        (nd_frame(ADVERTISEMENT, checksum=False), "the checksum is wrong"),
        (nd_frame(ADVERTISEMENT[:16]), "the message is too short"),
        (nd_frame(ADVERTISEMENT, length=23), "the length is too short for its message"),
        (nd_frame(ADVERTISEMENT, length=65535), "the length says more than there is"),
        (nd_frame(ADVERTISEMENT + b"\x02\x00" + bytes(6)), "an option of length 0, an endless loop"),
        (nd_frame(ADVERTISEMENT + b"\x02\x02" + bytes(6)), "an option longer than the message"),
        (nd_frame(ADVERTISEMENT + b"\x02"), "an option without a length"),
        (nd_frame(b"\x88\x01" + ADVERTISEMENT[2:]), "code 1"),
        (nd_frame(b"\x86\x00" + ADVERTISEMENT[2:]), "a router advertisement"),
        (nd_frame(ADVERTISEMENT[:8] + ALL_NODES.packed), "a multicast target"),
        (nd_frame(ADVERTISEMENT[:8] + bytes(16)), "an unspecified target"),
    ],
)
def test_neighbour_discovery_that_does_not_count(frame: bytes, why: str) -> None:
    """What did not come over this link as it was sent proves nothing about an address."""
    assert decode(frame) is None, why


@pytest.mark.parametrize(
    ("options", "link_layer"),
    [
        (b"", ""),
        (LINK_LAYER, THEIRS),
        (b"\x0e\x01" + bytes(6) + LINK_LAYER, THEIRS),  # a nonce (RFC 3971) before it
        (LINK_LAYER + b"\xfd\x02" + bytes(14), THEIRS),  # an experimental option behind it
        (b"\x01\x01" + bytes(6), ""),  # the source's, which an advertisement does not have
        (b"\x02\x02" + bytes(14), ""),  # 14 bytes are no Ethernet address
        (LINK_LAYER + b"\x02\x01" + bytes(6), THEIRS),  # the first of two
    ],
)
def test_options(options: bytes, link_layer: str) -> None:
    """Options that are not known are skipped (RFC 4861, 4.6)."""
    packet = decode(nd_frame(ADVERTISEMENT + options))
    assert isinstance(packet, NeighbourAdvertisement)
    assert packet.link_layer == link_layer


@pytest.mark.parametrize(
    ("at", "to"),
    [(15, 6), (16, 0x86), (18, 8), (19, 16), (21, 3), (21, 9), (20, 1)],
    ids=["hardware", "protocol", "hardware length", "protocol length", "RARP", "InARP", "operation 257"],
)
def test_arp_of_another_kind(at: int, to: int) -> None:
    """Other hardware, other protocols, other operations, and lengths that lie, are no ARP for IPv4."""
    frame = bytearray(packets.arp_probe(V4, OURS))
    frame[at] = to
    assert decode(bytes(frame)) is None


def test_a_priority_tag_is_no_vlan() -> None:
    """VLAN 0 only carries a priority (802.1Q, 9.6): the frame belongs to the untagged LAN."""
    frame = packets.arp_probe(V4, OURS)
    tagged = frame[:12] + b"\x81\x00\xe0\x00" + frame[12:]
    assert decode(tagged) == decode(frame)


def test_two_tags_are_another_segment() -> None:
    """A frame of a VLAN inside a VLAN is not looked into: it is none of this segment's."""
    frame = packets.arp_probe(V4, OURS)
    tag = b"\x81\x00\x00\x00"
    assert decode(frame[:12] + tag + tag + frame[12:]) is None


def test_solicited_node_groups() -> None:
    """The group has the address's last 24 bits (RFC 4291, 2.7.1), its MAC the group's last 32 (RFC 2464, 7)."""
    group = packets.solicited_node(IPv6Address("4037::1:800:200e:8c6c"))
    assert group == IPv6Address("ff02::1:ff0e:8c6c")  # the RFC's own example
    assert packets.multicast_mac(group) == "33:33:ff:0e:8c:6c"


def test_an_answer_is_told_from_what_is_said_to_everybody() -> None:
    """Only an answer to the one who asked is more than a rumour: a gratuitous reply is said to all (RFC 5227, 3)."""
    reply = Arp(THEIRS, OURS, REPLY, THEIRS, V4, OURS, V4_NONE)
    said = claims(reply)
    to_all = claims(replace(reply, destination=BROADCAST))
    assert said is not None
    assert to_all is not None
    assert (said.answering, to_all.answering) == (True, False)
