"""What the tests of support/ share with those of dyme.py: fixtures, and the mark of slow ones."""

import pytest

from test_dyme import examples, no_update, readable, runs, tiny  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark; `python -m pytest -m "not slow"` leaves such tests out."""
    config.addinivalue_line("markers", "slow: takes more than three seconds")
