"""ARP and IPv6 neighbour discovery as bytes and as values, and what a frame says about who uses an address.

Pure: no sockets, no clock. ARP is RFC 826 with the meaning RFC 5227 gives it; neighbour solicitations and
advertisements are RFC 4861, duplicate address detection is RFC 4862. Frames are Ethernet, from the
destination address to the end of the payload, without the checksum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv6Address

from ipam_plugin.addresses import Address

BROADCAST = "ff:ff:ff:ff:ff:ff"
NO_MAC = "00:00:00:00:00:00"
MINIMUM_FRAME = 60  # IEEE 802.3: 64 bytes with the checksum, which the network card adds

NO_ADDRESS = IPv4Address(0)
UNSPECIFIED = IPv6Address(0)
ALL_NODES = IPv6Address("ff02::1")

ETHERTYPE_ARP = 0x0806
ETHERTYPE_IPV6 = 0x86DD
ETHERTYPE_VLAN = 0x8100  # IEEE 802.1Q
NEXT_HEADER_ICMPV6 = 58
NEIGHBOUR_SOLICITATION = 135
NEIGHBOUR_ADVERTISEMENT = 136

_SOURCE_LINK_LAYER, _TARGET_LINK_LAYER = 1, 2  # options, RFC 4861 section 4.6
_ROUTER, _SOLICITED, _OVERRIDE = 1 << 31, 1 << 30, 1 << 29  # flags, RFC 4861 section 4.4
_SOLICITED_NODE = int(IPv6Address("ff02::1:ff00:0"))  # RFC 4291 section 2.7.1


class Operation(IntEnum):
    REQUEST = 1
    REPLY = 2


@dataclass(frozen=True)
class Arp:
    """An ARP packet (RFC 826) for IPv4 over Ethernet.

    `source` and `destination` are the frame's, which may differ from what the packet says; `vlan` is the
    802.1Q VLAN of the frame, 0 for none (a frame with only a priority tag is in no VLAN either).
    MACs are lower case with colons.
    """

    source: str
    destination: str
    operation: Operation
    sender_mac: str
    sender: IPv4Address
    target_mac: str
    target: IPv4Address
    vlan: int = 0


@dataclass(frozen=True)
class NeighbourSolicitation:
    """RFC 4861 section 4.3. `link_layer` is the source link-layer address option, '' for none.

    With `ip_source` :: it is duplicate address detection: the sender wants to use the target (RFC 4862).
    """

    source: str
    destination: str
    ip_source: IPv6Address
    ip_destination: IPv6Address
    target: IPv6Address
    link_layer: str = ""
    vlan: int = 0


@dataclass(frozen=True)
class NeighbourAdvertisement:
    """RFC 4861 section 4.4. `link_layer` is the target link-layer address option, '' for none."""

    source: str
    destination: str
    ip_source: IPv6Address
    ip_destination: IPv6Address
    target: IPv6Address
    link_layer: str = ""
    router: bool = False
    solicited: bool = False
    override: bool = False
    vlan: int = 0


Packet = Arp | NeighbourSolicitation | NeighbourAdvertisement


class How(Enum):
    """By which frame a machine said that it uses an address, or is about to; the value is for people."""

    ARP_REPLY = "ARP reply"
    ARP_REQUEST = "ARP request"
    ARP_ANNOUNCEMENT = "ARP announcement"
    ARP_PROBE = "ARP probe"
    ADVERTISEMENT = "neighbour advertisement"
    SOLICITATION = "neighbour solicitation"
    DETECTION = "duplicate address detection"

    @property
    def probing(self) -> bool:
        """The machine does not use the address yet: it asks, as we do, whether it may.

        A conflict all the same for whoever probes it at that moment (RFC 5227 section 2.1.1, RFC 4862
        section 5.4.3).
        """
        return self in (How.ARP_PROBE, How.DETECTION)


@dataclass(frozen=True)
class Claim:
    """`mac` uses `address` (or wants to: `how.probing`).

    `answering`: it was said to the one who asked, or as one who asks in nobody's name is answered.
    """

    mac: str
    address: Address
    how: How
    answering: bool = field(default=False, compare=False)


def claims(packet: Packet) -> Claim | None:
    """What a packet says about who uses which address; None: nothing.

    The MAC is the one the packet gives, because neighbours believe that one; the frame's where it gives none.
    """
    if isinstance(packet, Arp):
        mac = packet.sender_mac if packet.sender_mac != NO_MAC else packet.source
        if packet.sender != NO_ADDRESS:
            if packet.operation is Operation.REPLY:
                return Claim(mac, packet.sender, How.ARP_REPLY, packet.destination != BROADCAST)
            announced = packet.sender == packet.target
            return Claim(mac, packet.sender, How.ARP_ANNOUNCEMENT if announced else How.ARP_REQUEST)
        if packet.operation is Operation.REQUEST and packet.target != NO_ADDRESS:
            return Claim(mac, packet.target, How.ARP_PROBE)
        return None
    if isinstance(packet, NeighbourAdvertisement):
        # To all nodes, because one who asks from :: has no address yet (RFC 4861 section 7.2.4).
        return Claim(packet.link_layer or packet.source, packet.target, How.ADVERTISEMENT, answering=True)
    if packet.ip_source == UNSPECIFIED:
        return Claim(packet.source, packet.target, How.DETECTION)
    return Claim(packet.link_layer or packet.source, packet.ip_source, How.SOLICITATION)


# --- what we send --------------------------------------------------------------------------------------


def arp_probe(address: IPv4Address, mac: str) -> bytes:
    """Asks whether somebody uses the address; the sender address 0.0.0.0 disturbs no cache (RFC 5227, 2.1.1)."""
    return arp_request(address, NO_ADDRESS, mac)


def arp_request(address: IPv4Address, sender_address: IPv4Address, mac: str) -> bytes:
    """Asks who has the address, for a sender that has `sender_address`: everybody who hears it believes that."""
    return encode(Arp(mac, BROADCAST, Operation.REQUEST, mac, sender_address, NO_MAC, address))


def arp_announcement(address: IPv4Address, mac: str) -> bytes:
    """Says that `mac` uses the address now, a request in form (RFC 5227 sections 1.1 and 3)."""
    return arp_request(address, address, mac)


def nd_probe(address: IPv6Address, mac: str) -> bytes:
    """Duplicate address detection (RFC 4862 section 5.4.2): from ::, so that no cache is disturbed."""
    return encode(_solicitation(address, UNSPECIFIED, mac, ""))


def nd_solicitation(address: IPv6Address, sender_address: IPv6Address, mac: str) -> bytes:
    """Asks who has the address, for a sender that has `sender_address` (RFC 4861 section 7.2.2)."""
    return encode(_solicitation(address, sender_address, mac, mac))


def nd_advertisement(address: IPv6Address, mac: str) -> bytes:
    """Says that `mac` uses the address now, and that caches shall believe it (RFC 4861 section 7.2.6)."""
    return encode(
        NeighbourAdvertisement(mac, multicast_mac(ALL_NODES), address, ALL_NODES, address, mac, override=True)
    )


def _solicitation(target: IPv6Address, sender: IPv6Address, mac: str, link_layer: str) -> NeighbourSolicitation:
    group = solicited_node(target)
    return NeighbourSolicitation(mac, multicast_mac(group), sender, group, target, link_layer)


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The multicast group that whoever has the address has joined (RFC 4291 section 2.7.1)."""
    return IPv6Address(_SOLICITED_NODE | int(address) & 0xFFFFFF)


