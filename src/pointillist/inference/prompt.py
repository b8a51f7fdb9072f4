"""From the images of a request, in either form of the wire, to one checked prompt. Every server begins here.

A request brings `features` with an `mmraw:` reference for every image, over the effective token stream; or, as other
clients of the ecosystem do, `content_parts` with a `file://` URL for every image, over the logical one (a single
placeholder an image). The second form becomes the first here; after that there is one way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pointillist.errors import MissingImageError, PointillistError, RequestError
from pointillist.families import ImageLayout, place_image
from pointillist.images import StoredImage
from pointillist.inference.features import images_of, invalid, request_error
from pointillist.inference.protocol import ContentPart, PromptFields
from pointillist.pixels import RawImageMaterializer
from pointillist.refs import MMImageRef
from pointillist.refs.wire import MAX_CHARACTERS

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
        return _from_parts(fields, materializer, max_images)
    return CheckedPrompt(fields.token_ids, images_of(fields, materializer.family.image_token_id, max_images))


def _from_parts(fields: PromptFields, materializer: RawImageMaterializer, max_images: int) -> CheckedPrompt:
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
    return CheckedPrompt(expansion.token_ids, images)


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


def pixel_bytes(prompt: CheckedPrompt, materializer: RawImageMaterializer) -> int:
    """Bytes of uint8 pixels that a prompt will hold, before any image is read.

    Raises:
        RequestError: 400: the family has no image with so many tokens.
    """
    try:
        return materializer.num_bytes(prompt.images)
    except PointillistError as error:
        raise request_error(error) from None


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
