"""`pointillist gateway`: sessions that are opened and closed over HTTP, for agents outside of a run."""

import asyncio
import itertools
import logging
import secrets

from pointillist.config import GatewayServerConfig
from pointillist.sessions.factory import SessionFactory, sampling_of
from pointillist.sessions.gateway.server import Gateway
from pointillist.sessions.session import Session

logger = logging.getLogger(__name__)

_SEEDS_PER_SESSION = 1_000


async def serve(config: GatewayServerConfig) -> None:
    """Serves until the process is told to stop.

    Raises:
        ConfigError: The model folder is unusable, the address can not be had, or a key is not set.
    """
    sessions = SessionFactory.from_config(config)
    seeds = itertools.count(secrets.randbits(31), _SEEDS_PER_SESSION)

    def open_session() -> Session:
        return sessions.open(sampling_of(config.sampling), next(seeds))

    gateway = Gateway(config.gateway, sessions.model_name, open_session)
    await sessions.client.wait_until_ready(config.client.startup_timeout)
    await gateway.start()
    logger.info("serving sessions on %s", gateway.url)
    try:
        await asyncio.Event().wait()
    finally:
        await gateway.aclose()
        await sessions.client.aclose()
