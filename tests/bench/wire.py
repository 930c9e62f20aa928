"""What it costs to ask the wire, on a LAN: with a stock and without, in a flood, and while nobody asks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import ipaddress
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ipam_plugin.etcd import Etcd, EtcdSettings
from tests.lab import Host, Lab, LabError, missing, until
from tests.lab.machines import DAEMON_SOCKET

from .measure import Row, Samples, Scale
from .requests import bare
from .stage import Docker, Stage, cpu_seconds, received, rollup

POOL = "198.18.0.0/16"
"""On every host's br0, beside the lab's own subnet, which is too small for what is asked for here."""

FLOODED = "10.0.0.0/8"
"""Where the machines of frames.py's flood are."""

USUAL = 2
"""Addresses in stock where nothing is configured."""

BARE = "a bare transaction"
STOCKED, EMPTY, OFF = "standby in stock", "no standby", "probe: off"

FILLING = 120.0  # seconds for a stock: eight looks of 4 to 6 s at once


@contextlib.contextmanager
def lan(stage: Stage, *configs: Mapping[str, Any], subnet: str = POOL, **options: Any) -> Iterator[Lab]:
    """A LAN with a router and a host for each configuration of a daemon. All have an address of this subnet as well.

    Its etcd is on the disk that is measured.
    """

    def config(number: int) -> Mapping[str, Any]:
        return configs[number - 1]

    with Lab(hosts=len(configs), daemon=True, config=config, directory=stage.directory, **options) as lab:
        assert lab.router is not None
        lab.router.ip(f"addr add {own(subnet, 254)} dev eth0")
        for number, host in enumerate(lab.hosts, 1):
            host.ip(f"addr add {own(subnet, number)} dev br0")
        lab.hosts[0].command("segment", "default", "--router", own(subnet, 254).partition("/")[0])
        yield lab


def own(subnet: str, number: int) -> str:
    """An address near the end of the subnet, with its prefix length."""
    network = ipaddress.ip_network(subnet)
    return f"{network.broadcast_address - 256 + number}/{network.prefixlen}"


def docker_of(host: Host) -> Docker:
    """Asks this host's daemon, from outside the host."""
    return Docker(socket_of(host))


def socket_of(host: Host) -> Path:
    return Path(f"/proc/{host.pid}/root{DAEMON_SOCKET}")


