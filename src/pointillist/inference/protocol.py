"""The inference wire: field names and meanings are those of vLLM's `/inference/v1/generate`.

Whatever a client sends that this server would silently treat otherwise is refused by name instead. Every type is exact,
so that a body with something else in it is refused where it begins, and every number has both bounds.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, ClassVar, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from pointillist.base.json_types import JsonObject
from pointillist.config.sampling import BOUNDS, MAX_SEQUENCE, MAX_STOP_TOKEN_IDS, check_sampling_number
from pointillist.errors import FieldError, RequestError
from pointillist.refs import MMImageRef

_MAX_PATH: Final = 4096

RequestId = Annotated[str, Meta(pattern=r"^[!-~]{1,256}\Z")]
"""Printable ASCII: it stands in logs and answers."""
_Name = Annotated[str, Meta(max_length=_MAX_PATH)]


class PlaceholderRange(Struct, forbid_unknown_fields=True, frozen=True):
    """Where an image's placeholder tokens lie in the prompt."""

    offset: Annotated[int, Meta(ge=0, le=MAX_SEQUENCE)]
    length: Annotated[int, Meta(gt=0, le=MAX_SEQUENCE)]


class OfImages(Struct, forbid_unknown_fields=True, frozen=True):
    """One string an image. None is kept, so that the error can say what was expected of that image."""

    image: list[str | None] = []


class Placeholders(Struct, forbid_unknown_fields=True, frozen=True):
    """One range an image."""

    image: list[PlaceholderRange] = []

    @classmethod
    def of(cls, images: Sequence[MMImageRef]) -> "Placeholders":
        """The ranges of a prompt's images."""
        return cls([PlaceholderRange(image.offset, image.length) for image in images])


class MultiModalFeatures(Struct, forbid_unknown_fields=True, frozen=True):
    """The images of a prompt; lists are parallel, one entry an image, in token order."""

    mm_hashes: OfImages
    mm_placeholders: Placeholders
    kwargs_data: OfImages | None = None
    """`mmraw:` references; that they are is checked where each can be named in the error."""


class ContentPart(Struct, frozen=True):
    """An image by its URL."""

    type: str | None = None
    url: str | None = None


class _Nothing(Struct, forbid_unknown_fields=True, frozen=True):
    """`{}`."""


class SamplingParams(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How to sample; names and defaults are vLLM's, bounds are those of `config.sampling`."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 are all."""
    max_tokens: int | None = None
    """None is as many as fit."""
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOP_TOKEN_IDS)] = []
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    """Choice i is sampled with seed + i."""
    logprobs: int | None = None
    """Likeliest tokens to report beside the sampled one; None reports nothing."""

    # Parameters that clients of vLLM send with these values, which change nothing; no others are served.
    min_p: float | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: list[str] | str | None = None
    bad_words: list[str] | None = None
    logit_bias: _Nothing | None = None
    prompt_logprobs: None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "min_p": (0, None),
        "min_tokens": (0, None),
        "presence_penalty": (0, None),
        "frequency_penalty": (0, None),
        "repetition_penalty": (1, None),
        "stop": ([], None),
        "bad_words": ([], None),
    }

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            FieldError: One is out of bounds, or asks for what is not served.
        """
        _check_numbers(lambda name: getattr(self, name))
        for name, neutral in self.NEUTRAL.items():
            if getattr(self, name) not in neutral:
                raise FieldError(f"{name} is not served, expected {neutral[0]} or nothing", param=name)


def check_params(params: Mapping[str, object]) -> None:
    """Checks the numbers among vLLM's sampling parameters, for which vLLM has bounds of its own, or none.

    Args:
        params: As they came: vLLM silently changes some of them (a temperature of 0.001, a seed of -1).

    Raises:
        RequestError: 400: one is out of bounds.
    """
    try:
        _check_numbers(params.get)
    except FieldError as error:
        raise RequestError(str(error), param=f"sampling_params.{error.param}") from None


def _check_numbers(value_of: Callable[[str], object]) -> None:
    for name in BOUNDS:
        value = value_of(name)
        if isinstance(value, list) and len(value) > MAX_STOP_TOKEN_IDS:
            raise FieldError(f"{name} is a list of {len(value)}, expected at most {MAX_STOP_TOKEN_IDS}", param=name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            check_sampling_number(name, number)


class PromptFields(Struct, frozen=True, kw_only=True):
    """The part of a request that says what is read; other fields are somebody else's."""

    token_ids: Annotated[list[int], Meta(min_length=1)]
    """With `content_parts` the logical stream, one placeholder an image; else the effective one."""
    features: MultiModalFeatures | None = None
    content_parts: list[ContentPart] | None = None
    """`{"type": "image_url", "url": "file://..."}` for every image, in token order."""
    request_id: RequestId | None = None


