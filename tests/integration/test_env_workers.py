"""Environment workers: real processes that are killed, that hang, and that can not start."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pointillist.config import EnvConfig, OrchestratorConfig, WorkersConfig
from pointillist.config.orchestrator import ClientConfig
from pointillist.config.shared import ModelConfig
from pointillist.environments.executor import RolloutRequest
from pointillist.environments.workers import WorkerPool
from pointillist.errors import EnvironmentLoadError
from pointillist.orchestrator.runner import RolloutRunner
from pointillist.sessions import Sampling
from tests.helpers.processes import Digits, RunningServer

pytestmark = pytest.mark.integration

ENVIRONMENT = '''
import asyncio, os, signal, time
from pathlib import Path
from PIL import Image
from pointillist.environments import Task

class Trouble:
    """Does to its process what the task's name says, once."""
    def __init__(self, folder):
        self.folder = Path(folder)
    def train_tasks(self):
        names = ("calm", "die", "hang", "late", "raise", "exit", "left", "unsendable")
        return [Task(name, answer="1") for name in names]
    def eval_tasks(self):
        return []
    async def rollout(self, task, session):
        picture = Image.new("RGB", (64, 64), (200, 10, 10))
        turn = await session.generate([{"role": "user", "content": [{"type": "image", "image": picture}]}])
        if task.id == "raise":
            raise RuntimeError("on purpose")
        async def leave():
            raise SystemExit(0)
        if task.id == "exit":
            await leave()
        if task.id == "left":  # on the loop, where nothing awaits it
            self.task = asyncio.create_task(leave())
            await asyncio.sleep(0.1)
        if task.id == "unsendable":
            session.messages[0]["content"] = "\\ud800"
        if task.id == "late":
            await asyncio.sleep(60)
        mark = self.folder / task.id
        if task.id in ("die", "hang") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL) if task.id == "die" else time.sleep(60)
        return float(os.getpid())
'''


@pytest.fixture
def config(
    server: RunningServer, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> OrchestratorConfig:
    (tmp_path / "trouble.py").write_text(ENVIRONMENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return OrchestratorConfig(
        model=ModelConfig(name=str(model_dir)),
        env=EnvConfig(id="trouble:Trouble", args={"folder": str(tmp_path)}),
        output_dir=server.output_dir,
        seq_len=512,
        client=ClientConfig(base_url=[server.url]),
        rollout_timeout=5.0,
        workers=WorkersConfig(count=2, heartbeat_timeout=3.0),
        group_size=4,
        batch_size=4,
    )


def request(index: int, number: int = 0) -> RolloutRequest:
    sampling = Sampling(max_tokens=3)
    return RolloutRequest(
        id=f"{index}.{number}", group=str(index), split="train", index=index, sampling=sampling, seed=number
    )


async def test_rollouts_come_back_whole_and_groups_stay_together(config: OrchestratorConfig) -> None:
    pool = WorkerPool(config)
    try:
        await pool.start()
        assert (await pool.task_ids("train"))[:5] == ["calm", "die", "hang", "late", "raise"]
        results = await asyncio.gather(*(pool.run(request(0, number)) for number in range(4)))
        assert len({result.reward for result in results}) == 1  # one process
        for result in results:
            (branch,) = result.branches
            assert len(branch.images) == 1
            assert branch.images[0].uri.startswith(f"file://{config.output_dir}/assets/images/")
            assert sum(branch.loss_mask) <= 3
        raised, late = await asyncio.gather(pool.run(request(4)), pool.run(request(3)))
        assert raised.failure is not None
        assert (raised.failure.kind, raised.failure.message) == ("RuntimeError", "on purpose")
        assert late.failure is not None
        assert "rollout_timeout = 5 s" in late.failure.message
    finally:
        await pool.aclose()


async def test_what_an_environment_does_to_its_worker_fails_a_rollout_by_name(
    config: OrchestratorConfig, tmp_path: Path
) -> None:
    """None of it ends the worker, or lets whoever waits for the rollout wait for ever."""
    config.workers.count = 1
    pool = WorkerPool(config)
    try:
        await pool.start()
        calm = await pool.run(request(0))
        for task, kind in ((5, "SystemExit"), (6, None), (7, "UnicodeEncodeError")):
            result = await pool.run(request(task))
            assert (result.failure.kind if result.failure else None) == kind
            assert result.answer == "1"
        again = await pool.run(request(0))
        assert again.reward == calm.reward  # the same process
        assert "SystemExit on the event loop" in (config.output_dir / "logs" / "env_worker_0.log").read_text()
        (dead,) = await RolloutRunner(config.model_copy(update={"max_retries": 0}), pool).run_group(1, 1, 0, 1)
        assert dead.failure is not None
        assert (dead.failure.kind, dead.task_id, dead.answer) == ("WorkerDied", "die", "1")
    finally:
        await pool.aclose()


@pytest.mark.parametrize(("task", "name"), [(1, "die"), (2, "hang")])
async def test_a_worker_that_dies_or_hangs_is_replaced_and_its_rollouts_run_again(
    config: OrchestratorConfig, task: int, name: str, tmp_path: Path
) -> None:
    pool = WorkerPool(config)
    try:
        await pool.start()
        runner = RolloutRunner(config, pool)
        results = await runner.run_group(task, step=1, index=0, size=4)
        assert len(results) == 4
        assert runner.retried == 4
        assert (tmp_path / name).exists()
        assert all(os.kill(int(result.reward), 0) is None for result in results)  # who answered lives
    finally:
        await pool.aclose()


async def test_workers_that_can_not_start_say_why(config: OrchestratorConfig, tmp_path: Path) -> None:
    (tmp_path / "trouble.py").write_text("raise ValueError('broken on purpose')")
    config.workers.count = 1
    pool = WorkerPool(config)
    try:
        with pytest.raises(EnvironmentLoadError, match="broken on purpose"):
            await pool.start()
    finally:
        await pool.aclose()


def test_a_run_with_workers_trains_and_leaves_no_process(digits_run: Digits) -> None:
    code, output = digits_run.run("--orchestrator.workers.count", 2)
    assert code == 0, output
    assert (digits_run.output_dir / "logs" / "env_worker_1.log").is_file()
    assert worker_pids(digits_run.root) == []


def test_a_killed_orchestrator_leaves_no_worker(digits_run: Digits) -> None:
    from pointillist.base.jsonl import read_jsonl
    from pointillist.runs.paths import RunPaths
    from tests.helpers.processes import processes_of, wait_for

    process = digits_run.start("--orchestrator.workers.count", 1, "--max-steps", 500)
    wait_for(lambda: read_jsonl(RunPaths(digits_run.output_dir).metrics / "trainer.jsonl"), process)
    assert worker_pids(digits_run.root) != []
    os.kill(processes_of(digits_run.root)["orchestrator"], signal.SIGKILL)
    process.communicate(timeout=900)
    assert process.returncode == 1
    wait_for(lambda: worker_pids(digits_run.root) == [], seconds=600)


def worker_pids(root: Path) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            command: Any = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if b"env-worker" in command and str(root).encode() in command:
            found.append(int(entry.name))
    return found
