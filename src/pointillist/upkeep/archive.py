"""A run's images and references as one file, and back: for another machine, or for keeping.

The archive is a plain tar file: `manifest.json`, `images/<hh>/<sha256>.<ext>` for every image that the run refers to,
and the run's records (`run/...`: configs, metrics, rollouts, summary). What may be in one is a grammar, `_KINDS`, which
export and import share: only regular files, by names that stay below the run's folder on every file system, each once.

An import trusts nothing of that. The headers are read by this module and not by `tarfile`, whose extended headers may
rename, enlarge or link members and take memory without a bound. The whole archive is checked before the first file is
written; files are written into a folder beside the destination, which takes its name at the end; each image is checked
against its name; and a refused archive leaves nothing behind.

Checkpoints are programs: torch reads their metadata by unpickling it. An archive holds them only if the export was
asked to, an import restores them only if it is asked to, and an imported run is marked, so that `--resume` asks.
"""

import io
import os
import re
import secrets
import shutil
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import tomli_w

from pointillist.base.files import open_regular
from pointillist.base.image_limits import ImageLimits
from pointillist.base.json_types import JsonObject
from pointillist.base.jsonl import MAX_LINE_BYTES
from pointillist.errors import PointillistError
from pointillist.images.inventory import list_store
from pointillist.images.store import STORED_NAME, ImageStore, local_path
from pointillist.runs.image_dir import own_image_dir
from pointillist.runs.paths import NUMBER, RunPaths
from pointillist.upkeep.references import run_hashes

FORMAT: Final = "pointillist.run_archive.1"

_MIB: Final = 1024**2
_WORD: Final = "[a-z0-9][a-z0-9_-]{0,63}"
_NUMBER: Final = f"(?:{NUMBER.pattern})"
_UNBOUNDED: Final = 2**62


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of members."""

    name: re.Pattern[str]
    """Of the member. Only lower case, so that no two names are one on a file system that ignores case."""
    max_bytes: int
    patterns: tuple[str, ...] = ()
    """Where export looks for them, below the run's folder."""


def _kind(name: str, max_bytes: int, *patterns: str) -> _Kind:
    return _Kind(re.compile(name, re.ASCII), max_bytes, patterns)


_MANIFEST: Final = _kind(r"manifest\.json", _MIB)
_IMAGE: Final = _kind(f"images/{STORED_NAME.pattern}", _UNBOUNDED)  # bounded by the limits of images
_CHECKPOINT: Final = _kind(
    rf"run/checkpoints/step_{_NUMBER}/(?:{_WORD}\.json|trainer/(?:\.metadata|{_WORD}\.(?:distcp|json|safetensors)|__{_WORD}\.distcp))",
    _UNBOUNDED,
    "checkpoints/step_*/*.json",
    "checkpoints/step_*/trainer/*",
)
_LINES: Final = _kind(
    # Archives of older runs have a quarantine.jsonl: the corrupt images, which faults.jsonl has too.
    rf"run/(?:metrics/{_WORD}|rollouts/step_{_NUMBER}/{_WORD}|rollouts/eval_{_NUMBER}|faults|quarantine)\.jsonl",
    _UNBOUNDED,  # bounded line by line
    "metrics/*.jsonl",
    "rollouts/*/*.jsonl",
    "rollouts/*.jsonl",
    "*.jsonl",
)
_CONFIG: Final = _kind(rf"run/configs/(?:{_WORD}/)?{_WORD}\.toml", 16 * _MIB, "configs/*.toml", "configs/*/*.toml")
_RESULT: Final = _kind(r"run/(?:summary\.json|curve\.png)", 64 * _MIB, "summary.json", "curve.png")
_KINDS: Final = (_MANIFEST, _IMAGE, _CHECKPOINT, _LINES, _CONFIG, _RESULT)

_MAX_MEMBERS: Final = 4_000_000
_BLOCK: Final = tarfile.BLOCKSIZE
_CHUNK: Final = _MIB
_TIMES_ONLY: Final = 512
"""Longest extended header that is stepped over: earlier exports wrote one a member, with its time to the nanosecond."""


@dataclass(frozen=True, slots=True)
class ArchiveCounts:
    """What went into an archive or came out of it."""

    images: int
    records: int
    checkpoint_files: int = 0
    """Files of checkpoints that were left out."""


class _Manifest(msgspec.Struct):
    format: str
    image_root: str
    images: int = 0


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    kind: _Kind
    size: int


