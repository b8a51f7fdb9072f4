"""Sessions against a policy that answers from a script: what is recorded, where it forks, nothing re-tokenised."""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pointillist.errors import ContextLengthError, HistoryError, UnsupportedContentError
from pointillist.images import Sources
from pointillist.orchestrator.samples import make_sample
from pointillist.refs import encode_features
from pointillist.render import RawRenderer, RenderedPrompt
from pointillist.sessions import Completion, Sampling, Session, Turn
from tests.helpers.pictures import picture

TOOLS = [{"type": "function", "function": {"name": "move", "parameters": {"type": "object", "properties": {}}}}]


class Script:
    """Stands for the inference client; keeps every request."""

    def __init__(self, answer: Callable[[int], list[int]]) -> None:
        self.answer = answer
        self.prompts: list[list[int]] = []
        self.completions: list[list[int]] = []
        self.features: list[Any] = []

    async def generate(
        self, prompt: RenderedPrompt, sampling_params: Mapping[str, Any], seed: int, **_: Any
    ) -> Completion:
        tokens = self.answer(len(self.prompts))
        self.prompts.append(prompt.token_ids)
        self.completions.append(tokens)
        self.features.append(encode_features(prompt.images))
        return Completion(tokens, [-0.1 * (i + 1) for i in range(len(tokens))], [3] * len(tokens), "stop")


@pytest.fixture
def say(renderer: RawRenderer) -> Callable[[str], list[int]]:
    def tokens(text: str) -> list[int]:
        return [*renderer.tokenizer.encode(text), renderer.stop_token_ids[0]]

    return tokens


@pytest.fixture
def opened(renderer: RawRenderer, sources: Sources) -> Callable[..., tuple[Session, Script]]:
    def open_session(answer: Callable[[int], list[int]], seq_len: int = 20_000) -> tuple[Session, Script]:
        script = Script(answer)
        return Session(renderer, sources, script, Sampling(), seq_len=seq_len, seed=1, tools=TOOLS), script  # type: ignore[arg-type]

    return open_session


def user(text: str, *seeds: int) -> dict[str, Any]:
    images = [{"type": "image", "image": picture(64, 64, seed)} for seed in seeds]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def tool(turn: Turn, seed: int) -> dict[str, Any]:
    (call,) = turn.message["tool_calls"]
    return {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "image", "image": picture(64, 64, seed)}]}


async def chat(session: Session, *messages: Any, **options: Any) -> list[Turn]:
    return await session.chat(await session.read(messages), tools=TOOLS, **options)


CALL = '<tool_call>\n{"name": "move", "arguments": {"to": "left", "by": 2}}\n</tool_call>'


