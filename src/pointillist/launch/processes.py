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

from pointillist.system import die_with_parent

_GRACE_SECONDS: Final = 5.0


@dataclass(slots=True)
class Child:
    """A process of the run."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def cause(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit code {code}"

    def last_lines(self, count: int) -> list[str]:
        """The end of its log."""
        return (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:] if self.log.is_file() else []
        )


def start(name: str, command: Sequence[str], environ: Mapping[str, str], log: Path) -> Child:
    """Starts a process in a session of its own; its output goes to `log`, which is appended to."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Child(name, process, log)


def stop_all(children: Sequence[Child], grace: float = _GRACE_SECONDS) -> None:
    """Ends all processes: politely first, after `grace` seconds for good."""
    running = [child for child in children if child.exit_code is None]
    for child in running:
        _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(child.exit_code is None for child in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        _signal_group(child, signal.SIGKILL)  # what is left of any group, a worker whose parent was killed included
        child.process.wait()


def _signal_group(child: Child, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)
