"""Message parts that carry an image, in the shapes users send, turned into references to stored files.

Understood, anywhere in a message (tool results included):

- OpenAI chat       `{"type": "image_url", "image_url": {"url": ...}}` (or the URL directly)
- OpenAI responses  `{"type": "input_image", "image_url": ...}`
- Hugging Face      `{"type": "image", "image": <URL, path, bytes, PIL image or numpy frame>}`, the image also as
                    `{"bytes": ..., "path": ...}`; `{"type": "image", "url" | "path" | "base64": ...}`
- Anthropic         `{"type": "image", "source": {"type": "base64" | "url", ...}}`
- MCP               `{"type": "image", "data": <base64>, "mimeType": ...}`

Each becomes `{"type": "image_url", "image_url": {"url": "file://<stored file>"}}`. What carries no image is handed
on as the same object, not copied. What a sender says about the format counts for nothing: the bytes decide.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

from pointillist.base.image_limits import ImageLimits
from pointillist.errors import ImageError, MissingImageError, RefError, SourceError, StorageError
from pointillist.images.decode import encode_pillow
from pointillist.images.remote import FETCHED_AT_ONCE
from pointillist.images.store import ImageStore, StoredImage, local_path, read_intact, stored_name

_IMAGE_TYPES: Final = frozenset({"image", "image_url", "input_image"})
_KEYS: Final = ("image_url", "image", "url", "path", "base64", "data")
"""Keys of an image part that can name its image, in the order in which they are looked for."""
_IN_BASE64: Final = frozenset({"base64", "data"})

_SCHEME: Final = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HTTP: Final = re.compile(r"https?://", re.IGNORECASE)
_BASE64_MARK: Final = re.compile(r";\s*base64\s*$", re.IGNORECASE)
_LONGEST_HEADER: Final = 1000
_PICTURE_TYPES: Final = re.compile(r"image/|(?:application|binary)/octet-stream$|$", re.IGNORECASE)
_WHITE_SPACE: Final = b" \t\n\r\f\v"
_URLSAFE: Final = bytes.maketrans(b"-_", b"+/")
_LONGEST_FORM: Final = 4
"""Characters for one byte of an image, at most: percent-encoded base64."""
_LONGEST_PATH: Final = 400
_BEGINS_BASE64: Final = re.compile(r"iVBORw0KGgo|/9j/|R0lGOD|UklGR")
"""Base64 of PNG, JPEG, GIF and WebP."""
_SHOWN: Final = 60
"""Characters of a source that an error repeats."""

# For what waits for other machines: it must never wait in the threads that other work needs.
_fetchers = ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="fetch")
_walkers = ThreadPoolExecutor(1, thread_name_prefix="find-remote")


@dataclass(frozen=True, slots=True)
class _Base64:
    """The text of an image that came without the head of a data: URL."""

    text: object


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
            fetch: Gets the bytes behind an http(s) URL (`RemoteImages.fetch`); None refuses such URLs.
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
            source: A `data:` or `file://` URL, an http(s) URL where they are fetched, a path, encoded bytes, a PIL
                image or a numpy frame, uint8 `(height, width)`, `(height, width, 1)`, 3 or 4 channels (stored as PNG).

        Raises:
            SourceError: A source of another kind, a remote URL, or a file that is not there.
            ImageError: Not a decodable still image within the limits.
            StorageError: The store can not be written now.
        """
        remote = isinstance(source, str) and _SCHEME.match(source) is not None
        try:
            if remote:
                data = self._fetched(str(source))
            elif not self._local_files and _is_path(source):
                data = self._already_stored(str(source))
            else:
                data = _bytes_of(source, self._store.limits)
            return self._store.put(self._transform(data) if self._transform else data)
        except (SourceError, ImageError) as error:
            if remote:
                raise error.at(where=_shown(str(source))) from error
            if self._local_files and isinstance(error, ImageError) and _is_path(source):
                raise error.at(where=_shown_path(str(source))) from error
            raise

    async def fetch_remote(self, value: Any) -> Any:
        """Stores the remote images of a message first: for callers on an event loop, whose threads are for other work.

        They are fetched one after the other, so that no message takes all turns.

        Args:
            value: A message, a list of messages, or any part of one.

        Returns:
            `value` with `file://` URLs in their place; itself where it names none, or where none are fetched.

        Raises:
            SourceError, ImageError, StorageError: As `put`.
        """
        if self._fetch is None:
            return value
        loop = asyncio.get_running_loop()
        stored: dict[str, str] = {}
        for url in await loop.run_in_executor(_walkers, lambda: set(_remote_urls(value))):
            stored[url] = (await loop.run_in_executor(_fetchers, self.put, url)).uri
        return await loop.run_in_executor(_walkers, _with_urls, value, stored) if stored else value

    def _already_stored(self, url: str) -> bytes:
        """The image behind a URL that this store gave out."""
        try:
            return read_intact(*stored_name(url, [self._store.root]), self._store.limits)
        except (RefError, MissingImageError):
            raise SourceError(
                "image is named by neither a data: URL nor a file:// URL of this run's image store: files of this "
                "machine are not read for clients"
            ) from None

    def _fetched(self, url: str) -> bytes:
        if not _HTTP.match(url):
            raise SourceError("expected a data:, file:// or http(s) URL or a path")
        if self._fetch is None:
            raise SourceError(
                "remote images are not fetched (multimodal.allow_remote is false); expected a data: URL, a file:// URL "
                "or a path"
            )
        return self._fetch(url)


