"""What a step of the trainer promises beside its loss: clipping, schedule, staleness, the limit on lost images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pointillist.base.jsonl import read_jsonl
from pointillist.config.shared import ModelConfig
from pointillist.config.trainer import LossConfig, SchedulerConfig, TrainerConfig
from pointillist.errors import TrainingError
from pointillist.families import Family
from pointillist.images import ImageStore
from pointillist.orchestrator.packing import pack
from pointillist.runs.paths import RunPaths
from pointillist.trainer.checkpoint import Checkpoints
from pointillist.trainer.loss import policy_gradient_loss
from pointillist.trainer.parallel import Ranks
from pointillist.trainer.train import Trainer, _schedule
from pointillist.transport import FilesystemSender, RankBatch, TrainingSample
from tests.helpers.made_samples import trained_sample


def _trainer(model_dir: Path, run: Path, store: ImageStore, samples: list[TrainingSample], **fields: object) -> Trainer:
    """A trainer whose first step's batch is there."""
    ((row,),) = pack(samples, seq_len=512, num_workers=1)
    batch = RankBatch(step=1, micro_batches=[row], num_tokens=sum(row.loss_mask), orchestrator_state=b"{}")
    FilesystemSender(RunPaths(run)).send([batch])
    config = TrainerConfig.model_validate(
        {"model": ModelConfig(name=str(model_dir)), "output_dir": run, "seq_len": 512, "max_steps": 1, **fields}
    )
    config.multimodal.offload_dir = str(store.root)
    config.loss.ratio_low, config.loss.ratio_high = 0.0, 1e6  # the samples' logprobs are made up
    return Trainer(config)


def test_gradients_are_clipped(model_dir: Path, family: Family, store: ImageStore, tmp_path: Path) -> None:
    samples = [trained_sample(family, store, [(64, 64)], seed=1)]
    trainer = _trainer(model_dir, tmp_path, store, samples, optim={"max_grad_norm": 0.01})
    trainer.run()
    (said,) = read_jsonl(RunPaths(tmp_path).metrics / "trainer.jsonl")
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.norm() for p in trainer.policy.parameters() if p.grad is not None])
    )
    assert said["optim/grad_norm"] > 0.1  # the control: what came before the clipping, which is what is reported
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def _steps(run: Path, trainer: Trainer, samples: list[TrainingSample]) -> list[dict[str, float]]:
    """Metrics of two steps on the same batch."""
    ((row,),) = pack(samples, seq_len=512, num_workers=1)
    batch = RankBatch(step=2, micro_batches=[row], num_tokens=sum(row.loss_mask), orchestrator_state=b"{}")
    FilesystemSender(RunPaths(run)).send([batch])
    trainer.run()
    return read_jsonl(RunPaths(run).metrics / "trainer.jsonl")


def test_a_step_has_gradients_of_its_own_batch_alone(
    model_dir: Path, family: Family, store: ImageStore, tmp_path: Path
) -> None:
    """With weights that hardly move, the same batch twice has the same gradient twice, and not its double."""
    samples = [trained_sample(family, store, [], seed=1)]
    trainer = _trainer(model_dir, tmp_path, store, samples, max_steps=2, optim={"lr": 1e-12, "weight_decay": 0.0})
    first, second = _steps(tmp_path, trainer, samples)
    assert second["optim/grad_norm"] == pytest.approx(first["optim/grad_norm"], rel=1e-3)


def test_the_reference_is_the_model_that_training_began_with(
    model_dir: Path, family: Family, store: ImageStore, tmp_path: Path
) -> None:
    samples = [trained_sample(family, store, [(64, 64)], seed=1)]
    fields = {"optim": {"lr": 0.01}, "loss": {"kl_coef": 0.1}}
    trainer = _trainer(model_dir, tmp_path, store, samples, max_steps=2, **fields)
    first, second = _steps(tmp_path, trainer, samples)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-3


@pytest.mark.parametrize(("version", "stale"), [(0, 0.0), (-3, 3.0)])
def test_staleness_is_counted_from_the_weights_that_the_step_began_with(
    version: int, stale: float, model_dir: Path, family: Family, store: ImageStore, tmp_path: Path
) -> None:
    """Step 1 is trained on the weights of version 0: a token sampled with them is not stale."""
    sample = trained_sample(family, store, [], seed=1)
    sample.weight_versions = [version if on else -1 for on in sample.loss_mask]
    _trainer(model_dir, tmp_path, store, [sample]).run()
    (said,) = read_jsonl(RunPaths(tmp_path).metrics / "trainer.jsonl")
    assert (said["off_policy/mean"], said["off_policy/max"]) == (stale, stale)


