"""What this host did while etcd was away, on disk until etcd has it too: addresses given from standby, and released.

One file of lines, appended and synced before Docker is answered. A line is a checksum and a JSON record:
`8 hex digits of CRC-32, a space, JSON`. What is carried out is marked by a record too, and the file begins anew when
nothing is left in it.

A power cut in the middle of a line leaves a piece at the end that nobody was answered for: it is dropped. Any other
line that does not match its checksum is damage, and a record may be missing. Then nothing of the journal is released:
the record that is missing may be the one that gave the address out again. What it gave stays given, because to keep an
address is always safe; reconcile finds what is too much.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.errors import JournalFailed
from ipam_plugin.model import Lease, decode, encode, readable

ENTRIES = 20_000  # that may wait at once; about 10 MB. A host with more containers than this is none that we know of
BYTES = 32 << 20  # of the file, after which what is carried out is left out of it
LONGEST = 64 * 1024  # bytes of one line; what is longer was not written here


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that etcd has to learn yet.

    `given`: the lease whose token is `before` (standby, or one whose release waits here) has become `lease`.
    `released`: the lease whose token is `before` is given back.
    `left`: this host's use of the pool ended, as its key said with the token `before`; there is no address.
    """

    what: Literal["given", "released", "left"]
    pool: str  # PoolID
    before: str
    segment: str = ""
    address: str = ""
    lease: Lease | None = None
    sent: bool = False  # released: etcd was asked to, and may do so yet


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    number: int
    entry: Entry | None = None
    done: tuple[int, ...] = ()  # the numbers of entries that are carried out


readable(_Record)


class Work(NamedTuple):
    """All entries of one address (or of one pool, for `left`), as the one thing that is to be done.

    `tokens` are all that the lease may carry by now: any of them is this host's own tenancy.
    """

    what: Literal["given", "released", "left"]
    pool: str
    segment: str
    address: Address | None
    tokens: frozenset[str]
    last: str  # the token that the last entry ends
    lease: Lease | None  # what was given
    numbers: tuple[int, ...]
    uncertain: bool = False  # a release in it may be carried out by etcd at any moment
    trusted: bool = True  # False: a record may be missing, so nothing may be released


def merge(entries: Iterable[tuple[int, Entry]], trusted: bool = True) -> list[Work]:
    """What is to be done, in the order of the last entries. Pure.

    The entries of one address are a chain: each begins with the token that the one before it left. So only the last
    counts, whichever of the tokens stands in etcd.
    """
    chains: dict[tuple[str, str], list[tuple[int, Entry]]] = {}
    for number, entry in entries:
        key = ("", entry.pool) if entry.what == "left" else (entry.segment, entry.address)
        chains.setdefault(key, []).append((number, entry))
    found = []
    for chain in sorted(chains.values(), key=lambda chain: chain[-1][0]):
        last = chain[-1][1]
        tokens = {entry.before for _, entry in chain}
        tokens |= {entry.lease.token for _, entry in chain if entry.lease is not None}
        found.append(
            Work(
                what=last.what,
                pool=last.pool,
                segment=last.segment,
                address=parse_address(last.address) if last.address else None,
                tokens=frozenset(tokens),
                last=last.before,
                lease=last.lease,
                numbers=tuple(number for number, _ in chain),
                uncertain=any(entry.sent for _, entry in chain),
                trusted=trusted,
            )
        )
    return found


