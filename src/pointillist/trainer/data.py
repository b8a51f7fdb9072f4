"""From a micro batch of references to the tensors of one forward pass.

An image that a row holds several times (the rollouts of a group share their prompt) is materialised once and encoded
once; `image_index` says which of the distinct images stands behind each span.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pointillist.families import RawImageMaterializer
from pointillist.models import LoadedModel, sample_positions
from pointillist.refs import ImageRef
from pointillist.transport import MicroBatch


@dataclass(frozen=True, slots=True)
class RowTensors:
    """One packed row. Tensors named "per trained token" have length `trained`, in token order."""

    input_ids: torch.Tensor
    """int64 `(1, tokens)`."""
    position_ids: torch.Tensor
    """int64; MRoPE families `(4, 1, tokens)`: text position restarting per sample, then time, height, width; else
    `(1, tokens)` restarting per sample. The restarts are what keeps packed samples apart."""
    images: dict[str, torch.Tensor]
    """Image arguments of the model's `forward`, of the distinct images; empty without any."""
    image_index: list[int]
    """Per image span of the row, in order: index of its distinct image."""
    predict_from: torch.Tensor
    """int64, per trained token: index of the token before it, whose logits predict it."""
    targets: torch.Tensor
    """int64, per trained token: its id."""
    advantages: torch.Tensor
    """float32, per trained token."""
    sampler_logprobs: torch.Tensor
    """float32, per trained token."""
    temperatures: torch.Tensor
    """float32, per trained token."""
    weight_versions: torch.Tensor
    """int64, per trained token."""


class RowLoader:
    """Materialises micro batches for one model."""

    def __init__(self, loaded: LoadedModel, materializer: RawImageMaterializer) -> None:
        self._loaded = loaded
        self._materializer = materializer
        self.images_materialized = 0
        """Distinct images made into tensors so far."""
        self.materialize_seconds = 0.0
        """Time spent on that so far."""

    def load(self, micro_batch: MicroBatch) -> RowTensors:
        """Tensors of a micro batch, on the model's device.

        Raises:
            RefError: A reference does not fit its file or its span.
            MissingImageError: A file is not there.
        """
        if micro_batch.mm_refs is None:
            return assemble_row(self._loaded, micro_batch, {}, [])
        started = time.perf_counter()
        distinct: dict[tuple[str, int], int] = {}
        refs: list[ImageRef] = []
        lengths, image_index = [], []
        for image in micro_batch.mm_refs.images:
            key = (image.hash, image.length)
            if key not in distinct:
                distinct[key] = len(refs)
                refs.append(image.image_ref())
                lengths.append(image.length)
            image_index.append(distinct[key])
        arrays = self._materializer.materialize(refs, lengths).tensors
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.images_materialized += len(refs)
        self.materialize_seconds += time.perf_counter() - started
        return assemble_row(self._loaded, micro_batch, tensors, image_index)


def assemble_row(
    loaded: LoadedModel, micro_batch: MicroBatch, images: dict[str, torch.Tensor], image_index: list[int]
) -> RowTensors:
    """Puts a packed row together.

    Args:
        loaded: The model.
        micro_batch: Its tokens and where its images lie.
        images: Image arguments of `forward`, of the distinct images.
        image_index: Per image span: index of its distinct image.
    """
    device = loaded.device
    trained = [index for index, on in enumerate(micro_batch.loss_mask) if on]

    def per_trained(values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([values[index] for index in trained], dtype=dtype, device=device)

    return RowTensors(
        input_ids=torch.tensor([micro_batch.input_ids], device=device),
        position_ids=_positions(loaded, micro_batch, images.get("image_grid_thw"), image_index).to(device),
        images={name: tensor.to(device) for name, tensor in images.items()},
        image_index=image_index,
        predict_from=torch.tensor([index - 1 for index in trained], dtype=torch.int64, device=device),
        targets=per_trained(micro_batch.input_ids, torch.int64),
        advantages=per_trained(micro_batch.advantages, torch.float32),
        sampler_logprobs=per_trained(micro_batch.inference_logprobs, torch.float32),
        temperatures=per_trained(micro_batch.temperatures, torch.float32),
        weight_versions=per_trained(micro_batch.weight_versions, torch.int64),
    )


def _positions(
    loaded: LoadedModel, micro_batch: MicroBatch, grids: torch.Tensor | None, image_index: list[int]
) -> torch.Tensor:
    ids = torch.tensor(micro_batch.input_ids)
    types = torch.tensor(micro_batch.mm_token_type_ids)
    offsets = [image.offset for image in micro_batch.mm_refs.images] if micro_batch.mm_refs else []
    policy = loaded.family.forward_policy
    text_rows, rope_rows, start = [], [], 0
    for length in micro_batch.seq_lens:
        end = start + length
        mine = [which for which, offset in zip(image_index, offsets, strict=True) if start <= offset < end]
        own_grids = grids[mine] if grids is not None and mine else None
        rope_rows.append(sample_positions(loaded.model, policy, ids[start:end], types[start:end], own_grids))
        text_rows.append(torch.arange(length))
        start = end
    rope = torch.cat(rope_rows, dim=1)
    if policy.pass_position_ids_with_mm:
        return rope
    return torch.cat([torch.cat(text_rows)[None], rope])[:, None]
