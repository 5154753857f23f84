"""The last stage: what plain diffusers generates with the exported folder, for prompts that training has not seen.

Shapes: N videos, F frames, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from wan_mlperf.shapes.clips import FRAMES, SIZE, Scene, draw, held_out_prompts, place
from wan_mlperf.shapes.detect import score, steadiness
from wan_mlperf.workload import NEGATIVE_PROMPT


def generate(
    pipeline: WanPipeline, prompts: list[str], seed: int = 42, batch: int = 16, negative: str = NEGATIVE_PROMPT, steps: int = 20
) -> NDArray[np.uint8]:
    """Generate the videos of the prompts, uint8 [N, F, H, W, 3]. Video i starts from seed + i."""
    videos = []
    for begin in range(0, len(prompts), batch):
        part = prompts[begin : begin + batch]
        out = pipeline(
            part,
            [negative] * len(part),
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            max_sequence_length=512,
            generator=[torch.Generator().manual_seed(seed + begin + i) for i in range(len(part))],
            output_type="np",
        )
        videos.append((np.asarray(out.frames) * 255).astype(np.uint8))
    return np.concatenate(videos)


def reconstruct(pipeline: WanPipeline, clips: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode and decode the clips: uint8 [N, F, H, W, 3]."""
    out = []
    for clip in clips:
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = pipeline.vae.encode(video.to(pipeline.vae.dtype)).latent_dist.mode()
            decoded = pipeline.vae.decode(latents).sample.float()
        out.append(((decoded[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).numpy().astype(np.uint8))
    return np.stack(out)


def evaluate(folder: Path, count: int = 126, seed: int = 42) -> dict[str, dict[str, float]]:
    """Return the fractions right for drawn clips, their reconstructions, videos of held-out prompts, and those against shuffled
    prompts; for all but the last also how steady the outlines are.
    """
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pairs = held_out_prompts()[:count]
    scenes: list[Scene] = [scene for _, scene in pairs]
    generator = np.random.default_rng(seed)
    drawn = np.stack([draw(scene, place(scene, generator)) for scene in scenes])
    rebuilt = reconstruct(pipeline, drawn)
    psnr = [-10 * np.log10(np.square((a - b.astype(np.float64)) / 255).mean()) for a, b in zip(rebuilt, drawn, strict=True)]
    videos = generate(pipeline, [prompt for prompt, _ in pairs], seed)
    shuffled = [scenes[i] for i in generator.permutation(len(scenes))]
    return {
        "drawn": score(drawn, scenes) | steady(drawn),
        "reconstructed": score(rebuilt, scenes)
        | steady(rebuilt)
        | {"psnr_mean": float(np.mean(psnr)), "psnr_worst": float(np.min(psnr))},
        "videos": score(videos, scenes) | steady(videos),
        "shuffled": score(videos, shuffled),
    }


def steady(videos: NDArray[np.uint8]) -> dict[str, float]:
    """Return the mean steadiness of the videos' outlines."""
    return {"steadiness": float(np.mean([steadiness(video) for video in videos]))}
