"""The embedded engine: one thread that owns the model, admits requests, decodes, and takes new weights in between.

Requests come from any thread (`submit`) and are answered through futures. The loop is: take commands (weights,
aborts), admit waiting requests, decode one token for every running sequence, repeat. A group's completions (`n`) and
equal prompts that are admitted together share one prefill, vision tower included. New weights are loaded between two
decoding steps: requests in flight go on, and each completion says which version sampled which of its tokens.

A request that cannot be served fails alone. What raises while several are computed together is computed again for each
by itself; those that raise again fail, the others go on. Only an engine whose device does not answer any more ends.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from pointillist.config.inference import EngineConfig
from pointillist.errors import InferenceError
from pointillist.inference.embedded.batch import Prompt, RunningBatch, decode, prefill
from pointillist.inference.embedded.metrics import EngineMetrics
from pointillist.inference.embedded.sampling import Sampled, draw_noise, sample
from pointillist.inference.protocol import Choice, LogProb, LogProbs, LogProbsContent, SamplingParams, WeightVersionSpan
from pointillist.models import LoadedModel
from pointillist.pixels.on_device import PixelNormalizer
from pointillist.weights.load import check_weights, copy_weights, largest_file, read_weights

logger = logging.getLogger(__name__)

ShareKey: TypeAlias = tuple[tuple[int, ...], tuple[str, ...]]
"""Token ids of a prompt and the hashes of its images."""


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One prompt and its `n` completions."""

    prompt: Prompt
    share_key: ShareKey
    """Requests with equal keys have equal prompts and images."""
    params: SamplingParams
    max_tokens: int
    future: Future[list[Choice]] = field(default_factory=Future)
    prefilled: Future[None] = field(default_factory=Future)
    """Done once the prompt has been read, or never will be: its image tensors are no longer needed."""
    id: str = ""
    """Request id, for logs."""
    choices: dict[int, Choice] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Sequence:
    """One completion in the making: a row of the running batch."""

    request: EngineRequest
    index: int
    generator: torch.Generator
    logits_version: int
    """Weights that computed the logits which its next token is sampled from."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogProbsContent] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class Engine:
    """Continuously batching sampler; `start` it, `submit` requests, `stop` it."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        *,
        alone: bool,
        eos_token_ids: frozenset[int],
        seed: int,
        metrics: EngineMetrics,
        on_failure: Callable[[], None],
    ) -> None:
        """Takes over the model.

        Args:
            loaded: The model; only this engine may use it from now on.
            config: Batch size and admission.
            alone: Whether each sequence is decoded by itself, so that no number depends on what else is in flight.
            eos_token_ids: Tokens that end every completion.
            seed: Seed from which requests without one draw theirs.
            metrics: Counters that the engine keeps.
            on_failure: Callback for the end of the engine's thread by an error, after all requests have failed. Only
                what no request causes ends it, such as a device that does not answer.
        """
        self._loaded = loaded
        self._normalize = PixelNormalizer(loaded.family).to(loaded.device)
        self._config = config
        self._alone = alone
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._on_failure = on_failure
        self._largest_weights = largest_file({name: each.shape for name, each in loaded.model.state_dict().items()})
        self._seeds = torch.Generator().manual_seed(seed)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[EngineRequest] = deque()
        self._admitting: list[EngineRequest] = []
        """Requests that are neither waiting nor in the batch: their prompts are being read."""
        self._rows: list[_Sequence] = []
        self._batch: RunningBatch | None = None
        self._next: deque[tuple[_Sequence, RunningBatch]] = deque()
        """Sequences that have been read and wait to be decoded alone."""
        self._paused = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.weight_version = 0
        self.failure: BaseException | None = None
        """Why the engine thread died; None while it lives."""

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the engine's thread; requests in flight are aborted."""
        self._command(self._stop).result()
        self._thread.join()

    def submit(self, request: EngineRequest) -> Future[list[Choice]]:
        """Queues a request; its future gives the choices in order of index."""
        self._put(lambda: self._waiting.append(request))
        return request.future

    def abort(self, request: EngineRequest) -> None:
        """Gives up on a request whose client has gone."""
        request.future.cancel()
        self._put(lambda: self._drop(request))

    def pause(self) -> None:
        """Stops decoding after the current step; requests are kept."""
        self._command(lambda: setattr(self, "_paused", True)).result()

    def resume(self) -> None:
        """Goes on decoding."""
        self._command(lambda: setattr(self, "_paused", False)).result()

    @property
    def is_paused(self) -> bool:
        """Whether decoding is paused."""
        return self._paused

    def update_weights(self, folder: Path, version: int) -> None:
        """Loads a weight version between two decoding steps.

        Raises:
            InferenceError: The weights do not fit; the old ones serve on.
        """
        # In the caller's thread: the engine only copies.
        weights = read_weights(folder, max_bytes=self._largest_weights)
        check_weights(self._loaded.model, weights)

        def swap() -> None:
            copy_weights(self._loaded.model, weights)
            self.weight_version = version
            self._metrics.weight_version.set(version)

        self._command(swap).result()

    # The engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._config.num_threads)
        try:
            while True:
                self._take_commands()
                if self._stopping:
                    return
                if self._paused or not (self._waiting or self._rows or self._next):
                    self._wait_for_command()
                    continue
                self._admit()
                try:
                    self._step()
                except Exception as error:
                    self._check_device()
                    self._fail_running(error)
        except BaseException as error:  # whatever it was, no request may wait for ever
            logger.exception("engine thread died")
            self.failure = error
            self._fail_all(error)
            self._on_failure()

    def _command(self, action: Callable[[], None]) -> Future[None]:
        """Runs something in the engine's thread."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._put(run)
        return done

    def _put(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self.failure is not None:  # no thread reads the queue any more
            self._fail_all(self.failure)

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._run_command()

    def _run_command(self) -> None:
        try:
            self._commands.get()()
        except Exception as error:  # a request could not be taken out of the batch
            self._check_device()
            self._fail_running(error)

    def _wait_for_command(self) -> None:
        self._run_command()
        # A burst of requests is on its way together: one prefill for all of them.
        time.sleep(self._config.admission_window)

    def _stop(self) -> None:
        self._stopping = True
        for request in [*self._waiting, *{sequence.request for sequence in self._sequences()}]:
            request.future.cancel()

    def _drop(self, request: EngineRequest) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        self._next = deque(item for item in self._next if item[0].request is not request)
        self._keep([row for row, sequence in enumerate(self._rows) if sequence.request is not request])

    def _fail(self, request: EngineRequest, error: BaseException) -> None:
        """Answers a request with an error; its other completions are dropped when their turn comes."""
        logger.error("request %s failed", request.id, exc_info=error)
        with suppress(InvalidStateError):  # given up meanwhile, or failed already
            request.future.set_exception(InferenceError(f"the engine could not compute it ({error!r:.300})"))
        with suppress(InvalidStateError):
            request.prefilled.set_result(None)

    def _fail_all(self, error: BaseException) -> None:
        self._take_commands()  # requests among them
        running = {sequence.request for sequence in self._sequences()}
        for request in [*self._waiting, *self._admitting, *running]:
            with suppress(InvalidStateError):
                request.future.set_exception(RuntimeError(f"engine died: {error!r}"))
        self._waiting.clear()
        self._admitting.clear()
        self._rows.clear()
        self._next.clear()

    def _fail_running(self, error: BaseException) -> None:
        """Fails all that is being decoded, where the error does not say which request caused it."""
        for request in {sequence.request for sequence in self._sequences()}:
            self._fail(request, error)
        self._rows, self._batch, self._next = [], None, deque()

    def _sequences(self) -> list[_Sequence]:
        return [*self._rows, *(sequence for sequence, _ in self._next)]

    def _admit(self) -> None:
        """Moves waiting requests into the batch, in order, while there is room; equal prompts are read once."""
        if self._alone and (self._rows or self._next):
            self._take_next()
            return
        admitted = self._admitting = []
        room = self._config.max_batch_size - len(self._rows)
        while self._waiting and self._waiting[0].params.n <= room:
            request = self._waiting.popleft()
            if request.future.cancelled():
                continue
            admitted.append(request)
            room -= request.params.n
            if self._alone:
                break
        if not admitted:
            return
        try:
            self._read(admitted)
        except Exception:
            self._check_device()
            for request in admitted:
                self._read_alone(request)
        self._admitting = []

    def _read_alone(self, request: EngineRequest) -> None:
        try:
            self._read([request])
        except Exception as error:
            self._check_device()
            self._fail(request, error)

    def _read(self, admitted: list[EngineRequest]) -> None:
        """Reads the prompts of some requests and joins them to the batch; all of them or, if it raises, none.

        Example:
            Prompts A (`n = 2`), B (`n = 1`) and A again (`n = 1`): two prompts are read, rows are A, A, B, A.
        """
        unique: dict[ShareKey, int] = {}
        prompts: list[Prompt] = []
        rows: list[int] = []
        sequences: list[_Sequence] = []
        for request in admitted:
            if request.share_key not in unique:
                unique[request.share_key] = len(prompts)
                prompts.append(request.prompt)
            rows += [unique[request.share_key]] * request.params.n
            sequences += [
                _Sequence(request, i, self._generator(request.params, i), self.weight_version)
                for i in range(request.params.n)
            ]
        new = prefill(self._loaded, self._normalize, prompts).select(rows)
        if self._alone:
            self._next.extend((sequence, new.select([row])) for row, sequence in enumerate(sequences))
            self._take_next()
        else:
            self._batch = new if self._batch is None else self._batch.join(new)
            self._rows += sequences
        for request in admitted:
            request.prompt = replace(request.prompt, tensors={})
            request.prefilled.set_result(None)
        self._metrics.prefilled(len(prompts), sum(len(p.token_ids) for p in prompts), len(rows))

    def _take_next(self) -> None:
        while not self._rows and self._next:
            sequence, batch = self._next.popleft()
            if not sequence.request.future.done():  # another of its completions has failed
                self._rows, self._batch = [sequence], batch

    def _step(self) -> None:
        """Samples one token for every row, ends those that are done, and reads the others' tokens."""
        if self._batch is None:
            return
        sampled = self._sample(self._batch, self._rows)
        going: list[int] = []
        for row, sequence in enumerate(self._rows):
            if sequence.request.future.done():
                continue
            try:
                finish = self._appended(sequence, row, sampled)
                if finish is not None:
                    self._finish(sequence, *finish)
            except Exception as error:
                self._fail(sequence.request, error)
                continue
            if finish is None:
                going.append(row)
        self._metrics.sampled(len(self._rows))
        # All completions of a request fail together, whichever came first.
        going = [row for row in going if not self._rows[row].request.future.done()]
        tokens = sampled.token_ids[going]
        self._keep(going)
        if self._batch is not None:
            self._decode(self._batch, tokens)
            for sequence in self._rows:
                sequence.logits_version = self.weight_version
        self._metrics.queues(len(self._rows), len(self._waiting))

    def _sample(self, batch: RunningBatch, sequences: Sequence[_Sequence]) -> Sampled:
        noise = draw_noise([sequence.generator for sequence in sequences])
        params = [sequence.request.params for sequence in sequences]
        masked = self._loaded.unsampleable
        try:
            together = sample(batch.logits, masked, params, noise)
        except Exception:
            self._check_device()
        else:
            return together
        parts: list[Sampled] = []
        for row, sequence in enumerate(sequences):
            try:
                parts.append(sample(batch.logits[row : row + 1], masked, params[row : row + 1], noise[row : row + 1]))
            except Exception as error:
                self._check_device()
                self._fail(sequence.request, error)
                parts.append(Sampled(torch.zeros(1, dtype=torch.int64), torch.zeros(1, batch.logits.shape[1]), [False]))
        return Sampled(
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.logprobs for part in parts]),
            [usable for part in parts for usable in part.usable],
        )

    def _decode(self, batch: RunningBatch, tokens: torch.Tensor) -> None:
        """Reads one more token a row; rows that cannot be computed leave the batch."""
        try:
            self._batch = decode(self._loaded, batch, tokens)
            return
        except Exception:
            self._check_device()
        going: list[_Sequence] = []
        joined: RunningBatch | None = None
        for row, sequence in enumerate(self._rows):
            if sequence.request.future.done():
                continue
            try:
                alone = decode(self._loaded, batch.select([row]), tokens[row : row + 1])
                joined = alone if joined is None else joined.join(alone)
                going.append(sequence)
            except Exception as error:
                self._check_device()
                self._fail(sequence.request, error)
        self._rows, self._batch = going, joined

    def _check_device(self) -> None:
        """Asks the device for a sum after something has raised: a request is at fault only if the device is not.

        Raises:
            RuntimeError: It does not compute any more; a CUDA device does not recover within its process.
        """
        if int(torch.ones(2, device=self._loaded.device).sum()) != 2:
            raise RuntimeError(f"device {self._loaded.device} does not compute")

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self._rows):
            return
        batch = self._batch.select(rows) if rows and self._batch is not None else None
        self._rows, self._batch = [self._rows[row] for row in rows], batch

    def _appended(
        self, sequence: _Sequence, row: int, sampled: Sampled
    ) -> tuple[Literal["stop", "length"], int | None] | None:
        """Adds the sampled token; why the completion ends with it, or None if it goes on."""
        if not sampled.usable[row]:
            raise ArithmeticError("the model's logits are not finite")
        token = int(sampled.token_ids[row])
        sequence.token_ids.append(token)
        sequence.versions.append(sequence.logits_version)
        if (count := sequence.request.params.logprobs) is not None:
            sequence.logprobs.append(_logprobs_content(token, sampled.logprobs[row], count))
        return self._finish_of(sequence)

    def _finish_of(self, sequence: _Sequence) -> tuple[Literal["stop", "length"], int | None] | None:
        token, params = sequence.token_ids[-1], sequence.request.params
        if token in params.stop_token_ids:
            return "stop", token
        if token in self._eos_token_ids and not params.ignore_eos:
            return "stop", None
        if len(sequence.token_ids) >= sequence.request.max_tokens:
            return "length", None
        return None

    def _finish(self, sequence: _Sequence, reason: Literal["stop", "length"], stop_reason: int | None) -> None:
        request = sequence.request
        request.choices[sequence.index] = Choice(
            index=sequence.index,
            finish_reason=reason,
            stop_reason=stop_reason,
            token_ids=sequence.token_ids,
            logprobs=LogProbs(content=sequence.logprobs) if request.params.logprobs is not None else None,
            weight_versions=_spans(sequence.versions),
        )
        if len(request.choices) == request.params.n:
            with suppress(InvalidStateError):  # cancelled meanwhile
                request.future.set_result([request.choices[index] for index in range(request.params.n)])

    def _generator(self, params: SamplingParams, index: int) -> torch.Generator:
        if params.seed is None:
            seed = int(torch.randint(2**62, (1,), generator=self._seeds))
        else:
            seed = (params.seed + index) % 2**63
        return torch.Generator().manual_seed(seed)


def _logprobs_content(token: int, logprobs: torch.Tensor, count: int) -> LogProbsContent:
    """A sampled token, its rank among all, and the `count` likeliest ones, from logprobs `(V,)`."""
    own = float(logprobs[token])
    rank = int((logprobs > own).sum()) + 1
    top = logprobs.topk(count) if count else None
    alternatives = [] if top is None else zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return LogProbsContent(
        token_id=token,
        logprob=own,
        rank=rank,
        top_logprobs=[
            LogProb(token_id=other, logprob=value, rank=place)
            for place, (other, value) in enumerate(alternatives, start=1)
            if value > float("-inf")
        ],
    )


def _spans(versions: list[int]) -> list[WeightVersionSpan]:
    """Runs of tokens that one weight version sampled.

    Example:
        Versions `3 3 4`: version 3 from token 0 to 2, version 4 from token 2 to 3 (ends are exclusive).
    """
    spans: list[WeightVersionSpan] = []
    for index, version in enumerate(versions):
        if spans and spans[-1].version == str(version):
            spans[-1].end = index + 1
        else:
            spans.append(WeightVersionSpan(version=str(version), start=index, end=index + 1))
    return spans
