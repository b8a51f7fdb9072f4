"""The type of what JSON can hold, for values that are narrowed before they are used."""

from typing import TypeAlias, Union

JsonValue: TypeAlias = Union[dict[str, "JsonValue"], list["JsonValue"], str, int, float, bool, None]  # noqa: UP007
"""Any value that was read from JSON or will be written as such."""
