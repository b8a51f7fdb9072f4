"""`pointillist doctor` and `completion`: real conditions where they can be made, and a broken world where not."""

import json
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from packaging.specifiers import SpecifierSet

from pointillist.base.files import write_atomically
from pointillist.cli import cli
from pointillist.launch.doctor import Finding, folder, libraries, machine, probe
from pointillist.launch.doctor.folder import check_folder

pytestmark = pytest.mark.integration

SpawnedMemory = namedtuple("SpawnedMemory", "available total")


def _by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_this_machine_has_no_problem(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--run-folder", str(tmp_path / "runs")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for what in ("Python", "torch", "transformers", "vllm", "images", "free space", "fsync", "coherence", "rename"):
        assert what in result.output
    assert "pip install '.[" in result.output  # verifiers or vllm is not here; brackets are no markup
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_folder(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    result = CliRunner().invoke(cli, ["doctor", "--run-folder", str(file / below)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "is a file, a run needs a folder" in result.output


def test_a_folder_that_nobody_can_write() -> None:
    found = _by_name(check_folder(Path("/proc/runs")))
    assert found["writable"].state == "problem"


def test_a_link_in_the_path_is_told(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert f"references will name {tmp_path}/real" in _by_name(check_folder(tmp_path / "link"))["folder"].text


@pytest.mark.parametrize(("free", "state"), [(1e6, "problem"), (5e9, "warning"), (1e12, "ok")])
def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, state: str) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert _by_name(check_folder(tmp_path))["free space"].state == state


def test_a_file_system_that_fails_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    assert "Input/output error" in _by_name(check_folder(tmp_path))["files"].text
    assert list(tmp_path.iterdir()) == []


def test_writing_in_place_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file system without atomic renames would show: the real reader sees a file that is empty or half there."""

    def in_place(path: Path, data: bytes, *, durable: bool) -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(data), 4096):
                file.write(data[start : start + 4096])

    monkeypatch.setattr(folder, "write_atomically", in_place)
    monkeypatch.setattr(folder, "_SWAPS", 2000)
    assert _by_name(check_folder(tmp_path))["rename"].state == "problem"


def test_other_bytes_in_another_process_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path, data: bytes, *, durable: bool) -> None:
        write_atomically(path, data[1:] if path.name == probe.FROM_DOCTOR else data, durable=durable)

    monkeypatch.setattr(folder, "write_atomically", cut)
    monkeypatch.setattr(probe, "PATIENCE_SECONDS", 4.0)
    assert _by_name(check_folder(tmp_path))["coherence"].state == "problem"


def test_a_file_that_never_comes_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PATIENCE_SECONDS", 0.01)
    assert probe.wait_for(tmp_path / "x") is None
    assert folder._coherent(tmp_path / "x", "").state == "problem"


def test_a_probe_reports_what_it_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / probe.FROM_DOCTOR).write_bytes(b"x")
    (tmp_path / probe.STOP).touch()
    probe.main(tmp_path)
    assert json.loads(capsys.readouterr().out) == {"reads": 0, "missing": 0, "torn": 0}


def test_few_open_files_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SpawnedMemory(1e9, 2e9))
    monkeypatch.setattr(sys, "platform", "darwin")
    found = _by_name(machine.check_machine())
    assert {what for what, each in found.items() if each.state == "warning"} == {"system", "memory", "open files"}


def test_versions_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "declared_range", lambda name: SpecifierSet("<0.1"))
    monkeypatch.setattr("pointillist.inference.vllm.versions.installed_vllm", lambda: "0.1.0")
    monkeypatch.setattr(libraries, "installed_vllm", lambda: "0.1.0")
    found = _by_name(libraries.check_libraries())
    assert {found[name].state for name in ("torch", "transformers", "vllm")} == {"problem"}
    assert "expected <0.1" in found["transformers"].text


def test_what_the_package_declares_is_what_counts() -> None:
    assert "6.0" not in libraries.declared_range("transformers")
    assert str(libraries.declared_range("nobody-knows-it")) == ""


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(libraries, "version", missing)
    found = libraries._torch()
    assert (found.state, ".[train]" in found.text) == ("problem", True)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("raise OSError('libcudart.so is gone')", "libcudart.so is gone"),
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
    ],
)
def test_a_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch, script: str, text: str) -> None:
    monkeypatch.setattr(libraries, "_TORCH", script)
    found = libraries._torch()
    assert (found.state, text in found.text) == ("problem", True)


def test_a_torch_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr(libraries, "_TORCH_SECONDS", 0.2)
    assert "does not import within" in libraries._torch().text


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ({"built_for": "13.0", "devices": ["H100"], "works": True}, "ok"),
        ({"built_for": "13.0", "devices": ["H100"], "works": False}, "problem"),
        ({"built_for": "13.0", "devices": [], "works": True}, "warning"),
        ({"built_for": None, "devices": [], "works": True}, "ok"),
    ],
)
def test_devices(told: dict[str, object], state: str) -> None:
    assert libraries._judge_torch({"version": "2.13.0", **told}).state == state


def test_a_decoder_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "decode_rgb", lambda data, limits: np.zeros((48, 64, 3), np.uint8))
    assert "PNG is decoded differently" in libraries._images().text
    monkeypatch.setattr(libraries, "decode_rgb", lambda data, limits: (_ for _ in ()).throw(OSError("no codec")))
    assert "no codec" in libraries._images().text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert "_POINTILLIST_COMPLETE" in result.output


def test_bash_completes_a_command(tmp_path: Path) -> None:
    """The script itself, in a real bash."""
    command = tmp_path / "pointillist"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pointillist "$@"\n')
    command.chmod(0o755)
    script = CliRunner().invoke(cli, ["completion", "bash"]).output
    ask = f"{script}\nCOMP_WORDS=(pointillist tra); COMP_CWORD=1\n_pointillist_completion {command}\n"
    done = subprocess.run(
        ["bash", "-c", ask + "echo ${COMPREPLY[*]}"], capture_output=True, text=True, timeout=1200, check=False
    )
    assert set(done.stdout.split()) == {"trainer", "transcript"}, done.stderr
