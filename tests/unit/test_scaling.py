"""docs/scaling.md says what benchmarks/scaling.py makes of the committed results, and its arithmetic is right."""

import json
from typing import Any

import pytest
from benchmarks import scaling
from benchmarks.scaling_cluster import Arrivals, FileSystem, Operation, Scenario, queueing


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(scaling.RESULTS.read_text())


def test_the_page_has_the_tables_of_the_results(results: dict[str, Any]) -> None:
    page = scaling.PAGE.read_text()
    assert page == scaling.with_tables(page, results), "run python -m benchmarks.scaling tables"


def test_a_page_without_a_table_is_refused(results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="scaling: scenario"):
        scaling.with_tables("# Scale\n", results)


def test_the_scenario_by_hand() -> None:
    s = Scenario(groups=2, group_size=3, turns=4, repeated_share=0.5)
    assert (s.rollouts, s.spans, s.distinct) == (6, 24, 2 + 6 * 3 * 0.5)
    assert s.shown == 6 * (1 + 2 + 3 + 4)
    assert s.gpus == 1000
    assert (s.times(10).gpus, s.times(10).rollouts) == (10_000, 60)
    assert s.image_tokens == 32 * 24


def test_entries_of_a_folder() -> None:
    assert scaling.entries_per_folder(100_000_000, 256) == 390_625
    assert round(scaling.entries_per_folder(100_000_000, 65_536)) == 1526


def test_requests_and_bytes_a_second() -> None:
    assert scaling.requests_of({"name": 5, "close": 1, "fsync": 1, "data": 1}) == 6
    kinds = [scaling.Traffic("put", 600, 6, 1000), scaling.Traffic("read", 300, 4, 100)]
    scenario = Scenario(step_seconds=300)
    assert scaling.total_requests(kinds, scenario) == 12 + 4
    assert scaling.total_bytes(kinds, scenario) == 2000 + 100


def test_traffic_counts_every_put_once(results: dict[str, Any]) -> None:
    s = Scenario()
    new, known, *_ = scaling.traffic(results, s)
    assert new.operations + known.operations == s.spans
    assert s.spans + scaling.gateway_traffic(results, s).operations == s.shown


def test_an_idle_file_system_takes_the_sum_of_its_parts() -> None:
    system = FileSystem(metadata_per_second=1e9, bytes_per_second=1e9, round_trip=0.001, flush_seconds=0.010)
    lone = [Arrivals("put", Operation(metadata=5, num_bytes=2_000_000, flush=True), [0.0])]
    # 5 round trips of metadata, 2 ms of bytes and their round trip, 10 ms of flush.
    assert queueing(lone, system)["put"]["median_ms"] == pytest.approx(5 + 2 + 1 + 10, rel=1e-3)


def test_a_queue_grows_with_what_is_asked_at_once() -> None:
    system = FileSystem(metadata_per_second=1000, round_trip=0, flush_seconds=0)
    burst = queueing([Arrivals("read", Operation(metadata=1, num_bytes=0), [0.0] * 1000)], system)["read"]
    assert burst["p99_ms"] == pytest.approx(990, rel=0.15)  # a thousand requests at a thousand a second


@pytest.mark.parametrize(("value", "text"), [(390_625, "391,000"), (43.46, "43.5"), (0.1699, "0.17"), (5.0, "5")])
def test_numbers_keep_the_digits_that_count(value: float, text: str) -> None:
    assert scaling.number(value) == text
