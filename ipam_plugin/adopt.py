"""Adopting a network that runs on another IPAM driver: what has to stand in the register before it is switched. Pure.

Docker's other driver will never call this one for the containers that it gave addresses to, so their addresses are no
`endpoint` leases yet, which a release or a look at dockerd ends. They are reservations that name the host and the
container: nobody else gets the address meanwhile, and `--ip` on that host, when the network has this driver, makes the
container's lease of it (decisions.is_kept_for).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from ipam_plugin.addresses import Address, Network, address_or_none, parse_network
from ipam_plugin.check import Found, Register
from ipam_plugin.decisions import InterfaceAddress
from ipam_plugin.evidence import Bearer, OtherNetwork
from ipam_plugin.explain import forbidding, own_addresses
from ipam_plugin.model import CONFLICT, ENDPOINT, HELD, RESERVED, STANDBY, Container, Lease

LEASE, RESERVE, KNOWN, CONFLICTING, NOT_ASKED = "lease", "reserve", "known", "conflict", "not_asked"


class Link(Protocol):
    """An interface of this host, as interfaces.py reads it from the kernel."""

    @property
    def name(self) -> str: ...
    @property
    def mac(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def master(self) -> str: ...


class World(NamedTuple):
    """What is compared: the networks that are to be adopted, and all that else may have their addresses."""

    host: str
    segment: str
    default_segment: str
    register: Register
    networks: Sequence[OtherNetwork]
    bearers: Sequence[Bearer]  # of these networks
    carried: Sequence[InterfaceAddress]
    links: Sequence[Link]
    wire: Mapping[Address, Sequence[str]]  # the MACs that answer, without those that answer for everything
    unheard: Sequence[tuple[str, str]] = ()  # subnets of which that is not known, and why


class Write(NamedTuple):
    """A reservation in place of what was found (None: nothing)."""

    address: Address
    found: Found | None
    lease: Lease


class Proposal(NamedTuple):
    """One address (or subnet), and what is to become of it: `lease` and `reserve` are written, `known` is so already,
    `conflict` and `not_asked` are for the operator, who finds the `cure`."""

    kind: str
    address: str
    container: str
    mac: str
    what: str
    cure: str = ""
    write: Write | None = None

    @property
    def stops(self) -> bool:
        """Whether nothing should be switched before this is cured."""
        return self.kind in (CONFLICTING, NOT_ASKED)


def why_no_lan(network: OtherNetwork, links: Sequence[Link]) -> str:
    """Why a network's containers are on no LAN with other machines, as a clause; '' when they are."""
    there = {each.name: each for each in links}
    if network.internal:
        return "it is internal"
    if network.interface not in there:
        return f"its interface {network.interface or '(none)'} is not there"
    if network.driver == "ipvlan" and network.options.get("ipvlan_mode", "l2") != "l2":
        return f"its mode is {network.options['ipvlan_mode']}, in which nobody on the LAN sees its containers"
    if network.driver != "bridge":
        return "its parent is no network card" if there[network.interface].kind == "dummy" else ""
    # Docker's ends of its containers' cables are named so; a port of any other name leads somewhere.
    ports = [each for each in links if each.master == network.interface and not each.name.startswith("veth")]
    return "" if ports else f"its bridge {network.interface} has no port but those of containers"


def propose(world: World, vendor_of: Callable[[str], str] = lambda mac: "") -> list[Proposal]:
    """What is to become of every address, in order; first what is wrong with the networks as a whole."""
    found = _Adoption(world, vendor_of)
    proposals = [*found.containers(), *found.machines(), *found.routers()]
    return [*found.not_asked(), *found.masks(), *sorted(proposals, key=lambda each: _order(each.address))]


def switch(world: World, network: OtherNetwork) -> list[str]:
    """The commands that give a network this driver, and its containers their addresses again."""
    members: dict[str, list[Address]] = {}
    for each in sorted(
        world.bearers, key=lambda each: (each.address is None, _order(str(each.address)), each.container)
    ):
        if each.network_id == network.id:
            members.setdefault(each.container, []).extend([each.address] if each.address is not None else [])
    name = shlex.quote(network.name)
    lines = [f"docker network disconnect {name} {shlex.quote(each)}" for each in members]
    lines += [f"docker network rm {name}", _create(world, network)]
    for container, addresses in members.items():
        fixed = "".join(f" --ip{'' if each.version == 4 else '6'} {each}" for each in addresses)
        lines.append(f"docker network connect{fixed} {name} {shlex.quote(container)}")
    return lines


