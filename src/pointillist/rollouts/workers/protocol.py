"""What orchestrator and environment workers say to each other: msgpack over ZMQ, typed, no pickle.

A worker connects, says `Hello`, and then answers: `Pong` to `Ping`, `Done` to `Run`. Its answers come from the event
loop that runs the rollouts, so an environment that blocks it is found out.
"""

from typing import Final

import msgspec

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


FromWorker = Hello | Pong | Done
ToWorker = Ping | Run
encode = msgspec.msgpack.Encoder().encode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
