"""The training loop.

    receive a step's rows -> materialise -> forward, loss, backward per row -> clip, step -> broadcast weights
    (the first two in a thread, ahead of the others)

Before the first step the trainer proves that its packing does not leak and broadcasts the weights it starts from, so
that the path of the weights is known to work before any rollout is spent on it.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.optim.lr_scheduler import LambdaLR

from pointillist.base.jsonl import append_jsonl
from pointillist.base.system import die_with_parent, resident_mb
from pointillist.config import TrainerConfig
from pointillist.config.trainer import SchedulerConfig
from pointillist.errors import TrainingError
from pointillist.families import resolve_model_dir
from pointillist.models import LoadedModel, load_model, pick_device
from pointillist.pixels import RawImageMaterializer
from pointillist.runs.heartbeat import beating, enter, progress
from pointillist.runs.paths import RunPaths, remove, steps_in
from pointillist.runs.records import Fault, FaultKind, append_fault
from pointillist.trainer.checkpoint import Checkpoints
from pointillist.trainer.feed import RowFeed
from pointillist.trainer.loss import LossTerms, policy_gradient_loss
from pointillist.trainer.options import merge_lora, prepare_model
from pointillist.trainer.packing_check import check_packing
from pointillist.trainer.parallel import Ranks
from pointillist.trainer.policy_model import PolicyModel, TokenStats
from pointillist.trainer.rows import ImageCounts, ImageFault, RowLoader, RowTensors
from pointillist.trainer.stopping import STOPPED, Stop
from pointillist.transport import RankBatch, make_receiver
from pointillist.weights.publish import check_finite, write_weights

logger = logging.getLogger(__name__)

_BROADCASTS_KEPT = 2
_AGREE_SECONDS = 0.5


def train(config: TrainerConfig) -> None:
    """Trains until `max_steps`, or until a batch is the last.

    Raises:
        ConfigError: The model cannot be loaded.
        TrainingError: Packing leaks, the loss is not finite, or a checkpoint is unusable.
        TransportError: A batch that must not be trained.
        RefError: A reference that does not fit its image.
        MissingImageError: A referenced image that is not there.
        SystemExit: 143, after a checkpoint of the last finished step: SIGINT or SIGTERM came.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun gives its ranks sessions of their own: whoever kills it would leave them
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.deterministic)
    stop = Stop()
    stop.at_once = True
    rank = int(os.environ.get("RANK", "0"))
    with beating(RunPaths(config.output_dir.resolve()).state, "trainer", rank), stop.listening():
        enter("load")
        trainer = Trainer(config, stop)
        try:
            trainer.run()
        finally:
            trainer.ranks.close()


