"""Monitors: the real libraries, offline, on a made-up run; what they wrote is read back."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from pointillist.cli.options import parse_cli
from pointillist.config import MonitorsConfig, RLConfig
from pointillist.errors import ConfigError
from pointillist.launch.monitors import Monitor, Row, Watching, check_monitors
from pointillist.launch.monitors.following import MetricsFollower, rows_of
from pointillist.launch.monitors.watching import make_monitors
from pointillist.launch.run_dir import rewind
from tests.helpers.monitored import Run, tensorboard_values, wandb_history, wandb_records


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


class Listener:
    """A monitor that remembers."""

    name = "listener"

    def __init__(self, fails: bool = False) -> None:
        self.heard: list[tuple[str, int]] = []
        self.tables: list[tuple[int, list[str]]] = []
        self.closed = False
        self.fails = fails
        self.calls = 0

    def log(self, component: str, step: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1
        if self.fails:
            raise OSError("no network")
        assert "step" not in metrics
        self.heard.append((component, step))

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        self.tables.append((step, [row.id for row in rows]))

    def close(self) -> None:
        self.closed = True


def _config(run: Run, *arguments: object) -> RLConfig:
    base = ["--model.name", "m", "--env.id", "digits", "--output-dir", run.paths.output_dir]
    return parse_cli(RLConfig, [*map(str, base), *map(str, arguments)])


def _watch(run: Run, make: Callable[[], list[Monitor]], config: MonitorsConfig, said: list[str]) -> Watching:
    watching = Watching(make, config, run.paths, said.append)
    watching.start()
    return watching


def test_lines_come_once_and_only_when_they_are_complete(run: Run) -> None:
    run.step(1)
    follower = MetricsFollower(run.paths)
    assert list(follower.new()) == []  # an earlier launcher's
    run.step(2)
    trainer = run.paths.metrics / "trainer.jsonl"
    with trainer.open("a") as file:
        file.write('{"step": 3, "lo')
    assert sorted((name, record["step"]) for name, record in follower.new()) == [("orchestrator", 2), ("trainer", 2)]
    with trainer.open("a") as file:
        file.write('ss": 1}\n')
    assert list(follower.new()) == [("trainer", {"step": 3, "loss": 1})]
    assert list(follower.new()) == []


def test_steps_that_are_done_again_are_given_again(run: Run) -> None:
    follower = MetricsFollower(run.paths)
    for step in (1, 2, 3):
        run.step(step, loss=step)
    assert len(list(follower.new())) == 6
    rewind(run.paths, 1)
    run.step(2, loss=20)
    assert [record["loss"] for name, record in follower.new() if name == "trainer"] == [20]


def test_rows_have_the_conversation_and_its_pictures(run: Run) -> None:
    run.step(1)
    rows = rows_of(run.paths, 1, 8)
    assert [row.id for row in rows] == ["1.0.0", "1.0.1", "1.0.2"]
    assert rows[2].prompt == "user: [image][image]what | is this?"
    assert rows[2].completion == 'assistant: \nlook({"x": 1})\n\ntool: nothing\n\nassistant: an <b>orange</b>'
    assert [each.sha256 for each in rows[2].images] == [image.sha256 for image in run.images]
    assert [row.id for row in rows_of(run.paths, 1, 2)] == ["1.0.0", "1.0.1"]
    assert rows_of(run.paths, 1, 0) == []
    # One that failed has its conversation and no reward.
    first, *others = run.paths.rollouts_file(1).read_text().splitlines()
    run.paths.rollouts_file(1).write_text("\n".join([json.dumps({**json.loads(first), "reward": None}), *others, ""]))
    assert [row.id for row in rows_of(run.paths, 1, 8)] == ["1.0.1", "1.0.2"]


def test_a_monitor_hears_everything_and_is_closed(run: Run) -> None:
    listener, said = Listener(), []
    watching = _watch(run, lambda: [listener], MonitorsConfig(images_every=2), said)
    for step in (1, 2, 3, 4):
        run.step(step)
    watching.stop()
    assert sorted(listener.heard) == [(name, step) for name in ("orchestrator", "trainer") for step in (1, 2, 3, 4)]
    assert [step for step, _ in listener.tables] == [2, 4]
    assert listener.closed
    assert said == []


def test_a_monitor_that_fails_warns_once_and_the_others_go_on(run: Run) -> None:
    broken, listener, said = Listener(fails=True), Listener(), []
    watching = _watch(run, lambda: [broken, listener], MonitorsConfig(images_every=1), said)
    for step in (1, 2):
        run.step(step)
    watching.stop()
    assert broken.calls == 1
    assert len(listener.heard) == 4
    assert len(said) == 1
    assert "no network" in said[0]


def test_a_lost_picture_costs_the_table_only(run: Run) -> None:
    run.step(1)
    listener, said = Listener(), []
    watching = _watch(run, lambda: [listener], MonitorsConfig(images_every=1), said)
    run.step(2)
    for path in (run.paths.output_dir / "assets").rglob("*.png"):
        path.unlink()
    watching.stop()
    assert ("orchestrator", 2) in listener.heard
    assert listener.tables == []
    assert "no table of the rollouts of step 2" in said[0]


def test_a_missing_library_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_monitors(MonitorsConfig())
    with pytest.raises(ConfigError, match=r"pip install '\.\[monitors\]'"):
        check_monitors(MonitorsConfig(tensorboard=True))
    with pytest.raises(ConfigError, match="wandb needs wandb"):
        check_monitors(MonitorsConfig.model_validate({"wandb": {}}))


def test_one_that_can_not_begin_is_left_out(run: Run) -> None:
    (run.paths.output_dir / "monitors").write_text("a file where a folder should be")
    said: list[str] = []
    assert make_monitors(_config(run, "--monitors.tensorboard", "true"), run.paths, said.append) == []
    assert "tensorboard failed" in said[0]


@pytest.mark.integration
def test_no_monitor_is_the_default_and_imports_nothing() -> None:
    code = (
        "import sys, pointillist.launch.rl, pointillist.launch.monitors.weights_and_biases, "
        "pointillist.launch.monitors.tensorboard_events; "
        "assert not {'wandb', 'tensorboard', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert MonitorsConfig().wandb is None
    assert MonitorsConfig().tensorboard is False


def test_tensorboard_files_can_be_read_back(run: Run) -> None:
    config, said = _config(run, "--monitors.tensorboard", "true", "--monitors.images_every", 1), []
    watching = Watching.of(config, run.paths, said.append)
    watching.start()
    for step in (1, 2):
        run.step(step)
    watching.stop()
    assert said == []
    values = tensorboard_values(run.paths.output_dir / "monitors" / "tensorboard")
    losses = [(step, value.tensor.float_val[0]) for step, value in values if value.tag == "trainer/loss"]
    assert losses == [(1, 0.5), (2, 0.5)]
    (table,) = [value.tensor.string_val[0].decode() for step, value in values if step == 2 and value.tag == "rollouts"]
    assert "an &#60;b&#62;orange&#60;/b&#62;" in table  # nor a picture of Markdown's, by the same escapes
    assert "what &#124; is this?" in table
    # Each distinct picture once, whatever number of rows and steps it is in, with the bytes it came in.
    pictures = {value.tag: value.tensor.string_val[2] for _, value in values if value.tag.startswith("pictures/")}
    assert sum(value.tag.startswith("pictures/") for _, value in values) == len(run.images)
    stored = {f"pictures/{path.name[:12]}": path.read_bytes()
              for path in (run.paths.output_dir / "assets").rglob("*.*")}  # fmt: skip
    assert pictures == stored


_WANDB = """
import sys
from pathlib import Path
from pointillist.config import RLConfig
from pointillist.cli.options import parse_cli
from pointillist.runs import RunPaths
from pointillist.launch.monitors import Watching
from tests.helpers.monitored import Run

