"""`dataset`: one-turn questions about images, read from a file with their answers.

The file is JSONL or Parquet (extra `parquet`). A row has

- `prompt`: a text in which `<image>` marks where an image stands (without marks they stand before it);
- `images`: a list of images, or `image`: one; each a path beside the file, a `data:` or `file://` URL, an http(s)
  URL where `multimodal.allow_remote` is set, or `{"bytes": ...}` as Parquet files have it; the column may be missing;
- `answer`: the right answer; for the reward `regex` a regular expression.

Other names of columns are given as arguments. The reward is 1 or 0:

| reward | the reward is 1 for |
| --- | --- |
| `exact` | the same text; case and white space around it do not count |
| `numeric` | the last number of the answer, within a relative 1e-6 |
| `regex` | an answer that the expression matches as a whole |
| `math` | the same mathematics, by math-verify (extra `math`) |
"""

import asyncio
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pointillist.environments import Task
from pointillist.environments.tasks import made, read_lines
from pointillist.errors import EnvironmentLoadError
from pointillist.sessions import Session

_Part: TypeAlias = dict[str, str | bytes]
MARK: Final = "<image>"
_URL: Final = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NUMBER: Final = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+(?:[eE][-+]?\d+)?")


def exact(text: str, answer: str) -> bool:
    """Whether both are the same text; case and white space around it do not count.

    Example:
        `exact(" Yes ", "yes")` is true.
    """
    return text.strip().casefold() == answer.strip().casefold()


def numeric(text: str, answer: str) -> bool:
    """Whether the last number in the text is the answer, within a relative 1e-6.

    Example:
        `numeric("It rose from 3 to 7.5.", "7.5")` is true.
    """
    said, expected = _last_number(text), _last_number(answer)
    return said is not None and expected is not None and math.isclose(said, expected, rel_tol=1e-6, abs_tol=1e-9)


def regex(text: str, answer: str) -> bool:
    """Whether the expression `answer` matches the whole text, white space around it aside."""
    return re.fullmatch(answer, text.strip(), re.DOTALL) is not None


def math_verify(text: str, answer: str) -> bool:
    """Whether both are the same mathematics, by math-verify."""
    from math_verify import parse, verify

    # Its own time limits are signals, which only work in a main thread; the rollout has a limit of its own. None turns
    # them off, although the annotation does not say so.
    parsed = partial(parse, parsing_timeout=None)  # type: ignore[arg-type]
    return bool(verify(parsed(answer), parsed(text), timeout_seconds=None))


REWARDS: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "exact": exact,
    "numeric": numeric,
    "regex": regex,
    "math": math_verify,
}


