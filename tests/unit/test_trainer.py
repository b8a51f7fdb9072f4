"""The trainer's numbers against plain Hugging Face forwards and plain formulas."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pointillist.config.trainer import LossConfig
from pointillist.errors import InferenceError, MissingImageError, TrainingError
from pointillist.families import Family
from pointillist.images import ImageLimits, ImageStore
from pointillist.models import LoadedModel, load_model
from pointillist.orchestrator.packing import pack
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.cache import LoadedImage
from pointillist.runs.paths import RunPaths
from pointillist.trainer import packing_check
from pointillist.trainer.checkpoint import Checkpoints
from pointillist.trainer.loss import policy_gradient_loss
from pointillist.trainer.parallel import Ranks
from pointillist.trainer.policy_model import PolicyModel
from pointillist.trainer.rows import RowLoader
from pointillist.transport import TrainingSample
from pointillist.weights.load import copy_weights, read_weights
from pointillist.weights.publish import write_weights
from tests.helpers.made_samples import trained_sample


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedModel:
    return load_model(str(model_dir), device="cpu", dtype="float32")


def _samples(family: Family, store: ImageStore) -> list[TrainingSample]:
    sizes = [[(64, 64)], [], [(100, 70), (64, 96)], [(64, 64), (64, 64)]]
    return [trained_sample(family, store, each, seed=10 * index) for index, each in enumerate(sizes)]


def _huggingface_logprobs(
    model_dir: Path, loaded: LoadedModel, sample: TrainingSample, store: ImageStore, *, blank: bool
) -> torch.Tensor:
    """Logprobs of the trained tokens from the sample alone, by the model's own processor and positions."""
    from transformers import AutoImageProcessor

    model = AutoModelForImageTextToText.from_pretrained(model_dir).eval()
    ids = torch.tensor([sample.token_ids])
    kwargs = {}
    if sample.mm_refs is not None:
        from PIL import Image

        pictures = [Image.open(image.uri.removeprefix("file://")).convert("RGB") for image in sample.mm_refs.images]
        if blank:
            pictures = [Image.new("RGB", each.size) for each in pictures]
        kwargs = dict(AutoImageProcessor.from_pretrained(model_dir)(images=pictures, return_tensors="pt"))
        kwargs["mm_token_type_ids"] = torch.tensor([sample.mm_token_type_ids]).int()
    with torch.no_grad():
        logits = model(input_ids=ids, **kwargs).logits[0]
    logits[:, loaded.unsampleable] = float("-inf")
    logprobs = (logits / 0.7).log_softmax(-1)
    where = torch.tensor([index for index, on in enumerate(sample.loss_mask) if on])
    return logprobs[where - 1].gather(1, ids[0, where, None])[:, 0]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_equal_huggingface_alone(
    packed: bool, model_dir: Path, loaded: LoadedModel, family: Family, store: ImageStore
) -> None:
    samples = _samples(family, store)
    ((row,),) = pack(samples, seq_len=512, num_workers=1)
    loader = RowLoader(loaded, RawImageMaterializer(family, [store.root], ImageLimits()))
    loader.packed = packed
    with torch.no_grad():
        stats = PolicyModel(loaded)(loader.load(row))
    by_id = {sample.sample_id: sample for sample in samples}
    order = [by_id[name] for name in row.sample_ids]
    expected = torch.cat([_huggingface_logprobs(model_dir, loaded, each, store, blank=False) for each in order])
    assert (stats.logprobs - expected).abs().max() < 1e-5
    assert bool((stats.entropy > 0).all())
    assert loader.take_counts()[0].images_materialized == 5
    # The control: blank pictures must give other numbers.
    blank = torch.cat([_huggingface_logprobs(model_dir, loaded, each, store, blank=True) for each in order])
    assert (stats.logprobs - blank).abs().max() > 0.01


def test_equal_images_of_a_row_are_materialised_once(loaded: LoadedModel, family: Family, store: ImageStore) -> None:
    samples = [trained_sample(family, store, [(64, 64)], seed=0) for _ in range(4)]
    ((row,),) = pack(samples, seq_len=512, num_workers=1)
    loader = RowLoader(loaded, RawImageMaterializer(family, [store.root], ImageLimits()))
    tensors = loader.load(row)
    assert loader.take_counts()[0].images_materialized == 1
    assert tensors.image_index == [0, 0, 0, 0]


