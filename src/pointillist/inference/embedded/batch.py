"""The running batch: sequences of different lengths decoded together over one left-padded KV cache.

Every sequence is a row. Rows of different age are aligned at their newest token, so padding stands on the left and
one attention mask says where. New rows join by padding the shorter side and concatenating; finished rows leave by
selecting the others, and columns that are padding in every row are cut off.

Axes of tensors: `B` rows, `columns` and `heads` of the KV cache, `V` rows of the output layer.

Example:
    A row of 3 tokens in a batch of 3 columns; another of 2 tokens joins, then the first one finishes:

        mask of the batch     1 1 1
        after `join`          1 1 1 / 0 1 1
        after `decode`        1 1 1 1 / 0 1 1 1
        after `select([1])`   1 1 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from pointillist.models import LoadedModel, sample_positions
from pointillist.pixels.on_device import PixelNormalizer


class _KeysAndValues(Protocol):
    """A layer of the cache once it has read tokens; the server refuses models with layers of another kind."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens and image tensors of one request, on the CPU."""

    token_ids: torch.Tensor
    """int64 `(T,)`."""
    mm_token_type_ids: torch.Tensor
    """int64 `(T,)`; 0 text, 1 image."""
    tensors: dict[str, torch.Tensor]
    """Image arguments of the model's `forward`: `pixel_values` are uint8 patches `(P, 3, ...)`, `image_grid_thw`,
    if the family has it, is int64 `(I, 3)`. Empty without images."""


@dataclass(slots=True)
class RunningBatch:
    """State of the sequences that are being decoded; first axis of each tensor is `B`."""

    cache: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each layer, `(B, heads, columns, head_dim)`."""
    mask: torch.Tensor
    """bool `(B, columns)`: false where a column is padding."""
    next_position: torch.Tensor
    """int64 `(B,)`: position of the next token, the same in all three rows of MRoPE."""
    logits: torch.Tensor
    """float32 `(B, V)`: logits of the token that comes next."""

    def join(self, other: "RunningBatch") -> "RunningBatch":
        """Both batches as one, `self` first; as many columns as the longer one has."""
        columns = max(self.mask.shape[1], other.mask.shape[1])
        left, right = self._widened(columns), other._widened(columns)
        return RunningBatch(
            cache=[
                (torch.cat([k1, k2]), torch.cat([v1, v2]))
                for (k1, v1), (k2, v2) in zip(left.cache, right.cache, strict=True)
            ],
            mask=torch.cat([left.mask, right.mask]),
            next_position=torch.cat([self.next_position, other.next_position]),
            logits=torch.cat([self.logits, other.logits]),
        )

    def select(self, rows: Sequence[int]) -> "RunningBatch":
        """These rows, in this order; a row may come several times.

        Example:
            `select([0, 0, 2])` of a batch of 3 rows: two completions of its first prompt and one of its third.
        """
        index = torch.tensor(rows, dtype=torch.int64, device=self.mask.device)
        mask = self.mask[index]
        used = mask.any(0)
        first = int(used.int().argmax()) if bool(used.any()) else 0
        return RunningBatch(
            cache=[(keys[index, :, first:], values[index, :, first:]) for keys, values in self.cache],
            mask=mask[:, first:],
            next_position=self.next_position[index],
            logits=self.logits[index],
        )

    def _widened(self, columns: int) -> "RunningBatch":
        extra = columns - self.mask.shape[1]
        if extra == 0:
            return self
        return RunningBatch(
            cache=[(pad(keys, (0, 0, extra, 0)), pad(values, (0, 0, extra, 0))) for keys, values in self.cache],
            mask=pad(self.mask, (extra, 0)),
            next_position=self.next_position,
            logits=self.logits,
        )


@torch.inference_mode()
def prefill(loaded: LoadedModel, normalize: PixelNormalizer, prompts: Sequence[Prompt]) -> RunningBatch:
    """Reads prompts, one row each.

    Args:
        loaded: The model.
        normalize: Table of the model's family, on its device.
        prompts: Prompts; at least one.

    Returns:
        A batch of `len(prompts)` rows and as many columns as the longest prompt has tokens.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids: list[torch.Tensor] = []
    types: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    policy = loaded.family.forward_args
    for prompt in prompts:
        left = longest - len(prompt.token_ids)
        rows = sample_positions(
            loaded.model,
            policy,
            prompt.token_ids,
            prompt.mm_token_type_ids,
            prompt.tensors.get("image_grid_thw"),
        )
        ids.append(pad(prompt.token_ids, (left, 0)))
        types.append(pad(prompt.mm_token_type_ids, (left, 0)))
        masks.append(pad(torch.ones(len(prompt.token_ids), dtype=torch.bool), (left, 0)))
        positions.append(pad(rows, (left, 0)))
    mask = torch.stack(masks).to(loaded.device)
    stacked = torch.stack(positions, dim=1).to(loaded.device)  # (rows, B, columns)
    images = _concatenate([prompt.tensors for prompt in prompts], loaded.device)
    if images:
        images["pixel_values"] = normalize(images["pixel_values"])
    if images and policy.requires_mm_token_type_ids:
        images[policy.token_types_argument] = torch.stack(types).int().to(loaded.device)
    cache = DynamicCache()
    output = loaded.model(
        input_ids=torch.stack(ids).to(loaded.device),
        attention_mask=mask.long(),
        position_ids=stacked if len(stacked) > 1 else stacked[0],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **images,
    )
    return RunningBatch(_layers(cache), mask, stacked.amax(dim=(0, 2)) + 1, output.logits[:, -1].float())


@torch.inference_mode()
def decode(loaded: LoadedModel, batch: RunningBatch, token_ids: torch.Tensor) -> RunningBatch:
    """Reads one more token a row.

    Args:
        loaded: The model.
        batch: The rows so far; its cache is grown, not copied.
        token_ids: Next token of each row, int64 `(B,)`.

    Returns:
        The same rows with one more column.
    """
    mask = pad(batch.mask, (0, 1), value=True)
    positions = batch.next_position[:, None]
    three_rows = not loaded.family.forward_args.pass_position_ids_with_mm
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(batch.cache):
        cache.update(keys, values, layer)
    output = loaded.model(
        input_ids=token_ids[:, None].to(loaded.device),
        attention_mask=mask.long(),
        position_ids=positions.expand(3, -1, -1) if three_rows else positions,
        past_key_values=cache,
        use_cache=True,
    )
    return RunningBatch(_layers(cache), mask, batch.next_position + 1, output.logits[:, -1].float())


def _layers(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, `(B, heads, columns, head_dim)` each."""
    return [(layer.keys, layer.values) for layer in cast(list[_KeysAndValues], cache.layers)]


def _concatenate(tensors: Sequence[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """Image arguments of several prompts as those of one call; images of the first prompt come first."""
    names = {name for each in tensors for name in each}
    return {name: torch.cat([each[name] for each in tensors if name in each]).to(device) for name in sorted(names)}
