"""The sampling mask of trainer and embedded server, in vLLM: no vision token, and no id without a token, is sampled."""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

from pointillist.families import load_family, resolve_model_dir
from pointillist.render import FolderTokenizer, unsampleable_token_ids
from pointillist.weights.vllm_interface import VllmConfig


class SamplingMask(LogitsProcessor):
    """Sets the masked logits of every request to minus infinity, before temperature and sampling."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        """Reads the mask from the model folder.

        Args:
            vllm_config: Settings of the engine; they name the model.
            device: Device of the logits.
            is_pin_memory: Unused; vLLM passes it.
        """
        name = vllm_config.model_config.model
        ids = unsampleable_token_ids(
            load_family(name), FolderTokenizer(resolve_model_dir(name)), vllm_config.model_config.get_vocab_size()
        )
        self._masked = torch.tensor(ids, dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Masks `logits`, `(requests, vocab)`, in place."""
        return logits.index_fill_(1, self._masked, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        """No: the likeliest token may be masked."""
        return False

    def update_state(self, batch_update: object) -> None:
        """Nothing: the mask is the same for all requests."""
