"""The page without a browser: what the board says of a register, and what goes out over HTTP."""

from __future__ import annotations

import datetime
import ipaddress
import json
import math
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flask.testing
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import RealEtcd
from etcd_server import EtcdCluster, until
from ipam_plugin import web
from ipam_plugin.addresses import parse_address, parse_network, range_of, usable_range
from ipam_plugin.board import BLOCKS, CELLS, FREE, HITS, LONGEST, Board, Detail, Found, Map, Overview, clean
from ipam_plugin.errors import ConfigError
from ipam_plugin.etcd import Delete, Etcd, Event, KeyValue, Put
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    EXCLUDED,
    HELD,
    HOST,
    KINDS,
    RESERVED,
    ROUTER,
    STANDBY,
    UNREADABLE,
    Container,
    History,
    Host,
    HostAddress,
    Keys,
    Lease,
    SegmentSettings,
    Tenancy,
    encode,
)
from tests import sample
from tests.browser import WebProcess
from tests.daemons import run
from tests.sample import NOW

KEYS = Keys()
PAGE = Path(web.__file__).parent / "page"
OFFICE = parse_network("192.168.77.0/24")


def board_of(values: Mapping[str, bytes]) -> Board:
    board = Board(KEYS)
    board.reset(((key, value, 1) for key, value in values.items()), 7)
    return board


def kind_at(board: Board, address: str, segment: str = "default") -> str:
    return board.detail(segment, parse_address(address)).kind


# --- the board --------------------------------------------------------------------------------------------


def test_a_map_has_every_kind_and_says_who() -> None:
    """A cell tells what `leases`, `show` and the segment's settings tell."""
    board = board_of(sample.office(KEYS))
    told = board.map("default", OFFICE)
    cells = {each.address: each for each in told.cells}
    assert [*cells] == [str(each) for each in OFFICE]
    for address, kind, words in (
        (sample.SHOP, ENDPOINT, "container shop on host host1 (MAC 02:42:c0:a8:4d:2a) since 2026-11-25T08:00"),
        ("192.168.77.11", HOST, "Docker host host1 itself (br0"),
        ("192.168.77.254", ROUTER, "of host host1, host2, host3 since 2026-10-16"),
        ("192.168.77.140", RESERVED, "by ann@host1: printer, 2nd floor"),
        ("192.168.77.57", CONFLICT, f"MAC {sample.STRANGER}, Brother"),
        ("192.168.77.131", STANDBY, "standby of host host1 since"),
        ("192.168.77.190", HELD, "a hold for container build9 on host host1 until"),
        ("192.168.77.200", UNREADABLE, "the old scanner, ask Tom"),
        ("192.168.77.3", EXCLUDED, "it is excluded (192.168.77.0/29)"),
        ("192.168.77.250", EXCLUDED, "it moves between machines"),
        ("192.168.77.210", RESERVED, "it is reserved by ann@host1 (192.168.77.208-192.168.77.231): phones"),
        ("192.168.77.255", "unusable", "broadcast"),
        ("192.168.77.9", FREE, ""),
    ):
        assert cells[address].kind == kind
        assert words in cells[address].told
    assert (told.use.size, told.use.free) == (254, 254 - sum(told.use.kinds.values()))
    assert {*told.use.kinds} == {*KINDS, UNREADABLE, EXCLUDED}
    assert told.pools[0].hosts == ("host1", "host2", "host3")


def test_the_overview_tells_of_segments_hosts_alarms_and_conflicts() -> None:
    """What an operator has to know before anything else."""
    told = board_of(sample.office(KEYS)).overview()
    [segment] = told.segments
    assert (segment.name, segment.routers, segment.note) == ("default", ("192.168.77.254",), "office, 2nd floor")
    assert [each.subnet for each in segment.subnets] == ["192.168.77.0/24"]
    hosts = {each.name: each for each in told.hosts}
    assert [each.alive for each in hosts.values()] == [True, True, False]
    assert hosts["host3"].absent == sample.ago(NOW, hours=5)
    assert hosts["host1"].since == sample.ago(NOW, days=6)
    assert "is used twice" in hosts["host2"].alarms[0]
    assert hosts["host1"].leases == 1 + 2 + 26 + 1  # its own, standby, containers, one that is held
    assert [each.address for each in told.conflicts] == ["192.168.77.57"]
    assert told.strays == ()
    assert told.more == {}


