"""The protocol of a family's adapter: how its models treat images.

An adapter owns one family of models. It is built from the model folder's own configuration and answers, without
torch and without an image processor: how many placeholder tokens an image of a given size takes (`layout`), how a
token stream with one placeholder an image grows to the real one (`expand`), and how its pixels become the patches that
the model sees (`patches`, `pixel_levels`). A third-party adapter registers its class in the entry point group
`pointillist.families`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pointillist.errors import LayoutError
from pointillist.families.model_files import ModelFiles
from pointillist.images.store import StoredImage
from pointillist.refs.descriptor import make_descriptor
from pointillist.refs.mm_refs import MMImageRef


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Size of one image in the token stream and in the vision tower."""

    grid_thw: tuple[int, int, int]
    """Patches in time, height and width."""
    num_tokens: int
    """Placeholder tokens in the language model."""
    resized_height: int
    """Pixels after the resize that the family prescribes."""
    resized_width: int


@dataclass(frozen=True, slots=True)
class ForwardArgs:
    """Which arguments a model's `forward` takes beside tokens and pixels."""

    pass_position_ids_with_mm: bool
    """Whether 1-D position ids are passed when images are (False: the model builds its own, as MRoPE does)."""
    requires_mm_token_type_ids: bool
    """Whether the token types (0 text, 1 image) must be passed when images are."""
    token_types_argument: str = "mm_token_type_ids"  # noqa: S105 - no password
    """Name of the argument that takes them."""


@dataclass(frozen=True, slots=True)
class Expansion:
    """A logical token stream (one placeholder an image) grown to the effective one."""

    token_ids: list[int]
    source: list[int]
    """Per effective token: the index of the logical token it came from."""
    spans: list[tuple[int, int]]
    """Per image: offset and length of its placeholder tokens in `token_ids`."""


class Family(Protocol):
    """Adapter of one model family; see the module's docstring."""

    name: ClassVar[str]
    """The `family` of descriptors and references."""
    model_types: ClassVar[frozenset[str]]
    """`model_type` values of `config.json` that this adapter serves."""
    forward_args: ClassVar[ForwardArgs]
    vision_modules: ClassVar[tuple[str, ...]]
    """Vision tower and projector: their names in the Hugging Face model's `model`. All else is the language model."""

    image_token_id: int
    """The placeholder."""
    vision_token_ids: frozenset[int]
    """All special tokens of images and videos: the policy may not sample them."""
    renderer_name: str | None
    """Name of the chat-template renderer in the `renderers` package; None if there is none."""
    layout_fields: Mapping[str, Any]
    """Everything that decides layout and pixels; its digest is the fingerprint."""
    layout_fingerprint: str
    pixel_levels: NDArray[np.float32]
    """Normalised value of each of the 256 levels, `(3, 256)`: normalising is one look-up, the same on every device."""
    frames: int
    """How often each patch is repeated in time, as a film of equal frames; 1 if the model takes no films."""

    def __init__(self, files: ModelFiles) -> None: ...

    def layout(self, width: int, height: int) -> ImageLayout:
        """Layout of an image of this upright size, in pixels.

        Raises:
            LayoutError: The family has no layout for such a size.
        """
        ...

    def payload(self, layout: ImageLayout) -> dict[str, Any]:
        """The JSON-safe `payload` of a descriptor."""
        ...

    def check_payload(self, payload: Mapping[str, Any], layout: ImageLayout) -> None:
        """Checks a descriptor's payload against the layout that the image itself has.

        Raises:
            LayoutError: Malformed, or it differs.
        """
        ...

    def expand(self, logical_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        """Replaces the one placeholder of each image by as many as its layout has.

        Raises:
            LayoutError: The number of layouts is not that of the placeholders.
        """
        ...

    def placeholder_layout(self, num_tokens: int) -> ImageLayout:
        """Some layout with this many tokens, to hold the place of a missing image."""
        ...

    def patches(self, pixels: NDArray[np.uint8], layout: ImageLayout) -> NDArray[np.uint8]:
        """One image in the model's order, before it is normalised.

        Args:
            pixels: Decoded image, uint8, `(height, width, 3)`.
            layout: Its layout.

        Returns:
            uint8 of shape `patches_shape(layout)`, C-contiguous.
        """
        ...

    def patches_shape(self, layout: ImageLayout) -> tuple[int, ...]:
        """Shape of an image's patches: `(patches, 3, ...)`; the second axis is the colour channel."""
        ...

    def image_inputs(self, layouts: Sequence[ImageLayout]) -> dict[str, NDArray[Any]]:
        """What the model's `forward` takes beside `pixel_values`, such as `image_grid_thw`."""
        ...


def place_image(family: Family, stored: StoredImage, layout: ImageLayout, offset: int) -> MMImageRef:
    """A stored image at its place in the tokens.

    Args:
        family: The model's adapter.
        stored: The image.
        layout: Its layout in this family.
        offset: Index of its first placeholder token.

    Example: with patches of 8 and blocks of 2x2, an image of 32x32 pixels has the payload
    `{"image_grid_thw": [1, 4, 4]}` and the length 4.
    """
    payload = family.payload(layout)
    item = make_descriptor(family.name, stored.uri, family.layout_fingerprint, payload)
    return MMImageRef(item, stored.sha256, stored.uri, offset, layout.num_tokens)


def check_placeholder_count(logical_ids: Sequence[int], placeholder_id: int, layouts: Sequence[ImageLayout]) -> None:
    """Makes sure that there is one placeholder for every image.

    Raises:
        LayoutError: There are more or fewer.
    """
    found = sum(1 for token in logical_ids if token == placeholder_id)
    if found != len(layouts):
        raise LayoutError(f"{found} image placeholders in the tokens, but {len(layouts)} images")


def expand_one_placeholder(
    logical_ids: Sequence[int], placeholder_id: int, layouts: Sequence[ImageLayout]
) -> Expansion:
    """Expansion for families whose image is a run of one repeated token: each placeholder becomes `num_tokens` ones.

    Example: tokens `[5, 7, 6]` with the placeholder 7 and a layout of 3 tokens become `[5, 7, 7, 7, 6]`, with the
    sources `[0, 1, 1, 1, 2]` and the span `(1, 3)`.

    Raises:
        LayoutError: The number of layouts is not that of the placeholders.

    Example:
        Logical ids `7 5 8` with the placeholder 5, and a layout of 3 tokens: `token_ids` `7 5 5 5 8`, `source`
        `0 1 1 1 2`, `spans` `[(1, 3)]`.
    """
    check_placeholder_count(logical_ids, placeholder_id, layouts)
    token_ids: list[int] = []
    source: list[int] = []
    spans: list[tuple[int, int]] = []
    remaining = iter(layouts)
    for index, token in enumerate(logical_ids):
        count = 1
        if token == placeholder_id:
            count = next(remaining).num_tokens
            spans.append((len(token_ids), count))
        token_ids.extend([token] * count)
        source.extend([index] * count)
    return Expansion(token_ids, source, spans)


def one_row_of_blocks(num_tokens: int, patch_size: int, merge_size: int) -> ImageLayout:
    """A layout with this many tokens, for families that cut images into square blocks of patches.

    Example:
        3 tokens, patches of 16 pixels, blocks of 2x2 patches: grid `(1, 2, 6)`, 32 pixels high, 96 wide.
    """
    side = patch_size * merge_size
    return ImageLayout((1, merge_size, merge_size * num_tokens), num_tokens, side, side * num_tokens)
