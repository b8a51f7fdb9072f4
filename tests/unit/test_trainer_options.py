"""Options of the trainer, each against the trainer without it."""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from pointillist.base.jsonl import read_jsonl
from pointillist.config.shared import ModelConfig
from pointillist.config.trainer import LoRAConfig, TrainerConfig
from pointillist.errors import ConfigError, TrainingError
from pointillist.families import Family
from pointillist.images import ImageLimits, ImageStore
from pointillist.models import load_model
from pointillist.orchestrator.packing import pack
from pointillist.pixels import RawImageMaterializer
from pointillist.runs.paths import ORCHESTRATOR_STATE, WEIGHTS_FILE, RunPaths, latest_checkpoint, steps_in
from pointillist.trainer import options
from pointillist.trainer.feed import RowFeed
from pointillist.trainer.packing_check import check_packing
from pointillist.trainer.policy_model import PolicyModel
from pointillist.trainer.rows import RowLoader, RowTensors
from pointillist.trainer.stopping import Stop
from pointillist.trainer.train import Trainer
from pointillist.transport import FilesystemSender, RankBatch
from pointillist.weights.load import read_weights
from pointillist.weights.publish import write_weights
from tests.helpers.made_samples import trained_sample

pytestmark = pytest.mark.slow

LORA = LoRAConfig(rank=4, alpha=12.0)
SIZES = [[(64, 64)], [], [(100, 70), (64, 96)]]


@pytest.fixture
def base(model_dir: Path) -> dict[str, torch.Tensor]:
    """The weights that training begins with."""
    return load_file(model_dir / "model.safetensors")


def _trainer(
    model_dir: Path, run: Path, store: ImageStore, steps: int = 3, stop: Stop | None = None, **extra: Any
) -> Trainer:
    """A trainer of one rank, and its batches: every step one row of samples with and without images."""
    config = TrainerConfig(
        model=ModelConfig(name=str(model_dir)), output_dir=run, seq_len=512, max_steps=steps, **extra
    )
    config.multimodal.offload_dir = str(store.root)
    config.optim.lr = 1e-2
    config.loss.ratio_low, config.loss.ratio_high = 0.0, 1e6  # the samples' logprobs are made up
    trainer = Trainer(config, stop)
    for step in range(1, steps + 1):
        samples = [trained_sample(trainer.loaded.family, store, sizes, 100 * step + n) for n, sizes in enumerate(SIZES)]
        (rows,) = pack(samples, seq_len=512, num_workers=1)
        batch = RankBatch(step=step, micro_batches=rows, num_tokens=15, orchestrator_state=b"{}")
        FilesystemSender(RunPaths(run)).send([batch])
    return trainer


