"""Where a run keeps what below its output folder, and how a file appears there: whole or not at all."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ORCHESTRATOR_STATE: Final = "orchestrator.json"
"""File of a checkpoint with the orchestrator's state; its being there says that the checkpoint is complete."""


WEIGHTS_FILE: Final = "model.safetensors"
"""File of a broadcast; it appears whole."""


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
        """What each process is doing; see `pointillist.heartbeat`."""
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
        """Records of the rollouts that one step's batches were made from, JSONL."""
        return self.rollout_step(step) / "rollouts.jsonl"

    def eval_file(self, version: int) -> Path:
        """Records of the rollouts of one evaluation on held-out tasks, JSONL."""
        return self.rollouts / f"eval_{version}.jsonl"

    @property
    def quarantine(self) -> Path:
        """Corrupt images that the trainer met, JSONL."""
        return self.output_dir / "quarantine.jsonl"

    @property
    def faults(self) -> Path:
        """Every image that the trainer could not have, corrupt or missing, JSONL."""
        return self.output_dir / "faults.jsonl"

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


def step_of(path: Path) -> int | None:
    """Number in a folder's name `step_<n>`; None for any other name."""
    prefix, _, number = path.name.partition("_")
    return int(number) if prefix == "step" and number.isdecimal() else None


def steps_in(folder: Path) -> list[int]:
    """Numbers of all `step_<n>` folders in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(step for path in folder.iterdir() if (step := step_of(path)) is not None)


def evals_in(folder: Path) -> list[int]:
    """Weight versions of all `eval_<n>.jsonl` files in a folder, ascending."""
    numbers = (path.name[len("eval_") : -len(".jsonl")] for path in folder.glob("eval_*.jsonl"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def open_private(path: str, flags: int) -> int:
    """An `opener` of files that may hold secrets: a new one is readable for its user only, whatever the umask."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Writes a file so that it appears whole or not at all.

    Args:
        path: The file; its folder is made if it is not there.
        data: Its bytes.
        private: Whether it is readable for its user only, whatever the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if private:
        temporary.unlink(missing_ok=True)
    with open(temporary, "wb", opener=open_private if private else None) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def remove_steps_after(folder: Path, step: int) -> None:
    """Removes `step_<n>` folders with n > step: work that a resumed run does again."""
    for later in steps_in(folder):
        if later > step:
            shutil.rmtree(folder / f"step_{later}")


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Adds one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSONL file that another process may be writing; none if it is not there."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def latest_checkpoint(paths: RunPaths) -> int | None:
    """Step of the newest complete checkpoint; None if there is none."""
    complete = [s for s in steps_in(paths.checkpoints) if (paths.checkpoint_step(s) / ORCHESTRATOR_STATE).is_file()]
    return complete[-1] if complete else None


def latest_broadcast(paths: RunPaths) -> int | None:
    """Newest weight version that is there whole; None if there is none."""
    ready = [
        version for version in steps_in(paths.broadcasts) if (paths.broadcast_step(version) / WEIGHTS_FILE).is_file()
    ]
    return ready[-1] if ready else None
