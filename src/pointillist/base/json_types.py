"""The types of what JSON can hold."""

from typing import Any, TypeAlias, Union

JsonValue: TypeAlias = Union[dict[str, "JsonValue"], list["JsonValue"], str, int, float, bool, None]  # noqa: UP007
"""Any value that was read from JSON or will be written as such; it is narrowed before it is used."""

JsonObject: TypeAlias = dict[str, Any]
"""An object of JSON; each reader checks what it takes from one."""
