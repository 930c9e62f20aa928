"""What doctor says of real members of etcd: full, nearly full, never compacted, without rights; and the cures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from etcd_server import EtcdCluster
from ipam_plugin import doctor, examine
from ipam_plugin.config import Config, parse
from ipam_plugin.daemon import etcd_of
from ipam_plugin.errors import EtcdRefused
from ipam_plugin.etcd import Etcd, Put
from ipam_plugin.model import Keys
from ipam_plugin.operations import Operations

pytestmark = pytest.mark.etcd

QUOTA = 4 << 20
ABOUT_ETCD = {
    "etcd_no_quorum",
    "etcd_nearly_full",
    "etcd_full",
    "etcd_not_compacted",
    "etcd_rights",
    "schema_unknown",
    "etcd_away",
    "clock_off",
}


class Clinic:
    """doctor's view of one cluster. What it says of the rest of this machine does not matter here."""

    def __init__(self, cluster: EtcdCluster, directory: Path, **etcd: Any) -> None:
        self.cluster = cluster
        settings = {"endpoints": list(cluster.endpoints), **etcd}
        away = {"state_dir": str(directory), "socket": str(directory / "socket"), "docker": {"socket": "/nowhere"}}
        self.config: Config = parse(json.dumps({"etcd": settings, "host": "h", **away}), "here")
        self.etcd = etcd_of(self.config)

    def lines(self) -> dict[str, doctor.Line]:
        ops = Operations(self.etcd, Keys(self.config.prefix), "test")

        def connect(endpoint: str) -> Etcd:
            only = msgspec.structs.replace(self.config.etcd, endpoints=(endpoint,))
            return etcd_of(msgspec.structs.replace(self.config, etcd=only))

        told = doctor.examine(examine.gather(self.config, ops, connect, ask_lan=False))
        return {each.kind: each for each in told}

    def found(self) -> dict[str, doctor.Line]:
        return {kind: each for kind, each in self.lines().items() if each.state == doctor.FOUND and kind in ABOUT_ETCD}

    def typed(self, cure: str) -> None:
        """The commands of a cure, as they stand there."""
        for command in cure.split("; "):
            if command.startswith("etcdctl "):
                subprocess.run(
                    command.split(), check=True, capture_output=True, timeout=30, env=os.environ | {"ETCDCTL_API": "3"}
                )


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Clinic]:
    with EtcdCluster(1, arguments=[f"--quota-backend-bytes={QUOTA}"]) as cluster:
        clinic = Clinic(cluster, tmp_path)
        yield clinic
        clinic.etcd.close()


def _fill(etcd: Etcd, upto: int) -> None:
    """Overwrites one key, so that nothing but old changes takes the space."""
    while etcd.status(deadline=time.monotonic() + 5).db_size < upto:
        etcd.commit({}, [Put("/other", os.urandom(100_000))], deadline=time.monotonic() + 5)


def test_etcd_is_nearly_full_and_then_full(small: Clinic) -> None:
    """Before and after it refuses every write, and the cure is what it says."""
    assert small.found() == {}
    assert small.lines()["etcd_space"].what.endswith(f"of {QUOTA >> 20} MiB")
    _fill(small.etcd, int(0.9 * QUOTA))
    nearly = small.found()
    assert set(nearly) == {"etcd_nearly_full"}
    small.typed(nearly["etcd_nearly_full"].cure)
    assert small.found() == {}
    with pytest.raises(EtcdRefused, match="space"):
        _fill(small.etcd, sys.maxsize)
    full = small.found()
    assert "etcd_full" in full
    assert "NOSPACE" in full["etcd_full"].what
    small.typed(full["etcd_full"].cure)
    assert small.found() == {}


