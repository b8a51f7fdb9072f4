"""The vLLM endpoint plugin: references in, weights by version; everything else is vLLM's own.

Installed as an entry point of `vllm.endpoint_plugins`; `VLLM_PLUGINS=pointillist` lets vLLM load it. Its routes replace
vLLM's of the same path: `/inference/v1/generate` checks and materialises references and hands on to vLLM's handler;
`/update_weights`, `/pause`, `/resume` and `/is_paused` are those of the embedded server.
"""

import logging
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from prometheus_client import REGISTRY
from pydantic import ValidationError
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.sampling_params import SamplingParams

from pointillist.base.budget import ByteBudget
from pointillist.base.http_errors import answer_json
from pointillist.base.http_guard import Guard, guarded_protocol, release_body
from pointillist.base.net import is_loopback, key_from_environment
from pointillist.config import RUN_KEY, InferenceConfig, MultimodalConfig
from pointillist.config.shared import CARRIER, ModelConfig
from pointillist.errors import RequestError
from pointillist.families import load_family, resolve_model_dir
from pointillist.inference.door import OWN_PATHS, Door, http_limits
from pointillist.inference.metrics import ImageMetrics
from pointillist.inference.prompt import CheckedPrompt, ServerBounds, check_prompt, check_sizes
from pointillist.inference.protocol import Placeholders, PromptFields, check_params, decode_body, decode_open_body
from pointillist.inference.vllm.serve import CONFIG_VARIABLE
from pointillist.inference.vllm.serving import ItemMaker, RawServingTokens
from pointillist.inference.vllm.versions import check_vllm
from pointillist.pixels import RawImageMaterializer
from pointillist.runs.config_files import load_toml
from pointillist.weights.fetch import WeightFolders
from pointillist.weights.vllm import WeightUpdates
from pointillist.weights.vllm_interface import EngineControl
from pointillist.weights.wire import UpdateWeightsRequest

logger = logging.getLogger(__name__)

_OTHER_BODY_BYTES: Final = 64 * 1024 * 1024
"""Longest body of vLLM's own routes, whose images come as base64."""


class PointillistPlugin:
    """What vLLM's plugin loader asks for."""

    name = "pointillist"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes, and a guard around vLLM's and ours alike."""
        app.include_router(router)
        app.exception_handler(RequestError)(_answer)
        app.add_middleware(_LateGuard)

    async def init_state(self, engine_client: EngineControl, state: State, args: Namespace) -> None:
        """Builds what the routes share, once vLLM's own state is there.

        Raises:
            ConfigError: Another vLLM than this was made for, or a model that no family serves.
        """
        check_vllm()
        state.pointillist = _Shared(engine_client, state, args)
        await engine_client.update_weight_version("0")
        await state.pointillist.weights.load_latest()


class _Shared:
    """State of the routes."""

    def __init__(self, engine: EngineControl, state: State, args: Namespace) -> None:
        self.config = _config(args)
        self.engine = engine
        family = load_family(self.config.model.name)
        self.materializer = RawImageMaterializer.for_run(family, self.config)
        self.serving = RawServingTokens(
            engine,
            state.openai_serving_models,
            state.online_renderer,
            request_logger=None,
            return_tokens_as_token_ids=args.return_tokens_as_token_ids,
            enable_prompt_tokens_details=args.enable_prompt_tokens_details,
            enable_log_outputs=args.enable_log_outputs,
            force_no_detokenize=args.tokens_only,
        )
        state.serving_tokens = self.serving
        processor = state.online_renderer.renderer.get_mm_processor()
        self.items = ItemMaker(engine.vllm_config, processor, self.materializer)
        self.metrics = ImageMetrics(REGISTRY)
        scheduler, model = engine.vllm_config.scheduler_config, engine.vllm_config.model_config
        self.bounds = ServerBounds(model.max_model_len, model.get_vocab_size(), scheduler.max_num_seqs)
        self.budget = ByteBudget(self.config.reader.inflight_bytes)
        self.limits = http_limits(model.max_model_len, self.config.multimodal.limits.max_images_per_request)
        variable = self.config.server.api_key_var
        self.door = Door(
            loopback=is_loopback(args.host or ""),
            key=key_from_environment(variable, "the inference server's API key") if variable else None,
            run_key=os.environ.get(RUN_KEY),
        )
        self.weights = WeightUpdates(engine, resolve_model_dir(self.config.model.name), WeightFolders(self.config))
        if model.logprobs_mode != "processed_logprobs":
            logger.warning(
                "logprobs are not at the sampling temperature: start vLLM with --logprobs-mode processed_logprobs"
            )
        logger.info("references are read as %s pixels", self.items.dtype)


