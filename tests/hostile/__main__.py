"""`make hostile`: 200,000 hostile inputs to real processes, with a table and a report of what they did.

    python -m tests.hostile --model outputs/digits/model-0 --data outputs/digits/data
    python -m tests.hostile ... --target sampling --first 1234 --count 1     # one input of a report again

Inputs are decided by the seed, their target and their number. Ends with 1 if an input got a 500 or no answer, a process
died or fell silent, an honest request failed or took longer than a second, or memory grew.
"""

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pointillist.config import RUN_KEY
from tests.hostile.campaign import GROWTH_MIB, PEAK_MIB, SHARES, SLOWEST_SECONDS, Result, attack
from tests.hostile.generate_inputs import write_odd_weights
from tests.hostile.services import Services

console = Console(width=150)


def counts(total: int) -> dict[str, int]:
    """Inputs of each target."""
    return {target: max(1, total * share // sum(SHARES.values())) for target, share in SHARES.items()}


def run(
    root: Path,
    model: Path,
    data: Path,
    wanted: dict[str, int],
    *,
    seed: int,
    patience: float,
    hold: float,
    first: int = 0,
) -> list[Result]:
    """Attacks each target in turn.

    Args:
        root: A new folder for everything.
        model: Model folder.
        data: Folder of the digits data.
        wanted: Number of inputs of each target.
        seed: Decides the inputs.
        patience: Multiplies every time limit.
        hold: Seconds over which the slowest connections drip.
        first: Number of the first input of each target.
    """
    os.environ.setdefault(RUN_KEY, secrets.token_hex(16))
    services = Services(root, model, data)
    write_odd_weights(services.prompts.paths, model)
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            for target, count in wanted.items():
                task = progress.add_task(target, total=count)
                each = attack(services, target, seed, patience, hold)
                results.append(each.run(first, count, lambda task=task: progress.advance(task)))
                if not console.is_terminal:
                    wrong = results[-1].wrong(patience)
                    console.print(
                        f"{target}: {count} inputs, {results[-1].seconds:g} s{''.join(f'; {text}' for text in wrong)}"
                    )
    finally:
        services.stop()
    return results


def table(results: list[Result]) -> Table:
    """What is told of each target."""
    shown = Table(
        "target", "inputs", "answers", "faults", "deaths", "honest", "slowest s", "failed", "MiB first/last/peak", "s"
    )
    for each in results:
        answers = ", ".join(f"{count} {status}" for status, count in each.statuses.most_common(6))
        memory = "/".join(str(round(each.memory_mib.get(name, 0))) for name in ("first", "last", "peak"))
        shown.add_row(
            each.target, str(each.sent), answers, str(each.num_faults), str(len(each.deaths)), str(each.probes),
            f"{each.slowest:.2f}", str(each.num_probe_faults), memory, f"{each.seconds:.0f}",
        )  # fmt: skip
    return shown


def report(results: list[Result], wrong: list[str], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The JSON of a run."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
        "inputs": sum(each.sent for each in results),
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in psutil.getloadavg()],
        "patience": options.patience,
        "bounds": {"honest_seconds": SLOWEST_SECONDS, "growth_mib": GROWTH_MIB, "peak_mib": PEAK_MIB},
        "wrong": wrong,
        "targets": [vars(each) | {"statuses": dict(each.statuses)} for each in results],
    }


def main() -> int:
    """Attacks, tells, and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--inputs", type=int, default=int(os.environ.get("HOSTILE_INPUTS", "200000")))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience", type=float, default=1.0, help="multiplies time limits, for a machine that is busy"
    )
    parser.add_argument("--hold", type=float, default=20.0, help="seconds over which the slowest connections drip")
    parser.add_argument("--target", action="append", choices=[*SHARES], help="only these")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, help="inputs of each target")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    wanted = {
        name: options.count or count
        for name, count in counts(options.inputs).items()
        if name in (options.target or SHARES)
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as folder:
        results = run(
            Path(folder) / "root", options.model.resolve(), options.data.resolve(), wanted, seed=options.seed,
            patience=options.patience, hold=options.hold, first=options.first,
        )  # fmt: skip
    console.print(table(results))
    for each in results:
        for fault in each.faults:
            console.print(f"{each.target} input {fault['input']}: {fault['what']}", markup=False, highlight=False)
        for death in each.deaths:
            console.print(f"{each.target} died: {death}", markup=False, highlight=False)
        if each.num_probe_faults:
            console.print(f"{each.target} honest requests: {each.probe_faults}", markup=False, highlight=False)
    wrong = [text for each in results for text in each.wrong(options.patience)]
    told = report(results, wrong, options, time.monotonic() - started)
    if options.report is not None:
        options.report.write_text(json.dumps(told, indent=2) + "\n")
    for text in wrong:
        console.print(f"NOT as it should be: {text}", highlight=False)
    console.print(f"{told['inputs']} inputs in {told['seconds']} s, load {told['load_average']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
