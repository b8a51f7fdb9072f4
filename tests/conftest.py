"""Fixtures: a tiny real model folder and stores. What tests call by name lives in `tests/helpers`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pointillist.families import Family, load_family
from pointillist.images import ImageLimits, ImageStore, Sources
from pointillist.render import FolderTokenizer, RawRenderer
from tests.helpers.files import ROOT

# These need torchvision and run in a process of their own, where it is within reach; see that folder's conftest.py.
collect_ignore = [] if importlib.util.find_spec("torchvision") else ["torchvision_reference"]
# This needs vLLM and a server of it: `make test-vllm`.
collect_ignore += [] if importlib.util.find_spec("vllm") else ["integration/test_vllm.py"]
# These need the verifiers library: `make test-verifiers`.
collect_ignore += [] if importlib.util.find_spec("verifiers") else ["verifiers"]


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

    from tests.helpers.models import save_scaled

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
