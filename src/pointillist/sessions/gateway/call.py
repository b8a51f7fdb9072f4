"""What the chat APIs have in common: a call that they are all read into, and the fields that several of them have."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from pointillist.config.sampling import MAX_SEQUENCE, MIN_TEMPERATURE
from pointillist.errors import RequestError, shown
from pointillist.render.raw import Message
from pointillist.sessions.session import Sampling

T = TypeVar("T")

MAX_STOP_TEXTS: Final = 64
MAX_STOP_CHARACTERS: Final = 4096
"""Of all stop texts of a request together."""
MAX_TOOLS: Final = 1024
MAX_TOOLS_BYTES: Final = 1024 * 1024
"""Of all specifications together, as JSON."""
MAX_METADATA_BYTES: Final = 64 * 1024
MAX_MESSAGES: Final = 10_000
MAX_NAME_CHARACTERS: Final = 512
"""Of the names of a model, a session or a response."""
_MIN_TOP_P: Final = 1e-6
"""Below it a float32 sum of probabilities may leave no token at all."""
_KINDS: Final = {str: "a text", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}

# Fields that change what is sampled, and the values of theirs that change nothing.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "audio": (),
    "prediction": (),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "web_search_options": (),
    "background": (False,),
    "conversation": (),
    "truncation": ("disabled",),
}
_NAMES: Final = frozenset({"model", "pointillist_session", "previous_response_id"})


@dataclass(slots=True)
class Call:
    """One request of any of the APIs."""

    messages: list[Message]
    """OpenAI chat shape; images as they came."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI chat shape."""
    model: str = ""
    n: int = 1
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    """Whether a stream ends with the token counts."""
    logprobs: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    session: str = ""
    """Key of the session, where the path does not name it."""
    images: int = 0
    """How many its body has."""
    previous: str | None = None
    """Id of the response that this one follows (Responses API)."""

    def sampling(self, base: Sampling) -> Sampling:
        """The session's sampling with what the call asks for.

        A temperature of 0 leaves the session's: agents that fix it would have nothing to be trained on. `max_tokens`
        can only shorten an answer.
        """
        return dataclasses.replace(
            base,
            temperature=self.temperature or base.temperature,
            top_p=base.top_p if self.top_p is None else self.top_p,
            top_k=base.top_k if self.top_k is None else self.top_k,
            max_tokens=min(base.max_tokens, self.max_tokens or base.max_tokens),
        )


def common(body: Mapping[str, Any], messages: list[Message], **fields: Any) -> Call:
    """A call with the fields that all APIs name alike.

    Raises:
        RequestError: 400: a field of the wrong type, or one that asks for what is not done here.
    """
    for name, values in _NEUTRAL.items():
        value = body.get(name)
        if value is not None and value not in values:
            raise RequestError(f"{name} = {shown(value)} is not supported", param=name, code="unsupported_parameter")
    _refuse_forced_tools(body.get("tool_choice"))
    tools = fields.get("tools", [])
    check_count(tools, "tools", MAX_TOOLS)
    _check_bytes(tools, "tools", MAX_TOOLS_BYTES)
    _check_bytes(optional(body, "metadata", dict) or {}, "metadata", MAX_METADATA_BYTES)
    seed = optional(body, "seed", int)  # not used: a session has its own
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise RequestError(f"seed is {shown(seed)}, expected an integer of 64 bits", param="seed")
    return Call(
        messages=messages,
        model=optional(body, "model", str) or "",
        session=optional(body, "pointillist_session", str) or "",
        stream=optional(body, "stream", bool) or False,
        temperature=_temperature(body),
        top_p=number(body, "top_p", _MIN_TOP_P, 1),
        **fields,
    )


def optional(body: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    """A field that may be absent or null.

    Raises:
        RequestError: 400: of another type, or a name that is too long.
    """
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name} is {shown(value)}, expected {_KINDS[kind]}", param=name)
    if name in _NAMES and isinstance(value, str) and len(value) > MAX_NAME_CHARACTERS:
        raise RequestError(f"{name} has {len(value)} characters, expected at most {MAX_NAME_CHARACTERS}", param=name)
    return value


def message_list(body: Mapping[str, Any], name: str) -> list[Any]:
    """A list of messages.

    Raises:
        RequestError: 400: absent, of another type, or too long.
    """
    value = optional(body, name, list)
    if value is None:
        raise RequestError(f"{name} is missing, expected a list", param=name)
    check_count(value, name, MAX_MESSAGES)
    return value


def check_count(values: Sequence[object], name: str, most: int) -> None:
    """Checks how many entries a list has.

    Raises:
        RequestError: 400: too many.
    """
    if len(values) > most:
        raise RequestError(f"{name} has {len(values)} entries, expected at most {most}", param=name)


def _check_bytes(value: object, name: str, most: int) -> None:
    if (size := len(msgspec.json.encode(value))) > most:
        raise RequestError(f"{name} has {size} bytes, expected at most {most}", param=name)


def number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    """A number that may be absent or null.

    Raises:
        RequestError: 400: not a number, or out of range.
    """
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} is {shown(value)}, expected a number from {low:g} to {high:g}", param=name)
    return float(value)


def _temperature(body: Mapping[str, Any]) -> float | None:
    """0 or a temperature that logits can be divided by (`config.sampling`)."""
    value = number(body, "temperature", 0, 2)
    if value is not None and 0 < value < MIN_TEMPERATURE:
        raise RequestError(f"temperature is {value:g}, expected 0 or {MIN_TEMPERATURE:g} to 2", param="temperature")
    return value


def positive(body: Mapping[str, Any], name: str, high: int = MAX_SEQUENCE) -> int | None:
    """A count that may be absent or null.

    Args:
        body: Of the request.
        name: Of the field.
        high: Largest value.

    Raises:
        RequestError: 400: not an integer from 1 to `high`.
    """
    value = optional(body, name, int)
    if value is not None and not 1 <= value <= high:
        raise RequestError(f"{name} is {shown(value)}, expected an integer from 1 to {high}", param=name)
    return value


def stop_texts(body: Mapping[str, Any], name: str) -> list[str]:
    """Texts that end an answer: a string or a list of them.

    Raises:
        RequestError: 400: something else, an empty text, or more of them than are looked for.
    """
    value = body.get(name)
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"{name} must be a text or a list of texts, none of them empty", param=name)
    if len(texts) > MAX_STOP_TEXTS or sum(map(len, texts)) > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"{name} has {len(texts)} texts of {sum(map(len, texts))} characters together, expected at most "
            f"{MAX_STOP_TEXTS} of {MAX_STOP_CHARACTERS}",
            param=name,
        )
    return texts


def _refuse_forced_tools(choice: Any) -> None:
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    if kind not in (None, "auto", "none"):
        raise RequestError(
            f"tool_choice {shown(choice)} is not supported, expected 'auto' or 'none': nothing forces the policy",
            param="tool_choice",
            code="unsupported_parameter",
        )
