"""The viewer under odd records and odd addresses: never a failed page, and the index goes on."""

import copy
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from starlette.testclient import TestClient

from pointillist.base.jsonl import MAX_LINE_BYTES, read_jsonl
from pointillist.base.logs import set_up_logging
from pointillist.config import OrchestratorConfig
from pointillist.errors import ConfigError, PointillistError
from pointillist.images.store import local_path
from pointillist.launch.monitors.following import MetricsFollower, numbers, rows_of
from pointillist.runs.config_files import load_toml
from pointillist.upkeep.references import run_hashes
from pointillist.view.run import ViewedRun
from pointillist.view.terminal import show_rollout
from pointillist.view.transcript import write_transcript
from pointillist.view.web.app import create_app
from tests.helpers.made_run import MadeRun

PAGES = [
    "/", "/runs/0/rollouts", "/runs/0/rollouts?step=2&sort=longest", "/runs/0/group?id=2.0",
    "/runs/0/rollout?id=2.0.0", "/runs/0/rollout?id=2.0.1", "/runs/0/store", "/runs/0/status",
]  # fmt: skip
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
DEEP = "[" * 3000 + "]" * 3000
HOST = "http://127.0.0.1"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return MadeRun(tmp_path / "run")


def _opened(made: MadeRun, cache: Path) -> tuple[ViewedRun, TestClient]:
    run = ViewedRun(made.paths.output_dir, cache)
    return run, TestClient(create_app([run], cache / "thumbnails", None), base_url=HOST)


def _lines(made: MadeRun) -> dict[str, str]:
    """Damaged lines by what is odd about them."""
    good = json.dumps(made.rollout("2.0.0", "sent"))
    return {
        "deep": f'{good[:-1]}, "extra": {DEEP}}}',
        "deep message": good.replace('"messages": [', f'"messages": [{{"role": "user", "content": {DEEP}}},'),
        "turns over 63 bits": good.replace('"turns": 2', f'"turns": {2**63}'),
        "turns of 5,000 digits": good.replace('"turns": 2', f'"turns": {"9" * 5000}'),
        "tokens": good.replace('"tokens": 40', f'"tokens": {10**30}'),
        "negative": good.replace('"turns": 2', '"turns": -5'),
        "id of 5,000 digits": good.replace('"2.0.0"', f'"{"9" * 5000}.0.0"'),
        "id of 20 digits": good.replace('"2.0.0"', '"99999999999999999999.0.0"'),
        "surrogate": good.replace('"hunt"', r'"\ud800"'),
        "NaN": good.replace('"reward": ', '"reward": NaN, "x": '),
        "infinite": good.replace('"reward": ', '"reward": 1e999, "x": '),
        "no JSON": "{",
        "no object": "null",
        "zeros": "\0\0\0",
        "empty": "",
    }


def test_a_damaged_line_is_left_out_and_counted(made: MadeRun, tmp_path: Path) -> None:
    lines = _lines(made)
    good = json.dumps(made.rollout("2.0.1", "sent"))
    made.paths.rollouts_file(2).write_bytes(
        "".join(f"{line}\n" for line in (*lines.values(), good)).encode() + b'"\xff\xed\xa0\x80"\n'
    )
    run, client = _opened(made, tmp_path / "cache")
    run.index.start()
    deadline = time.monotonic() + 120
    while run.index.progress().percent < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    status = client.get("/runs/0/status").json()
    assert (status["rollouts"], status["damaged"]) == (2 * 16 + 4 + 1, len(lines) + 1)
    assert f"{len(lines) + 1} damaged lines are left out" in client.get("/runs/0/rollouts").text
    assert client.get("/runs/0/rollout?id=2.0.1").status_code == 200
    made.add_step(4)  # the thread goes on
    while run.index.progress().rollouts < 2 * 16 + 4 + 1 + 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.get("/runs/0/rollout?id=4.0.0").status_code == 200
    run.index.stop()


def test_a_line_that_is_too_long_is_read_past(made: MadeRun, tmp_path: Path) -> None:
    good = json.dumps(made.rollout("2.0.1", "sent"))
    with made.paths.rollouts_file(2).open("w") as file:
        file.write('{"id": "2.0.0", "x": "' + "x" * MAX_LINE_BYTES + '"}\n' + good + "\n")
    run, client = _opened(made, tmp_path / "cache")
    run.index.update()
    assert run.index.progress().damaged == 1
    assert client.get("/runs/0/rollout?id=2.0.1").status_code == 200
    run.index.update()
    assert run.index.progress().damaged == 1
    assert [record["id"] for record in read_jsonl(made.paths.rollouts_file(2))] == ["2.0.1"]


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_indexed(made: MadeRun, tmp_path: Path) -> None:
    path = made.paths.rollouts_file(3)
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, and cannot be read
    run, client = _opened(made, tmp_path / "cache")
    run.index.update()
    assert run.index.progress().rollouts == 2 * 16 + 4
    for page in (*PAGES, "/runs/0/rollout?id=3.0.0"):
        assert client.get(page).status_code in (200, 404)