def test_etcd_without_compaction(small: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """The changes that count as many are fewer here, so that they are soon made."""
    monkeypatch.setattr(doctor, "KEPT", 50)
    for number in range(49):
        small.etcd.commit({}, [Put("/other", str(number).encode())], deadline=time.monotonic() + 5)
    assert small.found() == {}
    for number in range(3):
        small.etcd.commit({}, [Put("/other", str(number).encode())], deadline=time.monotonic() + 5)
    found = small.found()
    assert set(found) == {"etcd_not_compacted"}
    assert "ETCD_AUTO_COMPACTION_RETENTION=1" in found["etcd_not_compacted"].cure
    small.typed(found["etcd_not_compacted"].cure.rpartition("goes with: ")[2])
    assert small.found() == {}


def test_rights(tmp_path: Path) -> None:
    """A role that lacks a part of the register is found before a container needs it; one for the prefix is enough."""
    password = tmp_path / "password"
    password.write_text("secret\n")
    prefix = "/ipam-plugin/v1/"
    with EtcdCluster(1) as cluster:
        cluster.enable_auth("ipam", "secret", prefix + "leases/")
        clinic = Clinic(cluster, tmp_path, username="ipam", password_file=str(password))
        try:
            found = clinic.found()
            assert set(found) == {"etcd_rights"}
            assert "permission denied" in found["etcd_rights"].what
            assert " leases," not in found["etcd_rights"].what
            assert "alive, gone, history, hosts, pools" in found["etcd_rights"].what
            command = found["etcd_rights"].cure.partition(", with")[0]
            cluster.etcdctl(*command.replace("ROLE", "ipam").split()[1:])
            assert clinic.found() == {}
            assert clinic.lines()["etcd_rights"].state == doctor.OK
            assert [each for each in cluster.etcdctl("get", "--prefix", "", "--keys-only").split() if each] == []
            password.write_text("wrong\n")
            clinic.etcd.close()
            wrong = Clinic(cluster, tmp_path, username="ipam", password_file=str(password))
            assert "authentication failed" in wrong.lines()["etcd_away"].what
        finally:
            clinic.etcd.close()


def test_a_newer_register(tmp_path: Path) -> None:
    """It is that, and no lack of rights, though nothing can be written; the command that types the cure is upgraded."""
    with EtcdCluster(1) as cluster:
        clinic = Clinic(cluster, tmp_path)
        try:
            assert clinic.lines()["schema"].state == doctor.OK
            cluster.etcdctl("put", "/ipam-plugin/v1/schema", '{"version":2,"written_by":"9.0.0"}')
            found = clinic.found()
            assert set(found) == {"schema_unknown"}
            assert "version 2, written by ipam-plugin 9.0.0" in found["schema_unknown"].what
            cluster.etcdctl("put", "/ipam-plugin/v1/schema", '{"version":1}')
            assert clinic.found() == {}
        finally:
            clinic.etcd.close()


def test_etcd_without_a_quorum(etcd3: EtcdCluster, tmp_path: Path) -> None:
    """The one that is left answers for itself, and that is no reason to think that all is well."""
    clinic = Clinic(etcd3, tmp_path)
    try:
        for member in etcd3.members[1:]:
            member.kill()
        found = clinic.found()
        assert set(found) == {"etcd_away", "etcd_no_quorum"}
        assert etcd3.endpoints[0] in found["etcd_no_quorum"].cure
        for member in etcd3.members[1:]:
            member.start()
        etcd3.wait_ready()
        assert clinic.found() == {}
    finally:
        clinic.etcd.close()


def test_with_tls_the_clock_and_the_quota_are_told_too(tmp_path: Path) -> None:
    with EtcdCluster(1, tls="mutual") as cluster:
        settings = cluster.settings()
        files = {"ca_cert": settings.ca_cert, "cert": settings.cert, "key": settings.key}
        lines = Clinic(cluster, tmp_path, **files).lines()
    assert {lines[kind].state for kind in ("etcd", "clock", "etcd_space", "etcd_rights")} == {doctor.OK}


def test_the_command_as_a_user_without_rights(tmp_path: Path) -> None:
    """etcd is away, and the command says all it could not look at, within a few seconds."""
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "etcd": {"endpoints": ["http://127.0.0.1:1"], "timeout": 0.5},
                "state_dir": str(tmp_path),
                "socket": str(tmp_path / "socket"),
                "docker": {"socket": str(tmp_path / "docker")},
            }
        )
    )
    command = [sys.executable, "-m", "ipam_plugin", "doctor", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "FOUND        etcd_away: etcd at http://127.0.0.1:1 does not answer" in done.stdout
    assert "FOUND        docker_away: " in done.stdout
    assert "not checked  wire: the LAN: " in done.stdout
    assert "Traceback" not in done.stderr
