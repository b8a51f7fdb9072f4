"""The orchestrator's end of the environment workers: starts them, spreads rollouts, replaces who dies or hangs."""

import asyncio
import logging
import os
import secrets
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from pointillist.base.channel import secure_listener
from pointillist.base.pools import READING
from pointillist.config import EnvWorkerConfig, OrchestratorConfig
from pointillist.environments.executor import RolloutRequest, RolloutResult, Split
from pointillist.environments.failures import RolloutFailure
from pointillist.environments.workers.protocol import (
    KEY_VARIABLE,
    MAX_BYTES,
    Begun,
    Done,
    FromWorker,
    Hello,
    Ping,
    Run,
    ToWorker,
    decode_from_worker,
    encode,
)
from pointillist.errors import EnvironmentLoadError, PointillistError, TransportError
from pointillist.runs.config_files import write_toml
from pointillist.runs.paths import RunPaths

logger = logging.getLogger(__name__)

_PING_SECONDS: Final = 1.0
_MAX_BACKOFF_SECONDS: Final = 30.0
_FAILED_STARTS: Final = 3
_LOG_LINES: Final = 15
_MARGIN_SECONDS: Final = 60.0
"""Beyond its own time limits that a worker may take to answer."""


@dataclass(slots=True)
class _Worker:
    """A worker process as the pool sees it."""

    number: int
    process: asyncio.subprocess.Process
    started: float
    identity: bytes = b""
    """Of its connection; empty until it has said hello."""
    heard: float = 0.0
    """When it last said something."""
    running: dict[str, tuple[str, asyncio.Future[RolloutResult]]] = field(default_factory=dict)
    """Rollout id: its group, and who waits for it."""
    answers: dict[str, str | None] = field(default_factory=dict)
    """Rollout id: the expected answer of its task."""


