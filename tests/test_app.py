"""What goes over the wire: bad input, the waiting limit, and answers that need nobody.

Every refusal is one line in `Err` and `Error` with a status other than 200, and changes nothing in etcd.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import FakeEtcd
from harness import GATEWAY, MAC, NAME, Host, Lan, bridge, until
from ipam_plugin import protocol
from ipam_plugin.app import MIME, WAITING, create_app, status_of
from ipam_plugin.errors import (
    AddressTaken,
    BadRequest,
    EtcdRefused,
    EtcdUnavailable,
    NotServing,
    OutcomeUnknown,
    PoolExhausted,
    PoolUnknown,
    ProbeFailed,
    Refused,
)
from ipam_plugin.etcd import KeyValue
from ipam_plugin.metrics import Metrics

ENDPOINTS = ("RequestPool", "ReleasePool", "RequestAddress", "ReleaseAddress")


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made:
        yield made


@pytest.fixture
def host(lan: Lan) -> Host:
    made = lan.host("a", bridge("192.168.1.11/24"))
    made.create()
    return made


# ------------------------------------------------------------------------------------- what needs nobody


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/Plugin.Activate", {"Implements": ["IpamDriver"]}),
        ("/IpamDriver.GetCapabilities", {"RequiresMACAddress": True, "RequiresRequestReplay": False}),
        (
            "/IpamDriver.GetDefaultAddressSpaces",
            {"LocalDefaultAddressSpace": "ipam-plugin-local", "GlobalDefaultAddressSpace": "ipam-plugin-global"},
        ),
    ],
)
@pytest.mark.parametrize("body", [b"", b"{}", b"null", b"\xff\xfe", b"x" * 100_000], ids=lambda body: repr(body[:4]))
def test_calls_without_arguments_need_no_etcd(path: str, expected: dict[str, Any], body: bytes) -> None:
    """P6: Activate, GetCapabilities and GetDefaultAddressSpaces need neither etcd nor a body."""
    etcd = FakeEtcd()
    etcd.set_down(True)
    with Lan(etcd) as lan:
        host = lan.host("a")
        assert host.post(path, body) == (200, expected)


def test_the_answer_is_what_an_engine_reads(host: Host) -> None:
    """An engine wants one JSON value with status 200 and looks at no type; people with curl see the usual one."""
    answer = host.app.test_client().post("/Plugin.Activate")
    assert answer.content_type == MIME
    assert answer.data.endswith(b"\n")


# --------------------------------------------------------------------------------------------- bad input

POOL = "default/192.168.1.0/24"

# what, method, body, status, what the sentence says
BAD: list[tuple[str, str, Any, int, str]] = [
    ("empty", "RequestAddress", b"", 400, "moby#39331"),
    ("empty pool request", "RequestPool", b"", 400, "moby#39331"),
    ("empty release", "ReleaseAddress", b"\n", 400, "moby#39331"),
    ("empty pool release", "ReleasePool", b"  ", 400, "moby#39331"),
    ("not JSON", "RequestAddress", b"PoolID=x", 400, "JSON"),
    ("not UTF-8", "RequestAddress", b'{"PoolID":"\xff"}', 400, "JSON"),
    ("half a body", "RequestAddress", b'{"PoolID":"default/19', 400, "JSON"),
    ("two values", "RequestAddress", b'{"PoolID":"a"}{"PoolID":"b"}', 400, "JSON"),
    ("a list", "RequestPool", b"[]", 400, "array"),
    ("null", "RequestPool", b"null", 400, "null"),
    ("nested", "RequestPool", b"[" * 30_000, 400, "JSON"),
    ("number for a string", "RequestAddress", {"PoolID": 5}, 400, "PoolID"),
    ("number for options", "RequestAddress", {"PoolID": POOL, "Options": 5}, 400, "Options"),
    ("number in options", "RequestPool", {"Pool": "192.168.1.0/24", "Options": {"segment": 5}}, 400, "Options"),
    ("text for a truth value", "RequestPool", {"Pool": "192.168.1.0/24", "V6": "no"}, 400, "V6"),
    ("no PoolID", "RequestAddress", {"Address": "192.168.1.5"}, 400, "PoolID"),
    ("no Address", "ReleaseAddress", {"PoolID": POOL}, 400, "Address"),
    ("10 MB", "RequestAddress", b'{"PoolID":"' + b"x" * 10_000_000 + b'"}', 400, "bytes"),
    ("unknown PoolID", "RequestAddress", {"PoolID": "172.16.1.0/24"}, 404, "172.16.1.0/24"),
    ("other spelling", "RequestAddress", {"PoolID": "default/192.168.001.0/24"}, 404, "192.168.001.0/24"),
    ("PoolID upwards", "RequestAddress", {"PoolID": "default/../../hosts"}, 404, ".."),
    ("PoolID upwards in a release", "ReleaseAddress", {"PoolID": "../x", "Address": "192.168.1.5"}, 400, ".."),
    ("PoolID upwards, pool", "ReleasePool", {"PoolID": "default/192.168.1.0/24/../x"}, 400, ".."),
    ("PoolID that steers", "ReleasePool", {"PoolID": "\x1b[2J"}, 400, "PoolID"),
    ("outside", "RequestAddress", {"PoolID": POOL, "Address": "192.168.2.5"}, 400, "192.168.2.5"),
    ("IPv6 in IPv4", "RequestAddress", {"PoolID": POOL, "Address": "fd00::5"}, 400, "IPv6"),
    ("IPv4 in IPv6", "RequestAddress", {"PoolID": "default/fd00::/64", "Address": "192.168.1.5"}, 400, "IPv4"),
    ("no address", "RequestAddress", {"PoolID": POOL, "Address": "router"}, 400, "router"),
    ("address with a length", "RequestAddress", {"PoolID": POOL, "Address": "192.168.1.5/24"}, 400, "192.168.1.5/24"),
    ("address with a zone", "RequestAddress", {"PoolID": "default/fd00::/64", "Address": "fd00::5%e"}, 400, "zone"),
    ("no MAC", "RequestAddress", {"PoolID": POOL, "Options": {MAC: "nobody"}}, 400, "MAC"),
    ("name that steers", "RequestAddress", {"PoolID": POOL, "Options": {NAME: "\x1b[2J"}}, 400, "name"),
    ("released: no address", "ReleaseAddress", {"PoolID": POOL, "Address": "x y"}, 400, "x y"),
    ("host bits", "RequestPool", {"Pool": "192.168.1.5/24"}, 400, "192.168.1.0/24"),
    ("no length", "RequestPool", {"Pool": "192.168.1.0"}, 400, "192.168.1.0"),
    ("no subnet at all", "RequestPool", {"Pool": "LAN/24"}, 400, "LAN/24"),
    ("subnet with a zone", "RequestPool", {"Pool": "fe80::%;x=y/64", "V6": True}, 400, "--subnet"),
    ("range outside", "RequestPool", {"Pool": "192.168.1.0/24", "SubPool": "192.168.2.0/25"}, 400, "--ip-range"),
    ("range wider", "RequestPool", {"Pool": "192.168.1.0/24", "SubPool": "192.168.0.0/16"}, 400, "--ip-range"),
    ("range of IPv6", "RequestPool", {"Pool": "192.168.1.0/24", "SubPool": "fd00::/64"}, 400, "--ip-range"),
    ("range, host bits", "RequestPool", {"Pool": "192.168.1.0/24", "SubPool": "192.168.1.5/25"}, 400, "192.168.1.0/25"),
    ("unknown option", "RequestPool", {"Pool": "192.168.1.0/24", "Options": {"k": "v"}}, 400, "'k'"),
    ("no subnet", "RequestPool", {"Pool": ""}, 400, "--subnet"),
    ("null pool", "RequestPool", {"AddressSpace": "L", "Options": None}, 400, "--subnet"),
    ("any of this size", "RequestPool", {"Pool": "0.0.0.0/24"}, 400, "--subnet"),
    ("any IPv6 of this size", "RequestPool", {"Pool": "::/64", "V6": True}, 400, "--subnet"),
    ("any IPv6, spelt out", "RequestPool", {"Pool": "0::/64", "V6": True}, 400, "--subnet"),
    ("IPv4 for IPv6", "RequestPool", {"Pool": "192.168.1.0/24", "V6": True}, 400, "IPv6"),
    *(
        (f"option {option}={value!r}", "RequestPool", {"Pool": "192.168.1.0/24", "Options": {option: value}}, 400, said)
        for option, value, said in [
            ("segment", "../x", "segment"),
            ("segment", "", "segment"),
            ("gateway", "maybe", "host or router"),
            ("probe", "never", "full or fast or off"),
            ("hold", "soon", "duration"),
            ("interface", "eth0/../x", "interface"),
            ("exclude", "192.168.2.5", "192.168.2.5"),
            ("exclude", "192.168.1.9-192.168.1.5", "ends before it begins"),
            ("exclude", "here", "here"),
        ]
    ),
]


@pytest.mark.parametrize(("method", "body", "status", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_refused_by_name(
    lan: Lan, host: Host, method: str, body: Any, status: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """P7: one line that names what is wrong; nothing changes in etcd; the next request is served."""
    before = lan.keys()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = host.post(f"/IpamDriver.{method}", raw)
    assert reply.status == status
    assert says in reply.error
    assert lan.keys() == before
    assert "Traceback" not in caplog.text
    assert not [each for each in caplog.records if each.exc_info]
    host.run(POOL)


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("POST", "/IpamDriver.Nonsense", 404),
        ("POST", "/", 404),
        ("POST", "/../etc/passwd", 404),
        ("POST", "/static/app.py", 404),
        ("POST", "/IpamDriver.RequestPool/", 404),
        ("POST", "/%1b[2J%0a", 404),
        ("GET", "/IpamDriver.RequestAddress", 405),
        ("GET", "/static/app.py", 404),
        ("PUT", "/Plugin.Activate", 405),
        ("DELETE", "/IpamDriver.ReleasePool", 405),
    ],
)
def test_what_this_plugin_does_not_have(host: Host, lan: Lan, verb: str, path: str, status: int) -> None:
    """An unknown call or verb gets one line in the same shape, on one line whatever its path holds."""
    before = lan.keys()
    answer = host.app.test_client().open(path, method=verb)
    assert answer.status_code == status
    said = json.loads(answer.data)
    assert said["Err"] == said["Error"]
    assert said["Err"].isprintable()
    assert lan.keys() == before


def test_a_body_that_breaks_off(host: Host, lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that ends before the body is whole is the caller's fault: a refusal, no traceback in the log."""
    before = lan.keys()
    answer = host.app.test_client().open(
        "/IpamDriver.RequestAddress",
        method="POST",
        input_stream=BytesIO(b'{"PoolID"'),
        environ_overrides={"CONTENT_LENGTH": "500"},
    )
    assert answer.status_code == 400
    assert json.loads(answer.data)["Err"]
    assert not [each for each in caplog.records if each.exc_info]
    assert lan.keys() == before


