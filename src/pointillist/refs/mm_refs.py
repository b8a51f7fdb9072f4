"""References in training samples: which image stands behind which span of tokens.

`build_mm_refs` is the gate through which every multimodal sample passes on its way to training. It checks the
descriptors, and that images and image tokens cover each other exactly, in both directions: training blind while
looking healthy is the worst failure there is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pointillist.errors import RefError
from pointillist.images.store import SHA256_HEX
from pointillist.refs.descriptor import parse_descriptor
from pointillist.refs.wire import ImageRef

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Values of `mm_token_type_ids`."""


class MMImageRef(msgspec.Struct, array_like=True, frozen=True):
    """One image of a training sample."""

    item: dict[str, Any]
    """The raw descriptor."""
    hash: str
    """sha256 of the file's bytes, 64 hex digits."""
    uri: str
    """`file://` URL, the same as in `item`."""
    offset: int
    """Index of its first placeholder token in the sample."""
    length: int
    """Number of its placeholder tokens."""

    def image_ref(self) -> ImageRef:
        """The same image as the inference wire writes it.

        Raises:
            RefError: `item` is not a descriptor, or it names another file than `uri`.
        """
        descriptor = parse_descriptor(self.item)
        if descriptor.raw_image_uri != self.uri:
            raise RefError("item.raw_image_uri and uri name different files")
        return ImageRef.of(descriptor, self.hash)

    def moved(self, by: int) -> "MMImageRef":
        """The same image, `by` tokens further on (samples packed into one row)."""
        return msgspec.structs.replace(self, offset=self.offset + by)


class MMRefs(msgspec.Struct, array_like=True, frozen=True):
    """All images of a sample or micro batch, in token order."""

    images: list[MMImageRef]


def mm_token_type_ids(token_ids: Sequence[int], image_token_id: int) -> list[int]:
    """Per token: 0 text, 1 image."""
    return [IMAGE if token == image_token_id else TEXT for token in token_ids]


def build_mm_refs(
    descriptors: Sequence[object],
    mm_hashes: Sequence[object],
    mm_placeholders: Sequence[object],
    token_type_ids: Sequence[int],
) -> MMRefs | None:
    """Builds and checks the image references of one sample.

    Args:
        descriptors: Raw descriptors, one an image, in token order.
        mm_hashes: sha256 of each image's bytes.
        mm_placeholders: `{"offset": int, "length": int}` of each image in the expanded tokens.
        token_type_ids: Per token of the sample: 0 text, 1 image, 2 video.

    Returns:
        The references, or None for a sample without images.

    Raises:
        RefError: Counts differ, a field has the wrong form, spans are unsorted or overlap, a span covers a token
            that is not an image token, or image tokens are left without an image.
    """
    if not len(descriptors) == len(mm_hashes) == len(mm_placeholders):
        raise RefError(
            f"{len(descriptors)} descriptors, {len(mm_hashes)} hashes and {len(mm_placeholders)} placeholders: "
            "expected one of each for every image"
        )
    images: list[MMImageRef] = []
    for index, (item, sha256, placeholder) in enumerate(zip(descriptors, mm_hashes, mm_placeholders, strict=True)):
        try:
            images.append(_image_ref(item, sha256, placeholder))
        except RefError as error:
            raise error.at(image_index=index) from None
    check_spans(images, token_type_ids)
    return MMRefs(images) if images else None


def check_spans(images: Sequence[MMImageRef], token_type_ids: Sequence[int]) -> None:
    """Checks that images and image tokens cover each other exactly.

    Raises:
        RefError: Unsorted or overlapping spans, a span out of range or over a text token, or an image token that no
            span covers.
    """
    if VIDEO in token_type_ids:
        raise RefError(f"token {token_type_ids.index(VIDEO)} is a video token: video is not supported")
    end = 0
    for index, image in enumerate(images):
        if image.offset < end:
            raise RefError(
                f"placeholder at {image.offset} begins before {end}: unsorted or overlapping", image_index=index
            )
        if IMAGE in token_type_ids[end : image.offset]:
            raise RefError(
                f"image tokens between {end} and {image.offset} have no image: no image token without an image"
            )
        end = image.offset + image.length
        if end > len(token_type_ids):
            raise RefError(f"placeholder ends at {end}, the sample has {len(token_type_ids)} tokens", image_index=index)
        if any(kind != IMAGE for kind in token_type_ids[image.offset : end]):
            raise RefError(f"span {image.offset}..{end} covers tokens that are not image tokens", image_index=index)
    if IMAGE in token_type_ids[end:]:
        raise RefError(f"image tokens after {end} have no image: no image token without an image")


def _image_ref(item: object, sha256: object, placeholder: object) -> MMImageRef:
    descriptor = parse_descriptor(item)
    if not isinstance(sha256, str) or not SHA256_HEX.fullmatch(sha256):
        raise RefError("hash is not 64 hex digits of a sha256")
    if not isinstance(placeholder, Mapping) or placeholder.keys() != {"offset", "length"}:
        raise RefError(f"placeholder is {placeholder!r}, expected {{'offset': int, 'length': int}}")
    offset, length = placeholder["offset"], placeholder["length"]
    if type(offset) is not int or offset < 0 or type(length) is not int or length <= 0:
        raise RefError(f"placeholder has offset {offset!r}, length {length!r}; expected integers >= 0 and > 0")
    return MMImageRef(descriptor.to_dict(), sha256, descriptor.raw_image_uri, offset, length)
