"""An outage of etcd on the fakes: what is answered without it, and that etcd and Docker agree when it is back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fakes import Fault
from harness import KEYS, MAC, FakeLan, Habits, Host, Lan, bridge, until
from ipam_plugin import standby
from ipam_plugin.addresses import parse_address
from ipam_plugin.etcd import Delete
from ipam_plugin.journal import Work
from ipam_plugin.model import ENDPOINT, HOST, STANDBY, Lease, encode

RANGE = "192.168.1.64/29"
INSIDE = [f"192.168.1.{number}" for number in range(64, 72)]
PROBING = Habits(standby=2)


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as lan:
        yield lan


@pytest.fixture
def a(lan: Lan, tmp_path: Path) -> Host:
    return lan.host("a", bridge("192.168.1.11/24"), habits=PROBING, journal=tmp_path / "journal", time_limit=0.5)


def kept(host: Host) -> str:
    pool = host.create(ip_range=RANGE)
    host.keep()
    until(lambda: len(host.stock.of(pool)) == 2, "the standby")
    return pool


def endpoints(lan: Lan) -> dict[str, tuple[str, str]]:
    return {address: (each.host, each.mac) for address, each in lan.leases().items() if each.kind == ENDPOINT}


def test_starts_and_stops_without_etcd(lan: Lan, a: Host) -> None:
    """Section 8: as many starts as there are standby addresses, the next one refused within the deadline, saying why;
    every release; and afterwards etcd says the same as Docker.
    """
    pool = kept(a)
    before = a.run(pool)
    until(lambda: len(a.stock.of(pool)) == 2)
    lan.etcd.set_down(True)
    given = {a.run(pool), a.run(pool)}
    assert given <= set(lan.of_kind(STANDBY)), "they were this host's before"
    assert "of the addresses that host a had in standby for such a time none is left" in a.endpoint(pool).error
    assert a.release(pool, before).status == 200
    assert a.release(pool, before).status == 200, "a repeated one too"
    gone = given.pop()
    assert a.release(pool, gone).status == 200
    lan.etcd.set_down(False)
    a.carry_out()
    until(lambda: not a.outage.waiting)
    assert set(endpoints(lan)) == given
    until(lambda: len(a.stock.of(pool)) == 2, "the stock is filled again")
    assert not a.outage.lasts


def test_no_standby_is_left_while_etcd_may_yet_write(lan: Lan, a: Host) -> None:
    """P7: the refusal says the same where etcd halts in the middle, and what was asked may have been written."""
    pool = kept(a)
    lan.etcd.set_down(True)
    a.run(pool), a.run(pool)
    lan.etcd.set_down(False)
    lan.etcd.faults.extend([Fault.LOST] * 1000)
    said = a.endpoint(pool).error
    lan.etcd.faults.clear()
    assert "it may be written yet" in said
    assert "of the addresses that host a had in standby for such a time none is left" in said


def test_the_next_run_carries_it_out(lan: Lan, a: Host, tmp_path: Path) -> None:
    """P5: the daemon dies in between; its successor's keeper takes nothing of it for standby."""
    pool = kept(a)
    lan.etcd.set_down(True)
    first, second = a.run(pool), a.run(pool)
    assert a.release(pool, second).status == 200
    a.stop()
    lan.hosts.remove(a)
    lan.etcd.set_down(False)
    again = lan.host("a", bridge("192.168.1.11/24"), habits=PROBING, journal=tmp_path / "journal")
    again.keep()
    until(lambda: len(again.stock.of(pool)) == 2)
    assert not {first, second} & {str(each.address) for each in again.stock.all()}
    again.carry_out()
    until(lambda: not again.outage.waiting)
    assert set(endpoints(lan)) == {first}
    assert lan.lease(second) is None


