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
from pointillist.refs.mm_refs import IMAGE, VIDEO, MMImageRef, MMRefs, check_images, check_spans

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
    return _encoder.encode(msgspec.structs.replace(batch, micro_batches=[_to_wire(m) for m in batch.micro_batches]))


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
    try:
        batch = msgspec.structs.replace(batch, micro_batches=[_from_wire(m) for m in batch.micro_batches])
    except RefError as error:
        raise TransportError(f"training batch of step {batch.step}: {error}") from None
    _check_rank_batch(batch)
    return batch


def encoded_image_bytes(refs: MMRefs) -> int:
    """Bytes that the images of a sample take on the wire."""
    return len(_encoder.encode(MMRefs([_strip(image) for image in refs.images])))


def check_sample(sample: TrainingSample) -> None:
    """Checks the lists of a training sample before it is packed; its images were checked when they became `MMRefs`.

    Raises:
        TransportError: Processed tensors, lists of differing lengths, or image tokens without any reference.
    """
    per_token = (
        sample.loss_mask,
        sample.logprobs_sampled,
        sample.advantages,
        sample.weight_versions,
        sample.temperatures,
        sample.mm_token_type_ids,
    )
    _check_lists(
        sample.token_ids,
        per_token,
        sample.mm_kwargs,
        sample.mm_refs,
        sample.mm_token_type_ids,
        sample.sample_id,
    )


def check_micro_batch(micro_batch: MicroBatch) -> None:
    """Checks a micro batch on either side of the wire.

    Raises:
        TransportError: As `decode_rank_batch`.
    """
    m = micro_batch
    per_token = (
        m.loss_mask,
        m.advantages,
        m.logprobs_sampled,
        m.weight_versions,
        m.temperatures,
        m.mm_token_type_ids,
    )
    where = f"micro batch of {', '.join(m.sample_ids[:4])}"
    _check_lists(m.input_ids, per_token, m.mm_kwargs, m.mm_refs, m.mm_token_type_ids, where)
    if sum(m.seq_lens) != len(m.input_ids) or min(m.seq_lens, default=0) < 1:
        raise TransportError(f"{where}: seq_lens add up to {sum(m.seq_lens)}, the row has {len(m.input_ids)} tokens")
    if m.mm_refs is None:
        return
    try:
        check_spans(m.mm_refs.images, m.mm_token_type_ids)
    except RefError as error:
        raise TransportError(f"{where}: {error}") from None
    if len(families := {image.family for image in m.mm_refs.images}) > 1:
        raise TransportError(f"{where}: families {sorted(families)} in one micro batch, expected one")


def _check_rank_batch(batch: RankBatch) -> None:
    for micro_batch in batch.micro_batches:
        check_micro_batch(micro_batch)
    # A sample that is trained twice weighs twice in its step. Samples need no name; those without one can not be told.
    names = Counter(name for micro_batch in batch.micro_batches for name in micro_batch.sample_ids if name)
    for name, count in names.items():
        if count > 1:
            raise TransportError(f"step {batch.step}: sample {name} stands {count} times in one batch, expected once")


def _check_lists(
    token_ids: list[int],
    per_token: tuple[list[int] | list[float] | list[bool], ...],
    mm_kwargs: object,
    mm_refs: MMRefs | None,
    token_types: list[int],
    where: str,
) -> None:
    if mm_kwargs is not None:
        raise TransportError(f"{where}: mm_kwargs is set: processed tensors do not travel, send mm_refs")
    if lengths := {len(values) for values in per_token} - {len(token_ids)}:
        raise TransportError(f"{where}: per-token lists have lengths {sorted(lengths)}, expected {len(token_ids)}")
    if mm_refs is None and (IMAGE in token_types or VIDEO in token_types):
        raise TransportError(f"{where}: image tokens but no mm_refs: no image token without an image")


def _strip(image: MMImageRef) -> MMImageRef:
    if image.item.get("raw_image_uri") != image.uri:
        raise TransportError("mm_refs: item.raw_image_uri and uri name different files")
    return msgspec.structs.replace(image, item={k: v for k, v in image.item.items() if k != "raw_image_uri"})


def _to_wire(micro_batch: MicroBatch) -> MicroBatch:
    if micro_batch.mm_refs is None:
        return micro_batch
    return msgspec.structs.replace(micro_batch, mm_refs=MMRefs([_strip(image) for image in micro_batch.mm_refs.images]))


def _from_wire(micro_batch: MicroBatch) -> MicroBatch:
    if micro_batch.mm_refs is None:
        return micro_batch
    images = [
        msgspec.structs.replace(image, item={**image.item, "raw_image_uri": image.uri})
        for image in micro_batch.mm_refs.images
    ]
    check_images(images)
    return msgspec.structs.replace(micro_batch, mm_refs=MMRefs(images))
