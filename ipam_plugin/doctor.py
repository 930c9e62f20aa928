"""What is wrong with the set-up of a host, and the cure; and what was found in order. Pure.

`check` compares leases; here is asked whether etcd, the engine, the LAN and the service are such that they can be
right. What could not be had is a text that says why, and is told as not checked, never as in order.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ipam_plugin.addresses import Network, address_or_none, parse_network
from ipam_plugin.evidence import AnyNetwork, Installation
from ipam_plugin.model import Alive, Host, Pool

OLDEST_ETCD = (3, 4)
OLDEST_ENGINE = (20, 10)
DRIVER = "ipam-plugin"
CLOCK = 5.0  # seconds between two clocks that count as none: holds and probations are longer
NEARLY_FULL = 0.8  # of etcd's space quota
KEPT = 50_000  # changes that etcd may keep: with compaction every hour, hundreds of containers start in one
LEAST_FREE = 16 << 20  # bytes on the disk of state_dir: the journal's limit, and room for a copy
CAP_NET_RAW = 13  # linux/capability.h
UNKNOWN_OPTION = "unknown option --ipam-opt 'doctor'"  # with which the driver refuses the network that is no network

OK, FOUND, NOT_CHECKED = "ok", "found", "not checked"


class Line(NamedTuple):
    """One thing that was looked at. `cause` and `cure` where something is wrong; where nothing could be told, `what`
    says why."""

    kind: str
    state: str  # OK, FOUND or NOT_CHECKED
    what: str
    cause: str = ""
    cure: str = ""


class Member(NamedTuple):
    """An endpoint of etcd that answers."""

    version: str
    cluster_id: int
    db_size: int  # bytes
    quota: int | None  # bytes; None: it does not tell
    ahead: float | None  # seconds by which its machine's clock is ahead of this one's; None: it does not tell


class Growth(NamedTuple):
    """What only the cluster as a whole can say."""

    alarms: Sequence[str]  # etcd's own: NOSPACE, CORRUPT
    revision: int
    old_kept: bool  # the changes of KEPT ago can still be read


class Layout(NamedTuple):
    """The layout of what stands in etcd."""

    problem: str  # why this version does not understand it, with the cure after the last colon; ''


class Peer(NamedTuple):
    """A host of the register."""

    name: str
    alive: Alive | None
    host: Host | None


class Process(NamedTuple):
    """The daemon of this host, as the kernel has it."""

    user: str
    uid: int
    groups: frozenset[int]  # all of them
    capabilities: int  # CapEff of proc_pid_status(5)


class Inode(NamedTuple):
    """A file or directory. `mode` has the permission bits alone."""

    path: str
    uid: int
    gid: int
    mode: int


class StateDir(NamedTuple):
    inode: Inode
    read_only: bool
    free: int  # bytes that who is not root may use


class Spec(NamedTuple):
    """A file in which Docker would find a driver's socket."""

    path: str
    address: str


class Socket(NamedTuple):
    """The daemon's socket. `trouble`: why it does not answer Plugin.Activate as an IPAM driver, ''. `refusal`: what it
    says to a pool that it must refuse, and does without etcd, as soon as it serves."""

    inode: Inode
    trouble: str
    refusal: str = ""

    @property
    def serves(self) -> bool:
        return not self.trouble and UNKNOWN_OPTION in self.refusal


class Link(NamedTuple):
    """An interface of this host. `master`: the bridge that it is a port of. `vlan`: its 802.1Q number and what it is
    made on, '' for none."""

    name: str
    kind: str  # the kernel's, such as bridge or veth; '' for hardware
    up: bool
    carrier: bool
    master: str
    vlan: str


class Wire(NamedTuple):
    """The LAN of a subnet, as this host has it. What is well is ''; else it is a clause that says why not."""

    segment: str
    subnet: Network
    interface: str  # '' where there is none
    trouble: str = ""  # why there is no interface, or nobody is heard on it
    peers: tuple[str, ...] = ()  # who was asked
    probes: str = ""  # asked in nobody's name, as addresses are tested
    mac: str = ""  # the made-up MAC in whose name was asked as well; '' where that was not done
    strange: str = ""  # asked in its name


class Filter(NamedTuple):
    """How this host treats frames that pass a bridge. `rules` is what `iptables -S` prints."""

    bridged: bool  # net.bridge.bridge-nf-call-iptables
    rules: tuple[str, ...] | str


class Unit(NamedTuple):
    """A systemd unit: LoadState, UnitFileState, ActiveState, After, NeedDaemonReload."""

    load: str
    file: str
    active: str
    after: frozenset[str]
    reload: bool


