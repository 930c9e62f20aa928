"""etcd with TLS, logins and few rights, as README's recipe says; certificates that are replaced under a running daemon;
and secrets that nobody gets to see.

A real etcd, real daemons and commands. The lines of README about users and roles are typed into a shell whose etcdctl
is root of this etcd; tests/test_readme.py types all of README on booted hosts.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import RealEtcd, missing
from daemons import DaemonProcess, run
from etcd_server import Certificates, EtcdCluster, until
from ipam_plugin.config import parse
from ipam_plugin.errors import EtcdRefused, IpamError
from ipam_plugin.etcd import Etcd, EtcdSettings, Put
from ipam_plugin.model import Keys
from tests.readme import lines

PREFIX = "/ipam-plugin/v1/"
SUBNET = "198.18.0.0/24"
PASSWORD = "/etc/ipam-plugin/password"  # where README has it


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def type_readme(cluster: EtcdCluster, heading: str, password: str = PASSWORD) -> None:
    """README's lines for etcdctl about users, roles and authentication."""
    wanted = [each for each in lines() if each.heading == heading]
    typed = [each.command for each in wanted if re.match("etcdctl (user|role|auth) ", each.command)]
    assert typed
    for command in typed:
        type_as_root(cluster, command.replace(PASSWORD, password))


