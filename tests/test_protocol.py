"""Docker's requests as bytes: every byte string gets a value or a refusal, and the refusal is one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipam_plugin import protocol
from ipam_plugin.errors import BadRequest
from ipam_plugin.protocol import Purpose, ReleaseAddress, ReleasePool, RequestAddress, RequestPool
from properties import refusal

KINDS = (RequestPool, ReleasePool, RequestAddress, ReleaseAddress)
MAC = protocol.MAC_LABEL
NAME = protocol.NAME_LABEL

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(("PoolID", "Address", "Options", "Pool", "SubPool", "AddressSpace", "V6", "Other"))
bodies = (
    st.binary(max_size=200)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(fields, json_values | st.just("10.0.0.1"), max_size=6).map(lambda v: json.dumps(v).encode())
)


@given(bodies, st.sampled_from(KINDS))
@example(b"[" * 100_000, RequestAddress)
@example(b'{"PoolID": "\\ud800"}', ReleasePool)
@example(b'{"PoolID": "\xff"}', ReleasePool)
@example(b'{"PoolID": "p", "Address": ' + b"9" * 5000 + b"}", ReleaseAddress)
@example(b'\xef\xbb\xbf{"PoolID": "p"}', ReleasePool)
def test_any_bytes_are_a_request_or_refused(body: bytes, kind: Any) -> None:
    """Any byte string gets an answer, never a traceback, and what is answered can be sent (section 5)."""
    refused = refusal(BadRequest, protocol.decode, body, kind)
    protocol.encode_error(protocol.one_line(refused))
    if not refused:
        protocol.encode({"said": str(protocol.decode(body, kind).PoolID if kind is not RequestPool else "")})


@pytest.mark.parametrize("body", [b"", b" ", b"\n", b"\t\r\n "])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_body_is_a_retry_whose_content_was_lost(body: bytes, kind: Any) -> None:
    """Refused, never taken for "any address": the first try may have been carried out (moby#39331)."""
    with pytest.raises(BadRequest, match=r"empty request body.*moby#39331.*try the docker command again"):
        protocol.decode(body, kind)


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"{}", ReleasePool, "PoolID"),
        (b'{"PoolID": 5}', ReleasePool, "PoolID"),
        (b'{"PoolID": "p"}', ReleaseAddress, "Address"),
        (b'{"PoolID": "p", "Options": {"a": 1}}', RequestAddress, "Options"),
        (b'{"PoolID": null}', RequestAddress, "PoolID"),
        (b"null", RequestPool, "RequestPool"),
        (b"{", RequestPool, "RequestPool"),
    ],
)
def test_the_refusal_names_the_field(body: bytes, kind: Any, said: str) -> None:
    """P7: whoever writes a client is told which field is wrong."""
    with pytest.raises(BadRequest) as caught:
        protocol.decode(body, kind)
    assert said in str(caught.value)


