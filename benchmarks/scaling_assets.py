"""What one asset endpoint costs its machine, for pictures and for weights: part of `python -m benchmarks.scaling`.

The real endpoint in a process of its own, asked by the real client. Time is the endpoint's own time on its core, so the
client beside it does not count.
"""

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final

import psutil
import uvicorn

from benchmarks.common import picture, scratch
from benchmarks.scaling_store import LIMITS, variants, without_fsync
from pointillist.assets.client import AssetClient
from pointillist.assets.server import create_app
from pointillist.errors import MissingImageError
from pointillist.images import ImageStore
from pointillist.images.store import local_path
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths

KEY: Final = "key of the benchmark"
PICTURES: Final = 200
FETCHES: Final = 2_000
CLIENT_THREADS: Final = 8
WEIGHT_BYTES: Final = 256 * 1024**2
WEIGHT_FETCHES: Final = 4


def _serve(root: str, port: int) -> None:
    """The endpoint's process."""
    app = create_app(Path(root) / "images", RunPaths(Path(root)), KEY, LIMITS)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


@contextmanager
def _endpoint(root: Path) -> Iterator[tuple[psutil.Process, AssetClient]]:
    """A running endpoint and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(str(root), port))
    process.start()
    try:
        client = AssetClient([f"http://127.0.0.1:{port}"], KEY, timeout=30.0)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(MissingImageError):
                client.fetch("/health", 1000)
                break
            time.sleep(0.1)
        yield psutil.Process(process.pid), client
    finally:
        process.terminate()
        process.join()


def assets(image_bytes: int) -> dict[str, float]:
    """Seconds of one core that the endpoint takes for a picture of so many bytes, and for a GB of weights."""
    with scratch() as folder, without_fsync():
        root = Path(folder)
        store = ImageStore(root / "images", LIMITS)
        data = picture(1024, 768, "JPEG")
        data += bytes(image_bytes - len(data))  # what comes after a JPEG's end is no part of its pixels
        stored = [store.put(each) for each in islice(variants(data), PICTURES)]
        paths = ["/images/" + local_path(each.uri).relative_to(store.root).as_posix() for each in stored]
        weights = RunPaths(root).broadcast_step(1) / WEIGHTS_FILE
        weights.parent.mkdir(parents=True)
        weights.write_bytes(bytes(WEIGHT_BYTES))
        with _endpoint(root) as (process, client), ThreadPoolExecutor(CLIENT_THREADS) as pool:

            def fetch(path: str) -> int:
                return len(client.fetch(path, WEIGHT_BYTES))

            def ask(names: list[str], threads: Callable[..., Iterator[int]]) -> tuple[float, float]:
                """Seconds of the endpoint's core, and by the clock."""
                before, started = _cpu_seconds(process), time.perf_counter()
                sum(threads(fetch, names))
                return _cpu_seconds(process) - before, time.perf_counter() - started

            ask(paths, pool.map)
            core, clock = ask([paths[number % PICTURES] for number in range(FETCHES)], pool.map)
            weights_core, weights_clock = ask(["/weights/1"] * WEIGHT_FETCHES, map)
    gigabytes = WEIGHT_FETCHES * WEIGHT_BYTES / 1e9
    return {
        "core_ms_per_picture": core / FETCHES * 1e3,
        "pictures_per_second_beside_the_client": FETCHES / clock,
        "core_seconds_per_gb_of_weights": weights_core / gigabytes,
        "gb_of_weights_per_second_beside_the_client": gigabytes / weights_clock,
    }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
