"""Everything that is refused before a weight is read: recipe, workload, checkpoint, plan and mesh, checked once per process.

What is installed for the kernels is checked in the ranks (`resolve_kernels`) before they read a weight, because that imports it.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from wan_mlperf import checkpoint as checkpoints
from wan_mlperf import ranks
from wan_mlperf.checkpoint import Checkpoint
from wan_mlperf.errors import BadInput
from wan_mlperf.inputs import text
from wan_mlperf.inputs.paths import expand
from wan_mlperf.kernels import attention, device, e4m3, gemm, probe
from wan_mlperf.kernels.sage import MX_BLOCK
from wan_mlperf.parallel import interleave, split_experts, xdit
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.recipe import Recipe, load_recipe
from wan_mlperf.step_plan import WAN22_SCHEDULER, Step, any_unguided, make_plan
from wan_mlperf.text_encoder import check_prompt
from wan_mlperf.workload import Workload

EXPERTS = {"transformer": "high_noise", "transformer_2": "low_noise"}
# A word in "architecture card" -> recipes for SingleStream and Offline; the first that fits.
RECIPES = {
    "none": ("tiny", "tiny-offline"),
    "MI350X": ("mi350x-singlestream", "mi350x-offline"),
    "gfx": ("mi355x-singlestream", "mi355x-offline"),
    " H200": ("h200", "h200-offline"),  # not a GH200, which may have 96 GB
    "sm10": ("b200", "b200-offline"),  # 100 and 103: xDiT has no FP8 attention for them
    "": ("h100", "h100-offline"),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What preflight found out. `shape` is the mesh for the current ranks, or for those that will be started.

    `rehearsed_ranks`: with `exchange: fp8`, a rank that has all tokens rounds as if this many ranks had exchanged them.
    """

    recipe: Recipe
    workload: Workload
    checkpoint: Checkpoint
    plan: tuple[Step, ...]
    shape: meshes.Shape
    rehearsed_ranks: int = 1


@device.alone()
def prepare(
    recipe: Recipe,
    *,
    workload: Workload | None = None,
    prompts: Sequence[str] = (),
    world: int | None = None,
    verified: Checkpoint | None = None,
) -> Setup:
    """Check everything that can be checked before weights are read. Raises BadInput.

    `workload` replaces the recipe's, for another size or length. `world` is the number of ranks, by default the current ones.
    `verified` is a checkpoint that this process has already verified; it is not verified again if the recipe names it.
    """
    workload = workload or recipe.effective_workload
    if verified is None and not checkpoints.is_here(recipe.model.checkpoint):  # before 126 GB are fetched
        _check_kernels(recipe, make_plan(recipe, workload))
    found = verified if verified and verified.name == recipe.model.checkpoint else checkpoints.find(recipe.model.checkpoint)
    plan = make_plan(recipe, workload, found.config("scheduler"))
    shape = _fit_mesh(recipe, workload, found, world=ranks.world_size() if world is None else world)
    split_experts.check(shape, tokens=_tokens(workload, found), heads=found.heads, unguided=any_unguided(plan))
    interleave.chosen(recipe.mesh, shape, device.probe())
    _check_kernels(recipe, plan)
    _check_experts(recipe, workload, found, plan)
    if recipe.model.fixed_latent is not None:
        read_fixed_latent(recipe.model.fixed_latent, workload.latent_shape(found.config("transformer")["in_channels"]))
    tokenizer = found.load_tokenizer()
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(tokenizer, prompt, what=f"prompt {number}" if len(prompts) > 1 else "prompt")
    check_prompt(tokenizer, workload.negative_prompt, what="negative prompt", may_be_empty=True)
    return Setup(recipe=recipe, workload=workload, checkpoint=found, plan=plan, shape=shape)


