"""Runs groups of rollouts: bounded concurrency, retries, and a record of whatever went wrong."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from pointillist.config import OrchestratorConfig
from pointillist.heartbeat import progress
from pointillist.rollouts import Sampling
from pointillist.rollouts.executor import RolloutFailure, RolloutHost, RolloutRequest, RolloutResult
from pointillist.rollouts.policy import sampling_of

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RolloutErrors:
    """What went wrong since the last step."""

    counts: Counter[str] = field(default_factory=Counter)
    """By exception type, of rollouts that were dropped."""
    retried: int = 0
    last: str = ""


class RolloutRunner:
    """Asks a host for rollouts."""

    def __init__(self, config: OrchestratorConfig, host: RolloutHost) -> None:
        self._config = config
        self._host = host
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._warned: set[str] = set()
        self.errors = RolloutErrors()

    async def run_group(self, task: int, step: int, index: int, size: int) -> list[RolloutResult]:
        """Rollouts of one task, in order; those that failed for good have a `failure` and are counted.

        Args:
            task: Index of a training task.
            step: Optimiser step that they are for; with `index` it decides the seeds.
            index: Number of the group in its step.
            size: Rollouts to run.
        """
        seed = _seed(self._config.seed, step, index)
        requests = [
            RolloutRequest(
                id=f"{step}.{index}.{member}",
                group=f"{step}.{index}",
                split="train",
                index=task,
                sampling=sampling_of(self._config.sampling),
                seed=seed + member,
            )
            for member in range(size)
        ]
        oldest = step - 1 - self._config.max_off_policy_steps
        return list(await asyncio.gather(*(self._run(request, oldest) for request in requests)))

    async def run_greedy(self, task_ids: Sequence[str], version: int) -> list[RolloutResult]:
        """One greedy rollout of each held-out task, in order; those that failed for good have a `failure`.

        Args:
            task_ids: Of the held-out tasks, from the first on.
            version: Of the weights, for the rollouts' ids.
        """
        sampling: Sampling = replace(sampling_of(self._config.sampling), temperature=0.0, top_p=1.0, top_k=-1)
        requests = [
            RolloutRequest(
                id=f"eval_{version}.{index}", group=name, split="eval", index=index, sampling=sampling, seed=0
            )
            for index, name in enumerate(task_ids)
        ]
        return list(await asyncio.gather(*(self._run(request, oldest=0) for request in requests)))

    async def _run(self, request: RolloutRequest, oldest: int) -> RolloutResult:
        """A rollout none of whose tokens was sampled with weights older than version `oldest`, or its last failure."""
        attempt = 0
        async with self._slots:
            while True:
                result = await self._host.run(msgspec.structs.replace(request, seed=request.seed + attempt * 2**32))
                progress()
                if result.failure is None:
                    result = _fresh(result, oldest)
                if result.failure is None:
                    return result
                if result.failure.permanent or attempt == self._config.max_retries:
                    self._drop(result.task_id, result.failure)
                    return result
                self.errors.retried += 1
                attempt += 1

    def _drop(self, task_id: str, failure: RolloutFailure) -> None:
        what = f"task {task_id}: {failure.kind}: {failure.message}"
        self.errors.counts[failure.kind] += 1
        self.errors.last = what
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("rollout dropped, %s", what)


def _fresh(result: RolloutResult, oldest: int) -> RolloutResult:
    """The result, or a failure if one of its tokens is older than may be trained on."""
    versions = [
        v for branch in result.branches for v, on in zip(branch.weight_versions, branch.sampled, strict=True) if on
    ]
    if min(versions, default=oldest) >= oldest:
        return result
    failure = RolloutFailure(
        kind="StaleRollout",
        message=f"sampled with weight version {min(versions)}, expected {oldest} or newer (max_off_policy_steps)",
        permanent=False,
    )
    return msgspec.structs.replace(result, failure=failure)


def _seed(seed: int, step: int, index: int) -> int:
    """First seed of a group; its rollouts count up from it, so that their first requests travel as one."""
    return random.Random(f"{seed}/{step}/{index}").getrandbits(31)
