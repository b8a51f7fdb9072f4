"""One rollout as a page: the conversation with its pictures in their places."""

import json
import re
from pathlib import Path
from urllib.parse import quote

from pointillist.base.image_limits import ImageLimits
from pointillist.base.logs import plain
from pointillist.errors import PointillistError, RefError
from pointillist.images.store import read_intact
from pointillist.runs.image_dir import image_dir_of, limits_of
from pointillist.runs.paths import RunPaths
from pointillist.runs.records import RolloutRecord, file_of, read_rollouts
from pointillist.view.rollout import ShownImage, messages_of

_ROLES = ("system", "developer", "user", "assistant", "tool")


def write_transcript(run: Path, rollout_id: str, page: Path) -> int:
    """Writes a rollout as Markdown, its pictures beside the page.

    Args:
        run: The run's folder.
        rollout_id: `<step>.<group>.<member>`, as in `rollouts.jsonl`.
        page: File to write; pictures go to a folder of its name without the suffix, or with `_pictures` behind it if
            it has none.

    Returns:
        How many pictures were written.

    Raises:
        PointillistError: No such rollout, or one of its pictures is not there or not what its name says.
    """
    paths = RunPaths(run.resolve())
    record = _record(paths, rollout_id)
    root, limits = image_dir_of(paths), limits_of(paths)
    pictures = page.with_suffix("") if page.suffix else page.with_name(f"{page.name}_pictures")
    lines = _head(record)
    count = 0
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for number, branch in enumerate(record.branches):
            if len(record.branches) > 1:
                lines += [f"## Branch {number}", ""]
            for message in messages_of(branch):
                lines.append(f"**{message.role}**" if message.role in _ROLES else _code(message.role))
                for part in message.parts:
                    if isinstance(part, ShownImage):
                        name = _copy(part.name, root, limits, pictures, count)
                        lines += ["", f"![picture {count}]({quote(pictures.name)}/{name})"]
                        count += 1
                    elif isinstance(part, str):
                        lines += ["", *_block(part)]
                for call in message.calls:
                    lines += ["", *_block(f"{call.name}({_on_one_line(call.arguments)})")]
                lines.append("")
        page.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    except OSError as error:
        raise PointillistError(f"{page} cannot be written ({error})") from None
    return count


def _record(paths: RunPaths, rollout_id: str) -> RolloutRecord:
    path = file_of(paths, rollout_id)
    for record in read_rollouts(path) if path is not None else ():
        if record.id == rollout_id:
            return record
    expected = "<step>.<group>.<member> or eval_<version>.<index>"
    raise PointillistError(f"run {paths.output_dir} has no rollout {rollout_id!r}, expected {expected}")


def _head(record: RolloutRecord) -> list[str]:
    result = "no reward" if record.reward is None else f"reward {record.reward:g}"
    lines = [f"# Rollout {_code(record.id)}", "", f"Task {_code(record.task)}, {result}.", ""]
    if record.answer is not None:
        lines += ["**expected answer**", "", *_block(record.answer), ""]
    if record.error is not None:
        said = f"{record.error.kind}: {record.error.message}\n{record.error.traceback}".rstrip()
        lines += ["**failed**", "", *_block(said), ""]
    return lines


def _on_one_line(arguments: str) -> str:
    """Arguments of a call, which are what the model wrote if they are not JSON."""
    try:
        return json.dumps(json.loads(arguments))
    except (ValueError, RecursionError):
        return arguments


def _block(text: str) -> list[str]:
    """Lines of a code block that its text cannot close, whatever it says."""
    text = plain(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return [fence, text, fence]


def _code(text: str) -> str:
    """Text within a line, as code that it cannot close."""
    text = " ".join(plain(text).split())
    ticks = "`" * (_longest_run(text) + 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _copy(name: str | None, root: Path, limits: ImageLimits, folder: Path, number: int) -> str:
    """Copies a picture of the run's store; a record can name no other file."""
    if name is None:
        raise RefError(f"picture {number} is not an image under an allowed root")
    target = folder / f"{number}{Path(name).suffix}"
    target.write_bytes(read_intact(root, name, limits))
    return target.name
