"""Looking after an image store: what lies in it, whether it is what its name says, and what may go."""

import hashlib
import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pointillist.base.files import write_atomically
from pointillist.base.image_limits import ImageLimits
from pointillist.errors import ImageError, PointillistError
from pointillist.images.decode import decode_rgb
from pointillist.images.sniff import format_of
from pointillist.images.store import STORED_NAME, TEMPORARY_SUFFIX

Condition = Literal["good", "corrupt", "half-written", "foreign"]

LAYOUTS_FOLDER: Final = "layouts"
"""Folder of a store that holds settings behind fingerprints, not images."""

USERS_FOLDER: Final = "runs"
"""Folder of a store with a file for each run that uses it, which holds the path of the run's folder."""

_OWN_FOLDER: Final = re.compile(r"[0-9a-f]{2}")

_AHEAD: Final = 4
"""Files that wait for each thread of `verify_store`: enough that none is idle while the caller takes a result."""


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """A file of a store."""

    path: Path
    sha256: str | None
    """What its name says; None for a file that is not a stored image."""
    num_bytes: int
    modified: float
    """Seconds since the epoch."""
    condition: Condition
    """As its name and kind tell; `verify_entry` reads it to tell good from corrupt."""


def list_store(root: Path) -> Iterator[StoreEntry]:
    """All files of a store, by name; nothing is read and no symbolic link followed. Holds one folder's names."""
    beside = (root / LAYOUTS_FOLDER, root / USERS_FOLDER)
    for folder, subfolders, names in os.walk(root, followlinks=False):
        subfolders[:] = sorted(name for name in subfolders if Path(folder, name) not in beside)
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in sorted([*names, *links]):
            try:
                entry = _entry(root, Path(folder, name))
            except FileNotFoundError:
                continue  # a half-written file that has got its name meanwhile, or an image that was just evicted
            yield entry


def verify_store(root: Path, limits: ImageLimits, workers: int) -> Iterator[StoreEntry]:
    """All files of a store, each read and compared with its name, in the order of `list_store`.

    Only a few files are ahead of what the caller has taken, so memory does not grow with the store.
    """
    ahead: deque[Future[StoreEntry]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for entry in list_store(root):
            if len(ahead) == workers * _AHEAD:
                yield ahead.popleft().result()
            ahead.append(pool.submit(verify_entry, entry, limits))
        while ahead:
            yield ahead.popleft().result()


def verify_entry(entry: StoreEntry, limits: ImageLimits) -> StoreEntry:
    """The entry with its condition found out by reading: hash, extension and decodability."""
    if entry.sha256 is None:
        return entry
    try:
        data = entry.path.read_bytes()
        intact = hashlib.sha256(data).hexdigest() == entry.sha256
        if intact:
            decode_rgb(data, limits)
            intact = entry.path.suffix == f".{format_of(data)}"
    except (OSError, ImageError, MemoryError):
        intact = False
    return entry if intact else StoreEntry(entry.path, entry.sha256, entry.num_bytes, entry.modified, "corrupt")


def add_user(root: Path, output_dir: Path) -> None:
    """Notes in a store that a run uses it, so that `store gc` finds its references.

    Args:
        root: The store; made if it is not there.
        output_dir: The run's folder.
    """
    name = hashlib.sha256(os.fsencode(output_dir)).hexdigest()[:16]
    path = root / USERS_FOLDER / name
    if not path.is_file():
        write_atomically(path, os.fsencode(output_dir))


def users_of(root: Path) -> list[Path]:
    """Folders of the runs that are known to use a store and still exist."""
    noted = [Path(os.fsdecode(path.read_bytes())) for path in (root / USERS_FOLDER).glob("*") if path.is_file()]
    own = root.parent.parent  # <output_dir>/assets/images
    return sorted({folder for folder in (*noted, own) if (folder / "configs").is_dir()})


def check_is_store(root: Path) -> None:
    """Makes sure that a folder is an image store, before anything in it is removed.

    Raises:
        PointillistError: It holds something that a store does not.
    """
    for path in root.iterdir():
        known = path.name in (LAYOUTS_FOLDER, USERS_FOLDER)
        if not known and not (_OWN_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()):
            raise PointillistError(
                f"{root} holds {path.name}, so it is no image store: expected folders of two hex digits, as in "
                "<output_dir>/assets/images"
            )


def collect_garbage(root: Path, *, keep: frozenset[str] | None, older_than: float, dry_run: bool) -> list[StoreEntry]:
    """Removes half-written files, and images that no run refers to.

    Args:
        root: The store.
        keep: Hashes that are referred to; None keeps all images.
        older_than: Seconds that a file must be old: what is younger may be in the making.
        dry_run: Only say what would go.

    Returns:
        What went.
    """
    horizon = time.time() - older_than
    gone = []
    for entry in list_store(root):
        unreferenced = keep is not None and entry.sha256 is not None and entry.sha256 not in keep
        if entry.modified <= horizon and (entry.condition == "half-written" or unreferenced):
            # Looked at once more: whoever stores the same bytes meanwhile gives the file a new time.
            with suppress(FileNotFoundError):
                if entry.path.lstat().st_mtime <= horizon:
                    gone.append(entry)
                    if not dry_run:
                        entry.path.unlink()
    return gone


def _entry(root: Path, path: Path) -> StoreEntry:
    status = path.lstat()
    condition: Condition = "foreign"
    sha256 = None
    if stat.S_ISREG(status.st_mode):
        if match := STORED_NAME.fullmatch(path.relative_to(root).as_posix()):
            condition, sha256 = "good", match["sha256"]
        elif path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX):
            condition = "half-written"
    return StoreEntry(path, sha256, status.st_size, status.st_mtime, condition)
