"""Runs as jobs of a real SLURM with two nodes: submitted, finished, preempted, requeued, failed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointillist.base.jsonl import read_jsonl
from pointillist.runs.paths import RunPaths
from tests.helpers.processes import Digits, processes_of
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.integration

TWO_NODES = ("--slurm.job_name", "digits", "--slurm.inference_nodes", 1, "--slurm.trainer_nodes", 1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
    except AssertionError:
        print(cluster.logs())
        raise
    yield cluster
    cluster.stop()


def _submit(cluster: Cluster, run: Digits, *overrides: object) -> str:
    code, output = run.run(*overrides, environ=cluster.environ)
    assert code == 0, output
    assert "submitted job " in output
    return output.partition("submitted job ")[2].partition(";")[0].strip()


def _wait_for(cluster: Cluster, job: str, run: Digits, states: set[str], seconds: float = 900.0) -> str:
    deadline = time.monotonic() + seconds
    while (state := cluster.state(job)) not in states:
        assert state not in {"FAILED", "CANCELLED", "NODE_FAIL"}, f"{state}: {_log(run, job)}"
        assert time.monotonic() < deadline, f"{state}: {_log(run, job)}"
        time.sleep(0.3)
    return state


def _log(run: Digits, job: str) -> str:
    log = RunPaths(run.output_dir).logs / f"slurm-{job}.log"
    return log.read_text() if log.is_file() else f"no {log}"


def _steps(run: Digits) -> list[int]:
    return [record["step"] for record in read_jsonl(RunPaths(run.output_dir).metrics / "trainer.jsonl")]


def _wait_for_step(cluster: Cluster, job: str, run: Digits, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(_steps(run), default=0) < step:
        assert cluster.state(job) in {"PENDING", "RUNNING", "CONFIGURING"}, _log(run, job)
        assert time.monotonic() < deadline, _log(run, job)
        time.sleep(0.2)


def test_a_run_on_two_nodes(cluster: Cluster, digits_run: Digits) -> None:
    """One node serves with two servers, one trains with two ranks; a stale image folder is in the environment."""
    os.environ["VF_RENDERER_IMAGE_OFFLOAD_DIR"] = "/nowhere/stale"
    try:
        job = _submit(cluster, digits_run, *TWO_NODES, "--num-servers", 2, "--trainer.num_workers", 2)
    finally:
        del os.environ["VF_RENDERER_IMAGE_OFFLOAD_DIR"]
    _wait_for(cluster, job, digits_run, {"COMPLETED"})
    paths = RunPaths(digits_run.output_dir)
    summary = json.loads((paths.output_dir / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["max_logprob_mismatch"] < 1e-5
    # Both nodes serve metrics, and the head shows the progress, as a run on one machine does.
    assert _log(digits_run, job).count("metrics of all processes: http://") == 2
    assert "step 3/3" in _log(digits_run, job)
    # One resolution of the image folder: submission, both nodes and all their processes.
    assert list((paths.output_dir / "assets" / "images").rglob("*.png"))
    assert not Path("/nowhere").exists()
    logs = {log.name for log in paths.logs.glob("*.log")}
    assert logs == {"inference_0.log", "inference_1.log", "trainer.log", "orchestrator.log", f"slurm-{job}.log"}
    # The secret that the run's processes share is for their user only, and in no config or script.
    key = paths.output_dir / ".run_key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert not any(
        key.read_text() in file.read_text()
        for file in [*paths.configs.rglob("*"), paths.output_dir / "rl.sbatch"]
        if file.is_file()
    )


def test_one_node_and_zmq(cluster: Cluster, digits_run: Digits) -> None:
    job = _submit(cluster, digits_run, "--slurm.job_name", "alone", "--transport.type", "zmq")
    _wait_for(cluster, job, digits_run, {"COMPLETED"})
    assert _steps(digits_run) == [1, 2, 3]
    assert "summary" in _log(digits_run, job)


def test_a_preempted_job_goes_on(cluster: Cluster, digits_run: Digits) -> None:
    """A job of a partition with priority takes the nodes; the run is requeued and goes on from its checkpoint."""
    job = _submit(
        cluster, digits_run, *TWO_NODES, "--max-steps", 14, "--trainer.ckpt.interval", 2, "--transport.type", "zmq",
        "--slurm.partition", "work", "--slurm.options", '{"exclusive": true}',
    )  # fmt: skip
    _wait_for_step(cluster, job, digits_run, 5)
    cluster.command("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    _wait_for(cluster, job, digits_run, {"PENDING"}, seconds=600)
    assert processes_of(digits_run.root) == {}
    cluster.command("scontrol", "release", job)
    # A requeued job waits two minutes unless it is told to begin.
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")
    _wait_for(cluster, job, digits_run, {"COMPLETED"})
    assert _steps(digits_run) == list(range(1, 15))
    assert "resuming after step" in _log(digits_run, job)


def test_a_node_that_fails_ends_or_requeues_the_job(cluster: Cluster, digits_run: Digits) -> None:
    job = _submit(
        cluster, digits_run, *TWO_NODES, "--max-steps", 10, "--trainer.ckpt.interval", 1,
        "--supervision.max_resumes", 1,
    )  # fmt: skip
    _wait_for_step(cluster, job, digits_run, 3)
    os.kill(processes_of(digits_run.root)["trainer"], signal.SIGKILL)
    _wait_for(cluster, job, digits_run, {"PENDING"}, seconds=600)
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")
    _wait_for_step(cluster, job, digits_run, 6)
    os.kill(processes_of(digits_run.root)["orchestrator"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while cluster.state(job) != "FAILED":
        assert time.monotonic() < deadline
        time.sleep(0.3)
    log = _log(digits_run, job)
    assert "requeueing job" in log
    assert "orchestrator was killed by SIGKILL" in log
    assert processes_of(digits_run.root) == {}
    # And by hand from where it was.
    job = _submit(cluster, digits_run, *TWO_NODES, "--max-steps", 8, "--resume")
    _wait_for(cluster, job, digits_run, {"COMPLETED"})
    assert _steps(digits_run) == list(range(1, 9))


def test_dry_run_shows_the_script(digits_run: Digits) -> None:
    code, script = digits_run.run(*TWO_NODES, "--dry-run", "--slurm.time", "1:00:00", "--slurm.gpus_per_node", 8)
    assert code == 0, script
    for line in ("--nodes=2", "--time=1:00:00", "--gpus-per-node=8", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert not digits_run.output_dir.exists()
    # The script has no paths but those of Python, the config and the log, and sets nothing in the environment.
    lines = [line for line in script.splitlines() if not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    config = digits_run.output_dir / "configs" / "rl.toml"
    assert lines[1:] == [
        f"exec srun --kill-on-bad-exit=1 --label {sys.executable} -m pointillist slurm-node @ {config}"
    ]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_what_can_not_be_submitted(cluster: Cluster, digits_run: Digits) -> None:
    code, output = digits_run.run(*TWO_NODES, "--slurm.partition", "nowhere", environ=cluster.environ)
    assert code == 1
    assert "sbatch refused" in output
    assert "invalid partition" in output
