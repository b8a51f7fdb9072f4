"""Weight versions of a vLLM server: checked before anything is touched, loaded while decoding is frozen."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pointillist.errors import InferenceError, RequestError
from pointillist.weights.fetch import WeightFolders, check_order, load_newest_usable
from pointillist.weights.load import (
    OpenWeights,
    check_values,
    check_weights_fit,
    largest_file,
    open_weights,
    this_machine,
)
from pointillist.weights.wire import UpdateWeightsRequest

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
        self._dtype = engine.vllm_config.model_config.dtype
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
            RequestError: 400: not in `broadcasts`, or weights that cannot serve; 409: older than what serves; neither
                touches anything. 500: the engine failed to load them; the last version that it had was loaded again.
        """
        async with self._lock:
            check_order(request, self.version)
            with ExitStack() as held:
                try:
                    folder, weights, encoder = await asyncio.to_thread(self._check, request, held)
                except InferenceError as error:
                    raise RequestError(f"{error}; version {self.version} serves on", param="weight_dir") from None
                paused_before = await self._engine.is_paused()
                await self._engine.pause_generation(mode="keep", clear_cache=False)
                try:
                    await self._load(folder, weights, encoder != self._encoder)
                    await self._engine.update_weight_version(str(request.weight_version))
                finally:
                    if not paused_before:
                        await self._engine.resume_generation()
            self._folder, self._encoder, self.version = folder, encoder, request.weight_version
            logger.info("weight version %d serves", self.version)

    async def _load(self, folder: Path, weights: OpenWeights, encoder_changed: bool) -> None:
        try:
            await self._load_in_workers(folder, weights)
        except Exception as error:
            if self._folder is not None:
                with open_weights(self._folder) as before:
                    await self._load_in_workers(self._folder, before)
            raise RequestError(
                f"weights could not be loaded ({error}); version {self.version} serves on",
                status=500,
            ) from error
        await self._engine.reset_prefix_cache(reset_running_requests=True)
        await self._engine.reset_mm_cache()
        if encoder_changed:
            self.encoder_resets += 1
            await self._engine.reset_encoder_cache()

    async def _load_in_workers(self, folder: Path, weights: OpenWeights) -> None:
        arguments = (str(folder), weights.sha256, weights.path, this_machine())
        await self._engine.collective_rpc("pointillist_load_weights", args=arguments)

    async def load_latest(self) -> None:
        """Loads the run's newest weights that can serve: a server that is started again must not serve old ones."""
        await load_newest_usable(self._folders, self.apply)

    def _check(self, request: UpdateWeightsRequest, held: ExitStack) -> tuple[Path, OpenWeights, str]:
        """The resolved folder, the weights, which stay open as long as `held`, and the digest of their encoder."""
        folder = self._folders.folder(request.weight_dir, request.weight_version)
        weights = held.enter_context(open_weights(folder, max_bytes=largest_file(self._shapes)))
        # Where it is tied to the embedding, an output layer that comes along is the embedding once more.
        tied = {"lm_head.weight"} if self._tied else set()
        check_weights_fit(self._shapes, weights.shapes, optional=tied)
        for name in weights.shapes:
            check_values(name, weights.tensor(name), self._dtype)
        if self._encoder is None:
            self._encoder = _encoder_of_files(self._first_files)
        return folder, weights, _encoder_digest(weights.tensor, weights.shapes)


def _shapes_of(files: list[Path]) -> Mapping[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        with _opened(file) as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _encoder_digest(tensor: Callable[[str], torch.Tensor], names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        if not name.startswith(_LANGUAGE):
            digest.update(tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encoder_of_files(files: list[Path]) -> str:
    """The same of the files that the engine was started with, each of which has some of the weights."""
    with ExitStack() as opened:
        where: dict[str, Any] = {}
        for file in files:
            tensors = opened.enter_context(_opened(file))
            where |= dict.fromkeys(tensors.keys(), tensors)
        return _encoder_digest(lambda name: where[name].get_tensor(name), where)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InferenceError(f"weights in {file} can not be read ({error})") from None