def test_an_address_has_its_history() -> None:
    """Who had it before, newest first, with why it ended; and no token, which is nobody's business."""
    board = board_of(sample.office(KEYS))
    told = board.detail("default", parse_address(sample.SHOP))
    assert [(each.container.name if each.container else "", each.host) for each in told.past] == [
        ("shop", "host2"),
        ("wiki9", "host1"),
        ("queue9", "host3"),
    ]
    assert told.past[1].why == "found gone by reconcile"
    assert told.container is not None
    assert (told.container.name, told.mac, told.map) == ("shop", "02:42:c0:a8:4d:2a", "192.168.77.0/24")
    assert b"secret-token" not in msgspec.json.encode(told)
    free = board.detail("default", parse_address("192.168.77.9"))
    assert (free.kind, free.told, free.past) == (FREE, "", ())


@pytest.mark.parametrize(
    ("query", "first", "others"),
    [
        (sample.SHOP, sample.SHOP, 0),
        ("192.168.77.9", "192.168.77.9", 10),  # a free one, and those that begin so
        ("02:42:C0:A8:4D:2A", sample.SHOP, 0),
        ("0242-c0a8-4d2a", sample.SHOP, 0),
        ("4d2a", sample.SHOP, 0),
        ("shop", sample.SHOP, None),
        ("MAIL2", "192.168.77.61", 0),
        ("2nd floor", "192.168.77.140", 0),
        ("brother", "192.168.77.57", 0),
        ("registry.example/shop", "192.168.77.24", None),
        ("queue9", sample.SHOP, 0),
        ("02:42:00:00:00:01", sample.SHOP, 0),
    ],
)
def test_search(query: str, first: str, others: int | None) -> None:
    """By what people have in their hands: an address, a MAC in any spelling, a name, a word of a note, or the past."""
    found = board_of(sample.office(KEYS)).search(query)
    assert found.spots[0].address == first
    if others is not None:
        taken = [each for each in found.spots[1:] if each.address != first]
        if query == "192.168.77.9":
            assert {each.address[: len(query)] for each in taken} == {query}
        else:
            assert len(taken) == others
    assert found.spots[0].past == (query in ("queue9", "02:42:00:00:00:01"))


def test_search_finds_hosts() -> None:
    """By name, address or MAC, with what they hold."""
    board = board_of(sample.office(KEYS))
    assert [each.name for each in board.search("host3").hosts] == ["host3"]
    assert [each.name for each in board.search("02-00-00-00-4d-0c").hosts] == ["host2"]
    assert [each.name for each in board.search("192.168.77.11").hosts] == ["host1"]
    assert [each.past for each in board.search("host3").spots] == [False] * (1 + 2 + 26) + [True]  # of shop's history
    assert board.search("").spots == board.search("  ").spots == ()


def test_a_large_network_is_shown_in_blocks_that_lead_to_its_addresses() -> None:
    """A /16 has 256 blocks; what they count is what it counts; each opens, and knows the way back."""
    board = board_of(sample.campus(KEYS, 3000))
    told = board.map("campus", parse_network("10.20.0.0/16"))
    assert told.cells == ()
    assert [each.subnet for each in told.blocks] == [f"10.20.{n}.0/24" for n in range(256)]
    for kind, count in told.use.kinds.items():
        assert sum(each.use.kinds.get(kind, 0) for each in told.blocks) == count
    fullest = max(told.blocks, key=lambda each: each.use.kinds.get(ENDPOINT, 0))
    inside = board.map("campus", parse_network(fullest.subnet))
    assert inside.within == ("10.20.0.0/16",)
    assert sum(each.kind == ENDPOINT for each in inside.cells) == fullest.use.kinds[ENDPOINT]
    # .0 and .255 of a block are addresses like any other; those of the whole are not.
    assert {each.kind for each in board.map("campus", parse_network("10.20.250.0/24")).cells} <= {
        FREE, ENDPOINT, RESERVED, CONFLICT,
    }  # fmt: skip
    assert board.map("campus", parse_network("10.20.0.0/24")).cells[0].kind == "unusable"
    assert board.detail("campus", parse_address("10.20.3.4")).map == "10.20.3.0/24"
    assert len(board.search("rack1").spots) == HITS


