"""A real Prometheus with the repository's rules, which reads daemons every second."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
MONITORING = Path(__file__).parent.parent / "docs/monitoring"
RULES = MONITORING / "rules.yaml"
DASHBOARD = MONITORING / "dashboard.json"
JOB = "ipam-plugin"


def rules() -> dict[str, dict[str, Any]]:
    """The repository's alert rules by their names."""
    found = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    by_name = {rule["alert"]: rule for rule in found}
    assert len(by_name) == len(found)
    return by_name


def unfilled(labels: Mapping[str, str]) -> set[str]:
    """The labels of which an alert's text speaks, and which the alert, with these, does not have."""
    text = json.dumps(rules()[labels["alertname"]]["annotations"])
    return set(re.findall(r"\$labels\.(\w+)", text)) - labels.keys()


def panels() -> dict[str, list[str]]:
    """What the dashboard asks for, by the panels' titles."""
    shown = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    by_title = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in shown}
    assert len(by_title) == len(shown)
    return by_title


def as_grafana_asks(expression: str) -> str:
    """With what Grafana puts in for its variables, all hosts chosen."""
    return expression.replace("$instance", ".+").replace("$__rate_interval", "1m")


class Prometheus:
    """Its files in `directory`; whoever makes it runs `command`. `fetch(path)` gives the body of a GET from it.

    All is as in the rules but `for`, which is a second, since nobody waits for a test that long.
    """

    def __init__(self, directory: Path, port: int, fetch: Callable[[str], str]) -> None:
        assert PROMETHEUS is not None
        self._fetch = fetch
        self._targets = directory / "targets.json"
        directory.mkdir(parents=True)
        self.read({})
        (directory / "rules.yaml").write_text(re.sub(r"(?m)^(\s+for:) \w+$", r"\1 1s", RULES.read_text()))
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(directory / "rules.yaml")],
            "scrape_configs": [
                {"job_name": JOB, "file_sd_configs": [{"files": [str(self._targets)], "refresh_interval": "1s"}]}
            ],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.command = [
            PROMETHEUS,
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]

    def read(self, targets: Mapping[str, str]) -> None:
        """From now on these: the label `instance` -> ADDRESS:PORT."""
        told = [{"targets": [where], "labels": {"instance": name}} for name, where in targets.items()]
        fresh = self._targets.with_suffix(".new")
        fresh.write_text(json.dumps(told))
        fresh.replace(self._targets)

    @property
    def ready(self) -> bool:
        try:
            return "Ready" in self._fetch("/-/ready")
        except OSError:
            return False

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Each series of the answer: its labels, and its value now."""
        result = self._api(f"query?query={quote(expression)}")["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def firing(self) -> list[dict[str, str]]:
        """The labels of each alert that fires."""
        return [each["labels"] for each in self._api("alerts")["alerts"] if each["state"] == "firing"]

    def ever(self) -> set[tuple[str, str]]:
        """Each alert that was ever so much as pending, with the instance ('' for one of all together)."""
        return {
            (labels["alertname"], labels.get("instance", "")) for labels, _ in self.query("count_over_time(ALERTS[1h])")
        }

    def scraped(self) -> dict[str, int]:
        """How often each instance was read."""
        return {labels["instance"]: int(value) for labels, value in self.query(f'sum_over_time(up{{job="{JOB}"}}[1h])')}

    def sound(self) -> set[str]:
        """The alerts whose rules were evaluated without an error."""
        groups = self._api("rules")["groups"]
        return {rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "ok"}

    def _api(self, path: str) -> Any:
        answer = json.loads(self._fetch(f"/api/v1/{path}"))
        assert answer["status"] == "success", answer
        return answer["data"]
