"""Claims: a layout costs next to nothing, materialising little more than decoding; threads and groups pay.

    python -m benchmarks.pixels

"materialise" is all that a reader does with a reference: open, read, hash, header, decode, resize if needed, patches,
and for float32 and bfloat16 the normalisation. The Hugging Face processor gets the same file. One thread, no cache,
medians of interleaved repeats in one run. With torchvision on the path (`make bench` sees to it) its backend runs too.
"""

import importlib
import importlib.util
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import SETTINGS, medians, picture, qwen3_vl, scratch, stored_image
from pointillist.images import ImageLimits, ImageStore, read_header
from pointillist.images.store import local_path
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.levels import PixelDtype

PICTURES = [
    (512, 512, "JPEG"), (1024, 1024, "JPEG"), (1024, 1024, "PNG"), (1920, 1080, "JPEG"), (4000, 3000, "JPEG"),
]  # fmt: skip
LAYOUTS = 20
BATCH = 64
GROUP = 16


def main() -> None:
    torch.set_num_threads(1)
    with scratch() as folder:
        store = ImageStore(Path(folder), ImageLimits())
        pictures = {f"{w}x{h} {kind}": _measure(store, w, h, kind) for w, h, kind in PICTURES}
        results = {"pictures": pictures, **_ratios(pictures), **_threads(store), **_group(store)}
    json.dump(results, sys.stdout, indent=2)


def _processors() -> dict[str, Callable[..., object]]:
    """The Hugging Face processors that can be had here."""
    with_torchvision = importlib.util.find_spec("torchvision") is not None
    if with_torchvision:
        importlib.import_module("tests.torchvision_operators").declare()
    pil = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processors: dict[str, Callable[..., object]] = {"hf_pil": pil.Qwen2VLImageProcessorPil(**SETTINGS)}
    if with_torchvision:
        fast = importlib.import_module("transformers.models.qwen2_vl.image_processing_qwen2_vl")
        processors["hf_torchvision"] = fast.Qwen2VLImageProcessor(**SETTINGS)
    return processors


def _measure(store: ImageStore, width: int, height: int, kind: str) -> dict[str, float]:
    """Milliseconds of each way for one picture."""
    family, limits = qwen3_vl(), ImageLimits()
    data = picture(width, height, kind)
    ref = stored_image(family, store, data)
    path = local_path(ref.uri)
    reader = RawImageMaterializer(family, [store.root], limits, threads=1, cache_bytes=0)

    def layouts() -> None:
        for _ in range(LAYOUTS):  # one alone would measure the caches that the others left cold
            header = read_header(data, limits)
            family.layout(header.width, header.height)

    def ours(dtype: PixelDtype) -> Callable[[], object]:
        return lambda: reader.materialize([ref], dtype)

    def theirs(processor: Callable[..., object]) -> Callable[[], object]:
        return lambda: processor(images=[Image.open(path).convert("RGB")], return_tensors="pt")

    # What is compared with decoding alone takes turns with it; the processors, which free tens of megabytes at every
    # call and so make the next one pay for fresh pages, take turns with what is compared with them.
    small: dict[str, Callable[[], object]] = {
        "decode": lambda: Image.open(io.BytesIO(data)).load(),
        "uint8": ours("uint8"),
    }
    large: dict[str, Callable[[], object]] = {
        "layout": layouts,
        "uint8_beside_hf": ours("uint8"),
        "bfloat16": ours("bfloat16"),
        "float32": ours("float32"),
        **{name: theirs(processor) for name, processor in _processors().items()},
    }
    repeats = 7 if width > 2000 else 25
    seconds = medians(small, repeats) | medians(large, repeats)
    milliseconds = {name: value * 1000 for name, value in seconds.items()}
    return {**milliseconds, "layout": milliseconds["layout"] / LAYOUTS, "file_kb": len(data) / 1000}


def _ratios(pictures: dict[str, dict[str, float]]) -> dict[str, float]:
    jpeg, hd = pictures["1024x1024 JPEG"], pictures["1920x1080 JPEG"]
    return {
        "layout_speedup": jpeg["hf_pil"] / jpeg["layout"],
        "materialize_f32_speedup_1024": jpeg["hf_pil"] / jpeg["float32"],
        "materialize_u8_speedup_1024": jpeg["hf_pil"] / jpeg["uint8_beside_hf"],
        "materialize_u8_over_decode_1024": jpeg["uint8"] / jpeg["decode"],
        "resize_speedup_1080p": hd["hf_pil"] / hd["float32"],
    }


def _threads(store: ImageStore) -> dict[str, float]:
    family = qwen3_vl()
    refs = [stored_image(family, store, picture(1024, 1024, "JPEG", seed)) for seed in range(BATCH)]

    def load(threads: int) -> Callable[[], object]:
        reader = RawImageMaterializer(family, [store.root], ImageLimits(), threads=threads, cache_bytes=0)
        return lambda: reader.materialize_many(refs)

    seconds = medians({"one": load(1), "two": load(2)}, repeats=9)
    return {
        "threads_speedup": seconds["one"] / seconds["two"],
        "images_per_second_one_thread": BATCH / seconds["one"],
        "images_per_second_two_threads": BATCH / seconds["two"],
    }


def _group(store: ImageStore) -> dict[str, float]:
    """16 rollouts share one prompt: float32 tensors of the group, each distinct image once or one copy a rollout."""
    family = qwen3_vl()
    ref = stored_image(family, store, picture(1024, 1024, "JPEG"))

    def reader() -> RawImageMaterializer:
        return RawImageMaterializer(family, [store.root], ImageLimits(), threads=1, cache_bytes=0)

    def shared(mine: RawImageMaterializer) -> Any:
        return mine.tensors(mine.materialize_many([ref] * GROUP).images)

    def each(mine: RawImageMaterializer) -> Any:
        return [mine.materialize([ref]) for _ in range(GROUP)]

    def peak(function: Callable[[RawImageMaterializer], Any]) -> int:
        tracemalloc.start()
        kept = function(reader())  # a new one: the buffer that it reuses counts
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del kept
        return top

    one, other = reader(), reader()
    seconds = medians({"shared": lambda: shared(one), "each": lambda: each(other)}, repeats=9)
    return {
        "group_time_ratio": seconds["each"] / seconds["shared"],
        "group_memory_ratio": peak(each) / peak(shared),
    }


if __name__ == "__main__":
    main()
