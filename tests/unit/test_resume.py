"""`--resume` goes on with the run that was begun, or says what differs; a start that failed early occupies nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pointillist.cli import _guarded, cli
from pointillist.config import EnvConfig, ModelConfig, RLConfig
from pointillist.config.rl import NOT_RECORDED
from pointillist.config.shared import CARRIER
from pointillist.errors import ConfigError, LaunchError
from pointillist.images import ImageLimits, ImageStore
from pointillist.images.inventory import add_user
from pointillist.images.store import local_path
from pointillist.launch.changes import config_changes, model_changes, model_record, record_start, refuse_changes
from pointillist.launch.placement import Placement, choose_ports
from pointillist.launch.prepare import begin, environment
from pointillist.launch.run_dir import check_fresh, make_fresh, wait_for_survivors
from pointillist.launch.supervise import Interrupted, interruptible
from pointillist.runs.lock import RunLock
from pointillist.runs.paths import RunPaths
from pointillist.runs.records import BranchRecord, RolloutRecord, write_rollouts
from tests.helpers.pictures import encoded, picture


def _config(model_dir: Path, run: Path, **fields: Any) -> RLConfig:
    return RLConfig.model_validate(
        {"model": ModelConfig(name=str(model_dir)), "env": EnvConfig(id="digits"), "output_dir": run, **fields}
    )


def _begun(config: RLConfig) -> RunPaths:
    """A run that was begun with a config."""
    placement = _placed(config)
    placement.write_configs()
    record_start(config, placement.paths, model_record(config.model.name))
    return placement.paths


def _placed(config: RLConfig) -> Placement:
    return Placement.of(config, [choose_ports(config)])


def _refuse(config: RLConfig, paths: RunPaths, step: int) -> None:
    refuse_changes(config, paths, step, model_record(config.model.name))


MEANING = [
    ({"seed": 5}, "seed: 0 -> 5"),
    ({"env": {"id": "digits", "blank_images": True}}, "env.blank_images: False -> True"),
    ({"env": {"id": "hunt"}}, "env.id: 'digits' -> 'hunt'"),
    ({"env": {"id": "digits", "args": {"data_dir": "x"}}}, "env.args"),
    ({"orchestrator": {"batch_size": 64}}, "orchestrator.batch_size: 128 -> 64"),
    ({"orchestrator": {"sampling": {"temperature": 0.5}}}, "orchestrator.sampling.temperature: 1.0 -> 0.5"),
    ({"trainer": {"optim": {"lr": 1.0}}}, "trainer.optim.lr"),
    ({"trainer": {"freeze_vision": True}}, "trainer.freeze_vision"),
    ({"multimodal": {"limits": {"max_pixels": 100}}}, "multimodal.limits.max_pixels"),
    ({"seq_len": 512}, "seq_len: 2048 -> 512"),
    ({"inference": {"engine": {"dtype": "bfloat16"}}}, "inference.engine.dtype"),
    ({"orchestrator": {"client": {"wire": "content_parts"}}}, "orchestrator.client.wire: 'mmraw' -> 'content_parts'"),
    ({"orchestrator": {"eval": {"max_tasks": 3}}}, "orchestrator.eval.max_tasks: not set -> 3"),
]
FREE = [
    {"max_steps": 500},
    {"max_steps": 5},
    {"log_level": "debug"},
    {"num_servers": 2},
    {"supervision": {"max_resumes": 3}},
    {"orchestrator": {"max_concurrent": 8, "workers": {"count": 2}, "eval": {"interval": 7}}},
    {"trainer": {"ckpt": {"interval": 3}, "num_threads": 2}},
    {"transport": {"type": "zmq"}},
    {"trainer": {"reader": {"cache_bytes": 1000}}, "inference": {"reader": {"threads": 1}}},
    {"env_vars": {"TOKEN": "secret"}},
]


@pytest.mark.parametrize(("fields", "said"), MEANING)
def test_another_run_is_refused_by_name(model_dir: Path, tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    paths = _begun(_config(model_dir, tmp_path))
    with pytest.raises(ConfigError, match="--resume-with-changes") as caught:
        _refuse(_config(model_dir, tmp_path, **fields), paths, 3)
    assert said in str(caught.value)
    _refuse(_config(model_dir, tmp_path, resume_with_changes=True, **fields), paths, 3)


@pytest.mark.parametrize("fields", FREE)
def test_the_same_run_elsewhere_or_faster_goes_on(model_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    paths = _begun(_config(model_dir, tmp_path))
    assert config_changes(_config(model_dir, tmp_path, **fields), paths) == []


def test_fewer_steps_than_are_done_are_refused(model_dir: Path, tmp_path: Path) -> None:
    paths = _begun(_config(model_dir, tmp_path))
    _refuse(_config(model_dir, tmp_path, max_steps=8), paths, 8)
    with pytest.raises(ConfigError, match="max_steps = 4, but the run goes on after step 8"):
        _refuse(_config(model_dir, tmp_path, max_steps=4, resume_with_changes=True), paths, 8)


def test_another_model_is_refused_where_an_older_version_recorded_its_name_only(
    model_dir: Path, tmp_path: Path
) -> None:
    paths = _begun(_config(model_dir, tmp_path / "run"))
    paths.model_record.unlink()
    with pytest.raises(ConfigError, match=r"model\.name"):
        refuse_changes(_config(tmp_path / "other", tmp_path / "run"), paths, 3, {})


def test_a_dry_run_of_resuming_compares_and_writes_nothing(model_dir: Path, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    arguments = ["rl", "--model.name", str(model_dir), "--env.id", "digits", "--output-dir", str(tmp_path), "--dry-run"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    before = (paths.configs / "rl.toml").read_bytes()
    told = [CliRunner().invoke(cli, [*arguments, "--resume", *more]) for more in ([], ["--seed", "5"])]
    assert [result.exit_code for result in told] == [0, 1]
    assert "would be resumed after step 0" in told[0].output
    assert "seed: 0 -> 5" in told[1].output
    assert (paths.configs / "rl.toml").read_bytes() == before


_SURVIVOR = """
import signal, sys, time
from pathlib import Path
from pointillist.runs.heartbeat import beating
def save(*_):
    time.sleep(0.3)
    Path(sys.argv[2]).touch()
    raise SystemExit(143)
