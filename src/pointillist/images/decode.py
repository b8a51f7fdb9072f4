"""From untrusted bytes to a header, and from a header to RGB pixels: the same way in every process.

Two questions are asked of an image file. `read_header` answers "how large is it, seen upright?" from the first
bytes alone; that is all the environment side ever needs. `decode_rgb` gives the pixels, normalised by one fixed
set of rules (`PIXEL_RULES`, part of every layout fingerprint):

- the EXIF orientation that stands before the pixel data is applied (a PNG's EXIF chunk after its pixels is not:
  reading it would mean decoding the whole file to know the size);
- alpha is composited on white, palettes are resolved, 16-bit grey keeps its upper eight bits, CMYK, YCbCr and
  LAB go through Pillow's conversion;
- the result is RGB, uint8, height x width x 3.

Every limit is checked on the header, before a pixel is decoded; whatever Pillow raises becomes an `ImageError`.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pointillist.errors import ImageError

ImageFormat = Literal["png", "jpg", "webp", "gif", "bmp", "tiff"]

PIXEL_RULES: Final = "exif-before-pixels;alpha-on-white;gray16-upper-byte;rgb"

# Pillow's name of a format -> the extension of its files in the store. MPO is a JPEG with further pictures
# appended (phones write them); its first picture is the photograph.
_EXTENSION: Final[dict[str, ImageFormat]] = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "jpg",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
}
_ALL_FORMATS: Final[tuple[ImageFormat, ...]] = ("png", "jpg", "webp", "gif", "bmp", "tiff")
_PILLOW_NAMES: Final = tuple(name for name in _EXTENSION if name != "MPO")

# Bytes behind the last cell of a decoded JPEG, so that four bytes can be read from each colour of the last pixel.
_SPARE: Final = 4
_EXIF_ORIENTATION: Final = 0x0112
_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may be at most; checked before it is decoded."""

    max_bytes: int = 32 * 1024 * 1024
    """Size of the file, in bytes."""
    max_pixels: int = 64_000_000
    """Width times height."""
    max_side: int = 16_384
    """The longer side, in pixels."""
    formats: tuple[ImageFormat, ...] = field(default=_ALL_FORMATS)
    """Formats that are accepted, by the extension of their files in the store."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the first bytes of an image tell."""

    format: ImageFormat
    width: int
    """Pixels, after the EXIF orientation is applied."""
    height: int
    """Pixels, after the EXIF orientation is applied."""


def read_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Format and upright size of an encoded image, from its header alone.

    Args:
        data: The encoded image, or at least its beginning up to the pixel data.
        limits: What is accepted.

    Raises:
        ImageError: Not a still image of an accepted format, or over a limit.
    """
    with _pillow_errors_as_image_errors():
        image = _open(data, limits)
        return _header(image)


def decode_rgb(data: bytes, limits: ImageLimits) -> NDArray[np.uint8]:
    """Pixels of an encoded image, uint8 of shape `(height, width, 3)`, by the rules in this module's docstring.

    Raises:
        ImageError: Not a still image of an accepted format, over a limit, truncated, or not decodable.
    """
    with _pillow_errors_as_image_errors():
        image = _open(data, limits)
        header = _header(image)
        orientation = _orientation(image)
        if orientation == 1 and (fast := _decode_jpeg(image, data)) is not None:
            return fast
        image.load()
        rgb = _to_rgb(image)
        # Pillow turns TIFF files upright by itself when it loads them.
        if rgb.size != (header.width, header.height) or (orientation != 1 and image.format != "TIFF"):
            rgb = rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb
        pixels = np.asarray(rgb)
    if pixels.shape != (header.height, header.width, 3):
        raise ImageError(
            f"image decodes to {pixels.shape[1]}x{pixels.shape[0]}, its header says {header.width}x{header.height}"
        )
    return pixels


def _decode_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """Pixels of a plain JPEG without the detour through Pillow's memory; None where Pillow must decide.

    simplejpeg calls the same libjpeg-turbo with the same settings (exact DCT, smooth upsampling), so the pixels are the
    same; what it warns about (`strict`), such as a truncated file, is left to Pillow. A pixel takes a cell of four
    bytes, of which the result shows three: `color_planes` and `to_pillow` are faster on cells.
    """
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return None
    width, height = image.size
    cells = np.empty(width * height * 4 + _SPARE, dtype=np.uint8)[:-_SPARE].reshape(height, width, 4)
    try:
        decoded = simplejpeg.decode_jpeg(data, colorspace="RGBX", strict=True, buffer=cells)
    except ValueError:
        return None
    return cells[:, :, :3] if decoded.shape == cells.shape else None


def color_planes(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Red, green and blue of decoded pixels, uint8 `(height, width)` each, C-contiguous.

    One at a time: whoever takes them apart finds each still in the processor's cache.
    """
    height, width, _ = pixels.shape
    block = _cells(pixels)
    for channel in range(3):
        if block is None:
            yield np.ascontiguousarray(pixels[:, :, channel])
        else:
            # Read four bytes from where the colour stands and keep the lowest: twice as fast as every fourth byte.
            yield np.ndarray((height, width), "<u4", block, offset=channel).astype(np.uint8)


