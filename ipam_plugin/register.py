"""The register: Docker's requests carried out as etcd transactions.

Each address handed out is one transaction: the key of the address is what was read (or does not exist), and
the segment's settings are those that were read (promise P1). What is decided is in decisions.py, what would be
tried next in view.py; here it is written, and repeated when the transaction found something else.
"""

from __future__ import annotations

import collections
import datetime
import functools
import ipaddress
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from ipam_plugin import decisions
from ipam_plugin.addresses import Address, range_of, usable_range
from ipam_plugin.decisions import FREE, KEEP, Claim, Decision, InterfaceAddress
from ipam_plugin.errors import (
    AddressTaken,
    BadRequest,
    EtcdUnavailable,
    IpamError,
    OutcomeUnknown,
    PoolExhausted,
    Refused,
)
from ipam_plugin.etcd import Commit, Delete, KeyValue, Put
from ipam_plugin.model import (
    ENDPOINT,
    HOST,
    ROUTER,
    Container,
    History,
    Keys,
    Lease,
    Pool,
    PoolUse,
    decode,
    encode,
    looks_hostile,
    read_lease,
    remember,
    rfc3339,
)
from ipam_plugin.protocol import (
    Purpose,
    ReleaseAddress,
    ReleasePool,
    RequestAddress,
    RequestPool,
    address_of,
    container_name,
    mac_of,
    purpose,
)
from ipam_plugin.view import Entry, Full, Settings, View

log = logging.getLogger(__name__)

# Keys of history/ in all. What they are for is to say who had an address last week, and to let freed addresses rest
# over a restart: ten thousand are about 15 MB, which every daemon reads when it starts.
HISTORY_KEYS = 10_000
TRIMMED = 100  # history keys in one transaction; etcd takes 128
TRIMS = 10  # transactions at a time, so that the heartbeat does not wait for a long tail


class Transactions(Protocol):
    """What the register needs of etcd. etcd.Etcd has it, and so has the fake of the tests."""

    def get_many(self, keys: Sequence[str], *, deadline: float) -> tuple[Mapping[str, KeyValue | None], int]: ...

    def commit(
        self, expect: Mapping[str, int], writes: Sequence[Put | Delete], *, deadline: float, proof: str | None = None
    ) -> Commit: ...


class _Abandoned(NamedTuple):
    """A lease that is still in etcd, or may appear there, though its grant was refused or its release was asked for."""

    claim: Claim
    decide: Callable[[Lease | None, Claim], Decision]  # what has to become of it
    end: float  # when it can be forgotten, monotonic seconds


