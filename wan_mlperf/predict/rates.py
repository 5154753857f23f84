"""TFLOP/s of kernels on architectures (rates.json), each with its source, and the fitted constants (constants.json).

A pair of kernel and GPU that nobody has published is refused with the known ones: nothing is guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.inputs.text import read_json
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.predict import hardware
from wan_mlperf.predict.hardware import Format, Hardware

FILE = Path(__file__).with_name("rates.json")
CONSTANTS = Path(__file__).with_name("constants.json")
BOUNDS = (1e-6, 1e6)  # of a constant that is read: beyond them, products overflow
MOST = 0.88  # of the dense peak: what FlashAttention 3 reaches on an H20, whose peak is not limited by its power
REFERENCE = {
    "sm80": "A100",
    "sm89": "RTX 4090",
    "sm90": "H100",
    "sm100": "B200",
    "sm103": "B300",
    "sm120": "RTX 5090",
    "gfx942": "MI300X",
    "gfx950": "MI355X",
}
GEMM_FORMATS: dict[str, Format] = {"bf16": "bf16", "fp8": "fp8", "mxfp4": "fp4"}
Constants = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What a kernel reaches on one GPU, in FLOP/s; `form` is its format. `fitted`: found in whole runs, not measured alone."""

    kernel: str
    arch: str
    flops: float
    form: str
    fitted: bool
    source: str
    date: str


@cache
def constants() -> Constants:
    """The fitted constants as they ship."""
    values: Constants = json.loads(CONSTANTS.read_text(encoding="utf-8"))["values"]
    return values


def read_constants(file: Path) -> Constants:
    """Read constants that `predict fit --write` wrote. Raises BadInput."""
    allowed = "one that `predict fit --write` wrote"
    content = read_json(file, what="constants", allowed=allowed)
    values = content.get("values") if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise BadInput(f"constants {str(file)!r}: not a file of constants (there are no values); allowed: {allowed}")
    least, most = BOUNDS
    for name in constants():
        if name not in values:
            raise BadInput(f"constants {str(file)!r}: lacks {name}, as of an older version; allowed: {allowed} of this version")
        value: Any = values[name]
        if type(value) not in (int, float) or not least <= value <= most:
            raise BadInput(
                f"constants {str(file)!r}: not a file of constants ({name}: {str(value)[:80]!r} is not a number, {least:.6f} to "
                f"{most:.0f}); allowed: {allowed}"
            )
    return {name: float(values[name]) for name in constants()}


@cache
def residuals() -> tuple[float, float]:
    """(of whole runs, of a kernel's own benchmark against whole runs): relative errors that four of five stay within."""
    values = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    return values["residual"], values["kernel_residual"]


@cache
def _rows(table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))[table]
    return rows


def attention(kernel: str, gpu: Hardware, values: Constants | None = None) -> Rate:
    """Return the rate of an attention kernel on a GPU. Raises BadInput for a pair without a published rate."""
    values = values or constants()
    for row in _rows("attention"):
        if row["kernel"] == kernel and row["arch"] == gpu.arch and gpu.name in row.get("cards", [gpu.name]):
            name = row.get("fitted")
            tflops = row["tflops"] if name is None else values[name] * (row["tflops"] if name == "aiter_asm" else 1.0)
            kind = "fp8" if row["format"] == "fp4" and gpu.fp4 is None else row["format"]
            flops = _on(gpu, tflops * 1e12, hardware.find(row["at"]), kind, values)
            return Rate(
                kernel=kernel,
                arch=gpu.arch,
                flops=flops,
                form=row["format"],
                fitted=name is not None or row.get("whole_run", False),
                source=row["source"],
                date=row["date"],
            )
    known = sorted({row["kernel"] for row in _rows("attention") if row["arch"] == gpu.arch and _has(row, gpu)})
    if kernel not in attention_kernels() and kernel not in ATTENTION:
        raise BadInput(
            f"kernel {kernel!r}: is not known{did_you_mean(kernel, attention_kernels())}; allowed on {gpu.name}: "
            f"{', '.join(known) or 'none has a published rate'}"
        )
    raise BadInput(
        f"kernel {kernel!r}: nobody has published its rate on {gpu.name} ({gpu.arch}); known there: {', '.join(known) or 'none'}"
        + (f" (--kernel NAME={known[0]} prices one of the recipe's as such)" if known else "")
    )


def gemm(name: str, gpu: Hardware, values: Constants | None = None) -> Rate:
    """Return the rate of linear layers in a format (bf16, fp8, mxfp4) on a GPU. Raises BadInput for a pair without one."""
    values = values or constants()
    for row in _rows("gemm"):
        if row["kernel"] == name and gpu.arch in row["archs"]:
            share = values[row["fitted"]] if "fitted" in row else row["share"]
            reference, kind = hardware.find(REFERENCE[gpu.arch]), GEMM_FORMATS[name]
            flops = _on(gpu, share * reference.peak(kind), reference, kind, values)
            return Rate(
                kernel=f"gemm {name}",
                arch=gpu.arch,
                flops=flops,
                form=kind,
                fitted="fitted" in row,
                source=row["source"],
                date=row["date"],
            )
    known = [row["kernel"] for row in _rows("gemm") if gpu.arch in row["archs"]]
    raise BadInput(f"gemm {name!r}: has no published rate on {gpu.name} ({gpu.arch}); known there: {', '.join(known) or 'none'}")


def has_own_rate(kernel: str, gpu: Hardware) -> bool:
    """True if the kernel has been measured alone on this architecture, so that no whole run is needed to price it."""
    return any(row["kernel"] == kernel and row["arch"] == gpu.arch and row["tflops"] is not None for row in _rows("attention"))


def fitted_and_alone(values: Constants) -> list[tuple[float, float]]:
    """TFLOP/s in whole runs and alone, of each fitted kernel that has both."""
    rows = [row for row in _rows("attention") if "fitted" in row and row["tflops"] is not None]
    return [(attention(row["kernel"], hardware.find(row["at"]), values).flops / 1e12, row["tflops"]) for row in rows]


def attention_kernels() -> list[str]:
    """Every kernel with a rate anywhere."""
    return sorted({row["kernel"] for row in _rows("attention")})


def table() -> list[Rate]:
    """Every attention rate on the card where it was measured."""
    return [attention(row["kernel"], hardware.find(row["at"])) for row in _rows("attention")]


def _has(row: dict[str, Any], gpu: Hardware) -> bool:
    return gpu.name in row.get("cards", [gpu.name])


def _on(gpu: Hardware, flops: float, measured_on: Hardware, kind: str, values: Constants) -> float:
    """Scale a rate to another card of the architecture: by board power, up to MOST of the dense peak."""
    carried = flops * (gpu.power_w / measured_on.power_w) ** values["power"]
    return carried if gpu == measured_on else min(carried, MOST * gpu.peak(kind))