signal.signal(signal.SIGTERM, save if sys.argv[3] == "saves" else signal.SIG_IGN)
with beating(Path(sys.argv[1]), "trainer"):
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.integration
@pytest.mark.parametrize("what", ["saves", "hangs"])
def test_a_trainer_that_outlives_its_launcher_is_waited_for(tmp_path: Path, what: str) -> None:
    """Its launcher was killed, and so the lock is free; it may be writing a checkpoint that would be cut away."""
    paths, saved, said = RunPaths(tmp_path), tmp_path / "saved", []
    command = [sys.executable, "-c", _SURVIVOR, str(paths.state), str(saved), what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()  # what the kernel does when the launcher dies
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        wait_for_survivors(paths, 120.0 if what == "saves" else 0.2, said.append)
        reaper.join()
    assert f"trainer (process {process.pid}) of an earlier start" in said[0]
    assert saved.exists() == (what == "saves")
    assert process.returncode == (143 if what == "saves" else -signal.SIGKILL)
    wait_for_survivors(paths, 120.0, said.append)
    assert len(said) == 1


def test_a_second_job_does_not_begin_in_what_the_first_one_has_done(model_dir: Path, tmp_path: Path) -> None:
    config = _config(model_dir, tmp_path)
    paths = _begun(config)
    begin(_placed(config), lambda: False, is_job=True)
    assert (paths.configs / "rl.toml").is_file()
    paths.metrics.mkdir()
    (paths.metrics / "trainer.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(LaunchError, match="already holds"):
        begin(_placed(config), lambda: False, is_job=True)


@pytest.mark.integration
@pytest.mark.parametrize(("answer", "refused"), [("echo PENDING", True), ("true", False), ("exit 1", False)])
def test_a_folder_in_which_a_job_waits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, refused: bool
) -> None:
    from pointillist.launch.slurm import _refuse_waiting_job

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    _refuse_waiting_job(tmp_path / ".job")
    (tmp_path / ".job").write_text("17")
    with pytest.raises(LaunchError, match="job 17, which is PENDING") if refused else nullcontext():
        _refuse_waiting_job(tmp_path / ".job")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_hurries_and_interrupts_nothing(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with interruptible() as signals:
            with pytest.raises(Interrupted) as raised:
                os.kill(os.getpid(), number)
                time.sleep(120)
            assert raised.value.exit_code == 128 + number
            assert not signals.hurry()
            os.kill(os.getpid(), number)
            while signals.count < 2:  # the handler runs between two instructions
                time.sleep(0.01)
            assert signals.hurry()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nohup_survives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.count == 0
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(Interrupted), interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(120)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("in_group", [False, True])
def test_a_full_disk_is_one_message(in_group: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: list[str]) -> int:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a\udcff")
        raise ExceptionGroup("tasks", [ExceptionGroup("inner", [error])]) if in_group else error

    assert _guarded(run, []) == 1
    assert capsys.readouterr().err == "error: No space left on device: /runs/a\\xff\n"


def test_another_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    import shutil

    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_dir, model)
    config = _config(model, run)
    paths = _begun(config)
    assert model_changes(model_record(config.model.name), paths) == []
    moved = shutil.copytree(model, tmp_path / "moved")
    _refuse(_config(moved, run), paths, 3)  # the same model in another place
    settings = json.loads((model / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.1] * 3
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    changes = model_changes(model_record(config.model.name), paths)
    assert [change.split(":")[0] for change in changes] == [
        "model layout_fingerprint",
        "model preprocessor_config.json",
    ]


def test_every_start_is_kept_and_values_of_env_vars_are_not(model_dir: Path, tmp_path: Path) -> None:
    paths = _begun(_config(model_dir, tmp_path, env_vars={"TOKEN": "hush-hush"}))
    _begun(_config(model_dir, tmp_path, max_steps=300, env_vars={"TOKEN": "hush-hush"}))
    assert sorted(path.name for path in paths.history.iterdir()) == ["1.toml", "2.toml"]
    for path in paths.output_dir.rglob("*"):
        if path.is_file():
            assert b"hush-hush" not in path.read_bytes(), path
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths.configs.glob("*.toml"))
    again = RLConfig.model_validate({**_config(model_dir, tmp_path).model_dump(), "env_vars": {"TOKEN": NOT_RECORDED}})
    with pytest.raises(ConfigError, match=r"env_vars.TOKEN has no value"):
        environment(again, "key")


def test_a_start_that_failed_before_its_first_step_occupies_nothing(model_dir: Path, tmp_path: Path) -> None:
    paths = _begun(_config(model_dir, tmp_path / "run"))
    paths.logs.mkdir()
    (paths.logs / "trainer.log").write_text("old error")
    paths.rollouts_file(1).parent.mkdir(parents=True)
    stored = ImageStore(paths.output_dir / "assets/images", ImageLimits()).put(encoded(picture(8, 8)))
    said: list[str] = []
    make_fresh(paths, said.append)
    assert "ended before its first step" in said[0]
    assert not paths.logs.exists()
    assert not paths.rollouts.exists()
    assert local_path(stored.uri).is_file()
    (paths.metrics).mkdir()
    (paths.metrics / "trainer.jsonl").write_text('{"step": 1}\n')
    (paths.configs).mkdir(exist_ok=True)
    (paths.configs / "rl.toml").touch()
    with pytest.raises(LaunchError, match="already holds"):
        make_fresh(paths, said.append)


@pytest.mark.parametrize("name", ["thesis.txt", "model", "checkpoints"])
def test_a_folder_with_other_things_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(LaunchError, match=f"already holds {name}"):
        check_fresh(RunPaths(tmp_path))


def _gc(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["store", "gc", *map(str, arguments)])
    return result.output if result.exit_code == 0 else f"exit {result.exit_code}: {result.output}"


def _aged(store: ImageStore, seed: int, seconds: float = 1e6) -> Path:
    path = local_path(store.put(encoded(picture(8, 8, seed))).uri)
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_gc_keeps_what_a_live_run_has_stored(model_dir: Path, tmp_path: Path) -> None:
    """Nor what it has recorded; a picture that lay there for long and is stored again by it is in no record yet."""
    store = ImageStore(tmp_path / "shared", ImageLimits())
    done, live = tmp_path / "done", tmp_path / "live"
    for run in (done, live):
        (run / "configs").mkdir(parents=True)
        add_user(store.root, run)
    old, again, recorded = (_aged(store, seed) for seed in (1, 2, 4))
    part = {"type": "image_url", "image_url": {"url": recorded.as_uri()}}
    branch = BranchRecord(messages=[{"role": "user", "content": [part]}])
    write_rollouts(RunPaths(live).rollouts_file(1), [RolloutRecord(id="1.0.0", branches=[branch])])
    with RunLock.take(live):
        store.put(encoded(picture(8, 8, 2)))
        fresh = local_path(store.put(encoded(picture(8, 8, 3))).uri)
        output = _gc(store.root, "--keep-runs", done, "--older-than", 0)
        assert "is going on (process" in output
        assert "removed 1 files" in output
        assert [path.exists() for path in (old, again, fresh, recorded)] == [False, True, True, True]
    assert "removed 3 files" in _gc(store.root, "--keep-runs", done, "--older-than", 0)


def test_gc_takes_no_other_folder_for_a_store(tmp_path: Path) -> None:
    (tmp_path / ".draft.tmp").write_text("mine")
    assert "holds .draft.tmp, so it is no image store" in _gc(tmp_path, "--older-than", 0)
    (tmp_path / ".draft.tmp").unlink()
    (tmp_path / "ab").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / ".x.tmp").write_text("half")
    output = _gc(tmp_path, "--older-than", 0)
    assert "holds photos, so it is no image store" in output
    assert (tmp_path / "photos" / ".x.tmp").exists()


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("/proc/no/run", "error:"),
        (b"run-\xff".decode(errors="surrogateescape"), "is not UTF-8"),
        ("x" * 5000, "error:"),
    ],
)
def test_folders_that_cannot_be_had_are_one_message(
    model_dir: Path, tmp_path: Path, folder: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        cli, ["rl", "--model.name", str(model_dir), "--env.id", "digits", "--output-dir", folder]
    )
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_dollar_in_the_folder_is_a_dollar(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a$HOME-$$b"
    result = CliRunner().invoke(
        cli, ["rl", "--model.name", str(model_dir), "--env.id", "digits", "--output-dir", str(folder), "--dry-run"]
    )
    assert result.exit_code == 0, result.output
    from pointillist.config import OrchestratorConfig
    from pointillist.runs.config_files import load_toml
    from pointillist.runs.image_dir import resolve_image_dir

    config = load_toml(OrchestratorConfig, folder / "configs/orchestrator.toml")
    assert resolve_image_dir(config.multimodal, folder, {"HOME": "x"}) == folder / "assets/images"
    # Writers are told the folder itself, by a variable in which nothing is expanded.
    whole = load_toml(RLConfig, folder / "configs/rl.toml")
    assert environment(whole, "key")[CARRIER] == str(folder / "assets/images")
