r"""Token-level policy gradient with masked importance sampling.

For every sampled token, with trainer logprob $\ell$, sampler logprob $\ell_s$, advantage $A$ and importance ratio
$\rho = \exp(\ell - \ell_s)$:

$$ L = \frac{1}{N} \sum_t -\,[\rho_{low} \le \rho_t \le \rho_{high}] \rho_t A_t + \beta\, k_3(\ell_{ref,t} - \ell_t)
   - \eta\, H_t $$

- The ratio corrects for tokens that another policy sampled (older weights, other kernels). Tokens whose ratio is
  outside the band are masked on both sides: double-sided masking as in IcePop (Ling team, "Every Step Evolves",
  arXiv 2510.18855). On policy the ratio is 1 and this is REINFORCE.
- $N$ is the number of sampled tokens of the whole step over all ranks (token-level normalisation as in DAPO,
  arXiv 2503.14476), so long and short answers weigh by their tokens.
- $H$ is the entropy of the distribution that a token was drawn from: a bonus ($\eta > 0$) keeps exploration alive (Mnih
  et al., arXiv 1602.01783).
- $k_3(x) = e^x - x - 1$ estimates the KL divergence from the reference (Schulman, "Approximating KL divergence", 2020).
"""

from dataclasses import dataclass

import torch

from pointillist.config.trainer import LossConfig


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Loss of one row and what to report of it. Sums run over the row's trained tokens."""

    loss: torch.Tensor
    """Scalar, with a gradient; the sum of the tokens' losses over `num_tokens`."""
    mismatch_sum: torch.Tensor
    """Sum of |trainer logprob - sampler logprob|."""
    mismatch_kl_sum: torch.Tensor
    """Sum of `k3` of the same difference: an estimate of KL(sampler || trainer)."""
    ratio: torch.Tensor
    """Importance ratio of each trained token, masked ones too, without a gradient."""
    masked_sum: torch.Tensor
    """Tokens whose ratio was outside the band."""
    kl_sum: torch.Tensor
    """Sum of `k3` against the reference; 0 without one."""


def policy_gradient_loss(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    logprobs_sampled: torch.Tensor,
    advantages: torch.Tensor,
    num_tokens: int,
    config: LossConfig,
    reference_logprobs: torch.Tensor | None = None,
) -> LossTerms:
    """The loss of this module's docstring, over the `N` trained tokens of a row.

    Args:
        logprobs: Trainer's logprobs, float32 `(N,)`, with a gradient.
        entropy: Entropy of the trainer's distributions, in nats, float32 `(N,)`, with a gradient.
        logprobs_sampled: Logprobs when the tokens were sampled, float32 `(N,)`.
        advantages: Advantages, float32 `(N,)`.
        num_tokens: Number of sampled tokens of the whole step over all ranks, by which the sum is divided.
        config: Band of the ratio, and weights of the KL term and the entropy bonus.
        reference_logprobs: Logprobs of the reference model, float32 `(N,)`; None without a KL term.

    Returns:
        The loss and sums for the metrics. Losses of a step's rows are added, not averaged.

    Example:
        Two tokens, on policy (both ratios are 1), advantages `[1.5, -0.5]`, and 4 sampled tokens in the whole step: the
        loss is `-(1.5 - 0.5) / 4 = -0.25`. If the second ratio were 3, above `ratio_high`, it would be `-1.5 / 4`.
    """
    log_ratio = logprobs - logprobs_sampled
    ratio = log_ratio.exp()
    inside = ((ratio >= config.ratio_low) & (ratio <= config.ratio_high)).detach()
    per_token = -torch.where(inside, ratio * advantages, torch.zeros_like(ratio))
    kl = torch.zeros_like(ratio) if reference_logprobs is None else _k3(reference_logprobs - logprobs)
    detached = log_ratio.detach()
    return LossTerms(
        loss=(per_token + config.kl_coef * kl - config.entropy_coef * entropy).sum() / num_tokens,
        mismatch_sum=detached.abs().sum(),
        mismatch_kl_sum=_k3(detached).sum(),
        ratio=ratio.detach(),
        masked_sum=(~inside).sum(),
        kl_sum=kl.detach().sum(),
    )


def _k3(x: torch.Tensor) -> torch.Tensor:
    return x.exp() - x - 1
