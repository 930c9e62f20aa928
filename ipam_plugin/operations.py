"""What an operator asks and changes, straight in etcd: no daemon is needed, any machine that reaches etcd will do.

Every change is one transaction on what was read, like the daemon's own.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from ipam_plugin import decisions
from ipam_plugin.addresses import Address, Network, Range, address_of, address_or_none, parse_range
from ipam_plugin.adopt import Write
from ipam_plugin.check import Found as FoundLease
from ipam_plugin.check import PoolKey, Register, Repair
from ipam_plugin.errors import AddressTaken, EtcdRefused, Refused, SchemaRefused
from ipam_plugin.etcd import Commit, Delete, KeyValue, Put
from ipam_plugin.explain import Facts, Local, carries, forbidding
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    PARTS,
    RESERVED,
    STANDBY,
    UNREADABLE,
    Alive,
    History,
    Host,
    Keys,
    Lease,
    Order,
    Part,
    Pool,
    PoolUse,
    Reservation,
    Restored,
    SegmentSettings,
    decode,
    encode,
    pool_of,
    read_as,
    read_lease,
    remembered,
    rewritten,
    rfc3339,
    segment_and_taken,
)
from ipam_plugin.schema import judge

READ_AT_ONCE = 100  # keys in one question; etcd takes 128
PATIENCE = 10.0  # seconds for one question to etcd
LOOK_AGAIN = 0.3  # seconds between two looks at how far an order got
NOBODY = 30.0  # seconds after which an order that no daemon has begun is nobody's
ORDER_OUTLIVES = 30  # seconds that an order may stand longer than its command waits, if that was killed


class Store(Protocol):
    """What is needed of etcd here."""

    def get_many(self, keys: Sequence[str], *, deadline: float) -> tuple[Mapping[str, KeyValue | None], int]: ...
    def list(self, prefix: str, *, deadline: float, keys_only: bool = False) -> tuple[list[KeyValue], int]: ...
    def commit(
        self, expect: Mapping[str, int], writes: Sequence[Put | Delete], *, deadline: float, proof: str | None = None
    ) -> Commit: ...
    def grant_ttl(self, seconds: int, *, deadline: float) -> int: ...
    def revoke(self, lease: int, *, deadline: float) -> None: ...


class Settled(NamedTuple):
    """What became of an address of a host that is being retired."""

    segment: str
    address: str
    why: str  # it stays taken; '' when it is free now


class Found(NamedTuple):
    """A lease and where it stands."""

    segment: str
    taken: Range  # one address, or all that a key names which was written by hand
    lease: Lease
    key: str
    revision: int

    @property
    def address(self) -> Address:
        """The one address, or the first of them."""
        return address_of(self.taken.version, self.taken.first)


class HostLine(NamedTuple):
    name: str
    alive: Alive | None
    host: Host | None
    leases: int

    @property
    def absent(self) -> str:
        """Since when it is not alive, '' where it is or where nobody has noticed yet."""
        return "" if self.alive or self.host is None else self.host.absent


class PoolLine(NamedTuple):
    pool_id: str
    pool: Pool | None
    uses: list[PoolUse]
    leases: int  # of containers


class Judged(NamedTuple):
    """What the register says of a machine that answers for an address."""

    lease: Lease | None
    stranger: bool  # nobody knows it: the address would be given to a container
    words: str  # who has the address, or why it is not given; '' for a stranger


T = TypeVar("T", bound=msgspec.Struct)


class Known:
    """What the register says of one segment's addresses and machines, as it was when it was read."""

    def __init__(
        self,
        segment: str,
        leases: Sequence[Found],
        settings: SegmentSettings | None,
        hosts: Mapping[str, Host],
        living: Collection[str],
    ) -> None:
        self._segment = segment
        self._settings = settings
        self._leases = {each.address: each.lease for each in leases if each.taken.size() == 1}
        self._ranges = [each for each in leases if each.taken.size() > 1]
        self.host_macs = {
            mac.lower(): name
            for name, host in hosts.items()
            for mac in (*host.macs, *(each.mac for each in host.addresses))
            if mac
        }
        self._host_addresses = {
            each.address: name
            for name, host in hosts.items()
            if not host.segments or segment in host.segments
            for each in host.addresses
        }
        own = [(address, name) for text, name in self._host_addresses.items() if (address := address_or_none(text))]
        self.addresses = sorted(self._leases.keys() | {address for address, _ in own}, key=lambda each: each.packed)
        #: Machines that should be heard on the LAN: the routers and the living hosts.
        self.peers = [*(settings.routers() if settings else []), *(each for each, name in own if name in living)]

    def judge(self, address: Address, mac: str) -> Judged:
        lease = self._leases.get(address)
        host = self.host_macs.get(mac, "")
        if lease is not None:
            known = host or (lease.kind != STANDBY and lease.mac.lower() in ("", mac))
            return Judged(lease, False, lease.told() + ("" if known else ", but another machine answers"))
        reasons = [f"the etcd key {each.key!a} takes it" for each in self._ranges if each.taken.contains(address)]
        reasons += forbidding(self._segment, self._settings, address)
        host = host or self._host_addresses.get(str(address), "")
        if host:
            reasons.append(f"Docker host {host} itself")
        return Judged(None, not reasons, "; ".join(reasons))


