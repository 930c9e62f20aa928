"""Who this host is: its name, its heartbeat `alive/HOST`, its record `hosts/HOST`, its own addresses.

A name belongs to one daemon at a time. The heartbeat is created only if it is absent; a predecessor's is taken
over at once when that process is known to be gone, else after it has ended by itself (30 s). Where it goes on,
two machines have one name (a clone, or a second daemon), and the later one refuses to serve.
"""

from __future__ import annotations

import datetime
import enum
import fcntl
import logging
import math
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from ipam_plugin import __version__
from ipam_plugin.addresses import printable
from ipam_plugin.errors import ConfigError, EtcdUnavailable, IpamError, NotServing, OutcomeUnknown
from ipam_plugin.etcd import Commit, Delete, KeyValue, Put
from ipam_plugin.interfaces import InterfaceAddress
from ipam_plugin.model import HOST, NAME, Alive, Host, HostAddress, Keys, decode, encode, rfc3339
from ipam_plugin.register import Register
from ipam_plugin.view import View

log = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds that alive/HOST outlives the last refresh
REFRESH = 8.0  # seconds between refreshes
PATIENCE = HEARTBEAT + 5.0  # a heartbeat that is still there after this long goes on: somebody refreshes it
ALARMS = 20  # shown in hosts/HOST
ALARM_AGAIN = 600.0  # seconds until the same text is told again
ALARM_LENGTH = 1000  # characters
ALARM_TEXTS = 1000  # remembered for that; of more, the oldest are told again sooner
ALARMS_APART = 5.0  # seconds between two looks at the alarms for hosts/HOST
ALARM_LINES = 60  # of one kind are in the log with their texts in
ALARM_MINUTE = 60.0  # seconds


