"""What the kernel knows of this host's interfaces: their addresses, their MACs, and that something changed.

The only importer of pyroute2. Everything speaks of the network namespace the calling thread is in, and
none of it needs privileges. Each question opens its own netlink socket and closes it.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.iproute.parsers import get_header
from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, nlmsg, rtnl
from pyroute2.netlink.nlsocket import NetlinkRequest
from pyroute2.netlink.rtnl.ifaddrmsg import (
    IFA_F_DADFAILED,
    IFA_F_DEPRECATED,
    IFA_F_TEMPORARY,
    IFA_F_TENTATIVE,
    ifaddrmsg,
)
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOOPBACK, IFF_LOWER_UP, IFF_UP, ifinfmsg

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Link:
    """An interface. `kind` is the kernel's ("bridge", "veth", "macvlan"; "" for hardware)."""

    index: int
    name: str
    mac: str
    kind: str
    carrier: bool
    up: bool
    loopback: bool
    master: str


@dataclass(frozen=True)
class InterfaceAddress:
    """An address that an interface of this host carries, and what of the interface decides about it.

    The last four are IPv6's (RFC 4862, RFC 8981) and false for IPv4.
    """

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    prefixlen: int
    interface: str
    mac: str
    bridge: bool
    up: bool
    temporary: bool = False
    deprecated: bool = False
    tentative: bool = False
    dad_failed: bool = False

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        return ipaddress.ip_network((self.address, self.prefixlen), strict=False)


def addresses(deadline: float | None = None) -> list[InterfaceAddress]:
    """The host's own addresses, without loopback (127/8, ::1) and link-local ones.

    In the kernel's order, IPv4 before IPv6: of several that fit, Docker takes the first. A LAN address on
    `lo` is among them, because Linux answers ARP for it on every interface.

    `deadline` is in time.monotonic(); None is 5 s from now. It is milliseconds, but the kernel lists interfaces
    under a lock (RTNL) that it holds for seconds while it takes down a big namespace. Raises OSError, of which
    TimeoutError is one.
    """
    deadline = time.monotonic() + _TIME_LIMIT if deadline is None else deadline
    found: list[tuple[int, dict[str, Any]]] = []
    for header, data, offset, end in _dump(ifaddrmsg(), rtnl.RTM_GETADDR, deadline):
        family, prefixlen, flags, _scope, index = struct.unpack_from("BBBBI", data, offset)
        attributes = _attributes(data, offset + 8, end, _IFA_WANTED)
        # IFA_ADDRESS is the peer's on a point-to-point link; IFA_LOCAL, where there is one, is ours.
        packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
        if header != rtnl.RTM_NEWADDR or packed is None or len(packed) not in (4, 16):
            continue
        address = ipaddress.ip_address(packed)
        if address.is_loopback or address.is_link_local:
            continue
        if _IFA_FLAGS in attributes:  # 32 bits; the header has room for 8
            (flags,) = struct.unpack("=I", attributes[_IFA_FLAGS])
        # The bit of IFA_F_TEMPORARY means "secondary" with IPv4.
        flags = flags if family == socket.AF_INET6 else 0
        found.append(
            (
                index,
                {
                    "address": address,
                    "prefixlen": prefixlen,
                    "temporary": bool(flags & IFA_F_TEMPORARY),
                    "deprecated": bool(flags & IFA_F_DEPRECATED),
                    "tentative": bool(flags & IFA_F_TENTATIVE),
                    "dad_failed": bool(flags & IFA_F_DADFAILED),
                },
            )
        )
    by_index = {link.index: link for link in links(deadline)} if found else {}
    return [
        InterfaceAddress(
            interface=by_index[index].name,
            mac=by_index[index].mac,
            bridge=by_index[index].kind == "bridge",
            up=by_index[index].up,
            **address,
        )
        for index, address in found
        if index in by_index  # the interface went away between the two questions
    ]


def links(deadline: float | None = None) -> list[Link]:
    """All interfaces of this network namespace, in the kernel's order. Deadline and errors as for `addresses`."""
    deadline = time.monotonic() + _TIME_LIMIT if deadline is None else deadline
    found: dict[int, tuple[int, dict[int, bytes]]] = {}
    for header, data, offset, end in _dump(ifinfmsg(), rtnl.RTM_GETLINK, deadline):
        _family, _type, index, flags = struct.unpack_from("BxHiI", data, offset)
        if header == rtnl.RTM_NEWLINK:
            found[index] = (flags, _attributes(data, offset + 16, end, _IFLA_WANTED))
    names = {index: _string(attributes.get(_IFLA_IFNAME)) for index, (_, attributes) in found.items()}
    result = []
    for index, (flags, attributes) in found.items():
        info = attributes.get(_IFLA_LINKINFO, b"")
        master = attributes.get(_IFLA_MASTER)
        result.append(
            Link(
                index=index,
                name=names[index],
                mac=attributes.get(_IFLA_ADDRESS, b"").hex(":"),
                kind=_string(_attributes(info, 0, len(info), {_IFLA_INFO_KIND}).get(_IFLA_INFO_KIND)),
                carrier=bool(flags & IFF_LOWER_UP),
                up=bool(flags & IFF_UP),
                loopback=bool(flags & IFF_LOOPBACK),
                master=names.get(struct.unpack("=I", master)[0], "") if master else "",
            )
        )
    return result


