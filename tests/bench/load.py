"""What the daemons cost those on whom they depend: a dockerd with many containers, an etcd with many hosts."""

from __future__ import annotations

import collections
import contextlib
import ipaddress
import json
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

from callers import Attempt, Callers, Work, container
from ipam_plugin.dockerd import Dockerd
from ipam_plugin.etcd import Etcd, EtcdSettings, Event, KeyValue, Put
from ipam_plugin.host import Presence, StateDir
from ipam_plugin.interfaces import InterfaceAddress
from ipam_plugin.model import Keys, Pool
from ipam_plugin.register import Register
from ipam_plugin.view import View
from tests.lab import DOCKER_SOCKET, Host, Lab, missing, until
from tests.lab.node import ServiceEnded

from .docker_run import OURS, networks
from .measure import Row, Samples, Scale, seconds
from .stage import LAN, Daemon, Stage, cpu_seconds, lease, received, rollup
from .wire import USUAL, Count, Usage, calls, lan, socket_of, stocked

# ---- one dockerd with many containers


def containers(stage: Stage, scale: Scale) -> list[Row]:
    """A host with many containers that run: what the look at its dockerd costs, and how long requests wait while its
    daemon is restarted.
    """
    if reason := missing():
        print(f"containers: left out: {reason}")
        return []
    # With `debug` the engine's log has a line for each request of its API.
    with lan(stage, {}, machines=0, socket_unit=True, engine={"debug": True}) as lab:
        [host] = lab.hosts
        networks({OURS: host})
        stocked(host, USUAL)
        none = looks(host, scale)
        counted, asked = Count(host), Asked(host)
        taken = seconds(lambda: host.docker_run(_names(scale), "--network", "bench"))
        until(lambda: counted.of(NAMED) >= scale.containers_running, 60, "the leases say which container has them")
        rows = [
            _of_starts(scale, counted, asked, taken),
            *_of_looks(scale, looks(host, scale), none),
            *_at_rest(lab, host, scale),
            *_restarts(lab, host, scale),
        ]
        host.docker("rm", "-f", *_names(scale), timeout=300)
    return rows


NAMED = 'ipam_plugin_etcd_transactions_total{purpose="name"}'
LOOKS = 'ipam_plugin_docker_looks_total{result="complete"}'


def _names(scale: Scale) -> list[str]:
    return [f"c{number}" for number in range(scale.containers_running)]


class Asked:
    """How often dockerd's API was asked since, by the request."""

    PLACES = ("info", "containers/json", "networks", "networks/ID")

    def __init__(self, host: Host) -> None:
        self._log = host.directory / "dockerd.log"
        self._begin = self._log.stat().st_size

    def count(self) -> dict[str, int]:
        """Of what a look asks for; nobody else asks that here."""
        with self._log.open() as log:
            log.seek(self._begin)
            asked = re.findall(r"Calling GET /v[\d.]+/([\w/]+)", log.read())
        places = [re.sub(r"^networks/\w+$", "networks/ID", each) for each in asked]
        return {place: places.count(place) for place in self.PLACES}


def looks(host: Host, scale: Scale) -> tuple[Samples, float]:
    """Looks at dockerd by the daemon's own module: the seconds of each, and dockerd's processor time for all."""
    dockerd = Dockerd(f"/proc/{host.pid}/root{DOCKER_SOCKET}")
    dockerd.look()
    usage, samples = Usage(host, "dockerd"), Samples([])
    for _ in range(scale.looks):
        samples.blocks.append([seconds(dockerd.look)])
    used = usage.seconds()
    dockerd.close()
    return samples, used


def _of_starts(scale: Scale, counted: Count, asked: Asked, taken: float) -> Row:
    count, names = scale.containers_running, counted.of(NAMED)
    told = ", ".join(f"{number} {place}" for place, number in asked.count().items())
    return Row(
        f"etcd transactions that write a container's name, {count} containers started 8 at a time",
        f"{names / count:.3g}",
        f"{names:.0f} transactions",
        f"{count} containers",
        "",
        None,
        f"started within {taken:.0f} s; {counted.of(LOOKS):.0f} looks at dockerd: {told}",
    )


def _of_looks(scale: Scale, many: tuple[Samples, float], none: tuple[Samples, float]) -> list[Row]:
    count = scale.containers_running
    each = f"{scale.looks} looks one after another, 4 requests each"
    return [
        Row.ratio(
            f"one look at a dockerd with {count} containers / with none, median", many[0], none[0], 0.5, None, each
        ),
        Row.limit(
            f"dockerd's processor time for one look, {count} containers",
            *(many[1] / scale.looks * 1000, "ms", none[1] / scale.looks * 1000, None),
            each,
            "with none",
        ),
    ]


