"""The README's own environment and config are used as they stand there."""

import re
import sys
from pathlib import Path

import pytest

from pointillist.config import RLConfig
from pointillist.environments import load_environment
from pointillist.runs.config_files import load_toml

README = Path(__file__).parent.parent.parent / "README.md"


def _block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return found


def test_the_environment_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "oranges.py").write_text(_block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    environment = load_environment("oranges:Oranges", {})
    assert [task.id for task in environment.train_tasks()] == ["0"]
    assert [task.id for task in environment.eval_tasks()] == ["1"]


def test_the_config_is_valid(tmp_path: Path) -> None:
    (tmp_path / "oranges.toml").write_text(_block("toml"))
    config = load_toml(RLConfig, tmp_path / "oranges.toml")
    assert config.orchestrator.env.id == "oranges:Oranges"
    assert config.trainer.max_steps == 200


def _tested(name: str) -> str:
    """The block of docs/environments.md after `<!-- tested: name -->`."""
    page = (README.parent / "docs/environments.md").read_text()
    (found,) = re.findall(rf"<!-- tested: {name} -->\n```\w+\n(.*?)```", page, flags=re.DOTALL)
    return found


def test_the_dataset_config_is_valid(tmp_path: Path) -> None:
    (tmp_path / "rl.toml").write_text('[model]\nname = "x"\n' + _tested("dataset"))
    config = load_toml(RLConfig, tmp_path / "rl.toml")
    (tmp_path / "charts.jsonl").write_text('{"prompt": "How high is <image>?", "images": ["1.png"], "answer": "7.5"}\n')
    environment = load_environment("dataset", {**config.env.args, "path": str(tmp_path / "charts.jsonl")})
    assert len(environment.eval_tasks()) == 1


def test_its_links_lead_somewhere() -> None:
    # The viewer's picture is taken of a real run, not by a test.
    targets = set(re.findall(r"\]\(([\w/.-]+)\)", README.read_text())) - {"docs/images/view-rollout.png"}
    for target in targets:
        assert (README.parent / target).exists(), target
