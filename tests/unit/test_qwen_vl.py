"""The Qwen-VL adapter against the Hugging Face processor, which we did not write."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from pointillist.errors import ConfigError, LayoutError
from pointillist.families import Family, ModelFiles
from pointillist.families.qwen_vl import QwenVLFamily
from tests.helpers.pictures import check_pixels, joined, picture


def _family(tmp_path: Path, **settings_: object) -> QwenVLFamily:
    tokens = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **tokens}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings_))
    return QwenVLFamily(ModelFiles(tmp_path))


QWEN3 = {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
TINY = {
    "patch_size": 16,
    "size": {"shortest_edge": 1024, "longest_edge": 90_000},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
CLIP14 = {"patch_size": 14}


@pytest.mark.slow
@pytest.mark.parametrize("config", [QWEN3, TINY, CLIP14], ids=["qwen3", "tiny", "clip14"])
def test_layout_equals_smart_resize_for_every_size(config: dict, tmp_path: Path) -> None:
    family = _family(tmp_path, **config)

    @settings(max_examples=4000, deadline=None)
    @given(st.integers(1, 16_384), st.integers(1, 16_384))
    @example(5000, 1000)  # falls exactly on a boundary of the 14-pixel patches: doubles decide
    @example(1, 1)
    @example(16_384, 82)
    @example(200, 1)
    @example(201, 1)
    def check(width: int, height: int) -> None:
        factor = family.patch_size * family.merge_size
        try:
            rows, columns = smart_resize(height, width, factor, family.min_pixels, family.max_pixels)
        except ValueError:
            with pytest.raises(LayoutError):
                family.layout(width, height)
            return
        layout = family.layout(width, height)
        assert (layout.resized_height, layout.resized_width) == (rows, columns)
        assert layout.grid_thw == (1, rows // family.patch_size, columns // family.patch_size)
        assert layout.num_tokens == rows * columns // factor**2

    check()


@pytest.mark.parametrize("config", [QWEN3, TINY, CLIP14], ids=["qwen3", "tiny", "clip14"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (100, 70), (33, 200), (400, 300), (7, 5)])
def test_pixels_equal_the_processors_bit_for_bit(config: dict, size: tuple[int, int], tmp_path: Path) -> None:
    family = _family(tmp_path, **config)
    processor = Qwen2VLImageProcessorPil(**config)
    images = [picture(*size, seed) for seed in (1, 2)]
    expected = processor(images=images, return_tensors="np")
    np.testing.assert_array_equal(joined(family, images)["image_grid_thw"], expected["image_grid_thw"])
    check_pixels(family, images, expected["pixel_values"])


def test_fingerprint_follows_every_deciding_setting(tmp_path: Path) -> None:
    base = _family(tmp_path, **QWEN3)
    changes = [
        {"patch_size": 14}, {"merge_size": 1}, {"temporal_patch_size": 1}, {"image_mean": [0.4] * 3},
        {"image_std": [0.4] * 3},
        {"rescale_factor": 1 / 256}, {"size": {"shortest_edge": 1, "longest_edge": 16_777_216}}, {"max_pixels": 1000},
    ]  # fmt: skip
    prints = {_family(tmp_path, **{**QWEN3, **change}).layout_fingerprint for change in changes}
    assert len(prints | {base.layout_fingerprint}) == len(changes) + 1
    assert _family(tmp_path, **QWEN3).layout_fingerprint == base.layout_fingerprint


@pytest.mark.parametrize("change", [{"do_resize": False}, {"resample": 2}, {"do_normalize": False}])
def test_settings_that_the_adapter_does_not_do_are_refused(change: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        _family(tmp_path, **QWEN3, **change)


@pytest.mark.parametrize(
    "change", [{"patch_size": 14.5}, {"image_mean": [0.5, 0.5]}, {"size": {"shortest_edge": None}}]
)
def test_settings_of_another_type_are_named(change: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"image processor of .*\$\.{next(iter(change))}"):
        _family(tmp_path, **{**QWEN3, **change})


def test_expansion_keeps_the_neighbours(family: Family) -> None:
    layouts = [family.layout(64, 64), family.layout(96, 64)]
    pad = family.image_token_id
    expansion = family.expand([10, pad, 11, pad, 12], layouts)
    assert expansion.token_ids == [10, *[pad] * 4, 11, *[pad] * 6, 12]
    assert expansion.spans == [(1, 4), (6, 6)]
    assert expansion.source == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4]
    with pytest.raises(LayoutError, match="2 image placeholders in the tokens, but 1 images"):
        family.expand([pad, pad], layouts[:1])


@pytest.mark.parametrize(
    "payload", [{}, {"image_grid_thw": [1, 4]}, {"image_grid_thw": [1, 4, 4], "x": 1}, {"image_grid_thw": [1.0, 4, 4]},
                {"image_grid_thw": [1, 2, 8]}, {"image_grid_thw": "144"}, {"image_grid_thw": [True, 4, 4]}],
)  # fmt: skip
def test_foreign_payloads_are_refused(payload: dict, family: Family) -> None:
    layout = family.layout(64, 64)
    family.check_payload(family.payload(layout), layout)
    with pytest.raises(LayoutError):
        family.check_payload(payload, layout)
