"""What the register, Docker and the wire say of this host, compared: each difference with its cause and its cure. Pure.

Nothing is taken for a difference that may only be on its way: a container counts as running when Docker said so before
and after the register was read, and as vanished when neither of the two looks knew its address.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from ipam_plugin import decisions
from ipam_plugin.addresses import Address, Range, parse_range, range_of
from ipam_plugin.decisions import FREE, Claim, InterfaceAddress
from ipam_plugin.errors import AddressTaken, BadRequest, PoolUnknown
from ipam_plugin.evidence import Attachment, Look
from ipam_plugin.evidence import Network as DockerNetwork
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    ROUTER,
    STANDBY,
    UNREADABLE,
    Container,
    Host,
    Keys,
    Lease,
    Pool,
    PoolUse,
    SegmentSettings,
    parse_time,
    rfc3339,
)

APART = 30.0  # seconds between two comparisons that prove together that something is gone
SETTLING = 30.0  # seconds in which what has just begun or ended may not be everywhere yet
DEAF = ("macvlan", "ipvlan")  # a host does not hear its own containers on such a network

Place = tuple[str, Address]
"""Segment and address."""
Answer = tuple[str, ...] | None
"""The MACs that answer for an address, () when there is silence on a living wire; None: not known."""


class Found(Protocol):
    """A lease and where it stands, as operations.py reads it."""

    @property
    def segment(self) -> str: ...
    @property
    def taken(self) -> Range: ...
    @property
    def address(self) -> Address: ...
    @property
    def lease(self) -> Lease: ...
    @property
    def key(self) -> str: ...
    @property
    def revision(self) -> int: ...


class PoolKey(NamedTuple):
    """A key under pools/, as it stands in etcd. `pool` and `use` are None where they cannot be read."""

    key: str
    revision: int
    pool_id: str
    pool: Pool | None
    host: str
    use: PoolUse | None


class Register(NamedTuple):
    """All of the register that is compared, as it was read."""

    leases: Sequence[Found]
    strays: Sequence[str]  # keys among the leases that name no address
    pools: Sequence[PoolKey]
    hosts: Mapping[str, Host]
    alive: frozenset[str]
    settings: Mapping[str, SegmentSettings | str]  # a text: why they cannot be read


class Engine(NamedTuple):
    """What Docker said before and after the register was read."""

    id: str
    networks: Mapping[str, DockerNetwork]  # in both looks, by id
    some: Sequence[DockerNetwork]  # in one look at least
    attachments: Sequence[Attachment]  # in both looks
    addresses: frozenset[Address]  # of containers on any network, in one look at least


class World(NamedTuple):
    """What is compared, and by whom. What could not be had is a text that says why."""

    host: str
    default_segment: str
    segments: frozenset[str]  # that the configuration of this host names
    grace: float  # docker.grace, seconds
    now: float  # seconds since the epoch
    register: Register
    engine: Engine | str
    carried: Sequence[InterfaceAddress] | str
    wire: Mapping[Place, Answer]  # what was asked
    unheard: Sequence[tuple[str, str]]  # segments and why their wire, or a part of it, was not compared


class Repair(NamedTuple):
    """One write that mends a difference, on condition that the key is as it was read."""

    key: str
    revision: int  # 0: nothing stands there
    value: Lease | PoolUse | None  # None: the key goes. A lease without a token gets a new one
    token: str = ""  # of what stands there
    ended: Lease | None = None  # the holder, for the history of the address
    twice: bool = False  # only when the same was found by an earlier comparison


class Difference(NamedTuple):
    """One difference, in one line. `address` is '' where it is about none, or about several."""

    segment: str
    address: str
    kind: str
    what: str
    cause: str
    cure: str
    repair: Repair | None = None

    def same(self, earlier: Difference) -> bool:
        """Whether the earlier comparison found this very difference: the same lease or use, not one like it."""
        mine, theirs = self.repair, earlier.repair
        return (
            mine is not None
            and theirs is not None
            and (self.kind, mine.key, mine.token) == (earlier.kind, theirs.key, theirs.token)
        )


def engine_between(before: Look, after: Look) -> Engine | str:
    """What is certain of an engine between two looks; or why nothing is."""
    if before.engine != after.engine:
        return f"another Docker Engine answered the second time ({before.engine}, then {after.engine})"
    networks = {each.id: each for each in after.networks}
    attached = {(each.network_id, each.address, each.container_id) for each in after.attachments}
    return Engine(
        id=after.engine,
        networks={each.id: networks[each.id] for each in before.networks if each.id in networks},
        some=(*before.networks, *after.networks),
        attachments=tuple(
            each for each in before.attachments if (each.network_id, each.address, each.container_id) in attached
        ),
        addresses=frozenset(
            {each.address for look in (before, after) for each in look.attachments} | before.elsewhere | after.elsewhere
        ),
    )


def compare(world: World, keys: Keys) -> list[Difference]:
    """Every difference, by segment and address; first what could not be compared."""
    found = _Comparison(world, keys)
    differences = [
        *found.containers(),
        *found.vanished(),
        *found.used_twice(),
        *found.strangers(),
        *found.pools(),
        *found.holders(),
        *found.own_addresses(),
        *found.holds(),
        *found.conflicts(),
        *found.hosts(),
        *found.unreadable(),
    ]
    return [*found.not_compared(), *sorted(differences, key=lambda each: (each.segment, each.address, each.kind))]


def places(world: World, keys: Keys) -> list[Place]:
    """The addresses that the wire is asked for, this host's own first."""
    mine = {each.pool.segment for each in world.register.pools if each.host == world.host and each.pool}
    mine |= {world.default_segment, *world.segments}
    engine = world.engine if isinstance(world.engine, Engine) else None
    compared = _Comparison(world, keys)
    own = (
        [(pool.segment, each.address) for each in engine.attachments for pool in compared.pools_of(each)]
        if engine
        else []
    )
    wanted = [
        each
        for each in world.register.leases
        if each.taken.size() == 1
        and each.segment in mine
        and each.lease.kind in (ENDPOINT, HOST, STANDBY, CONFLICT, HELD)
    ]
    wanted.sort(key=lambda each: each.lease.host != world.host)
    return list(dict.fromkeys([*own, *((each.segment, each.address) for each in wanted)]))


