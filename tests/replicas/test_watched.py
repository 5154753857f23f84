"""Jobs as a server has them: progress at every step, cancelled while waiting and while being made, and of another workload."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.replicas import jobs, watched_jobs
from tests.replicas.watched_jobs import GIVEN_UP, NEVER_BEGUN
from wan_mlperf.recipe import Faults
from wan_mlperf.replicas.watch import Watch


@pytest.mark.job
@pytest.mark.parametrize("replicas", [1, 2])
def test_watched_jobs(tmp_path: Path, model: Path, replicas: int) -> None:
    recipe = jobs.write_recipe(tmp_path, model, replicas=replicas)
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 12"))
    seen = json.loads(run_ranks(watched_jobs.main, recipe, ranks=2).splitlines()[-1])
    assert seen["done"] == [0, 1, 3, 5] and seen["lost"] == {str(GIVEN_UP): "cancelled", str(NEVER_BEGUN): "cancelled"}
    assert seen["other_equal"] is True, "bands of a size that the ranks do not divide, as loaded for that size"
    progress = {int(ticket): [tuple(one) for one in steps] for ticket, steps in seen["progress"].items()}
    assert progress[0] == progress[5] == [*((step, 0) for step in range(13)), (12, 1), (12, 5)]
    assert progress[1] == [*((step, 0) for step in range(4)), (3, 1), (3, 9)]
    assert 3 not in progress and NEVER_BEGUN not in progress
    assert len(progress[GIVEN_UP]) < 12, "it was made to its end"


def test_no_thread_of_the_watch_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is inside the job's store when Python ends would abort the process, after all was well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    for _ in range(3):
        with Watch(Faults(dead_s=3.0, hang_s=8.0, start_s=60.0)):
            assert sum(one.name.startswith("watch-") for one in threading.enumerate()) == 2
        assert not [one for one in threading.enumerate() if one.name.startswith("watch-")]
