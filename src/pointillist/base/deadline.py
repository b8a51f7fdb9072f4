"""A deadline for a whole answer of another machine, however many short waits it is made of.

HTTP libraries bound each wait for a piece of an answer; a server that sends a byte now and then keeps such a client for
ever. `DeadlineStream` bounds all waits of a connection together.
"""

import ssl
import time

import httpcore


class Deadline:
    """Until when an answer is waited for."""

    def __init__(self, seconds: float = 0.0) -> None:
        """Begins to wait.

        Args:
            seconds: From now on.
        """
        self.start(seconds)

    def start(self, seconds: float) -> None:
        """Begins to wait anew."""
        self._end = time.monotonic() + seconds

    def prolong(self, seconds: float) -> None:
        """Allows more, since something has come."""
        self._end += seconds

    def seconds_left(self) -> float:
        """Seconds until the deadline.

        Raises:
            httpcore.TimeoutException: It has passed.
        """
        if (left := self._end - time.monotonic()) <= 0:
            raise httpcore.TimeoutException("deadline")
        return left


class DeadlineStream(httpcore.NetworkStream):
    """A connection that looks at a deadline before each wait, so that many short waits are no long one."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        """Wraps a connection.

        Args:
            stream: The connection.
            deadline: When it has passed, each wait raises `httpcore.TimeoutException`.
        """
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Some of what has come."""
        return self._stream.read(max_bytes, self._deadline.seconds_left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends all of it."""
        self._stream.write(buffer, self._deadline.seconds_left())

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The same connection, encrypted."""
        # Python's handshake ends when its socket's time limit is over, however many pieces come.
        secured = self._stream.start_tls(ssl_context, server_hostname, self._deadline.seconds_left())
        return DeadlineStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> object:
        """What the transport knows of the connection."""
        return self._stream.get_extra_info(info)
