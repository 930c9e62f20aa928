"""`make demo`: a LAN of three Docker hosts on this machine, containers on all of them, and who can reach whom."""

from __future__ import annotations

import sys
import time

from tests.lab import ROUTER4, SUBNET4, Host, Lab, missing

CREATE = (
    f"network create --driver bridge --ipam-driver ipam-plugin --subnet {SUBNET4}"
    f" --aux-address DefaultGatewayIPv4={ROUTER4} -o com.docker.network.bridge.name=br0 lan"
)
RUN = "run --detach --network lan --name {name} busybox"
CONTAINERS = 4  # on each host


def say(text: str = "") -> None:
    print(text, flush=True)


def main() -> int:
    why = missing()
    if why is not None:
        say(f"the demo cannot run here: {why}")
        return 1
    say("Three Docker hosts with a bridge br0, two machines without Docker, a router and an etcd, each in namespaces")
    say("of its own on one LAN, 192.168.77.0/24. They vanish at the end.")
    began = time.monotonic()
    with Lab(hosts=3, machines=2, etcd=1, router=True, daemon=True, config={"probe": "off"}) as lab:
        say(f"\nThe LAN is up after {time.monotonic() - began:.1f} s. The same command on every host:\n")
        say(f"  docker {CREATE}\n")
        for host in lab.hosts:
            host.docker(*CREATE.split())
        say(f"and {CONTAINERS} containers on every host, all at once:\n\n  docker {RUN.format(name='…')}\n")
        began = time.monotonic()
        started = [
            host.docker_async(*RUN.format(name=f"web{number}").split())
            for number in range(1, CONTAINERS + 1)
            for host in lab.hosts
        ]
        for command in started:
            command.result(120)
        live = lab.live()
        say(f"{len(live)} containers run after {time.monotonic() - began:.1f} s. Who has which address, from etcd:\n")
        say(lab.hosts[0].command("leases"))
        say()
        failures = 0
        for machine in lab.machines:
            reached = [each.address for each in live if machine.ping(each.address)]
            failures += len(live) - len(reached)
            say(f"ping from {machine.name}, which has no Docker: {len(reached)} of {len(live)} containers answer")
        for host in lab.hosts:
            failures += not all(machine.ping(host.address) for machine in lab.machines)
            failures += _ping_others(host, [each.address for each in live if each.host != host.name])
        unique = len({each.address for each in live})
        say(f"\n{unique} different addresses for {len(live)} containers, {failures} pings without an answer")
        return 0 if failures == 0 and unique == len(live) else 1


def _ping_others(host: Host, addresses: list[str]) -> int:
    loop = f"for a in {' '.join(addresses)}; do ping -c 1 -W 2 $a >/dev/null || echo $a; done"
    silent = host.docker("exec", "web1", "sh", "-c", loop, timeout=120).split()
    say(
        f"ping from a container on {host.name}: {len(addresses) - len(silent)} of {len(addresses)} on the others answer"
    )
    return len(silent)


if __name__ == "__main__":
    sys.exit(main())
