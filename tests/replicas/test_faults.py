"""What a job does when a sample, a rank or a disk fails, or a person stops it. Real ranks, real LoadGen, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.replicas import jobs

pytestmark = pytest.mark.job

# What is promised. The recipe of these tests gives up sooner (3 and 8 s), the rest is for a busy machine.
DEAD_S, HANG_S = 30.0, 60.0


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    return jobs.write_recipe(tmp_path, model)


def result(outputs: Path) -> dict[str, object]:
    (folder,) = (one for one in outputs.iterdir() if not one.is_symlink())
    return json.loads((folder / "result.json").read_text())


def check_end(job: jobs.Job, outputs: Path, *, code: int, within: float, since: str, message: str) -> None:
    """Check exit code, time from fault to end, the one message, and that nothing is half-written. `finish` checks processes."""
    when = job.await_line(since)
    got, ended = job.finish()
    assert got == code, job.output
    assert ended - when < within, job.output
    assert len(job.failures()) == 1 and re.search(message, job.failures()[0]), job.output
    assert jobs.partial_files(outputs) == []


def test_sample_that_raises_is_tried_again_elsewhere(tmp_path: Path, recipe: Path) -> None:
    outputs = tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs, "--mode", "accuracy"), fault="raise@1:2")
    code, _ = job.finish()
    assert code == 0, job.output
    assert re.search(r"sample \d+ is tried again: rank 1 on \S+, stage \w+, sample \d+: MemoryError", job.output)
    assert result(outputs)["valid"] and result(outputs)["queries"] == 12
    assert len(list(outputs.glob("*-accuracy/videos/*.mp4"))) == 12 and jobs.partial_files(outputs) == []


@pytest.mark.slow
def test_sample_that_raises_twice_ends_the_run_invalid(tmp_path: Path, recipe: Path) -> None:
    outputs = tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs), fault="raise@0,1:2-99")
    check_end(job, outputs, code=1, within=DEAD_S, since="test: raise", message=r"INVALID: sample \d+ failed 2 times: rank \d on")
    assert result(outputs)["valid"] is False and "failed 2 times" in str(result(outputs)["invalid_reason"])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_rank_ends_the_job(tmp_path: Path, recipe: Path, rank: int) -> None:
    outputs = tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs), fault=f"kill@{rank}:3")
    place = rf"failed: rank {rank} on \S+, stage (to_host|vae_decode), sample \d+: the process died"
    check_end(job, outputs, code=3, within=DEAD_S, since="test: kill", message=place)


@pytest.mark.slow
def test_killed_rank_of_one_replica_ends_the_job(tmp_path: Path, model: Path) -> None:
    """The other rank is in a collective with it."""
    recipe, outputs = jobs.write_recipe(tmp_path, model, replicas=1), tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs), fault="kill@0:3")
    check_end(job, outputs, code=3, within=DEAD_S, since="test: kill", message=r"failed: rank 0 on .*: the process died")


@pytest.mark.slow
def test_killed_rank_under_bare_torchrun(tmp_path: Path, recipe: Path) -> None:
    outputs = tmp_path / "outputs"
    arguments = jobs.offline(recipe, outputs)
    job = jobs.start("wan_mlperf.run", arguments, fault="kill@1:3", command=jobs.torchrun())
    code, _ = job.finish()
    assert code not in (0, 2), job.output
    assert len(job.failures()) == 1 and "failed: rank 1 on" in job.failures()[0], job.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_rank_is_found_by_its_silence(tmp_path: Path, recipe: Path, rank: int) -> None:
    outputs = tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs), fault=f"stop@{rank}:3")
    silence = rf"failed: rank {rank} on \S+, stage \w+, sample \d+: no heartbeat for \d+ s"
    check_end(job, outputs, code=3, within=DEAD_S, since="test: stop", message=silence)


@pytest.mark.slow
def test_rank_that_hangs_is_found_by_its_standstill(tmp_path: Path, model: Path) -> None:
    """One replica of two ranks: the other one hangs in a collective, too."""
    recipe, outputs = jobs.write_recipe(tmp_path, model, replicas=1), tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs), fault="sleep@0:3")
    check_end(job, outputs, code=3, within=HANG_S, since="test: sleep", message=r"failed: rank \d on .*no progress for \d+ s")


@pytest.mark.slow
def test_error_of_one_rank_of_a_replica_is_named(tmp_path: Path, model: Path) -> None:
    """The other rank waits in a collective that never returns: the job ends with the error, not with the hang."""
    recipe, outputs = jobs.write_recipe(tmp_path, model, replicas=1), tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs), fault="raise-early@1:3")
    place = r"failed: rank 1 on \S+, stage \w+, sample \d+: MemoryError"
    check_end(job, outputs, code=3, within=HANG_S, since="test: raise", message=place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [("nan", r"the latents hold NaN or infinity after step 0 \(high_noise expert\)"), ("flat", "every frame is of one colour")],
)
def test_broken_numbers_are_named(tmp_path: Path, recipe: Path, kind: str, message: str) -> None:
    outputs = tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs), fault=f"{kind}@0,1:2-99")
    code, _ = job.finish()
    assert code == 1, job.output
    assert re.fullmatch(
        rf"INVALID: sample (\d+) failed 2 times: rank \d on \S+, stage \w+, sample \1: {message}; .*", job.failures()[0]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_by_a_person(tmp_path: Path, recipe: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches the whole process group, SIGTERM the launcher alone."""
    outputs = tmp_path / "outputs"
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs, "--mode", "accuracy"), fault="slow@0,1:2-99")
    job.await_line("accuracy: 3/12")
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)
    else:
        job.process.send_signal(number)
    asked = time.monotonic()
    code, ended = job.finish()
    assert code == 128 + number and ended - asked < 30, job.output
    assert len(job.failures()) == 1 and job.failures()[0].startswith(f"stopped by {number.name}"), job.output
    assert result(outputs)["valid"] is False and result(outputs)["queries"] >= 3  # type: ignore[operator]
    assert len(list(outputs.glob("*/videos/*.mp4"))) >= 3 and jobs.partial_files(outputs) == []


@pytest.mark.slow
def test_full_disk(tmp_path: Path, recipe: Path) -> None:
    outputs = tmp_path / "small"
    outputs.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(outputs)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        job = jobs.start("wan_mlperf.run", jobs.offline(recipe, outputs, "--mode", "accuracy"))
        code, _ = job.finish()
        assert code == 3, job.output
        assert len(job.failures()) == 1 and "No space left on device" in job.failures()[0], job.output
        assert re.search(r"rank 0 on \S+, stage respond, sample \d+", job.failures()[0]), job.output
        assert [file for file in jobs.partial_files(outputs) if file.suffix in (".mp4", ".json")] == []
    finally:
        subprocess.run(["umount", str(outputs)], check=True)


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path, recipe: Path) -> None:
    job = jobs.start("wan_mlperf.run", jobs.offline(recipe, tmp_path / "outputs"), fault="slow@0,1:2-99")
    job.await_line("offline performance: 3/12")
    job.process.kill()
    job.finish()
