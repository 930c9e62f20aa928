"""The reconciler on hosts with a stand-in for dockerd: what is freed, what comes back, what is only told."""

from __future__ import annotations

import time
from typing import Any

import pytest

from harness import KEYS, NOT_ASKED, FakeLan, Host, Lan, Reply, bridge, until
from ipam_plugin.addresses import parse_address
from ipam_plugin.evidence import APART
from ipam_plugin.model import CONFLICT, ENDPOINT, STANDBY, Container, Holder, Lease, encode
from ipam_plugin.neighbourhood import Habits

MAC = "02:42:00:00:00:77"
ASKED = Habits(probe="full", standby=0)


def host(lan: Lan, name: str = "a", **more: Any) -> tuple[Host, str]:
    """A host with one network, on a wire that is asked, whose dockerd is looked at."""
    made = lan.host(name, bridge("192.168.1.11/24"), **{"habits": NOT_ASKED, **more})
    pool = made.create()
    made.engine.create()
    return made, pool


def orphan(lan: Lan, of: Host, pool: str) -> str:
    """A lease of a container that vanished, beside one that runs: its address."""
    address = of.run(pool)
    keeps(lan, of, of.run(pool))
    return address


def keeps(lan: Lan, of: Host, address: str, name: str = "web") -> None:
    lease = lan.lease(address)
    assert lease is not None
    of.engine.start(name, address, lease.mac)


