"""A host whose disks have room."""

import pytest


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 500 * 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
