"""One machine's part of a run, from the start of its processes to the end: a machine alone and a node of a job alike.

The head also shows the progress, feeds the monitors and writes the summary. Every machine serves the metrics of its
own processes, the head those of the steps as well. A death that the supervisor cannot mend takes the run back to its
last checkpoint where the caller allows it, else it ends the part, and the caller decides what follows.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Final

from pointillist.base.logs import plain
from pointillist.config import RLConfig
from pointillist.errors import LaunchError, PointillistError
from pointillist.launch.console import console, say
from pointillist.launch.metrics import MetricsEndpoint
from pointillist.launch.monitors import Watching
from pointillist.launch.placement import Placement
from pointillist.launch.prepare import go_back
from pointillist.launch.processes import Child
from pointillist.launch.progress import ProgressLine
from pointillist.launch.run_dir import resume_step
from pointillist.launch.summary import summarize
from pointillist.launch.supervisor import Supervisor
from pointillist.runs.lock import RunLock
from pointillist.runs.paths import RunPaths, steps_in

_LOG_LINES: Final = 15
_WORK: Final = ("trainer", "orchestrator")
_SAME_ENDS: Final = 3
"""A process that has ended by itself so often in a row, each time after the same step, would do so again."""


class Interrupted(PointillistError):
    """SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        super().__init__(f"{self.name} came")
        self.exit_code = 128 + number


class Signals:
    """Signals that the launcher got."""

    def __init__(self) -> None:
        self.count = 0
        """Signals that came so far; the first raised `Interrupted`."""

    def hurry(self) -> bool:
        """Whether a second one came: the user does not want to wait for a checkpoint."""
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


@dataclass(frozen=True, slots=True)
class Part:
    """One machine's part of a run, whose folder and configs are ready."""

    placement: Placement
    index: int
    """Number of the machine."""
    environ: Mapping[str, str]
    """Environment of its processes."""
    signals: Signals
    lock: RunLock | None
    """Lock of the run's folder; None where the launcher on the head holds it."""

    @property
    def is_head(self) -> bool:
        """Whether this machine has the orchestrator."""
        return self.index == self.placement.roles.head

    @property
    def trains(self) -> bool:
        """Whether this machine has ranks of the trainer, whose end is the end of its part."""
        return self.index in self.placement.roles.training

    @property
    def label(self) -> str:
        """Beginning of what this machine says, where the run has several."""
        return f"node {self.index} " if len(self.placement.machines) > 1 else ""

    def check_lock(self) -> None:
        """Makes sure that the run's folder is still this launcher's.

        Raises:
            LaunchError: Another run has it, and must not be written into.
        """
        if self.lock is not None and self.lock.lost is not None:
            raise LaunchError(f"the run was stopped: {self.lock.lost}")

    def hurry(self) -> bool:
        """Whether the end waits for no checkpoint: a second signal came, or the folder is another run's now."""
        return self.signals.hurry() or (self.lock is not None and self.lock.lost is not None)


def where_it_goes_on(paths: RunPaths) -> str:
    """What `--resume` will do, by the names of the checkpoints: a job has no time to read their bytes."""
    step = max(steps_in(paths.checkpoints), default=0)
    return f"--resume goes on after step {step}" if step else "there is no checkpoint yet: --resume begins at step 1"


def supervise(part: Part, *, is_over: Callable[[], bool] = lambda: True, max_resumes: int = 0, resumes: int = 0) -> int:
    """Starts a machine's processes and watches them until the run is over.

    Args:
        part: What this machine runs.
        is_over: Whether the run is over, for a machine without processes that end by themselves; asked again and again.
        max_resumes: How often the run goes back to its last checkpoint when trainer or orchestrator die.
        resumes: How often it did so in earlier starts, for the summary.

    Returns:
        Exit code: 0, 1 if a process died, 128 + signal if one stopped the launcher.

    Raises:
        LaunchError: Another run has the folder.
    """
    placement, config, paths = part.placement, part.placement.config, part.placement.paths
    supervisor = Supervisor(placement.processes(part.index, part.environ), config.supervision, say)
    endpoint = MetricsEndpoint(
        config.metrics, paths if part.is_head else None, supervisor, _server_headers(config, part.environ)
    )
    progress = ProgressLine(console, paths, config.max_steps) if part.is_head else None
    watching = Watching.of(config, paths, say)
    ends: list[tuple[str, int | None, int]] = []  # equal ones in a row

    def poll() -> None:
        part.check_lock()
        if progress is not None:
            progress.update()

    try:
        supervisor.start()
        endpoint.start()
        say(f"metrics of all processes: {endpoint.url}")
        if part.is_head:
            watching.start()
        with progress or nullcontext():
            while (dead := supervisor.run(is_over, poll)) is not None and dead.name in _WORK and max_resumes > 0:
                max_resumes, resumes = max_resumes - 1, resumes + 1
                say(f"{dead.cause()}; going back ({resumes} of {config.supervision.max_resumes}, max_resumes)")
                supervisor.end(_WORK, part.hurry)
                step = resume_step(paths, for_trainer=True)
                end = (dead.name, dead.exit_code, step)
                ends = [*ends, end] if end in ends else [end]
                if len(ends) == _SAME_ENDS and not dead.was_killed:
                    say(f"{dead.name} ended {_SAME_ENDS} times after step {step}: going back again does not help")
                    break
                go_back(placement, step)
                supervisor.start_again(_WORK)
    except Interrupted as interrupt:
        if part.trains:
            say(f"{part.label}{interrupt.name}: stopping, the trainer writes a checkpoint; again to hurry")
        supervisor.stop(part.hurry)
        say(f"{part.label}stopped by {interrupt.name}; {where_it_goes_on(paths)}")
        return interrupt.exit_code
    finally:
        supervisor.stop(part.hurry)
        endpoint.stop()
        watching.stop()
    if dead is not None:
        _show_death(dead)
        return 1
    if part.is_head:
        summarize(config, paths, console, restarts=supervisor.restarts(), resumes=resumes)
    return 0


def _server_headers(config: RLConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """HTTP headers for the inference servers."""
    variable = config.inference.server.api_key_var
    return {"Authorization": f"Bearer {environ[variable]}"} if variable else {}


def _show_death(child: Child) -> None:
    """Says what ended the run, and the end of its log."""
    say(f"[bold red]run failed:[/] {child.cause()}; all other processes were stopped")
    say(f"last lines of {child.log}:")
    for line in child.last_lines(_LOG_LINES):
        console.print(f"  {plain(line)}", markup=False, highlight=False, soft_wrap=True)
