"""The loop over steps never waits for the device: no copy between it and the host, and no question about a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from wan_mlperf import denoise, load_recipe
from wan_mlperf.checkpoint import Checkpoint
from wan_mlperf.experts import Expert, Split, TextKeys
from wan_mlperf.kernels import padding
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import make_plan, make_scheduler
from wan_mlperf.text_encoder import Embeds

META = torch.device("meta")  # stands for the device: what an operation would compute does not matter, only where its tensors are
WAITS = ("_local_scalar_dense", "_linalg_check_errors", "nonzero", "equal", "is_nonzero")


class Waits(TorchDispatchMode):
    """Counts operations that copy between devices, or ask for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            sources = [one for one in args if isinstance(one, torch.Tensor)]
            if any(one.device != out.device for one in sources):
                self.seen.append(name)
        elif name in WAITS:
            self.seen.append(name)
        return out


class OneRank:
    """Guidance on one rank."""

    def all_branches(self, own: Any) -> Any:
        positive, negative = own
        return positive, negative


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _kernel: str, _tokens: int) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def cross_attend(query: torch.Tensor, text: TextKeys) -> torch.Tensor:
    assert text.padding is not None
    logits = (query @ text.key.mT).float() * query.shape[-1] ** -0.5
    return padding.merge(logits.softmax(-1).to(query.dtype) @ text.value, logits.logsumexp(-1), query, text.padding)


def waits_by_step(model: Path, scheduler: Any, steps: int = 5) -> list[list[str]]:
    """What each step of a second query waits for; the first one makes the tables that are kept."""
    recipe = load_recipe("tiny", overrides=[f"workload.steps={steps}", "reuse.steps=[3]", "guidance.off=[4]"])
    found, workload = Checkpoint("test", model), recipe.effective_workload
    plan = make_plan(recipe, workload, scheduler.config)
    experts = {}
    for name, part in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        transformer = found.load_transformer(part, "bfloat16").to(META)
        experts[name] = Expert(
            transformer, split=Split(), self_attend=attend, cross_attend=cross_attend, trim_text=True, merge_padding=True
        )
    hidden = torch.empty(1, 512, found.config("transformer")["text_dim"], dtype=torch.bfloat16, device=META)
    prompt = denoise.Prompt([Embeds(hidden, (5,)), Embeds(hidden, (9,))], Embeds(hidden, (5,)))
    latents = torch.empty(1, *workload.latent_shape(16), device=META)
    by_step: list[list[str]] = []
    for _ in range(2):
        by_step.clear()
        scheduler = make_scheduler(scheduler.config, workload.steps)
        with torch.inference_mode(), Waits() as waits:

            def note(_step: Any, _latents: Any, waits: Waits = waits) -> None:
                by_step.append(waits.seen[:])
                waits.seen.clear()

            denoise.denoise(latents, prompt, plan, experts, scheduler, OneRank(), spans=Spans(torch.device("cpu")), on_step=note)
    return by_step


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_step_waits_for_nothing(kind: Any, model: Path) -> None:
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    first, *rest = waits_by_step(model, scheduler)
    assert rest == [[]] * 4
    assert set(first) <= {"_to_copy"} and len(first) <= 1  # the schedule, once per query
