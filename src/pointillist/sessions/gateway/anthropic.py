"""Anthropic's Messages API."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pointillist.config.sampling import MAX_VOCABULARY
from pointillist.errors import RequestError
from pointillist.render.raw import Message
from pointillist.sessions.gateway.call import Call, common, message_list, optional, positive, stop_texts
from pointillist.sessions.session import Turn


def parse(body: dict[str, Any]) -> Call:
    """Reads a request.

    Raises:
        RequestError: 400.
    """
    messages: list[Message] = []
    if body.get("system"):
        messages.append({"role": "system", "content": body["system"]})
    for index, message in enumerate(message_list(body, "messages")):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where} is not an object", param=where)
        messages += _converted(message, where)
    choice = optional(body, "tool_choice", dict) or {}
    if choice.get("disable_parallel_tool_use"):
        raise RequestError("tool_choice.disable_parallel_tool_use is not supported", param="tool_choice")
    tools = [_tool(tool, index) for index, tool in enumerate(optional(body, "tools", list) or [])]
    return common(
        body,
        messages,
        tools=[] if choice.get("type") == "none" else tools,
        stop=stop_texts(body, "stop_sequences"),
        max_tokens=positive(body, "max_tokens"),
        top_k=positive(body, "top_k", MAX_VOCABULARY),
    )


def answer(call: Call, turns: Sequence[Turn], name: str, _created: int, _decode: Any) -> dict[str, Any]:
    """The whole answer; see `chat.answer` for the arguments."""
    (turn,) = turns
    return {
        **_head(call, turn, name),
        "content": _blocks(turn),
        "stop_reason": _stop_reason(turn),
        "stop_sequence": turn.stopped_by,
        "usage": {"input_tokens": turn.prompt_tokens, "output_tokens": len(turn.completion.token_ids)},
    }


def events(call: Call, turns: Sequence[Turn], name: str, _created: int, _decode: Any) -> Iterator[bytes]:
    """The answer as server-sent events."""
    (turn,) = turns
    yield _event({"type": "message_start", "message": {**_head(call, turn, name), "content": []}})
    for index, block in enumerate(_blocks(turn)):
        empty, delta = _delta(block)
        yield _event({"type": "content_block_start", "index": index, "content_block": empty})
        yield _event({"type": "content_block_delta", "index": index, "delta": delta})
        yield _event({"type": "content_block_stop", "index": index})
    yield _event(
        {
            "type": "message_delta",
            "delta": {"stop_reason": _stop_reason(turn), "stop_sequence": turn.stopped_by},
            "usage": {"output_tokens": len(turn.completion.token_ids)},
        }
    )
    yield _event({"type": "message_stop"})


def _converted(message: Mapping[str, Any], where: str) -> list[Message]:
    """OpenAI's messages for one of Anthropic's: results of tools are messages of their own there."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    results: list[Message] = []
    rest: list[Any] = []
    calls: list[dict[str, Any]] = []
    reasoning = ""
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content")})
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            reasoning += str(block.get("thinking", ""))
        else:
            rest.append(block)
    converted: Message = {"role": role, "content": rest}
    if calls:
        converted["tool_calls"] = calls
    if reasoning:
        converted["reasoning_content"] = reasoning
    return results if results and not rest else [*results, converted]


def _tool(tool: Any, index: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) or "input_schema" not in tool:
        raise RequestError(
            f"tools[{index}] has no name and input_schema: built-in tools are not supported", param="tools"
        )
    function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _head(call: Call, turn: Turn, name: str) -> dict[str, Any]:
    return {
        "id": f"msg_{name}",
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": turn.prompt_tokens, "output_tokens": 0},
    }


def _blocks(turn: Turn) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reasoning := turn.message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": reasoning, "signature": ""})
    calls = turn.message.get("tool_calls", [])
    if turn.text or not calls:
        blocks.append({"type": "text", "text": turn.text})
    for call in calls:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks


def _delta(block: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A block as it begins, and what then fills it."""
    if block["type"] == "thinking":
        return {**block, "thinking": ""}, {"type": "thinking_delta", "thinking": block["thinking"]}
    if block["type"] == "text":
        return {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
    return {**block, "input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}


def _stop_reason(turn: Turn) -> str:
    if turn.message.get("tool_calls"):
        return "tool_use"
    if turn.stopped_by is not None:
        return "stop_sequence"
    return "max_tokens" if turn.completion.finish_reason == "length" else "end_turn"


def _event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
