"""Every image reference that a run holds, in its rollouts and in batches that are not trained yet, and its store."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointillist.config import OrchestratorConfig
from pointillist.errors import ConfigError, PointillistError, RefError
from pointillist.images.store import STORED_NAME, local_path
from pointillist.refs.descriptor import parse_descriptor
from pointillist.refs.wire import ImageRef
from pointillist.runs.config_files import load_toml
from pointillist.runs.image_dir import own_image_dir, resolve_image_dir
from pointillist.runs.paths import RunPaths, evals_in, number_of, steps_in
from pointillist.transport.types import decode_rank_batch


def rollout_files(paths: RunPaths) -> list[Path]:
    """Files with rollout records: of the steps, then of the evaluations, ascending."""
    steps = [paths.rollouts_file(step) for step in steps_in(paths.rollouts)]
    evals = [paths.eval_file(version) for version in evals_in(paths.rollouts)]
    return [path for path in (*steps, *evals) if path.is_file()]


def file_of(paths: RunPaths, rollout_id: str) -> Path | None:
    """File in which a rollout's record would be; None for a word that is no rollout's id."""
    prefix, _, _ = rollout_id.partition(".")
    if (step := number_of(prefix)) is not None:
        return paths.rollouts_file(step)
    if prefix.startswith("eval_") and (version := number_of(prefix[5:])) is not None:
        return paths.eval_file(version)
    return None


def image_dir_of(paths: RunPaths) -> Path:
    """The image store of a run: below its folder, or where its config says.

    Raises:
        ConfigError: It is in neither place.
    """
    own = own_image_dir(paths.output_dir)
    if own.is_dir():
        return own
    config = paths.configs / "orchestrator.toml"
    if config.is_file():
        configured = resolve_image_dir(load_toml(OrchestratorConfig, config).multimodal, paths.output_dir, os.environ)
        if configured.is_dir():
            return configured.resolve()
    raise ConfigError(f"{paths.output_dir} has no image store at {own} nor where its config says")


@dataclass(frozen=True, slots=True)
class HeldReference:
    """One image of one sample."""

    where: str
    """File and record."""
    ref: ImageRef
    length: int
    """Placeholder tokens."""


def run_references(paths: RunPaths) -> Iterator[HeldReference]:
    """References of all samples of a run.

    Raises:
        PointillistError: A record that can not be read; nothing may be deleted or proved on the strength of it.
    """
    for path in rollout_files(paths):
        yield from _of_rollouts(path)
    for step in steps_in(paths.rollouts):
        for batch in sorted(paths.rollout_step(step).glob("rank_*.bin")):
            for micro_batch in decode_rank_batch(batch.read_bytes()).micro_batches:
                for image in micro_batch.mm_refs.images if micro_batch.mm_refs else ():
                    yield HeldReference(str(batch), image.image_ref(), image.length)


def run_hashes(paths: RunPaths) -> frozenset[str]:
    """Hashes of all images that a run refers to, in samples, in messages and in its quarantine.

    Raises:
        PointillistError: As `run_references`.
    """
    hashes = {held.ref.hash for held in run_references(paths)}
    for path in rollout_files(paths):
        for number, record in read_records(path):
            conversations = [record.get("messages"), *(branch.get("messages") for branch in record["branches"])]
            try:
                hashes.update(_hashes_in(conversations))
            except RecursionError:
                raise PointillistError(f"{path} line {number} has messages that are nested too deep") from None
    for _, record in read_records(paths.quarantine):
        hashes.add(str(record.get("sha256")))
    return frozenset(hashes)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records of a JSONL file; nothing if it is not there.

    Raises:
        PointillistError: A line that is not a JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                raise PointillistError(f"{path} line {number} is not JSON") from None
            if not isinstance(record, dict):
                raise PointillistError(f"{path} line {number} is not a JSON object")
            yield number, record


def _of_rollouts(path: Path) -> Iterator[HeldReference]:
    for number, record in read_records(path):
        where = f"{path} line {number}"
        try:
            for branch in record["branches"]:
                for image in branch["images"]:
                    ref = ImageRef.of(parse_descriptor(image["item"]), str(image["hash"]))
                    yield HeldReference(where, ref, int(image["length"]))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, RefError) as error:
            raise PointillistError(f"{where} is not a rollout record ({error!r})") from None


def _hashes_in(value: Any) -> Iterator[str]:
    """Hashes of the stored files that image parts name, wherever in a message they stand."""
    if isinstance(value, dict):
        if value.get("type") == "image_url" and isinstance(value.get("image_url"), dict):
            if (name := name_in_store(value["image_url"].get("url"))) is not None:
                yield name[3:67]
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _hashes_in(item)


def name_in_store(uri: Any) -> str | None:
    """`<hh>/<sha256>.<ext>` that a reference ends with, wherever its store was; None for anything else."""
    if not isinstance(uri, str):
        return None
    try:
        path = local_path(uri)
    except (RefError, ValueError):
        return None
    name = f"{path.parent.name}/{path.name}"
    return name if STORED_NAME.fullmatch(name) else None
