import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from pointillist.base.channel import decompress, secure_client
from pointillist.config import RUN_KEY, TransportConfig
from pointillist.errors import ConfigError, TransportError
from pointillist.orchestrator.packing import OverlongMultimodalSample, pack
from pointillist.refs import MMRefs
from pointillist.runs.paths import RunPaths
from pointillist.transport import (
    FilesystemReceiver,
    FilesystemSender,
    MicroBatch,
    RankBatch,
    Receiver,
    Sender,
    TrainingSample,
    ZmqReceiver,
    ZmqSender,
    decode_rank_batch,
    encode_rank_batch,
    filesystem,
    make_receiver,
    make_sender,
)
from pointillist.transport.types import check_lists, encoded_image_bytes
from pointillist.transport.zmq import _batch_of
from tests.helpers.transported import ITEM, SHA, URI, sample


def batch(*samples: TrainingSample, seq_len: int = 64) -> RankBatch:
    (rows,) = pack(samples, seq_len=seq_len, num_workers=1)
    return RankBatch(step=4, micro_batches=rows, num_tokens=9, orchestrator_state=b"{}")


def test_round_trip() -> None:
    original = batch(sample(), sample("t", images=0), sample("u", images=3))
    assert decode_rank_batch(encode_rank_batch(original)) == original
    last = RankBatch(step=9, micro_batches=[], num_tokens=9, orchestrator_state=b"", is_last=True)
    assert decode_rank_batch(encode_rank_batch(last)) == last


def test_the_wire_is_the_contracts() -> None:
    """Positional, no pixels, and the URL of an image once."""
    format_, step_, rows, *_ = msgspec.msgpack.decode(encode_rank_batch(batch(sample())))
    assert (format_, step_) == ("pointillist.rank_batch.2", 4)
    trained = [False] * 6 + [True] * 3
    item = {"kind": "raw_mm_item", "family": "qwen_vl", "layout_fingerprint": "0" * 32, "payload": ITEM["payload"]}
    image = [item, SHA, URI, 0, 2]
    assert rows == [
        [
            list(range(9)), trained, [1.0 if on else 0.0 for on in trained], [-0.5 if on else 0.0 for on in trained],
            [3 if on else -1 for on in trained], [0.7 if on else 1.0 for on in trained], [1, 1] + [0] * 7, [9],
            [[image]], None, ["s"],
        ]
    ]  # fmt: skip
    assert list(rows[0][8][0][0][0]) == list(item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hash": "0" * 63}, r"image\[1\]: hash is not"),
        ({"uri": "file://host/a.png"}, r"image\[1\]: expected file:///"),
        ({"item": {**ITEM, "payload": None}}, r"image\[1\]: payload"),
        ({"item": {**ITEM, "kind": "other"}}, r"image\[1\]: descriptor has kind"),
        ({"item": {}}, r"image\[1\]: descriptor has keys"),
        ({"offset": -1}, r"image\[1\]: placeholder"),
    ],
)
def test_a_malformed_reference_is_refused_where_it_enters(change: dict[str, Any], message: str) -> None:
    """A foreign sender's; the trainer's reader would otherwise meet it in the middle of a step."""
    row = batch(sample(images=2)).micro_batches[0]
    first, second = row.mm_refs.images
    row = msgspec.structs.replace(row, mm_refs=MMRefs([first, msgspec.structs.replace(second, **change)]))
    bad = RankBatch(step=1, micro_batches=[row], num_tokens=1, orchestrator_state=b"")
    with pytest.raises(TransportError, match=message):
        decode_rank_batch(msgspec.msgpack.encode(bad))


def test_an_image_takes_few_bytes() -> None:
    refs = sample(images=4).mm_refs
    assert refs is not None
    assert encoded_image_bytes(refs) / 4 <= 512


@pytest.fixture(autouse=True)
def _run_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_KEY, "key of the tests")


@pytest.fixture(params=["filesystem", "zmq"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Sender, Callable[[int], Receiver]]]:
    """A sender for two ranks, and a way to make receivers."""
    paths, config = RunPaths(tmp_path), TransportConfig(type=request.param)
    sender = make_sender(config, paths, num_ranks=2, max_pending=2)
    if isinstance(sender, ZmqSender):
        config = TransportConfig(type="zmq", address=sender.address)
    yield sender, lambda rank: make_receiver(config, paths, rank)
    sender.close()


