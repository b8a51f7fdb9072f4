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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol, cast, runtime_checkable

from pointillist.errors import EnvironmentLoadError
from pointillist.rollouts.session import Session

GROUP: Final = "pointillist.environments"


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to solve."""

    id: str
    """Unique among the tasks of its split."""
    data: dict[str, Any] = field(default_factory=dict)
    """Whatever the environment needs."""


class Environment(Protocol):
    """What the orchestrator asks of an environment."""

    def train_tasks(self) -> Sequence[Task]:
        """Tasks that are trained on."""
        ...

    def eval_tasks(self) -> Sequence[Task]:
        """Held-out tasks, never trained on."""
        ...

    async def rollout(self, task: Task, session: Session) -> float:
        """Holds one conversation about a task; returns its reward. Many run at once in one event loop."""
        ...


@runtime_checkable
class Closing(Protocol):
    """An environment that has something to end, such as processes of its own."""

    async def aclose(self) -> None:
        """Ends it."""
        ...


def load_environment(name: str, arguments: Mapping[str, Any]) -> Environment:
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
    except Exception as error:
        raise EnvironmentLoadError(
            f"environment {name!r} could not be built with {dict(arguments)!r}: {type(error).__name__}: {error}"
        ) from error
    missing = [
        method
        for method in ("train_tasks", "eval_tasks", "rollout")
        if not callable(getattr(environment, method, None))
    ]
    if missing:
        raise EnvironmentLoadError(
            f"environment {name!r} has no method {missing[0]!r}, expected the three of Environment"
        )
    return cast(Environment, environment)


def _find(name: str) -> Any:
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
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise EnvironmentLoadError(
            f"environment {name!r} can not be imported: {type(error).__name__}: {error}"
        ) from error
