"""The limits of our HTTP servers, tried over real sockets."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pointillist.base.http_guard import (
    Guard,
    HttpLimits,
    check_address,
    check_bearer,
    check_json,
    release_body,
    uvicorn_config,
)
from pointillist.errors import RequestError

DEADLINE = 120.0
SHORT = 0.4
LIMITS = HttpLimits(
    body_bytes=1024 * 1024, inflight_bytes=1024 * 1024, body_seconds=60, header_seconds=60, idle_seconds=60
)


class Server:
    def __init__(self, limits: HttpLimits, check: Callable[[Request], None] = lambda _: None) -> None:
        async def size(request: Request) -> Response:
            body = await request.body()
            release_body(request)
            return JSONResponse({"bytes": len(body)})

        async def large(_: Request) -> Response:
            async def chunks() -> Any:
                for _ in range(4000):
                    yield b"x" * 65536

            return StreamingResponse(chunks())

        app = Starlette(routes=[Route("/size", size, methods=["GET", "POST"]), Route("/large", large)])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        config = uvicorn_config(Guard(app, limits, check=check), limits, host="127.0.0.1", port=0, lifespan="off")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.listener],))
        self.thread.start()
        until(lambda: self.uvicorn.started)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(DEADLINE)
        return connection

    def ask(self, request: bytes) -> bytes:
        """All that comes until the server closes the connection."""
        with self.connect() as connection:
            send(connection, request)
            return everything(connection)

    def stop(self) -> None:
        self.uvicorn.should_exit = self.uvicorn.force_exit = True
        self.thread.join()
        self.listener.close()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send(connection: socket.socket, data: bytes) -> None:
    """Sends as far as the other end reads."""
    try:
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass


def everything(connection: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece


def drip(connection: socket.socket, first: bytes, byte: bytes) -> bytes:
    """Sends a byte now and then until the server has had enough."""
    send(connection, first)
    connection.settimeout(0.05)
    deadline, data = time.monotonic() + DEADLINE, b""
    while time.monotonic() < deadline:
        send(connection, byte)
        try:
            piece = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece
    raise AssertionError("the server waits for ever")


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def start(*args: Any, **changes: Any) -> Server:
        running.append(Server(replace(LIMITS, **changes), *args))
        return running[-1]

    yield start
    for server in running:
        server.stop()


CLOSE = b"Host: 127.0.0.1\r\nConnection: close\r\n"


def test_requests_within_the_limits_are_served_and_connections_are_kept(serve: Any) -> None:
    server = serve()
    with server.connect() as connection:
        for size in (0, 10, 1024 * 1024):
            connection.sendall(b"POST /size HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert b" 200 " in answer and answer.endswith(b'{"bytes":%d}' % size)
    chunked = b"POST /size HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert b'{"bytes":5}' in server.ask(chunked)


def test_headers_that_drip_are_answered_408_and_others_go_on(serve: Any) -> None:
    server = serve(header_seconds=SHORT)
    with server.connect() as slow:
        assert b" 408 " in drip(slow, b"GET /size HTTP/1.1\r\nHost: a\r\nX: ", b"x")
    with server.connect() as kept:  # the second request of a connection too
        kept.sendall(b"GET /size HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 200 " in kept.recv(15)
        assert b" 408 " in drip(kept, b"GET /size HTTP/1.1\r\nX: ", b"x")
    assert b" 200 " in server.ask(b"GET /size HTTP/1.1\r\n" + CLOSE + b"\r\n")


@pytest.mark.parametrize("first", [b"", b"GET /size HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_idle_connections_are_closed_and_blank_lines_keep_none_open(serve: Any, first: bytes) -> None:
    server = serve(header_seconds=SHORT, idle_seconds=SHORT)
    server.ask(first)  # returns when the server has closed
    with server.connect() as connection:
        drip(connection, first, b"\r\n")


@pytest.mark.parametrize("prefix", [b"GET /", b"GET /size HTTP/1.1\r\nHost: a\r\nX: ", b"GET /size HTTP/1.1\r\n"])
def test_headers_are_bounded_in_bytes(serve: Any, prefix: bytes) -> None:
    line = b"X: y\r\n" if prefix.endswith(b"\r\n") else b"abcdef"
    assert b" 431 " in serve().ask(prefix + line * 100_000)


def test_trailers_and_extensions_of_a_chunked_body_are_bounded(serve: Any) -> None:
    start = b"POST /size HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
    for rest in (b"0\r\n" + b"X: y\r\n" * 100_000, b"1;" + b"a" * 600_000):
        assert b" 431 " in serve().ask(start + rest)


def test_a_body_that_is_too_long_is_answered_413(serve: Any) -> None:
    server = serve()
    declared = b"POST /size HTTP/1.1\r\n" + CLOSE + b"Content-Length: 20000000\r\n\r\n"
    assert b" 413 " in server.ask(declared)  # before anything of it came
    assert b" 413 " in server.ask(declared + b"x" * 20_000_000)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    start = b"POST /size HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"
    assert b" 413 " in server.ask(start + chunk * 40 + b"0\r\n\r\n")
    for length in (b"1" * 5000, b"-1", b"1e3"):
        assert b" 400 " in server.ask(b"POST /size HTTP/1.1\r\n" + CLOSE + b"Content-Length: " + length + b"\r\n\r\n")


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_drips_is_answered_408(serve: Any, framing: bytes) -> None:
    with serve(body_seconds=SHORT).connect() as slow:
        head = b"POST /size HTTP/1.1\r\n" + CLOSE + framing + b"\r\n\r\n"
        assert b" 408 " in drip(slow, head, b"1\r\nx\r\n" if b"chunked" in framing else b"x")


def test_bodies_that_do_not_come_keep_no_room_from_others(serve: Any) -> None:
    server = serve()
    hanging = [server.connect() for _ in range(3)]
    for connection in hanging:
        connection.sendall(b"POST /size HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
    good = b"POST /size HTTP/1.1\r\n" + CLOSE + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000
    assert b'{"bytes":1000000}' in server.ask(good)
    small = b"POST /size HTTP/1.1\r\n" + CLOSE + b"Content-Length: 5\r\n\r\nabcde"
    assert b'{"bytes":5}' in server.ask(small)
    for connection in hanging:
        connection.close()


@pytest.mark.parametrize("before", [1, 900_000])
def test_bodies_that_drip_keep_no_room_from_others(serve: Any, before: int) -> None:
    """They are never silent for long, and may take hours."""
    server, ended = serve(body_seconds=10_000), threading.Event()

    def drips() -> None:
        with contextlib.suppress(OSError), server.connect() as connection:
            connection.sendall(b"POST /size HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * before)
            while not ended.wait(0.1):
                connection.sendall(b"x")

    threads = [threading.Thread(target=drips) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(server.uvicorn.server_state.connections) == 4)
    good = b"POST /size HTTP/1.1\r\n" + CLOSE + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000
    for _ in range(3):
        assert b'{"bytes":1000000}' in server.ask(good)
    ended.set()
    for thread in threads:
        thread.join()


def test_an_answer_that_is_not_read_ends_its_connection(serve: Any) -> None:
    server = serve(write_seconds=SHORT)
    with server.connect() as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: len(server.uvicorn.server_state.connections) == 1)
        until(lambda: not server.uvicorn.server_state.connections)


def test_a_new_connection_takes_the_place_of_the_one_that_is_idle_for_longest(serve: Any) -> None:
    server = serve(connections=3)
    idle = [server.connect() for _ in range(10)]
    idle[-1].sendall(b"GET /size HTTP/1.1\r\n")  # begun is not at work
    assert b" 200 " in server.ask(b"GET /size HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert everything(idle[0]) == b""
    for connection in idle:
        connection.close()


def test_a_request_is_refused_before_its_body_is_asked_for(serve: Any) -> None:
    server = serve(lambda request: check_bearer(request, "right"))
    head = b"POST /size HTTP/1.1\r\n" + CLOSE + b"Expect: 100-continue\r\nContent-Length: 5\r\n"
    refused = server.ask(head + b"Authorization: Bearer wrong\r\n\r\n")
    assert b" 401 " in refused and b" 100 " not in refused and b'"AuthenticationError"' in refused
    assert b'{"bytes":5}' in server.ask(head + b"Authorization: Bearer right\r\n\r\nabcde")


def request_with(**headers: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": pairs})


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "127.0.0.1:8000"},
        {"host": "localhost"},
        {"host": "[::1]:1"},
        {"host": "127.0.0.2"},
        {"host": "LOCALHOST:80", "origin": "http://localhost:80"},
    ],
)
def test_own_addresses_pass(headers: dict[str, str]) -> None:
    check_address(request_with(**headers), loopback=True)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "[::1"},
        {"host": "127.0.0.1/health?"},
        {"host": "127.0.0.1#"},
        {"host": "0.0.0.0"},
        {"host": "\xe9"},
        {"host": "127.0.0.1:8000", "origin": "http://evil.example"},
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"},
        {"host": "127.0.0.1:8000", "origin": "null"},
    ],
)
def test_foreign_addresses_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(RequestError):
        check_address(request_with(**headers), loopback=True)


def test_elsewhere_any_name_will_do_but_no_page_of_another_site() -> None:
    check_address(request_with(host="node7:8000"), loopback=False)
    for origin in ("null", "http://evil.example"):
        with pytest.raises(RequestError, match="Origin"):
            check_address(request_with(host="node7:8000", origin=origin), loopback=False)
    for host in ("", "node7/health?", "node7 "):
        with pytest.raises(RequestError, match="Host"):
            check_address(request_with(host=host), loopback=False)


def test_keys_and_content_types() -> None:
    check_bearer(request_with(authorization="Bearer k\xe9"), "k\xe9")
    check_bearer(request_with(authorization="bearer k"), "k")  # RFC 9110: the scheme has no case
    check_bearer(request_with(x_api_key="k"), "k", header="x-api-key")
    with pytest.raises(RequestError, match="or x-api-key"):
        check_bearer(request_with(x_api_key="other"), "k", header="x-api-key")
    for given in ({}, {"authorization": "k"}, {"authorization": "Basic k"}, {"authorization": "Bearer k\xff"}):
        with pytest.raises(RequestError) as refused:
            check_bearer(request_with(**given), "k")
        assert refused.value.status == 401
    check_json(request_with(content_type="Application/JSON; charset=utf-8", content_length="2"))
    check_json(request_with())
    for given in (
        {"content_type": "text/plain"},
        {"content_length": "2"},
        {"content_type": "application/x-www-form-urlencoded", "content_length": "2"},
    ):
        with pytest.raises(RequestError) as refused:
            check_json(request_with(**given))
        assert refused.value.status == 415
