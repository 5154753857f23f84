"""The fourth stage: one transformer for all noise levels, then two copies of it, the experts, each for its own range of noise.

Flow matching: x = (1 - sigma) x0 + sigma noise, the model predicts noise - x0, its timestep is 1000 sigma.

Shapes: B batch, C channels, F latent frames, h w latent height and width, T text tokens, D width of the text.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from wan_mlperf.kernels.linear import compute_dtype
from wan_mlperf.shapes.clips import Scene, training_scenes
from wan_mlperf.workload import NEGATIVE_PROMPT

from .data import captions
from .latents import Latents
from .loop import average, fit, mixed, noise, rng, set_rate
from .muon import Muon
from .text import WIDTH, embed

BATCH: Final = 32
TEXT_LENGTHS: Final = (512, 512, 512, 226)
"""Lengths that the text is padded to, chosen at random: callers of the pipeline may choose any, and 226 is the default."""
RANGES: Final = {"high": (0.85, 1.0), "low": (0.0, 0.9)}
"""Sigma that each expert is trained on; the boundary is 0.875."""
GUESSED: Final = (0.02, 0.6)
"""Sigma from which latents are guessed for the decoder to learn from."""
STEPS: Final = {"high": 1000, "low": 8000}
"""The low-noise expert draws the outlines. They take longer to learn than the shape's place and colour."""


class PaddedTextAttention:
    """Attention in float32 in which one row of padding at the end of the text counts as many.

    The pipeline pads the text with zeros and masks nothing. All padding rows are equal, so a single one, with the logarithm of
    their number added to its logit, gives the same attention at a twentieth of the cost. It is in float32 because the backward
    pass of bf16 attention is ten times slower on a CPU.
    """

    bias: Tensor | None = None  # [B, 1, 1, T], for the cross-attention

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What diffusers' `WanAttnProcessor` computes for text-to-video."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
            mask = None if encoder_hidden_states is None else self.bias
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2].float(), sin[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def build() -> WanTransformer3DModel:
    """Make a small version of Wan2.2's transformer: 8 heads of 32, 4 layers."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=WIDTH,
        freq_dim=256, ffn_dim=1024, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6,
        rope_max_seq_len=1024,
    )  # fmt: skip
    with torch.no_grad():
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
        nn.init.zeros_(model.condition_embedder.time_proj.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.bias)
        nn.init.zeros_(model.scale_shift_table)
        for block in model.blocks:
            nn.init.zeros_(block.scale_shift_table)
            block.scale_shift_table[:, [2, 5]] = 0.3  # the gates
    return model


def optimizers(model: WanTransformer3DModel) -> dict[str, torch.optim.Optimizer]:
    """Use Muon for the blocks' matrices and AdamW for the rest. AdamW alone is far behind after the same number of steps."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return {
        "muon": Muon(matrices, lr=2e-3, weight_decay=0.1, products=compute_dtype(torch.bfloat16, matrices[0].device)),
        "adamw": torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01),
    }


