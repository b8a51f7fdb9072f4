"""Batches over ZMQ: the orchestrator keeps a step's batches until every rank has trained them, ranks ask for them.

A rank says `Want` with the step it is to train, and `Done` when it needs nothing before a step any more. Batches are
kept until all ranks are done with them, so a rank that restarts asks again and loses nothing; at most `max_pending`
steps are kept, so a sender that is ahead waits.
"""

import logging
import os
import secrets
import threading
from typing import Final

import msgspec
import zmq

from pointillist.config import RUN_KEY
from pointillist.errors import TransportError
from pointillist.transport.types import RankBatch, decode_rank_batch, encode_rank_batch

logger = logging.getLogger(__name__)

_POLL_MS: Final = 100
_ASK_AGAIN_MS: Final = 2000


class _Want(msgspec.Struct, tag=True):
    """A rank waits for a step's batch."""

    token: str
    rank: int
    step: int


class _Done(msgspec.Struct, tag=True):
    """A rank needs nothing before this step."""

    token: str
    rank: int
    step: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Want | _Done).decode


class ZmqSender:
    """The orchestrator's end; a thread answers the ranks."""

    def __init__(self, address: str, num_ranks: int, max_pending: int) -> None:
        """Listens.

        Args:
            address: `tcp://host:port`; port 0 takes a free one (`self.address` says which).
            num_ranks: Ranks that will ask.
            max_pending: Steps that are kept at most.

        Raises:
            TransportError: The address can not be had.
        """
        self._token = os.environ.get(RUN_KEY, "")
        self._max_pending = max_pending
        self._needed_from = dict.fromkeys(range(num_ranks), 0)
        self._batches: dict[int, list[bytes]] = {}
        self._waiting: dict[int, tuple[bytes, int]] = {}
        self._changed = threading.Condition()
        self._context = zmq.Context()
        self._wire = self._context.socket(zmq.ROUTER)
        self._wire.linger = 1000
        try:
            self._wire.bind(address)
        except zmq.ZMQError as error:
            raise TransportError(f"transport can not listen on {address} ({error.strerror})") from None
        self.address: str = self._wire.getsockopt_string(zmq.LAST_ENDPOINT)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="zmq-sender", daemon=True)
        self._thread.start()

    def send(self, batches: list[RankBatch]) -> None:
        """Hands over one step's batches, one a rank; waits while too many steps are pending.

        Raises:
            TransportError: A batch that must not travel; nothing was handed over.
        """
        encoded = [encode_rank_batch(batch) for batch in batches]
        with self._changed:
            self._changed.wait_for(lambda: len(self._batches) < self._max_pending)
            self._batches[batches[0].step] = encoded

    def close(self) -> None:
        """Stops listening."""
        self._closing = True
        self._thread.join()
        self._wire.close()
        self._context.term()

    def _serve(self) -> None:
        while not self._closing:
            if self._wire.poll(_POLL_MS):
                identity, data = self._wire.recv_multipart()
                self._heard(identity, data)
            with self._changed:
                for rank, (identity, step) in list(self._waiting.items()):
                    if step in self._batches:
                        del self._waiting[rank]
                        self._wire.send_multipart([identity, self._batches[step][rank]])

    def _heard(self, identity: bytes, data: bytes) -> None:
        try:
            message = _decode(data)
        except msgspec.MsgspecError as error:
            logger.warning("message from somebody who is not a rank is ignored (%s)", error)
            return
        if message.rank not in self._needed_from or not secrets.compare_digest(
            message.token.encode(), self._token.encode()
        ):
            logger.warning("message from somebody who is not a rank of this run is ignored")
            return
        with self._changed:
            if isinstance(message, _Want):
                self._waiting[message.rank] = (identity, message.step)
            else:
                self._needed_from[message.rank] = message.step
                needed = min(self._needed_from.values())
                self._batches = {step: each for step, each in self._batches.items() if step >= needed}
                self._changed.notify_all()


class ZmqReceiver:
    """One trainer rank's end."""

    def __init__(self, address: str, rank: int) -> None:
        self._address = address
        self._rank = rank
        self._token = os.environ.get(RUN_KEY, "")
        self._context = zmq.Context()
        # Batches are received in the feed's thread, and given up in the trainer's: sockets belong to one thread each.
        self._done_wire = self._connected()
        self._wire: zmq.Socket[bytes] | None = None

    def receive(self, step: int) -> RankBatch:
        """Waits for a step's batch.

        Raises:
            TransportError: The batch is malformed or must not be trained.
        """
        while True:
            if self._wire is None:
                self._wire = self._connected()
            self._wire.send(_encode(_Want(self._token, self._rank, step)))
            if self._wire.poll(_ASK_AGAIN_MS):
                batch = decode_rank_batch(self._wire.recv())
                if batch.step == step:
                    return batch

    def discard_before(self, step: int) -> None:
        """Says that the batches of earlier steps are trained."""
        self._done_wire.send(_encode(_Done(self._token, self._rank, step)))

    def _connected(self) -> "zmq.Socket[bytes]":
        wire = self._context.socket(zmq.DEALER)
        wire.linger = 1000
        wire.connect(self._address)
        return wire
