"""The first stage: a byte-level tokenizer and a small UMT5 encoder that learns what the captions say.

The encoder is trained with four temporary heads that name the shape, both colours and the motion, and is then frozen. With a
random frozen encoder the experts are far worse.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan_mlperf.shapes.clips import BACKGROUNDS, FOREGROUNDS, MOTIONS, PHRASINGS, SHAPES, Scene, caption, scenes
from wan_mlperf.workload import NEGATIVE_PROMPT

from .data import captions, clips_scenes
from .loop import cosine, fit, rng, set_rate

WIDTH: Final = 128


def train_tokenizer(folder: Path) -> None:
    """Write a tokenizer that takes any string: bytes, merged where captions and the negative prompt repeat them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [caption(scene, phrasing) for scene in scenes()[::7] for phrasing in range(PHRASINGS)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*lines, *[NEGATIVE_PROMPT] * 2], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # transformers 5 would write its own class here, which transformers 4 does not know
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_prefix_space": True,  # transformers 4 would turn it off
        "model_max_length": 512,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read back what `train_tokenizer` wrote."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def build(vocabulary: int) -> UMT5EncoderModel:
    """Make a small UMT5. With the usual initial values it does not learn the colours; a wider attention bias helps."""
    config = UMT5Config(
        vocab_size=vocabulary, d_model=WIDTH, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, is_encoder_decoder=False,
    )  # fmt: skip
    model = UMT5EncoderModel(config)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=1.5)
    return model


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, [B, T], padded to the longest text."""
    batch: Any = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def embed(model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return embeddings [B, T, D], zero after the end of each text, and mask [B, T]."""
    ids, mask = tokenize(tokenizer, texts)
    ids, mask = ids.to(model.device), mask.to(model.device)
    return model(ids, mask).last_hidden_state * mask[..., None], mask


class Heads(nn.Module):
    """Four linear layers on the mean of the tokens, one per attribute."""

    words: Final = {"shape": SHAPES, "foreground": FOREGROUNDS, "background": BACKGROUNDS, "motion": MOTIONS}

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(WIDTH, len(words)) for name, words in self.words.items()})

    def forward(self, embeds: Tensor, mask: Tensor, chosen: list[Scene]) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy, and which scenes have all four attributes right [B]."""
        pooled = embeds.sum(1) / mask.sum(1, keepdim=True)
        loss, right = pooled.new_zeros(()), torch.ones(len(chosen), dtype=torch.bool, device=pooled.device)
        for name, words in self.words.items():
            target = torch.tensor([words.index(getattr(scene, name)) for scene in chosen], device=pooled.device)
            logits = self.layers[name](pooled)
            loss = loss + F.cross_entropy(logits, target) / len(self.words)
            right &= logits.argmax(1) == target
        return loss, right


def train(work: Path, seed: int, scale: float, device: torch.device) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Train tokenizer and encoder."""
    torch.manual_seed(seed)
    folder = work / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        train_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    model, heads = build(len(tokenizer)).to(device).train(), Heads().to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=3e-3, weight_decay=0.01)
    steps = max(1, round(1000 * scale))

    def step(i: int) -> dict[str, float]:
        generator = rng(seed, "text", i)
        set_rate(optimizer, cosine(i, steps))
        chosen = clips_scenes(generator, 64)
        loss, right = heads(*embed(model, tokenizer, captions(generator, chosen)), chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        return {"loss": loss.item(), "right": right.float().mean().item()}

    fit(work, "text", steps, {"model": model, "heads": heads, "optimizer": optimizer}, step)
    return tokenizer, model.eval().requires_grad_(False)
