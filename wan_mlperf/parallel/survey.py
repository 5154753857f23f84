"""What runs each attention name and each format of linear layers, on this machine or on another architecture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import attention, e4m3, gemm, probe
from wan_mlperf.kernels.backends import ATTENTION, CANDIDATES, GEMM_CANDIDATES, NEEDS
from wan_mlperf.kernels.device import Device
from wan_mlperf.kernels.device import probe as probe_device
from wan_mlperf.kernels.features import Feature
from wan_mlperf.kernels.numerics import EXCHANGE_TEXTS, gemm_text
from wan_mlperf.parallel import xdit
from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import Step


def names_of(recipe: Recipe, plan: Sequence[Step]) -> list[str]:
    """Return the attention names of a plan's steps, and the formats of the recipe's linear layers, in order."""
    return [*dict.fromkeys(step.attention for step in plan if step.source is None), *gemm.names(recipe.gemm)]


def of(recipe: Recipe, plan: Sequence[Step]) -> tuple[list[Feature], str]:
    """Return what this machine runs for a recipe's plan, and what this machine is."""
    device = probe_device()
    found = [*here(names_of(recipe, plan), recipe, device), _exchange(recipe, device.arch)]
    return found, f"{device.arch} ({device.name})"


def here(names: Iterable[str], recipe: Recipe, device: Device) -> list[Feature]:
    """Return what runs on this machine, and what better kernels lack. All packages are inspected."""
    found = []
    for name in names:
        try:
            if name in CANDIDATES:
                kernel = attention.resolve(
                    [name],
                    device,
                    references=recipe.stands_for,
                    probe=xdit.check_backend,
                    smooth_k=recipe.attention.smooth_k,
                    exact=recipe.exact,
                )[name]
                lacks = kernel.passed_over
                if kernel.is_reference and not lacks:
                    lacks = (f"{device.arch} has no kernel for it",)
                found.append(Feature(name=name, runs=str(kernel), numerics=kernel.numerics.text, lacks=lacks))
            else:
                found.append(_gemm_here(name, recipe, device))
        except BadInput as refusal:
            found.append(Feature(name=name, runs="", numerics="", lacks=(str(refusal),)))
    return found


def _gemm_here(name: str, recipe: Recipe, device: Device) -> Feature:
    key = gemm.backend(name, device.arch)
    problem = None if key is None else probe.missing_gemm(key)
    lacks = () if problem is None else (f"{key}: {problem}",)
    runs = key if problem is None else None
    if runs is None and recipe.stands_for:
        runs, lacks = "reference", lacks or (f"{device.arch} has no kernel for it",)
    return Feature(
        name=name, runs=runs or "", numerics=gemm_text(name, recipe.gemm.fp8_scales), lacks=lacks or _unless(runs, name)
    )


def there(recipe: Recipe, plan: Sequence[Step], arch: str) -> tuple[list[Feature], str]:
    """Return what a complete installation on an architecture would run, what of that is missing here, and the architecture."""
    found = []
    for name in names_of(recipe, plan):
        if name in GEMM_CANDIDATES:
            key = gemm.backend(name, arch)
            problem = None if key is None else probe.missing_gemm(key)
            text = gemm_text(name, recipe.gemm.fp8_scales)
        else:
            keys = ("SDPA",) if recipe.exact else attention.candidates(name, arch, smooth_k=recipe.attention.smooth_k)
            key = keys[0] if keys else None
            problem = None if key is None else xdit.check_backend(key)
            text = "" if key is None else ATTENTION[key].numerics.text
        lacks = () if problem is None else (problem,)
        found.append(Feature(name=name, runs=key or "", numerics=text if key else "", lacks=lacks or _unless(key, name)))
    return [*found, _exchange(recipe, arch)], arch


def _exchange(recipe: Recipe, arch: str) -> Feature:
    """How Q, K and V cross between ranks, wherever several share a video's tokens."""
    problem = e4m3.missing(arch, compiled=recipe.compile.experts) if recipe.exchange == "fp8" else None
    text = f"{EXCHANGE_TEXTS[recipe.exchange]}. Where one rank has all tokens, nothing is exchanged"
    return Feature(
        name="exchange",
        runs="" if problem else recipe.exchange,
        numerics="" if problem else text,
        lacks=(problem,) if problem else (),
    )


def _unless(runs: str | None, name: str) -> tuple[str, ...]:
    return () if runs else (f"needs {NEEDS[name]}",)
