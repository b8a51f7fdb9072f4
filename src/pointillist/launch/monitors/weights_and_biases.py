"""Weights & Biases: curves by each component's own step, and tables of rollouts with their pictures.

A picture is one `wandb.Image` for the whole run, so every table names the same file with the same digest, by which the
service knows what it has.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pointillist.base.files import write_atomically
from pointillist.config import RLConfig, WandbConfig
from pointillist.launch.monitors.interface import Row, RowImage
from pointillist.runs.paths import RunPaths

_COLUMNS: Final = ("rollout", "prompt", "completion", "reward", "advantage")


class WandbMonitor:
    """One run of Weights & Biases; a run that is resumed goes on in it."""

    name = "wandb"

    def __init__(self, config: RLConfig, wandb_config: WandbConfig, folder: Path) -> None:
        """Begins the run.

        Args:
            config: Config of the whole run, shown beside its curves without `env_vars`, which may hold keys.
            wandb_config: Project, entity and name of the run.
            folder: Folder for everything that the library writes.
        """
        # What waits to be uploaded lies in the run's folder, too, not in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder))
        if wandb_config.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=wandb_config.project,
            entity=wandb_config.entity,
            name=wandb_config.name or RunPaths(config.output_dir).output_dir.name,
            id=_run_id(folder / "wandb_id"),
            resume="allow" if wandb_config.mode == "online" else None,  # files are put together by `wandb sync`
            mode=wandb_config.mode,
            dir=str(folder),
            config=config.model_dump(mode="json", exclude={"env_vars"}),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
            ),
        )
        for component in ("trainer", "orchestrator", "eval"):
            # Steps of their own: the library's must not go back, and a run may.
            self._run.define_metric(f"{component}/step", hidden=True)
            self._run.define_metric(f"{component}/*", step_metric=f"{component}/step")
        self._run.define_metric("rollouts", step_metric="orchestrator/step")
        self._images: dict[str, Any] = {}

    def log(self, component: str, step: int, metrics: Mapping[str, float]) -> None:
        """As `Monitor.log`."""
        self._run.log({f"{component}/step": step, **{f"{component}/{name}": value for name, value in metrics.items()}})

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        """As `Monitor.rollouts`; a column for each picture, since a cell can hold one."""
        width = max((len(row.images) for row in rows), default=0)
        table = self._wandb.Table(
            columns=[*_COLUMNS, *(f"picture {index}" for index in range(width))], allow_mixed_types=True
        )
        for row in rows:
            pictures = [self._image(picture) for picture in row.images]
            empty = [None] * (width - len(pictures))
            table.add_data(row.id, row.prompt, row.completion, row.reward, row.advantage, *pictures, *empty)
        self._run.log({"orchestrator/step": step, "rollouts": table})

    def close(self) -> None:
        """As `Monitor.close`."""
        self._run.finish()

    def _image(self, picture: RowImage) -> Any:
        if picture.sha256 not in self._images:
            self._images[picture.sha256] = self._wandb.Image(str(picture.path))
        return self._images[picture.sha256]


def _run_id(path: Path) -> str:
    if not path.exists():
        write_atomically(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="ascii")
