"""Unmodified verifiers environments, in process and over their ZMQ server: `make test-verifiers`."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import verifiers.v1 as vf

import pointillist_verifiers
from pointillist.base.jsonl import read_jsonl
from pointillist.config import EnvConfig, RolloutsConfig
from pointillist.config.orchestrator import ClientConfig
from pointillist.config.shared import CARRIER, ModelConfig
from pointillist.environments.executor import Executor, RolloutRequest
from pointillist.errors import EnvironmentLoadError
from pointillist.orchestrator.samples import make_sample
from pointillist.render import RawRenderer
from pointillist.runs.paths import RunPaths
from pointillist.sessions import Sampling
from tests.helpers.processes import pointillist
from tests.helpers.scripted import ScriptedPolicy, call

PLUGINS = Path(__file__).parent / "plugins"


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environments, within reach of this process and of the servers that verifiers starts."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLUGINS), str(Path.cwd())]))
    monkeypatch.setenv(CARRIER, str(tmp_path / "images"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # verifiers keeps work folders below it


@pytest.fixture
async def policy(renderer: RawRenderer) -> AsyncIterator[ScriptedPolicy]:
    scripted = ScriptedPolicy(renderer)
    await scripted.start()
    yield scripted
    await scripted.stop()


def executor(policy: ScriptedPolicy, model_dir: Path, folder: Path, **args: Any) -> Executor:
    return Executor(
        RolloutsConfig(
            model=ModelConfig(name=str(model_dir)),
            env=EnvConfig(id="verifiers", args=args),
            output_dir=folder,
            client=ClientConfig(base_url=[policy.url]),
        )
    )


def request(index: int, split: Any = "train") -> RolloutRequest:
    return RolloutRequest(
        id=str(index), group="g", split=split, index=index, sampling=Sampling(max_tokens=256), seed=index
    )


def prompt_text(renderer: RawRenderer, body: dict[str, Any]) -> str:
    return renderer.tokenizer.decode([token for token in body["token_ids"] if token != renderer.family.image_token_id])


@pytest.mark.parametrize("workers", [0, 1])
async def test_text_environments_give_their_own_reward(
    policy: ScriptedPolicy, renderer: RawRenderer, model_dir: Path, tmp_path: Path, workers: int
) -> None:
    def answer(body: dict[str, Any]) -> str:
        first, second = re.findall(r"What is (\d+) \+ (\d+)", prompt_text(renderer, body))[-1]
        return str(int(first) + int(second) + (first == "3"))  # one wrong answer

    policy.answer_by(answer)
    host = executor(
        policy, model_dir, tmp_path, taskset="sums-by-text", eval_args={"split": "eval", "num_tasks": 3},
        server_workers=workers,
    )  # fmt: skip
    await host.start()
    try:
        assert (len(await host.task_ids("train")), len(await host.task_ids("eval"))) == (8, 3)
        results = await asyncio.gather(*(host.run(request(index)) for index in range(8)))
        assert [result.reward for result in results] == [1, 1, 1, 0, 1, 1, 1, 1], results[0].failure
        assert (await host.run(request(0, "eval"))).reward == 1
        for result in results:
            (branch,) = result.branches
            assert [message["role"] for message in branch.messages] == ["system", "user", "assistant"]
            assert sum(branch.loss_mask) > 0
    finally:
        await host.aclose()


@pytest.mark.parametrize("workers", [0, 1])
async def test_tools_that_return_pictures_are_recorded_and_never_traced(
    policy: ScriptedPolicy, renderer: RawRenderer, model_dir: Path, tmp_path: Path, workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def answer(body: dict[str, Any]) -> str:
        text = prompt_text(renderer, body)
        second = re.findall(r"View (\w+),", text)[-1]
        first = {"green": "red", "blue": "green", "red": "blue"}[second]
        return f"{first} {second}" if "picture" in text.split("View")[-1] else call("view", name=second)

    episodes: list[str] = []
    reward = pointillist_verifiers._reward

    def keep(episode: Any) -> float:
        episodes.append(json.dumps(episode.model_dump(mode="json"), default=str))
        return reward(episode)

    monkeypatch.setattr(pointillist_verifiers, "_reward", keep)
    policy.answer_by(answer)
    host = executor(policy, model_dir, tmp_path, taskset="look-twice", server_workers=workers)
    await host.start()
    try:
        results = await asyncio.gather(*(host.run(request(index)) for index in range(4)))
        assert [result.reward for result in results] == [1, 1, 1, 1], results[0].failure
        for result in results:
            (branch,) = result.branches
            assert len(branch.images) == 2
            assert [message["role"] for message in branch.messages] == ["user", "assistant", "tool", "assistant"]
            sample = make_sample(branch, 1.0, image_token_id=renderer.family.image_token_id, sample_id="x")
            assert sum(sample.loss_mask) == sum(branch.loss_mask)
        for episode in episodes:
            assert "base64" not in episode
            assert episode.count("file://") >= 2
        assert len(episodes) == 4
    finally:
        await host.aclose()


async def test_pictures_of_foreign_harnesses_are_stored_by_the_hook(
    policy: ScriptedPolicy, model_dir: Path, tmp_path: Path
) -> None:
    """What an environment's own harness would send: the hook alone changes it."""
    host = executor(policy, model_dir, tmp_path, taskset="look-twice")  # tells the store
    environment = pointillist_verifiers._offloading(vf.environment_class("look-twice", ""))
    assert environment.__name__.startswith("Offloading")
    task = next(iter(vf.load_taskset(host._environment._config.taskset)))
    hooked = pointillist_verifiers._hooked(type(task))
    message = vf.ToolMessage(tool_call_id="c", content=task.data.prompt[0].content)
    before = vf.Request.model_construct(messages=[message])
    after = await hooked.store_pictures(task, before)
    assert "base64" in str(before.messages)
    assert "base64" not in str(after.messages)
    assert await hooked.store_pictures(task, after) is None
    await host.aclose()


