"""etcd is restored from a backup under running containers: nobody is given what one of them has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import Fault
from harness import KEYS, NOT_ASKED, SUBNET, FakeLan, Host, Lan, bridge, until
from ipam_plugin.addresses import parse_address
from ipam_plugin.etcd import Position
from ipam_plugin.model import ENDPOINT, HELD, STANDBY, Lease, Pool, Restored, decode, encode
from ipam_plugin.model import Host as Record
from ipam_plugin.neighbourhood import Habits
from ipam_plugin.restoration import Seen, is_news, read_seen, unanswered, write_seen

TINY = "192.168.1.96/29"  # 8 addresses
MAC = "02:42:00:00:00:77"
words = st.text("abcXYZ09_-:.", min_size=1, max_size=20) | st.text(
    st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20
)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipam_plugin.reconcile.SOON", 0.01)
    monkeypatch.setattr("ipam_plugin.reconcile.PERIOD", 0.02)
    monkeypatch.setattr("ipam_plugin.evidence.SETTLED", 0.0)
    monkeypatch.setattr("ipam_plugin.holds.PERIOD", 0.01)
    monkeypatch.setattr("ipam_plugin.restoration.SETTLING", 0.1)
    monkeypatch.setattr("ipam_plugin.restoration.TICK", 0.01)
    monkeypatch.setattr("ipam_plugin.restoration.PERIOD", 0.05)


def host(lan: Lan, name: str, number: int, **more: Any) -> tuple[Host, str]:
    made = lan.host(name, bridge(f"192.168.1.{number}/24"), **{"habits": NOT_ASKED, **more})
    pool = made.create(ip_range=TINY)
    made.engine.create("lan", (SUBNET, TINY))
    return made, pool


def runs(lan: Lan, of: Host, pool: str, name: str = "web", address: str = "") -> str:
    """A container that dockerd shows."""
    got = of.run(pool, address)
    lease = lan.lease(got)
    assert lease is not None
    of.engine.start(name, got, lease.mac)
    return got


def all_free(of: Host, pool: str) -> set[str]:
    """Every address that the host can get."""
    found: set[str] = set()
    while (reply := of.endpoint(pool)).status == 200:
        found.add(str(reply.ok["Address"]).partition("/")[0])
    assert "is full" in reply.error
    return found


def test_without_waiting_two_containers_have_one_address() -> None:
    """What this is for: a register that believes the backup gives a running container's address again (P1)."""
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12)
        backup = lan.etcd.snapshot()
        mine = runs(lan, a, pool)
        lan.etcd.restore(backup)
        assert mine in all_free(b, pool)


@pytest.mark.parametrize("same_cluster", [True, False])
def test_a_running_containers_address_is_given_to_nobody(same_cluster: bool) -> None:
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12)
        a.guard()
        b.guard()
        backup = lan.etcd.snapshot()
        mine = runs(lan, a, pool)
        a.reconcile()
        b.reconcile()
        lan.etcd.restore(backup, lan.etcd.cluster_id if same_cluster else None)
        given = all_free(b, pool)
        assert given
        assert mine not in given
        lease = lan.lease(mine)
        assert lease is not None
        assert (lease.kind, lease.host) == (ENDPOINT, "a")
        assert [kind for kind, _ in a.alarms + b.alarms].count("etcd_went_back") == 2
        restored = decode(lan.keys()[KEYS.restored], Restored)
        for name in "ab":
            assert decode(lan.keys()[KEYS.host(name)], Record).restored == restored.token


def test_until_a_host_has_answered_others_give_nothing_and_say_why() -> None:
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12, time_limit=1.0)
        a.guard()
        b.guard()
        backup = lan.etcd.snapshot()
        mine = runs(lan, a, pool)
        b.reconcile()
        lan.etcd.restore(backup)
        until(lambda: KEYS.restored in lan.under(""), "it stands in etcd")
        for address in ("", mine, "192.168.1.99"):
            told = b.endpoint(pool, address).error
            assert "etcd was restored from a backup" in told
        assert "a did not say yet what containers there have" in b.endpoint(pool).error
        # A release is none of this.
        assert b.release(pool, "192.168.1.99").status == 200
        a.reconcile()
        until(lambda: b.endpoint(pool).status == 200, "addresses are given again")
        assert mine not in all_free(b, pool)


