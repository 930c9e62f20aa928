"""The register: Docker's requests carried out.

What becomes of an address is decided in decisions.py and written by ledger.py, in one transaction (promise P1); an
address that nobody on the LAN uses comes from claims.py.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from ipam_plugin import decisions
from ipam_plugin.addresses import Address, range_of, usable_range
from ipam_plugin.claims import Claims
from ipam_plugin.decisions import Claim, Decision, InterfaceAddress
from ipam_plugin.errors import (
    AddressTaken,
    BadRequest,
    EtcdRefused,
    EtcdRestored,
    EtcdUnavailable,
    OutcomeUnknown,
    PoolExhausted,
    Refused,
)
from ipam_plugin.etcd import Delete, KeyValue, Put
from ipam_plugin.journal import Work
from ipam_plugin.ledger import Ledger, timestamp
from ipam_plugin.model import (
    ENDPOINT,
    HOST,
    ROUTER,
    Container,
    Keys,
    Lease,
    Pool,
    PoolUse,
    decode,
    looks_hostile,
    read_lease,
    rewritten,
)
from ipam_plugin.neighbourhood import Verdict
from ipam_plugin.outage import Outage
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
from ipam_plugin.view import View

log = logging.getLogger(__name__)

# Keys of history/ in all. What they are for is to say who had an address last week, and to let freed addresses rest
# over a restart: ten thousand are about 15 MB, which every daemon reads when it starts.
HISTORY_KEYS = 10_000
TRIMMED = 100  # history keys in one transaction; etcd takes 128
TRIMS = 10  # transactions at a time, so that the heartbeat does not wait for a long tail


class Register:
    """The addresses of all segments, for the Docker Engine of one host.

    `segments` answers with the segments that this host is in, `carried(deadline)` with the addresses on its interfaces,
    in the kernel's order; `alarm(kind, text)` tells an operator, `may_give(deadline)` returns when addresses may be
    given or raises EtcdRestored, `on_given` is told of each container's address and MAC. `is_gone(pool, address, lease,
    deadline)` says whether nobody has the address of a lease of this host, by a look at dockerd that began after it was
    asked. Deadlines are absolute, in seconds of time.monotonic(). Every method may be called from any thread and raises
    the errors of errors.py, of which any that may have written is OutcomeUnknown.
    """

    def __init__(
        self,
        ledger: Ledger,
        claims: Claims,
        view: View,
        keys: Keys,
        host: str,
        *,
        outage: Outage,
        default_segment: str,
        segments: Callable[[], Collection[str]],
        carried: Callable[[float], Sequence[InterfaceAddress]],
        alarm: Callable[[str, str], None],
        may_give: Callable[[float], None] = lambda deadline: None,
        on_given: Callable[[Pool, Address, str], None] = lambda pool, address, mac: None,
        is_gone: Callable[[Pool, Address, Lease, float], bool] = lambda pool, address, lease, deadline: False,
    ) -> None:
        self._ledger = ledger
        self._claims = claims
        self._view = view
        self._keys = keys
        self._host = host
        self._outage = outage
        self._default_segment = default_segment
        self._segments = segments
        self._carried = carried
        self._alarm = alarm
        self._may_give = may_give
        self._on_given = on_given
        self._is_gone = is_gone
        self._engine_knows_us = True
        self._own: set[tuple[str, Address, str, str]] = set()  # own addresses as last written

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
        """One network of this host less. With the last one all that it holds goes, but never an endpoint."""
        pool = self._pool_to_release(request.PoolID)
        if pool is None:
            return
        known = self._view.pool_use(pool.id, self._host)
        if not self._outage.lasts:
            try:
                return self._leave_pool(pool, self._outage.patience(deadline) if known else deadline)
            except (EtcdUnavailable, EtcdRefused, OutcomeUnknown) as error:
                self._outage.noticed(error)
                if known is None:
                    raise
        if known is not None:
            self._outage.leave(pool, known.token)

    def _leave_pool(self, pool: Pool, deadline: float) -> None:
        key = self._keys.pool(pool, self._host)
        while True:
            found = self._ledger.read(key, deadline)
            use = _pool_use(found)
            if found is None:
                return
            if use is not None and use.count > 1:
                fewer = msgspec.structs.replace(use, count=use.count - 1, token=secrets.token_urlsafe(12))
                writes = [Put(key, rewritten(fewer, found.value))]
                if self._ledger.write("pool", {key: found.revision}, writes, deadline, proof=key).applied:
                    return
                continue
            unchanged = {key: found.revision}  # or else another network has come, and holds what would be dropped
            with self._claims.closed(pool, deadline):
                if (
                    self._drop_holdings(pool, unchanged, deadline)
                    and self._ledger.write("pool", unchanged, [Delete(key)], deadline).applied
                ):
                    return

    def correct_pool(self, pool: Pool, token: str, networks: int, deadline: float) -> bool:
        """Docker has so many networks of this pool, whatever its key with this token says ('': there is no key, but
        something is held for the pool). Without any, all goes as with the last ReleasePool. Whether it was still so.
        """
        key = self._keys.pool(pool, self._host)
        found = self._ledger.read(key, deadline)
        use = _pool_use(found)
        if (use.token if use is not None else "" if found is None else None) != token:
            return False
        unchanged = {key: found.revision if found else 0}
        if found is not None and use is not None and networks:
            counted = msgspec.structs.replace(use, count=networks, token=secrets.token_urlsafe(12))
            writes = [Put(key, rewritten(counted, found.value))]
            return self._ledger.write("pool", unchanged, writes, deadline, proof=key).applied
        if networks:
            return False
        with self._claims.closed(pool, deadline):
            if not self._drop_holdings(pool, unchanged, deadline):
                return False
            return found is None or self._ledger.write("pool", unchanged, [Delete(key)], deadline).applied

    def request_address(self, request: RequestAddress, deadline: float) -> str:
        """An address with the subnet's prefix length, in the register by the time this returns (promise P4)."""
        while True:
            self._may_give(deadline)
            try:
                return self._give(request, deadline)
            except EtcdRestored:
                continue  # it was found out in the middle of it

    def _give(self, request: RequestAddress, deadline: float) -> str:
        pool = Pool.parse(request.PoolID)
        asked = address_of(request.Address) if request.Address else None
        if asked is not None:
            _check_inside(pool, asked)
        self.ensure_pool(pool, deadline)
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
        waiting = self._outage.of(pool.segment, address)
        if waiting is not None:
            if waiting.what == "given" and waiting.lease is not None:
                self._outage.release(pool, address, waiting.lease.token)
            return
        known = self._view.entry(pool.segment, address)
        if known is None or not (known.host == self._host or known.kind == ROUTER):
            return
        sent = False
        if not self._outage.lasts:
            decide = self._release_of(pool, address, known.token, deadline)
            try:
                self._ledger.change(
                    self._ledger.claim(pool, address), decide, self._outage.patience(deadline), why="released"
                )
                return
            except (EtcdUnavailable, EtcdRefused) as error:
                self._outage.noticed(error)
            except OutcomeUnknown as error:
                self._outage.noticed(error)
                if known.kind != ENDPOINT:
                    raise  # it may have taken a holder out already; what is left goes with the pool
                sent = True
        # Docker never repeats a release.
        self._outage.release(pool, address, known.token, sent=sent)

    def _release_of(
        self, pool: Pool, address: Address, token: str, deadline: float
    ) -> Callable[[Lease | None, Claim], Decision]:
        return functools.partial(
            decisions.give_back,
            token=token,
            carried=self._is_carried(address, deadline),
            kept_router=self._is_router(pool, address),
            hold=self._view.hold(pool),
        )

    def settle(self, work: Work, deadline: float) -> None:
        """Write to etcd what was done while it was away (outage.py). Repeated, it changes nothing."""
        pool = Pool.parse(work.pool)
        if work.what == "left":
            use = _pool_use(self._ledger.read(self._keys.pool(pool, self._host), deadline))
            if use is not None and use.token in work.tokens:
                self._leave_pool(pool, deadline)
            return
        assert work.address is not None
        claim = self._ledger.claim(pool, work.address)
        # What is given here was given before, and what is released is not given to anybody.
        settle = functools.partial(self._ledger.change, claim, deadline=deadline, purpose="settle")
        if work.what == "given":
            assert work.lease is not None
            decide = functools.partial(decisions.settle_given, given=work.lease, tokens=work.tokens)
            try:
                settle(decide)
            except AddressTaken as error:
                name = work.lease.container.name if work.lease.container else f"with MAC {work.lease.mac}"
                self._alarm(
                    "address_lost",
                    f"a container of host {self._host} ({name}) was given {work.address} while etcd was away, and"
                    f" {error}. Remove that container, or move it to another address",
                )
        elif work.trusted:

            def release(lease: Lease, claim: Claim, token: str) -> Decision:
                return self._release_of(pool, claim.address, token, deadline)(lease, claim)

            decide = functools.partial(decisions.settle_released, tokens=work.tokens, release=release)
            settle(decide, why="released while etcd was away")

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
        if asked is not None:
            self._refuse_foreign_gateway(pool, asked, any(each.address == asked for each in carried), deadline)
        if asked is not None:
            self._outage.refuse_given(pool, asked)
            self._claims.ask_for(pool, asked, deadline)
        carrier = decisions.bridge_address(carried, pool, asked, self._host, self._view.interface(pool.segment))
        address = carrier.address if carrier else asked
        if address is None:
            # Docker makes a bridge for it: there is no wire yet that could be asked.
            return self._ledger.grant_next(
                pool, lambda claim: _lease(decisions.grant_bridge(None, claim, None)), deadline
            ).claim.address

        def decide(lease: Lease | None, claim: Claim) -> Decision:
            if carrier is None:
                # Docker will put it on a new bridge, so it must be as free as a container's.
                self._refuse_forbidden(pool, address)
            return decisions.grant_bridge(lease, claim, carrier)

        self._ledger.change(self._ledger.claim(pool, address), decide, deadline)
        return address

    def _refuse_foreign_gateway(self, pool: Pool, asked: Address, carried: bool, deadline: float) -> None:
        """Before anything else is said of the bridge: an address that is somebody else's is named as such."""
        answers = self._claims.answering(pool, asked, deadline)
        if carried:  # then this host is the router
            if answers.verdict is Verdict.STRANGER:
                raise AddressTaken(
                    f"--gateway {asked} is this host's own address, and another machine, MAC {answers.mac}, answers for"
                    " it as well: change one of the two"
                )
            return
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
        if answers.mac and answers.verdict is not Verdict.UNKNOWN:
            raise AddressTaken(
                f"--gateway {asked} answers from another machine, MAC {answers.mac}, and Docker would put it on this"
                f" host's bridge, which takes the LAN down: {cure}"
            )
        if asked in self._view.routers(pool.segment):
            raise AddressTaken(
                f"--gateway {asked} is the router of segment {pool.segment}, and Docker would put it on this host's"
                f" bridge, which takes the LAN down: {cure}"
            )
        found = self._ledger.read(self._keys.lease(pool.segment, asked), deadline)
        decisions.grant_bridge(read_lease(found.value) if found else None, self._ledger.claim(pool, asked), None)

    def _share(self, pool: Pool, address: Address, deadline: float) -> None:
        self._outage.refuse_given(pool, address)
        self._claims.ask_for(pool, address, deadline)

        def decide(lease: Lease | None, claim: Claim) -> Decision:
            if lease is None:
                self._ledger.settings(pool.segment)
                _check_usable(pool, address)
            return decisions.share(lease, claim)

        self._ledger.change(self._ledger.claim(pool, address), decide, deadline)

    def _refuse_unexplained(self, pool: Pool, asked: Address, deadline: float) -> None:
        """While the engine sends endpoints without a MAC, `--ip` looks like an auxiliary address: shared by hosts."""
        if self._engine_knows_us:
            return
        found = self._ledger.read(self._keys.lease(pool.segment, asked), deadline)
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

        known = self._is_known(mac, container)

        def given_again() -> Lease:
            self._refuse_forbidden(pool, address)
            claim = self._ledger.claim(pool, address)
            return _lease(decisions.grant_endpoint(None, claim, mac, container, fixed=True, known=known))

        waiting = self._outage.of(pool.segment, address)
        if waiting is not None and waiting.what == "released":
            # This host may have been cut off and retired meanwhile.
            answers = self._claims.answering(pool, address, deadline)
            if answers.verdict in (Verdict.STRANGER, Verdict.OURS):
                raise AddressTaken(
                    f"{address} of pool {pool} is in use on the wire: MAC {answers.mac} answers there; take another"
                    " address, or find that machine"
                )
        if self._outage.take_back(pool, address, given_again, deadline) is not None:
            self._on_given(pool, address, mac)
            return address
        self._claims.ask_for(pool, address, deadline)
        orphan = self._own_orphan(pool, address, deadline)

        def allowed(lease: Lease | None) -> Lease | None:
            self._refuse_forbidden(pool, address)
            if lease and lease.kind == ENDPOINT and (lease.token == orphan or self._ledger.is_abandoned(lease.token)):
                return None  # nobody has it, or it was given back or never handed out: only etcd does not know yet
            return lease

        def grant(lease: Lease | None, claim: Claim) -> Decision:
            return decisions.grant_endpoint(allowed(lease), claim, mac, container, fixed=True, known=known)

        def claim_ahead(lease: Lease | None, claim: Claim) -> Decision:
            return decisions.claim_ahead(allowed(lease), claim, container)

        if self._claims.asks_the_wire(pool):
            while not self._claims.hand_out(
                pool, self._claims.this(pool, address, claim_ahead, deadline), grant, deadline
            ):
                pass
        else:
            self._ledger.change(self._ledger.claim(pool, address), grant, deadline)
        self._on_given(pool, address, mac)
        return address

    def _own_orphan(self, pool: Pool, address: Address, deadline: float) -> str | None:
        """The token of this host's own lease of a container that is gone (an engine that crashed does not release)."""
        entry = self._view.entry(pool.segment, address)
        if entry is None or (entry.kind, entry.host) != (ENDPOINT, self._host):
            return None
        found = self._ledger.read(self._keys.lease(pool.segment, address), deadline)
        lease = read_lease(found.value) if found else None
        if lease is None or (lease.kind, lease.host) != (ENDPOINT, self._host) or not lease.token:
            return None
        return lease.token if self._is_gone(pool, address, lease, deadline) else None

    def _refuse_forbidden(self, pool: Pool, address: Address) -> None:
        self._ledger.settings(pool.segment)
        _check_usable(pool, address)
        for each in pool.exclude:
            if each.contains(address):
                raise AddressTaken(f"{address} of pool {pool} cannot be given: --ipam-opt exclude={each}")
        reason = self._view.forbids(pool.segment, address)
        mine = self._view.entry(pool.segment, address)
        if reason and not (mine and (mine.kind, mine.host) == (HOST, self._host)):
            raise AddressTaken(f"{address} of pool {pool} cannot be given: {reason}")

    def _next_free(self, pool: Pool, mac: str, container: Container | None, deadline: float) -> Address:
        """The address that is held for this container, or the next one that nobody has, or PoolExhausted."""
        known = self._is_known(mac, container)

        def grant(lease: Lease | None, claim: Claim) -> Lease:
            return _lease(decisions.grant_endpoint(lease, claim, mac, container, known=known))

        try:
            slot = self._claims.returning(pool, mac, container, deadline) if known else None
            while slot is None or not self._claims.hand_out(pool, slot, grant, deadline):
                if self._claims.asks_the_wire(pool):
                    slot = self._claims.silent(pool, deadline)
                    continue
                try:
                    address = self._ledger.grant_next(pool, functools.partial(grant, None), deadline).claim.address
                    break
                except PoolExhausted as full:
                    slot = self._claims.make_room(pool, full, deadline)
            else:
                address = slot.address
        except (EtcdUnavailable, OutcomeUnknown) as error:
            raise type(error)(
                f"pool {pool}: {error}, and of the addresses that host {self._host} had in standby for such a time"
                " none is left"
            ) from error
        self._on_given(pool, address, mac)
        return address

    def _is_known(self, mac: str, container: Container | None) -> bool:
        """Whether this container can be told from others when it asks again."""
        return container is not None or self._view.has_ended(mac)

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
            since=timestamp(),
        )
        found = self._ledger.read(key, deadline)
        while True:
            if found is not None and if_absent:
                return
            use = _pool_use(found)
            if found is not None and use is None:
                raise Refused(f"the etcd key {key} cannot be read and is not overwritten: delete it, then try again")
            counted = msgspec.structs.replace(use, count=use.count + 1) if use else fresh
            counted = msgspec.structs.replace(counted, token=secrets.token_urlsafe(12))
            value = rewritten(counted, found.value if found else b"")
            commit = self._ledger.write(
                "pool", {key: found.revision if found else 0}, [Put(key, value)], deadline, proof=key
            )
            if commit.applied:
                return
            found = commit.found[key]

    def ensure_pool(self, pool: Pool, deadline: float, known_absent: bool = False) -> None:
        """The engine has this PoolID from us, so it is served also when its key in etcd is gone."""
        if self._view.uses(pool.id, self._host) and not known_absent:
            return
        if self._ledger.read(self._keys.pool(pool, self._host), deadline) is None:
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
            if not self._ledger.change(
                self._ledger.claim(pool, address), decide, deadline, "network removed", unchanged
            ):
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
                claim = self._ledger.claim(Pool(segment=segment, subnet=network), carrier.address)
                decide = functools.partial(decisions.register_own, carrier=carrier)
                try:
                    self._ledger.change(claim, decide, deadline, purpose="own")
                    self._own.add(said)
                except AddressTaken as error:
                    self._alarm("own_address_taken", str(error))

    def free_lost_addresses(self, deadline: float) -> None:
        """Free the addresses of bridges that Docker took down after it had released them."""
        carried = {each.address for each in self._carried(deadline)}
        for segment, address in self._view.own_addresses(self._host):
            if address not in carried:
                pool = Pool(segment=segment, subnet=ipaddress.ip_network(address))
                self._ledger.change(
                    self._ledger.claim(pool, address), decisions.lost_address, deadline, why="bridge removed"
                )

    def trim_history(self, deadline: float, keys: int = HISTORY_KEYS) -> None:
        """Delete the oldest history keys beyond so many. Several hosts at once only get in each other's way."""
        for _ in range(TRIMS):
            oldest = self._view.oldest_history(keys, TRIMMED)
            deletes = [Delete(key) for key, _ in oldest]
            if not oldest or not self._ledger.write("trim", dict(oldest), deletes, deadline).applied:
                return

    def _is_carried(self, address: Address, deadline: float) -> bool:
        return any(each.address == address for each in self._carried(deadline))

    def _is_router(self, pool: Pool, address: Address) -> bool:
        return address in self._view.routers(pool.segment)


def _lease(decision: Decision) -> Lease:
    assert isinstance(decision, Lease)
    return decision


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
