"""A model with everything that sampler and trainer must agree on: adapter, tokenizer, and the sampling mask."""

import importlib
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError

from pointillist.errors import ConfigError
from pointillist.families import Family, load_family, resolve_model_dir
from pointillist.render import FolderTokenizer, unsampleable_token_ids

_NAMED: Final = 5
"""Weights that an error names."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for use on one device."""

    model: Any
    """The Hugging Face model, in evaluation mode."""
    family: Family
    tokenizer: FolderTokenizer
    unsampleable: torch.Tensor
    """Token ids whose logits sampler and trainer set to minus infinity, int64."""
    device: torch.device


def load_model(
    name: str, *, device: Literal["auto", "cpu", "cuda"], dtype: Literal["float32", "bfloat16"]
) -> LoadedModel:
    """Loads a model by the real `from_pretrained`.

    Args:
        name: Folder of the model, or its hub name.
        device: Device of the model; auto takes a GPU if there is one.
        dtype: Type of weights and activations.

    Raises:
        ConfigError: No such model, no family serves it, its weights cannot be loaded, or they are not the model's.
    """
    family = load_family(name)
    tokenizer = FolderTokenizer(resolve_model_dir(name))
    where = pick_device(device)
    model = _from_pretrained(name, getattr(torch, dtype)).to(where).eval()
    vocab_size = model.get_output_embeddings().weight.shape[0]
    mask = torch.tensor(unsampleable_token_ids(family, tokenizer, vocab_size), dtype=torch.int64, device=where)
    return LoadedModel(model, family, tokenizer, mask, where)


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a config means; auto takes a GPU if there is one.

    Raises:
        ConfigError: cuda, but there is no GPU.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no GPU; expected 'cpu' or 'auto'")
    return where


def _torchvision_fails() -> bool:
    """Whether a torchvision is installed that cannot be imported, which transformers does before it needs it."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception:  # an operator that this torch does not have, a symbol that is missing
        return True
    return False


def _from_pretrained(name: str, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        model, found = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except RuntimeError as error:
        if _torchvision_fails():
            raise ConfigError(
                f"the installed torchvision does not fit this torch ({error}): uninstall it (it is not needed), or "
                "install the build that belongs to this torch"
            ) from None
        raise ConfigError(f"model {name!r} cannot be loaded: {error}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {error}") from None
    _check_found(name, found)
    return model


def _check_found(name: str, found: Mapping[str, Collection[Any]]) -> None:
    """Checks that the weights are the model's, all of them: what is missing would begin as random numbers.

    transformers counts neither tied weights nor those that the model's class is known to leave out.
    """
    wrong = [
        *(f"{key} is missing" for key in sorted(found["missing_keys"])),
        *(f"{key} is not a weight of this model" for key in sorted(found["unexpected_keys"])),
        *(f"{key} has shape {list(got)}, expected {list(own)}" for key, got, own in sorted(found["mismatched_keys"])),
        *map(str, found["error_msgs"]),
    ]
    if wrong:
        more = f", and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ConfigError(f"weights of model {name!r} do not fit its config: {'; '.join(wrong[:_NAMED])}{more}")
