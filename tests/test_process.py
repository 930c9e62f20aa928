"""The daemon as a process: its socket, its lock, its name, starting and ending, and all of it without etcd.

Real processes and a real etcd. What a request gets is tested elsewhere; here is who answers, when, and what is left.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import RealEtcd
from daemons import COMMAND, DaemonProcess, NotSent, Reply, ask, run
from etcd_server import EtcdCluster, until
from ipam_plugin.etcd import Etcd, Put
from test_races import ask_all, holders, judge

pytestmark = pytest.mark.etcd

SUBNET = "198.18.0.0/24"
BODYLESS = ("Plugin.Activate", "IpamDriver.GetCapabilities", "IpamDriver.GetDefaultAddressSpaces")
MARGIN = 1.0  # seconds that an answer may come after the deadline, on a loaded machine

Make = Callable[..., DaemonProcess]


@pytest.fixture
def make(tmp_path: Path, etcd: RealEtcd) -> Iterator[Make]:
    """Daemons of this test on the shared etcd; killed at the end."""
    made: list[DaemonProcess] = []

    def one(name: str = "a", host: str | None = None, endpoints: tuple[str, ...] = (), **config: Any) -> DaemonProcess:
        daemon = DaemonProcess(
            tmp_path / name, endpoints or etcd.settings.endpoints, host=host or name, prefix=etcd.prefix, **config
        )
        made.append(daemon)
        return daemon

    try:
        yield one
    finally:
        for daemon in made:
            daemon.kill()


def started(daemon: DaemonProcess) -> DaemonProcess:
    daemon.start()
    daemon.wait_answering()
    return daemon


def refusal(daemon: DaemonProcess) -> str:
    """The one line that a daemon which cannot run says, with exit status 2."""
    assert daemon.wait() == 2
    assert "Traceback" not in daemon.text()
    return daemon.text().strip().splitlines()[-1]


def ask_at_once(daemon: DaemonProcess, pool: str, count: int, during: Callable[[], None]) -> list[Reply]:
    """So many requests for an address at the same moment; `during` runs when all of them have been taken in."""
    with ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(daemon.request_address, pool, f"02:00:00:00:01:{n:02x}") for n in range(count)]
        until(lambda: daemon.metric("ipam_plugin_waiting_requests") >= count, "all requests are being carried out")
        during()
        return [each.result(timeout=60) for each in asked]


# ---- the socket


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_only_root_may_connect_whatever_the_umask(make: Make, umask: int) -> None:
    """Whoever may connect can take and free addresses: the socket has mode 0600, and the state is as private."""
    daemon = make()
    daemon.state.mkdir(mode=0o700)  # a umask of 0777 would make one that even the test's own user could not enter
    before = os.umask(umask)
    try:
        daemon.log.touch()
        daemon.log.chmod(0o600)
        daemon.start()
    finally:
        os.umask(before)
    daemon.wait_answering()
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(daemon.state.stat().st_mode) == 0o700


def test_a_socket_that_nobody_listens_on_is_replaced(make: Make) -> None:
    """After a power cut the socket file is still there, and must not need a person."""
    daemon = make()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(daemon.socket))
        left.listen()
    assert daemon.socket.exists()
    assert started(daemon).pool(SUBNET)


def test_a_socket_in_use_is_left_alone(make: Make) -> None:
    """A second daemon must not take the first one's socket away: exit status 2, and the first goes on."""
    first = started(make("a"))
    second = make("b", socket=str(first.socket))
    second.start()
    assert f"socket: {first.socket} is in use by another process" in refusal(second)
    assert first.pool(SUBNET)


def test_a_file_that_is_no_socket_is_not_removed(make: Make) -> None:
    """Whatever the operator's mistake is, the file stays."""
    daemon = make()
    daemon.socket.write_text("important")
    daemon.start()
    assert f"socket: {daemon.socket}" in refusal(daemon)
    assert daemon.socket.read_text() == "important"


# ---- the state directory and the host's name


def test_a_state_dir_belongs_to_one_daemon(make: Make, tmp_path: Path) -> None:
    """Two daemons with one state would be one host twice: the second says so and ends with status 2."""
    first = started(make("a"))
    second = make("b", state_dir=str(first.state))
    second.start()
    assert f"state_dir: {first.state} is in use by another ipam-plugin" in refusal(second)
    assert first.pool(SUBNET)


