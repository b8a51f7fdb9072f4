"""A run's metrics as columns, read on from where they were read to.

A metrics file may have a hundred numbers in each of ten thousand lines; columns of doubles keep that small.
"""

import os
import threading
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec


@dataclass(slots=True)
class Column:
    """One number over the steps at which it was recorded."""

    steps: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    @property
    def last(self) -> float | None:
        """The newest value."""
        return self.values[-1] if self.values else None


class MetricsFile:
    """One `metrics/*.jsonl`, which another process may be writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._inode = self._done = 0
        self._columns: dict[str, Column] = {}

    def columns(self) -> dict[str, Column]:
        """All numbers by name, up to the last complete line; a file that was rewritten is read anew."""
        with self._lock:
            try:
                file = self._path.open("rb")
            except OSError:
                return {}
            with file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._done:
                    self._inode, self._done, self._columns = status.st_ino, 0, {}
                file.seek(self._done)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._done += len(line)
                    self._add(line)
            return dict(self._columns)

    def _add(self, line: bytes) -> None:
        try:
            record: Any = msgspec.json.decode(line)
            step = float(record["step"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            return  # a line that says nothing about a step
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                column = self._columns.setdefault(name, Column())
                column.steps.append(step)
                column.values.append(value)
