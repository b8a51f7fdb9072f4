"""What a run means, and whether `--resume` would go on with something else.

The config that a run was begun with lies in `configs/rl.toml`, every start's in `configs/history/<n>.toml`, and what
the model folder held in `configs/model.json`. A resumed run may run elsewhere and faster; what decides what is learned,
and from what, stays as it is unless `--resume-with-changes` is given.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from pointillist.base.files import write_atomically
from pointillist.config import RLConfig
from pointillist.errors import ConfigError, LaunchError
from pointillist.families import load_family
from pointillist.images.inventory import add_user
from pointillist.runs.config_files import dump_toml
from pointillist.runs.image_dir import resolve_image_dir
from pointillist.runs.paths import RunPaths, number_of

# Keys that decide where and how fast a run runs, what is shown of it, and what happens when something dies.
_FREE: Final = (
    "dry_run", "env_vars", "inference.engine.admission_window", "inference.engine.device",
    "inference.engine.max_batch_size", "inference.engine.num_threads", "inference.server", "metrics", "monitors",
    "num_servers", "orchestrator.client.api_key_var", "orchestrator.client.base_url",
    "orchestrator.client.startup_timeout", "orchestrator.client.timeout", "orchestrator.client.unreachable_timeout",
    "orchestrator.eval.interval", "orchestrator.gateway", "orchestrator.max_concurrent",
    "orchestrator.max_retries", "orchestrator.num_train_workers",
    "orchestrator.resume_step", "orchestrator.workers", "resume", "resume_with_changes", "slurm",
    "supervision", "trainer.activation_checkpointing", "trainer.ckpt", "trainer.compile", "trainer.device",
    "trainer.num_threads", "trainer.num_workers", "trainer.resume_step",
)  # fmt: skip
# Of the run as of every component: its log and folder, how batches travel, and how images are read.
_FREE_ANYWHERE: Final = (
    "log_level", "max_steps", "multimodal.assets", "multimodal.cache_bytes", "multimodal.inflight_bytes",
    "multimodal.materialize_threads", "multimodal.missing_image_retries", "output_dir", "reader", "transport",
)  # fmt: skip
_COMPONENTS: Final = ("trainer", "orchestrator", "inference")
_SMALL_BYTES: Final = 64 * 1024 * 1024
_SHOWN: Final = 60


def config_changes(config: RLConfig, paths: RunPaths) -> list[str]:
    """Keys whose new value means another run, as `key: old -> new`.

    Args:
        config: As it is to go on.
        paths: The run's folder, with the config that it was begun with.

    Raises:
        LaunchError: The recorded config cannot be read.
    """
    recorded = paths.configs / "rl.toml"
    try:
        old = dict(_leaves(tomllib.loads(recorded.read_text(encoding="utf-8"))))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise LaunchError(
            f"{recorded} cannot be read ({error}); with --resume-with-changes the run goes on with the config given"
        ) from None
    new = dict(_leaves(tomllib.loads(dump_toml(config))))
    if not old:
        raise LaunchError(f"{recorded} is empty; with --resume-with-changes the run goes on with the config given")
    defaults = dict(_leaves(tomllib.loads(dump_toml(_with_defaults(config)))))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        # A key that an older version did not have had what is the default now.
        before, after = old.get(key, defaults.get(key)), new.get(key)
        if before == after or _is_free(key) or _is_same_place(key, before, after, old, config, paths):
            continue
        changes.append(f"{key}: {_short(before)} -> {_short(after)}")
    return changes


def model_changes(model: Mapping[str, str], paths: RunPaths) -> list[str]:
    """Files of the model folder that are not what the run was begun with.

    Args:
        model: Its record, as `model_record` makes it.
        paths: The run's folder.
    """
    try:
        old = json.loads(paths.model_record.read_bytes())
    except (OSError, ValueError):
        return []
    if not isinstance(old, dict):
        return []
    return [
        f"model {key}: {old.get(key)} -> {model.get(key)}"
        for key in sorted(old.keys() | model.keys())
        if old.get(key) != model.get(key)
    ]


def model_record(name: str) -> dict[str, str]:
    """What a model folder holds: digests of its settings, sizes of its weights, and the fingerprint of its layout.

    Args:
        name: A folder or a hub name; of a hub name there is the fingerprint alone.
    """
    record = {"layout_fingerprint": load_family(name).layout_fingerprint}
    folder = Path(name).expanduser()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_file():
            continue
        size = path.stat().st_size
        weights = path.suffix in (".safetensors", ".bin", ".pt") or size > _SMALL_BYTES
        record[path.name] = f"{size} bytes" if weights else hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return record


def record_start(config: RLConfig, paths: RunPaths, model: Mapping[str, str]) -> None:
    """Keeps this start's config beside those before it, what the model folder holds, and in the store who uses it.

    Args:
        config: Config of the run.
        paths: Its folder, in which the config is written.
        model: Record of its model, as `model_record` makes it.
    """
    numbers = [number for path in paths.history.glob("*.toml") if (number := number_of(path.stem)) is not None]
    text = (paths.configs / "rl.toml").read_bytes()
    write_atomically(paths.history / f"{max(numbers, default=0) + 1}.toml", text, private=True)
    write_atomically(paths.model_record, json.dumps(model, indent=1).encode())
    add_user(resolve_image_dir(config.multimodal, paths.output_dir, {}), paths.output_dir)


def refuse_changes(config: RLConfig, paths: RunPaths, step: int, model: Mapping[str, str]) -> None:
    """Makes sure that a resumed run is the run that was begun.

    Args:
        config: As it is to go on.
        paths: The run's folder.
        step: The step that it goes on after.
        model: Record of its model, as `model_record` makes it.

    Raises:
        ConfigError: It is another one, of which the message names every difference, or it is beyond `max_steps`.
    """
    if config.max_steps < step:
        raise ConfigError(
            f"max_steps = {config.max_steps}, but the run goes on after step {step}: expected {step} or more"
        )
    if config.resume_with_changes:
        return
    if changes := [*config_changes(config, paths), *model_changes(model, paths)]:
        raise ConfigError(
            "--resume with a config that means another run:\n  "
            + "\n  ".join(changes)
            + "\nset these as they were, or go on all the same with --resume-with-changes"
        )


def _with_defaults(config: RLConfig) -> RLConfig:
    """The config of the same model and environment with nothing else set."""
    made: RLConfig = RLConfig.model_validate({"model": {"name": config.model.name}, "env": {"id": config.env.id}})
    return made


def _leaves(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_free(key: str) -> bool:
    component, _, rest = key.partition(".")
    own = rest if component in _COMPONENTS else key
    return any(key == free or key.startswith(f"{free}.") for free in _FREE) or any(
        own == free or own.startswith(f"{free}.") for free in _FREE_ANYWHERE
    )


def _is_same_place(
    key: str, before: object, after: object, old: Mapping[str, object], config: RLConfig, paths: RunPaths
) -> bool:
    """Whether a path differs only since the run's folder, or the model's, was moved."""
    if key.endswith("model.name"):
        return paths.model_record.is_file()  # then what is in the folder is compared by `model_changes`
    if key.endswith("multimodal.offload_dir"):
        return str(before).removeprefix(str(old.get("output_dir"))) == str(after).removeprefix(str(config.output_dir))
    return False


def _short(value: object) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