def test_a_second_daemon_of_the_same_name_refuses_to_serve(make: Make) -> None:
    """A cloned machine must not act under the first one's name: its requests get the reason and the cure (P7)."""
    first = started(make("a", host="same"))
    pool = first.pool(SUBNET)
    second = started(make("b", host="same", deadline="3s"))
    with ThreadPoolExecutor(3) as threads:
        asked = [
            threads.submit(second.request_pool, SUBNET),
            threads.submit(second.request_address, pool),
            threads.submit(second.release_address, pool, "198.18.0.9"),
        ]
    for refused in (each.result() for each in asked):
        assert refused.status == 503
        assert refused.seconds < second.deadline + MARGIN
        assert "a daemon under the name same was alive" in refused.error
        assert "set `host` in this machine's configuration" in refused.error
    assert all(second.call(method).ok for method in BODYLESS)
    assert first.request_address(pool).ok
    # When the first has gone in order, its name is free at once.
    first.terminate()
    assert first.wait() == 0
    assert until(lambda: second.request_address(pool).ok, "the second daemon may have the name")


def test_after_kill_9_the_next_daemon_serves_at_once(make: Make, etcd: RealEtcd) -> None:
    """P5, P8: its predecessor's heartbeat lives on for 30 s in etcd, and the state_dir proves that nobody is there."""
    daemon = started(make())
    pool = daemon.pool(SUBNET)
    kept = daemon.request_address(pool, "02:00:00:00:00:aa").body["Address"].partition("/")[0]
    daemon.kill()
    assert daemon.socket.exists()
    assert etcd.client.get(f"{etcd.prefix}alive/a", deadline=time.monotonic() + 5)

    began = time.monotonic()
    daemon.start()
    daemon.wait_answering()
    answering = time.monotonic() - began
    reply = daemon.request_address(pool, "02:00:00:00:00:bb")
    took = time.monotonic() - began
    print(f"after kill -9: answers after {answering:.2f} s, gives an address after {took:.2f} s")
    assert reply.ok
    assert took < 10  # most of it is Python's start; a wait for the heartbeat would be 30
    assert holders(etcd.client, etcd.prefix)[kept] == "02:00:00:00:00:aa"
    # What the one before gave can be given back to this one.
    assert daemon.release_address(pool, kept).ok
    assert kept not in holders(etcd.client, etcd.prefix)


# ---- without etcd


def test_a_start_without_etcd(make: Make, own_etcd: EtcdCluster) -> None:
    """P6: what needs no etcd is answered at once, the rest within the deadline, and later nobody has to restart it."""
    (member,) = own_etcd.members
    member.kill()
    daemon = started(make(endpoints=own_etcd.endpoints, deadline="3s", etcd={"timeout": "1s"}))
    for method in BODYLESS:
        reply = daemon.call(method)
        assert reply.ok
        assert reply.seconds < 1
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(daemon.request_pool, SUBNET),
            threads.submit(daemon.request_address, f"default/{SUBNET}"),
        ]
    for reply in (each.result() for each in asked):
        assert reply.status == 503
        assert 1 < reply.seconds < daemon.deadline + MARGIN
        assert "etcd" in reply.error
    member.start()
    own_etcd.wait_ready()
    assert daemon.request_address(daemon.pool(SUBNET)).ok
    assert daemon.processes()


def test_at_boot_a_request_waits_for_etcd_beyond_its_deadline(make: Make, own_etcd: EtcdCluster) -> None:
    """calico#746: Docker never repeats a start that failed at boot. A stop answers it at once."""
    (member,) = own_etcd.members
    member.kill()
    waits = {"endpoints": own_etcd.endpoints, "deadline": "2s", "boot_wait": "60s", "etcd": {"timeout": "1s"}}
    daemon = started(make(**waits))
    with ThreadPoolExecutor(1) as threads:
        for stopped in (True, False):
            began = time.monotonic()
            asked = threads.submit(daemon.request_pool, SUBNET)
            until(lambda began=began: time.monotonic() > began + 2 * daemon.deadline, "twice its deadline")  # type: ignore[misc]
            assert not asked.done()
            if stopped:
                daemon.terminate()
                reply = asked.result()
                assert (reply.status, "etcd" in reply.error) == (503, True)
                assert reply.seconds < 3 * daemon.deadline
                assert daemon.wait() == 0
                daemon.start()
                daemon.wait_answering()
            else:
                member.start()
                assert asked.result().ok


