"""What orchestrator and environment workers say to each other: compressed msgpack over ZMQ, typed, no pickle.

Only processes with the pool's key can connect (`pointillist.base.channel`). A worker says `Hello`, and then answers:
`Pong` to `Ping`, `Begun` and later `Done` to `Run`. Its answers come from the event loop that runs the rollouts, so an
environment that blocks it is found out.
"""

import zlib
from typing import Final, TypeVar

import msgspec

from pointillist.base.channel import decode, decompress, one_frame
from pointillist.environments.executor import RolloutRequest, RolloutResult
from pointillist.errors import TransportError

KEY_VARIABLE: Final = "POINTILLIST_WORKER_KEY"
"""Environment variable by which the orchestrator tells its workers the key of their connection."""

MAX_BYTES: Final = 64 * 1024**2
"""Of a message as it travels."""

_MAX_UNPACKED_BYTES: Final = 512 * 1024**2


class Hello(msgspec.Struct, tag=True):
    """A worker is ready."""

    pid: int
    train_ids: list[str]
    eval_ids: list[str]


class Pong(msgspec.Struct, tag=True):
    """A worker is alive."""


class Begun(msgspec.Struct, tag=True):
    """A rollout begins: what is said of it should the worker die."""

    id: str
    answer: str | None
    """The task's expected one."""


class Done(msgspec.Struct, tag=True):
    """A rollout is over."""

    result: RolloutResult


class Ping(msgspec.Struct, tag=True):
    """Is the worker alive? Also tells the worker that the orchestrator is."""


class Run(msgspec.Struct, tag=True):
    """Run a rollout."""

    request: RolloutRequest


T = TypeVar("T")
FromWorker = Hello | Pong | Begun | Done
ToWorker = Ping | Run
_encoder = msgspec.msgpack.Encoder()
_from_worker: "msgspec.msgpack.Decoder[FromWorker]" = msgspec.msgpack.Decoder(FromWorker)
_to_worker: "msgspec.msgpack.Decoder[ToWorker]" = msgspec.msgpack.Decoder(ToWorker)


def encode(message: FromWorker | ToWorker) -> bytes:
    """Bytes of a message; compressed, since an image's placeholders are the same token thousands of times.

    Raises:
        TransportError: The other end would refuse a message of this size.
    """
    raw = _encoder.encode(message)
    data = zlib.compress(raw, level=1) if len(raw) <= _MAX_UNPACKED_BYTES else b""
    if not data or len(data) > MAX_BYTES:
        raise TransportError(
            f"{type(message).__name__} has {len(raw)} bytes, {len(data) or 'not'} compressed; expected at most "
            f"{_MAX_UNPACKED_BYTES}, {MAX_BYTES} compressed"
        )
    return data


def decode_from_worker(frames: list[bytes]) -> FromWorker:
    """What a worker said.

    Args:
        frames: Of the message, without its routing id.

    Raises:
        TransportError: Not a worker's message.
    """
    return _decode(_from_worker, frames, "a worker's message")


def decode_to_worker(frames: list[bytes]) -> ToWorker:
    """What the orchestrator said.

    Args:
        frames: Of the message.

    Raises:
        TransportError: Not an orchestrator's message.
    """
    return _decode(_to_worker, frames, "an orchestrator's message")


def _decode(decoder: "msgspec.msgpack.Decoder[T]", frames: list[bytes], what: str) -> T:
    raw = decompress(one_frame(frames, what), max_bytes=_MAX_UNPACKED_BYTES, what=what)
    return decode(decoder, raw, what)
