"""Reading what is new: the metrics that the processes append, and rollouts as rows with their pictures."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pointillist.base.files import open_regular
from pointillist.base.image_limits import STORED_LIMITS
from pointillist.base.jsonl import complete_lines, is_number, read_jsonl
from pointillist.errors import PointillistError
from pointillist.images import read_verified
from pointillist.images.store import stored_name
from pointillist.launch.monitors.interface import Picture, Row
from pointillist.launch.run_dir import METRIC_FILES
from pointillist.runs.paths import RunPaths
from pointillist.upkeep.references import image_dir_of

_IMAGE = "[image]"


class MetricsFollower:
    """Gives each record of `metrics/*.jsonl` once, as soon as its line is complete.

    When a run goes back to a checkpoint, its files are written anew with what is kept. Then they are read from the
    start, and lines that were given before are not given again; a step that is done again has another line.
    """

    def __init__(self, paths: RunPaths) -> None:
        """Begins behind what is there: an earlier launcher has handed that on."""
        self._files = {Path(name).stem: _Lines(paths.metrics / name) for name in METRIC_FILES}
        for file in self._files.values():
            file.new()

    def new(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """`(component, record)` of every line that was completed since the last call."""
        for component, file in self._files.items():
            for line in file.new():
                try:
                    record = json.loads(line.decode())
                except (ValueError, RecursionError):
                    continue  # a damaged line
                if isinstance(record, dict) and type(step := record.get("step")) is int and 0 <= step < 2**53:
                    yield component, record


class _Lines:
    """Lines of one file that grows, and may be replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0
        self._given: set[bytes] = set()
        """Digests of all lines."""

    def new(self) -> list[bytes]:
        try:
            opened = open_regular(self._path)
        except OSError:  # it is not there yet, or a file system lags: the next time may do
            return []
        with opened as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            lines = {}
            for line in complete_lines(file):
                lines[hashlib.blake2b(line, digest_size=16).digest()] = line
                self._offset = file.tell()
        unknown = [line for digest, line in lines.items() if digest not in self._given]
        self._given.update(lines)
        return unknown


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record: its numbers, without the step itself."""
    return {name: float(value) for name, value in record.items() if is_number(value) and name != "step"}


def rows_of(paths: RunPaths, step: int, count: int) -> list[Row]:
    """Some rollouts of a step, spread evenly over all of them.

    Raises:
        PointillistError: The records can not be read, or a picture is not there or not what its name says.
    """
    records = read_jsonl(paths.rollouts_file(step))
    try:
        # Without those that failed: they have no reward.
        records = [record for record in records if record["branches"] and record["reward"] is not None]
        root = image_dir_of(paths)
        chosen = min(count, len(records))
        return [_row(records[index * len(records) // chosen], root) for index in range(chosen)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PointillistError(f"a rollout's record of step {step} is damaged ({error!r})") from None


def _row(record: Mapping[str, Any], root: Path) -> Row:
    """The last branch of a rollout: it has the conversation as it ended."""
    messages = record["branches"][-1]["messages"]
    roles = [message["role"] for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    uris = [part["image_url"]["url"] for message in messages for part in _parts(message) if part["type"] != "text"]
    return Row(
        id=record["id"],
        prompt=_text(messages[:first]),
        completion=_text(messages[first:]),
        reward=record["reward"],
        advantage=record["advantage"],
        pictures=tuple(_picture(uri, root) for uri in uris),
    )


def _text(messages: list[dict[str, Any]]) -> str:
    return "\n\n".join(
        f"{message['role']}: {''.join(part['text'] if part['type'] == 'text' else _IMAGE for part in _parts(message))}"
        for message in messages
    )


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    calls = [f"\n{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())]
    return [*parts, *({"type": "text", "text": call} for call in calls)]


def _picture(uri: str, root: Path) -> Picture:
    """Only a picture of the run's own store, and only if it is the one that its name says."""
    _, name, sha256 = stored_name(uri, [root])
    read_verified(uri, sha256, [root], STORED_LIMITS)
    return Picture(sha256, root / name)