def step(number: int) -> list[RankBatch]:
    return [msgspec.structs.replace(batch(sample(f"{number}.{rank}")), step=number) for rank in range(2)]


def test_ranks_get_their_own_whole_steps_in_order(ends: Any) -> None:
    sender, receiver = ends
    ranks = [receiver(0), receiver(1)]
    for number in (1, 2, 3):
        sender.send(step(number))
        for rank, end in enumerate(ranks):
            assert end.receive(number) == step(number)[rank]
            end.discard_before(number)


def test_a_receiver_may_wait_before_there_is_anything(ends: Any) -> None:
    sender, receiver = ends
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(receiver(rank).receive, 1) for rank in range(2)]
        time.sleep(0.3)
        sender.send(step(1))
        assert [each.result(900) for each in waiting] == step(1)


def test_a_receiver_looks_at_files_less_often_the_longer_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, slept = RunPaths(tmp_path), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) >= 10:
            FilesystemSender(paths).send(step(1))

    monkeypatch.setattr(filesystem.time, "sleep", sleep)
    assert FilesystemReceiver(paths, 1).receive(1) == step(1)[1]
    assert slept[:10] == [0.01] * 10
    assert slept == sorted(slept)
    assert slept[-1] == 0.25
    assert all(late <= max(0.01, sum(slept[:place]) / 9.99) for place, late in enumerate(slept))
    assert len(slept) < 80


def test_a_receiver_that_restarts_loses_no_step(ends: Any) -> None:
    sender, receiver = ends
    sender.send(step(1))
    first = receiver(0)
    assert first.receive(1) == step(1)[0]
    sender.send(step(2))
    again = receiver(0)  # died while it trained
    assert again.receive(1) == step(1)[0]
    assert again.receive(2) == step(2)[0]


def test_a_sender_that_is_ahead_waits_for_the_slowest_rank(tmp_path: Path) -> None:
    sender = ZmqSender("tcp://127.0.0.1:0", num_ranks=2, max_pending=2)
    ranks = [ZmqReceiver(sender.address, rank) for rank in range(2)]
    with ThreadPoolExecutor() as pool:
        for number in (1, 2):
            sender.send(step(number))
        third = pool.submit(sender.send, step(3))
        ranks[0].discard_before(2)
        time.sleep(0.5)
        assert not third.done()
        ranks[1].discard_before(2)
        third.result(900)
    assert ranks[1].receive(3) == step(3)[1]
    sender.close()


def dealer(address: str, key: str | None) -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    if key is not None:
        secure_client(socket, key, max_bytes=2**30)
    socket.connect(address)
    return socket


NESTED = b"\x91" * 100_000 + b"\xc0"
FOREIGN: dict[str, list[bytes]] = {
    "noise": [b"\xff noise"],
    "empty": [b""],
    "two frames": [b"a", b"b"],
    "many frames": [b"a"] * 200,
    "nested": [b"\x91" * 4000 + b"\xc0"],
    "nested in an unknown field": [b"\x82\xa4type\xa5_Want\xa1z" + b"\x91" * 4000 + b"\xc0"],
    "array of 4e9": [b"\xdd\xff\xff\xff\xff"],
    "longer than allowed": [NESTED],
    "rank 99": [msgspec.msgpack.encode({"type": "_Want", "rank": 99, "step": 1})],
    "rank -1": [msgspec.msgpack.encode({"type": "_Want", "rank": -1, "step": 1})],
    "step 10**30": [b"\x83\xa4type\xa5_Done\xa4rank\x00\xa4step\xcf" + b"\xff" * 8],
    "done before a step that was not sent": [msgspec.msgpack.encode({"type": "_Done", "rank": 0, "step": 99})],
}


@pytest.mark.parametrize("key", ["right", "wrong", None])
def test_no_message_ends_the_listener(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_KEY, "right")
    sender = ZmqSender("tcp://127.0.0.1:0", num_ranks=1, max_pending=2)
    peers = []
    for frames in FOREIGN.values():
        peers.append(dealer(sender.address, key))
        peers[-1].send_multipart(frames)
    sender.send([step(1)[0]])
    rank = ZmqReceiver(sender.address, 0)
    assert rank.receive(1) == step(1)[0]
    sender.send([step(2)[0]])
    assert rank.receive(2) == step(2)[0]
    assert not any(peer.poll(0) for peer in peers)  # none of them got a batch
    for peer in peers:
        peer.close()
    sender.close()


