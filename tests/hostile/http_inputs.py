"""Hostile HTTP, whatever the server: framing, headers, hosts, connections that drip or say nothing."""

import struct
from collections.abc import Callable
from random import Random

from tests.hostile import odd
from tests.hostile.wire import Http, request

_METHODS = [
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PATCH",
    "get",
    "PRI",
    "G\0T",
    "X" * 5000,
    "",
]

_HOSTS = [
    "example.org", "127.0.0.1.example.org", "127.0.0.1:99999", "[::1", "", "a" * 9000, "localhost", "127.0.0.1\x00",
    "127.0.0.1, example.org", "\u00e9", "0x7f.1", "[::ffff:127.0.0.1]",
]  # fmt: skip
_LENGTHS = [
    "-1", "+5", "0x10", "1e3", "", " 5", "5 5", "99999999999999999999999", "9" * 5000, "\u0663", "0", "1, 1",
    "3\r\nContent-Length: 4",
]  # fmt: skip


def inputs(routes: list[str], *, hold: float) -> Callable[[Random], Http]:
    """Requests that are odd as HTTP.

    Args:
        routes: Paths of the server that take a body.
        hold: Seconds over which the slowest ones drip.
    """

    def make(chance: Random) -> Http:
        path = chance.choice(routes)
        body = odd.garbled(b'{"messages": [{"role": "user", "content": "What?"}], "token_ids": [1, 2]}', chance)
        kind = chance.choice(["host", "headers", "length", "chunked", "line", "path", "raw", "pipelined", "slow"])
        if kind == "slow" and chance.random() < 0.8:
            kind = "headers"
        if kind == "host":
            host = chance.choice(_HOSTS)
            origin = chance.choice([{}, {"Origin": "http://example.org"}, {"Origin": "null"}, {"Origin": "\0"}])
            return Http(kind, request(chance.choice(["GET", "POST"]), path, body, origin, host=host))
        if kind == "headers":
            return Http(kind, _headers(path, body, chance), due=False)
        if kind == "length":
            length = chance.choice([*_LENGTHS, str(len(body) - 1)])
            return Http(kind, request("POST", path, body, {"Content-Length": length}), due=False)
        if kind == "chunked":
            return Http(kind, _chunked(path, body, chance), due=False)
        if kind == "line":
            line = chance.choice([f"{chance.choice(_METHODS)} {path} HTTP/1.1", f"GET {path}", f"GET {path} HTTP/9.9",
                                  f"GET  {path}  HTTP/1.1", f"GET\t{path}\tHTTP/1.0",
                                  f"GET http://example.org{path} HTTP/1.1",
                                  "GET * HTTP/1.1", f"GET {path} HTTP/1.1\rX", f"POST {path} HTTP/1.0"])  # fmt: skip
            return Http(kind, f"{line}\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{{}}".encode(), due=False)
        if kind == "path":
            wild = chance.choice(["/" + "a" * 70_000, "/%", "/%zz", "/%00", "/%ff", "//", "/./../..",
                "/?" + "a=1&" * 5000, "/;x",
                                  "/metrics/../health", "/health%0d%0aX:1", f"{path}?{'%41' * 3000}", "/\u00e9", "/#",
                                  "?x"])  # fmt: skip
            return Http(kind, request("GET", wild), due=False)
        if kind == "raw":
            return Http(kind, _raw(chance), due=False)
        if kind == "pipelined":
            return Http(kind, request("GET", "/health") * chance.choice([2, 20, 200]), due=False)
        whole = request("POST", path, body)
        start = chance.choice([whole[:-1], whole[:30], b"POST ",
            request("POST", path, b"{", {"Content-Length": "130000000"}),
                               request("POST", path, b"1\r\n{\r\n", {"Transfer-Encoding": "chunked"}),
                               b""])  # fmt: skip
        return Http(kind, start, due=False, drip=hold / 10)

    return make


def _headers(path: str, body: bytes, chance: Random) -> bytes:
    extra = chance.choice([
        {f"X-{number}": "a" for number in range(chance.choice([50, 120, 2000]))},
        {"X-Long": "a" * chance.choice([9000, 70_000])},
        {"Authorization": chance.choice(["Bearer", "Bearer \xff", "Basic x", "Bearer " + "a" * 9000])},
        {"X-Api-Key": "\xe9"},
        {"Cookie": "a=" + "b" * 9000}, {"Expect": "100-continue"}, {"Upgrade": "websocket", "Connection": "Upgrade"},
        {"Connection": "close"}, {"Range": "bytes=0-0,5-1,-9999999999"}, {"If-None-Match": '"' + "a" * 5000}, {"": "x"},
        {"A b": "c"}, {"X": "a\r\n folded"}, {"X": "\0"}, {"Transfer-Encoding": "gzip"}, {"Accept-Encoding": "*;q=nan"},
        {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=_x"}, {"Traceparent": "x"}, {"Sec-WebSocket-Key": "x"},
    ])  # fmt: skip
    return request("POST", path, body, extra)


def _chunked(path: str, body: bytes, chance: Random) -> bytes:
    head = {
        "Transfer-Encoding": chance.choice(
            ["chunked", "chunked, chunked", "Chunked", "identity, chunked", "\x0bchunked"]
        )
    }
    if chance.random() < 0.3:
        head["Content-Length"] = str(len(body))
    size = chance.choice(
        [
            f"{len(body):x}",
            "FFFFFFFFFFFFFFFF",
            "FFFFFFFFFFFFFFFFFF",
            "-1",
            "0x5",
            "5;" + "a" * 20_000,
            "",
            "g",
            "7fffffff",
        ]
    )
    end = chance.choice(
        [b"\r\n0\r\n\r\n", b"0\r\n\r\n", b"\r\n0\r\nX: y\r\n\r\n", b"", b"\r\n0\r\n" + b"X: y\r\n" * 2000 + b"\r\n"]
    )
    return request("POST", path, size.encode() + b"\r\n" + body + end, head)


def _raw(chance: Random) -> bytes:
    return chance.choice([
        lambda: chance.randbytes(chance.choice([1, 64, 5000])), lambda: b"\0" * 100, lambda: b"\r\n" * 5000,
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 50,
        lambda: b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + chance.randbytes(80),
        lambda: b"GET /health\r\n\r\n", lambda: b"GET /health HTTP/1.1\n\n", lambda: b"SSH-2.0-x\r\n",
        lambda: b"A" * 200_000,
        lambda: b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        lambda: b"\xff" + struct.pack(">Q", 2**40) + b"\x7f",
        lambda: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    ])()  # fmt: skip