def looks(of: Host, count: int = 1, later: float = 0.0) -> None:
    """So many more looks were made and judged, as if so many seconds later."""
    of.engine.skew += later
    for _ in range(count):
        done = of.engine.looks + 2  # the next one begins when this one has been judged
        of.reconciler.wake()
        until(lambda done=done: of.engine.looks >= done, "two looks")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow one another at once."""
    monkeypatch.setattr("ipam_plugin.reconcile.SOON", 0.01)
    monkeypatch.setattr("ipam_plugin.reconcile.PERIOD", 0.02)
    monkeypatch.setattr("ipam_plugin.reconcile.AWAY", 0.01)
    monkeypatch.setattr("ipam_plugin.reconcile.SHOWS_WITHIN", 0.0)


def test_libnetwork_1207_a_vanished_containers_address_is_freed() -> None:
    with Lan() as lan:
        a, pool = host(lan)
        gone = orphan(lan, a, pool)
        a.reconcile()
        looks(a)
        assert lan.lease(gone)
        looks(a, later=APART)
        until(lambda: lan.lease(gone) is None, "it is free")
        assert len(lan.of_kind(ENDPOINT)) == 1
        history = lan.keys()[f"{KEYS.history}default/{gone}"]
        assert b"Docker does not know" in history
        assert a.reconciler.results["freed"] == 1


def test_contiv_1133_an_address_whose_endpoint_was_never_made() -> None:
    """The only lease of the host, so the look is empty: the same engine says so, and the wire is not asked here."""
    with Lan() as lan:
        a, pool = host(lan)
        address = a.run(pool)
        a.reconcile()
        looks(a)
        looks(a, later=APART)
        until(lambda: lan.lease(address) is None, "it is free")


def test_whereabouts_176_a_living_address_is_never_freed() -> None:
    """Docker has lost it, but it answers: the lease stays, and an operator is told."""
    wire = FakeLan()
    with Lan() as lan:
        a, pool = host(lan, habits=ASKED, wire=wire)
        address = orphan(lan, a, pool)
        lease = lan.lease(address)
        assert lease
        wire.machines[address] = lease.mac
        a.reconcile()
        looks(a)
        looks(a, later=APART)
        until(lambda: "orphan_answers" in dict(a.alarms), "the alarm")
        looks(a, 2)
        assert lan.lease(address) == lease
        assert MAC not in dict(a.alarms)["orphan_answers"]
        assert lease.mac in dict(a.alarms)["orphan_answers"]


@pytest.mark.parametrize(("dead", "free"), [("no router was heard", False), ("", True)])
def test_amazon_711_an_empty_answer_needs_a_living_wire(dead: str, free: bool) -> None:
    wire = FakeLan()
    with Lan() as lan:
        a, pool = host(lan, habits=ASKED, wire=wire)
        address = a.run(pool)
        wire.dead = dead
        a.reconcile()
        looks(a)
        looks(a, later=APART)
        looks(a, 2)
        assert (lan.lease(address) is None) == free


@pytest.mark.parametrize("what", ["empty", "with another container"])
def test_amazon_711_another_engine_frees_nothing_without_proof(what: str) -> None:
    """Neither an empty answer of it, nor one in which it shows other containers: where no wire can be asked."""
    state: dict[str, str] = {}
    with Lan() as lan:
        a, pool = host(lan, state=state)
        address = orphan(lan, a, pool)
        a.engine.start("lost", address)
        a.reconcile()
        looks(a)
        assert state["engine"].startswith("ENGINE 1970")
        a.engine.id = "ANOTHER"
        a.engine.attachments.clear()
        if what != "empty":
            keeps(lan, a, a.run(pool), "new")
        for _ in range(3):
            looks(a, later=APART)
        assert lan.lease(address)
        assert state["engine"].startswith("ENGINE" if what == "empty" else "ANOTHER")


def test_a_failed_look_frees_nothing() -> None:
    with Lan() as lan:
        a, pool = host(lan)
        address = orphan(lan, a, pool)
        a.reconcile()
        looks(a)
        a.engine.trouble = "dockerd does not answer"
        looks(a, 3, later=APART)
        assert lan.lease(address)
        assert a.reconciler.looks["failed"] >= 3
        a.engine.trouble = ""
        until(lambda: lan.lease(address) is None, "it counts on")


def test_what_waits_in_the_journal_is_left_alone() -> None:
    """etcd was away when the container stopped: the journal gives its address back, at its own time."""
    with Lan() as lan:
        a, pool = host(lan)
        address = orphan(lan, a, pool)
        a.etcd.set_down(True)
        a.post("/IpamDriver.ReleaseAddress", f'{{"PoolID": "{pool}", "Address": "{address}"}}'.encode())
        a.etcd.set_down(False)
        a.reconcile()
        looks(a)
        looks(a, 2, later=APART)
        assert lan.lease(address)


def test_etcd_from_a_backup_running_containers_get_their_leases_again() -> None:
    with Lan() as lan:
        a, pool = host(lan)
        address = a.run(pool)
        keeps(lan, a, address)
        before = lan.lease(address)
        assert before
        for key in [*lan.under(KEYS.leases), *lan.under(KEYS.pools)]:
            lan.delete(key)
        a.catch_up()
        a.reconcile()
        looks(a)
        assert lan.lease(address) is None
        looks(a, later=5)
        until(lambda: lan.lease(address), "it is back")
        now = lan.lease(address)
        assert now
        assert (now.kind, now.host, now.mac, now.pool) == (ENDPOINT, "a", before.mac, pool)
        assert now.container == Container("web", "id of web", "busybox", "lan")
        assert now.token != before.token
        assert lan.under(KEYS.pools).keys() == {f"{KEYS.pools}{pool}/a"}


@pytest.mark.parametrize(
    ("lease", "back"),
    [
        (Lease(kind=CONFLICT, mac=MAC, by="b", token="x"), True),
        (Lease(kind=CONFLICT, mac="02:00:00:00:00:99", by="b", token="x"), False),
        (Lease(kind=STANDBY, host="a", token="x"), True),
        (Lease(kind=STANDBY, host="b", token="x"), False),
        (Lease(kind=ENDPOINT, host="b", container=Container("theirs"), token="x"), False),
        (Lease(kind="reserved", by="ann"), False),
    ],
)
def test_an_address_that_is_somebody_elses_by_now(lease: Lease, back: bool) -> None:
    """Never taken away from the other; the alarm names both and says what to do."""
    with Lan() as lan:
        a, _ = host(lan)
        a.engine.start("web", "192.168.1.77", MAC)
        lan.put(KEYS.lease("default", a.engine.attachments[0].address), encode(lease))
        a.catch_up()
        a.reconcile()
        looks(a)
        looks(a, later=5)
        if back:
            until(lambda: lan.of_kind(ENDPOINT) == ["192.168.1.77"], "its lease")
            assert "address_lost" not in dict(a.alarms)
            return
        until(lambda: "address_lost" in dict(a.alarms), "the alarm")
        assert lan.lease("192.168.1.77") == lease
        text = dict(a.alarms)["address_lost"]
        for word in ("web", "192.168.1.77", lease.told(), "docker network disconnect lan web"):
            assert word in text


def test_a_name_is_filled_in_and_the_release_still_fits() -> None:
    """The grant stays the same one (P3), also after a rename."""
    with Lan() as lan:
        a, pool = host(lan)
        a.reconcile()
        address = a.run(pool)
        before = lan.lease(address)
        assert before
        keeps(lan, a, address)
        until(lambda: (lease := lan.lease(address)) and lease.container, "the name")
        known = a.engine.containers["id of web"]
        a.engine.containers["id of web"] = known._replace(name="shop")
        until(
            lambda: (lease := lan.lease(address)) and lease.container and lease.container.name == "shop", "the rename"
        )
        now = lan.lease(address)
        assert now
        assert now.token == before.token
        assert a.release(pool, address).ok == {}
        assert lan.lease(address) is None


def test_pools_that_no_network_uses() -> None:
    with Lan() as lan:
        a, pool = host(lan)
        other = a.create("192.168.1.0/24", "192.168.1.128/25")
        a.auxiliary(other, "192.168.1.200")
        a.create()  # a second network of the first pool, that was never made
        keeps(lan, a, a.run(pool))
        a.reconcile()
        looks(a)
        looks(a, later=APART)
        until(lambda: lan.lease("192.168.1.200") is None, "nothing is held any more")
        until(lambda: lan.under(KEYS.pools).keys() == {f"{KEYS.pools}{pool}/a"}, "only the one in use")
        until(lambda: b'"count":2' not in lan.under(KEYS.pools)[f"{KEYS.pools}{pool}/a"], "as many as there are")


def test_what_is_held_for_a_pool_without_a_key() -> None:
    with Lan() as lan:
        a, pool = host(lan)
        keeps(lan, a, a.run(pool))
        stray = Lease(kind="router", holders=(Holder("a", "default/192.168.1.0/25"), Holder("b", pool)), token="x")
        lan.put(f"{KEYS.leases}default/192.168.1.99", encode(stray))
        a.catch_up()
        a.reconcile()
        looks(a)
        looks(a, later=APART)

        def left() -> bool:
            lease = lan.lease("192.168.1.99")
            return lease is not None and lease.holders == (Holder("b", pool),)

        until(left, "only the other host's")


# ------------------------------------------------------------------------------------------------- --ip


def test_calico_746_an_address_of_the_hosts_own_orphan_is_taken_over() -> None:
    """A container with --ip starts again after a crash of the engine, without waiting for the grace."""
    with Lan() as lan:
        a, pool = host(lan, grace=300)
        address = orphan(lan, a, pool)
        before = lan.lease(address)
        a.reconcile()
        assert a.endpoint(pool, address).ok["Address"] == f"{address}/24"
        after = lan.lease(address)
        assert before
        assert after
        assert after.token != before.token


@pytest.mark.parametrize("why", ["it runs", "no answer", "another engine", "switched off", "it answers"])
def test_it_is_not_taken_over_without_proof(why: str) -> None:
    wire = FakeLan()
    with Lan() as lan:
        a, pool = host(lan, grace=300, habits=ASKED if why == "it answers" else NOT_ASKED, wire=wire)
        address = orphan(lan, a, pool)
        before = lan.lease(address)
        assert before
        if why != "switched off":
            a.reconcile()
            looks(a)
        if why == "it runs":
            keeps(lan, a, address, "db")
            until(lambda: (lease := lan.lease(address)) and lease.container, "its name")
        elif why == "no answer":
            a.engine.trouble = "dockerd does not answer"
        elif why == "another engine":
            a.engine.id = "ANOTHER"
            a.engine.attachments.clear()
        elif why == "it answers":
            wire.machines[address] = before.mac
        began = time.monotonic()
        refusal: Reply = a.endpoint(pool, address)
        assert "is taken" in refusal.error
        assert time.monotonic() - began < 3  # nobody waits for a dockerd that does not answer
        now = lan.lease(address)
        assert now
        assert now.token == before.token


def test_what_another_container_has_just_got_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """dockerd does not list it before it has made an endpoint of our answer (P1). A crash meanwhile ends that."""
    monkeypatch.setattr("ipam_plugin.reconcile.SHOWS_WITHIN", 20.0)
    with Lan() as lan:
        a, pool = host(lan, grace=300)
        address = orphan(lan, a, pool)
        a.reconcile()
        assert "is taken" in a.endpoint(pool, address).error
        a.engine.trouble = "dockerd does not answer"
        until(lambda: a.reconciler.looks["failed"] > 1, "dockerd is down")
        a.engine.trouble = ""
        looks(a)
        assert a.endpoint(pool, address).ok["Address"] == f"{address}/24"


def test_only_a_look_that_began_after_the_request_counts() -> None:
    """The one before may not have seen the container that has just started."""
    with Lan() as lan:
        a, pool = host(lan, grace=300)
        address = orphan(lan, a, pool)
        a.reconcile()
        looks(a)

        def appears() -> None:
            a.engine.shown = lambda: None
            keeps(lan, a, address, "db")

        a.engine.shown = appears
        assert "is taken" in a.endpoint(pool, address).error


def test_a_container_that_never_shows_is_not_asked_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipam_plugin.reconcile.PERIOD", 3600.0)
    monkeypatch.setattr("ipam_plugin.reconcile.SHOWS_WITHIN", 0.2)
    with Lan() as lan:
        a, pool = host(lan)
        a.reconcile()
        a.run(pool)
        until(lambda: a.engine.looks > 3, "looks for it")
        until(lambda: not a.reconciler._expected, "the end of it")
        before = a.engine.looks
        time.sleep(0.1)
        assert a.engine.looks <= before + 1


def test_a_burst_of_starts_is_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipam_plugin.reconcile.SOON", 0.5)
    monkeypatch.setattr("ipam_plugin.reconcile.PERIOD", 3600.0)
    with Lan() as lan:
        a, pool = host(lan)
        a.reconcile()
        until(lambda: a.engine.looks == 1, "the first look")
        for number in range(20):
            keeps(lan, a, a.run(pool), f"c{number}")
        until(lambda: a.engine.looks >= 2, "a look at them")
        until(lambda: all(lease.container for lease in lan.leases().values() if lease.kind == ENDPOINT), "names")
        assert a.engine.looks <= 4


def test_who_has_an_address_is_not_known_before_the_first_look() -> None:
    """Standby of an earlier run waits for it (section 8)."""
    with Lan() as lan:
        a, pool = host(lan)
        address = a.run(pool)
        keeps(lan, a, address)
        free = parse_address("192.168.1.99")
        assert not a.reconciler.nobody_has(free)
        a.reconcile()
        until(lambda: a.reconciler.nobody_has(free), "the first look")
        assert not a.reconciler.nobody_has(parse_address(address))
