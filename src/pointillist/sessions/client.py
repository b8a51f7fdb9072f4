"""The environment side's client of the inference servers.

Rollouts of one group begin with the same prompt. Requests for the same prompt that are made within a moment of each
other and whose seeds follow one another are sent as one request with `n` completions: choice `i` is sampled with
`seed + i`, as vLLM defines it, so what a rollout gets does not depend on whether it was sent alone.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from pointillist.base.net import key_from_environment
from pointillist.base.pools import READING
from pointillist.config.orchestrator import ClientConfig
from pointillist.errors import InferenceError
from pointillist.refs import encode_features
from pointillist.render.raw import RenderedPrompt
from pointillist.sessions.answers import Completion, Expected, check_status, completions_of
from pointillist.sessions.servers import InferenceServer, InferenceServers

Wire = Literal["mmraw", "content_parts"]
"""How images are named to the server: by references that say everything, or by URLs whose layout it computes."""

_GATHER_SECONDS: Final = 0.001
_SMALL_BYTES: Final = 256 * 1024
"""Answers up to this size are decoded on the event loop: a few milliseconds at most."""
_NEVER: Final = -100.0
"""The lowest bias on a logit that vLLM takes: a probability of e^-100."""


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
        vocab_size: int = 0,
    ) -> None:
        """Nothing is connected yet.

        Args:
            base_urls: Address of each server.
            api_key_var: Name of the environment variable that holds the API key.
            timeout: Seconds that one request may take.
            unreachable_timeout: Seconds for which a request is tried again while no server can be reached.
            wire: How images are named. `content_parts` is for a vLLM without Pointillist's plugin: pixels are then the
                engine's own, and what it says of tokens and placeholders must be what was rendered here.
            unsampleable: Tokens that no answer may have. Servers with the plugin know them; others are told.
            vocab_size: Token ids of answers are below it; 0 if it is not known.

        Raises:
            ConfigError: The variable is not set.
        """
        headers = {"Content-Type": "application/json"}
        if api_key_var:
            key = key_from_environment(api_key_var, "the inference server's API key")
            headers["Authorization"] = f"Bearer {key}"
        self._servers = InferenceServers(base_urls, headers, timeout=timeout, unreachable_timeout=unreachable_timeout)
        self._wire = wire
        self._unsampleable = frozenset(unsampleable)
        self._vocab_size = vocab_size
        self._bias = {str(token): _NEVER for token in unsampleable}
        self._last: tuple[RenderedPrompt, dict[str, Any], dict[str, Any], bytes] | None = None
        self._waiting: dict[bytes, _Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def from_config(
        cls, config: ClientConfig, unsampleable: Sequence[int] = (), vocab_size: int = 0
    ) -> "InferenceClient":
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
            vocab_size=vocab_size,
        )

    @property
    def servers(self) -> Sequence[InferenceServer]:
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
            RequestRefusedError: The server does not serve what is asked for.
            InferenceError: It failed the request, can not be reached, reads other tokens than were rendered, or its
                answer is malformed.
        """
        body, key = self._body(prompt, dict(sampling_params))
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        if key not in self._waiting:
            self._waiting[key] = _Waiting(prompt, body, affinity)
            self._start(self._send_gathered(key, _GATHER_SECONDS if wait else 0))
        self._waiting[key].requests.append((seed, future))
        return await future

    def _body(self, prompt: RenderedPrompt, params: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The body of a request without its seed, and what it is gathered by; made once for the answers of one turn."""
        if self._last is None or self._last[0] is not prompt or self._last[1] != params:
            sampling = params if self._wire == "mmraw" else {**params, "logit_bias": self._bias}
            body = {**self._prompt_fields(prompt), "sampling_params": sampling}
            self._last = (prompt, params, body, msgspec.json.encode(body))
        return self._last[2:]

    def _prompt_fields(self, prompt: RenderedPrompt) -> dict[str, Any]:
        if self._wire == "mmraw":
            return {"token_ids": prompt.token_ids, "features": encode_features(prompt.images)}
        parts = [{"type": "image_url", "url": image.uri} for image in prompt.images]
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
        expected = Expected(
            prompt=waiting.prompt,
            count=len(run),
            max_tokens=sampling.get("max_tokens"),
            vocab_size=self._vocab_size,
            unsampleable=self._unsampleable,
            check_layout=self._wire == "content_parts",
        )
        request = asyncio.ensure_future(
            self._generate({**body, "sampling_params": sampling}, waiting.affinity, expected)
        )

        def nobody_waits(_: object) -> None:
            if all(future.cancelled() for _, future in run):
                request.cancel()

        for _, future in run:
            future.add_done_callback(nobody_waits)
        try:
            completions = await request
        except Exception as error:  # whatever it was, these requests must hear of it
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

    async def _generate(self, body: Mapping[str, Any], affinity: str, expected: Expected) -> list[Completion]:
        path = "/inference/v1/generate"
        data = msgspec.json.encode(body)
        status, answer = await self._servers.post(path, data, affinity, max_bytes=expected.max_bytes)
        check_status(path, status, answer)
        if len(answer) <= _SMALL_BYTES:
            return completions_of(answer, expected)
        return await READING.run(completions_of, answer, expected)
