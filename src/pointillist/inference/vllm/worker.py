"""What each vLLM worker can do more: load the trainer's weights."""

from pathlib import Path
from typing import Any

from pointillist.models.weights import read_weights


class WeightsWorker:
    """Mixed into vLLM's worker by `--worker-extension-cls`."""

    model_runner: Any
    vllm_config: Any

    def pointillist_load_weights(self, folder: str) -> None:
        """Loads a state dict in checkpoint names, in place; caches are the caller's to reset.

        Not `model_runner.reload_weights`: that would empty the workers' encoder cache behind the back of the scheduler,
        which then asks for an entry that is gone and dies.

        Args:
            folder: Holds a `model.safetensors`.
        """
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        weights = read_weights(Path(folder))
        reload_weights(
            self.vllm_config,
            self.model_runner.get_model(),
            weights_iterator=iter(weights.items()),
            weights_path=None,
            is_checkpoint_format=True,
        )
