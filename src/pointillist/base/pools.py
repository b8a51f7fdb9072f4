"""Thread pools by purpose, so that work of one kind never waits for threads that work of another kind holds.

`asyncio.to_thread` has one pool for everything that an event loop hands to threads. An environment may hold all of it:
a synchronous agent waits in a thread for the gateway's answer. If the gateway waited for that pool too, neither would
ever go on. So the loop's own pool belongs to environments (`give_threads_to_environments`), and each thing that
Pointillist does in a thread has a pool of its own. Threads are made when they are needed first.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_THREADS_A_ROLLOUT: Final = 4
_CORES: Final = os.cpu_count() or 1


class Pool:
    """Threads for one purpose; every event loop of the process may use them."""

    def __init__(self, name: str, threads: int) -> None:
        """Prepares; no thread is started yet.

        Args:
            name: Prefix of the threads' names.
            threads: At most so many at once.
        """
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function in one of the threads and waits for what it returns."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))


READING: Final = Pool("reading", _CORES + 4)
"""Bodies and messages become conversations, and their pictures are stored."""
WRITING: Final = Pool("writing", _CORES)
"""Long prompts are rendered, and long answers parsed and encoded."""
SENDING: Final = Pool("sending", 2)
"""Batches go to the trainer; this may wait for the trainer."""
RESOLVING: Final = Pool("resolving", 2)
"""Names of inference servers become addresses."""


def give_threads_to_environments(count: int) -> None:
    """Sizes the running loop's own pool, which `asyncio.to_thread` of environments uses.

    Args:
        count: Rollouts in flight: each may hold a few threads, one an agent, while they wait for the policy.
    """
    threads = ThreadPoolExecutor(_THREADS_A_ROLLOUT * count + _CORES + 4, thread_name_prefix="environment")
    asyncio.get_running_loop().set_default_executor(threads)