async def test_twenty_turns_with_a_picture_and_a_call_each_are_one_stream(opened: Any, say: Any) -> None:
    """The client sends its whole history every time, slightly changed, as real ones do."""
    session, script = opened(lambda number: say(f"turn {number}\n{CALL}"))
    history: list[Any] = [{"role": "system", "content": "Look."}, user("Find it.", 0)]
    for seed in range(1, 21):
        (turn,) = await chat(session, *history)
        message = json.loads(json.dumps(turn.message))
        message["content"] = [{"type": "text", "text": message["content"]}]
        function = message["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(json.loads(function["arguments"]), indent=1)
        history += [message, tool(turn, seed)]
    (branch,) = session.branches
    for earlier, completion, later in zip(script.prompts, script.completions, script.prompts[1:], strict=False):
        assert later[: len(earlier) + len(completion)] == [*earlier, *completion]
    assert branch.token_ids == [*script.prompts[-1], *script.completions[-1]]
    sampled = [token for token, on in zip(branch.token_ids, branch.loss_mask, strict=True) if on]
    assert sampled == [token for completion in script.completions for token in completion]
    assert [len(features["mm_hashes"]["image"]) for features in script.features] == list(range(1, 21))
    assert len({image.hash for image in branch.images}) == 20


async def test_an_edited_history_forks_and_both_branches_train(opened: Any, say: Any, renderer: RawRenderer) -> None:
    session, script = opened(lambda number: say(f"answer {number}"))
    first = user("What?", 0)
    (one,) = await chat(session, first)
    (two,) = await chat(session, first, one.message, user("And?", 1))
    await chat(session, first, one.message, user("And this?", 2))  # the same past, another continuation
    await chat(session, user("What then?", 0), one.message, user("And?", 1))  # another past
    continued, other, edited = session.branches
    fresh = [sum(branch.loss_mask) for branch in (continued, other, edited)]
    assert fresh == [len(script.completions[0]) + len(script.completions[1]), *map(len, script.completions[2:])]
    shared = len(script.prompts[0]) + len(script.completions[0])
    assert other.token_ids[:shared] == continued.token_ids[:shared]
    assert not any(other.loss_mask[:shared])  # trained once, in the first branch
    for number, branch in enumerate(session.branches):
        sample = make_sample(branch, 1.0, image_token_id=renderer.family.image_token_id, sample_id=str(number))
        assert sum(sample.loss_mask) == fresh[number]
    assert [message["role"] for message in edited.messages] == ["user", "assistant", "user", "assistant"]
    assert continued.messages[-1] == two.message


async def test_several_answers_are_branches_and_each_can_go_on(opened: Any, say: Any) -> None:
    session, script = opened(lambda number: say(f"answer {number}"))
    first = user("What?", 0)
    turns = await chat(session, first, n=3)
    assert [turn.text for turn in turns] == ["answer 0", "answer 1", "answer 2"]
    await chat(session, first, turns[1].message, user("Sure?"))
    branches = session.branches
    assert len(branches) == 3
    assert script.prompts[3][: len(script.prompts[0]) + len(script.completions[1])] == [
        *script.prompts[0], *script.completions[1],
    ]  # fmt: skip
    assert sum(sum(branch.loss_mask) for branch in branches) == sum(map(len, script.completions))


async def test_a_sub_conversation_is_a_branch_of_the_same_rollout(opened: Any, say: Any) -> None:
    session, _ = opened(lambda number: say(f"answer {number}"))
    (outer,) = await chat(session, user("Plan."))
    await chat(session, {"role": "system", "content": "You look closely."}, user("What is in it?", 4))
    await chat(session, user("Plan."), outer.message, user("It is noise."))
    assert [len(branch.images) for branch in session.branches] == [1, 0]
    assert len(session.turns) == 3


async def test_stop_texts_cut_the_record_where_they_end(opened: Any, say: Any, renderer: RawRenderer) -> None:
    session, script = opened(lambda _: say("Thought: look\nObservation: I see it all"))
    (turn,) = await chat(session, user("What?"), stop=["Observation:", "never"])
    assert turn.text == "Thought: look\n"
    assert turn.stopped_by == "Observation:"
    (branch,) = session.branches
    sampled = [token for token, on in zip(branch.token_ids, branch.loss_mask, strict=True) if on]
    assert sampled == script.completions[0][: len(sampled)]
    assert renderer.tokenizer.decode(sampled).endswith("Observation:")
    await chat(session, user("What?"), turn.message, user("It is red."))
    assert len(session.branches) == 1


async def test_a_call_that_can_not_be_parsed_is_shown_as_it_was_written(opened: Any, say: Any) -> None:
    session, _ = opened(lambda _: say("hm\n<tool_call>\n{broken\n</tool_call>"))
    (turn,) = await chat(session, user("What?"))
    assert "tool_calls" not in turn.message
    assert turn.text == "hm\n{broken"


async def test_old_pictures_are_dropped_and_every_turn_trains_on_what_it_saw(opened: Any, say: Any) -> None:
    session, script = opened(lambda number: say(f"answer {number}"))
    for seed in range(3):
        await session.generate([user("What?", seed)])
    assert session.compact_images(keep_last=1) == 2
    assert session.compact_images(keep_last=1) == 0
    await session.generate([user("And now?", 9)])
    before, after = session.branches
    assert [len(branch.images) for branch in session.branches] == [3, 2]
    assert before.token_ids == [*script.prompts[2], *script.completions[2]]
    assert after.token_ids == [*script.prompts[3], *script.completions[3]]
    assert sum(after.loss_mask) == len(script.completions[3])
    assert json.dumps(session.messages).count("[image removed]") == 2
    assert session.compact_images(keep_last=0, replacement="") == 2
    await session.generate([user("What was it?")])
    assert session.branches[-1].images == []


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda m: m[1]["tool_calls"][0]["function"].update(arguments="{}"), HistoryError, "contradicts the record"),
        (lambda m: m[2].update(tool_call_id="call_9"), HistoryError, "'call_9', expected a call of the preceding"),
        (lambda m: m[2].pop("tool_call_id"), HistoryError, "tool_call_id is 'None'"),
        (lambda m: m.pop(1), HistoryError, "expected a call of the preceding"),
        (lambda m: m.pop(), HistoryError, "must end with a user or tool message"),
        (lambda m: m.clear(), HistoryError, "must end with a user or tool message"),
        (lambda m: m[0].update(role="narrator"), HistoryError, r"messages\[0\].role is 'narrator'"),
        (lambda m: m[0].update(content=5), HistoryError, r"messages\[0\].content is int"),
        (lambda m: m[0].update(content=[{"type": "input_audio"}]), UnsupportedContentError, r"\[0\].*'input_audio'"),
        (lambda m: m[0].update(content=[{"type": "video_url"}]), UnsupportedContentError, "'video_url'"),
        (lambda m: m[1].update(content=[{"type": "image", "image": picture(8, 8)}]), UnsupportedContentError, "images"),
        (lambda m: m[1].update(tool_calls=[{"id": "x"}]), HistoryError, r"messages\[1\].tool_calls: expected"),
        (lambda m: m[2].update(content="x" * 900), ContextLengthError, "seq_len is 700"),
    ],
)
async def test_histories_that_can_not_be(
    change: Callable[[list[Any]], None], error: type[Exception], text: str, opened: Any, say: Any
) -> None:
    session, script = opened(lambda _: say(CALL), seq_len=700)
    first = {"role": "user", "content": "What?"}
    (turn,) = await chat(session, first)
    history = [first, json.loads(json.dumps(turn.message)), tool(turn, 1)]
    good = json.loads(json.dumps(await _plain(session, history)))
    change(history)
    with pytest.raises(error, match=text):
        await chat(session, *history)
    await chat(session, *good)  # the session goes on, and on the same stream
    assert len(session.branches) == 1
    assert len(script.prompts) == 2


