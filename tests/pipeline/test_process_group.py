"""A program that has started torch.distributed itself loads a pipeline, and keeps its group."""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT, SMALL
from tests.replicas.jobs import torchrun
from wan_mlperf import Pipeline, load_recipe

PROMPT = "a red circle moving left"
OVERRIDES = [flag.removeprefix("--set=") for flag in SMALL]


@pytest.fixture
def own_group() -> Iterator[None]:
    """A group of one rank, of the program's own, and none of ours before or after."""
    from wan_mlperf.parallel import xdit_groups

    xdit_groups.stop_groups()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    xdit_groups.stop_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def load(model: Path) -> Pipeline:
    return Pipeline.load(load_recipe("tiny", overrides=[*OVERRIDES, f"model.checkpoint={model}"]))


def test_the_programs_own_group_is_used_and_stays(own_group: None, model: Path) -> None:
    before = dist.group.WORLD
    for _ in range(2):  # a second pipeline after the first was closed
        pipeline = load(model)
        assert pipeline.generate(PROMPT) is not None
        pipeline.mesh.close()
        assert dist.group.WORLD is before
        dist.all_reduce(torch.ones(1))


def test_a_group_that_went_away_leaves_nothing(own_group: None, model: Path) -> None:
    """The program ends its group, and with it xDiT's, while a pipeline is loaded: the next one starts anew."""
    first = load(model).generate(PROMPT)
    dist.destroy_process_group()
    second = load(model)
    again = second.generate(PROMPT)
    assert first is not None and again is not None and np.array_equal(first, again)
    second.mesh.close()
    assert not dist.is_initialized()  # this one was ours


def test_each_start_puts_its_addresses_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is an address of the start before, a rank may take it for its peer's and wait for it until the timeout."""
    from wan_mlperf.parallel import xdit_groups

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(xdit_groups, "_ground", xdit_groups._Ground())
    timeout = datetime.timedelta(seconds=60)
    first, second = (xdit_groups._store(timeout) for _ in range(2))
    assert first[1:] == second[1:] == (0, 1)
    first[0].set("address", "of the first group")
    assert first[0].check(["address"]) and not second[0].check(["address"])


AGAIN = """
from wan_mlperf import ranks
from wan_mlperf.kernels.device import probe
from wan_mlperf.parallel import mesh
import time
for number in range(12):
    started = mesh.start(mesh.Shape(replicas=1, cfg=2, ulysses=1, ring=1), probe(), timeout_s=60.0)
    time.sleep(0.2 * (number % 3) * (ranks.rank() == 0))  # one of them comes too late, now this one, now that one
    started.close()
    time.sleep(0.2 * (number % 2) * (ranks.rank() == 1))
"""


@pytest.mark.slow
def test_two_ranks_start_and_close_again_and_again(tmp_path: Path) -> None:
    """Without an own place for each start this hangs at the second or third."""
    (tmp_path / "again.py").write_text(AGAIN)
    command = [*torchrun()[:-1], str(tmp_path / "again.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


PROGRAM = """
import sys
import torch.distributed as dist
from wan_mlperf import Pipeline, load_recipe
rank, store, *overrides = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
pipeline = Pipeline.load(load_recipe("tiny", overrides=overrides))
frames = pipeline.generate("a red circle moving left")
pipeline.mesh.close()
seen = [None, None]
dist.all_gather_object(seen, (str(pipeline.mesh.shape), None if frames is None else frames.shape))
assert seen == [("1 replica x CFG 2 x Ulysses 1", (5, 32, 32, 3)), ("1 replica x CFG 2 x Ulysses 1", None)], seen
"""


@pytest.mark.slow
def test_two_ranks_without_torchrun(model: Path, tmp_path: Path) -> None:
    """No variable says who is who: the group does."""
    arguments = [str(tmp_path / "store"), *OVERRIDES, f"model.checkpoint={model}"]
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], ended
