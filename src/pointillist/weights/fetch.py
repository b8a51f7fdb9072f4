"""Where a server finds a weight version: in the run's folder, or, on a machine without it, at the asset endpoint."""

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec

from pointillist.assets.client import AssetClient
from pointillist.assets.configured import asset_client
from pointillist.base.digests import DIGESTS_FILE, FileDigest, fault_in, write_digests
from pointillist.config import InferenceConfig
from pointillist.errors import AssetError, InferenceError, RequestError
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths, steps_in
from pointillist.weights.wire import MAX_WEIGHT_VERSION, UpdateWeightsRequest

logger = logging.getLogger(__name__)

_KEPT: Final = 2


class _Newest(msgspec.Struct):
    """What the asset endpoint says."""

    version: Annotated[int, msgspec.Meta(ge=0, le=MAX_WEIGHT_VERSION)] | None


class WeightFolders:
    """The versions that a server may load."""

    def __init__(self, config: InferenceConfig) -> None:
        """Prepares.

        Raises:
            ConfigError: The variable of the asset endpoint's key is not set.
        """
        self._paths = RunPaths(config.output_dir.resolve())
        self._assets = asset_client(config.multimodal)

    def folder(self, weight_dir: str, version: int) -> Path:
        """The folder of a version; what is not there is fetched, if there is an endpoint.

        Raises:
            InferenceError: Not a folder in the run's `broadcasts`, or one that cannot be fetched.
        """
        try:
            folder = Path(weight_dir).resolve()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, links in a circle
            raise InferenceError("weight_dir is not a path") from None
        if folder.parent != self._paths.broadcasts:
            raise InferenceError(f"weight_dir is not below {self._paths.broadcasts}")
        if self._assets is not None and not _is_whole(folder):
            return self._fetch(self._assets, version)
        return folder

    def newest_first(self) -> Iterator[tuple[str, int]]:
        """Folder and number of each version, for a server that starts in the middle of a run.

        There are none where there is no version, or no endpoint that names one: the run has not begun, or its
        orchestrator will notice that this server has old weights.
        """
        there = reversed(steps_in(self._paths.broadcasts))
        versions = [step for step in there if (self._paths.broadcast_step(step) / WEIGHTS_FILE).is_file()]
        if not versions and self._assets is not None:
            try:
                newest = msgspec.json.decode(self._assets.fetch("/weights", max_bytes=1000), type=_Newest).version
            except (AssetError, msgspec.MsgspecError) as error:
                logger.warning("beginning with the weights of the model folder: %s", error)
                newest = None
            versions = [] if newest is None else [newest]
        for version in versions:
            yield str(self._paths.broadcast_step(version)), version

    def _fetch(self, assets: AssetClient, version: int) -> Path:
        folder = self._paths.broadcast_step(version)
        try:
            (folder / DIGESTS_FILE).unlink(missing_ok=True)
            sha256 = assets.download(f"/weights/{version}", folder / WEIGHTS_FILE)
            write_digests(folder, {WEIGHTS_FILE: FileDigest(sha256, (folder / WEIGHTS_FILE).stat().st_size)})
        except (AssetError, OSError) as error:
            raise InferenceError(f"weight version {version} cannot be fetched ({error})") from None
        for old in steps_in(self._paths.broadcasts)[:-_KEPT]:
            shutil.rmtree(self._paths.broadcast_step(old), ignore_errors=True)
        return folder


def _is_whole(folder: Path) -> bool:
    """Whether weights are there, and are those that were fetched; a corrupt file is to be fetched anew."""
    if not (folder / WEIGHTS_FILE).is_file():
        return False
    if not (folder / DIGESTS_FILE).exists() or (fault := fault_in(folder)) is None:
        return True
    logger.warning("weights in %s are to be fetched anew: %s", folder, fault)
    return False


async def load_newest_usable(folders: WeightFolders, load: Callable[[UpdateWeightsRequest], Awaitable[None]]) -> None:
    """Loads the newest weights that can serve, for a server that starts in the middle of a run.

    A version that cannot is passed over with a warning: a server that died of it and is started again would die again.

    Args:
        folders: Where versions are found.
        load: Loads one, and raises `RequestError` where it cannot.
    """
    for weight_dir, version in await asyncio.to_thread(list, folders.newest_first()):
        try:
            await load(UpdateWeightsRequest(weight_dir=weight_dir, weight_version=version))
            return
        except RequestError as error:
            logger.warning("weight version %d cannot serve (%s): trying the one before it", version, error)


def check_order(request: UpdateWeightsRequest, version: int) -> None:
    """Checks that a version is not older than the one that serves.

    Raises:
        RequestError: 409: it is, and the request does not say that the run has gone back.
    """
    if request.weight_version < version and not request.rewind:
        raise RequestError(
            f"weight_version is {request.weight_version}, version {version} serves already: expected that or a newer "
            "one, or rewind = true from a run that goes on after a checkpoint",
            status=409,
            param="weight_version",
        )
