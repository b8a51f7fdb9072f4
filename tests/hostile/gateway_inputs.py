"""Hostile requests to the gateway, in the shapes of its three APIs."""

import base64
import copy
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

from tests.helpers.pictures import encoded, picture
from tests.hostile import odd
from tests.hostile.wire import SESSION, Http, request

PATHS = {"chat": "chat/completions", "responses": "responses", "messages": "messages"}
_PICTURES = [
    encoded(picture(40, 40, seed), name) for seed, name in enumerate(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
]
_FUNCTION = {"name": "zoom", "description": "Looks closer.", "parameters": {"type": "object", "properties": {}}}


def _url(data: bytes = _PICTURES[0]) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _chat() -> list[dict[str, Any]]:
    said = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": _url()}}, {"type": "text", "text": "?"}],
    }
    call = {"id": "call_1", "type": "function", "function": {"name": "zoom", "arguments": '{"by": 2}'}}
    result = {
        "role": "tool",
        "tool_call_id": "call_1",
        "content": [{"type": "image_url", "image_url": {"url": _url()}}],
    }
    tools = [{"type": "function", "function": _FUNCTION}]
    plain = {
        "messages": [{"role": "system", "content": "Look."}, {"role": "user", "content": "What?"}],
        "max_tokens": 2,
    }
    turns = [said, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    return [
        {**plain, "model": "policy", "temperature": 0.7, "top_p": 0.9, "n": 1, "stop": ["x"], "logprobs": True},
        {"messages": [said], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": turns, "max_completion_tokens": 2, "tools": tools, "tool_choice": "auto", "seed": 3},
    ]


def _responses() -> list[dict[str, Any]]:
    parts = [{"type": "input_image", "image_url": _url()}, {"type": "input_text", "text": "What?"}]
    call = {"type": "function_call", "call_id": "c1", "name": "zoom", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "seen"}
    return [
        {"input": "What?", "instructions": "Look.", "max_output_tokens": 2, "temperature": 0.7, "top_p": 0.9},
        {"input": [{"role": "user", "content": parts}], "max_output_tokens": 2, "stream": True, "model": "policy"},
        {"input": [{"role": "user", "content": "a"}, call, result], "max_output_tokens": 2,
         "tools": [{"type": "function", **_FUNCTION}], "previous_response_id": None,
         "text": {"format": {"type": "text"}}},
    ]  # fmt: skip


def _messages() -> list[dict[str, Any]]:
    source = {"type": "base64", "media_type": "image/png", "data": _url().partition(",")[2]}
    use = {"type": "tool_use", "id": "t1", "name": "zoom", "input": {"by": 2}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "image", "source": source}]}
    tool = {"name": "zoom", "description": "", "input_schema": {"type": "object"}}
    shown = {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "?"}]}
    return [
        {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2, "system": "Look.",
        "stop_sequences": ["x"]},
        {"messages": [shown], "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "stream": True},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [use]},
                      {"role": "user", "content": [result]}], "max_tokens": 2, "tools": [tool]},
    ]  # fmt: skip


GOOD = {"chat": _chat(), "responses": _responses(), "messages": _messages()}
_LIST = {"chat": "messages", "responses": "input", "messages": "messages"}
_NUMBERS = ["temperature", "top_p", "top_k", "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "seed",
            "top_logprobs", "frequency_penalty", "presence_penalty"]  # fmt: skip


def _odd_part(chance: Random) -> Any:
    """A part of a message with something wrong about its picture or its shape."""
    url: Any = _odd_url(chance)
    return chance.choice([
        lambda: {"type": "image_url", "image_url": {"url": url}}, lambda: {"type": "image_url", "image_url": url},
        lambda: {"type": "input_image", "image_url": url}, lambda: {"type": "image", "image": url},
        lambda: {"type": "image", "url": url}, lambda: {"type": "image", "path": url},
        lambda: {"type": "image", "base64": url},
        lambda: {"type": "image", "data": url, "mimeType": "image/png"}, lambda: {"type": "image", "source": url},
        lambda: {"type": "image", "source": {"type": "base64", "media_type": odd.value(chance), "data": url}},
        lambda: {"type": "image", "source": {"type": "url", "url": url}},
        lambda: {"type": "video_url", "video_url": url},
        lambda: {"type": "tool_result", "tool_use_id": odd.value(chance), "content": odd.value(chance)},
        lambda: {"type": "tool_use", "id": odd.value(chance), "name": odd.value(chance), "input": odd.value(chance)},
        lambda: {"type": "text", "text": odd.value(chance)}, lambda: {"type": odd.value(chance), "text": "a"},
        lambda: {"type": "thinking", "thinking": odd.value(chance)}, lambda: odd.value(chance),
    ])()  # fmt: skip


