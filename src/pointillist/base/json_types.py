"""The types of what JSON can hold."""

from typing import TypeAlias, Union

JsonValue: TypeAlias = Union[dict[str, "JsonValue"], list["JsonValue"], str, int, float, bool, None]  # noqa: UP007
"""Any value that was read from JSON or will be written as such."""
JsonObject: TypeAlias = dict[str, JsonValue]
"""A JSON object: string keys, any values."""
