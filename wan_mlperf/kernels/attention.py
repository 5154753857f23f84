"""Attention kernels by name: what each is on which device, and what it needs.

On a GPU a name is a backend of xDiT, called through xDiT; everywhere else it is a PyTorch reference, and only if the recipe
allows that. `parallel/` enters what is resolved here into xDiT's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import sage
from wan_mlperf.kernels.device import Device

# (query, key, value) -> output, or (output, log-sum-exp of the logits) for ring attention.
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"]
Probe = Callable[[str], "str | None"]  # xDiT backend -> None, or what is missing for it on this machine


@dataclass(frozen=True)
class Kernel:
    """Either a backend of xDiT (`xdit`), or a function of ours on [batch, heads, tokens, head_dim]."""

    xdit: str | None = None
    function: Function | None = None

    @property
    def is_reference(self) -> bool:
        """True for a PyTorch reference that stands in for a kernel."""
        return self.function in REFERENCES.values()


# name -> arch -> backends of xDiT, best first. "gpu" is any other NVIDIA or AMD GPU.
BACKENDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sdpa": {
        "gfx950": ("AITER", "SDPA"),
        "gfx942": ("AITER", "SDPA"),
        "sm100": ("FLASH_4", "CUDNN", "FLASH", "SDPA"),
        "sm90": ("FLASH_3", "CUDNN", "FLASH", "SDPA"),
        "gpu": ("FLASH", "SDPA"),
        "cpu": ("SDPA",),
    },
    "sage_fp8": {
        "gfx950": ("AITER_FP8",),
        "gfx942": ("AITER_FP8",),
        "sm100": ("FLASH_3_FP8", "SAGE"),
        "sm90": ("FLASH_3_FP8", "SAGE"),
        "gpu": ("SAGE",),
    },
    "sage_fp4": {
        "gfx950": ("AITER_SAGE_V2", "AITER_MXFP4"),
        "sm100": ("FLASH_4_FP4",),
    },
}


def sdpa_with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's CPU attention with its log-sum-exp, by which ring attention merges the ranks' outputs."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[:2]
    return out, lse


REFERENCES: Mapping[str, Function] = {"sage_fp8": sage.sage_fp8, "sage_fp4": sage.sage_fp4}

NEEDS: Mapping[str, str] = {
    "sdpa": "PyTorch",
    "sage_fp8": "AITER on gfx950 or gfx942 (MI355X, MI300X), or SageAttention or FlashAttention 3 with FP8 on an NVIDIA GPU",
    "sage_fp4": "AITER's Sage kernels on gfx950 (MI355X), or FlashAttention 4 with FP4 on sm100 (B200)",
}


def resolve(
    names: Iterable[str], device: Device, *, allow_reference: bool, probe: Probe, ring: int = 1, exact: bool = False
) -> dict[str, Kernel]:
    """Return name -> Kernel for this device, with "cross" for cross-attention. Raises BadInput for what cannot run.

    `probe` asks xDiT whether a backend can run here; `ring` is the mesh's ring degree. `exact` keeps to PyTorch's own
    attention, which is what diffusers calls, wherever the mesh allows it.
    """
    table = {"cross": Kernel(xdit="SDPA")}
    for name in dict.fromkeys(names):
        if name == "sdpa" and ring > 1 and device.arch == "cpu":
            table[name] = Kernel(function=sdpa_with_lse)
            continue
        if exact and ring == 1:
            table[name] = Kernel(xdit="SDPA")
            continue
        table[name] = _resolve(name, device, allow_reference, probe)
        if table[name].is_reference and ring > 1:
            raise BadInput(
                f"attention {name!r}: its reference gives no log-sum-exp, which mesh.ring {ring} needs; allowed: ring 1"
            )
    return table


def check(names: Iterable[str], device: Device, *, allow_reference: bool) -> None:
    """Raise BadInput for a name that no backend of this device computes, unless a reference is allowed."""
    for name in dict.fromkeys(names):
        _resolve(name, device, allow_reference, probe=lambda _backend: None)


def _resolve(name: str, device: Device, allow_reference: bool, probe: Probe) -> Kernel:
    by_arch = BACKENDS[name]
    candidates = by_arch.get(device.arch, by_arch.get("gpu", ()) if device.is_gpu else ())
    missing = []
    for backend in candidates:
        problem = probe(backend)
        if problem is None:
            return Kernel(xdit=backend)
        missing.append(f"{backend}: {problem}")
    if allow_reference and name in REFERENCES:
        return Kernel(function=REFERENCES[name])
    tried = f" ({'; '.join(missing)})" if missing else ""
    raise BadInput(
        f"attention {name!r}: cannot run on {device.arch} ({device.name}){tried}; it needs {NEEDS[name]}; "
        "allowed here: sdpa, or references: allow"
    )