class Journal:
    """The entries that etcd does not have yet. Safe between threads.

    `trouble` is why nothing more can be written to it, or what was found damaged; '' when all is well.
    """

    def __init__(self, path: Path, most: int = ENTRIES) -> None:
        self._path = path
        self._most = most
        self._lock = threading.Lock()
        self._waiting: dict[int, Entry] = {}
        self._number = 0
        self._trusted = True
        self._file = -1
        self._length = 0  # of the file, up to the end of its last good line
        self.trouble = ""
        self._read()

    # ------------------------------------------------------------------------------------- asking

    def __len__(self) -> int:
        with self._lock:
            return len(self._waiting)

    def work(self) -> list[Work]:
        """What etcd has to learn, one for each address."""
        with self._lock:
            return merge(self._waiting.items(), self._trusted)

    def of(self, segment: str, address: Address) -> Work | None:
        """What waits of an address."""
        text = str(address)
        with self._lock:
            chain = [
                (number, entry)
                for number, entry in self._waiting.items()
                if entry.address == text and entry.segment == segment
            ]
            return merge(chain, self._trusted)[0] if chain else None

    # ------------------------------------------------------------------------------------ writing

    def append(self, entry: Entry) -> int:
        """On disk when this returns, with the number that `done` takes.

        Raises JournalFailed when it is not on disk: nobody may be told that it happened.
        """
        with self._lock:
            if len(self._waiting) >= self._most:
                raise JournalFailed(f"{self._path}: {self._most} entries wait for etcd already, and no more are kept")
            number = self._number + 1
            self._write([_Record(number, entry)])
            self._number = number
            self._waiting[number] = entry
            return number

    def remember(self, entry: Entry) -> int:
        """As `append`, for as long as this process lives: what the disk has no room for may still reach etcd."""
        with self._lock:
            if len(self._waiting) >= self._most:
                raise JournalFailed(f"{self._path}: {self._most} entries wait for etcd already, and no more are kept")
            self._number += 1
            self._waiting[self._number] = entry
            return self._number

    def done(self, numbers: Sequence[int]) -> None:
        """etcd has them. Where that cannot be written down they are carried out again, which changes nothing."""
        with self._lock:
            for number in numbers:
                self._waiting.pop(number, None)
            try:
                if not self._waiting:
                    self._begin_anew()
                elif self._length > BYTES:
                    self._rewrite()
                else:
                    self._write([_Record(0, done=tuple(numbers))])
            except JournalFailed:
                pass  # `trouble` says so

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    # ----------------------------------------------------------------------------------- the file

    def _read(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise JournalFailed(f"{self._path} cannot be read: {error.strerror}") from None
        records, good, damaged = read(data)
        self._waiting = _waiting(records)
        self._number = max((record.number for record in records if record.entry is not None), default=0)
        self._length = good
        if not damaged:
            return
        self._trusted = False
        kept = self._path.with_name(f"{self._path.name}.damaged")
        if not data.startswith(UNTRUSTED):  # else it is what an earlier run has made of it
            with contextlib.suppress(OSError):
                kept.write_bytes(data)
        self.trouble = (
            f"{self._path} is damaged, {damaged} of its lines cannot be read: what it says was released is not, until"
            f" the look at dockerd shows that nobody has it (docker.reconcile), or ipam-plugin release ADDRESS --force;"
            f" the file is kept as {kept}"
        )
        with contextlib.suppress(JournalFailed):
            self._rewrite()

    def _open(self) -> int:
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._file, self._length)  # what a power cut left of a last line
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        return self._file

    def _write(self, records: Iterable[_Record]) -> None:
        data = b"".join(map(line, records))
        try:
            file = self._open()
            # At its place, so that what a failed write left behind is overwritten.
            _write_all(file, data, self._length)
            os.fsync(file)
        except OSError as error:
            self._failed(error)
        self._length += len(data)
        if self._trusted:
            self.trouble = ""

    def _begin_anew(self) -> None:
        """Nothing waits any more, so what was damaged does not matter either."""
        try:
            os.ftruncate(self._open(), 0)
            self._length = 0  # also where it cannot be synced: the next line begins here
            os.fsync(self._file)
        except OSError as error:
            self._failed(error)
        self._trusted = True
        self.trouble = ""

    def _rewrite(self) -> None:
        """What waits, in a new file."""
        fresh = self._path.with_name(f"{self._path.name}.new")
        data = b"".join(line(_Record(number, entry)) for number, entry in self._waiting.items())
        if not self._trusted and data:
            # The next run must not trust it more than this one.
            data = UNTRUSTED + data
        try:
            file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write_all(file, data, 0)
                os.fsync(file)
            finally:
                os.close(file)
            fresh.replace(self._path)
        except OSError as error:
            self._failed(error)
        self._length = len(data)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _failed(self, error: OSError) -> None:
        if self._file >= 0:
            # A later fsync on this descriptor may succeed although these bytes never reached the disk.
            os.close(self._file)
            self._file = -1
        reason = f"{self._path} cannot be written: {error.strerror}"
        if self._trusted:
            self.trouble = reason
        raise JournalFailed(reason) from None


UNTRUSTED = b"damaged\n"


def line(record: _Record) -> bytes:
    data = encode(record)
    return b"%08x %s\n" % (zlib.crc32(data), data)


def read(data: bytes) -> tuple[list[_Record], int, int]:
    """The records of a file, its length up to the end of the last line, and how many lines are damaged. Pure.

    What follows the last line break was being written when the power went, unless only the line break is damaged.
    """
    records, damaged, good = [], 0, 0
    *lines, rest = data.split(b"\n")
    for each in lines:
        good += len(each) + 1
        record = _parse(each)
        if record is None:
            damaged += 1
        else:
            records.append(record)
    whole = _parse(rest) or _parse(rest[:-1])
    if whole is not None:
        records.append(whole)
        damaged += 1
    return records, good, damaged


def _waiting(records: Iterable[_Record]) -> dict[int, Entry]:
    """The entries that were not carried out, by their numbers."""
    found = {}
    for record in records:
        if record.entry is not None:
            found[record.number] = record.entry
        for number in record.done:
            found.pop(number, None)
    return found


def work_in(data: bytes) -> list[Work]:
    """What etcd has to learn, says a journal's file, for who only reads it. Pure."""
    return merge(_waiting(read(data)[0]).items())


def _parse(text: bytes) -> _Record | None:
    if len(text) > LONGEST or text[8:9] != b" ":
        return None
    try:
        if text[:8] != b"%08x" % zlib.crc32(text[9:]):
            return None
        record = decode(text[9:], _Record)
        if record.entry is not None and record.entry.address:
            parse_address(record.entry.address)
        return record
    except ValueError:
        return None


def _write_all(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
