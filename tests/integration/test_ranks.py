"""Two ranks of the real trainer under torchrun (gloo, FSDP2) against one: the same batches, the same weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pointillist.base.jsonl import read_jsonl
from pointillist.config import TrainerConfig
from pointillist.config.shared import ModelConfig
from pointillist.families import Family
from pointillist.images import ImageLimits, ImageStore
from pointillist.orchestrator.packing import pack
from pointillist.runs.config_files import write_toml
from pointillist.runs.paths import RunPaths, latest_checkpoint
from pointillist.transport import FilesystemSender, RankBatch, TrainingSample
from tests.helpers.made_samples import trained_sample

pytestmark = pytest.mark.integration

STEPS = 5


def _train(
    model_dir: Path, run: Path, images: Path, batches: list[list[list[TrainingSample]]], workers: int, *extra: str
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Trains on one row a sample; `batches` are the samples by step and rank, `extra` are overrides of the config."""
    paths = RunPaths(run)
    for step, ranks in enumerate(batches, start=1):
        rows = [[row for s in rank for row in pack([s], seq_len=256, num_workers=1)[0]] for rank in ranks]
        tokens = sum(sum(row.loss_mask) for rank in rows for row in rank)
        FilesystemSender(paths).send(
            [RankBatch(step=step, micro_batches=rank, num_tokens=tokens, orchestrator_state=b"{}") for rank in rows]
        )
    config = _config(model_dir, run, images, workers)
    done = subprocess.run(
        _command(config, run, *extra), capture_output=True, text=True, timeout=1200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return read_jsonl(paths.metrics / "trainer.jsonl"), load_file(paths.model / "model.safetensors")


def _config(model_dir: Path, run: Path, images: Path, workers: int) -> TrainerConfig:
    config = TrainerConfig(
        model=ModelConfig(name=str(model_dir)), output_dir=run, seq_len=256, max_steps=STEPS, num_workers=workers
    )
    config.multimodal.offload_dir = str(images)
    config.optim.lr = 1e-3
    config.loss.ratio_low, config.loss.ratio_high = 0.0, 1e6  # the samples' logprobs are made up
    return config


def _command(config: TrainerConfig, run: Path, *extra: str) -> list[str]:
    """Of a trainer with this config and these overrides of it."""
    write_toml(config, run / "trainer.toml")
    workers = config.num_workers
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []
    program = "tests.integration.aot_eager" if "--compile" in extra else "pointillist"
    return [sys.executable, *launcher, "-m", program, "trainer", "@", str(run / "trainer.toml"), *extra]


def _close(one: tuple, two: tuple) -> None:
    for alone, shared in zip(one[0], two[0], strict=True):
        assert alone["optim/grad_norm"] > 0.1  # the control: without gradients all ranks would agree
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        for name in ("ratio/max", "ratio/mean", "off_policy/max", "off_policy/mean"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-4)
    for name, weight in one[1].items():
        assert torch.allclose(two[1][name], weight, atol=1e-4), name


@pytest.mark.parametrize(
    ("text_only", "both", "shared"),
    [
        (False, [], []),
        (True, [], []),
        (True, ["--lora.rank", "4"], []),
        (True, ["--freeze-vision", "true"], []),
        (True, [], ["--activation-checkpointing", "true"]),
        (True, [], ["--compile", "true", "--activation-checkpointing", "true"]),
    ],
)
def test_two_ranks_are_one(
    family: Family, model_dir: Path, tmp_path: Path, text_only: bool, both: list[str], shared: list[str]
) -> None:
    """With `text_only` one rank has no image all the time, the other one in every row: no collective waits.

    Options that change no result are set for the two (`shared`), and the one is plain.
    """
    one, two = _one_and_two(family, model_dir, tmp_path, text_only, both, [*both, *shared])
    _close(one, two)


def test_two_ranks_are_nearly_one_in_bfloat16(family: Family, model_dir: Path, tmp_path: Path) -> None:
    """One rank rounds weights where they are used (autocast), two send them rounded (FSDP); the reference as well."""
    options = ["--dtype", "bfloat16", "--loss.kl-coef", "1e-3"]
    one, two = _one_and_two(family, model_dir, tmp_path, False, options, options)
    for records, _ in (one, two):
        assert records[0]["kl"] == 0.0 < records[-1]["kl"]  # before the first step they are one and the same model
    losses = [(alone["loss"], shared["loss"]) for alone, shared in zip(one[0], two[0], strict=True)]
    print(losses)
    for alone, shared in losses:
        assert shared == pytest.approx(alone, rel=0.05)
    assert any(abs(shared - alone) > 1e-5 for alone, shared in losses)  # the control: float32 agrees better
    assert all(weight.dtype == torch.float32 for weight in two[1].values())


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_trainer_that_waits_for_a_batch_saves_what_it_has_done_when_it_is_told_to_stop(
    family: Family, model_dir: Path, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    """The second rank never gets its batch of step 2: the first one must not begin the step without it."""
    paths = RunPaths(tmp_path / "run")
    store = ImageStore(tmp_path / "images", ImageLimits())
    for step in (1, 2):
        rows = [
            pack([trained_sample(family, store, [(64, 64)], seed=r)], seq_len=256, num_workers=1)[0]
            for r in range(workers)
        ]
        FilesystemSender(paths).send(
            [RankBatch(step=step, micro_batches=each, num_tokens=9, orchestrator_state=b"{}") for each in rows]
        )
    (paths.rollout_step(2) / f"rank_{workers - 1}.bin").unlink()
    config = _config(model_dir, paths.output_dir, store.root, workers)
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            _command(config, paths.output_dir), stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 300
        while not read_jsonl(paths.metrics / "trainer.jsonl") and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert latest_checkpoint(paths) is None
        process.send_signal(number)
        code = process.wait(300)
    finally:
        process.kill()
    assert latest_checkpoint(paths) == 1, log.read_text()
    assert [record["step"] for record in read_jsonl(paths.metrics / "trainer.jsonl")] == [1]
    assert workers > 1 or code == 143  # torchrun has a code of its own


def _one_and_two(
    family: Family, model_dir: Path, tmp_path: Path, text_only: bool, alone: list[str], shared: list[str]
) -> tuple[tuple, tuple]:
    """The same samples trained by one rank and by two."""
    images = tmp_path / "images"
    store = ImageStore(images, ImageLimits())
    batches = []
    for step in range(STEPS):
        first = [trained_sample(family, store, [] if text_only else [(64, 64)], seed=100 * step + n) for n in range(2)]
        second = [trained_sample(family, store, [(64, 96)], seed=100 * step + 10 + n) for n in range(2)]
        batches.append([first, second])
    together = [[[*first, *second]] for first, second in batches]
    one = _train(model_dir, tmp_path / "one", images, together, 1, *alone)
    two = _train(model_dir, tmp_path / "two", images, batches, 2, *shared)
    return one, two
