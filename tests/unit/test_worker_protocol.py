"""What travels between environment workers and the orchestrator."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.errors import TransportError
from pointillist.images import Sources
from pointillist.render import RawRenderer
from pointillist.rollouts import Branch, Completion, Sampling, Session
from pointillist.rollouts.executor import RolloutRequest, RolloutResult
from pointillist.rollouts.workers import protocol
from tests.conftest import picture


class Silent:
    """A policy that ends its turn at once."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    async def generate(self, *_: object, **__: object) -> Completion:
        return Completion([self.stop], [-0.5], [3], "stop")


async def branch(renderer: RawRenderer, sources: Sources, turns: int, side: int) -> Branch:
    client = Silent(renderer.stop_token_ids[0])
    session = Session(renderer, sources, client, Sampling(), seq_len=100_000, seed=0)  # type: ignore[arg-type]
    for seed in range(turns):
        await session.generate([{"role": "user", "content": [{"type": "image", "image": picture(side, side, seed)}]}])
    (only,) = session.branches
    return only


@pytest.mark.parametrize("side", [64, 992])
async def test_an_image_a_turn_costs_few_bytes_whatever_its_size(
    renderer: RawRenderer, sources: Sources, side: int
) -> None:
    sizes = []
    for turns in (2, 10):
        result = RolloutResult(id="1.0.0", task_id="t", branches=[await branch(renderer, sources, turns, side)])
        sizes.append(len(protocol.encode(protocol.Done(result))))
    assert (sizes[1] - sizes[0]) / 8 <= 600


async def test_results_and_requests_come_back_as_they_were(renderer: RawRenderer, sources: Sources) -> None:
    result = RolloutResult(id="1.0.0", task_id="t", reward=0.5, branches=[await branch(renderer, sources, 3, 64)])
    assert protocol.decode_from_worker(protocol.encode(protocol.Done(result))) == protocol.Done(result)
    request = RolloutRequest(id="1", group="g", split="eval", index=4, sampling=Sampling(top_k=5), seed=2**40)
    assert protocol.decode_to_worker(protocol.encode(protocol.Run(request))) == protocol.Run(request)


@given(st.binary(max_size=200), st.booleans())
def test_anything_else_is_refused(data: bytes, compressed: bool) -> None:
    for decode in (protocol.decode_from_worker, protocol.decode_to_worker):
        with pytest.raises(TransportError, match="message"):
            decode(zlib.compress(data) if compressed else data)
