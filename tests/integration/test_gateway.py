"""The gateway with the clients that users have: OpenAI's and Anthropic's own libraries, and an agent framework."""

import asyncio
import base64
import itertools
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agents
import anthropic
import httpx
import openai
import pytest

from pointillist.config import GatewayConfig
from pointillist.images import ImageLimits, ImageStore, Sources
from pointillist.render import RawRenderer
from pointillist.sessions import InferenceClient, Sampling, Session
from pointillist.sessions.gateway import Gateway
from tests.helpers.files import ROOT
from tests.helpers.pictures import encoded, picture
from tests.helpers.processes import RunningServer, free_port, pointillist, wait_for
from tests.helpers.scripted import ScriptedPolicy, call

pytestmark = pytest.mark.integration


def data_url(seed: int, side: int = 64) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(picture(side, side, seed))).decode()


def image(seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(seed)}}


@dataclass
class RunningGateway:
    """`pointillist gateway` in a process of its own."""

    url: str
    server: RunningServer

    def open(self) -> tuple[str, str]:
        """Key and base URL of a new session."""
        answer = httpx.post(f"{self.url}/sessions").raise_for_status().json()
        return answer["id"], answer["base_url"]

    def close(self, key: str) -> dict[str, Any]:
        return httpx.delete(f"{self.url}/sessions/{key}").raise_for_status().json()


@pytest.fixture(scope="module")
def gateway(server: RunningServer, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log, port = tmp_path_factory.mktemp("gateway") / "log", free_port()
    process = pointillist(
        "gateway", "--model.name", model_dir, "--output-dir", server.output_dir, "--seq-len", 512,
        "--client.base_url", server.url, "--gateway.port", port, "--sampling.max_tokens", 12, stdout=log.open("w"),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 200, process)
    yield RunningGateway(url, server)
    process.send_signal(signal.SIGTERM)
    process.wait(600)


def test_openai_client_over_turns_is_recorded_exactly(gateway: RunningGateway) -> None:
    key, base_url = gateway.open()
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "developer", "content": "Look."}]
    for turn in range(3):
        messages.append({"role": "user", "content": [image(turn), {"type": "text", "text": f"What is {turn}?"}]})
        answer = client.chat.completions.create(
            model="policy", messages=messages, temperature=0.7, max_tokens=6, logprobs=True
        )
        (choice,) = answer.choices
        assert choice.logprobs is not None
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert len(choice.logprobs.content or []) == answer.usage.completion_tokens <= 6
        messages.append(choice.message)
    assert [model.id for model in client.models.list()] != []
    state = gateway.close(key)
    (branch,) = state["branches"]
    assert state["turns"] == 3
    assert len(branch["images"]) == 3
    assert all(uri.startswith("file://") for _, _, uri, _, _ in branch["images"])
    sampled = [value for value, on in zip(branch["temperatures"], branch["sampled"], strict=True) if on]
    assert set(sampled) == {0.7}
    assert "base64" not in json.dumps(state)


def test_streams_give_what_whole_answers_give(gateway: RunningGateway) -> None:
    _, base_url = gateway.open()
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    ask: Any = {"model": "policy", "messages": [{"role": "user", "content": [image(0)]}], "n": 2, "max_tokens": 4}
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    whole = client.chat.completions.create(**ask)
    assert len(whole.choices) == 2
    assert all(choice.message.content is not None for choice in whole.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices} > {None}


