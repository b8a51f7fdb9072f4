"""Options of the commands that take a config, and the help that lists them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pointillist.cli import cli
from pointillist.cli.options import help_of, options_of, parse_cli
from pointillist.config import InferenceConfig, RLConfig, TrainerConfig
from pointillist.config.base import Config
from pointillist.errors import ConfigError

BASE = ["--model.name", "m", "--env.id", "digits"]
CASES: list[tuple[list[str], str, Any]] = [
    (["--trainer.optim.lr", "3e-4"], "trainer.optim.lr", 3e-4),
    (["--trainer.optim.lr=3e-4"], "trainer.optim.lr", 3e-4),
    (["--num-servers", "2"], "num_servers", 2),
    (["--num_servers=2"], "num_servers", 2),
    (["--seed", "-3"], "seed", -3),
    (["--resume"], "resume", True),
    (["--resume", "--seed", "1"], "resume", True),
    (["--resume", "false"], "resume", False),
    (["--no-slurm"], "slurm", None),
    (["--slurm", "None"], "slurm", None),
    (["--trainer.lora"], "trainer.lora.rank", 16),
    (["--trainer.lora.rank", "4"], "trainer.lora.rank", 4),
    (["--trainer.ckpt.interval_minutes", "None"], "trainer.ckpt.interval_minutes", None),
    (["--trainer.optim.betas", "0.8", "0.99"], "trainer.optim.betas", (0.8, 0.99)),
    (["--orchestrator.client.base_url", "http://a", "http://b"], "orchestrator.client.base_url", ["http://a", "http://b"]),
    (["--multimodal.assets.urls", '["http://a"]'], "inference.multimodal.assets.urls", ["http://a"]),
    (["--multimodal.assets.urls=http://a"], "multimodal.assets.urls", ["http://a"]),
    (["--multimodal.assets.urls"], "multimodal.assets.urls", []),
    (["--env.args", '{"a": [1, "2"]}'], "env.args", {"a": [1, "2"]}),
    (["--env.args.data-dir", "x", "--env.args.n", "8"], "env.args", {"data_dir": "x", "n": 8}),
    (["--env.args.on", "True"], "env.args", {"on": True}),
    (["--env.args.code", "007", "--env.args.f", "1e3"], "env.args", {"code": "007", "f": 1000.0}),
    (["--env.args.flag"], "env.args", {"flag": True}),
    (["--env-vars.N", "0", "--env-vars.A_b", "x=y"], "env_vars", {"N": "0", "A_b": "x=y"}),
    (["--inference.vllm.args.gpu_memory_utilization", "0.8"], "inference.vllm.args", {"gpu_memory_utilization": 0.8}),
    (["--trainer.compile", "--no-trainer.compile"], "trainer.compile", False),
]  # fmt: skip


def _get(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("words", "key", "expected"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_words_become_values(words: list[str], key: str, expected: object) -> None:
    assert _get(parse_cli(RLConfig, [*BASE, *words]), key) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed"], "--seed needs a value"),
        (["--seed", "--resume"], "--seed needs a value"),
        (["seed", "3"], "'seed' belongs to no option"),
        (["--trainer.optim", "3"], "--trainer.optim is a table of keys, such as --trainer.optim.lr"),
        (["--trainer.optim.lrr", "3"], r"trainer.optim: unknown key 'lrr' in OptimConfig, did you mean 'lr'"),
        (["--env.args", "{"], "--env.args .* is not JSON"),
        (["--seed", "x"], r"seed: Input should be a valid integer.*\(got 'x'\)"),
        (["@"], "@ must be followed by a config file"),
        (["@", "none.toml"], "config none.toml cannot be read"),
        (["--max-steps", "0", "--num-servers", "x"], "(?s)max_steps: .*\n.*num_servers: "),
    ],
)
def test_words_that_cannot_work(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cli(RLConfig, [*BASE, *words])


def test_files_lie_below_options_and_later_ones_above(tmp_path: Path) -> None:
    for name, text in (
        ("a", "seed = 1\nmax_steps = 5\n[trainer.optim]\nlr = 1.0"),
        ("b", "seed = 2"),
        ("optim", "lr = 0.5"),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
    words = [*BASE, "--max-steps", "7", "@", f"{tmp_path}/a.toml", "@", f"{tmp_path}/b.toml"]
    config = parse_cli(RLConfig, words)
    assert (config.seed, config.max_steps, config.trainer.optim.lr) == (2, 7, 1.0)
    for spelling in (["@", f"{tmp_path}/optim.toml"], [f"@{tmp_path}/optim.toml"]):
        assert parse_cli(RLConfig, [*words, "--trainer.optim", *spelling]).trainer.optim.lr == 0.5


def test_text_in_a_file_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[env.args]\ncode = "5"\n')
    assert parse_cli(RLConfig, [*BASE, "@", f"{tmp_path}/a.toml"]).env.args == {"code": "5"}


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), st.text().filter(lambda text: text != "None")
    )
)
def test_any_text_reaches_an_open_table(values: dict[str, str]) -> None:
    words = [word for name, value in values.items() for word in (f"--env-vars.{name}={value}",)]
    assert parse_cli(RLConfig, [*BASE, *words]).env_vars == values
    assert parse_cli(RLConfig, [*BASE, "--env-vars", json.dumps(values)]).env_vars == values


@pytest.mark.parametrize("config_class", [RLConfig, InferenceConfig, TrainerConfig])
def test_the_help_has_each_option_once(config_class: type[Config]) -> None:
    text = help_of("pointillist x", "Do it.", config_class)
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags))
    assert set(flags) == {option.flag for option in options_of(config_class) if option.table is None}


def test_the_help_of_a_run_names_what_components_share_at_the_top_alone() -> None:
    text = help_of("pointillist rl", "Run.", RLConfig)
    assert "--multimodal.cache" in text or "--multimodal.offload-dir" in text
    for hidden in ("--trainer.multimodal", "--inference.model", "--orchestrator.num-train-workers", "--trainer.seed"):
        assert hidden not in text
    assert len(text.splitlines()) < 450


def test_the_help_of_a_table_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    whole = CliRunner().invoke(cli, ["rl", "--help", "trainer.lora"]).output
    assert "[trainer.lora]" in whole
    assert "--trainer.lora.rank INT" in whole
    assert "--trainer.optim.lr" not in whole
    wrong = CliRunner().invoke(cli, ["rl", "--help", "trainer.lorra"])
    assert wrong.exit_code == 1
    assert "has no key 'trainer.lorra'" in wrong.output


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["rl"], "--trainer.optim.l", ["--trainer.optim.lr"]),
        (["rl"], "--max_st", ["--max-steps"]),
        ([], "slu", ["slurm-node"]),
        (["view"], "--ho", ["--host"]),
    ],
)
def test_shells_complete_commands_and_keys(words: list[str], incomplete: str, expected: list[str]) -> None:
    complete = ShellComplete(cli, {}, "pointillist", "_POINTILLIST_COMPLETE")
    assert [item.value for item in complete.get_completions(words, incomplete)] == expected


@pytest.mark.integration  # click asks bash for its version
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert "_POINTILLIST_COMPLETE" in result.output
