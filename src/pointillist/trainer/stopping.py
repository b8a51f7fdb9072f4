"""A trainer that is told to stop: SIGINT or SIGTERM is remembered, and obeyed between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOPPED: Final = 128 + signal.SIGTERM
"""Exit code of a trainer that was told to stop, and has saved what it had done."""


class Stop:
    """Whether this process was told to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False
        """Whether a signal ends the process where it is: there is nothing to save yet."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside it, SIGINT and SIGTERM are requests to stop; only the main thread may enter."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        # A second signal changes nothing: the launcher and torchrun may each send one.
        self.asked = True
        if self.at_once:
            raise SystemExit(STOPPED)