class Register:
    """The addresses of all segments, for the Docker Engine of one host.

    `segments` answers with the segments that this host is in, `carried(deadline)` with the addresses on its interfaces,
    in the kernel's order; `alarm(kind, text)` tells an operator. Deadlines are absolute, in seconds of
    time.monotonic(). Every method may be called from any thread and raises the errors of errors.py, of which any that
    may have written is OutcomeUnknown.
    """

    def __init__(
        self,
        etcd: Transactions,
        view: View,
        keys: Keys,
        host: str,
        *,
        default_segment: str,
        segments: Callable[[], Collection[str]],
        carried: Callable[[float], Sequence[InterfaceAddress]],
        alarm: Callable[[str, str], None],
    ) -> None:
        self._etcd = etcd
        self._view = view
        self._keys = keys
        self._host = host
        self._default_segment = default_segment
        self._segments = segments
        self._carried = carried
        self._alarm = alarm
        self._engine_knows_us = True
        self._own: set[tuple[str, Address, str, str]] = set()  # own addresses as last written
        self._abandoned: dict[str, _Abandoned] = {}  # by token
        self._barrier = threading.Lock()  # for the next two
        self._barrier_began = 0.0  # monotonic seconds
        self._barrier_revision = 0
        self._orphans: queue.SimpleQueue[tuple[str, Entry] | None] = queue.SimpleQueue()
        self.transactions: collections.Counter[str] = collections.Counter()  # by what they were for
        self.lost_races = 0
        view.on_lease = self._saw_lease

    # ------------------------------------------------------------------------------------ requests

    def request_pool(self, request: RequestPool, deadline: float) -> tuple[Pool, str]:
        """The pool of a network that Docker is about to create, and its subnet."""
        if not request.Pool or request.Pool.startswith(("0.0.0.0/", "::/")):
            # An engine repeats this request for ever when the answer overlaps a route of its host.
            raise BadRequest(
                "this driver needs to know the LAN: docker network create --ipam-driver ipam-plugin"
                " --subnet 192.168.1.0/24 (your LAN's subnet)"
                + (", and --subnet with --ip-range" if request.SubPool else "")
            )
        pool = Pool.make(request.Pool, request.SubPool, request.Options or {}, self._default_segment)
        if request.V6 and pool.subnet.version == 4:
            raise BadRequest(f"--subnet {pool.subnet} is IPv4, but the engine asks for an IPv6 pool")
        if pool.candidates.size() < 1:
            raise BadRequest(f"pool {pool} has no address that a container could have")
        self._use_pool(pool, deadline)
        return pool, str(pool.subnet)

    def release_pool(self, request: ReleasePool, deadline: float) -> None:
        """One network of this host less. With the last one its gateway and auxiliary holdings go; endpoints never."""
        pool = self._pool_to_release(request.PoolID)
        if pool is None:
            return
        key = self._keys.pool(pool, self._host)
        while True:
            found = self._read(key, deadline)
            use = _pool_use(found)
            if found is None:
                return
            if use is not None and use.count > 1:
                fewer = msgspec.structs.replace(use, count=use.count - 1, token=secrets.token_urlsafe(12))
                if self._write("pool", {key: found.revision}, [Put(key, encode(fewer))], deadline, proof=key).applied:
                    return
                continue
            unchanged = {key: found.revision}  # or else another network has come, and holds what would be dropped
            if (
                self._drop_holdings(pool, unchanged, deadline)
                and self._write("pool", unchanged, [Delete(key)], deadline).applied
            ):
                return

    def request_address(self, request: RequestAddress, deadline: float) -> str:
        """An address with the subnet's prefix length, in the register by the time this returns (promise P4)."""
        pool = Pool.parse(request.PoolID)
        asked = address_of(request.Address) if request.Address else None
        if asked is not None:
            _check_inside(pool, asked)
        self._ensure_pool(pool, deadline)
        kind = purpose(request)
        if kind is Purpose.GATEWAY:
            address = self._gateway(pool, asked, deadline)
        elif kind is Purpose.AUXILIARY:
            assert asked is not None
            self._refuse_unexplained(pool, asked, deadline)
            self._share(pool, asked, deadline)
            address = asked
        else:
            self._learn_of_engine(kind, pool)
            name = container_name(request)
            container = Container(name=name) if name else None
            if asked is None:
                address = self._next_free(pool, mac_of(request), container, deadline)
            else:
                address = self._asked_for(pool, asked, mac_of(request), container, deadline)
        return pool.cidr(address)

    def release_address(self, request: ReleaseAddress, deadline: float) -> None:
        """Give back the lease that this host is known to hold now. Unknown, late or repeated: a success (P3)."""
        pool = self._pool_to_release(request.PoolID)
        address = address_of(request.Address)
        if pool is None or address not in pool.subnet:
            return
        known = self._view.entry(pool.segment, address)
        if known is None:
            return
        decide = functools.partial(
            decisions.give_back,
            token=known.token,
            carried=self._is_carried(address, deadline),
            kept_router=self._is_router(pool, address),
        )
        claim = self._claim(pool, address)
        try:
            self._change(claim, decide, deadline, why="released")
        except (EtcdUnavailable, OutcomeUnknown) as error:
            # Docker never repeats a release: it is tried again for as long as this process lives. Not one that may
            # have taken a holder out already.
            if known.token and (known.kind == ENDPOINT or isinstance(error, EtcdUnavailable)):
                self._abandon(self._keys.lease(pool.segment, address), claim._replace(token=known.token), decide)
            raise

    def engine_asked_capabilities(self) -> None:
        """dockerd has them again, so a request without a MAC will not come any more."""
        self._engine_knows_us = True

    # ------------------------------------------------------------------------ the kinds of addresses

    def _gateway(self, pool: Pool, asked: Address | None, deadline: float) -> Address:
        if pool.gateway == "router":
            if asked is None:
                routers = [each for each in self._view.routers(pool.segment) if each in pool.subnet]
                if not routers:
                    raise Refused(
                        f"segment {pool.segment} has no router set for {pool.subnet}: say --gateway ROUTER, or once"
                        f" for all hosts: ipam-plugin segment {pool.segment} --router ROUTER"
                    )
                asked = routers[0]
            self._share(pool, asked, deadline)
            return asked
        carried = self._carried(deadline)
        if asked is not None and not any(each.address == asked for each in carried):  # else this host is the router
            self._refuse_foreign_gateway(pool, asked, deadline)
        carrier = decisions.bridge_address(carried, pool, asked, self._host, self._view.interface(pool.segment))
        address = carrier.address if carrier else asked
        if address is None:
            return self._next_free(pool, "", None, deadline, bridge=True)

        def decide(lease: Lease | None, claim: Claim) -> Decision:
            if carrier is None:
                # Docker will put it on a new bridge, so it must be as free as a container's.
                self._refuse_forbidden(pool, address)
            return decisions.grant_bridge(lease, claim, carrier)

        self._change(self._claim(pool, address), decide, deadline)
        return address

    def _refuse_foreign_gateway(self, pool: Pool, asked: Address, deadline: float) -> None:
        """Before anything else is said of the bridge: an address that is somebody else's is named as such."""
        cure = (
            f"say --aux-address DefaultGatewayIPv{asked.version}={asked} instead of --gateway on a bridge network, or"
            " --ipam-opt gateway=router on macvlan and ipvlan"
        )
        owner = self._view.host_with(pool.segment, asked)
        if owner and owner != self._host:
            raise AddressTaken(
                f"--gateway {asked} is Docker host {owner}'s own address, and Docker would put it on this host's"
                f" bridge too: leave --gateway out, every host then uses its own address; or {cure}"
            )
        if asked in self._view.routers(pool.segment):
            raise AddressTaken(
                f"--gateway {asked} is the router of segment {pool.segment}, and Docker would put it on this host's"
                f" bridge, which takes the LAN down: {cure}"
            )
        found = self._read(self._keys.lease(pool.segment, asked), deadline)
        decisions.grant_bridge(read_lease(found.value) if found else None, self._claim(pool, asked), None)

    def _share(self, pool: Pool, address: Address, deadline: float) -> None:
        def decide(lease: Lease | None, claim: Claim) -> Decision:
            if lease is None:
                self._settings(pool.segment)
                _check_usable(pool, address)
            return decisions.share(lease, claim)

        self._change(self._claim(pool, address), decide, deadline)

    def _refuse_unexplained(self, pool: Pool, asked: Address, deadline: float) -> None:
        """While the engine sends endpoints without a MAC, `--ip` looks like an auxiliary address: shared by hosts."""
        if self._engine_knows_us:
            return
        found = self._read(self._keys.lease(pool.segment, asked), deadline)
        lease = read_lease(found.value) if found else None
        mine = lease and (
            (lease.kind == ENDPOINT and lease.host == self._host)
            or any(each.host == self._host for each in lease.holders)
        )
        if not mine:
            raise Refused(
                f"{asked} in pool {pool}: this engine lost the plugin's capabilities, so an address asked for by --ip"
                " cannot be told from an auxiliary one; restart dockerd, then try again"
            )

    def _learn_of_engine(self, kind: Purpose, pool: Pool) -> None:
        if kind is Purpose.NAMELESS and self._engine_knows_us:
            self._alarm(
                "engine_lost_capabilities",
                f"dockerd asked pool {pool} for a container's address without a MAC: its GetCapabilities failed once"
                " and is never asked again. Restart dockerd; until then --ip and new auxiliary addresses are refused",
            )
        self._engine_knows_us = kind is not Purpose.NAMELESS

    def _asked_for(
        self, pool: Pool, address: Address, mac: str, container: Container | None, deadline: float
    ) -> Address:
        """`--ip`: outside the range, but not outside the subnet."""

        def decide(lease: Lease | None, claim: Claim) -> Decision:
            self._refuse_forbidden(pool, address)
            if lease and lease.kind == ENDPOINT and lease.token in self._abandoned:
                lease = None  # it was given back, or never handed out: only etcd does not know yet
            return decisions.grant_endpoint(lease, claim, mac, container)

        self._change(self._claim(pool, address), decide, deadline)
        return address

    def _refuse_forbidden(self, pool: Pool, address: Address) -> None:
        self._settings(pool.segment)
        _check_usable(pool, address)
        for each in pool.exclude:
            if each.contains(address):
                raise AddressTaken(f"{address} of pool {pool} cannot be given: --ipam-opt exclude={each}")
        reason = self._view.forbids(pool.segment, address)
        mine = self._view.entry(pool.segment, address)
        if reason and not (mine and (mine.kind, mine.host) == (HOST, self._host)):
            raise AddressTaken(f"{address} of pool {pool} cannot be given: {reason}")

    def _next_free(
        self, pool: Pool, mac: str, container: Container | None, deadline: float, bridge: bool = False
    ) -> Address:
        """The next free address, or PoolExhausted once the view is known to have missed nothing."""
        caught_up = False
        while True:
            settings = self._settings(pool.segment)
            with self._view.candidate(pool) as address:
                if not isinstance(address, Full):
                    claim = self._claim(pool, address)
                    lease = (
                        decisions.grant_bridge(None, claim, None)
                        if bridge
                        else decisions.grant_endpoint(None, claim, mac, container)
                    )
                    assert isinstance(lease, Lease)
                    if self._grant(claim, lease, 0, settings, deadline).applied:
                        return address
                    self.lost_races += 1
                    self._view.lost_race(pool)
                    continue
            if address.pending:
                # Other requests of this daemon are trying the last addresses; one of them may leave one.
                if time.monotonic() >= deadline:
                    raise EtcdUnavailable(f"pool {pool}: the last free addresses were not settled in time")
                self._view.wait_for_change(deadline)
            elif not caught_up:
                self._catch_up(pool, deadline)
                caught_up = True
            else:
                raise PoolExhausted(f"pool {pool} is full: {address.counts}")

    def _catch_up(self, pool: Pool, deadline: float) -> None:
        """Until the view has all that was written before now.

        The barrier is a write of our own under the watched prefix: its event comes after all earlier ones. (A
        progress notification that is asked for can overtake events, etcd#15220.)
        """
        since = time.monotonic()
        late = EtcdUnavailable(f"pool {pool}: what etcd last wrote did not arrive in time; try again")
        # One barrier serves all who asked before it began: with one each, they would undo one another's.
        if not self._barrier.acquire(timeout=max(0.0, deadline - since)):
            raise late
        try:
            if self._barrier_began < since:
                began = time.monotonic()
                self._barrier_revision = self._write_barrier(pool, deadline)
                self._barrier_began = began
            revision = self._barrier_revision
        finally:
            self._barrier.release()
        if not self._view.wait_for(revision, deadline):
            raise late

    def _write_barrier(self, pool: Pool, deadline: float) -> int:
        key = self._keys.pool(pool, self._host)
        while True:
            found = self._read(key, deadline)
            if found is None:
                self._ensure_pool(pool, deadline, known_absent=True)
                continue
            commit = self._write("barrier", {key: found.revision}, [Put(key, found.value)], deadline)
            if commit.applied:
                return commit.revision

    # ---------------------------------------------------------------------------------------- pools

    def _use_pool(self, pool: Pool, deadline: float, if_absent: bool = False) -> None:
        """Count one more network of this host, after its own addresses in the subnet are in the register."""
        self.register_own_addresses(deadline, extra=pool)
        host = self._host
        key = self._keys.pool(pool, host)
        fresh = PoolUse(
            host=host,
            segment=pool.segment,
            subnet=str(pool.subnet),
            range=str(pool.range or ""),
            options=pool.options(),
            since=_now(),
        )
        found = self._read(key, deadline)
        while True:
            if found is not None and if_absent:
                return
            use = _pool_use(found)
            if found is not None and use is None:
                raise Refused(f"the etcd key {key} cannot be read and is not overwritten: delete it, then try again")
            counted = msgspec.structs.replace(use, count=use.count + 1) if use else fresh
            value = encode(msgspec.structs.replace(counted, token=secrets.token_urlsafe(12)))
            commit = self._write("pool", {key: found.revision if found else 0}, [Put(key, value)], deadline, proof=key)
            if commit.applied:
                return
            found = commit.found[key]

    def _ensure_pool(self, pool: Pool, deadline: float, known_absent: bool = False) -> None:
        """The engine has this PoolID from us, so it is served also when its key in etcd is gone."""
        if self._view.uses(pool.id, self._host) and not known_absent:
            return
        if self._read(self._keys.pool(pool, self._host), deadline) is None:
            log.warning("pool %s has no key in etcd for this host; the engine knows it, so it is written again", pool)
            self._use_pool(pool, deadline, if_absent=True)

    def _pool_to_release(self, pool_id: str) -> Pool | None:
        """None when it is none of ours: to release what is unknown is a success."""
        if looks_hostile(pool_id):
            raise BadRequest(f"PoolID {ascii(pool_id)[:80]} is not one that this plugin made")
        try:
            return Pool.parse(pool_id)
        except Refused:
            return None

    def _drop_holdings(self, pool: Pool, unchanged: Mapping[str, int], deadline: float) -> bool:
        """False when a key of `unchanged` has another revision by now."""
        for address, entry in self._view.shared_entries(pool, (ROUTER, HOST)):
            if entry.kind == HOST and entry.host != self._host:
                continue
            decide = functools.partial(
                decisions.drop_pool,
                carried=self._is_carried(address, deadline),
                kept_router=self._is_router(pool, address),
            )
            if not self._change(self._claim(pool, address), decide, deadline, "network removed", unchanged):
                return False
        return True

    # ------------------------------------------------------------------------- the host's own addresses

    def register_own_addresses(self, deadline: float, extra: Pool | None = None) -> None:
        """Write a `host` lease for every address of this host's interfaces that lies in a subnet of its segments.

        In other segments the address may be another machine's: LANs that never meet use the same ones.
        """
        mine = self._segments()
        subnets = {segment: networks for segment, networks in self._view.subnets().items() if segment in mine}
        if extra is not None:
            subnets.setdefault(extra.segment, set()).add(extra.subnet)
        for carrier in self._carried(deadline):
            for segment, networks in subnets.items():
                network = next((each for each in networks if carrier.address in each), None)
                if network is None or self._view.moves(segment, carrier.address):
                    continue
                known = self._view.entry(segment, carrier.address)
                said = (segment, carrier.address, carrier.mac, carrier.interface)
                if known and (known.kind, known.host) == (HOST, self._host) and said in self._own:
                    continue
                claim = self._claim(Pool(segment=segment, subnet=network), carrier.address)
                decide = functools.partial(decisions.register_own, carrier=carrier)
                try:
                    self._change(claim, decide, deadline)
                    self._own.add(said)
                except AddressTaken as error:
                    self._alarm("own_address_taken", str(error))

    def free_lost_addresses(self, deadline: float) -> None:
        """Free the addresses of bridges that Docker took down after it had released them."""
        carried = {each.address for each in self._carried(deadline)}
        for segment, address in self._view.own_addresses(self._host):
            if address not in carried:
                pool = Pool(segment=segment, subnet=ipaddress.ip_network(address))
                self._change(self._claim(pool, address), decisions.lost_address, deadline, why="bridge removed")

    def trim_history(self, deadline: float, keys: int = HISTORY_KEYS) -> None:
        """Delete the oldest history keys beyond so many. Several hosts at once only get in each other's way."""
        for _ in range(TRIMS):
            oldest = self._view.oldest_history(keys, TRIMMED)
            deletes = [Delete(key) for key, _ in oldest]
            if not oldest or not self._write("trim", dict(oldest), deletes, deadline).applied:
                return

    def _is_carried(self, address: Address, deadline: float) -> bool:
        return any(each.address == address for each in self._carried(deadline))

    def _is_router(self, pool: Pool, address: Address) -> bool:
        return address in self._view.routers(pool.segment)

    # --------------------------------------------------------------------------------- transactions

    def _claim(self, pool: Pool, address: Address) -> Claim:
        return Claim(self._host, pool, address, _now(), secrets.token_urlsafe(12))

    def _change(
        self,
        claim: Claim,
        decide: Callable[[Lease | None, Claim], Decision],
        deadline: float,
        why: str = "",
        unchanged: Mapping[str, int] | None = None,
    ) -> bool:
        """Read the lease, decide, write; again when the transaction found another one.

        False, and nothing was written, when a key of `unchanged` had another revision.
        """
        key = self._keys.lease(claim.pool.segment, claim.address)
        past_key = self._keys.past(claim.pool.segment, claim.address)
        unchanged = unchanged or {}
        found, _ = self._etcd.get_many([key, past_key], deadline=deadline)
        while True:
            settings = self._view.settings(claim.pool.segment)
            current = found[key]
            lease = read_lease(current.value) if current else None
            decision = decide(lease, claim)
            if decision is KEEP:
                return True
            if decision is FREE:
                assert current is not None
                assert lease is not None
                commit = self._free(claim, current, lease, found.get(past_key), why, unchanged, deadline)
                if commit.applied or commit.found[key] is None:
                    if lease.kind == ENDPOINT and lease.token:
                        # A try of its grant that got stuck may come through yet, now that the key is free.
                        ended = claim._replace(token=lease.token)
                        self._abandoned[lease.token] = _Abandoned(ended, decisions.without_orphan, _in_an_hour())
                    return True
            else:
                assert isinstance(decision, Lease)
                revision = current.revision if current else 0
                commit = self._grant(claim, decision, revision, settings, deadline, unchanged)
                if commit.applied:
                    return True
            for each, expected in unchanged.items():
                there = commit.found[each]
                if (there.revision if there else 0) != expected:
                    return False
            found = {past_key: found.get(past_key), **commit.found}
            claim = self._claim(claim.pool, claim.address)  # the token of this try may have been abandoned

    def _settings(self, segment: str) -> Settings:
        """The segment's settings, taken before anything is decided with them: a grant compares their revision."""
        settings = self._view.settings(segment)
        if settings.error:
            raise Refused(
                f"the settings of segment {segment} cannot be read, so nothing is given out in it: mend the etcd key"
                f" {self._keys.segment(segment)} ({settings.error})"
            )
        return settings

    def _grant(
        self,
        claim: Claim,
        lease: Lease,
        revision: int,
        settings: Settings,
        deadline: float,
        unchanged: Mapping[str, int] | None = None,
    ) -> Commit:
        """One transaction: the lease as it was read, and the segment's settings as they were read."""
        key = self._keys.lease(claim.pool.segment, claim.address)
        expect = {key: revision, self._keys.segment(claim.pool.segment): settings.revision, **(unchanged or {})}
        # An orphan is what was granted for a request and is not there anyway: not one holder more or less in a
        # lease that others share, and never the lease of an address that an interface of this host carries.
        # (That one names the interface; to ask the kernel here could fail, and hide that the outcome is unknown.)
        may_be_orphan = lease.token == claim.token and (
            lease.kind == ENDPOINT or bool(lease.holders and not lease.interface)
        )
        try:
            commit = self._write("grant", expect, [Put(key, encode(lease))], deadline, proof=key)
        except OutcomeUnknown:
            if may_be_orphan:
                self._abandon(key, claim)
            raise
        there = commit.found.get(key)
        if not commit.applied and there and lease.token == claim.token == read_lease(there.value).token:
            # An earlier try was applied, and somebody has changed the lease since (filled in a name): it is ours.
            return commit._replace(applied=True)
        if commit.uncertain and may_be_orphan:
            # Not ours now, but an earlier try may be written yet, should the address become free.
            self._abandon(key, claim)
        return commit

    def _free(
        self,
        claim: Claim,
        current: KeyValue,
        lease: Lease,
        past: KeyValue | None,
        why: str,
        unchanged: Mapping[str, int],
        deadline: float,
    ) -> Commit:
        """Delete the lease at the revision that was read, and remember its holder, in one transaction."""
        history = remember(_history(past), lease, why, datetime.datetime.now(datetime.UTC))
        past_key = self._keys.past(claim.pool.segment, claim.address)
        return self._write(
            "free",
            {current.key: current.revision, past_key: past.revision if past else 0, **unchanged},
            # In this order the view knows that the address rests before it sees it free.
            [Put(past_key, encode(history)), Delete(current.key)],
            deadline,
        )

    def _write(
        self,
        purpose: str,
        expect: Mapping[str, int],
        writes: Sequence[Put | Delete],
        deadline: float,
        proof: str | None = None,
    ) -> Commit:
        """The one place where the register writes. The view learns what was written or found."""
        self.transactions[purpose] += 1
        commit = self._etcd.commit(expect, writes, deadline=deadline, proof=proof)
        if commit.applied:
            for write in writes:
                self._view.learn(write.key, write.value if isinstance(write, Put) else None, commit.revision)
        else:
            for key, found in commit.found.items():
                self._view.learn(key, found.value if found else None, found.revision if found else commit.revision)
        return commit

    def _read(self, key: str, deadline: float) -> KeyValue | None:
        found, _ = self._etcd.get_many([key], deadline=deadline)
        return found[key]

    # ---------------------------------- grants whose outcome is not known, releases that did not reach etcd

    def _abandon(
        self, key: str, claim: Claim, decide: Callable[[Lease | None, Claim], Decision] = decisions.without_orphan
    ) -> None:
        """A lease that has to go, and is in etcd or may appear there yet: it goes when it is seen (P4)."""
        # A release is tried until it is done; a grant that nobody answered for cannot appear for ever.
        end = _in_an_hour() if decide is decisions.without_orphan else float("inf")
        self._abandoned[claim.token] = _Abandoned(claim, decide, end)
        log.warning("%s may stand in etcd though nobody has it; it is taken back as soon as that can be done", key)
        self._orphans.put((key, Entry("", self._host, claim.token, 0)))

    def _saw_lease(self, key: str, entry: Entry) -> None:
        if entry.token in self._abandoned:
            self._orphans.put((key, entry))

    def free_orphans(self, stop: threading.Event) -> None:
        """For a thread of its own: delete the leases of abandoned tokens, as long as it takes."""
        waiting: list[tuple[str, Entry]] = []
        while not stop.is_set():
            try:
                item = self._orphans.get(timeout=2.0 if waiting else 60.0)
                if item is None:
                    return
                waiting.append(item)
            except queue.Empty:
                now = time.monotonic()
                # A copy, because requests add to it meanwhile.
                for token in [token for token, each in list(self._abandoned.items()) if each.end < now]:
                    del self._abandoned[token]
            waiting = [each for each in waiting if not self._free_orphan(*each)]

    def stop_freeing_orphans(self) -> None:
        self._orphans.put(None)

    def _forget_release(self, token: str) -> None:
        """It is done, and from now on like any ended grant's: a stuck try may bring it back, for a while."""
        known = self._abandoned.get(token)
        if known is not None and known.end == float("inf"):
            self._abandoned[token] = known._replace(decide=decisions.without_orphan, end=_in_an_hour())

    def _free_orphan(self, key: str, entry: Entry) -> bool:
        """Whether nothing is left to do for now."""
        abandoned = self._abandoned.get(entry.token)
        if abandoned is None:
            return True
        try:
            found = self._read(key, time.monotonic() + 5)
            lease = read_lease(found.value) if found else None
            if found is None or lease is None or lease.token != entry.token:
                self._forget_release(entry.token)
                return True
            rest = abandoned.decide(lease, abandoned.claim)
            write = Delete(key) if rest is FREE else Put(key, encode(rest)) if isinstance(rest, Lease) else None
            if write and not self._write("orphan", {key: found.revision}, [write], time.monotonic() + 5).applied:
                return False
            if rest is not FREE:
                # Others have joined it and keep its token, which is no orphan's from now on.
                self._abandoned.pop(entry.token, None)
            self._forget_release(entry.token)
        except IpamError as error:
            log.info("the abandoned lease %s is not taken back yet: %s", key, error)
            return False
        log.warning("the abandoned lease %s was taken back", key)
        return True


def _in_an_hour() -> float:
    """Much longer than a paused etcd leader holds a transaction: ten seconds were seen."""
    return time.monotonic() + 3600


def _check_inside(pool: Pool, address: Address) -> None:
    if address.version != pool.subnet.version:
        raise BadRequest(f"{address} is an IPv{address.version} address, pool {pool} is IPv{pool.subnet.version}")
    if not range_of(pool.subnet).contains(address):
        raise BadRequest(f"{address} does not lie in {pool.subnet}, the subnet of pool {pool}")


def _check_usable(pool: Pool, address: Address) -> None:
    if not usable_range(pool.subnet).contains(address):
        raise AddressTaken(f"{address} of pool {pool} is the network or broadcast address of {pool.subnet}")


def _pool_use(found: KeyValue | None) -> PoolUse | None:
    try:
        return decode(found.value, PoolUse) if found else None
    except ValueError:
        return None


def _history(past: KeyValue | None) -> History:
    try:
        return decode(past.value, History) if past else History()
    except ValueError:
        return History()


def _now() -> str:
    return rfc3339(datetime.datetime.now(datetime.UTC))
