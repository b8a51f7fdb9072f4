"""`pointillist doctor`: what works on this machine, before a run finds out.

Every check gives findings and never raises; a finding that would end a run is a problem, and then the exit code is 1.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pointillist.launch.doctor.finding import Finding
from pointillist.launch.doctor.folder import check_folder
from pointillist.launch.doctor.libraries import check_libraries
from pointillist.launch.doctor.machine import check_machine

_STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "problem": "bold red"}


def examine(run_folder: Path, console: Console) -> int:
    """Checks everything and shows it.

    Args:
        run_folder: Where runs are to lie; need not exist yet, and nothing is left in it.
        console: Where the table goes.

    Returns:
        Exit code: 1 if there is a problem.
    """
    findings = [*check_machine(), *check_libraries(), *check_folder(run_folder)]
    table = Table(title="pointillist doctor")
    for heading in ("what", "", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, f"[{_STYLES[finding.state]}]{finding.state}[/]", escape(finding.text))
    console.print(table, highlight=False)
    problems = sum(finding.state == "problem" for finding in findings)
    console.print(f"{problems} problem(s)" if problems else "no problems", highlight=False)
    return 1 if problems else 0


__all__ = ["Finding", "examine"]
