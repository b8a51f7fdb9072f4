"""Options of the commands that take a config: `@ file.toml` and dotted overrides, and the help that lists them.

Every key of a config class is an option, `--trainer.optim.lr 3e-4`; `-` and `_` in a name mean the same. Later files
win over earlier ones, and options over files. Values are text: pydantic converts them to the type of the key.
"""

import json
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pointillist.config.base import Config, ConfigT, validated
from pointillist.errors import ConfigError
from pointillist.runs.config_files import read_table

_FILE: Final = "@"
_TRUE: Final = ("true", "True", "1")
_FALSE: Final = ("false", "False", "0")
_HELP_COLUMN: Final = 36
_WIDEST: Final = 120
_NARROWEST: Final = 24
_FIRST_SENTENCE: Final = re.compile(r"(?<=[^.])\.\s|; ")
_LONGEST_DEFAULT: Final = 40
_LONGEST_NUMBER: Final = 300

Tree = dict[str, object]
"""Raw config: values and tables by key."""


@dataclass(frozen=True, slots=True)
class Option:
    """A key of a config class."""

    key: str
    """Dotted name, such as `trainer.optim.lr`."""
    field: FieldInfo

    @property
    def kind(self) -> Any:
        """The key's type, without None where it is optional."""
        return _without_none(self.field.annotation)

    @property
    def is_many(self) -> bool:
        """Whether it takes several words."""
        return get_origin(self.kind) in (list, tuple)

    @property
    def is_open(self) -> bool:
        """Whether it is a table with keys of the user's choice."""
        return get_origin(self.kind) is dict

    @property
    def table(self) -> type[Config] | None:
        """The config class of a table of keys; None for a value."""
        return self.kind if isinstance(self.kind, type) and issubclass(self.kind, Config) else None

    @property
    def meaning(self) -> str:
        """Its description; of a table without one, the first line of its class's docstring."""
        return " ".join((self.field.description or (self.table and self.table.__doc__) or "").split("\n\n")[0].split())

    @property
    def flag(self) -> str:
        """How it is written."""
        return f"--{self.key.replace('_', '-')}"


def options_of(config_class: type[Config]) -> Iterator[Option]:
    """All keys of a config class, tables before what they hold.

    A value that several components share is the key at the top alone, which is where it is set.
    """
    shared = {target for targets in config_class.shared.values() for target in targets}
    return (option for option in _walk(config_class, "") if option.key not in shared and not _below(option, shared))


def parse_cli(config_class: type[ConfigT], words: list[str]) -> ConfigT:
    """Builds a config from the words of a command line.

    Args:
        config_class: Class of the config.
        words: `@ file.toml` for a whole config, `--key @ file.toml` for one of its tables, and `--key value`. A flag
            needs no value, and `--no-key` denies it. A list takes the words up to the next option, or is JSON; an
            open table (`env.args`) is JSON, or takes its own keys: `--env.args.size 8`.

    Raises:
        ConfigError: A file that cannot be read, an unknown key, or a value that does not validate.

    Example:
        `parse_cli(RLConfig, ["@", "rl.toml", "--trainer.optim.lr", "3e-4", "--resume"])`
    """
    known = {option.key: option for option in _walk(config_class, "")}
    files: Tree = {}
    overrides: Tree = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == _FILE:
            _merge(files, read_table(_file(word, rest)))
        elif not word.startswith("--"):
            raise ConfigError(f"{word!r} belongs to no option: expected @ FILE, --key value or --key=value")
        else:
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if equals:
                rest.insert(0, value)
            elif rest and rest[0].startswith(_FILE):
                _put(files, key, read_table(_file(word, rest)))
                continue
            _put(overrides, *_override(key, known, rest, has_value=bool(equals)))
    return validated(config_class, _merge(files, overrides))


def help_of(command: str, text: str, config_class: type[Config], key: str = "") -> str:
    """The help of a command: each option once, by table, with its type, meaning and default.

    Args:
        command: What is typed, such as `pointillist rl`.
        text: What the command does.
        config_class: Class of its config.
        key: A key or table to show alone, with whole descriptions; without one there is the first sentence of each.

    Raises:
        ConfigError: There is no such key.
    """
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    usage = f"Usage: {command} [@ FILE.toml] [--KEY VALUE]..."
    more = f"`{command} --help KEY` shows a key or a table with whole descriptions."
    lines = [usage, "", *textwrap.wrap(f"{text} {'' if key else more}", width)]
    tables: dict[str, list[Option]] = {"": []}
    titles: dict[str, str] = {}
    for option in options_of(config_class):
        if option.table is not None:
            titles[option.key] = option.meaning
        elif f"{option.key}.".startswith(f"{key}." if key else ""):
            tables.setdefault(option.key.rpartition(".")[0], []).append(option)
    for table, options in tables.items():
        if options:
            lines += ["", *textwrap.wrap(f"[{table}] {titles[table]}" if table else "Options", width)]
        for option in options:
            lines += _entry(option, width, whole=bool(key))
    if not any(tables.values()):
        raise ConfigError(f"{command} has no key {key!r}; `{command} --help` lists all")
    return "\n".join(lines)


