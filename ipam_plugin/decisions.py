"""What may become of one address: a lease as it stands, a request, and the lease it turns into. Pure.

Every function takes the lease that stands in etcd (None: the address is free) and returns what has to stand
there next: a Lease, FREE, or KEEP when nothing has to be written. It raises AddressTaken, naming the holder.
register.py makes the transaction of it; the same functions decide again when the transaction found another lease.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import msgspec

from ipam_plugin.addresses import Address
from ipam_plugin.errors import AddressTaken, Refused
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    RESERVED,
    ROUTER,
    STANDBY,
    UNREADABLE,
    Container,
    Holder,
    Lease,
    Pool,
    later,
)


class Outcome(enum.Enum):
    KEEP = "keep"  # nothing has to be written
    FREE = "free"  # the key goes, the holder is remembered in the history


KEEP = Outcome.KEEP
FREE = Outcome.FREE
Decision = Lease | Outcome


class InterfaceAddress(Protocol):
    """An address on an interface of this host, as interfaces.py reads it from the kernel."""

    @property
    def address(self) -> Address: ...
    @property
    def prefixlen(self) -> int: ...
    @property
    def interface(self) -> str: ...
    @property
    def mac(self) -> str: ...
    @property
    def bridge(self) -> bool: ...
    @property
    def temporary(self) -> bool: ...
    @property
    def deprecated(self) -> bool: ...
    @property
    def tentative(self) -> bool: ...


class Claim(NamedTuple):
    """Who asks for which address, when, and the token that a grant will carry."""

    host: str
    pool: Pool
    address: Address
    now: str  # RFC 3339
    token: str


def ends(before: Lease | None, after: Lease | None) -> bool:
    """Whether somebody had the address and has it no more, when `before` becomes `after`: then the history of the
    address says so, in the same transaction (design section 4).

    Nobody has what is standby. A machine that is looked at again is still the same one, and a container that comes
    back to what was held for it is told by the entry of its stop.
    """
    if before is None or before.kind == STANDBY:
        return False
    if after is None:
        return True
    if (before.kind, before.token) == (after.kind, after.token):
        return False
    if before.kind == CONFLICT and after.kind in (CONFLICT, STANDBY):
        return before.mac != after.mac
    return not (before.kind == HELD and after.kind == ENDPOINT and _comes_back(before, after))


def _comes_back(held: Lease, given: Lease) -> bool:
    """Whether the container that has it now is the one for which it was held, as a request tells them apart."""
    stopped = held.container.name if held.container else ""
    asking = given.container.name if given.container else ""
    if stopped and asking:
        return stopped == asking
    return given.fixed or (bool(given.mac) and given.mac == held.mac)


def why_ended(after: Lease) -> str:
    """Why the holder before ended, where what came after says it."""
    if after.kind == STANDBY:
        return f"nobody had it any more; host {after.host} claimed it"
    if after.kind == ENDPOINT:
        return f"given to {after.who()}"
    return f"replaced by {after.who()}"


def is_kept_for(lease: Lease | None, host: str) -> bool:
    """Whether an address is this host's own already though no container has it: held for one that stopped, or reserved
    for one that ran before its network had this driver (`ipam-plugin adopt`). Nobody else is given it meanwhile.
    """
    return lease is not None and lease.kind in (HELD, RESERVED) and bool(host) and lease.host == host


def _taken(claim: Claim, lease: Lease, cure: str = "") -> NoReturn:
    where = f"{claim.address} of pool {claim.pool}"
    raise AddressTaken(f"{where} is taken: {lease.told()}{f'; {cure}' if cure else ''}")


def _taken_by_own(claim: Claim, lease: Lease) -> NoReturn:
    _taken(claim, lease, f"if that container is gone, free it with: ipam-plugin release {claim.address} --force")


def _taken_by_hold(claim: Claim, lease: Lease) -> NoReturn:
    _taken(claim, lease, f"if it is not to return, end the hold with: ipam-plugin release {claim.address} --force")


def _taken_by_reservation(claim: Claim, lease: Lease) -> NoReturn:
    _taken(claim, lease, f"if that container is not to have it, say: ipam-plugin unreserve {claim.address}")


def _refuse_kept_for_another(lease: Lease | None, claim: Claim, container: Container | None) -> None:
    """Only a name can tell that: `--ip` without one is taken for the container that had the address before."""
    if lease is None or container is None or not (lease.kind == HELD or is_kept_for(lease, claim.host)):
        return
    expected = lease.container.name if lease.container else ""
    if expected and expected != container.name:
        (_taken_by_hold if lease.kind == HELD else _taken_by_reservation)(claim, lease)


def grant_endpoint(
    lease: Lease | None,
    claim: Claim,
    mac: str,
    container: Container | None,
    *,
    fixed: bool = False,
    known: bool = False,
) -> Decision:
    """An address for a container, chosen or (`fixed`) asked for by `--ip`.

    An `endpoint` lease of this very host is refused too: that nobody has it any more is proven by a look at
    dockerd, never by the request. `known`: the container will be recognised when it asks again.
    """
    if fixed:
        _refuse_kept_for_another(lease, claim, container)
    if (
        lease is None
        or (lease.kind in (HELD, STANDBY) and lease.host == claim.host)
        or (fixed and is_kept_for(lease, claim.host))
    ):
        return Lease(
            kind=ENDPOINT, host=claim.host, mac=mac, container=container,
            pool=claim.pool.id, since=claim.now, token=claim.token, fixed=fixed, known=known,
        )  # fmt: skip
    if lease.kind == ENDPOINT and lease.host == claim.host:
        _taken_by_own(claim, lease)
    if lease.kind == HELD:
        _taken_by_hold(claim, lease)
    _taken(claim, lease)


def claim_ahead(lease: Lease | None, claim: Claim, container: Container | None = None) -> Decision:
    """Claimed for this host, so that the wire can be asked for it; given to nobody yet.

    An explicit `--ip` may ask for an address where a stranger was seen once: it is looked at anew. What this host keeps
    for `container` is its own already (KEEP); what it keeps for another is refused.
    """
    _refuse_kept_for_another(lease, claim, container)
    if is_kept_for(lease, claim.host):
        return KEEP
    if lease is None or lease.kind == CONFLICT or (lease.kind == STANDBY and lease.host == claim.host):
        # The stranger stays in it until the wire has spoken, also when that does not come about.
        seen = lease if lease is not None and lease.kind == CONFLICT else Lease(kind=STANDBY)
        return Lease(
            kind=STANDBY, host=claim.host, pool=claim.pool.id, since=claim.now, token=claim.token,
            mac=seen.mac, vendor=seen.vendor,
        )  # fmt: skip
    if lease.kind == ENDPOINT and lease.host == claim.host:
        _taken_by_own(claim, lease)
    if lease.kind == HELD:
        _taken_by_hold(claim, lease)
    _taken(claim, lease)


def found_in_use(claim: Claim, mac: str, vendor: str) -> Lease:
    """What a claimed address becomes when a machine that is none of ours answers for it."""
    return Lease(kind=CONFLICT, mac=mac, vendor=vendor, by=claim.host, since=claim.now, token=claim.token)


def end_conflict(lease: Lease | None, claim: Claim, token: str) -> Decision:
    """The stranger was silent after the probation: any living daemon may say so (promise P3), of this very conflict."""
    return FREE if lease is not None and (lease.kind, lease.token) == (CONFLICT, token) else KEEP


def renew_conflict(lease: Lease | None, claim: Claim, token: str, again: Lease) -> Decision:
    """It answered, so its probation begins anew."""
    return again if lease is not None and (lease.kind, lease.token) == (CONFLICT, token) else KEEP


def share(lease: Lease | None, claim: Claim) -> Decision:
    """A gateway that is no Docker host's, or an auxiliary address: several hosts and networks use it at once.

    On engines of every version a replayed endpoint looks like an auxiliary address, hence the note in an
    `endpoint` lease of this host: the next release takes back that note only. A replay names the same pool; for
    another one the address is simply a container's, and the release of a note could not be told from its own.
    """
    if lease is None or lease.kind == CONFLICT or (lease.kind in (HELD, STANDBY) and lease.host == claim.host):
        # A conflict is the very machine that the operator now declares.
        holder = Holder(host=claim.host, pool=claim.pool.id)
        return Lease(kind=ROUTER, holders=(holder,), since=claim.now, token=claim.token)
    if lease.kind == ROUTER or (lease.kind == HOST and lease.host == claim.host):
        return _changed(lease, claim, holders=_more(lease.holders, claim))
    if lease.kind == ENDPOINT and lease.host == claim.host and lease.pool == claim.pool.id:
        return _changed(lease, claim, noted=max(0, lease.noted) + 1)
    if lease.kind in (HOST, RESERVED, UNREADABLE):
        return KEEP  # it is taken already, by whom it should be, and no network of Docker's gives it away
    _taken(claim, lease)


def grant_bridge(lease: Lease | None, claim: Claim, carrier: InterfaceAddress | None) -> Decision:
    """The address that Docker puts on this host's bridge; `carrier` is the interface that has it already, if any."""
    cure = (
        "Docker would put it on this host's bridge too. For a router use --aux-address"
        f" DefaultGatewayIPv{claim.address.version}={claim.address} instead of --gateway on a bridge network,"
        " or --ipam-opt gateway=router on macvlan and ipvlan"
    )
    if lease is None or (lease.kind in (HELD, STANDBY) and lease.host == claim.host):
        mine = (
            own_address(claim, carrier)
            if carrier
            else Lease(kind=HOST, host=claim.host, pool=claim.pool.id, since=claim.now)
        )
        return msgspec.structs.replace(mine, token=claim.token, holders=_more((), claim))
    if lease.kind == HOST and lease.host == claim.host:
        return _changed(lease, claim, holders=_more(lease.holders, claim))
    if carrier is not None:
        # As for any address that this host has: KEEP what says so in other words, or name both machines.
        own = register_own(lease, claim, carrier)
        return msgspec.structs.replace(own, holders=_more((), claim)) if isinstance(own, Lease) else own
    _taken(claim, lease, cure)


