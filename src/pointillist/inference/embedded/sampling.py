"""From logits to tokens, a batch of sequences at once, each with its own parameters and random stream."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pointillist.inference.protocol import SamplingParams


@dataclass(frozen=True, slots=True)
class Sampled:
    """One decoding step of a batch. Tensors are on the CPU, first axis `B`."""

    token_ids: torch.Tensor
    """int64 `(B,)`."""
    logprobs: torch.Tensor
    """float32 `(B, V)`: logprobs of the whole distribution at the sampling temperature, mask applied, before
    top-p and top-k; this is what the trainer computes again."""
    usable: list[bool]
    """Per sequence: whether the model gave it a distribution; where it did not, the token means nothing."""


def draw_noise(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One uniform number a sequence in [0, 1), float64 `(B, 1)`: it decides the sequence's next token.

    Args:
        generators: Generators on the CPU, one a sequence; each gives one number a step, so a sequence's tokens do not
            depend on what shares its batch.
    """
    return torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    unsampleable: torch.Tensor,
    params: Sequence[SamplingParams],
    noise: torch.Tensor,
) -> Sampled:
    """Samples one token a sequence.

    Args:
        logits: Logits of any float type, `(B, V)`.
        unsampleable: Token ids that are masked, int64 `(masked,)`.
        params: Sampling parameters, one a sequence.
        noise: Uniform numbers from `draw_noise`, float64 `(B, 1)`.

    Example:
        Probabilities 0.2, 0.5 and 0.3 of three tokens: the running sums are 0.2, 0.7 and 1, so noise 0.69 samples token
        1 and noise 0.7 token 2. With `top_k = 2` the sums are 0, 0.5 and 0.8, and noise is scaled by 0.8.
    """
    logits = logits.float().index_fill(1, unsampleable, float("-inf"))
    temperatures = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)[:, None]
    logprobs = (logits / temperatures).log_softmax(-1).cpu()
    drawn = _draw(_truncate(logprobs, params).double().exp(), noise)
    greedy = torch.tensor([p.temperature == 0 for p in params])
    usable = ~logprobs.isnan().any(-1)  # one number that is not finite makes the whole distribution so
    return Sampled(torch.where(greedy, logprobs.argmax(-1), drawn), logprobs, usable.tolist())


def _draw(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Inverts the cumulative distribution: the first token whose running sum exceeds a uniform number.

    Args:
        weights: Probabilities that need not sum to 1, float64 `(B, V)`.
        noise: Uniform numbers, float64 `(B, 1)`.

    Returns:
        Token ids, int64 `(B,)`.
    """
    running = weights.cumsum(-1)
    total = running[:, -1:]
    # Rounding must not lift the number to the total itself: no token's sum exceeds that.
    threshold = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, threshold, right=True)[:, 0]


def _truncate(logprobs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logprobs `(B, V)` with minus infinity for what top-k and top-p leave out."""
    if all(p.top_p >= 1 and p.top_k <= 0 for p in params):
        return logprobs
    ordered, order = logprobs.sort(-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    top_p = torch.tensor([p.top_p for p in params])[:, None]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else logprobs.shape[-1] for p in params])[:, None]
    # At top_p = 1 nothing is left out, whatever rounding makes of the running sum.
    keep = ((mass_before < top_p) | (top_p >= 1)) & (torch.arange(logprobs.shape[-1]) < top_k)
    keep[:, 0] = True  # however small top_p is, as float32 may be zero
    return logprobs.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), float("-inf"))
