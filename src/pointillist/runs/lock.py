"""The lock of a run's folder: one launcher at a time, on one machine or on many.

`<output_dir>/run.lock` says who holds the folder, or held it last. It is taken before anything in the folder is
changed, and kept until the launcher ends, by two means at once:

- `flock`, where the file system has it. The kernel lets go of it when the holder dies, however that happens.
- A counter in the file that the holder raises every few seconds. It tells other machines that the holder lives, where
  `flock` does not reach them or is not there. They watch the counter and not the time of day, since clocks differ.

So the lock of a dead process of this machine is taken over at once, and that of another machine when its counter has
stood still. A requeued SLURM job takes over from its own earlier start: SLURM has ended that one.
"""

import errno
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final

from pointillist.base.system import machine_id
from pointillist.errors import LaunchError
from pointillist.runs.process_record import ProcessRecord

LOCK_FILE: Final = "run.lock"
_TIME: Final = "%Y-%m-%d %H:%M:%S"
_BEAT_SECONDS: Final = 5.0
_STALE_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.5
_SETTLE_SECONDS: Final = 2.0
_FLOCK_SECONDS: Final = 2.0
_RECORD_BYTES: Final = 1024
_NO_FLOCK: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Job:
    """A start of a batch job."""

    id: str
    start: int
    """0 at first, one more each time the job is requeued."""


@dataclass(frozen=True, slots=True)
class Holder(ProcessRecord):
    """The launcher that holds a run's folder."""

    since: str
    """Local time of the holder, for people."""
    token: str
    """Drawn anew each time the lock is taken."""
    since_seconds: float = 0.0
    """The same in seconds since the epoch, whatever the holder's time zone; 0 counts everything as later."""
    beat: int = 0
    job_id: str = ""
    job_start: int = 0
    released: bool = False

    def __str__(self) -> str:
        job = f" (job {self.job_id})" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


class RunLock:
    """The lock, while it is held; `with RunLock.take(folder): ...`."""

    def __init__(self, path: Path, descriptor: int, holder: Holder, beat_seconds: float) -> None:
        """For `take`."""
        self._path = path
        self._descriptor = descriptor
        self._holder = holder
        self._beat_seconds = beat_seconds
        self._lost: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls,
        output_dir: Path,
        *,
        job: Job | None = None,
        say: Callable[[str], None] = lambda _: None,
        stale_seconds: float = _STALE_SECONDS,
        beat_seconds: float = _BEAT_SECONDS,
    ) -> "RunLock":
        """Takes the lock of a run's folder, which is made if it is not there.

        Args:
            output_dir: The folder.
            job: The batch job that this process is a part of.
            say: Function that reports that another machine's lock is being watched.
            stale_seconds: Seconds for which the counter of another machine's lock must stand still.
            beat_seconds: Seconds between two counts of our own.

        Raises:
            LaunchError: A live process holds it, or the folder cannot be made or written.
        """
        path = output_dir / LOCK_FILE
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise LaunchError(
                f"output_dir {output_dir} cannot be written ({error.strerror}: {error.filename})"
            ) from None
        try:
            exclusive = _flock(descriptor, fcntl.LOCK_EX)
            _refuse_if_live(path, descriptor, exclusive=exclusive, job=job, say=say, stale_seconds=stale_seconds)
            holder = _ourselves(job)
            _write(descriptor, holder)
            if exclusive is None:
                time.sleep(_SETTLE_SECONDS)  # the last of several who write at once has it
                found = _read(path)
                if found is None or found.token != holder.token:
                    raise _held(path, found)
        except OSError as error:
            os.close(descriptor)
            raise LaunchError(f"{path} cannot be written ({error.strerror})") from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, holder, beat_seconds)

    @property
    def lost(self) -> str | None:
        """Why the lock is no longer held, although it was not released; None while it is."""
        return self._lost

    def release(self) -> None:
        """Lets go of the folder. The file stays: removing it would race with whoever opens it."""
        self._closing.set()
        self._thread.join()
        with suppress(OSError):
            if self._lost is None:
                _write(self._descriptor, replace(self._holder, released=True))
        os.close(self._descriptor)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        absent = 0
        while not self._closing.wait(self._beat_seconds):
            try:
                found = _read(self._path)
                same_file = os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
            except FileNotFoundError:
                absent += 1
                if absent > 1:  # once may be a network file system that lags
                    self._lost = f"{self._path} is gone: the run's folder was moved or removed while the run went on"
                    return
                continue
            except OSError:
                continue
            absent = 0
            if not same_file or (found is not None and found.token != self._holder.token):
                self._lost = (
                    f"{self._path} belongs to {found or 'another run'} now: the folder was replaced or taken over"
                )
                return
            self._holder = replace(self._holder, beat=self._holder.beat + 1)
            with suppress(OSError):
                _write(self._descriptor, self._holder)


