"""The daemon: where the concrete parts meet, and the gunicorn processes that run them.

gunicorn's master forks one worker. Everything that has threads or a connection to etcd starts in the worker,
because gRPC does not survive a fork. The master only holds the socket and the lock on state_dir.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
import gunicorn.app.base
import gunicorn.arbiter
import gunicorn.glogging
import gunicorn.util
import gunicorn.workers.gthread

from ipam_plugin import __version__, interfaces
from ipam_plugin.addresses import Address, parse_address, parse_range, printable
from ipam_plugin.app import SPARE_THREADS, WAITING, create_app
from ipam_plugin.claims import Claims, Stock
from ipam_plugin.config import Config
from ipam_plugin.dockerd import Dockerd
from ipam_plugin.embedded_etcd import EmbeddedEtcd
from ipam_plugin.errors import ConfigError, IpamError, NotServing, ProbeFailed
from ipam_plugin.etcd import Etcd, EtcdSettings, Event, KeyValue
from ipam_plugin.holds import Holds
from ipam_plugin.host import Presence, StateDir, host_name
from ipam_plugin.journal import Journal, Work
from ipam_plugin.ledger import Ledger
from ipam_plugin.metrics import Metrics
from ipam_plugin.model import Keys, Pool
from ipam_plugin.neighbourhood import Habits, Neighbourhood
from ipam_plugin.outage import Outage
from ipam_plugin.reconcile import Reconciler
from ipam_plugin.register import Register
from ipam_plugin.restoration import Restoration
from ipam_plugin.retire import Retirer
from ipam_plugin.schema import Guarded
from ipam_plugin.standby import Keeper
from ipam_plugin.vendors import vendor_of
from ipam_plugin.view import Local, View
from ipam_plugin.wire import require_capability

log = logging.getLogger(__name__)

SYSTEMD_SOCKET = 3  # the first file descriptor that systemd passes (sd_listen_fds(3))
READY_AT_LATEST = 90.0  # seconds; dockerd waits for this unit, and must start also when etcd is away
KERNEL_PATIENCE = 5.0  # seconds; the kernel may hold its lock for so long while it takes down a large namespace
ETCD_SIZE_AGAIN = 30.0  # seconds between two looks at the size of etcd's database
STOP_PATIENCE = 1.0  # seconds for all threads together; what they leave behind is what a power cut leaves
ANSWER_MARGIN = 0.5  # seconds of the deadline that are left for the answer's way back


def etcd_of(config: Config) -> Etcd:
    """The client that a configuration describes. Opens nothing yet."""
    told = config.etcd
    return Etcd(
        EtcdSettings(
            endpoints=tuple(told.endpoints),
            ca_cert=told.ca_cert,
            cert=told.cert,
            key=told.key,
            username=told.username,
            password=told.password if told.username else None,
            timeout=told.timeout,
        )
    )


def local_settings(config: Config, segment: str) -> Local:
    """What this host's configuration adds to a segment."""
    told = config.for_segment(segment)
    return Local(
        exclude=tuple(parse_range(text) for text in told.exclude),
        routers=tuple(parse_address(text) for text in told.router),
        cooldown=told.cooldown,
        hold=told.hold,
        interface=told.interface or "",
    )


def habits(config: Config, segment: str) -> Habits:
    """How this host looks at a segment's wire."""
    told = config.for_segment(segment)
    return Habits(
        probe=told.probe,
        refuse=told.probe_failure == "refuse",
        interface=told.interface or "",
        standby=told.standby,
        probation=told.probation,
    )


def asks_a_wire(config: Config) -> bool:
    """Whether any segment that the configuration names is probed."""
    names = {config.segment, *config.segments}
    return any(config.for_segment(name).probe != "off" for name in names)


def carried(deadline: float) -> list[interfaces.InterfaceAddress]:
    """The addresses on this host's interfaces. Raises NotServing when the kernel does not say them in time."""
    try:
        return interfaces.addresses(min(deadline, time.monotonic() + KERNEL_PATIENCE))
    except OSError as error:
        raise NotServing(f"this host's interfaces cannot be read: {error}") from error


