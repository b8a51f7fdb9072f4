"""The viewer on a made-up run of 100,000 rollouts with 300,000 references to 4,000 pictures.

python -m benchmarks.view > benchmarks/results/view.json

A viewer is started on the run that it has never seen; timed are the first page from the start of the process on, the
index, then pages of every kind over HTTP, and the viewer's resident memory at its highest.
"""

import hashlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from pointillist.runs.paths import RunPaths
from pointillist.view.thumbnails import encode_png

STEPS, A_STEP, GROUP = 200, 500, 10
PICTURES, A_ROLLOUT = 4_000, 3
TOKENS = 60
"""Sampled ones of a rollout."""
REPEATS = 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder) / "run")
        make_run(paths)
        sha256, _ = stored(paths, Image.new("RGB", (4000, 4000), "teal"))
        size = sum(path.stat().st_size for path in paths.rollouts.rglob("*.jsonl"))
        environ = {**os.environ, "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        cores = len(os.sched_getaffinity(0))
        results = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {cores} cores, Python {platform.python_version()}",
            "rollouts": STEPS * A_STEP,
            "references": STEPS * A_STEP * A_ROLLOUT,
            "pictures": PICTURES,
            "records_mb": round(size / 1e6),
            **measure(paths, f"{sha256[:2]}/{sha256}.png", environ),
        }
    print(json.dumps(results, indent=2))


def make_run(paths: RunPaths) -> None:
    """Writes the run: pictures of 64 x 64, 500 rollouts a step with three pictures and 60 sampled tokens each."""
    rng = np.random.default_rng(0)
    pictures = (Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(PICTURES))
    names = [stored(paths, picture) for picture in pictures]
    chance = random.Random(0)
    paths.metrics.mkdir(parents=True)
    for step in range(1, STEPS + 1):
        file = paths.rollouts_file(step)
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(rollout(step, index, names, chance)) + "\n" for index in range(A_STEP)))
    for name, keys in (("trainer", ("loss", "entropy", "time/step")), ("orchestrator", ("reward/mean",))):
        lines = [{"step": step, **{key: chance.random() for key in keys}} for step in range(1, STEPS + 1)]
        (paths.metrics / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def stored(paths: RunPaths, image: Image.Image) -> tuple[str, str]:
    """Hash and URL of a picture in the run's store; written without the store's care for a crash."""
    data = encode_png(image)
    sha256 = hashlib.sha256(data).hexdigest()
    path = paths.output_dir / "assets" / "images" / sha256[:2] / f"{sha256}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return sha256, path.as_uri()


def rollout(step: int, index: int, names: list[tuple[str, str]], chance: random.Random) -> dict[str, Any]:
    """One record."""
    chosen = chance.sample(names, A_ROLLOUT)
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": uri}} for _, uri in chosen]
    words = [f"word{chance.randrange(1000)} " for _ in range(TOKENS)]
    images = [
        {"item": {"raw_image_uri": uri, "family": "qwen_vl"}, "hash": sha256, "offset": 4 + 10 * number, "length": 4}
        for number, (sha256, uri) in enumerate(chosen)
    ]
    branch = {
        "tokens": 60 + TOKENS,
        "sampled": TOKENS,
        "overlong": False,
        "sampled_pieces": [
            {"offset": 60, "texts": words, "logprobs": [round(-3 * chance.random(), 4) for _ in range(TOKENS)]}
        ],
        "messages": [
            {"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "".join(words)},
        ],
        "images": images,
    }
    return {
        "id": f"{step}.{index // GROUP}.{index % GROUP}",
        "group": f"{step}.{index // GROUP}",
        "split": "train",
        "env": "made-up",
        "task": f"task-{chance.randrange(5000)}",
        "reward": round(chance.random(), 3),
        "advantage": round(chance.random() - 0.5, 3),
        "outcome": "sent",
        "error": None,
        "turns": 1,
        "versions": [step - 1, step - 1],
        "branches": [branch],
    }


def measure(paths: RunPaths, big: str, environ: dict[str, str]) -> dict[str, Any]:
    """Starts the viewer, twice: on a run that it does not know, and on one that it knows.

    Args:
        paths: The run's folder.
        big: Name in the store of a picture of 16 megapixels, for a thumbnail.
        environ: Of the viewer.
    """
    started = time.perf_counter()
    process, client = start(paths, environ)
    client.get("/").raise_for_status()
    results: dict[str, Any] = {"first_page_s": round(time.perf_counter() - started, 3)}
    begun = time.perf_counter()
    client.get("/runs/0/rollouts").raise_for_status()
    client.get("/runs/0/rollout?id=1.3.4").raise_for_status()
    results["while_indexing_list_and_rollout_s"] = round(time.perf_counter() - begun, 3)
    while client.get("/runs/0/status").json()["rollouts"] < STEPS * A_STEP:
        time.sleep(0.1)
    results["indexed_s"] = round(time.perf_counter() - started, 2)
    while client.get("/runs/0/status").json()["pictures_checked"] < PICTURES:
        time.sleep(0.1)
    results["store_checked_s"] = round(time.perf_counter() - started, 2)
    chance = random.Random(1)
    results |= {
        "overview_ms": timed(client, lambda: "/"),
        "rollouts_ms": timed(client, lambda: "/runs/0/rollouts"),
        "rollouts_last_page_ms": timed(client, lambda: f"/runs/0/rollouts?page={STEPS * A_STEP // 50}"),
        "rollouts_by_reward_ms": timed(client, lambda: "/runs/0/rollouts?sort=reward-low&page=900"),
        "rollouts_task_ms": timed(client, lambda: f"/runs/0/rollouts?task=task-{chance.randrange(5000)}"),
        "rollout_ms": timed(client, lambda: f"/runs/0/rollout?id={chance.randint(1, STEPS)}.{chance.randrange(50)}.3"),
        "group_ms": timed(client, lambda: f"/runs/0/group?id={chance.randint(1, STEPS)}.{chance.randrange(50)}"),
        "store_ms": timed(client, lambda: "/runs/0/store"),
    }
    begun = time.perf_counter()
    client.get(f"/runs/0/thumbnail/640/{big}").raise_for_status()
    results["thumbnail_16_megapixels_s"] = round(time.perf_counter() - begun, 3)
    results["peak_resident_mb"] = stop(process)
    started = time.perf_counter()
    process, client = start(paths, environ)
    client.get("/runs/0/rollouts").raise_for_status()
    results["first_page_again_s"] = round(time.perf_counter() - started, 3)
    stop(process)
    return results


def start(paths: RunPaths, environ: dict[str, str]) -> tuple[subprocess.Popen[str], httpx.Client]:
    """A viewer, and a client of the address that it prints."""
    command = [sys.executable, "-m", "pointillist", "view", str(paths.output_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None  # noqa: S101
    address = process.stdout.readline().split()[-1]
    return process, httpx.Client(base_url=address, trust_env=False, timeout=60)


def stop(process: subprocess.Popen[str]) -> float:
    """Ends a viewer; its highest resident memory in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    highest = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    psutil.Process(process.pid).send_signal(signal.SIGINT)
    process.wait(20)
    return round(highest * 1024 / 1e6, 1)


def timed(client: httpx.Client, path: Any) -> dict[str, float]:
    """Median and slowest of several answers, in ms."""
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        client.get(path()).raise_for_status()
        times.append(1000 * (time.perf_counter() - begun))
    return {"median": round(statistics.median(times), 1), "slowest": round(max(times), 1)}


if __name__ == "__main__":
    main()