def _at_rest(lab: Lab, host: Host, scale: Scale) -> list[Row]:
    """The same host with the look and without, taking turns; nobody starts or stops a container."""
    used: dict[bool, dict[str, float]] = {True: collections.defaultdict(float), False: collections.defaultdict(float)}
    for turn, reconcile in enumerate((True, False) * scale.rest_rounds):
        if turn > 0:  # it looks already
            host.configure(docker={"reconcile": reconcile})
            host.restart("daemon")
        stocked(host, USUAL)
        asked, dockerd, daemon = Asked(host), Usage(host, "dockerd"), Usage(host)
        etcd, before = cpu_seconds(lab.etcd[0].pid), calls(lab)
        time.sleep(scale.idle)
        now = calls(lab)
        found = {
            "dockerd": dockerd.seconds(),
            "daemon": daemon.seconds(),
            "etcd": cpu_seconds(lab.etcd[0].pid) - etcd,
            "requests": float(sum(asked.count().values())),
            "calls": sum(now.values()) - sum(before.values()),
            **{call: number - before.get(call, 0.0) for call, number in now.items()},
        }
        for name, value in found.items():
            used[reconcile][name] += value * 60 / scale.idle / scale.rest_rounds
    count = scale.containers_running
    how = f"over {scale.rest_rounds} times {scale.idle:g} s, with and without taking turns"
    kinds = (
        ("dockerd", "processor time of dockerd", "s"),
        ("daemon", "processor time of the daemon", "s"),
        ("etcd", "processor time of etcd", "s"),
        ("requests", "requests to dockerd's API", "requests"),
        ("calls", "calls of etcd", "calls"),
        ("Txn", "etcd transactions", "transactions"),
    )
    told = ", ".join(f"{name} {used[True][name]:.1f}" for name in ("LeaseKeepAlive", "Range", "Txn", "Watch"))
    return [
        Row.limit(
            f"{what}, {count} containers that run, per minute",
            *(used[True][name], unit, used[False][name], None),
            f"{how}: {told}" if name == "calls" else how,
            "with docker.reconcile false",
        )
        for name, what, unit in kinds
    ]


def _restarts(lab: Lab, host: Host, scale: Scale) -> list[Row]:
    """As `systemctl restart`, with the socket that systemd holds, while containers start and stop without a pause."""
    host.configure()
    host.restart("daemon")
    given = lab.etcdctl("get", "--prefix", "--print-value-only", "/ipam-plugin/v1/leases/default/").splitlines()
    pool_id = next(json.loads(each)["pool"] for each in given if '"kind":"endpoint"' in each)
    driver = container(socket_of(host), pool_id)
    windows = []
    with Callers({DRIVER: driver, f"another {DRIVER}": driver, DOCKER: _runs(host)}) as callers:
        until(lambda: callers.have_asked(0, 10), 120, "all have asked")
        for _ in range(scale.restarts):
            begin = time.monotonic()
            host.restart("daemon")
            windows.append((begin, time.monotonic()))
            until(lambda: callers.have_asked(windows[-1][1], 5), 120, "all have asked again")
    assert callers.failed() == []
    rows = []
    for caller, what, must in (
        (DRIVER, "longest wait of a request while the daemon is restarted", 3.0),
        (DOCKER, "longest `docker run --rm` while the daemon is restarted", None),
    ):
        times: dict[bool, list[float]] = {True: [], False: []}
        for each in callers.tries:
            if each.caller.endswith(caller):
                times[any(each.began < end and each.ended > begin for begin, end in windows)].append(each.seconds)
        how = f"{scale.restarts} restarts, {len(times[True])} under way meanwhile, none failed"
        baseline = f"the longest of {len(times[False])} others"
        what = f"{what}, {scale.containers_running} containers"
        rows.append(Row.limit(what, max(times[True]), "s", max(times[False]), must, how, baseline))
    return rows


DRIVER, DOCKER = "driver", "docker run"


def _runs(host: Host) -> Work:
    def work(attempt: Attempt) -> None:
        attempt(lambda: host.docker("run", "--rm", "--network", "bench", "busybox", "true"))

    return work


# ---- one etcd with many hosts