def _odd_url(chance: Random) -> Any:
    kind = chance.randrange(6)
    if kind == 0:
        return odd.value(chance)
    if kind == 1:
        return chance.choice([
            "file:///etc/passwd", "/etc/passwd", "file:///dev/zero", "/dev/stdin", "http://127.0.0.1:1/x.png",
            "https://x/y",
            "http://[::ffff:127.0.0.1]:1/", "data:,x", "data:image/png;base64", "data:text/html;base64,AAAA",
            "data:" + "x" * 9000,
            "DATA:image/png;base64,AAAA", "data:image/png,%89PNG", "file://~/x", "ftp://x", "blob:x", "\0", ".", "..",
            "~",
        ])  # fmt: skip
    data = bytearray(chance.choice(_PICTURES))
    if kind == 2:
        for _ in range(chance.choice([1, 2, 10])):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 3:
        del data[chance.randrange(len(data)) :]
    elif kind == 4:
        data = bytearray(_png(chance))
    text = base64.b64encode(bytes(data)).decode()
    if kind == 5:
        text = odd.garbled(text.encode(), chance).decode("latin-1")
    return chance.choice(["data:image/png;base64,", "data:image/jpeg;base64,", "data:;base64,"]) + text


def _png(chance: Random) -> bytes:
    """A PNG that says what it is not."""
    width, height = (chance.choice([0, 1, 3, 800, 16_384, 65_536, 2**31 - 1, 2**32 - 1]) for _ in range(2))
    depth, colour = chance.choice([1, 2, 4, 8, 16, 3]), chance.choice([0, 2, 3, 4, 6, 9])
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, chance.choice([0, 1, 7]))
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    tail = chance.choice([b"", b"\0" * 40, struct.pack(">I", 2**31) + b"IDAT", struct.pack(">I", 4) + b"tEXtaaaa"])
    return b"\x89PNG\r\n\x1a\n" + chunk + tail


def inputs(api: str) -> Callable[[Random], Http]:
    """Requests of one of the APIs."""

    def make(chance: Random) -> Http:
        body = copy.deepcopy(chance.choice(GOOD[api]))
        kind = chance.choice(
            ["mutated"] * 6 + ["part"] * 4 + ["number"] * 3 + ["garbled"] * 3 + ["messages", "stop", "path"]
        )
        path = f"/s/{SESSION}/v1/{PATHS[api]}"
        data = b""
        if chance.random() < 1 / 800:
            kind, data = "large", odd.write(_large(body, _LIST[api], chance))
        elif kind == "mutated":
            body = odd.mutated(body, chance)
        elif kind == "part":
            parts = [_odd_part(chance) for _ in range(chance.choice([1, 1, 3]))]
            role = chance.choice(["user", "user", "user", "assistant", "tool", "system"])
            body[_LIST[api]] = [{"role": role, "content": parts, "tool_call_id": "call_1"}]
        elif kind == "number":
            for _ in range(chance.choice([1, 2])):
                name = chance.choice(_NUMBERS)
                body[name] = odd.parameter(name, chance)
        elif kind == "garbled":
            data = odd.garbled(odd.write(body), chance)
        elif kind == "messages":
            said = body[_LIST[api]] if isinstance(body[_LIST[api]], list) else []
            body[_LIST[api]] = chance.choice([
                said[::-1], said * 3, said[1:], said[-1:] * 30, [said], [*said, {}], [*said, None], {"0": said},
                [said[:1]] * 3,
            ])  # fmt: skip
        elif kind == "stop":
            texts = [
                chance.choice(["a", "\ud800", "", "ab" * 5000, "\n", "<|im_end|>"])
                for _ in range(chance.choice([1, 4, 3000]))
            ]
            body[chance.choice(["stop", "stop_sequences"])] = texts
        else:
            return _path(odd.write(body), PATHS[api], chance)
        return Http(kind, request("POST", path, data or odd.write(body)))

    return make


def _large(body: dict[str, Any], name: str, chance: Random) -> dict[str, Any]:
    size = chance.choice([200_000, 1_000_000, 4_000_000])
    filling = chance.choice(["1,", "[],", "{},", '{"role":"user","content":"a"},'])
    if chance.random() < 0.3:
        body[name] = [{"role": "user", "content": "a" * 4 * size}]
    else:
        body[chance.choice([name, "extra", "tools"])] = odd.Raw("[" + filling * (size // 4) + "1]")
    return body


def _path(body: bytes, route: str, chance: Random) -> Http:
    """Another session, another route, another method."""
    path = chance.choice([
        f"/s/{'0' * 32}/v1/{route}", f"/s/{SESSION}/v1/{route}/", f"/s/{SESSION}/v1/embeddings", f"/s/%00/v1/{route}",
        f"/s/../s/{SESSION}/v1/{route}", f"/s//v1/{route}", f"/s/{'a' * 5000}/v1/{route}", "/v1/chat/completions",
        f"/s/%ff%fe/v1/{route}", f"/sessions/{SESSION}x", "/sessions/%2e%2e", f"/s/{SESSION}/v1/models",
        "/sessions/" + "9" * 3000,
        f"/s/{SESSION}/v1/{route}?stream=true&n=5", f"/s/{SESSION}/v1/%63hat/completions",
    ])  # fmt: skip
    method = chance.choice(["POST", "POST", "PUT", "PATCH", "OPTIONS", "TRACE"])
    return Http("path", request(method, path, body))
