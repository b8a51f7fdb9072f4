"""The fenced blocks of every page, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.files import ROOT

# Made by a program from a run.
_NOT_WRITTEN_BY_HAND = {"hunt-transcript.md"}
_FENCE = re.compile(
    r"^(?:<!-- tested: (?P<name>[^\n]+) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    name: str | None
    """Of the marker `<!-- tested: name -->` above it."""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    written = [path for path in (ROOT / "docs").rglob("*.md") if path.name not in _NOT_WRITTEN_BY_HAND]
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(written),
        *sorted((ROOT / "examples").glob("*/README.md")),
    ]


def blocks() -> Iterator[Block]:
    for page in pages():
        text = page.read_text()
        for found in _FENCE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(page, line, found["language"], found["text"], found["name"])


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments; a line may go on after a backslash."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words