class GenerateRequest(PromptFields, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One prompt and how to sample."""

    model: _Name | None = None
    sampling_params: SamplingParams = SamplingParams()
    stream: bool | None = False
    return_token_ids: bool | None = None
    cache_salt: _Name | None = None
    """Accepted and not needed: nothing is cached between requests."""
    priority: Literal[0] = 0

    def __post_init__(self) -> None:
        """Refuses streaming.

        Raises:
            FieldError: It is asked for.
        """
        if self.stream:
            raise FieldError("stream is not served, expected false", param="stream")


class LogProb(Struct):
    """One candidate token."""

    token_id: int
    logprob: float
    rank: int


class LogProbsContent(LogProb):
    """The sampled token at one position and its likeliest alternatives."""

    top_logprobs: list[LogProb] = []


class LogProbs(Struct):
    """Per sampled token."""

    content: list[LogProbsContent]


class WeightVersionSpan(Struct):
    """Output tokens `[start, end)` were sampled by the weights of this version."""

    version: str
    start: int
    end: int


class Choice(Struct):
    """One completion."""

    index: int
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | None
    token_ids: list[int]
    logprobs: LogProbs | None
    weight_versions: list[WeightVersionSpan]


class Usage(Struct):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateResponse(Struct):
    """All completions of one prompt."""

    request_id: str
    model: str
    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    mm_placeholders: Placeholders | None = None


BodyT = TypeVar("BodyT", bound=Struct)

_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")


def decode_body(data: bytes, type: type[BodyT]) -> BodyT:
    """A request's body.

    Raises:
        RequestError: 400: not JSON, or not of the wire's shape; `param` says where.
    """
    with _refusing():
        return msgspec.json.decode(data, type=type)


def decode_open_body(data: bytes, type: type[BodyT]) -> tuple[BodyT, JsonObject]:
    """A request's body of which only some fields are ours, and the whole of it as JSON values.

    Raises:
        RequestError: 400: as `decode_body`.
    """
    with _refusing():
        body = msgspec.json.decode(data)
        return msgspec.convert(body, type), body


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns what msgspec raises into a 400."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise _malformed(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"body is not JSON ({str(error)[:200]})") from None


def _malformed(error: msgspec.ValidationError) -> RequestError:
    """The 400 for what msgspec says, such as "Expected `int`, got `str` - at `$.token_ids[0]`".

    Where it is stands nowhere but in the text; a validator of ours names its field.
    """
    message, _, path = str(error).partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    unknown, missing = _UNKNOWN.match(message), _MISSING.match(message)
    if unknown is not None and where in ("features.mm_hashes", "features.mm_placeholders", "features.kwargs_data"):
        message = f"{where} has modality {unknown[1][:32]!r}, expected 'image'"
    elif unknown is not None:
        where = ".".join(filter(None, (where, unknown[1][:64])))
        message = f"{where}: no such parameter"
    else:
        field = missing[1] if missing else error.__cause__.param if isinstance(error.__cause__, FieldError) else None
        where = ".".join(filter(None, (where, field)))
        message = f"{where or 'body'}: {message}"
    type = "invalid_mm_image_ref" if where.startswith("features") else None
    return RequestError(message, type=type, param=where or None)