def test_two_clients_of_one_session_do_not_disturb_each_other(gateway: RunningGateway) -> None:
    key, base_url = gateway.open()
    other = anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none", max_retries=0)
    mine = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    source = {"type": "base64", "media_type": "image/png", "data": data_url(3).partition(",")[2]}
    said = other.messages.create(
        model="policy", max_tokens=4, system="Look.", messages=[
            {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]}
        ],
    )  # fmt: skip
    assert said.usage.output_tokens <= 4
    answer = mine.responses.create(model="policy", instructions="Look.", input="What?", max_output_tokens=4)
    again = mine.responses.create(model="policy", input="And?", previous_response_id=answer.id)
    assert again.output_text is not None
    state = gateway.close(key)
    assert [len(branch["images"]) for branch in state["branches"]] == [1, 0]
    assert [message["role"] for message in state["branches"][1]["messages"]] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def asked(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def pictured(url: str) -> dict[str, Any]:
    return asked([{"type": "image_url", "image_url": {"url": url}}])


REFUSALS: list[tuple[dict[str, Any], int, str]] = [
    (asked([{"type": "input_audio", "input_audio": {}}]), 400, "unsupported_content"),
    (asked([{"type": "video_url", "video_url": {"url": "x"}}]), 400, "unsupported_content"),
    (pictured("https://x/y.png"), 400, "invalid_image"),
    (pictured("/etc/passwd"), 400, "invalid_image"),
    (pictured("file:///etc/passwd"), 400, "invalid_image"),
    (pictured("data:image/png;base64,AAAA"), 400, "invalid_image"),
    (asked("<|image_pad|>"), 400, "invalid_messages"),
    (asked("x" * 9000), 400, "context_length_exceeded"),
    ({"messages": [{"role": "tool", "tool_call_id": "call_7", "content": "x"}]}, 400, "invalid_history"),
    ({"messages": []}, 400, "invalid_history"),
    ({"messages": "hello"}, 400, ""),
    ({}, 400, ""),
    ({"messages": [5]}, 400, ""),
    ({"tool_choice": "required"}, 400, "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter"),
    ({"logit_bias": {"5": 100}}, 400, "unsupported_parameter"),
    ({"temperature": 3}, 400, ""),
    ({"temperature": "hot"}, 400, ""),
    ({"n": 0}, 400, ""),
    ({"n": True}, 400, ""),
    ({"stop": [""]}, 400, ""),
    ({"tools": [{"type": "web_search"}]}, 400, ""),
]  # fmt: skip


DEEP = b'{"messages":[{"role":"user","content":' + b"[" * 900 + b"]" * 900 + b"}]}"
SURROGATE = b'{"messages":[{"role":"user","content":"\\ud800"}]}'


def test_refusals_have_openais_shape_and_the_session_goes_on(gateway: RunningGateway) -> None:
    key, base_url = gateway.open()
    good = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}
    for change, status, code in REFUSALS:
        body = change if "messages" in change or not change else {**good, **change}
        answer = httpx.post(f"{base_url}/chat/completions", json=body)
        assert answer.status_code == status, (change, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert not code or error["code"] == code, (change, error)
        assert "passwd" not in answer.text
    for raw in (
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"messages":' + b"[" * 800 + b"]" * 800 + b"}",
        DEEP,
        SURROGATE,
    ):
        answer = httpx.post(f"{base_url}/chat/completions", content=raw)
        assert answer.status_code == 400, answer.text
    assert httpx.post(f"{base_url}/chat/completions", json=good).status_code == 200
    assert len(gateway.close(key)["branches"]) == 1
    for path, method, status, code in [
        (f"{base_url}/chat/completions", "POST", 410, "session_closed"),
        (f"{gateway.url}/s/nobody/v1/chat/completions", "POST", 404, "session_not_found"),
        (f"{gateway.url}/s/nobody/v1/embeddings", "POST", 404, "unknown_route"),
        (f"{gateway.url}/sessions/nobody", "DELETE", 404, "session_not_found"),
    ]:
        answer = httpx.request(method, path, json=good)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    closed = anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="x", max_retries=0)
    with pytest.raises(anthropic.APIStatusError, match="session is closed"):
        closed.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}])


def test_stored_pictures_may_be_named_again(gateway: RunningGateway) -> None:
    key, base_url = gateway.open()
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    client.chat.completions.create(model="p", messages=[{"role": "user", "content": [image(5)]}], max_tokens=1)
    uri = httpx.get(f"{gateway.url}/sessions/{key}").json()["branches"][0]["images"][0][2]
    named: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    client.chat.completions.create(model="p", messages=named, max_tokens=1)
    assert len({branch["images"][0][1] for branch in gateway.close(key)["branches"]}) == 1


