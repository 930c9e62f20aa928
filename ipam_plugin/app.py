"""HTTP: Docker's requests in, answers out. The only importer of Flask; decides nothing about addresses."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import flask
from werkzeug.exceptions import HTTPException

from ipam_plugin import protocol
from ipam_plugin.errors import (
    BadRequest,
    EtcdRefused,
    EtcdUnavailable,
    IpamError,
    JournalFailed,
    NotServing,
    OutcomeUnknown,
    PoolUnknown,
    ProbeFailed,
    Refused,
)
from ipam_plugin.metrics import Metrics
from ipam_plugin.model import Pool
from ipam_plugin.protocol import Body

log = logging.getLogger(__name__)

# Requests that may wait at once, for etcd or for the rest of their own body. Docker asks one by one for each network,
# so a host with this many waiting is in trouble, and the next one is refused at once instead of standing in line
# beyond its deadline (P6).
WAITING = 256
# Threads beyond those: the calls that need neither etcd nor disk are answered whatever the others wait for.
SPARE_THREADS = 16
# A body that is too long is read to its end and thrown away, up to this: a client that is cut off while it still
# writes never sees the answer.
DRAINED = 64 * 1024 * 1024

MIME = "application/vnd.docker.plugins.v1.2+json"

STATUS: dict[type[IpamError], int] = {
    BadRequest: 400,
    PoolUnknown: 404,
    Refused: 409,
    NotServing: 503,
    EtcdUnavailable: 503,
    OutcomeUnknown: 503,
    EtcdRefused: 503,
    ProbeFailed: 503,
    JournalFailed: 503,
}


class Register(Protocol):
    def request_pool(self, request: protocol.RequestPool, deadline: float) -> tuple[Pool, str]: ...
    def release_pool(self, request: protocol.ReleasePool, deadline: float) -> None: ...
    def request_address(self, request: protocol.RequestAddress, deadline: float) -> str: ...
    def release_address(self, request: protocol.ReleaseAddress, deadline: float) -> None: ...
    def engine_asked_capabilities(self) -> None: ...


def status_of(error: IpamError) -> int:
    """The HTTP status of an error. Docker only tells 200 from everything else; people with curl see more."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def create_app(
    register: Register,
    admit: Callable[[float], float],
    *,
    metrics: Metrics,
) -> flask.Flask:
    """The seven endpoints. `admit`: from a request's arrival to its deadline, in monotonic seconds; it returns when
    the request may be served, and raises NotServing.
    """
    app = flask.Flask("ipam_plugin", static_folder=None)
    waiting = threading.BoundedSemaphore(WAITING)

    def answer(status: int, body: bytes) -> flask.Response:
        return flask.Response(body, status, content_type=MIME)

    def carry_out(method: str, kind: type[Body], operation: Callable[[Body, float], dict[str, Any]]) -> flask.Response:
        arrival = time.monotonic()
        asked: Body | None = None
        try:
            if not waiting.acquire(blocking=False):
                raise NotServing(f"{WAITING} requests are waiting already; nothing was done, try again")
            try:
                asked = protocol.decode(_body(), kind)
                with metrics.waiting.track_inprogress():
                    status, body, said = 200, operation(asked, admit(arrival)), ""
            finally:
                waiting.release()
        except IpamError as error:
            said = protocol.one_line(str(error))
            status, body = status_of(error), {"Err": said, "Error": said}
        except Exception:
            reference = secrets.token_hex(4)
            log.exception("internal error %s in %s", reference, method)
            said = f"internal error of ipam-plugin; its log says more under {reference}"
            status, body = 500, {"Err": said, "Error": said}
        seconds = time.monotonic() - arrival

        def tell() -> None:
            metrics.request(method, status, seconds)
            log.log(
                logging.INFO if status == 200 else logging.WARNING,
                "%s %s -> %s in %.0f ms",
                method,
                _told(asked),
                said or protocol.encode(body).decode().strip(),
                seconds * 1000,
            )

        response = answer(status, protocol.encode(body))
        response.call_on_close(tell)  # nobody waits for a line in the log
        return response

    @app.post("/Plugin.Activate")
    def activate() -> flask.Response:
        return answer(200, protocol.encode(protocol.ACTIVATE))

    @app.post("/IpamDriver.GetCapabilities")
    def capabilities() -> flask.Response:
        register.engine_asked_capabilities()
        return answer(200, protocol.encode(protocol.CAPABILITIES))

    @app.post("/IpamDriver.GetDefaultAddressSpaces")
    def address_spaces() -> flask.Response:
        return answer(200, protocol.encode(protocol.ADDRESS_SPACES))

    @app.post("/IpamDriver.RequestPool")
    def request_pool() -> flask.Response:
        def operation(request: protocol.RequestPool, deadline: float) -> dict[str, Any]:
            pool, subnet = register.request_pool(request, deadline)
            return {"PoolID": pool.id, "Pool": subnet, "Data": {}}

        return carry_out("RequestPool", protocol.RequestPool, operation)

    @app.post("/IpamDriver.ReleasePool")
    def release_pool() -> flask.Response:
        def operation(request: protocol.ReleasePool, deadline: float) -> dict[str, Any]:
            register.release_pool(request, deadline)
            return {}

        return carry_out("ReleasePool", protocol.ReleasePool, operation)

    @app.post("/IpamDriver.RequestAddress")
    def request_address() -> flask.Response:
        def operation(request: protocol.RequestAddress, deadline: float) -> dict[str, Any]:
            return {"Address": register.request_address(request, deadline), "Data": {}}

        return carry_out("RequestAddress", protocol.RequestAddress, operation)

    @app.post("/IpamDriver.ReleaseAddress")
    def release_address() -> flask.Response:
        def operation(request: protocol.ReleaseAddress, deadline: float) -> dict[str, Any]:
            register.release_address(request, deadline)
            return {}

        return carry_out("ReleaseAddress", protocol.ReleaseAddress, operation)

    @app.errorhandler(HTTPException)
    def no_such_call(error: HTTPException) -> flask.Response:
        said = protocol.one_line(f"{flask.request.method} {flask.request.path}: this plugin has no such call")
        return answer(error.code or 500, protocol.encode_error(said))

    return app


def _body() -> bytes:
    """The request's body. Raises BadRequest when it is longer than any that an engine sends, or does not come."""
    stream = flask.request.stream
    try:
        body: bytes = stream.read(protocol.LIMIT + 1)
        if len(body) <= protocol.LIMIT:
            return body
        drained = len(body)
        while drained < DRAINED and (chunk := stream.read(1 << 20)):
            drained += len(chunk)
    except Exception:  # the server's parser has errors of its own for chunks that are none
        raise BadRequest("the request's body broke off or did not come in time; nothing was done") from None
    raise BadRequest(f"the request has more than {protocol.LIMIT} bytes; the engine's have a few hundred")


def _told(asked: Any) -> str:
    """A request as one short line of the log."""
    if asked is None:
        return "(unreadable)"
    return protocol.one_line(" ".join(f"{name}={getattr(asked, name)!r}" for name in asked.__struct_fields__))[:400]
