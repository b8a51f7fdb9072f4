"""The Qwen-VL family: any resolution, cut into patches whose 2x2 blocks become one token each.

An image is resized so that both sides are multiples of `patch_size * merge_size` and its area lies between the
limits; then it is cut into patches, ordered block by block so that the four patches that merge into one token are
neighbours; each patch is repeated in time (a still image is a film of `temporal_patch_size` equal frames).
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pointillist.base.json_types import JsonValue
from pointillist.errors import LayoutError
from pointillist.families.arrays import pil_normalization_levels, planes_by_pillow
from pointillist.families.base import ForwardArgs, ImageLayout, PatchGridFamily
from pointillist.families.model_files import VISION_TOKENS, ModelFiles, ProcessorSettings, read_settings, token_id
from pointillist.images.decode import PIXEL_RULES
from pointillist.refs.descriptor import fingerprint_of

_ALGORITHM: Final = 1
_MAX_ASPECT_RATIO: Final = 200
# model_type -> its chat-template renderer in `renderers`; none is published for the two older generations.
_RENDERERS: Final[Mapping[str, str | None]] = {
    "qwen2_vl": None,
    "qwen2_5_vl": None,
    "qwen3_vl": "qwen3-vl",
    "qwen3_vl_moe": "qwen3-vl",
    "qwen3_5": "qwen3.5",
    "qwen3_5_moe": "qwen3.5",
}


class _Size(msgspec.Struct, frozen=True):
    """Limits of an image's area in pixels, although they are named after edges."""

    shortest_edge: int = 56 * 56
    longest_edge: int = 28 * 28 * 1280


