"""`ipam-plugin install` and `uninstall`: the files that make this program a service of the host.

What was put where is written to a list (`installed.json` in the state directory), with a checksum each, and
`uninstall` takes back what stands there and is unchanged. The list lies in a directory that the service's
own user can write, and root acts on it: so it can only say *that* a file was put, never *which* files there
are. Those are the ones below.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

import ipam_plugin
from ipam_plugin.errors import ConfigError, Refused

USER = "ipam-plugin"
DOCKER = "docker"  # the group that may use Docker's socket, where there is one
STATE_DIR = "/var/lib/ipam-plugin"
RUN_DIR = "/run/ipam-plugin"
MANIFEST = f"{STATE_DIR}/installed.json"
CONFIG = "/etc/ipam-plugin/config.yaml"
COMMAND = "/usr/local/bin/ipam-plugin"
UNITS = ("ipam-plugin.socket", "ipam-plugin.service")
PAGE = "ipam-plugin-web.service"  # put, and started by nobody but the operator
MANUAL = "ipam-plugin.8"  # no file of the package: made of what the commands say of themselves

# In the order in which they are put; taken back in the other.
_FILES = {
    "/etc/docker/plugins/ipam-plugin.spec": "ipam-plugin.spec",
    CONFIG: "config.example.yaml",
    "/etc/systemd/system/ipam-plugin.socket": "ipam-plugin.socket",
    "/etc/systemd/system/ipam-plugin.service": "ipam-plugin.service",
    f"/etc/systemd/system/{PAGE}": PAGE,
    "/usr/local/share/bash-completion/completions/ipam-plugin": "completion.bash",
    "/usr/local/share/zsh/site-functions/_ipam-plugin": "completion.zsh",
    "/usr/local/share/fish/vendor_completions.d/ipam-plugin.fish": "completion.fish",
    "/usr/local/share/man/man8/ipam-plugin.8": MANUAL,
}
_COMMAND_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
# ProtectHome= in the unit makes these empty for the service, whatever their modes are.
_HIDDEN = ("/home", "/root", "/run/user")
_MANIFEST_MAX_BYTES = 1 << 16


class Manifest(msgspec.Struct, kw_only=True):
    """What was put: SHA-256 by path of a file, target by path of a link, directories, and whether the user, and the
    user into Docker's group."""

    files: dict[str, str] = msgspec.field(default_factory=dict)
    links: dict[str, str] = msgspec.field(default_factory=dict)
    directories: list[str] = msgspec.field(default_factory=list)
    user: bool = False
    docker: bool = False


def install(root: str = "/", executable: str | None = None, start: bool = True, manual: str | None = None) -> list[str]:
    """Puts spec, example configuration, units, user, command, completions and `manual` (the page, None: none) in place;
    says in lines what it did.

    A file that is there and not ours, or that the operator changed, is left and named. Run again, it
    changes nothing; run by a newer version, it replaces what is unchanged. `root` is the root directory of
    another system (an image); nothing is started there. Raises Refused with a sentence.
    """
    target = _Root(root)
    command = _command() if executable is None else os.path.abspath(executable)
    if os.geteuid() != 0:
        raise Refused("install writes to /etc, /usr/local and /var/lib, and only root may; try sudo")
    _check_executable(command, try_it=target.live)
    return list(_install(target, command, start, manual))


def uninstall(root: str = "/", give_back: Callable[[], Iterable[str]] = tuple) -> list[str]:
    """Takes back exactly what `install` put, and says in lines what it did and what it left, and why.

    Files that were changed since stay; so does the state directory with what the daemon wrote (the host's
    name, an embedded etcd's data), and then also the user it belongs to. `give_back` gives back what this host
    keeps in the register for its daemon alone, and says so in lines; it is called when the service has ended,
    while its configuration is still there, and also where nothing was installed (a daemon may have been started by
    hand), but not for the root directory of another system. Raises Refused.
    """
    if os.geteuid() != 0:
        raise Refused("uninstall removes files of /etc, /usr/local and /var/lib, and only root may; try sudo")
    target = _Root(root)
    return list(_uninstall(target, give_back if target.live else tuple))


