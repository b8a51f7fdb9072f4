from typing import Any

import msgspec
import pytest

from pointillist.config import RunPaths
from pointillist.errors import TransportError
from pointillist.orchestrator.packing import OverlongMultimodalSample, pack
from pointillist.refs import MMImageRef, MMRefs, RawImageDescriptor
from pointillist.transport import (
    FilesystemReceiver,
    FilesystemSender,
    MicroBatch,
    RankBatch,
    TrainingSample,
    decode_rank_batch,
    encode_rank_batch,
)
from pointillist.transport.types import check_sample, encoded_image_bytes

SHA = "ab" * 32
URI = f"file:///data/outputs/run_20261124/assets/images/ab/{SHA}.png"
ITEM = RawImageDescriptor(
    family="qwen_vl", raw_image_uri=URI, layout_fingerprint="0" * 32, payload={"image_grid_thw": [1, 4, 4]}
).to_dict()


def sample(name: str = "s", text: int = 6, images: int = 1) -> TrainingSample:
    """Images of two tokens each, then text, of which the second half is sampled."""
    types = [1, 1, 0] * images + [0] * text
    length = len(types)
    trained = [index >= length - text // 2 for index in range(length)]
    return TrainingSample(
        token_ids=list(range(length)),
        loss_mask=trained,
        logprobs=[-0.5 if on else 0.0 for on in trained],
        advantages=[1.0 if on else 0.0 for on in trained],
        weight_versions=[3 if on else -1 for on in trained],
        temperatures=[0.7 if on else 1.0 for on in trained],
        mm_token_type_ids=types,
        mm_refs=MMRefs([MMImageRef(ITEM, SHA, URI, 3 * i, 2) for i in range(images)]) if images else None,
        sample_id=name,
    )


def batch(*samples: TrainingSample, seq_len: int = 64) -> RankBatch:
    (rows,) = pack(samples, seq_len=seq_len, num_workers=1)
    return RankBatch(step=4, micro_batches=rows, num_tokens=9, orchestrator_state=b"{}")


def test_round_trip() -> None:
    original = batch(sample(), sample("t", images=0), sample("u", images=3))
    assert decode_rank_batch(encode_rank_batch(original)) == original


def test_an_image_takes_few_bytes() -> None:
    refs = sample(images=4).mm_refs
    assert refs is not None
    assert encoded_image_bytes(refs) / 4 <= 512


def test_filesystem_delivers_whole_steps(tmp_path: Any) -> None:
    paths = RunPaths(tmp_path)
    FilesystemSender(paths).send([batch(sample("a")), batch(sample("b"))])
    assert FilesystemReceiver(paths, 1).receive(4).micro_batches[0].sample_ids == ["b"]
    files = sorted(path.name for path in paths.rollout_step(4).iterdir())
    assert files == ["rank_0.bin", "rank_1.bin"]
    FilesystemReceiver(paths, 0).discard_before(5)
    assert [path.name for path in paths.rollout_step(4).iterdir()] == ["rank_1.bin"]


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


def test_two_families_in_one_row_are_refused() -> None:
    row = batch(sample(images=2)).micro_batches[0]
    first, second = row.mm_refs.images
    foreign = msgspec.structs.replace(second, item={**second.item, "family": "kimi_k25"})
    _refuse(msgspec.structs.replace(row, mm_refs=MMRefs([first, foreign])), "families .* expected one")


def test_samples_without_their_refs_are_refused() -> None:
    with pytest.raises(TransportError, match="no image token without an image"):
        check_sample(msgspec.structs.replace(sample(), mm_refs=None))
    with pytest.raises(TransportError, match="mm_kwargs"):
        check_sample(msgspec.structs.replace(sample(), mm_kwargs={"pixel_values": 1}))


@pytest.mark.parametrize("data", [b"", b"\x93", b"\x80\x04pickle", msgspec.msgpack.encode(["other", 1, [], 1, b""])])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(TransportError):
        decode_rank_batch(data)
