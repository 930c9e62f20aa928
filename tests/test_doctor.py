"""What doctor decides: a fault of each kind is told once, naming what it is about, and a host in order has none."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import properties  # noqa: F401  # hypothesis' settings
from ipam_plugin import doctor
from ipam_plugin.doctor import (
    FOUND,
    KEPT,
    NOT_CHECKED,
    OK,
    Facts,
    Filter,
    Growth,
    Inode,
    Layout,
    Line,
    Link,
    Member,
    Peer,
    Process,
    Socket,
    Spec,
    StateDir,
    Unit,
    Wire,
    ahead,
    drops,
    examine,
    may,
)
from ipam_plugin.evidence import AnyNetwork, Installation
from ipam_plugin.model import Alive, Host, HostAddress, Pool
from ipam_plugin.schema import judge
from tests.lab.node import ROOT

LAN = ipaddress.ip_network("192.168.77.0/24")
LAN6 = ipaddress.ip_network("fd00:77::/64")
POOL = Pool.make(str(LAN), "", {}, "default")
PATH = "/run/ipam-plugin/ipam-plugin.sock"
NET = AnyNetwork("lan", "bridge", "ipam-plugin", (LAN,), "br0")
PLAIN = AnyNetwork("bridge", "bridge", "default", (ipaddress.ip_network("172.17.0.0/16"),), "docker0")
REFUSAL = f"{doctor.UNKNOWN_OPTION}; known are …"
BOTH = frozenset({"ipam-plugin.service", "ipam-plugin.socket", "network.target"})
# As Docker 20.10 leaves them with a network on br0, and as it leaves them with enable_icc=false.
RULES = (
    "-P INPUT ACCEPT", "-P FORWARD DROP", "-P OUTPUT ACCEPT", "-N DOCKER", "-N DOCKER-USER", "-N DOCKER-ISO",
    "-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-ISO",
    "-A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A FORWARD -o br0 -j DOCKER",
    "-A FORWARD -i br0 ! -o br0 -j ACCEPT", "-A FORWARD -i br0 -o br0 -j ACCEPT",
    "-A DOCKER-ISO -i br0 ! -o br0 -j DROP", "-A DOCKER-ISO -j RETURN", "-A DOCKER-USER -j RETURN",
)  # fmt: skip
ICC_OFF = tuple(rule.replace("-i br0 -o br0 -j ACCEPT", "-i br0 -o br0 -j DROP") for rule in RULES)


def member(**changes: Any) -> Member:
    return Member("3.4.23", 7, 20 << 20, 2048 << 20, 0.0)._replace(**changes)


def peer(number: int, prefixlen: int = 24, **alive: Any) -> Peer:
    name = f"host{number}"
    values = {"host": name, "machine_id": f"m{number}", "boot_id": f"b{number}", "process": "p", "version": "1.0"}
    addresses = (
        HostAddress(f"192.168.77.{10 + number}", prefixlen, "br0"),
        HostAddress("172.17.0.1", 16, "docker0"),
        HostAddress("192.168.77.250", 32, "lo"),  # keepalived's
    )
    return Peer(name, Alive(**(values | alive)), Host(name, machine_id=f"m{number}", addresses=addresses))


UNIT = Unit("loaded", "enabled", "active", frozenset(), False)
WELL = Facts(
    host="host1",
    machine_id="m1",
    boot_id="b1",
    version="1.0",
    prefix="/ipam-plugin/v1/",
    user="",
    socket_path=PATH,
    reconcile=True,
    asks=True,
    members={f"http://e{n}:2379": member() for n in (1, 2, 3)},
    unread="",
    growth=Growth((), 4711, False),
    layout=Layout(""),
    rights=dict.fromkeys(("leases", "hosts"), ""),
    peers=[peer(1), peer(2), peer(3)],
    pools=[POOL],
    process=Process("ipam-plugin", 999, frozenset({999, 100}), 1 << 13),
    docker_socket=Inode("/run/docker.sock", 0, 100, 0o660),
    state_dir=StateDir(Inode("/var/lib/ipam-plugin", 999, 999, 0o700), False, 1 << 30),
    specs=[Spec("/etc/docker/plugins/ipam-plugin.spec", f"unix://{PATH}")],
    socket=Socket(Inode(PATH, 0, 0, 0o600), "", REFUSAL),
    engine=Installation("20.10.24+dfsg1", (NET, PLAIN)),
    asked=f"IpamDriver.RequestPool: {REFUSAL}",
    wires=[Wire("default", LAN, "br0", peers=("192.168.77.254",), mac="02:11:22:33:44:55")],
    links=[Link("eth0", "", True, True, "br0", ""), Link("br0", "bridge", True, True, "", "")],
    filters={4: Filter(True, RULES), 6: Filter(False, ())},
    units={
        "ipam-plugin.service": UNIT,
        "ipam-plugin.socket": UNIT,
        "docker.service": UNIT._replace(after=BOTH),
    },
)


def with_wire(**changes: Any) -> Facts:
    return WELL._replace(wires=[WELL.wires[0]._replace(**changes)])  # type: ignore[union-attr]


def with_member(**changes: Any) -> Facts:
    return WELL._replace(members={**WELL.members, "http://e2:2379": member(**changes)})


def with_unit(name: str, **changes: Any) -> Facts:
    assert not isinstance(WELL.units, str)
    return WELL._replace(units={**WELL.units, name: WELL.units[name]._replace(**changes)})


def cloned() -> Facts:
    twin = peer(2)
    assert twin.host is not None
    return WELL._replace(peers=[peer(1), twin._replace(host=msgspec.structs.replace(twin.host, machine_id="m1"))])


# kind, a host with this fault, what the line must name, and what its cure must say
FAULTS: list[tuple[str, Facts, str, str]] = [
    ("etcd_away", WELL._replace(members={**WELL.members, "http://e2:2379": "refused"}), "http://e2:2379", "e2:2379"),
    ("etcd_old", with_member(version="3.3.25"), "3.3.25", "upgrade"),
    ("etcd_split", with_member(cluster_id=8), "http://e2:2379", "one cluster"),
    ("etcd_no_quorum", WELL._replace(unread="no answer"), "no answer", "etcdctl --endpoints http://e1:2379 endpoint"),
    ("clock_off", with_member(ahead=60.0), "http://e2:2379 is 60 s ahead", "on that machine"),
    (
        "clock_off",
        WELL._replace(members={each: member(ahead=-90.0) for each in WELL.members}),
        "this host's clock is 90 s ahead",
        "on this host",
    ),
    ("etcd_nearly_full", with_member(db_size=1900 << 20), "1900 of 2048 MiB", "--endpoints http://e2:2379 defrag"),
    ("etcd_full", WELL._replace(growth=Growth(("NOSPACE", "NOSPACE"), 4711, False)), "NOSPACE", "alarm disarm"),
    ("etcd_damaged", WELL._replace(growth=Growth(("CORRUPT",), 4711, False)), "CORRUPT", "member remove"),
    ("etcd_not_compacted", WELL._replace(growth=Growth((), 99_999, True)), str(KEPT), "compact 99999"),
    (
        "schema_unknown",
        WELL._replace(layout=Layout(judge("/p/schema", b'{"version":2,"written_by":"9.0.0"}'))),
        "schema version 2, written by ipam-plugin 9.0.0",
        "install that ipam-plugin",
    ),
    (
        "etcd_rights",
        WELL._replace(user="ipam", rights={"leases": "", "hosts": "etcdserver: permission denied"}),
        "user ipam may not read and write hosts",
        "readwrite /ipam-plugin/v1/ --prefix=true",
    ),
    ("daemon_outdated", WELL._replace(peers=[peer(1, version="0.9")]), "0.9", "systemctl restart ipam-plugin"),
    ("versions_differ", WELL._replace(peers=[peer(1), peer(2, version="0.9.9")]), "host2 0.9.9", "on host2"),
    (
        "versions_differ",
        WELL._replace(peers=[peer(1), peer(2, version="1.10"), peer(3, version="1.9")]),
        "version 1.10: host1 1.0, host3 1.9",
        "host1, host3",
    ),
    ("name_twice", WELL._replace(peers=[peer(1, machine_id="m9")]), "with another machine id", "`host: NAME`"),
    ("name_twice", WELL._replace(peers=[peer(1, boot_id="b9")]), "of the same machine id", "`host: NAME`"),
    ("machine_id_twice", cloned(), "host1, host2", "systemd-machine-id-setup"),
    (
        "mask_differs",
        WELL._replace(peers=[peer(1), peer(2, prefixlen=16)]),
        "br0 of host host2 carries 192.168.77.12/16",
        "ip address add 192.168.77.12/24 dev br0; ip address del 192.168.77.12/16 dev br0",
    ),
    ("unit_missing", with_unit("ipam-plugin.socket", load="not-found"), "ipam-plugin.socket", "ipam-plugin install"),
    ("unit_disabled", with_unit("ipam-plugin.service", file="disabled"), "service", "enable ipam-plugin.service"),
    ("unit_stopped", with_unit("ipam-plugin.service", active="failed"), "service", "start ipam-plugin.service"),
    ("unit_order", with_unit("docker.service", after=frozenset()), "plugin.service and ipam-plugin.socket", "Before="),
    ("unit_changed", with_unit("ipam-plugin.service", reload=True), "ipam-plugin.service", "daemon-reload"),
    ("no_raw_sockets", WELL._replace(process=WELL.process._replace(capabilities=0)), "CAP_NET_RAW", "AmbientCap"),  # type: ignore[union-attr]
    (
        "docker_socket_closed",
        WELL._replace(process=Process("ipam-plugin", 999, frozenset({999}), 1 << 13)),
        "/run/docker.sock",
        "usermod --append --groups docker ipam-plugin",
    ),
    (
        "state_dir_read_only",
        WELL._replace(state_dir=StateDir(Inode("/var/lib/x", 999, 999, 0o700), True, 1 << 30)),
        "/var/lib/x",
        "mount -o remount,rw /var/lib/x",
    ),
    (
        "state_dir_full",
        WELL._replace(state_dir=StateDir(Inode("/var/lib/x", 999, 999, 0o700), False, 3 << 20)),
        "3 MiB",
        "df /var/lib/x",
    ),
    (
        "state_dir_closed",
        WELL._replace(state_dir=StateDir(Inode("/var/lib/x", 0, 0, 0o700), False, 1 << 30)),
        "user ipam-plugin",
        "chown -R ipam-plugin: /var/lib/x",
    ),
    ("spec_missing", WELL._replace(specs=[]), "/etc/docker/plugins", "ipam-plugin install"),
    (
        "spec_elsewhere",
        WELL._replace(specs=[Spec("/etc/docker/plugins/ipam-plugin.spec", "unix:///run/old.sock")]),
        "unix:///run/old.sock",
        f"echo unix://{PATH} >/etc/docker/plugins/ipam-plugin.spec",
    ),
    (
        "spec_twice",
        WELL._replace(specs=[*WELL.specs, Spec("/usr/lib/docker/plugins/ipam-plugin.json", "http://x")]),
        "/usr/lib/docker/plugins/ipam-plugin.json (http://x)",
        "rm /usr/lib/docker/plugins/ipam-plugin.json",
    ),
    ("socket_missing", WELL._replace(socket="No such file"), PATH, "systemctl start ipam-plugin.socket"),
    ("socket_open", WELL._replace(socket=Socket(Inode(PATH, 0, 0, 0o666), "", REFUSAL)), "0666", f"chmod 600 {PATH}"),
    ("socket_silent", WELL._replace(socket=Socket(Inode(PATH, 0, 0, 0o600), "timed out")), "timed out", "restart"),
    ("not_serving", WELL._replace(socket=Socket(Inode(PATH, 0, 0, 0o600), "", "no etcd")), "no etcd", "journalctl"),
    ("docker_away", WELL._replace(engine="dockerd at x does not answer: y"), "dockerd at x", "systemctl start docker"),
    ("docker_old", WELL._replace(engine=Installation("19.03.15", (NET,))), "19.03.15", "upgrade"),
    ("driver_unreachable", WELL._replace(asked="plugin not found"), "plugin not found", "systemctl restart docker"),
    (
        "other_driver",
        WELL._replace(
            engine=Installation(
                "28.5.1",
                (NET, AnyNetwork("old", "macvlan", "default", (ipaddress.ip_network("192.168.0.0/16"),), "br-1")),
            )
        ),
        "network old",
        "docker network rm old",
    ),
    ("no_interface", with_wire(interface="", trouble="nothing there"), "nothing there", "/24 dev br0"),
    ("wire_dead", with_wire(trouble="br0 is down"), "br0 is down", "the cable at br0"),
    ("probes_refused", with_wire(probes="no answer", mac=""), "sender 0.0.0.0", "allow zeros"),
    ("mac_refused", with_wire(strange="no answer"), "02:11:22:33:44:55", "promiscuous"),
    (
        "bridge_filtered",
        WELL._replace(filters={4: Filter(True, ICC_OFF), 6: Filter(True, ())}),
        "-A FORWARD -i br0 -o br0 -j DROP",
        "iptables -I DOCKER-USER -i br0 -o br0 -j ACCEPT",
    ),
]  # fmt: skip


def faults_of(facts: Facts) -> list[Line]:
    return [each for each in examine(facts) if each.state == FOUND]


def test_a_host_in_order() -> None:
    """Nothing is found, and all that was looked at is said."""
    lines = examine(WELL)
    assert {each.state for each in lines} == {OK}, [each for each in lines if each.state != OK]
    assert {each.kind for each in lines} == {
        "etcd", "clock", "etcd_space", "etcd_growth", "schema", "etcd_rights", "versions", "names", "masks", "units",
        "raw_sockets", "docker_socket", "state_dir", "spec", "socket", "docker", "driver", "networks", "wire",
        "bridge_filter",
    }  # fmt: skip
    assert doctor.summary(lines) == f"0 found, {len(lines)} in order, 0 not checked"


@pytest.mark.parametrize(("kind", "facts", "named", "cure"), FAULTS, ids=[each[0] for each in FAULTS])
def test_a_fault_is_found(kind: str, facts: Facts, named: str, cure: str) -> None:
    """It alone, in one line that names what it is about and says what to do."""
    found = faults_of(facts)
    assert [each.kind for each in found] == [kind], found
    assert named in found[0].what
    assert cure in found[0].cure
    assert found[0].cause
    assert all("\n" not in text for text in found[0])


def test_every_kind_has_its_fault_here_and_its_row_in_readme() -> None:
    """A check without a planted fault may never find anything; one without a row leaves the operator alone."""
    source = (ROOT / "ipam_plugin/doctor.py").read_text()
    kinds = set(re.findall(r'"(\w+)"(?: if full else "\w+")?,\s+FOUND', source)) | {"etcd_damaged"}
    assert kinds == {each[0] for each in FAULTS}
    section = (ROOT / "README.md").read_text().partition("### Find out what is wrong with a host")[2]
    rows = re.findall(r"(?m)^\| (`.*?) \|", section.partition("\n### ")[0])
    assert kinds == {kind for row in rows for kind in re.findall(r"`(\w+)`", row)}


def changed(facts: Facts) -> dict[str, Any]:
    return {name: value for name, value in facts._asdict().items() if value is not getattr(WELL, name)}


@given(one=st.sampled_from(FAULTS), other=st.sampled_from(FAULTS))
def test_faults_do_not_hide_each_other(one: tuple[str, Facts, str, str], other: tuple[str, Facts, str, str]) -> None:
    """Two at once: both are told, where one does not keep the other from being looked at."""
    assume(not changed(one[1]).keys() & changed(other[1]).keys())
    assume(not {one[0], other[0]} & {"docker_away", "unit_missing"})
    both = one[1]._replace(**changed(other[1]))
    assert {one[0], other[0]} <= {each.kind for each in faults_of(both)}


# ------------------------------------------------------------------------------------- what is not known

UNKNOWN: dict[str, Callable[[], Facts]] = {
    "etcd": lambda: WELL._replace(
        members=dict.fromkeys(WELL.members, "refused"),
        **dict.fromkeys(("growth", "layout", "rights", "peers", "wires"), "etcd does not answer"),
        pools=[],
    ),
    "root": lambda: WELL._replace(process="not root", docker_socket="not root", state_dir="not root", wires="not root"),
    "docker": lambda: WELL._replace(engine="dockerd does not answer", docker_socket="no such file", asked=""),
    "systemd": lambda: WELL._replace(units="systemd does not run here"),
    "stopped": lambda: WELL._replace(socket=None, asked=""),
    "nobody": lambda: with_wire(peers=(), mac=""),
    "rules": lambda: WELL._replace(filters={4: Filter(True, "iptables is not installed")}),
    "http": lambda: WELL._replace(members={"http://e1:2379": member(quota=None, ahead=None)}),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_could_not_be_looked_at_is_said(what: str) -> None:
    """Never as in order, and never as a fault, except that etcd or Docker are away."""
    lines = examine(UNKNOWN[what]())
    assert {each.kind for each in lines if each.state == FOUND} <= {"etcd_away", "docker_away"}
    assert any(each.state == NOT_CHECKED for each in lines)
    told = {each.kind for each in lines}
    missing = {each.kind for each in examine(WELL)} - told
    instead = {"raw_sockets", "docker_socket"} if "daemon_rights" in told else set()
    assert missing <= {"etcd", "etcd_space", "docker", "driver", "masks"} | instead


def test_a_host_without_networks_or_peers() -> None:
    """As right after the installation: nothing is wrong."""
    fresh = WELL._replace(
        pools=[], peers=[peer(1)], engine=Installation("28.5.1", (PLAIN,)), wires="no network", filters={}
    )
    assert faults_of(fresh) == []


def test_who_is_not_root_or_does_not_need_it() -> None:
    root = WELL._replace(process=Process("root", 0, frozenset({0}), 1 << 13))
    assert faults_of(root) == []
    without = Process("ipam-plugin", 999, frozenset({999}), 0)
    assert faults_of(WELL._replace(process=without, asks=False, reconcile=False)) == []


def test_a_host_that_is_gone_may_have_any_version() -> None:
    gone = Peer("host9", None, Host("host9", version="0.1"))
    assert faults_of(WELL._replace(peers=[*WELL.peers, gone])) == []  # type: ignore[misc]


def test_masks_count_within_the_segment() -> None:
    """Another LAN with the same addresses may be cut otherwise."""
    other = peer(2, prefixlen=16)
    assert other.host is not None
    away = other._replace(host=msgspec.structs.replace(other.host, segments=("elsewhere",)))
    assert faults_of(WELL._replace(peers=[peer(1), away])) == []


# ---------------------------------------------------------------------------------------------- the parts


@given(
    offset=st.floats(-1e5, 1e5),
    began=st.floats(1e9, 2e9),
    took=st.floats(0, 3),
    share=st.floats(0, 1),
)
def test_the_clock_is_never_said_to_be_further_off_than_it_is(
    offset: float, began: float, took: float, share: float
) -> None:
    """A date tells whole seconds, and comes some time after the question: that is no one's fault."""
    date = float(int(began + share * took + offset))
    found = ahead(date, began, began + took)
    assert abs(found) <= abs(offset) + 1e-3
    assert abs(offset) - abs(found) <= 1 + took + 1e-3
    assert found * offset >= 0