def check_readable(files: Mapping[str, str]) -> None:
    """Raises ConfigError, a line per file, when the service's user could not read what root can.

    `files`: absolute path by the configuration's key that names it. Does nothing for another user than root, who
    could not try it, and on a machine without the service's user, where the daemon runs as somebody else.
    """
    if os.geteuid() != 0:
        return
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        return
    problems = [f"{key}: {problem}" for key, file in files.items() if (problem := _unreadable(user, file))]
    if problems:
        raise ConfigError("\n".join(problems))


def _unreadable(user: pwd.struct_passwd, file: str) -> str:
    """Why `user` cannot read `file`, with the cure, or ''."""
    cannot = f"user {user.pw_name}, as whom the service runs, cannot read {file}"
    real = os.path.realpath(file)
    for path in (file, real):
        hidden = next((each for each in _HIDDEN if Path(path).is_relative_to(each)), "")
        if hidden:
            return f"{cannot}, as it cannot see {hidden} (ProtectHome): put the file into {os.path.dirname(CONFIG)}"
    if _permits(user, "-r", file):
        return ""
    for directory in [*reversed(Path(file).parents), *reversed(Path(real).parents)]:
        if not _permits(user, "-x", str(directory)):
            return f"{cannot}: chgrp {user.pw_name} {directory}; chmod g+x {directory}"
    return f"{cannot}: chown root:{user.pw_name} {real}; chmod 640 {real}"


def _permits(user: pwd.struct_passwd, right: str, path: str) -> bool:
    """Asked as that user with test(1): modes alone do not tell of access control lists."""
    done = subprocess.run(
        ["test", right, path],
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
        cwd="/",
        timeout=60,
        check=False,
    )
    return done.returncode == 0


class _Root:
    """The system that is installed to: `/`, or the root directory of another one."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)
        self.live = self._root.resolve() == Path("/")
        self.systemd = self.live and Path("/run/systemd/system").is_dir()

    def path(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def user(self) -> tuple[int, int] | None:
        """uid and gid of the service's user, None without one."""
        if self.live:
            try:
                entry = pwd.getpwnam(USER)
            except KeyError:
                return None
            return entry.pw_uid, entry.pw_gid
        with contextlib.suppress(OSError):
            for line in self.path("/etc/passwd").read_text().splitlines():
                fields = line.split(":")
                if fields[0] == USER:
                    return int(fields[2]), int(fields[3])
        return None

    def in_docker_group(self) -> bool | None:
        """Whether the service's user is a member; None without that group."""
        with contextlib.suppress(OSError):
            for line in self.path("/etc/group").read_text().splitlines():
                fields = line.split(":")
                if fields[0] == DOCKER:
                    return USER in fields[-1].split(",")
        return None

    def prefix(self) -> list[str]:
        return [] if self.live else ["--prefix", str(self._root)]

    def read_manifest(self) -> Manifest:
        try:
            with open(self.path(MANIFEST), "rb", opener=_no_links) as stream:
                return msgspec.json.decode(stream.read(_MANIFEST_MAX_BYTES), type=Manifest)
        except FileNotFoundError:
            return Manifest()
        except (OSError, msgspec.MsgspecError) as error:
            raise Refused(
                f"{self.path(MANIFEST)} cannot be read ({error}), so it is not known what was installed; "
                "remove it, and the files it was to list, by hand"
            ) from error

    def write_manifest(self, manifest: Manifest) -> None:
        data = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"))
        path = self.path(MANIFEST)
        if not path.exists() or path.read_bytes() != data + b"\n":
            _write(path, data + b"\n", 0o644)


