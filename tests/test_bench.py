"""That the benchmarks run. What they measure is no test's business: it depends on the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import missing
from tests import lab as labs

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.etcd
def test_quick_run_appends_a_row_for_each_number(tmp_path: Path) -> None:
    """`make bench` must not have rotted when somebody needs it: each benchmark ends and leaves its rows."""
    # socket tells p50 and p99, exact one request at a time and all at once.
    check(tmp_path, {"socket": 2, "full": 1, "transactions": 1, "exact": 2, "memory": 1, "start": 1})


@pytest.mark.browser
@pytest.mark.etcd
def test_quick_run_in_a_browser(tmp_path: Path) -> None:
    """The same for what the page costs."""
    check(tmp_path, {"page": 8})


@pytest.mark.root
@pytest.mark.engine
@pytest.mark.etcd
@pytest.mark.parametrize(
    ("name", "rows"), [("docker-run", 1), ("standby", 6), ("starts", 5), ("flood", 4), ("cost", 2)]
)
def test_quick_run_on_a_lan(tmp_path: Path, name: str, rows: int) -> None:
    """The same for those that need a lab."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    check(tmp_path, {name: rows})


def check(directory: Path, rows_of: dict[str, int]) -> None:
    """Each benchmark leaves so many rows, and nothing else is left of it."""
    table = directory / "docs" / "benchmarks.md"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.bench",
            "--quick",
            "--table",
            str(table),
            "--directory",
            str(directory),
            *rows_of,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in table.read_text().splitlines() if line.startswith("| 2")]
    assert len(rows) == sum(rows_of.values())
    columns = table.read_text().partition("| date |")[2].partition("\n")[0].count("|")
    assert all(row.count(" | ") == columns for row in rows), rows
    assert not list(directory.glob("ipam-bench-*"))
