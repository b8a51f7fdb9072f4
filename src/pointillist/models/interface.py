"""The part of a Hugging Face vision-language model that this project uses, as protocols.

`AutoModelForImageTextToText` is annotated as any model at all, and an attribute of a `torch.nn.Module` as any tensor or
module. `models.loading` states once that what it has loaded is a `VisionLanguageModel`; from there on the type checker
follows it. Axes: `rows` of tokens, `columns` of each row, `hidden` features, `V` rows of the output layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import Cache  # at run time only where a model is loaded: it takes seconds

_Module = TypeVar("_Module", bound="TorchModule")


class TorchModule(Protocol):
    """The methods of `torch.nn.Module` that are used on models."""

    def eval(self: _Module) -> _Module:
        """Turns dropout off."""
        ...

    def to(self: _Module, device: torch.device) -> _Module:
        """Moves all weights."""
        ...

    def requires_grad_(self: _Module, requires_grad: bool = True) -> _Module:
        """Says whether the weights are trained."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All modules, this one first."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The same with their dotted names."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """The module of a dotted name."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights, tied ones once."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights by name, tied ones under each of their names."""
        ...


class VisionSettings(Protocol):
    """`vision_config` of `config.json`; models with MRoPE only."""

    spatial_merge_size: int
    """Side of the square of patches that become one token."""


class ModelSettings(Protocol):
    """A model's `config.json`."""

    vision_config: VisionSettings

    def get_text_config(self) -> object:
        """The settings of the language model."""
        ...


class GenerationSettings(Protocol):
    """A model's `generation_config.json`."""

    eos_token_id: int | list[int] | None


class HiddenStates(Protocol):
    """What the model gives before its output layer."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """`(rows, columns, hidden)`."""
        ...


class Logits(Protocol):
    """What the model gives after its output layer."""

    @property
    def logits(self) -> torch.Tensor:
        """`(rows, columns, V)`; with `logits_to_keep=n` the last `n` columns only."""
        ...


class ImageFeatures(Protocol):
    """What the vision tower and its projector give."""

    pooler_output: torch.Tensor | Sequence[torch.Tensor]
    """`(tokens, hidden)` an image; one tensor `(images, tokens, hidden)` where all have equally many tokens."""
    deepstack_features: Sequence[Sequence[torch.Tensor]] | None
    """Qwen3-VL: the same for each of several layers of the vision tower. Others lack the attribute."""


class Backbone(TorchModule, Protocol):
    """A vision-language model without its output layer (the attribute `model` of the whole one)."""

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        use_cache: bool,
        **rest: torch.Tensor | Mapping[str, ImageFeatures],
    ) -> HiddenStates:
        """Hidden states of all tokens; `rest` are the token types and `mm_encoder_outputs`, by name."""
        ...

    def get_image_features(self, *, return_dict: bool, **images: torch.Tensor) -> ImageFeatures:
        """Features of images that are given by `pixel_values` and what else the family needs."""
        ...

    def get_rope_index(
        self, input_ids: torch.Tensor, *, mm_token_type_ids: torch.Tensor, image_grid_thw: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions int64 `(3, rows, columns)`, and the offset of each row; models with MRoPE only."""
        ...


class VisionLanguageModel(TorchModule, Protocol):
    """A whole vision-language model."""

    model: Backbone
    config: ModelSettings
    generation_config: GenerationSettings

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: "Cache",
        use_cache: bool,
        logits_to_keep: int = 0,
        **images: torch.Tensor,
    ) -> Logits:
        """Logits of tokens that follow those in the cache, which grows by them."""
        ...

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, weight `(V, hidden)`."""
        ...

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer, weight `(V, hidden)`; it may share its weight with the embedding."""
        ...

    def save_pretrained(self, save_directory: str | PathLike[str], *, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Writes a folder that `from_pretrained` loads."""
        ...
