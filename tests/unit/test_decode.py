import contextlib
import importlib.util
import io
import struct
import textwrap
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pointillist.errors import ImageError
from pointillist.images import ImageLimits, decode_rgb, read_header
from pointillist.images.blank import blank_image
from pointillist.images.decode import color_planes, is_nearly_constant, to_pillow
from pointillist.images.sniff import describe, format_of
from pointillist.images.structure import check_structure
from tests.helpers.pictures import encoded, picture

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


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_with(*chunks: bytes, behind: bool) -> bytes:
    """A PNG of 12x7 with these chunks before or behind its pixels."""
    data = encoded(picture(12, 7))
    place = data.rindex(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    return data[:place] + b"".join(chunks) + data[place:]


def _as_pillow_has_it(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


def _raw_profile(orientation: int) -> bytes:
    body = b"Exif\0\0" + _exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    text = f"\nexif\n{len(body):8d}\n" + "\n".join(textwrap.wrap(body.hex(), 72)) + "\n"
    return b"Raw profile type exif\0" + text.encode()


def _xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def _png_forms(orientation: int) -> dict[str, bytes]:
    plain = _exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    keyword, text = _raw_profile(orientation).split(b"\0", 1)
    return {
        "eXIf": _chunk(b"eXIf", plain),
        "tEXt": _chunk(b"tEXt", _raw_profile(orientation)),
        "zTXt": _chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text)),
        "XMP": _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _xmp(orientation)),
    }


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("form", ["eXIf", "tEXt", "zTXt", "XMP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_png_orientation_counts_wherever_it_stands(form: str, orientation: int, behind: bool) -> None:
    data = _png_with(_png_forms(orientation)[form], behind=behind)
    header, pixels = read_header(data, LIMITS), decode_rgb(data, LIMITS)
    assert (header.height, header.width) == pixels.shape[:2] == ((12, 7) if orientation > 4 else (7, 12))
    np.testing.assert_array_equal(pixels, _as_pillow_has_it(data))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["eXIf", "tEXt", "zTXt", "XMP"]), st.integers(0, 9), st.booleans()), max_size=4),
    st.binary(max_size=40),
    st.sampled_from([b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"prVt"]),
)
def test_header_and_pixels_agree_on_any_metadata(parts: list[tuple[str, int, bool]], noise: bytes, kind: bytes) -> None:
    before = [_png_forms(orientation)[form] for form, orientation, behind in parts if not behind]
    after = [_png_forms(orientation)[form] for form, orientation, behind in parts if behind]
    data = _png_with(*before, behind=False)
    place = data.rindex(b"IEND") - 4
    data = data[:place] + b"".join(after) + _chunk(kind, noise) + data[place:]
    try:
        pixels = decode_rgb(data, LIMITS)
    except ImageError:
        return
    header = read_header(data, LIMITS)
    assert (header.height, header.width) == pixels.shape[:2]


def test_xmp_orientation_of_a_jpeg() -> None:
    data = encoded(picture(12, 7), "JPEG", xmp=_xmp(6))
    assert decode_rgb(data, LIMITS).shape == (12, 7, 3)
    np.testing.assert_array_equal(decode_rgb(data, LIMITS), _as_pillow_has_it(data))


