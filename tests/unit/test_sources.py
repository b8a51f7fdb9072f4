import base64
import errno
import io
import os
import textwrap
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from pointillist.errors import ImageError, PointillistError, SourceError, StorageError
from pointillist.images import ImageLimits, ImageStore, Sources, StoredImage, decode_rgb, normalize_images
from pointillist.images.store import local_path
from tests.helpers.pictures import encoded, picture

DATA = encoded(picture(8, 6))
DATA_URL = "data:image/png;base64," + base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA_URL}},
        {"type": "image_url", "image_url": DATA_URL},
        {"type": "input_image", "image_url": DATA_URL, "detail": "high"},
        {"type": "image", "image": DATA_URL},
        {"type": "image", "image": DATA},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA_URL.partition(",")[2]}},
        {"type": "image", "source": {"type": "url", "url": DATA_URL}},
    ],
)
def test_every_shape_becomes_a_stored_file_url(part: dict[str, Any], sources: Sources) -> None:
    images: list[StoredImage] = []
    message = {"role": "tool", "content": [{"type": "tool_result", "content": [part, {"type": "text", "text": "x"}]}]}
    result = normalize_images(message, sources, images)
    assert len(images) == 1
    stored_part = {"type": "image_url", "image_url": {"url": images[0].uri}}
    assert result["content"][0]["content"] == [stored_part, {"type": "text", "text": "x"}]
    assert normalize_images(result, sources, [])["content"] == result["content"]


def test_files_paths_and_pil(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(DATA)
    hashes = {sources.put(source).sha256 for source in (path, str(path), path.as_uri(), DATA_URL)}
    assert len(hashes) == 1
    assert sources.put(picture(8, 6)).header.width == 8


def test_what_holds_no_image_is_the_same_object(sources: Sources) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "hello"}], "extra": {"image_url": None}}
    assert normalize_images(message, sources, []) is message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://example.com/a.png", "remote"),
        ("data:image/png;base64,@@@", "base64"),
        ("data:text/plain;base64,aaaa", "expected data:image"),
        (5, "type int"),
        (None, "NoneType"),
        ("/nowhere/at/all.png", "no image file"),
        ("bad\0path", "no image file|can not be read"),
    ],
)
def test_other_sources_are_refused(source: object, message: str, sources: Sources) -> None:
    with pytest.raises(SourceError, match=message):
        sources.put(source)


def test_oversized_sources_are_refused_before_they_are_read(tmp_path: Path) -> None:
    sources = Sources(ImageStore(tmp_path / "s", ImageLimits(max_bytes=100)))
    path = tmp_path / "big.png"
    path.write_bytes(b"x" * 101)
    for source in (path, "data:image/png;base64," + "A" * 200):
        with pytest.raises(SourceError, match="100"):
            sources.put(source)


def test_transform_is_applied_before_storing(store: ImageStore) -> None:
    other = encoded(picture(3, 3))
    assert Sources(store, transform=lambda _: other).put(DATA).header.width == 3


@given(st.text(max_size=60), st.sampled_from(["", "data:", "data:image/png;base64,", "file://", "http://"]))
def test_any_string_gives_an_expected_error(tmp_path_factory: pytest.TempPathFactory, text: str, prefix: str) -> None:
    sources = Sources(ImageStore(tmp_path_factory.getbasetemp() / "fuzz", ImageLimits()))
    with pytest.raises(PointillistError):
        sources.put(prefix + text)


def test_a_hundred_images_in_one_message(sources: Sources) -> None:
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": "x"}] * 100
    images: list[StoredImage] = []
    message = normalize_images({"role": "user", "content": parts}, sources, images)
    assert len(images) == 100
    assert len({image.uri for image in images}) == 1
    assert message["content"][1] is parts[1]


def _pixels(stored: StoredImage) -> np.ndarray:
    return decode_rgb(local_path(stored.uri).read_bytes(), ImageLimits())


BASE64 = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": DATA_URL},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": DATA_URL},
        {"type": "image", "data": BASE64, "mimeType": "image/png"},
        {"type": "image", "source_type": "base64", "data": BASE64, "mime_type": "image/png"},
        {"type": "image", "image": {"bytes": DATA, "path": None}},
        {"type": "image", "image": {"url": DATA_URL}},
        {"type": "image", "data": DATA},
        {"type": "image", "image": None, "url": DATA_URL},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": BASE64}},
        {"type": "image", "source": {"type": "base64", "data": "\n".join(textwrap.wrap(BASE64, 76))}},
    ],
)
def test_shapes_of_other_libraries(part: dict[str, Any], sources: Sources) -> None:
    images: list[StoredImage] = []
    for each in (sources, sources.for_clients()):
        assert normalize_images([part], each, images)[0]["image_url"]["url"] == images[-1].uri
        assert local_path(images[-1].uri).read_bytes() == DATA


