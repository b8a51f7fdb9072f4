"""Answers of inference servers that are broken or hostile: each fails its own requests, in bounded time and memory."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.errors import InferenceError, RequestRefusedError
from pointillist.render import RawRenderer, RenderedPrompt
from pointillist.sessions import InferenceClient
from pointillist.sessions.answers import Expected, check_status, completions_of

PATH = "/inference/v1/generate"


@pytest.fixture(scope="module")
def prompt(renderer: RawRenderer) -> RenderedPrompt:
    return renderer.render([{"role": "user", "content": "What?"}], [])


def expected(prompt: RenderedPrompt, count: int = 1, *, check_layout: bool = False) -> Expected:
    return Expected(len(prompt.token_ids), count, 8, 100, frozenset({99}), prompt if check_layout else None)


def choice(index: int = 0) -> dict[str, Any]:
    return {
        "index": index,
        "token_ids": [5, 6, 7],
        "logprobs": {"content": [{"logprob": -0.5, "token": "x"}, {"logprob": 0.0}, {"logprob": 0.0001}]},
        "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
        "finish_reason": "stop",
        "other": [1, {}],
    }


def test_a_good_answer_is_read(prompt: RenderedPrompt) -> None:
    data = json.dumps({"choices": [choice(1), choice(0)]}).encode()
    first, second = completions_of(data, expected(prompt, 2))
    assert first == second
    assert (first.token_ids, first.weight_versions, first.finish_reason) == ([5, 6, 7], [3, 3, 4], "stop")
    assert first.logprobs == [-0.5, 0.0, 0.0001]
    plain = {key: value for key, value in choice().items() if key != "weight_versions"}
    (completion,) = completions_of(json.dumps({"choices": [plain]}).encode(), expected(prompt))
    assert completion.weight_versions == [0, 0, 0]


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda made: made.__setitem__(key, value)


def spans(*of: tuple[Any, int, int]) -> Callable[[dict[str, Any]], None]:
    return put("weight_versions", [{"version": version, "start": start, "end": end} for version, start, end in of])


def logprobs(*values: Any) -> Callable[[dict[str, Any]], None]:
    return put("logprobs", {"content": [{"logprob": value} for value in values]})


@pytest.mark.parametrize(
    "change",
    [
        put("token_ids", [5, 6, -1]),
        put("token_ids", [5, 6, 100]),
        put("token_ids", [5, 6, 2**70]),
        put("token_ids", [5, 6, 1.5]),
        put("token_ids", [5, 6, True]),
        put("token_ids", [5, 6, 99]),  # may not be sampled
        put("token_ids", [5, 6]),
        put("token_ids", []),
        put("token_ids", [5] * 9),  # longer than max_tokens
        put("token_ids", "abc"),
        put("index", 1),
        put("index", -1),
        put("finish_reason", "abort"),
        put("finish_reason", None),
        put("logprobs", None),
        logprobs(-1, -1, 0.1),
        logprobs(-1, -1, float("nan")),
        logprobs(-1, -1, float("-inf")),
        logprobs(-1, -1, "-1"),
        logprobs(-1, -1),
        spans(("3", 0, 10**12)),
        spans(("3", 0, 2)),
        spans(("3", 0, 1), ("4", 2, 3)),
        spans(("3", 0, 3), ("4", 3, 1), ("4", 1, 3)),
        spans(("-1", 0, 3)),
        spans(("9" * 30, 0, 3)),
        spans(("9" * 5000, 0, 3)),
        spans(("x", 0, 3)),
    ],
)
def test_a_bad_answer_is_an_error(change: Callable[[dict[str, Any]], None], prompt: RenderedPrompt) -> None:
    made = choice()
    change(made)
    with pytest.raises(InferenceError):
        completions_of(json.dumps({"choices": [made]}).encode(), expected(prompt))


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b'{"choices":[]}', b"[" * 100_000, b'{"choices":' + b"[" * 100_000, b'{"choices":"x"}'],
)
def test_what_is_no_answer_is_an_error(data: bytes, prompt: RenderedPrompt) -> None:
    with pytest.raises(InferenceError):
        completions_of(data, expected(prompt))
    for status in (200, 400, 500, 302):
        if status != 200:
            with pytest.raises(InferenceError):
                check_status(PATH, status, data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_any_bytes_are_an_error(prompt: RenderedPrompt, data: bytes) -> None:
    with pytest.raises(InferenceError):
        completions_of(data, expected(prompt, check_layout=True))
    with pytest.raises(InferenceError):
        check_status(PATH, 400, data)


def test_refusals_are_told_from_failures() -> None:
    def error(**fields: Any) -> bytes:
        return json.dumps({"error": {"message": "m" * 10_000, "type": "BadRequestError", **fields}}).encode()

    with pytest.raises(RequestRefusedError) as caught:
        check_status(PATH, 400, error(param="sampling_params.n"))
    assert caught.value.param == "sampling_params.n"
    assert len(str(caught.value)) < 1000
    for status, data in [
        (400, error(type="missing_mm_image")),
        (401, error()),
        (404, error()),
        (500, error()),
        (302, b""),
    ]:
        with pytest.raises(InferenceError) as failure:
            check_status(PATH, status, data)
        assert not isinstance(failure.value, RequestRefusedError)


class Hostile:
    """A server that answers with given bytes, over and over if it is told so."""

    def __init__(self) -> None:
        self.answers: list[tuple[bytes, bool]] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        await reader.readexactly(length)
        data, endless = self.answers.pop(0)
        try:
            writer.write(data)
            while endless:
                writer.write(b" " * 65_536)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    def stop(self) -> None:
        self._server.close()


async def test_one_bad_answer_fails_its_request_and_no_other(prompt: RenderedPrompt) -> None:
    server = Hostile()
    url = await server.start()
    client = InferenceClient([url], vocab_size=100)
    body = json.dumps({"choices": [choice()]}).encode()
    good = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    redirect = b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    server.answers = [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n", True),  # never ends
        (redirect, False),
        (good, False),
    ]
    params = {"max_tokens": 8}
    for _ in range(3):
        with pytest.raises(InferenceError):
            await asyncio.wait_for(client.generate(prompt, params, 0, wait=False), 120)
    completion = await asyncio.wait_for(client.generate(prompt, params, 0, wait=False), 120)
    assert completion.token_ids == [5, 6, 7]
    await client.aclose()
    server.stop()
