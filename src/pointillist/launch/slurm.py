"""A run as a SLURM job: `submit` renders the script and hands it to sbatch, `run_node` is each node's task in it.

The script has no logic: which roles a node has, where images and logs lie, what is resumed and what the processes find
in their environment is decided by the functions that a run on one machine calls, too.
"""

import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import jinja2

from pointillist.base.files import write_atomically
from pointillist.config import RLConfig, SlurmConfig
from pointillist.errors import LaunchError
from pointillist.launch.changes import model_record, refuse_changes
from pointillist.launch.console import console, say
from pointillist.launch.local import run_on_one_machine
from pointillist.launch.placement import Placement, Roles, choose_ports
from pointillist.launch.prepare import begin, check_model, environment
from pointillist.launch.rendezvous import Rendezvous
from pointillist.launch.run_dir import make_fresh, newest_step
from pointillist.launch.supervise import Interrupted, Part, interruptible, supervise
from pointillist.runs.config_files import write_toml
from pointillist.runs.lock import Job, RunLock, refuse_if_held
from pointillist.runs.paths import RunPaths

_TEMPLATE: Final = Path(__file__).parent / "templates" / "rl.sbatch.j2"
_SCRIPT: Final = "rl.sbatch"
_KEY_FILE: Final = ".run_key"
"""Holds the secret that the job's processes share."""
_ENVIRONMENT_FILE: Final = ".run_env"
"""Values of `env_vars`, which no config holds."""
_JOB_FILE: Final = ".job"
"""Number of the job that was submitted last."""
_WAITING: Final = "PENDING,CONFIGURING,RUNNING,SUSPENDED,REQUEUED,REQUEUE_HOLD"
"""States of a job that has the folder, or will have it."""


def render(slurm: SlurmConfig, paths: RunPaths) -> str:
    """The job's script.

    Raises:
        LaunchError: A template of the user's that cannot be read or rendered.
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
        raise LaunchError(f"slurm.template {template} cannot be rendered ({error})") from None


def submit(config: RLConfig, slurm: SlurmConfig) -> int:
    """Writes the run's config and the job's script, and submits it; with `dry_run` only shows the script.

    Args:
        config: Config of the run, as `complete` made it.
        slurm: Its job.

    Returns:
        Exit code 0.

    Raises:
        ConfigError: The model is not there.
        LaunchError: The folder holds another run, or sbatch refused the job.
    """
    paths = RunPaths(config.output_dir)
    script = render(slurm, paths)
    if config.dry_run:
        console.print(script, markup=False, highlight=False, soft_wrap=True, end="")
        return 0
    config = check_model(config)
    refuse_if_held(paths.output_dir)
    _refuse_waiting_job(paths.output_dir / _JOB_FILE)
    if config.resume:
        refuse_changes(config, paths, newest_step(paths), model_record(config.model.name))
    else:
        make_fresh(paths, say)
    write_toml(config, paths.configs / "rl.toml")
    paths.logs.mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    _write_secrets(paths.output_dir, config.env_vars)
    write_atomically(paths.output_dir / _SCRIPT, script.encode(), private=True)  # pre_run may hold secrets
    job = _sbatch(paths.output_dir / _SCRIPT)
    write_atomically(paths.output_dir / _JOB_FILE, job.encode())
    say(f"submitted job {job}; logs are in {paths.logs}")
    return 0


def run_node(config: RLConfig) -> int:
    """One node's task: meets the others, starts this node's processes, and watches them until the run is over.

    Args:
        config: Config of the run, as `submit` wrote it.

    Returns:
        Exit code, as `supervise` has it.

    Raises:
        LaunchError: Not in a SLURM job, or the nodes did not find each other.
    """
    folder = config.output_dir
    # A job that was requeued continues its run; one that is submitted with --resume does, too.
    resume = config.resume or _restart_count() > 0
    config = config.with_values({"env_vars": _read_environment(folder / _ENVIRONMENT_FILE), "resume": resume})
    environ = environment(config, _read_key(folder / _KEY_FILE))
    num_nodes, index = Roles.of(config).num_machines, int(_variable("SLURM_NODEID"))
    if num_nodes == 1 or config.slurm is None:
        return run_on_one_machine(config, environ, _job())
    start = f"{_variable('SLURM_JOB_ID')}.{_restart_count()}"
    meeting = Rendezvous(folder / "nodes" / start, num_nodes, config.slurm.startup_timeout)
    meeting.join(choose_ports(config, index, _address_towards(_variable("SLURM_LAUNCH_NODE_IPADDR"))))
    placement = Placement.of(config, meeting.machines())
    with ExitStack() as stack, interruptible() as signals:
        lock = None
        try:
            if index == placement.roles.head:
                lock = stack.enter_context(RunLock.take(folder, job=_job(), say=say))
                placement = begin(placement, signals.hurry, is_job=True)
                meeting.announce()
            else:
                meeting.wait_for_go()
        except Interrupted as interrupt:
            say(f"node {index} stopped by {interrupt.name} before anything was started")
            return interrupt.exit_code
        part = Part(placement, index, environ, signals, lock)
        code = supervise(part, is_over=lambda: part.trains or meeting.is_finished(), resumes=_restart_count())
    if code == 0 and part.is_head:
        meeting.finish()
    if code == 1:
        _requeue(config)
    return code


def _job() -> Job:
    """This start of the batch job."""
    return Job(_variable("SLURM_JOB_ID"), _restart_count())


def _address_towards(other: str) -> str:
    """This machine's address on the way to another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def _requeue(config: RLConfig) -> None:
    """Puts the job back into the queue, as often as the config allows: it goes on from its last checkpoint."""
    if _restart_count() < config.supervision.max_resumes:
        job = _variable("SLURM_JOB_ID")
        say(f"requeueing job {job} ({_restart_count() + 1} of {config.supervision.max_resumes}, max_resumes)")
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
    """Writes what the job's processes need and no config may hold, readable for this user only."""
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
        raise LaunchError(f"{path} cannot be read ({error.strerror}): submit runs with `pointillist rl`") from None


def _variable(name: str) -> str:
    if name not in os.environ:
        raise LaunchError(f"{name} is not set: `pointillist slurm-node` runs in a job that `pointillist rl` submits")
    return os.environ[name]