# rtnetlink(7), linux/if_addr.h and linux/if_link.h.
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_WANTED = {_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS}
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 10, 18
_IFLA_WANTED = {_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO}
_IFLA_INFO_KIND = 1
_NLA_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_TIME_LIMIT = 5.0

_Message = tuple[int, bytes, int, int]
"""Type of a netlink message, the buffer, where its body begins and ends."""


def _dump(question: nlmsg, kind: int, deadline: float) -> list[_Message]:
    """All messages of one dump, once more (a few times) when the kernel's list changed under it.

    pyroute2 sends, receives and knows the end; the messages stay bytes. Decoded by pyroute2, a link costs
    half a millisecond for its forty attributes, and a host with a thousand containers would spend a
    second at every event on values that nobody asked for.
    """
    for _attempt in range(3):
        messages: list[_Message] = []
        try:
            interrupted = asyncio.run(_receive(question, kind, messages, deadline - time.monotonic()))
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, "the kernel did not list the interfaces in time") from None
        if not interrupted:
            break
    return messages


async def _receive(question: nlmsg, kind: int, messages: list[_Message], seconds: float) -> bool:
    interrupted = False

    def keep(data: bytes, offset: int, length: int) -> dict[str, Any]:
        nonlocal interrupted
        header = get_header(data, offset)
        if header["type"] == NLMSG_ERROR:
            # struct nlmsgerr begins with the negative errno.
            code = -struct.unpack_from("=i", data, offset + 16)[0]
            header["error"] = OSError(code, f"netlink: {os.strerror(code)}")
        elif header["type"] != NLMSG_DONE:
            messages.append((header["type"], data, offset + 16, offset + length))
        interrupted |= bool(header["flags"] & NLM_F_DUMP_INTR)
        # Never None, though pyroute2's own parsers do that: it takes a datagram without any message for
        # the end, and the dump for complete.
        return {"header": header}

    async with AsyncIPRoute(groups=0) as ip, asyncio.timeout(seconds):
        request = NetlinkRequest(ip, question, msg_type=kind, msg_flags=NLM_F_REQUEST | NLM_F_DUMP, parser=keep)
        await request.send()
        async for _message in request.response():
            pass
    return interrupted


def _attributes(data: bytes, offset: int, end: int, wanted: set[int]) -> dict[int, bytes]:
    """The wanted attributes of a chain (netlink(7): length, type, value, padding to 4 bytes)."""
    found = {}
    while offset + 4 <= end:
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        if kind & _NLA_TYPE_MASK in wanted:
            found[kind & _NLA_TYPE_MASK] = bytes(data[offset + 4 : offset + length])
        offset += (length + 3) & ~3
    return found


def _string(value: bytes | None) -> str:
    return os.fsdecode((value or b"").rstrip(b"\0"))


class Watcher:
    """Calls `on_change()` in its own thread, soon after addresses or interfaces changed.

    What was lost is never missed: events are only a reason to look again. A burst of them (a container
    starting makes ten) is one call, `settle` seconds after its first; a burst that lasts is one call
    every `settle` seconds. What happens from `start()` on is seen, so start first and look then.
    """

    def __init__(self, on_change: Callable[[], object], *, settle: float = 0.1) -> None:
        self._on_change = on_change
        self._settle = settle
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake = -1

    def start(self) -> None:
        """Watches the network namespace of the calling thread. Raises OSError."""
        # A plain socket: nothing is decoded, so neither a library nor the messages are needed.
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            events.setblocking(False)
            events.bind((0, rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR | rtnl.RTMGRP_IPV6_IFADDR))
            self._wake = os.eventfd(0)
            self._thread = threading.Thread(target=self._run, args=(events,), name="interfaces", daemon=True)
            self._thread.start()
        except BaseException:
            events.close()
            self._close_wake()
            self._thread = None
            raise

    def stop(self) -> None:
        """Ends the thread and waits for it, and so for an `on_change()` that is running (call it elsewhere)."""
        self._stop.set()
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._close_wake()
            self._thread = None

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _close_wake(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _run(self, events: socket.socket) -> None:
        with events:
            poll = select.poll()
            poll.register(events, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            while not self._stop.is_set():
                poll.poll()
                if self._stop.wait(self._settle):
                    return
                _drain(events)
                try:
                    self._on_change()
                except Exception:
                    log.exception("looking at the changed interfaces failed; the next change is another try")


def _drain(events: socket.socket) -> None:
    """Takes everything that waits off the socket; lost messages (ENOBUFS) are messages as well."""
    while True:
        try:
            events.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EINTR):
                raise
