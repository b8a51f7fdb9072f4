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
    """Files below `tests/unit`, with spaces between."""


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
        "    check_images(images)\n",
        "",
        "test_transport.py",
    ),
    Mutant(
        "an image does not move with its sample",
        "orchestrator/packing.py",
        "image.moved(start)",
        "image.moved(0)",
        "test_transport.py",
    ),
    Mutant(
        "a key of a record is renamed",
        "runs/records.py",
        "return msgspec.structs.asdict(value)",
        'return {key.replace("outcome", "result"): each for key, each in msgspec.structs.asdict(value).items()}',
        "test_records.py",
    ),
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
