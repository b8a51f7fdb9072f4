"""A rollout made ready for its page: what became of it, its messages, its pictures' conditions, its tokens."""

import math
from dataclasses import dataclass
from typing import Self

from pointillist.runs.records import BranchRecord, RolloutRecord, SampledPiece
from pointillist.view.rollout import Fate, Message, ShownImage, conversation, fate_of
from pointillist.view.run import ViewedRun

_SHADES = 10


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token."""

    at: int
    text: str
    logprob: float

    @property
    def probability(self) -> float:
        """That the sampler gave it."""
        return math.exp(min(0.0, self.logprob))

    @property
    def shade(self) -> int:
        """Its probability in tenths: 0 is unlikely."""
        return min(_SHADES - 1, int(self.probability * _SHADES))


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a branch's tokens, for the strip: where from, how long, what."""

    offset: int
    length: int
    kind: str
    label: str


@dataclass(frozen=True, slots=True)
class ShownBranch:
    """One branch."""

    record: BranchRecord
    fate: Fate
    messages: list[Message]
    stretches: list[Stretch]
    conditions: dict[str | None, str]
    numbers: dict[int, int]
    """Of its pictures, from 1, by identity."""

    def condition(self, picture: ShownImage) -> str:
        """`good`, `missing` or `corrupt`."""
        return self.conditions[picture.name]

    def picture_number(self, picture: ShownImage) -> int:
        """Its number in the conversation, from 1."""
        return self.numbers[id(picture)]

    def tokens(self, piece: SampledPiece) -> list[Token]:
        """The tokens of a sampled piece."""
        pairs = zip(piece.texts, piece.logprobs, strict=False)
        return [Token(piece.offset + index, text, logprob) for index, (text, logprob) in enumerate(pairs)]


@dataclass(frozen=True, slots=True)
class ShownRollout:
    """One rollout."""

    record: RolloutRecord
    fate: Fate
    """Of its first branch, or of the whole if it has none."""
    branches: list[ShownBranch]

    @classmethod
    def of(cls, run: ViewedRun, record: RolloutRecord) -> Self:
        """Looks up what became of a rollout and of its pictures."""
        branches = [_branch(run, record, index) for index in range(len(record.branches))]
        fate = branches[0].fate if branches else fate_of(record, 0, [], run.trained_steps)
        return cls(record, fate, branches)


def _branch(run: ViewedRun, record: RolloutRecord, index: int) -> ShownBranch:
    branch = record.branches[index]
    messages = conversation(branch)
    pictures = [part for message in messages for part in message.parts if isinstance(part, ShownImage)]
    names = {picture.name for picture in pictures}
    return ShownBranch(
        branch,
        fate_of(record, index, run.faults(f"{record.id}.{index}"), run.trained_steps),
        messages,
        _stretches(branch),
        {name: run.condition(name) for name in names},
        {id(picture): number for number, picture in enumerate(pictures, start=1)},
    )


def _stretches(branch: BranchRecord) -> list[Stretch]:
    pictures = [
        Stretch(span.offset, span.length, "picture", f"picture {number}")
        for number, span in enumerate(branch.images, start=1)
    ]
    sampled = [Stretch(piece.offset, len(piece.texts), "sampled", "sampled") for piece in branch.sampled_pieces]
    return sorted([*pictures, *sampled], key=lambda stretch: stretch.offset)


def is_picture(part: object) -> bool:
    """Whether a message's part is a picture."""
    return isinstance(part, ShownImage)


def is_sampled(part: object) -> bool:
    """Whether a message's part is what the policy sampled."""
    return isinstance(part, SampledPiece)
