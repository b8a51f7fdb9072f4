"""Files of one JSON object a line, which one process writes while others read them."""

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from pointillist.base.files import open_regular

logger = logging.getLogger(__name__)

_DOUBLE_BITS: Final = 1000


MAX_LINE_BYTES: Final = 64 * 1024**2
"""Longest line of a JSONL file that is read. Images travel as references, so a rollout's record is far shorter."""


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Adds one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSONL file that another process may be writing; none if it is not there.

    A line that holds no JSON object (a disk that failed, a machine that lost power) is passed over, with a warning.
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
                _warn_of_line(path, number)
    return records


@functools.lru_cache(maxsize=1000)
def _warn_of_line(path: Path, number: int) -> None:
    """Once a line: metrics are read every second."""
    logger.warning("%s: line %d is not a JSON object and is passed over", path, number)


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number, and one that a double holds."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() < _DOUBLE_BITS)


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
