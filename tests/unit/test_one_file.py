"""`examples/one_file.py` against the distributed path and against plain torch: one step, three ways, one result.

1. The file itself: each group in one padded batch.
2. The distributed path: branches become samples as in the orchestrator, are packed into rows and go over the real
   transport, and the real trainer takes the step.
3. Plain torch and transformers (`plain_step`), one sample at a time, none of Pointillist's code.
"""

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from pointillist.base.jsonl import read_jsonl
from pointillist.config import TrainerConfig
from pointillist.config.shared import ModelConfig
from pointillist.environments import Task
from pointillist.inference.protocol import SamplingParams
from pointillist.orchestrator.packing import pack
from pointillist.orchestrator.samples import make_sample
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths
from pointillist.sessions import Branch
from pointillist.trainer.train import train
from pointillist.transport import FilesystemSender, RankBatch
from tests.helpers.files import ROOT
from tests.helpers.pictures import encoded, picture

LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
RATIO_LOW, RATIO_HIGH = 0.5, 2.0
ROLLOUTS = 4


@dataclass(frozen=True)
class Step:
    """What a step of training says and leaves behind."""

    loss: float
    norm: float
    """Of the gradient, before clipping."""
    mismatch: float
    """Mean |logprob - logprob when sampled| of the trained tokens."""
    masked: float
    """Part of the trained tokens whose ratio is outside the band."""
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Played:
    """Groups of the one file, and the files of their images."""

    one_file: ModuleType
    policy: Any
    groups: list[Any]
    images: list[Path]
    store: Path
    model: Path
    before: dict[str, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return sum(group.num_tokens for group in self.groups)


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_file", ROOT / "examples/one_file.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["one_file"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def played(one_file: ModuleType, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Three groups; the untrained model is never right, so rewards are made up. Those of the last group are all 0."""
    folder = tmp_path_factory.mktemp("one_file")
    policy = one_file.Policy(str(model_dir), folder / "images")
    policy.reward = lambda task, completion: float(sum(completion) % 2 and task.id != "2")
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    noise = torch.Generator().manual_seed(0)
    groups, images = [], []
    for index in range(3):
        images.append(folder / f"{index}.png")
        images[-1].write_bytes(encoded(picture(64, 64 + 32 * index, seed=index)))
        task = Task(str(index), {"image": str(images[-1]), "answer": "1"})
        seeds = [100 * index + member for member in range(ROLLOUTS)]
        group = one_file.roll_out(policy, task, seeds, SamplingParams(temperature=1.0, max_tokens=3))
        for member in range(1, ROLLOUTS):  # as if some had ended early
            group.loss_mask[member, member:] = False
        # As if an older policy had sampled: importance ratios are not 1, and some are outside the band.
        older = group.logprobs_sampled + 0.5 * torch.randn(group.logprobs_sampled.shape, generator=noise)
        groups.append(replace(group, logprobs_sampled=older))
    return Played(one_file, policy, groups, images, folder / "images", model_dir, before)


@pytest.fixture(scope="module")
def own_step(played: Played) -> Step:
    """The one file's step."""
    policy = played.policy
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    loss, norm = played.one_file.train_step(policy, played.groups, optimizer)
    return Step(loss, norm, float("nan"), float("nan"), dict(policy.model.state_dict()))


@pytest.fixture(scope="module")
def distributed_step(played: Played, tmp_path_factory: pytest.TempPathFactory) -> Step:
    """The step of the real trainer, fed over the filesystem transport with packed rows."""
    config = TrainerConfig(
        model=ModelConfig(name=str(played.model)), output_dir=tmp_path_factory.mktemp("run"), seq_len=96, max_steps=1
    )
    config.multimodal.offload_dir = str(played.store)
    config.optim.lr, config.optim.betas, config.optim.weight_decay = LEARNING_RATE, BETAS, 0.0
    assert (config.loss.ratio_low, config.loss.ratio_high) == (RATIO_LOW, RATIO_HIGH)
    samples = [
        make_sample(
            branch, advantage, image_token_id=played.policy.family.image_token_id, sample_id=f"{index}.{member}"
        )
        for index, group in enumerate(played.groups)
        if group.advantages.any()
        for member, (branch, advantage) in enumerate(zip(_branches(group), group.advantages.tolist(), strict=True))
    ]
    (rows,) = pack(samples, seq_len=config.seq_len, num_workers=1)
    assert len(rows) > 1  # several rows of several samples, here; one padded batch a group, there
    assert any(len(row.seq_lens) > 1 for row in rows)
    batch = RankBatch(step=1, micro_batches=rows, num_tokens=played.num_tokens, orchestrator_state=b"{}")
    paths = RunPaths(config.output_dir)
    FilesystemSender(paths).send([batch])
    train(config)
    (said,) = read_jsonl(paths.metrics / "trainer.jsonl")
    return Step(
        said["loss"],
        said["optim/grad_norm"],
        said["mismatch/mean_abs"],
        said["ratio/masked"],
        load_file(paths.broadcast_step(1) / WEIGHTS_FILE),
    )


def _branches(group: Any) -> list[Branch]:
    """The rollouts of a group as sessions record them."""
    prompt = group.prompt
    read = len(prompt.token_ids)
    branches = []
    for tokens, on, logprobs in zip(group.completions, group.loss_mask, group.logprobs_sampled, strict=True):
        count = int(on.sum())
        branches.append(
            Branch(
                token_ids=prompt.token_ids + tokens[on].tolist(),
                loss_mask=[False] * read + [True] * count,
                logprobs_sampled=[0.0] * read + logprobs[on].tolist(),
                weight_versions=[-1] * read + [0] * count,
                temperatures=[1.0] * (read + count),
                images=prompt.images,
                messages=[],
            )
        )
    return branches


def plain_step(
    played: Played,
    *,
    blank: bool = False,
    divide_by_std: bool = True,
    masked: bool = True,
    num_tokens: int | None = None,
) -> Step:
    """The step in plain torch and transformers, one sample at a time; the arguments make it wrong on purpose.

    Args:
        played: Tokens, logprobs, rewards and image files; nothing else of them is used.
        blank: Whether images are replaced by grey ones.
        divide_by_std: Whether advantages are divided by the group's standard deviation.
        masked: Whether tokens that cannot be sampled are masked.
        num_tokens: Divisor of the loss, if not all sampled tokens.
    """
    model = AutoModelForImageTextToText.from_pretrained(played.model, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(played.model)
    settings = json.loads((played.model / "config.json").read_text())
    vision = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    padding = range(len(AutoTokenizer.from_pretrained(played.model)), model.get_output_embeddings().weight.shape[0])
    dead = (
        torch.tensor([*(settings[name] for name in vision), *padding])
        if masked
        else torch.tensor([], dtype=torch.int64)
    )
    divisor = num_tokens or sum(int(group.loss_mask.sum()) for group in played.groups)
    total, mismatch, outside, trained = 0.0, 0.0, 0, 0
    for group, file in zip(played.groups, played.images, strict=True):
        image = Image.open(file)
        inputs = dict(
            processor(images=[Image.new("RGB", image.size, (128,) * 3) if blank else image], return_tensors="pt")
        )
        for row, advantage in enumerate(_plain_advantages(group.rewards, divide_by_std=divide_by_std)):
            if len(set(group.rewards)) == 1:
                continue  # a group that agrees is not trained
            on = group.loss_mask[row]
            completion, sampled = group.completions[row][on], group.logprobs_sampled[row][on]
            ids = torch.tensor([group.prompt.token_ids + completion.tolist()])
            types = (ids == settings["image_token_id"]).int()
            logits = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, **inputs).logits[0]
            logits = logits[-len(completion) - 1 : -1].index_fill(1, dead, float("-inf"))
            logprobs = logits.log_softmax(-1)[torch.arange(len(completion)), completion]
            ratio = (logprobs - sampled).exp()
            inside = (ratio >= RATIO_LOW) & (ratio <= RATIO_HIGH)
            loss = -(ratio[inside] * advantage).sum() / divisor
            loss.backward()
            total += loss.item()
            mismatch += float((logprobs - sampled).detach().abs().sum())
            outside += int((~inside).sum())
            trained += len(completion)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0).step()
    return Step(total, float(norm), mismatch / trained, outside / trained, dict(model.state_dict()))


def _plain_advantages(rewards: Sequence[float], *, divide_by_std: bool) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    centred = values - values.mean()
    return (centred / (values.std() + 1e-3) if divide_by_std else centred).tolist()


def _check_equal(step: Step, other: Step, before: dict[str, torch.Tensor]) -> None:
    assert step.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-7)
    assert step.norm == pytest.approx(other.norm, rel=1e-5)
    count = different = 0
    for name, weight in step.weights.items():
        # AdamW's first step is lr * sign(gradient): where a gradient is nearly 0, its sign may be either's.
        different += int(((weight - other.weights[name]).abs() > 0.02 * LEARNING_RATE).sum())
        count += weight.numel()
    assert different < 1e-3 * count, f"{different} of {count} weights differ"
    moved = max(float((weight - before[name]).abs().max()) for name, weight in step.weights.items())
    assert moved == pytest.approx(LEARNING_RATE, rel=0.1)


def test_it_fits_on_its_page() -> None:
    assert len((ROOT / "examples/one_file.py").read_text().splitlines()) <= 250


def test_the_step_is_one_that_could_be_wrong(played: Played, own_step: Step, distributed_step: Step) -> None:
    """Advantages of both signs, ratios in and out of the band, completions of several lengths, a group that agrees."""
    assert [len(set(group.rewards)) for group in played.groups] == [2, 2, 1]
    assert len({int(length) for group in played.groups for length in group.loss_mask.sum(1)}) > 1
    assert 0.05 < distributed_step.masked < 0.5
    assert own_step.norm > 0.01
    assert abs(own_step.loss) > 1e-3


def test_its_step_is_the_trainers(played: Played, own_step: Step, distributed_step: Step) -> None:
    _check_equal(distributed_step, own_step, played.before)


def test_its_step_is_plain_torchs(played: Played, own_step: Step, distributed_step: Step) -> None:
    plain = plain_step(played)
    _check_equal(own_step, plain, played.before)
    _check_equal(distributed_step, plain, played.before)
    assert distributed_step.mismatch == pytest.approx(plain.mismatch, rel=1e-5)
    assert distributed_step.masked == pytest.approx(plain.masked)


@pytest.mark.parametrize(
    "fault",
    [{"blank": True}, {"divide_by_std": False}, {"masked": False}, {"num_tokens": 1000}],
    ids=lambda fault: next(iter(fault)),
)
def test_a_wrong_step_is_another(played: Played, own_step: Step, fault: dict[str, Any]) -> None:
    """The control: blank images, other advantages, no sampling mask or another divisor would be noticed."""
    wrong = plain_step(played, **fault)
    assert wrong.norm != pytest.approx(own_step.norm, rel=1e-3)
    with pytest.raises(AssertionError):
        _check_equal(own_step, wrong, played.before)
