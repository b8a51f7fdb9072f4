"""Whole runs: real processes, killed, resumed, and given bad input."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointillist.base.jsonl import read_jsonl
from pointillist.runs.paths import RunPaths, latest_checkpoint
from tests.helpers.processes import Digits, free_port, kill_leftovers, pointillist, processes_of, wait_for

pytestmark = pytest.mark.integration


def test_a_run_from_start_to_summary(digits_run: Digits) -> None:
    code, output = digits_run.run()
    assert code == 0, output
    summary = json.loads((digits_run.output_dir / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["max_logprob_mismatch"] < 1e-5
    assert 0 < summary["mm_bytes_per_image"] <= 512
    assert summary["torch_in_orchestrator"] is False
    assert summary["images_materialized"] > 0
    assert (digits_run.output_dir / "curve.png").stat().st_size > 1000
    rollouts = read_jsonl(digits_run.output_dir / "rollouts" / "step_1" / "rollouts.jsonl")
    assert len(rollouts) % 32 == 0  # more than one round if the first had no group to learn from
    pieces = rollouts[0]["branches"][0]["sampled_pieces"]
    assert sum(len(piece["texts"]) for piece in pieces) == rollouts[0]["branches"][0]["sampled"]
    evaluated = read_jsonl(digits_run.output_dir / "rollouts" / "eval_3.jsonl")
    assert {record["outcome"] for record in evaluated} == {"evaluated"}
    uri = rollouts[0]["branches"][0]["messages"][0]["content"][0]["image_url"]["url"]
    assert uri.startswith(f"file://{digits_run.output_dir}/assets/images/")
    assert Path(uri.removeprefix("file://")).is_file()
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(digits_run.output_dir / "model")
    assert processes_of(digits_run.root) == {}
    verified = pointillist("store", "verify", "--run", digits_run.output_dir)
    output, _ = verified.communicate(timeout=900)
    assert verified.returncode == 0, output
    assert f"{len(list((digits_run.output_dir / 'assets' / 'images').rglob('*.png')))} good" in output
    # Nothing of it is overwritten by accident.
    code, output = digits_run.run()
    assert code == 1
    assert "already holds" in output
    assert "--resume" in output


@pytest.mark.parametrize("victim", ["inference", "trainer", "orchestrator"])
def test_a_killed_process_ends_the_run(digits_run: Digits, victim: str) -> None:
    process = digits_run.start("--max-steps", 500, "--supervision.max_restarts", 0)
    wait_for(lambda: read_jsonl(RunPaths(digits_run.output_dir).metrics / "trainer.jsonl"), process)
    os.kill(processes_of(digits_run.root)[victim], signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=900)
    assert time.monotonic() - killed < 15
    assert process.returncode == 1
    assert f"{victim} was killed by SIGKILL" in output
    assert f"last lines of {digits_run.output_dir}/logs/{victim}.log" in output
    assert processes_of(digits_run.root) == {}


def test_killed_torchrun_leaves_no_rank(digits_run: Digits) -> None:
    """Its ranks are in sessions of their own: nobody reaches them by their parent's group."""
    process = digits_run.start("--max-steps", 500, "--trainer.num_workers", 2)
    wait_for(lambda: _steps(RunPaths(digits_run.output_dir), "trainer"), process)
    config = f"{digits_run.output_dir}/configs/trainer.toml"
    ranks = [each for each in psutil.process_iter(["cmdline"]) if config in (each.info["cmdline"] or [])]
    assert len(ranks) == 3
    next(each for each in ranks if "torch.distributed.run" in each.info["cmdline"]).kill()
    output, _ = process.communicate(timeout=900)
    assert "trainer was killed by SIGKILL" in output
    _, alive = psutil.wait_procs(ranks, timeout=600)
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_launcher_leaves_no_process(digits_run: Digits, number: signal.Signals) -> None:
    process = digits_run.start("--max-steps", 500)
    wait_for(lambda: read_jsonl(RunPaths(digits_run.output_dir).metrics / "trainer.jsonl"), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=900)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped by SIGINT" in output
    wait_for(lambda: processes_of(digits_run.root) == {}, seconds=600)


