"""Tiny models, compared with what Hugging Face's own processor and model give."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from pointillist.families import place_image
from pointillist.images import ImageLimits, ImageStore
from pointillist.models import LoadedModel
from pointillist.orchestrator.packing import pack
from pointillist.pixels import RawImageMaterializer
from pointillist.refs import MMRefs, mm_token_type_ids
from pointillist.trainer.packing_check import PackingProof, check_packing
from pointillist.trainer.policy_model import PolicyModel
from pointillist.trainer.rows import RowLoader
from pointillist.transport import TrainingSample
from tests.helpers.pictures import encoded, picture


def save_scaled(model: Any, tokenizer: Any, folder: Path, factor: float) -> None:
    """Saves a model with its matrices scaled up: nearly uniform logits would hide leaks and blank pictures."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_sample(loaded: LoadedModel, store: ImageStore, sizes: list[tuple[int, int]], seed: int) -> TrainingSample:
    random, family = np.random.default_rng(seed), loaded.family
    ids: list[int] = random.integers(20, 280, 4).tolist()
    refs = []
    for index, (width, height) in enumerate(sizes):
        stored, layout = store.put(encoded(picture(width, height, seed + index))), family.layout(width, height)
        refs.append(place_image(family, stored, layout, len(ids) + 1))
        ids += [3, *[family.image_token_id] * layout.num_tokens, 4]
    ids += random.integers(20, 280, 6).tolist()
    trained = [index >= len(ids) - 4 for index in range(len(ids))]
    return TrainingSample(
        token_ids=ids, loss_mask=trained, logprobs_sampled=[0.0] * len(ids), advantages=[float(on) for on in trained],
        weight_versions=[0] * len(ids), temperatures=[1.0] * len(ids),
            mm_refs=MMRefs(refs) if refs else None, sample_id=str(seed),
        mm_token_type_ids=mm_token_type_ids(ids, family.image_token_id),
    )  # fmt: skip


def _huggingface(folder: Path, loaded: LoadedModel, sample: TrainingSample, *, blank: bool) -> torch.Tensor:
    from PIL import Image

    model, ids = AutoModelForImageTextToText.from_pretrained(folder).eval(), torch.tensor([sample.token_ids])
    kwargs: dict[str, Any] = {}
    if sample.mm_refs is not None:
        pictures = [Image.open(image.uri.removeprefix("file://")).convert("RGB") for image in sample.mm_refs.images]
        if blank:
            pictures = [Image.new("RGB", each.size) for each in pictures]
        kwargs = dict(AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt"))
        kwargs.pop("num_crops", None)
        policy = loaded.family.forward_args
        if policy.requires_mm_token_type_ids:
            kwargs[policy.token_types_argument] = torch.tensor([sample.mm_token_type_ids]).int()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **kwargs).logits[0]
    logits[:, loaded.unsampleable] = float("-inf")
    where = torch.tensor([index for index, on in enumerate(sample.loss_mask) if on])
    return logits.log_softmax(-1)[where - 1].gather(1, ids[0, where, None])[:, 0]


def check_against_huggingface(folder: Path, loaded: LoadedModel, store: ImageStore) -> PackingProof:
    """Forward and backward from references, compared with each sample alone by the model's own processor."""
    policy = PolicyModel(loaded)
    proof = check_packing(policy, loaded)
    assert proof.padded < 1e-4
    sizes = [[(64, 64)], [], [(100, 70), (300, 84)]]
    samples = [small_sample(loaded, store, each, seed) for seed, each in enumerate(sizes)]
    ((row,),) = pack(samples, seq_len=256, num_workers=1)
    loader = RowLoader(loaded, RawImageMaterializer(loaded.family, [store.root], ImageLimits()))
    loader.packed = proof.can_pack
    stats = policy(loader.load(row))
    by_id = {sample.sample_id: sample for sample in samples}
    order = [by_id[name] for name in row.sample_ids]
    expected = torch.cat([_huggingface(folder, loaded, sample, blank=False) for sample in order])
    assert (stats.logprobs - expected).abs().max() < 1e-5
    blank = torch.cat([_huggingface(folder, loaded, sample, blank=True) for sample in order])
    assert (stats.logprobs - blank).abs().max() > 0.01  # the control
    stats.logprobs.sum().backward()
    # The family's vision modules are all of the model but the language model; each takes part.
    modules = loaded.family.vision_modules
    assert {*modules, "language_model"} == {name for name, _ in loaded.model.model.named_children()}
    for name in modules:
        gradients = [each.grad for each in loaded.model.model.get_submodule(name).parameters()]
        assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients), name
    return proof
