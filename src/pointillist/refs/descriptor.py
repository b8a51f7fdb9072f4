"""The raw descriptor: what one image of a conversation is, in a JSON-safe dict of a few hundred bytes.

| key | value |
| --- | --- |
| `kind` | `"raw_mm_item"` |
| `family` | adapter name, such as `"qwen_vl"` |
| `raw_image_uri` | `file://` URL, the sole locator |
| `layout_fingerprint` | 32 hex digits: digest of everything that decides layout and pixels |
| `payload` | owned by the adapter, JSON-safe, such as `{"image_grid_thw": [1, 4, 4]}` |
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from pointillist.errors import RefError
from pointillist.images.store import local_path

KIND: Final = "raw_mm_item"
FINGERPRINT_HEX: Final = re.compile(r"[0-9a-f]{32}")
_FAMILY_NAME: Final = re.compile(r"[a-z0-9_]{1,64}")
# Keys by which other systems smuggle pixels or a second locator into a descriptor; each is named in its refusal.
_PROCESSED: Final = frozenset({"pixel_values", "pixel_values_videos", "mm_kwargs", "image_embeds", "data", "b64"})


class RawImageDescriptor(msgspec.Struct, frozen=True, kw_only=True):
    """A checked descriptor; `to_dict` gives the JSON-safe form that travels."""

    family: str
    raw_image_uri: str
    layout_fingerprint: str
    payload: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The descriptor as the contract writes it."""
        return {
            "kind": KIND,
            "family": self.family,
            "raw_image_uri": self.raw_image_uri,
            "layout_fingerprint": self.layout_fingerprint,
            "payload": self.payload,
        }


def parse_descriptor(item: object) -> RawImageDescriptor:
    """Checks the shape of one descriptor.

    Raises:
        RefError: Anything but the five keys of the contract with values of their types; processed tensors, `None`
            slots and inline data are each named.
    """
    if item is None:
        raise RefError("descriptor is None: every image needs its own descriptor, cached or not")
    if not isinstance(item, Mapping):
        raise RefError(f"descriptor is a {type(item).__name__}, expected a dict with kind {KIND!r}")
    if smuggled := _PROCESSED & item.keys():
        raise RefError(f"descriptor carries {sorted(smuggled)}: send the reference, pixels are made by the reader")
    expected = {"kind", *RawImageDescriptor.__struct_fields__}
    if item.keys() != expected:
        raise RefError(f"descriptor has keys {sorted(map(str, item))}, expected {sorted(expected)}")
    if item["kind"] != KIND:
        raise RefError(f"descriptor has kind {item['kind']!r}, expected {KIND!r}")
    return RawImageDescriptor(
        family=check_family_name(item["family"]),
        raw_image_uri=check_uri(item["raw_image_uri"]),
        layout_fingerprint=check_fingerprint(item["layout_fingerprint"]),
        payload=check_payload(item["payload"]),
    )


def check_family_name(value: object) -> str:
    """A name that a family can have.

    Raises:
        RefError: Not a string of a-z, 0-9 and _.
    """
    if not isinstance(value, str) or not _FAMILY_NAME.fullmatch(value):
        raise RefError(f"family is {str(value)[:64]!r}, expected a name of a-z, 0-9 and _")
    return value


def check_uri(value: object) -> str:
    """A `file://` URL with an absolute path.

    Raises:
        RefError: Anything else.
    """
    if not isinstance(value, str) or len(value) > 4096:
        raise RefError("raw_image_uri is not a string of at most 4096 characters, expected a file:// URL")
    if value[:5].lower() == "data:":
        raise RefError("raw_image_uri is an inline data: URL: store the image and send its file:// URL")
    local_path(value)
    return value


def check_fingerprint(value: object) -> str:
    """32 hex digits.

    Raises:
        RefError: Anything else.
    """
    if not isinstance(value, str) or not FINGERPRINT_HEX.fullmatch(value):
        raise RefError(f"layout_fingerprint is {str(value)[:64]!r}, expected 32 hex digits")
    return value


def check_payload(value: object) -> dict[str, Any]:
    """A dict; what is in it is the family's to check.

    Raises:
        RefError: Not a dict with string keys.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RefError(f"payload is a {type(value).__name__}, expected a dict with string keys")
    return value


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def fingerprint_of(fields: Mapping[str, Any]) -> str:
    """Layout fingerprint: the first 32 hex digits of sha256 over the canonical JSON of the deciding fields."""
    return hashlib.sha256(canonical_json(dict(fields))).hexdigest()[:32]
