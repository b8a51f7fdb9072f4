"""The environment side's client of the inference servers.

Rollouts of one group begin with the same prompt. Requests for the same prompt that are made within a moment of each
other and whose seeds follow one another are sent as one request with `n` completions: choice `i` is sampled with
`seed + i`, as vLLM defines it, so what a rollout gets does not depend on whether it was sent alone.
"""

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

import msgspec

from pointillist.config.orchestrator import ClientConfig
from pointillist.config.sampling import MAX_VOCABULARY
from pointillist.config.shared import RUN_KEY
from pointillist.errors import ConfigError, InferenceError, RequestRefusedError
from pointillist.render.raw import RenderedPrompt
from pointillist.rollouts.servers import Server, Servers

Wire = Literal["mmraw", "content_parts"]
"""How images are named to the server: by references that say everything, or by URLs whose layout it computes."""

_GATHER_SECONDS: Final = 0.001
_VERSION_DIGITS: Final = 16
_CERTAIN: Final = 1e-3
"""A logprob may be so much above 0, by rounding."""
_NEVER: Final = -100.0
"""The lowest bias on a logit that vLLM takes: a probability of e^-100."""


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


class _Logprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Logprob]


class _Versions(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[Annotated[int, msgspec.Meta(ge=0, le=MAX_VOCABULARY)]]
    logprobs: _Logprobs
    finish_reason: str
    weight_versions: list[_Versions] | None = None


class _Span(msgspec.Struct):
    offset: int
    length: int


class _Answer(msgspec.Struct):
    """What is read of a server's answer; every other key is ignored."""

    choices: list[_Choice]
    prompt_token_ids: list[int] | None = None
    mm_placeholders: dict[str, list[_Span]] | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


@dataclass(slots=True)
class _Waiting:
    """Requests for one prompt that are about to be sent."""

    prompt: RenderedPrompt
    body: dict[str, Any]
    affinity: str
    requests: list[tuple[int, asyncio.Future[Completion]]] = field(default_factory=list)


class InferenceClient:
    """Asynchronous client; one an event loop, closed with `aclose`."""

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        api_key_var: str | None = None,
        timeout: float = 600.0,
        unreachable_timeout: float = 0.0,
        wire: Wire = "mmraw",
        unsampleable: Sequence[int] = (),
    ) -> None:
        """Nothing is connected yet.

        Args:
            base_urls: Address of each server.
            api_key_var: Name of the environment variable that holds the API key.
            timeout: Seconds that one request may take.
            unreachable_timeout: Seconds for which a request is tried again while no server can be reached.
            wire: How images are named. `content_parts` is for a vLLM without Pointillist's plugin: pixels are then the
                engine's own, and what it says of tokens and placeholders must be what was rendered here.
            unsampleable: Tokens that such an engine is told not to sample; servers with the plugin know them.

        Raises:
            ConfigError: The variable is not set.
        """
        headers = {"Content-Type": "application/json"}
        if api_key_var:
            headers["Authorization"] = f"Bearer {api_key(api_key_var)}"
        self._servers = Servers(base_urls, headers, timeout=timeout, unreachable_timeout=unreachable_timeout)
        self._wire = wire
        self._bias = {str(token): _NEVER for token in unsampleable}
        self._waiting: dict[bytes, _Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def from_config(cls, config: ClientConfig, unsampleable: Sequence[int] = ()) -> "InferenceClient":
        """The client that a config describes.

        Raises:
            ConfigError: The variable of the API key is not set.
        """
        return cls(
            config.base_url,
            api_key_var=config.api_key_var,
            timeout=config.timeout,
            unreachable_timeout=config.unreachable_timeout,
            wire=config.wire,
            unsampleable=unsampleable,
        )

    @property
    def servers(self) -> Sequence[Server]:
        """Each server by itself."""
        return self._servers.all

    async def wait_until_ready(self, seconds: float) -> None:
        """Waits until all servers are healthy.

        Raises:
            InferenceError: One is not after `seconds`.
        """
        await asyncio.gather(*(server.wait_until_ready(seconds) for server in self.servers))

    async def generate(
        self,
        prompt: RenderedPrompt,
        sampling_params: Mapping[str, Any],
        seed: int,
        *,
        affinity: str = "",
        wait: bool = True,
    ) -> Completion:
        """Samples one completion.

        Args:
            prompt: What is read.
            sampling_params: As vLLM names them, without `n` and `seed`.
            seed: Of this completion.
            affinity: Requests with the same word go to the same server; those of one group have the same.
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
            self._waiting[key] = _Waiting(prompt, body, affinity)
            self._start(self._send_gathered(key, _GATHER_SECONDS if wait else 0))
        self._waiting[key].requests.append((seed, future))
        return await future

    def _prompt_fields(self, prompt: RenderedPrompt) -> dict[str, Any]:
        if self._wire == "mmraw":
            return {"token_ids": prompt.token_ids, "features": prompt.features()}
        parts = [{"type": "image_url", "url": image.descriptor.raw_image_uri} for image in prompt.images]
        return {"token_ids": prompt.logical_ids, "content_parts": parts or None, "return_token_ids": True}

    async def aclose(self) -> None:
        """Closes all connections."""
        for task in self._tasks:
            task.cancel()
        await self._servers.aclose()

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
        request = asyncio.ensure_future(self._generate({**body, "sampling_params": sampling}, waiting.affinity))

        def nobody_waits(_: object) -> None:
            if all(future.cancelled() for _, future in run):
                request.cancel()

        for _, future in run:
            future.add_done_callback(nobody_waits)
        try:
            answer = await request
            if self._wire == "content_parts":
                _check_layout(answer, waiting.prompt)
            choices = sorted(answer.choices, key=lambda choice: choice.index)
            if [choice.index for choice in choices] != list(range(len(run))):
                raise InferenceError(f"asked for {len(run)} completions, got {len(choices)}")
            completions = [_completion(choice) for choice in choices]
        except InferenceError as error:
            for _, future in run:
                if not future.done():
                    future.set_exception(error)
            return
        except asyncio.CancelledError:
            request.cancel()
            for _, future in run:
                future.cancel()
            raise
        for (_, future), completion in zip(run, completions, strict=True):
            if not future.done():  # the rollout may have been cancelled meanwhile
                future.set_result(completion)

    async def _generate(self, body: Mapping[str, Any], affinity: str) -> _Answer:
        path = "/inference/v1/generate"
        status, data = await self._servers.post(path, msgspec.json.encode(body), affinity)
        _check_status(path, status, data)
        try:
            return _decode_answer(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise InferenceError(f"unexpected answer of {path}: {error}") from None


async def update_weights(server: Server, weight_dir: str, version: int, *, rewind: bool = False) -> None:
    """Tells one server to load a weight version from a folder; one that has a newer version keeps it.

    The request brings the run's own key, where there is one. A server that somebody has started outside of the run may
    not know that key; it is then asked with the key that its other requests bring.

    Args:
        server: Which one.
        weight_dir: Folder in the run's `broadcasts`, as the server sees it.
        version: Number of the weights.
        rewind: Whether an older version than the one that serves is meant, because the run has gone back.

    Raises:
        UnreachableError: It cannot be reached.
        InferenceError: The server kept its old weights; the message says why.
    """
    path = "/update_weights"
    body = msgspec.json.encode({"weight_dir": weight_dir, "weight_version": version, "rewind": rewind})
    key = os.environ.get(RUN_KEY)
    status, data = await server.post(path, body, {"Authorization": f"Bearer {key}"} if key else None)
    if key and status == HTTPStatus.UNAUTHORIZED:
        status, data = await server.post(path, body)
    if status != HTTPStatus.CONFLICT:
        _check_status(path, status, data)


def _check_status(path: str, status: int, data: bytes) -> None:
    """Passes an answer that is none of a fault.

    Raises:
        RequestRefusedError: The request asks for what the server does not do.
        InferenceError: Any other fault.
    """
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY):
        raise RequestRefusedError(_refusal(path, status, data))
    if status != HTTPStatus.OK:
        raise InferenceError(_refusal(path, status, data))


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
        text = f"({error.get('type')}): {error.get('message')}"
    except (msgspec.MsgspecError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        text = f": {data.decode(errors='replace')}"
    return f"{path} answered {status} {text[:2000]}"


def _check_layout(answer: _Answer, prompt: RenderedPrompt) -> None:
    """The engine expanded the prompt itself: it must have read what was rendered here."""
    ids, spans = answer.prompt_token_ids, (answer.mm_placeholders or {}).get("image", [])
    if ids is None:
        raise InferenceError("answer has no prompt_token_ids: what the engine read cannot be checked")
    if ids != prompt.token_ids:
        first = next((i for i, (a, b) in enumerate(zip(ids, prompt.token_ids, strict=False)) if a != b), len(ids))
        raise InferenceError(
            f"the engine read {len(ids)} tokens, {len(prompt.token_ids)} were rendered; they differ from token {first} "
            "on: its layout of the images is another one"
        )
    if [(span.offset, span.length) for span in spans] != [(i.offset, i.length) for i in prompt.images]:
        raise InferenceError(f"the engine's {len(spans)} image placeholders are not the {len(prompt.images)} rendered")


def _completion(choice: _Choice) -> Completion:
    """A choice whose numbers fit together.

    Example: 3 tokens with `weight_versions` of `[{"version": "4", "start": 0, "end": 2}, {"version": "5", "start": 2,
    "end": 3}]` have the versions `[4, 4, 5]`.

    Raises:
        InferenceError: They do not.
    """
    count = len(choice.token_ids)
    logprobs = [entry.logprob for entry in choice.logprobs.content]
    if len(logprobs) != count:
        raise InferenceError(f"answer has {count} tokens and {len(logprobs)} logprobs")
    if not all(math.isfinite(value) and value <= _CERTAIN for value in logprobs):
        raise InferenceError("answer has a logprob that is not a finite number of at most 0")
    spans = choice.weight_versions or [_Versions("default", 0, count)]
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends != sorted(ends) or ends[-1] != count:
        raise InferenceError(f"answer has {count} tokens, its weight_versions do not cover them one by one")
    versions = [version for span in spans for version in [_version(span.version)] * (span.end - span.start)]
    return Completion(choice.token_ids, logprobs, versions, choice.finish_reason)


def _version(name: str) -> int:
    """A vLLM without the plugin calls the weights that it began with `default`."""
    if name == "default":
        return 0
    if not (name.isascii() and name.isdecimal() and len(name) < _VERSION_DIGITS):
        raise InferenceError(f"answer has the weight version {name[:40]!r}, expected a number")
    return int(name)