class WorkerPool:
    """Runs rollouts in worker processes."""

    def __init__(self, config: OrchestratorConfig) -> None:
        """Prepares; nothing is started yet."""
        self._config = config
        self._paths = RunPaths(config.output_dir.resolve())
        self._key = secrets.token_hex(32)
        self._workers: dict[int, _Worker] = {}
        self._tasks: dict[Split, list[str]] = {}
        self._changed = asyncio.Condition()
        self._background: set[asyncio.Task[None]] = set()
        self._failed_starts = 0
        self._patience = config.rollout_timeout + config.workers.heartbeat_timeout + _MARGIN_SECONDS
        self._failure: PointillistError | None = None

    async def start(self) -> None:
        """Starts the workers and waits for the first to be ready.

        Raises:
            EnvironmentLoadError: None of them can load the environment.
        """
        self._context = zmq.asyncio.Context()
        self._wire = self._context.socket(zmq.ROUTER)
        self._wire.linger = 0
        secure_listener(self._wire, self._key, max_bytes=MAX_BYTES)
        port = self._wire.bind_to_random_port("tcp://127.0.0.1")
        fields = {name: getattr(self._config, name) for name in EnvWorkerConfig.model_fields if name != "address"}
        self._config_path = self._paths.configs / "env_worker.toml"
        write_toml(EnvWorkerConfig(address=f"tcp://127.0.0.1:{port}", **fields), self._config_path)
        self._spawn(self._listen())
        self._spawn(self._watch())
        for number in range(self._config.workers.count):
            self._spawn(self._keep(number))
        await self._ready()

    async def task_ids(self, split: Split) -> list[str]:
        """Ids of the environment's tasks."""
        return self._tasks[split]

    async def run(self, request: RolloutRequest) -> RolloutResult:
        """Runs one rollout.

        Raises:
            EnvironmentLoadError: No worker can be had any more.
            TransportError: The pool itself has failed.
        """
        worker = await self._ready(request.group)
        future: asyncio.Future[RolloutResult] = asyncio.get_running_loop().create_future()
        worker.running[request.id] = (request.group, future)
        try:
            await self._send(worker, Run(request))
            await asyncio.wait({future}, timeout=self._patience)
            result = await future if future.done() else self._unanswered(worker, request)
            # Of a worker that died it is the pool that knows what it was at.
            task_id = self._tasks[request.split][request.index]
            answer = worker.answers.get(request.id) if result.answer is None else result.answer
            return msgspec.structs.replace(result, task_id=task_id, answer=answer)
        finally:
            worker.running.pop(request.id, None)
            worker.answers.pop(request.id, None)

    async def aclose(self) -> None:
        """Ends the workers."""
        for task in self._background:
            task.cancel()
        for worker in self._workers.values():
            with suppress(ProcessLookupError):
                worker.process.kill()
        await asyncio.gather(*self._background, return_exceptions=True)
        if hasattr(self, "_wire"):
            self._wire.close()
            self._context.term()

    def _unanswered(self, worker: _Worker, request: RolloutRequest) -> RolloutResult:
        """The worker lives and keeps its own time limits, so its answer has got lost; see its log."""
        message = f"environment worker {worker.number} has not answered within {self._patience:g} s; see its log"
        failure = RolloutFailure(kind="WorkerSilent", message=message, permanent=False)
        return RolloutResult(id=request.id, task_id="", failure=failure)

    async def _ready(self, group: str | None = None) -> _Worker:
        """A worker that is ready: the one with other rollouts of the group, else the one with the fewest."""
        async with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                ready = [worker for worker in self._workers.values() if worker.identity]
                if ready:
                    mates = [w for w in ready if any(other == group for other, _ in w.running.values())]
                    return mates[0] if mates else min(ready, key=lambda worker: len(worker.running))
                await self._changed.wait()

    async def _keep(self, number: int) -> None:
        """Keeps one worker running: starts it, waits for its end, starts the next."""
        log = self._paths.logs / f"env_worker_{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        backoff = 0.5
        while True:
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "pointillist", "env-worker", "@", str(self._config_path),
                    env={**os.environ, KEY_VARIABLE: self._key}, stdin=asyncio.subprocess.DEVNULL,
                    stdout=output, stderr=output,
                )  # fmt: skip
            worker = _Worker(number, process, started=time.monotonic())
            self._workers[number] = worker
            code = await process.wait()
            was_ready = bool(worker.identity)
            self._bury(worker, f"environment worker {number} ended with code {code}; see {log}")
            if was_ready:
                backoff = 0.5
            else:
                await self._count_failed_start(log)
                backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)
            await asyncio.sleep(backoff)

    def _bury(self, worker: _Worker, what: str) -> None:
        """Fails the rollouts of a worker that is gone; whoever asked for them tries again."""
        logger.warning("%s; %d rollouts are tried again", what, len(worker.running))
        worker.identity = b""
        for request_id, (_, future) in list(worker.running.items()):
            if not future.done():
                failure = RolloutFailure(kind="WorkerDied", message=what, permanent=False)
                future.set_result(RolloutResult(id=request_id, task_id="", failure=failure))

    async def _count_failed_start(self, log: Path) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS * self._config.workers.count:
            text = await READING.run(log.read_text, encoding="utf-8", errors="replace")
            lines = text.splitlines()[-_LOG_LINES:]
            async with self._changed:
                self._failure = EnvironmentLoadError("no environment worker starts; the last said: " + "\n".join(lines))
                self._changed.notify_all()

    async def _listen(self) -> None:
        while True:
            identity, *frames = await self._wire.recv_multipart()
            try:
                await self._heard(identity, decode_from_worker(frames))
            except TransportError as error:
                logger.warning("a message to the environment workers' pool is ignored: %s", error)

    async def _heard(self, identity: bytes, message: FromWorker) -> None:
        if isinstance(message, Hello):
            await self._greet(identity, message)
            return
        worker = next((worker for worker in self._workers.values() if worker.identity == identity), None)
        if worker is None:
            return
        worker.heard = time.monotonic()
        if isinstance(message, Begun) and message.id in worker.running:
            worker.answers[message.id] = message.answer
        if isinstance(message, Done) and message.result.id in worker.running:
            _, future = worker.running[message.result.id]
            if not future.done():
                future.set_result(message.result)

    async def _greet(self, identity: bytes, hello: Hello) -> None:
        worker = next((worker for worker in self._workers.values() if worker.process.pid == hello.pid), None)
        if worker is None:
            raise TransportError(f"hello from process {hello.pid}, which is not a worker of this pool")
        tasks: dict[Split, list[str]] = {"train": hello.train_ids, "eval": hello.eval_ids}
        async with self._changed:
            if self._tasks and self._tasks != tasks:
                self._failure = EnvironmentLoadError(
                    "environment workers have different tasks: the environment must give the same tasks each time it "
                    "is built with the same arguments"
                )
            self._tasks = tasks
            self._failed_starts = 0
            worker.identity, worker.heard = identity, time.monotonic()
            self._changed.notify_all()

    async def _watch(self) -> None:
        """Asks for signs of life; who gives none is killed, and so replaced."""
        limits = self._config.workers
        while True:
            await asyncio.sleep(_PING_SECONDS)
            now = time.monotonic()
            for worker in self._workers.values():
                if worker.process.returncode is not None:
                    continue
                silent = now - worker.heard if worker.identity else now - worker.started
                if silent > (limits.heartbeat_timeout if worker.identity else limits.startup_timeout):
                    logger.warning("environment worker %d gave no sign of life for %.0f s", worker.number, silent)
                    worker.process.kill()
                elif worker.identity:
                    await self._send(worker, Ping())

    async def _send(self, worker: _Worker, message: ToWorker) -> None:
        await self._wire.send_multipart([worker.identity, encode(message)])

    def _spawn(self, coroutine: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task of the pool that fails is a pool that fails: its rollouts would wait for ever."""
        self._background.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("the environment workers' pool has failed", exc_info=error)
        self._failure = self._failure or TransportError(f"the environment workers' pool has failed: {error!r}")
        for worker in self._workers.values():
            for _, future in worker.running.values():
                if not future.done():
                    future.set_exception(self._failure)
        self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
