"""What it costs a daemon that the register holds many leases."""

from __future__ import annotations

import time

from ipam_plugin.model import Keys

from .measure import Row, Scale, median
from .stage import LAN, Stage


def memory(stage: Stage, scale: Scale) -> list[Row]:
    """Master and worker, with many leases and with none."""
    used, alone = {}, {}
    for count in (0, scale.leases):
        keys = stage.fresh_keys()
        stage.fill(keys, LAN, count)
        with stage.daemons(1, keys) as (daemon,):
            pool_id = daemon.docker.request_pool(LAN)
            for _ in range(100 if scale.leases > 10_000 else 5):
                daemon.docker.request_address(pool_id)
            used[count], alone[count] = daemon.memory()
    return [
        Row.limit(
            f"memory with {scale.leases} leases",
            used[scale.leases],
            "MB",
            used[0],
            150,
            f"PSS of master and worker; if nothing else mapped their libraries: {alone[scale.leases]:.0f} MB"
            f" (with none {alone[0]:.0f} MB)",
        )
    ]


def start(stage: Stage, scale: Scale) -> list[Row]:
    """From the start of the process to the first address of a network that it had before."""
    full, empty = stage.fresh_keys(), stage.fresh_keys()
    stage.fill(full, LAN, scale.leases)
    times: dict[Keys, list[float]] = {full: [], empty: []}
    daemons = {keys: stage.daemon(keys) for keys in times}
    pool_ids = {}
    try:
        for keys, daemon in daemons.items():
            daemon.start()
            daemon.wait_until_serving()
            pool_ids[keys] = daemon.docker.request_pool(LAN)
            daemon.stop()
        for _ in range(scale.starts):
            for keys, daemon in daemons.items():
                begin = time.perf_counter()
                daemon.start()
                daemon.first_address(pool_ids[keys])
                times[keys].append(time.perf_counter() - begin)
                daemon.stop()
    finally:
        for daemon in daemons.values():
            daemon.kill()
    return [
        Row.limit(
            f"start with {scale.leases} leases until the first address",
            median(times[full]),
            "s",
            median(times[empty]),
            3,
            f"medians of {scale.starts}; slowest {max(times[full]):.2f} s",
        )
    ]
