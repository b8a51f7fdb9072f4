"""Every image reference that a run holds, in its rollouts and in batches that are not trained yet, and its store."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointillist.config import OrchestratorConfig, load_toml, own_image_dir, resolve_image_dir
from pointillist.config.run_paths import RunPaths, steps_in
from pointillist.errors import ConfigError, PointillistError, RefError
from pointillist.images.store import STORED_NAME, local_path
from pointillist.refs.descriptor import parse_descriptor
from pointillist.refs.wire import ImageRef
from pointillist.transport.types import decode_rank_batch

ROLLOUTS_FILE = "rollouts.jsonl"


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
    for step in steps_in(paths.rollouts):
        folder = paths.rollout_step(step)
        if (folder / ROLLOUTS_FILE).is_file():
            yield from _of_rollouts(folder / ROLLOUTS_FILE)
        for batch in sorted(folder.glob("rank_*.bin")):
            for micro_batch in decode_rank_batch(batch.read_bytes()).micro_batches:
                for image in micro_batch.mm_refs.images if micro_batch.mm_refs else ():
                    yield HeldReference(str(batch), image.image_ref(), image.length)


def run_hashes(paths: RunPaths) -> frozenset[str]:
    """Hashes of all images that a run refers to, in samples, in messages and in its quarantine.

    Raises:
        PointillistError: As `run_references`.
    """
    hashes = {held.ref.hash for held in run_references(paths)}
    for step in steps_in(paths.rollouts):
        path = paths.rollout_step(step) / ROLLOUTS_FILE
        for _, record in read_records(path):
            hashes.update(_hashes_in(record.get("messages")))
    for _, record in read_records(paths.output_dir / "quarantine.jsonl"):
        hashes.add(str(record.get("sha256")))
    return frozenset(hashes)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records of a JSONL file; nothing if it is not there.

    Raises:
        PointillistError: A line that is not a JSON object.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
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
        except (KeyError, TypeError, ValueError, RefError) as error:
            raise PointillistError(f"{where} is not a rollout record ({error!r})") from None


def _hashes_in(value: Any) -> Iterator[str]:
    """Hashes in the names of stored files, wherever their URLs stand."""
    if isinstance(value, str):
        if value.startswith("file://"):
            path = local_path(value)
            if match := STORED_NAME.fullmatch(f"{path.parent.name}/{path.name}"):
                yield match["sha256"]
    elif isinstance(value, dict):
        for item in value.values():
            yield from _hashes_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _hashes_in(item)