def test_a_container_name_survives_the_log(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """What a request holds never breaks a line of the log."""
    caplog.set_level(logging.INFO)
    host.post("/IpamDriver.RequestAddress", json.dumps({"PoolID": "a\nb\x1b[2J", "Address": "\u2028"}).encode())
    assert all(each.getMessage().isprintable() for each in caplog.records if each.name.startswith("ipam_plugin"))


# ------------------------------------------------------------------------------------------ random input

_nasty = st.sampled_from(
    ["", POOL, "default/192.168.1.0/24;gateway=router", "default/fd00::/64", "..", "../..", "a/b/c", "192.168.1.7",
     "192.168.1.0/24", "192.168.1.255", "::", "::ffff:192.168.1.5", "fe80::1%eth0", "1" * 300, "\x00", "é\u202e",
     "192.168.1.11", "0.0.0.0/0", "255.255.255.255/32", "192.168.1.0/33", "192.168.1.0/-1", "fd00::/128", "\ud800"]
)  # fmt: skip
_text = st.one_of(_nasty, st.text(max_size=30))
_any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_text, inner, max_size=3)),
    max_leaves=5,
)
_options = st.one_of(
    st.none(),
    st.just(GATEWAY),
    st.dictionaries(
        st.one_of(
            st.sampled_from(["segment", "exclude", "gateway", "interface", "probe", "hold", MAC, NAME, *GATEWAY]), _text
        ),
        st.one_of(_text, st.sampled_from(["router", "host", "off", "10m", "02:42:00:00:00:01", *GATEWAY.values()])),
        max_size=3,
    ),
    _any,
)
_almost_right = st.fixed_dictionaries(
    {},
    optional={
        "PoolID": st.one_of(_text, _any),
        "Address": st.one_of(_text, _any),
        "Pool": st.one_of(_text, _any),
        "SubPool": st.one_of(_text, _any),
        "Options": _options,
        "V6": st.one_of(st.booleans(), _any),
    },
).map(lambda body: json.dumps(body).encode())
# Right but for its values, which are often right too: this goes deeper than the types.
_pools = st.sampled_from([POOL, "default/192.168.1.0/24;gateway=router", "default/fd00::/64", "lab/192.168.1.0/24"])
_plausible = st.fixed_dictionaries(
    {
        "PoolID": st.one_of(_pools, _pools, _pools, _nasty),
        "Address": st.one_of(st.just(""), st.sampled_from(["192.168.1.7", "192.168.1.254", "fd00::7"]), _nasty),
        "Pool": st.one_of(st.sampled_from(["192.168.1.0/24", "10.0.0.0/8", "fd00::/64", "10.1.1.1/32"]), _nasty),
        "SubPool": st.one_of(st.just(""), st.sampled_from(["192.168.1.128/25", "10.0.0.0/30"]), _nasty),
        "Options": st.one_of(
            st.sampled_from([None, {}, GATEWAY, {MAC: "02:42:00:00:00:01"}, {NAME: "web"}, {"gateway": "router"}]),
            st.sampled_from(
                [{"hold": "10m", "probe": "off"}, {"exclude": "192.168.1.1-192.168.1.9"}, {NAME: "é" * 300}]
            ),
            st.dictionaries(st.sampled_from(["segment", "exclude", "hold", "interface", MAC, NAME]), _text, max_size=2),
        ),
        "V6": st.booleans(),
    }
).map(lambda body: json.dumps(body).encode())
_bodies = st.one_of(_plausible, _almost_right, st.binary(max_size=200), _any.map(lambda x: json.dumps(x).encode()))


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Host]:
    with Lan() as lan:
        host = lan.host("a", bridge("192.168.1.11/24"))
        host.create()
        host.create("fd00::/64")
        yield host


