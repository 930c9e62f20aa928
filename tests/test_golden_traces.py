"""What real engines said (20.10, 26.1 and 28.5, recorded with a stand-in driver), said to this driver.

A trace is a list of steps (the docker command) and of calls (path, headers, body, the stand-in's reply).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Host, Lan, bridge, nic
from ipam_plugin.errors import PoolUnknown
from ipam_plugin.model import Pool

TRACES = sorted((Path(__file__).parent / "traces").glob("*.jsonl"))
REPLAYS = ("20", "26", "28")  # recorded with RequiresRequestReplay true, which this driver does not say


def records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)


def send(host: Host, call: dict[str, Any], body: dict[str, Any] | None) -> tuple[int, Any]:
    """As the engine sends it: its headers, no Content-Type, and no body where the call has no arguments."""
    host.catch_up()
    raw = json.dumps(body, separators=(",", ":")).encode() + b"\n" if body is not None else b""
    headers = {**call["headers"], "Content-Length": str(len(raw))}
    if not headers["Host"]:
        del headers["Host"]  # the test client has to have one
    assert "Content-Type" not in headers
    reply = host.post(call["path"], raw, headers)
    return reply.status, reply.body


class Replay:
    """One engine's trace, with our PoolIDs and addresses in place of the stand-in's."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.pools: dict[str, str] = {}
        self.addresses: dict[tuple[str, str], str] = {}

    def play(self, call: dict[str, Any], options: dict[str, str]) -> None:
        method = call["path"].rpartition(".")[2]
        theirs = json.loads(call["body"]) if call["body"] else None
        ours = dict(theirs) if theirs is not None else None
        if method == "RequestPool":
            ours["Options"] = options
        if ours is not None and "PoolID" in ours:
            ours["PoolID"] = self.pools[theirs["PoolID"]]
            ours["Address"] = self.addresses.get((theirs["PoolID"], theirs.get("Address", "")), ours.get("Address", ""))
        if method == "ReleasePool":
            ours = {"PoolID": ours["PoolID"]}
        status, reply = send(self.host, call, ours)
        assert status == 200, (call, reply)
        self.check(method, ours, reply)
        if method == "RequestPool":
            self.pools[call["reply"]["PoolID"]] = reply["PoolID"]
        elif method == "RequestAddress":
            key = theirs["PoolID"], call["reply"]["Address"].partition("/")[0]
            self.addresses[key] = reply["Address"].partition("/")[0]

    def check(self, method: str, asked: Any, reply: Any) -> None:
        """The shape that the engine needs, with nothing that would be taken for an error."""
        assert "Err" not in reply
        assert "Error" not in reply
        if method == "Activate":
            assert reply == {"Implements": ["IpamDriver"]}
        elif method == "GetCapabilities":
            assert reply == {"RequiresMACAddress": True, "RequiresRequestReplay": False}
        elif method == "GetDefaultAddressSpaces":
            assert reply["LocalDefaultAddressSpace"] != reply["GlobalDefaultAddressSpace"]
        elif method == "RequestPool":
            assert Pool.parse(reply["PoolID"]).id == reply["PoolID"]
            assert reply["Pool"] == asked["Pool"]
            assert reply["Data"] == {}
        elif method == "RequestAddress":
            address, _, length = reply["Address"].partition("/")
            subnet = Pool.parse(asked["PoolID"]).subnet
            assert length == str(subnet.prefixlen)
            assert asked["Address"] in ("", address)
            assert reply["Data"] == {}
        else:
            assert reply == {}