@pytest.mark.parametrize(
    ("uid", "groups", "mode", "right", "allowed"),
    [
        (0, {0}, 0o000, 6, True),
        (5, {7}, 0o660, 6, True),
        (5, {8}, 0o660, 6, False),
        (5, {8}, 0o666, 6, True),
        (9, {7}, 0o060, 6, False),  # the owner's bits count for the owner, also when they are fewer
        (9, {7}, 0o700, 7, True),
    ],
)
def test_may(uid: int, groups: set[int], mode: int, right: int, allowed: bool) -> None:
    assert may(Process("u", uid, frozenset(groups), 0), Inode("/x", 9, 7, mode), right) is allowed


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        (RULES, ""),
        (ICC_OFF, "-A FORWARD -i br0 -o br0 -j DROP"),
        (RULES[:11], "-P FORWARD DROP"),  # the network's own rule is gone
        (("-P FORWARD ACCEPT",), ""),
        (("-P FORWARD DROP", "-A FORWARD -m physdev --physdev-is-bridged -j ACCEPT"), ""),
        (("-P FORWARD DROP", "-A FORWARD -i br+ -j ACCEPT"), ""),
        (("-P FORWARD DROP", "-A FORWARD -i eth0 -j ACCEPT"), "-P FORWARD DROP"),
        (("-P FORWARD DROP", "-A FORWARD -s 192.168.0.0/16 -d 192.168.77.0/24 -j ACCEPT"), ""),
        (("-P FORWARD DROP", "-A FORWARD -s 192.168.77.0/25 -j ACCEPT"), "-P FORWARD DROP"),
        (("-P FORWARD DROP", "-A FORWARD ! -s 10.0.0.0/8 -j ACCEPT"), ""),
        (("-P FORWARD DROP", "-A FORWARD ! -s 192.168.77.0/25 -j ACCEPT"), "-P FORWARD DROP"),
        (("-P FORWARD ACCEPT", "-A FORWARD -p tcp -m tcp --dport 22 -j DROP"), ""),
        (("-P FORWARD ACCEPT", "-A FORWARD -m conntrack --ctstate INVALID -j DROP"), ""),
        (
            ("-P FORWARD ACCEPT", "-A FORWARD -i br0 -j REJECT --reject-with icmp-port-unreachable"),
            "-A FORWARD -i br0 -j REJECT --reject-with icmp-port-unreachable",
        ),
        (("-P FORWARD DROP", '-A FORWARD -i br0 -m comment --comment "let it pass" -j ACCEPT'), ""),
        # As Docker 28: chains of chains; and a circle, which iptables refuses and nobody should follow.
        (
            (
                "-P FORWARD DROP",
                "-A FORWARD -j A",
                "-A A -o br0 -j B",
                "-A A -i br0 -j ACCEPT",
                "-A B ! -i br0 -j DROP",
            ),
            "",
        ),
        (("-P FORWARD DROP", "-A FORWARD -j A", "-A A -j FORWARD"), "-P FORWARD DROP"),
    ],
)
def test_what_the_firewall_does(rules: tuple[str, ...], dropped: str) -> None:
    assert drops(rules, "br0", LAN) == dropped


def test_the_cure_of_a_silent_interface_is_what_this_host_sees() -> None:
    links = list(WELL.links)

    def cure(*changed: Link) -> str:
        [line] = faults_of(with_wire(trouble="silent")._replace(links=changed))
        return line.cure

    eth0, br0 = links
    assert cure(eth0, br0._replace(up=False)) == "ip link set br0 up"
    assert cure(br0).startswith("ip link set NIC master br0")
    assert cure(eth0._replace(up=False), br0) == "ip link set eth0 up"
    assert cure(eth0._replace(carrier=False), br0).startswith("the cable at eth0;")
    assert "VLAN 5 of eth0, tagged" in cure(eth0, br0._replace(kind="vlan", vlan="5 of eth0"))


def test_ipv6_has_its_own_filter() -> None:
    dual = WELL._replace(engine=Installation("28.5.1", (NET._replace(subnets=(LAN, LAN6)),)))
    closed = dual._replace(filters={4: Filter(True, RULES), 6: Filter(True, ("-P FORWARD DROP",))})
    [line] = faults_of(closed)
    assert (line.kind, "ip6tables -I FORWARD -i br0" in line.cure) == ("bridge_filtered", True)