def _walk(config_class: type[Config], prefix: str) -> Iterator[Option]:
    for name, field in config_class.model_fields.items():
        option = Option(prefix + name, field)
        yield option
        if option.table is not None:
            yield from _walk(option.table, f"{option.key}.")


def _below(option: Option, keys: set[str]) -> bool:
    return any(option.key.startswith(f"{key}.") for key in keys)


def _override(key: str, known: Mapping[str, Option], rest: list[str], *, has_value: bool) -> tuple[str, object]:
    """Takes an option's value from the words that follow it; returns its key and the value."""
    option = known.get(key)
    denied = known.get(key.removeprefix("no_")) if option is None and key.startswith("no_") else None
    if denied is not None and (denied.kind is bool or denied.table is not None):
        return denied.key, False if denied.kind is bool else None
    following = has_value or (bool(rest) and not rest[0].startswith("--"))
    if option is None:
        return key, _guessed(rest.pop(0), key, known) if following else True
    if option.kind is bool:
        given = has_value or (bool(rest) and rest[0] in (*_TRUE, *_FALSE))
        return key, rest.pop(0) if given else True
    if option.table is not None:
        if following and rest[0] != "None":
            raise ConfigError(f"--{key} is a table of keys, such as {_first_below(key, known)}; got {rest[0]!r}")
        return key, rest.pop(0) if following else {}
    if option.is_many:
        values = [rest.pop(0)] if has_value else []
        while not has_value and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        return key, _json(key, values[0]) if len(values) == 1 and values[0].startswith("[") else values
    if not following:
        raise ConfigError(f"{option.flag} needs a value")
    value = rest.pop(0)
    return key, _json(key, value) if option.is_open else value


def _file(word: str, rest: list[str]) -> Path:
    """Takes the name of the file that `@`, `@ name` or `@name` stands for."""
    name = "" if word == _FILE else rest.pop(0).removeprefix(_FILE)
    if not name and not rest:
        raise ConfigError("@ must be followed by a config file")
    return Path(name or rest.pop(0))


def _guessed(text: str, key: str, known: Mapping[str, Option]) -> str | int | float | bool:
    """A value of an open table: a boolean or a number where the text is one and the table takes it."""
    above = known.get(key.rpartition(".")[0])
    if above is None or get_args(above.kind) == (str, str) or len(text) > _LONGEST_NUMBER:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"-?(0|[1-9][0-9]*)", text):
        return int(text)
    # A number with leading zeros is text: it is a code, such as "007".
    return float(text) if re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*)?(e[-+]?[0-9]+)?", text, re.IGNORECASE) else text


def _json(key: str, text: str) -> object:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"--{key} {text[:80]!r} is not JSON ({error})") from None


def _put(tree: Tree, key: str, value: object) -> None:
    """Sets a value by its dotted key; a table is merged into what is there."""
    *above, last = key.split(".")
    branch: Tree = {last: value}
    for name in reversed(above):
        branch = {name: branch}
    _merge(tree, branch)


def _merge(below: Tree, above: Mapping[str, object]) -> Tree:
    """Puts one tree over another, table by table, and returns the latter."""
    for key, value in above.items():
        present = below.get(key)
        if isinstance(value, Mapping) and isinstance(present, dict):
            _merge(present, value)
        else:
            below[key] = value
    return below


def _entry(option: Option, width: int, *, whole: bool) -> list[str]:
    """An option in the help."""
    head = f"  {option.flag} {_kind(option.kind)}".rstrip()
    meaning = option.meaning if whole else _FIRST_SENTENCE.split(option.meaning)[0].rstrip(".")
    lines = textwrap.wrap(f"{meaning} {_default(option.field)}".strip(), max(_NARROWEST, width - _HELP_COLUMN))
    if len(head) < _HELP_COLUMN - 1 and lines:
        head, lines = f"{head:<{_HELP_COLUMN}}{lines[0]}", lines[1:]
    return [head, *(" " * _HELP_COLUMN + line for line in lines)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "[required]"
    value = field.get_default(call_default_factory=True)
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = textwrap.shorten(text, _LONGEST_DEFAULT, placeholder=" ...")
    return "" if value is None or value is False or value in ({}, [], "") else f"[{text}]"


def _kind(annotation: Any) -> str:
    """A type in the help: `INT`, `a|b`, `TEXT...`; nothing for a flag."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (list, tuple):
        return f"{_kind(arguments[0])}..."
    names: dict[object, str] = {bool: "", int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}
    return names.get(annotation, "JSON")


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        others = [each for each in get_args(annotation) if each is not type(None)]
        return others[0] if len(others) == 1 else annotation
    return annotation


def _first_below(key: str, known: Mapping[str, Option]) -> str:
    return next((f"--{other}" for other in known if other.startswith(f"{key}.")), "none")
