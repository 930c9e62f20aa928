"""Runs a command as systemd starts the service of a socket unit: a listening socket that is there already becomes its
descriptor 3 (sd_listen_fds(3)).

Run as a script with a descriptor's number, how many sockets to announce, and the command. Only the standard library,
and nothing of this package: it runs with `python -I -S`.
"""

import os
import sys

os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
