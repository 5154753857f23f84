"""Trains the embedded model for a small part of its steps: every loss falls, stopping loses nothing, and the folder loads."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tools.train_embedded import experts, latents, loop, muon, text, vae

ROOT = Path(__file__).parents[2]
FALL = {"text": 10.0, "vae": 3.0, "base": 2.0, "high": 1.2, "low": 1.2}
"""At least by what factor a tenth of the steps lowers each loss, from the first line of the log to the last."""
REFINED = 1.02
"""The same for the last stage, on the same clips before and after: its 15 steps change less than clips differ."""


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_tenth_of_the_steps_lowers_every_loss(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.train_embedded", "--work", str(tmp_path), "--steps-scale", "0.1", "--score", "2"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=5350)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for stage, factor in FALL.items():
        losses = [line["loss"] for line in lines if line["stage"] == stage]
        assert losses[0] >= factor * losses[-1], (stage, losses)
    before, after = refined(tmp_path)
    assert before >= REFINED * after, (before, after)
    assert (tmp_path / "embedded" / "model_index.json").exists()


def refined(work: Path) -> tuple[float, float]:
    """The loss of `refine` on eight clips with the autoencoder's own decoder and with the refined one."""
    model, cpu = vae.build().eval(), torch.device("cpu")
    model.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    settings = (work, 0, 0.1, cpu)
    trainer = experts.Trainer(0, cpu, latents.make(*settings, model), *text.train(*settings))
    guess = partial(trainer.guess, trainer.base(work, 0.1))

    def loss() -> float:
        with torch.no_grad():
            return sum(vae.steadiness(model, guess, loop.rng(1, "check", i), cpu)[0].item() for i in range(4))

    before = loss()
    saved = torch.load(work / "refine.pt", weights_only=True)
    model.decoder.load_state_dict(saved["decoder"])
    model.post_quant_conv.load_state_dict(saved["post"])
    return before, loss()


def test_two_calls_of_the_autoencoder_equal_diffusers_chunks() -> None:
    torch.manual_seed(0)
    model = vae.build().eval()
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, _ = vae.encode(model, video)
        torch.testing.assert_close(mean, model.encode(video).latent_dist.mode(), atol=1e-5, rtol=1e-5)
        expected = model.decode(mean).sample
        torch.testing.assert_close(vae.decode(model, mean).clamp(-1, 1), expected, atol=1e-5, rtol=1e-5)


def test_one_padding_row_stands_for_all_of_them() -> None:
    torch.manual_seed(0)
    model = experts.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    noisy, words, length = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 7, text.WIDTH), 64
    when = torch.tensor([700.0])
    with torch.no_grad():
        expected = model(noisy, when, torch.nn.functional.pad(words, (0, 0, 0, length - 7)), return_dict=False)[0]
        processor = experts.PaddedTextAttention()
        processor.bias = torch.tensor([0.0] * 7 + [np.log(length - 7)], dtype=torch.float32).view(1, 1, 1, 8)
        model.set_attn_processor(processor)
        got = model(noisy, when, torch.nn.functional.pad(words, (0, 0, 0, 1)), return_dict=False)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_sigmas_stay_in_their_expert_s_range() -> None:
    for low, high in experts.RANGES.values():
        drawn = experts.sigmas(np.random.default_rng(0), 64, low, high)
        assert low <= drawn.min() and drawn.max() <= high
        assert len(np.unique(drawn)) == 64


def test_orthogonalize_makes_singular_values_about_one() -> None:
    values = torch.linalg.svdvals(muon.orthogonalize(torch.randn(24, 60, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.4


def test_muon_is_torchs_own_on_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 60, generator=generator)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    both = (
        muon.Muon([ours], lr=0.1, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradient = torch.randn(24, 60, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in both:
            optimizer.step()
    assert (ours - start).norm() > 1
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()  # theirs iterates in bf16


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(work: Path, steps: int) -> torch.nn.Linear:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def step(i: int) -> dict[str, float]:
            loss = model(loop.noise(loop.rng(1, "toy", i), (8, 4), torch.device("cpu"))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.item()}

        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        loop.fit(work, "toy", steps, state, step)
        return model

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 2)
    torch.testing.assert_close(run(tmp_path / "parts", 6).weight, whole.weight, atol=0, rtol=0)


def test_latents_are_normalized_by_channel() -> None:
    few = latents.Latents(4)
    few.values.normal_(2.0, 3.0, generator=torch.Generator().manual_seed(0))
    normal = few.normalized()
    assert normal.mean((0, 2, 3, 4)).abs().max() < 1e-4
    assert (normal.std((0, 2, 3, 4)) - 1).abs().max() < 1e-4
