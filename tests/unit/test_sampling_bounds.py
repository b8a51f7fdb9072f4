"""The bounds of sampling parameters, the same for config, gateway and servers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pointillist.config.orchestrator import SamplingConfig
from pointillist.config.sampling import BOUNDS, MIN_TEMPERATURE, check_sampling_number


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (0, 0.0, MIN_TEMPERATURE, 1, 100)),
        *(("top_p", value) for value in (1e-46, 0.5, 1)),
        *(("top_k", value) for value in (-1, 0, 1, 200_000)),
        *(("seed", value) for value in (0, 2**63 - 1)),
        ("logprobs", 20),
    ],
)
def test_what_means_something_is_accepted(name: str, value: float) -> None:
    check_sampling_number(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (math.inf, -math.inf, math.nan, 1e39, 1e-38, 0.0099, -1, 101, 10**400)),
        *(("top_p", value) for value in (0, -0.1, 1.01, math.nan)),
        *(("top_k", value) for value in (-2, 2**63, 1.5)),
        *(("seed", value) for value in (-1, 2**63, 1.0)),
        pytest.param("seed", 10**5000, id="an integer that Python does not print"),
        *(("n", value) for value in (0, 10**9, True)),
        *(("max_tokens", value) for value in (0, 10**40, "5", None)),
        ("logprobs", 21),
        ("stop_token_ids", -1),
    ],
)
def test_everything_else_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*, expected "):
        check_sampling_number(name, value)


@given(st.sampled_from(sorted(BOUNDS)), st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.none()))
def test_nothing_passes_that_is_no_finite_number(name: str, value: object) -> None:
    try:
        check_sampling_number(name, value)
    except ValueError as error:
        assert str(BOUNDS[name]) in str(error)
    else:
        assert isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@pytest.mark.parametrize(
    "given", [{"temperature": 0}, {"temperature": 1e-38}, {"temperature": math.inf}, {"top_k": 2**63}, {"top_p": 0}]
)
def test_a_config_has_the_same_bounds(given: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        SamplingConfig(**given)
