"""Config of a whole run: `pointillist rl @ rl.toml`.

What several components need is set once, at the top, and copied into each before validation. A component that sets
another value is one error that names both keys.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, Self

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from pointillist.config.base import Config, share
from pointillist.config.inference import InferenceConfig
from pointillist.config.launch import SlurmConfig, SupervisionConfig
from pointillist.config.monitors import MonitorsConfig
from pointillist.config.orchestrator import EnvConfig, OrchestratorConfig
from pointillist.config.shared import CARRIER, LogLevel, ModelConfig, MultimodalConfig, ServerConfig, TransportConfig
from pointillist.config.trainer import TrainerConfig

NOT_RECORDED: Final = "<not recorded>"
"""What a written config has for the value of an environment variable."""


class RLConfig(Config):
    """A run: environment, inference server, orchestrator and trainer."""

    shared: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "model": ("trainer.model", "orchestrator.model", "inference.model"),
        "env": ("orchestrator.env",),
        "seq_len": ("trainer.seq_len", "orchestrator.seq_len", "inference.seq_len"),
        "max_steps": ("trainer.max_steps", "orchestrator.max_steps"),
        "seed": ("trainer.seed", "orchestrator.seed", "inference.seed"),
        "output_dir": ("trainer.output_dir", "orchestrator.output_dir", "inference.output_dir"),
        "multimodal": ("trainer.multimodal", "orchestrator.multimodal", "inference.multimodal"),
        "transport": ("trainer.transport", "orchestrator.transport"),
        "deterministic": ("trainer.deterministic", "inference.deterministic"),
        "log_level": ("trainer.log_level", "orchestrator.log_level", "inference.log_level"),
        "trainer.num_workers": ("orchestrator.num_train_workers",),
    }

    model: ModelConfig
    env: EnvConfig
    seq_len: int = Field(2048, gt=0)
    """Longest sample and length of a packed row, in tokens."""

    max_steps: int = Field(100, gt=0)
    """Optimiser steps."""

    seed: int = 0
    """Seed of the order of tasks, of sampling and of the trainer."""

    output_dir: Path = Path("outputs/run")
    """The run's folder; must not hold another run unless `resume` is set."""

    multimodal: MultimodalConfig = MultimodalConfig()
    transport: TransportConfig = TransportConfig()
    log_level: LogLevel = "info"
    """Least important messages that are logged, by every process."""

    env_vars: dict[str, str] = {}
    """Environment variables of every process. Configs that a run writes keep their names, not their values: these come
    anew from the config that is given to `--resume`."""

    deterministic: bool = False
    """Whether the same config gives the same samples twice: the server decodes every sequence by itself, so that no
    number depends on what else is in flight. Slow; needs `orchestrator.max_off_policy_steps = 0`."""

    num_servers: int = Field(1, ge=0)
    """Inference servers to start (on each inference node); 0 uses those at `orchestrator.client.base_url`."""

    supervision: SupervisionConfig = SupervisionConfig()
    metrics: ServerConfig = ServerConfig()
    """Where the launcher serves the metrics of all processes, for Prometheus."""

    monitors: MonitorsConfig = MonitorsConfig()
    """Weights & Biases and TensorBoard."""

    slurm: SlurmConfig | None = None
    """Set to run as a SLURM job."""

    trainer: TrainerConfig
    orchestrator: OrchestratorConfig
    inference: InferenceConfig
    resume: bool = False
    """Continue the run in `output_dir` from its last checkpoint."""

    resume_with_changes: bool = False
    """Continue it although the config or the model means something else than what the run was begun with; implies
    `resume`."""

    dry_run: bool = False
    """Validate, write the resolved configs to `<output_dir>/configs` (with `slurm`, print the job's script), and
    exit."""

    @model_validator(mode="before")
    @classmethod
    def _share(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        defaults = {
            key: cls.model_fields[key].get_default(call_default_factory=True)
            for key in ("seq_len", "max_steps", "seed", "output_dir", "deterministic", "log_level")
        }
        data = {**defaults, **data}
        for component in ("trainer", "orchestrator", "inference"):
            data.setdefault(component, {})
        return share(data, cls.shared)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.metrics.require_key("metrics")
        if self.deterministic and self.orchestrator.max_off_policy_steps:
            raise ValueError(
                "deterministic needs orchestrator.max_off_policy_steps = 0, got "
                f"{self.orchestrator.max_off_policy_steps}: when new weights arrive is a matter of time"
            )
        if self.supervision.phase_timeout <= self.orchestrator.rollout_timeout:
            raise ValueError(
                f"supervision.phase_timeout = {self.supervision.phase_timeout:g} must be longer than "
                f"orchestrator.rollout_timeout = {self.orchestrator.rollout_timeout:g}: a slow rollout is no process "
                "that stands still"
            )
        if not self.num_servers and "base_url" not in self.orchestrator.client.model_fields_set:
            raise ValueError("num_servers = 0 needs orchestrator.client.base_url, the addresses of your own servers")
        if self.num_servers > 1 and self.inference.server.port:
            raise ValueError(
                f"inference.server.port = {self.inference.server.port}, but there are num_servers = {self.num_servers}"
                ": set the port to 0"
            )
        if self.slurm and self.slurm.trainer_nodes and self.trainer.num_workers % self.slurm.trainer_nodes:
            raise ValueError(
                f"trainer.num_workers = {self.trainer.num_workers} cannot be spread evenly over slurm.trainer_nodes = "
                f"{self.slurm.trainer_nodes}"
            )
        return self

    @field_serializer("env_vars", when_used="json")
    def _names_only(self, value: dict[str, str]) -> dict[str, str]:
        return dict.fromkeys(value, NOT_RECORDED)

    @field_validator("env_vars")
    @classmethod
    def _carrier_is_the_launchers(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if CARRIER in value:
            raise ValueError(f"env_vars may not contain {CARRIER}: set multimodal.offload_dir instead")
        return value
