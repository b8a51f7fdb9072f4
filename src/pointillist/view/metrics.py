"""A run's metrics as columns, read on from where they were read to.

A metrics file may have a hundred numbers in each of ten thousand lines; columns of doubles keep that small.
"""

import json
import os
import threading
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pointillist.base.files import open_regular
from pointillist.base.jsonl import complete_lines, is_number


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
                file = open_regular(self._path)
            except OSError:
                return {}
            with file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._done:
                    self._inode, self._done, self._columns = status.st_ino, 0, {}
                file.seek(self._done)
                for line in complete_lines(file):
                    self._done = file.tell()
                    self._add(line)
            return dict(self._columns)

    def _add(self, line: bytes) -> None:
        try:
            record: Any = json.loads(line.decode())  # which knows NaN, as a run that diverges writes it
            step = record["step"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return  # a line that says nothing about a step
        if not is_number(step) or isinstance(step, bool) or not 0 <= step <= 2**53:
            return
        for name, value in record.items():
            if is_number(value) and not isinstance(value, bool):
                column = self._columns.setdefault(name, Column())
                column.steps.append(step)
                column.values.append(value)