def _install(target: _Root, command: str, start: bool, manual: str | None) -> Iterator[str]:
    manifest = target.read_manifest()
    changed = False
    try:
        if target.user() is None:
            _run(
                *("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", STATE_DIR),
                *("--shell", "/usr/sbin/nologin", *target.prefix(), USER),
            )
            manifest.user = changed = True
            yield f"user {USER} made"
        # Once: an operator who took it out again meant it. Not in the unit, which would not start without that group.
        if target.in_docker_group() is False and not manifest.docker:
            _run("usermod", "--append", "--groups", DOCKER, *target.prefix(), USER)
            manifest.docker = changed = True
            yield (
                f"user {USER} put into group {DOCKER}, for the look at dockerd (access to Docker's socket equals root;"
                f" without it: docker.reconcile: false in {CONFIG} and gpasswd --delete {USER} {DOCKER})"
            )
        _make_state_dir(target, manifest)
        for path, asset in _FILES.items():
            if asset == MANUAL and manual is None:
                continue
            data = manual.encode() if asset == MANUAL and manual is not None else _asset(asset, command)
            state = _state(target, manifest, path, hashlib.sha256(data).hexdigest())
            if state == "same":
                continue
            if state == "theirs":
                if path == CONFIG:
                    yield f"{path} left as it is"
                else:
                    yield f"{path} left as it is, because it is not as install wrote it; wanted there:\n{data.decode()}"
                continue
            _make_directories(target, manifest, os.path.dirname(path))
            _write(target.path(path), data, 0o644)
            manifest.files[path] = hashlib.sha256(data).hexdigest()
            changed = True
            yield f"{path} {'replaced' if state == 'ours' else 'written'}"
        for line in _link_command(target, manifest, command):
            changed = True
            yield line
    finally:
        # Also when something failed halfway: what is there can be taken back.
        if target.path(STATE_DIR).is_dir():
            target.write_manifest(manifest)
    if not changed:
        yield "nothing to do: everything is in place"
    if not start:
        return
    if target.systemd:
        if changed:
            _run("systemctl", "daemon-reload")
        # --no-block: without its etcd the daemon needs 90 s to report ready.
        _run("systemctl", "enable", "--now", "--no-block", *UNITS)
        yield f"{' and '.join(UNITS)} enabled and started; after a change of {CONFIG}: systemctl restart ipam-plugin"
    else:
        yield f"systemd does not run here; type: systemctl daemon-reload && systemctl enable --now {' '.join(UNITS)}"


def _uninstall(target: _Root, give_back: Callable[[], Iterable[str]]) -> Iterator[str]:
    manifest = target.read_manifest()
    units = [unit for unit in (*UNITS, PAGE) if f"/etc/systemd/system/{unit}" in manifest.files]
    if units and target.systemd:
        _run("systemctl", "disable", "--now", *reversed(units))
        yield f"{', '.join(units)} stopped and disabled"
        # systemd made it for the socket, and takes back the socket alone.
        _remove_empty(target.path(RUN_DIR))
    given_back = list(give_back())
    yield from given_back
    if manifest == Manifest():
        yield f"nothing {'else ' if given_back else ''}to do: install put nothing here"
        return
    for path in reversed(_FILES):
        recorded = manifest.files.pop(path, None)
        if recorded is None or not target.path(path).exists():
            continue
        if _state(target, Manifest(files={path: recorded}), path, "") == "ours":
            target.path(path).unlink()
            yield f"{path} removed"
        else:
            yield f"{path} left, because it was changed since"
    link = manifest.links.pop(COMMAND, None)
    if link is not None and target.path(COMMAND).is_symlink() and os.readlink(target.path(COMMAND)) == link:
        target.path(COMMAND).unlink()
        yield f"{COMMAND} removed"
    for path in reversed(_directories()):
        if path != STATE_DIR and path in manifest.directories and _remove_empty(target.path(path)):
            manifest.directories.remove(path)
            yield f"{path} removed"
    if units and target.systemd:
        _run("systemctl", "daemon-reload")
    yield from _remove_state_dir(target, manifest)


