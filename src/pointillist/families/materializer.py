"""From references to tensors: the one function that inference server and trainer both call.

For each image: family and fingerprint are the reader's own; the file lies under an allowed root, is named by its
hash and hashes to it; its header gives the layout that payload and placeholder claim; then its pixels are decoded
and cut into patches. Both sides call `materialize`, so both see the same pixels, bit for bit, or an error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointillist.errors import ImageError, LayoutError, RefError
from pointillist.families.base import Family, ImageLayout
from pointillist.images.decode import ImageLimits, decode_rgb, read_header
from pointillist.images.store import read_verified, resolve_roots
from pointillist.refs.wire import ImageRef


@dataclass(frozen=True, slots=True)
class Materialized:
    """Tensors of several images, in the order of their references."""

    tensors: dict[str, NDArray[Any]]
    """Keyword arguments of the model's `forward`, as numpy arrays."""
    layouts: list[ImageLayout]


class RawImageMaterializer:
    """Materialises references for one model."""

    def __init__(self, family: Family, allowed_roots: Iterable[Path], limits: ImageLimits) -> None:
        """Sets what may be read.

        Args:
            family: The model's adapter.
            allowed_roots: Folders that references may point into.
            limits: What an image may be at most.
        """
        self._family = family
        self._roots = resolve_roots(allowed_roots)
        self._limits = limits

    def materialize(self, refs: Sequence[ImageRef], lengths: Sequence[int]) -> Materialized:
        """Tensors of the referenced images.

        Args:
            refs: References, in token order; an image that appears twice appears twice in the tensors.
            lengths: Number of placeholder tokens of each, as the prompt or sample has them.

        Raises:
            RefError: A reference does not fit this reader, the file, or its placeholder; the message begins with
                `image[i]`.
            MissingImageError: A file is not there.
        """
        images: list[NDArray[np.uint8]] = []
        layouts: list[ImageLayout] = []
        for index, (ref, length) in enumerate(zip(refs, lengths, strict=True)):
            try:
                pixels, layout = self._load(ref, length)
            except (RefError, LayoutError, ImageError) as error:
                raise RefError(f"image[{index}]: {error}") from error
            images.append(pixels)
            layouts.append(layout)
        return Materialized(self._family.materialize(images, layouts), layouts)

    def _load(self, ref: ImageRef, length: int) -> tuple[NDArray[np.uint8], ImageLayout]:
        family = self._family
        if ref.family != family.name:
            raise RefError(f"family is {ref.family!r}, this model is served by {family.name!r}")
        if ref.layout_fingerprint != family.layout_fingerprint:
            raise RefError(
                f"layout_fingerprint is {ref.layout_fingerprint}, this model's is {family.layout_fingerprint}: the "
                "sender reads another processor configuration"
            )
        data = read_verified(ref.raw_image_uri, ref.hash, self._roots, self._limits)
        header = read_header(data, self._limits)
        layout = family.layout(header.width, header.height)
        family.check_payload(ref.payload, layout)
        if length != layout.num_tokens:
            raise RefError(f"placeholder has {length} tokens, the image has {layout.num_tokens}")
        return decode_rgb(data, self._limits), layout
