"""What every HTTP server of a run shares: the limits on what a peer may send and how long it may take, and who may ask.

A request is looked at in this order, and the application sees it only at the end:

1. `GuardedProtocol` bounds a connection: bytes and seconds of its headers, seconds that it may be idle or may leave an
   answer unread, and how many connections there are.
2. `Guard` looks at the headers: the address that the client used (`check_address`) and what else the server asks for,
   such as a key (`check_bearer`).
3. `Guard` reads the body: at most so many bytes, for so long, and of all bodies together no more than a budget. Whoever
   has decoded a body gives its bytes back to the budget with `release_body`.

Example:
    limits = HttpLimits(body_bytes=1024**2)
    app = Guard(app, limits, check=lambda request: check_bearer(request, key))
    uvicorn.Server(uvicorn_config(app, limits, host="127.0.0.1", port=8000)).run()
"""

import asyncio
import contextlib
import functools
import re
import resource
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pointillist.base.budget import ArrivalBudget
from pointillist.base.http_errors import answer_json
from pointillist.base.net import is_loopback
from pointillist.errors import PointillistError, RequestError

_SMALL_BYTES: Final = 256 * 1024
"""A body up to this size is read at once, whatever the budget says: connections are bounded, so these are too."""
_BYTES_A_SECOND: Final = 1024 * 1024
"""A body may take a second more for so many bytes that have come."""
_STALL_SECONDS: Final = 1.0
_STALL_BYTES: Final = 256 * 1024
"""A body that is not small and of which less than this came in so many seconds is given up while others wait for
room."""
_ROOM_SECONDS: Final = 60.0
"""A body waits for its turn at most so long."""
_LINGER_SECONDS: Final = 5.0
"""What is left of a refused body is read and thrown away for so long, so that the client sees the answer."""
_OTHER_DESCRIPTORS: Final = 512
"""File descriptors that are left to the rest of the process."""
_SHARE: Final = "pointillist.body"
_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
"""A `Host` header in lower case. With anything else in it (`a/health?`) an address that is made from it has another
path than the request."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one server takes."""

    body_bytes: int
    """Longest body of a request."""
    inflight_bytes: int = 128 * 1024 * 1024
    """Bytes of bodies that are held at once, together with one body; what comes beyond it waits to be read."""
    body_seconds: float = 30.0
    """Seconds that a body may take, beside one for each MiB that has come."""
    header_bytes: int = 64 * 1024
    """Request line and headers, together."""
    header_seconds: float = 10.0
    """Seconds from the first byte of a request, or from the beginning of a connection, to the end of its headers."""
    idle_seconds: float = 5.0
    """Seconds that a connection may be kept between two requests."""
    write_seconds: float = 60.0
    """Seconds for which a client may leave an answer unread."""
    connections: int = 4096
    """Connections at once. Beyond it the one that has been idle for longest is closed for a new one."""


# Who may ask ---------------------------------------------------------------------------------------------------------


def check_address(request: Request, *, loopback: bool) -> None:
    """Checks that the request was meant for this server, and was not sent by a page of another site.

    A page of the web can make a browser send requests to this machine, under a name that it has made point at
    127.0.0.1 (DNS rebinding), or simply across sites; the browser says so in `Host` and `Origin`.

    Args:
        request: Its headers are looked at.
        loopback: Whether the server listens on a loopback address only, so that `Host` must name one.

    Raises:
        RequestError: 400 for a foreign or malformed `Host`, 403 for an `Origin` that is not this server's own.
    """
    address = request.headers.get("host", "").lower()
    name = _name_of(address)
    if not name or (loopback and not is_loopback(name)):
        kind = "a loopback name" if loopback else "a name"
        raise RequestError(f"expected {kind} in the address (the Host header), such as 127.0.0.1")
    origin = request.headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != address:
        raise RequestError(
            "expected no Origin header, or this server's own: pages of other sites are refused", status=403
        )


def _name_of(address: str) -> str:
    """The host of a `Host` header without its port and brackets; empty if it is malformed."""
    match = _HOST.fullmatch(address)
    return (match[1] or match[2]) if match is not None else ""


