"""An honest client in a process of its own: a good request every quarter of a second, each noted with its seconds.

    python -m tests.hostile.prober LOG '{"kind": "http", "port": 8000, "request": "<base64>"}'

A line when a request begins and one when it is answered, so that one which is never answered shows, too.
"""

import base64
import http.client
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 0.25
_PATIENCE = 120.0
_PER_SESSION = 20


class Log:
    """The notes of one prober."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def note(self, what: str, seconds: float = 0.0, fault: str = "") -> None:
        """Adds a line."""
        line = {"what": what, "at": time.time(), "seconds": seconds, "fault": fault[:300]}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def exchange(port: int, data: bytes, seconds: float) -> tuple[int, bytes]:
    """Sends bytes of a request on a connection of its own; returns status and body.

    Raises:
        OSError: No connection, or no answer in time.
        http.client.HTTPException: An answer that is none.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.connect()
        connection.sock.sendall(data)
        answer = http.client.HTTPResponse(connection.sock)
        answer.begin()
        return answer.status, answer.read()
    finally:
        connection.close()


class Sessions:
    """A session of a gateway, another one after some requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._key = ""
        self._asked = 0

    def key(self) -> str:
        """The one that is open."""
        if self._asked % _PER_SESSION == 0:
            self._end()
            _, body = exchange(self._port, _plain("POST", "/sessions"), _PATIENCE)
            self._key = json.loads(body)["id"]
        self._asked += 1
        return self._key

    def _end(self) -> None:
        if self._key:
            exchange(self._port, _plain("DELETE", f"/sessions/{self._key}"), _PATIENCE)


def _plain(method: str, path: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def _http(given: dict[str, Any]) -> Callable[[], None]:
    data = base64.b64decode(given["request"]).replace(b"\r\nHost:", b"\r\nConnection: close\r\nHost:", 1)
    sessions = Sessions(given["port"]) if given.get("session") else None

    def ask() -> None:
        asked = data.replace(given["session"].encode(), sessions.key().encode()) if sessions else data
        status, body = exchange(given["port"], asked, _PATIENCE)
        if status != 200:
            raise RuntimeError(f"status {status}: {body[:200]!r}")

    return ask


def _rank(given: dict[str, Any]) -> Callable[[], None]:
    """The trainer's end of the transport: a batch a time, in order."""
    from pointillist.transport.zmq import ZmqReceiver

    receiver, step = ZmqReceiver(given["address"], 0), [given["step"]]

    def ask() -> None:
        batch = receiver.receive(step[0])
        if batch.step != step[0]:
            raise RuntimeError(f"step {batch.step} instead of {step[0]}")
        receiver.discard_before(step[0] + 1)
        step[0] += 1

    return ask


def main() -> None:
    """Asks until it is killed."""
    log, given = Log(Path(sys.argv[1])), json.loads(sys.argv[2])
    ask = {"http": _http, "rank": _rank}[given["kind"]](given)
    while True:
        begun = time.monotonic()
        log.note("begun")
        try:
            ask()
        except (OSError, RuntimeError, ValueError, KeyError, http.client.HTTPException) as error:
            log.note("done", time.monotonic() - begun, f"{type(error).__name__}: {error}")
        else:
            log.note("done", time.monotonic() - begun)
        time.sleep(max(0.0, SECONDS - (time.monotonic() - begun)))


if __name__ == "__main__":
    main()
