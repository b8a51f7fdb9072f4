"""A small run folder for monitors to read, and readers of the files that monitors write."""

import json
import struct
from pathlib import Path
from typing import Any

from pointillist.base.jsonl import append_jsonl
from pointillist.images import ImageLimits, ImageStore
from pointillist.runs.paths import RunPaths
from tests.helpers.pictures import encoded, picture


class Run:
    """A run folder whose every step has three rollouts: of one picture, of another, of both."""

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root)
        store = ImageStore(root / "assets" / "images", ImageLimits())
        self.images = [store.put(encoded(picture(32, 32, 0))), store.put(encoded(picture(32, 32, 1), "JPEG"))]

    def step(self, step: int, loss: float = 0.5) -> None:
        folder = self.paths.rollout_step(step)
        folder.mkdir(parents=True, exist_ok=True)
        shown = [self.images[:1], self.images[1:], self.images]
        lines = [json.dumps(self._record(f"{step}.0.{n}", images)) for n, images in enumerate(shown)]
        (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
        append_jsonl(self.paths.metrics / "orchestrator.jsonl", {"step": step, "reward/mean": 0.25})
        append_jsonl(self.paths.metrics / "trainer.jsonl", {"step": step, "loss": loss})

    def _record(self, name: str, images: list[Any]) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": image.uri}} for image in images]
        call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}
        messages = [
            {"role": "user", "content": [*parts, {"type": "text", "text": "what | is this?"}]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "nothing"},
            {"role": "assistant", "content": "an <b>orange</b>"},
        ]
        return {"id": name, "task": "0", "reward": 1.0, "advantage": None, "branches": [{"messages": messages}]}


def tensorboard_values(folder: Path) -> list[tuple[int, Any]]:
    """`(step, value)` of everything in the one event file of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (path,) = folder.iterdir()
    return [(event.step, value) for event in EventFileLoader(str(path)).Load() for value in event.summary.value]


def wandb_records(path: Path) -> list[Any]:
    """The library has no reader. The file is a log of LevelDB: 7 bytes, blocks of 32 KiB, records in parts."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: zeros up to the next block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def wandb_history(path: Path) -> list[dict[str, str]]:
    """What was logged, each value as JSON."""
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]
