"""From untrusted bytes to a header, and from a header to RGB pixels: the same way in every process.

Two questions are asked of an image file. `read_header` answers "how large is it, seen upright?" without decoding a
pixel; that is all the environment side ever needs. `decode_rgb` gives the pixels, normalised by one fixed set of rules
(`PIXEL_RULES`, part of every layout fingerprint):

- the EXIF orientation is applied, wherever in the file it stands (`images/orientation.py`);
- alpha is composited on white, palettes are resolved, CMYK, YCbCr and LAB go through Pillow's conversion;
- grey of more than 8 bits keeps the upper eight of the bits that the file says it has, white-is-zero is inverted;
  signed, 32-bit and floating-point samples, whose range no file tells, are refused;
- the result is RGB, uint8, height x width x 3.

Every limit is checked on the header, before a pixel is decoded; whatever Pillow raises becomes an `ImageError`.
"""

import importlib.util
import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from pointillist.base.image_limits import ImageFormat, ImageLimits
from pointillist.errors import ImageError
from pointillist.images.orientation import EXCHANGE_SIDES, turn_of
from pointillist.images.sniff import describe, format_of
from pointillist.images.structure import check_structure

PIXEL_RULES: Final = "exif-anywhere;alpha-on-white;deep-grey-upper-byte-of-its-bits;rgb"