@pytest.mark.parametrize(
    "block", [b"no tiff header at all", b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40]
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_garbage_exif_block_counts_as_none(file_format: str, block: bytes) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    good = encoded(picture(12, 7), file_format, **options)
    data = encoded(picture(12, 7), file_format, exif=b"Exif\0\0" + block, **options)
    np.testing.assert_array_equal(decode_rgb(data, LIMITS), decode_rgb(good, LIMITS))
    assert (read_header(data, LIMITS).width, read_header(data, LIMITS).height) == (12, 7)


def _tiff(samples: np.ndarray, bits: int, *, white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """A little-endian grey TIFF of one strip, as the specification has it."""
    height, width = samples.shape
    if bits == 12:
        pairs = samples.reshape(-1, 2).astype(np.uint32)
        strip = bytes(
            byte for left, right in pairs.tolist() for byte in (left >> 4, (left & 15) << 4 | right >> 8, right & 255)
        )
    else:
        strip = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(strip)), (339, 3, sample_format),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + b"\0\0\0\0"


RAMP = np.linspace(0, 1, 96 * 64).reshape(64, 96)


@pytest.mark.parametrize(
    ("bits", "dtype", "white_is_zero"),
    [(8, np.uint8, False), (8, np.uint8, True), (12, np.uint16, False), (16, np.uint16, False), (16, np.uint16, True)],
)
def test_deep_grey_has_the_right_brightness(bits: int, dtype: type, white_is_zero: bool) -> None:
    levels = np.round((1 - RAMP if white_is_zero else RAMP) * (2**bits - 1)).astype(dtype)
    pixels = decode_rgb(_tiff(levels, bits, white_is_zero=white_is_zero), LIMITS)
    np.testing.assert_allclose(pixels[..., 0], RAMP * 255, atol=1)
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize(
    ("dtype", "bits", "sample_format", "said"),
    [
        (np.uint32, 32, 1, "32-bit"), (np.int32, 32, 2, "signed"), (np.int16, 16, 2, "signed"),
        (np.int8, 8, 2, "signed"), (np.float32, 32, 3, "floating-point"), (np.float16, 16, 3, "signed|decoded"),
    ],
)  # fmt: skip
def test_samples_whose_black_and_white_no_file_tells_are_refused(
    dtype: type, bits: int, sample_format: int, said: str
) -> None:
    data = _tiff((RAMP * 100).astype(dtype), bits, sample_format=sample_format)
    for read in (read_header, decode_rgb):
        with pytest.raises(ImageError, match=said):
            read(data, LIMITS)


def test_a_transparent_level_of_deep_grey_becomes_white() -> None:
    grey = np.tile(np.array([1000, 40_000], dtype=">u2"), (4, 3))
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in grey))
    head = struct.pack(">IIBBBBB", 6, 4, 16, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        [_chunk(b"IHDR", head), _chunk(b"tRNS", struct.pack(">H", 1000)), _chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
    )
    np.testing.assert_array_equal(decode_rgb(data, LIMITS)[0, :2, 0], [255, 40_000 >> 8])


@pytest.mark.parametrize(
    ("image", "constant"),
    [
        (Image.new("RGB", (300, 200), (200, 10, 10)), True),
        (Image.fromarray((RAMP * 4095).astype(np.uint16)), True),  # 12 bits of data that the file calls 16
        (Image.fromarray((RAMP * 255).astype(np.uint8)), False),
        (picture(300, 200), False),
    ],
)
def test_nearly_constant_pictures_are_known(image: Image.Image, constant: bool) -> None:
    assert is_nearly_constant(decode_rgb(encoded(image), LIMITS)) is constant


def test_one_dark_dot_is_a_picture() -> None:
    image = Image.new("RGB", (1001, 701), (255, 255, 255))
    image.putpixel((517, 333), (0, 0, 0))
    for file_format in ("PNG", "JPEG"):
        assert not is_nearly_constant(decode_rgb(encoded(image, file_format), LIMITS))


def test_avif_is_a_format() -> None:
    pytest.importorskip("PIL._avif")
    image = picture(8, 8).resize((60, 40), Image.Resampling.BICUBIC)
    for orientation in (1, 3, 6):
        data = encoded(image, "AVIF", exif=_exif(orientation))
        header, pixels = read_header(data, LIMITS), decode_rgb(data, LIMITS)
        assert (header.format, header.height, header.width) == ("avif", *pixels.shape[:2])
        np.testing.assert_array_equal(pixels, _as_pillow_has_it(data))


def test_heic_is_a_format_with_its_extra() -> None:
    heif = pytest.importorskip("pillow_heif")
    image = picture(8, 8).resize((60, 40), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    heif.from_pillow(image).save(buffer, quality=95)
    header, pixels = read_header(buffer.getvalue(), LIMITS), decode_rgb(buffer.getvalue(), LIMITS)
    assert (header.format, header.height, header.width) == ("heic", *pixels.shape[:2])
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 12


def test_heic_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"HEIC needs pillow-heif.*\.\[heic\]"):
        read_header(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40, LIMITS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (b" \n ", "white space"),
        (b"\0" * 100, "nothing but zeros"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"></svg>', "SVG"),
        (b"<svg/>", "XML|SVG"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf  <html >", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b'{"error": "no such key"}', "JSON"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video"),
        (b"\x1a\x45\xdf\xa3" + b"x" * 30, "a video"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x0a" + b"x" * 20, "JPEG XL"),
        (b"PK\3\4" + b"x" * 20, "ZIP"),
        (b"iVBORw0KGgoAAAANSUhEUgAA", "base64 text"),
        (b"data:image/png;base64,iVBO", "data: URL"),
        (b"hello, world", "text"),
        (bytes(range(128, 256)), "data of an unknown kind"),
        (b"P6 2 2 255 ", "a PNM picture"),
    ],
)  # fmt: skip
def test_refusals_say_what_came_and_what_is_accepted(data: bytes, said: str) -> None:
    for read in (read_header, decode_rgb):
        with pytest.raises(ImageError, match=rf"expected an image \(png, jpg, .*avif.*\), got .*({said})") as raised:
            read(data, LIMITS)
        assert len(str(raised.value)) < 200


@given(st.binary(max_size=300))
def test_anything_can_be_described(data: bytes) -> None:
    assert describe(data)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_a_truncated_image_is_called_truncated(file_format: str) -> None:
    data = encoded(picture(64, 64), file_format)
    with pytest.raises(ImageError, match=r"truncated" if file_format not in ("TIFF", "AVIF") else r"truncated|decoded"):
        decode_rgb(data[: len(data) * 2 // 3], LIMITS)


def test_pages_are_not_called_animated() -> None:
    data = encoded(picture(4, 4), "TIFF", save_all=True, append_images=[picture(4, 4, 1)])
    with pytest.raises(ImageError, match="several pages"):
        read_header(data, LIMITS)


def test_the_runs_own_limit_replaces_pillows_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(20, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 20 times less than the picture has
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_rgb(data, ImageLimits(max_pixels=200)).shape == (10, 20, 3)
    with pytest.raises(ImageError, match="at most 199 pixels"):
        decode_rgb(data, ImageLimits(max_pixels=199))


def _of_many_pieces(kind: str) -> bytes:
    png, gif, jpeg = (encoded(picture(8, 8), name) for name in ("PNG", "GIF", "JPEG"))
    pixels, end = png.index(b"IDAT") - 4, png.rindex(b"IEND") - 4
    descriptor = gif.index(b",\0\0\0\0\x08\0\x08\0")
    many = 40_000
    return {
        "chunks before": png[:pixels] + _chunk(b"prVt", b"") * many + png[pixels:],
        "chunks behind": png[:end] + _chunk(b"tEXt", b"a\0b") * many + png[end:],
        "empty pixels": png[:pixels] + _chunk(b"IDAT", b"") * many + png[pixels:],
        "markers": jpeg[:2] + b"\xff\xe5\0\2" * many + jpeg[2:],
        "fill bytes": jpeg[:2] + b"\xff" * many + jpeg[2:],
        "comments": gif[:descriptor] + b"\x21\xfe\x01a\0" * many + gif[descriptor:],
        "sub-blocks": gif[:descriptor] + b"\x21\xfe" + b"\x01a" * many + b"\0" + gif[descriptor:],
        "bytes between blocks": gif[:-1] + b"\x01" * many + gif[-1:],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "chunks before", "chunks behind", "empty pixels", "markers", "fill bytes", "comments", "sub-blocks",
        "bytes between blocks",
    ],
)  # fmt: skip
def test_files_of_very_many_pieces_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="pieces"):
        read_header(_of_many_pieces(kind), LIMITS)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "GIF"]), st.integers(0, 500))
