"""Docker's remote IPAM protocol: bytes to values and back. Pure.

Facts about the engines (20.10 to 29): bodies come without a Content-Type; calls without arguments have an
empty body; all fields are always there; absent maps are `null`; there are no typed errors, and only status
200 is success. An engine that lost its connection sends the request again *with an empty body*, although the
first one may have been carried out (moby#39331): such a body is refused, never taken for "any address".
"""

from __future__ import annotations

import enum
import re
from typing import Any, TypeVar

import msgspec

from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.errors import BadRequest

LIMIT = 64 * 1024  # bytes of a request's body; real ones have a few hundred

ADDRESS_TYPE = "RequestAddressType"
GATEWAY_TYPE = "com.docker.network.gateway"
MAC_LABEL = "com.docker.network.endpoint.macaddress"  # sent because our capabilities ask for it
NAME_LABEL = "com.docker.network.endpoint.name"  # engines from 29 on

ACTIVATE = {"Implements": ["IpamDriver"]}
# The MAC is what tells an endpoint's request from an auxiliary one on engines before 29. No replay: etcd remembers.
CAPABILITIES = {"RequiresMACAddress": True, "RequiresRequestReplay": False}
# Two different names: engines from 27 on skip a check of theirs when local and global are the same.
ADDRESS_SPACES = {"LocalDefaultAddressSpace": "ipam-plugin-local", "GlobalDefaultAddressSpace": "ipam-plugin-global"}

_MAC = re.compile(r"[0-9a-fA-F]{1,2}(?:[:-][0-9a-fA-F]{1,2}){5,7}")


class RequestPool(msgspec.Struct, frozen=True):
    AddressSpace: str = ""
    Pool: str = ""
    SubPool: str = ""
    Options: dict[str, str] | None = None
    V6: bool = False


class ReleasePool(msgspec.Struct, frozen=True):
    PoolID: str


class RequestAddress(msgspec.Struct, frozen=True):
    PoolID: str
    Address: str = ""
    Options: dict[str, str] | None = None


class ReleaseAddress(msgspec.Struct, frozen=True):
    PoolID: str
    Address: str


class Purpose(enum.Enum):
    """What an address is requested for. The engine does not say it; its form does."""

    GATEWAY = "gateway"
    ENDPOINT = "endpoint"
    AUXILIARY = "auxiliary"  # a replayed endpoint looks the same
    NAMELESS = "endpoint without a MAC"  # the engine lost our capabilities


Body = TypeVar("Body", RequestPool, ReleasePool, RequestAddress, ReleaseAddress)

# Made before there are threads, see model.readable.
_DECODERS: dict[type, Any] = {
    kind: msgspec.json.Decoder(kind) for kind in (RequestPool, ReleasePool, RequestAddress, ReleaseAddress)
}


def decode(body: bytes, kind: type[Body]) -> Body:
    """Raises BadRequest with one line that names the wrong field."""
    if not body.strip():
        raise BadRequest(
            "empty request body: the engine lost the connection and sent the request again without its content"
            " (moby#39331); nothing was done, try the docker command again"
        )
    try:
        decoded: Body = _DECODERS[kind].decode(body)
        return decoded
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).replace("`", "").replace("$.", "")
        raise BadRequest(f"the request is not the JSON object that {kind.__name__} needs: {reason}") from None


def encode(answer: dict[str, Any]) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


def encode_error(message: str) -> bytes:
    """Readable in both of the engines' channels: `Err` with a status other than 200, `Error` with 200."""
    return encode({"Err": message, "Error": message})


def one_line(text: str) -> str:
    """The text as one line of bounded length, without control characters: it ends up on somebody's terminal."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= 1000 else line[:997] + "..."


def purpose(request: RequestAddress) -> Purpose:
    options = request.Options or {}
    if options.get(ADDRESS_TYPE) == GATEWAY_TYPE:
        return Purpose.GATEWAY
    if MAC_LABEL in options or NAME_LABEL in options:
        return Purpose.ENDPOINT
    return Purpose.AUXILIARY if request.Address else Purpose.NAMELESS


def mac_of(request: RequestAddress) -> str:
    mac = (request.Options or {}).get(MAC_LABEL, "")
    if mac and not _MAC.fullmatch(mac):
        raise BadRequest(f"option {MAC_LABEL}: {mac[:40]!r} is not a MAC address")
    return ":".join(part.zfill(2) for part in mac.lower().replace("-", ":").split(":")) if mac else ""


def container_name(request: RequestAddress) -> str:
    name = (request.Options or {}).get(NAME_LABEL, "")
    if len(name) > 255 or not name.isprintable():
        raise BadRequest(f"option {NAME_LABEL}: a container's name has at most 255 printable characters")
    return name.removeprefix("/")


def address_of(text: str) -> Address:
    """Docker sends a bare address. Raises BadRequest."""
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadRequest(f"Address: {error}") from None
