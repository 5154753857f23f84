"""Seven parts for one half hour on a GPU, in the order in which they are worth most; each fills a table, row by row.

The same code runs at small sizes on a CPU (test_small.py), so that on the day only the GPU is new.

Shapes: B batch, H heads, T video tokens, S text tokens, D head dim, M rows, K and N features of a linear layer.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from tests.gpu.rows import Rows, error, forget_peak, peak, seconds
from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.bench import full_size, load, random_checkpoint
from wan_mlperf.experts import TextKeys
from wan_mlperf.kernels import attention, gemm, linear, padding, probe, vae
from wan_mlperf.kernels.backends import ATTENTION, GEMM, GEMM_CANDIDATES
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.parallel import split_experts, xdit
from wan_mlperf.preflight import default_recipe
from wan_mlperf.recipe import Gemm
from wan_mlperf.workload import MLPERF, Workload

Function = Callable[..., torch.Tensor]
# The benchmark's checkpoint: UMT5-XXL, experts of 40 layers (`_stretch`), its VAE.
UMT5_XXL = {"vocab_size": 256_384, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}
FULL = {"heads": 40, "head_dim": 128, "ffn": 13_824, "vae_base": 96, "vae_blocks": 2, "text_dim": 4096, "text_encoder": UMT5_XXL}
ALONE = meshes.Shape(replicas=1, cfg=1, ulysses=1, ring=1)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: attention's heads and tokens, rows of linear layers, text lengths, the video, and its models."""

    heads: tuple[int, ...] = (5, 10, 40)
    tokens: int = 75_600
    head_dim: int = 128
    rows: tuple[int, ...] = (37, 512, 9_450, 75_600)
    features: tuple[int, int] = (5120, 13_824)
    lengths: tuple[int, ...] = (17, 48, 512)
    workload: Workload = MLPERF
    layers: int = 40
    expert: dict[str, int] = field(default_factory=dict)  # WanTransformer3DModel's own defaults are the benchmark's
    vae: dict[str, Any] = field(default_factory=dict)
    convolution: tuple[int, int, int, int] = (192, 4, 360, 640)  # channels, frames, height, width
    checkpoint: dict[str, Any] = field(default_factory=lambda: FULL)
    recipe: tuple[str, ...] = ("workload.steps=2",)
    compiled: bool = True


def _backend(key: str) -> Function:
    function = xdit.attention_function(xdit.backend_key(ATTENTION[key].xdit))
    return lambda query, key, value: function(query, key, value, dropout_p=0.0, is_causal=False)[0]


def runnable(device: Device, head_dim: int) -> dict[str, str | None]:
    """Key of each attention backend -> None, or what it lacks. Probes ask for packages: a CUDA build has cuDNN without a GPU."""
    meshes.start(ALONE, device)
    found = {key: xdit.check_backend(key, dtype=torch.bfloat16, head_dim=head_dim) for key in ATTENTION}
    return found if device.is_gpu else {key: problem or {"SDPA": None}.get(key, "needs a GPU") for key, problem in found.items()}


def probes(device: Device, sizes: Sizes) -> Rows:
    """1: every kernel's probe, and one call of each that can run. A kernel of a recipe's table that raises is a fault."""
    rows = Rows("1. probes and first calls", "kernel", "probe", "first call s")
    for key, problem in runnable(device, sizes.head_dim).items():
        with rows.row(key, problem or "runs"):
            shape = (1, min(sizes.heads), 256, sizes.head_dim)
            tensors = [torch.randn(shape, device=device.torch, dtype=torch.bfloat16) for _ in range(3)]
            first = "" if problem else seconds(device, _backend(key), *tensors, rounds=1)[0]
            rows.add(key, problem or "runs", first)
    for key in GEMM:
        archs = {arch for by_arch in GEMM_CANDIDATES.values() for arch, one in by_arch.items() if one == key}
        missing = probe.missing_gemm(key, dtype=torch.bfloat16)
        rows.add(key, missing or ("runs" if archs & {device.arch, "any"} else f"has no kernel for {device.arch}"), "")
    return rows


