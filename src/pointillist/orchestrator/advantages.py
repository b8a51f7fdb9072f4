"""Group-relative advantages."""

import math
from collections.abc import Sequence
from typing import Final

_EPSILON: Final = 1e-3
_SAME: Final = 1e-8


def group_advantages(rewards: Sequence[float], *, normalize_std: bool) -> list[float] | None:
    """Advantage of each rollout over its group's mean.

    Args:
        rewards: Rewards of the `G` rollouts of one task, each within plus or minus 1e9.
        normalize_std: Whether advantages are also divided by the group's standard deviation, as in GRPO (DeepSeekMath,
            arXiv 2402.03300, section 4.1.2); otherwise only the mean is subtracted (Dr. GRPO, arXiv 2503.20783).

    Returns:
        `G` advantages, whose sum is 0, or None for a group whose rewards are all the same: no rollout is better.

    Example:
        Rewards `[1, 0, 0, 0]`: the mean is 0.25 and the standard deviation (over `G - 1`) is 0.5. Advantages are
        `[0.75, -0.25, -0.25, -0.25]`, divided by 0.5 + 0.001 about `[1.497, -0.499, -0.499, -0.499]`.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if max(map(abs, centred)) < _SAME * max(1.0, *map(abs, rewards)):
        return None
    if not normalize_std:
        return centred
    std = math.sqrt(sum(value * value for value in centred) / max(1, len(rewards) - 1))
    return [value / (std + _EPSILON) for value in centred]
