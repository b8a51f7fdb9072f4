"""The guarded fetch of remote images, for runs that allow it.

A URL in a message comes from whoever wrote the message, so it must not reach what only this machine can reach: every
connection, redirects included, resolves its host once, every address must be a public one, and the connection goes to
that very address (a second look-up could answer otherwise). One deadline covers the whole fetch: waiting for a turn,
name service, handshakes, headers, body, all redirects. Only a few are fetched at once, by threads that do nothing else
(`Sources.fetch_remote`), so a slow server holds up other fetches at most.
"""

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import cache
from typing import Any, Final

import httpcore
import httpx

from pointillist.base.deadline import Deadline, DeadlineStream
from pointillist.errors import SourceError

_MAX_REDIRECTS: Final = 3
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_OK: Final = 200
_WELL_KNOWN_PORTS: Final = 1024
_PORTS: Final = {"http": 80, "https": 443}
FETCHED_AT_ONCE: Final = 8
"""Remote images that a process fetches at a time."""

_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
# Python's own list of special networks grows with its versions; these are not in all that we run on.
_SPECIAL: Final = tuple(
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20")
)
_ISATAP: Final = frozenset({b"\0\0\x5e\xfe", b"\x02\0\x5e\xfe"})

# Name service has no time limit of its own. Its threads are few: a host that hangs them holds up fetches only.
_resolvers = ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="resolve")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def public_address(host: str, port: int) -> str:
    """An address of a host, after checking that none of its addresses is a private one.

    Raises:
        SourceError: The host is unknown, or one of its addresses is loopback, private, link-local or otherwise special.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        public = [is_public(ipaddress.ip_address(address.partition("%")[0])) for address in addresses]
    except (OSError, ValueError):  # a label that is no host name is a UnicodeError
        raise SourceError(f"remote image: host {host[:100]!r} is unknown") from None
    if not addresses or not all(public):
        raise SourceError(f"remote image: host {host[:100]!r} is not a public address")
    return addresses[0]


def is_public(address: _Address) -> bool:
    """Whether an address can be reached by anybody, and so can each IPv4 address that an IPv6 one carries."""
    if any(address in network for network in _SPECIAL):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(address.packed[12:]))
    # Everything else outside of here is mapped, compatible, local-use NAT64, site-local, unique local or not assigned.
    if address not in _GLOBAL_UNICAST or not (address.is_global or address.sixtofour is not None):
        return False
    return all(is_public(carried) for carried in _carried(address))


def _carried(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """IPv4 addresses within a global IPv6 one: 6to4 and ISATAP (Teredo is in `_SPECIAL`)."""
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.packed[8:12] in _ISATAP:
        yield ipaddress.IPv4Address(address.packed[12:])


class RemoteImages:
    """Fetches images over http(s); safe to be called from several threads."""

    def __init__(
        self,
        max_bytes: int,
        *,
        seconds: float = 20.0,
        address_of: Callable[[str, int], str] = public_address,
        at_once: int = FETCHED_AT_ONCE,
    ) -> None:
        """Sets the limits.

        Args:
            max_bytes: Of a body.
            seconds: For one image, from the call to its last byte.
            address_of: Decides which address a host and port may be reached at.
            at_once: Images that are fetched at a time; others wait for their turn.
        """
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._address_of = address_of
        self._turns = threading.BoundedSemaphore(at_once)

    def fetch(self, url: str) -> bytes:
        """Bytes behind a URL.

        Raises:
            SourceError: Refused by a rule of this module's docstring, or the server did not answer with a body.
        """
        deadline = Deadline(self._seconds)
        if not self._turns.acquire(timeout=self._seconds):
            raise SourceError(
                f"remote image: no turn within {self._seconds:g} s, too many are fetched at once", retryable=True
            )
        try:
            return self._fetch(url, deadline)
        finally:
            self._turns.release()

    def _fetch(self, url: str, deadline: Deadline) -> bytes:
        network = _CheckedNetwork(self._address_of, deadline)
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                deadline.seconds_left()
                with httpcore.ConnectionPool(ssl_context=_tls(), network_backend=network, retries=0) as pool:
                    answer = self._get(pool, url)
                if isinstance(answer, bytes):
                    return answer
                url = answer
        except httpcore.TimeoutException:
            raise SourceError(f"remote image: not there after {self._seconds:g} s", retryable=True) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpx.InvalidURL, OSError, ValueError) as error:
            raise SourceError(
                f"remote image: no answer ({type(error).__name__}: {str(error)[:120]})", retryable=True
            ) from None
        raise SourceError(f"remote image: more than {_MAX_REDIRECTS} redirects")

    def _get(self, pool: httpcore.ConnectionPool, url: str) -> bytes | str:
        """A body, or the URL that a redirect names."""
        parsed = _checked(httpx.URL(url))
        target = httpcore.URL(
            scheme=parsed.raw_scheme,
            host=parsed.raw_host,
            port=parsed.port or _PORTS[parsed.scheme],
            target=parsed.raw_path,
        )
        headers = [
            ("Host", parsed.netloc.decode("ascii")),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "pointillist"),
        ]
        with pool.stream("GET", target, headers=headers) as response:
            given = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in given:
                return str(parsed.join(given[b"location"]))
            if response.status in _REDIRECTS:
                raise SourceError(f"remote image: the server answered {response.status} without a Location")
            if response.status != _OK:
                raise SourceError(f"remote image: the server answered {response.status}")
            if (encoding := given.get(b"content-encoding", "identity").strip().lower()) not in ("", "identity"):
                raise SourceError(f"remote image: the server sent it compressed ({encoding[:32]}), unasked")
            return self._body(response.iter_stream())

    def _body(self, chunks: Iterable[bytes]) -> bytes:
        body = bytearray()
        for chunk in chunks:
            body += chunk
            if len(body) > self._max_bytes:
                raise SourceError(f"remote image: more than the {self._max_bytes} bytes that an image may have")
        return bytes(body)


def _checked(url: httpx.URL) -> httpx.URL:
    if url.scheme not in _PORTS or not url.host:
        raise SourceError(f"remote image: expected an http(s) URL with a host, got scheme {url.scheme[:16]!r}")
    if url.userinfo:
        raise SourceError("remote image: the URL has a user name or password in it, which is not sent for anybody")
    return url


@cache
def _tls() -> ssl.SSLContext:
    return httpcore.default_ssl_context()


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connections to checked addresses, all of whose waiting ends at one deadline."""

    def __init__(self, address_of: Callable[[str, int], str], deadline: Deadline) -> None:
        self._address_of = address_of
        self._deadline = deadline
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        """A connection to the host's checked address."""
        found = _resolvers.submit(self._address_of, host, port)
        try:
            address = found.result(self._deadline.seconds_left())
        except FutureTimeoutError:
            found.cancel()
            raise httpcore.ConnectTimeout("name service") from None
        if port < _WELL_KNOWN_PORTS and port not in _PORTS.values():
            raise SourceError(f"remote image: port {port} is not one that pictures are served at")
        stream = self._sockets.connect_tcp(address, port, self._deadline.seconds_left(), local_address, socket_options)
        return DeadlineStream(stream, self._deadline)
