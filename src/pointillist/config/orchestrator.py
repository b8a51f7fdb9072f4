"""Config of the orchestrator: environment, sampling, batches, evaluation."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pointillist.config.base import Config
from pointillist.config.shared import LogLevel, ModelConfig, MultimodalConfig


class EnvConfig(Config):
    """Which environment, and with which arguments."""

    id: str
    """Name of an entry point in group `pointillist.environments`, or an import path `module:Class`."""

    args: dict[str, Any] = {}
    """Keyword arguments of the environment's class."""

    blank_images: bool = False
    """Control run: every image is replaced by a grey one of the same size before it is stored."""


class SamplingConfig(Config):
    """How training rollouts are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits, in the sampler and in the trainer alike."""

    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; below 1 the trainer's distribution is wider than the sampler's."""

    top_k: int = Field(-1, ge=-1)
    """The k likeliest tokens; -1 is all."""

    max_tokens: int = Field(128, gt=0)
    """Longest completion of one turn, in tokens."""


class AdvantageConfig(Config):
    """Group-relative advantages: reward minus the group's mean."""

    normalize_std: bool = True
    """Whether to divide by the group's standard deviation as well (GRPO); False is the mean baseline alone."""


class EvalConfig(Config):
    """Evaluation on held-out tasks, greedy, through the same renderer and wire as training."""

    interval: int = Field(50, gt=0)
    """Steps between evaluations; one is always made before the first step and one after the last."""

    max_tasks: int | None = Field(None, gt=0)
    """Held-out tasks to use; all by default."""


class ClientConfig(Config):
    """How the orchestrator reaches the inference server."""

    base_url: str = "http://127.0.0.1:8000"
    """Address of the server; the launcher sets it."""

    api_key_var: str | None = None
    """Name of the environment variable that holds the API key; the launcher sets it as the server's."""

    timeout: float = Field(600.0, gt=0)
    """Seconds that one request may take."""

    startup_timeout: float = Field(600.0, gt=0)
    """Seconds that the server may take to become healthy."""


class OrchestratorConfig(Config):
    """The orchestrator: `pointillist orchestrator @ orchestrator.toml`."""

    model: ModelConfig
    env: EnvConfig
    seq_len: int = Field(2048, gt=0)
    """Longest sample and length of a packed row, in tokens."""

    max_steps: int = Field(100, gt=0)
    """Optimiser steps."""

    seed: int = 0
    """Order of tasks and sampling."""

    output_dir: Path = Path("outputs/run")
    multimodal: MultimodalConfig = MultimodalConfig()
    batch_size: int = Field(128, gt=0)
    """Rollouts that a step is made from."""

    group_size: int = Field(8, gt=1)
    """Rollouts of one task, compared with each other."""

    max_concurrent: int = Field(256, gt=0)
    """Rollouts in flight."""

    max_retries: int = Field(2, ge=0)
    """How often a failed rollout is tried again before it is dropped."""

    rollout_timeout: float = Field(600.0, gt=0)
    """Seconds that one rollout may take."""

    max_off_policy_steps: int = Field(0, ge=0)
    """How many weight versions a rollout may be older than the step it trains; 0 is strictly on policy."""

    num_train_workers: int = Field(1, gt=0)
    """Data-parallel trainer ranks to pack for; the launcher sets it."""

    resume_step: int | None = Field(None, ge=1)
    """Step of the checkpoint to continue from; the launcher sets it."""

    sampling: SamplingConfig = SamplingConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    eval: EvalConfig = EvalConfig()
    client: ClientConfig = ClientConfig()
    log_level: LogLevel = "info"

    @model_validator(mode="after")
    def _whole_groups(self) -> "OrchestratorConfig":
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size = {self.batch_size} is not a multiple of group_size = {self.group_size}")
        return self
