"""What the benchmarks share: Qwen3-VL's settings, pictures, and interleaved timing."""

import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pointillist.families import Family, ModelFiles, place_image
from pointillist.families.qwen_vl import QwenVLFamily
from pointillist.images import ImageStore
from pointillist.refs import MMImageRef

EXAMPLES = Path(__file__).parent.parent / "examples"
SETTINGS: Mapping[str, Any] = {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
_TOKENS = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4}


class _Files(ModelFiles):
    """Settings of Qwen3-VL without a folder."""

    def __init__(self) -> None:
        super().__init__(Path("Qwen3-VL"))
        self.config = {"model_type": "qwen3_vl", **_TOKENS}
        self.image_processor = dict(SETTINGS)


def qwen3_vl() -> QwenVLFamily:
    """The family under measurement."""
    return QwenVLFamily(_Files())


def picture(width: int, height: int, file_format: str, seed: int = 0) -> bytes:
    """A picture with structure at several scales, so that its file is neither tiny nor noise."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cell, share in ((64, 0.6), (8, 0.25), (2, 0.15)):
        levels = random.integers(0, 256, (-(-height // cell), -(-width // cell), 3), dtype=np.uint8)
        pixels += share * np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format=file_format, quality=85)
    return buffer.getvalue()


def stored_image(family: Family, store: ImageStore, data: bytes, offset: int = 0) -> MMImageRef:
    """Stores an image; what travels of it."""
    stored = store.put(data)
    layout = family.layout(stored.header.width, stored.header.height)
    return place_image(family, stored, layout, offset)


def medians(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a slow moment hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write_tiny_model(folder: Path) -> None:
    """A Qwen3-VL of random weights with the patches of the real one."""
    spec = importlib.util.spec_from_file_location("tiny_model", EXAMPLES / "tiny_model.py")
    if spec is None or spec.loader is None:
        raise ImportError("examples/tiny_model.py is not there")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(tokenizer, depth=2, patch_size=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.write_processor(folder, patch_size=16)


def rss_mb(pid: int | str = "self", *, peak: bool = False) -> float:
    """Resident memory of a process, now or at its highest, in MB."""
    field = "VmHWM:" if peak else "VmRSS:"
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} in /proc/{pid}/status")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone afterwards."""
    return tempfile.TemporaryDirectory(prefix="pointillist-bench-")
