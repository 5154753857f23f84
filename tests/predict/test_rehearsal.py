"""Rehearsals against first principles, against a real run on gloo ranks, and against code that leaves something out."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_module
from wan_mlperf import checkpoint
from wan_mlperf.kernels.device import Device
from wan_mlperf.predict import forecast, hardware, rehearsal, work
from wan_mlperf.predict.counting import Counts
from wan_mlperf.predict.from_recipe import device_of, shape_of
from wan_mlperf.predict.rehearsal import RankCounts
from wan_mlperf.predict.subject import Subject
from wan_mlperf.recipe import load_recipe
from wan_mlperf.step_plan import make_plan
from wan_mlperf.vae_decode import VaeDecoder
from wan_mlperf.workload import MLPERF

PLAIN = ("attention.early=sdpa", "attention.late=sdpa", "gemm.high_noise=bf16", "gemm.low_noise=bf16", "model.dtype=float32")
CPU = Device(arch="cpu", name="a CPU", torch=torch.device("cpu"))


def embedded(*overrides: str, gpus: int = 2) -> Subject:
    """The embedded model on gloo ranks of a CPU."""
    recipe, found = load_recipe("tiny", overrides=("workload.steps=3", *overrides)), checkpoint.find("embedded")
    workload = recipe.effective_workload
    configs = {part: found.config(part) for part in ("transformer", "transformer_2", "vae", "text_encoder")}
    tokenizer = found.load_tokenizer()
    positive, negative = (len(tokenizer(text).input_ids) for text in ("a red circle", workload.negative_prompt))
    return Subject(
        recipe=recipe,
        workload=workload,
        plan=make_plan(recipe, workload, found.config("scheduler")),
        shape=shape_of(recipe, workload, work.size_of_expert(configs["transformer"]), gpus=gpus),
        device=CPU,
        configs=configs,
        text_lengths=(positive, negative),
    )


def full_size(name: str, *overrides: str) -> Subject:
    """The published model on eight MI355X."""
    return forecast.subject_of(load_recipe(name, overrides=overrides), hardware.find("mi355x"), gpus=8)


@pytest.mark.job
@pytest.mark.parametrize(
    "overrides",
    [PLAIN, pytest.param(("mesh.cfg=1", "exchange=fp8"), marks=pytest.mark.slow)],
    ids=["CFG 2, fp32", "Ulysses 2, FP4 and MXFP4, exchanged as FP8"],
)
def test_a_rehearsal_agrees_with_a_real_run(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Calls, messages and bytes equal; peak memory within 10 % of what torch's profiler saw."""
    done = run_module(["tests.predict.counted_run", str(tmp_path), "workload.steps=3", *overrides], ranks=2)
    assert done.returncode == 0, done.stderr
    rehearsed = {one.rank: one for one in rehearsal.rehearse(embedded(*overrides))}
    for rank in (0, 1):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        counts = rehearsed[rank].total
        if overrides == PLAIN:  # both ranks are the first of a branch
            assert dict(counts.calls) == real["calls"]
            assert dict(counts.flops) == real["flops"]
        if rank == 0 or overrides == PLAIN:
            assert dict(counts.sent) == real["sent"] and dict(counts.messages) == real["messages"]
        assert sum(rehearsed[rank].weights.values()) == real["weights"]
        assert rehearsed[rank].peak == pytest.approx(real["peak"], rel=0.1)


