"""Samples, rows, and the machine they come from."""

from __future__ import annotations

import datetime
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ipam_plugin import __version__

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Scale:
    """How much is measured. `quick` shows that everything runs, not what it costs."""

    rounds: int  # turns that the two sides of a ratio take
    block: int  # requests per turn
    leases: int  # of a daemon that knows many
    fill: float  # how full a full pool is
    full_prefix: int  # prefix length of that pool
    daemons: int  # that fill one pool at once
    pool: int  # addresses of that pool
    exact_daemons: int
    exact_pool: int
    starts: int  # starts of a daemon or of a container, or openings of a page, per side
    changes: int  # that an open page follows
    stock: int  # addresses in standby
    stock_rounds: int  # each needs a new stock, which takes half a minute
    stock_block: int  # requests per turn, fewer than there are in stock
    containers: int  # started one after another
    container_rounds: int
    flood: float  # seconds
    idle: float  # seconds


FULL = Scale(
    rounds=30,
    block=50,
    leases=65_536,
    fill=0.99,
    full_prefix=16,
    daemons=16,
    pool=4_000,
    exact_daemons=10,
    exact_pool=1_000,
    starts=5,
    changes=40,
    stock=64,
    stock_rounds=10,
    stock_block=48,
    containers=40,
    container_rounds=3,
    flood=10,
    idle=60,
)
QUICK = Scale(
    rounds=2,
    block=5,
    leases=1_000,
    fill=0.9,
    full_prefix=24,
    daemons=2,
    pool=40,
    exact_daemons=2,
    exact_pool=20,
    starts=1,
    changes=2,
    stock=8,
    stock_rounds=1,
    stock_block=6,
    containers=3,
    container_rounds=1,
    flood=1,
    idle=2,
)


@dataclass(frozen=True)
class Row:
    """One number of the table. `met` None: nothing is demanded of it."""

    what: str
    value: str
    numerator: str
    baseline: str
    must: str
    met: bool | None
    how: str = ""

    @classmethod
    def ratio(cls, what: str, over: Samples, under: Samples, q: float, must: float | None, how: str = "") -> Row:
        """Quantile `q` of `over` / the same of `under`, with the quartiles of the ratios of single rounds."""
        value = over.quantile(q) / under.quantile(q)
        rounds = [quantile(a, q) / quantile(b, q) for a, b in zip(over.blocks, under.blocks, strict=True)]
        spread = f" (rounds {quantile(rounds, 0.25):.2f} to {quantile(rounds, 0.75):.2f})" if len(rounds) > 1 else ""
        return cls(
            what,
            f"{value:.2f}{spread}",
            _milliseconds(over.quantile(q)),
            _milliseconds(under.quantile(q)),
            "" if must is None else f"≤ {must:g}",
            None if must is None else value <= must,
            f"n={len(over.all)}; {how}" if how else f"n={len(over.all)}",
        )

    @classmethod
    def limit(
        cls,
        what: str,
        value: float,
        unit: str,
        baseline: float,
        must: float | None,
        how: str = "",
        baseline_of: str = "",
    ) -> Row:
        """A value with a limit of its own, or none, its baseline beside it."""
        ratio = f" (ratio {value / baseline:.2f})" if baseline else ""
        return cls(
            what,
            f"{value:.3g} {unit}",
            f"{value:.3g} {unit}",
            f"{baseline:.3g} {unit}{f' {baseline_of}' if baseline_of else ''}{ratio}",
            "" if must is None else f"≤ {must:g} {unit}",
            None if must is None else value <= must,
            how,
        )


@dataclass
class Samples:
    """Seconds, by the turns in which they were measured."""

    blocks: list[list[float]] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        return [each for block in self.blocks for each in block]

    def quantile(self, q: float) -> float:
        return quantile(self.all, q)


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share `q` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


def take_turns(sides: Sequence[Callable[[], None]], rounds: int, block: int) -> list[Samples]:
    """Time each side `block` times in each round. Which side begins a round is drawn, the same in every run."""
    samples = [Samples() for _ in sides]
    draw = random.Random(1)
    for _ in range(rounds):
        for number in draw.sample(range(len(sides)), len(sides)):
            samples[number].blocks.append([seconds(sides[number]) for _ in range(block)])
    return samples


def seconds(operation: Callable[[], object]) -> float:
    begin = time.perf_counter()
    operation()
    return time.perf_counter() - begin


def _milliseconds(value: float) -> str:
    return f"{value * 1000:.2f} ms"


def disk(directory: Path, count: int) -> Samples:
    """Seconds of fdatasync(2) after 2 KiB appended, the size of a small transaction in etcd's log."""
    samples = Samples([[]])
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(count):
            file.write(os.urandom(2048))
            file.flush()
            samples.blocks[0].append(seconds(lambda: os.fdatasync(file.fileno())))
    return samples


def file_system(directory: Path) -> str:
    """The type of the file system that holds a directory, as the kernel names it."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if directory.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def version() -> str:
    """The program's, and the commit where there is one."""
    told = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return f"{__version__} {told.stdout.strip()}".strip()


HEAD = """# Benchmarks

Written by `make bench` (`python -m tests.bench`), a row for each number and run. Both sides of a ratio were measured in
the same run and took turns; in brackets after a ratio, the quartiles of the ratios of single rounds. *must* is what the
project promises; an empty one is told for comparison. Times are of one machine and say little beside those of
another: compare ratios.

- *RequestAddress*: through the daemon's Unix socket, from a client that writes what Docker's Go client writes, opens a
  new connection whenever the daemon closed the last one, and waits for each answer before it asks again.
- *bare transaction*: one `ipam_plugin.etcd.Etcd.commit` that creates a key with a value as long as a lease, from one
  thread of another process, on the same etcd (one member, on the disk whose fdatasync is given), on keys that nobody
  watches.
- *with standby*: from a daemon with 64 addresses in stock. That every request was served from there, the daemon's own
  counters confirm. The stock is full before each turn, also before the others' turns, and is filled again during its
  own. *without standby*: from one with `standby: 0`, where every request looks for its address on the wire, 0.25 s.
  These daemons, their etcd and the client are in network namespaces of one machine.
- *in the flood*: 10,000 ARP frames a second, each of another machine in the subnet of the daemon's pool, 10.0.0.0/8.
  The program that sends them is on the same machine.
- *first paint*, *drawn*: in headless Chromium, each time in a page that is opened anew, from the beginning of the
  navigation to what the browser calls first contentful paint (the page's frame), and to the first frame with what was
  asked of the register. *in an open page*: the map of a /24; changes at random moments. All on the machine of the etcd.

| date | version | machine | what | value | numerator | baseline | must | met | how |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def append(table: Path, machine: str, rows: Sequence[Row]) -> None:
    """Add the rows to the table, which is made when it is not there."""
    if not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(HEAD)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    with table.open("a") as file:
        for row in rows:
            met = {True: "met", False: "**missed**", None: ""}[row.met]
            cells = (
                *(date, version(), machine, row.what, row.value, row.numerator, row.baseline),
                *(row.must, met, row.how),
            )
            file.write("| " + " | ".join(each.replace("|", "/") for each in cells) + " |\n")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
