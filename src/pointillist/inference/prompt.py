"""From the images of a request, in either form of the wire, to one checked prompt. Every server begins here.

A request brings `features` with an `mmraw:` reference for every image, over the effective token stream; or, as other
clients of the ecosystem do, `content_parts` with a `file://` URL for every image, over the logical one (a single
placeholder an image). The second form becomes the first here; after that there is one way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pointillist.errors import MissingImageError, PointillistError, RefError, RequestError
from pointillist.families import ImageLayout, place_image
from pointillist.images import StoredImage
from pointillist.inference.protocol import ContentPart, PromptFields
from pointillist.pixels import RawImageMaterializer
from pointillist.refs import MMImageRef
from pointillist.refs.mm_refs import IMAGE, check_spans, mm_token_type_ids
from pointillist.refs.wire import MAX_CHARACTERS, decode_ref

_FIELD: Final = "features.kwargs_data.image"
_TOKEN_BYTES: Final = 24
"""A token id of eight digits, its comma, and the white space of JSON that is indented."""
_IMAGE_BYTES: Final = MAX_CHARACTERS + 1024
"""The longest reference, with its hash, its placeholder and white space."""
_OTHER_BYTES: Final = 256 * 1024
_MAX_ALTERNATIVES: Final = 2**20
"""Likeliest tokens that one answer reports beside those that were sampled: about 100 MB while it is made."""


def longest_body(seq_len: int, max_images: int) -> int:
    """Bytes of the longest body that a legal request can need.

    Args:
        seq_len: Longest sequence, in tokens.
        max_images: Images in one prompt; each has a token at least.
    """
    return seq_len * _TOKEN_BYTES + min(max_images, seq_len) * _IMAGE_BYTES + _OTHER_BYTES


@dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """Tokens as the model reads them, and their images."""

    token_ids: list[int]
    """The effective stream."""
    images: list[MMImageRef]
    """At their places in `token_ids`."""
    pixel_bytes: int
    """uint8 bytes that the images will take, by their tokens: none of them is read yet."""


@dataclass(frozen=True, slots=True)
class ServerBounds:
    """How much a server can do."""

    seq_len: int
    """Longest sequence, prompt and completion together, in tokens."""
    vocab_size: int
    max_batch_size: int
    """Sequences that are decoded at once."""


def check_prompt(fields: PromptFields, materializer: RawImageMaterializer, max_images: int) -> CheckedPrompt:
    """Checks the images of a request. With `content_parts` it reads files: call it in a worker thread.

    Raises:
        RequestError: 400, by the contract's section 4.
    """
    if fields.content_parts:
        token_ids, images = _from_parts(fields, materializer, max_images)
    else:
        token_ids, images = fields.token_ids, _from_features(fields, materializer.family.image_token_id, max_images)
    try:
        return CheckedPrompt(token_ids, images, materializer.num_bytes(images))
    except PointillistError as error:  # the family has no image with so many tokens
        raise request_error(error) from None


def _from_features(request: PromptFields, image_token_id: int, max_images: int) -> list[MMImageRef]:
    """Images of a request, at their places in its tokens.

    Raises:
        RequestError: 400, by the contract's section 4.
    """
    token_types = mm_token_type_ids(request.token_ids, image_token_id)
    features = request.features
    if features is None:
        if IMAGE in token_types:
            raise invalid("token_ids hold image placeholders, but the request has no features", _FIELD)
        return []
    hashes, placeholders = features.mm_hashes.image, features.mm_placeholders.image
    data = features.kwargs_data.image if features.kwargs_data is not None else []
    if not len(hashes) == len(placeholders) == len(data):
        raise invalid(
            f"{len(hashes)} mm_hashes, {len(placeholders)} mm_placeholders and {len(data)} kwargs_data entries: "
            "expected one of each for every image, in every request",
            _FIELD,
        )
    if len(data) > max_images:
        raise invalid(f"{len(data)} images, at most {max_images} are accepted", _FIELD)
    images = []
    for index, (entry, sha256, place) in enumerate(zip(data, hashes, placeholders, strict=True)):
        try:
            image = decode_ref(entry, place.offset, place.length)
        except RefError as error:
            raise invalid(str(error), f"{_FIELD}[{index}]") from None
        if sha256 != image.hash:
            raise invalid("mm_hashes and the reference name different hashes", f"{_FIELD}[{index}]")
        images.append(image)
    try:
        check_spans(images, token_types)
    except RefError as error:
        raise request_error(error) from None
    return images


def _from_parts(
    fields: PromptFields, materializer: RawImageMaterializer, max_images: int
) -> tuple[list[int], list[MMImageRef]]:
    """The effective stream, and the images at their places in it."""
    parts = fields.content_parts or []
    if fields.features is not None:
        raise invalid("request has features and content_parts, expected one of them", "content_parts")
    if len(parts) > max_images:
        raise invalid(f"{len(parts)} images, at most {max_images} are accepted", "content_parts")
    described = [_describe(part, index, materializer) for index, part in enumerate(parts)]
    family = materializer.family
    try:
        expansion = family.expand(fields.token_ids, [layout for _, layout in described])
    except PointillistError as error:
        raise invalid(str(error), "content_parts") from None
    images = [
        place_image(family, stored, layout, offset)
        for (stored, layout), (offset, _) in zip(described, expansion.spans, strict=True)
    ]
    return expansion.token_ids, images


def _describe(part: ContentPart, index: int, materializer: RawImageMaterializer) -> tuple[StoredImage, ImageLayout]:
    where, url = f"content_parts[{index}]", part.url
    if part.type != "image_url" or url is None:
        raise invalid(f"part has type {str(part.type)[:32]!r}, expected image_url with a url", where)
    if not url.startswith("file://"):
        raise invalid(f"url has scheme {url.split(':')[0][:16]!r}, expected file:// into the image store", where)
    try:
        return materializer.describe(url)
    except MissingImageError as error:
        raise RequestError(str(error), type="missing_mm_image", param=where) from None
    except PointillistError as error:
        raise invalid(str(error), where) from None


def request_error(error: PointillistError) -> RequestError:
    """The structured 400 for what materialising a request's references raised; `param` names the image."""
    param = _FIELD if error.image_index is None else f"{_FIELD}[{error.image_index}]"
    if isinstance(error, MissingImageError):
        return RequestError(str(error), type="missing_mm_image", param=param)
    return invalid(str(error), param)


