"""Who runs what and where, scripts of jobs, and the supervision of processes."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from pydantic import ValidationError

from pointillist.base.digests import seal_folder, take_note
from pointillist.base.jsonl import read_jsonl
from pointillist.cli.options import parse_cli
from pointillist.config import RLConfig, SlurmConfig, SupervisionConfig, TrainerConfig
from pointillist.config.shared import ServerConfig
from pointillist.errors import ConfigError, LaunchError
from pointillist.launch.devices import gpu_shares
from pointillist.launch.metrics import MetricsEndpoint
from pointillist.launch.placement import Machine, Placement
from pointillist.launch.prepare import complete, environment
from pointillist.launch.processes import start
from pointillist.launch.rendezvous import Rendezvous
from pointillist.launch.run_dir import resume_step, rewind
from pointillist.launch.slurm import render
from pointillist.launch.supervise import Part, interruptible, supervise, where_it_goes_on
from pointillist.launch.supervisor import Spec, Supervisor
from pointillist.runs.config_files import load_toml, write_toml
from pointillist.runs.image_dir import resolve_image_dir
from pointillist.runs.paths import RunPaths, latest_checkpoint, steps_in

JOB = ["--slurm.job_name", "x", "--slurm.inference_nodes", 1]
BASE = ["--model.name", "m", "--env.id", "digits"]


def _config(*arguments: object) -> RLConfig:
    return parse_cli(RLConfig, [*BASE, *map(str, arguments)])


def _machine(index: int, servers: int, host: str = "10.0.0.") -> Machine:
    return Machine(
        index=index, host=f"{host}{index}", server_ports=[8000 + n for n in range(servers)], transport_port=7000,
        assets_port=7001, rendezvous_port=7002,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-servers", 0], "needs orchestrator.client.base_url"),
        (["--num-servers", 2, "--inference.server.port", 8000], "set the port to 0"),
        (["--deterministic", "true", "--orchestrator.max_off_policy_steps", 1], "max_off_policy_steps = 0"),
        (JOB, "give both, or neither"),
        (["--slurm.job_name", "two words"], "one word without spaces"),
        (["--slurm.job_name", "x", "--slurm.options", '{"a;b": 1}'], "name of an sbatch option"),
        (["--metrics.host", "0.0.0.0"], "metrics.api_key_var"),
        ([*JOB, "--slurm.trainer_nodes", 2, "--trainer.num_workers", 3], "spread evenly"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_told(
    arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ConfigError, ValidationError, SystemExit)) as raised:
        _config(*arguments)
    flat = " ".join((str(raised.value) + capsys.readouterr().err).replace("│", " ").split())
    assert message in flat


def test_one_machine_has_every_role(tmp_path: Path) -> None:
    config = _config("--num-servers", 2, "--multimodal.assets.serve", "true", "--output-dir", tmp_path)
    placement = Placement.of(config, [_machine(0, 2, host="127.0.0.")])
    placement.write_configs()
    assert placement.config.orchestrator.client.base_url == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    assert placement.config.inference.multimodal.assets.urls == ["http://127.0.0.1:7001"]
    found = placement.processes(0, {})
    assert [spec.name for spec in found] == ["inference_0", "inference_1", "assets", "trainer", "orchestrator"]
    assert [spec.health_url for spec in found] == [
        "http://127.0.0.1:8000/health", "http://127.0.0.1:8001/health", "http://127.0.0.1:7001/health", None, None,
    ]  # fmt: skip
    assert all(Path(spec.command[-1]).is_file() for spec in found)


def test_roles_are_spread_over_a_jobs_nodes(tmp_path: Path) -> None:
    config = _config(
        "--slurm.job_name", "x", "--slurm.inference_nodes", 2, "--slurm.trainer_nodes", 2, "--trainer.num_workers", 8,
        "--num-servers", 2, "--transport.type", "zmq", "--output-dir", tmp_path,
    )  # fmt: skip
    before = config.model_dump()
    placement = Placement.of(config, [_machine(0, 2), _machine(1, 2), _machine(2, 0), _machine(3, 0)])
    assert config.model_dump() == before
    placed = placement.config
    assert placed.orchestrator.client.base_url == [
        "http://10.0.0.0:8000", "http://10.0.0.0:8001", "http://10.0.0.1:8000", "http://10.0.0.1:8001",
    ]  # fmt: skip
    assert placed.orchestrator.client.api_key_var == placed.inference.server.api_key_var == "POINTILLIST_RUN_KEY"
    assert placed.trainer.transport.address == placed.orchestrator.transport.address == "tcp://10.0.0.2:7000"
    placement.resumed_after(3).write_configs()
    assert (placed.trainer.resume_step, placement.paths) == (None, RunPaths(tmp_path))
    assert load_toml(TrainerConfig, placement.paths.configs / "trainer.toml").resume_step == 3
    names = [[spec.name for spec in placement.processes(index, {})] for index in range(4)]
    assert names == [
        ["inference_0", "inference_1"], ["inference_2", "inference_3"], ["trainer_0", "orchestrator"], ["trainer_1"],
    ]  # fmt: skip
    second = " ".join(placement.processes(3, {})[0].command)
    for argument in ("--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=10.0.0.2"):
        assert argument in second
    assert 'host = "10.0.0.1"' in (placement.paths.configs / "inference_3.toml").read_text()


def test_gpus_are_shared_out(tmp_path: Path) -> None:
    eight = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    shares = gpu_shares(eight, servers=2, ranks=4)
    assert shares.server(0) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert shares.server(1) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert shares.trainer() == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    for nothing in (
        gpu_shares({}, servers=2, ranks=1, driver_list=tmp_path / "none"),
        gpu_shares(eight, servers=0, ranks=8),
        gpu_shares({"CUDA_VISIBLE_DEVICES": "0"}, servers=1, ranks=1),
    ):
        assert nothing.trainer() == {}
        assert nothing.server(0) == {}
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    assert gpu_shares({}, servers=1, ranks=1, driver_list=tmp_path).server(0) == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.j2"
    own.write_text("#!/bin/sh\n# {{ slurm.job_name }} on {{ slurm.num_nodes }}\n{{ python }} {{ config }}\n")
    slurm = SlurmConfig(job_name="x", template=own)
    assert render(slurm, RunPaths(tmp_path)).splitlines()[1] == "# x on 1"
    own.write_text("{{ nothing }}")
    with pytest.raises(LaunchError, match="cannot be rendered"):
        render(slurm, RunPaths(tmp_path))


def test_nodes_meet(tmp_path: Path) -> None:
    meetings = [Rendezvous(tmp_path / "1.0", 2, 5.0) for _ in range(2)]
    first = threading.Thread(target=meetings[0].join, args=(_machine(0, 1),))
    first.start()
    meetings[1].join(_machine(1, 0))
    assert [machine.index for machine in meetings[1].machines()] == [0, 1]
    meetings[0].announce()
    meetings[1].wait_for_go()
    assert not meetings[1].is_finished()
    meetings[0].finish()
    assert meetings[1].is_finished()
    with pytest.raises(LaunchError, match="for nodes 2 in"):
        Rendezvous(tmp_path / "1.0", 3, 0.1).machines()
    # The next start of the job meets elsewhere: nobody of the last one is mistaken for somebody of this one.
    with pytest.raises(LaunchError, match="for the head's configs"):
        Rendezvous(tmp_path / "1.1", 2, 0.1).wait_for_go()
    first.join()


def test_going_back_removes_what_came_after(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    with pytest.raises(LaunchError, match="holds no run"):
        resume_step(paths)
    paths.configs.mkdir(parents=True)
    (paths.configs / "rl.toml").touch()
    assert resume_step(paths) == 0
    for step in (1, 2, 3):
        paths.rollout_step(step).mkdir(parents=True)
        paths.broadcast_step(step).mkdir(parents=True)
    (paths.checkpoint_step(2)).mkdir(parents=True)
    (paths.checkpoints / ".step_3.tmp").mkdir()
    (paths.checkpoint_step(2) / "orchestrator.json").touch()
    seal_folder(paths.checkpoint_step(2))
    paths.metrics.mkdir()
    (paths.metrics / "trainer.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    (paths.output_dir / "faults.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    for version in (0, 2, 3):
        paths.eval_file(version).touch()
    assert resume_step(paths) == 2
    rewind(paths, 2)
    assert (paths.metrics / "trainer.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (paths.output_dir / "faults.jsonl").read_text() == '{"step": 2}\n'
    assert [path.name for path in sorted(paths.rollouts.glob("eval_*"))] == ["eval_0.jsonl", "eval_2.jsonl"]
    assert not paths.rollout_step(3).exists()
    assert not paths.broadcast_step(2).exists()
    assert not (paths.checkpoints / ".step_3.tmp").exists()


def _checkpoint(paths: RunPaths, step: int) -> Path:
    folder = paths.checkpoint_step(step)
    (folder / "trainer").mkdir(parents=True)
    for name in ("orchestrator.json", "trainer/.metadata", "trainer/__0_0.distcp"):
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 100)
    seal_folder(folder)
    return folder


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty state": (lambda f: (f / "orchestrator.json").write_bytes(b""), "orchestrator.json has 0 bytes"),
    "empty metadata": (lambda f: (f / "trainer/.metadata").write_bytes(b""), "trainer/.metadata has 0 bytes"),
    "half": (lambda f: os.truncate(f / "trainer/__0_0.distcp", 50), "trainer/__0_0.distcp has 50 bytes"),
    "flipped": (lambda f: _flip(f / "trainer/__0_0.distcp"), "has other bytes than were written"),
    "file missing": (lambda f: (f / "trainer/__0_0.distcp").unlink(), "trainer/__0_0.distcp is not there"),
    "folder for a file": (
        lambda f: ((f / "trainer/.metadata").unlink(), (f / "trainer/.metadata").mkdir()), "metadata is not a file",
    ),
    "no digests": (lambda f: (f / "digests.json").unlink(), "digests.json is not there"),
    "empty digests": (lambda f: (f / "digests.json").write_bytes(b""), "digests.json is malformed"),
    "other digests": (lambda f: (f / "digests.json").write_bytes(b'{"files": [1]}'), "digests.json is malformed"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "digests.json is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_before_anything_is_cut(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths = RunPaths(tmp_path)
    paths.configs.mkdir()
    (paths.configs / "rl.toml").touch()
    paths.metrics.mkdir()
    metrics = paths.metrics / "trainer.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    act, said = DAMAGE[name]
    good, newest = _checkpoint(paths, 3), _checkpoint(paths, 6)
    act(newest)
    assert resume_step(paths) == 3
    assert f"{newest} is damaged and is passed over: " in caplog.text
    assert said in caplog.text
    assert len(read_jsonl(metrics)) == 7
    rewind(paths, 3)
    assert len(read_jsonl(metrics)) == 3
    assert sorted(path.name for path in paths.checkpoints.iterdir()) == ["step_3", "step_6.damaged"]
    _flip(good / "orchestrator.json")
    with pytest.raises(LaunchError, match=r"none of the checkpoints \[3\] .* is whole"):
        resume_step(paths)
    assert len(read_jsonl(metrics)) == 3


def test_odd_names_are_no_steps(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    _checkpoint(paths, 6)
    for name in ("step_x", "step_9"):
        (paths.checkpoints / name).write_text("a file")
    for name in ("step_²", "step_0007", "step_٣", "step_", "step_-1", "step_+8", "step_1_0", "step_" + "9" * 200):
        (paths.checkpoints / name).mkdir()
    assert steps_in(paths.checkpoints) == [6]
    assert latest_checkpoint(paths) == 6
    paths.rollouts.mkdir()
    (paths.rollouts / "step_9").write_text("a file in the way of a step")
    (paths.rollouts / "eval_².jsonl").touch()
    (paths.rollouts / "eval_9.jsonl").touch()
    rewind(paths, 6)
    assert [path.name for path in paths.rollouts.iterdir()] == ["eval_².jsonl"]


@pytest.mark.parametrize(
    "line", [b"\0" * 500, b'{"step": 1, "rew', b"[]", b"1", b"null", b"", b'"x"', b"\xff", b"[" * 100_000, b"9" * 5000]
)
def test_a_broken_line_of_metrics_costs_only_itself(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics" / "trainer.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": "x"}\n{"st')
    for _ in range(2):
        assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": "x"}]
    assert caplog.text.count(f"{path}: line 2 is not a JSON object") == 1
    rewind(RunPaths(tmp_path), 1)
    assert path.read_bytes() == b'{"step": 1}\n'


_SERVER = """
import http.server, os, sys
marks = sys.argv[2]
number = len(os.listdir(marks))
open(f"{marks}/{number}", "w").close()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
if sys.argv[3] == "never": sys.exit(3)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
for _ in range(3): server.handle_request()
if number < int(sys.argv[3]): os.kill(os.getpid(), 9)
server.serve_forever()
"""


def _supervisor(tmp_path: Path, deaths: str, work: str, **config: float) -> tuple[Supervisor, list[str], Path]:
    from tests.helpers.processes import free_port

    marks = tmp_path / "marks"
    marks.mkdir()
    port = free_port()
    command = [sys.executable, "-c", _SERVER, str(port), str(marks), deaths]
    said: list[str] = []
    settings = SupervisionConfig(**{"backoff": 0.01, "health_interval": 0.05, **config})
    server = Spec("server", command, {}, tmp_path / "server.log", f"http://127.0.0.1:{port}/")
    worker = Spec("work", [sys.executable, "-c", work.format(marks=marks)], {}, tmp_path / "work.log")
    return Supervisor([server, worker], settings, said.append), said, marks


# Ends when the server has been started three times.
_WAIT = "import os, time\nwhile len(os.listdir({marks!r})) < 3: time.sleep(0.05)"


@pytest.mark.integration
def test_a_server_is_started_again_until_the_work_is_done(tmp_path: Path) -> None:
    supervisor, said, _ = _supervisor(tmp_path, "2", _WAIT.replace("{marks!r}", "'{marks}'"), max_restarts=3)
    supervisor.start()
    assert supervisor.run(lambda: True, lambda: None) is None
    supervisor.stop()
    assert supervisor.restarts() == {"server": 2}
    assert "server was killed by SIGKILL; restarting it in 0.01 s (1 of 3, supervision.max_restarts)" in said[0]
    assert "restarting it in 0.02 s (2 of 3" in said[1]


@pytest.mark.integration
def test_a_server_that_dies_too_often_ends_the_run(tmp_path: Path) -> None:
    supervisor, said, marks = _supervisor(tmp_path, "9", "import time; time.sleep(60)", max_restarts=1)
    supervisor.start()
    dead = supervisor.run(lambda: True, lambda: None)
    supervisor.stop()
    assert dead is not None
    assert dead.cause() == "server was killed by SIGKILL"
    assert len(said) == 1
    assert len(list(marks.iterdir())) == 2


@pytest.mark.integration
def test_a_server_that_never_worked_is_not_started_again(tmp_path: Path) -> None:
    supervisor, said, _ = _supervisor(tmp_path, "never", "import time; time.sleep(60)")
    supervisor.start()
    dead = supervisor.run(lambda: True, lambda: None)
    supervisor.stop()
    assert dead is not None
    assert dead.cause() == "server ended with exit code 3"
    assert said == []


BEATING = """
import os, signal, sys
from pathlib import Path
from pointillist.runs.heartbeat import beating, enter
with beating(Path(sys.argv[1]), "trainer"):
    enter("forward_backward", step=3)
    if sys.argv[2] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if sys.argv[2] == "exit":
        os._exit(0)
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("finish", None),
        ("exit", "trainer ended with exit code 0 before its work was done"),
        ("stop", "trainer was killed because it has given no sign of life"),
    ],
)
def test_work_is_done_only_when_its_heartbeat_says_so(tmp_path: Path, what: str, cause: str | None) -> None:
    """A process that ends early is dead whatever its code, and one that is stopped does not hold the run for ever."""
    command = [sys.executable, "-c", BEATING, str(tmp_path / "state"), what]
    spec = Spec("trainer", command, dict(os.environ), tmp_path / "log", state=tmp_path / "state")
    said: list[str] = []
    supervisor = Supervisor([spec], SupervisionConfig(phase_timeout=5), said.append)
    supervisor.start()
    dead = supervisor.run(lambda: True, lambda: None)
    supervisor.stop()
    if cause is None:
        assert dead is None
    else:
        assert dead is not None
        assert dead.cause().startswith(cause)
    if what == "stop":
        assert "(supervision.phase_timeout): killing it" in said[0]


