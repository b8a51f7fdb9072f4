"""Reading what is new: the metrics that the processes append, and rollouts as rows with their pictures."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pointillist.base.image_limits import ImageLimits
from pointillist.base.json_types import JsonObject
from pointillist.base.jsonl import Follower, is_number, parse_line
from pointillist.errors import RefError
from pointillist.images.decode import read_header
from pointillist.images.store import read_intact
from pointillist.launch.monitors.interface import Row, RowImage
from pointillist.launch.run_dir import METRIC_FILES
from pointillist.runs.image_dir import image_dir_of, limits_of
from pointillist.runs.paths import RunPaths
from pointillist.runs.records import RolloutRecord, read_rollouts
from pointillist.view.rollout import Message, ShownImage, messages_of

_IMAGE = "[image]"


class MetricsFollower:
    """Gives each record of `metrics/*.jsonl` once, as soon as its line is complete.

    When a run goes back to a checkpoint, its files are written anew with what is kept. Then they are read from the
    start, and lines that were given before are not given again; a step that is done again has another line.
    """

    def __init__(self, paths: RunPaths) -> None:
        """Begins behind what is there: an earlier launcher has handed that on."""
        self._files = {Path(name).stem: Follower(paths.metrics / name) for name in METRIC_FILES}
        self._given: dict[str, set[bytes]] = {component: set() for component in self._files}
        """Digests of all lines of each component."""
        for _ in self.new():
            pass

    def new(self) -> Iterator[tuple[str, JsonObject]]:
        """`(component, record)` of every line that was completed since the last call."""
        for component, file in self._files.items():
            given = self._given[component]
            for line in file.new():
                digest = hashlib.blake2b(line, digest_size=16).digest()
                if digest not in given:
                    given.add(digest)
                    step = (record := parse_line(line) or {}).get("step")
                    if type(step) is int and 0 <= step < 2**53:
                        yield component, record


def numbers(record: Mapping[str, object]) -> dict[str, float]:
    """The metrics of a record: its numbers, without the step itself."""
    return {name: float(value) for name, value in record.items() if is_number(value) and name != "step"}


def rows_of(paths: RunPaths, step: int, count: int) -> list[Row]:
    """Some rollouts of a step, spread evenly over all of them; a damaged record is passed over.

    Raises:
        PointillistError: A picture is not there or not what its name says.
        OSError: The records cannot be read.
    """
    # Without those that failed: they have no reward.
    rewarded = [
        (record, record.reward)
        for record in read_rollouts(paths.rollouts_file(step))
        if record.branches and record.reward is not None
    ]
    root, limits = image_dir_of(paths), limits_of(paths)
    chosen = min(count, len(rewarded))
    return [_row(*rewarded[index * len(rewarded) // chosen], root, limits) for index in range(chosen)]


def _row(record: RolloutRecord, reward: float, root: Path, limits: ImageLimits) -> Row:
    """The last branch of a rollout: it has the conversation as it ended."""
    messages = messages_of(record.branches[-1])
    roles = [message.role for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    images = [part for message in messages for part in message.parts if isinstance(part, ShownImage)]
    return Row(
        id=record.id,
        prompt="\n\n".join(map(_text, messages[:first])),
        completion="\n\n".join(map(_text, messages[first:])),
        reward=reward,
        advantage=record.advantage,
        images=tuple(_image(image.name, root, limits) for image in images),
    )


def _text(message: Message) -> str:
    said = "".join(part if isinstance(part, str) else _IMAGE for part in message.parts)
    return f"{message.role}: {said}" + "".join(f"\n{call.name}({call.arguments})" for call in message.calls)


def _image(name: str | None, root: Path, limits: ImageLimits) -> RowImage:
    """An image of the run's own store, after checking that it is the one that its name says."""
    if name is None:
        raise RefError("a message's image is not in the run's store")
    header = read_header(read_intact(root, name, limits), limits)
    return RowImage(Path(name).stem, root / name, header.width, header.height)
