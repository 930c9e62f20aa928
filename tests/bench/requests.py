"""What a request costs, and what many hosts at once cost."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any

from ipam_plugin.addresses import Range
from ipam_plugin.etcd import Etcd, EtcdSettings, Put
from ipam_plugin.model import Pool

from .measure import Row, Scale, take_turns
from .stage import Daemon, Stage, lease

EMPTY = "198.18.0.0/16"


def bare(client: Etcd, prefix: str) -> Callable[[], None]:
    """One create transaction per call."""
    value = lease(Pool.make(EMPTY, "", {}, "default"), 1, "bench")
    numbers = itertools.count()

    def create() -> None:
        key = f"{prefix}{next(numbers)}"
        assert client.commit({key: 0}, [Put(key, value)], deadline=time.monotonic() + 10).applied

    return create


def socket_latency(stage: Stage, scale: Scale) -> list[Row]:
    """RequestAddress through the socket, with probing off / a bare transaction of the same client class."""
    with stage.daemons(1, stage.fresh_keys()) as (daemon,):
        pool_id = daemon.docker.request_pool(EMPTY)
        sides = (lambda: daemon.docker.request_address(pool_id), bare(stage.client, "/bare/socket/"))
        for _ in range(10):
            for side in sides:
                side()
        request, transaction = take_turns(sides, scale.rounds, scale.block)
    return [
        Row.ratio("RequestAddress with probe off / bare transaction, p50", request, transaction, 0.5, None),
        Row.ratio("RequestAddress with probe off / bare transaction, p99", request, transaction, 0.99, None),
    ]


def full_pool(stage: Stage, scale: Scale) -> list[Row]:
    """RequestAddress in a pool that is nearly full / in an empty one of the same size, each with its own daemon."""
    full_keys = stage.fresh_keys()
    subnet = f"198.18.0.0/{scale.full_prefix}"
    size = Pool.make(subnet, "", {}, "default").candidates.size()
    taken = int(size * scale.fill)
    stage.fill(full_keys, subnet, taken)
    requests = min(scale.rounds * scale.block, int((size - taken) * 0.9))
    block = max(1, requests // scale.rounds)
    with stage.daemons(1, full_keys) as (full,), stage.daemons(1, stage.fresh_keys()) as (empty,):
        sides = []
        for each in (full, empty):
            pool_id = each.docker.request_pool(subnet)
            each.docker.request_address(pool_id)
            sides.append(lambda docker=each.docker, pool_id=pool_id: docker.request_address(pool_id))
        over, under = take_turns(sides, scale.rounds, block)
    how = f"{taken} of {size} taken at the start, at random; {taken + requests} at the end"
    return [
        Row.ratio(
            f"RequestAddress, /{scale.full_prefix} {scale.fill:.0%} full / empty, p50", over, under, 0.5, 1.2, how
        )
    ]


def transactions(stage: Stage, scale: Scale) -> list[Row]:
    """etcd transactions inside requests per address, daemons filling one pool at once to the last address."""
    with stage.daemons(scale.daemons, stage.fresh_keys()) as daemons:
        took, addresses = ask_all(daemons, same_pool(daemons, scale.pool), scale.pool, in_flight=4)
        sent = sum(each.transactions("grant", "barrier") for each in daemons)
        lost = sum(each.metric("ipam_plugin_lost_races_total") for each in daemons)
    value = sent / len(addresses)
    return [
        Row(
            f"etcd transactions per address, {scale.daemons} daemons fill one pool",
            f"{value:.3f}",
            f"{sent:.0f} transactions",
            f"{len(addresses)} addresses",
            "≤ 1.1",
            value <= 1.1,
            f"4 requests at once per daemon, {took:.1f} s, {lost:.0f} lost races",
        )
    ]


def exact(stage: Stage, scale: Scale) -> list[Row]:
    """All addresses of a pool, from several daemons at once: one request at a time each, and all at once."""
    rows = []
    for in_flight in (1, scale.exact_pool // scale.exact_daemons):
        with stage.daemons(scale.exact_daemons, stage.fresh_keys()) as daemons:
            took, _ = ask_all(daemons, same_pool(daemons, scale.exact_pool), scale.exact_pool, in_flight)
        baseline = bare_at_once(stage, scale.exact_daemons, in_flight, scale.exact_pool)
        at_once = "one request at a time each" if in_flight == 1 else "all requests at once"
        rows.append(
            Row.limit(
                f"all {scale.exact_pool} addresses of a pool, {scale.exact_daemons} daemons, {at_once}",
                took,
                "s",
                baseline,
                5,
                f"baseline: bare transactions of {scale.exact_daemons} processes with {in_flight} threads each",
            )
        )
    return rows


def same_pool(daemons: Sequence[Daemon], size: int) -> str:
    """The PoolID of one pool of exactly `size` addresses that all these daemons use."""
    prefix = 32 - (size + 1).bit_length()
    where = Pool.make(f"198.18.0.0/{prefix}", "", {}, "default").candidates
    spare = Range(4, where.first, where.last - size)
    options = {"exclude": f"{ip_address(spare.first)}-{ip_address(spare.last)}"} if spare.size() else {}
    (pool_id,) = {each.docker.request_pool(f"198.18.0.0/{prefix}", **options) for each in daemons}
    assert Pool.parse(pool_id).candidates.size() - sum(each.size() for each in Pool.parse(pool_id).exclude) == size
    return pool_id


def ask_all(daemons: Sequence[Daemon], pool_id: str, count: int, in_flight: int) -> tuple[float, list[str]]:
    """Seconds until `count` different addresses were given, `in_flight` requests at once per daemon.

    Each daemon gets its share. One thread: threads would share the processor with what is measured.
    """
    shares = {each: count // len(daemons) + (number < count % len(daemons)) for number, each in enumerate(daemons)}
    addresses: list[str] = []
    with selectors.DefaultSelector() as waiting:

        def send(daemon: Daemon) -> None:
            if not shares[daemon]:
                return
            shares[daemon] -= 1
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect(str(daemon.socket))
            connection.sendall(daemon.docker.address_request(pool_id))
            waiting.register(connection, selectors.EVENT_READ, (daemon, bytearray()))

        begin = time.perf_counter()
        for _ in range(in_flight):
            for daemon in daemons:
                send(daemon)
        while waiting.get_map():
            ready = waiting.select(60)
            assert ready, "no answer within 60 s"
            for key, _ in ready:
                daemon, received = key.data
                if more := key.fileobj.recv(65536):  # type: ignore[union-attr]
                    received += more
                    continue
                # The daemon closes after each answer.
                waiting.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                answer = bytes(received)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                addresses.append(answer.rpartition(b'"Address":"')[2].partition(b'"')[0].decode())
                send(daemon)
        took = time.perf_counter() - begin
    twice = [address for address, times in collections.Counter(addresses).items() if times > 1]
    assert not twice, f"given twice: {twice}"
    assert len(addresses) == count
    return took, addresses


def bare_at_once(stage: Stage, processes: int, threads: int, count: int) -> float:
    """Seconds in which so many processes with so many threads each create `count` keys between them."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    start = context.Barrier(processes + 1)
    end = context.Barrier(processes + 1)
    share = count // processes
    workers = [
        context.Process(
            target=_create,
            args=(stage.settings, f"/bare/{time.time_ns()}/{number}/", threads, share, start, end),
            daemon=True,
        )
        for number in range(processes)
    ]
    for each in workers:
        each.start()
    start.wait(60)
    begin = time.perf_counter()
    end.wait(60)
    took = time.perf_counter() - begin
    for each in workers:
        each.join(10)
    return took


def _create(settings: EtcdSettings, prefix: str, threads: int, count: int, start: Any, end: Any) -> None:
    client = Etcd(settings)
    create = bare(client, f"{prefix}warm/")
    create()
    shared = bare(client, prefix)
    left = iter(range(count))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            shared()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    start.wait(60)
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    end.wait(60)
    client.close()
