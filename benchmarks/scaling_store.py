"""What the real image store does to a file system: calls, time against entries of a folder, fsync, looking after it.

Part of `python -m benchmarks.scaling`; figures are this machine's and its local file system's.
"""

import hashlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, islice
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np

from benchmarks.common import picture, scratch
from pointillist.images import ImageLimits, ImageStore
from pointillist.images import store as store_module
from pointillist.images.inventory import collect_garbage, list_store, verify_entry, verify_store
from pointillist.images.store import TEMPORARY_SUFFIX, read_verified, write_image

LIMITS: Final = ImageLimits()
MARKER: Final = "/marker-of-the-scaling-benchmark/"
FOLDER_SIZES: Final = (0, 1_000, 10_000, 100_000, 200_000, 390_000)
FOLDER: Final = "00"
SAMPLES: Final = 200
TINY_FILES: Final = 100_000
FEW_FILES: Final = 50_000
WRITES: Final = 300
GROUPS: Final = 30

# What a call costs on a shared file system depends on what it takes: a name goes to the metadata server.
_BY_NAME: Final = frozenset({"openat", "mkdir", "rename", "unlink", "lstat", "stat"})
_LINE: Final = re.compile(r"^\d+ +(?P<call>\w+)\((?P<arguments>.*)$")


def variants(data: bytes) -> Iterator[bytes]:
    """The same picture under ever new hashes: bytes after its end are no part of its pixels."""
    for number in count():
        yield data + number.to_bytes(8, "big")


def in_one_folder(data: bytes, number: int) -> list[bytes]:
    """Variants of a picture that all belong into `FOLDER`."""
    wanted = bytes.fromhex(FOLDER)
    return list(islice((v for v in variants(data) if hashlib.sha256(v).digest().startswith(wanted)), number))


@contextmanager
def without_fsync() -> Iterator[None]:
    """The store without its flush."""
    with mock.patch.object(store_module.os, "fsync", lambda _: None):
        yield


