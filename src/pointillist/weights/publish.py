"""Weights leave the trainer: one safetensors file a version, written atomically."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from pointillist.base.digests import DIGESTS_FILE, digest_of, write_digests
from pointillist.base.files import write_atomically
from pointillist.errors import TrainingError
from pointillist.runs.paths import WEIGHTS_FILE


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Checks trained weights before they leave the trainer.

    Args:
        weights: All weights by name, of any shape.

    Raises:
        TrainingError: A value is not finite.
    """
    if broken := [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]:
        raise TrainingError(
            f"{len(broken)} of {len(weights)} weights have values that are not finite, the first is {broken[0]}: "
            "training has diverged"
        )


def write_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a full state dict and its `digests.json`; tensors that share memory (tied embeddings) are written once.

    Args:
        weights: All weights by name, of any shape, type and device.
        folder: Folder of the version; it then holds `model.safetensors`.
    """
    seen: set[int] = set()
    unique: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            unique[name] = tensor.detach().cpu().contiguous()
    data = save(unique)
    (folder / DIGESTS_FILE).unlink(missing_ok=True)  # of other weights of this version: it would call these corrupt
    write_atomically(folder / WEIGHTS_FILE, data)
    write_digests(folder, {WEIGHTS_FILE: digest_of(data)})
