"""What stands in etcd: names, pools, leases, hosts, segment settings, and the keys they are under. Pure.

Values are JSON on one line, made to be read (and reservations to be written) with etcdctl, so reading is
tolerant: a lease key with any value at all means that the address is taken. Writing is strict.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from ipam_plugin.addresses import (
    Address,
    AddressSet,
    Network,
    Range,
    address_of,
    parse_address,
    parse_network,
    parse_range,
    printable,
    range_of,
    shown,
    usable_range,
)
from ipam_plugin.errors import BadRequest, PoolUnknown, Refused

# No `..`: names become parts of keys, and nothing that looks like a path shall be one.
NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
INTERFACE = re.compile(r"(?!.*\.\.)[A-Za-z0-9_.:@-]{1,15}")

ENDPOINT = "endpoint"  # a container
HOST = "host"  # an address of a Docker host's own interface, or the address of a bridge that Docker made
ROUTER = "router"  # a gateway that is no Docker host's, or an auxiliary address; shared by holders
RESERVED = "reserved"  # an operator said so
CONFLICT = "conflict"  # a machine that is none of ours answered for it
STANDBY = "standby"  # claimed and probed in advance, given to nobody yet
HELD = "held"  # kept for a container that stopped
UNREADABLE = "unreadable"  # never written: how a value that this program cannot read is shown; taken all the same
# Not of leases: what else is said of an address that is not given out.
EXCLUDED = "excluded"

LONGEST_HOLD = 30 * 86400.0  # seconds, in the configuration too

KINDS = (ENDPOINT, HOST, ROUTER, RESERVED, CONFLICT, STANDBY, HELD)
UNUSED = (HELD, RESERVED, UNREADABLE)  # kinds after whose end an address need not rest: no container had it


# ---------------------------------------------------------------------------------------------- pools


def parse_duration(text: str) -> float:
    """Seconds from `250ms`, `30s`, `10m`, `24h`, `7d` or a plain number. Raises ValueError with a sentence."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)?", text.strip())
    if not match:
        raise ValueError(f"{shown(text)} is not a duration such as 30s, 10m or 24h")
    unit = {"ms": 0.001, None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    return float(match[1]) * unit


@dataclass(frozen=True)
class Pool:
    """A subnet, perhaps narrowed to a range, as one Docker network asked for it, with its options.

    Its `id` is the PoolID that Docker keeps for the life of the network. It says everything, so that a daemon
    that lost all it had still serves the network, and is the same for the same request on every host.
    """

    segment: str
    subnet: Network
    range: Network | None = None
    exclude: tuple[Range, ...] = ()
    gateway: Literal["host", "router"] = "host"
    interface: str = ""
    probe: str = ""
    hold: str = ""

    @functools.cached_property
    def id(self) -> str:
        parts = [self.segment, str(self.subnet)]
        if self.range is not None:
            parts.append(str(self.range))
        options = [f"{name}={value}" for name, value in sorted(self.options().items()) if name != "segment"]
        return ";".join(["/".join(parts), *options])

    def options(self) -> dict[str, str]:
        """The options that are not at their default, as `--ipam-opt` takes them."""
        told = {
            "segment": self.segment,
            "exclude": ",".join(map(str, self.exclude)),
            "gateway": "" if self.gateway == "host" else self.gateway,
            "interface": self.interface,
            "probe": self.probe,
            "hold": self.hold,
        }
        return {name: value for name, value in told.items() if value}

    @functools.cached_property
    def candidates(self) -> Range:
        """Where an address may be chosen: the range, or else the subnet, without what no machine may have."""
        usable = usable_range(self.subnet)
        if self.range is None:
            return usable
        narrowed = range_of(self.range)
        return Range(usable.version, max(usable.first, narrowed.first), min(usable.last, narrowed.last))

    def cidr(self, address: Address) -> str:
        """The address as Docker must be told: with the prefix length of the subnet, never of the range.

        macvlan and ipvlan refuse an endpoint whose mask is not the pool's.
        """
        return f"{address}/{self.subnet.prefixlen}"

    def __str__(self) -> str:
        return self.id

    @classmethod
    def make(cls, subnet: str, sub_range: str, options: Mapping[str, str], default_segment: str) -> Pool:
        """From what `docker network create` was given. Raises BadRequest with a sentence that says what to type."""
        network = _network("--subnet", subnet)
        if network.is_loopback or network.is_multicast or network.is_link_local:
            raise BadRequest(f"--subnet {network} is no subnet that machines of a LAN can have addresses in")
        narrowed = None
        if sub_range:
            narrowed = _network("--ip-range", sub_range)
            if narrowed.version != network.version or not (
                int(network.network_address) <= int(narrowed.network_address)
                and int(narrowed.broadcast_address) <= int(network.broadcast_address)
            ):
                raise BadRequest(f"--ip-range {narrowed} does not lie inside --subnet {network}")
            if narrowed == network:
                narrowed = None
        known = ("segment", "exclude", "gateway", "interface", "probe", "hold")
        for name in options:
            if name not in known:
                raise BadRequest(f"unknown option --ipam-opt {name!r}; known are {', '.join(known)}")
        return cls(
            segment=_segment(options.get("segment", default_segment)),
            subnet=network,
            range=narrowed,
            exclude=_exclude(options.get("exclude", ""), network),
            gateway=_one_of("gateway", options.get("gateway", "host"), ("host", "router")),  # type: ignore[arg-type]  # checked there
            interface=_interface(options.get("interface", "")),
            probe=_one_of("probe", options["probe"], ("full", "fast", "off")) if "probe" in options else "",
            hold=_hold(options["hold"]) if "hold" in options else "",
        )

    @classmethod
    @functools.lru_cache(maxsize=1024)  # every request carries a PoolID, and a host has few networks
    def parse(cls, pool_id: str) -> Pool:
        """The pool that a PoolID describes. Raises PoolUnknown when this program never made that PoolID.

        Only the canonical spelling is one: a PoolID becomes part of an etcd key.
        """
        head, *told = pool_id.split(";")
        parts = head.split("/")
        try:
            if len(parts) not in (3, 5):
                raise ValueError
            options = dict(pair.split("=", 1) for pair in told)
            options["segment"] = parts[0]
            pool = cls.make("/".join(parts[1:3]), "/".join(parts[3:5]), options, "")
        except (ValueError, BadRequest):
            pool = None
        if pool is None or pool.id != pool_id:
            raise PoolUnknown(f"unknown PoolID {shown(pool_id)}: no RequestPool of this plugin ever answered it")
        return pool


def looks_hostile(pool_id: str) -> bool:
    """Whether a PoolID tries to be more than a name: to leave its key, or to spoil a terminal."""
    return any(part in (".", "..") for part in pool_id.split("/")) or not pool_id.isprintable() or not pool_id


def _network(option: str, text: str) -> Network:
    try:
        return parse_network(text)
    except ValueError as error:
        raise BadRequest(f"{option} {error}") from None


def _segment(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadRequest(
            f"--ipam-opt segment={shown(name)}: a segment's name has 1 to 63 letters, digits, '.', '_' or '-'"
        )
    return name


def _exclude(text: str, subnet: Network) -> tuple[Range, ...]:
    ranges = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            ranges.append(parse_range(item))
        except ValueError as error:
            raise BadRequest(f"--ipam-opt exclude: {error}") from None
        whole = range_of(subnet)
        if ranges[-1].version != whole.version:
            ranges.pop()  # the engine sends the options of a dual-stack network with both of its subnets
        elif not (whole.first <= ranges[-1].first and ranges[-1].last <= whole.last):
            raise BadRequest(f"--ipam-opt exclude: {ranges[-1]} does not lie inside --subnet {subnet}")
    # One spelling for one set of addresses: it becomes part of the PoolID.
    merged = AddressSet((each.first, each.last) for each in ranges)
    return tuple(Range(subnet.version, first, last) for first, last in merged)


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise BadRequest(f"--ipam-opt {option}={shown(value)}: expected {' or '.join(choices)}")
    return value


def _interface(name: str) -> str:
    if name and (not INTERFACE.fullmatch(name) or name == "."):
        raise BadRequest(f"--ipam-opt interface={shown(name)} is not the name of a network interface")
    return name


def _hold(text: str) -> str:
    try:
        if parse_duration(text) > LONGEST_HOLD:
            raise ValueError(f"{shown(text)} is longer than 30d")
    except ValueError as error:
        raise BadRequest(f"--ipam-opt hold: {error}") from None
    return text.strip()


# --------------------------------------------------------------------------------------------- values


class Container(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of the container that has an address."""

    name: str = ""
    id: str = ""
    image: str = ""
    network: str = ""


class Holder(msgspec.Struct, frozen=True, omit_defaults=True):
    """A host that uses a shared address for one pool, and how many of its networks do."""

    host: str
    pool: str
    count: int = 1


class Lease(msgspec.Struct, frozen=True, omit_defaults=True):
    """An address that is not free, and why. `token` is new with every grant: what a release is compared with."""

    kind: str
    host: str = ""
    mac: str = ""
    container: Container | None = None
    pool: str = ""
    since: str = ""
    token: str = ""
    interface: str = ""  # kind host: the interface that carries it
    holders: tuple[Holder, ...] = ()  # kinds router and host: the networks that use it
    noted: int = 0  # kind endpoint: how many times an auxiliary address of this host named it
    note: str = ""  # an operator's words
    by: str = ""  # who reserved it; kind conflict: the host that saw it
    # New with every change of a lease that several share: two changes that say the same are still told apart, so
    # that a write is recognised as this one and no other (the token stays, a release compares it).
    change: str = ""
    vendor: str = ""  # kind conflict: who made that MAC, where known
    fixed: bool = False  # kinds endpoint and held: its container asks for it by `--ip`
    # Kinds endpoint and held: its container is told from others when it asks again, because the request had its name
    # (engines from 29 on) or a MAC that an ended lease had before (Docker's random ones are new each time).
    known: bool = False
    until: str = ""  # kind held: when the hold ends

    def told(self) -> str:
        """Who has it and since when, for a sentence."""
        return self.who() + (f" since {self.since}" if self.since and self.kind != UNREADABLE else "")

    def who(self) -> str:
        """Who has it, for a sentence."""
        who = f"host {self.host}" if self.host else ""
        if self.kind in (ENDPOINT, HELD):
            if self.kind == HELD:
                return f"a hold for {self._of_container()} until {self.until or 'an unknown time'}, stopped"
            return self._of_container() + (f" (MAC {self.mac})" if self.mac else "")
        if self.kind == HOST:
            where = f" ({self.interface}, MAC {self.mac})" if self.mac and self.interface else ""
            return f"Docker {who or 'host'} itself{where}"
        if self.kind == ROUTER:
            users = ", ".join(sorted({holder.host for holder in self.holders}))
            return "a router or auxiliary address" + (f" of host {users}" if users else "")
        if self.kind == RESERVED:
            kept_for = f" for {self._of_container()}" if self.host else ""
            note = f": {self.note}" if self.note else ""
            return f"a reservation{kept_for}{f' by {self.by}' if self.by else ''}{note}"
        if self.kind == CONFLICT:
            vendor = f", {self.vendor}" if self.vendor else ""
            seen = f", seen by host {self.by}" if self.by else ""
            return f"a machine that is none of ours (MAC {self.mac or 'unknown'}{vendor}{seen})"
        if self.kind == UNREADABLE:
            return f"a value in etcd that cannot be read: {self.note}"
        return f"{self.kind} of {who or 'nobody known'}"

    def _of_container(self) -> str:
        name = f"container {self.container.name}" if self.container and self.container.name else "a container"
        return f"{name} on host {self.host}" if self.host else name


class Rule(NamedTuple):
    """Addresses that the settings of a segment take, though they may have no lease."""

    taken: Range
    kind: str  # ROUTER, RESERVED or EXCLUDED
    why: str  # a sentence about one of them


class SegmentSettings(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Cluster-wide settings of a segment. Its revision is compared by every grant in the segment.

    Operators write them by hand too: a name that is typed wrong (`excluded`) makes them unreadable, and nothing is
    given out. Ignored, it would exclude nothing, and be gone after the next change by the command.
    """

    router: str | list[str] = ""
    exclude: tuple[str, ...] = ()
    reserved: tuple[Reservation, ...] = ()
    moving: tuple[str, ...] = ()  # addresses that move between machines (keepalived)
    note: str = ""

    def routers(self) -> list[Address]:
        told = [self.router] if isinstance(self.router, str) else self.router
        return [parse_address(text) for text in told if text]

    def ranges(self) -> list[Range]:
        """All that must not be given out. Raises ValueError when a part of it cannot be read."""
        return [
            *(parse_range(text) for text in self.exclude),
            *(parse_range(each.range) for each in self.reserved),
            *(parse_range(text) for text in self.moving),
        ]

    def rules(self) -> list[Rule]:
        """What is not given out, and the routers, each with its reason. Raises ValueError as `ranges` does."""
        rules = [Rule(parse_range(text), EXCLUDED, f"it is excluded ({text})") for text in self.exclude]
        for each in self.reserved:
            by = f" by {each.by}" if each.by else ""
            why = f"it is reserved{by} ({each.range}){f': {each.note}' if each.note else ''}"
            rules.append(Rule(parse_range(each.range), RESERVED, why))
        rules += [Rule(parse_range(text), EXCLUDED, "it moves between machines") for text in self.moving]
        for router in self.routers():
            rules.append(Rule(Range(router.version, int(router), int(router)), ROUTER, "it is the segment's router"))
        return rules


class Reservation(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A range that an operator keeps for something else."""

    range: str
    note: str = ""
    by: str = ""
    since: str = ""


class HostAddress(msgspec.Struct, frozen=True, omit_defaults=True):
    address: str
    prefixlen: int
    interface: str
    mac: str = ""


class Host(msgspec.Struct, frozen=True, omit_defaults=True):
    """A Docker host: who it is and which addresses its own interfaces carry."""

    host: str
    machine_id: str = ""
    version: str = ""
    joined: str = ""
    addresses: tuple[HostAddress, ...] = ()
    segments: tuple[str, ...] = ()  # where these addresses are; (), as in records of before: in all of them
    alarms: tuple[str, ...] = ()
    macs: tuple[str, ...] = ()  # of the interfaces that its daemon listens on, which may be without an address
    absent: str = ""  # since when its heartbeat is missing, as the first living daemon that noticed wrote it down
    restored: str = ""  # token of the last Restored since which it has written what its containers have


class Alive(msgspec.Struct, frozen=True, omit_defaults=True):
    """A host's heartbeat, bound to an etcd lease: it vanishes when the daemon stops refreshing it."""

    host: str
    machine_id: str
    boot_id: str
    process: str  # token of the serving process
    state: str = ""  # token of its state_dir, which only one process can lock
    pid: int = 0
    pid_namespace: str = ""
    pid_started: str = ""
    since: str = ""
    version: str = ""


RESTORED_WAIT = 60.0  # seconds for which nothing is given at most after etcd went back


class Restored(msgspec.Struct, frozen=True, omit_defaults=True):
    """That etcd went back to an earlier state. Until the living hosts have answered, it does not know all that is in
    use (restoration.py)."""

    token: str
    since: str = ""
    by: str = ""  # the host that noticed it first
    note: str = ""


def marked_absent(record: bytes, since: str) -> bytes:
    """The record of a host with since when it is absent; all else stays, also what this version does not know.

    Raises ValueError when it is no record of a host.
    """
    decode(record, Host)
    return msgspec.json.encode({**msgspec.json.decode(record), "absent": since})


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """That a host is to be retired. It is never changed: what frees an address compares its revision."""

    host: str
    by: str  # who says so
    since: str
    token: str
    force: bool = False  # the machine is off: also what cannot be proven is freed
    policy: bool = False  # `retire_after` of a living host says so, nobody waits for the end


class Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """An address that a retired host keeps, and why."""

    segment: str
    address: str
    why: str


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far one living daemon got with its part of an order: the addresses of one subnet, or what comes last."""

    by: str  # the host that carries it out
    done: bool = False
    freed: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()
    more: int = 0  # so many others stay, which are not told
    forgotten: bool = False  # the host's record is deleted


class LostLease(msgspec.Struct, frozen=True, omit_defaults=True):
    """An address that was a retired host's."""

    segment: str
    address: str
    kind: str
    token: str
    when: str
    container: str = ""  # its name


class Lost(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a retired host has lost, oldest first."""

    leases: tuple[LostLease, ...] = ()
    more: int = 0  # so many before them, which are forgotten


class PoolUse(msgspec.Struct, frozen=True, omit_defaults=True):
    """That a host uses a pool: how many of its networks, and the options they were asked with."""

    host: str
    segment: str
    subnet: str
    range: str = ""
    options: dict[str, str] = {}
    since: str = ""
    count: int = 1
    token: str = ""  # new with every change, so that a write whose outcome was unknown is recognised


class Tenancy(msgspec.Struct, frozen=True, omit_defaults=True):
    """One past holder of an address, from when to when, and why it ended."""

    kind: str
    host: str = ""
    mac: str = ""
    container: Container | None = None
    since: str = ""
    until: str = ""
    why: str = ""
    retired: bool = False  # its host was retired: whoever still uses it is no container that has just stopped
    by: str = ""  # who reserved it, or which host saw that conflict
    note: str = ""  # an operator's words

    def who(self) -> str:
        """Who had it, for a sentence."""
        if self.kind == HELD:
            return f"held for {Lease(ENDPOINT, self.host, container=self.container).who()}"
        shared = tuple(Holder(host, "") for host in self.host.split(", ")) if self.kind == ROUTER and self.host else ()
        host = "" if shared else self.host
        return Lease(
            self.kind, host, self.mac, self.container, holders=shared, note=self.note, by=self.by
        ).who()  # fmt: skip


class History(msgspec.Struct, frozen=True, omit_defaults=True):
    """The last holders of an address, newest first."""

    past: tuple[Tenancy, ...] = ()


HISTORY_LENGTH = 5  # holders remembered for one address


def remember(history: History, lease: Lease, why: str, now: datetime.datetime, retired: bool = False) -> History:
    """The history with one more holder in it, the oldest forgotten."""
    shared = ", ".join(sorted({holder.host for holder in lease.holders}))
    container = lease.container
    if container is not None:
        container = Container(*(_short(getattr(container, name)) for name in container.__struct_fields__))
    ended = Tenancy(
        kind=lease.kind,
        host=_short(shared if lease.kind == ROUTER else lease.host),
        mac=_short(lease.mac),
        container=container,
        since=_short(lease.since),
        until=rfc3339(now),
        why=_short(why),
        retired=retired,
        by=_short(lease.by),
        note=_short(lease.note),
    )
    return History(past=(ended, *history.past)[:HISTORY_LENGTH])


def remembered(
    past: bytes | None, lease: Lease, why: str, now: datetime.datetime, retired: bool = False
) -> bytes | None:
    """The value of a history key with one more holder in it. None: what stands there cannot be read, and stays."""
    try:
        known = decode(past, History) if past is not None else History()
    except ValueError:
        return None
    return encode(remember(known, lease, why, now, retired))


def _short(text: str) -> str:
    """Five records of a lease with a text as large as etcd takes would be more than it takes: no release would work."""
    return text if len(text) <= 300 else text[:299] + "…"


def rfc3339(moment: datetime.datetime) -> str:
    """UTC with milliseconds, as it stands in etcd."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def later(moment: str, seconds: float) -> str:
    """The time `seconds` after a moment, both as they stand in etcd."""
    return rfc3339(datetime.datetime.fromisoformat(moment) + datetime.timedelta(seconds=seconds))


def parse_time(text: str) -> float | None:
    """Seconds since the epoch, or None when it is no time."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


class Schema(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which version of the layout below the prefix stands in etcd (schema.py)."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    written_by: str = ""  # the version of the program
    since: str = ""


_encoder = msgspec.json.Encoder()
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
T = TypeVar("T", bound=msgspec.Struct)


def encode(value: msgspec.Struct) -> bytes:
    return _encoder.encode(value)


def rewritten(value: msgspec.Struct, before: bytes) -> bytes:
    """A changed value, with what `before` says beyond the fields that this version knows.

    A newer program on another host may have written it, and needs it again. Not for a value that begins anew (another
    holder of an address): what is not known belongs to the one before.
    """
    try:
        fields = _fields.decode(before)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return encode(value)
    unknown = {name: raw for name, raw in fields.items() if name not in value.__struct_fields__}
    if not unknown:
        return encode(value)
    return _encoder.encode({**_fields.decode(encode(value)), **unknown})


def decode(value: bytes, kind: type[T]) -> T:
    """Raises ValueError with one short line, fit for a terminal, when the value is not what it should be."""
    try:
        decoded: T = _decoders[kind].decode(value)
        return decoded
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(printable(str(error))[:200]) from None  # it quotes names that stand in the value


def read_as(value: bytes | None, kind: type[T]) -> T | None:
    """None where nothing stands, or something that is not what it should be."""
    try:
        return decode(value, kind) if value is not None else None
    except ValueError:
        return None


def pool_of(pool_id: str) -> Pool | None:
    """None for a PoolID that this program never made."""
    try:
        return Pool.parse(pool_id)
    except Refused:
        return None


_decoders: dict[type, Any] = {}


def readable(*kinds: type) -> None:
    """Makes ready what `decode` needs to read these. To be called where they are defined, at the import.

    Not at the first value: when two threads are the first to read a type, msgspec (0.22.0) lets one of them see what
    the other is just filling in, and the process ends with a segmentation fault.
    """
    _decoders.update((kind, msgspec.json.Decoder(kind)) for kind in kinds)


readable(Lease, SegmentSettings, Host, Alive, Restored, Order, Part, Lost, PoolUse, History, Schema)


def read_lease(value: bytes) -> Lease:
    """A lease, whatever the value is: what cannot be read is `unreadable`, and its address is taken."""
    try:
        lease = decode(value, Lease)
        if lease.kind in KINDS:
            return lease
        reason = f"kind {shown(lease.kind)} is unknown"
    except ValueError as error:
        reason = str(error)
    start = printable(value[:60].decode("utf-8", "replace"))
    return Lease(kind=UNREADABLE, note=f"{start!r} ({reason[:120]})")


# ----------------------------------------------------------------------------------------------- keys


PARTS = ("leases", "history", "segments", "pools", "hosts", "alive", "wanted", "retiring", "gone")
"""The parts of the register, each a directory below the prefix."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of the keys below one prefix."""

    prefix: str = "/ipam-plugin/v1/"
    leases: str = field(init=False)
    history: str = field(init=False)
    segments: str = field(init=False)
    pools: str = field(init=False)
    hosts: str = field(init=False)
    alive: str = field(init=False)
    wanted: str = field(init=False)
    retiring: str = field(init=False)
    gone: str = field(init=False)
    # These two are keys, no folders.
    restored: str = field(init=False)
    schema: str = field(init=False)

    def __post_init__(self) -> None:
        for name in PARTS:
            object.__setattr__(self, name, f"{self.prefix}{name}/")
        for name in ("restored", "schema"):
            object.__setattr__(self, name, f"{self.prefix}{name}")

    def lease(self, segment: str, address: Address) -> str:
        return f"{self.leases}{segment}/{address}"

    def past(self, segment: str, address: Address) -> str:
        return f"{self.history}{segment}/{address}"

    def segment(self, segment: str) -> str:
        return f"{self.segments}{segment}"

    def pool(self, pool: Pool, host: str) -> str:
        return f"{self.pools}{pool.id}/{host}"

    def host(self, host: str) -> str:
        return f"{self.hosts}{host}"

    def want(self, pool: Pool, host: str) -> str:
        return f"{self.wanted}{pool.id}/{host}"

    def want_address(self, segment: str, address: Address, host: str) -> str:
        return f"{self.wanted}{segment}/{address}/{host}"

    def retire(self, host: str) -> str:
        """The order to retire a host."""
        return f"{self.retiring}{host}"

    def retire_part(self, host: str, part: str) -> str:
        """How far a part of that order got: SEGMENT/SUBNET, or `end`."""
        return f"{self.retiring}{host}/{part}"

    def lost(self, host: str) -> str:
        """What a retired host has lost, for when it returns."""
        return f"{self.gone}{host}"

    def heartbeat(self, host: str) -> str:
        return f"{self.alive}{host}"


def segment_and_address(rest: str) -> tuple[str, Address]:
    """From the end of a history key, in any spelling of the address. Raises ValueError when it names none."""
    segment, _, text = rest.partition("/")
    return segment, parse_address(text.partition("/")[0])


def segment_and_taken(rest: str) -> tuple[str, Address | Range]:
    """What a lease key takes, from its end: an address in any spelling, or several, where an operator wrote a CIDR or
    `FIRST-LAST`. What follows after a slash is the operator's own (`10.0.0.5/printer`).

    Raises ValueError when it names no address: such a key takes nothing.
    """
    segment, _, text = rest.partition("/")
    if "/" in text or "-" in text:
        first, *more = text.split("/")
        try:
            taken = parse_range(first if "-" in first or not more else f"{parse_address(first)}/{more[0]}")
        except ValueError:
            text = first  # so too 10.0.0.5/24, an address with the length of its subnet
        else:
            return segment, taken if taken.size() > 1 else address_of(taken.version, taken.first)
    return segment, parse_address(text)
