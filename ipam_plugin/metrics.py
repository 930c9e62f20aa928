"""What a daemon counts, for Prometheus. The only importer of prometheus_client."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ipam_plugin import __version__

log = logging.getLogger(__name__)

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30)


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
            ["method"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "ipam_plugin_waiting_requests", "Requests that are being carried out", registry=self.registry
        )
        Gauge("ipam_plugin_build_info", "Which version runs", ["version"], registry=self.registry).labels(
            __version__
        ).set(1)

    def request(self, method: str, status: int, seconds: float) -> None:
        outcome = "ok" if status == 200 else "unavailable" if status == 503 else "error" if status == 500 else "refused"
        self.requests.labels(method, outcome).inc()
        self.seconds.labels(method).observe(seconds)

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
        conflicts: Callable[[], int],
        unproven: Callable[[], int],
        wires: Callable[[], Mapping[str, tuple[bool, int, int]]],
        outage: Outage,
        docker_looks: Callable[[], Mapping[str, int]],
        reconciled: Callable[[], Mapping[str, int]],
    ) -> None:
        """Where to look when somebody asks: what the daemon knows anyway is not counted twice."""

        class Asked(Collector):
            def collect(self) -> Iterable[Metric]:
                yield GaugeMetricFamily("ipam_plugin_serving", "1 when requests are served", value=float(serving()))
                held = GaugeMetricFamily("ipam_plugin_leases", "Addresses not free", labels=["segment", "kind"])
                for segment, kinds in leases().items():
                    for kind, count in kinds.items():
                        held.add_metric([segment, kind], count)
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
                ready = GaugeMetricFamily(
                    "ipam_plugin_standby", "Addresses that are claimed, looked at and ready", labels=["pool"]
                )
                for pool, count in standby().items():
                    ready.add_metric([pool], count)
                yield ready
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
                yield _counted("ipam_plugin_docker_looks", "Looks at dockerd's own list", "result", docker_looks())
                yield _counted(
                    "ipam_plugin_reconciled", "Differences between it and the register", "what", reconciled()
                )

        self.registry.register(Asked())

    def listen(self, address: str) -> Callable[[], None]:
        """Serve them at HOST:PORT ('' for nowhere) and return what stops that. A port in use is no reason to stop."""
        if not address:
            return lambda: None
        host, _, port = address.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), registry=self.registry)
        except OSError as error:
            log.warning("metrics are not served: metrics.listen %s: %s", address, error.strerror)
            return lambda: None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(2)

        return stop


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
