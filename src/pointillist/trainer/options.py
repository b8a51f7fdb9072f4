"""What the config asks of the model before it is trained: frozen parts, adapters, recomputed and compiled layers.

Everything happens in place on the Hugging Face model, between loading and sharding:

    freeze the vision tower -> add adapters -> compile layers -> recompute them in the backward pass

so the rest of the trainer sees the model it always sees. Modules keep their places; layers only get another `forward`,
inside the hooks by which sharding gathers a layer's weights. With adapters the parameters do have other names, and
`merge_lora` gives the weights back under the model's own: neither a server nor an exported folder knows of adapters.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pointillist.config.trainer import LoRAConfig, TrainerConfig
from pointillist.errors import ConfigError
from pointillist.models import LoadedModel

_BASE = ".base_layer."
_ADAPTERS = (".lora_A.", ".lora_B.")
# A layer is compiled anew with and without gradients, with each kind of mask, with one row and several; beyond a limit
# torch goes on without compiling. Its own (8) is too low for a model of two kinds of layers.
_VARIANTS = 64


def prepare_model(loaded: LoadedModel, config: TrainerConfig) -> None:
    """Makes a freshly loaded model what the config asks for.

    Raises:
        ConfigError: The model does not have the parts that an option is about.
    """
    if config.freeze_vision:
        freeze_vision(loaded)
    if config.lora is not None:
        add_lora(loaded, config.lora, config.seed)
    if config.compile:
        compile_layers(loaded)
    if config.activation_checkpointing:
        checkpoint_layers(loaded)


def freeze_vision(loaded: LoadedModel) -> None:
    """Takes the gradient from the vision tower and its projector; autograd then keeps nothing of their forward."""
    for name in loaded.family.vision_modules:
        loaded.model.model.get_submodule(name).requires_grad_(False)


def add_lora(loaded: LoadedModel, config: LoRAConfig, seed: int) -> None:
    """Puts an adapter beside each target of the language model and freezes all else.

    Args:
        loaded: The model.
        config: Settings of the adapters; the `B` of each begins as 0, so the model's outputs stay what they were.
        seed: Seed of the `A`s: all ranks, which each build the whole model, must draw the same.

    Raises:
        ConfigError: A target that the language model does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model  # a second to import, and only here of any use

    alpha = cast(int, config.alpha)  # peft divides it by the rank: a fraction is as good
    targets = _lora_targets(loaded, config.target_modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=config.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets),
            cast(nn.Module, loaded.model),
        )


def merge_lora(weights: Mapping[str, torch.Tensor], config: LoRAConfig) -> dict[str, torch.Tensor]:
    """The weights that a model without adapters needs to compute the same, under its own names.

    Args:
        weights: Whole state dict of a model with adapters; it is not changed.
        config: Settings of the adapters.

    Returns:
        Weights of the shapes and types that they had before adapters were added.

    Example:
        `q_proj.base_layer.weight` `(out, in)`, `q_proj.lora_A.default.weight` `(rank, in)` and
        `q_proj.lora_B.default.weight` `(out, rank)` become one `q_proj.weight` `(out, in)`: base + alpha / rank * B A.
    """
    merged: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if any(part in name for part in _ADAPTERS):
            continue
        module, of_base, which = name.partition(_BASE)
        if of_base and which == "weight":
            down, up = (weights[f"{module}{part}default.weight"].float() for part in _ADAPTERS)
            merged[f"{module}.{which}"] = (weight.float() + config.alpha / config.rank * (up @ down)).to(weight.dtype)
        else:
            merged[name.replace(_BASE, ".")] = weight
    return merged


def compile_layers(loaded: LoadedModel) -> None:
    """Compiles the layers of the language model, one by one: equal layers share what was compiled.

    The vision tower stays as it is: it is run once an image, and its shapes change with every row.

    Raises:
        ConfigError: No layers.
    """
    torch._dynamo.config.recompile_limit = _VARIANTS
    vision = _vision_parts(loaded)
    for layer in _layers(loaded):
        if layer not in vision:
            _replace_forward(layer, torch.compile(layer.forward, dynamic=True))


def checkpoint_layers(loaded: LoadedModel) -> None:
    """Keeps only each layer's inputs for the backward pass, which runs the layer again.

    transformers does the same only in training mode, which also turns dropout on.

    Raises:
        ConfigError: No layers.
    """
    for layer in _layers(loaded):
        # Nothing in a layer is random, so there is no random state to keep.
        _replace_forward(layer, partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False))


def _replace_forward(layer: nn.Module, forward: Callable[..., object]) -> None:
    """Gives one layer another `forward` than its class has; the hooks around it stay."""
    layer.forward = forward


def _layers(loaded: LoadedModel) -> Sequence[nn.Module]:
    """All layers, of the vision tower too: what transformers itself would recompute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in loaded.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(loaded.model).__name__} has no GradientCheckpointingLayer: its layers can be neither compiled nor "
            "recomputed (trainer.compile, trainer.activation_checkpointing)"
        )
    return layers


def _vision_parts(loaded: LoadedModel) -> set[nn.Module]:
    roots = [loaded.model.model.get_submodule(name) for name in loaded.family.vision_modules]
    return {module for root in roots for module in root.modules()}


def _lora_targets(loaded: LoadedModel, names: Collection[str]) -> list[str]:
    """Full names of the language model's linear layers whose last part is one of `names`."""
    vision = _vision_parts(loaded)
    found = [
        f"model.{name}"
        for name, module in loaded.model.model.named_modules()
        if isinstance(module, nn.Linear) and module not in vision
    ]
    own = {name.rpartition(".")[2] for name in found}
    if unknown := set(names) - own:
        raise ConfigError(
            f"trainer.lora.target_modules: the language model has no linear layers named {sorted(unknown)}, it has "
            f"{sorted(own)}"
        )
    return [name for name in found if name.rpartition(".")[2] in names]
