"""`make mutants`: faults are put into a copy of the source, one at a time, and the tests named beside each must fail.

Each mutant is a fault that the tests once did not notice. A mutant that survives, or whose text is no longer in the
source, is an error: either a test is missing, or the table is out of date.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/pointillist"
TIMEOUT_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault and who should notice it."""

    fault: str
    file: str
    """Below `src/pointillist`."""
    old: str
    """Text that stands once in the file."""
    new: str
    tests: str
    """Files below `tests/unit`, or single tests of theirs as pytest names them, with spaces between."""


MUTANTS = [
    Mutant(
        "a dummy row keeps its advantages",
        "orchestrator/packing.py",
        "advantages=[0.0] * len(sample.token_ids)",
        "advantages=sample.advantages",
        "test_trainer_step.py",
    ),
    Mutant(
        "mismatch/kl has the wrong sign",
        "trainer/loss.py",
        "mismatch_kl_sum=_k3(detached).sum()",
        "mismatch_kl_sum=_k3(-detached).sum()",
        "test_trainer_step.py",
    ),
    Mutant(
        "a rewritten past is not noticed",
        "sessions/trace.py",
        "if prompt.token_ids[: len(before)] != before:",
        "if False:",
        "test_session_limits.py",
    ),
    Mutant(
        "every turn has the same seed",
        "sessions/session.py",
        "self._requests += 1",
        "self._requests += 0",
        "test_session_limits.py",
    ),
    Mutant(
        "max_tokens is not bounded by the room that is left",
        "sessions/session.py",
        "min(sampling.max_tokens, room)",
        "sampling.max_tokens",
        "test_session_limits.py",
    ),
    Mutant(
        "a sampled vision token is accepted",
        "sessions/session.py",
        "if token in forbidden:",
        "if False:",
        "test_session_limits.py",
    ),
    Mutant(
        "gradients are never clipped",
        "trainer/train.py",
        "self.policy.parameters(), self.config.optim.max_grad_norm)",
        'self.policy.parameters(), float("inf"))',
        "test_trainer_step.py",
    ),
    Mutant(
        "the limit on lost images never stops the run",
        "trainer/train.py",
        '> limit * sums["images_total"]:',
        '> 2 * sums["images_total"]:',
        "test_trainer_step.py",
    ),
    Mutant(
        "the schedule never falls",
        "trainer/train.py",
        "return 1 - (1 - config.min_ratio) * done",
        "return 1.0",
        "test_trainer_step.py",
    ),
    Mutant(
        "warm-up is ignored",
        "trainer/train.py",
        "if step < config.warmup_steps:",
        "if False:",
        "test_trainer_step.py",
    ),
    Mutant(
        "staleness is counted from the step",
        "trainer/train.py",
        "batch.step - 1 - row.weight_versions",
        "batch.step - row.weight_versions",
        "test_trainer_step.py",
    ),
    Mutant(
        "the random state is not restored",
        "trainer/checkpoint.py",
        'torch.set_rng_state(state["random"])',
        "pass",
        "test_trainer_step.py",
    ),
    Mutant(
        "one server with new weights is enough",
        "weights/follow.py",
        "all(has >= version or server.rest",
        "any(has >= version or server.rest",
        "test_client.py",
    ),
    Mutant(
        "a batch's file is removed too early",
        "transport/filesystem.py",
        "if old < step:",
        "if old <= step:",
        "test_trainer_step.py",
    ),
    Mutant(
        "gathered answers are in the wrong order",
        "sessions/answers.py",
        "return [_completion(choice, expected) for choice in choices]",
        "return [_completion(choice, expected) for choice in answer.choices]",
        "test_client.py",
    ),
    Mutant(
        "a gap in gathered seeds is not noticed",
        "sessions/client.py",
        "if run and request[0] != run[-1][0] + 1:",
        "if False:",
        "test_client.py",
    ),
    Mutant(
        "a malformed reference enters the trainer",
        "transport/types.py",
        "check_images(images)",
        "pass",
        "test_transport.py",
    ),
    Mutant(
        "an image does not move with its sample",
        "orchestrator/packing.py",
        "offset=start + image.offset",
        "offset=image.offset",
        "test_transport.py",
    ),
    Mutant(
        "a step does not wait for weights",
        "orchestrator/orchestrator.py",
        "await self.weights.wait_for(version)",
        "pass",
        "test_orchestrator_steps.py",
    ),
    Mutant(
        "rollouts never run ahead of training",
        "orchestrator/orchestrator.py",
        "step - 1 - self.config.max_off_policy_steps, step)",
        "step - 1, step)",
        "test_orchestrator_steps.py",
    ),
    Mutant(
        "a resumed run begins with the first task again",
        "orchestrator/orchestrator.py",
        'int(state["task_position"])',
        "0",
        "test_orchestrator_steps.py",
    ),
    Mutant(
        "all rollouts of a group have the same seed",
        "orchestrator/runner.py",
        "seed=seed + member",
        "seed=seed",
        "test_orchestrator_steps.py",
    ),
    Mutant(
        "evaluations are not greedy",
        "orchestrator/runner.py",
        "temperature=0.0, top_p=1.0",
        "top_p=1.0",
        "test_orchestrator_steps.py",
    ),
    Mutant(
        "a rollout that is tried again has its old seed",
        "orchestrator/runner.py",
        "request.seed + attempt * 2**32",
        "request.seed",
        "test_orchestrator.py",
    ),
    Mutant(
        "a rollout of old weights is trained",
        "orchestrator/runner.py",
        "if min(versions, default=oldest) >= oldest:",
        "if True:",
        "test_orchestrator.py",
    ),
    Mutant(
        "advantages are not divided by the deviation",
        "orchestrator/advantages.py",
        "value / (std + _EPSILON)",
        "value",
        "test_orchestrator.py",
    ),
    Mutant(
        "a reward that is not a number is accepted",
        "environments/executor.py",
        "if not math.isfinite(value) or abs(value) > LARGEST_REWARD:",
        "if abs(value) > LARGEST_REWARD:",
        "test_rollouts.py",
    ),
    Mutant(
        "gradients of the last step are kept",
        "trainer/train.py",
        "self.optimizer.zero_grad()",
        "pass",
        "test_trainer_step.py::test_a_step_has_gradients_of_its_own_batch_alone",
    ),
    Mutant(
        "the KL term has no reference",
        "trainer/train.py",
        "reference = self.reference(row).logprobs",
        "reference = None",
        "test_trainer_step.py::test_the_reference_is_the_model_that_training_began_with",
    ),
    Mutant(
        "the KL term has the wrong sign",
        "trainer/loss.py",
        "_k3(reference_logprobs - logprobs)",
        "_k3(logprobs - reference_logprobs)",
        "test_trainer.py::test_loss_is_the_formula",
    ),
    Mutant(
        "tokens outside the band of the ratio are trained",
        "trainer/loss.py",
        "torch.where(inside, ratio * advantages, torch.zeros_like(ratio))",
        "ratio * advantages",
        "test_trainer.py::test_loss_is_the_formula",
    ),
    Mutant(
        "the entropy is a malus",
        "trainer/loss.py",
        "- config.entropy_coef * entropy",
        "+ config.entropy_coef * entropy",
        "test_trainer.py::test_loss_is_the_formula",
    ),
    Mutant(
        "positions of packed samples do not begin anew",
        "trainer/rows.py",
        "torch.cat([torch.arange(each.shape[1]) for each in positions])",
        "torch.arange(rows.shape[1])",
        "test_trainer.py::test_rows_equal_huggingface_alone",
    ),
    Mutant(
        "a sample of a lost image is trained",
        "trainer/rows.py",
        "loss_mask[token], advantages[token] = False, 0.0",
        "pass",
        "test_trainer.py::test_a_faulty_image_costs_its_own_sample_only",
    ),
    Mutant(
        "features of images are in the wrong order",
        "trainer/policy_model.py",
        "[distinct[index] for index in row.image_index]",
        "[distinct[index] for index in reversed(row.image_index)]",
        "test_trainer.py::test_rows_equal_huggingface_alone",
    ),
    Mutant(
        "logprobs are not those of the sampling temperature",
        "trainer/policy_model.py",
        " / row.temperatures[:, None]",
        "",
        "test_trainer.py::test_rows_equal_huggingface_alone",
    ),
    Mutant(
        "adapters are not merged",
        "trainer/options.py",
        "weight.float() + config.alpha / config.rank * (up @ down)",
        "weight.float()",
        "test_trainer_options.py::test_lora_trains_the_adapters_and_publishes_merged_weights",
    ),
    Mutant(
        "bytes of a checkpoint are not compared",
        "base/digests.py",
        "return None if _digest_file(path) == expected else",
        "return None if True else",
        "test_trainer_options.py::test_a_damaged_checkpoint_is_not_trained_on",
    ),
    Mutant(
        "bytes of weights are not compared",
        "weights/load.py",
        "if expected is not None and (expected.bytes, expected.sha256) != (before.st_size, sha256):",
        "if False:",
        "test_weight_updates.py",
    ),
    Mutant(
        "older weights replace newer ones",
        "weights/fetch.py",
        "if request.weight_version < version and not request.rewind:",
        "if False:",
        "test_weight_updates.py",
    ),
    Mutant(
        "weights that are not finite are published",
        "weights/publish.py",
        "if not bool(torch.isfinite(tensor).all())",
        "if False",
        "test_trainer_options.py::test_weights_that_are_not_finite_never_leave",
    ),
    Mutant(
        "a sample may stand twice in a batch",
        "transport/types.py",
        "        if count > 1:",
        "        if False:",
        "test_transport.py",
    ),
    Mutant(
        "what is unpacked has no bound",
        "base/channel.py",
        "unpacker.decompress(data, max_bytes)",
        "unpacker.decompress(data)",
        "test_transport.py",
    ),
    Mutant(
        "the key of a request is not compared",
        "base/http_guard.py",
        "return secrets.compare_digest(given.encode(), expected.encode())",
        "return bool(given)",
        "test_http_guard.py",
    ),
    Mutant(
        "the asset endpoint asks for no key",
        "assets/server.py",
        "            check_bearer(request, key)",
        "            pass",
        "test_assets.py",
    ),
    Mutant(
        "the inference server asks for no key",
        "inference/door.py",
        "            check_bearer(request, key)",
        "            pass",
        "test_inference_door.py",
    ),
    Mutant(
        "channels of one run accept another run's processes",
        "base/channel.py",
        "hmac.new(word,",
        'hmac.new(b"",',
        "test_transport.py",
    ),
    Mutant(
        "two launchers have one folder",
        "runs/lock.py",
        "    if live is not None:",
        "    if False:",
        "test_run_lock.py",
    ),
    Mutant(
        "a resumed run is compared with nothing",
        "launch/changes.py",
        "if changes := [*config_changes(config, paths), *model_changes(model, paths)]:",
        "if changes := list[str]():",
        "test_resume.py",
    ),
    Mutant(
        "an image's bytes are not compared with its hash",
        "images/store.py",
        "if hashlib.sha256(data).hexdigest() != path.stem:",
        "if False:",
        "test_store.py",
    ),
    Mutant(
        "an image may lie anywhere",
        "images/store.py",
        "        if path.is_relative_to(root):\n            name = path.relative_to(root).as_posix()",
        '        if True:\n            name = "/".join(path.parts[-2:])',
        "test_store.py",
    ),
    Mutant(
        "an image may be of any size",
        "images/store.py",
        "if status.st_size > limits.max_bytes:",
        "if False:",
        "test_store.py",
    ),
    Mutant(
        "a damaged image is never written anew",
        "images/store.py",
        "status.st_size == len(data) and path.read_bytes() == data",
        "status.st_size == len(data)",
        "test_store.py",
    ),
    Mutant(
        "garbage collection removes what a kept run refers to",
        "images/inventory.py",
        "and entry.sha256 not in keep",
        "",
        "test_store_commands.py",
    ),
    Mutant(
        "garbage collection forgets the messages",
        "upkeep/references.py",
        "hashes.update(hashes_in([record.messages, *(branch.messages for branch in record.branches)]))",
        "pass",
        "test_store_commands.py",
    ),
    Mutant(
        "garbage collection forgets runs that are going on",
        "upkeep/commands.py",
        "            kept.add(run)",
        "            pass",
        "test_resume.py",
    ),
    Mutant(
        "a blanked run shows its pictures",
        "sessions/factory.py",
        "if blank_images else None",
        "if False else None",
        "test_session.py",
    ),
    Mutant(
        "a reference of another layout is read",
        "pixels/reader.py",
        'if (fingerprint := item["layout_fingerprint"]) != family.layout_fingerprint:',
        "if False:",
        "test_materializer.py",
    ),
    Mutant(
        "an image of another length than its place is read",
        "pixels/reader.py",
        "if ref.length != outcome.layout.num_tokens:",
        "if False:",
        "test_materializer.py",
    ),
]

