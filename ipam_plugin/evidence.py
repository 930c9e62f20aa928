"""What dockerd says of the containers of this host, as values, and what follows from it for the register. Pure.

A look is complete or there is none: what an engine could not say is never taken for "nothing there".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ipam_plugin.addresses import Address
from ipam_plugin.errors import BadRequest
from ipam_plugin.model import Pool


class Attachment(NamedTuple):
    """An address that a container has now, on one network."""

    network_id: str
    network: str  # its name
    address: Address
    mac: str  # lower case, '' where the engine names none
    container_id: str  # '' for an endpoint of which the engine knows no container any more
    container: str  # its name
    image: str


class Known(NamedTuple):
    """A container of this engine, running or not."""

    name: str
    image: str
    running: bool
    fixed: frozenset[Address]  # the addresses that `--ip` and `--ip6` ask for at each start


class Network(NamedTuple):
    """A Docker network that has its addresses from this driver."""

    id: str
    name: str
    driver: str  # bridge, macvlan, …
    subnets: tuple[tuple[str, str], ...]  # --subnet and --ip-range ('': none), as they were typed
    options: Mapping[str, str]  # --ipam-opt

    def uses(self, pool: Pool) -> bool:
        """Whether RequestPool of this network was answered with this pool.

        The network need not name its segment, and the default one may have changed since.
        """
        for subnet, ip_range in self.subnets:
            try:
                if Pool.make(subnet, ip_range, self.options, pool.segment).id == pool.id:
                    return True
            except BadRequest:
                continue  # not as this driver was ever asked
        return False


class Look(NamedTuple):
    """All that one engine said at one time. `began` and `ended` are seconds of time.monotonic()."""

    began: float
    ended: float
    engine: str  # the engine's ID
    networks: tuple[Network, ...]
    attachments: tuple[Attachment, ...]  # on these networks
    elsewhere: frozenset[Address]  # the addresses of containers on all other networks
    containers: Mapping[str, Known]  # by id, also the stopped ones
