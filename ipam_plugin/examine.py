"""Gathers what doctor.py decides on: from etcd, dockerd, the kernel, systemd and the LAN of this host.

Each question has a time limit, and what cannot be had becomes the reason why. Nothing is changed; on the LAN a few ARP
requests are sent, some of them in the name of a made-up MAC.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import json
import os
import pwd
import socket
import ssl
import stat
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from ipam_plugin import __version__, doctor, interfaces, wire
from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.config import Config, EtcdConfig
from ipam_plugin.dockerd import DRIVER, UNKNOWN_POOL, Dockerd
from ipam_plugin.doctor import Facts, Filter, Growth, Inode, Layout, Link, Member, Peer, Process, Socket, Spec, Unit
from ipam_plugin.errors import ConfigError, EtcdUnavailable, IpamError, ProbeFailed
from ipam_plugin.etcd import Etcd
from ipam_plugin.evidence import Installation
from ipam_plugin.model import Keys, Pool, SegmentSettings
from ipam_plugin.operations import Operations
from ipam_plugin.wire import NoInterface, Wire

PATIENCE = 3.0  # seconds for one member of etcd, and for one command of this host
HEARD = 2.0  # seconds for one question on the LAN
MOST = 4 << 20  # bytes of an answer that are read
T = TypeVar("T")


def gather(config: Config, ops: Operations, connect: Callable[[str], Etcd], *, ask_lan: bool) -> Facts:
    """Everything, in a few seconds. `connect` makes a client of one endpoint. Raises nothing on purpose."""
    host = _own_name(config)
    units, main_process = _units()
    found = _members(config.etcd, connect)
    away = "" if any(isinstance(each, Member) for each in found.values()) else "etcd does not answer"
    unread = ""
    peers: list[Peer] | str = away
    pools: list[Pool] = []
    if not away:
        try:
            peers = [Peer(each.name, each.alive, each.host) for each in ops.hosts()]
            used = ((each.pool, {use.host for use in each.uses}) for each in ops.pools())
            pools = [pool for pool, hosts in used if pool and host in hosts]
        except EtcdUnavailable as error:
            peers = unread = away = str(error)
        except IpamError as error:
            peers = str(error)
    growth = away or _growth(connect, next(iter(_answering(found)), ""), Keys(config.prefix).leases)
    # Asked as by a write, and the next write to an etcd that has used its quota raises the alarm.
    crowded = (isinstance(growth, Growth) and growth.alarms) or any(map(doctor.nearly_full, found.values()))
    full = "not asked while etcd is full or nearly so" if crowded else ""
    dockerd = Dockerd(config.docker.socket)
    try:
        engine: Installation | str = _or_why(dockerd.installation)
        specs = _specs()
        # To connect to a socket of systemd's starts its service, and nothing is to be changed.
        answers = None if _is_down(units) else _socket(config.socket)
        reachable = (
            not isinstance(engine, str)
            and isinstance(answers, Socket)
            and answers.serves
            and bool(specs)
            and specs[0].address == f"unix://{config.socket}"
        )
        # Else the engine would look for it for half a minute, and hold up whoever makes a network meanwhile.
        asked = _or_why(dockerd.refusal) if reachable else ""
    finally:
        dockerd.close()
    links = _links()
    return Facts(
        host=host,
        machine_id=_text("/etc/machine-id"),
        boot_id=_text("/proc/sys/kernel/random/boot_id"),
        version=__version__,
        prefix=config.prefix,
        user=config.etcd.username or "",
        socket_path=config.socket,
        reconcile=config.docker.reconcile,
        asks=any(
            (each.probe or config.for_segment(each.segment).probe) != "off"
            for each in pools or [Pool.make("192.0.2.0/24", "", {}, config.segment)]
        ),
        members=found,
        unread=unread,
        growth=growth,
        layout=away or _or_why(lambda: Layout(ops.schema_problem())),
        rights=away or full or _or_why(ops.rights),
        peers=peers,
        pools=pools,
        process=_process(host, peers, main_process),
        docker_socket=_inode(config.docker.socket),
        state_dir=_state_dir(config.state_dir),
        specs=specs,
        socket=answers,
        engine=engine,
        asked=asked,
        wires=_wires(config, ops, host, pools, peers, engine) if ask_lan else "it was not asked (--no-lan)",
        links=links if not isinstance(links, str) else (),
        filters={version: _filter(version) for version in (4, 6)},
        units=units,
    )


def _or_why(question: Callable[[], T]) -> T | str:
    try:
        return question()
    except (IpamError, OSError) as error:
        return str(error)


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _own_name(config: Config) -> str:
    return config.host or _text(f"{config.state_dir}/host") or socket.gethostname()


# ------------------------------------------------------------------------------------------------ etcd


def _members(config: EtcdConfig, connect: Callable[[str], Etcd]) -> dict[str, Member | str]:
    def ask(endpoint: str) -> Member | str:
        try:
            etcd = connect(endpoint)
        except ConfigError as error:
            return str(error)
        try:
            status = etcd.status(deadline=time.monotonic() + PATIENCE)
        except IpamError as error:
            return str(error)
        finally:
            etcd.close()
        ahead, quota = _told_by_http(endpoint, config)
        return Member(status.version, status.cluster_id, status.db_size, quota, ahead)

    with ThreadPoolExecutor(len(config.endpoints)) as pool:
        return dict(zip(config.endpoints, pool.map(ask, config.endpoints), strict=True))


def _answering(members: Mapping[str, Member | str]) -> list[str]:
    return [endpoint for endpoint, each in members.items() if isinstance(each, Member)]


def _told_by_http(endpoint: str, config: EtcdConfig) -> tuple[float | None, int | None]:
    """By how much its clock is ahead, and its quota: etcd serves its metrics beside gRPC, and with them the date."""
    try:
        context = None
        if endpoint.startswith("https:"):
            context = ssl.create_default_context(cafile=config.ca_cert)
            if config.cert and config.key:
                context.load_cert_chain(config.cert, config.key)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        began = time.time()
        with opener.open(f"{endpoint}/metrics", timeout=PATIENCE) as answer:
            ended = time.time()
            date = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
            text = answer.read(MOST).decode()
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return None, None
    quota = next((line.split()[1] for line in text.splitlines() if line.startswith("etcd_server_quota_backend_")), "0")
    return doctor.ahead(date, began, ended), int(float(quota)) or None


def _growth(connect: Callable[[str], Etcd], endpoint: str, key: str) -> Growth | str:
    etcd = connect(endpoint)
    try:
        deadline = time.monotonic() + PATIENCE
        revision = etcd.status(deadline=deadline).revision
        old = revision - doctor.KEPT
        return Growth(etcd.alarms(deadline=deadline), revision, old > 0 and etcd.remembers(old, key, deadline=deadline))
    except IpamError as error:
        return str(error)
    finally:
        etcd.close()


# ----------------------------------------------------------------------------------------- the service


def _units() -> tuple[Mapping[str, Unit] | str, int]:
    """The units, and the process id of the daemon, 0 where systemd does not know it."""
    if not Path("/run/systemd/system").is_dir():
        return "systemd does not run here", 0
    names = (doctor.SOCKET, doctor.SERVICE, doctor.DOCKER)
    told = _run("systemctl", "show", "--property=Id,LoadState,UnitFileState,ActiveState,After,NeedDaemonReload,MainPID",
                *names)  # fmt: skip
    if isinstance(told, str):
        return told, 0
    units, pid = {}, 0
    for block in "\n".join(told).split("\n\n"):
        each = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" not in each:
            continue
        units[each["Id"]] = Unit(
            load=each.get("LoadState", ""),
            file=each.get("UnitFileState", ""),
            active=each.get("ActiveState", ""),
            after=frozenset(each.get("After", "").split()),
            reload=each.get("NeedDaemonReload") == "yes",
        )
        if each["Id"] == doctor.SERVICE:
            pid = int(each.get("MainPID", "0"))
    return units, pid


def _is_down(units: Mapping[str, Unit] | str) -> bool:
    service = None if isinstance(units, str) else units.get(doctor.SERVICE)
    return service is not None and service.load == "loaded" and service.active in ("inactive", "failed")


def _run(*command: str) -> list[str] | str:
    """The lines that a command prints; or why there are none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {getattr(error, 'strerror', None) or error}"
    if done.returncode != 0:
        return f"{command[0]}: {' '.join((done.stderr or done.stdout).split())[:200]}"
    return done.stdout.splitlines()


