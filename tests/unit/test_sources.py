import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.errors import PointillistError, SourceError
from pointillist.images import ImageLimits, ImageStore, Sources, StoredImage, normalize_images
from pointillist.images.store import file_uri
from tests.conftest import encoded, picture

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
    hashes = {sources.put(source).sha256 for source in (path, str(path), file_uri(path), DATA_URL)}
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
