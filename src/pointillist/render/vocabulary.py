"""The tokens that the policy never samples. Sampler and trainer mask the same set, so their logprobs agree."""

from pointillist.families.base import Family
from pointillist.render.tokenizer import FolderTokenizer


def unsampleable_token_ids(family: Family, tokenizer: FolderTokenizer, vocab_size: int) -> list[int]:
    """Special tokens of images and videos, and rows of the output layer that no token stands for.

    A sampled image token would be a placeholder without an image.

    Args:
        family: Adapter of the model's family.
        tokenizer: Tokenizer of the model.
        vocab_size: Number of rows of the output layer, V.

    Returns:
        Token ids, ascending.

    Example:
        Image tokens 3 to 6, a tokenizer of 10 tokens and an output layer of 12 rows: `[3, 4, 5, 6, 10, 11]`.
    """
    return sorted({*family.vision_token_ids, *range(len(tokenizer), vocab_size)})
