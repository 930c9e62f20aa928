"""The page in the browser, and its API: HTTP in, what the board says out. Reads only; decides nothing.

It runs in a process of its own, anywhere that reaches etcd, as nobody in particular: it needs no Docker, no state and
no rights. One watch feeds the board; browsers ask every second whether anything has changed.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import ipaddress
import logging
import mimetypes
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

import flask
import gunicorn.app.base
import gunicorn.arbiter
import msgspec
from werkzeug.exceptions import HTTPException

from ipam_plugin import __version__
from ipam_plugin.addresses import parse_address, parse_network
from ipam_plugin.board import Board, Detail, Found, Map, Overview
from ipam_plugin.errors import ConfigError
from ipam_plugin.etcd import Event, KeyValue
from ipam_plugin.model import Keys

log = logging.getLogger(__name__)

THREADS = 16
PATIENCE = 2.0  # seconds that a request waits for etcd, when that has not answered since the start
LONGEST_QUERY = 200  # characters

HEADERS = {
    # What stands in etcd is shown as text. Should it ever come to be anything else: no script but ours runs, and
    # nothing is fetched from, sent to or framed by anybody.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked anew each time; most answers are then "304 Not Modified".
    "Cache-Control": "no-cache",
}


class State(msgspec.Struct, frozen=True):
    """Whether what is shown is as it is now."""

    revision: int  # of etcd
    connected: bool  # etcd tells what changes
    loaded: bool  # etcd has been read since the start of this process
    since: float  # when that was last true or false, in seconds since the epoch
    version: str


class Failure(msgspec.Struct, frozen=True):
    error: str


class Etcd(Protocol):
    """What is needed of etcd here."""

    @property
    def watch_connected(self) -> bool: ...
    def watch(
        self,
        prefix: str,
        on_reset: Callable[[list[KeyValue], int, int], None],
        on_events: Callable[[list[Event], int], None],
        stop: threading.Event,
    ) -> None: ...
    def close(self) -> None: ...


class Live:
    """A board, and the watch that keeps it up to date. `start` in the process that serves."""

    def __init__(self, etcd: Etcd, keys: Keys, clock: Callable[[], float] = time.time) -> None:
        self._etcd = etcd
        self._keys = keys
        self._clock = clock
        self._board = Board(keys)
        self._lock = threading.Lock()
        self._loaded = threading.Event()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._watch, self._look)]
        self._connected, self._since = False, clock()
        self.epoch = ""  # revisions are compared within one; after a restored backup they count anew

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(3)
        self._etcd.close()

    def ask(self, question: Callable[[Board], Any]) -> Any:
        """What the board says. While etcd has not been read yet, it waits a moment for that."""
        self._loaded.wait(PATIENCE)
        with self._lock:
            return question(self._board)

    def state(self) -> State:
        connected = self._etcd.watch_connected
        with self._lock:
            if connected != self._connected:
                self._connected, self._since = connected, self._clock()
            return State(self._board.revision, connected, self._loaded.is_set(), self._since, __version__)

    def _look(self) -> None:
        """Notice an outage when it begins, not when the next browser asks."""
        while not self._stop.wait(1):
            self.state()

    def _watch(self) -> None:
        def reset(values: list[KeyValue], revision: int, epoch: int) -> None:
            fresh = Board(self._keys)  # apart, so that nobody waits for it
            fresh.reset(((each.key, each.value, each.revision) for each in values), revision)
            with self._lock:
                self._board = fresh
                self.epoch = secrets.token_hex(4)
            self._loaded.set()

        def events(changes: list[Event], revision: int) -> None:
            with self._lock:
                self._board.apply(changes, revision)

        self._etcd.watch(self._keys.prefix, reset, events, self._stop)


def create_page(live: Live, names: Collection[str] = ()) -> flask.Flask:
    """The page and its API. `names`: by which browsers may ask for it, besides addresses and `localhost`."""
    app = flask.Flask("ipam_plugin", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 0
    known = {"localhost", *(name.lower().rstrip(".") for name in names)}
    files = {each.name: each.read_bytes() for each in (importlib.resources.files("ipam_plugin") / "page").iterdir()}

    @app.before_request
    def is_for_us() -> flask.Response | None:
        """A name that somebody points at this address (DNS rebinding) gives his scripts nothing."""
        if _is_address_or(known, flask.request.host):
            return None
        said = f"this page is not known as {flask.request.host[:100]!a}; ipam-plugin web --name NAME makes it so"
        return _json(Failure(said), 421)

    @app.after_request
    def with_headers(response: flask.Response) -> flask.Response:
        response.headers.update(HEADERS)
        return response

    def answer(question: Callable[[Board], Any]) -> flask.Response:
        """What the board says, unless the browser has it already."""
        state = live.state()
        seen = f"{live.epoch} {state.revision} {flask.request.full_path}"
        etag = hashlib.blake2b(seen.encode("utf-8", "replace"), digest_size=12).hexdigest()
        if state.loaded and etag in flask.request.if_none_match:
            response = flask.Response(status=304)
        else:
            told = live.ask(question)
            if not live.state().loaded:
                return _json(Failure("etcd did not answer yet"), 503)
            response = _json(told)
            if told.revision != state.revision:
                return response
        response.set_etag(etag)
        return response

    def place() -> str:
        return flask.request.args.get("segment", "default")[:LONGEST_QUERY]

    @app.get("/")
    def index() -> flask.Response:
        return file("index.html")

    @app.get("/<name>")
    def file(name: str) -> flask.Response:
        if name not in files:
            flask.abort(404)
        response = flask.Response(files[name], content_type=mimetypes.guess_type(name)[0])
        response.set_etag(hashlib.blake2b(files[name], digest_size=12).hexdigest())
        response.make_conditional(flask.request)
        return response

    @app.get("/api/state")
    def state() -> flask.Response:
        return _json(live.state())

    @app.get("/api/overview")
    def overview() -> flask.Response:
        return answer(lambda board: board.overview())

    @app.get("/api/map")
    def one_map() -> flask.Response:
        subnet, segment = parse_network(flask.request.args.get("subnet", "")), place()
        return answer(lambda board: board.map(segment, subnet))

    @app.get("/api/address")
    def address() -> flask.Response:
        where, segment = parse_address(flask.request.args.get("address", "")), place()
        return answer(lambda board: board.detail(segment, where))

    @app.get("/api/search")
    def search() -> flask.Response:
        query = flask.request.args.get("q", "")[:LONGEST_QUERY]
        return answer(lambda board: board.search(query))

    @app.get("/api/schema")
    def schema() -> flask.Response:
        return _json(described())

    @app.errorhandler(ValueError)
    def wrong(error: ValueError) -> flask.Response:
        return _json(Failure(str(error)[:300]), 400)

    @app.errorhandler(HTTPException)
    def no_such_page(error: HTTPException) -> flask.Response:
        return _json(Failure(error.name), error.code or 500)

    return app


def _is_address_or(names: Collection[str], host: str) -> bool:
    """Whether a Host header has an address, which nobody can point elsewhere, or one of the names."""
    name, colon, port = host.lower().rpartition(":")
    if not colon or not port.isdigit():
        name = host.lower()
    if name.rstrip(".") in names:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _json(value: Any, status: int = 200) -> flask.Response:
    return flask.Response(msgspec.json.encode(value), status, content_type="application/json")


PATHS: dict[str, tuple[str, type, dict[str, str]]] = {
    "/api/state": ("Whether what the others answer is as it is now", State, {}),
    "/api/overview": ("Segments, subnets, hosts, conflicts", Overview, {}),
    "/api/map": ("A subnet, address by address or in blocks", Map, {"segment": "its name", "subnet": "a CIDR"}),
    "/api/address": ("All that is known of an address", Detail, {"segment": "its name", "address": "an address"}),
    "/api/search": ("Addresses and hosts", Found, {"q": "a part of an address, MAC, name or note"}),
}


def described() -> dict[str, Any]:
    """The API as OpenAPI 3.1, from the types of its answers."""
    types = [*(kind for _, kind, _ in PATHS.values()), Failure]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")

    def body(schema: Any) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": schema}}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "ipam-plugin web", "version": __version__},
        "paths": {
            path: {
                "get": {
                    "summary": summary,
                    "parameters": [
                        {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
                        for name, text in parameters.items()
                    ],
                    "responses": {
                        "200": {"description": summary, **body(schema)},
                        "default": {"description": "What is wrong", **body(schemas[-1])},
                    },
                }
            }
            for (path, (summary, _, parameters)), schema in zip(PATHS.items(), schemas, strict=False)
        },
        "components": {"schemas": components},
    }


# ------------------------------------------------------------------------------------------- process


def serve(etcd: Etcd, keys: Keys, listen: str, names: Collection[str] = ()) -> None:
    """Serve the page at ADDRESS:PORT until a signal ends it. Raises ConfigError when nobody can listen there."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
    except OSError as error:
        raise ConfigError(f"the page cannot be served at {listen}: {error.strerror or error}") from None
    log.info("the page is at http://%s/", listen)
    _Server(Live(etcd, keys), listen, {host, socket.gethostname(), *names}).run()


class _Server(gunicorn.app.base.BaseApplication):  # type: ignore[misc]  # gunicorn ships no types
    def __init__(self, live: Live, listen: str, names: Collection[str]) -> None:
        self._live = live
        self._listen = listen
        self._names = names
        super().__init__(prog="ipam-plugin")

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "bind": self._listen,
            "workers": 1,
            "worker_class": "gthread",
            "threads": THREADS,
            "keepalive": 5,
            "timeout": 60,
            "graceful_timeout": 3,
            "control_socket_disable": True,
            "loglevel": "warning",
            "worker_exit": lambda arbiter, worker: self._live.stop(),
            "proc_name": "ipam-plugin-web",
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def run(self) -> None:
        gunicorn.arbiter.Arbiter(self).run()

    def load(self) -> flask.Flask:
        """In the worker, after the fork, which gRPC does not survive."""
        self._live.start()
        return create_page(self._live, self._names)
