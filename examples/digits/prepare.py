"""Makes what the digits example needs: the pictures, and a tiny Qwen3-VL that can answer but not read.

    python examples/digits/prepare.py --data outputs/digits/data --model outputs/digits/model --seed 0

Data: the 1,797 handwritten digits of the UCI set that scikit-learn ships, enlarged to 32x32 and written as PNG files;
1,400 to train, 397 held out. Model: Qwen3-VL's architecture from a config, random weights, a tokenizer of a few hundred
tokens. It is then warmed up for seconds on the answer's *form*: one digit, then the end of the turn. The digits it is
shown there are random numbers, so it stays at chance; reading is left to reinforcement learning.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.utils import logging

from pointillist.environments.digits import QUESTION
from pointillist.families import PatchJoiner, load_family

TRAIN_DIGITS = 1400
IMAGE_SIDE = 32
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
]  # fmt: skip


def write_data(folder: Path) -> None:
    """Writes the pictures and the two task lists."""
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, list[str]] = {"train": [], "heldout": []}
    for index, (levels, answer) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"{index:04d}.png"
        image = Image.fromarray((levels / 16 * 255).astype(np.uint8))
        image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(folder / name)
        split = "train" if index < TRAIN_DIGITS else "heldout"
        tasks[split].append(json.dumps({"image": name, "answer": str(answer)}))
    for split, lines in tasks.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [QUESTION, "system user assistant tool\n"] * 50
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


def warm_up_format(model: Qwen3VLForConditionalGeneration, folder: Path, data: Path, steps: int) -> None:
    """Cross-entropy on a random digit and the end of the turn: form without content."""
    from transformers import AutoTokenizer

    tokenizer, family = AutoTokenizer.from_pretrained(folder), load_family(str(folder))
    layout = family.layout(IMAGE_SIDE, IMAGE_SIDE)
    joiner = PatchJoiner(family)
    pictures = [np.asarray(Image.open(data / f"{index:04d}.png").convert("RGB")) for index in range(256)]
    prompt = tokenizer.encode(
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = family.expand(prompt, [layout]).token_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = torch.tensor([[tokenizer.encode(str(digit))[0], end] for digit in range(10)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    for _ in range(steps):
        shown = torch.randint(0, len(pictures), (16,)).tolist()
        arrays = joiner.join_pixels([pictures[index] for index in shown])
        labels = answers[torch.randint(0, 10, (len(shown),))]
        ids = torch.cat([torch.tensor(prompt).expand(len(shown), -1), labels], dim=1)
        logits = model(
            input_ids=ids,
            pixel_values=torch.from_numpy(arrays["pixel_values"]),
            image_grid_thw=torch.from_numpy(arrays["image_grid_thw"]),
            mm_token_type_ids=(ids == family.image_token_id).int(),
            logits_to_keep=3,
        ).logits
        loss = functional.cross_entropy(logits[:, :2].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for pictures and task lists")
    parser.add_argument("--model", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup-steps", type=int, default=60)
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    write_data(args.data)
    print(f"wrote 1,797 pictures to {args.data}")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)
    write_processor(args.model)
    warm_up_format(model, args.model, args.data, args.warmup_steps)
    model.save_pretrained(args.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote Qwen3-VL with {count / 1e6:.2f} M parameters to {args.model}")


if __name__ == "__main__":
    main()