def test_an_ipv6_network_shows_what_is_taken() -> None:
    """Nobody looks at 2^64 cells. When even the taken ones are too many, the blocks in which they are."""
    lease = encode(Lease(ENDPOINT, "host1", container=Container("six")))
    few = {KEYS.lease("default", parse_address(f"fd00:77::{n:x}")): lease for n in (1, 0xFFFF)}
    told = board_of(few).map("default", parse_network("fd00:77::/64"))
    assert told.sparse
    assert [each.address for each in told.cells] == ["fd00:77::1", "fd00:77::ffff"]
    assert (told.use.size, told.use.kinds) == (2**53 - 1, {ENDPOINT: 2})
    first = parse_address("fd00:77::")
    many = {KEYS.lease("default", first + n * 7919): lease for n in range(1, CELLS + 2)}
    told = board_of(many).map("default", parse_network("fd00:77::/64"))
    assert told.cells == ()
    assert BLOCKS // 2 < len(told.blocks) <= BLOCKS
    assert sum(each.use.kinds[ENDPOINT] for each in told.blocks) == CELLS + 1
    assert board_of(many).map("default", parse_network(told.blocks[0].subnet)).within == ()  # no pool has it


def test_leases_outside_every_network_have_a_place() -> None:
    """A reservation, or what is left of a network that is gone, would otherwise be nowhere on the page."""
    values = sample.office(KEYS)
    for address in ("10.1.2.3", "10.1.2.200", "fd00::9"):
        values[KEYS.lease("default", parse_address(address))] = encode(Lease(RESERVED))
    [segment] = board_of(values).overview().segments
    assert {each.subnet: len(each.pools) for each in segment.subnets} == {
        "10.1.2.0/24": 0, "192.168.77.0/24": 1, "fd00::/64": 0,
    }  # fmt: skip


def test_changes_are_applied() -> None:
    """What a watch brings, from grant to release, settings and hosts included."""
    board = board_of(sample.office(KEYS))
    key = KEYS.lease("default", parse_address("192.168.77.9"))
    board.apply([(key, encode(Lease(ENDPOINT, "host1", container=Container("new"))), 8)], 8)
    assert (kind_at(board, "192.168.77.9"), board.revision) == (ENDPOINT, 8)
    board.apply([(key, encode(Lease(HELD, "host1")), 9)], 9)
    assert kind_at(board, "192.168.77.9") == HELD
    board.apply([(key, None, 10)], 10)
    assert kind_at(board, "192.168.77.9") == FREE
    board.apply([(KEYS.heartbeat("host3"), b"{}", 11), (KEYS.heartbeat("host1"), None, 11)], 11)
    assert [each.alive for each in board.overview().hosts] == [False, True, True]
    board.apply([(KEYS.segment("default"), encode(SegmentSettings(exclude=("192.168.77.9",))), 12)], 12)
    assert kind_at(board, "192.168.77.9") == EXCLUDED
    board.apply([(KEYS.segment("default"), b"{", 13)], 13)
    assert kind_at(board, "192.168.77.9") == FREE
    assert "cannot be read" in board.detail("default", parse_address("192.168.77.9")).reasons[0]
    assert board.overview().segments[0].error
    for key in [*sample.office(KEYS), KEYS.heartbeat("host3")]:
        board.apply([(key, None, 14)], 14)
    empty = board.overview()
    assert (empty.segments, empty.hosts, empty.conflicts) == ((), (), ())


