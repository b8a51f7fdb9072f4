"""An index of a run's rollouts and pictures on disk, so that no page ever holds the whole run.

SQLite, in the user's cache folder: the run itself is never written to. One row a rollout says where in its file the
record stands, so that it is read by seeking there. A thread keeps the index up to date while pages are served:

    files of rollouts -> rows (newest step first) -> files of the store -> each read once and compared with its name

Files are followed as a run writes, grows, rewinds or rewrites them: by inode, size and time, and by the bytes before
the place where reading stopped. A last line that is not complete is left for later.
"""

import hashlib
import logging
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from pointillist.base.files import open_regular
from pointillist.base.image_limits import ImageLimits
from pointillist.base.jsonl import complete_lines
from pointillist.errors import ConfigError, MissingImageError, RecordError, RefError
from pointillist.images.inventory import list_store
from pointillist.images.store import read_intact
from pointillist.runs.paths import RunPaths
from pointillist.runs.records import RolloutRecord, decode_rollout, file_of, rollout_files

logger = logging.getLogger(__name__)

_Value: TypeAlias = str | int | float | None
"""What a column holds."""
_VERSION: Final = 2
"""Of the tables; an index of another version is made anew."""
_POLL_SECONDS: Final = 2.0
_TAIL: Final = 64
_STORE_BATCH: Final = 200
_ROWS: Final = 1000
_MAX_SUM: Final = 2**62
_TASK: Final = 1000
"""Characters of a task that are listed and searched."""
_SCHEMA: Final = """
CREATE TABLE files (
    file INTEGER PRIMARY KEY, name TEXT UNIQUE, inode INTEGER, size INTEGER, mtime INTEGER,
    done INTEGER, tail BLOB, unreadable INTEGER
);
CREATE TABLE rollouts (
    file INTEGER, start INTEGER, length INTEGER, id TEXT, rollout_group TEXT, split TEXT, step INTEGER, env TEXT,
    task TEXT, reward REAL, advantage REAL, outcome TEXT, error TEXT, turns INTEGER, tokens INTEGER, sampled INTEGER,
    images INTEGER, picture TEXT, PRIMARY KEY (file, start)
) WITHOUT ROWID;
CREATE INDEX by_id ON rollouts (id);
CREATE INDEX by_group ON rollouts (rollout_group);
CREATE INDEX by_step ON rollouts (step DESC, split DESC);
CREATE INDEX by_env ON rollouts (env);
CREATE INDEX by_error ON rollouts (error);
CREATE INDEX by_outcome ON rollouts (outcome);
CREATE INDEX by_reward ON rollouts (reward);
CREATE INDEX by_tokens ON rollouts (tokens);
CREATE TABLE uses (sha256 TEXT, file INTEGER, count INTEGER, PRIMARY KEY (sha256, file)) WITHOUT ROWID;
CREATE INDEX uses_by_file ON uses (file);
CREATE TABLE pictures (
    name TEXT PRIMARY KEY, sha256 TEXT, bytes INTEGER, mtime REAL, condition TEXT, checked INTEGER, seen INTEGER
) WITHOUT ROWID;
CREATE INDEX pictures_by_sha256 ON pictures (sha256);
CREATE INDEX pictures_by_bytes ON pictures (bytes);
"""


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """How far the index is."""

    bytes_total: int = 0
    bytes_done: int = 0
    rollouts: int = 0
    pictures: int = 0
    pictures_checked: int = 0
    store_listed: bool = False
    damaged: int = 0
    """Lines of the rollouts' files that are no record and are left out."""

    @property
    def percent(self) -> int:
        """Of the rollouts' files."""
        return 100 if self.bytes_done >= self.bytes_total else int(100 * self.bytes_done / self.bytes_total)


