"""What dockerd says of the containers of this host, as values, and what follows from it for the register. Pure.

A look is complete or there is none: what an engine could not say is never taken for "nothing there".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ipam_plugin.addresses import Address
from ipam_plugin.errors import BadRequest
from ipam_plugin.model import Lease, Pool

HOLD_LOOKS_APART = 30.0  # seconds between two looks that end a hold


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


class Unclaimed(NamedTuple):
    """That no container of an engine could come back for an address that is held, as looks have found it."""

    engine: str  # the one whose containers count: the first that was asked
    since: float | None  # monotonic seconds; None: some container could come back, or it cannot be told
    is_over: bool  # two looks, HOLD_LOOKS_APART, have found none


def unclaimed(before: Unclaimed | None, held: Lease, address: Address, look: Look) -> Unclaimed:
    """What one more look adds. Another engine than the first one knows nothing of the container that stopped."""
    if before is not None and before.engine != look.engine:
        return before._replace(since=None, is_over=False)
    if _may_return(held, address, look):
        return Unclaimed(look.engine, None, False)
    if before is None or before.since is None:
        return Unclaimed(look.engine, look.ended, False)
    return before._replace(is_over=look.began - before.since >= HOLD_LOOKS_APART)


def _may_return(held: Lease, address: Address, look: Look) -> bool:
    """Whether a container exists that could come back for it, or whether there is no way to tell."""
    name, container_id = (held.container.name, held.container.id) if held.container else ("", "")
    if not (name or container_id or held.fixed):
        return True  # its MAC alone is known, and an engine does not tell those of stopped containers
    return container_id in look.containers or any(
        (name and each.name == name) or address in each.fixed for each in look.containers.values()
    )
