"""Where a run keeps what below its output folder, and how a file appears there: whole or not at all."""

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Final

logger = logging.getLogger(__name__)

ORCHESTRATOR_STATE: Final = "orchestrator.json"
"""File of a checkpoint with the orchestrator's state; its being there says that the checkpoint is complete."""


WEIGHTS_FILE: Final = "model.safetensors"
"""File of a broadcast; it appears whole."""

DIGESTS_FILE: Final = "digests.json"
"""Beside weights or a checkpoint: sha256 and bytes of each file."""

_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,14}")
MAX_LINE_BYTES: Final = 64 * 1024**2
"""Longest line of a JSONL file that is read. Images travel as references, so a rollout's record is far shorter."""


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Where a run keeps what, below its output folder."""

    output_dir: Path

    @property
    def configs(self) -> Path:
        """Resolved config of each component, TOML."""
        return self.output_dir / "configs"

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
    def imported(self) -> Path:
        """Says that the run came out of an archive together with checkpoints, which a resume would execute."""
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


def number_of(text: str) -> int | None:
    """A step or version as names and ids write it; None for anything else.

    Only the digits 0 to 9, no leading zeros, and at most 15 of them: the number fits every reader, JavaScript and
    SQLite among them, and each number is written in one way only.
    """
    return int(text) if _NUMBER.fullmatch(text) else None


def step_of(path: Path) -> int | None:
    """Number in a folder's name `step_<n>`; None for any other name."""
    prefix, _, number = path.name.partition("_")
    return number_of(number) if prefix == "step" else None


def steps_in(folder: Path) -> list[int]:
    """Numbers of all `step_<n>` folders in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(step for path in folder.iterdir() if (step := step_of(path)) is not None)


def evals_in(folder: Path) -> list[int]:
    """Weight versions of all `eval_<n>.jsonl` files in a folder, ascending."""
    numbers = (number_of(path.name[len("eval_") : -len(".jsonl")]) for path in folder.glob("eval_*.jsonl"))
    return sorted(number for number in numbers if number is not None)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
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
    """All complete lines of a JSONL file that another process may be writing; none if it is not there.

    A line that is not a JSON object is left out, with a warning: a power failure may leave one behind.
    """
    if not path.is_file():
        return []
    records = []
    with open_regular(path) as file:
        for number, line in enumerate(complete_lines(file), start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                logger.warning("%s line %d is not a JSON object and is left out", path, number)
    return records


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; never waits, as a named pipe in its place would make it.

    Raises:
        OSError: It is not there, cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def complete_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines from where a file stands up to its last newline, each with its newline.

    Of a line longer than `MAX_LINE_BYTES` only its first bytes are given, without a newline: it is read past, never
    held. `file.tell()` is always where the line that was just given ends.
    """
    while line := file.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n") and not _read_past_line(file):
            return  # it is still being written
        yield line


def _read_past_line(file: BinaryIO) -> bool:
    """Reads to the end of a line; whether it has one."""
    while piece := file.readline(MAX_LINE_BYTES):
        if piece.endswith(b"\n"):
            return True
    return False


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