def test_a_hundred_requests_while_etcd_is_paused(make: Make, own_etcd: EtcdCluster) -> None:
    """P6: every one is answered within its deadline, and meanwhile the calls that need no etcd at once."""
    (member,) = own_etcd.members
    daemon = started(make(endpoints=own_etcd.endpoints, deadline="4s", etcd={"timeout": "1s"}, metrics=True))
    pool = daemon.pool(SUBNET)
    member.pause()
    quick: list[Reply] = []

    def ask_what_needs_no_etcd() -> None:
        with ThreadPoolExecutor(12) as threads:
            quick.extend(threads.map(daemon.call, BODYLESS * 4))

    replies = ask_at_once(daemon, pool, 100, ask_what_needs_no_etcd)
    assert all(reply.ok for reply in quick)
    longest = max(reply.seconds for reply in replies)
    print(f"longest body-less call {max(r.seconds for r in quick):.2f} s, longest request {longest:.2f} s")
    assert max(reply.seconds for reply in quick) < 1
    assert longest < daemon.deadline + MARGIN
    assert {reply.status for reply in replies} == {503}
    assert all("etcd did not" in reply.error for reply in replies)

    # What etcd writes of it when it wakes is nobody's, and goes again.
    member.resume()
    own_etcd.wait_ready()
    recorder, _ = ask_all([(daemon, pool)], 20)
    assert len(recorder.given) == 20
    with contextlib.closing(Etcd(own_etcd.settings())) as client:
        assert judge(recorder, client, daemon.config["prefix"], SUBNET) == []


def test_more_requests_than_may_wait_are_refused_at_once(make: Make, own_etcd: EtcdCluster) -> None:
    """P6: beyond the number that may wait, the next is refused at once, and the body-less calls are still answered."""
    (member,) = own_etcd.members
    daemon = started(make(endpoints=own_etcd.endpoints, deadline="6s", etcd={"timeout": "1s"}, metrics=True))
    pool = daemon.pool(SUBNET)
    member.pause()
    beyond: list[Reply] = []

    def ask_more() -> None:
        with ThreadPoolExecutor(20) as threads:
            beyond.extend(threads.map(lambda _: daemon.request_address(pool), range(20)))
            assert all(each.seconds < 1 for each in threads.map(daemon.call, BODYLESS * 4))

    replies = ask_at_once(daemon, pool, 256, ask_more)
    assert all("256 requests are waiting" in reply.error and reply.seconds < 1 for reply in beyond)
    assert max(reply.seconds for reply in replies) < daemon.deadline + MARGIN
    assert all("etcd did not" in reply.error for reply in replies)


# ---- ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_answers_what_is_in_flight_and_leaves_nothing(
    make: Make, own_etcd: EtcdCluster, number: signal.Signals
) -> None:
    """P8: an upgrade in the middle of `docker run` does not fail it. No process, socket or heartbeat stays."""
    (member,) = own_etcd.members
    daemon = started(make(endpoints=own_etcd.endpoints, metrics=True))
    pool = daemon.pool(SUBNET)
    member.pause()

    def stop() -> None:
        os.kill(daemon.pid, number)
        until(lambda: not daemon.socket.exists(), "nobody can connect any more")
        with pytest.raises(NotSent):
            daemon.call("Plugin.Activate")
        member.resume()

    if number == signal.SIGINT:
        # Ctrl-C is a person's: it need not wait, but it leaves nothing either.
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            ask_at_once(daemon, pool, 1, stop)
    else:
        assert [reply.status for reply in ask_at_once(daemon, pool, 8, stop)] == [200] * 8
    assert daemon.wait() == 0
    assert not daemon.socket.exists()
    assert "Traceback" not in daemon.text()
    if number == signal.SIGTERM:
        assert own_etcd.etcdctl("get", "--prefix", "--keys-only", f"{daemon.config['prefix']}alive/").split() == []