class Daemon:
    """All parts of one host's daemon. `start` once, in the process that serves; `stop` ends every thread."""

    def __init__(self, config: Config, state: StateDir, name: str, *, embedded_etcd: bool = False) -> None:
        keys = Keys(config.prefix)
        self._config = config
        self._keys = keys
        self._embedded = EmbeddedEtcd(config.state_dir, config.etcd.endpoints[0]) if embedded_etcd else None
        self._etcd = etcd_of(config)
        guarded = Guarded(self._etcd, keys)
        self._view = View(keys, name, lambda segment: local_settings(config, segment))
        self._presence = Presence(
            guarded,
            self._view,
            keys,
            state,
            name=name,
            segments=self._segments,
            carried=carried,
            listens_with=lambda: self._neighbourhood.macs(),
            on_silent=lambda error: self._outage.noticed(error),
            restored=lambda: self._restoration.answered,
            schema=guarded.check,
            time_limit=5.0,
            request_limit=config.deadline - ANSWER_MARGIN,
            boot_wait=max(0.0, config.boot_wait - ANSWER_MARGIN),
        )
        guarded.on_raised = self._presence.changed
        self._ledger = Ledger(guarded, self._view, keys, name)
        self._restoration = Restoration(
            self._etcd,
            self._ledger,
            self._view,
            keys,
            name,
            state,
            nothing_runs=self._presence.is_first_of_boot,
            alarm=self._presence.alarm,
            changed=self._presence.changed,
        )
        self._outage = Outage(
            Journal(state.path / "journal"),
            lambda deadline: self._ledger.read(keys.host(name), deadline),
            alarm=self._presence.alarm,
        )
        self._neighbourhood = Neighbourhood(
            self._view, name, lambda segment: habits(config, segment), interfaces, alarm=self._presence.alarm
        )
        self._stock = Stock()
        self._claims = Claims(
            self._ledger, self._view, keys, name, self._neighbourhood, self._stock, self._outage, vendor_of=vendor_of
        )
        self._keeper = Keeper(
            self._claims,
            self._stock,
            self._ledger,
            self._view,
            keys,
            name,
            self._neighbourhood,
            alarm=self._presence.alarm,
        )
        self._holds = Holds(self._ledger, self._view, self._stock, name, self._outage.is_waiting)
        self._register = Register(
            self._ledger,
            self._claims,
            self._view,
            keys,
            name,
            outage=self._outage,
            default_segment=config.segment,
            segments=self._segments,
            carried=carried,
            alarm=self._presence.alarm,
            may_give=self._restoration.wait,
            on_given=self._given,
            is_gone=lambda pool, address, lease, deadline: (
                self._reconciler is not None and self._reconciler.is_gone(pool, address, lease, deadline)
            ),
        )
        self._dockerd = Dockerd(config.docker.socket)
        self._reconciler = (
            Reconciler(
                self._dockerd,
                self._register,
                self._ledger,
                self._claims,
                self._view,
                keys,
                name,
                self._neighbourhood,
                state,
                grace=config.docker.grace,
                default_segment=config.segment,
                carried=carried,
                alarm=self._presence.alarm,
                pending=lambda segment, address: self._outage.of(segment, address) is not None,
            )
            if config.docker.reconcile
            else None
        )
        self._retirer = Retirer(
            self._etcd,
            self._ledger,
            self._view,
            keys,
            name,
            self._neighbourhood,
            segments=self._segments,
            serving=lambda: self._presence.is_serving,
            after=config.retire_after,
            alarm=self._presence.alarm,
        )
        self._metrics = Metrics()
        self._metrics.ask(
            serving=lambda: self._presence.is_serving,
            leases=lambda: {segment: self._view.use(segment) for segment in self._view.segment_names()},
            transactions=lambda: dict(self._ledger.transactions),
            lost_races=lambda: self._ledger.lost_races,
            alarms=self._presence.alarm_counts,
            probes=lambda: dict(self._neighbourhood.results),
            standby=self._stock.counts,
            standby_goal=self._keeper.goals,
            pools=lambda: self._view.tallies(name),
            hosts=self._view.host_counts,
            conflicts=lambda: self._claims.conflicts,
            unproven=lambda: self._claims.unproven,
            wires=self._neighbourhood.states,
            outage=self._outage,
            watch_connected=lambda: self._etcd.watch_connected,
            etcd_refused=lambda: dict(self._etcd.refused),
            docker_looks=lambda: dict(self._reconciler.looks) if self._reconciler else {},
            reconciled=lambda: dict(self._reconciler.results) if self._reconciler else {},
        )
        self._etcd.on_answer = self._metrics.etcd_answer
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._watcher: interfaces.Watcher | None = None
        self._stop_metrics: Callable[[], None] = lambda: None

    def _segments(self) -> set[str]:
        """The segments that this host is in: its networks', and those that its configuration names."""
        return {self._config.segment, *self._config.segments, *self._view.segments_of(self._presence.name)}

    def app(self) -> flask.Flask:
        return create_app(self._register, self._presence.admit, metrics=self._metrics)

    def start(self) -> None:
        log.info("ipam-plugin %s starts as host %s", __version__, self._presence.name)
        if asks_a_wire(self._config):
            try:
                require_capability()
            except ProbeFailed as error:
                self._presence.alarm("cannot_probe", f"{error}; what follows says probe_failure in the configuration")
        for work in self._outage.work():  # of an earlier run
            self._stock.journalled(work.tokens)
        self._neighbourhood.on_heard = self._keeper.heard
        self._neighbourhood.on_opened = self._presence.changed
        self._claims.on_shortage = self._keeper.wake
        self._view.on_wanted = self._wanted
        self._view.on_orders = self._retirer.wake
        self._view.on_pools = self._pools_changed
        if self._reconciler is not None:
            self._reconciler.on_look.append(self._holds.looked)
            self._reconciler.on_compared = self._restoration.compared
            self._keeper.may_adopt = self._reconciler.nobody_has
        seen = self._restoration.seen()
        if seen is not None:
            self._etcd.expect(seen.position)
        self._etcd.on_went_back = self._restoration.went_back
        self._view.on_restored = self._restoration.learned
        self._ledger.may_give = self._restoration.check
        self._claims.is_restoring = self._holds.is_restoring = lambda: self._restoration.is_restoring
        if self._embedded is not None:
            self._embedded.start()
        self._run("watch", self._watch)
        self._run("presence", lambda: self._presence.run(self._register, self._stop))
        self._run("restoration", lambda: self._restoration.run(self._stop))
        self._run("orphans", lambda: self._ledger.free_orphans(self._stop))
        self._run("journal", self._carry_out_journal)
        self._run("keeper", lambda: self._once_serving(lambda: self._keeper.run(self._stop)))
        self._run("holds", lambda: self._once_serving(lambda: self._holds.run(self._stop)))
        self._run("retirer", lambda: self._retirer.run(self._stop))
        if self._reconciler is not None:
            self._run("reconcile", self._reconcile)
        self._run("ready", self._report_ready)
        self._watcher = interfaces.Watcher(self._interfaces_changed)
        self._watcher.start()
        self._run("etcd's size", self._ask_etcd_size)
        self._stop_metrics = self._metrics.listen(
            self._config.metrics.listen,
            lambda: self._presence.why_not_serving or self._restoration.why_not_giving,
        )

    def stopping(self) -> None:
        """No request is taken any more; those that are here are answered within their deadline, before `stop`."""
        self._presence.stopping()

    def stop(self) -> None:
        """End everything in order; what is running has been answered before."""
        notify("STOPPING=1")
        self._stop.set()
        self._presence.changed()
        self._keeper.close()
        self._retirer.close()
        if self._reconciler is not None:
            self._reconciler.close()
        self._outage.wake()
        self._holds.wake()
        self._restoration.close()
        self._ledger.stop_freeing_orphans()
        if self._watcher is not None:
            self._watcher.stop()
        # Not waited for: its server looks up every half second only, and requests may wait for the next daemon.
        threading.Thread(target=self._stop_metrics, name="metrics", daemon=True).start()
        self._neighbourhood.close()
        self._presence.leave()
        end = time.monotonic() + STOP_PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._dockerd.close()
        self._outage.close()
        self._etcd.close()
        if self._embedded is not None:
            self._embedded.stop()

    def _run(self, name: str, target: Callable[[], None]) -> None:
        def again_and_again() -> None:
            # A daemon that answers but whose heartbeat has ended would be worse than one that has crashed.
            while not self._stop.is_set():
                try:
                    return target()
                except Exception:
                    log.exception("thread %s failed; it begins again", name)
                    self._stop.wait(1)

        thread = threading.Thread(target=again_and_again, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _interfaces_changed(self) -> None:
        self._presence.changed()
        self._keeper.interfaces_changed()

    def _pools_changed(self) -> None:
        self._presence.changed()
        self._keeper.wake()
        if self._reconciler is not None:
            self._reconciler.wake()

    def _given(self, pool: Pool, address: Address, mac: str) -> None:
        self._keeper.given(pool, address, mac)
        if self._reconciler is not None:
            self._reconciler.given(pool, address, mac)

    def _wanted(self) -> None:
        self._keeper.wake()
        self._holds.wake()

    def _once_serving(self, work: Callable[[], None]) -> None:
        """For what needs to be sure that this host is the one of its name."""
        while not self._stop.is_set():
            try:
                self._presence.serving(time.monotonic() + 1)
            except NotServing:
                continue
            return work()

    def _reconcile(self) -> None:
        assert self._reconciler is not None
        reconciler = self._reconciler
        self._once_serving(lambda: reconciler.run(self._stop))

    def _carry_out_journal(self) -> None:
        def done(work: Work) -> None:
            self._stock.settled(work.tokens)

        self._once_serving(lambda: self._outage.run(self._register.settle, self._stop, done))

    def _watch(self) -> None:
        def reset(values: list[KeyValue], revision: int, epoch: int) -> None:
            self._view.reset(((each.key, each.value, each.revision) for each in values), revision, epoch)
            if self._reconciler is not None:
                self._reconciler.wake()  # etcd may be back from a backup

        def events(changes: list[Event], revision: int) -> None:
            self._view.apply(changes, revision)

        self._etcd.watch(self._keys.prefix, reset, events, self._stop)

    def _ask_etcd_size(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(IpamError):  # that etcd is away, others notice and tell
                status = self._etcd.status(deadline=time.monotonic() + 2)
                self._metrics.etcd_database.set(status.db_size)
            self._stop.wait(ETCD_SIZE_AGAIN)

    def _report_ready(self) -> None:
        """Tell systemd, once requests are served, at most after READY_AT_LATEST.

        docker.service starts then, and a container that got no address at boot is not started again.
        """
        end = time.monotonic() + READY_AT_LATEST
        status = ""
        while not self._stop.is_set():
            try:
                self._presence.serving(min(end, time.monotonic() + 0.2))
                return notify("READY=1\nSTATUS=serving")
            except NotServing as reason:
                if str(reason) != status:
                    status = str(reason)
                    notify(f"STATUS={status}")
                if time.monotonic() >= end:
                    return notify("READY=1")


# ------------------------------------------------------------------------------------------- processes


def serve(config: Config, *, embedded_etcd: bool = False) -> None:
    """Run the daemon until a signal ends it. Raises ConfigError before anything has started."""
    log_to_stderr(config)
    for exposed in config.etcd.exposed():
        log.warning("%s", exposed)
    state = StateDir(config.state_dir)
    state.lock()
    name, warning = host_name(config.host, socket.gethostname(), state.read("host"))
    if warning:
        log.warning("%s", warning)
    if embedded_etcd:
        EmbeddedEtcd(config.state_dir, config.etcd.endpoints[0])  # what is wrong with it is said before anything starts
    # systemd has given the socket already, or it is made here.
    # (Without either, gunicorn would listen on a TCP port of its own choice.)
    given = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "0") != "0"
    if given:
        with socket.socket(fileno=os.dup(SYSTEMD_SOCKET)) as told:
            if told.getsockname() != config.socket:
                log.warning(
                    "systemd gives the socket %s, so `socket: %s` counts not", told.getsockname(), config.socket
                )
    listener = None if given else listen(config.socket)
    _Server(config, state, name, listener, embedded_etcd).run()


def listen(path: str) -> socket.socket:
    """A Unix socket that only root may connect to. Raises ConfigError when another daemon answers there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _is_stale_socket(path):
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        os.chmod(path, 0o600)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"socket: {path} is in use by another process; stop it or name another socket") from None
        raise ConfigError(f"socket: {path} cannot be made: {error.strerror or error}") from None
    return listener


def _is_stale_socket(path: str) -> bool:
    """Whether a socket is there and nobody listens on it any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(2)
            client.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


# A request is there within milliseconds of its connection: engines write it at once, on this machine.
RECEIVE_TIMEOUT = 5.0  # seconds for all of a request
LINGER = 0.1  # seconds that a client which has its answer may take to close its end


class _Connection(socket.socket):
    """A connection that ends when its request has not come within RECEIVE_TIMEOUT, a byte at a time or not at all."""

    ends = 0.0  # monotonic seconds

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.gettimeout() is not None:  # gunicorn watches over this one itself
            return super().recv(size, flags)
        try:
            self.settimeout(max(0.001, self.ends - time.monotonic()))
            return super().recv(size, flags)
        except TimeoutError:
            # Which gunicorn takes for a client that went away: no line in the log for every one of them.
            raise ConnectionResetError(errno.ECONNRESET, "the request did not come in time") from None
        finally:
            self.settimeout(None)


class _Worker(gunicorn.workers.gthread.ThreadWorker):  # type: ignore[misc]  # gunicorn ships no types
    """gunicorn's worker with threads, made safe against clients that do not close their end of a connection (P6).

    gunicorn waits for it, up to two seconds, in the thread that accepts all the others. Here the thread waits that has
    answered, and no longer than a moment; and for a request that does not come there is a time limit.
    """

    def handle(self, conn: Any) -> Any:
        if not isinstance(conn.sock, _Connection):
            conn.sock = _Connection(fileno=conn.sock.detach())
        conn.sock.ends = time.monotonic() + RECEIVE_TIMEOUT
        result = super().handle(conn)
        if result is False:
            gunicorn.util.close_graceful(conn.sock, timeout=LINGER)
            conn.is_closed = True
        return result

    def finish_request(self, conn: Any, fs: Any) -> None:
        if getattr(conn, "is_closed", False):
            self.nr_conns -= 1
        else:
            super().finish_request(conn, fs)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.app.stopping()
        super().handle_exit(sig, frame)


class _Server(gunicorn.app.base.BaseApplication):  # type: ignore[misc]  # gunicorn ships no types
    def __init__(
        self, config: Config, state: StateDir, name: str, listener: socket.socket | None, embedded_etcd: bool
    ) -> None:
        self._config = config
        self._state = state
        self._name = name
        self._listener = listener
        self._embedded_etcd = embedded_etcd
        self._daemon: Daemon | None = None
        super().__init__(prog="ipam-plugin")

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "workers": 1,
            "worker_class": _Worker,
            "threads": WAITING + SPARE_THREADS,
            "worker_connections": 4 * WAITING,
            # A kept connection that the server closes just as dockerd writes on it makes dockerd send the request
            # again, empty (moby#39331).
            "keepalive": 0,
            # Of the worker's main thread, which never waits; a request may take boot_wait and its deadline.
            "timeout": 60,
            "graceful_timeout": int(self._config.deadline) + 1,
            "control_socket_disable": True,
            "logger_class": _Logger,
            "worker_exit": self._worker_exit,
            "proc_name": "ipam-plugin",
        }
        if self._listener is not None:
            settings["bind"] = f"fd://{self._listener.fileno()}"
        for name, value in settings.items():
            self.cfg.set(name, value)

    def run(self) -> None:
        # gunicorn's master would tell systemd that it is ready as soon as it has forked.
        _take_notify_socket()
        master = os.getpid()
        try:
            gunicorn.arbiter.Arbiter(self).run()
        except SystemExit as error:
            # The forked worker, which has said what is wrong with the configuration, leaves through here too.
            if os.getpid() == master and error.code == gunicorn.arbiter.Arbiter.APP_LOAD_ERROR:
                sys.exit(2)
            raise

    def load(self) -> flask.Flask:
        """In the worker, after the fork."""
        self._daemon = Daemon(self._config, self._state, self._name, embedded_etcd=self._embedded_etcd)
        try:
            self._daemon.start()
        except ConfigError as error:
            log.error("%s", error)
            sys.exit(gunicorn.arbiter.Arbiter.APP_LOAD_ERROR)
        return self._daemon.app()

    def stopping(self) -> None:
        if self._daemon is not None:
            self._daemon.stopping()

    def _worker_exit(self, arbiter: Any, worker: Any) -> None:
        if self._daemon is not None:
            self._daemon.stop()