def type_as_root(cluster: EtcdCluster, command: str) -> None:
    """In a shell whose etcdctl is root of this etcd, as on README's host1."""
    told = cluster.settings()
    shell = {
        "PATH": os.environ["PATH"],
        "ETCDCTL_API": "3",
        "ETCDCTL_ENDPOINTS": ",".join(cluster.endpoints),
        "ETCDCTL_CACERT": str(told.ca_cert),
        "ETCDCTL_CERT": str(told.cert),
        "ETCDCTL_KEY": str(told.key),
    }
    done = subprocess.run(["bash", "-c", command], env=shell, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, (command, done.stderr)


@contextlib.contextmanager
def secured(*arguments: str) -> Iterator[tuple[EtcdCluster, Certificates]]:
    """An etcd as README's installation leaves it, and what signs its certificates."""
    with EtcdCluster(tls="mutual", arguments=arguments) as cluster:
        type_readme(cluster, "Install it on several hosts")
        assert cluster.certificates is not None
        yield cluster, cluster.certificates


def told(settings: EtcdSettings, **more: Any) -> dict[str, Any]:
    """`etcd` of a configuration, without the endpoints."""
    return {"ca_cert": settings.ca_cert, "cert": settings.cert, "key": settings.key, **more}


def works(daemon: DaemonProcess) -> None:
    """It gives an address and takes it back, by way of etcd."""
    pool = daemon.pool(SUBNET)
    given = daemon.request_address(pool)
    assert given.ok, given
    assert daemon.release_address(pool, given.body["Address"].partition("/")[0]).ok
    assert daemon.call("IpamDriver.ReleasePool", {"PoolID": pool}).ok


# --- the recipe ----------------------------------------------------------------------------------------------


@pytest.mark.etcd
def test_the_rights_of_the_recipe_suffice_and_are_all(tmp_path: Path) -> None:
    """Daemon and commands do all their work with them, and nothing beyond the prefix can be read or written."""
    with secured() as (cluster, _):
        settings = cluster.settings(common_name="ipam-plugin")
        daemon = DaemonProcess(tmp_path / "a", cluster.endpoints, host="a", prefix=PREFIX, etcd=told(settings))
        with daemon:
            daemon.wait_answering()
            works(daemon)
            for command in (
                "reserve 198.18.0.9 --note printer",
                "leases",
                "show 198.18.0.9",
                "segment default --exclude 198.18.0.16/28",
                "unreserve 198.18.0.9",
                "pools",
                "hosts -o json",
            ):
                done = run(*command.split(), config=daemon.config_file)
                assert (done.returncode, "denied" in done.stderr) == (0, False), (command, done.stderr)
            assert "there is no host nobody" in run("host", "retire", "nobody", config=daemon.config_file).stderr
            daemon.terminate()
            assert daemon.wait() == 0
        assert "permission denied" not in daemon.text()
        with contextlib.closing(Etcd(settings)) as client:
            assert client.get(Keys(PREFIX).heartbeat("a"), deadline=soon()) is None
            for key in ("/other", "/ipam-plugin/v2/x", "/ipam-plugin/v"):
                with pytest.raises(EtcdRefused, match="permission denied"):
                    client.get(key, deadline=soon())
                with pytest.raises(EtcdRefused, match="permission denied"):
                    client.commit({}, [Put(key, b"1")], deadline=soon())
            with pytest.raises(EtcdRefused, match="permission denied"):
                client.list("/", deadline=soon())
        # A certificate of the same CA is not enough: its name must be a user of etcd.
        stranger = Etcd(cluster.settings(common_name="somebody"))
        with contextlib.closing(stranger), pytest.raises(EtcdRefused, match="permission denied"):
            stranger.get(PREFIX, deadline=soon())


@pytest.mark.etcd
def test_a_login_that_has_ended_is_noticed_by_nobody(tmp_path: Path) -> None:
    """A user with a password: no request, watch or heartbeat fails when its token has expired, and another password is
    read without a restart.

    With JWT, whose end is not put off by its use, as that of etcd's simple tokens is (tests/test_etcd_faults.py).
    """
    pem = tmp_path / "jwt.pem"
    for made in (["genrsa", "-out", str(pem), "2048"], ["rsa", "-in", str(pem), "-pubout", "-out", f"{pem}.pub"]):
        subprocess.run(["openssl", *made], check=True, capture_output=True, timeout=30)
    jwt = f"jwt,pub-key={pem}.pub,priv-key={pem},sign-method=RS256,ttl=2s"
    password = tmp_path / "password"
    password.write_text("correct-horse\n")
    with secured("--auth-token", jwt) as (cluster, _):
        type_readme(cluster, "Keep it secure", str(password))
        login = told(cluster.settings(common_name="host"), username="docker-hosts", password_file=str(password))
        daemon = DaemonProcess(
            tmp_path / "a", cluster.endpoints, host="a", prefix=PREFIX, etcd=login, metrics=True, deadline="4s"
        )
        with daemon:
            daemon.wait_answering()
            works(daemon)
            end = time.monotonic() + 5  # more than two lives of a token
            while time.monotonic() < end:
                works(daemon)
            done = run("reserve", "198.18.0.9", config=daemon.config_file)
            assert done.returncode == 0, done.stderr
            pool = daemon.pool(SUBNET)
            until(lambda: daemon.metric('ipam_plugin_leases{kind="reserved",segment="default"}') == 1, "it is seen")
            assert daemon.request_address(pool, address="198.18.0.9").status == 409
            assert daemon.metric("ipam_plugin_serving") == 1
            # Another password: etcd ends the logins of that user, and the daemon reads the file again.
            other = tmp_path / "other"
            other.write_text("battery-staple\n")
            type_as_root(cluster, f"etcdctl user passwd docker-hosts --interactive=false <{other}")
            os.rename(password, tmp_path / "old")
            assert f"etcd.password_file: {password}: No such file" in daemon.request_pool("198.18.1.0/24").error
            os.rename(other, password)
            until(lambda: daemon.request_pool("198.18.1.0/24").ok, "it has logged in")
            works(daemon)


@pytest.mark.etcd
def test_certificates_and_the_ca_are_replaced_under_a_running_daemon(tmp_path: Path) -> None:
    """In README's three steps, and no daemon is restarted: the same process works after each of them."""
    with secured() as (cluster, old):
        client = cluster.settings(common_name="ipam-plugin")
        assert client.ca_cert is not None
        assert client.cert is not None
        assert client.key is not None
        outdated = EtcdSettings(
            cluster.endpoints, *(copy(each, tmp_path) for each in (old.ca, client.cert, client.key))
        )
        new = Certificates(tmp_path / "new CA")
        (member,) = cluster.members
        daemon = DaemonProcess(tmp_path / "a", cluster.endpoints, host="a", prefix=PREFIX, etcd=told(client))

        def restarted_member() -> None:
            member.kill()
            member.start()
            cluster.wait_ready()
            works(daemon)

        with daemon:
            daemon.wait_answering()
            works(daemon)
            processes = daemon.processes()
            # Renewed by the same CA: etcd is not restarted, and shows the new certificate from then on.
            before = shown(member.endpoint)
            replace(old.server, old.issue("server again", "subjectAltName=IP:127.0.0.1,DNS:localhost"))
            replace((client.cert, client.key), old.issue("ipam-plugin"))
            assert shown(member.endpoint) != before
            assert run("leases", config=daemon.config_file).returncode == 0
            restarted_member()
            # 1. Both sides know both CAs.
            old.ca.write_bytes(old.ca.read_bytes() + new.ca.read_bytes())
            restarted_member()
            # 2. Everybody's certificate is of the new one.
            replace(old.server, new.server)
            replace((client.cert, client.key), new.issue("ipam-plugin"))
            restarted_member()
            # 3. Nobody knows the old one any more.
            old.ca.write_bytes(new.ca.read_bytes())
            restarted_member()
            assert run("leases", config=daemon.config_file).returncode == 0
            assert daemon.processes() == processes
            for files in ({}, {"ca_cert": str(new.ca)}):  # neither does it trust etcd, nor etcd it
                with contextlib.closing(Etcd(replaced(outdated, **files))) as late, pytest.raises(IpamError):
                    late.get(PREFIX, deadline=soon(2))
        assert "Traceback" not in daemon.text()


def copy(file: str | Path, directory: Path) -> str:
    return str(shutil.copy(file, directory / f"outdated {Path(file).name}"))


def replace(there: tuple[str, str], by: tuple[str, str]) -> None:
    """Certificate and key, each at once, as `mv` does."""
    for old, fresh in zip(there, by, strict=True):
        if old != fresh:
            os.replace(shutil.copy(fresh, f"{old}.new"), old)


def replaced(settings: EtcdSettings, **changes: Any) -> EtcdSettings:
    names = ("endpoints", "ca_cert", "cert", "key")
    return EtcdSettings(**{name: getattr(settings, name) for name in names} | changes)


def shown(endpoint: str) -> str:
    """The certificate that a member shows to whoever connects."""
    address = endpoint.removeprefix("https://")
    asked = ["openssl", "s_client", "-connect", address, "-showcerts"]
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False)
    found = re.search("-----BEGIN CERTIFICATE-----(.*?)-----END", done.stdout, re.DOTALL)
    assert found is not None, done
    return found[1]


