"""README.md is true: its commands are typed as they stand there, on machines that were really booted.

A console block has lines `PROMPT# command`: `here` is a machine with a checkout, `every host` means host1, host2
and host3. A here-document follows its line.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import missing
from ipam_plugin import errors
from ipam_plugin.cli import cli
from tests.booted import HOSTS, PRINTER, BootedHost, Lan, address_of, booted_lan, checkout
from tests.lab import Command, Lab, until
from tests.lab import missing as lab_missing
from tests.lab.node import ROOT, Node
from tests.readme import ADOPT, TEXT, TIMES, Line, lines, type_all

SOCKET = "/run/ipam-plugin/ipam-plugin.sock"


# --- what needs no machine ---------------------------------------------------------------------------------


def test_links_lead_somewhere() -> None:
    """A link to a file of the checkout, or to a heading, that is not there helps nobody."""
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"(?m)^#+ (.+)$", TEXT)}
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / target.partition("#")[0]).is_file(), target


def test_all_subcommands_and_no_others_are_described() -> None:
    """README is where an operator looks; `--help` only repeats it."""
    code = "\n".join([*re.findall(r"`([^`\n]+)`", TEXT), *(line.command for line in lines())])
    # At the beginning of a command: it is also the name of a user, of a role and of a certificate.
    named = set(re.findall(r"(?m)(?:^|[;&|] )(?:\S*/bin/)?ipam-plugin ([a-z][a-z-]*)", code))
    assert named == set(cli.commands)


ERRORS = {each.__name__ for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)}
ELSEWHERE = {
    "install.py": "`install` and `uninstall` say it to whoever has just typed them, with the cure",
    "Address: …": "what follows is a sentence about an address that was typed, and those have a row",
}


def phrases_of_the_table() -> dict[str, re.Pattern[str]]:
    """What README says that the program says; `…` stands for what is put in."""
    table = TEXT.partition("\n## What the error says")[2].partition("\n## ")[0]
    found = {}
    for row in re.findall(r"(?m)^\| (`.*?) \| ", table):
        for phrase in re.findall("`([^`]+)`", row):
            parts = [part.strip() for part in phrase.split("…") if part.strip()]
            assert len("".join(parts)) > 8, f"{phrase!r} could be found anywhere"
            found[phrase] = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return found


def test_the_errors_of_the_table_are_those_of_the_program() -> None:
    """Whoever looks an error up must find it word for word."""
    sentences = [sentence for path in sources() for sentence in _sentences(path)]
    phrases = phrases_of_the_table()
    assert len(phrases) > 60
    for phrase, words in phrases.items():
        assert any(words.search(sentence) for sentence in sentences), f"the program never says {phrase!r}"


def test_the_errors_of_the_program_are_in_the_table() -> None:
    """Whatever refuses a container or a network has a row with its cure; a new error needs one too."""
    rows = phrases_of_the_table().values()
    found = [(path.name, said) for path in sources() for said in _errors(path)]
    assert len(found) > 60
    assert set(ELSEWHERE) <= {part for each in found for part in each}
    without = [each for each in found if not any(words.search(each[1]) for words in rows)]
    told = [f"{name}: {said}" for name, said in without if ELSEWHERE.keys().isdisjoint((name, said))]
    assert not told, "\n".join(["no row of README's tables has:", *told])


def sources() -> list[Path]:
    return sorted((ROOT / "ipam_plugin").glob("*.py"))


def _sentences(path: Path) -> Iterator[str]:
    """Every string in a file of the program, with `…` for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield _sentence(node)


