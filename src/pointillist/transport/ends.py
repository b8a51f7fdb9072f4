"""The two ends of a transport, and the choice between files and ZMQ."""

from typing import Protocol

from pointillist.config import TransportConfig
from pointillist.runs.paths import RunPaths
from pointillist.transport.filesystem import FilesystemReceiver, FilesystemSender
from pointillist.transport.types import RankBatch
from pointillist.transport.zmq import ZmqReceiver, ZmqSender


class Sender(Protocol):
    """The orchestrator's end."""

    def send(self, batches: list[RankBatch]) -> None:
        """Hands over the batches of one step, one for each rank; may wait for ranks that are behind."""
        ...

    def close(self) -> None:
        """Ends the transport."""
        ...


class Receiver(Protocol):
    """One trainer rank's end."""

    def receive(self, step: int) -> RankBatch:
        """Waits for the batch of a step."""
        ...

    def discard_before(self, step: int) -> None:
        """Reports that the batches of earlier steps are trained and need not be kept."""
        ...


def make_sender(config: TransportConfig, paths: RunPaths, num_ranks: int, max_pending: int) -> Sender:
    """The orchestrator's end of the configured transport.

    Args:
        config: Kind of the transport, and its address.
        paths: Paths of the run.
        num_ranks: Number of ranks that will ask.
        max_pending: Number of steps that may wait for the ranks.

    Raises:
        TransportError: The address cannot be listened on, or the run has no key.
    """
    if config.type == "zmq":
        return ZmqSender(config.address, num_ranks, max_pending)
    return FilesystemSender(paths)


def make_receiver(config: TransportConfig, paths: RunPaths, rank: int) -> Receiver:
    """The end of trainer rank `rank` of the configured transport."""
    return ZmqReceiver(config.address, rank) if config.type == "zmq" else FilesystemReceiver(paths, rank)
