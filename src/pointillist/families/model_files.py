"""A model folder's own configuration files, read without transformers."""

import json
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from pointillist.base.json_types import JsonValue
from pointillist.errors import ConfigError

_BICUBIC: Final = 3
"""Pillow's number of the filter, as image processors write it."""
_SettingsT = TypeVar("_SettingsT", bound="ProcessorSettings")
VISION_TOKENS: Final = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
"""Keys of `config.json` under which most models name their special tokens of images and videos."""


def resolve_model_dir(name: str) -> Path:
    """Folder of a model: a local folder, or the hub snapshot of `organisation/model` (configuration files only).

    Raises:
        ConfigError: The name is neither a folder nor could its files be fetched from the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if not looks_local:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "*.py"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(
                f"model {name!r} is neither a folder nor could it be fetched from the hub ({type(error).__name__})"
            ) from None
    raise ConfigError(f"model folder {name!r} does not exist (expected a folder with config.json, tokenizer.json, ...)")


class ModelFiles:
    """Configuration files of one model folder; each is read when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, JsonValue]:
        """`config.json`.

        Raises:
            ConfigError: Missing or not a JSON object.
        """
        return self._json("config.json")

    @cached_property
    def model_type(self) -> str:
        """`model_type` of `config.json`.

        Raises:
            ConfigError: Missing.
        """
        value = self.config.get("model_type")
        if not isinstance(value, str):
            raise ConfigError(f"{self.folder / 'config.json'} has no model_type")
        return value

    @property
    def vocab_size(self) -> int:
        """Number of rows of the output layer, with padding that no token stands for; 0 if the config has no number."""
        text = self.config.get("text_config")
        size = (text if isinstance(text, dict) else self.config).get("vocab_size")
        return size if isinstance(size, int) else 0

    @cached_property
    def image_processor(self) -> dict[str, JsonValue]:
        """The image processor's settings, wherever this folder keeps them.

        Raises:
            ConfigError: Neither `preprocessor_config.json` nor an `image_processor` in `processor_config.json`.
        """
        if (self.folder / "preprocessor_config.json").is_file():
            return self._json("preprocessor_config.json")
        if (self.folder / "processor_config.json").is_file():
            nested = self._json("processor_config.json").get("image_processor")
            if isinstance(nested, dict):
                return nested
        raise ConfigError(
            f"model folder {self.folder} has no image processor settings (expected preprocessor_config.json, or "
            "processor_config.json with an image_processor)"
        )

    def _json(self, name: str) -> dict[str, JsonValue]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"model folder {self.folder} has no {name}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON ({error})") from None
        if not isinstance(value, dict):
            raise ConfigError(f"{path} holds a JSON {type(value).__name__}, expected an object")
        return value


class ProcessorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of an image processor that all families have; a family's own add their defaults. Others are ignored."""

    do_resize: object = True
    do_rescale: object = True
    do_normalize: object = True
    do_convert_rgb: object = True
    resample: object = _BICUBIC
    """Pillow's number of the filter."""
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Red, green and blue, of pixels that were multiplied by `rescale_factor`."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)


def read_settings(files: ModelFiles, kind: type[_SettingsT], *, resample: int = _BICUBIC) -> _SettingsT:
    """A model folder's image processor settings, of a processor that does the usual steps.

    The steps are: convert to RGB, resize with the filter `resample`, rescale, normalise.

    Raises:
        ConfigError: A setting of another type, a step that is left out, or another filter.
    """
    try:
        settings = msgspec.convert(files.image_processor, kind, strict=False)  # 14.0 is 14
    except msgspec.ValidationError as error:
        raise ConfigError(f"image processor of {files.folder}: {error}") from None
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if (value := getattr(settings, key)) is not True:
            raise ConfigError(f"image processor of {files.folder} has {key} = {value!r}, expected true")
    if settings.resample != resample:
        raise ConfigError(
            f"image processor of {files.folder} has resample = {settings.resample!r}, expected {resample}"
        )
    return settings


def token_id(files: ModelFiles, key: str) -> int:
    """A token id that `config.json` names.

    Raises:
        ConfigError: `config.json` has no such key, or no number there.
    """
    value = files.config.get(key)
    if not isinstance(value, int):
        raise ConfigError(f"{files.folder / 'config.json'} has no {key}")
    return value