def hosts(stage: Stage, scale: Scale) -> list[Row]:
    """Many hosts on one etcd, at rest and while leases are written: with one daemon, and with so many hosts that are
    no more than their heartbeat, their record and their watch.
    """
    keys = stage.fresh_keys()
    with stage.daemons(1, keys) as (daemon,):
        daemon.docker.request_pool(LAN)
        one = _Load(stage, scale)
        begin = _used(daemon)
        one.rest()
        idle = (_used(daemon) - begin) / scale.idle  # seconds per second
        begin = _used(daemon)
        one.write(keys, lambda: until(lambda: daemon.metric(TAKEN) >= scale.writes, 60, "the daemon knows every lease"))
        busy = _used(daemon) - begin
    keys = stage.fresh_keys()
    with Crowd(stage, keys, scale.hosts) as crowd:
        many = _Load(stage, scale)
        many.rest()
        before = crowd.seen()
        many.write(keys, lambda: crowd.wait(before + scale.hosts * scale.writes))
        delivered = crowd.seen() - before
    count, writes, minute = scale.hosts, scale.writes, f"over {scale.idle:g} s"
    told = ", ".join(f"{name} {number:.0f}" for name, number in sorted(many.calls.items()) if number)
    alone = ", ".join(f"{name} {number:.0f}" for name, number in sorted(one.calls.items()) if number)
    paced = f"{writes} leases, {PER_SECOND} a second, each its own transaction"
    return [
        Row.limit(
            f"calls of etcd at rest, {count} hosts, per host and minute",
            *(sum(many.calls.values()) / count, "calls", sum(one.calls.values()), None),
            f"{minute}; all {count}: {told}; one daemon: {alone}",
            "of one daemon",
        ),
        Row.limit(
            f"processor time of etcd at rest, {count} hosts, per minute",
            *(many.rest_used, "s", one.rest_used, None, minute, "with one daemon"),
        ),
        Row.limit(
            f"memory (RSS) of etcd with {count} hosts",
            *(many.resident, "MB", one.resident, None, "before the leases were written", "with one daemon"),
        ),
        Row.limit(
            f"processor time of etcd for {writes} leases, {count} hosts watch",
            *(many.write_used, "s", one.write_used, None),
            f"{paced}; what it needs at rest included",
            "with one daemon",
        ),
        Row(
            f"watch events delivered for {writes} leases, {count} hosts",
            f"{delivered}",
            f"{delivered} events",
            f"{writes} writes to {count} hosts",
            "",
            None,
            f"in {many.messages:.0f} messages; the last host had the last one {many.late * 1000:.0f} ms after it was"
            " written",
        ),
        Row.ratio(
            f"one write, {count} hosts watch / one daemon, p50",
            *(many.samples, one.samples, 0.5, None, f"{paced}; the hosts are on the same machine"),
        ),
        Row.limit(
            f"processor time of one daemon for {writes} leases of other hosts",
            *(busy, "s", idle * one.written, None, f"{paced}, within {one.written:.0f} s", "at rest for so long"),
        ),
    ]


PER_SECOND = 20
TAKEN = 'ipam_plugin_leases{kind="endpoint",segment="default"}'


def _used(daemon: Daemon) -> float:
    return sum(map(cpu_seconds, daemon.processes()))


class _Load:
    """What etcd has to do."""

    def __init__(self, stage: Stage, scale: Scale) -> None:
        self._stage = stage
        self._scale = scale
        [self._member] = stage.etcd.members
        self.samples = Samples()

    def rest(self) -> None:
        """Nobody asks for anything."""
        begin, before = cpu_seconds(self._member.pid), received(self._member.metrics())
        time.sleep(self._scale.idle)
        after = received(self._member.metrics())
        self.rest_used = (cpu_seconds(self._member.pid) - begin) * 60 / self._scale.idle
        self.calls = {name: (now - before.get(name, 0)) * 60 / self._scale.idle for name, now in after.items()}
        self.resident = rollup(self._member.pid)["Rss"] / 1024

    def write(self, keys: Keys, arrived: Callable[[], None]) -> None:
        """Leases of a host that is none of these; `arrived` returns when all have them."""
        pool = Pool.make(LAN, "", {}, "default")
        first = ipaddress.ip_network(LAN).network_address + 1
        begin, before = cpu_seconds(self._member.pid), _sent(self._member.metrics())
        began, taken = time.monotonic(), []
        for number in range(self._scale.writes):
            time.sleep(max(0.0, began + number / PER_SECOND - time.monotonic()))
            put = Put(keys.lease("default", first + number), lease(pool, number, "elsewhere"))
            taken.append(seconds(lambda: self._stage.write([put])))  # noqa: B023
        self.written = time.monotonic() - began
        arrived()
        self.late = time.monotonic() - began - self.written
        self.write_used = cpu_seconds(self._member.pid) - begin
        self.messages = _sent(self._member.metrics()) - before
        self.samples.blocks.append(taken)