class _Comparison:
    """One comparison: the same values, by what they are looked up with."""

    def __init__(self, world: World, keys: Keys) -> None:
        self._world = world
        self._keys = keys
        self._host = world.host
        register = world.register
        self._engine = world.engine if isinstance(world.engine, Engine) else None
        self._carried = world.carried if not isinstance(world.carried, str) else None
        self._alone = [each for each in register.leases if each.taken.size() == 1]
        # The canonical key last: where an address stands there in two spellings, the daemon's counts.
        spelt = sorted(self._alone, key=lambda each: each.key == keys.lease(each.segment, each.address))
        self._leases = {(each.segment, each.address): each for each in spelt}
        self._ranges = [each for each in register.leases if each.taken.size() > 1]
        self._own_pools = [each for each in register.pools if each.host == self._host]
        self._attached: dict[Place, Attachment] = {}
        for each in self._engine.attachments if self._engine else ():
            found = self._place_of(each)
            if found is not None:
                self._attached[found[0].segment, each.address] = each
        self._macs = self._known_macs()

    # ------------------------------------------------------------------------------------- looking up

    def pools_of(self, attached: Attachment) -> list[Pool]:
        """The pools of a container's network that have its address; more than one where the default segment changed."""
        network = self._engine.networks.get(attached.network_id) if self._engine else None
        if network is None:
            return []
        return [each for each in self._pools(network) if range_of(each.subnet).contains(attached.address)]

    def _pools(self, network: DockerNetwork) -> list[Pool]:
        used = [each.pool for each in self._own_pools if each.pool and network.uses(each.pool)]
        return used or self._expected(network)

    def _expected(self, network: DockerNetwork) -> list[Pool]:
        """As RequestPool of this network would be answered now."""
        found = []
        for subnet, ip_range in network.subnets:
            try:
                found.append(Pool.make(subnet, ip_range, network.options, self._world.default_segment))
            except BadRequest:
                continue  # not as this driver was ever asked
        return found

    def _place_of(self, attached: Attachment) -> tuple[Pool, Found | None] | None:
        """The pool that a container's address is of, and the lease that stands there."""
        pools = self.pools_of(attached)
        held = [(pool, self._leases.get((pool.segment, attached.address))) for pool in pools]
        ours = [each for each in held if each[1] and each[1].lease.host == self._host]
        some = [each for each in held if each[1]]
        return next(iter([*ours, *some, *held]), None)

    def _known_macs(self) -> set[str]:
        register = self._world.register
        found = {mac for host in register.hosts.values() for mac in (*host.macs, *(a.mac for a in host.addresses))}
        found |= {each.lease.mac for each in register.leases if each.lease.kind != CONFLICT}
        found |= {each.mac for each in self._engine.attachments} if self._engine else set()
        found |= {each.mac for each in self._carried or ()}
        return {mac.lower() for mac in found} - {""}

    def _host_macs(self, name: str) -> set[str]:
        host = self._world.register.hosts.get(name)
        found = {*host.macs, *(each.mac for each in host.addresses)} if host else set()
        if name == self._host:
            found |= {each.mac for each in self._carried or ()}
        return {mac.lower() for mac in found} - {""}

    def _answer(self, place: Place) -> Answer:
        return self._world.wire.get(place)

    def _moves(self, place: Place) -> bool:
        segment, address = place
        settings = self._world.register.settings.get(segment)
        if not isinstance(settings, SegmentSettings):
            return False
        return any(parse_range(text).contains(address) for text in settings.moving)

    def _mine(self) -> set[str]:
        """The segments that this host is in."""
        return {self._world.default_segment, *self._world.segments} | {
            each.pool.segment for each in self._own_pools if each.pool
        }

    def _deaf(self, pool_id: str) -> bool:
        """Whether this host would not hear its own container there."""
        pool = next((each.pool for each in self._own_pools if each.pool_id == pool_id), None) or _parsed(pool_id)
        if pool is None or self._engine is None:
            return True
        drivers = {each.driver for each in self._engine.some if each.uses(pool)}
        return bool(drivers & set(DEAF)) if drivers else pool.gateway == "router"

    def _is_alive(self) -> bool:
        return self._host in self._world.register.alive

    def _age(self, since: str) -> float | None:
        moment = parse_time(since)
        return None if moment is None else self._world.now - moment

    def _now(self) -> str:
        return rfc3339(datetime.datetime.fromtimestamp(self._world.now, datetime.UTC))

    def _release(self, place: Place, force: bool = True) -> str:
        return self._command("release", place) + (" --force" if force else "")

    def _command(self, name: str, place: Place) -> str:
        segment, address = place
        return f"ipam-plugin {name} {address}" + (
            f" --segment {segment}" if segment != self._world.default_segment else ""
        )

    # --------------------------------------------------------------------- containers and their leases

    def not_compared(self) -> Iterator[Difference]:
        if isinstance(self._world.engine, str):
            yield Difference(
                "", "", "not_compared", f"not compared: the containers of this host: {self._world.engine}",
                "dockerd is not running, or this user may not use its socket (docker.socket)",
                "systemctl status docker; run this command as root",
            )  # fmt: skip
        if isinstance(self._world.carried, str):
            yield Difference(
                "", "", "not_compared", f"not compared: the addresses of this host's interfaces: {self._world.carried}",
                "the kernel did not list them in time", "try again",
            )  # fmt: skip
        for segment, why in self._world.unheard:
            yield Difference(
                segment, "", "not_compared", f"not compared: the wire: {why}",
                "without the wire, silence proves nothing and a second machine is not found",
                "mend what it names, then check again",
            )  # fmt: skip

    def containers(self) -> Iterator[Difference]:
        """Running containers whose address is not theirs in the register."""
        for (segment, address), attached in self._attached.items():
            found = self._place_of(attached)
            assert found is not None
            pool, held = found
            place = (segment, address)
            who = _who(attached)
            fresh = self._lease_for(attached, pool)
            if held is None:
                by_range = next((each for each in self._ranges if _covers(each, place)), None)
                if by_range is not None:
                    yield Difference(
                        segment, str(address), "wrong_lease",
                        f"{who} has {address}, which the etcd key {by_range.key!a} takes for something else",
                        "it was reserved while the container had it",
                        f"delete that key, or remove the container: docker rm --force {attached.container}",
                    )  # fmt: skip
                    continue
                yield Difference(
                    segment, str(address), "no_lease",
                    f"{who} has {address}, and the register has no lease for it",
                    "etcd was restored or its key deleted; another container could be given the address",
                    "ipam-plugin check --repair writes it",
                    Repair(self._keys.lease(segment, address), 0, fresh),
                )  # fmt: skip
                continue
            yield from self._of_container(place, attached, held, fresh)

    def _of_container(self, place: Place, attached: Attachment, held: Found, fresh: Lease) -> Iterator[Difference]:
        segment, address = place
        lease, who = held.lease, _who(attached)
        if lease.kind == ENDPOINT and lease.host == self._host:
            known = lease.container.id if lease.container else ""
            other_mac = (
                lease.mac and attached.mac and lease.mac.lower() != attached.mac and not self._is_ipvlan(attached)
            )
            if not (other_mac or (known and attached.container_id and known != attached.container_id)):
                return
            now = msgspec.structs.replace(lease, mac=attached.mac or lease.mac, container=fresh.container)
            yield Difference(
                segment, str(address), "lease_differs",
                f"{who} has {address}, and its lease tells of {lease.told()}",
                "the address was given to this container while the release of the other never arrived",
                "ipam-plugin check --repair writes down the container that has it",
                Repair(held.key, held.revision, now, lease.token),
            )  # fmt: skip
        elif decisions.is_kept_for(lease, self._host):
            yield Difference(
                segment, str(address), "wrong_lease",
                f"{who} has {address}, and in the register it is only kept for it: {lease.told()}",
                "it was started while etcd was away, or etcd was restored, and the daemon has not written it yet",
                "let the daemon run, or: ipam-plugin check --repair makes it the container's lease",
                Repair(held.key, held.revision, fresh, lease.token, ended=lease),
            )  # fmt: skip
        elif lease.kind == CONFLICT and lease.mac and lease.mac.lower() == attached.mac:
            yield Difference(
                segment, str(address), "wrong_lease",
                f"{who} has {address}, and the register takes it for a stranger: {lease.told()}",
                "its lease was gone when a host tested the address, and the container answered",
                "ipam-plugin check --repair makes it the container's lease",
                Repair(held.key, held.revision, fresh, lease.token, ended=lease),
            )  # fmt: skip
        elif lease.kind == STANDBY and lease.host == self._host:
            yield Difference(
                segment, str(address), "wrong_lease",
                f"{who} has {address}, which is still standby of this host in the register",
                "it was started while etcd was away, and the daemon has not written it yet",
                "let the daemon run: it writes it as soon as etcd answers",
            )  # fmt: skip
        else:
            yield Difference(
                segment, str(address), "wrong_lease",
                f"{who} has {address}, but in the register it is taken: {lease.told()}",
                "the container ran on while its lease was lost (etcd restored, this host retired), and somebody else"
                " got the address",
                f"remove one of the two, here: docker rm --force {attached.container}",
            )  # fmt: skip

    def _is_ipvlan(self, attached: Attachment) -> bool:
        network = self._engine.networks.get(attached.network_id) if self._engine else None
        return network is not None and network.driver == "ipvlan"

    def _lease_for(self, attached: Attachment, pool: Pool) -> Lease:
        container = Container(
            name=attached.container, id=attached.container_id, image=attached.image, network=attached.network
        )
        return Lease(
            kind=ENDPOINT, host=self._host, mac=attached.mac, container=container, pool=pool.id, since=self._now()
        )

    def vanished(self) -> Iterator[Difference]:
        """Leases of containers of this host that Docker does not know."""
        if self._engine is None:
            return
        for place, held in self._leases.items():
            lease = held.lease
            if (lease.kind, lease.host) != (ENDPOINT, self._host) or held.address in self._engine.addresses:
                continue
            age = self._age(lease.since)
            if age is not None and 0 <= age < SETTLING:
                continue  # Docker may be starting it
            answer = None if self._deaf(lease.pool) and not self._answer(place) else self._answer(place)
            what = f"{held.address} has a lease of {lease.told()}, and Docker knows no container with it"
            repair = None
            if answer is None:
                what += "; whether it answers cannot be told"
                cause = "its release never arrived"
                cure = f"make sure that nothing uses it, then {self._release(place)}"
            elif not answer:
                what += "; nothing answers for it"
                cause = "its release never arrived: dockerd, the daemon or etcd was away"
                cure = f"ipam-plugin check --repair, or at once: {self._release(place)}"
                if age is not None and age >= self._world.grace and lease.token:
                    repair = Repair(held.key, held.revision, None, lease.token, ended=lease, twice=True)
                else:
                    cure = f"wait until it is older than docker.grace, then {cure}"
            elif lease.mac and lease.mac.lower() in answer:
                what += f"; its MAC {lease.mac} still answers"
                cause = "something of the container runs on, though Docker lost it"
                cure = f"find it (bridge fdb show) and end it, or restart dockerd; then {self._release(place)}"
            else:
                what += f"; MAC {', '.join(answer)} answers for it"
                cause = "its release never arrived, and another machine has taken the address"
                cure = f"{self._release(place)}; {self._command('reserve', place)} when that machine stays"
            yield Difference(*_at(place), "vanished", what, cause, cure, repair)

    # ------------------------------------------------------------------------------------- the wire

    def used_twice(self) -> Iterator[Difference]:
        """Addresses that another machine answers for than the one that the register or Docker knows."""
        cause = "two machines have one address"
        for place, held in self._leases.items():
            lease, attached = held.lease, self._attached.get(place)
            answer = self._answer(place)
            if not answer or self._moves(place):
                continue
            if attached is not None:
                expected = {attached.mac} if attached.mac else set()
                expected |= self._host_macs(self._host) if self._is_ipvlan(attached) else set()
                owner = f"{_who(attached)} (MAC {attached.mac})"
            elif lease.kind in (ENDPOINT, HOST) and lease.host != self._host:
                expected = {lease.mac.lower()} - {""}
                expected |= self._host_macs(lease.host) if expected or lease.kind == HOST else set()
                owner = lease.told()
            else:
                continue
            others = [mac for mac in answer if mac not in expected]
            if expected and others:
                yield Difference(
                    *_at(place), "used_twice",
                    f"{held.address} belongs to {owner}, and MAC {', '.join(others)} answers for it", cause,
                    "give the other machine another address, or remove the container and say"
                    f" {self._command('reserve', place)}",
                )  # fmt: skip

    def strangers(self) -> Iterator[Difference]:
        """Machines that nobody knows on addresses that a container could be given."""
        for place, answer in self._world.wire.items():
            held = self._leases.get(place)
            if not answer or place in self._attached or any(_covers(each, place) for each in self._ranges):
                continue
            unknown = [mac for mac in answer if mac not in self._macs]
            if held is None and unknown and self._in_a_pool(place):
                yield Difference(
                    *_at(place), "stranger",
                    f"{place[1]} is answered by MAC {', '.join(unknown)}, which nobody knows",
                    "a machine uses an address that is not reserved",
                    f"{self._command('reserve', place)}; ipam-plugin scan finds the others",
                )  # fmt: skip
            elif held is not None and held.lease.kind == STANDBY and held.lease.host == self._host and unknown:
                yield Difference(
                    *_at(place), "stranger",
                    f"{place[1]}, which is kept as standby of this host, is answered by MAC {', '.join(unknown)}",
                    "a machine has begun to use it", "a running daemon makes a conflict of it within two minutes",
                )  # fmt: skip

    def _in_a_pool(self, place: Place) -> bool:
        segment, address = place
        return any(
            each.pool.segment == segment and each.pool.candidates.contains(address)
            for each in self._world.register.pools
            if each.pool
        )

    def conflicts(self) -> Iterator[Difference]:
        for place, held in self._leases.items():
            if held.lease.kind == CONFLICT and place not in self._attached and self._answer(place) == ():
                yield Difference(
                    *_at(place), "conflict_silent",
                    f"{held.address} is kept from everybody for {held.lease.told()}, which does not answer now",
                    "the machine is gone, or switched off",
                    f"{self._release(place, force=False)} when it is gone; else it is asked again after its probation",
                )  # fmt: skip

    # ------------------------------------------------------------------------------------- pools

    def pools(self) -> Iterator[Difference]:
        """Keys under pools/ of this host, and the Docker networks that use them."""
        if self._engine is None:
            return
        for each in self._own_pools:
            if each.pool is None:
                continue
            low = sum(network.uses(each.pool) for network in self._engine.networks.values())
            high = len({network.id for network in self._engine.some if network.uses(each.pool)})
            token = each.use.token if each.use else ""
            old = each.use is not None and (self._age(each.use.since) or 0) >= self._world.grace
            if high == 0:
                repair = Repair(each.key, each.revision, None, token, twice=True) if old and token else None
                later = "" if repair else "when it is older than docker.grace, "
                yield Difference(
                    each.pool.segment, "", "pool_unused",
                    f"pool {each.pool_id} is used by this host in the register, and by no Docker network",
                    "the network was removed while the daemon or etcd was away",
                    f"{later}ipam-plugin check --repair",
                    repair,
                )  # fmt: skip
            elif each.use is not None and low == high and each.use.count != low:
                counted = msgspec.structs.replace(each.use, count=low)
                yield Difference(
                    each.pool.segment, "", "pool_count",
                    f"pool {each.pool_id} is used by {low} Docker networks of this host, the register counts"
                    f" {each.use.count}",
                    "a network was made or removed while the daemon or etcd was away",
                    "ipam-plugin check --repair",
                    Repair(each.key, each.revision, counted, token, twice=True),
                )  # fmt: skip
        for pool in dict.fromkeys(
            pool for network in self._engine.networks.values() for pool in self._expected_without_key(network)
        ):
            count = sum(pool in self._expected_without_key(each) for each in self._engine.networks.values())
            name = next(each.name for each in self._engine.networks.values() if pool in self._expected(each))
            use = PoolUse(
                host=self._host, segment=pool.segment, subnet=str(pool.subnet), range=str(pool.range or ""),
                options=pool.options(), since=self._now(), count=count,
            )  # fmt: skip
            yield Difference(
                pool.segment, "", "pool_missing",
                f"network {name} uses pool {pool.id}, and the register does not know that this host does",
                "etcd was restored or the key deleted",
                "ipam-plugin check --repair, or start a container on it: the daemon writes the key again",
                Repair(self._keys.pool(pool, self._host), 0, use),
            )  # fmt: skip

    def _expected_without_key(self, network: DockerNetwork) -> list[Pool]:
        """The pools of a network that no key of this host stands for, whatever its segment."""
        used = [each.pool for each in self._own_pools if each.pool and network.uses(each.pool)]
        subnets = {(each.subnet, each.range) for each in used}
        unread = {each.pool_id for each in self._own_pools}
        return [
            each
            for each in self._expected(network)
            if (each.subnet, each.range) not in subnets and each.id not in unread
        ]

    def holders(self) -> Iterator[Difference]:
        """Gateways and auxiliary addresses that this host holds for pools that no Docker network of it uses."""
        if self._engine is None:
            return
        for place, held in self._leases.items():
            lease = held.lease
            if lease.kind not in (ROUTER, HOST):
                continue
            for holder in lease.holders:
                pool = _parsed(holder.pool)
                if holder.host != self._host or pool is None or any(each.uses(pool) for each in self._engine.some):
                    continue
                claim = Claim(self._host, pool, held.address, self._now(), "")
                rest = decisions.drop_pool(lease, claim, self._is_carried(held.address), self._is_router(place))
                age = self._age(lease.since)
                repair = None
                if isinstance(rest, Lease) or (rest is FREE and age is not None and age >= self._world.grace):
                    value = rest if isinstance(rest, Lease) else None
                    repair = Repair(
                        held.key, held.revision, value, f"{lease.token}/{lease.change}", None if value else lease, True
                    )
                yield Difference(
                    *_at(place), "holder_unused",
                    f"{held.address} ({lease.kind}) is held by this host for pool {holder.pool}, which no Docker"
                    " network of it uses",
                    "the network was removed, or its creation failed, while the daemon or etcd was away",
                    "ipam-plugin check --repair" if repair else "ipam-plugin check --repair, when it is older than"
                    " docker.grace",
                    repair,
                )  # fmt: skip
                break  # the next one after this is mended: each is a write of the same key

    def _is_carried(self, address: Address) -> bool:
        # Where that cannot be told, it may be carried, and stays.
        return self._carried is None or any(each.address == address for each in self._carried)

    def _is_router(self, place: Place) -> bool:
        settings = self._world.register.settings.get(place[0])
        # Where they cannot be read it may be, and its lease stays.
        return isinstance(settings, str) or (settings is not None and place[1] in settings.routers())

    # ------------------------------------------------------------------------- the host's own addresses

    def own_addresses(self) -> Iterator[Difference]:
        if self._carried is None:
            return
        carried = {each.address for each in self._carried}
        used = self._engine.some if self._engine else ()
        for place, held in self._leases.items():
            lease = held.lease
            if (lease.kind, lease.host) != (HOST, self._host) or held.address in carried:
                continue
            pools = [pool for each in lease.holders if (pool := _parsed(each.pool))]
            if self._engine is None or any(network.uses(pool) for network in used for pool in pools) or lease.holders:
                continue  # Docker puts it on the bridge again; or it is told of as a holder
            age = self._age(lease.since)
            if age is not None and age < SETTLING:
                continue
            yield Difference(
                *_at(place), "address_lost",
                f"{held.address} is this host's own in the register ({lease.interface or 'no interface named'}), and no"
                " interface carries it",
                "the address was changed, or its bridge is gone",
                f"put it back (ip address add); or, when the host does not use it any more: {self._release(place)}",
            )  # fmt: skip
        for segment in sorted(self._mine()):
            subnets = {
                each.pool.subnet
                for each in self._world.register.pools
                if each.pool is not None and each.pool.segment == segment
            }
            for carrier in self._carried:
                place = (segment, carrier.address)
                pool = next((Pool(segment, each) for each in subnets if carrier.address in each), None)
                if pool is None or self._moves(place):
                    continue
                yield from self._own_address(place, pool, carrier)

    def _own_address(self, place: Place, pool: Pool, carrier: InterfaceAddress) -> Iterator[Difference]:
        segment, address = place
        found = self._leases.get(place)
        claim = Claim(self._host, pool, address, self._now(), "")
        try:
            decision = decisions.register_own(found.lease if found else None, claim, carrier)
        except AddressTaken as error:
            yield Difference(
                *_at(place), "own_address_taken", str(error), "two machines have one address", "change one of the two"
            )
            return
        if not isinstance(decision, Lease) or (found and (found.lease.kind, found.lease.host) == (HOST, self._host)):
            return  # another MAC or interface is no matter: the daemon writes it down
        if found is None and any(_covers(each, place) for each in self._ranges):
            return
        yield Difference(
            *_at(place), "own_address",
            f"{carrier.interface} of this host carries {address}, and the register has no lease for it",
            "the daemon does not run, or the address is new",
            "start the daemon, or ipam-plugin check --repair",
            Repair(
                found.key if found else self._keys.lease(segment, address), found.revision if found else 0, decision,
                found.lease.token if found else "", found.lease if found else None,
            ),
        )  # fmt: skip

    # ------------------------------------------------------------------------------ holds and hosts

    def holds(self) -> Iterator[Difference]:
        for place, held in self._leases.items():
            lease = held.lease
            over = parse_time(lease.until) if lease.until else None
            if (lease.kind, lease.host) != (HELD, self._host) or over is None or over + SETTLING > self._world.now:
                continue
            if place in self._attached:
                continue  # told of as its container's
            yield Difference(
                *_at(place), "hold_over",
                f"{held.address} is held for {_held_for(lease)} until {lease.until}, which is over",
                "no daemon has run since", "ipam-plugin check --repair, or start the daemon",
                Repair(held.key, held.revision, None, lease.token, ended=lease),
            )  # fmt: skip

    def hosts(self) -> Iterator[Difference]:
        register = self._world.register
        counts: Counter[str] = Counter()
        for each in self._alone:
            for name in {each.lease.host, *(holder.host for holder in each.lease.holders)} - {""}:
                counts[name] += 1
        for name, count in sorted(counts.items()):
            if name in register.alive or name == self._host:
                continue
            host = register.hosts.get(name)
            if host is None:
                yield Difference(
                    "", "", "unknown_host", f"{count} addresses are under the name {name}, which is no registered host",
                    "the host had another name, or its record was deleted",
                    f"ipam-plugin leases --host {name}; for those in nobody's use ipam-plugin release ADDRESS --force,"
                    " for reservations ipam-plugin unreserve ADDRESS",
                )  # fmt: skip
                continue
            since = f"since {host.absent}" if host.absent else "now"
            yield Difference(
                "", "", "host_gone", f"host {name} is not alive {since}, and {count} addresses of it stay taken",
                "it is off, cut off from etcd, or its daemon does not run",
                f"start it; when it is gone for good: ipam-plugin host retire {name}",
            )  # fmt: skip
        if self._is_alive():
            return
        yield Difference(
            "", "", "no_daemon", f"no daemon is alive under this host's name, {self._host}",
            "the service ipam-plugin does not run, or cannot reach etcd",
            "systemctl status ipam-plugin; journalctl -u ipam-plugin",
        )  # fmt: skip
        for place, held in self._leases.items():
            if (held.lease.kind, held.lease.host) == (STANDBY, self._host) and place not in self._attached:
                yield Difference(
                    *_at(place), "standby_alone",
                    f"{held.address} is standby of this host, and no daemon of it is alive",
                    "the daemon does not run, and keeps its stock for when it does",
                    f"start it; ipam-plugin uninstall gives all of it back, or this one: {self._release(place)}",
                )  # fmt: skip

    # ----------------------------------------------------------------------- what cannot be read

    def unreadable(self) -> Iterator[Difference]:
        register = self._world.register
        by_hand = "somebody wrote it by hand, or a newer version did"
        for each in register.leases:
            canonical = each.key == self._keys.lease(each.segment, each.address)
            if each.taken.size() == 1 and not canonical:
                yield Difference(
                    each.segment, str(each.address), "spelling",
                    f"{each.address} is taken by the etcd key {each.key!a}, which is not how this program writes it",
                    "somebody wrote it by hand",
                    f"write {self._keys.lease(each.segment, each.address)} instead: etcdctl del {each.key!a},"
                    f" then {self._command('reserve', (each.segment, each.address))}",
                )  # fmt: skip
            if each.lease.kind == UNREADABLE:
                yield Difference(
                    each.segment, str(each.taken), "unreadable",
                    f"{each.taken} is taken by {each.lease.told()}", by_hand,
                    f"ipam-plugin unreserve {each.taken} --segment {each.segment}, then reserve it again",
                )  # fmt: skip
        for key in register.strays:
            yield Difference(
                "", "", "no_address", f"the etcd key {key!a} names no address, so it keeps nothing from being given",
                "somebody wrote it by hand", f"etcdctl del {key!a}; ipam-plugin reserve ADDRESS",
            )  # fmt: skip
        for segment, settings in register.settings.items():
            if isinstance(settings, str):
                yield Difference(
                    segment, "", "settings_unreadable",
                    f"the settings of segment {segment} cannot be read, so nothing is given out in it: {settings}",
                    by_hand, f"mend the etcd key {self._keys.segment(segment)}",
                )  # fmt: skip
        for use in register.pools:
            if use.host == self._host and use.use is None:
                yield Difference(
                    "", "", "pool_unreadable", f"the etcd key {use.key!a} cannot be read", by_hand,
                    f"etcdctl del {use.key!a}; the daemon writes it again with the next container",
                )  # fmt: skip


def _at(place: Place) -> tuple[str, str]:
    return place[0], str(place[1])


def _who(attached: Attachment) -> str:
    name = attached.container or attached.container_id[:12] or "without a name"
    return f"container {name} on network {attached.network}"


def _held_for(lease: Lease) -> str:
    return f"container {lease.container.name}" if lease.container and lease.container.name else "a stopped container"


def _covers(found: Found, place: Place) -> bool:
    return found.segment == place[0] and found.taken.contains(place[1])


def _parsed(pool_id: str) -> Pool | None:
    try:
        return Pool.parse(pool_id)
    except PoolUnknown:
        return None