def test_structure_is_walked_to_the_end_of_any_bytes(noise: bytes, file_format: str, at: int) -> None:
    data = encoded(picture(16, 16), file_format)
    name = format_of(data)
    assert name is not None
    check_structure(name, data)
    check_structure(name, data[: at % len(data)] + noise)


def _png(width: int, bits: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (_png(2, 1, 0, b"\x40", b"\0\0"), [255, 255]),
        (_png(2, 2, 0, b"\x60", b"\0\1"), [255, 170]),
        (_png(2, 4, 0, b"\x5a", b"\0\5"), [255, 170]),
        (_png(2, 8, 0, b"\5\n", b"\0\5"), [255, 10]),
        (_png(2, 16, 0, b"\5\0\n\0", b"\5\0"), [255, 10]),
        (_png(2, 8, 2, bytes([5, 6, 7, 10, 10, 10]), b"\0\5\0\6\0\7"), [255, 10]),
        (_png(2, 16, 2, bytes([5, 1, 6, 1, 7, 1, 10, 0, 10, 0, 10, 0]), b"\5\1\6\1\7\1"), [255, 10]),
    ],
)
def test_a_transparent_level_is_white_at_every_depth(data: bytes, expected: list[int]) -> None:
    np.testing.assert_array_equal(decode_rgb(data, LIMITS)[0], [[level] * 3 for level in expected])
