"""What a machine of the lab says on its wire and no program of the system says for it.

Run as a script in the machine's namespaces; the last line of standard output is the result.

- `announce DEVICE ADDRESS`: this machine has the address: an ARP announcement (RFC 5227 section 3), or an
  unsolicited neighbour advertisement (RFC 4861 section 7.2.6). The address must be on the device for IPv6.
- `take DEVICE ADDRESS`: takes an IPv4 address as RFC 5227 section 2.1 wants it: probes first, and keeps off when
  somebody uses it or probes for it as well. Says `taken`, or `left to MAC`.
- `answer DEVICE [ADDRESS …]`: answers every ARP question but those about the given addresses, until killed. Linux's
  proxy_arp keeps quiet when it is asked by 0.0.0.0, other routers do not. Says `answering` when it does.
- `flood DEVICE RATE SECONDS [requests|replies [SENDERS …]]`: so many ARP frames a second to everybody, each of another
  machine (no MAC comes twice) that says it has a random one of the senders: addresses or CIDRs, 10.0.0.0/8 unless told.
  Announcements are requests (RFC 5227 section 3), or replies as older systems send them. Says how many it has sent.

Only the standard library, and its own encoding of frames: what the daemon hears here, the daemon has not written.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import subprocess
import sys
import time
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

ETHERTYPE_ARP = 0x0806
REQUEST, REPLY = 1, 2
BROADCAST, NOBODY = b"\xff" * 6, b"\0" * 6
UNKNOWN = IPv4Address(0)
ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")  # with the Ethernet header

# RFC 5227 section 1.1, with the shortest PROBE_MIN and PROBE_MAX it allows and no wait before the first.
PROBES, PROBE_SPACING, ANNOUNCE_WAIT = 3, 1.0, 2.0


class Arp(NamedTuple):
    operation: int
    sender_mac: bytes
    sender: IPv4Address
    target: IPv4Address


def frame(
    source: bytes, to: bytes, operation: int, sender: IPv4Address, target_mac: bytes, target: IPv4Address
) -> bytes:
    header = (to, source, ETHERTYPE_ARP, 1, 0x0800, 6, 4, operation)
    return ARP.pack(*header, source, sender.packed, target_mac, target.packed).ljust(60, b"\0")


def read(raw: socket.socket) -> Arp | None:
    data = raw.recv(2048)
    if len(data) < ARP.size:
        return None
    _, _, _, _, protocol, _, _, operation, sender_mac, sender, _, target = ARP.unpack_from(data)
    return Arp(operation, sender_mac, IPv4Address(sender), IPv4Address(target)) if protocol == 0x0800 else None


def open_raw(device: str) -> tuple[socket.socket, bytes]:
    """A socket for ARP on the device, and the device's MAC."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE_ARP))
    raw.bind((device, ETHERTYPE_ARP))
    return raw, raw.getsockname()[4]


def announce(device: str, address: str) -> None:
    if ":" in address:
        announce6(device, address)
        return
    raw, mac = open_raw(device)
    raw.send(frame(mac, BROADCAST, REQUEST, IPv4Address(address), NOBODY, IPv4Address(address)))


def announce6(device: str, address: str) -> None:
    mac = bytes.fromhex(Path(f"/sys/class/net/{device}/address").read_text().strip().replace(":", ""))
    index = socket.if_nametoindex(device)
    # The kernel computes the checksum of an ICMPv6 socket (RFC 3542 section 3.1).
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        raw.bind((address, 0, 0, 0))
        override, target_link_layer = 0x20000000, 2
        message = struct.pack(
            "!BBHI16sBB6s", 136, 0, 0, override, ip_address(address).packed, target_link_layer, 1, mac
        )
        raw.sendto(message, ("ff02::1", 0, 0, index))


def take(device: str, text: str) -> str:
    address = IPv4Address(text)
    raw, mac = open_raw(device)
    for left in reversed(range(PROBES)):
        raw.send(frame(mac, BROADCAST, REQUEST, UNKNOWN, NOBODY, address))
        deadline = time.monotonic() + (PROBE_SPACING if left else ANNOUNCE_WAIT)
        while select.select([raw], [], [], max(0.0, deadline - time.monotonic()))[0]:
            heard = read(raw)
            if heard is None or heard.sender_mac == mac:
                continue
            probes = heard.operation == REQUEST and heard.sender == UNKNOWN and heard.target == address
            if heard.sender == address or probes:
                return f"left to {heard.sender_mac.hex(':')}"
    subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", device], check=True, timeout=10)
    raw.send(frame(mac, BROADCAST, REQUEST, address, NOBODY, address))
    return "taken"


def answer(device: str, *others: str) -> None:
    raw, mac = open_raw(device)
    quiet = {IPv4Address(other) for other in others}
    print("answering", flush=True)
    while True:
        heard = read(raw)
        if heard is None or heard.operation != REQUEST or heard.sender_mac == mac:
            continue
        if heard.target not in quiet and heard.target != heard.sender:
            raw.send(frame(mac, heard.sender_mac, REPLY, heard.target, heard.sender_mac, heard.sender))


def flood(device: str, rate: str, seconds: str, kind: str = "requests", *senders: str) -> int:
    raw, _ = open_raw(device)
    operation = {"requests": REQUEST, "replies": REPLY}[kind]
    ranges = [ip_network(each) for each in senders or ["10.0.0.0/8"]]
    draw = random.Random()
    began, sent = time.monotonic(), 0
    while (now := time.monotonic() - began) < float(seconds):
        # In portions: a sleep between two single frames would be longer than their distance.
        for _ in range(min(20_000, int(now * float(rate)) - sent)):
            # A MAC that came again would be a machine that insists.
            mac, chosen = b"\x02" + draw.randbytes(5), draw.choice(ranges)
            address = IPv4Address(int(chosen.network_address) + draw.randrange(chosen.num_addresses))
            raw.send(frame(mac, BROADCAST, operation, address, NOBODY, address))
            sent += 1
        time.sleep(0.001)
    return sent


if __name__ == "__main__":
    result = {"announce": announce, "take": take, "answer": answer, "flood": flood}[sys.argv[1]](*sys.argv[2:])
    print("" if result is None else result)
