"""Claims: pixels never keep the trainer waiting, and no process grows with the number of images.

    python -m benchmarks.training_run

Two real runs of `pointillist rl` with a tiny Qwen3-VL on the CPU: a few steps with one 1024x1024 JPEG a sample (4,096
patches, so that computing takes longer than materialising), and 200 steps with new 1 MB pictures in every one.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import scratch, write_tiny_model
from pointillist.base.jsonl import read_jsonl

ROOT = Path(__file__).parent.parent
PLOT = ROOT / "benchmarks/results/memory.png"
GROUP = 2


def main() -> None:
    with scratch() as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        waiting = _run(folder, "waiting", steps=6, groups=2, side=1024, noise=False)[1][1:]
        orchestrator, trainer = _run(folder, "memory", steps=200, groups=1, side=592, noise=True)
        size = next((folder / "memory/assets/images").glob("*/*.png")).stat().st_size
    resident = {
        name: [record["memory/resident_mb"] for record in records]
        for name, records in (("orchestrator", orchestrator), ("trainer", trainer))
    }
    _plot(resident, size)
    results = {
        "mm_wait_fraction": sum(r["time/mm_wait"] for r in waiting) / sum(r["time/step"] for r in waiting),
        "materialize_ms_per_image": 1000 * _mean(waiting, "time/mm_materialize") / _mean(waiting, "mm/images_decoded"),
        "compute_ms_per_image": 1000 * _mean(waiting, "time/forward_backward") / _mean(waiting, "mm/images_total"),
        "memory_run_images": len(orchestrator) * GROUP,
        "memory_run_image_mb": size / 1e6,
        **{f"{name}_mb_step_20": values[19] for name, values in resident.items()},
        **{f"{name}_mb_step_200": values[199] for name, values in resident.items()},
        "orchestrator_memory_growth": resident["orchestrator"][199] / resident["orchestrator"][19] - 1,
        "trainer_growth_mb": resident["trainer"][199] - resident["trainer"][19],
    }
    json.dump(results, sys.stdout, indent=2)


def _run(
    folder: Path, name: str, *, steps: int, groups: int, side: int, noise: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics of orchestrator and trainer, by step."""
    arguments = json.dumps({"side": side, "noise": noise, "tasks": steps * groups + 1})
    command = [
        sys.executable, "-m", "pointillist", "rl", "--model.name", folder / "model", "--output-dir", folder / name,
        "--max-steps", steps, "--seq-len", 1200, "--env.id", "benchmarks.big_pictures:BigPictures",
        "--env.args", arguments, "--orchestrator.batch-size", groups * GROUP, "--orchestrator.group-size", GROUP,
        "--orchestrator.sampling.max-tokens", 1, "--orchestrator.eval.interval", 1000,
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=sys.stderr)
    metrics = folder / name / "metrics"
    return list(read_jsonl(metrics / "orchestrator.jsonl")), list(read_jsonl(metrics / "trainer.jsonl"))


def _mean(records: list[dict[str, Any]], key: str) -> float:
    return float(sum(record[key] for record in records)) / len(records)


def _plot(resident: dict[str, list[float]], size: int) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), dpi=120)
    for name, values in resident.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="step", ylabel="resident memory, MB", title=f"{GROUP} samples a step, {size / 1e6:.1f} MB an image")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT)


if __name__ == "__main__":
    main()
