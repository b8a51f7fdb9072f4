"""The orchestrator: for every step it asks for groups of rollouts, compares them, packs samples, and sends batches.

    wait for weights that are new enough -> groups of rollouts -> advantages -> samples -> packed rows -> trainer

At `max_off_policy_steps = 0` a step's rollouts wait for the weights of the step before; above it they may begin that
many versions earlier, and new weights reach the servers while they run. The bound holds for every token: a rollout with
an older one (a server that came back with old weights) is tried again. Held-out tasks are evaluated greedily, through
the same renderer and the same wire, before the first step, every `eval.interval` steps and after the last.

Where every rollout of ten rounds has at least the reward `solved_reward`, nothing is left to learn: that step's batch
is empty and ends the training, as the last of `max_steps` does.
"""

import asyncio
import json
import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from pointillist.base.jsonl import append_jsonl, read_jsonl
from pointillist.base.pools import SENDING
from pointillist.base.system import resident_mb
from pointillist.config import OrchestratorConfig
from pointillist.environments.executor import Executor, RolloutHost, RolloutResult
from pointillist.environments.failures import failure_of
from pointillist.environments.workers import WorkerPool
from pointillist.errors import InferenceError, PointillistError, RefError, TransportError
from pointillist.families import load_family, resolve_model_dir
from pointillist.orchestrator.advantages import group_advantages
from pointillist.orchestrator.packing import OverlongMultimodalSample, pack
from pointillist.orchestrator.records import RolloutRecorder
from pointillist.orchestrator.runner import RolloutRunner
from pointillist.orchestrator.samples import make_sample, with_advantage
from pointillist.orchestrator.tasks import TaskOrder
from pointillist.render import FolderTokenizer
from pointillist.runs.heartbeat import SERVERS, beating, enter
from pointillist.runs.paths import ORCHESTRATOR_STATE, RunPaths
from pointillist.runs.records import Outcome, RolloutRecord, write_rollouts
from pointillist.sessions import InferenceClient
from pointillist.transport import RankBatch, Sender, TrainingSample, make_sender
from pointillist.transport.types import encoded_image_bytes
from pointillist.weights.follow import WeightWatcher

logger = logging.getLogger(__name__)

_EMPTY_ROUNDS: Final = 10
"""Rounds without a single group to learn from after which the run ends."""
_KINDS: Final = 20
"""Of failures in a record of metrics, by name."""
_DROPPED_WHEN_SOLVED: Final = 0.05
"""Part of the rollouts that may have failed where the others say that the tasks are solved."""


async def orchestrate(config: OrchestratorConfig) -> None:
    """Runs until `max_steps` are shipped and the last weights are evaluated.

    Raises:
        ConfigError: The model folder is unusable.
        EnvironmentLoadError: The environment cannot be found, imported or built.
        InferenceError: The server refused weights, or no group could be rolled out.
    """
    with beating(RunPaths(config.output_dir.resolve()).state, "orchestrator"):
        enter("start_environment")
        orchestrator = Orchestrator(config)
        try:
            await orchestrator.run()
        finally:
            await orchestrator.host.aclose()
            orchestrator.sender.close()
            await orchestrator.client.aclose()


