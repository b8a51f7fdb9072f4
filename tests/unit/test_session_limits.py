"""What a session asks of the server: seeds, room, and what it refuses of the answer. What the trace does with a past
that was rewritten."""

from array import array
from collections.abc import Mapping
from typing import Any

import pytest

from pointillist.errors import RenderError
from pointillist.images import Sources
from pointillist.render import RawRenderer, RenderedPrompt
from pointillist.render.raw import Attribution
from pointillist.sessions import Completion, Sampling, Session
from pointillist.sessions.trace import Trace


class Asked:
    """Stands for the inference client; keeps seeds and parameters."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.seeds: list[int] = []
        self.params: list[Mapping[str, Any]] = []
        self.lengths: list[int] = []

    async def generate(self, prompt: RenderedPrompt, params: Mapping[str, Any], seed: int, **_: Any) -> Completion:
        self.seeds.append(seed)
        self.params.append(params)
        self.lengths.append(len(prompt.token_ids))
        return Completion(self.answer, [-0.1] * len(self.answer), [0] * len(self.answer), "stop")


def _session(renderer: RawRenderer, sources: Sources, client: Asked, seq_len: int, max_tokens: int = 128) -> Session:
    return Session(renderer, sources, client, Sampling(max_tokens=max_tokens), seq_len=seq_len, seed=11)  # type: ignore[arg-type]


async def test_every_turn_has_seeds_of_its_own(renderer: RawRenderer, sources: Sources) -> None:
    client = Asked([*renderer.tokenizer.encode("a"), renderer.stop_token_ids[0]])
    session = _session(renderer, sources, client, seq_len=4000)
    for _ in range(3):
        await session.generate([{"role": "user", "content": "What?"}])
    await session.chat(await session.read([{"role": "user", "content": "And?"}]), n=4)
    assert len(client.seeds) == 7
    assert len(set(client.seeds)) == 7
    # Two rollouts of a group count up from seeds that lie beside each other: turns must not meet the neighbour's.
    assert all(later - earlier >= 2**16 for earlier, later in zip(client.seeds[:3], client.seeds[1:4], strict=True))


@pytest.mark.parametrize("room", [1, 5, 1000])
async def test_an_answer_has_no_more_tokens_than_there_is_room(
    room: int, renderer: RawRenderer, sources: Sources
) -> None:
    client = Asked([renderer.stop_token_ids[0]])
    message = {"role": "user", "content": "What?"}
    await _session(renderer, sources, client, seq_len=4000).generate([message])
    await _session(renderer, sources, client, seq_len=client.lengths[0] + room).generate([message])
    assert [params["max_tokens"] for params in client.params] == [128, min(room, 128)]


async def test_a_sampled_vision_token_is_an_error(renderer: RawRenderer, sources: Sources) -> None:
    """It would be a placeholder without an image in the next turn and in training."""
    for token in sorted(renderer.family.vision_token_ids):
        session = _session(renderer, sources, Asked([token, renderer.stop_token_ids[0]]), seq_len=4000)
        with pytest.raises(RenderError, match=f"sampled the vision token {token} at 0"):
            await session.generate([{"role": "user", "content": "What?"}])
        assert session.branches == []


def _prompt(token_ids: list[int]) -> RenderedPrompt:
    count = len(token_ids)
    attribution = Attribution([0] * count, [False] * count, [True] * count)
    return RenderedPrompt(token_ids, token_ids, [], array("I", range(count)), attribution)


def test_a_past_that_is_rewritten_begins_another_branch() -> None:
    """The template dropped what the first turn said: what was read then is not the beginning of what is read now."""
    trace = Trace()
    first = Completion([7, 8], [-0.1, -0.2], [0, 0], "stop")
    second = Completion([9], [-0.3], [0], "stop")
    trace.record(None, _prompt([1, 2]), first, temperature=1.0, key=b"1", messages=[])
    parent, _ = trace.find([b"1"])
    trace.record(parent, _prompt([1, 2, 5, 3]), second, temperature=1.0, key=b"2", messages=[])
    branches = trace.branches()
    assert [branch.token_ids for branch in branches] == [[1, 2, 7, 8], [1, 2, 5, 3, 9]]
    assert [branch.loss_mask for branch in branches] == [[False] * 2 + [True] * 2, [False] * 4 + [True]]
    # The control: where the past is kept it is one branch.
    trace.record(parent, _prompt([1, 2, 7, 8, 3]), second, temperature=1.0, key=b"3", messages=[])
    assert [1, 2, 7, 8, 3, 9] in [branch.token_ids for branch in trace.branches()]
