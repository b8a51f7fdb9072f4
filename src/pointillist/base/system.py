"""What a process asks of its operating system: memory, to end with its parent, which processes live, a free port."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import psutil

_PR_SET_PDEATHSIG: Final = 1


def resident_mb() -> float:
    """Resident memory of this process, in MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def die_with_parent() -> None:
    """Asks the kernel to end this process when its parent is gone, however that happened (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def machine_id() -> str:
    """Names this start of this machine's kernel: containers on it have the same one, another boot has another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def pid_namespace() -> str:
    """Names the set of process numbers that this process sees; a container has one of its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """When a process was started, in the system's own units; None if there is none, or only its exit code is left.

    A number is given to another process later; number and start together name one process. No clock that can be set
    takes part in it.
    """
    if not Path("/proc/self/stat").exists():  # not Linux
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
        except psutil.Error:
            return None
    try:
        # The command's name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def is_process(pid: int, start: str) -> bool:
    """Whether the process with this number and start is alive on this machine, in this pid namespace."""
    return process_start(pid) == start


def kill_process(pid: int, start: str, number: signal.Signals) -> None:
    """Sends a signal to one process, and to no other that has its number meanwhile."""
    if is_process(pid, start):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