def _damage(sample: TrainingSample, kind: str) -> None:
    path = Path(sample.mm_refs.images[-1].uri.removeprefix("file://"))
    if kind == "corrupt":
        path.write_bytes(path.read_bytes()[:-3])
        return
    path.unlink()
    if kind == "a folder":
        path.mkdir()


@pytest.mark.parametrize("kind", ["missing", "a folder", "corrupt"])
def test_a_faulty_image_costs_its_own_sample_only(
    kind: str, loaded: LoadedModel, family: Family, store: ImageStore
) -> None:
    samples = _samples(family, store)
    ((row,),) = pack(samples, seq_len=512, num_workers=1)
    materializer = RawImageMaterializer(family, [store.root], ImageLimits(), cache_bytes=0)
    with torch.no_grad():
        whole = PolicyModel(loaded)(RowLoader(loaded, materializer).load(row)).logprobs
    _damage(samples[2], kind)
    loader = RowLoader(loaded, materializer)
    with torch.no_grad():
        tensors = loader.load(row)
        damaged = PolicyModel(loaded)(tensors).logprobs
    place = row.sample_ids.index(samples[2].sample_id)
    kept = [index for index in range(20) if index // 5 != place]
    torch.testing.assert_close(damaged, whole[kept], rtol=0, atol=1e-5)
    counts, faults = loader.take_counts()
    assert (counts.images_missing, counts.images_corrupt) == ((0, 1) if kind == "corrupt" else (1, 0))
    assert (counts.samples_zeroed, counts.samples_quarantined) == ((0, 1) if kind == "corrupt" else (1, 0))
    assert counts.images_constant == 0  # the zeros that hold its place are not a picture
    assert [(fault.sample_id, fault.corrupt) for fault in faults] == [(samples[2].sample_id, kind == "corrupt")]
    assert loader.take_counts()[0].images_total == 0


def test_whatever_a_decoder_raises_is_the_fault_of_its_image(
    loaded: LoadedModel, family: Family, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (trained_sample(family, store, [(64, 64)], seed=seed) for seed in (1, 2))
    ((row,),) = pack([good, bad], seq_len=512, num_workers=1)
    materializer = RawImageMaterializer(family, [store.root], ImageLimits())
    read = materializer._read

    def failing(root: Path, name: str) -> LoadedImage:
        if bad.mm_refs.images[0].hash in name:
            raise ZeroDivisionError("of a decoder")
        return read(root, name)

    monkeypatch.setattr(materializer, "_read", failing)
    loader = RowLoader(loaded, materializer)
    assert len(loader.load(row).targets) == 5
    (fault,) = loader.take_counts()[1]
    assert (fault.sample_id, fault.corrupt) == (bad.sample_id, True)
    assert "ZeroDivisionError: of a decoder" in fault.message


def test_missing_images_stop_the_loader_if_asked_to(loaded: LoadedModel, family: Family, store: ImageStore) -> None:
    sample = trained_sample(family, store, [(64, 64)], seed=0)
    _damage(sample, "missing")
    ((row,),) = pack([sample], seq_len=512, num_workers=1)
    materializer = RawImageMaterializer(family, [store.root], ImageLimits())
    with pytest.raises(MissingImageError):
        RowLoader(loaded, materializer, "error").load(row)


def test_a_row_without_any_loss_still_has_a_gradient(loaded: LoadedModel, family: Family, store: ImageStore) -> None:
    sample = trained_sample(family, store, [(64, 64)], seed=0)
    _damage(sample, "missing")
    ((row,),) = pack([sample], seq_len=512, num_workers=1)
    stats = PolicyModel(loaded)(RowLoader(loaded, RawImageMaterializer(family, [store.root], ImageLimits())).load(row))
    assert len(stats.logprobs) == 0
    stats.logprobs.sum().backward()


def test_packing_proof_sees_a_leak(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = packing_check.check_packing(PolicyModel(loaded), loaded)
    assert proof.can_pack
    assert max(proof.packed, proof.padded) < 1e-4
    assert proof.leaking > 0.01
    original = packing_check.assemble_row

    def leaking_row(*arguments: object, packed: bool) -> object:
        row = original(*arguments, packed=packed)
        if not packed:
            return row
        positions = row.position_ids.clone()
        positions[0] = torch.arange(positions.shape[-1])
        return dataclasses.replace(row, position_ids=positions)

    monkeypatch.setattr(packing_check, "assemble_row", leaking_row)
    assert not packing_check.check_packing(PolicyModel(loaded), loaded).can_pack
    monkeypatch.setattr(packing_check, "assemble_row", lambda *arguments, packed: leaking_row(*arguments, packed=True))
    with pytest.raises(TrainingError, match="see each other"):
        packing_check.check_packing(PolicyModel(loaded), loaded)


def test_loss_is_the_formula() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -1.8, -2.5, -1.0])
    advantages = torch.tensor([1.0, -0.5, 2.0, 1.0])
    reference = torch.tensor([-1.2, -2.0, -0.7, -2.0])
    entropy = torch.tensor([0.5, 1.0, 1.5, 2.0], requires_grad=True)
    config = LossConfig(ratio_low=0.5, ratio_high=2.0, kl_coef=0.1, entropy_coef=0.02)
    terms = policy_gradient_loss(logprobs, entropy, sampler, advantages, 10, config, reference)
    ratio = np.exp(np.array([0.0, -0.2, 2.0, -2.0]))
    inside = (ratio >= 0.5) & (ratio <= 2.0)
    difference = np.array([-0.2, 0.0, -0.2, 1.0])
    kl = np.exp(difference) - difference - 1
    expected = (-(ratio * advantages.numpy() * inside) + 0.1 * kl).sum() / 10 - 0.02 * 5.0 / 10
    assert float(terms.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(terms.masked_sum) == 2
    assert float(terms.mismatch_sum) == pytest.approx(4.2, rel=1e-5)
    terms.loss.backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.002] * 4)
    # On policy, inside the band: the gradient is that of REINFORCE (and of the KL term).
    assert float(logprobs.grad[0]) == pytest.approx((-1.0 + 0.1 * (1 - np.exp(-0.2))) / 10, rel=1e-5)
    # Masked: only the KL term is left.
    assert float(logprobs.grad[3]) == pytest.approx(0.1 * (1 - np.exp(1.0)) / 10, rel=1e-5)


