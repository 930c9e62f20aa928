"""Writes down what happens in a lab, for `custody`: every write in etcd, every container that runs, every fault."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from custody import Absence, History, Running, Sample, Tick, Write, folded, timed
from ipam_plugin.model import Keys
from tests.lab import Host, Lab, LabError, until
from tests.lab.node import Node

WATCHER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("lab") / "watcher.py"))
MARK = "/recorder/"
PERIOD = 0.3  # seconds between two looks at a host

_count = itertools.count(1)


class Recorder:
    """`with Recorder(lab) as recorder: …; violations(recorder.history())`. What is off or cut off has to be told."""

    def __init__(self, lab: Lab, keys: Keys = Keys()) -> None:  # noqa: B008 - a value
        self._lab = lab
        self._keys = keys
        # On the LAN with the members, and never off; on the other network there are only they.
        self._node: Node = lab.router if lab.router is not None and lab.management is None else lab.etcd[0].node
        self._name = f"watcher-{next(_count)}"
        self._began = time.time()
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._absences: dict[int, Absence] = {}
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._failed: list[str] = []
        self._threads = [threading.Thread(target=self._look, args=(host,), daemon=True) for host in lab.hosts]

    def __enter__(self) -> Self:
        self._service = self._node.serve(self._name, *WATCHER, *self._lab.endpoints)
        try:
            until(lambda: any(line[0] == "tick" for line in self._lines()), 10, "the watch has begun")
        except BaseException:
            self._service.kill()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._service.kill()
        del self._node.services[self._name]

    # What has to be told

    def say(self, text: str) -> None:
        """For the reader of a failed test's output."""
        print(f"{time.time():.3f} (+{time.time() - self._began:.1f} s) {text}", flush=True)

    def begin(self, what: Literal["daemon", "dockerd", "etcd"], host: str = "") -> int:
        """From now on that part is absent, see custody.Absence. Returns a number for `end`."""
        with self._lock:
            number = next(self._numbers)
            self._absences[number] = Absence(what, host, time.time(), float("inf"))
        return number

    def end(self, number: int) -> None:
        with self._lock:
            self._absences[number] = self._absences[number]._replace(ended=time.time())

    @contextlib.contextmanager
    def absent(self, what: Literal["daemon", "dockerd", "etcd"], host: str = "") -> Iterator[None]:
        number = self.begin(what, host)
        try:
            yield
        finally:
            self.end(number)

    # What it has seen

    def history(self) -> History:
        """Everything until now. Raises LabError when etcd is away, or when something was missed."""
        with self._lock:
            if self._failed:
                raise LabError(self._failed[0])
        mark = f"{MARK}{next(_count)}"
        self._lab.etcdctl("put", mark, "")
        lines = until(lambda: self._until(mark), 20, "the watch has seen all")
        now = time.time()
        writes = [
            Write(line[1], -float("inf"), line[2], line[3], None if line[4] is None else line[4].encode())
            for line in lines
            if line[0] in ("put", "delete")
        ]
        ticks = [Tick(line[1], line[2]) for line in lines if line[0] == "tick"]
        self._compare(writes)
        kept = [each for each in timed(writes, ticks) if each.key.startswith(self._keys.prefix)]
        with self._lock:
            samples, absences = list(self._samples), list(self._absences.values())
        return History(kept, samples, [each._replace(ended=min(each.ended, now)) for each in absences], now, self._keys)

    def _until(self, mark: str) -> list[list[Any]]:
        lines = self._lines()
        for number, line in enumerate(lines):
            if line[0] == "put" and line[3] == mark:
                return lines[: number + 1]
        return []

    def _lines(self) -> list[list[Any]]:
        if not self._service.alive:
            raise LabError(f"the watcher has ended: {self._service.tail()}")
        found = []
        for line in self._service.log.read_text(errors="replace").splitlines():
            if line.startswith("["):  # all else are its complaints about members
                with contextlib.suppress(ValueError):  # the last one, half written
                    found.append(json.loads(line))
        return found

    def _compare(self, writes: list[Write]) -> None:
        """What the watch told adds up to what stood in etcd then."""
        revision = str(writes[-1].revision)
        told = json.loads(self._lab.etcdctl("get", "--prefix", "", "--keys-only", "--rev", revision, "-w", "json"))
        standing = {(kv["key"], kv["mod_revision"]) for kv in told.get("kvs", ())}
        last = {each.key: each for each in writes}
        seen = {(base64.b64encode(key.encode()).decode(), last[key].revision) for key in folded(writes)}
        if seen != standing:
            raise LabError(f"the watch has missed something: {sorted(seen ^ standing)}")

    def _look(self, host: Host) -> None:
        while not self._stop.wait(PERIOD):
            began = time.time()
            try:
                found = host.sighted()
            except LabError:
                found = []  # it went off meanwhile
            except Exception as error:
                with self._lock:
                    self._failed.append(f"{host.name} could not be looked at: {error!r}")
                return
            running = tuple(
                Running(each.container[:12], each.run, each.address, each.mac) for each in found if each.started
            )
            with self._lock:
                self._samples.append(Sample(host.name, began, time.time(), running))
