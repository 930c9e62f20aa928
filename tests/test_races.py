"""Many hosts want the addresses of one pool at once, also while etcd fails: nobody gets what another one has (P1).

Real daemon processes and a real etcd; the requests are made as an engine makes them. What every client was told is
kept as a history, which history.violations judges together with what stands in etcd at the end. The same workload
with a store that checks and then writes has to be caught, or it proves nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import RealEtcd, missing
from daemons import DaemonProcess, NotSent, Reply, fleet
from etcd_server import ETCD, EtcdCluster, until
from fakes import FakeEtcd, Fault, Writes
from harness import KEYS, Lan
from history import Operation, Outcome, violations
from ipam_plugin.errors import OutcomeUnknown
from ipam_plugin.etcd import Commit, Etcd, Put
from ipam_plugin.model import read_lease

pytestmark = pytest.mark.etcd

HOSTS = 8
REQUESTS = 512
ADDRESSES = 500
MARGIN = 1.0  # seconds that an answer may come after the deadline, for a loaded machine and this test's own threads


def pool_of_500(network: int) -> tuple[str, dict[str, str]]:
    """A /23 has 510 usable addresses; ten are excluded."""
    subnet = ipaddress.IPv4Network((f"198.18.{2 * network}.0", 23))
    return str(subnet), {"exclude": f"{subnet[100]}-{subnet[109]}"}


# ---- the workload


@dataclass
class Recorder:
    """What every client was told."""

    operations: list[Operation] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    answered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def grant(self, daemon: DaemonProcess, pool: str, holder: str, address: str = "") -> str:
        """Ask for an address; '' when none was given. The holder is the MAC."""
        began = time.monotonic()
        try:
            reply = daemon.request_address(pool, holder, address)
        except NotSent:
            self._note(Operation("grant", holder, began, time.monotonic(), Outcome.REFUSED))
        except (OSError, http.client.HTTPException):
            self._note(Operation("grant", holder, began, time.monotonic(), Outcome.UNKNOWN))
        else:
            given = reply.body["Address"].partition("/")[0] if reply.ok else ""
            # A grant that is refused is refused: what may still appear of it is the daemon's to take back (P4).
            outcome = Outcome.OK if reply.ok else Outcome.REFUSED
            self._note(Operation("grant", holder, began, time.monotonic(), outcome, given), reply)
            return given
        return ""

    def release(self, daemon: DaemonProcess, pool: str, holder: str, address: str) -> bool:
        began = time.monotonic()
        outcome, reply = Outcome.UNKNOWN, None
        try:
            reply = daemon.release_address(pool, address)
        except NotSent:
            outcome = Outcome.REFUSED
        except (OSError, http.client.HTTPException):
            pass
        else:
            # "etcd did not confirm" may have happened; only what is acknowledged is certain.
            outcome = Outcome.OK if reply.ok else Outcome.UNKNOWN
        self._note(Operation("release", holder, began, time.monotonic(), outcome, address), reply)
        return outcome is Outcome.OK

    def _note(self, operation: Operation, reply: Reply | None = None) -> None:
        self.operations.append(operation)
        if reply is not None:
            self.replies.append(reply)
        self.answered.release()

    def wait_answered(self, count: int, seconds: float = 60.0) -> None:
        """Until so many more have been answered."""
        deadline = time.monotonic() + seconds
        for _ in range(count):
            assert self.answered.acquire(timeout=max(0.0, deadline - time.monotonic())), "no answers any more"

    @property
    def given(self) -> list[str]:
        return [each.address for each in self.operations if each.what == "grant" and each.outcome is Outcome.OK]

    @property
    def errors(self) -> list[str]:
        return [each.error for each in self.replies if not each.ok]

    @property
    def longest(self) -> float:
        return max(each.ended - each.began for each in self.operations)


_numbers = itertools.count(1)


def new_mac() -> str:
    """A MAC that no other container of this run has: the holder's name in the history and in etcd."""
    digits = f"{next(_numbers):012x}"
    return ":".join(("02", *(digits[at : at + 2] for at in range(2, 12, 2))))


