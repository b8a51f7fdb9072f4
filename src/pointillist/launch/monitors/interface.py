"""What a monitor is: three methods, and the rows of its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RowImage:
    """An image of a rollout, as it lies in the run's store."""

    sha256: str
    path: Path
    width: int
    """Pixels, after the EXIF orientation is applied."""
    height: int


@dataclass(frozen=True, slots=True)
class Row:
    """A rollout, as a line of a table."""

    id: str
    """`<step>.<group>.<member>`."""
    prompt: str
    """Everything before the policy's first answer."""
    completion: str
    """Everything from there on; what tools said is in it, too."""
    reward: float
    advantage: float | None
    """None if its group taught nothing."""
    images: tuple[RowImage, ...]
    """In the order in which they were shown."""


class Monitor(Protocol):
    """Somewhere that a run can be watched. Called from one thread; may raise any exception."""

    name: str
    """For the warning if it fails."""

    def log(self, component: str, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one step.

        Args:
            component: `trainer`, `orchestrator` or `eval`.
            step: Optimiser step. After a run went back to a checkpoint, steps come again.
            metrics: Names and values.
        """
        ...

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        """Takes a table of some of a step's rollouts."""
        ...

    def close(self) -> None:
        """Writes what is not written yet."""
        ...
