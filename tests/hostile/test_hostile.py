"""The judge of `make hostile`."""

from tests.hostile.campaign import Result


def test_the_judge_finds_what_is_wrong() -> None:
    assert Result("x", probes=3).wrong(1.0) == []
    assert Result("x").wrong(1.0) == ["x: no honest request was answered"]
    bad = Result("x", num_faults=2, probes=1, slowest=3.0, num_probe_faults=1, deaths=[{}])
    bad.memory_mib = {"first": 100.0, "last": 900.0, "peak": 5000.0}
    assert len(bad.wrong(1.0)) == 6
    assert len(bad.wrong(10.0)) == 5
