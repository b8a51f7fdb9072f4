"""What server and trainer share of the model itself: loading, positions, weights. Needs torch."""

from pointillist.models.loading import LoadedModel, load_model, pick_device
from pointillist.models.pixels import PixelNormalizer, as_tensors
from pointillist.models.positions import sample_positions
from pointillist.models.weights import check_finite, check_weights, copy_weights, read_weights, write_weights

__all__ = [
    "LoadedModel",
    "PixelNormalizer",
    "as_tensors",
    "check_finite",
    "check_weights",
    "copy_weights",
    "load_model",
    "pick_device",
    "read_weights",
    "sample_positions",
    "write_weights",
]