def _errors(path: Path) -> Iterator[str]:
    """What its errors say: the sentence with which each is made, and why the daemon does not serve."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ERRORS and node.args:
            said = _sentence(node.args[0])
        elif name == "_set_serving" and len(node.args) == 2:
            said = _sentence(node.args[1])
        else:
            continue
        # Without a word of its own it repeats another error, or a sentence of a ValueError.
        if re.search(r"\w", said):
            yield said


def _sentence(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
        case ast.BinOp(left=left, right=right):
            return _sentence(left) + _sentence(right)
    return "…"


def test_the_metrics_of_the_table_are_those_of_the_program() -> None:
    """An alert on a metric that does not exist never fires; one that nobody describes is never watched."""
    table = TEXT.partition("\n## Metrics")[2].partition("\n## ")[0]
    described = re.findall(r"`(ipam_plugin_\w+)", table)
    assert len(described) == len(set(described))
    made = {
        node.value
        for node in ast.walk(ast.parse((ROOT / "ipam_plugin/metrics.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("ipam_plugin_")
    }
    assert {name.removesuffix("_total") for name in described} == {name.removesuffix("_total") for name in made}


def test_make_test_is_what_ci_runs() -> None:
    """The one command of README that cannot be typed here: it would type itself."""
    assert re.search(r"(?m)^test:", (ROOT / "Makefile").read_text())
    assert re.search(r"(?m)^make (\w+ )*test\b", (ROOT / ".ci/run").read_text())


# --- here ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which `make venv` has been done, with the packages that this Python has."""
    if os.geteuid() != 0:
        missing("root", "the demo needs root")
    why = lab_missing()
    if why is not None:
        missing("engine", why)
    top = tmp_path_factory.mktemp("here") / "ipam-plugin"
    checkout(top)
    (top / ".venv/bin").mkdir(parents=True)
    for name in ("lib", "pyvenv.cfg"):
        if (Path(sys.prefix) / name).exists():
            (top / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (top / ".venv/bin/python").symlink_to(sys.executable)
    command = top / ".venv/bin/ipam-plugin"
    command.write_text(
        f"#!{top}/.venv/bin/python\nimport sys\nsys.path.insert(0, {str(top)!r})\n"
        "from ipam_plugin.cli import main\nmain()\n"
    )
    command.chmod(0o755)
    (top / ".venv/.made").touch()
    return top


def test_only_known_commands_are_typed_here() -> None:
    """A command that is added to README for `here` needs a test too; that of `make deb` is in test_packaging.py."""
    typed = {line.command for line in lines() if line.prompt == "here"}
    assert typed == {"make run", "make demo", "make test", "make deb"}


@pytest.mark.root
@pytest.mark.engine
def test_make_demo(here: Path) -> None:
    """The first thing that a visitor types says of itself whether all was well."""
    done = Command(["make", "-C", str(here), "demo"], "make demo", Node.environment()).result(180)
    assert re.search(r"12 different addresses for 12 containers, 0 pings without an answer\n", done.stdout)
    TIMES.append(f"make demo: {done.seconds:.1f} s")


@pytest.mark.root
@pytest.mark.engine
def test_make_run(here: Path) -> None:
    """What it says to type next works as it stands, and Ctrl-C takes everything back."""
    spec = "/etc/docker/plugins/ipam-plugin.spec"
    with Lab(hosts=1, machines=0, etcd=0) as lab:
        [host] = lab.hosts
        host.path(spec).unlink()
        host.path("/etc/ipam-plugin/config.yaml").unlink()
        make = host.serve("make", "sh", "-c", f"cd {here} && exec make run")

        def said() -> str:
            return make.log.read_text().partition("Type in another terminal:\n")[2]

        until(lambda: "Ctrl-C" in said() or not make.alive, 60, "make run says what to type")
        assert make.alive, make.tail()
        assert host.path(spec).is_file()
        typed = re.findall(r"(?m)^  (\S.*)$", said())
        assert [command.split()[1] for command in typed] == ["network", "run", "leases"]
        outputs = [host.sh(command, timeout=60) for command in typed]
        assert re.search(r"inet 10\.66\.0\.\d+/24 ", outputs[1])
        assert "10.66.0." in outputs[2]
        # As a terminal does it: to all that runs in the foreground.
        os.killpg(os.getpgid(make.pid), signal.SIGINT)
        make.wait(30)
        assert "Traceback" not in make.log.read_text(), make.tail()
        assert not host.path(spec).exists()
        assert host.sh(f"ls {SOCKET} 2>/dev/null || true") == ""
        assert host.sh("cat /proc/[0-9]*/comm | grep -x -e etcd -e ipam-plugin -e gunicorn || true") == ""


# --- on the hosts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    """The LAN of README before its first command."""
    began = time.monotonic()
    with booted_lan() as made:
        TIMES.append(f"three hosts booted: {time.monotonic() - began:.1f} s")
        yield made
    print(*TIMES, sep="\n")


def etcd_is_a_cluster(lan: Lan, said: dict[str, str]) -> None:
    def healthy() -> bool:
        health = lan.hosts["host1"]("etcdctl endpoint health --cluster -w json", 30, check=False).stdout
        return [each["health"] for each in json.loads(health)] == [True] * 3

    until(healthy, 30, "etcd has three members", pause=0.2)


def the_daemons_have_few_rights(lan: Lan, said: dict[str, str]) -> None:
    """With their certificate nobody reaches what is not theirs: another key, users and roles, the members' own port."""
    host = lan.hosts["host2"]
    own = "/etc/ipam-plugin/ipam-plugin"
    ctl = "etcdctl --endpoints https://192.168.77.11:2379 --cacert /etc/ipam-plugin/ca.pem"
    ctl += f" --cert {own}.pem --key {own}.key"
    assert host(f"{ctl} put /ipam-plugin/v1/x 1 && {ctl} del /ipam-plugin/v1/x").stdout == "OK\n1\n"
    for beyond in ("get /other", "put /ipam-plugin/v2/x 1", "get '' --prefix", "user add x:y", "auth disable"):
        assert "permission denied" in host(f"{ctl} {beyond}", check=False).stderr, beyond
    for other in ("http://192.168.77.11:2379", "https://192.168.77.11:2379 --cacert /etc/ipam-plugin/ca.pem"):
        assert host(f"etcdctl --command-timeout 1s --endpoints {other} get /other", check=False).status != 0
    for name, may in (("ipam-plugin/ipam-plugin", False), ("etcd/etcd", True)):
        asked = f"openssl s_client -connect 192.168.77.11:2380 -CAfile /etc/etcd/ca.pem -cert /etc/{name}.pem"
        typed = "printf 'GET /members HTTP/1.0\\r\\n\\r\\n'; sleep 1"
        answer = host(f"({typed}) | {asked} -key /etc/{name}.key -quiet 2>&1", check=False).stdout
        assert ("peerURLs" in answer) == may, answer


def nothing_is_started(lan: Lan, said: dict[str, str]) -> None:
    for host in lan.hosts.values():
        states = host("systemctl is-active ipam-plugin.socket ipam-plugin.service", check=False).stdout.split()
        assert states == ["inactive", "inactive"]
        assert "user ipam-plugin made" in said[host.name]


def the_daemon_serves(lan: Lan, said: dict[str, str]) -> None:
    for host in lan.hosts.values():
        units = "ipam-plugin.socket ipam-plugin.service docker.service"
        assert host(f"systemctl is-active {units}").stdout.split() == ["active"] * 3
        assert {"ipam-plugin.service", "ipam-plugin.socket"} <= set(host.show("docker.service", "After").split())
        assert host(f"stat -c '%a %U' {SOCKET}").stdout == "600 root\n"
        assert host("stat -c '%a %U' /var/lib/ipam-plugin").stdout == "700 ipam-plugin\n"
        connect = f"import socket; socket.socket(socket.AF_UNIX).connect('{SOCKET}')"
        other = host(f'setpriv --reuid nobody --regid nogroup --clear-groups python3 -c "{connect}"', check=False)
        assert "PermissionError: [Errno 13]" in other.stderr
        process = host.show("ipam-plugin.service", "MainPID")
        assert host(f"stat -c %U /proc/{process}").stdout == "ipam-plugin\n"
        score = host("systemd-analyze security --no-pager ipam-plugin.service").stdout.splitlines()[-1]
        assert float(re.findall(r"level for \S+: ([0-9.]+) ", score)[0]) <= 1.8
        TIMES.append(f"{host.name}: {score.strip()}")


def every_host_is_alive(lan: Lan, said: dict[str, str]) -> None:
    def alive(name: str) -> bool:
        found = json.loads(lan.hosts[name]("ipam-plugin hosts -o json").stdout)
        return [(each["host"], each["alive"]) for each in found] == [(host, True) for host in HOSTS]

    for name in lan.hosts:
        until(lambda name=name: alive(name), 20, f"all hosts are alive, says {name}", pause=0.2)  # type: ignore[misc]
    table = lan.hosts["host1"]("ipam-plugin hosts").stdout
    assert re.findall(r"(?m)^(host\d) +yes ", table) == list(HOSTS)


def the_page_is_served(lan: Lan, said: dict[str, str]) -> None:
    """To a browser on host1, by a user that is none of /etc/passwd and may read what only the service's group may."""
    host = lan.hosts["host1"]
    look = (
        "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9180/api/overview', timeout=10).read().decode())"
    )

    def told() -> list[tuple[str, bool]]:
        answer = host(f'python3 -c "{look}"', check=False).stdout
        return [(each["name"], each["alive"]) for each in json.loads(answer)["hosts"]] if answer else []

    everybody = [(name, True) for name in HOSTS]
    until(lambda: told() == everybody, 30, "the page tells of the hosts", pause=0.2)
    host("chown root:ipam-plugin /etc/ipam-plugin/config.yaml && chmod 640 /etc/ipam-plugin/config.yaml")
    host("systemctl restart ipam-plugin-web.service")
    until(lambda: told() == everybody, 30, "the page tells of the hosts again", pause=0.2)
    host("chown root:root /etc/ipam-plugin/config.yaml && chmod 644 /etc/ipam-plugin/config.yaml")
    user = host(f"stat -c %u /proc/{host.show('ipam-plugin-web.service', 'MainPID')}").stdout.strip()
    assert 61184 <= int(user) <= 65519, "systemd's range for dynamic users"
    TIMES.append(host("systemd-analyze security --no-pager ipam-plugin-web.service").stdout.splitlines()[-1].strip())


def standby_is_kept(lan: Lan, said: dict[str, str]) -> None:
    """Two tested addresses for each host's network, on a wire that each daemon can hear."""

    def kept(name: str) -> bool:
        found = json.loads(lan.hosts["host1"](f"ipam-plugin leases --kind standby --host {name} -o json").stdout)
        return len(found) == 2 and metrics(lan.hosts[name]).get("ipam_plugin_standby") == 2

    for name, host in lan.hosts.items():
        until(lambda name=name: kept(name), 30, f"{name} has its standby", pause=0.2)  # type: ignore[misc]
        assert metrics(host)["ipam_plugin_wire_usable"] == 1
    addresses = [each["address"] for each in json.loads(lan.hosts["host1"]("ipam-plugin leases -o json").stdout)]
    assert PRINTER not in addresses
    assert "ALARM" not in lan.hosts["host1"]("ipam-plugin hosts").stdout


def metrics(host: BootedHost) -> dict[str, float]:
    """What the daemon counts, by name; labels are added up."""
    look = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9179/metrics', timeout=10).read().decode())"
    found: dict[str, float] = {}
    for name, value in re.findall(r"(?m)^(ipam_plugin_\w+)(?:\{.*\})? (\S+)$", host(f'python3 -c "{look}"').stdout):
        found[name] = found.get(name, 0) + float(value)
    return found


def the_printer_was_found(lan: Lan, said: dict[str, str]) -> None:
    """The container with its address was refused, and the register says why, on every host."""
    assert f"{PRINTER} in segment default is taken (conflict)" in said["host1"]
    assert lan.printer.mac in said["host1"]
    found = json.loads(lan.hosts["host2"]("ipam-plugin leases --kind conflict -o json").stdout)
    assert [(each["address"], each["mac"], each["by"]) for each in found] == [(PRINTER, lan.printer.mac, "host1")]


def somebody_has_it(lan: Lan, said: dict[str, str]) -> None:
    assert "somebody has it" in said["host1"]
    assert f"{PRINTER} of pool default/192.168.77.0/24 is in use on the wire: MAC {lan.printer.mac}" in said["host1"]


def the_conflict_ended(lan: Lan, said: dict[str, str]) -> None:
    assert f"{PRINTER} in segment default is free; it was a machine that is none of ours" in said["host1"]
    assert json.loads(lan.hosts["host2"]("ipam-plugin leases --kind conflict -o json").stdout) == []


def the_scan_found_everybody(lan: Lan, said: dict[str, str]) -> None:
    rows = {words[0]: words for line in said["host1"].splitlines() if (words := line.split())}
    assert rows[PRINTER][1] == lan.printer.mac
    # A daemon in search of standby may have met it just before.
    assert {"stranger", "conflict"} & set(rows[PRINTER])
    for host in lan.hosts.values():
        assert (rows[host.place.ipv4][1], "host" in rows[host.place.ipv4]) == (host.place.mac, True)
        assert "endpoint" in rows[address_of(host, "web1")]


def the_printer_is_reserved(lan: Lan, said: dict[str, str]) -> None:
    found = json.loads(lan.hosts["host2"]("ipam-plugin leases --kind reserved -o json").stdout)
    assert [each["address"] for each in found] == [PRINTER]
    assert lan.printer.mac in found[0]["note"]


def containers_answer(lan: Lan, said: dict[str, str]) -> None:
    """Those named web1: on three hosts at first, on two later."""
    having = [host for host in lan.hosts.values() if "web1" in host("docker ps --format '{{.Names}}'").stdout]
    addresses = {host.name: address_of(host, "web1") for host in having}
    assert len(set(addresses.values())) == len(having) >= 2
    for address in addresses.values():
        assert lan.printer.ping(address), address
    for host in lan.hosts.values():
        assert lan.printer.mac_of(host.place.ipv4) == host.place.mac
        assert f"inet {host.place.ipv4}/24 " in host("ip address show br0").stdout
    leases = json.loads(lan.hosts["host2"]("ipam-plugin leases --kind endpoint -o json").stdout)
    assert {each["host"]: each["address"] for each in leases} == addresses


def the_fixed_address_answers(lan: Lan, said: dict[str, str]) -> None:
    assert lan.printer.ping("192.168.77.200")


def in_the_range(lan: Lan, said: dict[str, str]) -> None:
    shown = _container(lan.hosts["host2"])
    [last] = re.findall(r"inet 192\.168\.77\.(\d+)/24 ", shown)
    assert 64 <= int(last) < 128


def dual_stack(lan: Lan, said: dict[str, str]) -> None:
    shown = _container(lan.hosts["host2"], "ping6 -c 1 -W 5 fd00:77::254")
    assert re.search(r"inet 192\.168\.77\.\d+/24 ", shown)
    assert re.search(r"inet6 fd00:77::[0-9a-f:]+/64 ", shown)
    assert "fd00:77::12/64 " in lan.hosts["host2"]("ip address show br0").stdout


def macvlan(lan: Lan, said: dict[str, str]) -> None:
    assert re.search(r"inet 192\.168\.77\.\d+/24 ", _container(lan.hosts["host2"]))


def _container(host: BootedHost, more: str = "true") -> str:
    """What a container on network `lan` has for addresses; it also reaches the router."""
    script = f"ip address show eth0; ping -c 1 -W 5 192.168.77.254 && {more}"
    return host(f"docker run --rm --network lan busybox sh -c '{script}'", 60).stdout


def a_reservation(lan: Lan, said: dict[str, str]) -> None:
    assert "Ann's lab power supply" in said["host1"]


def the_router(lan: Lan, said: dict[str, str]) -> None:
    assert "192.168.77.254 in segment default is taken (router)" in said["host1"]


def taken_back(lan: Lan, said: dict[str, str]) -> None:
    assert json.loads(lan.hosts["host1"]("ipam-plugin leases --kind standby --host host3 -o json").stdout) == []
    assert "ipam-plugin.socket, ipam-plugin.service, ipam-plugin-web.service stopped and disabled" in said["host3"]
    host = lan.hosts["host3"]
    assert host(f"ls {SOCKET} /usr/local/bin/ipam-plugin /etc/docker/plugins", check=False).stdout == ""
    assert host("systemctl is-active docker.service").stdout == "active\n"


def nothing_is_left(lan: Lan, said: dict[str, str]) -> None:
    assert files(lan.hosts["host3"]) == lan.before


def what_answers_stays(lan: Lan, said: dict[str, str]) -> None:
    """The machine is on, only its daemon is gone; the others say since when."""
    assert "192.168.77.13 in segment default stays taken: a machine answers for it" in said["host1"]
    [line] = re.findall(r"(?m)^host3 .*", lan.hosts["host2"]("ipam-plugin hosts").stdout)
    assert re.match(r"host3 +NO( since 20\S+Z)? +1 ", line)


def the_address_is_free(lan: Lan, said: dict[str, str]) -> None:
    assert "host host3 is out of the register" in said["host1"]
    until(lambda: " is free" in lan.hosts["host2"]("ipam-plugin show 192.168.77.13").stdout, 10, "a free address")


def it_logs_in(lan: Lan, said: dict[str, str]) -> None:
    """As the user of the password: without its role, nothing can be read any more."""
    host = lan.hosts["host1"]
    host("etcdctl user revoke-role docker-hosts ipam-plugin")
    assert "permission denied" in host("ipam-plugin hosts", check=False).stderr
    host("etcdctl user grant-role docker-hosts ipam-plugin")


def files(host: BootedHost) -> list[str]:
    """Everything on a host that could be of the installation: files, units, users, processes."""
    looks = (
        "find /etc /usr/local /opt -xdev ! -name '*-' ! -name .pwd.lock ! -path '/etc/*etcd' ! -path '/etc/etcd/*'",
        "find / /run -xdev -iname '*ipam*' ! -path '/root/*' ! -path '/var/lib/docker/*'",
        "cat /etc/passwd /etc/group /etc/shadow /etc/gshadow",
        "systemctl list-units --all --plain --no-legend '*ipam*'",
        "cat /proc/[0-9]*/comm | grep -x -e ipam-plugin -e gunicorn || true",
    )
    return [line for look in looks for line in sorted(host(look).stdout.splitlines())]


# After the first such command, and nothing is typed meanwhile.
CHECKS: dict[tuple[str, str], Callable[[Lan, dict[str, str]], None]] = {
    ("host1", "timeout 60 sh -c 'until etcdctl endpoint health"): etcd_is_a_cluster,
    ("host1", "etcdctl auth enable"): the_daemons_have_few_rights,
    ("every host", "/opt/ipam-plugin/bin/ipam-plugin install"): nothing_is_started,
    ("every host", "systemctl enable --now ipam-plugin.socket"): the_daemon_serves,
    ("every host", "ipam-plugin hosts"): every_host_is_alive,
    ("every host", "docker run --detach --network lan --name web1"): containers_answer,
    ("host1", "ipam-plugin segment default --router"): standby_is_kept,
    ("host1", "ipam-plugin show 192.168.77.254"): the_router,
    ("host1", "systemctl enable --now ipam-plugin-web"): the_page_is_served,
    ("host1", f"docker run --rm --network lan --ip {PRINTER}"): somebody_has_it,
    ("host1", f"ipam-plugin show {PRINTER}"): the_printer_was_found,
    ("host1", f"ipam-plugin release {PRINTER}"): the_conflict_ended,
    ("host1", "ipam-plugin scan"): the_scan_found_everybody,
    ("host1", "ipam-plugin scan 192.168.77.128/28"): the_printer_is_reserved,
    ("host1", "ipam-plugin show 192.168.77.141"): a_reservation,
    ("host1", "docker run --detach --network lan --ip 192.168.77.200"): the_fixed_address_answers,
    ("host2", "docker network create --driver bridge --ipam-driver ipam-plugin --subnet"): in_the_range,
    ("host2", "docker network create --driver bridge --ipam-driver ipam-plugin --ipv6"): dual_stack,
    ("host2", "docker network create --driver macvlan"): macvlan,
    ("host3", "systemctl restart ipam-plugin.service"): containers_answer,
    ("host3", "ipam-plugin uninstall"): taken_back,
    ("host3", "userdel"): nothing_is_left,
    ("host1", "ipam-plugin host retire host3 ||"): what_answers_stays,
    ("host1", "ipam-plugin host retire host3 --force"): the_address_is_free,
    ("host1", "systemctl restart ipam-plugin.service"): it_logs_in,
}


@pytest.mark.root
@pytest.mark.engine
def test_every_command_typed_on_the_hosts(lan: Lan) -> None:
    """From a bare Debian to containers that the LAN reaches, and back: nobody has to guess a step."""
    lan.before = files(lan.hosts["host3"])
    checks = dict(CHECKS)
    batch: list[Line] = []
    began = time.monotonic()
    for line in lines():
        if line.prompt == "here" or line.heading == ADOPT:
            continue
        if batch and batch[0].prompt != line.prompt:
            type_all(lan, batch)
            batch = []
        batch.append(line)
        key = next((key for key in checks if key[0] == line.prompt and line.command.startswith(key[1])), None)
        if key is not None:
            said = type_all(lan, batch)
            batch = []
            checks.pop(key)(lan, said)
    type_all(lan, batch)
    assert not checks, "these commands are not in README any more"
    TIMES.append(f"everything typed: {time.monotonic() - began:.1f} s")
    lan.typed = True


@pytest.mark.root
@pytest.mark.engine
def test_a_power_cut_costs_a_host_nothing(lan: Lan) -> None:
    """After it the daemon is up before Docker, the host has its address, and its network serves as before."""
    assert lan.typed, "the host was not installed"
    host = lan.hosts["host1"]
    host.power_off()
    assert not lan.printer.ping(host.place.ipv4, 1)
    began = time.monotonic()
    lan.boot(host)
    TIMES.append(f"booted after the power cut: {time.monotonic() - began:.1f} s")
    order = {
        unit: int(host.show(unit, "ActiveEnterTimestampMonotonic"))
        for unit in ("ipam-plugin.socket", "etcd.service", "ipam-plugin.service")
    }
    order["dockerd's start"] = int(host.show("docker.service", "ExecMainStartTimestampMonotonic"))
    assert sorted(order, key=lambda unit: order[unit]) == list(order)
    assert order["ipam-plugin.socket"] > 0
    TIMES.extend(f"{(when - order['ipam-plugin.socket']) / 1e6:+.3f} s  {unit}" for unit, when in order.items())
    assert "serving" in host.show("ipam-plugin.service", "StatusText")
    assert f"inet {host.place.ipv4}/24 " in host("ip address show br0").stdout
    assert lan.printer.ping(host.place.ipv4)
    host("docker start web1", 60)
    host("docker run --detach --network lan --name web2 busybox sleep 1000000", 60)
    addresses = {address_of(host, "web1"), address_of(host, "web2")}
    assert all(lan.printer.ping(address) for address in addresses)
    leases = json.loads(host("ipam-plugin leases --kind endpoint --host host1 -o json").stdout)
    assert {each["address"] for each in leases} == addresses