def test_a_jobs_secrets_are_for_its_user_only(tmp_path: Path) -> None:
    from pointillist.launch.slurm import _read_environment, _read_key, _write_secrets

    _write_secrets(tmp_path, {"TOKEN": "secret"})
    key = _read_key(tmp_path / ".run_key")
    assert len(key) == 32
    _write_secrets(tmp_path, {"TOKEN": "other"})
    assert _read_key(tmp_path / ".run_key") == key
    assert _read_environment(tmp_path / ".run_env") == {"TOKEN": "other"}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    with pytest.raises(LaunchError, match="submit runs with"):
        _read_key(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, "{out}/assets/images"),
        ("$PICTURES/of/${WHO}", "/data/p/of/me"),
        ("~/pictures", "/home/me/pictures"),
        ("relative/pictures", "{cwd}/relative/pictures"),
    ],
)
@pytest.mark.parametrize("run_id", [None, "run_7"])
def test_a_job_resolves_the_image_folder_as_a_local_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, expected: str, run_id: str | None
) -> None:
    """On submission and on the node alike, whatever the node's environment says."""
    monkeypatch.chdir(tmp_path)
    here = {"PICTURES": "/data/p", "WHO": "me", "HOME": "/home/me", "VF_RENDERER_IMAGE_OFFLOAD_DIR": "/stale"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RUN_ID", raising=False)
    if run_id is not None:
        monkeypatch.setenv("RUN_ID", run_id)
    expected = "/data/outputs/run_7/assets/images" if run_id and setting is None else expected
    arguments = ["--output-dir", tmp_path / "out", *(["--multimodal.offload_dir", setting] if setting else [])]
    expected = expected.format(out=tmp_path / "out", cwd=tmp_path)
    resolved = []
    for extra in ([], ["--slurm.job_name", "x"]):
        config = complete(_config(*arguments, *extra))
        paths = RunPaths(config.output_dir)
        write_toml(config, paths.configs / "rl.toml")
        # A node reads the file that was written; what its environment has must not matter any more.
        with monkeypatch.context() as node:
            for name in ("PICTURES", "WHO", "RUN_ID"):
                node.setenv(name, "another")
            node.setenv("HOME", "/root/of/the/node")
            there = load_toml(RLConfig, paths.configs / "rl.toml")
            resolved.append(environment(there, "key")["VF_RENDERER_IMAGE_OFFLOAD_DIR"])
            resolved += [
                str(resolve_image_dir(component.multimodal, there.output_dir, os.environ))
                for component in (there.trainer, there.orchestrator, there.inference)
            ]
    assert set(resolved) == {expected}


def test_what_a_node_was_told_by_others_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VF_RENDERER_IMAGE_OFFLOAD_DIR", "/stale")
    config = complete(_config("--output-dir", tmp_path / "out"))
    assert "VF_RENDERER_IMAGE_OFFLOAD_DIR was /stale in the environment" in capsys.readouterr().out
    assert environment(config, "key")["VF_RENDERER_IMAGE_OFFLOAD_DIR"] == f"{tmp_path}/out/assets/images"


def test_the_metrics_endpoint_reads_what_it_can_and_refuses_pages_of_other_sites(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics.mkdir()
    odd = {"step": 3, "huge": 10**400, "text": "x", "loss": 0.5}
    (paths.metrics / "trainer.jsonl").write_text(f"{{broken\n{json.dumps(odd)}\n")
    supervisor = cast(Supervisor, SimpleNamespace(watched={}))
    endpoint = MetricsEndpoint(ServerConfig(host="127.0.0.1", port=0), paths, supervisor, {})
    endpoint.start()
    try:
        answer = httpx.get(endpoint.url, timeout=120)
        assert answer.status_code == 200
        assert "pointillist_trainer_loss 0.5" in answer.text
        assert httpx.get(endpoint.url, headers={"Host": "evil.example"}, timeout=120).status_code == 400
        assert httpx.get(endpoint.url, headers={"Origin": "http://evil.example"}, timeout=120).status_code == 403
        assert httpx.request("GET", endpoint.url, content=b"x", timeout=120).status_code == 413
    finally:
        endpoint.stop()


_WORKER = """
import sys
from pathlib import Path
from pointillist.runs.heartbeat import beating
with beating(Path(sys.argv[1]), "work"):
    Path(sys.argv[2]).touch()
    while not Path(sys.argv[3]).exists():
        pass
"""


@pytest.mark.integration
@pytest.mark.parametrize("index", [0, 1])
def test_a_node_of_a_job_serves_metrics_as_a_machine_alone_does(
    tmp_path: Path, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head, number 1, reports the steps; each node reports its own processes, and ends when its part is over."""
    job = [*JOB, "--slurm.trainer_nodes", 1, "--output-dir", tmp_path]
    placement = Placement.of(_config(*job), [_machine(0, 1), _machine(1, 0)])
    placement.paths.metrics.mkdir()
    (placement.paths.metrics / "trainer.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    up, go = tmp_path / "up", tmp_path / "go"
    command = [sys.executable, "-c", _WORKER, str(placement.paths.state), str(up), str(go)]
    spec = Spec("work", command, {}, tmp_path / "work.log", state=placement.paths.state)
    monkeypatch.setattr(Placement, "processes", lambda *_: [spec])
    monkeypatch.setattr("pointillist.launch.supervise.summarize", lambda *_, **__: None)
    urls: list[str] = []
    monkeypatch.setattr("pointillist.launch.supervise.say", lambda text: urls.append(text.rpartition(" ")[2]))
    answers: list[str] = []

    def ask() -> bool:
        if up.exists() and not go.exists():
            answers.append(httpx.get(urls[0], timeout=120).text)
            go.touch()
        return bool(answers)

    with interruptible() as signals:
        part = Part(placement, index, {"POINTILLIST_RUN_KEY": "k"}, signals, None)
        thread = threading.Thread(target=_until, args=(ask,))
        thread.start()
        assert supervise(part) == 0
        thread.join()
    assert 'pointillist_process_up{process="work"} 1.0' in answers[0]
    assert ("pointillist_trainer_loss 0.5" in answers[0]) == (index == 1)


@pytest.mark.integration
@pytest.mark.parametrize(("steps", "resumes"), [([6, 6, 6, 6, 6, 6], 3), ([6, 6, 7, 7, 8, 8], 6)])
def test_a_run_that_ends_the_same_way_again_and_again_is_not_resumed_for_ever(
    tmp_path: Path, steps: list[int], resumes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = Placement.of(_config("--output-dir", tmp_path), [_machine(0, 1)])
    work = {"trainer": "import time; time.sleep(600)", "orchestrator": "raise SystemExit(1)"}
    specs = [Spec(name, [sys.executable, "-c", code], {}, tmp_path / f"{name}.log") for name, code in work.items()]
    monkeypatch.setattr(Placement, "processes", lambda *_: specs)
    went_back: list[int] = []
    saved = iter([*steps, 9])
    monkeypatch.setattr("pointillist.launch.supervise.resume_step", lambda *_, **__: next(saved))
    monkeypatch.setattr("pointillist.launch.supervise.go_back", lambda _, step: went_back.append(step))
    said: list[str] = []
    monkeypatch.setattr("pointillist.launch.supervise.say", said.append)
    with interruptible() as signals:
        part = Part(placement, 0, {"POINTILLIST_RUN_KEY": "k"}, signals, None)
        assert supervise(part, max_resumes=6) == 1
    assert sum("going back (" in text for text in said) == resumes
    assert any("going back again does not help" in text for text in said) == (resumes == 3)
    assert went_back == steps[: resumes - (resumes == 3)]


@pytest.mark.integration
def test_lines_of_an_earlier_start_are_not_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for word in ("earlier", "later"):
        child = start("trainer", [sys.executable, "-c", f"print('the {word} error')"], {}, log)
        child.process.wait()
    assert log.read_text() == "the earlier error\nthe later error\n"
    assert child.last_lines(15) == ["the later error"]


@pytest.mark.integration
def test_a_trainer_that_saves_for_long_is_ended_at_the_second_signal(tmp_path: Path) -> None:
    ignoring = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    ignoring += "pathlib.Path(sys.argv[1]).touch(); time.sleep(3600)"
    up = tmp_path / "up"
    spec = Spec("trainer", [sys.executable, "-c", ignoring, str(up)], {}, tmp_path / "log", saves=True)
    supervisor = Supervisor([spec], SupervisionConfig(stop_grace=3600), lambda _: None)
    supervisor.start()
    _until(up.exists)
    asked: list[bool] = []
    supervisor.stop(lambda: asked.append(True) or len(asked) > 3)
    child = supervisor.watched["trainer"].child
    assert child is not None
    assert child.exit_code == -signal.SIGKILL
    assert len(asked) > 3


def _until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.01)


def test_a_checkpoint_is_read_once_on_resume_unless_it_was_written_since(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.configs.mkdir()
    (paths.configs / "rl.toml").touch()
    folder = _checkpoint(paths, 6)
    note = paths.checkpoint_note(6)
    assert resume_step(paths) == 6
    assert not take_note(note, folder)
    assert resume_step(paths, for_trainer=True) == 6
    assert steps_in(paths.checkpoints) == [6]
    assert take_note(note, folder)
    assert not take_note(note, folder)  # a later start reads the bytes itself
    for act, _ in DAMAGE.values():
        shutil.rmtree(folder)
        _checkpoint(paths, 6)
        assert resume_step(paths, for_trainer=True) == 6
        act(folder)
        assert not take_note(note, folder)
    note.write_bytes(b"[1")
    assert not take_note(note, folder)


def test_what_is_said_after_a_signal_reads_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grace of a job is short, and a large model's checkpoint takes minutes to read."""
    paths = RunPaths(tmp_path)
    assert where_it_goes_on(paths) == "there is no checkpoint yet: --resume begins at step 1"
    _checkpoint(paths, 3)
    _checkpoint(paths, 6)
    monkeypatch.setattr("pointillist.base.digests._digest_file", None)
    assert where_it_goes_on(paths) == "--resume goes on after step 6"
