"""How a server ends, and what its next start knows."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.replicas import jobs
from tests.serve.client import ROW, Answer, Server

OPEN = "/v1/videos/generations"


def hold(server: Server, number: int, answers: dict[int, Answer | BaseException]) -> list[threading.Thread]:
    """Send `number` requests and leave them open."""

    def one(which: int) -> None:
        try:
            answers[which] = server.ask("POST", OPEN, {**ROW, "prompt": f"a circle {which}"}, timeout=400)
        except (OSError, http.client.HTTPException) as error:
            answers[which] = error

    threads = [threading.Thread(target=one, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    return threads


def process_of(server: Server, rank: int) -> int:
    """The process of a rank."""
    for process in server.job.survivors():
        if f"RANK={rank}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            return process
    raise AssertionError(f"no process of rank {rank}")


def kill_while_40_are_open(server: Server, rank: int, *, videos: int) -> dict[int, Answer | BaseException]:
    """Have 40 requests open, wait until `videos` are finished, kill -9 this rank; return the answers, all within 30 s."""
    answers: dict[int, Answer | BaseException] = {}
    threads = hold(server, 40, answers)

    def known() -> int:
        return len(server.ask("GET", "/v1/videos?limit=100").json["data"])

    until = time.monotonic() + 300
    while sum(1 for _ in server.folder.glob("*.mp4")) < videos or known() < 43:
        assert server.job.process.poll() is None and time.monotonic() < until, server.job.output
        time.sleep(0.1)
    os.kill(process_of(server, rank), signal.SIGKILL)
    when = time.monotonic()
    for thread in threads:
        thread.join()
    assert time.monotonic() - when < 30
    code, ended = server.job.finish()
    assert code == 3 and ended - when < 30, server.job.output
    assert len(server.job.failures()) == 1 and f"failed: rank {rank} on" in server.job.failures()[0], server.job.output
    assert jobs.partial_files(server.folder) == []
    return answers


def check_restart(recipe: Path, folder: Path, answers: dict[int, Answer | BaseException], queued: list[str]) -> None:
    """A new server knows what was finished, and says which jobs were lost."""
    finished = [answer for answer in answers.values() if isinstance(answer, Answer) and answer.status == 200]
    with Server(recipe, folder).ready().running() as again:
        listed = {video["id"]: video for video in again.ask("GET", "/v1/videos?limit=100").json["data"]}
        for answer in finished:
            video = listed[answer.json["video_id"]]
            assert video["status"] == "completed"
            assert again.ask("GET", f"/v1/videos/{video['id']}/content").body == Path(answer.json["video_path"]).read_bytes()
        assert {listed[one]["status"] for one in queued} <= {"completed", "failed"}
        assert {one for one, video in listed.items() if video["status"] == "completed"} == {
            file.stem for file in folder.glob("*.mp4")
        }
        assert {video["status"] for video in listed.values()} == {"completed", "failed"}
        assert "finished videos" in again.job.output


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_killed_worker_ends_the_server_with_every_request_answered(tmp_path: Path, model: Path, replicas: int) -> None:
    recipe, folder = jobs.write_recipe(tmp_path, model, replicas=replicas), tmp_path / "videos"
    server = Server(recipe, folder, fault="long@0,1:2-999").ready()  # slow enough for all 40 to come before the end
    queued = [server.ask("POST", "/v1/videos", {"prompt": f"queued {number}"}).json["id"] for number in range(3)]
    answers = kill_while_40_are_open(server, 1, videos=5)
    statuses = [answer.status for answer in answers.values() if isinstance(answer, Answer)]
    assert len(statuses) == 40 and set(statuses) == {200, 503}, answers
    check_restart(recipe, folder, answers, queued)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (2, 2)])
def test_a_killed_leader_closes_every_connection(tmp_path: Path, model: Path, ranks: int, replicas: int) -> None:
    """Rank 0 answers the requests: once it is killed nobody can, and their clients see the connection end at once."""
    recipe, folder = jobs.write_recipe(tmp_path, model, replicas=replicas), tmp_path / "videos"
    server = Server(recipe, folder, f"--set=mesh.ranks={ranks}", fault="long@0,1:2-999").ready()
    queued = [server.ask("POST", "/v1/videos", {"prompt": f"queued {number}"}).json["id"] for number in range(3)]
    answers = kill_while_40_are_open(server, 0, videos=4)
    assert len(answers) == 40
    assert {answer.status for answer in answers.values() if isinstance(answer, Answer)} <= {200}
    assert any(isinstance(answer, ConnectionError | http.client.HTTPException) for answer in answers.values()), answers
    check_restart(recipe, folder, answers, queued)


@pytest.mark.slow
def test_a_server_that_is_killed_knows_its_jobs_again(tmp_path: Path, model: Path) -> None:
    """All ranks at once, in the middle of work: nothing could be written down any more."""
    recipe, folder = jobs.write_recipe(tmp_path, model), tmp_path / "videos"
    server = Server(recipe, folder).ready()
    begun = [server.ask("POST", "/v1/videos", {"prompt": f"queued {number}"}).json["id"] for number in range(20)]
    while server.ask("GET", f"/v1/videos/{begun[4]}").json["status"] != "completed":
        time.sleep(0.02)
    server.job.kill()
    server.job.finish()
    with Server(recipe, folder).ready().running() as again:
        states = [again.ask("GET", f"/v1/videos/{one}").json for one in begun]
        assert [state["status"] for state in states[:5]] == ["completed"] * 5
        lost = [state["id"] for state in states if state["status"] == "failed"]
        assert lost and all(state["error"]["code"] == "lost" for state in states if state["status"] == "failed")
        assert f"{len(lost)} lost when the server ended: {', '.join(lost)}" in again.job.output
        completed = [state["id"] for state in states if state["status"] == "completed"]
        assert {file.stem for file in folder.glob("*.mp4")} == set(completed)
        again.ask("DELETE", f"/v1/videos/{completed[0]}")
        (folder / f"{completed[1]}.mp4").unlink()
        assert again.ask("GET", f"/v1/videos/{completed[1]}/content").status == 404
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["videos"]) == {f"{one}.mp4" for one in completed[1:]} and len(manifest["jobs"]) == 19


@pytest.mark.slow
def test_sigterm_lets_what_is_under_way_finish(tmp_path: Path, model: Path) -> None:
    recipe, folder = jobs.write_recipe(tmp_path, model), tmp_path / "videos"
    server = Server(recipe, folder, fault="long@0,1:2-999").ready()  # each takes 1.5 s more
    answers: dict[int, Answer | BaseException] = {}
    threads = hold(server, 20, answers)
    while not any(folder.glob("*.mp4")):
        time.sleep(0.02)
    assert server.stop() == 0, server.job.output
    for thread in threads:
        thread.join()
    statuses = [answer.status for answer in answers.values() if isinstance(answer, Answer)]
    assert len(statuses) == 20 and set(statuses) == {200, 503}
    assert statuses.count(200) == len(list(folder.glob("*.mp4"))) >= 3
    assert server.job.failures() == []


@pytest.mark.slow
def test_sigterm_does_not_wait_for_ever(tmp_path: Path, model: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, model)
    server = Server(recipe, tmp_path / "videos", "--drain", "0.5", fault="long@0,1:2-999").ready()
    answers: dict[int, Answer | BaseException] = {}
    threads = hold(server, 2, answers)
    time.sleep(0.5)
    assert server.stop() in (0, 128 + signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert all(isinstance(answer, Answer) for answer in answers.values())


@pytest.mark.slow
def test_ctrl_c_ends_at_once_with_every_request_answered(tmp_path: Path, model: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, model)
    server = Server(recipe, tmp_path / "videos", fault="long@0,1:2-999").ready()
    answers: dict[int, Answer | BaseException] = {}
    threads = hold(server, 12, answers)
    time.sleep(1)
    assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
    for thread in threads:
        thread.join()
    assert all(isinstance(answer, Answer) and answer.status in (200, 503) for answer in answers.values())


@pytest.mark.slow
def test_ctrl_c_while_loading_is_one_line(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "videos"
    server = Server(jobs.write_recipe(tmp_path, model), folder)
    server.job.await_line("loading: ")
    assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
    assert len(server.job.failures()) == 1 and "stopped by SIGINT" in server.job.failures()[0], server.job.output
    assert "ready at" not in server.job.output and list(folder.glob("*.mp4")) == []


@pytest.mark.slow
def test_a_full_disk_fails_a_job_and_not_the_server(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with Server(jobs.write_recipe(tmp_path, model), folder).ready().running() as server:
            statuses: list[Any] = [server.ask("POST", "/v1/videos/sync", ROW).status for _ in range(20)]
            assert statuses[0] == 200 and statuses[-1] == 500
            for video in server.ask("GET", "/v1/videos?limit=100").json["data"]:
                server.ask("DELETE", f"/v1/videos/{video['id']}")
            assert server.ask("POST", "/v1/videos/sync", ROW).status == 200
    finally:
        subprocess.run(["umount", str(folder)], check=True)
