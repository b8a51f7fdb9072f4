"""What a rollout's record shows: the conversation, the sampled tokens, and what the trainer did with it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from pointillist.base.json_types import JsonObject
from pointillist.runs.records import BranchRecord, Fault, ImageSpan, RolloutRecord, SampledPiece, name_in_store


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
        branch: Index of the branch; each is one sample. A record may have none.
        faults: The trainer's faults with this sample.
        trained_steps: Steps that the trainer has finished.
    """
    if record.error is not None and record.outcome not in _COUNTED:
        return Fate("dropped", f"failed for good: {record.error.kind}: {record.error.message}")
    if record.outcome in _UNUSED:
        return _UNUSED[record.outcome]
    if branch < len(record.branches) and record.branches[branch].overlong:
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
class ShownImage:
    """An image at its place in a conversation."""

    name: str | None
    """Its name in the store; None for a reference that names no stored image."""
    span: ImageSpan | None
    """The tokens that stand for it; None if it is in none of the branch's spans."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the policy made."""

    name: str
    arguments: str
    """As the policy wrote them: JSON, if it did as it was asked."""

    @property
    def indented(self) -> str:
        """The arguments over several lines, if they are JSON."""
        try:
            return msgspec.json.format(self.arguments)
        except (msgspec.DecodeError, RecursionError, ValueError):
            return self.arguments


@dataclass(slots=True)
class Message:
    """A message as it is shown: parts in order, each a text, an image, or the sampled tokens of an answer."""

    role: str
    parts: list[str | ShownImage | SampledPiece] = field(default_factory=list)
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def conversation(branch: BranchRecord) -> list[Message]:
    """The messages of a branch, with images matched to their token spans and answers to their sampled tokens."""
    messages = messages_of(branch)
    # From the end: answers that are shared with an earlier branch, or were given by the environment, come first.
    answers = [message for message in messages if message.role == "assistant"][::-1]
    for message, piece in zip(answers, branch.sampled_pieces[::-1], strict=False):
        said = "".join(part for part in message.parts if isinstance(part, str))
        if said.strip() in "".join(piece.texts):
            message.parts = [piece]
    return messages


def messages_of(branch: BranchRecord) -> list[Message]:
    """The messages of a branch as texts and images; what has another shape than a chat message is shown as JSON."""
    spans = iter(branch.images)
    return [_message(each, spans) for each in branch.messages]


def _message(raw: JsonObject, spans: Iterator[ImageSpan]) -> Message:
    message = Message(_text(raw.get("role", "")))
    content = raw.get("content")
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            message.parts += [part] if part else []
        elif isinstance(part, dict) and part.get("type") == "image_url":
            message.parts.append(_image(part, spans))
        elif isinstance(part, dict) and part.get("text"):
            message.parts.append(_text(part["text"]))
    message.reasoning = _text(raw.get("reasoning_content") or "")
    calls = raw.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            message.calls.append(ToolCall(_text(function.get("name")), _text(function.get("arguments"))))
        else:
            message.calls.append(ToolCall("(no function)", _text(call)))
    return message


def _text(value: object) -> str:
    """A text as it is; anything else that stands in its place as JSON."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, RecursionError, OverflowError, TypeError, ValueError):
        return "(cannot be shown)"


def _image(part: Mapping[str, object], spans: Iterator[ImageSpan]) -> ShownImage:
    url = part.get("image_url")
    name = name_in_store(url.get("url") if isinstance(url, dict) else url)
    span = next(spans, None)
    known = span is not None and name is not None and span.hash == Path(name).stem
    return ShownImage(name, span if known else None)
