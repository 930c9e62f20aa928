"""What is measured: an etcd on a real disk, daemons as processes, and a client that speaks like Docker's."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import re
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from daemons import DaemonProcess
from etcd_server import EtcdCluster, until
from ipam_plugin.etcd import Etcd, EtcdSettings, Put
from ipam_plugin.model import ENDPOINT, Keys, Lease, Pool, encode

LAN = "198.18.0.0/15"
"""Where the pools of the benchmarks are: for benchmarks (RFC 2544), so no interface of this machine has it."""

TRANSACTION = 128  # operations, etcd's limit


class Docker:
    """One connection after another to a plugin's socket, as the engine's Go client makes them.

    It keeps a connection for as long as the plugin lets it.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._connection: socket.socket | None = None
        self._number = random.Random(str(path)).getrandbits(24) << 16

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(self, method: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The status and the answer. Raises OSError when nobody answers."""
        status, answer = self.exchange(request_bytes(method, body))
        return status, json.loads(answer)

    def exchange(self, request: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._connection.settimeout(60)
            try:
                self._connection.connect(self._path)
            except OSError:
                self.close()
                raise
        self._connection.sendall(request)
        received = b""
        while True:
            head, separator, answer = received.partition(b"\r\n\r\n")
            if separator:
                told = head.lower()
                length = int(told.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
                if len(answer) >= length:
                    break
            more = self._connection.recv(65536)
            if not more:
                raise ConnectionResetError(f"{self._path} closed the connection before its answer")
            received += more
        if b"\r\nconnection: close" in told:
            self.close()
        return int(head.split(None, 2)[1]), answer

    def request_pool(self, subnet: str, **options: str) -> str:
        """The PoolID."""
        asked = {
            "AddressSpace": "ipam-plugin-local",
            "Pool": subnet,
            "SubPool": "",
            "Options": options or None,
            "V6": False,
        }
        status, answer = self.call("IpamDriver.RequestPool", asked)
        assert status == 200, answer
        return str(answer["PoolID"])

    def request_address(self, pool_id: str) -> str:
        """An address for a container, with a MAC, as engines up to 28 ask."""
        status, answer = self.exchange(self.address_request(pool_id))
        assert status == 200, answer
        return str(json.loads(answer)["Address"])

    def release_address(self, pool_id: str, address: str) -> None:
        """As the engine says it: without the prefix length."""
        status, answer = self.call("IpamDriver.ReleaseAddress", {"PoolID": pool_id, "Address": address.split("/")[0]})
        assert status == 200, answer

    def address_request(self, pool_id: str) -> bytes:
        self._number += 1
        mac = ":".join(f"{octet:02x}" for octet in (2, *self._number.to_bytes(5)))
        options = {"com.docker.network.endpoint.macaddress": mac}
        return request_bytes("IpamDriver.RequestAddress", {"PoolID": pool_id, "Address": "", "Options": options})


def request_bytes(method: str, body: dict[str, Any]) -> bytes:
    content = msgspec.json.encode(body) + b"\n"
    head = (
        f"POST /{method} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {len(content)}\r\n"
        "Accept: application/vnd.docker.plugins.v1.2+json\r\nAccept-Encoding: gzip\r\n\r\n"
    )
    return head.encode() + content


class Stage:
    """A directory on the disk that is measured, one etcd member there, and what was started. A context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="ipam-bench-", dir=directory))
        self._open = contextlib.ExitStack()
        self._open.callback(self._remove)
        self._count = 0
        try:
            tempfile.tempdir = str(self.directory)  # where EtcdCluster puts its data
            self.etcd = self._open.enter_context(EtcdCluster())
            self.client = Etcd(self.settings)
            self._open.callback(self.client.close)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def _remove(self) -> None:
        tempfile.tempdir = None
        subprocess.run(["rm", "-rf", str(self.directory)], check=False, timeout=120)

    @property
    def settings(self) -> EtcdSettings:
        return self.etcd.settings()

    def fresh_keys(self) -> Keys:
        """A key prefix that nothing else uses."""
        self._count += 1
        return Keys(f"/bench-{self._count}/v1/")

    @contextlib.contextmanager
    def daemons(self, count: int, keys: Keys) -> Iterator[list[Daemon]]:
        """Daemons of as many hosts, all serving; ended on the way out."""
        started = [self.daemon(keys) for _ in range(count)]
        try:
            for each in started:
                each.start()
            for each in started:
                each.wait_until_serving()
            yield started
        finally:
            for each in started:
                each.kill()

    def daemon(self, keys: Keys) -> Daemon:
        """One that is not started yet."""
        self._count += 1
        number = self._count
        return Daemon(self.directory / f"d{number}", self.etcd.endpoints, host=f"bench-{number}", prefix=keys.prefix)

    def write(self, puts: list[Put]) -> None:
        for begin in range(0, len(puts), TRANSACTION):
            self.client.commit({}, puts[begin : begin + TRANSACTION], deadline=time.monotonic() + 30)

    def fill(self, keys: Keys, subnet: str, count: int, host: str = "elsewhere") -> None:
        """So many leases of another host's containers, at addresses drawn from the whole subnet."""
        pool = Pool.make(subnet, "", {}, "default")
        where = pool.candidates
        numbers = random.Random(subnet).sample(range(where.first, where.last + 1), count)
        self.write(
            [Put(keys.lease("default", ipaddress.ip_address(each)), lease(pool, each, host)) for each in numbers]
        )


