"""From a micro batch of references to the tensors of one forward pass.

An image that a row holds several times (the rollouts of a group share their prompt) is materialised once and encoded
once; `image_index` says which of the distinct images stands behind each span.
"""

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Final, Literal

import msgspec
import torch
from torch.nn.utils.rnn import pad_sequence

from pointillist.errors import MissingImageError, RefError
from pointillist.models import LoadedModel, sample_positions
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.cache import LoadedImage
from pointillist.pixels.on_device import as_tensors
from pointillist.refs import MMImageRef, MMRefs
from pointillist.transport import MicroBatch

_ANY_TEXT: Final = 0
"""Token id in the place of an image that no image can be; its sample has no loss."""


@dataclass(frozen=True, slots=True)
class RowTensors:
    """Samples of one forward pass, packed into one row or padded into several.

    Tensors named "per trained token" have length `trained`, in token order.
    """

    input_ids: torch.Tensor
    """int64 `(rows, columns)`; packed: one row."""
    mm_token_type_ids: torch.Tensor
    """int32 `(rows, columns)`; 0 text and padding, 1 image."""
    attention_mask: torch.Tensor | None
    """None for a packed row; int64 `(rows, columns)` for padded samples, 0 where a column is padding."""
    position_ids: torch.Tensor
    """int64. MRoPE families: `(3, rows, columns)`, time, height, width; packed, a row of text positions that restart
    per sample comes before them. Others: `(rows, columns)`, restarting per sample. The restarts keep samples apart."""
    images: dict[str, torch.Tensor]
    """Image arguments of the model's `forward`, of the distinct images; empty without any. `pixel_values` are uint8
    patches `(patches, 3, ...)`; the policy normalises them on the device. Images without an `image_index` are there
    for the vision tower to be run at all."""
    image_index: list[int]
    """Per image span of the row, in order: index of its distinct image."""
    predict_from: torch.Tensor
    """int64, per trained token: flat index (row * columns + column) of the token before it, which predicts it."""
    targets: torch.Tensor
    """int64, per trained token: its id."""
    advantages: torch.Tensor
    """float32, per trained token."""
    logprobs_sampled: torch.Tensor
    """float32, per trained token."""
    temperatures: torch.Tensor
    """float32, per trained token."""
    weight_versions: torch.Tensor
    """int64, per trained token."""


@dataclass(frozen=True, slots=True)
class ImageFault:
    """An image of a sample that could not be had; the sample trains nothing."""

    sample_id: str
    uri: str
    sha256: str
    message: str
    corrupt: bool
    """The file or its reference is damaged; False: the file is not there."""


