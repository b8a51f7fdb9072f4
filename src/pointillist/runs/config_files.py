"""Configs as TOML files: what the launcher writes, and what each process of a run reads."""

import tomllib
from pathlib import Path

import tomli_w
from pydantic_core import PydanticSerializationError

from pointillist.base.files import write_atomically
from pointillist.config.base import Config, ConfigT, validated
from pointillist.errors import ConfigError


def load_toml(config_class: type[ConfigT], path: Path) -> ConfigT:
    """Builds a config from one TOML file.

    Raises:
        ConfigError: A file that cannot be read, an unknown key, or a value that does not validate.
    """
    return validated(config_class, read_table(path))


def read_table(path: Path) -> dict[str, object]:
    """Reads the tables of a TOML file.

    Raises:
        ConfigError: The file is not there or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read ({error.strerror})") from None
    except (RecursionError, ValueError) as error:  # not UTF-8, nested too deeply, a number of 5,000 digits
        raise ConfigError(f"config {path} cannot be read as TOML ({error})") from None


def recorded_table(path: Path, name: str) -> dict[str, object]:
    """One table of a config that a run has written; empty if the config has no such table.

    A reader of what a run left takes the keys that it needs: a run of another version may have others beside them that
    no component of this version takes.

    Raises:
        ConfigError: As `read_table`.
    """
    table = read_table(path).get(name)
    return table if isinstance(table, dict) else {}


def write_toml(config: Config, path: Path) -> None:
    """Writes a config so that `load_toml` gives it back; keys that are None are left out.

    The file is for its user only: arguments of environments and commands of jobs may hold secrets.

    Raises:
        ConfigError: A value that is not Unicode text, such as a path in another encoding than UTF-8.
    """
    write_atomically(path, dump_toml(config).encode(), private=True)


def dump_toml(config: Config) -> str:
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
