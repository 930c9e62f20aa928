"""Writes down everything that is written to etcd, and when, across the failures of members.

Run as a script in a machine that reaches them: `watcher.py ENDPOINT …` (http://ADDRESS:PORT). Each line of standard
output is a JSON list; times are seconds since the epoch:

- `["put", REVISION, SEEN, KEY, VALUE]` and `["delete", REVISION, SEEN, KEY, null]`, in the order of their revisions,
  each once; first, with SEEN of the beginning, what stands there already. Keys and values that are no UTF-8 are shown
  with U+FFFD.
- `["tick", SENT, REVISION]`: a linearizable read that was sent at SENT was answered at that revision, so that all
  later revisions were written later. Where none comes, etcd is away.

One member is asked until it fails to answer a read, then the next one, from the revision after the last: a member that
is paused or cut off keeps its connections open and says nothing. By the JSON gateway of etcd 3.4 and later (`/v3/`).
Only the standard library.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import socket
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

PERIOD = 0.25  # seconds between two reads
PATIENCE = 2.0  # seconds for one read
ALL = base64.b64encode(b"\0").decode()


def say(*words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")  # in one call, as two threads write
    sys.stdout.flush()


def text(encoded: str) -> str:
    return base64.b64decode(encoded).decode("utf-8", "replace")


def open_(endpoint: str) -> http.client.HTTPConnection:
    place = urlsplit(endpoint)
    assert place.hostname
    return http.client.HTTPConnection(place.hostname, place.port, timeout=PATIENCE)


def read(endpoint: str, **more: Any) -> dict[str, Any]:
    """A linearizable read of all keys. Raises OSError, HTTPException, ValueError."""
    with contextlib.closing(open_(endpoint)) as connection:
        connection.request("POST", "/v3/kv/range", json.dumps({"key": ALL, "range_end": ALL, **more}))
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise http.client.HTTPException(f"{response.status} {data[:200]!r}")
        found: dict[str, Any] = json.loads(data)
        return found


def tick(endpoint: str) -> None:
    sent = time.time()
    say("tick", sent, int(read(endpoint, count_only=True)["header"]["revision"]))


def begin(endpoint: str) -> int:
    """What stands there. Returns its revision."""
    now = time.time()
    found = read(endpoint)
    for each in sorted(found.get("kvs", ()), key=lambda kv: int(kv["mod_revision"])):
        say("put", int(each["mod_revision"]), now, text(each["key"]), text(each.get("value", "")))
    return int(found["header"]["revision"])


def follow(endpoint: str, last: int) -> int:
    """Everything after a revision, until this member fails. Returns the last revision that was told."""
    ended = threading.Event()
    with contextlib.closing(open_(endpoint)) as connection:
        order = {"key": ALL, "range_end": ALL, "start_revision": str(last + 1)}
        connection.request("POST", "/v3/watch", json.dumps({"create_request": order}))
        wire = connection.sock
        response = connection.getresponse()
        wire.settimeout(None)

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                while not ended.wait(PERIOD):
                    tick(endpoint)
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)  # which ends the reading, too

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for line in response:
                seen = time.time()
                result = json.loads(line)["result"]
                if result.get("canceled"):
                    raise ValueError(f"etcd ended the watch: {result}")
                for event in result.get("events", ()):
                    kv = event["kv"]
                    revision, key = int(kv["mod_revision"]), text(kv["key"])
                    if event.get("type") == "DELETE":
                        say("delete", revision, seen, key, None)
                    else:
                        say("put", revision, seen, key, text(kv.get("value", "")))
                    last = revision
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            print(f"{endpoint}: {error!r}", file=sys.stderr)
        finally:
            ended.set()
            asking.join()
    return last


def main(endpoints: list[str]) -> None:
    last = 0
    for endpoint in itertools.cycle(endpoints):
        try:
            last = follow(endpoint, last or begin(endpoint))
        except (OSError, http.client.HTTPException, ValueError) as error:
            print(f"{endpoint}: {error!r}", file=sys.stderr)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1:])
