"""The journal on disk: what was acknowledged is there after any crash, and what is damaged releases nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_plugin.addresses import parse_address
from ipam_plugin.errors import JournalFailed
from ipam_plugin.journal import Entry, Journal, Work, merge
from ipam_plugin.model import ENDPOINT, Lease

POOL = "default/192.168.1.0/24"
ADDRESS = parse_address("192.168.1.7")


def gave(before: str, after: str, address: str = "192.168.1.7") -> Entry:
    return Entry("given", POOL, before, "default", address, Lease(ENDPOINT, host="a", token=after))


def released(token: str, address: str = "192.168.1.7", sent: bool = False) -> Entry:
    return Entry("released", POOL, token, "default", address, sent=sent)


def journal(path: Path, *entries: Entry) -> bytes:
    made = Journal(path)
    for each in entries:
        made.append(each)
    made.close()
    return path.read_bytes()


def waiting(path: Path) -> list[tuple[str, str, frozenset[str]]]:
    found = Journal(path)
    try:
        return [(each.what, str(each.address), each.tokens) for each in found.work()]
    finally:
        found.close()


# ------------------------------------------------------------------------------------- merging, pure


def test_the_last_entry_of_an_address_counts() -> None:
    """Released, given again, released: one thing is to be done, whichever token stands in etcd by now."""
    (work,) = merge(enumerate([released("1"), gave("1", "2"), released("2")]))
    assert (work.what, work.tokens, work.last, work.numbers) == ("released", frozenset("12"), "2", (0, 1, 2))
    (work,) = merge(enumerate([gave("0", "1"), released("1"), gave("1", "2")]))
    assert (work.what, work.tokens) == ("given", frozenset("012"))
    assert work.lease is not None
    assert work.lease.token == "2"


def test_addresses_are_apart_and_in_order() -> None:
    found = merge(enumerate([released("1", "192.168.1.8"), released("2"), Entry("left", POOL, "3")]))
    assert [(each.what, str(each.address)) for each in found] == [
        ("released", "192.168.1.8"), ("released", "192.168.1.7"), ("left", "None"),
    ]  # fmt: skip


def test_a_release_on_its_way_makes_the_address_uncertain() -> None:
    assert merge(enumerate([released("1", sent=True)]))[0].uncertain
    assert not merge(enumerate([released("1")]))[0].uncertain


# ------------------------------------------------------------------------------------- the file


def test_what_was_appended_is_there(tmp_path: Path) -> None:
    journal(tmp_path / "j", gave("1", "2"), released("9", "192.168.1.9"))
    assert waiting(tmp_path / "j") == [
        ("given", "192.168.1.7", frozenset("12")), ("released", "192.168.1.9", frozenset("9"))
    ]  # fmt: skip


def test_what_is_done_is_gone(tmp_path: Path) -> None:
    """Also after a restart; with nothing left the file begins anew."""
    made = Journal(tmp_path / "j")
    first = made.append(gave("1", "2"))
    second = made.append(released("9", "192.168.1.9"))
    made.done([first])
    assert [each[1] for each in waiting(tmp_path / "j")] == ["192.168.1.9"]
    made.done([second])
    assert (tmp_path / "j").stat().st_size == 0
    made.append(released("5"))
    made.close()
    assert waiting(tmp_path / "j") == [("released", "192.168.1.7", frozenset("5"))]


def test_every_truncation(tmp_path: Path) -> None:
    """A power cut in the middle of the last line leaves what was acknowledged before it, and that is trusted."""
    path = tmp_path / "j"
    before = journal(path, gave("1", "2"))
    whole = journal(path, released("9", "192.168.1.9"))
    for length in range(len(before), len(whole)):
        path.write_bytes(whole[:length])
        found = Journal(path)
        kept = [str(each.address) for each in found.work()]
        assert kept[0] == "192.168.1.7"
        if length < len(whole) - 1:
            assert kept == ["192.168.1.7"]
            assert not found.trouble
            assert found.work()[0].trusted
        found.append(released("5", "192.168.1.5"))
        found.close()
        assert [each[1] for each in waiting(path)][-1] == "192.168.1.5"


def test_every_bit_flip_is_seen(tmp_path: Path) -> None:
    """Whichever bit of an acknowledged entry flips: no release of the journal is trusted any more, and every line that
    can be read is still there; so after a restart, until nothing is left. (A line break that flips spoils two lines.)
    """
    path = tmp_path / "j"
    data = journal(path, gave("1", "2"), released("9", "192.168.1.9"))
    breaks = [place for place, byte in enumerate(data) if byte == ord("\n")]
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(bytes(flipped))
            for turn in range(2):
                found = Journal(path)
                assert not any(each.trusted for each in found.work()), (place, bit)
                assert len(found) == (0 if place == breaks[0] else 2 if place == breaks[1] else 1)
                assert found.trouble or (turn and not len(found))
                found.close()
    path.write_bytes(b"x" + data)
    found = Journal(path)
    found.done([number for each in found.work() for number in each.numbers])
    assert not found.trouble
    found.append(released("9"))
    found.close()
    assert Journal(path).work()[0].trusted


def test_the_damaged_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "j"
    data = journal(path, gave("1", "2"), released("9", "192.168.1.9"))
    path.write_bytes(b"x" + data)
    for _ in range(2):
        Journal(path).close()
    assert (tmp_path / "j.damaged").read_bytes() == b"x" + data


@given(st.binary(max_size=200))
def test_no_bytes_are_too_strange(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever is in the file, nothing of it is taken for an entry, and the journal works."""
    path = tmp_path_factory.mktemp("journal") / "j"
    path.write_bytes(data)
    found = Journal(path)
    assert found.work() == []
    found.append(gave("1", "2"))
    found.close()
    assert waiting(path) == [("given", "192.168.1.7", frozenset("12"))]


