"""Real processes: a server as a user starts it, and whole runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pointillist.base import net
from pointillist.families import Family
from pointillist.images import ImageLimits, ImageStore, Sources
from pointillist.render import RawRenderer

# The same tests hold for both servers; `make test-vllm` sets this in an environment that has vLLM.
BACKEND = os.environ.get("POINTILLIST_TEST_BACKEND", "embedded")


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    return net.free_port("127.0.0.1")


def pointillist(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Starts a `pointillist` command."""
    command = [sys.executable, "-m", "pointillist", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(command, text=True, **pipes)


@dataclass
class RunningServer:
    """An inference server of its own process, and what its clients need."""

    url: str
    output_dir: Path
    family: Family
    renderer: RawRenderer
    process: subprocess.Popen[str]

    @property
    def store(self) -> ImageStore:
        return ImageStore(self.output_dir / "assets" / "images", ImageLimits())

    @property
    def sources(self) -> Sources:
        return Sources(self.store)


def wait_for(ready: object, process: subprocess.Popen[str] | None = None, seconds: float = 900.0) -> None:
    """Waits until something is true; a refused connection means not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except httpx.HTTPError:
            pass
        if process is not None and process.poll() is not None:
            said = process.stdout.read() if process.stdout else "see its server.log"
            pytest.fail(f"process ended with {process.returncode}: {said}")
        time.sleep(0.05)
    pytest.fail(f"not ready after {seconds} s")


@dataclass
class Digits:
    """A digits run in a folder of its own."""

    root: Path
    arguments: list[str]

    @property
    def output_dir(self) -> Path:
        return self.root / "run"

    def start(self, *overrides: object, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return pointillist(
            "rl",
            *self.arguments,
            *overrides,
            start_new_session=True,
            # Whoever runs the tests below nohup ignores it, and a launcher leaves it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            env={**os.environ, "COLUMNS": "200", **(environ or {})},
        )

    def run(self, *overrides: object, environ: dict[str, str] | None = None) -> tuple[int, str]:
        process = self.start(*overrides, environ=environ)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output


@pytest.fixture
def digits_run(digits: tuple[Path, Path], tmp_path: Path) -> Iterator[Digits]:
    """The digits example made small: seconds instead of minutes."""
    data, model = digits
    data = Path(shutil.copytree(data, tmp_path / "data"))
    (data / "heldout.jsonl").write_text("\n".join((data / "heldout.jsonl").read_text().splitlines()[:20]) + "\n")
    arguments = [
        "@", "examples/digits/rl.toml", "--model.name", model, "--output-dir", tmp_path / "run",
        "--env.args.data_dir", data,
        "--orchestrator.batch_size", 32, "--orchestrator.group_size", 8, "--max-steps", 3,
        # A rate at which so small a batch does not ruin the policy, however many steps a fast machine does meanwhile.
        "--trainer.optim.lr", 5e-5, "--trainer.optim.scheduler.warmup_steps", 0,
        "--trainer.optim.scheduler.decay_steps", 1,
        "--trainer.num_threads", 1, "--inference.engine.num_threads", 1,
    ]  # fmt: skip
    yield Digits(tmp_path, [str(argument) for argument in arguments])
    kill_leftovers(tmp_path)


def processes_of(root: Path) -> dict[str, int]:
    """Pids of the run's processes, by component, found by their config file."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        for argument in command:
            match = re.fullmatch(rf"{re.escape(str(root))}/run/configs/(\w+)\.toml", argument)
            if match:
                found[match[1]] = int(entry.name)
    return found


def kill_leftovers(root: Path) -> None:
    for pid in processes_of(root).values():
        os.kill(pid, signal.SIGKILL)
