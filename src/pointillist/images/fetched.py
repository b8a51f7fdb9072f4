"""Images for a reader that does not share a file system with the writers.

References stay as they are. What their path names is not here, so the image is asked for by its hash at the writers'
asset endpoint, verified, and kept in a store of the reader's own: same layout, bounded in size, the images that were
not used for longest go first.
"""

import base64
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import httpx

from pointillist.errors import MissingImageError, RefError, StorageError
from pointillist.images.decode import ImageLimits
from pointillist.images.inventory import StoreEntry, list_store
from pointillist.images.store import read_stored, usable_folder, write_image

logger = logging.getLogger(__name__)

_KEPT_AFTER_EVICTION: Final = 0.9


class AssetClient:
    """The asset endpoints of a run; safe to be called from several threads."""

    def __init__(self, urls: Sequence[str], key: str, timeout: float) -> None:
        """Nothing is connected yet.

        Args:
            urls: Address of each endpoint; they are asked in this order.
            key: That they ask for.
            timeout: Seconds for connecting, between two pieces of an answer, and for a whole image.
        """
        self._urls = urls
        self._timeout = timeout
        headers = {"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=False)

    def fetch(self, path: str, max_bytes: int) -> bytes:
        """What is behind a path.

        Raises:
            MissingImageError: No endpoint has it, or can be asked; the message says what each answered.
        """
        data = bytearray()
        deadline = 0.0

        def begin(_: httpx.Headers) -> None:
            nonlocal deadline
            data.clear()
            deadline = time.monotonic() + self._timeout

        def take(chunk: bytes) -> None:
            data.extend(chunk)
            if len(data) > max_bytes:
                raise MissingImageError(f"{path}: an asset endpoint sends more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise MissingImageError(f"{path}: an asset endpoint has not sent all of it after {self._timeout:g} s")

        self._stream(path, begin, take)
        return bytes(data)

    def download(self, path: str, target: Path) -> str:
        """Writes what is behind a path to a file, which appears whole.

        An answer that says its digest (`Repr-Digest`) and has another one is as good as none: the next endpoint is
        asked, and each of them once more.

        Returns:
            Sha256 of the file, 64 hex digits.

        Raises:
            MissingImageError: As `fetch`.
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
                with self._http.stream("GET", f"{url}{path}") as response:
                    encoding = response.headers.get("content-encoding", "identity")
                    if response.status_code != httpx.codes.OK or encoding != "identity":
                        answers.append(f"{url} answered {response.status_code} ({encoding[:32]})")
                        continue
                    begin(response.headers)
                    # Piece by piece as they come, so that the time is looked at even if they are small.
                    for chunk in response.iter_raw():
                        take(chunk)
                    if is_good():
                        return
                    answers.append(f"{url} sent bytes of another digest than it said: the file is corrupt")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                answers.append(f"{url} did not answer ({type(error).__name__})")
        raise MissingImageError(f"{path} is not to be had: {'; '.join(dict.fromkeys(answers))}")


class FetchedImages:
    """A reader's own store of images that it fetched."""

    def __init__(self, root: Path, max_bytes: int, client: AssetClient, limits: ImageLimits) -> None:
        """Opens the store, making its folder if it is not there.

        Args:
            root: The folder; several readers of one machine may share it.
            max_bytes: Size that it is kept below.
            client: Where images are fetched from.
            limits: What an image may be at most.

        Raises:
            ConfigError: The folder cannot be used.
        """
        self._root = usable_folder(root)
        self._max_bytes = max_bytes
        self._client = client
        self._limits = limits
        self._lock = threading.Lock()
        self._bytes = sum(entry.num_bytes for entry in _images_in(self._root))

    def read(self, name: str, sha256: str) -> bytes:
        """Bytes of an image, verified.

        Args:
            name: Below a store's root, `<hh>/<sha256>.<ext>`.
            sha256: 64 hex digits.

        Raises:
            MissingImageError: No endpoint has it.
            RefError: What came has another hash.
        """
        path = self._root / name
        with suppress(MissingImageError, RefError):
            data = read_stored(self._root, name, self._limits)
            if hashlib.sha256(data).hexdigest() == sha256:
                with suppress(OSError):  # another reader may have just evicted it
                    os.utime(path)
                return data
        data = self._client.fetch(f"/images/{name}", self._limits.max_bytes)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RefError(f"bytes of image {sha256} as fetched are not what its hash says: the file is corrupt")
        self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        """Writes an image and makes room; a full or failing disk costs only the keeping."""
        try:
            write_image(path, data)
            with self._lock:
                self._bytes += len(data)
                if self._bytes > self._max_bytes:
                    self._bytes = _evict(self._root, int(self._max_bytes * _KEPT_AFTER_EVICTION))
        except (StorageError, OSError) as error:
            logger.warning("fetched image is not kept: %s", error)


def _evict(root: Path, max_bytes: int) -> int:
    """Removes what was not used for longest until at most `max_bytes` are left; returns how many are."""
    found = sorted(_images_in(root), key=lambda entry: entry.modified)
    total = sum(entry.num_bytes for entry in found)
    for entry in found:
        if total <= max_bytes:
            break
        entry.path.unlink(missing_ok=True)
        total -= entry.num_bytes
    return total


def _images_in(root: Path) -> Iterator[StoreEntry]:
    return (entry for entry in list_store(root) if entry.sha256 is not None)