class Orchestrator:
    """State of the loop."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self.config = config
        self.paths = RunPaths(config.output_dir.resolve())
        self.family = load_family(config.model.name)
        self.client = InferenceClient.from_config(config.client)
        self.host: RolloutHost = WorkerPool(config) if config.workers.count else Executor(config)
        self.runner = RolloutRunner(config, self.host)
        self.recorder = RolloutRecorder(config.env.id, FolderTokenizer(resolve_model_dir(config.model.name)))
        self.start = config.resume_step or 0
        self.weights = WeightWatcher(self.paths, self.client, self.start)
        # A batch is kept until the one after it is trained; further ones are for rollouts that are ahead.
        pending = config.max_off_policy_steps + 2
        self.sender: Sender = make_sender(config.transport, self.paths, config.num_train_workers, pending)

    async def run(self) -> None:
        """The loop of this module's docstring."""
        config = self.config
        await self.host.start()
        self.tasks = TaskOrder(len(await self.host.task_ids("train")), config.seed, self._resume_position())
        self.eval_tasks = (await self.host.task_ids("eval"))[: config.eval.max_tasks]
        enter("wait_for_servers", waits_for=SERVERS)
        await self.client.wait_until_ready(config.client.startup_timeout)
        async with asyncio.TaskGroup() as group:
            follower = group.create_task(self.weights.follow())
            await self._run_steps()
            follower.cancel()

    async def _run_steps(self) -> None:
        config = self.config
        await self._wait_for_weights(self.start)
        if self._owes_evaluation():
            await self._evaluate(self.start)
        for step in range(self.start + 1, config.max_steps + 1):
            solved = await self._step(step)
            if step % config.eval.interval == 0 or step == config.max_steps or solved:
                await self._wait_for_weights(step)
                await self._evaluate(step)
            if solved:
                break

    async def _step(self, step: int) -> bool:
        """Rolls out and ships one step; returns whether it is the last, since there is nothing left to learn."""
        started = time.perf_counter()
        await self._wait_for_weights(step - 1 - self.config.max_off_policy_steps, step)
        waited = time.perf_counter() - started
        enter("rollouts", step=step)
        batch = await self._collect(step)
        solved = not batch.samples
        packing = time.perf_counter()
        num_workers = self.config.num_train_workers
        ranks = (
            [[]] * num_workers if solved else pack(batch.samples, seq_len=self.config.seq_len, num_workers=num_workers)
        )
        # Records are written before the batch is sent: `store gc` must find every reference that can be trained on.
        write_rollouts(self.paths.rollouts_file(step), batch.records)
        state = json.dumps({"step": step, "task_position": self.tasks.position}).encode()
        packed = [
            RankBatch(
                step=step, micro_batches=rows, num_tokens=batch.num_tokens, orchestrator_state=state, is_last=solved
            )
            for rows in ranks
        ]
        enter("pack_and_send", step=step, waits_for="the trainer to take earlier batches")
        await SENDING.run(self.sender.send, packed)
        ended = time.perf_counter()
        retried, self.runner.retried = self.runner.retried, 0
        metrics = {
            "step": step,
            **batch.metrics(),
            "errors/retried": retried,
            "solved": int(solved),
            "weights/version": self.weights.version,
            "rollouts/per_second": len(batch.rollouts) / max(1e-9, packing - started - waited),
            "memory/resident_mb": resident_mb(),
            "time/wait_for_weights": waited,
            "time/rollouts": packing - started - waited,
            "time/pack_and_send": ended - packing,
        }
        append_jsonl(self.paths.metrics / "orchestrator.jsonl", metrics)
        logger.info("step %d: %s", step, batch.in_words())
        if solved:
            logger.info(
                "step %d: solved, every reward of %d rollouts is at least solved_reward = %g: ending", step,
                len(batch.rollouts), self.config.solved_reward,
            )  # fmt: skip
        return solved

    async def _collect(self, step: int) -> "_Batch":
        """Groups until there is something to learn from; none of the batch's groups is where the tasks are solved."""
        config = self.config
        batch = _Batch(
            recorder=self.recorder,
            image_token_id=self.family.image_token_id,
            seq_len=config.seq_len,
            overlong_policy=config.multimodal.overlong_policy,
            normalize_std=config.advantage.normalize_std,
            failed_reward=config.failed_reward,
        )
        for attempt in range(_EMPTY_ROUNDS):
            tasks = self.tasks.take(config.batch_size // config.group_size)
            groups = await asyncio.gather(
                *(
                    self.runner.run_group(task, step, attempt * config.batch_size + index, config.group_size)
                    for index, task in enumerate(tasks)
                )
            )
            for rollouts in groups:
                batch.add_group(rollouts)
            if batch.samples:
                return batch
            if not batch.rollouts:
                self._keep_for_the_eye(step, batch)
                raise InferenceError(f"step {step}: no rollout succeeded; the last failed on {batch.last_failure}")
            logger.warning(
                "step %d: nothing to learn from in round %d of %d: %s", step, attempt + 1,
                _EMPTY_ROUNDS, batch.in_words(),
            )  # fmt: skip
        if batch.is_solved(config.solved_reward):
            return batch
        self._keep_for_the_eye(step, batch)
        rewards = sorted({f"{rollout.reward:g}" for rollout in batch.rollouts})
        raise PointillistError(
            f"step {step}: {_EMPTY_ROUNDS} rounds of groups without any difference in reward (rewards were "
            f"{', '.join(rewards[:4])}): nothing to learn from, and less than orchestrator.solved_reward = "
            f"{config.solved_reward:g}; see what was said: pointillist view {self.paths.output_dir}"
        )

    def _keep_for_the_eye(self, step: int, batch: "_Batch") -> None:
        """Writes the rollouts of a step that cannot be trained, so that they can be looked at."""
        write_rollouts(self.paths.rollouts_file(step), batch.records)

    async def _wait_for_weights(self, version: int, step: int | None = None) -> None:
        enter("wait_for_weights", step=step, waits_for=f"weights of version {version} of the trainer")
        await self.weights.wait_for(version)

    async def _evaluate(self, version: int) -> None:
        if not self.eval_tasks:
            return
        enter("evaluate", step=version)
        started = time.perf_counter()
        rollouts = await self.runner.run_greedy(self.eval_tasks, version)
        write_rollouts(
            self.paths.eval_file(version),
            [self.recorder.record(rollout, group=f"eval.{rollout.task_id}") for rollout in rollouts],
        )
        failed = Counter(rollout.failure.kind for rollout in rollouts if rollout.failure is not None)
        # Over all tasks: a rollout that failed has answered nothing.
        accuracy = sum(rollout.reward for rollout in rollouts if rollout.failure is None) / len(rollouts)
        self.runner.retried = 0
        metrics = {
            "step": version,
            "eval/accuracy": accuracy,
            "eval/tasks": len(rollouts),
            "eval/failed": failed.total(),
            **_by_kind("eval/failed/", failed),
            "time/eval": time.perf_counter() - started,
            # A test looks at it: the environment side runs without torch.
            "torch_imported": "torch" in sys.modules,
        }
        append_jsonl(self.paths.metrics / "eval.jsonl", metrics)
        logger.info(
            "version %d: held-out accuracy %.3f on %d tasks, %d of which failed", version, accuracy, len(rollouts),
            failed.total(),
        )  # fmt: skip

    def _owes_evaluation(self) -> bool:
        """Whether the weights that the run begins with are to be evaluated: it may have ended before they were."""
        done = {record["step"] for record in read_jsonl(self.paths.metrics / "eval.jsonl")}
        due = self.start % self.config.eval.interval == 0 or self.start == self.config.max_steps
        return due and self.start not in done

    def _resume_position(self) -> int:
        if not self.start:
            return 0
        state = json.loads((self.paths.checkpoint_step(self.start) / ORCHESTRATOR_STATE).read_bytes())
        return int(state["task_position"])


def _by_kind(prefix: str, failures: Counter[str]) -> dict[str, int]:
    """Metrics of the most frequent kinds of failures; the rest is one number, since types can be made up at will."""
    kinds = dict(failures.most_common(_KINDS))
    rest = failures.total() - sum(kinds.values())
    if rest:
        kinds["other_kinds"] = rest
    return {f"{prefix}{kind}": count for kind, count in kinds.items()}


@dataclass(kw_only=True)
class _Batch:
    """Rollouts of one step, as they come in."""

    recorder: RolloutRecorder
    image_token_id: int
    seq_len: int
    overlong_policy: Literal["drop", "error"]
    normalize_std: bool
    failed_reward: float
    rollouts: list[RolloutResult] = field(default_factory=list)
    """Those that count: they succeeded, or failed by what the policy did, and have the reward of that."""
    records: list[RolloutRecord] = field(default_factory=list)
    """Of all rollouts."""
    samples: list[TrainingSample] = field(default_factory=list)
    num_tokens: int = 0
    last_failure: str = ""
    _failures: Counter[str] = field(default_factory=Counter)
    """By kind, whether they count or not."""
    _dropped: int = 0
    _overlong: int = 0
    _groups: int = 0
    _flat: int = 0
    _image_bytes: int = 0
    _images: int = 0

    def add_group(self, results: list[RolloutResult]) -> None:
        """Adds the rollouts of one task; a group that is too small or all the same gives no samples."""
        self._groups += 1
        counting: list[tuple[RolloutResult, list[TrainingSample]]] = []
        for each in results:
            result, samples = self._prepared(each)
            failure = result.failure
            if failure is not None:
                self._failures[failure.kind] += 1
                self.last_failure = f"task {result.task_id}: {failure.kind}: {failure.message}"
            if failure is None or failure.by_policy:
                counting.append((result, samples))
            else:
                self._dropped += 1
                self.records.append(self.recorder.record(result))
        self.rollouts += [result for result, _ in counting]
        self.num_tokens += sum(sum(sample.loss_mask) for _, samples in counting for sample in samples)
        rewards = [result.reward for result, _ in counting]
        advantages = group_advantages(rewards, normalize_std=self.normalize_std) if len(rewards) > 1 else None
        if advantages is None:
            self._flat += 1
            unused: Outcome = "zero_variance" if len(rewards) > 1 else "alone"
            self.records += [self.recorder.record(result, outcome=unused) for result, _ in counting]
            return
        for (result, samples), advantage in zip(counting, advantages, strict=True):
            overlong = self._add_samples(samples, advantage)
            record = self.recorder.record(result, outcome="sent", advantage=advantage, overlong=overlong)
            self.records.append(record)

    def is_solved(self, best: float) -> bool:
        """Whether every rollout that counts has at least this reward, and hardly any is missing."""
        dropped = self._dropped / (self._dropped + len(self.rollouts))
        return dropped <= _DROPPED_WHEN_SOLVED and min(rollout.reward for rollout in self.rollouts) >= best

    def metrics(self) -> dict[str, float]:
        """Numbers of the batch."""
        turns = [rollout.turns for rollout in self.rollouts]
        return {
            "reward/mean": self._mean_reward(),
            "rollouts/total": len(self.rollouts),
            "rollouts/turns": sum(turns) / len(turns),
            "groups/total": self._groups,
            "groups/dropped_zero_variance": self._flat,
            "samples": len(self.samples),
            "tokens/sampled": self.num_tokens,
            "mm/samples_overlong": self._overlong,
            "mm/images": self._images,
            "mm/bytes_per_image": self._image_bytes / self._images if self._images else 0.0,
            **_by_kind("errors/", self._failures),  # first: a type may be named as a number below is
            "errors/dropped": self._dropped,
            "errors/by_policy": self._failures.total() - self._dropped,
        }

    def in_words(self) -> str:
        """Text of the batch for the log."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._failures.most_common(3))
        return (
            f"reward {self._mean_reward():.3f}, {len(self.samples)} samples, {self._flat} of {self._groups} groups "
            f"without difference" + (f", {self._failures.total()} rollouts failed ({kinds})" if kinds else "")
        )

    def _mean_reward(self) -> float:
        return sum(rollout.reward for rollout in self.rollouts) / max(1, len(self.rollouts))

    def _prepared(self, result: RolloutResult) -> tuple[RolloutResult, list[TrainingSample]]:
        """The result with its reward and a sample a branch; a record that cannot be trained is a failure."""
        if result.failure is not None:
            if not result.failure.by_policy:
                return result, []
            result = msgspec.structs.replace(result, reward=self.failed_reward)
        try:
            return result, [
                make_sample(branch, 0.0, image_token_id=self.image_token_id, sample_id=f"{result.id}.{index}")
                for index, branch in enumerate(result.branches)
            ]
        except (RefError, TransportError) as error:
            failure = failure_of(error, permanent=True)
            logger.warning(
                "rollout %s failed, task %s: %s: %s", result.id, result.task_id, failure.kind, failure.message
            )
            return msgspec.structs.replace(result, branches=[], failure=failure), []

    def _add_samples(self, samples: list[TrainingSample], advantage: float) -> frozenset[int]:
        """Adds the samples of a rollout, one a branch; returns which branches were too long."""
        overlong = set()
        for index, sample in enumerate(samples):
            if len(sample.token_ids) > self.seq_len:
                self._drop_overlong(sample)
                overlong.add(index)
                continue
            self.samples.append(with_advantage(sample, advantage))
            if sample.mm_refs is not None:
                self._images += len(sample.mm_refs.images)
                self._image_bytes += encoded_image_bytes(sample.mm_refs)
        return frozenset(overlong)

    def _drop_overlong(self, sample: TrainingSample) -> None:
        """A sample is never cut: its reward was earned by all of it."""
        error = OverlongMultimodalSample(sample, self.seq_len)
        if self.overlong_policy == "error":
            raise error
        self._overlong += 1
        logger.warning("dropped: %s", error)
