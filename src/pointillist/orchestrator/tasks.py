"""The order of training tasks: shuffled anew in each epoch, and decided by the seed and a position alone."""

import random


class TaskOrder:
    """An endless stream of task indices, whose whole state is one number.

    Example:
        With 3 tasks, `take(4)` gives each of 0, 1, 2 once in some order, then the first of a new order.
    """

    def __init__(self, num_tasks: int, seed: int, position: int = 0) -> None:
        """Starts at a position.

        Args:
            num_tasks: Number of tasks, at least one.
            seed: Seed of the shuffles.
            position: Number of tasks taken before, of all epochs together.
        """
        self._num_tasks = num_tasks
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []
        self.position = position
        """Number of tasks taken so far."""

    def take(self, count: int) -> list[int]:
        """The next `count` indices."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        epoch, index = divmod(self.position, self._num_tasks)
        if epoch != self._epoch:
            self._order = list(range(self._num_tasks))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        self.position += 1
        return self._order[index]