def test_paths_in_parts_are_for_python_only(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(DATA)
    for part in (
        {"type": "image", "path": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "path": path.as_uri()},
        {"type": "image", "image": {"bytes": None, "path": str(path)}},
        {"type": "image", "url": path.as_uri()},
    ):
        assert normalize_images(part, sources, [])["type"] == "image_url"
        with pytest.raises(SourceError, match="not read for clients"):
            normalize_images(part, sources.for_clients(), [])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "file_id": "file-1"},
        {"type": "image"},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": None}},
        {"type": "image_url", "image_url": {"url": 5}},
        {"type": "image", "source": {"type": "file", "file_id": "x"}},
        {"type": "image", "source": {"type": "base64"}},
        {"type": "image", "source": {"type": "base64", "data": ["x"]}},
        {"type": "image", "source": None},
        {"type": "image", "base64": "@@@"},
        {"type": "image", "base64": 5},
        {"type": "image", "image": [1, 2]},
        {"type": "image", "x" * 10_000: 1},
        {"type": "image", "source": {"type": "y" * 10_000}},
        {"type": "image", "image": BASE64},
        {"type": "image", "image": "z" * 100_000},
        {"type": "image", "image": "data:" + "z" * 100_000},
        {"type": "image", "image": "data:image/png," + "z" * 100_000},
        {"type": "image", "image": "data:text/html;base64," + BASE64},
        {"type": "image", "image": "weird://" + "z" * 100_000},
        {"type": "image", "image": "file://" + "z" * 100_000},
    ],
)
def test_refusals_name_the_place_and_repeat_little(part: dict[str, Any], sources: Sources) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}, part]}
    for each in (sources, sources.for_clients()):
        with pytest.raises((SourceError, ImageError), match=r"^messages\[3\]\.content\[1\]: ") as raised:
            normalize_images(message, each, [], "messages[3]")
        assert len(str(raised.value)) < 400
        assert BASE64[100:160] not in str(raised.value)


def test_errors_name_the_file(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    for data, said in ((b"<html><body>", "an HTML page"), (DATA[:-40], "truncated"), (b"", "an empty file")):
        path.write_bytes(data)
        for source in (path, str(path), path.as_uri()):
            with pytest.raises(ImageError, match=rf"photo\.png.*{said}"):
                sources.put(source)
    with pytest.raises(SourceError, match="is a folder"):
        sources.put(tmp_path)


_ENCODED = st.sampled_from([DATA, encoded(picture(9, 5), "JPEG"), encoded(picture(7, 7), "GIF")])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    data=_ENCODED,
    scheme=st.sampled_from(["data:", "DATA:", "Data:"]),
    media_type=st.sampled_from(
        ["image/png", "IMAGE/PNG", "image/*", "image/svg+xml", "", "application/octet-stream", " image/jpeg "]
    ),
    parameters=st.lists(st.sampled_from([";charset=utf-8", '; charset="utf-8"', ";name=a.png", "; x=y"]), max_size=3),
    mark=st.sampled_from([";base64", ";BASE64", "; base64", ";base64 "]),
    width=st.sampled_from([0, 20, 76]),
    newline=st.sampled_from(["\n", "\r\n", " ", "\t\n "]),
    padded=st.booleans(),
    urlsafe=st.booleans(),
    percent=st.sampled_from(["none", "special", "all"]),
    tail=st.sampled_from(["", "\n", "  "]),
)
def test_data_urls_as_browsers_and_mail_write_them(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, scheme: str, media_type: str, parameters: list[str],
    mark: str, width: int, newline: str, padded: bool, urlsafe: bool, percent: str, tail: str,
) -> None:  # fmt: skip
    store = ImageStore(tmp_path_factory.getbasetemp() / "data-urls", ImageLimits())
    text = (base64.urlsafe_b64encode if urlsafe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    text = newline.join(textwrap.wrap(text, width)) if width else text
    if percent == "special":
        text = urllib.parse.quote(text, safe="")
    elif percent == "all":
        text = "".join(f"%{ord(each):02x}" for each in text)
    url = f"{scheme}{media_type}{''.join(parameters)}{mark},{text}{tail}"
    stored = Sources(store).for_clients().put(url)
    assert local_path(stored.uri).read_bytes() == data


@given(data=_ENCODED, safe=st.sampled_from(["", "/:;=", "abcdefghijklmnop"]))
def test_data_urls_without_base64(tmp_path_factory: pytest.TempPathFactory, data: bytes, safe: str) -> None:
    store = ImageStore(tmp_path_factory.getbasetemp() / "percent", ImageLimits())
    stored = Sources(store).put("data:image/png," + urllib.parse.quote_from_bytes(data, safe=safe))
    assert local_path(stored.uri).read_bytes() == data


@pytest.mark.parametrize("body", ["A" * 200, "%41" * 200, "A " * 300, "A" * 10_000_000])
@pytest.mark.parametrize("mark", ["", ";base64"])
def test_long_data_urls_are_refused_in_every_form(tmp_path: Path, body: str, mark: str) -> None:
    sources = Sources(ImageStore(tmp_path / "s", ImageLimits(max_bytes=100)))
    with pytest.raises((SourceError, ImageError), match="100"):
        sources.put(f"data:image/png{mark},{body}")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("loaded", [False, True])
def test_pil_images_are_as_upright_as_their_file(
    file_format: str, orientation: int, loaded: bool, sources: Sources, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    path = tmp_path / "a"
    path.write_bytes(encoded(picture(12, 7), file_format, exif=exif, **options))
    with Image.open(path) as image:
        if loaded:
            image.load()
        by_pil = sources.put(image)
    np.testing.assert_array_equal(_pixels(by_pil), _pixels(sources.put(path)))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(_pixels(by_pil), expected)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16"]
)
def test_pil_images_of_every_mode(mode: str, sources: Sources) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 70).astype(np.uint16).reshape(7, 10))
        expected = (np.asarray(image) >> 8)[..., None].repeat(3, axis=2)
    else:
        source = picture(10, 7).convert("RGBA")
        source.putalpha(Image.linear_gradient("L").resize((10, 7)))
        direct = {"La": "LA", "RGBa": "RGBA", "PA": "P", "LAB": "RGB"}.get(mode)
        image = source.convert(direct).convert(mode) if direct and mode != "LAB" else None
        if mode == "LAB":
            image = ImageCms.profileToProfile(
                source.convert("RGB"), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            )
        image = image or (source if mode == "RGBA" else source.convert("RGB").convert(mode))
        if mode in ("RGBA", "RGBa", "LA", "La", "PA"):
            flat = Image.new("RGBA", image.size, "white")
            plain = image.convert("RGBA") if mode != "La" else image.convert("LA").convert("RGBA")
            expected = np.asarray(Image.alpha_composite(flat, plain).convert("RGB"))
        else:
            expected = np.asarray(image.convert("RGB"))
    before = image.mode, image.size, dict(image.info)
    np.testing.assert_array_equal(_pixels(sources.put(image)), expected)
    assert (image.mode, image.size, dict(image.info)) == before  # the caller's image is as it was


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pil_images_whose_black_and_white_nothing_tells(mode: str, sources: Sources) -> None:
    with pytest.raises(ImageError, match="samples"):
        sources.put(picture(10, 7).convert("L").convert(mode))


