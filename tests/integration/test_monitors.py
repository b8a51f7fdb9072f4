"""A whole run with both monitors, offline."""

import json

import pytest

from pointillist.launch.run_dir import METRIC_FILES
from tests.helpers.monitored import tensorboard_values, wandb_history
from tests.helpers.processes import Digits

pytestmark = pytest.mark.integration


def test_a_run_is_monitored_to_its_end(digits_run: Digits) -> None:
    code, output = digits_run.run(
        "--monitors.tensorboard", "true", "--monitors.wandb.project", "digits", "--monitors.images_every", 1
    )
    assert code == 0, output
    assert "warning" not in output
    folder = digits_run.output_dir / "monitors"
    values = tensorboard_values(folder / "tensorboard")
    assert [step for step, value in values if value.tag == "trainer/loss"] == [1, 2, 3]
    assert any(value.tag.startswith("pictures/") for _, value in values)
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    history = wandb_history(path)
    for name in METRIC_FILES:
        component = name.removesuffix(".jsonl")
        steps = {record["step"] for record in map(json.loads, (digits_run.output_dir / "metrics" / name).open())}
        assert steps == {json.loads(line[f"{component}/step"]) for line in history if f"{component}/step" in line}
    assert sum(any(key.startswith("rollouts/") for key in line) for line in history) == 3
