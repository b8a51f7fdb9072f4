"""Runs rollouts: bounded concurrency, time limits, retries, and a record of whatever went wrong."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pointillist.config import OrchestratorConfig
from pointillist.errors import ImageError, LayoutError, RenderError, SourceError
from pointillist.images import Sources
from pointillist.render import RawRenderer
from pointillist.rollouts import Environment, InferenceClient, Sampling, Session, Task

logger = logging.getLogger(__name__)

# Errors that lie in the task itself: trying again would give the same.
_PERMANENT = (SourceError, ImageError, LayoutError, RenderError)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A finished rollout."""

    id: str
    task: Task
    session: Session
    reward: float


@dataclass(slots=True)
class RolloutErrors:
    """What went wrong since the last step."""

    counts: Counter[str] = field(default_factory=Counter)
    """By exception type, of rollouts that were dropped."""
    retried: int = 0
    last: str = ""


class RolloutRunner:
    """Holds what every rollout needs."""

    def __init__(
        self,
        config: OrchestratorConfig,
        environment: Environment,
        renderer: RawRenderer,
        sources: Sources,
        client: InferenceClient,
    ) -> None:
        self._config = config
        self._environment = environment
        self._renderer = renderer
        self._sources = sources
        self._client = client
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._warned: set[str] = set()
        self.errors = RolloutErrors()

    async def run_group(self, task: Task, step: int, index: int, size: int) -> list[Rollout]:
        """Rollouts of one task; those that failed for good are left out and counted.

        Args:
            task: What to solve.
            step: Optimiser step that they are for; with `index` it decides the seeds.
            index: Number of the group in its step.
            size: Rollouts to run.
        """
        sampling = Sampling(
            temperature=self._config.sampling.temperature,
            top_p=self._config.sampling.top_p,
            top_k=self._config.sampling.top_k,
            max_tokens=self._config.sampling.max_tokens,
        )
        seed = _seed(self._config.seed, step, index)
        runs = [self._run(task, f"{step}.{index}.{i}", sampling, seed + i) for i in range(size)]
        return [rollout for rollout in await asyncio.gather(*runs) if rollout is not None]

    async def run_greedy(self, tasks: Sequence[Task]) -> list[Rollout | None]:
        """One greedy rollout of each task, in order; None for those that failed for good."""
        sampling = Sampling(temperature=0.0, max_tokens=self._config.sampling.max_tokens)
        return list(await asyncio.gather(*(self._run(task, f"eval.{task.id}", sampling, 0) for task in tasks)))

    async def _run(self, task: Task, rollout_id: str, sampling: Sampling, seed: int) -> Rollout | None:
        for attempt in range(self._config.max_retries + 1):
            session = Session(
                self._renderer,
                self._sources,
                self._client,
                sampling,
                seq_len=self._config.seq_len,
                seed=seed + attempt * 2**32,
            )
            try:
                async with self._slots, asyncio.timeout(self._config.rollout_timeout):
                    reward = float(await self._environment.rollout(task, session))
                return Rollout(rollout_id, task, session, reward)
            except Exception as error:  # an environment may raise anything; the run goes on
                if attempt == self._config.max_retries or isinstance(error, _PERMANENT):
                    self._drop(task, error)
                    return None
                self.errors.retried += 1
        return None

    def _drop(self, task: Task, error: Exception) -> None:
        what = f"task {task.id}: {type(error).__name__}: {error}"
        self.errors.counts[type(error).__name__] += 1
        self.errors.last = what
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("rollout dropped, %s", what)


def _seed(seed: int, step: int, index: int) -> int:
    """First seed of a group; its rollouts count up from it, so that their first requests travel as one."""
    return random.Random(f"{seed}/{step}/{index}").getrandbits(31)
