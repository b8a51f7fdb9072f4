"""`examples/one_file.py` against the real trainer: the same samples give the same loss, gradient norm and weights."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from pointillist.base.jsonl import read_jsonl
from pointillist.config import TrainerConfig
from pointillist.config.shared import ModelConfig
from pointillist.environments import Task
from pointillist.inference.protocol import SamplingParams
from pointillist.orchestrator.packing import pack
from pointillist.refs import MMImageRef, MMRefs, mm_token_type_ids
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths
from pointillist.trainer.train import train
from pointillist.transport import FilesystemSender, RankBatch, TrainingSample
from tests.conftest import ROOT, encoded, picture

LEARNING_RATE = 1e-3
GROUPS, GROUP = 2, 4


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_file", ROOT / "examples/one_file.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["one_file"] = module
    spec.loader.exec_module(module)
    return module


def test_it_fits_on_its_page() -> None:
    assert len((ROOT / "examples/one_file.py").read_text().splitlines()) <= 250


def _training_sample(name: str, sample: object) -> TrainingSample:
    """A sample of the one file as the orchestrator would send it."""
    prompt, completion = sample.prompt, sample.completion
    ids = prompt.token_ids + completion
    read, count = len(prompt.token_ids), len(completion)
    image_token = ids[prompt.images[0].offset]
    images = [
        MMImageRef(i.descriptor.to_dict(), i.sha256, i.descriptor.raw_image_uri, i.offset, i.length)
        for i in prompt.images
    ]
    return TrainingSample(
        token_ids=ids,
        loss_mask=[False] * read + [True] * count,
        logprobs=[0.0] * read + sample.logprobs,
        advantages=[0.0] * read + [sample.advantage] * count,
        weight_versions=[-1] * read + [0] * count,
        temperatures=[1.0] * (read + count),
        mm_token_type_ids=mm_token_type_ids(ids, image_token),
        mm_refs=MMRefs(images),
        sample_id=name,
    )


def test_its_step_is_the_trainers(one_file: ModuleType, model_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "images"
    run = one_file.OneFile(str(model_dir), store)
    before = {name: weight.clone() for name, weight in run.loaded.model.state_dict().items()}
    # The untrained model is never right, so the reward is made up: it differs within each group.
    run.reward = lambda task, rollout: float(sum(rollout.completion) % 2)
    samples = []
    for index in range(GROUPS):
        file = tmp_path / f"{index}.png"
        file.write_bytes(encoded(picture(64, 64 + 32 * index, seed=index)))
        task = Task(str(index), {"image": str(file), "answer": "1"})
        seeds = [100 * index + member for member in range(GROUP)]
        of_group, _ = run.group(task, seeds, SamplingParams(temperature=1.0, max_tokens=3))
        samples += of_group
    assert any(sample.advantage for sample in samples)
    num_tokens = sum(len(sample.completion) for sample in samples)
    optimizer = torch.optim.AdamW(run.loaded.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    config = TrainerConfig(
        model=ModelConfig(name=str(model_dir)), output_dir=tmp_path / "run", seq_len=256, max_steps=1
    )
    config.multimodal.offload_dir = str(store)
    config.optim.lr, config.optim.betas, config.optim.weight_decay = LEARNING_RATE, (0.9, 0.95), 0.0
    paths = RunPaths(config.output_dir)
    (rows,) = pack(
        [_training_sample(str(index), sample) for index, sample in enumerate(samples)], seq_len=256, num_workers=1
    )
    assert len(rows[0].seq_lens) > 1  # packed there, one by one here
    FilesystemSender(paths).send(
        [RankBatch(step=1, micro_batches=rows, num_tokens=num_tokens, orchestrator_state=b"{}")]
    )
    train(config)
    (said,) = read_jsonl(paths.metrics / "trainer.jsonl")
    loss, norm = run.step(samples, num_tokens, optimizer)

    assert said["loss"] == pytest.approx(loss, abs=1e-6)
    assert said["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert said["mismatch/mean_abs"] < 1e-5
    assert norm > 0.01  # the control: without a gradient everything would agree
    trained, own = load_file(paths.broadcast_step(1) / WEIGHTS_FILE), run.loaded.model.state_dict()
    for name, weight in trained.items():
        # AdamW's first step is lr * sign(gradient): where a gradient is nearly 0, its sign may be either's.
        different = (weight - own[name]).abs() > 0.02 * LEARNING_RATE
        assert different.float().mean() < 0.01, name
    moved = max(float((weight - before[name]).abs().max()) for name, weight in trained.items())
    assert moved == pytest.approx(LEARNING_RATE, rel=0.1)


def test_a_blank_picture_is_another_step(one_file: ModuleType, model_dir: Path, tmp_path: Path) -> None:
    """The control of the parity above: the numbers come from looking at the picture."""
    run = one_file.OneFile(str(model_dir), tmp_path / "images")
    logits = []
    for name, image in (("seen", picture(64, 64)), ("blank", picture(64, 64).point(lambda _: 128))):
        file = tmp_path / f"{name}.png"
        file.write_bytes(encoded(image))
        prompt = run.render(Task(name, {"image": str(file), "answer": "1"}))
        with torch.no_grad():
            logits.append(run.logits(prompt, torch.tensor([prompt.token_ids]))[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 0.05
