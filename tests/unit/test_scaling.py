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
    assert scaling.requests_of({"name": 5, "close": 1, "fsync": 1, "folder_fsync": 1, "data": 1}) == 7
    assert scaling.requests_of({"name": 2, "close": 2, "data": 1}) == 4
    kinds = [scaling.Traffic("put", 600, 6, 1000), scaling.Traffic("read", 300, 4, 100)]
    scenario = Scenario(step_seconds=300)
    assert scaling.total_requests(kinds, scenario) == 12 + 4
    assert scaling.total_bytes(kinds, scenario) == 2000 + 100


def test_lookups_of_a_rank_that_waits() -> None:
    assert scaling.lookups(0.0, 0.095) == pytest.approx(10 / 0.095)
    assert scaling.lookups(10.0, 60.0) == pytest.approx(4)


def test_fetches_by_hand() -> None:
    made_up = {
        "calls": {key: {"name": 1, "close": 1} for key in ("put_new", "put_known", "read")},
        "server_caches": [
            {"routing": "a server a group", "cache_mib": scaling.UNBOUNDED_MIB, "shown": 20, "misses": 5},
        ],
        "trainer_reads": {"loads": 3, "spans": 2},
        "assets": {"core_ms_per_picture": 2.0, "core_seconds_per_gb_of_weights": 3.0},
    }
    s = Scenario(groups=2, group_size=3, turns=4, weight_bytes=2_000_000_000)
    servers, ranks, weights = scaling.fetches(made_up, s)
    assert (servers.operations, servers.core_seconds) == (60 / 4, 0.002)
    assert ranks.operations == 24 * 3 / 2
    assert (weights.operations, weights.core_seconds) == (150, 6.0)


def test_traffic_counts_every_put_once(results: dict[str, Any]) -> None:
    s = Scenario()
    new, known, *_ = scaling.traffic(results, s)
    assert new.operations + known.operations == s.spans
    assert s.spans + scaling.gateway_traffic(results, s).operations == s.shown


def test_an_idle_file_system_takes_the_sum_of_its_parts() -> None:
    system = FileSystem(metadata_per_second=1e9, bytes_per_second=1e9, round_trip=0.001, flush_seconds=0.010)
    lone = [Arrivals("put", Operation(metadata=5, num_bytes=2_000_000, flushes=2), [0.0])]
    # 5 round trips of metadata, 2 ms of bytes and their round trip, two flushes of 10 ms.
    assert queueing(lone, system)["put"]["median_ms"] == pytest.approx(5 + 2 + 1 + 20, rel=1e-3)


def test_a_queue_grows_with_what_is_asked_at_once() -> None:
    system = FileSystem(metadata_per_second=1000, round_trip=0, flush_seconds=0)
    burst = queueing([Arrivals("read", Operation(metadata=1, num_bytes=0), [0.0] * 1000)], system)["read"]
    assert burst["p99_ms"] == pytest.approx(990, rel=0.15)  # a thousand requests at a thousand a second


@pytest.mark.parametrize(("value", "text"), [(390_625, "391,000"), (43.46, "43.5"), (0.1699, "0.17"), (5.0, "5")])
def test_numbers_keep_the_digits_that_count(value: float, text: str) -> None:
    assert scaling.number(value) == text