class _Tracebacks(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.seen.append(self.format(record))


@settings(max_examples=5000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(method=st.sampled_from(ENDPOINTS), body=_bodies)
def test_no_bytes_cause_a_traceback(fuzzed: Host, method: str, body: bytes) -> None:
    """Any byte string gets an answer: 200, or a refusal in one line; never a 500, never a traceback.

    What was granted can be given back under the PoolID of the answer, so that etcd never holds more than a few.
    """
    handler = _Tracebacks()
    root = logging.getLogger("ipam_plugin")
    root.addHandler(handler)
    try:
        reply = fuzzed.post(f"/IpamDriver.{method}", body)
        assert handler.seen == []
        assert reply.status != 500
        if reply.status != 200:
            assert reply.error
        elif method == "RequestPool":
            assert protocol.one_line(reply.body["PoolID"]) == reply.body["PoolID"][:1000]
            assert fuzzed.release_pool(reply.body["PoolID"]).status == 200
        elif method == "RequestAddress":
            address = reply.ok["Address"].partition("/")[0]
            assert fuzzed.release(json.loads(body)["PoolID"], address).status == 200
    finally:
        root.removeHandler(handler)


# ------------------------------------------------------------------------------------- errors, the waiting


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadRequest, 400),
        (PoolUnknown, 404),
        (Refused, 409),
        (AddressTaken, 409),
        (PoolExhausted, 409),
        (NotServing, 503),
        (EtcdUnavailable, 503),
        (OutcomeUnknown, 503),
        (EtcdRefused, 503),
        (ProbeFailed, 503),
    ],
)
def test_each_error_has_its_status(error: type[Any], status: int) -> None:
    """Docker tells only 200 from the rest; for people each family of errors has one status, and none is 500."""
    assert status_of(error("x")) == status