def multicast_mac(group: IPv6Address) -> str:
    """The Ethernet address of an IPv6 multicast group (RFC 2464 section 7)."""
    return (b"\x33\x33" + group.packed[12:]).hex(":")


# --- bytes ---------------------------------------------------------------------------------------------

_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_FIXED = (1, 0x0800, 6, 4)  # Ethernet, IPv4, and the lengths of their addresses
_IPV6 = struct.Struct("!IHBB16s16s")
_ND = struct.Struct("!BBHI16s")  # type, code, checksum, flags (or reserved), target
_ETHERTYPE = struct.Struct("!H")
_TAG = struct.Struct("!HH")


def encode(packet: Packet) -> bytes:
    """The frame of a packet, padded to the shortest that Ethernet carries."""
    body, ethertype = (_arp(packet), ETHERTYPE_ARP) if isinstance(packet, Arp) else (_nd(packet), ETHERTYPE_IPV6)
    tag = _TAG.pack(ETHERTYPE_VLAN, packet.vlan) if packet.vlan else b""
    frame = _bytes(packet.destination) + _bytes(packet.source) + tag + _ETHERTYPE.pack(ethertype) + body
    return frame.ljust(MINIMUM_FRAME + len(tag), b"\0")


def decode(frame: bytes) -> Packet | None:
    """The packet in a frame; None for every other frame, cut off, damaged or made to confuse. Never raises.

    Of RFC 4861's rules for receivers, those are applied that show that a message came over this link as
    it was sent (hop limit, checksum, lengths). Those about what a sender should not have said are not
    (a solicited flag on a multicast, an option in duplicate address detection): whoever breaks them uses
    the address none the less. Extension headers before ICMPv6 are not followed; nobody sends them with
    neighbour discovery, and RFC 6980 forbids the only one that had a use.
    """
    if len(frame) < 14:
        return None
    start, vlan = 14, 0
    (ethertype,) = _ETHERTYPE.unpack_from(frame, 12)
    if ethertype == ETHERTYPE_VLAN:
        if len(frame) < 18:
            return None
        tag, ethertype = _TAG.unpack_from(frame, 14)
        start, vlan = 18, tag & 0xFFF
    if ethertype == ETHERTYPE_ARP:
        return _decode_arp(frame, start, vlan)
    if ethertype == ETHERTYPE_IPV6:
        return _decode_nd(frame, start, vlan)
    return None


