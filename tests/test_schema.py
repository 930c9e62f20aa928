"""The schema's version in etcd: who may write to a register, and what becomes of those who may not any more."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import RealEtcd
from daemons import DaemonProcess, run
from etcd_server import until
from fakes import FakeEtcd, Fault
from harness import KEYS as HARNESS
from harness import Lan, bridge
from ipam_plugin import __version__
from ipam_plugin.addresses import parse_address
from ipam_plugin.errors import EtcdRefused, EtcdUnavailable, OutcomeUnknown, SchemaRefused
from ipam_plugin.etcd import Put
from ipam_plugin.model import Keys, Lease, PoolUse, Schema, decode, encode, rewritten
from ipam_plugin.operations import Operations
from ipam_plugin.schema import VERSION, Guarded, judge

KEYS = Keys("/p/")
KEY = "/p/leases/default/10.0.0.1"
NEWER = b'{"version":2,"written_by":"9.0.0"}'
JUNK = (b"", b"2", b"[]", b"null", b"\xff", b'{"version":"1"}', b'{"version":0}', b'{"written_by":"x"}')


def soon() -> float:
    return time.monotonic() + 5


class Etcd(FakeEtcd):
    """Counts, and lets somebody get ahead of a transaction."""

    def put(self, key: str, value: bytes) -> None:
        FakeEtcd.commit(self, {}, [Put(key, value)], deadline=soon())


@pytest.fixture
def etcd_() -> Iterator[Etcd]:
    made = Etcd()
    yield made
    made.close()


# --- the judgement ---------------------------------------------------------------------------------------


def test_a_newer_version_is_refused_with_both_versions_and_the_cure() -> None:
    said = judge(KEYS.schema, NEWER)
    assert "schema version 2, written by ipam-plugin 9.0.0 (/p/schema)" in said
    assert f"ipam-plugin {__version__} on this machine understands version {VERSION} and no newer one" in said
    assert "install" in said


@pytest.mark.parametrize("value", JUNK)
def test_what_cannot_be_read_is_refused(value: bytes) -> None:
    """Whoever wrote it may have meant a version that this program would do harm to."""
    assert "etcdctl del /p/schema" in judge(KEYS.schema, value)


@given(st.integers(1, 2**63), st.dictionaries(st.text().filter(lambda name: name != "version"), st.text()))
def test_the_version_alone_decides(version: int, more: dict[str, str]) -> None:
    more.pop("written_by", None)
    more.pop("since", None)
    said = judge(KEYS.schema, json.dumps({"version": version, **more}).encode())
    assert (said == "") == (version <= VERSION)


# --- what is not known is kept -----------------------------------------------------------------------------


UNKNOWN = st.text().filter(lambda name: name not in {*Lease.__struct_fields__, *PoolUse.__struct_fields__})
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(UNKNOWN, ANYTHING, max_size=4), st.text(), st.integers(0, 9))
def test_a_changed_value_keeps_the_fields_of_a_newer_program(unknown: dict[str, Any], mac: str, noted: int) -> None:
    """The fields that are known say what they say now, also those that are at their default again."""
    before = json.dumps({"kind": "endpoint", "mac": mac, "noted": 7, "token": "t", **unknown}).encode()
    lease = msgspec.structs.replace(decode(before, Lease), noted=noted)
    after = rewritten(lease, before)
    assert b"\n" not in after
    assert decode(after, Lease) == lease
    assert {name: each for name, each in json.loads(after).items() if name in unknown} == unknown


@pytest.mark.parametrize("before", [b"", b"{", b"[]", b"\xff", b'{"kind":"endpoint"}'])
def test_what_is_no_newer_value_adds_nothing(before: bytes) -> None:
    assert rewritten(Lease("endpoint"), before) == encode(Lease("endpoint"))


def test_another_holder_begins_anew() -> None:
    """What a newer program said of the one before is not said of the next; of the same one it stays."""
    with Lan() as lan:
        host = lan.host("a", bridge("192.168.1.11/24"))
        pool = host.create()
        key = HARNESS.lease("default", parse_address("192.168.1.66"))
        held = {"kind": "held", "host": "a", "pool": pool, "token": "old", "fixed": True, "colour": "red"}
        lan.put(key, json.dumps(held))
        host.catch_up()
        assert host.run(pool, "192.168.1.66") == "192.168.1.66"
        fresh = json.loads(lan.keys()[key])
        assert fresh["kind"] == "endpoint"
        assert "colour" not in fresh
        lan.put(key, json.dumps({**fresh, "colour": "blue"}))
        host.catch_up()
        assert host.auxiliary(pool, "192.168.1.66").status == 200  # a replay, noted in that lease
        assert json.loads(lan.keys()[key]).items() >= {**fresh, "noted": 1, "colour": "blue"}.items()


# --- the guard -----------------------------------------------------------------------------------------------


def test_the_first_writes_the_version_and_the_others_leave_it(etcd_: Etcd) -> None:
    assert Guarded(etcd_, KEYS).check(soon()) == ""
    found = etcd_.get(KEYS.schema, deadline=soon())
    assert found is not None
    schema = decode(found.value, Schema)
    assert (schema.version, schema.written_by) == (VERSION, __version__)
    assert Guarded(etcd_, KEYS).check(soon()) == ""
    assert etcd_.get(KEYS.schema, deadline=soon()) == found


def test_two_that_come_first_at_once_agree(etcd_: Etcd) -> None:
    """Somebody is faster, with a newer version: that one counts."""

    def faster(expect: Any, writes: Any) -> Fault:
        etcd_.on_commit = None
        etcd_.put(KEYS.schema, NEWER)
        return Fault.PASS

    etcd_.on_commit = faster
    assert "schema version 2" in Guarded(etcd_, KEYS).check(soon())
    found = etcd_.get(KEYS.schema, deadline=soon())
    assert found is not None
    assert found.value == NEWER


@pytest.mark.parametrize("value", [NEWER, *JUNK])
def test_nothing_is_written_to_a_register_that_is_not_understood(etcd_: Etcd, value: bytes) -> None:
    etcd_.put(KEYS.schema, value)
    with pytest.raises(EtcdRefused, match=r"/p/schema"):
        Guarded(etcd_, KEYS).commit({KEY: 0}, [Put(KEY, b"x")], deadline=soon())
    assert etcd_.get(KEY, deadline=soon()) is None


@pytest.mark.parametrize("present", [False, True])
def test_a_version_that_is_raised_stops_who_is_running(etcd_: Etcd, present: bool) -> None:
    """Also in the very moment of a write: what compares the version is the transaction itself (P1)."""
    guarded = Guarded(etcd_, KEYS)
    if present:
        guarded.check(soon())
    assert guarded.commit({KEY: 0}, [Put(KEY, b"1")], deadline=soon()).applied
    revision = etcd_.get(KEY, deadline=soon()).revision  # type: ignore[union-attr]  # it was just written

    def raised(expect: Any, writes: Any) -> Fault:
        etcd_.on_commit = None
        etcd_.put(KEYS.schema, NEWER)
        return Fault.PASS

    etcd_.on_commit = raised
    with pytest.raises(EtcdRefused, match="schema version 2"):
        guarded.commit({KEY: revision}, [Put(KEY, b"2")], deadline=soon())
    assert etcd_.get(KEY, deadline=soon()).value == b"1"  # type: ignore[union-attr]
    # And so it stays, until somebody has looked again.
    before = etcd_.transactions
    with pytest.raises(EtcdRefused):
        guarded.commit({KEY: revision}, [Put(KEY, b"2")], deadline=soon())
    assert etcd_.transactions == before
    etcd_.put(KEYS.schema, encode(Schema(VERSION)))
    assert guarded.check(soon()) == ""
    assert guarded.commit({KEY: revision}, [Put(KEY, b"2")], deadline=soon()).applied


def test_a_key_that_was_touched_costs_one_more_try(etcd_: Etcd) -> None:
    """The same version written anew, or an etcd that was wiped: the caller learns nothing of it."""
    guarded = Guarded(etcd_, KEYS)
    guarded.check(soon())
    etcd_.put(KEYS.schema, encode(Schema(VERSION, "somebody else")))
    assert guarded.commit({KEY: 0}, [Put(KEY, b"1")], deadline=soon()).applied
    lost = guarded.commit({KEY: 0}, [Put(KEY, b"2")], deadline=soon())
    assert not lost.applied
    assert set(lost.found) == {KEY}


def test_faults_of_etcd_come_through_as_they_are(etcd_: Etcd) -> None:
    guarded = Guarded(etcd_, KEYS)
    guarded.check(soon())
    for fault, error in ((Fault.UNAVAILABLE, EtcdUnavailable), (Fault.APPLIED, OutcomeUnknown)):
        etcd_.faults.append(fault)
        with pytest.raises(error):
            guarded.commit({KEY: 0}, [Put(KEY, b"1")], deadline=soon(), proof=KEY)
    assert guarded.commit({KEY: 0}, [Put(KEY, b"1")], deadline=soon(), proof=KEY).applied  # proven by its value


def test_the_rights_are_not_told_by_it(etcd_: Etcd) -> None:
    """doctor asks for them: a register that is too new says nothing about the user's role."""
    etcd_.put(KEYS.schema, NEWER)
    with pytest.raises(SchemaRefused, match="schema version 2"):
        Operations(Guarded(etcd_, KEYS), KEYS, who="eve").rights()


