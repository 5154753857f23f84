"""What is rehearsed, and its parts on fake tensors: as pipeline.load makes them, from configurations instead of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from wan_mlperf.experts import Expert
from wan_mlperf.kernels import attention
from wan_mlperf.kernels import vae as kernels_vae
from wan_mlperf.kernels.attention import Kernel
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import split_experts, split_vae
from wan_mlperf.parallel.mesh import Mesh, Shape
from wan_mlperf.predict.counting import Counting
from wan_mlperf.predict.from_recipe import TEXT_TOKENS
from wan_mlperf.predict.layers import convert
from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import Step, layers_of
from wan_mlperf.vae_decode import VaeDecoder
from wan_mlperf.workload import Workload

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "checkpoint": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is rehearsed: `configs` of the parts, `device` as probing that hardware would return it, `kernels` by recipe name."""

    recipe: Recipe
    workload: Workload
    plan: tuple[Step, ...]
    shape: Shape
    device: Device
    configs: dict[str, dict[str, Any]]
    kernels: Mapping[str, str] = field(default_factory=dict)
    text_lengths: tuple[int, int] = TEXT_TOKENS


def expert_bytes(subject: Subject, name: str, form: str) -> float:
    """Bytes of an expert's weights in a format, with the layers that are kept in another one or in several."""
    with torch.device("meta"), _default_dtype(DTYPES[subject.recipe.model.dtype]):
        transformer = WanTransformer3DModel.from_config(subject.configs["transformer"])
        convert(transformer, form, layers_of(subject.plan, name), Counting({}))
    return float(sum(one.nbytes for one in [*transformer.parameters(), *transformer.buffers()]))


def make_text_model(subject: Subject) -> UMT5EncoderModel:
    """Make the UMT5 encoder."""
    with _default_dtype(DTYPES[subject.recipe.model.dtype]):
        return UMT5EncoderModel(UMT5Config(**subject.configs["text_encoder"])).eval()


def make_decoder(subject: Subject, mesh: Mesh) -> VaeDecoder:
    """Make the decoder, sharded over the ranks of the mesh."""
    with _default_dtype(DTYPES[subject.recipe.model.vae_dtype]):
        vae = AutoencoderKLWan.from_config(subject.configs["vae"]).eval()
    _, _, rows, columns = subject.workload.latent_shape(0)
    gather = split_vae.shard_decoder(vae, mesh, latent_height=rows, latent_width=columns)
    # On a GPU PyTorch's own convolutions run, as in a decode that must be equal bit for bit.
    gpu = subject.device.is_gpu
    if gpu:
        kernels_vae.fewer_passes(vae, in_16_bits=True)
    return VaeDecoder(vae, chunk=subject.recipe.vae.chunk, gather=gather, bitwise=gpu)


def make_experts(subject: Subject, mesh: Mesh, counting: Counting) -> dict[str, Expert]:
    """Make the experts as pipeline.load does, with stand-ins for kernels that this machine does not have."""
    recipe = subject.recipe
    kernels = _kernels(subject, counting)
    self_attend, cross_attend = split_experts.attends(kernels, exchange=recipe.exchange)
    together = split_experts.together(kernels, recipe, subject.shape, subject.device)
    split, unguided_split = split_experts.split(mesh), split_experts.unguided_split(mesh)
    experts = {}
    for name, part in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        with _default_dtype(DTYPES[recipe.model.dtype]):
            transformer = WanTransformer3DModel.from_config(subject.configs[part]).eval()
        keep_in_fp32(transformer)
        convert(transformer, getattr(recipe.gemm, name), layers_of(subject.plan, name), counting)
        experts[name] = Expert(
            transformer,
            split=split,
            unguided_split=unguided_split,
            self_attend=self_attend,
            cross_attend=cross_attend,
            together=together,
            trim_text=recipe.trim_text,
            merge_padding=kernels["cross"].lse,
            round_text=subject.device.is_gpu or recipe.attention.cross == "native",
        )
    return experts


def keep_in_fp32(transformer: WanTransformer3DModel) -> None:
    """Keep norms and modulation in fp32, as diffusers' from_pretrained does."""
    kept = transformer._keep_in_fp32_modules or []
    for name, parameter in transformer.named_parameters():
        if any(one in name.split(".") for one in kept):
            parent = transformer.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], torch.nn.Parameter(parameter.float(), requires_grad=False))


def _kernels(subject: Subject, counting: Counting) -> dict[str, Kernel]:
    """Name -> kernel. On a GPU all are stand-ins; on a CPU PyTorch's own attention runs on fake tensors as it is."""
    names = dict.fromkeys(step.attention for step in subject.plan if step.source is None)
    if subject.device.is_gpu:
        return _records(subject, names, counting)
    table = attention.resolve(
        names,
        subject.device,
        references=subject.recipe.stands_for or "gfx950",
        probe=lambda _key: None,
        smooth_k=subject.recipe.attention.smooth_k,
        ring=subject.shape.ring,
        exact=subject.recipe.exact,
        cross=subject.recipe.attention.cross,
        trim_text=subject.recipe.trim_text,
    )
    return {
        name: replace(kernel, function=counting.kernel(name)) if kernel.is_reference else kernel for name, kernel in table.items()
    }


def _records(subject: Subject, names: Iterable[str], counting: Counting) -> dict[str, Kernel]:
    """Name -> stand-in, with a log-sum-exp where a ring needs it; cross-attention's as in a complete installation."""
    recipe = subject.recipe
    table = attention.resolve(
        (),
        subject.device,
        references=None,
        probe=lambda _key: None,
        cross=recipe.attention.cross,
        trim_text=recipe.trim_text,
    )
    ring = subject.shape.ring > 1
    records = {
        name: Kernel(backend="SDPA", function=counting.kernel(subject.kernels[name], lse=ring), lse=ring) for name in names
    }
    cross = replace(table["cross"], function=counting.kernel("cross", lse=table["cross"].lse))
    return {**records, "cross": cross}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # A fake model is made in its dtype: `.to` cannot swap fake parameters.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
