"""Process 1 of a machine of the lab: gives it its own files, then lives until the lab's owner dies.

Run as a script, in new mount, PID, network, UTS and IPC namespaces, with one argument, a JSON object:

- `hostname`: the machine's name. `lab`: the lab's; only to be seen in the list of processes.
- `owner`: an inherited pidfd of the process that owns the lab. When that process is gone, however it
  ended, this one ends, and the kernel kills everything in the PID namespace with it; the mounts and the
  network namespace go when their last process does. So a lab needs no names in the machine's own
  namespaces and leaves nothing running behind.
- `disk` (optional): a directory that survives a power cut. `disk/etc` becomes /etc, `disk/var/lib/X`
  becomes /var/lib/X (what else is in /var/lib stays as it is), /run is a new tmpfs.
- `boot_id` (optional): what /proc/sys/kernel/random/boot_id shows.

Writes one line to standard output, `ready` or what went wrong. Only the standard library, and nothing of
this package: it runs with `python -I -S`.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC = 2, 4, 8, 4096, 16384

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError that names the target."""
    words = (str(source).encode(), str(target).encode(), kind.encode())
    if _libc.mount(*words, ctypes.c_ulong(flags), data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def bind(source: str | Path, target: str | Path) -> None:
    mount(source, target, flags=MS_BIND | MS_REC)


def own_proc_and_sys() -> None:
    """A /proc that shows this PID namespace and a /sys that shows this network namespace.

    `ip netns exec` mounts a bare /sys, which hides the cgroups without which runc starts nothing; they
    are carried over from the machine.
    """
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if not Path("/sys/fs/cgroup").is_dir():
        return
    cgroups = os.open("/sys/fs/cgroup", os.O_PATH | os.O_DIRECTORY)
    try:
        # A path through the descriptor still reaches the mount that the new /sys is about to cover.
        mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        bind(f"/proc/self/fd/{cgroups}", "/sys/fs/cgroup")
    finally:
        os.close(cgroups)


def own_files(disk: Path, boot_id: str | None) -> None:
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    bind(disk / "etc", "/etc")
    own_var_lib(disk / "var/lib")
    if boot_id is not None:
        file = Path("/run/boot_id")
        file.write_text(f"{boot_id}\n")
        bind(file, "/proc/sys/kernel/random/boot_id")


def own_var_lib(own: Path) -> None:
    """Puts the directories of `own` into /var/lib without making mount points on the machine's own disk."""
    outer = Path("/var/lib")
    names = {entry.name for entry in own.iterdir()}
    old = os.open(outer, os.O_PATH | os.O_DIRECTORY)
    try:
        mount("tmpfs", outer, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
        for entry in os.scandir(f"/proc/self/fd/{old}"):
            target = outer / entry.name
            if entry.name in names:
                continue
            if entry.is_symlink():
                target.symlink_to(os.readlink(entry.path))
                continue
            if entry.is_dir():
                target.mkdir()
            elif entry.is_file():
                target.touch()
            else:
                continue
            bind(entry.path, target)
        for name in names:
            (outer / name).mkdir()
            bind(own / name, outer / name)
    finally:
        os.close(old)


def live(owner: int) -> None:
    """Reaps orphans, as process 1 must, until the owner is gone."""
    reader, writer = socket.socketpair()
    for end in (reader, writer):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(reader, select.POLLIN)
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        ready = {descriptor for descriptor, _ in poll.poll()}
        if owner in ready:
            return
        with contextlib.suppress(BlockingIOError):
            reader.recv(4096)


def main() -> None:
    plan = json.loads(sys.argv[1])
    try:
        socket.sethostname(plan["hostname"])
        own_proc_and_sys()
        if "disk" in plan:
            own_files(Path(plan["disk"]), plan.get("boot_id"))
    except OSError as error:
        print(f"{plan['hostname']}: {error}", flush=True)
        sys.exit(1)
    print("ready", flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    live(plan["owner"])


if __name__ == "__main__":
    main()