def test_who_reads_is_warned_once(etcd_: Etcd) -> None:
    etcd_.put(KEYS.schema, NEWER)
    said: list[str] = []
    guarded = Guarded(etcd_, KEYS, said.append)
    for _ in range(2):
        guarded.get_many([KEY], deadline=soon())
        guarded.list("/p/", deadline=soon())
    assert len(said) == 1
    assert "schema version 2" in said[0]


# --- the daemon and the command, on a real etcd ----------------------------------------------------------------


@pytest.mark.etcd
def test_a_newer_register_is_read_and_not_written(tmp_path: Path, etcd: RealEtcd) -> None:
    """The daemon refuses its requests, the command what would change something; both go on when that is mended."""
    key = f"{etcd.prefix}schema"
    lease = f"{etcd.prefix}leases/default/198.18.0.9"
    with DaemonProcess(tmp_path / "a", etcd.settings.endpoints, host="a", prefix=etcd.prefix, deadline="3s") as daemon:
        daemon.wait_answering()
        pool = daemon.pool("198.18.0.0/28")
        assert decode(etcd.client.get(key, deadline=soon()).value, Schema).version == VERSION  # type: ignore[union-attr]
        assert daemon.request_address(pool).ok
        done = run("reserve", "198.18.0.9", config=daemon.config_file)
        assert (done.returncode, done.stderr) == (0, "")

        etcd.cluster.etcdctl("put", key, NEWER.decode())
        refused = daemon.request_address(pool, "02:00:00:00:00:02").error
        assert "has schema version 2, written by ipam-plugin 9.0.0" in refused
        until(lambda: "not serving: the register in etcd has schema version 2" in daemon.text(), "the log says so")
        there = etcd.client.list(f"{etcd.prefix}leases/", deadline=soon())[0]
        for change in (("unreserve", "198.18.0.9"), ("segment", "default", "--exclude", "198.18.0.8/31")):
            done = run(*change, config=daemon.config_file)
            assert done.returncode == 1
            assert "has schema version 2, written by ipam-plugin 9.0.0" in done.stderr
        shown = run("show", "198.18.0.9", config=daemon.config_file)
        assert shown.returncode == 0
        assert "is taken (reserved)" in shown.stdout
        assert "what follows may not be all: the register in etcd has schema version 2" in shown.stderr
        assert etcd.client.list(f"{etcd.prefix}leases/", deadline=soon())[0] == there
        # Its host is alive all the same: nobody may take what its containers have.
        assert etcd.client.get(f"{etcd.prefix}alive/a", deadline=soon()) is not None

        etcd.cluster.etcdctl("del", key)
        until(lambda: daemon.request_address(pool, "02:00:00:00:00:03").ok, "it serves again")
        assert etcd.client.get(key, deadline=soon()) is not None
        assert etcd.client.get(lease, deadline=soon()) is not None


@pytest.mark.etcd
def test_a_daemon_that_starts_on_a_newer_register_writes_nothing(tmp_path: Path, etcd: RealEtcd) -> None:
    etcd.cluster.etcdctl("put", f"{etcd.prefix}schema", NEWER.decode())
    with DaemonProcess(tmp_path / "a", etcd.settings.endpoints, host="a", prefix=etcd.prefix, deadline="3s") as daemon:
        daemon.wait_answering()
        assert "has schema version 2" in daemon.request_pool("198.18.0.0/28").error
        assert [each.key for each in etcd.client.list(etcd.prefix, deadline=soon())[0]] == [f"{etcd.prefix}schema"]
