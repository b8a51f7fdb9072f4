"""`pointillist store` on a made-up run."""

import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pointillist.cli import cli
from pointillist.config import OrchestratorConfig
from pointillist.errors import ConfigError, PointillistError
from pointillist.families import Family, place_image
from pointillist.images import ImageLimits, ImageStore
from pointillist.images.store import local_path
from pointillist.runs.config_files import load_toml, write_toml
from pointillist.runs.paths import RunPaths
from pointillist.runs.records import Fault, append_fault
from pointillist.upkeep.commands import store as commands
from pointillist.upkeep.references import run_hashes
from tests.helpers.pictures import encoded, picture


class Run:
    """A run folder with three referenced images and one that nobody refers to."""

    def __init__(self, root: Path, family: Family, model_dir: Path) -> None:
        self.paths = RunPaths(root)
        self.store = ImageStore(root / "assets" / "images", ImageLimits())
        self.images = [self.store.put(encoded(picture(64, 64, seed))) for seed in range(3)]
        self.orphan = self.store.put(encoded(picture(64, 64, 99)))
        layout = family.layout(64, 64)
        spans = []
        for image in self.images[:2]:
            placed = place_image(family, image, layout, 0)
            spans.append({"item": placed.item, "hash": placed.hash, "offset": 0, "length": placed.length})
        part = {"type": "image_url", "image_url": {"url": self.images[2].uri}}  # in a message only
        record = {"id": "1.0.0", "messages": [{"role": "user", "content": [part]}], "branches": [{"images": spans}]}
        self.rollouts = self.paths.rollout_step(1) / "rollouts.jsonl"
        self.rollouts.parent.mkdir(parents=True)
        self.rollouts.write_text(json.dumps(record) + "\n")
        config = OrchestratorConfig.model_validate(
            {"model": {"name": str(model_dir)}, "env": {"id": "digits"}, "output_dir": str(root)}
        )
        write_toml(config, self.paths.configs / "orchestrator.toml")

    def path(self, index: int) -> Path:
        return local_path(self.images[index].uri)


@pytest.fixture
def run(tmp_path: Path, family: Family, model_dir: Path) -> Run:
    return Run(tmp_path / "run", family, model_dir)


def _store(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_a_clean_run_verifies(run: Run) -> None:
    result = _store("verify", "--run", run.paths.output_dir)
    assert result.exit_code == 0, result.output
    assert "4 good" in result.output
    assert "2 references of samples checked" in result.output


def test_a_run_of_another_version_verifies(run: Run, tmp_path: Path) -> None:
    """Its config has keys that no component takes any more, and its images lie elsewhere."""
    store = tmp_path / "elsewhere"
    run.store.root.rename(store)
    config = run.paths.configs / "orchestrator.toml"
    table = f'[multimodal]\ncache_bytes = 268435456\nof_tomorrow = 1\noffload_dir = "{store}"'
    config.write_text(config.read_text().replace("[multimodal]", table, 1))
    with pytest.raises(ConfigError, match=r"inference\.reader\.cache_bytes"):
        load_toml(OrchestratorConfig, config)
    rollouts = run.rollouts.read_text().replace(run.store.root.as_uri(), store.as_uri())
    run.rollouts.write_text(rollouts)
    result = _store("verify", "--run", run.paths.output_dir)
    assert result.exit_code == 0, result.output
    assert "2 references of samples checked" in result.output


def test_every_kind_of_damage_is_found(run: Run) -> None:
    root = run.store.root
    data = bytearray(run.path(0).read_bytes())
    data[len(data) // 2] ^= 1
    run.path(0).write_bytes(data)
    run.path(1).unlink()
    (root / "notes.txt").write_text("x")
    (root / "ab").mkdir(exist_ok=True)
    (root / "ab" / ".abc.png.1.2.tmp").write_bytes(b"half")
    (root / "link").symlink_to("/etc")
    result = _store("verify", "--run", run.paths.output_dir)
    assert result.exit_code == 1
    for expected in (
        f"corrupt: {run.path(0)}",
        "foreign: ",
        "half-written: ",
        "notes.txt",
        "is not in the store",
        "corrupt",
    ):
        assert expected in result.output
    assert "passwd" not in result.output
    assert _store("verify", root).exit_code == 1
    listed = _store("ls", root)
    assert listed.exit_code == 0
    assert "foreign" in listed.output


def test_a_span_that_does_not_fit_its_layout_is_found(run: Run) -> None:
    record = json.loads(run.rollouts.read_text())
    record["branches"][0]["images"][0]["length"] = 7
    run.rollouts.write_text(json.dumps(record) + "\n")
    result = _store("verify", "--run", run.paths.output_dir)
    assert result.exit_code == 1
    assert "placeholder has 7 tokens, the image has 4" in result.output


def test_gc_keeps_what_a_run_refers_to(run: Run) -> None:
    root, old = run.store.root, time.time() - 10_000
    half = root / "ab" / ".abc.png.1.2.tmp"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    fresh = root / "ab" / ".abd.png.1.2.tmp"
    fresh.write_bytes(b"half")
    for path in [half, *(local_path(image.uri) for image in (*run.images, run.orphan))]:
        os.utime(path, (old, old))
    orphan = local_path(run.orphan.uri)
    assert "would remove 2 files" in _store("gc", root, "--keep-runs", run.paths.output_dir, "--dry-run").output
    assert half.exists()
    assert "removed 1 files" in _store("gc", root).output
    assert orphan.exists()
    assert "removed 1 files" in _store("gc", root, "--keep-runs", run.paths.output_dir).output
    assert not orphan.exists()
    assert fresh.exists()
    assert all(run.path(index).exists() for index in range(3))
    run.rollouts.write_text("{broken\n")  # nothing is deleted on the strength of what can not be read
    result = _store("gc", root, "--keep-runs", run.paths.output_dir, "--older-than", 0)
    assert isinstance(result.exception, PointillistError)
    assert all(run.path(index).exists() for index in range(3))


def test_evaluations_keep_their_images_and_travel(run: Run, tmp_path: Path) -> None:
    archive, elsewhere = tmp_path / "run.tar", tmp_path / "elsewhere"
    part = {"type": "image_url", "image_url": {"url": run.orphan.uri}}
    odd = {"role": "assistant", "content": "file://host/x?y"}  # what a model says is no reference
    branch = {"images": [], "messages": [{"role": "user", "content": [part]}, odd]}
    run.paths.eval_file(3).write_text(json.dumps({"id": "eval_3.0", "branches": [branch]}) + "\n")
    append_fault(run.paths.faults, Fault("missing", 1, "1.0.0.0", "ab" * 32, "it is not there"))
    assert run.orphan.sha256 in run_hashes(run.paths)
    assert _store("export", run.paths.output_dir, archive).exit_code == 0
    assert _store("import", archive, elsewhere).exit_code == 0
    moved = RunPaths(elsewhere)
    assert run_hashes(moved) == run_hashes(run.paths)
    assert str(elsewhere) in moved.eval_file(3).read_text()
    assert moved.faults.read_text() == run.paths.faults.read_text()


def test_export_and_import_move_a_run(run: Run, tmp_path: Path) -> None:
    archive, elsewhere = tmp_path / "run.tar", tmp_path / "else" / "where"
    result = _store("export", run.paths.output_dir, archive)
    assert result.exit_code == 0, result.output
    assert "wrote 3 images and 2 records" in result.output
    before = run_hashes(run.paths)
    for image in run.images:  # the old place is gone
        local_path(image.uri).unlink()
    assert _store("import", archive, elsewhere).exit_code == 0
    moved = RunPaths(elsewhere)
    assert run_hashes(moved) == before
    assert _store("verify", "--run", elsewhere).exit_code == 0
    assert str(run.store.root) not in (moved.rollout_step(1) / "rollouts.jsonl").read_text()
    assert isinstance(_store("import", archive, elsewhere).exception, PointillistError)
    assert isinstance(_store("export", run.paths.output_dir, tmp_path / "again.tar").exception, PointillistError)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "images/../../evil", "other/file", "images/ab/x.png"])