class Facts(NamedTuple):
    """All that is decided on."""

    host: str
    machine_id: str
    boot_id: str
    version: str  # of the command
    prefix: str
    user: str  # of etcd; '' for none
    socket_path: str  # that the configuration names
    reconcile: bool  # docker.reconcile
    asks: bool  # some segment is asked on the wire, so that raw sockets are needed
    members: Mapping[str, Member | str]
    unread: str  # why nothing can be read though members answer, ''
    growth: Growth | str
    layout: Layout | str
    rights: Mapping[str, str] | str  # part of the register -> '' or etcd's refusal
    peers: Sequence[Peer] | str
    pools: Sequence[Pool]  # that this host uses
    process: Process | str
    docker_socket: Inode | str
    state_dir: StateDir | str
    specs: Sequence[Spec]  # in the order in which Docker looks
    socket: Socket | str | None  # None: it was not asked
    engine: Installation | str
    asked: str  # what the engine said when it was to make a network that the driver must refuse; '' not asked
    wires: Sequence[Wire] | str
    links: Sequence[Link]
    filters: Mapping[int, Filter]  # by IP version
    units: Mapping[str, Unit] | str


def examine(facts: Facts) -> list[Line]:
    """Everything that was looked at, in the order in which one thing needs the other."""
    parts: tuple[Callable[[Facts], Iterable[Line]], ...] = (
        members, clock, growth, layout, rights, versions, names, masks, units, process, state_dir, specs, socket,
        engine, networks, wires, filters,
    )  # fmt: skip
    return [line for part in parts for line in part(facts)]


# ------------------------------------------------------------------------------------------------ etcd


def members(facts: Facts) -> Iterator[Line]:
    """Each endpoint by itself: with two of three away, all seems well."""
    for endpoint, member in facts.members.items():
        if isinstance(member, str):
            yield Line(
                "etcd_away", FOUND, f"etcd at {endpoint} does not answer: {member}",
                "etcd is not running there, a firewall is in between, or address or certificate are wrong",
                f"start etcd there, or correct etcd.endpoints; try from here: etcdctl --endpoints {endpoint} endpoint"
                " health",
            )  # fmt: skip
        elif _numbers(member.version) < OLDEST_ETCD:
            yield Line(
                "etcd_old", FOUND, f"etcd at {endpoint} is version {member.version}",
                "this program is made for etcd 3.4 and newer", f"upgrade etcd at {endpoint}",
            )  # fmt: skip
        else:
            yield Line("etcd", OK, f"etcd at {endpoint} answers, version {member.version}")
    answering = {endpoint: each for endpoint, each in facts.members.items() if isinstance(each, Member)}
    clusters = {each.cluster_id: endpoint for endpoint, each in answering.items()}
    if len(clusters) > 1:
        yield Line(
            "etcd_split", FOUND, f"etcd at {' and at '.join(sorted(clusters.values()))} are not of one cluster",
            "each has a register of its own, so one address can be given twice",
            "name only the members of one cluster in etcd.endpoints, on every host",
        )  # fmt: skip
    if facts.unread:
        yield Line(
            "etcd_no_quorum", FOUND, f"members of etcd answer, and nothing can be read: {facts.unread}",
            "half of the members or more are away, or do not reach each other, so there is no leader",
            f"start those that are away; {_etcdctl(facts)} endpoint status --cluster tells of each",
        )  # fmt: skip


def clock(facts: Facts) -> Iterator[Line]:
    """This host's clock against those of the machines that etcd runs on (the date in their HTTP answers).

    A heartbeat does not carry a time that is refreshed, so hosts are compared through etcd, each by its own doctor.
    """
    ahead = {
        endpoint: each.ahead
        for endpoint, each in facts.members.items()
        if isinstance(each, Member) and each.ahead is not None
    }
    if not ahead:
        yield Line("clock", NOT_CHECKED, "the clock: no member of etcd told its time")
        return
    off = {endpoint: each for endpoint, each in ahead.items() if abs(each) > CLOCK}
    cause = "holds, probations and the rest of a freed address end too early or too late"
    cure = "timedatectl set-ntp true (or chrony, ntpd)"
    if 2 * len(off) > len(ahead):
        worst = max(off.values(), key=abs)
        which = "behind" if worst > 0 else "ahead"
        yield Line(
            "clock_off", FOUND, f"this host's clock is {abs(worst):.0f} s {which}, by etcd at {', '.join(sorted(off))}",
            cause, f"{cure}, on this host",
        )  # fmt: skip
        return
    for endpoint, seconds in off.items():
        yield Line(
            "clock_off", FOUND,
            f"the clock of etcd at {endpoint} is {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}",
            cause, f"{cure}, on that machine",
        )  # fmt: skip
    if not off:
        yield Line("clock", OK, f"the clock agrees with that of {', '.join(ahead)}")


def ahead(date: float, began: float, ended: float) -> float:
    """By how many seconds at least a clock is ahead of this one (less than 0: behind) that told whole seconds `date`
    some time between `began` and `ended` of this one."""
    least, most = date - ended, date + 1 - began
    return 0.0 if least <= 0 <= most else least if least > 0 else most


