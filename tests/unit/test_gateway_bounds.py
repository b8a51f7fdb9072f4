"""What one agent sends costs that request only: numbers, bodies, nesting and stop texts are bounded, threads are not
shared with environments."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointillist.base.pools import give_threads_to_environments
from pointillist.config import GatewayConfig
from pointillist.errors import InferenceError, RequestError, RequestRefusedError
from pointillist.images import Sources
from pointillist.render import RawRenderer, RenderedPrompt
from pointillist.sessions import Completion, Sampling, Session
from pointillist.sessions.gateway import Gateway, anthropic, chat, responses
from pointillist.sessions.gateway.server import _parsed

APIS = {"chat/completions": chat, "responses": responses, "messages": anthropic}
USER = [{"role": "user", "content": "What?"}]


class Answering:
    """Stands for the inference client."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.error: Exception | None = None
        self.asked = 0

    async def generate(self, prompt: RenderedPrompt, params: Any, seed: int, **_: Any) -> Completion:
        self.asked += 1
        if self.error is not None:
            raise self.error
        count = len(self.tokens)
        return Completion(self.tokens, [-0.1] * count, [0] * count, "stop")


@pytest.fixture
def policy(renderer: RawRenderer) -> Answering:
    return Answering([*renderer.tokenizer.encode("yes"), renderer.stop_token_ids[0]])


@pytest.fixture
async def gateway(renderer: RawRenderer, sources: Sources, policy: Answering) -> AsyncIterator[Gateway]:
    def opened() -> Session:
        return Session(renderer, sources, policy, Sampling(), seq_len=4000, seed=1)  # type: ignore[arg-type]

    config = GatewayConfig(max_request_bytes=40_000_000, inflight_bytes=1_000_000, max_sessions=3)
    made = Gateway(config, "policy", opened)
    await made.start()
    yield made
    await made.aclose()


def _body(api: str, **fields: Any) -> dict[str, Any]:
    return {"input" if api == "responses" else "messages": USER, "max_tokens": 5, **fields}


async def _post(gateway: Gateway, path: str, content: bytes) -> httpx.Response:
    async with httpx.AsyncClient(timeout=120) as client:
        return await client.post(gateway.url + path, content=content, headers={"Content-Type": "application/json"})


async def _session(gateway: Gateway) -> str:
    return f"/s/{json.loads((await _post(gateway, '/sessions', b'')).content)['id']}/v1/"


NUMBERS = ["0", "-1", "1e39", "1e-45", "3000000", "9223372036854775808", "1" + "0" * 200, "true", '"1"', "[]", "{}"]


@pytest.mark.parametrize("api", APIS)
async def test_every_number_of_an_agent_is_bounded(gateway: Gateway, policy: Answering, api: str) -> None:
    """A number is taken, or refused with its name in the API's own shape; the next request is served."""
    base = await _session(gateway)
    fields = ["temperature", "top_p", "max_tokens"]
    fields += {"chat/completions": ["n", "max_completion_tokens"], "messages": ["top_k"]}.get(
        api, ["max_output_tokens"]
    )
    refused = 0
    for field in fields:
        for number in NUMBERS:
            content = json.dumps(_body(api, **{field: "@"})).replace('"@"', number).encode()
            answer = await _post(gateway, base + api, content)
            assert answer.status_code in (200, 400), (field, number, answer.text)
            if answer.status_code == 400:
                refused += 1
                error = answer.json()["error"]
                assert field in error["message"]
                assert len(error["message"]) < 300
    assert refused > 5 * (len(fields) - 1)
    assert (await _post(gateway, base + api, json.dumps(_body(api)).encode())).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" * 5000])
async def test_what_is_no_number_of_json_is_refused(gateway: Gateway, number: str) -> None:
    base = await _session(gateway)
    content = json.dumps(_body("chat/completions", temperature="@")).replace('"@"', number).encode()
    answer = await _post(gateway, base + "chat/completions", content)
    assert answer.status_code == 400
    assert "body is not JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "100 levels"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "not JSON"),
        (b'{"messages": [' + b"[]," * 3_000_000 + b"[]]}", 400, "values"),
        (b'{"messages": ["' + b"a" * 40_000_000 + b'"]}', 413, "40000000"),
        (json.dumps(_body("chat", n=129)).encode(), 400, "n is 129, expected an integer from 1 to 128"),
        (json.dumps(_body("chat", stop=["x"] * 65)).encode(), 400, "at most 64"),
        (json.dumps(_body("chat", stop=["x" * 5000])).encode(), 400, "4096"),
        (json.dumps(_body("chat", tools=[{"type": "function", "function": "name"}])).encode(), 400, "tools"),
        (json.dumps(_body("chat", messages=[*USER, {"role": "assistant", "tool_calls": 5}])).encode(), 400, "list"),
    ],
)
async def test_bodies_are_bounded(gateway: Gateway, body: bytes, status: int, text: str) -> None:
    answer = await _post(gateway, await _session(gateway) + "chat/completions", body)
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]


async def test_slow_uploads_do_not_stop_other_sessions(gateway: Gateway) -> None:
    """Neither bodies without a length, nor ones that announce all of the budget and send nothing."""
    base = await _session(gateway)
    host, port = gateway.url.removeprefix("http://").split(":")
    head = f"POST {base}chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    hanging = []
    for rest in ("Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", "Content-Length: 30000000\r\n\r\n{") * 4:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write((head + rest).encode())
        await writer.drain()
        hanging.append(writer)
    picture = "data:image/png;base64," + "A" * 400_000  # larger than what is read whatever the budget says
    body = json.dumps(_body("chat", messages=[{"role": "user", "content": picture}], max_tokens=1)).encode()
    answers = await asyncio.wait_for(
        asyncio.gather(*(_post(gateway, base + "chat/completions", body) for _ in range(4))), 120
    )
    assert {answer.status_code for answer in answers} == {400}  # so much text is over seq_len
    assert all(answer.json()["error"]["code"] == "context_length_exceeded" for answer in answers)
    for writer in hanging:
        writer.close()