class Operations:
    """One operator's work on one register. Raises the errors of errors.py."""

    def __init__(self, etcd: Store, keys: Keys, who: str) -> None:
        self._etcd = etcd
        self._keys = keys
        self._who = who

    # ------------------------------------------------------------------------------------- looking

    def leases(self, segment: str | None = None) -> list[Found]:
        """Every address that is not free, in the order of segments and addresses, also hand-written keys."""
        prefix = self._keys.leases + (f"{segment}/" if segment else "")
        found = list(filter(None, map(self._found, self._list(prefix))))
        return sorted(found, key=lambda each: (each.segment, *each.taken))

    def facts(
        self,
        address: Address,
        segment: str | None,
        default: str,
        local: Callable[[str], Local] = lambda segment: Local(),
    ) -> list[Facts]:
        """What is known of an address: in the segment named, or else in each that may know of it. `local` is what the
        configuration of this machine says of a segment."""
        taking = self._taking(address, segment)
        settings = self.segments()
        pools = {each.id: each for each in self._pools_in_use()}.values()
        records = {each.key.removeprefix(self._keys.hosts): each.value for each in self._list(self._keys.hosts)}
        hosts = {name: host for name, value in records.items() if (host := read_as(value, Host))}
        beats = {each.key.removeprefix(self._keys.alive): each.value for each in self._list(self._keys.alive)}
        alive = {name: read_as(value, Alive) or Alive(name, "", "", "") for name, value in beats.items()}
        restored, _ = self._etcd.get_many([self._keys.restored], deadline=_deadline())
        back = restored[self._keys.restored]
        theirs = {each for host in hosts.values() for each in host.segments if carries(host, address)}
        in_use = {each.segment for each in pools}
        names = {segment} if segment else {*taking, *settings, default} | in_use | theirs
        found = []
        for name in sorted(names):
            by_hand = [key for key in taking.get(name, {}) if key != self._keys.lease(name, address)]
            lease, past = self._at_once(name, address, [key for key in by_hand if taking[name][key].size() == 1])
            found.append(
                Facts(
                    segment=name,
                    address=address,
                    lease=lease,
                    by_hand=by_hand,
                    settings=settings.get(name),
                    hosts=hosts,
                    alive=alive,
                    pools=[each for each in pools if each.segment == name],
                    past=past.past if past else (),
                    local=local(name),
                    now=time.time(),
                    restored=read_as(back.value if back else None, Restored),
                )
            )
        return found

    def _taking(self, address: Address, segment: str | None) -> dict[str, dict[str, Range]]:
        """The lease keys that take an address, by segment, and all that each takes. Their values are not read."""
        found: dict[str, dict[str, Range]] = {}
        prefix = self._keys.leases + (f"{segment}/" if segment else "")
        for each in self._etcd.list(prefix, deadline=_deadline(), keys_only=True)[0]:
            with contextlib.suppress(ValueError):
                name, named = segment_and_taken(each.key.removeprefix(self._keys.leases))
                taken = named if isinstance(named, Range) else Range(named.version, int(named), int(named))
                if taken.contains(address):
                    found.setdefault(name, {})[each.key] = taken
        return found

    def _at_once(self, segment: str, address: Address, aliases: Sequence[str]) -> tuple[Lease | None, History | None]:
        """The lease of an address and its history, of one moment: who ended is in the one or in the other. Where there
        is no lease, one that was written by hand in another spelling.
        """
        past_key = self._keys.past(segment, address)
        keys = [self._keys.lease(segment, address), *aliases[:READ_AT_ONCE]]
        found, _ = self._etcd.get_many([past_key, *keys], deadline=_deadline())
        past = found[past_key]
        lease = next((each for key in keys if (each := found[key])), None)
        return read_lease(lease.value) if lease else None, read_as(past.value if past else None, History)

    def _pools_in_use(self) -> Iterator[Pool]:
        for each in self._etcd.list(self._keys.pools, deadline=_deadline(), keys_only=True)[0]:
            pool = pool_of(each.key.removeprefix(self._keys.pools).rpartition("/")[0])
            if pool is not None:
                yield pool

    def hosts(self) -> list[HostLine]:
        known = {each.key.removeprefix(self._keys.hosts): each.value for each in self._list(self._keys.hosts)}
        alive = {each.key.removeprefix(self._keys.alive): each.value for each in self._list(self._keys.alive)}
        held: dict[str, int] = {}
        for each in self.leases():
            held[each.lease.host] = held.get(each.lease.host, 0) + 1
        names = sorted({*known, *alive, *filter(None, held)})
        return [
            HostLine(name, read_as(alive.get(name), Alive), read_as(known.get(name), Host), held.get(name, 0))
            for name in names
        ]

    def pools(self) -> list[PoolLine]:
        uses: dict[str, list[PoolUse]] = {}
        for each in self._list(self._keys.pools):
            pool_id, _, host = each.key.removeprefix(self._keys.pools).rpartition("/")
            use = read_as(each.value, PoolUse) or PoolUse(host=host, segment="", subnet="")
            uses.setdefault(pool_id, []).append(use)
        held: dict[str, int] = {}
        for found in self.leases():
            if found.lease.kind == ENDPOINT:
                held[found.lease.pool] = held.get(found.lease.pool, 0) + 1
        return [PoolLine(pool_id, pool_of(pool_id), uses[pool_id], held.get(pool_id, 0)) for pool_id in sorted(uses)]

    def segments(self) -> dict[str, SegmentSettings | str]:
        """Settings by segment; a text where they cannot be read."""
        found: dict[str, SegmentSettings | str] = {}
        for each in self._list(self._keys.segments):
            try:
                settings = decode(each.value, SegmentSettings)
                settings.ranges(), settings.routers()
                found[each.key.removeprefix(self._keys.segments)] = settings
            except ValueError as error:
                found[each.key.removeprefix(self._keys.segments)] = str(error)
        return found

    def subnets(self, segment: str) -> dict[Network, str]:
        """The subnets of a segment's pools, and the interface that the pool's options name for it ('': none)."""
        pools = [line.pool for line in self.pools() if line.pool and line.pool.segment == segment]
        return {pool.subnet: pool.interface for pool in sorted(pools, key=lambda pool: pool.interface)}

    def known(self, segment: str) -> Known:
        """All that a machine's answer on the wire is judged by."""
        settings = self.segments().get(segment)
        hosts = {each.key.removeprefix(self._keys.hosts): each.value for each in self._list(self._keys.hosts)}
        alive = {each.key.removeprefix(self._keys.alive) for each in self._list(self._keys.alive)}
        return Known(
            segment,
            self.leases(segment),
            settings if isinstance(settings, SegmentSettings) else None,
            {name: host for name, value in hosts.items() if (host := read_as(value, Host))},
            alive,
        )

    def register(self) -> Register:
        """All of it that is compared with Docker and the wire."""
        found = {each.key: self._found(each) for each in self._list(self._keys.leases)}
        hosts = {each.key.removeprefix(self._keys.hosts): each.value for each in self._list(self._keys.hosts)}
        pools = []
        for each in self._list(self._keys.pools):
            pool_id, _, host = each.key.removeprefix(self._keys.pools).rpartition("/")
            pools.append(
                PoolKey(each.key, each.revision, pool_id, pool_of(pool_id), host, read_as(each.value, PoolUse))
            )
        return Register(
            leases=[each for each in found.values() if each is not None],
            strays=[key for key, each in found.items() if each is None],
            pools=pools,
            hosts={name: read_as(value, Host) or Host(name) for name, value in hosts.items()},
            alive=frozenset(each.key.removeprefix(self._keys.alive) for each in self._list(self._keys.alive)),
            settings=self.segments(),
        )

    def schema_problem(self) -> str:
        """'' when this version understands what stands in etcd, else why not and what to do (schema.judge)."""
        found, _ = self._etcd.get_many([self._keys.schema], deadline=_deadline())
        there = found[self._keys.schema]
        return judge(self._keys.schema, there.value if there else None)

    def rights(self) -> dict[str, str]:
        """Whether this user of etcd may read and write each part of the register: '', or etcd's refusal.

        Nothing is written: etcd looks at the rights of a transaction as a whole, and this one asks for a revision that
        no key has. Raises EtcdUnavailable, and SchemaRefused.
        """
        found = {}
        for name in PARTS:
            prefix = f"{self._keys.prefix}{name}/"
            try:
                self._etcd.list(f"{prefix}doctor/", deadline=_deadline(), keys_only=True)
                nobody, other = f"{prefix}doctor/put", f"{prefix}doctor/delete"
                self._etcd.commit({nobody: -1}, [Put(nobody, b""), Delete(other)], deadline=_deadline())
                found[name] = ""
            except SchemaRefused:
                raise  # it says nothing about the rights
            except EtcdRefused as error:
                found[name] = str(error)
        return found

    # ------------------------------------------------------------------------------------ changing

    def mend(self, repair: Repair, why: str) -> bool:
        """Carry out what a comparison proposes. False, and nothing was written, when the key has changed since."""
        expect = {repair.key: repair.revision}
        writes: list[Put | Delete] = []
        value = repair.value
        fresh = secrets.token_urlsafe(12)
        if value is not None:
            # A lease that is changed keeps its token, which a release compares.
            named = {"change": fresh} if isinstance(value, Lease) and value.token else {"token": fresh}
            there = self._etcd.get_many([repair.key], deadline=_deadline())[0][repair.key]
            changed = rewritten(msgspec.structs.replace(value, **named), there.value if there else b"")
            writes.append(Put(repair.key, changed))
        else:
            writes.append(Delete(repair.key))
        after = value if isinstance(value, Lease) else None
        if decisions.ends(repair.ended, after):
            segment, taken = segment_and_taken(repair.key.removeprefix(self._keys.leases))
            assert not isinstance(taken, Range)
            assert repair.ended is not None
            compared, history = self._remembering(segment, taken, repair.ended, why)
            expect.update(compared)
            writes += history
        return self._commit(expect, writes, proof=repair.key if value is not None else None)

    def reserve(self, what: Range, segment: str, note: str) -> list[Found]:
        """Keep an address, or a range, for something else. Returns the leases that are in the range already.

        An address is reserved by its own key, a range by the segment's settings, which every grant compares. Where a
        stranger was found (a `conflict`), the operator's word ends the probation.
        """
        if what.size() > 1:
            kept = Reservation(range=str(what), note=note, by=self._who, since=_now())
            self.change_segment(
                segment,
                lambda settings: msgspec.structs.replace(
                    settings, reserved=(*(each for each in settings.reserved if each.range != kept.range), kept)
                ),
            )
            return [
                each
                for each in self.leases(segment)
                if each.taken.version == what.version
                and each.taken.first <= what.last
                and what.first <= each.taken.last
            ]
        address = address_of(what.version, what.first)
        lease = Lease(kind=RESERVED, note=note, by=self._who, since=_now(), token=secrets.token_urlsafe(12))
        for found in self._attempts(segment, address):
            there = found.lease if found is not None else None
            adopted = there is not None and there.kind == RESERVED and bool(there.host)  # for a container
            if there is not None and (adopted or there.kind not in (RESERVED, CONFLICT)):
                cure = f"; first: ipam-plugin unreserve {address}" if adopted else ""
                raise AddressTaken(f"{address} in segment {segment} is taken: {there.told()}{cure}")
            if self._replace(segment, address, found, lease):
                break
        return []

    def reserve_for(self, address: Address, macs: Sequence[str], segment: str, note: str) -> str:
        """Keep an address for the machine that uses it, when nobody has it or a `conflict` tells of that very machine.

        Returns '', or who has it (by now).
        """
        lease = Lease(RESERVED, mac=macs[0], note=note, by=self._who, since=_now(), token=secrets.token_urlsafe(12))
        for found in self._attempts(segment, address):
            if found is not None and not (found.lease.kind == CONFLICT and found.lease.mac.lower() in macs):
                return found.lease.told()
            if self._replace(segment, address, found, lease):
                return ""
        raise AssertionError("unreachable")

    def adopt(self, segment: str, write: Write) -> bool:
        """Write what `adopt` proposes. False, and nothing was written, when the address has changed since."""
        token = secrets.token_urlsafe(12)
        lease = msgspec.structs.replace(write.lease, by=self._who, since=_now(), token=token)
        if write.found is not None and write.found.key != self._keys.lease(segment, write.address):
            return False  # spelt otherwise, it would stay beside the new one
        return self._replace(segment, write.address, write.found, lease)

    def unreserve(self, what: Range, segment: str) -> None:
        """Undo `reserve`, also one that was written by hand in any spelling of the address."""
        address = address_of(what.version, what.first)
        leases = self.leases(segment)
        held = [each for each in leases if each.taken == what]
        # No program writes a lease of several addresses, whatever it says of its kind.
        reserved = [each for each in held if what.size() > 1 or each.lease.kind in (RESERVED, UNREADABLE)]
        for each in reserved:
            if not self._end(each, f"unreserved by {self._who}"):
                raise Refused(f"{what} in segment {segment} has just changed; look again with: show {address}")
        if reserved:
            return
        if what.size() > 1:
            self.change_segment(segment, lambda settings: _without_range(settings, what, segment))
            return
        if held:
            raise Refused(f"{address} in segment {segment} is not reserved, it is taken: {held[0].lease.told()}")
        inside = [str(each.taken) for each in leases if each.taken.contains(address)]
        settings = self.segments().get(segment)
        if isinstance(settings, SegmentSettings):
            inside += [each.range for each in settings.reserved if parse_range(each.range).contains(address)]
        if inside:
            raise Refused(f"{address} in segment {segment} is reserved with {inside[0]}; unreserve that range")
        raise Refused(f"{address} in segment {segment} is not reserved")

    def release(self, address: Address, segment: str, force: bool) -> Lease:
        """Free an address by an operator's word. Returns the lease that ended."""
        for found in self._attempts(segment, address):
            if found is None:
                raise Refused(f"{address} in segment {segment} is free already")
            lease = found.lease
            if lease.kind in (RESERVED, UNREADABLE):
                raise Refused(f"{address} in segment {segment} is reserved: ipam-plugin unreserve {address}")
            if lease.kind != CONFLICT and not force:
                gone = "its container is gone" if lease.kind == ENDPOINT else "nothing uses it any more"
                raise Refused(
                    f"{address} in segment {segment} is held: {lease.told()}. Nothing here proves that it is free; when"
                    f" you know that {gone}, say --force"
                )
            if self._end(found, f"released by {self._who}"):
                return lease
        raise AssertionError("unreachable")

    def give_back_standby(self, host: str) -> int:
        """Free what a host's daemon claimed ahead of need or keeps for stopped containers, when it is gone for good.
        Returns how many it was.

        One that has changed since it was read (a container has got it) stays.
        """
        own = [each for each in self.leases() if each.lease.kind in (STANDBY, HELD) and each.lease.host == host]
        return sum(self._end(each, f"host {host} was taken out of service") for each in own)

    def retire(self, name: str, force: bool, wait: float) -> Iterator[Settled]:
        """Have the living daemons free what a dead host had; each address as it is settled, for `wait` seconds.

        Raises Refused at once for a host that is alive, unknown, or being retired, and in the end where something
        stays. Whoever stops to iterate takes the order back.
        """
        ttl = self._order(name, force, wait)
        try:
            yield from self._follow(name, ttl, wait)
        finally:
            self._etcd.revoke(ttl, deadline=_deadline())

    def _order(self, name: str, force: bool, wait: float) -> int:
        """The order, written: the TTL lease that it is bound to."""
        keys = self._keys
        order = Order(name, self._who, _now(), secrets.token_urlsafe(12), force)
        while True:
            lines = {line.name: line for line in self.hosts()}
            if name not in lines:
                known = ", ".join(sorted(lines)) or "none"
                raise Refused(f"there is no host {name} in the register; known are: {known}")
            watched = (keys.retire(name), keys.heartbeat(name), keys.host(name))
            found, _ = self._etcd.get_many(watched, deadline=_deadline())
            standing, beat = found[watched[0]], found[watched[1]]
            if beat is not None:
                alive = read_as(beat.value, Alive)
                raise Refused(
                    f"host {name} is alive{f', its daemon runs since {alive.since}' if alive else ''}: only a host that"
                    " is gone is retired. Stop its daemon; of one that crashed or was cut off, that is known 30 s later"
                )
            if not any(line.alive for line in lines.values()):
                raise Refused(f"no daemon is alive that could ask the wire for what host {name} had: nothing was freed")
            if standing is not None:
                other = read_as(standing.value, Order)
                if other is None or not other.policy:
                    by = f", by {other.by} since {other.since}" if other else ""
                    raise Refused(f"host {name} is being retired already{by}; wait for the end of that")
                self._etcd.revoke(standing.lease, deadline=_deadline())
                continue
            ttl = self._etcd.grant_ttl(math.ceil(wait) + ORDER_OUTLIVES, deadline=_deadline())
            expect = {key: each.revision if each else 0 for key, each in found.items()}
            if self._commit(expect, [Put(keys.retire(name), encode(order), ttl)], proof=keys.retire(name)):
                return ttl

    def _follow(self, name: str, ttl: int, wait: float) -> Iterator[Settled]:
        began = time.monotonic()
        order, own = self._keys.retire(name), self._keys.retire_part(name, "")
        told: set[Settled] = set()
        while True:
            found = {each.key: each for each in self._list(order)}
            parts = {
                key.removeprefix(own): part
                for key, each in found.items()
                if key.startswith(own) and (part := read_as(each.value, Part))
            }
            for where, part in parts.items():
                settled = [Settled(where.partition("/")[0], address, "") for address in part.freed]
                settled += [Settled(each.segment, each.address, each.why) for each in part.kept if part.done]
                for each in settled:
                    if each not in told:
                        told.add(each)
                        yield each
            last = parts.get("end")
            if last is not None and last.done:
                if not last.forgotten:
                    stays = sum(len(part.kept) + part.more for part in parts.values())
                    raise Refused(f"host {name} stays in the register, for {stays} of its addresses stay taken")
                return
            if order not in found or found[order].lease != ttl:
                raise Refused(f"host {name} is there again, or the order was taken back: nothing more is freed")
            waited = time.monotonic() - began
            if not parts and waited > NOBODY:
                raise Refused(f"no daemon began to retire host {name} within {NOBODY:g} s: nothing was freed")
            if waited > wait:
                raise Refused(f"host {name} is not retired within {wait:g} s: what was not told yet stays taken")
            time.sleep(LOOK_AGAIN)

    def change_segment(self, segment: str, change: Callable[[SegmentSettings], SegmentSettings]) -> SegmentSettings:
        """Change the settings of a segment for all hosts. What cannot be read is not overwritten."""
        key = self._keys.segment(segment)
        while True:
            found, _ = self._etcd.get_many([key], deadline=_deadline())
            current = found[key]
            try:
                settings = decode(current.value, SegmentSettings) if current else SegmentSettings()
                settings.ranges(), settings.routers()
            except ValueError as error:
                raise Refused(f"the settings of segment {segment} ({key}) cannot be read, mend them: {error}") from None
            changed = change(settings)
            if self._commit({key: current.revision if current else 0}, [Put(key, encode(changed))]):
                return changed

    # ------------------------------------------------------------------------------------- reading

    def _replace(self, segment: str, address: Address, found: FoundLease | None, lease: Lease) -> bool:
        """The lease in place of what was found, which its history tells of. False when that is there no more."""
        key = self._keys.lease(segment, address)
        expect, writes = {key: found.revision if found else 0}, [Put(key, encode(lease))]
        if found is not None and decisions.ends(found.lease, lease):
            compared, history = self._remembering(segment, address, found.lease, decisions.why_ended(lease))
            expect.update(compared)
            writes += history
        return self._commit(expect, writes, proof=key)

    def _end(self, found: Found, why: str) -> bool:
        """The key goes, and the history of its address says who had it. False when it has changed since."""
        expect, writes = {found.key: found.revision}, [Delete(found.key)]
        if found.taken.size() > 1 or not decisions.ends(found.lease, None):
            return self._commit(expect, writes)
        compared, history = self._remembering(found.segment, found.address, found.lease, why)
        return self._commit(expect | compared, [*writes, *history])

    def _remembering(self, segment: str, address: Address, ended: Lease, why: str) -> tuple[dict[str, int], list[Put]]:
        """What the transaction that ends a lease compares and writes besides. Nothing, where what stands there cannot
        be read."""
        key = self._keys.past(segment, address)
        past = self._etcd.get_many([key], deadline=_deadline())[0][key]
        history = remembered(past.value if past else None, ended, why, datetime.datetime.now(datetime.UTC))
        return ({}, []) if history is None else ({key: past.revision if past else 0}, [Put(key, history)])

    def _attempts(self, segment: str, address: Address) -> Iterator[Found | None]:
        """The lease as it is now, again and again, for a change that another one got ahead of."""
        key = self._keys.lease(segment, address)
        while True:
            found, _ = self._etcd.get_many([key], deadline=_deadline())
            current = found[key]
            yield self._found(current) if current else None

    def _found(self, each: KeyValue) -> Found | None:
        try:
            segment, named = segment_and_taken(each.key.removeprefix(self._keys.leases))
        except ValueError:
            return None
        taken = named if isinstance(named, Range) else Range(named.version, int(named), int(named))
        return Found(segment, taken, read_lease(each.value), each.key, each.revision)

    def _list(self, prefix: str) -> list[KeyValue]:
        return self._etcd.list(prefix, deadline=_deadline())[0]

    def _commit(self, expect: Mapping[str, int], writes: Sequence[Put | Delete], proof: str | None = None) -> bool:
        return self._etcd.commit(expect, writes, deadline=_deadline(), proof=proof).applied


def _without_range(settings: SegmentSettings, what: Range, segment: str) -> SegmentSettings:
    rest = tuple(each for each in settings.reserved if parse_range(each.range) != what)
    if len(rest) == len(settings.reserved):
        known = ", ".join(each.range for each in settings.reserved) or "none"
        raise Refused(f"{what} is not a reserved range of segment {segment}; these are: {known}")
    return msgspec.structs.replace(settings, reserved=rest)


def _now() -> str:
    return rfc3339(datetime.datetime.now(datetime.UTC))


def _deadline() -> float:
    return time.monotonic() + PATIENCE


def plain(value: Any) -> Any:
    """Structs and addresses as what JSON has."""
    return msgspec.to_builtins(value, str_keys=True)
