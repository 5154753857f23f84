"""The queue and the book, in this process: a stand-in makes the videos, at once and only when it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wan_mlperf import load_recipe
from wan_mlperf.errors import BadInput
from wan_mlperf.generate.video_list import VideoList
from wan_mlperf.preflight import Setup, prepare
from wan_mlperf.replicas.dispatch import FinishedSample, OnLost, OnResult
from wan_mlperf.replicas.dispatcher import OnProgress
from wan_mlperf.replicas.messages import Job, Progress
from wan_mlperf.serve.book import Book
from wan_mlperf.serve.desk import Desk
from wan_mlperf.serve.errors import Refused
from wan_mlperf.serve.forecast import Forecast
from wan_mlperf.serve.metrics import Metrics
from wan_mlperf.serve.task import Task
from wan_mlperf.serve.wanted import Policy, Reader
from wan_mlperf.videos.manifest import MANIFEST, Manifest


class Engine:
    """Stands in for the dispatcher of two replicas: keeps what it is given until `make` or `lose`."""

    on_result: OnResult
    on_lost: OnLost
    on_progress: OnProgress
    capacity = 2

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.cancelled: list[int] = []
        self.came = threading.Semaphore(0)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Keep them."""
        self.jobs += jobs
        for _ in jobs:
            self.came.release()

    def make(self) -> Job:
        """Finish the oldest."""
        job = self.jobs.pop(0)
        content = np.frombuffer(job.prompt.encode(), np.uint8)
        self.on_result(FinishedSample(job=job, content=content, seconds=1.0, spans={"denoise_low": 1.0}))
        return job

    def lose(self, reason: str) -> None:
        """The oldest failed for good."""
        self.on_lost(self.jobs.pop(0), reason)

    def cancel(self, ticket: int) -> None:
        """Note it."""
        self.cancelled.append(ticket)

    def stay_ready(self) -> None:
        """Never asked."""

    def run(self, test: Callable[[], None]) -> None:
        """Never asked."""

    def serve(self) -> None:
        """Never asked."""


@pytest.fixture(scope="module")
def setup() -> Setup:
    return prepare(load_recipe("tiny"), world=2)


class Place:
    """A desk at work, and what belongs to it."""

    def __init__(self, setup: Setup, folder: Path, *, most_waiting: int = 3) -> None:
        self.engine, self.book = Engine(), Book(folder)
        self.book.open()
        self.desk = Desk(self.engine, setup, self.book, Metrics(), most_waiting=most_waiting)
        self.reader = Reader(setup, policy="fixed", latents=None)
        self.thread = threading.Thread(target=self.desk.work)
        self.thread.start()

    def accept(self, prompt: str, *, held: bool = False, **fields: Any) -> Task:
        """Take a job, as the routes do."""
        wanted, _ = self.reader.read({"prompt": prompt, **fields}, "openai")
        return self.desk.accept(wanted, route="generations" if held else "videos", held=held)

    def close(self) -> None:
        """Stop; what is under way is made first."""
        self.desk.stop()
        while self.engine.jobs:
            self.engine.make()
        self.thread.join(10)
        self.book.close()
        assert not self.thread.is_alive()


@pytest.fixture
def place(setup: Setup, tmp_path: Path) -> Iterator[Place]:
    made = Place(setup, tmp_path)
    yield made
    made.close()


def submitted(place: Place, number: int) -> list[str]:
    """Wait until so many more were handed over; the prompts that are with the engine."""
    for _ in range(number):
        assert place.engine.came.acquire(timeout=10)
    return [job.prompt for job in place.engine.jobs]


def test_first_come_first_served_and_no_more_than_the_replicas_take(place: Place) -> None:
    tasks = [place.accept(f"prompt {number}", held=True) for number in range(5)]
    assert submitted(place, 2) == ["prompt 0", "prompt 1"]
    place.engine.make()
    assert submitted(place, 1) == ["prompt 1", "prompt 2"]
    outcome = tasks[0].outcome.result(10)
    assert outcome.content == b"prompt 0" and set(outcome.spans) == {"wait", "denoise_low", "keep"}
    video = place.book.get(tasks[0].video_id)
    assert video is not None and video.status == "completed" and place.book.path(video).read_bytes() == b"prompt 0"


