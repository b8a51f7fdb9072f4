"""What the orchestrator and the trainer write into a run's folder is what every reader reads."""

import json
from html import escape
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from pointillist.environments.executor import RolloutFailure, RolloutResult
from pointillist.errors import RecordError
from pointillist.images import ImageLimits, ImageStore
from pointillist.launch.monitors.following import rows_of
from pointillist.orchestrator.records import RolloutRecorder
from pointillist.refs import MMImageRef
from pointillist.refs.descriptor import KIND
from pointillist.render import FolderTokenizer
from pointillist.runs.paths import RunPaths
from pointillist.runs.records import (
    BranchRecord,
    ErrorRecord,
    Fault,
    ImageSpan,
    RolloutRecord,
    SampledPiece,
    append_fault,
    decode_fault,
    decode_rollout,
    read_rollouts,
    write_rollouts,
)
from pointillist.sessions import Branch
from pointillist.upkeep.references import run_hashes, run_references
from pointillist.view.queries import Filters, rollouts
from pointillist.view.run import ViewedRun
from pointillist.view.transcript import write_transcript
from pointillist.view.web.app import create_app
from tests.helpers.pictures import encoded, picture

SHA = "ab" * 32
URI = f"file:///images/ab/{SHA}.png"
KEYS = sorted(
    {
        field.name
        for kind in (RolloutRecord, BranchRecord, ImageSpan, SampledPiece, ErrorRecord, Fault)
        for field in msgspec.structs.fields(kind)
    }
)


@pytest.fixture
def recorder(model_dir: Path) -> RolloutRecorder:
    return RolloutRecorder("oranges", FolderTokenizer(model_dir))


@pytest.fixture
def texts(model_dir: Path) -> list[str]:
    """Of the two tokens that the made-up rollout samples."""
    return FolderTokenizer(model_dir).pieces([300, 301])


def _item(uri: str) -> dict[str, Any]:
    return {"kind": KIND, "family": "qwen_vl", "raw_image_uri": uri, "layout_fingerprint": "0" * 32, "payload": {}}


def _result(sha256: str = SHA, uri: str = URI, messages: Any = ()) -> RolloutResult:
    branch = Branch(
        token_ids=[6, 6, 300, 301], loss_mask=[False, False, True, True], logprobs_sampled=[0.0, 0.0, -0.5, -0.25],
        weight_versions=[-1, -1, 3, 4], temperatures=[1.0] * 4,
        images=[MMImageRef(_item(uri), sha256, uri, 0, 2)], messages=list(messages),
    )  # fmt: skip
    return RolloutResult(id="4.2.1", task_id="t", answer="yes", reward=0.5, turns=1, branches=[branch])


