"""An outage of etcd: noticed, bridged with the journal (journal.py), and ended by carrying it out.

Docker repeats neither a release nor a start that failed at boot, so both are answered while etcd is away as far as
that is safe: a release always is, once it is on disk; an address can be given when it is this host's in etcd already
(standby, or one whose release waits in the journal).

Nobody declares an outage: each request that finds etcd silent for PATIENCE goes on with the journal, the next ones go
there at once, and one thread asks until etcd answers. It then carries out what waits, an address at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from ipam_plugin.addresses import Address
from ipam_plugin.errors import AddressTaken, EtcdUnavailable, IpamError, JournalFailed, OutcomeUnknown
from ipam_plugin.journal import Entry, Journal, Work
from ipam_plugin.model import Lease, Pool

log = logging.getLogger(__name__)

PATIENCE = 4.0  # seconds that a request waits for etcd before it goes on without: an election takes up to about three
AGAIN = 1.0  # seconds between two questions to etcd
ASKED_FOR = 5.0  # seconds for one of them, and for carrying out the entries of one address


class Outage:
    """May be called from any thread. `ask(deadline)` asks etcd something and raises the errors of errors.py.

    `alarm(kind, text)` tells an operator.
    """

    def __init__(self, journal: Journal, ask: Callable[[float], object], *, alarm: Callable[[str, str], None]) -> None:
        self._journal = journal
        self._ask = ask
        self._alarm = alarm
        self._since = 0.0  # monotonic seconds; 0.0: etcd answers
        self._wake = threading.Event()
        self._settled = threading.Condition()
        self._settling: tuple[int, ...] = ()  # the entries that are being carried out
        self._refused: dict[tuple[int, ...], str] = {}  # why these are not carried out yet, as it was logged
        self.given = 0  # addresses, since the start of this process
        self.released = 0

    # ------------------------------------------------------------------------------------ for requests

    @property
    def lasts(self) -> bool:
        """Whether etcd did not answer lately, so that there is no point in waiting for it."""
        return self._since > 0.0

    @property
    def waiting(self) -> int:
        """Entries that etcd does not have yet."""
        return len(self._journal)

    def patience(self, deadline: float) -> float:
        """Until when to try etcd itself (monotonic seconds), so that there is time left to go on without."""
        return min(time.monotonic() + PATIENCE, (time.monotonic() + deadline) / 2)

    def noticed(self, why: IpamError) -> None:
        """etcd did not answer a request in time."""
        if not self._since:
            self._since = time.monotonic()
            log.warning("etcd is away, so releases and starts from standby go to the journal: %s", why)
        self._wake.set()

    def work(self) -> list[Work]:
        """All that etcd has to learn yet."""
        return self._journal.work()

    def of(self, segment: str, address: Address) -> Work | None:
        """What etcd has to learn yet of an address."""
        return self._journal.of(segment, address)

    def is_waiting(self, segment: str, address: Address) -> bool:
        """Whether etcd has something to learn yet of an address, so that what stands there does not count."""
        return self._journal.of(segment, address) is not None

    def refuse_given(self, pool: Pool, address: Address) -> None:
        """Raises AddressTaken where a container has the address, and etcd does not know that yet."""
        work = self._journal.of(pool.segment, address)
        if work is not None and work.what == "given" and work.lease is not None:
            raise AddressTaken(f"{address} of pool {pool} is taken: {work.lease.told()}")

    def give(self, pool: Pool, address: Address, before: str, lease: Lease) -> None:
        """The lease with the token `before`, which is this host's, becomes `lease`.

        Raises JournalFailed, and AddressTaken where it has become another container's in the same moment.
        """
        with self._settled:
            self.refuse_given(pool, address)
            self._keep(Entry("given", pool.id, before, pool.segment, str(address), lease))
        self.given += 1
        log.warning("%s of pool %s is given from the journal: etcd is away", address, pool)

    def release(self, pool: Pool, address: Address, token: str, *, sent: bool = False) -> None:
        """The lease with this token is given back. `sent`: etcd was asked to, and may do so yet.

        Raises JournalFailed where that is not on disk; it is tried all the same for as long as this process lives.
        """
        entry = Entry("released", pool.id, token, pool.segment, str(address), sent=sent)
        self._keep(entry, also_in_memory=True)
        self.released += 1

    def take_back(self, pool: Pool, address: Address, lease: Callable[[], Lease], deadline: float) -> Lease | None:
        """An address that was asked for by name, from its own release: the lease that it has now.

        None where nothing waits of it (any more): etcd decides. Raises AddressTaken when it was given to another
        container from here, EtcdUnavailable when its release may reach etcd at any moment, JournalFailed.
        """
        with self._settled:
            while (work := self._journal.of(pool.segment, address)) is not None:
                self.refuse_given(pool, address)
                if not work.uncertain and not set(work.numbers) & set(self._settling):
                    taken = lease()
                    self.give(pool, address, work.last, taken)
                    return taken
                left = deadline - time.monotonic()
                if left <= 0:
                    raise EtcdUnavailable(
                        f"{address} of pool {pool}: its release is on the way to etcd, which does not answer; try"
                        " again when it does"
                    )
                self._settled.wait(min(left, AGAIN))
        return None

    def leave(self, pool: Pool, token: str) -> None:
        """A network of this pool is gone. As `release`."""
        self._keep(Entry("left", pool.id, token), also_in_memory=True)

    def _keep(self, entry: Entry, also_in_memory: bool = False) -> None:
        try:
            self._journal.append(entry)
        except JournalFailed as error:
            self._alarm("journal_failed", f"{error}. Until there is room, no address is given while etcd is away")
            if also_in_memory:
                self._journal.remember(entry)
            raise
        finally:
            self._wake.set()

    # ------------------------------------------------------------------------------------- the end

    def run(
        self,
        settle: Callable[[Work, float], None],
        stop: threading.Event,
        done: Callable[[Work], None] = lambda work: None,
    ) -> None:
        """For a thread of its own, until `stop` is set and `wake()` was called.

        `settle(work, deadline)` carries out what waits of one address, as often as it takes; `done` is told of each
        that is.
        """
        if self._journal.trouble:
            self._alarm("journal_damaged", self._journal.trouble)
        while not stop.is_set():
            self._wake.clear()
            if self._since or len(self._journal):
                self.carry_out(settle, done)
            self._wake.wait(AGAIN if self._since or len(self._journal) else None)

    def carry_out(self, settle: Callable[[Work, float], None], done: Callable[[Work], None]) -> None:
        """One round: ask whether etcd is there, and tell it what waits."""
        try:
            self._ask(time.monotonic() + ASKED_FOR)
            self._ended()
            for work in self._journal.work():
                self._carry_out(work, settle, done)
        except IpamError as error:
            self.noticed(error)
            self._wake.clear()

    def _carry_out(
        self,
        work: Work,
        settle: Callable[[Work, float], None],
        done: Callable[[Work], None],
    ) -> None:
        """Raises what says that etcd is away again; anything else concerns this address alone."""
        with self._settled:
            if work.address is not None:
                # As it is now: what is on its way to etcd cannot be taken back any more.
                fresh = self._journal.of(work.segment, work.address)
                if fresh is None:
                    return
                work = fresh
            self._settling = work.numbers
        try:
            settle(work, time.monotonic() + ASKED_FOR)
            self._refused.pop(work.numbers, None)
            done(work)
            self._journal.done(work.numbers)
        except OutcomeUnknown:
            if work.what == "released" and work.address is not None and not work.uncertain:
                again = Entry("released", work.pool, work.last, work.segment, str(work.address), sent=True)
                with contextlib.suppress(JournalFailed):
                    self._keep(again, also_in_memory=True)
            raise
        except EtcdUnavailable:
            raise
        except Exception as error:
            if self._refused.get(work.numbers) != str(error):
                self._refused[work.numbers] = str(error)
                log.warning(
                    "%s of pool %s is not in etcd yet: %s",
                    work.address or "the release",
                    work.pool,
                    error,
                    exc_info=None if isinstance(error, IpamError) else error,
                )
        finally:
            with self._settled:
                self._settling = ()
                self._settled.notify_all()

    def _ended(self) -> None:
        if self._since:
            log.warning(
                "etcd answers again after %.0f s; %d entries of the journal are carried out",
                time.monotonic() - self._since,
                len(self._journal),
            )
            self._since = 0.0

    def wake(self) -> None:
        """Look now; at a stop."""
        self._wake.set()

    def close(self) -> None:
        self._journal.close()
