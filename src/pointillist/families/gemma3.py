r"""The Gemma 3 family: every image becomes one square of fixed size and a fixed number of tokens.

Nothing here is like Qwen: there is no grid, the size of an image decides nothing, a placeholder in the prompt grows
into a run *with neighbours* (`\n\n<start_of_image>` ... `<end_of_image>\n\n`), and the model wants the token types
to let the tokens of an image see each other. docs/families.md walks through this file.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from pointillist.base.json_types import JsonValue
from pointillist.errors import ConfigError, LayoutError
from pointillist.families.arrays import pil_normalization_levels, planes_by_pillow
from pointillist.families.base import Expansion, ForwardArgs, ImageLayout, expand_placeholders
from pointillist.families.model_files import ModelFiles, ProcessorSettings, read_settings, token_id
from pointillist.images.decode import PIXEL_RULES
from pointillist.refs.descriptor import fingerprint_of

_ALGORITHM: Final = 1


class _Size(msgspec.Struct, frozen=True):
    """Pixels that every image is resized to."""

    height: int
    width: int


class _Settings(ProcessorSettings, frozen=True, kw_only=True):
    """Settings of `Gemma3ImageProcessor`, with its defaults for what a model folder leaves out."""

    resample: object = int(Image.Resampling.BILINEAR)
    size: _Size = _Size(224, 224)
    do_pan_and_scan: object = None


class Gemma3Family:
    """Adapter for Gemma 3 without pan-and-scan."""

    name: ClassVar[str] = "gemma3"
    model_types: ClassVar[frozenset[str]] = frozenset({"gemma3"})
    forward_args: ClassVar[ForwardArgs] = ForwardArgs(
        pass_position_ids_with_mm=True,
        requires_mm_token_type_ids=True,
        token_types_argument="token_type_ids",  # noqa: S106 - no password
    )
    vision_modules: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")

    def __init__(self, files: ModelFiles) -> None:
        """Reads the model folder's settings and its tokenizer.

        Raises:
            ConfigError: Settings are missing or ask for something that this adapter does not do.
        """
        settings = read_settings(files, _Settings, resample=Image.Resampling.BILINEAR)
        if settings.do_pan_and_scan:
            raise ConfigError(f"image processor of {files.folder} has do_pan_and_scan, expected false")
        self.height, self.width = settings.size.height, settings.size.width
        self.num_tokens = token_id(files, "mm_tokens_per_image") if "mm_tokens_per_image" in files.config else 256
        self.layout_fields: Mapping[str, JsonValue] = {
            "family": self.name,
            "algorithm": _ALGORITHM,
            "height": self.height,
            "width": self.width,
            "num_tokens": self.num_tokens,
            "resample": "bilinear-pillow",
            "rescale_factor": settings.rescale_factor,
            "image_mean": list(settings.image_mean),
            "image_std": list(settings.image_std),
            "pixel_rules": PIXEL_RULES,
        }
        self.layout_fingerprint = fingerprint_of(self.layout_fields)
        self.renderer_name: str | None = None
        self.image_token_id = token_id(files, "image_token_index")
        self._begin, self._end = token_id(files, "boi_token_index"), token_id(files, "eoi_token_index")
        self.vision_token_ids = frozenset({self.image_token_id, self._begin, self._end})
        self.pixel_levels = pil_normalization_levels(settings)
        self.frames = 1
        self._blank_lines, self._line_breaks = _newline_tokens(files)

    def layout(self, width: int, height: int) -> ImageLayout:
        """The same for every image: one picture, `mm_tokens_per_image` tokens."""
        return ImageLayout((1, 1, 1), self.num_tokens, self.height, self.width)

    def payload(self, layout: ImageLayout) -> dict[str, JsonValue]:
        """`{"num_tokens": n}`."""
        return {"num_tokens": layout.num_tokens}

    def check_payload(self, payload: Mapping[str, JsonValue], layout: ImageLayout) -> None:
        """Checks that a payload is the one that images of this model have.

        Raises:
            LayoutError: Another payload.
        """
        if payload.keys() != {"num_tokens"} or payload["num_tokens"] != layout.num_tokens:
            raise LayoutError(f"payload is {str(dict(payload))[:60]}, expected {self.payload(layout)}")

    def expand(self, logical_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        """Each `<start_of_image>` becomes a blank line, itself, the image's tokens, `<end_of_image>` and a blank line.

        Raises:
            LayoutError: The number of layouts is not that of the placeholders, or a line break or another image stands
                beside one, where the tokenizer would merge line breaks and this expansion would not.
        """
        before, after = [*self._blank_lines, self._begin], [self._end, *self._blank_lines]
        expansion = expand_placeholders(logical_ids, self._begin, layouts, self.image_token_id, before, after)
        for index, token in enumerate(logical_ids):
            if token == self._begin:
                self._refuse_merges(logical_ids[max(0, index - 1) : index + 2])
        return expansion

    def placeholder_layout(self, num_tokens: int) -> ImageLayout:
        """The only layout there is.

        Raises:
            LayoutError: Another number of tokens.
        """
        if num_tokens != self.num_tokens:
            raise LayoutError(f"an image of this model has {self.num_tokens} tokens, not {num_tokens}")
        return self.layout(1, 1)

    def patches(self, pixels: NDArray[np.uint8], layout: ImageLayout) -> NDArray[np.uint8]:
        """uint8 `(1, 3, height, width)`: the whole picture, resized."""
        planes = planes_by_pillow(pixels, self.width, self.height, Image.Resampling.BILINEAR)
        return np.stack(list(planes))[None]

    def patches_shape(self, layout: ImageLayout) -> tuple[int, ...]:
        """`(1, 3, height, width)`."""
        return (1, 3, self.height, self.width)

    def image_inputs(self, layouts: Sequence[ImageLayout]) -> dict[str, NDArray[np.int64]]:
        """Nothing: all images have the same size."""
        return {}

    def _refuse_merges(self, around: Sequence[int]) -> None:
        """The tokenizer merges line breaks that meet; this expansion would leave them apart."""
        if self._line_breaks & set(around):
            raise LayoutError("a line break stands beside an image: put other text between them, or nothing")
        if list(around).count(self._begin) > 1:
            raise LayoutError("two images stand side by side: put text between them")


def _newline_tokens(files: ModelFiles) -> tuple[list[int], frozenset[int]]:
    """Tokens of a blank line, and all tokens that consist of line breaks."""
    path = files.folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"model folder {files.folder} has no tokenizer.json (a fast tokenizer is needed)")
    tokenizer = Tokenizer.from_file(str(path))
    runs = [tokenizer.encode("\n" * count, add_special_tokens=False).ids for count in range(1, 9)]
    return list(runs[1]), frozenset(token for run in runs for token in run)
