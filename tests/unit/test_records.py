"""What the orchestrator writes of a rollout is what its readers read: key by key."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pointillist.environments.executor import RolloutFailure, RolloutResult
from pointillist.orchestrator.records import RolloutRecorder
from pointillist.refs import MMImageRef
from pointillist.render import FolderTokenizer
from pointillist.sessions import Branch
from pointillist.view.rollout import BranchRecord, ErrorRecord, Piece, RolloutRecord, Span

SHA = "ab" * 32
ITEM = {"raw_image_uri": f"file:///images/ab/{SHA}.png"}


@pytest.fixture
def recorder(model_dir: Path) -> RolloutRecorder:
    return RolloutRecorder("oranges", FolderTokenizer(model_dir))


def _result() -> RolloutResult:
    branch = Branch(
        token_ids=[6, 6, 300, 301], loss_mask=[False, False, True, True], logprobs_sampled=[0.0, 0.0, -0.5, -0.25],
        weight_versions=[-1, -1, 3, 4], temperatures=[1.0] * 4,
        images=[MMImageRef(ITEM, SHA, ITEM["raw_image_uri"], 0, 2)], messages=[{"role": "user", "content": "What?"}],
    )  # fmt: skip
    return RolloutResult(id="4.2.1", task_id="t", reward=0.5, turns=1, branches=[branch])


def _keys(kind: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind)}


def _read(record: dict[str, Any]) -> RolloutRecord:
    return msgspec.json.decode(json.dumps(record), type=RolloutRecord, strict=True)


def test_the_viewer_reads_what_the_recorder_writes(recorder: RolloutRecorder) -> None:
    written = recorder.record(_result(), outcome="sent", advantage=1.5, overlong=frozenset({0}))
    assert written.keys() == _keys(RolloutRecord)
    assert written["branches"][0].keys() == _keys(BranchRecord)
    assert written["branches"][0]["sampled_pieces"][0].keys() == _keys(Piece)
    assert written["branches"][0]["images"][0].keys() == _keys(Span)
    read = _read(written)
    assert (read.id, read.group, read.split, read.env, read.task) == ("4.2.1", "4.2", "train", "oranges", "t")
    assert (read.reward, read.advantage, read.outcome, read.turns) == (0.5, 1.5, "sent", 1)
    (branch,) = read.branches
    assert (branch.tokens, branch.sampled, branch.overlong) == (4, 2, True)
    assert branch.sampled_pieces[0].logprobs == [-0.5, -0.25]
    assert branch.images[0].name == f"ab/{SHA}.png"


def test_the_viewer_reads_a_failure(recorder: RolloutRecorder) -> None:
    failure = RolloutFailure(kind="ValueError", message="why", permanent=True)
    written = recorder.record(RolloutResult(id="4.2.1", task_id="t", failure=failure))
    assert written["error"].keys() == _keys(ErrorRecord)
    read = _read(written)
    assert read.error is not None
    assert (read.outcome, read.reward, read.error.kind, read.error.message) == ("failed", None, "ValueError", "why")
