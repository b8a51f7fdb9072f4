"""What travels between environment workers and the orchestrator."""

import asyncio
import os
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

from pointillist.base.channel import secure_client
from pointillist.config import EnvConfig, EnvWorkerConfig, OrchestratorConfig, WorkersConfig
from pointillist.config.shared import ModelConfig
from pointillist.environments.executor import RolloutRequest, RolloutResult
from pointillist.environments.workers import WorkerPool, protocol
from pointillist.environments.workers.pool import _Worker
from pointillist.errors import TransportError
from pointillist.images import Sources
from pointillist.render import RawRenderer
from pointillist.runs.config_files import load_toml
from pointillist.sessions import Branch, Completion, Sampling, Session
from tests.helpers.pictures import picture


class Silent:
    """A policy that ends its turn at once."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    async def generate(self, *_: object, **__: object) -> Completion:
        return Completion([self.stop], [-0.5], [3], "stop")


async def branch(renderer: RawRenderer, sources: Sources, turns: int, side: int) -> Branch:
    client = Silent(renderer.stop_token_ids[0])
    session = Session(renderer, sources, client, Sampling(), seq_len=100_000, seed=0)  # type: ignore[arg-type]
    for seed in range(turns):
        await session.generate([{"role": "user", "content": [{"type": "image", "image": picture(side, side, seed)}]}])
    (only,) = session.branches
    return only


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 992])
async def test_an_image_a_turn_costs_few_bytes_whatever_its_size(
    renderer: RawRenderer, sources: Sources, side: int
) -> None:
    sizes = []
    for turns in (2, 10):
        result = RolloutResult(id="1.0.0", task_id="t", branches=[await branch(renderer, sources, turns, side)])
        sizes.append(len(protocol.encode(protocol.Done(result))))
    assert (sizes[1] - sizes[0]) / 8 <= 600


async def test_results_and_requests_come_back_as_they_were(renderer: RawRenderer, sources: Sources) -> None:
    result = RolloutResult(id="1.0.0", task_id="t", reward=0.5, branches=[await branch(renderer, sources, 3, 64)])
    assert protocol.decode_from_worker([protocol.encode(protocol.Done(result))]) == protocol.Done(result)
    request = RolloutRequest(id="1", group="g", split="eval", index=4, sampling=Sampling(top_k=5), seed=2**40)
    assert protocol.decode_to_worker([protocol.encode(protocol.Run(request))]) == protocol.Run(request)


@given(st.lists(st.binary(max_size=200), max_size=3), st.booleans())
@example([b"\x82\xa4type\xa4Pong\xa1z" + b"\x91" * 100_000 + b"\xc0"], True)
@example([], True)
def test_anything_else_is_refused(frames: list[bytes], compressed: bool) -> None:
    for decode in (protocol.decode_from_worker, protocol.decode_to_worker):
        with pytest.raises(TransportError, match="message"):
            decode([zlib.compress(data) if compressed else data for data in frames])


def test_a_small_message_that_unpacks_to_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_MAX_UNPACKED_BYTES", 1_000_000)
    with pytest.raises(TransportError, match="unpacks to more than 1000000 bytes"):
        protocol.decode_from_worker([zlib.compress(b"\0" * 20_000_000)])


def test_what_the_other_end_would_refuse_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_BYTES", 10)
    with pytest.raises(TransportError, match=r"Hello has .* expected at most"):
        protocol.encode(protocol.Hello(1, ["a"], []))


class Foreign:
    """A peer of a pool's socket."""

    def __init__(self, pool: WorkerPool, key: str) -> None:
        self.context = zmq.Context()
        self.wire = self.context.socket(zmq.DEALER)
        self.wire.linger = 0
        secure_client(self.wire, key, max_bytes=protocol.MAX_BYTES)
        address = load_toml(EnvWorkerConfig, pool._config_path).address
        self.wire.connect(address)

    def close(self) -> None:
        self.wire.close()
        self.context.term()


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerPool]:
    """A pool whose only worker is this process."""
    config = OrchestratorConfig(
        model=ModelConfig(name="m"), env=EnvConfig(id="e"), output_dir=tmp_path, workers=WorkersConfig(count=1)
    )
    pool = WorkerPool(config)

    async def keep(number: int) -> None:
        process = SimpleNamespace(pid=os.getpid(), returncode=None, kill=lambda: None)
        pool._workers[number] = _Worker(number, process, started=time.monotonic())  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "_keep", keep)
    yield pool
    await pool.aclose()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - the pool has no event for it
            await asyncio.sleep(0.01)


