"""What an inference server answered: bounded, and checked before anything is made of it.

A server that is broken, or is not one of ours, fails the requests that it answers wrongly, and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from pointillist.config.sampling import MAX_VOCABULARY
from pointillist.errors import InferenceError, RequestRefusedError
from pointillist.render.raw import RenderedPrompt

_BASE_BYTES: Final = 1024 * 1024
_BYTES_A_SAMPLED_TOKEN: Final = 1024
_BYTES_A_READ_TOKEN: Final = 32
_MAX_TOKENS: Final = 65_536
"""Tokens of a completion whose length the request leaves open."""
_MAX_VERSION: Final = 2**31 - 1
_ROUNDING: Final = 1e-3
"""By so much a logprob may be above 0."""
_SHOWN: Final = 500
"""Characters of a server's message that are handed on."""
_REFUSALS: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
_MISSING_IMAGE: Final = "missing_mm_image"


@dataclass(frozen=True, slots=True)
class Completion:
    """What the server sampled."""

    token_ids: list[int]
    logprobs: list[float]
    """Per token, at the sampling temperature."""
    weight_versions: list[int]
    """Per token."""
    finish_reason: str
    """`stop` or `length`."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer must fit."""

    prompt: RenderedPrompt
    count: int
    """Completions."""
    max_tokens: int | None
    """Of one completion; None where the request leaves it to the server."""
    vocab_size: int
    """Token ids are below it; 0 if it is not known."""
    unsampleable: frozenset[int]
    """Tokens that no policy may sample."""
    check_layout: bool
    """Whether the server expanded the prompt itself, so that what it read must be compared."""

    @property
    def max_bytes(self) -> int:
        """Bytes that the answer may have."""
        sampled = self.count * (self.max_tokens or _MAX_TOKENS)
        return _BASE_BYTES + sampled * _BYTES_A_SAMPLED_TOKEN + len(self.prompt.token_ids) * _BYTES_A_READ_TOKEN


class _LogProb(msgspec.Struct):
    logprob: float


class _LogProbs(msgspec.Struct):
    content: list[_LogProb]


class _Span(msgspec.Struct):
    """Tokens `[start, end)` were sampled by the weights of this version."""

    version: Annotated[str, Meta(max_length=32)]
    start: int
    end: int


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _LogProbs
    finish_reason: str
    weight_versions: list[_Span] | None = None


class _Place(msgspec.Struct):
    offset: int
    length: int


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    prompt_token_ids: list[int] | None = None
    mm_placeholders: dict[str, list[_Place]] | None = None


_decoder: "msgspec.json.Decoder[_Answer]" = msgspec.json.Decoder(_Answer)


def completions_of(data: bytes, expected: Expected) -> list[Completion]:
    """The completions in an answer, in the order of their seeds.

    Raises:
        InferenceError: The answer is malformed, or does not fit the request.
    """
    try:
        answer = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InferenceError(f"unexpected answer of the inference server: {error}") from None
    if expected.check_layout:
        _check_layout(answer, expected.prompt)
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(expected.count)):
        raise InferenceError(f"asked for {expected.count} completions, got {len(choices)} or with other numbers")
    return [_completion(choice, expected) for choice in choices]


def check_status(path: str, status: int, data: bytes) -> None:
    """Checks that an answer is none of an error.

    Raises:
        RequestRefusedError: The server does not serve what the request asks for.
        InferenceError: Any other status than 200.
    """
    if status == HTTPStatus.OK:
        return
    try:
        error = msgspec.json.decode(data)["error"]
        kind, param = error.get("type"), error.get("param")
        text = f"{path} answered {status} ({str(kind)[:64]}): {str(error.get('message'))[:_SHOWN]}"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        kind, param, text = None, None, f"{path} answered {status}: {data[:200].decode(errors='replace')}"
    if status in _REFUSALS and kind != _MISSING_IMAGE:
        raise RequestRefusedError(text, param=param if isinstance(param, str) else None)
    raise InferenceError(text)


def _check_layout(answer: _Answer, prompt: RenderedPrompt) -> None:
    """The engine expanded the prompt itself: it must have read what was rendered here."""
    ids, spans = answer.prompt_token_ids, (answer.mm_placeholders or {}).get("image", [])
    if ids is None:
        raise InferenceError("answer has no prompt_token_ids: what the engine read can not be checked")
    if ids != prompt.token_ids:
        first = next((i for i, (a, b) in enumerate(zip(ids, prompt.token_ids, strict=False)) if a != b), len(ids))
        raise InferenceError(
            f"the engine read {len(ids)} tokens, {len(prompt.token_ids)} were rendered; they differ from token {first} "
            "on: its layout of the images is another one"
        )
    if [(span.offset, span.length) for span in spans] != [(i.offset, i.length) for i in prompt.images]:
        raise InferenceError(f"the engine's image placeholders are {str(spans)[:_SHOWN]}, rendered were others")


def _completion(choice: _Choice, expected: Expected) -> Completion:
    tokens = choice.token_ids
    logprobs = [entry.logprob for entry in choice.logprobs.content]
    if not 0 < len(tokens) <= (expected.max_tokens or _MAX_TOKENS) or len(logprobs) != len(tokens):
        raise InferenceError(
            f"answer has {len(tokens)} tokens and {len(logprobs)} logprobs, expected as many of both, from 1 to "
            f"{expected.max_tokens or _MAX_TOKENS}"
        )
    above = expected.vocab_size or MAX_VOCABULARY
    if (wrong := next((token for token in tokens if not 0 <= token < above), None)) is not None:
        raise InferenceError(f"answer has the token {wrong}, expected 0 to {above - 1}")
    if not expected.unsampleable.isdisjoint(tokens):
        raise InferenceError("answer has tokens that no policy may sample: the server must mask them")
    if (odd := next((p for p in logprobs if not math.isfinite(p) or p > _ROUNDING), None)) is not None:
        raise InferenceError(f"answer has the logprob {odd}, expected finite ones of at most 0")
    if choice.finish_reason not in ("stop", "length"):
        raise InferenceError(f"completion ended with {choice.finish_reason[:32]!r}, expected 'stop' or 'length'")
    return Completion(tokens, logprobs, _versions(choice.weight_versions, len(tokens)), choice.finish_reason)


def _versions(spans: Sequence[_Span] | None, length: int) -> list[int]:
    """The weight version of each token."""
    if not spans:
        return [0] * length
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    if [*starts, length] != [0, *ends] or starts != sorted(starts) or ends != sorted(ends):
        raise InferenceError(f"answer has versions of other tokens than its {length}")
    return [version for span in spans for version in [_version(span.version)] * (span.end - span.start)]


def _version(name: str) -> int:
    """A vLLM without the plugin calls the weights that it began with `default`."""
    if name == "default":
        return 0
    if not (name.isascii() and name.isdecimal()) or int(name) > _MAX_VERSION:
        raise InferenceError(f"answer has the weight version {name!r}, expected 0 to {_MAX_VERSION}")
    return int(name)
