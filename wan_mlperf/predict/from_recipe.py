"""A recipe on named hardware -> its mesh, kernels and prices, from the tables that a run there would use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import attention
from wan_mlperf.kernels import gemm as gemm_table
from wan_mlperf.kernels.device import Device, Fabric
from wan_mlperf.parallel import interleave
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import hardware, rates
from wan_mlperf.predict.hardware import Hardware
from wan_mlperf.predict.prices import HIDDEN, Prices, Ways
from wan_mlperf.predict.rates import Constants
from wan_mlperf.predict.work import WAN22, ExpertSize
from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import make_plan
from wan_mlperf.text_encoder import MAX_TOKENS
from wan_mlperf.workload import Workload

TEXT_TOKENS = (60, 126)  # of a typical prompt, and of the benchmark's negative one


def prices_of(
    recipe: Recipe,
    gpu: Hardware | str,
    *,
    gpus: int,
    workload: Workload | None = None,
    size: ExpertSize = WAN22,
    kernels: Mapping[str, str] | None = None,
    constants: Constants | None = None,
) -> Prices:
    """Return the prices of `recipe` on `gpus` GPUs of a kind. Raises BadInput, also for a kernel without a published rate.

    `kernels` (recipe name -> kernel of rates.json) overrides what the tables choose.
    """
    gpu = hardware.find(gpu) if isinstance(gpu, str) else gpu
    workload = workload or recipe.effective_workload
    names = {step.attention for step in make_plan(recipe, workload)}
    shape = shape_of(recipe, workload, size, gpus=gpus, fabric=device_of(gpu).fabric)
    prices = Prices(
        gpu=gpu,
        shape=shape,
        workload=workload,
        size=size,
        ways=ways_on(recipe, shape, gpu),
        kernels=kernels_of(names, gpu, kernels or {}),
        constants=constants,
    )
    gemm_table.check(recipe.gemm, device_of(gpu), allow_reference=False)
    for name in sorted(names):
        rates.attention(prices.kernel(name), gpu)
    for form in gemm_table.names(recipe.gemm):
        rates.gemm(form, gpu)
    return prices


def device_of(gpu: Hardware) -> Device:
    """Return the device to look up in the kernel tables, as if a run were on such a GPU."""
    return Device(arch=gpu.arch, name=gpu.name, torch=torch.device("cuda", 0))


def shape_of(recipe: Recipe, workload: Workload, size: ExpertSize, *, gpus: int, fabric: Fabric = "switch") -> Shape:
    """Return the recipe's mesh on `gpus` GPUs. Raises BadInput."""
    if not 1 <= gpus <= 4096:
        raise BadInput(f"--gpus: {gpus} is not allowed; allowed: 1 to 4096")
    _, _, rows, columns = workload.latent_shape(0)
    mesh = dataclasses.replace(recipe.mesh, span_hosts=True)  # this host's ranks do not matter
    return meshes.plan_shape(mesh, world=gpus, heads=size.heads, latent_rows=max(rows, columns), fabric=fabric)


def kernels_of(names: Iterable[str], gpu: Hardware, overrides: Mapping[str, str]) -> dict[str, str]:
    """Recipe name -> the kernel that a run on this GPU uses with every package installed. Raises BadInput."""
    chosen = {name: kernel for name, kernel in overrides.items() if rates.attention(kernel, gpu)}
    return chosen | {name: attention.best(name, device_of(gpu)).backend for name in names if name not in chosen}


def ways_on(recipe: Recipe, shape: Shape, gpu: Hardware) -> Ways:
    """Return how a recipe does the work, with the share of the exchange that its mesh hides on this GPU."""
    ways = ways_of(recipe)
    return dataclasses.replace(ways, hidden=HIDDEN) if interleave.chosen(recipe.mesh, shape, device_of(gpu)) else ways


def ways_of(recipe: Recipe) -> Ways:
    """Return how a recipe does the work, from the recipe alone."""
    return Ways(
        compiled=recipe.compile.experts,
        qkv_bytes=1.0 if recipe.exchange == "fp8" else 2.0,
        decode_float32=recipe.model.vae_dtype != "bfloat16",
        own_decoder=True,
        text_tokens=sum(TEXT_TOKENS) // 2 + 1 if recipe.trim_text else MAX_TOKENS,
    )