def test_a_stop_does_not_wait_for_silent_connections(make: Make) -> None:
    """P8: an HTTP client may keep a connection on which it never asked anything; a restart must not wait for it."""
    daemon = started(make())
    silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    try:
        for each in silent:
            each.connect(str(daemon.socket))
        assert daemon.call("Plugin.Activate").ok
        began = time.monotonic()
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.wait() == 0
        # A thread waits five seconds for the first byte of a connection that is new.
        assert time.monotonic() - began < 10
    finally:
        for each in silent:
            each.close()


def test_a_worker_that_is_killed_is_replaced(make: Make) -> None:
    """Whatever ends the serving process (out of memory, a crash in a library), the next one has the name at once."""
    daemon = started(make())
    pool = daemon.pool(SUBNET)
    (worker,) = set(daemon.processes()) - {daemon.pid}
    os.kill(worker, signal.SIGKILL)

    def served() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return daemon.request_address(pool).ok
        return False

    began = time.monotonic()
    until(served, "an address from the next worker")
    print(f"after the worker's death: an address after {time.monotonic() - began:.2f} s")
    assert daemon.pid in daemon.processes()
    assert worker not in daemon.processes()


#: A mistake that nobody thought of, once.
STUMBLES = (
    sys.executable,
    "-c",
    "import ipam_plugin.cli, ipam_plugin.host\n"
    "presence = ipam_plugin.host.Presence\n"
    "right = presence._write_record\n"
    "def wrong(self, deadline):\n"
    "    presence._write_record = right\n"
    "    raise RuntimeError('a mistake')\n"
    "presence._write_record = wrong\n"
    "ipam_plugin.cli.main()",
)


def test_a_mistake_in_a_thread_does_not_end_the_heartbeat(make: Make, etcd: RealEtcd) -> None:
    """A daemon that answers Docker while its heartbeat has ended for ever would look dead to all other hosts."""
    daemon = make()
    daemon.start(STUMBLES)
    daemon.wait_answering()
    assert daemon.request_address(daemon.pool(SUBNET)).ok
    assert "RuntimeError: a mistake" in daemon.text()
    assert etcd.client.get(f"{etcd.prefix}hosts/a", deadline=time.monotonic() + 5)


def test_a_worker_without_its_master_goes_away(make: Make) -> None:
    """kill -9 of the master alone must not leave one that holds the lock and the name: the next daemon can start."""
    daemon = started(make())
    pool = daemon.pool(SUBNET)
    master = daemon.pid
    (worker,) = set(daemon.processes()) - {master}
    os.kill(master, signal.SIGKILL)
    next_one = make("next", host=daemon.host, state_dir=str(daemon.state), socket=str(daemon.socket))
    next_one.start()  # at once, as systemd would
    until(lambda: worker not in daemon.processes(), "the worker goes away by itself")
    until(lambda: ask_or_nothing(daemon.socket), "the next daemon answers", 30)
    assert ask(daemon.socket, "IpamDriver.RequestAddress", {"PoolID": pool, "Address": "", "Options": mac()}).ok


def mac() -> dict[str, str]:
    return {"com.docker.network.endpoint.macaddress": "02:00:00:00:00:01"}


def ask_or_nothing(path: Path) -> bool:
    with contextlib.suppress(NotSent, OSError, http.client.HTTPException):
        return ask(path, "Plugin.Activate").ok
    return False


# ---- the configuration

GOOD: dict[str, Any] = {"etcd": {"endpoints": ["http://127.0.0.1:2379"]}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no endpoints": ({}, "etcd.endpoints: expected a list of at least one URL"),
    "unknown key": ({**GOOD, "probee": "off"}, "probee: there is no such key; did you mean probe?"),
    "unknown inner key": ({**GOOD, "log": {"levle": "info"}}, "log.levle: there is no such key"),
    "type": ({**GOOD, "standby": "two"}, "standby: expected a whole number from 0 to 64"),
    "impossible value": ({**GOOD, "deadline": "0s"}, "deadline: expected a duration from 1s to 60s"),
    "choice": ({**GOOD, "probe": "sometimes"}, "probe: expected one of full, fast, off"),
    "endpoint": ({"etcd": {"endpoints": ["ftp://x"]}}, "etcd.endpoints[0]: expected http://HOST:PORT or https://"),
    "range": ({**GOOD, "segments": {"a": {"exclude": ["10.0.0.1/24"]}}}, "segments.a.exclude[0]: expected an address"),
    "host": ({**GOOD, "host": "a b"}, "host: expected a name of up to 63"),
    "socket": ({**GOOD, "socket": "/" + "x" * 107}, "socket: expected the absolute path of a Unix socket"),
    "certificate": (
        {"etcd": {"endpoints": ["https://x:1"], "ca_cert": "/no/such"}},
        "etcd.ca_cert: expected a file that can be read, found /no/such",
    ),
    "timeout": ({"etcd": {**GOOD["etcd"], "timeout": "20s"}}, "etcd.timeout: expected less than deadline (15 s)"),
    "metrics": ({**GOOD, "metrics": {"listen": "everywhere"}}, "metrics.listen: expected ADDRESS:PORT"),
}


