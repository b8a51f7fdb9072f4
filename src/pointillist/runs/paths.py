"""Where a run keeps what below its output folder."""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointillist.base.digests import fault_in

logger = logging.getLogger(__name__)

ORCHESTRATOR_STATE: Final = "orchestrator.json"
"""File of a checkpoint with the orchestrator's state."""


WEIGHTS_FILE: Final = "model.safetensors"
"""File of a broadcast; it appears whole."""

NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,14}")
"""How names and ids write a number; see `number_of`."""


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Where a run keeps what, below its output folder."""

    output_dir: Path

    @property
    def configs(self) -> Path:
        """Resolved config of each component, TOML."""
        return self.output_dir / "configs"

    @property
    def history(self) -> Path:
        """`rl.toml` of each start, by number."""
        return self.configs / "history"

    @property
    def model_record(self) -> Path:
        """Digests of the model folder's files, as the run was begun with them."""
        return self.configs / "model.json"

    @property
    def state(self) -> Path:
        """What each process is doing; see `pointillist.runs.heartbeat`."""
        return self.output_dir / "state"

    @property
    def logs(self) -> Path:
        """One log a process."""
        return self.output_dir / "logs"

    @property
    def metrics(self) -> Path:
        """One JSONL of per-step metrics a process."""
        return self.output_dir / "metrics"

    @property
    def rollouts(self) -> Path:
        """Per step: packed batches and the rollouts they were made from."""
        return self.output_dir / "rollouts"

    def rollouts_file(self, step: int) -> Path:
        """Rollouts that one step's batches were made from, JSONL of `records.RolloutRecord`."""
        return self.rollout_step(step) / "rollouts.jsonl"

    def eval_file(self, version: int) -> Path:
        """Rollouts of one evaluation on held-out tasks, JSONL of `records.RolloutRecord`."""
        return self.rollouts / f"eval_{version}.jsonl"

    @property
    def faults(self) -> Path:
        """Every image that the trainer could not use, missing or corrupt, JSONL of `records.Fault`."""
        return self.output_dir / "faults.jsonl"

    @property
    def imported(self) -> Path:
        """A mark that the run came out of an archive together with checkpoints, which a resume would execute."""
        return self.output_dir / "imported.json"

    @property
    def broadcasts(self) -> Path:
        """Weights by version, for the inference server."""
        return self.output_dir / "broadcasts"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints by step, to resume from."""
        return self.output_dir / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, as `save_pretrained` writes it."""
        return self.output_dir / "model"

    def rollout_step(self, step: int) -> Path:
        """Folder of one step's batches."""
        return self.rollouts / f"step_{step}"

    def broadcast_step(self, version: int) -> Path:
        """Folder of one weight version."""
        return self.broadcasts / f"step_{version}"

    def checkpoint_step(self, step: int) -> Path:
        """Folder of one checkpoint."""
        return self.checkpoints / f"step_{step}"

    def checkpoint_note(self, step: int) -> Path:
        """Note of the launcher for the trainer that a checkpoint is whole."""
        return self.checkpoints / f".step_{step}.whole"


def number_of(text: str) -> int | None:
    """A step or version as names and ids write it; None for anything else.

    Only the digits 0 to 9, no leading zeros, and at most 15 of them: the number fits every reader, JavaScript and
    SQLite among them, and each number is written in one way only.
    """
    return int(text) if NUMBER.fullmatch(text) else None


def step_of(path: Path) -> int | None:
    """Number in a name `step_<n>` as we write it; None for any other name, such as `step_0007` or `step_²`."""
    prefix, _, number = path.name.partition("_")
    return number_of(number) if prefix == "step" else None


def steps_in(folder: Path) -> list[int]:
    """Numbers of all `step_<n>` folders in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(step for path in folder.iterdir() if (step := step_of(path)) is not None and path.is_dir())


def evals_in(folder: Path) -> list[int]:
    """Weight versions of all `eval_<n>.jsonl` files in a folder, ascending."""
    numbers = (number_of(path.name[len("eval_") : -len(".jsonl")]) for path in folder.glob("eval_*.jsonl"))
    return sorted(number for number in numbers if number is not None)


def remove_steps_after(folder: Path, step: int) -> None:
    """Removes what is named `step_<n>` with n > step: work that a resumed run does again."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if (later := step_of(path)) is not None and later > step:
            remove(path)


def remove(path: Path) -> None:
    """Removes a folder with all that is in it, or a file; it need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def latest_checkpoint(paths: RunPaths) -> int | None:
    """Step of the newest checkpoint that is whole, all of its bytes read; None if there is none.

    What is damaged is passed over, with a warning.
    """
    for step in reversed(steps_in(paths.checkpoints)):
        fault = fault_in(paths.checkpoint_step(step))
        if fault is None:
            return step
        logger.warning("checkpoint %s is damaged and is passed over: %s", paths.checkpoint_step(step), fault)
    return None


def latest_broadcast(paths: RunPaths) -> int | None:
    """Newest weight version that is there whole; None if there is none."""
    ready = [
        version for version in steps_in(paths.broadcasts) if (paths.broadcast_step(version) / WEIGHTS_FILE).is_file()
    ]
    return ready[-1] if ready else None
