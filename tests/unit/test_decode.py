import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pointillist.errors import ImageError
from pointillist.images import ImageLimits, decode_rgb, read_header
from pointillist.images.blank import blank_image
from pointillist.images.decode import color_planes, to_pillow
from tests.conftest import encoded, picture

LIMITS = ImageLimits()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_known_from_the_header(file_format: str, orientation: int) -> None:
    image = picture(12, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(image, file_format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    header = read_header(data, LIMITS)
    pixels = decode_rgb(data, LIMITS)
    assert (header.height, header.width) == pixels.shape[:2]
    np.testing.assert_array_equal(pixels, expected)


def test_alpha_is_composited_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    np.testing.assert_array_equal(decode_rgb(encoded(image), LIMITS), [[[255, 0, 0], [255, 255, 255]]])


def test_palette_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode_rgb(encoded(image, transparency=1), LIMITS), [[[10, 20, 30], [255, 255, 255]]])


def test_sixteen_bit_gray_keeps_its_upper_byte() -> None:
    image = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16))
    np.testing.assert_array_equal(decode_rgb(encoded(image), LIMITS)[0, :, 0], [0, 0x12, 0xFF])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = picture(5, 4).convert(mode)
    data = encoded(image, "TIFF")
    assert decode_rgb(data, LIMITS).shape == (4, 5, 3)


def test_animated_images_are_refused() -> None:
    frames = [picture(4, 4, seed) for seed in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="animated"):
        read_header(data, LIMITS)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_refused(file_format: str) -> None:
    data = encoded(picture(64, 64), file_format)
    with pytest.raises(ImageError):
        decode_rgb(data[: len(data) * 2 // 3], LIMITS)


def test_limits_are_checked_on_the_header() -> None:
    # A PNG header that claims 60,000 x 60,000 pixels, and nothing behind it.
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + b"\0\0\0\0"
    with pytest.raises(ImageError):
        decode_rgb(bomb, LIMITS)
    data = encoded(picture(20, 10))
    for limits, message in (
        (ImageLimits(max_bytes=10), "bytes"),
        (ImageLimits(max_pixels=199), "pixels"),
        (ImageLimits(max_side=19), "side"),
        (ImageLimits(formats=("jpg",)), "format"),
    ):
        with pytest.raises(ImageError, match=message):
            read_header(data, limits)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
def test_damaged_bytes_never_raise_anything_else(noise: bytes, file_format: str, draw: st.DataObject) -> None:
    data = bytearray(encoded(picture(16, 16), file_format))
    position = draw.draw(st.integers(0, len(data)))
    data[position : position + len(noise)] = noise
    for read in (read_header, decode_rgb):
        with contextlib.suppress(ImageError):
            read(bytes(data), LIMITS)


def test_blank_image_keeps_the_size() -> None:
    pixels = decode_rgb(blank_image(encoded(picture(30, 20)), LIMITS), LIMITS)
    assert pixels.shape == (20, 30, 3)
    assert len(np.unique(pixels)) == 1
    with pytest.raises(ImageError):
        blank_image(b"no image", LIMITS)


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    options=st.fixed_dictionaries({
        "quality": st.integers(1, 100), "subsampling": st.sampled_from([0, 1, 2]), "progressive": st.booleans(),
        "optimize": st.booleans(), "restart_marker_rows": st.sampled_from([0, 1]),
    }),
    mode=st.sampled_from(["RGB", "L", "CMYK", "YCbCr"]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_jpegs_decode_to_pillows_pixels(size: tuple[int, int], options: dict, mode: str, seed: int) -> None:
    smooth = picture(8, 8, seed).resize(size, Image.Resampling.BICUBIC)
    data = encoded(smooth.convert(mode), "JPEG", **options)
    expected, ours = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), decode_rgb(data, LIMITS)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(np.stack(list(color_planes(ours)), axis=-1), expected)
    np.testing.assert_array_equal(np.asarray(to_pillow(ours)), expected)


@given(seed=st.integers(0, 2**31), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4))
@settings(max_examples=500, deadline=None)
def test_damaged_jpegs_decode_as_pillow_decodes_them_or_not_at_all(seed: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(picture(8, 8, seed % 100).resize((48, 40)), "JPEG", progressive=seed % 2 == 0))
    for place, value in flips:
        data[place % len(data)] ^= value
    try:
        ours = decode_rgb(bytes(data), LIMITS)
    except ImageError:
        return
    with Image.open(io.BytesIO(bytes(data))) as image:
        if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1:
            np.testing.assert_array_equal(ours, np.asarray(image))
