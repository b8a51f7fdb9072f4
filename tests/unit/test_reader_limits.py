"""Every reader of a run's folder accepts what the run accepted: its limits are in its config, and it asks for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from starlette.testclient import TestClient

from pointillist.base.image_limits import STORED_LIMITS
from pointillist.config import OrchestratorConfig
from pointillist.errors import PointillistError
from pointillist.images import ImageLimits
from pointillist.images.inventory import add_user
from pointillist.launch.monitors.following import rows_of
from pointillist.runs import image_dir
from pointillist.runs.config_files import write_toml
from pointillist.runs.image_dir import limits_of
from pointillist.runs.paths import RunPaths
from pointillist.upkeep.commands import store as commands
from pointillist.view.run import ViewedRun
from pointillist.view.terminal import show_rollout
from pointillist.view.transcript import write_transcript
from pointillist.view.web.app import create_app
from tests.helpers.made_run import MadeRun
from tests.helpers.pictures import encoded, picture

Reader = Callable[[MadeRun, Path], bool]


def _index(made: MadeRun, scratch: Path) -> bool:
    run = ViewedRun(made.paths.output_dir, scratch)
    run.index.update_store()
    with run.index.reader() as db:
        return {condition for (condition,) in db.execute("SELECT condition FROM pictures")} == {"good"}


def _condition(made: MadeRun, scratch: Path) -> bool:
    return ViewedRun(made.paths.output_dir, scratch).condition(_name(made)) == "good"


def _page(made: MadeRun, scratch: Path) -> bool:
    client = TestClient(
        create_app([ViewedRun(made.paths.output_dir, scratch)], scratch, None), base_url="http://127.0.0.1"
    )
    answers = [client.get(f"/runs/0/{route}/{_name(made)}") for route in ("picture", "thumbnail/96")]
    assert len({answer.status_code for answer in answers}) == 1
    return answers[0].status_code == 200


def _terminal(made: MadeRun, scratch: Path) -> bool:
    with (scratch / "shown").open("w") as file:
        show_rollout(made.paths.output_dir, "2.0.0", "sixel", Console(file=file))
    return "\x1bP" in (scratch / "shown").read_text()


def _transcript(made: MadeRun, scratch: Path) -> bool:
    return write_transcript(made.paths.output_dir, "2.0.0", scratch / "page.md") == 2


def _monitors(made: MadeRun, scratch: Path) -> bool:
    return len(rows_of(made.paths, 2, 4)) == 4


def _verify(made: MadeRun, scratch: Path) -> bool:
    return CliRunner().invoke(commands, ["verify", str(made.store.root)]).exit_code == 0


def _name(made: MadeRun) -> str:
    return f"{made.images[0].sha256[:2]}/{made.images[0].sha256}.png"


@pytest.mark.parametrize("reader", [_index, _condition, _page, _terminal, _transcript, _monitors, _verify])
def test_a_reader_takes_the_limits_of_the_run(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_dir, "STORED_LIMITS", ImageLimits(max_bytes=100, max_pixels=100, max_side=10))

    def accepts(made: MadeRun) -> bool:
        try:
            return reader(made, tmp_path)
        except PointillistError:
            return False

    assert not accepts(MadeRun(tmp_path / "unknown"))
    made = MadeRun(tmp_path / "configured")
    _write_config(made.paths, model_dir)
    assert accepts(made)


def _write_config(paths: RunPaths, model_dir: Path, **limits: object) -> None:
    config = OrchestratorConfig.model_validate(
        {
            "model": {"name": str(model_dir)},
            "env": {"id": "digits"},
            "output_dir": str(paths.output_dir),
            "multimodal": {"limits": limits},
        }
    )
    write_toml(config, paths.configs / "orchestrator.toml")


def test_references_are_verified_with_the_limits_of_the_run(tmp_path: Path, model_dir: Path) -> None:
    """A picture with a side that no run accepts by default."""
    made = MadeRun(tmp_path / "run")
    assert limits_of(made.paths) == STORED_LIMITS
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "configs").write_text("a file where a folder should be")
    assert limits_of(RunPaths(tmp_path / "odd")) == STORED_LIMITS
    _write_config(made.paths, model_dir, max_side=3_000_000, max_pixels=5, max_bytes=2 * 1024**3)
    assert limits_of(made.paths) == ImageLimits(2 * 1024**3, STORED_LIMITS.max_pixels, 3_000_000)
    wide = ImageLimits(max_side=3_000_000)
    type(made.store)(made.store.root, wide).put(encoded(picture(1_000_001, 1)))
    verify = CliRunner().invoke(commands, ["verify", str(made.store.root)])
    assert verify.exit_code == 0, verify.output
    # A store that several runs share is verified with the limits of all that are known to use it.
    _write_config(made.paths, model_dir)
    assert CliRunner().invoke(commands, ["verify", str(made.store.root)]).exit_code == 1
    other = RunPaths(tmp_path / "other")
    _write_config(other, model_dir, max_side=3_000_000)
    add_user(made.store.root, other.output_dir)
    assert CliRunner().invoke(commands, ["verify", str(made.store.root)]).exit_code == 0
