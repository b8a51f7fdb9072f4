"""From recorded branches to training samples: only sampled tokens are trained, every image keeps its reference."""

from pointillist.refs.mm_refs import build_mm_refs, mm_token_type_ids
from pointillist.rollouts import Branch
from pointillist.transport.types import TrainingSample, check_sample


def make_sample(branch: Branch, advantage: float, *, image_token_id: int, sample_id: str) -> TrainingSample:
    """The training sample of one branch.

    Args:
        branch: What was read and sampled.
        advantage: Of the rollout; every sampled token gets it.
        image_token_id: The placeholder.
        sample_id: To name it in messages.

    Raises:
        RefError: Images and image tokens do not cover each other.
        TransportError: The branch's lists do not fit together.
    """
    types = mm_token_type_ids(branch.token_ids, image_token_id)
    sample = TrainingSample(
        token_ids=branch.token_ids,
        loss_mask=branch.sampled,
        logprobs=branch.logprobs,
        advantages=[advantage if sampled else 0.0 for sampled in branch.sampled],
        weight_versions=branch.weight_versions,
        temperatures=branch.temperatures,
        mm_token_type_ids=types,
        mm_refs=build_mm_refs(
            [image.item for image in branch.images],
            [image.hash for image in branch.images],
            [{"offset": image.offset, "length": image.length} for image in branch.images],
            types,
        ),
        sample_id=sample_id,
    )
    check_sample(sample)
    return sample
