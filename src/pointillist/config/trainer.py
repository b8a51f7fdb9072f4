"""Config of the trainer."""

from typing import Literal

from pydantic import Field, model_validator

from pointillist.config.base import Config
from pointillist.config.shared import ModelConfig, ReadingConfig, TransportConfig


class SchedulerConfig(Config):
    """Learning rate over the run: linear warm-up, then constant, linear or cosine decay."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""

    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises from 0."""

    decay_steps: int | None = Field(None, gt=0)
    """Last steps of the run over which the rate falls; before them it is constant. None is all after the warm-up."""

    min_ratio: float = Field(0.0, ge=0, le=1)
    """Rate at the last step, as a fraction of `optim.lr`."""


class OptimConfig(Config):
    """AdamW."""

    lr: float = Field(1e-6, gt=0)
    """Learning rate after the warm-up."""

    weight_decay: float = Field(0.01, ge=0)
    """Part of each weight that is taken away in a step, times the learning rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of gradients and of their squares."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""

    scheduler: SchedulerConfig = SchedulerConfig()


class LossConfig(Config):
    """Token-level policy gradient; see `pointillist.trainer.loss`."""

    ratio_low: float = Field(0.5, ge=0, lt=1)
    """Tokens whose importance ratio (trainer over sampler) is below this are masked."""

    ratio_high: float = Field(2.0, gt=1)
    """Tokens whose importance ratio is above this are masked."""

    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the initial model; above 0 a frozen copy of it is held."""

    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the bonus on the policy's entropy; about 0.01 keeps a policy from settling before it has explored."""


class LoRAConfig(Config):
    """Low-rank adapters (Hu et al., arXiv 2106.09685): `W + alpha / rank * B @ A`, and only `A` and `B` are trained."""

    rank: int = Field(16, gt=0)
    """Rows of `A`, columns of `B`."""

    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters, divided by the rank."""

    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Linear layers of the language model that get one, by the last part of their names."""


class CheckpointConfig(Config):
    """Checkpoints to resume from."""

    interval: int | None = Field(None, gt=0)
    """Steps between checkpoints, beside those by time; the last step, and a trainer that is stopped, always make
    one."""

    interval_minutes: float | None = Field(10.0, gt=0)
    """Minutes between checkpoints; None makes none by time."""

    keep_last: int = Field(2, gt=0)
    """Checkpoints kept."""


class TrainerConfig(ReadingConfig):
    """The trainer: `pointillist trainer @ trainer.toml`, under torchrun for several ranks."""

    model: ModelConfig
    seq_len: int = Field(2048, gt=0)
    """Length of a packed row, in tokens."""

    max_steps: int = Field(100, gt=0)
    """Optimiser steps."""

    seed: int = 0
    """Seed of torch, and so of dropout and of new adapters."""

    transport: TransportConfig = TransportConfig()
    num_workers: int = Field(1, gt=0)
    """Data-parallel ranks; above 1 the model is sharded by FSDP2."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto takes a GPU if there is one."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations; weights and optimiser state are always float32."""

    lora: LoRAConfig | None = None
    """Adapters to train instead of the model's own weights; servers and the exported model get them merged."""

    freeze_vision: bool = False
    """Leaves the vision tower and its projector as they are."""

    activation_checkpointing: bool = False
    """Computes each layer again in the backward pass instead of keeping its activations: less memory, a third more
    work."""

    compile: bool = False
    """Compiles the language model's layers by torch.compile; needs a C++ compiler, on a GPU Triton."""

    num_threads: int = Field(1, gt=0)
    """Threads of torch's CPU operators, a rank."""

    resume_step: int | None = Field(None, ge=1)
    """Step of the checkpoint to continue from; the launcher sets it."""

    deterministic: bool = False
    """Whether torch may use only operators that give the same bits each time."""

    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    ckpt: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainerConfig":
        scheduler = self.optim.scheduler
        if scheduler.warmup_steps + (scheduler.decay_steps or 0) > self.max_steps:
            raise ValueError(
                f"optim.scheduler.warmup_steps = {scheduler.warmup_steps} and decay_steps = {scheduler.decay_steps} "
                f"are more than max_steps = {self.max_steps}"
            )
        return self
