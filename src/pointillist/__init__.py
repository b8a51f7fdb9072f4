"""Pointillist: reinforcement learning of vision-language models in which images travel as references."""

from pointillist.errors import PointillistError

__version__ = "0.1.0"

__all__ = ["PointillistError", "__version__"]
