"""Installing and taking back, on the root directory of another system; and the units as systemd reads them."""

import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import missing
from ipam_plugin import cli, config
from ipam_plugin import install as installing
from ipam_plugin.errors import ConfigError, Refused

pytestmark = pytest.mark.root

TOP = Path(__file__).parent.parent
EXECUTABLE = "/bin/true"  # any program that every user may run
SPEC = "etc/docker/plugins/ipam-plugin.spec"
CONFIG = "etc/ipam-plugin/config.yaml"
SERVICE = "etc/systemd/system/ipam-plugin.service"


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        missing("root", "installing needs root")
    # Where this checkout lies is no matter of these tests; the two about reach have paths of their own.
    monkeypatch.setattr(installing.ipam_plugin, "__file__", "/bin/true")


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """The root directory of a system that has users and Docker, and no ipam-plugin."""
    root = tmp_path / "system"
    for directory in ("etc/docker/plugins", "etc/systemd/system", "usr/local/bin", "var/lib"):
        (root / directory).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/shadow").write_text("root:*:1::::::\n")
    (root / "etc/gshadow").write_text("root:*::\n")
    return root


def tree(root: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Everything below `root`: mode, owner, content; without the traces that useradd leaves."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if re.fullmatch(r"etc/(passwd|group|shadow|gshadow|sub[ug]id)-?|etc/\.pwd\.lock", name):
            continue
        status = path.lstat()
        content: bytes | str = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[name] = (stat.S_IMODE(status.st_mode), status.st_uid, content)
    return found


def users(root: Path) -> list[str]:
    return [line.split(":")[0] for line in (root / "etc/passwd").read_text().splitlines()]


# --- install ---------------------------------------------------------------------------------------------


def test_install_puts_everything_in_place(system: Path) -> None:
    """Spec, configuration, units, user, state directory and command: each where Docker, systemd and people look."""
    lines = installing.install(str(system), EXECUTABLE)
    assert (system / SPEC).read_text() == "unix:///run/ipam-plugin/ipam-plugin.sock\n"
    assert (system / CONFIG).read_bytes() == (TOP / "config.example.yaml").read_bytes()
    assert "ExecStart=/bin/true serve\n" in (system / SERVICE).read_text()
    assert (system / "etc/systemd/system/ipam-plugin.socket").is_file()
    assert os.readlink(system / "usr/local/bin/ipam-plugin") == EXECUTABLE
    entry = next(line for line in (system / "etc/passwd").read_text().splitlines() if line.startswith("ipam-plugin:"))
    assert entry.endswith(":/var/lib/ipam-plugin:/usr/sbin/nologin")
    state = (system / "var/lib/ipam-plugin").stat()
    assert (stat.S_IMODE(state.st_mode), state.st_uid) == (0o700, int(entry.split(":")[2]))
    for path in (SPEC, CONFIG, SERVICE):
        assert stat.S_IMODE((system / path).stat().st_mode) == 0o644
    assert lines[-1] == (
        "systemd does not run here; type: systemctl daemon-reload && "
        "systemctl enable --now ipam-plugin.socket ipam-plugin.service"
    )


def test_the_manual_and_the_completions_are_put_too(system: Path) -> None:
    """Where man and the shells look; the page is that of the version which installs."""
    before = tree(system)
    page = system / "usr/local/share/man/man8/ipam-plugin.8"
    for text in (".TH ONE 8\n", ".TH TWO 8\n"):
        installing.install(str(system), EXECUTABLE, manual=text)
        assert page.read_text() == text
    for path, begin in (
        ("bash-completion/completions/ipam-plugin", "_ipam_plugin_completion() {"),
        ("zsh/site-functions/_ipam-plugin", "#compdef ipam-plugin\n"),
        ("fish/vendor_completions.d/ipam-plugin.fish", "function _ipam_plugin_completion;"),
    ):
        assert (system / "usr/local/share" / path).read_text().startswith(begin)
    installing.uninstall(str(system))
    assert tree(system) == before


def test_uninstall_takes_back_exactly_that(system: Path) -> None:
    """After it the system is byte for byte as before."""
    before = tree(system)
    installing.install(str(system), EXECUTABLE)
    assert tree(system) != before
    lines = installing.uninstall(str(system))
    assert tree(system) == before
    assert users(system) == ["root"]
    assert "/var/lib/ipam-plugin removed" in lines
    assert installing.uninstall(str(system)) == ["nothing to do: install put nothing here"]


def test_another_systems_register_is_left_alone(system: Path) -> None:
    """An image that is taken apart has no running service, and its configuration may name a register in use."""
    installing.install(str(system), EXECUTABLE)

    def give_back() -> list[str]:
        raise AssertionError("asked for another system")

    installing.uninstall(str(system), give_back)
    assert not (system / SERVICE).exists()


@pytest.mark.parametrize("given", [["standby and held addresses of host a given back: 2"], []])
def test_a_daemon_that_was_started_by_hand_gives_back_too(
    system: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    """What a daemon keeps in the register has nothing to do with who put its files there, or whether anybody did."""

    class Live(installing._Root):
        def __init__(self, root: str) -> None:
            super().__init__(root)
            self.live = True

    monkeypatch.setattr(installing, "_Root", Live)
    before = tree(system)
    lines = installing.uninstall(str(system), lambda: given)
    assert lines == [*given, f"nothing {'else ' if given else ''}to do: install put nothing here"]
    assert tree(system) == before


def test_where_nothing_was_ever_set_up_no_register_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second uninstall, when all is gone, has nothing to complain of; a daemon's traces without a configuration are
    a reason to."""
    usual = str(tmp_path / "config.yaml")
    for module, name, value in (
        (config, "DEFAULT_PATH", usual),
        (installing, "CONFIG", usual),
        (installing, "STATE_DIR", str(tmp_path)),
        (cli, "EMBEDDED_DATA", tmp_path / "etcd"),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.delenv("IPAM_PLUGIN_CONFIG", raising=False)
    assert list(cli._give_back_standby(None)) == []
    [line] = cli._give_back_standby(str(tmp_path / "mistyped.yaml"))
    assert "mistyped.yaml: there is no such file" in line
    (tmp_path / "host").write_text("a\n")
    [line] = cli._give_back_standby(None)
    assert f"{usual}: there is no such file" in line


def test_directories_that_install_made_go_too(tmp_path: Path) -> None:
    """On a system without /etc/docker none is left behind; one that holds something else stays."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("ipam-plugin:x:990:990::/:/bin/false\n")
    installing.install(str(tmp_path), EXECUTABLE)
    (tmp_path / "etc/docker/daemon.json").write_text("{}\n")
    installing.uninstall(str(tmp_path))
    files = {name for name in tree(tmp_path) if (tmp_path / name).is_file()}
    assert files == {"etc/docker/daemon.json"}
    assert not (tmp_path / "etc/docker/plugins").exists()
    assert not (tmp_path / "etc/systemd").exists()
    assert users(tmp_path) == ["ipam-plugin"]


def test_a_second_install_changes_nothing(system: Path) -> None:
    """Whoever is not sure runs it again."""
    installing.install(str(system), EXECUTABLE)
    before = tree(system)
    times = {path: path.lstat().st_mtime_ns for path in system.rglob("*")}
    assert installing.install(str(system), EXECUTABLE)[0] == "nothing to do: everything is in place"
    assert tree(system) == before
    assert {path: path.lstat().st_mtime_ns for path in system.rglob("*")} == times


def test_an_upgrade_replaces_what_is_unchanged(system: Path) -> None:
    """A new version's units take effect, also when the command has moved; uninstall knows the new ones."""
    before = tree(system)
    installing.install(str(system), EXECUTABLE)
    lines = installing.install(str(system), "/bin/false")
    assert "/etc/systemd/system/ipam-plugin.service replaced" in lines
    assert "/usr/local/bin/ipam-plugin now leads to /bin/false" in lines
    assert "ExecStart=/bin/false serve\n" in (system / SERVICE).read_text()
    installing.uninstall(str(system))
    assert tree(system) == before


def test_what_the_operator_changed_stays(system: Path) -> None:
    """Neither an upgrade nor uninstall throws an operator's work away, and both say so."""
    installing.install(str(system), EXECUTABLE)
    (system / CONFIG).write_text("etcd: {endpoints: ['http://10.0.0.1:2379']}\n")
    (system / SERVICE).write_text("[Service]\nExecStart=/opt/own\n")
    lines = "\n".join(installing.install(str(system), "/bin/false"))
    assert "/etc/ipam-plugin/config.yaml left as it is\n" in lines
    assert "/etc/systemd/system/ipam-plugin.service left as it is, because it is not as install wrote it" in lines
    lines = "\n".join(installing.uninstall(str(system)))
    assert "/etc/ipam-plugin/config.yaml left, because it was changed since" in lines
    assert (system / CONFIG).read_text().startswith("etcd:")
    assert (system / SERVICE).read_text().endswith("/opt/own\n")
    assert not (system / SPEC).exists()


def test_what_was_there_before_is_not_ours(system: Path) -> None:
    """A configuration that came from elsewhere (Ansible, a package) is neither overwritten nor removed."""
    (system / "etc/ipam-plugin").mkdir()
    (system / CONFIG).write_bytes((TOP / "config.example.yaml").read_bytes())
    (system / "usr/local/bin/ipam-plugin").symlink_to("/opt/own")
    before = tree(system)
    installing.install(str(system), EXECUTABLE)
    installing.uninstall(str(system))
    assert tree(system) == before


def test_what_the_daemon_wrote_stays_with_its_owner(system: Path) -> None:
    """The host's name and an embedded etcd outlive uninstall; when they are removed, a second one ends it."""
    before = tree(system)
    installing.install(str(system), EXECUTABLE)
    (system / "var/lib/ipam-plugin/host").write_text("a\n")
    line = installing.uninstall(str(system))[-1]
    assert "left with what the daemon wrote (host), and its owner, user ipam-plugin" in line
    assert users(system) == ["root", "ipam-plugin"]
    (system / "var/lib/ipam-plugin/host").unlink()
    assert installing.uninstall(str(system)) == ["/var/lib/ipam-plugin removed", "user ipam-plugin removed"]
    assert tree(system) == before


def test_the_list_of_installed_files_cannot_name_others(system: Path) -> None:
    """The service's user can write the list; root must not remove what that user chooses."""
    installing.install(str(system), EXECUTABLE)
    manifest = system / "var/lib/ipam-plugin/installed.json"
    victim = system / "etc/victim"
    victim.write_text("precious\n")
    told = json.loads(manifest.read_text())
    told["files"]["/etc/victim"] = "0d6a06a30d2eb4c4e8c8b3ae63ad55d0fb3f9f7a4f4c1d8a2f0b0f2f3b9fb8f1"
    told["links"]["/etc/victim"] = ""
    told["directories"] += ["/etc/empty", "/var/lib"]
    (system / "etc/empty").mkdir()
    manifest.write_text(json.dumps(told))
    installing.uninstall(str(system))
    assert victim.read_text() == "precious\n"
    assert (system / "etc/empty").is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 1}'])
def test_a_list_that_cannot_be_read_is_refused(system: Path, content: str) -> None:
    """Nothing is guessed."""
    installing.install(str(system), EXECUTABLE)
    (system / "var/lib/ipam-plugin/installed.json").write_text(content)
    before = tree(system)
    for function in (installing.uninstall, lambda root: installing.install(root, EXECUTABLE)):
        with pytest.raises(Refused, match=r"installed\.json cannot be read"):
            function(str(system))
    assert tree(system) == before


def test_a_list_that_is_a_link_is_refused(system: Path) -> None:
    """The service's user cannot make root read or replace another file."""
    installing.install(str(system), EXECUTABLE)
    manifest = system / "var/lib/ipam-plugin/installed.json"
    (system / "etc/other.json").write_bytes(manifest.read_bytes())
    manifest.unlink()
    manifest.symlink_to("/etc/other.json")
    with pytest.raises(Refused, match="cannot be read"):
        installing.uninstall(str(system))


# --- the executable --------------------------------------------------------------------------------------


def script(path: Path, interpreter: str = "/bin/sh") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n")
    path.chmod(0o755)
    return str(path)


def test_an_executable_in_a_closed_directory_is_refused(system: Path, tmp_path: Path) -> None:
    """systemd would only say 203/EXEC, again every second; install says which directory, and the cure."""
    command = script(tmp_path / "closed/ipam-plugin")
    tmp_path.chmod(0o755)
    (tmp_path / "closed").chmod(0o700)
    before = tree(system)
    # Which directory on the way is the first that is closed depends on where the tests' directory lies.
    with pytest.raises(Refused, match=r"is closed to other users \(mode 0700\); install the package where"):
        installing.install(str(system), command)
    assert tree(system) == before


def test_an_executable_in_a_home_is_refused(system: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ProtectHome= hides it from the service even where its mode would let it in; links are looked through."""
    home = tmp_path / "home"
    script(home / "ipam-plugin")
    (tmp_path / "link").symlink_to("home/ipam-plugin")
    monkeypatch.setattr(installing, "_HIDDEN", (str(home),))
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    with pytest.raises(Refused, match=r"which the service cannot see \(ProtectHome\); install the package where"):
        installing.install(str(system), str(tmp_path / "link"))


def test_the_interpreter_of_the_script_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A virtual environment in /opt made with a Python in /root does not run either."""
    assert installing._interpreter(script(tmp_path / "a", "/usr/bin/python3 -I")) == "/usr/bin/python3"
    assert installing._interpreter("/bin/true") == ""
    assert installing._obstacle("/root/venv/bin/python").endswith("(ProtectHome)")
    assert installing._obstacle("/bin/sh") == ""
    assert installing._obstacle("/usr/bin/no-such-program") == "/usr/bin/no-such-program: No such file or directory"


def test_typed_by_its_link_the_program_is_what_the_link_leads_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ipam-plugin install` is typed again when Docker came later; a link that leads to itself would be no command."""
    script = tmp_path / "opt/ipam-plugin"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    link = tmp_path / "ipam-plugin"
    link.symlink_to(script)
    monkeypatch.setattr(installing, "COMMAND", str(link))
    for typed in (link, script):
        monkeypatch.setattr(installing.sys, "argv", [str(typed)])
        assert installing._command() == str(script)


def test_a_command_that_is_none_is_refused(system: Path) -> None:
    """A typing error in a provisioning script is found at once."""
    for command in ("/no/such/command", "/etc"):
        with pytest.raises(Refused, match="is no executable file"):
            installing.install(str(system), command)


def test_signs_that_systemd_reads_are_quoted() -> None:
    """A path with a blank or a percent sign is one word, and that one, for systemd."""
    assert b'ExecStart="/opt/a b%%c/ipam-plugin" serve\n' in installing._asset(
        "ipam-plugin.service", "/opt/a b%c/ipam-plugin"
    )


# --- files that the configuration names --------------------------------------------------------------------


@pytest.fixture
def etc(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that every user can see, and a service whose user is on every machine."""
    monkeypatch.setattr(installing, "USER", "nobody")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_a_file_that_the_service_cannot_read_is_named_with_the_cure(etc: Path) -> None:
    """Root's check succeeds on root's own key, and then the daemon would not start; the cure is one to be pasted."""
    (etc / "ca.pem").touch(mode=0o644)
    (etc / "key.pem").touch(mode=0o600)
    (etc / "link.pem").symlink_to("key.pem")
    (etc / "closed").mkdir(mode=0o700)
    (etc / "closed/password").touch(mode=0o644)
    files = {
        "etcd.ca_cert": f"{etc}/ca.pem",
        "etcd.cert": f"{etc}/link.pem",
        "etcd.key": f"{etc}/key.pem",
        "etcd.password_file": f"{etc}/closed/password",
    }
    with pytest.raises(ConfigError) as caught:
        installing.check_readable(files)
    cannot = "user nobody, as whom the service runs, cannot read"
    cure = f"chown root:nobody {etc}/key.pem; chmod 640 {etc}/key.pem"
    assert str(caught.value).splitlines() == [
        f"etcd.cert: {cannot} {etc}/link.pem: {cure}",
        f"etcd.key: {cannot} {etc}/key.pem: {cure}",
        f"etcd.password_file: {cannot} {etc}/closed/password: chgrp nobody {etc}/closed; chmod g+x {etc}/closed",
    ]
    for line in str(caught.value).splitlines():
        # The group of nobody is not called so everywhere; the service's is.
        cure = (
            line.rpartition(": ")[2]
            .replace("chown root:nobody", "chown root:nogroup")
            .replace("chgrp nobody", "chgrp nogroup")
        )
        subprocess.run(cure, shell=True, check=True, timeout=30)
    installing.check_readable(files)


def test_a_file_in_a_home_is_named(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ProtectHome= hides it whatever its mode is, also behind a link."""
    (etc / "home").mkdir(mode=0o755)
    (etc / "home/key.pem").touch(mode=0o644)
    (etc / "key.pem").symlink_to("home/key.pem")
    monkeypatch.setattr(installing, "_HIDDEN", (f"{etc}/home",))
    with pytest.raises(ConfigError, match=r"cannot see .*/home \(ProtectHome\): put the file into /etc/ipam-plugin$"):
        installing.check_readable({"etcd.key": f"{etc}/key.pem"})


def test_without_the_services_user_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where install never ran, the daemon runs as whoever starts it."""
    (tmp_path / "key.pem").touch(mode=0o600)
    monkeypatch.setattr(installing, "USER", "no-such-user")
    installing.check_readable({"etcd.key": f"{tmp_path}/key.pem"})


# --- what is shipped -------------------------------------------------------------------------------------


def test_the_package_and_the_top_level_have_the_same_files() -> None:
    """What people read at the top level is what an installed package puts in place."""
    for shown, shipped in (("config.example.yaml", "config.example.yaml"), ("plugin.spec", "ipam-plugin.spec")):
        assert not (TOP / shown).is_symlink()
        assert (TOP / shown).read_bytes() == (TOP / "ipam_plugin/assets" / shipped).read_bytes()


def test_everything_that_is_put_is_shipped() -> None:
    """An installed package has what `ipam-plugin install` needs: each file is there, and the build takes it along."""
    shipped = {path.name for path in (TOP / "ipam_plugin/assets").iterdir()}
    assert shipped | {installing.MANUAL} == set(installing._FILES.values())
    settings = tomllib.loads((TOP / "pyproject.toml").read_text())
    assert "assets/*" in settings["tool"]["setuptools"]["package-data"]["ipam_plugin"]


# --- the units -------------------------------------------------------------------------------------------


@pytest.fixture
def units(system: Path) -> Path:
    """A directory with the units as installed."""
    if shutil.which("systemd-analyze") is None:
        missing("systemd", "systemd-analyze is not installed")
    installing.install(str(system), EXECUTABLE)
    return system / "etc/systemd/system"


def analyze(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def test_systemd_finds_nothing_wrong_with_the_units(units: Path) -> None:
    """No unknown setting, no dependency cycle: systemd would ignore the former silently."""
    done = analyze("verify", "--man=no", "./ipam-plugin.service", "./ipam-plugin.socket", cwd=units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_service_is_hardened(units: Path) -> None:
    """Exposure at most 1.8 (`systemd-analyze security`; 9.6 is a service without any of it), as README says.

    Of it 0.4 are for what raw sockets need.
    """
    done = analyze("security", "--offline=yes", "--threshold=18", "--no-pager", "./ipam-plugin.service", cwd=units)
    score = re.search(r"Overall exposure level for ipam-plugin\.service: ([0-9.]+)", done.stdout)
    assert score is not None, done.stdout + done.stderr
    assert float(score[1]) <= 1.8
    assert "`systemd-analyze security ipam-plugin` says 1.8" in " ".join((TOP / "README.md").read_text().split())


def test_the_page_has_no_rights_at_all(units: Path) -> None:
    """Exposure at most 1.1, no capability, no user that stays, and neither Docker's socket nor the plugin's."""
    done = analyze("verify", "--man=no", "./ipam-plugin-web.service", cwd=units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = analyze("security", "--offline=yes", "--threshold=11", "--no-pager", "./ipam-plugin-web.service", cwd=units)
    assert done.returncode == 0, done.stdout
    assert "`systemd-analyze security ipam-plugin-web` says 1.1" in " ".join((TOP / "README.md").read_text().split())
    settings = (units / "ipam-plugin-web.service").read_text().splitlines()
    assert {"DynamicUser=yes", "CapabilityBoundingSet=", "AmbientCapabilities=", "NoNewPrivileges=yes"} <= {*settings}
    [hidden] = [line for line in settings if line.startswith("InaccessiblePaths=")]
    assert "-/run/docker.sock" in hidden
    assert "-/run/ipam-plugin" in hidden
    assert "ExecStart=/bin/true web --listen ${LISTEN}" in settings


def test_the_service_may_open_raw_sockets_and_no_more(units: Path) -> None:
    """One capability, in the set that a process without root gets and in the one that nobody below it can leave."""
    settings = (units / "ipam-plugin.service").read_text().splitlines()
    assert [line for line in settings if "Capabilit" in line and not line.startswith("#")] == [
        "AmbientCapabilities=CAP_NET_RAW",
        "CapabilityBoundingSet=CAP_NET_RAW",
    ]
    [families] = [line.partition("=")[2].split() for line in settings if line.startswith("RestrictAddressFamilies=")]
    assert sorted(families) == ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_UNIX"]
    # In a user namespace the capability would be one of that namespace alone.
    assert not any(line.startswith("PrivateUsers=") for line in settings)


def test_the_service_has_the_time_that_a_request_may_take(units: Path) -> None:
    """A stop answers what Docker waits for; the longest `deadline` is 60 s, and an embedded etcd ends after that."""
    [seconds] = re.findall(r"(?m)^TimeoutStopSec=(\d+)$", (units / "ipam-plugin.service").read_text())
    assert int(seconds) >= 60 + 10


def test_the_order_of_start(units: Path) -> None:
    """Docker comes after the daemon and never the daemon because of Docker, or a broken one would stop the other."""
    for name in installing.UNITS:
        settings = [line for line in (units / name).read_text().splitlines() if line and not line.startswith("#")]
        assert "Before=docker.service" in settings
        for line in settings:
            key, _, value = line.partition("=")
            assert key == "Before" or "docker" not in value or key in ("Description", "ListenStream"), line
    spec = (units.parent.parent / "docker/plugins/ipam-plugin.spec").read_text().strip()
    socket_unit = (units / "ipam-plugin.socket").read_text()
    assert f"ListenStream={spec.removeprefix('unix://')}\n" in socket_unit
    assert "SocketMode=0600\n" in socket_unit


# --- Docker's group --------------------------------------------------------------------------------------


def members(root: Path, group: str) -> list[str]:
    lines = (root / "etc/group").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{group}:")).rpartition(":")[2].split(",")


def test_the_user_may_look_at_dockerd(system: Path) -> None:
    """Where there is a group docker, and once: an operator who takes the user out again meant it."""
    with open(system / "etc/group", "a") as groups:
        groups.write("docker:x:990:ann\n")
    with open(system / "etc/gshadow", "a") as groups:
        groups.write("docker:!::ann\n")
    said = installing.install(root=str(system), executable="/bin/true", start=False)
    assert members(system, "docker") == ["ann", "ipam-plugin"]
    assert any("put into group docker" in line and "equals root" in line for line in said)
    text = (system / "etc/group").read_text().replace("ann,ipam-plugin", "ann")
    (system / "etc/group").write_text(text)
    again = installing.install(root=str(system), executable="/bin/true", start=False)
    assert members(system, "docker") == ["ann"]
    assert not any("group docker" in line for line in again)
