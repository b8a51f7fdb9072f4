"""Logging of every process: one format, to standard error; the launcher puts it into a file."""

import logging


def set_up_logging(level: str) -> None:
    """Sends logs of `pointillist` at `level` and of libraries at WARNING to standard error."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("pointillist").setLevel(level.upper())
