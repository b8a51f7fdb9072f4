"""Samples into rows: first fit, longest first, equal numbers of rows for every rank.

Samples of equal length keep their order, so the rollouts of a group mostly share a row, and with it the encoding of
their images. A multimodal sample is never cut.
"""

from collections.abc import Sequence
from itertools import chain

import msgspec

from pointillist.errors import TransportError
from pointillist.refs.mm_refs import MMRefs
from pointillist.transport.types import MicroBatch, TrainingSample


class OverlongMultimodalSample(TransportError):
    """A sample with images that is longer than a row; cutting it would cut images from their tokens."""

    def __init__(self, sample: TrainingSample, seq_len: int) -> None:
        images = len(sample.mm_refs.images) if sample.mm_refs else 0
        super().__init__(
            f"sample {sample.sample_id} has {len(sample.token_ids)} tokens and {images} images, seq_len is {seq_len}"
        )


def pack(samples: Sequence[TrainingSample], *, seq_len: int, num_workers: int) -> list[list[MicroBatch]]:
    """Packs samples into rows of at most `seq_len` tokens.

    Args:
        samples: Samples of a step, at least one.
        seq_len: Number of tokens of the longest row.
        num_workers: Number of data-parallel ranks.

    Returns:
        The rows of each rank. Every rank has equally many; where needed, rows without loss fill up.

    Example:
        Samples of 5, 3, 3 and 2 tokens, `seq_len` 8, two ranks: the rows are `5 + 3` and `3 + 2`, one for each rank.
        The first has `seq_lens` `[5, 3]`, and an image at offset 1 of its second sample has offset 6 in the row.

    Raises:
        OverlongMultimodalSample: A sample is longer than a row.

    Example: samples of 3, 6 and 5 tokens, rows of 9 and two workers give `[[row of 6 + 3], [row of 5]]`; an image at
    offset 1 of the sample of 3 tokens lies at offset 7 of its row.
    """
    rows: list[list[TrainingSample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.token_ids)):
        length = len(sample.token_ids)
        if length > seq_len:
            raise OverlongMultimodalSample(sample, seq_len)
        place = next((index for index, left in enumerate(room) if left >= length), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(seq_len)
        rows[place].append(sample)
        room[place] -= length
    micro_batches = [_concatenate(row) for row in rows]
    while len(micro_batches) % num_workers:
        micro_batches.append(_dummy(rows[0][-1]))
    return [micro_batches[rank::num_workers] for rank in range(num_workers)]


def _concatenate(samples: Sequence[TrainingSample]) -> MicroBatch:
    images = []
    start = 0
    for sample in samples:
        if sample.mm_refs is not None:
            images += [image.moved(start) for image in sample.mm_refs.images]
        start += len(sample.token_ids)
    return MicroBatch(
        input_ids=list(chain.from_iterable(sample.token_ids for sample in samples)),
        loss_mask=list(chain.from_iterable(sample.loss_mask for sample in samples)),
        advantages=list(chain.from_iterable(sample.advantages for sample in samples)),
        logprobs_sampled=list(chain.from_iterable(sample.logprobs_sampled for sample in samples)),
        weight_versions=list(chain.from_iterable(sample.weight_versions for sample in samples)),
        temperatures=list(chain.from_iterable(sample.temperatures for sample in samples)),
        mm_token_type_ids=list(chain.from_iterable(sample.mm_token_type_ids for sample in samples)),
        seq_lens=[len(sample.token_ids) for sample in samples],
        mm_refs=MMRefs(images) if images else None,
        sample_ids=[sample.sample_id for sample in samples],
    )


def _dummy(sample: TrainingSample) -> MicroBatch:
    """A row that trains nothing: a rank without work still takes part in every collective, images included."""
    without_loss = msgspec.structs.replace(
        sample,
        loss_mask=[False] * len(sample.token_ids),
        advantages=[0.0] * len(sample.token_ids),
        sample_id=f"dummy of {sample.sample_id}",
    )
    return _concatenate([without_loss])
