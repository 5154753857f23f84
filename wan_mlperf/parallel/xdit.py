"""Starts xDiT on any device, including a CPU with gloo. Every line that touches xDiT's internals is here and says why.

Checked on xfuser 0.7.0 and torch 2.13. With a GPU none of the CPU lines runs.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from wan_mlperf import ranks
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import probe
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.device import Device, build, gpu_count
from wan_mlperf.kernels.reference import Function

_GROUPS = ("_WORLD", "_MODEL_REPLICA", "_DP", "_CFG", "_SP", "_TP", "_PP", "_FS", "_VAE")  # xDiT's, in parallel_state


@dataclass
class _Ground:
    """The default process group that xDiT's groups stand on, and whether it was started here."""

    group: Any = None
    ours: bool = False


_ground = _Ground()


@functools.cache
def load() -> ModuleType:
    """Import xfuser and return it. Without a GPU, the questions that its import asks are answered first."""
    for needed in ("xfuser", "triton"):
        if importlib.util.find_spec(needed) is None:
            extra = "; without a GPU: pip install -e '.[cpu]'" if needed == "triton" else ""
            raise BadInput(f"package {needed} is not installed; xDiT needs it{extra}")
    if gpu_count() and "ROCm" in build() and probe.is_another_aiter():
        raise BadInput(
            "package aiter is not AITER, which has aiter.ops: on it xDiT cannot be imported; allowed: pip uninstall aiter"
        )
    try:
        with _quiet_imports():
            return importlib.import_module("xfuser") if gpu_count() else _load_without_gpu()
    except ImportError as error:  # of a package that it imports where it finds another: FlashInfer where FlashAttention has FP4
        raise BadInput(
            f"package xfuser cannot be imported here: {error}; allowed: what it lacks, or without what needs that"
        ) from None


@contextmanager
def _quiet_imports() -> Iterator[None]:
    # On import, xDiT sets its log level to debug unless LOG_LEVEL says otherwise. Errors are still shown.
    # It also calls a collective by the name that torch 2.13 has replaced, and is told so on every rank.
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
    # xDiT asks how torch was built, not what is there: a CUDA build without a GPU would be told to use GPU 0, and NCCL.
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


def start_groups(device: Device, *, replicas: int, cfg: int, ulysses: int, ring: int, timeout_s: float) -> ModuleType:
    """Start torch.distributed, unless the program has, and xDiT's groups; return xfuser.core.distributed.

    A second call replaces xDiT's groups. A process group of the program's own is used, and left as it is.
    """
    load()
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    distributed = importlib.import_module("xfuser.core.distributed")
    with _one_gloo_device():
        _start_world(device, distributed, state, timeout_s)
        if distributed.model_parallel_is_initialized():
            state.destroy_model_parallel()
            state._FS = None  # left behind by destroy_model_parallel, and then refused by initialize_model_parallel
        distributed.initialize_model_parallel(
            data_parallel_degree=replicas,
            classifier_free_guidance_degree=cfg,
            sequence_parallel_degree=ulysses * ring,
            ulysses_degree=ulysses,
            ring_degree=ring,
            use_parallel_vae=True,
            backend="nccl" if device.is_gpu else "gloo",
        )
    _start_runtime_state(replicas=replicas, cfg=cfg, ulysses=ulysses, ring=ring)
    return distributed


def _start_world(device: Device, distributed: Any, state: Any, timeout_s: float) -> None:
    """The group of all ranks: torch.distributed's, the program's or started here, and xDiT's on top of it."""
    if not dist.is_initialized() or dist.group.WORLD is not _ground.group:  # groups of xDiT, if any, went with another one
        for name in _GROUPS:
            setattr(state, name, None)
        _ground.ours = not dist.is_initialized()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.is_gpu else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        if ranks.under_torchrun():
            dist.init_process_group(backend, timeout=timeout)
        else:  # one process without torchrun: no address is needed
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if state._WORLD is None:
        distributed.init_distributed_environment(
            world_size=dist.get_world_size(), rank=dist.get_rank(), local_rank=ranks.local_rank()
        )
    _ground.group = dist.group.WORLD


@contextmanager
def _one_gloo_device() -> Iterator[None]:
    # By default every gloo group opens its own device, whose thread wakes up a hundred times a second. xDiT makes about twenty
    # groups, so two ranks woke two busy cores 4,800 times a second. Groups can share a device, but torch has no option for it.
    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    gloo: Any = c10d.ProcessGroupGloo
    device = gloo.create_default_device()

    class OnOneDevice(gloo):  # a class, because torch asks whether groups are instances of this name
        def __init__(self, store: Any, rank: int, size: int, *, timeout: datetime.timedelta) -> None:
            options = gloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = OnOneDevice
    try:
        yield
    finally:
        c10d.ProcessGroupGloo = gloo


