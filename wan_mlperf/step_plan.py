"""recipe + workload -> what each denoising step does. Pure, on the CPU, the same on every rank; the loop only consumes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import UniPCMultistepScheduler
from rich.table import Table

from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Recipe
from wan_mlperf.workload import Workload

ExpertName = Literal["high_noise", "low_noise"]

# Wan2.2-T2V-A14B's published scheduler settings, for a plan without the checkpoint at hand (--explain on a laptop).
WAN22_SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
    "solver_type": "bh2",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step. `timestep` is 0 to 1000, `sigma` the noise level 0 to 1 that it starts from.

    `attention` is the kernel of self-attention for both branches of guidance, `gemm` the format of the expert's linear layers.
    """

    index: int
    timestep: float
    sigma: float
    expert: ExpertName
    guidance: float
    attention: str
    gemm: str


def make_scheduler(config: Mapping[str, Any], workload: Workload) -> UniPCMultistepScheduler:
    """Return a fresh scheduler set to the workload's steps; it holds the state of one query."""
    scheduler = UniPCMultistepScheduler.from_config(dict(config))
    scheduler.set_timesteps(workload.steps)
    scheduler.set_begin_index(0)
    return scheduler


def make_plan(recipe: Recipe, workload: Workload, scheduler_config: Mapping[str, Any] = WAN22_SCHEDULER) -> tuple[Step, ...]:
    """Return one Step per denoising step, first to last.

    The expert follows diffusers' WanPipeline: high noise while timestep >= boundary_ratio x num_train_timesteps.
    """
    scheduler = make_scheduler(scheduler_config, workload)
    boundary = workload.boundary_ratio * scheduler.config.num_train_timesteps
    attention = _attention(recipe, workload.steps)
    steps = []
    for index, (timestep, sigma) in enumerate(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False)):
        expert: ExpertName = "high_noise" if timestep >= boundary else "low_noise"
        steps.append(
            Step(
                index=index,
                timestep=timestep,
                sigma=sigma,
                expert=expert,
                guidance=workload.guidance_high if expert == "high_noise" else workload.guidance_low,
                attention=attention[index],
                gemm=recipe.gemm.high_noise if expert == "high_noise" else recipe.gemm.low_noise,
            )
        )
    return tuple(steps)


def _attention(recipe: Recipe, steps: int) -> Sequence[str]:
    chosen = recipe.attention
    if chosen.steps is not None:
        if len(chosen.steps) != steps:
            raise BadInput(f"attention.steps: has {len(chosen.steps)} entries; allowed: one per step, {steps}")
        return chosen.steps
    early = round(chosen.early_fraction * steps)
    return [chosen.early] * early + [chosen.late] * (steps - early)


def as_table(plan: Sequence[Step], *, title: str = "step plan") -> Table:
    """Return the plan as a table for a terminal."""
    table = Table(title=title)
    for heading in ("step", "timestep", "sigma", "expert", "guidance", "attention", "GEMM"):
        table.add_column(heading, justify="left" if heading in ("expert", "attention", "GEMM") else "right")
    for step in plan:
        table.add_row(
            str(step.index),
            f"{step.timestep:g}",
            f"{step.sigma:.4f}",
            step.expert.replace("_", " "),
            f"{step.guidance:g}",
            step.attention,
            step.gemm,
        )
    return table