def to_pillow(pixels: NDArray[np.uint8]) -> Image.Image:
    """Decoded pixels as a Pillow image."""
    if (block := _cells(pixels)) is None:
        return Image.fromarray(pixels)
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), block[:-_SPARE], "raw", "RGBX")


def _cells(pixels: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The block of four-byte cells whose first three bytes these pixels are; None if they lie otherwise."""
    height, width, _ = pixels.shape
    block = pixels.base
    whole = isinstance(block, np.ndarray) and block.nbytes == width * height * 4 + _SPARE
    return block if whole and pixels.strides == (4 * width, 4, 1) else None


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    if len(data) > limits.max_bytes:
        raise ImageError(f"image has {len(data)} bytes, at most {limits.max_bytes} are accepted")
    if not data:
        raise ImageError("image is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=_PILLOW_NAMES)
    extension = _EXTENSION[image.format or ""]
    if extension not in limits.formats:
        raise ImageError(f"image format {extension!r} is not accepted, expected one of {list(limits.formats)}")
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"image size {width}x{height} is empty")
    if max(width, height) > limits.max_side:
        raise ImageError(f"image is {width}x{height}, no side may exceed {limits.max_side} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(f"image is {width}x{height}, at most {limits.max_pixels} pixels are accepted")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageError(f"image is animated ({getattr(image, 'n_frames', 'several')} frames), expected a still image")
    return image


def _header(image: Image.Image) -> ImageHeader:
    width, height = image.size
    # For TIFF Pillow reports the upright size already.
    if image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8):
        width, height = height, width
    return ImageHeader(format=_EXTENSION[image.format or ""], width=width, height=height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 from what stands before the pixel data; 1 (upright) where there is none."""
    raw = image.info.get("exif")
    if not isinstance(raw, bytes):
        return 1
    exif = Image.Exif()
    exif.load(raw)
    value = exif.get(_EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        gray = np.asarray(image)
        if gray.size and (int(gray.min()) < 0 or int(gray.max()) > 0xFFFF):
            raise ImageError("image has 32-bit samples, expected 8 or 16 bits a channel")
        return Image.fromarray((gray.astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("image has floating-point samples, expected 8 or 16 bits a channel")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        if image.mode in ("La", "RGBa"):  # premultiplied alpha
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        canvas.alpha_composite(rgba)
        return canvas.convert("RGB")
    return image.convert("RGB")


@contextmanager
def _pillow_errors_as_image_errors() -> Iterator[None]:
    """Pillow's decoders raise a dozen exception types on hostile bytes; outside of here there is one."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f"not a decodable image ({type(error).__name__})") from error
