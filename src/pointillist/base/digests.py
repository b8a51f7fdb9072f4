"""Whether the files of a folder are whole: `digests.json` beside them says the length and the sha256 of each.

It is written last, when all files and their folders are on the disk, so its being there says that the folder is
complete. Checkpoints and broadcast weights have one.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from pointillist.base.files import flush_folder, write_atomically

DIGESTS_FILE: Final = "digests.json"
"""Beside the files it is about: `{"files": {name: {"sha256", "bytes"}}}`."""

MAX_DIGESTS_BYTES: Final = 16 * 1024**2
"""Longest `digests.json` that is read: a hundred thousand files."""

_CHUNK_BYTES: Final = 4 * 1024**2
_THREADS: Final = 4


class FileDigest(msgspec.Struct, frozen=True):
    """What a file must be."""

    sha256: str
    """64 hex digits."""
    bytes: int
    """Length."""


class _Digests(msgspec.Struct):
    files: dict[str, FileDigest]


def digest_of(data: bytes) -> FileDigest:
    """The digest of a file with these bytes."""
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))


def decode_digests(data: bytes) -> dict[str, FileDigest]:
    """Digests by file name, from the bytes of a `digests.json`.

    Raises:
        ValueError: The bytes are anything else.
    """
    try:
        return msgspec.json.decode(data, type=_Digests).files
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"{DIGESTS_FILE} is malformed ({error})") from None


def write_digests(folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Writes `digests.json`, whole or not at all; the files themselves must be on the disk by now."""
    flush_folder(folder)
    write_atomically(folder / DIGESTS_FILE, msgspec.json.encode(_Digests(dict(files))))
    flush_folder(folder)


def seal_folder(folder: Path) -> None:
    """Brings all files below a folder to the disk and writes its `digests.json`; names are relative, with `/`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS_FILE)
    for path in files:
        _flush_file(path)
    for path in folder.rglob("*"):
        if path.is_dir():
            flush_folder(path)
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(_digest_file, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    write_digests(folder, dict(zip(names, digests, strict=True)))


def move_sealed(folder: Path, final: Path) -> None:
    """Gives a sealed folder its final name, on the disk too; there must be nothing of that name."""
    folder.rename(final)
    flush_folder(final.parent)


def fault_in(folder: Path) -> str | None:
    """What is wrong with a sealed folder, naming the file; None if every file is as `digests.json` says."""
    try:
        with (folder / DIGESTS_FILE).open("rb") as file:
            digests = decode_digests(file.read(MAX_DIGESTS_BYTES))
    except (OSError, ValueError) as error:
        return f"{DIGESTS_FILE} is not there" if isinstance(error, FileNotFoundError) else str(error)
    names = sorted(digests)
    with ThreadPoolExecutor(_THREADS) as threads:
        faults = threads.map(lambda name: _fault_of(folder / name, digests[name]), names)
        return next((f"{name} {fault}" for name, fault in zip(names, faults, strict=True) if fault), None)


FilesState = dict[str, tuple[int, int, int]]
"""Inode, length and time of change (ns) of each file below a folder, by its relative name."""


def files_state(folder: Path) -> FilesState:
    """The state of a folder's files, which tells whether they were written since; no bytes are read.

    Raises:
        OSError: A file cannot be looked at.
    """
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (status.st_ino, status.st_size, status.st_mtime_ns)
        for path, status in files
    }


def note_whole(note: Path, state: FilesState) -> None:
    """Notes that a sealed folder was found whole, so that the next process need not read it again.

    Args:
        note: File to write.
        state: State of the folder's files before `fault_in` read them.
    """
    write_atomically(note, msgspec.json.encode(state))


def take_note(note: Path, folder: Path) -> bool:
    """Whether a folder is noted as whole and none of its files was written since; a note counts once."""
    try:
        noted = msgspec.json.decode(note.read_bytes(), type=FilesState)
        note.unlink()
        return noted == files_state(folder)
    except (OSError, msgspec.MsgspecError):
        return False


def _fault_of(path: Path, expected: FileDigest) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "is not a file"
        if status.st_size != expected.bytes:
            return f"has {status.st_size} bytes, expected {expected.bytes}"
        return None if _digest_file(path) == expected else "has other bytes than were written"
    except (OSError, ValueError) as error:
        return "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"


def _digest_file(path: Path) -> FileDigest:
    digest, length = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            length += len(chunk)
    return FileDigest(digest.hexdigest(), length)


def _flush_file(path: Path) -> None:
    """Returns once a file's bytes are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
