"""The order in which training tasks come: shuffled anew each epoch, from the seed and a position alone."""

import random
from collections.abc import Sequence

from pointillist.rollouts import Task


class TaskOrder:
    """An endless stream of tasks whose whole state is one number."""

    def __init__(self, tasks: Sequence[Task], seed: int, position: int = 0) -> None:
        """Starts at a position.

        Args:
            tasks: At least one.
            seed: Of the shuffles.
            position: Tasks already taken.
        """
        self._tasks = tasks
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []
        self.position = position
        """Tasks taken so far."""

    def take(self, count: int) -> list[Task]:
        """The next tasks."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Task:
        epoch, index = divmod(self.position, len(self._tasks))
        if epoch != self._epoch:
            self._order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        self.position += 1
        return self._tasks[self._order[index]]
