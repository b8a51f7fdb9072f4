"""Pixel arithmetic that families share: resize, order, and the one normalisation of uint8 patches.

Pixels stay uint8 as long as possible: it is a quarter of float32's bytes, and normalising is a look-up of 256 values a
channel, exact on every device. The same table gives float32, bfloat16, or goes to the GPU beside the uint8 patches.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pointillist.families.model_files import ProcessorSettings
from pointillist.images.decode import color_planes, to_pillow


def pil_normalization_levels(settings: ProcessorSettings) -> NDArray[np.float32]:
    """Normalised value of each of the 256 levels, float32 `(3, 256)`, bit for bit as the PIL backend has it.

    Example:
        With `rescale_factor` 1/255, mean 0.5 and deviation 0.5 level 0 is -1 and level 255 is 1.

    Source: `rescale` (float64, rounded to float32) and `normalize` (float32) of transformers.image_transforms.
    """
    levels = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean = np.array(settings.image_mean, dtype=np.float32)
    std = np.array(settings.image_std, dtype=np.float32)
    normalized: NDArray[np.float32] = (levels[None, :] - mean[:, None]) / std[:, None]
    return normalized


def planes_by_pillow(
    pixels: NDArray[np.uint8], width: int, height: int, resample: Image.Resampling
) -> Iterator[NDArray[np.uint8]]:
    """Red, green and blue of an image at this size, resized by Pillow if its size is another one.

    Args:
        pixels: Decoded image, uint8 `(image height, image width, 3)`.
        width: Columns of the planes.
        height: Rows of the planes.
        resample: Pillow's filter.

    Returns:
        Three planes, uint8 `(height, width)` each.
    """
    if pixels.shape[:2] == (height, width):
        return color_planes(pixels)
    resized = to_pillow(pixels).resize((width, height), resample)
    return (np.asarray(band) for band in resized.split())
