"""A process that lives and does nothing is noticed, with its phase; one that waits for another is not blamed for it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pointillist.launch.watchdog import Watchdog
from pointillist.runs import heartbeat
from pointillist.runs.heartbeat import SERVERS, Beat, beating, enter, progress, read_beats

BASE = Beat(process="", rank=0, host="h", machine="m", namespace="n", pid=1, process_start="s", since="then")
BATCH, WEIGHTS = "a batch of the orchestrator", "weights of the trainer"


class Run:
    """The state folder of a run whose processes say what the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.beats: dict[str, Beat] = {}

    def say(self, process: str, *, beats: bool = True, **changes: Any) -> None:
        beat = self.beats.get(process, replace(BASE, process=process))
        self.beats[process] = replace(beat, beats=beat.beats + beats, **changes)
        (self.folder / f"{process}.json").write_text(json.dumps(asdict(self.beats[process])))

    def beat(self) -> None:
        for process in self.beats:
            self.say(process)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def _stalls(run: Run, dog: Watchdog, until: float, **moving: Any) -> dict[str, str]:
    """What the watchdog says when it looks every second up to a time, while all processes beat."""
    found: dict[str, str] = {}
    for second in range(1, int(until) + 1):
        run.beat()
        for process in moving:
            run.say(process, moves=second)
        for stall in dog.look({"trainer": 0.0, "orchestrator": 0.0}, now=float(second)):
            found[stall.process] = stall.text
    return found


def test_a_phase_that_stands_still_is_named(run: Run) -> None:
    run.say("trainer", phase="forward_backward", step=3)
    run.say("orchestrator", phase="wait_for_weights", waits_for=WEIGHTS)
    found = _stalls(run, Watchdog(run.folder, 10), 12)
    assert found.keys() == {"trainer"}  # the orchestrator only waits for it
    assert "has stood still for" in found["trainer"]
    assert "in phase 'forward_backward' of step 3, since then" in found["trainer"]
    assert f"orchestrator is in phase 'wait_for_weights', waiting for {WEIGHTS}" in found["trainer"]


def test_nothing_is_said_while_the_other_moves(run: Run) -> None:
    run.say("trainer", phase="wait_for_batch", waits_for=BATCH)
    run.say("orchestrator", phase="rollouts")
    assert _stalls(run, Watchdog(run.folder, 10), 40, orchestrator=True) == {}


def test_two_that_wait_for_each_other_are_both_to_blame(run: Run) -> None:
    run.say("trainer", phase="wait_for_batch", waits_for=BATCH)
    run.say("orchestrator", phase="wait_for_weights", waits_for=WEIGHTS)
    assert _stalls(run, Watchdog(run.folder, 10), 12).keys() == {"trainer", "orchestrator"}


def test_waiting_for_servers_is_nobodys_fault(run: Run) -> None:
    run.say("trainer", phase="wait_for_batch", waits_for=BATCH)
    run.say("orchestrator", phase="wait_for_servers", waits_for=SERVERS)
    assert _stalls(run, Watchdog(run.folder, 10), 40) == {}


def test_a_stopped_process_gives_no_sign_of_life(run: Run) -> None:
    dog = Watchdog(run.folder, 10)
    run.say("trainer", phase="wait_for_batch", waits_for=BATCH)
    run.say("orchestrator", phase="rollouts")
    found: dict[str, str] = {}
    for second in range(1, 15):
        run.say("orchestrator", moves=second)  # the trainer's file does not change: it is stopped, or its disk is
        found |= {s.process: s.text for s in dog.look({"trainer": 0.0, "orchestrator": 0.0}, now=float(second))}
    assert found.keys() == {"trainer"}
    assert "has given no sign of life" in found["trainer"]


def test_one_that_never_says_anything_is_noticed_once(run: Run) -> None:
    dog = Watchdog(run.folder, 10)
    found = [stall for second in range(1, 30) for stall in dog.look({"trainer": 0.0}, now=float(second))]
    assert [stall.process for stall in found] == ["trainer"]
    assert "since it was started" in found[0].text


def test_a_process_that_has_finished_may_rest(run: Run) -> None:
    run.say("orchestrator", phase="done", done=True)
    run.say("trainer", phase="export")
    assert _stalls(run, Watchdog(run.folder, 10), 40, trainer=True) == {}


@pytest.mark.parametrize("junk", [b"", b"null", b"{", b'{"process": 5}', b"[" * 5000])
def test_damaged_states_are_left_out(run: Run, junk: bytes) -> None:
    (run.folder / "x.json").write_bytes(junk)
    run.say("trainer")
    assert [beat.process for beat in read_beats(run.folder)] == ["trainer"]


def test_a_heartbeat_says_phases_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    progress()  # outside of a heartbeat: nothing

    def seen() -> Beat:
        (beat,) = read_beats(tmp_path)
        return beat

    with beating(tmp_path, "trainer"):
        enter("rollouts", step=2, waits_for="x")
        while seen().phase != "rollouts":
            pass
        moves = seen().moves
        progress()
        while seen().moves == moves:
            pass
        assert not seen().done
        assert seen().is_here
    assert seen().done
    with pytest.raises(ValueError, match="why"), beating(tmp_path, "trainer"):
        raise ValueError("why")
    assert not seen().done
