"""What may become of one address: every kind of lease, by every request, held by this host and by another."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_plugin import decisions
from ipam_plugin.addresses import Address
from ipam_plugin.decisions import FREE, KEEP, Claim, Decision
from ipam_plugin.errors import AddressTaken, Refused
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    KINDS,
    RESERVED,
    ROUTER,
    STANDBY,
    UNREADABLE,
    Container,
    Holder,
    Lease,
    Pool,
)
from properties import refusal

ME, OTHER = "here", "there"
POOL = Pool.make("10.0.0.0/24", "", {}, "lan")
ANOTHER_POOL = Pool.make("10.0.0.0/16", "", {}, "lan")
ADDRESS = ipaddress.ip_address("10.0.0.5")
CLAIM = Claim(ME, POOL, ADDRESS, "2025-01-01T00:00:00.000Z", "new-token")
MAC = "02:42:0a:00:00:05"
CARD = "52:54:00:00:00:01"
ALL_KINDS = (*KINDS, UNREADABLE)


@dataclass(frozen=True)
class Carried:
    """An address on an interface, as interfaces.py reads it from the kernel."""

    address: Address
    prefixlen: int = 24
    interface: str = "br0"
    mac: str = CARD
    bridge: bool = True
    temporary: bool = False
    deprecated: bool = False
    tentative: bool = False


def carried(text: str, **options: Any) -> Carried:
    address, _, length = text.partition("/")
    return Carried(ipaddress.ip_address(address), int(length), **options)


CARRIER = carried("10.0.0.5/24")


def lease_of(kind: str, host: str) -> Lease:
    """A lease as this program writes it for a kind and a host."""
    shared = kind == ROUTER
    return Lease(
        kind=kind,
        host="" if shared else host,
        mac=MAC if kind in (ENDPOINT, CONFLICT) else "",
        pool=POOL.id if kind == ENDPOINT else "",
        holders=(Holder(host, POOL.id),) if shared else (),
        token="old-token",
    )


def outcome(decide: Any, *arguments: Any) -> Any:
    """What a decision makes of the address: a kind of lease, KEEP, FREE or "taken"."""
    try:
        decision = decide(*arguments)
    except AddressTaken:
        return "taken"
    return decision.kind if isinstance(decision, Lease) else decision


def grant(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.grant_endpoint(lease, claim, MAC, None)


def grant_fixed(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.grant_endpoint(lease, claim, MAC, None, fixed=True)


def bridge_new(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.grant_bridge(lease, claim, None)


def bridge_carried(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.grant_bridge(lease, claim, CARRIER)


def own(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.register_own(lease, claim, CARRIER)


def give_back(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.give_back(lease, claim, "old-token", False, False)


def drop(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.drop_pool(lease, claim, False, False)


def end_conflict(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.end_conflict(lease, claim, "old-token")


def renew_conflict(lease: Lease | None, claim: Claim) -> Decision:
    return decisions.renew_conflict(lease, claim, "old-token", decisions.found_in_use(claim, CARD, ""))


REQUESTS = (
    grant, decisions.share, bridge_new, bridge_carried, own, give_back, drop,
    decisions.claim_ahead, end_conflict, renew_conflict,
)  # fmt: skip
T = "taken"
TABLE = {
    # kind, holder: endpoint, shared, bridge (new), bridge (carried), own address, release, network removed,
    # claimed ahead of a look, a stranger silent after its probation, one that answers again
    (None, ""): (ENDPOINT, ROUTER, HOST, HOST, HOST, KEEP, KEEP, STANDBY, KEEP, KEEP),
    (ENDPOINT, ME): (T, ENDPOINT, T, T, T, FREE, KEEP, T, KEEP, KEEP),
    (ENDPOINT, OTHER): (T, T, T, T, T, KEEP, KEEP, T, KEEP, KEEP),
    (HOST, ME): (T, HOST, HOST, HOST, HOST, KEEP, KEEP, T, KEEP, KEEP),
    (HOST, OTHER): (T, KEEP, T, T, T, KEEP, KEEP, T, KEEP, KEEP),
    (ROUTER, ME): (T, ROUTER, T, KEEP, KEEP, FREE, FREE, T, KEEP, KEEP),
    (ROUTER, OTHER): (T, ROUTER, T, KEEP, KEEP, KEEP, KEEP, T, KEEP, KEEP),
    (RESERVED, ME): (T, KEEP, T, KEEP, KEEP, KEEP, KEEP, KEEP, KEEP, KEEP),
    (RESERVED, OTHER): (T, KEEP, T, KEEP, KEEP, KEEP, KEEP, T, KEEP, KEEP),
    (CONFLICT, ME): (T, ROUTER, T, T, T, KEEP, KEEP, STANDBY, FREE, CONFLICT),
    (CONFLICT, OTHER): (T, ROUTER, T, T, T, KEEP, KEEP, STANDBY, FREE, CONFLICT),
    (STANDBY, ME): (ENDPOINT, ROUTER, HOST, HOST, HOST, KEEP, KEEP, STANDBY, KEEP, KEEP),
    (STANDBY, OTHER): (T, T, T, T, T, KEEP, KEEP, T, KEEP, KEEP),
    (HELD, ME): (ENDPOINT, ROUTER, HOST, HOST, HOST, KEEP, KEEP, KEEP, KEEP, KEEP),
    (HELD, OTHER): (T, T, T, T, T, KEEP, KEEP, T, KEEP, KEEP),
    (UNREADABLE, ME): (T, KEEP, T, KEEP, KEEP, KEEP, KEEP, T, KEEP, KEEP),
    (UNREADABLE, OTHER): (T, KEEP, T, KEEP, KEEP, KEEP, KEEP, T, KEEP, KEEP),
}


def test_the_table_has_every_kind() -> None:
    """A kind that is added without a decision for every request is not finished."""
    assert set(TABLE) == {(None, "")} | {(kind, host) for kind in ALL_KINDS for host in (ME, OTHER)}


@pytest.mark.parametrize(
    ("kind", "holder", "decide", "expected"),
    [
        pytest.param(kind, holder, decide, expected, id=f"{kind}-{holder}-{decide.__name__}")
        for (kind, holder), row in TABLE.items()
        for decide, expected in zip(REQUESTS, row, strict=True)
    ],
)
def test_every_kind_by_every_request(kind: str | None, holder: str, decide: Any, expected: Any) -> None:
    """P1, P3: the whole table of section 4's kinds against section 5's requests, by this host and another."""
    assert outcome(decide, lease_of(kind, holder) if kind else None, CLAIM) == expected


# --- properties over any lease -------------------------------------------------------------------------

hosts = st.sampled_from((ME, OTHER, ""))
pool_ids = st.sampled_from((POOL.id, ANOTHER_POOL.id, ""))
holder_lists = st.lists(
    st.builds(Holder, hosts, pool_ids, st.integers(1, 3)), max_size=3, unique_by=lambda each: (each.host, each.pool)
).map(tuple)
any_lease = st.builds(
    Lease,
    kind=st.sampled_from(ALL_KINDS),
    host=hosts,
    mac=st.sampled_from(("", MAC, CARD)),
    pool=pool_ids,
    token=st.sampled_from(("old-token", "another-token", "")),
    holders=holder_lists,
    noted=st.integers(0, 3),
)
claims = st.builds(CLAIM._replace, pool=st.sampled_from((POOL, ANOTHER_POOL)))
flags = st.booleans()


@st.composite
def decided(draw: st.DrawFn) -> tuple[Lease | None, Claim, Any]:
    """A lease, a claim of this host, and what one of the requests decides (None: it was refused)."""
    lease, claim = draw(st.none() | any_lease), draw(claims)
    carrier = draw(st.sampled_from((CARRIER, carried("10.0.0.5/24", mac=MAC, interface="br1"))))
    calls = (
        lambda: decisions.grant_endpoint(lease, claim, MAC, Container("web")),
        lambda: decisions.share(lease, claim),
        lambda: decisions.grant_bridge(lease, claim, draw(st.none() | st.just(carrier))),
        lambda: decisions.register_own(lease, claim, carrier),
        lambda: decisions.give_back(lease, claim, draw(st.sampled_from(("old-token", ""))), draw(flags), draw(flags)),
        lambda: decisions.drop_pool(lease, claim, draw(flags), draw(flags)),
        lambda: decisions.claim_ahead(lease, claim),
        lambda: decisions.end_conflict(lease, claim, draw(st.sampled_from(("old-token", "")))),
        lambda: decisions.renew_conflict(
            lease, claim, draw(st.sampled_from(("old-token", ""))), decisions.found_in_use(claim, CARD, "Acme")
        ),
    )
    try:
        return lease, claim, draw(st.sampled_from(calls))()
    except AddressTaken as error:
        said = str(error)
    assert lease is not None
    assert lease.told() in said  # P7
    return lease, claim, None


@given(decided())
def test_nobody_elses_address_changes_hands(case: tuple[Lease | None, Claim, Any]) -> None:
    """P1, P3: whatever is asked, the endpoint, standby, hold or own address of another host stays as it is.

    Only the very interface that carries it (its MAC), unused by any network, is this host under an earlier name.
    """
    lease, _, decision = case
    if lease is not None and lease.host != ME and lease.kind in (ENDPOINT, STANDBY, HELD):
        assert decision in (None, KEEP)
    if lease is not None and lease.host != ME and lease.kind == HOST and isinstance(decision, Lease):
        renamed = bool(lease.mac) and lease.mac == decision.mac and not lease.holders
        assert (decision.kind, decision.host) == (HOST, ME if renamed and decision.host == ME else lease.host)


@given(decided())
def test_what_an_operator_wrote_stays(case: tuple[Lease | None, Claim, Any]) -> None:
    """P2: a reservation, and a value that cannot be read, are never overwritten or freed by a request."""
    lease, _, decision = case
    if lease is not None and lease.kind in (RESERVED, UNREADABLE):
        assert decision in (None, KEEP)


@given(decided())
def test_other_hosts_holdings_are_not_touched(case: tuple[Lease | None, Claim, Any]) -> None:
    """P3: of a shared address a request changes this host's holding in this pool, never another's."""
    lease, claim, decision = case
    if lease is None or lease.kind not in (ROUTER, HOST) or decision in (None, KEEP):
        return
    others = [each for each in lease.holders if (each.host, each.pool) != (claim.host, claim.pool.id)]
    if decision is FREE:
        assert others == []
    elif decision.kind == lease.kind:
        assert [each for each in decision.holders if (each.host, each.pool) != (claim.host, claim.pool.id)] == others


@given(decided())
def test_counts_are_never_negative(case: tuple[Lease | None, Claim, Any]) -> None:
    """However requests and releases are mixed, no holder has less than one use and no note is below none."""
    if isinstance(case[2], Lease):
        assert all(each.count > 0 for each in case[2].holders)
        assert case[2].noted >= 0
        assert len({(each.host, each.pool) for each in case[2].holders}) == len(case[2].holders)


@given(decided())
def test_every_new_grant_has_a_new_token(case: tuple[Lease | None, Claim, Any]) -> None:
    """P3: a release that was meant for an earlier lease of the address can never match a later one."""
    lease, claim, decision = case
    if isinstance(decision, Lease):
        # A claim that is made anew, and a stranger that is seen anew, are new ones too: what was begun with the old
        # token (a conversion that hangs, the end of a probation) must not match them.
        same = (
            lease is not None
            and (decision.kind, decision.host) == (lease.kind, lease.host)
            and decision.kind not in (STANDBY, CONFLICT)
        )
        assert decision.token == (lease.token if same and lease is not None else claim.token)


@given(decided())
def test_no_write_looks_like_another(case: tuple[Lease | None, Claim, Any]) -> None:
    """P4: what is written carries a token of its own, so that two changes that say the same are told apart.

    A write is recognised as one's own by its value: two networks that count one holder up at the same moment would
    else both believe that the one write was theirs, and the address would be freed while one of them uses it.
    """
    lease, claim, decision = case
    if isinstance(decision, Lease) and not (lease is not None and lease.kind == decision.kind == HOST):
        assert claim.token in (decision.token, decision.change)


@pytest.mark.parametrize("lease", [lease_of(ROUTER, OTHER), lease_of(HOST, ME), lease_of(ENDPOINT, ME)])
def test_two_networks_that_share_an_address_at_once_write_different_values(lease: Lease) -> None:
    """P3, P4: the same change by two requests of one host differs in its token, and the later one is tried again."""
    first = decisions.share(lease, CLAIM)
    second = decisions.share(lease, CLAIM._replace(token="other-token"))
    assert first != second


@given(any_lease, claims, st.text(min_size=1, max_size=5), flags, flags)
def test_a_release_with_another_token_changes_nothing(
    lease: Lease, claim: Claim, token: str, is_carried: bool, kept: bool
) -> None:
    """P3: the fence. A late or repeated release meets a lease with another token, and leaves it."""
    assert decisions.give_back(lease, claim, lease.token + token, is_carried, kept) is KEEP


@given(st.none() | any_lease, claims, st.text(min_size=1, max_size=5))
def test_only_the_very_conflict_that_was_looked_at_ends(lease: Lease | None, claim: Claim, token: str) -> None:
    """P3: any living daemon may end or renew a conflict, by its proof; one that was seen anew meanwhile it may not."""
    other = (lease.token if lease else "") + token
    again = decisions.found_in_use(claim, CARD, "")
    assert decisions.end_conflict(lease, claim, other) is KEEP
    assert decisions.renew_conflict(lease, claim, other, again) is KEEP
    if lease is not None:
        ended = decisions.end_conflict(lease, claim, lease.token)
        assert (ended is FREE) == (lease.kind == CONFLICT)
        assert decisions.renew_conflict(lease, claim, lease.token, again) == (again if ended is FREE else KEEP)


@given(st.none() | any_lease, claims)
def test_a_claim_is_what_an_endpoint_may_be_made_of(lease: Lease | None, claim: Claim) -> None:
    """Section 7: whatever may be claimed becomes this host's standby, which its request alone can convert; whoever may
    not have the address as it stands may not claim it either, but for a stranger's, which is looked at anew. What is
    kept for a container of this host need not be claimed.
    """
    claimed = outcome(decisions.claim_ahead, lease, claim)
    if lease is None or lease.kind != CONFLICT:
        assert (claimed in (STANDBY, KEEP)) == (outcome(grant_fixed, lease, claim) == ENDPOINT)
    assert (claimed is KEEP) == decisions.is_kept_for(lease, claim.host)
    if claimed == STANDBY:
        standby = decisions.claim_ahead(lease, claim)
        assert isinstance(standby, Lease)
        assert (standby.host, standby.pool, standby.token) == (ME, claim.pool.id, claim.token)
        assert outcome(grant, standby, claim) == ENDPOINT
        assert outcome(grant, standby, claim._replace(host=OTHER)) == "taken"
        assert outcome(decisions.claim_ahead, standby, claim._replace(host=OTHER)) == "taken"


@given(any_lease, claims, flags, flags)
def test_a_removed_network_touches_no_endpoint(lease: Lease, claim: Claim, is_carried: bool, kept: bool) -> None:
    """Section 5: the last ReleasePool drops gateway and auxiliary holdings, never endpoints."""
    decision = decisions.drop_pool(lease, claim, is_carried, kept)
    if lease.kind not in (ROUTER, HOST):
        assert decision is KEEP
    if isinstance(decision, Lease):
        assert not any((each.host, each.pool) == (claim.host, claim.pool.id) for each in decision.holders)


@given(any_lease, claims, flags)
def test_share_and_release_leave_all_as_it_was(lease: Lease, claim: Claim, kept: bool) -> None:
    """A network created and removed, or a replayed endpoint released, changes nothing of what was there before.

    A lease that the sharing itself ended (a conflict, this host's standby) is free afterwards.
    """
    try:
        shared = decisions.share(lease, claim)
    except AddressTaken:
        return
    if shared is KEEP:
        # The release of an auxiliary address that took nothing gives nothing back.
        assert decisions.give_back(lease, claim, lease.token, False, kept) is KEEP
        return
    assert isinstance(shared, Lease)
    back = decisions.give_back(shared, claim._replace(token="later"), shared.token, True, kept)
    if lease.kind in (CONFLICT, STANDBY, HELD):
        assert back is FREE or (kept and isinstance(back, Lease) and back.holders == ())
    elif back is FREE:
        assert (lease.kind, lease.holders) == (ROUTER, ())
    else:
        assert isinstance(back, Lease)
        assert msgspec.structs.replace(back, change="") == lease


@given(st.integers(1, 5), flags)
def test_a_shared_address_is_free_after_as_many_releases_as_requests(times: int, removed: bool) -> None:
    """P5: counted per host and pool, the last one out frees it; a removed network drops all of its counts at once."""
    lease: Any = None
    for _ in range(times):
        lease = decisions.share(lease, CLAIM)
    lease = decisions.share(lease, CLAIM._replace(host=OTHER))
    for _ in range(1 if removed else times):
        lease = drop(lease, CLAIM) if removed else decisions.give_back(lease, CLAIM, lease.token, False, False)
    assert [each.host for each in lease.holders] == [OTHER]
    assert decisions.give_back(lease, CLAIM._replace(host=OTHER), lease.token, False, False) is FREE


# --- single rules --------------------------------------------------------------------------------------


def test_an_endpoint_says_who_has_it() -> None:
    """P7: the lease of a container has all that a later refusal will name."""
    granted = decisions.grant_endpoint(None, CLAIM, MAC, Container("web"))
    assert granted == Lease(
        ENDPOINT, ME, MAC, Container("web"), POOL.id, since="2025-01-01T00:00:00.000Z", token="new-token"
    )


@pytest.mark.parametrize("decide", [grant, decisions.claim_ahead])
def test_an_orphan_of_this_host_is_refused_with_the_cure(decide: Any) -> None:
    """Section 5: that nobody has it any more is proven by a look at dockerd, never by the request itself."""
    with pytest.raises(AddressTaken, match=r"a container on host here.*free it with: ipam-plugin release 10\.0\.0\.5"):
        decide(lease_of(ENDPOINT, ME), CLAIM)


def test_a_conflict_says_what_was_seen() -> None:
    """Section 4: which MAC, made by whom, seen by which host and when; it is held by nobody."""
    found = decisions.found_in_use(CLAIM, CARD, "Acme")
    assert found == Lease(CONFLICT, mac=CARD, vendor="Acme", by=ME, since=CLAIM.now, token=CLAIM.token)
    for part in (CARD, "Acme", "seen by host here", CLAIM.now):
        assert part in found.told()


def test_a_router_as_gateway_of_a_bridge_is_refused_with_the_cure() -> None:
    """Section 5: Docker would put it on this host's bridge and take the LAN down; the sentence says what to type."""
    with pytest.raises(AddressTaken) as caught:
        bridge_new(lease_of(CONFLICT, OTHER), CLAIM)
    assert f"MAC {MAC}" in str(caught.value)
    assert "--aux-address DefaultGatewayIPv4=10.0.0.5" in str(caught.value)
    assert "--ipam-opt gateway=router" in str(caught.value)


def test_two_machines_with_one_address_are_named() -> None:
    """The alarm about this host's own address names the interface, both MACs and the other holder."""
    with pytest.raises(AddressTaken) as caught:
        own(lease_of(ENDPOINT, OTHER), CLAIM)
    for part in ("br0 of host here", "10.0.0.5", CARD, MAC, "host there"):
        assert part in str(caught.value)


def test_this_hosts_own_card_is_no_conflict() -> None:
    """A conflict whose MAC is this host's interface was this host, seen before it was registered."""
    lease = msgspec.structs.replace(lease_of(CONFLICT, OTHER), mac=CARD)
    assert decisions.register_own(lease, CLAIM, CARRIER) == decisions.own_address(CLAIM, CARRIER)


def test_an_own_address_is_written_once() -> None:
    """Looking at the interfaces again writes nothing; a card that was replaced is written, with the holders kept."""
    lease = msgspec.structs.replace(decisions.own_address(CLAIM, CARRIER), holders=(Holder(ME, POOL.id),))
    assert own(lease, CLAIM) is KEEP
    changed = decisions.register_own(lease, CLAIM, carried("10.0.0.5/24", mac="52:54:00:00:00:99"))
    assert changed == msgspec.structs.replace(lease, mac="52:54:00:00:00:99")


def test_an_address_that_an_interface_carries_is_not_freed() -> None:
    """Section 5: Docker leaves its address on a bridge that the user made; then it is the host's own."""
    endpoint = decisions.give_back(lease_of(ENDPOINT, ME), CLAIM, "old-token", True, False)
    assert isinstance(endpoint, Lease)
    assert (endpoint.kind, endpoint.host, endpoint.token) == (HOST, ME, "new-token")
    bridge = msgspec.structs.replace(lease_of(HOST, ME), holders=(Holder(ME, POOL.id),))
    for rest in (
        decisions.give_back(bridge, CLAIM, "old-token", True, False),
        decisions.drop_pool(bridge, CLAIM, True, False),
    ):
        assert isinstance(rest, Lease)
        assert (rest.kind, rest.holders) == (HOST, ())
    assert decisions.give_back(bridge, CLAIM, "old-token", False, False) is FREE


def test_the_segments_own_router_never_goes() -> None:
    """Section 4: the lease of the segment's router stays when the last network that used it is gone."""
    rest = decisions.give_back(lease_of(ROUTER, ME), CLAIM, "old-token", False, True)
    assert isinstance(rest, Lease)
    assert rest.holders == ()


def test_a_replayed_endpoint_is_noted_and_its_release_takes_back_the_note() -> None:
    """Section 5: success for this host's own endpoint; the container keeps its address until its own release."""
    noted = decisions.share(lease_of(ENDPOINT, ME), CLAIM)
    assert isinstance(noted, Lease)
    assert noted.noted == 1
    kept = decisions.give_back(noted, CLAIM, "old-token", False, False)
    assert isinstance(kept, Lease)
    assert kept.noted == 0
    assert decisions.give_back(kept, CLAIM, "old-token", False, False) is FREE


def test_a_containers_address_is_no_auxiliary_one_of_another_network() -> None:
    """P5: a note by another pool could not be taken back (a release names its own pool), so the lease would stay."""
    with pytest.raises(AddressTaken, match="a container on host here"):
        decisions.share(lease_of(ENDPOINT, ME), CLAIM._replace(pool=ANOTHER_POOL))


def test_a_host_whose_address_an_operator_reserved_can_have_a_network() -> None:
    """An operator who writes down the Docker hosts' addresses does not keep them from creating networks."""
    assert bridge_carried(lease_of(RESERVED, ""), CLAIM) is KEEP


# --- the gateway of a bridge network -------------------------------------------------------------------


def choose(*there: Carried, pool: Pool = POOL, asked: str = "") -> Any:
    return decisions.bridge_address(there, pool, ipaddress.ip_address(asked) if asked else None, ME)


def test_no_interface_in_the_subnet() -> None:
    """Only then an address is chosen for a bridge that Docker makes."""
    assert choose() is None
    assert choose(carried("10.1.0.5/24"), carried("fd00::5/64")) is None


def test_the_first_matching_address_in_the_kernels_order() -> None:
    """Docker takes the first address of the bridge that lies in the subnet, and keeps only that one."""
    first, second = carried("10.0.0.9/24"), carried("10.0.0.2/24")
    assert choose(carried("10.9.0.1/24"), first, second) is first
    assert choose(first, second, asked="10.0.0.9") is first


def test_the_bridge_that_has_the_address_asked_for() -> None:
    """Two bridges in one subnet: --gateway says which one is meant, else the first one or the pool's interface."""
    first, second = carried("10.0.0.9/24"), carried("10.0.0.2/24", interface="br1")
    assert choose(first, second, asked="10.0.0.2") is second
    assert choose(first, second, pool=Pool.make("10.0.0.0/24", "", {"interface": "br1"}, "lan")) is second
    wrong = Pool.make("10.0.0.0/24", "", {"interface": "br7"}, "lan")
    said = refusal(Refused, lambda: choose(first, second, pool=wrong))
    assert "br7" in said
    assert "br0 does (10.0.0.9)" in said
    assert decisions.bridge_address([first, second], POOL, None, ME, "br1") is second  # by the configuration


def test_temporary_ipv6_addresses_are_skipped() -> None:
    """RFC 8981: they go away by themselves within days; nor is one taken that is deprecated or not yet settled."""
    pool = Pool.make("fd00::/64", "", {}, "lan")
    steady = carried("fd00::9/64")
    for passing in ("temporary", "deprecated", "tentative"):
        assert choose(carried("fd00::1/64", **{passing: True}), steady, pool=pool) is steady


def refused(*there: Carried, pool: Pool = POOL, asked: str = "") -> str:
    said = refusal(Refused, lambda: choose(*there, pool=pool, asked=asked))
    assert said.isprintable()
    return said


def test_an_interface_that_is_no_bridge_is_refused_with_both_cures() -> None:
    """Section 5: gateway=router for macvlan and ipvlan, the name of the bridge for bridges."""
    said = refused(carried("10.0.0.5/24", interface="eth0", bridge=False))
    for part in (
        "eth0 of host here carries 10.0.0.5/24",
        "--ipam-opt gateway=router",
        "com.docker.network.bridge.name",
    ):
        assert part in said


def test_another_gateway_than_the_bridge_has_is_refused() -> None:
    """Docker would delete the bridge's address: the host would be cut off its LAN."""
    said = refused(carried("10.0.0.5/24"), carried("10.0.0.6/24"), asked="10.0.0.6")
    for part in ("--gateway 10.0.0.6", "br0", "10.0.0.5", "--aux-address DefaultGatewayIPv4=10.0.0.6", "here"):
        assert part in said


@pytest.mark.parametrize(
    ("carrier", "subnet", "narrowed", "cure"),
    [
        ("10.0.0.5/16", "10.0.0.0/24", "", "--subnet 10.0.0.0/16 --ip-range 10.0.0.0/24"),
        ("10.0.0.5/16", "10.0.0.0/24", "10.0.0.64/26", "--subnet 10.0.0.0/16 --ip-range 10.0.0.64/26"),
        ("10.0.0.5/28", "10.0.0.0/24", "", "--subnet 10.0.0.0/28"),
        ("10.0.9.5/16", "10.0.0.0/24", "", "--subnet 10.0.0.0/16 --ip-range 10.0.0.0/24"),
        ("10.0.9.5/16", "10.0.0.0/24", "10.0.0.64/26", "--subnet 10.0.0.0/16 --ip-range 10.0.0.64/26"),
        ("fd00::5/56", "fd00:0:0:1::/64", "", "--subnet fd00::/56 --ip-range fd00:0:0:1::/64"),
    ],
)
def test_another_prefix_length_is_refused_with_the_cure(carrier: str, subnet: str, narrowed: str, cure: str) -> None:
    """Docker compares address and mask, and deletes the bridge's address when they differ; also where that address
    lies outside the subnet (then it takes the bridge's first one).
    """
    said = refused(carried(carrier), pool=Pool.make(subnet, narrowed, {}, "lan"))
    assert said.endswith(cure)
    assert f"bridge br0 of host here carries {carrier}" in said
    # The cure works: the same bridge, asked again as the sentence says.
    words = cure.split()
    cured = Pool.make(words[1], words[3] if len(words) > 2 else "", {}, "lan")
    assert choose(carried(carrier), pool=cured) == carried(carrier)


@given(any_lease, claims)
def test_only_the_address_of_a_removed_bridge_is_lost(lease: Lease, claim: Claim) -> None:
    """P3, P5: freed when no interface carries it is what Docker once put on a bridge of this host, unused by now."""
    freed = decisions.lost_address(lease, claim) is FREE
    assert freed == (lease.kind == HOST and lease.host == ME and bool(lease.pool) and not lease.holders)


@given(any_lease, claims, st.sampled_from(("", "old-token", "t", "new-token")), flags)
def test_an_own_address_that_is_gone(lease: Lease, claim: Claim, token: str, carried: bool) -> None:
    """P3: exactly the lease that was looked at, this host's own, unused by any network, on no interface now."""
    freed = decisions.end_own_address(lease, claim, token, carried) is FREE
    mine = lease.kind == HOST and lease.host == ME and lease.token == token != ""
    assert freed == (mine and not lease.holders and not carried)
    assert decisions.end_own_address(None, claim, token, carried) is KEEP


def test_a_renamed_host_takes_its_own_address_along() -> None:
    """P3: the lease of another name with the MAC of this very interface is this host's; with holders it is not."""
    lease = Lease(HOST, "before", mac=CARRIER.mac, interface="br0", token="t")
    assert decisions.register_own(lease, CLAIM, CARRIER) == decisions.own_address(CLAIM, CARRIER)
    used = msgspec.structs.replace(lease, holders=(Holder("before", "pool"),))
    with pytest.raises(AddressTaken):
        decisions.register_own(used, CLAIM, CARRIER)
    with pytest.raises(AddressTaken):
        decisions.register_own(msgspec.structs.replace(lease, mac="52:54:00:00:00:99"), CLAIM, CARRIER)


# ------------------------------------------------------------------------------- what a look at dockerd changes


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("host", [ME, OTHER])
@pytest.mark.parametrize("token", ["meant", "given again since"])
def test_only_the_lease_that_was_meant_ends_or_is_named(kind: str, host: str, token: str) -> None:
    """P3: between the look and the transaction the address may have become another container's, or another host's."""
    lease = Lease(kind=kind, host=host, token=token, mac=MAC, noted=1)
    meant = (kind, host, token) == (ENDPOINT, ME, "meant")
    assert decisions.end_orphan(lease, CLAIM, "meant", False) is (FREE if meant else KEEP)
    named = decisions.name_container(lease, CLAIM, "meant", Container("web"), CARD)
    if meant:
        # In a lease from a backup the MAC may be an earlier container's.
        assert named == msgspec.structs.replace(lease, container=Container("web"), mac=CARD)
        assert decisions.name_container(named, CLAIM, "meant", Container("web"), CARD) is KEEP  # type: ignore[arg-type]
    else:
        assert named is KEEP


def test_an_orphan_that_an_interface_carries_stays_the_hosts() -> None:
    lease = Lease(kind=ENDPOINT, host=ME, token="meant")
    ended = decisions.end_orphan(lease, CLAIM, "meant", True)
    assert isinstance(ended, Lease)
    assert (ended.kind, ended.host) == (HOST, ME)
    assert decisions.end_orphan(None, CLAIM, "meant", False) is KEEP


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("host", [ME, OTHER])
def test_a_running_container_gets_back_what_is_nobody_elses(kind: str, host: str) -> None:
    lease = Lease(kind=kind, host=host, mac=CARD)
    if (kind, host) == (ENDPOINT, ME):
        assert decisions.restore_endpoint(lease, CLAIM, MAC, None, False) is KEEP
    elif kind in (HELD, STANDBY, RESERVED) and host == ME:
        restored = decisions.restore_endpoint(lease, CLAIM, MAC, None, True)
        assert isinstance(restored, Lease)
        assert (restored.kind, restored.mac, restored.fixed, restored.token) == (ENDPOINT, MAC, True, CLAIM.token)
    else:
        with pytest.raises(AddressTaken):
            decisions.restore_endpoint(lease, CLAIM, MAC, None, False)


def test_a_conflict_with_the_containers_own_mac_is_the_container() -> None:
    found = Lease(kind=CONFLICT, mac=MAC)
    assert isinstance(decisions.restore_endpoint(found, CLAIM, MAC, None, False), Lease)
    with pytest.raises(AddressTaken):
        decisions.restore_endpoint(Lease(kind=CONFLICT), CLAIM, "", None, False)
    own = Lease(kind=ROUTER, holders=(Holder(ME, POOL.id),))
    assert decisions.restore_endpoint(own, CLAIM, MAC, None, False) is KEEP


# --- what a container had before its network had this driver -------------------------------------------


def adopted(name: str = "web") -> Lease:
    """A reservation for a container of this host, as `ipam-plugin adopt` writes it."""
    return Lease(kind=RESERVED, host=ME, mac=MAC, container=Container(name), token="old-token")


def test_an_adopted_address_is_given_to_its_container_alone() -> None:
    """`--ip` by that host takes it, and where the engine names containers only the one it is kept for. Without `--ip`
    nobody gets it, and no other host does."""
    for asking in (None, Container("web")):
        given = decisions.grant_endpoint(adopted(), CLAIM, CARD, asking, fixed=True)
        assert isinstance(given, Lease)
        assert (given.kind, given.host, given.token, given.note) == (ENDPOINT, ME, CLAIM.token, "")
        assert decisions.claim_ahead(adopted(), CLAIM, asking) is KEEP
    for decide in (decisions.claim_ahead, lambda *told: decisions.grant_endpoint(*told[:2], MAC, told[2], fixed=True)):
        with pytest.raises(AddressTaken, match=r"for container web on host here.*unreserve 10\.0\.0\.5"):
            decide(adopted(), CLAIM, Container("db"))
        with pytest.raises(AddressTaken):
            decide(adopted(), CLAIM._replace(host=OTHER), Container("web"))
    with pytest.raises(AddressTaken):
        decisions.grant_endpoint(adopted(), CLAIM, MAC, Container("web"))


# --- what the history remembers ------------------------------------------------------------------------

DECISIONS = (
    grant, grant_fixed, *REQUESTS[1:],
    lambda lease, claim: decisions.restore_endpoint(lease, claim, MAC, None, True),
    lambda lease, claim: decisions.give_back(lease, claim, "old-token", True, False),
    lambda lease, claim: decisions.give_back(lease, claim, "old-token", False, False, 600.0),
    lambda lease, claim: decisions.end_orphan(lease, claim, "old-token", True),
    lambda lease, claim: decisions.end_hold(lease, claim, "old-token"),
    lambda lease, claim: decisions.name_container(lease, claim, "old-token", Container("web"), MAC),
)  # fmt: skip


@given(st.none() | any_lease, claims, st.sampled_from(DECISIONS))
def test_no_holder_is_forgotten(lease: Lease | None, claim: Claim, decide: Any) -> None:
    """Section 4: whoever had an address and has it no more stands in its history, whatever the decision was; who goes
    on having it does not."""
    try:
        decision = decide(lease, claim)
    except AddressTaken:
        return
    if decision is KEEP:
        return
    after = decision if isinstance(decision, Lease) else None
    ended = decisions.ends(lease, after)
    if lease is None or lease.kind == STANDBY:
        assert not ended, "nobody had it"
    elif after is None or (after.kind, after.host) != (lease.kind, lease.host):
        back = lease.kind == HELD and after is not None and after.kind == ENDPOINT
        looked_at = lease.kind == CONFLICT and after is not None and after.kind in (CONFLICT, STANDBY)
        assert ended or back or looked_at
    elif after.token == lease.token:
        assert not ended, "the same grant, with one more word in it"


@pytest.mark.parametrize(
    ("before", "after", "ended"),
    [
        (
            Lease(HELD, ME, container=Container("web"), token="a"),
            Lease(ENDPOINT, ME, container=Container("web")),
            False,
        ),
        (Lease(HELD, ME, container=Container("web"), token="a"), Lease(ENDPOINT, ME, container=Container("db")), True),
        (Lease(HELD, ME, fixed=True, token="a"), Lease(ENDPOINT, ME, fixed=True), False),
        (Lease(HELD, ME, MAC, token="a"), Lease(ENDPOINT, ME, MAC), False),
        (Lease(HELD, ME, MAC, token="a"), Lease(ENDPOINT, ME, CARD), True),
        (Lease(CONFLICT, mac=MAC, token="a"), Lease(CONFLICT, mac=MAC, token="b"), False),
        (Lease(CONFLICT, mac=MAC, token="a"), Lease(CONFLICT, mac=CARD, token="b"), True),
        (Lease(CONFLICT, mac=MAC, token="a"), Lease(STANDBY, ME, MAC, token="b"), False),
        (Lease(ENDPOINT, ME, token="a"), Lease(STANDBY, ME, token="b"), True),
        (Lease(ENDPOINT, ME, token="a"), Lease(ENDPOINT, ME, token="b"), True),
        (Lease(RESERVED, token="a"), Lease(RESERVED, token="a", note="new"), False),
    ],
)
def test_who_goes_on_having_it(before: Lease, after: Lease, ended: bool) -> None:
    """A container that comes back and a stranger that is looked at again are no new holders; another container is."""
    assert decisions.ends(before, after) is ended
