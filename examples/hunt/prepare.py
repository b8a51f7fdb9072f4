"""Makes what the hunt example needs: wide pictures with something in them, and a tiny Qwen3-VL that moves and answers.

    python examples/hunt/prepare.py --data outputs/hunt/data --model outputs/hunt/model --seed 0

A picture is three windows wide: grey noise, with a patch of a colour at the left, in the middle, where the hunt begins,
or at the right. A bright bar in the middle shows the side, where the patch is at one. The model is warmed up for half a
minute on the *form* of a hunt: random moves, then a random colour. Where to move, when to answer and what the colours
are called is left to reinforcement learning.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from renderers.qwen3_vl import Qwen3VLRenderer
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from pointillist.environments.hunt import QUESTION, TOOLS

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_model import SPECIAL_TOKENS, build_model, build_tokenizer, warm_up, write_processor

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220), "yellow": (225, 205, 40)}
CALL = ['\n{"name": "move", "arguments": {"to": "', '"}}\n']
WINDOW, BAR = 32, 12
NUM_TRAIN, NUM_HELDOUT = 512, 128


def paint(colour: str, place: int, noise: np.random.Generator) -> Image.Image:
    """One picture; the patch is in the window that `place` counts from the left."""
    pixels: NDArray[np.float64] = np.full((WINDOW, 3 * WINDOW, 3), 110.0)
    pixels[:, place * WINDOW : (place + 1) * WINDOW] = COLOURS[colour]
    if place != 1:
        bar = WINDOW if place == 0 else 2 * WINDOW - BAR
        pixels[:, bar : bar + BAR] = 250.0
    pixels += noise.normal(0, 25, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_data(folder: Path) -> None:
    """Writes the pictures and the two task lists."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, noise = random.Random(0), np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("heldout", NUM_HELDOUT)):
        lines = []
        for index in range(count):
            colour, name = chance.choice(list(COLOURS)), f"{split}-{index:04d}.png"
            paint(colour, chance.choice([0, 1, 1, 2]), noise).save(folder / name)
            lines.append(json.dumps({"image": name, "answer": colour}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def move(to: str) -> dict[str, Any]:
    """An assistant's message that moves the window."""
    function = {"name": "move", "arguments": json.dumps({"to": to})}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def made_up(data: Path, chance: random.Random) -> list[dict[str, Any]]:
    """A hunt whose moves and whose answer are random, through windows on random places."""

    def view() -> dict[str, Any]:
        picture = Image.open(data / f"train-{chance.randrange(64):04d}.png")
        left = chance.randrange(3) * WINDOW
        return {"type": "image", "image": picture.crop((left, 0, left + WINDOW, WINDOW))}

    messages: list[dict[str, Any]] = [{"role": "user", "content": [view(), {"type": "text", "text": QUESTION}]}]
    while len(messages) < 7 and chance.random() < 0.5:
        messages += [move(chance.choice(["left", "right", "up", "down"])), {"role": "tool", "content": [view()]}]
    return [*messages, {"role": "assistant", "content": chance.choice(list(COLOURS))}]


def phrases(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts between special tokens of a prompt with tools."""
    prompt = Qwen3VLRenderer(tokenizer).render([{"role": "user", "content": QUESTION}], tools=TOOLS)
    text = tokenizer.decode(prompt.token_ids)
    return [part for part in re.split("|".join(map(re.escape, SPECIAL_TOKENS)), text) if len(part) > len(QUESTION)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for pictures and task lists")
    parser.add_argument("--model", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup-steps", type=int, default=300)
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    write_data(args.data)
    print(f"wrote {NUM_TRAIN + NUM_HELDOUT} pictures to {args.data}")
    tokenizer = build_tokenizer([QUESTION, *COLOURS, "left right up down"])
    tokenizer.save_pretrained(args.model)
    # What the template and every call have in common are single tokens: prompts stay short, and calls well-formed.
    tokenizer.add_tokens([*CALL, *phrases(tokenizer)])
    model = build_model(tokenizer)
    model.save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)
    write_processor(args.model)
    warm_up(model, args.model, lambda chance: made_up(args.data, chance), args.warmup_steps, args.seed, TOOLS)
    model.save_pretrained(args.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote Qwen3-VL with {count / 1e6:.2f} M parameters to {args.model}")


if __name__ == "__main__":
    main()