def own_address(claim: Claim, carrier: InterfaceAddress) -> Lease:
    return Lease(
        kind=HOST, host=claim.host, mac=carrier.mac, interface=carrier.interface, since=claim.now, token=claim.token
    )


def register_own(lease: Lease | None, claim: Claim, carrier: InterfaceAddress) -> Decision:
    """An address that an interface of this host carries. Nothing of anybody else's is overwritten.

    A reservation stays: the operator who wrote it down knew of the machine. So does a lease of this host that
    says the same already.
    """
    if lease is None or (lease.kind in (HELD, STANDBY) and lease.host == claim.host):
        return own_address(claim, carrier)
    if lease.kind == HOST and lease.host == claim.host:
        if (lease.mac, lease.interface) == (carrier.mac, carrier.interface):
            return KEEP
        return msgspec.structs.replace(lease, mac=carrier.mac, interface=carrier.interface)
    if lease.kind == HOST and lease.mac and lease.mac == carrier.mac and not lease.holders:
        return own_address(claim, carrier)  # this very interface, from when the host had another name
    if lease.kind in (RESERVED, UNREADABLE, ROUTER):
        return KEEP
    if lease.kind == CONFLICT and lease.mac and lease.mac == carrier.mac:
        return own_address(claim, carrier)
    raise AddressTaken(
        f"{carrier.interface} of host {claim.host} carries {claim.address} (MAC {carrier.mac}), but in the register"
        f" it is taken: {lease.told()}. Two machines use one address: change one of them"
    )


