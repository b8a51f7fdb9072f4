"""Agents that send odd, large or endless things to the gateway: they are refused, and the others go on."""

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pointillist.base.pools import give_threads_to_environments
from pointillist.config import GatewayConfig
from pointillist.errors import InferenceError, RequestRefusedError
from pointillist.images import ImageLimits, ImageStore, Sources
from pointillist.render import RawRenderer, RenderedPrompt
from pointillist.sessions import Completion, Sampling, Session
from pointillist.sessions.gateway import Gateway
from tests.helpers.pictures import encoded, picture

pytestmark = pytest.mark.integration

SEQ_LEN = 4096
DEADLINE = 300.0


class Policy:
    """Stands for the inference client."""

    def __init__(self, renderer: RawRenderer) -> None:
        self.tokens = [*renderer.tokenizer.encode("ok"), renderer.stop_token_ids[0]]
        self.failure: Exception | None = None
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def generate(self, prompt: RenderedPrompt, params: Any, seed: int, **_: Any) -> Completion:
        self.asked += 1
        await self.may_answer.wait()
        if self.failure is not None:
            raise self.failure
        return Completion(self.tokens, [-0.1] * len(self.tokens), [1] * len(self.tokens), "stop")


@dataclass
class Stage:
    gateway: Gateway
    policy: Policy
    http: httpx.AsyncClient
    open: Callable[[], Session]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", ImageLimits())


@pytest.fixture
async def stage(renderer: RawRenderer, store: ImageStore) -> AsyncIterator[Stage]:
    policy = Policy(renderer)
    config = GatewayConfig(
        inflight_bytes=1024 * 1024, max_request_bytes=4 * 1024 * 1024, max_session_requests=4, max_sessions=3
    )

    def open_session() -> Session:
        return Session(renderer, Sources(store), policy, Sampling(), seq_len=SEQ_LEN, seed=0, max_images=8)  # type: ignore[arg-type]

    gateway = Gateway(config, "policy", open_session)
    await gateway.start()

    def opened() -> Session:
        session = open_session()
        gateway.add(session)
        return session

    async with httpx.AsyncClient(timeout=DEADLINE) as http:
        yield Stage(gateway, policy, http, opened)
    await gateway.aclose()


APIS = {"chat/completions": "messages", "responses": "input", "messages": "messages"}
IMAGE = "data:image/png;base64," + base64.b64encode(encoded(picture(32, 32))).decode()


def body(api: str, **fields: Any) -> dict[str, Any]:
    return {"max_tokens": 4, APIS[api]: [{"role": "user", "content": "What?"}], **fields}


@contextlib.contextmanager
def deep(levels: int) -> Iterator[Any]:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    yield value


def said(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def called(**call: Any) -> list[Any]:
    made = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}, **call}
    return [*said("a"), {"role": "assistant", "content": "x", "tool_calls": [made]}, *said("b")]