async def _plain(session: Session, history: list[Any]) -> list[Any]:
    return (await session.read(history)).messages


def violations(session: Session, script: Script) -> int:
    """Turns whose tokens are in no branch as they were read and sampled."""
    streams = [branch.token_ids for branch in session.branches]
    count = 0
    for prompt, completion in zip(script.prompts, script.completions, strict=True):
        whole = [*prompt, *completion]
        count += not any(stream[: len(whole)] == whole for stream in streams)
    return count


async def converse(session: Session, script: Script, say: Any, random_: random.Random) -> int:
    """One conversation of random shape; returns how often the client edited it."""
    history: list[Any] = [user("Begin.", *range(random_.randrange(3)))]
    edits = 0
    for _ in range(random_.randint(1, 10)):
        (turn,) = await chat(session, *history)
        answer = json.loads(json.dumps(turn.message))
        if turn.message.get("tool_calls"):
            history += [answer, tool(turn, random_.randrange(20))]
        else:
            history += [answer, user(random_.choice(["go on", "é\n\n😀 ", " ", "why?"]), *range(random_.randrange(2)))]
        if random_.random() < 0.1:
            history[0] = user(f"Begin again {random_.random()}.")
            edits += 1
    return edits


ANSWERS = [
    "yes",
    " no\n",
    f"look\n{CALL}",
    CALL,
    "",
    "a" * 30,
    "1 2 3 \t4",
    "<think>hm</think>so",
    "</tool_call>",
    "é😀",
]


@pytest.mark.slow
async def test_random_conversations_are_never_re_tokenised(opened: Any, say: Any, renderer: RawRenderer) -> None:
    """1,000 conversations: every prompt and completion stands in the record as it was; unedited ones are one stream."""
    random_ = random.Random(0)
    for _ in range(1000):

        def answer(_: int) -> list[int]:
            tokens = say(random_.choice(ANSWERS))
            if random_.random() < 0.2:  # cut by max_tokens, sometimes in the middle of a call
                return tokens[: random_.randint(1, len(tokens))]
            if random_.random() < 0.2:  # nothing a tokenizer would write
                return [random_.randrange(20, len(renderer.tokenizer)) for _ in range(8)]
            return tokens

        session, script = opened(answer)
        edits = await converse(session, script, say, random_)
        assert violations(session, script) == 0
        assert sum(sum(branch.loss_mask) for branch in session.branches) == sum(map(len, script.completions))
        if not edits:
            assert len(session.branches) == 1