def test_every_wrong_configuration_is_named_with_exit_status_2(tmp_path: Path) -> None:
    """`check-config` and `serve` say the path of the key and what was expected, and start nothing."""
    files = {}
    for name, (config, expected) in WRONG.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(config))
        files[file] = expected
    not_yaml = tmp_path / "not yaml.yaml"
    not_yaml.write_text("etcd: [")
    files[not_yaml] = "line 1, column"
    files[tmp_path / "absent.yaml"] = "there is no such file"

    with ThreadPoolExecutor(2) as threads:
        for command in ("check-config", "serve"):
            for (file, expected), done in zip(
                files.items(), threads.map(lambda file, said=command: run(said, config=file), files), strict=True
            ):
                assert done.returncode == 2, (command, file, done)
                assert expected in done.stderr, (command, file)
                assert str(file) in done.stderr
                assert "Traceback" not in done.stderr
                assert done.stdout == ""


def test_a_good_configuration_is_called_good(tmp_path: Path) -> None:
    """Exit status 0, so that a script may ask before it restarts the daemon."""
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(GOOD))
    done = run("check-config", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert "is good" in done.stdout


def test_a_state_dir_that_cannot_be_made_is_named(make: Make, tmp_path: Path) -> None:
    """Exit status 2 and the key, before anything has started."""
    daemon = make(state_dir="/proc/no/such")
    daemon.start()
    assert "state_dir: /proc/no/such cannot be used" in refusal(daemon)
    assert not daemon.socket.exists()


# ---- systemd

#: What systemd does for a socket unit: the listening socket becomes descriptor 3 of the process that it names.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


def activated(listener: socket.socket, count: str = "1") -> tuple[str, ...]:
    listener.set_inheritable(True)
    # Only descriptors that are named survive Popen; the copy keeps its number over both execs.
    return (sys.executable, "-I", "-S", "-c", ACTIVATE, str(listener.fileno()), count, *COMMAND)


def test_systemds_socket_is_served_and_left_in_place(make: Make, tmp_path: Path) -> None:
    """dockerd may connect while the daemon still starts, or restarts: the socket is systemd's, before and after."""
    path = tmp_path / "systemd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        daemon = make(socket=str(tmp_path / "must-not-be-made"))
        for _ in range(2):
            with ThreadPoolExecutor(1) as threads:
                early = threads.submit(ask, path, "Plugin.Activate")  # connected before the daemon runs
                daemon.start(activated(listener), pass_fds=(listener.fileno(),))
                assert early.result(timeout=60).ok
            assert ask(path, "IpamDriver.RequestPool", pool_body()).ok
            daemon.terminate()
            assert daemon.wait() == 0
            assert path.is_socket()
        assert not (tmp_path / "must-not-be-made").exists()


def pool_body() -> dict[str, Any]:
    return {"AddressSpace": "L", "Pool": SUBNET, "SubPool": "", "Options": {}, "V6": False}


def test_an_activation_without_a_socket_makes_its_own(make: Make, tmp_path: Path) -> None:
    """LISTEN_FDS=0 is no socket: the configured one is made, and never a TCP port that anybody could use."""
    with socket.socket(socket.AF_UNIX) as unused:
        unused.bind(str(tmp_path / "unused"))
        daemon = make()
        daemon.start(activated(unused, "0"), pass_fds=(unused.fileno(),))
        daemon.wait_answering()
    assert daemon.pool(SUBNET)


def test_ready_is_reported_when_etcd_has_answered(make: Make, own_etcd: EtcdCluster, tmp_path: Path) -> None:
    """docker.service waits for READY=1; a daemon that would refuse every container is not ready yet."""
    (member,) = own_etcd.members
    member.kill()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        daemon = make(endpoints=own_etcd.endpoints, deadline="2s", etcd={"timeout": "1s"})
        daemon.start(NOTIFY_SOCKET=str(tmp_path / "notify"))
        daemon.wait_answering()
        assert daemon.request_pool(SUBNET).status == 503
        systemd.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while said := systemd.recv(1000).decode():
                assert said.startswith("STATUS=")  # what systemctl status shows
                assert "etcd" in said
        systemd.settimeout(30)
        member.start()
        told: list[str] = []
        while "READY=1" not in told:
            told = systemd.recv(1000).decode().splitlines()
        assert own_etcd.members[0].healthy
        daemon.terminate()
        assert systemd.recv(1000) == b"STOPPING=1"
        assert daemon.wait() == 0


# ---- what operators write by hand


def test_what_is_reserved_by_hand_is_never_given(make: Make, etcd: RealEtcd) -> None:
    """P2: a lease key with any value at all, in any spelling of the address, means taken, also for --ip."""
    leases = f"{etcd.prefix}leases/default"
    etcd.cluster.etcdctl("put", f"{leases}/10.1.0.1", "the coffee machine")
    etcd.cluster.etcdctl("put", f"{leases}/010.1.0.5", "x")
    daemon = started(make())
    pool = daemon.pool("10.1.0.0/29")
    # And while it runs.
    etcd.cluster.etcdctl("put", f"{leases}/10.1.0.2", "")
    etcd.cluster.etcdctl("put", f"{leases}/10.1.0.003", '{"kind": "endpoint", "host": "a"}')
    until(lambda: f"{leases}/10.1.0.003' spells 10.1.0.3 in another way" in daemon.text(), "the daemon has seen it")

    taken = ("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.5")
    for address in taken:
        reply = daemon.request_address(pool, address=address)
        assert reply.status == 409, (address, reply)
        assert address in reply.error
    replies = [daemon.request_address(pool, f"02:00:00:00:00:{number:02x}") for number in range(4)]
    given = sorted(reply.body["Address"] for reply in replies if reply.ok)
    assert given == ["10.1.0.4/29", "10.1.0.6/29"]
    assert all("is full" in reply.error for reply in replies if not reply.ok)
    for key, value in (("10.1.0.1", "the coffee machine"), ("010.1.0.5", "x"), ("10.1.0.2", "")):
        assert etcd.cluster.etcdctl("get", "--print-value-only", f"{leases}/{key}").removesuffix("\n") == value

    # Deleting the key is all that it takes to have the address back.
    etcd.cluster.etcdctl("del", f"{leases}/010.1.0.5")
    assert until(lambda: daemon.request_address(pool, address="10.1.0.5").ok, "10.1.0.5 is free")


# ---- metrics


def test_metrics_are_served_where_they_are_configured(make: Make) -> None:
    """Prometheus finds the counts, and a port in use is no reason not to serve Docker."""
    daemon = started(make(metrics=True))
    assert daemon.request_address(daemon.pool(SUBNET)).ok
    assert daemon.metric('ipam_plugin_requests_total{method="RequestAddress",outcome="ok"}') == 1
    assert daemon.metric("ipam_plugin_serving") == 1
    other = make("b", metrics=daemon.metrics_port)
    assert started(other).pool(SUBNET)
    assert f"metrics are not served: metrics.listen 127.0.0.1:{daemon.metrics_port}" in other.text()


def test_no_port_is_open_without_metrics(make: Make) -> None:
    """Nobody but root's own socket speaks to the daemon unless the configuration says so."""
    daemon = started(make())
    assert daemon.pool(SUBNET)
    inodes = set()
    for process in daemon.processes():
        for link in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    listening = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if row.split()[3] == "0A"
    ]
    assert [row[1] for row in listening if row[9] in inodes] == []


