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
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from pointillist.base.logs import plain
from pointillist.config import RUN_KEY, RLConfig
from pointillist.config.rl import NOT_RECORDED
from pointillist.config.shared import CARRIER
from pointillist.errors import ConfigError, LaunchError, PointillistError
from pointillist.families import load_family, resolve_model_dir
from pointillist.launch.changes import record_start, refuse_changes
from pointillist.launch.metrics import MetricsEndpoint
from pointillist.launch.monitors import Watching, check_monitors
from pointillist.launch.placement import (
    Layout,
    Node,
    check_keys,
    choose_ports,
    image_dir_everywhere,
    settle,
    specs,
    write_configs,
)
from pointillist.launch.processes import Child
from pointillist.launch.progress import ProgressLine
from pointillist.launch.run_dir import check_fresh, make_fresh, resume_step, rewind, wait_for_survivors
from pointillist.launch.summary import summarize
from pointillist.launch.supervisor import Supervisor
from pointillist.render import FolderTokenizer
from pointillist.runs.image_dir import resolve_image_dir
from pointillist.runs.lock import Job, RunLock, refuse_if_held
from pointillist.runs.paths import RunPaths

_LOG_LINES: Final = 15
_WORK: Final = ("trainer", "orchestrator")

console = Console()


class Interrupted(PointillistError):
    """SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} came")
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


def run_on_one_node(config: RLConfig, paths: RunPaths, environ: Mapping[str, str], job: Job | None = None) -> int:
    """Runs everything on this machine; returns the exit code.

    Args:
        config: Of the run.
        paths: Its folder.
        environ: Environment of all processes.
        job: The batch job that this is a start of.

    Raises:
        ConfigError: The model can not be had, or `resume` with a config that means another run.
        LaunchError: The run can not start, or another launcher has the folder.
    """
    layout = Layout(config)
    if config.dry_run:
        return _dry_run(config, layout, paths)
    check_model(config)
    with RunLock.take(paths.output_dir, job=job, say=_say) as lock, interruptible() as signals:
        try:
            begin(config, paths, signals, is_job=job is not None)
            nodes = _settled(config, layout, paths)
            record_start(config, paths)
        except Interrupted as interrupt:
            _say(f"stopped by {signal.Signals(interrupt.number).name} before anything was started")
            return 128 + interrupt.number
        return _supervise(config, layout, nodes, paths, environ, lock, signals)


def begin(config: RLConfig, paths: RunPaths, signals: "Signals", *, is_job: bool) -> None:
    """Makes the run's folder ready, whose lock this process holds: takes it back to a step, or sees that it is free.

    Args:
        config: Of the run.
        paths: Its folder.
        signals: Of the launcher.
        is_job: Whether this is a job, whose folder was prepared when it was submitted.

    Raises:
        ConfigError: `resume` with a config that means another run.
        LaunchError: There is nothing to resume, or the folder holds another run.
    """
    wait_for_survivors(paths, config.supervision.stop_grace, _say, signals.hurry)
    if config.resume:
        step = resume_step(paths)
        refuse_changes(config, paths, step)
        go_back(config, paths, step)
    elif is_job:
        check_fresh(paths)  # another job may have run in it meanwhile
    else:
        make_fresh(paths, _say)


def _dry_run(config: RLConfig, layout: Layout, paths: RunPaths) -> int:
    """Says what would happen; the configs of a run that is there stay as they are."""
    refuse_if_held(paths.output_dir)
    if config.resume:
        check_model(config)
        step = resume_step(paths)
        refuse_changes(config, paths, step)
        console.print(f"config is valid; the run would be resumed after step {step}")
        return 0
    check_fresh(paths)
    _settled(config, layout, paths)
    console.print(f"config is valid; resolved configs are in {paths.configs}")
    return 0


def _settled(config: RLConfig, layout: Layout, paths: RunPaths) -> list[Node]:
    """Chooses ports, and writes the config of every process."""
    nodes = [choose_ports(config, layout, 0, "127.0.0.1")]
    settle(config, layout, nodes)
    write_configs(config, layout, nodes, paths)
    return nodes


def prepare(config: RLConfig) -> RunPaths:
    """Resolves the run's folder and image folder, once and for everybody.

    Raises:
        ConfigError: The image folder names a variable that is not set, a key is not set, or a monitor is not
            installed.
    """
    config.resume = config.resume or config.resume_with_changes
    paths = RunPaths(_run_folder(config.output_dir))
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


def _run_folder(folder: Path) -> Path:
    """The absolute folder of a run.

    Raises:
        ConfigError: A path that configs and URLs cannot hold, or one that the system does not take.
    """
    try:
        resolved = folder.expanduser().resolve()
        str(resolved).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"output_dir {os.fsencode(folder)!r} is not UTF-8, which configs and URLs need") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"output_dir {str(folder)[:200]!r} cannot be resolved ({error})") from None
    return resolved


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
    """Environment of all processes; the image folder is the launcher's word, whatever was there before.

    Raises:
        ConfigError: `env_vars` comes from a config that a run has written, which holds no values.
    """
    if missing := [name for name, value in config.env_vars.items() if value == NOT_RECORDED]:
        raise ConfigError(
            f"env_vars.{missing[0]} has no value: configs that a run writes keep names only, give it anew"
        )
    return {
        # Threads of torch's operators wait for each other by spinning. By default they spin for milliseconds, which is
        # ruinous where anything else wants the core (measured on two cores: 18 s instead of 0.7; so, 2 s).
        "GOMP_SPINCOUNT": "5000",
        **os.environ,
        **config.env_vars,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The carrier is a path and no setting: nothing in it is expanded by whoever reads it.
        CARRIER: str(resolve_image_dir(config.multimodal, config.output_dir, {})),
        RUN_KEY: os.environ.get(RUN_KEY, run_key),
    }


def _supervise(
    config: RLConfig,
    layout: Layout,
    nodes: Sequence[Node],
    paths: RunPaths,
    environ: Mapping[str, str],
    lock: RunLock,
    signals: "Signals",
) -> int:
    """Runs everything on this machine, as a whole; returns the exit code."""
    supervisor = Supervisor(specs(config, layout, nodes, 0, paths, environ), config.supervision, _say)
    progress = ProgressLine(console, paths, config.max_steps)
    resumes = 0
    endpoint = MetricsEndpoint(config.metrics, paths, supervisor, server_headers(config, environ))
    watching = Watching.of(config, paths, _say)

    def poll() -> None:
        keep_lock(lock)
        progress.update()

    hurry = partial(in_a_hurry, signals, lock)
    try:
        supervisor.start()
        endpoint.start()
        watching.start()
        _say(f"metrics of all processes: {endpoint.url}")
        with progress:
            while (dead := supervisor.run(lambda: True, poll)) is not None:
                if dead.name not in _WORK or resumes == config.supervision.max_resumes:
                    break
                resumes += 1
                _say(f"{dead.cause()}; going back ({resumes} of {config.supervision.max_resumes}, max_resumes)")
                supervisor.end(_WORK, hurry)
                go_back(config, paths, resume_step(paths))
                write_configs(config, layout, nodes, paths)
                supervisor.start_again(_WORK)
    except Interrupted as interrupt:
        _say(f"{signal.Signals(interrupt.number).name}: stopping, the trainer writes a checkpoint; again to hurry")
        supervisor.stop(hurry)
        console.print(f"stopped by {signal.Signals(interrupt.number).name}; {where_it_goes_on(paths)}", soft_wrap=True)
        return 128 + interrupt.number
    finally:
        supervisor.stop(hurry)
        endpoint.stop()
        watching.stop()
    if dead is not None:
        show_death(dead)
        return 1
    summarize(config, paths, console, restarts=supervisor.restarts(), resumes=resumes)
    return 0


def keep_lock(lock: RunLock | None) -> None:
    """Makes sure that the run's folder is still this launcher's; None where another launcher of the run holds it.

    Raises:
        LaunchError: It is not: another run must not be written into.
    """
    if lock is not None and lock.lost is not None:
        raise LaunchError(f"the run was stopped: {lock.lost}")


def in_a_hurry(signals: "Signals", lock: RunLock | None) -> bool:
    """Whether nobody waits for a checkpoint: a second signal came, or the folder is another run's now."""
    return signals.hurry() or (lock is not None and lock.lost is not None)


