"""Batches over ZMQ: the orchestrator keeps a step's batches until every rank has trained them, ranks ask for them.

A rank sends `Want` with the step that it will train next, and `Done` with the first step whose batch it still needs.
Batches are kept until all ranks are done with them, so a rank that restarts asks again and loses nothing. At most
`max_pending` steps are kept, so a sender that is ahead waits. The answer to a `Want` is a batch, or a refusal with its
reason.

Only processes that have the run's key can connect (`pointillist.base.channel`). The orchestrator's end answers in a
thread; should that thread fail, `send` raises its error, so the run ends with the reason.
"""

import logging
import threading
import time
from contextlib import suppress
from typing import Final

import msgspec
import zmq

from pointillist.base.channel import decode, one_frame, secure_client, secure_listener
from pointillist.base.net import key_from_environment
from pointillist.config import RUN_KEY
from pointillist.errors import TransportError
from pointillist.transport.types import RankBatch, decode_rank_batch, encode_rank_batch

logger = logging.getLogger(__name__)

_POLL_MS: Final = 100
_ASK_AGAIN_MS: Final = 2000
_SAY_AGAIN_SECONDS: Final = 30.0
_LARGEST_QUESTION: Final = 4096
_LARGEST_ANSWER: Final = 4 * 1024**3
_BATCH: Final = b"batch"
_REFUSED: Final = b"refused"
_KEY: Final = "the run's key, one and the same word for all its processes (the launcher sets it)"


class _Want(msgspec.Struct, tag=True):
    """A rank waits for a step's batch."""

    rank: int
    step: int


class _Done(msgspec.Struct, tag=True):
    """A rank needs nothing before this step."""

    rank: int
    step: int


_encode = msgspec.msgpack.Encoder().encode
_questions: "msgspec.msgpack.Decoder[_Want | _Done]" = msgspec.msgpack.Decoder(_Want | _Done)


