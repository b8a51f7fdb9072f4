"""`pointillist env-worker`: runs an environment's rollouts for an orchestrator."""

import asyncio
import logging
import os
from typing import Final

import zmq
import zmq.asyncio

from pointillist.base.channel import secure_client
from pointillist.base.net import key_from_environment
from pointillist.base.system import die_with_parent
from pointillist.config import EnvWorkerConfig
from pointillist.environments.executor import Executor, RolloutRequest, RolloutResult
from pointillist.environments.failures import failure_of
from pointillist.environments.workers.protocol import (
    KEY_VARIABLE,
    MAX_BYTES,
    Begun,
    Done,
    FromWorker,
    Hello,
    Ping,
    Pong,
    decode_to_worker,
    encode,
)

logger = logging.getLogger(__name__)

_ORPHAN_SECONDS: Final = 60.0
"""Without a word from the orchestrator for so long, it is gone."""


async def serve(config: EnvWorkerConfig) -> None:
    """Serves until the orchestrator is gone.

    Raises:
        ConfigError: The model folder is unusable, or the worker has no key.
        EnvironmentLoadError: The environment cannot be loaded.
        TransportError: The orchestrator's message is malformed.
    """
    die_with_parent()
    key = key_from_environment(KEY_VARIABLE, "the key of the workers' pool, which the orchestrator sets")
    del os.environ[KEY_VARIABLE]  # the programs that an environment starts have no use for it
    executor = Executor(config)
    await executor.start()
    context = zmq.asyncio.Context()
    wire = context.socket(zmq.DEALER)
    wire.linger = 0
    secure_client(wire, key, max_bytes=MAX_BYTES)
    wire.connect(config.address)
    rollouts: set[asyncio.Task[None]] = set()

    async def send(message: FromWorker) -> None:
        await wire.send(encode(message))

    async def run(request: RolloutRequest) -> None:
        await send(Begun(request.id, executor.answer(request.split, request.index)))
        result = await executor.run(request)
        try:
            data = encode(Done(result))
        except Exception as error:  # the environment has put into the record what cannot be sent
            failure = failure_of(error, permanent=True)
            empty = RolloutResult(id=result.id, task_id=result.task_id, answer=result.answer, failure=failure)
            data = encode(Done(empty))
        await wire.send(data)

    try:
        await send(Hello(os.getpid(), await executor.task_ids("train"), await executor.task_ids("eval")))
        while await wire.poll(_ORPHAN_SECONDS * 1000):
            message = decode_to_worker(await wire.recv_multipart())
            if isinstance(message, Ping):
                await send(Pong())
                continue
            task = asyncio.create_task(run(message.request))
            rollouts.add(task)
            task.add_done_callback(rollouts.discard)
        logger.warning("the orchestrator has said nothing for %.0f s: ending", _ORPHAN_SECONDS)
    finally:
        for task in rollouts:
            task.cancel()
        await executor.aclose()
        wire.close()
        context.term()
