"""`make faults-run`: a run while its processes are killed, a hundred times, at random instants.

The same small deterministic run twice: once undisturbed, once while

- `kill -9` hits the inference server, the trainer, the orchestrator or an environment worker, after random seconds or
  just when a checkpoint or a broadcast is being written;
- now and then the whole run is stopped (Ctrl-C, or everything killed at once), its newest checkpoint damaged, and the
  run resumed;
- now and then a second launcher tries to resume it while it lives;
- every few seconds `store gc` goes over its images, with and without naming the run.

Afterwards every step must be there once, every sample trained once, every image be what its name says, and weights,
samples and losses be bit for bit those of the undisturbed run. Prints a report, writes it to `report.json` in the run's
folder, and ends with 1 if something of this is not so.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pointillist.base.jsonl import read_jsonl
from pointillist.runs.paths import RunPaths, steps_in
from tests.conftest import ROOT

VICTIMS = ("inference", "trainer", "orchestrator", "env_worker")
_GC_SECONDS = 3.0
_START_SECONDS = 300.0
_RIVAL_SECONDS = 90.0
_VOLATILE = (
    "time/",
    "memory/",
    "tokens/per_second",
    "rollouts/per_second",
    "mm/",
    "errors/",
    "mismatch/",
    "at",
    "fsdp/",
)
"""Metrics that say how it went rather than what came of it."""


@dataclass
class Told:
    """What was done to the run, and what it did then."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    stops: list[dict[str, Any]] = field(default_factory=list)
    rivals: list[dict[str, Any]] = field(default_factory=list)
    unexpected_ends: list[str] = field(default_factory=list)
    gc_calls: int = 0
    gc_refusals: int = 0
    gc_removed: list[str] = field(default_factory=list)
    """Images that were there before a `gc` and not after it."""


def pids(output_dir: Path, component: str) -> list[int]:
    """Processes of a component, found by their config file."""
    config = str(output_dir / "configs" / f"{component}.toml")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if config in command:
                found.append(int(entry.name))
    return sorted(found)


