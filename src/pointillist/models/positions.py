"""Positions of one sample's tokens, as its family counts them."""

from typing import Any

import torch

from pointillist.families import ForwardPolicy


def sample_positions(
    model: Any,
    policy: ForwardPolicy,
    token_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
) -> torch.Tensor:
    """Positions of one sample that starts at 0.

    Args:
        model: The Hugging Face model.
        policy: Of the model's family.
        token_ids: int64 `(tokens,)`.
        mm_token_type_ids: int64 `(tokens,)`; 0 text, 1 image.
        image_grid_thw: int64 `(images, 3)`, None without images.

    Returns:
        int64 `(rows, tokens)`: three rows (time, height, width) for families with MRoPE, else one.
    """
    if policy.pass_position_ids_with_mm:
        return torch.arange(len(token_ids), device=token_ids.device)[None]
    positions, _ = model.model.get_rope_index(
        token_ids[None], mm_token_type_ids=mm_token_type_ids[None].int(), image_grid_thw=image_grid_thw
    )
    rows: torch.Tensor = positions[:, 0]
    return rows