def _check_kernels(recipe: Recipe, plan: Sequence[Step]) -> None:
    """Raise BadInput if this device cannot run what the recipe names."""
    here = device.probe()
    low = sorted({step.attention for step in plan} - {"sdpa"}) + sorted(set(gemm.names(recipe.gemm)) - {"bf16"})
    if low and recipe.stands_for is None and checkpoints.expert_dtype(recipe.model.dtype) == torch.float32:
        raise BadInput(
            f"model.dtype {recipe.model.dtype!r}: computes in fp32, and {', '.join(low)} take 16 bits; "
            "allowed: bfloat16, or attention sdpa and gemm bf16"
        )
    attention.check([step.attention for step in plan], here, references=recipe.stands_for, smooth_k=recipe.attention.smooth_k)
    gemm.check(recipe.gemm, here, allow_reference=recipe.stands_for is not None)
    if recipe.exchange == "fp8" and (problem := e4m3.missing(here.arch, compiled=recipe.compile.experts)):
        raise BadInput(f"exchange 'fp8': cannot run on {here.arch} ({problem}); allowed: bf16, or compile.experts false")


def _check_experts(recipe: Recipe, workload: Workload, found: Checkpoint, plan: Sequence[Step]) -> None:
    """Raise BadInput for what the experts' own sizes do not allow."""
    for part in EXPERTS:
        config = found.config(part)
        longest = max(length // side for length, side in zip(workload.latent_shape(0)[1:], config["patch_size"], strict=True))
        if config["rope_max_seq_len"] < longest:
            raise BadInput(
                f"{part}: rope_max_seq_len is {config['rope_max_seq_len']}; allowed: at least {longest}, for a video of this size"
            )
        low = sorted({step.attention for step in plan} - {"sdpa"})
        if low and config["attention_head_dim"] % MX_BLOCK:
            raise BadInput(
                f"{part}: attention_head_dim is {config['attention_head_dim']}; allowed with attention {', '.join(low)}: "
                f"a multiple of {MX_BLOCK}"
            )
    for rule in recipe.gemm.rules:
        parts = [part for part, expert in EXPERTS.items() if rule.expert in (None, expert)]
        names = [name for part in parts for name in gemm.linear_names(found.config(part)["num_layers"])]
        if not fnmatch.filter(names, rule.layers):
            raise BadInput(
                f"gemm.keep: no layer's name matches {rule.layers!r}; allowed: a pattern for names such as "
                f"{names[0]} or {names[-1]}"
            )


def change(setup: Setup, workload: Workload) -> Setup:
    """Check another workload for a pipeline loaded from `setup`: same weights, groups and kernels. Raises BadInput."""
    found, ranks_of_one = setup.checkpoint, setup.shape.per_replica
    plan = make_plan(setup.recipe, workload, found.config("scheduler"))
    split_experts.check(setup.shape, tokens=_tokens(workload, found), heads=found.heads, unguided=any_unguided(plan))
    if min(workload.latent_shape(0)[2:]) < ranks_of_one:
        size = f"{workload.height}x{workload.width}"
        raise BadInput(f"size: {size} has too few latent rows for {ranks_of_one} ranks; allowed: a larger one")
    unknown = {step.attention for step in plan} - {step.attention for step in setup.plan}
    if unknown:
        raise BadInput(f"steps: {workload.steps} would need attention {', '.join(sorted(unknown))}, which is not loaded")
    if any_unguided(plan) and not any_unguided(setup.plan):
        raise BadInput(f"steps: {workload.steps} would leave guidance out of some, for which no groups were started")
    return replace(setup, workload=workload, plan=plan)


def resolve_kernels(setup: Setup, here: device.Device) -> tuple[dict[str, attention.Kernel], gemm.Backends]:
    """Return the kernel behind each attention name and each linear-layer format on this device. Raises BadInput.

    Every package, function and argument is inspected, and xDiT's own checks are called.
    """
    recipe, config = setup.recipe, setup.checkpoint.config("transformer")
    dtype = checkpoints.expert_dtype(recipe.model.dtype)
    kernels = attention.resolve(
        [step.attention for step in setup.plan],
        here,
        references=recipe.stands_for,
        probe=partial(xdit.check_backend, dtype=dtype, head_dim=config["attention_head_dim"], ring=setup.shape.ring),
        smooth_k=recipe.attention.smooth_k,
        ring=setup.shape.ring,
        exact=recipe.exact,
        cross=recipe.attention.cross,
        trim_text=recipe.trim_text,
    )
    allowed = recipe.stands_for is not None
    return kernels, gemm.resolve(recipe.gemm, here, allow_reference=allowed, probe=partial(probe.missing_gemm, dtype=dtype))


def ranks_for(recipe: Recipe) -> int:
    """Return how many ranks there are, or outside torchrun, how many will be started. Raises BadInput for too few GPUs."""
    world = ranks.world_size() if ranks.under_torchrun() else meshes.ranks_to_start(recipe.mesh)
    meshes.refuse_shared_gpus(world)
    return world


def recipe_from(options: argparse.Namespace, *, scenario: str = "singlestream") -> Recipe:
    """Load the recipe that a command's flags name (`cli.add_recipe_arguments`). Raises BadInput."""
    name = default_recipe(scenario) if options.recipe is None else options.recipe
    return load_recipe(name, overrides=options.set, model=options.model, exact=options.exact)


def default_recipe(scenario: str) -> str:
    """Name the recipe for this device and scenario: one replica answers single queries, Offline has as many as fit."""
    card = "none" if not device.gpu_count() else f"{device.probe().arch} {device.probe().name}"
    names = next(names for word, names in RECIPES.items() if word in card)
    return names[0] if scenario == "singlestream" else names[1]


def read_fixed_latent(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read MLCommons' fixed_latent.pt; `shape` is without the batch. Raises BadInput."""
    try:
        latent = torch.load(expand(path, what="model.fixed_latent"), map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadInput(f"model.fixed_latent {path!r}: cannot be read ({type(error).__name__}); allowed: a tensor file") from None
    if not isinstance(latent, torch.Tensor) or tuple(latent.shape) != (1, *shape):
        raise BadInput(f"model.fixed_latent {path!r}: holds {getattr(latent, 'shape', type(latent))}; allowed: {(1, *shape)}")
    if not torch.isfinite(latent).all():
        raise BadInput(f"model.fixed_latent {path!r}: holds NaN or infinity; allowed: finite noise")
    return latent.float()


def _fit_mesh(recipe: Recipe, workload: Workload, found: Checkpoint, *, world: int) -> meshes.Shape:
    _, _, rows, columns = workload.latent_shape(0)
    shape = meshes.plan_shape(
        recipe.mesh, world=world, heads=found.heads, latent_rows=max(rows, columns), fabric=device.probe().fabric
    )
    if recipe.compile.decoder and shape.per_replica > 1 and not device.gpu_count():
        # The compiler calls PyTorch's own convolutions, which unfold a band (kernels/vae.py): 0.86 s on two ranks, not 0.2.
        raise BadInput(
            f"compile.decoder: true without a GPU on {shape.per_replica} ranks is slower; allowed: false, or one rank per replica"
        )
    return shape


def _tokens(workload: Workload, found: Checkpoint) -> int:
    patch = found.config("transformer")["patch_size"]
    tokens = 1
    for length, side in zip(workload.latent_shape(0)[1:], patch, strict=True):
        tokens *= length // side
    return tokens


def scheduler_of(name: str) -> tuple[dict[str, Any], str]:
    """Return a model's scheduler settings, and where they come from: Wan2.2's published ones if the model is not here yet."""
    if not checkpoints.is_here(name):
        file = try_to_load_from_cache(checkpoints.HUB_NAME, "scheduler/scheduler_config.json", revision=checkpoints.HUB_REVISION)
        if not isinstance(file, str):
            return {"_class_name": "UniPCMultistepScheduler", **WAN22_SCHEDULER}, f"{checkpoints.HUB_NAME} as published"
        return text.read_json(file, what="scheduler", allowed="a whole model"), name
    return checkpoints.find(name).config("scheduler"), name