class Run:
    """A small digits run, and the launcher that has it."""

    def __init__(self, model: Path, data: Path, output_dir: Path, steps: int, interval: int, kills: int) -> None:
        self.paths = RunPaths(output_dir)
        self.steps = steps
        self._arguments = [
            sys.executable, "-m", "pointillist", "rl", "@", "examples/digits/rl.toml", "--model.name", str(model),
            "--env.args.data_dir", str(data), "--output-dir", str(output_dir), "--max-steps", str(steps),
            "--deterministic", "true",
            "--orchestrator.batch_size", "32", "--orchestrator.group_size", "8",
            "--orchestrator.eval.interval", str(steps), "--orchestrator.eval.max_tasks", "16",
            "--orchestrator.workers.count", "1", "--trainer.ckpt.interval", str(interval),
            "--trainer.ckpt.keep_last", "3", "--trainer.num_threads", "1", "--inference.engine.num_threads", "1",
            # A rate at which so small a batch does not ruin the policy: with nothing to learn from a run ends.
            "--trainer.optim.lr", "5e-5", "--trainer.optim.scheduler.warmup_steps", "0",
            "--trainer.optim.scheduler.decay_steps", "1",
            "--supervision.max_resumes", str(2 * kills), "--supervision.max_restarts", str(2 * kills),
            "--supervision.backoff", "0.1",
        ]  # fmt: skip
        self.launcher: subprocess.Popen[bytes] | None = None
        self.log = output_dir.with_name(f"{output_dir.name}.launcher.log")

    def start(self, *, resume: bool = False) -> "subprocess.Popen[bytes]":
        """Starts a launcher."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self._arguments, *(["--resume", "true"] if resume else [])], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, cwd=ROOT, env={**os.environ, "COLUMNS": "200"}, start_new_session=True,
            )  # fmt: skip

    @property
    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher is None or self.launcher.poll() is not None

    @property
    def last_step(self) -> int:
        """The last step that is recorded."""
        with contextlib.suppress(ValueError):  # a launcher is rewriting it
            return max((record["step"] for record in read_jsonl(self.paths.metrics / "trainer.jsonl")), default=0)
        return 0

    def last_words(self) -> str:
        """The end of what the launchers said."""
        return " | ".join(self.log.read_text(errors="replace").split("\n")[-8:])[-900:]

    def everybody(self) -> list[int]:
        """All processes of the run but the launcher."""
        return [pid for victim in VICTIMS for pid in pids(self.paths.output_dir, victim)]


class Tormentor:
    """Does to a run what the module's docstring says."""

    def __init__(self, run: Run, kills: int, seconds: float, seed: int) -> None:
        self.run, self.told = run, Told()
        self._wanted, self._seconds = kills, seconds
        self._chance = random.Random(seed)
        self._over = threading.Event()
        self._stopping = threading.Event()
        self._started = time.monotonic()

    def torment(self) -> int:
        """Until there were enough kills; then waits for the run's end and returns its exit code."""
        self.run.launcher = self.run.start()
        collector = threading.Thread(target=self._collect, daemon=True)
        collector.start()
        deeds: list[Callable[[], None]] = [
            self._kill_at_random, self._kill_at_random, self._kill_in_checkpoint, self._kill_in_broadcast,
        ]  # fmt: skip
        while len(self.told.kills) < self._wanted and self._goes_on():
            self._chance.choice(deeds)()
            if self._chance.random() < 0.08:
                self._rival()
            if self._chance.random() < 0.1:
                self._stop_and_damage()
        self._await_end()
        self._over.set()
        collector.join()
        assert self.run.launcher is not None
        return self.run.launcher.returncode

    def _await_end(self) -> None:
        """Waits until the run is done, or stands still for minutes."""
        step, since = -1, time.monotonic()
        while self._goes_on():
            if self.run.last_step != step:
                step, since = self.run.last_step, time.monotonic()
            if time.monotonic() - since > _START_SECONDS:
                self.told.unexpected_ends.append(f"stands still at step {step}: {self.run.last_words()}")
                assert self.run.launcher is not None
                _end_group(self.run.launcher)
                return
            time.sleep(0.2)

    def _goes_on(self) -> bool:
        """Whether the run is not done; one that ended as it should not is resumed, and that is told."""
        if not self.run.is_over:
            return True
        assert self.run.launcher is not None
        if self.run.launcher.returncode == 0 or len(self.told.unexpected_ends) >= 5:
            return False
        self.told.unexpected_ends.append(self.run.last_words())
        self._say(f"the run ended by itself: {self.run.last_words()}")
        self.run.launcher = self.run.start(resume=True)
        return True

    def _kill_at_random(self) -> None:
        time.sleep(self._seconds * self._chance.uniform(0.05, 2.0))
        self._kill(self._chance.choice(VICTIMS), "random")

    def _kill_in_checkpoint(self) -> None:
        # Not always the next one: the run is to get on.
        times = self._chance.choice([1, 1, 2, 3, 4])
        if all(self._appears(self.run.paths.checkpoints, ".step_*.tmp") for _ in range(times)):
            time.sleep(self._chance.choice([0.0, 0.005, 0.02]))
            self._kill(self._chance.choice(["trainer", "trainer", "orchestrator"]), "checkpoint")

    def _kill_in_broadcast(self) -> None:
        times = self._chance.choice([1, 2, 4, 7])
        if all(self._appears(self.run.paths.broadcasts, "step_*/.*.tmp") for _ in range(times)):
            self._kill(self._chance.choice(["trainer", "trainer", "inference"]), "broadcast")

    def _appears(self, folder: Path, pattern: str) -> bool:
        """Waits for something half-written that was not there before; what a killed writer left does not count."""

        def half_written() -> set[tuple[str, int]]:
            with contextlib.suppress(OSError):  # folders come and go
                return {(str(path), path.stat().st_ino) for path in folder.glob(pattern)}
            return set()

        before, deadline = half_written(), time.monotonic() + 10 * self._seconds
        while time.monotonic() < deadline and not self.run.is_over:
            if half_written() - before:
                return True
            time.sleep(0.001)
        return False

    def _kill(self, victim: str, when: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not (targets := pids(self.run.paths.output_dir, victim)) and not self.run.is_over:
            time.sleep(0.05)  # it is being started again
            if time.monotonic() > deadline:
                return
        if not self.run.is_over and targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._chance.choice(targets), signal.SIGKILL)
                self._note(self.told.kills, victim=victim, when=when)

    def _rival(self) -> None:
        """A second launcher must be refused, and the first go on."""
        if self.run.is_over:
            return
        rival = self.run.start(resume=True)
        deadline = time.monotonic() + _RIVAL_SECONDS
        while rival.poll() is None and time.monotonic() < deadline and not self.run.is_over:
            time.sleep(0.05)
        refused = rival.poll() not in (None, 0)
        if rival.poll() is None:
            _end_group(rival)
        self._note(self.told.rivals, refused=refused or self.run.is_over)

    def _stop_and_damage(self) -> None:
        """Stops the whole run, damages its newest checkpoint if there is an older one, and resumes it."""
        launcher = self.run.launcher
        if self.run.is_over or launcher is None or self.run.last_step >= self.run.steps - 1:
            return
        way = self._chance.choice(["SIGINT", "SIGTERM", "SIGKILL"])
        self._stopping.set()
        launcher.send_signal(getattr(signal, way))
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(_START_SECONDS)
        deadline = time.monotonic() + 30
        while self.run.everybody() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = len(self.run.everybody())
        _end_group(launcher)
        steps = steps_in(self.run.paths.checkpoints)
        damage = self._damage(self.run.paths.checkpoint_step(steps[-1])) if len(steps) > 1 else "none"
        self._note(self.told.stops, by=way, processes_left=left, checkpoints=steps, damage=damage)
        self.run.launcher = self.run.start(resume=True)
        self._stopping.clear()

    def _damage(self, folder: Path) -> str:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        way = self._chance.choice(["none", "half", "empty", "flip", "flip", "remove"])
        path = self._chance.choice(files)
        data = bytearray(path.read_bytes())
        if way == "half":
            path.write_bytes(data[: len(data) // 2])
        elif way == "empty":
            path.write_bytes(b"")
        elif way == "flip":
            data[self._chance.randrange(len(data))] ^= 1
            path.write_bytes(data)
        elif way == "remove":
            path.unlink()
        return f"{way} {path.relative_to(folder)}"

    def _collect(self) -> None:
        """`store gc` beside the run, again and again; which images it takes."""
        store = self.run.paths.output_dir / "assets" / "images"
        while not self._over.wait(_GC_SECONDS):
            if not store.is_dir():
                continue
            before = {path for path in store.glob("??/*") if not path.name.startswith(".")}
            live = self.run.launcher if self.run.everybody() and not self._stopping.is_set() else None
            named = ["--keep-runs", str(self.run.paths.output_dir)] if self.told.gc_calls % 3 else []
            done = subprocess.run(
                [sys.executable, "-m", "pointillist", "store", "gc", str(store), *named, "--older-than", "0"],
                capture_output=True, text=True, check=False, cwd=ROOT,
            )  # fmt: skip
            self.told.gc_calls += 1
            self.told.gc_refusals += done.returncode != 0
            # Between a stop, when the lock is released, and the next start it may remove what no record names.
            going_on = live is not None and live is self.run.launcher and not self.run.is_over
            if "is going on" in done.stdout or (going_on and not self._stopping.is_set()):
                self.told.gc_removed += [path.name for path in before if not path.exists()]

    def _note(self, where: list[dict[str, Any]], **what: Any) -> None:
        second = round(time.monotonic() - self._started, 1)
        where.append({"second": second, **what, "step": self.run.last_step})
        self._say(f"{len(self.told.kills)} kills: {where[-1]}")

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)


def _end_group(launcher: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def outcome(paths: RunPaths, steps: int) -> dict[str, Any]:
    """What came of a run: the digests of what must be equal."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def of_record(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if not key.startswith(_VOLATILE)}

    weights = sorted(paths.model.glob("*.safetensors"))
    rollouts = [
        [(each["id"], each["task"], each["reward"], each["advantage"], [b["sampled_pieces"] for b in each["branches"]])
         for each in sorted(read_jsonl(paths.rollouts_file(step)), key=lambda record: record["id"])]
        for step in range(1, steps + 1)
    ]  # fmt: skip
    return {
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights],
        "losses": digest([of_record(record) for record in read_jsonl(paths.metrics / "trainer.jsonl")]),
        "rewards": digest(
            [[each["step"], each["reward/mean"]] for each in read_jsonl(paths.metrics / "orchestrator.jsonl")]
        ),
        "rollouts": digest(rollouts),
    }


def examine(paths: RunPaths, max_steps: int) -> dict[str, Any]:
    """What the tormented run's record says."""
    trainer = read_jsonl(paths.metrics / "trainer.jsonl")
    steps = [record["step"] for record in trainer]
    twice, miscounted = 0, []
    for record in trainer:
        rollouts = read_jsonl(paths.rollouts_file(record["step"]))
        ids = [rollout["id"] for rollout in rollouts]
        twice += len(ids) - len(set(ids))
        trained = sum(
            branch["sampled"]
            for rollout in rollouts
            if rollout["advantage"] is not None
            for branch in rollout["branches"]
        )
        # Tokens that the trainer says it trained, against those of the step's record: no sample twice, none left out.
        if trained != record["tokens/trained"]:
            miscounted.append(record["step"])
    orchestrator = Counter(record["step"] for record in read_jsonl(paths.metrics / "orchestrator.jsonl"))
    verify = subprocess.run(
        [sys.executable, "-m", "pointillist", "store", "verify", "--run", str(paths.output_dir)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    summary = json.loads((paths.output_dir / "summary.json").read_text())
    return {
        "steps_in_order": steps == list(range(1, max_steps + 1)),
        "orchestrator_steps_once": orchestrator == Counter(range(1, max_steps + 1)),
        "rollouts_twice_in_a_step": twice,
        "steps_with_other_tokens_than_recorded": miscounted,
        "max_logprob_mismatch": summary["max_logprob_mismatch"],
        "store_verify": verify.stdout.strip().splitlines()[-1:],
        "store_verify_exit_code": verify.returncode,
        "restarts": summary["restarts"],
        "resumes": summary["resumes"],
    }


def wrong(report: dict[str, Any], kills: int) -> list[str]:
    """Everything that is not as it should be."""
    differing = [
        name for name, digest in report["undisturbed"].items() if digest != report.get("tormented", {}).get(name)
    ]
    found = {
        f"exit code {report['exit_code']}": report["exit_code"] != 0,
        f"{len(report['kills'])} kills instead of {kills}": len(report["kills"]) != kills,
        f"the run ended by itself {len(report['unexpected_ends'])} times": report["unexpected_ends"],
        f"a rival was not refused {sum(not rival['refused'] for rival in report['rivals'])} times": not all(
            rival["refused"] for rival in report["rivals"]
        ),
        f"{sum(stop['processes_left'] for stop in report['stops'])} processes outlived their launcher": any(
            stop["processes_left"] for stop in report["stops"]
        ),
        f"store gc removed {len(report['gc_removed'])} images of the live run": report["gc_removed"],
        f"differs from the undisturbed run in {', '.join(differing)}": differing,
    }
    if report["exit_code"] == 0:
        found |= {
            "steps are not 1 to the last, each once": not report["steps_in_order"]
            or not report["orchestrator_steps_once"],
            f"{report['rollouts_twice_in_a_step']} rollouts stand twice in a step": report["rollouts_twice_in_a_step"],
            "steps trained other tokens than they record": report["steps_with_other_tokens_than_recorded"],
            "store verify found problems": report["store_verify_exit_code"],
        }
    return [text for text, is_so in found.items() if is_so]


def main() -> int:
    """Runs undisturbed, runs tormented, examines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=4.0, help="mean time between kills at random seconds")
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--interval", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    root = options.output_dir.resolve()
    root.mkdir(parents=True)
    started = time.monotonic()
    runs = [
        Run(
            options.model.resolve(),
            options.data.resolve(),
            root / name,
            options.max_steps,
            options.interval,
            options.kills,
        )
        for name in ("undisturbed", "tormented")
    ]
    if (code := runs[0].start().wait()) != 0:
        print(f"the undisturbed run ended with {code}: {runs[0].last_words()}")
        return 1
    print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
    tormentor = Tormentor(runs[1], options.kills, options.seconds, options.seed)
    try:
        code = tormentor.torment()
    finally:
        if runs[1].launcher is not None:
            _end_group(runs[1].launcher)
    report: dict[str, Any] = {
        "exit_code": code, "seconds": round(time.monotonic() - started), **asdict(tormentor.told),
        "undisturbed": outcome(runs[0].paths, options.max_steps),
    }  # fmt: skip
    if code == 0:
        report |= examine(runs[1].paths, options.max_steps) | {"tormented": outcome(runs[1].paths, options.max_steps)}
    report["wrong"] = wrong(report, options.kills)
    text = json.dumps(report, indent=2) + "\n"
    for path in (root / "report.json", options.report):
        if path is not None:
            path.write_text(text)
    print(text)
    print("all as it should be" if not report["wrong"] else f"NOT as it should be: {'; '.join(report['wrong'])}")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
