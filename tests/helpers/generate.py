"""Requests to `/inference/v1/generate` of a running server, and what its answers hold."""

import base64
import json
from typing import Any

import httpx
import torch

from pointillist.images import normalize_images
from pointillist.refs import encode_features
from pointillist.render import RenderedPrompt
from tests.helpers.pictures import picture
from tests.helpers.processes import RunningServer

GENERATE = "/inference/v1/generate"


def rendered(server: RunningServer, *seeds: int) -> RenderedPrompt:
    """A prompt with one picture a seed."""
    parts = [{"type": "image", "image": picture(64, 64 + 32 * (seed % 3), seed)} for seed in seeds]
    images: list[Any] = []
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "What digit?"}]}
    return server.renderer.render([normalize_images(message, server.sources, images)], images)


def generate_body(server: RunningServer, *seeds: int, **sampling: Any) -> dict[str, Any]:
    """A request with one picture a seed."""
    prompt = rendered(server, *seeds)
    params = {"max_tokens": 5, "logprobs": 0, "seed": 1, "ignore_eos": True, **sampling}
    return {"token_ids": prompt.token_ids, "features": encode_features(prompt.images), "sampling_params": params}


def post_generate(server: RunningServer, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + GENERATE, json=body, timeout=60)


def served_choices(server: RunningServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = post_generate(server, body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def sampled_logprobs(choice: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])


def as_mmraw(value: dict[str, Any]) -> str:
    return "mmraw:" + base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def with_ref(body: dict[str, Any], **change: Any) -> dict[str, Any]:
    """The body with fields of its first reference changed."""
    text = body["features"]["kwargs_data"]["image"][0].removeprefix("mmraw:")
    value = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return with_entry(body, as_mmraw({**value, **change}))


def with_entry(body: dict[str, Any], entry: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(body))
    changed["features"]["kwargs_data"]["image"][0] = entry
    return changed
