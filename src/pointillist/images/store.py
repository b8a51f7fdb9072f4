"""The content-addressed image store: `<root>/<hh>/<sha256>.<ext>`.

An image is written once, as the bytes it came in, under the name of its own hash. That makes three promises cheap:
a `put` of known bytes writes nothing; a name can not lie about its content without being found out; and a
reference (the file's URL) can never point at an arbitrary file, because the path below the root has a grammar
that only stored images match.

Writers are atomic: a temporary file in the same folder, flushed to disk, then renamed, and the folder flushed, too.
Readers open every path component without following symbolic links and verify the hash of what they read.
"""

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from pointillist.base.files import flush_folder
from pointillist.base.image_limits import ALL_FORMATS, ImageLimits
from pointillist.errors import ConfigError, CorruptImageError, MissingImageError, RefError, StorageError
from pointillist.images.decode import ImageHeader, OpenedImage

SHA256_HEX: Final = re.compile(r"[0-9a-f]{64}")
STORED_NAME: Final = re.compile(
    rf"(?P<hh>[0-9a-f]{{2}})/(?P<sha256>(?P=hh)[0-9a-f]{{62}})\.(?:{'|'.join(ALL_FORMATS)})"
)
TEMPORARY_SUFFIX: Final = ".tmp"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image that lies in a store."""

    sha256: str
    """64 hex digits of the hash of the file's bytes."""
    uri: str
    """`file://` URL of the file."""
    header: ImageHeader
    num_bytes: int


class ImageStore:
    """One run's image folder, for writing.

    Example:
        >>> store = ImageStore(tmp_path, ImageLimits())
        >>> stored = store.put(png_bytes)
        >>> stored.uri
        'file:///.../3a/3a52...e1.png'
    """

    def __init__(self, root: Path, limits: ImageLimits) -> None:
        """Opens the store, making its folder if it is not there.

        Args:
            root: The folder. Symbolic links in its own path are resolved once, here.
            limits: What `put` accepts.

        Raises:
            ConfigError: There is no such folder, it cannot be made, or it cannot be written to.
        """
        self.root = usable_folder(root)
        self.limits = limits

    def put(self, data: bytes) -> StoredImage:
        """Stores an encoded image under its hash; storing the same bytes again only gives the file the time of now.

        Safe from any number of processes at once: a reader never sees half a file. Returns once a file
        that it wrote, and its name, are on disk.

        What it costs: one hash and one look at the header; for a new image one decode of its pixels, which are thrown
        away (so that no later process meets a broken image first), and the write with its flushes; for an image that
        is there one comparison with the file. The layout needs the header alone.

        Raises:
            ImageError: Not a decodable still image within the limits; nothing was written.
            StorageError: It could not be written.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        image = OpenedImage(data, self.limits)
        path = self.root / sha256[:2] / f"{sha256}.{image.header.format}"
        try:
            status = path.lstat()
            there = stat.S_ISREG(status.st_mode) and status.st_size == len(data) and path.read_bytes() == data
        except OSError:  # a damaged or unreadable file is written anew
            there = False
        if not (there and _freshened(path)):
            image.decode()  # refuses what has a good header and broken pixels
            write_image(path, data)
        return StoredImage(sha256=sha256, uri=path.as_uri(), header=image.header, num_bytes=len(data))


def _freshened(path: Path) -> bool:
    """Marks a file as in use now, so that `store gc` keeps it; False if it has gone meanwhile."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # a file of another user: whoever may not touch it may still read it
        return path.exists()
    return True


