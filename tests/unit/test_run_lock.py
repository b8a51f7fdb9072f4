"""One launcher at a time in a run's folder."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pointillist.errors import LaunchError
from pointillist.runs import lock as run_lock
from pointillist.runs.lock import LOCK_FILE, Holder, Job, RunLock, live_holder, refuse_if_held

HOLDER = """
import sys
from pathlib import Path
from pointillist.runs.lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.integration
def test_a_second_launcher_is_told_who_has_the_folder(tmp_path: Path, other: "subprocess.Popen[str]") -> None:
    with pytest.raises(LaunchError, match=rf"is in use by process {other.pid} on \S+ since "):
        RunLock.take(tmp_path)
    with pytest.raises(LaunchError, match="in use"):
        refuse_if_held(tmp_path)
    holder = live_holder(tmp_path)
    assert holder is not None
    assert holder.pid == other.pid
    assert holder.since_seconds > 1e9


@pytest.mark.integration
def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once(
    tmp_path: Path, other: "subprocess.Popen[str]"
) -> None:
    other.kill()
    other.wait()
    assert live_holder(tmp_path) is None
    with RunLock.take(tmp_path) as lock:
        assert lock.lost is None
        holder = live_holder(tmp_path)
        assert holder is not None
        assert holder.pid == os.getpid()
    assert live_holder(tmp_path) is None
    RunLock.take(tmp_path).release()


def _of_another_machine(folder: Path) -> Holder:
    """Leaves a lock that a process of another machine holds, or held."""
    RunLock.take(folder).release()
    said = json.loads((folder / LOCK_FILE).read_bytes())
    holder = replace(Holder(**said), host="elsewhere", machine="another", released=False, job_id="7", job_start=0)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def test_another_machines_lock_is_taken_over_when_it_stands_still(tmp_path: Path) -> None:
    _of_another_machine(tmp_path)
    said: list[str] = []
    RunLock.take(tmp_path, say=said.append, stale_seconds=0.2).release()
    assert "on elsewhere (job 7) since" in said[0]


def test_another_machines_lock_that_moves_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = _of_another_machine(tmp_path)

    def beat(_: float) -> None:
        (tmp_path / LOCK_FILE).write_text(json.dumps(asdict(replace(holder, beat=holder.beat + 1))))

    monkeypatch.setattr(run_lock.time, "sleep", beat)
    with pytest.raises(LaunchError, match=r"in use by process .* on elsewhere"):
        RunLock.take(tmp_path)


def test_a_requeued_job_takes_over_from_its_earlier_start(tmp_path: Path) -> None:
    _of_another_machine(tmp_path)
    RunLock.take(tmp_path, job=Job("7", 1), stale_seconds=1e9).release()  # would wait for ever


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"\0" * 100, b'{"pid": "x"}'])
def test_a_damaged_lock_file_locks_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    RunLock.take(tmp_path).release()


def test_a_folder_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lock = RunLock.take(run, beat_seconds=0.01)
    run.rename(tmp_path / "moved")
    RunLock.take(run).release()
    while lock.lost is None:
        lock._closing.wait(0.01)
    assert "the folder was replaced" in lock.lost or "is gone" in lock.lost
    lock.release()


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="cannot be written"):
        RunLock.take(tmp_path / "file" / "run")
