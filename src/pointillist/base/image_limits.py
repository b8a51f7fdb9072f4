"""What an image may be at most: formats and sizes, for the config, the decoder and all between them."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

ImageFormat = Literal["png", "jpg", "webp", "gif", "bmp", "tiff", "avif", "heic"]
"""Formats of pictures, by the extension of their files in the store."""

ALL_FORMATS: Final[tuple[ImageFormat, ...]] = get_args(ImageFormat)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may be at most; checked before it is decoded."""

    max_bytes: int = 32 * 1024 * 1024
    """Size of the file, in bytes."""
    max_pixels: int = 64_000_000
    """Width times height."""
    max_side: int = 16_384
    """The longer side, in pixels."""
    formats: tuple[ImageFormat, ...] = ALL_FORMATS
    """Formats that are accepted, by the extension of their files in the store."""


STORED_LIMITS: Final = ImageLimits(max_bytes=1024**3, max_pixels=1_000_000_000, max_side=1_000_000)
"""For pictures that some run has accepted already, where that run's own limits are not known."""
