"""The viewer without a browser: its index, what it tells of a rollout, who may look, and the terminal."""

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from starlette.testclient import TestClient

from pointillist.base.image_limits import STORED_LIMITS
from pointillist.base.jsonl import append_jsonl
from pointillist.cli import cli
from pointillist.errors import ConfigError, MissingImageError, PointillistError
from pointillist.images import ImageStore
from pointillist.images.store import local_path
from pointillist.runs.records import BranchRecord, RolloutRecord, SampledPiece
from pointillist.view.index import RunIndex, is_intact
from pointillist.view.metrics import MetricsFile
from pointillist.view.queries import Filters, best_of_last_step, group, neighbours, rollouts, store_facts
from pointillist.view.rollout import ShownImage, conversation
from pointillist.view.run import ViewedRun
from pointillist.view.serve import _token, open_runs
from pointillist.view.terminal import plain, protocol, show_rollout
from pointillist.view.terminal_images import half_blocks, kitty, sixel
from pointillist.view.transcript import write_transcript
from pointillist.view.web.app import create_app
from pointillist.view.web.charts import Line, line_chart
from tests.helpers.made_run import HOSTILE, LINK, MadeRun
from tests.helpers.pictures import encoded, picture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pointillist" / "view"


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run")


@pytest.fixture
def run(made: MadeRun, cache: Path) -> ViewedRun:
    viewed = ViewedRun(made.paths.output_dir, cache)
    viewed.index.update()
    viewed.index.update_store()
    return viewed


@pytest.fixture
def client(run: ViewedRun, cache: Path) -> TestClient:
    return TestClient(create_app([run], cache / "thumbnails", None), base_url="http://127.0.0.1")


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_every_rollout_is_found_and_read_by_seeking(run: ViewedRun, made: MadeRun) -> None:
    progress = run.index.progress()
    assert (progress.rollouts, progress.percent) == (3 * 16 + 4, 100)
    for path in (made.paths.rollouts_file(2), made.paths.eval_file(0)):
        for line in path.read_text().splitlines():
            assert run.index.record(json.loads(line)["id"]) == msgspec.json.decode(line, type=RolloutRecord)
    assert run.index.record("9.9.9") is None
    assert run.index.record("../../etc") is None


def test_the_index_follows_what_the_run_does(run: ViewedRun, made: MadeRun) -> None:
    path = made.paths.rollouts_file(3)
    half = json.dumps(made.rollout("3.4.0", "sent"))
    with path.open("a") as file:
        file.write(half[:50])
    run.index.update()
    assert run.index.progress().rollouts == 52
    assert run.index.record("3.4.0") is None
    with path.open("a") as file:
        file.write(half[50:] + "\nnot JSON\n" + json.dumps(made.rollout("3.4.1", "sent")) + "\n")
    assert run.index.record("3.4.0") is not None  # one that is asked for is not waited for
    assert run.index.record("3.4.1") is not None
    made.paths.rollouts_file(2).write_text(json.dumps(made.rollout("2.0.0", "sent")) + "\n")  # in place, shorter
    shutil.rmtree(made.paths.rollout_step(1))  # rewound
    run.index.update()
    rows, total = rollouts(run, Filters(step="2"))
    assert (total, rows[0]["id"]) == (1, "2.0.0")
    assert rollouts(run, Filters(step="1"))[1] == 0
    longer = [made.rollout(f"2.9.{member}", "sent") for member in range(9)]
    time.sleep(0.01)
    path = made.paths.rollouts_file(2)
    path.write_text("".join(json.dumps(record) + "\n" for record in longer))  # in place, longer: not an append
    run.index.update()
    assert run.index.record("2.0.0") is None
    assert rollouts(run, Filters(step="2"))[1] == 9


def test_nothing_is_written_to_a_run(made: MadeRun, cache: Path) -> None:
    before = _state(made.paths.output_dir)
    run = ViewedRun(made.paths.output_dir, cache)
    run.index.start()
    client = TestClient(create_app([run], cache / "thumbnails", None), base_url="http://127.0.0.1")
    for page in ("/", "/runs/0/rollouts", "/runs/0/rollout?id=1.0.0", "/runs/0/group?id=1.0", "/runs/0/store"):
        assert client.get(page).status_code == 200
    run.index.stop()
    assert _state(made.paths.output_dir) == before
    again = RunIndex(run.paths, run.image_dir, run.limits, cache)  # it is kept
    assert again.progress().rollouts > 0