run = Run(Path(sys.argv[1]))
said = []
config = parse_cli(RLConfig, ["--model.name", "m", "--env.id", "digits", "--output-dir", sys.argv[1],
    "--env-vars", '{"SECRET": "hush-hush"}', "--monitors.wandb.project", "p", "--monitors.images_every", "1"])
watching = Watching.of(config, run.paths, said.append)
watching.start()
for step, loss in ((1, 0.5), (2, 0.25), (1, 0.125)):  # the run went back
    run.step(step, loss=loss)
watching.stop()
assert said == [], said
assert "torch" not in sys.modules
"""


@pytest.mark.integration
def test_wandb_offline_shows_each_picture_but_has_it_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}, "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", _WANDB, str(tmp_path / "run")],
        env=environ, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "monitors"
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"hush-hush" not in path.read_bytes()
    records = wandb_records(path)
    history = wandb_history(path)
    losses = [(json.loads(line["trainer/step"]), json.loads(line["trainer/loss"]))
              for line in history if "trainer/loss" in line]  # fmt: skip
    assert losses == [(1, 0.5), (2, 0.25), (1, 0.125)]
    tables = [record.artifact if record.HasField("artifact") else record.request.log_artifact.artifact
              for record in records if record.HasField("artifact")
              or record.request.HasField("log_artifact")]  # fmt: skip
    uses = Counter(
        (entry.path, entry.digest)
        for table in tables
        for entry in table.manifest.contents
        if entry.path.startswith("media/images/")
    )
    assert len(tables) == 2  # the third has the same rows as the first
    assert len(uses) == 2  # two pictures: one name and one digest each, in all tables
    assert set(uses.values()) == {len(tables)}
    assert not list(home.rglob("*.png"))  # what waits for an upload lies in the run's folder
