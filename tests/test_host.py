"""Who this host is: its name, the directory that keeps it, and the heartbeat that only one daemon may have."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeEtcd, Fault
from ipam_plugin import host as host_module
from ipam_plugin import interfaces
from ipam_plugin.claims import Claims, Stock
from ipam_plugin.errors import ConfigError, NotServing
from ipam_plugin.etcd import Delete, KeyValue, Put
from ipam_plugin.host import HEARTBEAT, Alarms, BootWait, Predecessor, Presence, StateDir, host_name, predecessor
from ipam_plugin.interfaces import InterfaceAddress
from ipam_plugin.journal import Journal
from ipam_plugin.ledger import Ledger
from ipam_plugin.model import ENDPOINT, HOST, NAME, Alive, History, Host, Keys, Lease, decode, encode
from ipam_plugin.neighbourhood import Habits, Neighbourhood
from ipam_plugin.outage import Outage
from ipam_plugin.protocol import RequestAddress, RequestPool
from ipam_plugin.register import Register
from ipam_plugin.view import View
from properties import refusal

KEYS = Keys("/p/")
CARRIER = InterfaceAddress(ipaddress.ip_address("10.0.0.2"), 24, "br0", "52:54:00:00:00:01", bridge=True, up=True)
STRANGER = Alive("a", machine_id="another-machine", boot_id="b", process="p", state="s", pid=7, since="yesterday")


def until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Wait for a condition; fail when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def soon() -> float:
    return time.monotonic() + 5


# --- the name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "hostname", "kept", "name", "warned"),
    [
        ("cfg", "machine", "", "cfg", False),
        ("cfg", "machine", "old", "cfg", False),
        (None, "machine", "", "machine", False),
        (None, "machine", "machine", "machine", False),
        (None, "renamed", "machine", "machine", True),
        (None, "-", "machine", "machine", False),
    ],
)
def test_the_name_of_a_host(configured: str | None, hostname: str, kept: str, name: str, warned: bool) -> None:
    """Section 8: the configuration decides, then the name that was kept; a new hostname changes nothing, and warns."""
    found, warning = host_name(configured, hostname, kept)
    assert found == name
    assert bool(warning) == warned
    if warned:
        assert hostname in warning
        assert kept in warning


@given(st.text(max_size=70), st.sampled_from(("", "kept", "a/b", "..")))
def test_a_name_that_cannot_be_one_is_refused(hostname: str, kept: str) -> None:
    """The name becomes part of keys: a hostname, or a damaged file, that is none stops the start with the cure."""
    refused = refusal(ConfigError, host_name, None, hostname, kept)
    if refused:
        assert refused.startswith(("host: ", "state_dir: "))
    else:
        assert NAME.fullmatch(host_name(None, hostname, kept)[0])


ME = Alive("a", machine_id="m", boot_id="b", process="me", state="s1", pid=10, pid_namespace="n", pid_started="5")


@pytest.mark.parametrize(
    ("change", "exists", "expected"),
    [
        ({"process": "me"}, True, Predecessor.SELF),
        ({}, True, Predecessor.UNKNOWN),
        ({}, False, Predecessor.GONE),
        ({"state": "s1"}, True, Predecessor.GONE),
        ({"state": "s1", "machine_id": "clone"}, True, Predecessor.UNKNOWN),
        ({"state": "s1", "boot_id": "before"}, False, Predecessor.UNKNOWN),
        ({"machine_id": "other"}, False, Predecessor.UNKNOWN),
        ({"boot_id": "before"}, False, Predecessor.UNKNOWN),
        ({"pid_namespace": "container"}, False, Predecessor.UNKNOWN),
        ({"pid": 0}, False, Predecessor.UNKNOWN),
        ({"state": "", "pid": 0}, False, Predecessor.UNKNOWN),
    ],
)
def test_what_a_heartbeat_says_of_its_maker(change: dict[str, object], exists: bool, expected: Predecessor) -> None:
    """Section 8: taken over at once only what is gone for certain: this machine, this boot, and the process is no more
    or had the very state_dir that is locked here now. Everything else is waited for.
    """
    alive = msgspec.structs.replace(ME, **{"process": "other", "state": "s2", **change})
    assert predecessor(alive, ME, lambda pid, started: exists) is expected


def test_no_heartbeat() -> None:
    """Nobody was there, or it has ended."""
    assert predecessor(None, ME, lambda pid, started: True) is Predecessor.NONE


# --- the directory -------------------------------------------------------------------------------------


def test_the_state_directory_keeps_what_was_written(tmp_path: Path) -> None:
    """A restarted daemon finds its name and its token again; nobody else can read the directory."""
    first = StateDir(str(tmp_path / "deep" / "state"))
    assert first.read("host") == ""
    first.write("host", "a")
    again = StateDir(str(tmp_path / "deep" / "state"))
    assert again.read("host") == "a"
    assert first.token() == again.token() != StateDir(str(tmp_path / "other")).token()
    assert (tmp_path / "deep" / "state").stat().st_mode & 0o777 == 0o700
    assert {each.name for each in again.path.iterdir()} == {"host", "token", "lock"}


def test_a_damaged_file_is_not_taken_for_an_absent_one(tmp_path: Path) -> None:
    """A host that lost its name would start under another one and strand its leases: it refuses, naming the file."""
    state = StateDir(str(tmp_path))
    (tmp_path / "host").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"^state_dir: .*/host cannot be read"):
        state.read("host")
    (tmp_path / "host").unlink()
    (tmp_path / "host").mkdir()
    with pytest.raises(ConfigError, match=r"^state_dir: .*/host cannot be read"):
        state.read("host")


def test_a_directory_that_cannot_be_one(tmp_path: Path) -> None:
    """A wrong path is a sentence about the key of the configuration."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^state_dir: .*/file/x cannot be used: Not a directory"):
        StateDir(str(tmp_path / "file" / "x"))


