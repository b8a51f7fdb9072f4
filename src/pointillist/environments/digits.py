"""`digits`: name the handwritten digit in a picture. One turn, one token, exact match.

The pictures are the 1,797 real scans of the UCI optical-recognition set as scikit-learn ships them, written as PNG
files by `examples/digits/prepare.py`: a folder with `train.jsonl`, `heldout.jsonl` and the pictures they name.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pointillist.errors import EnvironmentLoadError, ImageError
from pointillist.images import ImageLimits, decode_rgb
from pointillist.rollouts import Session, Task

QUESTION = "What digit?"


class DigitsEnvironment:
    """See the module's docstring."""

    def __init__(self, data_dir: str) -> None:
        """Reads the task lists and checks every picture once.

        Args:
            data_dir: Folder that `prepare.py` wrote.

        Raises:
            EnvironmentLoadError: A list is missing or malformed, or a picture is missing or corrupt.
        """
        folder = Path(data_dir)
        self._train = _read_tasks(folder, "train")
        self._heldout = _read_tasks(folder, "heldout")

    def train_tasks(self) -> Sequence[Task]:
        """1,400 digits."""
        return self._train

    def eval_tasks(self) -> Sequence[Task]:
        """397 further digits."""
        return self._heldout

    async def rollout(self, task: Task, session: Session) -> float:
        """1 if the answer is the digit and nothing else, else 0."""
        turn = await session.generate(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": task.data["image"]},
                        {"type": "text", "text": QUESTION},
                    ],
                }
            ]
        )
        return float(turn.text == task.data["answer"] and turn.completion.finish_reason == "stop")


def _read_tasks(folder: Path, split: str) -> list[Task]:
    path = folder / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EnvironmentLoadError(
            f"digits: no task list {path} ({error.strerror}); run examples/digits/prepare.py"
        ) from None
    tasks = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            image = folder / record["image"]
            decode_rgb(image.read_bytes(), ImageLimits())
            tasks.append(Task(id=f"{split}-{record['image']}", data={"image": image, "answer": str(record["answer"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise EnvironmentLoadError(f"digits: {path} line {number} is malformed ({error!r})") from None
        except (OSError, ImageError) as error:
            raise EnvironmentLoadError(f"digits: picture {record['image']} of {path} line {number}: {error}") from None
    return tasks