@pytest.mark.parametrize("kind", ["missing", "corrupt"])
def test_too_many_lost_images_stop_the_run(
    kind: str, model_dir: Path, family: Family, store: ImageStore, tmp_path: Path
) -> None:
    samples = [trained_sample(family, store, [(64, 64)], seed=seed) for seed in (1, 2)]
    lost = Path(samples[0].mm_refs.images[0].uri.removeprefix("file://"))
    lost.unlink() if kind == "missing" else lost.write_bytes(b"rotten")
    few = {"missing_image_max_fraction": 0.5, "missing_image_retries": 0}
    _trainer(model_dir, tmp_path / "half", store, samples, multimodal=few).run()  # half of them is within the limit
    fewer = {**few, "missing_image_max_fraction": 0.4}
    with pytest.raises(TrainingError, match=f"1 of 2 images are {kind}, more than .*max_fraction = 0.4"):
        _trainer(model_dir, tmp_path / "less", store, samples, multimodal=fewer).run()


def test_the_learning_rate_rises_and_falls() -> None:
    """Factors of a linear schedule: warm-up over 4 steps, level, then down to the lowest over the last 5 of 20."""
    factor = _schedule(SchedulerConfig(type="linear", warmup_steps=4, decay_steps=5, min_ratio=0.1), 20)
    factors = [factor(step) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:16] == [1.0] * 12
    assert factors[15:] == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28, 0.1])
    cosine = _schedule(SchedulerConfig(type="cosine", decay_steps=10), 10)
    assert [cosine(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-9)
    constant = _schedule(SchedulerConfig(), 10)
    assert [constant(step) for step in (0, 5, 9)] == [1.0, 1.0, 1.0]


def test_the_mismatch_is_an_estimate_of_kl_of_sampler_and_trainer() -> None:
    """The sampler's mean of k3(trainer - sampler) is KL(sampler || trainer); with the wrong sign it is not."""
    sampler, trainer = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.2, 0.3])
    exact = float((sampler * np.log(sampler / trainer)).sum())
    draws = np.repeat([0, 1, 2], [7, 2, 1])  # each token as often as the sampler draws it
    terms = policy_gradient_loss(
        torch.tensor(np.log(trainer[draws]), requires_grad=True),
        torch.zeros(10),
        torch.tensor(np.log(sampler[draws])),
        torch.zeros(10),
        10,
        LossConfig(),
    )
    assert float(terms.mismatch_kl_sum) / 10 == pytest.approx(exact, rel=1e-6)


def test_a_checkpoint_restores_the_random_state(
    model_dir: Path, family: Family, store: ImageStore, tmp_path: Path
) -> None:
    trainer = _trainer(model_dir, tmp_path, store, [trained_sample(family, store, [], seed=1)])
    checkpoints = Checkpoints(RunPaths(tmp_path), Ranks(torch.device("cpu")), keep_last=1)
    torch.manual_seed(7)
    checkpoints.save(1, trainer.policy, trainer.optimizer, trainer.scheduler, b"{}")
    drawn = torch.rand(3)
    torch.manual_seed(8)
    checkpoints.load(1, trainer.policy, trainer.optimizer, trainer.scheduler)
    assert torch.equal(torch.rand(3), drawn)


def test_a_batch_is_kept_until_the_next_step(
    model_dir: Path, family: Family, store: ImageStore, tmp_path: Path
) -> None:
    """A trainer that dies within a step reads the step's batch again."""
    trainer = _trainer(model_dir, tmp_path, store, [trained_sample(family, store, [], seed=1)])
    trainer.run()
    file = RunPaths(tmp_path).rollout_step(1) / "rank_0.bin"
    assert file.is_file()
    trainer.receiver.discard_before(2)
    assert not file.exists()


def test_a_dummy_row_trains_nothing(family: Family, store: ImageStore) -> None:
    sample = trained_sample(family, store, [(64, 64)], seed=1)
    ranks = pack([sample], seq_len=512, num_workers=2)
    (dummy,) = ranks[1]
    assert dummy.input_ids == sample.token_ids
    assert dummy.mm_refs == sample.mm_refs
    assert not any(dummy.loss_mask)
    assert set(dummy.advantages) == {0.0}
