"""A small `make hostile` with the other tests: the same inputs, processes and judgement, fewer of them."""

from pathlib import Path
from types import ModuleType

import pytest

from pointillist.config import RUN_KEY
from tests.hostile.__main__ import counts, run
from tests.hostile.campaign import Result

pytestmark = pytest.mark.integration

INPUTS = 2_000
PATIENCE = 60.0
"""No time is asserted here: that is for a quiet machine."""


@pytest.mark.timeout(1200)
def test_hostile_inputs_cost_nobody_else_anything(
    model_dir: Path, prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_KEY, "key of the hostile run")  # and it is gone when other tests start their servers
    data = tmp_path / "data"
    prepare.write_data(data)
    results = run(tmp_path / "root", model_dir, data, counts(INPUTS), seed=1, patience=PATIENCE, hold=2.0)
    assert [text for result in results for text in result.wrong(PATIENCE)] == [], [
        (result.target, result.faults, result.deaths, result.probe_faults) for result in results
    ]
    assert sum(result.sent for result in results) > INPUTS * 0.95
    # A generator whose inputs are all refused at the door, or none, tries nothing.
    for result in results:
        if result.target in ("sampling", "chat", "responses", "messages"):
            assert result.statuses["2xx"] > 0
            assert result.statuses["4xx"] > 0


def test_the_judge_finds_what_is_wrong() -> None:
    assert Result("x", probes=3).wrong(1.0) == []
    assert Result("x").wrong(1.0) == ["x: no honest request was answered"]
    bad = Result("x", num_faults=2, probes=1, slowest=3.0, num_probe_faults=1, deaths=[{}])
    bad.memory_mib = {"first": 100.0, "last": 900.0, "peak": 5000.0}
    assert len(bad.wrong(1.0)) == 6
    assert len(bad.wrong(10.0)) == 5