def growth(facts: Facts) -> Iterator[Line]:
    for endpoint, each in facts.members.items():
        if not isinstance(each, Member):
            continue
        if each.quota is None:
            yield Line("etcd_space", NOT_CHECKED, f"the space of etcd at {endpoint}: it does not tell its quota")
        elif nearly_full(each):
            yield Line(
                "etcd_nearly_full", FOUND,
                f"etcd at {endpoint} has used {_mib(each.db_size)} of {_mib(each.quota)} MiB",
                "old changes are not compacted, the space of compacted ones is not given back, or others use this etcd"
                " too; when it is full, nothing is given out any more",
                f"{_compact(facts)}; etcdctl --endpoints {endpoint} defrag; or a larger ETCD_QUOTA_BACKEND_BYTES there",
            )  # fmt: skip
        else:
            yield Line(
                "etcd_space", OK, f"etcd at {endpoint} uses {_mib(each.db_size)} of {_mib(each.quota)} MiB"
            )  # fmt: skip
    told = facts.growth
    if isinstance(told, str):
        yield Line("etcd_growth", NOT_CHECKED, f"etcd's alarms and compaction: {told}")
        return
    for alarm in sorted(set(told.alarms)):
        full = alarm == "NOSPACE"
        every = ",".join(key for key, each in facts.members.items() if isinstance(each, Member))
        yield Line(
            "etcd_full" if full else "etcd_damaged", FOUND, f"etcd has raised its alarm {alarm}",
            "its database has reached the space quota, and it refuses every write"
            if full
            else "the data of one member differ from the others'",
            f"{_compact(facts)}; etcdctl --endpoints {every} defrag; etcdctl --endpoints {every} alarm disarm"
            if full
            else "replace that member: etcdctl member remove, then member add with an empty data directory",
        )  # fmt: skip
    if told.old_kept:
        yield Line(
            "etcd_not_compacted", FOUND, f"etcd keeps more than the last {KEPT} changes, and so grows without end",
            "automatic compaction is off, as it is by default",
            f"ETCD_AUTO_COMPACTION_RETENTION=1 in /etc/default/etcd of each member, then restart them one after the"
            f" other; what is kept now goes with: {_compact(facts)}",
        )  # fmt: skip
    elif not told.alarms:
        yield Line("etcd_growth", OK, f"etcd has no alarms and keeps fewer than {KEPT} old changes")


def nearly_full(member: Member | str) -> bool:
    return isinstance(member, Member) and member.quota is not None and member.db_size > NEARLY_FULL * member.quota


def _compact(facts: Facts) -> str:
    revision = facts.growth.revision if isinstance(facts.growth, Growth) else "REVISION"
    return f"{_etcdctl(facts)} compact {revision}"


def _etcdctl(facts: Facts) -> str:
    """For a member that answers."""
    return f"etcdctl --endpoints {next(key for key, each in facts.members.items() if isinstance(each, Member))}"


def layout(facts: Facts) -> Iterator[Line]:
    if isinstance(facts.layout, str):
        yield Line("schema", NOT_CHECKED, f"the version of the register: {facts.layout}")
    elif facts.layout.problem:
        what, _, cure = facts.layout.problem.rpartition(": ")
        yield Line(
            "schema_unknown", FOUND, what,
            "another host was upgraded first, or somebody edited that key; daemon and commands of this version write"
            " nothing",
            cure,
        )  # fmt: skip
    else:
        yield Line("schema", OK, "this version understands the register")


