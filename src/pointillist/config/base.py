"""The base of every config class: TOML files, dotted overrides, and errors that name the key.

Parsing is `prime-pydantic-config`, the convention of the ecosystem (`@ file.toml`, `--trainer.optim.lr 3e-4`). What
is added here: an unknown key is an error with the nearest known name, wherever it stands.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import tomli_w
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_config import BaseConfig, ConfigFileError, cli
from pydantic_core import PydanticSerializationError

from pointillist.base.files import write_atomically
from pointillist.errors import ConfigError


class Config(BaseConfig):
    """Base of all config classes: unknown keys are errors, values are checked again when they are assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                    hint = f", did you mean {near[0]!r}?" if near else f"; known keys are {sorted(cls.model_fields)}"
                    raise ValueError(f"unknown key {key!r} in {cls.__name__}{hint}")
        return data

    def with_values(self, values: Mapping[str, object]) -> Self:
        """A copy with other values; the config itself stays as it is.

        Args:
            values: New values by dotted key; they are not validated again.

        Raises:
            KeyError: A key that the config does not have.

        Example:
            `config.with_values({"server.port": 8000}).server.port == 8000`
        """
        changed = self
        for key, value in values.items():
            changed = changed._with_value(key, value)
        return changed

    def _with_value(self, key: str, value: object) -> Self:
        name, _, rest = key.partition(".")
        if name not in type(self).model_fields:
            raise KeyError(f"{type(self).__name__} has no key {name!r}")
        new = getattr(self, name)._with_value(rest, value) if rest else value
        copy: Self = self.model_copy(update={name: new})
        return copy


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_cli(config_class: type[ConfigT], arguments: list[str]) -> ConfigT:
    """Builds a config from command line arguments: `@ file.toml` and dotted `--key value` overrides.

    Raises:
        ConfigError: A file that can not be read, an unknown key, or a value that does not validate.
        SystemExit: After `--help` was printed.
    """
    try:
        return cast(ConfigT, cli(config_class, args=arguments))
    except ConfigFileError as error:
        raise ConfigError(str(error).strip()) from None
    except (RecursionError, ValueError) as error:  # the TOML parser's: nested too deeply, a number of 5,000 digits
        raise ConfigError(f"config cannot be read ({error})") from None


def load_toml(config_class: type[ConfigT], path: Path) -> ConfigT:
    """Builds a config from one TOML file.

    Raises:
        ConfigError: As `parse_cli`.
    """
    return parse_cli(config_class, ["@", str(path)])


def write_toml(config: BaseModel, path: Path) -> None:
    """Writes a config so that `load_toml` gives it back; keys that are None are left out.

    The file is for its user only: arguments of environments and commands of jobs may hold secrets.

    Raises:
        ConfigError: A value that is not Unicode text, such as a path in another encoding than UTF-8.
    """
    write_atomically(path, dump_toml(config).encode(), private=True)


def dump_toml(config: BaseModel) -> str:
    """A config as TOML; keys that are None are left out.

    Raises:
        ConfigError: As `write_toml`.
    """
    try:
        text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
        text.encode()
    except (UnicodeError, PydanticSerializationError):
        raise ConfigError("a value of the config is not UTF-8 text, such as a path in another encoding") from None
    return text


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        ConfigError: Missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} can not be read as TOML ({error})") from None


def share(data: dict[str, Any], shared: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Copies values that are set at the top into the components that have the same key and leave it unset.

    Args:
        data: Raw config, before validation.
        shared: Top-level key -> dotted keys in the components that must hold the same value.

    Returns:
        A new dict. Tables are merged key by key.

    Raises:
        ValueError: A component sets another value; the message names both keys.
    """
    result: dict[str, Any] = _copy_tables(data)
    conflicts = []
    for key, targets in shared.items():
        at_top = dict(_leaves(data[key], ())) if key in data else {}
        for target in targets:
            for path, value in _leaves(_get(data, target), ()):
                if path and path not in at_top:
                    conflicts.append(f"{_dotted(key, path)} is not set, {_dotted(target, path)} = {value!r}")
            for path, value in at_top.items():
                conflict = _fill(result, (*target.split("."), *path), value)
                if conflict is not None:
                    conflicts.append(
                        f"{_dotted(key, path)} = {value!r} contradicts {_dotted(target, path)} = {conflict[0]!r}"
                    )
    if conflicts:
        raise ValueError("set it once, at the top: " + "; ".join(conflicts))
    return result


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    else:
        yield path, value


def _get(data: Mapping[str, Any], dotted: str) -> Any:
    node: Any = data
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _dotted(key: str, path: tuple[str, ...]) -> str:
    return ".".join((key, *path))


def _fill(data: dict[str, Any], path: tuple[str, ...], value: Any) -> tuple[Any] | None:
    """Sets a value where none is; returns the value that is there if it is another one."""
    node = data
    for key in path[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            return None  # not a table: validation of the component will say so
        node = child
    present = node.setdefault(path[-1], value)
    return None if str(present) == str(value) else (present,)


def _copy_tables(value: Any) -> Any:
    return {key: _copy_tables(item) for key, item in value.items()} if isinstance(value, Mapping) else value
