"""Claim: with rollouts that overlap training, the trainer stands idle less, and learns the same.

    python -m benchmarks.overlap

The digits demo twice, one after the other on the same machine: strictly on policy, and with
`max_off_policy_steps = 1`. Server and trainer have one thread each, so that both have a core on two cores. Idle is the
time for which the trainer waits for a batch, as a part of all its time; the first tenth of the steps is left out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import EXAMPLES, scratch
from pointillist.base.jsonl import read_jsonl

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=200)
    max_steps = parser.parse_args().max_steps
    with scratch() as name:
        folder = Path(name)
        _call(EXAMPLES / "digits/prepare.py", "--data", folder / "data", "--model", folder / "model", "--seed", 0)
        runs = {str(bound): _run(folder, bound, max_steps) for bound in (0, 1)}
    results = {
        "overlap_runs": runs,
        "overlap_idle_reduction": 1 - runs["1"]["idle_seconds"] / runs["0"]["idle_seconds"],
        "overlap_accuracy_difference": runs["1"]["final_accuracy"] - runs["0"]["final_accuracy"],
        "overlap_speedup": runs["0"]["seconds"] / runs["1"]["seconds"],
    }
    json.dump(results, sys.stdout, indent=2)


def _run(folder: Path, bound: int, max_steps: int) -> dict[str, Any]:
    output_dir = folder / f"run-{bound}"
    _call(
        "-m", "pointillist", "rl", "@", EXAMPLES / "digits/rl.toml", "--model.name", folder / "model",
        "--env.args.data_dir", folder / "data", "--output-dir", output_dir, "--max-steps", max_steps,
        "--orchestrator.max_off_policy_steps", bound, "--trainer.num_threads", 1, "--inference.engine.num_threads", 1,
    )  # fmt: skip
    trainer = read_jsonl(output_dir / "metrics/trainer.jsonl")
    counted = trainer[max_steps // 10 :]
    seconds = sum(record["time/step"] for record in counted)
    idle = sum(record["time/wait_for_batch"] for record in counted)
    return {
        "seconds": seconds,
        "idle_seconds": idle,
        "idle_fraction": idle / seconds,
        "off_policy_mean": sum(record["off_policy/mean"] for record in counted) / len(counted),
        "ratio_masked": sum(record["ratio/masked"] for record in counted) / len(counted),
        "final_accuracy": read_jsonl(output_dir / "metrics/eval.jsonl")[-1]["eval/accuracy"],
    }


def _call(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=ROOT, stdout=sys.stderr)


if __name__ == "__main__":
    main()
