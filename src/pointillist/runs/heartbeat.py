"""What a process of a run is doing: `<output_dir>/state/<process>.json`, written every few seconds by a thread.

The loop of the process says which phase it enters (`enter`) and when something in a long phase has moved (`progress`);
the thread writes that with a counter of its own beats. So a reader tells three things apart: a process that works (its
phase moves), one that stands still (it beats, its phase does not move), and one that is stopped or dead (no beats). The
last word of a process whose work is finished is `done`: one that ends without it has died, whatever its exit code.

One process has one loop, so the heartbeat is the process's own, as logging is: outside `beating` all calls do nothing.

Example:
    >>> with beating(paths.state, "trainer"):
    ...     enter("wait_for_batch", step=7, waits_for="the batch of step 7")
    ...     batch = receive()
    ...     enter("forward_backward", step=7)
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from pointillist.base.files import write_atomically
from pointillist.runs.process_record import ProcessRecord

PROCESS_VAR: Final = "POINTILLIST_PROCESS"
"""Environment variable with the name that the launcher gives a process; ranks of one trainer have the same."""

BEAT_SECONDS: Final = 2.0

SERVERS: Final = "the inference servers"
"""What a phase waits for whose end no other beating process decides."""


@dataclass(frozen=True, slots=True)
class Beat(ProcessRecord):
    """The state of a process."""

    process: str
    """The launcher's name for it."""
    rank: int
    phase: str = "start"
    step: int | None = None
    waits_for: str | None = None
    """What another process owes it; None if the work of this phase is its own."""
    since: str = ""
    """Local time at which the phase was entered, for people."""
    moves: int = 0
    """Phases entered, and progress within them."""
    beats: int = 0
    done: bool = False

    @property
    def name(self) -> str:
        """The process's name, and its rank where there are several."""
        return f"{self.process} (rank {self.rank})" if self.rank else self.process

    def described(self) -> str:
        """The phase in words, such as `'rollouts' of step 3`."""
        step = "" if self.step is None else f" of step {self.step}"
        return f"{self.phase!r}{step}" + (f", waiting for {self.waits_for}" if self.waits_for else "")


class Heartbeat:
    """Writes the state of this process until `stop`."""

    def __init__(self, folder: Path, process: str, rank: int) -> None:
        """Writes the first beat.

        Args:
            folder: The run's `state` folder; made if it is not there.
            process: Name of the process.
            rank: Among the processes with this name.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = beat_file(folder, process, rank)
        self._beat = Beat.of_this_process(process=process, rank=rank, since=_now())
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None, waits_for: str | None) -> None:
        """The loop has come to a phase."""
        with self._lock:
            moves = self._beat.moves + 1
            self._beat = replace(self._beat, phase=phase, step=step, waits_for=waits_for, since=_now(), moves=moves)

    def progress(self) -> None:
        """Something within the phase was done."""
        with self._lock:
            self._beat = replace(self._beat, moves=self._beat.moves + 1)

    def stop(self, *, done: bool) -> None:
        """Writes the last beat.

        Args:
            done: Whether the process's work is finished.

        Raises:
            OSError: The file cannot be written.
        """
        self._closing.set()
        self._thread.join()
        if done:
            self._beat = replace(self._beat, phase="done", step=None, waits_for=None, since=_now(), done=True)
            self._write()

    def _run(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            with suppress(OSError):  # a full disk or a lost folder: the loop will meet it, too
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._beat = beat = replace(self._beat, beats=self._beat.beats + 1)
        write_atomically(self._path, json.dumps(asdict(beat)).encode(), durable=False)  # worth nothing after a crash


_current: Heartbeat | None = None


@contextmanager
def beating(folder: Path, process: str, rank: int = 0) -> Iterator[None]:
    """Inside it, this process has a heartbeat; at its end its work is done, unless by an exception.

    Args:
        folder: The run's `state` folder.
        process: Name of the process where the launcher has given it none.
        rank: Among the processes with this name.
    """
    global _current  # noqa: PLW0603 - of the process, as logging is
    _current = heart = Heartbeat(folder, os.environ.get(PROCESS_VAR, process), rank)
    finished = False
    try:
        yield
        finished = True
    finally:
        _current = None
        heart.stop(done=finished)


def enter(phase: str, *, step: int | None = None, waits_for: str | None = None) -> None:
    """Says that the loop of this process has come to a phase.

    Args:
        phase: Name of the phase.
        step: The optimiser step that it belongs to.
        waits_for: Name of what another process owes, if this phase only waits for it.
    """
    if _current is not None:
        _current.enter(phase, step, waits_for)


def progress() -> None:
    """Says that something within the phase was done: a row, a rollout."""
    if _current is not None:
        _current.progress()


def beat_file(folder: Path, process: str, rank: int) -> Path:
    """The file of one process."""
    return folder / (f"{process}.rank_{rank}.json" if rank else f"{process}.json")


def read_beats(folder: Path) -> list[Beat]:
    """The last beats of all processes of a run, by file name; what cannot be read is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError):
            found.append(Beat.from_json(path.read_bytes()))
    return found


def forget(folder: Path, process: str | None = None) -> None:
    """Removes the beats of a process that is not alive, or of all."""
    for path in folder.glob("*.json"):
        if process is None or path.name.partition(".")[0] == process:
            path.unlink(missing_ok=True)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
