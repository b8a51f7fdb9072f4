from pathlib import Path

import pytest

from pointillist.cli.options import options_of, parse_cli
from pointillist.config import InferenceConfig, MultimodalConfig, RLConfig
from pointillist.config.base import Config
from pointillist.config.shared import CARRIER, LIMITS_CARRIER, LimitsConfig
from pointillist.errors import ConfigError
from pointillist.images import ImageLimits
from pointillist.runs.config_files import load_toml, write_toml
from pointillist.runs.image_dir import resolve_image_dir, writer_image_dir, writer_limits

TOML = """
seq_len = 512
max_steps = 10
[model]
name = "m"
[env]
id = "digits"
[trainer.optim]
lr = 1e-3
"""


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "rl.toml"
    path.write_text(TOML)
    return str(path)


def _parse(toml: str, *overrides: str) -> RLConfig:
    return parse_cli(RLConfig, ["@", toml, *overrides])


def test_writers_are_told_the_runs_limits() -> None:
    limits = LimitsConfig(max_side=30_000, formats=["png"])
    told = writer_limits({LIMITS_CARRIER: limits.model_dump_json()})
    assert (told.max_side, told.formats) == (30_000, ("png",))
    assert writer_limits({}) == ImageLimits()
    with pytest.raises(ConfigError, match=LIMITS_CARRIER):
        writer_limits({LIMITS_CARRIER: '{"max_side": 0}'})


def test_shared_fields_reach_every_component(toml: str) -> None:
    config = _parse(toml, "--seed", "7", "--output-dir", "out", "--multimodal.offload_dir", "/images")
    for component in (config.trainer, config.orchestrator, config.inference):
        assert component.model.name == "m"
        assert component.seq_len == 512
        assert component.seed == 7
        assert component.output_dir == Path("out")
        assert component.multimodal.offload_dir == "/images"
    assert config.trainer.max_steps == config.orchestrator.max_steps == 10
    assert config.orchestrator.env.id == "digits"


def test_dotted_overrides(toml: str) -> None:
    config = _parse(toml, "--trainer.optim.lr", "3e-4", "--env.blank_images", "true")
    assert config.trainer.optim.lr == 3e-4
    assert config.orchestrator.env.blank_images is True


