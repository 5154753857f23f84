"""Recipe + workload -> what each denoising step does. A pure function, the same on every rank; the loop consumes the plan."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.table import Table

from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Gemm, Recipe, Reuse
from wan_mlperf.workload import Workload

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

ExpertName = Literal["high_noise", "low_noise"]
Layers = tuple[tuple[str, str], ...]

# Wan2.2-T2V-A14B's published scheduler settings, for a plan without its checkpoint (--explain on a laptop).
WAN22_SCHEDULER: Mapping[str, object] = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
    "solver_type": "bh2",
}
MOST_TIMESTEPS = 100_000
# Deterministic solvers of flow matching that diffusers' WanPipeline accepts as well.
SCHEDULERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step. `timestep` is 0 to 1000, `sigma` the noise level 0 to 1 that it starts from.

    `attention` is the kernel of self-attention for both branches of guidance, `gemm` the format of the expert's linear layers.
    `layers` are those of its layers with another format in this step, as (name pattern, format); the first match counts.
    If not `guided`, only the positive branch is computed. `source` is the step whose change this one applies again, times
    `factor`, instead of running the expert. `kept`: a later step will apply this one's change.
    """

    index: int
    timestep: float
    sigma: float
    expert: ExpertName
    guidance: float
    attention: str
    gemm: str
    layers: Layers = ()
    guided: bool = True
    source: int | None = None
    factor: float = 1.0
    kept: bool = False

    @property
    def forwards(self) -> int:
        """How often the expert's blocks run: once per branch, or not at all if an earlier change is applied again."""
        return 0 if self.source is not None else 1 + self.guided


def any_unguided(plan: Sequence[Step]) -> bool:
    """True if any step runs the expert for the positive branch only."""
    return any(not step.guided and step.source is None for step in plan)


def make_scheduler(config: Mapping[str, object], steps: int) -> SchedulerMixin:
    """Return a new scheduler for so many steps. It holds the state of one query.

    Its class is the one that the model names, as in diffusers' own pipeline. Raises BadInput if class or settings do not fit.
    """
    import diffusers  # not above: a plan can be read without torch

    name = str(config.get("_class_name", SCHEDULERS[0]))
    if name not in SCHEDULERS:
        raise BadInput(f"scheduler: {name} is not supported; allowed: a model with {' or '.join(SCHEDULERS)}")
    trained = config.get("num_train_timesteps", 1000)
    if not isinstance(trained, int) or not 1 <= trained <= MOST_TIMESTEPS:
        raise BadInput(f"scheduler: num_train_timesteps is {trained!r}; allowed: 1 to {MOST_TIMESTEPS}")
    random = config.get("stochastic_sampling") or str(config.get("algorithm_type")).startswith("sde")
    if random or not (name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"):
        raise BadInput(f"scheduler: {name} draws noise, or is not for flow prediction; allowed: the settings of a Wan model")
    try:
        scheduler = getattr(diffusers, name).from_config(dict(config))
        with np.errstate(all="ignore"):  # what comes of it is looked at below
            scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
    except (AttributeError, TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError, LookupError) as error:
        raise BadInput(f"scheduler: {name} does not take the model's settings ({' '.join(str(error).split())[:160]})") from None
    sigmas = scheduler.sigmas.numpy()
    if not ((sigmas >= 0) & (sigmas <= 1)).all() or not np.isfinite(scheduler.timesteps.numpy()).all():
        raise BadInput(
            f"scheduler: {name} gives noise levels outside 0 to 1 with the model's settings; allowed: those of a Wan model"
        )
    return scheduler


@functools.lru_cache(maxsize=64)  # it takes as long as a small model's step, and a server makes a plan per request
def _try_steps(settings: str, steps: int) -> None:
    """Take all steps with one value instead of latents. Some settings (JSON) fail, or give NaN, only then. Raises BadInput."""
    import torch

    scheduler: Any = make_scheduler(json.loads(settings), steps)
    name, value = type(scheduler).__name__, torch.ones(1, 1, 1, 1, 1, dtype=torch.float32, device="cpu")
    try:
        for timestep in scheduler.timesteps:
            (value,) = scheduler.step(torch.zeros_like(value), timestep, value, return_dict=False)
    except Exception as error:  # whatever a library makes of settings that it does not expect
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise BadInput(
            f"scheduler: {name} takes no step with the model's settings ({why}); allowed: those of a Wan model"
        ) from None
    if not torch.isfinite(value).all():
        raise BadInput(f"scheduler: {name} makes NaN or infinity with the model's settings; allowed: those of a Wan model")


def make_plan(recipe: Recipe, workload: Workload, scheduler_config: Mapping[str, object] = WAN22_SCHEDULER) -> tuple[Step, ...]:
    """Return one Step per denoising step, first to last. Raises BadInput.

    The expert follows diffusers' WanPipeline: high noise while timestep >= boundary_ratio x num_train_timesteps.
    """
    scheduler = make_scheduler(scheduler_config, workload.steps)
    _try_steps(json.dumps(dict(scheduler_config), sort_keys=True, default=repr), workload.steps)
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
                layers=_layers(recipe.gemm, expert, index),
                guided=recipe.guidance.interval[0] <= sigma <= recipe.guidance.interval[1] and index not in recipe.guidance.off,
            )
        )
    _check_index("guidance.off", recipe.guidance.off, workload.steps)
    _check_index("gemm.keep.steps", [index for rule in recipe.gemm.rules for index in rule.steps or ()], workload.steps)
    return _with_reuse(steps, recipe.reuse)


