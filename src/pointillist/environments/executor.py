"""Runs an environment's rollouts in this process, whichever it is: the orchestrator itself or an environment worker.

The environment's code runs in tasks of its own that hand back whatever it returns or raises, so nothing that it does
to its task reaches the loop: a `SystemExit` is a failed rollout like any other, and so is a `CancelledError` that is
not of our making. A rollout that blocks the loop is interrupted after its time (`loop.LoopWatch`), where Python code
or a system call blocks; what ends or stops the process itself is what workers are for.
"""

import asyncio
import inspect
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import msgspec

from pointillist.base.pools import give_threads_to_environments
from pointillist.config import RolloutsConfig
from pointillist.config.shared import CARRIER, LIMITS_CARRIER
from pointillist.environments.failures import RolloutFailure, answer_text, failure_of
from pointillist.environments.loop import LoopWatch, in_environment
from pointillist.environments.protocol import Task, load_environment, load_tasks
from pointillist.errors import ContextLengthError, PointillistError, RewardError, RolloutTimeoutError
from pointillist.sessions.factory import SessionFactory
from pointillist.sessions.gateway import Gateway
from pointillist.sessions.session import Sampling, Session
from pointillist.sessions.trace import Branch

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]

LARGEST_REWARD: Final = 1e9
"""Beyond it squares of differences, and the trainer's float32, would overflow."""
_CANCEL_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 30.0


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


class RolloutResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a rollout."""

    id: str
    task_id: str
    answer: str | None = None
    """What the task says is right."""
    reward: float = 0.0
    """Means nothing if there is a failure."""
    turns: int = 0
    branches: list[Branch] = []
    """Of a rollout that failed: up to there."""
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
            EnvironmentLoadError: The environment can not be had, or its tasks are not usable.
        """
        self._timeout = config.rollout_timeout
        self._max_concurrent = config.max_concurrent
        # For whatever reads or writes images on its own here or is started from here; the folder follows below.
        os.environ[LIMITS_CARRIER] = config.multimodal.limits.model_dump_json()
        self._environment = load_environment(config.env.id, config.env.args)
        self._tasks: dict[Split, Sequence[Task]] = {
            "train": load_tasks(self._environment, "train"),
            "eval": load_tasks(self._environment, "eval"),
        }
        self._running: set[asyncio.Task[_Ended]] = set()
        self._watch = LoopWatch(self._timeout)
        self._sessions = SessionFactory.from_config(config, blank_images=config.env.blank_images)
        os.environ[CARRIER] = str(self._sessions.sources.store_root)
        self._gateway = Gateway(config.gateway, self._sessions.model_name)

    async def start(self) -> None:
        """Starts the gateway."""
        give_threads_to_environments(self._max_concurrent)
        await self._gateway.start()
        self._watch.start()

    async def task_ids(self, split: Split) -> list[str]:
        """Ids of the environment's tasks."""
        return [task.id for task in self._tasks[split]]

    def answer(self, split: Split, index: int) -> str | None:
        """The expected answer of a task, as records keep it."""
        return answer_text(self._tasks[split][index].answer)

    async def run(self, request: RolloutRequest) -> RolloutResult:
        """Runs one rollout."""
        task = self._tasks[request.split][request.index]
        session = self._sessions.open(request.sampling, request.seed, request.group)
        key = self._gateway.add(session)
        try:
            ended = await self._guarded(lambda: self._rewarded(task, session), "rollout_timeout", self._timeout)
        finally:
            self._gateway.close(key)
        result = RolloutResult(id=request.id, task_id=task.id, answer=self.answer(request.split, request.index))
        if ended.error is None:
            reward, turns, branches = ended.value
            return msgspec.structs.replace(result, reward=reward, turns=turns, branches=branches)
        turns, branches = _record_so_far(session)
        failure = _failure(ended.error, session, turns)
        return msgspec.structs.replace(result, turns=turns, branches=branches, failure=failure)

    async def aclose(self) -> None:
        """Ends the environment, if it has an `aclose`, and the gateway."""
        for task in self._running:
            task.cancel()
        ended = await self._guarded(self._close_environment, "the time to close", _CLOSE_SECONDS)
        if ended.error is not None:
            failure = failure_of(ended.error)
            logger.warning(
                "closing the environment failed: %s: %s\n%s", failure.kind, failure.message, failure.traceback
            )
        self._watch.stop()
        await self._gateway.aclose()
        await self._sessions.client.aclose()

    async def _rewarded(self, task: Task, session: Session) -> tuple[float, int, list[Branch]]:
        """What a rollout gives: reward, number of turns, branches."""
        rollout = self._environment.rollout(task, session)
        if not inspect.isawaitable(rollout):
            raise RewardError(f"rollout returned {type(rollout).__name__} at once, expected 'async def rollout'")
        reward = _real(await rollout)
        return reward, len(session.turns), session.branches

    async def _close_environment(self) -> None:
        aclose = getattr(self._environment, "aclose", None)
        if aclose is not None:
            await aclose()

    async def _guarded(self, call: Callable[[], Any], limit: str, seconds: float) -> "_Ended":
        """What the environment's code returned or raised; it is cancelled where it takes longer than it may."""
        task = asyncio.get_running_loop().create_task(_caught(call))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            await asyncio.wait({task}, timeout=seconds)
            if task.done():
                return _ended(task)
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_SECONDS)
        except asyncio.CancelledError:  # ours: whoever asked for the rollout no longer wants it
            task.cancel()
            raise
        late = f"took longer than {limit} = {seconds:g} s"
        if not task.done():
            return _Ended(error=RolloutTimeoutError(f"{late}, and goes on although it was cancelled"))
        stopped = _ended(task).error
        where = stopped.__traceback__ if stopped is not None else None
        return _Ended(error=RolloutTimeoutError(late).with_traceback(where))


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a call of the environment's code ended."""

    value: Any = None
    error: BaseException | None = None


