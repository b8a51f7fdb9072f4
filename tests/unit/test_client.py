"""The client of the inference servers: requests for one prompt travel together, and each gets its own answer."""

import asyncio
from typing import Any

import msgspec
import pytest

from pointillist.render import RawRenderer, RenderedPrompt
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths
from pointillist.sessions import InferenceClient
from pointillist.weights.follow import WeightWatcher


class Answering:
    """Stands for the servers: choice i of a request says which seed it was sampled with; choices come backwards."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.all: list[Any] = []

    async def post(self, path: str, body: bytes, *_: Any, **__: Any) -> tuple[int, bytes]:
        request = msgspec.json.decode(body)
        self.requests.append(request)
        params = request["sampling_params"]
        choices = [_choice(index, params["seed"] + index) for index in range(params.get("n", 1))]
        return 200, msgspec.json.encode({"choices": choices[::-1]})

    async def aclose(self) -> None:
        pass


def _choice(index: int, token: int) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": -0.5, "rank": 1, "top_logprobs": []}]
    return {
        "index": index,
        "token_ids": [token],
        "logprobs": {"content": content},
        "weight_versions": [{"start": 0, "end": 1, "version": "0"}],
        "finish_reason": "stop",
    }


@pytest.fixture
def prompt(renderer: RawRenderer) -> RenderedPrompt:
    return renderer.render([{"role": "user", "content": "What?"}], [])


@pytest.mark.parametrize(
    ("seeds", "requests"),
    [
        ([5, 6, 7], [(5, 3)]),
        ([7, 5, 6], [(5, 3)]),
        ([5, 7, 8], [(5, 1), (7, 2)]),  # a gap: choice i is sampled with seed + i
        ([3, 3], [(3, 1), (3, 1)]),
    ],
)
async def test_every_rollout_gets_the_answer_of_its_own_seed(
    prompt: RenderedPrompt, seeds: list[int], requests: list[tuple[int, int]]
) -> None:
    client, servers = InferenceClient(["http://127.0.0.1:1"]), Answering()
    client._servers = servers  # type: ignore[assignment]
    completions = await asyncio.gather(*(client.generate(prompt, {"temperature": 1.0}, seed) for seed in seeds))
    assert [completion.token_ids for completion in completions] == [[seed] for seed in seeds]
    asked = [(request["sampling_params"]["seed"], request["sampling_params"]["n"]) for request in servers.requests]
    assert sorted(asked) == requests


class _Server:
    """A server that takes weights when it is allowed to."""

    def __init__(self) -> None:
        self.rest = 0.0
        self.may_take = asyncio.Event()
        self.taken = asyncio.Event()


class Hanging(Answering):
    """Servers that answer once they may; it is recorded which requests were given up."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer, self.asked, self.given_up = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def post(self, path: str, body: bytes, *_: Any, **__: Any) -> tuple[int, bytes]:
        self.asked.set()
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.given_up.set()
            raise
        return await super().post(path, body)


async def test_a_request_is_given_up_once_none_of_its_rollouts_waits(prompt: RenderedPrompt) -> None:
    servers, client = Hanging(), InferenceClient(["http://127.0.0.1:1"])
    client._servers = servers  # type: ignore[assignment]
    first, second = (asyncio.create_task(client.generate(prompt, {"max_tokens": 1}, seed)) for seed in (5, 6))
    await asyncio.wait_for(servers.asked.wait(), 120)
    for task in (first, second):
        assert not servers.given_up.is_set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0)  # a future's callbacks run in the next round
    await asyncio.wait_for(servers.given_up.wait(), 120)
    await client.aclose()


async def test_a_rollout_that_is_cancelled_costs_the_others_of_its_request_nothing(prompt: RenderedPrompt) -> None:
    servers, client = Hanging(), InferenceClient(["http://127.0.0.1:1"])
    client._servers = servers  # type: ignore[assignment]
    first, second = (asyncio.create_task(client.generate(prompt, {"max_tokens": 1}, seed)) for seed in (5, 6))
    await asyncio.wait_for(servers.asked.wait(), 120)
    first.cancel()
    servers.may_answer.set()
    assert (await asyncio.wait_for(second, 120)).token_ids == [6]
    assert len(servers.requests) == 1
    await client.aclose()


async def test_a_step_waits_until_every_server_has_the_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server with new weights is not enough."""
    paths = RunPaths(tmp_path)
    file = paths.broadcast_step(1) / WEIGHTS_FILE
    file.parent.mkdir(parents=True)
    file.touch()
    servers = [_Server(), _Server()]

    async def health() -> None:
        return None

    async def take(server: _Server, folder: str, version: int, *, rewind: bool) -> None:
        await server.may_take.wait()
        server.taken.set()

    for server in servers:
        server.health = health  # type: ignore[attr-defined]
    monkeypatch.setattr("pointillist.weights.follow.update_weights", take)
    client = type("Client", (), {"servers": servers})()
    watcher = WeightWatcher(paths, client, 0)
    following = asyncio.create_task(watcher.follow())
    waiting = asyncio.create_task(watcher.wait_for(1))
    servers[0].may_take.set()
    await asyncio.wait_for(servers[0].taken.wait(), 120)
    await asyncio.sleep(0.05)  # time in which it would be done if one server were enough
    assert not waiting.done()
    servers[1].may_take.set()
    await asyncio.wait_for(waiting, 120)
    assert servers[1].taken.is_set()
    following.cancel()
