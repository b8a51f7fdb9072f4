"""What a run looks like while it goes: one live line on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pointillist.base.json_types import JsonObject
from pointillist.base.jsonl import read_jsonl
from pointillist.base.logs import plain
from pointillist.runs.paths import RunPaths

_PLAIN_SECONDS: Final = 10.0
_REFRESH_SECONDS: Final = 0.5


class ProgressLine:
    """Reads the metrics that the processes write."""

    def __init__(self, console: Console, paths: RunPaths, max_steps: int) -> None:
        self._console = console
        self._paths = paths
        self._max_steps = max_steps
        self._next_read = 0.0
        self._next_line = 0.0
        self._shown = ""
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=max_steps, status="starting")

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next_read = self._next_line = 0.0
        self.update()
        self._bar.stop()

    def update(self) -> None:
        """Shows what is new; cheap to call often."""
        now = time.monotonic()
        if now < self._next_read:
            return
        self._next_read = now + _REFRESH_SECONDS
        metrics = self._paths.metrics
        newest = [read_jsonl(metrics / f"{name}.jsonl")[-1:] for name in ("trainer", "orchestrator", "eval")]
        try:
            step, status = _status(*newest)
        except (KeyError, TypeError, ValueError, OverflowError):
            return  # a damaged line: the next step writes another
        self._bar.update(self._task, completed=step, status=plain(status))
        line = f"step {step}/{self._max_steps}  {status}"
        if not self._console.is_terminal and now >= self._next_line and line != self._shown and status:
            self._console.print(plain(line), markup=False, highlight=False, soft_wrap=True)
            self._shown = line
            self._next_line = now + _PLAIN_SECONDS


def _status(trainer: list[JsonObject], orchestrator: list[JsonObject], evals: list[JsonObject]) -> tuple[int, str]:
    """Last finished step, and the numbers that matter."""
    parts = []
    if orchestrator:
        parts.append(f"reward {orchestrator[0]['reward/mean']:.3f}")
    if evals:
        failed = evals[0]["eval/failed"]
        lost = f", {failed} of {evals[0]['eval/tasks']} failed" if failed else ""
        parts.append(f"held-out {evals[0]['eval/accuracy']:.3f} (step {evals[0]['step']}{lost})")
    if orchestrator:
        parts.append(f"{orchestrator[0]['rollouts/per_second']:.0f} rollouts/s")
        if dropped := orchestrator[0]["errors/dropped"]:
            parts.append(f"{dropped} rollouts dropped")
        if flat := orchestrator[0]["groups/dropped_zero_variance"]:
            parts.append(f"{flat} of {orchestrator[0]['groups/total']} groups taught nothing")
    if trainer:
        parts.append(f"mismatch {trainer[0]['mismatch/mean_abs']:.0e}")
    return (int(trainer[0]["step"]) if trainer else 0), "  ".join(parts)
