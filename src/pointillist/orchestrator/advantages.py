"""Group-relative advantages."""

import math
from collections.abc import Sequence
from typing import Final

_EPSILON: Final = 1e-3
_SAME: Final = 1e-8


def group_advantages(rewards: Sequence[float], *, normalize_std: bool) -> list[float] | None:
    """Advantage of each rollout over its group's mean.

    Args:
        rewards: Of the rollouts of one task, each within plus or minus 1e9.
        normalize_std: Divide by the group's standard deviation too, as GRPO does (DeepSeekMath, arXiv 2402.03300,
            section 4.1.2); without it the mean is the only baseline (Dr. GRPO, arXiv 2503.20783).

    Returns:
        Advantages, or None for a group whose rewards are all the same: it says nothing.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if max(map(abs, centred)) < _SAME * max(1.0, *map(abs, rewards)):
        return None
    if not normalize_std:
        return centred
    std = math.sqrt(sum(value * value for value in centred) / max(1, len(rewards) - 1))
    return [value / (std + _EPSILON) for value in centred]
