"""Pixel arithmetic that families share: resize, order, and the one normalisation of uint8 patches.

Pixels stay uint8 as long as possible: it is a quarter of float32's bytes, and normalising is a look-up of 256 values a
channel, exact on every device. The same table gives float32, bfloat16, or goes to the GPU beside the uint8 patches.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pointillist.families.base import ImageLayout
from pointillist.images.decode import color_planes, to_pillow

PixelDtype = Literal["float32", "bfloat16", "uint8"]
"""Type of `pixel_values`: normalised, or uint8 patches of one frame that the consumer normalises by `pixel_levels`."""

# Values that are looked up between two writes: about what the second-level cache of a core holds beside the table.
_CHUNK: Final = 65_536
_NUMPY_DTYPES: Final[Mapping[str, Any]] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Normalizer:
    """Looks uint8 patches up in a table of normalised levels, two neighbouring values at a time."""

    def __init__(self, levels: NDArray[np.float32], frames: int, dtype: PixelDtype) -> None:
        """Builds the table, of 65,536 pairs a channel.

        Args:
            levels: Normalised value of each of the 256 levels, `(3, 256)`.
            frames: How often each patch is written, one copy beside the other.
            dtype: float32 or bfloat16; bfloat16 is rounded to nearest, ties to even, as torch rounds it.
        """
        self.dtype = np.dtype(_NUMPY_DTYPES[dtype])
        self.frames = frames
        values = levels.astype(self.dtype)
        self._pair_dtype = np.dtype(f"u{2 * self.dtype.itemsize}")
        # The pair of levels (low, high) stands at place low + 256 * high.
        pairs = [np.stack([np.tile(row, 256), np.repeat(row, 256)], axis=1) for row in values]
        self._pairs = [pair.view(self._pair_dtype)[:, 0] for pair in pairs]

    def write(self, patches: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Normalises patches.

        Args:
            patches: uint8 `(patches, 3, values)`, C-contiguous, `values` even.
            out: `(patches, 3, frames, values)` of this normaliser's dtype, C-contiguous; filled.
        """
        source, target = patches.view("<u2"), out.view(self._pair_dtype)
        step = max(1, _CHUNK // patches.shape[-1])
        for start in range(0, len(patches), step):
            for channel in range(3):
                # mode="clip" spares numpy a bounds check; every uint16 is inside the table.
                values = np.take(self._pairs[channel], source[start : start + step, channel], mode="clip")
                for frame in range(self.frames):
                    target[start : start + step, channel, frame] = values


def pil_normalization_levels(fields: Mapping[str, Any]) -> NDArray[np.float32]:
    """Normalised value of each of the 256 levels, float32 `(3, 256)`, bit for bit as the PIL backend has it.

    Args:
        fields: `rescale_factor`, `image_mean` and `image_std`.

    Source: `rescale` (float64, rounded to float32) and `normalize` (float32) of transformers.image_transforms.
    """
    levels = (np.arange(256, dtype=np.float64) * fields["rescale_factor"]).astype(np.float32)
    mean = np.array(fields["image_mean"], dtype=np.float32)
    std = np.array(fields["image_std"], dtype=np.float32)
    normalized: NDArray[np.float32] = (levels[None, :] - mean[:, None]) / std[:, None]
    return normalized


def planes_by_pillow(
    pixels: NDArray[np.uint8], width: int, height: int, resample: Image.Resampling
) -> Iterator[NDArray[np.uint8]]:
    """Red, green and blue of the image at this size, `(height, width)` each, resized by Pillow if need be."""
    if pixels.shape[:2] == (height, width):
        return color_planes(pixels)
    resized = to_pillow(pixels).resize((width, height), resample)
    return (np.asarray(band) for band in resized.split())


def grids_of(layouts: Sequence[ImageLayout]) -> NDArray[np.int64]:
    """Grids of images, int64 `(images, 3)`."""
    return np.array([layout.grid_thw for layout in layouts], dtype=np.int64).reshape(-1, 3)