def test_an_address_that_is_spelled_in_another_way_is_taken() -> None:
    """As the daemons see it, with the key that says so; the usual spelling counts when both are there."""
    odd = f"{KEYS.leases}default/192.168.077.009"
    board = board_of({odd: b"mine"})
    told = board.detail("default", parse_address("192.168.77.9"))
    assert (told.kind, told.key) == (UNREADABLE, odd)
    usual = KEYS.lease("default", parse_address("192.168.77.9"))
    board.apply([(usual, encode(Lease(RESERVED)), 8)], 8)
    assert board.detail("default", parse_address("192.168.77.9")).kind == RESERVED
    board.apply([(usual, None, 9)], 9)
    assert kind_at(board, "192.168.77.9") == UNREADABLE
    board.apply([(odd, None, 10)], 10)
    assert kind_at(board, "192.168.77.9") == FREE


def of(place: str, names: list[str], *values: bytes) -> st.SearchStrategy[tuple[str, bytes | None]]:
    """A change of one of these keys: deleted, junk, or one of the values."""
    return st.tuples(st.sampled_from([f"{place}{name}" for name in names]), st.sampled_from([None, b"[", *values]))


ADDRESSES = ["10.0.0.1", "010.0.0.1", "10.0.0.1/mine", "10.0.0.2", "10.0.0.0/30", "10.0.0.2-10.0.0.9", "fd00::1"]
CHANGES = st.one_of(
    of(f"{KEYS.leases}default/", ADDRESSES, *(encode(Lease(kind, "ab"[len(kind) % 2])) for kind in KINDS)),
    of(f"{KEYS.history}default/", ADDRESSES, *(encode(History((Tenancy(ENDPOINT, name),))) for name in "ab")),
    of(KEYS.hosts, ["a", "b"], *(encode(Host(name, addresses=(HostAddress("10.0.0.1", 24, name),))) for name in "ab")),
    of(
        KEYS.segments, ["default"], b'{"exclude": ["10.0.0.0-10.0.0.6"], "reserved": [{"range": "10.0.0.5-10.0.0.20"}]}'
    ),
    of(KEYS.pools, ["default/10.0.0.0/29/a", "default/10.0.0.0/27/b", "x/y"], b"{}"),
    of(KEYS.alive, ["a", "b"], b"{}"),
    of(KEYS.retiring, ["a", "b/end"], b"{}"),
    st.tuples(st.text(max_size=20).map(KEYS.prefix.__add__), st.none() | st.binary(max_size=20)),
    st.tuples(st.text(max_size=20).map(KEYS.leases.__add__), st.none() | st.binary(max_size=20)),
)


TWINS = [(KEYS.hosts + name, encode(Host(name, addresses=(HostAddress("10.0.0.1", 24, name),)))) for name in "ba"]


@settings(deadline=None, max_examples=300)
@example(TWINS)
@given(st.lists(CHANGES, max_size=30))
def test_following_changes_is_like_reading_anew(changes: list[tuple[str, bytes | None]]) -> None:
    """Whatever is written and deleted in any order: the board says what it would say had it just been read, and its
    counts are those of its cells."""
    followed = board_of({})
    subnet = parse_network("10.0.0.0/27")
    values: dict[str, bytes] = {}
    for revision, (key, value) in enumerate(changes):
        followed.apply([(key, value, revision)], 7)
        followed.map("default", subnet)  # what is kept of an answer must not outlive it
        values.pop(key, None)
        if value is not None:
            values[key] = value
    read = board_of(dict(sorted(values.items())))  # as etcd lists it
    assert followed.overview() == read.overview()
    assert followed.map("default", subnet) == read.map("default", subnet)
    assert followed.search("a") == read.search("a")
    for address in ("10.0.0.1", "10.0.0.2", "fd00::1"):
        assert followed.detail("default", parse_address(address)) == read.detail("default", parse_address(address))
    told = read.map("default", subnet)
    usable = usable_range(subnet)
    cells = [each.kind for each in told.cells if usable.contains(parse_address(each.address))]
    assert told.use.kinds == {kind: cells.count(kind) for kind in {*cells} - {FREE}}
    assert told.use.free == cells.count(FREE)
    msgspec.json.encode([read.overview(), told])