def normalize_images(value: Any, sources: Sources, images: list[StoredImage], where: str = "") -> Any:
    """Replaces every image part in a JSON-like value by the OpenAI chat shape with a stored `file://` URL.

    Args:
        value: A message, a list of messages, or any part of one.
        sources: Stores the images.
        images: Receives the stored images in the order in which they stand in `value`.
        where: What `value` is, such as `messages[2]`; errors begin with it and the way from there to the image.

    Returns:
        `value` itself where it holds no image, else a copy of the containers that lead to one.

    Raises:
        SourceError, ImageError, StorageError: As `Sources.put`.
    """
    if isinstance(value, Mapping):
        if _is_image_part(value):
            try:
                stored = sources.put(_source_of(value))
            except (SourceError, ImageError, StorageError) as error:
                raise error.at(where=where) from error
            images.append(stored)
            return {"type": "image_url", "image_url": {"url": stored.uri}}
        items = {
            key: normalize_images(item, sources, images, f"{where}.{key}" if where else str(key)[:_SHOWN])
            if isinstance(item, Mapping | list | tuple)
            else item
            for key, item in value.items()
        }
        return items if any(items[key] is not value[key] for key in items) else value
    if isinstance(value, list | tuple):
        parts = [
            normalize_images(item, sources, images, f"{where}[{index}]")
            if isinstance(item, Mapping | list | tuple)
            else item
            for index, item in enumerate(value)
        ]
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return value


def _is_image_part(value: Mapping[str, Any]) -> bool:
    kind = value.get("type")
    return isinstance(kind, str) and kind in _IMAGE_TYPES


def _remote_urls(value: Any) -> Iterator[str]:
    """http(s) URLs that image parts name, wherever in a message they stand."""
    if isinstance(value, Mapping):
        if not _is_image_part(value):
            for item in value.values():
                yield from _remote_urls(item)
        elif isinstance(source := _source_of(value), str) and _HTTP.match(source):
            yield source
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _remote_urls(item)


def _with_urls(value: Any, stored: Mapping[str, str]) -> Any:
    """The message with URLs of the store in place of remote ones."""
    if isinstance(value, Mapping):
        if not _is_image_part(value):
            return {key: _with_urls(item, stored) for key, item in value.items()}
        source = _source_of(value)
        known = stored.get(source) if isinstance(source, str) else None
        return value if known is None else {"type": "image_url", "image_url": {"url": known}}
    if isinstance(value, list | tuple):
        return [_with_urls(item, stored) for item in value]
    return value


def _source_of(part: Mapping[str, Any]) -> object:
    """The thing inside an image part that names the image."""
    if "source" in part:  # Anthropic
        source = part["source"]
        if isinstance(source, Mapping) and source.get("type") == "base64":
            return _Base64(source.get("data"))
        if isinstance(source, Mapping) and source.get("type") == "url":
            return source.get("url")
        raise SourceError(f"image source of type {_type_of(source)} is not accepted, expected 'base64' or 'url'")
    for key in _KEYS:
        named = part.get(key)
        if named is None:
            continue
        if key in _IN_BASE64 and isinstance(named, str):
            return _Base64(named)
        if isinstance(named, Mapping):  # OpenAI's {"url": ...}, and Hugging Face datasets' {"bytes": ..., "path": ...}
            return named.get("url") or named.get("bytes") or named.get("path")
        return Path(named) if key == "path" and isinstance(named, str) and not _is_url(named) else named
    raise SourceError(
        f"image part has none of {', '.join(map(repr, _KEYS))}, 'source'; its keys are "
        f"{[str(key)[:_SHOWN] for key in list(part)[:12]]}"
    )


