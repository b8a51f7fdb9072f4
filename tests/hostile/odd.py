"""Odd values, and good JSON made odd. A `Random` decides everything, so a seed names an input."""

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_RAW = "\ue000"
_TWICE = "\ue001"


class Raw:
    """A piece of text that `write` puts into its JSON as it stands, valid or not."""

    def __init__(self, text: str) -> None:
        self.text = text


def write(value: Any) -> bytes:
    """JSON of a value that may hold `Raw` pieces, and keys that `twice` doubled."""
    pieces: list[str] = []

    def piece(given: Any) -> str:
        pieces.append(given.text)
        return f"{_RAW}{len(pieces) - 1}"

    text = json.dumps(value, default=piece)
    if pieces:
        text = re.sub(r'"\\ue000(\d+)"', lambda match: pieces[int(match[1])], text)
    return text.replace('"\\ue001', '"').encode(errors="surrogatepass")


NUMBERS = [
    "NaN", "Infinity", "-Infinity", "1e39", "-1e39", "1e-38", "1e-45", "1e-46", "1e-320", "1e308", "1e309", "-1e999",
    "-1", "-2", "-0", "-0.0", "0", "0.0", "1", "2", "3", "7", "20", "21", "255", "256", "257", "1000", "65536",
    "200000", "3000000", "2147483647", "2147483648", "-2147483649", "4294967296", "9007199254740993",
    "9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809",
    "18446744073709551615", "18446744073709551616", "1" + "0" * 40, "-1" + "0" * 40, "9" * 4300, "9" * 5000, "1.0",
    "1.5", "0.1", "0.999999999", "1.0000001", "1e5", "1E+2", "01", "+1", ".5", "5.", "0x10", "1_000", "true", "false",
    "null", '"1"', '"NaN"', '""', "[1]", "[]", "{}",
]  # fmt: skip

EDGES = {
    "temperature": ["0", "1e-3", "0.01", "0.5", "1", "2", "5", "100", "-0.0"],
    "top_p": ["1", "0.5", "1e-6", "1e-3", "0.01", "0.9999999"],
    "top_k": ["-1", "0", "1", "2", "50", "1000", "100000"],
    "max_tokens": ["1", "2", "3", "7"],
    "max_completion_tokens": ["1", "3"],
    "max_output_tokens": ["1", "3", "16"],
    "n": ["1", "1", "2", "3", "16", "64"],
    "seed": ["0", "-1", "2147483647", "9223372036854775807", "18446744073709551615", "-9223372036854775808"],
    "logprobs": ["0", "1", "20", "true"],
    "ignore_eos": ["true", "false"],
}
"""Numbers that are allowed, or nearly, by the parameter's name."""

STRINGS = [
    "", " ", "\0", "a\0b", "\ud800", "\udfff\ud800", "a" * 5000, "\u202e\u0301", "\U0001f600" * 50, "\r\nX-Odd: 1",
    "<|image_pad|>", "<|vision_start|>", "<|im_end|>\n<|im_start|>system\n", "<|endoftext|>",
    "<tool_call>{</tool_call>",
    "{{7*7}}", "{%", "%00", "%s%n", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "C:\\x", "true", "null",
    "1e999", "user", "assistant", "system", "tool", "text", "image_url", "auto", "none", "function", "'; --", "\ufeff",
    "mmraw:", "data:image/png;base64,AAAA", "data:image/png;base64," + "A" * 3000, "http://127.0.0.1:1/x.png",
]  # fmt: skip

_UNKNOWN = ["extra", "", "\0", "__proto__", "__class__", "mm_kwargs", "pixel_values", "$ref", "a" * 300, "\ud800", "n"]


def number(chance: Random) -> Raw:
    """A number that is hard on somebody; sometimes no number at all."""
    return Raw(chance.choice(NUMBERS))


def parameter(name: str, chance: Random) -> Raw:
    """A value of a sampling parameter: of the edge of what is allowed, or any odd number."""
    return Raw(chance.choice(EDGES[name])) if name in EDGES and chance.random() < 0.6 else number(chance)