@given(st.text(max_size=600))
def test_texts_are_clean(text: str) -> None:
    """Nothing unprintable, no end of a line, nothing without end; what is harmless stays as it is."""
    cleaned = clean(text)
    assert cleaned.isprintable()
    assert len(cleaned) <= LONGEST
    if text.isprintable() and len(text) <= LONGEST:
        assert cleaned == text


# --- HTTP -------------------------------------------------------------------------------------------------


class FixedEtcd:
    """An etcd whose watch has told everything."""

    watch_connected = True

    def __init__(self, values: Mapping[str, bytes], revision: int = 7) -> None:
        self._values = [KeyValue(key, value, 1, 0) for key, value in values.items()]
        self._revision = revision
        self.on_events: Callable[[list[Event], int], None] = lambda changes, revision: None

    def watch(
        self,
        prefix: str,
        on_reset: Callable[[list[KeyValue], int, int], None],
        on_events: Callable[[list[Event], int], None],
        stop: threading.Event,
    ) -> None:
        self.on_events = on_events
        on_reset(self._values, self._revision, 0)
        stop.wait()

    def close(self) -> None:
        pass


class Visitor:
    """A test client of a page that shows these values."""

    def __init__(self, values: Mapping[str, bytes]) -> None:
        self.etcd = FixedEtcd(values)
        self.live = web.Live(self.etcd, KEYS)
        self.live.start()
        self.client: flask.testing.FlaskClient = web.create_page(self.live, ["ipam.example"]).test_client()

    def get(self, path: str, status: int = 200, **parameters: str) -> Any:
        response = self.client.get(path, query_string=parameters or None)
        assert response.status_code == status, response.text
        return response.json


@pytest.fixture(scope="module")
def visitor() -> Any:
    made = Visitor(sample.office(KEYS))
    yield made
    made.live.stop()


def test_the_api_answers_what_its_schema_says(visitor: Visitor) -> None:
    """Each path of /api/schema is there, and its answer is read back as the very type that describes it."""
    schema = visitor.get("/api/schema")
    assert schema["openapi"].startswith("3.1")
    parameters = {
        "/api/map": {"segment": "default", "subnet": "192.168.77.0/24"},
        "/api/address": {"segment": "default", "address": sample.SHOP},
        "/api/search": {"q": "shop"},
    }
    assert {*schema["paths"]} == {*web.PATHS}
    for path, (_, kind, names) in web.PATHS.items():
        assert {*names} == {*parameters.get(path, {})}
        described = schema["paths"][path]["get"]
        assert [each["name"] for each in described["parameters"]] == [*names]
        reference = described["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        component = schema["components"]["schemas"][reference.rpartition("/")[2]]
        answer = visitor.get(path, **parameters.get(path, {}))
        assert {*answer} <= {*component["properties"]}
        assert {*component["required"]} <= {*answer}
        assert isinstance(msgspec.convert(answer, kind, strict=True), kind)


def test_every_answer_has_the_headers(visitor: Visitor) -> None:
    """Also an error: no script, style or picture from elsewhere, and in nobody's frame."""
    for path in ("/", "/page.js", "/page.css", "/api/overview", "/nothing", "/api/map?subnet=x"):
        headers = visitor.client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"


def test_nothing_comes_from_elsewhere() -> None:
    """The files name no other machine, and make no element out of text."""
    files = [each for each in PAGE.iterdir() if each.suffix in (".html", ".js", ".css", ".svg")]
    assert {each.name for each in files} == {"index.html", "page.js", "page.css", "icon.svg"}
    for file in files:
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son[a-z]+=|style=|javascript:", text), file.name


def test_it_only_reads(visitor: Visitor) -> None:
    """No method but GET and HEAD does anything, on any path."""
    for method in ("post", "put", "delete", "patch"):
        for path in ("/", "/api/overview", "/api/map", "/api/state"):
            assert getattr(visitor.client, method)(path, data=b"x").status_code == 405


def test_what_a_browser_has_is_not_sent_again(visitor: Visitor) -> None:
    """Until something changes; and then at once."""
    made = Visitor(sample.office(KEYS))
    path = "/api/map?segment=default&subnet=192.168.77.0/24"
    first = made.client.get(path)
    etag = {"If-None-Match": first.headers["ETag"]}
    again = made.client.get(path, headers=etag)
    assert (again.status_code, again.data) == (304, b"")
    assert made.client.get("/api/overview", headers=etag).status_code == 200
    made.etcd.on_events([Event(KEYS.lease("default", parse_address("192.168.77.9")), b"{}", 8)], 8)
    changed = made.client.get(path, headers=etag)
    assert (changed.status_code, changed.json["revision"]) == (200, 8)
    made.live.stop()
    # Another run, or another register, may be at the same revision.
    other = Visitor({})
    assert other.client.get(path, headers=etag).status_code == 200
    other.live.stop()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/map", "is not a subnet"),
        ("/api/map?subnet=10.0.0.1/8", "did you mean 10.0.0.0/8?"),
        ("/api/map?subnet=%00%ff", "is not a subnet"),
        ("/api/address?address=10.0.0.256", "is not an IPv4 or IPv6 address"),
        ("/api/address", "is not an IPv4 or IPv6 address"),
    ],
)
def test_a_wrong_question_is_told_so(visitor: Visitor, path: str, words: str) -> None:
    """A sentence, in JSON, and no traceback."""
    assert words in visitor.get(path, 400)["error"]