def rights(facts: Facts) -> Iterator[Line]:
    if isinstance(facts.rights, str):
        yield Line("etcd_rights", NOT_CHECKED, f"the rights in etcd: {facts.rights}")
        return
    who = f"user {facts.user}" if facts.user else "this host (by its certificate, or as nobody)"
    refused = {part: reason for part, reason in facts.rights.items() if reason}
    if not refused:
        yield Line("etcd_rights", OK, f"{who} may read and write all below {facts.prefix}")
        return
    reason = next(iter(refused.values()))
    role = f"ROLE readwrite {facts.prefix} --prefix=true"
    yield Line(
        "etcd_rights", FOUND,
        f"{who} may not read and write {', '.join(sorted(refused))} below {facts.prefix}: {reason}",
        "etcd has authentication turned on, and the role lacks these keys",
        f"etcdctl role grant-permission {role}, with a role of that user (etcdctl user get {facts.user or 'NAME'})",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- the hosts


def versions(facts: Facts) -> Iterator[Line]:
    if isinstance(facts.peers, str):
        yield Line("versions", NOT_CHECKED, f"the daemons' versions: {facts.peers}")
        return
    running = {each.name: each.alive.version for each in facts.peers if each.alive and each.alive.version}
    own = running.get(facts.host)
    if own is not None and own != facts.version:
        yield Line(
            "daemon_outdated", FOUND, f"the daemon of this host runs version {own}, this command is {facts.version}",
            "it was not restarted after an upgrade, or there are two installations",
            "systemctl restart ipam-plugin.service",
        )  # fmt: skip
    newest = max(running.values(), key=_numbers, default="")
    behind = {name: version for name, version in running.items() if version != newest and name != facts.host}
    if own is not None and own == facts.version and own != newest:
        behind[facts.host] = own
    if behind:
        told = ", ".join(f"{name} {version}" for name, version in sorted(behind.items()))
        yield Line(
            "versions_differ", FOUND, f"not all daemons run version {newest}: {told}",
            "an upgrade was not finished; versions that lie far apart are tested with nobody",
            f"upgrade and restart the daemon on {', '.join(sorted(behind))}",
        )  # fmt: skip
    elif running:
        yield Line("versions", OK, f"all {len(running)} living daemons run version {newest}")


def names(facts: Facts) -> Iterator[Line]:
    if isinstance(facts.peers, str):
        yield Line("names", NOT_CHECKED, f"the hosts' names: {facts.peers}")
        return
    found = False
    for each in facts.peers:
        alive = each.alive
        if each.name == facts.host and alive and (alive.machine_id, alive.boot_id) != (facts.machine_id, facts.boot_id):
            found = True
            same = "of the same machine id" if alive.machine_id == facts.machine_id else "with another machine id"
            yield Line(
                "name_twice", FOUND, f"another machine, {same}, runs the daemon of host {facts.host} now",
                "this machine was cloned, or two have one host name; the later daemon does not serve",
                f"give this one another name, `host: NAME` in its configuration, remove {facts.host} from its state_dir"
                " (the file host), and restart the daemon",
            )  # fmt: skip
    ids: dict[str, list[str]] = {}
    for each in facts.peers:
        if each.host and each.host.machine_id:
            ids.setdefault(each.host.machine_id, []).append(each.name)
    for machine_id, those in sorted(ids.items()):
        if len(those) > 1:
            found = True
            yield Line(
                "machine_id_twice", FOUND, f"hosts {', '.join(sorted(those))} have the same machine id, {machine_id}",
                "one of them was cloned from another (or has got a new name)",
                "on the clone: rm /etc/machine-id; systemd-machine-id-setup; restart its daemon; a name that is no"
                " host's any more: ipam-plugin host retire NAME",
            )  # fmt: skip
    if not found:
        yield Line("names", OK, f"no other machine has this host's name, {facts.host}, or machine id")


def masks(facts: Facts) -> Iterator[Line]:
    """Hosts that do not agree on the subnet of a LAN do not reach each other directly, or not the containers."""
    if isinstance(facts.peers, str):
        yield Line("masks", NOT_CHECKED, f"the hosts' masks: {facts.peers}")
        return
    for subnet, segment in dict.fromkeys((each.subnet, each.segment) for each in facts.pools):
        count, found = 0, False
        for peer in facts.peers:
            for each in peer.host.addresses if peer.host else ():
                address = address_or_none(each.address)
                if address is None or address not in subnet or each.prefixlen == address.max_prefixlen:
                    continue
                if peer.host and peer.host.segments and segment not in peer.host.segments:
                    continue
                count += 1
                if each.prefixlen != subnet.prefixlen:
                    found = True
                    right, wrong = (f"{each.address}/{length}" for length in (subnet.prefixlen, each.prefixlen))
                    yield Line(
                        "mask_differs", FOUND, f"{each.interface} of host {peer.name} carries {wrong}, and Docker's"
                        f" network is {subnet}",
                        "machines with different masks on one LAN take some neighbours for strangers behind a router",
                        f"on {peer.name}: ip address add {right} dev {each.interface}; ip address del {wrong} dev"
                        f" {each.interface}, and the same in its network configuration. Or, where the LAN is really"
                        f" /{each.prefixlen}: make the network with that --subnet, and --ip-range {subnet}",
                    )  # fmt: skip
        if count and not found:
            yield Line("masks", OK, f"all hosts have the mask of {subnet}")


# ----------------------------------------------------------------------------------------- the service

SERVICE, SOCKET, DOCKER = "ipam-plugin.service", "ipam-plugin.socket", "docker.service"


def units(facts: Facts) -> Iterator[Line]:
    if isinstance(facts.units, str):
        yield Line("units", NOT_CHECKED, f"the systemd units: {facts.units}")
        return
    missing = [name for name in (SOCKET, SERVICE) if _unit(facts, name).load != "loaded"]
    if missing:
        yield Line(
            "unit_missing", FOUND, f"systemd does not know {' and '.join(missing)}",
            "the program was not installed as a service", "ipam-plugin install",
        )  # fmt: skip
        return
    wrong = list(_units(facts))
    yield from wrong
    if not wrong:
        yield Line("units", OK, f"{SOCKET} and {SERVICE} are enabled and run, and Docker starts after them")


def _units(facts: Facts) -> Iterator[Line]:
    changed = [name for name in (SOCKET, SERVICE, DOCKER) if _unit(facts, name).reload]
    if changed:
        yield Line(
            "unit_changed", FOUND, f"{' and '.join(changed)} changed on disk, and systemd goes by what was there",
            "a unit or a drop-in was edited", f"systemctl daemon-reload; systemctl restart {SERVICE}",
        )  # fmt: skip
    off = [name for name in (SOCKET, SERVICE) if _unit(facts, name).file not in ("enabled", "enabled-runtime", "alias")]
    if off:
        yield Line(
            "unit_disabled", FOUND, f"{' and '.join(off)} is not started at boot",
            "it was not enabled; after a reboot no container would start", f"systemctl enable {' '.join(off)}",
        )  # fmt: skip
    # One that is being started again was asked a moment too early.
    down = [name for name in (SOCKET, SERVICE) if _unit(facts, name).active not in ("active", "reloading")]
    if down:
        yield Line(
            "unit_stopped", FOUND, f"{' and '.join(down)} does not run",
            "it was stopped, or does not start: journalctl -u ipam-plugin says why",
            f"systemctl start {' '.join(down)}",
        )  # fmt: skip
    docker = _unit(facts, DOCKER)
    if docker.load == "loaded" and not {SOCKET, SERVICE} <= docker.after:
        yield Line(
            "unit_order", FOUND, f"{DOCKER} does not wait for {' and '.join(sorted({SOCKET, SERVICE} - docker.after))}",
            "Before=docker.service is not in the units; at boot Docker starts its containers once, too early",
            "ipam-plugin install puts units in place that have it, where those there are unchanged; else write"
            f" Before={DOCKER} into [Unit] of the ones named; systemctl daemon-reload",
        )  # fmt: skip


def _unit(facts: Facts, name: str) -> Unit:
    assert not isinstance(facts.units, str)
    return facts.units.get(name, Unit("not-found", "", "inactive", frozenset(), False))


def process(facts: Facts) -> Iterator[Line]:
    """The rights of the daemon as it runs, which a unit or a group may have promised otherwise."""
    running = facts.process
    if isinstance(running, str):
        yield Line("daemon_rights", NOT_CHECKED, f"the daemon's rights: {running}")
        return
    if not facts.asks:
        yield Line("raw_sockets", OK, "nothing is asked on the wire (probe: off), so raw sockets are not needed")
    elif running.capabilities >> CAP_NET_RAW & 1:
        yield Line("raw_sockets", OK, f"the daemon, user {running.user}, may open raw sockets")
    else:
        yield Line(
            "no_raw_sockets", FOUND, f"the daemon, user {running.user}, lacks the capability CAP_NET_RAW",
            "without raw sockets no address is tested before it is given",
            "AmbientCapabilities=CAP_NET_RAW and CapabilityBoundingSet=CAP_NET_RAW in the unit, as `ipam-plugin"
            " install` writes it (systemctl cat ipam-plugin shows what changes it); systemctl daemon-reload; systemctl"
            " restart ipam-plugin. Or probe: off",
        )  # fmt: skip
    there = facts.docker_socket
    if not facts.reconcile:
        yield Line("docker_socket", OK, "docker.reconcile is off, so the daemon does not need Docker's socket")
    elif isinstance(there, str):
        yield Line("docker_socket", NOT_CHECKED, f"the daemon's access to Docker's socket: {there}")
    elif may(running, there, 0o6):
        yield Line("docker_socket", OK, f"the daemon may use Docker's socket, {there.path}")
    else:
        yield Line(
            "docker_socket_closed", FOUND, f"the daemon, user {running.user}, may not use {there.path}",
            "it is not in the group of that socket, or was not restarted since it is; leases that Docker lost stay",
            f"usermod --append --groups docker {running.user}; systemctl restart ipam-plugin. Or docker.reconcile:"
            " false (access to Docker's socket equals root)",
        )  # fmt: skip


def may(process: Process, inode: Inode, right: int) -> bool:
    """Whether a process has a right (4 read, 2 write, 1 enter; all of them) by the mode, as path_resolution(7) says."""
    if process.uid == 0:
        return True
    if process.uid == inode.uid:
        granted = inode.mode >> 6
    elif inode.gid in process.groups:
        granted = inode.mode >> 3
    else:
        granted = inode.mode
    return granted & right == right


def state_dir(facts: Facts) -> Iterator[Line]:
    there = facts.state_dir
    if isinstance(there, str):
        yield Line("state_dir", NOT_CHECKED, f"state_dir: {there}")
        return
    path = there.inode.path
    running = facts.process
    cause = "the journal of what happens while etcd is away is kept there, and nothing is given without it"
    if there.read_only:
        yield Line(
            "state_dir_read_only", FOUND, f"state_dir {path} is on a file system that is read-only", cause,
            f"mount -o remount,rw {path} (dmesg says why it is)",
        )  # fmt: skip
    elif there.free < LEAST_FREE:
        yield Line(
            "state_dir_full", FOUND, f"the disk of state_dir {path} has {_mib(there.free)} MiB left", cause,
            f"make room on it: df {path}",
        )  # fmt: skip
    elif isinstance(running, Process) and not may(running, there.inode, 0o7):
        yield Line(
            "state_dir_closed", FOUND, f"the daemon, user {running.user}, may not write to state_dir {path}", cause,
            f"chown -R {running.user}: {path}; chmod 700 {path}",
        )  # fmt: skip
    else:
        yield Line("state_dir", OK, f"state_dir {path} can be written to")


# ------------------------------------------------------------------------------- as Docker sees the driver


def specs(facts: Facts) -> Iterator[Line]:
    """Docker takes the first that it finds, and never looks at the others."""
    wanted = f"unix://{facts.socket_path}"
    if not facts.specs:
        yield Line(
            "spec_missing", FOUND, f"Docker finds no driver {DRIVER}: there is no file for it in /etc/docker/plugins or"
            " /usr/lib/docker/plugins",
            "the program was not installed on this host",
            f"ipam-plugin install; or: echo {wanted} >/etc/docker/plugins/{DRIVER}.spec",
        )  # fmt: skip
        return
    first, *others = facts.specs
    if first.address != wanted:
        yield Line(
            "spec_elsewhere", FOUND, f"{first.path}, by which Docker finds the driver, says {first.address}, and the"
            f" daemon's socket is {facts.socket_path}",
            "the file is another program's or another version's, or `socket` was changed",
            f"echo {wanted} >{first.path}; systemctl restart docker"
            if first.path.endswith(".spec")
            else f"rm {first.path}; ipam-plugin install; systemctl restart docker",
        )  # fmt: skip
    differing = [each for each in others if each.address != first.address]
    if differing:
        told = ", ".join(f"{each.path} ({each.address})" for each in differing)
        yield Line(
            "spec_twice", FOUND, f"Docker could find the driver {DRIVER} in more than one file: {first.path}"
            f" ({first.address}), which it takes, and {told}",
            "two installations, or a file that was left", f"rm {' '.join(each.path for each in differing)}",
        )  # fmt: skip
    if first.address == wanted and not differing:
        yield Line("spec", OK, f"Docker finds the driver by {first.path}")


def socket(facts: Facts) -> Iterator[Line]:
    there = facts.socket
    if there is None:
        yield Line("socket", NOT_CHECKED, f"the socket {facts.socket_path}: the service does not run, see above")
        return
    if isinstance(there, str):
        yield Line(
            "socket_missing", FOUND, f"there is no socket {facts.socket_path} for Docker to ask: {there}",
            "the daemon or its socket unit does not run", f"systemctl start {SOCKET} {SERVICE}",
        )  # fmt: skip
        return
    if there.inode.mode & 0o077:
        yield Line(
            "socket_open", FOUND,
            f"{there.inode.path} may be used by others than its owner (mode {there.inode.mode:04o})",
            "whoever may connect can take and give away every address",
            f"chmod 600 {there.inode.path}; SocketMode=0600 in {SOCKET}",
        )  # fmt: skip
    if there.trouble:
        yield Line(
            "socket_silent", FOUND, f"{there.inode.path} does not answer as an IPAM driver: {there.trouble}",
            "the daemon does not run, hangs, or another program has the socket",
            f"systemctl restart {SERVICE}; journalctl -u ipam-plugin",
        )  # fmt: skip
    elif not there.serves:
        yield Line(
            "not_serving", FOUND, f"the daemon answers, and refuses every request: {there.refusal}",
            "as it says itself: etcd, this host's name, the version of the register, or etcd has just been restored",
            "what it says, and what is wrong with etcd and with the name of this host, above; else journalctl -u"
            " ipam-plugin",
        )  # fmt: skip
    elif not there.inode.mode & 0o077:
        yield Line("socket", OK, f"{there.inode.path} answers, and is its owner's alone")


def engine(facts: Facts) -> Iterator[Line]:
    there = facts.engine
    if isinstance(there, str):
        yield Line(
            "docker_away", FOUND, there, "Docker is not running, or docker.socket names another file",
            "systemctl start docker; else correct docker.socket",
        )  # fmt: skip
        return
    if _numbers(there.version) < OLDEST_ENGINE:
        yield Line(
            "docker_old", FOUND, f"Docker Engine is version {there.version}",
            "the driver has been tried with 20.10 and newer", "upgrade Docker Engine",
        )  # fmt: skip
    else:
        yield Line("docker", OK, f"Docker Engine answers, version {there.version}")
    if not facts.asked:
        yield Line("driver", NOT_CHECKED, f"whether the engine reaches the driver {DRIVER}: see what is wrong above")
    elif UNKNOWN_OPTION in facts.asked:
        yield Line("driver", OK, f"the engine reaches the driver {DRIVER}")
    else:
        yield Line(
            "driver_unreachable", FOUND, f"the engine does not reach the driver {DRIVER}: {facts.asked}",
            "the engine goes by a file that was there before, or another program has the name",
            "systemctl restart docker",
        )  # fmt: skip


def networks(facts: Facts) -> Iterator[Line]:
    """Another driver counts its addresses by itself, and gives out those that the register has given already."""
    if isinstance(facts.engine, str):
        yield Line("networks", NOT_CHECKED, "Docker's networks: Docker does not answer")
        return
    ours = [each for each in facts.engine.networks if each.ipam == DRIVER]
    lans = [*_subnets(ours), *(each.subnet for each in facts.pools)]
    found = False
    for each in facts.engine.networks:
        overlapping = {str(lan) for own in _subnets([each]) for lan in lans if _overlap(own, lan)}
        if each.ipam != DRIVER and overlapping:
            found = True
            yield Line(
                "other_driver", FOUND, f"network {each.name} has its addresses from IPAM driver {each.ipam}, and lies"
                f" in {', '.join(sorted(overlapping))}",
                "it was made without --ipam-driver ipam-plugin, and gives out addresses that others have",
                f"ipam-plugin adopt {each.name} says how it is switched over without a change of addresses; or remove"
                f" its containers; docker network rm {each.name}; make it again with --ipam-driver {DRIVER}",
            )  # fmt: skip
    if not ours:
        yield Line("networks", NOT_CHECKED, f"Docker's networks: none has the driver {DRIVER} yet")
    elif not found:
        yield Line("networks", OK, f"networks with the driver: {', '.join(sorted(each.name for each in ours))}")


def _subnets(networks: Iterable[AnyNetwork]) -> list[Network]:
    return [subnet for each in networks for subnet in each.subnets]


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


# ---------------------------------------------------------------------------------------------- the LAN


def wires(facts: Facts) -> Iterator[Line]:
    """That silence on the wire means free, and that frames of containers come and go, is shown and not believed."""
    if isinstance(facts.wires, str):
        yield Line("wire", NOT_CHECKED, f"the LAN: {facts.wires}")
        return
    for each in facts.wires:
        where = f"{each.subnet} (segment {each.segment})"
        if not each.interface:
            yield Line(
                "no_interface", FOUND, f"{where} is on no interface of this host: {each.trouble}",
                "its addresses are given untested, or refused (probe_failure)",
                f"ip address add ADDRESS/{each.subnet.prefixlen} dev {_bridge_of(facts, each.subnet) or 'INTERFACE'},"
                " with the address that this host has there; or the right `interface` in the configuration",
            )  # fmt: skip
        elif each.trouble:
            yield Line(
                "wire_dead", FOUND, f"the LAN of {where} cannot be heard: {each.trouble}",
                "silence there does not mean that an address is free, and containers reach nobody",
                _connect(each.interface, facts.links),
            )  # fmt: skip
        elif not each.peers:
            yield Line(
                "wire", NOT_CHECKED, f"the LAN of {where} at {each.interface}: nobody is known there who could answer;"
                f" name the router: ipam-plugin segment {each.segment} --router ROUTER",
            )  # fmt: skip
        elif each.probes:
            yield Line(
                "probes_refused", FOUND, f"the LAN of {where} answers {each.interface}, but no ARP probe, which is"
                f" asked in nobody's name (sender 0.0.0.0): {each.probes}",
                "the switch's ARP inspection takes it for a forgery; so every address looks free",
                "let probes pass (Cisco: ip arp inspection validate ip allow zeros)",
            )  # fmt: skip
        elif each.strange:
            yield Line(
                "mac_refused", FOUND, f"the LAN of {where} answers {each.interface} itself, and not a MAC such as a"
                f" container's ({each.mac}): {each.strange}",
                "port security of the switch, or the virtual switch that this machine is on, lets one MAC through only",
                "allow as many MACs as the host has containers at that port; VMware: promiscuous mode, MAC address"
                " changes and forged transmits accepted; Hyper-V: MAC address spoofing; libvirt, Proxmox: no MAC filter"
                " on that card. Where that cannot be: ipvlan instead of a bridge or macvlan",
            )  # fmt: skip
        else:
            also = f", also a made-up MAC ({each.mac})" if each.mac else ""
            yield Line("wire", OK, f"the LAN of {where} answers at {each.interface}{also}")


def _bridge_of(facts: Facts, subnet: Network) -> str:
    if isinstance(facts.engine, str):
        return ""
    own = (each for each in facts.engine.networks if each.ipam == DRIVER and each.driver == "bridge")
    return next((each.bridge for each in own if subnet in each.subnets), "")


def _connect(interface: str, links: Sequence[Link]) -> str:
    """What to do about an interface on which nobody is heard, as far as this host itself can tell."""
    link = next((each for each in links if each.name == interface), None)
    if link is not None and not link.up:
        return f"ip link set {interface} up"
    ports = [each for each in links if each.master == interface]
    if link is not None and link.kind == "bridge":
        if not ports:
            return f"ip link set NIC master {interface}, with the network card that leads to the LAN"
        if not all(each.up for each in ports):
            return "; ".join(f"ip link set {each.name} up" for each in ports if not each.up)
    below = [each.name for each in ports if not each.carrier] or [interface]
    tagged = f"VLAN {link.vlan}, tagged" if link is not None and link.vlan else "its VLAN untagged"
    return (
        f"the cable at {', '.join(below)}; the port of the switch: it has to carry {tagged}, and to forward (spanning"
        " tree); the machines named, if they are off"
    )


def filters(facts: Facts) -> Iterator[Line]:
    """What the host's firewall does with frames that only pass a bridge from port to port."""
    if isinstance(facts.engine, str):
        yield Line("bridge_filter", NOT_CHECKED, "the firewall on bridges: Docker's networks are not known")
        return
    for each in facts.engine.networks:
        if each.ipam != DRIVER or each.driver != "bridge":
            continue
        for subnet in each.subnets:
            yield from _filtered(facts, each, subnet)


def _filtered(facts: Facts, network: AnyNetwork, subnet: Network) -> Iterator[Line]:
    told = facts.filters.get(subnet.version)
    bridge, tool = network.bridge, "iptables" if subnet.version == 4 else "ip6tables"
    if told is None or not told.bridged:
        yield Line("bridge_filter", OK, f"no firewall looks at what passes bridge {bridge} (IPv{subnet.version})")
    elif isinstance(told.rules, str):
        yield Line("bridge_filter", NOT_CHECKED, f"the firewall on bridge {bridge}: {told.rules}")
    elif dropped := drops(told.rules, bridge, subnet):
        chain = "DOCKER-USER" if any(rule.startswith("-A FORWARD -j DOCKER-USER") for rule in told.rules) else "FORWARD"
        yield Line(
            "bridge_filtered", FOUND, f"the firewall drops what passes bridge {bridge} between containers and the LAN:"
            f" {tool} {dropped}",
            f"net.bridge.bridge-nf-call-{tool} is 1, and no rule lets the bridge's own frames through (network"
            f" {network.name} with enable_icc=false, or a firewall program)",
            f"{tool} -I {chain} -i {bridge} -o {bridge} -j ACCEPT, at each boot; or sysctl -w"
            f" net.bridge.bridge-nf-call-{tool}=0",
        )  # fmt: skip
    else:
        yield Line("bridge_filter", OK, f"the firewall lets pass what passes bridge {bridge} (IPv{subnet.version})")


def drops(rules: Sequence[str], bridge: str, subnet: Network) -> str:
    """The rule, or the policy, of the filter table that ends the first frame of a connection from one port of a bridge
    to another within a subnet; '' when it is let through.

    `rules` as `iptables -S` prints them. A rule that has a condition which such a frame need not meet is passed over.
    """
    chains: dict[str, list[str]] = {}
    policy = "ACCEPT"
    for rule in rules:
        words = rule.split()
        if words[:2] == ["-P", "FORWARD"]:
            policy = words[2]
        elif words[:1] == ["-A"]:
            chains.setdefault(words[1], []).append(rule)
    verdict = _walk(chains, "FORWARD", bridge, subnet, frozenset())
    if verdict is None:
        return "" if policy == "ACCEPT" else f"-P FORWARD {policy}"
    target, rule = verdict
    return "" if target == "ACCEPT" else rule


def _walk(
    chains: Mapping[str, Sequence[str]], chain: str, bridge: str, subnet: Network, above: frozenset[str]
) -> tuple[str, str] | None:
    """The target that decides, and its rule; None: the end of the chain is reached."""
    for rule in chains.get(chain, ()):
        target = _target(rule, bridge, subnet)
        if target in ("ACCEPT", "DROP", "REJECT"):
            return target, rule
        if target == "RETURN":
            return None
        if target in chains and target not in above:
            verdict = _walk(chains, target, bridge, subnet, above | {chain})
            if verdict is not None:
                return verdict
    return None


def _target(rule: str, bridge: str, subnet: Network) -> str:
    """Where a rule of iptables sends such a frame for sure; ''."""
    words = iter(shlex.split(rule)[2:])
    target, negated = "", False
    for word in words:
        if word == "!":
            negated = True
            continue
        holds = True
        match word:
            case "-j" | "-g":
                target = next(words, "")
            case "-i" | "-o":
                name = next(words, "")
                holds = bridge == name or (name.endswith("+") and bridge.startswith(name[:-1]))
            case "-s" | "-d":
                inside = _inside(subnet, next(words, ""))
                if inside is None:
                    return ""
                holds = inside
            case "-m" | "--comment":
                next(words, "")
            case "--ctstate" | "--state":
                holds = "NEW" in next(words, "").split(",")
            case "--physdev-is-bridged":
                pass
            case _ if target and word.startswith("--"):
                next(words, "")  # of the target, such as --reject-with
            case _:
                return ""
        if holds == negated:
            return ""
        negated = False
    return target


def _inside(subnet: Network, text: str) -> bool | None:
    """Whether all addresses of a subnet are in a network (True), or none is (False); None: some, or it is none."""
    try:
        network = parse_network(text if "/" in text else f"{text}/{subnet.max_prefixlen}")
    except ValueError:
        return None
    if not _overlap(network, subnet):
        return False
    return True if network.prefixlen <= subnet.prefixlen else None


# ---------------------------------------------------------------------------------------------- words


def _numbers(version: str) -> tuple[int, ...]:
    """A version for comparing: 20.10.24+dfsg1 is (20, 10, 24). What is none is older than all."""
    numbers = []
    for part in version.split("."):
        digits = part[: next((n for n, letter in enumerate(part) if not letter.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits[:9]))  # anybody may have written it
        if digits != part:
            break
    return tuple(numbers)


def _mib(size: int) -> int:
    return round(size / (1 << 20))


def summary(lines: Sequence[Line]) -> str:
    """How it ended, for people."""
    counts = Counter(line.state for line in lines)
    return f"{counts[FOUND]} found, {counts[OK]} in order, {counts[NOT_CHECKED]} not checked"