@contextmanager
def traced_memory() -> Iterator[Callable[[], float]]:
    """Counts allocations of Python; what it gives tells the highest sum so far, in MB."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def calls() -> dict[str, dict[str, int]]:
    """System calls on files of a put of a new image, of a known one, and of a read, counted by strace.

    Returns:
        Per operation: `name` (calls that take a path), `open` (files and folders opened, part of `name`), `close`,
        `fsync`, `folder_fsync`, and `data` (reads and writes).
    """
    with scratch() as folder:
        log = Path(folder) / "calls"
        child = [sys.executable, "-m", "benchmarks.scaling_store", str(Path(folder) / "store")]
        traced = ["strace", "-f", "-y", "-e", "trace=%file,%desc", "-o", str(log), *child]  # found on PATH
        subprocess.run(traced, check=True)
        lines = log.read_text().splitlines()
    counts: dict[str, Counter[str]] = {}
    operation: str | None = None
    for line in lines:
        if MARKER in line:
            operation = line.split(MARKER)[1].split('"')[0]
            counts[operation] = Counter()
        elif operation is not None and (match := _LINE.match(line)):
            counts[operation].update(_kinds(match["call"], match["arguments"]))
    return {operation: dict(counter) for operation, counter in counts.items() if operation != "end"}


def _kinds(call: str, arguments: str) -> list[str]:
    if call == "newfstatat":
        return [] if "AT_EMPTY_PATH" in arguments else ["name"]  # the latter is fstat: answered by the client
    if call in _BY_NAME:
        return ["name", "open"] if call == "openat" else ["name"]
    if call in ("read", "write"):
        return ["data"]
    if call == "fsync":
        return ["fsync" if TEMPORARY_SUFFIX in arguments else "folder_fsync"]  # -y writes names beside descriptors
    return [call] if call == "close" else []


def traced_operations(root: Path) -> None:
    """What `calls` watches; the folder is there already, as all 256 are after the first thousands of images."""
    store = ImageStore(root, LIMITS)
    first, data = islice(variants(picture(64, 64, "JPEG")), 2)
    store.put(first)  # imports and opens whatever Pillow needs
    (root / hashlib.sha256(data).hexdigest()[:2]).mkdir(exist_ok=True)

    def mark(operation: str) -> None:
        Path(MARKER + operation).exists()

    mark("put_new")
    stored = store.put(data)
    mark("put_known")
    store.put(data)
    mark("read")
    read_verified(stored.uri, stored.sha256, [store.root], LIMITS)
    mark("end")


def folder_sizes() -> list[dict[str, float]]:
    """Put, read and lookup in one folder of a store that fills with empty files, beside a store that stays small.

    The entries are as long as real names. Medians in microseconds; the two stores take turns, so that a slow moment
    hits both. Puts are without fsync, so that the disk does not hide the folder. Lookups ask for names that were never
    asked for, so that no cache of names answers.
    """
    random = np.random.default_rng(0)
    rows: list[dict[str, float]] = []
    with scratch() as root, without_fsync():
        full = ImageStore(Path(root) / "full", LIMITS)
        (full.root / FOLDER).mkdir()
        pictures = iter(in_one_folder(picture(16, 16, "PNG"), SAMPLES * len(FOLDER_SIZES)))
        entries = 0
        for size in FOLDER_SIZES:
            for _ in range(size - entries):
                os.close(os.open(full.root / FOLDER / _absent(random), os.O_CREAT | os.O_EXCL))
            small = ImageStore(Path(root) / f"small-{size}", LIMITS)
            (small.root / FOLDER).mkdir()
            row = _side_by_side(full, small, list(islice(pictures, SAMPLES)), random)
            started = time.perf_counter()
            entries = sum(1 for _ in (full.root / FOLDER).iterdir())
            row["list_ms"] = (time.perf_counter() - started) * 1e3
            with traced_memory() as peak_mb:
                sum(1 for _ in list_store(full.root))
                row["list_store_mb"] = peak_mb()
            rows.append({"entries": entries, "folder_mb": (full.root / FOLDER).stat().st_size / 1e6, **row})
    return rows


def _absent(random: np.random.Generator) -> str:
    return f"{FOLDER}{random.bytes(31).hex()}.jpg"


def _side_by_side(
    full: ImageStore, small: ImageStore, pictures: list[bytes], random: np.random.Generator
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    for data in pictures:
        for name, store in (("", full), ("_small", small)):
            started = time.perf_counter()
            stored = store.put(data)
            put = time.perf_counter()
            read_verified(stored.uri, stored.sha256, [store.root], LIMITS)
            read = time.perf_counter()
            path = store.root / FOLDER / _absent(random)
            before = time.perf_counter()
            path.exists()
            looked = time.perf_counter()
            for what, taken in (("put", put - started), ("read", read - put), ("lookup", looked - before)):
                seconds.setdefault(what + name, []).append(taken)
    return {name: statistics.median(taken) * 1e6 for name, taken in seconds.items()}


def _microseconds(functions: list[Callable[[], object]]) -> float:
    seconds = []
    for function in functions:
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


def durability() -> dict[str, dict[str, float]]:
    """Milliseconds of writing one picture of 400 KB by the store, and with less flushing; they take turns.

    Returns:
        Per policy: median and 99th percentile.
    """
    seconds: dict[str, list[float]] = {"none": [], "file": [], "file_and_folder": []}
    # Only what is written counts here, so the bytes need not be a picture.
    content = np.random.default_rng(0).bytes(400_000)
    skipping: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "none": without_fsync,
        "file": lambda: mock.patch.object(store_module, "flush_folder", lambda _: None),
        "file_and_folder": nullcontext,
    }
    with scratch() as root:
        for number, data in enumerate(islice(variants(content), WRITES)):
            for policy, taken in seconds.items():
                path = Path(root) / policy / f"{number % 256:02x}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                with skipping[policy]():
                    started = time.perf_counter()
                    write_image(path, data)
                    taken.append(time.perf_counter() - started)
    return {
        policy: {"median_ms": float(np.median(taken)) * 1e3, "p99_ms": float(np.percentile(taken, 99)) * 1e3}
        for policy, taken in seconds.items()
    }


def simultaneous_puts(group_size: int) -> float:
    """How many rollouts of a group write the group's picture, if all put it at the same moment; mean of many groups."""
    barrier = threading.Barrier(group_size)
    pictures = list(islice(variants(picture(1024, 768, "JPEG")), GROUPS))

    def put(store: ImageStore) -> None:
        for data in pictures:
            barrier.wait()
            store.put(data)

    write = mock.Mock(wraps=write_image)
    with (
        scratch() as root,
        ThreadPoolExecutor(group_size) as pool,
        mock.patch.object(store_module, "write_image", write),
    ):
        store = ImageStore(Path(root), LIMITS)
        for future in [pool.submit(put, store) for _ in range(group_size)]:
            future.result()
    return float(write.call_count / GROUPS)