def test_one_process_has_the_directory(tmp_path: Path) -> None:
    """Section 8: state_dir is locked by the process that serves; a second one says what to do."""
    state = StateDir(str(tmp_path))
    with open(tmp_path / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"^state_dir: .* is in use by another ipam-plugin on this machine"):
            state.lock(patience=0)
        ending = threading.Timer(0.1, lambda: fcntl.flock(other, fcntl.LOCK_UN))
        ending.start()
        state.lock(patience=20)  # a predecessor that is just ending is waited for
        ending.join()


# --- the heartbeat -------------------------------------------------------------------------------------


class Node:
    """One host's daemon, as far as its presence goes: view, register, heartbeat, on an etcd that is shared."""

    def __init__(
        self,
        etcd: FakeEtcd,
        state: Path,
        name: str = "a",
        carried: list[InterfaceAddress] | None = None,
        segment: str = "lan",
        request_limit: float = 15.0,
        boot_wait: float = 0.0,
    ) -> None:
        self.segment = segment
        self.state = StateDir(str(state))
        self.etcd = etcd
        self.carried = carried if carried is not None else []
        self.macs: set[str] = set()
        self.view = View(KEYS, name)
        self.presence = Presence(
            etcd,
            self.view,
            KEYS,
            self.state,
            name=name,
            segments=self.segments,
            carried=lambda deadline: self.carried,
            time_limit=0.5,
            listens_with=lambda: self.macs,
            request_limit=request_limit,
            boot_wait=boot_wait,
        )
        ledger = Ledger(etcd, self.view, KEYS, name)
        neighbourhood = Neighbourhood(
            self.view, name, lambda segment: Habits(probe="off"), interfaces, alarm=self.presence.alarm
        )
        outage = Outage(
            Journal(Path(state) / "journal"),
            lambda deadline: etcd.get(KEYS.host(name), deadline=deadline),
            alarm=self.presence.alarm,
        )
        self.register = Register(
            ledger,
            Claims(ledger, self.view, KEYS, name, neighbourhood, Stock(), outage, vendor_of=lambda mac: ""),
            self.view,
            KEYS,
            name,
            outage=outage,
            default_segment=segment,
            segments=self.segments,
            carried=lambda deadline: self.carried,
            alarm=self.presence.alarm,
        )
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=etcd.watch, args=(KEYS.prefix, self._listed, self.view.apply, self._stop)),
            threading.Thread(target=self.presence.run, args=(self.register, self._stop)),
        ]

    def _listed(self, found: list[KeyValue], revision: int, epoch: int) -> None:
        self.view.reset([(each.key, each.value, each.revision) for each in found], revision, epoch)

    def segments(self) -> set[str]:
        return {self.segment, *self.view.segments_of(self.presence.name)}

    def start(self) -> Node:
        for each in self._threads:
            each.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self.presence.changed()
        for each in self._threads:
            if each.ident is not None:
                each.join(10)

    def serves(self) -> bool:
        return self.presence.is_serving

    def reason(self) -> str:
        """Why requests are refused; '' when they are not."""
        return refusal(NotServing, self.presence.serving, time.monotonic())

    def heartbeat(self) -> Alive | None:
        found = self.etcd.get(KEYS.heartbeat(self.presence.name), deadline=soon())
        return decode(found.value, Alive) if found else None


@pytest.fixture
def etcd() -> FakeEtcd:
    return FakeEtcd()


