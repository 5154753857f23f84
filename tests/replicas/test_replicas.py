"""Many replicas, on one host and on two, batches, and lists of prompts that are stopped and started."""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SMALL
from tests.replicas import jobs
from wan_mlperf import Pipeline, load_recipe, run
from wan_mlperf.errors import BadInput
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.replicas import dispatch
from wan_mlperf.replicas.messages import Job
from wan_mlperf.replicas.watch import Watch


@pytest.mark.job
@pytest.mark.parametrize(
    ("of_one", "own"),
    [
        (1, True),
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
    ],
    ids=["a rank each", "two ranks each", "default recipe"],
)
def test_two_hosts_complete_a_valid_run(of_one: int, own: bool, tmp_path: Path, model: Path) -> None:
    """Two agents of `of_one` ranks on the loopback address: the second one's results go over the process group."""
    outputs = tmp_path / "outputs"
    if own:  # two replicas: one on each host
        recipe = jobs.write_recipe(tmp_path, model)
        arguments = jobs.offline(recipe, outputs, "--set=mesh.replicas=auto", f"--set=mesh.ulysses={of_one}")
        mesh = f"2 replicas x CFG 1 x Ulysses {of_one}"
    else:
        arguments = ["--scenario", "offline", "--outputs", str(outputs), "--model", str(model), *SMALL]
        mesh = "4 replicas x CFG 1 x Ulysses 1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    more = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=test"]
    command = jobs.torchrun(ranks=of_one, more=more)
    agents = [jobs.start("wan_mlperf.run", arguments, command=command) for _ in range(2)]
    try:
        for agent in agents:
            code, _ = agent.finish()
            assert code == 0, agent.output
    finally:
        for agent in agents:
            agent.kill()
    (folder,) = (one for one in outputs.iterdir() if not one.is_symlink())
    result = json.loads((folder / "result.json").read_text())
    assert result["valid"] and result["world_size"] == 2 * of_one and result["mesh"] == mesh


@pytest.mark.slow
def test_the_death_of_a_host_ends_the_other(tmp_path: Path, model: Path) -> None:
    """One agent and its rank are killed at once, as in a power cut: the other host's rank misses the heartbeats."""
    recipe, outputs = jobs.write_recipe(tmp_path, model), tmp_path / "outputs"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = jobs.offline(recipe, outputs)
    agents = []
    for number in range(2):
        more = ["--nnodes=2", f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = jobs.torchrun(ranks=1, more=more)
        agents.append(jobs.start("wan_mlperf.run", arguments, command=command, fault="slow@0,1:1-99"))
    agents[0].await_line("offline performance: 3/12")
    agents[1].kill()
    killed = time.monotonic()
    code, ended = agents[0].finish()
    assert code not in (0, 2) and ended - killed < 20, agents[0].output
    assert len(agents[0].failures()) == 1 and "failed: rank 1 on" in agents[0].failures()[0], agents[0].output
    agents[1].finish()


def test_several_replicas_cannot_answer_single_queries(tmp_path: Path, model: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, model)
    with pytest.raises(BadInput, match=r"mesh\.replicas: 2 replicas x CFG 1 x Ulysses 1 with scenario singlestream"):
        run.main(["--scenario", "singlestream", "--recipe", str(recipe), "--outputs", str(tmp_path)])


def test_a_batch_equals_single_runs(tmp_path: Path, model: Path) -> None:
    """Every sample of a batch has its own noise and text. Matrix products have another shape, so bits may differ."""
    file = jobs.write_recipe(tmp_path, model, replicas=1)
    recipe = load_recipe(file, overrides=["offline.batch=3", "mesh.ranks=1", "warmup_queries=0"])
    pipeline = Pipeline.load(recipe)
    dispatcher = dispatch.start(pipeline, Watch(recipe.faults), pack=lambda frames: frames)
    frames: dict[int, np.ndarray] = {}

    def keep(result: dispatch.FinishedSample) -> None:
        assert isinstance(result.content, np.ndarray)
        frames[result.job.sample] = result.content.copy()

    dispatcher.on_result = keep
    prompts = [f"a shape number {number}" for number in range(4)]
    dispatcher.submit([Job(ticket=number, sample=number, prompt=prompt) for number, prompt in enumerate(prompts)])
    assert sorted(frames) == [0, 1, 2, 3]
    for number, prompt in enumerate(prompts):
        single = pipeline.generate(prompt)
        assert single is not None
        apart = np.abs(single.astype(int) - frames[number].astype(int))
        assert apart.max() <= 1 and apart.mean() < 0.01  # of 255: one rounding of a value that lies on a boundary
    assert any((frames[0] != frames[number]).any() for number in (1, 2, 3))
    pipeline.mesh.close()


def write_prompts(folder: Path, number: int) -> Path:
    file = folder / "prompts.txt"
    file.write_text("".join(f"a shape number {one}\n" for one in range(number)))
    return file


def videos(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("[0-9]*.mp4")}


@pytest.mark.job
def test_a_list_goes_on_after_a_kill(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job of two ranks is killed; one rank, in this process, makes the rest."""
    recipe, prompts, output = jobs.write_recipe(tmp_path, model), write_prompts(tmp_path, 10), tmp_path / "videos"
    arguments = ["--prompts", str(prompts), "-o", str(output), "--recipe", str(recipe)]
    job = jobs.start("wan_mlperf.generate", arguments, fault="slow@0,1:1-99")
    job.await_line("videos: 4/10")
    job.kill()
    job.finish()
    before = videos(output)
    assert 4 <= len(before) < 10 and jobs.partial_files(output) == []
    assert generate.main([*arguments, "--set=mesh.ranks=1", "--set=mesh.replicas=1"]) == 0
    assert f"{10 - len(before)} made, {len(before)} existed, 0 failed" in capsys.readouterr().out
    after = videos(output)
    assert len(after) == 10 and {name: after[name] for name in before} == before
    assert not [file for file in output.iterdir() if file.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_list_stopped_ten_times_equals_one_that_was_not(tmp_path: Path, model: Path) -> None:
    recipe, prompts = jobs.write_recipe(tmp_path, model), write_prompts(tmp_path, 60)
    chance = random.Random(0)
    for name, stops in (("stopped", 10), ("whole", 0)):
        arguments = ["--prompts", str(prompts), "-o", str(tmp_path / name), "--recipe", str(recipe)]
        for stop in range(stops + 1):
            job = jobs.start("wan_mlperf.generate", arguments, fault="long@0,1:1-999" if stop < stops else "")
            if stop < stops:
                if chance.random() < 0.7:  # else at any moment, while it loads as well
                    job.await_line(r"videos: \d+/")
                    time.sleep(chance.uniform(0, 2))  # a few videos of 1.5 s: there are to be some left for the tenth
                else:
                    time.sleep(chance.uniform(0, 8))
                number = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
                job.kill() if number == signal.SIGKILL else job.process.send_signal(number)
            code, _ = job.finish()
            assert stop < stops or code == 0, job.output
            assert jobs.partial_files(tmp_path / name) == [] if (tmp_path / name).exists() else True
    assert len(videos(tmp_path / "whole")) == 60 and videos(tmp_path / "stopped") == videos(tmp_path / "whole")