def sigmas(generator: np.random.Generator, count: int, low: float, high: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw noise levels in [low, high], distributed like the steps of a flow shift of 3, one in each of `count` equal parts."""
    begin, end = (s / (3 - 2 * s) for s in (low, high))
    u = begin + (end - begin) * (generator.permutation(count) + generator.random(count)) / count
    return (3 * u / (1 + 2 * u)).astype(np.float32)


def nothing(generator: np.random.Generator) -> str:
    """Draw a text to learn the unconditional branch from: none, the benchmark's negative prompt, or some of its words."""
    kind = generator.random()
    if kind < 0.4:
        return ""
    if kind < 0.8:
        return NEGATIVE_PROMPT
    words = NEGATIVE_PROMPT.replace(",", "").split()
    return " ".join(generator.choice(words, int(generator.integers(1, 20))))


class Trainer:
    """What all three runs share: latents, captions and the loss."""

    def __init__(
        self, seed: int, device: torch.device, latents: Latents, tokenizer: PreTrainedTokenizerFast, text: UMT5EncoderModel
    ):
        """Normalise the latents once."""
        self.seed, self.device, self.tokenizer, self.text = seed, device, tokenizer, text
        self.latents = latents.normalized().to(device)
        self.mean, self.spread = (x.view(1, -1, 1, 1, 1).to(device) for x in latents.statistics())

    def loss(
        self, model: WanTransformer3DModel, processor: PaddedTextAttention, stage: str, i: int, low: float, high: float
    ) -> Tensor:
        """Return the mean squared error of one batch. A tenth of its captions is replaced by one text from `nothing`."""
        generator, known = rng(self.seed, stage, i), training_scenes()
        rows = generator.integers(len(self.latents), size=BATCH)
        texts = captions(generator, [known[row % len(known)] for row in rows])
        texts[: BATCH // 10] = [nothing(generator)] * (BATCH // 10)
        embeds = self.embeds(processor, texts, int(generator.choice(TEXT_LENGTHS)))
        sigma = torch.from_numpy(sigmas(generator, BATCH, low, high)).to(self.device)
        clean = self.latents[torch.from_numpy(rows).to(self.device)]
        pure = noise(generator, tuple(clean.shape), self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * pure
        with mixed(self.device):
            predicted = model(noisy, sigma * 1000, embeds, return_dict=False)[0]
        return F.mse_loss(predicted.float(), pure - clean)

    def embeds(self, processor: PaddedTextAttention, texts: list[str], length: int) -> Tensor:
        """Return the embeddings of `texts` and one row of padding, which from now on counts as all rows up to `length`."""
        with torch.no_grad():
            embeds, mask = embed(self.text, self.tokenizer, texts)
        padding = (length - mask.sum(1, keepdim=True)).clamp(min=1).log()
        logits = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask == 0, -math.inf)
        processor.bias = torch.cat([logits, padding], dim=1)[:, None, None]
        return F.pad(embeds, (0, 0, 0, 1))

    def guess(self, model: WanTransformer3DModel, generator: np.random.Generator, latents: Tensor, shown: list[Scene]) -> Tensor:
        """Return what `model` makes of noisy versions of these latents: imperfect like those that the decoder will get."""
        processor = PaddedTextAttention()
        model.set_attn_processor(processor)
        embeds = self.embeds(processor, captions(generator, shown), TEXT_LENGTHS[0])
        sigma = torch.from_numpy(generator.uniform(*GUESSED, len(shown)).astype(np.float32)).to(self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * (latents - self.mean) / self.spread + level * noise(generator, tuple(latents.shape), self.device)
        with torch.no_grad(), mixed(self.device):
            predicted = model(noisy, sigma * 1000, embeds, return_dict=False)[0]
        return (noisy - level * predicted.float()) * self.spread + self.mean

    def run(
        self,
        work: Path,
        stage: str,
        model: WanTransformer3DModel,
        steps: int,
        low: float,
        high: float,
        *,
        anneal: bool,
    ) -> WanTransformer3DModel:
        """Train `model` on sigma in [low, high] and return its moving average. With `anneal` the learning rates end at zero."""
        model = model.to(self.device)
        processor = PaddedTextAttention()
        model.set_attn_processor(processor)
        ema = copy.deepcopy(model)
        both = optimizers(model)

        def step(i: int) -> dict[str, float]:
            for optimizer in both.values():
                set_rate(optimizer, min(1.0, (i + 1) / 20, 2 - 2 * i / steps if anneal else 1.0))
                optimizer.zero_grad()
            loss = self.loss(model, processor, stage, i, low, high)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            for optimizer in both.values():
                optimizer.step()
            average(ema, model, i)
            return {"loss": loss.item()}

        fit(work, stage, steps, {"model": model, "ema": ema, **both}, step)
        return ema

    def base(self, work: Path, scale: float) -> WanTransformer3DModel:
        """The model of all noise levels that both experts start from."""
        torch.manual_seed(self.seed)
        return self.run(work, "base", build(), max(20, round(650 * scale)), 0.0, 1.0, anneal=False)

    def expert(self, work: Path, scale: float, name: str, base: WanTransformer3DModel) -> WanTransformer3DModel:
        """One expert, from the base, its rates constant for half the steps and then down to zero."""
        return self.run(work, name, base, max(20, round(STEPS[name] * scale)), *RANGES[name], anneal=True)