def test_the_queue_is_full_for_those_who_do_not_wait(place: Place) -> None:
    for number in range(2):
        place.accept(f"under way {number}")
    submitted(place, 2)
    for number in range(3):
        place.accept(f"waits {number}")
    with pytest.raises(Refused) as refused:
        place.accept("one too many")
    assert refused.value.status == 429 and "retry-after" in refused.value.headers
    held = [place.accept(f"held {number}", held=True) for number in range(300)]
    assert len(held) == 300 and len(place.desk.tasks()) == 305


def test_what_is_deleted_is_not_made_and_not_known(place: Place) -> None:
    tasks = [place.accept(f"prompt {number}") for number in range(3)]
    submitted(place, 2)
    for task in (tasks[0], tasks[2]):
        place.desk.delete(task.video_id)
        assert place.book.get(task.video_id) is None and isinstance(task.outcome.exception(10), Refused)
    assert place.engine.cancelled == [tasks[0].job.ticket]
    place.engine.lose("cancelled")
    place.engine.make()
    assert tasks[1].outcome.result(10).content == b"prompt 1" and place.engine.jobs == []
    assert [file.name for file in place.book.folder.glob("*.mp4")] == [f"{tasks[1].video_id}.mp4"]


def test_a_video_that_fails_says_so_without_telling_of_the_host(place: Place) -> None:
    task = place.accept("prompt")
    submitted(place, 1)
    place.engine.lose("rank 1 on host-7, stage vae_decode: MemoryError: /data/model")
    error = task.outcome.exception(10)
    assert isinstance(error, Refused) and error.status == 500
    video = place.book.get(task.video_id)
    assert video is not None and video.status == "failed" and video.error is not None and "host-7" not in video.error[1]


def test_it_is_under_way_from_its_first_step(place: Place) -> None:
    task = place.accept("prompt")
    submitted(place, 1)

    def status() -> str:
        video = place.book.get(task.video_id)
        assert video is not None
        return video.status

    assert status() == "queued"
    shares = []
    for steps, frames in ((0, 0), (1, 0), (20, 0), (20, 17)):
        place.engine.on_progress(Progress(ticket=task.job.ticket, steps=steps, frames=frames))
        shares.append(task.share)
    assert status() == "in_progress" and shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1


def test_everyone_is_answered_at_the_end(setup: Setup, tmp_path: Path) -> None:
    place = Place(setup, tmp_path)
    tasks = [place.accept(f"prompt {number}", held=True) for number in range(6)]
    submitted(place, 2)
    place.desk.stop()
    assert all(isinstance(task.outcome.exception(10), Refused) for task in tasks[2:])
    with pytest.raises(Refused):
        place.accept("too late")
    place.engine.make()
    place.desk.fail_all()
    assert tasks[0].outcome.result(10).content == b"prompt 0"
    error = tasks[1].outcome.exception(10)
    assert isinstance(error, Refused) and error.status == 503
    place.close()


def test_a_restart_knows_what_was_finished_and_says_what_was_lost(setup: Setup, tmp_path: Path) -> None:
    place = Place(setup, tmp_path)
    tasks = [place.accept(f"prompt {number}") for number in range(4)]
    submitted(place, 2)
    place.engine.make()
    place.engine.make()
    place.book.flush()
    before = (tmp_path / MANIFEST).read_text()
    place.close()
    (tmp_path / MANIFEST).write_text(before)  # as if it had been killed
    for task in tasks[2:3]:
        (tmp_path / f"{task.video_id}.mp4").write_bytes(b"whole, though no manifest says so yet")
    (tmp_path / f"{tasks[3].video_id}.mp4").unlink()
    again = Book(tmp_path)
    again.open()
    assert again.found.finished == 3 and again.found.lost == (tasks[3].video_id,)
    videos, more = again.page(after=None, limit=10, newest_first=False)
    assert [video.id for video in videos] == [task.video_id for task in tasks] and not more
    assert [video.status for video in videos] == ["completed", "completed", "completed", "failed"]
    added = again.add(recipe=("key", {}), route="videos", prompt="p", seed=1, negative_prompt=None, size="1x1", seconds="1")
    assert added.number == videos[-1].number + 1
    again.close()


