"""How many functions of the package one image passes: the number may fall, and must not grow unseen."""

from pathlib import Path

from tests.walk import walk

MOST_FUNCTIONS, MOST_MODULES = 154, 32


def test_one_image_passes_no_more_functions_than_it_must(model_dir: Path, tmp_path: Path) -> None:
    recorded = walk(model_dir, tmp_path)
    way = recorded.on_the_way()
    modules = list(dict.fromkeys(module for module, _ in way))
    assert modules[0] == "environments.digits"
    assert ("trainer.policy_model", "PolicyModel.forward") in way
    assert {"images.store", "render.raw", "refs.wire", "inference.prompt", "transport.types"} <= set(modules)
    assert len(way) <= MOST_FUNCTIONS, way
    assert len(modules) <= MOST_MODULES, modules