def test_a_line_has_the_keys_of_every_run_so_far(recorder: RolloutRecorder, texts: list[str], tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.jsonl", [recorder.record(_result(), outcome="sent", advantage=1.5)])
    assert json.loads((tmp_path / "r.jsonl").read_text()) == {
        "id": "4.2.1", "group": "4.2", "split": "train", "env": "oranges", "task": "t", "answer": "yes", "reward": 0.5,
        "advantage": 1.5, "outcome": "sent", "error": None, "turns": 1, "versions": [3, 4],
        "branches": [{
            "tokens": 4, "sampled": 2, "overlong": False, "messages": [],
            "sampled_pieces": [{"offset": 2, "texts": texts, "logprobs": [-0.5, -0.25]}],
            "images": [{"item": _item(URI), "hash": SHA, "offset": 0, "length": 2}],
        }],
    }  # fmt: skip


def test_what_is_written_is_read_back_equal(recorder: RolloutRecorder, tmp_path: Path) -> None:
    failure = RolloutFailure(kind="ValueError", message="why", permanent=True, traceback="where")
    written = [
        recorder.record(_result(), outcome="sent", advantage=1.5, overlong=frozenset({0})),
        recorder.record(RolloutResult(id="4.2.1", task_id="t", failure=failure)),
        recorder.record(_result(), group="eval.t"),
    ]
    write_rollouts(tmp_path / "r.jsonl", written)
    read = read_rollouts(tmp_path / "r.jsonl")
    assert read == written
    assert [record.outcome for record in read] == ["sent", "failed", "evaluated"]
    assert read[0].branches[0].overlong
    assert read[1].error == ErrorRecord("ValueError", "why", "where")


def test_every_reader_reads_what_the_recorder_writes(
    recorder: RolloutRecorder, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is renamed on one side only is lost in one of these."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = RunPaths(tmp_path / "run")
    stored = ImageStore(paths.output_dir / "assets" / "images", ImageLimits()).put(encoded(picture(40, 40)))
    image = {"type": "image_url", "image_url": {"url": stored.uri}}
    messages = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "".join(texts)}]
    sent = recorder.record(_result(stored.sha256, stored.uri, messages), outcome="sent", advantage=1.5)
    failure = RolloutFailure(kind="OSError", message="why", permanent=True)
    failed = recorder.record(RolloutResult(id="4.2.2", task_id="u", failure=failure))
    write_rollouts(paths.rollouts_file(4), [sent, failed])
    append_fault(paths.faults, Fault("corrupt", 4, "4.2.1.0", stored.sha256, "its bytes differ", stored.uri))

    run = ViewedRun(paths.output_dir, tmp_path / "cache")
    run.index.update()
    rows = {row["id"]: row for row in rollouts(run, Filters())[0]}
    expected = {
        "rollout_group": "4.2", "split": "train", "step": 4, "env": "oranges", "task": "t", "reward": 0.5,
        "advantage": 1.5, "outcome": "sent", "error": None, "turns": 1, "tokens": 4, "sampled": 2, "images": 1,
        "picture": f"{stored.sha256[:2]}/{stored.sha256}.png",
    }  # fmt: skip
    assert {name: rows["4.2.1"][name] for name in expected} == expected
    assert (rows["4.2.2"]["outcome"], rows["4.2.2"]["error"]) == ("failed", "OSError")
    client = TestClient(create_app([run], tmp_path / "cache", None), base_url="http://127.0.0.1")
    page = client.get("/runs/0/rollout?id=4.2.1").text
    for shown in ("<dd>yes</dd>", "quarantined", "no loss: its bytes differ", "tokens 0 to 1 (2)", *map(escape, texts)):
        assert shown in page, shown

    (row,) = rows_of(paths, 4, 8)
    assert (row.id, row.reward, row.advantage, row.images[0].sha256) == ("4.2.1", 0.5, 1.5, stored.sha256)
    assert (row.prompt, row.completion) == ("user: [image]", f"assistant: {''.join(texts)}")
    assert write_transcript(paths.output_dir, "4.2.1", tmp_path / "page.md") == 1
    assert run_hashes(paths) == {stored.sha256}
    ((_, held),) = run_references(paths)
    assert (held.hash, held.length) == (stored.sha256, 2)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD = {"nan": float("nan"), "set": {1, 2}, "bytes": b"x", "object": object(), "deep": _nested(100_000)}


@pytest.mark.parametrize("kind", ODD)
def test_what_json_cannot_hold_costs_a_conversation_only(recorder: RolloutRecorder, tmp_path: Path, kind: str) -> None:
    record = recorder.record(_result(messages=[{"role": "user", "content": ODD[kind]}]))
    write_rollouts(tmp_path / "r.jsonl", [record, recorder.record(_result())])
    first, second = read_rollouts(tmp_path / "r.jsonl")
    assert (first.task, first.reward, first.branches) == ("t", 0.5, [])
    assert first.error is not None
    assert len(second.branches) == 1


def test_unknown_keys_are_ignored_and_missing_ones_have_defaults() -> None:
    record = decode_rollout(b'{"id": "3.1.0", "advantage": null, "colour": {"deep": [1]}}')
    assert (record.group, record.outcome, record.step, record.branches) == ("3.1", "zero_variance", 3, [])
    assert decode_rollout(b'{"id": "3.1.0", "advantage": 0.5}').outcome == "sent"
    line = b'{"kind": "missing", "step": 1, "sample_id": "1.0.0.0", "sha256": "", "message": "", "corrupt": false}'
    assert decode_fault(line).kind == "missing"


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_line_is_a_record_or_a_record_error(line: bytes) -> None:
    for decode in (decode_rollout, decode_fault):
        try:
            decode(line)
        except RecordError:
            pass


@pytest.mark.parametrize("line", ['{"id": "1.0.0"}', '{"id": "1.0.0", "branches": [{}]}', '{"id": "1.0.0", "bran'])
def test_images_are_deleted_on_the_strength_of_whole_records_only(tmp_path: Path, line: str) -> None:
    """The viewer shows a record without branches; where images are deleted, it might be one with another key."""
    paths = RunPaths(tmp_path)
    paths.rollouts_file(1).parent.mkdir(parents=True)
    paths.rollouts_file(1).write_text(line)
    with pytest.raises(RecordError, match="line 1"):
        run_hashes(paths)
