"""Handing out samples, messages, memory between processes, and the checks of results, all in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from wan_mlperf.errors import BadInput
from wan_mlperf.parallel import mesh
from wan_mlperf.recipe import Faults, load_recipe, parse
from wan_mlperf.replicas import transport
from wan_mlperf.replicas.messages import Done, Job, Lost, Message, Stop, decode, encode
from wan_mlperf.replicas.replica import LatentCheck, flat
from wan_mlperf.replicas.work_queue import WorkQueue
from wan_mlperf.step_plan import make_plan


def job(ticket: int, **more: Any) -> Job:
    return Job(ticket=ticket, sample=ticket + 100, prompt=f"prompt {ticket}", **more)


@pytest.fixture
def replicas() -> Callable[[int], list[WorkQueue]]:
    """Replicas that share one store."""

    def make(number: int) -> list[WorkQueue]:
        store = dist.HashStore()
        return [WorkQueue(store, replica=replica, replicas=number) for replica in range(number)]

    return make


def test_messages_survive_the_wire() -> None:
    messages: list[Message] = [
        job(3, attempt=2, avoid=1),
        Done(ticket=1, rank=2, size=9, seconds=0.5, spans={"text_encode": 0.25}, process=7, descriptor=8),
        Lost(ticket=4, replica=1, reason="rank 1 on a host: “NaN”\n"),
        Stop(),
    ]
    assert decode(encode(messages)) == messages


def test_every_sample_is_taken_once_by_whoever_is_free(replicas: Callable[[int], list[WorkQueue]]) -> None:
    works = replicas(4)
    taken: dict[int, list[int]] = {number: [] for number in range(4)}

    def pull(number: int) -> None:
        while (jobs := works[number].take()) is not None:
            taken[number] += [one.ticket for one in jobs]
            threading.Event().wait(0.001 if number else 0.02)  # replica 0 is twenty times slower

    threads = [threading.Thread(target=pull, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    works[0].post([job(ticket) for ticket in range(60)])
    works[0].post([job(ticket) for ticket in range(60, 100)])
    while sum(map(len, taken.values())) < 100:
        threading.Event().wait(0.01)
    works[0].stop()
    for thread in threads:
        thread.join(10)
    assert sorted(one for tickets in taken.values() for one in tickets) == list(range(100))
    assert len(taken[0]) < min(len(taken[number]) for number in (1, 2, 3))


def test_a_failed_sample_goes_to_another_replica(replicas: Callable[[int], list[WorkQueue]]) -> None:
    first, second = replicas(2)
    first.retry(job(5, attempt=2, avoid=0))
    first.stop()
    assert first.take() is None
    assert second.take() == [job(5, attempt=2, avoid=0)]
    assert second.take() is None


def test_batches_while_there_are_enough_then_single_samples(replicas: Callable[[int], list[WorkQueue]]) -> None:
    first, second = replicas(2)
    first.post([job(ticket) for ticket in range(19)])
    first.stop()
    sizes = []
    for work in [first, second] * 10:
        jobs = work.take(batch=4)
        sizes.append(len(jobs or []))
    assert [size for size in sizes if size] == [4, 4, 4, 1, 1, 1, 1, 1, 1, 1]


def test_reports_come_once_and_end_with_the_work(replicas: Callable[[int], list[WorkQueue]]) -> None:
    first, second = replicas(2)
    keys = [second.report(Lost(ticket=ticket, replica=1, reason="")) for ticket in range(3)]
    first.stop()
    seen = list(first.reports())
    assert [key for key, _ in seen] == keys
    first.close(keys[0])
    second.await_closed(keys[0])  # returns


@pytest.mark.parametrize("content", [b"an MP4", np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)])
def test_memory_outlives_its_file(content: bytes | np.ndarray) -> None:
    import os

    size = len(content) if isinstance(content, bytes) else content.nbytes
    done = Done(ticket=0, rank=0, size=size, seconds=0.0, process=os.getpid())
    with transport.memory(content) as descriptor:
        mapped = transport.receive(Done(**{**done.__dict__, "descriptor": descriptor}), None)
    assert bytes(mapped) == bytes(content)


def test_the_first_step_with_nan_is_named() -> None:
    recipe = load_recipe("tiny")
    plan = make_plan(recipe, recipe.effective_workload)
    check, latents = LatentCheck(), torch.zeros(2, 4, 1, 2, 2)
    for step in plan:
        if step.index == 7:
            latents[1, 0, 0, 0, 0] = float("inf")
        check.see(step, latents)
    sound, broken = check.problems(2)
    assert sound is None and broken is not None and f"after step 7 ({plan[7].expert} expert)" in broken


def test_flat_frames_are_told_from_pictures() -> None:
    frames = np.full((3, 32, 32, 3), 9, np.uint8)
    assert flat(frames)
    frames[1] = 200  # another colour, still flat
    assert flat(frames)
    frames[2, 31, 30, 1] += 1  # one value, which the sparse look does not see
    assert not flat(frames)


def test_a_replica_does_not_span_hosts_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    values = {"replicas": 1, "cfg": 2, "ulysses": 2}
    alone = parse({"name": "x", "mesh": values}, source="test").mesh
    with pytest.raises(BadInput, match=r"2 ranks on this host are not divisible by the 4 of a replica.*span_hosts"):
        mesh.plan_shape(alone, world=4, heads=8, latent_rows=8)
    asked = parse({"name": "x", "mesh": {**values, "span_hosts": True}}, source="test").mesh
    assert mesh.plan_shape(asked, world=4, heads=8, latent_rows=8).per_replica == 4
    small = parse({"name": "x", "mesh": {"replicas": "auto", "cfg": 1, "ulysses": 2}}, source="test").mesh
    assert mesh.plan_shape(small, world=4, heads=8, latent_rows=8).replicas == 2


def test_limits_that_would_blame_the_wrong_rank_are_refused() -> None:
    assert parse({"name": "x", "faults": {"dead_s": 5, "hang_s": 5}}, source="test").faults == Faults(dead_s=5.0, hang_s=5.0)
    with pytest.raises(BadInput, match="hang_s is below dead_s"):
        parse({"name": "x", "faults": {"dead_s": 30, "hang_s": 20}}, source="test")
