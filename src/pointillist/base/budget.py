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
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()

    async def take(self, num_bytes: int) -> "Share":
        """Waits for room."""
        async with self._turn:  # FIFO: a large request is not overtaken for ever by small ones
            while self.held and self.held + num_bytes > self.max_bytes:
                self._released.clear()
                await self._released.wait()
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


class ArrivalBudget:
    """A number of bytes for what arrives piece by piece, such as bodies: only what has come is held.

    Many that are each half there could wait for each other's end for ever. So one at a time may go beyond the number:
    what is held is at most `max_bytes` and one body.
    """

    def __init__(self, max_bytes: int) -> None:
        """Sets the size.

        Args:
            max_bytes: Bytes that may be held.
        """
        self.waiting = 0
        """Holders that wait for room."""
        self.held = 0
        self._max_bytes = max_bytes
        self._holders: dict[object, int] = {}
        self._favoured: object | None = None
        self._released = asyncio.Event()

    def take_now(self, holder: object, num_bytes: int) -> bool:
        """Adds to what a holder has, if there is room; returns whether there was."""
        if self.held + num_bytes > self._max_bytes:
            if self._favoured not in (None, holder):
                return False
            self._favoured = holder
        self.held += num_bytes
        self._holders[holder] = self._holders.get(holder, 0) + num_bytes
        return True

    async def take(self, holder: object, num_bytes: int) -> None:
        """Waits for room."""
        self.waiting += 1
        try:
            while not self.take_now(holder, num_bytes):
                self._released.clear()
                await self._released.wait()
        finally:
            self.waiting -= 1

    def release(self, holder: object) -> None:
        """Gives back all that a holder has; a second call does nothing."""
        self.held -= self._holders.pop(holder, 0)
        if self._favoured is holder:
            self._favoured = None
        self._released.set()
