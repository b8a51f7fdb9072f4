"""Which way a picture is up: the EXIF orientation, wherever in its file it stands, without decoding pixels.

The rules are those of Pillow's `ImageOps.exif_transpose`: an EXIF block, else ImageMagick's `Raw profile type exif`,
else `tiff:Orientation` in XMP. A block that is garbage counts as none.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Final

from PIL import Image, PngImagePlugin

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
EXCHANGE_SIDES: Final = frozenset(_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8))
"""Turns that exchange width and height."""


def turn_of(image: Image.Image, late: Sequence[tuple[bytes, bytes]] = ()) -> Image.Transpose | None:
    """The turn that brings an image upright; None where it is.

    Args:
        image: As Pillow opened or loaded it.
        late: Type and body of a PNG's chunks of metadata that Pillow has not read yet (`check_structure`).
    """
    if image.format == "TIFF":
        return None  # Pillow reports the upright size, and turns the pixels when it loads them.
    info = {**image.info, **_png_info(late)} if late else image.info
    if not any(name in info for name in _SOURCES):
        return None
    carrier = Image.new("1", (1, 1))
    carrier.info = {name: info[name] for name in _SOURCES if name in info}
    try:
        value = carrier.getexif().get(_TAG)
    except Exception:  # Pillow raises a dozen types on garbage
        return None
    return _TRANSPOSE.get(value) if isinstance(value, int) else None


def _png_info(chunks: Sequence[tuple[bytes, bytes]]) -> dict[str | tuple[int, int], object]:
    """What Pillow reads from chunks of metadata: they are put before the pixels of a PNG of one pixel."""
    one_pixel = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0\0"))
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (one_pixel[0], *chunks, one_pixel[1], (b"IEND", b""))
    )
    try:
        return PngImagePlugin.PngImageFile(io.BytesIO(file)).info
    except Exception:  # as for a garbage block
        return {}
