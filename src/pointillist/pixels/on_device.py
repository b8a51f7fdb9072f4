"""Pixels in torch: from numpy, and normalised on the model's device, so that an eighth of float32's bytes travels."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pointillist.families import Family


def as_tensors(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, torch.Tensor]:
    """Materialised arrays as tensors over the same memory; `ml_dtypes.bfloat16` becomes torch's."""
    return {
        name: torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        if array.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(array)
        for name, array in arrays.items()
    }


class PixelNormalizer(nn.Module):
    """A family's table of normalised levels, on the device; the values equal the Hugging Face processor's exactly."""

    levels: torch.Tensor
    """float32 `(3 * 256,)`: the table, one channel after the other."""
    offsets: torch.Tensor
    """int32 `(3, 1)`: where each channel's part of the table begins."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.frames = family.frames
        self.register_buffer("levels", torch.from_numpy(family.pixel_levels).flatten(), persistent=False)
        # int32 halves the memory of the indices.
        self.register_buffer("offsets", torch.arange(3, dtype=torch.int32)[:, None] * 256, persistent=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`pixel_values` as the model's `forward` takes them, float32.

        Args:
            patches: uint8 `(P, 3, ...)`.

        Returns:
            The shape of `patches`; where they are repeated in time `(P, 3, frames, values)`, a view that repeats
            without copying and that the models' patch embedding takes as well as the flat form.
        """
        flat = patches.flatten(2)
        values = self.levels.index_select(0, (flat.int() + self.offsets).flatten()).view(flat.shape)
        if self.frames == 1:
            return values.view(patches.shape)
        return values[:, :, None].expand(-1, -1, self.frames, -1)
