"""`hunt`: the policy finds a thing in a large picture through a small window and names it. Each turn shows a picture.

The policy first sees the middle of the picture. It may call the tool `move`, whose result is a picture of what the
window then shows, or answer with a name. The reward is 1 for the right name, else 0; a policy that only moves gets 0.
The data is a folder with `train.jsonl`, `heldout.jsonl`, whose lines are `{"image": ..., "answer": ...}`, and the
pictures they name; `examples/hunt/prepare.py` makes one.
"""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from pointillist.environments import Task
from pointillist.environments.tasks import read_tasks
from pointillist.images.decode import decode_rgb, to_pillow
from pointillist.runs.image_dir import writer_limits
from pointillist.sessions import Session

QUESTION = "Find it and name it."
_DIRECTIONS: Final[Mapping[str, tuple[int, int]]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "move",
            "description": "Moves the window.",
            "parameters": {
                "type": "object",
                "properties": {"to": {"type": "string", "enum": list(_DIRECTIONS)}},
                "required": ["to"],
            },
        },
    }
]


class HuntEnvironment:
    """Environment of this module's docstring."""

    def __init__(self, data_dir: str, window: int = 32, max_moves: int = 3) -> None:
        """Reads the task lists and decodes every picture once.

        Args:
            data_dir: Path of the folder with task lists and pictures.
            window: Side of the window, in pixels; also the length of a move.
            max_moves: Number of tool calls in one rollout, at most.

        Raises:
            EnvironmentLoadError: A list is missing or malformed, or a picture is missing or corrupt.
        """
        hint = "run examples/hunt/prepare.py"
        self._train = read_tasks(Path(data_dir) / "train.jsonl", hint)
        self._heldout = read_tasks(Path(data_dir) / "heldout.jsonl", hint)
        self._window = window
        self._max_moves = max_moves

    def train_tasks(self) -> Sequence[Task]:
        """Tasks to train on."""
        return self._train

    def eval_tasks(self) -> Sequence[Task]:
        """Held-out tasks."""
        return self._heldout

    async def rollout(self, task: Task, session: Session) -> float:
        """Plays one hunt; returns 1 if the policy names the thing before it has used up its moves, else 0."""
        picture = await asyncio.to_thread(_load, task.data["image"])
        at = ((picture.width - self._window) // 2, (picture.height - self._window) // 2)
        session.tools = TOOLS
        view = {"type": "image", "image": self._view(picture, at)}
        turn = await session.generate([{"role": "user", "content": [view, {"type": "text", "text": QUESTION}]}])
        moves = 0
        while (calls := turn.message.get("tool_calls")) and moves < self._max_moves:
            moves += len(calls)
            results = []
            for call in calls:
                at = self._moved(picture, at, call)
                content = [{"type": "image", "image": self._view(picture, at)}]
                results.append({"role": "tool", "tool_call_id": call["id"], "content": content})
            turn = await session.generate(results)
        return float(turn.text == task.data["answer"] and turn.completion.finish_reason == "stop")

    def _moved(self, picture: Image.Image, at: tuple[int, int], call: Mapping[str, Any]) -> tuple[int, int]:
        """Upper left corner `(x, y)` of the window after a call.

        The window stays inside the picture. A call with an unknown direction does not move it.

        Example:
            Picture of 96x96 pixels, window of 32: from `(32, 32)` the call `right` leads to `(64, 32)`, and again
            `right` to `(64, 32)`.
        """
        arguments = json.loads(call["function"]["arguments"])
        x, y = _DIRECTIONS.get(str(arguments.get("to")), (0, 0))
        return (
            min(max(0, at[0] + x * self._window), picture.width - self._window),
            min(max(0, at[1] + y * self._window), picture.height - self._window),
        )

    def _view(self, picture: Image.Image, at: tuple[int, int]) -> Image.Image:
        return picture.crop((*at, at[0] + self._window, at[1] + self._window))


def _load(path: Path) -> Image.Image:
    return to_pillow(decode_rgb(path.read_bytes(), writer_limits(os.environ)))
