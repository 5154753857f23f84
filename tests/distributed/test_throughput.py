"""What replicas and pulling bring on two cores, and that memory does not grow. Needs a quiet machine: all are slow tests."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from tests.distributed import jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# Large enough that the work, not the queue, is measured: about a third of a second a sample on one core.
LARGER = ("--set=workload.height=64", "--set=workload.width=64", "--set=workload.frames=17", "--set=workload.steps=4")


def samples_per_second(
    folder: Path, model: Path, *, replicas: int, queries: int = 40, slow: bool = False, halves: bool = False
) -> float:
    """One Offline run with one thread per replica."""
    recipe, outputs = jobs.write_recipe(folder, model, queries=queries), folder / "outputs"
    arguments = jobs.offline(recipe, outputs, *LARGER, f"--set=mesh.ranks={replicas}", f"--set=mesh.replicas={replicas}")
    job = jobs.start("wan_mlperf.run", arguments, fault="slow@1:1-9999" if slow else "", halves=halves)
    code, _ = job.finish(600)
    assert code == 0, job.output
    return float(jobs.result(outputs)["samples_per_second"])


def test_two_replicas_are_nearly_twice_as_fast(tmp_path: Path, model: Path) -> None:
    one, two = [], []
    for _ in range(3):  # interleaved, so that a slow minute of the machine hits both
        one.append(samples_per_second(tmp_path, model, replicas=1))
        two.append(samples_per_second(tmp_path, model, replicas=2))
    ratio = statistics.median(two) / statistics.median(one)
    print(f"1 replica {one}, 2 replicas {two} samples/s; medians {ratio:.3f}")
    assert ratio >= 1.85


def test_pulling_beats_fixed_halves_where_one_replica_is_slow(tmp_path: Path, model: Path) -> None:
    halves, pull = [], []
    for _ in range(3):
        halves.append(samples_per_second(tmp_path, model, replicas=2, slow=True, halves=True))
        pull.append(samples_per_second(tmp_path, model, replicas=2, slow=True))
    ratio = statistics.median(pull) / statistics.median(halves)
    print(f"fixed halves {halves}, pull {pull} samples/s; medians {ratio:.3f}")
    assert ratio >= 1.35


def test_memory_of_rank_0_does_not_grow(tmp_path: Path, model: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, model, queries=500)
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, tmp_path / "outputs"))
    used = []
    for done in (100, 300, 500):
        job.await_line(f"offline performance: {done}/500", timeout=600)
        used.append(memory_mib(rank_0(job)))
    code, _ = job.finish()
    print(f"rank 0 after 100, 300, 500 samples: {used} MiB")
    assert code == 0 and max(used) - used[0] < 16


def rank_0(job: jobs.Job) -> int:
    """Process number of the job's first rank."""
    (process,) = (one for one in job.survivors() if b"\0RANK=0\0" in b"\0" + Path(f"/proc/{one}/environ").read_bytes())
    return process


def memory_mib(process: int) -> float:
    """What of a process is in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