def _arp(packet: Arp) -> bytes:
    return _ARP.pack(
        *_ARP_FIXED,
        packet.operation,
        _bytes(packet.sender_mac),
        packet.sender.packed,
        _bytes(packet.target_mac),
        packet.target.packed,
    )


def _decode_arp(frame: bytes, start: int, vlan: int) -> Arp | None:
    if len(frame) < start + _ARP.size:
        return None
    *fixed, operation, sender_mac, sender, target_mac, target = _ARP.unpack_from(frame, start)
    # RARP and InARP use the same EtherType or form with other operations, and claim nothing that we need.
    if tuple(fixed) != _ARP_FIXED or operation not in (Operation.REQUEST, Operation.REPLY):
        return None
    return Arp(
        source=frame[6:12].hex(":"),
        destination=frame[0:6].hex(":"),
        operation=Operation(operation),
        sender_mac=sender_mac.hex(":"),
        sender=IPv4Address(sender),
        target_mac=target_mac.hex(":"),
        target=IPv4Address(target),
        vlan=vlan,
    )


def _nd(packet: NeighbourSolicitation | NeighbourAdvertisement) -> bytes:
    if isinstance(packet, NeighbourSolicitation):
        kind, flags, option = NEIGHBOUR_SOLICITATION, 0, _SOURCE_LINK_LAYER
    else:
        kind, option = NEIGHBOUR_ADVERTISEMENT, _TARGET_LINK_LAYER
        flags = packet.router * _ROUTER | packet.solicited * _SOLICITED | packet.override * _OVERRIDE
    options = bytes((option, 1)) + _bytes(packet.link_layer) if packet.link_layer else b""
    length = _ND.size + len(options)
    source, destination = packet.ip_source.packed, packet.ip_destination.packed
    checksum = _checksum(source, destination, _ND.pack(kind, 0, 0, flags, packet.target.packed) + options)
    # Hop limit 255 proves to the receiver that no router passed it on (RFC 4861 section 7.1).
    header = _IPV6.pack(6 << 28, length, NEXT_HEADER_ICMPV6, 255, source, destination)
    return header + _ND.pack(kind, 0, checksum, flags, packet.target.packed) + options


def _decode_nd(frame: bytes, start: int, vlan: int) -> NeighbourSolicitation | NeighbourAdvertisement | None:
    message_start = start + _IPV6.size
    if len(frame) < message_start + _ND.size:
        return None
    first, length, next_header, hop_limit, source, destination = _IPV6.unpack_from(frame, start)
    if first >> 28 != 6 or next_header != NEXT_HEADER_ICMPV6 or hop_limit != 255 or length < _ND.size:
        return None
    message = frame[message_start : message_start + length]
    if len(message) < length:
        return None
    kind, code, _checksum_field, flags, target = _ND.unpack_from(message, 0)
    # The sum over a message with its checksum in place is all ones (RFC 1071).
    if kind not in (NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT) or code or _checksum(source, destination, message):
        return None
    address = IPv6Address(target)
    if address.is_multicast or address == UNSPECIFIED:
        return None
    link_layer = _link_layer(message, _SOURCE_LINK_LAYER if kind == NEIGHBOUR_SOLICITATION else _TARGET_LINK_LAYER)
    if link_layer is None:
        return None
    common = (frame[6:12].hex(":"), frame[0:6].hex(":"), IPv6Address(source), IPv6Address(destination), address)
    if kind == NEIGHBOUR_SOLICITATION:
        return NeighbourSolicitation(*common, link_layer, vlan)
    return NeighbourAdvertisement(
        *common, link_layer, bool(flags & _ROUTER), bool(flags & _SOLICITED), bool(flags & _OVERRIDE), vlan
    )


def _link_layer(message: bytes, wanted: int) -> str | None:
    """The first link-layer address option of a kind, '' for none; None when the options' lengths lie."""
    found, at = "", _ND.size
    while at < len(message):
        size = message[at + 1] * 8 if at + 1 < len(message) else 0
        if size == 0 or at + size > len(message):
            return None
        if message[at] == wanted and size == 8 and not found:
            found = message[at + 2 : at + 8].hex(":")
        at += size
    return found


def _checksum(source: bytes, destination: bytes, message: bytes) -> int:
    """ICMPv6's checksum over pseudo-header and message (RFC 4443 section 2.3, RFC 8200 section 8.1)."""
    data = source + destination + struct.pack("!II", len(message), NEXT_HEADER_ICMPV6) + message
    if len(data) % 2:
        data += b"\0"
    # The one's complement sum of 16-bit words is the number modulo 65535, with 65535 for a zero that is none.
    remainder = int.from_bytes(data, "big") % 0xFFFF
    return 0xFFFF - (remainder or 0xFFFF)


def _bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
