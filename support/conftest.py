"""Fixtures that the tests of support/ share with those of dyme.py."""

from test_dyme import examples, runs, tiny  # noqa: F401
