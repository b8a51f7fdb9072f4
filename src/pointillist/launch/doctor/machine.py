"""The machine itself: interpreter, system, cores, memory, open files."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from typing import Final

import psutil

from pointillist.launch.doctor.finding import Finding

_MIN_FREE_BYTES: Final = 4e9
_MIN_OPEN_FILES: Final = 1024


def check_machine() -> Iterator[Finding]:
    """Findings about the machine."""
    yield Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield _system()
    yield Finding("cores", "ok", f"{_usable_cores()} usable of {os.cpu_count()}")
    yield _memory()
    yield _open_files()


def _system() -> Finding:
    text = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform != "linux":
        return Finding("system", "warning", f"{text}: only on Linux do all processes end with a killed launcher")
    return Finding("system", "ok", text)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} GB available of {memory.total / 1e9:.1f} GB"
    if memory.available < _MIN_FREE_BYTES:
        return Finding("memory", "warning", f"{text}: server and trainer each hold a model")
    return Finding("memory", "ok", text)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (at most {hard})"
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        return Finding("open files", "warning", f"{text}: sessions are connections; raise it by `ulimit -n 4096`")
    return Finding("open files", "ok", text)
