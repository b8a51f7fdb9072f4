"""The environment side runs without torch."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

ENVIRONMENT_SIDE = [
    "pointillist.cli",
    "pointillist.environments.digits",
    "pointillist.launch.rl",
    "pointillist.orchestrator.orchestrator",
    "pointillist.sessions",
]


@pytest.mark.parametrize("module", ENVIRONMENT_SIDE)
def test_environment_side_imports_with_torch_out_of_reach(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_control_does_need_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import pointillist.trainer.train"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0
