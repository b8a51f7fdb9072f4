"""`pointillist rl`: inference server, trainer and orchestrator as local processes, watched until the end.

If one of them dies the others are stopped, its cause and the end of its log are shown, and the exit code is not 0.
"""

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from pointillist.config import CARRIER, RLConfig, RunPaths, resolve_image_dir, write_toml
from pointillist.errors import LaunchError
from pointillist.families import load_family, resolve_model_dir
from pointillist.launch.processes import Child, start, stop_all
from pointillist.launch.progress import Progress
from pointillist.launch.run_dir import check_fresh, prepare_resume
from pointillist.launch.summary import summarize
from pointillist.render import FolderTokenizer
from pointillist.rollouts.client import api_key
from pointillist.transport.zmq import TOKEN_VARIABLE

_POLL_SECONDS: Final = 0.1
_LOG_LINES: Final = 15

console = Console()


class _Interrupted(Exception):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        self.number = number


def run_rl(config: RLConfig) -> int:
    """Runs to the end.

    Returns:
        Exit code: 0, 1 if a process died, 128 + signal if the launcher was told to stop.

    Raises:
        ConfigError: The config can not work.
        LaunchError: The run can not start.
    """
    paths = RunPaths(config.output_dir.expanduser().resolve())
    config.output_dir = paths.output_dir
    if config.dry_run:
        check_fresh(paths)
        write_configs(config, paths)
        console.print(f"config is valid; resolved configs are in {paths.configs}")
        return 0
    _check_model(config)
    if config.resume:
        resume_step = prepare_resume(paths)
        config.trainer.resume_step = config.orchestrator.resume_step = resume_step
        console.print(f"resuming after step {resume_step}")
    else:
        check_fresh(paths)
    _settle_addresses(config)
    _settle_transport(config)
    write_configs(config, paths)
    with _signals_as_exceptions():
        return _supervise(config, paths, _environment(config))


def write_configs(config: RLConfig, paths: RunPaths) -> None:
    """Writes the run's config and that of each component."""
    for component in (config.inference, config.orchestrator, config.trainer):
        component.output_dir = paths.output_dir
    write_toml(config, paths.configs / "rl.toml")
    write_toml(config.inference, paths.configs / "inference.toml")
    write_toml(config.orchestrator, paths.configs / "orchestrator.toml")
    write_toml(config.trainer, paths.configs / "trainer.toml")


def _supervise(config: RLConfig, paths: RunPaths, environ: Mapping[str, str]) -> int:
    children: list[Child] = []
    progress = Progress(console, paths, config.max_steps)
    try:
        children += [_start(name, config, paths, environ) for name in ("inference", "trainer", "orchestrator")]
        with progress:
            dead = _wait_for_end(children, progress)
    except _Interrupted as interrupt:
        stop_all(children)
        console.print(f"stopped by {signal.Signals(interrupt.number).name}; continue with --resume")
        return 128 + interrupt.number
    finally:
        stop_all(children)
    if dead is not None:
        _show_death(dead)
        return 1
    summarize(config, paths, console)
    return 0


def _start(name: str, config: RLConfig, paths: RunPaths, environ: Mapping[str, str]) -> Child:
    command = [sys.executable, "-m"]
    if name == "trainer" and config.trainer.num_workers > 1:
        command += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={config.trainer.num_workers}",
            "-m",
        ]
    command += ["pointillist", name, "@", str(paths.configs / f"{name}.toml")]
    return start(name, command, environ, paths.logs / f"{name}.log")


def _wait_for_end(children: list[Child], progress: Progress) -> Child | None:
    """Watches until orchestrator and trainer are done; returns whoever died before that."""
    while True:
        progress.update()
        for child in children:
            code = child.exit_code
            if code not in (None, 0) or (code == 0 and child.name == "inference"):
                return child
        if all(child.exit_code == 0 for child in children if child.name != "inference"):
            return None
        time.sleep(_POLL_SECONDS)


def _show_death(child: Child) -> None:
    console.print(
        f"[bold red]run failed:[/] {child.cause()}; all other processes were stopped", highlight=False, soft_wrap=True
    )
    console.print(f"last lines of {child.log}:", highlight=False, soft_wrap=True)
    for line in child.last_lines(_LOG_LINES):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _check_model(config: RLConfig) -> None:
    """Everything about the model that can be known without loading it; a local folder becomes an absolute path."""
    load_family(config.model.name)
    folder = resolve_model_dir(config.model.name)
    FolderTokenizer(folder)
    if Path(config.model.name).expanduser().is_dir():
        for component in (config, config.inference, config.orchestrator, config.trainer):
            component.model.name = str(folder)


def _settle_addresses(config: RLConfig) -> None:
    """Decides the server's port, and tells the orchestrator."""
    server = config.inference.server
    if server.api_key_var is not None:
        api_key(server.api_key_var)
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError as error:
            raise LaunchError(
                f"inference.server can not listen on {server.host}:{server.port} ({error.strerror}); choose another "
                "inference.server.port, or 0 for a free one"
            ) from None
        server.port = probe.getsockname()[1]
    client = config.orchestrator.client
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host  # noqa: S104 - asks, does not bind
    client.base_url = f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
    client.api_key_var = server.api_key_var


def _settle_transport(config: RLConfig) -> None:
    """Decides the port of the transport; both ends are told."""
    host, _, port = config.orchestrator.transport.address.rpartition(":")
    if config.orchestrator.transport.type == "zmq" and port == "0":
        with socket.socket() as probe:
            probe.bind((host.removeprefix("tcp://"), 0))
            address = f"{host}:{probe.getsockname()[1]}"
        config.orchestrator.transport.address = config.trainer.transport.address = address


def _environment(config: RLConfig) -> dict[str, str]:
    """Environment of all processes; the image folder is the launcher's word, whatever was there before."""
    environ = {**os.environ, **config.env_vars, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    image_dir = str(resolve_image_dir(config.multimodal, config.output_dir, environ))
    before = os.environ.get(CARRIER)
    if before is not None and before != image_dir:
        console.print(
            f"[yellow]warning:[/] {CARRIER} was {before} in the environment; this run uses {image_dir} "
            "(set multimodal.offload_dir to choose)",
            highlight=False,
            soft_wrap=True,
        )
    environ[CARRIER] = image_dir
    environ[TOKEN_VARIABLE] = secrets.token_hex(16)
    return environ


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    def interrupt(number: int, _: FrameType | None) -> None:
        raise _Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
