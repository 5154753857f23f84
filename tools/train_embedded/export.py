"""The fifth stage: a folder in the Diffusers layout that `WanPipeline.from_pretrained` loads, weights in bf16."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from wan_mlperf.bench.random_checkpoint import MODEL_INDEX


def _halve(model: nn.Module) -> None:
    """Convert to contiguous bf16 in place. diffusers' own `to` would keep some layers in float32."""
    for tensor in model.parameters():
        tensor.data = tensor.data.to("cpu", torch.bfloat16).contiguous()


def export(
    folder: Path,
    tokenizer: Path,
    text: UMT5EncoderModel,
    vae: AutoencoderKLWan,
    statistics: tuple[Tensor, Tensor],
    high: WanTransformer3DModel,
    low: WanTransformer3DModel,
) -> None:
    """Write all parts next to `folder`, then replace it with them. The models are bf16 afterwards."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(tokenizer, new / "tokenizer")
    mean, std = statistics
    vae.register_to_config(latents_mean=[round(float(x), 6) for x in mean], latents_std=[round(float(x), 6) for x in std])
    for name, model in (("text_encoder", text), ("vae", vae), ("transformer", high), ("transformer_2", low)):
        _halve(model)
        model.save_pretrained(new / name)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(new / "scheduler")
    (new / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", encoding="utf-8")
    for weights in new.glob("*/*.safetensors"):
        weights.chmod(0o644)  # save_pretrained makes them readable by their owner only
    if folder.exists():
        if (folder / "README.md").exists():
            shutil.copy(folder / "README.md", new / "README.md")
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