def _create(world: World, network: OtherNetwork) -> str:
    words = ["docker network create --driver", network.driver, "--ipam-driver ipam-plugin"]
    words += ["--ipv6"] if network.ipv6 else []
    words += ["--attachable"] if network.attachable else []
    for each in network.subnets:
        words += ["--subnet", each.subnet]
        words += ["--ip-range", each.ip_range] if each.ip_range and each.ip_range != each.subnet else []
        # Left out on a bridge, it is each host's own address, so that the command is the same everywhere.
        words += ["--gateway", each.gateway] if each.gateway and network.driver != "bridge" else []
        words += [f"--aux-address {shlex.quote(f'{name}={address}')}" for name, address in each.auxiliary.items()]
    words += ["--ipam-opt gateway=router"] if network.driver != "bridge" else []
    words += [f"--ipam-opt segment={world.segment}"] if world.segment != world.default_segment else []
    words += [f"-o {shlex.quote(f'{name}={value}')}" for name, value in network.options.items()]
    words += [f"--label {shlex.quote(f'{name}={value}')}" for name, value in network.labels.items()]
    return " ".join([*words, shlex.quote(network.name)])


def subnets_of(network: OtherNetwork) -> dict[Network, str]:
    """A network's subnets, and the gateway of each as it was typed."""
    found = {}
    for each in network.subnets:
        try:
            found[parse_network(each.subnet)] = each.gateway
        except ValueError:
            continue
    return found