def test_a_process_without_the_key_gets_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_KEY, "right")
    sender = ZmqSender("tcp://127.0.0.1:0", num_ranks=1, max_pending=2)
    good = ZmqReceiver(sender.address, 0)
    monkeypatch.setenv(RUN_KEY, "wrong")
    stranger = ZmqReceiver(sender.address, 0)
    with ThreadPoolExecutor() as pool:
        stolen = pool.submit(stranger.receive, 1)
        sender.send([step(1)[0]])
        assert good.receive(1) == step(1)[0]
        with pytest.raises(TimeoutError):
            stolen.result(3)
        # What the stranger waits for comes from whoever has its key; that ends the thread.
        port = sender.address
        sender.close()
        monkeypatch.setenv(RUN_KEY, "wrong")
        impostor = ZmqSender(port, num_ranks=1, max_pending=2)
        impostor.send([step(1)[0]])
        assert stolen.result(900) == step(1)[0]
        impostor.close()


def test_without_a_key_there_is_no_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_KEY)
    with pytest.raises(ConfigError, match=f"{RUN_KEY} should hold the run's key, one and the same word"):
        ZmqSender("tcp://127.0.0.1:0", num_ranks=1, max_pending=2)
    with pytest.raises(ConfigError, match=RUN_KEY):
        ZmqReceiver("tcp://127.0.0.1:1", 0)


def test_send_says_why_its_listener_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = ZmqSender("tcp://127.0.0.1:0", num_ranks=1, max_pending=1)
    sender.send([step(1)[0]])
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(sender.send, [step(2)[0]])  # no room
        monkeypatch.setattr(sender, "_answer", lambda: 1 / 0)
        with pytest.raises(TransportError, match=r"has ended: ZeroDivisionError"):
            waiting.result(900)
    with pytest.raises(TransportError, match=r"has ended: ZeroDivisionError"):
        sender.send([step(2)[0]])
    sender.close()


def test_a_rank_that_asks_for_a_step_that_will_never_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = ZmqSender("tcp://127.0.0.1:0", num_ranks=1, max_pending=2)
    sender.send([step(5)[0]])
    with pytest.raises(TransportError, match=r"rank 0 asks for step 3; kept steps: 5 to 5; the next is 6"):
        ZmqReceiver(sender.address, 0).receive(3)
    sender.close()


@pytest.mark.parametrize("frames", [[b"a"], [b"a", b"b"], [b"batch", NESTED], [b"batch", b""], [b"batch"] * 3, [b""]])
def test_a_malformed_answer_is_an_error_that_says_so(frames: list[bytes]) -> None:
    with pytest.raises(TransportError, match=r"malformed|not an orchestrator's answer"):
        _batch_of(frames)


