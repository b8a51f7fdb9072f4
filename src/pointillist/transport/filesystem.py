"""Batches through a shared folder: `<output_dir>/rollouts/step_<n>/rank_<r>.bin`, each written atomically."""

import time
from collections.abc import Iterator
from typing import Final

from pointillist.base.files import write_atomically
from pointillist.errors import TransportError
from pointillist.runs.paths import RunPaths, steps_in
from pointillist.transport.types import RankBatch, decode_rank_batch, encode_rank_batch

_SHORTEST_POLL_SECONDS: Final = 0.01
_LONGEST_POLL_SECONDS: Final = 0.25
_LATE: Final = 0.1


def poll_seconds() -> Iterator[float]:
    """Seconds to sleep before each next look for a batch.

    A pause is a tenth of the time slept so far, so that a batch is found at most a tenth later than possible. It is at
    least 10 ms and at most 250 ms, so that hundreds of waiting ranks are no load for a shared file system.

    Example:
        The first pauses are 0.01 s; after 1 s of sleep they are 0.1 s, and from 2.5 s on 0.25 s.
    """
    slept = 0.0
    while True:
        seconds = min(max(_SHORTEST_POLL_SECONDS, _LATE * slept), _LONGEST_POLL_SECONDS)
        yield seconds
        slept += seconds


class FilesystemSender:
    """The orchestrator's end."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    def send(self, batches: list[RankBatch]) -> None:
        """Writes the batches of one step, one for each rank.

        Raises:
            TransportError: A batch is not fit to be sent; nothing was written.
        """
        encoded = [encode_rank_batch(batch) for batch in batches]
        for rank, data in enumerate(encoded):
            write_atomically(self._paths.rollout_step(batches[rank].step) / f"rank_{rank}.bin", data)

    def close(self) -> None:
        """Does nothing, since nothing is open."""


class FilesystemReceiver:
    """One trainer rank's end."""

    def __init__(self, paths: RunPaths, rank: int) -> None:
        self._paths = paths
        self._rank = rank

    def receive(self, step: int) -> RankBatch:
        """Waits for the batch of a step.

        Raises:
            TransportError: The batch cannot be read, is malformed or must not be trained.
        """
        path = self._paths.rollout_step(step) / f"rank_{self._rank}.bin"
        pauses = poll_seconds()
        while not path.exists():
            time.sleep(next(pauses))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TransportError(f"batch of step {step} cannot be read ({error})") from None
        return decode_rank_batch(data)

    def discard_before(self, step: int) -> None:
        """Removes the packed batches of steps that are trained; the rollouts beside them stay."""
        for old in steps_in(self._paths.rollouts):
            if old < step:
                (self._paths.rollout_step(old) / f"rank_{self._rank}.bin").unlink(missing_ok=True)
