"""A LAN of Docker hosts on one machine: `with Lab(hosts=3) as lab: lab.hosts[0].docker("ps")`.

By hand: `python -m tests.lab up`, then `python -m tests.lab sh host1`, then `python -m tests.lab down`.
"""

from .lab import Lab, missing
from .machines import (
    DAEMON,
    DAEMON_SOCKET,
    DOCKER_SOCKET,
    ROUTER4,
    ROUTER6,
    SUBNET4,
    SUBNET6,
    Etcd,
    Host,
    Live,
    Machine,
    Sighting,
)
from .node import Command, CommandError, CommandTimeout, LabError, Result, Service, Switch, until

__all__ = [
    "DAEMON",
    "DAEMON_SOCKET",
    "DOCKER_SOCKET",
    "ROUTER4",
    "ROUTER6",
    "SUBNET4",
    "SUBNET6",
    "Command",
    "CommandError",
    "CommandTimeout",
    "Etcd",
    "Host",
    "Lab",
    "LabError",
    "Live",
    "Machine",
    "Result",
    "Service",
    "Sighting",
    "Switch",
    "missing",
    "until",
]