@dataclass
class Stage:
    """A scripted policy, a gateway before it, and a session."""

    policy: ScriptedPolicy
    session: Session
    openai: openai.AsyncOpenAI
    anthropic: anthropic.AsyncAnthropic


@pytest.fixture
async def stage(renderer: RawRenderer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    # A short path, as a run has: it is part of every reference, and their size is measured.
    sources = Sources(ImageStore(tmp_path_factory.mktemp("s"), ImageLimits()))
    policy = ScriptedPolicy(renderer)
    await policy.start()
    gateway = Gateway(GatewayConfig(), "policy")
    await gateway.start()
    client = InferenceClient([policy.url])
    session = Session(renderer, sources, client, Sampling(max_tokens=256), seq_len=4096, seed=0)
    key = gateway.add(session)
    async with (
        openai.AsyncOpenAI(base_url=session.base_url, api_key="none", max_retries=0) as theirs,
        anthropic.AsyncAnthropic(base_url=session.anthropic_base_url, api_key="none", max_retries=0) as others,
    ):
        yield Stage(policy, session, theirs, others)
    gateway.close(key)
    await gateway.aclose()
    await client.aclose()
    await policy.stop()


LOOK = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}


def check_stream(stage: Stage, images: int) -> None:
    """One branch, in which every request's tokens begin with those of the one before and its answer."""
    (branch,) = stage.session.branches
    for earlier, later in zip(stage.policy.requests, stage.policy.requests[1:], strict=False):
        assert later["token_ids"][: len(earlier["token_ids"])] == earlier["token_ids"]
    assert branch.token_ids[: len(stage.policy.requests[-1]["token_ids"])] == stage.policy.requests[-1]["token_ids"]
    assert len(branch.images) == images
    assert sum(branch.loss_mask) == sum(len(turn.completion.token_ids) for turn in stage.session.turns)
    assert {version for version, on in zip(branch.weight_versions, branch.loss_mask, strict=True) if on} == {4}


async def test_anthropics_client_with_tools_that_return_pictures(stage: Stage) -> None:
    tools: Any = [{"name": "look", "description": "Look.", "input_schema": LOOK}]
    stage.policy.says = [f"I look.\n{call('look', at='left')}", call("look", at="right"), "A cat."]
    messages: list[Any] = [{"role": "user", "content": "What is there?"}]
    for number in range(2):
        said = await stage.anthropic.messages.create(model="policy", max_tokens=99, tools=tools, messages=messages)
        assert said.stop_reason == "tool_use"
        use = said.content[-1]
        assert use.type == "tool_use"
        source = {"type": "base64", "media_type": "image/png", "data": data_url(number).partition(",")[2]}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "image", "source": source}]}
        messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
    async with stage.anthropic.messages.stream(model="policy", max_tokens=99, tools=tools, messages=messages) as stream:
        assert await stream.get_final_text() == "A cat."
        assert (await stream.get_final_message()).stop_reason == "end_turn"
    check_stream(stage, images=2)


async def test_anthropics_client_streams_tool_calls_and_stops_at_texts(stage: Stage) -> None:
    tools: Any = [{"name": "look", "input_schema": LOOK}]
    stage.policy.says = [call("look", at="left"), "one STOP two"]
    ask: Any = {"model": "p", "max_tokens": 50, "messages": [{"role": "user", "content": "x"}]}
    async with stage.anthropic.messages.stream(**ask, tools=tools) as stream:
        message = await stream.get_final_message()
    assert message.content[-1].input == {"at": "left"}
    stopped = await stage.anthropic.messages.create(**ask, stop_sequences=["STOP"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "STOP", "one ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["responses", "chat"])
async def test_an_agent_framework_unmodified(stage: Stage, api: str, stream: bool) -> None:
    """OpenAI's Agents SDK, tools that return pictures included."""
    seen: list[str] = []

    @agents.function_tool
    def look(at: str) -> Any:
        """Look somewhere."""
        seen.append(at)
        return agents.ToolOutputImage(image_url=data_url(len(seen))) if api == "responses" else f"noise at {at}"

    kind: Any = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
    agent = agents.Agent(
        name="scout", instructions="Find it.", tools=[look], model=kind(model="policy", openai_client=stage.openai)
    )
    agents.set_tracing_disabled(True)
    stage.policy.says = [f"First left.\n{call('look', at='left')}", call("look", at="right"), "It is a cat."]
    start: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(9), "detail": "auto"}]}]
    if stream:
        streamed = agents.Runner.run_streamed(agent, start)
        async for _ in streamed.stream_events():
            pass
        output = streamed.final_output
    else:
        output = (await agents.Runner.run(agent, start)).final_output
    assert output == "It is a cat."
    assert seen == ["left", "right"]
    check_stream(stage, images=3 if api == "responses" else 1)