class _Settings(ProcessorSettings, frozen=True, kw_only=True):
    """Settings of `Qwen2VLImageProcessor`, with its defaults for what a model folder leaves out."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    size: _Size | None = None
    min_pixels: int | None = None
    """Takes the place of `size.shortest_edge`."""
    max_pixels: int | None = None
    """Takes the place of `size.longest_edge`."""


class QwenVLFamily(PatchGridFamily):
    """Adapter for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5."""

    name: ClassVar[str] = "qwen_vl"
    model_types: ClassVar[frozenset[str]] = frozenset(_RENDERERS)
    # Qwen builds its own three-dimensional positions (MRoPE) and finds the images by their token types.
    forward_args: ClassVar[ForwardArgs] = ForwardArgs(pass_position_ids_with_mm=False, requires_mm_token_type_ids=True)
    vision_modules: ClassVar[tuple[str, ...]] = ("visual",)

    def __init__(self, files: ModelFiles) -> None:
        """Reads the model folder's settings.

        Raises:
            ConfigError: Settings are missing or ask for something that this adapter does not do.
        """
        settings = read_settings(files, _Settings)
        size = settings.size or _Size()
        self.min_pixels = settings.min_pixels or size.shortest_edge
        self.max_pixels = settings.max_pixels or size.longest_edge
        self.patch_size = settings.patch_size
        self.temporal_patch_size = settings.temporal_patch_size
        self.merge_size = settings.merge_size
        self.layout_fields: Mapping[str, JsonValue] = {
            "family": self.name,
            "algorithm": _ALGORITHM,
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "resample": "bicubic-pillow",
            "rescale_factor": settings.rescale_factor,
            "image_mean": list(settings.image_mean),
            "image_std": list(settings.image_std),
            "pixel_rules": PIXEL_RULES,
        }
        self.layout_fingerprint = fingerprint_of(self.layout_fields)
        self.renderer_name: str | None = _RENDERERS[files.model_type]
        self.image_token_id = token_id(files, "image_token_id")
        self.vision_token_ids = frozenset(token_id(files, key) for key in VISION_TOKENS)
        self.pixel_levels = pil_normalization_levels(settings)
        self.frames = self.temporal_patch_size

    def layout(self, width: int, height: int) -> ImageLayout:
        """Layout of an image of this size; equal to `smart_resize` of the Hugging Face processor for every size.

        Example:
            Patches of 16 pixels, blocks of 2x2: an image 100 wide and 70 high is resized to 96x64, has grid
            `(1, 4, 6)`, which is 24 patches, and 6 tokens.

        The arithmetic is that of `smart_resize`, IEEE doubles included: their roots and quotients are correctly
        rounded on every machine, and where a size falls exactly on a boundary they decide differently from exact
        integers.

        Raises:
            LayoutError: One side is more than 200 times the other.
        """
        if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
            raise LayoutError(f"image is {width}x{height}: one side is more than {_MAX_ASPECT_RATIO} times the other")
        factor = self.patch_size * self.merge_size
        # round() takes halves to the even neighbour, as the processor does; an image smaller than half a block
        # would round to nothing and always falls under min_pixels.
        rows, columns = round(height / factor), round(width / factor)
        if rows * columns * factor**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / shrink / factor))
            columns = max(1, math.floor(width / shrink / factor))
        elif rows * columns * factor**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows = math.ceil(height * grow / factor)
            columns = math.ceil(width * grow / factor)
        if rows < 1 or columns < 1:
            raise LayoutError(f"image is {width}x{height}: too small for blocks of {factor} pixels under these limits")
        return ImageLayout(
            grid_thw=(1, rows * self.merge_size, columns * self.merge_size),
            num_tokens=rows * columns,
            resized_height=rows * factor,
            resized_width=columns * factor,
        )

    def payload(self, layout: ImageLayout) -> dict[str, JsonValue]:
        """`{"image_grid_thw": [t, h, w]}`, in patches."""
        return {"image_grid_thw": list(layout.grid_thw)}

    def check_payload(self, payload: Mapping[str, JsonValue], layout: ImageLayout) -> None:
        """Checks that a payload is the one that an image of this layout has.

        Raises:
            LayoutError: Malformed, or another grid.
        """
        grid = payload.get("image_grid_thw")
        if payload.keys() != {"image_grid_thw"} or not (
            isinstance(grid, list) and len(grid) == 3 and all(type(value) is int and value > 0 for value in grid)
        ):
            raise LayoutError(f"payload has keys {sorted(payload)}, expected image_grid_thw with three integers > 0")
        if tuple(grid) != layout.grid_thw:
            raise LayoutError(f"payload has image_grid_thw {grid}, the image has {list(layout.grid_thw)}")

    def patches(self, pixels: NDArray[np.uint8], layout: ImageLayout) -> NDArray[np.uint8]:
        """uint8 `(P, 3, patch_size**2)`, block by block; one frame, not yet repeated in time.

        Example:
            A grid of 2 x 4 patches with `merge_size` 2, numbered row by row as `0 1 2 3 / 4 5 6 7`: the order is
            `0 1 4 5 2 3 6 7`, so each four neighbours become one token.
        """
        height, width = layout.resized_height, layout.resized_width
        patch, merge = self.patch_size, self.merge_size
        rows, columns = height // (patch * merge), width // (patch * merge)
        out = np.empty((rows * columns * merge**2, 3, patch**2), dtype=np.uint8)
        # Colours first, then whole rows of a patch are moved at once, each as one item of `patch` bytes: from
        # (block row, row in block, y, block column, column in block) to
        # (block row, block column, row in block, column in block, colour, y).
        item = np.dtype((np.void, patch))
        target = out.view(item).reshape(rows, columns, merge, merge, 3, patch)
        for channel, plane in enumerate(planes_by_pillow(pixels, width, height, Image.Resampling.BICUBIC)):
            source = plane.view(item).reshape(rows, merge, patch, columns, merge)
            target[:, :, :, :, channel] = source.transpose(0, 3, 1, 4, 2)
        return out

    def patches_shape(self, layout: ImageLayout) -> tuple[int, ...]:
        """`(P, 3, patch_size**2)`."""
        return (math.prod(layout.grid_thw), 3, self.patch_size**2)