def test_ip_takes_its_address_back_from_the_journal(lan: Lan, a: Host) -> None:
    """`docker restart` of a `--ip` container while etcd is away."""
    pool = kept(a)
    assert a.run(pool, "192.168.1.99") == "192.168.1.99"
    lan.etcd.set_down(True)
    for _ in range(3):
        assert a.release(pool, "192.168.1.99").status == 200
        assert a.run(pool, "192.168.1.99") == "192.168.1.99"
        assert "192.168.1.99 of pool" in a.endpoint(pool, "192.168.1.99").error, "now it is that container's"
    lan.etcd.set_down(False)
    a.settle()
    assert "192.168.1.99" in endpoints(lan)
    assert a.release(pool, "192.168.1.99").status == 200
    assert lan.lease("192.168.1.99") is None


def test_an_address_that_somebody_uses_by_now_is_not_taken_back(lan: Lan, tmp_path: Path) -> None:
    """P1: a host that was cut off may have been retired, and its stopped container's address be another's."""
    wire = FakeLan()
    a = lan.host("a", bridge("192.168.1.11/24"), habits=PROBING, journal=tmp_path / "j", time_limit=3.0, wire=wire)
    pool = kept(a)
    a.run(pool, "192.168.1.99")
    lan.etcd.set_down(True)
    assert a.release(pool, "192.168.1.99").status == 200
    wire.machines["192.168.1.99"] = "00:11:22:33:44:55"
    assert "MAC 00:11:22:33:44:55 answers there" in a.endpoint(pool, "192.168.1.99").error
    del wire.machines["192.168.1.99"]
    assert a.run(pool, "192.168.1.99") == "192.168.1.99"


def test_an_address_from_the_journal_is_no_gateway(lan: Lan, a: Host) -> None:
    """P1: nor an auxiliary address, though etcd still says that it is this host's to give."""
    pool = kept(a)
    lan.etcd.set_down(True)
    address = a.run(pool)
    lan.etcd.set_down(False)
    assert f"{address} of pool {pool} is taken" in a.auxiliary(pool, address).error
    a.settle()
    assert set(endpoints(lan)) == {address}


@pytest.mark.parametrize("comes_through", [True, False])
def test_a_release_on_its_way_is_not_taken_back(lan: Lan, a: Host, comes_through: bool) -> None:
    """P1: etcd may carry it out at any moment, and then it is anybody's: until that is settled `--ip` is refused."""
    pool = kept(a)
    a.run(pool, "192.168.1.99")
    lan.etcd.on_commit = lambda expect, writes: (
        Fault.STUCK if any(isinstance(each, Delete) for each in writes) else Fault.PASS
    )
    assert a.release(pool, "192.168.1.99").status == 200
    assert "its release is on the way to etcd" in a.endpoint(pool, "192.168.1.99").error
    lan.etcd.on_commit = None
    if comes_through:
        lan.etcd.release_stuck()
    a.settle()
    assert lan.lease("192.168.1.99") is None
    assert a.run(pool, "192.168.1.99") == "192.168.1.99"
    lan.etcd.release_stuck()
    assert set(endpoints(lan)) == {"192.168.1.99"}


def test_an_address_that_was_taken_meanwhile_is_told(lan: Lan, a: Host) -> None:
    """An operator freed this host's standby while it was cut off, and another host has it: an alarm, no overwriting."""
    pool = kept(a)
    lan.etcd.set_down(True)
    address = a.run(pool)
    lan.etcd.set_down(False)
    theirs = Lease(ENDPOINT, host="b", pool=pool, token="theirs", mac="02:42:00:00:00:99")
    lan.put(KEYS.lease("default", parse_address(address)), encode(theirs))
    a.settle()
    assert lan.lease(address) == theirs
    (kind, text), *_ = a.alarms
    assert kind == "address_lost"
    assert address in text
    assert "on host b" in text
    assert a.outage.waiting == 0
    assert a.release(pool, address).status == 200
    assert lan.lease(address) == theirs, "the late release frees nothing of another's (P3)"


def test_what_an_operator_freed_is_still_in_use(lan: Lan, a: Host) -> None:
    """Free in etcd when etcd is back, and nobody else's: the container keeps it."""
    pool = kept(a)
    lan.etcd.set_down(True)
    address = a.run(pool)
    lan.etcd.set_down(False)
    lan.delete(KEYS.lease("default", parse_address(address)))
    a.settle()
    assert set(endpoints(lan)) == {address}


