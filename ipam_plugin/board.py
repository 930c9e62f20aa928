"""What the page shows, from what stands in etcd. Pure: values in, values out.

Fed by a watch like the daemon's view. The view keeps what choosing an address needs; this keeps what people read
(names, MACs, notes, the past). What it answers is described by the structs below, from which the schema of the API is
made. Tokens are not among it, and every string has passed `clean`: etcd may hold anybody's.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple, TypeVar

import msgspec

from ipam_plugin.addresses import (
    BITS,
    Address,
    AddressSet,
    Network,
    Range,
    address_of,
    address_or_none,
    parse_network,
    range_of,
    usable_range,
)
from ipam_plugin.model import (
    CONFLICT,
    HOST,
    Alive,
    Container,
    History,
    Holder,
    Host,
    HostAddress,
    Keys,
    Lease,
    Pool,
    Rule,
    SegmentSettings,
    Tenancy,
    decode,
    pool_of,
    read_as,
    read_lease,
    segment_and_address,
    segment_and_taken,
)

FREE = "free"
UNUSABLE = "unusable"  # the address of a network itself, and its broadcast address

CELLS = 1024  # addresses of a map that are shown one by one; of a larger one, blocks
BLOCKS = 256  # of a map
HITS = 200  # of a search
LISTED = 256  # segments, subnets of a segment, conflicts, hosts: what is beyond is counted
TEXTS = 10_000  # kept once, of hosts and pools
LONGEST = 300  # characters of a text from etcd
MOST = 2**53 - 1  # addresses, the largest whole number that JavaScript counts to; an IPv6 network has more


# ----------------------------------------------------------------------------------- what is answered


class Use(msgspec.Struct, frozen=True):
    """How full something is."""

    size: int  # addresses that a machine may have; 2^53-1 stands for that many or more
    free: int
    kinds: dict[str, int]  # the others, by kind


class PoolLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pool of Docker networks in a subnet, and the hosts that use it."""

    hosts: tuple[str, ...]
    range: str = ""
    options: dict[str, str] = {}


class SubnetLine(msgspec.Struct, frozen=True):
    """A subnet of a segment. Without pools, it is only where addresses lie that are in no pool's subnet."""

    subnet: str
    use: Use
    pools: tuple[PoolLine, ...]