# ------------------------------------------------------------------------------------ logs and systemd


class _Logger(gunicorn.glogging.Logger):  # type: ignore[misc]  # gunicorn ships no types
    """gunicorn's lines go where ours go."""

    def setup(self, cfg: Any) -> None:
        self.error_log.handlers = []
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
        self.access_log.handlers = []


class _Text(logging.Formatter):
    """One line for what was said, whatever of it stands in etcd; a traceback follows, each of its lines indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)  # escapes all that is not plain ASCII, also what is no character at all


def log_to_stderr(config: Config) -> None:
    """As the configuration says: text or JSON, from which level on."""
    handler = logging.StreamHandler()
    if config.log.format == "json":
        handler.setFormatter(_Json())
    else:
        handler.setFormatter(_Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=config.log.level.upper(), handlers=[handler], force=True)


_notify_socket = ""


def _take_notify_socket() -> None:
    global _notify_socket
    _notify_socket = os.environ.pop("NOTIFY_SOCKET", "")


def notify(message: str) -> None:
    """Tell systemd (sd_notify(3)); nothing happens where it did not start us."""
    if not _notify_socket:
        return
    address = "\0" + _notify_socket[1:] if _notify_socket.startswith("@") else _notify_socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.sendto(message.encode(), address)
    except OSError as error:
        log.warning("systemd could not be told %r: %s", message, error)
