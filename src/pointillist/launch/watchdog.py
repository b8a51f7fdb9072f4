"""Notices a process that lives and does nothing: reads the heartbeats and says which phase stands still since when.

A phase that only waits for another process is not to blame while the other one moves. If all processes wait for each
other, none of them will ever move again, and all are. Waiting for the inference servers is neither: the client's own
limits and the servers' health checks end it.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointillist.runs.heartbeat import SERVERS, Beat, read_beats

_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Stall:
    """A process that stands still."""

    process: str
    """The launcher's name for it."""
    text: str
    """A verb phrase: which phase stands still since when, and what the others do."""


@dataclass(slots=True)
class _Seen:
    """What was last seen of a process, and when that was new, in seconds of `time.monotonic`."""

    beat: Beat
    moved: float
    beaten: float
    reported: bool = False


class Watchdog:
    """Compares what it sees with what it saw."""

    def __init__(self, folder: Path, timeout: float) -> None:
        """Begins to watch.

        Args:
            folder: The run's `state` folder.
            timeout: Seconds that a phase may stand still.
        """
        self._folder = folder
        self._timeout = timeout
        self._seen: dict[str, _Seen] = {}
        self._silent: set[tuple[str, float]] = set()
        """Starts that were reported."""
        self._looked = 0.0

    def look(self, started: Mapping[str, float], now: float | None = None) -> list[Stall]:
        """Processes that stand still, each said once until it moves; cheap to call often.

        Args:
            started: When each process that is to be judged was started, in seconds of `time.monotonic`.
            now: That time now.
        """
        now = time.monotonic() if now is None else now
        if now - self._looked < min(_LOOK_SECONDS, self._timeout / 4):
            return []
        self._looked = now
        self._update(now)
        silent = {name for name in started if not any(seen.beat.process == name for seen in self._seen.values())}
        stalls = [
            Stall(name, f"has given no sign of life in the {now - started[name]:.0f} s since it was started")
            for name in sorted(silent)
            if now - started[name] > self._timeout and (name, started[name]) not in self._silent
        ]
        self._silent.update((stall.process, started[stall.process]) for stall in stalls)
        working = [seen for seen in self._seen.values() if not seen.beat.done]
        for seen in self._to_blame(working, now, anyone_starts=bool(silent)):
            if seen.beat.process in started and not seen.reported:
                seen.reported = True
                others = [self._described(each, now) for each in self._seen.values() if each is not seen]
                stalls.append(Stall(seen.beat.process, "; ".join([self._verdict(seen, now), *others])))
        return stalls

    def _update(self, now: float) -> None:
        beats = {beat.name: beat for beat in read_beats(self._folder)}
        self._seen = {name: seen for name, seen in self._seen.items() if name in beats}
        for name, beat in beats.items():
            seen = self._seen.get(name)
            if seen is None or (seen.beat.pid, seen.beat.process_start) != (beat.pid, beat.process_start):
                self._seen[name] = _Seen(beat, now, now)
                continue
            if beat.moves != seen.beat.moves or beat.done:
                seen.moved, seen.reported = now, False
            if beat.beats != seen.beat.beats:
                seen.beaten = now
            seen.beat = beat

    def _to_blame(self, working: list[_Seen], now: float, *, anyone_starts: bool) -> Iterable[_Seen]:
        late = [seen for seen in working if now - seen.moved > self._timeout]
        guilty = [seen for seen in late if seen.beat.waits_for is None or now - seen.beaten > self._timeout]
        if guilty or anyone_starts:
            return guilty
        waiting = [seen for seen in working if seen.beat.waits_for not in (None, SERVERS)]
        return late if len(late) == len(working) == len(waiting) else []

    def _verdict(self, seen: _Seen, now: float) -> str:
        phase = f"{seen.beat.described()}, since {seen.beat.since}"
        if now - seen.beaten > self._timeout:
            silent = now - seen.beaten
            return f"has given no sign of life for {silent:.0f} s (stopped, or stuck in foreign code) in phase {phase}"
        rank = f" on rank {seen.beat.rank}" if seen.beat.rank else ""
        return f"has stood still for {now - seen.moved:.0f} s{rank} in phase {phase}"

    def _described(self, seen: _Seen, now: float) -> str:
        beat = seen.beat
        if beat.done:
            return f"{beat.name} has finished its work"
        return f"{beat.name} is in phase {beat.described()} since {beat.since}, moved {now - seen.moved:.0f} s ago"
