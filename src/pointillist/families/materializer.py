"""From references to tensors: the one function that inference server and trainer both call.

For each image: family and fingerprint are the reader's own; the file lies under an allowed root, is named by its
hash and hashes to it; its header gives the layout that payload and placeholder claim; then its pixels are decoded
and cut into patches. Both sides call the same code, so both see the same pixels, bit for bit, or an error.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tenacity
from numpy.typing import NDArray

from pointillist.config import MultimodalConfig, resolve_image_dir
from pointillist.errors import ImageError, LayoutError, MissingImageError, RefError
from pointillist.families.base import Family, ImageLayout
from pointillist.families.layout_record import first_difference
from pointillist.images.decode import ImageLimits, decode_rgb, read_header
from pointillist.images.store import read_verified, resolve_roots
from pointillist.refs.wire import ImageRef

_FIRST_WAIT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One image, decoded; without pixels it stands for an image that is not to be had."""

    pixels: NDArray[np.uint8] | None
    layout: ImageLayout


class RawImageMaterializer:
    """Materialises references for one model."""

    def __init__(
        self, family: Family, allowed_roots: Iterable[Path], limits: ImageLimits, *, missing_image_retries: int = 0
    ) -> None:
        """Sets what may be read.

        Args:
            family: The model's adapter.
            allowed_roots: Folders that references may point into.
            limits: What an image may be at most.
            missing_image_retries: How often a file that is not there is looked for again.
        """
        self._family = family
        self._roots = resolve_roots(allowed_roots)
        self._limits = limits
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(MissingImageError),
            stop=tenacity.stop_after_attempt(missing_image_retries + 1),
            wait=tenacity.wait_exponential(multiplier=_FIRST_WAIT_SECONDS, max=2.0),
            reraise=True,
        )

    @classmethod
    def for_run(cls, family: Family, multimodal: MultimodalConfig, output_dir: Path) -> "RawImageMaterializer":
        """The reader of a run's images: its own store and the configured roots.

        Args:
            family: The model's adapter.
            multimodal: The run's settings.
            output_dir: The run's folder.
        """
        own = resolve_image_dir(multimodal, output_dir, os.environ)
        return cls(
            family,
            [own, *multimodal.allowed_roots],
            multimodal.limits.image_limits(),
            missing_image_retries=multimodal.missing_image_retries,
        )

    def materialize(self, refs: Sequence[ImageRef], lengths: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Tensors of the referenced images.

        Args:
            refs: References, in token order; an image that appears twice appears twice in the tensors.
            lengths: Number of placeholder tokens of each, as the prompt or sample has them.

        Returns:
            Keyword arguments of the model's `forward`, as numpy arrays.

        Raises:
            RefError: A reference does not fit this reader, the file, or its placeholder; the message begins with
                `image[i]`.
            MissingImageError: A file is not there.
        """
        images: list[LoadedImage] = []
        for index, (ref, length) in enumerate(zip(refs, lengths, strict=True)):
            try:
                images.append(self.load(ref, length))
            except RefError as error:
                raise RefError(f"image[{index}]: {error}") from error
        return self.tensors(images)

    def load(self, ref: ImageRef, length: int) -> LoadedImage:
        """Checks and decodes one image.

        Args:
            ref: Its reference.
            length: Number of its placeholder tokens.

        Raises:
            RefError: The reference does not fit this reader, the file, or its placeholder.
            MissingImageError: The file is not there, after all retries.
        """
        family = self._family
        if ref.family != family.name:
            raise RefError(f"family is {ref.family!r}, this model is served by {family.name!r}")
        if ref.layout_fingerprint != family.layout_fingerprint:
            raise RefError(
                f"layout_fingerprint is {ref.layout_fingerprint}, this model's is {family.layout_fingerprint}"
                + first_difference(ref.layout_fingerprint, family.layout_fields, self._roots)
            )
        data: bytes = self._retrying(read_verified, ref.raw_image_uri, ref.hash, self._roots, self._limits)
        try:
            header = read_header(data, self._limits)
            layout = family.layout(header.width, header.height)
            family.check_payload(ref.payload, layout)
            if length != layout.num_tokens:
                raise RefError(f"placeholder has {length} tokens, the image has {layout.num_tokens}")
            return LoadedImage(decode_rgb(data, self._limits), layout)
        except (LayoutError, ImageError) as error:
            raise RefError(str(error)) from error

    def stand_in(self, length: int) -> LoadedImage:
        """Zeros for an image that is not to be had and has this many placeholder tokens."""
        return LoadedImage(None, self._family.placeholder_layout(length))

    def tensors(self, images: Sequence[LoadedImage]) -> dict[str, NDArray[Any]]:
        """Tensors of decoded images, as `materialize` returns them."""
        return self._family.materialize([image.pixels for image in images], [image.layout for image in images])
