"""The order in which training tasks come: shuffled anew each epoch, from the seed and a position alone."""

import random


class TaskOrder:
    """An endless stream of task indices whose whole state is one number."""

    def __init__(self, num_tasks: int, seed: int, position: int = 0) -> None:
        """Starts at a position.

        Args:
            num_tasks: At least one.
            seed: Of the shuffles.
            position: Tasks already taken.
        """
        self._num_tasks = num_tasks
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []
        self.position = position
        """Tasks taken so far."""

    def take(self, count: int) -> list[int]:
        """The next indices."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        epoch, index = divmod(self.position, self._num_tasks)
        if epoch != self._epoch:
            self._order = list(range(self._num_tasks))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        self.position += 1
        return self._order[index]
