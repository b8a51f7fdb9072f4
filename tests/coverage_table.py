"""`make coverage`: what part of each room the last `make test` has run, and whether all of it is above the floor.

Lines count that ran in the tests' own process; what only child processes run (commands, whole runs) does not.
"""

import sys
from collections import defaultdict

import coverage
from rich.console import Console
from rich.table import Table

from tests.mutants import ROOT, SOURCE

FLOOR = 82.0
"""Percent of all lines; the unit tests alone run 85.2%."""


def main() -> int:
    """Prints the table; returns 1 below the floor."""
    data = coverage.Coverage(data_file=str(ROOT / ".coverage"), config_file=str(ROOT / "pyproject.toml"))
    data.load()
    lines, missed = defaultdict[str, int](int), defaultdict[str, int](int)
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        _, statements, _, absent, _ = data.analysis2(str(path))
        lines[room] += len(statements)
        missed[room] += len(absent)
    table = Table("room", "lines", "run", title="run in the tests' own process")
    for room, count in lines.items():
        table.add_row(room, str(count), _percent(count, missed[room]))
    total, absent_in_all = sum(lines.values()), sum(missed.values())
    table.add_section()
    table.add_row("total", str(total), _percent(total, absent_in_all))
    Console(width=60).print(table)
    part = 100 * (total - absent_in_all) / total
    if part < FLOOR:
        print(f"coverage is {part:.1f}%, expected {FLOOR:g}% or more", file=sys.stderr)
        return 1
    return 0


def _percent(lines: int, missed: int) -> str:
    return f"{100 * (lines - missed) / lines:.1f}%" if lines else "-"


if __name__ == "__main__":
    sys.exit(main())