def lost_address(lease: Lease | None, claim: Claim) -> Decision:
    """No interface of this host carries it any more: the address of a bridge that Docker made for a network that is
    gone is free. (Engines release it while the bridge still stands.) One that the host had by itself may be another
    machine's by now: see `end_own_address`."""
    if lease is None or (lease.kind, lease.host) != (HOST, claim.host) or not lease.pool or lease.holders:
        return KEEP
    return FREE


def end_own_address(lease: Lease | None, claim: Claim, token: str, carried: bool) -> Decision:
    """This host's own address is gone: for long no interface has carried it, and nobody answers for it (P3, by proof).

    `carried`: one has it again. What a network of Docker's uses goes with that network.
    """
    if lease is None or (lease.kind, lease.host, lease.token) != (HOST, claim.host, token) or not token:
        return KEEP
    return KEEP if carried or lease.holders else FREE


def give_back(
    lease: Lease | None, claim: Claim, token: str, carried: bool, kept_router: bool, hold: float = 0.0
) -> Decision:
    """ReleaseAddress. Only the lease whose token was known when the request arrived, only what this host holds.

    `carried`: an interface of this host still has the address (Docker leaves its address on a bridge that the
    user made). `kept_router`: it is the segment's own router, whose lease never goes. `hold`: seconds for which the
    address of a container that can be recognised is kept for it; `docker stop` and `docker rm` look the same here.
    """
    if lease is None or lease.token != token:
        return KEEP
    if lease.kind == ROUTER or (lease.kind == HOST and lease.host == claim.host):
        rest = _fewer(lease.holders, claim)
        if rest == lease.holders:
            return KEEP
        return _without(lease, claim, rest, carried, kept_router)
    if lease.kind == ENDPOINT and lease.host == claim.host and lease.pool == claim.pool.id:
        if lease.noted > 0:
            return _changed(lease, claim, noted=lease.noted - 1)
        if carried:
            return Lease(kind=HOST, host=claim.host, mac=lease.mac, since=claim.now, token=claim.token)
        if hold > 0 and (lease.fixed or lease.known):
            return Lease(
                kind=HELD, host=claim.host, mac=lease.mac, container=lease.container, pool=lease.pool,
                since=claim.now, token=claim.token, fixed=lease.fixed, known=lease.known,
                until=later(claim.now, hold),
            )  # fmt: skip
        return FREE
    return KEEP