def _layers(gemm: Gemm, expert: ExpertName, index: int) -> Layers:
    """The rules of `gemm.keep` for one step of an expert."""
    rules = [rule for rule in gemm.rules if rule.expert in (None, expert)]
    return tuple((one.layers, one.format) for one in rules if one.steps is None or one.steps[0] <= index <= one.steps[1])


def layers_of(plan: Sequence[Step], expert: str) -> tuple[Layers, ...]:
    """The different `layers` that the steps of an expert have, at least one."""
    return tuple(dict.fromkeys(step.layers for step in plan if step.expert == expert)) or ((),)


def _check_index(key: str, indices: Sequence[int], steps: int) -> None:
    for index in indices:
        if index >= steps:
            raise BadInput(f"{key}: {index} is not a step; allowed: 0 to {steps - 1}")


def _with_reuse(steps: Sequence[Step], reuse: Reuse) -> tuple[Step, ...]:
    """Mark the steps that apply an earlier step's change again, and the steps whose change they apply."""
    _check_index("reuse.steps", reuse.steps, len(steps))
    factors = dict(zip(reuse.steps, reuse.factors or (1.0,) * len(reuse.steps), strict=True))
    plan = list(steps)
    last: Step | None = None  # computed
    for index, step in enumerate(plan):
        if index not in factors:
            last = step
            continue
        if last is None or last.expert != step.expert:
            first = "the first step" if last is None else f"the first of the {step.expert.replace('_', '-')} expert"
            raise BadInput(f"reuse.steps: {index} is {first}, which has no change to apply again; allowed: later steps")
        if step.guided and not last.guided:
            raise BadInput(
                f"reuse.steps: step {index} is guided, but step {last.index}, whose change it would apply, has no negative "
                "branch; allowed: a step after a guided one, or the same step in guidance.off"
            )
        plan[index] = dataclasses.replace(step, source=last.index, factor=factors[index])
        plan[last.index] = dataclasses.replace(plan[last.index], kept=True)
    return tuple(plan)


def _attention(recipe: Recipe, steps: int) -> Sequence[str]:
    chosen = recipe.attention
    if chosen.steps is not None:
        if len(chosen.steps) != steps:
            raise BadInput(f"attention.steps: has {len(chosen.steps)} entries; allowed: one per step, {steps}")
        return chosen.steps
    early = round(chosen.early_fraction * steps)
    return [chosen.early] * early + [chosen.late] * (steps - early)


def as_table(plan: Sequence[Step], *, title: str = "step plan", kernels: Mapping[str, str] | None = None) -> Table:
    """Return the plan as a table for a terminal. `kernels` says what an attention or GEMM name is on a device."""
    kernels, caption = kernels or {}, None
    if (forwards := sum(step.forwards for step in plan)) < 2 * len(plan):
        caption = f"{forwards} forward passes instead of {2 * len(plan)}: {1 - forwards / (2 * len(plan)):.0%} saved"
    table = Table(title=title, caption=caption)
    for heading in ("step", "timestep", "sigma", "expert", "guidance", "attention", "GEMM", "computed"):
        table.add_column(heading, justify="left" if heading in ("expert", "attention", "GEMM", "computed") else "right")
    for step in plan:
        table.add_row(
            str(step.index),
            f"{step.timestep:g}",
            f"{step.sigma:.4f}",
            step.expert.replace("_", " "),
            f"{step.guidance:g}" if step.guided else "off",
            *(
                (_with(step.attention, kernels), _formats(step, kernels), "yes")
                if step.source is None
                else ("-", "-", _again(step))
            ),
        )
    return table


def _again(step: Step) -> str:
    return f"step {step.source} again" + (f" x {step.factor:g}" if step.factor != 1.0 else "")


def _formats(step: Step, kernels: Mapping[str, str]) -> str:
    return "; ".join([_with(step.gemm, kernels), *(f"{pattern}: {_with(name, kernels)}" for pattern, name in step.layers)])


def _with(name: str, kernels: Mapping[str, str]) -> str:
    return f"{name} ({kernels[name] or 'nothing'})" if name in kernels else name
