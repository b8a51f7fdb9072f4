"""OpenAI's Chat Completions API."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pointillist.config.sampling import MAX_CHOICES
from pointillist.errors import RequestError
from pointillist.sessions.gateway.call import Call, common, message_list, optional, positive, stop_texts
from pointillist.sessions.session import Turn


def parse(body: dict[str, Any]) -> Call:
    """Reads a request.

    Raises:
        RequestError: 400.
    """
    tools = optional(body, "tools", list) or []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not _is_function(tool.get("function")):
            raise RequestError(
                f"tools[{index}] is not {{type: 'function', function: {{name, ...}}}}", param=f"tools[{index}]"
            )
    messages = message_list(body, "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RequestError(f"messages[{index}] is not an object", param=f"messages[{index}]")
    stream_options = optional(body, "stream_options", dict) or {}
    return common(
        body,
        messages,
        tools=[] if body.get("tool_choice") == "none" else tools,
        n=positive(body, "n", MAX_CHOICES) or 1,
        stop=stop_texts(body, "stop"),
        include_usage=bool(stream_options.get("include_usage")),
        logprobs=optional(body, "logprobs", bool) or False,
        max_tokens=positive(body, "max_completion_tokens") or positive(body, "max_tokens"),
    )


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def answer(call: Call, turns: Sequence[Turn], name: str, created: int, decode: Any) -> dict[str, Any]:
    """The whole answer.

    Args:
        call: What was asked.
        turns: One a choice.
        name: Unique.
        created: Seconds since 1970.
        decode: Token ids to text.
    """
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "refusal": None, **_message(turn)},
            "finish_reason": _finish_reason(turn),
            "logprobs": _logprobs(turn, decode) if call.logprobs else None,
        }
        for index, turn in enumerate(turns)
    ]
    head = {"id": f"chatcmpl-{name}", "object": "chat.completion", "created": created, "model": call.model}
    return {**head, "choices": choices, "usage": _usage(turns)}


def events(call: Call, turns: Sequence[Turn], name: str, created: int, decode: Any) -> Iterator[bytes]:
    """The answer as server-sent events."""
    head = {"id": f"chatcmpl-{name}", "object": "chat.completion.chunk", "created": created, "model": call.model}

    def chunk(index: int, delta: dict[str, Any], **choice: Any) -> bytes:
        return _event({**head, "choices": [{"index": index, "delta": delta, "finish_reason": None, **choice}]})

    for index, turn in enumerate(turns):
        message = _message(turn)
        yield chunk(index, {"role": "assistant", "content": ""})
        delta = {key: value for key, value in message.items() if key != "tool_calls" and value}
        if delta:
            yield chunk(index, delta, logprobs=_logprobs(turn, decode) if call.logprobs else None)
        for number, tool_call in enumerate(message.get("tool_calls", [])):
            yield chunk(index, {"tool_calls": [{"index": number, **tool_call}]})
        yield chunk(index, {}, finish_reason=_finish_reason(turn))
    if call.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(turns)})
    yield b"data: [DONE]\n\n"


def _message(turn: Turn) -> dict[str, Any]:
    message = {key: value for key, value in turn.message.items() if key != "role"}
    if message.get("tool_calls") and not message["content"]:
        message["content"] = None
    return message


def _finish_reason(turn: Turn) -> str:
    return "tool_calls" if turn.message.get("tool_calls") else turn.completion.finish_reason


def _usage(turns: Sequence[Turn]) -> dict[str, int]:
    sampled = sum(len(turn.completion.token_ids) for turn in turns)
    read = turns[0].prompt_tokens
    return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


def _logprobs(turn: Turn, decode: Any) -> dict[str, Any]:
    completion = turn.completion
    texts = [decode(token) for token in completion.token_ids]
    return {
        "content": [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in zip(texts, completion.logprobs, strict=True)
        ],
        "refusal": None,
    }


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