def test_absent_maps_are_null_and_unknown_fields_are_ignored() -> None:
    """Engines send `null` for an absent map, and newer ones may send more fields."""
    body = b'{"AddressSpace":"a","Pool":"10.0.0.0/24","SubPool":"","Options":null,"V6":false,"New":[1]}'
    assert protocol.decode(body, RequestPool) == RequestPool("a", "10.0.0.0/24")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (RequestAddress("p", "", {protocol.ADDRESS_TYPE: protocol.GATEWAY_TYPE}), Purpose.GATEWAY),
        (RequestAddress("p", "10.0.0.1", {protocol.ADDRESS_TYPE: protocol.GATEWAY_TYPE}), Purpose.GATEWAY),
        (RequestAddress("p", "", {MAC: "02:42:0a:00:00:05"}), Purpose.ENDPOINT),
        (RequestAddress("p", "10.0.0.5", {MAC: "02:42:0a:00:00:05"}), Purpose.ENDPOINT),
        (RequestAddress("p", "", {NAME: "web"}), Purpose.ENDPOINT),
        (RequestAddress("p", "10.0.0.5", {NAME: "web"}), Purpose.ENDPOINT),
        (RequestAddress("p", "10.0.0.5", {}), Purpose.AUXILIARY),
        (RequestAddress("p", "10.0.0.5", None), Purpose.AUXILIARY),
        (RequestAddress("p", "10.0.0.5", {protocol.ADDRESS_TYPE: "other"}), Purpose.AUXILIARY),
        (RequestAddress("p", "", {}), Purpose.NAMELESS),
        (RequestAddress("p", "", None), Purpose.NAMELESS),
    ],
)
def test_the_form_of_a_request_tells_its_purpose(sent: RequestAddress, expected: Purpose) -> None:
    """The engine never says what an address is for (section 5): gateway, endpoint, auxiliary, or capabilities lost."""
    assert protocol.purpose(sent) is expected


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("02:42:AC:11:00:02", "02:42:ac:11:00:02"),
        ("02-42-ac-11-00-02", "02:42:ac:11:00:02"),
        ("2:42:ac:11:0:2", "02:42:ac:11:00:02"),
        ("", ""),
    ],
)
def test_a_mac_has_one_spelling(sent: str, expected: str) -> None:
    """MACs are compared with those of the kernel and of the wire, so every spelling of one becomes the same."""
    assert protocol.mac_of(RequestAddress("p", "", {MAC: sent})) == expected


@pytest.mark.parametrize("sent", ["x", "02:42", "02:42:ac:11:00:02\n", "02:42:ac:11:00:0g", "02" * 3000])
def test_what_is_no_mac_is_refused(sent: str) -> None:
    """A MAC ends up in etcd and on terminals; nothing else passes for one."""
    with pytest.raises(BadRequest, match="is not a MAC address"):
        protocol.mac_of(RequestAddress("p", "", {MAC: sent}))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "x" * 256, "\u202egnp"])
def test_a_container_name_cannot_spoil_a_terminal(name: str) -> None:
    """Names come from the engine, are stored and shown: printable, of bounded length."""
    with pytest.raises(BadRequest, match="255 printable"):
        protocol.container_name(RequestAddress("p", "", {NAME: name}))


def test_a_container_name_is_stored_without_its_slash() -> None:
    """Docker's API writes /web for the container web."""
    assert protocol.container_name(RequestAddress("p", "", {NAME: "/web"})) == "web"
    assert protocol.container_name(RequestAddress("p")) == ""


@given(st.text(max_size=1500))
def test_one_line_is_one_printable_line(text: str) -> None:
    """P7: what the user of `docker run` sees is one line, whatever stood in etcd or in the request."""
    line = protocol.one_line(text)
    assert line.isprintable()
    assert len(line) <= 1000
    assert text[:900] == line[:900] or not text[:900].isprintable()


@given(st.text(max_size=50))
def test_an_error_is_readable_in_both_channels(text: str) -> None:
    """Engines read `Err` with a status other than 200 and `Error` with 200: both are there and say the same."""
    message = protocol.one_line(text)
    assert json.loads(protocol.encode_error(message)) == {"Err": message, "Error": message}


@given(st.text(max_size=60))
def test_an_address_is_read_or_refused(text: str) -> None:
    """Whatever stands in Address, the outcome is an address or a BadRequest."""
    assert refusal(BadRequest, protocol.address_of, text)[:9] in ("", "Address: ")


def test_capabilities_and_address_spaces() -> None:
    """MACs tell endpoints from auxiliary addresses; no replay; two different address spaces (section 5)."""
    assert protocol.CAPABILITIES == {"RequiresMACAddress": True, "RequiresRequestReplay": False}
    assert len(set(protocol.ADDRESS_SPACES.values())) == 2
    assert protocol.ACTIVATE == {"Implements": ["IpamDriver"]}