class _LateGuard:
    """The guard of vLLM's application: what it guards is known once the engine is there, after middleware is added."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._guard: Guard | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        if scope["type"] == "lifespan" and (server := getattr(state, "server", None)) is not None:
            # vLLM's uvicorn, which is about to listen; its connections are bounded as those of our own servers.
            server.config.http_protocol_class = guarded_protocol(state.pointillist.limits)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._guard is None:
            shared: _Shared = state.pointillist
            own = shared.limits.body_bytes

            def longest(request: Request) -> int:
                return own if request.scope["path"] in OWN_PATHS else max(own, _OTHER_BODY_BYTES)

            self._guard = Guard(self._app, shared.limits, check=shared.door.check, body_bytes=longest)
        await self._guard(scope, receive, send)


def _config(args: Namespace) -> InferenceConfig:
    """The config that `pointillist inference` wrote, or for a plain `vllm serve` what its arguments tell."""
    if path := os.environ.get(CONFIG_VARIABLE):
        return load_toml(InferenceConfig, Path(path))
    roots = [Path(os.environ[CARRIER])] if os.environ.get(CARRIER) else []
    return InferenceConfig(model=ModelConfig(name=args.model), multimodal=MultimodalConfig(allowed_roots=roots))


router = APIRouter()


@router.post("/inference/v1/generate")
async def generate(raw_request: Request) -> Response:
    """Tokens and references in, tokens and logprobs out."""
    # Before vLLM begins to listen for a client that leaves: it would take the body for a message of the connection.
    body = await raw_request.body()
    answer: Response = await _generate(body, raw_request)
    return answer


@with_cancellation
@load_aware_call
async def _generate(body: bytes, raw_request: Request) -> Response:
    shared: _Shared = raw_request.app.state.pointillist
    request, prompt = await run_in_threadpool(_read, body, shared)
    release_body(raw_request)
    share = await shared.budget.take(prompt.pixel_bytes)
    try:
        started = time.perf_counter()
        items = await shared.items.items(prompt)
        shared.metrics.materialized(len(items), time.perf_counter() - started, shared.materializer.cache)
        answer = await shared.serving.serve_with_items(request, items, raw_request)
    finally:
        share.release()
    code = answer.error.code if isinstance(answer, ErrorResponse) else 200
    return JSONResponse(answer.model_dump(), status_code=code)


def _read(body: bytes, shared: _Shared) -> tuple[GenerateRequest, CheckedPrompt]:
    """A body as vLLM's request and its checked prompt; runs in a worker thread."""
    fields, given_body = decode_open_body(body, PromptFields)
    prompt = check_prompt(fields, shared.materializer, shared.config.multimodal.limits.max_images_per_request)
    if isinstance(given_params := given_body.get("sampling_params"), dict):
        check_params(given_params)
    request = _stock_request(given_body, prompt)
    params = request.sampling_params
    given = params.max_tokens if request.is_sampling_param_provided("max_tokens") else None
    check_sizes(prompt.token_ids, given, params.n, params.logprobs, shared.bounds)
    return request, prompt


@router.get("/health")
async def health(raw_request: Request) -> dict[str, str | int]:
    """Whether the engine lives, and which weights serve."""
    shared: _Shared = raw_request.app.state.pointillist
    await shared.engine.check_health()
    return {"status": "ok", "weight_version": shared.weights.version}


@router.post("/update_weights")
async def update_weights(raw_request: Request) -> dict[str, int]:
    """Loads a weight version while decoding is frozen."""
    weights: WeightUpdates = raw_request.app.state.pointillist.weights
    await weights.apply(decode_body(await raw_request.body(), UpdateWeightsRequest))
    return {"weight_version": weights.version, "encoder_resets": weights.encoder_resets}


@router.post("/pause")
async def pause(raw_request: Request) -> dict[str, str]:
    """Stops decoding after the current step; requests are kept."""
    await raw_request.app.state.pointillist.engine.pause_generation(mode="keep", clear_cache=False)
    return {"status": "paused"}


@router.post("/resume")
async def resume(raw_request: Request) -> dict[str, str]:
    """Goes on decoding."""
    await raw_request.app.state.pointillist.engine.resume_generation()
    return {"status": "resumed"}


@router.get("/is_paused")
async def is_paused(raw_request: Request) -> dict[str, bool]:
    """Whether decoding is paused."""
    return {"is_paused": await raw_request.app.state.pointillist.engine.is_paused()}


def _stock_request(body: dict[str, Any], prompt: CheckedPrompt) -> GenerateRequest:
    """The request as vLLM knows it: where images lie, and nothing of what they are."""
    features = None
    if prompt.images:
        places = msgspec.to_builtins(Placeholders.of(prompt.images))
        features = {"mm_hashes": {"image": [image.hash for image in prompt.images]}, "mm_placeholders": places}
    stock = {**body, "token_ids": prompt.token_ids, "features": features, "content_parts": None}
    _refuse_unknown(body)
    if stock.get("request_id") is None:
        stock.pop("request_id", None)
    if stock.get("stream"):
        raise RequestError("stream: not served with references, expected false", param="stream")
    try:
        return GenerateRequest.model_validate(stock)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise RequestError(f"{where}: {fault['msg']}", param=where) from None


def _refuse_unknown(body: dict[str, Any]) -> None:
    """VLLM drops names that it does not know; a misspelt parameter would silently be another run."""
    params = body.get("sampling_params")
    known = {
        "": (body, GenerateRequest.model_fields.keys()),
        "sampling_params.": (params if isinstance(params, dict) else {}, set(SamplingParams.__struct_fields__)),
    }
    for prefix, (given, names) in known.items():
        if unknown := sorted(given.keys() - names):
            raise RequestError(f"{prefix}{unknown[0]}: no such parameter", param=f"{prefix}{unknown[0]}")


async def _answer(request: Request, error: RequestError) -> Response:
    return answer_json(request, error)
