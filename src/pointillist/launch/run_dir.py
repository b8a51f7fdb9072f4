"""The output folder before a run: refused if it holds another run, cleaned of undone steps on resume."""

import json
import shutil
from pathlib import Path

from pointillist.config import own_image_dir
from pointillist.config.run_paths import (
    RunPaths,
    evals_in,
    latest_checkpoint,
    read_jsonl,
    remove_steps_after,
    write_atomically,
)
from pointillist.errors import LaunchError
from pointillist.images.inventory import collect_garbage

METRIC_FILES = ("trainer.jsonl", "orchestrator.jsonl", "eval.jsonl")


def check_fresh(paths: RunPaths) -> None:
    """Makes sure that nothing of an earlier run is overwritten.

    Raises:
        LaunchError: The folder holds a run, or something that is none.
    """
    if not paths.output_dir.exists():
        return
    if not paths.output_dir.is_dir():
        raise LaunchError(f"output_dir {paths.output_dir} is not a folder")
    # A dry run leaves configs alone; they are written anew.
    found = sorted(path.name for path in paths.output_dir.iterdir() if path != paths.configs)
    if found:
        raise LaunchError(
            f"output_dir {paths.output_dir} already holds {', '.join(found[:4])}: choose another output_dir, or "
            "continue that run with --resume"
        )


def resume_step(paths: RunPaths) -> int:
    """Step of a run's last complete checkpoint; 0, its beginning, if it died before the first.

    Raises:
        LaunchError: There is no run, or its checkpoints came out of an archive.
    """
    if not (paths.configs / "rl.toml").is_file():
        raise LaunchError(f"nothing to resume: {paths.output_dir} holds no run")
    if paths.imported.exists():
        raise LaunchError(f"checkpoints of an imported run are programs; if you trust them, remove {paths.imported}")
    return latest_checkpoint(paths) or 0


def rewind(paths: RunPaths, step: int) -> None:
    """Takes a run back to a step: removes what came after it; none of its processes may be alive but servers."""
    # Writers that were killed may have left half a file each; none of them lives now.
    own_store = own_image_dir(paths.output_dir)
    collect_garbage(own_store, keep=None, older_than=0.0, dry_run=False)
    remove_steps_after(paths.rollouts, step)
    for version in evals_in(paths.rollouts):
        if version > step:
            paths.eval_file(version).unlink()
    remove_steps_after(paths.broadcasts, step - 1)  # the trainer broadcasts the resumed weights itself
    for half in paths.checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(half)
    for name in METRIC_FILES:
        _keep_until(paths.metrics / name, step)
    _keep_until(paths.quarantine, step)
    _keep_until(paths.faults, step)


def _keep_until(path: Path, step: int) -> None:
    if path.is_file():
        kept = [record for record in read_jsonl(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
