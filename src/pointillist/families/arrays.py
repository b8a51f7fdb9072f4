"""Pixel arithmetic that families share: resize, order, and the one normalisation of uint8 patches.

Pixels stay uint8 as long as possible: it is a quarter of float32's bytes, and normalising is a look-up of 256 values a
channel, exact on every device. The same table gives float32, bfloat16, or goes to the GPU beside the uint8 patches.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pointillist.families.base import ImageLayout
from pointillist.images.decode import color_planes, to_pillow


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
