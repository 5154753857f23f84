"""OpenAI's own client, unchanged, against a server: create, poll, download, list, delete."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.conftest import ROOT
from tests.replicas import jobs
from tests.serve.client import ROW, Server
from wan_mlperf.generate import __main__ as generate

warnings.filterwarnings("ignore", message="The Sora API")


@pytest.fixture
def client(served: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is asked for")


def test_create_poll_download_list_delete(client: openai.OpenAI, served: Server) -> None:
    begun = client.videos.create(prompt="a red circle", model="sora-2", size="32x32", extra_body={"seed": 7})  # type: ignore[arg-type]
    assert begun.object == "video" and begun.status in ("queued", "in_progress") and begun.progress < 100
    assert (begun.size, begun.seconds, begun.prompt, begun.completed_at) == ("32x32", "1", "a red circle", None)
    video = client.videos.poll(begun.id)
    assert video.status == "completed" and video.progress == 100 and video.error is None
    assert video.completed_at is not None and video.completed_at >= video.created_at
    content = client.videos.download_content(video.id).read()
    assert (
        content
        == served.ask("POST", "/v1/videos/sync", {**ROW, "prompt": "a red circle", "negative_prompt": None, "seed": 7}).body
    )
    listed = [one.id for one in client.videos.list(limit=1)]  # the client turns the pages itself
    assert video.id in listed and len(listed) == len(set(listed)) > 1
    assert [one.id for one in client.videos.list(order="asc")] == listed[::-1]
    assert client.videos.list(limit=2).data[0].id == listed[0]
    assert (served.folder / f"{video.id}.mp4").is_file()
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    assert not (served.folder / f"{video.id}.mp4").exists()
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_a_video_is_that_of_generate(client: openai.OpenAI, served: Server, tmp_path: Path) -> None:
    video = client.videos.create_and_poll(prompt="a blue square moving right", extra_body={"seed": 11, "negative_prompt": "red"})
    file = tmp_path / "video.mp4"
    arguments = ["a blue square moving right", "-o", str(file), "--seed", "11", "--negative", "red"]
    recipe = str(served.folder.parent / "test.yaml")
    assert generate.main([*arguments, "--recipe", recipe, "--set=mesh.ranks=1", "--set=mesh.replicas=1"]) == 0
    assert client.videos.download_content(video.id).read() == file.read_bytes()


def test_a_browser_reads_parts_of_a_video(client: openai.OpenAI, served: Server) -> None:
    video = client.videos.create_and_poll(prompt="a red circle")
    path = f"/v1/videos/{video.id}/content"
    whole = served.ask("GET", path).body
    part = served.ask("GET", path, headers={"Range": "bytes=10-19"})
    assert part.status == 206 and part.body == whole[10:20] and part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert served.ask("GET", path, headers={"Range": "bytes=9999999-"}).status == 416
    assert served.ask("GET", path, headers={"Range": "bytes=9999999-"}).headers["content-range"] == f"bytes */{len(whole)}"
    for malformed in ("bytes=5-2", "bytes=abc", "bytes"):
        assert served.ask("GET", path, headers={"Range": malformed}).error["code"] == "invalid_range"
    other = served.ask("GET", path, headers={"Range": "frames=1-2"})
    assert other.status == 200 and other.body == whole
    assert served.ask("HEAD", path).status == 200
    assert served.ask("GET", f"{path}?variant=thumbnail").error["param"] == "variant"


def test_a_full_queue_and_deleting_what_is_under_way(client: openai.OpenAI, served: Server) -> None:
    """The seventh that waits is refused with 429; what is deleted is not made; what stays is."""
    impatient = client.with_options(max_retries=0)

    def create(number: int) -> openai.types.Video | openai.RateLimitError:
        try:
            return impatient.videos.create(prompt=f"waiting {number}")
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(40) as pool:  # at once: one after the other they might be made as fast as they come
        answers = list(pool.map(create, range(40)))
    refused = [one for one in answers if isinstance(one, openai.RateLimitError)]
    begun = [one for one in answers if not isinstance(one, openai.RateLimitError)]
    assert begun and refused
    assert refused[0].code == "queue_full" and int(refused[0].response.headers["retry-after"]) >= 1
    assert served.ask("POST", "/v1/videos/generations", ROW).status == 200, "held requests are never one too many"
    for video in begun[:-1]:
        client.videos.delete(video.id)
    assert client.videos.poll(begun[-1].id).status == "completed"
    remaining = {one.id for one in client.videos.list(limit=100)}
    assert begun[-1].id in remaining and not remaining & {one.id for one in begun[:-1]}


def test_progress_comes_from_the_steps(client: openai.OpenAI, served: Server) -> None:
    video = client.videos.create(prompt="a red circle")
    seen = []
    until = time.monotonic() + 60
    while time.monotonic() < until:
        answer = client.videos.with_raw_response.retrieve(video.id)
        now = answer.parse()
        seen.append((now.status, now.progress))
        if now.status == "completed":
            break
        assert int(answer.headers["openai-poll-after-ms"]) >= 100
    order = ["queued", "in_progress", "completed"]
    assert [order.index(status) for status, _ in seen] == sorted(order.index(status) for status, _ in seen)
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen)
    assert all(progress == 0 for status, progress in seen if status == "queued") and seen[-1] == ("completed", 100)


def test_json_is_taken_as_well(served: Server) -> None:
    answer = served.ask("POST", "/v1/videos", {"prompt": "a red circle", "seconds": "1", "size": "32x32"})
    assert answer.status == 200 and answer.json["status"] == "queued"
    served.ask("DELETE", f"/v1/videos/{answer.json['id']}")


def test_a_file_is_refused_by_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a red circle", input_reference=("cat.png", b"\x89PNG", "image/png"))
    assert refused.value.param == "input_reference"


def test_a_video_that_is_no_file_any_more(client: openai.OpenAI, served: Server) -> None:
    video = client.videos.create_and_poll(prompt="a red circle")
    file = served.folder / f"{video.id}.mp4"
    file.unlink()
    file.mkdir()
    for method in ("GET", "HEAD"):
        assert served.ask(method, f"/v1/videos/{video.id}/content").status == 404
    assert served.ask("DELETE", f"/v1/videos/{video.id}").error["code"] == "storage_failed"
    file.rmdir()
    assert served.ask("DELETE", f"/v1/videos/{video.id}").status == 200


@pytest.mark.slow
def test_any_workload(tmp_path: Path, model: Path) -> None:
    """Another size, length, number of steps and guidance, as `generate` makes them; width x height here, rows x columns there."""
    recipe = jobs.write_recipe(tmp_path, model)
    with Server(recipe, tmp_path / "videos", "--any-workload").ready().running() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        extra = {"num_frames": 9, "num_inference_steps": 3, "guidance_scale": 5.0, "seed": 3}
        video = client.videos.create_and_poll(prompt="a cat", size="64x48", extra_body=extra)  # type: ignore[arg-type]
        assert video.status == "completed" and video.size == "64x48"
        content = client.videos.download_content(video.id).read()
        assert server.ask("POST", "/v1/videos/sync", {"prompt": "a cat", "size": "48x64", **extra}).body == content
        with pytest.raises(openai.BadRequestError) as refused:
            client.videos.create(prompt="a cat", size="4096x4096", extra_body={"num_frames": 1025})
        assert refused.value.param == "size"
        assert server.ask("POST", "/v1/videos/sync", {"prompt": "a cat", "size": "40x64"}).error["param"] == "size"
        assert server.ask("POST", "/v1/videos/sync", {"prompt": "a cat", "seconds": 2}).status == 200
    file = tmp_path / "video.mp4"
    words = [sys.executable, "-m", "wan_mlperf.generate", "a cat", "-o", str(file), "--recipe", str(recipe), "--seed", "3"]
    words += ["--size", "48x64", "--frames", "9", "--steps", "3", "--set=workload.guidance_high=5.0"]
    subprocess.run([*words, "--set=mesh.ranks=1", "--set=mesh.replicas=1"], cwd=ROOT, check=True)
    assert file.read_bytes() == content