@pytest.mark.job
def test_the_exchange_is_that_share_of_the_tensors() -> None:
    subject = embedded("mesh.cfg=1", "mesh.interleave=false", gpus=4)
    tokens, size = work.tokens_of(subject.workload), work.size_of_expert(subject.configs["transformer"])
    (first, *_) = rehearsal.rehearse(subject)
    sent = first.total.sent["ulysses"]
    assert sent == 2 * 3 * work.exchange_bytes(tokens, 4, size)
    assert sent == 2 * 3 * size.layers * 4 * (tokens // 4) * size.width * 2 * 3 // 4
    assert first.total.messages["ulysses"] == 2 * 3 * size.layers * 4 * 3

    # Both branches as one batch: the same bytes in half as many messages.
    (batched, *_) = rehearsal.rehearse(embedded("mesh.cfg=1", gpus=4))
    assert batched.total.sent == first.total.sent and 2 * batched.total.messages["ulysses"] == first.total.messages["ulysses"]

    # Q, K and V as bytes, with a row of scales each; the same messages.
    (low, *_) = rehearsal.rehearse(embedded("mesh.cfg=1", "mesh.interleave=false", "exchange=fp8", gpus=4))
    assert low.total.sent["ulysses"] == 2 * 3 * work.exchange_bytes(tokens, 4, size, qkv_bytes=1)
    assert low.total.sent["ulysses"] == 2 * 3 * size.layers * (3 * (tokens // 4 + 1) + tokens // 4 * 2) * size.width * 3 // 4
    assert low.total.messages == first.total.messages


QUANTISED = ("attention.early=sdpa", "attention.late=sdpa", "mesh.cfg=1", "gemm.high_noise=fp8", "gemm.low_noise=fp8")


def test_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q, K and V quantise their input once; branches in turns send the same bytes in half as many messages, and read as much."""
    from wan_mlperf import experts

    apart = rehearsal.one_block(on_gpus(*QUANTISED, "mesh.interleave=false"))["low_noise sdpa fp8"]
    turns = rehearsal.one_block(on_gpus(*QUANTISED))["low_noise sdpa fp8"]
    assert apart.calls["quantise fp8"] == turns.calls["quantise fp8"] == 6
    assert apart.calls["gemm fp8"] == turns.calls["gemm fp8"] == 8
    assert apart.sent == turns.sent and apart.flops == turns.flops
    assert (apart.messages["ulysses"], turns.messages["ulysses"]) == (4, 2)
    monkeypatch.setattr(experts, "products", lambda hidden, layers: [layer(hidden) for layer in layers])
    before = rehearsal.one_block(on_gpus(*QUANTISED, "mesh.interleave=false"))["low_noise sdpa fp8"]
    assert before.calls["quantise fp8"] == 8
    subject = embedded(*QUANTISED)
    rows = work.tokens_of(subject.workload) // 2
    size = work.size_of_expert(subject.configs["transformer"])
    assert before.read - apart.read == 2 * rows * size.width * 2  # bf16
    assert before.written - apart.written == 2 * rows * (size.width + 4)  # E4M3 and a scale


def on_gpus(*overrides: str) -> Subject:
    """The embedded model, as rehearsed for two GPUs."""
    subject = embedded(*overrides)
    names = {step.attention for step in subject.plan}
    return dataclasses.replace(subject, device=device_of(hardware.find("mi355x")), kernels={name: name for name in names})


def leave_out_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    halves: Callable[[Any], Any] = lambda x: x.repeat(1, 2, 1, 1)[:, :, : x.shape[2] // 2]  # noqa: E731
    monkeypatch.setattr(usp, "_ft_c_output_all_to_all", halves)


def leave_out_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_mlperf import experts

    whole = experts.Expert.run_branches

    def skip(expert: Any, tokens: Any, latents: Any, timestep: float, texts: Any, *rest: Any) -> Any:
        return [tokens] * len(texts) if timestep < 875 else whole(expert, tokens, latents, timestep, texts, *rest)

    monkeypatch.setattr(experts.Expert, "run_branches", skip)


def leave_out_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = VaeDecoder.decode
    monkeypatch.setattr(VaeDecoder, "decode", lambda decoder, latents: whole(decoder, latents[:, :, :1]))


@pytest.fixture(scope="module")
def whole() -> dict[str, Counts]:
    """What the first of two Ulysses ranks does."""
    return rehearsal.rehearse(embedded(*PLAIN, "mesh.cfg=1"))[0].stages


@pytest.mark.parametrize(
    ("mutation", "stage", "what"),
    [
        (leave_out_an_exchange, "low_noise sdpa bf16", "messages"),
        (leave_out_an_expert, "low_noise sdpa bf16", "flops"),
        (leave_out_a_chunk, "vae_decode", "flops"),
    ],
)
def test_what_is_left_out_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, Counts],
    mutation: Callable[[pytest.MonkeyPatch], None],
    stage: str,
    what: str,
) -> None:
    mutation(monkeypatch)
    mutated = rehearsal.rehearse(embedded(*PLAIN, "mesh.cfg=1"))[0].stages
    assert _total(getattr(mutated[stage], what)) < _total(getattr(whole[stage], what))
    assert {name for name in whole if _figures(whole[name]) != _figures(mutated[name])} >= {stage}


@pytest.mark.slow
def test_the_benchmarks_own_size_on_eight_ranks() -> None:
    """FLOPs within 1 % of first principles, the exchange exactly, and both experts beside the rest in 288 GB."""
    subject = full_size("mi355x-singlestream", "mesh.cfg=1", "mesh.ulysses=8", "mesh.interleave=false")
    ranks = {one.rank: one for one in rehearsal.rehearse(subject, workers=rehearsal.cores())}
    assert sorted(ranks) == [0, 1, 7]
    first = ranks[0].total.flops
    assert 8 * sum(value for name, value in first.items() if "AITER" in name) == pytest.approx(187.28e15, rel=1e-3)
    experts = sum(_of(counts.flops, "gemm ") for name, counts in ranks[0].stages.items() if "noise" in name)
    assert 8 * experts == pytest.approx(72.30e15, rel=0.01)
    decode = [_total(one.stages["vae_decode"].flops) for one in ranks.values()]
    assert 2 * decode[0] + 6 * decode[1] == pytest.approx(work.decode_flops(MLPERF), rel=0.01)
    assert work.decode_flops(MLPERF) == pytest.approx(0.64e15, rel=0.01)
    assert ranks[0].total.sent["ulysses"] == 40 * work.exchange_bytes(75600, 8, qkv_bytes=1)
    assert ranks[0].total.messages["ulysses"] == 40 * 40 * 4 * 7
    assert ranks[0].peak < hardware.find("mi355x").memory


@pytest.mark.parametrize("cross", ["native", "sdpa"])
def test_a_gpus_cross_attention_gives_what_the_code_takes(model: Path, cross: str) -> None:
    """A log-sum-exp where the trimmed padding is merged in, a bias where PyTorch's own attention reads one."""
    sizes = ("workload.height=32", "workload.width=32", "workload.frames=1", "workload.steps=2", "mesh.cfg=1")
    recipe = load_recipe("tiny", overrides=(*sizes, f"model.checkpoint={model}", f"attention.cross={cross}"))
    (alone,) = rehearsal.rehearse(forecast.subject_of(recipe, hardware.find("mi355x"), gpus=1))
    calls = alone.total.calls
    assert calls["attention cross"] == calls["attention AITER_MXFP4"] + calls["attention AITER_FP8"] == 2 * 2 * 2
    # 8 heads of 32, 4 tokens; the prompts' 60 and 126 tokens are rounded up.
    assert alone.total.flops["attention cross"] == 4 * (64 + 128) * 4 * 4 * 8 * 32


def _of(counter: Any, start: str) -> float:
    return sum(value for name, value in counter.items() if name.startswith(start))


def _total(counter: Counter[str]) -> float:
    return sum(counter.values())


def _figures(counts: Counts) -> tuple[Any, ...]:
    return dict(counts.calls), dict(counts.flops), dict(counts.sent), dict(counts.messages)


@pytest.mark.slow
def test_a_process_that_has_a_group_can_rehearse(model: Path, tmp_path: Path) -> None:
    """The rehearsal runs in a process of its own, and the caller's group is what it was."""
    sizes = ("workload.height=32", "workload.width=32", "workload.frames=1", "workload.steps=2", f"model.checkpoint={model}")
    subject = forecast.subject_of(load_recipe("tiny", overrides=sizes), hardware.find("mi355x"), gpus=2)
    alone = rehearsal.rehearse(subject)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        beside = rehearsal.rehearse(subject)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert dist.get_world_size() == 1 and float(total) == 1.0
    finally:
        dist.destroy_process_group()
    assert [_figures(one.total) for one in beside] == [_figures(one.total) for one in alone]
    assert [one.rank for one in beside] == [0, 1]


def test_every_kind_of_rank_is_rehearsed_once() -> None:
    one = embedded(*PLAIN, gpus=1)
    assert rehearsal.ranks_of(one.shape) == {0: True}
    eight = full_size("mi355x-singlestream", "mesh.cfg=2", "mesh.ulysses=4")
    assert rehearsal.ranks_of(eight.shape) == {0: True, 1: False, 4: True, 7: False}
    alone: list[RankCounts] = rehearsal.rehearse(one)
    assert not alone[0].total.sent and set(alone[0].weights) == {"text_encoder", "high_noise", "low_noise", "vae"}
