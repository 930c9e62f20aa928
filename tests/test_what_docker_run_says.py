"""docs/what-docker-run-says.md is true: its commands are typed in the situations that its headings name.

With IPAM_WRITE_DOCS=1 the file gets what was printed; without, it must say so already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest

from conftest import missing
from test_engine import failed, leases, start
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, Lab, until
from tests.lab.node import ROOT

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

DOCUMENT = ROOT / "docs" / "what-docker-run-says.md"
BLOCK = re.compile(
    r"(?s)(?<=\n)## (?P<heading>[^\n]+)\n(?P<text>.*?)```console\n(?P<command>[^\n]+)\n(?P<said>.*?)\n```"
)
RANGES = ("192.168.77.128/30", "192.168.77.64/26")


@pytest.fixture
def lan() -> Iterator[Lab]:
    """Two Docker hosts as they are installed, each with a range of its own, and a machine without Docker."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    with Lab(hosts=2, machines=1, etcd=1, daemon=True) as lab:
        for host, addresses in zip(lab.hosts, RANGES, strict=True):
            host.docker(
                *("network", "create", "-d", "bridge", "--ipam-driver", "ipam-plugin", "--subnet", SUBNET4),
                *("--ip-range", addresses, "--aux-address", f"DefaultGatewayIPv4={ROUTER4}"),
                *("-o", "com.docker.network.bridge.name=br0", "lan"),
            )
        yield lab


def full(lab: Lab) -> None:
    for number in range(1, 5):
        start(lab.hosts[0], f"web{number}")


def taken(lab: Lab) -> None:
    address = start(lab.hosts[0], "db", "--ip", "192.168.77.200")
    until(lambda: "container" in leases(lab)[address], 20, "the lease says which container has it")


def stranger(lab: Lab) -> None:
    lab.machines[0].add_address("192.168.77.140")


def away(lab: Lab) -> None:
    host = lab.hosts[1]
    until(lambda: host.metric("ipam_plugin_standby") == 2, 30, "the standby")
    lab.etcd[0].kill()
    for number in (1, 2):
        start(host, f"web{number}")


SITUATIONS: dict[str, Callable[[Lab], None]] = {
    "The pool is full": full,
    "Another container has the address": taken,
    "A machine that nobody registered has the address": stranger,
    "etcd is away": away,
}


def comparable(document: str) -> str:
    """What does not depend on the engine's words, on the run, or on the machine's speed."""
    for pattern, instead in (
        (r"(?m)^docker: .*?(?=IpamDriver\.)", "… "),
        (r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "MAC"),
        (r"\b\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
        (r"\b\d+(\.\d+)? (s|ms)\b", "SECONDS"),
        (r"\b[0-9a-f]{12,64}\b", "ID"),
    ):
        document = re.sub(pattern, instead, document)
    return document


def test_each_line_is_what_docker_run_prints(lan: Lab) -> None:
    """P7: one line that names the pool or the address, who has it, and the counts, at the end of what docker says."""
    written = DOCUMENT.read_text()
    assert [block["heading"] for block in BLOCK.finditer(written)] == list(SITUATIONS)

    def typed(block: re.Match[str]) -> str:
        SITUATIONS[block["heading"]](lan)
        name, _, command = block["command"].partition("# docker ")
        host = next(each for each in lan.hosts if each.name == name)
        [said] = [line for line in failed(host, *command.split(), timeout=60).splitlines() if "IpamDriver." in line]
        return block[0].removesuffix(f"{block['said']}\n```") + f"{said}\n```"

    seen = BLOCK.sub(typed, written)
    if os.environ.get("IPAM_WRITE_DOCS"):
        DOCUMENT.write_text(seen)
    else:
        assert comparable(seen) == comparable(written)
