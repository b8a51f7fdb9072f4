"""What a file is, by its first bytes: the format of a picture, or a name for what came in its place.

Only the bytes decide, never a name or a media type that a sender gives.
"""

import re
from typing import Final

from pointillist.base.image_limits import ImageFormat

_HEAD: Final = 4096
"""Bytes that are looked at."""

_FORMATS: Final[tuple[tuple[bytes, ImageFormat], ...]] = (
    (rb"\x89PNG\r\n\x1a\n", "png"),
    (rb"\xff\xd8\xff", "jpg"),
    (rb"RIFF....WEBP", "webp"),
    (rb"GIF8[79]a", "gif"),
    (rb"BM", "bmp"),
    (rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0", "tiff"),
)
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})
_HEIC_BRANDS: Final = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})

_OTHERS: Final[tuple[tuple[bytes, str], ...]] = (
    (rb"version https://git-lfs\.github\.com/spec", "a Git LFS pointer, whose file was not fetched (git lfs pull)"),
    (rb"%PDF-", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\0\0[\x01\x02]\0", "a Windows icon or cursor"),
    (rb"\x76\x2f\x31\x01", "an OpenEXR picture"),
    (rb"\x93NUMPY", "a numpy file"),
    (rb"PAR1", "a Parquet file"),
    (rb"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (rb"RIFF....AVI ", "a video (AVI)"),
    (rb"RIFF....WAVE|ID3|OggS|fLaC", "a sound"),
    (rb"\0\0\x01[\xb3\xba]|FLV", "a video"),
    (rb"PK\x03\x04|PK\x05\x06", "a ZIP archive"),
    (rb"\x1f\x8b", "gzip-compressed data"),
    (rb"P[1-7]\s", "a PNM picture"),
    (rb"data:", "the text of a data: URL"),
    # Base64 of PNG, JPEG, GIF and WebP begins like this.
    (rb"iVBORw0KGgo|/9j/|R0lGOD|UklGR", "base64 text, which was not decoded"),
)
_SVG: Final = re.compile(rb"<svg[\s>]", re.IGNORECASE)
_HTML: Final = re.compile(rb"<(?:!doctype\s+html|html|head|body|title|p|div|h1)[\s>]", re.IGNORECASE)


def format_of(data: bytes) -> ImageFormat | None:
    """The format whose signature these bytes have; None for anything else, pictures of other formats included."""
    for pattern, name in _FORMATS:
        if re.match(pattern, data, re.DOTALL):
            return name
    brands = _brands(data)
    if brands & _AVIF_BRANDS:
        return "avif"
    return "heic" if brands & _HEIC_BRANDS else None


def describe(data: bytes) -> str:
    """What these bytes are, for an error's text; it never repeats any of them."""
    head = bytes(data[:_HEAD])
    if (name := format_of(head)) is not None:
        return f"a picture ({name})"
    for pattern, description in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return description
    if data[4:8] == b"ftyp":
        return "a HEIF picture of an unknown kind" if b"mif1" in _brands(head) else "a video (MP4 or QuickTime)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return "nothing but white space" if data else "an empty file"
    if text[:1] in (b"{", b"["):
        return "JSON"
    if _SVG.search(text):
        return "an SVG drawing"
    if text.startswith(b"<"):
        return "an HTML page" if _HTML.search(text) else "an XML document"
    if not head.strip(b"\0"):
        return "nothing but zeros"
    return "text" if _is_text(head) else "data of an unknown kind"


def _is_text(head: bytes) -> bool:
    if any(byte < 0x20 and byte not in b"\t\n\r\f" for byte in head):
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > _HEAD - 4  # a character that the end of the head cuts
    return True


def _brands(data: bytes) -> frozenset[bytes]:
    """Brands of a file of the ISO base media format (AVIF, HEIC, MP4); none for anything else."""
    if data[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(data[:4], "big"), len(data), _HEAD)
    return frozenset([data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))])
