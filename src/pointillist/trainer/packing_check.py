"""Proof, before the first step, that packed samples do not see each other.

The wrong ways to pack leak across samples without any error, and a library update can turn a right way into a wrong
one. So the trainer packs two made-up samples with images into one row and compares with each alone. A row whose
samples are meant to see each other is the control: what it differs by is what a leak looks like in this model.
"""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from pointillist.errors import TrainingError
from pointillist.models import LoadedModel
from pointillist.pixels.on_device import as_tensors
from pointillist.refs import MMImageRef, MMRefs, mm_token_type_ids
from pointillist.trainer.policy_model import PolicyModel
from pointillist.trainer.rows import RowTensors, assemble_row
from pointillist.transport import MicroBatch

_IMAGE_SIDE = 96
_TEXT_TOKENS = 12
# A right packing differs by rounding, at most this part of what a leak does.
_ROUNDING_PART = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class PackingProof:
    """What the check saw; logprobs, maximum absolute difference from each sample alone."""

    packed: float
    padded: float
    leaking: float
    """Of the control, where the second sample reads the first."""

    @property
    def can_pack(self) -> bool:
        """Whether samples can share a row."""
        return self.packed <= _ROUNDING_PART * self.leaking


@torch.no_grad()
def check_packing(policy: PolicyModel, loaded: LoadedModel) -> PackingProof:
    """Packs two samples, and pads them, and compares with each alone.

    Raises:
        TrainingError: Not even padded samples are kept apart.
    """
    both = _row(loaded, [0, 1])
    alone = torch.cat([policy(_row(loaded, [seed])).logprobs for seed in (0, 1)])

    def difference(row: RowTensors) -> float:
        return float((policy(row).logprobs - alone).abs().max())

    proof = PackingProof(
        packed=difference(both),
        padded=difference(_row(loaded, [0, 1], packed=False)),
        leaking=difference(_made_to_leak(both)),
    )
    if not (proof.can_pack or proof.padded <= _ROUNDING_PART * proof.leaking):
        raise TrainingError(
            f"samples of one batch see each other: logprobs differ from each sample alone by {proof.packed:.2e} packed "
            f"and {proof.padded:.2e} padded, a deliberate leak by {proof.leaking:.2e}. This model, or this version of "
            "transformers, can not be trained in batches this way."
        )
    return proof


def _row(loaded: LoadedModel, seeds: Sequence[int], *, packed: bool = True) -> RowTensors:
    """Made-up samples: text, one image, text; all text is trained. Their lengths differ, so that padding has work."""
    family = loaded.family
    layout = family.layout(_IMAGE_SIDE, _IMAGE_SIDE)
    ids: list[int] = []
    seq_lens: list[int] = []
    refs: list[MMImageRef] = []
    pixels = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        text = random.integers(0, len(loaded.tokenizer), _TEXT_TOKENS * (seed + 1)).tolist()
        text = [token if token not in family.vision_token_ids else 0 for token in text]
        half = len(text) // 2
        refs.append(MMImageRef({}, "", "", len(ids) + half, layout.num_tokens))
        ids += [*text[:half], *[family.image_token_id] * layout.num_tokens, *text[half:]]
        seq_lens.append(len(text) + layout.num_tokens)
        pixels.append(random.integers(0, 256, (_IMAGE_SIDE, _IMAGE_SIDE, 3), dtype=np.uint8))
    types = mm_token_type_ids(ids, family.image_token_id)
    first_tokens = set(accumulate(seq_lens, initial=0))
    micro_batch = MicroBatch(
        input_ids=ids,
        loss_mask=[kind == 0 and index not in first_tokens for index, kind in enumerate(types)],
        advantages=[0.0] * len(ids),
        logprobs_sampled=[0.0] * len(ids),
        weight_versions=[0] * len(ids),
        temperatures=[1.0] * len(ids),
        mm_token_type_ids=types,
        seq_lens=seq_lens,
        mm_refs=MMRefs(refs),
    )
    patches = np.concatenate([family.patches(each, layout) for each in pixels])
    arrays = {"pixel_values": patches, **family.image_inputs([layout] * len(seeds))}
    return assemble_row(loaded, micro_batch, as_tensors(arrays), list(range(len(seeds))), packed=packed)


def _made_to_leak(row: RowTensors) -> RowTensors:
    """The same row with text positions that do not restart: one sample to the model."""
    positions = row.position_ids.clone()
    positions[0] = torch.arange(positions.shape[-1], device=positions.device)
    return dataclasses.replace(row, position_ids=positions)
