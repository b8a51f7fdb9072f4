"""Checkpoints: everything that a resumed run needs, in one folder that appears whole or not at all.

`checkpoints/step_<n>/` holds the trainer's weights, optimiser, schedule and random state (torch.distributed
checkpoint, so the number of ranks may change) and the orchestrator's state after the same step, which came with the
step's batch. There is one writer, so there is no step of which only a half exists. `digests.json` is written last; a
checkpoint whose bytes are not those it names is not loaded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict, cast

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import DictValueType, OptimizerStateType, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_into
from torch.distributed.checkpoint.state_dict_saver import save as save_from
from torch.optim.lr_scheduler import LRScheduler

from pointillist.base.digests import fault_in, move_sealed, seal_folder, take_note
from pointillist.errors import TrainingError
from pointillist.runs.paths import ORCHESTRATOR_STATE, RunPaths, remove, steps_in
from pointillist.trainer.parallel import Ranks


class _TrainerState(TypedDict):
    """What a checkpoint holds of the trainer; torch writes it, and reads it into the tensors that are there."""

    model: DictValueType
    optimizer: OptimizerStateType
    scheduler: dict[str, object]
    random: torch.Tensor


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
        scheduler: LRScheduler,
        orchestrator_state: bytes,
    ) -> None:
        """Writes the checkpoint of a step and removes the oldest ones."""
        final = self._paths.checkpoint_step(step)
        temporary = final.with_name(f".{final.name}.tmp")
        if self._ranks.is_main:
            remove(temporary)
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        state = _state_of(policy, optimizer, scheduler)
        with _quiet():
            save_from(_as_dict(state), checkpoint_id=temporary / "trainer", no_dist=self._ranks.world_size == 1)
        if self._ranks.is_main:
            (temporary / ORCHESTRATOR_STATE).write_bytes(orchestrator_state)
            seal_folder(temporary)
            remove(final)
            move_sealed(temporary, final)
            done = [old for old in steps_in(self._paths.checkpoints) if old <= step]
            for old in done[: -self._keep_last]:
                remove(self._paths.checkpoint_step(old))
        self._ranks.barrier()

    def load(self, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
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
        state = _state_of(policy, optimizer, scheduler)
        try:
            with _quiet():
                load_into(_as_dict(state), checkpoint_id=folder / "trainer", no_dist=self._ranks.world_size == 1)
        except CheckpointException as error:  # of any rank; a BaseException whose text has the whole traceback
            (cause, _), *_others = error.failures.values()
            raise TrainingError(f"checkpoint {folder} does not fit this model ({cause})") from None
        set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])


def _state_of(policy: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> _TrainerState:
    """The trainer's state as it is; the tensors are those in use."""
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
    }


def _as_dict(state: _TrainerState) -> dict[str, object]:
    """The same dict, as torch's functions take it; `load_into` puts what it has read into it."""
    return cast(dict[str, object], state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides torch's remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
