"""A run as the viewer sees it: its index, its metrics, its faults, and what its config says it is."""

import threading
import tomllib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from pointillist.base.files import open_regular
from pointillist.base.image_limits import ImageLimits
from pointillist.base.jsonl import Follower
from pointillist.errors import ConfigError, MissingImageError, PointillistError, RecordError
from pointillist.images.store import STORED_NAME
from pointillist.runs.image_dir import image_dir_of, limits_of
from pointillist.runs.paths import RunPaths
from pointillist.runs.records import Fault, decode_fault
from pointillist.view.index import RunIndex, is_intact
from pointillist.view.metrics import Column, MetricsFile

COMPONENTS: Final = ("orchestrator", "trainer", "eval")


class ViewedRun:
    """One run that is looked at; nothing in its folder is ever written."""

    def __init__(self, folder: Path, cache: Path) -> None:
        """Opens it.

        Args:
            folder: The run's output folder.
            cache: Folder in which the index is kept.

        Raises:
            PointillistError: The folder holds no run.
        """
        self.paths = RunPaths(folder.resolve())
        if not any(path.is_dir() for path in (self.paths.configs, self.paths.metrics, self.paths.rollouts)):
            raise PointillistError(f"{folder} holds no run: expected configs, metrics or rollouts in it")
        self.name = self.paths.output_dir.name
        self.image_dir = _image_dir(self.paths)
        self.limits = limits_of(self.paths)
        self.index = RunIndex(self.paths, self.image_dir, self.limits, cache)
        self._metrics = {name: MetricsFile(self.paths.metrics / f"{name}.jsonl") for name in COMPONENTS}
        self._faults = _FaultsFile(self.paths.faults)

    def column(self, component: str, name: str) -> Column:
        """One metric over the steps; empty if it was not recorded."""
        return self._metrics[component].columns().get(name, Column())

    def columns(self, component: str) -> dict[str, Column]:
        """All metrics of a component."""
        return self._metrics[component].columns()

    @property
    def trained_steps(self) -> int:
        """Steps that the trainer has finished."""
        return int(self.column("trainer", "step").last or 0)

    def faults(self, sample_id: str) -> list[Fault]:
        """The trainer's faults with one sample."""
        return self._faults.by_sample().get(sample_id, [])

    def faulty_samples(self, kind: str) -> list[str]:
        """Ids of all samples with a fault of a kind, `missing` or `corrupt`."""
        by_sample = self._faults.by_sample()
        return [sample for sample, faults in by_sample.items() if any(fault.kind == kind for fault in faults)]

    def condition(self, name: str | None) -> str:
        """`good`, `missing` or `corrupt`: a picture as it lies in the store now."""
        if name is None or self.image_dir is None or not STORED_NAME.fullmatch(name):
            return "missing"
        try:
            status = (self.image_dir / name).lstat()
            return _verdict(self.image_dir, name, self.limits, status.st_size, status.st_mtime_ns)
        except (OSError, MissingImageError):
            return "missing"

    def settings(self) -> dict[str, str | int | None]:
        """What the run's config says about environment and model; empty without a config."""
        try:
            with open_regular(self.paths.configs / "orchestrator.toml") as file:
                config = tomllib.load(file)
        except (OSError, ValueError, RecursionError):
            return {}
        model, env = (each if isinstance(each := config.get(name), dict) else {} for name in ("model", "env"))
        return {
            "environment": _plain(env.get("id")),
            "model": _short(_plain(model.get("name"))),
            "steps": _plain(config.get("max_steps")),
            "rollouts a step": _plain(config.get("batch_size")),
            "group size": _plain(config.get("group_size")),
        }


class _FaultsFile:
    """The trainer's faults by sample, followed as the run writes or rewinds them."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._by_sample: dict[str, list[Fault]] = {}
        self._file = Follower(path, self._by_sample.clear)

    def by_sample(self) -> dict[str, list[Fault]]:
        with self._lock:
            for line in self._file.new():
                with suppress(RecordError):  # a damaged line costs itself only
                    fault = decode_fault(line)
                    self._by_sample.setdefault(fault.sample_id, []).append(fault)
            return dict(self._by_sample)


@lru_cache(maxsize=10_000)
def _verdict(root: Path, name: str, limits: ImageLimits, _size: int, _mtime: int) -> str:
    """Reads a stored file once for as long as its size and time stay: the rollouts of a group share pictures."""
    return "good" if is_intact(root, name, limits) else "corrupt"


def _image_dir(paths: RunPaths) -> Path | None:
    try:
        return image_dir_of(paths)
    except (ConfigError, OSError):
        return None


def _plain(value: object) -> str | int | None:
    """A text or a number; None for anything else in its place."""
    if isinstance(value, int):
        return value if value.bit_length() < 64 else None
    return value if isinstance(value, str) else None


def _short(model: str | int | None) -> str | int | None:
    """A hub name as it is; of a folder its own name: where it lay is of no interest where a run is looked at."""
    return Path(model).name if isinstance(model, str) and Path(model).is_absolute() else model
