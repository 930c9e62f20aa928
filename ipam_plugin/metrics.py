"""What a daemon counts, for Prometheus, and whether it lives and serves. The only importer of prometheus_client."""

from __future__ import annotations

import collections
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ipam_plugin import __version__
from ipam_plugin.addresses import printable

log = logging.getLogger(__name__)

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30)
# There from the start, at 0: Prometheus sees no increase in a counter that begins with its first event.
METHODS = ("RequestPool", "ReleasePool", "RequestAddress", "ReleaseAddress")
OUTCOMES = ("ok", "refused", "unavailable", "error")
CALLS = ("read", "write", "ttl", "status")


class Outage(Protocol):
    """What is asked of outage.py."""

    @property
    def lasts(self) -> bool: ...
    @property
    def waiting(self) -> int: ...
    @property
    def given(self) -> int: ...
    @property
    def released(self) -> int: ...


class Metrics:
    """One set of counters; `listen` serves them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ipam_plugin_requests_total", "Requests of the Docker Engine", ["method", "outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            "ipam_plugin_request_seconds",
            "From a request's arrival to its answer",
            ["method", "outcome"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        for method in METHODS:
            for outcome in OUTCOMES:
                self.requests.labels(method, outcome)
                self.seconds.labels(method, outcome)
        self.waiting = Gauge(
            "ipam_plugin_waiting_requests", "Requests that are being carried out", registry=self.registry
        )
        self.etcd_seconds = Histogram(
            "ipam_plugin_etcd_seconds",
            "From a question to etcd to its answer, repeated tries included",
            ["call"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        for call in CALLS:
            self.etcd_seconds.labels(call)
        self.etcd_answered = Gauge(
            "ipam_plugin_etcd_answered_timestamp_seconds", "When etcd answered last", registry=self.registry
        )
        self.etcd_database = Gauge(
            "ipam_plugin_etcd_database_bytes",
            "Size of the database of the member that is asked; etcd refuses to write beyond its quota",
            registry=self.registry,
        )
        Gauge("ipam_plugin_build_info", "Which version runs", ["version"], registry=self.registry).labels(
            __version__
        ).set(1)
        ProcessCollector(registry=self.registry)

    def request(self, method: str, status: int, seconds: float) -> None:
        outcome = "ok" if status == 200 else "unavailable" if status == 503 else "error" if status == 500 else "refused"
        self.requests.labels(method, outcome).inc()
        self.seconds.labels(method, outcome).observe(seconds)

    def etcd_answer(self, call: str, seconds: float) -> None:
        """etcd answered a call of this kind (of CALLS)."""
        self.etcd_seconds.labels(call).observe(seconds)
        self.etcd_answered.set_to_current_time()

    def ask(
        self,
        *,
        serving: Callable[[], bool],
        leases: Callable[[], Mapping[str, Mapping[str, int]]],
        transactions: Callable[[], Mapping[str, int]],
        lost_races: Callable[[], int],
        alarms: Callable[[], Mapping[str, int]],
        probes: Callable[[], Mapping[str, int]],
        standby: Callable[[], Mapping[str, int]],
        standby_goal: Callable[[], Mapping[str, int]],
        pools: Callable[[], Mapping[str, Mapping[str, int]]],
        hosts: Callable[[], Mapping[str, int]],
        conflicts: Callable[[], int],
        unproven: Callable[[], int],
        wires: Callable[[], Mapping[str, tuple[bool, int, int]]],
        outage: Outage,
        watch_connected: Callable[[], bool],
        etcd_refused: Callable[[], Mapping[str, int]],
        docker_looks: Callable[[], Mapping[str, int]],
        reconciled: Callable[[], Mapping[str, int]],
    ) -> None:
        """Where to look when somebody asks: what the daemon knows anyway is not counted twice.

        `pools`: PoolID -> kind -> addresses, with those that are `free`, all together the pool's size. `standby` has a
        pool only where there is some, `standby_goal` every pool that shall have some.
        """

        class Asked(Collector):
            def collect(self) -> Iterable[Metric]:
                yield GaugeMetricFamily("ipam_plugin_serving", "1 when requests are served", value=float(serving()))
                held = GaugeMetricFamily("ipam_plugin_leases", "Addresses not free", labels=["segment", "kind"])
                # Two names that are no names may read the same, and Prometheus wants each line once.
                counted: collections.Counter[tuple[str, str]] = collections.Counter()
                for segment, kinds in leases().items():
                    for kind, count in kinds.items():
                        counted[printable(segment)[:100], kind] += count
                for labels, count in counted.items():
                    held.add_metric(labels, count)
                yield held
                sent = CounterMetricFamily(
                    "ipam_plugin_etcd_transactions", "Transactions by what they were for", labels=["purpose"]
                )
                for purpose, count in transactions().items():
                    sent.add_metric([purpose], count)
                yield sent
                yield CounterMetricFamily(
                    "ipam_plugin_lost_races", "Grants that another host was faster with", value=lost_races()
                )
                raised = CounterMetricFamily("ipam_plugin_alarms", "Alarms raised", labels=["kind"])
                for kind, count in alarms().items():
                    raised.add_metric([kind], count)
                yield raised
                looked = CounterMetricFamily("ipam_plugin_probes", "Looks at the wire", labels=["result"])
                for result, count in probes().items():
                    looked.add_metric([result], count)
                yield looked
                yield from _of_standby(standby(), standby_goal())
                yield from _of_pools(pools())
                known = GaugeMetricFamily(
                    "ipam_plugin_hosts", "Hosts in the register, with a heartbeat and without", labels=["state"]
                )
                for state, count in hosts().items():
                    known.add_metric([state], count)
                yield known
                yield CounterMetricFamily(
                    "ipam_plugin_conflicts", "Addresses found in use by a stranger", value=conflicts()
                )
                yield CounterMetricFamily(
                    "ipam_plugin_unproven_addresses",
                    "Addresses given although the wire could not be heard",
                    value=unproven(),
                )
                yield from _of_wires(wires())
                yield from _of_outage(outage)
                yield GaugeMetricFamily(
                    "ipam_plugin_etcd_watch_connected",
                    "1 while etcd tells of changes as they happen",
                    value=float(watch_connected()),
                )
                yield _counted("ipam_plugin_etcd_refused", "What etcd refused, by its code", "code", etcd_refused())
                yield _counted("ipam_plugin_docker_looks", "Looks at dockerd's own list", "result", docker_looks())
                yield _counted(
                    "ipam_plugin_reconciled", "Differences between it and the register", "what", reconciled()
                )

        self.registry.register(Asked())

    def listen(self, address: str, reason: Callable[[], str] = lambda: "") -> Callable[[], None]:
        """Serve them at HOST:PORT ('' for nowhere) and return what stops that. A port in use is no reason to stop.

        `reason`: why requests are not served, '' while they are, for /readyz.
        """
        if not address:
            return lambda: None
        host, _, port = address.rpartition(":")
        try:
            server = _server(host.strip("[]"), int(port), self._pages(reason))
        except OSError as error:
            log.warning("metrics are not served: metrics.listen %s: %s", address, error.strerror)
            return lambda: None
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(2)

        return stop

    def _pages(self, reason: Callable[[], str]) -> WSGIApplication:
        metrics: WSGIApplication = make_wsgi_app(self.registry)

        def pages(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                return metrics(environ, start_response)
            if path == "/healthz":
                status, text = "200 OK", "alive"
            elif path == "/readyz":
                why = reason()
                status, text = ("503 Service Unavailable", why) if why else ("200 OK", "serving")
            else:
                status, text = "404 Not Found", "here are /metrics, /healthz and /readyz"
            body = f"{text}\n".encode()
            start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        return pages


def _server(host: str, port: int, app: WSGIApplication) -> WSGIServer:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        address_family = family
        daemon_threads = True

        def server_bind(self) -> None:
            # Not HTTPServer's, which asks the resolver for this machine's name, and that may take long.
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = host, port
            self.setup_environ()

        def handle_error(self, request: Any, client_address: Any) -> None:
            log.debug("a client of the metrics broke off", exc_info=True)

    class Handler(WSGIRequestHandler):
        timeout = 10  # seconds for a request

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return make_server(host, port, app, Server, Handler)


def _counted(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _of_outage(outage: Outage) -> Iterable[Metric]:
    yield GaugeMetricFamily("ipam_plugin_etcd_away", "1 while etcd does not answer", value=float(outage.lasts))
    yield GaugeMetricFamily(
        "ipam_plugin_journal_entries", "What was given and released, and is not in etcd yet", value=outage.waiting
    )
    written = CounterMetricFamily(
        "ipam_plugin_journalled", "Addresses given and released while etcd was away", labels=["what"]
    )
    written.add_metric(["given"], outage.given)
    written.add_metric(["released"], outage.released)
    yield written


def _of_standby(ready: Mapping[str, int], goals: Mapping[str, int]) -> Iterable[Metric]:
    stock = GaugeMetricFamily("ipam_plugin_standby", "Addresses that are claimed, looked at and ready", labels=["pool"])
    goal = GaugeMetricFamily("ipam_plugin_standby_goal", "How many of those there should be", labels=["pool"])
    for pool in {**goals, **ready}:
        stock.add_metric([pool], ready.get(pool, 0))
    for pool, count in goals.items():
        goal.add_metric([pool], count)
    yield from (stock, goal)


def _of_pools(pools: Mapping[str, Mapping[str, int]]) -> Iterable[Metric]:
    size = GaugeMetricFamily("ipam_plugin_pool_size", "Addresses of a pool in use by this host", labels=["pool"])
    free = GaugeMetricFamily("ipam_plugin_pool_free", "Those of them that are free", labels=["pool"])
    used = GaugeMetricFamily("ipam_plugin_pool_addresses", "Those that are not, by kind", labels=["pool", "kind"])
    for pool, kinds in pools.items():
        size.add_metric([pool], sum(kinds.values()))
        free.add_metric([pool], kinds["free"])
        for kind, count in kinds.items():
            if kind != "free":
                used.add_metric([pool, kind], count)
    yield from (size, free, used)


def _of_wires(wires: Mapping[str, tuple[bool, int, int]]) -> Iterable[Metric]:
    usable = GaugeMetricFamily("ipam_plugin_wire_usable", "1 when frames come and go there", labels=["interface"])
    heard = CounterMetricFamily(
        "ipam_plugin_wire_frames", "ARP and neighbour discovery frames looked at", labels=["interface"]
    )
    lost = CounterMetricFamily(
        "ipam_plugin_wire_frames_lost", "Such frames that there was no room for", labels=["interface"]
    )
    for interface, (can, frames, missed) in wires.items():
        usable.add_metric([interface], float(can))
        heard.add_metric([interface], frames)
        lost.add_metric([interface], missed)
    yield from (usable, heard, lost)