def _steps(paths: RunPaths, name: str) -> list[int]:
    return [record["step"] for record in read_jsonl(paths.metrics / f"{name}.jsonl")]


def _kill_at(digits_run: Digits, process: subprocess.Popen[str], victim: str, step: int) -> None:
    """Kills a process once the trainer has done a step, and waits until there is another in its place."""
    paths = RunPaths(digits_run.output_dir)
    wait_for(lambda: max(_steps(paths, "trainer"), default=0) >= step, process)
    pid = processes_of(digits_run.root)[victim]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: processes_of(digits_run.root).get(victim, pid) != pid, process)


def test_a_run_mends_itself(digits_run: Digits) -> None:
    """Both servers, the trainer and the orchestrator are killed in turn; the run ends as if nothing had happened."""
    paths = RunPaths(digits_run.output_dir)
    process = digits_run.start(
        "--max-steps", 12, "--num-servers", 2, "--trainer.ckpt.interval", 1, "--supervision.max_resumes", 2,
        "--supervision.backoff", 0.1, "--supervision.health_interval", 0.2, "--orchestrator.eval.interval", 3,
    )  # fmt: skip
    for step, victim in enumerate(["inference_0", "trainer", "inference_1", "orchestrator"], start=1):
        _kill_at(digits_run, process, victim, 2 * step)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "inference_0 was killed by SIGKILL; restarting it" in output
    assert "trainer was killed by SIGKILL; going back (1 of 2, max_resumes)" in output
    summary = json.loads((digits_run.output_dir / "summary.json").read_text())
    assert summary["restarts"] == {"inference_0": 1, "inference_1": 1, "trainer": 2, "orchestrator": 2}
    assert summary["resumes"] == 2
    assert _steps(paths, "trainer") == _steps(paths, "orchestrator") == list(range(1, 13))
    assert _steps(paths, "eval") == [0, 3, 6, 9, 12]
    # No server ever sampled with weights that were not the step's own.
    records = read_jsonl(paths.metrics / "trainer.jsonl")
    assert max(record["mismatch/mean_abs"] for record in records) < 1e-5
    assert all(record["off_policy/mean"] == 0 for record in records)
    for step in range(1, 13):
        ids = [record["id"] for record in read_jsonl(paths.rollout_step(step) / "rollouts.jsonl")]
        assert len(ids) == len(set(ids))


def test_a_server_that_hangs_is_replaced(digits_run: Digits) -> None:
    process = digits_run.start(
        "--max-steps", 6, "--supervision.health_interval", 0.2, "--supervision.health_timeout", 3,
        "--supervision.backoff", 0.1,
    )  # fmt: skip
    wait_for(lambda: _steps(RunPaths(digits_run.output_dir), "trainer"), process)
    os.kill(processes_of(digits_run.root)["inference"], signal.SIGSTOP)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "inference has not answered" in output
    assert _steps(RunPaths(digits_run.output_dir), "trainer") == list(range(1, 7))


def test_a_server_that_can_not_start_ends_the_run(digits_run: Digits) -> None:
    code, output = digits_run.run("--inference.engine.device", "cuda")
    _assert_clear(code, output, "inference ended with exit code 1", "torch finds no GPU")


def test_all_metrics_are_at_one_address(digits_run: Digits) -> None:
    process = digits_run.start("--max-steps", 500, "--metrics.port", port := free_port(), "--num-servers", 2)
    names = {"inference_0", "inference_1", "trainer", "orchestrator"}
    all_up = dict.fromkeys(names, True)
    wait_for(lambda: len(_steps(RunPaths(digits_run.output_dir), "trainer")) >= 2, process)
    wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").json() == all_up, process)
    families = {
        family.name: {sample.labels.get("process"): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{port}/metrics").text)
    }
    assert families["pointillist_trainer_step"][None] >= 2
    assert "pointillist_orchestrator_reward_mean" in families
    assert families["pointillist_process_up"] == dict.fromkeys(names, 1.0)
    assert families["pointillist_process_resident_bytes"].keys() == names
    assert {"inference_0", "inference_1"} <= families["pointillist_weight_version"].keys()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=900)


