"""Latents + prompt + plan -> latents: the only loop over steps.

Nothing here counts calls or knows ranks. Each step of the plan says which expert, kernel and guidance it uses, and whether it
computes or applies an earlier change again. `branches` fetches the branch of guidance that this process does not compute.

Shapes: B batch, T video tokens (of this rank), C channels of the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import UniPCMultistepScheduler
from torch.overrides import TorchFunctionMode

from wan_mlperf.experts import Expert, TextKeys
from wan_mlperf.kernels import padding
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import Layers, Step
from wan_mlperf.text_encoder import Embeds


class Branches(Protocol):
    """How the mesh brings both branches of guidance together."""

    def all_branches(self, own: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's predictions -> (positive, negative) on every rank."""


class Prompt(NamedTuple):
    """A query's text on this rank: the branches of guidance that this rank computes, positive before negative.

    `positive` is what it computes in a step without guidance. With CFG parallelism, half of the ranks need it only for that.
    """

    branches: Sequence[Embeds]
    positive: Embeds


class Kept(NamedTuple):
    """What the blocks changed in the last computed step, [B, T, C] per branch, and whether that step was `guided`."""

    changes: Sequence[torch.Tensor]
    guided: bool


KeysOfTexts = dict[tuple[str, Layers, int], list[TextKeys]]  # the text's keys and values by expert, formats and embeddings


class Start(NamedTuple):
    """A place in the plan: the latents before step `step`, and the scheduler with what it remembers of the steps before."""

    step: int
    latents: torch.Tensor
    scheduler: UniPCMultistepScheduler


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

    `latents` is fp32 noise. `scheduler` is a new one for each query. `on_step` gets each step and the latents after it.
    """
    texts: KeysOfTexts = {}
    kept: Kept | None = None
    if isinstance(scheduler, UniPCMultistepScheduler):
        # It keeps its noise levels on the CPU and copies some to the device in each step, which waits for the device each time.
        scheduler.sigmas = scheduler.sigmas.to(latents.device)
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
            with _SolvesUnchecked():
                latents = scheduler.step(noise, scheduler.timesteps[step.index], latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents


class _SolvesUnchecked(TorchFunctionMode):
    """UniPC solves two equations per step. `torch.linalg.solve` waits for the device, to raise if they have no solution."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def _compute(
    step: Step, expert: Expert, inputs: torch.Tensor, prompt: Prompt, texts: KeysOfTexts
) -> tuple[list[torch.Tensor], Kept | None]:
    """Run the expert. Returns this rank's predictions, and what its blocks changed if a later step applies it again."""
    split = expert.split if step.guided else expert.unguided_split
    expert.select(step.layers)
    tokens = expert.embed(inputs, split)
    wanted = []
    for embeds in prompt.branches if step.guided else [prompt.positive]:
        key = step.expert, step.layers, id(embeds)  # computed once per query
        if key not in texts:
            texts[key] = expert.text_keys(embeds)
        wanted.append(texts[key])
    after = expert.run_branches(tokens, inputs, step.timestep, wanted, step.attention, split)
    own = [expert.predict(one, inputs, step.timestep, split) for one in after]
    return own, Kept([one - tokens for one in after], step.guided) if step.kept else None


def warm_lengths(
    plan: Sequence[Step], experts: Mapping[str, Expert], latents: torch.Tensor, hidden: torch.Tensor, branches: int
) -> None:
    """Run one block with each length that a text is rounded up to, so that no query has to plan or compile kernels.

    `latents` and the text encoder's output `hidden` have a query's shapes; `branches` is how many branches of guidance this rank
    computes. An untrimmed text has one length; an unrounded one may have any, which costs nothing on a CPU.
    """
    kinds = {(step.expert, step.attention, step.layers, step.guided): step for step in plan if step.source is None}
    for step in kinds.values():
        expert = experts[step.expert]
        if not (expert.trim_text and expert.round_text):
            continue
        expert.select(step.layers)
        split = expert.split if step.guided else expert.unguided_split
        tokens = expert.embed(latents, split)
        for length in padding.LENGTHS:
            longest = min(length, hidden.shape[1]) - 1  # one for the padding, where it is not merged in
            keys = expert.text_keys(Embeds(hidden, (longest,) * len(hidden)))[:1]
            texts = [keys] * (branches if step.guided else 1)
            expert.run_branches(tokens, latents, step.timestep, texts, step.attention, split)


def _apply_again(step: Step, expert: Expert, inputs: torch.Tensor, kept: Kept) -> list[torch.Tensor]:
    """Return this rank's predictions from an earlier step's change, without running the blocks."""
    split = expert.split if kept.guided else expert.unguided_split
    tokens = expert.embed(inputs, split)
    return [expert.predict(tokens + step.factor * change, inputs, step.timestep, split) for change in kept.changes]
