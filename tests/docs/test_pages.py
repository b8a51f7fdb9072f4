"""Every command and snippet of the documentation is used here as it stands there, or mapped to the test that does.

- `python`: executed; a class that is an environment gives its tasks.
- `toml`: loaded as the config of a run (others have a marker, `<!-- tested: name -->`).
- `json`: parsed; a request for completions is validated.
- `bash`: each command by its own way below. What costs minutes is checked as far as it is cheap: `rl` as a dry run,
  `make` without executing; whole runs are what the integration tests are for.

A block in another language, a command that nothing here knows and a marker that nobody maps are failures.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner, Result

from pointillist.cli import cli
from pointillist.cli.options import parse_cli
from pointillist.config import (
    EnvWorkerConfig,
    GatewayServerConfig,
    InferenceConfig,
    OrchestratorConfig,
    RLConfig,
    TrainerConfig,
)
from pointillist.images import ImageLimits, ImageStore
from pointillist.inference.protocol import GenerateRequest, decode_body
from pointillist.runs.config_files import load_toml
from tests.docs.blocks import Block, blocks, commands, pages
from tests.helpers.files import ROOT
from tests.helpers.pictures import encoded, picture

BLOCKS = list(blocks())
# Blocks with a marker -> the test that uses them.
MAPPED = {
    "agent": "tests/integration/test_gateway.py::test_the_ten_lines_of_the_documentation",
    "dataset": "tests/unit/test_readme.py::test_the_dataset_config_is_valid",
    "vllm without the plugin": "tests/integration/test_vllm.py::test_sessions_talk_to_a_vllm_without_the_plugin",
    "family": "tests/docs/test_pages.py::test_a_package_declares_its_family",
}
BASE = '[model]\nname = "path/to/model"\n[env]\nid = "digits"\n'
PROCESSES = {
    "inference": InferenceConfig,
    "trainer": TrainerConfig,
    "orchestrator": OrchestratorConfig,
    "gateway": GatewayServerConfig,
    "env-worker": EnvWorkerConfig,
}


def _block_tests(*languages: str) -> pytest.MarkDecorator:
    mine = [block for block in BLOCKS if block.language in languages and block.name is None]
    return pytest.mark.parametrize("block", mine, ids=lambda block: block.where)


def _pointillist(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@pytest.fixture(scope="module")
def prepared(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages' commands name: configs, examples, and a run."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (readme,) = [each.text for each in BLOCKS if each.page == ROOT / "README.md" and each.language == "toml"]
    (folder / "oranges.toml").write_text(readme)
    (folder / "rl.toml").write_text(BASE.replace("path/to/model", str(model_dir)))
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = _pointillist("rl", "@", "rl.toml", "--output-dir", "outputs/run", "--dry-run")
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    store = ImageStore(folder / "outputs/run/assets/images", ImageLimits())
    part = {"type": "image_url", "image_url": {"url": store.put(encoded(picture(64, 64))).uri}}
    messages = [{"role": "user", "content": [part]}]
    record = {"id": "90.9.0", "task": "0", "reward": 1.0, "advantage": 1.0,
              "branches": [{"messages": messages, "images": []}]}  # fmt: skip
    rollouts = folder / "outputs/run/rollouts/step_90/rollouts.jsonl"
    rollouts.parent.mkdir(parents=True)
    rollouts.write_text(json.dumps(record) + "\n")
    (folder / "outputs/run/model").mkdir()
    return folder


@pytest.fixture
def inside(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return prepared


def test_every_block_is_used_or_mapped() -> None:
    known = {"python", "toml", "json", "bash", "text"}
    assert [block.where for block in BLOCKS if block.language not in known] == []
    assert [block.where for block in BLOCKS if block.name is not None and block.name not in MAPPED] == []
    assert len(BLOCKS) > 20
    for test in MAPPED.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test


def test_a_text_block_is_not_a_way_around() -> None:
    for block in BLOCKS:
        if block.language == "text":
            assert not re.search(r"^\s*(pointillist|make|pip|import|from) ", block.text, re.M), block.where


@_block_tests("python")
def test_python(block: Block, inside: Path) -> None:
    namespace: dict[str, object] = {"__name__": "page", "URL": "file:///x.png"}
    exec(compile(dedent(block.text), block.where, "exec"), namespace)
    for value in list(namespace.values()):
        if isinstance(value, type) and value.__module__ == "page" and not getattr(value, "_is_protocol", False):
            made = value()
            if hasattr(made, "train_tasks"):
                assert made.train_tasks()


@_block_tests("toml")
def test_toml(block: Block, tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "block.toml").write_text(block.text)
    config = parse_cli(RLConfig, ["@", str(tmp_path / "base.toml"), "@", str(tmp_path / "block.toml")])
    assert config.env.id


@_block_tests("json")
def test_json(block: Block) -> None:
    decode_body(block.text.encode(), GenerateRequest)


def test_a_package_declares_its_family() -> None:
    (block,) = [block for block in BLOCKS if block.name == "family"]
    declared = tomllib.loads(block.text)["project"]["entry-points"]
    assert declared.keys() <= _project()["project"]["entry-points"].keys()


def _project() -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _run_pointillist(words: list[str]) -> None:
    """`rl` as a dry run, a process by its config alone, everything else for real."""
    if words[0] in PROCESSES:
        parse_cli(PROCESSES[words[0]], words[1:])
        return
    if words[0] == "rl" and not set(words) & {"--output-dir"}:
        words = [*words, "--output-dir", f"outputs/dry-{abs(hash(tuple(words)))}"]
    if words[0] == "rl" and "--dry-run" not in words:
        words = [*(word for word in words if word != "--resume"), "--dry-run"]  # there is no run to go on with
    if words[0] == "view":
        words = ["view", "--help"]  # serves until it is stopped
    result = _pointillist(*words)
    assert result.exit_code == 0, f"{words}: {result.output}"


def _run_make(words: list[str]) -> None:
    """Without executing: the target is there, and its variables make sense to make."""
    if shutil.which("make") is None:
        assert words[0] in re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        return
    done = subprocess.run(["make", "-n", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _run_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extra = re.fullmatch(r"\.\[(\w+)\]", words[1])
    assert extra is not None
    assert extra[1] in _project()["project"]["optional-dependencies"]


def _run_python(words: list[str]) -> None:
    assert words[0] == "-m"
    assert importlib.util.find_spec(words[1]) is not None


def _run_tensorboard(words: list[str]) -> None:
    from tensorboard import program

    program.TensorBoard().configure(argv=["tensorboard", *words])


def _run_wandb(words: list[str]) -> None:
    from wandb.cli.cli import cli as wandb

    result = CliRunner().invoke(wandb, [words[0], "--help"])
    assert result.exit_code == 0


def _run_source(words: list[str]) -> None:
    """`source <(pointillist completion bash)`."""
    match = re.fullmatch(r"<\(pointillist (.*)\)", " ".join(words))
    assert match is not None
    _run_pointillist(match[1].split())


RUNNERS: dict[str, Callable[[list[str]], None]] = {
    "pointillist": _run_pointillist,
    ".venv/bin/pointillist": _run_pointillist,
    "make": _run_make,
    "pip": _run_pip,
    "python": _run_python,
    "tensorboard": _run_tensorboard,
    "wandb": _run_wandb,
    "source": _run_source,
    "export": lambda words: None,
}


def _run(words: list[str]) -> None:
    while re.fullmatch(r"\w+=\S*", words[0]):  # a variable of this command
        words = words[1:]
    assert words[0] in RUNNERS, f"no test knows how to run {words[0]!r}: add a way, or map the block"
    RUNNERS[words[0]](words[1:])


@_block_tests("bash")
def test_bash(block: Block, inside: Path) -> None:
    for words in commands(block.text):
        _run(words)


def _spoken_commands() -> list[tuple[str, str]]:
    """Commands in the text itself: `make x`, `pointillist x ...`."""
    found = []
    for page in pages():
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        found += [(str(page.relative_to(ROOT)), code) for code in re.findall(r"`((?:make|pointillist) [^`]+)`", text)]
    return found


@pytest.mark.parametrize(("page", "code"), sorted(set(_spoken_commands())))
def test_a_command_in_the_text_is_there(page: str, code: str) -> None:
    program, name, *_ = code.split()
    if program == "make":
        assert re.search(rf"^{re.escape(name)}:", (ROOT / "Makefile").read_text(), re.M), page
    elif name != "view":
        assert name in cli.commands, page


def test_a_message_of_troubleshooting_is_one_of_the_program() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go on in the next line
    page = (ROOT / "docs/troubleshooting.md").read_text().partition("## It runs")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 15
    assert [message for message in messages if message not in source] == []


def test_no_page_is_left_out_of_the_sites_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in contents, page


def test_the_control_finds_what_is_wrong(inside: Path) -> None:
    """A harness that passes everything proves nothing."""
    with pytest.raises(AssertionError, match="no test knows"):
        _run(["rm", "-r", "/"])
    with pytest.raises((SystemExit, AssertionError)):
        _run(["pointillist", "rl", "@", "rl.toml", "--trainer.optim.lrr", "1"])
    with pytest.raises(AssertionError):
        _run(["make", "no-such-target"])
    with pytest.raises(AssertionError):
        _run(["pip", "install", ".[no_such_extra]"])


def test_the_config_of_the_readme_is_a_runs(prepared: Path) -> None:
    assert load_toml(RLConfig, prepared / "oranges.toml").max_steps == 200
