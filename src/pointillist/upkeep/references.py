"""Every image reference that a run holds, in its rollouts, its faults, and batches that are not trained yet.

Images are deleted and archives are made on the strength of what is found here, so a record that cannot be read whole
is an error, where the viewer would show what there is.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from pointillist.base.json_types import JsonObject
from pointillist.errors import PointillistError, RecordError, RefError
from pointillist.refs.mm_refs import MMImageRef, check_image
from pointillist.runs.paths import RunPaths, steps_in
from pointillist.runs.records import (
    BranchRecord,
    ImageSpan,
    RolloutRecord,
    decode_fault,
    decode_line,
    hashes_in,
    rollout_files,
)
from pointillist.transport.types import decode_rank_batch

T = TypeVar("T")


class _WholeBranch(BranchRecord, frozen=True, kw_only=True):
    """A branch that says which images it has."""

    images: list[ImageSpan]


class _WholeRecord(RolloutRecord, frozen=True, kw_only=True):
    """A record that says which branches it has."""

    branches: list[_WholeBranch]  # type: ignore[assignment]
    messages: list[JsonObject] | None = None
    """Where records of the oldest runs have their one conversation."""


_decoder: Final = msgspec.json.Decoder(_WholeRecord)


def run_references(paths: RunPaths) -> Iterator[tuple[str, MMImageRef]]:
    """Images of all samples of a run, each with the file and record that holds it.

    Raises:
        RecordError: A record cannot be read; nothing may be deleted or proved on the strength of it.
        PointillistError: A batch cannot be read.
    """
    for where, record in _rollouts(paths):
        yield from ((where, image) for image in _images(record, where))
    yield from _untrained(paths)


def run_hashes(paths: RunPaths) -> frozenset[str]:
    """Hashes of all images that a run refers to: in samples, in messages, and of those that the trainer found corrupt.

    Raises:
        PointillistError: As `run_references`.
    """
    hashes = {image.hash for _, image in _untrained(paths)}
    for where, record in _rollouts(paths):
        hashes.update(image.hash for image in _images(record, where))
        try:
            hashes.update(hashes_in([record.messages, *(branch.messages for branch in record.branches)]))
        except RecursionError:
            raise RecordError(f"{where} has messages that are nested too deep") from None
    corrupt = (fault for _, fault in _records(paths.faults, decode_fault) if fault.kind == "corrupt")
    return frozenset(hashes.union(fault.sha256 for fault in corrupt))


def _rollouts(paths: RunPaths) -> Iterator[tuple[str, _WholeRecord]]:
    for path in rollout_files(paths):
        yield from _records(path, lambda line: decode_line(_decoder, line, "a whole rollout's record"))


def _images(record: _WholeRecord, where: str) -> Iterator[MMImageRef]:
    return (_checked(span, where) for branch in record.branches for span in branch.images)


def _untrained(paths: RunPaths) -> Iterator[tuple[str, MMImageRef]]:
    """Images of batches that are not trained yet, each with its file."""
    for step in steps_in(paths.rollouts):
        for batch in sorted(paths.rollout_step(step).glob("rank_*.bin")):
            for micro_batch in decode_rank_batch(batch.read_bytes()).micro_batches:
                for image in micro_batch.mm_refs.images if micro_batch.mm_refs else ():
                    yield str(batch), image


def _records(path: Path, decode: Callable[[bytes], T]) -> Iterator[tuple[str, T]]:
    """Place and record of each line; nothing if the file is not there.

    Raises:
        RecordError: A line is not a record, the last one included, which may be cut off.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                record = decode(line)
            except RecordError as error:
                raise RecordError(f"{where}: {error}") from None
            yield where, record


def _checked(image: ImageSpan, where: str) -> MMImageRef:
    try:
        uri = image.item["raw_image_uri"]
        return check_image(MMImageRef(image.item, image.hash, uri, image.offset, image.length))
    except (KeyError, RefError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PointillistError(f"{where}: {error}") from None
