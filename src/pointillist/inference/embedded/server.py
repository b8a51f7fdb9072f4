"""The embedded server: vLLM's token-in, token-out endpoint over the embedded engine.

| route | effect |
| --- | --- |
| `POST /inference/v1/generate` | tokens and references in, tokens and logprobs out |
| `POST /update_weights` | loads `{"weight_dir", "weight_version"}` between two decoding steps |
| `POST /pause`, `POST /resume` | stops and goes on; requests are kept |
| `GET /health`, `/v1/models`, `/metrics` | |

Bodies are read within limits and decoded in worker threads, as images are, never on the event loop. Errors are
`{"error": {message, type, param, code}}`.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from pointillist.base.budget import ByteBudget
from pointillist.base.http_errors import answer_json
from pointillist.base.http_guard import Guard, release_body, uvicorn_config
from pointillist.base.net import key_from_environment
from pointillist.config import RUN_KEY, InferenceConfig
from pointillist.errors import ConfigError, InferenceError, PointillistError, RequestError
from pointillist.inference.door import Door, http_limits
from pointillist.inference.embedded.batch import Prompt
from pointillist.inference.embedded.engine import Engine, EngineRequest
from pointillist.inference.embedded.metrics import EngineMetrics
from pointillist.inference.prompt import CheckedPrompt, ServerBounds, check_prompt, check_sizes, request_error
from pointillist.inference.protocol import Choice, GenerateRequest, GenerateResponse, Placeholders, Usage, decode_body
from pointillist.models import LoadedModel, load_model
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.on_device import as_tensors
from pointillist.refs import MMImageRef, mm_token_type_ids
from pointillist.weights.fetch import WeightFolders, check_order, load_newest_usable
from pointillist.weights.wire import UpdateWeightsRequest

logger = logging.getLogger(__name__)


class EmbeddedServer:
    """What the routes share."""

    def __init__(
        self,
        config: InferenceConfig,
        loaded: LoadedModel,
        materializer: RawImageMaterializer,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.loaded = loaded
        self.materializer = materializer
        vocab_size = loaded.model.get_input_embeddings().weight.shape[0]
        self.bounds = ServerBounds(config.seq_len, vocab_size, config.engine.max_batch_size)
        self.budget = ByteBudget(config.reader.inflight_bytes)
        self.metrics = EngineMetrics()
        self.folders = WeightFolders(config)
        self._updating = asyncio.Lock()
        self.engine = Engine(
            loaded,
            config.engine,
            alone=config.deterministic,
            eos_token_ids=_eos_token_ids(loaded),
            seed=config.seed,
            metrics=self.metrics,
            on_failure=on_failure,
        )

    async def generate(self, http: Request) -> bytes:
        """Answers one generate request; the result is the answer's body.

        Raises:
            RequestError: It cannot be served.
        """
        body = await http.body()
        request, prompt, types = await run_in_threadpool(self._read, body)
        release_body(http)
        request_id = request.request_id or uuid.uuid4().hex
        max_tokens = request.sampling_params.max_tokens or self.bounds.seq_len - len(prompt.token_ids)
        share = await self.budget.take(prompt.pixel_bytes)
        try:
            engine_request = await self._prepare(request, request_id, max_tokens, prompt, types)
            loop = asyncio.get_running_loop()
            engine_request.prefilled.add_done_callback(lambda _: loop.call_soon_threadsafe(share.release))
            choices = await self._await_choices(engine_request, http)
        except InferenceError as error:
            raise RequestError(f"request {request_id} failed: {error}", status=500) from None
        finally:
            share.release()
        sampled = sum(len(choice.token_ids) for choice in choices)
        answer = GenerateResponse(
            request_id=request_id,
            model=self.config.model.name,
            choices=choices,
            usage=Usage(
                prompt_tokens=len(prompt.token_ids),
                completion_tokens=sampled,
                total_tokens=len(prompt.token_ids) + sampled,
            ),
            prompt_token_ids=prompt.token_ids if request.return_token_ids else None,
            mm_placeholders=Placeholders.of(prompt.images) if prompt.images and request.return_token_ids else None,
        )
        return await run_in_threadpool(msgspec.json.encode, answer)

    def _read(self, body: bytes) -> tuple[GenerateRequest, CheckedPrompt, list[int]]:
        """A body as a request, its checked prompt and the types of its tokens; runs in a worker thread."""
        request = decode_body(body, GenerateRequest)
        if request.model not in (None, self.config.model.name):
            raise RequestError(f"model is {request.model!r}, this server has {self.config.model.name!r}", status=404)
        max_images = self.config.multimodal.limits.max_images_per_request
        prompt = check_prompt(request, self.materializer, max_images)
        params = request.sampling_params
        check_sizes(prompt.token_ids, params.max_tokens, params.n, params.logprobs, self.bounds)
        return request, prompt, mm_token_type_ids(prompt.token_ids, self.loaded.family.image_token_id)

    async def update_weights(self, request: UpdateWeightsRequest) -> None:
        """Loads a weight version; one at a time.

        Raises:
            RequestError: 400: not a folder of this run's broadcasts, or weights that cannot serve; 409: older than what
                serves. The old ones serve on.
        """
        async with self._updating:
            check_order(request, self.engine.weight_version)
            try:
                folder = await run_in_threadpool(self.folders.folder, request.weight_dir, request.weight_version)
                await run_in_threadpool(self.engine.update_weights, folder, request.weight_version)
            except InferenceError as error:
                raise RequestError(
                    f"{error}; version {self.engine.weight_version} serves on", param="weight_dir"
                ) from None
            logger.info("weight version %d serves", request.weight_version)

    async def load_latest(self) -> None:
        """Loads the run's newest weights that can serve: a server that is started again must not serve old ones."""
        await load_newest_usable(self.folders, self.update_weights)

    async def _prepare(
        self, request: GenerateRequest, request_id: str, max_tokens: int, prompt: CheckedPrompt, types: list[int]
    ) -> EngineRequest:
        tensors = await run_in_threadpool(self._materialize, prompt.images) if prompt.images else {}
        read = Prompt(torch.tensor(prompt.token_ids), torch.tensor(types), tensors)
        share_key = (tuple(prompt.token_ids), tuple(image.hash for image in prompt.images))
        return EngineRequest(read, share_key, request.sampling_params, max_tokens, id=request_id)

    def _materialize(self, images: list[MMImageRef]) -> dict[str, torch.Tensor]:
        """Runs in a worker thread."""
        started = time.perf_counter()
        try:
            arrays = self.materializer.materialize(images, "uint8")
        except PointillistError as error:
            raise request_error(error) from None
        self.metrics.images.materialized(len(images), time.perf_counter() - started, self.materializer.cache)
        return as_tensors(arrays)

    async def _await_choices(self, request: EngineRequest, http: Request) -> list[Choice]:
        """Waits for the engine; a client that hangs up frees its rows."""
        answer: asyncio.Future[list[Choice]] = asyncio.wrap_future(self.engine.submit(request))
        hung_up: asyncio.Future[None] = asyncio.ensure_future(_disconnected(http))
        watched: set[asyncio.Future[list[Choice]] | asyncio.Future[None]] = {answer, hung_up}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        hung_up.cancel()
        if not answer.done():
            self.engine.abort(request)
            raise RequestError("client closed the connection", status=499)
        return answer.result()


