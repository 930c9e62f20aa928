"""What dockerd says of the containers of this host, as values, and what follows from it for the register. Pure.

A look is complete or there is none: what an engine could not say is never taken for "nothing there".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ipam_plugin.addresses import Address
from ipam_plugin.addresses import Network as Subnet
from ipam_plugin.errors import BadRequest
from ipam_plugin.model import Container, Lease, Pool, parse_time

APART = 30.0  # seconds between the beginnings of two looks that have to agree before something is taken away
HURRIED = 60.0  # seconds for which looks come fast because something is not in order
SETTLED = 3.0  # seconds between two that have to agree before something is given: nobody loses by that


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

    def may_be_in(self, segment: str) -> bool:
        """Whether its addresses can be of this segment: one that names none may be in any."""
        return self.options.get("segment", segment) == segment

    def pools(self, default_segment: str) -> list[Pool]:
        """The pools that its subnets are, where it names no segment in the default one."""
        found = []
        for subnet, ip_range in self.subnets:
            try:
                found.append(Pool.make(subnet, ip_range, self.options, default_segment))
            except BadRequest:
                continue
        return found


class AnyNetwork(NamedTuple):
    """A Docker network, whatever driver gives its addresses. `bridge`: its interface, where it is of driver bridge."""

    name: str
    driver: str
    ipam: str
    subnets: tuple[Subnet, ...]
    bridge: str


class Installation(NamedTuple):
    """What an engine says of itself, and all its networks."""

    version: str
    networks: tuple[AnyNetwork, ...]


class Look(NamedTuple):
    """All that one engine said at one time. `began` and `ended` are seconds of time.monotonic()."""

    began: float
    ended: float
    engine: str  # the engine's ID
    networks: tuple[Network, ...]
    attachments: tuple[Attachment, ...]  # on these networks
    elsewhere: frozenset[Address]  # the addresses of containers on all other networks
    containers: Mapping[str, Known]  # by id, also the stopped ones


class OtherSubnet(NamedTuple):
    """A subnet of a Docker network, as it was typed or as the engine chose it; '' where it has none of it."""

    subnet: str
    ip_range: str
    gateway: str
    auxiliary: Mapping[str, str]  # name -> address


class OtherNetwork(NamedTuple):
    """A Docker network that has its addresses from another driver, and could have them from this one."""

    id: str
    name: str
    driver: str  # bridge, macvlan, ipvlan
    interface: str  # its bridge, or the parent of its containers' interfaces
    subnets: tuple[OtherSubnet, ...]
    options: Mapping[str, str]  # -o
    labels: Mapping[str, str] = {}
    ipv6: bool = False
    internal: bool = False
    attachable: bool = False


class Bearer(NamedTuple):
    """A container of such a network, and an address that it has there, or would ask for (None: it has none now)."""

    network_id: str
    network: str  # its name
    address: Address | None
    mac: str  # lower case; '' when it does not run
    container_id: str
    container: str  # its name
    image: str
    running: bool
    fixed: bool  # it asks for the address by `--ip`


class Others(NamedTuple):
    """What one engine has on networks with other drivers for their addresses."""

    networks: tuple[OtherNetwork, ...]
    bearers: tuple[Bearer, ...]


class Unclaimed(NamedTuple):
    """That no container of an engine could come back for an address that is held, as looks have found it."""

    engine: str  # the one whose containers count: the first that was asked
    since: float | None  # monotonic seconds; None: some container could come back, or it cannot be told
    is_over: bool  # two looks, APART, have found none


def unclaimed(before: Unclaimed | None, held: Lease, address: Address, look: Look) -> Unclaimed:
    """What one more look adds. Another engine than the first one knows nothing of the container that stopped."""
    if before is not None and before.engine != look.engine:
        return before._replace(since=None, is_over=False)
    if _may_return(held, address, look):
        return Unclaimed(look.engine, None, False)
    if before is None or before.since is None:
        return Unclaimed(look.engine, look.ended, False)
    return before._replace(is_over=look.began - before.since >= APART)


def _may_return(held: Lease, address: Address, look: Look) -> bool:
    """Whether a container exists that could come back for it, or whether there is no way to tell."""
    name, container_id = (held.container.name, held.container.id) if held.container else ("", "")
    if not (name or container_id or held.fixed):
        return True  # its MAC alone is known, and an engine does not tell those of stopped containers
    return container_id in look.containers or any(
        (name and each.name == name) or address in each.fixed for each in look.containers.values()
    )


# ------------------------------------------------------------------------------------------- the engine


class Kept(NamedTuple):
    """The engine whose word counts: the one that last showed containers on networks of this driver."""

    engine: str = ""  # '': none yet
    since: float = 0.0  # when it took another one's place, seconds since the epoch

    def after(self, look: Look, now: float) -> Kept:
        """Another engine counts from when it shows containers of ours; the first one ever, from its first network."""
        if not self.engine and (look.networks or look.attachments):
            return Kept(look.engine)
        if look.engine != self.engine and look.attachments:
            return Kept(look.engine, now)
        return self


# ------------------------------------------------------------------------------------------- addresses


class Held(NamedTuple):
    """An `endpoint` lease of this host."""

    segment: str
    address: Address
    lease: Lease


class Silence(enum.Enum):
    """What the wire has to say before a lease is freed of which Docker knows nothing."""

    NOT_ANSWERED = "nobody answers, or it cannot be told"
    WHERE_ASKED = "silence is proven, where the wire can be asked"
    PROVEN = "silence is proven"


class Gone(NamedTuple):
    """A lease whose container Docker does not know any more."""

    held: Held
    silence: Silence


class Naming(NamedTuple):
    """A lease, and what its container is called now."""

    held: Held
    container: Container
    mac: str


class Homeless(NamedTuple):
    """A container that runs with an address for which this host has no lease."""

    attachment: Attachment
    pool: Pool
    fixed: bool  # it asks for it by `--ip`


class Use(NamedTuple):
    """That this host uses a pool, as it stands in etcd. Without a key (token ''): it holds a gateway or auxiliary
    address for it."""

    pool: Pool
    counted: int  # networks
    token: str


class Miscounted(NamedTuple):
    use: Use
    networks: int  # that really use it


class Memory(NamedTuple):
    """What earlier looks of the same engine showed, each with when the first of them began (monotonic seconds)."""

    engine: str = ""
    missed: Mapping[tuple[str, Address, str], float] = {}  # leases, with their token
    homeless: Mapping[tuple[str, str, Address, str], float] = {}  # attachments
    miscounted: Mapping[tuple[str, str, int], float] = {}  # pools, with their token and the networks that use them
    unknown: Mapping[str, float] = {}  # pools that are used without a key


class Findings(NamedTuple):
    """What is to be done now."""

    gone: tuple[Gone, ...] = ()
    namings: tuple[Naming, ...] = ()
    homeless: tuple[Homeless, ...] = ()
    miscounted: tuple[Miscounted, ...] = ()
    unknown: tuple[Pool, ...] = ()  # pools that a network uses and that have no key
    unsettled: bool = False  # the next look should come soon
    complete: bool = True  # but for `homeless`, every container of the look has its lease


def silence_needed(look: Look, held: Held, kept: Kept) -> Silence | None:
    """What has to be heard for a lease to be nobody's by this look alone; None: the look says nothing against it.

    An engine that shows nothing at all may be another one, or one that has lost its memory
    (aws/amazon-vpc-cni-k8s#711); what was given before the engine changed may run under the one of before.
    """
    if look.engine != kept.engine or _shows(look, held):
        return None
    since = parse_time(held.lease.since)
    if since is None or since < kept.since:
        return Silence.PROVEN
    return Silence.NOT_ANSWERED if look.attachments else Silence.WHERE_ASKED


def compare(
    look: Look,
    leases: Sequence[Held],
    uses: Sequence[Use],
    before: Memory,
    *,
    seen: Callable[[Held], bool],
    kept: Kept,
    grace: float,
    now: float,
    default_segment: str,
    pending: Callable[[str, Address], bool],
) -> tuple[Findings, Memory]:
    """What follows from a look, and what is to be remembered for the next.

    `leases` are this host's as they are after the look; `seen` says of one whether it stood there, with the same
    token, before the look began. `uses` are the pools' keys as they were before the look. `grace` is in seconds, `now`
    in seconds since the epoch. `pending` says whether the journal has something about an address.

    A look that failed is none: it neither counts nor breaks the count of two.
    """
    if look.engine != before.engine:
        before = Memory(look.engine)
    missed: dict[tuple[str, Address, str], float] = {}
    gone: list[Gone] = []
    namings: list[Naming] = []
    for held in leases:
        attachment = _bearer(look, held)
        if attachment is not None:
            name = _naming(look, held, attachment, seen(held))
            if name is not None:
                namings.append(name)
            continue
        silence = silence_needed(look, held, kept)
        if silence is None or not seen(held) or pending(held.segment, held.address):
            continue
        key = (held.segment, held.address, held.lease.token)
        missed[key] = first = before.missed.get(key, look.began)
        if look.began - first >= APART and _is_old(held.lease, now, grace, look.began - first):
            gone.append(Gone(held, silence))

    homeless: dict[tuple[str, str, Address, str], float] = {}
    found: list[Homeless] = []
    waiting = False
    spots = {(held.segment, held.address) for held in leases}
    for each in look.attachments:
        pool = _pool_of(look, each, [use.pool for use in uses], default_segment)
        if pool is None or (pool.segment, each.address) in spots:
            continue
        if pending(pool.segment, each.address):
            waiting = True
            continue
        of = (each.network_id, each.container_id, each.address, each.mac)
        homeless[of] = first = before.homeless.get(of, look.began)
        if look.began - first >= SETTLED:
            known = look.containers.get(each.container_id)
            found.append(Homeless(each, pool, known is not None and each.address in known.fixed))
        else:
            waiting = True

    miscounted, unknown = _count(look, uses, default_segment) if look.engine == kept.engine else ([], [])
    counted = {
        (each.use.pool.id, each.use.token, each.networks): before.miscounted.get(
            (each.use.pool.id, each.use.token, each.networks), look.began
        )
        for each in miscounted
    }
    without_key = {pool.id: before.unknown.get(pool.id, look.began) for pool in unknown}
    findings = Findings(
        tuple(gone),
        tuple(namings),
        tuple(found),
        tuple(
            each
            for each in miscounted
            # Its `since` does not change with its count: a network that is just being made is told by the token.
            if look.began - counted[each.use.pool.id, each.use.token, each.networks] >= max(APART, grace)
        ),
        tuple(pool for pool in unknown if look.began - without_key[pool.id] >= SETTLED),
        unsettled=any(look.began - first < HURRIED for first in (*homeless.values(), *without_key.values())),
        complete=not waiting,
    )
    return findings, Memory(look.engine, missed, homeless, counted, without_key)


def _shows(look: Look, held: Held) -> bool:
    return held.address in look.elsewhere or _bearer(look, held) is not None


def _bearer(look: Look, held: Held) -> Attachment | None:
    """The container that has the lease's address, in its segment."""
    bearers = [
        each
        for each in look.attachments
        if each.address == held.address
        and any(network.may_be_in(held.segment) for network in look.networks if network.id == each.network_id)
    ]
    return next((each for each in bearers if each.mac == held.lease.mac), bearers[0] if bearers else None)


def _naming(look: Look, held: Held, attachment: Attachment, is_older: bool) -> Naming | None:
    """None when the lease says it already, or the engine does not say enough.

    A lease that `is_older` than the look may come from a backup, and say the MAC of an earlier container.
    """
    container = container_of(look, attachment)
    mac = (is_older and attachment.mac) or held.lease.mac or attachment.mac
    if container is None or (container, mac) == (held.lease.container, held.lease.mac):
        return None
    return Naming(held, container, mac)


def container_of(look: Look, attachment: Attachment) -> Container | None:
    """None for an endpoint whose container is not in this look (it has just begun, or is lost to the engine)."""
    known = look.containers.get(attachment.container_id)
    if known is None:
        return None
    return Container(name=known.name, id=attachment.container_id, image=known.image, network=attachment.network)


def _is_old(lease: Lease, now: float, grace: float, missed_for: float) -> bool:
    """By its own word; where the clock was set meanwhile that says nothing, and only what was seen counts."""
    since = parse_time(lease.since)
    return missed_for >= grace or (since is not None and now - since >= grace)


def _pool_of(look: Look, attachment: Attachment, used: Iterable[Pool], default_segment: str) -> Pool | None:
    """The pool of the network from which the container has the address."""
    network = next((each for each in look.networks if each.id == attachment.network_id), None)
    if network is None:
        return None
    known = [pool for pool in used if attachment.address in pool.subnet and network.uses(pool)]
    return next(iter([*known, *(p for p in network.pools(default_segment) if attachment.address in p.subnet)]), None)


def _count(look: Look, uses: Sequence[Use], default_segment: str) -> tuple[list[Miscounted], list[Pool]]:
    """The pools whose keys do not say how many networks use them, and those that are used without a key."""
    miscounted = []
    for use in uses:
        networks = sum(network.uses(use.pool) for network in look.networks)
        if networks != use.counted and (use.token or not networks):
            miscounted.append(Miscounted(use, networks))
    unknown: dict[str, Pool] = {}
    for network in look.networks:
        for pool in network.pools(default_segment):
            if not any(use.token and use.pool.subnet == pool.subnet and network.uses(use.pool) for use in uses):
                unknown[pool.id] = pool
    return miscounted, list(unknown.values())
