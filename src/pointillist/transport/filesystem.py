"""Batches through a shared folder: `<output_dir>/rollouts/step_<n>/rank_<r>.bin`, each written atomically."""

import time

from pointillist.config.run_paths import RunPaths, steps_in, write_atomically
from pointillist.transport.types import RankBatch, decode_rank_batch, encode_rank_batch

_POLL_SECONDS = 0.01


class FilesystemSender:
    """The orchestrator's end."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    def send(self, batches: list[RankBatch]) -> None:
        """Writes one step's batches, one a rank.

        Raises:
            TransportError: A batch that must not travel; nothing was written.
        """
        encoded = [encode_rank_batch(batch) for batch in batches]
        for rank, data in enumerate(encoded):
            write_atomically(self._paths.rollout_step(batches[rank].step) / f"rank_{rank}.bin", data)

    def close(self) -> None:
        """Nothing is open."""


class FilesystemReceiver:
    """One trainer rank's end."""

    def __init__(self, paths: RunPaths, rank: int) -> None:
        self._paths = paths
        self._rank = rank

    def receive(self, step: int) -> RankBatch:
        """Waits for a step's batch.

        Raises:
            TransportError: The batch is malformed or must not be trained.
        """
        path = self._paths.rollout_step(step) / f"rank_{self._rank}.bin"
        while not path.exists():
            time.sleep(_POLL_SECONDS)
        return decode_rank_batch(path.read_bytes())

    def discard_before(self, step: int) -> None:
        """Removes the packed batches of steps that are trained; the rollouts beside them stay."""
        for old in steps_in(self._paths.rollouts):
            if old < step:
                (self._paths.rollout_step(old) / f"rank_{self._rank}.bin").unlink(missing_ok=True)
