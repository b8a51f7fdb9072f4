"""From the patches of single images to the tensors of a batch, in the type that the consumer wants."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointillist.families.base import Family
from pointillist.families.image_cache import LoadedImage
from pointillist.families.pixels import Normalizer, PixelDtype


class PatchJoiner:
    """Joins images for one family; the tables of its normalisation are built once a type."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._normalizers: dict[str, Normalizer] = {}

    def join(
        self,
        images: Sequence[LoadedImage],
        dtype: PixelDtype = "float32",
        map_images: Callable[..., Iterable[None]] = map,
    ) -> dict[str, NDArray[Any]]:
        """Tensors of images, one after the other.

        Args:
            images: At least one; without patches an image is zeros.
            dtype: `float32` and `bfloat16` (`ml_dtypes.bfloat16`): normalised and repeated in time, of the shape that
                the Hugging Face processor gives. `uint8`: patches of one frame, `(patches, 3, ...)`, that the consumer
                normalises by the family's `pixel_levels`.
            map_images: `map`, or a thread pool's: images are written independently of each other.

        Returns:
            `pixel_values`, and what else the model's `forward` takes.
        """
        layouts = [image.layout for image in images]
        shapes = [self._family.patches_shape(layout) for layout in layouts]
        bounds = list(accumulate((shape[0] for shape in shapes), initial=0))
        rest, frames = shapes[0][2:], self._family.frames
        if dtype == "uint8":
            out: NDArray[Any] = np.empty((bounds[-1], 3, *rest), dtype=np.uint8)
            final = out.shape
        else:
            normalizer = self._normalizer(dtype)
            out = np.empty((bounds[-1], 3, frames, math.prod(rest)), dtype=normalizer.dtype)
            final = (bounds[-1], 3 * frames * math.prod(rest)) if frames > 1 else (bounds[-1], 3, *rest)

        def write(image: LoadedImage, start: int, end: int) -> None:
            if image.patches is None:
                out[start:end] = 0
            elif dtype == "uint8":
                out[start:end] = image.patches
            else:
                normalizer.write(image.patches.reshape(end - start, 3, -1), out[start:end])

        for _ in map_images(write, images, bounds[:-1], bounds[1:]):
            pass  # raises what a thread raised
        return {"pixel_values": out.reshape(final), **self._family.image_inputs(layouts)}

    def join_pixels(
        self, pixels: Sequence[NDArray[np.uint8]], dtype: PixelDtype = "float32"
    ) -> dict[str, NDArray[Any]]:
        """Tensors of pictures that are at hand, uint8 `(height, width, 3)` each, as `join` gives them."""
        layouts = [self._family.layout(each.shape[1], each.shape[0]) for each in pixels]
        patches = [self._family.patches(each, layout) for each, layout in zip(pixels, layouts, strict=True)]
        return self.join([LoadedImage(*each) for each in zip(patches, layouts, strict=True)], dtype)

    def _normalizer(self, dtype: PixelDtype) -> Normalizer:
        if dtype not in self._normalizers:
            self._normalizers[dtype] = Normalizer(self._family.pixel_levels, self._family.frames, dtype)
        return self._normalizers[dtype]
