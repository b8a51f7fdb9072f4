"""Checkpoints: everything that a resumed run needs, in one folder that appears whole or not at all.

`checkpoints/step_<n>/` holds the trainer's weights, optimiser, schedule and random state (torch.distributed
checkpoint, so the number of ranks may change) and the orchestrator's state after the same step, which came with the
step's batch. There is one writer, so there is no step of which only a half exists. `digests.json` is written last; a
checkpoint whose bytes are not those it names is not loaded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pointillist.base.digests import fault_in, move_sealed, seal_folder, take_note
from pointillist.errors import TrainingError
from pointillist.runs.paths import ORCHESTRATOR_STATE, RunPaths, remove, steps_in
from pointillist.trainer.parallel import Ranks


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, paths: RunPaths, ranks: Ranks, keep_last: int) -> None:
        self._paths = paths
        self._ranks = ranks
        self._keep_last = keep_last

    def save(
        self,
        step: int,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        orchestrator_state: bytes,
    ) -> None:
        """Writes the checkpoint of a step and removes the oldest ones."""
        final = self._paths.checkpoint_step(step)
        temporary = final.with_name(f".{final.name}.tmp")
        if self._ranks.is_main:
            remove(temporary)
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state = {
            "model": model_state,
            "optimizer": optimizer_state,
            "scheduler": scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }
        with _quiet():
            dcp.save(state, checkpoint_id=temporary / "trainer", no_dist=self._ranks.world_size == 1)
        if self._ranks.is_main:
            (temporary / ORCHESTRATOR_STATE).write_bytes(orchestrator_state)
            seal_folder(temporary)
            remove(final)
            move_sealed(temporary, final)
            done = [old for old in steps_in(self._paths.checkpoints) if old <= step]
            for old in done[: -self._keep_last]:
                remove(self._paths.checkpoint_step(old))
        self._ranks.barrier()

    def load(self, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Restores the state after a step.

        Raises:
            TrainingError: No such checkpoint, a damaged one, or one of another model.
        """
        folder = self._paths.checkpoint_step(step)
        fault = None
        if self._ranks.is_main and not take_note(self._paths.checkpoint_note(step), folder):
            fault = fault_in(folder)  # all of it is read: the launcher has not just done so
        if self._ranks.max({"fault": float(fault is not None)})["fault"]:  # all ranks end together
            raise TrainingError(f"no whole checkpoint at {folder}: {fault or 'the main rank says why'}")
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state: dict[str, Any] = {
            "model": model_state,
            "optimizer": optimizer_state,
            "scheduler": scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }
        try:
            with _quiet():
                dcp.load(state, checkpoint_id=folder / "trainer", no_dist=self._ranks.world_size == 1)
        except CheckpointException as error:  # of any rank; a BaseException, with the whole traceback for a text
            (cause, _), *_others = error.failures.values()
            raise TrainingError(f"checkpoint {folder} does not fit this model ({cause})") from None
        set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides torch's remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
