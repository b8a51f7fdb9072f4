"""A model folder whose weights are not those of its config is refused by name: what is missing would be random."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pointillist.errors import ConfigError
from pointillist.models import load_model

Weights = dict[str, torch.Tensor]
LAYER = "model.language_model.layers.1.mlp"


def _without(weights: Weights) -> Weights:
    return {name: each for name, each in weights.items() if not name.startswith(LAYER)}


def _cut(weights: Weights) -> Weights:
    return {**weights, f"{LAYER}.up_proj.weight": weights[f"{LAYER}.up_proj.weight"][:-1].contiguous()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without, rf"{LAYER}.down_proj.weight is missing; {LAYER}.gate_proj.weight is missing"),
        (_cut, rf"{LAYER}.up_proj.weight has shape \[\d+, \d+\], expected \[\d+, \d+\]"),
        (lambda weights: {**weights, "model.extra": torch.zeros(3)}, r"model.extra is not a weight of this model"),
        (lambda weights: {"x": torch.zeros(1)}, r"is missing.*, and \d+ more"),
    ],
)
def test_a_folder_with_other_weights_is_refused(
    model_dir: Path, tmp_path: Path, change: Callable[[Weights], Weights], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=said):
        load_model(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, None])
def test_a_damaged_file_of_weights_is_refused(model_dir: Path, tmp_path: Path, data: bytes | None) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()  # the copy may be a link
    file.write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_a_tied_weight_may_be_left_out_or_stand_there(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    for each in (weights, load_file(model_dir / "model.safetensors")):
        save_file(each, folder / "model.safetensors", metadata={"format": "pt"})
        load_model(str(folder), device="cpu", dtype="float32")
