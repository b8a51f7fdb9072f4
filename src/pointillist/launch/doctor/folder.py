"""The run's folder: room, and whether the file system keeps the promises that a run builds on.

A run writes images and batches by renaming, and other processes read them at once. So: can one write, does fsync work,
does another process see what was written, and does a reader ever find a file missing or torn while it is replaced?
"""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pointillist.base.files import write_atomically
from pointillist.launch.doctor import probe
from pointillist.launch.doctor.finding import Finding

_LITTLE_BYTES: Final = 1e9
_ENOUGH_BYTES: Final = 20e9
_SLOW_SECONDS: Final = 0.5
_SWAPS: Final = 200
_SWAPPED_BYTES: Final = 65_536


def check_folder(run_folder: Path) -> Iterator[Finding]:
    """Findings about the folder of a run; if it is not there, about the folder that it would be made in."""
    wanted = run_folder.expanduser().absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    yield _place(wanted, folder)
    if not folder.is_dir():
        return
    yield _room(folder)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    except OSError as error:
        yield Finding("writable", "problem", f"{folder} can not be written ({error.strerror}): choose another")
        return
    try:
        yield Finding("writable", "ok", str(folder))
        yield _durable(scratch)
        yield from _shared(scratch)
    except OSError as error:
        yield Finding("files", "problem", f"{folder}: {error.strerror} ({error.filename})")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _place(wanted: Path, folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("folder", "problem", f"{folder} is a file, a run needs a folder: choose another output_dir")
    text = str(wanted) if folder == wanted else f"{wanted} is not there yet; looked at {folder}"
    if (resolved := folder.resolve()) != folder:
        text += f"; references will name {resolved}, since it leads through a symbolic link"
    return Finding("folder", "ok", text)


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free"
    if free < _LITTLE_BYTES:
        return Finding("free space", "problem", f"{text}: images, checkpoints and two versions of weights do not fit")
    if free < _ENOUGH_BYTES:
        return Finding("free space", "warning", f"{text}: see that images, weights and checkpoints fit")
    return Finding("free space", "ok", text)


def _durable(scratch: Path) -> Finding:
    started = time.monotonic()
    with (scratch / "durable").open("wb") as file:
        file.write(secrets.token_bytes(_SWAPPED_BYTES))
        file.flush()
        os.fsync(file.fileno())
    took = time.monotonic() - started
    text = f"{1000 * took:.1f} ms for {_SWAPPED_BYTES // 1024} KiB"
    if took > _SLOW_SECONDS:
        return Finding("fsync", "warning", f"{text}: every new image waits for one, in threads")
    return Finding("fsync", "ok", text)


def _shared(scratch: Path) -> Iterator[Finding]:
    """Writes for another process, reads what it writes, and replaces a file under its eyes."""
    content = secrets.token_bytes(_SWAPPED_BYTES)
    write_atomically(scratch / probe.SWAPPED, b"a" * _SWAPPED_BYTES, durable=False)
    child = subprocess.Popen(
        [sys.executable, "-m", probe.__name__, str(scratch)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        write_atomically(scratch / probe.FROM_DOCTOR, content, durable=False)
        yield _coherent(scratch / probe.FROM_PROBE, hashlib.sha256(content).hexdigest())
        for turn in range(_SWAPS):
            write_atomically(scratch / probe.SWAPPED, b"ab"[turn % 2 :][:1] * _SWAPPED_BYTES, durable=False)
        (scratch / probe.STOP).touch()
        told, _ = child.communicate(timeout=3 * probe.PATIENCE_SECONDS)
    finally:
        child.kill()
        child.wait()
    yield _atomic(json.loads(told))


def _coherent(answer: Path, expected: str) -> Finding:
    waited = probe.wait_for(answer)
    deadline = time.monotonic() + probe.PATIENCE_SECONDS
    while waited is not None and answer.read_text(encoding="ascii") != expected:
        if time.monotonic() > deadline:
            return Finding("coherence", "problem", "another process read other bytes than were written")
        time.sleep(0.01)
    if waited is None:
        return Finding("coherence", "problem", "another process's file could not be seen: turn attribute caching off")
    return Finding("coherence", "ok", "two processes of this machine see each other's files; try each node by itself")


def _atomic(told: dict[str, int]) -> Finding:
    text = f"{_SWAPS} renames over a file that was read {told['reads']} times"
    if told["missing"] or told["torn"]:
        return Finding(
            "rename",
            "problem",
            f"{text}: {told['missing']} times missing, {told['torn']} torn: use another",
        )
    return Finding("rename", "ok", text)
