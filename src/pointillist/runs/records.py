"""What a run's folder keeps of its rollouts and of the images that its trainer lost, as types.

Every writer encodes its records here and every reader decodes them here, so a key has one name in one place:

| file | a line is | written by |
| --- | --- | --- |
| `rollouts/step_<n>/rollouts.jsonl`, `rollouts/eval_<n>.jsonl` | `RolloutRecord` | the orchestrator |
| `faults.jsonl` | `Fault` | the trainer |

Records of older runs lack what was not recorded yet, and those of newer runs may have more: all fields but the id have
a default, and unknown keys are ignored. A line that holds no record (a disk that failed, a foreign archive) is a
`RecordError`; each reader decides whether it passes over the line or stops.

For example, a record and what a reader sees of it:

```python
record = RolloutRecord(id="3.0.1", task="7", reward=1.0, outcome="sent", advantage=0.5)
write_rollouts(paths.rollouts_file(3), [record])
(read,) = read_rollouts(paths.rollouts_file(3))
assert (read.id, read.step, read.group) == ("3.0.1", 3, "3.0")
```
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from pointillist.base.files import open_regular, write_atomically
from pointillist.base.json_types import JsonObject
from pointillist.base.jsonl import append_line, complete_lines
from pointillist.errors import RecordError, RefError
from pointillist.images.store import STORED_NAME, local_path
from pointillist.runs.paths import RunPaths, evals_in, number_of, steps_in

logger = logging.getLogger(__name__)

Outcome = Literal["sent", "zero_variance", "alone", "failed", "evaluated"]
"""`sent` to the trainer (but for branches that were too long); in a group of `zero_variance`; `alone`, since all others
of its group failed; `failed` for good, and missing in its group; `evaluated` only. A rollout that failed by what the
policy did has an `error` and one of the first three: it counts."""

FaultKind = Literal["missing", "corrupt"]
"""`missing`: the file was not there; `corrupt`: the file or its reference is damaged."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""An integer that JavaScript and SQLite represent exactly."""
_Name = Annotated[str, msgspec.Meta(max_length=1000)]


class ImageSpan(msgspec.Struct, frozen=True):
    """An image and its place in a branch's tokens."""

    hash: _Name
    """sha256 of the stored file, 64 hex digits."""
    offset: _Count
    """First placeholder token in the branch."""
    length: _Count
    """Placeholder tokens."""
    item: JsonObject = {}
    """The image's descriptor; see `pointillist.refs.descriptor`."""

    @property
    def name(self) -> str | None:
        """`<hh>/<sha256>.<ext>` in the store; None if the descriptor names no stored image."""
        return name_in_store(self.item.get("raw_image_uri"))


class SampledPiece(msgspec.Struct, frozen=True):
    """A stretch of tokens that the policy sampled in one branch and in no earlier one."""

    offset: _Count
    """Its first token in the branch."""
    texts: list[str]
    """Text of each token."""
    logprobs: list[float]
    """The sampler's logprob of each token, in nats."""


class BranchRecord(msgspec.Struct, frozen=True):
    """A token stream of a rollout: one training sample.

    What was read is not kept as tokens: the messages and the image spans contain it.
    """

    tokens: _Count = 0
    """All tokens, of prompts, images and answers."""
    sampled: _Count = 0
    """Tokens that the policy sampled."""
    overlong: bool = False
    """Whether the branch was too long to be sent to the trainer."""
    sampled_pieces: list[SampledPiece] = []
    messages: list[JsonObject] = []
    """The conversation; images are `file://` URLs of the store."""
    images: list[ImageSpan] = []


class ErrorRecord(msgspec.Struct, frozen=True):
    """Why a rollout failed."""

    kind: _Name
    """Name of the exception's class."""
    message: str
    traceback: str = ""


class RolloutRecord(msgspec.Struct, frozen=True):
    """A line of `rollouts.jsonl` or `eval_<n>.jsonl`."""

    id: _Name
    """`<step>.<group>.<member>`, or `eval_<version>.<index>`."""
    group: _Name = ""
    """`<step>.<group>`, or `eval.<task>`; by default the id without its last number."""
    split: _Name = "train"
    """`train` or `eval`."""
    env: _Name = ""
    """The environment's id."""
    task: str = ""
    """The task's id."""
    answer: str | None = None
    """The task's expected answer as a text; None if the task has none."""
    reward: float | None = None
    """None if the rollout failed for good."""
    advantage: float | None = None
    """Over its group; None unless the rollout was sent to the trainer."""
    outcome: _Name = ""
    """What the orchestrator did with the rollout; see `Outcome`."""
    error: ErrorRecord | None = None
    turns: _Count = 0
    """Answers that the policy gave."""
    versions: tuple[_Count, _Count] | None = None
    """Oldest and newest weights that sampled in the rollout; None if none did."""
    branches: list[BranchRecord] = []

    def __post_init__(self) -> None:
        if number_of(prefix := _prefix(self.id)) is None and prefix.isdecimal():
            raise ValueError("id has a step that is no number of at most 15 digits")
        if not self.group:
            msgspec.structs.force_setattr(self, "group", self.id.rpartition(".")[0])
        if not self.outcome:
            outcome = "zero_variance" if self.advantage is None else "sent"
            msgspec.structs.force_setattr(self, "outcome", outcome)

    @property
    def step(self) -> int:
        """Optimiser step, or weight version of the evaluation; 0 for an id without one."""
        return number_of(_prefix(self.id)) or 0