class _Adoption:
    def __init__(self, world: World, vendor_of: Callable[[str], str]) -> None:
        self._world = world
        self._vendor_of = vendor_of
        self._networks = {each.id: each for each in world.networks}
        register = world.register
        here = [each for each in register.leases if each.segment == world.segment]
        self._leases = {each.address: each for each in here if each.taken.size() == 1}
        self._ranges = [each for each in here if each.taken.size() > 1]
        self._bearers: dict[Address, list[Bearer]] = {}
        for each in world.bearers:
            if each.address is not None:
                self._bearers.setdefault(each.address, []).append(each)
        self._own = {each.address: each for each in world.carried}
        self._interface_macs = {each.name: each.mac.lower() for each in world.links}
        self._host_macs = {
            mac.lower(): name
            for name, host in register.hosts.items()
            for mac in (*host.macs, *(each.mac for each in host.addresses))
            if mac
        }

    # ----------------------------------------------------------------------------- networks as a whole

    def not_asked(self) -> Iterator[Proposal]:
        for subnet, why in self._world.unheard:
            yield Proposal(
                NOT_ASKED, subnet, "", "", f"who else is there is not known: {why}",
                "what it names, then again; machines that are not in the register could be given to containers",
            )  # fmt: skip

    def masks(self) -> Iterator[Proposal]:
        """Machines of one LAN that do not agree on its size cannot reach each other."""
        world = self._world
        told: set[tuple[str, str]] = set()
        for network in world.networks:
            for subnet in subnets_of(network):
                for what, cure in self._masks_of(network, subnet):
                    if (str(subnet), what) not in told:
                        told.add((str(subnet), what))
                        yield Proposal(CONFLICTING, str(subnet), "", "", what, cure)

    def _masks_of(self, network: OtherNetwork, subnet: Network) -> Iterator[tuple[str, str]]:
        world = self._world
        for each in world.carried:
            lan = _lan(each)
            if each.interface != network.interface or lan.version != subnet.version or not lan.overlaps(subnet):
                continue
            if lan.prefixlen != subnet.prefixlen:
                yield (
                    f"network {network.name} has {subnet}, and {network.interface} carries"
                    f" {each.address}/{each.prefixlen}: the masks differ",
                    f"make the network anew with --subnet {lan}"
                    + (f" --ip-range {subnet}" if lan.prefixlen < subnet.prefixlen else ""),
                )
        for use in world.register.pools:
            if use.pool is None or use.pool.segment != world.segment or use.pool.subnet.version != subnet.version:
                continue
            if use.pool.subnet != subnet and use.pool.subnet.overlaps(subnet):
                yield (
                    f"network {network.name} has {subnet}, and host {use.host} uses {use.pool.subnet} for the same LAN:"
                    " the masks differ",
                    "one subnet on all hosts; --ip-range narrows it where that is wanted",
                )
        for name, host in sorted(world.register.hosts.items()):
            if name == world.host or (host.segments and world.segment not in host.segments):
                continue
            for own in host.addresses:
                address = address_or_none(own.address)
                if address is not None and address in subnet and own.prefixlen != subnet.prefixlen:
                    yield (
                        f"network {network.name} has {subnet}, and host {name} carries {own.address}/{own.prefixlen}:"
                        " the masks differ",
                        "one mask on all machines of the LAN",
                    )

    # ------------------------------------------------------------------------------------- containers

    def containers(self) -> Iterator[Proposal]:
        for address, bearers in self._bearers.items():
            conflict = self._shared(address, bearers) or self._heard(address, bearers[0])
            yield conflict or self._of_container(address, bearers[0])

    def _shared(self, address: Address, bearers: Sequence[Bearer]) -> Proposal | None:
        named = {each.container_id: f"container {each.container} (network {each.network})" for each in bearers}
        if len(named) > 1:
            first, *others = named.values()
            return self._conflict(
                address,
                bearers[0],
                f"{first} has it, and so has {', '.join(others)}",
                "another address for one of them",
            )
        own = self._own.get(address)
        if own is None:
            return None
        return self._conflict(
            address, bearers[0], f"{self._who(bearers[0])} has it, and so has {own.interface} of this host itself",
            "another address for one of the two",
        )  # fmt: skip

    def _heard(self, address: Address, bearer: Bearer) -> Proposal | None:
        others = [each for each in self._world.wire.get(address, ()) if each not in self._macs(bearer)]
        if not others:
            return None
        return self._conflict(
            address, bearer, f"{self._who(bearer)} {'has' if bearer.running else 'asks for'} it, and another machine"
            f" answers for it: MAC {', '.join(map(self._named, others))}",
            "another address for one of the two",
        )  # fmt: skip

    def _of_container(self, address: Address, bearer: Bearer) -> Proposal:
        held = self._leases.get(address)
        lease = held.lease if held is not None else None
        container = Container(bearer.container, bearer.container_id, bearer.image, bearer.network)
        if lease is not None and (lease.kind, lease.host) == (RESERVED, self._world.host) and lease.container:
            if lease.container.name == bearer.container:
                return Proposal(KNOWN, str(address), bearer.container, bearer.mac, f"kept already: {lease.told()}")
        elif lease is None or self._is_this(lease, bearer):
            reasons = self._reasons(address)
            if not reasons:
                note = f"adopted from network {bearer.network}"
                kept = Lease(RESERVED, self._world.host, bearer.mac, container, note=note, fixed=bearer.fixed)
                state = "has it" if bearer.running else "is stopped and asks for it by --ip"
                what = f"{self._who(bearer)} {state}: kept for it"
                return Proposal(
                    LEASE, str(address), bearer.container, bearer.mac, what, write=Write(address, held, kept)
                )
            return self._conflict(
                address, bearer, f"{self._who(bearer)} has it, and it is not given to containers: {'; '.join(reasons)}",
                f"ipam-plugin show {address}; undo that, or another address for the container",
            )  # fmt: skip
        assert lease is not None
        undo = "unreserve" if lease.kind == RESERVED else "release"
        force = "" if lease.kind in (RESERVED, CONFLICT) else " --force"
        return self._conflict(
            address, bearer, f"{self._who(bearer)} has it, and in the register it is somebody else's: {lease.told()}",
            f"another address for the container; or, when nothing else uses it: ipam-plugin {undo} {address}"
            f"{self._option()}{force}",
        )  # fmt: skip

    def _is_this(self, lease: Lease, bearer: Bearer) -> bool:
        """Whether what the register has is this very container, as a machine that a host or an operator found."""
        found = lease.kind == CONFLICT or (lease.kind == RESERVED and not lease.host)
        return found and bool(lease.mac) and lease.mac.lower() in self._macs(bearer)

    def _macs(self, bearer: Bearer) -> set[str]:
        """With which the container answers."""
        network = self._networks.get(bearer.network_id)
        shared = self._interface_macs.get(network.interface, "") if network and network.driver == "ipvlan" else ""
        return {bearer.mac if bearer.running else "", shared} - {""}

    def _who(self, bearer: Bearer) -> str:
        return f"container {bearer.container} (network {bearer.network})"

    def _conflict(self, address: Address, bearer: Bearer, what: str, cure: str) -> Proposal:
        return Proposal(CONFLICTING, str(address), bearer.container, bearer.mac, what, cure)

    # -------------------------------------------------------------------------------- other machines

    def machines(self) -> Iterator[Proposal]:
        for address, macs in self._world.wire.items():
            if address in self._bearers or address in self._own or not macs:
                continue
            yield self._of_machine(address, [each.lower() for each in macs])
            if len(macs) > 1:
                yield Proposal(
                    CONFLICTING, str(address), "", macs[0],
                    f"{len(macs)} machines answer for it: MAC {', '.join(map(self._named, macs))}",
                    "another address for one of them",
                )  # fmt: skip

    def _of_machine(self, address: Address, macs: Sequence[str]) -> Proposal:
        held = self._leases.get(address)
        reasons = self._reasons(address)
        if held is None and reasons:
            return Proposal(KNOWN, str(address), "", macs[0], "; ".join(reasons))
        if held is None or (held.lease.kind == CONFLICT and held.lease.mac.lower() in macs):
            roles = self._roles().get(address, "")
            note = f"found by adopt{f', {roles}' if roles else ''}: MAC {', '.join(map(self._named, macs))}"
            kept = Lease(RESERVED, mac=macs[0], note=note)
            what = f"a machine that nobody registered{f', {roles}' if roles else ''}: reserved for it"
            return Proposal(RESERVE, str(address), "", macs[0], what, write=Write(address, held, kept))
        lease = held.lease
        known = lease.mac.lower() in ("", *macs) or any(mac in self._host_macs for mac in macs)
        if known and lease.kind not in (STANDBY, HELD):
            return Proposal(KNOWN, str(address), "", macs[0], lease.told())
        return Proposal(
            CONFLICTING, str(address), lease.container.name if lease.container else "", macs[0],
            f"in the register it is {lease.told()}, and another machine answers for it: MAC"
            f" {', '.join(map(self._named, macs))}",
            "another address for one of the two" if lease.kind == ENDPOINT else f"ipam-plugin show {address}",
        )  # fmt: skip

    def routers(self) -> Iterator[Proposal]:
        """Gateways and auxiliary addresses that do not answer now are somebody's all the same."""
        for address, role in self._roles().items():
            known = address in self._bearers or address in self._own or self._world.wire.get(address)
            if not known and address not in self._leases and not self._reasons(address):
                kept = Lease(RESERVED, note=f"found by adopt, {role}")
                yield Proposal(
                    RESERVE, str(address), "", "", f"{role}: reserved, though nobody answers now",
                    write=Write(address, None, kept),
                )  # fmt: skip

    def _roles(self) -> dict[Address, str]:
        """What the networks call addresses that are no container's."""
        found: dict[Address, str] = {}
        for network in self._world.networks:
            for each in network.subnets:
                for name, text in (*each.auxiliary.items(), ("", each.gateway)):
                    address = address_or_none(text)
                    if address is not None:
                        role = f"auxiliary address {name}" if name else "gateway"
                        found.setdefault(address, f"{role} of network {network.name}")
        return found

    # --------------------------------------------------------------------------------------- looking up

    def _reasons(self, address: Address) -> list[str]:
        """Why no container is given the address, whatever its own key says."""
        world = self._world
        return [
            *forbidding(world.segment, world.register.settings.get(world.segment), address),
            *(f"the etcd key {each.key!a} takes it" for each in self._ranges if each.taken.contains(address)),
            *own_addresses(world.segment, address, world.register.hosts),
        ]

    def _named(self, mac: str) -> str:
        words = [mac, self._vendor_of(mac), f"(host {self._host_macs[mac]})" if mac in self._host_macs else ""]
        return " ".join(filter(None, words))

    def _option(self) -> str:
        return f" --segment {self._world.segment}" if self._world.segment != self._world.default_segment else ""


def _order(text: str) -> tuple[int, int]:
    address = address_or_none(text)
    return (0, 0) if address is None else (address.version, int(address))


def _lan(carrier: InterfaceAddress) -> Network:
    length = carrier.address.max_prefixlen - carrier.prefixlen
    return parse_network(f"{type(carrier.address)(int(carrier.address) >> length << length)}/{carrier.prefixlen}")