def test_a_damaged_journal_releases_nothing(lan: Lan, a: Host, tmp_path: Path) -> None:
    """A record may be missing, perhaps the one that gave the address out again. What was given is written all the same,
    because to keep an address is always safe.
    """
    pool = kept(a)
    running = a.run(pool)
    until(lambda: len(a.stock.of(pool)) == 2)
    lan.etcd.set_down(True)
    given = a.run(pool)
    assert a.release(pool, running).status == 200
    a.stop()
    lan.hosts.remove(a)
    path = tmp_path / "journal"
    path.write_bytes(path.read_bytes() + b"something else\n")
    lan.etcd.set_down(False)
    again = lan.host("a", bridge("192.168.1.11/24"), habits=PROBING, journal=path)
    again.carry_out()
    until(lambda: not again.outage.waiting)
    assert set(endpoints(lan)) == {running, given}
    assert [kind for kind, _ in again.alarms] == ["journal_damaged"]


def test_a_full_disk_loses_no_release_of_a_living_daemon(lan: Lan, a: Host) -> None:
    """Neither etcd nor disk: Docker is told, nothing is given, and the release is carried out from memory."""
    pool = kept(a)
    running = a.run(pool)
    until(lambda: len(a.stock.of(pool)) == 2)
    a.fill_disk()
    a.journal._path = Path("/proc/nowhere/journal")
    lan.etcd.set_down(True)
    assert "cannot be written" in a.release(pool, running).error
    assert "cannot be written" in a.endpoint(pool).error
    assert "journal_failed" in [kind for kind, _ in a.alarms]
    lan.etcd.set_down(False)
    a.settle()
    assert lan.lease(running) is None
    assert endpoints(lan) == {}
    a.run(pool)


def test_a_network_that_goes_without_etcd(lan: Lan, a: Host) -> None:
    """Docker removes it whatever the plugin says, so what it held goes when etcd is back."""
    pool = a.create(gateway="router")
    a.gateway(pool, "192.168.1.254")
    lan.etcd.set_down(True)
    assert a.release(pool, "192.168.1.254").status == 200
    assert a.release_pool(pool).status == 200
    lan.etcd.set_down(False)
    a.settle()
    assert lan.under(KEYS.pools) == {}
    assert lan.lease("192.168.1.254") is None


def test_a_network_that_comes_again_keeps_what_it_has(lan: Lan, a: Host) -> None:
    """P3: the late end of the first network is fenced by what its key said."""
    pool = a.create()
    lan.etcd.set_down(True)
    assert a.release_pool(pool).status == 200
    lan.etcd.set_down(False)
    assert a.create() == pool
    a.settle()
    assert lan.under(KEYS.pools)


# ------------------------------------------------------------------------------------- any order