async def test_the_openai_client_with_a_tool_loop_of_twenty_turns(stage: Stage) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": LOOK}}]
    stage.policy.says = [call("look", at=str(number)) for number in range(19)] + ["done"]
    messages: list[Any] = [{"role": "user", "content": [image(0), {"type": "text", "text": "Find it."}]}]
    for number in range(20):
        said = await stage.openai.chat.completions.create(model="policy", messages=messages, tools=tools)
        message = said.choices[0].message
        if not message.tool_calls:
            break
        assert said.choices[0].finish_reason == "tool_calls"
        assert json.loads(message.tool_calls[0].function.arguments) == {"at": str(number)}
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": [image(number + 1)]}
        messages += [message, result]
    assert message.content == "done"
    check_stream(stage, images=20)
    sizes = [len(json.dumps(request["features"], separators=(",", ":"))) for request in stage.policy.requests]
    assert max(later - earlier for earlier, later in itertools.pairwise(sizes)) <= 600


async def test_an_answer_that_nobody_waits_for_is_not_recorded(stage: Stage) -> None:
    stage.policy.may_answer.clear()
    with pytest.raises(openai.APITimeoutError):
        await stage.openai.chat.completions.create(model="p", messages=[{"role": "user", "content": "x"}], timeout=0.3)
    stage.policy.says = ["late", "in time"]
    stage.policy.may_answer.set()
    await asyncio.sleep(0.2)
    assert stage.session.turns == []


async def test_a_gateway_beyond_loopback_asks_for_its_key(
    renderer: RawRenderer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "secret")
    gateway = Gateway(GatewayConfig(api_key_var="GATEWAY_KEY", max_request_bytes=1000), "policy")
    await gateway.start()
    client = InferenceClient(["http://127.0.0.1:1"])
    session = Session(renderer, sources, client, Sampling(), seq_len=64, seed=0)
    gateway.add(session)
    assert session.api_key == "secret"
    async with httpx.AsyncClient() as http:
        url = f"{session.base_url}/chat/completions"
        assert (await http.post(url, json={})).status_code == 401
        assert (await http.post(url, json={}, headers={"x-api-key": "other"})).status_code == 401
        assert (await http.post(url, json={}, headers={"Authorization": "Bearer secret"})).status_code == 400
        good = {"Authorization": "Bearer secret"}
        assert (await http.post(url, content=b"x" * 1001, headers=good)).status_code == 413
        body = {"messages": [{"role": "user", "content": "x"}]}
        unreachable = await http.post(url, json=body, headers=good)
        assert (unreachable.status_code, unreachable.json()["error"]["code"]) == (502, "inference_failed")
    await client.aclose()
    await gateway.aclose()


async def test_the_ten_lines_of_the_documentation(stage: Stage) -> None:
    """The agent of docs/environments.md, as it stands there."""
    page = (ROOT / "docs/environments.md").read_text()
    (code,) = re.findall(r"<!-- tested: agent -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {"URL": data_url(3)}
    exec(code, names)
    environment = names["Oranges"]()
    stage.policy.says = ["yes, it is", "no"]
    rewards = [await environment.rollout(task, stage.session) for task in environment.train_tasks()[:2]]
    assert rewards == [1.0, 0.0]
    assert [len(branch.images) for branch in stage.session.branches] == [1, 1]
    assert len(code.partition("async def rollout")[2].splitlines()) <= 10
