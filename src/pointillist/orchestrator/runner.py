"""Runs groups of rollouts: it bounds how many run at once, tries failed ones again, and logs each cause of failure."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from textwrap import indent
from typing import Final

import msgspec

from pointillist.config import OrchestratorConfig
from pointillist.environments.executor import RolloutHost, RolloutRequest, RolloutResult
from pointillist.environments.failures import RolloutFailure
from pointillist.runs.heartbeat import progress
from pointillist.sessions import Sampling
from pointillist.sessions.factory import sampling_of

logger = logging.getLogger(__name__)


_LINES_PER_CAUSE: Final = 20
_CAUSES: Final = 1000


class RolloutRunner:
    """Asks a rollout host (this process, or a pool of workers) for groups and evaluations."""

    def __init__(self, config: OrchestratorConfig, host: RolloutHost) -> None:
        self._config = config
        self._host = host
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._causes: Counter[tuple[str, str]] = Counter()
        self.retried = 0
        """Number of rollouts that failed and were tried again."""

    async def run_group(self, task: int, step: int, index: int, size: int) -> list[RolloutResult]:
        """Rollouts of one task, in order; a rollout whose last attempt failed has a `failure`.

        Args:
            task: Index of a training task.
            step: Number of the optimiser step that will train them; with `index` it decides the seeds.
            index: Number of the group in its step.
            size: Number of rollouts, G.
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
        """One greedy rollout of each held-out task, in order; a rollout whose last attempt failed has a `failure`.

        Args:
            task_ids: Names of the held-out tasks, from the first on.
            version: Version of the weights, which stands in the rollouts' ids.
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
        """Runs a rollout until it succeeds with no token older than version `oldest`, or returns its last failure."""
        attempt = 0
        async with self._slots:
            while True:
                result = await self._host.run(msgspec.structs.replace(request, seed=request.seed + attempt * 2**32))
                progress()
                if result.failure is None or result.failure.by_policy:  # both are trained
                    result = _fresh(result, oldest)
                failure = result.failure
                if failure is None:
                    return result
                final = failure.permanent or attempt == self._config.max_retries
                self._log(request.id, result.task_id, failure, final=final)
                if final:
                    return result
                self.retried += 1
                attempt += 1

    def _log(self, rollout_id: str, task_id: str, failure: RolloutFailure, *, final: bool) -> None:
        """Logs a distinct cause first with its traceback, then with one line, up to a bound; records have all."""
        what = f"task {task_id}: {failure.kind}: {failure.message}"
        cause = failure.kind, _where(failure.traceback)
        if cause not in self._causes and len(self._causes) == _CAUSES:
            return
        self._causes[cause] += 1
        seen = self._causes[cause]
        if seen > _LINES_PER_CAUSE:
            return
        trace = f"\n{failure.traceback}" if seen == 1 and failure.traceback else ""
        more = "; further ones of this cause are not logged" if seen == _LINES_PER_CAUSE else ""
        outcome = "failed" if final else "failed and is tried again"
        logger.warning("rollout %s %s, %s", rollout_id, outcome, indent(f"{what}{more}{trace}", "    ").lstrip())


def _where(traceback: str) -> str:
    """The line of a traceback that names where the error was raised; empty if there is none."""
    return next((line for line in reversed(traceback.splitlines()) if line.lstrip().startswith('File "')), "")


def _fresh(result: RolloutResult, oldest: int) -> RolloutResult:
    """The result, or a failure if one of its tokens was sampled with a version before `oldest`."""
    versions = [
        v for branch in result.branches for v, on in zip(branch.weight_versions, branch.loss_mask, strict=True) if on
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
    """First seed of a group. Its rollouts count up from it, so that their first requests can be sent as one."""
    return random.Random(f"{seed}/{step}/{index}").getrandbits(31)
