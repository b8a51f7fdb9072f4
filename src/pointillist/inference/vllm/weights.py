"""Weight versions of a vLLM server: checked before anything is touched, loaded while decoding is frozen."""

import asyncio
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pointillist.config.run_paths import WEIGHTS_FILE
from pointillist.errors import InferenceError
from pointillist.inference.protocol import RequestError, UpdateWeightsRequest
from pointillist.inference.weight_folders import WeightFolders
from pointillist.models.weights import check_weights_fit

logger = logging.getLogger(__name__)

# Everything of a vision-language checkpoint that is not the language model decides what the encoder gives.
_LANGUAGE = ("model.language_model.", "lm_head.")


class WeightUpdates:
    """Loads versions one at a time into an engine.

    pause (`keep`) -> load in every worker -> reset the caches -> set the version -> resume

    Requests in flight are frozen and go on; what they have read is read again with the new weights, because a prefix
    that other requests may share must not be of two versions. The encoder cache is reset exactly when a weight outside
    the language model has changed.
    """

    def __init__(self, engine: Any, model_dir: Path, folders: WeightFolders) -> None:
        """Takes the engine's current weights for those of the model folder.

        Args:
            engine: vLLM's `EngineClient`.
            model_dir: Folder that the engine was started with; its names and shapes are what an update must have.
            folders: Where versions are found.
        """
        self._engine = engine
        self._folders = folders
        text_config = engine.vllm_config.model_config.hf_text_config
        self._tied = bool(getattr(text_config, "tie_word_embeddings", False))
        self._first_files = sorted(model_dir.glob("*.safetensors"))
        self._shapes = _shapes_of(self._first_files)
        # Of the weights that serve; those that the engine started with are read for it at the first update.
        self._encoder: str | None = None
        self._folder: Path | None = None
        self._lock = asyncio.Lock()
        self.version = 0
        self.encoder_resets = 0
        """How often the encoder cache had to be emptied."""

    async def apply(self, request: UpdateWeightsRequest) -> None:
        """Loads a version.

        Raises:
            RequestError: 400: not below `broadcasts`, or weights that do not fit; nothing was touched. 500: the engine
                failed to load them; the last version that it had was loaded again.
        """
        async with self._lock:
            try:
                folder, digest = await asyncio.to_thread(self._check, request)
            except InferenceError as error:
                raise RequestError(f"{error}; version {self.version} serves on", param="weight_dir") from None
            await self._engine.pause_generation(mode="keep", clear_cache=False)
            try:
                await self._load(folder, digest != self._encoder)
                await self._engine.update_weight_version(str(request.weight_version))
            finally:
                await self._engine.resume_generation()
            self._folder, self._encoder, self.version = folder, digest, request.weight_version
            logger.info("weight version %d serves", self.version)

    async def _load(self, folder: Path, encoder_changed: bool) -> None:
        try:
            await self._engine.collective_rpc("pointillist_load_weights", args=(str(folder),))
        except Exception as error:
            if self._folder is not None:
                await self._engine.collective_rpc("pointillist_load_weights", args=(str(self._folder),))
            raise RequestError(
                f"weights could not be loaded ({error}); version {self.version} serves on",
                type="InternalServerError",
                code=500,
            ) from error
        await self._engine.reset_prefix_cache(reset_running_requests=True)
        await self._engine.reset_mm_cache()
        if encoder_changed:
            self.encoder_resets += 1
            await self._engine.reset_encoder_cache()

    async def load_latest(self) -> None:
        """Loads the run's newest weights, if there are any: a server that is started again must not serve old ones.

        Raises:
            RequestError: As `apply`.
        """
        if (latest := await asyncio.to_thread(self._folders.latest)) is not None:
            await self.apply(UpdateWeightsRequest(weight_dir=latest[0], weight_version=latest[1]))

    def _check(self, request: UpdateWeightsRequest) -> tuple[Path, str]:
        """The resolved folder and the digest of its encoder's weights; names and shapes must be the model's."""
        folder = self._folders.folder(request.weight_dir, request.weight_version)
        shapes = _shapes_of([folder / WEIGHTS_FILE])
        # Where it is tied to the embedding, an output layer that comes along is the embedding once more.
        tied = {"lm_head.weight"} if self._tied else set()
        check_weights_fit(self._shapes, shapes, optional=tied)
        if self._encoder is None:
            self._encoder = _encoder_digest(self._first_files)
        return folder, _encoder_digest([folder / WEIGHTS_FILE])


def _shapes_of(files: list[Path]) -> Mapping[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        with _opened(file) as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _encoder_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with _opened(file) as tensors:
            for name in sorted(tensors.keys()):
                if not name.startswith(_LANGUAGE):
                    digest.update(tensors.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InferenceError(f"weights in {file} can not be read ({error})") from None
