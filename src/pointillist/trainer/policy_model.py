"""The policy as the loss sees it: a packed row in, logprobs and entropies of its trained tokens out."""

from typing import NamedTuple

import torch
from torch import nn

from pointillist.models import LoadedModel, VisionLanguageModel
from pointillist.models.interface import ImageFeatures
from pointillist.pixels.on_device import PixelNormalizer
from pointillist.trainer.rows import RowTensors


class TokenStats(NamedTuple):
    """Numbers of each trained token of a row. A tuple, so that FSDP finds the tensors in it."""

    logprobs: torch.Tensor
    """float32 `(N,)`: logprobs at the sampling temperature, with the sampler's mask."""
    entropy: torch.Tensor
    """float32 `(N,)`: entropies of the distributions that the tokens were drawn from, in nats."""


class PolicyModel(nn.Module):
    """Wraps the model so that one `forward` does everything a row needs (sharded training hooks into `forward`)."""

    unsampleable: torch.Tensor
    """int64 `(masked,)`: token ids that the sampler cannot sample."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model: VisionLanguageModel = loaded.model
        self.forward_args = loaded.family.forward_args
        self.normalize = PixelNormalizer(loaded.family).to(loaded.device)
        self.register_buffer("unsampleable", loaded.unsampleable, persistent=False)

    def forward(self, row: RowTensors) -> TokenStats:
        """Logprobs and entropies of the trained tokens, `(N,)` each.

        In a packed row `attention_mask=None`, `use_cache=False` and positions that restart per sample make the model
        build a block-diagonal causal mask. With a cache, or with a mask of ones, samples would see each other.

        Example:
            Two samples of 3 and 2 tokens in one row of 5 columns, whose last tokens are trained: `predict_from` is
            `[1, 3]`, so of `(5, hidden)` only `(2, hidden)` goes through the output layer, to logits `(2, V)`.
        """
        image_arguments: dict[str, torch.Tensor | dict[str, ImageFeatures]] = {}
        features = self._encode_images(row) if row.images else None
        if features is not None and row.image_index:
            image_arguments["mm_encoder_outputs"] = {"image": features}
            if self.forward_args.requires_mm_token_type_ids:
                image_arguments[self.forward_args.token_types_argument] = row.mm_token_type_ids
        output = self.model.model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            attention_mask=row.attention_mask,
            use_cache=False,
            **image_arguments,
        )
        before = output.last_hidden_state.flatten(0, 1)[row.predict_from]  # (N, hidden)
        logits: torch.Tensor = self.model.get_output_embeddings()(before) / row.temperatures[:, None]
        # The lowest finite number, not minus infinity: 0 * -inf would make the entropy NaN.
        logprobs = logits.index_fill(1, self.unsampleable, torch.finfo(torch.float32).min).log_softmax(-1)
        chosen = logprobs.gather(1, row.targets[:, None])[:, 0]
        if features is not None and not row.image_index:
            chosen = chosen + _zero_of(features)
        return TokenStats(logprobs=chosen, entropy=-(logprobs.exp() * logprobs).sum(-1))

    def _encode_images(self, row: RowTensors) -> ImageFeatures:
        """Features of the row's spans, or of images without any; each distinct one passes the vision tower once.

        Example:
            Distinct images A and B with `image_index` `[0, 0, 1]`: features of A, A, B.
        """
        images = {**row.images, "pixel_values": self.normalize(row.images["pixel_values"])}
        features = self.model.model.get_image_features(**images, return_dict=True)
        if not row.image_index:
            return features
        distinct = features.pooler_output  # a tensor where all images have equally many tokens, else one each
        by_span = [distinct[index] for index in row.image_index]
        features.pooler_output = torch.stack(by_span) if isinstance(distinct, torch.Tensor) else by_span
        deepstack = getattr(features, "deepstack_features", None)
        if deepstack is not None:
            features.deepstack_features = [[layer[index] for index in row.image_index] for layer in deepstack]
        return features


def _zero_of(features: ImageFeatures) -> torch.Tensor:
    """A zero that depends on all of the vision tower, so that its collectives run forwards and backwards."""
    layers = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
    return torch.stack([image.float().sum() for layer in layers for image in layer]).sum() * 0.0