def test_a_broken_index_is_made_anew(made: MadeRun, cache: Path) -> None:
    ViewedRun(made.paths.output_dir, cache).index.update()
    (kept,) = cache.glob("*.sqlite")
    kept.write_bytes(b"not a database" * 100)
    run = ViewedRun(made.paths.output_dir, cache)
    run.index.update()
    assert run.index.progress().rollouts == 52


def test_two_viewers_share_an_index(made: MadeRun, cache: Path) -> None:
    """As two processes would: each with its own connections and locks."""
    runs = [ViewedRun(made.paths.output_dir, cache) for _ in range(2)]
    for run in runs:
        run.index.start()
    made.add_step(4)
    for run in runs:
        run.index.update()
        run.index.stop()
        assert run.index.progress().rollouts == 68


def test_filters_and_orders(run: ViewedRun, made: MadeRun) -> None:
    assert rollouts(run, Filters(outcome="failed"))[1] == 3
    assert rollouts(run, Filters(error="ValueError", step="2"))[1] == 1
    assert rollouts(run, Filters(outcome="zero_variance"))[1] == 11
    assert rollouts(run, Filters(split="eval"))[1] == 4
    assert {row["reward"] for row in rollouts(run, Filters(reward_min="0.5"))[0]} == {1.0}
    highest = [row["reward"] for row in rollouts(run, Filters(sort="reward-high"))[0] if row["reward"] is not None]
    assert highest == sorted(highest, reverse=True)
    assert rollouts(run, Filters(task="task-3"))[1] > 0
    assert rollouts(run, Filters(task="' OR 1=1 --"))[1] == 0
    assert len(rollouts(run, Filters(page=2))[0]) == 2
    odd = Filters.of({"step": "x", "sort": "DROP TABLE", "page": "-3", "reward_min": "nan?", "env": "hunt"})
    assert odd == Filters(env="hunt")
    assert Filters.of({"step": "2", "page": "3"}).at(4) == "step=2&page=4"
    made.damage()
    assert [row["id"] for row in rollouts(run, Filters(fault="corrupt"))[0]] == ["1.0.1"]
    assert group(run, "1.0", 9) == ["1.0.0", "1.0.1", "1.0.2", "1.0.3"]
    assert neighbours(run, "1.0.1") == ("1.0.0", "1.0.2")
    assert best_of_last_step(run).startswith("3.")


def test_the_store_is_counted_and_its_damage_found(run: ViewedRun, made: MadeRun) -> None:
    facts = store_facts(run)
    assert (facts.images, facts.missing_count, facts.corrupt_count) == (6, 0, 0)
    assert facts.distinct == 5  # nobody refers to the sixth
    sizes = {image.sha256: image.num_bytes for image in made.images}
    spans = [
        held["hash"]
        for path in made.paths.rollouts.rglob("*.jsonl")
        for line in path.read_text().splitlines()
        for branch in json.loads(line)["branches"]
        for held in branch["images"]
    ]
    assert facts.references == len(spans)
    assert facts.saved == sum(sizes[sha256] for sha256 in spans) - sum(sizes[sha256] for sha256 in set(spans))
    made.damage()
    (run.image_dir / "notes.txt").write_text("x")
    run.index.update_store()
    facts = store_facts(run)
    assert [row[0] for row in facts.missing] == [made.images[0].sha256]
    assert [Path(name).stem for name, _ in facts.corrupt] == [made.images[1].sha256]
    assert facts.others == [("notes.txt", "foreign")]


def test_what_the_trainer_did_is_told(client: TestClient, made: MadeRun) -> None:
    made.damage()
    made.write(made.paths.rollouts_file(4), [made.rollout("4.0.0", "sent")])
    overlong = made.rollout("3.0.0", "sent")
    overlong["branches"][0]["overlong"] = True
    alone = made.rollout("3.0.1", "alone")
    made.write(made.paths.rollouts_file(3), [overlong, alone])
    for rollout_id, word in (
        ("2.0.0", "trained"), ("1.0.0", "zeroed"), ("1.0.1", "quarantined"), ("2.1.1", "dropped"), ("3.0.0", "dropped"),
        ("2.3.0", "not trained"), ("eval_0.1", "evaluated"), ("4.0.0", "waiting"), ("3.0.1", "not trained"),
    ):  # fmt: skip
        page = client.get("/runs/0/rollout", params={"id": rollout_id}).text
        assert f'">{word}</span>' in page, rollout_id
    assert "failed for good: ValueError" in client.get("/runs/0/rollout?id=2.1.1").text