def test_the_same_samples_twice(digits_run: Digits) -> None:
    """Deterministic mode, with two servers among which chance spreads the groups; another seed as the control."""
    sampled = []
    for number, seed in enumerate((3, 3, 4)):
        output_dir = digits_run.root / f"run{number}"
        code, output = digits_run.run(
            "--deterministic", "true", "--num-servers", 2, "--seed", seed, "--output-dir", output_dir
        )
        assert code == 0, output
        steps = [read_jsonl(RunPaths(output_dir).rollout_step(step) / "rollouts.jsonl") for step in (1, 2, 3)]
        text = json.dumps([[{**record, "branches": _told(record)} for record in step] for step in steps])
        weights = (output_dir / "model" / "model.safetensors").read_bytes()
        sampled.append((text, hashlib.sha256(weights).hexdigest()))
    assert sampled[0] == sampled[1]
    assert sampled[0] != sampled[2]


def _told(record: dict[str, Any]) -> list[Any]:
    """What was said in a rollout, without the run's folder."""
    return [[m["content"] for m in branch["messages"] if m["role"] == "assistant"] for branch in record["branches"]]


@pytest.mark.parametrize("moment", ["before the first checkpoint", "while resuming"])
def test_everything_is_killed_at_once(digits_run: Digits, moment: str) -> None:
    paths = RunPaths(digits_run.output_dir)
    process = digits_run.start("--max-steps", 500)
    wait_for(lambda: _steps(paths, "trainer"), process)
    os.killpg(process.pid, signal.SIGKILL)
    kill_leftovers(digits_run.root)
    process.communicate()
    (paths.metrics / "trainer.jsonl").open("a").write('{"step": 2, "lo')  # the last line was half written
    if moment == "while resuming":
        again = digits_run.start("--max-steps", 500, "--resume")
        wait_for(lambda: processes_of(digits_run.root), again)
        os.killpg(again.pid, signal.SIGKILL)
        kill_leftovers(digits_run.root)
        again.communicate()
    code, output = digits_run.run("--max-steps", 2, "--resume")
    assert code == 0, output
    assert "resuming after step 0" in output
    assert _steps(paths, "trainer") == _steps(paths, "orchestrator") == [1, 2]
    assert _steps(paths, "eval") == [0, 2]
    verified = pointillist("store", "verify", "--run", digits_run.output_dir)
    output, _ = verified.communicate(timeout=900)
    assert verified.returncode == 0, output


def test_resume_goes_on_after_the_last_checkpoint(digits_run: Digits) -> None:
    paths = RunPaths(digits_run.output_dir)
    process = digits_run.start("--max-steps", 500, "--trainer.ckpt.interval", 2)
    wait_for(lambda: len(read_jsonl(paths.metrics / "trainer.jsonl")) >= 5, process)
    os.kill(processes_of(digits_run.root)["trainer"], signal.SIGKILL)
    process.communicate(timeout=900)
    checkpoint = max(int(path.name.removeprefix("step_")) for path in paths.checkpoints.glob("step_*"))
    state = json.loads((paths.checkpoint_step(checkpoint) / "orchestrator.json").read_text())
    assert state["task_position"] >= 4 * checkpoint
    half = digits_run.output_dir / "assets" / "images" / "ab" / ".abc.png.1.2.tmp"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"what a killed writer leaves")
    code, output = digits_run.run("--max-steps", checkpoint + 3, "--resume")
    assert code == 0, output
    assert not half.exists()
    assert f"resuming after step {checkpoint}" in output
    for name in ("trainer", "orchestrator"):
        steps = [record["step"] for record in read_jsonl(paths.metrics / f"{name}.jsonl")]
        assert steps == list(range(1, checkpoint + 4))
    mismatches = [record["mismatch/mean_abs"] for record in read_jsonl(paths.metrics / "trainer.jsonl")]
    assert max(mismatches) < 1e-5