def test_worker_count_reaches_the_packer(toml: str) -> None:
    assert _parse(toml, "--trainer.num_workers", "2").orchestrator.num_train_workers == 2


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["--trainer.seq_len", "7"], ["seq_len = 512", "trainer.seq_len"]),
        (["--inference.model.name", "other"], ["model.name", "inference.model.name"]),
        (
            ["--orchestrator.multimodal.offload_dir", "/x"],
            ["multimodal.offload_dir", "orchestrator.multimodal.offload_dir"],
        ),
        (["--trainer.output_dir", "elsewhere"], ["output_dir", "trainer.output_dir"]),
    ],
)
def test_contradictions_name_both_keys(toml: str, overrides: list[str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        _parse(toml, *overrides)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("--trainer.optim.lrr", "did you mean 'lr'"),
        ("--max-stepz", "did you mean 'max_steps'"),
        ("--env.blank", "blank_images"),
    ],
)
def test_unknown_keys_name_the_nearest(toml: str, override: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        _parse(toml, override, "1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--orchestrator.batch_size", "12"], "not a multiple of group_size"),
        (["--orchestrator.gateway.host", "0.0.0.0"], "set gateway.api_key_var"),
        (["--orchestrator.workers.count", "2", "--orchestrator.gateway.port", "8001"], "set gateway.port = 0"),
        (["--inference.server.host", "0.0.0.0"], "api_key_var"),
        (["--trainer.optim.scheduler.warmup_steps", "11"], "warmup_steps"),
        (["--max-steps", "0"], "greater than 0"),
        ([f"--env_vars.{CARRIER}", "/x"], "offload_dir"),
        (["--multimodal.offload_dir", " "], "empty"),
        (["--multimodal.cache_bytes", "1"], "set inference.reader.cache_bytes and trainer.reader.cache_bytes"),
        (["--multimodal.materialize_threads", "1"], "set inference.reader.threads and trainer.reader.threads"),
        (
            ["--inference.backend", "vllm", "--inference.engine.admission_window", "1"],
            "engine.admission_window = 1.0",
        ),
        (["--inference.backend", "vllm", "--inference.engine.device", "cpu"], "engine.device = cpu has no effect"),
    ],
)
def test_values_that_can_not_work(toml: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _parse(toml, *overrides)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        parse_cli(RLConfig, ["@", str(tmp_path / "none.toml")])
    (tmp_path / "broken.toml").write_text("a = [")
    with pytest.raises(ConfigError):
        load_toml(RLConfig, tmp_path / "broken.toml")


def test_written_configs_read_back(toml: str, tmp_path: Path) -> None:
    config = _parse(toml)
    write_toml(config, tmp_path / "all.toml")
    assert load_toml(RLConfig, tmp_path / "all.toml") == config
    write_toml(config.inference, tmp_path / "inference.toml")
    assert load_toml(InferenceConfig, tmp_path / "inference.toml") == config.inference


OUT = Path("/out")


@pytest.mark.parametrize(
    ("offload_dir", "environ", "expected"),
    [
        (None, {}, "/out/assets/images"),
        (None, {"RUN_ID": "run_7"}, "/data/outputs/run_7/assets/images"),
        (None, {"RUN_ID": "7"}, "/data/outputs/run_7/assets/images"),
        ("/images", {"RUN_ID": "7"}, "/images"),
        ("$A/b/${C}", {"A": "/a", "C": "c"}, "/a/b/c"),
        (None, {CARRIER: "/stale"}, "/out/assets/images"),
    ],
)
def test_image_dir_precedence(offload_dir: str | None, environ: dict[str, str], expected: str) -> None:
    multimodal = MultimodalConfig(offload_dir=offload_dir)
    assert resolve_image_dir(multimodal, OUT, environ) == Path(expected)


def test_image_dir_of_a_writer_is_what_it_was_told() -> None:
    assert writer_image_dir(MultimodalConfig(offload_dir="/a"), OUT, {CARRIER: "/told"}) == Path("/told")
    assert writer_image_dir(MultimodalConfig(offload_dir="/a"), OUT, {}) == Path("/a")


def test_unset_variables_are_errors() -> None:
    with pytest.raises(ConfigError, match="NOT_SET"):
        resolve_image_dir(MultimodalConfig(offload_dir="${NOT_SET}/x"), OUT, {})


def _config_classes(base: type[Config] = Config) -> list[type[Config]]:
    return [each for below in base.__subclasses__() for each in (below, *_config_classes(below))]


def test_every_key_says_what_it_is() -> None:
    """A table is described where its keys are, by the docstring of its class."""
    silent = [
        f"{config_class.__name__}.{option.key}"
        for config_class in _config_classes()
        for option in options_of(config_class)
        if not (option.table.__doc__ if option.table else option.field.description)
    ]
    assert silent == []


def test_readers_may_differ() -> None:
    words = [
        "--model.name",
        "m",
        "--env.id",
        "e",
        "--inference.reader.threads",
        "2",
        "--trainer.reader.cache_bytes",
        "0",
    ]
    config = parse_cli(RLConfig, words)
    assert (config.inference.reader.threads, config.trainer.reader.threads) == (2, None)
    assert config.trainer.reader.cache_bytes == 0 < config.inference.reader.cache_bytes


def test_keys_that_hold_for_vllm_are_taken_and_defaults_are_no_choice(toml: str, tmp_path: Path) -> None:
    config = _parse(toml, "--inference.backend", "vllm", "--inference.engine.dtype", "bfloat16").inference
    write_toml(config, tmp_path / "inference.toml")
    assert load_toml(InferenceConfig, tmp_path / "inference.toml") == config


def test_a_copy_changes_what_components_share_and_the_config_stays(toml: str) -> None:
    config = _parse(toml)
    before = config.model_dump()
    changed = config.with_values({"output_dir": Path("/x"), "multimodal.assets.port": 7, "trainer.num_workers": 2})
    for part in (changed, changed.trainer, changed.orchestrator, changed.inference):
        assert (part.output_dir, part.multimodal.assets.port) == (Path("/x"), 7)
    assert changed.orchestrator.num_train_workers == 2
    assert config.model_dump() == before
    assert RLConfig.model_validate(changed.model_dump()) == changed
    with pytest.raises(KeyError, match="no key 'prot'"):
        config.with_values({"multimodal.assets.prot": 7})
