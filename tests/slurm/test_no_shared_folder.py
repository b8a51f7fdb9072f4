"""Trainer and server in network namespaces of their own, without a common folder: images and weights by HTTP.

Needs root, for the namespaces; so it runs beside the SLURM tests.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pointillist.base.jsonl import read_jsonl
from pointillist.runs.paths import RunPaths
from tests.helpers.processes import Digits, wait_for

pytestmark = pytest.mark.integration

NAMES = ("pointillist-a", "pointillist-b")
TRAINER, SERVER = "10.213.77.1", "10.213.77.2"
PORT, ASSETS = 8123, 8124
KEY = "a word that both sides know"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def two_machines() -> Iterator[None]:
    """Two network namespaces with one cable between them."""
    first, second = NAMES
    for name in NAMES:
        _ip("netns", "add", name)
    try:
        _ip("link", "add", "pt-a", "netns", first, "type", "veth", "peer", "name", "pt-b", "netns", second)
        for name, device, address in ((first, "pt-a", TRAINER), (second, "pt-b", SERVER)):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            _ip("netns", "delete", name)


@contextmanager
def _server(run: Digits, model: Path, *extra: object) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """An inference server on the second machine, on which the test's folder is another, empty one."""
    copy = Path(shutil.copytree(model, Path("/var/tmp") / f"model-{os.getpid()}", dirs_exist_ok=True))
    command = [
        sys.executable, "-m", "pointillist", "inference", "--model.name", copy, "--output-dir", run.output_dir,
        "--seq-len", 512, "--server.host", SERVER, "--server.port", PORT,
        "--server.api_key_var", "POINTILLIST_RUN_KEY", *extra,
    ]  # fmt: skip
    script = 'mount -t tmpfs none "$0" && exec "$@"'
    log = Path("/var/tmp") / f"server-{os.getpid()}.log"
    process = subprocess.Popen(
        ["ip", "netns", "exec", NAMES[1], "unshare", "--mount", "sh", "-c", script, run.root, *map(str, command)],
        env={**os.environ, "POINTILLIST_RUN_KEY": KEY}, text=True, stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        ask = ["ip", "netns", "exec", NAMES[0], sys.executable, "-c", _ASK, f"http://{SERVER}:{PORT}/health"]
        wait_for(lambda: subprocess.run(ask, check=False, capture_output=True).returncode == 0, process)
        yield process, log
    finally:
        process.terminate()
        process.wait(600)
        shutil.rmtree(copy)


_ASK = "import sys, httpx; httpx.get(sys.argv[1]).raise_for_status()"


def _train(run: Digits) -> tuple[int, str]:
    command = [
        sys.executable, "-m", "pointillist", "rl", *run.arguments, "--num-servers", 0,
        "--orchestrator.client.base_url", f"http://{SERVER}:{PORT}",
        "--orchestrator.client.api_key_var", "POINTILLIST_RUN_KEY", "--transport.type", "zmq",
        "--multimodal.assets.serve", "true", "--multimodal.assets.host", TRAINER, "--multimodal.assets.port", ASSETS,
        "--orchestrator.max_retries", 0,
    ]  # fmt: skip
    done = subprocess.run(
        ["ip", "netns", "exec", NAMES[0], *map(str, command)],
        capture_output=True, text=True, timeout=1200, check=False,
        env={**os.environ, "COLUMNS": "200", "POINTILLIST_RUN_KEY": KEY},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def _seen_by(process: subprocess.Popen[str], path: Path) -> Callable[[str], list[Path]]:
    """Files below a folder as a process sees it."""
    return lambda pattern: list(Path(f"/proc/{process.pid}/root{path}").rglob(pattern))


@pytest.mark.usefixtures("two_machines")
def test_images_and_weights_are_fetched(digits_run: Digits, digits: tuple[Path, Path]) -> None:
    urls = ("--multimodal.assets.urls", f'["http://{TRAINER}:{ASSETS}"]')
    with _server(digits_run, digits[1], *urls) as (process, log):
        code, output = _train(digits_run)
        assert code == 0, output + log.read_text()
        there = _seen_by(process, digits_run.output_dir)
        assert there("assets/fetched/*/*.png")
        assert not there("assets/images/*")
        assert sorted(path.parent.name for path in there("model.safetensors")) == ["step_2", "step_3"]
    records = read_jsonl(RunPaths(digits_run.output_dir).metrics / "trainer.jsonl")
    assert len(records) == 3
    # The same pixels and the same weights, or these would differ.
    assert max(record["mismatch/mean_abs"] for record in records) < 1e-5


@pytest.mark.usefixtures("two_machines")
def test_without_an_endpoint_there_are_no_images(digits_run: Digits, digits: tuple[Path, Path]) -> None:
    """The control: the server really does not see the run's folder."""
    with _server(digits_run, digits[1]) as (_, log):
        code, output = _train(digits_run)
    assert code == 1
    assert "cannot be read" in output, output + log.read_text()