# Each key of a record, as it stands in the files that earlier runs have left and other programs read.
_KEYS_OF_RECORDS = {
    "RolloutRecord": "id group split env task answer reward advantage outcome error turns versions branches",
    "BranchRecord": "tokens sampled overlong sampled_pieces messages images",
    "SampledPiece": "offset texts logprobs",
    "ImageSpan": "hash offset length item",
    "ErrorRecord": "kind message traceback",
}
MUTANTS += [
    Mutant(
        f"the key {key} of {record} is renamed",
        "runs/records.py",
        f"class {record}(msgspec.Struct, frozen=True):",
        f'class {record}(msgspec.Struct, frozen=True, rename={{"{key}": "renamed"}}):',
        "test_records.py",
    )
    for record, keys in _KEYS_OF_RECORDS.items()
    for key in keys.split()
]


def run_tests(copy: Path, names: list[str]) -> bool:
    """Whether tests pass in the copy."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *(f"tests/unit/{name}" for name in names)],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy / "src")}, capture_output=True, text=True,
        timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"the tests could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def is_noticed(mutant: Mutant, copy: Path) -> bool:
    """Whether a test fails where the fault is in the source."""
    file = copy / SOURCE.relative_to(ROOT) / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.fault}: {mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times, not once")
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        return not run_tests(copy, mutant.tests.split())
    finally:
        file.write_text(text)


def main() -> int:
    """Tries every mutant; returns how many survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose description has one of these")
    words = parser.parse_args().words
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.fault for word in words)]
    console, survived = Console(), []
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console) as progress:
        copy = Path(scratch) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs", "build", "__pycache__"))
        # The control: a test that fails by itself notices everything.
        if not run_tests(copy, sorted({name for mutant in chosen for name in mutant.tests.split()})):
            raise SystemExit("the tests fail without any fault in the source")
        task = progress.add_task("mutants", total=len(chosen))
        for mutant in chosen:
            noticed = is_noticed(mutant, copy)
            console.print(f"{'noticed ' if noticed else 'SURVIVED'}  {mutant.fault}  ({mutant.file})", highlight=False)
            survived += [] if noticed else [mutant]
            progress.advance(task)
    console.print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants were noticed")
    return len(survived)


if __name__ == "__main__":
    sys.exit(main())
