"""Is everything that a kernel needs on this machine? Checks packages, functions and their arguments before any weight is read.

xDiT's own check (see parallel/xdit.py) ignores half of its backends, and accepts packages whose functions lack arguments that it
then passes. Here each function is inspected.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence

import torch

from wan_mlperf.kernels.backends import ATTENTION, GEMM, Backend, GemmBackend
from wan_mlperf.kernels.device import build
from wan_mlperf.kernels.needs import Need

CUDNN = 90000  # the oldest cuDNN with which PyTorch offers its attention


def missing(key: str, *, dtype: torch.dtype | None = None, head_dim: int | None = None) -> str | None:
    """Say in one phrase what an attention kernel (a key of ATTENTION) lacks here, or return None if it can run.

    `dtype` and `head_dim` are the model's; without them they are assumed to fit. The architecture is not checked here.
    """
    backend = ATTENTION[key]
    if head_dim is not None and backend.head_dims and head_dim not in backend.head_dims:
        return f"takes head dimension {_list(backend.head_dims)}, and the model has {head_dim}"
    return _dtype(backend, dtype) or _needs(backend.needs) or _without(backend) or _cudnn(backend)


def missing_gemm(key: str, *, dtype: torch.dtype | None = None) -> str | None:
    """Say in one phrase what a GEMM (a key of GEMM) lacks here, or return None if it can run."""
    return _dtype(GEMM[key], dtype) or _needs(GEMM[key].needs)


def is_another_aiter() -> bool:
    """True if the package `aiter` is not AITER: PyPI has another one of that name, with which xDiT fails on an AMD GPU."""
    spec = importlib.util.find_spec("aiter")
    return spec is not None and importlib.util.find_spec("aiter.ops") is None


def unmet(need: Need) -> str | None:
    """Say in one phrase what of a need is missing, or return None if nothing is."""
    try:
        module = importlib.import_module(need.module)
    except ModuleNotFoundError as error:
        return f"{error.name or need.module} is not installed; {need.since}"
    except Exception as error:  # a library for another CUDA or ROCm, a failed build: whatever it is, it cannot be used
        return f"{need.module} cannot be imported ({type(error).__name__}: {_short(error)}); {need.since}"
    for name in need.names:
        if not hasattr(module, name):
            return f"{need.module} has no {name}; {need.since}"
    parameters = _parameters(need)
    if parameters is None:
        return None
    lacking = [name for name in need.parameters if name not in parameters]
    if lacking:
        return f"{need.module}.{need.names[0]} has no argument {lacking[0]}; {need.since}"
    insists = [name for name in need.optional if name in parameters and not parameters[name]]
    if insists:
        return f"{need.module}.{need.names[0]} requires the argument {insists[0]}; {need.since}"
    return None


def _needs(needs: Sequence[Need]) -> str | None:
    return next((problem for need in needs if (problem := unmet(need)) is not None), None)


def _without(backend: Backend) -> str | None:
    if backend.without is None or unmet(backend.without) is not None:
        return None
    return f"xDiT calls {backend.without.module} instead, which is there"


def _cudnn(backend: Backend) -> str | None:
    if not backend.cudnn:
        return None
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() and "ROCm" not in build() else None
    return None if version is not None and version >= CUDNN else f"cuDNN is {version or 'not there'}; needs 9.0 or newer"


def _dtype(backend: Backend | GemmBackend, dtype: torch.dtype | None) -> str | None:
    name = str(dtype).removeprefix("torch.")
    return None if dtype is None or name in backend.dtypes else f"takes {_list(backend.dtypes)}, and the model computes in {name}"


def _parameters(need: Need) -> dict[str, bool] | None:
    """Return the arguments of a need's first function, and whether each is optional; None if unknown (compiled code)."""
    try:
        parameters = inspect.signature(getattr(importlib.import_module(need.module), need.names[0])).parameters
    except (TypeError, ValueError):
        return None
    if all(one.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for one in parameters.values()):
        # AITER wraps some functions into (*args, **kwargs) and registers them with PyTorch, whose schema has the arguments.
        operator = getattr(getattr(torch.ops, need.module.split(".")[0]), need.names[0], None)
        if operator is None:
            return None
        return {one.name: one.has_default_value() for one in operator.default._schema.arguments}
    return {name: one.default is not inspect.Parameter.empty for name, one in parameters.items()}


def _list(values: Sequence[object]) -> str:
    return " or ".join(str(value) for value in values)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:100]
