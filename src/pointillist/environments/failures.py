"""What went wrong in a rollout, safe to log, to send and to keep: bounded, printable, UTF-8.

An environment may raise anything: an error whose text is 5 MB or not UTF-8, whose `__str__` raises, or a group of
errors of any depth. Nothing here raises because of it.
"""

import json
import re
import traceback
from pathlib import Path
from typing import Final

import msgspec

_HERE: Final = str(Path(__file__).parent)
_KIND_CHARACTERS: Final = 80
_MESSAGE_CHARACTERS: Final = 2_000
_ANSWER_CHARACTERS: Final = 2_000
_FRAMES: Final = 20
_TRACEBACK_LINES: Final = 120
_LINE_CHARACTERS: Final = 400


class RolloutFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rollout failed."""

    kind: str
    """Type of the exception; letters, digits and underscores."""
    message: str
    permanent: bool
    """It would fail again."""
    by_policy: bool = False
    """What the policy did made it fail: it counts in its group, with `orchestrator.failed_reward`."""
    traceback: str = ""


def failure_of(error: BaseException, *, permanent: bool = False, by_policy: bool = False) -> RolloutFailure:
    """The failure that an exception is.

    Args:
        error: Whatever was raised.
        permanent: Whether it would be raised again.
        by_policy: Whether what the policy did made it happen.
    """
    return RolloutFailure(
        kind=kind_of(error),
        message=message_of(error),
        permanent=permanent,
        by_policy=by_policy,
        traceback=_traceback_of(error),
    )


def kind_of(error: BaseException) -> str:
    """The name of an exception's type, fit to be part of a metric's name."""
    return re.sub(r"\W", "_", type(error).__name__, flags=re.ASCII)[:_KIND_CHARACTERS]


def message_of(error: BaseException) -> str:
    """The text of an exception; of a group also that of the first exception in it."""
    text = printable(error, _MESSAGE_CHARACTERS)
    first = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return text if first is error else f"{text}: {kind_of(first)}: {printable(first, _MESSAGE_CHARACTERS)}"


def printable(value: object, limit: int) -> str:
    r"""The text of anything: at most `limit` characters of it, others than newline and tab escaped as `\x1b`."""
    try:
        text = str(value)
    except BaseException:  # __str__ is the environment's code
        return f"<{kind_of(value)} without a text>" if isinstance(value, BaseException) else "<without a text>"
    if len(text) > limit:
        text = f"{text[:limit]} ... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def answer_text(answer: object) -> str | None:
    """A task's expected answer as records keep it; what is no text becomes JSON, as far as it can."""
    if answer is None or isinstance(answer, str):
        return None if answer is None else printable(answer, _ANSWER_CHARACTERS)
    try:
        return printable(json.dumps(answer, ensure_ascii=False, default=str), _ANSWER_CHARACTERS)
    except BaseException:  # keys that are no texts, cycles; __str__ is the environment's code
        return printable(answer, _ANSWER_CHARACTERS)


def own_frames(error: BaseException) -> str:
    """The lines of a traceback that lie in no machinery of imports and not in Pointillist itself; may be empty."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen", _HERE)) and "importlib" not in frame.filename
    ]
    return _bounded("".join(traceback.format_list(frames[-_FRAMES:])))


def _traceback_of(error: BaseException) -> str:
    try:
        return _bounded("".join(traceback.format_exception(error, limit=-_FRAMES)))
    except BaseException:  # groups nested deeper than the interpreter's stack, a __str__ that exits
        return ""


def _bounded(text: str) -> str:
    """Its first and last lines, each cut: an error's text stands in the traceback once more."""
    lines = [printable(line, _LINE_CHARACTERS) for line in text.splitlines()]
    if len(lines) > _TRACEBACK_LINES:
        half = _TRACEBACK_LINES // 2
        lines = [*lines[:half], f"... ({len(lines) - 2 * half:,} lines)", *lines[-half:]]
    return "\n".join(lines)
