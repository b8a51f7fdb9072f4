"""`pointillist assets`: the writers' images and the trainer's weights, for machines without a common file system.

| route | effect |
| --- | --- |
| `GET /images/<hh>/<sha256>.<ext>` | bytes of a stored image |
| `GET /weights` | `{"version"}` of the newest weights |
| `GET /weights/<version>` | the safetensors file of a version |
| `GET /health` | needs no key |

Read-only. An image's path has the grammar of a stored name, so nothing else below the store can be asked for; whoever
fetches one verifies its hash. No symbolic link is followed. Weights come with their `Repr-Digest` (RFC 9530) if
`digests.json` lies beside them, and by parts if asked for with `Range`. Every request brings the run's key.
"""

import base64
import logging
import os
import stat
from pathlib import Path
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pointillist.base.digests import DIGESTS_FILE, MAX_DIGESTS_BYTES, decode_digests
from pointillist.base.http_errors import answer_json
from pointillist.base.http_guard import Guard, HttpLimits, check_bearer, uvicorn_config
from pointillist.base.image_limits import ImageLimits
from pointillist.base.net import key_from_environment
from pointillist.config import AssetServerConfig
from pointillist.errors import MissingImageError, RefError, RequestError
from pointillist.images.store import STORED_NAME, open_without_links, read_stored
from pointillist.runs.image_dir import writer_image_dir
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths, latest_broadcast, number_of

logger = logging.getLogger(__name__)

_FOREVER: Final = {"Cache-Control": "private, max-age=31536000, immutable"}
"""A name is a hash: what it names never changes."""
_LIMITS: Final = HttpLimits(body_bytes=0)
"""No request has a body."""


def create_app(image_dir: Path, paths: RunPaths, key: str, limits: ImageLimits) -> ASGIApp:
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
            raise RequestError("expected /images/<hh>/<sha256>.<ext>", status=404)
        try:
            data = await run_in_threadpool(read_stored, image_dir, name, limits)
        except (MissingImageError, RefError) as error:
            raise RequestError(str(error), status=404) from None
        return Response(data, media_type="application/octet-stream", headers=_FOREVER)

    async def newest(_: Request) -> Response:
        return JSONResponse({"version": await run_in_threadpool(latest_broadcast, paths)})

    async def weights(request: Request) -> Response:
        version = number_of(request.path_params["version"])
        if version is None:
            raise RequestError("expected /weights/<version>", status=404)
        try:
            return await run_in_threadpool(_WeightsResponse.of, paths, version)
        except OSError:
            raise RequestError("no weights of this version", status=404) from None

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def check(request: Request) -> None:
        if request.scope["path"] != "/health":
            check_bearer(request, key)

    routes = [
        Route("/images/{name:path}", image),
        Route("/weights", newest),
        Route("/weights/{version}", weights),
        Route("/health", health),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={RequestError: _refused}), _LIMITS, check=check)


class _WeightsResponse(FileResponse):
    """The weights file that was opened, whatever its name comes to stand for meanwhile."""

    def __init__(self, descriptor: int, status: os.stat_result, headers: dict[str, str]) -> None:
        super().__init__(
            f"/proc/self/fd/{descriptor}",
            headers=headers,
            media_type="application/octet-stream",
            stat_result=status,
        )
        self._descriptor = descriptor

    @classmethod
    def of(cls, paths: RunPaths, version: int) -> "_WeightsResponse":
        """That of a version.

        Raises:
            OSError: There is no such file, or it is a link or no regular file.
        """
        folder = paths.broadcast_step(version).name
        descriptor = open_without_links(paths.broadcasts, f"{folder}/{WEIGHTS_FILE}")
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            sha256 = _digest(paths.broadcasts, folder, status.st_size)
        except OSError:
            os.close(descriptor)
            raise
        encoded = "" if sha256 is None else base64.b64encode(sha256).decode()
        return cls(descriptor, status, {"Repr-Digest": f"sha-256=:{encoded}:"} if encoded else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it, and closes it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._descriptor)


def _digest(root: Path, folder: str, num_bytes: int) -> bytes | None:
    """Sha256 of a version's weights as `digests.json` has it; None without one for a file of this size."""
    try:
        with os.fdopen(open_without_links(root, f"{folder}/{DIGESTS_FILE}"), "rb") as file:
            digest = decode_digests(file.read(MAX_DIGESTS_BYTES))[WEIGHTS_FILE]
            return bytes.fromhex(digest.sha256) if digest.bytes == num_bytes else None
    except (OSError, ValueError, KeyError):  # not written yet, or nothing that could be used
        return None


def serve(config: AssetServerConfig) -> None:
    """Serves until the process is told to stop.

    Raises:
        ConfigError: The key is not set.
    """
    assets, output_dir = config.multimodal.assets, config.output_dir.resolve()
    image_dir = writer_image_dir(config.multimodal, output_dir, os.environ)
    key = key_from_environment(assets.api_key_var, "the asset endpoint's key")
    app = create_app(image_dir, RunPaths(output_dir), key, config.multimodal.limits.image_limits())
    logger.info("serving images of %s on %s:%d", image_dir, assets.host, assets.port)
    uvicorn.Server(uvicorn_config(app, _LIMITS, host=assets.host, port=assets.port)).run()


async def _refused(request: Request, error: Exception) -> Response:
    return answer_json(request, error)
