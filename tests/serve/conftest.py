"""One server of two replicas for all tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replicas import jobs
from tests.serve.client import Server


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    """Two ranks, each a replica. When it is stopped at the end, its exit code is that of an orderly end."""
    top = tmp_path_factory.mktemp("served")
    latents = top / "latents"
    latents.mkdir()
    recipe = jobs.write_recipe(top, model)
    server = Server(recipe, top / "videos", "--most-waiting", "6", "--latents", str(latents))
    try:
        yield server.ready()
        assert server.stop() == 0, server.job.output
        assert server.job.failures() == [], server.job.output
    finally:
        server.job.kill()
