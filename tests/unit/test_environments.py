"""The environments in the box, with a session that answers from a script."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pointillist.config.shared import LIMITS_CARRIER
from pointillist.environments.dataset import DatasetEnvironment, exact, math_verify, numeric, regex
from pointillist.environments.hunt import HuntEnvironment
from pointillist.environments.tasks import read_tasks
from pointillist.errors import EnvironmentLoadError
from pointillist.sessions import Completion, Turn
from tests.helpers.pictures import encoded, picture


class Scripted:
    """A session without a policy."""

    def __init__(self, *answers: str | dict[str, Any]) -> None:
        self.answers = list(answers)
        self.read: list[Any] = []
        self.tools: Any = None

    async def generate(self, messages: list[Any]) -> Turn:
        self.read.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            return Turn({"role": "assistant", "content": answer}, Completion([1], [0.0], [0], "stop"), 1)
        call = {"id": "c", "function": {"name": "move", "arguments": json.dumps(answer)}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return Turn(message, Completion([1], [0.0], [0], "stop"), 1)


@pytest.fixture
def hunt(tmp_path: Path) -> HuntEnvironment:
    """A picture of nine windows, each of another shade."""
    image = Image.new("RGB", (96, 96))
    for index in range(9):
        image.paste((10 * index, 0, 0), (32 * (index % 3), 32 * (index // 3), 32 * (index % 3) + 32, 96))
    image.save(tmp_path / "a.png")
    for split in ("train", "heldout"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"image": "a.png", "answer": "red"}))
    return HuntEnvironment(str(tmp_path))


def shown(messages: list[Any]) -> int:
    """Which window a message shows."""
    return messages[0]["content"][0]["image"].getpixel((5, 5))[0] // 10


async def test_hunt_shows_what_the_window_is_moved_to(hunt: HuntEnvironment) -> None:
    (task,) = hunt.train_tasks()
    moves: list[Any] = [{"to": "left"}, {"to": "up"}, {"to": "up"}]
    session = Scripted(*moves, "red")
    assert await hunt.rollout(task, session) == 1.0  # type: ignore[arg-type]
    assert [shown(messages) for messages in session.read] == [4, 3, 0, 0]  # the last move is stopped by the border
    assert session.read[1][0]["tool_call_id"] == "c"
    assert session.tools[0]["function"]["name"] == "move"


@pytest.mark.parametrize(
    ("answers", "reward"),
    [(["red"], 1.0), (["blue"], 0.0), ([{"to": "nowhere"}, "red"], 1.0), ([{}, {}, {}, {}], 0.0), ([[5]], None)],
)
async def test_hunt_rewards_the_name_alone(hunt: HuntEnvironment, answers: list[Any], reward: float | None) -> None:
    session = Scripted(*answers)
    if reward is None:
        with pytest.raises(AttributeError):  # a session never hands on arguments that are no object
            await hunt.rollout(hunt.eval_tasks()[0], session)  # type: ignore[arg-type]
        return
    assert await hunt.rollout(hunt.eval_tasks()[0], session) == reward  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("right", "text", "answer", "expected"),
    [
        (exact, " Paris\n", "paris", True),
        (exact, "Paris.", "paris", False),
        (numeric, "so 3 + 4 = 7.0", "7", True),
        (numeric, "1,234.50 dollars", "1234.5", True),
        (numeric, "about 1e3", "1000", True),
        (numeric, "7 or 8", "7", False),
        (numeric, "none", "7", False),
        (regex, " a cat ", r"an? (cat|dog)", True),
        (regex, "a cat, perhaps", r"an? (cat|dog)", False),
        (math_verify, r"$\frac{2}{4}$", r"$0.5$", True),
        (math_verify, "$x^2 + 2x + 1$", "$(x+1)^2$", True),
        (math_verify, "$3$", "$4$", False),
    ],
)
def test_rewards(right: Any, text: str, answer: str, expected: bool) -> None:
    assert right(text, answer) is expected


@given(st.floats(-1e9, 1e9), st.text(alphabet="ab \n", max_size=5))
def test_numeric_finds_a_number_however_it_is_written(value: float, around: str) -> None:
    for written in (repr(value), f"{value:,.6f}", f"{value:e}", f"{value:+f}"):
        assert numeric(f"{around}{written}{around}", repr(float(written.replace(",", ""))))


ROWS: list[dict[str, Any]] = [
    {"prompt": "What?", "images": ["a.png"], "answer": "cat"},
    {"prompt": "Is <image> like <image>?", "images": ["a.png", "b.png"], "answer": 5},
    {"prompt": "And?", "answer": "x"},
]


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    for number, file in enumerate(("a.png", "b.png")):
        (folder / file).write_bytes(encoded(picture(8, 8, number)))
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / name)


async def test_dataset_puts_images_where_the_prompt_says(tmp_path: Path) -> None:
    environment = DatasetEnvironment(write(tmp_path, ROWS), eval_size=0, system_prompt="Look.")
    by_prompt = {task.data["prompt"]: task for task in environment.train_tasks()}
    assert len(by_prompt) == 3
    session = Scripted("5")
    assert await environment.rollout(by_prompt["Is <image> like <image>?"], session) == 1.0  # type: ignore[arg-type]
    system, question = session.read[0]
    assert system == {"role": "system", "content": "Look."}
    assert [part.get("text") or Path(part["image"]).name for part in question["content"]] == [
        "Is ", "a.png", " like ", "b.png", "?",
    ]  # fmt: skip
    session = Scripted("dog")
    assert await environment.rollout(by_prompt["What?"], session) == 0.0  # type: ignore[arg-type]
    assert [part["type"] for part in session.read[0][1]["content"]] == ["image", "text"]


async def test_dataset_reads_parquet_with_bytes_and_takes_answers_out_of_text(tmp_path: Path) -> None:
    image = {"bytes": encoded(picture(8, 8)), "path": None}
    rows = [{"question": "How many?", "image": image, "answer": "3"} for _ in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    environment = DatasetEnvironment(
        str(tmp_path / "rows.parquet"), eval_size=1, reward="numeric", columns={"prompt": "question"},
        answer_pattern="<answer>(.*?)</answer>",
    )  # fmt: skip
    assert (len(environment.train_tasks()), len(environment.eval_tasks())) == (3, 1)
    task = environment.train_tasks()[0]
    for text, reward in (("<answer>3.0</answer> or 4", 1.0), ("3", 0.0)):
        session = Scripted(text)
        assert await environment.rollout(task, session) == reward  # type: ignore[arg-type]
    assert session.read[0][0]["content"][0]["image"] == image["bytes"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 4 is malformed"),
        (json.dumps({"prompt": "x"}), "KeyError"),
        (json.dumps({"prompt": 5, "answer": "x"}), "expected a text"),
        (json.dumps({"prompt": "<image> <image>", "image": "a.png", "answer": "x"}), "2 <image> marks for 1 images"),
        (json.dumps({"prompt": "x", "image": 7, "answer": "x"}), "image is int"),
    ],
)
def test_dataset_names_the_row_that_is_wrong(row: str, message: str, tmp_path: Path) -> None:
    path = Path(write(tmp_path, ROWS))
    path.write_text(path.read_text() + "\n" + row)
    with pytest.raises(EnvironmentLoadError, match=message):
        DatasetEnvironment(str(path))


def test_dataset_says_what_it_can_not_read(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLoadError, match="no task list"):
        DatasetEnvironment(str(tmp_path / "none.jsonl"))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(EnvironmentLoadError, match="cannot be read as Parquet"):
        DatasetEnvironment(str(tmp_path / "x.parquet"))
    with pytest.raises(EnvironmentLoadError, match="no reward 'vibes'"):
        DatasetEnvironment(write(tmp_path, ROWS), reward="vibes")  # type: ignore[arg-type]


async def test_dataset_takes_data_urls(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(encoded(picture(4, 4))).decode()
    environment = DatasetEnvironment(write(tmp_path, [{"prompt": "x", "image": url, "answer": "y"}]), eval_size=0)
    assert environment.train_tasks()[0].data["images"] == [url]


@pytest.mark.parametrize(
    "url",
    ["DATA:image/png;base64,AAAA", "file:///data/a.png", "https://example.com/a.png", "HTTP://example.com/a.png"],
)
def test_dataset_takes_urls_as_they_are(tmp_path: Path, url: str) -> None:
    environment = DatasetEnvironment(write(tmp_path, [{"prompt": "x", "image": url, "answer": "y"}]), eval_size=0)
    assert environment.train_tasks()[0].data["images"] == [url]


def test_task_lists_take_the_pictures_that_the_run_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wide.jpg").write_bytes(encoded(picture(20_000, 2), "JPEG"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "wide.jpg", "answer": "x"}) + "\n")
    monkeypatch.setenv(LIMITS_CARRIER, '{"max_side": 20000}')
    assert len(read_tasks(tmp_path / "train.jsonl", "")) == 1
    monkeypatch.setenv(LIMITS_CARRIER, '{"max_side": 19999}')
    with pytest.raises(EnvironmentLoadError, match="no side may exceed 19999 pixels"):
        read_tasks(tmp_path / "train.jsonl", "")