class Client:
    """A process that times requests to daemons and transactions of etcd, in turn, with the same client classes as the
    other benchmarks. It is in a host's network namespace, where the lab's etcd can be reached. A context manager.
    """

    def __init__(self, lab: Lab, pools: Mapping[str, tuple[Host, str]]) -> None:
        """`pools`: by the name of a side, whom it asks for which PoolID."""
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pipe, other = context.Pipe()
        sockets = {side: (socket_of(host), pool_id) for side, (host, pool_id) in pools.items()}
        arguments = (lab.hosts[0].pid, lab.endpoints, sockets, other)
        self._process = context.Process(target=_client, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def start(self, side: str, count: int, apart: float = 0.0) -> None:
        """So many of this side, one after another, each begun `apart` seconds after the last one at the earliest."""
        self._pipe.send((side, count, apart))

    def result(self) -> list[float]:
        """The seconds of each. The addresses are given back, which is not counted."""
        if not self._pipe.poll(180):
            raise LabError("the requests were not answered within 180 s")
        told: list[float] = self._pipe.recv()
        return told

    def time(self, side: str, count: int, apart: float = 0.0) -> list[float]:
        self.start(side, count, apart)
        return self.result()


def _client(
    pid: int, endpoints: Sequence[str], sockets: Mapping[str, tuple[Path, str]], pipe: Connection[Any, Any]
) -> None:
    _enter_network(pid)
    etcd = Etcd(EtcdSettings(endpoints=tuple(endpoints)))
    create = bare(etcd, f"/bare/{time.time_ns()}/")
    dockers = {side: (Docker(path), pool_id) for side, (path, pool_id) in sockets.items()}
    try:
        while True:
            side, count, apart = pipe.recv()
            docker, pool_id = dockers.get(side, (None, ""))
            given, taken = [], []
            began = time.monotonic()
            for number in range(count):
                time.sleep(max(0.0, began + number * apart - time.monotonic()))
                begin = time.perf_counter()
                if docker is None:
                    create()
                else:
                    given.append(docker.request_address(pool_id))
                taken.append(time.perf_counter() - begin)
            for address in given:
                assert docker is not None
                docker.release_address(pool_id, address)
            pipe.send(taken)
    except EOFError:
        pass
    finally:
        etcd.close()


def _enter_network(pid: int) -> None:
    """This thread, and all it starts from now on (setns(2))."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        network = 0x40000000
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), network) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")


class Count:
    """What was counted at a host since."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        lines = [line.rpartition(" ") for line in self._host.metrics().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def of(self, name: str) -> float:
        """Without labels in `name`, the sum over all of them."""
        return sum(
            value - self._before.get(each, 0.0)
            for each, value in self._now().items()
            if each == name or each.startswith(f"{name}{{")
        )

    def transactions(self, purpose: str) -> int:
        """`grant`: addresses given. `claim`: addresses that a request had to look for on the wire itself."""
        return int(self.of(f'ipam_plugin_etcd_transactions_total{{purpose="{purpose}"}}'))


def stocked(host: Host, count: int) -> None:
    until(lambda: host.metric("ipam_plugin_standby") >= count, FILLING, f"{host.name} has {count} in stock", pause=0.5)


def standby(stage: Stage, scale: Scale) -> list[Row]:
    """RequestAddress from three daemons of the same kind: with a stock, without one, and without probing; beside it,
    bare transactions on their etcd.
    """
    if reason := missing():
        print(f"standby: left out: {reason}")
        return []
    with lan(stage, {"standby": scale.stock}, {"standby": 0}, {"probe": "off"}, machines=0, dockerd=False) as lab:
        sides = dict(zip((STOCKED, EMPTY, OFF), lab.hosts, strict=True))
        pools = {side: (host, docker_of(host).request_pool(POOL)) for side, host in sides.items()}
        samples = {side: Samples() for side in (*sides, BARE)}
        draw = random.Random(1)
        with Client(lab, pools) as client:
            stocked(sides[STOCKED], scale.stock)
            for side in samples:
                client.time(side, 2)
            for _ in range(scale.stock_rounds):
                for side in draw.sample(list(samples), len(samples)):
                    # Also before the other sides' turns: filling the stock keeps the machine busy.
                    stocked(sides[STOCKED], scale.stock)
                    count = scale.stock_block if side != EMPTY else scale.stock_block // 2
                    counted = {each: Count(host) for each, host in sides.items()}
                    samples[side].blocks.append(client.time(side, count))
                    if side in sides:
                        searched = count if side == EMPTY else 0
                        assert counted[side].transactions("grant") == count
                        assert counted[side].transactions("claim") == searched, side
    how = f"every one from a stock of {scale.stock}"
    with_stock, without, off, transaction = (samples[side] for side in (STOCKED, EMPTY, OFF, BARE))
    return [
        Row.ratio("RequestAddress with standby / bare transaction, p50", with_stock, transaction, 0.5, 2, how),
        Row.ratio("RequestAddress with standby / bare transaction, p99", with_stock, transaction, 0.99, 3, how),
        Row.ratio("RequestAddress with standby / probe off, p50", with_stock, off, 0.5, 1.2, how),
        Row.ratio("RequestAddress with standby / probe off, p99", with_stock, off, 0.99, None, how),
        Row.ratio("RequestAddress without standby / probe off, p50", without, off, 0.5, None, "a fast look each"),
        Row.ratio("RequestAddress without standby / probe off, p99", without, off, 0.99, None, "a fast look each"),
    ]


class Usage:
    """What a host's daemon, or its dockerd with containerd, has used of a processor since."""

    def __init__(self, host: Host, service: str = "daemon") -> None:
        self._processes = host.services[service].family()
        self._before = self._used()

    def _used(self) -> float:
        return sum(cpu_seconds(each) for each in self._processes)

    def seconds(self) -> float:
        return self._used() - self._before

    def resident(self) -> float:
        """Megabytes of RAM, all processes together."""
        return sum(rollup(each)["Rss"] for each in self._processes) / 1024


FLOOD = 10_000
"""Frames per second."""


def flood(stage: Stage, scale: Scale) -> list[Row]:
    """Frames of machines with random MACs and random addresses, all in the subnet of the daemon's pool."""
    if reason := missing():
        print(f"flood: left out: {reason}")
        return []
    apart = 0.2
    count = int(scale.flood * 0.95 / apart)
    with lan(stage, {"standby": scale.stock}, subnet=FLOODED, machines=1, dockerd=False) as lab:
        [host], [machine] = lab.hosts, lab.machines
        pool_id = docker_of(host).request_pool(FLOODED)
        samples, used = {}, {}
        with Client(lab, {STOCKED: (host, pool_id)}) as client:
            for flooded in (False, True):
                stocked(host, scale.stock)
                counted, usage = Count(host), Usage(host)
                before = usage.resident()
                sending = machine.flood(FLOOD, scale.flood) if flooded else None
                if sending is not None:
                    until(functools.partial(_has_heard, counted, 100), 10, "the flood has begun")
                samples[flooded] = Samples([client.time(STOCKED, count, apart)])
                used[flooded] = usage.seconds()
                sent = sending.result(60).stdout.strip() if sending is not None else ""
                looked = counted.of("ipam_plugin_wire_frames_total")
                lost = counted.of("ipam_plugin_wire_frames_lost_total")
                waited = counted.transactions("claim")
                after = usage.resident()
            stocked(host, scale.stock)
    rate = f"{sent} frames in {scale.flood:g} s, {looked:.0f} looked at, {lost:.0f} dropped unread"
    request = "RequestAddress with standby, in the flood / before"
    served = f"one each {apart:g} s; {waited} waited for a fast look"
    return [
        Row.limit("memory (RSS) after a flood of 10,000 ARP frames/s", after, "MB", before, None, rate, "before"),
        Row.ratio(f"{request}, p50", samples[True], samples[False], 0.5, None, served),
        Row.ratio(f"{request}, p99", samples[True], samples[False], 0.99, None, served),
        Row.limit(
            f"processor time of the daemon, {scale.flood:g} s of flood and {count} requests",
            *(used[True], "s", used[False], None, "", "without the flood"),
        ),
    ]


def _has_heard(counted: Count, frames: int) -> bool:
    return counted.of("ipam_plugin_wire_frames_total") > frames


def cost(stage: Stage, scale: Scale) -> list[Row]:
    """An idle host with one pool in use, with probing and without. etcd's own counters tell what reaches it."""
    if reason := missing():
        print(f"cost: left out: {reason}")
        return []
    used, asked = {}, {}
    with lan(stage, {}, machines=0, dockerd=False) as lab:
        [host] = lab.hosts
        docker_of(host).request_pool(POOL)
        for probe in ("full", "off"):
            if probe == "off":
                host.configure(probe=probe)
                host.restart("daemon")
                until(lambda: host.metric("ipam_plugin_serving") == 1, 30, "the daemon serves")
            else:
                stocked(host, USUAL)
            usage, before = Usage(host), calls(lab)
            time.sleep(scale.idle)
            used[probe] = usage.seconds() * 60 / scale.idle
            asked[probe] = {each: (now - before.get(each, 0)) * 60 / scale.idle for each, now in calls(lab).items()}
    told = [f"{name} {number:.0f}" for name, number in sorted(asked["full"].items()) if number]
    return [
        Row.limit(
            "processor time of an idle daemon that probes, per minute",
            *(used["full"], "s", used["off"], None, f"over {scale.idle:g} s, one pool in use", "with probe off"),
        ),
        Row.limit(
            "etcd transactions of an idle daemon that probes, per minute",
            *(asked["full"].get("Txn", 0.0), "transactions", asked["off"].get("Txn", 0.0), None),
            f"all calls: {', '.join(told) or 'none'}",
            "with probe off",
        ),
    ]


def calls(lab: Lab) -> dict[str, float]:
    """What a lab's etcd has received."""
    request = "GET /metrics HTTP/1.0\r\n\r\n"
    answer = lab.etcd[0].node.run("busybox", "nc", "-w", "5", "127.0.0.1", "2379", stdin=request, timeout=10).stdout
    return received(answer.partition("\r\n\r\n")[2])
