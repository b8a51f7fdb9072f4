"""`make faults-run`: the digits demo while its processes are killed, one after the other, fifteen times.

Every twenty seconds (with some chance in it) `kill -9` hits the inference server, the trainer, the orchestrator or an
environment worker, in turn. The run must mend itself, learn what it learns undisturbed, and have a record in which
every step is there once, every sample was trained once, and every image is what its name says. Prints a report, writes
it to `report.json` in the run's folder, and ends with 1 if something of this is not so.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pointillist.config.run_paths import RunPaths, read_jsonl

VICTIMS = ("inference", "trainer", "orchestrator", "env_worker")
ACCURACY = 0.85
"""Held-out accuracy that the undisturbed demo passes with every seed tried."""


def pids(output_dir: Path, component: str) -> list[int]:
    """Processes of a component, found by their config file."""
    config = str(output_dir / "configs" / f"{component}.toml")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if config in command:
                found.append(int(entry.name))
    return sorted(found)


def torment(process: subprocess.Popen[bytes], output_dir: Path, kills: int, seconds: float) -> list[dict[str, Any]]:
    """Kills until there were enough or the run is over."""
    chance, done, started = random.Random(0), [], time.monotonic()
    metrics = RunPaths(output_dir).metrics / "trainer.jsonl"
    while not read_jsonl(metrics) and process.poll() is None:
        time.sleep(0.2)
    while len(done) < kills and process.poll() is None:
        time.sleep(seconds * chance.uniform(0.8, 1.2))
        victim = VICTIMS[len(done) % len(VICTIMS)]
        while not (targets := pids(output_dir, victim)) and process.poll() is None:
            time.sleep(0.1)  # it is being started again
        if process.poll() is None:
            target = chance.choice(targets)
            os.kill(target, signal.SIGKILL)
            step = max((record["step"] for record in read_jsonl(metrics)), default=0)
            done.append({"second": round(time.monotonic() - started, 1), "victim": victim, "step": step})
            print(f"kill {len(done)}: {victim} ({target}) after step {step}", flush=True)
    return done


def examine(output_dir: Path, max_steps: int) -> dict[str, Any]:
    """What the run's record says."""
    paths = RunPaths(output_dir)
    trainer = read_jsonl(paths.metrics / "trainer.jsonl")
    steps = [record["step"] for record in trainer]
    twice, miscounted = 0, []
    for record in trainer:
        rollouts = read_jsonl(paths.rollout_step(record["step"]) / "rollouts.jsonl")
        ids = [rollout["id"] for rollout in rollouts]
        twice += len(ids) - len(set(ids))
        trained = sum(
            branch["sampled"]
            for rollout in rollouts
            if rollout["advantage"] is not None
            for branch in rollout["branches"]
        )
        # Tokens that the trainer says it trained, against those of the step's record: no sample twice, none left out.
        if trained != record["tokens/trained"]:
            miscounted.append(record["step"])
    verify = subprocess.run(
        [sys.executable, "-m", "pointillist", "store", "verify", "--run", str(output_dir)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    summary = json.loads((output_dir / "summary.json").read_text())
    return {
        "final_accuracy": summary["final_accuracy"],
        "steps_in_order": steps == list(range(1, max_steps + 1)),
        "rollouts_twice_in_a_step": twice,
        "steps_with_other_tokens_than_recorded": miscounted,
        "max_logprob_mismatch": summary["max_logprob_mismatch"],
        "store_verify": verify.stdout.strip().splitlines()[-1:],
        "store_verify_exit_code": verify.returncode,
        "restarts": summary["restarts"],
        "resumes": summary["resumes"],
        "worker_replacements": (paths.logs / "orchestrator.log").read_text().count("ended with code"),
    }


def main() -> int:
    """Runs, kills, examines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--max-steps", type=int, default=200)
    options = parser.parse_args()
    output_dir = options.output_dir.resolve()
    started = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "pointillist", "rl", "@", "examples/digits/rl.toml", "--model.name", options.model,
            "--output-dir", str(output_dir), "--max-steps", str(options.max_steps), "--trainer.ckpt.interval", "5",
            "--orchestrator.workers.count", "2", "--supervision.max_resumes", str(options.kills),
            "--supervision.max_restarts", str(options.kills),
        ]
    )  # fmt: skip
    kills = torment(process, output_dir, options.kills, options.seconds)
    code = process.wait()
    report: dict[str, Any] = {"exit_code": code, "seconds": round(time.monotonic() - started), "kills": kills}
    good = code == 0 and len(kills) == options.kills
    if code == 0:
        report |= examine(output_dir, options.max_steps)
        good = good and (
            report["final_accuracy"] >= ACCURACY
            and report["steps_in_order"]
            and not report["rollouts_twice_in_a_step"]
            and not report["steps_with_other_tokens_than_recorded"]
            and report["store_verify_exit_code"] == 0
        )
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    print("all as it should be" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