class ZmqSender:
    """The orchestrator's end; a thread answers the ranks."""

    def __init__(self, address: str, num_ranks: int, max_pending: int) -> None:
        """Begins to listen.

        Args:
            address: Address `tcp://host:port`; with port 0 a free port is taken, and `self.address` has it.
            num_ranks: Number of ranks that will ask.
            max_pending: Number of steps that are kept, at most.

        Raises:
            TransportError: The address cannot be listened on.
            ConfigError: The run has no key.
        """
        key = key_from_environment(RUN_KEY, _KEY)
        self._max_pending = max_pending
        self._needed_from = dict.fromkeys(range(num_ranks), 0)
        self._batches: dict[int, list[bytes]] = {}
        self._latest: int | None = None
        self._waiting: dict[int, tuple[bytes, int]] = {}
        self._answered: dict[int, tuple[bytes, int]] = {}
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._context = zmq.Context()
        self._wire = self._context.socket(zmq.ROUTER)
        self._wire.linger = 1000
        secure_listener(self._wire, key, max_bytes=_LARGEST_QUESTION)
        try:
            self._wire.bind(address)
        except zmq.ZMQError as error:
            raise TransportError(f"transport cannot listen on {address} ({error.strerror})") from None
        self.address: str = self._wire.getsockopt_string(zmq.LAST_ENDPOINT)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="zmq-sender", daemon=True)
        self._thread.start()

    def send(self, batches: list[RankBatch]) -> None:
        """Hands over the batches of one step, one for each rank; waits while too many steps are pending.

        Raises:
            TransportError: A batch is not fit to be sent (nothing was handed over), or the thread that answers the
                ranks has failed.
        """
        encoded = [encode_rank_batch(batch) for batch in batches]
        for rank, data in enumerate(encoded):
            if len(data) > _LARGEST_ANSWER:
                raise TransportError(
                    f"step {batches[rank].step}: the batch of rank {rank} has {len(data)} bytes, expected at most "
                    f'{_LARGEST_ANSWER}; use more ranks, a smaller batch_size, or transport.type = "filesystem"'
                )
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or len(self._batches) < self._max_pending)
            if self._failure is not None:
                raise TransportError(
                    f"the thread that sends batches to the trainer has ended: {self._failure!r}"
                ) from self._failure
            self._latest = batches[0].step
            self._batches[self._latest] = encoded

    def close(self) -> None:
        """Stops listening."""
        self._closing = True
        self._thread.join()
        self._wire.close()
        self._context.term()

    def _serve(self) -> None:
        try:
            while not self._closing:
                if self._wire.poll(_POLL_MS):
                    identity, *frames = self._wire.recv_multipart()
                    self._heard(identity, frames)
                self._answer()
        except Exception as error:  # `send` raises it: a run whose listener is dead is dead
            logger.exception("the thread that sends batches to the trainer has failed")
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _heard(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            message = decode(_questions, one_frame(frames, "a rank's message"), "a rank's message")
            if message.rank not in self._needed_from:
                raise TransportError(f"it is from rank {message.rank}, expected 0 to {len(self._needed_from) - 1}")
        except TransportError as error:
            logger.warning("a message to the transport is ignored: %s", error)
            return
        with self._changed:
            if isinstance(message, _Want):
                # Asked again over the same connection: the answer is on its way, a second copy would only queue.
                if self._answered.get(message.rank) != (identity, message.step):
                    self._waiting[message.rank] = (identity, message.step)
            elif self._latest is None or message.step > self._latest + 1:
                logger.warning(
                    "rank %d says it has trained up to step %d, which was not sent", message.rank, message.step
                )
            else:
                self._needed_from[message.rank] = max(self._needed_from[message.rank], message.step)
                needed = min(self._needed_from.values())
                self._batches = {step: each for step, each in self._batches.items() if step >= needed}
                self._changed.notify_all()

    def _answer(self) -> None:
        """Answers the ranks whose batch is there, and refuses those whose batch will never come."""
        with self._changed:
            if self._latest is None:
                return
            for rank, (identity, step) in list(self._waiting.items()):
                if step in self._batches:
                    answer = [_BATCH, self._batches[step][rank]]
                elif step == self._latest + 1:
                    continue
                else:
                    kept = f"{min(self._batches)} to {self._latest}" if self._batches else "none"
                    reason = f"rank {rank} asks for step {step}; kept steps: {kept}; the next is {self._latest + 1}"
                    logger.warning("%s: refused", reason)
                    answer = [_REFUSED, reason.encode()]
                del self._waiting[rank]
                self._answered[rank] = (identity, step)
                self._wire.send_multipart([identity, *answer])


class ZmqReceiver:
    """One trainer rank's end."""

    def __init__(self, address: str, rank: int) -> None:
        """Prepares the sockets; the orchestrator need not listen yet.

        Raises:
            ConfigError: The run has no key.
        """
        self._address = address
        self._rank = rank
        self._key = key_from_environment(RUN_KEY, _KEY)
        self._context = zmq.Context()
        # Batches are received in the feed's thread, and given up in the trainer's: sockets belong to one thread each.
        self._done_wire = self._connected(immediate=False)
        self._wire: zmq.Socket[bytes] | None = None

    def receive(self, step: int) -> RankBatch:
        """Waits for the batch of a step.

        Raises:
            TransportError: The answer or the batch is malformed, the batch must not be trained, or the orchestrator
                refuses: it will never send this step.
        """
        if self._wire is None:
            self._wire = self._connected(immediate=True)  # else questions would pile up while there is no connection
        warn_at = time.monotonic() + _SAY_AGAIN_SECONDS
        while True:
            if self._wire.poll(_ASK_AGAIN_MS, zmq.POLLOUT):
                self._wire.send(_encode(_Want(self._rank, step)))
                if self._wire.poll(_ASK_AGAIN_MS):
                    batch = _batch_of(self._wire.recv_multipart())
                    if batch.step == step:
                        return batch
                    if batch.step > step:
                        raise TransportError(f"the orchestrator sent step {batch.step}, rank {self._rank} wants {step}")
            elif time.monotonic() >= warn_at:
                warn_at = time.monotonic() + _SAY_AGAIN_SECONDS
                logger.warning(
                    "step %d: no connection to the orchestrator at %s: it is not up, or its %s differs from this one's",
                    step, self._address, RUN_KEY,
                )  # fmt: skip

    def discard_before(self, step: int) -> None:
        """Reports that the batches of earlier steps are trained and need not be kept."""
        with suppress(zmq.Again):  # a thousand wait already: the orchestrator is gone
            self._done_wire.send(_encode(_Done(self._rank, step)), zmq.NOBLOCK)

    def _connected(self, *, immediate: bool) -> "zmq.Socket[bytes]":
        """A connected socket; with `immediate` it takes messages only while its connection stands."""
        wire = self._context.socket(zmq.DEALER)
        wire.linger = 1000
        wire.immediate = immediate
        secure_client(wire, self._key, max_bytes=_LARGEST_ANSWER)
        wire.connect(self._address)
        return wire


def _batch_of(frames: list[bytes]) -> RankBatch:
    """The batch in an answer of the orchestrator.

    Raises:
        TransportError: The answer is malformed, or a refusal.
    """
    if len(frames) != 2 or frames[0] not in (_BATCH, _REFUSED):
        raise TransportError(f"not an orchestrator's answer: {len(frames)} frames, the first is {frames[0][:16]!r}")
    if frames[0] == _REFUSED:
        raise TransportError(f"the orchestrator refuses: {frames[1][:1000].decode(errors='replace')}")
    return decode_rank_batch(frames[1])
