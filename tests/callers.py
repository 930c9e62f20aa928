"""Somebody who asks again and again while something else happens, as an engine does; every try is kept."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias, TypeVar

from daemons import ask, endpoint

T = TypeVar("T")


class Try(NamedTuple):
    """From when to when (monotonic seconds) a caller waited, and what went wrong ('' for nothing)."""

    caller: str
    began: float
    ended: float
    error: str

    @property
    def seconds(self) -> float:
        return self.ended - self.began


Attempt: TypeAlias = "Callable[[Callable[[], T]], T]"
"""Does what it is given, and keeps it as a try."""

Work: TypeAlias = Callable[[Attempt], None]
"""What a caller does in each round."""


class Callers:
    """A thread for each caller, by its name. A context manager; at its end the last round is waited for."""

    def __init__(self, callers: Mapping[str, Work]) -> None:
        self.tries: list[Try] = []  # in the order of their ends
        self._stop = threading.Event()
        self._threads = {
            name: threading.Thread(target=self._go_on, args=(name, work), daemon=True) for name, work in callers.items()
        }

    def __enter__(self) -> Self:
        for thread in self._threads.values():
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for name, thread in self._threads.items():
            thread.join(120)
            assert not thread.is_alive(), f"{name} still waits for an answer"

    def _go_on(self, name: str, work: Work) -> None:
        def attempt(operation: Callable[[], T]) -> T:
            began, wrong = time.monotonic(), ""
            try:
                return operation()
            except BaseException as error:
                wrong = f"{type(error).__name__}: {error}"
                raise
            finally:
                self.tries.append(Try(name, began, time.monotonic(), wrong))

        while not self._stop.is_set():
            # It stands among the tries, and the next round does not depend on it.
            with contextlib.suppress(Exception):
                work(attempt)

    def have_asked(self, since: float, times: int = 3) -> bool:
        """Whether each caller has begun so many tries since and has their answers."""
        done = [each.caller for each in list(self.tries) if each.began >= since]
        return all(done.count(name) >= times for name in self._threads)

    def failed(self) -> list[Try]:
        return [each for each in self.tries if each.error]

    def longest(self) -> dict[str, float]:
        """Seconds, by caller."""
        return {name: max(each.seconds for each in self.tries if each.caller == name) for name in self._threads}


_numbers = itertools.count(1)


def container(socket: Path, pool_id: str) -> Work:
    """What an engine asks of the driver behind that socket for a container that starts and ends."""

    def work(attempt: Attempt) -> None:
        number = next(_numbers)
        options = endpoint(f"02:42:ca:11:{number >> 8 & 255:02x}:{number & 255:02x}")
        asked = {"PoolID": pool_id, "Address": "", "Options": options}

        def call(method: str, body: Mapping[str, object]) -> dict[str, str]:
            reply = ask(socket, f"IpamDriver.{method}", body)
            if not reply.ok:
                raise RuntimeError(reply.error)
            return reply.body

        given = attempt(lambda: call("RequestAddress", asked))["Address"].partition("/")[0]
        attempt(lambda: call("ReleaseAddress", {"PoolID": pool_id, "Address": given}))

    return work
