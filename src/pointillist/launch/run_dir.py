"""The output folder before a run: refused if it holds another run, cleaned of undone steps on resume."""

import json
from collections.abc import Iterable
from pathlib import Path

from pointillist.config import own_image_dir
from pointillist.config.run_paths import RunPaths, latest_checkpoint, read_jsonl, remove_steps_after
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


def prepare_resume(paths: RunPaths) -> int:
    """Takes a run back to its last checkpoint.

    Returns:
        The checkpoint's step.

    Raises:
        LaunchError: There is no complete checkpoint.
    """
    step = latest_checkpoint(paths)
    if step is None:
        raise LaunchError(f"nothing to resume: {paths.checkpoints} holds no complete checkpoint")
    # Writers that were killed may have left half a file each; none of them lives now.
    own_store = own_image_dir(paths.output_dir)
    collect_garbage(own_store, keep=None, older_than=0.0, dry_run=False)
    remove_steps_after(paths.rollouts, step)
    remove_steps_after(paths.broadcasts, step - 1)  # the trainer broadcasts the resumed weights itself
    for name in METRIC_FILES:
        _keep_until(paths.metrics / name, step)
    return step


def _keep_until(path: Path, step: int) -> None:
    records = read_jsonl(path)
    _rewrite(path, (record for record in records if record["step"] <= step))


def _rewrite(path: Path, records: Iterable[dict[str, object]]) -> None:
    if path.is_file():
        lines = [json.dumps(record) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
