"""Config of the inference server."""

from typing import Literal

from pydantic import Field, model_validator

from pointillist.config.base import Config
from pointillist.config.shared import ModelConfig, ProcessConfig, ServerConfig


class EngineConfig(Config):
    """The embedded engine: a small continuously batching sampler over the Hugging Face model."""

    max_batch_size: int = Field(256, gt=0)
    """Sequences that are decoded at once; further ones wait."""

    admission_window: float = Field(0.002, ge=0)
    """Seconds that an idle engine waits for more requests after the first, so that a burst is one batch."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; float32 is both faster and exact on a CPU."""

    num_threads: int = Field(1, gt=0)
    """Threads of torch's CPU operators."""


class VLLMConfig(Config):
    """The vLLM server, where `backend` is `vllm`."""

    args: dict[str, str | int | float | bool | list[str]] = {}
    """Further arguments of vLLM's own server by name, such as `gpu_memory_utilization = 0.8`; true and false become
    `--name` and `--no-name`. They win over what Pointillist sets."""


class InferenceConfig(ProcessConfig):
    """The inference server: `pointillist inference @ inference.toml`."""

    backend: Literal["embedded", "vllm"] = "embedded"
    """The embedded engine over the Hugging Face model, or vLLM with Pointillist's plugin."""

    model: ModelConfig
    seq_len: int = Field(2048, gt=0)
    """Longest sequence, prompt and completion together, in tokens."""

    seed: int = 0
    """Seeds sampling of requests that bring no seed of their own."""

    deterministic: bool = False
    """Whether what a request gets is the same bit for bit whatever else is in flight: each sequence is decoded by
    itself (vLLM: its batch-invariant kernels)."""

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    """`dtype`, `num_threads` and `max_batch_size` hold for both backends."""

    vllm: VLLMConfig = VLLMConfig()

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> "InferenceConfig":
        self.server.require_key("server")
        return self