def _first_step(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first batch."""
    feed = RowFeed(trainer.receiver, trainer.loader, [1], 2**30)
    trainer.phases = {"mm_wait": 0.0}
    sums, _ = trainer._accumulate(feed.batch(), feed)
    named = trainer.policy.named_parameters()
    return sums["loss"], {name: each.grad.clone() for name, each in named if each.grad is not None}


def _row(trainer: Trainer, store: ImageStore, sizes: list[list[tuple[int, int]]] = SIZES) -> RowTensors:
    samples = [trained_sample(trainer.loaded.family, store, each, seed) for seed, each in enumerate(sizes)]
    ((row,),) = pack(samples, seq_len=512, num_workers=1)
    return RowLoader(trainer.loaded, RawImageMaterializer(trainer.loaded.family, [store.root], ImageLimits())).load(row)


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are equal bit for bit."""
    return {name for name, weight in one.items() if torch.equal(weight, two[name])}


# --- The end of training


def test_training_ends_with_the_batch_that_is_the_last(model_dir: Path, tmp_path: Path, store: ImageStore) -> None:
    """It is empty: nothing moves, not even by weight decay; it is published, saved and exported like any last one."""
    trainer = _trainer(model_dir, tmp_path, store, optim={"weight_decay": 0.1})
    paths = RunPaths(tmp_path)
    last = RankBatch(step=2, micro_batches=[], num_tokens=9, orchestrator_state=b'{"step": 2}', is_last=True)
    FilesystemSender(paths).send([last])
    trainer.run()
    versions = [load_file(paths.broadcast_step(version) / WEIGHTS_FILE) for version in (1, 2)]
    assert _same(*versions) == versions[0].keys()
    assert latest_checkpoint(paths) == 2
    assert (paths.checkpoint_step(2) / ORCHESTRATOR_STATE).read_bytes() == b'{"step": 2}'
    assert (paths.model / WEIGHTS_FILE).is_file()
    assert [record["tokens/trained"] for record in read_jsonl(paths.metrics / "trainer.jsonl")] == [15, 0]


# --- LoRA


def test_lora_trains_the_adapters_and_publishes_merged_weights(
    model_dir: Path, tmp_path: Path, store: ImageStore, base: dict[str, torch.Tensor]
) -> None:
    trainer = _trainer(model_dir, tmp_path, store, lora=LORA, loss={"kl_coef": 0.1})
    assert trainer.reference is not None
    initial = trainer._weights()
    assert initial.keys() >= base.keys()
    assert _same(base, initial) == base.keys()
    trained = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {each for name, each in trainer.policy.named_parameters() if ".lora_" in name}
    adapters = {name: each.detach().clone() for name, each in trainer.policy.named_parameters() if ".lora_" in name}
    # 2 layers with 7 targets each, A and B; the vision tower has linear layers, but none.
    assert len(adapters) == 28
    assert all("language_model" in name for name in adapters)

    trainer.run()
    live = trainer.policy.state_dict()
    assert not any(torch.equal(live[name], before) for name, before in adapters.items())
    frozen = {name.removeprefix("model."): each for name, each in live.items() if ".lora_" not in name}
    frozen = {name.replace(".base_layer.", "."): each for name, each in frozen.items()}
    assert _same(base, frozen) == base.keys()
    # What servers got: the base at first, then merged weights of the same names, other ones in the targets alone.
    published = read_weights(RunPaths(tmp_path).broadcast_step(3))
    assert published.keys() == base.keys()
    changed = base.keys() - _same(base, published)
    assert len(changed) == 14
    assert {name.split(".")[-2] for name in changed} == set(LORA.target_modules)

    exported = AutoModelForImageTextToText.from_pretrained(RunPaths(tmp_path).model, attn_implementation="sdpa").eval()
    row = _row(trainer, store)
    with torch.no_grad():
        adapted, initial_model = trainer.policy(row).logprobs, trainer.reference(row).logprobs
        merged = PolicyModel(dataclasses.replace(trainer.loaded, model=exported))(row).logprobs
    assert (merged - adapted).abs().max() < 1e-5
    assert (initial_model - adapted).abs().max() > 0.1  # the control; and the reference stayed what it was
    assert _same(base, dict(trainer.reference.model.state_dict())) == base.keys()
    kl = [record["kl"] for record in read_jsonl(RunPaths(tmp_path).metrics / "trainer.jsonl")]
    assert abs(kl[0]) < 1e-6 < kl[-1]


def test_lora_resumes_exactly(model_dir: Path, tmp_path: Path, store: ImageStore) -> None:
    whole = _trainer(model_dir, tmp_path, store, steps=4, lora=LORA, ckpt={"interval": 2})
    whole.run()
    resumed = _trainer(model_dir, tmp_path, store, steps=4, lora=LORA, resume_step=2)
    resumed.run()
    expected = whole.policy.state_dict()
    assert _same(expected, resumed.policy.state_dict()) == expected.keys()
    with pytest.raises(TrainingError, match="does not fit this model"):
        _trainer(model_dir, tmp_path, store, steps=4, resume_step=2).run()


def test_a_damaged_checkpoint_is_not_trained_on(model_dir: Path, tmp_path: Path, store: ImageStore) -> None:
    paths = RunPaths(tmp_path)
    _trainer(model_dir, tmp_path, store, steps=1).run()
    assert latest_checkpoint(paths) == 1
    (data,) = (paths.checkpoint_step(1) / "trainer").glob("*.distcp")
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 0x40
    data.write_bytes(flipped)
    with pytest.raises(TrainingError, match=r"step_1: trainer/__0_0.distcp has other bytes than were written"):
        _trainer(model_dir, tmp_path, store, steps=2, resume_step=1).run()
    with pytest.raises(TrainingError, match=r"step_7: digests.json is not there"):
        _trainer(model_dir, tmp_path, store, steps=8, resume_step=7).run()


def test_checkpoints_come_by_time(
    model_dir: Path, tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(model_dir, tmp_path, store, steps=4, ckpt={"interval_minutes": 10, "keep_last": 9})
    now = [0.0]
    monkeypatch.setattr("pointillist.trainer.train.time.monotonic", lambda: now[0])
    receive = trainer._wait_for_batch

    def wait(feed: RowFeed) -> bool:
        now[0] += 301  # the second and the fourth step begin more than ten minutes after the last checkpoint
        return receive(feed)

    monkeypatch.setattr(trainer, "_wait_for_batch", wait)
    trainer.run()
    assert steps_in(RunPaths(tmp_path).checkpoints) == [2, 4]


def test_a_trainer_that_is_told_to_stop_saves_its_last_finished_step(
    model_dir: Path, tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path)
    stop = Stop()
    trainer = _trainer(model_dir, tmp_path, store, steps=3, stop=stop)
    report = trainer._report
    monkeypatch.setattr(
        trainer, "_report", lambda step, *a: (report(step, *a), stop._ask(15, None) if step == 2 else 0)
    )
    with pytest.raises(SystemExit) as ended:
        trainer.run()
    assert ended.value.code == 143
    assert steps_in(paths.checkpoints) == [2]
    assert len(read_jsonl(paths.metrics / "trainer.jsonl")) == 2
    # One that has done nothing new has nothing to save, and one that waits for a batch does not wait any longer.
    shutil.rmtree(paths.rollouts)
    for start in (None, 2):
        again = _trainer(model_dir, tmp_path, store, steps=3, resume_step=start, stop=stop)
        shutil.rmtree(paths.rollouts)
        with pytest.raises(SystemExit):
            again.run()
        assert steps_in(paths.checkpoints) == [2]


def test_broadcast_weights_have_digests(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2), "b": torch.ones(3)}
    write_weights(weights, tmp_path / "step_0")
    digests = json.loads((tmp_path / "step_0" / "digests.json").read_bytes())
    data = (tmp_path / "step_0" / "model.safetensors").read_bytes()
    expected = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert digests == {"files": {"model.safetensors": expected}}
    # A version that is written again: its digests are those of the new weights.
    write_weights({**weights, "a": torch.zeros(2)}, tmp_path / "step_0")
    assert torch.equal(read_weights(tmp_path / "step_0")["a"], torch.zeros(2))


def test_weights_that_are_not_finite_never_leave(
    model_dir: Path, tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(model_dir, tmp_path, store, steps=2)

    def step() -> None:
        with torch.no_grad():
            next(iter(trainer.policy.parameters())).view(-1)[0] = torch.inf

    monkeypatch.setattr(trainer.optimizer, "step", step)
    with pytest.raises(TrainingError, match=r"weight version 1 is not broadcast: 1 of \d+ weights .* the first is "):
        trainer.run()
    assert steps_in(RunPaths(tmp_path).broadcasts) == [0]
    assert latest_checkpoint(RunPaths(tmp_path)) is None


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_names_step_and_samples(
    model_dir: Path, tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    trainer = _trainer(model_dir, tmp_path, store, steps=2)
    names = [name for rows in [trainer.receiver.receive(1)] for m in rows.micro_batches for name in m.sample_ids]
    if what == "loss":
        row = trainer._row

        def broken(*arguments: Any) -> Any:
            stats, terms, staleness = row(*arguments)
            return stats, dataclasses.replace(terms, loss=terms.loss * torch.nan), staleness

        monkeypatch.setattr(trainer, "_row", broken)
    else:
        next(iter(trainer.policy.parameters())).register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(TrainingError, match=rf"step 1: the {what}.* nan.*{', '.join(names)}"):
        trainer.run()
    assert steps_in(RunPaths(tmp_path).broadcasts) == [0]


def test_adapters_depend_on_the_seed_alone(model_dir: Path, family: Family) -> None:
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        loaded = load_model(str(model_dir), device="cpu", dtype="float32")
        torch.rand(seed + 1)  # ranks may have drawn different numbers before
        options.add_lora(loaded, LORA, seed=5 if seed < 2 else 6)
        return {name: each for name, each in loaded.model.state_dict().items() if ".lora_A." in name}

    first = adapters(0)
    assert _same(first, adapters(1)) == first.keys()
    assert not _same(first, adapters(2))


def test_unknown_targets_are_named(model_dir: Path) -> None:
    loaded = load_model(str(model_dir), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"no linear layers named \['qkv'\], it has \['down_proj', "):
        options.add_lora(loaded, LoRAConfig(target_modules=["q_proj", "qkv"]), seed=0)  # the vision tower has a qkv


# --- Vision frozen


@pytest.mark.parametrize("lora", [None, LORA])
def test_frozen_vision(
    lora: LoRAConfig | None, model_dir: Path, tmp_path: Path, store: ImageStore, base: dict[str, torch.Tensor]
) -> None:
    trainer = _trainer(model_dir, tmp_path, store, freeze_vision=True, lora=lora)
    features = trainer.policy._encode_images(_row(trainer, store))
    layers = [features.pooler_output, *features.deepstack_features]
    assert not any(image.requires_grad for layer in layers for image in layer)
    trainer.run()
    published = read_weights(RunPaths(tmp_path).broadcast_step(3))
    vision = {name for name in base if ".visual." in name}
    assert len(vision) > 20
    assert _same(base, published) >= vision
    assert not all(parameter.requires_grad for parameter in trainer.loaded.model.model.visual.parameters())
    language = base.keys() - vision
    assert len(_same(base, published) & language) < len(language) / 2


def test_vision_is_trained_by_default(
    model_dir: Path, tmp_path: Path, store: ImageStore, base: dict[str, torch.Tensor]
) -> None:
    trainer = _trainer(model_dir, tmp_path, store)
    assert trainer.policy._encode_images(_row(trainer, store)).pooler_output[0].requires_grad
    trainer.run()
    same = _same(base, read_weights(RunPaths(tmp_path).broadcast_step(3)))
    assert not any(".visual." in name for name in same)


# --- Recomputed layers


class _Forwards:
    """Counts how often each layer's MLP is begun: what comes last is not recomputed, nothing needs its result."""

    def __init__(self, trainer: Trainer) -> None:
        layers = [each for each in trainer.loaded.model.modules() if isinstance(each, GradientCheckpointingLayer)]
        self.counts = dict.fromkeys(range(len(layers)), 0)
        for index, layer in enumerate(layers):
            layer.mlp.register_forward_pre_hook(functools.partial(self._count, index))

    def _count(self, index: int, *_: object) -> None:
        self.counts[index] += 1


def test_recomputed_layers_have_the_same_gradients(model_dir: Path, tmp_path: Path, store: ImageStore) -> None:
    plain = _trainer(model_dir, tmp_path / "plain", store, steps=1)
    once = _Forwards(plain)
    loss, gradients = _first_step(plain)
    again = _trainer(model_dir, tmp_path / "again", store, steps=1, activation_checkpointing=True)
    twice = _Forwards(again)
    loss_again, gradients_again = _first_step(again)
    assert loss_again == loss
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert (gradients_again[name] - gradient).abs().max() < 1e-6, name
    assert max(float(each.abs().max()) for each in gradients.values()) > 0.1
    # Two layers of the language model, two blocks of the vision tower.
    assert list(once.counts.values()) == [1] * 4
    assert list(twice.counts.values()) == [2] * 4
    assert not any(module.training for module in again.loaded.model.modules())  # dropout stays off


# --- bfloat16


def test_bfloat16_is_of_activations_alone(model_dir: Path, tmp_path: Path, store: ImageStore) -> None:
    seen: dict[str, set[torch.dtype]] = {"float32": set(), "bfloat16": set()}
    gradients = {}
    for dtype, dtypes in seen.items():
        trainer = _trainer(model_dir, tmp_path / dtype, store, steps=1, dtype=dtype)
        for layer in trainer.loaded.model.model.language_model.layers:
            layer.mlp.register_forward_hook(lambda *given, dtypes=dtypes: dtypes.add(given[-1].dtype))
        _, gradients[dtype] = _first_step(trainer)
        trainer._update(trainer.receiver.receive(1))
        assert {each.dtype for each in trainer.policy.parameters()} == {torch.float32}
        state = [each for one in trainer.optimizer.state.values() for each in one.values()]
        assert len(state) > 50
        assert {each.dtype for each in state} == {torch.float32}
    assert seen == {"float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    exact, rough = (torch.cat([each.flatten() for each in gradients[dtype].values()]) for dtype in seen)
    assert not torch.equal(exact, rough)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99


# --- Compiled layers


@pytest.fixture
def dynamo() -> Iterator[None]:
    """A compiler that knows of nothing yet, and its settings restored."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.mark.integration  # the compiler starts a C++ compiler
@pytest.mark.parametrize("extra", [{}, {"activation_checkpointing": True, "lora": LORA}])
def test_compiled_layers_compute_the_same(
    extra: dict[str, Any], model_dir: Path, tmp_path: Path, store: ImageStore, dynamo: None
) -> None:
    loss, gradients = _first_step(_trainer(model_dir, tmp_path / "eager", store, steps=1, **extra))
    assert counters["stats"]["unique_graphs"] == 0
    compiled = _trainer(model_dir, tmp_path / "compiled", store, steps=1, compile=True, **extra)
    loss_compiled, gradients_compiled = _first_step(compiled)
    assert loss_compiled == pytest.approx(loss, abs=1e-4)
    assert gradients.keys() == gradients_compiled.keys()
    for name, gradient in gradients.items():
        assert (gradients_compiled[name] - gradient).abs().max() < 1e-4, name
    # Both layers share what was compiled (the first one's input needs no gradient if only adapters are trained).
    assert counters["stats"]["unique_graphs"] == (2 if extra else 1)
    assert not counters["graph_break"]
    assert counters["inductor"]


def test_no_kind_of_row_is_left_uncompiled(
    model_dir: Path, tmp_path: Path, store: ImageStore, dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options.torch, "compile", functools.partial(torch.compile, backend="eager"))
    trainer = _trainer(model_dir, tmp_path, store, compile=True, lora=LORA)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        check_packing(trainer.policy, trainer.loaded)
        for packed in (True, False):
            trainer.loader.packed = packed
            for count in (1, 2, 3):
                samples = [trained_sample(trainer.loaded.family, store, sizes, 0) for sizes in SIZES[:count]]
                ((row,),) = pack(samples, seq_len=512, num_workers=1)
                trainer.policy(trainer.loader.load(row)).logprobs.sum().backward()
    assert counters["stats"]["unique_graphs"] > 8  # torch's own limit


# --- Models of other make


def test_models_without_layers_are_refused(model_dir: Path) -> None:
    loaded = load_model(str(model_dir), device="cpu", dtype="float32")
    for name in ("language_model", "visual"):
        setattr(loaded.model.model, name, torch.nn.Linear(1, 1))
    for prepare in (options.compile_layers, options.checkpoint_layers):
        with pytest.raises(ConfigError, match="no GradientCheckpointingLayer"):
            prepare(loaded)
