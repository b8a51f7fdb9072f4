"""Refuses files that consist of millions of tiny pieces, before Pillow walks through them one by one.

A picture's file of 32 MB can be millions of empty chunks or markers around eight pixels; it decodes to a good picture
after ten seconds of Python. Real files have pieces of hundreds of bytes. The walks here stop at the bound.
"""

import struct
from typing import Final

from pointillist.base.image_limits import ImageFormat
from pointillist.errors import ImageError

_PIECES: Final = 10_000
_BYTES_A_PIECE: Final = 128
"""A file may have `_PIECES`, and one more for each of these bytes."""

_METADATA: Final = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})
"""PNG's chunks that can say which way the picture is up."""
_BARE_MARKERS: Final = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
"""JPEG's markers without a length."""


def check_structure(name: ImageFormat, data: bytes) -> list[tuple[bytes, bytes]]:
    """Checks the number of pieces of a PNG, JPEG or GIF file; other formats are walked in C, or have few by design.

    Returns:
        Type and body of the chunks with metadata that follow a PNG's pixels: Pillow reads them only with the pixels.

    Raises:
        ImageError: It has too many.
    """
    pieces, most = 0, _PIECES + len(data) // _BYTES_A_PIECE
    late: list[tuple[bytes, bytes]] = []
    match name:
        case "png":
            pieces, late = _png_pieces(data, most)
        case "jpg":
            pieces = _jpeg_pieces(data, most)
        case "gif":
            pieces = _gif_pieces(data, most)
    if pieces > most:
        raise ImageError(f"image consists of more than {most} pieces, as no program writes it")
    return late


def _png_pieces(data: bytes, most: int) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Number of chunks; and those with metadata between the pixels and the end of the picture."""
    position, pieces, late = 8, 0, []
    pixels = ended = False
    while position + 8 <= len(data) and pieces <= most:
        length, kind = struct.unpack_from(">I4s", data, position)
        pixels, ended = pixels or kind == b"IDAT", ended or kind == b"IEND"
        whole = position + max(12, 8 + length) <= len(data)
        if pixels and not ended and whole and kind in _METADATA:
            late.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
        pieces += 1
    return pieces, late


def _jpeg_pieces(data: bytes, most: int) -> int:
    """Markers and fill bytes before the first scan."""
    position, pieces = 2, 0
    while position + 4 <= len(data) and pieces <= most:
        pieces += 1
        if data[position] != 0xFF or data[position + 1] == 0xFF:
            position += 1
        elif data[position + 1] in _BARE_MARKERS:
            position += 2
        elif data[position + 1] in (0xD9, 0xDA):  # the end, or the pixels
            break
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return pieces


def _gif_pieces(data: bytes, most: int) -> int:
    """Blocks, their sub-blocks, and bytes between blocks."""
    flags = data[10] if len(data) > 10 else 0
    position, pieces = 13 + _colour_table(flags), 0
    while position < len(data) and pieces <= most:
        pieces += 1
        kind = data[position]
        if kind == 0x3B:
            break
        if kind == 0x2C and position + 10 <= len(data):
            position += 11 + _colour_table(data[position + 9])
        elif kind == 0x21:
            position += 2
        else:
            position += 1
            continue
        while position < len(data) and data[position] and pieces <= most:
            position += 1 + data[position]
            pieces += 1
        position += 1
    return pieces


def _colour_table(flags: int) -> int:
    return 3 * 2 ** (1 + (flags & 7)) if flags & 0x80 else 0