def test_a_host_that_never_answers_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipam_plugin.restoration.WAIT", 0.6)
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12)
        a.guard()
        b.guard()
        backup = lan.etcd.snapshot()
        b.reconcile()
        lan.put(KEYS.host("c"), encode(Record(host="c")))
        lan.etcd.restore(backup)
        lan.put(KEYS.host("c"), encode(Record(host="c")))
        assert b.endpoint(pool).status == 200
        [told] = [text for kind, text in b.alarms if kind == "restored_unanswered"]
        assert "c did not say within" in told
        # One that is known to be off is not waited for.
        lan.put(KEYS.host("c"), encode(Record(host="c", absent="2026-01-01T00:00:00Z")))
        b.catch_up()
        assert "c" not in b.view.hosts_present()


def test_a_grant_that_was_decided_before_its_host_noticed_is_not_written() -> None:
    """The key `restored` is compared in the transaction."""
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12, time_limit=1.0)
        b.guard()
        until(lambda: b.endpoint(pool).status == 200, "b gives")
        b.hold_watch()
        lan.put(KEYS.restored, encode(Restored(token="new", since="2026-01-01T00:00:00Z", by="a")))
        before = lan.leases()
        assert "etcd was restored" in b.endpoint(pool).error
        assert lan.leases() == before
        assert a.endpoint(pool).status == 200  # which has no guard: it is the comparison that refuses


def test_the_answer_to_a_grant_may_be_the_first_that_shows_it() -> None:
    """What was written by then is handed to nobody, and goes again."""
    with Lan() as lan:
        a, pool = host(lan, "a", 11, time_limit=1.0)
        a.guard()
        backup = lan.etcd.snapshot()
        until(lambda: a.endpoint(pool).status == 200, "a gives")
        a.hold_watch()

        def restored_just_now(expect: Any, writes: Any) -> Any:
            lan.etcd.on_commit = None
            lan.etcd.restore(backup)
            return Fault.PASS

        lan.etcd.on_commit = restored_just_now
        assert "etcd was restored" in a.endpoint(pool).error
        assert [each for each in lan.leases().values() if each.kind == ENDPOINT] != []
        a.free_orphans()
        a.release_watch()
        until(lambda: not [each for each in lan.leases().values() if each.kind == ENDPOINT], "it was taken back")


def test_a_daemon_that_was_down_at_the_time_notices_when_it_starts() -> None:
    state: dict[str, str] = {}
    with Lan() as lan:
        a, pool = host(lan, "a", 11, state=state)
        a.guard()
        until(lambda: "etcd-seen" in state, "how far etcd was is kept")
        backup = lan.etcd.snapshot()
        runs(lan, a, pool)
        revision = lan.etcd.snapshot().revision
        until(lambda: f" {revision}" in state["etcd-seen"], "the last revision is kept")
        a.stop()
        lan.hosts.remove(a)
        lan.etcd.on_went_back = lambda *what: None
        lan.etcd.restore(backup)
        lan.etcd.latest = None  # a new process
        again, _ = host(lan, "a", 11, state=state, time_limit=0.5)
        until(lambda: again.view.loaded.is_set(), "it has read etcd")
        again.guard()
        until(lambda: KEYS.restored in lan.under(""), "it has noticed, and written so")
        assert "etcd was restored" in again.endpoint(pool).error


