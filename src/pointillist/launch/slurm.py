"""A run as a SLURM job: `submit` renders the script and hands it to sbatch, `run_node` is each node's task in it.

The script has no logic: which roles a node has, where images and logs lie, what is resumed and what the processes find
in their environment is decided here and in `launch.layout`, by the functions that a local run calls, too.
"""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import jinja2
from rich.console import Console

from pointillist.base.files import write_atomically
from pointillist.config import RLConfig, SlurmConfig, write_toml
from pointillist.errors import LaunchError
from pointillist.launch.changes import record_start, refuse_changes
from pointillist.launch.monitors import Watching
from pointillist.launch.placement import Layout, Node, address_towards, choose_ports, settle, specs, write_configs
from pointillist.launch.rendezvous import Rendezvous
from pointillist.launch.rl import (
    Interrupted,
    Signals,
    begin,
    check_model,
    environment,
    in_a_hurry,
    interruptible,
    keep_lock,
    run_on_one_node,
    show_death,
    where_it_goes_on,
)
from pointillist.launch.run_dir import make_fresh, resume_step
from pointillist.launch.summary import summarize
from pointillist.launch.supervisor import Supervisor
from pointillist.runs.lock import Job, RunLock, refuse_if_held
from pointillist.runs.paths import RunPaths

_TEMPLATE: Final = Path(__file__).parent / "templates" / "rl.sbatch.j2"
_SCRIPT: Final = "rl.sbatch"
_KEY_FILE: Final = ".run_key"
"""What the job's processes know each other by."""
_ENVIRONMENT_FILE: Final = ".run_env"
"""Values of `env_vars`, which no config holds."""
_JOB_FILE: Final = ".job"
"""Number of the job that was submitted last."""
_WAITING: Final = "PENDING,CONFIGURING,RUNNING,SUSPENDED,REQUEUED,REQUEUE_HOLD"
"""States of a job that has the folder, or will have it."""


def render(slurm: SlurmConfig, paths: RunPaths) -> str:
    """The job's script.

    Raises:
        LaunchError: A template of the user's that can not be read or rendered.
    """
    template = slurm.template or _TEMPLATE
    try:
        environ = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - no HTML
        return environ.from_string(template.read_text(encoding="utf-8")).render(
            slurm={**slurm.model_dump(), "num_nodes": slurm.num_nodes},
            logs=shlex.quote(str(paths.logs)),
            python=shlex.quote(sys.executable),
            config=shlex.quote(str(paths.configs / "rl.toml")),
        )
    except (OSError, jinja2.TemplateError) as error:
        raise LaunchError(f"slurm.template {template} can not be rendered ({error})") from None


def submit(config: RLConfig, paths: RunPaths, console: Console) -> int:
    """Writes the run's config and the job's script, and submits it; with `dry_run` only shows the script.

    Raises:
        ConfigError: The model can not be had.
        LaunchError: The folder holds another run, or sbatch refused the job.
    """
    slurm = config.slurm
    assert slurm is not None  # noqa: S101 - the caller's condition
    script = render(slurm, paths)
    if config.dry_run:
        console.print(script, markup=False, highlight=False, soft_wrap=True, end="")
        return 0
    check_model(config)
    refuse_if_held(paths.output_dir)
    _refuse_waiting_job(paths.output_dir / _JOB_FILE)
    if config.resume:
        refuse_changes(config, paths, resume_step(paths))
    else:
        make_fresh(paths, console.print)
    write_toml(config, paths.configs / "rl.toml")
    paths.logs.mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    _write_secrets(paths.output_dir, config.env_vars)
    write_atomically(paths.output_dir / _SCRIPT, script.encode(), private=True)  # pre_run may hold secrets
    job = _sbatch(paths.output_dir / _SCRIPT)
    write_atomically(paths.output_dir / _JOB_FILE, job.encode())
    console.print(f"submitted job {job}; logs are in {paths.logs}", highlight=False, soft_wrap=True)
    return 0


