"""A run's metrics as columns, read on from where they were read to.

A metrics file may have a hundred numbers in each of ten thousand lines; columns of doubles keep that small.
"""

import threading
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from pointillist.base.json_types import JsonObject
from pointillist.base.jsonl import Follower, is_number, parse_line


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
        self._lock = threading.Lock()
        self._columns: dict[str, Column] = {}
        self._file = Follower(path, self._columns.clear)

    def columns(self) -> dict[str, Column]:
        """All numbers by name, up to the last complete line; a file that was rewritten is read anew."""
        with self._lock:
            for line in self._file.new():
                self._add(parse_line(line) or {})
            return dict(self._columns)

    def _add(self, record: JsonObject) -> None:
        step = record.get("step")
        if not is_number(step) or isinstance(step, bool) or not 0 <= step <= 2**53:
            return  # a line that says nothing about a step
        for name, value in record.items():
            if is_number(value) and not isinstance(value, bool):
                column = self._columns.setdefault(name, Column())
                column.steps.append(step)
                column.values.append(value)
