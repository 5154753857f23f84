"""Latents + prompt + plan -> latents: the only loop over steps.

Nothing here counts calls or knows ranks: each step of the plan says which expert, kernel and guidance, and whether it computes or
applies an earlier change again; `branches` says how this process gets the branch of guidance that it does not compute.

Shapes: B batch, T video tokens (of this rank), C channels of the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from diffusers import UniPCMultistepScheduler

from wan_mlperf.experts import Expert, TextKeys
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import Step
from wan_mlperf.text_encoder import Embeds


class Branches(Protocol):
    """Guidance as the mesh computes it."""

    def all_branches(self, own: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's predictions -> (positive, negative) on every rank."""


class Prompt(NamedTuple):
    """A query's text on this rank: the branches of guidance that it computes, positive before negative.

    `positive` is what it computes in a step without guidance; under CFG parallelism half of the ranks need it for that only.
    """

    branches: Sequence[Embeds]
    positive: Embeds


class Kept(NamedTuple):
    """What the blocks changed in the last computed step: [B, T, C] per branch; `guided` says which branches, on which ranks."""

    changes: Sequence[torch.Tensor]
    guided: bool


def denoise(
    latents: torch.Tensor,
    prompt: Prompt,
    plan: Sequence[Step],
    experts: Mapping[str, Expert],
    scheduler: UniPCMultistepScheduler,
    branches: Branches,
    *,
    spans: Spans,
    on_step: Callable[[Step, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Return the clean latents [B, channels, F, h, w] in fp32.

    `latents` is fp32 noise; `scheduler` a fresh one per query. `on_step` sees each step and the latents after it.
    """
    texts: dict[tuple[str, int], list[TextKeys]] = {}
    kept: Kept | None = None
    for step in plan:
        expert = experts[step.expert]
        with spans("denoise_high" if step.expert == "high_noise" else "denoise_low"):
            inputs = latents.to(prompt.positive.hidden.dtype)
            if step.source is None:
                own, kept = _compute(step, expert, inputs, prompt, texts)
                guided = step.guided
            else:
                assert kept is not None, "the plan's own check"
                own, guided = _apply_again(step, expert, inputs, kept), kept.guided
            noise = own[0]
            if guided:
                noise, unconditional = branches.all_branches(own)
                if step.guided:
                    noise = unconditional + step.guidance * (noise - unconditional)
            latents = scheduler.step(noise, scheduler.timesteps[step.index], latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents


def _compute(
    step: Step, expert: Expert, inputs: torch.Tensor, prompt: Prompt, texts: dict[tuple[str, int], list[TextKeys]]
) -> tuple[list[torch.Tensor], Kept | None]:
    """Run the expert: this rank's predictions, and the change of its blocks if a later step takes it."""
    split = expert.split if step.guided else expert.unguided_split
    tokens = expert.embed(inputs, split)
    own, changes = [], []
    for embeds in prompt.branches if step.guided else [prompt.positive]:
        key = step.expert, id(embeds)  # the text's keys and values are computed once per query
        if key not in texts:
            texts[key] = expert.text_keys(embeds)
        after = expert.run_blocks(tokens, inputs, step.timestep, texts[key], step.attention, split)
        if step.kept:
            changes.append(after - tokens)
        own.append(expert.predict(after, inputs, step.timestep, split))
    return own, Kept(changes, step.guided) if step.kept else None


def _apply_again(step: Step, expert: Expert, inputs: torch.Tensor, kept: Kept) -> list[torch.Tensor]:
    """This rank's predictions from an earlier step's change, without running the blocks."""
    split = expert.split if kept.guided else expert.unguided_split
    tokens = expert.embed(inputs, split)
    return [expert.predict(tokens + step.factor * change, inputs, step.timestep, split) for change in kept.changes]
