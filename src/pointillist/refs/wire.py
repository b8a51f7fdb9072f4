"""`mmraw:` strings and the `features` that hold them: the images of a prompt on the inference wire.

`"mmraw:" + base64url(no padding)(canonical JSON of {family, layout_fingerprint, modality, hash, raw_image_uri,
payload})`, information-complete but for the image's place in the tokens, which stands beside it in `mm_placeholders`.
The grammar lives here and nowhere else.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, Final

from pointillist.errors import RefError
from pointillist.refs.descriptor import canonical_json, make_descriptor
from pointillist.refs.mm_refs import MMImageRef, check_image

PREFIX: Final = "mmraw:"
MAX_CHARACTERS: Final = 16_384
"""Longest reference."""
_KEYS: Final = frozenset({"family", "layout_fingerprint", "modality", "hash", "raw_image_uri", "payload"})


def encode_features(images: Sequence[MMImageRef]) -> dict[str, Any] | None:
    """The `features` of a generate request, or None for a prompt without images.

    Example: an image of two tokens from token 3 on gives `{"mm_hashes": {"image": ["3a52..."]}, "mm_placeholders":
    {"image": [{"offset": 3, "length": 2}]}, "kwargs_data": {"image": ["mmraw:eyJm..."]}}`.
    """
    if not images:
        return None
    return {
        "mm_hashes": {"image": [image.hash for image in images]},
        "mm_placeholders": {"image": [{"offset": image.offset, "length": image.length} for image in images]},
        "kwargs_data": {"image": [encode_ref(image) for image in images]},
    }


def encode_ref(image: MMImageRef) -> str:
    """The `mmraw:` string of an image."""
    value = {key: image.item[key] for key in ("family", "layout_fingerprint", "raw_image_uri", "payload")}
    encoded = base64.urlsafe_b64encode(canonical_json({**value, "modality": "image", "hash": image.hash}))
    return PREFIX + encoded.rstrip(b"=").decode()


def decode_ref(text: object, offset: int, length: int) -> MMImageRef:
    """The image that an `mmraw:` string holds, with every field's form checked.

    Args:
        text: The string, as it came.
        offset: Index of its first placeholder token in the prompt.
        length: Number of its placeholder tokens.

    Raises:
        RefError: Not an `mmraw:` string, broken base64 or JSON, missing or foreign keys, or a field of the wrong
            form. The messages for a `None` slot, a processed tensor and an inline image say what to send instead.
    """
    if text is None:
        raise RefError("reference is None: every image needs its mmraw: reference in every request, cached or not")
    if not isinstance(text, str):
        raise RefError(f"reference is a {type(text).__name__}, expected an mmraw: string")
    if not text.startswith(PREFIX):
        what = (
            "an inline data: URL" if text[:5].lower() == "data:" else "a string of another kind (a processed tensor?)"
        )
        raise RefError(f"reference is {what}, expected an mmraw: string")
    if len(text) > MAX_CHARACTERS:
        raise RefError(f"reference has {len(text)} characters, at most {MAX_CHARACTERS} are accepted")
    value = _decode_json(text[len(PREFIX) :])
    if value.keys() != _KEYS:
        raise RefError(f"reference has keys {sorted(value)[:12]}, expected {sorted(_KEYS)}")
    if value["modality"] != "image":
        raise RefError(f"reference has modality {str(value['modality'])[:32]!r}, expected 'image'")
    uri = value["raw_image_uri"]
    item = make_descriptor(value["family"], uri, value["layout_fingerprint"], value["payload"])
    return check_image(MMImageRef(item, value["hash"], uri, offset, length))


def _decode_json(encoded: str) -> dict[str, Any]:
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        value = json.loads(raw)
    except (binascii.Error, ValueError, RecursionError):
        raise RefError("reference does not hold base64url of JSON after mmraw:") from None
    if not isinstance(value, dict):
        raise RefError(f"reference holds a JSON {type(value).__name__}, expected an object")
    return value