# The readers are called by name, not through `Image.open`: its guard against large pictures is one number for the whole
# process, and a run's own limits replace it.
_READERS: Final[dict[ImageFormat, Callable[[io.BytesIO, str], Image.Image]]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpg": JpegImagePlugin.jpeg_factory,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}
# Several pictures in one file whose first is the photograph: MPO is a JPEG with further ones appended, as phones write
# it; HEIC opens at its primary picture.
_FIRST_COUNTS: Final = ("MPO", "HEIF")
_MISSING_READER: Final[dict[ImageFormat, str]] = {
    "heic": "reading HEIC needs pillow-heif, in every process of the run: pip install '.[heic]'",
    "avif": "this build of Pillow reads no AVIF: install the wheel from PyPI",
    "webp": "this build of Pillow reads no WebP: install the wheel from PyPI",
}

# Bytes behind the last cell of a decoded JPEG, so that four bytes can be read from each colour of the last pixel.
_SPARE: Final = 4
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_UNSIGNED: Final = frozenset({1, 4})
"""TIFF's sample formats that are unsigned integers: said to be, or not said."""

_LEVELS_OF_A_PICTURE: Final = 16
"""Brightest minus darkest level, of 256, from which on a colour is not called nearly constant."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the first bytes of an image tell."""

    format: ImageFormat
    width: int
    """Pixels, after the EXIF orientation is applied."""
    height: int
    """Pixels, after the EXIF orientation is applied."""


def read_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Format and upright size of an encoded image, without decoding a pixel.

    Args:
        data: The encoded image, whole: PNG may tell only at its end which way it is up.
        limits: What is accepted.

    Raises:
        ImageError: Not a still image of an accepted format, or over a limit.
    """
    return OpenedImage(data, limits).header


def decode_rgb(data: bytes, limits: ImageLimits) -> NDArray[np.uint8]:
    """Pixels of an encoded image, uint8 of shape `(height, width, 3)`, by the rules in this module's docstring.

    Raises:
        ImageError: Not a still image of an accepted format, over a limit, truncated, or not decodable.
    """
    return OpenedImage(data, limits).decode()


class OpenedImage:
    """An encoded image whose header is read and checked; its pixels may follow without a second look at the header."""

    def __init__(self, data: bytes, limits: ImageLimits) -> None:
        """Reads the header.

        Raises:
            ImageError: As `read_header`.
        """
        self._data = data
        try:
            if len(data) > limits.max_bytes:
                raise ImageError(f"image has {len(data)} bytes, at most {limits.max_bytes} are accepted")
            name = format_of(data)
            if name is None:
                raise ImageError(f"expected an image ({', '.join(limits.formats)}), got {describe(data)}")
            if name not in limits.formats:
                raise ImageError(f"image format {name!r} is not accepted, expected one of {list(limits.formats)}")
            late = check_structure(name, data)
            image = _reader(name)(io.BytesIO(data), "")
            width, height = image.size
            _check_size(width, height, limits)
            if image.format not in _FIRST_COUNTS and getattr(image, "is_animated", False):
                if image.format == "TIFF":
                    raise ImageError("image has several pages, expected one")
                raise ImageError("image is animated, expected a still image")
            _check_samples(image)
            if name == "png" and "transparency" in image.info:
                _scale_transparent_level(image, bits=data[24])
            self._turn = turn_of(image, late)
        except Exception as error:
            _raise_as_image_error(error, data)
        if self._turn in EXCHANGE_SIDES:
            width, height = height, width
        self._image, self.header = image, ImageHeader(format=name, width=width, height=height)

    def decode(self) -> NDArray[np.uint8]:
        """The pixels; once.

        Raises:
            ImageError: As `decode_rgb`.
        """
        header, image, turn = self.header, self._image, self._turn
        try:
            if header.format == "jpg" and turn is None and (fast := _decode_jpeg(image, self._data)) is not None:
                return fast
            image.load()
            rgb = _to_rgb(image)
            pixels = np.asarray(rgb if turn is None else rgb.transpose(turn))
        except Exception as error:
            _raise_as_image_error(error, self._data)
        if pixels.shape != (header.height, header.width, 3):
            raise ImageError(
                f"image decodes to {pixels.shape[1]}x{pixels.shape[0]}, its header says {header.width}x{header.height}"
            )
        return pixels


def encode_pillow(image: Image.Image, limits: ImageLimits) -> bytes:
    """A Pillow image as a PNG file, upright and with the pixels that its own file would decode to.

    Raises:
        ImageError: Over a limit, truncated, or samples that `decode_rgb` would refuse.
    """
    width, height = image.size
    _check_size(width, height, limits)
    try:
        _check_samples(image)
        image.load()
        # One channel suffices for what is grey: a PNG of a third of the size.
        plain = image.mode in ("1", "L") and "transparency" not in image.info
        turn, upright = turn_of(image), image if plain else _to_rgb(image)
        if turn is not None:
            upright = upright.transpose(turn)
        buffer = io.BytesIO()
        # By its own name: what the image's `info` holds (profiles, EXIF) would be written, too.
        bare = Image.frombytes(upright.mode, upright.size, upright.tobytes())
        bare.save(buffer, format="PNG")
    except Exception as error:
        _raise_as_image_error(error, None)
    return buffer.getvalue()


def is_nearly_constant(pixels: NDArray[np.uint8]) -> bool:
    """Whether each colour of an image, uint8 `(height, width, 3)`, hardly changes over it: it shows (nearly) nothing.

    Most pictures are told by some thousand of their pixels.
    """
    height, width, _ = pixels.shape
    sample = pixels[:: max(1, height // 48), :: max(1, width // 48)]
    if (np.ptp(sample, axis=(0, 1)) >= _LEVELS_OF_A_PICTURE).any():
        return False
    return all(np.ptp(plane) < _LEVELS_OF_A_PICTURE for plane in color_planes(pixels))


def _decode_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """Pixels of a plain JPEG without the detour through Pillow's memory; None where Pillow must decide.

    simplejpeg calls the same libjpeg-turbo with the same settings (exact DCT, smooth upsampling), so the pixels are the
    same; what it warns about (`strict`), such as a truncated file, is left to Pillow. A pixel takes a cell of four
    bytes, of which the result shows three: `color_planes` and `to_pillow` are faster on cells.
    """
    if image.mode != "RGB":
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


def _reader(name: ImageFormat) -> Callable[[io.BytesIO, str], Image.Image]:
    if name in ("avif", "webp") and not features.check(name):
        raise ImageError(f"image is {name.upper()}: {_MISSING_READER[name]}")
    if name != "heic":
        return _READERS[name]
    if importlib.util.find_spec("pillow_heif") is None:
        raise ImageError(f"image is HEIC: {_MISSING_READER['heic']}")
    from pillow_heif import HeifImageFile

    reader: Callable[[io.BytesIO, str], Image.Image] = HeifImageFile
    return reader


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"image size {width}x{height} is empty")
    if max(width, height) > limits.max_side:
        raise ImageError(f"image is {width}x{height}, no side may exceed {limits.max_side} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(f"image is {width}x{height}, at most {limits.max_pixels} pixels are accepted")


def _check_samples(image: Image.Image) -> None:
    """Refuses samples whose black and white no file tells."""
    if image.mode == "F":
        raise ImageError("image has floating-point samples, expected unsigned ones of at most 16 bits a channel")
    if image.mode == "I" or (
        image.format == "TIFF" and not _UNSIGNED.issuperset(_tiff_values(image, _SAMPLE_FORMAT, 1))
    ):
        raise ImageError("image has signed or 32-bit samples, expected unsigned ones of at most 16 bits a channel")


def _scale_transparent_level(image: Image.Image, bits: int) -> None:
    """Brings the one transparent level of a PNG, which counts in the file's bits, to the 8 that Pillow decodes to."""
    level = image.info.get("transparency")
    if isinstance(level, int) and image.mode == "L" and bits < 8:
        image.info["transparency"] = level * 255 // (2**bits - 1)
    elif isinstance(level, tuple) and bits == 16:
        image.info["transparency"] = tuple(each >> 8 for each in level)


def _tiff_values(image: Image.Image, tag: int, default: int) -> tuple[Any, ...]:
    """Values of a TIFF's tag; the default's for a file without it, and for other formats."""
    tags = getattr(image, "tag_v2", None)
    values = default if tags is None else tags.get(tag, default)
    return values if isinstance(values, tuple) else (values,)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_upper_byte(image)).convert("RGB")
    if image.has_transparency_data:
        if image.mode in ("La", "RGBa"):  # premultiplied alpha
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        canvas.alpha_composite(rgba)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _upper_byte(image: Image.Image) -> NDArray[np.uint8]:
    """Grey of 9 to 16 bits as 8 bits, black as zero, a transparent level as white."""
    grey = np.asarray(image).astype(np.uint16)
    bits = max(8, min(16, int(_tiff_values(image, _BITS_PER_SAMPLE, 16)[0])))
    eight = (grey >> (bits - 8)).astype(np.uint8)
    if _tiff_values(image, _PHOTOMETRIC, 1)[0] == 0:  # white is zero; Pillow inverts only 8 bits
        eight = 255 - eight
    if isinstance(level := image.info.get("transparency"), int):
        eight[grey == level] = 255
    return eight


def _raise_as_image_error(error: Exception, data: bytes | None) -> NoReturn:
    """Pillow's decoders raise a dozen exception types on hostile bytes; outside of here there is one.

    Args:
        error: What was raised; `ImageError` and `MemoryError` are raised again as they are.
        data: The encoded image, where there is one: its form may tell what is wrong.
    """
    if isinstance(error, ImageError | MemoryError):
        raise error
    if _is_truncated(data, error):
        raise ImageError("image is truncated: its file ends before its pixels do") from error
    raise ImageError(f"image cannot be decoded ({type(error).__name__}: {str(error)[:120]})") from error


def _is_truncated(data: bytes | None, error: Exception) -> bool:
    """Whether an error comes from a file that ends too early, as its form says; of TIFF and AVIF Pillow's text may."""
    if isinstance(error, EOFError | struct.error | IndexError):
        return True
    if data is None:
        return False
    match format_of(data):
        case "png":
            return b"IEND" not in data[-64:]
        case "webp":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "bmp":
            return int.from_bytes(data[2:6], "little") > len(data)
        case "gif":
            return b"\x3b" not in data[-16:]
        case "jpg":
            return b"\xff\xd9" not in data
        case _:
            return False