def _bytes_of(source: object, limits: ImageLimits) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, Image.Image):
        return encode_pillow(source, limits)
    if isinstance(source, np.ndarray):
        return encode_pillow(_frame(source), limits)
    if isinstance(source, _Base64):
        if not isinstance(source.text, str | bytes):
            raise SourceError(f"expected an image's base64 as text, got {_type_of(source.text)}")
        if isinstance(source.text, str) and _is_data_url(source.text):
            return _decode_data_url(source.text, limits.max_bytes)
        return _decode_base64(source.text, limits.max_bytes)
    if isinstance(source, Path):
        return _read_file(source, limits.max_bytes)
    if not isinstance(source, str):
        raise SourceError(
            f"image source of type {type(source).__name__[:_SHOWN]} is not accepted, expected a data: or file:// URL, "
            "a path, bytes, a PIL image or a numpy array"
        )
    if _is_data_url(source):
        return _decode_data_url(source, limits.max_bytes)
    if source[:7].lower() == "file://":
        try:
            return _read_file(local_path(source), limits.max_bytes)
        except RefError as error:
            raise SourceError(str(error), where=_shown(source)) from None
    return _read_file(Path(source), limits.max_bytes)


def _is_path(source: object) -> bool:
    """Whether a source is a path or a file:// URL, given that it is no remote one."""
    return isinstance(source, str | Path) and not _is_data_url(source)


def _is_data_url(source: object) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _is_url(text: str) -> bool:
    return _is_data_url(text) or text[:7].lower() == "file://" or _SCHEME.match(text) is not None


def _frame(array: np.ndarray[Any, Any]) -> Image.Image:
    """A numpy frame as a Pillow image."""
    if array.dtype != np.uint8:
        raise SourceError(
            f"numpy image has dtype {array.dtype}, expected uint8 from 0 to 255: what black and white are in other "
            "types is for the caller to say"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise SourceError(
            f"numpy image has shape {array.shape}, expected (height, width) or (height, width, 1, 3 or 4 channels)"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    """Bytes of a data: URL, as browsers read it: the body may be percent-encoded, wrapped and unpadded."""
    end = url.find(",", 0, _LONGEST_HEADER)
    head = url[5:end] if end >= 0 else ""
    in_base64 = _BASE64_MARK.search(head)
    media_type = head.partition(";")[0].strip()
    if end < 0 or not _PICTURE_TYPES.match(media_type):
        raise SourceError(f"expected data:image/...;base64,..., got {_shown(url)}")
    body = url[end + 1 :]
    if in_base64:
        return _decode_base64(body, max_bytes)
    _check_length(body, max_bytes, 3)
    return unquote_to_bytes(body)


def _decode_base64(text: str | bytes, max_bytes: int) -> bytes:
    """Bytes of base64 of either alphabet, which may be wrapped, percent-encoded, or without its padding."""
    _check_length(text, max_bytes, _LONGEST_FORM)
    try:
        if len(text) * 3 // 4 <= max_bytes + 2:
            return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass  # not the plain form
    try:
        plain = text.encode("ascii") if isinstance(text, str) else text
        if b"%" in plain:
            plain = unquote_to_bytes(plain)
        plain = plain.translate(_URLSAFE, _WHITE_SPACE).rstrip(b"=")
        _check_length(plain, max_bytes, 4 / 3)
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise SourceError("image does not hold valid base64") from None


def _check_length(text: str | bytes, max_bytes: int, characters_a_byte: float) -> None:
    if len(text) > max_bytes * characters_a_byte + 4:
        raise SourceError(f"image is longer than the {max_bytes} bytes that an image may have")


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        if path.is_dir():
            raise SourceError(f"{_shown_path(path)} is a folder, expected an image file")
        if not path.is_file():
            raise SourceError(f"no image file at {_shown_path(path)}")
        if (size := path.stat().st_size) > max_bytes:
            raise SourceError(f"image file {_shown_path(path)} has {size} bytes, at most {max_bytes} are accepted")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)  # one that grows meanwhile is then too large
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(f"image file {_shown_path(path)} cannot be read ({reason})") from None


def _shown(text: str) -> str:
    """A source as an error may repeat it: its beginning."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}... ({len(text):,} characters)"


def _shown_path(path: str | Path) -> str:
    """A path as an error may repeat it: whole, if it is one and not the base64 of a picture."""
    text = str(path)
    if len(text) > _LONGEST_PATH or _BEGINS_BASE64.match(text):
        return f"{_shown(text)}, which looks like base64: that belongs into a data: URL"
    return repr(text)


def _type_of(source: object) -> str:
    kind = source.get("type") if isinstance(source, Mapping) else None
    return _shown(kind) if isinstance(kind, str) else type(source).__name__[:_SHOWN]
