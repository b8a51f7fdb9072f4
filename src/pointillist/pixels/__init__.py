"""An image as numbers: from a reference to the arrays that a model's `forward` takes, the same in every process.

`reader` checks a reference and loads its image, `cache` keeps decoded images, `join` puts the images of a batch
together, `levels` normalises in numpy, and `on_device` does the same in torch on the model's device.
"""

from pointillist.pixels.cache import LoadedImage
from pointillist.pixels.join import PatchJoiner
from pointillist.pixels.reader import ImageBatch, RawImageMaterializer

__all__ = ["ImageBatch", "LoadedImage", "PatchJoiner", "RawImageMaterializer"]
