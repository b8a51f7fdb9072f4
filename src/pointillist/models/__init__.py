"""What server and trainer share of the model itself: loading, positions, weights. Needs torch."""

from pointillist.models.interface import VisionLanguageModel
from pointillist.models.loading import LoadedModel, load_model, pick_device
from pointillist.models.positions import sample_positions

__all__ = ["LoadedModel", "VisionLanguageModel", "load_model", "pick_device", "sample_positions"]
