"""One error tree: whatever exception class Pointillist defines has `PointillistError` above it."""

import ast
import builtins
from pathlib import Path

from pointillist.errors import PointillistError
from tests.conftest import ROOT

SOURCE = ROOT / "src"


def _classes() -> dict[str, tuple[Path, list[str]]]:
    """Each class of the source: its file and the names of its bases."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                found[node.name] = (path, bases)
    return found


def _builtin_exceptions() -> set[str]:
    return {
        name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
    }


def test_every_exception_of_ours_stands_in_the_tree() -> None:
    classes, builtin = _classes(), _builtin_exceptions()

    def roots(name: str) -> set[str]:
        if name == PointillistError.__name__ or name not in classes:
            return {name}
        return set().union(*(roots(base) for base in classes[name][1]))

    outside = [
        f"{path.relative_to(SOURCE)}: {name}"
        for name, (path, bases) in classes.items()
        if bases and name != PointillistError.__name__
        and roots(name) & builtin and PointillistError.__name__ not in roots(name)
    ]  # fmt: skip
    assert outside == []
    assert sum(PointillistError.__name__ in roots(name) for name in classes) > 15