def export_run(paths: RunPaths, store_root: Path, archive: Path, *, checkpoints: bool = False) -> ArchiveCounts:
    """Writes a run's images and records into a new archive.

    Args:
        paths: The run's folder.
        store_root: Root of the run's image store.
        archive: File to write.
        checkpoints: Whether the run's checkpoints go along.

    Raises:
        PointillistError: An image that the run refers to is not in the store, a file is no regular one, or the archive
            is there already.
    """
    wanted = run_hashes(paths)
    present = {entry.sha256: entry.path for entry in list_store(store_root) if entry.sha256 in wanted}
    if missing := sorted(wanted - present.keys()):
        raise PointillistError(f"{len(missing)} referenced images are not in {store_root}, the first is {missing[0]}")
    if archive.exists():
        raise PointillistError(f"{archive} exists already")
    records, left_out = _records(paths.output_dir, checkpoints=checkpoints)
    manifest = {"format": FORMAT, "image_root": store_root.as_uri(), "images": len(present)}
    partial = archive.with_name(f".export.{secrets.token_hex(8)}.tmp")
    try:
        # GNU's format needs no extended header for names as short as ours, nor for a checkpoint of any size.
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            _add_bytes(tar, "manifest.json", msgspec.json.format(msgspec.json.encode(manifest)))
            for path in present.values():
                _add_file(tar, f"images/{path.parent.name}/{path.name}", path)
            for name, path in records:
                if _CONFIG.name.fullmatch(name):
                    _add_bytes(tar, name, _without_secrets(path))
                else:
                    _add_file(tar, name, path)
        partial.rename(archive)
    except OSError as error:
        raise PointillistError(f"{paths.output_dir} cannot be exported to {archive} ({error})") from None
    finally:
        partial.unlink(missing_ok=True)
    return ArchiveCounts(len(present), len(records), left_out)


def import_run(archive: Path, output_dir: Path, limits: ImageLimits, *, checkpoints: bool = False) -> ArchiveCounts:
    """Restores an archive into a new run folder; its images go to `<output_dir>/assets/images`.

    Args:
        archive: File that `export_run` wrote, or that anybody else made.
        output_dir: Folder of the run, which must not be there or be empty.
        limits: Limits on an image.
        checkpoints: Whether checkpoints are restored. Resuming from one runs what its author put into it.

    Raises:
        PointillistError: Not such an archive, a member that does not belong into one, or a folder that is not empty.
        ImageError: An image that is not what an image may be.
    """
    output_dir = output_dir.resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise PointillistError(f"{output_dir} exists already and is no empty folder")
    made = [folder for folder in output_dir.parents if not folder.exists()]
    beside = output_dir.with_name(f".import.{secrets.token_hex(8)}.tmp")
    try:
        with open_regular(archive) as file:
            image_root = _check(file, archive, limits)
            beside.mkdir(parents=True)
            # A sparse file takes its whole length where it is copied to.
            if (size := os.fstat(file.fileno()).st_size) > (free := shutil.disk_usage(beside).free):
                raise PointillistError(f"{archive} has {size:,} bytes, the disk of {output_dir} has room for {free:,}")
            counts = _restore(file, archive, beside, output_dir, image_root, limits, checkpoints=checkpoints)
        beside.rename(output_dir)  # fails if the folder has come to be, and not to be empty, meanwhile
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise PointillistError(f"{archive} cannot be imported to {output_dir} ({error})") from None
        raise
    return counts


def _records(output_dir: Path, *, checkpoints: bool) -> tuple[list[tuple[str, Path]], int]:
    """Names in the archive and files of a run's records, and how many files of checkpoints are left out."""
    found: dict[str, Path] = {}
    left_out = 0
    for kind in _KINDS:
        for path in (path for pattern in kind.patterns for path in sorted(output_dir.glob(pattern))):
            name = f"run/{path.relative_to(output_dir).as_posix()}"
            if not kind.name.fullmatch(name):
                continue
            if kind is _CHECKPOINT and not checkpoints:
                left_out += 1
            else:
                found[name] = path
    return list(found.items()), left_out


def _check(file: BinaryIO, archive: Path, limits: ImageLimits) -> str:
    """Reads all headers, and the manifest.

    Returns:
        `file://` URL of the store that the records name.

    Raises:
        PointillistError: The archive is none, or does not begin with its manifest, or is not whole.
    """
    manifest = None
    images = 0
    for member in _members(file, archive, limits):
        if manifest is None:
            manifest = _manifest(file.read(member.size) if member.kind is _MANIFEST else b"", archive)
        images += member.kind is _IMAGE
    if manifest is None:
        raise PointillistError(f"{archive} is empty")
    if images != manifest.images:
        raise PointillistError(f"{archive} holds {images} images, its manifest says {manifest.images}")
    return manifest.image_root


def _manifest(data: bytes, archive: Path) -> _Manifest:
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        manifest = msgspec.json.decode(data, type=_Manifest)
        if manifest.format == FORMAT and re.fullmatch(r"file:///[!-~]{0,8192}", manifest.image_root):
            return manifest
    raise PointillistError(f"{archive} does not begin with the manifest.json of a run archive ({FORMAT})")


