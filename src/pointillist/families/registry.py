"""Which adapter serves a model: found by entry points, so that a third-party family is a `pip install` away."""

from functools import cache
from importlib.metadata import entry_points

from pointillist.errors import ConfigError
from pointillist.families.base import Family
from pointillist.families.model_files import ModelFiles, resolve_model_dir

GROUP = "pointillist.families"


@cache
def _adapters() -> dict[str, type[Family]]:
    return {entry.name: entry.load() for entry in entry_points(group=GROUP)}


def load_family(model_name: str) -> Family:
    """The adapter for a model, built from its folder's configuration.

    Args:
        model_name: A folder or a hub name.

    Raises:
        ConfigError: No such model, or no installed adapter serves its `model_type`.
    """
    files = ModelFiles(resolve_model_dir(model_name))
    for adapter in _adapters().values():
        if files.model_type in adapter.model_types:
            return adapter(files)
    served = sorted(kind for adapter in _adapters().values() for kind in adapter.model_types)
    raise ConfigError(f"no family serves model_type {files.model_type!r} of {model_name!r}; served are {served}")
