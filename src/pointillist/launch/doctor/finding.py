"""What a check found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the table."""

    what: str
    state: State
    """`absent`: an optional library that is not there; `problem`: a run would end with it."""
    text: str
    """What was found and, unless it is ok, what to do."""