@dataclass(slots=True)
class ImageCounts:
    """What became of the images and samples of a step, on this rank."""

    images_total: int = 0
    """Image spans."""
    images_missing: int = 0
    images_corrupt: int = 0
    images_constant: int = 0
    """Distinct images a row that show (nearly) one colour only."""
    images_materialized: int = 0
    """Distinct images a row."""
    images_decoded: int = 0
    """Of these, those that were in no cache."""
    image_bytes: int = 0
    """Bytes of their tensors."""
    samples_zeroed: int = 0
    samples_quarantined: int = 0
    materialize_seconds: float = 0.0

    def add(self, other: "ImageCounts") -> None:
        """Adds another row's counts to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def numbers(self) -> dict[str, float]:
        """All counts by name."""
        return {name: float(value) for name, value in asdict(self).items()}


class RowLoader:
    """Materialises micro batches for one model.

    A missing image costs its sample the loss (`placeholder_zero_loss`) or stops the run (`error`). A corrupt one, whose
    bytes or layout are not what the reference says, always costs its sample the loss and is reported. The image's
    place is held by zeros, and samples packed beside it train as if nothing had happened.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        materializer: RawImageMaterializer,
        missing_image_policy: Literal["placeholder_zero_loss", "error"] = "placeholder_zero_loss",
        *,
        always_images: bool = False,
    ) -> None:
        """Prepares.

        Args:
            loaded: The model.
            materializer: Of its family.
            missing_image_policy: What a missing image means.
            always_images: Whether a row without images gets one that nothing depends on: ranks that share the model
                wait for each other in the vision tower, so all of them must go through it.
        """
        self.packed = True
        """Whether samples share a row; False pads them, for models that can not keep packed samples apart."""
        self._loaded = loaded
        self._materializer = materializer
        self._missing_image_policy = missing_image_policy
        self._always_images = always_images
        self._counts = ImageCounts()
        self._faults: list[ImageFault] = []

    def take_counts(self) -> tuple[ImageCounts, list[ImageFault]]:
        """Counts and faults since the last call."""
        taken = self._counts, self._faults
        self._counts, self._faults = ImageCounts(), []
        return taken

    def load(self, micro_batch: MicroBatch) -> RowTensors:
        """Tensors of a micro batch, on the model's device.

        Raises:
            MissingImageError: A file is not there and the policy is `error`.
        """
        if micro_batch.mm_refs is None:
            return assemble_row(self._loaded, micro_batch, self._idle_image(), [], packed=self.packed)
        started = time.perf_counter()
        spans = micro_batch.mm_refs.images
        decoded_before = self._materializer.cache.counts.misses
        batch = self._materializer.materialize_many(spans)
        if self._missing_image_policy == "error":
            for error in batch.errors.values():
                if isinstance(error, MissingImageError):
                    raise error
        arrays = self._materializer.tensors(batch.images, "uint8")
        self._counts.images_total += len(spans)
        self._counts.images_materialized += len(batch.images) - len(batch.errors)
        self._counts.images_constant += sum(image.constant for image in batch.images)
        self._counts.images_decoded += self._materializer.cache.counts.misses - decoded_before
        self._counts.image_bytes += sum(array.nbytes for array in arrays.values())
        index = batch.index
        if batch.errors:
            micro_batch = self._without_loss(micro_batch, spans, batch.errors)
            unfit = {i for i in batch.errors if batch.images[index[i]].layout.num_tokens != spans[i].length}
            micro_batch = _without_images(micro_batch, spans, unfit)
            index = [which for i, which in enumerate(index) if i not in unfit]
        self._counts.materialize_seconds += time.perf_counter() - started
        return assemble_row(self._loaded, micro_batch, as_tensors(arrays), index, packed=self.packed)

    def _idle_image(self) -> dict[str, torch.Tensor]:
        if not self._always_images:
            return {}
        layout = self._loaded.family.placeholder_layout(1)
        return as_tensors(self._materializer.tensors([LoadedImage(None, layout)], "uint8"))

    def _without_loss(
        self, micro_batch: MicroBatch, images: list[MMImageRef], errors: Mapping[int, RefError | MissingImageError]
    ) -> MicroBatch:
        """The row with no loss on samples that hold a faulty image.

        Args:
            micro_batch: The row.
            images: Its image spans.
            errors: What is wrong, by index of the image span.
        """
        bounds = list(accumulate(micro_batch.seq_lens, initial=0))
        names = micro_batch.sample_ids or [f"{index}" for index in range(len(micro_batch.seq_lens))]
        corrupt_samples: set[int] = set()
        missing_samples: set[int] = set()
        for index, error in errors.items():
            image = images[index]
            sample = bisect_right(bounds, image.offset) - 1
            corrupt = isinstance(error, RefError)
            (corrupt_samples if corrupt else missing_samples).add(sample)
            self._counts.images_corrupt += corrupt
            self._counts.images_missing += not corrupt
            self._faults.append(ImageFault(names[sample], image.uri, image.hash, str(error), corrupt))
        self._counts.samples_quarantined += len(corrupt_samples)
        self._counts.samples_zeroed += len(missing_samples - corrupt_samples)
        loss_mask, advantages = list(micro_batch.loss_mask), list(micro_batch.advantages)
        for sample in corrupt_samples | missing_samples:
            for token in range(bounds[sample], bounds[sample + 1]):
                loss_mask[token], advantages[token] = False, 0.0
        return msgspec.structs.replace(micro_batch, loss_mask=loss_mask, advantages=advantages)


def _without_images(micro_batch: MicroBatch, images: list[MMImageRef], unfit: set[int]) -> MicroBatch:
    """The row with text in the place of some images: those for which no image has so many tokens.

    Args:
        micro_batch: The row; the samples of these images have no loss.
        images: Its image spans.
        unfit: Which of them, by index.
    """
    if not unfit:
        return micro_batch
    ids, types = list(micro_batch.input_ids), list(micro_batch.mm_token_type_ids)
    for index in unfit:
        for token in range(images[index].offset, images[index].offset + images[index].length):
            ids[token], types[token] = _ANY_TEXT, 0
    kept = MMRefs([image for index, image in enumerate(images) if index not in unfit])
    return msgspec.structs.replace(micro_batch, input_ids=ids, mm_token_type_ids=types, mm_refs=kept)


