"""That the benchmarks run. What they measure is no test's business: it depends on the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.etcd
def test_quick_run_appends_a_row_for_each_number(tmp_path: Path) -> None:
    """`make bench` must not have rotted when somebody needs it: each benchmark ends and leaves its rows."""
    table = tmp_path / "docs" / "benchmarks.md"
    names = ("socket", "full", "transactions", "exact", "memory", "start")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--quick", "--table", str(table), "--directory", str(tmp_path), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in table.read_text().splitlines() if line.startswith("| 2")]
    # socket tells p50 and p99, exact one request at a time and all at once.
    assert len(rows) == len(names) + 2
    columns = table.read_text().partition("| date |")[2].partition("\n")[0].count("|")
    assert all(row.count(" | ") == columns for row in rows), rows
    assert not list(tmp_path.glob("ipam-bench-*"))
