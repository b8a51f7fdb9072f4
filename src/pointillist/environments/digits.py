"""`digits`: the policy names the handwritten digit in a picture. A rollout is one turn; its answer must match exactly.

The pictures are the 1,797 real scans of the UCI optical-recognition set, as scikit-learn ships them.
`examples/digits/prepare.py` writes them as PNG files, beside `train.jsonl` and `heldout.jsonl`, which name them.
"""

from collections.abc import Sequence
from pathlib import Path

from pointillist.environments import Task
from pointillist.environments.tasks import read_tasks
from pointillist.sessions import Session

QUESTION = "What digit?"
_HINT = "run examples/digits/prepare.py"


class DigitsEnvironment:
    """Environment of this module's docstring."""

    def __init__(self, data_dir: str) -> None:
        """Reads the task lists and decodes every picture once.

        Args:
            data_dir: Path of the folder that `prepare.py` wrote.

        Raises:
            EnvironmentLoadError: A list is missing or malformed, or a picture is missing or corrupt.
        """
        folder = Path(data_dir)
        self._train = read_tasks(folder / "train.jsonl", _HINT)
        self._heldout = read_tasks(folder / "heldout.jsonl", _HINT)

    def train_tasks(self) -> Sequence[Task]:
        """1,400 digits to train on."""
        return self._train

    def eval_tasks(self) -> Sequence[Task]:
        """397 held-out digits."""
        return self._heldout

    async def rollout(self, task: Task, session: Session) -> float:
        """Asks for the digit; returns 1 if the answer is the digit and nothing else, else 0."""
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
