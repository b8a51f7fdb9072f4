"""Tiny random models of every generation: forward and backward from references equal the processor's way."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from pointillist.images import ImageLimits, ImageStore
from pointillist.inference.embedded.batch import Prompt, prefill
from pointillist.models import LoadedModel, load_model, sample_positions
from pointillist.orchestrator.packing import pack
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.on_device import PixelNormalizer, as_tensors
from pointillist.refs import MMRefs, mm_token_type_ids
from pointillist.trainer.packing_check import check_packing
from pointillist.trainer.policy_model import PolicyModel
from pointillist.trainer.rows import RowLoader
from pointillist.transport import TrainingSample
from tests.helpers.models import check_against_huggingface, small_sample

TEXT = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


def _qwen2(tokens: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    return Qwen2VLForConditionalGeneration(config), 14


def _qwen2_5(tokens: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14,
        "out_hidden_size": 64,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config), 14


def _qwen3_5(tokens: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    text = {
        **TEXT, "head_dim": 16, "rope_parameters": rope, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 16,
        "out_hidden_size": 64,
        "num_position_embeddings": 256,
    }  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision, **tokens)
    return Qwen3_5ForConditionalGeneration(config), 16


def _gemma3(tokens: dict[str, int]) -> Any:
    text = {**TEXT, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=tokens["image_token_id"],
        boi_token_index=tokens["vision_start_token_id"], eoi_token_index=tokens["vision_end_token_id"],
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config), 14


BUILDERS = {"gemma3": _gemma3, "qwen2_vl": _qwen2, "qwen2_5_vl": _qwen2_5, "qwen3_5": _qwen3_5}


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = prepare.build_tokenizer()
    names = ("image", "video"), ("vision_start", "vision_end")
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in names[0]}
    tokens |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names[1]}
    torch.manual_seed(0)
    model, patch_size = BUILDERS[request.param](tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):
                parameter.normal_(std=0.5)  # Gemma 3 begins with a projection of zeros, which hides every picture
            elif parameter.ndim > 1:
                parameter.mul_(5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prepare.write_processor(folder, patch_size=patch_size)
    if request.param == "gemma3":
        settings = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu", dtype="float32")


def test_rows_of_references_equal_the_processors_way(folder: Path, loaded: LoadedModel, store: ImageStore) -> None:
    proof = check_against_huggingface(folder, loaded, store)
    # Linear attention (Qwen3.5) carries its state from one packed sample into the next, and Gemma 3's mask of image
    # blocks forgets where samples end: such models are padded instead.
    assert proof.can_pack == folder.name.startswith("qwen2")


def test_a_reference_of_a_wrong_length_costs_its_own_sample_only(loaded: LoadedModel, store: ImageStore) -> None:
    """Gemma 3 has no image of another length, so nothing can hold its place: the row goes on without it."""
    good, bad = (small_sample(loaded, store, [(64, 64)], seed) for seed in (1, 2))
    assert bad.mm_refs is not None
    (image,) = bad.mm_refs.images
    cut = {
        name: [*getattr(bad, name)[: image.offset], *getattr(bad, name)[image.offset + 1 :]]
        for name in ("token_ids", "loss_mask", "logprobs_sampled", "advantages", "weight_versions", "temperatures")
    }
    shorter = msgspec.structs.replace(image, length=image.length - 1)
    types = mm_token_type_ids(cut["token_ids"], loaded.family.image_token_id)
    bad = msgspec.structs.replace(bad, **cut, mm_token_type_ids=types, mm_refs=MMRefs([shorter]))
    policy = PolicyModel(loaded)
    loader = RowLoader(loaded, RawImageMaterializer(loaded.family, [store.root], ImageLimits()))
    loader.packed = check_packing(policy, loaded).can_pack

    def logprobs(*samples: TrainingSample) -> torch.Tensor:
        ((row,),) = pack(samples, seq_len=256, num_workers=1)
        with torch.no_grad():
            return policy(loader.load(row)).logprobs

    assert logprobs(bad).tolist() == []
    torch.testing.assert_close(logprobs(good, bad), logprobs(good), rtol=0, atol=1e-5)
    counts, faults = loader.take_counts()
    assert (counts.images_corrupt, counts.samples_quarantined) == (2, 2)
    assert {fault.sample_id for fault in faults} == {"2"}
    assert "tokens" in faults[0].message


def _touching(loaded: LoadedModel, store: ImageStore, order: tuple[int, int]) -> TrainingSample:
    """A sample whose two images have no token between them, the first or the second one first."""
    both = small_sample(loaded, store, [(64, 64), (96, 64)], 3)
    assert both.mm_refs is not None
    first, second = (both.mm_refs.images[index] for index in order)
    pad, start = loaded.family.image_token_id, 5
    ids = [*both.token_ids[:start], *[pad] * (first.length + second.length), *both.token_ids[-7:]]
    first = msgspec.structs.replace(first, offset=start)
    second = msgspec.structs.replace(second, offset=start + first.length)
    trained = [index >= len(ids) - 4 for index in range(len(ids))]
    return msgspec.structs.replace(
        both, token_ids=ids, loss_mask=trained, logprobs_sampled=[0.0] * len(ids),
        advantages=[float(on) for on in trained], weight_versions=[0] * len(ids),
        temperatures=[1.0] * len(ids), mm_refs=MMRefs([first, second]), mm_token_type_ids=mm_token_type_ids(ids, pad),
    )  # fmt: skip


def test_images_that_touch_are_two_images(loaded: LoadedModel, store: ImageStore) -> None:
    """To the trainer and to the embedded engine alike, in every family; in the other order they give other numbers."""
    reader = RawImageMaterializer(loaded.family, [store.root], ImageLimits())
    loader, policy = RowLoader(loaded, reader), PolicyModel(loaded)
    loader.packed = False
    linear = "linear_attention" in (getattr(loaded.model.config.get_text_config(), "layer_types", None) or [])
    seen = []
    for order in ((0, 1), (1, 0)):
        sample = _touching(loaded, store, order)
        ((row,),) = pack([sample], seq_len=256, num_workers=1)
        with torch.no_grad():
            seen.append(policy(loader.load(row)).logprobs)
        if linear:
            continue  # not served by the embedded engine
        refs, ids = sample.mm_refs.images, torch.tensor(sample.token_ids)
        arrays = reader.materialize(refs, "uint8")
        prompt = Prompt(ids[:-1], torch.tensor(sample.mm_token_type_ids)[:-1], as_tensors(arrays))
        logits = prefill(loaded, PixelNormalizer(loaded.family), [prompt]).logits[0].clone()
        logits[loaded.unsampleable] = float("-inf")
        assert abs(logits.log_softmax(-1)[ids[-1]] - seen[-1][-1]) < 1e-4
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_positions_of_images_that_touch(loaded: LoadedModel) -> None:
    """Two images of two by two tokens after two tokens of text: the second begins where the first one's sides end."""
    if loaded.family.forward_args.pass_position_ids_with_mm:
        return
    types = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    rows = sample_positions(
        loaded.model, loaded.family.forward_args, types + 20, types, torch.tensor([[1, 4, 4], [1, 4, 4]])
    )
    assert rows.tolist() == [
        [0, 1, 2, 2, 2, 2, 4, 4, 4, 4, 6, 7],
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7],
        [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7],
    ]
