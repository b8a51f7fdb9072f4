"""Config of monitors: where the metrics of a run go besides `metrics/*.jsonl`, which are always written."""

from typing import Literal

from pydantic import Field

from pointillist.config.base import Config


class WandbConfig(Config):
    """Weights & Biases; needs `pip install '.[monitors]'`."""

    project: str = "pointillist"
    """Project that the run belongs to there."""

    name: str | None = None
    """Name of the run there; by default that of its folder."""

    entity: str | None = None
    """User or team; the library's own default if it is not set."""

    mode: Literal["offline", "online"] = "offline"
    """`offline` writes files that `wandb sync` uploads, and opens no connection."""


class MonitorsConfig(Config):
    """Which monitors a run has; the launcher feeds them, and one that fails never stops the run."""

    wandb: WandbConfig | None = None
    """Set to use Weights & Biases."""

    tensorboard: bool = False
    """Whether to write TensorBoard's event files; needs `pip install '.[monitors]'`."""

    images_every: int = Field(10, gt=0)
    """Steps between tables of rollouts with their pictures."""

    rollouts: int = Field(8, ge=0)
    """Rollouts in such a table, spread evenly over the step's; 0 makes none."""