async def test_no_message_ends_the_pool(pool: WorkerPool) -> None:
    starting = asyncio.create_task(pool.start())
    await until(lambda: pool._workers)
    nested = b"\x82\xa4type\xa4Pong\xa1z" + b"\x91" * 100_000 + b"\xc0"
    peers = [Foreign(pool, pool._key), Foreign(pool, "another")]
    for peer in peers:
        for frames in ([b""], [b"a", b"b"], [b"x"] * 200, [zlib.compress(nested)], [zlib.compress(b"\0" * 10**6)]):
            peer.wire.send_multipart(frames)
        peer.wire.send(protocol.encode(protocol.Hello(1, ["forged"], [])))
    peers[0].wire.send(protocol.encode(protocol.Hello(os.getpid(), ["task"], [])))
    await asyncio.wait_for(starting, 120)
    assert await pool.task_ids("train") == ["task"]
    for peer in peers:
        peer.close()


async def test_a_pool_whose_listener_fails_fails_every_rollout_with_the_reason(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = asyncio.create_task(pool.start())
    await until(lambda: pool._workers)
    peer = Foreign(pool, pool._key)
    peer.wire.send(protocol.encode(protocol.Hello(os.getpid(), ["task"], [])))
    await asyncio.wait_for(starting, 120)
    request = RolloutRequest(id="1", group="g", split="train", index=0, sampling=Sampling(), seed=1)
    running = asyncio.create_task(pool.run(request))
    await until(lambda: pool._workers[0].running)
    monkeypatch.setattr(pool, "_heard", None)
    peer.wire.send(protocol.encode(protocol.Pong()))
    for waiting in (running, pool.run(request)):
        with pytest.raises(TransportError, match="pool has failed: TypeError"):
            await asyncio.wait_for(waiting, 120)
    peer.close()


@pytest.mark.parametrize("end", ["dies", "is silent"])
async def test_a_rollout_without_an_answer_of_its_worker_fails_by_name(pool: WorkerPool, end: str) -> None:
    """Its record has the task and the expected answer all the same."""
    starting = asyncio.create_task(pool.start())
    await until(lambda: pool._workers)
    peer = Foreign(pool, pool._key)
    peer.wire.send(protocol.encode(protocol.Hello(os.getpid(), ["task"], [])))
    await asyncio.wait_for(starting, 120)
    pool._patience = 1.0 if end == "is silent" else 1000.0
    request = RolloutRequest(id="1", group="g", split="train", index=0, sampling=Sampling(), seed=1)
    running = asyncio.create_task(pool.run(request))
    (worker,) = pool._workers.values()
    await until(lambda: worker.running)
    await pool._heard(worker.identity, protocol.Begun("1", "seven"))
    if end == "dies":
        pool._bury(worker, "it ended with code -9")
    result = await asyncio.wait_for(running, 120)
    assert (result.task_id, result.answer) == ("task", "seven")
    assert result.failure is not None
    kind, said = ("WorkerDied", "code -9") if end == "dies" else ("WorkerSilent", "has not answered within 1 s")
    assert (result.failure.kind, said in result.failure.message, result.failure.permanent) == (kind, True, False)
    assert (worker.running, worker.answers) == ({}, {})
    peer.close()