def test_the_manifest_is_that_of_generate(place: Place) -> None:
    task = place.accept("prompt", seed=2**40, negative_prompt="red")
    submitted(place, 1)
    place.engine.make()
    task.outcome.result(10)
    place.book.flush()
    manifest = Manifest.read(place.book.folder / MANIFEST)
    entry = manifest.videos[f"{task.video_id}.mp4"]
    assert (entry.prompt, entry.seed) == ("prompt", 2**40)
    assert manifest.recipes[entry.recipe]["workload.negative_prompt"] == "red"
    assert Manifest.read(place.book.folder / MANIFEST).text() == (place.book.folder / MANIFEST).read_text()


@pytest.mark.parametrize("jobs", [{"a": {}}, {"a": {"number": "x"}}, {"a": 5}])
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, jobs: Any) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"recipes": {}, "videos": {}, "jobs": jobs}))
    with pytest.raises(BadInput, match="cannot be used"):
        Book(tmp_path).open()


@pytest.mark.parametrize("change", [{"created_at": float("nan")}, {"prompt": "\ud800"}, {"id": "../victim"}])
def test_a_damaged_manifest_is_refused_at_the_start(setup: Setup, tmp_path: Path, change: dict[str, Any]) -> None:
    place = Place(setup, tmp_path)
    task = place.accept("prompt")
    place.close()
    values = json.loads((tmp_path / MANIFEST).read_text())
    job = values["jobs"].pop(task.video_id) | change
    values["jobs"][job.pop("id", task.video_id)] = job
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(BadInput, match="cannot be used") as refused:
        Book(tmp_path).open()
    assert "\n" not in str(refused.value) and "--force" not in str(refused.value)


def test_a_folder_of_generate_keeps_its_videos(setup: Setup, tmp_path: Path) -> None:
    """And `generate` keeps the server's jobs, with what made them."""
    made = VideoList(tmp_path, ["a circle"], seed=1, recipe={"mesh": 1})
    made.lock()
    made.add(0, b"a circle")
    made.unlock()
    before = Manifest.read(tmp_path / MANIFEST)
    place = Place(setup, tmp_path)
    task = place.accept("prompt")
    submitted(place, 1)
    place.engine.make()
    task.outcome.result(10)
    place.desk.stop()
    lost = place.book.add(recipe=("key", {}), route="videos", prompt="p", seed=1, negative_prompt=None, size="1x1", seconds="1")
    place.close()
    served = Manifest.read(tmp_path / MANIFEST)
    assert served.videos["0.mp4"] == before.videos["0.mp4"] and f"{task.video_id}.mp4" in served.videos
    assert lost.id in served.jobs
    assert VideoList(tmp_path, ["a circle"], seed=1, recipe={"mesh": 1}).missing() == []
    longer = VideoList(tmp_path, ["a circle", "a star"], seed=1, recipe={"mesh": 1})
    longer.lock()
    longer.add(1, b"a star")
    longer.unlock()
    after = Manifest.read(tmp_path / MANIFEST)
    assert after.jobs == served.jobs and after.recipes == served.recipes and after.videos.items() > served.videos.items()


