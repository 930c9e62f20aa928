"""The project's numbers: each is a ratio against a baseline of the same run, or stands beside one.

`python -m tests.bench` runs all of them and appends a row for each to docs/benchmarks.md. The two sides of a ratio
take turns in short blocks, so that whatever else the machine does meets both.
"""

import sys
from pathlib import Path

# The tests import each other by their bare names, as pytest lets them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
