"""Bytes: the content-addressed store, the hardened decoder, and message parts turned into stored files."""

from pointillist.base.image_limits import ImageLimits
from pointillist.images.decode import ImageHeader, decode_rgb, read_header
from pointillist.images.sources import Sources, normalize_images
from pointillist.images.store import ImageStore, StoredImage, read_verified

__all__ = [
    "ImageHeader",
    "ImageLimits",
    "ImageStore",
    "Sources",
    "StoredImage",
    "decode_rgb",
    "normalize_images",
    "read_header",
    "read_verified",
]