def _remove_state_dir(target: _Root, manifest: Manifest) -> Iterator[str]:
    if manifest.docker and target.live and target.in_docker_group():
        _run("gpasswd", "--delete", USER, DOCKER)
        yield f"user {USER} taken out of group {DOCKER}"
    manifest.docker = False
    state_dir = target.path(STATE_DIR)
    rest = sorted({entry.name for entry in state_dir.iterdir()} - {os.path.basename(MANIFEST)})
    if rest:
        # The files keep their owner, whose number would otherwise be the next new user's.
        manifest = Manifest(user=manifest.user, directories=[STATE_DIR] if STATE_DIR in manifest.directories else [])
        target.write_manifest(manifest)
        yield (
            f"{STATE_DIR} left with what the daemon wrote ({', '.join(rest)}), and its owner, user {USER}: with "
            "them a daemon that is installed again is the same host; to be rid of both, remove those files and "
            "uninstall again"
        )
        return
    target.path(MANIFEST).unlink(missing_ok=True)
    if STATE_DIR in manifest.directories and _remove_empty(state_dir):
        yield f"{STATE_DIR} removed"
    if manifest.user and target.user() is not None:
        _run("userdel", *target.prefix(), USER)
        yield f"user {USER} removed"


# --- the executable --------------------------------------------------------------------------------------


def _command() -> str:
    """The path by which this program was started, or its script beside this Python."""
    for candidate in (sys.argv[0], os.path.join(os.path.dirname(sys.executable), "ipam-plugin")):
        if os.path.basename(candidate) == "ipam-plugin" and os.access(candidate, os.X_OK):
            return _behind_link(os.path.abspath(candidate))
    found = shutil.which("ipam-plugin")
    if found is None:
        raise Refused("there is no command ipam-plugin beside this Python; install the package with pip first")
    return _behind_link(os.path.abspath(found))


def _behind_link(command: str) -> str:
    """Where our own link leads: typed by its name, the program must not make the link lead to itself."""
    return os.path.abspath(os.readlink(command)) if command == COMMAND and os.path.islink(command) else command