class DatasetEnvironment:
    """See the module's docstring."""

    def __init__(
        self,
        path: str,
        *,
        eval_path: str | None = None,
        eval_size: int = 100,
        reward: Literal["exact", "numeric", "regex", "math"] = "exact",
        system_prompt: str | None = None,
        answer_pattern: str | None = None,
        columns: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        """Reads the rows of the file or files.

        Args:
            path: JSONL or Parquet file to train on.
            eval_path: File of held-out rows; without it `eval_size` rows are taken from `path`.
            eval_size: Number of rows to hold out.
            reward: Name of the comparison, from the table of this module's docstring.
            system_prompt: Text of a system message that begins every conversation.
            answer_pattern: Regular expression whose first group (or whole match) is the answer within the completion,
                such as `<answer>(.*?)</answer>`; without a match the reward is 0.
            columns: Names of the file's columns for `prompt`, `images`, `image` and `answer`, where they differ.
            seed: Seed of the choice of held-out rows.

        Raises:
            EnvironmentLoadError: A file cannot be read, a row is not as described, or a library is missing.
        """
        if reward not in REWARDS:
            raise EnvironmentLoadError(f"dataset: no reward {reward!r}, expected one of {sorted(REWARDS)}")
        if reward == "math":
            _require("math_verify", "math")
        self._right = REWARDS[reward]
        self._system_prompt = system_prompt
        self._pattern = re.compile(answer_pattern, re.DOTALL) if answer_pattern else None
        names = {"prompt": "prompt", "images": "images", "image": "image", "answer": "answer", **(columns or {})}
        tasks = _read(Path(path), names)
        if eval_path is None:
            random.Random(seed).shuffle(tasks)
            self._eval, self._train = tasks[:eval_size], tasks[eval_size:]
        else:
            self._train, self._eval = tasks, _read(Path(eval_path), names)

    def train_tasks(self) -> Sequence[Task]:
        """Tasks to train on."""
        return self._train

    def eval_tasks(self) -> Sequence[Task]:
        """Held-out tasks."""
        return self._eval

    async def rollout(self, task: Task, session: Session) -> float:
        """Asks one question; returns 1 for the right answer, else 0."""
        system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
        turn = await session.generate(
            [*system, {"role": "user", "content": _content(task.data["prompt"], task.data["images"])}]
        )
        text = turn.text
        if self._pattern is not None:
            match = self._pattern.search(text)
            if match is None:
                return 0.0
            text = match[1] if self._pattern.groups else match[0]
        return float(await asyncio.to_thread(self._right, text, task.data["answer"]))


def _read(path: Path, names: Mapping[str, str]) -> list[Task]:
    numbers = itertools.count()

    def task(row: Mapping[str, object]) -> Task:
        return _task(row, next(numbers), path, names)

    if path.suffix == ".parquet":
        return [made(f"{path} row {number}", task, row) for number, row in enumerate(_parquet_rows(path))]
    return list(read_lines(path, task))


def _parquet_rows(path: Path) -> Iterator[Mapping[str, object]]:
    _require("pyarrow", "parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Mapping[str, object]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise EnvironmentLoadError(f"{path} cannot be read as Parquet ({error})") from None
    return iter(rows)


def _task(row: Mapping[str, object], number: int, path: Path, names: Mapping[str, str]) -> Task:
    """A task; raises KeyError, TypeError or ValueError for a row that is not as described."""
    prompt, images = row[names["prompt"]], row.get(names["images"])
    if not isinstance(prompt, str):
        raise TypeError(f"{names['prompt']} is {type(prompt).__name__}, expected a text")
    if images is None:
        image = row.get(names["image"])
        images = [] if image is None else [image]
    if not isinstance(images, Iterable):
        raise TypeError(f"{names['images']} is {type(images).__name__}, expected a list")
    sources = [_source(image, path.parent) for image in images]
    if MARK in prompt and prompt.count(MARK) != len(sources):
        raise ValueError(f"{prompt.count(MARK)} {MARK} marks for {len(sources)} images")
    answer = row[names["answer"]]
    return Task(
        f"{path.stem}-{number}",
        {"prompt": prompt, "images": sources, "answer": answer if isinstance(answer, str) else json.dumps(answer)},
    )


def _source(image: object, folder: Path) -> str | bytes:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) or (isinstance(image, str) and _URL.match(image)):
        return image
    if isinstance(image, str):
        return str(folder / image)
    raise TypeError(f"image is {type(image).__name__}, expected a path, a URL or {{'bytes': ...}}")


def _content(prompt: str, images: Sequence[str | bytes]) -> list[_Part]:
    """Parts of a user message.

    Example:
        `"<image> or <image>?"` with images A and B: A, the text `" or "`, B, the text `"?"`.
    """
    pictures: list[_Part] = [{"type": "image", "image": image} for image in images]
    if MARK not in prompt:
        return [*pictures, {"type": "text", "text": prompt}]
    content: list[_Part] = []
    for index, text in enumerate(prompt.split(MARK)):
        content += [pictures[index - 1]] if index else []
        content += [{"type": "text", "text": text}] if text else []
    return content


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _require(module: str, extra: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise EnvironmentLoadError(f"dataset: {module} is not installed, pip install '.[{extra}]'") from None