def usable_folder(folder: Path) -> Path:
    """The folder, made if it is not there, without symbolic links in its path.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL in a path, a loop of links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"image folder {str(folder)[:300]!r} cannot be used ({reason})") from None
    if not os.access(resolved, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"image folder {str(folder)[:300]!r} cannot be written to by this user")
    return resolved


def local_path(uri: str) -> Path:
    """Absolute path that a `file://` URL names: the path whose `as_uri` it is.

    Raises:
        RefError: Another scheme, a host, a query, a relative path, or dots in the path.
    """
    # Not by urllib: it drops newlines and tabs from a URL, and raises on brackets.
    if uri[:7].lower() != "file://":
        raise RefError(f"expected a file:// URL of the image store, got {uri[:16]!r}")
    rest = uri[7:].removeprefix("localhost")
    if not rest.startswith("/") or "?" in rest or "#" in rest:
        raise RefError("expected file:///absolute/path, got a URL with a host, query or fragment")
    try:
        path = os.fsdecode(unquote_to_bytes(rest))
    except UnicodeEncodeError:
        raise RefError("expected file:///absolute/path in Unicode") from None
    if "\0" in path or any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise RefError("expected file:///absolute/path without empty or dotted components")
    return Path(path)


def resolve_roots(roots: Iterable[Path]) -> tuple[Path, ...]:
    """The folders that references may point into, absolute and free of symbolic links in their own path."""
    return tuple(Path(root).expanduser().resolve() for root in roots)


def stored_name(uri: str, allowed_roots: Iterable[Path], sha256: str | None = None) -> tuple[Path, str]:
    """`(root, name below it)` of the stored image that a URL names, without touching the file system.

    Args:
        uri: `file://` URL.
        allowed_roots: Resolved folders (`resolve_roots`).
        sha256: The hash that the image should have; None for a URL that comes without one.

    Returns:
        The name is `<hh>/<sha256>.<ext>`, so its stem is the image's hash.

    Raises:
        RefError: Not under one of `allowed_roots`, not the name of a stored image, or another image's name.
    """
    path = local_path(uri)
    for root in allowed_roots:
        if path.is_relative_to(root):
            name = path.relative_to(root).as_posix()
            if STORED_NAME.fullmatch(name):
                if sha256 not in (None, path.stem):
                    raise RefError("hash differs from the name of the image that raw_image_uri points to")
                return root, name
    raise RefError("raw_image_uri is not an image under an allowed root")


def read_verified(uri: str, sha256: str, allowed_roots: Iterable[Path], limits: ImageLimits) -> bytes:
    """Bytes of a stored image, after checking that it is the image that `sha256` says.

    Args:
        uri: `file://` URL of the stored image.
        sha256: 64 hex digits that the caller expects.
        allowed_roots: Resolved folders (`resolve_roots`) that may be read.
        limits: `max_bytes` is enforced before reading.

    Raises:
        RefError: Outside the allowed roots, not a stored image's name, a link, not a regular file, over
            `max_bytes`, or other bytes than the hash says.
        MissingImageError: The name is good, the file is not there.
    """
    return read_intact(*stored_name(uri, allowed_roots, sha256), limits)


def read_intact(root: Path, name: str, limits: ImageLimits) -> bytes:
    """Bytes of the stored image of this name, after checking that they are what the name says.

    Args:
        root: Of the store.
        name: As `STORED_NAME` has it.
        limits: `max_bytes` is enforced before reading.

    Raises:
        RefError, MissingImageError: As `read_verified`.
    """
    data, path = read_stored(root, name, limits), root / name
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise CorruptImageError(
            f"bytes of image {path.stem} are not what its hash says: the file is corrupt",
            uri=path.as_uri(),
            sha256=path.stem,
        )
    return data


def read_stored(root: Path, name: str, limits: ImageLimits) -> bytes:
    """Bytes of the file with a stored image's name, not yet verified.

    What cannot be read now (a failing disk, a stale handle of a network file system, no permission, a folder in the
    file's place, no descriptor left) counts as not being there: another look, or another source of the image, may help.

    Args:
        root: Of the store.
        name: As `STORED_NAME` has it.
        limits: `max_bytes` is enforced before reading.

    Raises:
        RefError: A link, not a regular file, or over `max_bytes`.
        MissingImageError: There is no such file, or it cannot be read.
    """
    sha256 = Path(name).stem
    try:
        descriptor = open_without_links(root, name)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise RefError("raw_image_uri is not a regular file")
            if status.st_size > limits.max_bytes:
                raise RefError(f"image has {status.st_size} bytes, at most {limits.max_bytes} are accepted")
            pieces, rest = [], status.st_size + 1  # a file that grew meanwhile has another hash
            while rest > 0 and (piece := os.read(descriptor, rest)):
                pieces.append(piece)
                rest -= len(piece)
            return b"".join(pieces)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise MissingImageError(f"image {sha256} is not in the store", sha256=sha256) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
            raise RefError("raw_image_uri leads through a symbolic link or a file in a folder's place") from None
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device without a driver
            raise RefError("raw_image_uri is not a regular file") from None
        reason = errno.errorcode.get(error.errno or 0, "error")
        raise MissingImageError(f"image {sha256} cannot be read ({reason})", sha256=sha256) from None


def open_without_links(root: Path, name: str) -> int:
    """File descriptor of `<folder>/<file>` below a root, for reading; it may be that of anything but a link.

    Raises:
        OSError: It is not there, cannot be read, or one of the two is a link.
    """
    folder_name, file_name = name.split("/")
    folder = os.open(root / folder_name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # O_NONBLOCK: opening a FIFO that someone put there must not hang; O_NOCTTY: nor may a terminal take over.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(file_name, flags, dir_fd=folder)
    finally:
        os.close(folder)


def write_image(path: Path, data: bytes) -> None:
    """Writes an image's file so that it appears whole or not at all; returns once it and its name are on disk.

    Args:
        path: In a store: its folder is made if it is not there, the store's root is there.
        data: The file's bytes.

    Raises:
        StorageError: It could not be written: the disk's fault, not the image's.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        try:
            file = temporary.open("xb")
        except FileNotFoundError:  # the folder is made only now: it is missing for a store's first images alone
            path.parent.mkdir(exist_ok=True)
            # A writer that finds the folder before this flush is done relies on the order in which a journal commits.
            flush_folder(path.parent.parent)
            file = temporary.open("xb")
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"image could not be stored in {path.parent} ({error.strerror})") from error
