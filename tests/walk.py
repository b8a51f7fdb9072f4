"""`make walk`: the way of one image, from an environment's message to the trainer's forward, function by function.

One process, the real pieces, a tiny Qwen3-VL of random weights and one picture: the digits environment asks, the
session stores and renders, the client writes the request, the server reads it and makes pixels. The session's record
becomes a sample, a row and a batch on the wire; the trainer reads the batch, makes pixels again and runs its forward.
Only the engine is left out (the answer is made up): it is given tensors, as the trainer's model is.

Recorded are all functions of the package that are called in between, in whatever thread. Those of them that have the
image in their hands are on the way: an argument or the result is or contains its bytes, path or URL, its header or
layout, its reference, its pixels, or a message, prompt, branch, sample, row or batch with it. None is left out by name.
Comprehensions, lambdas and generator expressions belong to the function that holds them. What a process does once,
before any image is there (loading the model, opening the store), is not on the way.
"""

import asyncio
import hashlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image

import pointillist
from pointillist.environments.digits import QUESTION, DigitsEnvironment
from pointillist.families import ImageLayout
from pointillist.images import ImageHeader, ImageLimits, ImageStore, Sources
from pointillist.inference.prompt import check_prompt, pixel_bytes
from pointillist.inference.protocol import GenerateRequest, decode_body
from pointillist.models import load_model
from pointillist.orchestrator.packing import pack
from pointillist.orchestrator.samples import make_sample
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.on_device import as_tensors
from pointillist.refs import MMImageRef
from pointillist.render import RawRenderer
from pointillist.sessions import InferenceClient, Sampling, Session
from pointillist.trainer.policy_model import PolicyModel
from pointillist.trainer.rows import RowLoader
from pointillist.transport import RankBatch, decode_rank_batch, encode_rank_batch

PACKAGE = f"{Path(pointillist.__file__).parent}/"
SIDE = 32
ANSWER = {"token_ids": [8, 2], "logprobs": {"content": [{"logprob": -1.0}] * 2}, "finish_reason": "stop", "index": 0}
_DEEPEST = 7
"""Containers within each other that are looked into."""