def test_a_failed_rollout_shows_its_answer_its_traceback_and_what_was_said(
    client: TestClient, made: MadeRun, tmp_path: Path
) -> None:
    error = {"kind": "ContextLengthError", "message": "too long", "traceback": f"File {HOSTILE}\nContextLengthError"}
    failed = {**made.rollout("2.0.0", "failed"), "reward": None, "answer": f"cat {HOSTILE}", "error": error}
    counted = {**made.rollout("2.0.1", "sent"), "answer": "dog", "error": error}
    made.write(made.paths.rollouts_file(2), [failed, counted])
    page = client.get("/runs/0/rollout?id=2.0.0").text
    assert "<dt>expected answer</dt><dd>cat &lt;script&gt;" in page
    assert "<pre>File &lt;script&gt;" in page
    assert "failed for good: ContextLengthError: too long" in page
    assert "What is it?" in page
    page = client.get("/runs/0/rollout?id=2.0.1").text
    assert "as a rollout that failed by what the policy did (ContextLengthError)" in page
    assert ", expected answer cat" in client.get("/runs/0/group?id=2.0").text
    write_transcript(made.paths.output_dir, "2.0.0", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    for part in ("**expected answer**", "cat <script>", "**failed**", "ContextLengthError: too long", "What is it?"):
        assert part in text
    console = Console(file=io.StringIO(), width=200)
    show_rollout(made.paths.output_dir, "2.0.0", "none", console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("expected answer", "traceback", "ContextLengthError: too long", "What is it?"):
        assert part in shown


def test_the_overview_tells_what_failed_and_what_is_solved(client: TestClient, made: MadeRun) -> None:
    made.add_step(4)
    evaluated = {
        "step": 5,
        "eval/accuracy": 0.5,
        "eval/failed": 3,
        "eval/failed/OSError": 2,
        "eval/failed/ValueError": 1,
    }
    append_jsonl(made.paths.metrics / "eval.jsonl", evaluated)
    append_jsonl(made.paths.metrics / "trainer.jsonl", {"step": 5})
    append_jsonl(made.paths.metrics / "orchestrator.jsonl", {"step": 5, "solved": 1})
    page = client.get("/").text
    assert "2 OSError, 1 ValueError" in page
    assert "at step 5" in page


def test_a_conversation_has_its_pictures_and_sampled_tokens_in_place(made: MadeRun) -> None:
    record = msgspec.convert(made.rollout("1.0.0", "sent"), RolloutRecord)
    user, asking, tool, answer = conversation(record.branches[0])
    first, second = user.parts[0], tool.parts[0]
    assert isinstance(first, ShownImage)
    assert isinstance(second, ShownImage)
    assert (first.span.offset, second.span.offset) == (4, 20)
    assert [part.offset for part in (*asking.parts, *answer.parts) if isinstance(part, SampledPiece)] == [12, 30]
    assert asking.calls[0].name == "zoom"
    # An answer that the policy did not sample here stays what it is.
    branch = msgspec.structs.replace(record.branches[0], sampled_pieces=record.branches[0].sampled_pieces[1:])
    _, asking, _, answer = conversation(branch)
    assert asking.parts == []
    assert isinstance(answer.parts[0], SampledPiece)
    message = {"role": "user", "content": [3, {"type": "image_url"}, {"type": "x"}], "tool_calls": [{}]}
    odd = BranchRecord(messages=[message])
    assert conversation(odd)[0].parts == [ShownImage(None, None)]


def test_records_of_older_runs_are_shown(made: MadeRun, client: TestClient) -> None:
    record = made.rollout("2.0.0", "sent")
    old = {name: record[name] for name in ("id", "task", "reward", "advantage")}
    old["branches"] = [{name: record["branches"][0][name] for name in ("tokens", "sampled", "messages", "images")}]
    made.write(made.paths.rollouts_file(2), [old])
    page = client.get("/runs/0/rollout?id=2.0.0").text
    assert "a cat" in page
    assert "trained" in page


def test_hostile_text_is_text(client: TestClient, made: MadeRun) -> None:
    for page in (
        "rollout?id=1.3.3",
        "group?id=1.3",
        "rollouts?step=1",
        "rollout?id=1.1.1",
        "rollout?id=<script>1</script>",
    ):
        text = client.get(f"/runs/0/{page}").text
        assert "&lt;script&gt;" in text
        assert text.count("<script") == 1  # our own
        assert "onerror='" not in text
        assert not re.search(r"(href|src|action|data-url)=\"?javascript:", text)
        assert "{{7*7}}" in text or "id=<" in page  # no template is made of it either
    assert LINK in client.get("/runs/0/rollout?id=1.3.3").text
    assert client.get("/runs/0/rollouts", params={"task": HOSTILE}).text.count("<script") == 1


def test_headers_allow_no_foreign_script_and_only_reading(client: TestClient) -> None:
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/static/app.js").headers["content-security-policy"]
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/").status_code == 405


@pytest.mark.parametrize(
    "name",
    [
        "../../configs/rl.toml", "..%2f..%2fconfigs%2frl.toml", "%2e%2e/x", "/etc/passwd", "//etc/passwd",
        "ab/notes.txt", "ab/%00.png", "file:///etc/passwd", f"ab/{'ab' * 32}.svg", f"cd/{'ab' * 32}.png",
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["picture", "thumbnail/96"])
def test_only_stored_images_are_served(client: TestClient, made: MadeRun, route: str, name: str) -> None:
    answer = client.get(f"/runs/0/{route}/{name}")
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_links_in_the_store_are_not_followed(client: TestClient, made: MadeRun, tmp_path: Path) -> None:
    path = local_path(made.images[2].uri)
    (tmp_path / "secret.png").write_bytes(encoded(picture(8, 8)))
    path.unlink()
    path.symlink_to(tmp_path / "secret.png")
    for route in ("picture", "thumbnail/96"):
        assert client.get(f"/runs/0/{route}/{path.parent.name}/{path.name}").status_code == 404


def test_thumbnails_are_made_once_and_say_what_is_wrong(client: TestClient, made: MadeRun, cache: Path) -> None:
    big = made.store.put(encoded(picture(900, 300)))
    names = [f"{image.sha256[:2]}/{image.sha256}.png" for image in (*made.images, big)]
    answer = client.get(f"/runs/0/thumbnail/96/{names[-1]}")
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (96, 32)
    (kept,) = (cache / "thumbnails").rglob("*.png")
    kept.write_bytes(b"kept")
    assert client.get(f"/runs/0/thumbnail/96/{names[-1]}").content == b"kept"
    assert client.get(f"/runs/0/thumbnail/97/{names[-1]}").status_code == 404
    assert client.get(f"/runs/0/picture/{names[3]}").content == local_path(made.images[3].uri).read_bytes()
    made.damage()
    assert "missing" in client.get(f"/runs/0/thumbnail/96/{names[0]}").text
    assert "corrupt" in client.get(f"/runs/0/thumbnail/96/{names[1]}").text
    page = client.get("/runs/0/rollout?id=1.0.3").text + client.get("/runs/0/group?id=1.0").text
    assert '<p class="lost">missing</p>' in page
    assert '<p class="lost">corrupt</p>' in page


def test_a_copied_run_shows_its_own_pictures(made: MadeRun, tmp_path: Path, cache: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(made.paths.output_dir, copy)
    shutil.rmtree(made.paths.output_dir)
    run = ViewedRun(copy, cache)
    client = TestClient(create_app([run], cache / "thumbnails", None), base_url="http://127.0.0.1")
    page = client.get("/runs/0/rollout?id=1.0.0").text
    assert "lost" not in page
    source = page.split('src="/runs')[1].split('"')[0]
    assert client.get(f"/runs{source}").status_code == 200
    shutil.rmtree(copy / "assets")
    bare = ViewedRun(copy, cache)
    client = TestClient(create_app([bare], cache / "thumbnails", None), base_url="http://127.0.0.1")
    assert "missing" in client.get("/runs/0/rollout?id=1.0.0").text
    assert client.get("/runs/0/store").status_code == 200


def test_who_may_look(run: ViewedRun, cache: Path) -> None:
    local = create_app([run], cache, None)
    assert TestClient(local, base_url="http://localhost:80").get("/").status_code == 200
    assert TestClient(local, base_url="http://[::1]:80").get("/").status_code == 200
    assert TestClient(local, base_url="http://evil.example").get("/").status_code == 400  # DNS rebinding
    assert TestClient(local, base_url="http://127.0.0.1.evil.example").get("/").status_code == 400
    app = create_app([run], cache, "s3cret")
    client = TestClient(app, base_url="http://run.example")
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/static/app.js").status_code == 401
    assert client.get("/", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    answer = client.get("/runs/0/rollouts?step=1&token=s3cret", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/0/rollouts?step=1")
    assert "httponly" in answer.headers["set-cookie"].lower()
    assert "s3cret" not in answer.headers["set-cookie"]
    assert client.get("/").status_code == 200  # by the cookie
    elsewhere = client.get("http://run.example//evil.example/?token=s3cret", follow_redirects=False)
    assert elsewhere.headers["location"] == "/evil.example/"


def test_a_server_for_others_always_has_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _token("127.0.0.1", None) is None
    made_up = _token("0.0.0.0", None)
    assert made_up is not None
    assert len(made_up) >= 32
    with pytest.raises(ConfigError, match="VIEW_KEY should hold the viewer's token"):
        _token("0.0.0.0", "VIEW_KEY")
    monkeypatch.setenv("VIEW_KEY", "k")
    assert _token("127.0.0.1", "VIEW_KEY") == "k"


def test_runs_are_opened_or_refused(made: MadeRun, tmp_path: Path) -> None:
    other = MadeRun(tmp_path / "other" / "run", steps=1)
    assert [run.name for run in open_runs([made.paths.output_dir, other.paths.output_dir])] == [
        f"{tmp_path.name}/run", "other/run",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(PointillistError, match="holds no run"):
        open_runs([tmp_path / "empty"])
    result = CliRunner().invoke(cli, ["view", str(tmp_path / "empty")])
    assert result.exit_code == 1
    assert "holds no run" in result.output
    result = CliRunner().invoke(cli, ["view", str(made.paths.output_dir), "--text", "--rollout", "7.7.7"])
    assert "has no rollout 7.7.7" in result.output


def test_pages_that_are_not_there_say_so(client: TestClient) -> None:
    for page in ("/runs/1/rollouts", "/runs/0/group?id=9.9", "/runs/0/rollout", "/nowhere"):
        answer = client.get(page)
        assert answer.status_code == 404
        assert "Not there" in answer.text


def test_metrics_are_read_on_and_anew(tmp_path: Path) -> None:
    path = tmp_path / "trainer.jsonl"
    file = MetricsFile(path)
    assert file.columns() == {}
    path.write_text('{"step": 1, "loss": 0.5, "on": true}\nbroken\n{"step": 2, "lo')
    assert list(file.columns()["loss"].values) == [0.5]
    assert "on" not in file.columns()
    with path.open("a") as more:
        more.write('ss": 0.25}\n')
    assert list(file.columns()["loss"].steps) == [1, 2]
    (tmp_path / "new").write_text('{"step": 1, "loss": 9}\n')
    (tmp_path / "new").replace(path)
    assert list(file.columns()["loss"].values) == [9]


def test_a_chart_keeps_its_spikes_and_has_a_table() -> None:
    values = [1.0] * 5000
    values[3333], values[77] = 9.0, float("nan")
    chart = line_chart("k", "t", "a", [Line("x", range(5000), values), Line("empty", [], [])])
    assert chart is not None
    points = [tuple(map(float, point.split(","))) for point in chart.lines[0].points.split()]
    assert len(points) <= 400
    assert min(y for _, y in points) == min(tick.at for tick in chart.y_ticks) or min(y for _, y in points) < 40
    assert all(0 <= x <= chart.width and 0 <= y <= chart.height for x, y in points)
    assert len(chart.rows) <= 14
    assert line_chart("k", "t", "a", [Line("x", [1], [float("inf")])]) is None
    flat = line_chart("k", "t", "a", [Line("x", [1], [0.0])])
    assert flat is not None
    tiny = line_chart("k", "t", "a", [Line("x", [1, 2], [1.1e-7, 3.9e-7])])
    assert tiny is not None
    assert len({tick.label for tick in tiny.y_ticks}) == len(tiny.y_ticks)


def test_the_terminal_obeys_nothing_that_a_model_said(made: MadeRun, cache: Path) -> None:
    record = made.rollout("1.0.0", "sent")
    record["task"] = "\x1b]0;title\x07\x9b31m\u202etxt"
    record["branches"][0]["messages"][-1]["content"] = "\x1b[2J[bold]x[/bold]"
    record["branches"][0]["sampled_pieces"][-1]["texts"] = ["\x1b[2J", "[bold]x[/bold]", ""]
    made.write(made.paths.rollouts_file(1), [record])
    out = io.StringIO()
    show_rollout(made.paths.output_dir, "1.0.0", "none", Console(file=out, width=200, color_system=None))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "\u202e" not in text
    assert "\u241b[2J[bold]x[/bold]" in text  # what was said is there
    assert "zoom" in text
    assert "tokens 4 to 7" in text
    assert plain("a\nb\tc") == "a\nb\tc"


@pytest.mark.parametrize("way", ["kitty", "sixel", "blocks", "none", "auto"])
def test_pictures_in_the_terminal(made: MadeRun, way: str) -> None:
    made.damage()
    out = io.StringIO()
    show_rollout(made.paths.output_dir, None, way, Console(file=out, width=100, force_terminal=True))
    marks = {"kitty": "\x1b_Ga=T,f=100", "sixel": "\x1bPq", "blocks": "\u2580"}
    assert way not in marks or marks[way] in out.getvalue()
    assert "picture" in out.getvalue()


def test_kitty_and_sixel_say_the_picture() -> None:
    image = Image.new("RGB", (7, 8), (255, 0, 0))
    image.putpixel((3, 7), (0, 0, 255))
    data = "".join(part.split(";")[1] for part in kitty(image).split("\x1b\\")[:-1])
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (7, 8)
    assert np.array_equal(_read_sixel(sixel(image)), np.asarray(image))
    assert str(half_blocks(image, 40)).count("\n") == 4
    noise = kitty(picture(80, 80))
    assert noise.count("m=1") == noise.count("\x1b_G") - 1


def _read_sixel(text: str) -> np.ndarray:
    """A reader of its own of what `sixel` writes."""
    body = text.removeprefix("\x1bPq").removesuffix("\x1b\\")
    header, _, body = body.partition("#")
    width, height = map(int, header.split(";")[2:])
    pixels = np.zeros((height, width, 3), np.uint8)
    palette: dict[int, list[int]] = {}
    x = y = colour = 0
    body, at = "#" + body, 0
    while at < len(body):
        mark = body[at]
        end = at + 1
        while mark in "#!" and end < len(body) and (body[end].isdigit() or body[end] == ";"):
            end += 1
        if mark == "#":
            colour, *rest = map(int, body[at + 1 : end].split(";"))
            if rest:
                palette[colour] = [round(value * 255 / 100) for value in rest[1:]]
        elif mark == "$":
            x = 0
        elif mark == "-":
            x, y = 0, y + 6
        else:
            count = int(body[at + 1 : end]) if mark == "!" else 1
            bits = ord(body[end if mark == "!" else at]) - 63
            end += mark == "!"
            for row in range(6):
                if bits >> row & 1:
                    pixels[y + row, x : x + count] = palette[colour]
            x += count
        at = end
    return pixels


@pytest.mark.parametrize(
    ("environ", "way"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "x", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "vt100"}, "none"),
        ({"TERM": "dumb"}, "none"),
        ({}, "none"),
    ],
)
def test_what_the_terminal_can(environ: dict[str, str], way: str) -> None:
    assert protocol(environ, is_terminal=True) == way
    assert protocol(environ, is_terminal=False) == "none"


def test_a_run_that_is_going_is_followed(run: ViewedRun, client: TestClient, made: MadeRun) -> None:
    before = client.get("/runs/0/status").json()
    run.index.start()
    made.add_step(4)
    deadline = time.monotonic() + 20
    while client.get("/runs/0/status").json()["rollouts"] == before["rollouts"] and time.monotonic() < deadline:
        time.sleep(0.05)
    run.index.stop()
    after = client.get("/runs/0/status").json()
    assert after["rollouts"] == before["rollouts"] + 16
    assert after["state"] != before["state"]


def test_an_unreadable_picture_is_corrupt_and_a_lost_one_is_missing(store: ImageStore) -> None:
    path = local_path(store.put(encoded(picture(8, 8))).uri)
    name = path.relative_to(store.root).as_posix()
    assert is_intact(store.root, name, STORED_LIMITS)
    path.unlink()
    with pytest.raises(MissingImageError):
        is_intact(store.root, name, STORED_LIMITS)
    path.mkdir()
    assert not is_intact(store.root, name, STORED_LIMITS)
