"""One contestant of `bench speed`. It loads once, then makes and times one video per line that its first rank reads.

Started by speed.py: `python -m wan_mlperf.bench.contestant JOB.json`, alone (diffusers) or under torchrun (xDiT, ours).
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan_mlperf import ranks
from wan_mlperf.kernels.device import Device, probe
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.recipe import Recipe, parse
from wan_mlperf.workload import Workload

if TYPE_CHECKING:
    from diffusers import WanPipeline

MARK = "contestant: "
# Prompt -> (stage -> seconds, final latents or None). Makes one video, up to frames in host memory.
Run = Callable[[str], "tuple[dict[str, float], torch.Tensor | None]"]


def main() -> None:
    """Make a video for each line of standard input; a line is a prompt."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recipe = parse(job["recipe"], source="bench")
    run = BUILDERS[job["kind"]](recipe, recipe.effective_workload, Path(job["folder"]))
    world = ranks.world_size()
    first = ranks.is_first()
    if first:
        print(f"{MARK}{json.dumps({'ready': True})}", flush=True)
    while True:
        line = sys.stdin.readline().rstrip("\n") if first else ""
        line = meshes.send_to_all(line) if world > 1 else line
        if not line:
            return
        start = time.perf_counter()
        stages, latents = run(line)
        seconds = time.perf_counter() - start
        if first:
            if latents is not None:
                torch.save(latents.cpu(), job["latents"])
            print(f"{MARK}{json.dumps({'seconds': seconds, 'stages': stages})}", flush=True)


def ours(recipe: Recipe, workload: Workload, _folder: Path) -> Run:
    """Load and warm up our pipeline; return how to run it."""
    from wan_mlperf.pipeline import Pipeline
    from wan_mlperf.preflight import prepare

    pipeline = Pipeline.load(prepare(recipe, workload=workload))
    pipeline.warm_up(1)

    def run(prompt: str) -> tuple[dict[str, float], torch.Tensor | None]:
        kept: list[torch.Tensor] = []
        for _ in pipeline.stream_batch([prompt], on_step=lambda _step, latents: kept.__setitem__(slice(None), [latents])):
            pass
        return pipeline.spans.take(), kept[0]

    return run


def diffusers(recipe: Recipe, workload: Workload, folder: Path) -> Run:
    """Load diffusers' pipeline, in one process with all of the machine's threads; return how to run it."""
    from diffusers import WanPipeline

    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.model.dtype]
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype={"default": dtype, "vae": torch.float32})
    return timed(pipeline.to(probe().torch), workload, probe())


def xdit(recipe: Recipe, workload: Workload, folder: Path) -> Run:
    """Load plain xDiT over all ranks; return how to run it."""
    from wan_mlperf.parallel import plain_xdit

    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.model.dtype]
    return timed(plain_xdit.load(folder, probe(), dtype), workload, probe())


def timed(pipeline: WanPipeline, workload: Workload, device: Device) -> Run:
    """Warm up a WanPipeline and return how to run it with our workload. Hooks on its parts time the stages."""
    pipeline.set_progress_bar_config(disable=True)
    stages: dict[str, float] = defaultdict(float)
    for stage, module in (
        ("text_encode", pipeline.text_encoder),
        ("denoise_high", pipeline.transformer),
        ("denoise_low", pipeline.transformer_2),
        ("vae_decode", pipeline.vae.decoder),
    ):
        began: list[float] = []

        def before(*_: object, began: list[float] = began) -> None:
            _synchronise(device)
            began.append(time.perf_counter())

        def after(*_: object, began: list[float] = began, stage: str = stage) -> None:
            _synchronise(device)
            stages[stage] += time.perf_counter() - began.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def run(prompt: str) -> tuple[dict[str, float], torch.Tensor | None]:
        stages.clear()
        kept: list[torch.Tensor] = []

        def keep(
            _pipeline: WanPipeline, step: int, _timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
        ) -> dict[str, torch.Tensor]:
            kept[:] = [tensors["latents"]]
            return {}

        video = pipeline(
            prompt=prompt,
            negative_prompt=workload.negative_prompt,
            height=workload.height,
            width=workload.width,
            num_frames=workload.frames,
            num_inference_steps=workload.steps,
            guidance_scale=workload.guidance_high,
            guidance_scale_2=workload.guidance_low,
            generator=torch.Generator().manual_seed(workload.seed),
            callback_on_step_end=keep,
            output_type="np",
        ).frames[0]
        (video * 255).astype("uint8")  # what ours delivers
        return dict(stages), kept[0]

    run("warm-up")
    return run


def _synchronise(device: Device) -> None:
    if device.is_gpu:
        torch.cuda.synchronize(device.torch)


BUILDERS: dict[str, Callable[[Recipe, Workload, Path], Run]] = {"ours": ours, "diffusers": diffusers, "xdit": xdit}


if __name__ == "__main__":
    main()