def cache_dir() -> Path:
    """Where indexes and thumbnails are kept: `$XDG_CACHE_HOME/pointillist/view`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pointillist" / "view"


class RunIndex:
    """The index of one run. Reading is safe from any thread; one thread writes."""

    def __init__(self, paths: RunPaths, image_dir: Path | None, limits: ImageLimits, cache: Path) -> None:
        """Opens or makes the index.

        Args:
            paths: The run's folder.
            image_dir: Image store of the run, if it has one.
            limits: Limits on an image of the run.
            cache: Folder of indexes. One belongs to the run's path and inode: a folder made anew gets a new one.

        Raises:
            ConfigError: The folder of indexes cannot be made.
        """
        self._paths = paths
        self._image_dir = image_dir
        self._limits = limits
        identity = f"{paths.output_dir}:{paths.output_dir.stat().st_ino}"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache folder {cache} cannot be made ({error.strerror}); set XDG_CACHE_HOME") from None
        self._path = cache / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}.sqlite"
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._listed = False
        self._generation = 0
        self._create()

    def start(self) -> None:
        """Keeps the index up to date until `stop`, in a thread."""
        self._thread = threading.Thread(target=self._follow, name="index", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, for one page."""
        connection = self._connect()
        try:
            yield connection
        finally:
            connection.close()

    def update(self) -> None:
        """Brings the rows of all rollout files up to date."""
        files = rollout_files(self._paths)
        names = {self._name(path) for path in files}
        with self._lock, self._writer() as db:
            for (name,) in db.execute("SELECT name FROM files").fetchall():
                if name not in names:
                    _forget(db, name)
        for path in reversed(files):
            if self._stop.is_set():
                return
            self._update_file_or_warn(path)

    def update_store(self) -> None:
        """Lists the store and reads each of its files that was not read since it last changed."""
        if self._image_dir is None:
            return
        self._list_store(self._image_dir)
        self._listed = True
        while not self._stop.is_set() and self._check_some(self._image_dir):
            pass

    def ensure(self, rollout_id: str) -> None:
        """Brings the one file up to date in which a rollout would be."""
        path = file_of(self._paths, rollout_id)
        if path is not None:
            self._update_file_or_warn(path)

    def record(self, rollout_id: str) -> RolloutRecord | None:
        """The record of a rollout, read from its file; None if there is none of this id."""
        self.ensure(rollout_id)
        with self.reader() as db:
            row = db.execute(
                "SELECT name, start, length FROM rollouts JOIN files USING (file) WHERE id = ? LIMIT 1", (rollout_id,)
            ).fetchone()
        if row is None:
            return None
        with suppress(OSError, RecordError):
            with open_regular(self._paths.rollouts / row[0]) as file:
                file.seek(row[1])
                record = decode_rollout(file.read(row[2]))
            if record.id == rollout_id:  # else the file was rewritten this very moment
                return record
        return None

    def progress(self) -> IndexProgress:
        """How far the index is, against what the files are now."""
        total = 0
        for path in rollout_files(self._paths):
            with suppress(OSError):
                total += path.stat().st_size
        with self.reader() as db:
            done, damaged = db.execute(
                "SELECT coalesce(sum(size), 0), coalesce(sum(unreadable), 0) FROM files"
            ).fetchone()
            (rollouts,) = db.execute("SELECT count(*) FROM rollouts").fetchone()
            pictures, checked = db.execute("SELECT count(*), coalesce(sum(checked), 0) FROM pictures").fetchone()
        return IndexProgress(total, done, rollouts, pictures, checked, self._listed, damaged)

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.update()
                self.update_store()
            except Exception as error:  # a file system that lags, a full disk: the next time may do
                logger.warning("index of %s: %r", self._paths.output_dir, error)
            self._stop.wait(_POLL_SECONDS)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._paths.rollouts).as_posix()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=30, check_same_thread=False)

    @contextmanager
    def _writer(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are kept together, or not at all."""
        with self.reader() as db:
            db.execute("PRAGMA synchronous = OFF")  # a lost index is made again
            with db:
                db.execute("BEGIN IMMEDIATE")  # another viewer of the same run may be at work on the same index
                yield db

    def _create(self) -> None:
        """Makes the tables, unless they are there; what is not an index of this version is replaced."""
        with suppress(sqlite3.DatabaseError), self.reader() as db:
            if db.execute("PRAGMA user_version").fetchone() == (_VERSION,):
                return
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        with self.reader() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {_VERSION}")

    def _update_file_or_warn(self, path: Path) -> None:
        """One file that cannot be read, or indexed now, keeps no other from being indexed."""
        try:
            self._update_file(path)
        except (OSError, sqlite3.Error) as error:
            logger.warning("index of %s: %s", path, error)

    def _update_file(self, path: Path) -> None:
        """Reads what is new in a file of rollouts."""
        name = self._name(path)
        with suppress(FileNotFoundError), self.reader() as db:
            if _is_known(_known(db, name), path.stat()):
                return
        with suppress(FileNotFoundError), open_regular(path) as file, self._lock, self._writer() as db:
            status = os.fstat(file.fileno())
            known = _known(db, name)
            if _is_known(known, status):
                return
            done = 0
            if known is not None and known[0] == status.st_ino and status.st_size > known[3]:
                file.seek(known[3] - len(known[4]))
                done = known[3] if file.read(len(known[4])) == known[4] else 0
            if done == 0:
                _forget(db, name)
                db.execute("INSERT INTO files VALUES (NULL, ?, 0, 0, 0, 0, x'', 0)", (name,))
            (number,) = db.execute("SELECT file FROM files WHERE name = ?", (name,)).fetchone()
            file.seek(done)
            done, tail, unreadable = _add_lines(db, number, file, done)
            db.execute(
                "UPDATE files SET inode=?, size=?, mtime=?, done=?, tail=?, unreadable=unreadable+? WHERE file=?",
                (status.st_ino, status.st_size, status.st_mtime_ns, done, tail, unreadable, number),
            )

    def _list_store(self, root: Path) -> None:
        """Notes the store's files; those whose size or time changed are to be read again."""
        self._generation += 1
        with self._lock, self._writer() as db:
            for entry in list_store(root):
                db.execute(
                    "INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                    "seen = excluded.seen, sha256 = excluded.sha256, "
                    "checked = CASE WHEN bytes = excluded.bytes AND mtime = excluded.mtime THEN checked "
                    "ELSE excluded.checked END, "
                    "condition = CASE WHEN bytes = excluded.bytes AND mtime = excluded.mtime THEN condition "
                    "ELSE excluded.condition END, bytes = excluded.bytes, mtime = excluded.mtime",
                    (
                        _text(entry.path.relative_to(root)), entry.sha256, entry.num_bytes, entry.modified,
                        entry.condition, int(entry.sha256 is None), self._generation,
                    ),
                )  # fmt: skip
            db.execute("DELETE FROM pictures WHERE seen <> ?", (self._generation,))

    def _check_some(self, root: Path) -> bool:
        """Reads some pictures that were not read yet; whether there were any."""
        with self.reader() as db:
            rows = db.execute("SELECT name FROM pictures WHERE checked = 0 LIMIT ?", (_STORE_BATCH,)).fetchall()
        verdicts = []
        for (name,) in rows:
            if self._stop.is_set():
                return False
            with suppress(MissingImageError):  # removed meanwhile: the next listing will not have it
                verdicts.append(("good" if is_intact(root, name, self._limits) else "corrupt", name))
        with self._lock, self._writer() as db:
            db.executemany("UPDATE pictures SET condition = ?, checked = 1 WHERE name = ?", verdicts)
        return bool(verdicts)


def _text(path: Path) -> str:
    """A path's text, which SQLite can hold: bytes that are not UTF-8 are replaced. No stored image's name has any."""
    return os.fsencode(path).decode(errors="replace")


def is_intact(root: Path, name: str, limits: ImageLimits) -> bool:
    """Whether a stored file's bytes are those that its name says.

    Raises:
        MissingImageError: It is not there.
    """
    try:
        read_intact(root, name, limits)
    except RefError:
        return False
    except MissingImageError:
        if os.path.lexists(root / name):
            return False  # there, but unreadable
        raise
    return True


def _known(db: sqlite3.Connection, name: str) -> tuple[int, int, int, int, bytes] | None:
    """What a file was when it was read: inode, size, time, how far it was read, and the bytes before there."""
    row = db.execute("SELECT inode, size, mtime, done, tail FROM files WHERE name = ?", (name,)).fetchone()
    return tuple(row) if row is not None else None


def _is_known(known: tuple[int, int, int, int, bytes] | None, status: os.stat_result) -> bool:
    return known is not None and known[:3] == (status.st_ino, status.st_size, status.st_mtime_ns)


def _forget(db: sqlite3.Connection, name: str) -> None:
    """Removes a file's rows."""
    for table in ("rollouts", "uses", "files"):
        db.execute(f"DELETE FROM {table} WHERE file = (SELECT file FROM files WHERE name = ?)", (name,))  # noqa: S608


def _add_lines(db: sqlite3.Connection, number: int, file: BinaryIO, start: int) -> tuple[int, bytes, int]:
    """Adds the complete lines from `start` on.

    Returns:
        Where they end, the bytes before, and how many could not be read.
    """
    rows: list[tuple[_Value, ...]] = []
    uses: Counter[str] = Counter()
    unreadable = 0
    for line in complete_lines(file):
        try:
            record = decode_rollout(line)
        except RecordError:
            unreadable += 1
        else:
            rows.append((number, start, len(line), *_columns(record)))
            uses.update(span.hash for branch in record.branches for span in branch.images)
        start = file.tell()
        if len(rows) == _ROWS:
            _insert(db, rows)
    _insert(db, rows)
    db.executemany(
        "INSERT INTO uses VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
        [(sha256, number, count) for sha256, count in uses.items()],
    )
    file.seek(max(0, start - _TAIL))
    return start, file.read(min(start, _TAIL)), unreadable


def _insert(db: sqlite3.Connection, rows: list[tuple[_Value, ...]]) -> None:
    db.executemany("INSERT INTO rollouts VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", rows)
    rows.clear()


def _columns(record: RolloutRecord) -> tuple[_Value, ...]:
    spans = [span for branch in record.branches for span in branch.images]
    return (
        record.id, record.group, record.split, record.step, record.env, record.task[:_TASK], record.reward,
        record.advantage,
        record.outcome, record.error.kind if record.error else None, record.turns,
        min(_MAX_SUM, sum(branch.tokens for branch in record.branches)),
        min(_MAX_SUM, sum(branch.sampled for branch in record.branches)),
        len(spans), spans[0].name if spans else None,
    )  # fmt: skip
