"""Back pressure: the bytes of bodies and of decoded images that may wait in a server are bounded."""

import asyncio


class ByteBudget:
    """A number of bytes that requests take a share of, first come, first served. Belongs to one event loop."""

    def __init__(self, max_bytes: int) -> None:
        """Sets the size.

        Args:
            max_bytes: Bytes that may be held; a request for more than that is served alone.
        """
        self.max_bytes = max_bytes
        self.held = 0
        self.waiting = 0
        """Requests that wait for room."""
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()

    async def take(self, num_bytes: int) -> "Share":
        """Waits for room."""
        self.waiting += 1
        try:
            async with self._turn:  # FIFO: a large request is not overtaken for ever by small ones
                while self.held and self.held + num_bytes > self.max_bytes:
                    self._released.clear()
                    await self._released.wait()
                self.held += num_bytes
        finally:
            self.waiting -= 1
        return Share(self, num_bytes)

    def take_now(self, num_bytes: int) -> "Share | None":
        """A share without waiting; None if there is no room or others wait for it."""
        if self.waiting or self.held + num_bytes > self.max_bytes:
            return None
        self.held += num_bytes
        return Share(self, num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        self.held -= num_bytes
        self._released.set()


class Share:
    """Bytes that a request holds."""

    def __init__(self, budget: ByteBudget, num_bytes: int) -> None:
        self._budget = budget
        self._num_bytes = num_bytes

    def release(self) -> None:
        """Gives them back; a second call does nothing."""
        if self._num_bytes:
            self._budget._give_back(self._num_bytes)
            self._num_bytes = 0
