"""Whatever an environment raises, returns or does to its session fails one rollout by name, and nothing else."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.config import EnvConfig, ModelConfig, OrchestratorConfig
from pointillist.environments import Task, loop
from pointillist.environments.executor import LARGEST_REWARD, Executor, RolloutRequest, RolloutResult
from pointillist.environments.failures import answer_text, printable
from pointillist.environments.loop import LoopWatch
from pointillist.errors import ContextLengthError, EnvironmentLoadError, PointillistError
from pointillist.orchestrator.advantages import group_advantages
from pointillist.orchestrator.records import RolloutRecorder
from pointillist.orchestrator.runner import RolloutRunner
from pointillist.orchestrator.samples import make_sample
from pointillist.render import FolderTokenizer
from pointillist.runs.records import BranchRecord, RolloutRecord, write_rollouts
from pointillist.sessions import Completion, Sampling, Session
from tests.helpers.files import ROOT

BAD_TEXT = "x" * 5_000_000 + "\x1b[2J\ud800"
Behaviour = Callable[[Any], Awaitable[Any]]


class Stranger:
    """An environment that does what the test says, after one turn."""

    behaviour: Behaviour = staticmethod(lambda _: asyncio.sleep(0))
    closing: Callable[[], Any] = staticmethod(lambda: asyncio.sleep(0))

    def train_tasks(self) -> list[Task]:
        return [Task("7", {"answer": "seven"})]

    def eval_tasks(self) -> list[Task]:
        return []

    async def rollout(self, task: Task, session: Session) -> Any:
        await session.generate([{"role": "user", "content": "What?"}])
        return await type(self).behaviour(session)

    async def aclose(self) -> None:
        await type(self).closing()


class Script:
    """Stands for the inference client."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    async def generate(self, *_: Any, **__: Any) -> Completion:
        return Completion([300, self.stop], [-0.5, -0.5], [0, 0], "stop")

    async def aclose(self) -> None:
        pass


def config_of(model_dir: Path, output_dir: Path, **fields: Any) -> OrchestratorConfig:
    return OrchestratorConfig(
        model=ModelConfig(name=str(model_dir)),
        env=EnvConfig(id="tests.unit.test_rollouts:Stranger"),
        output_dir=output_dir,
        **{"seq_len": 200, "max_retries": 0, **fields},
    )


