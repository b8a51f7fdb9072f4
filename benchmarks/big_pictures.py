"""An environment of large pictures, a new one for every task; its reward has nothing to do with them."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from benchmarks.common import picture
from pointillist.environments import Task
from pointillist.sessions import Session


class BigPictures:
    """One picture, one token; the reward is whether the token's id is even, so that groups differ."""

    def __init__(self, side: int, noise: bool, tasks: int) -> None:
        """Sets the size.

        Args:
            side: Width and height, in pixels.
            noise: PNG of noise (3 bytes a pixel: a large file), or else a JPEG.
            tasks: How many different pictures.
        """
        self._side = side
        self._noise = noise
        self._tasks = [Task(id=str(number), data={"number": number}) for number in range(tasks)]

    def train_tasks(self) -> Sequence[Task]:
        """All tasks."""
        return self._tasks

    def eval_tasks(self) -> Sequence[Task]:
        """One."""
        return self._tasks[:1]

    async def rollout(self, task: Task, session: Session) -> float:
        """Shows the picture and looks at nothing but the sampled token."""
        side, number = self._side, int(task.data["number"])
        if self._noise:
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
            data = buffer.getvalue()
        else:
            data = picture(side, side, "JPEG", number)
        turn = await session.generate([{"role": "user", "content": [{"type": "image", "image": data}]}])
        return float(turn.completion.token_ids[0] % 2 == 0)
