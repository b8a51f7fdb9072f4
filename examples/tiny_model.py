"""A tiny Qwen3-VL of random weights for the examples, and a warm-up on the form of answers.

The model has the real architecture, tokenizer class and processor settings; `from_pretrained` loads it like any other.
The warm-up is cross-entropy on conversations that say random things in the right form: format without content, so that
what is learned afterwards is learned from reward.
"""

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pointillist.families import load_family
from pointillist.images import ImageLimits, ImageStore, Sources, StoredImage, decode_rgb, normalize_images
from pointillist.images.store import local_path
from pointillist.pixels import PatchJoiner
from pointillist.render import FolderTokenizer, RawRenderer

BATCH = 16
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
]  # fmt: skip


def build_tokenizer(corpus: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens, in which the words of the corpus are single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [*corpus, "system user assistant tool\n"] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_model(tokenizer: PreTrainedTokenizerFast, **vision: object) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL with random weights; `vision` overrides settings of the vision tower."""
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "max_position_embeddings": 2048, "tie_word_embeddings": True, "eos_token_id": token_id("<|im_end|>"),
            "initializer_range": 0.05,
            "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 1, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128, "num_position_embeddings": 256,
            "deepstack_visual_indexes": [], "initializer_range": 0.05, **vision,
        },
        image_token_id=token_id("<|image_pad|>"), video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"), vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token_id("<|im_end|>")
    return model


def write_processor(folder: Path, patch_size: int = 8) -> None:
    """The image processor's settings."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch_size, "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 1024 * 1024},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def warm_up(
    model: Qwen3VLForConditionalGeneration,
    folder: Path,
    conversation: Callable[[random.Random], list[dict[str, Any]]],
    steps: int,
    seed: int,
    tools: list[dict[str, Any]] | None = None,
) -> None:
    """Cross-entropy on what the assistant says in made-up conversations.

    Args:
        model: Trained in place.
        folder: The model's folder, for tokenizer and processor settings.
        conversation: Makes one.
        steps: Optimiser steps of 16 conversations.
        seed: Of the conversations.
        tools: What they may call.
    """
    family = load_family(str(folder))
    renderer, joiner, chance = RawRenderer(family, FolderTokenizer(folder)), PatchJoiner(family), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
    )
    with tempfile.TemporaryDirectory() as scratch:
        sources = Sources(ImageStore(Path(scratch), ImageLimits()))
        for _ in range(steps):
            ids, labels, pictures = _batch(renderer, sources, [conversation(chance) for _ in range(BATCH)], tools)
            arrays = joiner.join_pixels(pictures)
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(arrays["pixel_values"]),
                image_grid_thw=torch.from_numpy(arrays["image_grid_thw"]),
                mm_token_type_ids=(ids == family.image_token_id).int(),
            ).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def _batch(
    renderer: RawRenderer, sources: Sources, conversations: list[list[dict[str, Any]]], tools: Any
) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Token ids and labels, padded on the right, and the pictures: padding has no label and is not attended to."""
    rows, pictures = [], []
    for messages in conversations:
        images: list[StoredImage] = []
        stored = normalize_images(messages, sources, images)
        rows.append(renderer.render(stored, images, tools=tools, add_generation_prompt=False))
        pictures += [decode_rgb(local_path(image.uri).read_bytes(), ImageLimits()) for image in images]
    length = max(len(row.token_ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), -100)
    for index, row in enumerate(rows):
        tokens, sampled = torch.tensor(row.token_ids), torch.tensor(row.sampled_mask)
        ids[index, : len(tokens)] = tokens
        labels[index, : len(tokens)] = torch.where(sampled, tokens, -100)
    return ids, labels, pictures
