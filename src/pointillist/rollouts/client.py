"""The environment side's client of the inference server.

Rollouts of one group begin with the same prompt. Requests for the same prompt that are made within a moment of each
other and whose seeds follow one another are sent as one request with `n` completions: choice `i` is sampled with
`seed + i`, as vLLM defines it, so what a rollout gets does not depend on whether it was sent alone.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Literal

import aiohttp
import msgspec
import tenacity

from pointillist.errors import ConfigError, InferenceError
from pointillist.render.raw import RenderedPrompt

Wire = Literal["mmraw", "content_parts"]
"""How images are named to the server: by references that say everything, or by URLs whose layout it computes."""

_GATHER_SECONDS: Final = 0.001
_NEVER: Final = -100.0
"""The lowest bias on a logit that vLLM takes: a probability of e^-100."""
_READY_POLL_SECONDS: Final = 0.1
_KEEPALIVE_SECONDS: Final = 4.0
"""Idle connections are closed by us before uvicorn closes them (5 s) under a request."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the server sampled."""

    token_ids: list[int]
    logprobs: list[float]
    """Per token, at the sampling temperature."""
    weight_versions: list[int]
    """Per token."""
    finish_reason: str
    """`stop` or `length`."""


@dataclass(slots=True)
class _Waiting:
    """Requests for one prompt that are about to be sent."""

    prompt: RenderedPrompt
    body: dict[str, Any]
    requests: list[tuple[int, asyncio.Future[Completion]]] = field(default_factory=list)