class Trainer:
    """One rank of the trainer."""

    def __init__(self, config: TrainerConfig, stop: Stop | None = None) -> None:
        self.config = config
        self.stop = stop or Stop()
        self.paths = RunPaths(config.output_dir.resolve())
        self.ranks = Ranks(pick_device(config.device))  # before loading: it chooses this rank's GPU
        # Weights and optimiser state are float32 whatever the activations are: small updates vanish in bfloat16.
        loaded = load_model(config.model.name, device=config.device, dtype="float32")
        prepare_model(loaded, config)
        self.loaded: LoadedModel = loaded
        self.policy = PolicyModel(loaded)
        self.activations = getattr(torch, config.dtype)
        self.ranks.shard(self.policy, self.activations)
        self.reference = self._frozen_copy() if config.loss.kl_coef > 0 else None
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.policy.parameters() if parameter.requires_grad],
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        self.scheduler = LambdaLR(self.optimizer, _schedule(config.optim.scheduler, config.max_steps))
        self.checkpoints = Checkpoints(self.paths, self.ranks, config.ckpt.keep_last)
        self.loader = RowLoader(
            loaded,
            RawImageMaterializer.for_run(loaded.family, config),
            config.multimodal.missing_image_policy,
            always_images=self.ranks.world_size > 1,
        )
        self.receiver = make_receiver(config.transport, self.paths, self.ranks.rank)
        self.phases: dict[str, float] = {}
        self.step = 0
        self.finished: tuple[int, bytes] | None = None
        """The last finished step that is in no checkpoint, and the orchestrator's state after it."""
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """The loop of this module's docstring."""
        start = self.config.resume_step or 0
        if start:
            self.checkpoints.load(start, self.policy, self.optimizer, self.scheduler)
            logger.info("resumed from step %d", start)
        enter("packing_check")
        with self._autocast():
            proof = check_packing(self.policy, self.loaded)
        self.loader.packed = proof.can_pack
        logger.info(
            "samples are %s: logprobs differ from each alone by %.1e packed, %.1e padded; a leak would by %.1e",
            "packed" if proof.can_pack else "padded, this model cannot keep packed ones apart",
            proof.packed, proof.padded, proof.leaking,
        )  # fmt: skip
        enter("broadcast_weights")
        self._broadcast(start)
        steps = range(start + 1, self.config.max_steps + 1)
        feed = RowFeed(self.receiver, self.loader, steps, self.config.reader.inflight_bytes)
        self.stop.at_once = False
        self.saved_at = time.monotonic()
        for step in steps:
            if self._step(step, feed):
                break
        enter("export")
        self._export()
        self.ranks.barrier()  # a rank that leaves early takes the others' connections with it

    def _step(self, step: int, feed: RowFeed) -> bool:
        """Trains one step; returns whether it is the last."""
        self.phases = dict.fromkeys(("mm_wait", "mm_materialize"), 0.0)
        self.step = step
        started = time.perf_counter()
        with self._phase("wait_for_batch"):
            is_due = self._wait_for_batch(feed)
            batch = feed.batch()
        with self._phase("forward_backward"):
            sums, largest = self._accumulate(batch, feed)
            sums, largest = self.ranks.sum(sums), self.ranks.max(largest)
        self._stop_if_too_many_faults(step, sums)
        with self._phase("optimizer"):
            grad_norm = (
                self._update(batch) if batch.micro_batches else 0.0
            )  # AdamW moves weights without a gradient, too
        with self._phase("broadcast_weights"):
            self._broadcast(step)
        self.finished = step, batch.orchestrator_state
        interval = self.config.ckpt.interval
        is_last = batch.is_last or step == self.config.max_steps
        if is_last or is_due or (interval and step % interval == 0):
            with self._phase("checkpoint"):
                self._save()
        self.phases["step"] = time.perf_counter() - started
        self._report(step, sums, largest, grad_norm)
        self.receiver.discard_before(step)
        return is_last

    def _wait_for_batch(self, feed: RowFeed) -> bool:
        """Waits until every rank has its batch; returns whether a checkpoint is due by time after it.

        The ranks decide together, again and again while one of them has no batch: none begins a step that another one
        does not begin.

        Raises:
            SystemExit: 143: a rank was told to stop. What was finished is saved.
        """
        while True:
            is_ready = feed.wait(_AGREE_SECONDS)
            minutes = (time.monotonic() - self.saved_at) / 60
            agreed = self.ranks.max({"waits": not is_ready, "stops": self.stop.asked, "minutes": minutes})
            if agreed["stops"]:
                self._save()
                logger.info("told to stop: ending")
                raise SystemExit(STOPPED)
            if not agreed["waits"]:
                return agreed["minutes"] >= (self.config.ckpt.interval_minutes or math.inf)

    def _save(self) -> None:
        """Writes a checkpoint of the last finished step, if there is none of it."""
        if self.finished is not None:
            step, orchestrator_state = self.finished
            self.checkpoints.save(step, self.policy, self.optimizer, self.scheduler, orchestrator_state)
            self.finished, self.saved_at = None, time.monotonic()
            logger.info("saved the checkpoint of step %d", step)

    def _accumulate(self, batch: RankBatch, feed: RowFeed) -> tuple[dict[str, float], dict[str, float]]:
        """Gradients of all rows; returns sums and largest values over this rank's trained tokens."""
        self.optimizer.zero_grad()
        sums: dict[str, float] = dict.fromkeys(
            ("loss", "entropy", "mismatch", "mismatch_kl", "ratio", "masked", "kl", "trained", "tokens", "stale"), 0.0
        )
        largest = {"ratio": 0.0, "stale": 0.0}
        counts = ImageCounts()
        for micro_batch in batch.micro_batches:
            progress()
            started = time.perf_counter()
            ready = feed.row()
            self.phases["mm_wait"] += time.perf_counter() - started
            counts.add(ready.counts)
            self._note_faults(batch.step, ready.faults)
            stats, terms, staleness = self._row(ready.tensors, batch)
            if not bool(torch.isfinite(terms.loss)):
                raise TrainingError(
                    f"step {batch.step}: the loss is {float(terms.loss.detach())} on the row of samples "
                    f"{', '.join(micro_batch.sample_ids)}; see their records in {self.paths.rollouts_file(batch.step)}"
                )
            # FSDP averages gradients over the ranks; the loss is a sum over all of them.
            (terms.loss * self.ranks.world_size).backward()
            for name, value in (
                ("loss", terms.loss),
                ("entropy", stats.entropy.sum()),
                ("mismatch", terms.mismatch_sum),
                ("mismatch_kl", terms.mismatch_kl_sum),
                ("ratio", terms.ratio.sum()),
                ("masked", terms.masked_sum),
                ("kl", terms.kl_sum),
                ("stale", staleness.sum()),
            ):
                sums[name] += float(value.detach())
            for name, values in (("ratio", terms.ratio), ("stale", staleness)):
                largest[name] = max([largest[name], *values.tolist()])
            sums["trained"] += len(stats.logprobs)
            sums["tokens"] += len(micro_batch.input_ids)
        if not all(map(math.isfinite, sums.values())):
            raise TrainingError(f"step {batch.step}: loss is not finite ({sums})")
        self.phases["mm_materialize"] = counts.materialize_seconds
        return {**sums, **counts.numbers()}, largest

    def _row(self, row: RowTensors, batch: RankBatch) -> tuple[TokenStats, LossTerms, torch.Tensor]:
        with self._autocast():
            stats: TokenStats = self.policy(row)
            reference = None
            if self.reference is not None:
                with torch.no_grad():
                    reference = self.reference(row).logprobs
        terms = policy_gradient_loss(
            stats.logprobs,
            stats.entropy,
            row.logprobs_sampled,
            row.advantages,
            batch.num_tokens,
            self.config.loss,
            reference,
        )
        return stats, terms, batch.step - 1 - row.weight_versions

    def _note_faults(self, step: int, faults: list[ImageFault]) -> None:
        """Logs and records every fault."""
        for fault in faults:
            logger.warning("step %d, sample %s: %s: %s", step, fault.sample_id, fault.uri, fault.message)
            kind: FaultKind = "corrupt" if fault.corrupt else "missing"
            record = Fault(kind, step, fault.sample_id, fault.sha256, fault.message, fault.uri)
            append_fault(self.paths.faults, record)

    def _stop_if_too_many_faults(self, step: int, sums: dict[str, float]) -> None:
        """A few lost images are weather; many are a store that is not mounted."""
        limit = self.config.multimodal.missing_image_max_fraction
        for kind in ("missing", "corrupt"):
            if sums[f"images_{kind}"] > limit * sums["images_total"]:
                raise TrainingError(
                    f"step {step}: {sums[f'images_{kind}']:.0f} of {sums['images_total']:.0f} images are {kind}, more "
                    f"than multimodal.missing_image_max_fraction = {limit}"
                )

    def _update(self, batch: RankBatch) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not bool(torch.isfinite(norm)):
            samples = [name for micro_batch in batch.micro_batches for name in micro_batch.sample_ids]
            raise TrainingError(
                f"step {batch.step}: the gradient norm is {float(norm)}; samples of rank {self.ranks.rank}: "
                f"{', '.join(samples)}"
            )
        self.optimizer.step()
        self.scheduler.step()
        return float(norm)

    def _weights(self) -> dict[str, torch.Tensor]:
        """Whole, as the model without adapters has them; empty on all ranks but the main one."""
        weights = self.ranks.full_state_dict(self.policy)
        return weights if self.config.lora is None else merge_lora(weights, self.config.lora)

    def _broadcast(self, version: int) -> None:
        weights = self._weights()
        if self.ranks.is_main:
            try:
                check_finite(weights)
            except TrainingError as error:
                raise TrainingError(f"weight version {version} is not broadcast: {error}") from None
            write_weights(weights, self.paths.broadcast_step(version))
            for old in steps_in(self.paths.broadcasts)[:-_BROADCASTS_KEPT]:
                remove(self.paths.broadcast_step(old))

    def _export(self) -> None:
        """The trained model as a folder that `from_pretrained` loads."""
        weights = self._weights()
        if self.ranks.is_main:
            self.loaded.model.save_pretrained(self.paths.model, state_dict=weights)
            for file in resolve_model_dir(self.config.model.name).glob("*"):
                if file.suffix in (".json", ".jinja", ".txt", ".model") and not (self.paths.model / file.name).exists():
                    shutil.copy(file, self.paths.model / file.name)

    def _report(self, step: int, sums: dict[str, float], largest: dict[str, float], grad_norm: float) -> None:
        if not self.ranks.is_main:
            return
        trained = max(sums["trained"], 1.0)
        metrics = {
            "step": step,
            "loss": sums["loss"],
            "entropy": sums["entropy"] / trained,
            "mismatch/mean_abs": sums["mismatch"] / trained,
            "mismatch/kl": sums["mismatch_kl"] / trained,
            "ratio/mean": sums["ratio"] / trained,
            "ratio/max": largest["ratio"],
            "ratio/masked": sums["masked"] / trained,
            "kl": sums["kl"] / trained,
            "off_policy/mean": sums["stale"] / trained,
            "off_policy/max": largest["stale"],
            "optim/grad_norm": grad_norm,
            "optim/lr": self.scheduler.get_last_lr()[0],
            "tokens/trained": sums["trained"],
            "tokens/total": sums["tokens"],
            "tokens/per_second": sums["tokens"] / self.phases["step"],
            "mm/images_total": sums["images_total"],
            "mm/images_materialized": sums["images_materialized"],
            "mm/images_decoded": sums["images_decoded"],
            "mm/images_per_second": sums["images_materialized"] / max(sums["materialize_seconds"], 1e-9),
            "mm/hit_rate": 1 - sums["images_decoded"] / max(sums["images_total"], 1.0),
            "mm/bytes": sums["image_bytes"],
            "mm/images_constant": sums["images_constant"],
            "mm/images_missing": sums["images_missing"],
            "mm/samples_zeroed": sums["samples_zeroed"],
            "mm/samples_quarantined": sums["samples_quarantined"],
            "memory/resident_mb": resident_mb(),
            **{f"time/{name}": seconds for name, seconds in self.phases.items()},
        }
        append_jsonl(self.paths.metrics / "trainer.jsonl", metrics)
        logger.info(
            "step %d: loss %.4f, entropy %.3f, mismatch %.1e, grad norm %.2f, %.2f s",
            step, metrics["loss"], metrics["entropy"], metrics["mismatch/mean_abs"], grad_norm, metrics["time/step"],
        )  # fmt: skip

    def _frozen_copy(self) -> PolicyModel:
        """The initial model, for the KL term; sharded and computed as the policy is."""
        loaded = load_model(self.config.model.name, device=self.config.device, dtype="float32")
        reference = PolicyModel(loaded)
        reference.requires_grad_(False)
        self.ranks.shard(reference, self.activations)
        return reference

    def _autocast(self) -> torch.autocast:
        on = self.activations != torch.float32 and self.ranks.world_size == 1
        return torch.autocast(self.loaded.device.type, dtype=self.activations, enabled=on)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        enter(name, step=self.step, waits_for="a batch of the orchestrator" if name == "wait_for_batch" else None)
        started = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - started


def _schedule(config: SchedulerConfig, max_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each step, counted from 0.

    Example:
        Two steps of warm-up, then constant: 1/3, 2/3, 1, 1, ...
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        falling = config.decay_steps or max(1, max_steps - config.warmup_steps)
        done = min(1.0, max(0.0, 1 - (max_steps - step) / falling))
        if config.type == "linear":
            return 1 - (1 - config.min_ratio) * done
        if config.type == "cosine":
            return config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        return 1.0

    return factor