def test_hostile_archives_write_nothing(run: Run, tmp_path: Path, name: str) -> None:
    archive, evil = tmp_path / "run.tar", tmp_path / "evil.tar"
    assert _store("export", run.paths.output_dir, archive).exit_code == 0
    with tarfile.open(archive) as source, tarfile.open(evil, "w") as target:
        for member in source.getmembers()[:1]:
            target.addfile(member, source.extractfile(member))
        bad = tarfile.TarInfo(name)
        target.addfile(bad)
    result = _store("import", evil, tmp_path / "new")
    assert isinstance(result.exception, PointillistError)
    assert not (tmp_path / "evil").exists()
    (tmp_path / "noise.tar").write_bytes(b"x" * 5000)
    assert isinstance(_store("import", tmp_path / "noise.tar", tmp_path / "new2").exception, PointillistError)


def test_transcripts_show_pictures_in_their_places(run: Run, tmp_path: Path) -> None:
    look = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at":"left"}'}}
    picture_part = {"type": "image_url", "image_url": {"url": run.images[0].uri}}
    messages = [
        {"role": "user", "content": [picture_part, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "", "tool_calls": [look]},
        {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": run.images[1].uri}}]},
        {"role": "assistant", "content": "```<script>"},
    ]
    record = {"id": "1.0.0", "task": "t", "reward": 1.0, "branches": [{"messages": messages, "images": []}]}
    run.rollouts.write_text(json.dumps(record) + "\n")
    page = tmp_path / "page.md"
    arguments = ["transcript", str(run.paths.output_dir), "1.0.0", str(page)]
    result = CliRunner().invoke(cli, arguments)
    assert "2 pictures" in result.output
    text = page.read_text()
    order = ["**user**", "page/0.png", "What?", "**assistant**", 'look({"at": "left"})', "**tool**", "page/1.png"]
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert (tmp_path / "page" / "1.png").read_bytes() == run.path(1).read_bytes()
    assert "no rollout '1.0.7'" in CliRunner().invoke(cli, [*arguments[:2], "1.0.7", str(page)]).output
    outside = tmp_path / "secret.png"
    outside.write_bytes(run.path(0).read_bytes())
    picture_part["image_url"]["url"] = outside.as_uri()
    run.rollouts.write_text(json.dumps(record) + "\n")
    assert "not an image under an allowed root" in CliRunner().invoke(cli, arguments).output
