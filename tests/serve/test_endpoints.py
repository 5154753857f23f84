"""MLCommons' endpoints client, replayed from what it sent: its fields in its order, one request at a time and 248 at once."""

from __future__ import annotations

import base64
import http.client
import json
import resource
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sut.prompts import benchmark_prompts
from tests.replicas import jobs
from tests.serve.client import ROW, Server
from wan_mlperf.video import read_mp4


def test_a_path_is_answered_with_two_fields_and_kept(served: Server) -> None:
    answer = served.ask("POST", "/v1/videos/generations", ROW)
    assert answer.status == 200 and set(answer.json) == {"video_id", "video_path"}
    file = Path(answer.json["video_path"])
    assert file.is_absolute() and read_mp4(file).shape == (5, 32, 32, 3)
    stages = {one.partition(";")[0] for one in answer.headers["server-timing"].split(", ")}
    assert {"wait", "text_encode", "denoise_high", "denoise_low", "vae_decode", "encode", "keep"} <= stages


def test_bytes_are_the_same_video(served: Server) -> None:
    path = served.ask("POST", "/v1/videos/generations", ROW).json["video_path"]
    answer = served.ask("POST", "/v1/videos/generations", {**ROW, "response_format": "video_bytes"})
    assert answer.status == 200 and set(answer.json) == {"video_id", "video_bytes"}
    assert base64.b64decode(answer.json["video_bytes"]) == Path(path).read_bytes()
    sync = served.ask("POST", "/v1/videos/sync", ROW)
    assert sync.status == 200 and sync.headers["content-type"] == "video/mp4" and sync.body == Path(path).read_bytes()


def test_single_stream_on_one_connection(served: Server) -> None:
    """Keep-alive, one in flight; as in its warm-up, some prompts carry a salt."""
    connection = http.client.HTTPConnection(served.host, served.port, timeout=120)
    prompts = [f"[{number:016x}] {prompt}" if number < 3 else prompt for number, prompt in enumerate(benchmark_prompts()[:6])]
    for prompt in prompts:
        connection.request("POST", "/v1/videos/generations", json.dumps({**ROW, "prompt": prompt}))
        response = connection.getresponse()
        assert response.status == 200 and not response.will_close
        assert set(json.loads(response.read())) == {"video_id", "video_path"}
    connection.close()


@pytest.fixture
def _many_files() -> Iterator[None]:
    """This process holds the other ends of the connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 10_000:
        pytest.skip(f"ulimit -Hn is {before[1]}: too few for 7,056 connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_many_files")
def test_offline_with_248_at_once_after_7056_connections(tmp_path: Path) -> None:
    """The client opens a quarter of the ephemeral ports, leaves them idle, and then issues everything.

    The embedded model with two replicas. The server is started with a soft limit of 1,024 open files, as shells have it, and
    raises it itself.
    """
    recipe = jobs.write_recipe(tmp_path, Path("embedded"))
    limited = ["prlimit", "--nofile=1024:", sys.executable, "-m"]
    with Server(recipe, tmp_path / "videos", command=limited).ready().running() as server:
        idle = [socket.create_connection((server.host, server.port), timeout=60) for _ in range(7056)]
        answers: dict[int, Any] = {}

        def one(number: int) -> None:
            body = {**ROW, "prompt": benchmark_prompts()[number]}
            answers[number] = server.ask("POST", "/v1/videos/generations", body, timeout=900)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(248)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for connection in idle:
            connection.close()
        assert [answers[number].status for number in range(248)] == [200] * 248
        files = {Path(answer.json["video_path"]) for answer in answers.values()}
        assert len(files) == 248 and all(file.is_file() for file in files)
        assert jobs.partial_files(server.folder) == []
        assert server.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"size": "720x1280"}, "size"),
        ({"num_inference_steps": 20}, "num_inference_steps"),
        ({"guidance_scale": 5.0}, "guidance_scale"),
        ({"guidance_scale_2": 1.5}, "guidance_scale_2"),
        ({"num_frames": 81}, "num_frames"),
        ({"fps": 16}, "fps"),
        ({"boundary_ratio": 0.9}, "boundary_ratio"),
        ({"num_frames": None, "seconds": 5.0}, "seconds"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "word " * 600}, "prompt"),
        ({"negative_prompt": "word " * 600}, "negative_prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"output_format": "avi"}, "output_format"),
        ({"latent_path": "/etc/passwd"}, "latent_path"),
        ({"latent_path": "../videos/manifest.json"}, "latent_path"),
        ({"latent_path": "\0"}, "latent_path"),
        ({"promt": "a"}, "promt"),
    ],
)
def test_what_is_not_the_workload_is_refused_by_name(served: Server, change: dict[str, Any], param: str) -> None:
    answer = served.ask("POST", "/v1/videos/generations", {**ROW, **change})
    assert answer.status == 400 and answer.error["param"] == param and answer.error["message"].startswith(param), answer.body
    assert str(served.folder.parent) not in answer.body.decode()


def test_a_latent_of_the_named_folder_is_the_noise(served: Server, model: Path) -> None:
    shape = (1, 16, 2, 4, 4)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    torch.save(noise, served.folder.parent / "latents" / "fixed.pt")
    torch.save(noise[..., :2], served.folder.parent / "latents" / "small.pt")
    by_latent = served.ask("POST", "/v1/videos/sync", {**ROW, "latent_path": "fixed.pt"})
    by_seed = served.ask("POST", "/v1/videos/sync", {**ROW, "seed": 7})
    assert by_latent.status == by_seed.status == 200 and by_latent.body == by_seed.body
    small = served.ask("POST", "/v1/videos/sync", {**ROW, "latent_path": "small.pt"})
    assert small.status == 400 and small.error["param"] == "latent_path"


def test_who_goes_away_leaves_nothing_waiting(served: Server) -> None:
    """A held request whose client has gone is not made, so that it stands in nobody's way."""
    connections = [http.client.HTTPConnection(served.host, served.port) for _ in range(40)]
    for number, connection in enumerate(connections):
        connection.request("POST", "/v1/videos/generations", json.dumps({**ROW, "prompt": f"left {number}"}))
    for connection in connections:
        connection.close()
    assert served.ask("POST", "/v1/videos/generations", ROW).status == 200
    prompts = [video["prompt"] for video in served.ask("GET", "/v1/videos?limit=100").json["data"]]
    assert len([prompt for prompt in prompts if prompt.startswith("left")]) < 20
