"""What a request to the gateway may hold, for each API: numbers, texts, lists and nesting have bounds with names."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.base.http_errors import error_body
from pointillist.errors import InferenceError, PointillistError, RequestError, RequestRefusedError
from pointillist.sessions.gateway import anthropic, chat, responses
from pointillist.sessions.gateway import call as bounds
from pointillist.sessions.gateway.server import _as_chat_error, _parsed

APIS = [chat, responses, anthropic]
FIELD = {chat: "max_tokens", responses: "max_output_tokens", anthropic: "max_tokens"}


def body(api: Any, **fields: Any) -> bytes:
    said = [{"role": "user", "content": "What?"}]
    return json.dumps({"input" if api is responses else "messages": said, FIELD[api]: 4, **fields}).encode()


def refusal(api: Any, raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        _parsed(api, raw)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    return caught.value


NUMBERS: list[tuple[list[Any], str, list[Any], list[Any]]] = [
    (APIS, "temperature", [0, 0.01, 1, 2, None], [-1, 1e-45, 1e-38, 0.009, 2.1, 1e39, True, "1", [], 10**30]),
    (APIS, "top_p", [1e-6, 1, None], [0, 1e-46, 1.1, -1, True, "1", 10**30]),
    ([anthropic], "top_k", [1, 10_000_000, None], [0, -1, 2**63, 10**18, 1.5, True, "5"]),
    ([chat], "n", [1, 128, None], [0, -1, 2**70, 1.0, True]),
    (APIS, "seed", [-(2**63), 0, 2**63 - 1, None], [2**63, -(2**63) - 1, "x", 0.5]),
    ([chat, anthropic], "max_tokens", [1, 100_000_000, None], [0, -1, 10**9, 10**30, 1.5, True]),
    ([chat], "max_completion_tokens", [1, None], [0, 10**9]),
    ([responses], "max_output_tokens", [1, None], [0, -1, 10**9, 10**30, "9"]),
]


@pytest.mark.parametrize(("apis", "field", "good", "bad"), NUMBERS, ids=[row[1] for row in NUMBERS])
def test_numbers_are_bounded_and_the_refusal_names_field_and_bound(
    apis: list[Any], field: str, good: list[Any], bad: list[Any]
) -> None:
    for api in apis:
        for value in good:
            _parsed(api, body(api, **{field: value}))
        for value in bad:
            error = refusal(api, body(api, **{field: value}))
            wide = isinstance(value, int) and value.bit_length() > 64
            assert (f"{field} is " in error.message and "expected" in error.message) or wide, error.message
            assert error.param == field or wide


LONG = "x" * (bounds.MAX_STOP_CHARACTERS + 1)
TOOL = {
    chat: {"type": "function", "function": {"name": "f", "parameters": {}}},
    responses: {"type": "function", "name": "f", "parameters": {}},
    anthropic: {"name": "f", "input_schema": {}},
}


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("api", APIS)
def test_lists_texts_and_nesting_are_bounded(api: Any) -> None:
    messages = "input" if api is responses else "messages"
    many = [{"role": "user", "content": "a"}] * (bounds.MAX_MESSAGES + 1)
    wide = {**TOOL[api], "parameters" if api is responses else "input_schema": {"a": "x" * bounds.MAX_TOOLS_BYTES}}
    if api is chat:
        wide = {"type": "function", "function": {"name": "f", "description": "x" * bounds.MAX_TOOLS_BYTES}}
    cases = [
        (messages, many, str(bounds.MAX_MESSAGES)),
        ("tools", [TOOL[api]] * (bounds.MAX_TOOLS + 1), str(bounds.MAX_TOOLS)),
        ("tools", [wide], str(bounds.MAX_TOOLS_BYTES)),
        ("metadata", {"a": "x" * bounds.MAX_METADATA_BYTES}, str(bounds.MAX_METADATA_BYTES)),
        ("model", "x" * (bounds.MAX_NAME_CHARACTERS + 1), str(bounds.MAX_NAME_CHARACTERS)),
        ("pointillist_session", "x" * (bounds.MAX_NAME_CHARACTERS + 1), str(bounds.MAX_NAME_CHARACTERS)),
    ]
    if api is not responses:
        stop = "stop" if api is chat else "stop_sequences"
        cases += [
            (stop, ["x"] * (bounds.MAX_STOP_TEXTS + 1), str(bounds.MAX_STOP_TEXTS)),
            (stop, [LONG], str(bounds.MAX_STOP_CHARACTERS)),
        ]
    for field, value, bound in cases:
        error = refusal(api, body(api, **{field: value}))
        assert error.param == field, error.message
        assert bound in error.message
    _parsed(api, body(api, metadata=nested(50), tools=[TOOL[api]] * 200))
    for levels in (100, 400):
        assert "more than 100 levels" in refusal(api, body(api, metadata=nested(levels))).message
    for raw in (
        b"[" * 100_000,
        b'{"messages":' + b"[" * 2000 + b"]" * 2000 + b"}",
        b"\xff",
        b'"\\ud800"',
        b"1e999",
        b"{}",
    ):
        refusal(api, raw)
    assert "500000" in refusal(api, b'{"a":[' + b"[]," * 7_000_000 + b"[]]}").message
    assert "63 bits" in refusal(api, body(api, tools=[{**TOOL[api], "x": 10**30}])).message
    refusal(api, body(api).replace(b"}", b', "x": ' + b"1" * 5000 + b"}", 1))


def test_images_are_counted_wherever_they_stand() -> None:
    picture = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [picture, picture]}
    call = _parsed(anthropic, body(anthropic, messages=[{"role": "user", "content": [picture, result]}]))
    assert call.images == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "type",
                    "text",
                    "messages",
                    "tools",
                    "function",
                    "name",
                    "tool_calls",
                    "format",
                    "id",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
FIELDS = [
    "messages", "input", "tools", "tool_choice", "stop", "stop_sequences", "text", "n", "temperature", "top_p", "top_k",
    "max_tokens", "metadata", "stream", "stream_options", "system", "instructions", "seed", "logprobs", "model",
    "response_format", "previous_response_id", "pointillist_session", "logit_bias",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_json_is_a_call_or_a_refusal(api: Any, fields: dict[str, Any]) -> None:
    try:
        _parsed(api, body(api, **fields))
    except RequestError as error:
        assert error.status == 400


def test_what_the_server_refuses_for_the_agents_values_is_the_agents_mistake() -> None:
    mine = _as_chat_error(
        RequestRefusedError("n is 99, at most 64 completions are decoded at once", param="sampling_params.n")
    )
    assert (mine.status, mine.param) == (400, "n")
    assert [error_body(mine, api)["error"]["type"] for api in ("openai", "anthropic")] == ["invalid_request_error"] * 2
    assert _as_chat_error(InferenceError("died")).status == 502
    assert isinstance(mine, PointillistError)
