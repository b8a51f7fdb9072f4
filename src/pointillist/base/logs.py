"""Logging of every process: one format, to standard error; the launcher puts it into a file.

What a model or an environment said may stand in a message, and a terminal obeys control characters, so none of them
gets into a log or onto a terminal: `plain` takes them out of everything that is printed.
"""

import logging
from typing import Final

_UNSEEN: Final = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    # The upper control characters, and those that turn the direction of text around.
    **dict.fromkeys(
        [*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)],
        "\N{REPLACEMENT CHARACTER}",
    ),
    # Halves of a character, which no terminal's encoding has.
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


def plain(text: str) -> str:
    """Text without anything that a terminal would obey; what was taken out can be seen."""
    return text.translate(_UNSEEN)


class _PlainFormatter(logging.Formatter):
    """Formats a record, its traceback included, without anything that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def set_up_logging(level: str) -> None:
    """Sends logs of `pointillist` at `level` and of libraries at WARNING to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pointillist").setLevel(level.upper())
