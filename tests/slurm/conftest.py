"""The runs of the integration tests, here as jobs."""

from tests.helpers.processes import digits_run

__all__ = ["digits_run"]
