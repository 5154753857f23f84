"""Hardware, rates and prices: figures with sources, refusals, and how prices follow from mesh, kernels and size."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import floor, hardware, rates, work
from wan_mlperf.predict.from_recipe import prices_of
from wan_mlperf.predict.prices import HIDDEN, PARTS, Prices
from wan_mlperf.recipe import load_recipe
from wan_mlperf.step_plan import make_plan
from wan_mlperf.workload import MLPERF


def prices(*overrides: str, gpu: str = "mi355x", gpus: int = 8) -> Prices:
    return prices_of(load_recipe("mi355x-singlestream", overrides=overrides), gpu, gpus=gpus)


def test_every_figure_of_hardware_has_a_source() -> None:
    for gpu in hardware.all_hardware():
        named = {field for fields in gpu.sources for field in fields.split()}
        figures = {one.name for one in dataclasses.fields(gpu)} - {"name", "arch", "sources"}
        assert named == {name for name in figures if getattr(gpu, name) is not None}, gpu.name
        assert all(gpu.sources.values())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mi355x", "MI355X"),
        ("RTX 5090", "RTX 5090"),
        ("rtx-pro-6000", "RTX PRO 6000"),
        ("NVIDIA H100", "H100"),
        ("gb300", "GB300"),
    ],
)
def test_hardware_is_found_however_it_is_written(name: str, found: str) -> None:
    assert hardware.find(name).name == found


def test_a_drivers_name_is_known() -> None:
    gpu = hardware.of_device("NVIDIA H100 80GB HBM3")
    assert gpu is not None and gpu.name == "H100"
    gpu = hardware.of_device("NVIDIA GB200")
    assert gpu is not None and gpu.name == "GB200"
    assert hardware.of_device("AMD EPYC 9B14") is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA B200-SXM-180GB", "B200"),
        ("B300-SXM-288GB", "B300"),
        ("AMD Instinct MI355X 288GB HBM3e", "MI355X"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090D"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        # Other cards by nearly the same name, whose figures are not known here.
        *[
            (name, None)
            for name in (
                "NVIDIA H100 PCIe",
                "NVIDIA H200 NVL",
                "NVIDIA GH200 480GB",
                "NVIDIA A100-SXM4-40GB",
                "NVIDIA H20-3e",
                "NVIDIA GeForce RTX 5090 D",
                "NVIDIA GeForce RTX 4090 Laptop GPU",
                "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
            )
        ],
    ],
)
def test_a_variant_is_not_the_gpu_that_it_is_named_after(name: str, found: str | None) -> None:
    gpu = hardware.of_device(name)
    assert (gpu.name if gpu else None) == found
    if found is None:
        with pytest.raises(BadInput, match="is not known"):
            hardware.find(name)


def test_peaks_are_what_the_units_do() -> None:
    """Independent of data sheets: matrix FLOPs per clock and unit, times units, times the boost clock."""
    clocks = {"MI300X": (304, 2048, 2.1), "MI325X": (304, 2048, 2.1), "MI350X": (256, 4096, 2.2), "MI355X": (256, 4096, 2.4)}
    clocks |= {"A100": (108, 2048, 1.41), "H100": (132, 4096, 1.83), "H200": (132, 4096, 1.83)}
    clocks |= {"RTX 4090": (128, 512, 2.52), "RTX 5090": (170, 512, 2.407), "RTX PRO 6000": (188, 1024, 2.617)}
    for name, (units, flops, gigahertz) in clocks.items():
        assert hardware.find(name).bf16 == pytest.approx(units * flops * gigahertz / 1000, rel=0.002), name
    for gpu in hardware.all_hardware():
        assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.001), gpu.name
        named = {field for fields in gpu.sources for field in fields.split()}
        figures = {"bf16", "fp8", "fp4", "memory_gb", "bandwidth_tb_s", "power_w", "fabric", "link_gb_s"}
        assert named == {figure for figure in figures if getattr(gpu, figure) is not None}, gpu.name


def test_the_unknown_is_refused_with_what_is_known() -> None:
    with pytest.raises(BadInput, match=r"hardware 'mi355y': is not known, did you mean 'MI355X'\?; allowed: MI300X, "):
        hardware.find("mi355y")
    with pytest.raises(BadInput, match=r"kernel 'FLASH_9': is not known.*allowed on H100: CUDNN, FLASH, FLASH_3"):
        rates.attention("FLASH_9", hardware.find("h100"))
    with pytest.raises(BadInput, match=r"kernel 'FLASH_3': nobody has published its rate on MI355X"):
        rates.attention("FLASH_3", hardware.find("mi355x"))
    with pytest.raises(BadInput, match=r"gemm 'mxfp4': has no published rate on H100.*known there: bf16, fp8"):
        rates.gemm("mxfp4", hardware.find("h100"))


def test_the_parameters_are_the_published_ones() -> None:
    import torch
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        expert = WanTransformer3DModel.from_config(work.published_config("transformer"))
    assert sum(one.numel() for one in expert.parameters()) == pytest.approx(14.3e9, rel=0.001)
    assert work.size_of_expert(work.published_config("transformer")) == work.ExpertSize()
    assert work.tokens_of(MLPERF) == 75600


def test_a_plan_is_the_sum_of_its_steps() -> None:
    price = prices()
    plan = make_plan(load_recipe("mi355x-singlestream"), MLPERF)
    predicted = price.plan(plan)
    assert tuple(predicted.parts) == PARTS
    assert predicted.seconds == pytest.approx(sum(predicted.parts.values()))
    rest = price.text_encode() + price.decode() + price.host()
    assert predicted.seconds == pytest.approx(rest.total + sum(price.step(step).total for step in plan))
    assert predicted.band[0] < predicted.seconds < predicted.band[1]


def test_guidance_on_two_groups_of_ranks_takes_one_forward() -> None:
    alone, split = prices("mesh.cfg=1", gpus=1), prices("mesh.cfg=2", gpus=2)
    step = make_plan(load_recipe("mi355x-singlestream"), MLPERF)[0]
    assert split.step(step).total == pytest.approx(alone.step(step).total / 2)
    unguided = dataclasses.replace(step, guided=False)
    assert alone.step(unguided).total == pytest.approx(alone.step(step).total / 2)
    assert split.step(unguided).total < split.step(step).total, "both branches' ranks share the one that is left"
    assert alone.step(dataclasses.replace(step, source=0)).total == 0.0


def test_the_fabric_decides_the_mesh() -> None:
    """A mesh of links serves Ulysses 8 by seven of them and Ulysses 4 by three; a switch serves both alike."""

    def exchange(gpu: str, cfg: int, *more: str) -> float:
        price = prices(f"mesh.cfg={cfg}", *more, gpu=gpu)
        return price.step(make_plan(load_recipe("mi355x-singlestream", overrides=more), MLPERF)[0]).exchange

    assert exchange("mi355x", 1) < 0.6 * exchange("mi355x", 2)
    h100 = (
        *("attention.early=sdpa", "attention.late=sdpa", "gemm.high_noise=bf16", "gemm.low_noise=bf16"),
        "mesh.interleave=false",  # which is impossible with CFG 2
    )
    assert exchange("h100", 2, *h100) < exchange("h100", 1, *h100)


def test_an_exchange_hides_behind_the_other_branch() -> None:
    """Where both are on the same ranks and there is a step with guidance; never more than there is to compute."""
    step = make_plan(load_recipe("mi355x-singlestream"), MLPERF)[0]
    hidden, plain = prices("mesh.cfg=1").step(step), prices("mesh.cfg=1", "mesh.interleave=false").step(step)
    assert hidden.exchange == pytest.approx((1 - HIDDEN) * plain.exchange)
    assert hidden.total - hidden.exchange == pytest.approx(plain.total - plain.exchange)
    halves = prices("mesh.cfg=2").step(step)
    assert halves == prices("mesh.cfg=2", "mesh.interleave=false").step(step)
    alone = dataclasses.replace(step, guided=False)
    assert prices("mesh.cfg=1").step(alone) == prices("mesh.cfg=1", "mesh.interleave=false").step(alone)
    slow = dataclasses.replace(prices("mesh.cfg=1"), gpu=dataclasses.replace(hardware.find("mi355x"), link_gb_s=1.0))
    step_of_slow = slow.step(step)
    rest = step_of_slow.total - step_of_slow.exchange
    assert step_of_slow.exchange > rest, "links so slow that computation covers only its own time"


def test_flops_of_one_video() -> None:
    """187 PFLOP of attention, 72 of linear layers, 0.64 of decode: the published count of this workload."""
    flops = work.forward_flops(work.tokens_of(MLPERF))
    assert 40 * flops.attention / 1e15 == pytest.approx(187.28, abs=0.01)
    assert (40 * flops.gemm + 4 * work.text_keys_flops()) / 1e15 == pytest.approx(72.30, abs=0.01)
    assert work.decode_flops(MLPERF) == pytest.approx(work.DECODE_FLOPS, rel=0.001)


def test_gemm_flops_against_a_counted_forward_pass() -> None:
    """The formula against PyTorch's own count of a small expert's forward pass."""
    from diffusers import WanTransformer3DModel
    from torch.utils.flop_counter import FlopCounterMode

    small = dataclasses.replace(MLPERF, height=64, width=64, frames=17, steps=1)
    size = work.ExpertSize(heads=2, head_dim=32, ffn=128, layers=2)
    with torch.device("meta"):
        expert = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=32)
        inputs = torch.empty(1, *small.latent_shape(16)), torch.empty(1), torch.empty(1, 512, 32)
    counted: list[int] = []
    counter = FlopCounterMode(display=False)
    for block in expert.blocks:
        block.register_forward_pre_hook(lambda *_: counted.append(-counter.get_total_flops()))
        block.register_forward_hook(lambda *_: counted.append(counter.get_total_flops()))
    with counter, torch.no_grad():
        expert(*inputs)
    flops = work.forward_flops(work.tokens_of(small), size)
    assert sum(counted) == flops.gemm + work.text_keys_flops(size) + flops.attention + flops.cross_attention


def test_the_floor_is_the_known_one() -> None:
    """On eight MI355X: attention and linear layers 4.6 s, the exchange by the links that a group has."""
    price = prices("mesh.cfg=1", "exchange=bf16")
    plan = make_plan(load_recipe("mi355x-singlestream", overrides=["attention.early_fraction=0.85"]), MLPERF)
    bound = floor.floor_of(price, plan)
    assert bound.attention + bound.gemm == pytest.approx(4.57, abs=0.05)
    assert bound.total < price.plan(plan).seconds / 2
    sent, seconds = floor.exchange_of(price, Shape(replicas=1, cfg=1, ulysses=8, ring=1))
    assert sent == pytest.approx(27.1e9, rel=0.01) and seconds == pytest.approx(0.0504, rel=0.01)
    sent, seconds = floor.exchange_of(price, Shape(replicas=1, cfg=2, ulysses=4, ring=1))
    assert sent == pytest.approx(23.2e9, rel=0.01) and seconds == pytest.approx(0.1008, rel=0.01)
    ring, _ = floor.exchange_of(price, Shape(replicas=1, cfg=1, ulysses=4, ring=2))
    assert ring == pytest.approx(27.1e9 * 6 / 7, rel=0.01)  # of the same eighth of the tokens, 3 / 4 leave instead of 7 / 8
    # A faster format by layers lowers the floor, too.
    plans = [
        make_plan(
            load_recipe("mi355x-singlestream", overrides=[f"gemm.{name}={form}" for name in ("high_noise", "low_noise")] + keep),
            MLPERF,
        )
        for form, keep in (("bf16", ["gemm.keep=[['*', fp8]]"]), ("fp8", []))
    ]
    assert floor.floor_of(price, plans[0]).gemm == pytest.approx(floor.floor_of(price, plans[1]).gemm)
    # Q, K and V in one byte and the output in two: five eighths, and a row of scales to every 9,450 tokens.
    low = floor.exchange_of(prices("mesh.cfg=1"), Shape(replicas=1, cfg=1, ulysses=8, ring=1))
    whole = floor.exchange_of(price, Shape(replicas=1, cfg=1, ulysses=8, ring=1))
    assert low[0] == pytest.approx(5 / 8 * whole[0], rel=1e-4) and low[0] > 5 / 8 * whole[0]
