"""The orchestrator's loop: which steps may be rolled out before which weights are there, and from where it goes on."""

import asyncio
import json
from pathlib import Path

import pytest

from pointillist.config import EnvConfig, ModelConfig, OrchestratorConfig
from pointillist.environments.executor import RolloutRequest, RolloutResult
from pointillist.orchestrator.orchestrator import Orchestrator
from pointillist.orchestrator.runner import RolloutRunner
from pointillist.runs.paths import ORCHESTRATOR_STATE, RunPaths
from pointillist.sessions import Branch
from pointillist.transport import RankBatch

STEPS = 5


class Weights:
    """Versions that come when the test says so."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.wanted: asyncio.Queue[int] = asyncio.Queue()
        """Versions that were waited for before they were there."""
        self._changed = asyncio.Condition()

    async def follow(self) -> None:
        await asyncio.Event().wait()

    async def wait_for(self, version: int) -> None:
        if version > self.version:
            self.wanted.put_nowait(version)
        async with self._changed:
            await self._changed.wait_for(lambda: version <= self.version)

    async def publish(self, version: int) -> None:
        async with self._changed:
            self.version = version
            self._changed.notify_all()


class Host:
    """Rollouts of two tokens, sampled with the weights that there are; members of a group have different rewards."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []
        self.weights = Weights(0)

    async def start(self) -> None:
        pass

    async def task_ids(self, split: str) -> list[str]:
        return ["a", "b", "c", "d", "e"] if split == "train" else []

    async def run(self, request: RolloutRequest) -> RolloutResult:
        self.requests.append(request)
        branch = Branch(
            token_ids=[8, 9, 10], loss_mask=[False, True, True], logprobs_sampled=[0.0, -1.0, -1.0],
            weight_versions=[-1, self.weights.version, self.weights.version], temperatures=[1.0] * 3, images=[],
            messages=[],
        )  # fmt: skip
        reward = float(request.id.rpartition(".")[2])
        return RolloutResult(id=request.id, task_id="t", reward=reward, turns=1, branches=[branch])


class Sender:
    def __init__(self) -> None:
        self.sent: list[RankBatch] = []

    @property
    def steps(self) -> list[int]:
        return [batch.step for batch in self.sent]

    def send(self, batches: list[RankBatch]) -> None:
        self.sent += batches

    def close(self) -> None:
        pass


class Client:
    servers = ()

    async def wait_until_ready(self, seconds: float) -> None:
        pass


def _orchestrator(
    model_dir: Path, run: Path, monkeypatch: pytest.MonkeyPatch, **fields: object
) -> tuple[Orchestrator, Host, Sender]:
    host, sender = Host(), Sender()
    monkeypatch.setattr("pointillist.orchestrator.orchestrator.Executor", lambda _: host)
    config = OrchestratorConfig.model_validate(
        {"model": ModelConfig(name=str(model_dir)), "env": EnvConfig(id="e"), "output_dir": run, "max_steps": STEPS,
         "batch_size": 2, "group_size": 2, **fields}
    )  # fmt: skip
    orchestrator = Orchestrator(config)
    orchestrator.sender, orchestrator.client, orchestrator.weights = sender, Client(), host.weights  # type: ignore[assignment]
    return orchestrator, host, sender


@pytest.mark.parametrize("bound", [0, 1, 2])
async def test_rollouts_run_ahead_of_training_up_to_the_bound_and_no_further(
    bound: int, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the trainer works on step n, the rollouts of step n + bound are sent; further ones wait for its weights."""
    orchestrator, host, sender = _orchestrator(model_dir, tmp_path, monkeypatch, max_off_policy_steps=bound)
    running = asyncio.create_task(orchestrator.run())
    for version in range(1, STEPS + 1):
        wanted = asyncio.create_task(host.weights.wanted.get())
        await asyncio.wait({running, wanted}, return_when=asyncio.FIRST_COMPLETED)
        assert wanted.done(), f"nothing waits for version {version}; sent: {sender.steps}"
        last = version + bound >= STEPS  # the evaluation after the last step waits for the last weights
        assert (wanted.result(), sender.steps) == (
            (STEPS, list(range(1, STEPS + 1))) if last else (version, list(range(1, version + bound + 1)))
        )
        if last:
            break
        await host.weights.publish(version)
    await host.weights.publish(STEPS)
    await running


async def test_a_resumed_run_goes_on_with_the_tasks_after_those_that_are_done(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[list[int]] = []
    for name, step in (("whole", None), ("resumed", 3)):
        if step is not None:
            folder = RunPaths(tmp_path / name).checkpoint_step(step)
            folder.mkdir(parents=True)
            (folder / ORCHESTRATOR_STATE).write_bytes(sender.sent[step - 1].orchestrator_state)  # noqa: F821
        orchestrator, host, sender = _orchestrator(model_dir, tmp_path / name, monkeypatch, resume_step=step)
        host.weights.version = STEPS
        await orchestrator.run()
        tasks.append([request.index for request in host.requests if int(request.id.partition(".")[0]) > 3])
    assert tasks[0] == tasks[1]
    assert json.loads(sender.sent[-1].orchestrator_state) == {"step": STEPS, "task_position": STEPS}


async def test_members_of_a_group_have_seeds_of_their_own_and_evaluations_are_greedy() -> None:
    config = OrchestratorConfig(model=ModelConfig(name="m"), env=EnvConfig(id="e"))
    config.sampling.temperature, config.sampling.top_p = 0.7, 0.9
    host = Host()
    runner = RolloutRunner(config, host)  # type: ignore[arg-type]
    host.weights.version = 9
    await runner.run_group(0, step=1, index=0, size=4)
    await runner.run_group(0, step=1, index=1, size=4)
    assert len({request.seed for request in host.requests}) == 8
    assert {request.sampling.temperature for request in host.requests} == {0.7}
    host.requests.clear()
    await runner.run_greedy(["a", "b"], 3)
    assert [(each.index, each.split, each.sampling.temperature, each.sampling.top_p) for each in host.requests] == [
        (0, "eval", 0.0, 1.0), (1, "eval", 0.0, 1.0),
    ]  # fmt: skip