def _members(file: BinaryIO, archive: Path, limits: ImageLimits) -> Iterator[_Member]:
    """The members of an archive; while one is given, the file stands at its content.

    Raises:
        PointillistError: Something that does not belong into an archive, named.
    """
    seen: set[str] = set()
    position = 0
    total = os.fstat(file.fileno()).st_size
    after_extended = False
    while True:
        file.seek(position)
        header = file.read(_BLOCK)
        if header == bytes(_BLOCK):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "ascii", "surrogateescape")
        except tarfile.HeaderError as error:
            raise PointillistError(
                f"{archive} is not a run archive, or not whole ({error} at byte {position})"
            ) from None
        if position + _BLOCK + info.size > total:
            raise PointillistError(f"{archive} is cut off: {info.name!a} should have {info.size} bytes")
        position += _BLOCK + -(-info.size // _BLOCK) * _BLOCK
        if info.type == tarfile.XHDTYPE and 0 <= info.size <= _TIMES_ONLY and not after_extended:
            after_extended = True  # whatever it says is not looked at: the member's own header holds
            continue
        after_extended = False
        kind = _kind_of(info, limits)
        if kind is None or info.name in seen or (kind is _MANIFEST) != (not seen):
            raise PointillistError(f"{archive} holds {info.name!a}, which does not belong into a run archive")
        seen.add(info.name)
        if len(seen) > _MAX_MEMBERS:
            raise PointillistError(f"{archive} holds more than {_MAX_MEMBERS:,} files")
        yield _Member(info.name, kind, info.size)


def _kind_of(info: tarfile.TarInfo, limits: ImageLimits) -> _Kind | None:
    """The kind of a member; None for what is no regular file, has no name of the grammar, or is too large."""
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):  # no links, devices, pipes, folders or sparse files
        return None
    kind = next((kind for kind in _KINDS if kind.name.fullmatch(info.name)), None)
    if kind is None or not 0 <= info.size <= (limits.max_bytes if kind is _IMAGE else kind.max_bytes):
        return None
    return kind


def _restore(
    file: BinaryIO,
    archive: Path,
    folder: Path,
    output_dir: Path,
    image_root: str,
    limits: ImageLimits,
    *,
    checkpoints: bool,
) -> ArchiveCounts:
    """Writes the members of a checked archive into a folder, as they will be right below `output_dir`."""
    store = ImageStore(own_image_dir(folder), limits)
    # Only where it is followed by a stored image's name: the text grows by little, whatever it says.
    reference = re.compile(re.escape(image_root.rstrip("/").encode()) + rb"(?=/[0-9a-f]{2}/[0-9a-f]{64}\.)")
    new_root = own_image_dir(output_dir).as_uri().encode()
    images = records = left_out = 0
    for member in _members(file, archive, limits):
        if member.kind is _IMAGE:
            stored = local_path(store.put(file.read(member.size)).uri)
            if stored.relative_to(store.root).as_posix() != member.name.removeprefix("images/"):
                raise PointillistError(f"{archive}: {member.name} is not the image that its name says")
            images += 1
        elif member.kind is _CHECKPOINT and not checkpoints:
            left_out += 1
        elif member.kind is not _MANIFEST:
            target = folder / member.name.removeprefix("run/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as copy:
                if member.kind in (_LINES, _CONFIG):
                    for line in _lines(file, member, archive):
                        copy.write(reference.sub(lambda _: new_root, line))
                else:
                    for chunk in _chunks(file, member):
                        copy.write(chunk)
            records += 1
    if checkpoints:
        RunPaths(folder).imported.write_bytes(msgspec.json.encode({"format": FORMAT}) + b"\n")
    return ArchiveCounts(images, records, left_out)


def _lines(file: BinaryIO, member: _Member, archive: Path) -> Iterator[bytes]:
    left = member.size
    while left > 0:
        line = file.readline(min(left, MAX_LINE_BYTES + 1))
        if len(line) > MAX_LINE_BYTES:
            raise PointillistError(f"{archive}: {member.name} has a line of more than {MAX_LINE_BYTES} bytes")
        if not line:
            raise PointillistError(f"{archive} has become shorter while it was read")
        left -= len(line)
        yield line


def _chunks(file: BinaryIO, member: _Member) -> Iterator[bytes]:
    left = member.size
    while left > 0 and (chunk := file.read(min(left, _CHUNK))):
        left -= len(chunk)
        yield chunk


def _without_secrets(path: Path) -> bytes:
    """A config without the values of `env_vars`, which older runs have written into theirs and which may hold keys.

    Raises:
        PointillistError: It is not TOML, so what it holds is not known.
    """
    with open_regular(path) as file:
        data = file.read()
    try:
        config = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise PointillistError(f"{path} is not TOML ({error}): repair it or take it away before the export") from None
    return tomli_w.dumps(config).encode() if _blank_secrets(config) else data


def _blank_secrets(table: JsonObject) -> bool:
    """Empties every value below `env_vars`; whether there was one."""
    found = False
    for name, value in table.items():
        if name == "env_vars" and isinstance(value, dict):
            found = found or any(value.values())
            table[name] = dict.fromkeys(value, "")
        elif isinstance(value, dict):
            found = _blank_secrets(value) or found
    return found


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _add_file(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Adds a file as long as it is now: one that is being written may grow meanwhile."""
    if path.is_symlink():
        raise PointillistError(f"{path} is a link: an archive holds files only")
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        member = tarfile.TarInfo(name)
        member.size, member.mtime = status.st_size, int(status.st_mtime)
        tar.addfile(member, file)