class _Broken:
    """A register with a bug in it."""

    def request_pool(self, request: Any, deadline: float) -> Any:
        raise KeyError("secret")

    release_pool = request_address = release_address = request_pool

    def engine_asked_capabilities(self) -> None:
        pass


@pytest.mark.parametrize("method", ENDPOINTS)
def test_our_own_bug_is_an_answer_too(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """A bug of ours is a 500 in one line with a reference into the log; the caller sees nothing of its inside."""
    app = create_app(_Broken(), lambda arrival: arrival + 1, metrics=Metrics())
    body = {"PoolID": POOL, "Address": "192.168.1.5", "Pool": "192.168.1.0/24"}
    answer = app.test_client().post(f"/IpamDriver.{method}", data=json.dumps(body))
    assert answer.status_code == 500
    said = json.loads(answer.data)
    assert said["Err"] == said["Error"]
    assert "secret" not in said["Err"]
    reference = said["Err"].rpartition(" ")[2]
    assert any(reference in each.getMessage() and each.exc_info for each in caplog.records)


class GatedEtcd(FakeEtcd):
    """An etcd that answers reads only when the gate is open, or when the deadline has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = 0
        self._count = threading.Lock()

    def get_many(self, keys: Any, *, deadline: float) -> tuple[dict[str, KeyValue | None], int]:
        with self._count:
            self.waiting += 1
        try:
            if not self.gate.wait(max(0.0, deadline - time.monotonic())):
                raise EtcdUnavailable("etcd did not answer (gate)")
        finally:
            with self._count:
                self.waiting -= 1
        return super().get_many(keys, deadline=deadline)


def test_beyond_the_waiting_limit_is_refused_at_once() -> None:
    """P6: with WAITING requests waiting for etcd, the next is refused at once, the three calls that need no etcd are
    answered at once, and when etcd is back all that waited are served."""
    etcd = GatedEtcd()
    with Lan(etcd) as lan:
        host = lan.host("a", time_limit=30.0)
        pool = host.create("10.0.0.0/16")
        host.catch_up()
        etcd.gate.clear()
        statuses: list[int] = []
        body = json.dumps({"PoolID": pool, "Address": "", "Options": {MAC: "02:00:00:00:00:01"}}).encode()
        release = json.dumps({"PoolID": pool, "Address": "10.0.9.9"}).encode()

        def ask(number: int) -> None:
            asked = json.dumps(
                {"PoolID": pool, "Address": f"10.0.{1 + number // 200}.{1 + number % 200}",
                 "Options": {MAC: "02:00:00:00:00:01"}}
            ).encode()  # fmt: skip
            statuses.append(host.post("/IpamDriver.RequestAddress", asked).status)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(WAITING)]
        try:
            for each in threads:
                each.start()
            until(lambda: etcd.waiting == WAITING, "all requests waiting")
            for method, raw in (("RequestAddress", body), ("ReleaseAddress", release)):
                began = time.monotonic()
                reply = host.post(f"/IpamDriver.{method}", raw)
                assert reply.status == 503
                assert str(WAITING) in reply.error
                assert time.monotonic() - began < 2
            for path in ("/Plugin.Activate", "/IpamDriver.GetCapabilities", "/IpamDriver.GetDefaultAddressSpaces"):
                began = time.monotonic()
                assert host.post(path).status == 200
                assert time.monotonic() - began < 2
        finally:
            etcd.gate.set()
            for each in threads:
                each.join(30)
        assert statuses == [200] * WAITING
        assert len(set(lan.leases())) == WAITING
        assert host.endpoint(pool).status == 200


@pytest.mark.parametrize("method", ENDPOINTS)
def test_the_deadline_is_kept_while_etcd_is_silent(method: str) -> None:
    """P6: a request is answered within its time limit when etcd never answers, and says so."""
    etcd = GatedEtcd()
    with Lan(etcd) as lan:
        host = lan.host("a", time_limit=0.3)
        pool = host.create()
        address = host.run(pool)
        host.catch_up()
        etcd.gate.clear()
        body = {"PoolID": pool, "Address": address, "Pool": "192.168.1.0/24", "Options": {}}
        if method == "RequestAddress":
            body |= {"Address": "192.168.1.99", "Options": {MAC: "02:00:00:00:00:01"}}
        began = time.monotonic()
        reply = host.post(f"/IpamDriver.{method}", json.dumps(body).encode())
        assert time.monotonic() - began < 2
        if method.startswith("Release"):
            assert reply.status == 200, "it is in the journal"
        else:
            assert reply.status == 503
            assert "etcd" in reply.error
        etcd.gate.set()


class _Recorder(_Broken):
    """A register that notes the deadline that each of Docker's requests gets."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []

    def request_address(self, request: Any, deadline: float) -> str:
        self.deadlines.append(deadline)
        return "192.168.1.5/24"


def test_whoever_admits_a_request_says_its_deadline() -> None:
    """P6: counted from its arrival, or at boot from the moment when the host serves."""
    register = _Recorder()
    app = create_app(register, lambda arrival: arrival + 1000, metrics=Metrics())
    body = {"PoolID": POOL, "Address": "", "Options": {MAC: "02:00:00:00:00:01"}}
    before = time.monotonic()
    assert app.test_client().post("/IpamDriver.RequestAddress", data=json.dumps(body)).status_code == 200
    [deadline] = register.deadlines
    assert before + 1000 <= deadline <= time.monotonic() + 1000


def test_a_request_that_is_not_admitted_is_refused_with_the_reason() -> None:
    """P7: and the register never sees it."""

    def admit(arrival: float) -> float:
        raise NotServing("etcd is not there: no leader")

    register = _Recorder()
    body = {"PoolID": POOL, "Address": "", "Options": {MAC: "02:00:00:00:00:01"}}
    answer = create_app(register, admit, metrics=Metrics()).test_client().post(
        "/IpamDriver.RequestAddress", data=json.dumps(body)
    )  # fmt: skip
    assert (answer.status_code, json.loads(answer.data)["Err"]) == (503, "etcd is not there: no leader")
    assert register.deadlines == []
