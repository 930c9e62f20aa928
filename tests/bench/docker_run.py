"""`docker run` with this driver / with Docker's own, on a real engine in the lab."""

from __future__ import annotations

import random

from tests.lab import Host, Lab, missing

from .measure import Row, Samples, Scale, seconds
from .stage import Stage

OURS, DOCKERS = "ours", "dockers"


def docker_run(stage: Stage, scale: Scale) -> list[Row]:
    """From the command to the container that runs, on two bridge networks of one host, taking turns.

    The lab has an etcd of its own, on the same disk as the stage.
    """
    if reason := missing():
        print(f"docker-run: left out: {reason}")
        return []
    with Lab(hosts=1, machines=0, daemon=True, config={"probe": "off"}, directory=stage.directory) as lab:
        (host,) = lab.hosts
        # Docker makes a bridge for each, so that the driver is all that differs.
        host.docker("network", "create", "--ipam-driver", "ipam-plugin", "--subnet", "198.18.0.0/24", OURS)
        host.docker("network", "create", "--subnet", "198.19.0.0/24", DOCKERS)
        for network in (OURS, DOCKERS):
            run(host, network)
        samples = {OURS: Samples(), DOCKERS: Samples()}
        draw = random.Random(1)
        for _ in range(scale.starts * 4):
            for network in draw.sample(list(samples), 2):
                samples[network].blocks.append([run(host, network)])
    what = "docker run, this driver / Docker's own, median"
    return [Row.ratio(what, samples[OURS], samples[DOCKERS], 0.5, 1.05, "no probing in this version")]


def run(host: Host, network: str) -> float:
    """Seconds of `docker run`; the container is removed afterwards, which is not counted."""
    took = seconds(lambda: host.docker("run", "-d", "--name", "bench", "--network", network, "busybox"))
    host.docker("rm", "-f", "bench")
    return took
