"""Follows the trainer's weight versions and tells the inference server of each."""

import asyncio
import logging

from pointillist.config.run_paths import RunPaths, latest_broadcast
from pointillist.rollouts import InferenceClient

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.01


class WeightWatcher:
    """Applies new weight versions to the server as they appear."""

    def __init__(self, paths: RunPaths, client: InferenceClient, first_version: int) -> None:
        self._paths = paths
        self._client = client
        self._lock = asyncio.Lock()  # `follow` and `wait_for` may both find a version
        self.version = first_version - 1
        """Version that the server has; one below the first until that is there."""

    async def wait_for(self, version: int) -> None:
        """Waits until the server has this version or a newer one.

        Raises:
            InferenceError: The server refused the weights.
        """
        while self.version < version:
            if not await self._apply_latest():
                await asyncio.sleep(_POLL_SECONDS)

    async def follow(self) -> None:
        """Applies versions as they come, for ever; run it as a task where rollouts may overlap training."""
        while True:
            await self._apply_latest()
            await asyncio.sleep(_POLL_SECONDS)

    async def _apply_latest(self) -> bool:
        async with self._lock:
            latest = latest_broadcast(self._paths)
            if latest is None or latest <= self.version:
                return False
            await self._client.update_weights(str(self._paths.broadcast_step(latest)), latest)
            self.version = latest
            return True