def ask_all(
    askers: Sequence[tuple[DaemonProcess, str]],
    requests: int,
    during: Callable[[Recorder], None] = lambda recorder: None,
    addresses: Sequence[str] = ("",),
) -> tuple[Recorder, float]:
    """So many requests at the same moment, dealt out to the (daemon, PoolID)s in turn. Also: seconds until the last."""
    recorder = Recorder()
    start = threading.Barrier(requests + 1)
    names = [new_mac() for _ in range(requests)]

    def one(number: int) -> None:
        daemon, pool = askers[number % len(askers)]
        start.wait(60)
        recorder.grant(daemon, pool, names[number], addresses[number // len(askers) % len(addresses)])

    with ThreadPoolExecutor(requests) as threads:
        futures = [threads.submit(one, number) for number in range(requests)]
        start.wait(60)
        began = time.monotonic()
        during(recorder)
        for future in futures:
            future.result(timeout=60)
    return recorder, max(each.ended for each in recorder.operations) - began


def fill(
    daemons: Sequence[DaemonProcess],
    network: int,
    during: Callable[[Recorder], None] = lambda recorder: None,
    requests: int = REQUESTS,
) -> tuple[Recorder, float]:
    """512 requests, or as many as are said, for a pool of exactly 500, from all hosts."""
    subnet, options = pool_of_500(network)
    pools = [daemon.pool(subnet, **options) for daemon in daemons]
    assert len(set(pools)) == 1
    return ask_all([(daemon, pools[0]) for daemon in daemons], requests, during)


def holders(client: Etcd, prefix: str, subnet: str = "0.0.0.0/0") -> dict[str, str]:
    """The containers' leases that lie in the subnet: address -> MAC."""
    found, _ = client.list(f"{prefix}leases/", deadline=time.monotonic() + 20)
    leases = {each.key.rpartition("/")[2]: read_lease(each.value) for each in found}
    inside = ipaddress.ip_network(subnet)
    return {
        address: lease.mac
        for address, lease in leases.items()
        if lease.kind == "endpoint" and ipaddress.ip_address(address) in inside
    }


def judge(
    recorder: Recorder, client: Etcd, prefix: str, subnet: str, *, healing: float = 20.0, steady: float = 0.0
) -> list[str]:
    """The violations that remain when what etcd holds has come to rest.

    Leases of refused requests are taken back within `healing` seconds. `steady`: etcd has to agree for so long
    without a break, where a write that waits in a member may come late.
    """
    end = time.monotonic() + healing
    good_since = None
    while True:
        found = violations(recorder.operations, holders(client, prefix, subnet))
        now = time.monotonic()
        good_since = (good_since or now) if not found else None
        if (good_since is not None and now - good_since >= steady) or (found and now > end):
            return found
        time.sleep(0.1)


class Numbers:
    """What a run cost, for `pytest -rP` and for JUnit files. Made before the run, since daemons count on."""

    def __init__(self, daemons: Sequence[DaemonProcess], record_property: Callable[[str, object], None]) -> None:
        self._daemons = daemons
        self._record = record_property
        self._before = self._count()

    def _count(self) -> dict[str, float]:
        transactions = "ipam_plugin_etcd_transactions_total"
        return {
            "grant transactions": sum(each.metric(f'{transactions}{{purpose="grant"}}') for each in self._daemons),
            "all transactions": sum(each.metric(transactions) for each in self._daemons),
            "lost races": sum(each.metric("ipam_plugin_lost_races_total") for each in self._daemons),
            "leases taken back": sum(each.text().count("appeared and was taken back") for each in self._daemons),
        }

    def tell(self, name: str, recorder: Recorder, seconds: float) -> None:
        numbers = {what: number - self._before[what] for what, number in self._count().items()}
        for what in ("grant transactions", "all transactions"):
            numbers[f"{what} per address"] = round(numbers.pop(what) / max(1, len(recorder.given)), 2)
        numbers |= {"given": len(recorder.given), "seconds": round(seconds, 2), "longest": round(recorder.longest, 2)}
        print(f"{name}: {numbers}")
        for what, number in numbers.items():
            self._record(what, number)


# ---- one etcd


@pytest.fixture
def eight(etcd: RealEtcd, tmp_path: Path) -> Iterator[list[DaemonProcess]]:
    """Eight hosts on the shared etcd."""
    with fleet(tmp_path, etcd.settings.endpoints, HOSTS, prefix=etcd.prefix, metrics=True) as daemons:
        yield daemons


def test_a_pool_of_500_serves_500_of_512_requests_from_eight_hosts(
    eight: list[DaemonProcess], etcd: RealEtcd, record_property: Callable[[str, object], None]
) -> None:
    """P1: exactly as many different addresses as there are, and the others are told that it is full, with counts."""
    subnet, _ = pool_of_500(0)
    numbers = Numbers(eight, record_property)
    recorder, seconds = fill(eight, 0)
    numbers.tell("one etcd", recorder, seconds)
    assert len(recorder.operations) == REQUESTS
    assert len(recorder.given) == len(set(recorder.given)) == ADDRESSES
    assert judge(recorder, etcd.client, etcd.prefix, subnet) == []
    assert len(recorder.errors) == REQUESTS - ADDRESSES
    for sentence in recorder.errors:
        assert "is full: 510 addresses: 500 endpoint, 10 excluded" in sentence
    assert recorder.longest < eight[0].deadline + MARGIN

    # Every request that finds the pool full has to know that its view has missed nothing; all at once, they still do,
    # and not by one write each.
    pools = [(daemon, daemon.pool(subnet, **pool_of_500(0)[1])) for daemon in eight]
    before = barriers(eight)
    late, seconds = ask_all(pools, 256)
    print(f"256 requests at once for the full pool: {seconds:.2f} s, {barriers(eight) - before:.0f} barriers")
    assert barriers(eight) - before < 256 / 2
    assert late.given == []
    assert all("is full" in sentence for sentence in late.errors)
    assert late.longest < eight[0].deadline + MARGIN


def barriers(daemons: Sequence[DaemonProcess]) -> float:
    return sum(each.metric('ipam_plugin_etcd_transactions_total{purpose="barrier"}') for each in daemons)


#: A daemon whose store reads and compares, and then writes. Nothing makes its race easier to lose.
CHECKS_THEN_WRITES = (
    sys.executable,
    "-c",
    "import fakes, ipam_plugin.daemon, ipam_plugin.cli\n"
    "ipam_plugin.daemon.Etcd = fakes.CheckThenWriteEtcd\n"
    "ipam_plugin.cli.main()",
)


def test_a_store_that_checks_and_then_writes_is_caught(etcd: RealEtcd, tmp_path: Path) -> None:
    """The very same workload and checker fail when the guard is a check followed by a write: so they can fail."""
    subnet, _ = pool_of_500(0)
    with fleet(tmp_path, etcd.settings.endpoints, HOSTS, prefix=etcd.prefix, command=CHECKS_THEN_WRITES) as daemons:
        recorder, _ = fill(daemons, 0)
        found = judge(recorder, etcd.client, etcd.prefix, subnet, healing=1.0)
    print(f"{len(found)} violations, such as: {found[:2]}")
    assert any("had two holders" in sentence for sentence in found)
    assert len(set(recorder.given)) < len(recorder.given)


def test_overlapping_pools_of_one_segment_never_give_one_address_twice(etcd: RealEtcd, tmp_path: Path) -> None:
    """The lease key has no subnet in it: a /16 on one host and a /24 inside it on another share their addresses."""
    with fleet(tmp_path, etcd.settings.endpoints, 2, prefix=etcd.prefix) as (wide, narrow):
        # The /16 is narrowed to the same 128 addresses, so that the two meet all the time.
        pools = [(wide, wide.pool("198.18.0.0/16", "198.18.7.0/25")), (narrow, narrow.pool("198.18.7.0/25"))]
        recorder, _ = ask_all(pools, 280)
        assert judge(recorder, etcd.client, etcd.prefix, "198.18.7.0/25") == []
        everything = {str(address) for address in ipaddress.ip_network("198.18.7.0/25")}
        assert len(recorder.given) == len(everything)
        assert set(recorder.given) == everything  # in the /16 also .0 and .127 are a machine's
        assert all("is full" in sentence for sentence in recorder.errors)

        # And by --ip: both ask for the same addresses at the same time.
        pools = [(wide, wide.pool("198.18.0.0/16")), (narrow, narrow.pool("198.18.9.0/24"))]
        wanted = [f"198.18.9.{number}" for number in range(1, 61)]
        recorder, _ = ask_all(pools, 2 * len(wanted), addresses=wanted)
        assert judge(recorder, etcd.client, etcd.prefix, "198.18.9.0/24") == []
        assert sorted(recorder.given) == sorted(wanted)
        assert len(recorder.errors) == len(wanted)
        for sentence in recorder.errors:
            assert "is taken: a container on host h" in sentence


# ---- three members, one of which fails


@pytest.fixture(scope="module")
def three() -> Iterator[EtcdCluster]:
    if ETCD is None:
        missing("etcd", "there is no etcd binary")
    with EtcdCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three_client(three: EtcdCluster) -> Iterator[Etcd]:
    client = Etcd(three.settings())
    yield client
    client.close()


@pytest.fixture(scope="module")
def eight_on_three(three: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DaemonProcess]]:
    """Eight hosts, each of which names another member first, so that some of them talk to the leader."""
    with fleet(tmp_path_factory.mktemp("races"), three.endpoints, HOSTS, prefix="/races/", metrics=True) as daemons:
        yield daemons


def test_killing_the_leader_costs_no_address_and_gives_none_twice(
    three: EtcdCluster,
    three_client: Etcd,
    eight_on_three: list[DaemonProcess],
    record_property: Callable[[str, object], None],
) -> None:
    """P1, P4, P6: kill -9 of etcd's leader in the middle of 512 requests. Each is answered in its deadline."""
    numbers = Numbers(eight_on_three, record_property)
    leader = three.leader()

    def kill_the_leader(recorder: Recorder) -> None:
        recorder.wait_answered(50)
        leader.kill()

    recorder, seconds = fill(eight_on_three, 1, kill_the_leader)
    try:
        assert_all_kept(recorder, three_client, pool_of_500(1)[0])
    finally:
        leader.start()
        three.wait_ready()
    numbers.tell("leader killed", recorder, seconds)
    assert_all_kept(recorder, three_client, pool_of_500(1)[0])


def test_a_leader_that_is_paused_and_woken_changes_nothing_that_was_said(
    three: EtcdCluster,
    three_client: Etcd,
    eight_on_three: list[DaemonProcess],
    record_property: Callable[[str, object], None],
) -> None:
    """P4: what waits in a paused leader may be written when it wakes; then it is taken back, and nothing is lost."""
    three.wait_ready()
    numbers = Numbers(eight_on_three, record_property)
    leader = three.leader()

    def pause_the_leader(recorder: Recorder) -> None:
        recorder.wait_answered(50)
        leader.pause()
        time.sleep(15)  # how long it is paused is what the test is about
        leader.resume()

    try:
        recorder, seconds = fill(eight_on_three, 2, pause_the_leader)
    finally:
        leader.resume()
    three.wait_ready()
    numbers.tell("leader paused", recorder, seconds)
    assert_all_kept(recorder, three_client, pool_of_500(2)[0], steady=2.0)


def assert_all_kept(recorder: Recorder, client: Etcd, subnet: str, steady: float = 0.0) -> None:
    """No duplicate, nothing lost or left over, and every one of 512 requests answered in time."""
    assert len(recorder.replies) == REQUESTS
    assert recorder.longest < 15 + MARGIN
    assert judge(recorder, client, "/races/", subnet, steady=steady) == []
    assert len(set(recorder.given)) == len(recorder.given)
    for sentence in recorder.errors:
        assert "is full" in sentence or "etcd did not" in sentence
    # An outage of two seconds is no reason to refuse: the deadline is 15.
    assert len(recorder.given) == ADDRESSES


# ---- refused requests, whose leases may be written after all


def test_leases_of_requests_that_were_refused_during_an_outage_are_taken_back(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """P4: etcd hangs for longer than the deadline. What it writes when it wakes belongs to nobody, and goes again."""
    subnet, _ = pool_of_500(0)
    requests = 256
    with (
        EtcdCluster() as cluster,
        fleet(
            tmp_path, cluster.endpoints, 4, prefix="/outage/", metrics=True, deadline="3s", etcd={"timeout": "1s"}
        ) as daemons,
    ):
        client = Etcd(cluster.settings())
        numbers = Numbers(daemons, record_property)
        (member,) = cluster.members

        def hang(recorder: Recorder) -> None:
            recorder.wait_answered(50)
            member.pause()
            recorder.wait_answered(requests - 50)
            member.resume()

        try:
            recorder, seconds = fill(daemons, 0, hang, requests)
            cluster.wait_ready()
            assert len(recorder.replies) == requests
            assert recorder.longest < 3 + MARGIN
            assert judge(recorder, client, "/outage/", subnet, steady=2.0) == []
            numbers.tell("etcd hangs", recorder, seconds)
            assert len(recorder.given) < requests
            assert all("etcd did not" in sentence for sentence in recorder.errors)

            # Nothing is lost either: the addresses that were in doubt are given to the next who ask.
            pool = daemons[0].pool(subnet, **pool_of_500(0)[1])
            given = recorder.given
            while len(given) < ADDRESSES:
                more, _ = ask_all([(daemon, pool) for daemon in daemons], min(100, ADDRESSES - len(given)))
                assert more.errors == []
                given += more.given
            assert len(set(given)) == ADDRESSES
        finally:
            member.resume()
            client.close()


class InDoubt(FakeEtcd):
    """Where the first grant gets no answer and waits somewhere; sent again, it finds that another host was faster."""

    taken = ""

    def commit(self, expect: Mapping[str, int], writes: Writes, *, deadline: float, proof: str | None = None) -> Commit:
        if self.taken or proof is None or not proof.startswith(KEYS.leases):
            return super().commit(expect, writes, deadline=deadline, proof=proof)
        self.taken = proof
        self.faults.append(Fault.STUCK)
        with contextlib.suppress(OutcomeUnknown):
            super().commit(expect, writes, deadline=deadline, proof=proof)
        super().commit({}, [Put(proof, b'{"kind": "endpoint", "host": "b", "token": "b"}')], deadline=deadline)
        return super().commit(expect, writes, deadline=deadline, proof=proof)._replace(uncertain=True)


def test_a_try_in_doubt_is_taken_back_also_when_the_request_got_another_address() -> None:
    """P4: the address became another host's, the request went on, and the first try is written after that one left."""
    with Lan(InDoubt()) as lan:
        host = lan.host("a")
        host.free_orphans()
        given = host.run(host.create())
        doubtful = lan.etcd.taken.rpartition("/")[2]
        assert given != doubtful
        lan.delete(lan.etcd.taken)
        assert lan.etcd.release_stuck() == 1
        until(lambda: doubtful not in lan.leases(), "what was written late is taken back")
        assert list(lan.leases()) == [given]


# ---- a daemon that dies, among hosts that give and take


def test_a_daemon_killed_among_hosts_that_give_and_take(etcd: RealEtcd, tmp_path: Path) -> None:
    """P1, P3: kill -9 and restart of one of three daemons, while all ask and release. Only the unknown is unknown."""
    subnet = "198.18.40.0/26"  # 62 addresses, of which 24 clients take and give back all the time
    with fleet(tmp_path, etcd.settings.endpoints, 3, prefix=etcd.prefix, cooldown="0s") as daemons:
        pools = [daemon.pool(subnet) for daemon in daemons]
        recorder = Recorder()
        stop = threading.Event()
        up = {daemon.host: threading.Event() for daemon in daemons}

        def client(daemon: DaemonProcess, pool: str) -> None:
            while not stop.is_set():
                holder = new_mac()
                if address := recorder.grant(daemon, pool, holder):
                    recorder.release(daemon, pool, holder, address)
                elif not stop.is_set():
                    up[daemon.host].wait(60)
            # Some stay, or there would be nothing at the end to compare.
            recorder.grant(daemon, pool, new_mac())

        with ThreadPoolExecutor(24) as threads:
            for event in up.values():
                event.set()
            futures = [threads.submit(client, daemons[number % 3], pools[number % 3]) for number in range(24)]
            try:
                recorder.wait_answered(200)
                for victim in daemons[:2]:
                    up[victim.host].clear()
                    victim.kill()
                    recorder.wait_answered(200)
                    victim.start()
                    victim.wait_answering()
                    up[victim.host].set()
                    recorder.wait_answered(200)
            finally:
                stop.set()
                for event in up.values():
                    event.set()
            for future in futures:
                future.result(timeout=60)
        assert judge(recorder, etcd.client, etcd.prefix, subnet) == []
        print(len(recorder.operations), "operations,", len(recorder.given), "grants of", len(set(recorder.given)))
        assert any(each.outcome is Outcome.UNKNOWN for each in recorder.operations), "the kill hit nothing"
        assert len(set(recorder.given)) < len(recorder.given), "no address ever changed hands"