def has_bearer(request: Request, key: str) -> bool:
    """Whether a request brings a key as `Authorization: Bearer <key>`."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and same_secret(given.strip(), key)


def same_secret(given: str, expected: str) -> bool:
    """Whether two secrets are equal, in a time that does not say how much of them is."""
    return secrets.compare_digest(given.encode(), expected.encode())


def check_bearer(request: Request, key: str, *, header: str | None = None) -> None:
    """Checks that a request brings a key as `Authorization: Bearer <key>`.

    Args:
        request: Its headers are looked at.
        key: The key.
        header: Name of a header that may bring the key instead, such as `x-api-key`.

    Raises:
        RequestError: 401 if it does not.
    """
    if header is not None and same_secret(request.headers.get(header, ""), key):
        return
    if not has_bearer(request, key):
        other = f" or {header}" if header else ""
        raise RequestError(f"expected Authorization: Bearer <API key>{other}", status=401, code="invalid_api_key")


def check_json(request: Request) -> None:
    """Checks that a body is declared as JSON, which a plain form of a web page cannot do.

    Raises:
        RequestError: 415 if it is not; a request without body and type passes.
    """
    given = request.headers.get("content-type")
    if given is None and not _has_body(request):
        return
    if (given or "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(f"content type is {(given or 'missing')[:64]!r}, expected application/json", status=415)


# The body ------------------------------------------------------------------------------------------------------------


class Guard:
    """An ASGI application around another one, which sees a request once its body has been read within the limits."""

    def __init__(
        self,
        app: ASGIApp,
        limits: HttpLimits,
        *,
        check: Callable[[Request], None] = lambda _: None,
        answer: Callable[[Request, PointillistError], Response] = answer_json,
        body_bytes: Callable[[Request], int] | None = None,
    ) -> None:
        """Wraps an application.

        Args:
            app: Gets bodies whole, in one message.
            limits: Of bodies.
            check: Looks at the headers before the body is read (`request.body()` cannot be used in it), and raises
                `RequestError` or another `PointillistError` where it refuses.
            answer: Makes the response to what `check` raised, and to a body that is too long (413), too slow (408) or
                finds no room (503).
            body_bytes: Longest body of one request where routes differ; `limits.body_bytes` by default.
        """
        self._app = app
        self._limits = limits
        self._check = check
        self._answer = answer
        self._body_bytes = body_bytes or (lambda _: limits.body_bytes)
        self._budget = ArrivalBudget(limits.inflight_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; what is not HTTP (the lifespan) goes on to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        body = _Body(self._budget, self._limits)
        try:
            self._check(request)
            if _has_body(request):
                receive = await body.read(request, receive, self._body_bytes(request))
        except _ClientGoneError:
            return
        except PointillistError as error:
            await self._answer(request, error)(scope, receive, send)
        else:
            scope[_SHARE] = body
            await self._app(scope, receive, send)
        finally:
            body.release()


def release_body(request: Request) -> None:
    """Tells the guard that a request's body has been decoded and is held no longer."""
    body: _Body | None = request.scope.get(_SHARE)
    if body is not None:
        body.release()


class _ClientGoneError(PointillistError):
    """The connection was closed before the body was whole: nobody waits for an answer."""


class _Body:
    """One request's body: what it holds of the budget, until it is released."""

    def __init__(self, budget: ArrivalBudget, limits: HttpLimits) -> None:
        self._budget = budget
        self._limits = limits
        self._size = 0

    async def read(self, request: Request, receive: Receive, limit: int) -> Receive:
        """Reads the body; the result gives it in one message and then what the connection says.

        Raises:
            RequestError: 400, 408, 413 or 503.
            _ClientGoneError: The connection was closed.
        """
        declared = _declared_bytes(request)
        if declared is not None and declared > limit:
            raise _too_long(limit)
        chunks: list[bytes] = []
        began = asyncio.get_running_loop().time()
        self._start_window()
        more = True
        while more:
            message = await self._next(receive, began + self._limits.body_seconds + self._size / _BYTES_A_SECOND)
            chunks.append(message.get("body", b""))
            self._size += len(chunks[-1])
            if self._size > limit:
                raise _too_long(limit)
            if self._size > _SMALL_BYTES:
                began += await self._wait_for_room(len(chunks[-1]))
            more = message.get("more_body", False)
        return _replayed(b"".join(chunks), receive)

    def release(self) -> None:
        """Gives its bytes back; a second call does nothing."""
        self._budget.release(self)

    async def _next(self, receive: Receive, deadline: float) -> Message:
        """The next piece of the body."""
        loop = asyncio.get_running_loop()
        while loop.time() < deadline:
            message = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(deadline, self._since + _STALL_SECONDS)):
                    message = await receive()
            self._check_pace()
            if message is None:
                continue
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            return message
        raise RequestError(f"the body did not come within {self._limits.body_seconds:g} s and one a MiB", status=408)

    def _start_window(self) -> None:
        """Begins to look at how fast the body comes."""
        self._since = asyncio.get_running_loop().time()
        self._size_then = self._size

    def _check_pace(self) -> None:
        """Gives up a large body that comes slowly while others wait for room."""
        if asyncio.get_running_loop().time() - self._since < _STALL_SECONDS:
            return
        came = self._size - self._size_then
        if self._size > _SMALL_BYTES and came < _STALL_BYTES and self._budget.waiting:
            raise RequestError(f"{came} bytes of the body came in {_STALL_SECONDS:g} s while others wait", status=408)
        self._start_window()

    async def _wait_for_room(self, num_bytes: int) -> float:
        """Takes room for what has come; returns the seconds that it waited for it."""
        if self._budget.take_now(self, num_bytes):
            return 0.0
        asked = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(_ROOM_SECONDS):
                await self._budget.take(self, num_bytes)
        except TimeoutError:
            raise RequestError("too many bodies at once", status=503) from None
        self._start_window()
        return asyncio.get_running_loop().time() - asked


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


