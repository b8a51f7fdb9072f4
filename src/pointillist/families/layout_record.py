"""The settings behind a fingerprint, kept beside the images so that a mismatch can be explained.

A fingerprint is a digest, and two digests that differ do not show why. A writer of images also writes the settings
behind its fingerprint once, to `<image store>/layouts/<fingerprint>.json`, and a reader whose own fingerprint is
another one names the first setting that differs. Nothing is ever decided by this file.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pointillist.base.files import write_atomically
from pointillist.base.json_types import JsonValue
from pointillist.errors import StorageError
from pointillist.families.base import Family
from pointillist.images.inventory import LAYOUTS_FOLDER
from pointillist.refs.descriptor import canonical_json, fingerprint_of


def write_layout_record(family: Family, store_root: Path) -> None:
    """Keeps the settings of a family's fingerprint in an image store.

    Raises:
        StorageError: They could not be written.
    """
    path = store_root / LAYOUTS_FOLDER / f"{family.layout_fingerprint}.json"
    try:
        if not path.exists():
            write_atomically(path, canonical_json(dict(family.layout_fields)))
    except OSError as error:
        raise StorageError(f"layout settings could not be stored in {path.parent} ({error.strerror})") from error


def first_difference(fingerprint: str, own: Mapping[str, JsonValue], roots: Iterable[Path]) -> str:
    """`"; merge_size is 1, here 2"` if the settings behind a fingerprint are known, else a general remark.

    Args:
        fingerprint: Fingerprint of the sender, 32 hex digits.
        own: Settings of the reader, `layout_fields`.
        roots: Image stores that may hold the sender's settings.
    """
    for root in roots:
        try:
            sent = json.loads((root / LAYOUTS_FOLDER / f"{fingerprint}.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(sent, dict) and fingerprint_of(sent) == fingerprint:
            for key in sorted(sent.keys() | own.keys()):
                if sent.get(key) != own.get(key):
                    return f"; the first setting that differs is {key}: {sent.get(key)!r}, here {own.get(key)!r}"
    return "; the sender reads another image processor configuration"
