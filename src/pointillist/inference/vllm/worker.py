"""An extension of vLLM's workers: it loads the trainer's weights."""

from pathlib import Path
from typing import Protocol

from torch import nn

from pointillist.weights.load import read_copy, read_weights, this_machine
from pointillist.weights.vllm_interface import VllmConfig


class _ModelRunner(Protocol):
    def get_model(self) -> nn.Module:
        """The model, of vLLM's own class."""
        ...


class WeightsWorker:
    """Mixed into vLLM's worker by `--worker-extension-cls`."""

    model_runner: _ModelRunner
    vllm_config: VllmConfig

    def pointillist_load_weights(self, folder: str, sha256: str, copy: str, machine: str) -> None:
        """Loads a state dict in checkpoint names, in place; caches are the caller's to reset.

        Not `model_runner.reload_weights`: that would empty the workers' encoder cache behind the back of the scheduler,
        which then asks for an entry that is gone and dies.

        Args:
            folder: Folder with a `model.safetensors`.
            sha256: Digest of that file when it was checked.
            copy: Path of what was checked, in the memory of the process that checked it: the workers of one machine map
                it, where a copy in each of them might not fit.
            machine: Machine of that process; a worker on another one reads the folder.

        Raises:
            InferenceError: It has changed since then.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        weights = read_copy(copy) if machine == this_machine() else read_weights(Path(folder), sha256=sha256)
        model = self.model_runner.get_model()
        reload_weights(
            self.vllm_config,
            model,
            weights_iterator=iter(weights.items()),
            weights_path=None,
            is_checkpoint_format=True,
        )
        # An output layer that is tied to the embedding loads nothing of its own, so the reload leaves it alone; on a
        # CPU it computes with a packed copy of the weight, which would stay the old one.
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