def lease(pool: Pool, number: int, host: str) -> bytes:
    """A value as the daemon writes it for a container."""
    mac = ":".join(f"{octet:02x}" for octet in (2, 66, *number.to_bytes(4)))
    return encode(
        Lease(
            kind=ENDPOINT,
            host=host,
            mac=mac,
            pool=pool.id,
            since="2026-01-01T00:00:00.000Z",
            token=secrets.token_urlsafe(12),
        )
    )


class Daemon(DaemonProcess):
    """A daemon for one host, probing off, all else as it is installed."""

    def __init__(self, directory: Path, endpoints: Sequence[str], *, host: str, prefix: str) -> None:
        super().__init__(directory, endpoints, host=host, prefix=prefix, docker={"reconcile": False}, metrics=True)
        self.docker = Docker(self.socket)

    def wait_until_serving(self) -> None:
        self.wait_answering()
        until(lambda: self.metric("ipam_plugin_serving") == 1, f"{self.host} serves", 90)

    def stop(self) -> None:
        """As systemd stops it."""
        self.docker.close()
        self.terminate()
        self.wait()

    def kill(self) -> None:
        self.docker.close()
        super().kill()

    def first_address(self, pool_id: str) -> str:
        """Ask from the moment there is a socket; the daemon lets the request wait until it can be served."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.docker.request_address(pool_id)
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline, f"{self.host} does not listen:\n{self.text()[-3000:]}"
                time.sleep(0.002)

    def transactions(self, *purposes: str) -> float:
        """What its requests sent to etcd, by what it was for."""
        return sum(
            float(line.rpartition(" ")[2])
            for line in self.metrics().splitlines()
            if any(line.startswith(f'ipam_plugin_etcd_transactions_total{{purpose="{each}"}}') for each in purposes)
        )

    def memory(self) -> tuple[float, float]:
        """Megabytes of master and worker: what they use, shared pages divided among all who map them (PSS), and what
        they would use if nobody else mapped anything of theirs.
        """
        workers = [each for each in self.processes() if each != self.pid]
        usage = [rollup(each) for each in (self.pid, *workers)]
        alone = usage[0]["Private_Clean"] + usage[0]["Private_Dirty"] + sum(each["Rss"] for each in usage[1:])
        return sum(each["Pss"] for each in usage) / 1024, alone / 1024


def rollup(pid: int) -> dict[str, int]:
    """Kilobytes by kind (proc(5), smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def cpu_seconds(pid: int) -> float:
    """What a process has used of a processor (proc_pid_stat(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def received(metrics: str) -> dict[str, float]:
    """What an etcd has received, by the call's name, from its metrics; of a stream, each message."""
    found = re.findall(r'^grpc_server_msg_received_total{grpc_method="(\w+)".*} (\S+)$', metrics, re.MULTILINE)
    return {name: float(number) for name, number in found}
