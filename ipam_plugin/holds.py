"""The ends of holds: when their time is over, when their container is gone, when another host has nothing free.

`docker stop` and `docker rm` look the same to this driver, so a hold begins at both (decisions.give_back). It ends in a
request where its container returns or where this host has nothing else to give (claims.py), and here.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import threading
import time
from collections.abc import Callable

from ipam_plugin import decisions
from ipam_plugin.addresses import Address
from ipam_plugin.claims import Stock
from ipam_plugin.errors import IpamError, OutcomeUnknown, Refused
from ipam_plugin.evidence import Look, Unclaimed, unclaimed
from ipam_plugin.ledger import Ledger
from ipam_plugin.model import STANDBY, Pool, parse_time
from ipam_plugin.view import Held, View

log = logging.getLogger(__name__)

PERIOD = 1.0  # seconds between two rounds
PATIENCE = 5.0  # seconds for one change in etcd


class Holds:
    """What this host keeps for containers that stopped. Any method may be called from any thread.

    `is_waiting(segment, address)` tells what the journal has given already, and etcd does not know yet. `now` is in
    seconds since the epoch: the end of a hold outlives the daemon, so it is a time of the wall clock.
    """

    def __init__(
        self,
        ledger: Ledger,
        view: View,
        stock: Stock,
        host: str,
        is_waiting: Callable[[str, Address], bool],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._view = view
        self._stock = stock
        self._host = host
        self._is_waiting = is_waiting
        self._now = now
        self.is_restoring: Callable[[], bool] = lambda: False  # etcd is back from a backup
        self._wake = threading.Event()
        self._lock = threading.Lock()  # for the next
        self._unclaimed: dict[tuple[str, Address, str], Unclaimed] = {}  # segment, address and token of the hold

    def wake(self) -> None:
        """Somebody may want an address: look now."""
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set and `wake()` was called."""
        while not stop.is_set():
            self._wake.clear()
            self.tend()
            self._wake.wait(PERIOD)

    def tend(self) -> None:
        """End the holds whose time is over, and the oldest one where another host has nothing free."""
        now = self._now()
        held = self._view.held()
        # One that does not say when it ends (edited by hand) would never do so.
        over = [each for each in held if (parse_time(each.lease.until) or 0.0) <= now]
        for each in over:
            self._end(each, "hold ended")
        if self.is_restoring():
            over = held
            for each in held:
                self._end(each, "etcd was restored, and may not know who has it by now")
        self._make_room([each for each in held if each not in over])

    def _make_room(self, held: list[Held]) -> None:
        """One at a time, and after standby: whoever waits has to find nothing else free."""
        for pool in self._wanting_pools():
            mine = [each for each in held if each.segment == pool.segment and self._view.may_have(pool, each.address)]
            standby = any(entry.host == self._host for _, entry in self._view.spare_in(pool, STANDBY))
            if mine and not standby and not self._view.has_free(pool):
                self._end(mine[0], "another host had nothing free")
                held.remove(mine[0])

    def _wanting_pools(self) -> list[Pool]:
        found = []
        for pool_id in self._view.wanted_by_others(self._host):
            try:
                found.append(Pool.parse(pool_id))
            except Refused:
                continue  # it asks for one address, which a hold does not give up
        return found

    def looked(self, look: Look) -> None:
        """What dockerd has now: a hold ends when no container is left that could come back for it.

        Only a complete look may come here; an engine that did not answer has said nothing.
        """
        with self._lock:
            before, self._unclaimed = self._unclaimed, {}
            over = []
            for each in self._view.held():
                known = (each.segment, each.address, each.lease.token)
                self._unclaimed[known] = unclaimed(before.get(known), each.lease, each.address, look)
                if self._unclaimed[known].is_over:
                    over.append(each)
        for each in over:
            self._end(each, "container removed")

    def _end(self, held: Held, why: str) -> None:
        token = held.lease.token
        if self._is_waiting(held.segment, held.address) or not self._stock.end_hold(token):
            return
        claim = self._ledger.claim(Pool(held.segment, ipaddress.ip_network(held.address)), held.address)
        decide = functools.partial(decisions.end_hold, token=token)
        try:
            self._ledger.change(claim, decide, time.monotonic() + PATIENCE, why=why)
            self._stock.hold_stands(token)
            log.info("%s of segment %s, %s, is free: %s", held.address, held.segment, held.lease.told(), why)
        except OutcomeUnknown as error:
            # From now on it is not given from the journal: etcd may end it at any moment.
            log.info("%s of segment %s may be held no more: %s", held.address, held.segment, error)
        except IpamError as error:
            log.info("%s of segment %s is still held: %s", held.address, held.segment, error)
