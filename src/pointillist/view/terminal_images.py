"""Pictures in a terminal: the protocols of kitty and of sixel, or two coloured pixels a character."""

import base64
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

from pointillist.view.thumbnails import encode_png

_CHUNK: Final = 4096
_COLOURS: Final = 64
_BAND: Final = 6
"""Rows of pixels in one row of sixels."""


def kitty(image: Image.Image) -> str:
    """The escape sequences of kitty's graphics protocol: a PNG in chunks."""
    data = base64.b64encode(encode_png(image)).decode()
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    parts = []
    for index, chunk in enumerate(chunks):
        more = int(index < len(chunks) - 1)
        control = f"a=T,f=100,m={more}" if index == 0 else f"m={more}"
        parts.append(f"\x1b_G{control};{chunk}\x1b\\")
    return "".join(parts)


def sixel(image: Image.Image) -> str:
    """The escape sequence of a sixel picture, in 64 colours chosen for it."""
    paletted = image.quantize(_COLOURS)
    palette = (paletted.getpalette() or [])[: 3 * _COLOURS]
    pixels: NDArray[np.uint8] = np.asarray(paletted)
    height, width = pixels.shape
    parts = [f'\x1bPq"1;1;{width};{height}']
    for index in range(len(palette) // 3):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * index : 3 * index + 3])
        parts.append(f"#{index};2;{red};{green};{blue}")
    for top in range(0, height, _BAND):
        band = pixels[top : top + _BAND]
        parts += [f"#{colour}{_sixels(band == colour)}$" for colour in np.unique(band)]
        parts.append("-")
    return "".join(parts) + "\x1b\\"


def half_blocks(image: Image.Image, columns: int) -> Text:
    """The picture as characters that are two pixels high: the upper one is the ink, the lower one the paper."""
    width = min(columns, image.width)
    height = max(2, round(image.height * width / image.width / 2) * 2)
    pixels = np.asarray(image.resize((width, height)).convert("RGB"))
    text = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for ink, paper in zip(upper, lower, strict=True):
            text.append("\u2580", Style(color=Color.from_rgb(*ink), bgcolor=Color.from_rgb(*paper)))
        text.append("\n")
    return text


def _sixels(mask: NDArray[np.bool_]) -> str:
    """One colour's pixels in a band: a character a column, runs of the same as `!<count>`."""
    bits = (mask * (1 << np.arange(len(mask)))[:, None]).sum(axis=0) + 63
    ends = [*np.flatnonzero(np.diff(bits)), len(bits) - 1]
    parts, start = [], 0
    for end in ends:
        count, character = int(end) + 1 - start, chr(int(bits[end]))
        parts.append(f"!{count}{character}" if count > 3 else character * count)
        start = int(end) + 1
    return "".join(parts)
