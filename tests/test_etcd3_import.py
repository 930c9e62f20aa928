"""etcd3 0.12.0 imports beside a current protobuf, with its C implementation, on each Python supported."""

from __future__ import annotations

import glob
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import RealEtcd, missing

ROOT = Path(__file__).parent.parent

_IMPORT = """
import sys
from ipam_plugin.etcd3_import import etcdrpc
from google.protobuf.internal import api_implementation
assert api_implementation.Type() == "upb", api_implementation.Type()
assert [f for f in sys.meta_path if type(f).__module__.startswith("ipam_plugin")] == []
import etcd3
assert etcd3.etcdrpc is etcdrpc
message = etcdrpc.TxnRequest(compare=[etcdrpc.Compare(key=b"k", target=etcdrpc.Compare.MOD, mod_revision=5)])
assert etcdrpc.TxnRequest.FromString(message.SerializeToString()) == message
assert etcdrpc.NOSPACE == 1
"""

_CREATE = """
import sys, time
from ipam_plugin.etcd import Etcd, EtcdSettings, Put
endpoint, key = sys.argv[1:]
client = Etcd(EtcdSettings((endpoint,)))
for expected in (True, False):
    done = client.commit({key: 0}, [Put(key, sys.version.encode())], deadline=time.monotonic() + 10)
    assert done.applied is expected, done
assert done.found[key].value == sys.version.encode()
client.close()
"""


def clean_environment() -> dict[str, str]:
    """Nothing that chooses a protobuf implementation or reaches into another Python."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PROTOCOL_BUFFERS", "PYTHON"))}
    return keep | {"PYTHONPATH": str(ROOT)}


def run(python: str | Path, *arguments: str, timeout: float = 60) -> None:
    done = subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, timeout=timeout, env=clean_environment(), cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("options", [[], ["-W", "error"], ["-O"]], ids=["plain", "warnings are errors", "optimised"])
def test_it_imports_with_the_c_implementation(options: list[str]) -> None:
    """No environment variable, no warning, and nothing stays in the import machinery of the process."""
    run(sys.executable, *options, "-c", _IMPORT)


def test_without_the_hook_it_does_not_import() -> None:
    """The reason for the module: where this fails, etcd3 has been mended and the module can go."""
    done = subprocess.run(
        [sys.executable, "-c", "import etcd3"], capture_output=True, text=True, timeout=60, env=clean_environment()
    )
    assert "Descriptors cannot be created directly" in done.stderr


def other_python(version: str) -> str | None:
    """An interpreter of this version that is not the running one's version."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return None
    places = [f"{folder}/python{version}" for folder in os.environ.get("PATH", "").split(os.pathsep)]
    places += sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python{version}")))
    for place in places:
        if os.access(place, os.X_OK):
            # A shim of a version that is not active is executable as well, and only fails.
            told = subprocess.run([place, "-V"], capture_output=True, text=True, timeout=30)
            if told.returncode == 0 and told.stdout.startswith(f"Python {version}."):
                return place
    return None


def pinned(*names: str) -> list[str]:
    """The requirements of these packages as pyproject.toml has them."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        requirements = tomllib.load(file)["project"]["dependencies"]
    return [each for each in requirements if re.split(r"[^\w-]", each)[0] in names]


@pytest.mark.etcd
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_it_works_on_every_python_found(version: str, etcd: RealEtcd, tmp_path: Path) -> None:
    """With the packages of pyproject.toml freshly installed: import, then two create transactions on a real etcd."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        python: str | Path = sys.executable
    else:
        found = other_python(version)
        if found is None:
            missing("pythons", f"there is no python{version}")
            raise AssertionError
        subprocess.run([found, "-m", "venv", str(tmp_path)], check=True, timeout=120, env=clean_environment())
        python = tmp_path / "bin" / "python"
        requirements = pinned("etcd3", "grpcio", "protobuf")
        assert len(requirements) == 3
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements]
        done = subprocess.run(install, capture_output=True, text=True, timeout=600, env=clean_environment())
        if done.returncode != 0:
            missing("pythons", f"pip cannot install for python{version}: {done.stderr.strip()[-300:]}")
    run(python, "-c", _IMPORT)
    run(python, "-W", "error", "-c", _IMPORT)
    run(python, "-c", _CREATE, etcd.settings.endpoints[0], f"{etcd.prefix}{version}")