def assemble_row(
    loaded: LoadedModel,
    micro_batch: MicroBatch,
    images: dict[str, torch.Tensor],
    image_index: list[int],
    *,
    packed: bool,
) -> RowTensors:
    """Puts the samples of a micro batch together.

    Args:
        loaded: The model.
        micro_batch: Its tokens and where its images lie.
        images: Image arguments of `forward`, of the distinct images.
        image_index: Per image span: index of its distinct image.
        packed: One row of all samples, or one padded row a sample.

    Example: samples of 3 and 2 tokens whose last tokens are trained. Packed, `input_ids` is `(1, 5)`, text positions
    are `[0, 1, 2, 0, 1]` and `predict_from` is `[1, 3]`; padded, `input_ids` is `(2, 3)` and `predict_from` is `[1, 3]`
    too, the second row's first column.
    """
    device = loaded.device
    trained = [index for index, on in enumerate(micro_batch.loss_mask) if on]
    ids = list(torch.tensor(micro_batch.input_ids).split(micro_batch.seq_lens))
    types = list(torch.tensor(micro_batch.mm_token_type_ids).split(micro_batch.seq_lens))
    positions = _positions(loaded, micro_batch, ids, types, images.get("image_grid_thw"), image_index)
    if packed:
        input_ids, token_types, mask = torch.cat(ids)[None], torch.cat(types)[None], None
        position_ids = _packed_positions(positions)
        before = [index - 1 for index in trained]
    else:
        input_ids, token_types = pad_sequence(ids, batch_first=True), pad_sequence(types, batch_first=True)
        position_ids = _padded_positions(positions)
        mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).to(device)
        before = _padded_indices(micro_batch.seq_lens, trained, input_ids.shape[1])

    def per_trained(values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([values[index] for index in trained], dtype=dtype, device=device)

    return RowTensors(
        input_ids=input_ids.to(device),
        mm_token_type_ids=token_types.int().to(device),
        attention_mask=mask,
        position_ids=position_ids.to(device),
        images={name: tensor.to(device) for name, tensor in images.items()},
        image_index=image_index,
        predict_from=torch.tensor(before, dtype=torch.int64, device=device),
        targets=per_trained(micro_batch.input_ids, torch.int64),
        advantages=per_trained(micro_batch.advantages, torch.float32),
        logprobs_sampled=per_trained(micro_batch.logprobs_sampled, torch.float32),
        temperatures=per_trained(micro_batch.temperatures, torch.float32),
        weight_versions=per_trained(micro_batch.weight_versions, torch.int64),
    )


def _positions(
    loaded: LoadedModel,
    micro_batch: MicroBatch,
    ids: list[torch.Tensor],
    types: list[torch.Tensor],
    grids: torch.Tensor | None,
    image_index: list[int],
) -> list[torch.Tensor]:
    """Positions of each sample alone, `(3 or 1, tokens)` each."""
    offsets = [image.offset for image in micro_batch.mm_refs.images] if micro_batch.mm_refs else []
    positions, start = [], 0
    for sample_ids, sample_types in zip(ids, types, strict=True):
        end = start + len(sample_ids)
        mine = [which for which, offset in zip(image_index, offsets, strict=True) if start <= offset < end]
        own_grids = grids[mine] if grids is not None and mine else None
        policy = loaded.family.forward_args
        positions.append(sample_positions(loaded.model, policy, sample_ids, sample_types, own_grids))
        start = end
    return positions


def _packed_positions(positions: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat(positions, dim=1)
    if len(rows) == 1:
        return rows
    text = torch.cat([torch.arange(each.shape[1]) for each in positions])
    return torch.cat([text[None], rows])[:, None]


def _padded_positions(positions: list[torch.Tensor]) -> torch.Tensor:
    padded = pad_sequence([each.T for each in positions], batch_first=True).permute(2, 0, 1)
    return padded if len(padded) > 1 else padded[0]


def _padded_indices(lengths: list[int], trained: list[int], columns: int) -> list[int]:
    """Flat indices in the padded rows of the tokens before the trained ones."""
    starts = list(accumulate(lengths, initial=0))
    rows = [bisect_right(starts, index) - 1 for index in trained]
    return [row * columns + index - starts[row] - 1 for row, index in zip(rows, trained, strict=True)]
