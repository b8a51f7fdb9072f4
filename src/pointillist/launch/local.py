"""A run on one machine: everything is started here and watched until the end.

A server that dies or hangs is restarted within the run. If trainer or orchestrator die, the run is taken back to its
last checkpoint as often as `supervision.max_resumes` says; after that, everything is stopped, the cause and the end of
its log are shown, and the exit code is not 0.
"""

from collections.abc import Mapping

from pointillist.config import RLConfig
from pointillist.launch.changes import model_record, refuse_changes
from pointillist.launch.console import console, say
from pointillist.launch.placement import Placement, choose_ports
from pointillist.launch.prepare import begin, check_model
from pointillist.launch.run_dir import check_fresh, resume_step
from pointillist.launch.supervise import Interrupted, Part, interruptible, supervise
from pointillist.runs.lock import Job, RunLock, refuse_if_held
from pointillist.runs.paths import RunPaths


def run_on_one_machine(config: RLConfig, environ: Mapping[str, str], job: Job | None = None) -> int:
    """Runs everything on this machine.

    Args:
        config: Config of the run, as `complete` made it.
        environ: Environment of all processes.
        job: The batch job that this is a start of.

    Returns:
        Exit code, as `supervise` has it.

    Raises:
        ConfigError: The model is not there, or `resume` with a config that means another run.
        LaunchError: The run cannot start, or another launcher has the folder.
    """
    if config.dry_run:
        return _dry_run(config)
    config = check_model(config)
    with RunLock.take(config.output_dir, job=job, say=say) as lock, interruptible() as signals:
        try:
            placement = begin(Placement.of(config, [choose_ports(config)]), signals.hurry, is_job=job is not None)
        except Interrupted as interrupt:
            say(f"stopped by {interrupt.name} before anything was started")
            return interrupt.exit_code
        return supervise(Part(placement, 0, environ, signals, lock), max_resumes=config.supervision.max_resumes)


def _dry_run(config: RLConfig) -> int:
    """Says what would happen; the configs of a run that is there stay as they are."""
    paths = RunPaths(config.output_dir)
    refuse_if_held(paths.output_dir)
    if config.resume:
        config = check_model(config)
        step = resume_step(paths)
        refuse_changes(config, paths, step, model_record(config.model.name))
        console.print(f"config is valid; the run would be resumed after step {step}")
        return 0
    check_fresh(paths)
    Placement.of(config, [choose_ports(config)]).write_configs()
    console.print(f"config is valid; resolved configs are in {paths.configs}")
    return 0
