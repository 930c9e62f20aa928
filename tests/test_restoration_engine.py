"""etcd is restored from a backup under the running containers of three hosts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from conftest import missing
from test_engine import CREATE, assert_register_agrees, of_kind, start
from tests import lab as labs
from tests.lab import ROUTER4, SUBNET4, Host, Lab, LabError, until

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.etcd]

RANGE = "192.168.77.128/27"  # 32 addresses
GRACE = 30.0  # the least that can be configured
WAITED = 60.0  # in which nobody gives an address


class Doubles(threading.Thread):
    """Looks all the time, past dockerd, whether two containers have one address."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(daemon=True)
        self.found: set[str] = set()
        self.looks = 0
        self._hosts = lab.hosts
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            with contextlib.suppress(LabError):
                seen = {(each.address, each.run) for host in self._hosts for each in host.sighted() if each.started}
                count = Counter(address for address, _ in seen)
                self.found |= {address for address, times in count.items() if times > 1}
                self.looks += 1

    def __enter__(self) -> Doubles:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(10)


@pytest.fixture
def lan() -> Iterator[Lab]:
    """Nothing but the register protects an address here: the wire is not asked."""
    why = labs.missing()
    if why is not None:
        missing("engine", f"no lab can be made here: {why}")
    config = {"probe": "off", "cooldown": "0s", "docker": {"grace": f"{GRACE:.0f}s"}}
    with Lab(hosts=3, machines=0, etcd=1, daemon=True, config=config) as lab:
        for host in lab.hosts:
            aux = ("--aux-address", f"DefaultGatewayIPv4={ROUTER4}")
            host.docker(*CREATE, "--subnet", SUBNET4, "--ip-range", RANGE, *aux, "lan")
        yield lab


def test_etcd_restored_from_an_older_snapshot(lan: Lab) -> None:
    """No running container's address is given to another one, and afterwards each has its lease again: those that
    were given after the backup, one whose host had another container with the address then, and one whose address was
    another host's then."""
    a, b, c = lan.hosts
    moved, stays = start(a, "moves"), start(a, "stays")
    start(b, "old")
    start(c, "old")
    backup = lan.etcd[0].save("an-hour-ago")
    for host, name in ((a, "moves"), (a, "stays")):
        host.docker("rm", "-f", name)
    assert start(b, "moved", "--ip", moved) == moved
    assert start(a, "again", "--ip", stays) == stays
    for host in lan.hosts:
        for number in range(3):
            start(host, f"new{number}")
    running = {each.address for each in lan.live()}
    with Doubles(lan) as doubles:
        lan.etcd[0].restore(backup)
        began, refusals, given = time.monotonic(), [], []

        def user(host: Host) -> None:
            """Tries again until four containers run."""
            for number in range(4):
                name = f"late{number}"
                while True:
                    try:
                        given.append(start(host, name))
                        break
                    except LabError as error:
                        refusals.append(str(error))
                        with contextlib.suppress(LabError):
                            host.docker("rm", "-f", name)

        users = [threading.Thread(target=user, args=(host,), daemon=True) for host in lan.hosts]
        for each in users:
            each.start()
        for each in users:
            each.join(2 * WAITED + 60)
            assert not each.is_alive(), refusals[-3:]
        print(f"{len(given)} containers within {time.monotonic() - began:.0f} s, {len(refusals)} refusals before")
        # What its host had leased to a container that is gone has to be freed first.
        until(lambda: of_kind(lan, "endpoint").get(moved, {}).get("host") == b.name, 2 * GRACE + 60, "b has its lease")
        until(lambda: agrees(lan), 60, "every running container has exactly one lease")
        assert_register_agrees(lan)
    assert doubles.looks > 20
    assert doubles.found == set()
    assert len(given) == 12
    assert not running & set(given)
    assert {each.address for each in lan.live()} == running | set(given)
    told = [refusal for refusal in refusals if "etcd was restored from a backup" not in refusal]
    assert told == []
    for host in lan.hosts:
        assert "etcd_went_back" in host.log()


def agrees(lan: Lab) -> bool:
    try:
        assert_register_agrees(lan)
    except AssertionError:
        return False
    return True