@dataclass(slots=True)
class Walk:
    """What was recorded."""

    marks: tuple[str, ...]
    """Texts by which the image is recognised: its file's name, its hash, a reference's prefix."""
    functions: dict[tuple[str, str], None] = field(default_factory=dict)
    """Module and name of each function, in order of the first call."""
    holding: set[tuple[str, str]] = field(default_factory=set)
    """Those that had the image in their hands."""

    def on_the_way(self) -> list[tuple[str, str]]:
        """Functions that hold the image, in order of the first call."""
        return [each for each in self.functions if each in self.holding]

    def visits(self) -> list[str]:
        """Modules along the way; one that is left and entered again stands there again."""
        return [module for module, _ in groupby(self.on_the_way(), key=lambda each: each[0])]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records this thread and those that are started meanwhile."""
        threading.setprofile(self._record)
        sys.setprofile(self._record)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _record(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        name = code.co_qualname
        while name.endswith(">"):  # a comprehension, a lambda
            name = name.rpartition(".<locals>.")[0]
        me = (code.co_filename.removeprefix(PACKAGE).removesuffix(".py").replace("/", "."), name)
        self.functions.setdefault(me)
        if me not in self.holding:
            stars = bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]
            if self._holds([frame.f_locals.get(name) for name in names]) or self._holds(argument):
                self.holding.add(me)

    def _holds(self, value: Any, depth: int = _DEEPEST) -> bool:
        """Whether a value is the image in some form, or contains it."""
        match value:
            case str() | Path():
                return any(mark in str(value) for mark in self.marks)
            case bytes() | bytearray():
                return value.startswith(b"\x89PNG") or any(mark.encode() in value for mark in self.marks)
            case np.ndarray() | torch.Tensor():
                return value.ndim > 1 and value.dtype in (np.uint8, torch.uint8)
            case Image.Image() | ImageHeader() | ImageLayout() | MMImageRef():
                return True
            case _ if depth == 0 or isinstance(value, type):
                return False
            case dict():
                parts = [*value, *value.values()]
            case list() | tuple():
                parts = [] if value and isinstance(value[0], int | float) else list(value)
            case partial():
                parts = [*value.args, *value.keywords.values()]
            case msgspec.Struct():
                parts = [getattr(value, name) for name in value.__struct_fields__]
            case _ if is_dataclass(value):
                parts = [getattr(value, each.name, None) for each in fields(value)]
            case _:
                return False
        return any(self._holds(part, depth - 1) for part in parts)


def walk(model: Path, scratch: Path) -> Walk:
    """Walks the way of one picture.

    Args:
        model: Folder of a tiny Qwen3-VL.
        scratch: An empty folder, for the picture and the store.
    """
    data, root = scratch / "data", scratch / "store"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data / "picture.png")
    for split in ("train", "heldout"):
        (data / f"{split}.jsonl").write_text(json.dumps({"image": "picture.png", "answer": "1"}) + "\n")
    loaded = load_model(str(model), device="cpu", dtype="float32")
    environment, store = DigitsEnvironment(str(data)), ImageStore(root, ImageLimits())
    renderer = RawRenderer(loaded.family, loaded.tokenizer)
    # Two processes, so two readers with a cache each.
    server, trainer = (RawImageMaterializer(loaded.family, [root], store.limits) for _ in range(2))
    loader, policy = RowLoader(loaded, trainer), PolicyModel(loaded)

    async def post(path: str, body: bytes, affinity: str, *, max_bytes: int) -> tuple[int, bytes]:
        """The server, without its engine."""
        prompt = check_prompt(decode_body(body, GenerateRequest), server, max_images=1)
        pixel_bytes(prompt, server)
        as_tensors(server.materialize(prompt.images, "uint8"))
        return 200, msgspec.json.encode({"choices": [ANSWER]})

    recorded = Walk(("picture.png", hashlib.sha256((data / "picture.png").read_bytes()).hexdigest(), "mmraw:"))

    async def rollout() -> Session:
        client = InferenceClient(["http://127.0.0.1:1"])
        client._servers.post = post  # type: ignore[method-assign]
        session = Session(renderer, Sources(store), client, Sampling(), seq_len=512, seed=0)
        with recorded.recording():
            await environment.rollout(environment.train_tasks()[0], session)
        await client.aclose()
        return session

    session = asyncio.run(rollout())
    with recorded.recording():
        (branch,) = session.branches
        sample = make_sample(branch, 1.0, image_token_id=loaded.family.image_token_id, sample_id="one")
        ((row,),) = pack([sample], seq_len=512, num_workers=1)
        batch = RankBatch(step=1, micro_batches=[row], num_tokens=2, orchestrator_state=b"")
        (received,) = decode_rank_batch(encode_rank_batch(batch)).micro_batches
        policy(loader.load(received))
    return recorded


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from tiny_model import build_model, build_tokenizer, write_processor

    with tempfile.TemporaryDirectory() as scratch:
        folder, tokenizer = Path(scratch) / "model", build_tokenizer([QUESTION])
        build_model(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_processor(folder)
        recorded = walk(folder, Path(scratch))
    way = recorded.on_the_way()
    for module, group in groupby(way, key=lambda each: each[0]):
        print(f"{module}: {', '.join(name for _, name in group)}")
    visits = recorded.visits()
    print(f"\n{len(way)} functions hold the image, in {len(set(visits))} modules and {len(visits)} visits,")
    others = [f"{module}.{name}" for module, name in recorded.functions if (module, name) not in recorded.holding]
    print(f"of {len(recorded.functions)} that are called in between; the other {len(others)}: {', '.join(others)}")


if __name__ == "__main__":
    main()