@pytest.mark.parametrize("replayed_too", [True, False], ids=["replayed", "as-we-ask"])
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_recorded_call_is_answered(path: Path, replayed_too: bool) -> None:
    """Every call of a real engine gets 200 in the shape it needs; at the end only hosts' own addresses are held.

    The option `k=v` and macvlan without `gateway=router` are left to the refusals' own tests. A replay, which this
    driver does not ask for, is answered too, but counts once more, and the engine's clean-up after it takes back
    that only: then what remains is exactly what was replayed. Without the replay nothing remains.
    """
    with Lan() as lan:
        other = lan.host("other", nic("172.16.1.77/24"))
        other.create("172.16.1.0/24")
        host = lan.host("here")
        engine = Replay(host)
        options: dict[str, str] = {}
        replayed: list[str] = []
        for record in records(path):
            if "step" in record:
                step = record["step"]
                if step.startswith("docker network create"):
                    options = {"gateway": "router"} if "-d macvlan" in step else {}
                if "mvnogw" in step:
                    break
                after_crash = step.startswith("kill -9")
                continue
            replay = after_crash and "Request" in record["path"]
            if replay and not replayed_too:
                continue
            engine.play(record, options if '"k":"v"' not in record["body"] else {})
            if replay and record["path"].endswith("RequestAddress"):
                replayed.append(json.loads(record["body"])["Address"])
        left = {address: lease for address, lease in lan.leases().items() if lease.host != "other"}
        assert bool(replayed) == (replayed_too and path.stem in REPLAYS)
        assert set(left) == {engine.addresses[("172.16.1.0/24", each)] for each in replayed}


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_the_recorded_option_is_refused_by_its_name(path: Path) -> None:
    """`--ipam-opt k=v` is not one of ours: the network is refused, the sentence names `k`, nothing is written."""
    with Lan() as lan:
        host = lan.host("here")
        calls = [each for each in records(path) if '"k":"v"' in each.get("body", "")]
        assert calls
        for call in calls:
            status, reply = send(host, call, json.loads(call["body"]))
            assert status == 400
            assert reply["Err"] == reply["Error"]
            assert "'k'" in reply["Err"]
            assert "gateway" in reply["Err"], "the known options are named"
        assert lan.keys() == {}


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_recorded_macvlan_network_on_a_lan_bridge(path: Path) -> None:
    """macvlan needs `gateway=router`: without it the gateway is this host's own address, and one given is refused.

    Engines up to 28 ask for macvlan's gateway also where the user gave none; with `gateway=router` and no router
    known, that is refused with what to type, and with the segment's router set it is that one.
    """
    with Lan() as lan:
        host = lan.host("here", bridge("172.16.1.11/24"))
        calls: dict[str, list[dict[str, Any]]] = {}
        for record in records(path):
            if "step" in record:
                step = record["step"]
            elif "macvlan" in step:
                calls.setdefault("none" if "no gateway" in step else "given", []).append(record)
        pool_call, given = [each for each in calls["given"] if "Request" in each["path"]]
        _, none = [each for each in calls["none"] if "Request" in each["path"]]

        def created(options: dict[str, str]) -> str:
            status, reply = send(host, pool_call, {**json.loads(pool_call["body"]), "Options": options})
            assert status == 200
            return str(reply["PoolID"])

        def gateway(call: dict[str, Any], pool: str) -> tuple[int, Any]:
            return send(host, call, {**json.loads(call["body"]), "PoolID": pool})

        plain = created({})
        status, reply = gateway(given, plain)
        assert status == 409
        assert "172.16.1.254" in reply["Err"]
        assert "--aux-address DefaultGatewayIPv4=172.16.1.254" in reply["Err"]
        router = created({"gateway": "router"})
        assert gateway(given, router) == (200, {"Address": "172.16.1.254/24", "Data": {}})
        status, reply = gateway(none, router)
        assert status == 409
        assert "--gateway" in reply["Err"]
        lan.put("/ipam-plugin/v1/segments/default", '{"router":"172.16.1.1"}')
        assert gateway(none, router) == (200, {"Address": "172.16.1.1/24", "Data": {}})


def test_a_stand_ins_pool_id_is_not_ours() -> None:
    """A PoolID that another driver made is unknown, not guessed at."""
    with pytest.raises(PoolUnknown):
        Pool.parse("172.16.1.0/24")