def test_a_rival_is_refused_and_a_stopped_run_loses_no_step(digits_run: Digits) -> None:
    """A second launcher changes nothing in a live run's folder; one that is hung up on saves its last step."""
    paths = RunPaths(digits_run.output_dir)
    process = digits_run.start("--max-steps", 500)  # no checkpoint for ten minutes by itself
    wait_for(lambda: len(_steps(paths, "trainer")) >= 2, process, seconds=300)
    for again in ([], ["--resume"]):
        code, output = digits_run.run("--max-steps", 500, *again)
        _assert_clear(code, output, f"is in use by process {process.pid} on ")
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGHUP, output
    last = _steps(paths, "trainer")[-1]
    assert last >= 2
    assert f"stopped by SIGHUP; --resume goes on after step {last}" in output.replace("\n", " ")
    code, output = digits_run.run("--max-steps", last + 1, "--resume")
    assert code == 0, output
    assert _steps(paths, "trainer") == _steps(paths, "orchestrator") == list(range(1, last + 2))


def test_another_seed_is_not_resumed(digits_run: Digits) -> None:
    code, output = digits_run.run("--max-steps", 1)
    assert code == 0, output
    code, output = digits_run.run("--max-steps", 2, "--seed", 5, "--resume")
    _assert_clear(code, output, "seed: 0 -> 5", "--resume-with-changes")
    code, output = digits_run.run("--max-steps", 2, "--seed", 5, "--resume-with-changes")
    assert code == 0, output


def test_overlapping_rollouts_stay_within_their_bound(digits_run: Digits) -> None:
    code, output = digits_run.run("--orchestrator.max_off_policy_steps", 2, "--max-steps", 6)
    assert code == 0, output
    records = read_jsonl(RunPaths(digits_run.output_dir).metrics / "trainer.jsonl")
    assert len(records) == 6
    assert all(0 <= record["off_policy/mean"] <= 2 for record in records)
    # They do overlap: some token was sampled with weights from before the last step.
    assert max(record["off_policy/max"] for record in records) >= 1


