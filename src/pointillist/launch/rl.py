"""`pointillist rl`: servers, trainer and orchestrator as processes of this machine, watched until the end.

A server that dies or hangs is restarted within the run. If trainer or orchestrator die, the run is taken back to its
last checkpoint as often as `supervision.max_resumes` says; after that, everything is stopped, the cause and the end of
its log are shown, and the exit code is not 0. With `[slurm]` all this happens in a job; see `launch.slurm`.
"""

import os
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from pointillist.config import CARRIER, RUN_KEY, RLConfig, RunPaths, resolve_image_dir
from pointillist.families import load_family, resolve_model_dir
from pointillist.launch.layout import (
    Layout,
    Node,
    check_keys,
    choose_ports,
    image_dir_everywhere,
    settle,
    specs,
    write_configs,
)
from pointillist.launch.metrics import MetricsEndpoint
from pointillist.launch.monitors import Watching, check_monitors
from pointillist.launch.processes import Child
from pointillist.launch.progress import Progress
from pointillist.launch.run_dir import check_fresh, resume_step, rewind
from pointillist.launch.summary import summarize
from pointillist.launch.supervisor import Supervisor
from pointillist.render import FolderTokenizer

_LOG_LINES: Final = 15
_WORK: Final = ("trainer", "orchestrator")

console = Console()


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        self.number = number


def run_rl(config: RLConfig) -> int:
    """Runs to the end, or submits the job that will.

    Returns:
        Exit code: 0, 1 if a process died, 128 + signal if the launcher was told to stop.

    Raises:
        ConfigError: The config can not work.
        LaunchError: The run can not start.
    """
    paths = prepare(config)
    if config.slurm is not None:
        from pointillist.launch.slurm import submit

        return submit(config, paths, console)
    return run_on_one_node(config, paths, environment(config, secrets.token_hex(16)))


def run_on_one_node(config: RLConfig, paths: RunPaths, environ: Mapping[str, str]) -> int:
    """Runs everything on this machine; returns the exit code.

    Raises:
        ConfigError: The model can not be had.
        LaunchError: The run can not start.
    """
    layout = Layout(config)
    if not config.dry_run:
        check_model(config)
    if config.resume and not config.dry_run:
        go_back(config, paths, resume_step(paths))
    elif config.slurm is None:  # a job's folder was checked when it was submitted
        check_fresh(paths)
    nodes = [choose_ports(config, layout, 0, "127.0.0.1")]
    settle(config, layout, nodes)
    write_configs(config, layout, nodes, paths)
    if config.dry_run:
        console.print(f"config is valid; resolved configs are in {paths.configs}")
        return 0
    with signals_as_exceptions():
        return _supervise(config, layout, nodes, paths, environ)


def prepare(config: RLConfig) -> RunPaths:
    """Resolves the run's folder and image folder, once and for everybody.

    Raises:
        ConfigError: The image folder names a variable that is not set, a key is not set, or a monitor is not
            installed.
    """
    paths = RunPaths(config.output_dir.expanduser().resolve())
    config.output_dir = paths.output_dir
    check_keys(config)
    check_monitors(config.monitors)
    image_dir = resolve_image_dir(config.multimodal, paths.output_dir, {**os.environ, **config.env_vars})
    before = os.environ.get(CARRIER)
    if before is not None and before != str(image_dir):
        _say(
            f"[yellow]warning:[/] {CARRIER} was {before} in the environment; this run uses {image_dir} "
            "(set multimodal.offload_dir to choose)"
        )
    image_dir_everywhere(config, image_dir)
    return paths


def check_model(config: RLConfig) -> None:
    """Everything about the model that can be known without loading it; a local folder becomes an absolute path.

    Raises:
        ConfigError: There is no such model, or no family serves it.
    """
    load_family(config.model.name)
    folder = resolve_model_dir(config.model.name)
    FolderTokenizer(folder)
    if Path(config.model.name).expanduser().is_dir():
        for component in (config, config.inference, config.orchestrator, config.trainer):
            component.model.name = str(folder)


def go_back(config: RLConfig, paths: RunPaths, step: int) -> None:
    """Takes the run's folder and its processes' configs back to a step."""
    rewind(paths, step)
    config.trainer.resume_step = config.orchestrator.resume_step = step or None
    console.print(f"resuming after step {step}")


def environment(config: RLConfig, run_key: str) -> dict[str, str]:
    """Environment of all processes; the image folder is the launcher's word, whatever was there before."""
    return {
        # Threads of torch's operators wait for each other by spinning. By default they spin for milliseconds, which is
        # ruinous where anything else wants the core (measured on two cores: 18 s instead of 0.7; so, 2 s).
        "GOMP_SPINCOUNT": "5000",
        **os.environ,
        **config.env_vars,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        CARRIER: str(config.multimodal.offload_dir),
        RUN_KEY: os.environ.get(RUN_KEY, run_key),
    }


def _supervise(
    config: RLConfig, layout: Layout, nodes: Sequence[Node], paths: RunPaths, environ: Mapping[str, str]
) -> int:
    """Runs everything on this machine, as a whole; returns the exit code."""
    supervisor = Supervisor(specs(config, layout, nodes, 0, paths, environ), config.supervision, _say)
    progress = Progress(console, paths, config.max_steps)
    resumes = 0
    endpoint = MetricsEndpoint(config.metrics, paths, supervisor, server_headers(config, environ))
    watching = Watching.of(config, paths, _say)
    try:
        supervisor.start()
        endpoint.start()
        watching.start()
        _say(f"metrics of all processes: {endpoint.url}")
        with progress:
            while (dead := supervisor.run(lambda: True, progress.update)) is not None:
                if dead.name not in _WORK or resumes == config.supervision.max_resumes:
                    break
                resumes += 1
                _say(f"{dead.cause()}; going back ({resumes} of {config.supervision.max_resumes}, max_resumes)")
                supervisor.end(_WORK)
                go_back(config, paths, resume_step(paths))
                write_configs(config, layout, nodes, paths)
                supervisor.start_again(_WORK)
    except Interrupted as interrupt:
        supervisor.stop()
        console.print(f"stopped by {signal.Signals(interrupt.number).name}; continue with --resume")
        return 128 + interrupt.number
    finally:
        supervisor.stop()
        endpoint.stop()
        watching.stop()
    if dead is not None:
        show_death(dead)
        return 1
    summarize(config, paths, console, restarts=supervisor.restarts(), resumes=resumes)
    return 0


def server_headers(config: RLConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """With which the inference servers are asked."""
    variable = config.inference.server.api_key_var
    return {"Authorization": f"Bearer {environ[variable]}"} if variable else {}


def show_death(child: Child) -> None:
    """Says what ended the run, and the end of its log."""
    _say(f"[bold red]run failed:[/] {child.cause()}; all other processes were stopped")
    _say(f"last lines of {child.log}:")
    for line in child.last_lines(_LOG_LINES):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Inside it, SIGINT and SIGTERM raise `Interrupted`."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
