"""The inference servers behind a client: which one gets a request, and what happens when one cannot be reached.

Requests of one group or conversation go to one server, which has their prompt in its cache; a new one goes where the
fewest are in flight. A server that cannot be reached is left alone for a moment, a little longer each time, and its
requests go to the others. While none can be reached a request waits: what it asks for is decided by its seed, so asking
again, and elsewhere, gives the same.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from cachetools import LRUCache

from pointillist.base.pools import RESOLVING
from pointillist.errors import InferenceError, UnreachableError

_KEEPALIVE_SECONDS: Final = 4.0
"""Idle connections are closed by us before uvicorn closes them (5 s) under a request."""
_READY_POLL_SECONDS: Final = 0.1
_HEALTH_SECONDS: Final = 5.0
_FIRST_REST_SECONDS: Final = 0.1
_LONGEST_REST_SECONDS: Final = 2.0
_REMEMBERED: Final = 100_000
_ANSWER_BYTES: Final = 1024 * 1024
_UNAVAILABLE: Final = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)


class _Resolver(AbstractResolver):
    """Names to addresses, in threads of our own: those of the event loop may all be held by environments."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of a host."""
        found = await RESOLVING.run(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=kind,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """Has nothing to close."""


class InferenceServer:
    """One inference server."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        self.url = url
        self.in_flight = 0
        """Requests that were given to it and not answered."""
        self._headers = headers
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=10.0)
        self._session: aiohttp.ClientSession | None = None
        self._rests_until = 0.0
        self._failures = 0

    @property
    def rest(self) -> float:
        """Seconds for which this server is still to be left alone; 0 if it can be asked."""
        return max(0.0, self._rests_until - time.monotonic())

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None, *, max_bytes: int = _ANSWER_BYTES
    ) -> tuple[int, bytes]:
        """Status and body of an answer.

        Args:
            path: Of the route.
            body: JSON.
            headers: HTTP headers in place of those of the same name that every request has.
            max_bytes: Longest answer.

        Raises:
            UnreachableError: No connection, no whole answer, or a server that is not available.
            InferenceError: No answer in time, or one that is too long.
        """
        try:
            # A redirect would take the request, and the key, to wherever the server says.
            async with self._http.post(path, data=body, headers=headers, allow_redirects=False) as response:
                status, data = response.status, await self._read(response, max_bytes)
            if status in _UNAVAILABLE:
                raise UnreachableError(f"inference server at {self.url} answered {path} with {status}")
        except TimeoutError:
            raise InferenceError(f"inference server at {self.url} did not answer {path} in time") from None
        except (aiohttp.ClientError, UnreachableError) as error:
            self._failures += 1
            rest = min(_FIRST_REST_SECONDS * 2 ** (self._failures - 1), _LONGEST_REST_SECONDS)
            self._rests_until = time.monotonic() + rest
            if isinstance(error, UnreachableError):
                raise
            raise UnreachableError(
                f"inference server at {self.url} did not answer {path} ({type(error).__name__})"
            ) from None
        self._failures = 0
        return status, data

    async def wait_until_ready(self, seconds: float) -> None:
        """Waits until the server is healthy.

        Raises:
            InferenceError: It is not after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while True:
            if await self.health() is not None:
                return
            if time.monotonic() > deadline:
                raise InferenceError(
                    f"inference server at {self.url} is not healthy after {seconds:.0f} s "
                    "(orchestrator.client.startup_timeout)"
                )
            await asyncio.sleep(_READY_POLL_SECONDS)

    async def health(self) -> dict[str, Any] | None:
        """What the server says of itself, which may be nothing; None if it is not healthy."""
        try:
            async with self._http.get(
                "/health", allow_redirects=False, timeout=aiohttp.ClientTimeout(total=_HEALTH_SECONDS)
            ) as response:
                if response.status != HTTPStatus.OK:
                    return None
                data = await self._read(response, _ANSWER_BYTES)
        except (aiohttp.ClientError, TimeoutError, InferenceError):
            return None
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return msgspec.json.decode(data, type=dict[str, Any])
        return {}

    async def _read(self, response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > max_bytes:
                raise InferenceError(f"inference server at {self.url} answered more than {max_bytes} bytes")
        return bytes(data)

    async def aclose(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()

    @property
    def _http(self) -> aiohttp.ClientSession:
        """Opened at the first request, since it belongs to the event loop that is then running."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS, resolver=_Resolver())
            self._session = aiohttp.ClientSession(
                self.url,
                headers={**self._headers, "Accept-Encoding": "identity"},
                timeout=self._timeout,
                connector=connector,
                auto_decompress=False,  # a small answer could become a large one
            )
        return self._session


class InferenceServers:
    """All of them, as one."""

    def __init__(
        self, urls: Sequence[str], headers: Mapping[str, str], *, timeout: float, unreachable_timeout: float
    ) -> None:
        """Nothing is connected yet.

        Args:
            urls: Address of each server.
            headers: Of every request.
            timeout: Seconds that one request may take.
            unreachable_timeout: Seconds for which a request is tried again while no server can be reached.
        """
        self.all = [InferenceServer(url, headers, timeout) for url in urls]
        self._unreachable_timeout = unreachable_timeout
        self._home: LRUCache[str, InferenceServer] = LRUCache(_REMEMBERED)

    async def post(self, path: str, body: bytes, affinity: str, *, max_bytes: int = _ANSWER_BYTES) -> tuple[int, bytes]:
        """Status and body of an answer.

        Args:
            path: Of the route.
            body: JSON.
            affinity: Requests with the same word go to the same server while it can be reached.
            max_bytes: Longest answer.

        Raises:
            UnreachableError: No server could be reached for `unreachable_timeout` seconds.
            InferenceError: No answer in time, or one that is too long.
        """
        deadline: float | None = None
        while True:
            server = self._pick(affinity)
            server.in_flight += 1  # before anything is awaited: the next request must know of this one
            try:
                await asyncio.sleep(server.rest)
                return await server.post(path, body, max_bytes=max_bytes)
            except UnreachableError:
                deadline = deadline or time.monotonic() + self._unreachable_timeout
                if time.monotonic() >= deadline:
                    raise
            finally:
                server.in_flight -= 1

    def _pick(self, affinity: str) -> InferenceServer:
        """The server that knows the conversation, the least busy one, or if none can be asked the first that can."""
        home = self._home.get(affinity)
        if home is None or home.rest:
            home = min(self.all, key=lambda server: (server.rest, server.in_flight))
            self._home[affinity] = home
        return home

    async def aclose(self) -> None:
        """Closes all connections."""
        for server in self.all:
            await server.aclose()