def create_app(server: EmbeddedServer) -> FastAPI:
    """The web application, without its guard.

    Args:
        server: State of the routes.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        await server.load_latest()
        yield
        if server.engine.failure is None:
            await run_in_threadpool(server.engine.stop)

    app = FastAPI(title="Pointillist inference", lifespan=lifespan, openapi_url=None)
    _add_error_handlers(app, server)

    @app.post("/inference/v1/generate")
    async def generate(http: Request) -> Response:
        return Response(await server.generate(http), media_type="application/json")

    @app.post("/update_weights")
    async def update_weights(http: Request) -> dict[str, int]:
        await server.update_weights(decode_body(await http.body(), UpdateWeightsRequest))
        return {"weight_version": server.engine.weight_version}

    @app.post("/pause")
    async def pause() -> dict[str, str]:
        await run_in_threadpool(server.engine.pause)
        return {"status": "paused"}

    @app.post("/resume")
    async def resume() -> dict[str, str]:
        await run_in_threadpool(server.engine.resume)
        return {"status": "resumed"}

    @app.get("/is_paused")
    async def is_paused() -> dict[str, bool]:
        return {"is_paused": server.engine.is_paused}

    @app.get("/health")
    async def health() -> Response:
        if server.engine.failure is not None:
            raise RequestError(f"engine died: {server.engine.failure!r}", status=503)
        return JSONResponse({"status": "ok", "weight_version": server.engine.weight_version})

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        card = {"id": server.config.model.name, "object": "model", "max_model_len": server.config.seq_len}
        return {"object": "list", "data": [card]}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.exposition(), media_type="text/plain; version=0.0.4")

    return app


def serve(config: InferenceConfig) -> None:
    """Loads the model and serves until the process is told to stop.

    Raises:
        ConfigError: No such model, or a missing API key.
        InferenceError: The engine died.
    """
    variable = config.server.api_key_var
    key = key_from_environment(variable, "the inference server's API key") if variable else None
    torch.set_num_threads(config.engine.num_threads)
    loaded = load_model(config.model.name, device=config.engine.device, dtype=config.engine.dtype)

    def end_process() -> None:
        """A server without an engine must not look alive."""
        http_server.should_exit = http_server.force_exit = True

    _refuse_other_caches(loaded)
    server = EmbeddedServer(config, loaded, RawImageMaterializer.for_run(loaded.family, config), end_process)
    limits = http_limits(config.seq_len, config.multimodal.limits.max_images_per_request)
    door = Door(loopback=config.server.is_loopback, key=key, run_key=os.environ.get(RUN_KEY))

    def refused(request: Request, error: PointillistError) -> Response:
        server.metrics.refused.inc()
        return answer_json(request, error)

    app = Guard(create_app(server), limits, check=door.check, answer=refused)
    http_server = uvicorn.Server(uvicorn_config(app, limits, host=config.server.host, port=config.server.port))
    logger.info("serving %s on %s:%d", config.model.name, config.server.host, config.server.port)
    http_server.run()
    if server.engine.failure is not None:
        raise InferenceError(f"engine died: {server.engine.failure!r}")


def _refuse_other_caches(loaded: LoadedModel) -> None:
    """The running batch is made of keys and values; the state of linear attention cannot be joined that way.

    Raises:
        ConfigError: The model has layers with another kind of cache.
    """
    layers = getattr(loaded.model.config.get_text_config(), "layer_types", None) or []
    if other := sorted(set(layers) - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"the embedded server cannot decode models with {', '.join(other)} layers; use vLLM")


def _eos_token_ids(loaded: LoadedModel) -> frozenset[int]:
    value = loaded.model.generation_config.eos_token_id
    ids = value if isinstance(value, list) else [value, loaded.tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI, server: EmbeddedServer) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        server.metrics.refused.inc()
        return answer_json(request, error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logger.error("request failed", exc_info=error)
        server.metrics.refused.inc()
        return answer_json(request, error)
