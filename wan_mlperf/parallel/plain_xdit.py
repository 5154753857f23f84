"""Plain xDiT, which `bench speed` compares with: its Wan wrapper, Ulysses over all ranks, one branch of guidance after the other,
and DistVAE's decode after the last step. None of our own forward pass, reuse, mesh or streaming.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from wan_mlperf import ranks
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import mesh as meshes


def load(folder: Path, device: Device, dtype: torch.dtype) -> WanPipeline:
    """Return diffusers' WanPipeline with xDiT's transformers and a decoder sharded over all ranks; every rank calls it."""
    world = ranks.world_size()
    shape = meshes.Shape(replicas=1, cfg=1, ulysses=world, ring=1)
    meshes.start(shape, device)
    wrapper = importlib.import_module("xfuser.model_executor.models.transformers.transformer_wan").xFuserWanTransformer3DWrapper
    transformers = {
        part: wrapper.from_pretrained(folder, subfolder=part, torch_dtype=dtype).to(device.torch)
        for part in ("transformer", "transformer_2")
    }
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype={"default": dtype, "vae": torch.float32}, **transformers)
    pipeline.to(device.torch)
    if world > 1:
        group = importlib.import_module("xfuser.core.distributed").get_vae_parallel_group().device_group
        importlib.import_module("distvae.vae").parallelize_decoder(pipeline.vae, group)
    # The runtime state of xDiT's pipelines, in which the wrapper counts its calls.
    arguments = importlib.import_module("xfuser.config.args").xFuserArgs(
        ulysses_degree=world, attention_backend=xdit_backend(device, dtype)
    )
    runtime: Any = importlib.import_module("xfuser.core.distributed.runtime_state")
    config, _ = arguments.create_config()
    runtime._RUNTIME = None
    runtime.initialize_runtime_state(pipeline, config)
    return pipeline


def xdit_backend(device: Device, dtype: torch.dtype) -> str | None:
    """The attention of plain xDiT: on a GPU in 16 bits what it chooses itself (None), else PyTorch's, which takes fp32."""
    return None if device.is_gpu and dtype in (torch.bfloat16, torch.float16) else "SDPA"
