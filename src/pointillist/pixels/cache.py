"""A byte-bounded cache of materialised images with single flight.

The rollouts of a group share their prompt's pictures, and every turn of a conversation brings the old ones again. Keys
are content hashes, so an entry can not go stale. Whoever asks for an image that another thread is loading waits for
that one load instead of doing it again.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from pointillist.families.base import ImageLayout


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One image in its model's order; without patches it stands for an image that is not to be had."""

    patches: NDArray[np.uint8] | None
    """uint8, as `Family.patches` gives them; shared, so read only."""
    layout: ImageLayout
    constant: bool = False
    """Whether it shows (nearly) one colour only: often a picture that was read wrongly."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the patches."""
        return 0 if self.patches is None else self.patches.nbytes


@dataclass(slots=True)
class CacheCounts:
    """What a cache has done since it was made."""

    hits: int = 0
    """Images that were there, or being loaded already."""
    misses: int = 0
    """Images that were loaded."""
    failures: int = 0
    """Loads that raised."""
    bytes_loaded: int = 0
    """Bytes of patches that were made."""
    constant: int = 0
    """Loaded images that show (nearly) one colour only."""


class ImageCache:
    """Least recently used images go first once `max_bytes` are full."""

    def __init__(self, max_bytes: int) -> None:
        """Makes an empty cache.

        Args:
            max_bytes: Patches kept, in bytes; 0 keeps none but still joins simultaneous loads.
        """
        self._entries: LRUCache[str, LoadedImage] = LRUCache(max_bytes, getsizeof=attrgetter("num_bytes"))
        self._loading: dict[str, Future[LoadedImage]] = {}
        self._lock = threading.Lock()
        self.counts = CacheCounts()

    @property
    def num_bytes(self) -> int:
        """Bytes of patches that are kept."""
        return int(self._entries.currsize)

    def get(self, key: str, load: Callable[[], LoadedImage]) -> LoadedImage:
        """The image of this key, loaded by `load` if it is not there.

        Raises:
            Exception: Whatever `load` raised; it is not remembered, the next call tries again.
        """
        with self._lock:
            if (image := self._entries.get(key)) is not None:
                self.counts.hits += 1
                return image
            running = self._loading.get(key)
            if running is None:
                mine = self._loading[key] = Future()
                self.counts.misses += 1
            else:
                self.counts.hits += 1
        if running is not None:
            return running.result()
        try:
            image = load()
        except BaseException as error:
            with self._lock:
                del self._loading[key]
                self.counts.failures += 1
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self.counts.bytes_loaded += image.num_bytes
            self.counts.constant += image.constant
            if image.num_bytes <= self._entries.maxsize:
                self._entries[key] = image
        mine.set_result(image)
        return image
