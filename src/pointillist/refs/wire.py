"""`mmraw:` strings: one image on the inference wire, information-complete.

`"mmraw:" + base64url(no padding)(canonical JSON of {family, layout_fingerprint, modality, hash, raw_image_uri,
payload})`. The grammar lives here and nowhere else.
"""

import base64
import binascii
import json
from typing import Any, Final

import msgspec

from pointillist.errors import RefError
from pointillist.images.store import SHA256_HEX
from pointillist.refs.descriptor import (
    RawImageDescriptor,
    canonical_json,
    check_family_name,
    check_fingerprint,
    check_payload,
    check_uri,
)

PREFIX: Final = "mmraw:"
MAX_CHARACTERS: Final = 16_384
"""Longest reference."""


class ImageRef(msgspec.Struct, frozen=True, kw_only=True):
    """One image as the inference server is told of it."""

    family: str
    layout_fingerprint: str
    modality: str
    hash: str
    """sha256 of the file's bytes, 64 hex digits."""
    raw_image_uri: str
    payload: dict[str, Any]

    @classmethod
    def of(cls, descriptor: RawImageDescriptor, sha256: str) -> "ImageRef":
        """The reference to the image that `descriptor` describes and whose bytes hash to `sha256`."""
        return cls(
            family=descriptor.family,
            layout_fingerprint=descriptor.layout_fingerprint,
            modality="image",
            hash=sha256,
            raw_image_uri=descriptor.raw_image_uri,
            payload=descriptor.payload,
        )


def encode_ref(ref: ImageRef) -> str:
    """The `mmraw:` string of a reference."""
    encoded = base64.urlsafe_b64encode(canonical_json(msgspec.structs.asdict(ref)))
    return PREFIX + encoded.rstrip(b"=").decode()


def decode_ref(text: object) -> ImageRef:
    """The reference that an `mmraw:` string holds, with every field's form checked.

    Raises:
        RefError: Not an `mmraw:` string, broken base64 or JSON, missing or foreign keys, or a field of the wrong
            form. A `None` slot, a processed tensor and an inline image are each told what to send instead.
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
    return _ref_of(_decode_json(text[len(PREFIX) :]))


def _decode_json(encoded: str) -> dict[str, Any]:
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        value = json.loads(raw)
    except (binascii.Error, ValueError, RecursionError):
        raise RefError("reference does not hold base64url of JSON after mmraw:") from None
    if not isinstance(value, dict):
        raise RefError(f"reference holds a JSON {type(value).__name__}, expected an object")
    return value


def _ref_of(value: dict[str, Any]) -> ImageRef:
    expected = set(ImageRef.__struct_fields__)
    if value.keys() != expected:
        raise RefError(f"reference has keys {sorted(value)[:12]}, expected {sorted(expected)}")
    if value["modality"] != "image":
        raise RefError(f"reference has modality {str(value['modality'])[:32]!r}, expected 'image'")
    sha256 = value["hash"]
    if not isinstance(sha256, str) or not SHA256_HEX.fullmatch(sha256):
        raise RefError("hash is not 64 hex digits of a sha256")
    return ImageRef(
        family=check_family_name(value["family"]),
        layout_fingerprint=check_fingerprint(value["layout_fingerprint"]),
        modality="image",
        hash=sha256,
        raw_image_uri=check_uri(value["raw_image_uri"]),
        payload=check_payload(value["payload"]),
    )