def run_node(config: RLConfig, console: Console) -> int:
    """One node's task: meets the others, starts this node's processes, and watches them until the run is over.

    Raises:
        LaunchError: Not in a SLURM job, or the nodes did not find each other.
    """
    paths = RunPaths(config.output_dir)
    config.env_vars = _read_environment(paths.output_dir / _ENVIRONMENT_FILE)
    environ = environment(config, _read_key(paths.output_dir / _KEY_FILE))
    layout = Layout(config)
    index = int(_variable("SLURM_NODEID"))
    # A job that was requeued continues its run; one that is submitted with --resume does, too.
    config.resume = config.resume or _restart_count() > 0
    if layout.num_nodes == 1:
        return run_on_one_node(config, paths, environ, _job())
    start = f"{_variable('SLURM_JOB_ID')}.{_restart_count()}"
    assert config.slurm is not None  # noqa: S101 - several nodes
    meeting = Rendezvous(paths.output_dir / "nodes" / start, layout.num_nodes, config.slurm.startup_timeout)
    node = choose_ports(config, layout, index, address_towards(_variable("SLURM_LAUNCH_NODE_IPADDR")))
    meeting.join(node)
    nodes = meeting.nodes()
    settle(config, layout, nodes)
    with ExitStack() as stack, interruptible() as signals:
        lock = None
        try:
            if index == layout.head:
                lock = stack.enter_context(RunLock.take(paths.output_dir, job=_job(), say=console.print))
                begin(config, paths, signals, is_job=True)
                write_configs(config, layout, nodes, paths)
                record_start(config, paths)
                meeting.announce(config.orchestrator.resume_step or 0)
            else:
                meeting.wait_for_go()
        except Interrupted as interrupt:
            name = signal.Signals(interrupt.number).name
            console.print(f"node {index} stopped by {name} before anything was started", soft_wrap=True)
            return 128 + interrupt.number
        return _watch(config, layout, nodes, index, paths, environ, meeting, console, lock, signals)


def _job() -> Job:
    """This start of the batch job."""
    return Job(_variable("SLURM_JOB_ID"), _restart_count())


def _watch(
    config: RLConfig,
    layout: Layout,
    nodes: list[Node],
    index: int,
    paths: RunPaths,
    environ: Mapping[str, str],
    meeting: Rendezvous,
    console: Console,
    lock: RunLock | None,
    signals: Signals,
) -> int:
    supervisor = Supervisor(specs(config, layout, nodes, index, paths, environ), config.supervision, console.print)
    serves_only = index not in layout.training
    watching = Watching.of(config, paths, console.print)
    hurry = partial(in_a_hurry, signals, lock)
    try:
        supervisor.start()
        if index == layout.head:
            watching.start()
        dead = supervisor.run(lambda: not serves_only or meeting.is_finished(), partial(keep_lock, lock))
    except Interrupted as interrupt:
        supervisor.stop(hurry)
        name = signal.Signals(interrupt.number).name
        console.print(f"node {index} stopped by {name}; {where_it_goes_on(paths)}", soft_wrap=True)
        return 128 + interrupt.number
    finally:
        supervisor.stop(hurry)
        watching.stop()
    if dead is not None:
        show_death(dead)
        _requeue(config, console)
        return 1
    if index == layout.head:
        meeting.finish()
        summarize(config, paths, console, restarts=supervisor.restarts(), resumes=_restart_count())
    return 0


def _requeue(config: RLConfig, console: Console) -> None:
    """Puts the job back into the queue, as often as the config allows: it goes on from its last checkpoint."""
    if _restart_count() < config.supervision.max_resumes:
        job = _variable("SLURM_JOB_ID")
        console.print(f"requeueing job {job} ({_restart_count() + 1} of {config.supervision.max_resumes}, max_resumes)")
        subprocess.run(["scontrol", "requeue", job], check=False)  # noqa: S607 - SLURM's own, from PATH


def _restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _sbatch(script: Path) -> str:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],  # noqa: S607 - SLURM's own, from PATH
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError("sbatch is not installed here; --dry-run shows the script") from None
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused {script}: {done.stderr.strip()}")
    return re.split(r"[;\s]", done.stdout.strip())[0]


def _refuse_waiting_job(path: Path) -> None:
    """Makes sure that no other job waits for its turn in the run's folder: it holds no lock yet.

    Raises:
        LaunchError: One does.
    """
    if not path.is_file():
        return
    job = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%T", f"--states={_WAITING}", f"--jobs={job}"],  # noqa: S607 - from PATH
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return  # sbatch is not here either, and says so
    if done.returncode == 0 and (state := done.stdout.strip()):  # a job that SLURM has forgotten is an error
        raise LaunchError(
            f"output_dir {path.parent} belongs to job {job}, which is {state}: cancel it (scancel {job}), or choose "
            "another output_dir"
        )


def _write_secrets(folder: Path, env_vars: Mapping[str, str]) -> None:
    """What the job's processes must know and no config may hold, readable for this user only."""
    if not (folder / _KEY_FILE).exists():
        write_atomically(folder / _KEY_FILE, secrets.token_hex(16).encode(), private=True)
    write_atomically(folder / _ENVIRONMENT_FILE, json.dumps(dict(env_vars)).encode(), private=True)


def _read_environment(path: Path) -> dict[str, str]:
    try:
        values: dict[str, str] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path} cannot be read ({error}): submit runs with `pointillist rl`") from None
    return values


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise LaunchError(f"{path} can not be read ({error.strerror}): submit runs with `pointillist rl`") from None


def _variable(name: str) -> str:
    if name not in os.environ:
        raise LaunchError(f"{name} is not set: `pointillist slurm-node` runs in a job that `pointillist rl` submits")
    return os.environ[name]
