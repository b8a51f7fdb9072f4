"""The orchestrator: for every step, roll out groups, compare, pack, ship.

    wait for weights that are new enough -> groups of rollouts -> advantages -> samples -> packed rows -> trainer

At `max_off_policy_steps = 0` a step's rollouts wait for the weights of the step before; above it they may begin that
many versions earlier, and new weights reach the servers while they run. The bound holds for every token: a rollout with
an older one (a server that came back with old weights) is tried again. Held-out tasks are evaluated greedily, through
the same renderer and the same wire, before the first step, every `eval.interval` steps and after the last.
"""

import asyncio
import json
import logging
import sys
import time
from typing import Any, Literal

from pointillist.config import OrchestratorConfig, RunPaths
from pointillist.config.run_paths import ORCHESTRATOR_STATE, append_jsonl, read_jsonl
from pointillist.errors import InferenceError, PointillistError
from pointillist.families import load_family, resolve_model_dir
from pointillist.heartbeat import SERVERS, beating, enter
from pointillist.orchestrator.advantages import group_advantages
from pointillist.orchestrator.packing import OverlongMultimodalSample, pack
from pointillist.orchestrator.records import Outcome, RolloutRecorder, write_records
from pointillist.orchestrator.runner import RolloutErrors, RolloutRunner
from pointillist.orchestrator.samples import make_sample
from pointillist.orchestrator.tasks import TaskOrder
from pointillist.orchestrator.weights import WeightWatcher
from pointillist.pools import SENDING
from pointillist.render import FolderTokenizer
from pointillist.rollouts import InferenceClient
from pointillist.rollouts.executor import Executor, RolloutHost, RolloutResult
from pointillist.rollouts.workers import WorkerPool
from pointillist.system import resident_mb
from pointillist.transport import RankBatch, Sender, TrainingSample, make_sender
from pointillist.transport.types import encoded_image_bytes

logger = logging.getLogger(__name__)

_EMPTY_ROUNDS = 10
"""Rounds without a single group to learn from after which the run stops."""


