"""The bounds of every number that says how to sample, for all that take such numbers: config, gateway, servers.

A number outside of them either means nothing (a temperature of infinity) or overflows somewhere on its way to the
logits, where it would fail others than the one who sent it.
"""

import math
from dataclasses import dataclass
from typing import Final

from pointillist.errors import FieldError, shown

MIN_TEMPERATURE: Final = 0.01
"""The smallest temperature above 0. vLLM silently takes 0.01 for anything smaller, so that a smaller one would be
sampled otherwise than it is trained. Float32 can divide by it: logits of up to 1e4 become 1e6, whose rounding of
0.06 is small beside their differences. A temperature of 1e-38 makes infinities of them."""
MAX_TEMPERATURE: Final = 100.0
"""At 100 the likeliest token of logits that differ by 10 is only 1.1 times as likely as the least likely one."""
MAX_VOCABULARY: Final = 10_000_000
"""No vocabulary is larger; token ids and `top_k` fit into 32 bits by far, as vLLM's tensors need it."""
MAX_SEQUENCE: Final = 100_000_000
"""No sequence is longer, in tokens; what a server can do is less and checked there."""
MAX_SEED: Final = 2**63 - 1
"""Seeds are 63 bits: those of vLLM without the negative ones, of which -1 would mean no seed."""
MAX_CHOICES: Final = 65_536
"""No server decodes so many completions at once; what it does decode at once is less and checked there."""
MAX_LOGPROBS: Final = 20
"""Alternatives to report beside the sampled token, as OpenAI has it."""
MAX_STOP_TOKEN_IDS: Final = 1024
"""Tokens that end a completion."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number may be."""

    low: float
    high: float
    whole: bool = True
    """Whether it must be an integer."""
    open_low: bool = False
    """Whether `low` itself is excluded."""
    also: tuple[int, ...] = ()
    """Values that are accepted beside the range."""

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        others = "".join(f"{value} or " for value in self.also)
        return f"{others}{kind} {'above' if self.open_low else 'from'} {self.low} to {self.high}"

    def holds(self, value: object) -> bool:
        """Whether a value is such a number; booleans and what is not finite never are."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if not isinstance(value, int) and not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return value in self.also or (above and value <= self.high)


BOUNDS: Final[dict[str, Bound]] = {
    "temperature": Bound(MIN_TEMPERATURE, MAX_TEMPERATURE, whole=False, also=(0,)),
    "top_p": Bound(0, 1, whole=False, open_low=True),
    "top_k": Bound(1, MAX_VOCABULARY, also=(-1, 0)),
    "max_tokens": Bound(1, MAX_SEQUENCE),
    "n": Bound(1, MAX_CHOICES),
    "seed": Bound(0, MAX_SEED),
    "logprobs": Bound(0, MAX_LOGPROBS),
    "stop_token_ids": Bound(0, MAX_VOCABULARY),
    # Of these the embedded server takes only what changes nothing; vLLM has looser bounds or none.
    "min_p": Bound(0, 1, whole=False),
    "min_tokens": Bound(0, MAX_SEQUENCE),
    "presence_penalty": Bound(-2, 2, whole=False),
    "frequency_penalty": Bound(-2, 2, whole=False),
    "repetition_penalty": Bound(0.01, 100, whole=False),
    "prompt_logprobs": Bound(0, MAX_LOGPROBS),
}
"""By parameter; for a list of numbers, of each of them."""


def check_sampling_number(name: str, value: object) -> None:
    """Checks a sampling parameter.

    Args:
        name: A key of `BOUNDS`.
        value: What came.

    Raises:
        FieldError: Not a number, not finite, or out of bounds; `param` is the name.
    """
    if not BOUNDS[name].holds(value):
        raise FieldError(f"{name} is {shown(value)}, expected {BOUNDS[name]}", param=name)
