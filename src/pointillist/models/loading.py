"""A model with everything that sampler and trainer must agree on: adapter, tokenizer, and the sampling mask."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from pointillist.errors import ConfigError
from pointillist.families import Family, load_family, resolve_model_dir
from pointillist.render import FolderTokenizer, unsampleable_token_ids


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
        name: A folder or a hub name.
        device: auto takes a GPU if there is one.
        dtype: Of weights and activations.

    Raises:
        ConfigError: No such model, no family serves it, or its weights can not be loaded.
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


def _from_pretrained(name: str, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
    except RuntimeError as error:
        if "torchvision" in str(error):
            raise ConfigError(
                f"the installed torchvision does not fit this torch ({error}): uninstall it (it is not needed), or "
                "install the build that belongs to this torch"
            ) from None
        raise ConfigError(f"model {name!r} can not be loaded: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} can not be loaded: {error}") from None
