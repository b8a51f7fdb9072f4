"""Watches the processes of one machine: restarts servers that die or hang, and says whose death ends the run.

A server (inference, assets) has no state that the run needs, so it is restarted within the run, a little later each
time. One that ends with an error before it was ever healthy has a fault that a restart would not mend. Trainer and
orchestrator end by themselves when their work is done, and their heartbeat says so: one that ends without that word is
dead whatever its exit code, and one whose phase stands still is reported or killed. What their death means is for the
launcher to decide.
"""

import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from pointillist.base.system import kill_process
from pointillist.config import SupervisionConfig
from pointillist.launch.processes import Child, signal_group, start, stop_all
from pointillist.launch.watchdog import Watchdog
from pointillist.runs.heartbeat import PROCESS_VAR, Beat, forget, read_beats

_POLL_SECONDS: Final = 0.1
_LONGEST_BACKOFF_SECONDS: Final = 60.0
_HEALTH_ANSWER_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Spec:
    """A process to run."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    log: Path
    health_url: str | None = None
    """Of a server; None for a process that ends by itself."""
    metrics_url: str | None = None
    state: Path | None = None
    """Folder with the heartbeats of the run's processes, where this one has a heartbeat."""
    saves: bool = False
    """Whether SIGTERM makes it write a checkpoint, for which it is given `stop_grace` seconds."""


@dataclass(slots=True)
class Watched:
    """A process and what became of it."""

    spec: Spec
    child: Child | None = None
    """None while it waits to be started."""
    start_at: float = 0.0
    started: float = 0.0
    answered: float = 0.0
    """When it last said that it is healthy; 0 if it has not since its start."""
    healthy_since: float = 0.0
    ever_healthy: bool = False
    in_a_row: int = 0
    """Restarts since it was last stable."""
    restarts: int = 0
    """Restarts of the whole run."""

    @property
    def is_up(self) -> bool:
        """Whether it runs, and, if it is a server, has answered."""
        running = self.child is not None and self.child.exit_code is None
        return running and (self.spec.health_url is None or self.answered > 0)


