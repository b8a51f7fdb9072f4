"""Pixels in numpy: from uint8 levels to normalised numbers, by look-up."""

from collections.abc import Mapping
from typing import Final, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

PixelDtype = Literal["float32", "bfloat16", "uint8"]
"""Type of `pixel_values`: normalised, or uint8 patches of one frame that the consumer normalises by `pixel_levels`."""


# Values that are looked up between two writes: about what the second-level cache of a core holds beside the table.
_CHUNK: Final = 65_536


_NUMPY_DTYPES: Final[Mapping[str, type[np.generic]]] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Normalizer:
    """Looks uint8 patches up in a table of normalised levels, two neighbouring values at a time."""

    def __init__(self, levels: NDArray[np.float32], frames: int, dtype: PixelDtype) -> None:
        """Builds the table, of 65,536 pairs a channel.

        Args:
            levels: Normalised value of each of the 256 levels, `(3, 256)`.
            frames: How often each patch is written, one copy beside the other.
            dtype: float32 or bfloat16; bfloat16 is rounded to nearest, ties to even, as torch rounds it.
        """
        self.dtype = np.dtype(_NUMPY_DTYPES[dtype])
        self.frames = frames
        values = levels.astype(self.dtype)
        self._pair_dtype = np.dtype(f"u{2 * self.dtype.itemsize}")
        # The pair of levels (low, high) stands at place low + 256 * high.
        pairs = [np.stack([np.tile(row, 256), np.repeat(row, 256)], axis=1) for row in values]
        self._pairs = [pair.view(self._pair_dtype)[:, 0] for pair in pairs]

    def write(self, patches: NDArray[np.uint8], out: NDArray[np.generic]) -> None:
        """Normalises patches.

        Args:
            patches: uint8 `(P, 3, values)`, C-contiguous, `values` even.
            out: `(P, 3, frames, values)` of this normaliser's dtype, C-contiguous; filled.
        """
        source, target = patches.view("<u2"), out.view(self._pair_dtype)
        step = max(1, _CHUNK // patches.shape[-1])
        for start in range(0, len(patches), step):
            for channel in range(3):
                # mode="clip" spares numpy a bounds check; every uint16 is inside the table.
                values = np.take(self._pairs[channel], source[start : start + step, channel], mode="clip")
                for frame in range(self.frames):
                    target[start : start + step, channel, frame] = values
