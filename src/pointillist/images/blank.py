"""Control runs: the same picture without a picture in it."""

import io

from PIL import Image

from pointillist.images.decode import ImageLimits, read_header

_GREY = (128, 128, 128)


def blank_image(data: bytes) -> bytes:
    """A grey PNG of the same upright size; a policy that still scores does not look.

    Raises:
        ImageError: The bytes are not an image.
    """
    header = read_header(data, ImageLimits())
    buffer = io.BytesIO()
    Image.new("RGB", (header.width, header.height), _GREY).save(buffer, format="PNG")
    return buffer.getvalue()
