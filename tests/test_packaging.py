"""The program as others get it: a wheel, and a Debian package for machines without internet access.

pip finds what this project needs in a directory of wheels (tests/booted.py), and asks nobody else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import RealEtcd
from daemons import DaemonProcess, group
from etcd_server import until
from ipam_plugin import __version__
from ipam_plugin.install import _FILES, MANUAL
from tests.booted import ROOT, Booted, checkout, debian, wheels
from tests.lab import Lab
from tests.readme import TEXT


def typed(*command: object, cwd: Path, seconds: float = 120, **more: str) -> str:
    """What a command says that has to succeed, outside the checkout and without what its tests have around them."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env={**kept, **more},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def offline() -> dict[str, str]:
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels()), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


# --- the wheel -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with a built wheel in it, and what the wheel itself asks for."""
    top = tmp_path_factory.mktemp("wheel")
    checkout(top / "source")
    typed(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", top / "built", top / "source", cwd=top, **offline())
    [wheel] = (top / "built").iterdir()
    assert wheel.name == f"ipam_plugin-{__version__}-py3-none-any.whl"
    shutil.rmtree(top / "source")
    typed(sys.executable, "-m", "venv", top / "venv", cwd=top)
    typed(top / "venv/bin/pip", "install", "--quiet", wheel, cwd=top, **offline())
    return top / "venv"


def test_the_wheel_has_all_that_it_needs(venv: Path, tmp_path: Path) -> None:
    """Nothing of a test or a checkout is needed, and no more than it asks for is there."""
    assert typed(venv / "bin/ipam-plugin", "--version", cwd=tmp_path).strip() == f"ipam-plugin, version {__version__}"
    typed(venv / "bin/pip", "check", cwd=tmp_path)
    path = typed(venv / "bin/python", "-I", "-c", "print(__import__('ipam_plugin').__path__[0])", cwd=tmp_path).strip()
    assert Path(path).is_relative_to(venv)
    assert shipped(Path(path)) == shipped(ROOT / "ipam_plugin")


def shipped(package: Path) -> dict[str, bytes]:
    found = {str(each.relative_to(package)): each for each in package.rglob("*") if "__pycache__" not in each.parts}
    return {name: each.read_bytes() for name, each in found.items() if each.is_file()}


def test_the_wheel_installs_the_service(venv: Path, tmp_path: Path) -> None:
    """On the root directory of another system. (That other users cannot reach a test's directory is no matter here.)"""
    root = tmp_path / "system"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nipam-plugin:x:990:990::/:/bin/false\n")
    code = (
        "import sys; from ipam_plugin import __version__, cli, install, manual; install._obstacle = lambda path: ''; "
        "print(*install.install(sys.argv[1], sys.argv[2], manual=manual.page(cli.cli, __version__)), sep='\\n')"
    )
    said = typed(venv / "bin/python", "-I", "-c", code, root, venv / "bin/ipam-plugin", cwd=tmp_path)
    for path, asset in _FILES.items():
        assert f"{path} written\n" in said
        text = (root / path.lstrip("/")).read_text()
        assert "@EXECUTABLE@" not in text
        assert asset != MANUAL or f"ipam\\-plugin {__version__}" in text
    assert f"ExecStart={venv}/bin/ipam-plugin serve\n" in (root / "etc/systemd/system/ipam-plugin.service").read_text()


@pytest.mark.etcd
def test_the_wheel_serves(venv: Path, tmp_path: Path, etcd: RealEtcd) -> None:
    """Its daemon answers an engine, its command reads the register."""
    command = venv / "bin/ipam-plugin"
    daemon = DaemonProcess(tmp_path / "a", etcd.settings.endpoints, host="a", prefix=etcd.prefix)
    assert "is good" in typed(command, "check-config", daemon.config_file, cwd=tmp_path)
    try:
        daemon.start((str(command),), PYTHONPATH="")
        daemon.wait_answering()
        assert daemon.call("Plugin.Activate").body == {"Implements": ["IpamDriver"]}
        executables = {Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")[1] for each in group(daemon.pid)}
        assert executables == {str(command).encode()}
        reply = daemon.request_address(daemon.pool("198.18.0.0/28"))
        assert reply.ok, reply.error
        [lease] = json.loads(typed(command, "--config", daemon.config_file, "leases", "-o", "json", cwd=tmp_path))
        assert f"{lease['address']}/28" == reply.body["Address"]
        daemon.terminate()
        assert daemon.wait() == 0
    finally:
        daemon.kill()


def test_the_version_has_one_source() -> None:
    """The package's own, and the changelog begins with it."""
    assert re.findall(r"(?m)^## (\S+)", (ROOT / "docs/changelog.md").read_text())[0] == __version__


# --- the Debian package ------------------------------------------------------------------------------------------

# As dockerd asks, with what every Debian has.
ASK = """
import http.client, json, socket, sys
class Plugin(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(open("/etc/docker/plugins/ipam-plugin.spec").read().strip().removeprefix("unix://"))
plugin = Plugin("plugin", timeout=60)
plugin.request("POST", "/" + sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
print(plugin.getresponse().read().decode())
"""
SUBNET = "198.18.0.0/28"
NEXT = "99.0.0"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What `make deb` makes of this checkout, and the same as a later version."""
    top = tmp_path_factory.mktemp("deb")
    checkout(top / "source")
    (top / "source/.venv/bin").mkdir(parents=True)
    for name in ("lib", "pyvenv.cfg"):
        if (Path(sys.prefix) / name).exists():
            (top / "source/.venv" / name).symlink_to(Path(sys.prefix) / name)
    (top / "source/.venv/bin/python").symlink_to(sys.executable)
    (top / "source/.venv/.made").touch()
    typed("make", "-C", "source", "deb", cwd=top, seconds=300, **offline())
    [package] = (top / "source/dist").iterdir()
    assert package.name.startswith(f"ipam-plugin_{__version__}_")
    tree = top / "later"
    typed("dpkg-deb", "-R", package, tree, cwd=top)
    for path in (tree / "usr/lib/ipam-plugin/ipam_plugin/__init__.py", tree / "DEBIAN/control"):
        path.write_text(path.read_text().replace(__version__, NEXT))
    later = package.with_name(package.name.replace(__version__, NEXT))
    typed("dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "-b", tree, later, cwd=top)
    return package, later


@pytest.fixture(scope="module")
def machine(packages: tuple[Path, Path]) -> Iterator[Booted]:
    """A booted Debian with etcd and Docker whose only networks are its own. The package is in /root, the later one in
    /opt.
    """
    tree = debian()
    with Lab(hosts=0, machines=0, etcd=0, router=False) as lab:
        booted = Booted("offline", lab.directory / "offline", tree)
        for package, directory in zip(packages, ("root", "opt"), strict=True):
            (booted.disk / directory).mkdir(exist_ok=True)
            shutil.copy(package, booted.disk / directory)
        (booted.disk / "opt/ask.py").write_text(ASK)
        try:
            booted.boot()
            yield booted
        finally:
            booted.power_off()


def ask(machine: Booted, method: str, **body: Any) -> dict[str, Any]:
    found = json.loads(machine(f"python3 -I /opt/ask.py {method} '{json.dumps(body) if body else ''}'", 60).stdout)
    assert isinstance(found, dict)
    return found


def given(machine: Booted, mac: str) -> str:
    options = {"com.docker.network.endpoint.macaddress": mac}
    pool = f"default/{SUBNET}"
    answer = ask(machine, "IpamDriver.RequestAddress", PoolID=pool, Address="", Options=options)["Address"]
    assert isinstance(answer, str)
    return answer.partition("/")[0]


def endpoints(machine: Booted) -> dict[str, str]:
    """Address -> token."""
    found = json.loads(machine("ipam-plugin leases --kind endpoint -o json").stdout)
    return {each["address"]: each["token"] for each in found}


def serving(machine: Booted, version: str, began: str = "") -> bool:
    states = machine("systemctl is-active ipam-plugin.socket ipam-plugin.service", check=False).stdout.split()
    said = machine("ipam-plugin --version").stdout.strip()
    return (
        states == ["active", "active"]
        and said == f"ipam-plugin, version {version}"
        and "serving" in machine.show("ipam-plugin.service", "StatusText")
        and machine.show("ipam-plugin.service", "ExecMainStartTimestampMonotonic") != began
        and f"ipam-plugin {version} starts" in machine("journalctl -u ipam-plugin -o cat --no-pager").stdout
    )


def files(machine: Booted) -> list[str]:
    """Everything on the machine that a package could leave behind."""
    looks = (
        "find /etc /usr /opt /var/lib -xdev ! -path '/etc/*-' ! -name .pwd.lock ! -path '/var/lib/dpkg/*'"
        " ! -path '/var/lib/apt/*' ! -path '/var/lib/etcd/*' ! -path '/var/lib/systemd/*' ! -path '/var/lib/docker*'"
        " ! -path '/var/lib/containerd*' ! -name '*.pyc' ! -name __pycache__",
        "cut -d: -f1 /etc/passwd /etc/group /etc/shadow /etc/gshadow",
        "dpkg --get-selections",
    )
    return [line for look in looks for line in sorted(machine(look).stdout.splitlines())]


@pytest.mark.root
def test_the_package_on_a_machine_without_network(machine: Booted) -> None:
    """README's commands, as they stand there: installed, serving; a later version and back, with leases; taken away."""
    before = files(machine)
    [block] = re.findall(r"(?s)\n```console offline\n(.*?)\n```\n", TEXT)
    install, enable = [line.removeprefix("offline# ") for line in block.splitlines()]
    assert all(line.startswith("offline# ") for line in block.splitlines())
    assert machine("ip -4 route show default; ip -6 route show default").stdout == ""

    said = machine(install, 120).stdout
    assert "user ipam-plugin made" in said
    assert "/usr/local/share/man/man8/ipam-plugin.8 written" in said
    assert machine("systemctl is-active ipam-plugin.socket ipam-plugin.service", check=False).stdout.split() == [
        "inactive",
        "inactive",
    ]
    assert "ExecStart=/usr/bin/ipam-plugin serve\n" in machine("cat /etc/systemd/system/ipam-plugin.service").stdout
    machine("echo 'etcd: {endpoints: [\"http://127.0.0.1:2379\"]}' >/etc/ipam-plugin/config.yaml")
    machine(enable, 120)
    until(lambda: serving(machine, __version__), "the daemon", 60)
    assert ask(machine, "Plugin.Activate") == {"Implements": ["IpamDriver"]}
    pool = {"AddressSpace": "ipam-plugin-local", "Pool": SUBNET, "SubPool": "", "Options": {}, "V6": False}
    assert ask(machine, "IpamDriver.RequestPool", **pool)["PoolID"] == f"default/{SUBNET}"
    first = given(machine, "02:00:00:00:00:01")
    leases = endpoints(machine)
    assert list(leases) == [first]

    began = machine.show("ipam-plugin.service", "ExecMainStartTimestampMonotonic")
    later = install.replace("./ipam-plugin_*.deb", "/opt/ipam-plugin_*.deb")
    machine(later, 120)
    until(lambda: serving(machine, NEXT, began), "the later version", 60)
    assert endpoints(machine) == leases
    second = given(machine, "02:00:00:00:00:02")
    leases = endpoints(machine)
    assert set(leases) == {first, second}

    began = machine.show("ipam-plugin.service", "ExecMainStartTimestampMonotonic")
    machine(install.replace("--yes", "--yes --allow-downgrades"), 120)
    until(lambda: serving(machine, __version__, began), "this version again", 60)
    assert endpoints(machine) == leases
    third = given(machine, "02:00:00:00:00:03")
    assert len({first, second, third}) == 3

    said = machine("apt-get remove --yes ipam-plugin", 120).stdout
    assert "ipam-plugin.socket, ipam-plugin.service, ipam-plugin-web.service stopped and disabled" in said
    assert machine("ls /run/ipam-plugin /usr/bin/ipam-plugin /usr/lib/ipam-plugin", check=False).stdout == ""
    assert machine("cat /etc/ipam-plugin/config.yaml /var/lib/ipam-plugin/host").stdout.endswith("offline\n")
    machine("apt-get purge --yes ipam-plugin", 120)
    assert files(machine) == before
