"""What operators watch: every metric of the dashboard and the rules exists, healthy daemons raise no alert, and each
rule fires when the fault that it is for is planted.

Real daemons on real etcds, read by a real Prometheus. What needs a wire or a Docker Engine is in
test_monitoring_engine.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest

from conftest import missing
from daemons import DaemonProcess, Reply
from etcd_server import EtcdCluster, free_ports, start_process, stop_process, until
from ipam_plugin.cli import cli
from ipam_plugin.errors import IpamError
from ipam_plugin.etcd import Delete, Etcd, Put
from ipam_plugin.metrics import METHODS, OUTCOMES, Metrics
from prometheus_server import (
    DASHBOARD,
    PROMETHEUS,
    PROMTOOL,
    RULES,
    Prometheus,
    panels,
    rules,
    unfilled,
)
from promql import TARGET, served, spoken_of, unknown

# --- without any daemon


def one_of_each() -> str:
    """What a daemon serves that has seen everything once."""
    metrics = Metrics()
    outage = SimpleNamespace(lasts=False, waiting=0, given=0, released=0)
    some = {"x": 1}
    metrics.ask(
        serving=lambda: True,
        leases=lambda: {"default": some},
        transactions=lambda: some,
        lost_races=lambda: 0,
        alarms=lambda: some,
        probes=lambda: some,
        standby=lambda: some,
        standby_goal=lambda: some,
        pools=lambda: {"x": {"endpoint": 1, "free": 1}},
        hosts=lambda: some,
        conflicts=lambda: 0,
        unproven=lambda: 0,
        wires=lambda: {"br0": (True, 1, 0)},
        outage=outage,
        watch_connected=lambda: True,
        etcd_refused=lambda: some,
        docker_looks=lambda: some,
        reconciled=lambda: some,
    )
    return generate_latest(metrics.registry).decode()


METRICS = served(one_of_each())


@pytest.mark.parametrize("alert", rules())
def test_a_rule_speaks_of_metrics_that_exist(alert: str) -> None:
    """An alert on a metric or a label that does not exist never fires, and nobody would notice."""
    assert unknown(rules()[alert]["expr"], METRICS) == []


@pytest.mark.parametrize("panel", panels())
def test_a_panel_speaks_of_metrics_that_exist(panel: str) -> None:
    """As for rules: an empty graph looks like a quiet night."""
    for expression in panels()[panel]:
        assert unknown(expression, METRICS) == []


def test_the_dashboard_chooses_hosts_that_exist() -> None:
    """Its variable is filled from a metric, too, and each panel's data source is the one that is chosen."""
    told = json.loads(DASHBOARD.read_text())
    [source, instance] = told["templating"]["list"]
    assert source["type"] == "datasource"
    match = re.fullmatch(r"label_values\((\w+), (\w+)\)", instance["query"]["query"])
    assert match
    assert match[1] in METRICS
    assert match[2] in TARGET | METRICS[match[1]]
    for panel in told["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == f"${{{source['name']}}}"
            assert "$instance" in target["expr"]


BROKEN = {
    "sum(rate(ipam_plugin_request_total[5m]))": "there is no metric ipam_plugin_request_total",
    'ipam_plugin_leases{sort="endpoint"} > 1': "ipam_plugin_leases has no label sort",
    "sum by (host) (ipam_plugin_leases)": "nothing in 'sum by (host) (ipam_plugin_leases)' has the label host",
    "up == 0 unless on (pool) ipam_plugin_serving == 0": "has the label pool",
    "sum by (le) (ipam_plugin_request_seconds)": "there is no metric ipam_plugin_request_seconds",
    "vector(1)": "speaks of no metric",
    "increase(ipam_plugin_lost_races[5m]) > 0": "there is no metric ipam_plugin_lost_races",
}


@pytest.mark.parametrize("expression", BROKEN)
def test_what_does_not_exist_is_found(expression: str) -> None:
    """The checker is worth something only if it sees a typing error."""
    assert any(BROKEN[expression] in each for each in unknown(expression, METRICS)), unknown(expression, METRICS)


def test_what_an_expression_speaks_of() -> None:
    """Functions, aggregations, times, texts and numbers are no metrics."""
    spoken = spoken_of(
        'sum by (a, b) (rate(x_total{c="y_total{d}", e!~"f|g"}[5m] offset 1h))'
        " / on (a) group_left (h) avg(k) without (l) unless 1e3 * m offset 5m > bool -inf # n"
    )
    assert spoken.selectors == [("x_total", frozenset("ce")), ("k", frozenset()), ("m", frozenset())]
    assert spoken.grouped == frozenset("abhl")


def test_the_rules_are_as_prometheus_wants_them() -> None:
    """Its own checker finds nothing wrong, neither in the expressions nor in what the alerts say."""
    if PROMTOOL is None:
        missing("prometheus", "there is no promtool")
    said = subprocess.run(
        [PROMTOOL, "check", "rules", "--lint=all", str(RULES)], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert f"{len(rules())} rules found" in said.stdout


@pytest.mark.parametrize("alert", rules())
def test_an_alert_says_what_to_type(alert: str) -> None:
    """Whoever is woken by it reads what it means; each command that it names exists."""
    rule = rules()[alert]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    text = rule["annotations"]["summary"] + rule["annotations"]["description"]
    typed = set(re.findall(r"ipam-plugin ([a-z][a-z-]+)", text.replace("ipam-plugin on that host", "")))
    assert typed <= set(cli.commands)


# --- /healthz and /readyz


Make = Callable[..., DaemonProcess]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitoring")


def page(daemon: DaemonProcess, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", daemon.metrics_port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.mark.etcd
def test_healthz_and_readyz(tmp_path: Path) -> None:
    """A daemon that lives says so whatever etcd does; it is ready when it serves, and until then it says why not. What
    is served from the journal while etcd is away is served."""
    with EtcdCluster() as cluster:
        [member] = cluster.members
        member.kill()
        with DaemonProcess(
            tmp_path / "a",
            cluster.endpoints,
            host="a",
            prefix="/x/",
            metrics=True,
            deadline="3s",
            etcd={"timeout": "1s"},
        ) as daemon:
            daemon.wait_answering()
            assert page(daemon, "/healthz") == (200, "alive\n")
            status, reason = until(lambda: (said := page(daemon, "/readyz")) and "not there" in said[1] and said, "why")
            assert status == 503
            assert "etcd is not there: etcd did not answer" in reason
            assert reason.strip() in daemon.call("IpamDriver.RequestPool", {"Pool": "10.1.0.0/24"}).error
            assert page(daemon, "/readyz", "HEAD") == (503, "")
            member.start()
            until(lambda: page(daemon, "/readyz") == (200, "serving\n"), "it is ready")
            pool = daemon.pool("10.1.0.0/24")
            address = daemon.request_address(pool).body["Address"].partition("/")[0]
            member.kill()
            assert daemon.release_address(pool, address).ok
            assert page(daemon, "/readyz") == (200, "serving\n")
            assert page(daemon, "/healthz") == (200, "alive\n")
            shutil.rmtree(member.data)
            member.start()
            why = until(
                lambda: (said := page(daemon, "/readyz")) and said[0] == 503 and said[1], "it gives nothing", 30
            )
            assert "etcd was restored from a backup" in why
            assert page(daemon, "/")[0] == 404


# --- real alerts


class Scene:
    """Daemons that are all well, a Prometheus that reads them, and what it takes to make them ill."""

    def __init__(self, directory: Path, shared: EtcdCluster, slow: EtcdCluster, small: EtcdCluster) -> None:
        self.directory = directory
        self.prefix = f"/monitoring-{os.getpid()}/"
        self.shared, self.slow_etcd, self.small_etcd = shared, slow, small
        self.daemons: dict[str, DaemonProcess] = {}
        [port] = free_ports(1)

        def fetch(path: str) -> str:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", path)
                return connection.getresponse().read().decode()

        self.prometheus = Prometheus(directory / "prometheus", port, fetch)
        self._process = start_process(self.prometheus.command, directory / "prometheus.log")

    def make(self, name: str, cluster: EtcdCluster | None = None, **config: object) -> DaemonProcess:
        """A daemon that is not started; it counts on no Docker unless told."""
        told = {"docker": {"reconcile": False}, "metrics": True, **config}
        endpoints = config.pop("endpoints", (cluster or self.shared).endpoints)
        told.pop("endpoints", None)
        self.daemons[name] = DaemonProcess(
            self.directory / name,
            endpoints,
            host=name,
            prefix=self.prefix,
            **told,  # type: ignore[arg-type]
        )
        return self.daemons[name]

    def read(self) -> None:
        """Have Prometheus read all of them."""
        self.prometheus.read({name: f"127.0.0.1:{each.metrics_port}" for name, each in self.daemons.items()})

    def close(self) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
        stop_process(self._process)


@pytest.fixture(scope="module")
def scene(directory: Path, shared_etcd: EtcdCluster) -> Iterator[Scene]:
    if PROMETHEUS is None:
        missing("prometheus", "there is no prometheus binary")
    with EtcdCluster() as slow, EtcdCluster(arguments=["--quota-backend-bytes", str(4 << 20)]) as small:
        scene = Scene(directory, shared_etcd, slow, small)
        try:
            scene.make("calm")
            scene.make("busy")
            scene.make("gone")
            scene.make("slow", slow, deadline="8s", etcd={"timeout": "1s"})
            scene.make("small", small, deadline="4s")
            for daemon in scene.daemons.values():
                daemon.start()
            for daemon in scene.daemons.values():
                daemon.wait_answering()
                until(lambda daemon=daemon: page(daemon, "/readyz")[0] == 200, f"{daemon.host} is ready")
            until(lambda: scene.prometheus.ready, "Prometheus is ready", 30)
            scene.read()
            yield scene
        finally:
            scene.close()


@pytest.mark.etcd
def test_nothing_fires_on_healthy_daemons(scene: Scene) -> None:
    """A rule that cries without a reason is switched off. Each was evaluated, and was not even pending."""
    for number, daemon in enumerate(scene.daemons.values()):
        pool = daemon.pool(f"10.7.{number}.0/24")
        addresses = [daemon.request_address(pool).body["Address"].partition("/")[0] for _ in range(4)]
        assert daemon.release_address(pool, addresses[0]).ok
    # The refusal of what a user asked for is not an operator's affair.
    assert daemon.request_address(pool, address=addresses[1]).status == 409
    until(lambda: min(scene.prometheus.scraped().values(), default=0) >= 6, "each was read six times", 60)
    assert scene.prometheus.scraped().keys() == scene.daemons.keys()
    assert scene.prometheus.sound() == set(rules())
    assert scene.prometheus.ever() == set()
    outcomes = scene.prometheus.query('ipam_plugin_requests_total{instance="calm"}')
    assert {(each["method"], each["outcome"]) for each, _ in outcomes} == {(m, o) for m in METHODS for o in OUTCOMES}
    [(_, used)] = scene.prometheus.query('sum(ipam_plugin_pool_addresses{instance="calm"})')
    [(_, free)] = scene.prometheus.query('sum(ipam_plugin_pool_free{instance="calm"})')
    assert (used, free) == (3, 251)


# Each plants a fault and says by which labels its alert is known.


def down(scene: Scene) -> dict[str, str]:
    scene.daemons["gone"].kill()
    return {"instance": "gone"}


def absent(scene: Scene) -> dict[str, str]:
    """As its heartbeat's end, 30 s after its death."""
    assert not scene.daemons["gone"].processes()
    with contextlib.closing(Etcd(scene.shared.settings())) as client:
        client.commit({}, [Delete(f"{scene.prefix}alive/gone")], deadline=time.monotonic() + 10)
    return {}


def not_serving(scene: Scene) -> dict[str, str]:
    [nobody] = free_ports(1)
    daemon = scene.make("stranded", endpoints=[f"http://127.0.0.1:{nobody}"])
    daemon.start()
    daemon.wait_answering()
    scene.read()
    return {"instance": "stranded"}


def restarts(scene: Scene) -> dict[str, str]:
    daemon = scene.daemons["busy"]
    seen = 'changes(process_start_time_seconds{instance="busy"}[30m])'
    for number in range(3):
        for worker in set(daemon.processes()) - {daemon.pid}:
            os.kill(worker, signal.SIGKILL)
        until(lambda number=number: scene.prometheus.query(seen)[0][1] == number + 1, "its restart was seen", 30)
    return {"instance": "busy"}


# The program with a bug in it, as an older version.
BUGGY = (
    sys.executable,
    "-c",
    "import ipam_plugin; ipam_plugin.__version__ = '0.0.1'\n"
    "from ipam_plugin.register import Register\n"
    "Register.request_pool = lambda *_: {}['no such key']\n"
    "from ipam_plugin.cli import main; main()",
)


def bug(scene: Scene) -> dict[str, str]:
    daemon = scene.make("buggy")
    daemon.start(BUGGY)
    daemon.wait_answering()
    scene.read()
    # An increase has a before.
    until(lambda: scene.prometheus.scraped().get("buggy", 0) > 1, "it was read")
    assert daemon.request_pool("10.9.0.0/24").status == 500
    return {"instance": "buggy", "method": "RequestPool"}


def versions(scene: Scene) -> dict[str, str]:
    assert "buggy" in scene.daemons
    return {}


def full(scene: Scene) -> dict[str, str]:
    pool = scene.daemons["calm"].pool("10.8.0.0/29")
    replies = [scene.daemons["calm"].request_address(pool) for _ in range(7)]
    assert [reply.ok for reply in replies] == [True] * 6 + [False]
    return {"pool": pool}


def almost_full(scene: Scene) -> dict[str, str]:
    pool = scene.daemons["calm"].pool("10.8.1.0/28")
    assert all(scene.daemons["calm"].request_address(pool).ok for _ in range(13))
    return {"pool": pool}


def unheard(scene: Scene) -> dict[str, str]:
    """No interface carries the pools, and no dockerd is there."""
    daemon = scene.make(
        "deaf",
        probe="fast",
        segments={"strict": {"probe_failure": "refuse"}},
        docker={"socket": str(scene.directory / "no-dockerd")},
    )
    daemon.start()
    daemon.wait_answering()
    scene.read()
    until(lambda: scene.prometheus.scraped().get("deaf", 0) > 1, "it was read")
    assert daemon.request_address(daemon.pool("10.8.2.0/24")).ok
    return {"instance": "deaf"}


def no_standby(scene: Scene) -> dict[str, str]:
    pool = scene.daemons["deaf"].pool("10.8.3.0/24", segment="strict")
    assert scene.daemons["deaf"].request_address(pool).status == 503
    return {"instance": "deaf", "pool": pool}


def unreadable(scene: Scene) -> dict[str, str]:
    with contextlib.closing(Etcd(scene.shared.settings())) as client:
        client.commit({}, [Put(f"{scene.prefix}hosts/busy", b"junk")], deadline=time.monotonic() + 10)
    return {"instance": "busy", "kind": "record_unreadable"}


def no_docker(scene: Scene) -> dict[str, str]:
    return {"instance": "deaf"}


def no_room(scene: Scene) -> dict[str, str]:
    """etcd takes nothing any more; a release reaches the journal while etcd is away."""
    daemon, [member] = scene.daemons["small"], scene.small_etcd.members
    pool = daemon.pool("10.8.4.0/24")
    address = daemon.request_address(pool).body["Address"].partition("/")[0]
    client = Etcd(scene.small_etcd.settings())
    with contextlib.closing(client), contextlib.suppress(IpamError):
        for number in range(100):
            client.commit({}, [Put(f"/fill/{number}", bytes(1 << 18))], deadline=time.monotonic() + 10)
        raise AssertionError("etcd takes all of it")
    assert daemon.request_address(pool).status == 503
    member.pause()
    try:
        assert daemon.release_address(pool, address).ok
    finally:
        member.resume()
    return {"instance": "small"}


def waits(scene: Scene) -> dict[str, str]:
    return {"instance": "small"}


def slow(scene: Scene) -> dict[str, str]:
    daemon, [member] = scene.daemons["slow"], scene.slow_etcd.members
    pool = daemon.pool("10.8.5.0/24")
    with ThreadPoolExecutor(4) as threads:
        member.pause()
        asked = [threads.submit(daemon.request_address, pool) for _ in range(4)]
        time.sleep(3.2)  # the fault itself: shorter than what makes the daemon go on without etcd
        member.resume()
        replies: list[Reply] = [each.result() for each in asked]
    assert all(reply.ok for reply in replies)
    assert min(reply.seconds for reply in replies) > 2.5
    return {"instance": "slow"}


def slow_etcd(scene: Scene) -> dict[str, str]:
    return {"instance": "slow"}


def away(scene: Scene) -> dict[str, str]:
    # What was slow has been read before etcd goes.
    scrapes = scene.prometheus.scraped()["slow"]
    until(lambda: scene.prometheus.scraped()["slow"] > scrapes + 1, "it was read")
    [member] = scene.slow_etcd.members
    member.kill()
    reply = scene.daemons["slow"].request_address("default/10.8.5.0/24")
    assert reply.status == 503
    return {"instance": "slow"}


def unavailable(scene: Scene) -> dict[str, str]:
    return {"instance": "slow", "method": "RequestAddress"}


FAULTS: dict[str, Callable[[Scene], dict[str, str]]] = {
    "IpamPluginAlarm": unreadable,
    "IpamPluginInternalError": bug,
    "IpamPluginVersionsDiffer": versions,
    "IpamPluginNotServing": not_serving,
    "IpamPluginUnproven": unheard,
    "IpamPluginDockerUnseen": no_docker,
    "IpamPluginStandbyShort": no_standby,
    "IpamPluginEtcdRefuses": no_room,
    "IpamPluginJournalWaits": waits,
    "IpamPluginRequestsSlow": slow,
    "IpamPluginEtcdSlow": slow_etcd,
    "IpamPluginEtcdAway": away,
    "IpamPluginRequestsUnavailable": unavailable,
    "IpamPluginPoolFull": full,
    "IpamPluginPoolAlmostFull": almost_full,
    "IpamPluginRestartsAgainAndAgain": restarts,
    "IpamPluginDown": down,
    "IpamPluginHostAbsent": absent,
}
ON_A_WIRE = {"IpamPluginWireUnusable", "IpamPluginConflict"}  # test_monitoring_engine.py


def test_every_rule_has_its_fault() -> None:
    """A rule of which nobody has seen that it fires is a hope."""
    assert FAULTS.keys() | ON_A_WIRE == rules().keys()


@pytest.mark.etcd
def test_every_rule_fires(scene: Scene) -> None:
    """Each fault is planted, and its alert fires for it, naming what it says. What is well stays without any."""
    began = time.monotonic()
    known = {}
    for alert, plant in FAULTS.items():
        known[alert] = plant(scene)
        print(f"{time.monotonic() - began:5.1f} s: the fault of {alert} is planted")
    fired: dict[str, dict[str, str]] = {}

    def all_fire() -> bool:
        for labels in scene.prometheus.firing():
            alert = labels["alertname"]
            if known.get(alert, {"": ""}).items() <= labels.items() and alert not in fired:
                fired[alert] = labels
        return fired.keys() == known.keys()

    try:
        until(all_fire, "every alert fires", 60)
    finally:
        print(f"{len(fired)} of {len(known)} fire after {time.monotonic() - began:.1f} s; not: {known.keys() - fired}")
    assert {alert: unfilled(labels) for alert, labels in fired.items() if unfilled(labels)} == {}
    ever = scene.prometheus.ever()
    assert {alert for alert, _ in ever} >= fired.keys()
    assert [alert for alert, instance in ever if instance == "calm"] == []
