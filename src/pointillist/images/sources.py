"""Message parts that carry an image, in the four shapes users send, turned into references to stored files.

Understood, anywhere in a message (tool results included):

- OpenAI chat       `{"type": "image_url", "image_url": {"url": ...}}` (or the URL directly)
- OpenAI responses  `{"type": "input_image", "image_url": ...}`
- Hugging Face      `{"type": "image", "image": <URL, path, bytes or PIL image>}`
- Anthropic         `{"type": "image", "source": {"type": "base64" | "url", ...}}`

Each becomes `{"type": "image_url", "image_url": {"url": "file://<stored file>"}}`. What carries no image is handed
on as the same object, not copied.
"""

import base64
import binascii
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image

from pointillist.errors import MissingImageError, RefError, SourceError
from pointillist.images.store import ImageStore, StoredImage, local_path, read_verified, stored_name

_IMAGE_TYPES: Final = frozenset({"image", "image_url", "input_image"})
_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_REMOTE_URL: Final = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Sources:
    """Imports whatever names an image into one store."""

    def __init__(
        self,
        store: ImageStore,
        *,
        transform: Callable[[bytes], bytes] | None = None,
        fetch: Callable[[str], bytes] | None = None,
        local_files: bool = True,
    ) -> None:
        """Sets where images go.

        Args:
            store: The run's image store.
            transform: Applied to the bytes of every image before it is stored (for control runs that blank them).
            fetch: Gets the bytes behind an http(s) URL; None refuses such URLs.
            local_files: Whether any file of this machine may be named, or only those of the store.
        """
        self._store = store
        self._transform = transform
        self._fetch = fetch
        self._local_files = local_files

    @property
    def store_root(self) -> Path:
        """The folder that images go to."""
        return self._store.root

    def for_clients(self) -> "Sources":
        """The same for senders on a wire, who must not have files of this machine read for them."""
        return Sources(self._store, transform=self._transform, fetch=self._fetch, local_files=False)

    def put(self, source: object) -> StoredImage:
        """Stores the image that `source` names.

        Args:
            source: A `data:` or `file://` URL, a path, encoded bytes, or a PIL image (stored as PNG).

        Raises:
            SourceError: A source of another kind, a remote URL, or a file that is not there.
            ImageError: Not a decodable still image within the limits.
        """
        if isinstance(source, str) and _REMOTE_URL.match(source):
            data = self._fetched(source)
        elif not self._local_files and isinstance(source, str) and source[:5].lower() != "data:":
            return self._already_stored(source)
        else:
            data = _bytes_of(source, self._store.limits.max_bytes)
        return self._store.put(self._transform(data) if self._transform else data)

    def _already_stored(self, url: str) -> StoredImage:
        """The image behind a URL that this store gave out."""
        try:
            _, _, sha256 = stored_name(url, [self._store.root])
            data = read_verified(url, sha256, [self._store.root], self._store.limits)
        except (RefError, MissingImageError):
            raise SourceError(
                "image is named by neither a data: URL nor a file:// URL of this run's image store: files of this "
                "machine are not read for clients"
            ) from None
        return self._store.put(self._transform(data) if self._transform else data)

    def _fetched(self, url: str) -> bytes:
        if self._fetch is None or url[:4].lower() != "http":
            raise SourceError(
                "remote images are not fetched (multimodal.allow_remote is false); expected a data: URL, a file:// URL "
                "or a path"
            )
        return self._fetch(url)


def normalize_images(value: Any, sources: Sources, images: list[StoredImage]) -> Any:
    """Replaces every image part in a JSON-like value by the OpenAI chat shape with a stored `file://` URL.

    Args:
        value: A message, a list of messages, or any part of one.
        sources: Stores the images.
        images: Receives the stored images in the order in which they stand in `value`.

    Returns:
        `value` itself where it holds no image, else a copy of the containers that lead to one.
    """
    if isinstance(value, Mapping):
        kind = value.get("type")
        if isinstance(kind, str) and kind in _IMAGE_TYPES:
            stored = sources.put(_source_of(value))
            images.append(stored)
            return {"type": "image_url", "image_url": {"url": stored.uri}}
        items = {key: normalize_images(item, sources, images) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in items) else value
    if isinstance(value, list | tuple):
        parts = [normalize_images(item, sources, images) for item in value]
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return value


def _source_of(part: Mapping[str, Any]) -> object:
    """The thing inside an image part that names the image."""
    if "source" in part:  # Anthropic
        source = part["source"]
        if isinstance(source, Mapping) and source.get("type") == "base64":
            return f"data:{source.get('media_type', 'image/png')};base64,{source.get('data', '')}"
        if isinstance(source, Mapping) and source.get("type") == "url":
            return source.get("url")
        raise SourceError(f"image source of type {_type_of(source)} is not accepted, expected 'base64' or 'url'")
    for key in ("image_url", "image"):
        if key in part:
            named = part[key]
            return named.get("url") if isinstance(named, Mapping) else named
    raise SourceError(f"image part has none of 'image_url', 'image', 'source'; its keys are {sorted(part)}")


def _bytes_of(source: object, max_bytes: int) -> bytes:
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(source, Path):
        return _read_file(source, max_bytes)
    if not isinstance(source, str):
        raise SourceError(
            f"image source of type {type(source).__name__} is not accepted, expected a data: or file:// URL, a path, "
            "bytes or a PIL image"
        )
    if source[:5].lower() == "data:":
        return _decode_data_url(source, max_bytes)
    if source[:7].lower() == "file://":
        return _read_file(local_path(source), max_bytes)
    return _read_file(Path(source), max_bytes)


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    match = _DATA_URL.match(url)
    if match is None:
        raise SourceError(f"expected data:image/...;base64,..., got {url[:40]!r}")
    if (len(url) - match.end()) * 3 // 4 > max_bytes + 2:
        raise SourceError(f"data: URL is longer than the {max_bytes} bytes that an image may have")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise SourceError("data: URL does not hold valid base64") from None


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():
            raise SourceError(f"no image file at {path}")
        if (size := path.stat().st_size) > max_bytes:
            raise SourceError(f"image file {path} has {size} bytes, at most {max_bytes} are accepted")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(f"image file {path} can not be read ({error})") from None


def _type_of(source: object) -> str:
    return repr(source.get("type")) if isinstance(source, Mapping) else type(source).__name__
