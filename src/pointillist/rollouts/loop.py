"""The event loop of a process that runs an environment: what the environment leaves on it can not end the process.

asyncio raises a `SystemExit` or `KeyboardInterrupt` of any task or callback out of the loop itself, and anything may
stop the loop. Rollouts are guarded where they are awaited (`executor`); tasks and callbacks that an environment starts
by itself are not, so the loop is entered again.
"""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any, Final

logger = logging.getLogger(__name__)

_CANCEL_SECONDS: Final = 10.0
_EXIT_SECONDS: Final = 30.0


def run(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, but only the end of `main`, or a signal, ends it.

    Tasks that are left then are cancelled, and waited for no longer than 10 seconds.

    Raises:
        KeyboardInterrupt: After SIGINT.
        BaseException: Whatever `main` raises.
    """
    runner = asyncio.Runner()  # not closed: that would wait for every task and thread, however long they take
    loop = runner.get_loop()
    work = loop.create_task(main)
    try:
        while True:
            try:
                return runner.run(_join(work))
            except (SystemExit, KeyboardInterrupt, RuntimeError) as error:
                if work.done() and not work.cancelled():
                    return work.result()
                if work.done() or work.cancelling():
                    raise
                logger.exception(
                    "%s on the event loop outside of any rollout, by a task or callback that the environment has "
                    "started: ignored",
                    type(error).__name__,
                )
    finally:
        _cancel_all(loop)
        loop.close()


def run_process(main: Coroutine[Any, Any, None]) -> None:
    """`run`, as the last thing that a process does: threads that never end do not keep it from ending."""
    code = 1
    try:
        run(main)
        code = 0
    finally:
        threading.Thread(target=_exit_later, args=(code,), name="exit", daemon=True).start()


async def _join(task: asyncio.Task[None]) -> None:
    await task


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    """Cancels what is left; code that ignores that is left where it is."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        try:
            loop.run_until_complete(asyncio.wait(left, timeout=_CANCEL_SECONDS))
        except (SystemExit, KeyboardInterrupt, RuntimeError):
            logger.exception("while cancelling what was left on the event loop")
    loop.run_until_complete(loop.shutdown_asyncgens())


def _exit_later(code: int) -> None:
    """The interpreter waits for all threads of pools, also for one in which an environment hangs."""
    time.sleep(_EXIT_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
