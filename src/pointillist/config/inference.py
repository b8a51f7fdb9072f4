"""Config of the inference server."""

from typing import Final, Literal

from pydantic import Field, model_validator

from pointillist.config.base import Config
from pointillist.config.shared import ModelConfig, ReadingConfig, ServerConfig

_KEYS_FOR_VLLM: Final = ("dtype", "num_threads", "max_batch_size")
"""Keys of `inference.engine` that hold for vLLM as well."""


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


class InferenceConfig(ReadingConfig):
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
    """The embedded engine; vLLM takes `dtype`, `num_threads` and `max_batch_size` from here as well, and no others."""

    vllm: VLLMConfig = VLLMConfig()

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> "InferenceConfig":
        self.server.require_key("server")
        return self

    @model_validator(mode="after")
    def _engine_keys_have_an_effect(self) -> "InferenceConfig":
        # Configs that a run writes name every key, so a default is no choice of the user's.
        ignored = [
            name
            for name, field in EngineConfig.model_fields.items()
            if name not in _KEYS_FOR_VLLM and getattr(self.engine, name) != field.default
        ]
        if self.backend == "vllm" and ignored:
            raise ValueError(
                f"engine.{ignored[0]} = {getattr(self.engine, ignored[0])} has no effect with backend = "
                f"'vllm': only {', '.join(_KEYS_FOR_VLLM)} have; vLLM's own arguments go into vllm.args"
            )
        return self
