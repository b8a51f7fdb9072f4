"""TensorBoard: event files by tensorboard's own writer, which needs neither torch nor TensorFlow.

A table of rollouts is text, which cannot show pictures; they are written beside it, each distinct one once, under the
name by which the table mentions it.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pointillist.base.logs import plain
from pointillist.launch.monitors.interface import Row, RowImage

_MARKUP: Final = {ord(character): f"&#{ord(character)};" for character in "\\`*_{}[]()<>#!|~&\"'"}


class TensorboardMonitor:
    """Writes one event file."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        """Opens it.

        Args:
            folder: Folder for `tensorboard --logdir`.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text = event_pb2.Event, summary_pb2.Summary, text_pb
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        self._shown: set[str] = set()

    def log(self, component: str, step: int, metrics: Mapping[str, float]) -> None:
        """As `Monitor.log`."""
        values = [self._summary.Value(tag=f"{component}/{name}", simple_value=each) for name, each in metrics.items()]
        self._write(step, self._summary(value=values))

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        """As `Monitor.rollouts`."""
        self._write(step, self._text("rollouts", _table(rows)))
        for picture in (picture for row in rows for picture in row.images):
            if picture.sha256 not in self._shown:
                self._shown.add(picture.sha256)
                self._write(step, self._summary(value=[self._image(picture)]))

    def close(self) -> None:
        """As `Monitor.close`."""
        self._writer.close()

    def _image(self, picture: RowImage) -> Any:
        data = picture.path.read_bytes()
        image = self._summary.Image(width=picture.width, height=picture.height, colorspace=3, encoded_image_string=data)
        return self._summary.Value(tag=f"pictures/{_short(picture)}", image=image)

    def _write(self, step: int, summary: Any) -> None:
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| rollout | reward | advantage | prompt | completion | pictures |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        advantage = "" if row.advantage is None else f"{row.advantage:.3g}"
        pictures = " ".join(_short(picture) for picture in row.images)
        cells = [row.id, f"{row.reward:.3g}", advantage, _cell(row.prompt), _cell(row.completion), pictures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of a model as one cell: it is no markup, neither HTML nor a picture or link of Markdown's."""
    return plain(text).translate(_MARKUP).replace("\n", "<br>")


def _short(picture: RowImage) -> str:
    return picture.sha256[:12]