def _check_executable(command: str, *, try_it: bool) -> None:
    """Raises Refused when the service's user could not run `command` (systemd's error would be a number)."""
    if not os.path.isfile(command) or not os.access(command, os.X_OK):
        raise Refused(f"{command} is no executable file")
    package = os.path.dirname(os.path.abspath(ipam_plugin.__file__))
    cure = (
        f"install the package where user {USER} can read it, for example: python3 -m venv /opt/ipam-plugin && "
        "/opt/ipam-plugin/bin/pip install <the package> && /opt/ipam-plugin/bin/ipam-plugin install"
    )
    for path in (command, _interpreter(command), package):
        obstacle = _obstacle(path) if path else ""
        if obstacle:
            raise Refused(f"the service could not run {command}: {obstacle}; {cure}")
    if try_it:
        # Nobody has no more rights than the service's own user, who may not be there yet.
        nobody = pwd.getpwnam("nobody")
        try:
            trial = subprocess.run(
                [command, "--help"],
                user=nobody.pw_uid,
                group=nobody.pw_gid,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            failure = "" if trial.returncode == 0 else (trial.stderr.strip().splitlines() or ["no output"])[-1]
        except (OSError, subprocess.SubprocessError) as error:
            failure = str(error)
        if failure:
            raise Refused(f"the service could not run {command} (tried as user nobody): {failure}; {cure}")


def _interpreter(command: str) -> str:
    """The program in the `#!` line of a script, else ''."""
    with open(command, "rb") as stream:
        line = stream.readline(4096)
    words = line[2:].decode(errors="replace").split() if line.startswith(b"#!") else []
    return words[0] if words and os.path.isabs(words[0]) else ""


def _obstacle(path: str) -> str:
    """Why another user cannot reach `path`, or ''. Links are followed as the kernel does, one by one."""
    for _ in range(40):
        walked = Path("/")
        for part in Path(os.path.normpath(path)).parts[1:]:
            walked = walked / part
            if str(walked) in _HIDDEN:
                return f"{path} lies below {walked}, which the service cannot see (ProtectHome)"
            try:
                mode = os.lstat(walked).st_mode
            except OSError as error:
                return f"{walked}: {error.strerror}"
            if stat.S_ISLNK(mode):
                rest = os.path.normpath(path)[len(str(walked)) :]
                path = os.path.normpath(walked.parent / os.readlink(walked)) + rest
                break
            if stat.S_ISDIR(mode) and not mode & stat.S_IXOTH:
                return f"{walked} is closed to other users (mode {stat.S_IMODE(mode):04o})"
        else:
            if stat.S_ISREG(mode) and not mode & stat.S_IROTH:
                return f"{path} is closed to other users (mode {stat.S_IMODE(mode):04o})"
            return ""
    return f"{path}: too many links"


def _link_command(target: _Root, manifest: Manifest, command: str) -> Iterator[str]:
    """Makes the command found by its name, in a new shell too, whatever PATH is in this one."""
    path = target.path(COMMAND)
    ours = manifest.links.get(COMMAND)
    if ours is not None and path.is_symlink() and os.readlink(path) == ours:
        if ours != command:
            path.unlink()
            path.symlink_to(command)
            manifest.links[COMMAND] = command
            yield f"{COMMAND} now leads to {command}"
        return
    if any(os.path.lexists(target.path(f"{directory}/ipam-plugin")) for directory in _COMMAND_PATH):
        return
    _make_directories(target, manifest, os.path.dirname(COMMAND))
    path.symlink_to(command)
    manifest.links[COMMAND] = command
    yield f"{COMMAND} leads to {command}"


# --- files -----------------------------------------------------------------------------------------------


def _asset(name: str, command: str) -> bytes:
    text = (importlib.resources.files("ipam_plugin") / "assets" / name).read_text(encoding="utf-8")
    # systemd.service(5), "Command lines": quotes keep blanks, and %, $ and \ mean something.
    quoted = command.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return text.replace("@EXECUTABLE@", f'"{quoted}"' if quoted != command or " " in command else command).encode()


def _state(target: _Root, manifest: Manifest, path: str, wanted: str) -> str:
    """`absent`, `same` as wanted, `ours` (as install wrote it once), or `theirs`."""
    try:
        with open(target.path(path), "rb", opener=_no_links) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return "absent"
    except OSError:  # a link or a directory
        return "theirs"
    if found == wanted:
        return "same"
    return "ours" if manifest.files.get(path) == found else "theirs"


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all; never through a link that somebody put in its place."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)


def _directories() -> list[str]:
    """Every directory that `install` may make, parents first."""
    found = {STATE_DIR}
    for path in (*_FILES, COMMAND):
        found.update(str(parent) for parent in Path(path).parents if len(parent.parts) > 2)
    return sorted(found)


def _make_directories(target: _Root, manifest: Manifest, path: str) -> None:
    for directory in reversed((Path(path), *Path(path).parents)):
        if not target.path(str(directory)).is_dir():
            target.path(str(directory)).mkdir(mode=0o755)
            target.path(str(directory)).chmod(0o755)
            if str(directory) in _directories() and str(directory) not in manifest.directories:
                manifest.directories.append(str(directory))


def _make_state_dir(target: _Root, manifest: Manifest) -> None:
    _make_directories(target, manifest, os.path.dirname(STATE_DIR))
    path = target.path(STATE_DIR)
    if not path.is_dir():
        path.mkdir(mode=0o700)
        if STATE_DIR not in manifest.directories:
            manifest.directories.append(STATE_DIR)
        owner = target.user()
        if owner is not None:
            os.chown(path, *owner)


def _remove_empty(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(f"`{' '.join(command)}` failed: {error}") from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise Refused(f"`{' '.join(command)}` failed with exit status {done.returncode}: {said}")