class SegmentLine(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    subnets: tuple[SubnetLine, ...]
    more: int = 0  # subnets that are not listed
    routers: tuple[str, ...] = ()
    note: str = ""
    error: str = ""  # why its settings cannot be read; nothing is given out then


class HostLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A Docker host. `alive`: its daemon's heartbeat is there, `since`: of the daemon, `absent`: since when not."""

    name: str
    alive: bool
    leases: int
    since: str = ""
    absent: str = ""
    version: str = ""
    joined: str = ""
    retiring: bool = False  # an operator, or a policy, has ordered to free what it had
    addresses: tuple[HostAddress, ...] = ()
    segments: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()


class Spot(msgspec.Struct, frozen=True, omit_defaults=True):
    """An address in one line."""

    segment: str
    address: str
    kind: str
    told: str = ""  # who has it, since when, or why it is not given
    past: bool = False  # of a search: not who has it now but one who had it is what was looked for


class Overview(msgspec.Struct, frozen=True):
    revision: int  # of etcd
    segments: tuple[SegmentLine, ...]
    hosts: tuple[HostLine, ...]
    conflicts: tuple[Spot, ...]
    strays: tuple[str, ...]  # keys that name no address, or no pool: they take nothing
    more: dict[str, int]  # of each of these lists: how many are not in it


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """One address of a map."""

    address: str
    kind: str
    told: str = ""


class Block(msgspec.Struct, frozen=True):
    """A part of a map that is opened by itself."""

    subnet: str
    use: Use


class Map(msgspec.Struct, frozen=True):
    """A subnet: its addresses one by one, or, when these are too many, blocks. Of a large IPv6 subnet only what is
    taken, or the blocks in which something is (`sparse`).
    """

    revision: int
    segment: str
    subnet: str
    within: tuple[str, ...]  # the larger maps in which this one is a block, the largest first
    use: Use
    sparse: bool
    pools: tuple[PoolLine, ...]
    cells: tuple[Cell, ...] = ()
    blocks: tuple[Block, ...] = ()


class Detail(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that is known of one address. Fields are those of its lease, where it has one."""

    revision: int
    segment: str
    address: str
    kind: str
    told: str
    reasons: tuple[str, ...] = ()  # why it would not be given, apart from its lease
    past: tuple[Tenancy, ...] = ()  # who had it, newest first
    host: str = ""
    mac: str = ""
    vendor: str = ""
    container: Container | None = None
    pool: str = ""
    since: str = ""
    until: str = ""
    interface: str = ""
    holders: tuple[Holder, ...] = ()
    note: str = ""
    by: str = ""
    key: str = ""  # in etcd, where somebody spelled the address in another way
    map: str = ""  # the one on which it is a cell


class Found(msgspec.Struct, frozen=True):
    """What a search found: hosts, then addresses; of these at most 200."""

    revision: int
    query: str
    hosts: tuple[HostLine, ...]
    spots: tuple[Spot, ...]
    more: int


# ------------------------------------------------------------------------------------------ the board


class _Family:
    """The addresses of one IP version in one segment."""

    def __init__(self) -> None:
        self.leases: dict[int, dict[str, Lease]] = {}  # by key; the one with the canonical spelling is the first
        self.taken = AddressSet()
        self.kinds: dict[str, AddressSet] = {}

    def at(self, number: int) -> Lease | None:
        return next(iter(self.leases.get(number, {}).values()), None)

    def set(self, number: int, key: str, lease: Lease | None, canonical: str) -> None:
        """What is under a key now (None: nothing); `canonical` is the key that daemons write for this address."""
        before = self.at(number)
        known = self.leases.setdefault(number, {})
        _put(known, key, lease)
        if len(known) > 1:
            self.leases[number] = dict(sorted(known.items(), key=lambda each: (each[0] != canonical, each[0])))
        after = self.at(number)
        if before is not None and (after is None or after.kind != before.kind):
            self.kinds[before.kind].discard(number)
        if after is None:
            del self.leases[number]
            self.taken.discard(number)
        elif before is None or after.kind != before.kind:
            self.taken.add(number)
            self.kinds.setdefault(after.kind, AddressSet()).add(number)


class _Segment:
    def __init__(self) -> None:
        self.families = {4: _Family(), 6: _Family()}
        self.settings = SegmentSettings()
        self.rules: list[Rule] = []  # of the settings
        self.error = ""
        self.by_hand: dict[str, tuple[Range, Lease]] = {}  # keys of many addresses


class _Rules(NamedTuple):
    """What takes addresses of one segment and IP version besides leases."""

    all: list[Rule]
    kinds: dict[str, AddressSet]  # disjoint


class Board:
    """The register as people look at it. Not for several threads at once."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.revision = 0
        self._clear()

    def _clear(self) -> None:
        self._segments: dict[str, _Segment] = {}
        self._pools: dict[str, tuple[Pool | None, set[str]]] = {}  # PoolID -> what it says, the hosts that use it
        self._subnets: dict[tuple[str, Network], list[PoolLine]] | None = None
        self._hosts: dict[str, Host | None] = {}  # None: unreadable
        self._alive: dict[str, Alive | None] = {}
        self._orders: set[str] = set()
        self._history: dict[tuple[str, Address], bytes] = {}
        self._strays: set[str] = set()
        self._host_leases: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._rules: dict[tuple[str, int], _Rules] = {}

    # ------------------------------------------------------------------------------------ being fed

    def reset(self, values: Iterable[tuple[str, bytes, int]], revision: int) -> None:
        """Everything below the prefix, as (key, value, revision), listed at one revision."""
        self._clear()
        for key, value, _ in values:
            self._apply(key, value)
        self.revision = revision

    def apply(self, events: Iterable[tuple[str, bytes | None, int]], revision: int) -> None:
        """Changes in their order, as (key, value or None when deleted, revision)."""
        for key, value, _ in events:
            self._apply(key, value)
        self.revision = revision

    def _apply(self, key: str, value: bytes | None) -> None:
        keys = self._keys
        if key.startswith(keys.leases):
            self._apply_lease(key, value)
        elif key.startswith(keys.history):
            try:
                where = segment_and_address(key.removeprefix(keys.history))
            except ValueError:
                return
            if key == keys.past(*where):
                _put(self._history, where, value)
        elif key.startswith(keys.segments):
            self._apply_settings(key.removeprefix(keys.segments), value)
        elif key.startswith(keys.pools):
            pool_id, _, host = key.removeprefix(keys.pools).rpartition("/")
            _, hosts = self._pools.setdefault(pool_id, (pool_of(pool_id), set()))
            (hosts.discard if value is None else hosts.add)(host)
            if not hosts:
                del self._pools[pool_id]
            self._subnets = None
        elif key.startswith(keys.hosts):
            name = key.removeprefix(keys.hosts)
            if value is None:
                self._hosts.pop(name, None)
            else:
                self._hosts[name] = read_as(value, Host)
            self._rules.clear()
        elif key.startswith(keys.alive):
            name = key.removeprefix(keys.alive)
            if value is None:
                self._alive.pop(name, None)
            else:
                self._alive[name] = read_as(value, Alive)
        elif key.startswith(keys.retiring):
            name = key.removeprefix(keys.retiring)
            if "/" not in name:  # how far it got stands below it
                (self._orders.discard if value is None else self._orders.add)(name)

    def _apply_lease(self, key: str, value: bytes | None) -> None:
        try:
            name, taken = segment_and_taken(key.removeprefix(self._keys.leases))
        except ValueError:
            (self._strays.discard if value is None else self._strays.add)(key)
            return
        segment = self._segment(name)
        lease = None if value is None else self._kept(read_lease(value))
        if isinstance(taken, Range):
            before = segment.by_hand.get(key)
            self._count(before[1] if before else None, lease)
            _put(segment.by_hand, key, None if lease is None else (taken, lease))
            self._rules.clear()
            return
        family = segment.families[taken.version]
        self._count(family.leases.get(int(taken), {}).get(key), lease)
        if lease is not None or int(taken) in family.leases:
            family.set(int(taken), key, lease, self._keys.lease(name, taken))

    def _kept(self, lease: Lease) -> Lease:
        """Without what nobody reads here; what many leases say is kept once."""

        if len(self._texts) > TEXTS:
            self._texts.clear()

        def once(text: str) -> str:
            return self._texts.setdefault(text, text)

        return msgspec.structs.replace(
            lease, token="", change="", kind=once(lease.kind), host=once(lease.host), pool=once(lease.pool)
        )

    def _count(self, before: Lease | None, after: Lease | None) -> None:
        for lease, change in ((before, -1), (after, 1)):
            if lease is not None and lease.host:
                count = self._host_leases.get(lease.host, 0) + change
                _put(self._host_leases, lease.host, count or None)

    def _apply_settings(self, name: str, value: bytes | None) -> None:
        segment = self._segment(name)
        segment.settings, segment.rules, segment.error = SegmentSettings(), [], ""
        self._rules.clear()
        if value is None:
            return
        try:
            settings = decode(value, SegmentSettings)
            segment.rules = settings.rules()
            segment.settings = settings
        except ValueError as error:
            segment.error = str(error)

    def _segment(self, name: str) -> _Segment:
        if name not in self._segments:
            self._segments[name] = _Segment()
        return self._segments[name]

    # ------------------------------------------------------------------------------------ questions

    def overview(self) -> Overview:
        """Everything in one look."""
        pools = self._pools_by_subnet()
        names = self._names()
        conflicts = [
            (name, address_of(version, number), family.leases[number])
            for name in names
            for version, family in self._look(name).families.items()
            for first, last in family.kinds.get(CONFLICT, AddressSet())
            for number in range(first, last + 1)
        ]
        hosts = sorted({*self._hosts, *self._alive, *self._host_leases})
        strays = sorted(
            [*self._strays, *(f"{self._keys.pools}{each}" for each, (pool, _) in self._pools.items() if pool is None)]
        )
        more: dict[str, Sized] = {"segments": names, "hosts": hosts, "conflicts": conflicts, "strays": strays}
        return Overview(
            revision=self.revision,
            segments=tuple(self._segment_line(name, pools) for name in names[:LISTED]),
            hosts=tuple(self._host_line(name) for name in hosts[:LISTED]),
            conflicts=tuple(
                Spot(clean(name), str(address), CONFLICT, clean(next(iter(leases.values())).told()))
                for name, address, leases in conflicts[:LISTED]
            ),
            strays=tuple(map(clean, strays[:LISTED])),
            more={name: len(listed) - LISTED for name, listed in more.items() if len(listed) > LISTED},
        )

    def map(self, segment: str, subnet: Network) -> Map:
        """The subnet's addresses, or blocks of them."""
        whole = range_of(subnet)
        family = self._look(segment).families[subnet.version]
        cells: tuple[Cell, ...] = ()
        blocks: tuple[Block, ...] = ()
        sparse = False
        if whole.size() <= CELLS:
            cells = self._cells(segment, subnet, range(whole.first, whole.last + 1))
        elif subnet.version == 4:
            blocks = self._blocks(segment, _split(subnet))
        else:
            sparse = True
            if family.taken.count(whole.first, whole.last) <= CELLS:
                cells = self._cells(segment, subnet, _inside(family.taken, whole))
            else:
                blocks = self._blocks(segment, _occupied(family.taken, subnet))
        pools = self._pools_by_subnet()
        largest = min(
            (each for name, each in pools if name == segment and each.version == subnet.version and _in(subnet, each)),
            key=lambda each: each.prefixlen,
            default=None,
        )
        return clean(
            Map(
                revision=self.revision,
                segment=segment,
                subnet=str(subnet),
                within=tuple(map(str, _way(largest, subnet))) if largest is not None else (),
                use=self._use(segment, subnet),
                sparse=sparse,
                pools=tuple(pools.get((segment, subnet), ())),
                cells=cells,
                blocks=blocks,
            )
        )

    def detail(self, segment: str, address: Address) -> Detail:
        """All that is known of one address."""
        leases = self._look(segment).families[address.version].leases.get(int(address), {})
        key, lease = next(iter(leases.items()), ("", None))
        reasons = tuple(
            rule.why for rule in self._rules_of(segment, address.version).all if rule.taken.contains(address)
        )
        if self._look(segment).error:
            reasons = (f"the settings of segment {segment} cannot be read, so nothing is given out in it", *reasons)
        past = self._history.get((segment, address))
        history = read_as(past, History) if past is not None else None
        kind, told = self._said(segment, address)
        lease = lease or Lease(kind="")
        return clean(
            Detail(
                revision=self.revision,
                segment=segment,
                address=str(address),
                kind=kind,
                told=told,
                reasons=reasons,
                past=history.past if history else (),
                host=lease.host,
                mac=lease.mac,
                vendor=lease.vendor,
                container=lease.container,
                pool=lease.pool,
                since=lease.since,
                until=lease.until,
                interface=lease.interface,
                holders=lease.holders,
                note=lease.note,
                by=lease.by,
                key="" if not key or key == self._keys.lease(segment, address) else key,
                map=str(self._map_with(segment, address)),
            )
        )

    def search(self, query: str) -> Found:
        """By address or a part of it, MAC in any spelling, container, image, network, host, note; also who had it."""
        words = query.strip().lower()
        if not words:
            return Found(self.revision, "", (), (), 0)
        wanted = _Wanted(words)
        hosts = [name for name in sorted({*self._hosts, *self._alive}) if wanted.host(name, self._hosts.get(name))]
        found: dict[tuple[str, Address], int] = {}  # the best come first
        if wanted.address is not None:
            found = {(name, wanted.address): 0 for name in self._names()}
        for name, segment in self._segments.items():
            for version, family in segment.families.items():
                for number, leases in family.leases.items():
                    if any(map(wanted.name, leases.values())):
                        found[name, address_of(version, number)] = 1
                    elif wanted.number(version, number) or any(map(wanted.lease, leases.values())):
                        found.setdefault((name, address_of(version, number)), 2)
        for where, value in self._history.items():
            if where not in found and wanted.may_be_in(value):
                history = read_as(value, History)
                if history and any(map(wanted.lease, history.past)):
                    found[where] = 3

        def order(each: tuple[tuple[str, Address], int]) -> tuple[int, str, int, int]:
            (name, address), rank = each
            return rank, name, address.version, int(address)

        return clean(
            Found(
                revision=self.revision,
                query=query,
                hosts=tuple(self._host_line(name) for name in hosts[:HITS]),
                spots=tuple(
                    Spot(name, str(address), *self._said(name, address), past=rank == 3)
                    for (name, address), rank in heapq.nsmallest(HITS, found.items(), key=order)
                ),
                more=max(0, len(found) - HITS) + max(0, len(hosts) - HITS),
            )
        )

    # -------------------------------------------------------------------------------------- in parts

    def _names(self) -> list[str]:
        """The segments in which there is anything."""
        used = {name for name, segment in self._segments.items() if _is_used(segment)}
        return sorted(used | {segment for segment, _ in self._pools_by_subnet()})

    def _look(self, name: str) -> _Segment:
        """A segment, without making one of a name that somebody typed."""
        return self._segments.get(name) or _Segment()

    def _said(self, segment: str, address: Address, rules: _Rules | None = None) -> tuple[str, str]:
        """An address's kind, and who has it or why it is not given. `rules`: those among which to look."""
        lease = self._look(segment).families[address.version].at(int(address))
        if lease is not None:
            return lease.kind, lease.told()
        rules = rules or self._rules_of(segment, address.version)
        for kind, numbers in rules.kinds.items():
            if int(address) in numbers:
                return kind, next(rule.why for rule in rules.all if rule.taken.contains(address))
        return FREE, ""

    def _cells(self, segment: str, subnet: Network, numbers: Iterable[int]) -> tuple[Cell, ...]:
        usable, whole = usable_range(subnet), range_of(subnet)
        known = self._rules_of(segment, subnet.version)
        rules = known._replace(
            all=[each for each in known.all if each.taken.first <= whole.last and whole.first <= each.taken.last]
        )
        cells = []
        for number in numbers:
            address = address_of(subnet.version, number)
            kind, told = self._said(segment, address, rules)
            if kind == FREE and not usable.first <= number <= usable.last and self._is_edge(segment, address):
                kind, told = UNUSABLE, "network or broadcast address"
            cells.append(Cell(str(address), kind, told))
        return tuple(cells)

    def _is_edge(self, segment: str, address: Address) -> bool:
        """Whether no subnet lets a machine have it: a block of a larger one has no network address of its own."""
        known = [each for name, each in self._pools_by_subnet() if name == segment and address in each]
        return all(not usable_range(each).contains(address) for each in known)

    def _blocks(self, segment: str, subnets: Iterable[Network]) -> tuple[Block, ...]:
        return tuple(Block(str(each), self._use(segment, each, block=True)) for each in subnets)

    def _use(self, segment: str, subnet: Network, block: bool = False) -> Use:
        """How full it is; a block is a part of a subnet, so that all its addresses can be used."""
        where = range_of(subnet) if block else usable_range(subnet)
        family = self._look(segment).families[subnet.version]
        kinds = {kind: numbers.count(where.first, where.last) for kind, numbers in family.kinds.items()}
        for kind, numbers in self._rules_of(segment, subnet.version).kinds.items():
            also = sum(last - first + 1 - family.taken.count(first, last) for first, last in numbers.within(*where[1:]))
            kinds[kind] = kinds.get(kind, 0) + also
        kinds = {kind: count for kind, count in kinds.items() if count}
        return Use(min(where.size(), MOST), min(where.size() - sum(kinds.values()), MOST), _bounded(kinds))

    def _rules_of(self, name: str, version: int) -> _Rules:
        known = self._rules.get((name, version))
        if known is None:
            rules = [rule for rule in self._rules_made(name) if rule.taken.version == version]
            known = _Rules(rules, _painted(rules))
            if name in self._segments:
                self._rules[name, version] = known
        return known

    def _rules_made(self, name: str) -> Iterator[Rule]:
        for host, record in sorted(self._hosts.items()):
            if record and (not record.segments or name in record.segments):
                for each in record.addresses:
                    address = address_or_none(each.address)
                    if address is not None:
                        why = f"it is an address of Docker host {host} itself ({each.interface})"
                        yield Rule(Range(address.version, int(address), int(address)), HOST, why)
        yield from self._look(name).rules
        for key, (taken, lease) in sorted(self._look(name).by_hand.items()):
            yield Rule(taken, lease.kind, f"the etcd key {key!a} takes it: {lease.told()}")

    def _pools_by_subnet(self) -> dict[tuple[str, Network], list[PoolLine]]:
        if self._subnets is None:
            self._subnets = {}
            for pool, hosts in self._pools.values():
                if pool is not None:
                    options = {name: value for name, value in pool.options().items() if name != "segment"}
                    line = PoolLine(tuple(sorted(hosts)), str(pool.range or ""), options)
                    self._subnets.setdefault((pool.segment, pool.subnet), []).append(line)
        return self._subnets

    def _map_with(self, segment: str, address: Address) -> Network:
        """The map on which the address is a cell: of the smallest subnet known that has it, or a block of that."""
        known = [each for name, each in self._pools_by_subnet() if name == segment and address in each]
        version = address.version
        step = max(known, key=lambda each: each.prefixlen) if known else _neighbourhood(address)
        while version == 4 and range_of(step).size() > CELLS:
            step = _around(address, _block_length(step))
        return step

    def _segment_line(self, name: str, pools: dict[tuple[str, Network], list[PoolLine]]) -> SegmentLine:
        segment = self._look(name)
        known = {subnet: lines for (where, subnet), lines in pools.items() if where == name}
        elsewhere = self._elsewhere(segment, known)
        subnets = sorted([*known, *elsewhere], key=lambda each: (each.version, each.network_address, each.prefixlen))
        return clean(
            SegmentLine(
                name=name,
                subnets=tuple(
                    SubnetLine(str(each), self._use(name, each), tuple(known.get(each, ())))
                    for each in subnets[:LISTED]
                ),
                more=max(0, len(subnets) - LISTED),
                routers=tuple(map(str, segment.settings.routers())),
                note=segment.settings.note,
                error=segment.error,
            )
        )

    def _elsewhere(self, segment: _Segment, known: Iterable[Network]) -> set[Network]:
        """Where the leases lie that are in no pool's subnet: the /24 or /64 around each."""
        found: set[Network] = set()
        for version, family in segment.families.items():
            inside = AddressSet(range_of(each)[1:] for each in known if each.version == version)
            for first, last in family.taken:
                number = first
                while number <= last:
                    if number in inside:
                        number = inside.next_absent(number)
                        continue
                    around = _neighbourhood(address_of(version, number))
                    found.add(around)
                    number = range_of(around).last + 1
        return found

    def _host_line(self, name: str) -> HostLine:
        record, alive = self._hosts.get(name), self._alive.get(name)
        host = record or Host(name)
        alarms = host.alarms
        if name in self._hosts and record is None:
            alarms = ("its record in etcd cannot be read",)
        return clean(
            HostLine(
                name=name,
                alive=name in self._alive,
                leases=self._host_leases.get(name, 0),
                since=alive.since if alive else "",
                absent="" if name in self._alive else host.absent,
                version=(alive.version if alive else "") or host.version,
                joined=host.joined,
                retiring=name in self._orders,
                addresses=host.addresses[:LISTED],
                segments=host.segments[:LISTED],
                alarms=alarms[:LISTED],
            )
        )


def _neighbourhood(address: Address) -> Network:
    """Where an address is shown that is in no pool's subnet. Of ::/64 a part is IPv4 (RFC 4291 section 2.5.5)."""
    return _around(address, 24 if address.version == 4 else 64 if int(address) >> 64 else 96)


class _Wanted:
    """What is searched for."""

    def __init__(self, words: str) -> None:
        self.words = words
        self._texts = [words.encode("utf-8", "surrogatepass")]
        self.address = address_or_none(words)
        squeezed = words.translate(_SEPARATORS)
        self._mac = squeezed if len(squeezed) >= 4 and not set(squeezed) - set("0123456789abcdef") else ""
        self._of_address = not set(words) - set("0123456789abcdef.:")
        if self._mac:
            # In the past MACs stand as they were written, with colons.
            pairs = (self._mac[each : each + 2] for each in range(0, len(self._mac), 2))
            self._texts.append(":".join(pairs).encode())

    def may_be_in(self, history: bytes) -> bool:
        """Whether reading it is worth while."""
        lower = history.lower()
        return any(text in lower for text in self._texts)

    def number(self, version: int, number: int) -> bool:
        """Whether the address begins so."""
        return self._of_address and str(address_of(version, number)).startswith(self.words)

    def name(self, lease: Lease) -> bool:
        """Whether its container is called exactly so."""
        return lease.container is not None and lease.container.name.lower() == self.words

    def lease(self, lease: Lease | Tenancy) -> bool:
        words = self.words
        if words in lease.host.lower() or words in lease.mac.lower():
            return True
        if self._mac and self._mac in lease.mac.lower().translate(_SEPARATORS):
            return True
        container = lease.container
        if container is not None and (
            words in container.name.lower()
            or (container.id.startswith(words) and len(words) >= 4)
            or words in container.image.lower()
            or words in container.network.lower()
        ):
            return True
        return isinstance(lease, Lease) and (words in lease.note.lower() or words in lease.vendor.lower())

    def host(self, name: str, record: Host | None) -> bool:
        if self.words in name.lower():
            return True
        if record is None:
            return False
        macs = (*record.macs, *(each.mac for each in record.addresses))
        return any(each.address == self.words for each in record.addresses) or bool(
            self._mac and any(self._mac in mac.lower().translate(_SEPARATORS) for mac in macs)
        )


_SEPARATORS = str.maketrans("", "", ":-.")

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
K = TypeVar("K")


def clean(value: T) -> T:
    """The same value, its texts without what could steer a terminal or turn a line around, and of bounded length.

    Also what no JSON can hold: a key in etcd that is no UTF-8 comes as surrogates.
    """
    return _clean(value)  # type: ignore[no-any-return]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        short = value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"
        if short.isprintable():
            return short
        return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in short)
    if isinstance(value, msgspec.Struct):
        return type(value)(**{name: _clean(getattr(value, name)) for name in value.__struct_fields__})
    if isinstance(value, tuple):
        return tuple(map(_clean, value))
    if isinstance(value, dict):
        return {_clean(name): _clean(each) for name, each in value.items()}
    return value


def _put(kept: dict[K, T], key: K, value: T | None) -> None:
    if value is None:
        kept.pop(key, None)
    else:
        kept[key] = value


def _is_used(segment: _Segment) -> bool:
    return bool(
        segment.settings != SegmentSettings()
        or segment.error
        or segment.by_hand
        or any(family.leases for family in segment.families.values())
    )


def _painted(rules: list[Rule]) -> dict[str, AddressSet]:
    """The addresses of each kind; of two rules for one address the first counts."""
    kinds: dict[str, AddressSet] = {}
    painted = AddressSet()
    for rule in rules:
        first = rule.taken.first
        while (first := painted.next_absent(first)) <= rule.taken.last:
            following = painted.next_present(first)
            last = rule.taken.last if following is None else min(rule.taken.last, following - 1)
            kinds.setdefault(rule.kind, AddressSet()).add(first, last)
            painted.add(first, last)
    return kinds


def _bounded(kinds: dict[str, int]) -> dict[str, int]:
    return {kind: min(count, MOST) for kind, count in kinds.items()}


def _in(inner: Network, outer: Network) -> bool:
    return range_of(outer).first <= range_of(inner).first and range_of(inner).last <= range_of(outer).last


def _block_length(subnet: Network) -> int:
    """The prefix length of the blocks of an IPv4 map."""
    return min(24, subnet.prefixlen + 8)


def _split(subnet: Network) -> Iterator[Network]:
    yield from subnet.subnets(new_prefix=_block_length(subnet))


def _way(largest: Network, subnet: Network) -> Iterator[Network]:
    """The maps that are opened one after the other to get from a subnet to a block of it."""
    step = largest
    while step.prefixlen < subnet.prefixlen and range_of(step).size() > CELLS:
        yield step
        length = _block_length(step) if step.version == 4 else subnet.prefixlen
        if length > subnet.prefixlen:
            return
        step = _around(subnet.network_address, length)
    if step.prefixlen < subnet.prefixlen:
        yield step


def _around(address: Address, length: int) -> Network:
    """The network of this prefix length that has the address."""
    rest = BITS[address.version] - length
    return parse_network(f"{address_of(address.version, int(address) >> rest << rest)}/{length}")


def _inside(numbers: AddressSet, where: Range) -> Iterator[int]:
    for first, last in numbers.within(where.first, where.last):
        yield from range(first, last + 1)


def _occupied(numbers: AddressSet, subnet: Network) -> list[Network]:
    """The blocks in which something is, as small as they can be while there are not too many."""
    whole = range_of(subnet)
    runs = list(numbers.within(whole.first, whole.last))
    bits = BITS[subnet.version]

    def blocks(length: int) -> set[int]:
        """The first numbers of the blocks of this prefix length, more than BLOCKS when there are too many."""
        found: set[int] = set()
        for first, last in runs:
            found.update(_few(first >> (bits - length), last >> (bits - length)))
            if len(found) > BLOCKS:
                break
        return found

    shortest, longest = subnet.prefixlen, bits
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if len(blocks(middle)) <= BLOCKS:
            shortest = middle
        else:
            longest = middle - 1
    return [
        parse_network(f"{address_of(subnet.version, number << (bits - shortest))}/{shortest}")
        for number in sorted(blocks(shortest))
    ]


def _few(first: int, last: int) -> range:
    """All numbers of a run, or more than there may be blocks."""
    return range(first, min(last, first + BLOCKS) + 1)
