import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from pointillist.errors import MissingImageError, RefError
from pointillist.families import Family, ImageLayout, ModelFiles, write_layout_record
from pointillist.families.qwen_vl import QwenVLFamily
from pointillist.images import ImageLimits, ImageStore
from pointillist.images.store import local_path
from pointillist.inference.prompt import request_error
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.levels import PixelDtype
from pointillist.refs import MMImageRef
from tests.helpers.files import open_files
from tests.helpers.pictures import joined, picture, stored_ref, with_item


def _ref(family: Family, store: ImageStore, width: int = 64, height: int = 96, seed: int = 0) -> MMImageRef:
    return stored_ref(family, store, picture(width, height, seed))


@pytest.fixture
def materializer(family: Family, store: ImageStore) -> RawImageMaterializer:
    """Keeps nothing: every call reads the file."""
    return RawImageMaterializer(family, [store.root], ImageLimits(), cache_bytes=0)


def test_tensors_are_those_of_the_pictures(
    materializer: RawImageMaterializer, family: Family, store: ImageStore
) -> None:
    result = materializer.materialize([_ref(family, store), _ref(family, store, 100, 70, 1)])
    expected = joined(family, [picture(64, 96), picture(100, 70, 1)])
    np.testing.assert_array_equal(result["pixel_values"], expected["pixel_values"])
    np.testing.assert_array_equal(result["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "kimi_k25"}, "this model is served by 'qwen_vl'"),
        ({"layout_fingerprint": "0" * 32}, "another image processor configuration"),
        ({"hash": "0" * 64}, "hash differs"),
        ({"payload": {"image_grid_thw": [1, 4, 4]}}, "the image has"),
        ({"raw_image_uri": "file:///etc/passwd"}, "allowed root"),
    ],
)
def test_refusals_name_the_image(
    change: dict[str, Any], message: str, materializer: RawImageMaterializer, family: Family, store: ImageStore
) -> None:
    good = _ref(family, store)
    bad = msgspec.structs.replace(good, **change) if "hash" in change else with_item(good, **change)
    with pytest.raises(RefError, match=rf"image\[1\]: .*{message}"):
        materializer.materialize([good, bad])


def test_wrong_length_missing_and_corrupt_files(
    materializer: RawImageMaterializer, family: Family, store: ImageStore
) -> None:
    ref = _ref(family, store)
    with pytest.raises(RefError, match="placeholder has 7 tokens, the image has 6"):
        materializer.materialize([msgspec.structs.replace(ref, length=7)])
    path = local_path(ref.uri)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(RefError, match="corrupt"):
        materializer.materialize([ref])
    path.unlink()
    with pytest.raises(MissingImageError, match=ref.hash):
        materializer.materialize([ref])


def test_messages_never_tell_the_actual_hash(
    materializer: RawImageMaterializer, family: Family, store: ImageStore, tmp_path: Path
) -> None:
    ref = _ref(family, store)
    with pytest.raises(RefError) as error:
        materializer.materialize([msgspec.structs.replace(ref, hash="0" * 64)])
    assert ref.hash not in str(error.value)


def test_a_fingerprint_mismatch_names_the_first_setting(family: Family, store: ImageStore, tmp_path: Path) -> None:
    tokens = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **tokens}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 16, "max_pixels": 4096}))
    other = QwenVLFamily(ModelFiles(tmp_path))
    ref = _ref(family, store)
    reader = RawImageMaterializer(other, [store.root], ImageLimits())
    with pytest.raises(RefError, match="another image processor configuration"):
        reader.materialize([ref])
    write_layout_record(family, store.root)
    with pytest.raises(
        RefError, match=f"{ref.item['layout_fingerprint']}.*{other.layout_fingerprint}.*differs is image_mean"
    ):
        reader.materialize([ref])


def test_a_file_that_comes_late_is_waited_for(family: Family, store: ImageStore) -> None:
    ref = _ref(family, store)
    path = local_path(ref.uri)
    data = path.read_bytes()
    path.unlink()
    timer = threading.Timer(0.1, lambda: path.write_bytes(data))
    timer.start()
    late = RawImageMaterializer(family, [store.root], ImageLimits(), missing_image_retries=5)
    assert late.materialize([ref])["pixel_values"].any()
    timer.join()


