"""The raw renderer against the Hugging Face processor: the same tokens, without an image processor."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLProcessor

from pointillist.errors import ConfigError, RenderError
from pointillist.images import Sources, StoredImage, normalize_images
from pointillist.refs import encode_features, mm_token_type_ids
from pointillist.render import FolderTokenizer, RawRenderer, unsampleable_token_ids
from tests.helpers.pictures import picture


class _WithoutVideo(Qwen3VLProcessor):
    """Qwen3VLProcessor; its video processor needs torchvision and is never asked for anything here."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


class _NoVideoProcessor:
    merge_size = 2
    model_input_names: list[str] = []


@pytest.fixture(scope="module")
def processor(model_dir: Path) -> Qwen3VLProcessor:
    return _WithoutVideo(
        image_processor=AutoImageProcessor.from_pretrained(model_dir),
        tokenizer=AutoTokenizer.from_pretrained(model_dir),
        video_processor=_NoVideoProcessor(),
    )


def _image(width: int, height: int, seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(width, height, seed)}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


CONVERSATIONS = {
    "one image": [{"role": "user", "content": [_image(64, 64), _text("What digit?")]}],
    "text only": [{"role": "system", "content": "You count."}, {"role": "user", "content": "One, two?"}],
    "several sizes": [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [_text("first "), _image(100, 70), _text(" second "), _image(33, 150, 1)]},
        {"role": "assistant", "content": "Both are noise."},
        {"role": "user", "content": [_image(64, 64, 2), _image(64, 96, 3), _text("and these?")]},
    ],
}


def _template(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """What Qwen3-VL's chat template makes of such messages, and the pictures in order."""
    text, images = "", []
    for message in messages:
        content = message["content"]
        parts = [_text(content)] if isinstance(content, str) else content
        body = ""
        for part in parts:
            if part["type"] == "image":
                images.append(part["image"])
                body += "<|vision_start|><|image_pad|><|vision_end|>"
            else:
                body += part["text"]
        text += f"<|im_start|>{message['role']}\n{body}<|im_end|>\n"
    return text + "<|im_start|>assistant\n", images


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_equal_the_processors(
    name: str, processor: Qwen3VLProcessor, renderer: RawRenderer, sources: Sources
) -> None:
    text, pictures = _template(CONVERSATIONS[name])
    expected = processor(text=[text], images=pictures or None, return_tensors="np")
    images: list[StoredImage] = []
    messages = normalize_images(CONVERSATIONS[name], sources, images)
    prompt = renderer.render(messages, images)
    assert prompt.token_ids == expected["input_ids"][0].tolist()
    assert (
        mm_token_type_ids(prompt.token_ids, renderer.family.image_token_id) == expected["mm_token_type_ids"][0].tolist()
    )
    grids = [image.item["payload"]["image_grid_thw"] for image in prompt.images]
    assert grids == (expected["image_grid_thw"].tolist() if pictures else [])
    pad = renderer.family.image_token_id
    covered = [i for image in prompt.images for i in range(image.offset, image.offset + image.length)]
    assert covered == [i for i, token in enumerate(prompt.token_ids) if token == pad]


def test_attribution_runs_along_the_expanded_tokens(renderer: RawRenderer, sources: Sources) -> None:
    images: list[StoredImage] = []
    messages = normalize_images(CONVERSATIONS["several sizes"], sources, images)
    prompt = renderer.render(messages, images, add_generation_prompt=False)
    assert (
        len({len(prompt.token_ids), len(prompt.message_indices), len(prompt.sampled_mask), len(prompt.is_content)}) == 1
    )
    sampled = [token for token, on in zip(prompt.token_ids, prompt.sampled_mask, strict=True) if on]
    assert renderer.tokenizer.decode(sampled) == "Both are noise.<|im_end|>"
    for image, message in zip(prompt.images, (1, 1, 3, 3), strict=True):
        span = slice(image.offset, image.offset + image.length)
        assert set(prompt.message_indices[span]) == {message}
        assert all(prompt.is_content[span])


def test_bridging_extends_the_expanded_prompt(renderer: RawRenderer, sources: Sources) -> None:
    images: list[StoredImage] = []
    first = normalize_images([{"role": "user", "content": [_image(64, 64), _text("a?")]}], sources, images)
    prompt = renderer.render(first, images)
    completion = [*renderer.tokenizer.encode("it is b"), renderer.stop_token_ids[0]]
    new = normalize_images([{"role": "user", "content": [_image(100, 70, 1), _text("and?")]}], sources, images)
    bridged = renderer.bridge(prompt.logical_ids, completion, new, images)
    assert bridged is not None
    so_far = [*prompt.token_ids, *completion]
    assert bridged.token_ids[: len(so_far)] == so_far
    whole = renderer.render([*first, {"role": "assistant", "content": "it is b"}, *new], images)
    assert bridged.token_ids == whole.token_ids
    assert bridged.images == whole.images


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|video_pad|>"])
def test_media_tokens_in_text_are_refused(token: str, renderer: RawRenderer) -> None:
    with pytest.raises(RenderError, match="media token"):
        renderer.render([{"role": "user", "content": f"look: {token}"}], [])


def test_unknown_roles_are_refused(renderer: RawRenderer) -> None:
    with pytest.raises(RenderError, match="role"):
        renderer.render([{"role": "narrator", "content": "once"}], [])


def test_features_are_the_inference_wires(renderer: RawRenderer, sources: Sources) -> None:
    images: list[StoredImage] = []
    messages = normalize_images(CONVERSATIONS["one image"], sources, images)
    features = encode_features(renderer.render(messages, images).images)
    assert features is not None
    assert features["mm_hashes"] == {"image": [images[0].sha256]}
    assert features["mm_placeholders"]["image"][0]["length"] == 4
    assert features["kwargs_data"]["image"][0].startswith("mmraw:")
    assert encode_features(renderer.render([{"role": "user", "content": "x"}], []).images) is None


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_folder_tokenizer_equals_transformers(model_dir: Path, text: str) -> None:
    ours, theirs = _tokenizers(model_dir)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


def _tokenizers(folder: Path, _cache: dict[Path, Any] = {}) -> Any:  # noqa: B006
    if folder not in _cache:
        _cache[folder] = (FolderTokenizer(folder), AutoTokenizer.from_pretrained(folder))
    return _cache[folder]


def test_folder_tokenizer_properties(model_dir: Path, tmp_path: Path) -> None:
    ours, theirs = _tokenizers(model_dir)
    assert len(ours) == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.convert_tokens_to_ids("<|image_pad|>") == theirs.convert_tokens_to_ids("<|image_pad|>")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        FolderTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        FolderTokenizer(tmp_path)


def test_the_policy_can_sample_text_only(renderer: RawRenderer) -> None:
    ids = unsampleable_token_ids(renderer.family, renderer.tokenizer, len(renderer.tokenizer) + 3)
    assert renderer.family.vision_token_ids <= set(ids)
    assert ids[-3:] == list(range(len(renderer.tokenizer), len(renderer.tokenizer) + 3))
    assert renderer.stop_token_ids[0] not in ids
