"""The processes under attack, started as a user starts them, each with its honest prober."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from pointillist.config import EnvConfig, OrchestratorConfig, WorkersConfig
from pointillist.config.orchestrator import ClientConfig
from pointillist.config.shared import ModelConfig
from pointillist.runs.config_files import load_toml, write_toml
from tests.helpers.files import ROOT
from tests.helpers.made_run import MadeRun
from tests.helpers.processes import free_port
from tests.hostile import prober
from tests.hostile.gateway_inputs import GOOD
from tests.hostile.generate_inputs import GENERATE, Prompts
from tests.hostile.odd import write
from tests.hostile.wire import SESSION, request

START_SECONDS: Final = 180.0
SEQ_LEN: Final = 256
MOST_MEMORY: Final = 6 * 2**30
"""Resident bytes at which a process is killed, so that it does not take the machine with it."""


@dataclass(slots=True)
class Memory:
    """Resident MiB of a process while something goes on."""

    first: float = 0.0
    last: float = 0.0
    peak: float = 0.0


@dataclass
class Service:
    """A process, its honest client, and what they said."""

    name: str
    command: list[str]
    folder: Path
    port: int
    probe: dict[str, Any] | None = None
    """What the prober is told; None: the process is its own honest client."""
    ready_word: bool = False
    """Whether it says `ready`; else it answers `/health`."""
    hidden: Path | None = None
    """A folder that is not there while it starts: a server that starts loads the newest weights, and these are none."""
    needs: "list[Service]" = field(default_factory=list)
    """Services that it asks."""
    process: subprocess.Popen[bytes] | None = None
    memory: Memory = field(default_factory=Memory)
    _prober: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """Its output."""
        return self.folder / f"{self.name}.log"

    @property
    def notes(self) -> Path:
        """Lines of its honest client."""
        return self.folder / f"{self.name}.probes.jsonl"

    def start(self) -> None:
        """Starts it and its honest client.

        Raises:
            RuntimeError: It does not become ready.
        """
        before = self.log.stat().st_size if self.log.exists() else 0
        with self._hiding():
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
                )
            self._await_ready(before)
        self.memory.first = self.memory.last = self.resident()
        threading.Thread(target=self._watch_memory, args=(self.process,), daemon=True).start()
        if self.probe is not None:
            # A rank that begins anew asks for the first step of a sender that does, too.
            given = {**self.probe, "port": self.port}
            self._prober = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.prober", str(self.notes), json.dumps(given)],
                stdin=subprocess.DEVNULL, cwd=ROOT,
            )  # fmt: skip

    def stop(self) -> int | None:
        """Ends it, whatever its state; returns the code it had ended with by itself."""
        code = self.process.poll() if self.process is not None else None
        for process in (self._prober, self.process):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL) if process is self.process else process.kill()
                process.wait()
        self._prober = None
        return code

    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def last_words(self) -> str:
        """The last lines of its output that say something."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return " | ".join([line.strip() for line in lines if line.strip()][-3:])[-500:]

    def silence(self) -> float:
        """Seconds for which its honest client has been waiting."""
        return self.probes(time.time() - 3600)[1]

    def resident(self) -> float:
        """MiB."""
        try:
            return psutil.Process(self.process.pid).memory_info().rss / 2**20 if self.process else 0.0
        except psutil.Error:
            return 0.0

    def probes(self, since: float) -> tuple[list[dict[str, Any]], float]:
        """The honest client's answers since a time, and for how many seconds it has been waiting now (0: it is not)."""
        done, begun = [], 0.0
        for line in self.notes.read_text().splitlines() if self.notes.exists() else []:
            note = json.loads(line)
            begun = note["at"] if note["what"] == "begun" else 0.0
            if note["what"] == "done" and note["at"] >= since:
                done.append(note)
        return done, time.time() - max(begun, since) if begun else 0.0

    @contextlib.contextmanager
    def _hiding(self) -> Iterator[None]:
        away = self.hidden.with_name(f"{self.hidden.name}.away") if self.hidden is not None else None
        if self.hidden is not None and self.hidden.exists() and away is not None:
            self.hidden.rename(away)
        yield
        if self.hidden is not None and away is not None and away.exists():
            away.rename(self.hidden)

    def _await_ready(self, before: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready(before):
            if not self.alive() or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not start: {self.last_words()}")
            time.sleep(0.05)

    def _is_ready(self, before: int) -> bool:
        if self.ready_word:
            return b"ready" in self.log.read_bytes()[before:]
        try:
            status, _ = prober.exchange(self.port, request("GET", "/health", headers={"Connection": "close"}), 5.0)
        except (OSError, prober.http.client.HTTPException):
            return False
        return status < 500

    def _watch_memory(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            resident = self.resident()
            self.memory.last = resident or self.memory.last
            self.memory.peak = max(self.memory.peak, resident)
            if resident * 2**20 > MOST_MEMORY:
                process.kill()
            time.sleep(0.1)


class Services:
    """All of them, started when they are first asked for."""

    def __init__(self, root: Path, model: Path, data: Path) -> None:
        """Prepares folders; nothing is started.

        Args:
            root: A new folder for everything.
            model: Model folder.
            data: Folder of the digits data.
        """
        self.root, self.model, self.data = root, model, data
        root.mkdir(parents=True, exist_ok=True)
        self.prompts = Prompts(model, root / "serving")
        self.run = MadeRun(root / "made")
        self._all: dict[str, Service] = {}

    def get(self, name: str) -> Service:
        """A service, running."""
        if name not in self._all:
            self._all[name] = getattr(self, f"_{name}")()
        service = self._all[name]
        for each in (*service.needs, service):
            if not each.alive():
                each.stop()
                each.start()
        return service

    def stop(self) -> None:
        """Ends all."""
        for service in self._all.values():
            service.stop()

    def _service(self, name: str, arguments: list[Any], data: bytes, **options: Any) -> Service:
        port = options.pop("port")
        probe = {"kind": "http", "request": base64.b64encode(data).decode(), **options}
        command = [sys.executable, "-m", "pointillist", *map(str, arguments)]
        return Service(name, command, self.root, port, probe)

    def _inference(self) -> Service:
        port = free_port()
        arguments = ["inference", "--model.name", self.model, "--output-dir", self.prompts.paths.output_dir,
                     "--server.port", port, "--seq-len", SEQ_LEN]  # fmt: skip
        service = self._service("inference", arguments, request("POST", GENERATE, write(self.prompts.good)), port=port)
        service.hidden = self.prompts.paths.broadcasts
        return service

    def _gateway(self) -> Service:
        port, inference = free_port(), self.get("inference")
        arguments = [
            "gateway", "--model.name", self.model, "--output-dir", self.prompts.paths.output_dir, "--seq-len", SEQ_LEN,
            "--client.base_url", f"http://127.0.0.1:{inference.port}", "--gateway.port", port, "--sampling.max_tokens",
            8,
            "--client.timeout", 60, "--client.unreachable_timeout", 60,
        ]  # fmt: skip
        good = request("POST", f"/s/{SESSION}/v1/chat/completions", write(GOOD["chat"][1]))
        service = self._service("gateway", arguments, good, port=port, session=SESSION)
        service.needs = [inference]
        return service

    def _viewer(self) -> Service:
        port = free_port()
        arguments = ["view", self.run.paths.output_dir, "--port", port]
        service = self._service("viewer", arguments, request("GET", "/runs/0/rollout?id=2.0.0"), port=port)
        service.command = ["env", f"XDG_CACHE_HOME={self.root / 'cache'}", *service.command]
        return service

    def _assets(self) -> Service:
        port = free_port()
        arguments = ["assets", "--output-dir", self.run.paths.output_dir, "--multimodal.assets.port", port]
        name = self.run.images[0].uri.rpartition("/")[2]
        key = {"Authorization": f"Bearer {os.environ['POINTILLIST_RUN_KEY']}"}
        return self._service("assets", arguments, request("GET", f"/images/{name[:2]}/{name}", None, key), port=port)

    def _transport(self) -> Service:
        port = free_port()
        address = f"tcp://127.0.0.1:{port}"
        command = [sys.executable, "-m", "tests.hostile.batch_sender", address]
        return Service(
            "transport", command, self.root, port, {"kind": "rank", "address": address, "step": 1}, ready_word=True
        )

    def _workers(self) -> Service:
        config = OrchestratorConfig(
            model=ModelConfig(name=str(self.model)),
            env=EnvConfig(id="digits", args={"data_dir": str(self.data)}),
            output_dir=self.prompts.paths.output_dir,
            seq_len=SEQ_LEN,
            client=ClientConfig(base_url=[f"http://127.0.0.1:{self.get('inference').port}"]),
            workers=WorkersConfig(count=1),
        )
        path = self.root / "pool.toml"
        write_toml(config, path)
        notes = self.root / "workers.probes.jsonl"
        command = [sys.executable, "-m", "tests.hostile.rollout_pool", str(notes), str(path)]
        return Service("workers", command, self.root, 0, ready_word=True, needs=[self.get("inference")])

    def pool_address(self) -> str:
        """Where the pool of environment workers listens now."""
        from pointillist.config import EnvWorkerConfig

        return load_toml(EnvWorkerConfig, self.prompts.paths.configs / "env_worker.toml").address

    def pool_key(self) -> str:
        """What the workers of the pool are told to identify themselves with."""
        from pointillist.environments.workers.protocol import KEY_VARIABLE

        config = str(self.prompts.paths.configs / "env_worker.toml")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if config in process.cmdline():
                    return process.environ().get(KEY_VARIABLE, "x")
        return "x"
