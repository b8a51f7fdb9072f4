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
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from prometheus_client import REGISTRY
from pydantic import ValidationError
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.sampling_params import SamplingParams

from pointillist.budget import ByteBudget
from pointillist.config import InferenceConfig, MultimodalConfig, load_toml
from pointillist.config.assets import CARRIER
from pointillist.config.shared import ModelConfig
from pointillist.families import RawImageMaterializer, load_family, resolve_model_dir
from pointillist.inference.features import malformed
from pointillist.inference.keys import key_refusal
from pointillist.inference.metrics import ImageMetrics
from pointillist.inference.prompt import CheckedPrompt, ServerBounds, check_prompt, check_sizes, pixel_bytes
from pointillist.inference.protocol import ErrorResponse as OurErrorResponse
from pointillist.inference.protocol import PromptFields, RequestError, UpdateWeightsRequest
from pointillist.inference.vllm.serve import CONFIG_VARIABLE
from pointillist.inference.vllm.serving import ItemMaker, RawServingTokens
from pointillist.inference.vllm.versions import check_vllm
from pointillist.inference.vllm.weights import WeightUpdates
from pointillist.inference.weight_folders import WeightFolders
from pointillist.rollouts.client import api_key

logger = logging.getLogger(__name__)


class PointillistPlugin:
    """What vLLM's plugin loader asks for."""

    name = "pointillist"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        app.include_router(router)
        app.exception_handler(RequestError)(_answer)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
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

    def __init__(self, engine: Any, state: Any, args: Namespace) -> None:
        self.config = _config(args)
        self.engine = engine
        self.key = api_key(self.config.server.api_key_var) if self.config.server.api_key_var else None
        family = load_family(self.config.model.name)
        self.materializer = RawImageMaterializer.for_run(family, self.config.multimodal, self.config.output_dir)
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
        self.budget = ByteBudget(self.config.multimodal.inflight_bytes)
        self.weights = WeightUpdates(engine, resolve_model_dir(self.config.model.name), WeightFolders(self.config))
        if model.logprobs_mode != "processed_logprobs":
            logger.warning(
                "logprobs are not at the sampling temperature: start vLLM with --logprobs-mode processed_logprobs"
            )
        logger.info("references are read as %s pixels", self.items.dtype)


def _config(args: Namespace) -> InferenceConfig:
    """The config that `pointillist inference` wrote, or for a plain `vllm serve` what its arguments tell."""
    if path := os.environ.get(CONFIG_VARIABLE):
        return load_toml(InferenceConfig, Path(path))
    roots = [Path(os.environ[CARRIER])] if os.environ.get(CARRIER) else []
    return InferenceConfig(model=ModelConfig(name=args.model), multimodal=MultimodalConfig(allowed_roots=roots))


def _authorized(request: Request) -> None:
    key = request.app.state.pointillist.key
    if key is not None and (refusal := key_refusal(request, key)) is not None:
        raise refusal


router = APIRouter(dependencies=[Depends(_authorized)])


@router.post("/inference/v1/generate")
@with_cancellation
@load_aware_call
async def generate(body: dict[str, Any], raw_request: Request) -> Response:
    """Tokens and references in, tokens and logprobs out."""
    shared: _Shared = raw_request.app.state.pointillist
    max_images = shared.config.multimodal.limits.max_images_per_request
    try:
        fields = PromptFields.model_validate(body)
    except ValidationError as error:
        raise malformed(error.errors()[0]) from None
    prompt = await run_in_threadpool(check_prompt, fields, shared.materializer, max_images)
    request = _stock_request(body, prompt)
    params = request.sampling_params
    given = params.max_tokens if request.is_sampling_param_provided("max_tokens") else None
    check_sizes(prompt.token_ids, given, params.n, shared.bounds)
    share = await shared.budget.take(pixel_bytes(prompt, shared.materializer))
    try:
        started = time.perf_counter()
        items = await shared.items.items(prompt)
        shared.metrics.materialized(len(items), time.perf_counter() - started, shared.materializer.cache)
        answer = await shared.serving.serve_with_items(request, items, raw_request)
    finally:
        share.release()
    code = answer.error.code if isinstance(answer, ErrorResponse) else 200
    return JSONResponse(answer.model_dump(), status_code=code)


@router.get("/health")
async def health(raw_request: Request) -> dict[str, Any]:
    """Whether the engine lives, and which weights serve."""
    shared: _Shared = raw_request.app.state.pointillist
    await shared.engine.check_health()
    return {"status": "ok", "weight_version": shared.weights.version}


@router.post("/update_weights")
async def update_weights(request: UpdateWeightsRequest, raw_request: Request) -> dict[str, int]:
    """Loads a weight version while decoding is frozen."""
    weights: WeightUpdates = raw_request.app.state.pointillist.weights
    await weights.apply(request)
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
    if prompt.refs:
        places = [place.model_dump() for place in prompt.placeholders]
        features = {"mm_hashes": {"image": [ref.hash for ref in prompt.refs]}, "mm_placeholders": {"image": places}}
    stock = {**body, "token_ids": prompt.token_ids, "features": features, "content_parts": None}
    _refuse_unknown(body)
    if stock.get("request_id") is None:
        stock.pop("request_id", None)
    if stock.get("stream"):
        raise RequestError("stream: not served with references, expected false", param="stream")
    try:
        return GenerateRequest.model_validate(stock)
    except ValidationError as error:
        raise malformed(error.errors()[0]) from None


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


async def _answer(_: Request, error: RequestError) -> Response:
    return JSONResponse(OurErrorResponse(error=error.info).model_dump(), status_code=error.info.code)
