"""What the tests of support/ share with those of dyme.py: fixtures, and the mark of slow ones."""

import faulthandler
import json
import os
import signal
from typing import Any

import pytest

from test_dyme import examples, no_update, readable, runs, tiny  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark, which `pytest -m "not slow"` leaves out; heed signals to stop."""
    config.addinivalue_line("markers", "slow: takes most of a second")
    # A shell lets what it starts in the background, or by nohup, ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# ---- For grade.py: a report that is complete up to where a student's file hangs ------------------

REPORT = open(os.environ["COURSE_REPORT"], "a") if "COURSE_REPORT" in os.environ else None


def pytest_runtest_logstart() -> None:
    """End the process if a check runs for too long, whatever it does and catches."""
    if REPORT:
        limit = float(os.environ["COURSE_LIMIT"])
        faulthandler.dump_traceback_later(limit, exit=True, file=REPORT)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down how a stage of a check ended: its name, the stage, the outcome, the message."""
    told: Any = report.longrepr or ""
    if hasattr(told, "reprcrash"):
        told = told.reprcrash.message
        if not told.startswith("Failed: "):  # not in the check's own words
            told = f"the check cannot read what came back: {told}"
    said = str(told[2] if isinstance(told, tuple) else told)
    if REPORT and report.when != "teardown":
        stage = [report.nodeid.split("::")[-1], report.when, report.outcome,
                 said.removeprefix("Failed: ").removeprefix("Skipped: ")]
        print(json.dumps(stage), file=REPORT, flush=True)
