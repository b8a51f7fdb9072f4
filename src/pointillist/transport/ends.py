"""The two ends of a transport, and the choice of one."""

from typing import Protocol

from pointillist.config import TransportConfig
from pointillist.runs.paths import RunPaths
from pointillist.transport.filesystem import FilesystemReceiver, FilesystemSender
from pointillist.transport.types import RankBatch
from pointillist.transport.zmq import ZmqReceiver, ZmqSender


class Sender(Protocol):
    """The orchestrator's end."""

    def send(self, batches: list[RankBatch]) -> None:
        """Hands over one step's batches, one a rank; may wait for ranks that are behind."""
        ...

    def close(self) -> None:
        """Ends the transport."""
        ...


class Receiver(Protocol):
    """One trainer rank's end."""

    def receive(self, step: int) -> RankBatch:
        """Waits for a step's batch."""
        ...

    def discard_before(self, step: int) -> None:
        """Says that the batches of earlier steps are trained."""
        ...


def make_sender(config: TransportConfig, paths: RunPaths, num_ranks: int, max_pending: int) -> Sender:
    """The orchestrator's end, as the config says.

    Args:
        config: Which transport.
        paths: The run's folder.
        num_ranks: Ranks that will ask.
        max_pending: Steps that may wait for them.

    Raises:
        TransportError: The address can not be had.
    """
    if config.type == "zmq":
        return ZmqSender(config.address, num_ranks, max_pending)
    return FilesystemSender(paths)


def make_receiver(config: TransportConfig, paths: RunPaths, rank: int) -> Receiver:
    """A rank's end, as the config says."""
    return ZmqReceiver(config.address, rank) if config.type == "zmq" else FilesystemReceiver(paths, rank)
