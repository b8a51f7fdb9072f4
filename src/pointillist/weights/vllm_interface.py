"""The part of vLLM that this project uses, as protocols: vLLM is not installed where types are checked."""

from typing import Protocol

import torch


class TextConfig(Protocol):
    """Settings of the language model; `tie_word_embeddings` may be missing."""


class MultiModalConfig(Protocol):
    """vLLM's `MultiModalConfig`, the part that is used here."""

    mm_device_do_normalize: bool
    """Whether the model normalises pixels on the device."""


class SchedulerConfig(Protocol):
    """vLLM's `SchedulerConfig`, the part that is used here."""

    max_num_seqs: int


class ModelConfig(Protocol):
    """vLLM's `ModelConfig`, the part that is used here."""

    model: str
    dtype: torch.dtype
    hf_text_config: TextConfig
    max_model_len: int
    logprobs_mode: str

    def get_vocab_size(self) -> int:
        """Rows of the output layer."""
        ...

    def get_multimodal_config(self) -> MultiModalConfig:
        """Settings of images."""
        ...


class VllmConfig(Protocol):
    """vLLM's `VllmConfig`, the part that is used here."""

    @property
    def model_config(self) -> ModelConfig:
        """Settings of the model."""
        ...

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """Settings of the scheduler."""
        ...


class EngineControl(Protocol):
    """vLLM's `EngineClient`, the part that a change of weights needs."""

    @property
    def vllm_config(self) -> VllmConfig:
        """Settings that the engine was started with."""
        ...

    async def check_health(self) -> None:
        """Raises if the engine does not live any more."""
        ...

    async def is_paused(self) -> bool:
        """Whether decoding is frozen."""
        ...

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Freezes decoding; with the mode `keep` requests in flight stay."""
        ...

    async def resume_generation(self) -> None:
        """Goes on decoding."""
        ...

    async def update_weight_version(self, version: str) -> None:
        """Sets the version that answers name."""
        ...

    async def collective_rpc(self, method: str, *, args: tuple[str, ...]) -> list[object]:
        """Calls a method of every worker."""
        ...

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        """Empties the cache of keys and values; running requests read their tokens again."""
        ...

    async def reset_mm_cache(self) -> None:
        """Empties the cache of preprocessed images."""
        ...

    async def reset_encoder_cache(self) -> None:
        """Empties the cache of what the vision tower gave."""
        ...
