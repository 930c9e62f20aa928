"""Fixtures that several test files share."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from etcd_server import ETCD, EtcdCluster
from ipam_plugin.etcd import Etcd, EtcdSettings

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def missing(what: str, reason: str) -> None:
    """Skip this test, or fail it where IPAM_TEST_REQUIRE (names, with commas between) lists `what`."""
    if what in os.environ.get("IPAM_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{reason}, and IPAM_TEST_REQUIRE asks for {what}", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("etcd") is not None and ETCD is None:
        missing("etcd", "there is no etcd binary")
    if item.get_closest_marker("browser") is not None and not (CHROMIUM and DRIVER):
        missing("browser", "there is no Chromium, or no driver for it")


@dataclass(frozen=True)
class RealEtcd:
    """A real etcd that all tests of the session share, and a key prefix that is this test's own."""

    client: Etcd
    prefix: str
    settings: EtcdSettings
    cluster: EtcdCluster


_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[EtcdCluster]:
    if ETCD is None:
        missing("etcd", "there is no etcd binary")
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def etcd(shared_etcd: EtcdCluster) -> Iterator[RealEtcd]:
    """One real member, shared; do not stop it. Use with @pytest.mark.etcd."""
    settings = shared_etcd.settings()
    client = Etcd(settings)
    try:
        yield RealEtcd(client, f"/test-{os.getpid()}-{next(_numbers)}/", settings, shared_etcd)
    finally:
        client.close()


@pytest.fixture
def etcd3() -> Iterator[EtcdCluster]:
    """Three real members for this test alone, to be killed, paused and restarted."""
    if ETCD is None:
        missing("etcd", "there is no etcd binary")
    with EtcdCluster(3) as cluster:
        yield cluster


@pytest.fixture
def own_etcd() -> Iterator[EtcdCluster]:
    """One member for this test alone, to be paused and killed."""
    with EtcdCluster() as cluster:
        try:
            yield cluster
        finally:
            for member in cluster.members:
                if member.running:
                    member.resume()
