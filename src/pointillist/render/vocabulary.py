"""Which tokens the policy can never sample; sampler and trainer mask the same set."""

from pointillist.families.base import Family
from pointillist.render.tokenizer import FolderTokenizer


def unsampleable_token_ids(family: Family, tokenizer: FolderTokenizer, vocab_size: int) -> list[int]:
    """Vision special tokens, and the padding of the embedding table that no token stands for.

    Args:
        family: The model's adapter.
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the output layer.

    Returns:
        Token ids, ascending. A sampled vision token would be a placeholder without an image.
    """
    return sorted({*family.vision_token_ids, *range(len(tokenizer), vocab_size)})
