"""Imports xDiT on any device, including a CPU with gloo. Each line that touches xDiT's internals says why.

Checked on xfuser 0.7.0 and torch 2.13. With a GPU none of the CPU lines runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import probe
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.device import build, gpu_count
from wan_mlperf.kernels.reference import Function

Key = Hashable  # of xDiT's attention registry: an AttentionBackendType, or the name of a function of ours


@functools.cache
def load() -> ModuleType:
    """Import xfuser and return it. Without a GPU, the questions that its import asks are answered first."""
    for needed in ("xfuser", "triton"):
        if importlib.util.find_spec(needed) is None:
            extra = "; without a GPU: pip install -e '.[cpu]'" if needed == "triton" else ""
            raise BadInput(f"package {needed} is not installed; xDiT needs it{extra}")
    if gpu_count() and "ROCm" in build() and probe.is_another_aiter():
        raise BadInput(
            "package aiter is not AITER, which has aiter.ops: with it xDiT cannot be imported; allowed: pip uninstall aiter"
        )
    try:
        with _quiet_imports():
            return importlib.import_module("xfuser") if gpu_count() else _load_without_gpu()
    except ImportError as error:  # it imports some packages only where it finds another: FlashInfer where FlashAttention has FP4
        raise BadInput(
            f"package xfuser cannot be imported here: {error}; allowed: install what it lacks, or uninstall what needs it"
        ) from None


@contextmanager
def _quiet_imports() -> Iterator[None]:
    # On import, xDiT sets its log level to debug unless LOG_LEVEL says otherwise. Errors are still shown.
    # It also calls a collective by a name that torch 2.13 deprecates, with a warning on every rank.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    before = os.environ.get("LOG_LEVEL")
    os.environ.setdefault("LOG_LEVEL", "error")
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOG_LEVEL"]


def _load_without_gpu() -> ModuleType:
    # `import xfuser` asks xfuser.envs for a device version, which raises without an accelerator. So the package is made
    # known without being executed, its envs answer, and only then is it executed.
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["xfuser"] = package
    envs: Any = importlib.import_module("xfuser.envs")
    # xDiT asks how torch was built, not what is there: with a CUDA build but no GPU it would use GPU 0, and NCCL.
    for built_for in ("cuda", "hip", "musa", "npu", "mps"):
        setattr(envs, f"_is_{built_for}", lambda: False)
    envs.get_device_version = lambda: None
    envs.get_torch_distributed_backend = lambda: "gloo"
    # Without CUDA xDiT takes yunchang for missing and refuses sequence parallelism, which works on gloo.
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
    spec.loader.exec_module(package)
    usp: Any = importlib.import_module("xfuser.model_executor.layers.usp")
    usp.PROCESS_GROUP = importlib.import_module("yunchang.globals").PROCESS_GROUP
    return package


def backend_key(name: str) -> Key:
    """Return the key of xDiT's attention registry for one of its backends, by its name in AttentionBackendType."""
    load()
    return importlib.import_module("xfuser.core.distributed.attention_backend").AttentionBackendType[name]


def check_backend(key: str, *, dtype: torch.dtype | None = None, head_dim: int | None = None, ring: int = 1) -> str | None:
    """What a kernel (a key of backends.ATTENTION) lacks on this machine, in one phrase; None if xDiT can run it.

    Checks what the table says it needs, then runs xDiT's own checks, which need no running groups.
    """
    problem = probe.missing(key, dtype=dtype, head_dim=head_dim)
    if problem is not None or (key == "SDPA" and ring == 1):
        return problem
    load()
    backend, envs = ATTENTION[key], importlib.import_module("xfuser.envs")
    # xDiT imports a package's functions only where its own check has found it: without that, the call is a NameError.
    if backend.flag and not envs.PACKAGES_CHECKER.packages_info[backend.flag]:
        return f"xDiT does not find it here ({backend.flag} is False)"
    kind = importlib.import_module("xfuser.core.distributed.runtime_state").RuntimeState
    state = object.__new__(kind)
    state.parallel_config = SimpleNamespace(ring_degree=ring)
    state.runtime_config = SimpleNamespace(use_hybrid_attn_schedule=False)
    try:
        state._check_if_backend_compatible_with_current_configuration(backend_key(backend.xdit))
    except (RuntimeError, ImportError) as error:
        return str(error)
    return None


def attention_function(key: Key) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the function behind a key of xDiT's attention registry: it returns the output, and the log-sum-exp or None."""
    return importlib.import_module("xfuser.core.distributed.attention_backend").ATTENTION_FUNCTION_REGISTRY[key]


def register(name: str, function: Function) -> str:
    """Add one of our functions to xDiT's attention registry under `name`, and return that key."""
    load()
    backends = importlib.import_module("xfuser.core.distributed.attention_backend")

    @backends.register_attention_function(name)
    def call(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float,
        is_causal: bool,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert not dropout_p and not is_causal
        out = function(query, key, value)
        return out if isinstance(out, tuple) else (out, None)

    return name


def mxfp4_linear(layer: torch.nn.Linear) -> torch.nn.Module:
    """Return xDiT's MXFP4 layer (AITER's GEMM, gfx950) with the weights of `layer`, packed; `layer` is on the GPU."""
    load()
    kind = importlib.import_module("xfuser.model_executor.layers.mxfp4_linear").xFuserMXFP4Linear
    new = kind(
        layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype
    )
    new.load_and_quantize_weights(layer.weight.data, None if layer.bias is None else layer.bias.data)
    return new