def settle_given(lease: Lease | None, claim: Claim, given: Lease, tokens: frozenset[str]) -> Decision:
    """An address that was given while etcd was away: from standby, or from its own release (`tokens`).

    Free by an operator's word meanwhile, it is still in use here. Raises AddressTaken, when it is another's by now.
    """
    if lease is None:
        return given
    if lease.host == claim.host and lease.token == given.token:
        return KEEP
    if lease.host == claim.host and lease.token in tokens:
        return given
    _taken(claim, lease)


def settle_released(
    lease: Lease | None, claim: Claim, tokens: frozenset[str], release: Callable[[Lease, Claim, str], Decision]
) -> Decision:
    """An address that was released while etcd was away, and perhaps given from standby before that. `release` is what
    a release becomes while etcd is there (`give_back`).
    """
    if lease is None or lease.token not in tokens:
        return KEEP
    if lease.kind == STANDBY:
        return FREE if lease.host == claim.host else KEEP
    return release(lease, claim, lease.token)


def is_held_for(lease: Lease, pool: Pool, mac: str, container: Container | None) -> bool:
    """Whether a container that asks for any address is the one for which this is held: its name says so, or its MAC
    does and no name contradicts."""
    if lease.kind != HELD or lease.pool != pool.id:
        return False
    asking = container.name if container else ""
    stopped = lease.container.name if lease.container else ""
    if asking and stopped:
        return asking == stopped
    return bool(mac) and mac == lease.mac


def end_hold(lease: Lease | None, claim: Claim, token: str) -> Decision:
    """This very hold of this host is over."""
    mine = lease is not None and (lease.kind, lease.host, lease.token) == (HELD, claim.host, token)
    return FREE if mine else KEEP


