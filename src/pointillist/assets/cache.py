"""A reader's own store of the images that it fetched: verified, bounded in size, the least recently used go first."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from pointillist.assets.client import AssetClient
from pointillist.base.image_limits import ImageLimits
from pointillist.errors import AssetError, MissingImageError, RefError, StorageError
from pointillist.images.inventory import StoreEntry, list_store
from pointillist.images.store import STORED_NAME, read_intact, usable_folder, write_image

logger = logging.getLogger(__name__)

_KEPT_AFTER_EVICTION: Final = 0.9


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
            RefError: What came has another hash, or the name is not that of the image.
        """
        match = STORED_NAME.fullmatch(name)
        if match is None or match["sha256"] != sha256:
            raise RefError("expected the name of the stored image that the hash says")
        path = self._root / name
        with suppress(MissingImageError, RefError):
            data = read_intact(self._root, name, self._limits)
            with suppress(OSError):  # another reader may have just evicted it
                os.utime(path)
            return data
        try:
            data = self._client.fetch(f"/images/{name}", self._limits.max_bytes, sha256)
        except AssetError as error:
            raise MissingImageError(str(error), sha256=sha256) from None
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
