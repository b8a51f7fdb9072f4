"""Control runs: the same picture without a picture in it."""

import io

from PIL import Image

from pointillist.base.image_limits import STORED_LIMITS, ImageLimits
from pointillist.images.decode import read_header

_GREY = (128, 128, 128)


def blank_image(data: bytes, limits: ImageLimits = STORED_LIMITS) -> bytes:
    """A grey PNG of the same upright size; a policy that still scores does not look.

    Args:
        data: An encoded image.
        limits: What it may be at most; the run's.

    Raises:
        ImageError: The bytes are not an image, or one over a limit.
    """
    header = read_header(data, limits)
    buffer = io.BytesIO()
    Image.new("RGB", (header.width, header.height), _GREY).save(buffer, format="PNG")
    return buffer.getvalue()
