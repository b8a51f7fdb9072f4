"""`pointillist env-worker`: runs an environment's rollouts for an orchestrator."""

import asyncio
import logging
import os
from typing import Final

import zmq
import zmq.asyncio

from pointillist.config import EnvWorkerConfig
from pointillist.rollouts.executor import Executor, RolloutRequest, RolloutResult
from pointillist.rollouts.failures import failure_of
from pointillist.rollouts.workers.protocol import (
    TOKEN_VARIABLE,
    Done,
    FromWorker,
    Hello,
    Ping,
    Pong,
    decode_to_worker,
    encode,
)
from pointillist.system import die_with_parent

logger = logging.getLogger(__name__)

_ORPHAN_SECONDS: Final = 60.0
"""Without a word from the orchestrator for so long, it is gone."""


async def serve(config: EnvWorkerConfig) -> None:
    """Serves until the orchestrator is gone.

    Raises:
        ConfigError: The model folder is unusable.
        EnvironmentLoadError: The environment can not be had.
    """
    die_with_parent()
    executor = Executor(config)
    await executor.start()
    context = zmq.asyncio.Context()
    wire = context.socket(zmq.DEALER)
    wire.linger = 0
    wire.connect(config.address)
    rollouts: set[asyncio.Task[None]] = set()

    async def send(message: FromWorker) -> None:
        await wire.send(encode(message))

    async def run(request: RolloutRequest) -> None:
        result = await executor.run(request)
        try:
            await send(Done(result))
        except Exception as error:  # the environment has put into the record what can not be sent
            failure = failure_of(error, permanent=True)
            await send(Done(RolloutResult(id=result.id, task_id=result.task_id, answer=result.answer, failure=failure)))

    try:
        token = os.environ.get(TOKEN_VARIABLE, "")
        await send(Hello(token, os.getpid(), await executor.task_ids("train"), await executor.task_ids("eval")))
        while await wire.poll(_ORPHAN_SECONDS * 1000):
            message = decode_to_worker(await wire.recv())
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
