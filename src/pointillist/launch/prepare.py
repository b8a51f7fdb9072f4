"""What happens before a run's processes start: its config is completed, its model looked at, its folder made ready."""

import os
from collections.abc import Callable
from pathlib import Path

from pointillist.base.net import key_from_environment
from pointillist.config import RUN_KEY, RLConfig
from pointillist.config.rl import NOT_RECORDED
from pointillist.config.shared import CARRIER
from pointillist.errors import ConfigError
from pointillist.families import load_family, resolve_model_dir
from pointillist.launch.changes import model_record, record_start, refuse_changes
from pointillist.launch.console import say
from pointillist.launch.monitors import check_monitors
from pointillist.launch.placement import Placement
from pointillist.launch.run_dir import check_fresh, make_fresh, resume_step, rewind, wait_for_survivors
from pointillist.render import FolderTokenizer
from pointillist.runs.image_dir import literal_dir, resolve_image_dir


def complete(config: RLConfig) -> RLConfig:
    """The config with the run's folder and image folder resolved, once for all processes.

    Raises:
        ConfigError: The image folder names a variable that is not set, a key is not set, or a monitor is not
            installed.
    """
    _check_keys(config)
    check_monitors(config.monitors)
    output_dir = _run_folder(config.output_dir)
    image_dir = resolve_image_dir(config.multimodal, output_dir, {**os.environ, **config.env_vars})
    before = os.environ.get(CARRIER)
    if before is not None and before != str(image_dir):
        say(
            f"[yellow]warning:[/] {CARRIER} was {before} in the environment; this run uses {image_dir} "
            "(set multimodal.offload_dir to choose)"
        )
    return config.with_values(
        {
            "resume": config.resume or config.resume_with_changes,
            "output_dir": output_dir,
            "multimodal.offload_dir": literal_dir(image_dir),
        }
    )


def check_model(config: RLConfig) -> RLConfig:
    """Checks all about the model that does not need its weights.

    Returns:
        The config, in which a local folder is an absolute path.

    Raises:
        ConfigError: There is no such model, or no family serves it.
    """
    load_family(config.model.name)
    folder = resolve_model_dir(config.model.name)
    FolderTokenizer(folder)
    return config.with_values({"model.name": str(folder)}) if Path(config.model.name).expanduser().is_dir() else config


def environment(config: RLConfig, run_key: str) -> dict[str, str]:
    """Environment of all processes; the launcher decides the image folder, whatever the variable held before.

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
        # The carrier is a path and no setting: no reader expands anything in it.
        CARRIER: str(resolve_image_dir(config.multimodal, config.output_dir, {})),
        RUN_KEY: os.environ.get(RUN_KEY, run_key),
    }


def begin(placement: Placement, hurry: Callable[[], bool], *, is_job: bool) -> Placement:
    """Makes the run's folder ready, whose lock this process holds, and writes the configs of all processes.

    Args:
        placement: The run on its machines.
        hurry: Whether to stop waiting for processes of an earlier start; asked again and again.
        is_job: Whether this is a job, whose folder was prepared when it was submitted.

    Returns:
        The run as it goes on: after its last checkpoint with `resume`, from its beginning without.

    Raises:
        ConfigError: `resume` with a config that means another run.
        LaunchError: There is nothing to resume, or the folder holds another run.
    """
    config, paths = placement.config, placement.paths
    wait_for_survivors(paths, config.supervision.stop_grace, say, hurry)
    model = model_record(config.model.name)
    if config.resume:
        step = resume_step(paths, for_trainer=True)
        refuse_changes(config, paths, step, model)
        placement = go_back(placement, step)
    else:
        if is_job:
            check_fresh(paths)  # another job may have run in it meanwhile
        else:
            make_fresh(paths, say)
        placement.write_configs()
    record_start(config, paths, model)
    return placement


def go_back(placement: Placement, step: int) -> Placement:
    """Takes a run back to a step: its folder and the configs of its processes."""
    rewind(placement.paths, step)
    placement = placement.resumed_after(step)
    placement.write_configs()
    say(f"resuming after step {step}")
    return placement


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


def _check_keys(config: RLConfig) -> None:
    """Makes sure that the keys that a config names are set.

    Raises:
        ConfigError: One is not set.
    """
    for name, server in (
        ("inference server", config.inference.server),
        ("gateway", config.orchestrator.gateway),
        ("metrics endpoint", config.metrics),
    ):
        if server.api_key_var not in (None, RUN_KEY):
            key_from_environment(str(server.api_key_var), f"the {name}'s API key")