def test_a_batch_loads_each_distinct_image_once_and_faults_stay_alone(family: Family, store: ImageStore) -> None:
    reader = RawImageMaterializer(family, [store.root], ImageLimits(), cache_bytes=0)
    one, two = _ref(family, store), _ref(family, store, 100, 70, 1)
    wrong = with_item(one, payload={"image_grid_thw": [1, 4, 4]})
    gone = with_item(one, raw_image_uri=one.uri.replace(one.hash, two.hash))
    refs = [one, two, one, wrong, gone, one]
    batch = reader.load(refs, keep_errors=True)
    assert batch.index == [0, 1, 0, 2, 3, 0]
    assert batch.errors.keys() == {3, 4}
    assert [image.patches is None for image in batch.images] == [False, False, True, True]
    assert reader.cache.counts.misses == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_type_comes_from_the_file(dtype: PixelDtype, family: Family, store: ImageStore) -> None:
    reader = RawImageMaterializer(family, [store.root], ImageLimits(), threads=3)
    refs = [_ref(family, store, 64 + 32 * seed, 96, seed) for seed in range(5)]
    expected = joined(family, [picture(64 + 32 * seed, 96, seed) for seed in range(5)], dtype)
    for _ in range(2):  # the second time from the cache
        ours = reader.materialize(refs, dtype)["pixel_values"]
        assert ours.dtype == expected["pixel_values"].dtype
        np.testing.assert_array_equal(ours, expected["pixel_values"])
    assert reader.cache.counts.misses == 5
    assert (
        reader.num_bytes(refs)
        == joined(family, [picture(64 + 32 * n, 96) for n in range(5)], "uint8")["pixel_values"].nbytes
    )


def test_a_reference_is_checked_even_if_its_image_is_in_the_cache(family: Family, store: ImageStore) -> None:
    reader = RawImageMaterializer(family, [store.root], ImageLimits())
    ref = _ref(family, store)
    reader.materialize([ref])
    outside = with_item(ref, raw_image_uri=f"file:///elsewhere/{ref.hash[:2]}/{ref.hash}.png")
    for bad in (outside, msgspec.structs.replace(ref, length=ref.length + 1), with_item(ref, payload={})):
        with pytest.raises(RefError):
            reader.materialize([bad])


def test_tensors_that_somebody_holds_are_never_written_again(family: Family, store: ImageStore) -> None:
    reader = RawImageMaterializer(family, [store.root], ImageLimits())
    batches = [[_ref(family, store, 64, 96, seed)] for seed in range(4)]
    held = [torch.from_numpy(reader.materialize(batch)["pixel_values"])[1:] for batch in batches]
    for seed, tensor in enumerate(held):
        expected = joined(family, [picture(64, 96, seed)])["pixel_values"][1:]
        np.testing.assert_array_equal(tensor.numpy(), expected)
    address = reader.materialize(batches[0])["pixel_values"].ctypes.data
    assert reader.materialize(batches[1])["pixel_values"].ctypes.data == address  # and what nobody holds, is


def test_an_unreadable_file_costs_its_image_only(
    materializer: RawImageMaterializer, family: Family, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, folder, failing = (_ref(family, store, seed=seed) for seed in range(3))
    path = local_path(folder.uri)
    path.unlink()
    path.mkdir()
    bad = local_path(failing.uri).stat().st_ino
    read = os.read

    def reading(descriptor: int, count: int) -> bytes:
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, count)

    monkeypatch.setattr(os, "read", reading)
    for _ in range(10):
        batch = materializer.load([folder, good, failing], keep_errors=True)
        assert {index: type(error) for index, error in batch.errors.items()} == {
            0: MissingImageError, 2: MissingImageError,
        }  # fmt: skip
        assert batch.images[1].patches is not None
    assert open_files(store.root) == []
    with pytest.raises(MissingImageError) as raised:
        materializer.load([good, failing, folder])
    answer = request_error(raised.value)
    assert (answer.type, answer.param) == ("missing_mm_image", "features.kwargs_data.image[1]")
    assert (raised.value.uri, raised.value.sha256) == (failing.uri, failing.hash)


def test_no_memory_for_an_image_costs_that_image_only(
    materializer: RawImageMaterializer, family: Family, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, large = _ref(family, store), _ref(family, store, 128, 96, 1)
    patches = family.patches

    def limited(pixels: np.ndarray, layout: ImageLayout) -> np.ndarray:
        if layout.num_tokens == large.length:
            raise MemoryError
        return patches(pixels, layout)

    monkeypatch.setattr(family, "patches", limited)
    batch = materializer.load([good, large], keep_errors=True)
    assert batch.errors.keys() == {1}
    assert isinstance(batch.errors[1], MissingImageError)


def test_pictures_of_one_colour_are_counted_and_warned_about(
    family: Family, store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    reader = RawImageMaterializer(family, [store.root], ImageLimits(), threads=1)
    plain = [stored_ref(family, store, Image.new("RGB", (64, 64), (level, 0, 0))) for level in range(12)]
    batch = reader.load([*plain, _ref(family, store)], keep_errors=True)
    assert [image.constant for image in batch.images] == [True] * 12 + [False]
    assert reader.cache.counts.constant == 12
    warned = [record.getMessage() for record in caplog.records if "one colour only" in record.getMessage()]
    assert ["number 1 " in warned[0], "number 10 " in warned[1]] == [True, True]
    assert len(warned) == 2
