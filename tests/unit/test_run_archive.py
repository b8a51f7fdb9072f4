"""Archives of runs: what may be in one, what a foreign one can do, and what checkpoints need."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointillist.base.digests import seal_folder
from pointillist.base.image_limits import STORED_LIMITS
from pointillist.errors import LaunchError, PointillistError
from pointillist.launch.run_dir import resume_step
from pointillist.runs.paths import RunPaths
from pointillist.upkeep.archive import FORMAT, export_run, import_run
from pointillist.upkeep.commands import store as commands
from tests.helpers.made_run import MadeRun

MANIFEST = json.dumps({"format": FORMAT, "image_root": "file:///x/images", "images": 0}).encode()


def _archive(path: Path, *members: tuple[str | tarfile.TarInfo, bytes], manifest: bytes = MANIFEST) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("manifest.json", manifest), *members):
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _special(name: str, kind: bytes, **values: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def _refused(archive: Path, folder: Path) -> str:
    """The refusal of an archive, which must leave nothing behind."""
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(PointillistError) as refusal:
        import_run(archive, folder / "new" / "run", STORED_LIMITS, checkpoints=True)
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    return str(refusal.value)


NAMES = [
    "run//etc/evil", "run/../evil", "../evil", "/etc/evil", "run/./evil", "images/../../evil", "run", "run/",
    "other/x", "manifest.json", "run/\\..\\evil", "run/configs/../../evil.toml", "run/configs//a.toml",
    "run/configs/A.toml", "run/configs/a.toml/", "run/configs/.a.toml", "run/configs/a\n.toml", "run/configs/ü.toml",
    "run/.run_key", "run/.lock", "run/state/trainer.json", "run/imported.json", "run/rollouts/step_01/rollouts.jsonl",
    f"run/rollouts/step_{'9' * 40}/a.jsonl", "run/rollouts/step_\u0661/a.jsonl", "run/model/model.safetensors",
    "run/broadcasts/step_1/model.safetensors", "images/ab/x.png", f"images/ab/{'cd' * 32}.png",
    "run/checkpoints/step_1/trainer/evil.py", "run/configs/\udcff.toml", f"run/configs/{'a' * 90}.toml",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_only_names_that_an_export_makes_are_accepted(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for each, data in (("manifest.json", MANIFEST), (name, b"x")):
            info = tarfile.TarInfo(each)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert "does not belong into a run archive" in _refused(archive, tmp_path)


@pytest.mark.parametrize(
    "member",
    [
        _special("run/summary.json", tarfile.SYMTYPE, linkname="/etc/passwd"),
        _special("run/summary.json", tarfile.LNKTYPE, linkname="manifest.json"),
        _special("run/summary.json", tarfile.FIFOTYPE),
        _special("run/summary.json", tarfile.CHRTYPE, devmajor=1, devminor=5),
        _special("run/configs", tarfile.DIRTYPE),
        _special("run/summary.json", tarfile.GNUTYPE_SPARSE),
        _special("run/summary.json", tarfile.CONTTYPE),
        _special("././@LongLink", tarfile.GNUTYPE_LONGNAME),
        _special("x", tarfile.XHDTYPE, size=1_000_000),
        _special("x", tarfile.XGLTYPE),
    ],
)
def test_only_regular_files_are_accepted(tmp_path: Path, member: tarfile.TarInfo) -> None:
    _refused(_archive(tmp_path / "evil.tar", (member, bytes(member.size))), tmp_path)


def test_extended_headers_do_not_rename_what_follows(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("manifest.json", {}), ("run/summary.json", {"path": "run//tmp/evil", "size": "999"})):
            info = tarfile.TarInfo(name)
            data = MANIFEST if name == "manifest.json" else b"{}"
            info.size, info.pax_headers = len(data), headers
            tar.addfile(info, io.BytesIO(data))
    import_run(archive, tmp_path / "run", STORED_LIMITS)
    assert [path.name for path in (tmp_path / "run").glob("*.json")] == ["summary.json"]


@pytest.mark.parametrize(
    "build",
    [
        lambda path: _archive(path, ("run/summary.json", b"{}"), ("run/summary.json", b"{}")),
        lambda path: _archive(path, manifest=b"[" * 100_000),
        lambda path: _archive(path, manifest=b'{"format": 5}'),
        lambda path: _archive(path, manifest=MANIFEST.replace(b"file:///x", b"http://x")),
        lambda path: _archive(path, manifest=MANIFEST.replace(b'"images": 0', b'"images": 7')),
        lambda path: _archive(path, manifest=MANIFEST + b" " * 2_000_000),
        lambda path: path.write_bytes(_archive(path, ("run/summary.json", b"x" * 5000)).read_bytes()[:2000]),
        lambda path: path.write_bytes(b"x" * 5000),
        lambda path: path.write_bytes(b""),
        lambda path: tarfile.open(path, "w:gz").close(),
    ],
)
def test_an_archive_that_is_not_whole_leaves_nothing(tmp_path: Path, build: Callable[[Path], object]) -> None:
    archive = tmp_path / "evil.tar"
    build(archive)
    _refused(archive, tmp_path)


def test_a_sparse_archive_does_not_fill_the_disk(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with archive.open("wb") as file:
        for name, size in (("manifest.json", len(MANIFEST)), ("run/checkpoints/step_1/trainer/__0_0.distcp", 2**52)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            if name == "manifest.json":
                file.write(MANIFEST.ljust(512, b"\0"))
        try:
            file.truncate(file.tell() + 2**43)
        except OSError:
            pytest.skip("this file system holds no file of 8 TiB")
    _refused(archive, tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=24)), min_size=1, max_size=4),
    st.integers(0, 10_000),
)
def test_a_damaged_archive_is_refused_or_restored(tmp_path: Path, damage: list[tuple[int, bytes]], length: int) -> None:
    data = bytearray(
        _archive(tmp_path / "good.tar", ("run/summary.json", b"{}"), ("run/configs/rl.toml", b"")).read_bytes()
    )
    for at, new in damage:
        data[at : at + len(new)] = new
    (tmp_path / "damaged.tar").write_bytes(data[: max(length, 600)])
    target = tmp_path / "restored" / "run"
    try:
        import_run(tmp_path / "damaged.tar", target, STORED_LIMITS)
    except PointillistError:
        assert not (tmp_path / "restored").exists()
    else:
        files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        assert files <= {"summary.json", "configs/rl.toml"} | {name for name in files if name.endswith(".toml")}
        for path in sorted(tmp_path.glob("restored/**/*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "restored").rmdir()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "good.tar", ("run/summary.json", b"{}"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in ("full", "file"):
        with pytest.raises(PointillistError, match="no empty folder"):
            import_run(archive, tmp_path / target, STORED_LIMITS)
    (tmp_path / "empty").mkdir()
    import_run(archive, tmp_path / "empty", STORED_LIMITS)
    assert (tmp_path / "empty" / "summary.json").read_text() == "{}"


def _run(root: Path) -> MadeRun:
    """A run whose references are in messages only."""
    made = MadeRun(root, steps=0)
    made.paths.eval_file(0).unlink()
    record = made.rollout("9.0.0", "sent") | {"task": f"{made.store.root.as_uri()} and no more"}
    record["branches"][0]["images"] = []
    made.write(made.paths.rollouts_file(9), [record])
    return made


def _store(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_checkpoints_travel_only_if_both_sides_ask_and_are_not_resumed(tmp_path: Path) -> None:
    made = _run(tmp_path / "run")
    paths = made.paths
    trainer = paths.checkpoint_step(3) / "trainer"
    trainer.mkdir(parents=True)
    for path in (trainer / ".metadata", trainer / "__0_0.distcp", paths.checkpoint_step(3) / "orchestrator.json"):
        path.write_bytes(b"{}")
    seal_folder(paths.checkpoint_step(3))
    paths.configs.mkdir()
    (paths.configs / "rl.toml").write_text('a = 1\n[env_vars]\nTOKEN = "a-secret-word"\n')
    (paths.output_dir / "state").mkdir()
    for name in ("state/trainer.json", ".run_key", ".lock"):
        (paths.output_dir / name).write_text("a-secret-word")
    plain, full = tmp_path / "plain.tar", tmp_path / "full.tar"
    assert "left out 4 files of checkpoints" in _store("export", paths.output_dir, plain).output
    assert _store("export", paths.output_dir, full, "--with-checkpoints").exit_code == 0
    for archive in (plain, full):
        assert b"a-secret-word" not in archive.read_bytes()
    assert b"step_3/trainer" not in plain.read_bytes()

    assert "left out 4 files of checkpoints" in _store("import", full, tmp_path / "without").output
    assert not RunPaths(tmp_path / "without").checkpoints.exists()
    assert resume_step(RunPaths(tmp_path / "without")) == 0

    result = _store("import", full, tmp_path / "with", "--with-checkpoints")
    assert result.exit_code == 0, result.output
    moved = RunPaths(tmp_path / "with")
    assert (moved.checkpoint_step(3) / "trainer" / ".metadata").read_bytes() == b"{}"
    with pytest.raises(LaunchError, match=r"remove .*imported\.json"):
        resume_step(moved)
    moved.imported.unlink()
    assert resume_step(moved) == 3


def test_export_refuses_links_and_leaves_no_half_archive(tmp_path: Path) -> None:
    made = _run(tmp_path / "run")
    (tmp_path / "outside").write_text("secret")
    (made.paths.output_dir / "summary.json").symlink_to(tmp_path / "outside")
    with pytest.raises(PointillistError, match="is a link"):
        export_run(made.paths, made.store.root, tmp_path / "run.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "run"]


def test_references_are_rewritten_to_the_new_place_only_where_they_name_an_image(tmp_path: Path) -> None:
    made = _run(tmp_path / "run")
    record = json.loads(made.paths.rollouts_file(9).read_text())
    export_run(made.paths, made.store.root, tmp_path / "run.tar")
    import_run(tmp_path / "run.tar", tmp_path / "new", STORED_LIMITS)
    moved = json.loads(RunPaths(tmp_path / "new").rollouts_file(9).read_text())
    assert moved["task"] == record["task"]
    url = moved["branches"][0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith((tmp_path / "new" / "assets").as_uri())
