"""Wheel and sdist as a stranger gets them: built, installed into an empty environment, and used there."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from pointillist import __version__
from tests.helpers.files import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def _run(*command: object, cwd: Path | None = None, code: int = 0) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the sources are not there
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environ, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from the unpacked sdist: what is missing there is missing here."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    with tarfile.open(folder / f"pointillist-{__version__}.tar.gz") as sdist:
        sdist.extractall(folder, filter="data")
    source = folder / f"pointillist-{__version__}"
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return folder


def test_what_is_in_them(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"pointillist-{__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"pointillist-{__version__}.dist-info/METADATA").decode()
    assert {"pointillist/py.typed", "pointillist/launch/templates/rl.sbatch.j2", "pointillist_verifiers.py"} <= names
    top = {name.partition("/")[0] for name in names}
    assert top == {"pointillist", "pointillist_verifiers.py", f"pointillist-{__version__}.dist-info"}
    assert "Classifier: Typing :: Typed" in metadata
    with tarfile.open(dist / f"pointillist-{__version__}.tar.gz") as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py", "docs/contract.md"} <= inside
    assert not {name for name in inside if name.startswith((".venv", "outputs", "build/"))}


def test_it_installs_into_an_empty_environment_and_works_without_torch(dist: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python, pointillist = tmp_path / "venv/bin/python", tmp_path / "venv/bin/pointillist"
    wheel = dist / f"pointillist-{__version__}-py3-none-any.whl"
    _run(
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint",
        ROOT / "requirements.lock", wheel,
    )  # fmt: skip
    assert _run(pointillist, "--version", cwd=tmp_path).strip() == f"pointillist, version {__version__}"
    installed = _run(python, "-m", "pip", "list", "--format", "freeze").lower()
    assert "torch==" not in installed
    assert "transformers==" not in installed
    told = _run(pointillist, "doctor", "--run-folder", tmp_path / "runs", cwd=tmp_path, code=1)
    assert "pip install '.[train]'" in told
    assert "2 problem(s)" in told  # torch and transformers
    assert "complete" in _run(pointillist, "completion", "zsh", cwd=tmp_path)
    _run(
        python, "-c",
        "import pointillist.environments.dataset, pointillist.families, pointillist.launch.rl, pointillist.sessions, "
        "pointillist.orchestrator.orchestrator, pointillist.render, pointillist.transport", cwd=tmp_path,
    )  # fmt: skip
    # The families are found by their entry points.
    assert "qwen_vl" in _run(
        python, "-c", "from importlib.metadata import entry_points as e; print(e(group='pointillist.families').names)",
        cwd=tmp_path,
    )  # fmt: skip