ODD: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, -1e308, 5e-324, float("nan")])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["\ud800", "a\0b", "`" * 9, "\x1b[2J", "<script>", "file:///x/[", "9" * 5000, "../..", "x" * 2000]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in items for place in _places(each, (*path, key)))]


def _put(record: dict[str, Any], place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(record)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


@pytest.mark.slow
@FUZZ
@given(st.data())
def test_no_record_makes_a_reader_fail(made: MadeRun, tmp_path: Path, data: st.DataObject) -> None:
    record = made.rollout("2.0.0", "sent")
    odd = _put(record, data.draw(st.sampled_from(_places(record))), data.draw(ODD))
    made.write(made.paths.rollouts_file(2), [odd, made.rollout("2.0.1", "sent")])
    run, client = _opened(made, tmp_path / "cache")
    run.index.update()
    for page in PAGES:
        assert client.get(page).status_code in (200, 404), page
    assert client.get("/runs/0/rollout?id=2.0.1").status_code == 200
    # What reads the same records: says what is wrong, at most.
    for read in (
        lambda: run_hashes(made.paths),
        lambda: rows_of(made.paths, 2, 4),
        lambda: write_transcript(made.paths.output_dir, "2.0.0", tmp_path / "page.md"),
        lambda: show_rollout(made.paths.output_dir, "2.0.0", "none", Console(file=(tmp_path / "out").open("w"))),
    ):
        try:
            read()
        except PointillistError:
            pass


@pytest.mark.slow
@FUZZ
@given(st.dictionaries(st.sampled_from(["step", "loss", "reward/mean", "time/x", "eval/accuracy"]), ODD))
def test_no_metric_makes_a_reader_fail(made: MadeRun, tmp_path: Path, odd: dict[str, Any]) -> None:
    for component in ("trainer", "orchestrator", "eval"):
        path = made.paths.metrics / f"{component}.jsonl"
        records = [*made.metrics[component], {"step": 9, **odd}]
        path.write_text("".join(json.dumps(each) + "\n" for each in records))
    _, client = _opened(made, tmp_path / "cache")
    assert client.get("/").status_code == 200
    assert client.get("/runs/0/status").status_code == 200
    follower = MetricsFollower(made.paths)
    with (made.paths.metrics / "trainer.jsonl").open("a") as file:
        file.write(f"{json.dumps(odd)}\nnull\n{DEEP}\n" + '{"step": 10, "loss": 1}\n')
    assert [numbers(record) for _, record in follower.new()][-1] == {"loss": 1.0}


@FUZZ
@given(
    st.sampled_from(["/", "/runs/0/rollouts", "/runs/0/group", "/runs/0/rollout", "/runs/0/store", "/runs/0/picture/",
                     "/runs/0/thumbnail/96/", "/static/", "/runs/"]),
    st.text(st.characters(codec="utf-8", exclude_characters="%"), max_size=20)
    | st.sampled_from(["9" * 5000, "%00", "%ed%a0%80", "..%2f..", "a" * 300, "\u0661", "-1"]),
    st.sampled_from(["id", "step", "page", "sort", "reward_min", "reward_max", "env", "error", "task", "fault"]),
    st.text(st.characters(codec="utf-8"), max_size=20)
    | st.sampled_from(["9" * 5000, "\0", "nan", "1e999", "-1", "9" * 18 + ".0", "eval_" + "9" * 99, "\u0661"]),
)  # fmt: skip
@example("/runs/", "9" * 5000 + "/store", "id", "")
@example("/runs/0/thumbnail/", "9" * 5000 + "/x", "id", "")
@example("/static/", "%00", "id", "")
def test_no_address_makes_a_page_fail(
    made: MadeRun, tmp_path: Path, path: str, rest: str, name: str, value: str
) -> None:
    run, client = _opened(made, tmp_path / "cache")
    run.index.update()
    for address in (path, path + (rest if "%" in rest[:1] else quote(rest))):
        assert client.get(address, params={name: value}).status_code < 500
    if rest.startswith("%"):
        assert client.get(f"{path}?{name}={rest}").status_code < 500


@pytest.mark.parametrize("host", ["", "[::1", "x/health?", "127.0.0.1/x", "evil.example", "a@127.0.0.1", "[::1]evil"])
def test_odd_hosts_are_refused(made: MadeRun, tmp_path: Path, host: str) -> None:
    run, client = _opened(made, tmp_path / "cache")
    assert client.get("/", headers={"Host": host}).status_code == 400
    assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.request("GET", "/", content=b"x").status_code == 413
    guarded = TestClient(create_app([run], tmp_path / "cache", "word"), base_url=HOST)
    answer = guarded.get("/?token=word", headers={"Host": host}, follow_redirects=False)
    assert answer.status_code in (303, 400)
    assert answer.headers.get("location", "/").startswith("/")


def test_what_a_model_wrote_closes_no_code_block(made: MadeRun, tmp_path: Path) -> None:
    record = made.rollout("2.0.0", "sent")
    said = "````\n<script>alert(1)</script>\n`````\n# heading \x1b[2J"
    record["branches"][0]["messages"][-1]["content"] = said
    record["task"] = "`a` ![x](http://evil)\n# heading"
    record["branches"][0]["messages"][0]["role"] = "**x** <b>`\n# y"
    made.write(made.paths.rollouts_file(2), [record])
    page = tmp_path / "a page (1).md"
    write_transcript(made.paths.output_dir, "2.0.0", page)
    text = page.read_text()
    assert "\x1b" not in text
    lines = text.splitlines()
    first = lines.index("`" * 6)
    assert lines[first + 1 : lines.index("`" * 6, first + 1)] == plain_lines(said)
    assert not [line for line in lines[:first] if line.startswith("# ") and "Rollout" not in line]
    assert "![picture 0](a%20page%20%281%29/0.png)" in text


def plain_lines(text: str) -> list[str]:
    return text.replace("\x1b", "\u241b").splitlines()


@pytest.mark.parametrize("name", [b"run\xff", b"a\nb \x1b[2J"])
def test_a_folder_with_any_name_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = MadeRun(tmp_path / os.fsdecode(name))
    (local_path(made.images[0].uri).parent / os.fsdecode(name)).write_bytes(b"x")  # beside a stored image
    run, client = _opened(made, tmp_path / "cache")
    run.index.update()
    run.index.update_store()
    for page in (*PAGES, "/runs/0/nothing"):
        assert client.get(page).status_code in (200, 404), page
    assert run.index.progress().store_listed


@pytest.mark.parametrize(
    "text", [f"a = {DEEP}", "\0", f"max_steps = {'9' * 6000}", "model = 5", '[multimodal]\noffload_dir = "$NOT_SET/x"']
)
def test_an_odd_config_leaves_a_run_without_a_store(made: MadeRun, tmp_path: Path, text: str) -> None:
    shutil.rmtree(made.paths.output_dir / "assets")
    made.paths.configs.mkdir(exist_ok=True)
    (made.paths.configs / "orchestrator.toml").write_text(text)
    run, client = _opened(made, tmp_path / "cache")
    run.index.update()
    assert client.get("/").status_code == 200
    assert "no image store" in client.get("/runs/0/store").text
    with pytest.raises(ConfigError):
        load_toml(OrchestratorConfig, made.paths.configs / "orchestrator.toml")


def test_pipes_in_place_of_files_are_not_waited_for(made: MadeRun, tmp_path: Path) -> None:
    names = ("metrics/trainer.jsonl", "faults.jsonl", "rollouts/step_3/rollouts.jsonl", "configs/orchestrator.toml")
    for path in (made.paths.output_dir / name for name in names):
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    run, client = _opened(made, tmp_path / "cache")
    run.index.update()
    for page in PAGES:
        assert client.get(page).status_code == 200, page


def test_a_damaged_line_costs_a_transcript_and_a_table_nothing(made: MadeRun, tmp_path: Path) -> None:
    path = made.paths.rollouts_file(2)
    path.write_text("{broken\n" + path.read_text())
    assert write_transcript(made.paths.output_dir, "2.0.1", tmp_path / "without_suffix") == 2
    assert (tmp_path / "without_suffix_pictures" / "0.png").is_file()
    assert len(rows_of(made.paths, 2, 4)) == 4
    with pytest.raises(PointillistError, match="cannot be written"):
        write_transcript(made.paths.output_dir, "2.0.1", tmp_path / "without_suffix" / "page.md")


def test_a_log_holds_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    kept = logging.root.handlers[:], logging.root.level
    try:
        set_up_logging("info")
        try:
            raise ValueError("\x1b]0;title\x07\x9b2J")
        except ValueError:
            logging.getLogger("pointillist.x").exception("said %s", "\x1b[2J\r\u202e")
    finally:
        logging.root.handlers[:], logging.root.level = kept
    written = capsys.readouterr().err
    assert "said \u241b[2J" in written
    assert "Traceback" in written
    assert set(written) & set("\x1b\x07\x9b\r\u202e") == set()
