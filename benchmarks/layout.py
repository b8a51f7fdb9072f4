"""Claim: the layout of an image from its header costs next to nothing beside the image processor that it replaces.

    python benchmarks/layout.py

For each picture: `read_header` + `layout` (what the environment side does), decode + `materialize` (what server
and trainer do), and the Hugging Face processor on the same file; medians of interleaved repeats in one run, one thread.
"""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pointillist.families import ModelFiles
from pointillist.families.qwen_vl import QwenVLFamily
from pointillist.images import ImageLimits, decode_rgb, read_header

REPEATS = 9
SETTINGS = {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
TOKENS = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4}


class _Files(ModelFiles):
    """Settings of Qwen3-VL without a folder."""

    def __init__(self) -> None:
        super().__init__(Path("Qwen3-VL"))
        self.config = {"model_type": "qwen3_vl", **TOKENS}
        self.image_processor = SETTINGS


def picture(width: int, height: int, file_format: str) -> bytes:
    """A picture with structure at several scales, so that its file is neither tiny nor noise."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, quality=90)
    return buffer.getvalue()


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    family, limits, processor = QwenVLFamily(_Files()), ImageLimits(), Qwen2VLImageProcessorPil(**SETTINGS)
    print("| picture | layout | materialise | HF processor (PIL) | layout faster by | materialise faster by |")
    print("| --- | --- | --- | --- | --- | --- |")
    for width, height, file_format in (
        (512, 512, "JPEG"),
        (1024, 1024, "JPEG"),
        (1024, 1024, "PNG"),
        (1920, 1080, "JPEG"),
    ):
        data = picture(width, height, file_format)

        def layout(data: bytes = data) -> object:
            header = read_header(data, limits)
            return family.layout(header.width, header.height)

        def materialise(data: bytes = data) -> object:
            header = read_header(data, limits)
            return family.materialize([decode_rgb(data, limits)], [family.layout(header.width, header.height)])

        def reference(data: bytes = data) -> object:
            return processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")

        functions = (layout, materialise, reference)
        times = [[seconds(function) for function in functions] for _ in range(REPEATS)]
        ours, pixels, theirs = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
        print(
            f"| {width}x{height} {file_format} | {ours:.3f} ms | {pixels:.1f} ms | {theirs:.1f} ms | "
            f"{theirs / ours:,.0f}x | {theirs / pixels:.1f}x |"
        )


if __name__ == "__main__":
    main()