# --- secrets ---------------------------------------------------------------------------------------------------

LOGIN = re.compile(r"\b[A-Za-z]{16}\.\d+\b|\beyJ[\w-]+\.[\w-]+")
"""A token of etcd's, simple or JWT."""


def leaks(text: str, secrets: list[str]) -> list[str]:
    return [each for each in secrets if each in text] + LOGIN.findall(text)


def everything_of(daemon: DaemonProcess) -> str:
    """What others see of a running daemon: log, processes, metrics, files that are not the operator's own."""
    shown = daemon.text() + daemon.metrics()
    for process in daemon.processes():
        for name in ("cmdline", "environ", "comm"):
            shown += Path(f"/proc/{process}/{name}").read_bytes().decode(errors="replace")
    return shown + "".join(each.read_text(errors="replace") for each in daemon.state.rglob("*") if each.is_file())


@pytest.mark.etcd
def test_secrets_are_nowhere_to_be_read(tmp_path: Path) -> None:
    """Whatever fails, also at the most talkative: no password, key or token in logs, errors, etcd, metrics, `ps`."""
    password, wrong = "correct-horse-battery", "staple-of-the-wrong-kind"
    file = tmp_path / "password"
    file.write_text(password)
    with secured() as (cluster, _):
        type_readme(cluster, "Keep it secure", str(file))
        settings = cluster.settings(common_name="host")
        assert settings.key is not None
        key = Path(settings.key).read_text()
        secrets = [password, wrong, *(line for line in key.splitlines() if len(line) > 20 and "-" not in line)]
        assert len(secrets) > 3
        daemon = DaemonProcess(
            tmp_path / "a",
            cluster.endpoints,
            host="a",
            prefix=PREFIX,
            deadline="3s",
            metrics=True,
            etcd=told(settings, username="docker-hosts", password_file=str(file), timeout="1s"),
            log={"level": "debug"},
        )
        seen = ""

        def look(expected: str, *commands: str) -> None:
            """At the daemon and at commands when they get this answer from etcd ('': all is well)."""
            nonlocal seen
            with ThreadPoolExecutor(3) as threads:
                typed = [threads.submit(run, each, config=daemon.config_file) for each in (*commands, "check-config")]
                reply = daemon.request_pool(SUBNET)
            assert reply.ok == (not expected)
            assert expected in reply.error
            *asked, checked = (each.result() for each in typed)
            assert checked.returncode == 0, checked
            assert all((each.returncode == 0) == (not expected) for each in asked), asked
            seen += "".join(each.stdout + each.stderr for each in (*asked, checked))
            seen += reply.error + everything_of(daemon)

        def started() -> None:
            daemon.kill()
            daemon.start()
            daemon.wait_answering()

        (member,) = cluster.members
        with daemon:
            daemon.wait_answering()
            look("", "leases")
            works(daemon)
            file.write_text(wrong)
            started()
            look("authentication failed", "leases")
            file.write_text(password)
            cluster.etcdctl("user", "revoke-role", "docker-hosts", "ipam-plugin")
            started()
            look("permission denied", "leases")
            cluster.etcdctl("user", "grant-role", "docker-hosts", "ipam-plugin")
            until(lambda: daemon.request_pool(SUBNET).ok, "it has its rights again")
            member.kill()
            look("etcd did not")
            member.start()
            cluster.wait_ready()
            Path(settings.key).write_text(key.replace("A", "B").replace("Q", "R"))
            started()
            look("has not reached etcd")
        seen += cluster.etcdctl("get", "", "--prefix")
        assert " DEBUG " in seen
        assert leaks(seen, secrets) == []
        assert leaks(f"x {password}", secrets) == [password]
        assert leaks('metadata=(("token", "rUPKqVnAZkOmHFzh.17"),)', secrets) == ["rUPKqVnAZkOmHFzh.17"]


