"""Environments: tasks in, a conversation with the policy, a reward out.

An environment is any class with three methods. It is found by the name of an entry point in the group
`pointillist.environments`, or by an import path `module:Class`, and built with the config's `env.args`:

    class Oranges:
        def train_tasks(self): return [Task("0", {"image": "orange.png"})]
        def eval_tasks(self): return [Task("1", {"image": "apple.png"})]
        async def rollout(self, task, session):
            turn = await session.generate([{"role": "user", "content": [
                {"type": "image", "image": task.data["image"]}, {"type": "text", "text": "An orange?"}]}])
            return float("yes" in turn.text)
"""

import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol, cast

from pointillist.environments.failures import kind_of, message_of, own_frames
from pointillist.errors import EnvironmentLoadError
from pointillist.sessions.session import Session

logger = logging.getLogger(__name__)

GROUP: Final = "pointillist.environments"
_ID_CHARACTERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to solve."""

    id: str
    """Unique among the tasks of its split."""
    data: dict[str, Any] = field(default_factory=dict)
    """Whatever the environment needs."""
    answer: object = None
    """The right answer, for readers of the records; by default `data["answer"]` if there is one. Never shown to the
    policy."""

    def __post_init__(self) -> None:
        if isinstance(self.id, str):  # of a subclass, as numpy's, that no encoder knows
            object.__setattr__(self, "id", str.__str__(self.id))
        if self.answer is None and isinstance(self.data, Mapping):
            object.__setattr__(self, "answer", self.data.get("answer"))


class Environment(Protocol):
    """What the orchestrator asks of an environment."""

    def train_tasks(self) -> Sequence[Task]:
        """Tasks that are trained on."""
        ...

    def eval_tasks(self) -> Sequence[Task]:
        """Held-out tasks, never trained on."""
        ...

    async def rollout(self, task: Task, session: Session) -> float:
        """Holds one conversation about a task; returns its reward. Many run at once in one event loop.

        Whatever it raises fails this rollout alone. The reward is a real number within plus or minus 1e9.
        """
        ...


def load_environment(name: str, arguments: Mapping[str, object]) -> Environment:
    """Finds and builds an environment.

    Args:
        name: An entry point's name, or `module:Class`; modules beside the working directory are found too.
        arguments: Keyword arguments of the class.

    Raises:
        EnvironmentLoadError: Not found, not importable, not buildable, or without one of the three methods.
    """
    factory = _find(name)
    try:
        environment = factory(**arguments)
        missing = [
            method
            for method in ("train_tasks", "eval_tasks", "rollout")
            if not callable(getattr(environment, method, None))
        ]
    except BaseException as error:
        raise load_error(f"environment {name!r} could not be built with {dict(arguments)!r}", error) from error
    if missing:
        raise EnvironmentLoadError(
            f"environment {name!r} has no method {missing[0]!r}, expected the three of Environment"
        )
    return cast(Environment, environment)


def load_tasks(environment: Environment, split: str) -> list[Task]:
    """The environment's tasks of a split, `train` or `eval`.

    Raises:
        EnvironmentLoadError: The method raises or gives no tasks, what it gives are no tasks, or ids are not unique.
    """
    method = f"{split}_tasks()"
    try:
        tasks = list(getattr(environment, f"{split}_tasks")())
    except BaseException as error:
        raise load_error(f"{method} of the environment failed", error) from error
    if not tasks and split == "train":
        raise EnvironmentLoadError("environment has no training tasks")
    seen: set[str] = set()
    for index, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise EnvironmentLoadError(f"{method} of the environment gave {type(task).__name__} at {index}, not a Task")
        if not isinstance(task.id, str) or not task.id.isprintable() or not 0 < len(task.id) <= _ID_CHARACTERS:
            raise EnvironmentLoadError(
                f"environment has {split} task {index} with the id {str(task.id)[:80]!r}, expected a text of 1 to "
                f"{_ID_CHARACTERS} printable characters"
            )
        if task.id in seen:
            raise EnvironmentLoadError(
                f"environment has two {split} tasks with the id {task.id!r}, expected unique ids"
            )
        seen.add(task.id)
    return tasks


def load_error(what: str, error: BaseException) -> EnvironmentLoadError:
    """The error of an environment that can not be had; where its own code raised is logged."""
    if isinstance(error, EnvironmentLoadError):
        return error
    if frames := own_frames(error):
        logger.error("%s, in\n%s", what, frames)
    return EnvironmentLoadError(f"{what}: {kind_of(error)}: {message_of(error)}")


def _find(name: str) -> Callable[..., object]:
    if ":" not in name:
        installed = {entry.name: entry for entry in entry_points(group=GROUP)}
        if name not in installed:
            raise EnvironmentLoadError(
                f"no environment {name!r}: expected one of {sorted(installed)} or an import path 'module:Class'"
            )
        module_name, _, attribute = installed[name].value.partition(":")
    else:
        module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Callable[..., object] = getattr(importlib.import_module(module_name), attribute)
    except BaseException as error:
        raise load_error(f"environment {name!r} can not be imported", error) from error
    return found