def _sent(metrics: str) -> float:
    """Messages to watchers."""
    found = re.search(r'^grpc_server_msg_sent_total{grpc_method="Watch".*} (\S+)$', metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


class Crowd:
    """Hosts that have joined, in processes of their own. A context manager."""

    def __init__(self, stage: Stage, keys: Keys, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pipes: list[Connection[Any, Any]] = []
        self._processes = []
        share = -(-count // 4)
        for begin in range(0, count, share):
            pipe, other = context.Pipe()
            numbers = range(begin, min(count, begin + share))
            arguments = (stage.settings, keys, str(stage.directory / "crowd"), numbers, other)
            self._processes.append(context.Process(target=_crowd, args=arguments, daemon=True))
            self._pipes.append(pipe)
            self._processes[-1].start()
            other.close()
        self._count = count

    def __enter__(self) -> Crowd:
        until(lambda: self.ready() == self._count, 120, f"{self._count} hosts have joined", pause=1)
        # Each has seen the others' heartbeat and record, and writes nothing more.
        until(self._is_quiet, 120, "they have seen each other", pause=1)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
            process.kill()

    def ready(self) -> int:
        """How many serve."""
        return sum(self._ask("ready"))

    def seen(self) -> int:
        """Watch events that they have had, all together."""
        return sum(self._ask("seen"))

    def _is_quiet(self) -> bool:
        before = self.seen()
        time.sleep(1)
        return self.seen() == before

    def wait(self, events: int) -> None:
        until(lambda: self.seen() >= events, 60, "every host has seen every write")

    def _ask(self, what: str) -> Iterator[int]:
        ended = [each.exitcode for each in self._processes if not each.is_alive()]
        if ended:
            raise ServiceEnded(f"a process of simulated hosts ended with {ended[0]}")
        for pipe in self._pipes:
            pipe.send(what)
        for pipe in self._pipes:
            if not pipe.poll(60):
                raise ServiceEnded("simulated hosts do not answer")
            yield int(pipe.recv())


class _SimulatedHost:
    """The parts of a daemon that speak to etcd while nobody asks it for anything."""

    def __init__(self, settings: EtcdSettings, keys: Keys, directory: str, number: int) -> None:
        name = f"crowd-{number}"
        address = ipaddress.ip_address("198.51.100.1") + number
        own = InterfaceAddress(address, 22, "br0", f"02:00:00:01:{number >> 8:02x}:{number & 255:02x}", True, True)
        self.etcd = Etcd(settings)
        self.view = View(keys, name)
        self.seen = 0
        self._stop = threading.Event()
        self.presence = Presence(
            self.etcd,
            self.view,
            keys,
            StateDir(f"{directory}/{name}"),
            name=name,
            segments=lambda: ("default",),
            carried=lambda deadline: [own],
            time_limit=5.0,
        )

        def reset(values: Sequence[KeyValue], revision: int, epoch: int) -> None:
            self.view.reset(((each.key, each.value, each.revision) for each in values), revision, epoch)

        def events(changes: Sequence[Event], revision: int) -> None:
            self.view.apply(changes, revision)
            self.seen += len(changes)

        for work in (
            lambda: self.etcd.watch(keys.prefix, reset, events, self._stop),
            lambda: self.presence.run(cast(Register, _NoAddresses()), self._stop),
        ):
            threading.Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
        self.presence.changed()
        self.etcd.close()


class _NoAddresses:
    """What a register does with each heartbeat; it asks etcd nothing while the host's addresses stay the same."""

    def register_own_addresses(self, deadline: float) -> None: ...

    def free_lost_addresses(self, deadline: float) -> None: ...

    def trim_history(self, deadline: float) -> None: ...


def _crowd(settings: EtcdSettings, keys: Keys, directory: str, numbers: range, pipe: Connection[Any, Any]) -> None:
    crowd = [_SimulatedHost(settings, keys, directory, number) for number in numbers]
    with contextlib.suppress(EOFError):
        while True:
            if pipe.recv() == "ready":
                pipe.send(sum(each.presence.is_serving for each in crowd))
            else:
                pipe.send(sum(each.seen for each in crowd))
    for each in crowd:
        each.stop()