# --- this host's own files -------------------------------------------------------------------------------------


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's."""
    directory = Path(tempfile.mkdtemp(prefix="ipam-security-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.etcd
def test_another_user_cannot_connect(public: Path, etcd: RealEtcd) -> None:
    """Whoever may connect can take and free addresses, so that is root alone."""
    if os.geteuid() != 0:
        missing("root", "only root can become another user")
    daemon = DaemonProcess(public / "a", etcd.settings.endpoints, host="a", prefix=etcd.prefix)
    connect = "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    become = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    with daemon:
        daemon.wait_answering()
        assert python(connect, daemon.socket) == ""
        assert "PermissionError: [Errno 13]" in python(f"{become}; {connect}", daemon.socket)
        assert "PermissionError: [Errno 13]" in python(f"{become}; os.listdir(sys.argv[1])", daemon.state)


def python(code: str, argument: Path) -> str:
    """What these lines, in a process of their own, have to complain of."""
    command = [sys.executable, "-I", "-S", "-c", f"import os, socket, sys; {code}", str(argument)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stderr


@pytest.mark.parametrize(("mode", "exposed"), [(0o600, False), (0o640, False), (0o644, True), (0o642, True)])
@pytest.mark.parametrize("key", ["key", "password_file"])
def test_a_secret_that_every_user_can_read_is_named(key: str, mode: int, exposed: bool, public: Path) -> None:
    """With the cure; a directory above it that is closed to others protects it as well."""
    file = public / "secret"
    file.write_text("secret\n")
    file.chmod(mode)
    beside = f"cert: {file}" if key == "key" else "username: u"
    config = parse(f"etcd: {{endpoints: ['https://a:1'], {key}: {file}, {beside}}}\n", "FILE")
    cure = f"etcd.{key}: {file} can be read or written by every user of this machine: chmod o= {file}"
    assert config.etcd.exposed() == ([cure] if exposed else [])
    public.chmod(0o700)
    assert config.etcd.exposed() == []


@pytest.mark.etcd
def test_check_config_refuses_an_exposed_secret_and_the_daemon_warns(public: Path, etcd: RealEtcd) -> None:
    """A daemon that refused to start would leave a host's containers without addresses after its next boot."""
    file = public / "password"
    file.write_text("secret\n")
    login = {"username": "u", "password_file": str(file)}
    daemon = DaemonProcess(public / "a", etcd.settings.endpoints, host="a", prefix=etcd.prefix, etcd=login)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    refused = run("check-config", config=daemon.config_file)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"chmod o= {file}" in refused.stderr
    with daemon:
        daemon.wait_answering()
        works(daemon)
        assert f"chmod o= {file}" in daemon.text()
    file.chmod(0o600)
    assert run("check-config", config=daemon.config_file).returncode == 0
