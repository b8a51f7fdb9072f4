"""What came of a run: `summary.json`, a table on the terminal, and the learning curve."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from pointillist.base.files import write_atomically
from pointillist.base.json_types import JsonObject
from pointillist.base.jsonl import read_jsonl
from pointillist.config import RLConfig
from pointillist.runs.paths import RunPaths
from pointillist.view.curve import draw_curve

_NO_KINDS: Final = ("dropped", "by_policy", "retried")


def summarize(
    config: RLConfig, paths: RunPaths, console: Console, *, restarts: Mapping[str, int], resumes: int
) -> None:
    """Writes and shows the summary of a finished run.

    Args:
        config: The run's config.
        paths: The run's folder.
        console: Console that shows the summary.
        restarts: Number of restarts of each process.
        resumes: Number of times that the run went back to its last checkpoint.
    """
    trainer = read_jsonl(paths.metrics / "trainer.jsonl")
    orchestrator = read_jsonl(paths.metrics / "orchestrator.jsonl")
    evals = read_jsonl(paths.metrics / "eval.jsonl")
    summary = {**build_summary(trainer, orchestrator, evals), "restarts": dict(restarts), "resumes": resumes}
    write_atomically(paths.output_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    curve = paths.output_dir / "curve.png"
    draw_curve(orchestrator, evals, curve, title=f"{config.env.id}: {Path(config.model.name).name}")
    table = Table(title="summary", show_header=False)
    for key, value in summary.items():
        table.add_row(key, _shown(value))
    console.print(table)
    if (step := summary["solved_at_step"]) is not None:
        console.print(
            f"solved at step {step}: every rollout had at least the reward orchestrator.solved_reward = "
            f"{config.orchestrator.solved_reward:g}", highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"learning curve: {curve}", highlight=False, soft_wrap=True)
    console.print(f"trained model:  {paths.model}", highlight=False, soft_wrap=True)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def by_kind(records: list[JsonObject], prefix: str) -> dict[str, int]:
    """How many rollouts failed, by kind of failure: sums of the metrics `<prefix><kind>`."""
    counts: Counter[str] = Counter()
    for record in records:
        for name, value in record.items():
            kind = name.removeprefix(prefix)
            if kind != name and kind not in _NO_KINDS:
                counts[kind] += value
    return dict(counts.most_common())


def build_summary(trainer: list[JsonObject], orchestrator: list[JsonObject], evals: list[JsonObject]) -> JsonObject:
    """The summary's numbers, each as measured in this run.

    Args:
        trainer: Records of `metrics/trainer.jsonl`.
        orchestrator: Records of `metrics/orchestrator.jsonl`.
        evals: Records of `metrics/eval.jsonl`.
    """
    images = [record for record in orchestrator if record["mm/images"]]
    return {
        "initial_accuracy": evals[0]["eval/accuracy"] if evals else None,
        "final_accuracy": evals[-1]["eval/accuracy"] if evals else None,
        # Failed ones have answered nothing: they are in the accuracy, as wrong.
        "final_eval_tasks": evals[-1]["eval/tasks"] if evals else None,
        "final_eval_failed": by_kind(evals[-1:], "eval/failed/") if evals else None,
        "steps": trainer[-1]["step"] if trainer else 0,
        "solved_at_step": next((record["step"] for record in orchestrator if record.get("solved")), None),
        "train_seconds": sum(record["time/step"] for record in trainer),
        "rollouts": sum(record["rollouts/total"] for record in orchestrator),
        "rollouts_dropped": sum(record["errors/dropped"] for record in orchestrator),
        "rollouts_failed": by_kind(orchestrator, "errors/"),
        "images_materialized": int(sum(record["mm/images_materialized"] for record in trainer)),
        "image_wait_fraction": sum(record["time/mm_wait"] for record in trainer)
        / max(sum(record["time/step"] for record in trainer), 1e-9),
        "max_logprob_mismatch": max((record["mismatch/mean_abs"] for record in trainer), default=None),
        "mm_bytes_per_image": max((record["mm/bytes_per_image"] for record in images), default=None),
        "torch_in_orchestrator": any(record["torch_imported"] for record in evals),
    }
