"""From references to tensors: the one function that inference server and trainer both call.

For each image: family and fingerprint are the reader's own; the file lies under an allowed root, is named by its
hash and hashes to it; its header gives the layout that payload and placeholder claim; its pixels are decoded and cut
into uint8 patches. Both sides call the same code, so both see the same pixels, bit for bit, or an error.

Images of a batch are loaded by a pool of threads (hashing, decoding, copying and looking up release the GIL), each
distinct one once; patches are kept in a cache of bounded size, because groups and turns bring the same image again.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pointillist.assets.cache import FetchedImages
from pointillist.assets.configured import fetched_images
from pointillist.base.image_limits import ImageLimits
from pointillist.config.shared import ReadingConfig
from pointillist.errors import ImageError, LayoutError, MissingImageError, RefError
from pointillist.families.base import Family, ImageLayout
from pointillist.families.layout_record import first_difference
from pointillist.images.decode import OpenedImage, is_nearly_constant, read_header
from pointillist.images.store import StoredImage, read_intact, resolve_roots, stored_name
from pointillist.pixels.cache import ImageCache, LoadedImage
from pointillist.pixels.join import PatchJoiner
from pointillist.pixels.levels import PixelDtype
from pointillist.refs import MMImageRef
from pointillist.runs.image_dir import resolve_image_dir

logger = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 2.0
_MIB = 1024 * 1024

_T = TypeVar("_T")
_Outcome = LoadedImage | RefError | MissingImageError
_Key = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """The distinct images of a batch of references."""

    images: list[LoadedImage]
    """Distinct, in order of first appearance."""
    index: list[int]
    """Per reference: its image."""
    errors: dict[int, RefError | MissingImageError]
    """Per reference that could not be materialised: why. Its image is a stand-in of zeros."""


class RawImageMaterializer:
    """Materialises references for one model. Safe to be called from several threads."""

    def __init__(
        self,
        family: Family,
        allowed_roots: Iterable[Path],
        limits: ImageLimits,
        *,
        fetched: FetchedImages | None = None,
        missing_image_retries: int = 0,
        threads: int | None = None,
        cache_bytes: int = 256 * _MIB,
    ) -> None:
        """Sets what may be read.

        Args:
            family: The model's adapter.
            allowed_roots: Folders that references may point into.
            limits: What an image may be at most.
            fetched: Where images come from that are not in these folders; None if there is no such place.
            missing_image_retries: How often a file that is not there is looked for again.
            threads: Images that are loaded at once; None is one a core.
            cache_bytes: uint8 patches that are kept, in bytes.
        """
        self.family = family
        self.cache = ImageCache(cache_bytes)
        self._roots = resolve_roots(allowed_roots)
        self._limits = limits
        self._fetched = fetched
        self._pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), thread_name_prefix="materialize")
        self.joiner = PatchJoiner(family, self._map)
        self._waits = [
            min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS) for attempt in range(missing_image_retries)
        ]

    @classmethod
    def for_run(cls, family: Family, config: ReadingConfig) -> "RawImageMaterializer":
        """The reader of a run's images: its own store and the configured roots.

        Args:
            family: The model's adapter.
            config: Config of the process that reads.
        """
        multimodal, output_dir = config.multimodal, config.output_dir
        own = resolve_image_dir(multimodal, output_dir, os.environ)
        return cls(
            family,
            [own, *multimodal.allowed_roots],
            multimodal.limits.image_limits(),
            fetched=fetched_images(multimodal, output_dir),
            missing_image_retries=multimodal.missing_image_retries,
            threads=config.reader.threads,
            cache_bytes=config.reader.cache_bytes,
        )

    def materialize(self, refs: Sequence[MMImageRef], dtype: PixelDtype = "float32") -> dict[str, NDArray[np.generic]]:
        """Tensors of the referenced images, as the model's `forward` takes them.

        Args:
            refs: Images, in token order; one that appears twice appears twice in the tensors.
            dtype: Type of `pixel_values`; see `tensors`.

        Raises:
            RefError: A reference does not fit this reader, the file, or its placeholder; the message begins with
                `image[i]`.
            MissingImageError: A file is not there.
        """
        batch = self.load(refs)
        return self.joiner.join([batch.images[which] for which in batch.index], dtype)

    def load(self, refs: Sequence[MMImageRef], *, keep_errors: bool = False) -> ImageBatch:
        """Loads a batch of references, each distinct image once.

        Args:
            refs: Images, their forms checked (`refs.mm_refs.check_image`); what they say of file and layout is checked
                here.
            keep_errors: Whether a faulty image is part of the result, rather than an exception.

        Returns:
            Images, of which a faulty one has as many tokens as its placeholder, if the family has such an image at all.

        Raises:
            RefError, MissingImageError: As `materialize`, of the first faulty image; not with `keep_errors`.

        Example: the references `[a, b, a]` of two files give `images` of a and b and the `index` `[0, 1, 0]`.
        """
        keys = [(ref.hash, ref.uri, ref.item["family"], ref.item["layout_fingerprint"]) for ref in refs]
        distinct = dict(zip(keys, refs, strict=True))
        loaded = self._load_all(distinct)
        images: list[LoadedImage] = []
        places: dict[object, int] = {}
        index: list[int] = []
        errors: dict[int, RefError | MissingImageError] = {}
        for number, (ref, key) in enumerate(zip(refs, keys, strict=True)):
            place: object = key
            outcome = loaded[key]
            try:
                if not isinstance(outcome, LoadedImage):
                    raise outcome
                self.family.check_payload(ref.item["payload"], outcome.layout)
                if ref.length != outcome.layout.num_tokens:
                    raise RefError(f"placeholder has {ref.length} tokens, the image has {outcome.layout.num_tokens}")
                image = outcome
            except (LayoutError, RefError, MissingImageError) as error:
                fault = RefError(str(error)) if isinstance(error, LayoutError) else error
                if not keep_errors:
                    raise fault.at(image_index=number, uri=ref.uri, sha256=ref.hash) from None
                errors[number] = fault
                place, image = number, LoadedImage(None, self._layout_in_place(ref.length))
            if place not in places:
                places[place] = len(images)
                images.append(image)
            index.append(places[place])
        return ImageBatch(images, index, errors)

    def _layout_in_place(self, length: int) -> ImageLayout:
        try:
            return self.family.placeholder_layout(length)
        except LayoutError:
            return self.family.layout(1, 1)

    def describe(self, uri: str) -> tuple[StoredImage, ImageLayout]:
        """A stored image and its layout, from the file's name and header.

        Args:
            uri: `file://` URL of an image below an allowed root.

        Raises:
            RefError: Not such a URL, or the file is not the image that its name says.
            MissingImageError: The file is not there, after all retries.
        """
        root, name = stored_name(uri, self._roots)
        data = self._read_patiently(root, name)
        try:
            header = read_header(data, self._limits)
            layout = self.family.layout(header.width, header.height)
        except (LayoutError, ImageError) as error:
            raise RefError(str(error)) from error
        return StoredImage(Path(name).stem, uri, header, len(data)), layout

    def _read_patiently(self, root: Path, name: str) -> bytes:
        for seconds in self._waits:
            try:
                return self._bytes(root, name)
            except MissingImageError:
                time.sleep(seconds)
        return self._bytes(root, name)

    def _bytes(self, root: Path, name: str) -> bytes:
        """The image's file, verified: from its folder, else fetched by its hash."""
        try:
            return read_intact(root, name, self._limits)
        except MissingImageError:
            if self._fetched is None:
                raise
        return self._fetched.read(name, Path(name).stem)

    def num_bytes(self, refs: Sequence[MMImageRef]) -> int:
        """uint8 bytes of images with so many placeholder tokens, before any of them is read.

        Raises:
            LayoutError: The family has no image with so many tokens.
        """
        layouts = [self.family.placeholder_layout(ref.length) for ref in refs]
        return sum(math.prod(self.family.patches_shape(layout)) for layout in layouts)

    def _map(self, function: Callable[..., _T], *arguments: Sequence[Any]) -> Iterable[_T]:
        """`map` by the pool's threads; a single call stays in this one."""
        return map(function, *arguments) if len(arguments[0]) == 1 else self._pool.map(function, *arguments)

    def _load_all(self, distinct: dict[_Key, MMImageRef]) -> dict[_Key, _Outcome]:
        """Loads references in the pool; a file that is not there is tried again, without holding up its threads."""
        loaded = dict(zip(distinct, self._map(self._outcome, list(distinct.values())), strict=True))
        for seconds in self._waits:
            missing = [key for key, outcome in loaded.items() if isinstance(outcome, MissingImageError)]
            if not missing:
                break
            time.sleep(seconds)
            loaded |= zip(missing, self._map(self._outcome, [distinct[key] for key in missing]), strict=True)
        return loaded

    def _outcome(self, ref: MMImageRef) -> _Outcome:
        """Runs in the pool: the image, or why there is none."""
        try:
            # Also for an image that is in the cache: a reference must be good by itself.
            family, item = self.family, ref.item
            if item["family"] != family.name:
                raise RefError(f"family is {item['family']!r}, this model is served by {family.name!r}")
            if (fingerprint := item["layout_fingerprint"]) != family.layout_fingerprint:
                raise RefError(
                    f"layout_fingerprint is {fingerprint}, this model's is {family.layout_fingerprint}"
                    + first_difference(fingerprint, family.layout_fields, self._roots)
                )
            root, name = stored_name(ref.uri, self._roots, ref.hash)
            return self.cache.get(ref.hash, partial(self._read, root, name))
        except (RefError, MissingImageError) as error:
            return error
        except Exception as error:  # of a decoder, of a file system: one image is at fault, the others are not
            logger.exception("image %s cannot be materialised", ref.uri)
            return RefError(f"image {ref.hash} cannot be materialised ({type(error).__name__}: {error})")

    def _read(self, root: Path, name: str) -> LoadedImage:
        data = self._bytes(root, name)
        try:
            opened = OpenedImage(data, self._limits)
            layout = self.family.layout(opened.header.width, opened.header.height)
            pixels = opened.decode()
            image = LoadedImage(self.family.patches(pixels, layout), layout, is_nearly_constant(pixels))
        except (LayoutError, ImageError) as error:
            raise RefError(str(error)) from error
        except MemoryError:  # it may go when other images are done
            raise MissingImageError(
                f"image {Path(name).stem} cannot be decoded now: there is not enough memory"
            ) from None
        if image.constant:
            self._warn_of_constant(root / name)
        return image

    def _warn_of_constant(self, path: Path) -> None:
        """Says so for the first one, the tenth, the hundredth: blanked control runs have nothing else."""
        number = self.cache.counts.constant + 1
        if str(number).strip("0") == "1":
            logger.warning(
                "image %s shows (nearly) one colour only, number %d of those that were decoded here: a picture that is "
                "black, white or grey where it should not be was made or read wrongly",
                path, number,
            )  # fmt: skip
