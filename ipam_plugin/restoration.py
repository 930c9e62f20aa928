"""etcd that was restored from a backup: nothing is given until it knows again what is in use.

A backup of an hour ago does not know the addresses that were given in that hour, and their containers run on. Whoever
notices first writes the key `restored`. From then on each host compares its dockerd with what etcd says, gives its
running containers their leases again (reconcile.py), and answers with the token of that key in its own record. A host
gives addresses again when all that may live have answered, or WAIT seconds after it noticed.

A grant compares the revision of that key, so one that was decided before its host noticed is not written, and whoever
finds by the answer to his own write that etcd went back hands nothing out (ledger.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol
from urllib.parse import quote, unquote

from ipam_plugin.errors import EtcdRestored, IpamError
from ipam_plugin.etcd import KeyValue, Position, Put
from ipam_plugin.ledger import Ledger, timestamp
from ipam_plugin.model import RESTORED_WAIT, Keys, Restored, decode, encode, parse_time
from ipam_plugin.view import View

log = logging.getLogger(__name__)

WAIT = RESTORED_WAIT  # after it nobody is waited for any more (design section 8)
# Seconds in which a host that the backup does not know connects again and writes its heartbeat: it tries every 8 s.
SETTLING = 12.0
LEFT = 0.5  # seconds of its deadline that a request keeps for what follows
TICK = 0.25  # seconds between two steps while addresses are kept back
PERIOD = 60.0  # seconds between two notes of how far etcd is
PATIENCE = 5.0  # seconds for one question or write
FILE = "etcd-seen"  # in state_dir, where `etcd` is the embedded one's data


class State(Protocol):
    """host.StateDir."""

    def read(self, name: str) -> str: ...
    def write(self, name: str, text: str) -> None: ...


class Source(Protocol):
    """etcd.Etcd."""

    @property
    def latest(self) -> Position | None: ...
    @property
    def epoch(self) -> int: ...


class Seen(NamedTuple):
    """How far this host has seen etcd, and the last restoration it knew; kept in state_dir."""

    position: Position
    token: str = ""  # '' where etcd never went back
    since: str = ""


def read_seen(text: str) -> Seen | None:
    """None when nothing is there that says it: then nothing is known of an earlier run."""
    try:
        cluster, revision, *restored = text.split()
        return Seen(Position(int(cluster, 16), int(revision)), *map(unquote, restored[:2]))
    except ValueError:
        return None


def write_seen(seen: Seen) -> str:
    # Quoted, for they stand in etcd, where anybody may have written anything.
    restored = " ".join(quote(each, safe=":") for each in (seen.token, seen.since))
    return f"{seen.position.cluster_id:x} {seen.position.revision} {restored}".strip()


def is_news(there: Restored | None, known: Restored | None) -> bool:
    """Whether what stands in etcd after it went back was written after that, and not before the backup was made."""
    if there is None or (known is not None and there.token == known.token):
        return False
    return known is None or (parse_time(there.since) or math.inf) > (parse_time(known.since) or 0.0)


def unanswered(token: str, hosts: Mapping[str, str]) -> list[str]:
    """The hosts that have not yet written what their containers have. `hosts`: those that may live, and the token that
    each has answered."""
    return sorted(host for host, answered in hosts.items() if answered != token)


class Restoration:
    """Whether this host may give addresses. One thread runs it; the other methods may be called from any thread.

    `nothing_runs`: the machine has just been booted, and dockerd starts after the daemon, so no container can have an
    address before this one gives it.
    `alarm(kind, text)` tells an operator, `changed` has the host's record written anew.
    """

    def __init__(
        self,
        etcd: Source,
        ledger: Ledger,
        view: View,
        keys: Keys,
        host: str,
        state: State,
        *,
        nothing_runs: bool,
        alarm: Callable[[str, str], None],
        changed: Callable[[], None],
    ) -> None:
        self._etcd = etcd
        self._ledger = ledger
        self._view = view
        self._keys = keys
        self._host = host
        self._state = state
        self._nothing_runs = nothing_runs
        self._alarm = alarm
        self._changed = changed
        self._kept = ""  # in state_dir
        self._wake = threading.Event()
        # For all below. The view calls `learned` with its own lock taken, so it is not asked with this one taken.
        self._condition = threading.Condition()
        self._open = False
        self._why = "the daemon has just started and has not read the register yet"
        self._noticed = 0  # the epoch of etcd in which it went back
        self._written = 0  # the one for which that stands in etcd
        self._revision = 0  # where it stands
        self._stands: str | None = None  # the token there, '' for none; None: not read yet
        self._done: str | None = None  # the token for which nothing is kept back any more
        self._known: Restored | None = None  # the same, for comparison with what comes after it
        self._waits_for = ""  # the token for which it is
        self._since = math.inf  # since when, monotonic seconds
        self._alone = False  # no other host is waited for
        self._expected: set[str] = set()  # hosts that lived before, whatever the backup knows
        self._compared = -math.inf  # when the last look began after which every container had its lease
        self._answered = ""

    def seen(self) -> Seen | None:
        """What an earlier run has kept. For the start."""
        seen = read_seen(self._state.read(FILE))
        if seen is not None and seen.token:
            self._known = Restored(token=seen.token, since=seen.since)
        return seen

    # ------------------------------------------------------------------------------------ for the others

    def wait(self, deadline: float) -> None:
        """Return when addresses may be given. Raises EtcdRestored with the reason when that does not come in time."""
        if self._open:
            return
        with self._condition:
            if not self._condition.wait_for(lambda: self._open, max(0.0, deadline - LEFT - time.monotonic())):
                raise EtcdRestored(self._why)

    def check(self) -> None:
        """Raises EtcdRestored when no address may be given now."""
        if not self._open:
            raise EtcdRestored(self._why)

    @property
    def why_not_giving(self) -> str:
        """The sentence, '' while addresses are given."""
        with self._condition:
            return "" if self._open else self._why

    @property
    def is_restoring(self) -> bool:
        """Whether what stands in etcd is older than what is true."""
        return not self._open and (self._noticed > self._written or self._stands not in (None, "", self._done))

    @property
    def answered(self) -> str:
        """For this host's record: the restoration since which it has written what its containers have."""
        return self._answered

    def went_back(self, before: Position, now: Position, epoch: int) -> None:
        """etcd.on_went_back: nothing is given from here on."""
        with self._condition:
            self._noticed = epoch
            self._keep_back()
        self._ledger.forget_abandoned()
        lived = self._view.hosts_present()
        with self._condition:
            self._expected.update(lived)
        self._alarm("etcd_went_back", _told(before, now))
        self._wake.set()

    def learned(self, token: str) -> None:
        """view.on_restored: what stands in etcd about it."""
        with self._condition:
            self._stands = token
            if token != self._done:
                self._keep_back()
        self._wake.set()

    def compared(self, began: float) -> None:
        """Every container that dockerd showed in a look which began then (monotonic seconds) has its lease, or an alarm
        was raised."""
        with self._condition:
            self._compared = began
        self._wake.set()

    # ------------------------------------------------------------------------------------------ the loop

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set and `close` was called."""
        while not stop.is_set():
            try:
                self._step()
                self._keep()
            except (IpamError, OSError) as error:
                log.info("whether etcd was restored is not settled: %s", error)
            self._wake.wait(PERIOD if self._open else TICK)
            self._wake.clear()
        with contextlib.suppress(OSError):
            self._keep()

    def close(self) -> None:
        self._wake.set()

    def _step(self) -> None:
        epoch = self._noticed
        if epoch > self._written:
            self._revision = self._write_down()
            self._written = epoch
        view = self._view
        if not view.loaded.is_set() or view.epoch != self._etcd.epoch or view.revision < self._revision:
            return  # what is known here is still of before
        _, restored = view.restored()
        hosts = view.hosts_present()
        late, missing = False, list[str]()
        with self._condition:
            token = restored.token if restored else ""
            if self._noticed > self._written or self._stands != token:
                return  # it changes just now
            if token in ("", self._done):
                self._give(restored)
            elif restored is not None:
                late, missing = self._await(restored, hosts)
                if late or not missing:
                    log.warning("etcd was restored, and addresses are given again")
                    self._give(restored)
        if late and missing:
            self._alarm(
                "restored_unanswered",
                f"etcd was restored, and {', '.join(missing)} did not say within {WAIT:.0f} s what containers there"
                " have; addresses are given again, and one of theirs may be among them where it does not answer on the"
                " wire. Run ipam-plugin check on each; where docker.reconcile is off, restart dockerd there",
            )

    def _await(self, restored: Restored, hosts: Mapping[str, str]) -> tuple[bool, list[str]]:
        """Whether it was waited long enough, and for whom it is waited."""
        token, now = restored.token, time.monotonic()
        if self._waits_for != token:
            # Where the others have waited already, all that they have is in etcd: only this host's own is not.
            age = time.time() - (parse_time(restored.since) or math.inf)
            self._waits_for, self._since, self._alone = token, now, age > WAIT
            if hosts.get(self._host) == token:
                self._answered = token  # an earlier run's word
        late = now >= self._since + WAIT
        if self._answered != token and (self._nothing_runs or self._compared > self._since or late):
            self._answered = token
            self._changed()
        if self._alone:
            missing = unanswered(token, {self._host: self._answered})
        else:
            missing = unanswered(token, {**dict.fromkeys(self._expected, ""), **hosts})
            if not missing and now < self._since + SETTLING:
                missing = ["hosts that have not connected again"]
        self._why = (
            "etcd was restored from a backup: no address is given until it knows again what is in use,"
            f" {max(1, math.ceil(self._since + WAIT - now))} s at most"
            + (f"; {', '.join(missing)} did not say yet what containers there have" if missing else "")
            + "; try again then"
        )
        return late, missing

    def _keep_back(self) -> None:
        self._open = False
        self._why = "etcd was restored from a backup, and what is in use is not known yet; try again in a minute"

    def _give(self, restored: Restored | None) -> None:
        self._open, self._done = True, restored.token if restored else ""
        self._known = restored or self._known  # whoever deletes it does not make an older one news
        self._nothing_runs = False
        self._expected.clear()
        self._condition.notify_all()

    def _write_down(self) -> int:
        """That etcd went back, for all hosts, unless another one has written it already. Its revision."""
        while True:
            found = self._ledger.read(self._keys.restored, time.monotonic() + PATIENCE)
            if found is not None and is_news(_read(found), self._known):
                return found.revision
            fresh = Restored(token=secrets.token_urlsafe(9), since=timestamp(), by=self._host)
            commit = self._ledger.write(
                "restored",
                {self._keys.restored: found.revision if found else 0},
                [Put(self._keys.restored, encode(fresh))],
                time.monotonic() + PATIENCE,
                proof=self._keys.restored,
            )
            if commit.applied:
                return commit.revision

    def _keep(self) -> None:
        """So that the next run of this daemon notices too."""
        latest = self._etcd.latest
        if latest is None or not self._open:
            return
        known = self._known or Restored(token="")
        text = write_seen(Seen(latest, known.token, known.since))
        if text != self._kept:
            self._state.write(FILE, text)
            self._kept = text


def _told(before: Position, now: Position) -> str:
    then, there = f"revision {before.revision}", f"{now.revision}"
    if before.cluster_id != now.cluster_id:
        then, there = (f"revision {each.revision} of cluster {each.cluster_id:x}" for each in (before, now))
    elif not now.is_behind(before):
        there = f"an earlier one, and has come to revision {now.revision} since"
    return (
        f"etcd went back from {then} to {there} (a backup was restored, or its data are gone): no address is given"
        f" until the hosts have written again what their containers have, {WAIT:.0f} s at most. Run ipam-plugin check"
        " on every host then"
    )


def _read(found: KeyValue | None) -> Restored | None:
    try:
        return decode(found.value, Restored) if found else None
    except ValueError:
        return None
