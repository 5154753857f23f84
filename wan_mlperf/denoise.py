"""Latents + embeddings + plan -> latents: the only loop over steps.

Nothing here counts calls or knows ranks: each step of the plan says which expert, kernel and guidance, and `branches` says which
branches of guidance this process computes and how it gets the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from wan_mlperf.experts import Expert
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import Step
from wan_mlperf.text_encoder import Embeds


class Branches(Protocol):
    """Guidance as the mesh computes it."""

    def all_branches(self, own: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's predictions -> (positive, negative) on every rank."""


def denoise(
    latents: torch.Tensor,
    embeds: Sequence[Embeds],
    plan: Sequence[Step],
    experts: Mapping[str, Expert],
    scheduler: Any,
    branches: Branches,
    *,
    spans: Spans,
    on_step: Callable[[Step, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Return the clean latents [B, channels, F, h, w] in fp32.

    `latents` is fp32 noise; `embeds` the branches of guidance that this rank computes, positive before negative; `scheduler` a
    fresh one per query. `on_step` sees each step and the latents after it.
    """
    texts: dict[str, list[Any]] = {}
    for step in plan:
        expert = experts[step.expert]
        with spans("denoise_high" if step.expert == "high_noise" else "denoise_low"):
            if step.expert not in texts:
                texts[step.expert] = [expert.text_keys(one) for one in embeds]
            inputs = latents.to(embeds[0].hidden.dtype)
            own = [expert(inputs, step.timestep, text, step.attention) for text in texts[step.expert]]
            noise, unconditional = branches.all_branches(own)
            noise = unconditional + step.guidance * (noise - unconditional)
            latents = scheduler.step(noise, scheduler.timesteps[step.index], latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents
