"""The command of an operator, on a real Operations and an etcd in memory: tables, JSON, exit status, hostile values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from fakes import FakeEtcd, Fault, Writes
from harness import KEYS, NAME, Host, Lan, bridge
from ipam_plugin import check, cli, daemon, install, scan
from ipam_plugin.addresses import parse_address
from ipam_plugin.errors import DockerUnavailable, ProbeFailed
from ipam_plugin.evidence import Attachment, Look, Network
from ipam_plugin.interfaces import Link
from ipam_plugin.journal import Entry, Journal
from ipam_plugin.model import Alive, HostAddress, Lease, SegmentSettings, decode, encode
from ipam_plugin.model import Host as HostRecord


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self
        return json.loads(self.out)


class _Kept(FakeEtcd):
    """An etcd that outlives the command's client."""

    def close(self) -> None:
        pass


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan(_Kept()) as made:
        yield made


@pytest.fixture
def a(lan: Lan) -> Host:
    return lan.host("a", bridge("192.168.1.11/24"))


Run = Callable[..., Done]


@pytest.fixture
def run(lan: Lan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command as its entry point runs it, with its real configuration and the etcd of the test."""
    config = tmp_path / "config.yaml"
    config.write_text("etcd: {endpoints: [http://127.0.0.1:2379]}\n")
    monkeypatch.setattr(daemon, "etcd_of", lambda config: lan.etcd)
    monkeypatch.setenv("LOGNAME", "eve")
    monkeypatch.setenv("COLUMNS", "60")

    def ran(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["ipam-plugin", "--config", str(config), *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return Done(status, told.out, told.err)

    return ran


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# ------------------------------------------------------------------------------------------------ looking


def test_an_empty_register(run: Run) -> None:
    """Nothing there is no error: a word on stderr, an empty list as JSON, status 0."""
    for command in ("leases", "pools", "hosts"):
        told = run(command)
        assert (told.status, told.out) == (0, "")
        assert told.err.startswith("no ")
        assert run(command, "-o", "json").json == []


def test_leases(run: Run, lan: Lan, a: Host) -> None:
    """Every address that is not free, in the order of addresses, with holder and container; filters; JSON."""
    pool = a.create(gateway="router")
    web = a.endpoint(pool, "192.168.1.100", **{NAME: "web"}).ok["Address"].partition("/")[0]
    a.run(pool, "192.168.1.9")
    a.gateway(pool, "192.168.1.254")
    lan.put(f"{KEYS.leases}default/192.168.1.50", '{"kind":"reserved","note":"the printer","by":"eve"}')
    lan.put(f"{KEYS.leases}lab/10.0.0.1", "?")
    table = run("leases")
    assert table.status == 0
    assert [row[:3] for row in lines(table.out)] == [
        ["SEGMENT", "ADDRESS", "KIND"],
        ["default", "192.168.1.9", "endpoint"],
        ["default", "192.168.1.11", "host"],
        ["default", "192.168.1.50", "reserved"],
        ["default", "192.168.1.100", "endpoint"],
        ["default", "192.168.1.254", "router"],
        ["lab", "10.0.0.1", "unreadable"],
    ]
    assert "the printer" in table.out
    assert next(line for line in table.out.splitlines() if web in line).split()[3:5] == ["a", "web"]
    found = {each["address"]: each for each in run("leases", "-o", "json").json}
    assert found[web]["container"] == {"name": "web"}
    assert found["192.168.1.254"]["holders"] == [{"host": "a", "pool": pool}]
    assert [each["address"] for each in run("leases", "--kind", "endpoint", "-o", "json").json] == ["192.168.1.9", web]
    assert [each["address"] for each in run("leases", "--segment", "lab", "-o", "json").json] == ["10.0.0.1"]
    assert len(run("leases", "--host", "a", "-o", "json").json) == 4
    assert run("leases", "--host", "nobody").status == 0


def test_show(run: Run, lan: Lan, a: Host) -> None:
    """Who has an address, since when, why it is not given, and who had it."""
    pool = a.create()
    a.endpoint(pool, "192.168.1.100", **{NAME: "web"})
    told = run("show", "192.168.1.100")
    assert told.status == 0
    for part in ("is taken (endpoint)", "container web on host a", "since 20", f"pool {pool}"):
        assert part in told.out
    a.release(pool, "192.168.1.100")
    told = run("show", "192.168.1.100")
    assert "is free" in told.out
    assert "before: container web on host a (MAC 02:42:" in told.out
    assert "released" in told.out
    shown = run("show", "192.168.1.100", "-o", "json").json
    assert [(each["segment"], each["verdict"], each["lease"]) for each in shown] == [("default", "resting", None)]
    assert shown[0]["history"][0]["container"] == {"name": "web"}
    run("segment", "default", "--exclude", "192.168.1.64/26")
    assert "it is excluded (192.168.1.64/26)" in run("show", "192.168.1.100").out
    assert "192.168.1.77 in segment default is free" not in run("show", "192.168.1.77").out


def test_show_looks_in_the_right_segments(run: Run, lan: Lan) -> None:
    """In the one named; else wherever something is known of the address; else in the default one. Never nothing."""
    lan.put(KEYS.segment("lab"), '{"exclude":["10.0.0.5"]}')
    nowhere = (
        " in segment default is free, and no network gives it by itself:\n  no network in use has it in its subnet"
    )
    assert run("show", "192.168.1.77").out.startswith(f"192.168.1.77{nowhere}")
    assert run("show", "10.0.0.5").out.startswith("10.0.0.5 in segment lab has no lease, and is not given:")
    assert run("show", "10.0.0.5", "--segment", "default").out.startswith(f"10.0.0.5{nowhere}")
    host = lan.host("x", segment="old")
    pool = host.create("10.9.0.0/24")
    host.release(pool, host.run(pool, "10.9.0.9"))
    assert run("show", "10.9.0.9").out.startswith("10.9.0.9 in segment old is free, and rests:")
    assert "  before: container" not in run("show", "10.9.0.8").out
    assert run("show", "10.9.0.8").out == "10.9.0.8 in segment old is free\n"
    assert run("show", "10.0.0.5", "--segment", "a/b").status == 2


def test_show_names_a_hosts_own_address(run: Run, lan: Lan) -> None:
    """An address that a registered host's interface carries is said to be that host's."""
    record = HostRecord(host="h", addresses=(HostAddress("192.168.1.11", 24, "br0"),))
    lan.put(KEYS.host("h"), encode(record))
    assert "Docker host h itself (br0)" in run("show", "192.168.1.11").out


def test_show_says_what_the_journal_of_this_host_has(run: Run, lan: Lan, a: Host, tmp_path: Path) -> None:
    """On the host that gave an address while etcd was away; elsewhere, and where it cannot be read, nothing is said."""
    address = a.run(a.create(), "192.168.1.100")
    lease = Lease("endpoint", host="a", mac="02:42:00:00:00:99", token="t")
    (tmp_path / "config.yaml").write_text(f"etcd: {{endpoints: [http://127.0.0.1:2379]}}\nstate_dir: {tmp_path}\n")
    assert "journal" not in run("show", address).out
    kept = Journal(tmp_path / "journal")
    kept.append(Entry("released", "p", "x", "default", address))
    assert "released in the journal of this host" in run("show", address).out
    kept.append(Entry("given", "p", "x", "default", "192.168.1.101", lease))
    told = run("show", "192.168.1.101")
    assert told.out.startswith("192.168.1.101 in segment default is taken (endpoint): a container on host a")
    assert "given to a container on host a (MAC 02:42:00:00:00:99) in the journal of this host" in told.out
    kept.close()


def test_show_asks_the_wire(run: Run, lan: Lan, a: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --wire: who answers, also where nobody has registered anything; without the right to, it is refused."""
    a.create()
    card = Link(1, "br0", "02:00:00:00:00:01", "bridge", True, True, False, "")
    monkeypatch.setattr(scan, "require_rights", lambda: None)
    monkeypatch.setattr(scan, "interfaces_of_this_machine", lambda: ([bridge("192.168.1.11/24")], [card]))

    def asked(target: Any, wanted: Any, **_: Any) -> scan.Report:
        return scan.Report({each: ["00:11:22:33:44:55"] for each in wanted}, {}, 6, "")

    monkeypatch.setattr(scan, "ask", asked)
    assert "MAC 00:11:22:33:44:55 answers for it" in run("show", "192.168.1.77", "--wire").out
    assert run("show", "192.168.1.77", "--wire", "-o", "json").json[0]["verdict"] == "in_use"
    assert "the wire could not be asked: no network" in run("show", "10.0.0.1", "--wire").out

    def refused() -> None:
        raise ProbeFailed("raw sockets need the capability CAP_NET_RAW")

    monkeypatch.setattr(scan, "require_rights", refused)
    assert run("show", "192.168.1.77", "--wire").status == 1


def test_pools(run: Run, lan: Lan, a: Host) -> None:
    """Which host uses which subnet and range, with which options, and how full it is."""
    pool = a.create(ip_range="192.168.1.128/25", gateway="router", hold="10m")
    a.run(pool)
    lan.put(f"{KEYS.leases}default/192.168.1.200", encode(Lease("host", "a", pool=pool)).decode())
    lan.put(f"{KEYS.pools}strange/b", "?")
    told = run("pools")
    assert lines(told.out)[1] == [
        "default", "192.168.1.0/24", "192.168.1.128/25", "gateway=router", "hold=10m", "1", "of", "127", "a",
    ]  # fmt: skip
    assert "this version cannot read it" in told.out
    found = run("pools", "-o", "json").json
    assert found[0]["pool"] == pool
    assert found[0]["hosts"][0]["host"] == "a"
    assert found[0]["leases"] == 1


def test_hosts(run: Run, lan: Lan, a: Host) -> None:
    """Alive or not, with their addresses and alarms; also a host of which only leases are known."""
    a.run(a.create())
    record = HostRecord(host="b", version="1", addresses=(HostAddress("192.168.1.12", 24, "br0"),), alarms=("fire",))
    lan.put(KEYS.host("b"), encode(record))
    lan.put(KEYS.heartbeat("b"), encode(Alive(host="b", machine_id="m", boot_id="b", process="p", since="now")))
    told = run("hosts")
    assert [row[:3] for row in lines(told.out)[1:3]] == [["a", "NO", "2"], ["b", "yes", "0"]]
    assert "192.168.1.12/24 br0" in told.out
    assert "ALARM on b: fire" in told.out
    found = {each["host"]: each for each in run("hosts", "-o", "json").json}
    assert (found["a"]["alive"], found["b"]["alive"]) == (False, True)
    assert found["b"]["addresses"][0]["interface"] == "br0"


def test_hosts_that_are_absent(run: Run, lan: Lan) -> None:
    """Since when, as the living ones wrote it down; one that is there again is not absent, whatever its record says."""
    since = "2026-11-22T10:00:00.000Z"
    for name in ("b", "c"):
        lan.put(KEYS.host(name), encode(HostRecord(host=name, absent=since)))
    lan.put(KEYS.heartbeat("c"), encode(Alive(host="c", machine_id="m", boot_id="b", process="p")))
    assert [row[:4] for row in lines(run("hosts").out)[1:]] == [["b", "NO", "since", since], ["c", "yes", "0"]]
    found = {each["host"]: each["absent"] for each in run("hosts", "-o", "json").json}
    assert found == {"b": since, "c": ""}


def test_host_retire_says_what_becomes_of_each_address(run: Run, lan: Lan, a: Host) -> None:
    """A line each, and status 1 as long as something stays."""
    a.create()
    lan.put(KEYS.heartbeat("a"), encode(Alive(host="a", machine_id="m", boot_id="b", process="p")))
    lan.put(KEYS.host("b"), encode(HostRecord(host="b")))
    lease = Lease("endpoint", host="b", pool="default/192.168.1.0/24", token="t")
    for address in ("192.168.1.50", "192.168.1.51"):
        lan.put(KEYS.lease("default", parse_address(address)), encode(lease))
    a.retire()
    told = run("host", "retire", "b")  # the register alone decides on this host's LAN
    assert told.status == 1
    assert {line.partition(":")[0] for line in told.out.splitlines()} == {
        "192.168.1.50 in segment default stays taken",
        "192.168.1.51 in segment default stays taken",
    }
    assert "for 2 of its addresses stay taken" in told.err
    told = run("host", "retire", "b", "--force")
    assert (told.status, told.err) == (0, "")
    assert sorted(told.out.splitlines()) == [
        "192.168.1.50 in segment default is free",
        "192.168.1.51 in segment default is free",
        "host b is out of the register; addresses freed: 2",
    ]
    assert run("host", "retire", "b").status == 1
    assert run("host", "retire", "a", "--force").status == 1


# ----------------------------------------------------------------------------------------------- changing


def test_reserve_and_unreserve_an_address(run: Run, lan: Lan, a: Host) -> None:
    """A reservation keeps an address from every container until it is undone; twice is fine, twice undone is not."""
    pool = a.create(ip_range="192.168.1.8/31")
    assert run("reserve", "192.168.1.9", "--note", "printer").status == 0
    lease = lan.lease("192.168.1.9")
    assert lease is not None
    assert (lease.kind, lease.note) == ("reserved", "printer")
    assert lease.by.startswith("eve@")
    assert run("reserve", "192.168.001.009", "--note", "new printer").status == 0
    said = a.endpoint(pool, "192.168.1.9").error
    assert "eve@" in said
    assert "new printer" in said
    assert a.run(pool) == "192.168.1.8"
    assert "full" in a.endpoint(pool).error
    assert run("unreserve", "192.168.1.9").status == 0
    again = run("unreserve", "192.168.1.9")
    assert again.status == 1
    assert "is not reserved" in again.err
    assert a.run(pool) == "192.168.1.9"


@pytest.mark.parametrize("what", ["192.168.1.8-192.168.1.10", "192.168.1.8/30", "fd00::/120"])
def test_reserve_and_unreserve_a_range(run: Run, lan: Lan, a: Host, what: str) -> None:
    """A range stands in the segment's settings; leases that are in it stay and are named; undone as it was done."""
    address = "fd00::9" if ":" in what else "192.168.1.9"
    pool = a.create("fd00::/64" if ":" in what else "192.168.1.0/24")
    a.run(pool, address)
    told = run("reserve", what, "--note", "lab")
    assert told.status == 0
    assert address in told.err
    assert lan.lease(address) is not None
    other = address[:-1] + "8"
    assert "lab" in a.endpoint(pool, other).error
    assert "reserved with" in run("unreserve", other).err
    assert run("reserve", what, "--note", "twice").status == 0
    assert len(decode(lan.keys()[KEYS.segment("default")], SegmentSettings).reserved) == 1
    wrong = run("unreserve", "10.0.0.0/24")
    assert wrong.status == 1
    assert "these are" in wrong.err
    assert run("unreserve", what).status == 0
    assert a.run(pool, other) == other


def test_reserve_where_a_stranger_was_found(run: Run, lan: Lan) -> None:
    """The printer that a probe found is to stay: a word of the operator's, without a moment in which it is free."""
    key = f"{KEYS.leases}default/192.168.1.140"
    lan.put(key, '{"kind":"conflict","mac":"02:00:00:00:00:01","by":"a","since":"2026-11-22T10:00:00Z","token":"x"}')
    assert run("reserve", "192.168.1.140", "--note", "printer").status == 0
    lease = decode(lan.keys()[key], Lease)
    assert (lease.kind, lease.note, lease.by.partition("@")[0]) == ("reserved", "printer", "eve")


def test_reserve_what_is_kept_for_a_container(run: Run, lan: Lan) -> None:
    """What `adopt` wrote would be lost to its container in the middle of the switch."""
    key = f"{KEYS.leases}default/192.168.1.140"
    lan.put(key, '{"kind":"reserved","host":"a","container":{"name":"web"},"by":"eve","token":"x"}')
    before = lan.keys()
    told = run("reserve", "192.168.1.140", "--note", "printer")
    assert told.status == 1
    assert "web" in told.err
    assert "ipam-plugin unreserve 192.168.1.140" in told.err
    assert lan.keys() == before
    assert run("unreserve", "192.168.1.140").status == 0
    assert run("reserve", "192.168.1.140").status == 0


def test_reserve_what_is_taken(run: Run, lan: Lan, a: Host) -> None:
    """Refused with the holder named, status 1, nothing changed."""
    address = a.endpoint(a.create(), **{NAME: "web"}).ok["Address"].partition("/")[0]
    before = lan.keys()
    told = run("reserve", address)
    assert told.status == 1
    assert "container web on host a" in told.err
    told = run("unreserve", address)
    assert told.status == 1
    assert "is not reserved, it is taken" in told.err
    assert lan.keys() == before


@pytest.mark.parametrize("key", ["192.168.1.9", "192.168.001.009", "192.168.1.9/x"])
def test_unreserve_what_was_written_by_hand(run: Run, lan: Lan, a: Host, key: str) -> None:
    """Any bytes under any spelling reserve an address, and unreserve undoes that."""
    lan.put(f"{KEYS.leases}default/{key}", "mine")
    pool = a.create()
    assert "192.168.1.9" in a.endpoint(pool, "192.168.1.9").error
    assert "unreadable" in run("leases").out
    assert run("unreserve", "192.168.1.9").status == 0
    assert a.run(pool, "192.168.1.9") == "192.168.1.9"


@pytest.mark.parametrize("key", ["192.168.1.8/29", "192.168.1.8-192.168.1.15", "192.168.001.8/29/lab"])
def test_a_range_that_was_written_by_hand(run: Run, lan: Lan, a: Host, key: str) -> None:
    """A lease key that names many addresses takes them all: listed, shown for each of them, and undone as a range."""
    lan.put(f"{KEYS.leases}default/{key}", "the lab")
    pool = a.create()
    assert f"the etcd key '{KEYS.leases}default/{key}' takes it" in a.endpoint(pool, "192.168.1.9").error
    assert lines(run("leases").out)[1][:3] == ["default", "192.168.1.8/29", "unreadable"]
    assert f"the etcd key '{KEYS.leases}default/{key}' takes it" in run("show", "192.168.1.15").out
    assert "is free" in run("show", "192.168.1.16").out
    assert "192.168.1.8/29 in it is taken" in run("reserve", "192.168.1.14-192.168.1.20").err
    assert "is reserved with 192.168.1.8/29" in run("unreserve", "192.168.1.9").err
    assert run("unreserve", "192.168.1.8/29").status == 0
    assert "is not a reserved range" in run("unreserve", "192.168.1.8/29").err
    assert a.run(pool, "192.168.1.9") == "192.168.1.9"


def test_release(run: Run, lan: Lan, a: Host) -> None:
    """A conflict at once; any lease only with --force; a reservation never; what is free is said to be free."""
    pool = a.create()
    a.endpoint(pool, "192.168.1.100", **{NAME: "web"})
    lan.put(f"{KEYS.leases}default/192.168.1.7", '{"kind":"conflict","mac":"02:99:00:00:00:99"}')
    lan.put(f"{KEYS.leases}default/192.168.1.8", '{"kind":"reserved"}')
    before = lan.leases()
    for address, says in [("100", "--force"), ("11", "--force"), ("8", "unreserve"), ("77", "free already")]:
        told = run("release", f"192.168.1.{address}")
        assert told.status == 1
        assert says in told.err
    assert run("release", "192.168.1.8", "--force").status == 1
    assert lan.leases() == before
    assert "02:99:00:00:00:99" in run("release", "192.168.1.7").out
    told = run("release", "192.168.1.100", "--force")
    assert told.status == 0
    assert "container web on host a" in told.out
    assert set(lan.leases()) == {"192.168.1.11", "192.168.1.8"}
    assert "released by eve@" in run("show", "192.168.1.100").out
    assert a.release(pool, "192.168.1.100").status == 200, "the engine's own release comes too late and changes nothing"


def test_segment(run: Run, lan: Lan) -> None:
    """Router, excludes and moving addresses of a segment: set, shown, taken back; the rest of it stays."""
    assert "router none set" in run("segment", "default").out
    run("reserve", "192.168.1.64/30", "--note", "lab")
    routers = ["--router", "192.168.1.254", "--router", "fd00::1"]
    excludes = ["--exclude", "192.168.1.1-192.168.1.9", "--exclude", "192.168.1.99", "--moving", "192.168.1.30"]
    told = run("segment", "default", *routers, *excludes)
    assert told.status == 0
    shown = run("segment", "default")
    for part in (
        "192.168.1.254, fd00::1",
        "192.168.1.1-192.168.1.9",
        "moving   192.168.1.30",
        "192.168.1.64/30 by eve",
    ):
        assert part in shown.out
    assert run("segment", "default", "--router", "192.168.1.1", "--no-exclude", "192.168.1.99").status == 0
    found = run("segment", "default", "-o", "json").json
    assert set(found["router"]) == {"192.168.1.1", "fd00::1"}
    assert found["exclude"] == ["192.168.1.1-192.168.1.9"]
    assert len(found["reserved"]) == 1


@pytest.mark.parametrize(
    "junk",
    [
        "junk",
        '{"exclude":["all"]}',
        '{"excluded":["192.168.1.9"]}',
        '{"reserved":[{"range":"x"}]}',
        '{"reserved":[{"range":"192.168.1.9","noet":"x"}]}',
        '{"router":"x"}',
    ],
)
def test_unreadable_settings_are_not_overwritten(run: Run, lan: Lan, junk: str) -> None:
    """What cannot be read is named and left as it is, whatever is asked for: status 1."""
    lan.put(KEYS.segment("default"), junk)
    for command in [
        ("segment", "default"),
        ("segment", "default", "--exclude", "192.168.1.9"),
        ("segment", "default", "--router", "192.168.1.9"),
        ("reserve", "192.168.1.0/28"),
        ("unreserve", "192.168.1.0/28"),
        ("unreserve", "192.168.1.1"),
    ]:
        told = run(*command)
        assert told.status == 1, command
        assert len(told.err.splitlines()) == 1
    assert "cannot be read" in run("show", "192.168.1.1").out
    assert lan.keys() == {KEYS.segment("default"): junk.encode()}


def test_two_operators_at_once(run: Run, lan: Lan) -> None:
    """Every change is one transaction on what was read: another's exclude in between is kept."""
    done: list[int] = []

    def meanwhile(expect: Mapping[str, int], writes: Writes) -> Fault:
        if not done:
            done.append(1)
            lan.put(KEYS.segment("default"), '{"exclude":["192.168.1.1"]}')
        return Fault.PASS

    lan.etcd.on_commit = meanwhile
    assert run("segment", "default", "--exclude", "192.168.1.2").status == 0
    assert run("segment", "default", "-o", "json").json["exclude"] == ["192.168.1.1", "192.168.1.2"]


def test_a_container_gets_the_address_first(run: Run, lan: Lan, a: Host) -> None:
    """P1 for operators too: an address that a container got a moment ago is not reserved over it."""
    pool = a.create()
    a.catch_up()
    given: list[str] = []

    def meanwhile(expect: Mapping[str, int], writes: Writes) -> Fault:
        if not given and KEYS.lease("default", parse_address("192.168.1.9")) in expect:
            given.append("")
            given[0] = str(a.endpoint(pool, "192.168.1.9").ok["Address"])
        return Fault.PASS

    lan.etcd.on_commit = meanwhile
    told = run("reserve", "192.168.1.9")
    assert (told.status, given) == (1, ["192.168.1.9/24"])
    assert "on host a" in told.err


# -------------------------------------------------------------------------------------- leaving for good


@pytest.fixture
def uninstall(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """`ipam-plugin uninstall` on a host whose daemon served as host `a`: what it says between stopping and removing.

    What it does to the files of a system is in test_install.py, and the whole of it in test_boot.py.
    """
    (tmp_path / "state").mkdir()
    (tmp_path / "state/host").write_text("a\n")
    (tmp_path / "config.yaml").write_text(
        f"etcd: {{endpoints: [http://127.0.0.1:2379]}}\nhost: new\nstate_dir: {tmp_path}/state\n"
    )
    monkeypatch.setattr(install, "uninstall", lambda *, give_back: ["stopped", *give_back(), "removed"])

    def said() -> list[str]:
        told = run("uninstall")
        assert (told.status, told.err) == (0, "")
        first, *between, last = told.out.splitlines()
        assert (first, last) == ("stopped", "removed")
        return between

    return said


def test_uninstall_gives_this_hosts_standby_back(uninstall: Callable[[], list[str]], lan: Lan) -> None:
    """P5: what a daemon claimed ahead of need is free when it goes; all else, and other hosts' standby, stays."""
    standby = {"kind": "standby", "host": "a", "token": "x", "pool": "default/192.168.1.0/24"}
    for place, lease in {
        "default/192.168.1.3": standby,
        "default/fd00::3": standby,
        "lab/192.168.1.3": standby,
        "lab/192.168.1.4": standby | {"kind": "held"},
        "default/192.168.1.4": standby | {"host": "b"},
        "default/192.168.1.5": standby | {"kind": "endpoint"},
        "default/192.168.1.6": standby | {"kind": "conflict", "host": "", "by": "a"},
    }.items():
        lan.put(f"{KEYS.leases}{place}", json.dumps(lease))
    lan.put(f"{KEYS.leases}default/192.168.1.7", "junk")
    assert uninstall() == ["standby and held addresses of host a given back: 4"]
    left = [key.removeprefix(KEYS.leases) for key in sorted(lan.under(KEYS.leases))]
    assert left == [f"default/192.168.1.{number}" for number in (4, 5, 6, 7)]
    assert list(lan.under(KEYS.history)) == [f"{KEYS.history}lab/192.168.1.4"], "only the hold was somebody's"


def test_a_standby_that_a_container_just_got_stays(uninstall: Callable[[], list[str]], lan: Lan) -> None:
    """P1: only the revision that was read is deleted, so a conversion that was on its way is never undone."""
    key = f"{KEYS.leases}default/192.168.1.3"
    lan.put(key, '{"kind":"standby","host":"a"}')

    def meanwhile(expect: Mapping[str, int], writes: Writes) -> Fault:
        lan.etcd.on_commit = None
        lan.put(key, '{"kind":"endpoint","host":"a"}')
        return Fault.PASS

    lan.etcd.on_commit = meanwhile
    assert uninstall() == []
    assert decode(lan.keys()[key], Lease).kind == "endpoint"


def test_uninstall_goes_on_without_the_register(uninstall: Callable[[], list[str]], lan: Lan, tmp_path: Path) -> None:
    """Whoever wants the program gone gets that, and one line with what is left to do and how."""
    lan.etcd.set_down(True)
    [line] = uninstall()
    assert line.startswith("this host's standby addresses were not given back: etcd")
    assert line.endswith("ipam-plugin leases --kind standby --host a, and ipam-plugin release ADDRESS --force for each")
    (tmp_path / "config.yaml").write_text("etcd: 5\nprobe: half\n")
    [line] = uninstall()
    assert "etcd: expected keys and values, found 5; " in line
    assert "probe: expected one of" in line
    (tmp_path / "config.yaml").unlink()
    [line] = uninstall()
    assert "there is no such file" in line


def test_a_host_that_never_served_has_nothing_to_give_back(
    uninstall: Callable[[], list[str]], lan: Lan, tmp_path: Path
) -> None:
    """No name was kept, so no lease can be this host's; the register, down perhaps as ever, is not even asked."""
    (tmp_path / "state/host").unlink()
    lan.etcd.set_down(True)
    assert uninstall() == []
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == []


# ------------------------------------------------------------------------------------ exit status, hostility


@pytest.mark.parametrize(
    "arguments",
    [
        ["show"],
        ["show", "here"],
        ["show", "192.168.1.0/24"],
        ["reserve", "192.168.1.9-192.168.1.5"],
        ["reserve", "192.168.1.5/24"],
        ["release", "x"],
        ["leases", "--kind", "pet"],
        ["leases", "-o", "xml"],
        ["leases", "--segment", "a/b"],
        ["segment", "../x"],
        ["segment", "default", "--router", "x"],
        ["nonsense"],
        ["--nonsense"],
    ],
)
def test_wrong_usage(run: Run, lan: Lan, arguments: list[str]) -> None:
    """Usage errors: status 2, said on stderr, nothing on stdout, nothing changed."""
    told = run(*arguments)
    assert told.status == 2
    assert told.err
    assert told.out == ""
    assert lan.keys() == {}


def test_a_configuration_that_cannot_be_used(run: Run, tmp_path: Path) -> None:
    """A configuration error is status 2, with the key's path."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("etcd: {endpoints: [http://127.0.0.1:2379]}\nstandbye: 1\n")
    for arguments in (["leases", "--config", str(bad)], ["check-config", str(bad)]):
        told = run(*arguments)
        assert told.status == 2
        assert "standbye" in told.err
    assert run("check-config").status == 0
    assert run("leases", "--config", str(tmp_path / "none.yaml")).status == 2


#: The command as a user who may not look into the daemon's directory, run with its arguments after that directory.
ANYBODY = """
import os, sys
from pathlib import Path
from ipam_plugin import cli, daemon  # daemon: Python itself may lie where only root may look
cli.EMBEDDED_DATA = Path(sys.argv.pop(1)) / "etcd"
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
cli.main()
"""


def test_a_user_who_may_not_look_into_the_daemons_directory() -> None:
    """The daemon's directory is root's alone. That is no traceback: --config is used, and without it one line."""
    with tempfile.TemporaryDirectory() as made:
        where = Path(made)
        where.chmod(0o755)
        (where / "closed").mkdir(mode=0)
        config = where / "config.yaml"
        config.write_text("etcd: {endpoints: [http://127.0.0.1:1], timeout: 500ms}\n")

        def ran(named: Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", ANYBODY, str(where / "closed"), "leases", "--config", str(named)],
                cwd=Path(cli.__file__).parent.parent,
                env={**os.environ, "HOME": "/nonexistent"},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

        for named, status, said in (
            (config, 1, "etcd did not answer"),
            (where / "absent", 2, "there is no such file"),
            (where / "closed" / "config.yaml", 2, "cannot be read"),
        ):
            done = ran(named)
            assert (done.returncode, done.stdout) == (status, "")
            assert said in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_etcd_is_away(run: Run, lan: Lan) -> None:
    """Without etcd: one line, status 1."""
    lan.etcd.set_down(True)
    for arguments in (["leases"], ["reserve", "192.168.1.9"], ["show", "192.168.1.9"], ["hosts"], ["pools"]):
        told = run(*arguments)
        assert told.status == 1
        assert "etcd" in told.err
        assert len(told.err.splitlines()) == 1


HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "[bold red]markup[/bold red] [/] [link=x]",
    "two\nlines\r\ttab\x07",
    "\u202eright to left\u200b",
    "x" * 100_000,
    "漢字" * 30,
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=["escapes", "markup", "lines", "bidi", "huge", "wide", "empty"])
def test_hostile_values_do_not_harm_a_table(run: Run, lan: Lan, a: Host, text: str) -> None:
    """Values in etcd may be anybody's: no control character reaches the terminal, markup is text, each lease is one
    line, and a huge value takes nothing from the other columns or lines. JSON tells all of it."""
    a.run(a.create(), "192.168.1.100")
    lease = {
        "kind": "endpoint", "host": text, "mac": text, "note": text, "by": text, "since": text, "pool": text,
        "container": {"name": text}, "holders": [{"host": text, "pool": text}],
    }  # fmt: skip
    lan.put(f"{KEYS.leases}default/192.168.1.5", json.dumps(lease))
    name = text[:2000].replace("/", "|")
    lan.put(f"{KEYS.leases}{name}/192.168.1.6", json.dumps(lease | {"kind": "reserved"}))
    lan.put(f"{KEYS.leases}default/192.168.1.7", text)
    lan.put(KEYS.host("h"), json.dumps({"host": text, "version": text, "alarms": [text]}))
    lan.put(f"{KEYS.hosts}{name}", json.dumps({"host": text, "version": text}))
    lan.put(f"{KEYS.pools}{name}/h", json.dumps({"host": text, "segment": text, "subnet": text}))
    lan.put(KEYS.segment("s"), json.dumps({"note": text, "reserved": [{"range": "10.0.0.0/8", "note": text}]}))
    table = run("leases")
    assert table.status == 0
    row = next(line for line in table.out.splitlines() if "192.168.1.100" in line)
    assert row.split()[:4] == ["default", "192.168.1.100", "endpoint", "a"]
    assert len(table.out.splitlines()) == 1 + 5
    assert len(table.out) < 100_000
    for command in (
        ["leases"], ["pools"], ["hosts"], ["segment", "s"], ["show", "192.168.1.5"], ["show", "192.168.1.6"],
        ["show", "192.168.1.7"], ["release", "192.168.1.5"], ["reserve", "192.168.1.5"],
        ["reserve", "192.168.1.0/29", "--note", text[:1000]], ["unreserve", "192.168.1.5"],
    ):  # fmt: skip
        told = run(*command)
        assert told.status in (0, 1)
        for letter in told.out + told.err:
            assert letter == "\n" or letter.isprintable()
        if "bold red" in text and command[0] == "leases":
            assert "[bold red]markup[/bold red] [/]" in told.out
    found = {each["address"]: each for each in run("leases", "-o", "json").json}
    assert found["192.168.1.5"]["mac" if text else "kind"] == (text or "endpoint")
    assert run("release", "192.168.1.5", "--force").status == 0


@pytest.mark.parametrize("value", ["[]", "5", '{"host":5}', '{"past":5}', "\x00", "[" * 3000, '{"addresses":[{}]}'])
def test_wrong_types_do_not_harm_a_command(run: Run, lan: Lan, a: Host, value: str) -> None:
    """Every key of every kind with a value of the wrong type: every command that looks still works."""
    a.run(a.create(), "192.168.1.100")
    for place in ("leases", "history", "segments", "pools", "hosts", "alive"):
        for name in ("default/192.168.1.5", "default/x", "x", "", "default/192.168.1.0/24/h", "192.168.1.100"):
            lan.put(f"{KEYS.prefix}{place}/{name}", value)
    for command in (["leases"], ["pools"], ["hosts"], ["show", "192.168.1.5"], ["show", "192.168.1.100"]):
        for output in ("table", "json"):
            told = run(*command, "-o", output)
            assert told.status == 0
            assert told.out


# ------------------------------------------------------------------------------------- comparing


class FakeDockerd:
    """dockerd as a test has it: its networks and containers, or why it does not answer."""

    def __init__(self) -> None:
        self.look_of: Look | None = Look(0, 0, "engine", (), (), frozenset(), {})
        self.then: list[Callable[[], None]] = []  # before each look

    def __call__(self, socket: str) -> FakeDockerd:
        return self

    def look(self) -> Look:
        if self.then:
            self.then.pop(0)()
        if self.look_of is None:
            raise DockerUnavailable("dockerd at /x does not answer: it is a test")
        return self.look_of

    def close(self) -> None: ...

    def runs(self, addresses: Mapping[str, str], subnet: str = "192.168.1.0/24") -> None:
        network = Network("n", "lan", "bridge", ((subnet, ""),), {})
        attached = [
            Attachment("n", "lan", parse_address(each), mac, f"id-{each}", "web", "busybox")
            for each, mac in addresses.items()
        ]
        assert self.look_of is not None
        self.look_of = self.look_of._replace(networks=(network,), attachments=tuple(attached))


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch, a: Host, tmp_path: Path) -> FakeDockerd:
    """Host a with its dockerd, on a LAN where only `machines` of the test answer."""
    made = FakeDockerd()
    monkeypatch.setattr("ipam_plugin.dockerd.Dockerd", made)
    monkeypatch.setattr(scan, "require_rights", lambda: None)
    links = [Link(2, "br0", "02:00:00:00:00:01", "bridge", carrier=True, up=True, loopback=False, master="")]
    monkeypatch.setattr(scan, "interfaces_of_this_machine", lambda: (a.carried, links))
    monkeypatch.setattr(scan, "ask", lambda target, addresses, **_: scan.Report({}, {}, len(addresses), ""))
    monkeypatch.setattr(check, "APART", 0.0)
    config = tmp_path / "config.yaml"
    config.write_text("host: a\netcd: {endpoints: [http://127.0.0.1:2379]}\ndocker: {grace: 30s}\n")
    return made


def aged(lan: Lan, address: str) -> Lease:
    """The lease, as if it had been given long ago."""
    lease = lan.lease(address)
    assert lease is not None
    old = msgspec.structs.replace(lease, since="2020-01-01T00:00:00Z")
    lan.put(f"{KEYS.leases}default/{address}", encode(old))
    return old


@pytest.fixture
def alive(lan: Lan, a: Host) -> None:
    lan.put(f"{KEYS.hosts}a", encode(HostRecord("a")))
    lan.put(f"{KEYS.alive}a", encode(Alive("a", "m", "b", "p")))


def test_check_finds_nothing(run: Run, lan: Lan, a: Host, docker: FakeDockerd, alive: None) -> None:
    """Where register, Docker and wire agree the status is 0."""
    web = a.run(a.create())
    lease = lan.lease(web)
    assert lease is not None
    docker.runs({web: lease.mac})
    told = run("check")
    assert (told.status, told.out, told.err) == (0, "", "no differences\n")
    assert run("check", "-o", "json").json == []


def test_check_repairs(run: Run, lan: Lan, a: Host, docker: FakeDockerd, alive: None) -> None:
    """A vanished container's lease goes, with its history; a lost lease comes back; then nothing is left."""
    pool = a.create()
    web, gone, lost = a.run(pool), a.run(pool), a.run(pool)
    macs = {each: lease.mac for each, lease in lan.leases().items()}
    aged(lan, gone)
    lan.delete(f"{KEYS.leases}default/{lost}")
    docker.runs({web: macs[web], lost: macs[lost]})
    before = lan.keys()
    told = run("check", "-o", "json")
    assert told.status == 1
    found = json.loads(told.out)
    assert {(each["kind"], each["address"], each["repaired"]) for each in found} == {
        ("vanished", gone, False),
        ("no_lease", lost, False),
    }
    assert set(found[0]) == {"segment", "address", "kind", "what", "cause", "cure", "repaired"}
    assert lan.keys() == before, "a check without --repair writes nothing"
    mended = run("check", "--repair")
    assert mended.status == 1
    assert "2 found, 2 repaired, 0 left" in mended.err
    assert "looking again in" in mended.err
    assert set(lan.of_kind("endpoint")) == {web, lost}
    again = lan.lease(lost)
    assert again is not None
    assert (again.host, again.mac, again.pool, bool(again.token)) == ("a", macs[lost], pool, True)
    assert "found gone by check" in run("show", gone).out
    assert run("check").status == 0


def test_check_frees_only_what_it_found_twice(run: Run, lan: Lan, a: Host, docker: FakeDockerd, alive: None) -> None:
    """A container that has got the address between the two looks, under a new lease or the old one, keeps it (P3)."""
    gone = a.run(a.create())
    docker.runs({})
    lease = aged(lan, gone)
    docker.then = [lambda: None, lambda: None, lambda: docker.runs({gone: lease.mac})]
    assert "0 repaired, 1 left" in run("check", "--repair").err
    assert lan.of_kind("endpoint") == [gone]
    docker.runs({})
    fresh = msgspec.structs.replace(lease, token="another")
    docker.then = [lambda: None, lambda: None, lambda: lan.put(f"{KEYS.leases}default/{gone}", encode(fresh))]
    assert "0 repaired, 1 left" in run("check", "--repair").err
    assert lan.lease(gone) == fresh
    # And another engine proves nothing.
    assert docker.look_of is not None
    other = docker.look_of._replace(engine="other")
    docker.then = [lambda: None, lambda: None, lambda: setattr(docker, "look_of", other)]
    assert "0 repaired, 1 left" in run("check", "--repair").err
    assert lan.lease(gone) == fresh


def test_check_is_never_silent(
    run: Run, lan: Lan, a: Host, docker: FakeDockerd, alive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Docker or without the wire there is a line, status 1, and nothing is freed."""
    gone = a.run(a.create())
    aged(lan, gone)
    docker.runs({})

    def deaf(*_: Any, **__: Any) -> scan.Report:
        raise ProbeFailed("the cable is out")

    with monkeypatch.context() as patch:
        patch.setattr(scan, "ask", deaf)
        told = run("check", "--repair")
        assert told.status == 1
        assert "not compared: the wire: the cable is out" in told.out
        assert "0 repaired" in told.err
    for report in (
        scan.Report({}, {}, 1, "br0 was disturbed"),
        scan.Report({parse_address(gone): ["66:66:66:66:66:66"]}, {"66:66:66:66:66:66": 5}, 1, ""),  # proxy ARP
    ):
        with monkeypatch.context() as patch:
            patch.setattr(scan, "ask", lambda *_, of=report, **__: of)
            told = run("check", "--repair")
        assert "whether it answers cannot be told" in told.out
        assert "0 repaired" in told.err
    docker.look_of = None
    told = run("check", "--repair")
    assert told.status == 1
    assert "not compared: the containers of this host: dockerd at /x does not answer" in told.out
    assert lan.of_kind("endpoint") == [gone]


def test_check_needs_a_name(run: Run, docker: FakeDockerd, tmp_path: Path) -> None:
    """Where no daemon ever served nobody knows which leases are this host's: that is said, with status 2."""
    config = tmp_path / "config.yaml"
    config.write_text(f"etcd: {{endpoints: [http://127.0.0.1:2379]}}\nstate_dir: {tmp_path / 'state'}\n")
    told = run("check")
    assert told.status == 2
    assert "no daemon has served here yet" in told.err
    (tmp_path / "state").mkdir()
    (tmp_path / "state/host").write_text("a\n")
    assert "under this host's name, a" in run("check").out
