"""vLLM's token server with images from references: the items that this engine expects, made from stored files."""

from contextvars import ContextVar
from typing import Any, Final

import numpy as np
import torch
from fastapi.concurrency import run_in_threadpool
from transformers import BatchFeature
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems

from pointillist.errors import PointillistError
from pointillist.inference.features import request_error
from pointillist.inference.prompt import CheckedPrompt
from pointillist.pixels import LoadedImage, RawImageMaterializer
from pointillist.pixels.levels import PixelDtype
from pointillist.pixels.on_device import as_tensors

_items: ContextVar[list[MultiModalKwargsItem]] = ContextVar("items")
_FLOATS: Final[dict[torch.dtype, PixelDtype]] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class RawServingTokens(ServingTokens):
    """Serves requests whose images come beside them, as items that were made from references."""

    async def serve_with_items(self, request: GenerateRequest, items: list[MultiModalKwargsItem], http: Any) -> Any:
        """As `serve_tokens`; the request's features say where the items lie and carry no data."""
        _items.set(items)
        return await self.serve_tokens(request, http)

    def _validate_mm_cache_handles(
        self, mm_kwargs: dict[str, list[MultiModalKwargsItem | None]], mm_hashes: dict[str, list[str]]
    ) -> Any:
        """VLLM calls this between decoding a request's items and giving them to the engine: here ours step in."""
        mm_kwargs["image"] = list(_items.get())
        return super()._validate_mm_cache_handles(mm_kwargs, mm_hashes)


class ItemMaker:
    """Makes vLLM's multimodal items, as the running model's own configuration asks for them."""

    def __init__(self, vllm_config: Any, processor: Any, materializer: RawImageMaterializer) -> None:
        """Decides the type of pixels.

        Args:
            vllm_config: Of the running engine.
            processor: vLLM's multimodal processor of the model; it knows the fields of an item.
            materializer: Reads the images.
        """
        model_config = vllm_config.model_config
        self.materializer = materializer
        # Where the model normalises on the device it takes raw uint8: normalised pixels would be normalised twice.
        raw = model_config.get_multimodal_config().mm_device_do_normalize
        self.dtype: PixelDtype = "uint8" if raw else _FLOATS[model_config.dtype]
        self._processor = processor

    async def items(self, prompt: CheckedPrompt) -> list[MultiModalKwargsItem]:
        """Items of a prompt's images, made in worker threads; an image that appears twice is decoded once.

        Raises:
            RequestError: 400, by the contract's section 4.
        """
        return await run_in_threadpool(self._items, prompt) if prompt.images else []

    def _items(self, prompt: CheckedPrompt) -> list[MultiModalKwargsItem]:
        try:
            batch = self.materializer.load(prompt.images)
        except PointillistError as error:
            raise request_error(error) from None
        distinct = [self._item(image) for image in batch.images]
        return [distinct[which] for which in batch.index]

    def _item(self, image: LoadedImage) -> MultiModalKwargsItem:
        arrays = self.materializer.tensors([image], self.dtype)
        if self.dtype == "uint8" and self.materializer.family.frames > 1:
            patches = arrays["pixel_values"]
            frames = np.repeat(patches[:, :, None], self.materializer.family.frames, axis=2)
            arrays["pixel_values"] = frames.reshape(len(patches), -1)
        inputs = BatchFeature(as_tensors(arrays))
        fields = self._processor._get_mm_fields_config(inputs, {})
        item: MultiModalKwargsItem = MultiModalKwargsItems.from_hf_inputs(inputs, fields)["image"][0]
        return item
