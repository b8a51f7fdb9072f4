"""Files of one JSON object a line, which one process writes while others read them: append, read, follow."""

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, TypeGuard

from pointillist.base.files import open_regular
from pointillist.base.json_types import JsonObject

logger = logging.getLogger(__name__)

MAX_LINE_BYTES: Final = 64 * 1024**2
"""Longest line of a JSONL file that is read. Images travel as references, so a rollout's record is far shorter."""

_DOUBLE_BITS: Final = 1000
_TAIL: Final = 64


def append_jsonl(path: Path, record: JsonObject) -> None:
    """Adds one object as a line."""
    append_line(path, json.dumps(record).encode())


def append_line(path: Path, line: bytes) -> None:
    """Adds one line, given without its newline; the file and its folder are made if they are not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(line + b"\n")


def read_jsonl(path: Path) -> list[JsonObject]:
    """All complete lines of a JSONL file that another process may be writing; none if it is not there.

    A line that holds no JSON object (a disk that failed, a machine that lost power) is passed over, with a warning.
    """
    if not path.is_file():
        return []
    records = []
    with open_regular(path) as file:
        for number, line in enumerate(complete_lines(file), start=1):
            if (record := parse_line(line)) is not None:
                records.append(record)
            else:
                _warn_of_line(path, number)
    return records


def parse_line(line: bytes) -> JsonObject | None:
    """The object in a line; None for anything else. It knows NaN, as a run that diverges writes it."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


class Follower:
    """Gives each complete line of a file that grows, and may be replaced, once."""

    def __init__(self, path: Path, begin_anew: Callable[[], None] = lambda: None) -> None:
        """Begins at the file's first line.

        Args:
            path: The file; it need not be there yet.
            begin_anew: Function that is called when the file was replaced or cut, before its first line is given again.
        """
        self._path = path
        self._begin_anew = begin_anew
        self._inode = 0
        self._offset = 0
        self._tail = b""
        """The last bytes before the offset: a file that has other ones there was rewritten."""

    def new(self) -> Iterator[bytes]:
        """Lines that were completed since the last call, each with its newline; none if the file cannot be read."""
        try:
            file = open_regular(self._path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self._offset:
                self._restart(0)
            return  # it is not there yet, or cannot be read now: the next time may do
        with file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset - len(self._tail))
            if inode != self._inode or file.read(len(self._tail)) != self._tail:
                self._restart(inode)
                file.seek(0)
            for line in complete_lines(file):
                # Of a line that is too long only the beginning was given: what stands before the offset is not known.
                self._offset, self._tail = file.tell(), line[-_TAIL:] if line.endswith(b"\n") else b""
                yield line

    def _restart(self, inode: int) -> None:
        self._inode, self._offset, self._tail = inode, 0, b""
        self._begin_anew()


def is_number(value: object) -> TypeGuard[int | float]:
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


@functools.lru_cache(maxsize=1000)
def _warn_of_line(path: Path, number: int) -> None:
    """Once a line: metrics are read every second."""
    logger.warning("%s: line %d is not a JSON object and is passed over", path, number)


def _read_past_line(file: BinaryIO) -> bool:
    """Reads to the end of a line; whether it has one."""
    while piece := file.readline(MAX_LINE_BYTES):
        if piece.endswith(b"\n"):
            return True
    return False