class Fault(msgspec.Struct, frozen=True):
    """A line of `faults.jsonl`: an image that the trainer could not use; its sample has trained nothing."""

    kind: str
    """See `FaultKind`."""
    step: int
    """Optimiser step."""
    sample_id: str
    """`<rollout id>.<branch>`."""
    sha256: str
    message: str
    uri: str = ""
    """Of the reference, `file://...`."""


_STRUCTS: Final = (RolloutRecord, BranchRecord, ImageSpan, SampledPiece, ErrorRecord)
RecordT = TypeVar("RecordT")
_rollout_decoder: Final = msgspec.json.Decoder(RolloutRecord)
_fault_decoder: Final = msgspec.json.Decoder(Fault)


def decode_rollout(line: bytes) -> RolloutRecord:
    """The record in a line.

    Raises:
        RecordError: The line is not a rollout's record.
    """
    return decode_line(_rollout_decoder, line, "a rollout's record")


def decode_fault(line: bytes) -> Fault:
    """The fault in a line.

    Raises:
        RecordError: The line is not a fault's record.
    """
    return decode_line(_fault_decoder, line, "a fault's record")


def decode_line(decoder: msgspec.json.Decoder[RecordT], line: bytes, what: str) -> RecordT:
    """The record that a decoder finds in a line.

    Args:
        decoder: Of the record's type.
        line: One line of a file.
        what: The record's name, for the error.

    Raises:
        RecordError: The line is not such a record.
    """
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
        raise RecordError(f"not {what} ({error})") from None


def write_rollouts(path: Path, records: Iterable[RolloutRecord]) -> None:
    """Writes a file of records, whole or not at all.

    A conversation into which an environment has put what JSON cannot hold is left out of its record, with the reason.
    """
    write_atomically(path, b"".join(map(_encode, records)))


def append_fault(path: Path, fault: Fault) -> None:
    """Adds a line to a file of faults."""
    append_line(path, msgspec.json.encode(fault))


def read_rollouts(path: Path) -> list[RolloutRecord]:
    """Records of a file up to its last complete line; none if the file is not there.

    A damaged line costs itself only: it is passed over, with a warning.

    Raises:
        OSError: The file cannot be read.
    """
    if not path.is_file():
        return []
    records = []
    with open_regular(path) as file:
        for number, line in enumerate(complete_lines(file), start=1):
            try:
                records.append(decode_rollout(line))
            except RecordError as error:
                logger.warning("%s: line %d is passed over: %s", path, number, error)
    return records


def rollout_files(paths: RunPaths) -> list[Path]:
    """Files with rollout records: of the steps, then of the evaluations, ascending."""
    steps = [paths.rollouts_file(step) for step in steps_in(paths.rollouts)]
    evals = [paths.eval_file(version) for version in evals_in(paths.rollouts)]
    return [path for path in (*steps, *evals) if path.is_file()]


def file_of(paths: RunPaths, rollout_id: str) -> Path | None:
    """The file in which a rollout's record would be; None for a word that is no rollout's id."""
    prefix, _, _ = rollout_id.partition(".")
    if (step := number_of(prefix)) is not None:
        return paths.rollouts_file(step)
    if prefix.startswith("eval_") and (version := number_of(prefix[5:])) is not None:
        return paths.eval_file(version)
    return None


def name_in_store(uri: object) -> str | None:
    """`<hh>/<sha256>.<ext>` that a reference ends with, wherever its store was; None for anything else."""
    if not isinstance(uri, str):
        return None
    try:
        path = local_path(uri)
    except (RefError, ValueError):
        return None
    name = f"{path.parent.name}/{path.name}"
    return name if STORED_NAME.fullmatch(name) else None


def hashes_in(value: object) -> Iterator[str]:
    """Hashes of the stored files that image parts name, wherever in a message they stand.

    Raises:
        RecursionError: The value is nested too deep.
    """
    if isinstance(value, dict):
        if value.get("type") == "image_url" and isinstance(value.get("image_url"), dict):
            if (name := name_in_store(value["image_url"].get("url"))) is not None:
                yield Path(name).stem
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from hashes_in(item)


def _encode(record: RolloutRecord) -> bytes:
    """A line of UTF-8. Not by msgspec, which would write NaN as null and refuse half a surrogate pair."""
    try:
        text = _dumps(record)
    except (TypeError, ValueError, RecursionError) as error:
        damage = record.error or ErrorRecord(type(error).__name__, str(error))
        text = _dumps(msgspec.structs.replace(record, branches=[], error=damage))
    return text.encode("utf-8", errors="replace") + b"\n"


def _dumps(record: RolloutRecord) -> str:
    return json.dumps(record, default=_fields, ensure_ascii=False, allow_nan=False)


def _fields(value: object) -> JsonObject:
    if isinstance(value, _STRUCTS):
        return msgspec.structs.asdict(value)
    raise TypeError(f"a {type(value).__name__} is no value of JSON")


def _prefix(rollout_id: str) -> str:
    return rollout_id.partition(".")[0].removeprefix("eval_")