def test_a_client_that_does_not_close_its_end_holds_up_nobody(make: Make) -> None:
    """P6: who reads its answer and keeps the connection open does not delay the next one's."""
    daemon = started(make())
    lazy = socket.socket(socket.AF_UNIX)
    try:
        lazy.connect(str(daemon.socket))
        lazy.sendall(b"POST /Plugin.Activate HTTP/1.1\r\nHost: plugin\r\nContent-Length: 0\r\n\r\n")
        assert lazy.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            began = time.monotonic()
            assert daemon.call("Plugin.Activate").ok
            assert time.monotonic() - began < 1
    finally:
        lazy.close()


def test_ready_is_not_reported_while_another_has_the_name(make: Make, own_etcd: EtcdCluster, tmp_path: Path) -> None:
    """P5: after a power cut the heartbeat of the last boot lives for up to 30 s. Docker must not start before it ends:
    the containers that it starts at boot would get no address, and are never started again."""
    daemon = make(endpoints=own_etcd.endpoints, host="rebooted")
    stranger = json.dumps(
        {"host": "rebooted", "machine_id": "m", "boot_id": "of the last boot", "process": "p"}
    ).encode()
    key = f"{daemon.config['prefix']}alive/rebooted"
    client = Etcd(own_etcd.settings())
    with contextlib.closing(client), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        ttl = client.grant_ttl(6, deadline=time.monotonic() + 5)
        client.commit({}, [Put(key, stranger, ttl)], deadline=time.monotonic() + 5)
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(40)
        daemon.start(NOTIFY_SOCKET=str(tmp_path / "notify"))
        while "READY=1" not in (said := systemd.recv(4096).decode()):
            assert "rebooted" in said or "etcd" in said
        found = client.get(key, deadline=time.monotonic() + 5)
        assert found is not None
        assert found.value != stranger
        assert daemon.request_pool(SUBNET).ok


