"""Messages in one form, so that a conversation that comes back can be recognised.

Clients send the whole conversation at every turn, and send it back slightly changed: text as a string or as a list of
parts, `null` or an empty string for no content, arguments of a tool call with other white space, an image again as
base64. `canonical` removes those differences; `first_key` and `next_key` give every prefix of a conversation a key to
be found by.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from pointillist.errors import HistoryError, UnsupportedContentError
from pointillist.render.raw import Message

_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_TYPES: Final = frozenset({"text", "input_text", "output_text"})


def canonical(message: Mapping[str, object], where: str) -> Message:
    """The one form of a message whose images are stored (`normalize_images`).

    Args:
        message: OpenAI chat shape.
        where: Names the message in errors, such as `messages[3]`.

    Raises:
        UnsupportedContentError: Content that is neither text nor image, or an image in an assistant's message.
        HistoryError: Not a message.
    """
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise HistoryError(f"{where}.role is {str(message.get('role'))[:32]!r}, expected one of {sorted(_ROLES)}")
    content = _content(message.get("content"), where)
    result: Message = {"role": role, "content": content}
    if role == "assistant":
        if not isinstance(content, str):
            raise UnsupportedContentError(f"{where}: the policy writes text, an assistant message can not have images")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(reasoning, str):
            result["reasoning_content"] = reasoning
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise HistoryError(f"{where}.tool_calls is {type(calls).__name__}, expected a list")
        if calls:
            result["tool_calls"] = [_tool_call(call, where) for call in calls]
    elif role == "tool":
        result |= {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    return result


def check_tool_results(history: Sequence[Message], issued: Mapping[str, str]) -> None:
    """Checks that calls and results in a conversation belong together.

    Args:
        history: Canonical messages.
        issued: Tool calls that the record holds: id to `call_key`.

    Raises:
        HistoryError: A result without its call, or a call that the record has otherwise.
    """
    open_calls: set[str] = set()
    for index, message in enumerate(history):
        where = f"messages[{index}]"
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if call_id not in open_calls:
                raise HistoryError(
                    f"{where}.tool_call_id is {str(call_id)[:64]!r}, expected a call of the preceding assistant message"
                )
            continue
        open_calls = {call["id"] for call in message.get("tool_calls", [])}
        for call in message.get("tool_calls", []):
            if issued.get(call["id"], call_key(call)) != call_key(call):
                raise HistoryError(
                    f"{where}: tool call {call['id']} contradicts the record: the policy made another call of this id"
                )


def call_key(call: Mapping[str, Any]) -> str:
    """What a tool call asks for, whatever the white space of its arguments."""
    return json.dumps([call["function"]["name"], _parsed(call["function"]["arguments"])], sort_keys=True)


def first_key(tools: Sequence[Mapping[str, object]] | None) -> bytes:
    """Key of a conversation without messages.

    Args:
        tools: OpenAI tool specifications; they are part of the first tokens.
    """
    return hashlib.sha256(json.dumps(list(tools or []), sort_keys=True).encode()).digest()


def next_key(key: bytes, message: Message) -> bytes:
    """Key of a conversation after one more canonical message: equal keys are equal conversations, tools included.

    Reasoning is left out: most clients do not send it back.

    Args:
        key: Of the conversation before the message, 32 bytes.
        message: Canonical.
    """
    what = {name: value for name, value in message.items() if name not in ("reasoning_content", "tool_calls")}
    calls = [[call["id"], call_key(call)] for call in message.get("tool_calls", [])]
    return hashlib.sha256(key + json.dumps([what, calls], sort_keys=True).encode()).digest()


def _content(content: object, where: str) -> str | list[Message]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise HistoryError(f"{where}.content is {type(content).__name__}, expected a string or a list of parts")
    found = (_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    parts: list[Message] = []
    for kind, run in groupby(found, key=lambda part: str(part["type"])):
        # Texts that follow one another are one text.
        if kind == "text":
            parts.append({"type": "text", "text": "".join(part["text"] for part in run)})
        else:
            parts.extend(run)
    if not parts:
        return ""
    return str(parts[0]["text"]) if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(part: object, where: str) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise UnsupportedContentError(f"{where} has type {type(part).__name__[:32]!r}, expected text or an image")
    kind = str(part.get("type"))
    if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "image_url":
        return {"type": "image_url", "image_url": {"url": part["image_url"]["url"]}}
    raise UnsupportedContentError(f"{where} has type {kind[:32]!r}, expected text or an image")


def _tool_call(call: object, where: str) -> Message:
    try:
        if not isinstance(call, Mapping):
            raise TypeError
        function = call["function"]
        arguments = function.get("arguments")
        return {
            "id": str(call["id"]),
            "type": "function",
            "function": {
                "name": str(function["name"]),
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments or {}),
            },
        }
    except (KeyError, TypeError, AttributeError):
        raise HistoryError(
            f"{where}.tool_calls: expected {{id, type: 'function', function: {{name, arguments}}}} for every call"
        ) from None


def _parsed(arguments: str) -> object:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
