"""A thread of the launcher that hands what is new to every monitor.

A monitor may be slow (a network) or fail; the supervision of processes must not notice. One that fails is dropped with
one warning, and the run goes on.
"""

import importlib.util
import threading
from collections.abc import Callable, Mapping
from typing import Final

from rich.markup import escape

from pointillist.base.logs import plain
from pointillist.config import MonitorsConfig, RLConfig
from pointillist.errors import ConfigError, PointillistError
from pointillist.launch.monitors.following import MetricsFollower, numbers, rows_of
from pointillist.launch.monitors.interface import Monitor, Row
from pointillist.runs.paths import RunPaths

_POLL_SECONDS: Final = 1.0
_CLOSE_SECONDS: Final = 60.0


def check_monitors(config: MonitorsConfig) -> None:
    """Makes sure that the libraries of all monitors are there, before anything starts.

    Raises:
        ConfigError: One is not installed.
    """
    for name, wanted in (("wandb", config.wandb is not None), ("tensorboard", config.tensorboard)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(f"monitors.{name} needs {name}, which is not installed: pip install '.[monitors]'")


def make_monitors(config: RLConfig, paths: RunPaths, say: Callable[[str], None]) -> list[Monitor]:
    """The monitors of a run's config; one that cannot begin is left out with a warning."""
    folder = paths.output_dir / "monitors"
    makers: dict[str, Callable[[], Monitor]] = {}
    if (wandb_config := config.monitors.wandb) is not None:
        from pointillist.launch.monitors.weights_and_biases import WandbMonitor

        makers["wandb"] = lambda: WandbMonitor(config, wandb_config, folder)
    if config.monitors.tensorboard:
        from pointillist.launch.monitors.tensorboard_events import TensorboardMonitor

        makers["tensorboard"] = lambda: TensorboardMonitor(folder / "tensorboard")
    monitors = []
    for name, make in makers.items():
        try:
            monitors.append(make())
        except Exception as error:  # whatever a library raises: the run is worth more than its monitor
            say(_warning(name, error))
    return monitors


class Watching:
    """Follows a run until `stop`."""

    def __init__(
        self,
        make: Callable[[], list[Monitor]],
        config: MonitorsConfig,
        paths: RunPaths,
        say: Callable[[str], None],
    ) -> None:
        """Begins behind what the folder holds already.

        Args:
            make: Function that makes the monitors, in the thread: a library may take its time.
            config: Settings of the tables: every how many steps, of how many rollouts.
            paths: The run's folder.
            say: Function that reports a monitor that fails.
        """
        self._make = make
        self._config = config
        self._paths = paths
        self._say = say
        self._follower = MetricsFollower(paths)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="monitors", daemon=True)

    @classmethod
    def of(cls, config: RLConfig, paths: RunPaths, say: Callable[[str], None]) -> "Watching":
        """That of a run's config."""
        return cls(lambda: make_monitors(config, paths, say), config.monitors, paths, say)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Hands on the rest and closes every monitor, if any began; gives up on one that takes too long."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._say("[yellow]warning:[/] the monitors have not finished; what they had not written yet is lost")

    def _follow(self) -> None:
        monitors = self._make()
        if not monitors:
            return
        while not self._ended.wait(_POLL_SECONDS):
            self._hand_on(monitors)
        self._hand_on(monitors)
        self._for_each(monitors, lambda monitor: monitor.close())

    def _hand_on(self, monitors: list[Monitor]) -> None:
        for component, record in self._follower.new():
            self._hand_on_record(monitors, component, int(record["step"]), numbers(record))

    def _hand_on_record(self, monitors: list[Monitor], component: str, step: int, metrics: Mapping[str, float]) -> None:
        self._for_each(monitors, lambda monitor: monitor.log(component, step, metrics))
        # A step's rollouts are written before its metrics.
        if component == "orchestrator" and step % self._config.images_every == 0:
            rows = self._rows(step)
            self._for_each(monitors if rows else [], lambda monitor: monitor.rollouts(step, rows))

    def _rows(self, step: int) -> list[Row]:
        try:
            return rows_of(self._paths, step, self._config.rollouts)
        except (PointillistError, OSError) as error:  # a picture that is gone, say
            self._say(f"[yellow]warning:[/] no table of the rollouts of step {step}: {escape(plain(str(error)))}")
            return []

    def _for_each(self, monitors: list[Monitor], call: Callable[[Monitor], None]) -> None:
        for monitor in list(monitors):
            try:
                call(monitor)
            except Exception as error:
                monitors.remove(monitor)
                self._say(_warning(monitor.name, error))


def _warning(name: str, error: Exception) -> str:
    return f"[yellow]warning:[/] the monitor {name} failed and is off ({escape(repr(error))}); the run goes on"
