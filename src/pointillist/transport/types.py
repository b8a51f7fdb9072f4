"""What travels from the orchestrator to the trainer: msgpack arrays, no pickle, no pixels.

Fields are positional on the wire (`array_like`), so their order is the format; `FORMAT` is checked first. All lists
named "per token" have the length of `token_ids` or `input_ids`.

The URL of an image is written once: `MMImageRef.item` leaves it out while it is on the wire, and gets it back when
it is read.
"""

from collections import Counter
from typing import Final

import msgspec

from pointillist.errors import RefError, TransportError
from pointillist.refs.mm_refs import IMAGE, VIDEO, MMRefs, check_images, check_spans

FORMAT: Final = "pointillist.rank_batch.2"


class TrainingSample(msgspec.Struct, array_like=True, kw_only=True):
    """One branch of a rollout."""

    token_ids: list[int]
    loss_mask: list[bool]
    """Per token: sampled by the policy, so it is trained."""
    logprobs_sampled: list[float]
    """Per token: the sampler's, at the sampling temperature; 0 where `loss_mask` is false."""
    advantages: list[float]
    """Per token; 0 where `loss_mask` is false."""
    weight_versions: list[int]
    """Per token: version of the weights that sampled it; -1 where `loss_mask` is false."""
    temperatures: list[float]
    """Per token: what the logits were divided by; 1 where `loss_mask` is false."""
    mm_token_type_ids: list[int]
    """Per token: 0 text, 1 image, 2 video."""
    mm_refs: MMRefs | None = None
    mm_kwargs: object = None
    """Refused unless None: processed tensors do not travel."""
    sample_id: str = ""


class MicroBatch(msgspec.Struct, array_like=True, kw_only=True):
    """Several samples packed into one row."""

    input_ids: list[int]
    loss_mask: list[bool]
    advantages: list[float]
    logprobs_sampled: list[float]
    weight_versions: list[int]
    temperatures: list[float]
    """Per token."""
    mm_token_type_ids: list[int]
    seq_lens: list[int]
    """Lengths of the samples, in order; they add up to the row."""
    mm_refs: MMRefs | None = None
    mm_kwargs: object = None
    """Refused unless None: processed tensors do not travel."""
    sample_ids: list[str] = []


class RankBatch(msgspec.Struct, array_like=True, kw_only=True):
    """All micro batches of one step for one data-parallel rank."""

    format: str = FORMAT
    step: int
    micro_batches: list[MicroBatch]
    num_tokens: int
    """Sampled tokens of the whole step, all ranks and the dropped zero-variance groups included: what the loss is
    divided by, so that a step's gradient does not grow as more groups agree with themselves."""
    orchestrator_state: bytes
    """What the orchestrator needs to continue after this step; the trainer keeps it in its checkpoint."""
    is_last: bool = False
    """Training ends with this step, before `max_steps`: the tasks are solved. The batch may be empty."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RankBatch)


def encode_rank_batch(batch: RankBatch) -> bytes:
    """Bytes of a batch.

    Raises:
        TransportError: A batch that the trainer would refuse.
    """
    _check_rank_batch(batch)
    micro_batches = [
        row if row.mm_refs is None else msgspec.structs.replace(row, mm_refs=_without_urls(row.mm_refs))
        for row in batch.micro_batches
    ]
    return _encoder.encode(msgspec.structs.replace(batch, micro_batches=micro_batches))


def decode_rank_batch(data: bytes) -> RankBatch:
    """The batch that `encode_rank_batch` wrote.

    Raises:
        TransportError: Not such bytes, a sample that stands in it twice, or a micro batch with processed tensors, with
            lists of differing lengths, with a malformed reference, or with image tokens and references that do not
            cover each other.
    """
    try:
        batch = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # the last of deep nesting
        raise TransportError(f"training batch is malformed ({error})") from None
    if batch.format != FORMAT:
        raise TransportError(f"training batch has format {batch.format!r}, expected {FORMAT!r}")
    for row in batch.micro_batches:
        if row.mm_refs is None:
            continue
        images = [
            msgspec.structs.replace(image, item={**image.item, "raw_image_uri": image.uri})
            for image in row.mm_refs.images
        ]
        try:
            check_images(images)
        except RefError as error:
            raise TransportError(f"training batch of step {batch.step}: {error}") from None
        row.mm_refs = MMRefs(images)
    _check_rank_batch(batch)
    return batch


def encoded_image_bytes(refs: MMRefs) -> int:
    """Bytes that the images of a sample take on the wire."""
    return len(_encoder.encode(_without_urls(refs)))


def check_lists(batch: TrainingSample | MicroBatch, token_ids: list[int], where: str) -> None:
    """Checks the lists of a sample or of a row against its tokens.

    Args:
        batch: A sample, whose images were checked when they became `MMRefs`, or a row.
        token_ids: Its tokens.
        where: Names it in errors.

    Raises:
        TransportError: Processed tensors, lists of differing lengths, or image tokens without any reference.
    """
    if batch.mm_kwargs is not None:
        raise TransportError(f"{where}: mm_kwargs is set: processed tensors do not travel, send mm_refs")
    per_token: tuple[list[int] | list[float] | list[bool], ...] = (
        batch.loss_mask,
        batch.advantages,
        batch.logprobs_sampled,
        batch.weight_versions,
        batch.temperatures,
        batch.mm_token_type_ids,
    )
    if lengths := {len(values) for values in per_token} - {len(token_ids)}:
        raise TransportError(f"{where}: per-token lists have lengths {sorted(lengths)}, expected {len(token_ids)}")
    if batch.mm_refs is None and (IMAGE in batch.mm_token_type_ids or VIDEO in batch.mm_token_type_ids):
        raise TransportError(f"{where}: image tokens but no mm_refs: no image token without an image")


def _check_rank_batch(batch: RankBatch) -> None:
    """Checks a batch on either side of the wire, but for the form of its images.

    Raises:
        TransportError: As `decode_rank_batch`.
    """
    for row in batch.micro_batches:
        where, length = f"micro batch of {', '.join(row.sample_ids[:4])}", len(row.input_ids)
        check_lists(row, row.input_ids, where)
        if sum(row.seq_lens) != length or min(row.seq_lens, default=0) < 1:
            raise TransportError(f"{where}: seq_lens add up to {sum(row.seq_lens)}, the row has {length} tokens")
        if row.mm_refs is None:
            continue
        try:
            check_spans(row.mm_refs.images, row.mm_token_type_ids)
        except RefError as error:
            raise TransportError(f"{where}: {error}") from None
        if len(families := {str(image.item["family"]) for image in row.mm_refs.images}) > 1:
            raise TransportError(f"{where}: families {sorted(families)} in one micro batch, expected one")
    # A sample that is trained twice weighs twice in its step. Samples need no name; those without one can not be told.
    names = Counter(name for row in batch.micro_batches for name in row.sample_ids if name)
    for name, count in names.items():
        if count > 1:
            raise TransportError(f"step {batch.step}: sample {name} stands {count} times in one batch, expected once")


def _without_urls(refs: MMRefs) -> MMRefs:
    """Images as they are on the wire, where `item` leaves out the URL that stands beside it."""
    images = []
    for image in refs.images:
        if image.item.get("raw_image_uri") != image.uri:
            raise TransportError("mm_refs: item.raw_image_uri and uri name different files")
        item = {key: value for key, value in image.item.items() if key != "raw_image_uri"}
        images.append(msgspec.structs.replace(image, item=item))
    return MMRefs(images)
