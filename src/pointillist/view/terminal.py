"""`pointillist view RUN --text`: one rollout in the terminal, for a look over ssh.

What a model said is untrusted here too: a terminal obeys control characters, so none of them gets through.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pointillist.base.logs import plain
from pointillist.errors import ImageError, MissingImageError, PointillistError, RefError
from pointillist.images.store import read_stored
from pointillist.runs.records import RolloutRecord, SampledPiece
from pointillist.view.index import cache_dir
from pointillist.view.queries import best_of_last_step
from pointillist.view.rollout import Message, ShownImage, conversation, fate_of
from pointillist.view.run import ViewedRun
from pointillist.view.terminal_images import half_blocks, kitty, sixel
from pointillist.view.thumbnails import shrunk

_ROLES: Final = {"user": "blue", "assistant": "dark_orange3", "tool": "green"}
_PICTURE_PIXELS: Final = 320
_BLOCK_COLUMNS: Final = 40


def show_rollout(folder: Path, rollout_id: str | None, images: str, console: Console | None = None) -> None:
    """Prints a rollout.

    Args:
        folder: The run's folder.
        rollout_id: Id of the rollout; None is the best one of the last step.
        images: Protocol by which pictures are drawn: `kitty`, `sixel`, `blocks`, `none`, or `auto`, which
            decides by the terminal's variables.
        console: Console that the rollout is printed on.

    Raises:
        PointillistError: There is no run or no such rollout.
    """
    console = console or Console()
    run = ViewedRun(folder, cache_dir())
    if rollout_id is None:
        run.index.update()
        rollout_id = best_of_last_step(run)
    record = run.index.record(rollout_id) if rollout_id is not None else None
    if record is None:
        raise PointillistError(f"run {folder} has no rollout {plain(rollout_id or 'at all')}")
    way = protocol(os.environ, is_terminal=console.is_terminal) if images == "auto" else images
    _print_facts(console, run, record)
    for index, branch in enumerate(record.branches):
        fate = fate_of(record, index, run.faults(f"{record.id}.{index}"), run.trained_steps)
        console.print(Text(plain(f"branch {index}: {fate.word}: {fate.why}"), style="bold"))
        for message in conversation(branch):
            _print_message(console, run, message, way)


def protocol(environ: Mapping[str, str], *, is_terminal: bool) -> str:
    """How a terminal with these variables can draw pictures: `kitty`, `sixel`, `blocks` or `none`."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if not is_terminal or term in ("", "dumb"):
        return "none"
    if "TMUX" not in environ and "STY" not in environ:  # a multiplexer swallows them
        if "KITTY_WINDOW_ID" in environ or "kitty" in term or program in ("ghostty", "WezTerm"):
            return "kitty"
        if "sixel" in term or term.startswith(("foot", "mlterm", "contour", "yaft")) or program == "mintty":
            return "sixel"
    return "blocks" if environ.get("COLORTERM") in ("truecolor", "24bit") or "256color" in term else "none"


def _print_facts(console: Console, run: ViewedRun, record: RolloutRecord) -> None:
    table = Table(show_header=False, box=None, title=Text(f"rollout {plain(record.id)} of {plain(run.name)}"))
    reward = "none" if record.reward is None else f"{record.reward:g}"
    advantage = "none" if record.advantage is None else f"{record.advantage:+.3g}"
    for name, value in (
        ("task", record.task),
        ("expected answer", record.answer or ""),
        ("environment", record.env),
        ("reward, advantage", f"{reward}, {advantage}"),
        ("turns", str(record.turns)),
        ("error", f"{record.error.kind}: {record.error.message}" if record.error else ""),
        ("traceback", record.error.traceback if record.error else ""),
    ):
        if value:
            table.add_row(name, Text(plain(value)))
    console.print(table)


def _print_message(console: Console, run: ViewedRun, message: Message, way: str) -> None:
    console.rule(Text(plain(message.role), style=_ROLES.get(message.role, "")), align="left")
    if message.reasoning:
        console.print(Text(plain(message.reasoning), style="dim"))
    for part in message.parts:
        if isinstance(part, ShownImage):
            _print_picture(console, run, part, way)
        else:
            console.print(_sampled(part) if isinstance(part, SampledPiece) else Text(plain(part)))
    for call in message.calls:
        console.print(Text(f"tool call {plain(call.name)} {plain(call.indented)}", style="italic"))


def _sampled(piece: SampledPiece) -> Text:
    """What the policy sampled; the less likely a token was, the more it stands out."""
    text = Text()
    for token, logprob in zip(piece.texts, piece.logprobs, strict=False):
        probability = math.exp(min(0.0, logprob))
        style = "" if probability >= 0.5 else "underline" if probability >= 0.1 else "bold underline red"
        text.append(plain(token), style)
    return text


def _print_picture(console: Console, run: ViewedRun, picture: ShownImage, way: str) -> None:
    condition = run.condition(picture.name)
    where = f"tokens {picture.span.offset} to {picture.span.offset + picture.span.length - 1}" if picture.span else ""
    if picture.name is None or run.image_dir is None or condition != "good":
        console.print(Text(f"[picture: {condition}] {where}", style="red"))
        return
    console.print(Text(plain(f"[picture: {run.image_dir / picture.name}] {where}"), style="dim"), soft_wrap=True)
    if way == "none":
        return
    try:
        image = shrunk(read_stored(run.image_dir, picture.name, run.limits), run.limits, _PICTURE_PIXELS)
    except (MissingImageError, RefError, ImageError) as error:
        console.print(Text(plain(str(error)), style="red"))
        return
    if way == "blocks":
        console.print(half_blocks(image, min(_BLOCK_COLUMNS, console.width)))
        return
    # Not through rich, which would count the escape sequence as text.
    console.file.write((kitty(image) if way == "kitty" else sixel(image)) + "\n")
    console.file.flush()
