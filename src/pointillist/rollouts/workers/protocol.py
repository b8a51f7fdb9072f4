"""What orchestrator and environment workers say to each other: compressed msgpack over ZMQ, typed, no pickle.

A worker connects, says `Hello`, and then answers: `Pong` to `Ping`, `Done` to `Run`. Its answers come from the event
loop that runs the rollouts, so an environment that blocks it is found out.
"""

import zlib
from typing import Final, TypeVar

import msgspec

from pointillist.errors import TransportError
from pointillist.rollouts.executor import RolloutRequest, RolloutResult

TOKEN_VARIABLE: Final = "POINTILLIST_WORKER_TOKEN"  # noqa: S105 - a name
"""Environment variable by which the orchestrator tells its workers what to say in `Hello`."""


class Hello(msgspec.Struct, tag=True):
    """A worker is ready."""

    token: str
    pid: int
    train_ids: list[str]
    eval_ids: list[str]


class Pong(msgspec.Struct, tag=True):
    """A worker is alive."""


class Done(msgspec.Struct, tag=True):
    """A rollout is over."""

    result: RolloutResult


class Ping(msgspec.Struct, tag=True):
    """Is the worker alive? Also tells the worker that the orchestrator is."""


class Run(msgspec.Struct, tag=True):
    """Run a rollout."""

    request: RolloutRequest


T = TypeVar("T")
FromWorker = Hello | Pong | Done
ToWorker = Ping | Run
_encoder = msgspec.msgpack.Encoder()
_from_worker: "msgspec.msgpack.Decoder[FromWorker]" = msgspec.msgpack.Decoder(FromWorker)
_to_worker: "msgspec.msgpack.Decoder[ToWorker]" = msgspec.msgpack.Decoder(ToWorker)


def encode(message: FromWorker | ToWorker) -> bytes:
    """Bytes of a message; compressed, since an image's placeholders are the same token thousands of times."""
    return zlib.compress(_encoder.encode(message), level=1)


def decode_from_worker(data: bytes) -> FromWorker:
    """What a worker said.

    Raises:
        TransportError: Not a worker's message.
    """
    return _decode(_from_worker, data, "a worker's")


def decode_to_worker(data: bytes) -> ToWorker:
    """What the orchestrator said.

    Raises:
        TransportError: Not an orchestrator's message.
    """
    return _decode(_to_worker, data, "an orchestrator's")


def _decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes, whose: str) -> T:
    try:
        return decoder.decode(zlib.decompress(data))
    except (zlib.error, msgspec.MsgspecError) as error:
        raise TransportError(f"not {whose} message ({error})") from None
