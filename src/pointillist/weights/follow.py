"""Follows the trainer's weight versions and tells every inference server of each."""

import asyncio
import contextlib
import logging
import os
import time
from http import HTTPStatus

import msgspec

from pointillist.config.shared import RUN_KEY
from pointillist.errors import InferenceError, UnreachableError
from pointillist.runs.paths import RunPaths, latest_broadcast
from pointillist.sessions import InferenceClient
from pointillist.sessions.answers import check_status
from pointillist.sessions.servers import InferenceServer

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
_ASK_SECONDS = 1.0


class WeightWatcher:
    """Applies new weight versions to the servers as they appear.

    A server that cannot be reached holds nobody up: it loads the latest version by itself when it is started again,
    what it missed in between is applied as soon as it answers, and one that says that it has an older version than it
    was given (somebody has started it anew elsewhere) is given the latest once more.
    """

    def __init__(self, paths: RunPaths, client: InferenceClient, first_version: int) -> None:
        self._paths = paths
        self._has = dict.fromkeys(client.servers, first_version - 1)
        self._told: set[InferenceServer] = set()
        """Servers that have taken a version from this orchestrator."""
        self._newest: int | None = None
        self._looked = 0.0
        self._refused: InferenceError | None = None
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        """The newest version that a server has; one below the first until there is one."""
        return max(self._has.values())

    async def wait_for(self, version: int) -> None:
        """Waits until every server that can be reached has this version or a newer one, and there is one.

        Raises:
            InferenceError: A server refused the weights.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._refused is not None or self._reached(version))
        if self._refused is not None:
            raise self._refused

    async def follow(self) -> None:
        """Applies versions as they come, for ever; `wait_for` needs it to be running."""
        await asyncio.gather(*(self._follow(server) for server in self._has))

    def _reached(self, version: int) -> bool:
        return self.version >= version and all(has >= version or server.rest for server, has in self._has.items())

    async def _follow(self, server: InferenceServer) -> None:
        ask_at = 0.0
        while True:
            if time.monotonic() >= ask_at:
                said = (await server.health() or {}).get("weight_version")
                self._has[server] = min(self._has[server], self._has[server] if said is None else int(said))
                ask_at = time.monotonic() + _ASK_SECONDS
            latest = self._latest()
            if latest is not None and latest > self._has[server]:
                await self._apply(server, latest)
            await asyncio.sleep(max(_POLL_SECONDS, server.rest))

    def _latest(self) -> int | None:
        """The newest version; one look at the folder serves all servers."""
        now = time.monotonic()
        if now - self._looked >= _POLL_SECONDS:
            self._looked, self._newest = now, latest_broadcast(self._paths)
        return self._newest

    async def _apply(self, server: InferenceServer, version: int) -> None:
        folder = self._paths.broadcast_step(version)
        try:
            with contextlib.suppress(UnreachableError):
                # The first time it may be an older version than the server has: of before the run went back.
                await update_weights(server, str(folder), version, rewind=server not in self._told)
                self._told.add(server)
                self._has[server] = version
        except InferenceError as error:
            if not folder.is_dir():
                return  # the trainer has removed it meanwhile: there are newer ones
            self._refused = error
        async with self._changed:
            self._changed.notify_all()


async def update_weights(server: InferenceServer, weight_dir: str, version: int, *, rewind: bool = False) -> None:
    """Tells one server to load a weight version from a folder; one that has a newer version keeps it.

    The request brings the run's own key, where there is one. A server that somebody has started outside of the run may
    not know that key; it is then asked with the key that its other requests bring.

    Args:
        server: Which one.
        weight_dir: Folder in the run's `broadcasts`, as the server sees it.
        version: Number of the weights.
        rewind: Whether an older version than the one that serves is meant, because the run has gone back.

    Raises:
        UnreachableError: It cannot be reached.
        InferenceError: The server kept its old weights; the message says why.
    """
    path = "/update_weights"
    body = msgspec.json.encode({"weight_dir": weight_dir, "weight_version": version, "rewind": rewind})
    key = os.environ.get(RUN_KEY)
    status, data = await server.post(path, body, {"Authorization": f"Bearer {key}"} if key else None)
    if key and status == HTTPStatus.UNAUTHORIZED:
        status, data = await server.post(path, body)
    if status != HTTPStatus.CONFLICT:
        check_status(path, status, data)