def _declared_bytes(request: Request) -> int | None:
    """What Content-Length says; None for a chunked body."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise RequestError("Content-Length is not a number of bytes")
    return int(text)


def _too_long(limit: int) -> RequestError:
    return RequestError(f"body is longer than the {limit} bytes that are accepted", status=413)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with a whole body."""
    waiting: list[bytes] = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


# The connection ------------------------------------------------------------------------------------------------------


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on what uvicorn leaves open: headers, idle connections and unread answers."""

    def __init__(self, *args: Any, limits: HttpLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._room = limits.header_bytes
        """Bytes that may come before the next piece of a body: headers, and what else frames bodies."""
        self._in_message = False
        """Whether the first byte of a request has come and its last has not."""
        self._free_since: float | None = None
        """Since when the connection has no request whose headers are complete; None while it has one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        full = len(self.connections) >= self._limits.connections and not self._close_a_free_one()
        super().connection_made(transport)
        if full:
            self._refuse(503, "too many connections")
        else:
            self._wait_for_request(self._limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._after(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what came, and ends a connection whose headers do not end."""
        if not self._in_message:
            # Not anew for each byte: the whole of the headers must come in this time.
            self._in_message = True
            self._after(self._limits.header_seconds, self._refuse_late_headers)
        while data and not self.transport.is_closing():
            piece, data = data[: self._room], data[self._room :]
            self._room -= len(piece)
            super().data_received(piece)  # its callbacks make room again
            if self._room == 0 and not self.transport.is_closing():
                self._refuse(431, f"headers are longer than the {self._limits.header_bytes} bytes that are accepted")

    def on_headers_complete(self) -> None:
        """From here on the application waits for the body."""
        self._free_since = None
        self._after(None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Makes room for what stands between two pieces of a body."""
        self._room = self._limits.header_bytes
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Makes room for the next request."""
        self._room = self._limits.header_bytes
        self._in_message = False
        super().on_message_complete()
        if self.cycle.response_complete:
            self._wait_for_request(self._limits.idle_seconds)

    def on_response_complete(self) -> None:
        """Waits for the answer to be read, for the rest of a request that is answered already, or for the next one."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # there is one clock
        if not self.cycle.response_complete:
            return  # the next request is here already
        if self.transport.get_write_buffer_size():
            self._after(self._limits.write_seconds, self.transport.abort)
        elif self._in_message:
            self._after(_LINGER_SECONDS, self.transport.abort)
        else:
            self._wait_for_request(self._limits.idle_seconds)

    def pause_writing(self) -> None:
        """The client reads slower than it is answered."""
        self._after(self._limits.write_seconds, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client reads."""
        self._after(None)
        if self.cycle.response_complete:
            self._wait_for_request(self._limits.idle_seconds)
        super().resume_writing()

    def _wait_for_request(self, seconds: float) -> None:
        self._free_since = self.loop.time()
        self._after(seconds, self._end_idle)

    def _after(self, seconds: float | None, action: Callable[[], None] = lambda: None) -> None:
        """Sets the clock; None stops it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, action)

    def _end_idle(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the end of the last answer is not read
        else:
            self.transport.close()

    def _refuse_late_headers(self) -> None:
        self._refuse(408, f"headers did not come within {self._limits.header_seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answers what is not a request, and ends."""
        content = message.encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: text/plain; charset=utf-8\r\n"
        self.transport.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
        self.transport.close()
        self._after(_LINGER_SECONDS, self.transport.abort)

    def _close_a_free_one(self) -> bool:
        """Closes the connection that has been without a request for longest; False if all are at work."""
        free = [each for each in self.connections if isinstance(each, GuardedProtocol) and each._free_since is not None]
        if not free:
            return False
        oldest = min(free, key=lambda each: each._free_since or 0.0)
        oldest._free_since = None
        oldest.transport.abort()
        return True


def uvicorn_config(app: ASGIApp, limits: HttpLimits, *, host: str, port: int, **options: Any) -> uvicorn.Config:
    """A uvicorn config whose connections are bounded.

    Args:
        app: Wrapped into a `Guard`, so that its bodies are bounded too.
        limits: Of connections; `connections` is cut to what this process may open.
        host: Address to bind.
        port: Port to bind.
        options: Further arguments of `uvicorn.Config`.
    """
    settings: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "ws": "none",
        "server_header": False,
        "proxy_headers": False,  # what a client says about addresses is not believed
        "timeout_graceful_shutdown": 2,
        "backlog": 4096,
        **options,
    }
    return uvicorn.Config(app, host=host, port=port, http=guarded_protocol(limits), **settings)


def guarded_protocol(limits: HttpLimits) -> Any:
    """What uvicorn makes its connections of, `uvicorn.Config.http_protocol_class`.

    Args:
        limits: Of connections; `connections` is cut to what this process may open.
    """
    return functools.partial(GuardedProtocol, limits=_within_descriptors(limits))


def _within_descriptors(limits: HttpLimits) -> HttpLimits:
    """Limits whose connections this process can open; its own limit on open files is raised as far as they need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return replace(limits, connections=max(1, soft - _OTHER_DESCRIPTORS))
    return limits
