"""Task lists of the built-in environments: one JSON object in each line; paths of pictures are relative to the file."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pointillist.environments import Task
from pointillist.errors import EnvironmentLoadError, ImageError
from pointillist.images.decode import decode_rgb
from pointillist.runs.image_dir import writer_limits

T = TypeVar("T")


def read_tasks(path: Path, hint: str) -> list[Task]:
    """Tasks of a list whose lines have an `image` and an `answer`; every picture must be there and decode.

    Args:
        path: Path of the list.
        hint: Advice for the error if the list is missing.

    Returns:
        Tasks whose data has `image` (a path) and `answer` (a text).

    Raises:
        EnvironmentLoadError: The list is missing or malformed, or a picture is missing, corrupt, or not one that
            the run accepts.
    """
    limits = writer_limits(os.environ)

    def task(record: Mapping[str, Any]) -> Task:
        image = path.parent / record["image"]
        try:
            decode_rgb(image.read_bytes(), limits)
        except (OSError, ImageError) as error:
            raise EnvironmentLoadError(f"picture {record['image']} of {path}: {error}") from None
        return Task(f"{path.stem}-{record['image']}", {"image": image, "answer": str(record["answer"])})

    return list(read_lines(path, task, hint))


def read_lines(path: Path, task: Callable[[Mapping[str, Any]], Task], hint: str = "") -> Iterator[Task]:
    """Tasks made from the lines of a JSONL file, by `task` from the object of each line.

    Raises:
        EnvironmentLoadError: The file is missing, or a line is not what `task` expects.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EnvironmentLoadError(f"no task list {path} ({error.strerror}){hint and '; ' + hint}") from None
    for number, line in enumerate(lines, start=1):
        yield made(f"{path} line {number}", lambda text: task(json.loads(text)), line)


def made(where: str, task: Callable[[T], Task], source: T) -> Task:
    """A task made by `task` from `source`, the entry of a file at the place `where`.

    Raises:
        EnvironmentLoadError: The entry is not what `task` expects.
    """
    try:
        return task(source)
    except (ValueError, KeyError, TypeError) as error:
        raise EnvironmentLoadError(f"{where} is malformed ({error!r})") from None
