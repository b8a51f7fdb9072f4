"""Where a server finds a weight version: in the run's folder, or, on a machine without it, at the asset endpoint."""

import json
import logging
import shutil
from pathlib import Path
from typing import Final

from pointillist.config import InferenceConfig, RunPaths
from pointillist.config.run_paths import WEIGHTS_FILE, latest_broadcast, steps_in
from pointillist.errors import InferenceError, MissingImageError
from pointillist.families.fetching import asset_client
from pointillist.images.fetched import AssetClient

logger = logging.getLogger(__name__)

_KEPT: Final = 2


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
            InferenceError: Not below the run's `broadcasts`, or not to be had.
        """
        folder = Path(weight_dir).resolve()
        if not folder.is_relative_to(self._paths.broadcasts):
            raise InferenceError(f"weight_dir is not below {self._paths.broadcasts}")
        if self._assets is not None and not (folder / WEIGHTS_FILE).is_file():
            return self._fetch(self._assets, version)
        return folder

    def latest(self) -> tuple[str, int] | None:
        """Folder and number of the newest version, for a server that starts in the middle of a run.

        None where there is no version, or no endpoint that says so: the run has not begun, or its orchestrator will
        notice that this server has old weights.
        """
        version = latest_broadcast(self._paths)
        if version is None and self._assets is not None:
            try:
                version = json.loads(self._assets.fetch("/weights", max_bytes=1000))["version"]
            except MissingImageError as error:
                logger.warning("beginning with the weights of the model folder: %s", error)
        return None if version is None else (str(self._paths.broadcast_step(version)), version)

    def _fetch(self, assets: AssetClient, version: int) -> Path:
        folder = self._paths.broadcast_step(version)
        try:
            assets.download(f"/weights/{version}", folder / WEIGHTS_FILE)
        except MissingImageError as error:
            raise InferenceError(str(error)) from None
        for old in steps_in(self._paths.broadcasts)[:-_KEPT]:
            shutil.rmtree(self._paths.broadcast_step(old), ignore_errors=True)
        return folder
