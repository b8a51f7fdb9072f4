"""Child processes: each with a log file and a session of its own, ended together and when the launcher is gone."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointillist.base.files import open_private
from pointillist.base.system import die_with_parent

_GRACE_SECONDS: Final = 5.0
_TAIL_BYTES: Final = 256 * 1024


@dataclass(slots=True)
class Child:
    """A process of the run."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int = 0
    """Length of the log when this process was started: what stands before is of an earlier one."""
    verdict: str | None = None
    """Why it was killed, or why its exit code 0 is no success."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, from outside or from the watchdog."""
        return self.verdict is not None or (self.exit_code or 0) < 0

    def cause(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if self.verdict is not None:
            return f"{self.name} {self.verdict}"
        if code is not None and code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit code {code}"

    def last_lines(self, count: int) -> list[str]:
        """The end of what it wrote to its log."""
        try:
            with self.log.open("rb") as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(max(self.log_start, length - _TAIL_BYTES))
                return file.read(_TAIL_BYTES).decode(errors="replace").splitlines()[-count:]
        except OSError:
            return []


def start(name: str, command: Sequence[str], environ: Mapping[str, str], log: Path) -> Child:
    """Starts a process in a session of its own; its output goes to `log`, which is appended to.

    The log is for its user only: an environment may print what `env_vars` hold.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", opener=open_private) as output:
        log_start = output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            list(command),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Child(name, process, log, log_start)


def stop_all(children: Sequence[Child], grace: float | None = None) -> None:
    """Ends all processes: politely first, after `grace` seconds (None: a few) for good."""
    running = [child for child in children if child.exit_code is None]
    for child in running:
        signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + (_GRACE_SECONDS if grace is None else grace)
    while any(child.exit_code is None for child in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        signal_group(child, signal.SIGKILL)  # what is left of any group, a worker whose parent was killed included
        child.process.wait()


def signal_group(child: Child, number: signal.Signals) -> None:
    """Sends a signal to a process and to what it has started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)
