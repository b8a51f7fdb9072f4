"""The Kimi K2.5 family: never enlarged, padded with black to whole blocks, patches in plain row-major order.

An image keeps its size unless it has too many patches or too long a side; then it is shrunk by one factor. What is
left to a multiple of `patch_size * merge_size` is filled with zeros at the right and the bottom, before normalising.
Unlike Qwen's, its `pixel_values` have four dimensions and there is no copy in time.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pointillist.base.json_types import JsonValue
from pointillist.errors import ConfigError, LayoutError
from pointillist.families.base import ForwardArgs, ImageLayout, PatchGridFamily
from pointillist.families.model_files import VISION_TOKENS, ModelFiles, ProcessorSettings, read_settings, token_id
from pointillist.images.decode import PIXEL_RULES
from pointillist.refs.descriptor import fingerprint_of

_ALGORITHM: Final = 1


class _Size(msgspec.Struct, frozen=True):
    """Most patches in each direction."""

    max_height: int | None = None
    max_width: int | None = None


class _Settings(ProcessorSettings, frozen=True, kw_only=True):
    """Settings of `Kimi_K25ImageProcessor`, with its defaults for what a model folder leaves out."""

    patch_size: int = 14
    merge_size: int = 2
    max_patches: int = 16_384
    size: _Size = _Size(512, 512)


class KimiK25Family(PatchGridFamily):
    """Adapter for Kimi K2.5, as transformers ships it."""

    name: ClassVar[str] = "kimi_k25"
    model_types: ClassVar[frozenset[str]] = frozenset({"kimi_k25"})
    # Plain positions; images are found by their token id.
    forward_args: ClassVar[ForwardArgs] = ForwardArgs(pass_position_ids_with_mm=True, requires_mm_token_type_ids=False)
    vision_modules: ClassVar[tuple[str, ...]] = ("vision_tower", "mm_projector")

    def __init__(self, files: ModelFiles) -> None:
        """Reads the model folder's settings.

        Raises:
            ConfigError: Settings are missing or ask for something that this adapter does not do.
        """
        settings = read_settings(files, _Settings)
        side = settings.size.max_height
        if side is None or side != settings.size.max_width:
            size = msgspec.to_builtins(settings.size)
            raise ConfigError(f"image processor of {files.folder} has size {size}, expected equal limits")
        self.patch_size = settings.patch_size
        self.merge_size = settings.merge_size
        self.max_patches = settings.max_patches
        self.max_side_patches = side
        self.layout_fields: Mapping[str, JsonValue] = {
            "family": self.name,
            "algorithm": _ALGORITHM,
            "patch_size": self.patch_size,
            "temporal_patch_size": 1,
            "merge_size": self.merge_size,
            "max_patches": self.max_patches,
            "max_side_patches": self.max_side_patches,
            "resample": "bicubic-antialias-torch",
            "rescale_factor": settings.rescale_factor,
            "image_mean": list(settings.image_mean),
            "image_std": list(settings.image_std),
            "pixel_rules": PIXEL_RULES,
        }
        self.layout_fingerprint = fingerprint_of(self.layout_fields)
        self.renderer_name: str | None = "kimi-k2.5"
        self.image_token_id = token_id(files, "image_token_id")
        self.vision_token_ids = frozenset(token_id(files, key) for key in VISION_TOKENS)
        self.pixel_levels = _normalization_levels(settings)
        self.frames = 1

    def layout(self, width: int, height: int) -> ImageLayout:
        """Layout of an image of this size; equal to `navit_resize` of the Hugging Face processor for every size.

        Example:
            An image 150 wide and 100 high keeps its size and is padded to 168x112: grid `(1, 8, 12)`, 24 tokens.
        """
        patch, limit = self.patch_size, self.max_side_patches * self.patch_size
        patches = max(1, height // patch) * max(1, width // patch)
        scale = min(1.0, math.sqrt(self.max_patches / patches), limit / height, limit / width)
        rows = min(max(1, int(height * scale)), limit)
        columns = min(max(1, int(width * scale)), limit)
        block = patch * self.merge_size
        grid_height, grid_width = -(-rows // block) * self.merge_size, -(-columns // block) * self.merge_size
        return ImageLayout(
            grid_thw=(1, grid_height, grid_width),
            num_tokens=grid_height * grid_width // self.merge_size**2,
            resized_height=rows,
            resized_width=columns,
        )

    def payload(self, layout: ImageLayout) -> dict[str, JsonValue]:
        """`{"image_grid_thw": [t, h, w], "resized_hw": [height, width]}`: patches, and pixels before padding."""
        return {
            "image_grid_thw": list(layout.grid_thw),
            "resized_hw": [layout.resized_height, layout.resized_width],
        }

    def check_payload(self, payload: Mapping[str, JsonValue], layout: ImageLayout) -> None:
        """Checks that a payload is the one that an image of this layout has.

        Raises:
            LayoutError: Another payload.
        """
        expected = self.payload(layout)
        for key in expected.keys() | payload.keys():
            value = payload.get(key)
            if (
                not isinstance(value, list)
                or any(type(item) is not int for item in value)
                or value != expected.get(key)
            ):
                raise LayoutError(f"payload has {key} {str(value)[:60]}, the image has {expected.get(key)}")

    def patches(self, pixels: NDArray[np.uint8], layout: ImageLayout) -> NDArray[np.uint8]:
        """uint8 `(P, 3, patch_size, patch_size)`, row by row; black where the image does not reach."""
        patch = self.patch_size
        _, rows, columns = layout.grid_thw
        canvas = np.zeros((3, rows * patch, columns * patch), dtype=np.uint8)
        canvas[:, : layout.resized_height, : layout.resized_width] = _shrink(pixels, layout).transpose(2, 0, 1)
        patches = canvas.reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
        return np.ascontiguousarray(patches).reshape(self.patches_shape(layout))

    def patches_shape(self, layout: ImageLayout) -> tuple[int, ...]:
        """`(P, 3, patch_size, patch_size)`."""
        return (math.prod(layout.grid_thw), 3, self.patch_size, self.patch_size)


def _normalization_levels(settings: ProcessorSettings) -> NDArray[np.float32]:
    """Normalised value of each of the 256 levels, float32 `(3, 256)`.

    Source: the fused `rescale_and_normalize` of transformers' torchvision backend, in float32.
    """
    factor = np.float32(1.0 / settings.rescale_factor)
    mean = np.array(settings.image_mean, dtype=np.float32) * factor
    std = np.array(settings.image_std, dtype=np.float32) * factor
    levels: NDArray[np.float32] = (np.arange(256, dtype=np.float32)[None, :] - mean[:, None]) / std[:, None]
    return levels


def _shrink(pixels: NDArray[np.uint8], layout: ImageLayout) -> NDArray[np.uint8]:
    """Antialiased bicubic by torch, which the family's processor uses; Pillow's differs by a level here and there."""
    size = (layout.resized_height, layout.resized_width)
    if pixels.shape[:2] == size:
        return pixels
    import torch

    tensor = torch.tensor(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(tensor, size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()