class SequenceGroups(NamedTuple):
    """xDiT's sequence-parallel group, and the process groups in which USP exchanges heads and rotates the ring."""

    coordinator: Any
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup


def sequence_groups() -> SequenceGroups:
    """Return the groups that USP uses now."""
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    process_groups = importlib.import_module("yunchang.globals").PROCESS_GROUP
    return SequenceGroups(state.get_sp_group(), process_groups.ULYSSES_PG, process_groups.RING_PG)


def make_sequence_groups(device: Device, *, ulysses: int, ring: int, rank: int, world: int) -> SequenceGroups:
    """Make another set of groups, of consecutive ranks, and leave those in use alone. Every rank of the world calls it."""
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    globals_: Any = importlib.import_module("yunchang.globals")
    before = globals_.PROCESS_GROUP.ULYSSES_PG, globals_.PROCESS_GROUP.RING_PG
    size = ulysses * ring
    with _one_gloo_device():
        globals_.set_seq_parallel_pg(sp_ulysses_degree=ulysses, sp_ring_degree=ring, rank=rank, world_size=world)
        made = globals_.PROCESS_GROUP.ULYSSES_PG, globals_.PROCESS_GROUP.RING_PG
        globals_.PROCESS_GROUP.ULYSSES_PG, globals_.PROCESS_GROUP.RING_PG = before
        coordinator = state.init_model_parallel_group(
            group_ranks=[list(range(first, first + size)) for first in range(0, world, size)],
            local_rank=ranks.local_rank(),
            backend="nccl" if device.is_gpu else "gloo",
            parallel_mode="sequence",
            ulysses_group=made[0],
            ring_group=made[1],
        )
    return SequenceGroups(coordinator, *made)


@contextmanager
def sequence_over(groups: SequenceGroups) -> Iterator[None]:
    """Make USP use these groups. It takes no argument for them: it reads globals of xDiT and yunchang."""
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    process_groups: Any = importlib.import_module("yunchang.globals").PROCESS_GROUP
    before = state._SP, process_groups.ULYSSES_PG, process_groups.RING_PG
    state._SP, process_groups.ULYSSES_PG, process_groups.RING_PG = groups
    try:
        yield
    finally:
        state._SP, process_groups.ULYSSES_PG, process_groups.RING_PG = before


def _start_runtime_state(*, replicas: int, cfg: int, ulysses: int, ring: int) -> None:
    # USP reads switches from xDiT's runtime state. Without one of xDiT's own pipelines, initialize_runtime_state makes a state
    # for a single rank, and its automatic choice of a backend looks for CUDA libraries. So the state is made here, with a backend
    # that is accepted on every device and mesh; each of our calls names its own.
    runtime: Any = importlib.import_module("xfuser.core.distributed.runtime_state")
    arguments = importlib.import_module("xfuser.config.args").xFuserArgs(
        data_parallel_degree=replicas,
        use_cfg_parallel=cfg == 2,
        ulysses_degree=ulysses,
        ring_degree=ring,
        attention_backend="SDPA_FLASH",
    )
    config, _ = arguments.create_config()
    runtime._RUNTIME = runtime.RuntimeState(config)


def stop_groups() -> None:
    """End xDiT's groups, and torch.distributed if it was started here."""
    if not dist.is_initialized() or dist.group.WORLD is not _ground.group:
        return
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    state.destroy_model_parallel()
    state._FS = None
    state._WORLD.destroy()
    state._WORLD = None
    if _ground.ours:
        dist.destroy_process_group()
    _ground.group = None


def backend_key(name: str) -> Any:
    """Return the key of xDiT's attention registry for one of its backends, by its name in AttentionBackendType."""
    load()
    return importlib.import_module("xfuser.core.distributed.attention_backend").AttentionBackendType[name]


def check_backend(key: str, *, dtype: torch.dtype | None = None, head_dim: int | None = None, ring: int = 1) -> str | None:
    """What a kernel (a key of backends.ATTENTION) lacks on this machine, in one phrase; None if xDiT can run it.

    First what the table says that it needs, then xDiT's own checks, which need no running groups.
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


def attention_function(key: Any) -> Any:
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