def test_a_batch_file_that_is_none_is_an_error_that_says_so(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    (paths.rollout_step(1) / "rank_0.bin").mkdir(parents=True)
    paths.rollout_step(2).mkdir()
    for data in (b"", NESTED, b"\x93" + NESTED):
        (paths.rollout_step(2) / "rank_0.bin").write_bytes(data)
        with pytest.raises(TransportError, match="malformed"):
            FilesystemReceiver(paths, 0).receive(2)
    with pytest.raises(TransportError, match="batch of step 1 cannot be read"):
        FilesystemReceiver(paths, 0).receive(1)


def test_what_unpacks_to_more_than_allowed_is_never_unpacked() -> None:
    bomb = zlib.compress(b"\0" * 2**24)
    assert len(decompress(bomb, max_bytes=2**24, what="x")) == 2**24
    for bad, why in [(bomb, "more than 1000 bytes"), (bomb[:-4], "more than"), (b"x", "not x"), (b"", "do not end")]:
        with pytest.raises(TransportError, match=why):
            decompress(bad, max_bytes=1000, what="x")
    for bad in (zlib.compress(b"a")[:-2], zlib.compress(b"a") + b"more"):
        with pytest.raises(TransportError, match="do not end where they should"):
            decompress(bad, max_bytes=1000, what="x")


def test_packing_concatenates_and_rebases() -> None:
    rows = batch(sample("long", text=8, images=2), sample("short", images=1)).micro_batches
    assert len(rows) == 1
    row = rows[0]
    assert row.seq_lens == [14, 9]
    assert row.sample_ids == ["long", "short"]
    assert [image.offset for image in row.mm_refs.images] == [0, 3, 14]
    assert row.input_ids == [*range(14), *range(9)]
    assert row.temperatures == [0.7 if on else 1.0 for on in row.loss_mask]


def test_packing_fills_rows_and_ranks_evenly() -> None:
    samples = [sample(str(i), text=4 + i % 5, images=i % 3) for i in range(23)]
    ranks = pack(samples, seq_len=20, num_workers=3)
    assert len({len(rows) for rows in ranks}) == 1
    packed = [name for rows in ranks for row in rows for name in row.sample_ids]
    assert sorted(name for name in packed if not name.startswith("dummy")) == sorted(s.sample_id for s in samples)
    for rows in ranks:
        for row in rows:
            assert len(row.input_ids) <= 20
            if row.sample_ids[0].startswith("dummy"):
                assert not any(row.loss_mask)


def test_overlong_samples_are_never_cut() -> None:
    with pytest.raises(OverlongMultimodalSample, match="sample s has 9 tokens and 1 images, seq_len is 8"):
        pack([sample()], seq_len=8, num_workers=1)


def _refuse(micro_batch: MicroBatch, message: str) -> None:
    bad = RankBatch(step=1, micro_batches=[micro_batch], num_tokens=1, orchestrator_state=b"")
    with pytest.raises(TransportError, match=message):
        encode_rank_batch(bad)
    with pytest.raises(TransportError, match=message):  # and if a foreign sender did not look
        decode_rank_batch(msgspec.msgpack.encode(bad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_refs": None}, "image tokens but no mm_refs"),
        ({"mm_token_type_ids": [0] * 9}, "not image tokens"),
        ({"mm_token_type_ids": [1] * 9}, "without an image"),
        ({"mm_kwargs": {"pixel_values": [0.0]}}, "processed tensors do not travel"),
        ({"advantages": [0.0]}, "per-token lists"),
        ({"seq_lens": [8]}, "add up to 8"),
        ({"seq_lens": [9, 0]}, "add up"),
    ],
)
def test_refusals_on_both_ends_of_the_wire(change: dict[str, Any], message: str) -> None:
    row = batch(sample()).micro_batches[0]
    _refuse(msgspec.structs.replace(row, **change), message)


@pytest.mark.parametrize("seq_len", [64, 9])
def test_a_sample_is_trained_once_a_step(seq_len: int) -> None:
    """In one row, or in two rows of the same batch; samples without a name are not compared."""
    encode_rank_batch(batch(sample("a"), sample("b"), sample(""), sample(""), seq_len=seq_len))
    twice = batch(sample("a"), sample("b"), sample("a"), seq_len=seq_len)
    with pytest.raises(TransportError, match="step 4: sample a stands 2 times in one batch"):
        encode_rank_batch(twice)
    with pytest.raises(TransportError, match="sample a stands 2 times"):
        decode_rank_batch(msgspec.msgpack.encode(twice))


def test_two_families_in_one_row_are_refused() -> None:
    row = batch(sample(images=2)).micro_batches[0]
    first, second = row.mm_refs.images
    foreign = msgspec.structs.replace(second, item={**second.item, "family": "kimi_k25"})
    _refuse(msgspec.structs.replace(row, mm_refs=MMRefs([first, foreign])), "families .* expected one")


def test_samples_without_their_refs_are_refused() -> None:
    with pytest.raises(TransportError, match="no image token without an image"):
        check_lists(msgspec.structs.replace(sample(), mm_refs=None), sample().token_ids, "one")
    with pytest.raises(TransportError, match="mm_kwargs"):
        check_lists(msgspec.structs.replace(sample(), mm_kwargs={"pixel_values": 1}), sample().token_ids, "one")


@pytest.mark.parametrize("data", [b"", b"\x93", b"\x80\x04pickle", msgspec.msgpack.encode(["other", 1, [], 1, b""])])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(TransportError):
        decode_rank_batch(data)
