"""Attention kernels by name: what each is on which device (backends.py), and what stands in for it elsewhere.

On a GPU a name is a backend of xDiT, called through xDiT; everywhere else it is a PyTorch reference, and only if the recipe
allows that. `parallel/` enters what is resolved here into xDiT's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.backends import ARCHS, ATTENTION, CANDIDATES, NEEDS
from wan_mlperf.kernels.device import Device
from wan_mlperf.kernels.numerics import Numerics
from wan_mlperf.kernels.reference import Function, reference

Probe = Callable[[str], "str | None"]  # key of ATTENTION -> None, or what is missing for it on this machine


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a name means here: a key of ATTENTION, run by xDiT or, with `function`, by ours on [batch, heads, tokens, head_dim].

    `stands_for`: the architecture whose kernel a reference imitates. `passed_over`: better kernels, each with what it lacks.
    `lse`: it returns its log-sum-exp; `bias`: it reads a bias of the logits.
    """

    backend: str
    function: Function | None = None
    stands_for: str = ""
    passed_over: tuple[str, ...] = ()
    lse: bool = False
    bias: bool = False

    @property
    def xdit(self) -> str | None:
        """The name of xDiT's backend, None for a function of ours."""
        return ATTENTION[self.backend].xdit if self.function is None else None

    @property
    def is_reference(self) -> bool:
        """True for a PyTorch reference that stands in for a kernel."""
        return bool(self.stands_for)

    @property
    def numerics(self) -> Numerics:
        """What it does to its operands."""
        return ATTENTION[self.backend].numerics

    def __str__(self) -> str:
        if self.is_reference:
            return f"{self.backend} by reference ({self.stands_for})"
        return f"xDiT {self.backend}" if self.function is None else "PyTorch, with log-sum-exp"


def sdpa_with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's CPU attention with its log-sum-exp, by which ring attention and padding.py merge outputs."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[:2]
    return out, lse


def _kernel(key: str, passed_over: Sequence[str] = ()) -> Kernel:
    return Kernel(backend=key, passed_over=tuple(passed_over), lse=ATTENTION[key].lse, bias=ATTENTION[key].bias)


def candidates(name: str, arch: str, *, smooth_k: bool = False) -> tuple[str, ...]:
    """The keys of ATTENTION that a name can mean on an architecture, best first; with `smooth_k` only those that smooth K."""
    by_arch = CANDIDATES[name]
    found = by_arch.get(arch, by_arch.get("gpu", ()) if arch != "cpu" else ())
    return tuple(one for one in found if name == "sdpa" or not smooth_k or ATTENTION[one].numerics.smoothed)


def resolve(
    names: Iterable[str],
    device: Device,
    *,
    references: str | None,
    probe: Probe,
    smooth_k: bool = False,
    ring: int = 1,
    exact: bool = False,
    cross: str = "sdpa",
    trim_text: bool = True,
) -> dict[str, Kernel]:
    """Return name -> Kernel for this device, with "cross" for cross-attention. Raises BadInput for what cannot run.

    `references`: the architecture whose kernels PyTorch references may stand for, None if none may. `probe` says what a kernel
    lacks; `ring` is the mesh's ring degree. `exact` keeps to PyTorch's own attention, which is what diffusers calls, wherever
    the mesh allows it. `cross` and `trim_text` are the recipe's.
    """
    table = {"cross": _kernel("SDPA") if exact or cross == "sdpa" else _native_cross(device, probe, trim_text)}
    for name in dict.fromkeys(names):
        if name == "sdpa" and ring > 1 and device.arch == "cpu":
            table[name] = Kernel(backend="SDPA", function=sdpa_with_lse, lse=True)
            continue
        if exact and ring == 1:
            table[name] = _kernel("SDPA")
            continue
        table[name] = _resolve(name, device, references, probe, smooth_k)
        if table[name].is_reference and ring > 1:
            raise BadInput(
                f"attention {name!r}: its reference gives no log-sum-exp, which mesh.ring {ring} needs; allowed: ring 1"
            )
    return table


def best(name: str, device: Device) -> Kernel:
    """The kernel that a complete installation on a device's architecture uses for a name. Raises BadInput if there is none."""
    return _resolve(name, device, None, lambda _key: None, smooth_k=False)


def check(names: Iterable[str], device: Device, *, references: str | None, smooth_k: bool = False) -> None:
    """Raise BadInput for a name that no kernel of this architecture computes, unless a reference stands in for it.

    `resolve` checks what is installed, in the ranks: checking imports it.
    """
    for name in dict.fromkeys(names):
        if not candidates(name, device.arch, smooth_k=smooth_k):
            _stand_in(name, device, references, smooth_k, ())


def _resolve(name: str, device: Device, references: str | None, probe: Probe, smooth_k: bool) -> Kernel:
    passed_over: list[str] = []
    for key in candidates(name, device.arch, smooth_k=smooth_k):
        problem = probe(key)
        if problem is None:
            return _kernel(key, passed_over)
        passed_over.append(f"{key}: {problem}")
    return _stand_in(name, device, references, smooth_k, passed_over)


def _native_cross(device: Device, probe: Probe, trim_text: bool) -> Kernel:
    """The fastest kernel for cross-attention; with `trim_text` one that returns a log-sum-exp or, as PyTorch's, reads a bias."""
    if device.arch == "cpu":
        return Kernel(backend="SDPA", function=sdpa_with_lse, lse=True) if trim_text else _kernel("SDPA")
    passed_over: list[str] = []
    for key in candidates("sdpa", device.arch):
        backend = ATTENTION[key]
        problem = "gives no log-sum-exp" if trim_text and not (backend.lse or backend.bias) else probe(key)
        if problem is None:
            return _kernel(key, passed_over)
        passed_over.append(f"{key}: {problem}")
    raise AssertionError("PyTorch's own attention needs nothing")


def _stand_in(name: str, device: Device, references: str | None, smooth_k: bool, passed_over: Sequence[str]) -> Kernel:
    tried = f" ({'; '.join(passed_over)})" if passed_over else ""
    smoothed = ", for a kernel that smooths K (attention.smooth_k)," if smooth_k else ""
    if references is None or name == "sdpa":
        raise BadInput(
            f"attention {name!r}: cannot run on {device.arch} ({device}){tried}; it needs{smoothed} "
            f"{NEEDS[name]}; allowed here: sdpa, or references: allow"
        )
    imitated = candidates(name, references, smooth_k=smooth_k)
    if not imitated:
        having = [arch for arch in ARCHS if candidates(name, arch, smooth_k=smooth_k)]
        raise BadInput(
            f"attention {name!r}: {references} has no kernel for it{smoothed} that a reference could stand for; "
            f"allowed: references {', '.join(having)}"
        )
    function = reference(ATTENTION[imitated[0]].numerics)
    return Kernel(backend=imitated[0], function=function, stands_for=references, passed_over=tuple(passed_over))
