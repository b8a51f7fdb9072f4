"""Fixtures: a tiny real model folder, stores, and pictures."""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pointillist.families import Family, load_family, place_image
from pointillist.images import ImageLimits, ImageStore, Sources
from pointillist.pixels import PatchJoiner
from pointillist.pixels.levels import PixelDtype
from pointillist.refs import MMImageRef
from pointillist.render import FolderTokenizer, RawRenderer

ROOT = Path(__file__).parent.parent

# These need torchvision and run in a process of their own, where it is within reach; see that folder's conftest.py.
collect_ignore = [] if importlib.util.find_spec("torchvision") else ["torchvision_reference"]
# This needs vLLM and a server of it: `make test-vllm`.
collect_ignore += [] if importlib.util.find_spec("vllm") else ["integration/test_vllm.py"]
# These need the verifiers library: `make test-verifiers`.
collect_ignore += [] if importlib.util.find_spec("verifiers") else ["verifiers"]


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


def open_files(folder: Path) -> list[str]:
    """What this process holds open in a folder; threads that other tests have left may open and close other things."""
    held = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it is closed meanwhile, as the one that lists them is
            held.append(str(descriptor.readlink()))
    return [path for path in held if path.startswith(f"{folder.resolve()}/")]


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


def save_scaled(model: Any, tokenizer: Any, folder: Path, factor: float) -> None:
    """Saves a model with its matrices scaled up: nearly uniform logits would hide leaks and blank pictures."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    """`examples/digits/prepare.py` as a module."""
    spec = importlib.util.spec_from_file_location("prepare_digits", ROOT / "examples/digits/prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_dir(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-VL, its weights scaled up so that its logits are far from uniform: leaks and blank pictures
    show in every number."""
    import torch

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = prepare.build_tokenizer(prepare.CORPUS)
    model = prepare.build_model(tokenizer, depth=2, patch_size=16, deepstack_visual_indexes=[0])
    save_scaled(model, tokenizer, folder, 1.6)
    prepare.write_processor(folder, patch_size=16)
    return folder


@pytest.fixture(scope="session")
def digits(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data folder and warmed-up model folder of the digits example."""
    import torch

    root = tmp_path_factory.mktemp("digits")
    data, model_folder = root / "data", root / "model"
    prepare.write_data(data)
    torch.manual_seed(0)
    tokenizer = prepare.build_tokenizer(prepare.CORPUS)
    model = prepare.build_model(tokenizer)
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    prepare.write_processor(model_folder)
    prepare.warm_up(model, model_folder, lambda chance: prepare.made_up(data, chance), 60, 0)
    model.save_pretrained(model_folder)
    return data, model_folder


@pytest.fixture(scope="session")
def family(model_dir: Path) -> Family:
    return load_family(str(model_dir))


@pytest.fixture(scope="session")
def renderer(family: Family, model_dir: Path) -> RawRenderer:
    return RawRenderer(family, FolderTokenizer(model_dir))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", ImageLimits())


@pytest.fixture
def sources(store: ImageStore) -> Sources:
    return Sources(store)
