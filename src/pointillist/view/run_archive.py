"""A run's images and references as one file, and back: for another machine, or for keeping.

The archive is a tar file: `manifest.json`, `images/<hh>/<sha256>.<ext>` for every image that the run refers to, and
the run's records (`run/...`: configs, metrics, rollouts, summary). On import each image is checked against its name
before it is stored, records are rewritten to the new root, and nothing is written outside the destination.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from pointillist.config.assets import own_image_dir
from pointillist.config.run_paths import RunPaths, write_atomically
from pointillist.errors import PointillistError
from pointillist.images.decode import ImageLimits
from pointillist.images.inventory import list_store
from pointillist.images.store import STORED_NAME, ImageStore, file_uri, local_path
from pointillist.view.references import run_hashes

FORMAT: Final = "pointillist.run_archive.1"
_RECORDS: Final = (
    "configs/*.toml",
    "metrics/*.jsonl",
    "rollouts/*/*.jsonl",
    "rollouts/*.jsonl",
    "quarantine.jsonl",
    "faults.jsonl",
    "summary.json",
    "curve.png",
)
_MAX_RECORD_BYTES: Final = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class ArchiveCounts:
    """What an archive holds."""

    images: int
    records: int


def export_run(paths: RunPaths, store_root: Path, archive: Path) -> ArchiveCounts:
    """Writes a run's images and records into a new archive.

    Raises:
        PointillistError: An image that the run refers to is not in the store, or the archive is there already.
    """
    wanted = run_hashes(paths)
    present = {entry.sha256: entry.path for entry in list_store(store_root) if entry.sha256 in wanted}
    if missing := sorted(wanted - present.keys()):
        raise PointillistError(f"{len(missing)} referenced images are not in {store_root}, the first is {missing[0]}")
    if archive.exists():
        raise PointillistError(f"{archive} exists already")
    records = [path for pattern in _RECORDS for path in sorted(paths.output_dir.glob(pattern))]
    manifest = {"format": FORMAT, "image_root": file_uri(store_root), "images": len(present)}
    partial = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(partial, "w") as tar:
        _add_bytes(tar, "manifest.json", json.dumps(manifest, indent=2).encode())
        for path in present.values():
            tar.add(path, arcname=f"images/{path.parent.name}/{path.name}", recursive=False)
        for path in records:
            tar.add(path, arcname=f"run/{path.relative_to(paths.output_dir).as_posix()}", recursive=False)
    partial.replace(archive)
    return ArchiveCounts(len(present), len(records))


def import_run(archive: Path, output_dir: Path, limits: ImageLimits) -> ArchiveCounts:
    """Restores an archive into a new run folder; its images go to `<output_dir>/assets/images`.

    Raises:
        PointillistError: Not such an archive, a member that does not belong into one, or a folder that is not empty.
        ImageError: An image that is not what an image may be.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise PointillistError(f"{output_dir} is not empty")
    store = ImageStore(own_image_dir(output_dir), limits)
    images = records = 0
    old_root = ""
    for name, data in _members(archive, limits):
        if name == "manifest.json":
            old_root = _image_root(data, archive)
        elif not old_root:
            raise PointillistError(f"{archive} does not begin with its manifest")
        elif name.startswith("images/"):
            stored = store.put(data)
            if local_path(stored.uri).relative_to(store.root).as_posix() != name.removeprefix("images/"):
                raise PointillistError(f"{archive}: {name} is not the image that its name says")
            images += 1
        else:
            target = output_dir / name.removeprefix("run/")
            if target.suffix in (".jsonl", ".toml"):
                data = data.replace(old_root.encode(), file_uri(store.root).encode())  # noqa: PLW2901
            write_atomically(target, data)
            records += 1
    return ArchiveCounts(images, records)


def _members(archive: Path, limits: ImageLimits) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the members that may be in an archive; anything else is an error."""
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                image = path.parts[:1] == ("images",) and STORED_NAME.fullmatch("/".join(path.parts[1:]))
                record = member.name == "manifest.json" or path.parts[:1] == ("run",)
                inside = not path.is_absolute() and ".." not in path.parts
                limit = limits.max_bytes if image else _MAX_RECORD_BYTES
                file = tar.extractfile(member) if member.isreg() else None
                if file is None or not inside or not (image or record) or member.size > limit:
                    raise PointillistError(f"{archive} holds {member.name!r}, which does not belong into a run archive")
                yield member.name, file.read()
    except (tarfile.TarError, OSError) as error:
        raise PointillistError(f"{archive} can not be read as a run archive ({error})") from None


def _image_root(manifest: bytes, archive: Path) -> str:
    try:
        value = json.loads(manifest)
        if value["format"] == FORMAT and value["image_root"].startswith("file:///"):
            return str(value["image_root"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise PointillistError(f"{archive}: manifest.json is not that of a run archive ({FORMAT})")


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