async def orchestrate(config: OrchestratorConfig) -> None:
    """Runs until `max_steps` are shipped and the last weights are evaluated.

    Raises:
        ConfigError: The model folder is unusable.
        EnvironmentLoadError: The environment can not be had.
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
            await self._step(step)
            if step % config.eval.interval == 0 or step == config.max_steps:
                await self._wait_for_weights(step)
                await self._evaluate(step)

    async def _step(self, step: int) -> None:
        started = time.perf_counter()
        await self._wait_for_weights(step - 1 - self.config.max_off_policy_steps, step)
        waited = time.perf_counter() - started
        enter("rollouts", step=step)
        batch = await self._collect(step)
        packing = time.perf_counter()
        ranks = pack(batch.samples, seq_len=self.config.seq_len, num_workers=self.config.num_train_workers)
        # Before the batch: whoever looks after images must find every reference that can be trained on.
        write_records(self.paths.rollouts_file(step), batch.records)
        state = json.dumps({"step": step, "task_position": self.tasks.position}).encode()
        packed = [
            RankBatch(step=step, micro_batches=rows, num_tokens=batch.num_tokens, orchestrator_state=state)
            for rows in ranks
        ]
        enter("pack_and_send", step=step, waits_for="the trainer to take earlier batches")
        await SENDING.run(self.sender.send, packed)
        ended = time.perf_counter()
        errors, self.runner.errors = self.runner.errors, RolloutErrors()
        metrics = {
            "step": step,
            **batch.metrics(),
            "errors/dropped": sum(errors.counts.values()),
            "errors/retried": errors.retried,
            **{f"errors/{name}": count for name, count in errors.counts.items()},
            "weights/version": self.weights.version,
            "rollouts/per_second": len(batch.rollouts) / max(1e-9, packing - started - waited),
            "memory/resident_mb": resident_mb(),
            "time/wait_for_weights": waited,
            "time/rollouts": packing - started - waited,
            "time/pack_and_send": ended - packing,
        }
        append_jsonl(self.paths.metrics / "orchestrator.jsonl", metrics)
        logger.info("step %d: reward %.3f, %d samples", step, metrics["reward/mean"], len(batch.samples))

    async def _collect(self, step: int) -> "_Batch":
        """Groups until there is something to learn from."""
        config = self.config
        batch = _Batch(self.recorder, self.family.image_token_id, config.seq_len, config.multimodal.overlong_policy)
        for attempt in range(_EMPTY_ROUNDS):
            tasks = self.tasks.take(config.batch_size // config.group_size)
            groups = await asyncio.gather(
                *(
                    self.runner.run_group(task, step, attempt * config.batch_size + index, config.group_size)
                    for index, task in enumerate(tasks)
                )
            )
            for rollouts in groups:
                batch.add_group(rollouts, normalize_std=config.advantage.normalize_std)
            if batch.samples:
                return batch
            if not batch.rollouts:
                self._keep_for_the_eye(step, batch)
                raise InferenceError(f"step {step}: no rollout succeeded; the last failed on {self.runner.errors.last}")
            logger.warning("step %d: all groups have the same reward throughout, rolling out others", step)
        self._keep_for_the_eye(step, batch)
        rewards = sorted({f"{rollout.reward:g}" for rollout in batch.rollouts})
        raise PointillistError(
            f"step {step}: {_EMPTY_ROUNDS} rounds of groups without any difference in reward (rewards were "
            f"{', '.join(rewards[:4])}): nothing to learn from; see what was said: pointillist view "
            f"{self.paths.output_dir}"
        )

    def _keep_for_the_eye(self, step: int, batch: "_Batch") -> None:
        """Writes the rollouts of a step that can not be trained: they say why."""
        write_records(self.paths.rollouts_file(step), batch.records)

    async def _wait_for_weights(self, version: int, step: int | None = None) -> None:
        enter("wait_for_weights", step=step, waits_for=f"weights of version {version} of the trainer")
        await self.weights.wait_for(version)

    async def _evaluate(self, version: int) -> None:
        if not self.eval_tasks:
            return
        enter("evaluate", step=version)
        started = time.perf_counter()
        rollouts = await self.runner.run_greedy(self.eval_tasks, version)
        write_records(
            self.paths.eval_file(version),
            [self.recorder.record(rollout, group=f"eval.{rollout.task_id}") for rollout in rollouts],
        )
        rewards = [rollout.reward for rollout in rollouts if rollout.failure is None]
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        metrics = {
            "step": version,
            "eval/accuracy": mean,
            "eval/tasks": len(rewards),
            "eval/failed": len(rollouts) - len(rewards),
            "time/eval": time.perf_counter() - started,
            # The promise of the environment side, checked where it counts: in the process itself.
            "torch_imported": "torch" in sys.modules,
        }
        append_jsonl(self.paths.metrics / "eval.jsonl", metrics)
        logger.info("version %d: held-out accuracy %.3f on %d tasks", version, mean, len(rewards))

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


class _Batch:
    """Rollouts of one step, as they come in."""

    def __init__(
        self,
        recorder: RolloutRecorder,
        image_token_id: int,
        seq_len: int,
        overlong_policy: Literal["drop", "error"],
    ) -> None:
        self._recorder = recorder
        self._image_token_id = image_token_id
        self._seq_len = seq_len
        self._overlong_policy = overlong_policy
        self._overlong = 0
        self.rollouts: list[RolloutResult] = []
        """Those that succeeded."""
        self.records: list[dict[str, Any]] = []
        """Of all rollouts."""
        self.samples: list[TrainingSample] = []
        self.num_tokens = 0
        self._groups = 0
        self._flat = 0
        self._image_bytes = 0
        self._images = 0

    def add_group(self, results: list[RolloutResult], *, normalize_std: bool) -> None:
        """Adds the rollouts of one task; a group that is too small or all the same gives no samples."""
        rollouts = [result for result in results if result.failure is None]
        self._groups += 1
        self.rollouts += rollouts
        self.num_tokens += sum(sum(branch.sampled) for rollout in rollouts for branch in rollout.branches)
        comparable = len(rollouts) > 1
        advantages = (
            group_advantages([rollout.reward for rollout in rollouts], normalize_std=normalize_std)
            if comparable
            else None
        )
        if advantages is None:
            self._flat += 1
        self.records += [self._recorder.record(result) for result in results if result.failure is not None]
        for index, rollout in enumerate(rollouts):
            if advantages is None:
                unused: Outcome = "zero_variance" if comparable else "alone"
                self.records.append(self._recorder.record(rollout, outcome=unused))
                continue
            overlong = self._add_samples(rollout, advantages[index])
            self.records.append(
                self._recorder.record(rollout, outcome="sent", advantage=advantages[index], overlong=overlong)
            )

    def metrics(self) -> dict[str, float]:
        """Numbers of the batch."""
        rewards = [rollout.reward for rollout in self.rollouts]
        turns = [rollout.turns for rollout in self.rollouts]
        return {
            "reward/mean": sum(rewards) / len(rewards),
            "rollouts/total": len(self.rollouts),
            "rollouts/turns": sum(turns) / len(turns),
            "groups/total": self._groups,
            "groups/dropped_zero_variance": self._flat,
            "samples": len(self.samples),
            "tokens/sampled": self.num_tokens,
            "mm/samples_overlong": self._overlong,
            "mm/images": self._images,
            "mm/bytes_per_image": self._image_bytes / self._images if self._images else 0.0,
        }

    def _drop_overlong(self, sample: TrainingSample) -> None:
        """A sample is never cut: its reward was earned by all of it."""
        error = OverlongMultimodalSample(sample, self._seq_len)
        if self._overlong_policy == "error":
            raise error
        self._overlong += 1
        logger.warning("dropped: %s", error)

    def _add_samples(self, rollout: RolloutResult, advantage: float) -> frozenset[int]:
        """Adds a sample a branch; returns which branches were too long."""
        overlong = set()
        for index, branch in enumerate(rollout.branches):
            sample = make_sample(
                branch, advantage, image_token_id=self._image_token_id, sample_id=f"{rollout.id}.{index}"
            )
            if len(sample.token_ids) > self._seq_len:
                self._drop_overlong(sample)
                overlong.add(index)
                continue
            self.samples.append(sample)
            if sample.mm_refs is not None:
                self._images += len(sample.mm_refs.images)
                self._image_bytes += encoded_image_bytes(sample.mm_refs)
        return frozenset(overlong)
