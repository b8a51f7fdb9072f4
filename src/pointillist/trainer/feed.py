"""The trainer's next rows, made ready in a thread while the current one trains.

The thread receives a step's batch, materialises its rows one after the other, and goes on with the next step's batch as
soon as there is one. Rows that wait hold at most a given number of bytes (and there is always room for one).
"""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from pointillist.errors import TrainingError
from pointillist.trainer.rows import ImageCounts, ImageFault, RowLoader, RowTensors
from pointillist.transport import RankBatch, Receiver


@dataclass(frozen=True, slots=True)
class ReadyRow:
    """A row, and what became of its images."""

    tensors: RowTensors
    counts: ImageCounts
    faults: list[ImageFault]

    @property
    def num_bytes(self) -> int:
        """Bytes of its image tensors; its tokens are nothing beside them."""
        return sum(tensor.nbytes for tensor in self.tensors.images.values())


class RowFeed:
    """Batches and rows in order: `batch()`, then `row()` for each of its micro batches, then the next `batch()`."""

    def __init__(self, receiver: Receiver, loader: RowLoader, steps: Iterable[int], max_bytes: int) -> None:
        """Starts the thread.

        Args:
            receiver: Where batches come from.
            loader: Materialises rows; nobody else may use it from now on.
            steps: Steps to feed, in order.
            max_bytes: Image bytes of the rows that may wait.
        """
        self._receiver = receiver
        self._loader = loader
        self._steps = steps
        self._max_bytes = max_bytes
        self._ready: deque[RankBatch | ReadyRow | BaseException] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="feed", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits for what comes next, so long at most; returns whether it is there."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._ready, seconds))

    def batch(self) -> RankBatch:
        """The next step's batch.

        Raises:
            TransportError: It is malformed or must not be trained.
            TrainingError: Rows of the last one are left.
        """
        item = self._take()
        if not isinstance(item, RankBatch):
            raise TrainingError("rows of the last batch are left")
        return item

    def row(self) -> ReadyRow:
        """The next row of the batch.

        Raises:
            MissingImageError: An image is not there and the policy is `error`.
            TrainingError: It has no more rows.
        """
        item = self._take()
        if not isinstance(item, ReadyRow):
            raise TrainingError("the batch has no more rows")
        return item

    def _take(self) -> RankBatch | ReadyRow:
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready.popleft()
            if isinstance(item, ReadyRow):
                self._bytes -= item.num_bytes
                self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            for step in self._steps:
                batch = self._receiver.receive(step)
                self._put(batch)
                for micro_batch in batch.micro_batches:
                    tensors = self._loader.load(micro_batch)
                    self._put(ReadyRow(tensors, *self._loader.take_counts()))
                if batch.is_last:
                    return
        except BaseException as error:  # the trainer raises it where it takes the row
            self._put(error)

    def _put(self, item: RankBatch | ReadyRow | BaseException) -> None:
        with self._changed:
            if isinstance(item, ReadyRow):
                # Room is waited for with the row in hand, so "waiting" is one row more than max_bytes at most.
                self._changed.wait_for(lambda: self._bytes == 0 or self._bytes + item.num_bytes <= self._max_bytes)
                self._bytes += item.num_bytes
            self._ready.append(item)
            self._changed.notify_all()