ODD_MESSAGES: list[Any] = [
    None, "hi", 5, {"a": 1}, [], ["a"], [None], [[1]], [{"content": "a"}], [{"role": 5}], [{"role": ["user"]}],
    said(None), said(5), said({"a": 1}), said([1, 2]), said([[["a"]]]), said([{"text": "a"}]),
    said([{"type": "text", "text": 5}]), said([{"type": ["text"], "text": "a"}]),
    said([{"type": "image_url", "image_url": None}]), said([{"type": "image_url", "image_url": {"url": 5}}]),
    said([{"type": "image_url", "image_url": ["x"]}]),
    said([{"type": "image_url", "image_url": {"url": {"url": IMAGE}}}]), said([{"type": "image", "source": None}]),
    said([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": 5}}]),
    [{"role": "tool", "content": "x", "tool_call_id": "a"}], [{"role": "user", "content": "a", "name": 5}],
    [*said("a"), {"role": "assistant", "content": "x", "tool_calls": "abc"}, *said("b")],
    [*said("a"), {"role": "assistant", "content": "x", "tool_calls": 5}, *said("b")],
    [*said("a"), {"role": "assistant", "content": "x", "tool_calls": {"a": 5}}, *said("b")],
    [*said("a"), {"role": "assistant", "content": "x", "tool_calls": [None]}, *said("b")],
    [*said("a"), {"role": "assistant", "content": "x", "reasoning_content": ["a"]}, *said("b")],
    called(id={"a": 1}), called(function=None), called(function={"name": None, "arguments": 5}),
    called(function={"name": "f", "arguments": "["}), called(function={"name": "f", "arguments": "[" * 5000}),
    called(function={"name": "f", "arguments": "[" * 2000 + "]" * 2000}),
    called(function={"name": "f", "arguments": '{"a":' + "9" * 5000 + "}"}),
    called(function={"name": "f", "arguments": '{"a": 1e999}'}), called(function={"name": ["f"], "arguments": "5"}),
    said([{"type": "tool_result", "tool_use_id": None, "content": None}]),
    [*said("a"), {"role": "assistant", "content": [{"type": "tool_use", "id": 5, "name": None, "input": [1]}]},
     *said([{"type": "tool_result", "tool_use_id": 5, "content": [{"type": "image_url", "image_url": IMAGE}]}])],
    said("\0"), said("<|image_pad|>"), said("a" * 1_000_000), said(" " * 3_000_000), said("a") * 20_000,
    said([{"type": "image_url", "image_url": {"url": IMAGE}}] * 9), said([{"type": "text", "text": "a"}] * 100_000),
    [{"role": "assistant", "content": "x"}], [*said("a"), {"role": "system", "content": "b"}],
]  # fmt: skip
ODD_FIELDS: list[dict[str, Any]] = [
    {"tools": 5}, {"tools": [None]}, {"tools": [{"type": "function", "function": "name"}]},
    {"tools": [{"type": "function", "function": {"name": ["a"], "parameters": "x"}}]},
    {"tools": [{"type": "function", "name": 5, "input_schema": 5, "function": {"name": 5}}]},
    {"tools": [{"type": "function", "name": "f", "input_schema": "x", "parameters": 5,
                "function": {"name": "f", "parameters": "x", "description": 5}}]},
    {"tool_choice": 5}, {"tool_choice": []}, {"tool_choice": {"type": 5}}, {"stop": 5, "stop_sequences": 5},
    {"stop": {}, "stop_sequences": {"a": 1}}, {"stream_options": []}, {"stream": "yes"}, {"model": 5},
    {"previous_response_id": 5}, {"metadata": 5}, {"text": 5}, {"text": {"format": "x"}}, {"text": {"format": [1]}},
    {"system": 5}, {"system": {"a": 1}}, {"system": [{"type": "text", "text": 5}]}, {"instructions": [1]},
    {"response_format": {"type": "json_object"}}, {"logit_bias": {"1": 5}}, {"logprobs": 1}, {"top_logprobs": 10**9},
    {"n": 200_000}, {"n": 3_000_000}, {"n": 10**30}, {"temperature": 1e-38}, {"max_tokens": 10**30, "n": -1},
    {"tools": [{"type": "function", "name": "f", "function": {"name": "f", "parameters": {"a": "x" * 500_000}},
                "input_schema": {"a": "x" * 500_000}, "parameters": {"a": "x" * 500_000}}]},
]  # fmt: skip


@pytest.mark.parametrize("api", APIS)
async def test_odd_requests_are_refused_in_the_shape_of_their_api_and_the_session_goes_on(
    stage: Stage, api: str
) -> None:
    session, other = stage.open(), stage.open()
    cases = [body(api, **{APIS[api]: messages}) for messages in ODD_MESSAGES]
    cases += [body(api, **fields) for fields in ODD_FIELDS]
    with deep(400) as nested:
        cases += [body(api, metadata=nested), body(api, **{APIS[api]: said([nested])}), body(api, tools=[nested])]
    for case in cases:
        answer = await stage.http.post(f"{session.base_url}/{api}", json=case)
        assert answer.status_code in (200, 400), (str(case)[:200], answer.status_code, answer.text[:300])
        assert len(answer.content) < 5000
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert (answer.json().get("type") == "error") == (api == "messages")
    for each in (session, other):
        assert (await stage.http.post(f"{each.base_url}/{api}", json=body(api))).status_code == 200
    assert stage.policy.asked < 100


@pytest.mark.parametrize("api", APIS)
async def test_what_the_inference_server_refuses_is_a_400_and_what_it_fails_at_a_502(stage: Stage, api: str) -> None:
    session = stage.open()
    for failure, status in [(RequestRefusedError("n", param="sampling_params.n"), 400), (InferenceError("died"), 502)]:
        stage.policy.failure = failure
        answer = await stage.http.post(f"{session.base_url}/{api}", json=body(api))
        assert answer.status_code == status
    stage.policy.failure = None
    assert (await stage.http.post(f"{session.base_url}/{api}", json=body(api))).status_code == 200


HEAD = b"POST /%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s"
UPLOADS = [
    (b"Content-Length: 4000000", b"{"),
    (b"Content-Length: 4000000", b" " * 900_000),
    (b"Transfer-Encoding: chunked", b"1\r\n{\r\n"),
    (b"Transfer-Encoding: chunked", b"%x\r\n" % 900_000 + b" " * 900_000 + b"\r\n"),
]


@pytest.mark.parametrize(("framing", "start"), UPLOADS, ids=["announced", "half", "chunk", "chunks"])
async def test_uploads_that_hang_stop_no_session(stage: Stage, framing: bytes, start: bytes) -> None:
    """Each holds at most what it has sent: the budget is 1 MiB."""
    slow, session = stage.open(), stage.open()
    host, port = stage.gateway.url.removeprefix("http://").split(":")
    hanging = []
    for path in (f"s/{slow.key}/v1/chat/completions", "v1/chat/completions") * 2:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(HEAD % (path.encode(), framing, start))
        hanging.append(writer)
    small = await stage.http.post(f"{session.base_url}/chat/completions", json=body("chat/completions"))
    assert small.status_code == 200
    large = body("chat/completions", x=" " * 2_000_000)
    answer = await stage.http.post(f"{session.base_url}/chat/completions", json=large)
    assert answer.status_code == 200
    for writer in hanging:
        writer.close()


async def test_many_large_bodies_at_once_all_come_through(stage: Stage) -> None:
    """Together they are many times the budget, and each is half there before the first is whole."""
    sessions = [stage.open() for _ in range(8)]
    large = body("chat/completions", x=" " * 2_000_000)
    answers = await asyncio.gather(
        *(stage.http.post(f"{session.base_url}/chat/completions", json=large) for session in sessions)
    )
    assert [answer.status_code for answer in answers] == [200] * 8


async def test_requests_sessions_and_responses_are_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointillist.sessions.gateway.server._RESPONSES_REMEMBERED", 2)
    session, other = stage.open(), stage.open()
    stage.policy.may_answer.clear()
    url = f"{session.base_url}/responses"
    first = [asyncio.create_task(stage.http.post(url, json=body("responses"))) for _ in range(4)]
    await _until(lambda: stage.policy.asked == 4)
    refused = await stage.http.post(url, json=body("responses"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    stage.policy.may_answer.set()
    names = [(await task).json()["id"] for task in first]
    follows = [
        await stage.http.post(url, json=body("responses", previous_response_id=name)) for name in [*names, "resp_x"]
    ]
    assert sorted(answer.status_code for answer in follows) == [200, 200, 404, 404, 404] or (
        [answer.status_code for answer in follows].count(404) >= 2
    )
    assert (await stage.http.post(f"{other.base_url}/responses", json=body("responses"))).status_code == 200
    opened = await stage.http.post(f"{stage.gateway.url}/sessions")
    assert opened.status_code == 201
    full = await stage.http.post(f"{stage.gateway.url}/sessions")
    assert (full.status_code, full.json()["error"]["code"]) == (429, "too_many_sessions")
    assert (await stage.http.delete(f"{stage.gateway.url}/sessions/{opened.json()['id']}")).json()["turns"] == 0
    assert (await stage.http.post(f"{stage.gateway.url}/sessions")).status_code == 201


async def test_more_synchronous_agents_than_the_loop_has_threads_all_finish(stage: Stage) -> None:
    """Each blocks a thread of `asyncio.to_thread`, as an environment may, while the gateway reads its request."""
    give_threads_to_environments(48)
    sessions = [stage.open() for _ in range(48)]
    here = threading.Barrier(48)  # all at once, so that no thread is used for two

    def agent(session: Session) -> int:
        here.wait(DEADLINE)
        return httpx.post(
            f"{session.base_url}/chat/completions", json=body("chat/completions"), timeout=DEADLINE
        ).status_code

    async with asyncio.timeout(DEADLINE):
        assert await asyncio.gather(*(asyncio.to_thread(agent, session) for session in sessions)) == [200] * 48


async def test_a_gateway_works_while_environments_hold_every_thread_of_the_loop(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default pool of Python, cores + 4 threads, all of them held."""
    monkeypatch.setattr("pointillist.sessions.session._LONG_CHARACTERS", 10)  # longer is rendered in a thread
    session, ended = stage.open(), threading.Event()
    held = [asyncio.get_running_loop().run_in_executor(None, ended.wait, DEADLINE) for _ in range(64)]
    try:
        async with asyncio.timeout(DEADLINE):
            for api in APIS:
                assert (await stage.http.post(f"{session.base_url}/{api}", json=body(api))).status_code == 200
            await session.generate([{"role": "user", "content": "longer than ten characters"}])
            state = await stage.http.get(f"{stage.gateway.url}/sessions/{session.key}")
            assert state.json()["turns"] == 4
    finally:
        ended.set()
        await asyncio.gather(*held)


async def test_the_event_loop_is_free_while_large_requests_are_read_and_answered(
    stage: Stage, renderer: RawRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes time is done in other threads than the loop's: reading, rendering, cutting, writing, the record."""
    loop_thread = threading.get_ident()
    seen: dict[str, set[int]] = {}

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            seen.setdefault(name, set()).add(threading.get_ident())
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(renderer.tokenizer, "encode")
    watch(renderer.tokenizer, "decode")
    watch(Session, "read_now")
    watch(Session, "_prepare")
    monkeypatch.setattr("pointillist.sessions.session._LONG_CHARACTERS", 10)
    monkeypatch.setattr("pointillist.sessions.session._LONG_ANSWER", 0)
    monkeypatch.setattr("pointillist.sessions.gateway.server._LONG_ANSWER", 0)
    session = stage.open()
    for api in APIS:
        for stream in (False, True):
            asked = body(api, stream=stream, stop=["never"], stop_sequences=["never"], logprobs=api[0] == "c")
            answer = await stage.http.post(f"{session.base_url}/{api}", content=json.dumps(asked).encode())
            assert answer.status_code == 200
    await session.generate([{"role": "user", "content": "longer than ten characters"}])
    (await stage.http.get(f"{stage.gateway.url}/sessions/{session.key}")).raise_for_status()
    assert {"encode", "decode", "read_now", "_prepare"} <= seen.keys()
    for name in ("encode", "decode", "read_now", "_prepare"):
        assert loop_thread not in seen[name], name


async def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