def looking_after() -> dict[str, float]:
    """Rates of listing, verifying and collecting garbage, and the most that verifying few and all files holds."""
    with scratch() as folder:
        store = ImageStore(Path(folder), LIMITS)
        started = time.perf_counter()
        with without_fsync():
            hashes = [store.put(data).sha256 for data in islice(variants(picture(8, 8, "PNG")), TINY_FILES)]
        put_seconds = time.perf_counter() - started
        started = time.perf_counter()
        entries = sum(1 for _ in list_store(store.root))
        list_seconds = time.perf_counter() - started
        started = time.perf_counter()
        Counter(entry.condition for entry in verify_store(store.root, LIMITS, workers=2))
        verify_seconds = time.perf_counter() - started
        peaks_mb = [_verify_peak_mb(store.root, number) for number in (FEW_FILES, TINY_FILES)]
        keep = frozenset(hashes[::2])
        started = time.perf_counter()
        gone = collect_garbage(store.root, keep=keep, older_than=0, dry_run=False)
        gc_seconds = time.perf_counter() - started
        keep_bytes = sys.getsizeof(keep) + sum(map(sys.getsizeof, keep))
    return {
        "files": entries,
        "gc_keep_bytes_per_hash": keep_bytes / len(keep),
        "tiny_puts_per_second": entries / put_seconds,
        "listed_per_second": entries / list_seconds,
        "verified_tiny_per_second": entries / verify_seconds,
        "few_files": FEW_FILES,
        "verify_few_mb": peaks_mb[0],
        "verify_all_mb": peaks_mb[1],
        "gc_per_second": entries / gc_seconds,
        "gc_removed": len(gone),
        "verify_picture_ms": _verify_picture_ms(),
    }


def _verify_peak_mb(root: Path, files: int) -> float:
    """The most that verifying so many files holds."""
    with traced_memory() as peak_mb:
        Counter(entry.condition for entry in islice(verify_store(root, LIMITS, workers=2), files))
        return peak_mb()


def _verify_picture_ms() -> float:
    """One thread, one picture of the size of the scenario's, from the page cache."""
    with scratch() as folder, without_fsync():
        store = ImageStore(Path(folder), LIMITS)
        for data in islice(variants(picture(1024, 768, "JPEG")), 50):
            store.put(data)
        entries = list(list_store(store.root))
        return _microseconds([lambda entry=entry: verify_entry(entry, LIMITS) for entry in entries]) / 1e3


SECTIONS: Final[dict[str, Callable[[], Any]]] = {
    "calls": calls,
    "folder_sizes": folder_sizes,
    "durability": durability,
    "simultaneous_writers": lambda: simultaneous_puts(16),
    "looking_after": looking_after,
}


if __name__ == "__main__":
    traced_operations(Path(sys.argv[1]))
