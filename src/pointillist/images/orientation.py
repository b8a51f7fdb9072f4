"""Which way a picture is up: the EXIF orientation, wherever in its file it stands, without decoding pixels.

The rules are those of Pillow's `ImageOps.exif_transpose`: an EXIF block, else ImageMagick's `Raw profile type exif`,
else `tiff:Orientation` in XMP. A block that is garbage counts as none.
"""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Final

from PIL import Image, PngImagePlugin

UPRIGHT: Final = 1
TURNED: Final = frozenset({5, 6, 7, 8})
"""Orientations that exchange width and height."""

_TAG: Final = 0x0112
_SOURCES: Final = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Entries of Pillow's `info` that an orientation can stand in."""

_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA: Final = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})


def orientation_of_file(image: Image.Image, data: bytes) -> int:
    """Orientation 1..8 of an opened, not yet loaded file; 1 (upright) where there is none.

    Args:
        image: As Pillow opened it.
        data: The whole file: PNG may have its EXIF block behind the pixels.
    """
    if image.format == "TIFF":
        return UPRIGHT  # Pillow reports the upright size, and turns the pixels when it loads them.
    info = image.info
    if image.format == "PNG" and (late := _behind_pixels(data)):
        info = {**info, **_png_info(late)}
    return _orientation_in(info)


def orientation_of_pillow(image: Image.Image) -> int:
    """Orientation 1..8 of a loaded Pillow image; 1 (upright) where there is none."""
    return UPRIGHT if image.format == "TIFF" else _orientation_in(image.info)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned as its orientation says."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _orientation_in(info: Mapping[str | tuple[int, int], object]) -> int:
    if not any(name in info for name in _SOURCES):
        return UPRIGHT
    carrier = Image.new("1", (1, 1))
    carrier.info = {name: info[name] for name in _SOURCES if name in info}
    try:
        value = carrier.getexif().get(_TAG, UPRIGHT)
    except Exception:  # Pillow raises a dozen types on garbage
        return UPRIGHT
    return value if isinstance(value, int) and value in _TRANSPOSE else UPRIGHT


def _behind_pixels(png: bytes) -> list[bytes]:
    """Chunks with metadata that follow a PNG's pixels, with checksums of their own."""
    found = []
    position, pixels = 8, False
    while position + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        if kind == b"IEND":
            break
        pixels = pixels or kind == b"IDAT"
        if pixels and kind in _METADATA and position + 8 + length <= len(png):
            found.append(_chunk(kind, png[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def _png_info(chunks: list[bytes]) -> dict[str | tuple[int, int], object]:
    """What Pillow reads from chunks of metadata: they are put before the pixels of a PNG of one pixel."""
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    tail = _chunk(b"IDAT", zlib.compress(b"\0\0")) + _chunk(b"IEND", b"")
    try:
        return PngImagePlugin.PngImageFile(io.BytesIO(head + b"".join(chunks) + tail)).info
    except Exception:  # as for a garbage block
        return {}


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
