"""Real processes: a server as a user starts it, and whole runs."""

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pointillist.families import load_family
from pointillist.render import FolderTokenizer, RawRenderer
from tests.helpers.processes import BACKEND, RunningServer, digits_run, free_port, pointillist, wait_for

__all__ = ["digits_run", "server"]


@pytest.fixture(scope="session")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    output_dir, port = tmp_path_factory.mktemp("server"), free_port()
    process = pointillist(
        "inference", "--backend", BACKEND, "--model.name", model_dir, "--output-dir", output_dir, "--server.port", port,
        "--seq-len", 512, stdout=(output_dir / "server.log").open("w"),  # a pipe that nobody reads would fill
    )  # fmt: skip
    family = load_family(str(model_dir))
    renderer = RawRenderer(family, FolderTokenizer(model_dir))
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 200, process, seconds=300)
    yield RunningServer(url, output_dir, family, renderer, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) in (0, -signal.SIGTERM)