def test_bodies_that_never_come_hold_up_nobody(make: Make) -> None:
    """P6: more requests than may wait, each with a body that breaks off: what needs no etcd is answered at once, the
    next requests are served as soon as these have ended, which is soon, and no traceback is left.
    """
    daemon = started(make())
    pool = daemon.pool(SUBNET)
    beginning = b"POST /IpamDriver.RequestAddress HTTP/1.1\r\nHost: plugin\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(290)]
        began = time.monotonic()
        for each in held:
            each.settimeout(30)
            each.connect(str(daemon.socket))
            each.sendall(beginning)
        answered = [daemon.call(method) for method in BODYLESS]
        assert all(reply.ok for reply in answered)
        assert max(reply.seconds for reply in answered) < 1
        refused = daemon.request_address(pool)
        assert "256 requests are waiting" in refused.error
        assert refused.seconds < 1
        said = []
        for each in held:
            with contextlib.closing(each.makefile("rb")) as answer:
                said.append(answer.read())
        took = time.monotonic() - began
        print(f"290 bodies that never came: all ended after {took:.1f} s")
        assert took < 5 + 2 * MARGIN
        assert sum(b"HTTP/1.1 503" in each for each in said) == 290 - 256
        assert sum(b"did not come in time" in each for each in said) == 256
        assert daemon.request_address(pool).ok
    assert "Traceback" not in daemon.text()


@pytest.mark.parametrize("beginning", [b"", b"POST /Plug", b"POST /Plugin.Activate HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_never_comes_is_not_waited_for(make: Make, beginning: bytes) -> None:
    """P6: also a byte now and then does not keep a connection beyond its time; its end leaves no traceback."""
    daemon = started(make())
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(daemon.socket))
        slow.sendall(beginning)
        slow.settimeout(0.5)
        began, ended = time.monotonic(), False
        while not ended:
            assert time.monotonic() - began < 20
            try:
                ended = slow.recv(1000) == b""
            except TimeoutError:
                with contextlib.suppress(BrokenPipeError):
                    slow.sendall(b"x" if beginning else b"")
        assert time.monotonic() - began < 5 + 2 * MARGIN
    assert daemon.call("Plugin.Activate").ok
    assert "Traceback" not in daemon.text()


def test_an_etcd_that_lost_its_data_is_an_alarm(make: Make, own_etcd: EtcdCluster) -> None:
    """Section 8: what runs may be given again by then, and somebody has to know."""
    (member,) = own_etcd.members
    daemon = started(make(endpoints=own_etcd.endpoints))
    pool = daemon.pool(SUBNET)
    for _ in range(40):  # more than the daemon writes anew before its watch is back
        assert daemon.request_address(pool).ok
    member.kill()
    shutil.rmtree(member.data)
    member.start()
    until(lambda: "ALARM etcd_went_back" in daemon.text(), "the alarm")
    until(lambda: daemon.request_pool(SUBNET).ok, "the daemon serves again")