@pytest.fixture
def start(etcd: FakeEtcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Node]]:
    """Start nodes on one etcd; all of them end with the test."""
    monkeypatch.setattr(host_module, "REFRESH", 0.05)
    with contextlib.ExitStack() as stack:

        def started(
            state: str = "state",
            name: str = "a",
            carried: list[InterfaceAddress] | None = None,
            segment: str = "lan",
            **waits: float,
        ) -> Node:
            node = Node(etcd, tmp_path / state, name, carried, segment, **waits)
            stack.callback(node.stop)
            return node.start()

        yield started


def put(etcd: FakeEtcd, key: str, value: bytes, ttl: int = 0) -> None:
    lease = etcd.grant_ttl(ttl, deadline=soon()) if ttl else 0
    etcd.commit({}, [Put(key, value, lease)], deadline=soon())


def test_a_host_enters_the_register(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """Before the first request: a heartbeat bound to a TTL, the record of the host, and its name kept on disk."""
    node = start(carried=[CARRIER])
    node.presence.serving(time.monotonic() + 20)
    heartbeat = etcd.get(KEYS.heartbeat("a"), deadline=soon())
    assert heartbeat is not None
    assert heartbeat.lease
    record = etcd.get(KEYS.host("a"), deadline=soon())
    assert record is not None
    assert [each.address for each in decode(record.value, Host).addresses] == ["10.0.0.2"]
    assert node.state.read("host") == "a"


def test_a_request_waits_until_the_host_is_in_the_register(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """P6, P7: within its deadline, then it is refused with the reason; when etcd comes back, it is served."""
    etcd.set_down(True)
    node = start()
    until(lambda: "etcd is not there" in node.reason(), "the reason names etcd")
    etcd.set_down(False)
    node.presence.serving(time.monotonic() + 20)


def test_an_outage_of_etcd_does_not_end_the_service(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """P8: a host that is in the register stays the one that it is; requests meet etcd's own refusal."""
    node = start()
    until(node.serves, "serving")
    etcd.set_down(True)
    etcd.advance(HEARTBEAT + 1)
    assert node.serves()
    etcd.set_down(False)
    until(lambda: node.heartbeat() is not None, "the heartbeat is there again")
    assert node.serves()


def test_a_lost_heartbeat_is_made_again(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """A host that was cut off for longer than the TTL is alive again by itself, without having stopped to serve."""
    node = start()
    until(node.serves, "serving")
    before = node.heartbeat()
    etcd.advance(HEARTBEAT + 1)
    until(lambda: node.heartbeat() is not None, "the heartbeat is there again")
    after = node.heartbeat()
    assert before is not None
    assert after is not None
    assert after.process == before.process
    assert node.serves()


def test_a_heartbeat_that_somebody_deleted_is_made_again(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """The TTL lease still lives, the key is gone."""
    node = start()
    until(node.serves, "serving")
    etcd.commit({}, [Delete(KEYS.heartbeat("a"))], deadline=soon())
    until(lambda: node.heartbeat() is not None, "the heartbeat is there again")


@pytest.mark.parametrize("fault", [Fault.APPLIED, Fault.LOST, Fault.UNAVAILABLE])
def test_a_heartbeat_whose_outcome_is_unknown(fault: Fault, etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """P4: written or not, the daemon recognises its own heartbeat and serves."""
    etcd.faults.append(fault)
    node = start()
    until(node.serves, "serving")


def test_a_successor_on_the_same_state_takes_over_at_once(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """Section 8: killed and started again, it need not wait 30 s for its predecessor's heartbeat."""
    first = start()
    until(first.serves, "serving")
    first.stop()  # as if killed: the heartbeat stays
    before = first.heartbeat()
    second = start()
    until(second.serves, "the successor serves")
    after = second.heartbeat()
    assert before is not None
    assert after is not None
    assert before.process != after.process


def test_at_a_stop_the_heartbeat_ends(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """So that whoever comes next need not wait; somebody else's is left alone."""
    node = start()
    until(node.serves, "serving")
    node.stop()
    node.presence.leave()
    assert node.heartbeat() is None
    put(etcd, KEYS.heartbeat("a"), encode(STRANGER))
    node.presence.leave()
    assert node.heartbeat() == STRANGER


def test_a_second_daemon_of_the_same_name_does_not_serve(
    etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: two machines under one name would release each other's addresses. The later one refuses, with the cure,
    and goes on by itself when the first has ended.
    """
    monkeypatch.setattr(host_module, "PATIENCE", 0.3)
    first = start("one")
    until(first.serves, "the first serves")
    second = start("two")
    until(lambda: "another daemon is alive under the name a" in second.reason(), "the second says why")
    for part in ("set `host` in this machine's configuration", "/etc/machine-id", "machine id"):
        assert part in second.reason()
    assert not second.serves()
    assert first.serves()
    assert second.state.read("host") == ""  # the name is not its own
    first.stop()
    first.presence.leave()
    until(second.serves, "the second serves")


def test_a_clone_waits_until_the_heartbeat_has_ended(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """Section 8: what another machine wrote may be alive; it is waited for, for as long as its TTL lasts."""
    put(etcd, KEYS.heartbeat("a"), encode(STRANGER), ttl=HEARTBEAT)
    node = start()
    until(lambda: "was alive within the last 30 s" in node.reason(), "the reason")
    assert "another-machine, process 7, since yesterday" in node.reason()
    assert node.heartbeat() == STRANGER
    etcd.advance(HEARTBEAT + 1)
    until(node.serves, "serving")


def test_a_heartbeat_that_cannot_be_read_is_somebodys(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """What cannot be read is not overwritten."""
    put(etcd, KEYS.heartbeat("a"), b"junk", ttl=HEARTBEAT)
    node = start()
    until(lambda: "its value cannot be read" in node.reason(), "the reason")
    etcd.advance(HEARTBEAT + 1)
    until(node.serves, "serving")


def test_a_strangers_heartbeat_ends_the_service(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """P1: cut off for longer than the TTL while another machine took the name: it stops to serve until that ends."""
    node = start()
    until(node.serves, "serving")
    put(etcd, KEYS.heartbeat("a"), encode(STRANGER), ttl=HEARTBEAT)
    until(lambda: not node.serves(), "it does not serve any more")
    assert "another-machine" in node.reason()
    assert node.heartbeat() == STRANGER
    etcd.advance(HEARTBEAT + 1)
    until(node.serves, "it serves again")


def test_a_changed_name_is_refused_while_the_old_one_has_leases(
    etcd: FakeEtcd, start: Callable[..., Node], tmp_path: Path
) -> None:
    """Section 8: its containers' leases would be stranded. The sentence names both names, a lease and the cure."""
    StateDir(str(tmp_path / "state")).write("host", "old")
    lease = KEYS.lease("lan", ipaddress.ip_address("10.0.0.5"))
    put(etcd, lease, encode(Lease(ENDPOINT, "old", token="t")))
    node = start(name="new")
    until(lambda: "set host: old again" in node.reason(), "the reason")
    assert "names this host new, but 1 leases and pools are under its old name old, such as 10.0.0.5" in node.reason()
    assert node.heartbeat() is None
    assert node.state.read("host") == "old"
    etcd.commit({}, [Delete(lease)], deadline=soon())
    until(node.serves, "it serves when the last lease is gone")
    assert node.state.read("host") == "new"


def test_a_changed_name_takes_the_hosts_own_addresses_along(
    etcd: FakeEtcd, start: Callable[..., Node], tmp_path: Path
) -> None:
    """Section 8: without containers and networks a host may be renamed; the record under the old name goes."""
    StateDir(str(tmp_path / "state")).write("host", "old")
    put(etcd, KEYS.lease("lan", ipaddress.ip_address("10.0.0.5")), encode(Lease(HOST, "old", token="t")))
    put(etcd, KEYS.host("old"), encode(Host("old")))
    node = start(name="new")
    until(node.serves, "it serves")
    assert etcd.get(KEYS.host("old"), deadline=soon()) is None
    until(lambda: etcd.get(KEYS.host("new"), deadline=soon()) is not None, "the record of the new name")


def test_a_copy_of_a_state_dir_is_another_one(tmp_path: Path) -> None:
    """P1: the token of a state_dir proves that its lock is ours, which holds for one directory and for no copy."""
    first = StateDir(str(tmp_path / "one"))
    first.token()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert StateDir(str(tmp_path / "two")).token() != first.token()
    assert StateDir(str(tmp_path / "one")).token() == first.token()


def test_a_changed_name_without_leases_is_accepted(etcd: FakeEtcd, start: Callable[..., Node], tmp_path: Path) -> None:
    """Nothing is stranded: the new name is kept from now on. Others' leases do not matter."""
    StateDir(str(tmp_path / "state")).write("host", "old")
    put(etcd, KEYS.lease("lan", ipaddress.ip_address("10.0.0.5")), encode(Lease(ENDPOINT, "another", token="t")))
    node = start(name="new")
    until(node.serves, "serving")
    assert node.state.read("host") == "new"


def test_a_disk_that_cannot_be_written_is_told(
    etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: not kept on disk, the name would be lost; the refusal says so, and it goes on when there is room again."""
    full = [True]
    write = StateDir.write

    def written(self: StateDir, name: str, text: str) -> None:
        if name == "host" and full[0]:
            raise OSError(28, "No space left on device")
        write(self, name, text)

    monkeypatch.setattr(StateDir, "write", written)
    node = start()
    until(lambda: "No space left on device" in node.reason(), "the reason")
    assert not node.serves()
    full[0] = False
    until(node.serves, "serving")
    assert node.state.read("host") == "a"


@pytest.mark.parametrize("at_the_start", [True, False])
def test_a_record_that_cannot_be_read_is_left_alone(
    at_the_start: bool, etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: never overwritten, an operator is told the key and the cure, and etcd is not asked again and again. When
    the key is gone, the record is written.
    """
    if at_the_start:
        put(etcd, KEYS.host("a"), b"junk")
    node = start()
    until(node.serves, "serving")
    if not at_the_start:
        put(etcd, KEYS.host("a"), b"junk")
        node.presence.changed()
    until(lambda: node.presence.alarm_counts(), "the alarm")
    turns: list[int] = []
    keep_alive = etcd.keep_alive

    def counted(lease: int, *, deadline: float) -> int:
        turns.append(lease)
        return keep_alive(lease, deadline=deadline)

    monkeypatch.setattr(etcd, "keep_alive", counted)
    before = etcd.transactions
    until(lambda: len(turns) > 3, "some turns of the loop")
    assert etcd.transactions == before
    assert node.presence.alarm_counts() == {"record_unreadable": 1}
    found = etcd.get(KEYS.host("a"), deadline=soon())
    assert found is not None
    assert found.value == b"junk"
    etcd.commit({}, [Delete(KEYS.host("a"))], deadline=soon())

    def told() -> str:
        record = etcd.get(KEYS.host("a"), deadline=soon())
        return " ".join(decode(record.value, Host).alarms) if record else ""

    until(lambda: f"delete it (etcdctl del {KEYS.host('a')})" in told(), "the record, with the alarm")


def test_a_history_in_bounds(etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 4: of the history of all addresses the newest stay; several hosts that trim it at once do no harm."""
    monkeypatch.setattr(Register.trim_history, "__defaults__", (30,))
    keys = [KEYS.past("lan", ipaddress.ip_address("10.0.0.0") + number) for number in range(350)]
    for key in keys:
        put(etcd, key, encode(History()))
    for name in ("a", "b", "c"):
        start(name, name)
    until(lambda: len(etcd.list(KEYS.history, deadline=soon())[0]) == 30, "the oldest are gone")
    assert sorted(each.key for each in etcd.list(KEYS.history, deadline=soon())[0]) == sorted(keys[-30:])


def test_equal_addresses_on_lans_that_never_meet(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """Two hosts of different segments may carry the same address: neither is refused or alarmed. In one segment it is
    a conflict that an operator must know of.
    """
    nodes = [start(name, name, [CARRIER], segment) for name, segment in (("a", "one"), ("b", "two"), ("c", "one"))]
    for node in nodes[:2]:
        node.presence.serving(time.monotonic() + 20)
        pool, _ = node.register.request_pool(RequestPool(Pool="10.0.0.0/24", Options={}), soon())
        gateway = RequestAddress(PoolID=pool.id, Options={"RequestAddressType": "com.docker.network.gateway"})
        assert node.register.request_address(gateway, soon()) == "10.0.0.2/24"
    until(lambda: nodes[2].presence.alarm_counts() == {"own_address_taken": 1}, "the alarm of the third")
    held = {each.key: decode(each.value, Lease).host for each in etcd.list(KEYS.leases, deadline=soon())[0]}
    assert held == {KEYS.lease("one", CARRIER.address): "a", KEYS.lease("two", CARRIER.address): "b"}
    assert nodes[0].presence.alarm_counts() == nodes[1].presence.alarm_counts() == {}
    assert "host b" in nodes[0].view.forbids("two", CARRIER.address)


def test_the_record_names_the_segments(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """Others must know where the host's addresses are: a network in another segment is in the record soon after."""
    node = start(carried=[CARRIER])
    node.presence.serving(time.monotonic() + 20)

    def segments() -> tuple[str, ...]:
        record = etcd.get(KEYS.host("a"), deadline=soon())
        return decode(record.value, Host).segments if record else ()

    assert segments() == ("lan",)
    node.view.on_pools = node.presence.changed
    node.register.request_pool(RequestPool(Pool="10.0.0.0/24", Options={"segment": "dmz"}), soon())
    until(lambda: segments() == ("dmz", "lan"), "the record with both")


def test_the_record_follows_the_interfaces(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """P2: a new address of the host is in the register as soon as the kernel tells, and a removed one is not."""
    node = start()
    until(node.serves, "serving")

    def addresses() -> list[str]:
        record = etcd.get(KEYS.host("a"), deadline=soon())
        return [each.address for each in decode(record.value, Host).addresses] if record else []

    for carried in ([CARRIER], [CARRIER, dataclasses.replace(CARRIER, address=ipaddress.ip_address("10.0.0.3"))], []):
        node.carried[:] = carried
        node.presence.changed()
        until(lambda wanted=[str(each.address) for each in carried]: addresses() == wanted, "the record")  # type: ignore[misc]


def test_a_record_that_was_retired_comes_back(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """A host that lives is in the register, whoever deleted its record."""
    node = start()
    until(node.serves, "serving")
    etcd.commit({}, [Delete(KEYS.host("a"))], deadline=soon())
    until(lambda: etcd.get(KEYS.host("a"), deadline=soon()), "the record is there again")


def test_a_host_that_is_there_again_is_not_absent(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """What the others wrote into its record while it was away goes, though nothing else in it has changed."""
    node = start()
    until(node.serves, "serving")

    def record() -> Host:
        found = etcd.get(KEYS.host("a"), deadline=soon())
        return decode(found.value, Host) if found else Host("")

    before = record()
    put(etcd, KEYS.host("a"), encode(msgspec.structs.replace(before, absent="2026-11-22T10:00:00.000Z")))
    until(lambda: record() == before, "it is as before")


def test_the_record_names_the_macs_that_it_listens_with(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """Section 7: the parent of a macvlan network has no address, and is no stranger to the others all the same."""
    node, other = start(), start("b", "b")
    for each in (node, other):
        each.presence.serving(time.monotonic() + 20)
    node.macs |= {"52:54:00:00:00:09", "52:54:00:00:00:02"}
    node.presence.changed()

    def told() -> tuple[str, ...]:
        record = etcd.get(KEYS.host("a"), deadline=soon())
        return decode(record.value, Host).macs if record else ()

    until(lambda: told() == ("52:54:00:00:00:02", "52:54:00:00:00:09"), "the record with both")
    until(lambda: other.view.is_ours("52:54:00:00:00:09"), "the other host knows")
    before = etcd.transactions
    written = etcd.get(KEYS.host("a"), deadline=soon())
    keep_up(node)
    assert etcd.get(KEYS.host("a"), deadline=soon()) == written
    assert etcd.transactions == before


def keep_up(node: Node) -> None:
    """Until its loop went round, from the beginning to the end."""
    looks: list[float] = []
    carried = node.presence._carried
    node.presence._carried = lambda deadline: (looks.append(deadline), carried(deadline))[1]
    until(lambda: len(looks) > 8, "some rounds")
    node.presence._carried = carried


def test_alarms_are_shown(etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the record of the host, where operators look, and counted by their kinds; bounded."""
    monkeypatch.setattr(host_module, "ALARMS_APART", 0.2)
    node = start()
    until(node.serves, "serving")
    for number in range(30):
        node.presence.alarm("kind", f"text {number}")
        node.presence.alarm("kind", f"text {number}")
    assert node.presence.alarm_counts() == {"kind": 30}
    until(lambda: shown(etcd)[-1:] == ("text 29",), "the last alarm is shown")
    assert len(shown(etcd)) == host_module.ALARMS


def shown(etcd: FakeEtcd) -> tuple[str, ...]:
    record = etcd.get(KEYS.host("a"), deadline=soon())
    return decode(record.value, Host).alarms if record else ()


def test_a_storm_of_alarms_is_no_storm_of_writes(
    etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P6: the first alarm is in the record at once, and those after it together, a while later, by themselves. What
    else changes is written at once.
    """
    monkeypatch.setattr(host_module, "ALARMS_APART", 3.0)
    monkeypatch.setattr(host_module, "REFRESH", 60.0)
    node = start()
    until(lambda: etcd.get(KEYS.host("a"), deadline=soon()), "the record")
    until(node.serves, "serving")
    began = time.monotonic()
    node.presence.alarm("kind", "the first")
    until(lambda: shown(etcd) == ("the first",), "the first alarm, at once", 2)
    before = etcd.transactions
    for number in range(300):
        node.presence.alarm("kind", f"text {number}")
    node.macs.add("52:54:00:00:00:02")
    node.presence.changed()
    until(lambda: etcd.transactions > before, "what else changed, at once", 2)
    record = etcd.get(KEYS.host("a"), deadline=soon())
    assert record is not None
    assert decode(record.value, Host).macs == ("52:54:00:00:00:02",)
    assert shown(etcd) == ("the first",)
    until(lambda: shown(etcd)[-1:] == ("text 299",), "the others")
    assert time.monotonic() - began > 2.5
    assert etcd.transactions == before + 2


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_alarm_that_comes_again(caplog: pytest.LogCaptureFixture) -> None:
    """The same text within ten minutes is the same alarm, however often; after that it is told and counted again, and
    is the newest of those that are shown, once.
    """
    clock = Clock()
    alarms = Alarms(clock)
    for _ in range(599):
        alarms.tell("kind", "again")
        clock.now += 1
    alarms.tell("kind", "another")
    assert alarms.counts() == {"kind": 2}
    assert alarms.shown() == ("again", "another")
    clock.now += 1
    alarms.tell("kind", "again")
    clock.now += 5
    assert alarms.counts() == {"kind": 3}
    assert alarms.shown() == ("another", "again")
    assert [record.getMessage() for record in caplog.records] == [
        "ALARM kind: again", "ALARM kind: another", "ALARM kind: again",
    ]  # fmt: skip


def test_alarms_without_end_are_bounded() -> None:
    """P6: of the texts that were told the last 1,000 are remembered, of those shown the last 20; all are counted."""
    alarms = Alarms(Clock())
    for number in range(5000):
        alarms.tell("kind", f"text {number}")
    for number in range(4000, 5000):
        alarms.tell("kind", f"text {number}")
    assert alarms.counts() == {"kind": 5000}
    alarms.tell("kind", "text 3999")
    assert alarms.counts() == {"kind": 5001}


def test_when_alarms_are_shown() -> None:
    """The first one at once, then those of five seconds together; who waits for that is told how long, and is not made
    to wait when there is something.
    """
    clock = Clock()
    alarms = Alarms(clock)
    assert alarms.tend() == math.inf
    assert alarms.tell("kind", "a")
    assert alarms.shown() == ("a",)
    clock.now += 2
    assert not alarms.tell("kind", "b")
    assert not alarms.tell("kind", "c")
    assert alarms.shown() == ("a",)
    assert alarms.tend() == 3
    clock.now += 3
    assert alarms.tend() == 0
    assert alarms.tend() == 5
    assert alarms.shown() == ("a", "b", "c")
    clock.now += 5
    assert alarms.tend() == math.inf
    assert alarms.tell("kind", "d")
    assert alarms.shown() == ("a", "b", "c", "d")


def test_a_storm_of_alarms_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """P6: of one kind 60 a minute are in the log, and then a line that says how many there were besides, also when the
    storm is over and no further alarm comes. Other kinds are not held up by it.
    """
    clock = Clock()
    alarms = Alarms(clock)

    def logged() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        caplog.clear()
        return lines

    for minute in range(2):
        for number in range(100):
            alarms.tell("storm", f"text {minute} {number}")
        alarms.tell("other", f"single {minute}")
        alarms.tend()
        lines = logged()
        assert lines[-1] == f"ALARM other: single {minute}"
        assert lines[-61:-1] == [f"ALARM storm: text {minute} {number}" for number in range(60)]
        assert lines[:-61] == ["ALARM storm: 40 more within a minute were counted and are not in this log"] * minute
        clock.now += 60
    assert alarms.counts() == {"storm": 200, "other": 2}
    for _ in range(3):
        alarms.tend()
        clock.now += 60
    assert logged() == ["ALARM storm: 40 more within a minute were counted and are not in this log"]


# --- at boot -------------------------------------------------------------------------------------------


def test_requests_of_a_boot_share_one_window() -> None:
    """docker-net-dhcp#44: dockerd asks for one container after the other. An etcd that never comes costs its start the
    window once, and the time limit for each further one.
    """
    wait = BootWait(15, 60, over=False)
    assert not wait.is_over(1000)  # it begins with the first request that waits
    assert wait.give_up(100) == 160
    assert wait.give_up(130) == 160
    assert wait.give_up(150) == 165
    assert wait.give_up(160) == 175
    assert not wait.is_over(159)
    assert wait.is_over(160)


def test_a_request_that_waited_at_boot_has_its_own_time_yet() -> None:
    """The wait for etcd is not taken from it; it waits no longer than boot_wait and its time limit in all."""
    wait = BootWait(15, 60, over=False)
    wait.give_up(100)
    wait.served()
    assert wait.answer_by(100, 140) == 155
    assert wait.answer_by(150, 160) == 175
    assert wait.answer_by(150, 161) == 165  # beyond the window it is counted from the arrival, as ever


@pytest.mark.parametrize("why", ["over", "served", "stopped"])
def test_without_a_boots_window_every_request_has_its_time_limit(why: str) -> None:
    """P6: a daemon that is restarted, one that serves before Docker asks, one that is to stop."""
    wait = BootWait(15, 60, over=why == "over")
    if why == "served":
        wait.served()
    if why == "stopped":
        wait.stop(99)
    assert wait.is_over(100) == (why != "stopped")  # the next daemon of this boot may wait yet
    assert wait.give_up(100) == 115
    assert wait.answer_by(100, 110) == 115


@given(
    st.integers(1, 60),
    st.integers(0, 90),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=20),
)
def test_no_request_of_a_boot_waits_without_end(limit: int, seconds: int, asked: list[tuple[int, int]]) -> None:
    """P6: however many, and whenever etcd comes: each has its whole time limit, and boot_wait beyond it at most."""
    wait = BootWait(limit, seconds, over=False)
    for arrival, waits in sorted(asked):
        last = wait.give_up(arrival)
        deadline = wait.answer_by(arrival, min(arrival + waits, last))
        assert arrival + limit <= last <= arrival + max(limit, seconds)
        assert arrival + limit <= deadline <= arrival + limit + seconds


def test_at_boot_a_request_waits_until_etcd_has_a_leader(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """calico#746: Docker never repeats a start that failed at boot. Beyond its time limit the request still waits, and
    then has that limit for itself.
    """
    etcd.set_down(True)
    node = start(request_limit=0.3, boot_wait=30.0)
    arrival = time.monotonic()
    answer: list[float] = []
    asking = threading.Thread(target=lambda: answer.append(node.presence.admit(arrival)))
    asking.start()
    until(lambda: "etcd is not there" in node.reason() and time.monotonic() > arrival + 0.6, "it waits")
    assert asking.is_alive()
    etcd.set_down(False)
    asking.join(20)
    [deadline] = answer
    assert arrival + 0.9 < deadline <= time.monotonic() + 0.3
    arrival = time.monotonic()
    assert node.presence.admit(arrival) == arrival + 0.3


@pytest.mark.parametrize("served", [True, False], ids=["it served", "its window was over"])
def test_the_wait_of_a_boot_comes_once(
    served: bool, etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is started again in the same boot, on the same disk, answers within the time limit; not so after
    the next boot.
    """
    etcd.set_down(not served)
    first = start(request_limit=0.1, boot_wait=0.3)
    if served:
        until(first.serves, "serving")
    else:
        began = time.monotonic()
        assert "etcd is not there" in refusal(NotServing, first.presence.admit, began)
        assert 0.3 <= time.monotonic() - began < 5
    until(lambda: first.state.read("boot"), "what is kept of this boot")
    first.stop()
    etcd.set_down(True)
    again = start(request_limit=0.1, boot_wait=600.0)
    began = time.monotonic()
    assert refusal(NotServing, again.presence.admit, began)
    assert 0.1 <= time.monotonic() - began < 5
    again.stop()
    process = host_module._this_process
    monkeypatch.setattr(
        host_module, "_this_process", lambda *who: msgspec.structs.replace(process(*who), boot_id="the next boot")
    )
    after = start(request_limit=0.1, boot_wait=0.6)
    began = time.monotonic()
    assert refusal(NotServing, after.presence.admit, began)
    assert 0.6 <= time.monotonic() - began < 5


def test_what_served_at_boot_has_no_wait_left(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """A host that served before Docker asked, and then lost its name, answers within the time limit."""
    node = start(request_limit=0.1, boot_wait=600.0)
    until(node.serves, "serving")
    put(etcd, KEYS.heartbeat("a"), encode(STRANGER))
    until(lambda: not node.serves(), "another has the name")
    began = time.monotonic()
    refused: list[str] = []
    asking = threading.Thread(
        target=lambda: refused.append(refusal(NotServing, node.presence.admit, began)), daemon=True
    )
    asking.start()
    asking.join(5)
    assert refused


def test_a_stop_ends_the_wait_of_a_boot(etcd: FakeEtcd, start: Callable[..., Node]) -> None:
    """An operator mends the configuration and restarts the daemon: nobody waits a minute for that, and each request
    has an answer.
    """
    etcd.set_down(True)
    node = start(request_limit=0.1, boot_wait=600.0)
    until(lambda: "etcd is not there" in node.reason(), "the reason")
    refused: list[str] = []
    arrival = time.monotonic()
    asking = threading.Thread(
        target=lambda: refused.append(refusal(NotServing, node.presence.admit, arrival)), daemon=True
    )
    asking.start()
    until(lambda: time.monotonic() > arrival + 0.3, "longer than the time limit")
    assert asking.is_alive()
    node.presence.stopping()
    asking.join(5)
    assert "etcd is not there" in refused[0]
    node.stop()
    assert node.state.read("boot") == ""  # the next daemon of this boot may let requests wait


def test_a_disk_that_cannot_keep_the_boot_costs_nobody_his_address(
    etcd: FakeEtcd, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is only a shorter wait that is lost."""
    write = StateDir.write

    def full(state: StateDir, name: str, text: str) -> None:
        if name == "boot":
            raise OSError(28, "No space left on device")
        write(state, name, text)

    monkeypatch.setattr(StateDir, "write", full)
    node = start(boot_wait=60.0)
    until(node.serves, "serving")
    until(lambda: "cannot be written: [Errno 28]" in caplog.text, "the warning")
    assert node.presence.admit(time.monotonic())