@pytest.fixture
def executor(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Executor:
    monkeypatch.delenv("VF_RENDERER_IMAGE_OFFLOAD_DIR", raising=False)
    made = Executor(config_of(model_dir, tmp_path))
    monkeypatch.delenv("VF_RENDERER_IMAGE_OFFLOAD_DIR")
    stop = made._sessions.renderer.stop_token_ids[0]
    made._sessions = dataclasses.replace(made._sessions, client=Script(stop))  # type: ignore[arg-type]
    return made


def request(number: int = 0) -> RolloutRequest:
    return RolloutRequest(
        id=f"1.0.{number}", group="1.0", split="train", index=0, sampling=Sampling(max_tokens=4), seed=number
    )


def raising(error: BaseException) -> Behaviour:
    async def behaviour(_: Any) -> Any:
        raise error

    return behaviour


def giving(value: Any) -> Behaviour:
    async def behaviour(_: Any) -> Any:
        return value() if callable(value) else value

    return behaviour


class BadText(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class BadNumber:
    def __float__(self) -> float:
        raise SystemExit(4)

    def __len__(self) -> int:
        raise SystemExit(5)


async def breaks_the_length(session: Any) -> float:
    session.turns = BadNumber()
    return 1.0


async def cancelled_child(_: Any) -> float:
    child = asyncio.ensure_future(asyncio.sleep(10))
    child.cancel()
    await child
    return 1.0


async def cancels_itself(_: Any) -> float:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(10)
    return 1.0


async def exits_in_a_task(_: Any) -> float:
    async def leave() -> None:
        sys.exit(0)

    await asyncio.create_task(leave())
    return 1.0


async def recursion(session: Any) -> float:
    return await recursion(session)


async def breaks_the_turns(session: Any) -> float:
    session.turns = None
    return 1.0


async def breaks_the_trace(session: Any) -> float:
    session._trace = 5
    return 1.0


async def coroutine(_: Any) -> Any:
    return recursion(None)


def deep_group() -> BaseException:
    error: BaseException = SystemExit(1)
    for _ in range(3000):
        error = BaseExceptionGroup("deep", [error])
    return error


RAISED: list[tuple[Behaviour, str, str]] = [
    (raising(SystemExit(0)), "SystemExit", "0"),
    (raising(KeyboardInterrupt()), "KeyboardInterrupt", ""),
    (raising(GeneratorExit()), "GeneratorExit", ""),
    (raising(asyncio.CancelledError()), "CancelledError", ""),
    (raising(StopAsyncIteration()), "StopAsyncIteration", ""),
    (raising(TimeoutError("mine")), "TimeoutError", "mine"),
    (cancelled_child, "CancelledError", ""),
    (cancels_itself, "CancelledError", ""),
    (recursion, "RecursionError", "maximum recursion depth"),
    (raising(BaseExceptionGroup("x", [SystemExit(1)])), "BaseExceptionGroup", "SystemExit: 1"),
    (raising(deep_group()), "BaseExceptionGroup", "SystemExit: 1"),
    (raising(ValueError(BAD_TEXT)), "ValueError", "(5,000,005 characters)"),
    (raising(ValueError("\x1b[2J\ud800\n")), "ValueError", "\\x1b[2J\\ud800"),
    (raising(BadText()), "BadText", "without a text"),
    (raising(type("a b\né", (Exception,), {})()), "a_b__", ""),
    (giving(float("nan")), "RewardError", "reward is nan, expected a real number"),
    (giving(float("-inf")), "RewardError", "reward is -inf"),
    (giving(1e308), "RewardError", "within plus or minus 1e+09"),
    (giving(10**400), "RewardError", "reward is int"),
    (giving(None), "RewardError", "reward is NoneType"),
    (giving("nan"), "RewardError", "reward is str"),
    (giving(b"1"), "RewardError", "reward is bytes"),
    (giving(1j), "RewardError", "reward is complex"),
    (giving(np.complex64(1)), "RewardError", "reward is complex64"),
    (giving(np.array("1")), "RewardError", "reward is ndarray of <U1"),
    (giving(np.array("1", dtype=object)), "RewardError", "reward is ndarray of object"),
    (giving(memoryview(b"1")), "RewardError", "reward is memoryview"),
    (giving(BadNumber), "SystemExit", "4"),
    (breaks_the_length, "SystemExit", "5"),
    (giving(lambda: [1.0]), "RewardError", "reward is list"),
    (coroutine, "RewardError", "a coroutine that was not awaited"),
    (breaks_the_turns, "TypeError", "NoneType"),
    (breaks_the_trace, "AttributeError", "branches"),
]


@pytest.mark.parametrize(("behaviour", "kind", "message"), RAISED, ids=[str(n) for n in range(len(RAISED))])
async def test_whatever_an_environment_does_fails_that_rollout_by_name(
    executor: Executor, behaviour: Behaviour, kind: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Stranger, "behaviour", staticmethod(behaviour))
    result = await executor.run(request())
    failure = result.failure
    assert failure is not None
    assert (failure.kind, message in failure.message) == (kind, True), failure
    assert len(failure.message) < 5000
    assert len(failure.traceback) < 50_000
    # It is fit for every wire and for the record.
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=RolloutResult) == result
    recorder = RolloutRecorder("e", FolderTokenizer(Path(executor._sessions.model_name)))
    write_rollouts(tmp_path / "r.jsonl", [recorder.record(result)])
    record = msgspec.json.decode((tmp_path / "r.jsonl").read_bytes())
    assert (record["task"], record["answer"], record["outcome"]) == ("7", "seven", "failed")
    assert record["error"]["kind"] == kind
    monkeypatch.setattr(Stranger, "behaviour", staticmethod(giving(1.0)))
    assert (await executor.run(request(1))).reward == 1.0


@pytest.mark.parametrize(
    ("given", "reward"),
    [(1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (np.bool_(True), 1.0), (np.array(0.25), 0.25),
     (-1e9, -1e9)],
)  # fmt: skip
async def test_real_numbers_are_rewards(
    executor: Executor, given: Any, reward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stranger, "behaviour", staticmethod(giving(given)))
    result = await executor.run(request())
    assert result.failure is None
    assert (result.reward, type(result.reward), result.answer) == (reward, float, "seven")


async def test_a_failed_rollout_keeps_its_conversation_and_says_where(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stranger, "behaviour", staticmethod(raising(ValueError("no"))))
    result = await executor.run(request())
    (branch,) = result.branches
    assert result.turns == 1
    assert branch.messages[0]["content"] == "What?"
    assert result.failure is not None
    assert f'{Path(__file__).name}", line' in result.failure.traceback
    assert result.failure.traceback.endswith("ValueError: no")


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_rollout_that_takes_too_long_is_given_up(
    executor: Executor, stubborn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it does not end when it is cancelled."""
    may_end = asyncio.Event()

    async def slow(_: Any) -> float:
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                if not stubborn:
                    raise
        return 1.0

    executor._timeout = 0.2
    monkeypatch.setattr("pointillist.environments.executor._CANCEL_SECONDS", 0.1)
    monkeypatch.setattr(Stranger, "behaviour", staticmethod(slow))
    result = await executor.run(request())
    assert result.failure is not None
    assert result.failure.kind == "RolloutTimeoutError"
    assert "took longer than rollout_timeout = 0.2 s" in result.failure.message
    assert ("although it was cancelled" in result.failure.message) == stubborn
    assert ("may_end.wait()" in result.failure.traceback) != stubborn
    assert (result.turns, len(result.branches)) == (1, 1)
    may_end.set()


@pytest.mark.parametrize("way", ["sleep", "spin", "task"])
async def test_a_rollout_that_blocks_the_loop_is_interrupted(
    executor: Executor, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def block(_: Any) -> float:
        while way == "spin":
            pass
        time.sleep(1000)  # noqa: ASYNC251 - on purpose
        return 1.0

    async def spawn(_: Any) -> float:
        return await asyncio.create_task(block(_))

    monkeypatch.setattr("pointillist.environments.loop._SAY_SECONDS", 0.2)
    monkeypatch.setattr(Stranger, "behaviour", staticmethod(spawn if way == "task" else block))
    executor._timeout = 1.0
    executor._watch = LoopWatch(1.0)
    before = signal.getsignal(signal.SIGUSR1)
    await executor.start()
    try:
        failure = (await executor.run(request())).failure
        assert failure is not None
        assert failure.kind == "RolloutTimeoutError"
        assert "blocked the event loop for longer than rollout_timeout = 1 s" in failure.message
        assert "in block" in failure.traceback
        assert "the event loop is blocked for" in caplog.text
    finally:
        await executor.aclose()
    assert signal.getsignal(signal.SIGUSR1) == before


async def test_the_runs_own_cancellation_is_one(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def slow(_: Any) -> float:
        begun.set()
        try:
            await asyncio.sleep(1000)
        finally:
            ended.set()
        return 1.0

    monkeypatch.setattr(Stranger, "behaviour", staticmethod(slow))
    running = asyncio.create_task(executor.run(request()))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await ended.wait()


@pytest.mark.parametrize("stage", ["raises", "hangs"])
async def test_an_environment_that_can_not_be_closed_is_left(
    executor: Executor, stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pointillist.environments.executor._CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(
        Stranger, "closing", staticmethod((lambda: raising(SystemExit(0))(None)) if stage == "raises" else hang)
    )
    await executor.aclose()
    assert "closing the environment failed: " + ("SystemExit" if stage == "raises" else "Rollout") in caplog.text


async def hang() -> None:
    await asyncio.sleep(1000)


async def test_a_conversation_that_outgrows_its_room_counts_as_the_policys_doing(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(session: Session) -> float:
        while True:
            await session.generate([{"role": "user", "content": "more " * 20}])

    async def agent(session: Session) -> float:
        try:
            await talk(session)
        except ContextLengthError:
            raise RuntimeError("400 from the API") from None
        return 1.0

    async def flood(session: Session) -> float:
        try:
            await session.generate([{"role": "user", "content": "more " * 1_000_000}])
        except ContextLengthError:
            raise RuntimeError("400 from the API") from None
        return 1.0

    for behaviour, kind in ((talk, "ContextLengthError"), (agent, "RuntimeError"), (flood, "RuntimeError")):
        monkeypatch.setattr(Stranger, "behaviour", staticmethod(behaviour))
        failure = (await executor.run(request())).failure
        assert failure is not None
        assert (failure.kind, failure.by_policy, failure.permanent) == (kind, True, True)
    # Where the task itself is too long the policy has done nothing.
    executor._sessions = dataclasses.replace(executor._sessions, seq_len=2)
    failure = (await executor.run(request())).failure
    assert failure is not None
    assert (failure.kind, failure.by_policy, failure.permanent) == ("ContextLengthError", False, True)


async def test_a_cause_is_logged_once_with_its_traceback(
    executor: Executor,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Stranger, "behaviour", staticmethod(raising(ValueError("a\nb"))))
    runner = RolloutRunner(config_of(model_dir, tmp_path, max_retries=1), executor)
    results = await runner.run_group(0, step=1, index=0, size=30)
    assert all(result.failure is not None for result in results)
    assert runner.retried == 30
    lines = caplog.text.splitlines()
    assert sum("Traceback" in line for line in lines) == 1
    assert sum("task 7: ValueError" in line for line in lines) == 20
    assert "further ones of this cause are not logged" in caplog.text
    assert not any(line.startswith("b") for line in lines)  # what an environment says never looks like a line of ours


@given(st.lists(st.floats(-LARGEST_REWARD, LARGEST_REWARD), min_size=2, max_size=8), st.booleans())
def test_advantages_of_all_rewards_are_finite(rewards: list[float], normalize: bool) -> None:
    advantages = group_advantages(rewards, normalize_std=normalize)
    assert advantages is None or bool(np.isfinite(np.float32(advantages)).all())


@given(st.text(st.characters(codec=None, categories=None)), st.integers(0, 50))
def test_printable_text_is_bounded_and_can_be_sent(text: str, limit: int) -> None:
    made = printable(text, limit)
    made.encode()
    assert all(char.isprintable() or char in "\n\t" for char in made)
    assert len(made) <= 10 * limit + 40


def test_answers_are_texts() -> None:
    cycle: dict[str, Any] = {}
    cycle["a"] = cycle
    assert answer_text(None) is None
    assert answer_text({"x": [1, 2]}) == '{"x": [1, 2]}'
    assert answer_text("\x1b") == "\\x1b"
    assert len(answer_text("y" * 9999) or "") < 2100
    assert answer_text(cycle) is not None
    assert answer_text([BadText()]) is not None
    assert answer_text(BadText()) is not None
    assert type(Task(np.str_("1")).id) is str
    assert Task("1", {"answer": 5}).answer == 5
    assert Task("1", {"label": 5}, answer=0).answer == 0


class _Tasks:
    """An environment whose training tasks are made by a function."""

    def __init__(self, make: str) -> None:
        self.make = make

    def train_tasks(self) -> Any:
        return eval(self.make)

    def eval_tasks(self) -> Any:
        return []


def leave() -> Any:
    sys.exit(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("leave()", r"train_tasks\(\) of the environment failed: SystemExit: 0"),
        ("None", r"train_tasks\(\) of the environment failed: TypeError"),
        ("1 / 0", "ZeroDivisionError"),
        ("[]", "no training tasks"),
        ("['a']", r"gave str at 0, not a Task"),
        ("[Task('a'), Task('b'), Task('a')]", "two train tasks with the id 'a'"),
        ("[Task(5)]", "train task 0 with the id '5', expected a text of 1 to 1000 printable characters"),
        ("[Task('\\ud800')]", "printable"),
        ("[Task('a' * 1001)]", "printable"),
    ],
)
def test_tasks_that_are_none_are_said(
    make: str, message: str, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(model_dir, tmp_path)
    config.env = EnvConfig(id="tests.unit.test_rollouts:_Tasks", args={"make": make})
    _Tasks.rollout = None  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentLoadError, match="no method 'rollout'"):
        Executor(config)
    _Tasks.rollout = Stranger.rollout  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentLoadError, match=message):
        Executor(config)
    assert ("in train_tasks" in caplog.text) == (make in ("leave()", "1 / 0"))


@pytest.mark.parametrize(
    ("error", "said"),
    [(SystemExit(0), "SystemExit: 0"), (KeyboardInterrupt(), "KeyboardInterrupt: "), (BadText(), "without a text"),
     (asyncio.CancelledError(), "CancelledError: "), (ValueError(BAD_TEXT), "5,000,005 characters")],
)  # fmt: skip
@pytest.mark.parametrize("method", ["__init__", "train_tasks", "eval_tasks"])
def test_an_environment_that_can_not_be_had_says_why(
    method: str, error: BaseException, said: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Stranger, method, fails)
    with pytest.raises(EnvironmentLoadError) as raised:
        Executor(config_of(model_dir, tmp_path))
    assert said in str(raised.value)
    assert len(str(raised.value)) < 5000


def test_records_hold_what_json_can_not(tmp_path: Path) -> None:
    def record(name: str, said: Any) -> RolloutRecord:
        return RolloutRecord(id=name, branches=[BranchRecord(messages=[{"role": "user", "content": said}])])

    for bad in (object(), float("nan"), {1, 2}):
        write_rollouts(tmp_path / "r", [record("b", bad), record("a", "\ud800é")])
        first, second = map(msgspec.json.decode, (tmp_path / "r").read_bytes().splitlines())
        assert first["branches"] == []
        assert first["error"]["kind"] in ("TypeError", "ValueError")
        assert second["branches"][0]["messages"][0]["content"] == "?é"


@pytest.mark.integration
def test_a_process_survives_what_an_environment_leaves_on_its_loop() -> None:
    """A SystemExit of a task or a callback, a stopped loop, and at the end a task and a thread that never end."""
    code = """
import asyncio, sys, threading, time
from pointillist.environments import loop

loop._CANCEL_SECONDS = loop._EXIT_SECONDS = 0.2

async def leave(): sys.exit(0)
async def interrupt(): raise KeyboardInterrupt
async def stubborn():
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass

async def main():
    running = asyncio.get_running_loop()
    kept = [asyncio.create_task(each()) for each in (leave, interrupt, stubborn)]
    running.call_soon(lambda: sys.exit(0))
    running.call_later(0.05, running.stop)
    await asyncio.sleep(0.2)
    running.run_in_executor(None, time.sleep, 1000)
    print("main is through", flush=True)
    if sys.argv[1] == "raise":
        raise ValueError("at the end")

loop.run_process(main())
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for how, status in (("return", 0), ("raise", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, how], env=environ, capture_output=True, text=True, timeout=1200, check=False
        )
        assert done.stdout == "main is through\n", done.stderr
        assert done.returncode == status
        for word in ("SystemExit", "KeyboardInterrupt", "RuntimeError"):
            assert f"{word} on the event loop outside of any rollout" in done.stderr


def test_an_environment_that_cancels_every_task_is_named() -> None:
    async def main() -> None:
        await asyncio.sleep(0)
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.sleep(1000)

    async def survives() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await main()

    with pytest.raises(PointillistError, match="cancelled tasks that are not its own"):
        loop.run(main())
    loop.run(survives())


async def test_a_damaged_record_is_no_sample(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    from pointillist.errors import TransportError

    for damage in ([float("nan"), 0.0], ["x", 0.0], [0.0]):

        async def poison(session: Session, logprobs: list[Any] = damage) -> float:
            session.turns[0].completion.logprobs[:] = logprobs
            return 1.0

        monkeypatch.setattr(Stranger, "behaviour", staticmethod(poison))
        (branch,) = (await executor.run(request())).branches
        with pytest.raises(TransportError):
            make_sample(branch, 1.0, image_token_id=7, sample_id="s")