@dataclass(slots=True)
class Supervisor:
    """Runs processes until the work is done."""

    specs: Sequence[Spec]
    config: SupervisionConfig
    say: Callable[[str], None]
    """Where a restart is reported."""
    watched: dict[str, Watched] = field(default_factory=dict)
    _closing: threading.Event = field(default_factory=threading.Event)
    _watchdog: Watchdog | None = None

    def start(self) -> None:
        """Starts all processes, and asking servers for their health."""
        states = [spec.state for spec in self.specs if spec.state is not None]
        self._watchdog = Watchdog(states[0], self.config.phase_timeout) if states else None
        self.watched = {spec.name: Watched(spec) for spec in self.specs}
        for each in self.watched.values():
            self._start(each)
        threading.Thread(target=self._ask_for_health, name="health", daemon=True).start()

    def run(self, finished: Callable[[], bool], poll: Callable[[], None]) -> Child | None:
        """Watches until the work is done.

        Args:
            finished: Whether it is, beside that of the processes that end by themselves.
            poll: Called again and again; what it raises ends the watch.

        Returns:
            Whoever's death ends the run; None if all is done.
        """
        while True:
            poll()
            for each in self.watched.values():
                if (dead := self._look_after(each)) is not None:
                    return dead
            self._look_for_stalls()
            if self._work_is_done() and finished():
                return None
            time.sleep(_POLL_SECONDS)

    def end(self, names: Collection[str], hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends some processes, whatever their state.

        Those that save have their time for it, but only once the others have ended: a batch that came now would be
        trained in vain.

        Args:
            names: Of the processes.
            hurry: Asked again and again; True ends the wait for those that save.
        """
        ended = [each for name, each in self.watched.items() if name in names and each.child is not None]
        for saving in (False, True):
            some = [each for each in ended if each.spec.saves == saving]
            if saving:
                self._let_save(some, hurry)
            stop_all([each.child for each in some if each.child is not None], grace=0.0 if hurry() else None)
            for each in some:
                self._kill_ranks(each)

    def start_again(self, names: Collection[str]) -> None:
        """Starts processes that were ended."""
        for name in names:
            self.watched[name].restarts += 1
            self._start(self.watched[name])

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends everything; `hurry` as in `end`."""
        self._closing.set()
        work = [name for name, each in self.watched.items() if each.spec.health_url is None]
        self.end(work, hurry)
        self.end(self.watched.keys(), hurry)

    def restarts(self) -> dict[str, int]:
        """How often each process was started again, of those that were."""
        return {name: each.restarts for name, each in self.watched.items() if each.restarts}

    def _work_is_done(self) -> bool:
        work = [each for each in self.watched.values() if each.spec.health_url is None]
        return all(each.child is not None and each.child.exit_code == 0 for each in work)

    def _let_save(self, some: Sequence[Watched], hurry: Callable[[], bool]) -> None:
        """Tells processes to save and end, and waits for it."""
        running = [each for each in some if each.child is not None and each.child.exit_code is None]
        for each in running:
            assert each.child is not None  # noqa: S101 - as just selected
            # torchrun would give its ranks 30 s and then kill them; so the ranks get the signal themselves.
            ranks = [beat for beat in self._beats(each) if beat.pid != each.child.process.pid]
            for beat in ranks:
                kill_process(beat.pid, beat.process_start, signal.SIGTERM)
            if not ranks:
                signal_group(each.child, signal.SIGTERM)
        deadline = time.monotonic() + self.config.stop_grace
        while any(each.child and each.child.exit_code is None for each in running) and not hurry():
            if time.monotonic() > deadline:
                names = ", ".join(each.spec.name for each in running)
                self.say(
                    f"{names} did not end within {self.config.stop_grace:.0f} s (supervision.stop_grace): killing it"
                )
                return
            time.sleep(_POLL_SECONDS / 2)

    def _kill_ranks(self, each: Watched) -> None:
        """What is left of a process: torchrun's ranks are in sessions of their own, and may be stopped or stuck."""
        for beat in self._beats(each):
            kill_process(beat.pid, beat.process_start, signal.SIGKILL)

    def _beats(self, each: Watched) -> list[Beat]:
        """Heartbeats of a process, on this machine."""
        beats = read_beats(each.spec.state) if each.spec.state is not None else []
        return [beat for beat in beats if beat.process == each.spec.name and beat.is_here]

    def _start(self, each: Watched) -> None:
        spec = each.spec
        if spec.state is not None:
            forget(spec.state, spec.name)
        each.child = start(spec.name, spec.command, {**spec.environ, PROCESS_VAR: spec.name}, spec.log)
        each.started, each.answered, each.healthy_since = time.monotonic(), 0.0, 0.0

    def _look_after(self, each: Watched) -> Child | None:
        """Returns the process if its death ends the run."""
        now = time.monotonic()
        if each.child is None:
            if now >= each.start_at:
                self._start(each)
            return None
        code = each.child.exit_code
        if each.spec.health_url is None:
            if code == 0 and not self._has_done_its_work(each):
                each.child.verdict = "ended with exit code 0 before its work was done"
                return each.child
            return each.child if code not in (None, 0) else None
        if code is None:
            self._kill_if_silent(each, now)
            return None
        return self._bury(each, each.child, now)

    def _has_done_its_work(self, each: Watched) -> bool:
        beats = self._beats(each)
        return each.spec.state is None or (bool(beats) and all(beat.done for beat in beats))

    def _look_for_stalls(self) -> None:
        """Reports processes that live and do nothing, and kills them if the config says so."""
        if self._watchdog is None:
            return
        running = {
            name: each
            for name, each in self.watched.items()
            if each.spec.state is not None and each.child is not None and each.child.exit_code is None
        }
        for stall in self._watchdog.look({name: each.started for name, each in running.items()}):
            each = running[stall.process]
            assert each.child is not None  # noqa: S101 - as just selected
            verdict = f"{stall.text} (supervision.phase_timeout)"
            if self.config.on_stall == "report":
                self.say(f"{stall.process} {verdict}")
                continue
            self.say(f"{stall.process} {verdict}: killing it")
            each.child.verdict = f"was killed because it {verdict}"
            stop_all([each.child], grace=0.0)
            self._kill_ranks(each)

    def _bury(self, each: Watched, child: Child, now: float) -> Child | None:
        never_worked = not each.ever_healthy and (child.exit_code or 0) > 0
        if each.healthy_since and now - each.healthy_since >= self.config.stable_seconds:
            each.in_a_row = 0
        if never_worked or each.in_a_row >= self.config.max_restarts:
            return child
        wait = min(self.config.backoff * 2**each.in_a_row, _LONGEST_BACKOFF_SECONDS)
        each.in_a_row += 1
        each.restarts += 1
        self.say(
            f"{child.cause()}; restarting it in {wait:.3g} s ({each.in_a_row} of {self.config.max_restarts}, "
            "supervision.max_restarts)"
        )
        stop_all([child])  # what its death left of it: a vLLM server has processes of its own
        each.child, each.start_at, each.answered = None, now + wait, 0.0
        return None

    def _kill_if_silent(self, each: Watched, now: float) -> None:
        if each.answered and now - each.answered > self.config.health_timeout and each.child is not None:
            self.say(
                f"{each.spec.name} has not answered {each.spec.health_url} for {now - each.answered:.0f} s "
                "(supervision.health_timeout): killing it"
            )
            stop_all([each.child], grace=0.0)

    def _ask_for_health(self) -> None:
        """In a thread, and all servers at once: one that hangs must not make the others look silent."""
        servers = [each for each in self.watched.values() if each.spec.health_url is not None]
        # The longest silence of a healthy server is an interval and one such wait for another that hangs.
        patience = min(_HEALTH_ANSWER_SECONDS, self.config.health_timeout / 2)
        with httpx.Client(timeout=patience, trust_env=False) as http, ThreadPoolExecutor(len(servers) or 1) as pool:
            while not self._closing.wait(self.config.health_interval):
                list(pool.map(partial(_note_health, http), servers))


def _note_health(http: httpx.Client, each: Watched) -> None:
    child = each.child
    try:
        healthy = child is not None and http.get(str(each.spec.health_url)).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return
    if healthy and each.child is child:  # else it was the answer of one that has died meanwhile
        each.answered = time.monotonic()
        each.healthy_since = each.healthy_since or each.answered
        each.ever_healthy = True
