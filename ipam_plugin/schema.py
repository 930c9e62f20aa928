"""Which version of the register's layout stands in etcd, and that this program writes no other.

`schema` below the prefix says it. The version is raised only by a change that an older program could do harm with:
new fields and new kinds of lease do not need it (see `rewritten` and `read_lease` in model.py). Every transaction
compares the key's revision, so from the moment in which the version is raised no older program writes anything more,
however long it has been running.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ipam_plugin import __version__
from ipam_plugin.errors import IpamError, SchemaRefused
from ipam_plugin.etcd import Commit, Delete, KeyValue, Put
from ipam_plugin.model import Keys, Schema, decode, encode, rfc3339

VERSION = 1  # the newest that is understood, and what is written where none stands


class Client(Protocol):
    """What is needed of etcd here."""

    def get(self, key: str, *, deadline: float) -> KeyValue | None: ...
    def get_many(self, keys: Sequence[str], *, deadline: float) -> tuple[Mapping[str, KeyValue | None], int]: ...
    def list(self, prefix: str, *, deadline: float, keys_only: bool = False) -> tuple[list[KeyValue], int]: ...
    def commit(
        self, expect: Mapping[str, int], writes: Sequence[Put | Delete], *, deadline: float, proof: str | None = None
    ) -> Commit: ...
    def grant_ttl(self, seconds: int, *, deadline: float) -> int: ...
    def keep_alive(self, lease: int, *, deadline: float) -> int: ...
    def revoke(self, lease: int, *, deadline: float) -> None: ...


def judge(key: str, value: bytes | None) -> str:
    """'' when this program understands a register with this value of `schema` (None: none stands), else why not."""
    if value is None:
        return ""
    try:
        schema = decode(value, Schema)
    except ValueError as error:
        return (
            f"the etcd key {key} cannot be read ({error}), so it is not known whether ipam-plugin {__version__}"
            f" understands this register: if it does, delete the key (etcdctl del {key})"
        )
    if schema.version <= VERSION:
        return ""
    return (
        f"the register in etcd has schema version {schema.version}, written by ipam-plugin"
        f" {schema.written_by or 'unknown'} ({key}), and ipam-plugin {__version__} on this machine understands version"
        f" {VERSION} and no newer one: install that ipam-plugin, or a newer one, here too"
    )


class Guarded:
    """etcd as a client for programs that write: `commit` raises SchemaRefused, and writes nothing, where the register
    is none that this program understands. Reads go on; `warn` is told once why what was read may not be all.
    """

    def __init__(self, etcd: Client, keys: Keys, warn: Callable[[str], None] | None = None) -> None:
        self._etcd = etcd
        self._key = keys.schema
        self._warn = warn
        self._known: KeyValue | None = None
        self._problem: str | None = None  # None: not looked at yet
        self.on_raised: Callable[[], None] = lambda: None  # a transaction found that it is understood no more

    def check(self, deadline: float) -> str:
        """'' when the register is understood, else why not. Where none says its version, this one's is written."""
        found = self._etcd.get(self._key, deadline=deadline)
        if found is None:
            now = rfc3339(datetime.datetime.now(datetime.UTC))
            value = encode(Schema(version=VERSION, written_by=__version__, since=now))
            commit = self._etcd.commit({self._key: 0}, [Put(self._key, value)], deadline=deadline, proof=self._key)
            found = KeyValue(self._key, value, commit.revision, 0) if commit.applied else commit.found[self._key]
        return self._learn(found)

    def commit(
        self, expect: Mapping[str, int], writes: Sequence[Put | Delete], *, deadline: float, proof: str | None = None
    ) -> Commit:
        """As Etcd.commit; what is found of the schema's own key is not told."""
        uncertain = False
        if self._problem is None:
            self._learn(self._etcd.get(self._key, deadline=deadline))
        while True:
            if self._problem:
                raise SchemaRefused(self._problem)
            known = self._known.revision if self._known else 0
            commit = self._etcd.commit({**expect, self._key: known}, writes, deadline=deadline, proof=proof)
            if commit.applied:
                return commit
            uncertain = uncertain or commit.uncertain
            found = {key: each for key, each in commit.found.items() if key != self._key}
            schema = commit.found[self._key]
            if (schema.revision if schema else 0) == known:
                return commit._replace(found=found, uncertain=uncertain)
            if self._learn(schema):
                self.on_raised()

    def get(self, key: str, *, deadline: float) -> KeyValue | None:
        found = self._etcd.get(key, deadline=deadline)
        self._tell(deadline)
        return found

    def get_many(self, keys: Sequence[str], *, deadline: float) -> tuple[Mapping[str, KeyValue | None], int]:
        found = self._etcd.get_many(keys, deadline=deadline)
        self._tell(deadline)
        return found

    def list(self, prefix: str, *, deadline: float, keys_only: bool = False) -> tuple[list[KeyValue], int]:
        found = self._etcd.list(prefix, deadline=deadline, keys_only=keys_only)
        self._tell(deadline)
        return found

    def grant_ttl(self, seconds: int, *, deadline: float) -> int:
        return self._etcd.grant_ttl(seconds, deadline=deadline)

    def keep_alive(self, lease: int, *, deadline: float) -> int:
        return self._etcd.keep_alive(lease, deadline=deadline)

    def revoke(self, lease: int, *, deadline: float) -> None:
        self._etcd.revoke(lease, deadline=deadline)

    def _learn(self, found: KeyValue | None) -> str:
        self._known = found
        self._problem = judge(self._key, found.value if found else None)
        return self._problem

    def _tell(self, deadline: float) -> None:
        """After a read that etcd has answered: where it is away, nobody waits twice."""
        if self._warn is None:
            return
        warn, self._warn = self._warn, None
        try:
            problem = self._learn(self._etcd.get(self._key, deadline=deadline))
        except IpamError:
            return
        if problem:
            warn(problem)
