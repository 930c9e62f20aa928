"""`python -m tests.bench [--quick] [NAME ...]`: run the benchmarks, print them, append them to the table."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import docker_run, page, requests, size, wire
from .measure import FULL, QUICK, TABLE, Row, Scale, append, disk, file_system
from .stage import Stage

Benchmark = Callable[[Stage, Scale], list[Row]]

BENCHMARKS: dict[str, Benchmark] = {
    "socket": requests.socket_latency,
    "full": requests.full_pool,
    "transactions": requests.transactions,
    "exact": requests.exact,
    "memory": size.memory,
    "start": size.start,
    "page": page.page,
    "docker-run": docker_run.docker_run,
    "standby": wire.standby,
    "starts": docker_run.starts,
    "flood": wire.flood,
    "cost": wire.cost,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="The project's numbers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small counts: shows that it runs, measures nothing")
    parser.add_argument("--table", type=Path, help=f"append to this file (default: {TABLE.name}; none with --quick)")
    parser.add_argument("--no-table", action="store_true", help="only print")
    parser.add_argument(
        "--directory", type=Path, default=Path("/var/tmp"), help="on the disk that is to be used (default: /var/tmp)"
    )
    options = parser.parse_args()
    unknown = [each for each in options.names if each not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    names = options.names or list(BENCHMARKS)
    table = None if options.no_table else options.table or (None if options.quick else TABLE)
    kind = file_system(options.directory)
    if kind in ("tmpfs", "ramfs"):
        print(f"{options.directory} is a {kind}, no disk: name another --directory", file=sys.stderr)
        if not options.quick:
            return 2
    scale = QUICK if options.quick else FULL
    synced = disk(options.directory, 20 if options.quick else 300)
    machine = (
        f"{os.cpu_count()} cores, {kind}, fdatasync p50 {synced.quantile(0.5) * 1000:.2f} ms,"
        f" p99 {synced.quantile(0.99) * 1000:.2f} ms"
    )
    print(machine)
    missed = 0
    for name in names:
        begin, busy = time.monotonic(), os.getloadavg()[0]
        with Stage(options.directory) as stage:
            rows = BENCHMARKS[name](stage, scale)
        print(f"\n{name} ({time.monotonic() - begin:.0f} s; load before {busy:.1f})")
        for row in rows:
            verdict = {True: "met", False: "MISSED", None: ""}[row.met]
            print(f"  {row.what}\n    {row.value}   must {row.must or '-'}   {verdict}")
            print(f"    {row.numerator} / {row.baseline}; {row.how}", flush=True)
            missed += row.met is False
        if table is not None:
            append(table, f"{machine}, load {busy:.1f}", rows)
    print(f"\n{missed} missed" if missed else "\nnone missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