def test_weights_travel_whole_or_not_at_all(loaded: LoadedModel, model_dir: Path, tmp_path: Path) -> None:
    other = load_model(str(model_dir), device="cpu", dtype="float32")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)
    write_weights(loaded.model.state_dict(), tmp_path / "step_1")
    weights = read_weights(tmp_path / "step_1")
    copy_weights(other.model, weights)
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    name = next(iter(weights))
    for bad in (
        {**weights, name: torch.zeros(3)},
        {**weights, "x": torch.zeros(1)},
        {k: v for k, v in weights.items() if k != name},
    ):
        with pytest.raises(InferenceError):
            copy_weights(other.model, bad)
    for key, tensor in other.model.state_dict().items():
        torch.testing.assert_close(before[key], tensor, rtol=0, atol=0)
    with pytest.raises(InferenceError):
        read_weights(tmp_path / "step_2")
    (tmp_path / "step_1" / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(InferenceError):
        read_weights(tmp_path / "step_1")


@pytest.mark.slow
def test_checkpoints_restore_everything(model_dir: Path, tmp_path: Path) -> None:
    ranks = Ranks(torch.device("cpu"))
    checkpoints = Checkpoints(RunPaths(tmp_path), ranks, keep_last=1)

    def fresh() -> tuple[PolicyModel, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        policy = PolicyModel(load_model(str(model_dir), device="cpu", dtype="float32"))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        return policy, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def advance(policy: PolicyModel, optimizer: torch.optim.Optimizer, scheduler: object, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            sum((parameter**2).sum() for parameter in policy.parameters()).backward()
            optimizer.step()
            scheduler.step()

    policy, optimizer, scheduler = fresh()
    advance(policy, optimizer, scheduler, 2)
    checkpoints.save(1, policy, optimizer, scheduler, b'{"task_position": 16}')
    checkpoints.save(2, policy, optimizer, scheduler, b'{"task_position": 32}')
    assert [path.name for path in RunPaths(tmp_path).checkpoints.iterdir()] == ["step_2"]
    advance(policy, optimizer, scheduler, 2)
    resumed = fresh()
    checkpoints.load(2, *resumed)
    advance(*resumed, 2)
    for mine, theirs in zip(policy.parameters(), resumed[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        checkpoints.load(7, *resumed)