def live_holder(output_dir: Path, *, stale_seconds: float = _STALE_SECONDS) -> Holder | None:
    """Who holds a run's folder; None if no live process does. Changes nothing.

    Args:
        output_dir: The folder; need not exist.
        stale_seconds: Seconds for which another machine's counter is watched.
    """
    path = output_dir / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        shared = _flock(descriptor, fcntl.LOCK_SH)
        return _live(path, exclusive=shared, job=None, say=lambda _: None, stale_seconds=stale_seconds)
    finally:
        os.close(descriptor)


def refuse_if_held(output_dir: Path) -> None:
    """Makes sure that no live launcher holds a run's folder.

    Raises:
        LaunchError: One does.
    """
    if (holder := live_holder(output_dir)) is not None:
        raise _held(output_dir / LOCK_FILE, holder)


def _refuse_if_live(
    path: Path,
    descriptor: int,
    *,
    exclusive: bool | None,
    job: Job | None,
    say: Callable[[str], None],
    stale_seconds: float,
) -> None:
    live = _live(path, exclusive=exclusive, job=job, say=say, stale_seconds=stale_seconds)
    if live is not None:
        raise _held(path, live)
    if not os.path.samestat(path.stat(), os.fstat(descriptor)):
        raise LaunchError(f"{path} was replaced while it was being locked: try again")


def _live(
    path: Path, *, exclusive: bool | None, job: Job | None, say: Callable[[str], None], stale_seconds: float
) -> Holder | None:
    """The holder if it lives.

    Args:
        path: The lock's file.
        exclusive: Whether `flock` was given to us; None where the file system has none.
        job: The batch job that asks.
        say: Function that reports the waiting.
        stale_seconds: Seconds for which a counter may stand still.
    """
    holder = _read(path)
    if exclusive is False:
        return holder or Holder("a host that is not known yet", "", "", 0, "", "just now", "")
    if holder is None or holder.released:
        return None
    if job is not None and job.id == holder.job_id and job.start > holder.job_start:
        return None
    if holder.machine == machine_id():
        if exclusive:
            return None  # its kernel is ours, and has let go of the lock
        if holder.is_here:
            return holder if holder.is_alive else None
    say(f"{path} is held by {holder}: watching for {stale_seconds:.0f} s whether it still lives")
    deadline = time.monotonic() + stale_seconds
    while time.monotonic() < deadline:
        time.sleep(min(_LOOK_SECONDS, stale_seconds))
        now = _read(path)
        if now is not None and now != holder:
            return None if now.released else now
    return None


def _held(path: Path, holder: Holder | None) -> LaunchError:
    return LaunchError(
        f"output_dir {path.parent} is in use by {holder or 'another launcher'} ({path.name}): stop that run first, or "
        "choose another output_dir"
    )


def _ourselves(job: Job | None) -> Holder:
    return Holder.of_this_process(
        since=time.strftime(_TIME),
        token=secrets.token_hex(8),
        since_seconds=time.time(),
        job_id=job.id if job else "",
        job_start=job.start if job else 0,
    )


def _flock(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was given; None where the file system has none.

    It is tried for a moment: whoever only looks (`live_holder`) has it for as long.
    """
    deadline = time.monotonic() + _FLOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        else:
            return True


def _read(path: Path) -> Holder | None:
    """What the file says; opened anew each time, so that a network file system shows what is there now.

    Raises:
        FileNotFoundError: There is no file.
    """
    for _ in range(3):  # a reader may come into the middle of a write
        data = path.read_bytes()[: 4 * _RECORD_BYTES]
        with suppress(ValueError):
            return Holder.from_json(data)
        if not data.strip():
            return None
        time.sleep(0.05)
    return None


def _write(descriptor: int, holder: Holder) -> None:
    """In place, since a file that is renamed over the locked one would have no lock; always of the same length."""
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode().ljust(_RECORD_BYTES - 1) + b"\n", 0)
