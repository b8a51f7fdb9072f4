"""`pointillist assets`: the writers' images and the trainer's weights, for machines without a common file system.

| route | effect |
| --- | --- |
| `GET /images/<hh>/<sha256>.<ext>` | bytes of a stored image |
| `GET /weights` | `{"version"}` of the newest weights |
| `GET /weights/<version>` | the safetensors file of a version |
| `GET /health` | needs no key |

Read-only. An image's path has the grammar of a stored name, so nothing else below the store can be asked for; whoever
fetches one verifies its hash. Every request brings the run's key.
"""

import json
import logging
import os
import secrets
from pathlib import Path
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from pointillist.config import AssetServerConfig, RunPaths, writer_image_dir
from pointillist.config.run_paths import WEIGHTS_FILE, latest_broadcast
from pointillist.errors import MissingImageError, RefError
from pointillist.images.decode import ImageLimits
from pointillist.images.store import STORED_NAME, read_stored
from pointillist.rollouts.client import api_key

logger = logging.getLogger(__name__)

_FOREVER: Final = {"Cache-Control": "private, max-age=31536000, immutable"}
"""A name is a hash: what it names never changes."""


def create_app(image_dir: Path, paths: RunPaths, key: str, limits: ImageLimits) -> Starlette:
    """The web application.

    Args:
        image_dir: The writers' store.
        paths: The run's folder, for weights.
        key: That requests must bring as a bearer token.
        limits: What an image may be at most.
    """

    async def image(request: Request) -> Response:
        name = request.path_params["name"]
        if not STORED_NAME.fullmatch(name):
            return _refusal(404, "expected /images/<hh>/<sha256>.<ext>")
        try:
            data = await run_in_threadpool(read_stored, image_dir, name, limits)
        except (MissingImageError, RefError) as error:
            return _refusal(404, str(error))
        return Response(data, media_type="application/octet-stream", headers=_FOREVER)

    async def newest(_: Request) -> Response:
        return JSONResponse({"version": latest_broadcast(paths)})

    async def weights(request: Request) -> Response:
        file = paths.broadcast_step(request.path_params["version"]) / WEIGHTS_FILE
        return FileResponse(file) if file.is_file() else _refusal(404, "no weights of this version")

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def with_key(request: Request, call_next: RequestResponseEndpoint) -> Response:
        given = request.headers.get("authorization", "").encode()
        if request.url.path != "/health" and not secrets.compare_digest(given, f"Bearer {key}".encode()):
            return _refusal(401, "expected Authorization: Bearer <key of the run>")
        return await call_next(request)

    routes = [
        Route("/images/{name:path}", image),
        Route("/weights", newest),
        Route("/weights/{version:int}", weights),
        Route("/health", health),
    ]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=with_key)])


def serve(config: AssetServerConfig) -> None:
    """Serves until the process is told to stop.

    Raises:
        ConfigError: The key is not set.
    """
    assets, output_dir = config.multimodal.assets, config.output_dir.resolve()
    image_dir = writer_image_dir(config.multimodal, output_dir, os.environ)
    key = api_key(assets.api_key_var)
    app = create_app(image_dir, RunPaths(output_dir), key, config.multimodal.limits.image_limits())
    logger.info("serving images of %s on %s:%d", image_dir, assets.host, assets.port)
    uvicorn.run(app, host=assets.host, port=assets.port, log_level="warning", timeout_graceful_shutdown=2)


def _refusal(status: int, message: str) -> Response:
    return Response(json.dumps({"error": {"message": message, "code": status}}), status, media_type="application/json")