class StateDir:
    """The directory that makes a host the same host after a restart: its name, and a lock that one process has.

    Raises ConfigError when it cannot be used.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"state_dir: {path} cannot be used: {error.strerror}") from None

    def lock(self, patience: float = 5.0) -> None:
        """For as long as this process lives. A predecessor that is just ending is waited for, `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"state_dir: {self.path} is in use by another ipam-plugin on this machine; stop that one, or"
                        " give this one another state_dir, host and socket"
                    ) from None
                time.sleep(0.05)

    def read(self, name: str) -> str:
        """What was written under this name, or ''. What is damaged is never taken for absent: a host without its
        name would begin anew under another one, and strand its leases.
        """
        path = self.path / name
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"state_dir: {path} cannot be read: {error}") from None

    def write(self, name: str, text: str) -> None:
        """Whole or not at all, also when the power goes."""
        fresh = self.path / f"{name}.new"
        with open(fresh, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / name)
        directory = os.open(self.path, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def token(self) -> str:
        """A random name of this directory, kept in it."""
        known = self.read("token")
        if not known:
            known = secrets.token_urlsafe(12)
            self.write("token", known)
        return f"{known}.{self.path.stat().st_ino}"  # a copy is another directory


def host_name(configured: str | None, hostname: str, kept: str) -> tuple[str, str]:
    """The host's name, and a warning or ''. The name kept in state_dir stays when the hostname changes. Pure."""
    if configured:
        return configured, ""
    if kept:
        if not NAME.fullmatch(kept):
            raise ConfigError(f"state_dir: the name kept in it, {kept[:80]!r}, is none; write this host's name there")
        changed = kept != hostname
        return kept, (
            f"the hostname is {hostname!r} now, but this host's leases are under {kept!r}, which stays its name"
            if changed and NAME.fullmatch(hostname)
            else ""
        )
    if not NAME.fullmatch(hostname):
        raise ConfigError(f"host: the hostname {hostname!r} cannot be a host's name here; set `host` in the config")
    return hostname, ""


class Predecessor(enum.Enum):
    """What a heartbeat under our name says of the process that made it."""

    NONE = "there is none"
    SELF = "it is our own"
    GONE = "its process is known to be gone"
    UNKNOWN = "it may be alive: wait until it ends by itself"


def predecessor(alive: Alive | None, me: Alive, process_exists: Callable[[int, str], bool]) -> Predecessor:
    """Decide from the heartbeat found. Pure; `process_exists(pid, start time)` asks this machine.

    Gone for certain is a process of this machine and this boot that had the state_dir which we have locked now, or
    whose process id is nobody's any more.
    """
    if alive is None:
        return Predecessor.NONE
    if alive.process == me.process:
        return Predecessor.SELF
    if (alive.machine_id, alive.boot_id) == (me.machine_id, me.boot_id):
        if alive.state and alive.state == me.state:
            return Predecessor.GONE
        same_pids = alive.pid and alive.pid_namespace == me.pid_namespace
        if same_pids and not process_exists(alive.pid, alive.pid_started):
            return Predecessor.GONE
    return Predecessor.UNKNOWN


class Alarms:
    """What operators are told: counted by kind, in the log, and the last ones for the record of the host.

    Anybody on the LAN may be able to raise one after the other, so the log and the record follow at their own pace,
    while the counts have all of them. May be called from any thread; `now` gives monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._told: OrderedDict[str, float] = OrderedDict()  # texts -> when last told, in that order
        self._counts: dict[str, int] = {}
        self._shown: tuple[str, ...] = ()
        self._shown_at = -ALARMS_APART
        self._minutes: dict[str, tuple[float, int]] = {}  # kind -> since when, how many alarms

    def tell(self, kind: str, text: str) -> bool:
        """Whether the record is to be written at once. The same text within ALARM_AGAIN seconds is the same alarm."""
        text = printable(text)[:ALARM_LENGTH]  # of what stands in etcd, and the record of a host has its limit there
        with self._lock:
            now = self._now()
            before = self._told.get(text)
            if before is not None and now < before + ALARM_AGAIN:
                return False
            self._told[text] = now
            self._told.move_to_end(text)
            if len(self._told) > ALARM_TEXTS:
                self._told.popitem(last=False)
            self._counts[kind] = self._counts.get(kind, 0) + 1
            ended = self._end_minutes(now)
            since, count = self._minutes.get(kind, (now, 0))
            self._minutes[kind] = (since, count + 1)
            at_once = self._look(now)
        _log([*ended, (kind, text)] if count < ALARM_LINES else ended)
        return at_once

    def counts(self) -> dict[str, int]:
        """How many alarms of each kind there were."""
        with self._lock:
            return dict(self._counts)

    def shown(self) -> tuple[str, ...]:
        """The last texts, each once, newest last; newer ones not before ALARMS_APART seconds are over."""
        with self._lock:
            self._look(self._now())
            return self._shown

    def tend(self) -> float:
        """Log what is to be summed up. In how many seconds `shown` may have newer texts: 0.0 when it has some now."""
        with self._lock:
            now = self._now()
            ended = self._end_minutes(now)
            looked = self._look(now)
            left = self._shown_at + ALARMS_APART - now
        _log(ended)
        return 0.0 if looked else left if left > 0 else math.inf

    def _newest(self) -> tuple[str, ...]:
        return tuple(self._told)[-ALARMS:]

    def _look(self, now: float) -> bool:
        if now < self._shown_at + ALARMS_APART or self._newest() == self._shown:
            return False
        self._shown, self._shown_at = self._newest(), now
        return True

    def _end_minutes(self, now: float) -> list[tuple[str, str]]:
        """What the log does not have of the minutes that are over, as (kind, text)."""
        over = [(kind, count) for kind, (since, count) in self._minutes.items() if now >= since + ALARM_MINUTE]
        for kind, _ in over:
            del self._minutes[kind]
        return [
            (kind, f"{count - ALARM_LINES} more within a minute were counted and are not in this log")
            for kind, count in over
            if count > ALARM_LINES
        ]


def _log(lines: list[tuple[str, str]]) -> None:
    for kind, text in lines:
        log.error("ALARM %s: %s", kind, text)


class BootWait:
    """How long a request waits for this host to serve: its time limit, and once in a boot longer.

    Docker starts its containers once in a boot and never repeats a start that failed; they come one after the other
    on each network. So there is one window for all of them, from the first request that has to wait: were it each
    request's own, an etcd that stays away would hold up dockerd so long for every container. Pure but for what it
    keeps; times are monotonic seconds.
    """

    def __init__(self, time_limit: float, seconds: float, *, over: bool) -> None:
        self.time_limit = time_limit
        self._seconds = seconds
        self._end = -math.inf if over else None
        self._stop = math.inf

    def give_up(self, arrival: float) -> float:
        """Until when a request waits that cannot be served yet. The first one begins the window."""
        if self._end is None:
            self._end = arrival + self._seconds
        return max(arrival + self.time_limit, min(self._end, self._stop))

    def answer_by(self, arrival: float, admitted: float) -> float:
        """The deadline of a request that waited until `admitted`: within the window that wait is not its own time."""
        begins = admitted if self._end is not None and admitted <= min(self._end, self._stop) else arrival
        return begins + self.time_limit

    def served(self) -> None:
        """Requests are served from now on; those that wait go on by the window that they found."""
        if self._end is None:
            self._end = -math.inf

    def stop(self, now: float) -> None:
        """Nobody waits for this daemon longer than usual any more; the next one may let requests wait."""
        self._stop = min(self._stop, now)

    def is_over(self, now: float) -> bool:
        return self._end is not None and now >= self._end


class Heartbeats(Protocol):
    """What is needed of etcd here."""

    def get(self, key: str, *, deadline: float) -> KeyValue | None: ...
    def commit(
        self, expect: dict[str, int], writes: Sequence[Put | Delete], *, deadline: float, proof: str | None = None
    ) -> Commit: ...
    def grant_ttl(self, seconds: int, *, deadline: float) -> int: ...
    def keep_alive(self, lease: int, *, deadline: float) -> int: ...


class Presence:
    """This host in the register. `admit(arrival)` is the gate that every request passes.

    `listens_with` gives the MACs of the interfaces that this host listens on, with an address or without; `on_silent`
    is told when etcd did not answer; `restored` gives the token of the last restoration of etcd since which this host
    has written what its containers have. `schema(deadline)` says why the register is none that this program may write
    to, '' where it may. `request_limit`: seconds from a request's arrival to its answer. `boot_wait`:
    seconds that requests may wait for this host to serve instead, once in a boot.
    """

    def __init__(
        self,
        etcd: Heartbeats,
        view: View,
        keys: Keys,
        state: StateDir,
        *,
        name: str,
        segments: Callable[[], Collection[str]],
        carried: Callable[[float], Sequence[InterfaceAddress]],
        time_limit: float,
        listens_with: Callable[[], Collection[str]] = lambda: (),
        on_silent: Callable[[IpamError], None] = lambda error: None,
        restored: Callable[[], str] = lambda: "",
        schema: Callable[[float], str] = lambda deadline: "",
        request_limit: float = 15.0,
        boot_wait: float = 0.0,
    ) -> None:
        self._etcd = etcd
        self._view = view
        self._keys = keys
        self._state = state
        self._segments = segments
        self._carried = carried
        self._listens_with = listens_with
        self._on_silent = on_silent
        self._restored = restored
        self._schema = schema
        self._time_limit = time_limit
        self.name = name
        self._kept_name = state.read("host")
        self._me = _this_process(name, state.token())
        self._kept_boot = state.read("boot")
        self._first_of_boot = self._kept_boot not in ("", self._me.boot_id)
        self._boot_wait = BootWait(request_limit, boot_wait, over=self._kept_boot == self._me.boot_id)
        self._joined = ""
        self._alarms = Alarms()
        self._ttl_lease = 0
        self._blocked_since = 0.0
        self._condition = threading.Condition()
        self._serving = False
        self._reason = "the daemon has just started and has not reached etcd yet"
        self._wake = threading.Event()
        self._written: bytes = b""

    # ------------------------------------------------------------------------------- for the others

    def serving(self, deadline: float) -> None:
        """Return when requests may be served; raise NotServing with the reason when that does not come in time."""
        if self._serving:
            return
        with self._condition:
            if not self._condition.wait_for(lambda: self._serving, max(0.0, deadline - time.monotonic())):
                raise NotServing(self._reason)

    def admit(self, arrival: float) -> float:
        """By when a request must be answered, said as soon as it may be served; monotonic seconds.

        Raises NotServing with the reason when that does not come in time.
        """
        if self._serving:
            return arrival + self._boot_wait.time_limit
        with self._condition:
            while not self._serving:
                left = self._boot_wait.give_up(arrival) - time.monotonic()
                if left <= 0:
                    raise NotServing(self._reason)
                self._condition.wait(left)
            return self._boot_wait.answer_by(arrival, time.monotonic())

    def stopping(self) -> None:
        """The daemon is to stop, and then takes no longer than a request's time limit. For a signal's handler too."""
        with self._condition:  # its lock may be taken again by the thread that has it
            self._boot_wait.stop(time.monotonic())
            self._condition.notify_all()

    @property
    def is_first_of_boot(self) -> bool:
        """Whether one served this host before it was booted, and none since."""
        return self._first_of_boot

    @property
    def is_serving(self) -> bool:
        return self._serving

    @property
    def why_not_serving(self) -> str:
        """The sentence, '' while requests are served."""
        with self._condition:
            return "" if self._serving else self._reason

    def alarm(self, kind: str, text: str) -> None:
        """Tell an operator: in the log, in hosts/HOST and in the metrics. The same text is told again after a while."""
        if self._alarms.tell(kind, text):
            self.changed()

    def alarm_counts(self) -> dict[str, int]:
        return self._alarms.counts()

    def changed(self) -> None:
        """The interfaces or the pools in use changed: look now."""
        self._wake.set()

    # ------------------------------------------------------------------------------------- the loop

    def run(self, register: Register, stop: threading.Event) -> None:
        """For a thread of its own, until `stop` is set and `changed()` was called."""
        last_failure = ""
        while not stop.is_set():
            deadline = time.monotonic() + self._time_limit
            try:
                if self._hold_heartbeat(deadline):
                    self._write_record(deadline)
                    register.register_own_addresses(deadline)
                    register.free_lost_addresses(deadline)
                    self._set_serving(True, "")
                    register.trim_history(deadline)
                last_failure = ""
            except IpamError as error:
                if isinstance(error, EtcdUnavailable | OutcomeUnknown):
                    self._on_silent(error)
                if not self._serving:
                    self._set_serving(False, f"etcd is not there: {error}")
                if str(error) != last_failure:
                    log.warning("what host %s has to write to etcd is not written: %s", self.name, error)
                    last_failure = str(error)
            except OSError as error:
                if not self._serving:
                    self._set_serving(False, f"host {self.name} cannot read its interfaces or write its state: {error}")
                log.warning("host %s cannot read its interfaces or write its state: %s", self.name, error)
            self._keep_boot()
            self._wake.wait(min(self._alarms.tend(), REFRESH if self._serving else 0.5))
            self._wake.clear()

    def leave(self) -> None:
        """At a stop: end the heartbeat, so that a successor need not wait for it."""
        key = self._keys.heartbeat(self.name)
        deadline = time.monotonic() + 2
        try:
            found = self._etcd.get(key, deadline=deadline)
            if found and _alive(found) and _alive(found).process == self._me.process:  # type: ignore[union-attr]
                self._etcd.commit({key: found.revision}, [Delete(key)], deadline=deadline)
        except IpamError as error:
            log.info("the heartbeat ends by itself in %d s: %s", HEARTBEAT, error)

    def _set_serving(self, serving: bool, reason: str) -> None:
        with self._condition:
            if serving and not self._serving:
                log.info("host %s is in the register and serves", self.name)
            elif not serving and self._reason != reason:
                log.warning("not serving: %s", reason)
            self._serving, self._reason = serving, reason
            if serving:
                self._boot_wait.served()
            self._condition.notify_all()

    def _keep_boot(self) -> None:
        """So that a daemon which is started again in this boot does not let requests wait so long once more."""
        if self._kept_boot == self._me.boot_id or not (self._serving or self._boot_wait.is_over(time.monotonic())):
            return
        self._kept_boot = self._me.boot_id
        try:
            self._state.write("boot", self._me.boot_id)
        except OSError as error:
            log.warning("that this boot's wait for etcd is over cannot be written: %s", error)

    def _hold_heartbeat(self, deadline: float) -> bool:
        """Whether the name is ours: refresh the heartbeat, or create it, or take over a predecessor's."""
        if self._ttl_lease and self._etcd.keep_alive(self._ttl_lease, deadline=deadline) <= 0:
            self._ttl_lease = 0
        # After the refresh: a host that may not write any more is there all the same, and keeps what it has.
        problem = self._schema(deadline)
        if problem:
            self._set_serving(False, problem)
            return False
        key = self._keys.heartbeat(self.name)
        found = self._etcd.get(key, deadline=deadline)
        who = predecessor(_alive(found), self._me, _process_exists)
        if found is not None and _alive(found) is None:
            who = Predecessor.UNKNOWN
        if who is Predecessor.SELF and self._ttl_lease:
            if not self._may_use_name():
                return False
            self._keep_name(deadline)
            return True
        if who is Predecessor.UNKNOWN:
            self._wait_for_other(found, _alive(found))
            return False
        if not self._view.loaded.wait(max(0.0, deadline - time.monotonic())):
            return False
        if not self._may_use_name():
            return False
        lease = self._ttl_lease or self._etcd.grant_ttl(HEARTBEAT, deadline=deadline)
        me = msgspec.structs.replace(self._me, since=rfc3339(datetime.datetime.now(datetime.UTC)))
        expect = {key: found.revision if found else 0}
        commit = self._etcd.commit(expect, [Put(key, encode(me), lease)], deadline=deadline, proof=key)
        self._ttl_lease = lease
        if commit.applied:
            self._blocked_since = 0.0
            self._keep_name(deadline)
        return commit.applied

    def _keep_name(self, deadline: float) -> None:
        if self._kept_name == self.name:
            return
        revision, _ = self._view.host(self._kept_name)
        if revision:
            old = self._keys.host(self._kept_name)
            commit = self._etcd.commit({old: revision}, [Delete(old)], deadline=deadline)
            self._view.learn(old, None, commit.revision)
        self._state.write("host", self.name)
        self._kept_name = self.name

    def _wait_for_other(self, found: KeyValue | None, other: Alive | None) -> None:
        now = time.monotonic()
        self._blocked_since = self._blocked_since or now
        where = (
            f"machine id {other.machine_id}, process {other.pid}, since {other.since}"
            if other
            else "its value cannot be read"
        )
        cure = (
            "each host needs a name of its own: set `host` in this machine's configuration (a cloned machine also"
            " needs a new /etc/machine-id and an empty state_dir), or stop the other daemon"
        )
        if now - self._blocked_since > PATIENCE:
            reason = f"another daemon is alive under the name {self.name} ({where}), so this one does not serve; {cure}"
        else:
            reason = f"a daemon under the name {self.name} was alive within the last {HEARTBEAT} s ({where}); {cure}"
        self._set_serving(False, reason)

    def _may_use_name(self) -> bool:
        """A name that was changed in the configuration would strand the leases of the old one."""
        if not self._kept_name or self._kept_name == self.name:
            return True
        # The addresses of its own interfaces go along; what its networks use cannot.
        stranded = [
            str(address) for _, address, entry in self._view.entries_of(self._kept_name) if entry.kind != HOST
        ] + self._view.pools_of(self._kept_name)
        if not stranded:
            return True
        self._set_serving(
            False,
            f"the configuration names this host {self.name}, but {len(stranded)} leases and pools are under its old"
            f" name {self._kept_name}, such as {stranded[0]}: set host: {self._kept_name} again, or remove this host's"
            " containers and networks that use the driver before the name is changed",
        )
        return False

    def _write_record(self, deadline: float) -> None:
        key = self._keys.host(self.name)
        if self._view.is_unreadable(self.name):
            self.alarm(
                "record_unreadable",
                f"the etcd key {key} holds something that is no record of a host, so the others do not know host"
                f" {self.name}'s own addresses; it is not overwritten: delete it (etcdctl del {key})",
            )
            return
        revision, known = self._view.host(self.name)
        self._joined = self._joined or (known.joined if known else "") or rfc3339(datetime.datetime.now(datetime.UTC))
        record = encode(
            Host(
                host=self.name,
                machine_id=self._me.machine_id,
                version=__version__,
                joined=self._joined,
                addresses=tuple(
                    HostAddress(str(each.address), each.prefixlen, each.interface, each.mac)
                    for each in self._carried(deadline)
                ),
                segments=tuple(sorted(self._segments())),
                alarms=self._alarms.shown(),
                macs=tuple(sorted({*self._listens_with()})),
                restored=self._restored() or (known.restored if known else ""),
            )
        )
        if record == self._written and known is not None and not known.absent:
            return
        commit = self._etcd.commit({key: revision}, [Put(key, record)], deadline=deadline, proof=key)
        if commit.applied:
            self._view.learn(key, record, commit.revision)
            self._written = record
        else:
            found = commit.found[key]
            self._view.learn(key, found.value if found else None, found.revision if found else commit.revision)
            self._wake.set()  # look again: at another revision, or at something that cannot be read


def _alive(found: KeyValue | None) -> Alive | None:
    try:
        return decode(found.value, Alive) if found else None
    except ValueError:
        return None


def _this_process(name: str, state: str) -> Alive:
    pid = os.getpid()
    return Alive(
        host=name,
        machine_id=_first_line("/etc/machine-id"),
        boot_id=_first_line("/proc/sys/kernel/random/boot_id"),
        process=secrets.token_urlsafe(12),
        state=state,
        pid=pid,
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        pid_started=_started(pid),
        version=__version__,
    )


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The start time of a process in clock ticks since boot (proc(5), field 22), or ''."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _process_exists(pid: int, started: str) -> bool:
    return _started(pid) == started