def invalid(message: str, param: str) -> RequestError:
    """A structured 400 for a reference."""
    return RequestError(message, type="invalid_mm_image_ref", param=param)


def check_sizes(
    token_ids: Sequence[int], max_tokens: int | None, n: int, logprobs: int | None, bounds: ServerBounds
) -> None:
    """Checks what a request asks for against what a server can do.

    Raises:
        RequestError: 400, naming the parameter.
    """
    if not all(0 <= token < bounds.vocab_size for token in token_ids):
        raise RequestError(f"token_ids must be from 0 to {bounds.vocab_size - 1}", param="token_ids")
    if n > bounds.max_batch_size:
        raise RequestError(
            f"n is {n}, at most {bounds.max_batch_size} completions are decoded at once", param="sampling_params.n"
        )
    if len(token_ids) + (max_tokens or 1) > bounds.seq_len:
        raise RequestError(
            f"prompt has {len(token_ids)} tokens, max_tokens is {max_tokens or 1}, together at most "
            f"{bounds.seq_len} are accepted",
            param="token_ids",
        )
    alternatives = n * (max_tokens or bounds.seq_len - len(token_ids)) * (logprobs or 0)
    if alternatives > _MAX_ALTERNATIVES:
        raise RequestError(
            f"logprobs is {logprobs}, which makes {alternatives} alternatives in all completions, at most "
            f"{_MAX_ALTERNATIVES} are reported",
            param="sampling_params.logprobs",
        )