def test_a_truncated_pil_image_is_an_image_error(sources: Sources) -> None:
    for file_format in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(64, 64), file_format)
        try:
            image = Image.open(io.BytesIO(data[: len(data) // 2]))
        except OSError:
            continue  # Pillow does not even open it
        with pytest.raises(ImageError, match=r"truncated|decoded"):
            sources.put(image)


def test_a_pil_image_over_a_limit_is_refused_before_it_is_encoded(tmp_path: Path) -> None:
    sources = Sources(ImageStore(tmp_path / "s", ImageLimits(max_pixels=100, max_side=60)))
    for size in ((11, 10), (61, 1)):
        with pytest.raises(ImageError, match=r"at most 100|exceed 60"):
            sources.put(Image.new("RGB", size))


@pytest.mark.parametrize("shape", [(7, 10), (7, 10, 1), (7, 10, 3), (7, 10, 4)])
@pytest.mark.parametrize("order", ["C", "F", "view"])
def test_numpy_frames(shape: tuple[int, ...], order: str, sources: Sources) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if shape[-1] == 4:
        array[..., 3] = 255
    frame = np.asfortranarray(array) if order == "F" else array
    if order == "view":
        frame, array = array[::-1, ::2], np.ascontiguousarray(array[::-1, ::2])
    images: list[StoredImage] = []
    normalize_images({"type": "image", "image": frame}, sources, images)
    expected = array if array.ndim == 3 else array[..., None]
    expected = expected[..., :3] if expected.shape[2] >= 3 else expected.repeat(3, axis=2)
    np.testing.assert_array_equal(_pixels(images[0]), expected)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((7, 10, 3), np.float32), "dtype float32, expected uint8"),
        (np.zeros((7, 10), bool), "dtype bool"),
        (np.zeros((7, 10), np.int64), "dtype int64"),
        (np.zeros((7, 10), np.uint16), "dtype uint16"),
        (np.zeros((3, 7, 10), np.uint8), r"shape \(3, 7, 10\)"),
        (np.zeros((1, 7, 10, 3), np.uint8), "shape"),
        (np.zeros((0, 10, 3), np.uint8), "shape"),
        (np.zeros((), np.uint8), "shape"),
        (np.array(["a"], dtype=object), "dtype object"),
    ],
)
def test_other_arrays_are_refused_by_name(array: np.ndarray, said: str, sources: Sources) -> None:
    with pytest.raises(SourceError, match=said):
        sources.put(array)


def test_a_full_disk_reaches_the_caller_as_such(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"^messages\[0\]: .*No space left"):
        normalize_images({"type": "image", "image": DATA}, sources, [], "messages[0]")


def test_a_file_that_has_no_end_is_not_read_for_ever(sources: Sources) -> None:
    for path in ("/dev/zero", "/proc/self/mem", "/proc/self/status", "/proc/self/pagemap"):
        with pytest.raises((SourceError, ImageError)):
            sources.put(path)
