"""Data-parallel ranks: process group, FSDP2 sharding, and the few collectives that training needs.

With one rank nothing here does anything: the same training loop runs on a laptop.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pointillist.trainer.policy_model import PolicyModel


class Ranks:
    """This process among its peers, as torchrun's environment variables say."""

    def __init__(self, device: torch.device) -> None:
        """Joins the process group if there is more than one rank."""
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        if self.world_size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def shard(self, policy: nn.Module, dtype: torch.dtype) -> None:
        """Shards weights, gradients and optimiser state over the ranks: one unit a layer, the rest in the root.

        Args:
            policy: Model whose weights are float32, as the reduction of its gradients will be.
            dtype: Type of activations.
        """
        if self.world_size == 1:
            return
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in policy.modules():
            if type(module).__name__.endswith(("DecoderLayer", "VisionBlock")):
                fully_shard(module, mp_policy=precision)
        # Temperatures are an input of the root: in bfloat16 0.7 would be 0.699.
        fully_shard(policy, mp_policy=replace(precision, cast_forward_inputs=False))

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums of each value over all ranks; every rank gives the same names in the same order.

        Example:
            `{"tokens": 3.0}` on one rank and `{"tokens": 5.0}` on the other: `{"tokens": 8.0}` on both.
        """
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Mapping[str, float]) -> dict[str, float]:
        """The largest of each value over all ranks; every rank gives the same names in the same order."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def full_state_dict(self, policy: PolicyModel) -> dict[str, torch.Tensor]:
        """The model's weights, whole and on the CPU, under the model's own names; empty on all ranks but the main one.

        With one rank they share the model's memory, on its device.
        """
        if self.world_size == 1:
            return policy.model.state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = cast(dict[str, torch.Tensor], get_model_state_dict(policy, options=options))
        return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}

    def _reduce(self, values: Mapping[str, float], operation: dist.ReduceOp.RedOpType) -> dict[str, float]:
        if self.world_size == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return dict(zip(values, tensor.tolist(), strict=True))

    def close(self) -> None:
        """Leaves the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()