async def test_text_that_no_context_holds_is_refused_before_it_is_tokenised(
    gateway: Gateway, renderer: RawRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 MB of text became 3.6 GB of tokens."""
    base = await _session(gateway)
    monkeypatch.setattr(renderer, "render", lambda *_, **__: pytest.fail("it was rendered"))
    messages = [{"role": "user", "content": "a" * 16_000_000}]
    answer = await _post(gateway, base + "chat/completions", json.dumps(_body("chat", messages=messages)).encode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("target", ["*", "/", "//", "/s/", "/s", "/s/x/v1/", "/%00", "/s/%ff/v1/models"])
async def test_odd_paths_are_unknown_routes(gateway: Gateway, target: str) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 120)
    assert answer.split(b" ")[1] in (b"404", b"405", b"400"), answer
    writer.close()


async def test_a_refusal_of_the_server_is_the_agents(gateway: Gateway, policy: Answering) -> None:
    base = await _session(gateway)
    for error, status in ((RequestRefusedError("n is 100"), 400), (InferenceError("it died"), 502)):
        policy.error = error
        answer = await _post(gateway, base + "chat/completions", json.dumps(_body("chat")).encode())
        assert (answer.status_code, str(error) in answer.text) == (status, True)


async def test_open_sessions_are_bounded(gateway: Gateway) -> None:
    bases = [await _session(gateway) for _ in range(3)]
    answer = await _post(gateway, "/sessions", b"")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_sessions")
    async with httpx.AsyncClient() as client:
        assert (await client.delete(f"{gateway.url}/sessions/{bases[0].split('/')[2]}")).status_code == 200
    assert (await _post(gateway, "/sessions", b"")).status_code == 201


async def test_a_page_of_another_site_opens_no_session(gateway: Gateway) -> None:
    async with httpx.AsyncClient() as client:
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            answer = await client.post(f"{gateway.url}/sessions", headers=headers)
            assert answer.status_code in (400, 403), headers


async def test_the_key_is_asked_for_whatever_host_says(
    renderer: RawRenderer, sources: Sources, policy: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "secret")
    made = Gateway(GatewayConfig(api_key_var="GATEWAY_KEY"), "policy", lambda: None)  # type: ignore[arg-type, return-value]
    await made.start()
    async with httpx.AsyncClient() as client:
        for host in ("127.0.0.1", "x/health?", "x/health#", "127.0.0.1/health?"):
            answer = await client.post(f"{made.url}/sessions", headers={"Host": host})
            assert answer.status_code in (400, 401), host
        answer = await client.get(f"{made.url}/s/x/v1/models", headers={"Authorization": "bearer secret"})
        assert answer.status_code == 404
    await made.aclose()


async def test_more_synchronous_agents_than_threads_of_a_pool_go_on(gateway: Gateway) -> None:
    """Each holds a thread of the loop's own pool while it waits for the gateway."""
    agents = 3 * ((os.cpu_count() or 1) + 4)
    give_threads_to_environments(agents)
    base = gateway.url + await _session(gateway)

    def agent() -> int:
        return httpx.post(f"{base}chat/completions", json=_body("chat"), timeout=300).status_code

    answers = await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(agent) for _ in range(agents))), 240)
    assert answers == [200] * agents


async def test_agents_that_hold_every_thread_do_not_hold_the_gateway(gateway: Gateway) -> None:
    """With a pool that is too small the agents wait for each other, and never for ever."""
    give_threads_to_environments(1)
    base = gateway.url + await _session(gateway)

    def agent() -> int:
        return httpx.post(f"{base}chat/completions", json=_body("chat"), timeout=300).status_code

    answers = await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(agent) for _ in range(40))), 240)
    assert answers == [200] * 40


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["user", "assistant", "tool", "text", "function", "image_url"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "id", "function", "name", "arguments", "tool_calls", "x"]),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
FIELDS = [
    "messages", "input", "system", "instructions", "tools", "tool_choice", "stop", "stop_sequences", "stream", "n",
    "stream_options", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "logprobs", "text", "model", "previous_response_id", "response_format", "metadata", "pointillist_session",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(api=st.sampled_from(sorted(APIS)), fields=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_bodies_of_any_shape_are_calls_or_refused(api: str, fields: dict[str, Any]) -> None:
    body = {"messages": USER, "input": USER, **fields}
    try:
        call = _parsed(APIS[api], msgspec.json.encode(body))
    except RequestError as error:
        assert error.status == 400
    else:
        assert isinstance(call.messages, list)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from("ab\n:é "), min_size=1, max_size=40),
    stop=st.lists(st.text(st.sampled_from("ab\n:é "), min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_an_answer_is_cut_at_the_first_token_that_completes_a_stop_text(
    renderer: RawRenderer, text: str, stop: list[str]
) -> None:
    tokens = renderer.tokenizer.encode(text)
    count = len(tokens)
    cut, stopped_by = _bare(renderer)._cut(Completion(tokens, [0.0] * count, [0] * count, "length"), stop)
    ends = [end for end in range(1, count + 1) if any(each in renderer.tokenizer.decode(tokens[:end]) for each in stop)]
    assert len(cut.token_ids) == (ends[0] if ends else count)
    assert (stopped_by is not None) == bool(ends)


def _bare(renderer: RawRenderer) -> Session:
    session = Session.__new__(Session)
    session._renderer = renderer
    return session
