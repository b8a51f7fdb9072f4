"""`MMImageRef`, an image and its place in the tokens: the one type in which an image travels, from renderer to trainer.

The renderer makes it, the session keeps it, the orchestrator packs it, the transport writes it, and the reader of
pixels takes it. It is checked where it enters a process and nowhere else: `check_image` checks one by itself,
`check_spans` checks that the images and the image tokens of a sample cover each other exactly, in both directions.
Training blind while looking healthy is the worst failure there is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pointillist.errors import RefError
from pointillist.images.store import SHA256_HEX
from pointillist.refs.descriptor import parse_descriptor

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Values of `mm_token_type_ids`."""


class MMImageRef(msgspec.Struct, array_like=True, frozen=True):
    """An image and its place in the tokens. Msgpack and JSON write it as an array of its fields, in this order."""

    item: dict[str, Any]
    """The raw descriptor (`refs/descriptor.py`)."""
    hash: str
    """sha256 of the file's bytes, 64 hex digits."""
    uri: str
    """`file://` URL, the same as in `item`."""
    offset: int
    """Index of its first placeholder token, in the prompt, sample or row that it is an image of."""
    length: int
    """Number of its placeholder tokens."""

    @property
    def family(self) -> str:
        """Name of the adapter that the image was laid out for."""
        return str(self.item["family"])

    def moved(self, by: int) -> "MMImageRef":
        """The same image, `by` tokens further on.

        Example: of two samples that are packed into one row, the first has 9 tokens; an image at offset 2 of the second
        moves by 9 and has the offset 11 in the row.
        """
        return MMImageRef(self.item, self.hash, self.uri, self.offset + by, self.length)


class MMRefs(msgspec.Struct, array_like=True, frozen=True):
    """All images of a sample or micro batch, in token order."""

    images: list[MMImageRef]


def mm_token_type_ids(token_ids: Sequence[int], image_token_id: int) -> list[int]:
    """Per token: 0 text, 1 image.

    Example: tokens `[5, 7, 7, 6]` with the image token 7 have the types `[0, 1, 1, 0]`.
    """
    return [IMAGE if token == image_token_id else TEXT for token in token_ids]


def check_image(image: MMImageRef) -> MMImageRef:
    """Checks every field of an image that comes from another process or from an environment; returns it.

    Raises:
        RefError: A field has the wrong form, or `item` and `uri` name different files.
    """
    item = parse_descriptor(image.item)
    if item["raw_image_uri"] != image.uri:
        raise RefError("item.raw_image_uri and uri name different files")
    if not isinstance(image.hash, str) or not SHA256_HEX.fullmatch(image.hash):
        raise RefError("hash is not 64 hex digits of a sha256")
    offset, length = image.offset, image.length
    if type(offset) is not int or offset < 0 or type(length) is not int or length <= 0:
        raise RefError(f"placeholder has offset {offset!r}, length {length!r}; expected integers >= 0 and > 0")
    return image


def check_images(images: Sequence[MMImageRef]) -> None:
    """`check_image` for all images of a sample.

    Raises:
        RefError: As `check_image`; the message begins with `image[i]`.
    """
    for index, image in enumerate(images):
        try:
            check_image(image)
        except RefError as error:
            raise error.at(image_index=index) from None


def build_mm_refs(
    descriptors: Sequence[object],
    mm_hashes: Sequence[object],
    mm_placeholders: Sequence[object],
    token_type_ids: Sequence[int],
) -> MMRefs | None:
    """Builds and checks the images of one sample from the parts in which other programs hold them.

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

    Example: one descriptor, its hash, `[{"offset": 1, "length": 2}]` and the types `[0, 1, 1, 0]` give one image that
    stands for tokens 1 and 2; with the types `[0, 1, 1, 1]` token 3 has no image, which is refused.
    """
    if not len(descriptors) == len(mm_hashes) == len(mm_placeholders):
        raise RefError(
            f"{len(descriptors)} descriptors, {len(mm_hashes)} hashes and {len(mm_placeholders)} placeholders: "
            "expected one of each for every image"
        )
    images: list[MMImageRef] = []
    for index, (item, sha256, place) in enumerate(zip(descriptors, mm_hashes, mm_placeholders, strict=True)):
        if not isinstance(place, Mapping) or place.keys() != {"offset", "length"}:
            raise RefError(f"placeholder is {place!r}, expected {{'offset': int, 'length': int}}", image_index=index)
        uri = item.get("raw_image_uri") if isinstance(item, dict) else None
        images.append(MMImageRef(item, sha256, uri, place["offset"], place["length"]))  # type: ignore[arg-type]
    return checked_refs(images, token_type_ids)


def checked_refs(images: Sequence[MMImageRef], token_type_ids: Sequence[int]) -> MMRefs | None:
    """The images of a sample that comes from outside, checked; None for a sample without images.

    Raises:
        RefError: As `build_mm_refs`.
    """
    check_images(images)
    check_spans(images, token_type_ids)
    return MMRefs(list(images)) if images else None


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
