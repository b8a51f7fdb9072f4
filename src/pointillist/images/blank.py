"""Control runs: the same picture without a picture in it."""

import io
import struct

from PIL import Image

from pointillist.errors import ImageError

_GREY = (128, 128, 128)


def blank_image(data: bytes) -> bytes:
    """A grey PNG of the same stored size; a policy that still scores does not look.

    Raises:
        ImageError: The bytes are not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ImageError(f"not a decodable image ({type(error).__name__})") from None
    buffer = io.BytesIO()
    Image.new("RGB", size, _GREY).save(buffer, format="PNG")
    return buffer.getvalue()
