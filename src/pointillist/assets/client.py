"""Images for a reader that does not share a file system with the writers.

References stay as they are. What their path names is not here, so the image is asked for by its hash at the writers'
asset endpoint, verified, and kept in a store of the reader's own: same layout, bounded in size, the images that were
not used for longest go first.
"""

import base64
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import httpcore
import httpx

from pointillist.base.deadline import Deadline, DeadlineStream
from pointillist.errors import AssetError, CorruptImageError
from pointillist.images.store import has_hash

logger = logging.getLogger(__name__)

_BYTES_A_SECOND: Final = 1024 * 1024
"""An answer may take a second more for so many bytes that have come."""
_CONNECTIONS: Final = 100
_IDLE_SECONDS: Final = 5.0
_LENGTH_DIGITS: Final = 18


class AssetClient:
    """The asset endpoints of a run; safe to be called from several threads."""

    def __init__(self, urls: Sequence[str], key: str, timeout: float) -> None:
        """Nothing is connected yet.

        Args:
            urls: Address of each endpoint; they are asked in this order.
            key: That they ask for.
            timeout: Seconds for a whole answer, its headers included, beside one for each MiB that has come.
        """
        self._urls = urls
        self._timeout = timeout
        self._headers = [("Authorization", f"Bearer {key}"), ("Accept-Encoding", "identity")]
        self._clock = _Clock()
        self._pool = httpcore.ConnectionPool(
            max_connections=_CONNECTIONS, keepalive_expiry=_IDLE_SECONDS, network_backend=_TimedNetwork(self._clock)
        )

    def fetch(self, path: str, max_bytes: int, sha256: str | None = None) -> bytes:
        """What is behind a path.

        Args:
            path: Below the endpoints' addresses.
            max_bytes: An endpoint that sends more is passed over.
            sha256: 64 hex digits that the bytes must have; an endpoint that sends others is passed over.

        Raises:
            AssetError: No endpoint has it, or can be asked; the message says what each answered.
            CorruptImageError: Whatever came has another hash.
        """
        data = bytearray()
        is_corrupt = False

        def take(chunk: bytes) -> None:
            data.extend(chunk)
            if len(data) > max_bytes:
                raise AssetError(f"an asset endpoint sends more than {max_bytes} bytes")

        def is_good() -> bool:
            nonlocal is_corrupt
            is_good = sha256 is None or has_hash(data, sha256)
            is_corrupt |= not is_good
            return is_good

        try:
            self._stream(path, lambda _: data.clear(), take, is_good)
        except AssetError:
            if is_corrupt:
                raise CorruptImageError(
                    f"bytes of image {sha256} as fetched are not what its hash says: the file is corrupt", sha256=sha256
                ) from None
            raise
        return bytes(data)

    def download(self, path: str, target: Path) -> str:
        """Writes what is behind a path to a file, which appears whole.

        An answer that says its digest (`Repr-Digest`) and has another one is as good as none: the next endpoint is
        asked, and each of them once more.

        Returns:
            Sha256 of the file, 64 hex digits.

        Raises:
            AssetError: As `fetch`.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        digest = hashlib.sha256()
        expected = ""
        try:
            with temporary.open("wb") as file:

                def begin(headers: httpx.Headers) -> None:
                    nonlocal digest, expected
                    digest, expected = hashlib.sha256(), headers.get("repr-digest", "")
                    _check_length(headers, shutil.disk_usage(target.parent).free)
                    file.truncate(file.seek(0))

                def take(chunk: bytes) -> None:
                    digest.update(chunk)
                    file.write(chunk)

                def is_good() -> bool:
                    return expected in ("", f"sha-256=:{base64.b64encode(digest.digest()).decode()}:")

                self._stream(path, begin, take, is_good, attempts=2)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def _stream(
        self,
        path: str,
        begin: Callable[[httpx.Headers], object],
        take: Callable[[bytes], object],
        is_good: Callable[[], bool] = lambda: True,
        attempts: int = 1,
    ) -> None:
        answers = []
        for url in [*self._urls] * attempts:
            try:
                self._clock.start(self._timeout)
                with self._get(f"{url}{path}") as response:
                    headers = httpx.Headers(response.headers)
                    encoding = headers.get("content-encoding", "identity")
                    if response.status != httpx.codes.OK or encoding != "identity":
                        answers.append(f"{url} answered {response.status} ({encoding[:32]})")
                        continue
                    begin(headers)
                    for chunk in response.iter_stream():
                        self._clock.prolong(len(chunk) / _BYTES_A_SECOND)
                        take(chunk)
                    if is_good():
                        return
                    answers.append(f"{url} sent bytes of another digest than they should have: the file is corrupt")
            except AssetError as error:
                answers.append(f"{url}: {error}")
            except httpcore.TimeoutException:
                answers.append(f"{url} has not sent all of it after {self._timeout:g} s and one a MiB")
            except (httpcore.NetworkError, httpcore.ProtocolError, httpx.InvalidURL) as error:
                answers.append(f"{url} did not answer ({type(error).__name__})")
        raise AssetError(f"{path} cannot be fetched: {'; '.join(dict.fromkeys(answers))}")

    def _get(self, url: str) -> AbstractContextManager[httpcore.Response]:
        parsed = httpx.URL(url)
        target = httpcore.URL(scheme=parsed.raw_scheme, host=parsed.raw_host, port=parsed.port, target=parsed.raw_path)
        headers = [("Host", parsed.netloc.decode("ascii")), *self._headers]
        return self._pool.stream("GET", target, headers=headers, extensions={"timeout": {"pool": self._timeout}})


class _Clock(Deadline, threading.local):
    """The deadline of each thread: that of the answer which it has asked for."""


class _TimedNetwork(httpcore.SyncBackend):
    """Connections, each wait of which ends at the deadline of the thread that waits."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        """A connection."""
        stream = super().connect_tcp(host, port, self._clock.seconds_left(), local_address, socket_options)
        return DeadlineStream(stream, self._clock)


def _check_length(headers: httpx.Headers, most: int) -> None:
    """Checks that an answer says how long it is, to which the HTTP library holds it, and that there is room for it.

    Raises:
        AssetError: It does not, or there is not.
    """
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdecimal()) or len(length) > _LENGTH_DIGITS:
        raise AssetError("the answer does not say its length")
    if int(length) > most:
        raise AssetError(f"the answer has {length} bytes, the disk has room for {most}")
