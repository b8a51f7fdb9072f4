"""The base of every config class: checks that name the key, copies with other values, values that components share."""

import difflib
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pointillist.errors import ConfigError

_SHOWN: Final = 200


class Config(BaseModel):
    """Base of all config classes: unknown keys are errors, values are checked again when they are assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    shared: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Key -> keys below that always hold the same value; it is set once, under the former."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        for key in data:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = f", did you mean {near[0]!r}?" if near else f"; known keys are {sorted(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r} in {cls.__name__}{hint}")
        # TOML has no null: "None" stands for it there and on the command line.
        return {key: None if isinstance(value, str) and value == "None" else value for key, value in data.items()}

    def with_values(self, values: Mapping[str, object]) -> Self:
        """A copy with other values, also of keys that share them; the config itself stays as it is.

        Args:
            values: New values by dotted key; they are not validated again.

        Raises:
            KeyError: A key that the config does not have.

        Example:
            `config.with_values({"server.port": 8000}).server.port == 8000`
        """
        changed = self
        for key, value in values.items():
            for place in (key, *self._sharing(key)):
                changed = changed._with_value(place, value)
        return changed

    def _sharing(self, key: str) -> list[str]:
        """Keys below that hold the same value as a key."""
        return [
            target + key.removeprefix(top)
            for top, targets in self.shared.items()
            for target in targets
            if f"{key}.".startswith(f"{top}.")
        ]

    def _with_value(self, key: str, value: object) -> Self:
        name, _, rest = key.partition(".")
        if name not in type(self).model_fields:
            raise KeyError(f"{type(self).__name__} has no key {name!r}")
        new = getattr(self, name)._with_value(rest, value) if rest else value
        copy: Self = self.model_copy(update={name: new})
        return copy


ConfigT = TypeVar("ConfigT", bound=Config)


def validated(config_class: type[ConfigT], data: Mapping[str, object]) -> ConfigT:
    """Builds a config from raw tables.

    Raises:
        ConfigError: An unknown key or a value that does not validate; the message has a line for each, which begins
            with the dotted key.
    """
    try:
        return config_class.model_validate(data)
    except ValidationError as error:
        faults = [
            _fault(".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, "), each["input"])
            for each in error.errors()
        ]
        raise ConfigError("\n  ".join(["the config cannot work:", *faults])) from None


def _fault(key: str, message: str, value: object) -> str:
    came = "" if value is None or isinstance(value, Mapping | list) else f" (got {str(value)[:_SHOWN]!r})"
    return f"{key}: {message}{came}" if key else message


def share(data: dict[str, object], shared: Mapping[str, tuple[str, ...]]) -> dict[str, object]:
    """Copies values that are set at the top into the components that have the same key and leave it unset.

    Args:
        data: Raw config, before validation.
        shared: Dotted key -> dotted keys in the components that must hold the same value.

    Returns:
        A new dict. Tables are merged key by key.

    Raises:
        ValueError: A component sets another value; the message names both keys.
    """
    result = {key: _copy_tables(value) for key, value in data.items()}
    conflicts = []
    for key, targets in shared.items():
        set_at_top = _get(data, key)
        at_top = {} if set_at_top is None else dict(_leaves(set_at_top, ()))
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


def _leaves(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    else:
        yield path, value


def _get(data: Mapping[str, object], dotted: str) -> object:
    node: object = data
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _dotted(key: str, path: tuple[str, ...]) -> str:
    return ".".join((key, *path))


def _fill(data: dict[str, object], path: tuple[str, ...], value: object) -> tuple[object] | None:
    """Sets a value where none is; returns the value that is there if it is another one."""
    node = data
    for key in path[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            return None  # not a table: validation of the component will say so
        node = child
    present = node.setdefault(path[-1], value)
    return None if str(present) == str(value) else (present,)


def _copy_tables(value: object) -> object:
    return {key: _copy_tables(item) for key, item in value.items()} if isinstance(value, Mapping) else value