@pytest.mark.parametrize("path", ["/nothing", "/api/", "/../web.py", "/..%2fweb.py", "/page/page.js", "/%00"])
def test_only_its_own_files_are_served(visitor: Visitor, path: str) -> None:
    """There is no path through the file system at all."""
    assert visitor.get(path, 404)["error"] == "Not Found"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9180", 200),
        ("[::1]:9180", 200),
        ("10.1.2.3", 200),
        ("localhost", 200),
        ("IPAM.example.", 200),
        ("evil.example:9180", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
def test_a_foreign_name_gets_nothing(visitor: Visitor, host: str, status: int) -> None:
    """A web site that points its own name at 127.0.0.1 (DNS rebinding) could otherwise read the register."""
    response = visitor.client.get("/api/overview", headers={"Host": host})
    assert response.status_code in (status, 400 if status != 200 else status)
    assert ("segments" in response.text) == (status == 200)


def test_no_question_makes_the_register_grow(visitor: Visitor) -> None:
    """Names and addresses that somebody makes up leave nothing behind."""
    for number in range(50):
        visitor.get("/api/address", segment=f"made up {number}", address="10.0.0.1")
        visitor.get("/api/map", segment=f"made up {number}", subnet="10.0.0.0/8")
        visitor.get("/api/map", segment="default", subnet="fd00::/8")
    assert [each["name"] for each in visitor.get("/api/overview")["segments"]] == ["default"]
    board = visitor.live.ask(lambda board: board)
    assert {*board._segments} == {"default"}
    assert {name for name, _ in board._rules} <= {"default"}


def test_hostile_values_stay_text() -> None:
    """Wrong types, junk, control characters, megabytes and HTML: every question is answered, quickly, in clean JSON."""
    made = Visitor(
        sample.hostile(KEYS) | {KEYS.lease("default", parse_address("192.168.66.250")): b'{"kind": "reserved"}'}
    )
    began = time.monotonic()
    answers = [
        made.get("/api/overview"),
        made.get("/api/map", segment="default", subnet="192.168.66.0/24"),
        made.get("/api/map", segment="many", subnet="192.168.66.0/24"),
        made.get("/api/map", segment="many", subnet="192.168.0.0/16"),
        made.get("/api/map", segment="default", subnet="0.0.0.0/0"),
        made.get("/api/map", segment="default", subnet="fd00::/8"),
        made.get("/api/map", segment="default", subnet="::/96"),
        made.get("/api/map", segment="__proto__", subnet="192.168.66.0/24"),
        *(made.get("/api/address", segment="default", address=f"192.168.66.{n}") for n in range(256)),
        *(made.get("/api/search", q=text[:200]) for text in ("a", "\x00", "\u202e", "(((", "%", *sample.HOSTILE_TEXTS)),
    ]  # fmt: skip
    assert time.monotonic() - began < 60  # not a matter of speed but of an end

    def texts(value: Any) -> Any:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for name, each in value.items():
                yield name
                yield from texts(each)
        elif isinstance(value, list):
            for each in value:
                yield from texts(each)

    for answer in answers:
        for text in texts(answer):
            assert text.isprintable()
            assert len(text) <= LONGEST
    kinds = {each["address"]: each["kind"] for each in answers[1]["cells"]}
    assert kinds["192.168.66.100"] == kinds["192.168.66.109"] == UNREADABLE
    assert kinds["192.168.66.250"] == RESERVED
    assert FREE not in kinds.values()  # a key names all addresses
    assert answers[0]["strays"]
    made.live.stop()


# --- how it looks -----------------------------------------------------------------------------------------


def schemes() -> dict[str, dict[str, str]]:
    """The colours of page.css by their names, in light and in dark."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\n *\}", (PAGE / "page.css").read_text(), re.DOTALL)
    )
    return {"light": light, "dark": {**light, **dark}}


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio and relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_worked_out_right() -> None:
    """Two values of WCAG's own."""
    assert contrast("#000000", "#ffffff") == 21
    assert math.isclose(contrast("#777777", "#ffffff"), 4.48, abs_tol=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_kind_can_be_read(scheme: str) -> None:
    """WCAG AA for text, 4.5, of each kind's colour against what its letter stands on, in both schemes; 3 for edges."""
    colours = schemes()[scheme]
    script = (PAGE / "page.js").read_text().partition("const KINDS = {")[2].partition("};")[0]
    letters = dict(re.findall(r'(\w+): \["(.?)"', script))
    assert {*letters} == {*KINDS, UNREADABLE, EXCLUDED, FREE, "unusable"}
    assert len({*letters.values()}) == len(letters), "colour is not the only sign"
    for kind in letters:
        assert contrast(colours[kind], colours["surface"]) >= 4.5, kind
    for text in ("text", "quiet", "accent", "conflict"):
        for ground in ("surface", "page"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["edge"], colours["surface"]) >= 3
    # Lines of a pattern under a letter.
    assert contrast(colours["excluded"], colours["line"]) >= 3


# --- the process ------------------------------------------------------------------------------------------


@pytest.mark.etcd
def test_the_page_follows_a_real_etcd(etcd: RealEtcd, tmp_path: Path) -> None:
    """From the command to the answer: what is there at the start, and each change, without being asked again."""
    keys = Keys(etcd.prefix)
    sample.write(etcd.client, sample.office(keys))
    with WebProcess(tmp_path, etcd.settings, etcd.prefix) as page:
        assert page.get("api/overview")["segments"][0]["name"] == "default"
        where = "api/address?segment=default&address=192.168.77.9"
        assert page.get(where)["kind"] == FREE
        key = keys.lease("default", parse_address("192.168.77.9"))
        value = encode(Lease(ENDPOINT, "host1", container=Container("late")))
        done = etcd.client.commit({}, [Put(key, value)], deadline=time.monotonic() + 10)
        until(lambda: page.get("api/state")["revision"] >= done.revision, "the change is known")
        assert "container late on host host1" in page.get(where)["told"]
        etcd.client.commit({}, [Delete(key)], deadline=time.monotonic() + 10)
        until(lambda: page.get(where)["kind"] == FREE, "the address is free again")
        page.process.terminate()
        assert page.process.wait(20) == 0
        assert "Traceback" not in page.log.read_text()


@pytest.mark.etcd
def test_an_outage_of_etcd_is_told(tmp_path: Path) -> None:
    """The last picture stays, and the page says since when it is old; afterwards it follows again."""
    keys = Keys("/web/")
    with EtcdCluster() as cluster:
        client = Etcd(cluster.settings())
        sample.write(client, sample.office(keys))
        with WebProcess(tmp_path, cluster.settings(), keys.prefix) as page:
            until(lambda: page.get("api/state")["connected"], "it follows etcd")
            cluster.members[0].kill()
            until(lambda: not page.get("api/state")["connected"], "the outage is noticed")
            assert page.get("api/overview")["segments"][0]["name"] == "default"
            since = page.get("api/state")["since"]
            assert abs(since - datetime.datetime.now(datetime.UTC).timestamp()) < 60
            cluster.members[0].start()
            cluster.wait_ready()
            until(lambda: page.get("api/state")["connected"], "it follows etcd again", 60)
        client.close()


@pytest.mark.etcd
def test_before_etcd_has_answered_the_page_says_so(tmp_path: Path) -> None:
    """It starts all the same, and is right as soon as there is an etcd."""
    keys = Keys("/web/")
    with EtcdCluster() as cluster:
        client = Etcd(cluster.settings())
        sample.write(client, sample.office(keys))
        cluster.members[0].kill()
        live = web.Live(Etcd(cluster.settings()), keys)
        live.start()
        visitor = web.create_page(live).test_client()
        try:
            assert visitor.get("/api/state").json["loaded"] is False
            assert visitor.get("/api/overview").status_code == 503
            assert "did not answer" in visitor.get("/api/overview").json["error"]
            cluster.members[0].start()
            until(lambda: visitor.get("/api/overview").status_code == 200, "the page is right", 60)
        finally:
            live.stop()
            client.close()


@pytest.mark.etcd
def test_no_secret_is_on_the_page(tmp_path: Path) -> None:
    """Neither the password of etcd nor a lease's token, nor where either is kept, on any path, in the log or in the
    list of processes; and the user of the page needs no more than to read."""
    keys = Keys("/web/")
    password = "correct-horse-battery"
    file = tmp_path / "password"
    file.write_text(password)
    with EtcdCluster() as cluster:
        client = Etcd(cluster.settings())
        sample.write(client, sample.office(keys))
        client.close()
        for command in (
            ("role", "add", "root"),
            ("user", "add", "root:root"),
            ("user", "grant-role", "root", "root"),
            ("role", "add", "reader"),
            ("role", "grant-permission", "reader", "read", keys.prefix, "--prefix=true"),
            ("user", "add", f"page:{password}"),
            ("user", "grant-role", "page", "reader"),
            ("auth", "enable"),
        ):
            cluster.etcdctl(*command)
        login = {"username": "page", "password_file": str(file)}
        with WebProcess(tmp_path, cluster.settings(), keys.prefix, **login) as page:
            said = page.log.read_text() + json.dumps(
                [
                    page.get(path)
                    for path in (
                        "api/state",
                        "api/overview",
                        "api/schema",
                        "api/search?q=192",
                        "api/map?subnet=192.168.77.0/24",
                        f"api/address?address={sample.SHOP}",
                        "api/address?address=192.168.77.131",
                    )
                ]
            )
            assert "container shop" in said
            shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
            for secret in (password, "secret-token", str(file), cluster.endpoints[0]):
                assert secret not in said
            assert password not in shown


def test_where_it_cannot_listen_it_says_so(tmp_path: Path) -> None:
    """At once, in a sentence; nothing has started by then."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"the page cannot be served at 127\.0\.0\.1:\d+: Address already in use"):
            web.serve(FixedEtcd({}), KEYS, f"127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ConfigError, match=r"cannot be served at 192\.0\.2\.1:9180: "):
        web.serve(FixedEtcd({}), KEYS, "192.0.2.1:9180")
    for wrong in ("9180", "127.0.0.1", "127.0.0.1:99999", "::1:9180", "127.0.0.1:"):
        done = run("web", "--listen", wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert "expected ADDRESS:PORT" in done.stderr


def test_the_types_of_the_api_have_no_token() -> None:
    """What is not described cannot be answered."""
    schemas, components = msgspec.json.schema_components([Overview, Map, Detail, Found])
    assert schemas
    assert "token" not in json.dumps(components)
    assert range_of(ipaddress.ip_network("10.0.0.0/8")).size() > CELLS
