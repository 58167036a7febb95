"""The jobs: suites that each need a process of their own. tests/README.md has their commands."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A job that cannot run fails: whoever starts it wants it."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped, and a job skips nothing: {report.longrepr}"
    return report
