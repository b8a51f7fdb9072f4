"""Pictures of noise: their bytes, their place in a store, and the pixels that a model gets of them."""

import io
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pointillist.families import Family, place_image
from pointillist.images import ImageStore
from pointillist.pixels import PatchJoiner
from pointillist.pixels.levels import PixelDtype
from pointillist.refs import MMImageRef


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise: any mistake in order, size or orientation shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def stored_ref(family: Family, store: ImageStore, image: Image.Image) -> MMImageRef:
    """The picture in the store, at the beginning of some tokens."""
    return place_image(family, store.put(encoded(image)), family.layout(*image.size), 0)


def with_item(image: MMImageRef, **change: object) -> MMImageRef:
    """An image with other fields in its descriptor; its URL follows."""
    item = {**image.item, **change}
    return msgspec.structs.replace(image, item=item, uri=item["raw_image_uri"])


def joined(family: Family, images: list[Image.Image], dtype: PixelDtype = "float32") -> dict[str, NDArray[Any]]:
    """The family's tensors of these pictures."""
    return PatchJoiner(family).join_pixels([np.asarray(image) for image in images], dtype)


def check_pixels(family: Family, images: list[Image.Image], expected: NDArray[np.float32]) -> None:
    """Every way to the model's pixels gives `expected`, the processor's own, bit for bit; other pictures do not."""
    import torch

    from pointillist.pixels.on_device import PixelNormalizer

    ours = joined(family, images)["pixel_values"]
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)
    half = torch.from_numpy(joined(family, images, "bfloat16")["pixel_values"].view(np.uint16)).view(torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(expected).to(torch.bfloat16))
    raw = joined(family, images, "uint8")["pixel_values"]
    assert raw.nbytes * 4 * family.frames == expected.nbytes
    on_device = PixelNormalizer(family)(torch.from_numpy(raw))
    assert torch.equal(on_device.reshape(expected.shape), torch.from_numpy(expected))
    gray = joined(family, [Image.new("RGB", image.size, (128, 128, 128)) for image in images])["pixel_values"]
    assert np.abs(gray - expected).max() > 0.1  # the control
