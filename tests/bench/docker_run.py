"""`docker run` with this driver / with Docker's own, on real engines in the lab."""

from __future__ import annotations

import functools
import random

from tests.lab import Host, missing

from .measure import Row, Samples, Scale, median, seconds
from .stage import Stage
from .wire import POOL, USUAL, Count, lan, own, stocked

OURS, OFF, DOCKERS = "this driver", "this driver with probe off", "Docker's own"


def docker_run(stage: Stage, scale: Scale) -> list[Row]:
    """From the command to the container that runs, on hosts of one LAN, taking turns: one container at a time, each
    with an address from standby.
    """
    if reason := missing():
        print(f"docker-run: left out: {reason}")
        return []
    with lan(stage, {}, {}, machines=0) as lab:
        hosts = dict(zip((OURS, DOCKERS), lab.hosts, strict=True))
        networks(hosts)
        samples = {side: Samples() for side in hosts}
        draw = random.Random(1)
        for _ in range(scale.starts * 4):
            for side in draw.sample(list(hosts), len(hosts)):
                stocked(hosts[OURS], USUAL)
                counted = Count(hosts[side])
                samples[side].blocks.append(run(hosts[side], 1))
                assert counted.transactions("claim") == 0, "not from standby"
    what = "docker run, this driver / Docker's own, median"
    return [Row.ratio(what, samples[OURS], samples[DOCKERS], 0.5, 1.05, "probe full, each from standby")]


def starts(stage: Stage, scale: Scale) -> list[Row]:
    """Containers started one after another on one host, faster than the stock is filled: as it is installed, with
    probing off, and with Docker's own driver, taking turns. Each turn begins with a full stock.
    """
    if reason := missing():
        print(f"starts: left out: {reason}")
        return []
    with lan(stage, {}, {"probe": "off"}, {}, machines=0) as lab:
        hosts = dict(zip((OURS, OFF, DOCKERS), lab.hosts, strict=True))
        networks(hosts)
        samples = {side: Samples() for side in hosts}
        searched = []  # how many waited for a look, by turn
        draw = random.Random(1)
        for _ in range(scale.container_rounds):
            for side in draw.sample(list(hosts), len(hosts)):
                stocked(hosts[OURS], USUAL)
                counted = Count(hosts[side])
                samples[side].blocks.append(run(hosts[side], scale.containers))
                if side == OURS:
                    assert counted.transactions("grant") == scale.containers
                    searched.append(counted.transactions("claim"))
    totals = {side: median([sum(block) for block in each.blocks]) for side, each in samples.items()}
    count = scale.containers
    served = ", ".join(str(count - each) for each in searched)
    how = f"from standby {served} of {count} by turn, the others after a fast look"
    more = (totals[OURS] - totals[OFF]) / count
    what = f"docker run, {count} one after another"
    rows = []
    for side, told in ((OURS, how), (OFF, "")):
        compared = f"{side} / {DOCKERS}"
        rows += [
            Row.ratio(f"{what}, {compared}, median", samples[side], samples[DOCKERS], 0.5, None, told),
            Row.limit(f"{what}, {compared}, all", totals[side], "s", totals[DOCKERS], None, told, DOCKERS),
        ]
    cost = f"{more:.3f} s more per container; {how}"
    rows.append(Row.limit(f"{what}, {OURS} / {OFF}, all", totals[OURS], "s", totals[OFF], None, cost, "with probe off"))
    return rows


def networks(hosts: dict[str, Host]) -> None:
    """The network `bench` on each host's br0, and one container of it, started and removed."""
    for number, (side, host) in enumerate(hosts.items(), 1):
        driver = () if side == DOCKERS else ("--ipam-driver", "ipam-plugin")
        # A range for each: Docker's own driver knows nothing of the others.
        addresses = ("--subnet", POOL, "--ip-range", f"198.18.{64 * (number - 1)}.0/18")
        gateway = ("--gateway", own(POOL, number).partition("/")[0])
        host.docker(
            "network", "create", *driver, *addresses, *gateway, "-o", "com.docker.network.bridge.name=br0", "bench"
        )
        run(host, 1)


def run(host: Host, count: int) -> list[float]:
    """Seconds of each `docker run`, one after another. The containers are removed at the end, which is not counted."""
    names = [f"bench{number}" for number in range(count)]
    words = ("run", "-d", "--network", "bench", "--name")
    taken = [seconds(functools.partial(host.docker, *words, name, "busybox")) for name in names]
    host.docker("rm", "-f", *names, timeout=300)
    return taken
