"""Makes what the digits example needs: the pictures, and a tiny Qwen3-VL that can answer but not read.

    python examples/digits/prepare.py --data outputs/digits/data --model outputs/digits/model --seed 0

Data: the 1,797 handwritten digits of the UCI set that scikit-learn ships, enlarged to 32x32 and written as PNG files;
1,400 to train, 397 held out. Model: Qwen3-VL's architecture from a config, random weights, a tokenizer of a few hundred
tokens. It is then warmed up for seconds on the answer's *form*: one digit, then the end of the turn. The digits it is
shown there are random numbers, so it stays at chance; reading is left to reinforcement learning.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers.utils import logging

from pointillist.environments.digits import QUESTION

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_model import build_model, build_tokenizer, warm_up, write_processor

CORPUS = [QUESTION]
TRAIN_DIGITS = 1400
IMAGE_SIDE = 32


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


def made_up(data: Path, chance: random.Random) -> list[dict[str, Any]]:
    """A digit, and a random number for an answer."""
    picture = {"type": "image", "image": data / f"{chance.randrange(256):04d}.png"}
    ask = {"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}
    return [ask, {"role": "assistant", "content": str(chance.randrange(10))}]


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
    tokenizer = build_tokenizer(CORPUS)
    model = build_model(tokenizer)
    model.save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)
    write_processor(args.model)
    warm_up(model, args.model, lambda chance: made_up(args.data, chance), args.warmup_steps, args.seed)
    model.save_pretrained(args.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote Qwen3-VL with {count / 1e6:.2f} M parameters to {args.model}")


if __name__ == "__main__":
    main()
