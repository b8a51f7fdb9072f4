"""The Gemma 3 adapter against the Hugging Face processor: nothing in the protocol is shaped around Qwen."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from pointillist.errors import ConfigError, LayoutError
from pointillist.families import ModelFiles
from pointillist.families.gemma3 import Gemma3Family
from pointillist.pixels import LoadedImage, PatchJoiner
from tests.helpers.pictures import check_pixels, picture

TOKENS = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"}
TOKENS_PER_IMAGE = 6


@pytest.fixture(scope="module")
def tokenizer(prepare: ModuleType) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=prepare.build_tokenizer()._tokenizer, extra_special_tokens=TOKENS, eos_token="<|im_end|>"
    )


def _family(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Gemma3Family:
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    config = {"model_type": "gemma3", "mm_tokens_per_image": TOKENS_PER_IMAGE, **ids}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"size": {"height": 56, "width": 84}, **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return Gemma3Family(ModelFiles(folder))


@pytest.mark.parametrize("size", [(84, 56), (100, 70), (7, 300)])
def test_pixels_equal_the_processors_bit_for_bit(
    size: tuple[int, int], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    family = _family(tmp_path, tokenizer)
    image = picture(*size)
    expected = Gemma3ImageProcessorPil(size={"height": 56, "width": 84})(images=[image], return_tensors="np")
    check_pixels(family, [image], expected["pixel_values"])
    missing = PatchJoiner(family).join([LoadedImage(None, family.layout(*size))])
    assert not missing["pixel_values"].any()


@pytest.mark.parametrize("text", ["{0}", "look: {0} and {0}?", "one {0}{0} two"])
def test_expansion_equals_the_processors(text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    family = _family(tmp_path, tokenizer)
    text = text.format(TOKENS["boi_token"])
    pictures = [picture(84, 56)] * text.count(TOKENS["boi_token"])
    processor = Gemma3Processor(Gemma3ImageProcessorPil(), tokenizer, image_seq_length=TOKENS_PER_IMAGE)
    expected = processor(text=[text], images=[pictures], return_tensors="np")["input_ids"][0].tolist()
    logical = tokenizer.encode(text, add_special_tokens=False)
    if "{0}{0}" in text or text.count(TOKENS["boi_token"] * 2):
        with pytest.raises(LayoutError, match="side by side"):
            family.expand(logical, [family.layout(84, 56)] * len(pictures))
        return
    expansion = family.expand(logical, [family.layout(84, 56)] * len(pictures))
    assert expansion.token_ids == expected
    for offset, length in expansion.spans:
        assert set(expansion.token_ids[offset : offset + length]) == {family.image_token_id}


def test_what_the_adapter_does_not_do_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    family = _family(tmp_path, tokenizer)
    layout = family.layout(1, 1)
    with pytest.raises(LayoutError, match="line break"):
        family.expand(tokenizer.encode("x\n<|vision_start|>", add_special_tokens=False), [layout])
    with pytest.raises(LayoutError, match="1 image placeholders"):
        family.expand(tokenizer.encode("<|vision_start|>", add_special_tokens=False), [])
    for payload in ({}, {"num_tokens": 5}, {"num_tokens": TOKENS_PER_IMAGE, "x": 1}):
        with pytest.raises(LayoutError):
            family.check_payload(payload, layout)
    with pytest.raises(LayoutError):
        family.placeholder_layout(5)
    with pytest.raises(ConfigError, match="do_pan_and_scan"):
        _family(tmp_path, tokenizer, do_pan_and_scan=True)
    with pytest.raises(ConfigError, match="resample"):
        _family(tmp_path, tokenizer, resample=3)