def nest(chance: Random) -> Raw:
    """Nesting, of one kind or of two in turns; mostly shallow enough to be decoded."""
    depth = chance.choice([2, 8, 60, 250, 600, 900, 1100, 3000, 20_000, 100_000])
    opening, closing = chance.choice([("[", "]"), ('{"a":', "}"), ('[{"type":', "}]"), ("[[1],", "]")])
    return Raw(opening * depth + "0" + closing * depth)


def value(chance: Random) -> Any:
    """Anything but what belongs there."""
    kind = chance.randrange(10)
    if kind < 4:
        return number(chance)
    if kind < 7:
        return chance.choice(STRINGS)
    if kind == 7:
        return [value(chance) for _ in range(chance.randrange(4))]
    if kind == 8:
        return {chance.choice(_UNKNOWN + STRINGS[:6]): value(chance) for _ in range(chance.randrange(3))}
    return nest(chance)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys: Sequence[Any] = (
            list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def _replace(node: Any, key: Any, chance: Random) -> None:
    node[key] = number(chance) if isinstance(node[key], int | float) and chance.random() < 0.8 else value(chance)


def _remove(node: Any, key: Any, _: Random) -> None:
    del node[key]


def _add(node: Any, key: Any, chance: Random) -> None:
    if isinstance(node, dict):
        node[chance.choice(_UNKNOWN)] = value(chance)
    else:
        node.insert(key, value(chance))


def _twice(node: Any, key: Any, chance: Random) -> None:
    if isinstance(node, dict):
        node[f"{_TWICE}{key}"] = value(chance)
    else:
        node.insert(key, node[key])


def _wrap(node: Any, key: Any, chance: Random) -> None:
    node[key] = [node[key]] if chance.random() < 0.5 else {chance.choice(["value", "url", "text", "0"]): node[key]}


def _repeat(node: Any, key: Any, chance: Random) -> None:
    times = chance.choice([2, 3, 17, 300])
    node[key] = node[key] * times if isinstance(node[key], list | str) and len(node[key]) < 400 else [node[key]] * times


def _bend(node: Any, key: Any, chance: Random) -> None:
    """A string with a piece in its middle replaced."""
    if isinstance(node[key], str):
        at = chance.randrange(len(node[key]) + 1)
        node[key] = node[key][:at] + chance.choice(STRINGS)[:40] + node[key][at + chance.randrange(9) :]
    else:
        node[key] = value(chance)


_MUTATIONS: list[Callable[[Any, Any, Random], None]] = [
    _replace, _replace, _replace, _remove, _add, _twice, _wrap, _repeat, _bend, _bend,
]  # fmt: skip


def mutated(tree: Any, chance: Random) -> Any:
    """The tree, a good request, changed in place in one to three places."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if places := _places(tree):
            node, key = chance.choice(places)
            chance.choice(_MUTATIONS)(node, key, chance)
    return tree


def garbled(data: bytes, chance: Random) -> bytes:
    """Bytes of a good request that are cut, flipped, or in another encoding."""
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(12)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + chance.randbytes(chance.choice([1, 2, 8])) + data[at:]
    if kind == 2:
        return data[:at] + data[at + chance.choice([1, 2, 30]) :]
    if kind == 3:
        return data.decode(errors="replace").encode(
            chance.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7"])
        )
    if kind == 4:
        return data + chance.choice([b"}", b"]", b"\0", data, b" " * 100_000, b"//x", b"\n{}"])
    if kind == 5:
        return chance.choice([b" " * 100_000, b"\n", b"\xef\xbb\xbf", b")]}',\n", b"\xff\xfe"]) + data
    if kind == 6:
        return data.replace(b'"', b"'")
    if kind == 7:
        return chance.choice([b"", b"null", b"[]", b'"', b"0", b"{}", b"{", b"[[[[", b"\x80\x04\x95", b"\xff" * 100])
    if kind == 8:
        return data.replace(b":", b":/**/")
    if kind == 9:
        flipped = bytearray(data)
        for _ in range(chance.choice([1, 3, 20])):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    if kind == 10:
        return chance.randbytes(chance.choice([1, 16, 500]))
    return nest(chance).text.encode()[: chance.choice([5, 100, 1_000_000])]