class InferenceClient:
    """Asynchronous client; one an event loop, closed with `aclose`."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key_var: str | None = None,
        timeout: float = 600.0,
        wire: Wire = "mmraw",
        unsampleable: Sequence[int] = (),
    ) -> None:
        """Opens the connection pool.

        Args:
            base_url: Address of the server.
            api_key_var: Name of the environment variable that holds the API key.
            timeout: Seconds that one request may take.
            wire: How images are named. `content_parts` is for a vLLM without Pointillist's plugin: pixels are then the
                engine's own, and what it says of tokens and placeholders must be what was rendered here.
            unsampleable: Tokens that such an engine is told not to sample; servers with the plugin know them.

        Raises:
            ConfigError: The variable is not set.
        """
        self._base_url = base_url
        self._headers = {"Content-Type": "application/json"}
        if api_key_var:
            self._headers["Authorization"] = f"Bearer {api_key(api_key_var)}"
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=10.0)
        self._session: aiohttp.ClientSession | None = None
        self._wire = wire
        self._bias = {str(token): _NEVER for token in unsampleable}
        self._waiting: dict[bytes, _Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def wait_until_ready(self, seconds: float) -> None:
        """Waits until the server is healthy.

        Raises:
            InferenceError: It is not after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self._http.get("/health", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
                    if response.status == HTTPStatus.OK:
                        return
            if time.monotonic() > deadline:
                raise InferenceError(
                    f"inference server at {self._base_url} is not healthy after {seconds:.0f} s "
                    "(orchestrator.client.startup_timeout)"
                )
            await asyncio.sleep(_READY_POLL_SECONDS)

    async def generate(
        self, prompt: RenderedPrompt, sampling_params: Mapping[str, Any], seed: int, *, wait: bool = True
    ) -> Completion:
        """Samples one completion.

        Args:
            prompt: What is read.
            sampling_params: As vLLM names them, without `n` and `seed`.
            seed: Of this completion.
            wait: Whether to wait a moment for others with the same prompt; those of the same moment are joined anyway.

        Raises:
            InferenceError: The server refused or failed the request, can not be reached, or reads other tokens than
                were rendered.
        """
        params = dict(sampling_params) if self._wire == "mmraw" else {**sampling_params, "logit_bias": self._bias}
        body = {**self._prompt_fields(prompt), "sampling_params": params}
        key = msgspec.json.encode(body)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        if key not in self._waiting:
            self._waiting[key] = _Waiting(prompt, body)
            self._start(self._send_gathered(key, _GATHER_SECONDS if wait else 0))
        self._waiting[key].requests.append((seed, future))
        return await future

    def _prompt_fields(self, prompt: RenderedPrompt) -> dict[str, Any]:
        if self._wire == "mmraw":
            return {"token_ids": prompt.token_ids, "features": prompt.features()}
        parts = [{"type": "image_url", "url": image.descriptor.raw_image_uri} for image in prompt.images]
        return {"token_ids": prompt.logical_ids, "content_parts": parts or None, "return_token_ids": True}

    async def update_weights(self, weight_dir: str, version: int) -> None:
        """Tells the server to load a weight version from a folder.

        Raises:
            InferenceError: The server kept its old weights; the message says why.
        """
        await self._post("/update_weights", {"weight_dir": weight_dir, "weight_version": version})

    async def aclose(self) -> None:
        """Closes all connections."""
        for task in self._tasks:
            task.cancel()
        if self._session is not None:
            await self._session.close()

    @property
    def _http(self) -> aiohttp.ClientSession:
        """Opened at the first request, since it belongs to the event loop that is then running."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS)
            self._session = aiohttp.ClientSession(
                self._base_url, headers=self._headers, timeout=self._timeout, connector=connector
            )
        return self._session

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_gathered(self, key: bytes, seconds: float) -> None:
        await asyncio.sleep(seconds)
        waiting = self._waiting.pop(key)
        waiting.requests.sort(key=lambda request: request[0])
        run: list[tuple[int, asyncio.Future[Completion]]] = []
        for request in waiting.requests:
            if run and request[0] != run[-1][0] + 1:
                self._start(self._send(waiting, run))
                run = []
            run.append(request)
        await self._send(waiting, run)

    async def _send(self, waiting: _Waiting, run: list[tuple[int, asyncio.Future[Completion]]]) -> None:
        body = waiting.body
        sampling = {**body["sampling_params"], "seed": run[0][0], "n": len(run)}
        request = asyncio.ensure_future(self._post("/inference/v1/generate", {**body, "sampling_params": sampling}))

        def nobody_waits(_: object) -> None:
            if all(future.cancelled() for _, future in run):
                request.cancel()

        for _, future in run:
            future.add_done_callback(nobody_waits)
        try:
            answer = await request
            if self._wire == "content_parts":
                _check_layout(answer, waiting.prompt)
            completions = [_completion(choice) for choice in sorted(answer["choices"], key=lambda c: c["index"])]
            if len(completions) != len(run):
                raise InferenceError(f"asked for {len(run)} completions, got {len(completions)}")
        except (InferenceError, KeyError, TypeError, ValueError) as error:
            failure = error if isinstance(error, InferenceError) else InferenceError(f"unexpected answer: {error!r}")
            for _, future in run:
                if not future.done():
                    future.set_exception(failure)
            return
        except asyncio.CancelledError:
            request.cancel()
            for _, future in run:
                future.cancel()
            raise
        for (_, future), completion in zip(run, completions, strict=True):
            if not future.done():  # the rollout may have been cancelled meanwhile
                future.set_result(completion)

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            status, data = await self._send_with_retries(path, msgspec.json.encode(body))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise InferenceError(
                f"inference server at {self._base_url} did not answer {path} ({type(error).__name__})"
            ) from None
        if status != HTTPStatus.OK:
            raise InferenceError(_refusal(path, status, data))
        answer: dict[str, Any] = msgspec.json.decode(data)
        return answer

    @tenacity.retry(
        # Asking again gives the same: a completion is decided by its seed, weights by their version.
        retry=tenacity.retry_if_exception_type((aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)),
        stop=tenacity.stop_after_attempt(4),
        wait=tenacity.wait_exponential(multiplier=0.2, max=2.0),
        reraise=True,
    )
    async def _send_with_retries(self, path: str, body: bytes) -> tuple[int, bytes]:
        async with self._http.post(path, data=body) as response:
            return response.status, await response.read()


def api_key(variable: str) -> str:
    """The API key in an environment variable.

    Raises:
        ConfigError: The variable is not set or empty.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(f"environment variable {variable} should hold the inference server's API key, it is not set")
    return value


def _refusal(path: str, status: int, data: bytes) -> str:
    try:
        error = msgspec.json.decode(data)["error"]
        return f"{path} answered {status} ({error.get('type')}): {error.get('message')}"
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return f"{path} answered {status}: {data[:200].decode(errors='replace')}"


def _check_layout(answer: Mapping[str, Any], prompt: RenderedPrompt) -> None:
    """The engine expanded the prompt itself: it must have read what was rendered here."""
    ids, spans = answer.get("prompt_token_ids"), (answer.get("mm_placeholders") or {}).get("image", [])
    if ids is None:
        raise InferenceError("answer has no prompt_token_ids: what the engine read can not be checked")
    if ids != prompt.token_ids:
        first = next((i for i, (a, b) in enumerate(zip(ids, prompt.token_ids, strict=False)) if a != b), len(ids))
        raise InferenceError(
            f"the engine read {len(ids)} tokens, {len(prompt.token_ids)} were rendered; they differ from token {first} "
            "on: its layout of the images is another one"
        )
    if [(span["offset"], span["length"]) for span in spans] != [(i.offset, i.length) for i in prompt.images]:
        raise InferenceError(f"the engine's image placeholders are {spans}, rendered were others")


def _completion(choice: Mapping[str, Any]) -> Completion:
    token_ids: list[int] = choice["token_ids"]
    logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    spans = choice.get("weight_versions") or [{"version": "default", "start": 0, "end": len(token_ids)}]
    versions = [_version(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    if not len(token_ids) == len(logprobs) == len(versions):
        raise InferenceError(
            f"answer has {len(token_ids)} tokens, {len(logprobs)} logprobs and versions of {len(versions)} tokens"
        )
    return Completion(token_ids, logprobs, versions, choice["finish_reason"])


def _version(name: str) -> int:
    """A vLLM without the plugin calls the weights that it began with `default`."""
    return 0 if name == "default" else int(name)
