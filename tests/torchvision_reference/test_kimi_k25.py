"""The Kimi K2.5 adapter against transformers' own processor and model."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration
from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor, navit_resize

from pointillist.errors import LayoutError
from pointillist.families import ModelFiles
from pointillist.families.kimi_k25 import KimiK25Family
from pointillist.images import ImageStore
from pointillist.models import load_model
from tests.helpers.models import check_against_huggingface, save_scaled
from tests.helpers.pictures import check_pixels, joined, picture

TOKENS = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4}
SMALL = {"max_patches": 64, "size": {"max_height": 12, "max_width": 12}, "image_mean": [0.48, 0.46, 0.41]}


def _family(folder: Path, **changes: Any) -> KimiK25Family:
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k25", **TOKENS}))
    (folder / "preprocessor_config.json").write_text(json.dumps(changes))
    return KimiK25Family(ModelFiles(folder))


@pytest.mark.parametrize("changes", [{}, SMALL], ids=["defaults", "small"])
def test_layout_equals_navit_resize_for_every_size(changes: dict[str, Any], tmp_path: Path) -> None:
    family = _family(tmp_path, **changes)

    @settings(max_examples=4000, deadline=None)
    @given(st.integers(1, 16_384), st.integers(1, 16_384))
    @example(150, 100)
    @example(200, 8000)
    @example(4000, 4000)
    @example(1, 1)
    def check(width: int, height: int) -> None:
        (rows, columns), (padded_rows, padded_columns) = navit_resize(
            height, width, 14, 2, family.max_patches, family.max_side_patches
        )
        layout = family.layout(width, height)
        assert (layout.resized_height, layout.resized_width) == (rows, columns)
        assert layout.grid_thw == (1, padded_rows // 14, padded_columns // 14)
        assert layout.num_tokens == padded_rows * padded_columns // 28**2

    check()


@pytest.mark.parametrize("changes", [{}, SMALL], ids=["defaults", "small"])
@pytest.mark.parametrize("size", [(56, 84), (100, 70), (33, 200), (400, 300), (7, 5)])
def test_pixels_equal_the_processors_bit_for_bit(
    changes: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    family, processor = _family(tmp_path, **changes), Kimi_K25ImageProcessor(**changes)
    images = [picture(*size, seed) for seed in (1, 2)]
    expected = processor(images=images, return_tensors="np")
    np.testing.assert_array_equal(joined(family, images)["image_grid_thw"], expected["image_grid_thw"])
    check_pixels(family, images, expected["pixel_values"])


@pytest.mark.parametrize(
    "change", [{"image_grid_thw": [1, 2, 2]}, {"resized_hw": [1, 1]}, {"x": 1}, {"resized_hw": None}]
)
def test_foreign_payloads_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    family = _family(tmp_path)
    layout = family.layout(100, 70)
    family.check_payload(family.payload(layout), layout)
    with pytest.raises(LayoutError):
        family.check_payload({**family.payload(layout), **change}, layout)


@pytest.fixture(scope="module")
def folder(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi_k25")
    tokenizer = prepare.build_tokenizer()
    text = {
        "model_type": "deepseek_v3", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "n_group": 1,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32,
        "n_routed_experts": 4, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "kv_lora_rank": 16,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
        "pos_emb_height": 8, "pos_emb_width": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=64, **TOKENS)
    model = Kimi_K25ForConditionalGeneration(config)
    save_scaled(model, tokenizer, folder, 4.0)
    settings_ = {"image_processor_type": "Kimi_K25ImageProcessor", **SMALL}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_))
    return folder


def test_packed_references_equal_the_processors_way(folder: Path, store: ImageStore) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    assert check_against_huggingface(folder, loaded, store).can_pack
