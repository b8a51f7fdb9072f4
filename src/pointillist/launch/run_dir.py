"""The output folder before a run: refused if it holds another run, cleaned of undone steps on resume."""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pointillist.base.digests import files_state, note_whole
from pointillist.base.files import write_atomically
from pointillist.base.jsonl import read_jsonl
from pointillist.base.system import kill_process
from pointillist.errors import LaunchError
from pointillist.images.inventory import collect_garbage
from pointillist.runs.heartbeat import read_beats
from pointillist.runs.image_dir import own_image_dir
from pointillist.runs.lock import LOCK_FILE
from pointillist.runs.paths import RunPaths, evals_in, latest_checkpoint, remove, remove_steps_after, steps_in

METRIC_FILES = ("trainer.jsonl", "orchestrator.jsonl", "eval.jsonl")


# What a run puts into its folder beside images; the launcher may remove it if nothing was trained.
_LEFT = (
    "broadcasts", "configs", "faults.jsonl", "logs", "metrics", "monitors", "nodes", "rollouts", "state",
)  # fmt: skip
_KEPT = ("assets", LOCK_FILE, ".job", ".run_env", ".run_key", "rl.sbatch")


def check_fresh(paths: RunPaths) -> None:
    """Makes sure that nothing of an earlier run would be overwritten.

    A dry run leaves configs alone, and a run that failed before its first step leaves nothing that anyone needs: its
    folder counts as fresh.

    Raises:
        LaunchError: The folder holds a run, or something that is none.
    """
    if not paths.output_dir.exists():
        return
    if not paths.output_dir.is_dir():
        raise LaunchError(f"output_dir {paths.output_dir} is not a folder")
    found = sorted(path.name for path in paths.output_dir.iterdir())
    foreign = [name for name in found if name not in (*_LEFT, *_KEPT)]
    trained = read_jsonl(paths.metrics / "trainer.jsonl")  # checkpoints count as foreign
    is_ours = (paths.configs / "rl.toml").is_file() or not [name for name in found if name not in _KEPT]
    if foreign or trained or not is_ours:
        raise LaunchError(
            f"output_dir {paths.output_dir} already holds {', '.join(foreign[:4] or found[:4])}: choose another "
            "output_dir, or continue that run with --resume"
        )


def make_fresh(paths: RunPaths, say: Callable[[str], None]) -> None:
    """Removes what a run left that failed before its first step; its pictures stay, as a cache.

    Raises:
        LaunchError: As `check_fresh`.
    """
    check_fresh(paths)
    left = [name for name in _LEFT if (paths.output_dir / name).exists()]
    if set(left) - {"configs"}:
        say(f"an earlier start in {paths.output_dir} ended before its first step: beginning anew")
    for name in left:
        path = paths.output_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def wait_for_survivors(
    paths: RunPaths, grace: float, say: Callable[[str], None], hurry: Callable[[], bool] = lambda: False
) -> None:
    """Waits for processes of an earlier launcher that was killed: its trainer may be writing a last checkpoint.

    Args:
        paths: The run's folder, whose lock this process holds.
        grace: Seconds after which they are killed.
        say: Function that reports the waiting.
        hurry: Function that is called again and again; True ends the wait.
    """
    alive = [beat for beat in read_beats(paths.state) if beat.is_here and beat.is_alive]
    if not alive:
        return
    names = ", ".join(f"{beat.name} (process {beat.pid})" for beat in alive)
    say(f"{names} of an earlier start: waiting for up to {grace:.0f} s for the end (supervision.stop_grace)")
    # The kernel has sent them SIGTERM when their launcher died: a second one could cut the checkpoint short.
    deadline = time.monotonic() + grace
    while any(beat.is_alive for beat in alive) and time.monotonic() < deadline:
        if hurry():
            break
        time.sleep(0.1)
    for beat in alive:
        kill_process(beat.pid, beat.process_start, signal.SIGKILL)


def newest_step(paths: RunPaths) -> int:
    """Step of a run's newest checkpoint by its name, 0 if it has none; its bytes are not read.

    Raises:
        LaunchError: There is no run, or its checkpoints came out of an archive.
    """
    if not (paths.configs / "rl.toml").is_file():
        raise LaunchError(f"nothing to resume: {paths.output_dir} holds no run")
    if paths.imported.exists():
        raise LaunchError(f"checkpoints of an imported run are programs; if you trust them, remove {paths.imported}")
    return max(steps_in(paths.checkpoints), default=0)


def resume_step(paths: RunPaths, *, for_trainer: bool = False) -> int:
    """Step of a run's last whole checkpoint; 0, its beginning, if it died before the first.

    Nothing is removed here: `rewind` cuts what comes after that step, once its checkpoint is known to be good. All
    bytes of a checkpoint are read for that, which takes minutes for a large model.

    Args:
        paths: The run's folder.
        for_trainer: Whether to leave a note for the trainer, which then does not read them again.

    Raises:
        LaunchError: As `newest_step`, or all of its checkpoints are damaged.
    """
    if not newest_step(paths):
        return 0
    found = steps_in(paths.checkpoints)
    states = {step: files_state(paths.checkpoint_step(step)) for step in found}
    step = latest_checkpoint(paths)
    if step is None:
        raise LaunchError(
            f"none of the checkpoints {found} in {paths.checkpoints} is whole, so this run cannot be continued; "
            "nothing was removed. To begin it again from step 0, remove that folder"
        )
    if for_trainer:
        note_whole(paths.checkpoint_note(step), states[step])
    return step


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
        remove(half)
    for later in steps_in(paths.checkpoints):
        if later > step:  # damaged: kept for a look at it, under a name that no checkpoint has
            aside = paths.checkpoint_step(later).with_suffix(".damaged")
            remove(aside)
            paths.checkpoint_step(later).rename(aside)
    for name in METRIC_FILES:
        _keep_until(paths.metrics / name, step)
    _keep_until(paths.faults, step)


def _keep_until(path: Path, step: int) -> None:
    if path.is_file():
        kept = [record for record in read_jsonl(path) if _step_of(record) <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _step_of(record: dict[str, object]) -> float:
    """Of a record that has none, infinity: it is not kept."""
    step = record.get("step")
    return step if isinstance(step, int | float) else math.inf