def where_it_goes_on(paths: RunPaths) -> str:
    """What `--resume` will do."""
    try:
        step = resume_step(paths)
    except LaunchError as error:
        return f"--resume cannot go on: {error}"
    return f"--resume goes on after step {step}" if step else "there is no checkpoint yet: --resume begins at step 1"


def server_headers(config: RLConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """With which the inference servers are asked."""
    variable = config.inference.server.api_key_var
    return {"Authorization": f"Bearer {environ[variable]}"} if variable else {}


def show_death(child: Child) -> None:
    """Says what ended the run, and the end of its log."""
    _say(f"[bold red]run failed:[/] {child.cause()}; all other processes were stopped")
    _say(f"last lines of {child.log}:")
    for line in child.last_lines(_LOG_LINES):
        console.print(f"  {plain(line)}", markup=False, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


class Signals:
    """What the terminal or the system has told the launcher."""

    def __init__(self) -> None:
        self.count = 0
        """Signals that came so far; the first raised `Interrupted`."""

    def hurry(self) -> bool:
        """Whether a second one came: whoever stops the run does not want to wait for a checkpoint."""
        return self.count > 1


@contextmanager
def interruptible() -> Iterator[Signals]:
    """Inside it the first SIGINT, SIGTERM or SIGHUP raises `Interrupted`; later ones are counted.

    SIGHUP stays ignored where it is: nohup did that, so that the run survives its terminal.
    """
    signals = Signals()

    def interrupt(number: int, _: FrameType | None) -> None:
        signals.count += 1
        if signals.count == 1:
            raise Interrupted(number)

    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handled.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
