"""What operators watch, on a host with a wire and a Docker Engine: see test_monitoring.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from conftest import missing
from prometheus_server import PROMETHEUS, Prometheus, as_grafana_asks, panels, rules, unfilled
from promql import served
from test_engine import failed, of_kind, start
from test_monitoring import METRICS, ON_A_WIRE
from test_wire_engine import network, stocked
from tests import lab as labs
from tests.lab import ROUTER4, ROUTER6, Lab, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

PORT = 9090  # of the host's own namespace
GET = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())"


@pytest.fixture(scope="module")
def lan() -> Iterator[Lab]:
    """A Docker host with a network and a container, a machine without Docker, a router; etcd beside the LAN."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    if PROMETHEUS is None:
        missing("prometheus", "there is no prometheus binary")
    with Lab(hosts=1, machines=1, etcd=1, etcd_on="management", daemon=True) as lab:
        [host] = lab.hosts
        host.command("segment", "default", "--router", ROUTER4, "--router", ROUTER6)
        network(host, "192.168.77.64/27")
        start(host, "web")
        start(host, "db")
        # While it is filled up it is short, and here no rule waits for as long as it says.
        stocked(lab, host)
        yield lab


@pytest.fixture(scope="module")
def prometheus(lan: Lab) -> Prometheus:
    """On the host itself, where the daemon's own default lets it read."""
    [host] = lan.hosts

    def fetch(path: str) -> str:
        try:
            return host.run(sys.executable, "-I", "-c", GET, f"http://127.0.0.1:{PORT}{path}").stdout
        except subprocess.SubprocessError as error:
            raise OSError(str(error)) from error

    prometheus = Prometheus(lan.directory / "prometheus", PORT, fetch)
    prometheus.read({host.name: "127.0.0.1:9179"})
    host.serve("prometheus", *prometheus.command)
    until(lambda: prometheus.ready, 30, "Prometheus is ready", pause=0.5)
    return prometheus


def test_the_metrics_are_those_that_are_checked(lan: Lab) -> None:
    """What the checks of rules and panels take for a daemon's metrics, with their labels, is what a daemon serves."""
    real = served(lan.hosts[0].metrics())
    # Without a sample a family shows no labels: nothing was refused, no alarm was raised.
    silent = {name for name, labels in METRICS.items() if labels and not real.get(name)}
    assert silent == {"ipam_plugin_alarms_total", "ipam_plugin_etcd_refused_total"}
    assert {name: labels for name, labels in real.items() if name not in silent} == {
        name: labels for name, labels in METRICS.items() if name not in silent
    }


def test_nothing_fires_on_a_healthy_host(lan: Lab, prometheus: Prometheus) -> None:
    """With a wire, a Docker Engine and containers that come and go no rule is so much as pending."""
    [host] = lan.hosts
    host.docker("rm", "-f", "db")
    until(lambda: prometheus.scraped().get(host.name, 0) >= 8, 40, "it was read eight times", pause=0.5)
    assert prometheus.sound() == set(rules())
    assert prometheus.ever() == set()


def test_every_panel_shows_something(lan: Lab, prometheus: Prometheus) -> None:
    """Each expression of the dashboard has an answer on a host like any other."""
    until(lambda: prometheus.scraped().get(lan.hosts[0].name, 0) >= 3, 40, "it was read three times", pause=0.5)
    empty = [
        f"{title}: {expression}"
        for title, expressions in panels().items()
        for expression in expressions
        if not prometheus.query(as_grafana_asks(expression))
    ]
    assert empty == []


def a_stranger(lab: Lab) -> None:
    """A machine takes an address of the pool, and somebody asks for that one."""
    [host], [machine] = lab.hosts, lab.machines
    machine.add_address("192.168.77.80")
    failed(host, "run", "-d", "--network", "lan", "--ip", "192.168.77.80", "busybox")
    assert "192.168.77.80" in of_kind(lab, "conflict")


def no_cable(lab: Lab) -> None:
    # The lab's cable is a veth as a container's is, and a bridge without any other counts as one that needs no cable.
    lab.hosts[0].docker("rm", "-f", "web")
    lab.hosts[0].cut_off()


FAULTS = {"IpamPluginConflict": a_stranger, "IpamPluginWireUnusable": no_cable}


def test_every_rule_of_the_wire_fires(lan: Lab, prometheus: Prometheus) -> None:
    """Each fault is planted, and its alert fires for this host."""
    assert FAULTS.keys() == ON_A_WIRE
    for plant in FAULTS.values():
        plant(lan)

    name = lan.hosts[0].name

    def fired() -> list[dict[str, str]]:
        found = [labels for labels in prometheus.firing() if labels["instance"] == name]
        return found if {labels["alertname"] for labels in found} >= ON_A_WIRE else []

    found = until(fired, 60, "both fire", pause=0.5)
    assert [labels["alertname"] for labels in found if unfilled(labels)] == []
    print(f"with the cable out, and a stranger found before: {sorted(each['alertname'] for each in found)}")
