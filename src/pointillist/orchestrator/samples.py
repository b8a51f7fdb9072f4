"""From recorded branches to training samples: only sampled tokens are trained, every image keeps its reference."""

import math

import msgspec

from pointillist.errors import TransportError
from pointillist.refs.mm_refs import checked_refs, mm_token_type_ids
from pointillist.sessions import Branch
from pointillist.transport.types import TrainingSample, check_sample


def with_advantage(sample: TrainingSample, advantage: float) -> TrainingSample:
    """The sample with another advantage of its sampled tokens."""
    return msgspec.structs.replace(sample, advantages=[advantage if on else 0.0 for on in sample.loss_mask])


def make_sample(branch: Branch, advantage: float, *, image_token_id: int, sample_id: str) -> TrainingSample:
    """The training sample of one branch, in which an environment may have put anything.

    Args:
        branch: What was read and sampled.
        advantage: Of the rollout; every sampled token gets it.
        image_token_id: The placeholder.
        sample_id: To name it in messages.

    Raises:
        RefError: Images and image tokens do not cover each other.
        TransportError: The branch's lists do not fit together, or hold what they should not.
    """
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(branch), type=Branch)
        if not math.isfinite(sum(branch.logprobs_sampled)):
            raise TransportError(f"sample {sample_id}: a logprob is not finite")
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise TransportError(f"sample {sample_id}: the record of the rollout is damaged ({error})") from None
    types = mm_token_type_ids(branch.token_ids, image_token_id)
    sample = TrainingSample(
        token_ids=branch.token_ids,
        loss_mask=branch.loss_mask,
        logprobs_sampled=branch.logprobs_sampled,
        advantages=[advantage if sampled else 0.0 for sampled in branch.loss_mask],
        weight_versions=branch.weight_versions,
        temperatures=branch.temperatures,
        mm_token_type_ids=types,
        mm_refs=checked_refs(branch.images, types),
        sample_id=sample_id,
    )
    check_sample(sample)
    return sample
