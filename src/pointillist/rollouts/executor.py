"""Runs an environment's rollouts in this process, whichever it is: the orchestrator itself or an environment worker."""

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from pointillist.config import CARRIER, LIMITS_CARRIER, RolloutsConfig
from pointillist.errors import ImageError, LayoutError, PointillistError, RenderError, SourceError
from pointillist.pools import give_threads_to_environments
from pointillist.rollouts.environment import Closing, Task, load_environment
from pointillist.rollouts.gateway import Gateway
from pointillist.rollouts.policy import Policy
from pointillist.rollouts.session import Sampling
from pointillist.rollouts.trace import Branch

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]

# Errors that lie in the task itself: trying again would give the same.
_PERMANENT = (SourceError, ImageError, LayoutError, RenderError)


class RolloutRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout to run."""

    id: str
    group: str
    """Rollouts of one group begin with the same prompt: they are run in one process, so that it travels once."""
    split: Split
    index: int
    """Of the task in its split."""
    sampling: Sampling
    seed: int


class RolloutFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rollout gave nothing."""

    kind: str
    """Type of the exception."""
    message: str
    permanent: bool
    """It would fail again."""


class RolloutResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a rollout: a failure, or everything else."""

    id: str
    task_id: str
    reward: float = 0.0
    turns: int = 0
    branches: list[Branch] = []
    failure: RolloutFailure | None = None


class RolloutHost(Protocol):
    """Whoever runs rollouts."""

    async def start(self) -> None:
        """Makes ready."""
        ...

    async def task_ids(self, split: Split) -> list[str]:
        """Ids of the environment's tasks."""
        ...

    async def run(self, request: RolloutRequest) -> RolloutResult:
        """Runs one rollout; what goes wrong in it is a failure of the result, never an exception."""
        ...

    async def aclose(self) -> None:
        """Ends everything that `start` began."""
        ...


class Executor:
    """The host in this process."""

    def __init__(self, config: RolloutsConfig) -> None:
        """Loads environment and tokenizer.

        Raises:
            ConfigError: The model folder is unusable.
            EnvironmentLoadError: The environment can not be had.
            PointillistError: It has no training tasks, or two tasks of one id.
        """
        self._timeout = config.rollout_timeout
        self._max_concurrent = config.max_concurrent
        self._environment = load_environment(config.env.id, config.env.args)
        self._tasks: dict[Split, Sequence[Task]] = {
            "train": _checked(self._environment.train_tasks(), "train"),
            "eval": _checked(self._environment.eval_tasks(), "eval"),
        }
        self._policy = Policy.from_config(config, blank_images=config.env.blank_images)
        # For whatever writes images on its own here or is started from here: one folder, told in one way, and limits.
        os.environ[CARRIER] = str(self._policy.sources.store_root)
        os.environ[LIMITS_CARRIER] = config.multimodal.limits.model_dump_json()
        self._gateway = Gateway(config.gateway, self._policy.model_name)

    async def start(self) -> None:
        """Starts the gateway."""
        give_threads_to_environments(self._max_concurrent)
        await self._gateway.start()

    async def task_ids(self, split: Split) -> list[str]:
        """Ids of the environment's tasks."""
        return [task.id for task in self._tasks[split]]

    async def run(self, request: RolloutRequest) -> RolloutResult:
        """Runs one rollout."""
        task = self._tasks[request.split][request.index]
        session = self._policy.open(request.sampling, request.seed, request.group)
        key = self._gateway.add(session)
        try:
            async with asyncio.timeout(self._timeout):
                reward = float(await self._environment.rollout(task, session))
        except Exception as error:  # an environment may raise anything; the others go on
            late = isinstance(error, TimeoutError) and not str(error)
            failure = RolloutFailure(
                kind=type(error).__name__,
                message=f"took longer than rollout_timeout = {self._timeout:g} s" if late else str(error),
                permanent=isinstance(error, _PERMANENT),
            )
            return RolloutResult(id=request.id, task_id=task.id, failure=failure)
        finally:
            self._gateway.close(key)
        return RolloutResult(
            id=request.id, task_id=task.id, reward=reward, turns=len(session.turns), branches=session.branches
        )

    async def aclose(self) -> None:
        """Ends the environment, if it has an `aclose`, and the gateway."""
        if isinstance(self._environment, Closing):
            await self._environment.aclose()
        await self._gateway.aclose()
        await self._policy.client.aclose()


def _checked(tasks: Sequence[Task], split: str) -> Sequence[Task]:
    tasks = list(tasks)
    if not tasks and split == "train":
        raise PointillistError("environment has no training tasks")
    if len({task.id for task in tasks}) != len(tasks):
        raise PointillistError(f"environment has {split} tasks with the same id, expected unique ids")
    return tasks
