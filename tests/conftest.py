"""What holds for all tests."""

import sys

import pytest


@pytest.fixture(autouse=True)
def no_report_page(request, monkeypatch):
    """Runs of train.py in this process draw no report, for time's sake, but where it is what is tested."""
    room = sys.modules.get("utils.training.report_page")
    if room and "report_page" not in request.module.__name__:
        monkeypatch.setattr(room, "write_report", lambda folder: None)
