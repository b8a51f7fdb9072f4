"""HTTP as it should not be: requests are bytes, written as they are, and answers are read as far as they come."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import httptools

SESSION = "5e55104b" * 4
"""Where the path of a request names a session: the sender puts in one that is open."""


@dataclass(frozen=True, slots=True)
class Http:
    """One hostile input of a server."""

    kind: str
    data: bytes
    """As it goes on the wire, from the request line on."""
    due: bool = True
    """Whether an answer is due: the request is whole. Others may be answered, closed, or left waiting."""
    drip: float = 0.0
    """Seconds between its last bytes; 0 sends it at once."""


def request(
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    host: str = "127.0.0.1",
) -> bytes:
    """Bytes of a well-formed request."""
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {host}",
        *(f"{name}: {text}" for name, text in (headers or {}).items()),
    ]
    if body is not None:
        given = {name.lower() for name in headers or {}}
        lines += ["Content-Type: application/json"] * ("content-type" not in given)
        lines += [f"Content-Length: {len(body)}"] * (not given & {"content-length", "transfer-encoding"})
    return "\r\n".join(lines).encode(errors="surrogateescape") + b"\r\n\r\n" + (body or b"")


@dataclass(slots=True)
class Answer:
    """What came back."""

    status: int = 0
    """0: none."""
    body: bytes = b""
    note: str = ""
    """Why there is no status: `closed`, `waiting`."""


class _Parsed:
    def __init__(self) -> None:
        self.body = bytearray()
        self.done = False

    def on_body(self, data: bytes) -> None:
        if len(self.body) < 4000:
            self.body += data

    def on_message_complete(self) -> None:
        self.done = True


class Connection:
    """A connection that is kept open from one whole request to the next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, given: Http, data: bytes, seconds: float) -> Answer:
        """Sends one input and reads what comes.

        Raises:
            OSError: Nothing listens there.
        """
        for attempt in range(2):
            fresh = self._writer is None
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
            try:
                answer = await asyncio.wait_for(self._exchange(given, data), seconds)
            except TimeoutError:
                answer = Answer(note="waiting")
            # A server may close a connection that was idle just as the next request is sent.
            if fresh or attempt or answer.status or answer.note == "waiting":
                break
            self.close()
        if not given.due or not answer.status or answer.note:
            self.close()
        return answer

    def close(self) -> None:
        """Drops the connection."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _exchange(self, given: Http, data: bytes) -> Answer:
        assert self._reader is not None
        assert self._writer is not None
        with contextlib.suppress(ConnectionError):  # it may have answered all the same
            if given.drip:
                cut = max(0, len(data) - 40)
                self._writer.write(data[:cut])
                for at in range(cut, len(data), 4):
                    self._writer.write(data[at : at + 4])
                    await self._writer.drain()
                    await asyncio.sleep(given.drip)
            else:
                self._writer.write(data)
                await self._writer.drain()
        return await self._read(self._reader)

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> Answer:
        parsed = _Parsed()
        parser = httptools.HttpResponseParser(parsed)
        note = ""
        while not parsed.done:
            try:
                data = await reader.read(65536)
            except ConnectionError:
                data = b""
            if not data:
                note = "closed"
                break
            try:
                parser.feed_data(data)
            except httptools.HttpParserError:
                note = "closed" if parsed.done else "no HTTP"
                break
        try:
            status = parser.get_status_code()
        except Exception:  # nothing has come
            status = 0
        if parsed.done and not parser.should_keep_alive():
            note = "closed"
        return Answer(status if 100 <= status < 600 else 0, bytes(parsed.body), note)
