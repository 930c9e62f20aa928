"""Hosts that die, on an etcd in memory with a LAN: who is absent, what is retired, what a host that returns finds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

import daemons
from conftest import RealEtcd
from fakes import FakeEtcd, Fault, Writes
from harness import KEYS, FakeLan, Host, Lan, bridge, until
from ipam_plugin import operations, retire
from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.errors import Refused
from ipam_plugin.etcd import Put
from ipam_plugin.model import (
    ENDPOINT,
    STANDBY,
    Alive,
    History,
    HostAddress,
    Lease,
    Lost,
    LostLease,
    Order,
    Part,
    PoolUse,
    decode,
    encode,
)
from ipam_plugin.model import Host as Record
from ipam_plugin.neighbourhood import Habits
from ipam_plugin.operations import Operations, Settled

ASKED = Habits(probe="full", standby=0)
OWN = "02:42:00:00:00:0b"
OTHER = "00:1b:a9:00:00:01"
POOL = "default/192.168.1.0/24"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in tenths of a second."""
    for name, seconds in (("SETTLING", 0.1), ("SPREAD", 0.1), ("NOBODY", 1.5), ("WITHOUT_WIRE", 0.2), ("PERIOD", 0.05)):
        monkeypatch.setattr(retire, name, seconds)
    monkeypatch.setattr(operations, "LOOK_AGAIN", 0.01)
    monkeypatch.setattr(retire.Retirer, "_late", lambda self, what: 0.0)


class _Lan(Lan):
    """With machines on the wire, and hosts that have a heartbeat and a record."""

    def __init__(self) -> None:
        super().__init__(FakeEtcd())
        self.wire = FakeLan()

    def living(self, name: str, number: int = 0, **more: object) -> Host:
        """A daemon that carries out orders."""
        number = number or 10 + len(self.hosts)
        host = self.host(name, bridge(f"192.168.1.{number}/24"), **{"habits": ASKED, "wire": self.wire, **more})
        self.beat(name)
        self.record(name)
        host.retire()
        return host

    def beat(self, name: str) -> None:
        self.put(KEYS.heartbeat(name), encode(Alive(name, machine_id="m", boot_id="b", process="p", since="today")))

    def record(self, name: str, **more: object) -> None:
        self.put(KEYS.host(name), encode(msgspec.structs.replace(Record(name, version="1"), **more)))

    def lease_of(self, host: str, address: str, kind: str = ENDPOINT, segment: str = "default", **more: str) -> Lease:
        lease = Lease(kind=kind, host=host, mac=OWN, pool=POOL, since="s", token=f"t{address}")
        lease = msgspec.structs.replace(lease, **more)
        self.put(KEYS.lease(segment, parse_address(address)), encode(lease))
        return lease

    def value(self, key: str) -> bytes | None:
        found = self.etcd.get(key, deadline=time.monotonic() + 5)
        return found.value if found else None

    def part(self, host: str, part: str) -> Part:
        value = self.value(KEYS.retire_part(host, part))
        return decode(value, Part) if value else Part("nobody")

    def absent(self, host: str) -> str:
        value = self.value(KEYS.host(host))
        return decode(value, Record).absent if value else ""

    def lost(self, host: str) -> list[str]:
        value = self.value(KEYS.lost(host))
        return sorted(each.address for each in decode(value, Lost).leases) if value else []


@pytest.fixture
def lan() -> Iterator[_Lan]:
    with _Lan() as made:
        yield made


class Done(NamedTuple):
    freed: list[str]
    kept: dict[str, str]
    refused: str


def ordered(lan: Lan, host: str, force: bool = False, wait: float = 20.0) -> Done:
    """As the command does it."""
    settled: list[Settled] = []
    refused = ""
    try:
        settled.extend(Operations(lan.etcd, KEYS, "eve").retire(host, force, wait))
    except Refused as error:
        refused = str(error)
    assert lan.value(KEYS.retire(host)) is None, "an order outlives its command"
    return Done(
        sorted(each.address for each in settled if not each.why),
        {each.address: each.why for each in settled if each.why},
        refused,
    )


