"""Weights between trainer and server: one safetensors file a version, written atomically, loaded whole or not."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pointillist.config.run_paths import WEIGHTS_FILE, write_atomically
from pointillist.errors import InferenceError


def write_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a full state dict; tensors that share memory (tied embeddings) are written once."""
    seen: set[int] = set()
    unique: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            unique[name] = tensor.detach().cpu().contiguous()
    write_atomically(folder / WEIGHTS_FILE, save(unique))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict that `write_weights` wrote.

    Raises:
        InferenceError: No such file, or not a safetensors file.
    """
    try:
        return dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise InferenceError(f"weights in {folder} can not be read ({error})") from None


@torch.no_grad()
def copy_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into a model, after checking that they are exactly this model's.

    Raises:
        InferenceError: A name or shape differs; the model keeps its old weights.
    """
    own: dict[str, torch.Tensor] = model.state_dict()
    tied = {name for name in own if name not in weights and _shares_memory(own, name, weights)}
    check_weights_fit(_shapes(own), _shapes(weights), optional=tied)
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def check_weights_fit(
    own: Mapping[str, Sequence[int]], new: Mapping[str, Sequence[int]], *, optional: Collection[str]
) -> None:
    """Checks names and shapes of weights before a model is touched.

    Args:
        own: Shapes of the model's weights.
        new: Shapes of those that are to be loaded.
        optional: Names that either may have without the other: weights that are tied to another one.

    Raises:
        InferenceError: A name or shape differs.
    """
    missing, unknown = own.keys() - new.keys() - set(optional), new.keys() - own.keys() - set(optional)
    if missing or unknown:
        raise InferenceError(
            f"weights do not fit the model: missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
        )
    for name in own.keys() & new.keys():
        if list(own[name]) != list(new[name]):
            raise InferenceError(f"weight {name} has shape {list(new[name])}, expected {list(own[name])}")


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, Sequence[int]]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _shares_memory(own: Mapping[str, torch.Tensor], name: str, weights: Mapping[str, torch.Tensor]) -> bool:
    pointer = own[name].data_ptr()
    return any(own[other].data_ptr() == pointer for other in weights if other in own)
