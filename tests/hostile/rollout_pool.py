"""A process with environment workers over the digits environment, which asks for a rollout every quarter of a second.

    python -m tests.hostile.rollout_pool LOG CONFIG.toml

It is its own honest client: LOG has the lines of `tests.hostile.prober`.
"""

import asyncio
import logging
import sys
import time
from itertools import count
from pathlib import Path

from pointillist.config import OrchestratorConfig
from pointillist.environments.executor import RolloutRequest
from pointillist.environments.workers import WorkerPool
from pointillist.runs.config_files import load_toml
from pointillist.sessions import Sampling
from tests.hostile.prober import SECONDS, Log


async def serve(config: OrchestratorConfig, log: Log) -> None:
    """Runs rollouts until it is killed."""
    pool = WorkerPool(config)
    await pool.start()
    print("ready", flush=True)
    for number in count():
        begun = time.monotonic()
        log.note("begun")
        request = RolloutRequest(
            id=f"1.0.{number}",
            group=f"1.{number}",
            split="train",
            index=number % 50,
            sampling=Sampling(max_tokens=2),
            seed=number,
        )
        result = await pool.run(request)
        log.note("done", time.monotonic() - begun, result.failure.message if result.failure else "")
        await asyncio.sleep(max(0.0, SECONDS - (time.monotonic() - begun)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve(load_toml(OrchestratorConfig, Path(sys.argv[2])), Log(Path(sys.argv[1]))))