def test_what_cannot_be_deleted_is_kept(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    task = place.accept("prompt")
    submitted(place, 1)
    place.engine.make()
    task.outcome.result(10)
    file = place.book.folder / f"{task.video_id}.mp4"
    file.unlink()
    file.mkdir()  # root may delete any file, but nobody unlinks a folder
    with pytest.raises(Refused) as refused:
        place.desk.delete(task.video_id)
    assert (refused.value.status, refused.value.code) == (500, "storage_failed")
    assert place.book.get(task.video_id) is not None and f"video {task.video_id}: cannot be deleted" in capfd.readouterr().err
    file.rmdir()
    place.desk.delete(task.video_id)
    assert place.book.get(task.video_id) is None


def test_pages_of_the_list(place: Place) -> None:
    ids = [place.accept(f"prompt {number}").video_id for number in range(3)]
    assert [video.id for video in place.book.page(after=None, limit=2, newest_first=True)[0]] == ids[:0:-1]
    assert place.book.page(after=None, limit=2, newest_first=True)[1] is True
    videos, more = place.book.page(after=ids[1], limit=2, newest_first=True)
    assert [video.id for video in videos] == ids[:1] and not more
    with pytest.raises(KeyError):
        place.book.page(after="nobody", limit=2, newest_first=True)


def read(setup: Setup, policy: Policy, dialect: str = "endpoints", **fields: Any) -> Any:
    wanted, _ = Reader(setup, policy=policy, latents=None).read({"prompt": "a", **fields}, dialect)  # type: ignore[arg-type]
    return wanted


def test_the_three_policies_of_a_workload(setup: Setup) -> None:
    benchmark: dict[str, Any] = {"size": "720x1280", "num_frames": 81, "fps": 16, "seconds": 5.0, "num_inference_steps": 20}
    with pytest.raises(Refused, match="size"):
        read(setup, "fixed", **benchmark)
    assert read(setup, "recipe", **benchmark).changes is None
    assert read(setup, "any", **benchmark).changes == {"height": 720, "width": 1280, "frames": 81, "fps": 16}
    assert read(setup, "any", "openai", size="1280x720").changes == {"height": 720, "width": 1280}
    assert read(setup, "fixed", size="64x64", num_frames=17, fps=8, seconds=5.0).changes is None
    assert read(setup, "any", seconds=1.0).changes == {"frames": 9}
    wrong: list[dict[str, Any]] = [{"size": "720x1281"}, {"num_inference_steps": 0}, {"guidance_scale": 0.5}]
    for fields in [*wrong, {"size": "4096x4096", "num_frames": 81}]:
        with pytest.raises(Refused) as refused:
            read(setup, "any", **fields)
        assert refused.value.param == next(iter(fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": 3600}, r"seconds: 3600 is not allowed \(28801 frames at 8 per second\); allowed: frames less than or equal"),
        ({"fps": 10**400}, r"fps: 1\d{76}\.\.\. is not allowed"),
        ({"\ud800": 1}, r"'\\ud800': no such field"),
        ({"": 1}, "'': no such field"),
    ],
)
def test_messages_name_what_was_sent(setup: Setup, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        read(setup, "any", **fields)
    assert len(refused.value.message.encode()) < 400 and refused.value.answer()
    with pytest.raises(Refused) as fixed:
        read(setup, "fixed", **fields)
    assert len(fixed.value.message) < 400


@pytest.mark.parametrize(("name", "value"), [("seed", "1_0"), ("seed", "1.0"), ("num_frames", "1_7"), ("seconds", "1_0")])
def test_numbers_of_a_form_are_plain(setup: Setup, name: str, value: str) -> None:
    for text in (True, False):
        with pytest.raises(Refused, match=name):
            Reader(setup, policy="any", latents=None).read({"prompt": "a", name: value}, "openai", text=text)


def test_the_seed_of_the_workload_is_the_recipes_own_noise(setup: Setup) -> None:
    """With a fixed latent, a request that names the benchmark's seed must get the benchmark's noise."""
    assert read(setup, "fixed", seed=42).seed is None and read(setup, "fixed", seed=7).seed == 7
    assert read(setup, "any", size="32x32").seed == 42


def test_forecasts() -> None:
    workload = load_recipe("tiny").effective_workload
    forecast = Forecast(2)
    assert forecast.seconds(workload) is None and forecast.seconds_left(workload, share=0.5, running=3.0) == 3.0
    forecast.learn(workload, 10.0)
    assert forecast.seconds(workload) == 10.0 and forecast.seconds_left(workload, share=0.0, running=4.0) == 6.0
    assert forecast.seconds_to_wait(workload, before=3) == 20.0 and forecast.seconds_to_next() == 5