def attentions(device: Device, sizes: Sizes) -> Rows:
    """2: each backend at the benchmark's shapes: error on sampled rows, rate, and whether compiled equals eager."""
    rows = Rows("2. self-attention", "kernel", "heads", "error", "ms", "TFLOP/s", "compiled - eager")
    for heads in sizes.heads:
        shape = (1, heads, sizes.tokens, sizes.head_dim)
        query, key, value = (torch.randn(shape, device=device.torch, dtype=torch.bfloat16) for _ in range(3))
        sample = torch.arange(0, sizes.tokens, max(1, sizes.tokens // 64), device=device.torch)
        logits = query[:, :, sample].float() @ key.float().mT * sizes.head_dim**-0.5
        exact = logits.softmax(-1) @ value.float()
        del logits
        for name in (name for name, problem in runnable(device, sizes.head_dim).items() if problem is None):
            with rows.row(name, heads):
                function = _backend(name)
                out = function(query, key, value)
                _, best = seconds(device, function, query, key, value)
                off = error(out[:, :, sample], exact)
                torch._dynamo.reset()  # all kernels share one lambda's code, whose versions are limited
                twice = error(torch.compile(function)(query, key, value), out) if sizes.compiled else 0.0
                rate = 4 * heads * sizes.tokens**2 * sizes.head_dim / best / 1e12
                rows.add(name, heads, off, best * 1e3, rate, twice, ok=off < 0.25 and twice < 0.02)
    return rows


def linears(device: Device, sizes: Sizes) -> Rows:
    """3: fp8 and mxfp4 layers at several numbers of rows, some of them zero: error, rate, compiled against eager."""
    rows = Rows("3. linear layers", "format", "kernel", "M", "error", "reference's", "TFLOP/s", "compiled - eager")
    inputs, outputs = sizes.features
    for name, by_arch in GEMM_CANDIDATES.items():
        key = by_arch.get(device.arch, by_arch.get("any"))
        if key is None and device.is_gpu:
            rows.add(name, f"none on {device.arch}", *[""] * 5)
            continue
        with rows.row(name, key or "reference"):
            recipe = Gemm(high_noise=name, low_noise=name)  # type: ignore[arg-type]
            table = gemm.resolve(recipe, device, allow_reference=not device.is_gpu, probe=probe.missing_gemm)
            layer = torch.nn.Linear(inputs, outputs, device=device.torch, dtype=torch.bfloat16).requires_grad_(False)
            plain, reference = layer.weight.clone(), {"fp8": linear.Fp8Linear, "mxfp4": linear.Mxfp4Linear}.get(name)
            theirs = reference(layer) if reference else layer
            ours = gemm.Conversion(name, recipe, table, device, xdit.mxfp4_linear)("blocks.0", layer)
            compiled = torch.compile(ours) if sizes.compiled else ours
            for count in sizes.rows:
                hidden = torch.randn(1, count, inputs, device=device.torch, dtype=torch.bfloat16)
                hidden[:, :: max(2, count // 4)] = 0  # a scale of zero must not become NaN
                exact, out = F.linear(hidden, plain, layer.bias), ours(hidden)
                _, best = seconds(device, ours, hidden)
                off, other, twice = error(out, exact), error(theirs(hidden), exact), error(compiled(hidden), out)
                rate = 2 * count * inputs * outputs / best / 1e12
                ok = off < 1.2 * other + 0.01 and twice < 0.02
                rows.add(name, table[name] or "reference", count, off, other, rate, twice, ok=ok)
    return rows


def crossings(device: Device, sizes: Sizes) -> Rows:
    """4: cross-attention with a bias and by log-sum-exp, at lengths of text: error, time, graphs so far."""
    rows = Rows("4. cross-attention", "way", "kernel", "text", "error", "ms", "graphs")
    heads, full = max(sizes.heads), 512
    query = torch.randn(1, heads, sizes.tokens, sizes.head_dim, device=device.torch, dtype=torch.bfloat16)
    check = functools.partial(xdit.check_backend, dtype=torch.bfloat16, head_dim=sizes.head_dim)
    meshes.start(ALONE, device)
    for way in ("sdpa", "native"):
        kernels = attention.resolve(["sdpa"], device, references=None, probe=check, cross=way)
        _, attend = split_experts.attends(kernels)
        function = torch.compile(attend) if sizes.compiled else attend
        counters.clear()
        for length in sizes.lengths:
            with rows.row(way, kernels["cross"].backend, length):
                text = torch.randn(2, 1, heads, full, sizes.head_dim, device=device.torch, dtype=torch.bfloat16)
                text[:, :, :, length:] = text[:, :, :, full - 1 :]  # the padding tokens are all equal
                exact = F.scaled_dot_product_attention(query[:, :, :64], *text)
                keys = _text_keys(text, length, merged=kernels["cross"].lse)
                off = error(function(query, keys)[:, :, :64], exact)
                _, best = seconds(device, functools.partial(function, query, keys))
                graphs = counters["stats"]["unique_graphs"]
                rows.add(way, kernels["cross"].backend, length, off, best * 1e3, graphs, ok=off < 0.02)
    return rows


def _text_keys(text: torch.Tensor, length: int, *, merged: bool) -> TextKeys:
    """Trimmed keys and values, as experts.py makes them of [2, B, H, S, D]."""
    full, device = text.shape[-2], text.device
    count = padding.kept([length], full, merged=merged, rounded=True)
    (key, value), (last_key, last_value) = text[..., :count, :], text[..., -1:, :]
    if not merged:
        return TextKeys(key, value, padding.bias([length], full, count, device).to(text.dtype))
    return TextKeys(key, value, padding=padding.Padding(last_key, last_value, padding.log_count(full, count, device)))


def decodes(device: Device, sizes: Sizes) -> Rows:
    """5: one convolution of the VAE first, which shows a naive kernel in seconds; then whole decodes, with peak memory."""
    rows = Rows("5. VAE", "what", "dtype", "layout", "first s", "best s", "peak GB")
    vae.set_up(device.torch, tf32=True)
    channels, *sides = sizes.convolution
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            with rows.row("convolution", dtype, layout):
                layer = torch.nn.Conv3d(channels, channels, 3, padding=1, device=device.torch, dtype=dtype)
                layer.requires_grad_(False).weight.data = layer.weight.data.contiguous(memory_format=layout)
                frames = torch.randn(1, channels, *sides, device=device.torch, dtype=dtype).to(memory_format=layout)
                rows.add("convolution", dtype, layout, *seconds(device, layer, frames), "")
    for name, call in full_size.vae_calls(sizes.workload, device, chunks=(1, 2, 4), **sizes.vae).items():
        with rows.row(name), torch.inference_mode():
            forget_peak(device)
            rows.add(name, torch.bfloat16, "", *seconds(device, call, rounds=1), peak(device))
    return rows


def experts(device: Device, sizes: Sizes) -> Rows:
    """6: a block and a whole expert at the benchmark's size, eager and compiled: time, memory, graphs."""
    rows = Rows("6. blocks and experts", "layers", "contestant", "first s", "best s", "peak GB", "graphs")
    for layers in (1, sizes.layers):
        calls = full_size.expert_calls(sizes.workload, device, layers=layers, **sizes.expert)
        for name, call in calls.items():
            if "compiled" in name and not sizes.compiled:
                continue
            with rows.row(layers, name), torch.inference_mode():
                torch._dynamo.reset()  # else the block that a row before compiled would be taken
                counters.clear()
                forget_peak(device)
                first, best = seconds(device, call, rounds=2 if layers == 1 else 1)
                graphs = counters["stats"]["unique_graphs"]
                ok = graphs == 1 if "compiled" in name else graphs == 0
                rows.add(layers, name, first, best, peak(device), graphs, ok=ok)
        del calls
    return rows


def whole(device: Device, sizes: Sizes, folder: Path) -> Rows:
    """7: a random checkpoint of the full size: loading, memory of host and device, the first query and the second."""
    rows = Rows("7. whole videos of 2 steps", "what", "value")
    with torch.device(device.torch):  # drawing 6 billion numbers on a CPU takes minutes
        _stretch(random_checkpoint.write(folder, layers=1, dtype=torch.bfloat16, **sizes.checkpoint), sizes.layers)
    with rows.row("load"):
        one = load.measure("ours", folder, (), len(os.sched_getaffinity(0)))
        rows.add("load, s per GB stored", one["seconds"] / one["stored"] * 1e9)
        rows.add("host memory beyond weights, GB", (one["peak"] - (0 if device.is_gpu else one["kept"])) / 1e9)
    with rows.row("queries"):
        forget_peak(device)
        overrides = [f"model.checkpoint={folder}", "mesh.ranks=1", *sizes.recipe]
        pipeline = Pipeline.load(load_recipe(default_recipe("singlestream"), overrides=overrides))
        first, second = seconds(device, functools.partial(pipeline.generate, "a red circle"), rounds=1)
        rows.add("first query, s", first)
        rows.add("second query, s", second)
        rows.add("device memory at most, GB", peak(device))
    return rows


def _stretch(model: Path, layers: int) -> None:
    """Make so many layers of a checkpoint's only one, a file each, and the second expert of the first: only sizes matter."""
    folder = model / "transformer"
    (single,) = folder.glob("*.safetensors")
    weights = load_file(single)
    names: dict[str, str] = {}
    single.unlink()
    for number in range(layers):
        own = {name: one for name, one in weights.items() if name.startswith("blocks.0.") or number == 0}
        own = {name.replace("blocks.0.", f"blocks.{number}."): one for name, one in own.items()}
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{layers:05}.safetensors"
        save_file(own, folder / file)
        names |= dict.fromkeys(own, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": layers}))
    shutil.rmtree(model / "transformer_2")
    (model / "transformer_2").symlink_to(folder)


PARTS: dict[str, Callable[..., Rows]] = {
    one.__name__: one for one in (probes, attentions, linears, crossings, decodes, experts, whole)
}