def test_after_a_boot_nothing_has_to_be_compared() -> None:
    """dockerd starts after the daemon, and asks for addresses before it can be asked what it has."""
    with Lan() as lan:
        ahead = write_seen(Seen(Position(lan.etcd.cluster_id, 1000)))
        a, pool = host(lan, "a", 11, state={"etcd-seen": ahead})
        lan.etcd.latest = None
        a.guard(nothing_runs=True)
        assert a.endpoint(pool).status == 200
        assert KEYS.restored in lan.under("")


def test_standby_of_the_backup_is_given_back_for_whoever_has_the_address() -> None:
    """It was this host's an hour ago; since then it gave it back, and another host's container got it."""
    with Lan() as lan:
        habits = Habits(probe="full", standby=0)
        a, pool = host(lan, "a", 11, habits=habits, wire=FakeLan())
        b, _ = host(lan, "b", 12, habits=habits, wire=FakeLan())
        mine = "192.168.1.99"
        key = KEYS.lease("default", parse_address(mine))
        lan.put(key, encode(Lease(kind=STANDBY, host="b", pool=pool, token="old", since="2026-01-01T00:00:00Z")))
        backup = lan.etcd.snapshot()
        lan.delete(key)
        a.guard()
        b.guard()
        until(lambda: runs_at(lan, a, pool, mine), "a container has it")
        for each in (a, b):
            each.keep()
            each.reconcile()
        lan.etcd.restore(backup)
        until(lambda: lan.lease(mine) is not None and lan.lease(mine).host == "a", "it is a's again")  # type: ignore[union-attr]


def runs_at(lan: Lan, of: Host, pool: str, address: str) -> bool:
    if of.endpoint(pool, address).status != 200:
        return False
    lease = lan.lease(address)
    assert lease is not None
    of.engine.start("web", address, lease.mac)
    return True


def test_a_daemon_that_was_there_since_boot_has_to_compare_too() -> None:
    """Weeks later containers run. Until it has looked, what they have is given to nobody."""
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12)
        a.guard(nothing_runs=True)
        b.guard()
        backup = lan.etcd.snapshot()
        mine = runs(lan, a, pool)
        b.reconcile()
        lan.etcd.restore(backup)
        until(lambda: b.view.restored()[1] is not None, "it has been noticed")
        assert not b.restoration.answered == a.restoration.answered != ""  # type: ignore[union-attr]
        a.reconcile()
        assert mine not in all_free(b, pool)


def test_a_deleted_marker_does_not_make_an_older_one_news() -> None:
    """The backup has the marker of the time before, and what the hosts answered to that."""
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12)
        for each in (a, b):
            each.guard()
            each.reconcile()
        empty = lan.etcd.snapshot()
        runs(lan, a, pool, "one")
        lan.etcd.restore(empty)
        until(lambda: b.endpoint(pool).status == 200, "addresses are given again")
        first = decode(lan.keys()[KEYS.restored], Restored)
        backup = lan.etcd.snapshot()
        lan.delete(KEYS.restored)
        until(lambda: a.endpoint(pool).status == 200, "a gives")
        lan.etcd.restore(backup)
        until(lambda: decode(lan.keys()[KEYS.restored], Restored) != first, "this time is told from that one")
        until(lambda: b.endpoint(pool).status == 200, "addresses are given again")


def test_a_token_that_was_freed_lately_may_stand_there_again() -> None:
    """What this host freed within the hour is taken back where it appears, but not what a backup brings back: by its
    address it is a running container's."""
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        a.guard()
        mine = runs(lan, a, pool, "one")
        backup = lan.etcd.snapshot()
        a.engine.vanish("one")
        assert a.release(pool, mine).status == 200
        runs(lan, a, pool, "two", mine)
        lan.etcd.restore(backup)
        until(lambda: a.view.restored()[1] is not None, "it has been noticed")
        a.free_orphans()
        a.ledger.abandon("another", a.ledger.claim(Pool.parse(pool), parse_address("192.168.1.98")))
        until(lambda: a.ledger._orphans.empty(), "the orphans were looked through")
        assert lan.lease(mine) is not None
        a.reconcile()
        two = a.engine.attachments[-1].mac
        until(lambda: lan.lease(mine) is not None and lan.lease(mine).mac == two, "it is the other container's")  # type: ignore[union-attr]


