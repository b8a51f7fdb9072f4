"""A rollout's record, typed, and what can be told of it: its conversation, its tokens, what the trainer did with it.

Records of older runs lack what was not recorded yet; every field but `id` has a default, and a conversation is shown
with what there is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec

from pointillist.images.store import sha256_in
from pointillist.runs.paths import number_of
from pointillist.upkeep.references import name_in_store

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""What a script of a page and SQLite hold as a whole number."""
_Name = Annotated[str, msgspec.Meta(max_length=1000)]


class Span(msgspec.Struct):
    """An image in a branch's tokens."""

    hash: _Name
    offset: _Count
    length: _Count
    item: dict[str, Any] = {}

    @property
    def name(self) -> str | None:
        """`<hh>/<sha256>.<ext>` in the store."""
        return name_in_store(self.item.get("raw_image_uri"))


class Piece(msgspec.Struct):
    """A stretch of tokens that the policy sampled."""

    offset: _Count
    texts: list[str]
    logprobs: list[float]


class BranchRecord(msgspec.Struct):
    """A token stream of a rollout."""

    tokens: _Count = 0
    sampled: _Count = 0
    overlong: bool = False
    sampled_pieces: list[Piece] = []
    messages: list[dict[str, Any]] = []
    images: list[Span] = []


class ErrorRecord(msgspec.Struct):
    """Why a rollout failed."""

    kind: _Name
    message: str
    traceback: str = ""


class RolloutRecord(msgspec.Struct):
    """A line of `rollouts.jsonl`."""

    id: _Name
    group: _Name = ""
    split: _Name = "train"
    env: _Name = ""
    task: str = ""
    answer: str | None = None
    reward: float | None = None
    advantage: float | None = None
    outcome: _Name = ""
    error: ErrorRecord | None = None
    turns: _Count = 0
    versions: tuple[_Count, _Count] | None = None
    branches: list[BranchRecord] = []

    def __post_init__(self) -> None:
        self.group = self.group or self.id.rpartition(".")[0]
        if number_of(prefix := self.id.partition(".")[0].removeprefix("eval_")) is None and prefix.isdecimal():
            raise ValueError("id has a step that is no number of at most 15 digits")
        self.outcome = self.outcome or ("zero_variance" if self.advantage is None else "sent")

    @property
    def step(self) -> int:
        """Optimiser step, or weight version of the evaluation."""
        return number_of(self.id.partition(".")[0].removeprefix("eval_")) or 0


class Fault(msgspec.Struct):
    """A line of `faults.jsonl`."""

    kind: str
    step: int
    sample_id: str
    sha256: str
    message: str


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a rollout or of one of its branches, in a word and a sentence."""

    word: str
    why: str


_UNUSED: Final[dict[str, Fate]] = {
    "zero_variance": Fate("not trained", "all rollouts of its group have the same reward: nothing to compare"),
    "alone": Fate("not trained", "all other rollouts of its group failed: nothing to compare with"),
    "evaluated": Fate("evaluated", "a held-out task, never trained on"),
}


_COUNTED: Final = ("sent", "zero_variance", "alone")
"""Outcomes of a rollout that counts in its group, even if it failed."""


def fate_of(record: RolloutRecord, branch: int, faults: list[Fault], trained_steps: int) -> Fate:
    """What the trainer did with a branch of a rollout.

    Args:
        record: The rollout.
        branch: Index of the branch; each is one sample.
        faults: The trainer's faults with this sample.
        trained_steps: Steps that the trainer has finished.
    """
    if record.error is not None and record.outcome not in _COUNTED:
        return Fate("dropped", f"failed for good: {record.error.kind}: {record.error.message}")
    if record.outcome in _UNUSED:
        return _UNUSED[record.outcome]
    if record.branches[branch].overlong:
        return Fate("dropped", f"{record.branches[branch].tokens} tokens are more than seq_len; a sample is never cut")
    if corrupt := [fault for fault in faults if fault.kind == "corrupt"]:
        return Fate("quarantined", f"no loss: {corrupt[0].message}")
    if faults:
        return Fate("zeroed", f"no loss: {faults[0].message}")
    if record.step > trained_steps:
        return Fate("waiting", "sent to the trainer, whose step is not finished")
    failed = "" if record.error is None else f", as a rollout that failed by what the policy did ({record.error.kind})"
    return Fate("trained", f"in step {record.step}{failed}")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture at its place in a conversation."""

    name: str | None
    """In the store; None for a reference that names no stored image."""
    span: Span | None
    """The tokens that stand for it; None if it is in none of the branch's spans."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the policy made."""

    name: str
    arguments: str


@dataclass(slots=True)
class Message:
    """A message as it is shown: parts in order, each a text, a picture, or the sampled tokens of an answer."""

    role: str
    parts: list[str | Picture | Piece] = field(default_factory=list)
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def conversation(branch: BranchRecord) -> list[Message]:
    """The messages of a branch, with pictures matched to their token spans and answers to their sampled tokens."""
    spans = iter(branch.images)
    messages = [_message(each, spans) for each in branch.messages]
    # From the end: answers that are shared with an earlier branch, or were given by the environment, come first.
    answers = [message for message in messages if message.role == "assistant"][::-1]
    for message, piece in zip(answers, branch.sampled_pieces[::-1], strict=False):
        said = "".join(part for part in message.parts if isinstance(part, str))
        if said.strip() in "".join(piece.texts):
            message.parts = [piece]
    return messages


def _message(raw: Mapping[str, Any], spans: Any) -> Message:
    message = Message(_text(raw.get("role", "")))
    content = raw.get("content")
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            message.parts += [part] if part else []
        elif isinstance(part, dict) and part.get("type") == "image_url":
            message.parts.append(_picture(part, spans))
        elif isinstance(part, dict) and part.get("text"):
            message.parts.append(_text(part["text"]))
    message.reasoning = _text(raw.get("reasoning_content") or "")
    calls = raw.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            message.calls.append(ToolCall(_text(function.get("name")), _pretty(function.get("arguments"))))
        else:
            message.calls.append(ToolCall("(no function)", _pretty(call)))
    return message


def _text(value: Any) -> str:
    """A text as it is; anything else that stands in its place as JSON."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, RecursionError, OverflowError, TypeError, ValueError):
        return "(cannot be shown)"


def _picture(part: Mapping[str, Any], spans: Any) -> Picture:
    url = part.get("image_url")
    name = name_in_store(url.get("url") if isinstance(url, dict) else url)
    span = next(spans, None)
    return Picture(name, span if span is not None and name is not None and span.hash == sha256_in(name) else None)


def _pretty(arguments: Any) -> str:
    """Arguments of a tool call, indented if they are the JSON that they should be."""
    text = _text(arguments)
    try:
        return msgspec.json.format(text)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return text
