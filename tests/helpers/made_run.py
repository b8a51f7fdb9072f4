"""A small run folder with everything in it that the viewer shows, and hostile text wherever text can come from."""

import json
from pathlib import Path
from typing import Any

from pointillist.images import ImageLimits, ImageStore, StoredImage
from pointillist.images.store import local_path
from pointillist.runs.paths import RunPaths
from tests.helpers.pictures import encoded, picture

HOSTILE = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'javascript:window.hacked=1{{7*7}}"
LINK = "javascript:window.hacked=1"


def piece(offset: int, *texts: str) -> dict[str, Any]:
    return {"offset": offset, "texts": list(texts), "logprobs": [-0.1 * (index + 1) for index in range(len(texts))]}


def image_part(image: StoredImage) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image.uri}}


def span(image: StoredImage, offset: int) -> dict[str, Any]:
    return {"item": {"raw_image_uri": image.uri}, "hash": image.sha256, "offset": offset, "length": 4}


class MadeRun:
    """Steps of four groups of four rollouts, one failed; the last rollout of step 1 is hostile; one evaluation."""

    def __init__(self, root: Path, steps: int = 3) -> None:
        self.paths = RunPaths(root)
        self.store = ImageStore(root / "assets" / "images", ImageLimits())
        self.images = [self.store.put(encoded(picture(40 + seed, 40, seed))) for seed in range(6)]
        self.metrics: dict[str, list[dict[str, Any]]] = {"trainer": [], "orchestrator": [], "eval": []}
        for step in range(1, steps + 1):
            self.add_step(step)
        self.write(self.paths.eval_file(0), [self.rollout(f"eval_0.{i}", "evaluated") for i in range(4)])

    def add_step(self, step: int) -> None:
        records = [
            self.rollout(f"{step}.{group}.{member}", "zero_variance" if group == 3 else "sent")
            for group in range(4)
            for member in range(4)
        ]
        records[5] |= {"outcome": "failed", "reward": None, "advantage": None, "branches": []}
        records[5]["error"] = {"kind": "ValueError", "message": f"can not {HOSTILE}"}
        if step == 1:
            records[-1] = self.hostile("1.3.3")
        self.write(self.paths.rollouts_file(step), records)
        self.add_metrics(step)

    def add_metrics(self, step: int) -> None:
        value = 1 / (step + 1)
        images = {"mm/images_total": 20, "mm/hit_rate": value, "mm/images_missing": 0, "mm/samples_quarantined": 0}
        trainer = {"loss": value, "entropy": value, "mismatch/mean_abs": 1e-7, "off_policy/mean": 0.0, **images}
        times = {"time/step": 1.0, "time/wait_for_batch": value}
        for name, record in (
            ("trainer", {**trainer, **times}),
            ("orchestrator", {"reward/mean": 1 - value, "errors/dropped": 1, "time/rollouts": value}),
            ("eval", {"eval/accuracy": 1 - value}),
        ):
            self.metrics[name].append({"step": step, **record})
            self.write(self.paths.metrics / f"{name}.jsonl", self.metrics[name])

    def rollout(self, rollout_id: str, outcome: str) -> dict[str, Any]:
        number = sum(map(ord, rollout_id))
        images = [self.images[number % 5], self.images[(number + 1) % 5]]
        call = {"id": "c", "type": "function", "function": {"name": "zoom", "arguments": '{"by": 2}'}}
        messages = [
            {"role": "user", "content": [image_part(images[0]), {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": [image_part(images[1])], "tool_call_id": "c"},
            {"role": "assistant", "content": "a cat"},
        ]
        branch = {
            "tokens": 40, "sampled": 5, "overlong": False, "messages": messages,
            "sampled_pieces": [piece(12, "<tool", "call>"), piece(30, "a", " cat", "<end>")],
            "images": [span(images[0], 4), span(images[1], 20)],
        }  # fmt: skip
        evaluated = outcome == "evaluated"
        return {
            "id": rollout_id, "group": "eval.t" if evaluated else rollout_id.rpartition(".")[0],
            "split": "eval" if evaluated else "train", "env": "hunt", "task": f"task-{number % 7}", "answer": "a cat",
            "reward": float(number % 2), "advantage": number % 2 - 0.5 if outcome == "sent" else None,
            "outcome": outcome, "error": None, "turns": 2, "versions": [0, 1], "branches": [branch],
        }  # fmt: skip

    def hostile(self, rollout_id: str) -> dict[str, Any]:
        record = self.rollout(rollout_id, "sent")
        record |= {"task": HOSTILE, "env": HOSTILE}
        branch = record["branches"][0]
        call = {"function": {"name": HOSTILE, "arguments": json.dumps({"a": HOSTILE})}}
        linked = [{"type": "image_url", "image_url": {"url": LINK}}, {"type": "text", "text": LINK}]
        branch["messages"] = [
            {"role": HOSTILE, "content": HOSTILE},
            {"role": "user", "content": linked},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
            {"role": "assistant", "content": HOSTILE, "reasoning_content": HOSTILE, "tool_calls": [call]},
        ]
        branch["sampled_pieces"] = [piece(9, HOSTILE)]
        return record

    def damage(self) -> None:
        """One image is gone, one is other bytes; the trainer has met both."""
        local_path(self.images[0].uri).unlink()
        local_path(self.images[1].uri).write_bytes(b"rotten")
        faults = [
            {"kind": kind, "step": 1, "sample_id": sample, "uri": image.uri, "sha256": image.sha256, "message": "why"}
            for kind, sample, image in (("missing", "1.0.0.0", self.images[0]), ("corrupt", "1.0.1.0", self.images[1]))
        ]
        self.write(self.paths.faults, faults)

    @staticmethod
    def write(path: Path, records: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
