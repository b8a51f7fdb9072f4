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

from pointillist.errors import RefError
from pointillist.images.store import local_path

KIND: Final = "raw_mm_item"
FINGERPRINT_HEX: Final = re.compile(r"[0-9a-f]{32}")
_FAMILY_NAME: Final = re.compile(r"[a-z0-9_]{1,64}")
_KEYS: Final = frozenset({"kind", "family", "raw_image_uri", "layout_fingerprint", "payload"})
# Keys by which other systems smuggle pixels or a second locator into a descriptor; each is named in its refusal.
_PROCESSED: Final = frozenset({"pixel_values", "pixel_values_videos", "mm_kwargs", "image_embeds", "data", "b64"})


def make_descriptor(
    family: object, raw_image_uri: object, layout_fingerprint: object, payload: object
) -> dict[str, Any]:
    """The descriptor of an image; what comes from outside is checked by `parse_descriptor`."""
    return {
        "kind": KIND,
        "family": family,
        "raw_image_uri": raw_image_uri,
        "layout_fingerprint": layout_fingerprint,
        "payload": payload,
    }


def parse_descriptor(item: object) -> dict[str, Any]:
    """Checks the shape of a descriptor that comes from outside; returns it.

    Raises:
        RefError: Anything but the five keys of the contract with values of their types; processed tensors, `None`
            slots and inline data are each named.
    """
    if item is None:
        raise RefError("descriptor is None: every image needs its own descriptor, cached or not")
    if not isinstance(item, dict):
        raise RefError(f"descriptor is a {type(item).__name__}, expected a dict with kind {KIND!r}")
    if smuggled := _PROCESSED & item.keys():
        raise RefError(f"descriptor carries {sorted(smuggled)}: send the reference, pixels are made by the reader")
    if item.keys() != _KEYS:
        raise RefError(f"descriptor has keys {sorted(map(str, item))}, expected {sorted(_KEYS)}")
    if item["kind"] != KIND:
        raise RefError(f"descriptor has kind {item['kind']!r}, expected {KIND!r}")
    family, uri, fingerprint, payload = (
        item[key] for key in ("family", "raw_image_uri", "layout_fingerprint", "payload")
    )
    if not isinstance(family, str) or not _FAMILY_NAME.fullmatch(family):
        raise RefError(f"family is {str(family)[:64]!r}, expected a name of a-z, 0-9 and _")
    if not isinstance(uri, str) or len(uri) > 4096:
        raise RefError("raw_image_uri is not a string of at most 4096 characters, expected a file:// URL")
    if uri[:5].lower() == "data:":
        raise RefError("raw_image_uri is an inline data: URL: store the image and send its file:// URL")
    local_path(uri)
    if not isinstance(fingerprint, str) or not FINGERPRINT_HEX.fullmatch(fingerprint):
        raise RefError(f"layout_fingerprint is {str(fingerprint)[:64]!r}, expected 32 hex digits")
    if not isinstance(payload, dict) or not all(isinstance(key, str) for key in payload):
        raise RefError(f"payload is a {type(payload).__name__}, expected a dict with string keys")
    return item


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def fingerprint_of(fields: Mapping[str, Any]) -> str:
    """Layout fingerprint: the first 32 hex digits of sha256 over the canonical JSON of the deciding fields."""
    return hashlib.sha256(canonical_json(dict(fields))).hexdigest()[:32]
