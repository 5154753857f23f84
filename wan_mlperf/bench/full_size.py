"""Times one part at the benchmark's full size on one GPU, against diffusers in eager bf16: a block, an expert, the VAE.

Weights are random: only shapes matter for the time. Our expert runs with sdpa and, where this device has it, sage_fp8, and that
with FP8 layers, too; each eager and compiled. Our VAE decodes in chunks of several sizes.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from rich.table import Table

from wan_mlperf import process
from wan_mlperf.bench.fidelity import console
from wan_mlperf.errors import BadInput
from wan_mlperf.experts import Expert, run_block
from wan_mlperf.files import atomic_write
from wan_mlperf.identity import commit, versions
from wan_mlperf.kernels import attention, gemm
from wan_mlperf.kernels.device import Device, probe
from wan_mlperf.kernels.probe import missing_gemm
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.parallel import split_experts, xdit
from wan_mlperf.recipe import Gemm
from wan_mlperf.text_encoder import MAX_TOKENS, Embeds
from wan_mlperf.vae_decode import Gather, VaeDecoder
from wan_mlperf.workload import MLPERF, Workload

LAYERS = {"block720p": 1, "expert720p": 40}
TEXT_LENGTH = 60  # of a typical prompt, without padding
Call = Callable[[], object]


def main(workload: str, rounds: int, file: str | None) -> int:
    """Time one part in turns with diffusers, print the figures and write them to `file`. Raises BadInput without a GPU."""
    device = probe()
    if not device.is_gpu:
        raise BadInput(f"--workload {workload!r}: needs a GPU, and this runs on {device}; allowed here: tiny, mid")
    calls = vae_calls(MLPERF, device) if workload == "vae720p" else expert_calls(MLPERF, device, layers=LAYERS[workload])
    seconds = alternate(calls, rounds, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "workload": workload,
        "rounds": rounds,
        "device": device.name,
        "median_s": medians,
        "min_s": {name: min(values) for name, values in seconds.items()},
        "max_s": {name: max(values) for name, values in seconds.items()},
        "ratios": {name: value / medians["diffusers"] for name, value in medians.items() if name != "diffusers"},
        "versions": versions(),
        "commit": commit(),
    }
    table = Table(title=f"{workload} on {device.name}, bf16, medians of {rounds}")
    for heading in ("", "median s", "min s", "max s", "ours / diffusers"):
        table.add_column(heading, justify="right")
    for name, values in seconds.items():
        ratio = "" if name == "diffusers" else f"{medians[name] / medians['diffusers']:.3f}"
        table.add_row(name, f"{medians[name]:.4f}", f"{min(values):.4f}", f"{max(values):.4f}", ratio)
    console().print(table)
    if file:
        atomic_write(Path(file), json.dumps(report, indent=1))
    return process.DONE


@torch.inference_mode()
def alternate(calls: dict[str, Call], rounds: int, device: Device) -> dict[str, list[float]]:
    """Call each once untimed, then all in turn, `rounds` times. Returns the seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def expert_calls(workload: Workload, device: Device, *, layers: int, **sizes: int) -> dict[str, Call]:
    """Return forward passes of an expert of `layers` layers: diffusers'; ours per kernel and format, eager and compiled.

    `sizes` are passed to WanTransformer3DModel, whose defaults are the benchmark's.
    """
    with torch.device(device.torch):
        model = WanTransformer3DModel(text_dim=4096, num_layers=layers, **sizes).to(torch.bfloat16).eval()
        latents = torch.randn(1, *workload.latent_shape(16), dtype=torch.bfloat16)
        hidden = torch.randn(1, MAX_TOKENS, 4096, dtype=torch.bfloat16)
    hidden[:, TEXT_LENGTH:] = 0
    embeds = Embeds(hidden, (TEXT_LENGTH,))
    timestep = torch.tensor([900], device=device.torch)
    calls: dict[str, Call] = {}
    calls["diffusers"] = lambda: model(latents, timestep, hidden, return_dict=False)  # ours only reads the weights
    mesh = meshes.start(meshes.Shape(replicas=1, cfg=1, ulysses=1, ring=1), device)
    check = xdit.check_backend
    names = [name for name in ("sdpa", "sage_fp8") if _runs(attention.resolve, [name], device, references=None, probe=check)]
    kernels = attention.resolve(names, device, references=None, probe=check, cross="native")
    models = {"": model}
    fp8 = Gemm(high_noise="fp8", low_noise="fp8")
    if _runs(gemm.resolve, fp8, device, allow_reference=False, probe=missing_gemm):
        models[" and fp8 layers"] = _converted(copy.deepcopy(model), fp8, device)
    for suffix, transformer in models.items():
        self_attend, cross_attend = split_experts.attends(kernels)
        ours = Expert(
            transformer,
            split=split_experts.split(mesh),
            self_attend=self_attend,
            cross_attend=cross_attend,
            trim_text=True,
            merge_padding=kernels["cross"].lse,
            round_text=device.is_gpu,
        )
        for name in names[-1:] if suffix else names:
            calls |= _eager_and_compiled(ours, f"ours {name}{suffix}", (latents, 900.0), embeds, name)
    return calls


def _runs(resolve: Callable[..., object], *arguments: object, **keys: object) -> bool:
    """True if this device has a kernel: one that has none is a contestant fewer."""
    try:
        resolve(*arguments, **keys)
    except BadInput:
        return False
    return True


def _converted(model: WanTransformer3DModel, recipe: Gemm, device: Device) -> WanTransformer3DModel:
    """Give every linear layer of the blocks the format of the recipe."""
    table = gemm.resolve(recipe, device, allow_reference=False, probe=missing_gemm)
    convert = gemm.Conversion(recipe.high_noise, recipe, table, device, xdit.mxfp4_linear)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            model.set_submodule(name, convert(name, layer.requires_grad_(False)))
    return model


def _eager_and_compiled(
    ours: Expert, title: str, inputs: tuple[torch.Tensor, float], embeds: Embeds, kernel: str
) -> dict[str, Call]:
    with torch.inference_mode():
        text = ours.text_keys(embeds)
    ours.compile()
    compiled = ours.run_block

    def call(way: Callable[..., torch.Tensor]) -> None:
        ours.run_block = way
        ours(*inputs, text, kernel)

    return {title: functools.partial(call, run_block), f"{title}, compiled": functools.partial(call, compiled)}


def vae_calls(workload: Workload, device: Device, *, chunks: tuple[int, ...] = (1, 2, 4), **sizes: object) -> dict[str, Call]:
    """Return decodes of one video to uint8 in host memory: diffusers' in one piece, ours in `chunks` of latent frames."""
    with torch.device(device.torch):
        vae = AutoencoderKLWan(**sizes).to(torch.bfloat16).eval()
        latents = torch.randn(1, *workload.latent_shape(vae.config.z_dim), dtype=torch.bfloat16)

    def theirs() -> None:
        video = vae.decode(latents, return_dict=False)[0]
        (video * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 4, 1).float().mul(255).to(torch.uint8)

    def ours(decoder: VaeDecoder) -> None:
        for chunk in decoder.decode(latents):
            assert chunk is not None
            chunk.cpu()

    calls: dict[str, Call] = {"diffusers": theirs}
    for size in chunks:
        decoder = VaeDecoder(vae, chunk=size, gather=Gather())
        calls[f"ours, chunk {size}"] = functools.partial(ours, decoder)
    return calls


def _synchronise(device: Device) -> None:
    if device.is_gpu:
        torch.cuda.synchronize(device.torch)
