"""Positions of one sample's tokens, counted as its family counts them."""

import torch

from pointillist.families import ForwardArgs
from pointillist.models.interface import VisionLanguageModel


def sample_positions(
    model: VisionLanguageModel,
    policy: ForwardArgs,
    token_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
) -> torch.Tensor:
    """Positions of one sample that starts at 0.

    Args:
        model: The Hugging Face model.
        policy: Forward arguments of the model's family.
        token_ids: Token ids, int64 `(T,)`.
        mm_token_type_ids: Types, int64 `(T,)`; 0 text, 1 image.
        image_grid_thw: Grids in patches, int64 `(I, 3)`; None without images.

    Returns:
        int64 `(3, T)` (time, height, width) for families with MRoPE, else `(1, T)`.

    Example:
        Text, an image of grid `(1, 4, 4)` whose 2x2 blocks are 4 tokens, text: types `0 1 1 1 1 0`. Time is
        `0 1 1 1 1 3`, height `0 1 1 2 2 3`, width `0 1 2 1 2 3`: the text goes on after the larger side.
    """
    if policy.pass_position_ids_with_mm:
        return torch.arange(len(token_ids), device=token_ids.device)[None]
    # The Hugging Face models find an image by its run of image tokens: two images that touch would be one to them. So a
    # token of text is put between them, and its place, one position, is taken out again.
    shift = _gaps_before(model, mm_token_type_ids, image_grid_thw)
    places = torch.arange(len(token_ids), device=token_ids.device) + shift
    ids, types = (
        each.new_zeros(len(each) + int(shift[-1])).index_copy_(0, places, each)
        for each in (token_ids, mm_token_type_ids)
    )
    positions, _ = model.model.get_rope_index(
        ids[None], mm_token_type_ids=types[None].int(), image_grid_thw=image_grid_thw
    )
    return positions[:, 0, places] - shift


def _gaps_before(
    model: VisionLanguageModel, mm_token_type_ids: torch.Tensor, image_grid_thw: torch.Tensor | None
) -> torch.Tensor:
    """Per token, int64 `(T,)`: how many images before it are followed by another one without a token between.

    Example:
        Two images of two tokens each, types `0 1 1 1 1 0`: gaps `0 0 0 1 1 1`.
    """
    touching = torch.zeros_like(mm_token_type_ids, dtype=torch.int64)
    if image_grid_thw is not None and len(image_grid_thw) > 1:
        lengths = image_grid_thw.prod(-1) // model.config.vision_config.spatial_merge_size**2
        image_tokens = torch.nonzero(mm_token_type_ids)[:, 0]
        last = image_tokens[lengths.cumsum(0)[:-1] - 1]  # token of each image but the last one
        touching[last] = (mm_token_type_ids[last + 1] != 0).long()
    return touching.cumsum(0) - touching
