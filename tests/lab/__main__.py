"""The lab by hand, as root, from the project's top directory:

    python -m tests.lab up [--hosts 3 --machines 2 --etcd 1 --daemon …]   prints who is where, and returns
    python -m tests.lab status
    python -m tests.lab sh host1 [COMMAND …]                              a shell (or a command) there
    python -m tests.lab docker host1 run -d busybox
    python -m tests.lab etcdctl get --prefix /ipam-plugin/
    python -m tests.lab kill host1 | start host1 | cut-off host1 | rejoin host1
    python -m tests.lab down
    python -m tests.lab sweep                                             what dead labs left

`up` leaves a process behind that holds the lab; `down` ends it. All commands mean the newest
lab; `status`, `sh` and `docker` also reach the lab of a test that runs, the others need one made by `up`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from .lab import PREFIX, Lab, missing, owner_of
from .machines import DOCKER_SOCKET
from .node import ROOT, LabError, Node, running, start_time, until

CONTROL = "control.sock"


def newest() -> tuple[Path, int]:
    """The directory of the newest lab that lives, and the process that owns it."""
    found = sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"), key=lambda p: p.stat().st_mtime)
    for path in reversed(found):
        owner = owner_of(path.name)
        if owner is not None:
            return path, owner
    raise LabError("no lab is up; make one with `python -m tests.lab up`")


def describe(lab: Lab) -> str:
    lines = [f"{host.name:10} {host.address:16} {host.address6:14} Docker, br0" for host in lab.hosts]
    lines += [f"{m.name:10} {m.address:16} {m.address6:14} no Docker, eth0" for m in lab.machines]
    if lab.router:
        lines.append(f"{lab.router.name:10} {lab.router.address:16} {lab.router.address6:14} default route")
    lines += [f"{member.name:10} {member.address:16} {'':14} etcd, {member.endpoint}" for member in lab.etcd]
    return "\n".join(lines)


def hold(options: argparse.Namespace) -> int:
    """Owns a lab: answers one-line requests on a socket in its directory until told `down`, or SIGTERM."""
    ready = os.fdopen(options.ready, "w")
    try:
        lab = Lab(
            options.hosts,
            options.machines,
            options.etcd,
            not options.no_router,
            etcd_on=options.etcd_on,
            daemon=options.daemon,
        )
        with lab, socket.socket(socket.AF_UNIX) as server:
            server.bind(str(lab.directory / CONTROL))
            server.listen()
            print(f"ready\n{describe(lab)}", file=ready, flush=True)
            ready.close()
            while True:
                connection, _ = server.accept()
                with connection, connection.makefile("rw") as stream:
                    words = json.loads(stream.readline())
                    if words == ["down"]:
                        return 0
                    try:
                        answer = obey(lab, words)
                    except LabError as error:
                        answer = f"error: {error}"
                    stream.write(answer + "\n")
    except LabError as error:
        print(error, file=ready, flush=True)
        return 1


def obey(lab: Lab, words: list[str]) -> str:
    if words[0] == "etcdctl":
        return lab.etcdctl(*words[1:])
    if words[0] == "live":
        return "\n".join(f"{one.host:8} {one.container:24} {one.address:16} {one.mac}" for one in lab.live())
    name, *rest = words[1:]
    host = next((host for host in lab.hosts if host.name == name), None)
    if host is None:
        raise LabError(f"{name} is no Docker host of this lab")
    if words[0] == "kill":
        host.kill(*rest)
    elif words[0] == "start":
        host.start()
    elif words[0] == "cut-off":
        host.cut_off()
    elif words[0] == "rejoin":
        host.rejoin()
    return f"{name}: {words[0]}: done"


def ask(directory: Path, words: list[str]) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        try:
            connection.connect(str(directory / CONTROL))
        except OSError as error:
            raise LabError(f"{directory.name} was not made by `up` and cannot be asked: {error}") from None
        with connection.makefile("rw") as stream:
            stream.write(json.dumps(words) + "\n")
            stream.flush()
            return stream.read().rstrip()


def up(arguments: list[str]) -> int:
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as log:
        owner = subprocess.Popen(
            [sys.executable, "-m", "tests.lab", "hold", "--ready", str(writer), *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        with os.fdopen(reader) as stream:
            first, *rest = stream.read().strip().splitlines() or [""]
        if first != "ready":
            owner.wait(60)
            log.seek(0)
            print("\n".join([first, *rest]) or log.read().decode(errors="replace"), file=sys.stderr)
            return 1
    print("\n".join(rest))
    return 0


def enter(directory: Path, name: str, command: list[str]) -> NoReturn:
    """Becomes a command in a machine of the lab."""
    machines = running(directory.name)
    if name not in machines:
        raise LabError(f"{name} is not on; on are {', '.join(sorted(machines))}")
    argv = [*Node.words(machines[name]), *(command or ["sh"])]
    os.execvpe(argv[0], argv, {**Node.environment(), "PS1": f"{name}# "})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="A LAN of Docker hosts by hand.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "hold"):
        sub = commands.add_parser(name)
        sub.add_argument("--hosts", type=int, default=3)
        sub.add_argument("--machines", type=int, default=2)
        sub.add_argument("--etcd", type=int, default=1)
        sub.add_argument("--etcd-on", choices=["lan", "management", "hosts"], default="lan")
        sub.add_argument("--no-router", action="store_true")
        sub.add_argument("--daemon", action="store_true", help="start the ipam-plugin daemon on every host")
        sub.add_argument("--ready", type=int, help=argparse.SUPPRESS)
    for name in ("status", "live", "down", "sweep"):
        commands.add_parser(name)
    for name in ("sh", "docker", "kill", "start", "cut-off", "rejoin"):
        sub = commands.add_parser(name)
        sub.add_argument("host")
        sub.add_argument("words", nargs=argparse.REMAINDER)
    commands.add_parser("etcdctl").add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        return carry_out(options)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1


def carry_out(options: argparse.Namespace) -> int:
    if options.command in ("up", "hold"):
        why = missing(etcd=options.etcd > 0)
        if why:
            raise LabError(f"no lab can be made here: {why}")
    if options.command == "up":
        return up(sys.argv[2:])
    if options.command == "hold":
        return hold(options)
    if options.command == "sweep":
        print("\n".join(Lab.sweep()) or "nothing to sweep")
        return 0
    directory, owner = newest()
    if options.command == "down":
        started = start_time(owner)
        os.kill(owner, signal.SIGTERM)
        until(lambda: start_time(owner) != started, 60, "the lab is down")
    elif options.command == "status":
        print(f"{directory}, held by process {owner}")
        for name, pid in sorted(running(directory.name).items()):
            print(f"{name:12} pid {pid}")
    elif options.command == "sh":
        enter(directory, options.host, options.words)
    elif options.command == "docker":
        enter(directory, options.host, ["docker", "-H", f"unix://{DOCKER_SOCKET}", *options.words])
    else:
        words = [options.command, *([options.host] if hasattr(options, "host") else [])]
        answer = ask(directory, words + list(getattr(options, "words", [])))
        print(answer)
        return int(answer.startswith("error: "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
