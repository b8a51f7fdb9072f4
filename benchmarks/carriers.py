"""Claim: references keep images out of the orchestrator, and out of the trainer until it needs them.

    python -m benchmarks.carriers

32 rollouts x 10 turns x one 1024x768 JPEG a turn, by three carriers: processed float32 tensors, inline base64,
references. For each, two fresh processes as in a training system: the first holds the conversations and writes one
step's batch, the second reads it and makes the tensors of one rollout after the other. Every process says how much its
resident memory grew at its highest (Linux' VmHWM, reset after its imports), its seconds, and the bytes that went over.
"""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import picture, qwen3_vl, rss_mb, scratch, stored_image
from pointillist.images import ImageLimits, ImageStore, decode_rgb
from pointillist.pixels import PatchJoiner, RawImageMaterializer
from pointillist.refs import MMImageRef

ROLLOUTS = 32
TURNS = 10
CARRIERS = ("tensors", "base64", "refs")
LIMITS = ImageLimits()


class Rollout(msgspec.Struct, array_like=True):
    """One conversation: its pictures in the carrier's form."""

    pixel_values: list[bytes] = []
    data_urls: list[str] = []
    refs: list[MMImageRef] = []


def main() -> None:
    if len(sys.argv) > 1:
        role, carrier, folder = sys.argv[1:]
        print(json.dumps({"hold": _hold, "train": _train}[role](carrier, Path(folder))))
        return
    with scratch() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        for number in range(ROLLOUTS * TURNS):
            (pictures / f"{number}.jpg").write_bytes(picture(1024, 768, "JPEG", number))
        results = {carrier: {role: _child(role, carrier, folder) for role in ("hold", "train")} for carrier in CARRIERS}
    json.dump({"carriers": results}, sys.stdout, indent=2)


def _child(role: str, carrier: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.carriers", role, carrier, folder]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def _hold(carrier: str, folder: Path) -> dict[str, float]:
    """The orchestrator: takes a picture a turn, keeps the conversations, writes the batch."""
    family, store = qwen3_vl(), ImageStore(folder / "store", LIMITS)
    joiner = PatchJoiner(family)
    take: dict[str, Callable[[Rollout, bytes], None]] = {
        "tensors": lambda rollout, data: rollout.pixel_values.append(_pixels(joiner, data)),
        "base64": lambda rollout, data: rollout.data_urls.append(base64.b64encode(data).decode()),
        "refs": lambda rollout, data: rollout.refs.append(stored_image(family, store, data)),
    }
    # One picture before the count, so that libraries are loaded.
    take[carrier](Rollout([], [], []), (folder / "pictures/0.jpg").read_bytes())
    measured = _Growth()
    rollouts = [Rollout([], [], []) for _ in range(ROLLOUTS)]
    for turn in range(TURNS):
        for number, rollout in enumerate(rollouts):
            take[carrier](rollout, (folder / f"pictures/{number * TURNS + turn}.jpg").read_bytes())
    data = msgspec.msgpack.encode(rollouts)
    (folder / "batch").write_bytes(data)
    return {**measured.numbers(), "bytes": len(data)}


def _train(carrier: str, folder: Path) -> dict[str, float]:
    """The trainer: reads the batch, then makes the tensors of each rollout in turn."""
    family = qwen3_vl()
    joiner = PatchJoiner(family)
    reader = RawImageMaterializer(family, [folder / "store"], LIMITS, threads=1, cache_bytes=0)
    joiner.join_pixels([decode_rgb((folder / "pictures/0.jpg").read_bytes(), LIMITS)])
    measured = _Growth()
    rollouts = msgspec.msgpack.decode((folder / "batch").read_bytes(), type=list[Rollout])
    for rollout in rollouts:
        if carrier == "base64":
            joiner.join_pixels([decode_rgb(base64.b64decode(url), LIMITS) for url in rollout.data_urls])
        elif carrier == "refs":
            reader.materialize(rollout.refs)
    return measured.numbers()


def _pixels(joiner: PatchJoiner, data: bytes) -> bytes:
    values: bytes = joiner.join_pixels([decode_rgb(data, LIMITS)])["pixel_values"].tobytes()
    return values


class _Growth:
    """Resident memory and time of this process from now on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._before = rss_mb()
        self._started = time.perf_counter()

    def numbers(self) -> dict[str, Any]:
        return {
            "resident_growth_mb": rss_mb(peak=True) - self._before,
            "seconds": time.perf_counter() - self._started,
        }


if __name__ == "__main__":
    main()