async def test_what_fails_in_verifiers_is_a_failure_of_its_rollout(
    policy: ScriptedPolicy, model_dir: Path, tmp_path: Path
) -> None:
    def answer(_: dict[str, Any]) -> str:
        raise RuntimeError("no answer")

    policy.answer_by(answer)
    host = executor(policy, model_dir, tmp_path, taskset="sums-by-text")
    await host.start()
    try:
        result = await host.run(request(0))
        assert result.failure is not None
        assert result.failure.kind == "RolloutError"
        assert "ProviderError" in result.failure.message
    finally:
        await host.aclose()


def test_environments_that_are_not_there_are_named(policy: ScriptedPolicy, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLoadError, match="no-such-taskset"):
        executor(policy, model_dir, tmp_path, taskset="no-such-taskset")
    with pytest.raises(EnvironmentLoadError, match="colour"):
        executor(policy, model_dir, tmp_path, taskset="look-twice", args={"colour": "red"})


CONFIG = """
seq_len = 512
max_steps = 3

[env]
id = "verifiers"

[orchestrator]
batch_size = 32
group_size = 8
sampling = { max_tokens = 2 }
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_whole_run_on_a_verifiers_environment(digits: tuple[Path, Path], tmp_path: Path, workers: int) -> None:
    """Server, trainer, orchestrator; rewards of a policy at chance."""
    (tmp_path / "rl.toml").write_text(CONFIG)
    arguments = json.dumps({"taskset": "parity", "server_workers": workers})
    process = pointillist(
        "rl", "@", tmp_path / "rl.toml", "--model.name", digits[1], "--output-dir", tmp_path / "run",
        "--env.args", arguments, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    records = read_jsonl(RunPaths(tmp_path / "run").metrics / "trainer.jsonl")
    assert len(records) == 3
    assert all(record["mismatch/mean_abs"] < 1e-5 and record["mm/images_total"] > 0 for record in records)