async def _caught(call: Callable[[], Any]) -> _Ended:
    in_environment.set(True)
    try:
        return _Ended(await call())
    except BaseException as error:  # out of a task, SystemExit would end the process
        return _Ended(error=error)


def _ended(task: "asyncio.Task[_Ended]") -> _Ended:
    """Of a task that is done; one that was cancelled before its first step has no result."""
    if task.cancelled():
        return _Ended(error=asyncio.CancelledError())
    error = task.exception()  # the loop's watch may interrupt it in its last line, too
    return task.result() if error is None else _Ended(error=error)


def _record_so_far(session: Session) -> tuple[int, list[Branch]]:
    """What was recorded before a rollout failed; nothing if the environment has broken the record itself."""
    try:
        return len(session.turns), session.branches
    except BaseException:  # the turns may be objects of the environment's
        logger.exception("the record of a failed rollout can not be read")
        return 0, []


def _failure(error: BaseException, session: Session, turns: int) -> RolloutFailure:
    """What is recorded of an error; one that is not ours may not come again.

    A conversation outgrows `seq_len` by what the policy did, unless it did so before the first answer. Agents behind
    the gateway raise an error of their own then, so it is the session that says so.
    """
    ours = error if isinstance(error, PointillistError) else None
    of_environment = ours is not None and ours.fault == "environment"
    outgrown = isinstance(error, ContextLengthError) or (session.outgrown and not of_environment)
    by_policy = outgrown and turns > 0
    permanent = by_policy or (ours is not None and not ours.retryable)
    return failure_of(error, permanent=permanent, by_policy=by_policy)


def _real(reward: Any) -> float:
    """A reward as a float.

    Raises:
        RewardError: It is no real number, not finite, or beyond `LARGEST_REWARD`.
    """
    expected = f"expected a real number within plus or minus {LARGEST_REWARD:g}"
    if inspect.iscoroutine(reward):
        reward.close()
        raise RewardError(f"reward is a coroutine that was not awaited, {expected}")
    # What `float` would parse or cut to its real part is no number that the environment has meant as a reward.
    dtype = getattr(reward, "dtype", None)
    if isinstance(reward, (str, bytes, bytearray, memoryview)) or getattr(dtype, "kind", "f") in "OSUcmM":
        raise RewardError(f"reward is {type(reward).__name__}{f' of {dtype}' if dtype else ''}, {expected}")
    try:
        value = float(reward)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(f"reward is {type(reward).__name__}, {expected}") from None
    if not math.isfinite(value) or abs(value) > LARGEST_REWARD:
        raise RewardError(f"reward is {value:g}, {expected}")
    return value
