"""`pointillist store`: look after the images of runs."""

import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track

from pointillist.base.image_limits import STORED_LIMITS, ImageLimits
from pointillist.base.logs import plain
from pointillist.config.base import validated
from pointillist.config.shared import ModelConfig
from pointillist.errors import PointillistError
from pointillist.families import Family, load_family
from pointillist.images.inventory import StoreEntry, check_is_store, collect_garbage, list_store, users_of, verify_store
from pointillist.pixels import RawImageMaterializer
from pointillist.refs import MMImageRef
from pointillist.runs.config_files import recorded_table
from pointillist.runs.image_dir import image_dir_of, limits_of
from pointillist.runs.lock import live_holder
from pointillist.runs.paths import RunPaths
from pointillist.upkeep.archive import ArchiveCounts, export_run, import_run
from pointillist.upkeep.references import run_hashes, run_references

console = Console()
_EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)
_SHOWN = 20
_MARGIN_SECONDS = 3600.0
"""Clocks of machines that share a store may differ by so much."""


@click.group()
def store() -> None:
    """Look after the images of runs."""


@store.command("ls")
@click.argument("folder", type=_EXISTING)
def list_command(folder: Path) -> None:
    """List the files of an image store: size, condition by name, path."""
    total = 0
    for entry in list_store(folder.resolve()):
        total += entry.num_bytes
        click.echo(f"{entry.num_bytes:>12,}  {entry.condition:<12}  {plain(str(entry.path))}")
    click.echo(f"{total:>12,}  bytes in all")


@store.command("verify")
@click.argument("folder", type=_EXISTING, required=False)
@click.option("--run", "run", type=_EXISTING, help="Verify a run's store, and every image that its samples name.")
def verify_command(folder: Path | None, run: Path | None) -> None:
    """Read every file and compare it with its name; exit code 1 if anything is wrong."""
    if (folder is None) == (run is None):
        raise click.UsageError("expected either FOLDER or --run DIR")
    problems: list[str] = []
    if run is not None:
        paths = RunPaths(run.resolve())
        root, limits = image_dir_of(paths), limits_of(paths)
        problems = _verify_files(root, limits) + _verify_references(paths, root, limits)
    elif folder is not None:
        root = folder.resolve()
        problems = _verify_files(root, limits_of(*map(RunPaths, users_of(root))))
    for problem in problems[:_SHOWN]:
        click.echo(plain(problem))
    if len(problems) > _SHOWN:
        click.echo(f"... and {len(problems) - _SHOWN} more")
    click.echo("everything is what it says" if not problems else f"{len(problems)} problems")
    raise SystemExit(1 if problems else 0)


@store.command("gc")
@click.argument("folder", type=_EXISTING)
@click.option("--keep-runs", multiple=True, type=_EXISTING, help="Remove images that none of these runs refers to.")
@click.option("--older-than", default=3600.0, show_default=True, help="Only files at least this many seconds old.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def gc_command(folder: Path, keep_runs: tuple[Path, ...], older_than: float, dry_run: bool) -> None:
    """Remove half-written files and, with --keep-runs, images that no kept run refers to.

    Runs that are going on are always kept: what they have stored since they were started is in no record yet.
    """
    root = folder.resolve()
    check_is_store(root)
    kept = {run.resolve() for run in keep_runs}
    for run in {*kept, *users_of(root)}:
        if (holder := live_holder(run)) is not None:
            kept.add(run)
            older_than = max(older_than, time.time() - holder.since_seconds + _MARGIN_SECONDS)
            click.echo(f"{run} is going on ({holder}): what it has stored is kept")
    keep = frozenset[str]().union(*(run_hashes(RunPaths(run)) for run in kept)) if keep_runs else None
    gone = collect_garbage(root, keep=keep, older_than=older_than, dry_run=dry_run)
    freed = sum(entry.num_bytes for entry in gone)
    click.echo(f"{'would remove' if dry_run else 'removed'} {len(gone)} files, {freed:,} bytes")


@store.command("export")
@click.argument("run", type=_EXISTING)
@click.argument("archive", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--with-checkpoints", is_flag=True, help="Checkpoints, too: whoever resumes from one runs what is in it.")
def export_command(run: Path, archive: Path, with_checkpoints: bool) -> None:
    """Write a run's images and records into one archive."""
    paths = RunPaths(run.resolve())
    _tell("wrote", export_run(paths, image_dir_of(paths), archive, checkpoints=with_checkpoints), archive)


@store.command("import")
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--with-checkpoints", is_flag=True, help="Checkpoints, too, of an author whose programs you would run.")
def import_command(archive: Path, run: Path, with_checkpoints: bool) -> None:
    """Restore an archive into a new run folder, with its references rewritten."""
    _tell("restored", import_run(archive, run, STORED_LIMITS, checkpoints=with_checkpoints), run)


def _verify_files(root: Path, limits: ImageLimits) -> list[str]:
    # Files are counted only for the eye: in a large store it takes long.
    total = sum(1 for _ in list_store(root)) if console.is_terminal else None
    entries = verify_store(root, limits, workers=os.cpu_count() or 1)
    counts: Counter[str] = Counter()
    problems = []
    for entry in track(entries, "reading images", total=total, console=console, disable=not console.is_terminal):
        counts[entry.condition] += 1
        if entry.condition != "good":
            problems.append(_problem(entry))
    click.echo(f"{root}: " + (", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "empty"))
    return problems


def _verify_references(paths: RunPaths, root: Path, limits: ImageLimits) -> list[str]:
    """Every image that a sample names is there and unchanged, and its span fits its layout."""
    model = validated(ModelConfig, recorded_table(paths.configs / "orchestrator.toml", "model"))
    problems, checked = _check_all(run_references(paths), load_family(model.name), root, limits)
    click.echo(f"{paths.output_dir}: {checked} references of samples checked")
    return problems


def _check_all(
    held: Iterable[tuple[str, MMImageRef]], family: Family, root: Path, limits: ImageLimits
) -> tuple[list[str], int]:
    reader = RawImageMaterializer(family, [root], limits, cache_bytes=0)
    verdicts: dict[tuple[str, str, int], PointillistError | None] = {}
    problems = []
    checked = 0
    for where, image in held:
        checked += 1
        key = (image.hash, image.uri, image.length)
        if key not in verdicts:
            verdicts[key] = reader.load([image], keep_errors=True).errors.get(0)
        if verdicts[key] is not None:
            problems.append(f"{where}: {verdicts[key]}")
    return problems, checked


def _problem(entry: StoreEntry) -> str:
    return f"{entry.condition}: {entry.path}"


def _tell(verb: str, counts: ArchiveCounts, what: Path) -> None:
    click.echo(f"{verb} {counts.images} images and {counts.records} records: {what}")
    if counts.checkpoint_files:
        click.echo(
            f"left out {counts.checkpoint_files} files of checkpoints, which are programs; see --with-checkpoints"
        )