def test_two_ranks_compute_what_one_computes(digits_run: Digits) -> None:
    records = []
    for workers in (1, 2):
        output_dir = digits_run.root / f"run{workers}"
        code, output = digits_run.run("--trainer.num_workers", workers, "--max-steps", 2, "--output-dir", output_dir)
        assert code == 0, output
        records.append(read_jsonl(RunPaths(output_dir).metrics / "trainer.jsonl"))
    for one, two in zip(*records, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["optim/grad_norm"] == pytest.approx(one["optim/grad_norm"], rel=1e-3)
        assert two["tokens/trained"] == one["tokens/trained"]
        assert two["mismatch/mean_abs"] < 1e-5


def test_batches_travel_over_zmq(digits_run: Digits) -> None:
    code, output = digits_run.run("--transport.type", "zmq", "--trainer.num_workers", 2)
    assert code == 0, output
    records = read_jsonl(RunPaths(digits_run.output_dir).metrics / "trainer.jsonl")
    assert len(records) == 3
    assert max(record["mismatch/mean_abs"] for record in records) < 1e-5
    assert not list((digits_run.output_dir / "rollouts").glob("*/rank_*.bin"))


def test_blanked_pictures_are_one_picture(digits_run: Digits) -> None:
    code, output = digits_run.run("--env.blank_images", "true", "--max-steps", 1)
    assert code == 0, output
    assert len(list((digits_run.output_dir / "assets" / "images").rglob("*.png"))) == 1


def test_dry_run_writes_configs_and_starts_nothing(digits_run: Digits) -> None:
    code, output = digits_run.run("--dry-run")
    assert code == 0, output
    assert sorted(path.name for path in digits_run.output_dir.rglob("*.toml")) == [
        "assets.toml", "inference.toml", "orchestrator.toml", "rl.toml", "trainer.toml",
    ]  # fmt: skip
    assert sorted(path.name for path in digits_run.output_dir.iterdir()) == ["configs"]


def _assert_clear(code: int, output: str, *messages: str) -> None:
    assert code == 1, output
    assert "Traceback" not in output, output
    flat = " ".join(output.split())
    for message in messages:
        assert message in flat, output


def test_bad_input_is_told_before_the_start(digits_run: Digits) -> None:
    _assert_clear(*digits_run.run("--model.name", "./nowhere"), "model folder './nowhere' does not exist")
    _assert_clear(*digits_run.run("--max-stepz", 3), "did you mean 'max_steps'")
    _assert_clear(*digits_run.run("--resume"), "nothing to resume")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _assert_clear(*digits_run.run("--inference.server.port", port), f"cannot listen on 127.0.0.1:{port}")
    left = digits_run.output_dir.iterdir() if digits_run.output_dir.exists() else []
    assert {path.name for path in left} <= {"run.lock"}


def test_an_environment_that_fails_to_import(digits_run: Digits) -> None:
    code, output = digits_run.run("--env.id", "no_such_module:Env")
    _assert_clear(
        code, output, "orchestrator ended with exit code 1", "environment 'no_such_module:Env' can not be imported"
    )


CONTENT = """
from pointillist.environments.digits import DigitsEnvironment


class Content(DigitsEnvironment):
    async def rollout(self, task, session):
        await super().rollout(task, session)
        return 0.25
"""


def test_rewards_that_never_differ_end_the_run_with_what_was_said(digits_run: Digits) -> None:
    (digits_run.root / "content.py").write_text(CONTENT)
    code, output = digits_run.run("--env.id", "content:Content", environ={"PYTHONPATH": str(digits_run.root)})
    _assert_clear(code, output, "without any difference in reward (rewards were 0.25)", "pointillist view")
    records = read_jsonl(RunPaths(digits_run.output_dir).rollouts_file(1))
    assert len(records) == 320
    assert {record["outcome"] for record in records} == {"zero_variance"}


SOLVED = """
from pointillist.environments.digits import DigitsEnvironment


class Solved(DigitsEnvironment):
    \"\"\"Two steps teach something, then every training rollout is right. Every fourth held-out one fails.\"\"\"

    def __init__(self, data_dir):
        super().__init__(data_dir)
        self.count = 0

    async def rollout(self, task, session):
        await super().rollout(task, session)
        if task in self.eval_tasks():
            if self.eval_tasks().index(task) % 4 == 0:
                raise SystemExit(0)
            return 1.0
        self.count += 1
        return float(self.count > 64 or self.count % 2)
"""


def test_a_policy_that_solves_every_task_ends_its_run_as_a_success(digits_run: Digits) -> None:
    """With checkpoint, model and evaluation of the last step; held-out tasks that failed are not left out."""
    (digits_run.root / "solved.py").write_text(SOLVED)
    arguments = ("--env.id", "solved:Solved", "--max-steps", 50, "--transport.type", "zmq")
    environ = {"PYTHONPATH": str(digits_run.root)}
    code, output = digits_run.run(*arguments, "--orchestrator.max_retries", 0, environ=environ)
    assert code == 0, output
    assert "solved at step 3" in output
    paths = RunPaths(digits_run.output_dir)
    assert _steps(paths, "trainer") == _steps(paths, "orchestrator") == [1, 2, 3]
    summary = json.loads((digits_run.output_dir / "summary.json").read_text())
    assert (summary["solved_at_step"], summary["steps"]) == (3, 3)
    assert (summary["final_accuracy"], summary["final_eval_tasks"]) == (0.75, 20)
    assert summary["final_eval_failed"] == {"SystemExit": 5}
    assert latest_checkpoint(paths) == 3
    assert (paths.model / "model.safetensors").is_file()
    evaluated = read_jsonl(paths.eval_file(3))
    assert sum(record["error"] is not None for record in evaluated) == 5
    failed = next(record for record in evaluated if record["error"] is not None)
    assert failed["branches"][0]["messages"]
    assert "raise SystemExit(0)" in failed["error"]["traceback"]
    assert all(record["answer"] in set("0123456789") for record in evaluated)
    log = (paths.logs / "orchestrator.log").read_text()
    assert "nothing to learn from in round 1 of 10" in log
    assert log.count("Traceback") == 1  # one cause
    # It can be gone on with: it is still solved.
    code, output = digits_run.run(*arguments, "--orchestrator.max_retries", 0, "--resume", environ=environ)
    assert code == 0, output
    assert _steps(paths, "trainer")[:4] == [1, 2, 3, 4]


def test_a_corrupt_picture_in_the_task_set(digits_run: Digits) -> None:
    picture = digits_run.root / "data" / "0007.png"
    picture.write_bytes(picture.read_bytes()[:100])
    _assert_clear(*digits_run.run(), "picture 0007.png", "image is truncated")


def test_a_stale_image_folder_in_the_environment_is_overridden(digits_run: Digits) -> None:
    code, output = digits_run.run("--max-steps", 1, environ={"VF_RENDERER_IMAGE_OFFLOAD_DIR": "/nowhere/stale"})
    assert code == 0, output
    assert "VF_RENDERER_IMAGE_OFFLOAD_DIR was /nowhere/stale" in output
    assert list((digits_run.output_dir / "assets" / "images").rglob("*.png"))


VANISHING = """
from pathlib import Path
from pointillist.environments.digits import DigitsEnvironment


class Vanishing(DigitsEnvironment):
    def __init__(self, data_dir, share, corrupt):
        super().__init__(data_dir)
        self.share = share
        self.corrupt = corrupt

    async def rollout(self, task, session):
        await super().rollout(task, session)
        if task.id.startswith("train") and int(task.id[6:10]) % 10 < self.share:
            uri = session.messages[0]["content"][0]["image_url"]["url"]
            path = Path(uri.removeprefix("file://"))
            path.write_bytes(b"noise") if self.corrupt else path.unlink(missing_ok=True)
        return float(session.turns[0].completion.token_ids[0])
"""


@pytest.mark.parametrize(
    ("corrupt", "share", "fraction"), [(False, 5, 1.0), (False, 10, 0.05), (True, 5, 1.0), (True, 10, 0.05)]
)
def test_lost_images_cost_their_samples_or_stop_the_run(
    digits_run: Digits, corrupt: bool, share: int, fraction: float
) -> None:
    (digits_run.root / "vanishing.py").write_text(VANISHING)
    arguments = {"data_dir": str(digits_run.root / "data"), "share": share, "corrupt": corrupt}
    code, output = digits_run.run(
        "--env.id", "vanishing:Vanishing", "--env.args", json.dumps(arguments), "--multimodal.missing_image_retries", 0,
        "--multimodal.missing_image_max_fraction", fraction, environ={"PYTHONPATH": str(digits_run.root)},
    )  # fmt: skip
    records = read_jsonl(RunPaths(digits_run.output_dir).metrics / "trainer.jsonl")
    if fraction == 1.0:
        assert code == 0, output
        count = "mm/samples_quarantined" if corrupt else "mm/samples_zeroed"
        assert sum(record[count] for record in records) > 0
        faults = read_jsonl(digits_run.output_dir / "faults.jsonl")
        assert {fault["kind"] for fault in faults} == {"corrupt" if corrupt else "missing"}
        assert {"is corrupt" in fault["message"] for fault in faults} == {corrupt}
        assert sum(record["tokens/trained"] for record in records) > 0
    else:
        kind = "corrupt" if corrupt else "missing"
        _assert_clear(code, output, f"images are {kind}, more than multimodal.missing_image_max_fraction = 0.05")
