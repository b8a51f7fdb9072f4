"""One rollout as a page: the conversation with its pictures in their places."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pointillist.base.image_limits import STORED_LIMITS
from pointillist.base.jsonl import read_jsonl
from pointillist.base.logs import plain
from pointillist.errors import PointillistError
from pointillist.images.store import read_verified, stored_name
from pointillist.runs.paths import RunPaths
from pointillist.upkeep.references import file_of, image_dir_of

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
    record = _record(run, rollout_id)
    try:
        return _write(record, run, page)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PointillistError(f"the record of rollout {rollout_id!r} is damaged ({error!r})") from None
    except OSError as error:
        raise PointillistError(f"{page} cannot be written ({error})") from None


def _write(record: dict[str, Any], run: Path, page: Path) -> int:
    root = image_dir_of(RunPaths(run.resolve()))
    pictures = page.with_suffix("") if page.suffix else page.with_name(f"{page.name}_pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    error, answer = record.get("error"), record.get("answer")
    result = "no reward" if record["reward"] is None else f"reward {record['reward']:g}"
    lines = [f"# Rollout {_code(record['id'])}", "", f"Task {_code(record['task'])}, {result}.", ""]
    if answer is not None:
        lines += ["**expected answer**", "", *_block(answer), ""]
    if error is not None:
        said = f"{error['kind']}: {error['message']}\n{error.get('traceback', '')}".rstrip()
        lines += ["**failed**", "", *_block(said), ""]
    count = 0
    for number, branch in enumerate(record["branches"]):
        if len(record["branches"]) > 1:
            lines += [f"## Branch {number}", ""]
        for message in branch["messages"]:
            role = message["role"]
            lines.append(f"**{role}**" if role in _ROLES else _code(role))
            for part in _parts(message):
                if part["type"] == "text":
                    lines += ["", *_block(part["text"])]
                    continue
                name = _copy(part["image_url"]["url"], root, pictures, count)
                lines += ["", f"![picture {count}]({quote(pictures.name)}/{name})"]
                count += 1
            lines.append("")
    page.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    return count


def _record(run: Path, rollout_id: str) -> dict[str, Any]:
    path = file_of(RunPaths(run), rollout_id)
    for record in read_jsonl(path) if path is not None else ():  # a damaged line costs itself alone
        if record.get("id") == rollout_id:
            return record
    expected = "<step>.<group>.<member> or eval_<version>.<index>"
    raise PointillistError(f"run {run} has no rollout {rollout_id!r}, expected {expected}")


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        with suppress(ValueError):  # what the model wrote, if it is no JSON
            arguments = json.dumps(json.loads(arguments))
        parts.append({"type": "text", "text": f"{call['function']['name']}({arguments})"})
    return [part for part in parts if part.get("text") != ""]


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


def _copy(uri: str, root: Path, folder: Path, number: int) -> str:
    """Copies a picture of the run's store; a record can name no other file."""
    _, stored, sha256 = stored_name(uri, [root])
    target = folder / f"{number}{Path(stored).suffix}"
    target.write_bytes(read_verified(uri, sha256, [root], STORED_LIMITS))
    return target.name