def drop_pool(lease: Lease | None, claim: Claim, carried: bool, kept_router: bool) -> Decision:
    """The last ReleasePool of this host: its gateway and auxiliary holdings go, endpoints never do."""
    if lease is None or not (lease.kind == ROUTER or (lease.kind == HOST and lease.host == claim.host)):
        return KEEP
    rest = tuple(each for each in lease.holders if (each.host, each.pool) != (claim.host, claim.pool.id))
    if rest == lease.holders:
        return KEEP
    return _without(lease, claim, rest, carried, kept_router)


def end_orphan(lease: Lease | None, claim: Claim, token: str, carried: bool) -> Decision:
    """Docker has no container with the address any more: exactly that lease ends, whatever was noted in it."""
    if lease is None or (lease.kind, lease.host, lease.token) != (ENDPOINT, claim.host, token):
        return KEEP
    return Lease(kind=HOST, host=claim.host, mac=lease.mac, since=claim.now, token=claim.token) if carried else FREE


def name_container(lease: Lease | None, claim: Claim, token: str, container: Container, mac: str) -> Decision:
    """For operators: who has the address, as Docker calls it now. The grant stays the same one."""
    if lease is None or (lease.kind, lease.host, lease.token) != (ENDPOINT, claim.host, token):
        return KEEP
    named = msgspec.structs.replace(lease, container=container, mac=mac or lease.mac)
    return KEEP if named == lease else named


def restore_endpoint(lease: Lease | None, claim: Claim, mac: str, container: Container | None, fixed: bool) -> Decision:
    """A container that runs has the address, and the register does not know (it came back from a backup).

    A `conflict` with its very MAC is what another host found when it asked for the address meanwhile. A reservation for
    a container of this host is from before its network had this driver.
    """
    if lease is not None and lease.host == claim.host and lease.kind == ENDPOINT:
        return KEEP
    if lease is not None and lease.kind == ROUTER and any(each.host == claim.host for each in lease.holders):
        return KEEP  # an engine that lost our capabilities asked for it as for an auxiliary address
    if (
        lease is None
        or (lease.kind in (HELD, STANDBY) and lease.host == claim.host)
        or is_kept_for(lease, claim.host)
        or (lease.kind == CONFLICT and lease.mac and lease.mac == mac)
    ):
        return Lease(
            kind=ENDPOINT, host=claim.host, mac=mac, container=container, pool=claim.pool.id,
            since=claim.now, token=claim.token, fixed=fixed,
        )  # fmt: skip
    _taken(claim, lease)


def without_orphan(lease: Lease | None, claim: Claim) -> Decision:
    """What remains of a lease whose grant was refused although it was written: nothing, or what others hold of it."""
    if lease is None:
        return KEEP
    if lease.kind not in (ROUTER, HOST):
        return FREE
    rest = _fewer(lease.holders, claim)
    if not rest:
        return FREE
    return KEEP if rest == lease.holders else _changed(lease, claim, holders=rest)


def _without(lease: Lease, claim: Claim, rest: tuple[Holder, ...], carried: bool, kept_router: bool) -> Decision:
    kept = carried if lease.kind == HOST else kept_router
    if rest or kept:
        return _changed(lease, claim, holders=rest)
    return FREE


def _changed(lease: Lease, claim: Claim, **changes: Any) -> Lease:
    """The lease with these changes, unlike any other write: two that count one up at once must not look the same."""
    return msgspec.structs.replace(lease, **changes, change=claim.token)


def _more(holders: tuple[Holder, ...], claim: Claim) -> tuple[Holder, ...]:
    mine = (claim.host, claim.pool.id)
    if not any((each.host, each.pool) == mine for each in holders):
        return (*holders, Holder(host=claim.host, pool=claim.pool.id))
    return tuple(
        msgspec.structs.replace(each, count=each.count + 1) if (each.host, each.pool) == mine else each
        for each in holders
    )


