"""`pointillist rl`: a run on this machine, or with `[slurm]` the job that runs it."""

import secrets

from pointillist.config import RLConfig
from pointillist.launch.local import run_on_one_machine
from pointillist.launch.prepare import complete, environment
from pointillist.launch.slurm import submit


def run_rl(config: RLConfig) -> int:
    """Runs to the end, or submits the job that will.

    Returns:
        Exit code: 0, 1 if a process died, 128 + signal if one stopped the launcher.

    Raises:
        ConfigError: The config cannot work.
        LaunchError: The run cannot start.
    """
    config = complete(config)
    if config.slurm is not None:
        return submit(config, config.slurm)
    return run_on_one_machine(config, environment(config, secrets.token_hex(16)))
