"""Recognises folders that are not a Wan2.2 text-to-video checkpoint in the Diffusers layout, so that errors say what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

HUB_NAME = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
PIPELINE = "WanPipeline"
PIPELINES = {
    "WanImageToVideoPipeline": "an image-to-video model",
    "WanVideoToVideoPipeline": "a video-to-video model",
    "WanVACEPipeline": "a VACE (editing) model",
    "WanAnimatePipeline": "an animation model",
}
# Names on the hub that are easily mistaken for HUB_NAME, and what each of them is.
HUB: Mapping[str, str] = {
    "Wan-AI/Wan2.2-T2V-A14B": "is the original layout on the hub",
    "Wan-AI/Wan2.2-TI2V-5B": "is another model, with one transformer",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "is another model, with one transformer",
    "Wan-AI/Wan2.2-I2V-A14B": "is an image-to-video model",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "is an image-to-video model",
    "Wan-AI/Wan2.1-T2V-14B": "is Wan2.1, with one transformer",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "is Wan2.1, with one transformer",
    "Wan-AI/Wan2.1-T2V-1.3B": "is Wan2.1, with one transformer",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "is Wan2.1, with one transformer",
}


def without_index(folder: Path) -> str:
    """Say what a folder without model_index.json is, and what is allowed instead."""
    names = {one.name for one in folder.iterdir()}
    diffusers = f"allowed: the Diffusers layout, such as {HUB_NAME}"
    if {"high_noise_model", "low_noise_model"} & names:
        return f"is Wan2.2 in its original layout; {diffusers}"
    if "Wan2.2_VAE.pth" in names:
        return f"is Wan2.2-TI2V-5B in its original layout, another model; {diffusers}"
    if "Wan2.1_VAE.pth" in names:
        return f"is Wan2.1 in its original layout, with one transformer; {diffusers}"
    if {"blobs", "snapshots"} <= names:
        snapshots = sorted(one.name for one in (folder / "snapshots").iterdir()) if (folder / "snapshots").is_dir() else []
        newest = snapshots[-1] if snapshots else "REVISION"
        return f"is a repository in Hugging Face's cache; allowed: its folder snapshots/{newest}"
    inside = sorted(one.name for one in folder.iterdir() if (one / "model_index.json").is_file())
    if inside:
        return f"has no model_index.json, but its folder {inside[0]!r} has one; allowed: that folder"
    if "config.json" in names and (folder.parent / "model_index.json").is_file():
        return "is one part of a model; allowed: the folder above it"
    for suffix, what in (
        (".gguf", "GGUF files"),
        (".safetensors", "weights in single files, as for ComfyUI"),
        (".pth", ".pth files"),
    ):
        if any(name.endswith(suffix) for name in names):
            return f"has no model_index.json, only {what}; {diffusers}"
    return "has no model_index.json; allowed: a folder in the Diffusers layout" + (" (it is empty)" if not names else "")


def other_model(index: Mapping[str, object], z_dim: object) -> str | None:
    """Say which other model a model_index.json describes; None if it is Wan2.2 text-to-video. `z_dim` is the VAE's, if any."""
    name = index.get("_class_name")
    needs = f"allowed: a Wan2.2 text-to-video model, such as {HUB_NAME}"
    if name in PIPELINES:
        return f"is {PIPELINES[str(name)]} ({name}); {needs}"
    if name != PIPELINE:
        return f"is a {name}, not a {PIPELINE}; {needs}" if name else f"names no pipeline in model_index.json; {needs}"
    second = index.get("transformer_2")
    if isinstance(second, list) and any(second):
        return None
    if index.get("expand_timesteps") or z_dim == 48:
        return f"is Wan2.2-TI2V-5B or similar: one transformer and a VAE with {z_dim} channels; {needs}, with two experts"
    if second is not None:
        return f"has one transformer, like Wan2.1; {needs}, with two experts"
    return None