def _fewer(holders: tuple[Holder, ...], claim: Claim) -> tuple[Holder, ...]:
    mine = (claim.host, claim.pool.id)
    return tuple(
        msgspec.structs.replace(each, count=each.count - 1) if (each.host, each.pool) == mine else each
        for each in holders
        if (each.host, each.pool) != mine or each.count > 1
    )


def bridge_address(
    carried: Sequence[InterfaceAddress], pool: Pool, asked: Address | None, host: str, usual: str = ""
) -> InterfaceAddress | None:
    """Which address of this host's own becomes the gateway of a bridge network; None: no interface has one there.

    Docker takes the first address of the bridge that lies in the subnet and, where address *and* mask are not
    the gateway's, deletes it from the bridge: that cuts the host off its LAN. So whatever would make Docker do so
    is refused here, with the cure. `carried` is in the kernel's order, `usual` the interface that the configuration
    names for the segment. Raises Refused.
    """
    inside = [each for each in carried if each.address in pool.subnet]
    steady = [each for each in inside if not (each.temporary or each.deprecated or each.tentative)]
    inside = steady or inside
    interface = pool.interface or usual
    if interface and inside:
        named = [each for each in inside if each.interface == interface]
        if not named:
            raise Refused(
                f"interface {interface} of host {host} carries no address in {pool.subnet}, but"
                f" {inside[0].interface} does ({inside[0].address}): name that one, or none, with --ipam-opt"
                " interface= or in the configuration"
            )
        inside = named
    if not inside:
        # Where no address of a bridge lies in the subnet, Docker takes the bridge's first one, and deletes it.
        for each in carried:
            lan = ipaddress.ip_interface(f"{each.address}/{each.prefixlen}").network
            if lan.version == pool.subnet.version and lan.overlaps(pool.subnet):
                if not each.bridge:
                    raise _no_bridge(each, pool, host)
                raise Refused(
                    f"bridge {each.interface} of host {host} carries {each.address}/{each.prefixlen}, of which"
                    f" {pool.subnet} is a part: Docker would delete that address from the bridge."
                    f" Say --subnet {lan} --ip-range {pool.range or pool.subnet}"
                )
        return None
    bridges = [each for each in inside if each.bridge]
    if not bridges:
        raise _no_bridge(inside[0], pool, host)
    ahead = next((each.interface for each in bridges if each.address == asked), bridges[0].interface)
    first = next(each for each in bridges if each.interface == ahead)
    if asked is not None and asked != first.address:
        raise Refused(
            f"--gateway {asked}: bridge {first.interface} of host {host} carries {first.address}, which Docker would"
            f" delete for the sake of another gateway. Leave --gateway out, or say --gateway {first.address}; for a"
            f" router use --aux-address DefaultGatewayIPv{asked.version}={asked}"
        )
    if first.prefixlen != pool.subnet.prefixlen:
        lan = ipaddress.ip_interface(f"{first.address}/{first.prefixlen}").network
        narrowed = f" --ip-range {pool.range or pool.subnet}" if lan.prefixlen < pool.subnet.prefixlen else ""
        raise Refused(
            f"bridge {first.interface} of host {host} carries {first.address}/{first.prefixlen}, not"
            f" /{pool.subnet.prefixlen}: Docker would delete that address from the bridge."
            f" Say --subnet {lan}{narrowed}"
        )
    return first


def _no_bridge(carrier: InterfaceAddress, pool: Pool, host: str) -> Refused:
    return Refused(
        f"{carrier.interface} of host {host} carries {carrier.address}/{carrier.prefixlen} in the LAN of {pool.subnet}"
        " and is no bridge: Docker would make a second way into the same LAN. For macvlan and ipvlan say --ipam-opt"
        " gateway=router; for a bridge network put the interface into a bridge that carries the address and say"
        " -o com.docker.network.bridge.name=BRIDGE"
    )
