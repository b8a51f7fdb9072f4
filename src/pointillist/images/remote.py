"""The guarded fetch of remote images, for runs that allow it.

A URL in a message comes from whoever wrote the message, so it must not reach what only this machine can reach: the
host is resolved first, every address must be a public one, and the connection goes to that very address (a second
look-up could answer otherwise). Redirects are followed a few times, each under the same rules; size and time are
bounded.
"""

import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Final

import httpx

from pointillist.errors import SourceError

_MAX_REDIRECTS: Final = 3
_CHUNK_BYTES: Final = 64 * 1024


def public_address(host: str, port: int) -> str:
    """An address of a host, after checking that none of its addresses is a private one.

    Raises:
        SourceError: The host is unknown, or one of its addresses is loopback, private, link-local or otherwise special.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SourceError(f"remote image: host {host[:100]!r} is unknown") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None)
        if not parsed.is_global or parsed.is_multicast or (mapped is not None and not mapped.is_global):
            raise SourceError(f"remote image: host {host[:100]!r} is not a public address")
    return addresses[0]


class RemoteImages:
    """Fetches images over http(s)."""

    def __init__(
        self, max_bytes: int, *, seconds: float = 20.0, address_of: Callable[[str, int], str] = public_address
    ) -> None:
        """Sets the limits.

        Args:
            max_bytes: Of a body.
            seconds: For one image, redirects included.
            address_of: Decides which address a host and port may be reached at.
        """
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._address_of = address_of

    def fetch(self, url: str) -> bytes:
        """Bytes behind a URL.

        Raises:
            SourceError: Refused by a rule of this module's docstring, or the server did not answer with a body.
        """
        deadline = time.monotonic() + self._seconds
        with httpx.Client(follow_redirects=False, trust_env=False, timeout=min(10.0, self._seconds)) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                try:
                    answer = self._get(client, url, deadline)
                except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                    raise SourceError(f"remote image: no answer ({type(error).__name__})") from None
                if isinstance(answer, bytes):
                    return answer
                url = answer
        raise SourceError(f"remote image: more than {_MAX_REDIRECTS} redirects")

    def _get(self, client: httpx.Client, url: str, deadline: float) -> bytes | str:
        """A body, or the URL that a redirect names."""
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise SourceError(f"remote image: expected an http(s) URL with a host, got scheme {parsed.scheme!r}")
        address = self._address_of(parsed.host, parsed.port or (443 if parsed.scheme == "https" else 80))
        request = client.build_request(
            "GET",
            parsed.copy_with(host=address),
            headers={"Host": parsed.netloc.decode("ascii"), "Accept": "image/*"},
            extensions={"sni_hostname": parsed.host},
        )
        response = client.send(request, stream=True)
        try:
            if response.is_redirect:
                return str(parsed.join(response.headers["location"]))
            if response.status_code != httpx.codes.OK:
                raise SourceError(f"remote image: the server answered {response.status_code}")
            return self._body(response, deadline)
        finally:
            response.close()

    def _body(self, response: httpx.Response, deadline: float) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            body += chunk
            if len(body) > self._max_bytes:
                raise SourceError(f"remote image: more than the {self._max_bytes} bytes that an image may have")
            if time.monotonic() > deadline:
                raise SourceError(f"remote image: not there after {self._seconds:.0f} s")
        return bytes(body)