# ------------------------------------------------------------------------------------- a full disk, a crash

FULL = """
import json, resource, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
import signal
from ipam_plugin.errors import JournalFailed
from ipam_plugin.journal import Entry, Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
made = Journal(Path(sys.argv[1]))
told = 0
try:
    for told in range(100):
        made.append(Entry("released", "p", str(told), "default", f"192.168.1.{told}"))
except JournalFailed as error:
    print(told, len(made), bool(made.trouble), error, flush=True)
made.remember(Entry("released", "p", "x", "default", "192.168.1.200"))
print(len(made))
"""


def run(program: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path), json.dumps([str(Path(__file__).parent.parent)])],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_full_disk(tmp_path: Path) -> None:
    """What has no room is refused in words, and what was acknowledged before is there, whole."""
    path = tmp_path / "j"
    process = run(FULL, path)
    first, second = process.communicate(timeout=30)[0].splitlines()
    acknowledged, kept, trouble, *words = first.split()
    assert acknowledged == kept
    assert trouble == "True"
    assert "cannot be written" in " ".join(words)
    assert int(second) == int(kept) + 1, "what is in memory alone counts until the process ends"
    assert [each[1] for each in waiting(path)] == [f"192.168.1.{number}" for number in range(int(acknowledged))]


def test_a_new_beginning_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is appended after it stands at the beginning of the file, and is read again."""
    made = Journal(tmp_path / "j")
    first = made.append(released("1"))

    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        made.done([first])
    assert "cannot be written" in made.trouble
    made.append(released("2", "192.168.1.8"))
    made.close()
    found = Journal(tmp_path / "j")
    assert not found.trouble
    assert [str(each.address) for each in found.work()] == ["192.168.1.8"]
    found.close()


def test_too_many(tmp_path: Path) -> None:
    made = Journal(tmp_path / "j", most=2)
    made.append(released("1"))
    made.append(released("2", "192.168.1.8"))
    with pytest.raises(JournalFailed, match="2 entries wait for etcd already"):
        made.append(released("3", "192.168.1.9"))
    made.close()


ENDLESS = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
from ipam_plugin.journal import Entry, Journal
made = Journal(Path(sys.argv[1]))
for number in range(100000):
    made.append(Entry("released", "p", str(number), "default", f"10.0.{number // 250}.{number % 250}"))
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 7, 40])
def test_killed_at_any_moment(tmp_path: Path, after: int) -> None:
    """kill -9 while it writes: everything that was acknowledged is there, and is trusted."""
    path = tmp_path / "j"
    process = run(ENDLESS, path)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(after)]
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    acknowledged = len(told) + len([line for line in rest.splitlines() if line])
    found = Journal(path)
    work: list[Work] = found.work()
    found.close()
    assert not found.trouble
    assert acknowledged <= len(work) <= acknowledged + 1
    assert all(each.trusted for each in work)