def _process(host: str, peers: Sequence[Peer] | str, pid: int) -> Process | str:
    """The daemon of this host: systemd's, or the one whose heartbeat is in etcd."""
    if not pid and isinstance(peers, str):
        return f"which process it is cannot be told: {peers}"
    if not pid:
        alive = next((each.alive for each in peers if isinstance(each, Peer) and each.name == host), None)
        if alive is None:
            return "no daemon is alive under this host's name"
        here = (_text("/proc/sys/kernel/random/boot_id"), os.readlink("/proc/self/ns/pid"))
        if (alive.boot_id, alive.pid_namespace) != here:
            return "it runs elsewhere, or in a container"
        pid = alive.pid
        if alive.pid_started not in _text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20]:
            return "its process is gone, and its heartbeat has not ended yet"
    status = dict(line.split(":\t", 1) for line in _text(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    if "CapEff" not in status:
        return f"its process, {pid}, is gone, or may not be looked at"
    uid = int(status["Uid"].split()[1])
    groups = {int(status["Gid"].split()[1]), *map(int, status.get("Groups", "").split())}
    return Process(_user(uid), uid, frozenset(groups), int(status["CapEff"], 16))


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _inode(path: str) -> Inode | str:
    try:
        found = os.stat(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return Inode(path, found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))


def _state_dir(path: str) -> doctor.StateDir | str:
    inode = _inode(path)
    if isinstance(inode, str):
        return inode
    disk = os.statvfs(path)
    return doctor.StateDir(inode, bool(disk.f_flag & os.ST_RDONLY), disk.f_bavail * disk.f_frsize)


# ---------------------------------------------------------------------------------------- Docker's side


def _specs() -> list[Spec]:
    """Where Docker looks for a driver, in its order: sockets, then both directories (moby pkg/plugins/discovery.go)."""
    found = []
    for path in (f"/run/docker/plugins/{DRIVER}.sock", f"/run/docker/plugins/{DRIVER}/{DRIVER}.sock"):
        if Path(path).is_socket():
            found.append(Spec(path, f"unix://{path}"))
    for directory in ("/etc/docker/plugins", "/usr/lib/docker/plugins"):
        for ending in (".spec", ".json"):
            for path in (f"{directory}/{DRIVER}{ending}", f"{directory}/{DRIVER}/{DRIVER}{ending}"):
                if Path(path).exists():
                    found.append(Spec(path, _address(path)))
    return found


def _address(path: str) -> str:
    text = _text(path)
    if path.endswith(".spec"):
        return text
    try:
        return str(json.loads(text)["Addr"])
    except (ValueError, KeyError, TypeError):
        return "what cannot be read"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("plugin", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _socket(path: str) -> Socket | str:
    inode = _inode(path)
    if isinstance(inode, str):
        return inode
    if not Path(path).is_socket():
        return f"{path} is no socket"
    try:
        answer = _post(path, "/Plugin.Activate", b"")
        if "IpamDriver" not in answer["Implements"]:
            return Socket(inode, f"it says {answer}")
    except (OSError, http.client.HTTPException) as error:
        return Socket(inode, _why(error))
    except (ValueError, KeyError, TypeError):
        return Socket(inode, "its answer is none of a plugin")
    try:
        body = json.dumps({"Pool": UNKNOWN_POOL, "Options": {"doctor": "asks"}}).encode()
        return Socket(inode, "", str(_post(path, "/IpamDriver.RequestPool", body)["Err"]))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        return Socket(inode, "", f"no answer within {PATIENCE:g} s: {_why(error)}")


def _post(path: str, method: str, body: bytes) -> Any:
    connection = _UnixConnection(path)
    try:
        connection.request("POST", method, body)
        return json.loads(connection.getresponse().read(MOST))
    finally:
        connection.close()


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------------- the LAN


def _links() -> list[Link] | str:
    vlans = {
        words[0]: f"{words[2]} of {words[4]}"
        for line in _text("/proc/net/vlan/config").splitlines()
        if len(words := line.split()) == 5 and words[1] == words[3] == "|"
    }
    return _or_why(
        lambda: [
            Link(each.name, each.kind, each.up, each.carrier, each.master, vlans.get(each.name, ""))
            for each in interfaces.links()
        ]
    )


def _filter(version: int) -> Filter:
    tool = "iptables" if version == 4 else "ip6tables"
    bridged = _text(f"/proc/sys/net/bridge/bridge-nf-call-{tool}") == "1"
    rules = _run(tool, "-S") if bridged else []
    return Filter(bridged, rules if isinstance(rules, str) else tuple(rules))


def _wires(
    config: Config,
    ops: Operations,
    host: str,
    pools: Sequence[Pool],
    peers: Sequence[Peer] | str,
    engine: Installation | str,
) -> list[doctor.Wire] | str:
    if isinstance(peers, str):
        return f"whom to ask there is in etcd: {peers}"
    if not pools:
        return "no Docker network of this host uses the driver yet"
    try:
        wire.require_capability()
        addresses, links = interfaces.addresses(), interfaces.links()
        settings = ops.segments()
    except (IpamError, OSError) as error:
        return str(error)
    own = {each.address for each in addresses}
    looked: list[doctor.Wire] = []
    for pool in {(each.segment, each.subnet): each for each in pools}.values():
        told = config.for_segment(pool.segment)
        found = wire.find_interface(pool.subnet, addresses, links, pool.interface or told.interface or "")
        if isinstance(found, NoInterface):
            looked.append(doctor.Wire(pool.segment, pool.subnet, "", found.reason))
            continue
        shared = settings.get(pool.segment)
        routers = [*(shared.routers() if isinstance(shared, SegmentSettings) else ()), *map(parse_address, told.router)]
        asked = [each for each in dict.fromkeys([*routers, *_addresses(host, pool, peers)]) if each in pool.subnet]
        drivers = {each.driver for each in engine.networks if pool.subnet in each.subnets} if isinstance(
            engine, Installation
        ) else set()  # fmt: skip
        looked.append(_ask(pool, found, [each for each in asked if each not in own], drivers == {"ipvlan"}))
    return looked


def _addresses(host: str, pool: Pool, peers: Sequence[Peer]) -> list[Address]:
    """Those of the other living hosts."""
    return [
        parse_address(each.address)
        for peer in peers
        if peer.alive and peer.host and peer.name != host
        for each in peer.host.addresses
        if not peer.host.segments or pool.segment in peer.host.segments
    ]


def _ask(pool: Pool, interface: str, peers: Sequence[Address], one_mac: bool) -> doctor.Wire:
    """`one_mac`: the containers have the interface's own, so no other one is tried."""
    asked = doctor.Wire(pool.segment, pool.subnet, interface, peers=tuple(map(str, peers)))
    try:
        with Wire(interface) as opened:
            trouble = opened.alive(peers, deadline=time.monotonic() + HEARD)
            own = opened.mac
        known = [each for each in peers if isinstance(each, IPv4Address)]
        if trouble or not known:
            return asked._replace(trouble=trouble)
        probes = wire.hears_as(own, interface, known, deadline=time.monotonic() + HEARD)
        if probes or one_mac:
            return asked._replace(probes=probes)
        mac = made_up_mac()
        strange = wire.hears_as(mac, interface, known, deadline=time.monotonic() + HEARD)
        return asked._replace(mac=mac, strange=strange)
    except ProbeFailed as error:
        return asked._replace(trouble=str(error))


def made_up_mac() -> str:
    """The same at each call, so that a switch which counts MACs counts one; locally administered, as a container's."""
    digest = hashlib.sha256(f"ipam-plugin doctor {_text('/etc/machine-id')}".encode()).digest()
    return (b"\x02" + digest[:5]).hex(":")
