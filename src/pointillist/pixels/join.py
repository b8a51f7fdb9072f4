"""From the patches of single images to the tensors of a batch, in the type that the consumer wants."""

import math
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pointillist.families.base import Family
from pointillist.pixels.cache import LoadedImage
from pointillist.pixels.levels import Normalizer, PixelDtype

_KEPT_BYTES: Final = 64 * 1024 * 1024


class PatchJoiner:
    """Joins images for one family; the tables of its normalisation are built once a type."""

    def __init__(self, family: Family, map_images: Callable[..., Iterable[None]] = map) -> None:
        """Prepares; nothing is allocated yet.

        Args:
            family: The model's adapter.
            map_images: `map`, or a thread pool's: images are written independently of each other.
        """
        self._family = family
        self._map_images = map_images
        self._normalizers: dict[str, Normalizer] = {}
        self._buffers = _Buffer()

    def join(self, images: Sequence[LoadedImage], dtype: PixelDtype = "float32") -> dict[str, NDArray[np.generic]]:
        """Tensors of images, one after the other.

        Args:
            images: Images; at least one. Without patches an image is zeros.
            dtype: `float32` and `bfloat16` (`ml_dtypes.bfloat16`): normalised and repeated in time, of the shape that
                the Hugging Face processor gives. `uint8`: patches of one frame, `(P, 3, ...)`, that the consumer
                normalises by the family's `pixel_levels`; they may share memory with the image: do not write.

        Returns:
            `pixel_values`, and what else the model's `forward` takes.
        """
        layouts = [image.layout for image in images]
        if dtype == "uint8":
            patches = [
                np.zeros(self._family.patches_shape(image.layout), dtype=np.uint8)
                if image.patches is None
                else image.patches
                for image in images
            ]
            values: NDArray[np.generic] = patches[0] if len(patches) == 1 else np.concatenate(patches)
        else:
            values = self._normalized(images, dtype)
        return {"pixel_values": values, **self._family.image_inputs(layouts)}

    def join_pixels(
        self, pixels: Sequence[NDArray[np.uint8]], dtype: PixelDtype = "float32"
    ) -> dict[str, NDArray[np.generic]]:
        """Tensors of pictures that are at hand, uint8 `(height, width, 3)` each, as `join` gives them."""
        layouts = [self._family.layout(each.shape[1], each.shape[0]) for each in pixels]
        patches = [self._family.patches(each, layout) for each, layout in zip(pixels, layouts, strict=True)]
        return self.join([LoadedImage(*each) for each in zip(patches, layouts, strict=True)], dtype)

    def _normalized(self, images: Sequence[LoadedImage], dtype: PixelDtype) -> NDArray[np.generic]:
        shapes = [self._family.patches_shape(image.layout) for image in images]
        bounds = list(accumulate((shape[0] for shape in shapes), initial=0))
        rest, frames, normalizer = shapes[0][2:], self._family.frames, self._normalizer(dtype)
        out = self._buffers.empty((bounds[-1], 3, frames, math.prod(rest)), normalizer.dtype)

        def write(image: LoadedImage, start: int, end: int) -> None:
            if image.patches is None:
                out[start:end] = 0
            else:
                normalizer.write(image.patches.reshape(end - start, 3, -1), out[start:end])

        for _ in self._map_images(write, images, bounds[:-1], bounds[1:]):
            pass  # raises what a thread raised
        return out.reshape((bounds[-1], -1) if frames > 1 else (bounds[-1], 3, *rest))

    def _normalizer(self, dtype: PixelDtype) -> Normalizer:
        if dtype not in self._normalizers:
            self._normalizers[dtype] = Normalizer(self._family.pixel_levels, self._family.frames, dtype)
        return self._normalizers[dtype]


class _Buffer:
    """One block of memory, given out again once no array lies in it: fresh pages cost as much as the pixels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block = np.empty(0, dtype=np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """An array of this shape and type, of any content."""
        size = math.prod(shape) * dtype.itemsize
        if size > _KEPT_BYTES:
            return np.empty(shape, dtype=dtype)
        with self._lock:
            # Views hold the block itself, whatever they are views of. Two references are free: ours and the argument.
            if len(self._block) < size or sys.getrefcount(self._block) > 2:
                self._block = np.empty(size, dtype=np.uint8)
            return self._block[:size].view(dtype).reshape(shape)
