"""OpenAI's Responses API."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pointillist.errors import RequestError
from pointillist.render.raw import Message
from pointillist.sessions.gateway.call import MAX_MESSAGES, Call, check_count, common, optional, positive
from pointillist.sessions.session import Turn


def parse(body: dict[str, Any]) -> Call:
    """Reads a request.

    Raises:
        RequestError: 400.
    """
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise RequestError("input must be a text or a list of items", param="input")
    check_count(items, "input", MAX_MESSAGES)
    messages: list[Message] = []
    if instructions := optional(body, "instructions", str):
        messages.append({"role": "system", "content": instructions})
    for index, item in enumerate(items):
        _add(messages, item, f"input[{index}]")
    text_format = (optional(body, "text", dict) or {}).get("format") or {}
    if not isinstance(text_format, dict) or text_format.get("type", "text") != "text":
        raise RequestError("text.format other than text is not supported", param="text", code="unsupported_parameter")
    tools = [_tool(tool, index) for index, tool in enumerate(optional(body, "tools", list) or [])]
    return common(
        body,
        messages,
        tools=[] if body.get("tool_choice") == "none" else tools,
        max_tokens=positive(body, "max_output_tokens"),
        previous=optional(body, "previous_response_id", str),
    )


def answer(call: Call, turns: Sequence[Turn], name: str, created: int, _decode: Any) -> dict[str, Any]:
    """The whole answer; see `chat.answer` for the arguments."""
    (turn,) = turns
    cut = turn.completion.finish_reason == "length"
    sampled = len(turn.completion.token_ids)
    return {
        **_head(call, name, created),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": _output(turn, name),
        "usage": {
            "input_tokens": turn.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": sampled,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": turn.prompt_tokens + sampled,
        },
    }


def events(call: Call, turns: Sequence[Turn], name: str, created: int, decode: Any) -> Iterator[bytes]:
    """The answer as server-sent events."""
    for number, event in enumerate(_events(call, turns, name, created, decode)):
        data = json.dumps({**event, "sequence_number": number})
        yield f"event: {event['type']}\ndata: {data}\n\n".encode()


def _events(call: Call, turns: Sequence[Turn], name: str, created: int, decode: Any) -> Iterator[dict[str, Any]]:
    whole = answer(call, turns, name, created, decode)
    begun = {**_head(call, name, created), "status": "in_progress", "output": []}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(whole["output"]):
        place = {"output_index": index}
        empty: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        yield {"type": "response.output_item.added", **place, "item": {**item, **empty, "status": "in_progress"}}
        place["item_id"] = item["id"]
        if item["type"] == "message":
            (part,) = item["content"]
            place["content_index"] = 0
            text = {"logprobs": [], **place}
            yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
            yield {"type": "response.output_text.delta", "delta": part["text"], **text}
            yield {"type": "response.output_text.done", "text": part["text"], **text}
            yield {"type": "response.content_part.done", **place, "part": part}
        else:
            arguments = item["arguments"]
            yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
            done = {"name": item["name"], "arguments": arguments}
            yield {"type": "response.function_call_arguments.done", **place, **done}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{whole['status']}", "response": whole}


def _add(messages: list[Message], item: Any, where: str) -> None:
    """Adds an input item; a call joins the assistant's message before it, as one turn of the policy has them."""
    kind = item.get("type", "message") if isinstance(item, Mapping) else None
    if kind == "message" and "role" in item:
        messages.append({"role": item["role"], "content": item.get("content")})
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":  # reasoning is in the record
        raise RequestError(
            f"{where} has type {str(kind)[:40]!r}, which is not supported", param=where, code="unsupported_content"
        )


def _tool(tool: Any, index: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise RequestError(
            f"tools[{index}] is not a function: built-in tools are not supported", param=f"tools[{index}]"
        )
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _head(call: Call, name: str, created: int) -> dict[str, Any]:
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "model": call.model,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": call.previous,
        "temperature": call.temperature,
        "top_p": call.top_p,
        "tool_choice": "auto",
        "tools": [{"type": "function", "strict": False, "parameters": None, **tool["function"]} for tool in call.tools],
    }


def _output(turn: Turn, name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    calls = turn.message.get("tool_calls", [])
    if turn.text or not calls:
        part = {"type": "output_text", "text": turn.text, "annotations": []}
        message = {"id": f"msg_{name}", "type": "message", "role": "assistant", "status": "completed"}
        items.append({**message, "content": [part]})
    for index, call in enumerate(calls):
        made = {"id": f"fc_{name}_{index}", "type": "function_call", "call_id": call["id"], "status": "completed"}
        items.append({**made, **call["function"]})
    return items