def test_holds_of_the_backup_end() -> None:
    """What was kept an hour ago for a stopped container may be somebody's who runs."""
    with Lan() as lan:
        a, pool = host(lan, "a", 11)
        b, _ = host(lan, "b", 12)
        mine = "192.168.1.99"
        key = KEYS.lease("default", parse_address(mine))
        times = {"since": "2026-01-01T00:00:00Z", "until": "2099-01-01T00:00:00Z"}
        lan.put(key, encode(Lease(kind=HELD, host="b", pool=pool, token="old", mac=MAC, known=True, **times)))
        backup = lan.etcd.snapshot()
        lan.delete(key)
        for each in (a, b):
            each.guard()
        until(lambda: runs_at(lan, a, pool, mine), "a container has it")
        for each in (a, b):
            each.reconcile()
            each.tend_holds()
        lan.etcd.restore(backup)
        until(lambda: b.endpoint(pool).status == 200, "addresses are given again")
        until(lambda: lan.lease(mine) is not None and lan.lease(mine).host == "a", "it is a's again")  # type: ignore[union-attr]
        assert b.endpoint(pool, mine).status != 200


def test_a_new_host_does_not_wait_for_a_time_that_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Months after a restoration, in which other hosts were off."""
    monkeypatch.setattr("ipam_plugin.restoration.SETTLING", 3600.0)
    monkeypatch.setattr("ipam_plugin.restoration.WAIT", 3600.0)
    with Lan() as lan:
        lan.put(KEYS.restored, encode(Restored(token="long ago", since="2020-01-01T00:00:00Z", by="x")))
        lan.put(KEYS.host("x"), encode(Record(host="x")))
        a, pool = host(lan, "a", 11, time_limit=1.0)
        until(lambda: a.view.loaded.is_set(), "it has read etcd")
        a.guard()
        assert "etcd was restored" in a.endpoint(pool).error  # its own containers may not be known
        a.reconcile()
        until(lambda: a.endpoint(pool).status == 200, "it has compared")
        assert [kind for kind, _ in a.alarms] == []


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.none() | st.tuples(words, words))
def test_what_is_kept_is_read_again(cluster: int, revision: int, restored: tuple[str, str] | None) -> None:
    seen = Seen(Position(cluster, revision), *(restored or ()))
    assert read_seen(write_seen(seen)) == seen


@pytest.mark.parametrize("text", ["", "x", "12", "zz 5", "12 five", "\0"])
def test_what_is_damaged_says_nothing(text: str) -> None:
    assert read_seen(text) is None


def marker(token: str, minute: int) -> Restored:
    return Restored(token=token, since=f"2026-01-01T00:{minute:02d}:00.000Z")


@pytest.mark.parametrize(
    ("there", "known", "news"),
    [
        (None, None, False),
        (None, marker("a", 1), False),  # the backup is older than that
        (marker("a", 1), marker("a", 1), False),
        (marker("b", 2), marker("a", 1), True),  # another host was faster
        (marker("a", 1), marker("b", 2), False),  # the backup is older than the last time
        (marker("a", 1), None, True),
        (Restored("junk"), marker("a", 1), True),
    ],
)
def test_what_another_host_wrote_is_told_from_what_the_backup_has(
    there: Restored | None, known: Restored | None, news: bool
) -> None:
    assert is_news(there, known) is news


def test_who_has_not_answered() -> None:
    assert unanswered("t", {"a": "t", "b": "", "c": "s"}) == ["b", "c"]


def test_positions_of_one_life_only_go_forward() -> None:
    assert not Position(1, 5).is_behind(Position(1, 5))
    assert not Position(1, 6).is_behind(Position(1, 5))
    assert Position(1, 4).is_behind(Position(1, 5))
    assert Position(2, 6).is_behind(Position(1, 5))
