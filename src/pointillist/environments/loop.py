"""The event loop of a process that runs an environment: what the environment leaves on it can not end the process.

asyncio raises a `SystemExit` or `KeyboardInterrupt` of any task or callback out of the loop itself, and anything may
stop the loop. Rollouts are guarded where they are awaited (`executor`); tasks and callbacks that an environment starts
by itself are not, so the loop is entered again. Code that blocks the loop is found by `LoopWatch`.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from types import FrameType
from typing import Final

from pointillist.errors import PointillistError, RolloutTimeoutError

logger = logging.getLogger(__name__)

_CANCEL_SECONDS: Final = 10.0
_EXIT_SECONDS: Final = 30.0
_SAY_SECONDS: Final = 10.0
_BEAT_SECONDS: Final = 1.0
_FRAMES: Final = 8
_SIGNAL: Final = signal.SIGUSR1

in_environment: ContextVar[bool] = ContextVar("in_environment", default=False)
"""Whether code runs for a rollout; tasks and callbacks that it starts inherit that."""


def run(main: Coroutine[object, object, None]) -> None:
    """`asyncio.run`, but only the end of `main`, or a signal, ends it.

    Tasks that are left then are cancelled, and waited for no longer than 10 seconds.

    Raises:
        KeyboardInterrupt: After SIGINT.
        PointillistError: The environment has cancelled `main` or a task that `main` waits for.
        BaseException: Whatever `main` raises.
    """
    runner = asyncio.Runner()  # not closed: that would wait for every task and thread, however long they take
    loop = runner.get_loop()
    work = loop.create_task(main)
    try:
        while True:
            try:
                return runner.run(_join(work))
            except asyncio.CancelledError:  # a signal's would be a KeyboardInterrupt here
                if not work.done():
                    continue
                raise PointillistError(
                    "the environment has cancelled tasks that are not its own, and with them this process; in workers "
                    "(orchestrator.workers.count) it would have ended one of these"
                ) from None
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


def run_process(main: Coroutine[object, object, None]) -> None:
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


class LoopWatch:
    """Finds code that blocks the event loop: says where, and interrupts a rollout that does so for too long.

    A thread looks whether the loop still beats. It interrupts by a signal: the handler runs in the loop's thread, in
    the frame that blocks, and so knows for sure that this is a rollout's.
    """

    def __init__(self, seconds: float) -> None:
        """Prepares.

        Args:
            seconds: For which a rollout may block the loop.
        """
        self._seconds = seconds
        self._every = min(_BEAT_SECONDS, seconds / 4)
        self._beat = time.monotonic()
        self._stopped = threading.Event()
        self._before: Callable[[int, FrameType | None], object] | int | signal.Handlers | None = None

    def start(self) -> None:
        """Watches the running loop, until `stop`."""
        self._beat = time.monotonic()
        self._thread = threading.get_ident()
        self._task = asyncio.get_running_loop().create_task(self._beats())
        if threading.current_thread() is threading.main_thread():  # others can have no handlers
            self._before = signal.signal(_SIGNAL, self._interrupt)
        threading.Thread(target=self._watch, name="loop-watch", daemon=True).start()

    def stop(self) -> None:
        """Ends it."""
        self._stopped.set()
        if hasattr(self, "_task"):
            self._task.cancel()
        if signal.getsignal(_SIGNAL) == self._interrupt:
            signal.signal(_SIGNAL, self._before)

    async def _beats(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(self._every)

    def _watch(self) -> None:
        said = 0.0
        while not self._stopped.wait(self._every):
            blocked = time.monotonic() - self._beat
            if blocked > _SAY_SECONDS and said != self._beat:
                said = self._beat
                frame = sys._current_frames().get(self._thread)
                where = "".join(traceback.format_list(traceback.extract_stack(frame)[-_FRAMES:]))
                logger.warning("the event loop is blocked for %.0f s, and all rollouts with it, in\n%s", blocked, where)
            if blocked > self._seconds and signal.getsignal(_SIGNAL) == self._interrupt:
                signal.pthread_kill(self._thread, _SIGNAL)

    def _interrupt(self, *_: object) -> None:
        if time.monotonic() - self._beat > self._seconds and in_environment.get():
            raise RolloutTimeoutError(f"blocked the event loop for longer than rollout_timeout = {self._seconds:g} s")