class Command:
    """The same while the test does something else."""

    def __init__(self, lan: Lan, host: str, force: bool = False) -> None:
        self.settled: list[Settled] = []
        self.refused = ""
        self._iterator = Operations(lan.etcd, KEYS, "eve").retire(host, force, 20.0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for each in self._iterator:
                self.settled.append(each)
        except Refused as error:
            self.refused = str(error)

    def end(self) -> Command:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self


# ------------------------------------------------------------------------------------------- who is absent


def test_since_when_a_host_is_absent(lan: _Lan) -> None:
    """One living daemon writes it down, once; the rest of the record stays as it was."""
    lan.living("a"), lan.living("c")
    lan.record("b", addresses=(HostAddress("192.168.1.12", 24, "br0"),), alarms=("fire",))
    until(lambda: lan.absent("b"), "b is absent")
    first = lan.value(KEYS.host("b"))
    found = decode(first or b"", Record)
    assert (found.addresses[0].address, found.alarms) == ("192.168.1.12", ("fire",))
    lan.record("later")
    until(lambda: lan.absent("later"), "so is another")
    assert lan.value(KEYS.host("b")) == first
    assert all(not lan.absent(name) for name in "ac")


def test_a_daemon_that_is_restarted_is_not_absent(lan: _Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that ends and begins again within seconds is a restart: nothing is written."""
    monkeypatch.setattr(retire, "SETTLING", 3600.0)
    a = lan.living("a")
    lan.record("b")
    before = lan.value(KEYS.host("b"))
    a.catch_up()
    a.retirer.look()
    monkeypatch.setattr(retire, "SETTLING", 0.0)
    lan.beat("b")
    a.catch_up()
    for _ in range(3):
        a.retirer.look()
    assert lan.value(KEYS.host("b")) == before


def test_a_heartbeat_that_the_watch_has_not_brought(lan: _Lan) -> None:
    """A daemon whose view is behind writes nothing about a host that lives."""
    a = lan.living("a")
    lan.record("b")
    a.hold_watch()
    lan.beat("b")
    before = lan.value(KEYS.host("b"))
    until(lambda: a.ledger.transactions["absent"], "it tried")
    assert lan.value(KEYS.host("b")) == before


@pytest.mark.parametrize("junk", ["junk", "[]"])
def test_a_record_that_cannot_be_read(lan: _Lan, junk: str) -> None:
    """It stays as it is, and the others are looked after all the same."""
    a = lan.living("a")
    lan.record("b")
    a.catch_up()
    a.hold_watch()
    lan.put(KEYS.host("b"), junk)
    lan.record("c")
    a.release_watch()
    until(lambda: lan.absent("c"), "c is absent")
    assert lan.value(KEYS.host("b")) == junk.encode()


# ----------------------------------------------------------------------------------------- what is refused


def test_a_host_that_lives_is_not_retired(lan: _Lan) -> None:
    """Also with force: its daemon runs."""
    lan.living("a")
    lan.record("b")
    lan.beat("b")
    lan.lease_of("b", "192.168.1.50")
    for force in (False, True):
        assert "host b is alive, its daemon runs since today" in ordered(lan, "b", force).refused
    assert lan.lease("192.168.1.50")


def test_a_host_that_nobody_knows(lan: _Lan) -> None:
    """A name typed wrong changes nothing, and the right ones are named."""
    lan.living("a")
    assert ordered(lan, "b").refused == "there is no host b in the register; known are: a"


def test_no_living_daemon_at_all(lan: _Lan) -> None:
    """Nothing is freed on the word of the command alone, not even with force."""
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    assert "no daemon is alive" in ordered(lan, "b", True).refused
    assert lan.lease("192.168.1.50")


def test_two_commands_at_once(lan: _Lan) -> None:
    """The second one says who is at it already, and does not end the first one's order."""
    lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    inside, go_on = threading.Event(), threading.Event()

    def wait(address: Address) -> None:
        inside.set()
        go_on.wait(10)

    lan.wire.before_answer = wait
    first = Command(lan, "b")
    assert inside.wait(10)
    with pytest.raises(Refused, match="host b is being retired already, by eve since"):
        list(Operations(lan.etcd, KEYS, "bob").retire("b", False, 10))
    go_on.set()
    assert first.end().refused == ""
    assert lan.lease("192.168.1.50") is None


# ------------------------------------------------------------------------------------------ what is freed


def test_what_is_silent_is_freed_and_what_answers_stays(lan: _Lan) -> None:
    """Section 8: by proof. Who is left says so, a line each; the history and the host's own list know the rest."""
    lan.living("a").create()
    lan.record("b")
    lan.record("b2")
    for number in range(50, 62):
        lan.lease_of("b", f"192.168.1.{number}")
    lan.lease_of("b2", "192.168.1.70")
    lan.lease_of("b", "192.168.1.80", STANDBY, mac="")
    lan.wire.machines = {"192.168.1.50": OWN, "192.168.1.51": OTHER}
    lan.put(f"{KEYS.pools}{POOL}/b", encode(PoolUse("b", "default", "192.168.1.0/24")))
    done = ordered(lan, "b")
    assert done.freed == [f"192.168.1.{number}" for number in range(52, 62)]
    assert sorted(done.kept) == ["192.168.1.50", "192.168.1.51", "192.168.1.80"]
    assert f"MAC {OWN}, its own" in done.kept["192.168.1.50"]
    assert f"MAC {OTHER}, not the one in the lease" in done.kept["192.168.1.51"]
    assert "--force" in done.kept["192.168.1.80"]
    assert "3 of its addresses stay taken" in done.refused
    assert sorted(lan.of_kind(ENDPOINT)) == ["192.168.1.50", "192.168.1.51", "192.168.1.70"]
    past = decode(lan.value(KEYS.past("default", parse_address("192.168.1.55"))) or b"", History).past
    assert past[0].why == "host b retired by eve"
    assert lan.lost("b") == done.freed
    assert lan.value(KEYS.host("b"))
    assert lan.value(f"{KEYS.pools}{POOL}/b") is None
    assert lan.value(f"{KEYS.pools}{POOL}/a")


def test_force_frees_what_is_quiet_and_never_what_answers(lan: _Lan) -> None:
    """By force the operator says that the machine is off. What answers shows that he is wrong."""
    lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    lan.lease_of("b", "192.168.1.51", STANDBY, mac="")
    lan.lease_of("b", "192.168.1.52", STANDBY, mac="")
    lan.wire.machines = {"192.168.1.50": OWN, "192.168.1.52": OTHER}
    done = ordered(lan, "b", force=True)
    assert (done.freed, sorted(done.kept)) == (["192.168.1.51"], ["192.168.1.50", "192.168.1.52"])
    lan.wire.machines = {}
    done = ordered(lan, "b", force=True)
    assert done == Done(["192.168.1.50", "192.168.1.52"], {}, "")
    assert lan.value(KEYS.host("b")) is None
    assert lan.lost("b") == ["192.168.1.50", "192.168.1.51", "192.168.1.52"]


@pytest.mark.parametrize("trouble", ["dead", "failed", "proxy", "off"])
def test_a_wire_that_proves_nothing(lan: _Lan, trouble: str) -> None:
    """Nothing is freed without proof; the operator reads why, and force frees it."""
    a = lan.living("a", habits=ASKED if trouble != "off" else ASKED._replace(probe="off"))
    a.create()
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    if trouble == "proxy":
        lan.wire.proxy = OTHER
    elif trouble != "off":
        setattr(lan.wire, trouble, "no carrier")
    done = ordered(lan, "b")
    assert done.freed == []
    assert "cannot be proven: host a" in done.kept["192.168.1.50"]
    assert ordered(lan, "b", force=True).freed == ["192.168.1.50"]


def test_shared_addresses_lose_the_host(lan: _Lan) -> None:
    """A router that a living host uses as well stays, one that the dead host alone used goes."""
    a = lan.living("a")
    b = lan.host("b", bridge("192.168.1.30/24", mac="02:00:00:00:00:30"))
    for host, addresses in ((a, ("192.168.1.254",)), (b, ("192.168.1.254", "192.168.1.253"))):
        pool = host.create(gateway="router")
        for address in addresses:
            host.gateway(pool, address)
    lan.record("b")
    done = ordered(lan, "b")
    assert (done.freed, done.refused) == (["192.168.1.30"], "")
    lease = lan.lease("192.168.1.254")
    assert lease is not None
    assert [each.host for each in lease.holders] == ["a"]
    assert lan.lease("192.168.1.253") is None


def test_a_host_that_had_nothing(lan: _Lan) -> None:
    """Only its record goes."""
    lan.living("a")
    lan.record("b")
    assert ordered(lan, "b") == Done([], {}, "")
    assert lan.value(KEYS.host("b")) is None


def test_parts_by_the_hosts_that_reach_them(lan: _Lan) -> None:
    """Each subnet is asked by a host that is on its LAN; where none is, nothing is freed, and the command says so."""
    other = FakeLan()
    lan.living("a")
    lan.hosts.append(Host(lan.etcd, "c", bridge("10.0.0.3/24"), habits=ASKED, wire=other, segment="far"))
    lan.beat("c")
    lan.hosts[-1].retire()
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    lan.lease_of("b", "10.0.0.50", segment="far", pool="far/10.0.0.0/24")
    lan.lease_of("b", "10.0.0.51", segment="far", pool="far/10.0.0.0/24")
    lan.lease_of("b", "172.16.0.5", segment="else", pool="else/172.16.0.0/24")
    other.machines = {"10.0.0.51": OWN}
    done = ordered(lan, "b", force=True)
    assert done.freed == ["10.0.0.50", "192.168.1.50"]
    assert sorted(done.kept) == ["10.0.0.51", "172.16.0.5"]
    assert done.kept["172.16.0.5"] == "no living daemon reaches subnet 172.16.0.0/24 of segment else"
    assert {str(each) for each in lan.wire.probed} == {"192.168.1.50"}
    assert {str(each) for each in other.probed} >= {"10.0.0.50", "10.0.0.51"}


def test_the_daemon_that_had_begun_dies(lan: _Lan) -> None:
    """Another one takes its part over, with what was freed until then."""
    lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    order = Order("b", "eve", "now", "token")
    lease = lan.etcd.grant_ttl(60, deadline=time.monotonic() + 5)
    lan.hosts[0].serves = False
    lan.etcd.commit({}, [Put(KEYS.retire("b"), encode(order), lease)], deadline=time.monotonic() + 5)
    begun = KEYS.retire_part("b", POOL)
    lan.beat("dying")
    lan.etcd.commit(
        {}, [Put(begun, encode(Part("dying", freed=("192.168.1.49",))), lease)], deadline=time.monotonic() + 5
    )
    lan.hosts[0].serves = True
    until(lambda: len(lan.wire.probed) == 0 and lan.hosts[0].retirer._plans, "it knows the order")
    assert lan.lease("192.168.1.50")
    lan.delete(KEYS.heartbeat("dying"))
    until(lambda: lan.lease("192.168.1.50") is None, "it is freed")
    until(lambda: lan.part("b", POOL).done, "the part is done")
    assert lan.part("b", POOL).freed == ("192.168.1.49", "192.168.1.50")


@pytest.mark.parametrize("fault", [Fault.APPLIED, Fault.LOST])
def test_an_outcome_that_is_not_known(lan: _Lan, fault: Fault) -> None:
    """P4: written or not, the address is told as free exactly when it is, and stands once in the list."""
    lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    faults = [fault]
    key = KEYS.lease("default", parse_address("192.168.1.50"))

    def on_commit(expect: object, writes: Writes) -> Fault:
        return faults.pop() if faults and any(each.key == key for each in writes) else Fault.PASS

    lan.etcd.on_commit = on_commit
    assert ordered(lan, "b") == Done(["192.168.1.50"], {}, "")
    assert not faults
    assert lan.lost("b") == ["192.168.1.50"]


# ---------------------------------------------------------------------------------- it comes back meanwhile


def meanwhile(lan: _Lan, what: Callable[[], None]) -> None:
    """Once, between the first question to the wire and its answer."""
    done: list[bool] = []

    def before_answer(address: Address) -> None:
        if not done:
            done.append(True)
            what()

    lan.wire.before_answer = before_answer


def comes_back(lan: _Lan) -> None:
    lan.beat("b")


def was_back_for_a_moment(lan: _Lan) -> None:
    """As its daemon does it: heartbeat, record; then it dies again."""
    lan.beat("b")
    lan.record("b", version="2")
    lan.delete(KEYS.heartbeat("b"))


def order_is_taken_back(lan: _Lan) -> None:
    lan.delete(KEYS.retire("b"))


def another_order_is_given(lan: _Lan) -> None:
    lan.put(KEYS.retire("b"), "{}")


@pytest.mark.parametrize("what", [comes_back, was_back_for_a_moment, order_is_taken_back, another_order_is_given])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_freed_once(lan: _Lan, what: Callable[[_Lan], None], force: bool) -> None:
    """P3: the silence of a moment ago counts only as long as nothing else has happened."""
    a = lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    meanwhile(lan, lambda: what(lan))
    command = Command(lan, "b", force)
    until(lambda: lan.wire.probed, "the wire was asked")
    until(lambda: a.ledger.transactions["free"], "it was tried")
    assert lan.lease("192.168.1.50")
    lan.delete(KEYS.retire("b"))
    assert "nothing more is freed" in command.end().refused
    assert lan.lost("b") == []


@pytest.mark.parametrize("token", ["t192.168.1.50", "new"])
def test_a_lease_that_changed_meanwhile(lan: _Lan, token: str) -> None:
    """Same token or not: it is not the lease about which the wire was asked."""
    lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    meanwhile(lan, lambda: lan.lease_of("b", "192.168.1.50", since="now", token=token) and None)
    done = ordered(lan, "b")
    assert done.freed == []
    assert "has just changed" in done.kept["192.168.1.50"]
    assert lan.lease("192.168.1.50")


def test_a_lease_that_is_somebody_elses_by_now(lan: _Lan) -> None:
    """An operator freed it and another host has it: it is no part of the order."""
    lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    lan.lease_of("b", "192.168.1.51")
    meanwhile(lan, lambda: [lan.lease_of("c", f"192.168.1.{each}", token="c's") for each in (50, 51)] and None)
    assert ordered(lan, "b").freed == []
    assert all(lan.leases()[f"192.168.1.{each}"].host == "c" for each in (50, 51))


def test_a_host_does_not_retire_itself(lan: _Lan) -> None:
    """An order that is found at the return is void: else it would be carried out the next time that the host is off."""
    b = lan.living("b")
    lan.living("a")
    lan.lease_of("b", "192.168.1.50")
    lan.put(KEYS.retire("b"), encode(Order("b", "eve", "now", "token", force=True)))
    until(lambda: lan.value(KEYS.retire("b")) is None, "the order is gone")
    assert lan.lease("192.168.1.50")
    assert b.alarms == []


@pytest.mark.parametrize("junk", ["", "[]", '{"host": 1}'])
def test_an_order_that_cannot_be_read(lan: _Lan, junk: str) -> None:
    """It orders nothing."""
    a = lan.living("a")
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    lan.put(KEYS.retire("b"), junk)
    lan.record("c")
    a.catch_up()
    assert ordered(lan, "c").refused == ""
    assert lan.lease("192.168.1.50")


# ------------------------------------------------------------------------------------------------ the policy


def test_retire_after(lan: _Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """One order, without force, for a host that is gone long enough; not for one of which only the quiet rest is left,
    and none before this daemon has missed the host itself."""
    monkeypatch.setattr(retire.retirement, "SEEN_AT_LEAST", 0.5)
    long_ago = "2020-01-01T00:00:00.000Z"
    lan.record("b", absent=long_ago)
    lan.record("just", absent="2999-01-01T00:00:00.000Z")
    lan.record("quiet", absent=long_ago)
    lan.lease_of("b", "192.168.1.50")
    lan.lease_of("b", "192.168.1.51")
    lan.lease_of("just", "192.168.1.52")
    lan.lease_of("quiet", "192.168.1.53", STANDBY)
    lan.wire.machines = {"192.168.1.51": OWN}
    began = time.monotonic()
    for name in "ac":
        lan.living(name, retire_after=600.0)
    until(lambda: lan.lease("192.168.1.50") is None, "it is freed")
    assert time.monotonic() - began >= 0.5
    until(lambda: lan.part("b", "end").done, "the order is carried out")
    assert sorted(lan.leases()) == ["192.168.1.51", "192.168.1.52", "192.168.1.53"]
    assert [key for key in lan.under(KEYS.retiring) if key.count("/") == KEYS.retire("b").count("/")] == [
        KEYS.retire("b")
    ]
    order = decode(lan.value(KEYS.retire("b")) or b"", Order)
    assert (order.policy, order.force) == (True, False)
    # What stays is asked again when the order has ended.
    lan.wire.machines = {}
    lan.etcd.advance(retire.POLICY_TTL + 1)
    until(lambda: lan.lease("192.168.1.51") is None, "it is freed")
    until(lambda: lan.value(KEYS.host("b")) is lan.value(KEYS.retire("b")) is None, "b is forgotten")


def test_without_the_policy_nobody_is_retired(lan: _Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off, the default."""
    monkeypatch.setattr(retire.retirement, "SEEN_AT_LEAST", 0.0)
    a = lan.living("a")
    lan.record("b", absent="2020-01-01T00:00:00.000Z")
    lan.lease_of("b", "192.168.1.50")
    a.catch_up()
    for _ in range(5):
        a.retirer.look()
    assert lan.under(KEYS.retiring) == {}


def test_an_operator_comes_before_the_policy(lan: _Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its order stands for an hour; the operator's takes its place, with force."""
    monkeypatch.setattr(retire.retirement, "SEEN_AT_LEAST", 0.0)
    lan.record("b", absent="2020-01-01T00:00:00.000Z")
    lan.lease_of("b", "192.168.1.50")
    lan.lease_of("b", "192.168.1.51", STANDBY)
    lan.living("a", retire_after=600.0)
    until(lambda: lan.lease("192.168.1.50") is None, "the policy has freed one")
    assert ordered(lan, "b", force=True) == Done(["192.168.1.51"], {}, "")


# --------------------------------------------------------------------------------------------- it returns


def test_a_host_that_returns_is_told_once(lan: _Lan) -> None:
    """An alarm with the count and the first few, and the list is deleted."""
    leases = tuple(
        LostLease("default", f"192.168.1.{each}", ENDPOINT, "t", "today", f"web{each}") for each in range(50, 58)
    )
    lan.put(KEYS.lost("b"), encode(Lost(leases, more=2)))
    b = lan.living("b")
    until(lambda: lan.value(KEYS.lost("b")) is None, "it is told")
    [(kind, text)] = b.alarms
    assert kind == "host_was_retired"
    assert "lost 10 addresses: 192.168.1.50 (container web50)" in text
    assert "and 5 more" in text


def test_a_list_is_not_deleted_before_it_is_told(lan: _Lan) -> None:
    """A daemon whose name is not its own yet must not take the news from the one whose it is."""
    lan.put(KEYS.lost("b"), encode(Lost((LostLease("default", "192.168.1.50", ENDPOINT, "t", "today"),))))
    b = lan.host("b", bridge("192.168.1.12/24"))
    b.serves = False
    b.retire()
    b.catch_up()
    before = lan.value(KEYS.lost("b"))
    b.serves = True
    until(lambda: b.alarms, "the alarm")
    assert before is not None


def cut_off(lan: _Lan, host: Host) -> None:
    """Its daemon runs, and hears nothing any more."""
    host.hold_watch()
    lan.etcd.commit({}, [], deadline=time.monotonic() + 5)


def test_whereabouts_75(lan: _Lan) -> None:
    """whereabouts#75: a host that was cut off returns and releases what was given to another meanwhile. The other one's
    lease stays, and is not released by the next try either (P3)."""
    a = lan.living("a")
    b = lan.host("b", bridge("192.168.1.30/24", mac="02:00:00:00:00:30"), habits=ASKED, wire=lan.wire)
    pool_a, pool_b = a.create(), b.create()
    lan.record("b")
    address = b.run(pool_b, "192.168.1.50")
    cut_off(lan, b)
    assert address in ordered(lan, "b", force=True).freed
    assert a.run(pool_a, address) == address
    theirs = lan.lease(address)
    # The release comes before the watch has caught up, and once more after it.
    assert b.post("/IpamDriver.ReleaseAddress", json.dumps({"PoolID": pool_b, "Address": address}).encode()).ok == {}
    assert lan.lease(address) == theirs
    b.release_watch()
    b.release(pool_b, address).ok  # noqa: B018
    assert lan.lease(address) == theirs
    assert theirs is not None
    assert theirs.host == "a"


def test_a_container_that_ran_on_is_heard_at_once(lan: _Lan) -> None:
    """Its host was only cut off, and its address is another's by now: the two on one address are an alarm with its
    first frame, not after the two minutes that a stopped container has for going down."""
    a = lan.living("a")
    pool = a.create()
    lan.record("b")
    lan.lease_of("b", "192.168.1.50")
    a.keep()
    assert ordered(lan, "b", force=True).freed == ["192.168.1.50"]
    a.run(pool, "192.168.1.50")
    until(lambda: a.keeper._pools, "it listens")
    lan.wire.talk("192.168.1.50", OWN)
    until(lambda: any(kind == "address_used_twice" and OWN in text for kind, text in a.alarms), "the alarm")


def test_standby_that_was_freed_meanwhile_is_not_given(lan: _Lan) -> None:
    """P1: the stock of a daemon that was cut off holds what is another's by now; no container gets it."""
    a = lan.living("a")
    b = lan.host(
        "b", bridge("192.168.1.30/24", mac="02:00:00:00:00:30"), habits=ASKED._replace(standby=2), wire=lan.wire
    )
    pool_a, pool_b = a.create(), b.create()
    b.keep()
    until(lambda: len(b.stock.all()) == 2, "b has its stock")
    stock = {str(slot.address) for slot in b.stock.all()}
    lan.record("b")
    cut_off(lan, b)
    until(lambda: stock == {str(slot.address) for slot in b.stock.all()}, "the stock is still there")
    assert stock <= set(ordered(lan, "b", force=True).freed)
    taken = {a.run(pool_a, address) for address in stock}
    assert taken == stock
    answer = b.post(
        "/IpamDriver.RequestAddress",
        json.dumps(
            {"PoolID": pool_b, "Address": "", "Options": {"com.docker.network.endpoint.macaddress": OWN}}
        ).encode(),
    )
    given = answer.ok["Address"].partition("/")[0]
    assert given not in stock
    assert {lan.leases()[address].host for address in stock} == {"a"}
    b.release_watch()
    until(lambda: {str(slot.address) for slot in b.stock.all()}.isdisjoint(stock), "they are out of the stock")


def test_pools_come_back_when_they_are_used(lan: _Lan) -> None:
    """A host that returns serves its networks as before, and its own addresses are in the register again."""
    lan.living("a")
    b = lan.host("b", bridge("192.168.1.30/24", mac="02:00:00:00:00:30"), habits=ASKED, wire=lan.wire)
    pool = b.create()
    lan.record("b")
    assert ordered(lan, "b") == Done(["192.168.1.30"], {}, "")
    assert lan.value(KEYS.pools + pool + "/b") is None
    lan.beat("b")
    b.run(pool)
    assert lan.value(KEYS.pools + pool + "/b")
    assert lan.leases()["192.168.1.30"].host == "b"


# --------------------------------------------------------------------------------------------- real processes


@pytest.mark.etcd
def test_daemons_on_a_real_etcd(etcd: RealEtcd, tmp_path: Path) -> None:
    """One daemon stops: `hosts` says since when, `host retire` frees nothing that cannot be proven and with --force
    everything, by the other daemon; the first one starts again and raises the alarm."""
    with daemons.fleet(tmp_path, etcd.settings.endpoints, 2, prefix=etcd.prefix, standby=0) as (living, gone):
        pools = [each.pool("192.168.9.0/24") for each in (living, gone)]
        address = gone.request_address(pools[1]).body["Address"].partition("/")[0]
        told = daemons.run("host", "retire", gone.host, config=living.config_file)
        assert (told.returncode, "is alive" in told.stderr) == (1, True)
        gone.terminate()
        assert gone.wait() == 0

        def absent() -> str:
            found = json.loads(daemons.run("hosts", "-o", "json", config=living.config_file).stdout)
            [line] = [each for each in found if each["host"] == gone.host]
            assert not line["alive"]
            return str(line["absent"])

        until(absent, "since when it is absent")
        assert f"NO since {absent()}" in daemons.run("hosts", config=living.config_file).stdout
        told = daemons.run("host", "retire", gone.host, config=living.config_file, seconds=60)
        assert told.returncode == 1
        assert f"{address} in segment default stays taken: that it is silent cannot be proven" in told.stdout
        told = daemons.run("host", "retire", gone.host, "--force", config=living.config_file, seconds=60)
        assert (told.returncode, told.stderr) == (0, "")
        assert (
            told.stdout == f"{address} in segment default is free\nhost h1 is out of the register; addresses freed: 1\n"
        )
        assert etcd.client.list(f"{etcd.prefix}retiring/", deadline=time.monotonic() + 5)[0] == []
        assert gone.host not in daemons.run("hosts", config=living.config_file).stdout
        gone.start()
        gone.wait_answering()
        until(lambda: "ALARM host_was_retired" in gone.text(), "the alarm")
        assert f"{address} (endpoint)" in gone.text()
        until(lambda: not etcd.client.list(f"{etcd.prefix}gone/", deadline=time.monotonic() + 5)[0], "it is told once")