class AnyOrder(RuleBasedStateMachine):
    """Two hosts whose etcd comes and goes, with daemons that die, against what their containers should have."""

    def __init__(self) -> None:
        super().__init__()
        self.lan = Lan()
        self.directory = tempfile.TemporaryDirectory()
        self.holds: dict[str, str] = {}
        self.numbers = 0
        self.down = False

    @initialize()
    def start(self) -> None:
        self.hosts = {name: self.host(name) for name in ("a", "b")}
        for each in self.hosts.values():
            self.pool = each.create(ip_range=RANGE)

    def host(self, name: str) -> Host:
        number = 11 + (name == "b")
        made = self.lan.host(
            name, bridge(f"192.168.1.{number}/24", mac=f"02:00:00:00:00:{number}"), habits=PROBING, wire=FakeLan(),
            journal=Path(self.directory.name) / name, time_limit=0.6,
        )  # fmt: skip
        made.keeper._looks = made.keeper._checks = Inline()  # type: ignore[assignment]
        made.claims.on_shortage = lambda: None
        made.view.on_pools = made.view.on_wanted = lambda: None
        return made

    def teardown(self) -> None:
        self.lan.etcd.set_down(False)
        self.lan.__exit__(None, None, None)
        self.directory.cleanup()

    def settle(self) -> None:
        for each in self.hosts.values():
            each.catch_up()
            each.settle()
            each.catch_up()

    @rule()
    def etcd_goes(self) -> None:
        self.down = True
        self.lan.etcd.set_down(True)

    @rule()
    def etcd_returns(self) -> None:
        self.down = False
        self.lan.etcd.set_down(False)
        self.settle()

    @rule(name=st.sampled_from("ab"))
    def keeper(self, name: str) -> None:
        if not self.down:
            self.settle()
        self.hosts[name].keeper._pause.clear()
        self.hosts[name].keeper.run(Once())  # type: ignore[arg-type]

    def given(self, name: str, address: str) -> None:
        self.numbers += 1
        options = {MAC: f"02:42:00:00:{self.numbers >> 8:02x}:{self.numbers & 255:02x}"}
        reply = self.hosts[name].call("RequestAddress", PoolID=self.pool, Address=address, Options=options)
        if reply.status == 200:
            got = reply.body["Address"].removesuffix("/24")
            assert got not in self.holds, f"{got} has two holders"
            self.holds[got] = name
        elif address and not self.down:
            lease = self.lan.lease(address)
            assert address in self.holds or (lease and lease.kind == STANDBY and lease.host != name), reply

    @rule(name=st.sampled_from("ab"))
    def request(self, name: str) -> None:
        self.given(name, "")

    @rule(name=st.sampled_from("ab"), address=st.sampled_from(INSIDE))
    def request_that_one(self, name: str, address: str) -> None:
        self.given(name, address)

    @rule(name=st.sampled_from("ab"), address=st.sampled_from(INSIDE))
    def release(self, name: str, address: str) -> None:
        assert self.hosts[name].release(self.pool, address).status == 200
        if self.holds.get(address) == name:
            del self.holds[address]

    @rule(name=st.sampled_from("ab"))
    def the_daemon_dies(self, name: str) -> None:
        if self.down:
            return  # one that starts without etcd serves nothing
        self.hosts[name].stop()
        self.lan.hosts.remove(self.hosts[name])
        self.hosts[name] = self.host(name)
        self.hosts[name].catch_up()
        self.settle()

    @rule(name=st.sampled_from("ab"))
    def the_daemon_dies_in_an_outage(self, name: str) -> None:
        if not self.down:
            return
        self.hosts[name].stop()
        self.lan.hosts.remove(self.hosts[name])
        self.down = False
        self.lan.etcd.set_down(False)
        self.hosts[name] = self.host(name)
        self.hosts[name].catch_up()
        self.settle()

    @invariant()
    def etcd_and_the_containers_agree(self) -> None:
        if self.down or not hasattr(self, "hosts"):
            return
        self.settle()
        leases = {address: each for address, each in self.lan.leases().items() if each.kind != HOST}
        assert {address: each.host for address, each in leases.items() if each.kind == ENDPOINT} == self.holds
        for each in self.hosts.values():
            assert not each.alarms
            for slot in each.stock.all():
                assert str(slot.address) not in self.holds


class Inline:
    """An executor that does it at once."""

    def submit(self, work: Any) -> None:
        work()

    def shutdown(self, **_: Any) -> None: ...


class Once:
    """Set after it was asked once."""

    def __init__(self) -> None:
        self._asked = False

    def is_set(self) -> bool:
        asked, self._asked = self._asked, True
        return asked


def test_many_orders_of_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1, P3, P5: starts, stops, outages, crashes in whatever order: nobody's address is given twice, none is lost."""
    monkeypatch.setattr(standby, "PERIOD", 0.0)
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_work_is_told_of_once(lan: Lan, a: Host) -> None:
    """What is carried out is not carried out again."""
    pool = kept(a)
    lan.etcd.set_down(True)
    a.run(pool)
    lan.etcd.set_down(False)
    done: list[Work] = []
    for _ in range(3):
        a.outage.carry_out(a.register.settle, done.append)
    assert len(done) == 1
