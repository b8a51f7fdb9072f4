"""Small versions of stored pictures, made when they are first looked at and kept in the cache folder.

Named by the picture's hash, so all runs share them. One at a time is made, and none of a picture of more pixels than
the viewer has memory for.
"""

import io
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from PIL import Image

from pointillist.base.files import write_atomically
from pointillist.base.image_limits import ImageLimits
from pointillist.images.decode import decode_rgb, to_pillow
from pointillist.images.store import read_intact

SIZES: Final = (96, 640)
"""Longest sides that are offered: in a list, and in a conversation."""
_MAX_PIXELS: Final = 16_000_000
"""Of a picture that is decoded for a small version, whatever the run accepts: the viewer's memory is bounded."""
_SEEN: Final = 192
_making = threading.Lock()


def thumbnail(root: Path, name: str, limits: ImageLimits, size: int, cache: Path) -> bytes:
    """A stored picture as PNG, no side longer than `size`.

    Args:
        root: Root of the store.
        name: Name of the picture, as `STORED_NAME` has it.
        limits: Limits on a picture of the run.
        size: Longest side of the small version, one of `SIZES`.
        cache: Folder of thumbnails.

    Raises:
        MissingImageError: It is not in the store.
        RefError: A link, or no regular file; a `CorruptImageError` if its bytes are not what its name says.
        ImageError: It cannot be decoded, or has too many pixels for this.
    """
    data, sha256 = read_intact(root, name, limits), Path(name).stem
    kept = cache / sha256[:2] / f"{sha256}-{size}.png"
    with suppress(OSError):
        return kept.read_bytes()
    with _making:
        small = encode_png(shrunk(data, limits, size))
    with suppress(OSError):  # a full disk costs only the keeping
        write_atomically(kept, small)
    return small


def shrunk(data: bytes, limits: ImageLimits, size: int) -> Image.Image:
    """A decoded picture, no side longer than `size`; a tiny one is enlarged by a whole factor, to be seen at all.

    Raises:
        ImageError: It cannot be decoded, or has too many pixels for this.
    """
    image = to_pillow(decode_rgb(data, replace(limits, max_pixels=_MAX_PIXELS)))
    factor = min(size, _SEEN) // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def encode_png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
